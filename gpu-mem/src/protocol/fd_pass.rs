//! Sends and receives bytes with at most one descriptor beside them (SCM_RIGHTS).

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Sends some of `bytes`, and `descriptor` with the first of them. Answers how many were sent.
///
/// Upstream's clients look for the descriptor only beside the first bytes of a frame, so it must go
/// with those and never alone (`spec/gpu-memory.md` §4.7).
///
/// # Errors
/// As `sendmsg(2)`; a peer that is gone is `EPIPE`, never a signal.
pub fn send(
    socket: impl AsFd,
    bytes: &[u8],
    descriptor: Option<BorrowedFd<'_>>,
) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors: &[BorrowedFd<'_>] = descriptor.as_slice();
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(Errno::NOBUFS);
    }
    sendmsg(
        socket,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )
}

/// What one receive brought.
#[derive(Debug)]
pub struct Received {
    /// How many bytes; zero is the end.
    pub bytes: usize,
    /// The first descriptor that came with them, closed on exec.
    pub descriptor: Option<OwnedFd>,
    /// Whether more descriptors came than one; they are closed already.
    pub too_many: bool,
}

/// Receives into `buffer`.
///
/// # Errors
/// As `recvmsg(2)`.
pub fn receive(socket: impl AsFd, buffer: &mut [u8]) -> Result<Received, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut into = [IoSliceMut::new(buffer)];
    let message = recvmsg(socket, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut received = Received {
        bytes: message.bytes,
        descriptor: None,
        too_many: message.flags.contains(ReturnFlags::CTRUNC),
    };
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = part {
            for descriptor in descriptors {
                received.too_many |= received.descriptor.is_some();
                received.descriptor.get_or_insert(descriptor);
            }
        }
    }
    Ok(received)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_descriptor_travels_with_the_first_byte_and_only_there() {
        let (here, there) = UnixStream::pair().expect("a pair of sockets");
        let (probe, mut other) = UnixStream::pair().expect("a pair of sockets");
        assert_eq!(send(&here, b"abcdef", Some(probe.as_fd())), Ok(6));
        drop(probe);
        let mut buffer = [0; 2];
        let first = receive(&there, &mut buffer).expect("bytes are there");
        assert_eq!((first.bytes, first.too_many), (2, false));
        let passed = UnixStream::from(first.descriptor.expect("a descriptor came"));
        let flags = rustix::io::fcntl_getfd(&passed).expect("open");
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        std::io::Write::write_all(&mut &passed, b"x").expect("it is the same socket");
        std::io::Read::read_exact(&mut other, &mut [0]).expect("the byte came through");
        let second = receive(&there, &mut buffer).expect("bytes are there");
        assert!(second.descriptor.is_none());
    }

    #[test]
    fn a_peer_that_is_gone_is_an_error_and_no_signal() {
        let (here, there) = UnixStream::pair().expect("a pair of sockets");
        drop(there);
        assert_eq!(send(&here, b"a", None), Err(Errno::PIPE));
    }
}
