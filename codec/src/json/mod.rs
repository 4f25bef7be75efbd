//! A JSON scanner that walks members and borrows values: no allocation, no recursion, no tree.
//!
//! A [`Value`] has been checked to be one well-formed JSON value before it is handed out, so
//! readers may ignore members of any shape. Strings become [`Text`] when they are asked for.

mod scan;
mod text;
mod write;

use std::ops::Range;

pub use text::{Chars, Text, TooLong};
pub use write::{MapWriter, decimal, write_string};
pub(crate) use write::{escape, write_u64};

/// Why bytes are not the JSON that was asked for; `at` is an offset into the scanned input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum JsonError {
    /// The input ends inside a value.
    #[error("JSON ends too early, at byte {at}")]
    Truncated {
        /// Length of the input.
        at: usize,
    },
    /// A byte that JSON does not allow there.
    #[error("JSON is malformed at byte {at}")]
    Syntax {
        /// The offending byte.
        at: usize,
    },
    /// Bytes other than blanks follow the value.
    #[error("bytes follow the JSON value, at byte {at}")]
    Trailing {
        /// The first of them.
        at: usize,
    },
    /// Arrays and objects are nested deeper than [`crate::limits::NESTING_MAX`].
    #[error("JSON is nested too deeply at byte {at}")]
    TooDeep {
        /// The bracket that is one too many.
        at: usize,
    },
    /// The value is well-formed but of another kind than asked for.
    #[error("JSON value at byte {at} has the wrong type")]
    Type {
        /// Start of the value.
        at: usize,
    },
    /// A string is not UTF-8, or escapes half of a surrogate pair.
    #[error("JSON string at byte {at} is not Unicode text")]
    NotText {
        /// Start of the string.
        at: usize,
    },
}

/// The kinds of JSON values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `null`
    Null,
    /// `true` or `false`
    Bool,
    /// Any number.
    Number,
    /// Any string.
    String,
    /// `[...]`
    Array,
    /// `{...}`
    Object,
}

/// One well-formed JSON value, borrowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Value<'a> {
    raw: &'a [u8],
    at: usize,
    /// If it is a string.
    met: scan::Met,
}

impl<'a> Value<'a> {
    /// Checks that `input` is exactly one JSON value, blanks around it allowed.
    ///
    /// # Errors
    /// It is not.
    pub fn parse(input: &'a [u8]) -> Result<Self, JsonError> {
        let start = scan::blanks(input, 0);
        let (end, met) = scan::value_met(input, start)?;
        scan::end(input, end)?;
        Ok(Self {
            raw: &input[start..end],
            at: start,
            met,
        })
    }

    /// The bytes of the value, without blanks around them.
    #[must_use]
    pub fn raw(&self) -> &'a [u8] {
        self.raw
    }

    /// Where the value lies in the input that was walked.
    #[must_use]
    pub fn range(&self) -> Range<usize> {
        self.at..self.at + self.raw.len()
    }

    /// What kind of value it is.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self.raw.first() {
            Some(b'n') => Kind::Null,
            Some(b't' | b'f') => Kind::Bool,
            Some(b'"') => Kind::String,
            Some(b'[') => Kind::Array,
            Some(b'{') => Kind::Object,
            _ => Kind::Number,
        }
    }

    /// True for `null`.
    #[must_use]
    pub fn is_null(&self) -> bool {
        self.kind() == Kind::Null
    }

    /// The boolean.
    ///
    /// # Errors
    /// The value is of another kind.
    pub fn bool(&self) -> Result<bool, JsonError> {
        match self.raw {
            b"true" => Ok(true),
            b"false" => Ok(false),
            _ => Err(JsonError::Type { at: self.at }),
        }
    }

    /// The number, if it is written as a plain non-negative integer of at most 64 bits.
    ///
    /// # Errors
    /// Any other value.
    pub fn u64(&self) -> Result<u64, JsonError> {
        let wrong = JsonError::Type { at: self.at };
        let mut number = 0_u64;
        for byte in self.raw {
            let digit = byte.wrapping_sub(b'0');
            if digit > 9 {
                return Err(wrong);
            }
            number = number
                .checked_mul(10)
                .and_then(|number| number.checked_add(u64::from(digit)))
                .ok_or(wrong)?;
        }
        Ok(number)
    }

    /// The string.
    ///
    /// # Errors
    /// The value is of another kind, or not Unicode text.
    pub fn text(&self) -> Result<Text<'a>, JsonError> {
        if self.kind() != Kind::String {
            return Err(JsonError::Type { at: self.at });
        }
        let raw = &self.raw[1..self.raw.len() - 1];
        Text::new(raw, self.met).ok_or(JsonError::NotText { at: self.at })
    }

    /// The members of the object.
    ///
    /// # Errors
    /// The value is of another kind.
    pub fn object(&self) -> Result<Object<'a>, JsonError> {
        if self.kind() != Kind::Object {
            return Err(JsonError::Type { at: self.at });
        }
        Ok(Object(Walk::new(self.raw, 1, self.at)))
    }

    /// The elements of the array.
    ///
    /// # Errors
    /// The value is of another kind.
    pub fn array(&self) -> Result<Array<'a>, JsonError> {
        if self.kind() != Kind::Array {
            return Err(JsonError::Type { at: self.at });
        }
        Ok(Array(Walk::new(self.raw, 1, self.at)))
    }
}

/// Position inside an open array or object.
#[derive(Debug, Clone)]
struct Walk<'a> {
    input: &'a [u8],
    /// Next byte to look at; `usize::MAX` once the end or an error was met.
    next: usize,
    /// Offset of `input` in what the caller walks.
    base: usize,
    first: bool,
}

const DONE: usize = usize::MAX;

impl<'a> Walk<'a> {
    fn new(input: &'a [u8], next: usize, base: usize) -> Self {
        Self {
            input,
            next,
            base,
            first: true,
        }
    }

    fn whole(input: &'a [u8], open: u8) -> Result<Self, JsonError> {
        let start = scan::blanks(input, 0);
        match input.get(start) {
            Some(byte) if *byte == open => Ok(Self::new(input, start + 1, 0)),
            Some(_) => Err(JsonError::Type { at: start }),
            None => Err(JsonError::Truncated { at: start }),
        }
    }

    /// Steps over a comma, or ends at `close`. At the end only blanks may follow.
    fn step(&mut self, close: u8) -> Result<bool, JsonError> {
        if self.next == DONE {
            return Ok(false);
        }
        let at = scan::blanks(self.input, self.next);
        self.next = DONE;
        let byte = scan::byte(self.input, at)?;
        if byte == close {
            scan::end(self.input, at + 1)?;
            return Ok(false);
        }
        let first = std::mem::take(&mut self.first);
        if !first && byte != b',' {
            return Err(JsonError::Syntax { at });
        }
        self.next = scan::blanks(self.input, at + usize::from(!first));
        Ok(true)
    }

    fn value(&mut self) -> Result<Value<'a>, JsonError> {
        let start = std::mem::replace(&mut self.next, DONE);
        let (end, met) = scan::value_met(self.input, start)?;
        self.next = end;
        Ok(Value {
            raw: &self.input[start..end],
            at: self.base + start,
            met,
        })
    }

    fn shift(&self, error: JsonError) -> JsonError {
        scan::shift(error, self.base)
    }
}

/// One member of an object.
#[derive(Debug, Clone, Copy)]
pub struct Member<'a> {
    /// Its name.
    pub key: Text<'a>,
    /// Its value.
    pub value: Value<'a>,
}

/// Walks the members of one object, in the order they are written; repeated names come twice.
#[derive(Debug, Clone)]
pub struct Object<'a>(Walk<'a>);

impl<'a> Object<'a> {
    /// Starts on an input that is exactly one object, blanks around it allowed. What follows the
    /// object is checked when the walk reaches its end.
    ///
    /// # Errors
    /// The input does not start with an object.
    pub fn open(input: &'a [u8]) -> Result<Self, JsonError> {
        Walk::whole(input, b'{').map(Self)
    }

    /// The next member; `None` after the last, and after an error.
    ///
    /// # Errors
    /// The object is malformed there, or bytes follow it.
    pub fn next_member(&mut self) -> Result<Option<Member<'a>>, JsonError> {
        self.member().map_err(|error| self.0.shift(error))
    }

    fn member(&mut self) -> Result<Option<Member<'a>>, JsonError> {
        let walk = &mut self.0;
        if !walk.step(b'}')? {
            return Ok(None);
        }
        let start = std::mem::replace(&mut walk.next, DONE);
        if scan::byte(walk.input, start)? != b'"' {
            return Err(JsonError::Syntax { at: start });
        }
        let (end, met) = scan::string(walk.input, start)?;
        let key = Text::new(&walk.input[start + 1..end - 1], met);
        let key = key.ok_or(JsonError::NotText { at: start })?;
        let colon = scan::blanks(walk.input, end);
        if scan::byte(walk.input, colon)? != b':' {
            return Err(JsonError::Syntax { at: colon });
        }
        walk.next = scan::blanks(walk.input, colon + 1);
        // `Value::at` already counts from the walk's base.
        let value = walk.value()?;
        Ok(Some(Member { key, value }))
    }
}

/// Walks the elements of one array.
#[derive(Debug, Clone)]
pub struct Array<'a>(Walk<'a>);

impl<'a> Array<'a> {
    /// Starts on an input that is exactly one array, blanks around it allowed.
    ///
    /// # Errors
    /// The input does not start with an array.
    pub fn open(input: &'a [u8]) -> Result<Self, JsonError> {
        Walk::whole(input, b'[').map(Self)
    }

    /// The next element; `None` after the last, and after an error.
    ///
    /// # Errors
    /// The array is malformed there, or bytes follow it.
    pub fn next_element(&mut self) -> Result<Option<Value<'a>>, JsonError> {
        self.element().map_err(|error| self.0.shift(error))
    }

    fn element(&mut self) -> Result<Option<Value<'a>>, JsonError> {
        if !self.0.step(b']')? {
            return Ok(None);
        }
        self.0.value().map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn members(input: &[u8]) -> Result<Vec<(String, &[u8])>, JsonError> {
        let mut object = Object::open(input)?;
        let mut out = vec![];
        while let Some(member) = object.next_member()? {
            out.push((member.key.to_cow().into_owned(), member.value.raw()));
        }
        assert!(object.next_member().unwrap().is_none(), "the end is stable");
        Ok(out)
    }

    #[test]
    fn walks_members_of_every_kind() {
        let input = br#" { "a" : 1 , "b\u0021":"x\"y","c":[1,{"d":[]}], "e":null,"f":-1.5e+3 } "#;
        let got = members(input).unwrap();
        let want: [(&str, &[u8]); 5] = [
            ("a", b"1"),
            ("b!", br#""x\"y""#),
            ("c", br#"[1,{"d":[]}]"#),
            ("e", b"null"),
            ("f", b"-1.5e+3"),
        ];
        assert_eq!(got.len(), want.len());
        for (got, want) in got.iter().zip(want) {
            assert_eq!((got.0.as_str(), got.1), want);
        }
        assert_eq!(members(b"{}").unwrap(), []);
        let mut object = Object::open(input).unwrap();
        while let Some(member) = object.next_member().unwrap() {
            assert_eq!(&input[member.value.range()], member.value.raw());
        }
    }

    #[test]
    fn nested_ranges_count_from_the_root() {
        let input = br#" {"a":{"b":[10,20]}}"#;
        let a = Object::open(input).unwrap().next_member().unwrap().unwrap();
        let b = a.value.object().unwrap().next_member().unwrap().unwrap();
        let mut elements = b.value.array().unwrap();
        elements.next_element().unwrap();
        let twenty = elements.next_element().unwrap().unwrap();
        assert_eq!(&input[twenty.range()], b"20");
        assert_eq!(twenty.u64(), Ok(20));
        assert!(elements.next_element().unwrap().is_none());
    }

    #[test]
    fn refuses_what_is_not_json() {
        for bad in [
            "",
            " ",
            "{",
            "{]",
            "{\"a\"}",
            "{\"a\":}",
            "{\"a\":1,}",
            "{,}",
            "{\"a\":1 \"b\":2}",
            "{a:1}",
            "{\"a\":1}x",
            "{\"a\":01}",
            "{\"a\":1.}",
            "{\"a\":-}",
            "{\"a\":1e}",
            "{\"a\":tru}",
            "{\"a\":truex}",
            "{\"a\":\"\\x\"}",
            "{\"a\":\"\\u12g4\"}",
            "{\"a\":\"\n\"}",
            "{\"a\":[1,]}",
            "{\"a\":[1}",
            "{\"a\":{]}",
            "{\"a\":[}",
            "[1]",
            "{\"a\":[1 2]}",
            "{\"a\":{\"b\"}}",
            "{\"a\":{\"b\":1,}}",
            "{\"a\":{1:2}}",
        ] {
            assert!(members(bad.as_bytes()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn depth_is_bounded_without_recursion() {
        let nested = |depth: usize| {
            let mut text = "[".repeat(depth);
            text.push_str(&"]".repeat(depth));
            text
        };
        let max = crate::limits::NESTING_MAX;
        assert!(Value::parse(nested(max).as_bytes()).is_ok());
        assert_eq!(
            Value::parse(nested(max + 1).as_bytes()),
            Err(JsonError::TooDeep { at: max })
        );
        let open = "{\"a\":".repeat(1_000_000);
        assert!(matches!(
            Value::parse(open.as_bytes()),
            Err(JsonError::TooDeep { .. })
        ));
    }

    #[test]
    fn scalars_read_exactly() {
        let value = |text: &'static str| Value::parse(text.as_bytes()).unwrap();
        assert_eq!(value("18446744073709551615").u64(), Ok(u64::MAX));
        for wrong in ["18446744073709551616", "-1", "1.0", "1e3", "\"1\"", "null"] {
            assert!(value(wrong).u64().is_err(), "{wrong}");
        }
        assert_eq!(value(" true ").bool(), Ok(true));
        assert_eq!(value("false").bool(), Ok(false));
        assert!(value("null").is_null());
        assert!(value("0").text().is_err());
    }
}
