//! The fuzzers' hook: commands and frames as they come, and the insides of boxes, which no fuzzer
//! could close.
//!
//! The first byte says what the others are; both sides of the handshake have fixed keys.

use std::sync::Arc;

use super::boxes::{CHANCE_BYTES, drawn, numbered, put, shared};
use super::client::Client;
use super::key::{KEY_BYTES, Keys, PublicKey};
use super::seal::Seal;
use super::server::{INITIATE, READY, Server, WELCOME};
use super::{CurveFault, Outcome};
use crate::Decoded;
use crate::zmtp::{self, Head, decode_head};

fn keys(byte: u8) -> Arc<Keys> {
    Arc::new(Keys::new(&[byte; KEY_BYTES]))
}

/// Both sides before their first words.
struct Pair {
    client: Client,
    server: Server,
    hello: Vec<u8>,
}

fn body(command: &[u8]) -> &[u8] {
    match decode_head(command, usize::MAX) {
        Decoded::Frame(head) => &command[head.head_bytes..],
        _ => panic!("no command was written"),
    }
}

fn pair() -> Pair {
    let server = Server::new(keys(2), [3; Server::CHANCE_BYTES]);
    let mut hello = vec![];
    let chance = [4; Client::CHANCE_BYTES];
    let client = Client::new(keys(1), keys(2).public(), &chance, &mut hello);
    let client = client.expect("a HELLO always fits");
    let hello = body(&hello).to_vec();
    Pair {
        client,
        server,
        hello,
    }
}

fn serve(server: &mut Server, said: &[u8]) -> Result<(Outcome, Vec<u8>), CurveFault> {
    let mut out = vec![];
    let any = |_: &PublicKey| true;
    let outcome = server.take(said, &zmtp::properties("XPUB"), any, &mut out)?;
    Ok((outcome, body(&out).to_vec()))
}

fn ask(client: &mut Client, said: &[u8]) -> Result<Outcome, CurveFault> {
    let mut out = vec![];
    client.take(said, &zmtp::properties("SUB"), &mut out)
}

/// A server that waits for INITIATE, and what it has said.
fn welcomed() -> (Pair, Vec<u8>) {
    let mut pair = pair();
    let (_, welcome) = serve(&mut pair.server, &pair.hello.clone()).expect("our own HELLO");
    (pair, welcome)
}

/// Any commands and frames of a peer, and what may be inside their boxes.
pub fn curve(data: &[u8]) {
    let Some((&what, data)) = data.split_first() else {
        return;
    };
    match what % 10 {
        0 => drop(serve(&mut pair().server, data)),
        1 => drop(serve(&mut welcomed().0.server, data)),
        2 => drop(ask(&mut pair().client, data)),
        3 => {
            let (mut pair, welcome) = welcomed();
            ask(&mut pair.client, &welcome).expect("our own WELCOME");
            // Nothing but a box of the server's is believed.
            assert!(ask(&mut pair.client, data).is_err() || data.starts_with(b"\x05READY"));
        }
        4 => initiate(data),
        5 => welcome(data),
        6 => ready(data),
        7 => frame(data),
        8 => inside(data),
        _ => text(data),
    }
}

/// The inside of an INITIATE.
fn initiate(inside: &[u8]) {
    let (mut pair, welcome) = welcomed();
    let mut data = vec![];
    let first = shared(&keys(2).public().0, &brief());
    let nonce = drawn(WELCOME, welcome[8..].first_chunk().expect("its chance"));
    let opened = super::boxes::unseal(&first, &nonce, &welcome[8 + CHANCE_BYTES..]);
    let opened = opened.expect("our own WELCOME");
    let (theirs, cookie) = opened.split_first_chunk().expect("its key");
    data.extend_from_slice(b"\x08INITIATE");
    data.extend_from_slice(cookie);
    data.extend_from_slice(&9_u64.to_be_bytes());
    let key = shared(theirs, &brief());
    put(&key, &numbered(INITIATE, 9), &[inside], &mut data).expect("it fits");
    if let Ok((Outcome::Done(opened), _)) = serve(&mut pair.server, &data) {
        assert!(inside.starts_with(&opened.peer.0) && inside.ends_with(&opened.properties));
    }
}

/// The client's keys for the connection.
fn brief() -> Keys {
    Keys::new(&[4; KEY_BYTES])
}

/// The inside of a WELCOME.
fn welcome(inside: &[u8]) {
    let mut data = b"\x07WELCOME".to_vec();
    let chance = [5; CHANCE_BYTES];
    data.extend_from_slice(&chance);
    let key = shared(&brief().public().0, &keys(2));
    put(&key, &drawn(WELCOME, &chance), &[inside], &mut data).expect("it fits");
    let taken = ask(&mut pair().client, &data);
    assert_eq!(taken.is_ok(), inside.len() == 128);
}

/// The inside of a READY: properties.
fn ready(inside: &[u8]) {
    let mut client = pair().client;
    let (theirs, number) = (Keys::new(&[6; KEY_BYTES]), 1_u64);
    let mut data = b"\x07WELCOME".to_vec();
    let chance = [5; CHANCE_BYTES];
    data.extend_from_slice(&chance);
    let first = shared(&brief().public().0, &keys(2));
    let said = [&theirs.public().0[..], &[0; 96]];
    put(&first, &drawn(WELCOME, &chance), &said, &mut data).expect("it fits");
    ask(&mut client, &data).expect("a good WELCOME");
    let mut data = b"\x05READY".to_vec();
    data.extend_from_slice(&number.to_be_bytes());
    let key = shared(&brief().public().0, &theirs);
    put(&key, &numbered(READY, number), &[inside], &mut data).expect("it fits");
    match ask(&mut client, &data) {
        Ok(Outcome::Done(opened)) => {
            assert_eq!(opened.properties, inside);
            let _ = zmtp::property(&opened.properties, "Socket-Type");
        }
        other => panic!("{other:?}"),
    }
}

fn seals() -> (Seal, Seal) {
    let (ours, theirs) = (keys(1), keys(2));
    let client = Seal::new(shared(&theirs.public().0, &ours), false, 2, 1);
    (
        client,
        Seal::new(shared(&ours.public().0, &theirs), true, 1, 2),
    )
}

/// A frame as it comes, which is none of the peer's.
fn frame(data: &[u8]) {
    let Decoded::Frame(head) = decode_head(data, 64 << 10) else {
        return;
    };
    let Some(frame) = data.get(..head.frame_bytes()) else {
        return;
    };
    let (_, mut server) = seals();
    let mut copy = frame.to_vec();
    let mut known = vec![];
    let (mut client, _) = seals();
    let plain = Head {
        command: false,
        more: true,
        head_bytes: 0,
        body_bytes: 5,
    };
    client.seal(&plain, b"event", &mut known).expect("it fits");
    // A fuzzer has that one among its seeds, and cannot make another.
    if server.open(&head, &mut copy).is_ok() {
        assert_eq!(frame[head.head_bytes..], known[2..]);
    }
}

/// A frame of the peer's, and what was in its box.
fn inside(data: &[u8]) {
    let (mut client, mut server) = seals();
    let Some((&flags, body)) = data.split_first() else {
        return;
    };
    let head = Head {
        command: flags & 1 != 0,
        more: flags & 2 != 0,
        head_bytes: 0,
        body_bytes: body.len(),
    };
    let mut sealed = vec![];
    server.seal(&head, body, &mut sealed).expect("it fits");
    let front = decode_head(&sealed, usize::MAX).frame().expect("a frame");
    let inside = client.open(&front, &mut sealed).expect("ours");
    let (written, bytes) = head.written();
    assert_eq!(sealed[inside], [&written[..bytes], body].concat());
}

/// A key as text.
fn text(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    if let Ok(key) = text.parse::<PublicKey>() {
        assert_eq!(key.to_string(), text.trim());
    }
    let _ = text.parse::<Keys>();
}
