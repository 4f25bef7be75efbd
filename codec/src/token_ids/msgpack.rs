//! The scan of a MessagePack body.

use super::{KEY, Progress};

/// The longest head: a byte, and a length with the type of an extension or a number of 8 bytes.
const HEAD_BYTES_MAX: usize = 9;

/// What the next value is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    /// It is the body.
    Body,
    /// It is a key.
    Key,
    /// It is the value of our key.
    Value,
    /// It is the first of so many that are stepped over, and is followed by the next key, or by
    /// the value of a key that is not ours.
    Skip { values: u64, then_value: bool },
    /// It is an id.
    Id,
}

/// Bytes that belong to no head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Inside {
    /// None: a head comes next.
    Nothing,
    /// They mean nothing.
    Skipped { left: u64 },
    /// They are a key as long as ours, of which so many bytes were like it.
    Key { like: usize, left: usize },
    /// They are ids of four bytes each, of which some are gathered.
    Blob { left: u64, id: u32, bytes: u32 },
}

/// A value's head.
enum Head {
    /// A number from 0 on.
    Uint(u64),
    Nil,
    /// Text or binary of so many bytes.
    Bytes(u64),
    /// So many bytes that mean nothing.
    Other(u64),
    Array(u64),
    Map(u64),
}

/// A scan of MessagePack.
#[derive(Debug, Clone)]
pub(super) struct MsgPack {
    at: At,
    inside: Inside,
    /// Members of the body that have not been begun.
    members: u64,
    /// Ids that have not been taken.
    ids: u64,
    head: [u8; HEAD_BYTES_MAX],
    head_bytes: usize,
}

impl MsgPack {
    pub(super) fn new() -> Self {
        Self {
            at: At::Body,
            inside: Inside::Nothing,
            members: 0,
            ids: 0,
            head: [0; HEAD_BYTES_MAX],
            head_bytes: 0,
        }
    }

    pub(super) fn push(
        &mut self,
        mut bytes: &[u8],
        take: &mut impl FnMut(u32) -> bool,
    ) -> Progress {
        while !bytes.is_empty() {
            let progress = match self.inside {
                Inside::Nothing if self.at == At::Id && self.head_bytes == 0 => {
                    self.ids(&mut bytes, take)
                }
                Inside::Nothing => self.gather(&mut bytes, take),
                inside => self.inside(inside, &mut bytes, take),
            };
            if progress != Progress::More {
                return progress;
            }
        }
        Progress::More
    }

    /// The usual forms of ids, as long as they lie whole in this piece; another one by its head.
    fn ids(&mut self, bytes: &mut &[u8], take: &mut impl FnMut(u32) -> bool) -> Progress {
        while self.ids > 0 {
            let (id, rest) = match **bytes {
                [id @ 0..=0x7f, ref rest @ ..] => (u32::from(id), rest),
                [0xcc, id, ref rest @ ..] => (u32::from(id), rest),
                [0xcd, a, b, ref rest @ ..] => (u32::from(u16::from_be_bytes([a, b])), rest),
                [0xce, a, b, c, d, ref rest @ ..] => (u32::from_be_bytes([a, b, c, d]), rest),
                _ => return self.gather(bytes, take),
            };
            *bytes = rest;
            self.ids -= 1;
            if !take(id) {
                return Progress::Done;
            }
        }
        Progress::Done
    }

    /// Takes bytes of a head, and acts when it is whole.
    fn gather(&mut self, bytes: &mut &[u8], take: &mut impl FnMut(u32) -> bool) -> Progress {
        while let [byte, rest @ ..] = bytes {
            self.head[self.head_bytes] = *byte;
            self.head_bytes += 1;
            *bytes = rest;
            if self.head_bytes > head_bytes(self.head[0]) {
                let head = self.head();
                self.head_bytes = 0;
                return match head {
                    Some(head) => self.act(head, take),
                    None => Progress::Bad,
                };
            }
        }
        Progress::More
    }

    /// What a whole head says; `None` for the byte that MessagePack never uses.
    fn head(&self) -> Option<Head> {
        let after = |bytes: usize| {
            let field = self.head[1..=bytes].iter();
            field.fold(0_u64, |value, byte| value << 8 | u64::from(*byte))
        };
        let signed = |bytes: usize| match self.head[1] & 0x80 {
            0 => Head::Uint(after(bytes)),
            _ => Head::Other(0),
        };
        Some(match self.head[0] {
            byte @ 0x00..=0x7f => Head::Uint(byte.into()),
            byte @ 0x80..=0x8f => Head::Map(u64::from(byte & 0x0f)),
            byte @ 0x90..=0x9f => Head::Array(u64::from(byte & 0x0f)),
            byte @ 0xa0..=0xbf => Head::Bytes(u64::from(byte & 0x1f)),
            0xc0 => Head::Nil,
            0xc1 => return None,
            0xc2 | 0xc3 | 0xe0..=0xff => Head::Other(0),
            0xc4 | 0xd9 => Head::Bytes(after(1)),
            0xc5 | 0xda => Head::Bytes(after(2)),
            0xc6 | 0xdb => Head::Bytes(after(4)),
            0xc7 => Head::Other(1 + after(1)),
            0xc8 => Head::Other(1 + after(2)),
            0xc9 => Head::Other(1 + after(4)),
            // Floats: what follows the first byte was gathered with it.
            0xca | 0xcb => Head::Other(0),
            byte @ 0xcc..=0xcf => Head::Uint(after(1 << (byte - 0xcc))),
            byte @ 0xd0..=0xd3 => signed(1 << (byte - 0xd0)),
            byte @ 0xd4..=0xd8 => Head::Other(1 + (1 << (byte - 0xd4))),
            0xdc => Head::Array(after(2)),
            0xdd => Head::Array(after(4)),
            0xde => Head::Map(after(2)),
            0xdf => Head::Map(after(4)),
        })
    }

    fn act(&mut self, head: Head, take: &mut impl FnMut(u32) -> bool) -> Progress {
        match (self.at, head) {
            (At::Body, Head::Map(members)) => {
                self.members = members;
                self.next_member()
            }
            (At::Key, Head::Bytes(bytes)) if bytes == KEY.len() as u64 => {
                self.inside = Inside::Key {
                    like: 0,
                    left: KEY.len(),
                };
                Progress::More
            }
            (At::Key, head) => {
                self.at = At::Skip {
                    values: 1,
                    then_value: true,
                };
                self.skip(head)
            }
            (At::Value, Head::Nil) => Progress::Absent,
            (At::Value, Head::Array(0) | Head::Bytes(0)) => Progress::Done,
            (At::Value, Head::Array(ids)) => {
                (self.at, self.ids) = (At::Id, ids);
                Progress::More
            }
            (At::Value, Head::Bytes(left)) => {
                self.inside = Inside::Blob {
                    left,
                    id: 0,
                    bytes: 0,
                };
                Progress::More
            }
            (At::Skip { .. }, head) => self.skip(head),
            (At::Id, Head::Uint(id)) => match u32::try_from(id) {
                Ok(id) => {
                    self.ids -= 1;
                    match take(id) && self.ids > 0 {
                        true => Progress::More,
                        false => Progress::Done,
                    }
                }
                Err(_) => Progress::Bad,
            },
            _ => Progress::Bad,
        }
    }

    /// A head of a value that is stepped over.
    fn skip(&mut self, head: Head) -> Progress {
        let At::Skip { values, then_value } = self.at else {
            return Progress::Bad;
        };
        let (bytes, nested) = match head {
            Head::Uint(_) | Head::Nil => (0, 0),
            Head::Bytes(bytes) | Head::Other(bytes) => (bytes, 0),
            Head::Array(values) => (0, values),
            Head::Map(members) => (0, 2 * members),
        };
        // Each level adds at most 2^33 and takes a byte of input, so this cannot overflow.
        let values = values - 1 + nested;
        self.at = At::Skip { values, then_value };
        if bytes > 0 {
            self.inside = Inside::Skipped { left: bytes };
            return Progress::More;
        }
        self.skipped()
    }

    /// A value, or a part of one, has been stepped over.
    fn skipped(&mut self) -> Progress {
        match self.at {
            At::Skip {
                values: 0,
                then_value: true,
            } => {
                self.at = At::Skip {
                    values: 1,
                    then_value: false,
                };
                Progress::More
            }
            At::Skip { values: 0, .. } => self.next_member(),
            _ => Progress::More,
        }
    }

    fn next_member(&mut self) -> Progress {
        if self.members == 0 {
            return Progress::Absent;
        }
        self.members -= 1;
        self.at = At::Key;
        Progress::More
    }

    /// Takes bytes that belong to no head.
    fn inside(
        &mut self,
        inside: Inside,
        bytes: &mut &[u8],
        take: &mut impl FnMut(u32) -> bool,
    ) -> Progress {
        match inside {
            Inside::Nothing => Progress::More,
            Inside::Skipped { left } => {
                let here = left.min(bytes.len() as u64);
                *bytes = &bytes[here as usize..];
                if left > here {
                    self.inside = Inside::Skipped { left: left - here };
                    return Progress::More;
                }
                self.inside = Inside::Nothing;
                self.skipped()
            }
            Inside::Key { like, left } => {
                let here = left.min(bytes.len());
                let begin = KEY.len() - left;
                let same = bytes[..here] == KEY[begin..begin + here];
                let like = if same { like + here } else { like };
                *bytes = &bytes[here..];
                if left > here {
                    let left = left - here;
                    self.inside = Inside::Key { like, left };
                    return Progress::More;
                }
                self.inside = Inside::Nothing;
                self.at = match like == KEY.len() {
                    true => At::Value,
                    false => At::Skip {
                        values: 1,
                        then_value: false,
                    },
                };
                Progress::More
            }
            Inside::Blob { left, id, bytes: n } => self.blob((left, id, n), bytes, take),
        }
    }

    fn blob(
        &mut self,
        (mut left, mut id, mut gathered): (u64, u32, u32),
        bytes: &mut &[u8],
        take: &mut impl FnMut(u32) -> bool,
    ) -> Progress {
        while let [byte, rest @ ..] = bytes {
            *bytes = rest;
            id |= u32::from(*byte) << (8 * gathered);
            (gathered, left) = (gathered + 1, left - 1);
            if gathered == 4 {
                if !take(id) {
                    return Progress::Done;
                }
                (id, gathered) = (0, 0);
            }
            if left == 0 {
                return Progress::Done;
            }
        }
        self.inside = Inside::Blob {
            left,
            id,
            bytes: gathered,
        };
        Progress::More
    }
}

/// Bytes of a head behind its first.
fn head_bytes(first: u8) -> usize {
    match first {
        0xc4 | 0xc7 | 0xcc | 0xd0 | 0xd9 => 1,
        0xc5 | 0xc8 | 0xcd | 0xd1 | 0xda | 0xdc | 0xde => 2,
        0xc6 | 0xc9 | 0xca | 0xce | 0xd2 | 0xdb | 0xdd | 0xdf => 4,
        0xcb | 0xcf | 0xd3 => 8,
        _ => 0,
    }
}
