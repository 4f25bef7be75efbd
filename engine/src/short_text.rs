//! A text of a bounded length, kept without memory of its own.

use std::fmt;

/// Bytes of the longest one; Dynamo's ids and subjects have 36.
pub const BYTES_MAX: usize = 64;

/// A text of up to [`BYTES_MAX`] bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct ShortText {
    bytes: [u8; BYTES_MAX],
    len: u8,
}

impl ShortText {
    /// None at all.
    pub const EMPTY: ShortText = ShortText {
        bytes: [0; BYTES_MAX],
        len: 0,
    };

    /// `None` when it is too long.
    pub fn new(text: &str) -> Option<ShortText> {
        let mut bytes = [0; BYTES_MAX];
        bytes
            .get_mut(..text.len())?
            .copy_from_slice(text.as_bytes());
        Some(ShortText {
            bytes,
            len: text.len() as u8,
        })
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        // A whole `str` was copied in.
        std::str::from_utf8(&self.bytes[..usize::from(self.len)]).unwrap_or_default()
    }
}

impl fmt::Debug for ShortText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_kept_as_it_is_or_not_at_all() {
        let longest = "s".repeat(BYTES_MAX);
        assert_eq!(ShortText::new(&longest).unwrap().as_str(), longest);
        assert!(ShortText::new(&(longest + "s")).is_none());
        assert_eq!(ShortText::new("é\"").unwrap().as_str(), "é\"");
        assert_eq!(ShortText::EMPTY.as_str(), "");
    }
}
