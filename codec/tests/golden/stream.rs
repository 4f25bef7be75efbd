//! Call-home sockets: streams of two-part messages.

use corelane_codec::call_home::{self, Prologue, StreamMessage};
use corelane_codec::control_message::{PayloadCodec, StreamType};
use corelane_codec::error::DynamoError;
use corelane_codec::item;
use corelane_codec::two_part::{self, Message};
use serde_json::Value;

use crate::byte_by_byte;
use crate::common::{Vector, unhex};

pub(crate) fn check(vector: &Vector) {
    let name = &vector.name;
    let mut rest = &vector.bytes[..];
    let mut words = vec![];
    let frames = vector.fields()["frames"].as_array();
    while !rest.is_empty() {
        byte_by_byte(
            name,
            rest,
            |input| two_part::decode(input, None),
            Message::frame_bytes,
        );
        let message = two_part::decode(rest, None).frame().expect(name);
        if let Some(frames) = frames {
            compare(name, rest, &message, &frames[words.len()]);
        }
        words.push(word(name, rest, &message));
        rest = &rest[message.frame_bytes()..];
    }
    if let Some(frames) = frames {
        assert_eq!(frames.len(), words.len(), "{name}");
    }
    let words = words.join(" ");
    assert_eq!(words, expected(name, &words), "{name}");
}

/// Compares one message with its row, and writes it again.
fn compare(name: &str, bytes: &[u8], message: &Message, row: &Value) {
    let (header, body) = (&bytes[message.header.clone()], &bytes[message.body.clone()]);
    assert_eq!(
        header,
        row["header"].as_str().expect(name).as_bytes(),
        "{name}"
    );
    let want = match (&row["data"], &row["data_hex"]) {
        (Value::String(text), _) => text.as_bytes().to_vec(),
        (Value::Null, Value::String(hex)) => unhex(hex),
        (described, _) => unhex(described["hex"].as_str().expect(name)),
    };
    assert_eq!(body, want, "{name}");
    if let Some(frame_bytes) = row["len"].as_u64() {
        assert_eq!(message.frame_bytes() as u64, frame_bytes, "{name}");
    }
    if let Some(sum) = row["checksum"].as_str() {
        assert_eq!(format!("{:016x}", message.checksum), sum, "{name}");
    }
    assert_eq!(message.verify(bytes), Ok(()), "{name}");
    let mut ours = vec![];
    match call_home::classify(bytes, message) {
        StreamMessage::Handshake(handshake) => {
            let subject = handshake.subject.to_cow();
            call_home::write_handshake(&subject, handshake.stream_type, &mut ours);
        }
        StreamMessage::Prologue(prologue) => match prologue.error {
            None => ours.extend_from_slice(&call_home::PROLOGUE_OK_FRAME),
            Some(error) => {
                // The typed error is read and written anew, not copied.
                let typed: DynamoError =
                    serde_json::from_slice(prologue.typed_error.expect(name)).expect(name);
                let typed = serde_json::to_vec(&typed).expect(name);
                call_home::write_prologue_error(&error.to_cow(), Some(&typed), &mut ours);
            }
        },
        StreamMessage::Sentinel => ours.extend_from_slice(&call_home::SENTINEL_FRAME),
        StreamMessage::Stop => ours.extend_from_slice(&call_home::STOP_FRAME),
        StreamMessage::Kill => ours.extend_from_slice(&call_home::KILL_FRAME),
        StreamMessage::Item(range) => match wrapper(&bytes[range.clone()]) {
            Some((item, codec)) if item.complete_final => {
                ours.extend_from_slice(call_home::final_marker_frame(codec));
            }
            Some((item, codec)) => {
                let data = item.data.expect(name);
                item::write_frame(&bytes[range][data], codec, &mut ours);
            }
            // Items of a request stream have no wrapper.
            None => two_part::write(b"", body, &mut ours),
        },
        StreamMessage::Empty | StreamMessage::Violation => panic!("{name}: captured violation"),
    }
    let mut without_checksum = bytes[..message.frame_bytes()].to_vec();
    without_checksum[16..24].fill(0);
    assert_eq!(ours, without_checksum, "{name}");
}

fn wrapper(body: &[u8]) -> Option<(item::Item, PayloadCodec)> {
    [PayloadCodec::Json, PayloadCodec::MessagePack]
        .into_iter()
        .find_map(|codec| Some((item::decode(body, codec).ok()?, codec)))
}

fn word(name: &str, bytes: &[u8], message: &Message) -> &'static str {
    match call_home::classify(bytes, message) {
        StreamMessage::Handshake(handshake) => match handshake.stream_type {
            StreamType::Response => "response",
            StreamType::Request => "request",
        },
        StreamMessage::Prologue(Prologue { error: None, .. }) => "ok",
        StreamMessage::Prologue(prologue) => {
            match prologue
                .typed_error
                .map(serde_json::from_slice::<DynamoError>)
            {
                None => "error",
                Some(Ok(_)) => "typed-error",
                Some(Err(_)) => "error-untyped",
            }
        }
        StreamMessage::Item(range) => match wrapper(&bytes[range]) {
            Some((item, _)) if item.complete_final && item.data.is_some() => "last-item",
            Some((item, _)) if item.complete_final => "final",
            Some((item, _)) if item.data.is_none() => "empty-item",
            Some(_) if message.verify(bytes).is_err() => "item-bad-checksum",
            Some(_) => "item",
            None => "other",
        },
        StreamMessage::Sentinel => "sentinel",
        StreamMessage::Stop => "stop",
        StreamMessage::Kill => "kill",
        StreamMessage::Empty => panic!("{name}: no vector has an empty message"),
        StreamMessage::Violation => "violation",
    }
}

/// What each stream consists of, by name.
fn expected<'a>(name: &str, seen: &'a str) -> &'a str {
    match name {
        "hand_worker_prologue_error_text" => "error",
        "hand_worker_prologue_error_typed_invalid" => "typed-error",
        "hand_worker_prologue_error_legacy_unknown" => "error-untyped",
        "hand_worker_prologue_is_data_frame" => "other",
        "hand_worker_prologue_not_json" => "violation",
        "hand_worker_close_before_prologue" => "",
        "hand_worker_close_before_final" => "ok item",
        "hand_worker_sentinel_without_final" => "ok item sentinel",
        "hand_worker_final_then_close" => "ok item final",
        "hand_worker_data_after_final" => "ok item final item sentinel",
        "hand_worker_final_with_data" => "ok last-item sentinel",
        "hand_worker_empty_wrapper" => "ok empty-item final sentinel",
        "hand_worker_bad_payload" | "hand_worker_missing_complete_final" => {
            "ok other final sentinel"
        }
        "hand_worker_worker_sends_stop" => "ok item stop",
        "hand_worker_header_and_data_unknown" => "ok violation",
        "hand_worker_bad_checksum" => "ok item-bad-checksum",
        "live_cancel_stop_before_prologue" => "stop",
        "live_bidi_request_stream_end_sentinel" => "other other sentinel",
        "live_bidi_request_stream_end_kill" => "other other kill",
        "live_bidi_request_socket_handshake" => "request",
        "live_response_ok_codec_absent" => "response ok item final sentinel",
        "live_response_empty_stream_json" => "response ok final sentinel",
        "live_response_generate_error_typed" => "response typed-error sentinel",
        "live_bidi_response_after_truncated_input" => "response ok item",
        _ if name.starts_with("live_cancel_") => "kill",
        _ if name.starts_with("live_response_after_frontend_") => "response ok item",
        "live_response_annotated_json" | "live_response_item_error_json" => {
            let items = seen
                .strip_prefix("response ok ")
                .and_then(|rest| rest.strip_suffix(" final sentinel"));
            let items = items.unwrap_or_else(|| panic!("{name}: {seen}"));
            assert!(
                items.split(' ').all(|word| word == "item"),
                "{name}: {seen}"
            );
            seen
        }
        _ if name.starts_with("live_") => "response ok item item final sentinel",
        _ => panic!("{name}: nothing is expected of it"),
    }
}
