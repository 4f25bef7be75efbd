//! Steps over JSON without looking back: each function takes a position and answers the next.

use super::JsonError;
use crate::limits::NESTING_MAX;

pub(super) fn byte(input: &[u8], at: usize) -> Result<u8, JsonError> {
    input
        .get(at)
        .copied()
        .ok_or(JsonError::Truncated { at: input.len() })
}

/// The first position from `at` on that is no blank.
pub(super) fn blanks(input: &[u8], mut at: usize) -> usize {
    while let Some(b' ' | b'\n' | b'\r' | b'\t') = input.get(at) {
        at += 1;
    }
    at
}

/// Checks that only blanks follow.
pub(super) fn end(input: &[u8], at: usize) -> Result<(), JsonError> {
    let at = blanks(input, at);
    if at == input.len() {
        return Ok(());
    }
    Err(JsonError::Trailing { at })
}

/// Adds `base` to the position in an error.
pub(super) fn shift(error: JsonError, base: usize) -> JsonError {
    match error {
        JsonError::Truncated { at } => JsonError::Truncated { at: at + base },
        JsonError::Syntax { at } => JsonError::Syntax { at: at + base },
        JsonError::Trailing { at } => JsonError::Trailing { at: at + base },
        JsonError::TooDeep { at } => JsonError::TooDeep { at: at + base },
        JsonError::Type { at } => JsonError::Type { at: at + base },
        JsonError::NotText { at } => JsonError::NotText { at: at + base },
    }
}

/// Each byte of a word alike.
const fn each(byte: u8) -> u64 {
    u64::from_ne_bytes([byte; 8])
}

/// What was met in a string that was stepped over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Met {
    /// An escape.
    pub(super) escape: bool,
    /// An escape by number, which may be half of a character.
    pub(super) number: bool,
    /// Perhaps bytes that are no ASCII; never missed where there are some.
    pub(super) wide: bool,
}

/// How many bytes at the front of eight stand for themselves in a string: none of them is a quote,
/// a backslash or a control character.
pub(super) fn plain_of_eight(bytes: [u8; 8]) -> usize {
    let word = u64::from_le_bytes(bytes);
    // A byte that underflows has its high bit set, unless it had it before. The borrow may set
    // that of the bytes behind it too, which does not matter: the first one counts.
    let below = |word: u64, bound: u8| word.wrapping_sub(each(bound)) & !word;
    let special = below(word ^ each(b'"'), 1) | below(word ^ each(b'\\'), 1) | below(word, 0x20);
    ((special & each(0x80)).trailing_zeros() / 8) as usize
}

/// Steps over the string whose opening quote is at `at`. Escapes are checked for form.
pub(super) fn string(input: &[u8], at: usize) -> Result<(usize, Met), JsonError> {
    let mut at = at + 1;
    let mut met = Met::default();
    loop {
        if let Some(eight) = input.get(at..).and_then(<[u8]>::first_chunk) {
            // Bytes that follow the string may be among them.
            met.wide |= u64::from_le_bytes(*eight) & each(0x80) != 0;
            let plain = plain_of_eight(*eight);
            at += plain;
            if plain == 8 {
                continue;
            }
        }
        match byte(input, at)? {
            b'"' => return Ok((at + 1, met)),
            b'\\' => {
                met.escape = true;
                met.number |= input.get(at + 1) == Some(&b'u');
                at = escape(input, at)?;
            }
            0..0x20 => return Err(JsonError::Syntax { at }),
            // Fewer than eight are left.
            byte => {
                met.wide |= !byte.is_ascii();
                at += 1;
            }
        }
    }
}

fn escape(input: &[u8], at: usize) -> Result<usize, JsonError> {
    match byte(input, at + 1)? {
        b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => Ok(at + 2),
        b'u' => {
            for at in at + 2..at + 6 {
                if !byte(input, at)?.is_ascii_hexdigit() {
                    return Err(JsonError::Syntax { at });
                }
            }
            Ok(at + 6)
        }
        _ => Err(JsonError::Syntax { at: at + 1 }),
    }
}

fn digits(input: &[u8], at: usize) -> Result<usize, JsonError> {
    if !byte(input, at)?.is_ascii_digit() {
        return Err(JsonError::Syntax { at });
    }
    let rest = &input[at..];
    let count = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
    Ok(at + count)
}

fn number(input: &[u8], mut at: usize) -> Result<usize, JsonError> {
    if input.get(at) == Some(&b'-') {
        at += 1;
    }
    at = if byte(input, at)? == b'0' {
        at + 1
    } else {
        digits(input, at)?
    };
    if input.get(at) == Some(&b'.') {
        at = digits(input, at + 1)?;
    }
    if let Some(b'e' | b'E') = input.get(at) {
        at += 1;
        if let Some(b'+' | b'-') = input.get(at) {
            at += 1;
        }
        at = digits(input, at)?;
    }
    Ok(at)
}

fn word(input: &[u8], at: usize, word: &[u8]) -> Result<usize, JsonError> {
    for (offset, want) in word.iter().enumerate() {
        if byte(input, at + offset)? != *want {
            return Err(JsonError::Syntax { at: at + offset });
        }
    }
    Ok(at + word.len())
}

/// Steps over a value that is neither array nor object.
fn scalar(input: &[u8], at: usize) -> Result<usize, JsonError> {
    match byte(input, at)? {
        b'"' => Ok(string(input, at)?.0),
        b'n' => word(input, at, b"null"),
        b't' => word(input, at, b"true"),
        b'f' => word(input, at, b"false"),
        _ => number(input, at),
    }
}

/// Steps over a member's name and colon, to its value.
fn name(input: &[u8], at: usize) -> Result<usize, JsonError> {
    if byte(input, at)? != b'"' {
        return Err(JsonError::Syntax { at });
    }
    let colon = blanks(input, string(input, at)?.0);
    if byte(input, colon)? != b':' {
        return Err(JsonError::Syntax { at: colon });
    }
    Ok(blanks(input, colon + 1))
}

/// Steps over any value. What is open is kept as one bit per level (1 = object), so depth costs
/// no stack.
pub(super) fn value(input: &[u8], mut at: usize) -> Result<usize, JsonError> {
    let mut depth = 0_usize;
    let mut objects = 0_u128;
    loop {
        let opened = byte(input, at)?;
        if opened == b'[' || opened == b'{' {
            if depth == NESTING_MAX {
                return Err(JsonError::TooDeep { at });
            }
            depth += 1;
            objects = objects << 1 | u128::from(opened == b'{');
            at = blanks(input, at + 1);
            let close = if opened == b'{' { b'}' } else { b']' };
            if byte(input, at)? != close {
                if opened == b'{' {
                    at = name(input, at)?;
                }
                continue;
            }
            at += 1;
            depth -= 1;
            objects >>= 1;
        } else {
            at = scalar(input, at)?;
        }
        // A value has ended: close what ends with it, up to the next comma.
        loop {
            if depth == 0 {
                return Ok(at);
            }
            at = blanks(input, at);
            let in_object = objects & 1 == 1;
            match byte(input, at)? {
                b',' => {
                    at = blanks(input, at + 1);
                    if in_object {
                        at = name(input, at)?;
                    }
                    break;
                }
                b'}' if in_object => {}
                b']' if !in_object => {}
                _ => return Err(JsonError::Syntax { at }),
            }
            at += 1;
            depth -= 1;
            objects >>= 1;
        }
    }
}

/// The same, and what was met if it is a string.
pub(super) fn value_met(input: &[u8], at: usize) -> Result<(usize, Met), JsonError> {
    match input.get(at) {
        Some(b'"') => string(input, at),
        _ => Ok((value(input, at)?, Met::default())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Byte by byte.
    fn simply(input: &[u8]) -> Result<usize, JsonError> {
        let mut at = 1;
        loop {
            match byte(input, at)? {
                b'"' => return Ok(at + 1),
                b'\\' => at = escape(input, at)?,
                0..0x20 => return Err(JsonError::Syntax { at }),
                _ => at += 1,
            }
        }
    }

    /// Every byte at every place, with a quote at every place behind it or none.
    #[test]
    fn strings_end_where_they_end_byte_by_byte() {
        let odd = [b'!', b'#', b'[', b']', 0x7f, 0x80, 0x9f, 0xa2, 0xdc, 0xff];
        for fill in odd.into_iter().chain(*b"an") {
            for byte in 0..=u8::MAX {
                for at in 1..20 {
                    for quote in at..=20 {
                        let mut input = [fill; 20];
                        input[at] = byte;
                        if let Some(byte) = input.get_mut(quote) {
                            *byte = b'"';
                        }
                        let got = string(&input, 0);
                        assert_eq!(got.map(|(end, _)| end), simply(&input), "{input:?}");
                        let Ok((end, met)) = got else { continue };
                        assert_eq!(met.escape, input[1..end].contains(&b'\\'), "{input:?}");
                        assert!(met.wide || input[1..end].is_ascii(), "{input:?}");
                        assert!(!met.number);
                    }
                }
            }
        }
        let (end, met) = string(br#""\u0041""#, 0).unwrap();
        assert!(end == 8 && met.escape && met.number && !met.wide);
    }
}
