//! What comes out of a multiplexed connection: chunks, in pieces as they arrive
//! ([`corelane_codec::mux`]).

use corelane_codec::mux::{self, Chunk, Kind, PREFIX_BYTES, SUBJECT_BYTES};
use corelane_codec::{Bad, Decoded};

use crate::ring::Ring;
use crate::shard::Shard;

/// A chunk up to this size is passed on when it is whole: a control message is one.
const WHOLE_BYTES_MAX: usize = 64;
/// Room for chunks beyond this is given back.
const KEPT_BYTES_MAX: usize = 256 * 1024;

/// One thing that a peer says.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Piece<'a> {
    /// A stream begins.
    Open {
        /// Its number.
        stream: u32,
        /// The call that it is for.
        subject: u128,
    },
    /// More of a stream.
    Bytes {
        /// Its number.
        stream: u32,
        /// What has come, perhaps nothing.
        bytes: &'a [u8],
        /// Nothing more will.
        end: bool,
    },
    /// So much more may be sent.
    Credit {
        /// The stream's number.
        stream: u32,
        /// Bytes.
        bytes: u32,
    },
    /// The stream is broken off.
    Reset {
        /// Its number.
        stream: u32,
    },
    /// The answer to our first message.
    Hello,
}

/// The data chunk that is arriving.
#[derive(Clone, Copy, Debug)]
struct Rest {
    stream: u32,
    end: bool,
    left: usize,
}

/// Takes chunks apart. Data are passed on as they come, whatever is whole.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    rest: Option<Rest>,
}

impl Reader {
    /// The next piece at the front of `input`, and how many bytes it takes; `None` when more must
    /// come.
    pub(crate) fn next<'a>(&mut self, input: &'a [u8]) -> Result<Option<(Piece<'a>, usize)>, Bad> {
        if self.rest.is_some() {
            return Ok(self.more(input));
        }
        let chunk = match mux::decode(input) {
            Decoded::Frame(chunk) => chunk,
            Decoded::Need(_) => return Ok(None),
            Decoded::Bad(bad) => return Err(bad),
        };
        let Chunk {
            stream,
            kind,
            bytes,
        } = chunk;
        let payload = &input[PREFIX_BYTES..];
        Ok(match kind {
            Kind::Data { open: true, end } => payload.first_chunk().map(|subject| {
                let left = bytes - SUBJECT_BYTES;
                let rest = Rest { stream, end, left };
                self.rest = (end || left > 0).then_some(rest);
                let subject = u128::from_be_bytes(*subject);
                let taken = PREFIX_BYTES + SUBJECT_BYTES;
                (Piece::Open { stream, subject }, taken)
            }),
            Kind::Data { open: false, .. } if bytes <= WHOLE_BYTES_MAX && payload.len() < bytes => {
                None
            }
            Kind::Data { open: false, end } => {
                let left = bytes;
                self.rest = Some(Rest { stream, end, left });
                let piece = self.more(payload);
                // Nothing of it has come: its prefix is taken all the same, by an empty piece.
                let (piece, taken) = piece.unwrap_or((empty(stream), 0));
                Some((piece, PREFIX_BYTES + taken))
            }
            Kind::Credit => payload.first_chunk().map(|bytes| {
                let bytes = u32::from_be_bytes(*bytes);
                (Piece::Credit { stream, bytes }, PREFIX_BYTES + 4)
            }),
            Kind::Reset => Some((Piece::Reset { stream }, PREFIX_BYTES)),
            Kind::Hello => Some((Piece::Hello, PREFIX_BYTES)),
        })
    }

    /// More of the chunk that is arriving.
    fn more<'a>(&mut self, input: &'a [u8]) -> Option<(Piece<'a>, usize)> {
        let rest = self.rest.as_mut()?;
        if input.is_empty() && rest.left > 0 {
            return None;
        }
        let here = rest.left.min(input.len());
        rest.left -= here;
        let (stream, over) = (rest.stream, rest.left == 0);
        let end = over && rest.end;
        if over {
            self.rest = None;
        }
        let bytes = &input[..here];
        Some((Piece::Bytes { stream, bytes, end }, here))
    }
}

fn empty(stream: u32) -> Piece<'static> {
    Piece::Bytes {
        stream,
        bytes: &[],
        end: false,
    }
}

/// Takes all that has arrived on a connection out of its buffers, behind what was left over the
/// last time. [`put_back`] takes what is left over now.
pub(crate) fn take<R: Ring>(shard: &mut Shard<R>, slot: u32) -> Vec<u8> {
    let connection = &mut shard.connections[slot];
    let mut bytes = std::mem::take(&mut connection.collected);
    let incoming = &mut connection.incoming;
    let here = incoming.bytes();
    shard.pieces.move_out(incoming, here, &mut bytes);
    bytes
}

/// Keeps what is no whole chunk yet: all behind the first `taken` bytes, and the memory.
pub(crate) fn put_back<R: Ring>(shard: &mut Shard<R>, slot: u32, mut bytes: Vec<u8>, taken: usize) {
    bytes.drain(..taken);
    if bytes.capacity() > KEPT_BYTES_MAX {
        bytes.shrink_to(KEPT_BYTES_MAX);
    }
    if let Some(connection) = shard.connections.get_mut(slot) {
        connection.collected = bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All pieces, data of one stream joined, when the bytes come in steps of `step`.
    fn read(wire: &[u8], step: usize) -> Vec<String> {
        let (mut reader, mut have, mut said) = (Reader::default(), Vec::new(), Vec::new());
        let mut data = String::new();
        for part in wire.chunks(step) {
            have.extend_from_slice(part);
            let mut at = 0;
            while let Some((piece, taken)) = reader.next(&have[at..]).unwrap() {
                at += taken;
                match piece {
                    Piece::Bytes { stream, bytes, end } => {
                        data += std::str::from_utf8(bytes).unwrap();
                        if end {
                            said.push(format!("{stream}: {}", std::mem::take(&mut data)));
                        }
                    }
                    other => said.push(format!("{other:?}")),
                }
            }
            have.drain(..at);
        }
        assert!(have.is_empty());
        said
    }

    /// A stop that came in two pieces would be taken for a kill.
    #[test]
    fn control_messages_come_whole() {
        let (open, end) = (false, false);
        let frame = corelane_codec::call_home::STOP_FRAME;
        let mut wire = mux::prefix(1, Kind::Data { open, end }, frame.len()).to_vec();
        wire.extend_from_slice(&frame);
        for cut in 0..wire.len() {
            assert_eq!(Reader::default().next(&wire[..cut]), Ok(None), "{cut}");
        }
        let piece = Piece::Bytes {
            stream: 1,
            bytes: &frame,
            end,
        };
        assert_eq!(Reader::default().next(&wire), Ok(Some((piece, wire.len()))));
    }

    #[test]
    fn pieces_are_the_same_however_the_bytes_are_cut() {
        let data = |open, end| Kind::Data { open, end };
        let mut wire = mux::HELLO_CHUNK.to_vec();
        wire.extend_from_slice(&mux::prefix(7, data(true, false), 16));
        wire.extend_from_slice(&5u128.to_be_bytes());
        wire.extend_from_slice(&mux::prefix(7, data(false, false), 4));
        wire.extend_from_slice(b"abcd");
        wire.extend_from_slice(&mux::prefix(7, data(false, true), 0));
        wire.extend_from_slice(&mux::prefix(8, data(true, true), 19));
        wire.extend_from_slice(&6u128.to_be_bytes());
        wire.extend_from_slice(b"xyz");
        wire.extend_from_slice(&mux::credit(9, 10));
        wire.extend_from_slice(&mux::prefix(3, Kind::Reset, 0));
        wire.extend_from_slice(&mux::prefix(4, data(true, true), 16));
        wire.extend_from_slice(&1u128.to_be_bytes());
        let expected = [
            "Hello",
            "Open { stream: 7, subject: 5 }",
            "7: abcd",
            "Open { stream: 8, subject: 6 }",
            "8: xyz",
            "Credit { stream: 9, bytes: 10 }",
            "Reset { stream: 3 }",
            "Open { stream: 4, subject: 1 }",
            "4: ",
        ];
        for step in 1..wire.len() {
            assert_eq!(read(&wire, step), expected, "{step}");
        }
    }
}
