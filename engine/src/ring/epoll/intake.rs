//! What comes in on the epoll ring: connections, and bytes into buffers.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use super::{ACCEPTS_PER_ROUND, Epoll, Memory};
use crate::buffers::BufferId;
use crate::operation::{Kind, Operation};
use crate::ring::sockets::errno;
use crate::ring::{Event, Handle, Room};

impl Epoll {
    pub(super) fn accept_round(&mut self) {
        for index in 0..self.listeners.len() {
            for _ in 0..ACCEPTS_PER_ROUND {
                let listener = &self.listeners[index];
                let (Some(operation), true) = (listener.accept, listener.ready) else {
                    break;
                };
                self.accept_once(index, operation);
            }
        }
    }

    fn accept_once(&mut self, index: usize, operation: Operation) {
        let listener = &mut self.listeners[index];
        self.system_calls += 1;
        // SAFETY: the peer's address is not asked for, so nothing is written.
        let fd = unsafe {
            libc::accept4(
                listener.fd,
                std::ptr::null_mut(),
                std::ptr::null_mut(),
                libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
            )
        };
        if fd >= 0 {
            // SAFETY: the kernel has just made this descriptor for us.
            let socket = unsafe { OwnedFd::from_raw_fd(fd) };
            return self.complete(operation, Event::Accepted { socket, more: true });
        }
        match errno() {
            libc::EAGAIN => listener.ready = false,
            // The peer went away while it waited in line; the next one may be there.
            libc::ECONNABORTED | libc::EINTR => {}
            errno => {
                listener.accept = None;
                self.complete(operation, Event::AcceptFailed { errno });
            }
        }
    }
}

impl Epoll {
    /// Notes a receive.
    pub(super) fn want(
        &mut self,
        operation: Operation,
        handle: Handle,
        once: u32,
        room: Option<Room>,
    ) {
        let slot = &mut self.slots[handle.slot as usize];
        debug_assert!(slot.receive.is_none(), "one receive per socket at a time");
        if slot.refused != 0 {
            let errno = slot.refused;
            return self.complete(operation, Event::ReceiveFailed { errno });
        }
        slot.receive = Some(operation);
        (slot.once_bytes, slot.room) = (once, room);
        self.queue(handle.slot);
    }

    /// Ends an accept, a receive, or a send that waits for room.
    pub(super) fn end_early(&mut self, operation: Operation, slot: usize) {
        let errno = libc::ECANCELED;
        if operation.kind == Kind::Accept {
            let wanted = Some(operation);
            if let Some(listener) = self.listeners.iter_mut().find(|l| l.accept == wanted) {
                listener.accept = None;
                self.complete(operation, Event::AcceptFailed { errno });
            }
            return;
        }
        let slot = &mut self.slots[slot];
        if slot.receive == Some(operation) {
            (slot.receive, slot.room) = (None, None);
            self.complete(operation, Event::ReceiveFailed { errno });
        } else if slot.send == Some(operation) {
            slot.send = None;
            self.complete(operation, Event::SendFailed { errno });
        }
    }
}

impl Memory {
    /// Receives at most `limit` bytes into a free buffer: bytes, or errno.
    pub(super) fn fill(&self, fd: RawFd, buffer: BufferId, limit: usize) -> Result<usize, i32> {
        let at = usize::from(buffer) * self.buffer_bytes;
        // SAFETY: `buffer` was in the free list, so it is one of `Buffers` and nobody else's; the
        // memory outlives the ring.
        let bytes = unsafe {
            let start = self.base.add(at).cast();
            libc::recv(fd, start, limit, libc::MSG_DONTWAIT)
        };
        usize::try_from(bytes).map_err(|_| errno())
    }
}
