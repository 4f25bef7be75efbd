//! A shard that makes calls, against hand-made workers and our own, on every ring.

mod common;
#[path = "common/ends.rs"]
mod ends;

use std::collections::HashMap;
use std::net::{Shutdown, TcpListener};
use std::time::Duration;

use common::*;
use corelane_codec::call_home::{self, KILL, STOP};
use corelane_codec::control_message::PayloadCodec::{Json, MessagePack};
use corelane_codec::control_message::StreamType;
use corelane_codec::error::{DynamoError, Reason};
use corelane_codec::item;
use corelane_engine::call::{Deadlines, NewCall};
use corelane_engine::config::RingKind;
use corelane_engine::ends::Ends;
use corelane_engine::handler::Request;
use corelane_engine::responder::Responder;
use ends::*;

fn prologue_and_items(items: u32) -> Vec<u8> {
    let mut out = call_home::PROLOGUE_OK_FRAME.to_vec();
    for number in 0..items {
        item::write_frame(number.to_string().as_bytes(), Json, &mut out);
    }
    out
}

fn final_and_sentinel() -> Vec<u8> {
    let mut out = call_home::FINAL_MARKER_JSON_FRAME.to_vec();
    out.extend_from_slice(&call_home::SENTINEL_FRAME);
    out
}

fn echoing(ring: RingKind, items: u32) -> Local {
    let make = handler(
        move |request: Request, mut responder: Responder| async move {
            for _ in 0..items {
                if responder.annotated(request.body()).await.is_err() {
                    return;
                }
            }
            responder.finish();
        },
    );
    Local::worker(ring, make)
}

fn reason(what: &What) -> Option<Reason> {
    match what {
        What::Failed(error) | What::BadItem(error) => Some(error.reason()),
        _ => None,
    }
}

#[test]
fn one_item_and_a_hundred_come_intact_in_both_codecs() {
    for ring in rings() {
        for items in [0, 1, 100] {
            let (worker, client) = (echoing(ring, items), Local::client(ring));
            for (codec, body, data) in [
                (Json, &b"{\"a\":1}"[..], &b"{\"data\":{\"a\":1}}"[..]),
                (MessagePack, b"\x81\xa1a\x01", b"\x81\xa4data\x81\xa1a\x01"),
            ] {
                let mut call = call_to(worker.address());
                (call.codec, call.body) = (codec, body.to_vec());
                client.call(1, call);
                let mut want = vec![What::Item(data.to_vec()); items as usize];
                want.push(What::Finished);
                assert_eq!(client.outcome(), want);
            }
            let stats = &client.handle.stats.shard;
            wait_until("all is given back", || {
                stats.calls.get() == 0 && stats.connections.get() == 2
            });
        }
    }
}

#[test]
fn a_request_says_what_a_worker_needs() {
    for ring in rings() {
        let (mut worker, client) = (HandWorker::default(), Local::client(ring));
        let mut call = call_to(worker.address());
        call.headers = vec![("x-a".into(), "1 \"2\"".into())];
        let chosen = "chosen".into();
        let named = NewCall {
            id: chosen,
            ..call.clone()
        };
        client.call(7, named);
        client.call(8, call);
        let (one, two) = (worker.take(), worker.take());
        assert_eq!(one.path, SERVED);
        assert!(
            one.headers.contains("\"request-id\":\"chosen\""),
            "{}",
            one.headers
        );
        assert!(
            one.headers
                .contains(&format!("\"x-endpoint-path\":\"{SERVED}\""))
        );
        assert!(
            one.headers.contains(r#""x-a":"1 \"2\"""#),
            "{}",
            one.headers
        );
        assert_eq!(one.body, b"{\"a\":1}");
        for asked in [&one, &two] {
            assert_eq!((asked.subject.len(), &asked.subject[14..15]), (36, "4"));
        }
        assert_ne!(one.subject, two.subject);
        assert!(!two.headers.contains("chosen") && two.headers.contains("request-id"));
    }
}

#[test]
fn calls_share_a_connection_and_replies_are_matched_by_order() {
    const CALLS: u64 = 200;
    for ring in rings() {
        let (mut worker, client) = (HandWorker::default(), Local::client(ring));
        for number in 0..CALLS {
            let mut call = call_to(worker.address());
            call.body = number.to_string().into_bytes();
            client.call(number, call);
        }
        let asked: Vec<Asked> = (0..CALLS).map(|_| worker.take()).collect();
        // Every third is refused; the others are called home in the opposite order.
        for number in 0..CALLS {
            worker.reply(match number % 3 {
                0 => "Server overloaded: worker at capacity",
                _ => "",
            });
        }
        for asked in asked.iter().rev() {
            let number: u64 = std::str::from_utf8(&asked.body).unwrap().parse().unwrap();
            if !number.is_multiple_of(3) {
                let mut called = asked.call_home();
                called.say(&prologue_and_items(1));
                called.say(&final_and_sentinel());
            }
        }
        let mut ends = HashMap::new();
        while ends.len() < CALLS as usize {
            let event = client.event();
            if event.what.is_end() {
                assert_eq!(ends.insert(event.call, event.what), None);
            }
        }
        for (number, end) in ends {
            let refused = "Server overloaded: worker at capacity".to_owned();
            match number % 3 {
                0 => assert_eq!(end, What::Refused(refused)),
                _ => assert_eq!(end, What::Finished),
            }
        }
        worker.listener.set_nonblocking(true).unwrap();
        assert!(
            worker.listener.accept().is_err(),
            "one connection is enough"
        );
    }
}

/// What `expect` of a golden response stream says, in our words.
enum Told {
    Refused(Reason, &'static str),
    Items(Vec<What>),
}

/// What `expect` of the golden response streams says: name, whether the worker closes, outcome.
fn golden_table() -> Vec<(&'static str, bool, Told)> {
    let refused = |name, reason, text| (name, true, Told::Refused(reason, text));
    let failed = Reason::CannotConnect;
    let mut table = vec![
        refused("prologue_error_text", failed, "Generate Error: boom"),
        refused(
            "prologue_error_typed_invalid",
            Reason::BackendInvalidArgument,
            "bad",
        ),
        refused("prologue_error_legacy_unknown", failed, "stream: E"),
        refused("prologue_is_data_frame", failed, "malformed prologue"),
        refused("prologue_not_json", failed, "malformed prologue"),
        refused(
            "close_before_prologue",
            Reason::Disconnected,
            "before response stream",
        ),
    ];
    let item = |text: &str| What::Item(format!("{{\"data\":{text}}}").into_bytes());
    let incomplete = "Stream ended before generation completed";
    let incomplete = || What::Failed(DynamoError::disconnected(incomplete));
    let bad = |text: &str| {
        What::BadItem(DynamoError::unknown(format!(
            "{text} - this should never happen"
        )))
    };
    let after_final = bad("Response received after generation ended");
    let empty = bad("Empty response received");
    for (name, closes, items) in [
        ("close_before_final", true, vec![item("1"), incomplete()]),
        (
            "sentinel_without_final",
            false,
            vec![item("1"), incomplete()],
        ),
        ("final_then_close", true, vec![item("1"), What::Finished]),
        (
            "data_after_final",
            false,
            vec![item("1"), after_final, What::Finished],
        ),
        ("final_with_data", false, vec![item("9"), What::Finished]),
        ("empty_wrapper", false, vec![empty, What::Finished]),
        ("worker_sends_stop", false, vec![item("1"), incomplete()]),
        ("header_and_data_unknown", false, vec![incomplete()]),
    ] {
        table.push((name, closes, Told::Items(items)));
    }
    table
}

#[test]
fn golden_response_streams_end_as_dynamos_client_ends_them() {
    for ring in rings() {
        let (mut worker, client) = (HandWorker::default(), Local::client(ring));
        let mut play = |name: &str, half_closes: bool| {
            client.call(1, call_to(worker.address()));
            let asked = worker.take();
            worker.reply("");
            let mut called = asked.call_home();
            called.say(&golden(&format!("hand_worker_{name}")));
            if half_closes {
                // The client may have reset it already.
                let _ = called.stream.shutdown(Shutdown::Write);
            }
            let outcome = client.outcome();
            (outcome, called)
        };
        for (name, half_closes, want) in golden_table() {
            let (outcome, mut called) = play(name, half_closes);
            match want {
                Told::Refused(want, text) => {
                    let [What::Failed(error)] = &outcome[..] else {
                        panic!("{name}: {outcome:?}");
                    };
                    assert_eq!(error.reason(), want, "{name}");
                    assert!(error.text().contains(text), "{name}: {error}");
                }
                Told::Items(want) => {
                    let plain = |what: &What| match what {
                        What::Failed(error) => {
                            What::Failed(DynamoError::new(error.reason(), error.text()))
                        }
                        what => what.clone(),
                    };
                    let outcome: Vec<What> = outcome.iter().map(plain).collect();
                    assert_eq!(outcome, want, "{name}");
                }
            }
            // A worker that breaks the rules is told to end.
            let violates = ["worker_sends_stop", "header_and_data_unknown"].contains(&name);
            let said = called.message().map(|(header, _)| header);
            assert_eq!(said, violates.then(|| KILL.to_vec()), "{name}");
        }
        for name in ["bad_payload", "missing_complete_final"] {
            let (outcome, _) = play(name, false);
            assert_eq!(reason(&outcome[0]), Some(Reason::Unclassified), "{name}");
            assert_eq!(outcome[1..], [What::Finished], "{name}");
        }
        for (name, codec, items) in [
            ("live_response_ok_json", Json, 2),
            ("live_response_ok_msgpack", MessagePack, 2),
            ("live_response_empty_stream_json", Json, 0),
        ] {
            let mut call = call_to(worker.address());
            call.codec = codec;
            client.call(1, call);
            let asked = worker.take();
            worker.reply("");
            let mut called = asked.call_home();
            // The golden stream begins with a handshake of its own.
            let stream = golden(name);
            let handshake = 24 + u64::from_be_bytes(stream[..8].try_into().unwrap()) as usize;
            called.say(&stream[handshake..]);
            let outcome = client.outcome();
            assert_eq!(outcome.last(), Some(&What::Finished), "{name}");
            assert_eq!(outcome.len(), items + 1, "{name}");
        }
    }
}

#[test]
fn a_stream_cut_at_every_byte_comes_whole_and_may_come_before_the_ack() {
    for ring in rings() {
        let (mut worker, client) = (HandWorker::default(), Local::client(ring));
        let stream = [prologue_and_items(2), final_and_sentinel()].concat();
        for cut in (0..stream.len()).step_by(5) {
            client.call(1, call_to(worker.address()));
            let asked = worker.take();
            let mut called = asked.call_home();
            called.say(&stream[..cut]);
            std::thread::sleep(Duration::from_micros(300));
            called.say(&stream[cut..]);
            let items = [
                What::Item(b"0".to_vec()),
                What::Item(b"1".to_vec()),
                What::Finished,
            ];
            assert_eq!(client.outcome(), items);
            worker.reply("");
        }
    }
}

#[test]
fn large_items_come_whole() {
    for ring in rings() {
        let (mut worker, client) = (HandWorker::default(), Local::client(ring));
        for bytes in [20_000, 65_000, 70_000, 3 << 20, 20 << 20] {
            client.call(1, call_to(worker.address()));
            let asked = worker.take();
            worker.reply("");
            let mut called = asked.call_home();
            let data = [&b"\""[..], &vec![b'x'; bytes], b"\""].concat();
            let mut stream = prologue_and_items(1);
            item::write_frame(&data, Json, &mut stream);
            stream.extend_from_slice(&final_and_sentinel());
            called.say(&stream);
            let outcome = client.outcome();
            assert!(outcome[1] == What::Item(data), "{bytes}");
            assert_eq!((outcome.len(), &outcome[2]), (3, &What::Finished));
        }
        let stats = &client.handle.stats.shard;
        wait_until("all buffers are free", || stats.buffers_held.get() == 0);
    }
}

#[test]
fn refusals_and_failures_of_the_request_end_the_call() {
    for ring in rings() {
        let client = Local::client(ring);
        let nobody = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        client.call(1, call_to(nobody));
        assert_eq!(reason(&client.outcome()[0]), Some(Reason::CannotConnect));
        let refused = "Server unavailable: unknown endpoint x";
        let mut worker = HandWorker::default();
        client.call(1, call_to(worker.address()));
        worker.take();
        worker.reply(refused);
        assert_eq!(client.outcome(), [What::Refused(refused.into())]);
        // Dynamo's client takes this for success and waits for ever.
        client.call(1, call_to(worker.address()));
        worker.take();
        worker.reply("Invalid endpoint path");
        let outcome = client.outcome();
        assert_eq!(
            reason(&outcome[0]),
            Some(Reason::BackendProtocol),
            "{outcome:?}"
        );
        client.call(1, call_to(worker.address()));
        worker.take();
        worker.stream.take();
        assert_eq!(reason(&client.outcome()[0]), Some(Reason::CannotConnect));
        // The next call dials again.
        client.call(1, call_to(worker.address()));
        worker.take();
        let mut large = call_to(worker.address());
        large.body = vec![b'1'; 40 << 20];
        client.call(2, large);
        let event = client.event();
        assert_eq!(
            (event.call, reason(&event.what)),
            (2, Some(Reason::InvalidArgument))
        );
    }
}

#[test]
fn every_step_has_its_deadline() {
    let [short, long] = [Duration::from_millis(50), Duration::from_secs(60)];
    let deadlines = |ack, first_item, total| Deadlines {
        ack,
        first_item,
        total,
    };
    for ring in rings() {
        let (mut worker, client) = (HandWorker::default(), Local::client(ring));
        let call = |deadlines, worker: &mut HandWorker| {
            let mut call = call_to(worker.address());
            call.deadlines = deadlines;
            client.call(1, call);
            worker.take()
        };
        let late = call(deadlines(short, long, long), &mut worker);
        assert_eq!(
            reason(&client.outcome()[0]),
            Some(Reason::ConnectionTimeout)
        );
        // Who calls home for it after that is told that nobody waits.
        let mut called = late.call_home();
        assert_eq!(
            called.message().map(|(header, _)| header),
            Some(KILL.to_vec())
        );
        assert_eq!(called.message(), None);
        worker.reply("");

        call(deadlines(long, short, long), &mut worker);
        worker.reply("");
        assert_eq!(reason(&client.outcome()[0]), Some(Reason::ResponseTimeout));
        with_growing_times(&TIMES, |time| a_call_ends_in_its_middle(ring, time));
    }
}

fn a_call_ends_in_its_middle(ring: RingKind, total: Duration) {
    let (mut worker, client) = (HandWorker::default(), Local::client(ring));
    let mut call = call_to(worker.address());
    call.deadlines = Deadlines {
        ack: DEADLINE,
        first_item: DEADLINE,
        total,
    };
    client.call(1, call);
    let asked = worker.take();
    worker.reply("");
    let mut called = asked.call_home();
    called.say(&prologue_and_items(3));
    let outcome = client.outcome();
    assert_eq!(
        reason(&outcome[3]),
        Some(Reason::DeadlineExceeded),
        "{outcome:?}"
    );
    assert_eq!(
        called.message().map(|(header, _)| header),
        Some(KILL.to_vec())
    );
    assert_eq!(called.message(), None);
}

#[test]
fn callers_home_who_are_not_expected_are_reset() {
    for ring in rings() {
        let (mut worker, client) = (HandWorker::default(), Local::client(ring));
        client.call(1, call_to(worker.address()));
        let asked = worker.take();
        worker.reply("");
        for name in [
            "hand_callhome_unknown_subject",
            "hand_callhome_first_frame_is_data",
            "hand_callhome_first_frame_not_json",
        ] {
            let mut called = asked.dial();
            called.say(&golden(name));
            let ended = std::io::Read::read(&mut called.stream, &mut [0; 8]);
            let kind = ended.map_err(|error| error.kind());
            assert_eq!(kind, Err(std::io::ErrorKind::ConnectionReset), "{name}");
        }
        let mut wrong = Vec::new();
        call_home::write_handshake(&asked.subject, StreamType::Request, &mut wrong);
        let mut called = asked.dial();
        called.say(&wrong);
        assert_eq!(called.message(), None);
        let mut called = asked.call_home();
        called.say(&prologue_and_items(1));
        assert_eq!(client.event().what, What::Acked);
        assert_eq!(client.event().what, What::Item(b"0".to_vec()));
        // A second one for the same call is not for it.
        assert_eq!(asked.call_home().message(), None);
        called.say(&final_and_sentinel());
        assert_eq!(client.event().what, What::Finished);
        assert_eq!(client.handle.stats.shard.homes_refused.get(), 5);
    }
}

#[test]
fn stop_and_kill_are_said_at_every_stage() {
    for ring in rings() {
        let (mut worker, client) = (HandWorker::default(), Local::client(ring));
        for kill in [false, true] {
            let word = if kill { KILL.to_vec() } else { STOP.to_vec() };
            let end = |client: &Local| {
                client.end_call(1, kill);
            };
            // In the middle of the items: after a stop the rest is taken.
            client.call(1, call_to(worker.address()));
            let asked = worker.take();
            worker.reply("");
            let mut called = asked.call_home();
            called.say(&prologue_and_items(1));
            assert_eq!(client.event().what, What::Acked);
            assert_eq!(client.event().what, What::Item(b"0".to_vec()));
            end(&client);
            assert_eq!(
                called.message().map(|(header, _)| header),
                Some(word.clone())
            );
            if !kill {
                let mut more = Vec::new();
                item::write_frame(b"9", Json, &mut more);
                called.say(&more);
                assert_eq!(client.event().what, What::Item(b"9".to_vec()));
                called.stream.shutdown(Shutdown::Write).unwrap();
            }
            assert_eq!(client.event().what, What::Stopped);
            assert_eq!(called.message(), None);

            // Called home, no prologue yet.
            client.call(1, call_to(worker.address()));
            let asked = worker.take();
            worker.reply("");
            let mut called = asked.call_home();
            assert_eq!(client.event().what, What::Acked);
            let connections = &client.handle.stats.shard.connections;
            wait_until("it has called home", || connections.get() >= 2);
            end(&client);
            assert_eq!(client.event().what, What::Stopped);
            assert_eq!(
                called.message().map(|(header, _)| header),
                Some(word.clone())
            );
            assert_eq!(called.message(), None);

            // Not called home: it is told when it does.
            client.call(1, call_to(worker.address()));
            let asked = worker.take();
            end(&client);
            assert_eq!(client.event().what, What::Stopped);
            worker.reply("");
            let mut called = asked.call_home();
            assert_eq!(called.message().map(|(header, _)| header), Some(word));
            assert_eq!(called.message(), None);
        }
        let stats = &client.handle.stats.shard;
        wait_until("all is given back", || stats.calls.get() == 0);
    }
}

#[test]
fn many_halves_do_not_keep_wholes_from_arriving() {
    const CALLS: u64 = 100;
    for ring in rings() {
        let mut worker = HandWorker::default();
        let client = Local::with_buffers(ring, Ends::client(home(), 1024), 32);
        let data = [&b"\""[..], &[b'x'; 20_000], b"\""].concat();
        let mut stream = prologue_and_items(0);
        item::write_frame(&data, Json, &mut stream);
        stream.extend_from_slice(&final_and_sentinel());
        for cut in [10, 45, 2_000, 19_000] {
            let mut called = Vec::new();
            for number in 0..CALLS {
                client.call(number, call_to(worker.address()));
                let asked = worker.take();
                worker.reply("");
                let mut one = asked.call_home();
                one.say(&stream[..cut]);
                called.push(one);
            }
            for one in &mut called {
                one.say(&stream[cut..]);
            }
            let mut finished = 0;
            while finished < CALLS {
                match client.event().what {
                    What::Acked => {}
                    What::Item(item) => assert!(item == data),
                    what => {
                        assert_eq!(what, What::Finished);
                        finished += 1;
                    }
                }
            }
        }
    }
}
