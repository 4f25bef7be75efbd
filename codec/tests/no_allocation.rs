//! Decoding allocates nothing: every decoder runs over golden bytes under a counting allocator.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::hint::black_box;

use corelane_codec::call_home::{self, StreamMessage};
use corelane_codec::control_message::{self, PayloadCodec, TcpConnectionInfo};
use corelane_codec::event::{
    Envelope, ForwardPass, KvChange, KvEvents, KvMetrics, Sequence, multipart, topic,
};
use corelane_codec::{Decoded, headers, item, json, reply_frame, request_frame, two_part};

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: every call goes to the system allocator unchanged; the counter is a plain thread-local
// cell without a destructor, so touching it allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promises about `layout` are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises about both are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn count(work: impl FnOnce()) -> usize {
    let before = ALLOCATIONS.with(Cell::get);
    work();
    ALLOCATIONS.with(Cell::get) - before
}

/// Reads a request the way a server and a worker do; says how many control messages it met.
fn request(bytes: &[u8]) -> usize {
    let Decoded::Frame(prefix) = request_frame::decode_prefix(bytes) else {
        return 0;
    };
    let _ = black_box(request_frame::check_size(&prefix, 1 << 25));
    let _ = black_box(request_frame::decode_strict(bytes));
    let map = &bytes[prefix.headers.clone()];
    black_box(headers::find_all(
        map,
        [headers::REQUEST_ID, headers::FRONTEND_SEND_TS_NS],
    ));
    let Some(payload) = bytes.get(prefix.payload()) else {
        return 0;
    };
    let Decoded::Frame(message) = two_part::decode(payload, None) else {
        return 0;
    };
    let _ = black_box(message.verify(payload));
    let Ok(control) = control_message::decode(&payload[message.header]) else {
        return 0;
    };
    let mut scratch = [0; 1024];
    if let Ok(info) = TcpConnectionInfo::parse(&control.connection_info, &mut scratch) {
        let _ = black_box((info.context == control.id, info.socket_addr()));
    }
    if let Some(metadata) = control.metadata {
        black_box(headers::find(metadata, "tenant"));
    }
    1
}

/// Reads a call-home socket; says how many items and how many other messages it met.
fn stream(mut bytes: &[u8]) -> (usize, usize) {
    let (mut items, mut others) = (0, 0);
    while let Decoded::Frame(message) = two_part::decode(bytes, None) {
        match call_home::classify(bytes, &message) {
            StreamMessage::Item(body) => {
                let body = &bytes[body];
                let json = item::decode(body, PayloadCodec::Json).is_ok();
                items += usize::from(json || item::decode(body, PayloadCodec::MessagePack).is_ok());
            }
            other => {
                black_box(&other);
                others += 1;
            }
        }
        bytes = &bytes[message.frame_bytes()..];
    }
    (items, others)
}

fn replies(mut bytes: &[u8]) -> usize {
    let mut replies = 0;
    while let Decoded::Frame(text) = reply_frame::decode(bytes, 1 << 25) {
        black_box(reply_frame::Reply::classify(&bytes[text.clone()]));
        bytes = &bytes[text.end..];
        replies += 1;
    }
    replies
}

#[test]
fn decoders_do_not_allocate() {
    assert!(
        count(|| drop(black_box(Box::new(1)))) > 0,
        "the counter counts"
    );
    let (mut controls, mut items, mut others, mut answers) = (0, 0, 0, 0);
    for vector in common::vectors() {
        let bytes = &vector.bytes[..];
        let allocations = count(|| match vector.kind.as_str() {
            "tcp_request" | "tcp_request_stream" => controls += request(bytes),
            "two_part" | "two_part_stream" => {
                let (more_items, more_others) = stream(bytes);
                items += more_items;
                others += more_others;
            }
            "tcp_response" | "tcp_response_stream" => answers += replies(bytes),
            "payload" => {
                let _ = black_box(item::decode(bytes, PayloadCodec::Json));
                let _ = black_box(item::decode(bytes, PayloadCodec::MessagePack));
                let _ = black_box(json::Value::parse(bytes));
            }
            _ => {}
        });
        assert_eq!(allocations, 0, "{}", vector.name);
    }
    assert!(controls >= 8 && items >= 30 && others >= 60 && answers >= 40);
}

/// Reads an event as a subscriber does, payload and all; says how many things it met.
fn event(parts: &[&[u8]]) -> usize {
    let Ok(message) = multipart::Message::decode(parts) else {
        return 0;
    };
    let Envelope { topic, payload, .. } = message.envelope;
    match topic {
        topic::KV_EVENTS => kv_events(payload),
        topic::KV_METRICS => usize::from(KvMetrics::decode(payload).is_ok()),
        topic::FORWARD_PASS_METRICS => usize::from(ForwardPass::decode(payload).is_ok()),
        _ => usize::from(Sequence::decode(payload).is_ok()),
    }
}

fn kv_events(payload: &[u8]) -> usize {
    let mut met = 0;
    let mut events = KvEvents::open(payload).expect("an array");
    while let Ok(Some(event)) = events.next_event() {
        met += 1;
        match event.change {
            KvChange::Stored { mut blocks, .. } => {
                while let Ok(Some(block)) = blocks.next_block() {
                    black_box(block);
                    met += 1;
                }
            }
            KvChange::Removed(mut hashes) => {
                while let Ok(Some(hash)) = hashes.next_hash() {
                    black_box(hash);
                    met += 1;
                }
            }
            KvChange::Cleared => {}
        }
    }
    met
}

#[test]
fn events_are_read_in_place() {
    let folder = common::golden().join("events");
    let mut met = 0;
    for file in ["zmq-direct.json", "zmq-broker.json"] {
        let text = std::fs::read(folder.join(file)).expect(file);
        let messages: Vec<Vec<String>> = serde_json::from_slice(&text).expect(file);
        for message in messages {
            let parts: Vec<Vec<u8>> = message.iter().map(|part| common::unhex(part)).collect();
            let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
            assert_eq!(count(|| met += event(&parts)), 0, "{file}");
        }
    }
    assert!(met > 44, "{met}");
}
