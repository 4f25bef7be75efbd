//! The simulated ring under an echo server as a shard would write it.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};

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
            Event::Landed { .. } | Event::Connected { .. } | Event::Woken { .. } => {
                unreachable!()
            }
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
