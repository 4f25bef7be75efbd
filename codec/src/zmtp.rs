//! ZMTP 3.1, and 3.0 where a peer speaks that: greeting, commands, frames, and the messages that
//! carry events (spec/events-discovery.md §3.5; ZMTP: rfc.zeromq.org, 23 and 37).
//!
//! ```text
//! greeting   FF 8 bytes 7F | 3 minor | mechanism, 20 bytes | as-server | 31 zeros      64 bytes
//! frame      flags | size: 1 byte, or 8 big-endian when LONG | body
//! flags      1 MORE   2 LONG   4 COMMAND
//! command    frame whose body is: name length, name, data
//! ```
//!
//! Decoders look at what has arrived and copy nothing. The bytes of a message are the same in both
//! versions and in both directions, so that a message can be passed on as it came.

mod event;

pub use event::{
    EVENT_PARTS, EVENT_PREFIX_BYTES, Event, EventFault, Walk, check_frame, decode_event,
    write_event_front,
};

use crate::{Bad, Decoded};

/// Bytes that a greeting of any version begins with.
pub const SIGNATURE_BYTES: usize = 10;
/// Bytes of a greeting.
pub const GREETING_BYTES: usize = 64;
/// Most bytes before a frame's body: flags and a long size.
pub const HEAD_BYTES_MAX: usize = 9;
/// Most bytes of a command's body that we take; READY of libzmq has less than 600.
pub const COMMAND_BYTES_MAX: usize = 4096;
/// Most bytes of a subscription's prefix.
pub const PREFIX_BYTES_MAX: usize = 1024;
/// Most bytes of the context of a PING (ZMTP 3.1).
pub const CONTEXT_BYTES_MAX: usize = 16;

const MORE: u8 = 1;
const LONG: u8 = 2;
const COMMAND: u8 = 4;

/// Why bytes are not ZMTP, or not as much of it as we speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The first bytes are no signature.
    #[error("no ZMTP greeting")]
    Signature,
    /// An older protocol.
    #[error("ZMTP {major} is too old; 3.0 or later is needed")]
    Version {
        /// The peer's major version.
        major: u8,
    },
    /// A security mechanism that is neither NULL nor CURVE.
    #[error("a security mechanism that is neither NULL nor CURVE")]
    Mechanism,
    /// Reserved flags, or a combination that there is not.
    #[error("frame flags {flags:#04x} are none")]
    Flags {
        /// The byte.
        flags: u8,
    },
    /// A frame or a message is larger than allowed.
    #[error("{bytes} bytes are more than the {max} that are allowed")]
    TooLong {
        /// What was declared.
        bytes: u64,
        /// The limit.
        max: u64,
    },
    /// A command whose inner lengths do not fit.
    #[error("a command that is cut off")]
    Command,
    /// A message where a command was needed, or the other way round.
    #[error("a frame that does not belong here")]
    Unexpected,
}

/// How a connection is protected. Both sides have to say the same.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Mechanism {
    /// Not at all.
    #[default]
    Null,
    /// Encrypted, and each side knows the other by its key.
    Curve,
}

impl Mechanism {
    const ALL: [Mechanism; 2] = [Mechanism::Null, Mechanism::Curve];

    /// Its name in a greeting.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Mechanism::Null => "NULL",
            Mechanism::Curve => "CURVE",
        }
    }
}

/// What a peer says first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Greeting {
    /// Its minor version of ZMTP 3.
    pub minor: u8,
    /// What its security mechanism is.
    pub mechanism: Mechanism,
    /// It calls itself the server of the security handshake; without meaning for NULL, and libzmq
    /// says so of no side of CURVE.
    pub as_server: bool,
}

/// Our greeting: version 3.1, mechanism NULL.
#[must_use]
pub const fn greeting() -> [u8; GREETING_BYTES] {
    greeting_with(Mechanism::Null, false)
}

/// Our greeting with a mechanism: version 3.1.
#[must_use]
pub const fn greeting_with(mechanism: Mechanism, as_server: bool) -> [u8; GREETING_BYTES] {
    let mut out = [0; GREETING_BYTES];
    out[0] = 0xff;
    out[8] = 1;
    out[9] = 0x7f;
    out[10] = 3;
    out[11] = 1;
    let name = mechanism.name().as_bytes();
    let mut at = 0;
    while at < name.len() {
        out[12 + at] = name[at];
        at += 1;
    }
    out[32] = as_server as u8;
    out
}

/// Reads a greeting. What cannot become one is told from its first bytes on.
pub fn decode_greeting(input: &[u8]) -> Decoded<Greeting> {
    let bad = |fault: Fault| Decoded::Bad(Bad::Zmtp(fault));
    match (input.first(), input.get(9), input.get(10)) {
        (None, ..) => return Decoded::Need(1),
        (Some(first), ..) if *first != 0xff => return bad(Fault::Signature),
        (_, None, _) => return Decoded::Need(10),
        (_, Some(last), _) if last & 1 == 0 => return bad(Fault::Signature),
        (.., None) => return Decoded::Need(11),
        (.., Some(major)) if *major < 3 => return bad(Fault::Version { major: *major }),
        _ => {}
    }
    let Some(greeting) = input.first_chunk::<GREETING_BYTES>() else {
        return Decoded::Need(GREETING_BYTES);
    };
    let mechanism = greeting[12..32].trim_ascii_end();
    let end = mechanism.iter().position(|byte| *byte == 0);
    let name = &mechanism[..end.unwrap_or(mechanism.len())];
    let is_it = |mechanism: &Mechanism| mechanism.name().as_bytes() == name;
    let Some(mechanism) = Mechanism::ALL.into_iter().find(is_it) else {
        return bad(Fault::Mechanism);
    };
    Decoded::Frame(Greeting {
        mechanism,
        // A later major version speaks ours as well, by the protocol's own rule.
        minor: if greeting[10] > 3 { 1 } else { greeting[11] },
        as_server: greeting[32] == 1,
    })
}

/// The beginning of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// A command; otherwise a part of a message.
    pub command: bool,
    /// More parts of the same message follow.
    pub more: bool,
    /// Bytes of flags and size.
    pub head_bytes: usize,
    /// Bytes of the body, which follows.
    pub body_bytes: usize,
}

impl Head {
    /// Bytes of the frame.
    #[must_use]
    pub fn frame_bytes(&self) -> usize {
        self.head_bytes + self.body_bytes
    }

    /// It as it is written, short if it can be, and how many bytes of that count.
    #[must_use]
    pub fn written(&self) -> ([u8; HEAD_BYTES_MAX], usize) {
        let command = if self.command { COMMAND } else { 0 };
        head(self.body_bytes, command | u8::from(self.more))
    }
}

fn head(body_bytes: usize, flags: u8) -> ([u8; HEAD_BYTES_MAX], usize) {
    let mut out = [0; HEAD_BYTES_MAX];
    if let Ok(bytes) = u8::try_from(body_bytes) {
        (out[0], out[1]) = (flags, bytes);
        return (out, 2);
    }
    out[0] = flags | LONG;
    out[1..].copy_from_slice(&(body_bytes as u64).to_be_bytes());
    (out, HEAD_BYTES_MAX)
}

/// Reads the beginning of a frame whose body may have `max_bytes`. The body need not be there.
#[inline]
pub fn decode_head(input: &[u8], max_bytes: usize) -> Decoded<Head> {
    let Some(&flags) = input.first() else {
        // Flags alone may be wrong already.
        return Decoded::Need(1);
    };
    if flags & !(MORE | LONG | COMMAND) != 0 || flags & (MORE | COMMAND) == (MORE | COMMAND) {
        return Decoded::Bad(Bad::Zmtp(Fault::Flags { flags }));
    }
    let (head_bytes, bytes) = if flags & LONG == 0 {
        let Some(&bytes) = input.get(1) else {
            return Decoded::Need(2);
        };
        (2, u64::from(bytes))
    } else {
        let Some(bytes) = input.get(1..HEAD_BYTES_MAX).and_then(<[u8]>::first_chunk) else {
            return Decoded::Need(HEAD_BYTES_MAX);
        };
        (HEAD_BYTES_MAX, u64::from_be_bytes(*bytes))
    };
    if bytes > max_bytes as u64 {
        let max = max_bytes as u64;
        return Decoded::Bad(Bad::Zmtp(Fault::TooLong { bytes, max }));
    }
    Decoded::Frame(Head {
        command: flags & COMMAND != 0,
        more: flags & MORE != 0,
        head_bytes,
        body_bytes: bytes as usize,
    })
}

/// Writes the beginning of a message's part: short if it can be.
pub fn write_head(body_bytes: usize, more: bool, out: &mut Vec<u8>) {
    write_flags(body_bytes, u8::from(more), out);
}

fn write_flags(body_bytes: usize, flags: u8, out: &mut Vec<u8>) {
    let (head, bytes) = head(body_bytes, flags);
    out.extend_from_slice(&head[..bytes]);
}

/// What a command says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command<'a> {
    /// The end of a handshake, with properties; see [`property`].
    Ready(&'a [u8]),
    /// The peer gives up, with its reason.
    Error(&'a [u8]),
    /// Messages that begin with this are wanted (3.1).
    Subscribe(&'a [u8]),
    /// One such wish less (3.1).
    Cancel(&'a [u8]),
    /// To be answered with PONG and the same context (3.1).
    Ping {
        /// Tenths of a second until the peer may be given up; 0: never.
        ttl: u16,
        /// At most [`CONTEXT_BYTES_MAX`].
        context: &'a [u8],
    },
    /// The answer to PING.
    Pong(&'a [u8]),
    /// One that we do not know; to be ignored.
    Other(&'a [u8]),
}

/// Reads the body of a command frame.
///
/// # Errors
/// Its inner lengths do not fit.
pub fn decode_command(body: &[u8]) -> Result<Command<'_>, Fault> {
    let (&length, rest) = body.split_first().ok_or(Fault::Command)?;
    let (name, data) = rest
        .split_at_checked(usize::from(length))
        .ok_or(Fault::Command)?;
    Ok(match name {
        b"READY" => Command::Ready(data),
        b"ERROR" => {
            let (&length, reason) = data.split_first().ok_or(Fault::Command)?;
            Command::Error(reason.get(..usize::from(length)).ok_or(Fault::Command)?)
        }
        b"SUBSCRIBE" => Command::Subscribe(data),
        b"CANCEL" => Command::Cancel(data),
        b"PING" => {
            let (ttl, context) = data.split_first_chunk().ok_or(Fault::Command)?;
            if context.len() > CONTEXT_BYTES_MAX {
                return Err(Fault::Command);
            }
            let ttl = u16::from_be_bytes(*ttl);
            Command::Ping { ttl, context }
        }
        b"PONG" => Command::Pong(data),
        name => Command::Other(name),
    })
}

/// The value of a property of READY; names are compared without regard to case.
///
/// # Errors
/// Lengths inside do not fit.
pub fn property<'a>(mut properties: &'a [u8], wanted: &str) -> Result<Option<&'a [u8]>, Fault> {
    let mut found = None;
    while let Some((&length, rest)) = properties.split_first() {
        let (name, rest) = rest
            .split_at_checked(usize::from(length))
            .ok_or(Fault::Command)?;
        let (length, rest) = rest.split_first_chunk::<4>().ok_or(Fault::Command)?;
        let length = u32::from_be_bytes(*length) as usize;
        let (value, rest) = rest.split_at_checked(length).ok_or(Fault::Command)?;
        if found.is_none() && name.eq_ignore_ascii_case(wanted.as_bytes()) {
            found = Some(value);
        }
        properties = rest;
    }
    Ok(found)
}

/// Writes a command frame.
pub fn write_command(name: &str, data: &[u8], out: &mut Vec<u8>) {
    debug_assert!(name.len() < 256);
    write_flags(1 + name.len() + data.len(), COMMAND, out);
    out.push(name.len() as u8);
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(data);
}

/// The properties of a socket of this type, `XPUB` for example.
#[must_use]
pub fn properties(socket_type: &str) -> Vec<u8> {
    let mut data = vec![11];
    data.extend_from_slice(b"Socket-Type");
    data.extend_from_slice(&(socket_type.len() as u32).to_be_bytes());
    data.extend_from_slice(socket_type.as_bytes());
    data
}

/// Writes READY for a socket of this type.
pub fn write_ready(socket_type: &str, out: &mut Vec<u8>) {
    write_command("READY", &properties(socket_type), out);
}

/// Writes ERROR: why a peer is not served, in 255 bytes at most; what is longer is cut.
pub fn write_error(reason: &str, out: &mut Vec<u8>) {
    let reason = &reason.as_bytes()[..reason.len().min(255)];
    let data = [&[reason.len() as u8], reason].concat();
    write_command("ERROR", &data, out);
}

/// Writes a wish, or its end: a command for 3.1, a message of one part for 3.0.
pub fn write_subscription(minor: u8, subscribe: bool, prefix: &[u8], out: &mut Vec<u8>) {
    match (minor, subscribe) {
        (0, _) => {
            write_head(1 + prefix.len(), false, out);
            out.push(u8::from(subscribe));
            out.extend_from_slice(prefix);
        }
        (_, true) => write_command("SUBSCRIBE", prefix, out),
        (_, false) => write_command("CANCEL", prefix, out),
    }
}

/// Reads a message of one part that a subscriber sends: a wish or its end. `None`: anything else,
/// which XPUB sockets leave to their user.
#[must_use]
pub fn decode_subscription(body: &[u8]) -> Option<(bool, &[u8])> {
    match body.split_first() {
        Some((1, prefix)) => Some((true, prefix)),
        Some((0, prefix)) => Some((false, prefix)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greetings_are_told_early_and_whole() {
        let ours = greeting();
        let frame = Greeting {
            minor: 1,
            mechanism: Mechanism::Null,
            as_server: false,
        };
        let curve = greeting_with(Mechanism::Curve, true);
        let said = decode_greeting(&curve).frame().unwrap();
        assert_eq!((said.mechanism, said.as_server), (Mechanism::Curve, true));
        assert_eq!(decode_greeting(&ours), Decoded::Frame(frame));
        assert_eq!(decode_greeting(&ours[..63]), Decoded::Need(64));
        assert_eq!(decode_greeting(&[]), Decoded::Need(1));
        assert_eq!(decode_greeting(&ours[..1]), Decoded::Need(10));
        assert_eq!(decode_greeting(&ours[..10]), Decoded::Need(11));
        let with = |at: usize, byte: u8| {
            let mut changed = ours;
            changed[at] = byte;
            decode_greeting(&changed)
        };
        let bad = |fault| Decoded::Bad(Bad::Zmtp(fault));
        assert_eq!(with(0, b'G'), bad(Fault::Signature));
        assert_eq!(with(9, 0), bad(Fault::Signature));
        assert_eq!(with(10, 2), bad(Fault::Version { major: 2 }));
        assert_eq!(with(12, b'X'), bad(Fault::Mechanism));
        assert_eq!(with(16, b'S'), bad(Fault::Mechanism));
        assert_eq!(with(11, 0).frame().unwrap().minor, 0);
        assert_eq!(with(10, 4).frame().unwrap().minor, 1);
        assert!(matches!(decode_greeting(b"GET /"), Decoded::Bad(_)));
    }

    #[test]
    fn heads_are_short_or_long() {
        for (bytes, more, wire) in [
            (3usize, false, &b"\x00\x03"[..]),
            (255, true, b"\x01\xff"),
            (256, true, b"\x03\x00\x00\x00\x00\x00\x00\x01\x00"),
        ] {
            let mut out = Vec::new();
            write_head(bytes, more, &mut out);
            assert_eq!(out, wire);
            let head = decode_head(wire, 1024).frame().unwrap();
            assert_eq!(
                (head.body_bytes, head.more, head.command),
                (bytes, more, false)
            );
            assert_eq!(head.head_bytes, wire.len());
            assert!(matches!(
                decode_head(&wire[..wire.len() - 1], 1024),
                Decoded::Need(_)
            ));
        }
        for flags in [8u8, 5, 0x80, 0xff] {
            let bad = Decoded::Bad(Bad::Zmtp(Fault::Flags { flags }));
            assert_eq!(decode_head(&[flags], 1024), bad);
        }
        let liar = [2, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
        assert!(matches!(decode_head(&liar, 1024), Decoded::Bad(_)));
    }

    #[test]
    fn commands_are_written_and_read_alike() {
        let mut ready = Vec::new();
        write_ready("XPUB", &mut ready);
        let head = decode_head(&ready, 1024).frame().unwrap();
        assert!(head.command && head.frame_bytes() == ready.len());
        let Ok(Command::Ready(properties)) = decode_command(&ready[head.head_bytes..]) else {
            panic!("no READY");
        };
        assert_eq!(property(properties, "socket-TYPE"), Ok(Some(&b"XPUB"[..])));
        assert_eq!(property(properties, "Identity"), Ok(None));
        assert_eq!(property(&properties[..19], "Identity"), Err(Fault::Command));

        for (minor, subscribe, wire) in [
            (0, true, &b"\x00\x03\x01ab"[..]),
            (0, false, b"\x00\x03\x00ab"),
            (1, true, b"\x04\x0c\x09SUBSCRIBEab"),
            (1, false, b"\x04\x09\x06CANCELab"),
        ] {
            let mut out = Vec::new();
            write_subscription(minor, subscribe, b"ab", &mut out);
            assert_eq!(out, wire);
        }
        assert_eq!(decode_subscription(b"\x01ab"), Some((true, &b"ab"[..])));
        assert_eq!(decode_subscription(b"\x00"), Some((false, &b""[..])));
        assert_eq!(decode_subscription(b"ab"), None);
        let ping = decode_command(b"\x04PING\x00\x0ahi");
        assert_eq!(
            ping,
            Ok(Command::Ping {
                ttl: 10,
                context: b"hi"
            })
        );
        assert_eq!(
            decode_command(b"\x05ERROR\x02no"),
            Ok(Command::Error(b"no"))
        );
        assert_eq!(decode_command(b"\x03NEW.."), Ok(Command::Other(b"NEW")));
        let mut refusal = Vec::new();
        write_error("400", &mut refusal);
        assert_eq!(refusal, b"\x04\x0a\x05ERROR\x03400");
        for cut in [&b""[..], b"\x09PING", b"\x05ERROR\x03no", b"\x04PING\x00"] {
            assert_eq!(decode_command(cut), Err(Fault::Command));
        }
    }
}
