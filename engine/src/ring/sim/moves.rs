//! What the simulated kernel does for each kind of operation when it looks at it: nothing yet, or a
//! completion, as chance has it.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, RawFd};

use super::net::{Place, World, stand_in};
use crate::buffers::BufferId;
use crate::operation::Operation;
use crate::ring::{Event, Room};

/// An operation under way, and its delay if chance has given it one.
pub(super) struct Pending {
    pub(super) operation: Operation,
    pub(super) not_before_ns: Option<u64>,
    /// Ends without having looked at the socket: cancelled, or found no buffer at the start.
    pub(super) early: Option<Event>,
}

impl Pending {
    pub(super) fn new(operation: Operation) -> Pending {
        Pending {
            operation,
            not_before_ns: None,
            early: None,
        }
    }

    /// Whether an operation that could complete does so now.
    pub(super) fn is_due(&mut self, world: &mut World) -> bool {
        match self.not_before_ns {
            None if world.happens(world.faults.delay) => {
                let delay_ns = world.chance.below(world.faults.delay_max_ns.max(1));
                self.not_before_ns = Some(world.now_ns + 1 + delay_ns);
                false
            }
            Some(not_before_ns) if not_before_ns > world.now_ns => false,
            _ => {
                self.not_before_ns = None;
                true
            }
        }
    }
}

/// The buffers, and which of them the shard has.
pub(super) struct Memory {
    pub(super) base: *mut u8,
    pub(super) buffer_bytes: usize,
    pub(super) free: VecDeque<BufferId>,
    pub(super) held: Vec<bool>,
}

impl Memory {
    pub(super) fn bytes(&mut self, buffer: BufferId) -> &mut [u8] {
        let at = usize::from(buffer) * self.buffer_bytes;
        assert!(usize::from(buffer) < self.held.len());
        // SAFETY: one of `Buffers`, which outlives the ring, and not held by the shard: it was
        // taken from the free list, or has just been given back.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(at), self.buffer_bytes) }
    }
}

pub(super) fn accept(
    world: &mut World,
    line: usize,
    pending: &mut Pending,
) -> Option<(Event, bool)> {
    if let Some(event) = pending.early.take() {
        return Some((event, false));
    }
    let failed = |errno| Some((Event::AcceptFailed { errno }, false));
    match world.waiting(line) {
        None => return failed(libc::EINVAL),
        Some(false) => return None,
        Some(true) if !pending.is_due(world) => return None,
        Some(true) => {}
    }
    if world.happens(world.faults.accept_failure) {
        return failed(libc::EMFILE);
    }
    let socket = match stand_in() {
        Ok(socket) => socket,
        Err(error) => return failed(error.raw_os_error().unwrap_or(libc::EMFILE)),
    };
    let end = world.accept(line)?;
    world.register(socket.as_raw_fd(), Place::End(end));
    let more = !world.happens(world.faults.ends);
    Some((Event::Accepted { socket, more }, more))
}

pub(super) fn connect(
    world: &mut World,
    end: usize,
    address: SocketAddr,
    pending: &mut Pending,
) -> Option<Event> {
    if world.is_shut(end) {
        let errno = libc::ECONNRESET;
        return Some(Event::Connected { errno });
    }
    if world.is_black_hole(address) || !pending.is_due(world) {
        return None;
    }
    let fails = world.happens(world.faults.connect_failure);
    let connected = !fails && world.connect(end, address);
    let errno = if connected { 0 } else { libc::ECONNREFUSED };
    Some(Event::Connected { errno })
}

pub(super) fn receive(
    world: &mut World,
    end: usize,
    memory: &mut Memory,
    pending: &mut Pending,
    once_bytes: u32,
) -> Option<(Event, bool)> {
    let bytes = match arrived(world, end, pending)? {
        Ok(bytes) => bytes,
        Err(event) => return Some((event, false)),
    };
    if memory.free.is_empty() || world.happens(world.faults.no_buffers) {
        return Some((Event::NoBuffers, false));
    }
    let mut bytes = match once_bytes {
        0 => bytes.min(memory.buffer_bytes),
        limit => bytes.min(memory.buffer_bytes).min(limit as usize),
    };
    if world.happens(world.faults.short_receive) {
        bytes = 1 + world.chance.below(bytes as u64) as usize;
    }
    let buffer = memory.free.pop_front()?;
    memory.held[usize::from(buffer)] = true;
    world.read(end, &mut memory.bytes(buffer)[..bytes]);
    let more = once_bytes == 0 && !world.happens(world.faults.ends);
    let bytes = bytes as u32;
    let received = Event::Received {
        buffer,
        bytes,
        more,
    };
    Some((received, more))
}

/// A receive into `room`.
pub(super) fn land(
    world: &mut World,
    end: usize,
    room: Room,
    pending: &mut Pending,
) -> Option<(Event, bool)> {
    let bytes = match arrived(world, end, pending)? {
        Ok(bytes) => bytes,
        Err(event) => return Some((event, false)),
    };
    let mut bytes = bytes.min(room.bytes as usize);
    if world.happens(world.faults.short_receive) {
        bytes = 1 + world.chance.below(bytes as u64) as usize;
    }
    // SAFETY: the room may be written until the receive completes, which is now.
    let to = unsafe { std::slice::from_raw_parts_mut(room.start.as_ptr(), bytes) };
    world.read(end, to);
    let bytes = bytes as u32;
    Some((Event::Landed { bytes }, false))
}

/// How many bytes may be received now, or the event that comes in their place. `None`: nothing yet.
fn arrived(world: &mut World, end: usize, pending: &mut Pending) -> Option<Result<usize, Event>> {
    if let Some(event) = pending.early.take() {
        return Some(Err(event));
    }
    if world.readable(end).is_none() || !pending.is_due(world) {
        return None;
    }
    if world.happens(world.faults.reset) {
        world.reset(end);
    }
    Some(match world.readable(end)? {
        Ok(0) => Err(Event::EndOfStream),
        Ok(bytes) => Ok(bytes),
        Err(errno) => {
            world.take_error(end);
            Err(Event::ReceiveFailed { errno })
        }
    })
}

pub(super) fn send(
    world: &mut World,
    end: usize,
    spans: &[libc::iovec],
    pending: &mut Pending,
) -> Option<Event> {
    if world.writable(end).is_none() || !pending.is_due(world) {
        return None;
    }
    if world.happens(world.faults.reset) {
        world.reset(end);
    }
    let room = match world.writable(end)? {
        Ok(room) => room,
        Err(errno) => {
            world.take_error(end);
            return Some(Event::SendFailed { errno });
        }
    };
    let mut bytes = Vec::new();
    for span in spans.iter().map(bytes_of) {
        bytes.extend_from_slice(&span[..span.len().min(room - bytes.len())]);
    }
    let mut count = bytes.len();
    if count > 1 && world.happens(world.faults.short_send) {
        count = 1 + world.chance.below(count as u64) as usize;
    }
    world.write(end, &bytes[..count]);
    let bytes = count as u32;
    Some(Event::Sent { bytes })
}

/// What a span points to, read when the send completes and not when it was asked for: memory that
/// changed too early shows in what the peer reads.
fn bytes_of(span: &libc::iovec) -> &[u8] {
    if span.iov_len == 0 {
        return &[];
    }
    // SAFETY: valid until the send has completed, which is the caller's part of [`Ring::send`].
    unsafe { std::slice::from_raw_parts(span.iov_base.cast(), span.iov_len) }
}

/// Whether somebody has written to the eventfd since the last look.
pub(super) fn take_wake(fd: RawFd) -> bool {
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    let mut count = 0u64;
    // SAFETY: one pollfd, and eight bytes into a u64; it is readable, so the read does not block.
    unsafe {
        libc::poll(&mut poll, 1, 0) == 1
            && libc::read(fd, (&raw mut count).cast(), size_of::<u64>()) > 0
    }
}
