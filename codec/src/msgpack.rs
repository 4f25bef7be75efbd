//! Steps over MessagePack values without decoding them, without recursion and without allocation.

use std::ops::Range;

/// Why bytes are not MessagePack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MsgPackError {
    /// The input ends inside a value.
    #[error("MessagePack ends too early, at byte {at}")]
    Truncated {
        /// Where the missing part starts.
        at: usize,
    },
    /// There is more than one value.
    #[error("MessagePack goes on after its value, at byte {at}")]
    Trailing {
        /// Where the rest starts.
        at: usize,
    },
    /// The one byte that MessagePack never uses.
    #[error("MessagePack has the reserved byte 0xc1 at {at}")]
    Reserved {
        /// Where it is.
        at: usize,
    },
}

/// What opens here, with how many entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Container {
    Map(u64),
    Array(u64),
}

/// One value's head: bytes that belong to the value itself, and values nested in it.
struct Head {
    bytes: usize,
    children: u64,
}

/// A position in MessagePack.
#[derive(Debug, Clone)]
pub(crate) struct Reader<'a> {
    input: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(input: &'a [u8]) -> Self {
        Self { input, at: 0 }
    }

    fn peek(&self) -> Result<u8, MsgPackError> {
        let at = self.at;
        self.input
            .get(at)
            .copied()
            .ok_or(MsgPackError::Truncated { at })
    }

    /// The big-endian integer of `bytes` bytes after the head byte.
    fn length(&self, bytes: usize) -> Result<usize, MsgPackError> {
        let at = self.at + 1;
        let field = self
            .input
            .get(at..at + bytes)
            .ok_or(MsgPackError::Truncated { at })?;
        // At most four bytes.
        Ok(field
            .iter()
            .fold(0, |length, byte| length << 8 | usize::from(*byte)))
    }

    fn head(&self) -> Result<Head, MsgPackError> {
        let head = self.peek()?;
        let leaf = |bytes| Head { bytes, children: 0 };
        let nest = |bytes, children: usize| Head {
            bytes,
            children: children as u64,
        };
        Ok(match head {
            0x00..=0x7f | 0xe0..=0xff | 0xc0 | 0xc2 | 0xc3 => leaf(1),
            0x80..=0x8f => nest(1, 2 * usize::from(head & 0x0f)),
            0x90..=0x9f => nest(1, usize::from(head & 0x0f)),
            0xa0..=0xbf => leaf(1 + usize::from(head & 0x1f)),
            0xc1 => return Err(MsgPackError::Reserved { at: self.at }),
            0xc4 | 0xd9 => leaf(2 + self.length(1)?),
            0xc5 | 0xda => leaf(3 + self.length(2)?),
            0xc6 | 0xdb => leaf(5 + self.length(4)?),
            0xc7 => leaf(3 + self.length(1)?),
            0xc8 => leaf(4 + self.length(2)?),
            0xc9 => leaf(6 + self.length(4)?),
            0xcc | 0xd0 => leaf(2),
            0xcd | 0xd1 => leaf(3),
            0xca | 0xce | 0xd2 => leaf(5),
            0xcb | 0xcf | 0xd3 => leaf(9),
            0xd4..=0xd8 => leaf(2 + (1 << (head - 0xd4))),
            0xdc => nest(3, self.length(2)?),
            0xdd => nest(5, self.length(4)?),
            0xde => nest(3, 2 * self.length(2)?),
            0xdf => nest(5, 2 * self.length(4)?),
        })
    }

    fn advance(&mut self, bytes: usize) -> Result<&'a [u8], MsgPackError> {
        let at = self.at;
        let slice = self
            .input
            .get(at..at + bytes)
            .ok_or(MsgPackError::Truncated { at })?;
        self.at += bytes;
        Ok(slice)
    }

    /// Steps over one value, whatever is nested in it: the values still to come are only counted.
    pub(crate) fn skip(&mut self) -> Result<(), MsgPackError> {
        let mut left = 1_u64;
        while left > 0 {
            let head = self.head()?;
            self.advance(head.bytes)?;
            // Each level adds at most 2^33 and takes a byte of input, so this cannot overflow.
            left = left - 1 + head.children;
        }
        Ok(())
    }

    /// Steps over the one value that the input must be.
    pub(crate) fn whole(&mut self) -> Result<(), MsgPackError> {
        self.skip()?;
        let at = self.at;
        match at == self.input.len() {
            true => Ok(()),
            false => Err(MsgPackError::Trailing { at }),
        }
    }

    /// Enters a map or an array; `None`, and no step, at any other value.
    pub(crate) fn container(&mut self) -> Result<Option<Container>, MsgPackError> {
        let first = self.peek()?;
        let is_map = matches!(first, 0x80..=0x8f | 0xde | 0xdf);
        let is_array = matches!(first, 0x90..=0x9f | 0xdc | 0xdd);
        if !is_map && !is_array {
            return Ok(None);
        }
        let head = self.head()?;
        self.advance(head.bytes)?;
        Ok(Some(if is_map {
            Container::Map(head.children / 2)
        } else {
            Container::Array(head.children)
        }))
    }

    /// What has not been read yet.
    pub(crate) fn rest(&self) -> &'a [u8] {
        // The position never passes the end.
        self.input.get(self.at..).unwrap_or_default()
    }

    /// Steps over `expected` if it comes next.
    #[inline]
    pub(crate) fn literal<const N: usize>(&mut self, expected: &[u8; N]) -> bool {
        let found = self.rest().first_chunk::<N>() == Some(expected);
        if found {
            self.at += N;
        }
        found
    }

    /// Steps over an integer that is not negative, in whatever form; `None`, and no step, at any
    /// other value.
    #[inline]
    pub(crate) fn uint(&mut self) -> Result<Option<u64>, MsgPackError> {
        let rest = self.rest();
        if let Some(&[0xcf, ref field @ ..]) = rest.first_chunk::<9>() {
            self.at += 9;
            return Ok(Some(u64::from_be_bytes(*field)));
        }
        match self.peek()? {
            small @ 0x00..=0x7f => {
                self.at += 1;
                Ok(Some(small.into()))
            }
            head => self.sized_uint(head),
        }
    }

    /// An integer with a head byte of its own.
    fn sized_uint(&mut self, head: u8) -> Result<Option<u64>, MsgPackError> {
        let (bytes, is_signed) = match head {
            0xcc..=0xcf => (1_usize << (head - 0xcc), false),
            0xd0..=0xd3 => (1 << (head - 0xd0), true),
            _ => return Ok(None),
        };
        let at = self.at + 1;
        let field = self.input.get(at..at + bytes);
        let field = field.ok_or(MsgPackError::Truncated { at })?;
        if is_signed && field.first().is_some_and(|first| first & 0x80 != 0) {
            return Ok(None);
        }
        self.at = at + bytes;
        Ok(Some(
            field
                .iter()
                .fold(0, |value, byte| value << 8 | u64::from(*byte)),
        ))
    }

    /// Steps over a number; `None`, and no step, at any other value. Integers lose what a double
    /// cannot hold.
    pub(crate) fn float(&mut self) -> Result<Option<f64>, MsgPackError> {
        let value = match *self.rest() {
            [0xcb, a, b, c, d, e, f, g, h, ..] => f64::from_be_bytes([a, b, c, d, e, f, g, h]),
            [0xca, a, b, c, d, ..] => f32::from_be_bytes([a, b, c, d]).into(),
            [0xca | 0xcb, ..] => {
                let at = self.at + 1;
                return Err(MsgPackError::Truncated { at });
            }
            [negative @ 0xe0..=0xff, ..] => (negative as i8).into(),
            [0xd0, a, ..] => (a as i8).into(),
            [0xd1, a, b, ..] => i16::from_be_bytes([a, b]).into(),
            [0xd2, a, b, c, d, ..] => i32::from_be_bytes([a, b, c, d]).into(),
            [0xd3, a, b, c, d, e, f, g, h, ..] => {
                i64::from_be_bytes([a, b, c, d, e, f, g, h]) as f64
            }
            _ => return Ok(self.uint()?.map(|value| value as f64)),
        };
        self.skip()?;
        Ok(Some(value))
    }

    /// Steps over nil, if that is what comes.
    pub(crate) fn nil(&mut self) -> Result<bool, MsgPackError> {
        let is_nil = self.peek()? == 0xc0;
        self.at += usize::from(is_nil);
        Ok(is_nil)
    }

    /// Steps over a value and answers its bytes, head and all.
    pub(crate) fn raw(&mut self) -> Result<&'a [u8], MsgPackError> {
        let start = self.at;
        self.skip()?;
        Ok(self.input.get(start..self.at).unwrap_or_default())
    }

    /// Steps over a string or binary and answers its bytes; any other value is stepped over too,
    /// for `None`.
    pub(crate) fn key(&mut self) -> Result<Option<&'a [u8]>, MsgPackError> {
        let prefix = match self.peek()? {
            head @ 0xa0..=0xbf => {
                let end = 1 + usize::from(head & 0x1f);
                return Ok(self.advance(end)?.get(1..));
            }
            0xc4 | 0xd9 => 2,
            0xc5 | 0xda => 3,
            0xc6 | 0xdb => 5,
            _ => {
                self.skip()?;
                return Ok(None);
            }
        };
        let head = self.head()?;
        Ok(self.advance(head.bytes)?.get(prefix..))
    }

    /// Steps over a value and says where it was; `None` for nil.
    pub(crate) fn data(&mut self) -> Result<Option<Range<usize>>, MsgPackError> {
        let start = self.at;
        let is_nil = self.peek()? == 0xc0;
        self.skip()?;
        Ok((!is_nil).then_some(start..self.at))
    }

    /// Steps over a boolean; `None`, and no step, at any other value.
    pub(crate) fn bool(&mut self) -> Result<Option<bool>, MsgPackError> {
        let value = match self.peek()? {
            0xc2 => false,
            0xc3 => true,
            _ => return Ok(None),
        };
        self.at += 1;
        Ok(Some(value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn skips_every_kind_whole_and_reports_every_cut() {
        let values: Vec<Vec<u8>> = vec![
            vec![0x05],
            vec![0xff],
            vec![0xc0],
            vec![0xcc, 1],
            vec![0xcd, 1, 2],
            vec![0xce, 1, 2, 3, 4],
            vec![0xcf, 1, 2, 3, 4, 5, 6, 7, 8],
            vec![0xca, 1, 2, 3, 4],
            vec![0xcb, 1, 2, 3, 4, 5, 6, 7, 8],
            vec![0xa2, b'h', b'i'],
            vec![0xd9, 1, b'x'],
            vec![0xda, 0, 1, b'x'],
            vec![0xdb, 0, 0, 0, 1, b'x'],
            vec![0xc4, 2, 0, 0],
            vec![0xc5, 0, 1, 0],
            vec![0xc6, 0, 0, 0, 1, 0],
            vec![0xc7, 1, 9, 0],
            vec![0xc8, 0, 1, 9, 0],
            vec![0xc9, 0, 0, 0, 1, 9, 0],
            vec![0xd4, 9, 0],
            vec![0xd6, 9, 0, 0, 0, 0],
            vec![0x82, 0xa1, b'a', 0x91, 0xc0, 0x01, 0x80],
            vec![0xdc, 0, 2, 1, 2],
            vec![0xdd, 0, 0, 0, 1, 1],
            vec![0xde, 0, 1, 1, 2],
            vec![0xdf, 0, 0, 0, 1, 1, 2],
        ];
        for value in values {
            let mut followed = value.clone();
            followed.push(0xc1);
            let mut reader = Reader::new(&followed);
            reader.skip().unwrap();
            assert_eq!(reader.at, value.len(), "{value:x?}");
            for cut in 0..value.len() {
                let error = Reader::new(&value[..cut]).skip();
                assert!(
                    matches!(error, Err(MsgPackError::Truncated { .. })),
                    "{value:x?} {cut}"
                );
            }
        }
        assert_eq!(
            Reader::new(&[0xc1]).skip(),
            Err(MsgPackError::Reserved { at: 0 })
        );
    }

    #[test]
    fn depth_costs_no_stack() {
        let mut deep = vec![0x91; 1_000_000];
        deep.push(0xc0);
        assert_eq!(Reader::new(&deep).skip(), Ok(()));
    }
}
