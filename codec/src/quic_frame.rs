//! Frames of the QUIC response plane, what a caller says of himself there, and which lane a
//! response takes (spec/request-plane.md §6).
//!
//! ```text
//! 0       1                17            21
//! | kind  | id (16 bytes)  | payload u32 | payload |        all integers big-endian
//! ```
//!
//! The id is that of the registration, except in [`Kind::Bundle`].

use std::net::SocketAddr;
use std::ops::Range;

use crate::control_message::{ConnectionInfo, ConnectionInfoError, ControlError, collect, text};
use crate::json::{Kind as JsonKind, Object, Text, escape, write_u64};
use crate::{Bad, Decoded, TooLarge};

/// Bytes before the payload.
pub const PREFIX_BYTES: usize = 21;
/// Longest payload.
pub const PAYLOAD_BYTES_MAX: u64 = 33_554_432;
/// The transport's name in a connection info.
pub const QUIC_RESPONSE: &str = "quic-response";
/// The version of the connection info that we speak.
pub const VERSION: u64 = 3;
/// What both sides name in TLS.
pub const ALPN: &[u8] = b"dynamo-response-v2";
/// The server name of the TLS handshake.
pub const SERVER_NAME: &str = "localhost";
/// Lanes of each sort (bulk, priority) of one bundle.
pub const LANES: usize = 8;

/// What a frame is. The comment says who sends it, on which lane, and what it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Worker, priority: the stream is established.
    Prologue = 1,
    /// Worker, bulk: an item after the first.
    Data = 2,
    /// Worker, priority: it could not be established; text, or a typed error in JSON.
    Error = 3,
    /// Worker, bulk: no item follows.
    End = 4,
    /// Caller: end early.
    Stop = 5,
    /// Caller: end at once.
    Kill = 6,
    /// Both: this response is over without an end.
    Reset = 7,
    /// Worker, priority: the first item.
    FirstData = 8,
    /// Worker, priority: there is no first item.
    PriorityEnd = 9,
    /// Worker, first on every stream: the id of the bundle that it belongs to.
    Bundle = 10,
    /// Worker, priority: asks for the caller who waits under this id.
    Register = 11,
    /// Caller: he waits.
    Registered = 12,
}

impl Kind {
    /// Reads the first byte of a frame.
    #[must_use]
    pub const fn from_byte(byte: u8) -> Option<Kind> {
        Some(match byte {
            1 => Kind::Prologue,
            2 => Kind::Data,
            3 => Kind::Error,
            4 => Kind::End,
            5 => Kind::Stop,
            6 => Kind::Kill,
            7 => Kind::Reset,
            8 => Kind::FirstData,
            9 => Kind::PriorityEnd,
            10 => Kind::Bundle,
            11 => Kind::Register,
            12 => Kind::Registered,
            _ => return None,
        })
    }

    /// Whether it may hold a payload.
    #[must_use]
    pub const fn has_payload(self) -> bool {
        matches!(self, Kind::Data | Kind::Error | Kind::FirstData)
    }

    /// Whether a caller sends it.
    #[must_use]
    pub const fn is_backward(self) -> bool {
        matches!(
            self,
            Kind::Stop | Kind::Kill | Kind::Reset | Kind::Registered
        )
    }
}

/// A frame; the payload is a range of the decoded input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What it is.
    pub kind: Kind,
    /// The registration, or the bundle.
    pub id: [u8; 16],
    /// The payload; ends where the frame ends.
    pub payload: Range<usize>,
}

/// Reads a frame. `max_bytes` bounds the payload, below [`PAYLOAD_BYTES_MAX`].
pub fn decode(input: &[u8], max_bytes: u64) -> Decoded<Frame> {
    let Some(prefix) = input.first_chunk::<PREFIX_BYTES>() else {
        return Decoded::Need(PREFIX_BYTES);
    };
    let [first, id @ .., a, b, c, d] = *prefix;
    let Some(kind) = Kind::from_byte(first) else {
        return Decoded::Bad(Bad::UnknownKind { kind: first });
    };
    let length = u32::from_be_bytes([a, b, c, d]);
    if length > 0 && !kind.has_payload() {
        return Decoded::Bad(Bad::UnexpectedPayload { kind: first });
    }
    let max_bytes = max_bytes.min(PAYLOAD_BYTES_MAX);
    if u64::from(length) > max_bytes {
        return Decoded::Bad(Bad::TooLarge(TooLarge {
            frame_bytes: u64::from(length),
            max_bytes,
        }));
    }
    let end = PREFIX_BYTES + length as usize;
    if input.len() < end {
        return Decoded::Need(end);
    }
    Decoded::Frame(Frame {
        kind,
        id,
        payload: PREFIX_BYTES..end,
    })
}

/// Appends a frame. The payload is the caller's to bound.
pub fn write(kind: Kind, id: &[u8; 16], payload: &[u8], out: &mut Vec<u8>) {
    debug_assert!(payload.is_empty() || kind.has_payload());
    debug_assert!(payload.len() as u64 <= PAYLOAD_BYTES_MAX);
    out.push(kind as u8);
    out.extend_from_slice(id);
    out.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    out.extend_from_slice(payload);
}

/// The lane of a request: the same index among bulk and among priority lanes.
#[must_use]
pub fn lane(request_id: &str) -> usize {
    (xxhash_rust::xxh3::xxh3_64(request_id.as_bytes()) % LANES as u64) as usize
}

/// The 16 bytes of a UUID in its usual form; None for anything else.
#[must_use]
pub fn uuid(text: &str) -> Option<[u8; 16]> {
    let groups = [8, 13, 18, 23];
    let mut digits = text.bytes().enumerate();
    let hyphens = digits.all(|(at, byte)| (byte == b'-') == groups.contains(&at));
    if text.len() != 36 || !hyphens {
        return None;
    }
    unhex(text.bytes().filter(|byte| *byte != b'-'))
}

fn unhex<const N: usize>(digits: impl Iterator<Item = u8>) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    let mut count = 0;
    for digit in digits {
        let value = char::from(digit).to_digit(16)? as u8;
        *bytes.get_mut(count / 2)? |= value << (4 * (1 - count % 2));
        count += 1;
    }
    (count == 2 * N).then_some(bytes)
}

/// Where and as whom a caller waits; borrowed from the scratch that it was unescaped into.
#[derive(Debug, Clone, Copy)]
pub struct QuicConnectionInfo<'s> {
    /// `IP:PORT` of his UDP socket.
    pub address: Text<'s>,
    /// His process.
    pub frontend_id: Text<'s>,
    /// This response.
    pub registration_id: Text<'s>,
    /// Must equal the envelope's `id`; decides the lane.
    pub request_id: Text<'s>,
    /// SHA-256 of the DER of his certificate, in hexadecimal.
    pub certificate_sha256: Text<'s>,
}

impl<'s> QuicConnectionInfo<'s> {
    /// Unescapes `info` into `scratch` and reads it. Unknown members are ignored.
    ///
    /// # Errors
    /// The transport or the version ([`VERSION`]) is another, or `info` is too long or malformed.
    pub fn parse(
        info: &ConnectionInfo<'_>,
        scratch: &'s mut [u8],
    ) -> Result<Self, ConnectionInfoError> {
        if info.transport != QUIC_RESPONSE {
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
        let names = [
            "version",
            "address",
            "frontend_id",
            "registration_id",
            "request_id",
            "certificate_sha256",
        ];
        let [
            version,
            address,
            frontend,
            registration,
            request,
            certificate,
        ] = collect(object, names)?;
        let version = version.ok_or(ControlError::Missing("version"))?;
        if version.kind() != JsonKind::Number || version.raw() != b"3" {
            return Err(ControlError::UnknownValue("version"));
        }
        Ok(Self {
            address: text("address", address)?,
            frontend_id: text("frontend_id", frontend)?,
            registration_id: text("registration_id", registration)?,
            request_id: text("request_id", request)?,
            certificate_sha256: text("certificate_sha256", certificate)?,
        })
    }

    /// The address to dial.
    ///
    /// # Errors
    /// It is not a numeric socket address.
    pub fn socket_addr(&self) -> Result<SocketAddr, ConnectionInfoError> {
        let address = self.address.as_str().and_then(|text| text.parse().ok());
        address.ok_or(ConnectionInfoError::Address)
    }

    /// The hash of the certificate to expect; None when it is none.
    #[must_use]
    pub fn certificate(&self) -> Option<[u8; 32]> {
        unhex(self.certificate_sha256.as_str()?.bytes())
    }
}

/// A connection info to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuicConnection<'a> {
    /// `IP:PORT` of our UDP socket.
    pub address: &'a str,
    /// Our process.
    pub frontend_id: &'a str,
    /// Fresh for every response.
    pub registration_id: &'a str,
    /// The envelope's `id`.
    pub request_id: &'a str,
    /// SHA-256 of the DER of our certificate, in hexadecimal.
    pub certificate_sha256: &'a str,
}

impl QuicConnection<'_> {
    /// Appends `{"transport":"quic-response","info":"..."}`.
    pub fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(br#"{"transport":"quic-response","info":"{\"version\":"#);
        write_u64(VERSION, out);
        let members = [
            ("address", self.address),
            ("frontend_id", self.frontend_id),
            ("registration_id", self.registration_id),
            ("request_id", self.request_id),
            ("certificate_sha256", self.certificate_sha256),
        ];
        for (name, value) in members {
            out.extend_from_slice(b",\\\"");
            out.extend_from_slice(name.as_bytes());
            out.extend_from_slice(b"\\\":\\\"");
            escape(value, &mut |piece| {
                escape(piece, &mut |piece| out.extend_from_slice(piece.as_bytes()));
            });
            out.extend_from_slice(b"\\\"");
        }
        out.extend_from_slice(b"}\"}");
    }
}

#[cfg(test)]
impl QuicConnection<'static> {
    /// One for tests; its request has an odd name.
    pub(crate) const SAMPLE: Self = Self {
        address: "127.0.0.1:34784",
        frontend_id: "b988cc11-0746-4853-a73a-e3b5a7fbff50",
        registration_id: "be0d3514-1100-43ed-b5ba-79059c8d3fc0",
        request_id: "odd \"\\ é",
        certificate_sha256: "5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e",
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_round_trip_and_wrong_ones_are_named() {
        let mut bytes = Vec::new();
        write(Kind::FirstData, &[7; 16], b"first", &mut bytes);
        write(Kind::End, &[8; 16], b"", &mut bytes);
        let frame = decode(&bytes, 100).frame().unwrap();
        assert_eq!((frame.kind, frame.id), (Kind::FirstData, [7; 16]));
        assert_eq!(&bytes[frame.payload.clone()], b"first");
        let next = decode(&bytes[frame.payload.end..], 100).frame().unwrap();
        assert_eq!((next.kind, next.payload), (Kind::End, 21..21));
        assert_eq!(decode(&bytes[..20], 100), Decoded::Need(21));
        assert_eq!(decode(&bytes[..21], 100), Decoded::Need(26));
        assert!(matches!(decode(&bytes, 4), Decoded::Bad(Bad::TooLarge(_))));
        assert_eq!(
            decode(&[0; 21], 100),
            Decoded::Bad(Bad::UnknownKind { kind: 0 })
        );
        bytes[0] = Kind::Stop as u8;
        assert_eq!(
            decode(&bytes, 100),
            Decoded::Bad(Bad::UnexpectedPayload { kind: 5 })
        );
    }

    #[test]
    fn infos_round_trip() {
        let written = QuicConnection::SAMPLE;
        let mut json = Vec::new();
        written.write(&mut json);
        let info = ConnectionInfo::decode(&json).unwrap();
        let mut scratch = [0; 1024];
        let read = QuicConnectionInfo::parse(&info, &mut scratch).unwrap();
        assert!(read.request_id == written.request_id);
        assert_eq!(read.certificate(), Some([0x5e; 32]));
        assert_eq!(read.socket_addr().unwrap().port(), 34784);
        let registration = uuid(&read.registration_id.to_cow()).unwrap();
        assert_eq!(registration[..3], [0xbe, 0x0d, 0x35]);
        let other = String::from_utf8(json).unwrap().replace(":3,", ":2,");
        let info = ConnectionInfo::decode(other.as_bytes()).unwrap();
        assert!(QuicConnectionInfo::parse(&info, &mut [0; 1024]).is_err());
    }

    #[test]
    fn uuids_are_taken_in_their_usual_form_only() {
        assert!(uuid("be0d3514-1100-43ed-b5ba-79059c8d3fc0").is_some());
        for wrong in [
            "",
            "be0d3514110043edb5ba79059c8d3fc0",
            "be0d3514-1100-43ed-b5ba-79059c8d3fcg",
            "be0d3514-1100-43ed-b5ba-79059c8d3fc",
            "be0d35141-100-43ed-b5ba-79059c8d3fc0",
        ] {
            assert_eq!(uuid(wrong), None, "{wrong}");
        }
    }
}
