//! How corelane carries many response streams on one connection. This is ours, not Dynamo's: it is
//! offered in the connection info by a member that others ignore
//! ([`crate::control_message::CallTemplate`]).
//!
//! ```text
//! worker -> caller   hello message, then chunks     caller -> worker   hello chunk, then chunks
//!
//! 0            4       5          8
//! | stream u32 | kind  | bytes u24 | payload |      integers big-endian
//! ```
//!
//! The payload of a data chunk is a piece of what a call-home socket would carry behind its
//! handshake; in its place the stream's first chunk begins with the subject, 16 bytes. A stream
//! may carry [`WINDOW_BYTES`] before its receiver grants more.

use zerocopy::big_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::two_part;
use crate::{Bad, Decoded};

/// Bytes before a chunk's payload.
pub const PREFIX_BYTES: usize = 8;
/// Most bytes of a chunk's payload.
pub const CHUNK_BYTES_MAX: usize = 64 * 1024;
/// Bytes of a subject at the beginning of a stream.
pub const SUBJECT_BYTES: usize = 16;
/// Bytes of a response stream, subjects not counted, that may be sent before credit comes.
pub const WINDOW_BYTES: u32 = 256 * 1024;
/// Header of the message that a worker opens such a connection with.
pub const HELLO: &[u8; 18] = b"{\"corelane_mux\":1}";
/// The same as a whole two-part message.
pub const HELLO_FRAME: [u8; 42] = two_part::constant(HELLO, b"");
/// The caller's answer: a chunk.
pub const HELLO_CHUNK: [u8; 8] = [0, 0, 0, 0, 16, 0, 0, 0];

/// The fixed part of a chunk.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Prefix {
    /// The worker's number of the stream.
    pub stream: U32,
    /// What the chunk is.
    pub kind: u8,
    /// Bytes of its payload.
    pub bytes: [u8; 3],
}

/// What a chunk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A piece of a stream.
    Data {
        /// Its first: the payload begins with the subject.
        open: bool,
        /// Its last: as if the socket were closed behind it.
        end: bool,
    },
    /// The receiver of a response stream takes so many bytes more: a u32.
    Credit,
    /// The stream is broken off, or belongs to nobody.
    Reset,
    /// The caller's answer to the worker's first message.
    Hello,
}

const OPEN: u8 = 1;
const END: u8 = 2;
const CREDIT: u8 = 4;
const RESET: u8 = 8;
const HELLO_KIND: u8 = 16;

impl Kind {
    /// Its byte on the wire.
    #[must_use]
    pub const fn byte(self) -> u8 {
        match self {
            Self::Data { open, end } => ((open as u8) * OPEN) | ((end as u8) * END),
            Self::Credit => CREDIT,
            Self::Reset => RESET,
            Self::Hello => HELLO_KIND,
        }
    }

    fn of_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            0..=3 => Self::Data {
                open: byte & OPEN != 0,
                end: byte & END != 0,
            },
            CREDIT => Self::Credit,
            RESET => Self::Reset,
            HELLO_KIND => Self::Hello,
            _ => return None,
        })
    }

    /// Whether a chunk of this kind may have so many bytes.
    fn takes(self, bytes: usize) -> bool {
        match self {
            Self::Data { open: true, .. } => (SUBJECT_BYTES..=CHUNK_BYTES_MAX).contains(&bytes),
            Self::Data { .. } => bytes <= CHUNK_BYTES_MAX,
            Self::Credit => bytes == 4,
            Self::Reset | Self::Hello => bytes == 0,
        }
    }
}

/// The beginning of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// The worker's number of the stream.
    pub stream: u32,
    /// What it is.
    pub kind: Kind,
    /// Bytes of its payload, which follows.
    pub bytes: usize,
}

/// Reads the fixed part of a chunk.
pub fn decode(input: &[u8]) -> Decoded<Chunk> {
    let Ok((prefix, _)) = Prefix::read_from_prefix(input) else {
        return Decoded::Need(PREFIX_BYTES);
    };
    let [high, middle, low] = prefix.bytes.map(usize::from);
    let bytes = (high << 16) | (middle << 8) | low;
    match Kind::of_byte(prefix.kind) {
        Some(kind) if kind.takes(bytes) => Decoded::Frame(Chunk {
            stream: prefix.stream.get(),
            kind,
            bytes,
        }),
        _ => Decoded::Bad(Bad::Chunk {
            kind: prefix.kind,
            bytes: bytes as u32,
        }),
    }
}

/// The fixed part of a chunk. `bytes` is at most [`CHUNK_BYTES_MAX`].
#[must_use]
pub fn prefix(stream: u32, kind: Kind, bytes: usize) -> [u8; PREFIX_BYTES] {
    debug_assert!(kind.takes(bytes), "{kind:?} of {bytes} bytes");
    let [a, b, c, d] = stream.to_be_bytes();
    let [_, high, middle, low] = (bytes as u32).to_be_bytes();
    [a, b, c, d, kind.byte(), high, middle, low]
}

/// A chunk that grants `bytes` more.
#[must_use]
pub fn credit(stream: u32, bytes: u32) -> [u8; PREFIX_BYTES + 4] {
    let mut out = [0; PREFIX_BYTES + 4];
    out[..PREFIX_BYTES].copy_from_slice(&prefix(stream, Kind::Credit, 4));
    out[PREFIX_BYTES..].copy_from_slice(&bytes.to_be_bytes());
    out
}

const _: () = assert!(size_of::<Prefix>() == PREFIX_BYTES);
const _: () = assert!(CHUNK_BYTES_MAX < 1 << 24 && CHUNK_BYTES_MAX <= WINDOW_BYTES as usize);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_written_and_read_alike() {
        let data = |open, end| Kind::Data { open, end };
        for (kind, bytes, wire) in [
            (data(true, false), 16, "0102030401000010"),
            (data(true, true), 65_536, "0102030403010000"),
            (data(false, false), 0, "0102030400000000"),
            (data(false, true), 300, "010203040200012c"),
            (Kind::Credit, 4, "0102030404000004"),
            (Kind::Reset, 0, "0102030408000000"),
        ] {
            let written = prefix(0x0102_0304, kind, bytes);
            let hex: String = written.iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(hex, wire);
            let stream = 0x0102_0304;
            let chunk = Chunk {
                stream,
                kind,
                bytes,
            };
            assert_eq!(decode(&written), Decoded::Frame(chunk));
            assert_eq!(decode(&written[..7]), Decoded::Need(8));
        }
        let hello = decode(&HELLO_CHUNK).frame().unwrap();
        assert_eq!((hello.stream, hello.kind, hello.bytes), (0, Kind::Hello, 0));
        assert_eq!(credit(1, 2), [0, 0, 0, 1, 4, 0, 0, 4, 0, 0, 0, 2]);
    }

    #[test]
    fn what_is_no_chunk_is_refused() {
        for wire in [
            [0, 0, 0, 0, 32, 0, 0, 0],
            [0, 0, 0, 0, 5, 0, 0, 4],
            [0, 0, 0, 0, 1, 0, 0, 15],
            [0, 0, 0, 0, 0, 1, 0, 1],
            [0, 0, 0, 0, 4, 0, 0, 5],
            [0, 0, 0, 0, 8, 0, 0, 1],
        ] {
            assert!(matches!(decode(&wire), Decoded::Bad(_)), "{wire:?}");
        }
    }
}
