//! Replays every golden vector: whole, and fed byte by byte; valid and invalid.

#[path = "../common/mod.rs"]
mod common;

#[cfg(feature = "curve")]
mod curve;
mod discovery;
mod event;
mod nats;
mod payload;
mod plain;
mod quic;
mod reply;
mod request;
mod stream;
mod two_part;
mod zmtp;

use std::fmt::Debug;

use corelane_codec::Decoded;

/// Feeds the input one byte more at a time. What a decoder asks for must be more than it has, may
/// only grow, and must not be more than a frame turns out to have.
fn byte_by_byte<'a, T: PartialEq + Debug>(
    name: &str,
    input: &'a [u8],
    decode: impl Fn(&'a [u8]) -> Decoded<T>,
    size: impl Fn(&T) -> usize,
) {
    let whole = decode(input);
    let mut asked = 0;
    for have in 0..=input.len() {
        match decode(&input[..have]) {
            Decoded::Need(need) => {
                assert!(need > have, "{name}: needs {need} of {have}");
                assert!(need >= asked, "{name}: needs shrink");
                if let Decoded::Frame(frame) = &whole {
                    assert!(need <= size(frame), "{name}: needs too much");
                }
                asked = need;
            }
            answer => {
                assert!(
                    have >= asked,
                    "{name}: answered before it had what it asked for"
                );
                assert_eq!(answer, whole, "{name} at {have}");
            }
        }
    }
}

#[test]
fn every_vector_is_replayed() {
    let mut seen = std::collections::BTreeMap::new();
    for vector in common::vectors() {
        match vector.kind.as_str() {
            "two_part" => two_part::valid(&vector),
            "two_part_malformed" => two_part::malformed(&vector),
            "two_part_stream" => stream::check(&vector),
            "tcp_request" => request::valid(&vector),
            "tcp_request_malformed" => request::malformed(&vector),
            "tcp_request_stream" => request::stream(&vector),
            "tcp_response" => reply::valid(&vector),
            "tcp_response_malformed" => reply::malformed(&vector),
            "tcp_response_stream" => reply::stream(&vector),
            "payload" if vector.name == "live_quic_connection_info" => {
                quic::connection_info(&vector);
            }
            "payload" => payload::check(&vector),
            "nats_stream" => nats::check(&vector),
            "quic_lane_stream" => quic::lane_stream(&vector),
            kind => panic!("{}: no replay for kind {kind}", vector.name),
        }
        *seen.entry(vector.kind).or_insert(0) += 1;
    }
    assert_eq!(seen.len(), 12, "{seen:?}");
}
