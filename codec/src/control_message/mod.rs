//! The request control message: the header of a request's envelope, always JSON
//! (spec/request-plane.md §3.2).

mod connection_info;
mod template;

use std::ops::Range;

pub use connection_info::{
    ConnectionInfo, ConnectionInfoError, StreamType, TCP_SERVER, TcpConnection, TcpConnectionInfo,
};
pub use template::CallTemplate;

use serde::{Deserialize, Serialize};

use crate::EncodeError;
use crate::json::{JsonError, Kind, Object, Text, Value, write_string, write_u64};
use crate::limits::CONTROL_BYTES_MAX;
use crate::quic_frame::QuicConnection;

/// How many values the request has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestType {
    /// One, in the envelope's body.
    SingleIn,
    /// A stream of them, on a socket of its own.
    ManyIn,
}

/// How many values the response has. Dynamo 1.6.1 writes only `ManyOut`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResponseType {
    /// One.
    SingleOut,
    /// A stream of them.
    ManyOut,
}

/// How the request's value and every response item are encoded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum PayloadCodec {
    /// JSON; meant when nothing is said.
    #[default]
    #[serde(rename = "json")]
    Json,
    /// MessagePack.
    #[serde(rename = "msgpack")]
    MessagePack,
}

impl RequestType {
    /// Its name on the wire.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::SingleIn => "single_in",
            Self::ManyIn => "many_in",
        }
    }
}

impl ResponseType {
    /// Its name on the wire.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::SingleOut => "single_out",
            Self::ManyOut => "many_out",
        }
    }
}

impl PayloadCodec {
    /// Its name on the wire and in discovery.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Json => "json",
            Self::MessagePack => "msgpack",
        }
    }

    /// The codec of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "json" => Some(Self::Json),
            "msgpack" => Some(Self::MessagePack),
            _ => None,
        }
    }
}

/// Why a header is not a control message; the member is named where one is to blame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// Not JSON, or not an object.
    #[error("control message: {0}")]
    Json(#[from] JsonError),
    /// A required member is absent.
    #[error("control message has no member `{0}`")]
    Missing(&'static str),
    /// A member comes twice.
    #[error("control message has member `{0}` twice")]
    Repeated(&'static str),
    /// A member holds another kind of value than it must.
    #[error("control message: member `{0}` has the wrong type")]
    WrongType(&'static str),
    /// A member's word is none that is defined for it.
    #[error("control message: member `{0}` has an unknown value")]
    UnknownValue(&'static str),
}

/// A borrowed control message.
#[derive(Debug, Clone, Copy)]
pub struct ControlMessage<'a> {
    /// The identity of the request.
    pub id: Text<'a>,
    /// Shape of the request.
    pub request_type: RequestType,
    /// Shape of the response.
    pub response_type: ResponseType,
    /// Encoding of request and items.
    pub payload_codec: PayloadCodec,
    /// Where to call home for the response stream.
    pub connection_info: ConnectionInfo<'a>,
    /// JSON object of strings, as written; `None` if absent.
    pub metadata: Option<&'a [u8]>,
    /// Unix time in nanoseconds of the send, if given here instead of in the headers.
    pub frontend_send_ts_ns: Option<u64>,
    /// Where to dial for the request stream; only with [`RequestType::ManyIn`].
    pub request_stream_connection_info: Option<ConnectionInfo<'a>>,
}

/// The members in wire order; index into the table that `decode` fills.
const MEMBERS: [&str; 8] = [
    "id",
    "request_type",
    "response_type",
    "payload_codec",
    "connection_info",
    "metadata",
    "frontend_send_ts_ns",
    "request_stream_connection_info",
];

/// Reads a control message. Unknown members are ignored; a repeated one is an error.
///
/// # Errors
/// See [`ControlError`].
pub fn decode(header: &[u8]) -> Result<ControlMessage<'_>, ControlError> {
    let [id, request, response, codec, info, metadata, sent, stream] =
        collect(Object::open(header)?, MEMBERS)?;
    let request_type = match word("request_type", request)? {
        "single_in" => RequestType::SingleIn,
        "many_in" => RequestType::ManyIn,
        _ => return Err(ControlError::UnknownValue("request_type")),
    };
    let response_type = match word("response_type", response)? {
        "single_out" => ResponseType::SingleOut,
        "many_out" => ResponseType::ManyOut,
        _ => return Err(ControlError::UnknownValue("response_type")),
    };
    let payload_codec = match codec {
        None => PayloadCodec::Json,
        Some(_) => PayloadCodec::from_name(word("payload_codec", codec)?)
            .ok_or(ControlError::UnknownValue("payload_codec"))?,
    };
    if metadata.is_some_and(|value| !crate::headers::is_valid(value.raw())) {
        return Err(ControlError::WrongType("metadata"));
    }
    let frontend_send_ts_ns = match sent.filter(|value| !value.is_null()) {
        None => None,
        Some(value) => Some(
            value
                .u64()
                .map_err(|_| ControlError::WrongType("frontend_send_ts_ns"))?,
        ),
    };
    let stream = match stream.filter(|value| !value.is_null()) {
        None => None,
        Some(_) => Some(ConnectionInfo::from_value(
            "request_stream_connection_info",
            stream,
        )?),
    };
    Ok(ControlMessage {
        id: text("id", id)?,
        request_type,
        response_type,
        payload_codec,
        connection_info: ConnectionInfo::from_value("connection_info", info)?,
        metadata: metadata.map(|value| value.raw()),
        frontend_send_ts_ns,
        request_stream_connection_info: stream,
    })
}

/// Walks an object to its end and picks the named members.
pub(crate) fn collect<'a, const N: usize>(
    mut object: Object<'a>,
    names: [&'static str; N],
) -> Result<[Option<Value<'a>>; N], ControlError> {
    let mut found = [None; N];
    let mut likely = 0;
    while let Some(member) = object.next_member()? {
        // Writers keep to an order: what follows the last name is looked at first.
        let mut places = (likely..N).chain(0..likely);
        let Some(at) = places.find(|at| member.key == *names[*at]) else {
            continue;
        };
        likely = at + 1;
        if found[at].replace(member.value).is_some() {
            return Err(ControlError::Repeated(names[at]));
        }
    }
    Ok(found)
}

/// A required string.
pub(crate) fn text<'a>(
    name: &'static str,
    value: Option<Value<'a>>,
) -> Result<Text<'a>, ControlError> {
    let value = value.ok_or(ControlError::Missing(name))?;
    if value.kind() != Kind::String {
        return Err(ControlError::WrongType(name));
    }
    Ok(value.text()?)
}

/// A required string out of a fixed set of plain words. One with escapes is none of them.
pub(crate) fn word<'a>(
    name: &'static str,
    value: Option<Value<'a>>,
) -> Result<&'a str, ControlError> {
    text(name, value)?
        .as_str()
        .ok_or(ControlError::UnknownValue(name))
}

/// A control message to be written.
#[derive(Debug, Clone, Copy)]
pub struct NewControlMessage<'a> {
    /// The identity of the request; both connection infos repeat it as their context.
    pub id: &'a str,
    /// Shape of the request.
    pub request_type: RequestType,
    /// Encoding of request and items, as the chosen instance advertises it.
    pub payload_codec: PayloadCodec,
    /// Where the worker is to call home.
    pub connection_info: TcpConnection<'a>,
    /// Free pairs, sorted by the bytes of their keys, keys distinct; left out when empty.
    pub metadata: &'a [(&'a str, &'a str)],
    /// Left out when `None`, as Dynamo always does.
    pub frontend_send_ts_ns: Option<u64>,
    /// Where the worker is to dial for a request stream.
    pub request_stream_connection_info: Option<TcpConnection<'a>>,
}

impl NewControlMessage<'_> {
    /// Appends the message as JSON, members in Dynamo's order and without blanks. The response
    /// type is always `many_out`.
    ///
    /// # Errors
    /// It is over [`CONTROL_BYTES_MAX`] or its metadata are out of order; `out` is as before.
    pub fn write(&self, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        self.write_with(false, out)
    }

    /// The same, and offers [`crate::mux`] for every stream.
    ///
    /// # Errors
    /// As [`NewControlMessage::write`].
    pub fn write_offering_mux(&self, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        self.write_with(true, out)
    }

    fn write_with(&self, offers_mux: bool, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        if self.metadata.windows(2).any(|pair| pair[0].0 >= pair[1].0) {
            return Err(EncodeError::MetadataNotSorted);
        }
        let start = out.len();
        out.extend_from_slice(b"{\"id\":");
        write_string(self.id, out);
        for (name, value) in [
            ("request_type", self.request_type.name()),
            ("response_type", ResponseType::ManyOut.name()),
            ("payload_codec", self.payload_codec.name()),
        ] {
            write_name(name, out);
            write_string(value, out);
        }
        write_name("connection_info", out);
        self.connection_info.write_with(offers_mux, out);
        if !self.metadata.is_empty() {
            write_name("metadata", out);
            crate::headers::write(self.metadata, out);
        }
        if let Some(sent) = self.frontend_send_ts_ns {
            write_name("frontend_send_ts_ns", out);
            write_u64(sent, out);
        }
        if let Some(connection) = &self.request_stream_connection_info {
            write_name("request_stream_connection_info", out);
            connection.write_with(offers_mux, out);
        }
        out.push(b'}');
        within_limit(start, out)
    }
}

fn write_name(name: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(b",\"");
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b"\":");
}

fn within_limit(start: usize, out: &mut Vec<u8>) -> Result<(), EncodeError> {
    let bytes = out.len() - start;
    if bytes > CONTROL_BYTES_MAX {
        out.truncate(start);
        return Err(EncodeError::ControlTooLarge { bytes });
    }
    Ok(())
}

/// A connection info to be written, of either transport.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NewConnection<'a> {
    /// A call over TCP.
    Tcp(TcpConnection<'a>),
    /// A response over QUIC.
    Quic(QuicConnection<'a>),
}

impl NewConnection<'_> {
    /// Appends `{"transport":"...","info":"..."}`.
    pub fn write(&self, out: &mut Vec<u8>) {
        match self {
            NewConnection::Tcp(connection) => connection.write(out),
            NewConnection::Quic(connection) => connection.write(out),
        }
    }
}

/// Appends a received control message with another place to call home, and every other byte as it
/// came, unknown members included. `range` is [`ConnectionInfo::range`] of the one to replace.
///
/// # Errors
/// The result is over [`CONTROL_BYTES_MAX`]; `out` is as before.
pub fn write_redirected(
    header: &[u8],
    range: Range<usize>,
    connection: &NewConnection<'_>,
    out: &mut Vec<u8>,
) -> Result<(), EncodeError> {
    let start = out.len();
    out.extend_from_slice(header.get(..range.start).unwrap_or(header));
    connection.write(out);
    out.extend_from_slice(header.get(range.end..).unwrap_or_default());
    within_limit(start, out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::CONNECTION_INFO_SCRATCH_BYTES;

    /// The request of spec/request-plane.md §3.2.
    const REAL: &str = concat!(
        r#"{"id":"0f0e0d0c-0b0a-0908-0706-050403020101","#,
        r#""request_type":"single_in","response_type":"many_out","payload_codec":"json","#,
        r#""connection_info":{"transport":"tcp_server","info":"{\"address\":\"127.0.0.1:37617\","#,
        r#"\"subject\":\"e6e42eb2-3333-4859-b313-20ba08b30445\","#,
        r#"\"context\":\"0f0e0d0c-0b0a-0908-0706-050403020101\",\"stream_type\":\"response\"}"},"#,
        r#""metadata":{"dynamo.lifecycle.root":"v1","tenant":"alpha"}}"#
    );

    fn real() -> NewControlMessage<'static> {
        NewControlMessage {
            id: "0f0e0d0c-0b0a-0908-0706-050403020101",
            request_type: RequestType::SingleIn,
            payload_codec: PayloadCodec::Json,
            connection_info: TcpConnection {
                address: "127.0.0.1:37617",
                subject: "e6e42eb2-3333-4859-b313-20ba08b30445",
                context: "0f0e0d0c-0b0a-0908-0706-050403020101",
                stream_type: StreamType::Response,
            },
            metadata: &[("dynamo.lifecycle.root", "v1"), ("tenant", "alpha")],
            frontend_send_ts_ns: None,
            request_stream_connection_info: None,
        }
    }

    #[test]
    fn writes_and_reads_the_real_one() {
        let mut out = vec![];
        real().write(&mut out).unwrap();
        assert_eq!(std::str::from_utf8(&out).unwrap(), REAL);
        let view = decode(&out).unwrap();
        assert!(view.id == real().id);
        assert_eq!(view.request_type, RequestType::SingleIn);
        assert_eq!(view.response_type, ResponseType::ManyOut);
        let metadata = view.metadata.unwrap();
        assert!(crate::headers::find(metadata, "tenant").unwrap() == "alpha");
        assert_eq!(view.frontend_send_ts_ns, None);
        let mut scratch = [0; CONNECTION_INFO_SCRATCH_BYTES];
        let info = TcpConnectionInfo::parse(&view.connection_info, &mut scratch).unwrap();
        assert_eq!(info.socket_addr(), Ok("127.0.0.1:37617".parse().unwrap()));
        assert!(info.context == view.id);
        assert_eq!(info.stream_type, StreamType::Response);
    }

    #[test]
    fn both_streams_can_be_offered_a_shared_connection() {
        let mut message = real();
        let request = TcpConnection {
            stream_type: StreamType::Request,
            ..message.connection_info
        };
        message.request_stream_connection_info = Some(request);
        for offers in [false, true] {
            let mut out = vec![];
            match offers {
                true => message.write_offering_mux(&mut out).unwrap(),
                false => message.write(&mut out).unwrap(),
            }
            let view = decode(&out).unwrap();
            let request = view.request_stream_connection_info.unwrap();
            for info in [view.connection_info, request] {
                let mut scratch = [0; CONNECTION_INFO_SCRATCH_BYTES];
                let info = TcpConnectionInfo::parse(&info, &mut scratch).unwrap();
                assert_eq!(info.offers_mux, offers);
                assert!(info.subject == real().connection_info.subject);
            }
        }
    }

    #[test]
    fn optional_members_default() {
        let text = r#"{"later":{"x":[]},"id":"i","request_type":"many_in",
            "response_type":"single_out","frontend_send_ts_ns":null,
            "request_stream_connection_info":null,
            "connection_info":{"transport":"t","info":"","more":1}}"#;
        let view = decode(text.as_bytes()).unwrap();
        assert_eq!(view.payload_codec, PayloadCodec::Json);
        assert_eq!(view.request_type, RequestType::ManyIn);
        assert!(view.metadata.is_none() && view.request_stream_connection_info.is_none());
    }

    #[test]
    fn errors_name_the_member() {
        let without = |from: &str, to: &str| {
            let text = REAL.to_owned();
            assert!(text.contains(from), "{from}");
            decode(text.replacen(from, to, 1).as_bytes()).map(|_| ())
        };
        use ControlError::*;
        for (from, to, want) in [
            (r#""id""#, r#""di""#, Missing("id")),
            (r#""response_type""#, r#""r""#, Missing("response_type")),
            (r#""connection_info""#, r#""c""#, Missing("connection_info")),
            (r#""info":"#, r#""inf":"#, Missing("info")),
            ("single_in", "one_in", UnknownValue("request_type")),
            (r#""json""#, r#""cbor""#, UnknownValue("payload_codec")),
            (r#""json""#, "null", WrongType("payload_codec")),
            (r#""v1""#, "1", WrongType("metadata")),
            (r#""metadata""#, r#""id""#, Repeated("id")),
        ] {
            assert_eq!(without(from, to), Err(want), "{from} -> {to}");
        }
        // A name that is repeated inside the metadata is no fault of the outer object.
        assert_eq!(without(r#""tenant""#, r#""id""#), Ok(()));
        assert!(matches!(decode(b"[]"), Err(Json(_))));
        assert!(matches!(decode(b""), Err(Json(_))));
    }

    #[test]
    fn limits_and_order_are_kept_when_writing() {
        let mut out = b"before".to_vec();
        let long = "x".repeat(CONTROL_BYTES_MAX);
        let mut message = real();
        message.id = &long;
        assert!(matches!(
            message.write(&mut out),
            Err(EncodeError::ControlTooLarge { .. })
        ));
        let mut message = real();
        message.metadata = &[("b", ""), ("a", "")];
        assert_eq!(message.write(&mut out), Err(EncodeError::MetadataNotSorted));
        message.metadata = &[("a", ""), ("a", "")];
        assert_eq!(message.write(&mut out), Err(EncodeError::MetadataNotSorted));
        assert_eq!(out, b"before");
    }

    #[test]
    fn redirecting_changes_one_member_only() {
        let text = REAL.replacen('{', "{\"unknown\" : [ 1 ] ,", 1);
        let view = decode(text.as_bytes()).unwrap();
        let home = TcpConnection {
            address: "10.0.0.1:9",
            subject: "ours",
            context: "0f0e0d0c-0b0a-0908-0706-050403020101",
            stream_type: StreamType::Response,
        };
        let mut out = vec![];
        let range = view.connection_info.range();
        let home = NewConnection::Tcp(home);
        write_redirected(text.as_bytes(), range, &home, &mut out).unwrap();
        let want = text
            .replace("127.0.0.1:37617", "10.0.0.1:9")
            .replace("e6e42eb2-3333-4859-b313-20ba08b30445", "ours");
        assert_eq!(std::str::from_utf8(&out).unwrap(), want);
    }
}
