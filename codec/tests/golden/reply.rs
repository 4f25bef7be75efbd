//! Reply frames.

use corelane_codec::limits::MESSAGE_BYTES_MAX_DEFAULT;
use corelane_codec::reply_frame::{self, Reply};
use corelane_codec::{Bad, Decoded};

use crate::byte_by_byte;
use crate::common::{Vector, described};

const MAX: u64 = MESSAGE_BYTES_MAX_DEFAULT;

fn check_bytes(name: &str, bytes: &[u8], max_bytes: u64) {
    byte_by_byte(
        name,
        bytes,
        |input| reply_frame::decode(input, max_bytes),
        |text| text.end,
    );
}

pub(crate) fn valid(vector: &Vector) {
    let (name, bytes) = (&vector.name, &vector.bytes[..]);
    check_bytes(name, bytes, MAX);
    let text = reply_frame::decode(bytes, MAX).frame().expect(name);
    assert_eq!(text.end, bytes.len(), "{name}");
    let text = &bytes[text];
    if let Some(length) = vector.fields()["length"].as_u64() {
        assert_eq!(
            text,
            described(&vector.fields()["data"], length as usize),
            "{name}"
        );
    }
    let reply = Reply::classify(text);
    // What the real client made of it, where it was asked.
    match vector.expect()["client"]["error_type"].as_str() {
        Some("WorkerOverloaded") => assert!(matches!(reply, Reply::Overloaded(_)), "{name}"),
        Some("WorkerUnavailable") => assert!(matches!(reply, Reply::Unavailable(_)), "{name}"),
        Some(other) => panic!("{name}: {other}"),
        None if vector.expect().get("client").is_some() => {
            assert!(matches!(reply, Reply::Other(_)), "{name}");
        }
        None => {}
    }
    match name.as_str() {
        "tcp_response_empty_ack" => assert_eq!(bytes, reply_frame::ACCEPTED),
        "tcp_response_overloaded" | "hand_ack_overloaded" => {
            assert_eq!(written(&[reply_frame::OVERLOADED]), bytes);
        }
        "tcp_response_pool_closed" => assert_eq!(written(&[reply_frame::POOL_CLOSED]), bytes),
        "tcp_response_invalid_path" => assert_eq!(written(&[reply_frame::INVALID_PATH]), bytes),
        "tcp_response_unknown_endpoint" => {
            let path = "2a/ns/worker/generate";
            assert_eq!(written(&[reply_frame::UNKNOWN_ENDPOINT, path]), bytes);
        }
        _ => {}
    }
}

fn written(pieces: &[&str]) -> Vec<u8> {
    let mut out = vec![];
    reply_frame::write(pieces, &mut out);
    out
}

pub(crate) fn malformed(vector: &Vector) {
    let (name, bytes) = (&vector.name, &vector.bytes[..]);
    let max_bytes = vector.row["max_message_size"].as_u64().unwrap_or(u64::MAX);
    check_bytes(name, bytes, max_bytes);
    let answer = reply_frame::decode(bytes, max_bytes);
    match vector.expect()["TcpResponseCodec"].as_str() {
        Some(_) => assert!(
            matches!(answer, Decoded::Need(need) if need > bytes.len()),
            "{name}"
        ),
        None => assert!(matches!(answer, Decoded::Bad(Bad::TooLarge(_))), "{name}"),
    }
}

pub(crate) fn stream(vector: &Vector) {
    let name = &vector.name;
    let mut rest = &vector.bytes[..];
    let mut again = vec![];
    let mut refusals = 0;
    while !rest.is_empty() {
        check_bytes(name, rest, MAX);
        let text = reply_frame::decode(rest, MAX).frame().expect(name);
        let reply = Reply::classify(&rest[text.clone()]);
        refusals += usize::from(reply.is_refusal());
        let readable = std::str::from_utf8(&rest[text.clone()]).expect(name);
        reply_frame::write(&[readable], &mut again);
        rest = &rest[text.end..];
    }
    assert_eq!(again, vector.bytes, "{name}");
    if let Some(text) = vector.fields()["text"].as_str() {
        assert_eq!(again, text.as_bytes(), "{name}");
        assert_eq!(refusals, text.matches("Server ").count(), "{name}");
    }
}
