//! The system calls on sockets that are not ring operations, shared by the rings on real sockets.

use std::io;
use std::net::{Shutdown, SocketAddr};
use std::os::fd::{BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};

use socket2::{Domain, Protocol, SockRef, Socket, Type};

/// A TCP socket without Nagle's delay, to be connected to `address`. io_uring wants it blocking:
/// on a non-blocking one an operation that has to wait fails with EAGAIN instead.
pub(super) fn connect_socket(address: &SocketAddr, nonblocking: bool) -> io::Result<RawFd> {
    let kind = match nonblocking {
        true => Type::STREAM.cloexec().nonblocking(),
        false => Type::STREAM.cloexec(),
    };
    let socket = Socket::new(Domain::for_address(*address), kind, Some(Protocol::TCP))?;
    socket.set_tcp_nodelay(true)?;
    Ok(socket.into_raw_fd())
}

/// Shuts both directions down. A peer that has gone already is what was wanted, so no error.
pub(super) fn shutdown(fd: RawFd) {
    // SAFETY: the caller owns the descriptor and has not closed it.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    let _ = SockRef::from(&fd).shutdown(Shutdown::Both);
}

/// Sets SO_RCVLOWAT. A socket that refuses it is woken more often, no more.
pub(super) fn low_water(fd: RawFd, bytes: u32) {
    let value = bytes as libc::c_int;
    // SAFETY: a socket of the caller, and an option of the size of an int.
    unsafe {
        libc::setsockopt(
            fd,
            libc::SOL_SOCKET,
            libc::SO_RCVLOWAT,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        );
    }
}

/// Closes a descriptor.
pub(super) fn close(fd: RawFd) {
    // SAFETY: the caller owns the descriptor and gives it up here.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
}
