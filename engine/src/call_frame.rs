//! The request frame of a call (spec/request-plane.md §2.2, §3).

use corelane_codec::control_message::{NewControlMessage, RequestType, StreamType, TcpConnection};
use corelane_codec::{EncodeError, headers, request_frame, two_part};

use crate::call::NewCall;
use crate::client::Client;

/// Appends the frame of a call.
///
/// # Errors
/// Its path, headers or control message are longer than the wire has room for.
pub(crate) fn write(
    client: &mut Client,
    new: &NewCall,
    subject: u128,
    out: &mut Vec<u8>,
) -> Result<(), EncodeError> {
    let id = match new.id.is_empty() {
        true => uuid(client.draw()),
        false => new.id.clone(),
    };
    let subject = uuid(subject);
    let message = NewControlMessage {
        id: &id,
        request_type: RequestType::SingleIn,
        payload_codec: new.codec,
        connection_info: TcpConnection {
            address: &client.address,
            subject: &subject,
            context: &id,
            stream_type: StreamType::Response,
        },
        metadata: &[],
        frontend_send_ts_ns: None,
        request_stream_connection_info: None,
    };
    let mut control = Vec::with_capacity(512);
    message.write(&mut control)?;
    let path = String::from_utf8_lossy(&new.path);
    let own = [
        (headers::ENDPOINT_PATH, &*path),
        (headers::REQUEST_ID, &*id),
    ];
    let theirs = new.headers.iter().map(|(name, value)| (&**name, &**value));
    let theirs: Vec<(&str, &str)> = theirs.collect();
    let own = own
        .iter()
        .copied()
        .filter(|(name, _)| theirs.iter().all(|(other, _)| other != name));
    let all: Vec<(&str, &str)> = own.chain(theirs.iter().copied()).collect();
    let mut map = Vec::with_capacity(256);
    headers::write(&all, &mut map);
    let prefix = two_part::prefix(control.len(), new.body.len());
    let payload_bytes = prefix.len() + control.len() + new.body.len();
    request_frame::write_prefix(&new.path, &map, payload_bytes, out)?;
    for part in [&prefix[..], &control, &new.body] {
        out.extend_from_slice(part);
    }
    Ok(())
}

/// A UUID as text.
pub(crate) fn uuid(bits: u128) -> String {
    let hex = format!("{bits:032x}");
    [
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..],
    ]
    .join("-")
}
