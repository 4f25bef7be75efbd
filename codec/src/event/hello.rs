//! Plain TCP events: what a peer says first and what it is answered. After that the stream is
//! [frames](super::frame) and nothing else.
//!
//! ```text
//! hello    0  4  C1 'E' 'V' 'T'          answer   0  4  C1 'E' 'V' 'T'
//!          4  1  version                          4  1  version
//!          5  1  role                             5  1  verdict
//!          6  2  prefixes                         6  2  bytes of the text
//!          8  4  payload_bytes_max                8  4  payload_bytes_max
//!         12  4  bytes of the list               12  4  queue_events_max
//!         16     list                            16     text
//! list    [bytes u16 | prefix] as often as `prefixes` says
//! ```
//!
//! Integers are big-endian; version 1. A publisher (role 1) names one prefix: its scope, to which a
//! dot and each envelope's topic are joined for the subject, or nothing, and then the topic is the
//! subject. A subscriber (role 2) names the beginnings of the subjects that it wants, at least one;
//! the empty one is all. `payload_bytes_max` is the largest payload of a frame that a publisher
//! will send (0: it does not know), that a subscriber takes (0: any), or that the other side
//! allows. C1 begins no other protocol that may come this way by mistake: it is no MessagePack, no
//! UTF-8 and no ZMTP.

use zerocopy::big_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::{Bad, Decoded, EncodeError};

/// The first bytes of hello and answer.
pub const MAGIC: [u8; 4] = *b"\xc1EVT";
/// The one version that there is.
pub const VERSION: u8 = 1;
/// Bytes of a hello before its list, and of an answer before its text.
pub const FIXED_BYTES: usize = 16;
/// Most bytes of the list of prefixes.
pub const LIST_BYTES_MAX: usize = 64 << 10;
/// Most bytes of one prefix.
pub const PREFIX_BYTES_MAX: usize = 1024;

/// Where the role stands, or the verdict; magic, version and this say what follows.
const ROLE_AT: usize = 5;
const DECISIVE_BYTES: usize = ROLE_AT + 1;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct HelloFixed {
    magic: [u8; 4],
    version: u8,
    role: u8,
    prefixes: U16,
    payload_bytes_max: U32,
    list_bytes: U32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct AnswerFixed {
    magic: [u8; 4],
    version: u8,
    verdict: u8,
    text_bytes: U16,
    payload_bytes_max: U32,
    queue_events_max: U32,
}

const _: () = assert!(size_of::<HelloFixed>() == FIXED_BYTES);
const _: () = assert!(size_of::<AnswerFixed>() == FIXED_BYTES);

/// What a peer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Role {
    /// It sends frames.
    Publisher = 1,
    /// It takes frames.
    Subscriber = 2,
}

/// Why bytes are no hello, or no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HelloFault {
    /// Other first bytes.
    #[error("no hello of plain events: the first bytes are not C1 45 56 54")]
    Magic,
    /// Another version.
    #[error("a hello of version {version}; 1 is understood")]
    Version {
        /// The byte.
        version: u8,
    },
    /// Another role.
    #[error("{role} is no role; 1 publishes, 2 subscribes")]
    Role {
        /// The byte.
        role: u8,
    },
    /// Another verdict.
    #[error("{verdict} is no verdict of this version")]
    Verdict {
        /// The byte.
        verdict: u8,
    },
    /// The text of an answer is not UTF-8.
    #[error("an answer whose text is not UTF-8")]
    Text,
    /// The list is longer than allowed.
    #[error("{bytes} bytes of prefixes; 65536 are allowed")]
    ListTooLong {
        /// What was declared.
        bytes: u32,
    },
    /// The lengths inside the list do not add up, or one is too large.
    #[error("the lengths of the prefixes do not fit their list, or one is larger than 1024")]
    List,
    /// A publisher with several prefixes or none, or a subscriber with none.
    #[error("{prefixes} prefixes; a publisher names one, a subscriber at least one")]
    Count {
        /// How many.
        prefixes: u16,
    },
}

/// What a peer says first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello<'a> {
    /// What it is.
    pub role: Role,
    /// Largest payload that it will send or that it takes; 0: it does not say.
    pub payload_bytes_max: u32,
    list: &'a [u8],
}

impl<'a> Hello<'a> {
    /// Its prefixes, in order.
    pub fn prefixes(&self) -> impl Iterator<Item = &'a [u8]> {
        let mut rest = self.list;
        std::iter::from_fn(move || {
            let (prefix, behind) = split(rest)?;
            rest = behind;
            Some(prefix)
        })
    }

    /// Bytes of the whole hello.
    #[must_use]
    pub fn bytes(&self) -> usize {
        FIXED_BYTES + self.list.len()
    }
}

/// The first prefix of a list, and what follows it.
fn split(list: &[u8]) -> Option<(&[u8], &[u8])> {
    let (bytes, rest) = list.split_first_chunk()?;
    rest.split_at_checked(usize::from(u16::from_be_bytes(*bytes)))
}

fn bad<T>(fault: HelloFault) -> Decoded<T> {
    Decoded::Bad(Bad::Hello(fault))
}

/// Looks at what hello and answer begin with.
fn beginning(input: &[u8]) -> Decoded<()> {
    let Some((begin, _)) = input.split_first_chunk::<DECISIVE_BYTES>() else {
        return Decoded::Need(DECISIVE_BYTES);
    };
    let version = begin[MAGIC.len()];
    match begin.starts_with(&MAGIC) {
        false => bad(HelloFault::Magic),
        true if version != VERSION => bad(HelloFault::Version { version }),
        true => Decoded::Frame(()),
    }
}

/// Reads a hello. What cannot become one is told from its first six bytes on, and nothing is set
/// aside for what is merely declared.
pub fn decode_hello(input: &[u8]) -> Decoded<Hello<'_>> {
    match beginning(input) {
        Decoded::Frame(()) => {}
        Decoded::Need(bytes) => return Decoded::Need(bytes),
        Decoded::Bad(fault) => return Decoded::Bad(fault),
    }
    let role = match input[ROLE_AT] {
        1 => Role::Publisher,
        2 => Role::Subscriber,
        role => return bad(HelloFault::Role { role }),
    };
    let Ok((fixed, rest)) = HelloFixed::ref_from_prefix(input) else {
        return Decoded::Need(FIXED_BYTES);
    };
    let prefixes = fixed.prefixes.get();
    if prefixes == 0 || (role == Role::Publisher && prefixes != 1) {
        return bad(HelloFault::Count { prefixes });
    }
    let bytes = fixed.list_bytes.get();
    if bytes as usize > LIST_BYTES_MAX {
        return bad(HelloFault::ListTooLong { bytes });
    }
    let Some(list) = rest.get(..bytes as usize) else {
        return Decoded::Need(FIXED_BYTES + bytes as usize);
    };
    let mut behind = list;
    for _ in 0..prefixes {
        match split(behind) {
            Some((prefix, rest)) if prefix.len() <= PREFIX_BYTES_MAX => behind = rest,
            _ => return bad(HelloFault::List),
        }
    }
    if !behind.is_empty() {
        return bad(HelloFault::List);
    }
    Decoded::Frame(Hello {
        role,
        payload_bytes_max: fixed.payload_bytes_max.get(),
        list,
    })
}

/// Appends a hello.
///
/// # Errors
/// The prefixes do not fit their list; nothing has been written then.
pub fn write_hello(
    role: Role,
    payload_bytes_max: u32,
    prefixes: &[&[u8]],
    out: &mut Vec<u8>,
) -> Result<(), EncodeError> {
    let list_bytes: usize = prefixes.iter().map(|prefix| 2 + prefix.len()).sum();
    let longest = prefixes.iter().map(|prefix| prefix.len()).max();
    if list_bytes > LIST_BYTES_MAX || longest > Some(PREFIX_BYTES_MAX) {
        return Err(EncodeError::PayloadTooLong { bytes: list_bytes });
    }
    let fixed = HelloFixed {
        magic: MAGIC,
        version: VERSION,
        role: role as u8,
        // Each has two bytes in a list of 65,536.
        prefixes: U16::new(prefixes.len() as u16),
        payload_bytes_max: U32::new(payload_bytes_max),
        list_bytes: U32::new(list_bytes as u32),
    };
    out.extend_from_slice(fixed.as_bytes());
    for prefix in prefixes {
        out.extend_from_slice(&(prefix.len() as u16).to_be_bytes());
        out.extend_from_slice(prefix);
    }
    Ok(())
}

/// What a peer is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Verdict {
    /// Frames pass from now on; a subscriber's prefixes are in force.
    Accepted = 0,
    /// The hello is none, or none of this version.
    NotUnderstood = 1,
    /// The publisher would send larger frames than are taken.
    TooLarge = 2,
    /// There is no room for so many prefixes.
    TooManyPrefixes = 3,
}

/// The answer to a hello. After any other verdict than [`Verdict::Accepted`] the connection ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer<'a> {
    /// How it was judged.
    pub verdict: Verdict,
    /// Largest payload of a frame that is taken, and that may come.
    pub payload_bytes_max: u32,
    /// Events that wait for one subscriber before some are dropped.
    pub queue_events_max: u32,
    /// What is wrong, for people; empty when accepted.
    pub text: &'a str,
}

impl Answer<'_> {
    /// Bytes of the whole answer.
    #[must_use]
    pub fn bytes(&self) -> usize {
        FIXED_BYTES + self.text.len()
    }

    /// Appends it; a text of more than 65,535 bytes is left out.
    pub fn write(&self, out: &mut Vec<u8>) {
        let text_bytes = u16::try_from(self.text.len()).unwrap_or_default();
        let fixed = AnswerFixed {
            magic: MAGIC,
            version: VERSION,
            verdict: self.verdict as u8,
            text_bytes: U16::new(text_bytes),
            payload_bytes_max: U32::new(self.payload_bytes_max),
            queue_events_max: U32::new(self.queue_events_max),
        };
        out.extend_from_slice(fixed.as_bytes());
        out.extend_from_slice(&self.text.as_bytes()[..usize::from(text_bytes)]);
    }
}

/// Reads an answer.
pub fn decode_answer(input: &[u8]) -> Decoded<Answer<'_>> {
    match beginning(input) {
        Decoded::Frame(()) => {}
        Decoded::Need(bytes) => return Decoded::Need(bytes),
        Decoded::Bad(fault) => return Decoded::Bad(fault),
    }
    let verdict = match input[ROLE_AT] {
        0 => Verdict::Accepted,
        1 => Verdict::NotUnderstood,
        2 => Verdict::TooLarge,
        3 => Verdict::TooManyPrefixes,
        verdict => return bad(HelloFault::Verdict { verdict }),
    };
    let Ok((fixed, rest)) = AnswerFixed::ref_from_prefix(input) else {
        return Decoded::Need(FIXED_BYTES);
    };
    let text_bytes = usize::from(fixed.text_bytes.get());
    let Some(text) = rest.get(..text_bytes) else {
        return Decoded::Need(FIXED_BYTES + text_bytes);
    };
    Decoded::Frame(Answer {
        verdict,
        payload_bytes_max: fixed.payload_bytes_max.get(),
        queue_events_max: fixed.queue_events_max.get(),
        text: match std::str::from_utf8(text) {
            Ok(text) => text,
            Err(_) => return bad(HelloFault::Text),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(role: Role, prefixes: &[&[u8]]) -> Vec<u8> {
        let mut out = vec![];
        write_hello(role, 0x0102_0304, prefixes, &mut out).unwrap();
        out
    }

    fn fault(bytes: &[u8]) -> HelloFault {
        match decode_hello(bytes) {
            Decoded::Bad(Bad::Hello(fault)) => fault,
            other => panic!("{other:?}"),
        }
    }

    /// The layout, byte by byte.
    #[test]
    fn a_hello_is_read_as_it_was_written() {
        let bytes = hello(Role::Subscriber, &[b"ab", b""]);
        let want = b"\xc1EVT\x01\x02\0\x02\x01\x02\x03\x04\0\0\0\x06\0\x02ab\0\0";
        assert_eq!(bytes, want);
        let read = decode_hello(&bytes).frame().unwrap();
        assert_eq!(
            (read.role, read.payload_bytes_max),
            (Role::Subscriber, 0x0102_0304)
        );
        let prefixes: Vec<&[u8]> = read.prefixes().collect();
        assert_eq!((prefixes, read.bytes()), (vec![&b"ab"[..], b""], 22));
        for have in 0..22 {
            let need = match have {
                ..6 => 6,
                6..16 => 16,
                _ => 22,
            };
            assert_eq!(decode_hello(&bytes[..have]), Decoded::Need(need), "{have}");
        }
    }

    #[test]
    fn what_is_no_hello_is_told_early() {
        assert_eq!(fault(b"GET / "), HelloFault::Magic);
        assert_eq!(fault(b"\xff\0\0\0\0\0"), HelloFault::Magic);
        assert_eq!(
            fault(b"\xc1EVT\x02\x01"),
            HelloFault::Version { version: 2 }
        );
        let whole = hello(Role::Publisher, &[b"ab"]);
        let with = |at: usize, byte: u8| {
            let mut bytes = whole.clone();
            bytes[at] = byte;
            fault(&bytes)
        };
        assert_eq!(with(5, 3), HelloFault::Role { role: 3 });
        assert_eq!(with(7, 2), HelloFault::Count { prefixes: 2 });
        assert_eq!(with(7, 0), HelloFault::Count { prefixes: 0 });
        assert_eq!(with(12, 1), HelloFault::ListTooLong { bytes: 0x0100_0004 });
        assert_eq!(with(17, 3), HelloFault::List);
        assert_eq!(with(17, 1), HelloFault::List);
        let long = [0; PREFIX_BYTES_MAX + 1];
        assert!(write_hello(Role::Publisher, 0, &[&long], &mut vec![]).is_err());
        let long = [&long[1..]; 64];
        assert!(write_hello(Role::Subscriber, 0, &long, &mut vec![]).is_err());
    }

    #[test]
    fn an_answer_is_read_as_it_was_written() {
        let answer = Answer {
            verdict: Verdict::TooLarge,
            payload_bytes_max: 5,
            queue_events_max: 6,
            text: "less",
        };
        let mut bytes = vec![];
        answer.write(&mut bytes);
        let want = b"\xc1EVT\x01\x02\0\x04\0\0\0\x05\0\0\0\x06less";
        assert_eq!(bytes, want);
        assert_eq!(decode_answer(&bytes), Decoded::Frame(answer));
        assert_eq!(decode_answer(&bytes[..18]), Decoded::Need(20));
        bytes[5] = 9;
        assert!(matches!(decode_answer(&bytes), Decoded::Bad(Bad::Hello(_))));
    }
}
