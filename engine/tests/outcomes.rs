//! What a caller sees of every way in which a worker can answer, and what a worker makes of every
//! way in which a caller can end: the tables of spec/request-plane.md, row by row. A row whose test
//! is in another file has its name here. All rows of responses are played over a shared connection
//! as well, and by clients of the component model (`control/tests/component_outcomes.rs`).
//!
//! §4.3, the worker does:
//! * prologue with a typed error of class InvalidRequest, and any other error prologue:
//!   `a_typed_prologue_keeps_its_kind_...`; without a type: client.rs, `golden_response_...`
//! * a data frame, or a header that is no prologue: `messages_out_of_place_...`; client.rs, golden
//! * closes before the prologue: `a_reset_means_what_a_close_does`; client.rs, golden
//! * panics in `generate`: `messages_out_of_place_...`; ours says why: worker.rs, `a_panic_...`
//! * nothing: client.rs, `every_step_has_its_deadline`; component_outcomes.rs,
//!   `a_worker_that_is_gone_is_not_waited_for`
//! * the prologues of our own worker: worker.rs, `an_error_before_the_first_item_...`
//!
//! §4.4, the worker wrote (names of golden streams in client.rs in brackets):
//! * items, final, sentinel [live_response_ok]; ours: worker.rs, `one_item_and_a_hundred_...`
//! * items, final, close [final_then_close]; with a reset: `a_reset_means_what_a_close_does`
//! * items, sentinel, no final [sentinel_without_final]
//! * items, close or reset [close_before_final], `a_reset_...`; after a stop:
//!   `after_a_stop_every_end_is_plain`
//! * anything after final [data_after_final]; final with data [final_with_data]
//! * wrapper without data, not final [empty_wrapper]
//! * item that does not decode [bad_payload], or without `complete_final` [missing_complete_final]
//! * a header that does not belong there: `messages_out_of_place_...`
//!
//! §4.6, the caller's end of our client, and our worker's:
//! * stop, kill, drop in mid-stream: `a_task_can_end_its_call_at_every_stage`; worker.rs,
//!   `what_the_frontend_says_is_obeyed`
//! * the same before the prologue: the same; worker.rs, `what_is_said_before_the_prologue_...`
//! * the same before the call home: the same; a reset at the worker, in the same test
//! * a kill after a stop: `a_kill_after_a_stop_is_said_too`; our worker has closed by then
//! * sentinel, data, garbage, reset, FIN at the worker: worker.rs, `what_the_frontend_says_...`
//! * an engine that does not look: worker.rs, `a_handler_that_does_not_listen_...`
//!
//! §4.7:
//! * no handshake within 10 s: `a_silent_caller_home_is_reset`
//! * unknown subject, data first, bad JSON: client.rs, `callers_home_who_are_not_expected_...`
//! * accepts fail: the storms of simulation.rs
//!
//! §10.2:
//! * our client: client.rs, `every_step_has_its_deadline` (silence after the acknowledgement)
//! * our worker, unary: worker.rs, `what_the_worker_cannot_read_...`; call home refused: worker.rs,
//!   `a_caller_who_cannot_be_reached_...`; bidirectional: bidirectional.rs, `what_does_not_fit_...`

mod common;
#[path = "common/ends.rs"]
mod ends;

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::time::Duration;

use common::*;
use corelane_codec::call_home::{
    self, KILL, KILL_FRAME, PROLOGUE_OK_FRAME, SENTINEL, SENTINEL_FRAME, STOP,
};
use corelane_codec::control_message::PayloadCodec::Json;
use corelane_codec::error::{DynamoError, Reason};
use corelane_codec::mux::{self, Kind};
use corelane_codec::{item, reply_frame, two_part};
use corelane_engine::local::Ending;
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
            reset(called);
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

fn reset(called: Called) {
    let socket = SockRef::from(&called.stream);
    socket.set_linger(Some(Duration::ZERO)).unwrap();
}

/// §4.4: a close or a reset after a stop is a plain end.
#[test]
fn after_a_stop_every_end_is_plain() {
    for ring in rings() {
        let (mut worker, client) = (HandWorker::default(), Local::client(ring));
        for how in ["close", "reset", "sentinel", "final and sentinel"] {
            let mut called = answer(&client, &mut worker, &items(&["1"], b""));
            assert_eq!(client.event().what, What::Acked);
            assert_eq!(client.event().what, What::Item(b"1".to_vec()));
            client.end_call(1, false);
            assert_eq!(called.message().expect("a word").0, STOP);
            match how {
                "close" => drop(called),
                "reset" => reset(called),
                "sentinel" => called.say(&SENTINEL_FRAME),
                _ => called.say(&good_end()),
            }
            let whole = how == "final and sentinel";
            let end = if whole { What::Finished } else { What::Stopped };
            assert_eq!(client.outcome(), [end], "{how}");
        }
    }
}

/// How far a call has come.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
enum Stage {
    Asked,
    CalledHome,
    Begun,
    Items,
}

/// §4.6: all its rows, by calls of tasks. Before the call home Dynamo's caller waits for it; ours
/// returns at once, and says it when the worker calls.
#[test]
fn a_task_can_end_its_call_at_every_stage() {
    let stages = [Stage::Asked, Stage::CalledHome, Stage::Begun, Stage::Items];
    for ring in rings() {
        let client = Local::client(ring);
        for how in ["stop", "kill", "drop"] {
            for stage in stages {
                ends_at(&client, how, stage);
            }
        }
        let stats = &client.handle.stats.shard;
        wait_until("no call is left", || stats.calls.get() == 0);
    }
}

/// A call of a task, which ends it when it is told to: whether it had begun, how many items came
/// after that, and how it ended. `None`: it was dropped.
fn call_to_end(
    client: &Local,
    address: SocketAddr,
    how: &'static str,
    now: &Arc<AtomicBool>,
) -> Receiver<Option<(bool, usize, Option<Ending>)>> {
    let told = Arc::clone(now);
    run(client, move |host| async move {
        let mut reply = host.caller().call(call_to(address));
        while !told.load(Ordering::Relaxed) {
            host.sleep(Duration::from_millis(1)).await;
        }
        match how {
            "stop" => reply.stop(),
            "kill" => reply.kill(),
            _ => return None,
        }
        let begun = reply.begun().await.is_ok();
        let mut items = 0;
        while let Some(item) = reply.next().await {
            items += usize::from(item.is_ok());
        }
        Some((begun, items, reply.ending()))
    })
}

fn ends_at(client: &Local, how: &'static str, stage: Stage) {
    let mut worker = HandWorker::default();
    let now = Arc::new(AtomicBool::new(false));
    let outcome = call_to_end(client, worker.address(), how, &now);
    let asked = worker.take();
    let received = &client.handle.stats.shard.received_bytes;
    let mut before = received.get();
    worker.reply("");
    let mut arrived = |what: &str| {
        wait_until(what, || received.get() > before);
        before = received.get();
    };
    arrived("the acknowledgement is there");
    let mut called = (stage != Stage::Asked).then(|| asked.call_home());
    if let Some(called) = &mut called {
        arrived("the handshake is there");
        match stage {
            Stage::Begun => called.say(&PROLOGUE_OK_FRAME),
            Stage::Items => called.say(&items(&["1"], b"")),
            _ => {}
        }
        if stage > Stage::CalledHome {
            arrived("what it said is there");
        }
    }
    now.store(true, Ordering::Relaxed);
    let word: &[u8] = if how == "stop" { STOP } else { KILL };
    let told = |called: &mut Called| called.message().map(|(header, _)| header);
    if stage == Stage::Asked {
        // It hears of it when it calls; a caller who has gone may just reset.
        let outcome = answered(&outcome);
        let ended = (true, 0, Some(Ending::Stopped));
        assert_eq!(outcome, (how != "drop").then_some(ended), "{how}");
        let mut called = asked.call_home();
        let heard = told(&mut called);
        let fine = heard.as_deref() == Some(word) || how == "drop" && heard.is_none();
        assert!(fine, "{how}: {heard:?}");
        return assert_eq!(told(&mut called), None);
    }
    let mut called = called.expect("it has called");
    assert_eq!(told(&mut called).as_deref(), Some(word), "{how} {stage:?}");
    let goes_on = how == "stop" && stage > Stage::CalledHome;
    if goes_on {
        let mut more = Vec::new();
        item::write_frame(b"2", Json, &mut more);
        called.say(&more);
        called.stream.shutdown(Shutdown::Write).unwrap();
    }
    assert_eq!(told(&mut called), None, "{how} {stage:?}");
    let items = usize::from(goes_on) + usize::from(stage == Stage::Items && how == "stop");
    let ended = (true, items, Some(Ending::Stopped));
    let wanted = (how != "drop").then_some(ended);
    assert_eq!(answered(&outcome), wanted, "{how} {stage:?}");
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
