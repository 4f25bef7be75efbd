//! The reply to a request frame, worker to frontend on the same connection
//! (spec/request-plane.md §2.5).
//!
//! ```text
//! 0       4
//! | L u32 | text L |      big-endian; L = 0 means accepted
//! ```

use std::ops::Range;

use zerocopy::big_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::limits::REPLY_PREFIX_BYTES;
use crate::{Bad, Decoded, TooLarge};

/// The reply that accepts a request.
pub const ACCEPTED: [u8; 4] = [0; 4];
/// A text that starts so is read as "overloaded" by the client.
pub const OVERLOADED_PREFIX: &str = "Server overloaded:";
/// A text that starts so is read as "unavailable" by the client.
pub const UNAVAILABLE_PREFIX: &str = "Server unavailable:";
/// Engine slots and queue are full.
pub const OVERLOADED: &str = "Server overloaded: worker at capacity";
/// No such handler; the path follows.
pub const UNKNOWN_ENDPOINT: &str = "Server unavailable: unknown endpoint ";
/// The server's pool is gone; it closes the connection after this.
pub const POOL_CLOSED: &str = "Server unavailable: worker pool channel closed";
/// The path is not UTF-8. Dynamo's client takes this text for success.
pub const INVALID_PATH: &str = "Invalid endpoint path";
/// The frame could not be read; the reason follows and the connection closes. Dynamo's client
/// takes this text for success.
pub const READ_ERROR: &str = "Read error: ";

/// The fixed part of a reply frame: L, the bytes of text that follow.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Prefix {
    /// Bytes of text after this field.
    pub text_bytes: U32,
}

/// What a reply means to the client that sent the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply<'a> {
    /// The request was started or queued; a call home follows.
    Accepted,
    /// The worker is at capacity; another one may take it.
    Overloaded(&'a str),
    /// The worker does not serve this path, or no longer.
    Unavailable(&'a str),
    /// Any other text. Dynamo's client takes it for success and then waits for a stream that
    /// never comes; we may know better.
    Other(&'a [u8]),
}

impl<'a> Reply<'a> {
    /// Classifies the text of a reply by its first words. A refusal whose tail is not UTF-8 is
    /// still a refusal and carries the text up to the bad byte.
    #[must_use]
    pub fn classify(text: &'a [u8]) -> Self {
        let readable = || text.utf8_chunks().next().map_or("", |chunk| chunk.valid());
        if text.is_empty() {
            Self::Accepted
        } else if text.starts_with(OVERLOADED_PREFIX.as_bytes()) {
            Self::Overloaded(readable())
        } else if text.starts_with(UNAVAILABLE_PREFIX.as_bytes()) {
            Self::Unavailable(readable())
        } else {
            Self::Other(text)
        }
    }

    /// True if the client must not wait for a call home.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Overloaded(_) | Self::Unavailable(_))
    }
}

/// Reads one reply and says where its text is. `max_bytes` limits length field plus text, as
/// Dynamo's client does with `DYN_TCP_MAX_MESSAGE_SIZE`.
pub fn decode(input: &[u8], max_bytes: u64) -> Decoded<Range<usize>> {
    let Ok((prefix, rest)) = Prefix::read_from_prefix(input) else {
        return Decoded::Need(REPLY_PREFIX_BYTES);
    };
    let text_bytes = prefix.text_bytes.get() as usize;
    let frame_bytes = REPLY_PREFIX_BYTES + text_bytes;
    if frame_bytes as u64 > max_bytes {
        return Decoded::Bad(Bad::TooLarge(TooLarge {
            frame_bytes: frame_bytes as u64,
            max_bytes,
        }));
    }
    if rest.len() < text_bytes {
        return Decoded::Need(frame_bytes);
    }
    Decoded::Frame(REPLY_PREFIX_BYTES..frame_bytes)
}

/// Appends a reply whose text is the pieces one after the other, so that no caller has to join
/// them first. Texts are ours and short; one over 4 GiB is cut.
pub fn write(pieces: &[&str], out: &mut Vec<u8>) {
    let start = out.len();
    out.extend_from_slice(&ACCEPTED);
    for piece in pieces {
        out.extend_from_slice(piece.as_bytes());
    }
    let text_bytes = out.len() - start - REPLY_PREFIX_BYTES;
    let declared = u32::try_from(text_bytes).unwrap_or(u32::MAX);
    out.truncate(start + REPLY_PREFIX_BYTES + declared as usize);
    out[start..start + REPLY_PREFIX_BYTES].copy_from_slice(U32::new(declared).as_bytes());
}

/// Appends "Server overloaded: worker at capacity".
pub fn write_overloaded(out: &mut Vec<u8>) {
    write(&[OVERLOADED], out);
}

/// Appends "Server unavailable: unknown endpoint" and the path.
pub fn write_unknown_endpoint(path: &str, out: &mut Vec<u8>) {
    write(&[UNKNOWN_ENDPOINT, path], out);
}

/// Appends "Read error: message too large: ..."; the connection is to be closed after it.
pub fn write_too_large(error: TooLarge, out: &mut Vec<u8>) {
    let (mut frame_digits, mut max_digits) = ([0; 20], [0; 20]);
    let frame_bytes = crate::json::decimal(error.frame_bytes, &mut frame_digits);
    let max_bytes = crate::json::decimal(error.max_bytes, &mut max_digits);
    let pieces = [
        READ_ERROR,
        "message too large: ",
        frame_bytes,
        " bytes (max: ",
        max_bytes,
        " bytes)",
    ];
    write(&pieces, out);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classifies_by_prefix_alone() {
        assert_eq!(Reply::classify(b""), Reply::Accepted);
        assert_eq!(
            Reply::classify(b"Server overloaded: x"),
            Reply::Overloaded("Server overloaded: x")
        );
        assert_eq!(
            Reply::classify(b"Server unavailable:\xff\xff"),
            Reply::Unavailable("Server unavailable:")
        );
        assert!(Reply::classify(b"Server unavailable:\xff").is_refusal());
        assert_eq!(
            Reply::classify(b"server overloaded: x"),
            Reply::Other(b"server overloaded: x")
        );
        assert!(!Reply::classify(INVALID_PATH.as_bytes()).is_refusal());
    }

    #[test]
    fn the_limit_counts_the_length_field() {
        let mut bytes = vec![];
        write(&["12345"], &mut bytes);
        assert_eq!(decode(&bytes, 9), Decoded::Frame(4..9));
        let too_large = TooLarge {
            frame_bytes: 9,
            max_bytes: 8,
        };
        assert_eq!(
            decode(&bytes[..4], 8),
            Decoded::Bad(Bad::TooLarge(too_large))
        );
        assert_eq!(decode(&bytes[..3], 8), Decoded::Need(4));
        assert_eq!(decode(&bytes[..6], 9), Decoded::Need(9));
    }

    #[test]
    fn texts_are_those_of_a_dynamo_server() {
        let mut bytes = vec![];
        let error = TooLarge {
            frame_bytes: 33_554_446,
            max_bytes: 33_554_432,
        };
        write_too_large(error, &mut bytes);
        assert_eq!(
            &bytes[4..],
            b"Read error: message too large: 33554446 bytes (max: 33554432 bytes)"
        );
        assert_eq!(bytes[..4], [0, 0, 0, 67]);
        assert_eq!(
            &bytes[4 + READ_ERROR.len()..],
            error.to_string().as_bytes(),
            "the two texts are one"
        );
        bytes.clear();
        write_unknown_endpoint("2a/ns/worker/generate", &mut bytes);
        assert_eq!(
            &bytes[4..],
            b"Server unavailable: unknown endpoint 2a/ns/worker/generate"
        );
    }
}
