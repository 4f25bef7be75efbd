//! The event plane with CURVE: our own ends against each other, and peers by hand, on both rings.
#![cfg(feature = "curve")]

use std::collections::HashSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use corelane_codec::Decoded;
use corelane_codec::curve::{Client, Keys, Outcome, PublicKey, Seal};
use corelane_codec::zmtp::{self, Mechanism};
use corelane_engine::config::RingKind;
use corelane_engine::events::{
    Command, CurveClient, CurveServer, Door, DoorKind, Group, LocalEvent, Overflow, PlaneConfig,
    PlaneHandle, Report, Security, Side, spawn,
};
use corelane_engine::executor::listen;
use corelane_engine::{mesh, preflight};
use socket2::{Domain, Socket, Type};

const PATIENCE: Duration = Duration::from_secs(60);
const SUBJECT: &str = "namespace.a.kv-events";
/// Groups of an end's own plane.
const IN: Group = 1;
const OUT: Group = 2;

/// The rings of this host.
fn rings() -> Vec<RingKind> {
    let uring = preflight::choose(preflight::Io::Uring, &preflight::probe());
    let uring = uring.is_ok().then_some(RingKind::Uring);
    uring.into_iter().chain([RingKind::Epoll]).collect()
}

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < PATIENCE, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn keys(byte: u8) -> Arc<Keys> {
    Arc::new(Keys::new(&[byte; 32]))
}

const BROKER: u8 = 1;

fn client(own: u8, server: u8) -> Security {
    let server = keys(server).public();
    let keys = keys(own);
    Security::Client(Arc::new(CurveClient { keys, server }))
}

/// A running plane.
struct Plane {
    handle: PlaneHandle,
    addresses: Vec<SocketAddr>,
}

impl Drop for Plane {
    fn drop(&mut self) {
        self.handle.stop();
    }
}

impl Plane {
    fn start(ring: RingKind, doors: Vec<(DoorKind, Security)>, overflow: Overflow) -> Plane {
        let mut addresses = Vec::new();
        let doors = doors.into_iter().map(|(kind, security)| {
            let listener = listen("127.0.0.1:0".parse().unwrap(), false, false).unwrap();
            addresses.push(listener.local_addr().unwrap());
            Door {
                listener,
                kind,
                group: 0,
                security,
            }
        });
        let doors = doors.collect();
        let config = PlaneConfig {
            buffers: 64,
            buffer_bytes: 4096,
            queue_events_max: if overflow == Overflow::DropOldest {
                100
            } else {
                100_000
            },
            overflow,
            ..PlaneConfig::new(ring)
        };
        let handle = spawn(config, doors).unwrap();
        Plane { handle, addresses }
    }

    /// A broker: xsub and xpub with CURVE, xsub and xpub without.
    fn broker(ring: RingKind, clients: Option<HashSet<PublicKey>>, overflow: Overflow) -> Plane {
        let keys = keys(BROKER);
        let curve = Security::Server(Arc::new(CurveServer { keys, clients }));
        let doors = vec![
            (DoorKind::Publishers, curve.clone()),
            (DoorKind::Subscribers, curve),
            (DoorKind::Publishers, Security::Null),
            (DoorKind::Subscribers, Security::Null),
        ];
        Plane::start(ring, doors, overflow)
    }

    fn tell(&self, mut command: Command) {
        while let Err(back) = self.handle.command(command) {
            command = *back;
            std::thread::yield_now();
        }
    }

    fn dial(&self, address: SocketAddr, side: Side, group: Group, security: Security) {
        self.tell(Command::Dial {
            dial: u64::from(group),
            address,
            side,
            group,
            security,
        });
    }

    fn publish(&self, publisher_id: u64, sequence: u64, bytes: usize) {
        let event = event(publisher_id, sequence, bytes);
        self.tell(Command::Publish { group: OUT, event });
    }

    /// Waits for a report of an end that has this in its reason.
    fn refused(&self, wanted: &str) {
        let mut seen = Vec::new();
        let began = Instant::now();
        loop {
            match self.handle.reports.next() {
                Some(Report::Closed { why: Some(why), .. }) if why.contains(wanted) => return,
                Some(report) => seen.push(report),
                None => std::thread::sleep(Duration::from_millis(2)),
            }
            assert!(began.elapsed() < PATIENCE, "{wanted}: {seen:?}");
        }
    }
}

fn event(publisher_id: u64, sequence: u64, bytes: usize) -> LocalEvent {
    let mut frame = vec![1];
    frame.extend_from_slice(&(bytes as u32).to_be_bytes());
    frame.resize(bytes + zmtp::EVENT_PREFIX_BYTES, sequence as u8);
    LocalEvent {
        subject: SUBJECT.as_bytes().to_vec(),
        publisher_id,
        sequence,
        frame,
    }
}

/// Small ones, and some that no receive buffer holds.
fn size(sequence: u64) -> usize {
    if sequence % 50 == 7 {
        60_000
    } else {
        sequence as usize
    }
}

/// A subscriber: a plane of its own that dials.
fn subscriber(ring: RingKind, xpub: SocketAddr, security: Security) -> (Plane, Taken) {
    let plane = Plane::start(ring, Vec::new(), Overflow::DropNewest);
    let (events, taken) = mesh::lane().unwrap();
    plane.tell(Command::Subscribe {
        consumer: 1,
        group: IN,
        prefixes: vec![b"namespace.".to_vec()],
        events: Box::new(events),
    });
    plane.dial(xpub, Side::Publisher, IN, security);
    (plane, taken)
}

type Taken = mesh::Receiver<LocalEvent>;

fn publisher(ring: RingKind, xsub: SocketAddr, security: Security) -> Plane {
    let plane = Plane::start(ring, Vec::new(), Overflow::DropNewest);
    plane.dial(xsub, Side::Subscriber, OUT, security);
    plane
}

fn next(taken: &Taken) -> LocalEvent {
    let mut came = None;
    until("an event", || {
        came = taken.next();
        came.is_some()
    });
    came.unwrap()
}

#[test]
fn events_pass_between_peers_with_and_without_curve() {
    for ring in rings() {
        let broker = Plane::broker(ring, None, Overflow::DropNewest);
        let doors = &broker.addresses;
        let sealed = subscriber(ring, doors[1], client(2, BROKER));
        let open = subscriber(ring, doors[3], Security::Null);
        let publishers = [
            publisher(ring, doors[0], client(3, BROKER)),
            publisher(ring, doors[2], Security::Null),
        ];
        let stats = &broker.handle.stats.plane;
        until("all are there", || {
            let peers = (stats.subscriptions.get(), stats.publishers.get());
            // Shown a moment after them.
            peers == (2, 2) && stats.curve_peers.get() == 2
        });
        for plane in &publishers {
            let wanted = &plane.handle.stats.plane.subscriptions;
            until("the wish has come", || wanted.get() == 1);
        }
        for sequence in 0..200 {
            for (id, plane) in (7..).zip(&publishers) {
                plane.publish(id, sequence, size(sequence));
            }
        }
        for (_, taken) in [&sealed, &open] {
            let mut due = [0, 0];
            while due != [200, 200] {
                let came = next(taken);
                let due = &mut due[came.publisher_id as usize - 7];
                assert_eq!(came, event(came.publisher_id, *due, size(*due)));
                *due += 1;
            }
        }
        assert_eq!(stats.events_received.get(), 400);
        until("all has left", || {
            stats.queued_bytes.get() == 0 && stats.buffers_in_use.get() == 0
        });
        assert_eq!(stats.sessions_refused.get(), 0);
    }
}

#[test]
fn who_does_not_fit_is_refused_by_name_and_hurts_nobody() {
    for ring in rings() {
        let clients = HashSet::from([keys(2).public(), keys(3).public()]);
        let broker = Plane::broker(ring, Some(clients), Overflow::DropNewest);
        let doors = &broker.addresses;
        let stats = &broker.handle.stats.plane;
        // Each tries again and again until it is dropped.
        let open = publisher(ring, doors[0], Security::Null);
        broker.refused("its security mechanism is NULL, CURVE is wanted at this address");
        open.refused("its security mechanism is CURVE, NULL is wanted at this address");
        drop(open);
        let sealed = publisher(ring, doors[2], client(3, BROKER));
        broker.refused("its security mechanism is CURVE, NULL is wanted at this address");
        sealed.refused("its security mechanism is NULL, CURVE is wanted at this address");
        drop(sealed);
        let wrong = publisher(ring, doors[0], client(3, 9));
        broker.refused("CURVE: HELLO cannot be opened");
        drop(wrong);
        let (stranger, _) = subscriber(ring, doors[1], client(4, BROKER));
        broker.refused(&format!(
            "the client's key {} is not among",
            keys(4).public()
        ));
        stranger.refused("it gave up: 400");
        drop(stranger);
        for cell in [
            &stats.sessions_refused_mechanism,
            &stats.sessions_refused_curve,
            &stats.sessions_refused_stranger,
        ] {
            assert!(cell.get() > 0);
        }
        // The others are served.
        let (_plane, taken) = subscriber(ring, doors[1], client(2, BROKER));
        let source = publisher(ring, doors[0], client(3, BROKER));
        let wanted = &source.handle.stats.plane.subscriptions;
        until("the wish has come", || wanted.get() == 1);
        source.publish(5, 0, 10);
        assert_eq!(next(&taken), event(5, 0, 10));
    }
}

/// libzmq leaves for good when it hears of another mechanism. Where our greeting was there before
/// it had sent a byte, we took it for a probe of the port: neither counted nor told.
#[test]
fn who_leaves_at_our_mechanism_has_said_something_before_it_hears_of_it() {
    for ring in rings() {
        let broker = Plane::broker(ring, None, Overflow::DropNewest);
        let mut stream = TcpStream::connect(broker.addresses[0]).unwrap();
        let mut ours = [0; zmtp::GREETING_BYTES];
        let (signature, rest) = ours.split_at_mut(zmtp::SIGNATURE_BYTES);
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.read_exact(signature).unwrap();
        let pause = Duration::from_millis(20);
        stream.set_read_timeout(Some(pause)).unwrap();
        let early = stream.read(rest).unwrap_err();
        assert_eq!(early.kind(), ErrorKind::WouldBlock);
        let theirs = zmtp::greeting();
        stream.write_all(&theirs[..zmtp::SIGNATURE_BYTES]).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.read_exact(rest).unwrap();
        assert_eq!(ours, zmtp::greeting_with(Mechanism::Curve, true));
        drop(stream);
        broker.refused("its security mechanism may be another than CURVE");
        let stats = &broker.handle.stats.plane;
        assert_eq!(stats.sessions_refused_mechanism.get(), 1);
    }
}

/// A peer with CURVE, by hand.
struct Peer {
    stream: TcpStream,
    have: Vec<u8>,
    seal: Seal,
}

impl Peer {
    fn new(address: SocketAddr, kind: &str) -> Peer {
        // Little room for what it does not read.
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.set_recv_buffer_size(16 << 10).unwrap();
        socket.connect(&address.into()).unwrap();
        let mut stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        let mut said = zmtp::greeting_with(Mechanism::Curve, false).to_vec();
        let server = keys(BROKER).public();
        let chance = [0x42; Client::CHANCE_BYTES];
        let mut client = Client::new(keys(2), server, &chance, &mut said).unwrap();
        stream.write_all(&said).unwrap();
        let mut greeting = [0; zmtp::GREETING_BYTES];
        stream.read_exact(&mut greeting).unwrap();
        let greeting = zmtp::decode_greeting(&greeting).frame().unwrap();
        assert_eq!(
            (greeting.mechanism, greeting.as_server),
            (Mechanism::Curve, true)
        );
        let mut have = Vec::new();
        let properties = zmtp::properties(kind);
        let opened = loop {
            let (head, frame) = frame(&mut stream, &mut have).unwrap();
            assert!(head.command);
            let mut out = Vec::new();
            let body = &frame[head.head_bytes..];
            match client.take(body, &properties, &mut out).unwrap() {
                Outcome::More => stream.write_all(&out).unwrap(),
                Outcome::Done(opened) => break *opened,
            }
        };
        let seal = opened.seal;
        Peer { stream, have, seal }
    }

    /// A plain frame or several, in boxes.
    fn sealed(&mut self, mut frames: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        while !frames.is_empty() {
            let head = zmtp::decode_head(frames, usize::MAX).frame().unwrap();
            let (frame, rest) = frames.split_at(head.frame_bytes());
            let body = &frame[head.head_bytes..];
            self.seal.seal(&head, body, &mut out).unwrap();
            frames = rest;
        }
        out
    }

    fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// The next frame, out of its box; `None` at the end.
    fn opened(&mut self) -> Option<Vec<u8>> {
        let (head, mut frame) = frame(&mut self.stream, &mut self.have)?;
        let inside = self.seal.open(&head, &mut frame).unwrap();
        Some(frame[inside].to_vec())
    }

    /// The number of the next event.
    fn sequence(&mut self) -> u64 {
        let parts: Vec<_> = (0..4).map(|_| self.opened().unwrap()).collect();
        let message = parts.concat();
        let event = zmtp::decode_event(&message, 1 << 30).unwrap();
        assert!(
            message[event.frame_at + zmtp::EVENT_PREFIX_BYTES..event.end]
                .iter()
                .all(|byte| *byte == event.sequence as u8)
        );
        event.sequence
    }
}

fn frame(stream: &mut TcpStream, have: &mut Vec<u8>) -> Option<(zmtp::Head, Vec<u8>)> {
    loop {
        if let Decoded::Frame(head) = zmtp::decode_head(have, 1 << 30)
            && have.len() >= head.frame_bytes()
        {
            let rest = have.split_off(head.frame_bytes());
            return Some((head, std::mem::replace(have, rest)));
        }
        let mut bytes = vec![0; 64 << 10];
        match stream.read(&mut bytes) {
            Ok(0) => return None,
            Ok(count) => have.extend_from_slice(&bytes[..count]),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return None,
            Err(error) => panic!("nothing came: {error}"),
        }
    }
}

/// An event as a publisher writes it.
fn message(sequence: u64, bytes: usize) -> Vec<u8> {
    let event = event(6, sequence, bytes);
    let mut out = Vec::new();
    zmtp::write_event_front(&event.subject, 6, sequence, event.frame.len(), &mut out);
    out.extend_from_slice(&event.frame);
    out
}

#[test]
fn boxes_may_be_cut_anywhere_and_must_not_be_changed() {
    for ring in rings() {
        let broker = Plane::broker(ring, None, Overflow::DropNewest);
        let doors = &broker.addresses;
        let stats = &broker.handle.stats.plane;
        let mut sink = Peer::new(doors[1], "SUB");
        let mut wish = Vec::new();
        zmtp::write_subscription(1, true, b"namespace.", &mut wish);
        zmtp::write_command("PING", b"\0\x0ahello", &mut wish);
        let wish = sink.sealed(&wish);
        sink.send(&wish);
        assert_eq!(sink.opened().unwrap(), b"\x04\x0a\x04PONGhello");
        let mut source = Peer::new(doors[0], "PUB");
        assert_eq!(source.opened().unwrap(), b"\x04\x14\x09SUBSCRIBEnamespace.");
        // Byte by byte, as far as the network lets it, and then across receive buffers.
        for byte in source.sealed(&message(0, 30)) {
            source.send(&[byte]);
        }
        assert_eq!(sink.sequence(), 0);
        let mut many: Vec<u8> = (1..40)
            .flat_map(|sequence| message(sequence, 997))
            .collect();
        many.extend(message(40, 50_000));
        many.extend(message(41, 0));
        let many = source.sealed(&many);
        for piece in many.chunks(1009) {
            source.send(piece);
        }
        for sequence in 1..42 {
            assert_eq!(sink.sequence(), sequence);
        }
        // What is no event inside its boxes is dropped; what is changed ends the session.
        let bad = source.sealed(b"\x01\x03two\x00\x05parts");
        source.send(&bad);
        until("told", || stats.events_bad.get() == 1);
        let mut changed = source.sealed(&message(42, 30));
        let last = changed.len() - 1;
        changed[last] ^= 1;
        source.send(&changed);
        broker.refused("CURVE: MESSAGE cannot be opened");
        assert!(source.opened().is_none());
        let mut again = Peer::new(doors[0], "PUB");
        let twice = again.sealed(&message(42, 30));
        again.send(&[&twice[..], &twice].concat());
        broker.refused("CURVE: a message came twice");
        assert_eq!(sink.sequence(), 42);
        assert_eq!(stats.sessions_refused_curve.get(), 2);
        // A plain frame among boxes, and a socket that does not belong here.
        let mut plain = Peer::new(doors[0], "PUB");
        plain.send(&message(43, 30));
        broker.refused("CURVE: MESSAGE was to come");
        let mut again = Peer::new(doors[0], "PUB");
        let event = again.sealed(&message(43, 30));
        again.send(&event);
        assert_eq!(sink.sequence(), 43);
    }
}

#[test]
fn what_a_slow_reader_misses_is_dropped_before_it_is_sealed() {
    for ring in rings() {
        let broker = Plane::broker(ring, None, Overflow::DropOldest);
        let doors = &broker.addresses;
        let stats = &broker.handle.stats.plane;
        let mut sink = Peer::new(doors[1], "SUB");
        let mut wish = Vec::new();
        zmtp::write_subscription(1, true, b"", &mut wish);
        let wish = sink.sealed(&wish);
        sink.send(&wish);
        let mut source = Peer::new(doors[0], "PUB");
        assert_eq!(source.opened().unwrap(), b"\x04\x0a\x09SUBSCRIBE");
        let mut sequence = 0;
        while stats.events_dropped_oldest.get() == 0 {
            for _ in 0..50 {
                let event = source.sealed(&message(sequence, 4_000));
                source.send(&event);
                sequence += 1;
            }
            let received = || stats.events_received.get() == sequence;
            until("taken", received);
        }
        // The last is not dropped, and what does come is whole and in order.
        let (mut last, mut seen) = (None, 0);
        while last != Some(sequence - 1) {
            let came = sink.sequence();
            assert!(last.is_none_or(|last| came > last));
            (last, seen) = (Some(came), seen + 1);
        }
        let dropped = stats.events_dropped_oldest.get();
        assert_eq!(seen + dropped, sequence);
        until("all has left", || {
            stats.queued_bytes.get() == 0 && stats.buffers_in_use.get() == 0
        });
    }
}
