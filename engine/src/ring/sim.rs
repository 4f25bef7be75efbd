//! The simulated ring: a shard's real code over a network that follows from a seed.
//!
//! ```text
//!  shard -- Ring --> Sim --+
//!  shard -- Ring --> Sim --+--> Net: connections, listeners, clock <-- the test, as peers
//! ```
//!
//! Time stands still but in [`Ring::wait`]: it passes there until something completes. Completions
//! come in any order across operations; those of one operation keep theirs. What the trait forbids
//! (two receives on a socket, closing under way, reading given-back buffers) panics or shows.

mod moves;
mod net;

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{IntoRawFd, RawFd};
use std::time::Duration;

pub use net::{Faults, ListenerId, Net, PeerId, PeerState};

use self::moves::{Memory, Pending, accept, connect, land, receive, send, take_wake};
use self::net::{Place, stand_in};
use super::{Completion, Event, Handle, Ring, Room, SPANS_MAX, Span, sockets};
use crate::buffers::{BufferId, Buffers};
use crate::operation::{Kind, Operation};

/// A ring on a simulated network.
pub struct Sim {
    net: Net,
    memory: Memory,
    slots: Vec<Slot>,
    accepts: Vec<(usize, Pending)>,
    wakes: Vec<(RawFd, Operation)>,
    reaped: VecDeque<Completion>,
    system_calls: u64,
}

#[derive(Default)]
struct Slot {
    /// The end that is attached.
    end: Option<usize>,
    receive: Option<Pending>,
    /// The receive is one of so many bytes at most; 0: it goes on and on.
    once_bytes: u32,
    /// Where the receive goes if not into a buffer.
    room: Option<Room>,
    send: Option<(Pending, Vec<libc::iovec>)>,
    connect: Option<(Pending, SocketAddr)>,
}

/// What a wait costs at least, so that a loop that never sleeps sees time pass too.
const WAIT_NS: u64 = 1_000;
/// What the memory of a given-back buffer is overwritten with.
const POISON: u8 = 0xdd;

impl Sim {
    /// A ring on a network of its own.
    pub fn new(seed: u64, faults: Faults, buffers: &Buffers) -> Sim {
        Sim::beside(&Net::new(seed, faults), buffers)
    }

    /// A further ring on a network. They share its clock.
    pub fn beside(net: &Net, buffers: &Buffers) -> Sim {
        Sim {
            net: net.clone(),
            memory: Memory {
                base: buffers.start(0),
                buffer_bytes: buffers.buffer_bytes(),
                free: (0..buffers.count()).map(|id| id as BufferId).collect(),
                held: vec![false; buffers.count()],
            },
            slots: Vec::new(),
            accepts: Vec::new(),
            wakes: Vec::new(),
            reaped: VecDeque::new(),
            system_calls: 0,
        }
    }

    /// The network: where the test is the peer.
    pub fn net(&self) -> Net {
        self.net.clone()
    }

    /// Buffers that the shard has and has not given back, those of waiting completions included.
    pub fn buffers_held(&self) -> usize {
        self.memory.held.iter().filter(|held| **held).count()
    }

    fn slot(&mut self, handle: Handle) -> &mut Slot {
        let slot = self.slots.get_mut(handle.slot as usize);
        let slot = slot.filter(|slot| slot.end.is_some());
        slot.unwrap_or_else(|| panic!("{handle:?} is not attached"))
    }

    /// Looks once at each operation under way and takes what chance lets complete.
    fn round(&mut self) -> Vec<Completion> {
        let net = self.net.clone();
        let world = &mut *net.0.borrow_mut();
        let mut done = Vec::new();
        let mut push = |operation, event| done.push(Completion { operation, event });
        for index in (0..self.accepts.len()).rev() {
            let (line, pending) = &mut self.accepts[index];
            if let Some((event, more)) = accept(world, *line, pending) {
                push(pending.operation, event);
                if !more {
                    self.accepts.remove(index);
                }
            }
        }
        for slot in &mut self.slots {
            let Some(end) = slot.end else { continue };
            if let Some((pending, address)) = &mut slot.connect
                && let Some(event) = connect(world, end, *address, pending)
            {
                push(pending.operation, event);
                slot.connect = None;
            }
            if let Some(pending) = &mut slot.receive
                && let Some((event, more)) = match slot.room {
                    Some(room) => land(world, end, room, pending),
                    None => receive(world, end, &mut self.memory, pending, slot.once_bytes),
                }
            {
                push(pending.operation, event);
                if !more {
                    (slot.receive, slot.room) = (None, None);
                }
            }
            if let Some((pending, spans)) = &mut slot.send
                && let Some(event) = send(world, end, spans, pending)
            {
                push(pending.operation, event);
                slot.send = None;
            }
        }
        world.chance.shuffle(&mut done);
        done
    }

    /// Some rounds: a multishot operation may complete more than once in one wait.
    fn rounds(&mut self) {
        loop {
            let done = self.round();
            let again = !done.is_empty() && self.net.0.borrow_mut().happens(500);
            self.reaped.extend(done);
            if !again {
                break;
            }
        }
        for (_, operation) in self.wakes.iter().filter(|(fd, _)| take_wake(*fd)) {
            let (operation, event) = (*operation, Event::Woken { more: true });
            self.reaped.push_back(Completion { operation, event });
        }
    }

    /// When the first of the delays ends that have not ended yet.
    fn next_ns(&self) -> Option<u64> {
        let now_ns = self.now_ns();
        let accepts = self.accepts.iter().map(|(_, pending)| pending);
        let slots = self.slots.iter().flat_map(|slot| {
            let connect = slot.connect.as_ref().map(|(pending, _)| pending);
            let send = slot.send.as_ref().map(|(pending, _)| pending);
            [slot.receive.as_ref(), send, connect].into_iter().flatten()
        });
        let delays = accepts
            .chain(slots)
            .filter_map(|pending| pending.not_before_ns);
        delays.filter(|not_before_ns| *not_before_ns > now_ns).min()
    }
}

impl Ring for Sim {
    fn name(&self) -> &'static str {
        "sim"
    }

    fn accept(&mut self, operation: Operation, listener: RawFd) {
        let place = self.net.0.borrow().place(listener);
        let Some(Place::Line(line)) = place else {
            panic!("accept on {listener}, which is {place:?}");
        };
        let twice = self.accepts.iter().any(|(known, _)| *known == line);
        assert!(!twice, "two accepts on one listener");
        self.accepts.push((line, Pending::new(operation)));
    }

    fn attach(&mut self, handle: Handle) {
        let index = handle.slot as usize;
        if index >= self.slots.len() {
            self.slots.resize_with(index + 1, Slot::default);
        }
        let place = self.net.0.borrow().place(handle.fd);
        let Some(Place::End(end)) = place else {
            panic!("attached {handle:?}, which is {place:?}");
        };
        assert!(self.slots[index].end.is_none(), "{handle:?}: slot in use");
        self.slots[index].end = Some(end);
    }

    fn detach(&mut self, handle: Handle) {
        let slot = self.slot(handle);
        let under_way = slot.receive.is_some() || slot.send.is_some() || slot.connect.is_some();
        assert!(
            !under_way,
            "{handle:?} detached with an operation under way"
        );
        slot.end = None;
    }

    fn connect(&mut self, operation: Operation, handle: Handle, address: &SocketAddr) {
        let slot = self.slot(handle);
        assert!(slot.connect.is_none(), "{handle:?}: two connects");
        slot.connect = Some((Pending::new(operation), *address));
    }

    fn receive(&mut self, operation: Operation, handle: Handle) {
        let mut pending = Pending::new(operation);
        // io_uring looks for a buffer first, even if there is nothing to put into it.
        if self.memory.free.is_empty() && self.net.0.borrow_mut().happens(500) {
            pending.early = Some(Event::NoBuffers);
        }
        let slot = self.slot(handle);
        assert!(slot.receive.is_none(), "{handle:?}: two receives");
        slot.receive = Some(pending);
        slot.once_bytes = 0;
    }

    fn receive_once(&mut self, operation: Operation, handle: Handle, bytes: u32) {
        self.receive(operation, handle);
        self.slot(handle).once_bytes = bytes;
    }

    fn receive_into(&mut self, operation: Operation, handle: Handle, room: Room) {
        let slot = self.slot(handle);
        assert!(slot.receive.is_none(), "{handle:?}: two receives");
        slot.receive = Some(Pending::new(operation));
        slot.room = Some(room);
    }

    fn collect(&mut self, _operation: Operation, _handle: Handle) {
        // Bytes are never held back here.
    }

    fn low_water(&mut self, _handle: Handle, _bytes: u32) {}

    fn keep_sent(&mut self, _handle: Handle) {}

    fn cancel_receive(&mut self, operation: Operation, handle: Handle) {
        let errno = libc::ECANCELED;
        if operation.kind == Kind::Accept {
            let mut accepts = self.accepts.iter_mut().map(|(_, pending)| pending);
            if let Some(pending) = accepts.find(|pending| pending.operation == operation) {
                pending.early = Some(Event::AcceptFailed { errno });
            }
            return;
        }
        let receive = &mut self.slot(handle).receive;
        if let Some(pending) = receive.as_mut().filter(|p| p.operation == operation) {
            pending.early = Some(Event::ReceiveFailed { errno });
        }
    }

    fn send(&mut self, operation: Operation, handle: Handle, spans: &[Span]) {
        assert!(!spans.is_empty() && spans.len() <= SPANS_MAX);
        assert!(
            spans.iter().any(|span| !span.is_empty()),
            "a send of nothing"
        );
        let slot = self.slot(handle);
        assert!(slot.send.is_none(), "{handle:?}: two sends");
        let spans = spans.iter().map(|span| span.0).collect();
        slot.send = Some((Pending::new(operation), spans));
    }

    fn connect_socket(&mut self, _address: &SocketAddr) -> io::Result<RawFd> {
        let world = &mut *self.net.0.borrow_mut();
        if world.happens(world.faults.no_socket) {
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        }
        let fd = stand_in()?.into_raw_fd();
        let end = world.new_end();
        world.register(fd, Place::End(end));
        Ok(fd)
    }

    fn shutdown(&mut self, handle: Handle) {
        let world = &mut *self.net.0.borrow_mut();
        match world.place(handle.fd) {
            Some(Place::End(end)) => world.shut(end),
            other => panic!("shutdown of {handle:?}, which is {other:?}"),
        }
    }

    /// No scenario has a peer that waits for it.
    fn shutdown_write(&mut self, _handle: Handle) {}

    fn close(&mut self, handle: Handle) {
        let world = &mut *self.net.0.borrow_mut();
        if let Some(Place::End(end)) = world.place(handle.fd) {
            let attached = self.slots.iter().any(|slot| slot.end == Some(end));
            assert!(!attached, "{handle:?} closed and still attached");
        }
        world.close_descriptor(handle.fd);
        sockets::close(handle.fd);
    }

    fn watch_wake(&mut self, operation: Operation, eventfd: RawFd) {
        self.wakes.retain(|(fd, _)| *fd != eventfd);
        self.wakes.push((eventfd, operation));
    }

    fn unwatch_wake(&mut self, operation: Operation, eventfd: RawFd) {
        self.wakes.retain(|wake| *wake != (eventfd, operation));
    }

    fn register_fixed(&mut self, _memory: &'static [u8]) -> bool {
        true
    }

    fn recycle(&mut self, buffer: BufferId) {
        let held = &mut self.memory.held[usize::from(buffer)];
        assert!(*held, "buffer {buffer} was given back twice");
        *held = false;
        self.memory.bytes(buffer).fill(POISON);
        self.memory.free.push_back(buffer);
    }

    fn wait(&mut self, timeout: Duration) -> io::Result<()> {
        self.system_calls += 1;
        let timeout_ns = u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX);
        let deadline_ns = self.now_ns().saturating_add(timeout_ns);
        self.net.advance(WAIT_NS);
        self.rounds();
        while self.reaped.is_empty() && self.now_ns() < deadline_ns {
            let next_ns = self.next_ns().unwrap_or(deadline_ns);
            self.net.0.borrow_mut().now_ns = next_ns.min(deadline_ns);
            self.rounds();
        }
        Ok(())
    }

    fn next_completion(&mut self) -> Option<Completion> {
        self.reaped.pop_front()
    }

    fn park(&mut self) -> Option<RawFd> {
        None
    }

    fn unpark(&mut self) {}

    fn now_ns(&self) -> u64 {
        self.net.now_ns()
    }

    fn system_calls(&self) -> u64 {
        self.system_calls
    }
}

#[cfg(test)]
mod tests;
