//! What a message is: a tagged map of fields, written in one fixed order and read in any.

use super::msgpack::{Bad, Cursor, Fields, Head};
use crate::lock::{Grant, LockType, State};

/// A whole number as wide as the wire can carry (from `i64::MIN` to `u64::MAX`). Whether it makes
/// sense is not the decoder's business: out of range is an error reply, not a dropped session.
pub type WireInt = i128;

/// A field that only one dialect knows: left out when empty, and no decoder minds either way.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Extra<T>(pub Option<T>);

impl<T> From<T> for Extra<T> {
    fn from(value: T) -> Extra<T> {
        Extra(Some(value))
    }
}

/// A value in a field.
pub(crate) trait Field: Sized {
    fn write(&self, out: &mut Vec<u8>);
    fn read(cursor: &mut Cursor<'_>) -> Result<Self, Bad>;
    /// Whether the whole entry is left out.
    fn is_absent(&self) -> bool {
        false
    }
    /// What a missing entry means, where that is allowed.
    fn missing() -> Option<Self> {
        None
    }
}

/// A map with known fields.
pub(crate) trait Message: Sized {
    /// The value of the entry `type`; empty where there is no such entry.
    const TAG: &'static str;
    const FIELDS: &'static [&'static str];
    fn write_map(&self, out: &mut Vec<u8>);
    fn read_map(fields: &Fields<'_>) -> Result<Self, Bad>;

    /// For strict decoders: an entry that is not a field is an error.
    fn check_known(fields: &Fields<'_>) -> Result<(), Bad> {
        let known = |key: &str| key == "type" || Self::FIELDS.contains(&key);
        match fields.iter().find(|(key, _)| !known(key)) {
            Some((key, _)) => Err(Bad::UnknownField(shortened(key))),
            None => Ok(()),
        }
    }
}

/// Words from a peer are repeated in errors, but not at any length.
pub(crate) fn shortened(word: &str) -> String {
    word.chars().take(64).collect()
}

// Writing to a `Vec` cannot fail, so the results of `rmp::encode` are dropped below.

pub(crate) fn write_map_head(out: &mut Vec<u8>, entries: usize) {
    let _ = rmp::encode::write_map_len(out, u32::try_from(entries).unwrap_or(u32::MAX));
}

pub(crate) fn write_text(out: &mut Vec<u8>, text: &str) {
    let _ = rmp::encode::write_str(out, text);
}

impl Field for bool {
    fn write(&self, out: &mut Vec<u8>) {
        let _ = rmp::encode::write_bool(out, *self);
    }
    fn read(cursor: &mut Cursor<'_>) -> Result<bool, Bad> {
        match cursor.head()? {
            Head::Bool(value) => Ok(value),
            _ => Err(Bad::Mistyped("true or false")),
        }
    }
}

impl Field for WireInt {
    fn write(&self, out: &mut Vec<u8>) {
        match (u64::try_from(*self), i64::try_from(*self)) {
            (Ok(value), _) => _ = rmp::encode::write_uint(out, value),
            (_, Ok(value)) => _ = rmp::encode::write_sint(out, value),
            _ => _ = rmp::encode::write_sint(out, i64::MIN),
        }
    }
    fn read(cursor: &mut Cursor<'_>) -> Result<WireInt, Bad> {
        match cursor.head()? {
            Head::Int(value) => Ok(value),
            _ => Err(Bad::Mistyped("a whole number")),
        }
    }
}

impl Field for u64 {
    fn write(&self, out: &mut Vec<u8>) {
        let _ = rmp::encode::write_uint(out, *self);
    }
    fn read(cursor: &mut Cursor<'_>) -> Result<u64, Bad> {
        u64::try_from(WireInt::read(cursor)?).map_err(|_| Bad::Mistyped("a number from zero up"))
    }
}

impl Field for i64 {
    fn write(&self, out: &mut Vec<u8>) {
        WireInt::from(*self).write(out);
    }
    fn read(cursor: &mut Cursor<'_>) -> Result<i64, Bad> {
        i64::try_from(WireInt::read(cursor)?).map_err(|_| Bad::Mistyped("a 64-bit number"))
    }
}

impl Field for String {
    fn write(&self, out: &mut Vec<u8>) {
        write_text(out, self);
    }
    fn read(cursor: &mut Cursor<'_>) -> Result<String, Bad> {
        cursor.text().map(str::to_owned)
    }
}

/// Opaque bytes: *bin* on the wire, never *str*.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Bytes(pub Vec<u8>);

impl Field for Bytes {
    fn write(&self, out: &mut Vec<u8>) {
        let _ = rmp::encode::write_bin(out, &self.0);
    }
    fn read(cursor: &mut Cursor<'_>) -> Result<Bytes, Bad> {
        match cursor.head()? {
            Head::Bin(len) => Ok(Bytes(cursor.take(len)?.to_vec())),
            _ => Err(Bad::Mistyped("bytes")),
        }
    }
}

impl<T: Field> Field for Option<T> {
    fn write(&self, out: &mut Vec<u8>) {
        match self {
            Some(value) => value.write(out),
            None => _ = rmp::encode::write_nil(out),
        }
    }
    fn read(cursor: &mut Cursor<'_>) -> Result<Option<T>, Bad> {
        let mut ahead = *cursor;
        if ahead.head()? == Head::Nil {
            *cursor = ahead;
            return Ok(None);
        }
        T::read(cursor).map(Some)
    }
    fn missing() -> Option<Self> {
        Some(None)
    }
}

impl<T: Field> Field for Extra<T> {
    fn write(&self, out: &mut Vec<u8>) {
        self.0.write(out);
    }
    fn read(cursor: &mut Cursor<'_>) -> Result<Extra<T>, Bad> {
        Option::read(cursor).map(Extra)
    }
    fn is_absent(&self) -> bool {
        self.0.is_none()
    }
    fn missing() -> Option<Self> {
        Some(Extra(None))
    }
}

impl<T: Field> Field for Vec<T> {
    fn write(&self, out: &mut Vec<u8>) {
        let len = u32::try_from(self.len()).unwrap_or(u32::MAX);
        let _ = rmp::encode::write_array_len(out, len);
        for element in self {
            element.write(out);
        }
    }
    fn read(cursor: &mut Cursor<'_>) -> Result<Vec<T>, Bad> {
        let Head::Array(len) = cursor.head()? else {
            return Err(Bad::Mistyped("a list"));
        };
        // Grows as elements appear: a declared length buys no memory.
        let mut list = Vec::new();
        for _ in 0..len {
            list.push(T::read(cursor)?);
        }
        Ok(list)
    }
}

/// A pair travels as a list of two.
impl<A: Field, B: Field> Field for (A, B) {
    fn write(&self, out: &mut Vec<u8>) {
        let _ = rmp::encode::write_array_len(out, 2);
        self.0.write(out);
        self.1.write(out);
    }
    fn read(cursor: &mut Cursor<'_>) -> Result<(A, B), Bad> {
        match cursor.head()? {
            Head::Array(2) => Ok((A::read(cursor)?, B::read(cursor)?)),
            _ => Err(Bad::Mistyped("a pair")),
        }
    }
}

macro_rules! word_field {
    ($($word:ty => $what:literal),+) => {$(
        impl Field for $word {
            fn write(&self, out: &mut Vec<u8>) {
                write_text(out, self.as_str());
            }
            fn read(cursor: &mut Cursor<'_>) -> Result<$word, Bad> {
                <$word>::parse(cursor.text()?).ok_or(Bad::Mistyped($what))
            }
        }
    )+};
}
word_field!(LockType => "a lock type", Grant => "a grant", State => "a state");

/// Declares messages: `"tag" Name { field: Type = default, ... }`. An empty tag makes a plain map,
/// for use inside other messages.
macro_rules! messages {
    ($(
        $(#[$doc:meta])*
        $tag:literal $name:ident {
            $( $(#[$field_doc:meta])* $field:ident : $type:ty $(= $default:expr)? ),* $(,)?
        }
    )+) => {$(
        $(#[$doc])*
        #[derive(Clone, Debug, Eq, PartialEq)]
        pub struct $name {
            $( $(#[$field_doc])* pub $field: $type, )*
        }

        impl $crate::protocol::message::Message for $name {
            const TAG: &'static str = $tag;
            const FIELDS: &'static [&'static str] = &[$(stringify!($field)),*];

            fn write_map(&self, out: &mut Vec<u8>) {
                use $crate::protocol::message::{write_map_head, write_text};
                let entries = usize::from(!$tag.is_empty())
                    $( + usize::from(!$crate::protocol::message::Field::is_absent(&self.$field)) )*;
                write_map_head(out, entries);
                if !$tag.is_empty() {
                    write_text(out, "type");
                    write_text(out, $tag);
                }
                $( if !$crate::protocol::message::Field::is_absent(&self.$field) {
                    write_text(out, stringify!($field));
                    $crate::protocol::message::Field::write(&self.$field, out);
                } )*
            }

            fn read_map(
                fields: &$crate::protocol::msgpack::Fields<'_>,
            ) -> Result<Self, $crate::protocol::msgpack::Bad> {
                // A map inside a message may leave its tag out, but may not carry another.
                if !$tag.is_empty() {
                    if let Some(tag) = fields.tag()? {
                        if tag != $tag {
                            return Err($crate::protocol::msgpack::Bad::UnknownType(
                                $crate::protocol::message::shortened(tag),
                            ));
                        }
                    }
                }
                Ok($name { $(
                    $field: match fields.find(stringify!($field)) {
                        Some(mut value) => {
                            <$type as $crate::protocol::message::Field>::read(&mut value)?
                        }
                        None => {
                            let missing: Option<$type> =
                                <$type as $crate::protocol::message::Field>::missing();
                            $( let missing = missing.or_else(|| Some($default)); )?
                            missing.ok_or($crate::protocol::msgpack::Bad::Missing(
                                stringify!($field),
                            ))?
                        }
                    },
                )* })
            }
        }

        impl $crate::protocol::message::Field for $name {
            fn write(&self, out: &mut Vec<u8>) {
                $crate::protocol::message::Message::write_map(self, out);
            }
            fn read(
                cursor: &mut $crate::protocol::msgpack::Cursor<'_>,
            ) -> Result<Self, $crate::protocol::msgpack::Bad> {
                let fields = $crate::protocol::msgpack::Fields::read(cursor)?;
                $crate::protocol::message::Message::read_map(&fields)
            }
        }
    )+};
}

/// Declares the messages of one direction: `enum Name (strict or lenient) { Variant(Message) }`.
macro_rules! direction {
    (
        $(#[$doc:meta])*
        $name:ident, strict = $strict:literal, { $($variant:ident($message:ty)),+ $(,)? }
    ) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Eq, PartialEq)]
        #[allow(missing_docs, reason = "each variant is its message, which says what it is")]
        pub enum $name {
            $( $variant($message), )+
        }

        impl $name {
            /// Reads a payload.
            ///
            /// # Errors
            /// The payload is not one of these messages.
            pub fn decode(payload: &[u8]) -> Result<$name, $crate::protocol::msgpack::Bad> {
                use $crate::protocol::message::Message;
                let fields = $crate::protocol::msgpack::Fields::of_payload(payload)?;
                let tag = fields.tag()?.unwrap_or_default();
                $( if tag == <$message>::TAG {
                    if $strict {
                        <$message>::check_known(&fields)?;
                    }
                    return <$message>::read_map(&fields).map($name::$variant);
                } )+
                Err($crate::protocol::msgpack::Bad::UnknownType(
                    $crate::protocol::message::shortened(tag),
                ))
            }

            /// Writes a whole frame.
            pub fn encode(&self) -> Vec<u8> {
                use $crate::protocol::message::Message;
                $crate::protocol::frame::build(|out| match self {
                    $( $name::$variant(message) => message.write_map(out), )+
                })
            }

            /// The tag on the wire.
            pub fn tag(&self) -> &'static str {
                use $crate::protocol::message::Message;
                match self {
                    $( $name::$variant(_) => <$message>::TAG, )+
                }
            }
        }

        $( impl From<$message> for $name {
            fn from(message: $message) -> $name {
                $name::$variant(message)
            }
        } )+
    };
}

pub(crate) use {direction, messages};
