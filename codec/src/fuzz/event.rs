//! Hooks for the event plane.

use serde::Deserialize;

use super::incremental;
use crate::Decoded;
use crate::event::typed::{self, from_payload, to_payload};
use crate::event::{
    self, CHANNELS_BUCKET, Envelope, EventChannelRecord, EventKey, EventSourceRecord, ForwardPass,
    Hashes, KvAnswer, KvChange, KvEvents, KvMetrics, SOURCES_BUCKET, Sequence, SequenceChange,
    frame, hello, multipart, origin::Origin,
};

/// First bytes of MessagePack's blobs.
const BLOBS: std::ops::RangeInclusive<u8> = 0xc4..=0xc6;

/// Frames, as a stream and as a whole message.
pub fn event_frame(data: &[u8]) {
    let max_bytes = 64 << 10;
    incremental(data, |input| frame::decode(input, max_bytes), |at| at.end);
    let mut rest = data;
    let mut again = vec![];
    while let Decoded::Frame(at) = frame::decode(rest, max_bytes) {
        let payload = frame::payload(rest).expect("the stream has it");
        assert_eq!(payload, &rest[at.clone()]);
        frame::write(payload, &mut again).expect("it came in a frame");
        rest = &rest[at.end..];
    }
    assert_eq!(again, data[..data.len() - rest.len()]);
}

/// Hellos of plain events and answers to them; marks of where an event has been.
pub fn event_hello(data: &[u8]) {
    incremental(data, hello::decode_hello, |hello| hello.bytes());
    if let Decoded::Frame(read) = hello::decode_hello(data) {
        let prefixes: Vec<&[u8]> = read.prefixes().collect();
        let mut again = vec![];
        hello::write_hello(read.role, read.payload_bytes_max, &prefixes, &mut again)
            .expect("it came in a hello");
        assert_eq!(again, data[..read.bytes()]);
    }
    incremental(data, hello::decode_answer, |answer| answer.bytes());
    if let Decoded::Frame(answer) = hello::decode_answer(data) {
        let mut again = vec![];
        answer.write(&mut again);
        assert_eq!(again, data[..answer.bytes()]);
    }
    let origin = Origin::of_frame(data);
    let mut again = b"\x01\0\0\0\0".to_vec();
    origin.write(&mut again);
    assert_eq!(Origin::of_frame(&again), origin);
    assert_eq!(Origin::parse(&origin.to_string()), origin);
}

/// The envelope as serde's derived reader sees it: Dynamo's is such a one.
#[derive(Debug, PartialEq, Deserialize)]
pub struct Derived<'a> {
    /// Who published it.
    pub publisher_id: u64,
    /// Its number among the publisher's.
    pub sequence: u64,
    /// Milliseconds since 1970.
    pub published_at: u64,
    /// Its topic.
    pub topic: &'a str,
    /// What it says.
    pub payload: &'a [u8],
}

/// Envelopes; whatever serde reads is read alike.
pub fn event_envelope(data: &[u8]) {
    let read = Envelope::decode(data);
    if let Ok(derived) = rmp_serde::from_slice::<Derived<'_>>(data) {
        let envelope = Envelope {
            publisher_id: derived.publisher_id,
            sequence: derived.sequence,
            published_at_ms: derived.published_at,
            topic: derived.topic,
            payload: derived.payload,
        };
        assert_eq!(read, Ok(envelope));
    }
    let Ok(envelope) = read else {
        return;
    };
    let mut again = vec![];
    multipart::write_frame(&envelope, &mut again).expect("it was read");
    let [publisher, sequence] = multipart::ids(&envelope);
    let parts = [envelope.topic.as_bytes(), &publisher, &sequence, &again];
    let message = multipart::Message::decode(&parts).expect("just written");
    assert_eq!(message.envelope, envelope);
    let publisher_id = envelope.publisher_id;
    assert_eq!(message.check(parts[0], publisher_id), Ok(()));
}

/// All hashes, or `None` if one is broken.
fn hashes(mut hashes: Hashes<'_>) -> Option<Vec<u64>> {
    let mut all = vec![];
    while let Some(hash) = hashes.next_hash().ok()? {
        all.push(hash);
    }
    Some(all)
}

/// Reads all of a payload of KV events, as its view gives it.
fn kv_events(data: &[u8]) -> Option<Vec<(u64, u64, u32, usize)>> {
    kv_events_of(KvEvents::open(data).ok()?)
}

fn kv_events_of(mut events: KvEvents<'_>) -> Option<Vec<(u64, u64, u32, usize)>> {
    let mut all = vec![];
    while let Some(event) = events.next_event().ok()? {
        let count = match event.change {
            KvChange::Stored { mut blocks, .. } => {
                let mut count = 0;
                while blocks.next_block().ok()?.is_some() {
                    count += 1;
                }
                count
            }
            KvChange::Removed(removed) => hashes(removed)?.len(),
            KvChange::Cleared => 0,
        };
        all.push((event.worker_id, event.event_id, event.dp_rank, count));
    }
    Some(all)
}

/// What the typed form of an event has of the same.
fn typed_event(event: &typed::KvEvent) -> (u64, u64, u32, usize) {
    let count = match &event.event.data {
        typed::KvChange::Stored { blocks, .. } => blocks.len(),
        typed::KvChange::Removed { block_hashes } => block_hashes.len(),
        typed::KvChange::Cleared => 0,
    };
    let body = &event.event;
    (event.worker_id, body.event_id, body.dp_rank, count)
}

/// Payloads of all topics; what the typed forms take, the views take alike.
pub fn event_payload(data: &[u8]) {
    match KvAnswer::decode(data) {
        Ok(KvAnswer::Dump { events, .. } | KvAnswer::Events { events, .. }) => {
            let _ = kv_events_of(events);
        }
        Ok(KvAnswer::Refused(_)) | Err(_) => {}
    }
    let seen = kv_events(data);
    // Where an array is due serde takes a blob as well, byte by byte.
    let may_differ = data.iter().any(|byte| BLOBS.contains(byte));
    let typed = from_payload::<Vec<typed::KvEvent>>(data);
    if let (Ok(events), false) = (typed, seen.is_none() && may_differ) {
        let typed: Vec<_> = events.iter().map(typed_event).collect();
        assert_eq!(seen, Some(typed));
        let again = to_payload(&events).expect("it was read");
        assert_eq!(kv_events(&again), seen);
    }
    let metrics = KvMetrics::decode(data);
    if let Ok(typed) = from_payload::<KvMetrics>(data) {
        assert_eq!(metrics, Ok(typed));
    }
    let pass = ForwardPass::decode(data);
    if let Ok(typed) = from_payload::<typed::ForwardPass>(data) {
        let pass = pass.expect("the typed form takes it");
        assert_eq!(pass.worker_id, typed.worker_id);
        assert_eq!(
            (pass.dp_rank, pass.counter_id),
            (typed.dp_rank, typed.counter_id)
        );
        let bits = |number: f64| number.to_bits();
        assert_eq!(bits(pass.wall_time), bits(typed.wall_time));
    }
    let sequence = Sequence::decode(data);
    let typed = from_payload::<typed::SequenceEvent>(data);
    if let (Ok(typed), false) = (typed, sequence.is_err() && may_differ) {
        let sequence = sequence.expect("the typed form takes it");
        assert_eq!(sequence.request_id, typed.request_id);
        assert_eq!(sequence.lora_name, typed.lora_name.as_deref());
        assert_eq!(sequence.router_id, typed.router_id);
        if let SequenceChange::AddRequest { token_sequence, .. } = sequence.change {
            assert!(hashes(token_sequence).is_some());
        }
    }
}

/// Subjects, segments, keys and records.
pub fn event_names(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        let encoded = event::encode_segment(text);
        assert_eq!(event::decode_segment(&encoded).as_deref(), Some(text));
        if let Some((scope, topic)) = event::parse_subject(text) {
            let again = scope.subject(&topic);
            assert_eq!(event::parse_subject(&again), Some((scope, topic)));
        }
        for bucket in [CHANNELS_BUCKET, SOURCES_BUCKET] {
            if let Some(key) = EventKey::parse(bucket, text) {
                let again = key.in_bucket(bucket);
                assert_eq!(EventKey::parse(bucket, &again), Some(key));
            }
        }
    }
    if let Ok(record) = serde_json::from_slice::<EventChannelRecord>(data) {
        let again = serde_json::to_vec(&record).expect("it was read");
        let read = serde_json::from_slice::<EventChannelRecord>(&again);
        assert_eq!(read.expect("just written"), record);
        let _ = record.key().in_bucket(CHANNELS_BUCKET);
    }
    if let Ok(record) = serde_json::from_slice::<EventSourceRecord>(data) {
        let _ = (record.kv(), record.key());
    }
}
