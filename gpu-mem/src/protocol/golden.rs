//! Every golden frame is read and written again byte for byte, in every order of its keys; and no
//! mutation of any of them does worse than be refused.

use proptest::prelude::*;

use super::frame::{Cut, REPLY_BYTES_MAX, cut};
use super::{Bad, v1, v2};

const D0: &str = include_str!("../../golden/d0.txt");
const D1: &str = include_str!("../../golden/d1.txt");
const D2: &str = include_str!("../../golden/d2.txt");
const OURS: &str = include_str!("../../golden/corelane.txt");

fn frames(file: &str) -> Vec<(String, Vec<u8>)> {
    let line = |line: &str| {
        let (name, hex) = line.split_once(' ').expect("a name and a frame");
        let byte = |at| u8::from_str_radix(&hex[at..at + 2], 16).expect("hex");
        (
            name.to_owned(),
            (0..hex.len()).step_by(2).map(byte).collect(),
        )
    };
    file.lines().map(line).collect()
}

fn payload(frame: &[u8]) -> &[u8] {
    match cut(frame, REPLY_BYTES_MAX) {
        Cut::Frame(payload) if payload.len() + 4 == frame.len() => payload,
        other => panic!("no whole frame: {other:?}"),
    }
}

/// Reads as whichever message it is and writes it again.
fn again_v1(payload: &[u8]) -> Result<Vec<u8>, Bad> {
    let request = v1::Request::decode(payload).map(|message| message.encode());
    request.or_else(|_| v1::Reply::decode(payload).map(|message| message.encode()))
}

fn again_v2(payload: &[u8]) -> Result<Vec<u8>, Bad> {
    let request = v2::Request::decode(payload).map(|message| message.encode());
    request.or_else(|_| v2::Reply::decode(payload).map(|message| message.encode()))
}

#[test]
fn every_golden_frame_is_written_as_it_was_read() {
    let mut count = 0;
    let first = [D0, D1, OURS].into_iter().flat_map(frames);
    for (name, frame) in first {
        assert_eq!(again_v1(payload(&frame)).as_ref(), Ok(&frame), "{name}");
        count += 1;
    }
    for (name, frame) in frames(D2) {
        assert_eq!(again_v2(payload(&frame)).as_ref(), Ok(&frame), "{name}");
        count += 1;
    }
    assert!(count >= 73, "only {count} golden frames");
}

/// One entry of a map: key and value as raw bytes.
type Entry = (Vec<u8>, Vec<u8>);

fn entries(payload: &[u8]) -> Vec<Entry> {
    let fields = super::msgpack::Fields::of_payload(payload).expect("golden");
    let entry = |(key, value): (&str, super::msgpack::Cursor<'_>)| {
        let mut end = value;
        end.skip().expect("golden");
        let start = payload.len() - value.left();
        let stop = payload.len() - end.left();
        let mut key_bytes = Vec::new();
        super::message::write_text(&mut key_bytes, key);
        (key_bytes, payload[start..stop].to_vec())
    };
    fields.iter().map(entry).collect()
}

fn map16(entries: &[Entry]) -> Vec<u8> {
    let mut bytes = vec![0xde, 0, u8::try_from(entries.len()).expect("few")];
    for (key, value) in entries {
        bytes.extend_from_slice(key);
        bytes.extend_from_slice(value);
    }
    bytes
}

/// Stock peers know none of our tags, and none of theirs is ours: whoever sends no `corelane_…` is
/// sent none.
#[test]
fn our_own_messages_are_told_from_upstreams_by_their_tag() {
    let tag = |frame: &[u8]| {
        let fields = super::msgpack::Fields::of_payload(payload(frame)).expect("golden");
        fields.tag().expect("golden").unwrap_or_default().to_owned()
    };
    for (name, frame) in frames(OURS) {
        assert!(tag(&frame).starts_with("corelane_ipc_"), "{name}");
        assert!(
            again_v2(payload(&frame)).is_err(),
            "{name} is no message of v2"
        );
    }
    for (name, frame) in [D0, D1, D2].into_iter().flat_map(frames) {
        assert!(!tag(&frame).starts_with("corelane"), "{name}");
    }
}

#[test]
fn keys_come_in_any_order_with_any_head_and_only_v2_minds_strangers() {
    for (name, frame) in frames(D1).into_iter().chain(frames(OURS)) {
        let mut turned = entries(payload(&frame));
        turned.reverse();
        turned.push((
            b"\xa5extra".to_vec(),
            vec![0x93, 0x01, 0xc0, 0xcb, 0, 0, 0, 0, 0, 0, 0, 0],
        ));
        assert_eq!(again_v1(&map16(&turned)).as_ref(), Ok(&frame), "{name}");
    }
    for (name, frame) in frames(D2) {
        let mut turned = entries(payload(&frame));
        turned.reverse();
        assert_eq!(again_v2(&map16(&turned)).as_ref(), Ok(&frame), "{name}");
        turned.push((b"\xa5extra".to_vec(), vec![0xc0]));
        assert!(again_v2(&map16(&turned)).is_err(), "{name}");
    }
}

fn handshake(timeout: &[u8]) -> Result<v1::Request, Bad> {
    let mut payload = vec![0x83, 0xa4];
    payload.extend_from_slice(b"type\xb1handshake_request\xa9lock_type\xa2rw\xaatimeout_ms");
    payload.extend_from_slice(timeout);
    v1::Request::decode(&payload)
}

#[test]
fn whole_numbers_come_in_any_width_and_never_as_floats() {
    for (bytes, value) in [
        (&[0x05][..], 5),
        (&[0xcf, 0, 0, 0, 0, 0, 0, 0, 5], 5),
        (&[0xd3, 0, 0, 0, 0, 0, 0, 0, 5], 5),
        (&[0xff], -1),
        (
            &[0xcf, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
            i128::from(u64::MAX),
        ),
    ] {
        let Ok(v1::Request::Handshake(read)) = handshake(bytes) else {
            panic!("{bytes:02x?}")
        };
        assert_eq!(read.timeout_ms, Some(value));
    }
    assert!(
        handshake(&[0xca, 0x40, 0xa0, 0, 0]).is_err(),
        "5.0 is no whole number"
    );
    assert!(handshake(&[0xc3]).is_err(), "true is no number");
    assert!(handshake(&[0xa1, b'5']).is_err(), "text is no number");
}

#[test]
fn what_upstream_drops_is_bad() {
    let bad = |payload: &[u8]| v1::Request::decode(payload).is_err();
    assert!(bad(b""), "empty");
    assert!(bad(b"\x90"), "a list");
    assert!(bad(b"\x80"), "no tag");
    assert!(bad(b"\x81\xa4type\xa4nope"), "an unknown tag");
    assert!(
        bad(b"\x81\xa4type\xc4\x0ecommit_request"),
        "the tag as bytes"
    );
    assert!(bad(b"\x81\xa4type\xb1handshake_request"), "a missing field");
    assert!(
        bad(b"\x82\xa4type\xb1handshake_request\xa9lock_type\xa7rw_data"),
        "a wrong word"
    );
    let mut put =
        b"\x85\xa4type\xb4metadata_put_request\xa3key\xa1k\xadallocation_id\xa1a".to_vec();
    put.extend_from_slice(b"\xacoffset_bytes\x00\xa5value");
    assert!(!bad(&[&put[..], b"\xc4\x01x"].concat()), "bytes are right");
    assert!(bad(&[&put[..], b"\xa1x"].concat()), "text is not bytes");
}

#[test]
fn defaults_stand_in_for_what_is_missing() {
    let read = v1::Request::decode(b"\x82\xa4type\xb0allocate_request\xa4size\x01");
    let Ok(v1::Request::Allocate(read)) = read else {
        panic!("{read:?}")
    };
    assert_eq!(read.tag, "default");
    let read = v1::Request::decode(b"\x82\xa4type\xb1handshake_request\xa9lock_type\xa2ro");
    let Ok(v1::Request::Handshake(read)) = read else {
        panic!("{read:?}")
    };
    assert_eq!(read.timeout_ms, None);
}

#[test]
fn a_nested_tag_may_be_missing_but_not_wrong() {
    let entry = |tag: &[u8]| {
        let mut bytes = b"\x82\xa4type\xb9list_allocations_response\xaballocations\x91".to_vec();
        bytes.push(if tag.is_empty() { 0x84 } else { 0x85 });
        bytes.extend_from_slice(tag);
        bytes.extend_from_slice(
            b"\xadallocation_id\xa1a\xa4size\x01\xacaligned_size\x01\xa3tag\xa1t",
        );
        v1::Reply::decode(&bytes)
    };
    assert!(entry(b"").is_ok());
    assert!(entry(b"\xa4type\xb7get_allocation_response").is_ok());
    assert!(entry(b"\xa4type\xaefree_response").is_err());
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 400,
        failure_persistence: None,
        ..Default::default()
    })]

    /// Flips, cuts, doubles and splices: never a panic, and what is still read means the same when
    /// it is written and read again.
    #[test]
    fn mutated_frames_are_read_or_refused(
        which in any::<prop::sample::Index>(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..4u8), 1..12),
    ) {
        let all: Vec<_> = [D0, D1, D2, OURS].into_iter().flat_map(frames).collect();
        let mut bytes = payload(&which.get(&all).1).to_vec();
        for (at, byte, how) in edits {
            if bytes.is_empty() {
                break;
            }
            let at = at.index(bytes.len());
            match how {
                0 => bytes[at] = byte,
                1 => bytes.truncate(at),
                2 => bytes.insert(at, byte),
                _ => bytes.extend_from_within(at..),
            }
        }
        if let Ok(frame) = again_v1(&bytes) {
            prop_assert_eq!(again_v1(payload(&frame)), Ok(frame.clone()));
        }
        if let Ok(frame) = again_v2(&bytes) {
            prop_assert_eq!(again_v2(payload(&frame)), Ok(frame.clone()));
        }
        let _ = cut(&bytes, 64);
    }

    #[test]
    fn noise_is_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = again_v1(&bytes);
        let _ = again_v2(&bytes);
        let _ = cut(&bytes, 64);
    }
}
