//! The data ring: what a shard asks of the kernel, and what comes back.
//!
//! Three implementations: [`uring`] (io_uring), [`epoll`] (hosts where io_uring is refused) and
//! [`sim`] (seeded, for tests). A shard is generic over them and behaves the same on each:
//!
//! * receives are *multishot*: asked for once, they complete again and again until one completion
//!   says that there is no `more`;
//! * received bytes lie in a buffer of the shard's [`Buffers`](crate::buffers::Buffers), which is
//!   ours until [`Ring::recycle`];
//! * a send completes once, with the number of bytes that the socket took;
//! * nothing blocks but [`Ring::wait`].

use std::io;
use std::net::SocketAddr;
use std::os::fd::{OwnedFd, RawFd};
use std::ptr::NonNull;
use std::time::Duration;

use crate::balance::Origin;
use crate::buffers::BufferId;
use crate::operation::Operation;

pub mod epoll;
pub mod ktls;
pub mod sim;
mod sockets;
pub mod uring;

/// A completed operation.
#[derive(Debug)]
pub struct Completion {
    /// What was asked for.
    pub operation: Operation,
    /// What came of it.
    pub event: Event,
}

/// What came of an operation. Errors are errno values.
#[derive(Debug)]
pub enum Event {
    /// A connection was accepted.
    Accepted {
        /// The connection.
        socket: OwnedFd,
        /// Whether the accept goes on by itself.
        more: bool,
    },
    /// The accept ended.
    AcceptFailed {
        /// Why.
        errno: i32,
    },
    /// Bytes arrived in `buffer[..bytes]`, which is the receiver's now.
    Received {
        /// Where.
        buffer: BufferId,
        /// How many, at least 1.
        bytes: u32,
        /// Whether the receive goes on by itself.
        more: bool,
    },
    /// So many bytes arrived in the room given to [`Ring::receive_into`].
    Landed {
        /// How many, at least 1.
        bytes: u32,
    },
    /// The peer sent its end of stream. No further completion comes.
    EndOfStream,
    /// No buffer was free; the receive ended and must be asked for again.
    NoBuffers,
    /// The receive ended with an error, or was cancelled.
    ReceiveFailed {
        /// Why.
        errno: i32,
    },
    /// The socket took so many bytes.
    Sent {
        /// How many.
        bytes: u32,
    },
    /// The send failed; nothing more can be sent.
    SendFailed {
        /// Why.
        errno: i32,
    },
    /// The connect came to an end.
    Connected {
        /// 0 when it succeeded.
        errno: i32,
    },
    /// Somebody wrote to our eventfd.
    Woken {
        /// Whether the watch goes on by itself.
        more: bool,
    },
}

impl Event {
    /// Nobody waits for it any more: the buffer that it brought, if it did, goes back.
    pub fn give_back(self, ring: &mut impl Ring) {
        if let Event::Received { buffer, .. } = self {
            ring.recycle(buffer);
        }
    }

    /// Whether the wake-up must be asked for again to hear of the next one.
    pub fn is_last_wake(&self) -> bool {
        matches!(self, Event::Woken { more: false })
    }
}

/// A socket as the ring knows it: its descriptor, and its place in the ring's table of files.
#[derive(Clone, Copy, Debug)]
pub struct Handle {
    /// The descriptor.
    pub fd: RawFd,
    /// The slot given to [`Ring::attach`].
    pub slot: u32,
}

/// A piece of memory to be sent. It stays valid and unchanged until the send has completed.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Span(pub(crate) libc::iovec);

impl Span {
    /// The span of a slice. The caller keeps the memory until the send has completed.
    pub fn of(bytes: &[u8]) -> Span {
        Span(libc::iovec {
            iov_base: bytes.as_ptr() as *mut _,
            iov_len: bytes.len(),
        })
    }

    /// The span of memory that other processes may write to meanwhile: it is sent as it is then.
    /// The caller keeps it mapped until the send has completed.
    pub fn of_shared(start: NonNull<u8>, bytes: usize) -> Span {
        Span(libc::iovec {
            iov_base: start.as_ptr().cast(),
            iov_len: bytes,
        })
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.0.iov_len == 0
    }
}

/// Memory outside of the shard's buffers that a receive fills.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    pub(crate) start: NonNull<u8>,
    pub(crate) bytes: u32,
}

impl Room {
    /// `bytes` bytes from `start` on. The caller keeps them mapped, and for the kernel to write,
    /// until the receive has completed.
    pub fn of_shared(start: NonNull<u8>, bytes: u32) -> Room {
        Room { start, bytes }
    }
}

/// At most so many spans in one send.
pub const SPANS_MAX: usize = 256;

/// The kernel as a shard sees it. All calls but [`Ring::wait`] only note what is wanted.
pub trait Ring {
    /// `uring`, `epoll` or `sim`, for logs and metrics.
    fn name(&self) -> &'static str;

    /// Accept connections on a listening socket, again and again.
    fn accept(&mut self, operation: Operation, listener: RawFd);

    /// Makes a socket known under its slot.
    fn attach(&mut self, handle: Handle);

    /// Forgets it. No operation of it is under way any more.
    fn detach(&mut self, handle: Handle);

    /// Connect a socket that is attached.
    fn connect(&mut self, operation: Operation, handle: Handle, address: &SocketAddr);

    /// Receive into buffers of the ring, again and again.
    fn receive(&mut self, operation: Operation, handle: Handle);

    /// Receive once into a buffer of the ring, at most `bytes` bytes: so that what follows them can
    /// be received elsewhere.
    fn receive_once(&mut self, operation: Operation, handle: Handle, bytes: u32);

    /// Receive once, not into a buffer of the ring but into `room`: `Landed`, with part of it
    /// filled or all.
    fn receive_into(&mut self, operation: Operation, handle: Handle, room: Room);

    /// Have a look at what is there now, beside a receive that goes on: `Received` if there is
    /// something, nothing otherwise.
    fn collect(&mut self, operation: Operation, handle: Handle);

    /// Receives of this socket complete only when so many bytes are there, or its end.
    fn low_water(&mut self, handle: Handle, bytes: u32);

    /// What was sent on this socket is delivered even if it is closed soon after: ends SO_LINGER.
    fn keep_sent(&mut self, handle: Handle);

    /// End a receive early; its last completion says `ReceiveFailed` with ECANCELED. An accept
    /// can be ended so too (`AcceptFailed`; the handle is not looked at).
    fn cancel_receive(&mut self, operation: Operation, handle: Handle);

    /// Send at most [`SPANS_MAX`] spans, in order, as one write.
    fn send(&mut self, operation: Operation, handle: Handle, spans: &[Span]);

    /// End a send early of which the socket has taken nothing yet: `SendFailed` with ECANCELED. One
    /// that has got further completes as it would have.
    fn cancel_send(&mut self, operation: Operation, handle: Handle) {
        self.cancel_receive(operation, handle);
    }

    /// Makes a non-blocking TCP socket without Nagle's delay for an outgoing connection. It is the
    /// caller's, to be attached, and closed with [`Ring::close`].
    ///
    /// # Errors
    /// The kernel's answer: EMFILE or ENFILE when no descriptor is left.
    fn connect_socket(&mut self, address: &SocketAddr) -> io::Result<RawFd>;

    /// Shuts both directions of a socket down. A receive, a send and a connect under way on it
    /// complete soon after. Harmless when the peer has gone already.
    fn shutdown(&mut self, handle: Handle);

    /// Shuts our direction of a socket down; the peer sees an end of stream.
    fn shutdown_write(&mut self, handle: Handle) {
        sockets::shutdown_write(handle.fd);
    }

    /// Closes a socket that is detached, or never was attached (the slot is not looked at).
    fn close(&mut self, handle: Handle);

    /// Ends [`Ring::watch_wake`] of this operation. The descriptor may be closed after it.
    fn unwatch_wake(&mut self, operation: Operation, eventfd: RawFd);

    /// Another descriptor of the same socket, for somebody else.
    ///
    /// # Errors
    /// No descriptor is left.
    fn duplicate(&self, handle: Handle) -> io::Result<OwnedFd> {
        sockets::duplicate(handle.fd)
    }

    /// Gives a socket that is detached away, instead of [`Ring::close`].
    fn release(&mut self, handle: Handle) -> OwnedFd {
        sockets::release(handle.fd)
    }

    /// The kernel does TLS on an attached socket from now on: its bytes come in records.
    fn secured(&mut self, _handle: Handle) {}

    /// Takes the record that is no data and for which a receive of such a socket has failed with
    /// EIO: its type, and how many bytes of it are in `into`.
    ///
    /// # Errors
    /// The kernel's answer; there may be no such record.
    fn take_record(&mut self, handle: Handle, into: &mut [u8]) -> io::Result<(u8, usize)> {
        ktls::take_record(handle.fd, into)
    }

    /// From where the packets of a connection come.
    fn origin(&mut self, _fd: RawFd) -> Origin {
        Origin::default()
    }

    /// A socket that another ring has accepted, perhaps of another kind, is to be attached here.
    fn take_over(&mut self, _fd: RawFd) {}

    /// Polls the receive queues that its sockets get their packets from, for so many microseconds
    /// before it sleeps, from now on; 0: no more.
    ///
    /// # Errors
    /// The kernel's answer; EOPNOTSUPP or EINVAL where it cannot.
    fn busy_poll(&mut self, _microseconds: u32) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
    }

    /// Two stream sockets that are connected to each other: one to be attached, one to be given
    /// away.
    ///
    /// # Errors
    /// No descriptor is left.
    fn pair(&self) -> io::Result<(OwnedFd, OwnedFd)> {
        sockets::pair()
    }

    /// Report each write to an eventfd, again and again.
    fn watch_wake(&mut self, operation: Operation, eventfd: RawFd);

    /// Registers the memory that short replies are sent from, so that the kernel need not look
    /// its pages up for each send. `false`: refused (locked-memory limit); sends work all the same.
    fn register_fixed(&mut self, memory: &'static [u8]) -> bool;

    /// A buffer may be filled again.
    fn recycle(&mut self, buffer: BufferId);

    /// Hands all that is wanted to the kernel and waits until something has completed or the
    /// time is over (zero: do not wait). One system call.
    ///
    /// # Errors
    /// Only when the ring itself is broken; interruptions and time-outs are not errors.
    fn wait(&mut self, timeout: Duration) -> io::Result<()>;

    /// The next completion, if there is one.
    fn next_completion(&mut self) -> Option<Completion>;

    /// Tells the ring that nobody will be in [`Ring::wait`] for a while. The descriptor becomes
    /// readable when a completion is there: the shard's executor sleeps on it. `None`: this ring
    /// cannot be slept on from outside.
    fn park(&mut self) -> Option<RawFd>;

    /// Ends [`Ring::park`].
    fn unpark(&mut self);

    /// Monotonic time in ns; simulated on the simulated ring.
    fn now_ns(&self) -> u64;

    /// System calls made so far by `wait` and by the bookkeeping of sockets.
    fn system_calls(&self) -> u64;
}

/// CLOCK_MONOTONIC in ns.
pub(crate) fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
