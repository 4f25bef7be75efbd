//! Reads MessagePack without building a tree: nothing is allocated but the fields that are wanted.
//!
//! Strict as `msgspec` is strict (`spec/gpu-memory.md` §4.2): text is *str*, bytes are *bin*, whole
//! numbers are never floats. Any width of number and any form of map head is accepted.

use rmp::Marker;
use thiserror::Error;

/// Why a payload is not a message. The session that sent it is dropped without an answer.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
pub enum Bad {
    /// The payload ends inside a value.
    #[error("the payload ends inside a value")]
    Truncated,
    /// Something follows the message.
    #[error("{0} bytes follow the message")]
    Trailing(usize),
    /// The payload is not a map with text keys.
    #[error("the payload is not a map with text keys")]
    NotMap,
    /// A byte that MessagePack does not use.
    #[error("0xc1 is no MessagePack marker")]
    Reserved,
    /// The tag is missing or names no message.
    #[error("no known message type: {0:?}")]
    UnknownType(String),
    /// A field without a default is missing.
    #[error("field {0} is missing")]
    Missing(&'static str),
    /// A field has the wrong type or an unknown word.
    #[error("a field is not {0}")]
    Mistyped(&'static str),
    /// A field that a strict decoder does not know.
    #[error("a field is not known: {0:?}")]
    UnknownField(String),
}

/// What a value is, and how much of it is still to come.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Head {
    Nil,
    Bool(bool),
    Int(i128),
    Float,
    Str(usize),
    Bin(usize),
    Ext(usize),
    Array(usize),
    Map(usize),
}

/// A place in a payload.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cursor<'a> {
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Cursor<'a> {
        Cursor { rest: bytes }
    }

    pub(crate) fn left(&self) -> usize {
        self.rest.len()
    }

    pub(crate) fn take(&mut self, bytes: usize) -> Result<&'a [u8], Bad> {
        let (taken, rest) = self.rest.split_at_checked(bytes).ok_or(Bad::Truncated)?;
        self.rest = rest;
        Ok(taken)
    }

    fn number<const BYTES: usize>(&mut self) -> Result<[u8; BYTES], Bad> {
        let (taken, rest) = self.rest.split_first_chunk().ok_or(Bad::Truncated)?;
        self.rest = rest;
        Ok(*taken)
    }

    fn len8(&mut self) -> Result<usize, Bad> {
        Ok(usize::from(u8::from_be_bytes(self.number()?)))
    }

    fn len16(&mut self) -> Result<usize, Bad> {
        Ok(usize::from(u16::from_be_bytes(self.number()?)))
    }

    fn len32(&mut self) -> Result<usize, Bad> {
        Ok(u32::from_be_bytes(self.number()?) as usize)
    }

    /// Reads what the next value is; text, bytes and elements follow it.
    pub(crate) fn head(&mut self) -> Result<Head, Bad> {
        let [first] = self.number()?;
        Ok(match Marker::from_u8(first) {
            Marker::Null => Head::Nil,
            Marker::True => Head::Bool(true),
            Marker::False => Head::Bool(false),
            Marker::FixPos(value) => Head::Int(value.into()),
            Marker::FixNeg(value) => Head::Int(value.into()),
            Marker::U8 => Head::Int(u8::from_be_bytes(self.number()?).into()),
            Marker::U16 => Head::Int(u16::from_be_bytes(self.number()?).into()),
            Marker::U32 => Head::Int(u32::from_be_bytes(self.number()?).into()),
            Marker::U64 => Head::Int(u64::from_be_bytes(self.number()?).into()),
            Marker::I8 => Head::Int(i8::from_be_bytes(self.number()?).into()),
            Marker::I16 => Head::Int(i16::from_be_bytes(self.number()?).into()),
            Marker::I32 => Head::Int(i32::from_be_bytes(self.number()?).into()),
            Marker::I64 => Head::Int(i64::from_be_bytes(self.number()?).into()),
            Marker::F32 => self.take(4).map(|_| Head::Float)?,
            Marker::F64 => self.take(8).map(|_| Head::Float)?,
            Marker::FixStr(len) => Head::Str(len.into()),
            Marker::Str8 => Head::Str(self.len8()?),
            Marker::Str16 => Head::Str(self.len16()?),
            Marker::Str32 => Head::Str(self.len32()?),
            Marker::Bin8 => Head::Bin(self.len8()?),
            Marker::Bin16 => Head::Bin(self.len16()?),
            Marker::Bin32 => Head::Bin(self.len32()?),
            Marker::FixArray(len) => Head::Array(len.into()),
            Marker::Array16 => Head::Array(self.len16()?),
            Marker::Array32 => Head::Array(self.len32()?),
            Marker::FixMap(len) => Head::Map(len.into()),
            Marker::Map16 => Head::Map(self.len16()?),
            Marker::Map32 => Head::Map(self.len32()?),
            // One byte of type, then the data.
            Marker::FixExt1 => Head::Ext(2),
            Marker::FixExt2 => Head::Ext(3),
            Marker::FixExt4 => Head::Ext(5),
            Marker::FixExt8 => Head::Ext(9),
            Marker::FixExt16 => Head::Ext(17),
            Marker::Ext8 => Head::Ext(self.len8()? + 1),
            Marker::Ext16 => Head::Ext(self.len16()? + 1),
            Marker::Ext32 => Head::Ext(self.len32()? + 1),
            Marker::Reserved => return Err(Bad::Reserved),
        })
    }

    /// Passes over one value with all that is in it; no recursion, so depth costs nothing.
    pub(crate) fn skip(&mut self) -> Result<(), Bad> {
        let mut values = 1_usize;
        while values > 0 {
            // Each value that is still to come takes a byte at least.
            if values > self.left() {
                return Err(Bad::Truncated);
            }
            values -= 1;
            match self.head()? {
                Head::Array(len) => values = values.saturating_add(len),
                Head::Map(len) => values = values.saturating_add(len.saturating_mul(2)),
                Head::Str(len) | Head::Bin(len) | Head::Ext(len) => {
                    self.take(len)?;
                }
                Head::Nil | Head::Bool(_) | Head::Int(_) | Head::Float => {}
            }
        }
        Ok(())
    }

    pub(crate) fn text(&mut self) -> Result<&'a str, Bad> {
        match self.head()? {
            Head::Str(len) => {
                std::str::from_utf8(self.take(len)?).map_err(|_| Bad::Mistyped("UTF-8 text"))
            }
            _ => Err(Bad::Mistyped("text")),
        }
    }
}

/// One map: the entries of a message, found by key.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fields<'a> {
    count: usize,
    entries: Cursor<'a>,
}

impl<'a> Fields<'a> {
    /// Reads a map in full, checking that it is well formed; the cursor then stands behind it.
    pub(crate) fn read(cursor: &mut Cursor<'a>) -> Result<Fields<'a>, Bad> {
        let Head::Map(count) = cursor.head()? else {
            return Err(Bad::NotMap);
        };
        let fields = Fields {
            count,
            entries: *cursor,
        };
        for _ in 0..count {
            cursor.text().map_err(|bad| match bad {
                Bad::Mistyped(_) => Bad::NotMap,
                other => other,
            })?;
            cursor.skip()?;
        }
        Ok(fields)
    }

    /// Reads a payload that is one map and nothing else.
    pub(crate) fn of_payload(payload: &'a [u8]) -> Result<Fields<'a>, Bad> {
        let mut cursor = Cursor::new(payload);
        let fields = Fields::read(&mut cursor)?;
        match cursor.left() {
            0 => Ok(fields),
            left => Err(Bad::Trailing(left)),
        }
    }

    /// Finds a value; of a repeated key the last counts.
    pub(crate) fn find(&self, key: &str) -> Option<Cursor<'a>> {
        self.iter()
            .filter(|(other, _)| *other == key)
            .last()
            .map(|(_, value)| value)
    }

    /// The tag, if there is one.
    pub(crate) fn tag(&self) -> Result<Option<&'a str>, Bad> {
        self.find("type").map(|mut value| value.text()).transpose()
    }

    /// Every entry in order. The map was checked when it was read, so none is lost.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&'a str, Cursor<'a>)> {
        let mut cursor = self.entries;
        (0..self.count).map_while(move |_| {
            let key = cursor.text().ok()?;
            let value = cursor;
            cursor.skip().ok()?;
            Some((key, value))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn declared_lengths_that_are_not_there_are_truncation() {
        for bytes in [
            &[0xdf, 0xff, 0xff, 0xff, 0xff][..],
            &[0x81, 0xa1, b'a', 0xdd, 0xff, 0xff, 0xff, 0xff],
            &[0x81, 0xa1, b'a', 0xc6, 0xff, 0xff, 0xff, 0xff],
            &[0x81, 0xdb, 0xff, 0xff, 0xff, 0xff],
        ] {
            assert_eq!(
                Fields::of_payload(bytes).err(),
                Some(Bad::Truncated),
                "{bytes:02x?}"
            );
        }
    }

    #[test]
    fn a_very_deep_value_is_passed_over() {
        let mut payload = vec![0x82, 0xa1, b'x'];
        payload.extend(std::iter::repeat_n(0x91, 500_000));
        payload.extend([0xc0, 0xa1, b'y', 0x07]);
        let fields = Fields::of_payload(&payload).expect("well formed");
        assert_eq!(fields.find("y").expect("found").head(), Ok(Head::Int(7)));
    }

    #[test]
    fn keys_must_be_text_and_nothing_may_follow() {
        assert_eq!(
            Fields::of_payload(&[0x81, 0x01, 0x02]).err(),
            Some(Bad::NotMap)
        );
        assert_eq!(Fields::of_payload(&[0x91, 0x02]).err(), Some(Bad::NotMap));
        assert_eq!(Fields::of_payload(&[]).err(), Some(Bad::Truncated));
        assert_eq!(
            Fields::of_payload(&[0x80, 0x00]).err(),
            Some(Bad::Trailing(1))
        );
        assert_eq!(Fields::of_payload(&[0xc1]).err(), Some(Bad::Reserved));
    }
}
