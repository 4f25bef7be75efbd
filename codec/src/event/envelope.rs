//! The envelope of an event (spec/events-discovery.md §3.2).
//!
//! ```text
//! 85 ac "publisher_id" UINT a8 "sequence" UINT ac "published_at" UINT a5 "topic" STR
//!    a7 "payload" BIN
//! ```

use super::fields::{self, EventError};
use super::{frame, topic};
use crate::EncodeError;
use crate::msgpack::Reader;

const FIELDS: &[&str] = &[
    "publisher_id",
    "sequence",
    "published_at",
    "topic",
    "payload",
];
/// Every member is required.
const ALL: u32 = 0b1_1111;

/// Most bytes of an envelope that are neither topic nor payload.
pub const ENVELOPE_BYTES_OVERHEAD_MAX: usize = 14 + 9 + 9 + 9 + 13 + 9 + 6 + 5 + 8 + 5;

/// One event, borrowed from the bytes that it came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Envelope<'a> {
    /// Drawn at random by the publisher, at most 2^53 - 1; not the worker's id.
    pub publisher_id: u64,
    /// 0 for a publisher's first event, then one more each.
    pub sequence: u64,
    /// Unix time in milliseconds.
    pub published_at_ms: u64,
    /// The bare topic, without scope and not encoded.
    pub topic: &'a str,
    /// The event itself; MessagePack for typed ones.
    pub payload: &'a [u8],
}

impl<'a> Envelope<'a> {
    /// Reads an envelope: as a map in any order, or as an array. What follows it is ignored, and
    /// so are members that are not known.
    ///
    /// # Errors
    /// What Dynamo's reader does not take either: another type, a member that is missing or comes
    /// twice, an array of another length.
    #[inline]
    pub fn decode(input: &'a [u8]) -> Result<Self, EventError> {
        match Self::as_written(input) {
            Some(envelope) => Ok(envelope),
            None => Self::in_any_form(input),
        }
    }

    /// The form that every writer we know of uses; `None` for any other.
    #[inline]
    fn as_written(input: &'a [u8]) -> Option<Self> {
        let (front, rest) = EnvelopeFront::read(input)?;
        let payload = match *rest {
            [0xc4, bytes, ref rest @ ..] => rest.get(..usize::from(bytes))?,
            [0xc5, high, low, ref rest @ ..] => {
                rest.get(..usize::from(u16::from_be_bytes([high, low])))?
            }
            _ => return None,
        };
        Some(Self {
            publisher_id: front.publisher_id,
            sequence: front.sequence,
            published_at_ms: front.published_at_ms,
            topic: front.topic,
            payload,
        })
    }

    #[cold]
    fn in_any_form(input: &'a [u8]) -> Result<Self, EventError> {
        let mut envelope = Self {
            publisher_id: 0,
            sequence: 0,
            published_at_ms: 0,
            topic: "",
            payload: &[],
        };
        let mut reader = Reader::new(input);
        let met = fields::read_struct(&mut reader, "the envelope", FIELDS, |index, reader| {
            let name = FIELDS[index];
            match index {
                0 => envelope.publisher_id = fields::uint(reader, name)?,
                1 => envelope.sequence = fields::uint(reader, name)?,
                2 => envelope.published_at_ms = fields::uint(reader, name)?,
                3 => envelope.topic = fields::text(reader, name)?,
                _ => envelope.payload = fields::bytes(reader, name)?,
            }
            Ok(())
        })?;
        met.require(ALL)?;
        Ok(envelope)
    }

    /// Appends the envelope as Dynamo writes it: a map in order, integers in their shortest form,
    /// the payload as binary.
    ///
    /// # Errors
    /// Topic or payload do not fit their length fields; nothing has been written then.
    pub fn write(&self, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        for part in [self.topic.as_bytes(), self.payload] {
            let bytes = part.len();
            if bytes > frame::PAYLOAD_BYTES_MAX {
                return Err(EncodeError::PayloadTooLong { bytes });
            }
        }
        out.reserve(ENVELOPE_BYTES_OVERHEAD_MAX + self.topic.len() + self.payload.len());
        out.extend_from_slice(b"\x85\xacpublisher_id");
        write_uint(self.publisher_id, out);
        out.extend_from_slice(b"\xa8sequence");
        write_uint(self.sequence, out);
        out.extend_from_slice(b"\xacpublished_at");
        write_uint(self.published_at_ms, out);
        out.extend_from_slice(b"\xa5topic");
        write_text(self.topic.as_bytes(), out);
        out.extend_from_slice(b"\xa7payload");
        write_binary(self.payload, out);
        Ok(())
    }
}

/// What stands before the payload of an envelope in the form that every writer we know of uses:
/// enough to pass an event on whose payload lies elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EnvelopeFront<'a> {
    /// As in [`Envelope`].
    pub publisher_id: u64,
    /// As in [`Envelope`].
    pub sequence: u64,
    /// As in [`Envelope`].
    pub published_at_ms: u64,
    /// As in [`Envelope`].
    pub topic: &'a str,
    /// Bytes of the whole envelope, as its payload's length says.
    pub bytes: u64,
}

impl<'a> EnvelopeFront<'a> {
    /// Reads it from the first bytes of an envelope; `None` for another form, or for too few.
    #[must_use]
    pub fn decode(input: &'a [u8]) -> Option<Self> {
        let (front, rest) = Self::read(input)?;
        let (head, payload): (usize, u64) = match *rest {
            [0xc4, bytes, ..] => (2, bytes.into()),
            [0xc5, a, b, ..] => (3, u16::from_be_bytes([a, b]).into()),
            [0xc6, a, b, c, d, ..] => (5, u32::from_be_bytes([a, b, c, d]).into()),
            _ => return None,
        };
        let bytes = (input.len() - rest.len() + head) as u64 + payload;
        Some(Self { bytes, ..front })
    }

    /// All but `bytes`, and what follows the key of the payload.
    #[inline]
    fn read(input: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let rest = after(input, b"\x85\xacpublisher_id")?;
        let (publisher_id, rest) = uint(rest)?;
        let rest = after(rest, b"\xa8sequence")?;
        let (sequence, rest) = uint(rest)?;
        let rest = after(rest, b"\xacpublished_at")?;
        let (published_at_ms, rest) = uint(rest)?;
        let rest = after(rest, b"\xa5topic")?;
        let (&head, rest) = rest.split_first()?;
        if head & 0xe0 != 0xa0 {
            return None;
        }
        let (topic, rest) = rest.split_at_checked(usize::from(head & 0x1f))?;
        let rest = after(rest, b"\xa7payload")?;
        let front = Self {
            publisher_id,
            sequence,
            published_at_ms,
            topic: topic::known(topic).or_else(|| std::str::from_utf8(topic).ok())?,
            bytes: 0,
        };
        Some((front, rest))
    }
}

/// What follows these bytes, if they come first.
#[inline]
fn after<'a, const N: usize>(input: &'a [u8], expected: &[u8; N]) -> Option<&'a [u8]> {
    let (front, rest) = input.split_first_chunk::<N>()?;
    (front == expected).then_some(rest)
}

/// An integer of one of the forms that writers use, and what follows it.
#[inline]
fn uint(input: &[u8]) -> Option<(u64, &[u8])> {
    match *input {
        [0xcf, a, b, c, d, e, f, g, h, ref rest @ ..] => {
            Some((u64::from_be_bytes([a, b, c, d, e, f, g, h]), rest))
        }
        [value @ 0..=0x7f, ref rest @ ..] => Some((value.into(), rest)),
        [0xcc, value, ref rest @ ..] => Some((value.into(), rest)),
        [0xcd, a, b, ref rest @ ..] => Some((u16::from_be_bytes([a, b]).into(), rest)),
        [0xce, a, b, c, d, ref rest @ ..] => Some((u32::from_be_bytes([a, b, c, d]).into(), rest)),
        _ => None,
    }
}

/// Appends a MessagePack integer in its shortest form.
fn write_uint(value: u64, out: &mut Vec<u8>) {
    let bytes = value.to_be_bytes();
    match value {
        0..=0x7f => out.push(bytes[7]),
        0x80..=0xff => out.extend_from_slice(&[0xcc, bytes[7]]),
        0x100..=0xffff => out.extend_from_slice(&[0xcd, bytes[6], bytes[7]]),
        0x1_0000..=0xffff_ffff => {
            out.push(0xce);
            out.extend_from_slice(&bytes[4..]);
        }
        _ => {
            out.push(0xcf);
            out.extend_from_slice(&bytes);
        }
    }
}

fn write_text(text: &[u8], out: &mut Vec<u8>) {
    match text.len() {
        len @ 0..=31 => out.push(0xa0 | len as u8),
        len => write_length(len, [0xd9, 0xda, 0xdb], out),
    }
    out.extend_from_slice(text);
}

fn write_binary(bytes: &[u8], out: &mut Vec<u8>) {
    write_length(bytes.len(), [0xc4, 0xc5, 0xc6], out);
    out.extend_from_slice(bytes);
}

/// Appends a head byte and a length of one, two or four bytes.
fn write_length(len: usize, heads: [u8; 3], out: &mut Vec<u8>) {
    // The writer has refused what is longer.
    let bytes = (len as u32).to_be_bytes();
    let (head, from) = match len {
        0..=0xff => (heads[0], 3),
        0x100..=0xffff => (heads[1], 2),
        _ => (heads[2], 0),
    };
    out.push(head);
    out.extend_from_slice(&bytes[from..]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::msgpack::MsgPackError;

    const EVENT: Envelope<'static> = Envelope {
        publisher_id: 2_136_971_770_339_508,
        sequence: 0,
        published_at_ms: 1_795_289_986_740,
        topic: "kv_metrics",
        payload: b"xyz",
    };

    fn bytes(envelope: &Envelope<'_>) -> Vec<u8> {
        let mut out = vec![];
        envelope.write(&mut out).unwrap();
        out
    }

    /// One member as it stands on the wire, key and value.
    fn member(index: usize) -> Vec<u8> {
        let mut out = vec![];
        write_text(FIELDS[index].as_bytes(), &mut out);
        match index {
            0 => write_uint(EVENT.publisher_id, &mut out),
            1 => write_uint(EVENT.sequence, &mut out),
            2 => write_uint(EVENT.published_at_ms, &mut out),
            3 => write_text(EVENT.topic.as_bytes(), &mut out),
            _ => write_binary(EVENT.payload, &mut out),
        }
        out
    }

    fn map(indices: &[usize]) -> Vec<u8> {
        let mut out = vec![0x80 | indices.len() as u8];
        for index in indices {
            out.extend(member(*index));
        }
        out
    }

    /// The layout of spec/events-discovery.md §3.2, byte by byte.
    #[test]
    fn written_as_a_map_in_order_with_short_integers() {
        let want = [
            &b"\x85\xacpublisher_id\xcf\x00\x07\x97\x90\x83\x44\x20\xb4"[..],
            b"\xa8sequence\x00",
            b"\xacpublished_at\xcf\x00\x00\x01\xa1\xff\x9f\x36\xb4",
            b"\xa5topic\xaakv_metrics\xa7payload\xc4\x03xyz",
        ]
        .concat();
        assert_eq!(bytes(&EVENT), want);
        assert_eq!(want, map(&[0, 1, 2, 3, 4]));
        assert!(want.len() <= ENVELOPE_BYTES_OVERHEAD_MAX + 13);
        assert_eq!(Envelope::as_written(&want), Some(EVENT));
        // The front alone says how long the whole is.
        let front = EnvelopeFront::decode(&want[..want.len() - 3]).unwrap();
        assert_eq!((front.bytes, front.sequence), (want.len() as u64, 0));
        assert_eq!(EnvelopeFront::decode(&want[..want.len() - 4]), None);
    }

    /// Each row of the table of spec/events-discovery.md §3.2 that is accepted.
    #[test]
    fn what_dynamo_accepts() {
        for order in [[4, 3, 2, 1, 0], [1, 0, 2, 3, 4], [0, 1, 2, 4, 3]] {
            assert_eq!(Envelope::decode(&map(&order)), Ok(EVENT), "{order:?}");
        }
        let mut extra = map(&[0, 1, 2, 3, 4]);
        extra[0] = 0x87;
        extra.extend_from_slice(b"\xa5later\x92\x01\x81\xa1a\xc0\xa1z\xcb\0\0\0\0\0\0\0\0");
        assert_eq!(Envelope::decode(&extra), Ok(EVENT), "unknown members");

        let mut array = vec![0x95];
        for (index, name) in FIELDS.iter().enumerate() {
            array.extend_from_slice(&member(index)[1 + name.len()..]);
        }
        assert_eq!(Envelope::decode(&array), Ok(EVENT), "an array");

        let mut text = map(&[0, 1, 2, 3]);
        text[0] = 0x85;
        text.extend_from_slice(b"\xa7payload\xa3xyz");
        assert_eq!(Envelope::decode(&text), Ok(EVENT), "payload as text");

        let mut more = bytes(&EVENT);
        more.extend_from_slice(b"\xc1\xc1");
        assert_eq!(Envelope::decode(&more), Ok(EVENT), "bytes behind it");

        // Integers in any form that holds them.
        let mut long = map(&[0, 2, 3, 4]);
        long[0] = 0x85;
        long.extend_from_slice(b"\xa8sequence\xd3\0\0\0\0\0\0\0\0");
        assert_eq!(Envelope::decode(&long), Ok(EVENT), "a signed zero");
    }

    /// Each row of the table that is rejected, and what serde rejects besides.
    #[test]
    fn what_dynamo_rejects() {
        let mut numbers = map(&[0, 1, 2, 3]);
        numbers[0] = 0x85;
        numbers.extend_from_slice(b"\xa7payload\x93\x01\x02\x03");
        let error = Envelope::decode(&numbers).unwrap_err();
        assert_eq!(error, EventError::WrongType("payload"));

        let json = br#"{"publisher_id":1}"#;
        let error = Envelope::decode(json).unwrap_err();
        assert_eq!(error, EventError::WrongType("the envelope"));
        assert_eq!(error.to_string(), "event: the envelope has the wrong type");

        // A frame where a bare envelope belongs.
        let mut framed = vec![];
        frame::write(&bytes(&EVENT), &mut framed).unwrap();
        let error = Envelope::decode(&framed).unwrap_err();
        assert_eq!(error, EventError::WrongType("the envelope"));

        let error = Envelope::decode(&map(&[0, 1, 2, 3])).unwrap_err();
        assert_eq!(error, EventError::Missing("payload"));
        let error = Envelope::decode(&map(&[0, 1, 2, 3, 4, 1])).unwrap_err();
        assert_eq!(error, EventError::Repeated("sequence"));
        let error = Envelope::decode(b"\x96\0\0\0\xa0\xc4\0\0").unwrap_err();
        assert_eq!(error, EventError::TooMany("the envelope"));
        let error = Envelope::decode(b"\x92\0\0").unwrap_err();
        assert_eq!(error, EventError::Missing("published_at"));
        let error = Envelope::decode(b"\x95\xff\0\0\xa0\xa0").unwrap_err();
        assert_eq!(error, EventError::WrongType("publisher_id"));
        let error = Envelope::decode(b"\x95\0\0\0\xa1\xff\xa0").unwrap_err();
        assert_eq!(error, EventError::NotUtf8("topic"));
        for cut in 0..bytes(&EVENT).len() {
            let error = Envelope::decode(&bytes(&EVENT)[..cut]).unwrap_err();
            let truncated = matches!(error, EventError::MsgPack(MsgPackError::Truncated { .. }));
            assert!(truncated, "{cut}: {error}");
        }
    }

    #[test]
    fn lengths_take_their_shortest_form() {
        for (value, len) in [
            (0, 1),
            (0x7f, 1),
            (0x80, 2),
            (0xff, 2),
            (0x100, 3),
            (0xffff, 3),
            (0x1_0000, 5),
            (0xffff_ffff, 5),
            (1 << 32, 9),
            (u64::MAX, 9),
        ] {
            let mut out = vec![];
            write_uint(value, &mut out);
            assert_eq!(out.len(), len, "{value}");
            assert_eq!(Reader::new(&out).uint(), Ok(Some(value)));
        }
        for len in [0, 31, 32, 255, 256, 65_535, 65_536] {
            let topic = "t".repeat(len);
            let payload = vec![7; len];
            let envelope = Envelope {
                topic: &topic,
                payload: &payload,
                ..EVENT
            };
            let written = bytes(&envelope);
            assert_eq!(Envelope::decode(&written), Ok(envelope), "{len}");
            assert!(written.len() <= ENVELOPE_BYTES_OVERHEAD_MAX + 2 * len);
        }
    }
}
