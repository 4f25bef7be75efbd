//! Plain TCP events, among themselves and with peers that speak ZMTP: those are another plane's
//! dials. On both rings.

use std::io::{Read, Write};
use std::net::TcpStream;

use corelane_codec::event::hello::{Answer, Role, Verdict, decode_answer, write_hello};
use corelane_codec::event::{Envelope, multipart};
use corelane_codec::{Decoded, event::frame};
use corelane_engine::config::Idle;
use corelane_engine::events::{Command, LocalEvent, Overflow, Report, Security, Side};
use corelane_engine::mesh::{self, Receiver};
use corelane_engine::placement::{CPUS_MAX, affinity};
use socket2::{Domain, Socket, Type};

mod common;
use common::plane::Plane;
use common::{DEADLINE as PATIENCE, rings, wait_until as until};

const SCOPE: &str = "namespace.a";

impl Plane {
    /// Joins this plane, as a ZMTP subscriber and as a ZMTP publisher, to another one.
    fn join(&self, other: &Plane) -> Receiver<LocalEvent> {
        let (events, taken) = mesh::lane().unwrap();
        let before = other.handle.stats.plane.subscriptions.get();
        let prefixes = vec![Vec::new()];
        let (consumer, group) = (1, 5);
        self.tell(Command::Subscribe {
            consumer,
            group,
            prefixes,
            events: Box::new(events),
        });
        let dials = [
            (other.xpub, Side::Publisher, 5),
            (other.xsub, Side::Subscriber, 6),
        ];
        for (dial, (address, side, group)) in dials.into_iter().enumerate() {
            let dial = dial as u64;
            self.tell(Command::Dial {
                dial,
                address,
                side,
                group,
                security: Security::Null,
            });
        }
        let stats = &other.handle.stats.plane;
        until("joined", || {
            stats.subscriptions.get() == before + 1 && stats.publishers.get() == 1
        });
        taken
    }

    fn received(&self, events: u64) {
        let stats = &self.handle.stats.plane;
        until("received", || stats.events_received.get() == events);
    }
}

/// A peer of the plain door.
struct Peer {
    stream: TcpStream,
    have: Vec<u8>,
}

impl Peer {
    fn connect(plane: &Plane, hello: &[u8]) -> Peer {
        // Little room for what it does not read.
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.set_recv_buffer_size(16 << 10).unwrap();
        socket.connect(&plane.plain.into()).unwrap();
        let stream: TcpStream = socket.into();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        let mut peer = Peer {
            stream,
            have: Vec::new(),
        };
        peer.stream.write_all(hello).unwrap();
        peer
    }

    /// A peer that has been accepted.
    fn new(plane: &Plane, role: Role, max: u32, prefixes: &[&str]) -> Peer {
        let prefixes: Vec<&[u8]> = prefixes.iter().map(|prefix| prefix.as_bytes()).collect();
        let mut hello = Vec::new();
        write_hello(role, max, &prefixes, &mut hello).unwrap();
        let mut peer = Peer::connect(plane, &hello);
        assert_eq!(peer.verdict(), (Verdict::Accepted, String::new()));
        peer
    }

    fn publisher(plane: &Plane) -> Peer {
        Peer::new(plane, Role::Publisher, 0, &[SCOPE])
    }

    /// False at the end of the stream.
    fn read(&mut self) -> bool {
        let mut bytes = vec![0; 64 << 10];
        let count = self.stream.read(&mut bytes).unwrap_or(0);
        self.have.extend_from_slice(&bytes[..count]);
        count > 0
    }

    fn verdict(&mut self) -> (Verdict, String) {
        loop {
            match decode_answer(&self.have) {
                Decoded::Frame(answer) => {
                    let Answer { verdict, text, .. } = answer;
                    let said = (verdict, text.to_owned());
                    let bytes = answer.bytes();
                    self.have.drain(..bytes);
                    return said;
                }
                Decoded::Need(_) => assert!(self.read(), "it ended"),
                Decoded::Bad(bad) => panic!("{bad}"),
            }
        }
    }

    /// The next frame; `None` at the end of the stream.
    fn frame(&mut self) -> Option<Vec<u8>> {
        loop {
            if let Decoded::Frame(payload) = frame::decode(&self.have, 1 << 30) {
                return Some(self.have.drain(..payload.end).collect());
            }
            if !self.read() {
                return None;
            }
        }
    }

    fn sequence(&mut self) -> Option<u64> {
        let frame = self.frame()?;
        Some(
            Envelope::decode(frame::payload(&frame).unwrap())
                .unwrap()
                .sequence,
        )
    }
}

/// A frame of an event with `bytes` of payload.
fn event(topic: &str, publisher_id: u64, sequence: u64, bytes: usize) -> Vec<u8> {
    let payload = vec![sequence as u8; bytes];
    let envelope = Envelope {
        publisher_id,
        sequence,
        published_at_ms: 1_795_289_986_740,
        topic,
        payload: &payload,
    };
    let mut out = Vec::new();
    multipart::write_frame(&envelope, &mut out).unwrap();
    out
}

/// Small ones, and some that one receive buffer or many do not hold.
fn size(sequence: u64) -> usize {
    match sequence % 50 {
        7 => 30_000,
        9 => 90_000,
        _ => sequence as usize,
    }
}

fn next(taken: &Receiver<LocalEvent>) -> LocalEvent {
    let mut came = None;
    until("an event", || {
        came = taken.next();
        came.is_some()
    });
    came.unwrap()
}

#[test]
fn plain_and_zmtp_peers_get_each_others_events() {
    for ring in rings() {
        let (plane, peers) = (Plane::start(ring, |_| {}), Plane::start(ring, |_| {}));
        let zmtp = peers.join(&plane);
        let mut some = Peer::new(&plane, Role::Subscriber, 0, &["namespace.a.kv_m", "none"]);
        let mut all = Peer::new(&plane, Role::Subscriber, 0, &[""]);
        let mut publisher = Peer::publisher(&plane);
        let mut bytes = Vec::new();
        for sequence in 0..150 {
            bytes.extend(event("kv_metrics", 5, sequence, size(sequence)));
            bytes.extend(event("odd.topic", 6, sequence, 10));
        }
        publisher.stream.write_all(&bytes).unwrap();
        for sequence in 0..150 {
            let want = event("kv_metrics", 5, sequence, size(sequence));
            assert_eq!(some.frame().as_deref(), Some(&want[..]));
            assert_eq!(all.frame().as_deref(), Some(&want[..]));
            let came = next(&zmtp);
            assert_eq!((came.publisher_id, came.sequence), (5, sequence));
            assert_eq!(came.subject, b"namespace.a.kv_metrics");
            assert_eq!(came.frame, want);
            assert_eq!(all.frame(), Some(event("odd.topic", 6, sequence, 10)));
            assert_eq!(next(&zmtp).subject, b"namespace.a.odd%2Etopic");
        }
        // The other way; what stands behind a frame in its part stays behind.
        for sequence in 0..150 {
            let mut frame = event("kv_metrics", 7, sequence, size(sequence));
            frame.extend_from_slice(b"a mark");
            peers.tell(Command::Publish {
                group: 6,
                event: LocalEvent {
                    subject: b"namespace.b.kv_metrics".to_vec(),
                    publisher_id: 7,
                    sequence,
                    frame,
                },
            });
            let want = event("kv_metrics", 7, sequence, size(sequence));
            assert_eq!(all.frame(), Some(want));
            assert_eq!(next(&zmtp).sequence, sequence);
        }
        assert!(some.have.is_empty() && all.have.is_empty());
        let stats = &plane.handle.stats.plane;
        assert_eq!(stats.events_received.get(), 450);
        assert_eq!(stats.events_lost.get() + stats.events_bad.get(), 0);
        until("plain peers counted", || stats.plain_peers.get() == 3);
        drop((some, all, publisher));
        until("gone", || {
            stats.plain_peers.get() == 0 && stats.subscriptions.get() == 1
        });
        until("given back", || stats.buffers_in_use.get() == 0);
    }
}

#[test]
fn who_is_turned_away_is_told_why() {
    for ring in rings() {
        let plane = Plane::start(ring, |config| {
            config.event_bytes_max = 10_005;
            config.subscriptions_max = 3;
        });
        let hello = |role, max, prefixes: &[&[u8]]| {
            let mut bytes = Vec::new();
            write_hello(role, max, prefixes, &mut bytes).unwrap();
            bytes
        };
        let cases = [
            (
                b"GET / HTTP/1.1\r\n\r\n".to_vec(),
                Verdict::NotUnderstood,
                "hello",
            ),
            (
                hello(Role::Publisher, 10_001, &[b""]),
                Verdict::TooLarge,
                "10000",
            ),
            (
                hello(Role::Subscriber, 0, &[b"a", b"b", b"c", b"d"]),
                Verdict::TooManyPrefixes,
                "room for 3",
            ),
        ];
        for (bytes, verdict, word) in cases {
            let mut peer = Peer::connect(&plane, &bytes);
            let (said, text) = peer.verdict();
            assert!(said == verdict && text.contains(word), "{said:?} {text}");
            assert!(peer.frame().is_none());
        }
        // One that says nothing costs nothing but its place; one in pieces is understood.
        let _silent = Peer::connect(&plane, b"");
        let whole = hello(Role::Subscriber, 0, &[b"a"]);
        let mut slow = Peer::connect(&plane, &whole[..1]);
        for byte in &whole[1..] {
            slow.stream.write_all(&[*byte]).unwrap();
        }
        assert_eq!(slow.verdict().0, Verdict::Accepted);
        assert_eq!(plane.handle.stats.plane.sessions_refused.get(), 3);
    }
}

#[test]
fn liars_are_named_and_hurt_only_themselves() {
    for ring in rings() {
        let plane = Plane::start(ring, |config| config.event_bytes_max = 10_005);
        let mut all = Peer::new(&plane, Role::Subscriber, 0, &[""]);
        let mut publisher = Peer::publisher(&plane);
        // No envelope, small and in pieces: dropped, and the stream goes on.
        let mut bytes = Vec::new();
        for junk in [3, 9_000] {
            frame::write(&vec![b'x'; junk], &mut bytes).unwrap();
            frame::write(&vec![0x93; junk], &mut bytes).unwrap();
        }
        bytes.extend(event("t", 1, 4, 9_000));
        publisher.stream.write_all(&bytes).unwrap();
        assert_eq!(all.sequence(), Some(4));
        let stats = &plane.handle.stats.plane;
        assert_eq!(
            (stats.events_bad.get(), stats.sessions_refused.get()),
            (4, 0)
        );
        // As an array, and its members in another order: both are taken.
        let array = b"\x95\x01\x05\x00\xa1t\xc4\x01x";
        let turned = b"\x85\xa5topic\xa1t\xa8sequence\x06\xa7payload\xc4\x01x\
                       \xacpublished_at\x00\xacpublisher_id\x01";
        let mut bytes = Vec::new();
        frame::write(array, &mut bytes).unwrap();
        frame::write(turned, &mut bytes).unwrap();
        publisher.stream.write_all(&bytes).unwrap();
        assert_eq!((all.sequence(), all.sequence()), (Some(5), Some(6)));
        // No frame, too large a frame, and a subscriber that talks: they go, with a reason.
        let mut talker = Peer::new(&plane, Role::Subscriber, 0, &["none"]);
        talker.stream.write_all(b"hello?").unwrap();
        assert!(talker.frame().is_none());
        let mut wrong = Peer::publisher(&plane);
        wrong.stream.write_all(b"\x02\0\0\0\x01x").unwrap();
        assert!(wrong.frame().is_none());
        let mut large = Peer::publisher(&plane);
        large.stream.write_all(b"\x01\xff\xff\xff\xff").unwrap();
        assert!(large.frame().is_none());
        until("refused", || stats.sessions_refused.get() == 3);
        let mut reasons = Vec::new();
        until("named", || {
            while let Some(report) = plane.handle.reports.next() {
                if let Report::Closed { why: Some(why), .. } = report {
                    reasons.push(why);
                }
            }
            reasons.len() == 3
        });
        publisher.stream.write_all(&event("t", 1, 7, 1)).unwrap();
        assert_eq!(all.sequence(), Some(7));
    }
}

#[test]
fn what_a_slow_subscriber_loses_is_counted_exactly() {
    const MANY: u64 = 6_000;
    for (ring, overflow) in rings()
        .into_iter()
        .zip([Overflow::DropNewest, Overflow::DropOldest])
    {
        let plane = Plane::start(ring, |config| {
            config.overflow = overflow;
            config.queue_events_max = 100;
            config.queue_bytes_max = 80_000;
        });
        let mut slow = Peer::new(&plane, Role::Subscriber, 0, &["namespace.a."]);
        let mut small = Peer::new(&plane, Role::Subscriber, 500, &["namespace.a."]);
        let mut publisher = Peer::publisher(&plane);
        for sequence in 0..MANY {
            publisher
                .stream
                .write_all(&event("t", 1, sequence, 1000))
                .unwrap();
        }
        plane.received(MANY);
        let stats = &plane.handle.stats.plane;
        assert_eq!(stats.events_dropped_too_large.get(), MANY);
        let dropped = stats.events_dropped_newest.get() + stats.events_dropped_oldest.get();
        assert!(dropped > 0 && dropped < MANY, "{dropped}");
        let came: Vec<u64> = (dropped..MANY).map(|_| slow.sequence().unwrap()).collect();
        assert!(came.is_sorted());
        // Among the newest that are dropped the last one need not be: there may be room again.
        if overflow == Overflow::DropOldest {
            assert_eq!(came.last(), Some(&(MANY - 1)));
        }
        // What it can take it still gets.
        publisher
            .stream
            .write_all(&event("t", 1, MANY, 10))
            .unwrap();
        assert_eq!(
            (slow.sequence(), small.sequence()),
            (Some(MANY), Some(MANY))
        );
    }
}

#[test]
fn the_thread_has_the_cpu_and_the_idleness_that_it_is_told() {
    let cpu = affinity().unwrap()[0];
    for ring in rings() {
        let plane = Plane::start(ring, |config| {
            config.cpu = cpu;
            config.idle = Idle::Spin;
        });
        let stats = &plane.handle.stats.plane;
        until("it spins", || stats.idle_ticks.get() > 100);
        until("its time is shown", || stats.cpu_us.get() > 0);
        assert_eq!(stats.pinned.get(), 1);
        // One that this host has not: told, and it goes on.
        let plane = Plane::start(ring, |config| config.cpu = CPUS_MAX);
        let mut told = None;
        until("told", || {
            told = plane.handle.reports.next();
            told.is_some()
        });
        assert!(matches!(
            told,
            Some(Report::NotPinned { cpu: CPUS_MAX, .. })
        ));
        let mut all = Peer::new(&plane, Role::Subscriber, 0, &[""]);
        let mut publisher = Peer::publisher(&plane);
        publisher.stream.write_all(&event("t", 1, 0, 1)).unwrap();
        assert_eq!(all.sequence(), Some(0));
        assert_eq!(plane.handle.stats.plane.pinned.get(), 0);
    }
}
