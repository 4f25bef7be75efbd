//! One hook per decoder for the fuzzers: each takes any bytes and checks what must always hold.
//!
//! No hook may panic on any input; a panic is a finding. They are not part of the API.

mod event;
mod prompt;

#[cfg(feature = "curve")]
pub use crate::curve::fuzz::curve;
pub use event::{Derived, event_envelope, event_frame, event_hello, event_names, event_payload};
pub use prompt::{kv_headers, token_ids};

use crate::control_message::{
    ConnectionInfo, NewControlMessage, PayloadCodec, TcpConnection, TcpConnectionInfo,
};
use crate::error::DynamoError;
use crate::json::{Text, Value};
use crate::path::{EndpointId, InstanceKey, ModelKey, Slug, TcpTransport};
use crate::{
    Decoded, call_home, control_message, discovery, headers, item, json, limits, two_part,
};

/// Takes any bytes and panics if a promise is broken.
pub type Hook = fn(&[u8]);

/// Everything, for tests that throw the same bytes at all decoders.
pub const ALL: &[(&str, Hook)] = &[
    ("request_frame", request_frame),
    ("reply_frame", reply_frame),
    ("quic_frame", quic_frame),
    ("two_part", two_part),
    ("json", json),
    ("headers", headers),
    ("control_message", control_message),
    ("connection_info", connection_info),
    ("call_home", call_home),
    ("mux", mux),
    ("zmtp_greeting", zmtp_greeting),
    ("zmtp_command", zmtp_command),
    ("zmtp_frame", zmtp_frame),
    #[cfg(feature = "curve")]
    ("curve", curve),
    ("item_json", item_json),
    ("item_msgpack", item_msgpack),
    ("error", error),
    ("names", names),
    ("discovery", discovery),
    ("event_frame", event_frame),
    ("event_hello", event_hello),
    ("event_envelope", event_envelope),
    ("event_payload", event_payload),
    ("event_names", event_names),
    ("token_ids", token_ids),
    ("kv_headers", kv_headers),
];

/// Checks that a decoder asks for more only while it has less, that what it asks for is never
/// more than what it then takes, and that the answer does not change when more bytes follow.
/// `size` says how many bytes a frame takes. At most `STEPS` prefixes of the input are tried.
fn incremental<'a, T: PartialEq + std::fmt::Debug>(
    data: &'a [u8],
    decode: impl Fn(&'a [u8]) -> Decoded<T>,
    size: impl Fn(&T) -> usize,
) {
    const STEPS: usize = 512;
    let whole = decode(data);
    let mut have = 0;
    let mut asked = 0;
    for _ in 0..STEPS {
        if have > data.len() {
            // The whole input was not enough either.
            assert!(matches!(whole, Decoded::Need(_)));
            return;
        }
        match decode(&data[..have]) {
            Decoded::Need(need) => {
                assert!(need > have, "asks for {need} with {have} at hand");
                assert!(need >= asked, "asks for less after more");
                if let Decoded::Frame(frame) = &whole {
                    assert!(need <= size(frame), "asks for more than the frame has");
                }
                if need - have > 1 && need <= data.len() {
                    // One byte fewer than asked for must not be enough.
                    assert!(matches!(decode(&data[..need - 1]), Decoded::Need(_)));
                }
                asked = need;
                have = need;
            }
            answer => {
                assert_eq!(answer, whole, "the answer depends on later bytes");
                return;
            }
        }
    }
    panic!("no progress");
}

/// Request frames: both decoders, and the writer.
pub fn request_frame(data: &[u8]) {
    use crate::request_frame::{check_size, decode_prefix, decode_strict, write_frame};
    incremental(data, decode_prefix, |prefix| prefix.prefix_bytes);
    incremental(data, decode_strict, |frame| frame.frame_bytes);
    let Decoded::Frame(prefix) = decode_prefix(data) else {
        return;
    };
    assert!(prefix.headers.end < prefix.prefix_bytes && prefix.prefix_bytes <= data.len());
    assert!(prefix.prefix_bytes <= limits::REQUEST_PREFIX_BYTES_MAX);
    assert!(check_size(&prefix, prefix.frame_bytes()).is_ok());
    assert!(check_size(&prefix, prefix.frame_bytes() - 1).is_err());
    let map = &data[prefix.headers.clone()];
    let Some(payload) = data.get(prefix.payload()) else {
        return;
    };
    let mut again = vec![];
    write_frame(&data[prefix.path.clone()], map, payload, &mut again).expect("it fitted before");
    assert_eq!(again, data[..prefix.payload().end]);
}

/// QUIC frames, one after another.
pub fn quic_frame(data: &[u8]) {
    use crate::quic_frame::{decode, write};
    let max_bytes = 64 << 10;
    incremental(
        data,
        |input| decode(input, max_bytes),
        |frame| frame.payload.end,
    );
    let mut rest = data;
    let mut again = vec![];
    while let Decoded::Frame(frame) = decode(rest, max_bytes) {
        let end = frame.payload.end;
        write(frame.kind, &frame.id, &rest[frame.payload], &mut again);
        rest = &rest[end..];
    }
    assert_eq!(again, data[..data.len() - rest.len()]);
}

/// Replies.
pub fn reply_frame(data: &[u8]) {
    use crate::reply_frame::{Reply, decode, write};
    let max_bytes = limits::MESSAGE_BYTES_MAX_DEFAULT;
    incremental(data, |input| decode(input, max_bytes), |text| text.end);
    let Decoded::Frame(text) = decode(data, max_bytes) else {
        return;
    };
    let frame_bytes = text.end;
    let reply = Reply::classify(&data[text.clone()]);
    assert_eq!(reply == Reply::Accepted, text.is_empty());
    if let Ok(text) = std::str::from_utf8(&data[text]) {
        let mut again = vec![];
        write(&[text], &mut again);
        assert_eq!(again, data[..frame_bytes]);
    }
}

/// Two-part messages, with and without a limit.
pub fn two_part(data: &[u8]) {
    let max_bytes = Some(limits::MESSAGE_BYTES_MAX_DEFAULT);
    for max_bytes in [None, max_bytes] {
        incremental(
            data,
            |input| two_part::decode(input, max_bytes),
            two_part::Message::frame_bytes,
        );
    }
    let Decoded::Frame(message) = two_part::decode(data, None) else {
        return;
    };
    let (header, body) = (&data[message.header.clone()], &data[message.body.clone()]);
    let sum = two_part::checksum(header, body);
    let fits = message.checksum == 0 || message.checksum == sum;
    assert_eq!(message.verify(data).is_ok(), fits);
    let mut again = vec![];
    two_part::write(header, body, &mut again);
    let decoded = two_part::decode(&again, None)
        .frame()
        .expect("just written");
    assert_eq!(
        (decoded.header, decoded.body),
        (message.header, message.body)
    );
    assert_eq!(again[24..], data[24..again.len()]);
}

fn text_holds(text: Text<'_>) {
    let owned = text.to_cow();
    assert!(text == *owned);
    let mut buffer = vec![0; owned.len()];
    assert_eq!(text.unescape_into(&mut buffer), Ok(&*owned));
    if let Some(short) = owned.len().checked_sub(1) {
        assert!(text.unescape_into(&mut buffer[..short]).is_err());
    }
    let mut written = vec![];
    json::write_string(&owned, &mut written);
    let again = Value::parse(&written).expect("just written");
    assert_eq!(again.text().expect("just written"), text);
}

fn walk_value(data: &[u8], value: Value<'_>, depth: usize) {
    assert_eq!(&data[value.range()], value.raw());
    assert_eq!(
        Value::parse(value.raw()).map(|value| value.raw()),
        Ok(value.raw())
    );
    if let Ok(text) = value.text() {
        text_holds(text);
    }
    if depth == 0 {
        return;
    }
    if let Ok(mut object) = value.object() {
        while let Ok(Some(member)) = object.next_member() {
            text_holds(member.key);
            walk_value(data, member.value, depth - 1);
        }
    }
    if let Ok(mut array) = value.array() {
        while let Some(element) = array.next_element().expect("the array was scanned") {
            walk_value(data, element, depth - 1);
        }
    }
}

/// The JSON scanner, against serde_json: what it takes, that takes too, but for numbers out of
/// range of a float, and for text that is not Unicode, which the scanner finds only when asked.
pub fn json(data: &[u8]) {
    let reference = serde_json::from_slice::<serde_json::Value>(data);
    match Value::parse(data) {
        Ok(value) => {
            walk_value(data, value, 3);
            if let Ok(number) = value.u64() {
                let reference = reference.expect("an integer");
                assert_eq!(reference.as_u64(), Some(number));
            } else if let (Ok(text), Ok(reference)) = (value.text(), &reference) {
                assert_eq!(reference.as_str(), Some(&*text.to_cow()));
            }
        }
        Err(error) => {
            // serde_json stops one level earlier or at the same.
            let deep = matches!(error, json::JsonError::TooDeep { .. });
            assert!(reference.is_err() || deep, "{error}");
        }
    }
}

/// Headers, against a map.
pub fn headers(data: &[u8]) {
    type Map = std::collections::HashMap<String, String>;
    match serde_json::from_slice::<Map>(data) {
        Ok(map) => {
            assert!(headers::is_valid(data));
            for (key, value) in &map {
                assert!(headers::find(data, key).is_some_and(|found| found == **value));
            }
            let members: Vec<_> = map.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
            let mut again = vec![];
            headers::write(&members, &mut again);
            assert_eq!(serde_json::from_slice::<Map>(&again).ok(), Some(map));
        }
        Err(_) => assert!(!headers::is_valid(data)),
    }
    let _ = headers::find(data, headers::REQUEST_ID);
}

/// Control messages: what is read can be written and read again.
pub fn control_message(data: &[u8]) {
    let Ok(view) = control_message::decode(data) else {
        return;
    };
    let mut pairs = std::collections::BTreeMap::new();
    if let Some(metadata) = view.metadata {
        headers::walk(metadata, |key, value| {
            pairs.insert(key.to_string(), value.to_string());
        });
    }
    let metadata: Vec<_> = pairs
        .iter()
        .map(|(k, v)| (k.as_str(), v.as_str()))
        .collect();
    let id = view.id.to_cow();
    let connection = TcpConnection {
        address: "127.0.0.1:1",
        subject: "s",
        context: &id,
        stream_type: control_message::StreamType::Response,
    };
    let message = NewControlMessage {
        id: &id,
        request_type: view.request_type,
        payload_codec: view.payload_codec,
        connection_info: connection,
        metadata: &metadata,
        frontend_send_ts_ns: view.frontend_send_ts_ns,
        request_stream_connection_info: view.request_stream_connection_info.map(|_| connection),
    };
    let mut again = vec![];
    if message.write(&mut again).is_ok() {
        let read = control_message::decode(&again).expect("just written");
        assert!(read.id == view.id && read.payload_codec == view.payload_codec);
        assert_eq!(read.frontend_send_ts_ns, view.frontend_send_ts_ns);
        let mut scratch = vec![0; again.len()];
        let info = TcpConnectionInfo::parse(&read.connection_info, &mut scratch);
        assert!(info.expect("just written").context == view.id);
    }
    again.clear();
    let range = view.connection_info.range();
    let connection = control_message::NewConnection::Tcp(connection);
    if control_message::write_redirected(data, range, &connection, &mut again).is_ok() {
        let read = control_message::decode(&again).expect("one member was replaced");
        assert!(read.id == view.id && read.metadata == view.metadata);
    }
}

/// Connection infos, with a scratch of the size that callers use.
pub fn connection_info(data: &[u8]) {
    let Ok(view) = ConnectionInfo::decode(data) else {
        return;
    };
    let mut scratch = [0; limits::CONNECTION_INFO_SCRATCH_BYTES];
    let Ok(info) = TcpConnectionInfo::parse(&view, &mut scratch) else {
        return;
    };
    let _ = info.socket_addr();
    let (address, subject) = (info.address.to_cow(), info.subject.to_cow());
    let mut again = vec![];
    let connection = TcpConnection {
        address: &address,
        subject: &subject,
        context: &info.context.to_cow(),
        stream_type: info.stream_type,
    };
    connection.write(&mut again);
    let read = ConnectionInfo::decode(&again).expect("just written");
    let mut scratch = vec![0; again.len()];
    let read = TcpConnectionInfo::parse(&read, &mut scratch).expect("just written");
    assert!(read.subject == info.subject && read.context == info.context);
}

/// A stream of messages on a call-home socket.
pub fn call_home(data: &[u8]) {
    let mut rest = data;
    while let Decoded::Frame(message) = two_part::decode(rest, None) {
        match call_home::classify(rest, &message) {
            call_home::StreamMessage::Item(body) => {
                assert_eq!(body, message.body);
            }
            call_home::StreamMessage::Handshake(handshake) => {
                let subject = handshake.subject.to_cow();
                let mut again = vec![];
                call_home::write_handshake(&subject, handshake.stream_type, &mut again);
                let read = call_home::Handshake::decode(&again[24..]);
                assert_eq!(read, Ok(handshake));
            }
            call_home::StreamMessage::Prologue(prologue) => {
                if let Some(error) = prologue.error {
                    let error = error.to_cow();
                    let mut again = vec![];
                    call_home::write_prologue_error(&error, prologue.typed_error, &mut again);
                    assert_eq!(call_home::Prologue::decode(&again[24..]), Ok(prologue));
                }
            }
            _ => {}
        }
        rest = &rest[message.frame_bytes()..];
    }
}

type TypedItem = item::StreamItem<item::Annotated<serde_json::Value>>;

fn item(data: &[u8], codec: PayloadCodec) {
    if let Ok(view) = item::decode(data, codec)
        && let Some(range) = view.data
    {
        let mut again = vec![];
        item::write_body(&data[range.clone()], codec, &mut again);
        let read = item::decode(&again, codec).expect("just written");
        let range_again = read.data.expect("it has data");
        assert_eq!(again[range_again], data[range]);
    }
    if let Ok(typed) = item::from_bytes::<TypedItem>(data, codec) {
        let mut again = vec![];
        if item::write_value(&typed, codec, &mut again).is_ok() {
            let view = item::decode(&again, codec).expect("just written");
            assert_eq!(view.complete_final, typed.complete_final);
            assert_eq!(view.data.is_some(), typed.data.is_some());
        }
    }
}

/// Chunks of multiplexed connections.
pub fn mux(data: &[u8]) {
    use crate::mux::{PREFIX_BYTES, decode, prefix};
    incremental(data, decode, |_| PREFIX_BYTES);
    if let Decoded::Frame(chunk) = decode(data) {
        let again = prefix(chunk.stream, chunk.kind, chunk.bytes);
        assert_eq!(again, data[..PREFIX_BYTES]);
    }
}

/// Greetings of ZMTP.
pub fn zmtp_greeting(data: &[u8]) {
    use crate::zmtp::{GREETING_BYTES, decode_greeting};
    incremental(data, decode_greeting, |_| GREETING_BYTES);
}

/// Bodies of ZMTP's commands, and READY's properties.
pub fn zmtp_command(data: &[u8]) {
    use crate::zmtp::{Command, decode_command, decode_subscription, property, write_subscription};
    match decode_command(data) {
        Ok(Command::Ready(properties)) => {
            if let Ok(Some(value)) = property(properties, "Socket-Type") {
                assert!(value.len() + 5 + 11 <= properties.len());
            }
        }
        Ok(Command::Subscribe(prefix)) => {
            let mut again = vec![];
            write_subscription(1, true, prefix, &mut again);
            assert!(again.ends_with(data));
        }
        _ => {}
    }
    if let Some((subscribe, prefix)) = decode_subscription(data) {
        let mut again = vec![];
        write_subscription(0, subscribe, prefix, &mut again);
        assert!(again.ends_with(data));
    }
}

/// Frames of ZMTP, and messages that carry an event: both ways to find one agree.
pub fn zmtp_frame(data: &[u8]) {
    use crate::zmtp::{Walk, decode_event, decode_head};
    let max_bytes = 64 << 10;
    incremental(
        data,
        |input| decode_head(input, max_bytes),
        |head| head.head_bytes,
    );
    let mut walk = Walk::default();
    while !walk.is_done() {
        let head = data
            .get(walk.at()..)
            .map(|rest| decode_head(rest, max_bytes));
        let step = match head {
            Some(Decoded::Frame(head)) => walk.step(&head, max_bytes),
            _ => return assert_eq!(decode_event(data, max_bytes), None),
        };
        if step.is_err() {
            return assert_eq!(decode_event(data, max_bytes), None);
        }
    }
    let copy = |at: usize, to: &mut [u8]| {
        let from = &data[at.min(data.len())..];
        let bytes = from.len().min(to.len());
        to[..bytes].copy_from_slice(&from[..bytes]);
    };
    let walked = walk
        .event(copy)
        .ok()
        .filter(|event| event.end <= data.len());
    assert_eq!(decode_event(data, max_bytes), walked);
}

/// Items in JSON.
pub fn item_json(data: &[u8]) {
    item(data, PayloadCodec::Json);
}

/// Items in MessagePack.
pub fn item_msgpack(data: &[u8]) {
    item(data, PayloadCodec::MessagePack);
}

/// Typed errors in both codecs.
pub fn error(data: &[u8]) {
    for codec in [PayloadCodec::Json, PayloadCodec::MessagePack] {
        let Ok(error) = item::from_bytes::<DynamoError>(data, codec) else {
            continue;
        };
        assert!(error.chain().count() <= limits::CAUSES_MAX + 1);
        assert!(error.text().len() <= limits::DIAGNOSTIC_BYTES_MAX);
        let mut again = vec![];
        item::write_value(&error, codec, &mut again).expect("it was read");
        let read = item::from_bytes::<DynamoError>(&again, codec);
        assert_eq!(read.expect("just written"), error);
    }
}

/// Names, paths, keys, transports and slugs.
pub fn names(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let id = EndpointId::parse(text);
    let path = crate::path::instance_path(7, &id);
    assert_eq!(crate::path::parse_instance_path(&path), Some((7, id)));
    if let Some((instance_id, endpoint)) = crate::path::parse_instance_path(text) {
        let again = crate::path::instance_path(instance_id, &endpoint);
        let read = crate::path::parse_instance_path(&again);
        assert_eq!(read, Some((instance_id, endpoint)));
    }
    if let Some(key) = InstanceKey::parse(text) {
        assert_eq!(InstanceKey::parse(&key.to_string()), Some(key));
    }
    if let Some(key) = ModelKey::parse(text) {
        assert_eq!(ModelKey::parse(&key.to_string()), Some(key));
    }
    if let Ok(transport) = TcpTransport::parse(text) {
        assert_eq!(TcpTransport::parse(&transport.value()), Ok(transport));
    }
    let slug = Slug::slugify(text);
    assert_eq!(Slug::strict(slug.as_str()).as_ref(), Ok(&slug));
    let unique = Slug::slugify_unique(text);
    assert!(Slug::strict(unique.as_str()).is_ok() && unique.as_str().len() >= 8);
}

/// Discovery records.
pub fn discovery(data: &[u8]) {
    if let Ok(record) = serde_json::from_slice::<discovery::EndpointRecord>(data) {
        let again = serde_json::to_vec(&record).expect("it was read");
        let read = serde_json::from_slice::<discovery::EndpointRecord>(&again);
        assert_eq!(read.expect("just written"), record);
    }
    if let Ok(record) = serde_json::from_slice::<discovery::ModelRecord>(data) {
        let again = serde_json::to_vec(&record).expect("it was read");
        let read = serde_json::from_slice::<discovery::ModelRecord>(&again);
        let read = read.expect("just written");
        assert_eq!(read.card_json.get(), record.card_json.get());
        let _ = (record.card(), record.key());
    }
}
