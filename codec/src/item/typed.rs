//! Typed forms of items, for those who make or read the data themselves. These allocate.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::control_message::PayloadCodec;
use crate::error::DynamoError;
use crate::limits::NESTING_MAX;

/// The wrapper of one response message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(bound(deserialize = "T: Deserialize<'de>"))]
pub struct StreamItem<T> {
    /// The engine's response; left out when there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<T>,
    /// True for the final marker.
    pub complete_final: bool,
}

impl<T> StreamItem<T> {
    /// An item that is not the last.
    #[must_use]
    pub fn new(data: T) -> Self {
        Self {
            data: Some(data),
            complete_final: false,
        }
    }

    /// The final marker.
    #[must_use]
    pub fn final_marker() -> Self {
        Self {
            data: None,
            complete_final: true,
        }
    }
}

/// The usual response type: data, or an annotation, or an error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(bound(deserialize = "T: Deserialize<'de>"))]
pub struct Annotated<T> {
    /// The data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<T>,
    /// An id of the event.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The event's name; `error` makes this item an error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event: Option<String>,
    /// Texts; an annotation's value is the first, as JSON.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comment: Option<Vec<String>>,
    /// The error, if this item is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<DynamoError>,
}

/// The event that makes an item an error.
const ERROR_EVENT: &str = "error";

impl<T> Annotated<T> {
    const EMPTY: Self = Self {
        data: None,
        id: None,
        event: None,
        comment: None,
        error: None,
    };

    /// Plain data.
    #[must_use]
    pub fn from_data(data: T) -> Self {
        Self {
            data: Some(data),
            ..Self::EMPTY
        }
    }

    /// An error item. The stream goes on after it.
    #[must_use]
    pub fn from_error(error: DynamoError) -> Self {
        Self {
            event: Some(ERROR_EVENT.to_owned()),
            error: Some(error),
            ..Self::EMPTY
        }
    }

    /// A named value beside the data.
    ///
    /// # Errors
    /// The value cannot be written as JSON.
    pub fn annotation(name: &str, value: &impl Serialize) -> Result<Self, CodecError> {
        Ok(Self {
            event: Some(name.to_owned()),
            comment: Some(vec![serde_json::to_string(value)?]),
            ..Self::EMPTY
        })
    }

    /// The error that this item stands for, if its event says so: the typed one, else one made of
    /// the comments.
    #[must_use]
    pub fn to_error(&self) -> Option<DynamoError> {
        if self.event.as_deref() != Some(ERROR_EVENT) {
            return None;
        }
        Some(match (&self.error, &self.comment) {
            (Some(error), _) => error.clone(),
            (None, Some(comment)) => DynamoError::unknown(comment.join(", ")),
            (None, None) => DynamoError::unknown("unknown error"),
        })
    }
}

/// A value cannot be written or read by its codec.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// JSON, either way.
    #[error("JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// MessagePack, writing.
    #[error("MessagePack cannot be written: {0}")]
    MsgPackWrite(#[from] rmp_serde::encode::Error),
    /// MessagePack, reading.
    #[error("MessagePack cannot be read: {0}")]
    MsgPackRead(#[from] rmp_serde::decode::Error),
}

/// Appends a value as the codec writes it; structs are maps with string keys in both. On error
/// `out` is as before.
///
/// # Errors
/// The value has no form in that codec.
pub fn write_value<T: Serialize + ?Sized>(
    value: &T,
    codec: PayloadCodec,
    out: &mut Vec<u8>,
) -> Result<(), CodecError> {
    let start = out.len();
    let written = match codec {
        PayloadCodec::Json => serde_json::to_writer(&mut *out, value).map_err(CodecError::from),
        PayloadCodec::MessagePack => {
            rmp_serde::encode::write_named(out, value).map_err(CodecError::from)
        }
    };
    if written.is_err() {
        out.truncate(start);
    }
    written
}

/// Appends a whole message with an error item of the usual response type.
pub fn write_error_frame(error: &DynamoError, codec: PayloadCodec, out: &mut Vec<u8>) {
    let item = Annotated::<()>::from_error(error.clone());
    let mut data = Vec::with_capacity(512);
    // Texts and maps with string keys can always be written.
    if write_value(&item, codec, &mut data).is_ok() {
        super::write_frame(&data, codec, out);
    }
}

/// Reads a value as the codec wrote it; arrays in place of maps are taken too.
///
/// # Errors
/// The bytes are malformed or are not that value.
pub fn from_bytes<T: DeserializeOwned>(bytes: &[u8], codec: PayloadCodec) -> Result<T, CodecError> {
    match codec {
        PayloadCodec::Json => Ok(serde_json::from_slice(bytes)?),
        PayloadCodec::MessagePack => {
            let mut reader = rmp_serde::Deserializer::from_read_ref(bytes);
            // The reader recurses; its own bound of 1024 levels is too much for a small stack.
            reader.set_max_depth(NESTING_MAX);
            Ok(T::deserialize(&mut reader)?)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use PayloadCodec::{Json, MessagePack};

    type Value = serde_json::Value;

    #[test]
    fn writes_the_two_levels() {
        let item = StreamItem::new(Annotated::from_data(serde_json::json!({"i": 0})));
        let mut out = vec![];
        write_value(&item, Json, &mut out).unwrap();
        assert_eq!(out, br#"{"data":{"data":{"i":0}},"complete_final":false}"#);
        out.clear();
        write_value(&StreamItem::<Value>::final_marker(), MessagePack, &mut out).unwrap();
        assert_eq!(out, crate::call_home::FINAL_MARKER_MSGPACK);
    }

    #[test]
    fn errors_come_from_the_typed_one_then_comments() {
        let typed = DynamoError::disconnected("gone");
        let item = Annotated::<Value>::from_error(typed.clone());
        assert_eq!(item.to_error(), Some(typed));
        let mut item = Annotated::<Value>::annotation("error", &[1, 2]).unwrap();
        assert_eq!(item.to_error(), Some(DynamoError::unknown("[1,2]")));
        item.comment = Some(vec!["a".into(), "b".into()]);
        assert_eq!(item.to_error().unwrap().text(), "a, b");
        item.comment = None;
        assert_eq!(item.to_error().unwrap().text(), "unknown error");
        item.event = Some("note".into());
        assert_eq!(item.to_error(), None);
    }

    #[test]
    fn deep_nesting_is_refused_in_both_codecs() {
        let packed = [vec![0x91; 4 * NESTING_MAX], vec![0xc0]].concat();
        assert!(from_bytes::<Value>(&packed, MessagePack).is_err());
        assert!(from_bytes::<Value>(&packed[3 * NESTING_MAX + 2..], MessagePack).is_ok());
        let text = "[".repeat(4 * NESTING_MAX) + &"]".repeat(4 * NESTING_MAX);
        assert!(from_bytes::<Value>(text.as_bytes(), Json).is_err());
    }

    #[test]
    fn a_failed_write_leaves_nothing() {
        let mut out = b"kept".to_vec();
        let bad = std::collections::BTreeMap::from([(vec![1], 1)]);
        assert!(write_value(&bad, Json, &mut out).is_err());
        assert_eq!(out, b"kept");
    }
}
