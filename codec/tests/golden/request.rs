//! Request frames: the lenient decoder as the server, the strict one as the one-shot decoder.

use corelane_codec::control_message::{
    self, ConnectionInfo, ConnectionInfoError, ControlError, ControlMessage, NewControlMessage,
    PayloadCodec, RequestType, StreamType, TcpConnection, TcpConnectionInfo,
};
use corelane_codec::limits::{CONNECTION_INFO_SCRATCH_BYTES, MESSAGE_BYTES_MAX_DEFAULT};
use corelane_codec::request_frame::{self, Prefix};
use corelane_codec::{Bad, Decoded, headers, reply_frame, two_part};
use serde_json::Value;

use crate::byte_by_byte;
use crate::common::{Vector, described, unhex};

fn both_byte_by_byte(vector: &Vector) {
    let (name, bytes) = (&vector.name, &vector.bytes[..]);
    byte_by_byte(name, bytes, request_frame::decode_prefix, |prefix| {
        prefix.prefix_bytes
    });
    byte_by_byte(name, bytes, request_frame::decode_strict, |frame| {
        frame.frame_bytes
    });
}

pub(crate) fn valid(vector: &Vector) {
    both_byte_by_byte(vector);
    let (name, bytes) = (&vector.name, &vector.bytes[..]);
    let prefix = request_frame::decode_prefix(bytes).frame().expect(name);
    let strict = request_frame::decode_strict(bytes).frame().expect(name);
    assert_eq!(strict.frame_bytes, bytes.len(), "{name}");
    assert_eq!(
        &bytes[prefix.path.clone()],
        strict.path.as_bytes(),
        "{name}"
    );
    let payload = &bytes[prefix.payload()];
    assert_eq!(payload, strict.payload, "{name}");

    let fields = vector.fields();
    let path_bytes = prefix.path.len();
    match fields["endpoint_path"].as_str() {
        None => {}
        Some("a x 65535") => assert_eq!(strict.path, "a".repeat(65_535)),
        Some(path) => assert_eq!(strict.path, path, "{name}"),
    }
    if let Some(want) = fields["endpoint_path_len"].as_u64() {
        assert_eq!(path_bytes as u64, want, "{name}");
        assert_eq!(
            prefix.prefix_bytes as u64,
            fields["header_size"].as_u64().unwrap()
        );
        assert_eq!(
            payload,
            described(&fields["payload"], payload.len()),
            "{name}"
        );
    }
    if vector.expect().get("ZeroCopyTcpDecoder").is_some() {
        lenient_outcome(vector);
        one_shot_outcome(vector);
    }
    check_headers(name, &bytes[prefix.headers.clone()], &fields["headers"]);

    let mut again = vec![];
    let map = &bytes[prefix.headers.clone()];
    request_frame::write_frame(strict.path.as_bytes(), map, payload, &mut again).expect(name);
    assert_eq!(again, bytes, "{name}");

    if name.starts_with("live_") || name.starts_with("hand_") {
        envelope(vector, payload);
    }
}

fn check_headers(name: &str, map: &[u8], want: &Value) {
    let Some(want) = want.as_object() else {
        return;
    };
    for (key, value) in want {
        let found = headers::find(map, key);
        let value = value.as_str().expect(name);
        assert!(found.is_some_and(|found| found == value), "{name}: {key}");
    }
}

/// What the server's decoder answered.
fn lenient_outcome(vector: &Vector) {
    let (name, bytes) = (&vector.name, &vector.bytes[..]);
    let expect = &vector.expect()["ZeroCopyTcpDecoder"];
    let answer = request_frame::decode_prefix(bytes);
    if let Some(ok) = expect.get("ok") {
        let prefix = answer.frame().expect(name);
        assert!(request_frame::check_size(&prefix, MESSAGE_BYTES_MAX_DEFAULT).is_ok());
        let path = std::str::from_utf8(&bytes[prefix.path.clone()]);
        match ok["endpoint_path"]["len"].as_u64() {
            Some(want) => assert_eq!(path.expect(name).len() as u64, want, "{name}"),
            None => assert!(path.is_err(), "{name}"),
        }
        assert_eq!(
            u64::from(prefix.payload_bytes),
            ok["payload_len"].as_u64().unwrap()
        );
        let left = bytes.len() as u64 - prefix.frame_bytes();
        assert_eq!(left, ok["left_in_buffer"].as_u64().unwrap(), "{name}");
        let map = &bytes[prefix.headers.clone()];
        check_headers(name, map, &ok["headers"]);
        let mut members = 0;
        if headers::walk(map, |_, _| members += 1) {
            assert_eq!(members, ok["headers"].as_object().unwrap().len(), "{name}");
        } else {
            assert_eq!(ok["headers"], serde_json::json!({}), "{name}");
        }
        return;
    }
    let message = expect["error"]["message"].as_str().expect(name);
    match answer {
        Decoded::Need(_) => {
            assert!(["connection closed", "incomplete message header"].contains(&message));
        }
        Decoded::Frame(prefix) => {
            match request_frame::check_size(&prefix, MESSAGE_BYTES_MAX_DEFAULT) {
                Err(error) => assert_eq!(error.to_string(), message, "{name}"),
                Ok(()) => assert_eq!(
                    message,
                    format!(
                        "incomplete message: expected {} bytes, got {}",
                        prefix.frame_bytes(),
                        bytes.len()
                    )
                ),
            }
        }
        Decoded::Bad(bad) => panic!("{name}: the lenient decoder said {bad}"),
    }
}

/// What the one-shot decoder answered.
fn one_shot_outcome(vector: &Vector) {
    let (name, bytes) = (&vector.name, &vector.bytes[..]);
    let expect = &vector.expect()["TcpRequestMessage::decode"];
    let answer = request_frame::decode_strict(bytes);
    if let Some(ok) = expect.get("ok") {
        let frame = answer.frame().expect(name);
        assert_eq!(
            frame.path.len() as u64,
            ok["endpoint_path_len"].as_u64().unwrap()
        );
        assert_eq!(
            frame.payload.len() as u64,
            ok["payload_len"].as_u64().unwrap()
        );
        let mut members = 0;
        assert!(headers::walk(frame.headers, |_, _| members += 1));
        assert_eq!(members, ok["headers"].as_u64().unwrap(), "{name}");
        return;
    }
    let message = expect["error"]["message"].as_str().expect(name);
    match (expect["error"]["kind"].as_str().expect(name), answer) {
        ("UnexpectedEof", Decoded::Need(need)) => assert!(need > bytes.len(), "{name}"),
        ("InvalidData", Decoded::Bad(Bad::PathNotUtf8 { .. })) => {
            assert!(message.starts_with("Invalid UTF-8"), "{name}");
        }
        ("InvalidData", Decoded::Bad(Bad::HeadersNotJson)) => {
            assert!(message.starts_with("Invalid JSON"), "{name}");
        }
        (kind, answer) => panic!("{name}: {kind} {message}, we said {answer:?}"),
    }
}

pub(crate) fn malformed(vector: &Vector) {
    both_byte_by_byte(vector);
    lenient_outcome(vector);
    one_shot_outcome(vector);
}

/// Whatever went over one connection, answered as Dynamo's server did.
pub(crate) fn stream(vector: &Vector) {
    let name = &vector.name;
    let mut rest = &vector.bytes[..];
    let mut replies = vec![];
    let mut frames = vec![];
    loop {
        byte_by_byte(name, rest, request_frame::decode_prefix, |prefix| {
            prefix.prefix_bytes
        });
        let Decoded::Frame(prefix) = request_frame::decode_prefix(rest) else {
            break;
        };
        if let Err(error) = request_frame::check_size(&prefix, MESSAGE_BYTES_MAX_DEFAULT) {
            reply_frame::write_too_large(error, &mut replies);
            break;
        }
        if rest.len() < prefix.payload().end {
            break;
        }
        answer(rest, &prefix, &mut replies);
        frames.push(prefix.payload().end);
        rest = &rest[prefix.payload().end..];
    }
    if let Some(want) = vector.expect()["reply_hex"].as_str() {
        assert_eq!(replies, unhex(want), "{name}");
    }
    match name.as_str() {
        "tcp_request_two_pipelined" => {
            assert_eq!(frames, [16, 17]);
            assert!(rest.is_empty());
        }
        "live_server_in_oversize" | "live_server_in_truncated_then_close" => {
            assert!(frames.is_empty() && !rest.is_empty());
        }
        _ => assert!(rest.is_empty() && !frames.is_empty(), "{name}"),
    }
}

/// Any path is known to this server but those that start with `dead`.
fn answer(frame: &[u8], prefix: &Prefix, replies: &mut Vec<u8>) {
    match std::str::from_utf8(&frame[prefix.path.clone()]) {
        Err(_) => reply_frame::write(&[reply_frame::INVALID_PATH], replies),
        Ok(path) if path.starts_with("dead") => {
            reply_frame::write_unknown_endpoint(path, replies);
        }
        Ok(_) => replies.extend_from_slice(&reply_frame::ACCEPTED),
    }
}

/// Why a worker of ours would not run the request in an envelope.
#[derive(Debug, PartialEq)]
enum Unusable {
    NoMessage,
    Control(ControlError),
    Connection(ConnectionInfoError),
    OtherContext,
    OtherStream,
    BodyMissing,
    Body,
}

fn read_envelope(payload: &[u8]) -> Result<ControlMessage<'_>, Unusable> {
    let message = two_part::decode(payload, None)
        .frame()
        .ok_or(Unusable::NoMessage)?;
    assert_eq!(message.frame_bytes(), payload.len());
    assert_eq!(message.verify(payload), Ok(()));
    let control =
        control_message::decode(&payload[message.header.clone()]).map_err(Unusable::Control)?;
    check_home(&control, &control.connection_info, StreamType::Response)?;
    if let Some(info) = &control.request_stream_connection_info {
        check_home(&control, info, StreamType::Request)?;
    }
    if control.request_type == RequestType::ManyIn {
        assert!(message.body.is_empty());
        return Ok(control);
    }
    if message.body.is_empty() {
        return Err(Unusable::BodyMissing);
    }
    let body = &payload[message.body.clone()];
    corelane_codec::item::from_bytes::<Value>(body, control.payload_codec)
        .map_err(|_| Unusable::Body)?;
    Ok(control)
}

fn check_home(
    control: &ControlMessage<'_>,
    info: &ConnectionInfo<'_>,
    want: StreamType,
) -> Result<(), Unusable> {
    let mut scratch = [0; CONNECTION_INFO_SCRATCH_BYTES];
    let info = TcpConnectionInfo::parse(info, &mut scratch).map_err(Unusable::Connection)?;
    info.socket_addr().map_err(Unusable::Connection)?;
    if info.context != control.id {
        return Err(Unusable::OtherContext);
    }
    if info.stream_type != want {
        return Err(Unusable::OtherStream);
    }
    Ok(())
}

fn envelope(vector: &Vector, payload: &[u8]) {
    let name = vector.name.as_str();
    let outcome = read_envelope(payload);
    let refused = |want: Unusable| assert_eq!(outcome.as_ref().unwrap_err(), &want, "{name}");
    match name {
        "hand_envelope_context_mismatch" => refused(Unusable::OtherContext),
        "hand_envelope_stream_type_request" => refused(Unusable::OtherStream),
        "hand_envelope_unknown_transport" => {
            refused(Unusable::Connection(ConnectionInfoError::UnknownTransport));
        }
        "hand_envelope_unknown_payload_codec" => {
            refused(Unusable::Control(ControlError::UnknownValue(
                "payload_codec",
            )));
        }
        "hand_envelope_header_only_to_unary" => refused(Unusable::BodyMissing),
        "hand_envelope_body_not_json" | "hand_envelope_body_msgpack_but_codec_json" => {
            refused(Unusable::Body);
        }
        "hand_envelope_control_missing_fields" => {
            refused(Unusable::Control(ControlError::Missing("request_type")));
        }
        "hand_envelope_garbage_payload" | "hand_envelope_empty_payload" => {
            refused(Unusable::NoMessage);
        }
        _ => {
            let control = outcome.unwrap_or_else(|error| panic!("{name}: {error:?}"));
            control_fields(name, &control, &vector.fields()["control"]);
            if name.starts_with("live_") {
                rewrite(name, &control, payload);
            }
        }
    }
    let expect = vector.expect();
    if expect["worker_calls_home"] == false {
        assert!(
            name.starts_with("hand_envelope"),
            "{name} should have been refused"
        );
    }
}

fn control_fields(name: &str, control: &ControlMessage<'_>, want: &Value) {
    assert_eq!(want["id"], *control.id.to_cow(), "{name}");
    assert_eq!(want["request_type"], control.request_type.name(), "{name}");
    assert_eq!(
        want["response_type"],
        control.response_type.name(),
        "{name}"
    );
    let codec = want["payload_codec"].as_str().unwrap_or("json");
    assert_eq!(PayloadCodec::from_name(codec), Some(control.payload_codec));
    assert_eq!(
        want["connection_info"]["info"],
        *control.connection_info.info.to_cow()
    );
    let metadata = control
        .metadata
        .map(|raw| serde_json::from_slice::<Value>(raw).unwrap());
    assert_eq!(want.get("metadata").cloned(), metadata, "{name}");
    let has_stream = want.get("request_stream_connection_info").is_some();
    assert_eq!(has_stream, control.request_stream_connection_info.is_some());
}

/// A real client's control message comes out of our writer byte for byte.
fn rewrite(name: &str, control: &ControlMessage<'_>, payload: &[u8]) {
    let id = control.id.to_cow();
    let mut pairs = vec![];
    if let Some(metadata) = control.metadata {
        headers::walk(metadata, |key, value| {
            pairs.push((key.to_string(), value.to_string()))
        });
    }
    let metadata: Vec<_> = pairs
        .iter()
        .map(|(k, v)| (k.as_str(), v.as_str()))
        .collect();
    let mut scratch = [0; 1024];
    let home = TcpConnectionInfo::parse(&control.connection_info, &mut scratch).unwrap();
    let mut other_scratch = [0; 1024];
    let stream = control
        .request_stream_connection_info
        .map(|info| TcpConnectionInfo::parse(&info, &mut other_scratch).unwrap());
    let connection = |info: &TcpConnectionInfo<'_>| {
        let text = |text: corelane_codec::json::Text<'_>| text.as_str().unwrap().to_owned();
        (text(info.address), text(info.subject), info.stream_type)
    };
    let home = connection(&home);
    let stream = stream.map(|info| connection(&info));
    fn borrow<'a>(from: &'a (String, String, StreamType), id: &'a str) -> TcpConnection<'a> {
        TcpConnection {
            address: &from.0,
            subject: &from.1,
            context: id,
            stream_type: from.2,
        }
    }
    let message = NewControlMessage {
        id: &id,
        request_type: control.request_type,
        payload_codec: control.payload_codec,
        connection_info: borrow(&home, &id),
        metadata: &metadata,
        frontend_send_ts_ns: control.frontend_send_ts_ns,
        request_stream_connection_info: stream.as_ref().map(|info| borrow(info, &id)),
    };
    let mut again = vec![];
    message.write(&mut again).unwrap();
    let whole = two_part::decode(payload, None).frame().unwrap();
    assert_eq!(
        std::str::from_utf8(&again).unwrap(),
        std::str::from_utf8(&payload[whole.header]).unwrap(),
        "{name}"
    );
}
