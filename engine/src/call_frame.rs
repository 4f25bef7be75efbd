//! The request frame of a call (spec/request-plane.md §2.2, §3).

use std::borrow::Cow;

use corelane_codec::control_message::{
    self, CallTemplate, NewConnection, NewControlMessage, PayloadCodec, RequestType, StreamType,
    TcpConnection,
};
use corelane_codec::{EncodeError, headers, request_frame, two_part};

use crate::call::NewCall;
use crate::quic::{Place, QuicHome};

/// Writes frames; what is the same in all of them is written once, and its memory is used again.
pub(crate) struct FrameWriter {
    address: String,
    json: CallTemplate,
    packed: CallTemplate,
    /// Responses come on QUIC.
    quic: Option<Place>,
    control: Vec<u8>,
    map: Vec<u8>,
}

impl FrameWriter {
    /// For calls whose workers call home at `address`.
    pub(crate) fn new(address: &str) -> FrameWriter {
        FrameWriter {
            address: address.to_owned(),
            json: CallTemplate::new(address, PayloadCodec::Json, true),
            packed: CallTemplate::new(address, PayloadCodec::MessagePack, true),
            quic: None,
            control: Vec::with_capacity(512),
            map: Vec::with_capacity(256),
        }
    }

    /// From now on responses come on QUIC; request streams stay as they are.
    pub(crate) fn wait_on_quic(&mut self, home: &QuicHome) {
        let place = Place::new(home);
        let template = |codec| CallTemplate::quic(&place.connection("", ""), codec);
        self.json = template(PayloadCodec::Json);
        self.packed = template(PayloadCodec::MessagePack);
        self.quic = Some(place);
    }

    /// Appends the frame of a call; `fresh` is its identity if it has none.
    ///
    /// # Errors
    /// Its path, headers or control message are longer than the wire has room for.
    pub(crate) fn write(
        &mut self,
        new: &NewCall,
        subject: u128,
        fresh: u128,
        out: &mut Vec<u8>,
    ) -> Result<(), EncodeError> {
        let (fresh, subject) = (uuid(fresh), uuid(subject));
        let id = match new.id.is_empty() {
            true => &fresh,
            false => &new.id,
        };
        let template = match new.codec {
            PayloadCodec::Json => &self.json,
            PayloadCodec::MessagePack => &self.packed,
        };
        self.control.clear();
        template.write(id, &subject, &mut self.control)?;
        self.assemble(new, id, &new.body, out)
    }

    /// Appends the frame of a bidirectional call: `subjects` are those of the response and of the
    /// request stream.
    ///
    /// # Errors
    /// As [`FrameWriter::write`].
    pub(crate) fn write_many(
        &mut self,
        new: &NewCall,
        subjects: [u128; 2],
        fresh: u128,
        out: &mut Vec<u8>,
    ) -> Result<(), EncodeError> {
        let (fresh, [response, request]) = (uuid(fresh), subjects.map(uuid));
        let id = match new.id.is_empty() {
            true => &fresh,
            false => &new.id,
        };
        let to = |subject, stream_type| TcpConnection {
            address: &self.address,
            subject,
            context: id,
            stream_type,
        };
        let message = NewControlMessage {
            id,
            request_type: RequestType::ManyIn,
            payload_codec: new.codec,
            connection_info: to(&response, StreamType::Response),
            metadata: &[],
            frontend_send_ts_ns: None,
            request_stream_connection_info: Some(to(&request, StreamType::Request)),
        };
        self.control.clear();
        message.write_offering_mux(&mut self.control)?;
        if let Some(place) = &self.quic
            && let Ok(read) = control_message::decode(&self.control)
        {
            let place = NewConnection::Quic(place.connection(&response, id));
            let range = read.connection_info.range();
            let mut control = Vec::with_capacity(self.control.len() + 512);
            control_message::write_redirected(&self.control, range, &place, &mut control)?;
            self.control = control;
        }
        self.assemble(new, id, &[], out)
    }

    fn assemble(
        &mut self,
        new: &NewCall,
        id: &str,
        body: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(), EncodeError> {
        self.map.clear();
        write_map(new, id, &mut self.map);
        let prefix = two_part::prefix(self.control.len(), body.len());
        let payload_bytes = prefix.len() + self.control.len() + body.len();
        request_frame::write_prefix(&new.path, &self.map, payload_bytes, out)?;
        for part in [&prefix[..], &self.control, body] {
            out.extend_from_slice(part);
        }
        Ok(())
    }
}

/// The headers of the frame: those of ours that the call does not bring along, then its own.
fn write_map(new: &NewCall, id: &str, out: &mut Vec<u8>) {
    let path: Cow<'_, str> = String::from_utf8_lossy(&new.path);
    let own = [(headers::ENDPOINT_PATH, &*path), (headers::REQUEST_ID, id)];
    if new.headers.is_empty() {
        return headers::write(&own, out);
    }
    let theirs = new.headers.iter().map(|(name, value)| (&**name, &**value));
    let theirs: Vec<(&str, &str)> = theirs.collect();
    let own = own
        .iter()
        .copied()
        .filter(|(name, _)| theirs.iter().all(|(other, _)| other != name));
    let all: Vec<(&str, &str)> = own.chain(theirs.iter().copied()).collect();
    headers::write(&all, out);
}

/// A UUID as text.
pub(crate) fn uuid(bits: u128) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = String::with_capacity(36);
    for (at, byte) in bits.to_be_bytes().into_iter().enumerate() {
        if matches!(at, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push(char::from(DIGITS[usize::from(byte >> 4)]));
        text.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
    text
}
