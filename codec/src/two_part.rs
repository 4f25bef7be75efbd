//! The two-part message: the envelope of a request and every unit of a response stream
//! (spec/request-plane.md §3.1).
//!
//! ```text
//! 0       8       16          24         24+A
//! | A u64 | B u64 | checksum u64 | header A | body B |      all integers big-endian
//! ```

use std::ops::Range;

use xxhash_rust::xxh3::Xxh3Default;
use zerocopy::big_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::limits::TWO_PART_PREFIX_BYTES;
use crate::{Bad, Decoded, TooLarge};

/// The fixed part of a two-part message.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Prefix {
    /// A: bytes of the header.
    pub header_bytes: U64,
    /// B: bytes of the body.
    pub body_bytes: U64,
    /// XXH3-64 of header then body, or 0 for none. Release builds of Dynamo write 0 and never
    /// look; so do we unless asked.
    pub checksum: U64,
}

/// Which of the two parts hold bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// Header only: control, handshake, prologue.
    Header,
    /// Body only: a response item.
    Data,
    /// Header and body: a unary request.
    Both,
    /// Neither; readers of response streams ignore it.
    Empty,
}

/// Where the parts of one message lie in the decoded input, which may not hold them yet if this
/// came from [`decode_prefix`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// The header.
    pub header: Range<usize>,
    /// The body; ends where the message ends.
    pub body: Range<usize>,
    /// The checksum field; 0 means none.
    pub checksum: u64,
}

impl Message {
    /// Bytes of the whole message, prefix included.
    #[must_use]
    pub fn frame_bytes(&self) -> usize {
        self.body.end
    }

    /// Which parts hold bytes.
    #[must_use]
    pub fn shape(&self) -> Shape {
        match (self.header.is_empty(), self.body.is_empty()) {
            (false, true) => Shape::Header,
            (true, false) => Shape::Data,
            (false, false) => Shape::Both,
            (true, true) => Shape::Empty,
        }
    }

    /// Compares a non-zero checksum with the content, as debug builds of Dynamo do. `input` is
    /// what this message was decoded from.
    ///
    /// # Errors
    /// The checksum does not fit, or the message lies outside `input`.
    pub fn verify(&self, input: &[u8]) -> Result<(), Bad> {
        if self.checksum == 0 {
            return Ok(());
        }
        // Header and body are adjacent, so one run covers both.
        let content = input.get(self.header.start..self.body.end).unwrap_or(&[]);
        let computed = checksum(content, &[]);
        if computed == self.checksum {
            return Ok(());
        }
        Err(Bad::Checksum {
            declared: self.checksum,
            computed,
        })
    }
}

/// XXH3-64 with seed 0 over header then body.
#[must_use]
pub fn checksum(header: &[u8], body: &[u8]) -> u64 {
    if body.is_empty() {
        return xxhash_rust::xxh3::xxh3_64(header);
    }
    let mut state = Xxh3Default::new();
    state.update(header);
    state.update(body);
    state.digest()
}

/// Reads the 24 fixed bytes. `max_bytes` limits the whole message; Dynamo passes no limit, so a
/// peer may declare any size: a reader that buffers must give one.
pub fn decode_prefix(input: &[u8], max_bytes: Option<u64>) -> Decoded<Message> {
    let Ok((prefix, _)) = Prefix::read_from_prefix(input) else {
        return Decoded::Need(TWO_PART_PREFIX_BYTES);
    };
    let (header_bytes, body_bytes) = (prefix.header_bytes.get(), prefix.body_bytes.get());
    let start = TWO_PART_PREFIX_BYTES as u64;
    let Some(body_start) = start.checked_add(header_bytes) else {
        return overflow(header_bytes, body_bytes);
    };
    let Some(end) = body_start.checked_add(body_bytes) else {
        return overflow(header_bytes, body_bytes);
    };
    if let Some(max_bytes) = max_bytes.filter(|max_bytes| end > *max_bytes) {
        return Decoded::Bad(Bad::TooLarge(TooLarge {
            frame_bytes: end,
            max_bytes,
        }));
    }
    let (Ok(body_start), Ok(end)) = (usize::try_from(body_start), usize::try_from(end)) else {
        return overflow(header_bytes, body_bytes);
    };
    Decoded::Frame(Message {
        header: TWO_PART_PREFIX_BYTES..body_start,
        body: body_start..end,
        checksum: prefix.checksum.get(),
    })
}

fn overflow<T>(header_bytes: u64, body_bytes: u64) -> Decoded<T> {
    Decoded::Bad(Bad::LengthOverflow {
        header_bytes,
        body_bytes,
    })
}

/// Reads one whole message; the ranges answered lie inside `input`. See [`decode_prefix`] for the
/// limit. The checksum is not looked at: call [`Message::verify`] for that.
pub fn decode(input: &[u8], max_bytes: Option<u64>) -> Decoded<Message> {
    match decode_prefix(input, max_bytes) {
        Decoded::Frame(message) if input.len() < message.frame_bytes() => {
            Decoded::Need(message.frame_bytes())
        }
        answer => answer,
    }
}

/// The 24 fixed bytes of a message with such lengths and no checksum.
#[must_use]
pub const fn prefix(header_bytes: usize, body_bytes: usize) -> [u8; TWO_PART_PREFIX_BYTES] {
    let header = (header_bytes as u64).to_be_bytes();
    let body = (body_bytes as u64).to_be_bytes();
    let mut out = [0; TWO_PART_PREFIX_BYTES];
    let mut at = 0;
    while at < 8 {
        out[at] = header[at];
        out[8 + at] = body[at];
        at += 1;
    }
    out
}

/// A whole message as a constant; `N` must be 24 plus both lengths.
pub(crate) const fn constant<const N: usize>(header: &[u8], body: &[u8]) -> [u8; N] {
    assert!(N == TWO_PART_PREFIX_BYTES + header.len() + body.len());
    let prefix = prefix(header.len(), body.len());
    let mut out = [0; N];
    let mut at = 0;
    while at < N {
        out[at] = if at < TWO_PART_PREFIX_BYTES {
            prefix[at]
        } else if at < TWO_PART_PREFIX_BYTES + header.len() {
            header[at - TWO_PART_PREFIX_BYTES]
        } else {
            body[at - TWO_PART_PREFIX_BYTES - header.len()]
        };
        at += 1;
    }
    out
}

/// Appends a whole message without a checksum.
pub fn write(header: &[u8], body: &[u8], out: &mut Vec<u8>) {
    out.reserve(TWO_PART_PREFIX_BYTES + header.len() + body.len());
    out.extend_from_slice(&prefix(header.len(), body.len()));
    out.extend_from_slice(header);
    out.extend_from_slice(body);
}

/// Appends a message whose header `write_header` produces in place, so that it need not be built
/// elsewhere first.
pub(crate) fn write_with_header(out: &mut Vec<u8>, write_header: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend_from_slice(&[0; TWO_PART_PREFIX_BYTES]);
    write_header(out);
    let header_bytes = out.len() - start - TWO_PART_PREFIX_BYTES;
    out[start..start + TWO_PART_PREFIX_BYTES].copy_from_slice(&prefix(header_bytes, 0));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_follow_the_lengths() {
        for (header, body, shape) in [
            ("h", "", Shape::Header),
            ("", "b", Shape::Data),
            ("h", "b", Shape::Both),
            ("", "", Shape::Empty),
        ] {
            let mut bytes = vec![];
            write(header.as_bytes(), body.as_bytes(), &mut bytes);
            let message = decode(&bytes, None).frame().unwrap();
            assert_eq!(message.shape(), shape);
            assert_eq!(&bytes[message.header.clone()], header.as_bytes());
            assert_eq!(&bytes[message.body.clone()], body.as_bytes());
        }
    }

    #[test]
    fn limits_and_overflow_are_seen_in_the_prefix() {
        let declared = |header: u64, body: u64| {
            let mut bytes = [0; 24];
            bytes[..8].copy_from_slice(&header.to_be_bytes());
            bytes[8..16].copy_from_slice(&body.to_be_bytes());
            bytes
        };
        for (header, body) in [(u64::MAX, 1), (1, u64::MAX), (u64::MAX - 23, 0)] {
            assert!(matches!(
                decode(&declared(header, body), None),
                Decoded::Bad(Bad::LengthOverflow { .. })
            ));
        }
        let huge = declared(1 << 40, 0);
        assert_eq!(decode(&huge, None), Decoded::Need((1 << 40) + 24));
        let limit = MESSAGE_LIMIT;
        assert_eq!(
            decode(&huge, Some(limit)),
            Decoded::Bad(Bad::TooLarge(TooLarge {
                frame_bytes: (1 << 40) + 24,
                max_bytes: limit
            }))
        );
        assert_eq!(decode(&declared(10, 10), Some(44)), Decoded::Need(44));
    }

    const MESSAGE_LIMIT: u64 = crate::limits::MESSAGE_BYTES_MAX_DEFAULT;

    #[test]
    fn a_checksum_is_verified_only_when_asked() {
        let mut bytes = vec![];
        write(b"header data", b"body data", &mut bytes);
        let sum = checksum(b"header data", b"body data");
        assert_eq!(sum, 0x4b83_b1be_407d_063f);
        bytes[16..24].copy_from_slice(&(sum ^ 1).to_be_bytes());
        let message = decode(&bytes, None).frame().unwrap();
        assert!(matches!(message.verify(&bytes), Err(Bad::Checksum { .. })));
        bytes[16..24].copy_from_slice(&sum.to_be_bytes());
        let message = decode(&bytes, None).frame().unwrap();
        assert_eq!(message.verify(&bytes), Ok(()));
    }
}
