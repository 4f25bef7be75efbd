//! The event plane among peers that speak ZMTP byte by byte, on both rings.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};

use corelane_codec::Decoded;
use corelane_codec::zmtp;
use corelane_engine::config::RingKind;
use corelane_engine::events::{Command, DoorKind, LocalEvent, Overflow, Report, Security, Side};
use corelane_engine::mesh;
use socket2::{Domain, Socket, Type};

mod common;
use common::plane::{Plane, door};
use common::{DEADLINE as PATIENCE, rings, wait_until as until};

/// A peer of the plane.
struct Peer {
    stream: TcpStream,
    have: Vec<u8>,
    minor: u8,
}

impl Peer {
    fn new(stream: TcpStream, kind: &str, minor: u8) -> Peer {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        let mut peer = Peer {
            stream,
            have: Vec::new(),
            minor,
        };
        let mut greeting = zmtp::greeting();
        greeting[11] = minor;
        peer.send(&greeting);
        while peer.have.len() < zmtp::GREETING_BYTES {
            peer.read();
        }
        assert!(matches!(
            zmtp::decode_greeting(&peer.have),
            Decoded::Frame(_)
        ));
        peer.have.drain(..zmtp::GREETING_BYTES);
        let mut ready = Vec::new();
        zmtp::write_ready(kind, &mut ready);
        peer.send(&ready);
        let (command, body) = peer.frame().unwrap();
        assert!(command && body.starts_with(b"\x05READY"), "{body:?}");
        peer
    }

    fn publisher(plane: &Plane) -> Peer {
        let stream = TcpStream::connect(plane.xsub).unwrap();
        Peer::new(stream, "PUB", 1)
    }

    /// A subscriber whose wishes the plane has taken in.
    fn subscriber(plane: &Plane, minor: u8, prefixes: &[&str]) -> Peer {
        let before = plane.handle.stats.plane.subscriptions.get();
        // Little room for what it does not read.
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.set_recv_buffer_size(16 << 10).unwrap();
        socket.connect(&plane.xpub.into()).unwrap();
        let mut peer = Peer::new(socket.into(), "SUB", minor);
        let mut bytes = Vec::new();
        for prefix in prefixes {
            zmtp::write_subscription(minor, true, prefix.as_bytes(), &mut bytes);
        }
        peer.send(&bytes);
        let stats = &plane.handle.stats.plane;
        until("subscribed", || {
            stats.subscriptions.get() == before + prefixes.len() as u64
        });
        peer
    }

    fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// False at the end of the stream.
    fn read(&mut self) -> bool {
        let mut bytes = vec![0; 64 << 10];
        match self.stream.read(&mut bytes) {
            Ok(0) => false,
            Ok(count) => {
                self.have.extend_from_slice(&bytes[..count]);
                true
            }
            Err(error) if error.kind() == ErrorKind::ConnectionReset => false,
            Err(error) => panic!("nothing came: {error}"),
        }
    }

    fn frame(&mut self) -> Option<(bool, Vec<u8>)> {
        loop {
            if let Decoded::Frame(head) = zmtp::decode_head(&self.have, 1 << 30)
                && self.have.len() >= head.frame_bytes()
            {
                let body = self.have[head.head_bytes..head.frame_bytes()].to_vec();
                self.have.drain(..head.frame_bytes());
                return Some((head.command, body));
            }
            if !self.read() {
                return None;
            }
        }
    }

    /// The number of the next event, whose other parts are as `event` writes them.
    fn sequence(&mut self) -> Option<u64> {
        while zmtp::decode_event(&self.have, 1 << 30).is_none() {
            if !self.read() {
                return None;
            }
        }
        let event = zmtp::decode_event(&self.have, 1 << 30).unwrap();
        let body = event.frame_at + zmtp::EVENT_PREFIX_BYTES;
        assert!(
            self.have[body..event.end]
                .iter()
                .all(|byte| *byte == event.sequence as u8)
        );
        self.have.drain(..event.end);
        Some(event.sequence)
    }

    /// What a publisher is told is wanted.
    fn wanted(&mut self) -> (bool, Vec<u8>) {
        let (command, body) = self.frame().unwrap();
        match (command, self.minor) {
            (true, 1) => match zmtp::decode_command(&body).unwrap() {
                zmtp::Command::Subscribe(prefix) => (true, prefix.to_vec()),
                zmtp::Command::Cancel(prefix) => (false, prefix.to_vec()),
                other => panic!("{other:?}"),
            },
            _ => {
                let (subscribe, prefix) = zmtp::decode_subscription(&body).unwrap();
                (subscribe, prefix.to_vec())
            }
        }
    }
}

fn event(subject: &str, publisher: u64, sequence: u64, bytes: usize) -> Vec<u8> {
    let mut out = Vec::new();
    let frame = bytes + zmtp::EVENT_PREFIX_BYTES;
    zmtp::write_event_front(subject.as_bytes(), publisher, sequence, frame, &mut out);
    out.push(1);
    out.extend_from_slice(&(bytes as u32).to_be_bytes());
    out.resize(out.len() + bytes, sequence as u8);
    out
}

#[test]
fn events_reach_those_who_want_them() {
    for ring in rings() {
        let plane = Plane::start(ring, |_| {});
        let mut old = Peer::subscriber(&plane, 0, &["namespace.a.kv-events"]);
        let mut all = Peer::subscriber(&plane, 1, &["namespace.", "namespace.a."]);
        let mut none = Peer::subscriber(&plane, 1, &["other"]);
        let mut publisher = Peer::publisher(&plane);
        let mut wanted: Vec<_> = (0..4).map(|_| publisher.wanted()).collect();
        wanted.sort();
        let prefixes = [
            "namespace.",
            "namespace.a.",
            "namespace.a.kv-events",
            "other",
        ];
        assert_eq!(
            wanted,
            prefixes.map(|prefix| (true, prefix.as_bytes().to_vec()))
        );
        // Small ones, and some that no receive buffer holds.
        let mut bytes = Vec::new();
        for sequence in 0..300 {
            let size = if sequence % 50 == 7 {
                30_000
            } else {
                sequence as usize
            };
            bytes.extend(event("namespace.a.kv-events", 5, sequence, size));
            bytes.extend(event("namespace.a.kv_metrics", 6, sequence, 10));
        }
        publisher.send(&bytes);
        for sequence in 0..300 {
            assert_eq!(old.sequence(), Some(sequence));
            assert_eq!(all.sequence(), Some(sequence));
            assert_eq!(all.sequence(), Some(sequence));
        }
        publisher.send(&event("other", 7, 0, 1));
        assert_eq!(none.sequence(), Some(0));
        assert!(none.have.is_empty() && all.have.is_empty());
        let stats = &plane.handle.stats;
        assert_eq!(stats.plane.events_received.get(), 601);
        assert_eq!(stats.plane.events_lost.get(), 0);
        assert_eq!(stats.topics().len(), 3);
        // A wish that ends is taken back; PING is answered.
        drop(old);
        assert_eq!(
            publisher.wanted(),
            (false, b"namespace.a.kv-events".to_vec())
        );
        let mut ping = Vec::new();
        zmtp::write_command("PING", b"\0\x0actx", &mut ping);
        publisher.send(&ping);
        assert_eq!(publisher.frame(), Some((true, b"\x04PONGctx".to_vec())));
    }
}

/// Waits until all of `bytes` more than `before` have been received by the plane.
fn received(plane: &Plane, events: u64) {
    let stats = &plane.handle.stats.plane;
    until("received", || stats.events_received.get() == events);
}

const MANY: u64 = 8000;
const SIZE: usize = 1000;

/// Many events, of which one subscriber reads none until the end, and another all as they come.
fn overrun(ring: RingKind, overflow: Overflow) -> (Plane, Peer) {
    let plane = Plane::start(ring, |config| {
        config.overflow = overflow;
        config.queue_events_max = 100;
        config.queue_bytes_max = 80_000;
    });
    let slow = Peer::subscriber(&plane, 1, &["t"]);
    let mut publisher = Peer::publisher(&plane);
    assert!(publisher.wanted().0);
    // One event at a time in flight: the reader keeps up, whatever the host does.
    let mut quick = Peer::subscriber(&plane, 1, &["t."]);
    for sequence in 0..MANY {
        publisher.send(&event("t.x", 1, sequence, SIZE));
        if sequence % 50 == 49 {
            (sequence - 49..=sequence).for_each(|wanted| {
                assert_eq!(quick.sequence(), Some(wanted));
            });
        }
    }
    received(&plane, MANY);
    (plane, slow)
}

#[test]
fn a_subscriber_that_does_not_read_loses_the_newest() {
    for ring in rings() {
        let (plane, mut slow) = overrun(ring, Overflow::DropNewest);
        let stats = &plane.handle.stats.plane;
        let dropped = stats.events_dropped_newest.get();
        assert!(dropped > 0 && dropped < MANY);
        let (mut last, mut count) = (None, 0);
        while count < MANY - dropped {
            let sequence = slow.sequence().unwrap();
            assert!(last.is_none_or(|last| last < sequence));
            (last, count) = (Some(sequence), count + 1);
        }
        until("sent", || stats.events_sent.get() == 2 * MANY - dropped);
        assert!(slow.have.is_empty());
        assert_eq!(stats.events_dropped_oldest.get(), 0);
        assert!(
            std::iter::from_fn(|| plane.handle.reports.next())
                .any(|report| matches!(report, Report::Dropping { .. }))
        );
    }
}

#[test]
fn a_subscriber_that_does_not_read_loses_the_oldest() {
    for ring in rings() {
        let (plane, mut slow) = overrun(ring, Overflow::DropOldest);
        let stats = &plane.handle.stats.plane;
        let dropped = stats.events_dropped_oldest.get() + stats.events_dropped_newest.get();
        assert!(stats.events_dropped_oldest.get() > 0);
        let read: Vec<u64> = (0..MANY - dropped)
            .map(|_| slow.sequence().unwrap())
            .collect();
        assert!(read.is_sorted_by(|one, next| one < next));
        assert_eq!(read.last(), Some(&(MANY - 1)));
        until("sent", || stats.events_sent.get() == 2 * MANY - dropped);
    }
}

#[test]
fn a_subscriber_that_does_not_read_is_disconnected() {
    for ring in rings() {
        let (plane, mut slow) = overrun(ring, Overflow::Disconnect);
        let stats = &plane.handle.stats.plane;
        assert_eq!(stats.subscribers_overrun.get(), 1);
        while slow.sequence().is_some() {}
        until("gone", || {
            stats.subscribers.get() == 0 && stats.subscriptions.get() == 0
        });
    }
}

#[test]
fn liars_are_named_and_hurt_only_themselves() {
    for ring in rings() {
        let plane = Plane::start(ring, |config| config.event_bytes_max = 64 << 10);
        let mut subscriber = Peer::subscriber(&plane, 1, &[""]);
        let mut good = Peer::publisher(&plane);
        let mut liar = Peer::publisher(&plane);
        let name = liar.stream.local_addr().unwrap();
        // The frame inside declares more than there is: dropped, and the next one passes.
        let mut lie = event("t", 2, 0, 100);
        let length = lie.len() - 104;
        lie[length] = 0xff;
        liar.send(&lie);
        liar.send(&event("t", 2, 1, 100));
        assert_eq!(subscriber.sequence(), Some(1));
        liar.send(b"\x01\x01t\x00\x03two");
        liar.send(&event("t", 2, 2, 100));
        assert_eq!(subscriber.sequence(), Some(2));
        assert_eq!(plane.handle.stats.plane.events_bad.get(), 2);
        let reports: Vec<_> = std::iter::from_fn(|| plane.handle.reports.next()).collect();
        assert!(reports.iter().any(|report| matches!(
            report, Report::Bad { peer, so_far: 1, .. } if *peer == name
        )));
        // A frame that is too large by its own account: the connection ends, the others go on.
        liar.send(b"\x02\x00\x00\x00\x01\x00\x00\x00\x00");
        while liar.frame().is_some() {}
        good.send(&event("t", 3, 9, 100));
        assert_eq!(subscriber.sequence(), Some(9));
        assert_eq!(plane.handle.stats.plane.sessions_refused.get(), 1);
        // Whoever speaks something else is turned away.
        let mut stranger = TcpStream::connect(plane.xsub).unwrap();
        stranger.set_read_timeout(Some(PATIENCE)).unwrap();
        stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let mut answer = Vec::new();
        let _ = stranger.read_to_end(&mut answer);
        until("refused", || {
            plane.handle.stats.plane.sessions_refused.get() == 2
        });
    }
}

#[test]
fn losses_before_us_are_counted_exactly() {
    for ring in rings() {
        let plane = Plane::start(ring, |_| {});
        let mut subscriber = Peer::subscriber(&plane, 1, &["t"]);
        let mut publisher = Peer::publisher(&plane);
        for sequence in [4, 5, 8, 7, 7, 20, 5] {
            publisher.send(&event("t", 1, sequence, 1));
            assert_eq!(subscriber.sequence(), Some(sequence));
        }
        // It comes again on another connection: what it said meanwhile is missing.
        drop(publisher);
        let mut publisher = Peer::publisher(&plane);
        publisher.send(&event("t", 1, 24, 1));
        assert_eq!(subscriber.sequence(), Some(24));
        let stats = &plane.handle.stats.plane;
        assert_eq!(stats.events_lost.get(), 2 + 11 + 3);
        assert_eq!(
            (stats.events_late.get(), stats.events_duplicate.get()),
            (1, 2)
        );
    }
}

#[test]
fn many_subscriptions_and_publishers() {
    for ring in rings() {
        let plane = Plane::start(ring, |config| config.buffers = 512);
        let names: Vec<String> = (0..1000).map(|at| format!("namespace.n{at}.")).collect();
        let prefixes: Vec<&str> = names.iter().map(String::as_str).collect();
        let mut subscriber = Peer::subscriber(&plane, 1, &prefixes);
        let mut publishers: Vec<Peer> = (0..256).map(|_| Peer::publisher(&plane)).collect();
        for sequence in 0..20 {
            for (at, publisher) in publishers.iter_mut().enumerate() {
                let subject = format!("namespace.n{}.kv-events", at * 3);
                publisher.send(&event(&subject, at as u64, sequence, 50));
            }
        }
        for _ in 0..256 * 20 {
            assert!(subscriber.sequence().is_some());
        }
        let stats = &plane.handle.stats.plane;
        assert_eq!(stats.events_received.get(), 256 * 20);
        assert_eq!(
            (stats.events_lost.get(), stats.events_unwanted.get()),
            (0, 0)
        );
        until("shown", || stats.publishers.get() == 256);
        drop(publishers);
        drop(subscriber);
        until("gone", || {
            stats.publishers.get() == 0 && stats.subscriptions.get() == 0
        });
        until("given back", || stats.buffers_in_use.get() == 0);
    }
}

#[test]
fn tasks_of_this_process_publish_and_subscribe_in_direct_mode() {
    for ring in rings() {
        let plane = Plane::start(ring, |_| {});
        let tell = |command| assert!(plane.handle.command(command).is_ok());
        // A publisher of ours, with a port of its own.
        let (address, own) = door(DoorKind::Subscribers, 7);
        tell(Command::Open(own));
        let mut subscriber = Peer::new(TcpStream::connect(address).unwrap(), "SUB", 1);
        let mut bytes = Vec::new();
        zmtp::write_subscription(1, true, b"kv-events", &mut bytes);
        subscriber.send(&bytes);
        let stats = &plane.handle.stats.plane;
        until("subscribed", || stats.subscriptions.get() == 1);
        let ours = LocalEvent {
            subject: b"kv-events".to_vec(),
            publisher_id: 9,
            sequence: 3,
            frame: b"\x01\0\0\0\x01\x03".to_vec(),
        };
        tell(Command::Publish {
            group: 7,
            event: ours.clone(),
        });
        assert_eq!(subscriber.sequence(), Some(3));
        // A subscriber of ours, of a publisher elsewhere that comes up later.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (events, taken) = mesh::lane().unwrap();
        let prefixes = vec![b"kv".to_vec(), b"kv".to_vec()];
        tell(Command::Subscribe {
            consumer: 1,
            group: 8,
            prefixes,
            events: Box::new(events),
        });
        let address = listener.local_addr().unwrap();
        tell(Command::Dial {
            dial: 1,
            address,
            side: Side::Publisher,
            group: 8,
            security: Security::Null,
        });
        for sequence in 0..2 {
            // The second time after the connection was lost.
            let (stream, _) = listener.accept().unwrap();
            let mut publisher = Peer::new(stream, "PUB", 0);
            assert_eq!(publisher.wanted(), (true, b"kv".to_vec()));
            publisher.send(&event("kv-events", 4, sequence, 10_000));
            let mut came = None;
            until("delivered", || {
                came = taken.next();
                came.is_some()
            });
            let came = came.unwrap();
            assert_eq!(
                (&came.subject[..], came.sequence),
                (&b"kv-events"[..], sequence)
            );
            assert_eq!(came.frame.len(), 10_005);
        }
        tell(Command::Unsubscribe { consumer: 1 });
        tell(Command::Hang { dial: 1 });
        until("ended", || {
            stats.publishers.get() == 0 && stats.subscriptions.get() == 1
        });
    }
}
