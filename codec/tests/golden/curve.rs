//! Handshakes with a real libzmq, one on each side, with keys and chance that are always the same
//! on ours: replayed from `codec/golden/libzmq/curve.json`, which `capture_curve.py` beside it has
//! this file write.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use corelane_codec::Decoded;
use corelane_codec::curve::{Client, KEY_BYTES, Keys, Opened, Outcome, Seal, Server};
use corelane_codec::zmtp::{self, Command, Head, Mechanism};
use serde_json::{Value, json};

use crate::common::{golden, unhex};

/// Whoever is the client has the first key, the server the second.
fn keys(which: u8) -> Arc<Keys> {
    Arc::new(Keys::new(&[which; KEY_BYTES]))
}

const CLIENT: u8 = 1;
const SERVER: u8 = 2;

fn file() -> PathBuf {
    golden().with_file_name("libzmq").join("curve.json")
}

/// What the other side says, frame by frame; from a file or from a socket.
trait Peer {
    fn frame(&mut self) -> Vec<u8>;
    fn say(&mut self, bytes: &[u8]);
}

fn head(frame: &[u8]) -> Head {
    zmtp::decode_head(frame, 1 << 20).frame().unwrap()
}

/// The body of the next frame, which is a command.
fn command(peer: &mut dyn Peer) -> Vec<u8> {
    let frame = peer.frame();
    let head = head(&frame);
    assert!(head.command && !head.more);
    frame[head.head_bytes..].to_vec()
}

/// We are the client of a libzmq that publishes.
fn as_client(peer: &mut dyn Peer) -> Opened {
    let mut out = vec![];
    let chance = [3; Client::CHANCE_BYTES];
    let mut client = Client::new(keys(CLIENT), keys(SERVER).public(), &chance, &mut out).unwrap();
    peer.say(&out);
    loop {
        let mut out = vec![];
        let taken = client.take(&command(peer), &zmtp::properties("SUB"), &mut out);
        match taken.unwrap() {
            Outcome::More => peer.say(&out),
            Outcome::Done(opened) => return *opened,
        }
    }
}

/// We are the server of a libzmq that subscribes.
fn as_server(peer: &mut dyn Peer) -> Opened {
    let mut server = Server::new(keys(SERVER), [4; Server::CHANCE_BYTES]);
    loop {
        let mut out = vec![];
        let lets_in = |key: &_| *key == keys(CLIENT).public();
        let body = command(peer);
        let taken = server.take(&body, &zmtp::properties("XPUB"), lets_in, &mut out);
        peer.say(&out);
        if let Outcome::Done(opened) = taken.unwrap() {
            return *opened;
        }
    }
}

fn opened(seal: &mut Seal, peer: &mut dyn Peer) -> Vec<u8> {
    let mut frame = peer.frame();
    let inside = seal.open(&head(&frame), &mut frame).unwrap();
    frame[inside].to_vec()
}

fn kind(opened: &Opened) -> &[u8] {
    let kind = zmtp::property(&opened.properties, "Socket-Type");
    kind.unwrap().unwrap()
}

/// Both conversations: what libzmq says is what it says without CURVE, in boxes.
fn converse(publisher: &mut dyn Peer, subscriber: &mut dyn Peer) {
    let mut opened_by_us = as_client(publisher);
    assert_eq!(opened_by_us.peer, keys(SERVER).public());
    assert_eq!(kind(&opened_by_us), b"XPUB");
    let seal = &mut opened_by_us.seal;
    let wish = b"\x09SUBSCRIBEkv";
    let written = Head {
        command: true,
        more: false,
        head_bytes: 0,
        body_bytes: wish.len(),
    };
    let mut out = vec![];
    seal.seal(&written, wish, &mut out).unwrap();
    publisher.say(&out);
    for size in [40_u64, 300] {
        let parts: Vec<_> = (0..4).map(|_| opened(seal, publisher)).collect();
        let message = parts.concat();
        let event = zmtp::decode_event(&message, 1 << 20).unwrap();
        assert_eq!((event.publisher_id, event.sequence), (7, size));
        assert_eq!(message.len() - event.frame_at, 5 + size as usize);
    }

    let mut opened_by_it = as_server(subscriber);
    assert_eq!(opened_by_it.peer, keys(CLIENT).public());
    assert_eq!(kind(&opened_by_it), b"SUB");
    let said = opened(&mut opened_by_it.seal, subscriber);
    let head = head(&said);
    let command = zmtp::decode_command(&said[head.head_bytes..]);
    assert!(head.command);
    assert_eq!(command, Ok(Command::Subscribe(b"kv")));
}

/// What a peer has said once, and what we said.
struct Recorded {
    rows: std::vec::IntoIter<Value>,
}

impl Recorded {
    fn next(&mut self, who: &str) -> Vec<u8> {
        let row = self.rows.next().expect("one more frame");
        assert_eq!(row["who"], who);
        unhex(row["hex"].as_str().unwrap())
    }
}

impl Peer for Recorded {
    fn frame(&mut self) -> Vec<u8> {
        self.next("libzmq")
    }

    fn say(&mut self, bytes: &[u8]) {
        assert_eq!(bytes, self.next("corelane"));
    }
}

#[test]
fn libzmqs_handshakes_are_replayed() {
    let text: Value = serde_json::from_slice(&std::fs::read(file()).unwrap()).unwrap();
    let recorded = |side: &str| Recorded {
        rows: text[side].as_array().unwrap().clone().into_iter(),
    };
    let (mut publisher, mut subscriber) = (recorded("publisher"), recorded("subscriber"));
    converse(&mut publisher, &mut subscriber);
    assert!(publisher.rows.next().is_none() && subscriber.rows.next().is_none());
}

/// A libzmq that is there now.
struct Live {
    stream: TcpStream,
    rows: Vec<Value>,
}

impl Live {
    fn new(mut stream: TcpStream, as_server: bool) -> Live {
        let patience = Some(Duration::from_secs(60));
        stream.set_read_timeout(patience).unwrap();
        let greeting = zmtp::greeting_with(Mechanism::Curve, as_server);
        stream.write_all(&greeting).unwrap();
        let mut theirs = [0; zmtp::GREETING_BYTES];
        stream.read_exact(&mut theirs).unwrap();
        assert!(zmtp::decode_greeting(&theirs).frame().is_some());
        let rows = vec![];
        Live { stream, rows }
    }

    fn row(&mut self, who: &str, bytes: &[u8]) {
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        self.rows.push(json!({"who": who, "hex": hex}));
    }
}

impl Peer for Live {
    fn frame(&mut self) -> Vec<u8> {
        let mut frame = vec![];
        loop {
            let more = match zmtp::decode_head(&frame, 1 << 20) {
                Decoded::Frame(head) if frame.len() == head.frame_bytes() => break,
                Decoded::Frame(head) => head.frame_bytes() - frame.len(),
                Decoded::Need(bytes) => bytes - frame.len(),
                Decoded::Bad(bad) => panic!("{bad}"),
            };
            let have = frame.len();
            frame.resize(have + more, 0);
            self.stream.read_exact(&mut frame[have..]).unwrap();
        }
        self.row("libzmq", &frame);
        frame
    }

    fn say(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
        self.row("corelane", bytes);
    }
}

#[test]
#[ignore = "writes the file anew; capture_curve.py runs it"]
fn capture() {
    let variable = |name: &str| std::env::var(name).unwrap();
    let stream = TcpStream::connect(variable("CAPTURE_PUBLISHER")).unwrap();
    let mut publisher = Live::new(stream, false);
    let listener = TcpListener::bind(variable("CAPTURE_SUBSCRIBER")).unwrap();
    let mut subscriber = Live::new(listener.accept().unwrap().0, true);
    converse(&mut publisher, &mut subscriber);
    let captured = json!({
        "libzmq": variable("CAPTURE_LIBZMQ"),
        "publisher": publisher.rows,
        "subscriber": subscriber.rows,
    });
    let text = serde_json::to_string_pretty(&captured).unwrap();
    std::fs::write(file(), text + "\n").unwrap();
}
