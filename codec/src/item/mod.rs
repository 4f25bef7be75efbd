//! Response items: the wrapper `{data, complete_final}` and what it usually holds
//! (spec/request-plane.md §7.1, §7.2).
//!
//! ```text
//! JSON         {"data": DATA ,"complete_final":false}            {"complete_final":true}
//! MessagePack  82 a4 "data" DATA ae "complete_final" c2          81 ae "complete_final" c3
//! ```

mod typed;

use std::ops::Range;

pub use crate::msgpack::MsgPackError;
pub use typed::{Annotated, CodecError, StreamItem, from_bytes, write_error_frame, write_value};

use crate::control_message::PayloadCodec;
use crate::json::{Array, JsonError, Kind, Object, Value};
use crate::{msgpack, two_part};

/// The wrapper of one response message, with its data left where and as they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// Where the data lie in the body; `None` if absent or null.
    pub data: Option<Range<usize>>,
    /// True for the final marker.
    pub complete_final: bool,
}

/// Why a body is not a response item.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ItemError {
    /// Not JSON.
    #[error("response item: {0}")]
    Json(#[from] JsonError),
    /// Not MessagePack.
    #[error("response item: {0}")]
    MsgPack(#[from] MsgPackError),
    /// A member is absent; `data` may be, but not from an array.
    #[error("response item has no `{0}`")]
    Missing(&'static str),
    /// A member comes twice.
    #[error("response item has `{0}` twice")]
    Repeated(&'static str),
    /// `complete_final` is no boolean, or the whole neither map nor array.
    #[error("response item has the wrong type")]
    WrongType,
    /// An array has more elements than the wrapper has members.
    #[error("response item is an array of more than two elements")]
    TooManyElements,
}

const DATA: &str = "data";
const COMPLETE_FINAL: &str = "complete_final";

/// Finds the data and the final flag of a body. Unknown members are ignored; an array of both
/// members in order is taken too. In MessagePack, bytes after the value are ignored.
///
/// # Errors
/// See [`ItemError`].
pub fn decode(body: &[u8], codec: PayloadCodec) -> Result<Item, ItemError> {
    match codec {
        PayloadCodec::Json => decode_json(body),
        PayloadCodec::MessagePack => decode_msgpack(body),
    }
}

/// What has been met of a wrapper.
#[derive(Default)]
struct Found {
    data: Option<Option<Range<usize>>>,
    complete_final: Option<bool>,
}

impl Found {
    fn data(&mut self, data: Option<Range<usize>>) -> Result<(), ItemError> {
        match self.data.replace(data) {
            None => Ok(()),
            Some(_) => Err(ItemError::Repeated(DATA)),
        }
    }

    fn complete_final(&mut self, complete_final: bool) -> Result<(), ItemError> {
        match self.complete_final.replace(complete_final) {
            None => Ok(()),
            Some(_) => Err(ItemError::Repeated(COMPLETE_FINAL)),
        }
    }

    fn finish(self) -> Result<Item, ItemError> {
        Ok(Item {
            data: self.data.flatten(),
            complete_final: self
                .complete_final
                .ok_or(ItemError::Missing(COMPLETE_FINAL))?,
        })
    }
}

fn decode_json(body: &[u8]) -> Result<Item, ItemError> {
    let mut found = Found::default();
    match Object::open(body) {
        Ok(mut members) => {
            while let Some(member) = members.next_member()? {
                if member.key == DATA {
                    found.data(json_data(member.value))?;
                } else if member.key == COMPLETE_FINAL {
                    found.complete_final(json_bool(member.value)?)?;
                }
            }
        }
        Err(JsonError::Type { .. }) => {
            let mut elements = Array::open(body).map_err(|_| ItemError::WrongType)?;
            let data = elements.next_element()?.ok_or(ItemError::Missing(DATA))?;
            found.data(json_data(data))?;
            let last = elements.next_element()?;
            found.complete_final(json_bool(last.ok_or(ItemError::Missing(COMPLETE_FINAL))?)?)?;
            if elements.next_element()?.is_some() {
                return Err(ItemError::TooManyElements);
            }
        }
        Err(error) => return Err(error.into()),
    }
    found.finish()
}

fn json_data(value: Value<'_>) -> Option<Range<usize>> {
    (!value.is_null()).then(|| value.range())
}

fn json_bool(value: Value<'_>) -> Result<bool, ItemError> {
    if value.kind() != Kind::Bool {
        return Err(ItemError::WrongType);
    }
    Ok(value.bool()?)
}

fn decode_msgpack(body: &[u8]) -> Result<Item, ItemError> {
    let mut found = Found::default();
    let mut reader = msgpack::Reader::new(body);
    match reader.container()? {
        Some(msgpack::Container::Map(members)) => {
            for _ in 0..members {
                match reader.key()? {
                    Some(key) if key == DATA.as_bytes() => found.data(reader.data()?)?,
                    Some(key) if key == COMPLETE_FINAL.as_bytes() => {
                        let last = reader.bool()?.ok_or(ItemError::WrongType)?;
                        found.complete_final(last)?;
                    }
                    _ => reader.skip()?,
                }
            }
        }
        Some(msgpack::Container::Array(elements)) => {
            match elements {
                0 => return Err(ItemError::Missing(DATA)),
                1 => return Err(ItemError::Missing(COMPLETE_FINAL)),
                2 => {}
                _ => return Err(ItemError::TooManyElements),
            }
            found.data(reader.data()?)?;
            found.complete_final(reader.bool()?.ok_or(ItemError::WrongType)?)?;
        }
        None => return Err(ItemError::WrongType),
    }
    found.finish()
}

/// The one value that `bytes` hold, without blanks around it: what may be passed on as it is. In
/// MessagePack strings are not looked at, so a value that its reader will refuse may pass.
///
/// # Errors
/// The bytes are not a value of that codec, or more follows it.
pub fn value(bytes: &[u8], codec: PayloadCodec) -> Result<&[u8], ItemError> {
    match codec {
        PayloadCodec::Json => Ok(Value::parse(bytes)?.raw()),
        PayloadCodec::MessagePack => {
            msgpack::Reader::new(bytes).whole()?;
            Ok(bytes)
        }
    }
}

/// Members of the usual response type ([`Annotated`]).
const ANNOTATED: [&str; 5] = ["data", "id", "event", "comment", "error"];

/// Whether an item's data look like the usual response type ([`Annotated`]): a map with some of
/// its members and no other.
#[must_use]
pub fn is_annotated(data: &[u8], codec: PayloadCodec) -> bool {
    match codec {
        PayloadCodec::Json => is_annotated_json(data).unwrap_or(false),
        PayloadCodec::MessagePack => is_annotated_msgpack(data).unwrap_or(false),
    }
}

fn is_annotated_json(data: &[u8]) -> Result<bool, JsonError> {
    let mut members = Object::open(data)?;
    let mut any = false;
    while let Some(member) = members.next_member()? {
        if !ANNOTATED.iter().any(|name| member.key == *name) {
            return Ok(false);
        }
        any = true;
    }
    Ok(any)
}

fn is_annotated_msgpack(data: &[u8]) -> Result<bool, MsgPackError> {
    let mut reader = msgpack::Reader::new(data);
    let Some(msgpack::Container::Map(members)) = reader.container()? else {
        return Ok(false);
    };
    for _ in 0..members {
        match reader.key()? {
            Some(key) if ANNOTATED.iter().any(|name| key == name.as_bytes()) => reader.skip()?,
            _ => return Ok(false),
        }
    }
    Ok(members > 0)
}

/// What a JSON body has before its data.
pub const JSON_BEFORE: &[u8; 8] = b"{\"data\":";
/// What a JSON body has after its data, if it is not the last.
pub const JSON_AFTER: &[u8; 24] = b",\"complete_final\":false}";
/// What a MessagePack body has before its data.
pub const MSGPACK_BEFORE: &[u8; 6] = b"\x82\xa4data";
/// What a MessagePack body has after its data, if it is not the last.
pub const MSGPACK_AFTER: &[u8; 16] = b"\xaecomplete_final\xc2";

/// What a body has before and after its data, for writers that gather.
#[must_use]
pub const fn around(codec: PayloadCodec) -> (&'static [u8], &'static [u8]) {
    match codec {
        PayloadCodec::Json => (JSON_BEFORE, JSON_AFTER),
        PayloadCodec::MessagePack => (MSGPACK_BEFORE, MSGPACK_AFTER),
    }
}

/// Appends the body of an item that is not the last; `data` is one value encoded by `codec`.
pub fn write_body(data: &[u8], codec: PayloadCodec, out: &mut Vec<u8>) {
    let (before, after) = around(codec);
    for part in [before, data, after] {
        out.extend_from_slice(part);
    }
}

/// Appends the same as a whole two-part message.
pub fn write_frame(data: &[u8], codec: PayloadCodec, out: &mut Vec<u8>) {
    let (before, after) = around(codec);
    let body_bytes = before.len() + data.len() + after.len();
    out.extend_from_slice(&two_part::prefix(0, body_bytes));
    write_body(data, codec, out);
}

#[cfg(test)]
mod tests {
    use super::*;
    use PayloadCodec::{Json, MessagePack};

    #[test]
    fn finds_data_without_decoding_them() {
        let body = br#" {"x":[{}],"data": {"a":[1]} ,"complete_final":false,"y":null} "#;
        let item = decode(body, Json).unwrap();
        assert_eq!(&body[item.data.unwrap()], br#"{"a":[1]}"#);
        let body = br#"[{"a":1},false]"#;
        assert_eq!(
            &body[decode(body, Json).unwrap().data.unwrap()],
            br#"{"a":1}"#
        );
        let marker = Item {
            data: None,
            complete_final: true,
        };
        for body in [
            &br#"{"complete_final":true}"#[..],
            br#"{"data":null,"complete_final":true}"#,
            b"[null,true]",
        ] {
            assert_eq!(decode(body, Json), Ok(marker.clone()));
        }
        for body in [
            &b"\x81\xaecomplete_final\xc3"[..],
            b"\x92\xc0\xc3",
            b"\x92\xc0\xc3x",
        ] {
            assert_eq!(decode(body, MessagePack), Ok(marker.clone()));
        }
    }

    #[test]
    fn the_usual_type_is_known_by_its_members() {
        let error = crate::error::DynamoError::disconnected("gone");
        for codec in [Json, MessagePack] {
            let mut out = vec![];
            write_error_frame(&error, codec, &mut out);
            let message = two_part::decode(&out, None).frame().unwrap();
            let body = &out[message.body];
            let data = &body[decode(body, codec).unwrap().data.unwrap()];
            assert!(is_annotated(data, codec));
            let read: Annotated<()> = from_bytes(data, codec).unwrap();
            assert_eq!(read.to_error(), Some(error.clone()));
            assert!(!is_annotated(&data[..data.len() - 1], codec));
        }
        for other in [r#"{}"#, r#"{"i":1}"#, r#"{"data":1,"x":2}"#, "7", "[1]", ""] {
            assert!(!is_annotated(other.as_bytes(), Json), "{other}");
        }
        for other in [&b"\x80"[..], b"\x81\xa1i\x01", b"\x07", b"\x91\x01", b""] {
            assert!(!is_annotated(other, MessagePack), "{other:?}");
        }
    }

    #[test]
    fn writers_and_readers_agree() {
        for (codec, data) in [(Json, &b"{\"i\":1}"[..]), (MessagePack, b"\x81\xa1i\x01")] {
            let mut out = vec![];
            write_frame(data, codec, &mut out);
            let message = two_part::decode(&out, None).frame().unwrap();
            assert_eq!(message.frame_bytes(), out.len());
            let body = &out[message.body];
            let item = decode(body, codec).unwrap();
            assert_eq!(&body[item.data.unwrap()], data);
            assert!(!item.complete_final);
        }
    }

    #[test]
    fn a_value_is_exactly_one() {
        assert_eq!(value(b" {\"a\":[1]}\n", Json), Ok(&b"{\"a\":[1]}"[..]));
        assert_eq!(value(b"\x81\xa1a\x01", MessagePack).unwrap().len(), 4);
        for bytes in [&b""[..], b"1 2", b"{", b"\xff"] {
            assert!(value(bytes, Json).is_err());
        }
        for bytes in [&b""[..], b"\x01\x02", b"\x81\xa1a", b"\xc1", b"{}"] {
            assert!(value(bytes, MessagePack).is_err());
        }
    }

    #[test]
    fn faults_are_told_apart() {
        use ItemError::{Missing, Repeated, TooManyElements, WrongType};
        for (body, want) in [
            ("{}", Missing(COMPLETE_FINAL)),
            (r#"{"data":1}"#, Missing(COMPLETE_FINAL)),
            ("[]", Missing(DATA)),
            ("[1]", Missing(COMPLETE_FINAL)),
            ("[1,true,2]", TooManyElements),
            (r#"{"complete_final":null}"#, WrongType),
            ("5", WrongType),
            (
                r#"{"data":1,"data":2,"complete_final":true}"#,
                Repeated(DATA),
            ),
        ] {
            assert_eq!(decode(body.as_bytes(), Json), Err(want), "{body}");
        }
        assert!(matches!(decode(b"zzz", Json), Err(WrongType)));
        assert!(matches!(
            decode(b"{\"data\":", Json),
            Err(ItemError::Json(_))
        ));
        for (body, want) in [
            (&b"\x80"[..], Missing(COMPLETE_FINAL)),
            (b"\x91\xc0", Missing(COMPLETE_FINAL)),
            (b"\x93\xc0\xc3\xc0", TooManyElements),
            (b"\x81\xaecomplete_final\xc0", WrongType),
            (b"\xc0", WrongType),
            (b"\x82\xa4data\x01\xa4data\x01", Repeated(DATA)),
        ] {
            assert_eq!(decode(body, MessagePack), Err(want), "{body:?}");
        }
        assert!(matches!(
            decode(b"\xdf\xff\xff\xff\xff", MessagePack),
            Err(ItemError::MsgPack(_))
        ));
    }
}
