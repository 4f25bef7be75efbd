//! Control messages of calls that differ in two texts only: what is the same in all of them is
//! written once.

use super::connection_info::escape_twice;
use super::{
    NewConnection, NewControlMessage, PayloadCodec, RequestType, StreamType, TcpConnection,
    within_limit, write_redirected,
};
use crate::EncodeError;
use crate::json::escape;
use crate::quic_frame::QuicConnection;

/// The control message of unary calls whose response comes home to one address.
#[derive(Debug, Clone)]
pub struct CallTemplate {
    /// Before the id, before the subject, before the context, and the end.
    parts: [Vec<u8>; 4],
}

impl CallTemplate {
    /// Calls whose caller is called home at `address`; `mux` offers [`crate::mux`].
    #[must_use]
    pub fn new(address: &str, codec: PayloadCodec, mux: bool) -> Self {
        let message = NewControlMessage {
            id: "",
            request_type: RequestType::SingleIn,
            payload_codec: codec,
            connection_info: TcpConnection {
                address,
                subject: "",
                context: "",
                stream_type: StreamType::Response,
            },
            metadata: &[],
            frontend_send_ts_ns: None,
            request_stream_connection_info: None,
        };
        let mut whole = Vec::new();
        // With no metadata and an address in it the message has neither of the two faults.
        let _ = match mux {
            true => message.write_offering_mux(&mut whole),
            false => message.write(&mut whole),
        };
        Self::cut(&whole, ["subject", "context"])
    }

    /// Calls whose caller waits on QUIC: `home` says where, its ids of one response left empty. The
    /// subject of a call is its registration.
    #[must_use]
    pub fn quic(home: &QuicConnection<'_>, codec: PayloadCodec) -> Self {
        let tcp = Self::new("", codec, false).parts.concat();
        let mut whole = Vec::new();
        if let Ok(message) = super::decode(&tcp) {
            let range = message.connection_info.range();
            let connection = NewConnection::Quic(*home);
            // Far below the limit.
            let _ = write_redirected(&tcp, range, &connection, &mut whole);
        }
        Self::cut(&whole, ["registration_id", "request_id"])
    }

    /// Cuts a message behind the names of its id and of two members of its connection info.
    fn cut(whole: &[u8], names: [&str; 2]) -> Self {
        let text = String::from_utf8_lossy(whole);
        let cut = |text: &str, before: &str| {
            let at = text.find(before).map_or(0, |at| at + before.len());
            (text[..at].to_owned(), text[at..].to_owned())
        };
        let [subject, context] = names.map(|name| format!("\\\"{name}\\\":\\\""));
        let (id, rest) = cut(&text, "\"id\":\"");
        let (subject, rest) = cut(&rest, &subject);
        let (context, rest) = cut(&rest, &context);
        Self {
            parts: [id, subject, context, rest].map(String::into_bytes),
        }
    }

    /// Appends the message of one call.
    ///
    /// # Errors
    /// It is over [`crate::limits::CONTROL_BYTES_MAX`]; `out` is as before.
    pub fn write(&self, id: &str, subject: &str, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        let start = out.len();
        let [before_id, before_subject, before_context, end] = &self.parts;
        out.extend_from_slice(before_id);
        if is_plain(id) {
            out.extend_from_slice(id.as_bytes());
        } else {
            escape(id, &mut |piece| out.extend_from_slice(piece.as_bytes()));
        }
        out.extend_from_slice(before_subject);
        once_more(subject, out);
        out.extend_from_slice(before_context);
        once_more(id, out);
        out.extend_from_slice(end);
        within_limit(start, out)
    }
}

fn once_more(text: &str, out: &mut Vec<u8>) {
    if is_plain(text) {
        out.extend_from_slice(text.as_bytes());
    } else {
        escape_twice(text, out);
    }
}

/// Whether nothing in a text is escaped.
fn is_plain(text: &str) -> bool {
    let plain = |byte: u8| (b' '..0x7f).contains(&byte) && byte != b'"' && byte != b'\\';
    text.bytes().all(plain)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control_message::{self, TcpConnectionInfo};
    use crate::quic_frame::QuicConnectionInfo;

    #[test]
    fn messages_are_those_of_the_writer() {
        for codec in [PayloadCodec::Json, PayloadCodec::MessagePack] {
            let template = CallTemplate::new("[::1]:5", codec, false);
            for (id, subject) in [("a-1", "b-2"), ("\"\\\n", "é\u{1}"), ("", "")] {
                let message = NewControlMessage {
                    id,
                    request_type: RequestType::SingleIn,
                    payload_codec: codec,
                    connection_info: TcpConnection {
                        address: "[::1]:5",
                        subject,
                        context: id,
                        stream_type: StreamType::Response,
                    },
                    metadata: &[],
                    frontend_send_ts_ns: None,
                    request_stream_connection_info: None,
                };
                let (mut expected, mut got) = (Vec::new(), Vec::new());
                message.write(&mut expected).unwrap();
                template.write(id, subject, &mut got).unwrap();
                assert_eq!(String::from_utf8(got), String::from_utf8(expected));
            }
        }
    }

    #[test]
    fn the_offer_is_read_and_changes_nothing_else() {
        for mux in [false, true] {
            let template = CallTemplate::new("127.0.0.1:9", PayloadCodec::Json, mux);
            let mut out = Vec::new();
            template.write("i\"d", "s", &mut out).unwrap();
            let control = control_message::decode(&out).unwrap();
            let mut scratch = [0; 512];
            let info = TcpConnectionInfo::parse(&control.connection_info, &mut scratch).unwrap();
            assert_eq!(info.offers_mux, mux);
            assert!(info.subject == "s" && info.context == "i\"d" && info.address == "127.0.0.1:9");
        }
    }

    #[test]
    fn callers_on_quic_are_named_as_such() {
        let home = QuicConnection {
            registration_id: "",
            request_id: "",
            ..QuicConnection::SAMPLE
        };
        let template = CallTemplate::quic(&home, PayloadCodec::MessagePack);
        for id in ["a-1", "\"\\\n", ""] {
            let mut out = Vec::new();
            template.write(id, "s-2", &mut out).unwrap();
            let control = control_message::decode(&out).unwrap();
            assert!(control.id == id && control.payload_codec == PayloadCodec::MessagePack);
            let mut scratch = [0; 1024];
            let info = &control.connection_info;
            let info = QuicConnectionInfo::parse(info, &mut scratch).unwrap();
            assert!(info.registration_id == "s-2" && info.request_id == id);
            assert!(info.address == home.address && info.frontend_id == home.frontend_id);
            assert!(info.certificate_sha256 == home.certificate_sha256);
        }
    }
}
