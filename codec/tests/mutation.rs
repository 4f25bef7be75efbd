//! Golden bytes flipped, cut, doubled and spliced, and made-up values round and round: whatever
//! comes, no decoder panics and what is written is read again.

mod common;

use corelane_codec::control_message::{
    self, NewControlMessage, PayloadCodec, RequestType, StreamType, TcpConnection,
    TcpConnectionInfo,
};
use corelane_codec::error::{DynamoError, PublicDetails, Reason};
use corelane_codec::event::hello::{self, Role};
use corelane_codec::path::{EndpointId, instance_path, parse_instance_path};
use corelane_codec::{
    call_home, event, fuzz, headers, item, json, reply_frame, request_frame, two_part, zmtp,
};
use proptest::collection::vec;
use proptest::prelude::*;

/// Larger vectors are mostly payload; mutating them finds nothing that smaller ones do not.
const SEED_BYTES_MAX: usize = 2048;

fn seeds() -> Vec<Vec<u8>> {
    let mut seeds: Vec<Vec<u8>> = common::vectors()
        .into_iter()
        .map(|vector| vector.bytes)
        .filter(|bytes| bytes.len() <= SEED_BYTES_MAX)
        .collect();
    // The parts inside the frames are what the inner decoders want to see.
    for at in 0..seeds.len() {
        if let Some(prefix) = request_frame::decode_prefix(&seeds[at]).frame() {
            let inner = seeds[at].get(prefix.payload()).map(<[u8]>::to_vec);
            seeds.push(seeds[at][prefix.headers].to_vec());
            seeds.extend(inner);
        }
    }
    for at in 0..seeds.len() {
        if let Some(message) = two_part::decode(&seeds[at], None).frame() {
            let (header, body) = (message.header, message.body);
            let parts = [seeds[at][header].to_vec(), seeds[at][body].to_vec()];
            seeds.extend(parts);
        }
    }
    seeds.extend(events());
    seeds
}

/// Frames of events, their envelopes, and the payloads of those.
fn events() -> Vec<Vec<u8>> {
    let file = common::golden().join("events/zmq-direct.json");
    let text = std::fs::read(file).expect("the dump");
    let messages: Vec<Vec<String>> = serde_json::from_slice(&text).expect("the dump");
    let mut seeds = vec![];
    for message in messages {
        let frame = common::unhex(&message[3]);
        let envelope = event::frame::payload(&frame).expect("a frame").to_vec();
        let payload = event::Envelope::decode(&envelope).expect("an envelope");
        let payload = payload.payload.to_vec();
        seeds.extend([frame, envelope, payload]);
    }
    let plain = common::golden().join("../plain_events");
    for entry in std::fs::read_dir(plain).expect("hellos of plain events") {
        let hex = std::fs::read_to_string(entry.expect("a file").path()).expect("hex");
        seeds.push(common::unhex(hex.trim()));
    }
    seeds.extend(libzmq());
    seeds
}

/// What a real libzmq has said: whole, and the bodies of its frames.
fn libzmq() -> Vec<Vec<u8>> {
    let file = common::golden()
        .with_file_name("libzmq")
        .join("libzmq.json");
    let text = std::fs::read(file).expect("the captures");
    let text: serde_json::Value = serde_json::from_slice(&text).expect("the captures");
    let rows = text["captures"].as_array().expect("the captures");
    let whole = rows
        .iter()
        .map(|row| common::unhex(row["hex"].as_str().expect("hex")));
    let mut seeds: Vec<_> = whole.filter(|seed| seed.len() <= SEED_BYTES_MAX).collect();
    for at in 0..seeds.len() {
        if let Some(head) = zmtp::decode_head(&seeds[at], SEED_BYTES_MAX).frame() {
            let body = seeds[at].get(head.head_bytes..head.frame_bytes());
            seeds.extend(body.map(<[u8]>::to_vec));
        }
    }
    seeds
}

#[test]
fn every_decoder_takes_every_golden_byte() {
    for seed in seeds() {
        for (name, hook) in fuzz::ALL {
            let outcome = std::panic::catch_unwind(|| hook(&seed));
            assert!(outcome.is_ok(), "{name}: {seed:02x?}");
        }
    }
}

#[derive(Debug, Clone)]
enum Mutation {
    Flip(usize, u8),
    Set(usize, u8),
    Cut(usize),
    Drop(usize, usize),
    Insert(usize, Vec<u8>),
    Splice(usize, usize),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let at = 0..SEED_BYTES_MAX;
    prop_oneof![
        (at.clone(), 0..8_u8).prop_map(|(at, bit)| Mutation::Flip(at, 1 << bit)),
        (at.clone(), any::<u8>()).prop_map(|(at, byte)| Mutation::Set(at, byte)),
        (
            at.clone(),
            prop::sample::select(b"{}[]\",:\\0\xff\x00".to_vec())
        )
            .prop_map(|(at, byte)| Mutation::Set(at, byte)),
        at.clone().prop_map(Mutation::Cut),
        (at.clone(), 1..9_usize).prop_map(|(at, bytes)| Mutation::Drop(at, bytes)),
        (at.clone(), vec(any::<u8>(), 1..9)).prop_map(|(at, bytes)| Mutation::Insert(at, bytes)),
        (at, any::<usize>()).prop_map(|(at, other)| Mutation::Splice(at, other)),
    ]
}

fn apply(bytes: &mut Vec<u8>, mutation: Mutation, seeds: &[Vec<u8>]) {
    let len = bytes.len();
    match mutation {
        Mutation::Flip(at, mask) if len > 0 => bytes[at % len] ^= mask,
        Mutation::Set(at, byte) if len > 0 => bytes[at % len] = byte,
        Mutation::Cut(at) => bytes.truncate(at % (len + 1)),
        Mutation::Drop(at, count) if len > 0 => {
            let at = at % len;
            bytes.drain(at..(at + count).min(len));
        }
        Mutation::Insert(at, new) => {
            let at = at % (len + 1);
            bytes.splice(at..at, new);
        }
        Mutation::Splice(at, other) => {
            let other = &seeds[other % seeds.len()];
            bytes.truncate(at % (len + 1));
            bytes.extend_from_slice(&other[other.len() / 2..]);
        }
        Mutation::Flip(..) | Mutation::Set(..) | Mutation::Drop(..) => {}
    }
}

fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        failure_persistence: None,
        ..Default::default()
    }
}

proptest! {
    #![proptest_config(cases(4000))]

    #[test]
    fn mutated_golden_bytes_panic_nowhere(
        seed in any::<usize>(),
        mutations in vec(mutation(), 0..5),
    ) {
        thread_local!(static SEEDS: Vec<Vec<u8>> = seeds());
        SEEDS.with(|seeds| {
            let mut bytes = seeds[seed % seeds.len()].clone();
            for mutation in mutations {
                apply(&mut bytes, mutation, seeds);
            }
            for (_, hook) in fuzz::ALL {
                hook(&bytes);
            }
        });
    }
}

fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        "[a-z0-9./%-]{0,24}",
        vec(any::<char>(), 0..12).prop_map(|chars| chars.into_iter().collect()),
        "[\\x00-\\x20\"\\\\/é🚀]{0,12}",
    ]
}

fn codec() -> impl Strategy<Value = PayloadCodec> {
    prop_oneof![Just(PayloadCodec::Json), Just(PayloadCodec::MessagePack)]
}

fn error() -> impl Strategy<Value = DynamoError> {
    let public = prop_oneof![
        Just(None),
        text().prop_map(|message| Some(PublicDetails::Message { message })),
        (any::<u64>(), any::<Option<u64>>())
            .prop_map(|(limit, actual)| Some(PublicDetails::SizeLimit { limit, actual })),
        (any::<u64>(), any::<Option<u64>>())
            .prop_map(|(limit, actual)| Some(PublicDetails::ContextLength { limit, actual })),
        (any::<Option<u64>>(), any::<Option<u64>>())
            .prop_map(|(limit, remaining)| Some(PublicDetails::RateLimit { limit, remaining })),
    ];
    let one =
        (prop::sample::select(Reason::ALL), text(), public).prop_map(|(reason, text, public)| {
            let error = DynamoError::new(reason, text);
            public.into_iter().fold(error, DynamoError::with_public)
        });
    vec(one, 1..5).prop_map(|errors| {
        errors
            .into_iter()
            .reduce(|cause, error| error.with_cause(cause))
            .expect("at least one")
    })
}

proptest! {
    #![proptest_config(cases(400))]

    #[test]
    fn request_frames(path in vec(any::<u8>(), 0..300), map in vec(any::<u8>(), 0..300),
                      payload in vec(any::<u8>(), 0..300)) {
        let mut bytes = vec![];
        request_frame::write_frame(&path, &map, &payload, &mut bytes).unwrap();
        let prefix = request_frame::decode_prefix(&bytes).frame().unwrap();
        prop_assert_eq!(&bytes[prefix.path.clone()], &path[..]);
        prop_assert_eq!(&bytes[prefix.headers.clone()], &map[..]);
        prop_assert_eq!(&bytes[prefix.payload()], &payload[..]);
        fuzz::request_frame(&bytes);
    }

    #[test]
    fn plain_hellos(publisher in any::<bool>(), payload_bytes_max in any::<u32>(),
                    prefixes in vec(vec(any::<u8>(), 0..40), 1..5),
                    behind in vec(any::<u8>(), 0..9)) {
        let role = if publisher { Role::Publisher } else { Role::Subscriber };
        let count = if publisher { 1 } else { prefixes.len() };
        let prefixes: Vec<&[u8]> = prefixes[..count].iter().map(Vec::as_slice).collect();
        let mut bytes = vec![];
        hello::write_hello(role, payload_bytes_max, &prefixes, &mut bytes).unwrap();
        let length = bytes.len();
        bytes.extend(behind);
        let read = hello::decode_hello(&bytes).frame().unwrap();
        prop_assert_eq!((read.role, read.payload_bytes_max), (role, payload_bytes_max));
        prop_assert_eq!(read.prefixes().collect::<Vec<_>>(), prefixes);
        prop_assert_eq!(read.bytes(), length);
        fuzz::event_hello(&bytes);
    }

    #[test]
    fn replies(pieces in vec(text(), 0..4)) {
        let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
        let mut bytes = vec![];
        reply_frame::write(&pieces, &mut bytes);
        let text = reply_frame::decode(&bytes, u64::MAX).frame().unwrap();
        prop_assert_eq!(bytes[text].to_vec(), pieces.concat().into_bytes());
    }

    #[test]
    fn strings_and_maps(members in prop::collection::btree_map(text(), text(), 0..5)) {
        let pairs: Vec<_> = members.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        let mut bytes = vec![];
        headers::write(&pairs, &mut bytes);
        prop_assert_eq!(&bytes, &serde_json::to_vec(&members).unwrap());
        for (key, value) in &members {
            prop_assert!(headers::find(&bytes, key).unwrap() == **value);
        }
        fuzz::json(&bytes);
    }

    #[test]
    fn control_messages(id in text(), subject in text(), codec in codec(), many in any::<bool>(),
                        metadata in prop::collection::btree_map(text(), text(), 0..4),
                        sent in any::<Option<u64>>()) {
        let pairs: Vec<_> = metadata.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        let home = |stream_type| TcpConnection {
            address: "[::1]:65535",
            subject: &subject,
            context: &id,
            stream_type,
        };
        let message = NewControlMessage {
            id: &id,
            request_type: if many { RequestType::ManyIn } else { RequestType::SingleIn },
            payload_codec: codec,
            connection_info: home(StreamType::Response),
            metadata: &pairs,
            frontend_send_ts_ns: sent,
            request_stream_connection_info: many.then(|| home(StreamType::Request)),
        };
        let mut bytes = vec![];
        message.write(&mut bytes).unwrap();
        let read = control_message::decode(&bytes).unwrap();
        prop_assert!(read.id == id.as_str() && read.payload_codec == codec);
        prop_assert_eq!(read.frontend_send_ts_ns, sent);
        prop_assert_eq!(read.metadata.is_some(), !metadata.is_empty());
        for (key, value) in &metadata {
            prop_assert!(headers::find(read.metadata.unwrap(), key).unwrap() == **value);
        }
        let mut scratch = [0; 2048];
        let info = TcpConnectionInfo::parse(&read.connection_info, &mut scratch).unwrap();
        prop_assert!(info.subject == subject.as_str() && info.context == id.as_str());
        prop_assert_eq!(read.request_stream_connection_info.is_some(), many);
    }

    #[test]
    fn call_home_messages(subject in text(), error in error()) {
        let mut bytes = vec![];
        call_home::write_handshake(&subject, StreamType::Response, &mut bytes);
        let typed = serde_json::to_vec(&error).unwrap();
        call_home::write_prologue_error(error.text(), Some(&typed), &mut bytes);
        fuzz::call_home(&bytes);
        let first = two_part::decode(&bytes, None).frame().unwrap();
        let handshake = call_home::Handshake::decode(&bytes[first.header.clone()]).unwrap();
        prop_assert!(handshake.subject == subject.as_str());
        let rest = &bytes[first.frame_bytes()..];
        let second = two_part::decode(rest, None).frame().unwrap();
        let prologue = call_home::Prologue::decode(&rest[second.header]).unwrap();
        let read: DynamoError = serde_json::from_slice(prologue.typed_error.unwrap()).unwrap();
        prop_assert_eq!(read, error);
    }

    #[test]
    fn errors(error in error(), codec in codec()) {
        let mut bytes = vec![];
        item::write_value(&error, codec, &mut bytes).unwrap();
        prop_assert_eq!(item::from_bytes::<DynamoError>(&bytes, codec).unwrap(), error);
    }

    #[test]
    fn paths(id in any::<u64>(), namespace in text(), component in text(), name in text()) {
        let endpoint = EndpointId::new(&namespace, &component, &name);
        let path = instance_path(id, &endpoint);
        prop_assert_eq!(path.matches('/').count(), 3);
        prop_assert_eq!(parse_instance_path(&path), Some((id, endpoint)));
    }

    #[test]
    fn any_text_is_scanned_as_serde_does(bytes in "[\\[\\]{}\",:0-9truefalsn\\\\ .eE+-]{0,24}") {
        fuzz::json(bytes.as_bytes());
        let ours = json::Value::parse(bytes.as_bytes()).is_ok();
        let theirs = serde_json::from_str::<serde::de::IgnoredAny>(&bytes).is_ok();
        prop_assert_eq!(ours, theirs, "{}", bytes);
    }
}
