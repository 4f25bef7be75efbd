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

mod net;

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, IntoRawFd, RawFd};
use std::time::Duration;

pub use net::{Faults, ListenerId, Net, PeerId, PeerState};

use self::net::{Place, World, stand_in};
use super::{Completion, Event, Handle, Ring, SPANS_MAX, Span, sockets};
use crate::buffers::{BufferId, Buffers};
use crate::operation::{Kind, Operation};

/// A ring on a simulated network.
pub struct Sim {
    net: Net,
    memory: Memory,
    slots: Vec<Slot>,
    accepts: Vec<(usize, Pending)>,
    wake: Option<(RawFd, Operation)>,
    reaped: VecDeque<Completion>,
    system_calls: u64,
}

/// An operation under way, and its delay if chance has given it one.
struct Pending {
    operation: Operation,
    not_before_ns: Option<u64>,
    /// Ends without having looked at the socket: cancelled, or found no buffer at the start.
    early: Option<Event>,
}

#[derive(Default)]
struct Slot {
    /// The end that is attached.
    end: Option<usize>,
    receive: Option<Pending>,
    send: Option<(Pending, Vec<libc::iovec>)>,
    connect: Option<(Pending, SocketAddr)>,
}

/// The buffers, and which of them the shard has.
struct Memory {
    base: *mut u8,
    buffer_bytes: usize,
    free: VecDeque<BufferId>,
    held: Vec<bool>,
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
            wake: None,
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
                && let Some((event, more)) = receive(world, end, &mut self.memory, pending)
            {
                push(pending.operation, event);
                if !more {
                    slot.receive = None;
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
        if let Some((_, operation)) = self.wake.filter(|(fd, _)| take_wake(*fd)) {
            let event = Event::Woken { more: true };
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

impl Pending {
    fn new(operation: Operation) -> Pending {
        Pending {
            operation,
            not_before_ns: None,
            early: None,
        }
    }

    /// Whether an operation that could complete does so now.
    fn is_due(&mut self, world: &mut World) -> bool {
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

fn accept(world: &mut World, line: usize, pending: &mut Pending) -> Option<(Event, bool)> {
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

fn connect(
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

fn receive(
    world: &mut World,
    end: usize,
    memory: &mut Memory,
    pending: &mut Pending,
) -> Option<(Event, bool)> {
    if let Some(event) = pending.early.take() {
        return Some((event, false));
    }
    if world.readable(end).is_none() || !pending.is_due(world) {
        return None;
    }
    if world.happens(world.faults.reset) {
        world.reset(end);
    }
    let bytes = match world.readable(end)? {
        Ok(0) => return Some((Event::EndOfStream, false)),
        Ok(bytes) => bytes,
        Err(errno) => {
            world.take_error(end);
            return Some((Event::ReceiveFailed { errno }, false));
        }
    };
    if memory.free.is_empty() || world.happens(world.faults.no_buffers) {
        return Some((Event::NoBuffers, false));
    }
    let mut bytes = bytes.min(memory.buffer_bytes);
    if world.happens(world.faults.short_receive) {
        bytes = 1 + world.chance.below(bytes as u64) as usize;
    }
    let buffer = memory.free.pop_front()?;
    memory.held[usize::from(buffer)] = true;
    world.read(end, &mut memory.bytes(buffer)[..bytes]);
    let more = !world.happens(world.faults.ends);
    let bytes = bytes as u32;
    let received = Event::Received {
        buffer,
        bytes,
        more,
    };
    Some((received, more))
}

fn send(
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

impl Memory {
    fn bytes(&mut self, buffer: BufferId) -> &mut [u8] {
        let at = usize::from(buffer) * self.buffer_bytes;
        assert!(usize::from(buffer) < self.held.len());
        // SAFETY: one of `Buffers`, which outlives the ring, and not held by the shard: it was
        // taken from the free list, or has just been given back.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(at), self.buffer_bytes) }
    }
}

/// Whether somebody has written to the eventfd since the last look.
fn take_wake(fd: RawFd) -> bool {
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
        self.wake = Some((eventfd, operation));
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
mod tests {
    use std::collections::BTreeMap;
    use std::os::fd::OwnedFd;

    use super::*;

    /// An echo server as a shard would write it, with a list of what it saw.
    struct Echo {
        ring: Sim,
        buffers: Buffers,
        listener: OwnedFd,
        connections: BTreeMap<u32, Echoed>,
        generation: u32,
        starved: Vec<u32>,
        trace: Vec<String>,
    }

    struct Echoed {
        handle: Handle,
        generation: u32,
        /// Bytes to send back; `sending` of them are the kernel's.
        out: Vec<u8>,
        sending: bool,
        receiving: bool,
        closing: bool,
    }

    impl Echoed {
        /// Adds to what is sent back.
        fn append(&mut self, bytes: Vec<u8>) {
            // What is being sent must not move: it goes to the next vector.
            if self.sending {
                let mut out = self.out.clone();
                out.extend(bytes);
                let sending = std::mem::replace(&mut self.out, out);
                // The memory under way stays as it is until the test ends.
                std::mem::forget(sending);
            } else {
                self.out.extend(bytes);
            }
        }
    }

    fn address() -> SocketAddr {
        "10.0.0.1:1".parse().unwrap()
    }

    fn accept() -> Operation {
        Operation::new(Kind::Accept, 0, 0)
    }

    impl Echo {
        fn new(seed: u64, faults: Faults) -> Echo {
            let buffers = Buffers::new(4, 128).unwrap();
            let mut ring = Sim::new(seed, faults, &buffers);
            let listener = ring.net().listen(address()).unwrap();
            ring.accept(accept(), listener.as_raw_fd());
            Echo {
                ring,
                buffers,
                listener,
                connections: BTreeMap::new(),
                generation: 0,
                starved: Vec::new(),
                trace: Vec::new(),
            }
        }

        fn tick(&mut self) {
            self.ring.wait(Duration::from_millis(10)).unwrap();
            while let Some(completion) = self.ring.next_completion() {
                let Completion { operation, event } = &completion;
                // Descriptors differ from run to run; they are not part of what happened.
                match event {
                    Event::Accepted { more, .. } => self.trace.push(format!("accepted {more}")),
                    event => self.trace.push(format!("{operation:?} {event:?}")),
                }
                self.complete(completion);
            }
            for slot in std::mem::take(&mut self.starved) {
                self.receive(slot);
            }
            let slots: Vec<u32> = self.connections.keys().copied().collect();
            for slot in slots {
                self.flush(slot);
            }
        }

        fn complete(&mut self, completion: Completion) {
            let Completion { operation, event } = completion;
            let slot = operation.slot;
            match event {
                Event::Accepted { socket, more } => {
                    self.admit(socket);
                    if !more {
                        self.ring.accept(accept(), self.listener.as_raw_fd());
                    }
                }
                Event::AcceptFailed { .. } => {
                    self.ring.accept(accept(), self.listener.as_raw_fd());
                }
                Event::Received {
                    buffer,
                    bytes,
                    more,
                } => {
                    self.buffers.take(buffer);
                    let bytes = self.buffers.bytes(buffer, 0, bytes as usize).to_vec();
                    assert!(self.buffers.release(buffer));
                    self.ring.recycle(buffer);
                    let connection = self.connections.get_mut(&slot).unwrap();
                    assert_eq!(connection.generation, operation.generation);
                    connection.append(bytes);
                    if !more {
                        connection.receiving = false;
                        self.receive(slot);
                    }
                }
                Event::NoBuffers => {
                    self.connections.get_mut(&slot).unwrap().receiving = false;
                    self.starved.push(slot);
                }
                Event::EndOfStream | Event::ReceiveFailed { .. } => {
                    let connection = self.connections.get_mut(&slot).unwrap();
                    connection.receiving = false;
                    connection.closing = true;
                    if matches!(event, Event::ReceiveFailed { .. }) {
                        connection.out.clear();
                    }
                    self.retire(slot);
                }
                Event::Sent { bytes } => {
                    let connection = self.connections.get_mut(&slot).unwrap();
                    connection.sending = false;
                    connection
                        .out
                        .drain(..(bytes as usize).min(connection.out.len()));
                    self.retire(slot);
                }
                Event::SendFailed { .. } => {
                    let connection = self.connections.get_mut(&slot).unwrap();
                    connection.sending = false;
                    connection.closing = true;
                    connection.out.clear();
                    self.ring.shutdown(connection.handle);
                    self.retire(slot);
                }
                Event::Connected { .. } | Event::Woken { .. } => unreachable!(),
            }
        }

        fn admit(&mut self, socket: OwnedFd) {
            let mut slots = 0..;
            let free = |slot: &u32| !self.connections.contains_key(slot);
            let slot = slots.find(free).unwrap();
            let fd = socket.into_raw_fd();
            let handle = Handle { fd, slot };
            self.ring.attach(handle);
            self.generation += 1;
            let connection = Echoed {
                handle,
                generation: self.generation,
                out: Vec::new(),
                sending: false,
                receiving: false,
                closing: false,
            };
            self.connections.insert(slot, connection);
            self.receive(slot);
        }

        fn receive(&mut self, slot: u32) {
            let Some(connection) = self.connections.get_mut(&slot) else {
                return;
            };
            if !connection.receiving && !connection.closing {
                connection.receiving = true;
                let receive = Operation::new(Kind::Receive, slot, connection.generation);
                self.ring.receive(receive, connection.handle);
            }
        }

        fn flush(&mut self, slot: u32) {
            let connection = self.connections.get_mut(&slot).unwrap();
            if !connection.sending && !connection.out.is_empty() {
                connection.sending = true;
                let send = Operation::new(Kind::Send, slot, connection.generation);
                let spans = [Span::of(&connection.out)];
                self.ring.send(send, connection.handle, &spans);
            }
        }

        fn retire(&mut self, slot: u32) {
            let connection = &self.connections[&slot];
            let quiet = !connection.sending && !connection.receiving && connection.out.is_empty();
            if connection.closing && quiet {
                let handle = connection.handle;
                self.connections.remove(&slot);
                self.ring.detach(handle);
                self.ring.close(handle);
            }
        }
    }

    /// Each of some peers writes a text of its own and reads it back. Returns how many got it
    /// whole, and the trace.
    fn run(seed: u64, faults: Faults) -> (usize, Vec<String>) {
        const PEERS: usize = 6;
        let mut echo = Echo::new(seed, faults);
        let net = echo.ring.net();
        let text =
            |peer: usize| -> Vec<u8> { (0..1500).map(|at| (at * 7 + peer * 31) as u8).collect() };
        let peers: Vec<PeerId> = (0..PEERS)
            .map(|_| net.peer_connect(address()).unwrap())
            .collect();
        let mut written = [0; PEERS];
        let mut read = vec![Vec::new(); PEERS];
        for _ in 0..20_000 {
            for (at, peer) in peers.iter().enumerate() {
                written[at] += net.peer_write(*peer, &text(at)[written[at]..]);
                read[at].extend(net.peer_read(*peer, 100));
                if read[at].len() == 1500 && net.peer_state(*peer) == PeerState::Open {
                    net.peer_close(*peer);
                }
            }
            let over = |peer: &PeerId| net.peer_state(*peer) == PeerState::Reset;
            if peers.iter().all(over) && echo.connections.is_empty() {
                break;
            }
            echo.tick();
        }
        assert!(
            echo.connections.is_empty(),
            "seed {seed}: a connection never ends"
        );
        assert_eq!(net.open_descriptors(), 1, "only the listener is left");
        assert_eq!(echo.ring.buffers_held(), 0);
        let mut whole = 0;
        for (at, read) in read.iter().enumerate() {
            assert!(text(at).starts_with(read), "seed {seed}: wrong bytes");
            whole += usize::from(read.len() == 1500);
        }
        (whole, echo.trace)
    }

    #[test]
    fn bytes_survive_crumbs_whatever_the_seed() {
        for seed in 0..20 {
            assert_eq!(run(seed, Faults::CRUMBS).0, 6, "seed {seed}");
        }
        assert_eq!(run(0, Faults::NONE).0, 6);
    }

    #[test]
    fn a_storm_breaks_connections_and_leaks_nothing() {
        let whole: usize = (0..50).map(|seed| run(seed, Faults::STORM).0).sum();
        assert!((1..300).contains(&whole), "{whole} of 300 survive");
    }

    #[test]
    fn a_seed_is_a_run() {
        let (_, first) = run(7, Faults::STORM);
        let (_, again) = run(7, Faults::STORM);
        let (_, other) = run(8, Faults::STORM);
        assert_eq!(first, again);
        assert_ne!(first, other);
        for seen in [
            "NoBuffers",
            "ReceiveFailed",
            "AcceptFailed",
            "accepted false",
        ] {
            let seen_in = |seed| run(seed, Faults::STORM).1.concat().contains(seen);
            assert!((0..50).any(seen_in), "no seed shows {seen}");
        }
    }

    fn pair(ring: &mut Sim) -> (Handle, PeerId) {
        let net = ring.net();
        let listener = net.peer_listen(address());
        let (handle, connect) = dial(ring, 3);
        ring.wait(Duration::from_secs(1)).unwrap();
        let completion = ring.next_completion().unwrap();
        assert_eq!(completion.operation, connect);
        assert!(matches!(completion.event, Event::Connected { errno: 0 }));
        (handle, net.peer_accept(listener).unwrap())
    }

    fn dial(ring: &mut Sim, slot: u32) -> (Handle, Operation) {
        let fd = ring.connect_socket(&address()).unwrap();
        let handle = Handle { fd, slot };
        ring.attach(handle);
        let connect = Operation::new(Kind::Connect, slot, 0);
        ring.connect(connect, handle, &address());
        (handle, connect)
    }

    fn connected(ring: &mut Sim) -> Option<i32> {
        ring.wait(Duration::from_secs(1)).unwrap();
        match ring.next_completion()?.event {
            Event::Connected { errno } => Some(errno),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn time_passes_only_while_nothing_completes() {
        let buffers = Buffers::new(2, 64).unwrap();
        let mut ring = Sim::new(1, Faults::NONE, &buffers);
        let before_ns = ring.now_ns();
        ring.wait(Duration::from_secs(3600)).unwrap();
        assert_eq!(ring.now_ns() - before_ns, 3600 * 1_000_000_000);
        let (handle, peer) = pair(&mut ring);
        let net = ring.net();
        net.peer_write(peer, b"x");
        ring.receive(Operation::new(Kind::Receive, 3, 0), handle);
        let before_ns = ring.now_ns();
        ring.wait(Duration::from_secs(3600)).unwrap();
        assert_eq!(ring.now_ns() - before_ns, WAIT_NS);
    }

    #[test]
    fn connects_are_answered_refused_or_left_hanging() {
        let buffers = Buffers::new(2, 64).unwrap();
        let mut ring = Sim::new(1, Faults::NONE, &buffers);
        let net = ring.net();
        dial(&mut ring, 0);
        assert_eq!(connected(&mut ring), Some(libc::ECONNREFUSED));
        net.peer_listen(address());
        dial(&mut ring, 1);
        assert_eq!(connected(&mut ring), Some(0));
        net.refuse(address());
        dial(&mut ring, 2);
        assert_eq!(connected(&mut ring), Some(libc::ECONNREFUSED));
        net.black_hole(address());
        let (handle, _) = dial(&mut ring, 3);
        assert_eq!(connected(&mut ring), None);
        ring.shutdown(handle);
        assert_eq!(connected(&mut ring), Some(libc::ECONNRESET));
    }

    #[test]
    fn a_send_reads_its_memory_when_it_completes() {
        let buffers = Buffers::new(2, 64).unwrap();
        let mut ring = Sim::new(1, Faults::NONE, &buffers);
        let (handle, peer) = pair(&mut ring);
        let mut memory = *b"before";
        let start = memory.as_mut_ptr();
        let send = Operation::new(Kind::Send, 3, 0);
        // SAFETY: the array outlives the send.
        let spans = [Span::of(unsafe { std::slice::from_raw_parts(start, 6) })];
        ring.send(send, handle, &spans);
        // SAFETY: in bounds. This is the mistake that the simulated ring makes visible.
        unsafe { std::ptr::copy_nonoverlapping(b"AFTER!".as_ptr(), start, 6) };
        ring.wait(Duration::ZERO).unwrap();
        assert_eq!(ring.net().peer_read(peer, 100), b"AFTER!");
    }

    #[test]
    fn shutdown_ends_what_is_under_way() {
        let buffers = Buffers::new(2, 64).unwrap();
        let mut ring = Sim::new(1, Faults::NONE, &buffers);
        let (handle, peer) = pair(&mut ring);
        let big = vec![1; 2 * Faults::NONE.window_bytes];
        let send = Operation::new(Kind::Send, 3, 0);
        ring.send(send, handle, &[Span::of(&big)]);
        ring.wait(Duration::ZERO).unwrap();
        assert!(matches!(
            ring.next_completion().unwrap().event,
            Event::Sent { .. }
        ));
        ring.send(send, handle, &[Span::of(&big)]);
        ring.receive(Operation::new(Kind::Receive, 3, 0), handle);
        ring.wait(Duration::from_secs(1)).unwrap();
        assert!(ring.next_completion().is_none(), "both wait");
        ring.shutdown(handle);
        ring.wait(Duration::ZERO).unwrap();
        let ended: Vec<Event> = std::iter::from_fn(|| ring.next_completion())
            .map(|completion| completion.event)
            .collect();
        assert_eq!(ended.len(), 2, "{ended:?}");
        ring.detach(handle);
        ring.close(handle);
        assert_eq!(ring.net().peer_read(peer, usize::MAX).len(), 64 * 1024);
        assert_eq!(ring.net().peer_state(peer), PeerState::Ended);
    }

    #[test]
    #[should_panic(expected = "given back twice")]
    fn a_buffer_given_back_twice_is_noticed() {
        let buffers = Buffers::new(2, 64).unwrap();
        Sim::new(1, Faults::NONE, &buffers).recycle(0);
    }

    #[test]
    #[should_panic(expected = "operation under way")]
    fn a_detach_too_early_is_noticed() {
        let buffers = Buffers::new(2, 64).unwrap();
        let mut ring = Sim::new(1, Faults::NONE, &buffers);
        let (handle, _) = pair(&mut ring);
        ring.receive(Operation::new(Kind::Receive, 3, 0), handle);
        ring.detach(handle);
    }
}
