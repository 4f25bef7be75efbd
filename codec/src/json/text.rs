//! JSON strings, borrowed as they were written.

use std::borrow::Cow;
use std::fmt;

use super::scan::{self, Met};

/// The content of a JSON string between its quotes, still escaped. It is known to be UTF-8 and
/// every escape in it is known to be a whole character, so reading it cannot fail.
#[derive(Clone, Copy)]
pub struct Text<'a> {
    /// UTF-8. It is made a `str` where it is asked for, which names seldom are.
    raw: &'a [u8],
    escaped: bool,
}

/// The unescaped text does not fit the buffer that was given for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("text is longer than the {have_bytes} bytes given for it")]
pub struct TooLong {
    /// Size of the buffer.
    pub have_bytes: usize,
}

impl<'a> Text<'a> {
    /// Takes the bytes between the quotes of a string that was scanned, and what was met there.
    /// `None` if they are not UTF-8 or hold half of a surrogate pair.
    pub(super) fn new(raw: &'a [u8], met: Met) -> Option<Self> {
        if met.wide {
            std::str::from_utf8(raw).ok()?;
        }
        let mut rest = if met.number { raw } else { &[] };
        while let Some(at) = rest.iter().position(|byte| *byte == b'\\') {
            let (_, bytes) = unescape(&rest[at..])?;
            rest = &rest[at + bytes..];
        }
        Some(Self {
            raw,
            escaped: met.escape,
        })
    }

    /// The text as written, escapes included.
    #[must_use]
    pub fn raw(&self) -> &'a str {
        // It is UTF-8, or there would be no text.
        std::str::from_utf8(self.raw).unwrap_or_default()
    }

    /// The text itself, if no escape stands in the way.
    #[must_use]
    pub fn as_str(&self) -> Option<&'a str> {
        (!self.escaped).then(|| self.raw())
    }

    /// The characters of the unescaped text.
    #[must_use]
    pub fn chars(&self) -> Chars<'a> {
        Chars { rest: self.raw() }
    }

    /// True if the text has no characters.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.raw.is_empty()
    }

    /// Writes the unescaped text to the start of `out`.
    ///
    /// # Errors
    /// `out` is too short; what it holds then is not specified.
    pub fn unescape_into<'out>(&self, out: &'out mut [u8]) -> Result<&'out str, TooLong> {
        let too_long = TooLong {
            have_bytes: out.len(),
        };
        let raw = self.raw;
        let (mut from, mut at) = (0, 0);
        while from < raw.len() {
            let plain = match (raw[from..].first_chunk(), out[at..].first_chunk_mut()) {
                // All eight are written, those that are not plain for the next to overwrite.
                (Some(eight), Some(room)) => {
                    *room = *eight;
                    scan::plain_of_eight(*eight)
                }
                _ if raw[from] == b'\\' => 0,
                _ => {
                    put(out, at, &raw[from..=from]).ok_or(too_long)?;
                    1
                }
            };
            (from, at) = (from + plain, at + plain);
            if let Some((char, bytes)) = unescape(&raw[from..]) {
                let mut utf8 = [0; 4];
                let char = char.encode_utf8(&mut utf8).as_bytes();
                put(out, at, char).ok_or(too_long)?;
                (from, at) = (from + bytes, at + char.len());
            }
        }
        // Only whole runs of a `str` and whole characters were copied.
        Ok(std::str::from_utf8(&out[..at]).unwrap_or_default())
    }

    /// The unescaped text; borrowed if it holds no escape, else allocated.
    #[must_use]
    pub fn to_cow(&self) -> Cow<'a, str> {
        match self.as_str() {
            Some(text) => Cow::Borrowed(text),
            None => Cow::Owned(self.chars().collect()),
        }
    }
}

fn put(out: &mut [u8], at: usize, bytes: &[u8]) -> Option<()> {
    let end = at.checked_add(bytes.len())?;
    out.get_mut(at..end)?.copy_from_slice(bytes);
    Some(())
}

/// Reads the escape that `text` starts with and answers its character and its length. `None` if
/// there is no whole escape there or it is half of a surrogate pair.
fn unescape(text: &[u8]) -> Option<(char, usize)> {
    let [b'\\', kind, ..] = text else {
        return None;
    };
    let plain = match kind {
        b'"' => '"',
        b'\\' => '\\',
        b'/' => '/',
        b'b' => '\u{8}',
        b'f' => '\u{c}',
        b'n' => '\n',
        b'r' => '\r',
        b't' => '\t',
        b'u' => return unescape_hex(text),
        _ => return None,
    };
    Some((plain, 2))
}

fn unescape_hex(text: &[u8]) -> Option<(char, usize)> {
    let unit = |at: usize| {
        let digits = std::str::from_utf8(text.get(at..at + 4)?).ok()?;
        u32::from_str_radix(digits, 16).ok()
    };
    let high = unit(2)?;
    if !(0xd800..0xdc00).contains(&high) {
        return Some((char::from_u32(high)?, 6));
    }
    if text.get(6..8)? != b"\\u" {
        return None;
    }
    let low = unit(8).filter(|low| (0xdc00..0xe000).contains(low))?;
    let joined = 0x10000 + ((high - 0xd800) << 10) + (low - 0xdc00);
    Some((char::from_u32(joined)?, 12))
}

/// The characters of a [`Text`].
#[derive(Debug, Clone)]
pub struct Chars<'a> {
    rest: &'a str,
}

impl Iterator for Chars<'_> {
    type Item = char;

    fn next(&mut self) -> Option<char> {
        if let Some((char, bytes)) = unescape(self.rest.as_bytes()) {
            self.rest = &self.rest[bytes..];
            return Some(char);
        }
        let mut chars = self.rest.chars();
        let char = chars.next()?;
        self.rest = chars.as_str();
        Some(char)
    }
}

impl PartialEq<str> for Text<'_> {
    fn eq(&self, other: &str) -> bool {
        match self.escaped {
            false => self.raw == other.as_bytes(),
            true => self.chars().eq(other.chars()),
        }
    }
}

impl PartialEq<&str> for Text<'_> {
    fn eq(&self, other: &&str) -> bool {
        *self == **other
    }
}

impl PartialEq for Text<'_> {
    fn eq(&self, other: &Self) -> bool {
        match other.as_str() {
            Some(text) => *self == *text,
            None => self.chars().eq(other.chars()),
        }
    }
}

impl Eq for Text<'_> {}

impl fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use fmt::Write;
        self.chars().try_for_each(|char| f.write_char(char))
    }
}

impl fmt::Debug for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.to_cow(), f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All of it is to be looked at.
    const MET: Met = Met {
        escape: true,
        number: true,
        wide: true,
    };

    #[test]
    fn unescapes_every_way_alike() {
        let text = Text::new(br#"a\"\\\/\b\f\n\r\t\u00e9\ud83d\ude80z\u0000"#, MET).unwrap();
        let want = "a\"\\/\u{8}\u{c}\n\r\té🚀z\0";
        assert_eq!(text.to_cow(), want);
        assert_eq!(text.to_string(), want);
        assert!(text == want);
        assert!(text != "a");
        let mut buffer = [0; 64];
        assert_eq!(text.unescape_into(&mut buffer), Ok(want));
        let short = &mut buffer[..want.len() - 1];
        assert_eq!(
            text.unescape_into(short),
            Err(TooLong {
                have_bytes: want.len() - 1
            })
        );
        assert_eq!(
            Text::new("é\\n".as_bytes(), MET).unwrap(),
            Text::new(b"\\u00e9\\u000a", MET).unwrap()
        );
    }

    #[test]
    fn refuses_half_characters() {
        for bad in [
            &br"\ud83d"[..],
            br"\ud83dx",
            br"\ud83d\n",
            br"\ud83d\u0041",
            br"\ude80",
            b"\xff",
            b"\xe2\x82",
        ] {
            assert!(Text::new(bad, MET).is_none(), "{bad:?}");
        }
        let plain = |raw: &'static [u8]| Text::new(raw, Met::default()).unwrap();
        assert_eq!(plain(b"plain").as_str(), Some("plain"));
        assert_eq!(plain(b"").chars().count(), 0);
    }
}
