//! System calls on sockets: those that are no operations of a ring, shared by the rings on real
//! sockets, and those with which the epoll ring does what io_uring has operations for.

use std::io;
use std::net::{Shutdown, SocketAddr};
use std::os::fd::{BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};

use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::{Event, Room};
use crate::balance::Origin;

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

/// Shuts our direction down.
pub(super) fn shutdown_write(fd: RawFd) {
    // SAFETY: the caller owns the descriptor and has not closed it.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    let _ = SockRef::from(&fd).shutdown(Shutdown::Write);
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

/// What the kernel has noted of a connection's packets.
pub(super) fn origin(fd: RawFd) -> Origin {
    let number = |option| {
        let mut value: libc::c_int = 0;
        let mut bytes = size_of::<libc::c_int>() as libc::socklen_t;
        // SAFETY: a socket of the caller, and an option of the size of an int, which is written.
        let result = unsafe {
            let value = (&raw mut value).cast();
            libc::getsockopt(fd, libc::SOL_SOCKET, option, value, &raw mut bytes)
        };
        // -1 is a CPU that is not known.
        (result == 0)
            .then_some(value)
            .and_then(|value| u32::try_from(value).ok())
    };
    Origin {
        cpu: number(libc::SO_INCOMING_CPU).map(|cpu| cpu as usize),
        napi: number(libc::SO_INCOMING_NAPI_ID).filter(|napi| *napi > 0),
    }
}

/// Has an epoll descriptor poll the receive queues of its sockets before it sleeps; 0: no more. The
/// layout is the kernel's `struct epoll_params` (6.9).
pub(super) fn poll_queues(epoll: RawFd, microseconds: u32) -> io::Result<()> {
    #[repr(C)]
    struct Parameters {
        busy_poll_usecs: u32,
        busy_poll_budget: u16,
        prefer_busy_poll: u8,
        padding: u8,
    }
    /// `_IOW(0x8a, 1, struct epoll_params)`.
    const SET: u32 = 1 << 30 | (size_of::<Parameters>() as u32) << 16 | 0x8a << 8 | 1;
    let parameters = Parameters {
        busy_poll_usecs: microseconds,
        // Packets at a time, as the kernel has it by itself.
        busy_poll_budget: 8,
        prefer_busy_poll: u8::from(microseconds > 0),
        padding: 0,
    };
    // SAFETY: the kernel reads the parameters during the call, and keeps no pointer.
    match unsafe { libc::ioctl(epoll, SET.into(), &raw const parameters) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Ends non-blocking mode. A socket that refuses it is gone, which its first operation finds.
pub(super) fn make_blocking(fd: RawFd) {
    // SAFETY: the caller owns the descriptor and has not closed it.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    let _ = rustix::io::ioctl_fionbio(fd, false);
}

/// Ends SO_LINGER. A socket that refuses it may lose what its peer has not received at its close.
pub(super) fn keep_sent(fd: RawFd) {
    // SAFETY: the caller owns the descriptor and has not closed it.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    let _ = SockRef::from(&fd).set_linger(None);
}

/// Another descriptor of the same socket.
pub(super) fn duplicate(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the caller owns the descriptor and has not closed it.
    unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()
}

/// Two sockets that are connected to each other, blocking both.
pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let kind = Type::STREAM.cloexec();
    let (one, other) = Socket::pair(Domain::UNIX, kind, None)?;
    Ok((one.into(), other.into()))
}

/// Closes a descriptor.
pub(super) fn close(fd: RawFd) {
    drop(release(fd));
}

/// A descriptor, for somebody else.
pub(super) fn release(fd: RawFd) -> OwnedFd {
    // SAFETY: the caller owns the descriptor and gives it up here.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Sends without blocking. None: the socket takes nothing now.
pub(super) fn send_now(fd: RawFd, spans: *const libc::iovec, count: usize) -> Option<Event> {
    // SAFETY: all-zero is a valid msghdr. The spans are valid until the send completes, which is
    // the caller's part of [`Ring::send`]; the kernel does not write to them.
    let bytes = unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = spans.cast_mut();
        message.msg_iovlen = count as _;
        libc::sendmsg(fd, &message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT)
    };
    match (u32::try_from(bytes), errno()) {
        (Ok(bytes), _) => Some(Event::Sent { bytes }),
        (Err(_), libc::EAGAIN) => None,
        (Err(_), errno) => Some(Event::SendFailed { errno }),
    }
}

/// Receives into `room` without blocking: bytes, or errno.
pub(super) fn receive_now(fd: RawFd, room: Room) -> Result<u32, i32> {
    // SAFETY: the room may be written until the receive has completed, which is the promise of
    // who made it.
    let bytes = unsafe {
        let start = room.start.as_ptr().cast();
        libc::recv(fd, start, room.bytes as usize, libc::MSG_DONTWAIT)
    };
    u32::try_from(bytes).map_err(|_| errno())
}

/// How a connect that was under way has ended: 0 or errno.
pub(super) fn connect_result(fd: RawFd, events: u32) -> i32 {
    // SAFETY: an attached descriptor is kept open by the caller.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    match SockRef::from(&fd).take_error() {
        Ok(Some(error)) | Err(error) => error.raw_os_error().unwrap_or(libc::EIO),
        // Hung up with no error of its own: it was shut down while it connected.
        Ok(None) if events & libc::EPOLLHUP as u32 != 0 => libc::ECONNRESET,
        Ok(None) => 0,
    }
}

/// Why the last system call of this thread failed.
pub(super) fn errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(0)
}
