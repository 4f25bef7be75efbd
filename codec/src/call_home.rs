//! What travels on a call-home socket: handshake, prologue, items, final marker, control
//! (spec/request-plane.md §4.2, §4.3, §4.6, §5). Every unit is a two-part message.
//!
//! ```text
//! worker -> frontend   handshake, prologue, item..., final marker, sentinel
//! frontend -> worker   stop | kill                 (on a request stream: item..., sentinel)
//! ```

use std::ops::Range;

use crate::control_message::{ControlError, PayloadCodec, StreamType, collect, text};
use crate::json::{Kind, Object, Text, Value, write_string};
use crate::two_part::{self, Message, Shape};

/// Header that ends a stream.
pub const SENTINEL: &[u8; 10] = b"\"sentinel\"";
/// Header that asks the worker to stop.
pub const STOP: &[u8; 6] = b"\"stop\"";
/// Header that asks the worker to stop at once.
pub const KILL: &[u8; 6] = b"\"kill\"";
/// Header of a prologue without error.
pub const PROLOGUE_OK: &[u8; 14] = b"{\"error\":null}";
/// Body of the last item, in JSON.
pub const FINAL_MARKER_JSON: &[u8; 23] = b"{\"complete_final\":true}";
/// Body of the last item, in MessagePack.
pub const FINAL_MARKER_MSGPACK: &[u8; 17] = b"\x81\xaecomplete_final\xc3";

/// The sentinel as a whole message.
pub const SENTINEL_FRAME: [u8; 34] = two_part::constant(SENTINEL, b"");
/// Stop as a whole message.
pub const STOP_FRAME: [u8; 30] = two_part::constant(STOP, b"");
/// Kill as a whole message.
pub const KILL_FRAME: [u8; 30] = two_part::constant(KILL, b"");
/// A prologue without error as a whole message.
pub const PROLOGUE_OK_FRAME: [u8; 38] = two_part::constant(PROLOGUE_OK, b"");
/// The JSON final marker as a whole message.
pub const FINAL_MARKER_JSON_FRAME: [u8; 47] = two_part::constant(b"", FINAL_MARKER_JSON);
/// The MessagePack final marker as a whole message.
pub const FINAL_MARKER_MSGPACK_FRAME: [u8; 41] = two_part::constant(b"", FINAL_MARKER_MSGPACK);

/// The final marker as a whole message, in the codec of the items before it.
#[must_use]
pub fn final_marker_frame(codec: PayloadCodec) -> &'static [u8] {
    match codec {
        PayloadCodec::Json => &FINAL_MARKER_JSON_FRAME,
        PayloadCodec::MessagePack => &FINAL_MARKER_MSGPACK_FRAME,
    }
}

/// The first message on a call-home socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Handshake<'a> {
    /// The ticket from the connection info.
    pub subject: Text<'a>,
    /// Which of a request's two streams this socket is.
    pub stream_type: StreamType,
}

impl<'a> Handshake<'a> {
    /// Reads the header of a first message.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub fn decode(header: &'a [u8]) -> Result<Self, ControlError> {
        let [subject, stream_type] = collect(Object::open(header)?, ["subject", "stream_type"])?;
        Ok(Self {
            subject: text("subject", subject)?,
            stream_type: StreamType::from_value(stream_type)?,
        })
    }
}

/// Appends a handshake as a whole message.
pub fn write_handshake(subject: &str, stream_type: StreamType, out: &mut Vec<u8>) {
    two_part::write_with_header(out, |out| {
        out.extend_from_slice(b"{\"subject\":");
        write_string(subject, out);
        out.extend_from_slice(b",\"stream_type\":");
        write_string(stream_type.name(), out);
        out.push(b'}');
    });
}

/// The second message of a worker: whether `generate` worked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prologue<'a> {
    /// The text of the error, if there is one.
    pub error: Option<Text<'a>>,
    /// The typed error's JSON object, not looked at; see [`crate::error`].
    pub typed_error: Option<&'a [u8]>,
}

impl<'a> Prologue<'a> {
    /// Reads the header of a prologue.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub fn decode(header: &'a [u8]) -> Result<Self, ControlError> {
        let [error, typed_error] = collect(Object::open(header)?, ["error", "typed_error"])?;
        let error = match error.filter(|value| !value.is_null()) {
            Some(_) => Some(text("error", error)?),
            None => None,
        };
        let typed_error = typed_error.filter(|value| !value.is_null());
        if typed_error.is_some_and(|value| value.kind() != Kind::Object) {
            return Err(ControlError::WrongType("typed_error"));
        }
        Ok(Self {
            error,
            typed_error: typed_error.map(|value| value.raw()),
        })
    }

    /// True if the response stream follows.
    #[must_use]
    pub fn is_ok(&self) -> bool {
        self.error.is_none()
    }
}

/// Appends an error prologue as a whole message. `typed_error` is the JSON of a
/// [`crate::error::DynamoError`] and goes out as it is.
pub fn write_prologue_error(error: &str, typed_error: Option<&[u8]>, out: &mut Vec<u8>) {
    two_part::write_with_header(out, |out| {
        out.extend_from_slice(b"{\"error\":");
        write_string(error, out);
        if let Some(typed_error) = typed_error {
            out.extend_from_slice(b",\"typed_error\":");
            out.extend_from_slice(typed_error);
        }
        out.push(b'}');
    });
}

/// What one message on a call-home socket is. Which of them may come now is the caller's to judge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StreamMessage<'a> {
    /// Opens the socket.
    Handshake(Handshake<'a>),
    /// Opens the response.
    Prologue(Prologue<'a>),
    /// An item, or the final marker; the range is the message's body.
    Item(Range<usize>),
    /// Ends the stream.
    Sentinel,
    /// Asks the worker to stop.
    Stop,
    /// Asks the worker to stop at once.
    Kill,
    /// Neither header nor body; readers ignore it.
    Empty,
    /// Nothing that belongs on such a socket: both parts together, or an unknown header.
    Violation,
}

/// Says what a message is. `input` is what `message` was decoded from; a message that does not lie
/// inside it is a violation.
#[must_use]
pub fn classify<'a>(input: &'a [u8], message: &Message) -> StreamMessage<'a> {
    match message.shape() {
        Shape::Empty => StreamMessage::Empty,
        Shape::Both => StreamMessage::Violation,
        Shape::Data => StreamMessage::Item(message.body.clone()),
        Shape::Header => match input.get(message.header.clone()) {
            Some(header) => classify_header(header),
            None => StreamMessage::Violation,
        },
    }
}

fn classify_header(header: &[u8]) -> StreamMessage<'_> {
    if header == SENTINEL {
        return StreamMessage::Sentinel;
    }
    let Ok(value) = Value::parse(header) else {
        return StreamMessage::Violation;
    };
    if let Ok(control) = value.text() {
        return if control == "sentinel" {
            StreamMessage::Sentinel
        } else if control == "stop" {
            StreamMessage::Stop
        } else if control == "kill" {
            StreamMessage::Kill
        } else {
            StreamMessage::Violation
        };
    }
    // A prologue has no required member, so a handshake would pass for one: ask for it first.
    if let Ok(handshake) = Handshake::decode(header) {
        return StreamMessage::Handshake(handshake);
    }
    match Prologue::decode(header) {
        Ok(prologue) => StreamMessage::Prologue(prologue),
        Err(_) => StreamMessage::Violation,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn classified(header: &[u8], body: &[u8]) -> String {
        let mut bytes = vec![];
        two_part::write(header, body, &mut bytes);
        let message = two_part::decode(&bytes, None).frame().unwrap();
        format!("{:?}", classify(&bytes, &message))
    }

    #[test]
    fn constants_are_whole_messages() {
        for (frame, header, body) in [
            (&SENTINEL_FRAME[..], &SENTINEL[..], &b""[..]),
            (&STOP_FRAME, STOP, b""),
            (&KILL_FRAME, KILL, b""),
            (&PROLOGUE_OK_FRAME, PROLOGUE_OK, b""),
            (&FINAL_MARKER_JSON_FRAME, b"", FINAL_MARKER_JSON),
            (&FINAL_MARKER_MSGPACK_FRAME, b"", FINAL_MARKER_MSGPACK),
        ] {
            let mut bytes = vec![];
            two_part::write(header, body, &mut bytes);
            assert_eq!(bytes, frame);
        }
    }

    #[test]
    fn classifies_headers() {
        assert_eq!(classified(SENTINEL, b""), "Sentinel");
        assert_eq!(classified(b" \"sentinel\"\n", b""), "Sentinel");
        assert_eq!(classified(STOP, b""), "Stop");
        assert_eq!(classified(KILL, b""), "Kill");
        assert_eq!(classified(b"", b""), "Empty");
        assert_eq!(classified(b"", b"xy"), "Item(24..26)");
        for violation in ["\"pause\"", "not json", "5", "[]", "{\"error\":5}"] {
            assert_eq!(classified(violation.as_bytes(), b""), "Violation");
        }
        assert_eq!(classified(SENTINEL, b"x"), "Violation");
        assert!(classified(PROLOGUE_OK, b"").starts_with("Prologue"));
    }

    #[test]
    fn handshake_round_trip() {
        let mut bytes = vec![];
        write_handshake("sub\"ject", StreamType::Request, &mut bytes);
        let message = two_part::decode(&bytes, None).frame().unwrap();
        let StreamMessage::Handshake(handshake) = classify(&bytes, &message) else {
            panic!("not a handshake");
        };
        assert!(handshake.subject == "sub\"ject");
        assert_eq!(handshake.stream_type, StreamType::Request);
    }

    #[test]
    fn prologue_round_trip() {
        let mut bytes = vec![];
        write_prologue_error("boom", Some(br#"{"message":"m"}"#), &mut bytes);
        let message = two_part::decode(&bytes, None).frame().unwrap();
        let StreamMessage::Prologue(prologue) = classify(&bytes, &message) else {
            panic!("not a prologue");
        };
        assert!(!prologue.is_ok() && prologue.error.unwrap() == "boom");
        assert_eq!(prologue.typed_error, Some(&br#"{"message":"m"}"#[..]));
        assert!(Prologue::decode(PROLOGUE_OK).unwrap().is_ok());
        assert!(Prologue::decode(b"{}").unwrap().is_ok());
        assert!(Prologue::decode(br#"{"error":null,"typed_error":3}"#).is_err());
    }
}
