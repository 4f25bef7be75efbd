//! What a caller sees of every way in which a worker can answer: rows of spec/request-plane.md
//! §4.3, §4.4, §4.6 and §4.7 that the other tests do not have, and all of them over a shared
//! connection.

mod common;
#[path = "common/ends.rs"]
mod ends;

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};

use common::*;
use corelane_codec::call_home::{
    self, KILL, KILL_FRAME, PROLOGUE_OK_FRAME, SENTINEL, SENTINEL_FRAME, STOP,
};
use corelane_codec::control_message::PayloadCodec::Json;
use corelane_codec::error::{DynamoError, Reason};
use corelane_codec::mux::{self, Kind};
use corelane_codec::{item, reply_frame, two_part};
use ends::*;
use socket2::SockRef;

const INCOMPLETE: &str = "Stream ended before generation completed";

/// Lets a worker say `bytes` and nothing more; all that the caller hears.
fn play(client: &Local, worker: &mut HandWorker, bytes: &[u8]) -> (Vec<What>, Called) {
    let called = answer(client, worker, bytes);
    // The client may have reset it already.
    let _ = called.stream.shutdown(Shutdown::Write);
    (client.outcome(), called)
}

fn answer(client: &Local, worker: &mut HandWorker, bytes: &[u8]) -> Called {
    client.call(1, call_to(worker.address()));
    let asked = worker.take();
    worker.reply("");
    let mut called = asked.call_home();
    called.say(bytes);
    called
}

fn prologue(error: &DynamoError) -> Vec<u8> {
    let mut out = Vec::new();
    call_home::write_prologue_error("Generate Error: x", Some(&error.to_json()), &mut out);
    out.extend_from_slice(&SENTINEL_FRAME);
    out
}

fn failure(outcome: &[What]) -> &DynamoError {
    match outcome {
        [What::Failed(error)] => error,
        other => panic!("{other:?}"),
    }
}

fn items(data: &[&str], last: &[u8]) -> Vec<u8> {
    let mut out = PROLOGUE_OK_FRAME.to_vec();
    for data in data {
        item::write_frame(data.as_bytes(), Json, &mut out);
    }
    out.extend_from_slice(last);
    out
}

fn message(header: &[u8], body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    two_part::write(header, body, &mut out);
    out
}

fn good_end() -> Vec<u8> {
    [&call_home::FINAL_MARKER_JSON_FRAME[..], &SENTINEL_FRAME].concat()
}

/// §4.3: what becomes of a typed error in the prologue.
#[test]
fn a_typed_prologue_keeps_its_kind_only_if_the_request_is_to_blame() {
    let blocking = [
        Reason::Cancelled,
        Reason::DeadlineExceeded,
        Reason::BackendCancelled,
        Reason::CapacityExhausted,
        Reason::PoolExhausted,
    ];
    for ring in rings() {
        let (mut worker, client) = (HandWorker::default(), Local::client(ring));
        let invalid = DynamoError::new(Reason::BackendInvalidArgument, "too long");
        let (outcome, _) = play(&client, &mut worker, &prologue(&invalid));
        assert_eq!(failure(&outcome), &invalid);
        let lost = DynamoError::new(Reason::Disconnected, "gone");
        let (outcome, _) = play(&client, &mut worker, &prologue(&lost));
        let error = failure(&outcome);
        assert_eq!(error.reason(), Reason::CannotConnect);
        let text = "Worker generate() failed before response stream: Generate Error: x";
        assert_eq!(error.text(), text);
        let chain: Vec<Reason> = error.chain().map(DynamoError::reason).collect();
        assert_eq!(chain, [Reason::CannotConnect, Reason::Disconnected]);
        for reason in blocking {
            let alone = DynamoError::new(reason, "no");
            let below = invalid.clone().with_cause(alone.clone());
            for typed in [alone, below] {
                let (outcome, _) = play(&client, &mut worker, &prologue(&typed));
                let error = failure(&outcome);
                let chain: Vec<Reason> = error.chain().map(DynamoError::reason).collect();
                assert_eq!(chain, [Reason::CannotConnect], "{reason:?}");
            }
        }
    }
}

/// §4.3, §4.4: what may not come, and what is ignored.
#[test]
fn messages_out_of_place_end_the_call_and_empty_ones_do_not() {
    for ring in rings() {
        let (mut worker, client) = (HandWorker::default(), Local::client(ring));
        // A panicking `generate`: the sentinel comes in the prologue's place.
        for first in [&SENTINEL_FRAME[..], &KILL_FRAME, &message(b"{}", b"1")] {
            let (outcome, _) = play(&client, &mut worker, first);
            let error = failure(&outcome);
            assert_eq!(error.reason(), Reason::CannotConnect);
            assert!(error.text().contains("malformed prologue"), "{error}");
        }
        // Neither part: ignored, before the prologue and between the items.
        let mut bytes = message(b"", b"");
        bytes.extend_from_slice(&items(&["1"], &message(b"", b"")));
        item::write_frame(b"2", Json, &mut bytes);
        bytes.extend_from_slice(&good_end());
        let (outcome, _) = play(&client, &mut worker, &bytes);
        let [one, two] = [b"1", b"2"].map(|data| What::Item(data.to_vec()));
        assert_eq!(outcome, [one.clone(), two, What::Finished]);
        // What a worker does not say among its items: he is told to end.
        for wrong in [
            KILL_FRAME.to_vec(),
            message(SENTINEL, b"1"),
            message(b"\"what\"", b""),
            message(b"{", b""),
            PROLOGUE_OK_FRAME.to_vec(),
        ] {
            let mut called = answer(&client, &mut worker, &items(&["1"], &wrong));
            let outcome = client.outcome();
            assert_eq!((outcome.len(), &outcome[0]), (2, &one));
            let error = failure(&outcome[1..]);
            assert_eq!(
                (error.reason(), error.text()),
                (Reason::Disconnected, INCOMPLETE)
            );
            assert_eq!(
                called.message().map(|(header, _)| header),
                Some(KILL.to_vec())
            );
        }
        // An item that is an error, and a checksum that does not fit: the stream goes on. Release
        // builds of Dynamo do not look at checksums either (§3.1).
        let mut error = Vec::new();
        let typed = item::Annotated::<()>::from_error(DynamoError::unknown("engine failed"));
        item::write_value(&typed, Json, &mut error).unwrap();
        let error = String::from_utf8(error).unwrap();
        let mut wrong = message(b"", br#"{"data":2,"complete_final":false}"#);
        wrong[16..24].copy_from_slice(&[7; 8]);
        let mut bytes = items(&["1", &error], &wrong);
        bytes.extend_from_slice(&good_end());
        let (outcome, _) = play(&client, &mut worker, &bytes);
        assert_eq!(outcome.len(), 4);
        assert_eq!(outcome[1], What::Item(error.into_bytes()));
        assert_eq!(outcome[2..], [What::Item(b"2".to_vec()), What::Finished]);
    }
}

/// §4.4: a reset says what a close does.
#[test]
fn a_reset_means_what_a_close_does() {
    for ring in rings() {
        let (mut worker, client) = (HandWorker::default(), Local::client(ring));
        let stages: [(&[u8], usize, Option<&str>); 3] = [
            (
                &[],
                0,
                Some("Worker disconnected before response stream was established"),
            ),
            (&items(&["1"], b""), 1, Some(INCOMPLETE)),
            (&items(&["1"], &call_home::FINAL_MARKER_JSON_FRAME), 1, None),
        ];
        let received = &client.handle.stats.shard.received_bytes;
        for (bytes, count, text) in stages {
            let before = received.get();
            client.call(1, call_to(worker.address()));
            let asked = worker.take();
            worker.reply("");
            let mut called = asked.call_home();
            called.say(bytes);
            assert_eq!(client.event().what, What::Acked);
            for _ in 0..count {
                assert_eq!(client.event().what, What::Item(b"1".to_vec()));
            }
            let acked = reply_frame::ACCEPTED.len() as u64;
            wait_until("the handshake has come", || received.get() > before + acked);
            SockRef::from(&called.stream)
                .set_linger(Some(std::time::Duration::ZERO))
                .unwrap();
            drop(called);
            match (client.event().what, text) {
                (What::Failed(error), Some(text)) => {
                    assert_eq!(error.reason(), Reason::Disconnected);
                    assert_eq!(error.text(), text);
                }
                (what, text) => assert_eq!((what, text), (What::Finished, None)),
            }
        }
    }
}

/// §4.6: a stop may be followed by a kill.
#[test]
fn a_kill_after_a_stop_is_said_too() {
    for ring in rings() {
        let (mut worker, client) = (HandWorker::default(), Local::client(ring));
        client.call(1, call_to(worker.address()));
        let asked = worker.take();
        worker.reply("");
        let mut called = asked.call_home();
        called.say(&items(&["1"], b""));
        assert_eq!(client.event().what, What::Acked);
        assert_eq!(client.event().what, What::Item(b"1".to_vec()));
        for (kill, word) in [(false, STOP), (true, KILL)] {
            client.end_call(1, kill);
            assert_eq!(
                called.message().map(|(header, _)| header),
                Some(word.to_vec())
            );
        }
        assert_eq!(client.event().what, What::Stopped);
        assert_eq!(called.message(), None);
    }
}

/// §4.7: who does not say within 10 s for whom he calls is reset.
#[test]
fn a_silent_caller_home_is_reset() {
    let mut clients = Vec::new();
    for ring in rings() {
        let (mut worker, client) = (HandWorker::default(), Local::client(ring));
        client.call(1, call_to(worker.address()));
        let asked = worker.take();
        let mut half = TcpStream::connect(asked.address).unwrap();
        half.write_all(&[0; 10]).unwrap();
        half.set_read_timeout(Some(DEADLINE)).unwrap();
        clients.push((client, worker, half));
    }
    for (client, _worker, mut half) in clients {
        let ended = half.read(&mut [0; 8]).map_err(|error| error.kind());
        assert_eq!(ended, Err(ErrorKind::ConnectionReset));
        assert_eq!(client.handle.stats.shard.homes_refused.get(), 1);
    }
}

/// Every golden stream of a worker means the same on a shared connection.
#[test]
fn streams_mean_the_same_on_a_shared_connection() {
    let names = [
        "prologue_error_text",
        "prologue_error_typed_invalid",
        "prologue_error_legacy_unknown",
        "prologue_is_data_frame",
        "prologue_not_json",
        "close_before_prologue",
        "close_before_final",
        "sentinel_without_final",
        "final_then_close",
        "data_after_final",
        "final_with_data",
        "empty_wrapper",
        "worker_sends_stop",
        "header_and_data_unknown",
        "bad_payload",
        "missing_complete_final",
        "bad_checksum",
    ];
    for ring in rings() {
        let (mut worker, client) = (HandWorker::default(), Local::client(ring));
        let mut wire: Option<TcpStream> = None;
        for (number, name) in names.into_iter().enumerate() {
            let bytes = golden(&format!("hand_worker_{name}"));
            let (alone, _) = play(&client, &mut worker, &bytes);
            client.call(1, call_to(worker.address()));
            let asked = worker.take();
            worker.reply("");
            let wire = wire.get_or_insert_with(|| {
                let mut wire = TcpStream::connect(asked.address).unwrap();
                wire.write_all(&mux::HELLO_FRAME).unwrap();
                wire
            });
            let subject = u128::from_str_radix(&asked.subject.replace('-', ""), 16).unwrap();
            let (open, end) = (true, true);
            let kind = Kind::Data { open, end };
            let prefix = mux::prefix(number as u32, kind, 16 + bytes.len());
            let chunk = [&prefix[..], &subject.to_be_bytes(), &bytes].concat();
            wire.write_all(&chunk).unwrap();
            assert_eq!(client.outcome(), alone, "{name}");
        }
    }
}
