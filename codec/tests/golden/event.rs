//! Events that real publishers sent, on ZMQ and on NATS, and the records that they put into etcd.

use corelane_codec::event::multipart::{self, Message};
use corelane_codec::event::typed::{self, from_payload, to_payload};
use corelane_codec::event::{
    self, CHANNELS_BUCKET, Envelope, EventChannelRecord, EventKey, EventSourceRecord,
    EventTransport, ForwardPass, Hashes, KvChange, KvEvents, KvMetrics, SOURCES_BUCKET, Scope,
    Sequence, SequenceChange, frame, topic,
};
use serde_json::{Value, json};

use crate::common::{golden, unhex};

fn dump(file: &str) -> Value {
    let text = std::fs::read(golden().join("events").join(file)).expect(file);
    serde_json::from_slice(&text).expect(file)
}

fn rows(value: &Value) -> &[Value] {
    value.as_array().expect("an array")
}

fn hex(value: &Value) -> Vec<u8> {
    unhex(value.as_str().expect("hex"))
}

/// Reads an envelope, compares it with its text, and writes it and its payload again.
fn round(bytes: &[u8]) -> Envelope<'_> {
    let envelope = Envelope::decode(bytes).unwrap();
    let mut again = vec![];
    envelope.write(&mut again).unwrap();
    assert_eq!(again, bytes, "{}", envelope.topic);
    match envelope.topic {
        topic::KV_EVENTS => typed_again::<Vec<typed::KvEvent>>(&envelope),
        topic::KV_METRICS => typed_again::<KvMetrics>(&envelope),
        topic::FORWARD_PASS_METRICS => typed_again::<typed::ForwardPass>(&envelope),
        topic::ACTIVE_SEQUENCES => typed_again::<typed::SequenceEvent>(&envelope),
        other => panic!("what is {other}?"),
    }
    envelope
}

fn typed_again<T: serde::de::DeserializeOwned + serde::Serialize>(envelope: &Envelope<'_>) {
    let value: T = from_payload(envelope.payload).unwrap();
    assert_eq!(to_payload(&value).unwrap(), envelope.payload);
}

/// Reads the payload by its view and says what it holds as the JSON that a dump has of it.
fn viewed(envelope: &Envelope<'_>) -> Value {
    match envelope.topic {
        topic::KV_EVENTS => kv_events(envelope.payload),
        topic::KV_METRICS => serde_json::to_value(KvMetrics::decode(envelope.payload).unwrap())
            .expect("numbers have a form in JSON"),
        topic::FORWARD_PASS_METRICS => {
            let pass = ForwardPass::decode(envelope.payload).unwrap();
            assert!(pass.instance_id().is_some());
            json!({
                "version": pass.version,
                "worker_id": pass.worker_id,
                "dp_rank": pass.dp_rank,
                "counter_id": pass.counter_id,
                "wall_time": pass.wall_time,
                "scheduled_requests": pass.scheduled,
                "queued_requests": pass.queued,
            })
        }
        _ => sequence(envelope.payload),
    }
}

fn hashes(mut hashes: Hashes<'_>) -> Vec<u64> {
    std::iter::from_fn(|| hashes.next_hash().unwrap()).collect()
}

fn kv_events(payload: &[u8]) -> Value {
    let mut events = KvEvents::open(payload).unwrap();
    let mut all = vec![];
    while let Some(event) = events.next_event().unwrap() {
        let data = match event.change {
            KvChange::Stored {
                parent_hash,
                start_position,
                mut blocks,
            } => {
                let mut list = vec![];
                while let Some(block) = blocks.next_block().unwrap() {
                    assert_eq!(block.mm_extra_info, None);
                    list.push(json!({
                        "block_hash": block.block_hash,
                        "tokens_hash": block.tokens_hash,
                        "mm_extra_info": null,
                    }));
                }
                json!({"stored": {
                    "parent_hash": parent_hash,
                    "start_position": start_position,
                    "blocks": list,
                }})
            }
            KvChange::Removed(removed) => json!({"removed": {"block_hashes": hashes(removed)}}),
            KvChange::Cleared => json!("cleared"),
        };
        all.push(json!({
            "worker_id": event.worker_id,
            "storage_tier": event.storage_tier,
            "residency_domain": event.residency_domain,
            "event": {"event_id": event.event_id, "data": data, "dp_rank": event.dp_rank},
        }));
    }
    Value::Array(all)
}

fn sequence(payload: &[u8]) -> Value {
    let sequence = Sequence::decode(payload).unwrap();
    let data = match sequence.change {
        SequenceChange::AddRequest {
            token_sequence,
            track_prefill_tokens,
            expected_output_tokens,
            prefill_load_hint,
        } => {
            let hint: Option<Value> =
                prefill_load_hint.map(|hint| rmp_serde::from_slice(hint).unwrap());
            assert_eq!(expected_output_tokens, None);
            json!({"AddRequest": {
                "token_sequence": hashes(token_sequence),
                "track_prefill_tokens": track_prefill_tokens,
                "expected_output_tokens": null,
                "prefill_load_hint": hint,
            }})
        }
        SequenceChange::MarkPrefillCompleted => json!("MarkPrefillCompleted"),
        SequenceChange::Free => json!("Free"),
    };
    json!({
        "request_id": sequence.request_id,
        "worker": {"worker_id": sequence.worker_id, "dp_rank": sequence.dp_rank},
        "data": data,
        "router_id": sequence.router_id,
        "lora_name": sequence.lora_name,
    })
}

#[test]
fn nats_events_say_what_their_dumps_say() {
    let mut seen = 0;
    for file in ["nats-events-decoded.json", "nats-replica-sync-decoded.json"] {
        for row in rows(&dump(file)) {
            let bytes = hex(&row["hex"]);
            let envelope = round(&bytes);
            let said = if row["envelope"].is_object() {
                &row["envelope"]
            } else {
                &row["decoded"]
            };
            assert_eq!(said["publisher_id"], envelope.publisher_id);
            assert_eq!(said["sequence"], envelope.sequence);
            assert_eq!(said["published_at"], envelope.published_at_ms);
            assert_eq!(said["topic"], envelope.topic);
            let payload = match &row["payload_decoded"] {
                Value::Null => &said["payload"],
                payload => payload,
            };
            assert_eq!(&viewed(&envelope), payload);
            let scope = Scope::endpoint("demo", "backend", "generate");
            assert_eq!(row["subject"], scope.subject(envelope.topic));
            seen += 1;
        }
    }
    assert!(seen >= 35, "{seen}");
}

#[test]
fn nats_carries_bare_envelopes_without_headers_or_replies() {
    for file in ["nats-events.json", "nats-replica-sync.json"] {
        for row in rows(&dump(file)["msgs"]) {
            assert_eq!((&row["reply"], &row["headers"]), (&Value::Null, &json!("")));
            let bytes = hex(&row["payload_hex"]);
            let envelope = round(&bytes);
            let subject = row["subject"].as_str().unwrap();
            let (_, topic) = event::parse_subject(subject).unwrap();
            assert_eq!(topic, envelope.topic);
            // Framed, it is none.
            let mut framed = vec![];
            frame::write(&bytes, &mut framed).unwrap();
            assert!(Envelope::decode(&framed).is_err());
        }
    }
}

fn multiparts(file: &str) -> Vec<Vec<Vec<u8>>> {
    let messages = dump(file);
    let parts = |row: &Value| rows(row).iter().map(hex).collect();
    rows(&messages).iter().map(parts).collect()
}

#[test]
fn zmq_messages_have_four_parts_that_agree() {
    for file in [
        "zmq-direct.json",
        "zmq-broker.json",
        "zmq-broker-discovered.json",
    ] {
        let messages = multiparts(file);
        assert!(messages.len() > 20);
        for parts in &messages {
            let borrowed: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
            let message = Message::decode(&borrowed).unwrap();
            let envelope = &message.envelope;
            message.check(&parts[0], envelope.publisher_id).unwrap();
            let subject = std::str::from_utf8(message.subject).unwrap();
            if file == "zmq-direct.json" {
                assert_eq!(subject, envelope.topic);
            } else {
                let (scope, topic) = event::parse_subject(subject).unwrap();
                assert_eq!(topic, envelope.topic);
                assert_eq!(scope.subject(&topic), subject);
            }
            // And written again from the envelope.
            let [publisher, sequence] = multipart::ids(envelope);
            let mut frame = vec![];
            multipart::write_frame(envelope, &mut frame).unwrap();
            assert_eq!((&publisher[..], &sequence[..]), (borrowed[1], borrowed[2]));
            assert_eq!(frame, borrowed[3]);
        }
    }
}

/// The messages of a publisher of ours whose odd ones a real subscriber took or dropped
/// (spec/events-discovery.md §3.2, §3.3, §3.5), made here again from one of its own.
#[test]
fn the_same_is_taken_and_dropped_as_by_a_real_subscriber() {
    let messages = multiparts("zmq-direct.json");
    let parts: [Vec<u8>; 4] = messages[3].clone().try_into().unwrap();
    let taken = |change: &dyn Fn(&mut Vec<Vec<u8>>)| {
        let mut parts = parts.to_vec();
        change(&mut parts);
        let borrowed: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
        Message::decode(&borrowed).is_ok()
    };
    assert!(taken(&|_| {}));
    assert!(taken(&|parts| parts[3].extend_from_slice(b"trailing")));
    assert!(taken(&|parts| parts[0].extend_from_slice(b"-and-more")));
    assert!(taken(&|parts| parts[2] = vec![0xff; 8]));
    assert!(taken(&|parts| parts[1] = vec![0xff; 8]));
    assert!(!taken(&|parts| parts[3][0] = 2));
    assert!(!taken(
        &|parts| parts[3][1..5].copy_from_slice(&99_999_u32.to_be_bytes())
    ));
    assert!(!taken(&|parts| parts[3][1..5].reverse()));
    assert!(!taken(&|parts| parts.push(vec![])));
    assert!(!taken(&|parts| parts[3].truncate(4)));
    assert!(!taken(&|parts| {
        parts[3].clear();
        frame::write(br#"{"publisher_id":1}"#, &mut parts[3]).unwrap();
    }));
}

fn records(file: &str) -> Vec<(String, String)> {
    let text = std::fs::read_to_string(golden().join("discovery").join(file)).unwrap();
    if file.ends_with(".txt") {
        let pairs = text.lines().filter_map(|line| line.split_once(" {"));
        return pairs
            .filter(|(key, _)| key.starts_with("v1/"))
            .map(|(key, value)| (key.to_owned(), format!("{{{value}")))
            .collect();
    }
    let dump: Value = serde_json::from_str(&text).unwrap();
    let text = |row: &Value, key: &str| row[key].as_str().unwrap().to_owned();
    rows(&dump["kvs"])
        .iter()
        .map(|row| (text(row, "key"), text(row, "raw_value")))
        .collect()
}

#[test]
fn records_round_trip_byte_for_byte() {
    let (mut channels, mut sources) = (vec![], 0);
    for file in [
        "etcd-worker-events-zmq.json",
        "etcd-worker-events-zmq-broker.json",
        "etcd-worker-events-nats.json",
        "etcd-runtime-crate-probe-nats-broker.json",
        "etcd-kv-router-replica-nats.json",
        "etcd-odd-names.txt",
    ] {
        for (key, value) in records(file) {
            if key.starts_with(CHANNELS_BUCKET) {
                let record: EventChannelRecord = serde_json::from_str(&value).unwrap();
                assert_eq!(serde_json::to_string(&record).unwrap(), value);
                assert_eq!(record.key().in_bucket(CHANNELS_BUCKET), key);
                assert_eq!(EventKey::parse(CHANNELS_BUCKET, &key), Some(record.key()));
                let built = EventChannelRecord::new(&record.key(), record.transport.clone());
                assert_eq!(built, record);
                if let EventTransport::Nats(channel) = &record.transport {
                    assert_eq!(channel.subject_prefix, record.scope.subject_prefix());
                }
                channels.push(record);
            } else if key.starts_with(SOURCES_BUCKET) {
                let record: EventSourceRecord = serde_json::from_str(&value).unwrap();
                assert_eq!(serde_json::to_string(&record).unwrap(), value);
                assert_eq!(record.key().in_bucket(SOURCES_BUCKET), key);
                let kv = record.kv().unwrap();
                assert_eq!(kv.publisher_id, record.publisher_id);
                let built = EventSourceRecord::new(&record.key(), &kv).unwrap();
                assert_eq!(serde_json::to_string(&built).unwrap(), value);
                sources += 1;
            }
        }
    }
    let kinds = |kind: fn(&EventTransport) -> bool| {
        channels
            .iter()
            .filter(|record| kind(&record.transport))
            .count()
    };
    assert!(kinds(|transport| matches!(transport, EventTransport::Nats(_))) >= 6);
    assert!(kinds(|transport| matches!(transport, EventTransport::Zmq(_))) >= 9);
    assert_eq!(
        kinds(|transport| matches!(transport, EventTransport::ZmqBroker(_))),
        1
    );
    assert!(sources >= 5, "{sources}");
}
