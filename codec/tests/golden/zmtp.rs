//! What a real libzmq put on the wire (`codec/golden/libzmq`, with the script that captured it):
//! read whole and byte by byte, and written again by our own writers.

use std::collections::BTreeMap;

use corelane_codec::zmtp::{self, Command, Fault, Mechanism, Walk};
use corelane_codec::{Bad, Decoded};
use serde_json::Value;

use crate::common::{golden, unhex};

fn captures() -> BTreeMap<String, Vec<u8>> {
    let file = golden().with_file_name("libzmq").join("libzmq.json");
    let text: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let rows = text["captures"].as_array().unwrap();
    let row = |row: &Value| {
        let text = |key: &str| row[key].as_str().unwrap().to_owned();
        (text("name"), unhex(&text("hex")))
    };
    rows.iter().map(row).collect()
}

/// The head and body of a frame that is all there is; shorter beginnings need more.
#[track_caller]
fn frame(bytes: &[u8]) -> (zmtp::Head, &[u8]) {
    let Decoded::Frame(head) = zmtp::decode_head(bytes, 1 << 20) else {
        panic!("{bytes:02x?}");
    };
    assert_eq!(head.frame_bytes(), bytes.len());
    for cut in 0..head.head_bytes {
        assert!(matches!(
            zmtp::decode_head(&bytes[..cut], 1 << 20),
            Decoded::Need(_)
        ));
    }
    (head, &bytes[head.head_bytes..])
}

#[test]
fn greetings() {
    let captures = captures();
    // It calls itself 3.1 before it knows the other.
    for name in ["greeting of a SUB to 3.1", "greeting of a SUB to 3.0"] {
        let bytes = &captures[name];
        assert_eq!(bytes[..], zmtp::greeting()[..], "{name}");
        for cut in 0..bytes.len() {
            assert!(
                matches!(zmtp::decode_greeting(&bytes[..cut]), Decoded::Need(_)),
                "{cut}"
            );
        }
        let greeting = zmtp::decode_greeting(bytes).frame().unwrap();
        assert_eq!((greeting.minor, greeting.as_server), (1, false));
    }
    let curve = &captures["greeting of a SUB with CURVE"];
    let ours = zmtp::greeting_with(Mechanism::Curve, false);
    assert_eq!(curve[..], ours[..]);
    let greeting = zmtp::decode_greeting(curve).frame().unwrap();
    assert_eq!(greeting.mechanism, Mechanism::Curve);
    let bad = zmtp::decode_greeting(&captures["greeting of a SUB with PLAIN"]);
    assert_eq!(bad, Decoded::Bad(Bad::Zmtp(Fault::Mechanism)));
}

#[test]
fn handshakes() {
    let captures = captures();
    for (name, kind) in [
        ("READY of a SUB to 3.1", "SUB"),
        ("READY of a SUB to 3.0", "SUB"),
        ("READY of an XPUB to 3.1", "XPUB"),
        ("READY of an XPUB to 3.0", "XPUB"),
        ("READY of a PUB", "PUB"),
        ("READY of a XSUB", "XSUB"),
    ] {
        let (head, body) = frame(&captures[name]);
        assert!(head.command, "{name}");
        let Ok(Command::Ready(properties)) = zmtp::decode_command(body) else {
            panic!("{name}");
        };
        let said = zmtp::property(properties, "socket-type").unwrap();
        assert_eq!(said, Some(kind.as_bytes()), "{name}");
        let mut ours = Vec::new();
        zmtp::write_ready(kind, &mut ours);
        assert_eq!(ours, captures[name], "{name}");
    }
}

#[test]
fn subscriptions() {
    let captures = captures();
    let long = format!("namespace.{}", "x".repeat(300));
    for minor in [0, 1] {
        for (name, subscribe, prefix) in [
            ("subscription", true, "kv-events"),
            ("subscription to all", true, ""),
            ("long subscription", true, &*long),
            ("end of a subscription", false, "kv-events"),
        ] {
            let bytes = &captures[&format!("{name} to 3.{minor}")];
            let (head, body) = frame(bytes);
            assert_eq!((head.command, head.more), (minor == 1, false), "{name}");
            let prefix = prefix.as_bytes();
            match (minor, subscribe) {
                (0, _) => {
                    let said = zmtp::decode_subscription(body);
                    assert_eq!(said, Some((subscribe, prefix)), "{name}");
                }
                (_, true) => {
                    assert_eq!(zmtp::decode_command(body), Ok(Command::Subscribe(prefix)));
                }
                (_, false) => assert_eq!(zmtp::decode_command(body), Ok(Command::Cancel(prefix))),
            }
            let mut ours = Vec::new();
            zmtp::write_subscription(minor, subscribe, prefix, &mut ours);
            assert_eq!(ours, *bytes, "{name} to 3.{minor}");
        }
    }
}

#[test]
fn heartbeats() {
    let captures = captures();
    let (_, body) = frame(&captures["PING"]);
    // Tenths of a second, and no context.
    let (ttl, context) = (100, &b""[..]);
    assert_eq!(
        zmtp::decode_command(body),
        Ok(Command::Ping { ttl, context })
    );
    let (_, body) = frame(&captures["PONG"]);
    assert_eq!(zmtp::decode_command(body), Ok(Command::Pong(b"ctx")));
    let mut ours = Vec::new();
    zmtp::write_command("PONG", b"ctx", &mut ours);
    assert_eq!(ours, captures["PONG"]);
}

#[test]
fn events_with_short_and_long_frames() {
    let captures = captures();
    for minor in [0, 1] {
        for (name, size) in [("short", 40), ("long", 300), ("empty", 0)] {
            let bytes = &captures[&format!("{name} event to 3.{minor}")];
            let event = zmtp::decode_event(bytes, 1 << 20).unwrap();
            assert_eq!((event.publisher_id, event.sequence), (7, size as u64));
            assert_eq!(event.end, bytes.len());
            let subject = &bytes[event.subject_at..][..event.subject_bytes];
            let frame = &bytes[event.frame_at..];
            assert_eq!((subject, frame.len()), (&b"kv-events"[..], size + 5));
            for cut in 0..bytes.len() {
                assert_eq!(zmtp::decode_event(&bytes[..cut], 1 << 20), None);
            }
            let mut ours = Vec::new();
            zmtp::write_event_front(subject, 7, size as u64, frame.len(), &mut ours);
            ours.extend_from_slice(frame);
            assert_eq!(ours, *bytes, "{name}");
            assert_eq!(walked(bytes), event, "{name}");
        }
    }
}

/// The same event, from the beginnings of its frames.
fn walked(bytes: &[u8]) -> zmtp::Event {
    let mut walk = Walk::default();
    while !walk.is_done() {
        let head = zmtp::decode_head(&bytes[walk.at()..], 1 << 20)
            .frame()
            .unwrap();
        walk.step(&head, 1 << 20).unwrap();
    }
    walk.event(|at, to| to.copy_from_slice(&bytes[at..at + to.len()]))
        .unwrap()
}
