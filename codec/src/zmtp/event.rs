//! The message of four parts that carries an event over ZMQ (spec/events-discovery.md §3.5).
//!
//! ```text
//! event      [topic or subject] [publisher id, 8] [sequence, 8] [01 length32 envelope]
//! ```

use super::{Fault, Head, decode_head, write_head};

/// Parts of a message that carries an event.
pub const EVENT_PARTS: u32 = 4;
/// Bytes before the envelope in an event's last part (spec/events-discovery.md §3.3).
pub const EVENT_PREFIX_BYTES: usize = 5;
const EVENT_VERSION: u8 = 1;

/// Why a message is no event. The stream goes on behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EventFault {
    /// Not four parts.
    #[error("not four parts")]
    Parts,
    /// The second or the third part has not 8 bytes.
    #[error("publisher id or sequence has not 8 bytes")]
    Numbers,
    /// The last part is shorter than a frame's prefix.
    #[error("the frame has fewer than 5 bytes")]
    FrameShort,
    /// The frame has another version.
    #[error("the frame's version is {version}, not 1")]
    FrameVersion {
        /// Its first byte.
        version: u8,
    },
    /// The frame declares more bytes than there are.
    #[error("the frame declares {declared} bytes and has {bytes}")]
    FrameLength {
        /// Its length field.
        declared: u32,
        /// Bytes behind it.
        bytes: usize,
    },
}

/// Where things are in a message that carries an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// Where the topic (direct) or subject (broker) begins.
    pub subject_at: usize,
    /// Its length.
    pub subject_bytes: usize,
    /// The publisher's number.
    pub publisher_id: u64,
    /// The event's number.
    pub sequence: u64,
    /// Where the frame begins: the body of the last part.
    pub frame_at: usize,
    /// One past the message's last byte.
    pub end: usize,
}

/// Reads a message that carries an event and lies whole in `input`. `None`: it does not, or it is
/// none; [`Walk`] tells which.
#[inline]
#[must_use]
pub fn decode_event(input: &[u8], max_bytes: usize) -> Option<Event> {
    let part = |at: usize, more: bool| {
        let head = decode_head(input.get(at..)?, max_bytes).frame()?;
        (!head.command && head.more == more).then_some((at + head.head_bytes, head.body_bytes))
    };
    let (subject_at, subject_bytes) = part(0, true)?;
    let (id_at, id_bytes) = part(subject_at + subject_bytes, true)?;
    let (sequence_at, sequence_bytes) = part(id_at + id_bytes, true)?;
    let (frame_at, frame_bytes) = part(sequence_at + sequence_bytes, false)?;
    let end = frame_at + frame_bytes;
    if id_bytes != 8 || sequence_bytes != 8 || end > max_bytes || end > input.len() {
        return None;
    }
    check_frame(&input[frame_at..], frame_bytes).ok()?;
    Some(Event {
        subject_at,
        subject_bytes,
        publisher_id: number(&input[id_at..])?,
        sequence: number(&input[sequence_at..])?,
        frame_at,
        end,
    })
}

fn number(bytes: &[u8]) -> Option<u64> {
    bytes.first_chunk().map(|bytes| u64::from_be_bytes(*bytes))
}

/// Checks the prefix of an event's frame, of which `frame_bytes` are there in all.
///
/// # Errors
/// [`EventFault`] says what is wrong. Bytes behind the declared ones are allowed.
#[inline]
pub fn check_frame(front: &[u8], frame_bytes: usize) -> Result<(), EventFault> {
    let Some(prefix) = front.first_chunk::<EVENT_PREFIX_BYTES>() else {
        return Err(EventFault::FrameShort);
    };
    if frame_bytes < EVENT_PREFIX_BYTES {
        return Err(EventFault::FrameShort);
    }
    let [version, length @ ..] = *prefix;
    if version != EVENT_VERSION {
        return Err(EventFault::FrameVersion { version });
    }
    let declared = u32::from_be_bytes(length);
    let bytes = frame_bytes - EVENT_PREFIX_BYTES;
    if declared as usize > bytes {
        return Err(EventFault::FrameLength { declared, bytes });
    }
    Ok(())
}

/// Finds the end of a message that does not lie in one piece, or has any number of parts, from the
/// beginnings of its frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Walk {
    parts: u32,
    /// Where the next frame begins, counted from the message's first byte.
    at: usize,
    bodies: [(usize, usize); EVENT_PARTS as usize],
    done: bool,
}

impl Walk {
    /// Where the next frame begins; the message's end when all are known.
    #[must_use]
    pub fn at(&self) -> usize {
        self.at
    }

    /// Whether the last part is known, so that [`Walk::at`] is the end of the message.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.done
    }

    /// Takes the beginning of the frame at [`Walk::at`].
    ///
    /// # Errors
    /// It is a command, or the message becomes longer than `max_bytes`.
    pub fn step(&mut self, head: &Head, max_bytes: usize) -> Result<(), Fault> {
        if head.command || self.done {
            return Err(Fault::Unexpected);
        }
        let body = self.at + head.head_bytes;
        if let Some(place) = self.bodies.get_mut(self.parts as usize) {
            *place = (body, head.body_bytes);
        }
        self.parts = self.parts.saturating_add(1);
        self.at = body + head.body_bytes;
        self.done = !head.more;
        if self.at > max_bytes {
            let (bytes, max) = (self.at as u64, max_bytes as u64);
            return Err(Fault::TooLong { bytes, max });
        }
        Ok(())
    }

    /// Where things are in the message, which `copy` copies from: offset, place.
    ///
    /// # Errors
    /// It carries no event.
    pub fn event(&self, copy: impl Fn(usize, &mut [u8])) -> Result<Event, EventFault> {
        if !self.done || self.parts != EVENT_PARTS {
            return Err(EventFault::Parts);
        }
        let [subject, id, sequence, frame] = self.bodies;
        if id.1 != 8 || sequence.1 != 8 {
            return Err(EventFault::Numbers);
        }
        let number = |at| {
            let mut bytes = [0; 8];
            copy(at, &mut bytes);
            u64::from_be_bytes(bytes)
        };
        let mut prefix = [0; EVENT_PREFIX_BYTES];
        let there = frame.1.min(EVENT_PREFIX_BYTES);
        copy(frame.0, &mut prefix[..there]);
        check_frame(&prefix[..there], frame.1)?;
        Ok(Event {
            subject_at: subject.0,
            subject_bytes: subject.1,
            publisher_id: number(id.0),
            sequence: number(sequence.0),
            frame_at: frame.0,
            end: self.at,
        })
    }
}

/// Writes all of an event's message that comes before its frame of `frame_bytes`.
pub fn write_event_front(
    subject: &[u8],
    publisher_id: u64,
    sequence: u64,
    frame_bytes: usize,
    out: &mut Vec<u8>,
) {
    write_head(subject.len(), true, out);
    out.extend_from_slice(subject);
    for number in [publisher_id, sequence] {
        write_head(8, true, out);
        out.extend_from_slice(&number.to_be_bytes());
    }
    write_head(frame_bytes, false, out);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Decoded;

    fn event(subject: &[u8], frame: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        write_event_front(subject, 0x0102, 7, frame.len(), &mut out);
        out.extend_from_slice(frame);
        out
    }

    fn walk(message: &[u8], max: usize) -> Result<Walk, Fault> {
        let mut walk = Walk::default();
        while !walk.is_done() {
            let Decoded::Frame(head) = decode_head(&message[walk.at()..], max) else {
                panic!("{walk:?}");
            };
            walk.step(&head, max)?;
        }
        Ok(walk)
    }

    fn walked(message: &[u8]) -> Result<Event, EventFault> {
        let copy = |at: usize, to: &mut [u8]| to.copy_from_slice(&message[at..at + to.len()]);
        walk(message, 1 << 20).unwrap().event(copy)
    }

    #[test]
    fn events_are_found_in_one_piece_and_by_walking() {
        let good = event(b"kv-events", b"\x01\0\0\0\x03abcd");
        let event_of = decode_event(&good, 1 << 20).unwrap();
        assert_eq!(walked(&good), Ok(event_of));
        assert_eq!((event_of.publisher_id, event_of.sequence), (0x0102, 7));
        let subject = event_of.subject_at..event_of.subject_at + event_of.subject_bytes;
        assert_eq!(&good[subject], b"kv-events");
        assert_eq!(
            &good[event_of.frame_at..event_of.end],
            b"\x01\0\0\0\x03abcd"
        );
        let long = event(b"t", &[&b"\x01\0\0\x01\x2c"[..], &[7; 300]].concat());
        assert_eq!(walked(&long).ok(), decode_event(&long, 1 << 20));
        assert_eq!(decode_event(&long, 300), None);
        assert_eq!(decode_event(&good[..good.len() - 1], 1 << 20), None);
        assert!(matches!(walk(&long, 320), Err(Fault::TooLong { .. })));
    }

    #[test]
    fn what_is_no_event_is_named() {
        let fault = |frame: &[u8]| walked(&event(b"t", frame)).unwrap_err();
        let (declared, bytes) = (0x0300_0000, 3);
        for (frame, wanted) in [
            (&b""[..], EventFault::FrameShort),
            (b"\x01\0\0\0", EventFault::FrameShort),
            (b"\x02\0\0\0\x01a", EventFault::FrameVersion { version: 2 }),
            (
                b"\x01\x03\0\0\0abc",
                EventFault::FrameLength { declared, bytes },
            ),
        ] {
            assert_eq!(fault(frame), wanted);
            assert_eq!(decode_event(&event(b"t", frame), 1 << 20), None);
        }
        assert_eq!(walked(b"\x01\x01t\x00\x01x"), Err(EventFault::Parts));
        let parts = b"\x01\x01t\x01\x07aaaaaaa\x01\x08bbbbbbbb\x00\x05\x01\0\0\0\0";
        assert_eq!(walked(parts), Err(EventFault::Numbers));
        let five = b"\x01\0\x01\0\x01\0\x01\0\x00\0";
        assert_eq!(walked(five), Err(EventFault::Parts));
        assert_eq!(decode_event(five, 1 << 20), None);
    }
}
