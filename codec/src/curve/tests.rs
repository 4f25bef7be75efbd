//! Both sides against each other, and against whoever changes what they say.

use std::sync::Arc;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::zmtp::{self, Command, Head, decode_command, decode_head};

fn keys(byte: u8) -> Arc<Keys> {
    Arc::new(Keys::new(&[byte; KEY_BYTES]))
}

/// The body of the one command that was written.
#[track_caller]
fn body(written: &[u8]) -> Vec<u8> {
    let head = decode_head(written, 4096).frame().unwrap();
    assert!(head.command && head.frame_bytes() == written.len());
    written[head.head_bytes..].to_vec()
}

struct Pair {
    client: Client,
    server: Server,
    hello: Vec<u8>,
}

fn pair(seed: u8) -> Pair {
    let server = Server::new(keys(2), [seed; Server::CHANCE_BYTES]);
    let mut out = vec![];
    let chance = [seed ^ 0x55; Client::CHANCE_BYTES];
    let client = Client::new(keys(1), keys(2).public(), &chance, &mut out).unwrap();
    let hello = body(&out);
    Pair {
        client,
        server,
        hello,
    }
}

const SUB: &str = "SUB";
const XPUB: &str = "XPUB";

/// A step of the server.
fn serve(server: &mut Server, said: &[u8]) -> Result<(Outcome, Vec<u8>), CurveFault> {
    let mut out = vec![];
    let mine = keys(1).public();
    let properties = zmtp::properties(XPUB);
    let outcome = server.take(said, &properties, |peer| *peer == mine, &mut out)?;
    Ok((outcome, body(&out)))
}

fn ask(client: &mut Client, said: &[u8]) -> Result<(Outcome, Vec<u8>), CurveFault> {
    let mut out = vec![];
    let outcome = client.take(said, &zmtp::properties(SUB), &mut out)?;
    Ok((outcome, out))
}

fn opened(outcome: Outcome) -> Opened {
    match outcome {
        Outcome::Done(opened) => *opened,
        Outcome::More => panic!("the handshake goes on"),
    }
}

/// What each side said: WELCOME, INITIATE, READY; and the ends, client's first.
fn shake_hands() -> ([Vec<u8>; 4], Opened, Opened) {
    let Pair {
        mut client,
        mut server,
        hello,
    } = pair(7);
    let (_, welcome) = serve(&mut server, &hello).unwrap();
    let (_, initiate) = ask(&mut client, &welcome).unwrap();
    let initiate = body(&initiate);
    let (ends, ready) = serve(&mut server, &initiate).unwrap();
    let (end, _) = ask(&mut client, &ready).unwrap();
    ([hello, welcome, initiate, ready], opened(end), opened(ends))
}

#[test]
fn both_sides_agree_and_know_each_other() {
    let (said, client, server) = shake_hands();
    let sizes = said.map(|command| command.len());
    assert_eq!(sizes[..2], [200, 168]);
    assert_eq!(
        (client.peer, server.peer),
        (keys(2).public(), keys(1).public())
    );
    let kind = |properties: &[u8]| {
        let kind = zmtp::property(properties, "Socket-Type").unwrap();
        String::from_utf8(kind.unwrap().to_vec()).unwrap()
    };
    assert_eq!(kind(&client.properties), XPUB);
    assert_eq!(kind(&server.properties), SUB);
    let shown = format!("{client:?}{server:?}");
    for secret in [
        "[1, 1",
        "[2, 2",
        &*keys(1).secret_text(),
        &*keys(2).secret_text(),
    ] {
        assert!(!shown.contains(secret), "{shown}");
    }
}

/// Each command cut anywhere, or with any byte changed, ends the handshake.
#[test]
fn what_was_changed_is_not_taken() {
    let (said, ..) = shake_hands();
    for (step, whole) in said.iter().enumerate() {
        let cut = (0..whole.len()).map(|end| whole[..end].to_vec());
        let flipped = (0..whole.len()).map(|at| {
            let mut changed = whole.clone();
            // Not the highest bit, which X25519 passes over in a key.
            changed[at] ^= 1 << (at % 7);
            changed
        });
        let long = [&whole[..], b"x"].concat();
        for changed in cut.chain(flipped).chain([long]) {
            // The padding of a HELLO is looked at by nobody.
            let padding = 6 + 2..6 + 74;
            if step == 0 && changed.len() == whole.len() {
                let differs = |at: &usize| changed[*at] != whole[*at];
                if (0..whole.len())
                    .find(differs)
                    .is_some_and(|at| padding.contains(&at))
                {
                    continue;
                }
            }
            let Pair {
                mut client,
                mut server,
                ..
            } = pair(7);
            let (mine, his) = (step % 2 == 0, step >= 2);
            if his && mine {
                serve(&mut server, &said[0]).unwrap();
            } else if his {
                ask(&mut client, &said[1]).unwrap();
            }
            let refused = match mine {
                true => serve(&mut server, &changed).map(drop),
                false => ask(&mut client, &changed).map(drop),
            };
            assert!(refused.is_err(), "command {step}");
            // There is no second try.
            if mine && his {
                assert!(serve(&mut server, whole).is_err());
            }
        }
    }
}

#[test]
fn keys_that_do_not_fit_are_refused() {
    // A client that knows another key of the server.
    let Pair {
        mut server, hello, ..
    } = pair(7);
    let mut out = vec![];
    let chance = [9; Client::CHANCE_BYTES];
    Client::new(keys(1), keys(3).public(), &chance, &mut out).unwrap();
    let wrong = serve(&mut server, &body(&out)).unwrap_err();
    assert_eq!(wrong, CurveFault::Box("HELLO"));
    // A HELLO of the wrong version, and no HELLO at all.
    let mut server = pair(7).server;
    let mut old = hello.clone();
    old[6] = 0;
    assert_eq!(
        serve(&mut server, &old).unwrap_err(),
        CurveFault::Unexpected("HELLO")
    );
    let ready = body(&{
        let mut out = vec![];
        zmtp::write_ready(SUB, &mut out);
        out
    });
    let mut server = pair(7).server;
    assert_eq!(
        serve(&mut server, &ready).unwrap_err(),
        CurveFault::Unexpected("HELLO")
    );
    assert!(matches!(
        decode_command(&hello),
        Ok(Command::Other(b"HELLO"))
    ));
}

#[test]
fn strangers_are_named() {
    let mut server = Server::new(keys(2), [7; Server::CHANCE_BYTES]);
    let mut out = vec![];
    let chance = [9; Client::CHANCE_BYTES];
    let mut client = Client::new(keys(5), keys(2).public(), &chance, &mut out).unwrap();
    let (_, welcome) = serve(&mut server, &body(&out)).unwrap();
    let (_, initiate) = ask(&mut client, &welcome).unwrap();
    let refused = serve(&mut server, &body(&initiate)).unwrap_err();
    assert_eq!(refused, CurveFault::Stranger(keys(5).public()));
    assert!(refused.to_string().contains(&keys(5).public().to_string()));
}

/// A cookie is good for its connection alone, and an INITIATE too.
#[test]
fn what_another_connection_said_is_not_taken() {
    let (said, ..) = shake_hands();
    let mut server = pair(8).server;
    serve(&mut server, &said[0]).unwrap();
    let refused = serve(&mut server, &said[2]).unwrap_err();
    assert_eq!(refused, CurveFault::Box("the cookie"));
    let mut server = pair(7).server;
    serve(&mut server, &said[0]).unwrap();
    serve(&mut server, &said[2]).unwrap();
    assert!(serve(&mut server, &said[2]).is_err());
}

#[test]
#[ignore = "writes the seeds of the fuzz target `curve` anew"]
fn write_seeds() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/curve");
    std::fs::create_dir_all(&folder).unwrap();
    let put = |name: &str, what: u8, data: &[u8]| {
        std::fs::write(folder.join(name), [&[what], data].concat()).unwrap();
    };
    let server = Server::new(keys(2), [3; Server::CHANCE_BYTES]);
    let mut server = server;
    let mut hello = vec![];
    let mut client = Client::new(
        keys(1),
        keys(2).public(),
        &[4; Client::CHANCE_BYTES],
        &mut hello,
    )
    .unwrap();
    let hello = body(&hello);
    put("hello", 0, &hello);
    let (_, welcome) = serve(&mut server, &hello).unwrap();
    put("welcome", 2, &welcome);
    let (_, initiate) = ask(&mut client, &welcome).unwrap();
    let initiate = body(&initiate);
    put("initiate", 1, &initiate);
    let (_, ready) = serve(&mut server, &initiate).unwrap();
    put("ready", 3, &ready);
    let properties = zmtp::properties("SUB");
    let vouch = {
        let mut out = vec![];
        let brief = Keys::new(&[4; 32]);
        let theirs = Keys::new(&[3; 32]);
        let pieces = [&brief.public().0[..], &keys(2).public().0];
        boxes::put(
            &boxes::shared(&theirs.public().0, &keys(1)),
            &boxes::drawn(b"VOUCH---", &[4; 16]),
            &pieces,
            &mut out,
        )
        .unwrap();
        out
    };
    put(
        "inside_initiate",
        4,
        &[&keys(1).public().0[..], &[4; 16], &vouch, &properties].concat(),
    );
    put("inside_welcome", 5, &[7; 128]);
    put("inside_ready", 6, &properties);
    let mut seal = Seal::new(boxes::shared(&keys(2).public().0, &keys(1)), false, 2, 1);
    let mut out = vec![];
    seal.seal(
        &Head {
            command: false,
            more: true,
            head_bytes: 0,
            body_bytes: 5,
        },
        b"event",
        &mut out,
    )
    .unwrap();
    put("message", 7, &out);
    put("inside_message", 8, b"\x00event");
    put("inside_command", 8, b"\x01\x09SUBSCRIBEnamespace.");
    put("inside_long", 8, &[2; 300]);
    put("key", 9, b"rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7");
    put("no_key", 9, &[b'#'; 40]);
}

fn head_of(body: &[u8], command: bool, more: bool) -> Head {
    Head {
        command,
        more,
        head_bytes: 0,
        body_bytes: body.len(),
    }
}

fn sealed(seal: &mut Seal, body: &[u8]) -> Vec<u8> {
    let mut out = vec![];
    seal.seal(&head_of(body, false, false), body, &mut out)
        .unwrap();
    out
}

fn open(seal: &mut Seal, frame: &[u8]) -> Result<Vec<u8>, CurveFault> {
    let mut frame = frame.to_vec();
    let head = decode_head(&frame, usize::MAX).frame().unwrap();
    assert_eq!(head.frame_bytes(), frame.len());
    let inside = seal.open(&head, &mut frame)?;
    Ok(frame[inside].to_vec())
}

#[test]
fn frames_come_once_in_order_and_whole() {
    let (_, client, server) = shake_hands();
    let (mut from, mut to) = (server.seal, client.seal);
    let (first, second) = (sealed(&mut from, b"one"), sealed(&mut from, b"two"));
    assert_eq!(open(&mut to, &second).unwrap(), b"\x00\x03two");
    assert_eq!(open(&mut to, &first), Err(CurveFault::Replayed));
    assert_eq!(open(&mut to, &second), Err(CurveFault::Replayed));
    // What we said ourselves, sent back.
    assert_eq!(open(&mut from, &second), Err(CurveFault::Box("MESSAGE")));
    let third = sealed(&mut from, b"three");
    let at = first.len() - SEAL_BYTES - 3;
    for place in at..third.len() {
        let mut changed = third.clone();
        changed[place] ^= 0x10;
        assert!(open(&mut to, &changed).is_err(), "{place}");
    }
    for bytes in 0..third.len() - 2 {
        let mut cut = vec![0, bytes as u8];
        cut.extend_from_slice(&third[2..2 + bytes]);
        assert!(open(&mut to, &cut).is_err(), "{bytes}");
    }
    assert_eq!(open(&mut to, &third).unwrap(), b"\x00\x05three");
    assert!(open(&mut to, b"\x00\x03two").is_err());
}

#[test]
fn numbers_end_some_day() {
    let (_, client, _) = shake_hands();
    let mut seal = client.seal;
    seal.use_up();
    let head = head_of(b"", false, false);
    let refused = seal.seal(&head, b"", &mut vec![]);
    assert_eq!(refused, Err(CurveFault::Exhausted));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn frames_are_what_they_were(
        frames in vec((vec(any::<u8>(), 0..600), 0_u8..3), 1..6),
        back: bool,
    ) {
        let (_, client, server) = shake_hands();
        let (mut from, mut to) = match back {
            true => (server.seal, client.seal),
            false => (client.seal, server.seal),
        };
        for (body, kind) in frames {
            let head = head_of(&body, kind == 1, kind == 2);
            let mut out = vec![];
            from.seal(&head, &body, &mut out).unwrap();
            let (plain, bytes) = head.written();
            let wanted = [&plain[..bytes], &body].concat();
            prop_assert_eq!(open(&mut to, &out).unwrap(), wanted);
        }
    }
}
