//! The four parts of an event on ZMQ (spec/events-discovery.md §3.5, §3.6).
//!
//! ```text
//! part 0  the bare topic, from a publisher's own socket; the subject, through a broker
//! part 1  publisher u64      part 2  sequence u64      part 3  frame
//! ```

use super::envelope::Envelope;
use super::fields::EventError;
use super::frame::{self, FrameError};
use crate::EncodeError;

/// Parts of a message.
pub const PARTS: usize = 4;

/// Why a multipart message is no event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MultipartError {
    /// Not four parts.
    #[error("event of {parts} parts; 4 are right")]
    Parts {
        /// How many there are.
        parts: usize,
    },
    /// Part 1 or 2 is not eight bytes long.
    #[error("part {part} of an event has {bytes} bytes; 8 are right")]
    IdBytes {
        /// Which one.
        part: usize,
        /// Its length.
        bytes: usize,
    },
    /// Part 3 is no frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The frame holds no envelope.
    #[error(transparent)]
    Envelope(#[from] EventError),
    /// Parts and envelope say different things; see [`Message::check`].
    #[error("the {what} of an event is not what its envelope says")]
    Contradiction {
        /// What differs.
        what: &'static str,
    },
}

/// An event with what stood before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message<'a> {
    /// Part 0.
    pub subject: &'a [u8],
    /// Part 1.
    pub publisher_id: u64,
    /// Part 2.
    pub sequence: u64,
    /// What the frame of part 3 holds.
    pub envelope: Envelope<'a>,
}

fn id(parts: &[&[u8]], part: usize) -> Result<u64, MultipartError> {
    let bytes = parts.get(part).copied().unwrap_or_default();
    match <[u8; 8]>::try_from(bytes) {
        Ok(bytes) => Ok(u64::from_be_bytes(bytes)),
        Err(_) => Err(MultipartError::IdBytes {
            part,
            bytes: bytes.len(),
        }),
    }
}

impl<'a> Message<'a> {
    /// Reads a message. What parts 1 and 2 say is not compared with the envelope, as Dynamo's
    /// usual subscriber does not.
    ///
    /// # Errors
    /// See [`MultipartError`]; Dynamo drops such a message, and so should its reader.
    pub fn decode(parts: &[&'a [u8]]) -> Result<Self, MultipartError> {
        let &[subject, _, _, frame] = parts else {
            let parts = parts.len();
            return Err(MultipartError::Parts { parts });
        };
        Ok(Self {
            subject,
            publisher_id: id(parts, 1)?,
            sequence: id(parts, 2)?,
            envelope: Envelope::decode(frame::payload(frame)?)?,
        })
    }

    /// What a KV router asks for besides: the subject is exactly this one, parts and envelope
    /// agree, and the publisher is the one whose record was followed.
    ///
    /// # Errors
    /// [`MultipartError::Contradiction`].
    pub fn check(&self, subject: &[u8], publisher_id: u64) -> Result<(), MultipartError> {
        let what = if self.subject != subject {
            "topic"
        } else if self.publisher_id != self.envelope.publisher_id
            || self.publisher_id != publisher_id
        {
            "publisher"
        } else if self.sequence != self.envelope.sequence {
            "sequence"
        } else {
            return Ok(());
        };
        Err(MultipartError::Contradiction { what })
    }
}

/// Parts 1 and 2.
#[must_use]
pub fn ids(envelope: &Envelope<'_>) -> [[u8; 8]; 2] {
    [
        envelope.publisher_id.to_be_bytes(),
        envelope.sequence.to_be_bytes(),
    ]
}

/// Appends part 3.
///
/// # Errors
/// The event is too large for its length fields; nothing has been written then.
pub fn write_frame(envelope: &Envelope<'_>, out: &mut Vec<u8>) -> Result<(), EncodeError> {
    let start = out.len();
    out.extend_from_slice(&[0; frame::PREFIX_BYTES]);
    let written = envelope.write(out).and_then(|()| {
        let payload_bytes = out.len() - start - frame::PREFIX_BYTES;
        frame::Prefix::new(payload_bytes)
    });
    match written {
        Ok(prefix) => {
            let place = &mut out[start..start + frame::PREFIX_BYTES];
            place.copy_from_slice(zerocopy::IntoBytes::as_bytes(&prefix));
            Ok(())
        }
        Err(error) => {
            out.truncate(start);
            Err(error)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVENT: Envelope<'static> = Envelope {
        publisher_id: 7,
        sequence: 3,
        published_at_ms: 1,
        topic: "kv-events",
        payload: b"\x90",
    };

    fn frame() -> Vec<u8> {
        let mut out = b"before".to_vec();
        write_frame(&EVENT, &mut out).unwrap();
        out.split_off(6)
    }

    /// Each row of the table of spec/events-discovery.md §3.5, and what a subscriber drops.
    #[test]
    fn four_parts() {
        let [publisher, sequence] = ids(&EVENT);
        let frame = frame();
        let parts = [&b"kv-events"[..], &publisher, &sequence, &frame];
        let message = Message::decode(&parts).unwrap();
        assert_eq!((message.publisher_id, message.sequence), (7, 3));
        assert_eq!(message.subject, b"kv-events");
        assert_eq!(message.envelope, EVENT);
        assert_eq!(message.check(b"kv-events", 7), Ok(()));

        for count in 0..PARTS {
            let error = Message::decode(&parts[..count]).unwrap_err();
            assert_eq!(error, MultipartError::Parts { parts: count });
        }
        let five = [parts[0], parts[1], parts[2], parts[3], b""];
        let error = Message::decode(&five).unwrap_err();
        assert_eq!(error, MultipartError::Parts { parts: 5 });
        for part in [1, 2] {
            let mut short = parts;
            short[part] = &short[part][1..];
            let error = Message::decode(&short).unwrap_err();
            assert_eq!(error, MultipartError::IdBytes { part, bytes: 7 });
        }
        let error = Message::decode(&[parts[0], parts[1], parts[2], &frame[..5]]).unwrap_err();
        assert!(matches!(
            error,
            MultipartError::Frame(FrameError::Truncated { .. })
        ));
        let junk = [parts[0], parts[1], parts[2], b"\x01\0\0\0\x01{"];
        let error = Message::decode(&junk).unwrap_err();
        assert!(matches!(error, MultipartError::Envelope(_)));
    }

    /// The usual subscriber takes what contradicts itself; the stricter one does not.
    #[test]
    fn contradictions_are_for_the_strict() {
        let [publisher, sequence] = ids(&EVENT);
        let frame = frame();
        let other = 9_u64.to_be_bytes();
        let cases: [([&[u8]; 4], &str); 3] = [
            ([b"kv-events2", &publisher, &sequence, &frame], "topic"),
            ([b"kv-events", &other, &sequence, &frame], "publisher"),
            ([b"kv-events", &publisher, &other, &frame], "sequence"),
        ];
        for (parts, what) in cases {
            let message = Message::decode(&parts).unwrap();
            let error = message.check(b"kv-events", 7).unwrap_err();
            assert_eq!(error, MultipartError::Contradiction { what });
        }
        let parts = [&b"kv-events"[..], &publisher, &sequence, &frame];
        let message = Message::decode(&parts).unwrap();
        let what = "publisher";
        let error = message.check(b"kv-events", 8).unwrap_err();
        assert_eq!(error, MultipartError::Contradiction { what });
    }
}
