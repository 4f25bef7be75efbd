//! Where a worker dials back: a transport's name and JSON inside a JSON string
//! (spec/request-plane.md §3.3).

use std::net::SocketAddr;
use std::ops::Range;

use super::{ControlError, collect, text, word};
use crate::json::{Object, Text, TooLong, Value, escape};

/// The transport that [`TcpConnectionInfo`] belongs to.
pub const TCP_SERVER: &str = "tcp_server";

/// The member of `info` by which we offer [`crate::mux`]; Dynamo ignores members that it does not
/// know.
const MUX_MEMBER: &str = "corelane_mux";
/// The same as it is written, behind another member.
const OFFER: &[u8] = br#",\"corelane_mux\":1"#;

/// Which way the items on a call-home socket go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamType {
    /// From the frontend to the worker.
    Request,
    /// From the worker to the frontend.
    Response,
}

impl StreamType {
    /// Its name on the wire.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Request => "request",
            Self::Response => "response",
        }
    }

    pub(crate) fn from_value(value: Option<Value<'_>>) -> Result<Self, ControlError> {
        match word("stream_type", value)? {
            "request" => Ok(Self::Request),
            "response" => Ok(Self::Response),
            _ => Err(ControlError::UnknownValue("stream_type")),
        }
    }
}

/// A borrowed connection info whose `info` has not been looked at.
#[derive(Debug, Clone, Copy)]
pub struct ConnectionInfo<'a> {
    /// Name of the transport; [`TCP_SERVER`] is the one that we speak.
    pub transport: Text<'a>,
    /// JSON, escaped once.
    pub info: Text<'a>,
    value: Value<'a>,
}

impl<'a> ConnectionInfo<'a> {
    /// Reads a connection info that stands alone.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub fn decode(json: &'a [u8]) -> Result<Self, ControlError> {
        Self::from_value("connection_info", Some(Value::parse(json)?))
    }

    pub(super) fn from_value(
        name: &'static str,
        value: Option<Value<'a>>,
    ) -> Result<Self, ControlError> {
        let value = value.ok_or(ControlError::Missing(name))?;
        let object = value.object().map_err(|_| ControlError::WrongType(name))?;
        let [transport, info] = collect(object, ["transport", "info"])?;
        Ok(Self {
            transport: text("transport", transport)?,
            info: text("info", info)?,
            value,
        })
    }

    /// Where this object lies in the message that it was read from.
    #[must_use]
    pub fn range(&self) -> Range<usize> {
        self.value.range()
    }
}

/// Why a connection info cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ConnectionInfoError {
    /// The transport is none that we can dial. Dynamo's worker drops such a request in silence.
    #[error("connection info names a transport other than tcp_server")]
    UnknownTransport,
    /// `info` is longer than any that Dynamo writes.
    #[error("connection info: {0}")]
    TooLong(#[from] TooLong),
    /// `info` is not the JSON that it should be.
    #[error("connection info: {0}")]
    Info(#[from] ControlError),
    /// The address is not `IP:PORT`.
    #[error("connection info: the address is not a numeric IP:PORT")]
    Address,
}

/// The `info` of a TCP connection, borrowed from the scratch that it was unescaped into.
#[derive(Debug, Clone, Copy)]
pub struct TcpConnectionInfo<'s> {
    /// `IP:PORT` of the frontend's call-home listener.
    pub address: Text<'s>,
    /// The ticket that joins the socket to the waiting caller.
    pub subject: Text<'s>,
    /// Must equal the envelope's `id`.
    pub context: Text<'s>,
    /// Must fit the use.
    pub stream_type: StreamType,
    /// Whether the response may come on a connection that it shares with others
    /// ([`crate::mux`]).
    pub offers_mux: bool,
}

impl<'s> TcpConnectionInfo<'s> {
    /// Unescapes `info` into `scratch` ([`crate::limits::CONNECTION_INFO_SCRATCH_BYTES`] will do)
    /// and reads it. Unknown members are ignored.
    ///
    /// # Errors
    /// The transport is not TCP, `info` is longer than `scratch` or malformed.
    pub fn parse(
        info: &ConnectionInfo<'_>,
        scratch: &'s mut [u8],
    ) -> Result<Self, ConnectionInfoError> {
        if info.transport != TCP_SERVER {
            return Err(ConnectionInfoError::UnknownTransport);
        }
        let json = info.info.unescape_into(scratch)?;
        Ok(Self::decode(json.as_bytes())?)
    }

    /// Reads an `info` that has been unescaped.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub fn decode(json: &'s [u8]) -> Result<Self, ControlError> {
        let object = Object::open(json)?;
        let names = ["address", "subject", "context", "stream_type", MUX_MEMBER];
        let [address, subject, context, stream_type, mux] = collect(object, names)?;
        Ok(Self {
            address: text("address", address)?,
            subject: text("subject", subject)?,
            context: text("context", context)?,
            stream_type: StreamType::from_value(stream_type)?,
            offers_mux: mux.is_some_and(|value| value.raw() == b"1"),
        })
    }

    /// The address to dial.
    ///
    /// # Errors
    /// It is not a numeric socket address.
    pub fn socket_addr(&self) -> Result<SocketAddr, ConnectionInfoError> {
        self.address
            .as_str()
            .and_then(|text| text.parse().ok())
            .ok_or(ConnectionInfoError::Address)
    }
}

/// A TCP connection info to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TcpConnection<'a> {
    /// `IP:PORT` of our call-home listener.
    pub address: &'a str,
    /// Fresh for every stream.
    pub subject: &'a str,
    /// The envelope's `id`.
    pub context: &'a str,
    /// Which way the items go.
    pub stream_type: StreamType,
}

impl TcpConnection<'_> {
    /// Appends `{"transport":"tcp_server","info":"..."}`.
    pub fn write(&self, out: &mut Vec<u8>) {
        self.write_with(false, out);
    }

    /// The same, with or without the offer of [`crate::mux`].
    pub(super) fn write_with(&self, offers_mux: bool, out: &mut Vec<u8>) {
        out.extend_from_slice(br#"{"transport":"tcp_server","info":"{\"address\":\""#);
        escape_twice(self.address, out);
        out.extend_from_slice(br#"\",\"subject\":\""#);
        escape_twice(self.subject, out);
        out.extend_from_slice(br#"\",\"context\":\""#);
        escape_twice(self.context, out);
        out.extend_from_slice(br#"\",\"stream_type\":\""#);
        out.extend_from_slice(self.stream_type.name().as_bytes());
        out.extend_from_slice(br#"\""#);
        if offers_mux {
            out.extend_from_slice(OFFER);
        }
        out.extend_from_slice(br#"}"}"#);
    }
}

/// Escapes for the inner JSON, and that for the string which holds it.
pub(super) fn escape_twice(text: &str, out: &mut Vec<u8>) {
    escape(text, &mut |piece| {
        escape(piece, &mut |piece| out.extend_from_slice(piece.as_bytes()));
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn odd() -> TcpConnection<'static> {
        TcpConnection {
            address: "[::1]:5",
            subject: "s\"\\\n",
            context: "ctx-é\u{1}",
            stream_type: StreamType::Request,
        }
    }

    #[test]
    fn escapes_twice_and_back() {
        let mut out = vec![];
        odd().write(&mut out);
        let outer: serde_json::Value = serde_json::from_slice(&out).unwrap();
        let inner: serde_json::Value =
            serde_json::from_str(outer["info"].as_str().unwrap()).unwrap();
        assert_eq!(inner["subject"], odd().subject);
        let view = ConnectionInfo::decode(&out).unwrap();
        assert_eq!(view.range(), 0..out.len());
        let mut scratch = [0; 256];
        let info = TcpConnectionInfo::parse(&view, &mut scratch).unwrap();
        assert!(info.subject == odd().subject && info.context == odd().context);
        assert_eq!(info.stream_type, StreamType::Request);
        assert_eq!(info.socket_addr(), Ok("[::1]:5".parse().unwrap()));
    }

    #[test]
    fn each_fault_has_its_error() {
        let mut out = vec![];
        odd().write(&mut out);
        let view = ConnectionInfo::decode(&out).unwrap();
        assert!(matches!(
            TcpConnectionInfo::parse(&view, &mut [0; 20]),
            Err(ConnectionInfoError::TooLong(TooLong { have_bytes: 20 }))
        ));
        let parse = |json: &str| {
            let view = ConnectionInfo::decode(json.as_bytes()).unwrap();
            TcpConnectionInfo::parse(&view, &mut [0; 256]).map(|_| ())
        };
        assert_eq!(
            parse(r#"{"transport":"quic-response","info":"{}"}"#),
            Err(ConnectionInfoError::UnknownTransport)
        );
        assert_eq!(
            parse(r#"{"transport":"tcp_server","info":"{}"}"#),
            Err(ConnectionInfoError::Info(ControlError::Missing("address")))
        );
        let named = TcpConnectionInfo::decode(
            br#"{"address":"localhost:1","subject":"","context":"","stream_type":"response"}"#,
        );
        assert_eq!(
            named.unwrap().socket_addr(),
            Err(ConnectionInfoError::Address)
        );
    }
}
