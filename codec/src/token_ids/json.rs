//! The scan of a JSON body.

use super::{KEY, Progress};

/// Where the scan stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    /// Before the brace of the body.
    Open,
    /// Before a key, or the closing brace.
    Key,
    /// Inside a key; so many of its bytes are those of ours, or none may be any more.
    InKey { like: Option<usize> },
    /// Behind a key, before its value.
    Colon { found: bool },
    /// Before the value of our key.
    Value,
    /// Inside `null`, after so many of its bytes.
    Null { bytes: usize },
    /// Inside another member's value.
    Skip { depth: u32, in_string: bool },
    /// Before an id, or the end of the list if it is `empty`.
    Id { empty: bool },
    /// Inside an id.
    InId { value: u32 },
    /// Behind an id.
    Comma,
}

/// A scan of JSON.
#[derive(Debug, Clone)]
pub(super) struct Json {
    at: At,
    /// The byte before was a backslash that escapes this one.
    escaped: bool,
}

impl Json {
    pub(super) fn new() -> Self {
        Self {
            at: At::Open,
            escaped: false,
        }
    }

    pub(super) fn push(&mut self, bytes: &[u8], take: &mut impl FnMut(u32) -> bool) -> Progress {
        for byte in bytes {
            let progress = self.step(*byte, take);
            if progress != Progress::More {
                return progress;
            }
        }
        Progress::More
    }

    fn step(&mut self, byte: u8, take: &mut impl FnMut(u32) -> bool) -> Progress {
        let blank = matches!(byte, b' ' | b'\t' | b'\n' | b'\r');
        self.at = match (self.at, byte) {
            (At::InKey { like }, _) => return self.in_key(like, byte),
            (At::Skip { depth, in_string }, _) => return self.skip(depth, in_string, byte),
            (At::InId { value }, b'0'..=b'9') => {
                let longer = value.checked_mul(10);
                let longer = longer.and_then(|value| value.checked_add(u32::from(byte - b'0')));
                match longer {
                    Some(value) => At::InId { value },
                    None => return Progress::Bad,
                }
            }
            (At::InId { value }, _) if blank || matches!(byte, b',' | b']') => {
                if !take(value) || byte == b']' {
                    return Progress::Done;
                }
                match byte {
                    b',' => At::Id { empty: false },
                    _ => At::Comma,
                }
            }
            (_, _) if blank => return Progress::More,
            (At::Open, b'{') => At::Key,
            (At::Key, b'"') => At::InKey { like: Some(0) },
            (At::Key, b',') => At::Key,
            (At::Key, b'}') => return Progress::Absent,
            (At::Colon { found: true }, b':') => At::Value,
            (At::Colon { found: false }, b':') => At::Skip {
                depth: 0,
                in_string: false,
            },
            (At::Value, b'[') => At::Id { empty: true },
            (At::Value, b'n') => At::Null { bytes: 1 },
            (At::Null { bytes }, _) if b"null".get(bytes) == Some(&byte) => match bytes {
                3 => return Progress::Absent,
                bytes => At::Null { bytes: bytes + 1 },
            },
            (At::Id { .. }, b'0'..=b'9') => At::InId {
                value: u32::from(byte - b'0'),
            },
            (At::Id { empty: true }, b']') | (At::Comma, b']') => return Progress::Done,
            (At::Comma, b',') => At::Id { empty: false },
            _ => return Progress::Bad,
        };
        Progress::More
    }

    fn in_key(&mut self, like: Option<usize>, byte: u8) -> Progress {
        let escaped = std::mem::take(&mut self.escaped);
        self.at = match byte {
            b'"' if !escaped => At::Colon {
                found: like == Some(KEY.len()),
            },
            b'\\' if !escaped => {
                self.escaped = true;
                At::InKey { like: None }
            }
            _ => At::InKey {
                like: like
                    .filter(|like| KEY.get(*like) == Some(&byte))
                    .map(|like| like + 1),
            },
        };
        Progress::More
    }

    /// One byte of a value that is stepped over.
    fn skip(&mut self, depth: u32, in_string: bool, byte: u8) -> Progress {
        let escaped = std::mem::take(&mut self.escaped);
        self.at = match byte {
            b'\\' if in_string && !escaped => {
                self.escaped = true;
                At::Skip { depth, in_string }
            }
            b'"' if !escaped => At::Skip {
                depth,
                in_string: !in_string,
            },
            _ if in_string => At::Skip { depth, in_string },
            // A body has fewer than 2^32 bytes that matter: its scan is bounded by its reader.
            b'[' | b'{' => At::Skip {
                depth: depth.saturating_add(1),
                in_string,
            },
            b'}' if depth == 0 => return Progress::Absent,
            b']' if depth == 0 => return Progress::Bad,
            b']' | b'}' => At::Skip {
                depth: depth - 1,
                in_string,
            },
            b',' if depth == 0 => At::Key,
            _ => At::Skip { depth, in_string },
        };
        Progress::More
    }
}
