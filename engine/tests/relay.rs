//! A shard that relays responses, on real sockets, on every ring that the host allows.

#[path = "common/ends.rs"]
mod ends;

mod common;
#[path = "relay/lab.rs"]
mod lab;
#[path = "relay/secure.rs"]
mod secure;

use std::io::{Read, Write};
use std::time::Duration;

use common::*;
use corelane_codec::call_home::{self, KILL, STOP};
use corelane_codec::control_message::{PayloadCodec, StreamType};
use corelane_codec::error::{Class, DynamoError};
use corelane_codec::{item, two_part};
use corelane_engine::config::RingKind;
use corelane_engine::directory::Instance;
use corelane_engine::directory::{Ack, Policy};
use corelane_engine::handler::Request;
use corelane_engine::responder::Responder;
use ends::{Called, What};
use lab::*;

#[test]
fn a_response_passes_as_it_is_and_the_worker_sees_only_the_router() {
    for ring in rings() {
        for ack in [Ack::OnForward, Ack::OnAccept] {
            let mut lab = Lab::new(ring, ack, 1);
            lab.ask("my-subject", b"{\"a\":1}");
            let asked = lab.workers[0].take();
            assert_eq!(asked.body, b"{\"a\":1}");
            assert_eq!(asked.path, "1/test/worker/generate");
            assert_ne!(asked.address, lab.home());
            assert_ne!(asked.subject, "my-subject");
            lab.workers[0].reply("");
            assert_eq!(lab.caller.reply(), "");
            let mut worker = asked.call_home();
            let mut caller = lab.called();
            assert_eq!(caller.handshake(), "my-subject");
            let answer = answer(3, PayloadCodec::Json);
            worker.say(&answer);
            assert_eq!(drained(&mut caller), answer);
            // Its sentinel has been taken: the router closes.
            assert_eq!(worker.message(), None);
            drop(caller);
            lab.empty();
            let stats = lab.router.handle.stats.routes.get(0).unwrap();
            assert_eq!(total(&stats.first_item), 1);
            assert_eq!(total(&stats.inter_item), 2);
        }
    }
}

#[test]
fn a_call_home_before_the_acknowledgement_counts_as_one() {
    for ring in rings() {
        let mut lab = Lab::new(ring, Ack::OnAccept, 1);
        lab.ask("s", b"x");
        let mut worker = lab.workers[0].take().call_home();
        assert_eq!(lab.caller.reply(), "");
        worker.say(&answer(1, PayloadCodec::Json));
        let mut caller = lab.called();
        caller.handshake();
        assert_eq!(drained(&mut caller), answer(1, PayloadCodec::Json));
        drop(caller);
        lab.workers[0].reply("");
        lab.empty();
    }
}

/// Ways in which a first attempt fails before anything was passed on.
const FAILURES: [&str; 11] = [
    "refused",
    "unavailable",
    "hung up",
    "hung up after the acknowledgement",
    "closed before the prologue",
    "closed after the prologue",
    "closed inside the first item",
    "error prologue",
    "malformed prologue",
    "sentinel in its place",
    "no item",
];

#[test]
fn another_instance_answers_whole_when_the_first_fails_before_the_first_item() {
    for ring in rings() {
        for ack in [Ack::OnForward, Ack::OnAccept] {
            for failure in FAILURES {
                let mut lab = Lab::new(ring, ack, 2);
                lab.ask("s", b"body");
                let (first, asked) = lab.taker();
                let old = asked.subject.clone();
                let worker = &mut lab.workers[first];
                let socket = fail_first(worker, &asked, failure);
                let asked = lab.workers[1 - first].take();
                assert_ne!(asked.subject, old, "{failure}");
                assert_eq!(asked.body, b"body");
                if failure == "malformed prologue" {
                    // Its answer is still owed: it must not be taken for another one's.
                    lab.workers[first].reply("");
                }
                lab.workers[1 - first].reply("");
                let mut worker = asked.call_home();
                worker.say(&answer(2, PayloadCodec::Json));
                let mut caller = lab.called();
                assert_eq!(caller.handshake(), "s");
                assert_eq!(
                    drained(&mut caller),
                    answer(2, PayloadCodec::Json),
                    "{failure}"
                );
                assert_eq!(lab.caller.reply(), "", "{failure}");
                drop((caller, socket));
                lab.empty();
            }
        }
    }
}

fn fail_first(worker: &mut ends::HandWorker, asked: &ends::Asked, failure: &str) -> Option<Called> {
    let typed = DynamoError::engine_shutdown("going down");
    let mut out = Vec::new();
    match failure {
        "refused" => {
            worker.reply("Server overloaded: worker at capacity");
            return None;
        }
        "unavailable" => {
            worker.reply("Server unavailable: unknown endpoint x");
            return None;
        }
        "hung up" => {
            worker.stream = None;
            return None;
        }
        "hung up after the acknowledgement" => {
            worker.reply("");
            // So that it is read before the end.
            std::thread::sleep(Duration::from_millis(20));
            worker.stream = None;
            return None;
        }
        "closed before the prologue" => {}
        "closed after the prologue" => out.extend(call_home::PROLOGUE_OK_FRAME),
        "closed inside the first item" => {
            out.extend(call_home::PROLOGUE_OK_FRAME);
            item::write_frame(b"\"half\"", PayloadCodec::Json, &mut out);
            out.truncate(out.len() - 3);
        }
        "error prologue" => {
            call_home::write_prologue_error(typed.text(), Some(&typed.to_json()), &mut out);
            out.extend(call_home::SENTINEL_FRAME);
        }
        "malformed prologue" => two_part::write(b"[]", b"", &mut out),
        "sentinel in its place" => out.extend(call_home::SENTINEL_FRAME),
        "no item" => {
            out.extend(call_home::PROLOGUE_OK_FRAME);
            out.extend(call_home::SENTINEL_FRAME);
        }
        _ => unreachable!("{failure}"),
    }
    if failure != "malformed prologue" {
        worker.reply("");
    }
    let mut called = asked.call_home();
    called.say(&out);
    // A half close says that no more comes.
    let closes = failure.starts_with("closed");
    if closes {
        called.stream.shutdown(std::net::Shutdown::Write).unwrap();
    }
    Some(called)
}

#[test]
fn an_error_that_is_not_worth_another_try_passes_as_it_is() {
    for ring in rings() {
        for typed in [
            Some(DynamoError::invalid_argument("prompt too long")),
            Some(
                DynamoError::disconnected("x").with_cause(DynamoError::cancelled("by the engine")),
            ),
            None,
        ] {
            let mut lab = Lab::new(ring, Ack::OnForward, 2);
            let (_, asked) = lab.asked();
            let mut out = Vec::new();
            let json = typed.as_ref().map(DynamoError::to_json);
            call_home::write_prologue_error("it failed", json.as_deref(), &mut out);
            out.extend(call_home::SENTINEL_FRAME);
            let mut worker = asked.call_home();
            worker.say(&out);
            let mut caller = lab.called();
            caller.handshake();
            assert_eq!(drained(&mut caller), out);
            drop(caller);
            lab.empty();
        }
    }
}

#[test]
fn when_nobody_is_left_the_caller_gets_a_typed_prologue() {
    for ring in rings() {
        let mut lab = Lab::new(ring, Ack::OnForward, 1);
        let (_, asked) = lab.asked();
        drop(asked.call_home());
        let mut caller = lab.called();
        caller.handshake();
        let text = caller.error_prologue();
        assert!(text.contains("transport.disconnected"), "{text}");
        assert_eq!(lab.caller.reply(), "");
        drop(caller);
        lab.empty();
    }
}

#[test]
fn a_stream_that_breaks_off_ends_at_once_with_an_error_of_class_unavailable() {
    for ring in rings() {
        for codec in [PayloadCodec::Json, PayloadCodec::MessagePack] {
            let mut lab = Lab::new(ring, Ack::OnForward, 2);
            lab.ask_in("s", codec, b"x");
            let (first, asked) = lab.taker();
            lab.workers[first].reply("");
            let mut worker = asked.call_home();
            let mut out = call_home::PROLOGUE_OK_FRAME.to_vec();
            out.extend(items(2, codec));
            worker.say(&out);
            let mut caller = lab.called();
            caller.handshake();
            caller.prologue_ok();
            for _ in 0..2 {
                assert!(caller.item(codec).is_some());
            }
            drop(worker);
            let data = caller.item(codec).expect("an error item");
            let read: item::Annotated<()> = item::from_bytes(&data, codec).unwrap();
            let error = read.to_error().expect("it is an error");
            assert_eq!(error.class(), Class::Unavailable, "{error}");
            assert_eq!(caller.item(codec), None);
            assert_eq!(caller.message().unwrap().0, call_home::SENTINEL);
            drop(caller);
            lab.empty();
        }
    }
}

#[test]
fn items_of_another_type_are_cut_off_without_an_error_of_ours() {
    for ring in rings() {
        let mut lab = Lab::new(ring, Ack::OnForward, 1);
        let (_, asked) = lab.asked();
        let mut worker = asked.call_home();
        let mut out = call_home::PROLOGUE_OK_FRAME.to_vec();
        item::write_frame(b"[1,2]", PayloadCodec::Json, &mut out);
        worker.say(&out);
        let mut caller = lab.called();
        caller.handshake();
        caller.prologue_ok();
        assert_eq!(caller.item(PayloadCodec::Json).unwrap(), b"[1,2]");
        // Half an item more: it must not reach the caller as if it were one.
        worker.say(&out[38..50]);
        drop(worker);
        assert_eq!(caller.message(), None);
        drop(caller);
        lab.empty();
    }
}

#[test]
fn stop_and_kill_reach_the_worker_and_what_still_comes_reaches_the_caller() {
    for ring in rings() {
        for (word, frame) in [
            (&STOP[..], &call_home::STOP_FRAME),
            (&KILL[..], &call_home::KILL_FRAME),
        ] {
            let mut lab = Lab::new(ring, Ack::OnForward, 2);
            let (_, asked) = lab.asked();
            let mut worker = asked.call_home();
            let mut out = call_home::PROLOGUE_OK_FRAME.to_vec();
            out.extend(items(1, PayloadCodec::Json));
            worker.say(&out);
            let mut caller = lab.called();
            caller.handshake();
            caller.prologue_ok();
            caller.item(PayloadCodec::Json).unwrap();
            caller.say(frame);
            assert_eq!(worker.message().expect("a word").0, word);
            if word == STOP {
                worker.say(&items(1, PayloadCodec::Json));
                caller.item(PayloadCodec::Json).unwrap();
                drop(worker);
            }
            assert_eq!(caller.message(), None);
            drop(caller);
            lab.empty();
        }
    }
}

#[test]
fn a_caller_who_goes_away_takes_his_worker_along() {
    for ring in rings() {
        for called in [false, true] {
            let mut lab = Lab::new(ring, Ack::OnForward, 1);
            let (_, asked) = lab.asked();
            let mut caller = lab.called();
            caller.handshake();
            let mut worker = called.then(|| asked.call_home());
            let stats = &lab.router.handle.stats.shard;
            caller.say(&call_home::KILL_FRAME);
            drop(caller);
            match &mut worker {
                // A reset says the same to a worker that had just called.
                Some(worker) => match worker.message() {
                    Some((word, _)) => assert_eq!(word, KILL),
                    None => assert!(stats.homes_refused.get() > 0),
                },
                // Whoever calls later finds nobody.
                None => {
                    lab.wait_relays(0);
                    assert_eq!(asked.call_home().message(), None);
                }
            }
            drop(worker);
            lab.empty();
        }
    }
}

#[test]
fn a_caller_who_cannot_be_dialled_takes_his_worker_along() {
    for ring in rings() {
        let mut lab = Lab::new(ring, Ack::OnForward, 1);
        let frame = lab.frame("s", PayloadCodec::Json, b"x");
        let (mut caller, worker) = lab.without_home();
        caller.send(&frame);
        let asked = worker.take();
        worker.reply("");
        let stats = &lab.router.handle.stats.shard;
        wait_until("it is given up", || stats.relays_abandoned.get() == 1);
        assert_eq!(asked.call_home().message(), None);
        wait_until("all is gone", || {
            stats.relays.get() + stats.in_flight.get() == 0
        });
    }
}

#[test]
fn deadlines_end_in_another_instance_or_in_a_typed_error() {
    for ring in rings() {
        for (called, workers) in [(false, 2), (false, 1), (true, 2), (true, 1)] {
            let short = Duration::from_millis(50);
            let times = [&[short], &TIMES[..]].concat();
            with_growing_times(&times, |time| one_is_late(ring, called, workers, time));
        }
    }
}

/// The first instance calls home and sends nothing, or does not even call; the second one, if there
/// is one, is to be in time.
fn one_is_late(ring: RingKind, called: bool, workers: usize, time: Duration) {
    let mut lab = Lab::with(ring, Ack::OnForward, workers, |route| {
        let times = route.relay.as_mut().unwrap();
        match called {
            false => times.home_ns = ns(time),
            true => times.first_item_ns = ns(time),
        }
    });
    let (first, asked) = lab.asked();
    let late = called.then(|| asked.call_home());
    let mut caller = lab.called();
    caller.handshake();
    if workers == 1 {
        let text = caller.error_prologue();
        assert!(text.contains("backend.response_timeout"), "{text}");
        assert!(text.contains("DeadlineExceeded"), "{text}");
    } else {
        let asked = lab.workers[1 - first].take();
        lab.workers[1 - first].reply("");
        let mut worker = asked.call_home();
        worker.say(&answer(1, PayloadCodec::Json));
        assert_eq!(drained(&mut caller), answer(1, PayloadCodec::Json));
    }
    drop((caller, late));
    lab.empty();
    assert_eq!(lab.router.handle.stats.shard.relay_timeouts.get(), 1);
}

#[test]
fn a_stream_that_falls_silent_is_ended_after_the_inactivity_deadline() {
    for ring in rings() {
        let mut lab = Lab::with(ring, Ack::OnForward, 1, |route| {
            route.relay.as_mut().unwrap().inactivity_ns = 100_000_000;
        });
        let (_, asked) = lab.asked();
        let mut worker = asked.call_home();
        let mut out = call_home::PROLOGUE_OK_FRAME.to_vec();
        out.extend(items(1, PayloadCodec::Json));
        worker.say(&out);
        let mut caller = lab.called();
        caller.handshake();
        caller.prologue_ok();
        caller.item(PayloadCodec::Json).unwrap();
        let data = caller.item(PayloadCodec::Json).expect("an error item");
        let read: item::Annotated<()> = item::from_bytes(&data, PayloadCodec::Json).unwrap();
        assert_eq!(read.to_error().unwrap().class(), Class::DeadlineExceeded);
        assert_eq!(worker.message().expect("a word").0, KILL);
        drop(caller);
        lab.empty();
    }
}

#[test]
fn large_items_pass_and_a_slow_caller_holds_his_worker_back() {
    for ring in rings() {
        let mut lab = Lab::new(ring, Ack::OnForward, 1);
        let (_, asked) = lab.asked();
        let mut worker = asked.call_home();
        let mut out = call_home::PROLOGUE_OK_FRAME.to_vec();
        let data = format!("\"{}\"", "x".repeat(1 << 20));
        for _ in 0..24 {
            item::write_frame(data.as_bytes(), PayloadCodec::Json, &mut out);
        }
        out.extend(call_home::final_marker_frame(PayloadCodec::Json));
        out.extend(call_home::SENTINEL_FRAME);
        let mut caller = lab.called();
        caller.handshake();
        let said = out.clone();
        let writer = std::thread::spawn(move || {
            worker.stream.write_all(&said).unwrap();
            worker
        });
        let stats = &lab.router.handle.stats.shard;
        wait_until("the worker is held back", || {
            stats.receives_paused.get() > 0
        });
        assert!(stats.buffers_held.get() < 200, "{}", lab.router.counters());
        assert!(drained(&mut caller) == out);
        drop((writer.join().unwrap(), caller));
        lab.empty();
        wait_until("all buffers are free", || {
            lab.router.handle.stats.shard.buffers_held.get() == 0
        });
    }
}

#[test]
fn large_requests_are_cut_through() {
    for ring in rings() {
        for bytes in [60_000, 70_000, 900_000, 5 << 20] {
            let mut lab = Lab::new(ring, Ack::OnForward, 1);
            let body: Vec<u8> = (0..bytes)
                .map(|at: usize| (at * 7 + at / 251) as u8)
                .collect();
            lab.ask("s", &body);
            if bytes > 65_000 {
                lab.workers[0].bulk();
            }
            let asked = lab.workers[0].take();
            assert!(asked.body == body, "{bytes}");
            lab.workers[0].reply("");
            let mut worker = asked.call_home();
            worker.say(&answer(1, PayloadCodec::Json));
            let mut caller = lab.called();
            caller.handshake();
            assert_eq!(drained(&mut caller), answer(1, PayloadCodec::Json));
            assert_eq!(lab.caller.reply(), "");
            drop(caller);
            lab.empty();
        }
    }
}

#[test]
fn a_request_and_a_response_that_dribble_in_are_whole() {
    for ring in rings() {
        let mut lab = Lab::new(ring, Ack::OnForward, 1);
        let frame = lab.frame("s", PayloadCodec::Json, b"0123456789");
        for cut in (1..frame.len()).step_by(3) {
            lab.caller.send(&frame[..cut]);
            std::thread::sleep(Duration::from_micros(200));
            lab.caller.send(&frame[cut..]);
            let asked = lab.workers[0].take();
            assert_eq!(asked.body, b"0123456789");
            lab.workers[0].reply("");
            let mut worker = asked.dial();
            let mut out = Vec::new();
            call_home::write_handshake(&asked.subject, StreamType::Response, &mut out);
            out.extend(answer(2, PayloadCodec::Json));
            let cut = cut * out.len() / frame.len();
            worker.say(&out[..cut]);
            std::thread::sleep(Duration::from_micros(200));
            worker.say(&out[cut..]);
            let mut caller = lab.called();
            caller.handshake();
            assert_eq!(drained(&mut caller), answer(2, PayloadCodec::Json), "{cut}");
            assert_eq!(lab.caller.reply(), "");
        }
        lab.empty();
    }
}

/// Where nobody can be called home, the reply says what is wrong.
#[test]
fn envelopes_that_name_no_caller_are_refused() {
    for ring in rings() {
        let mut lab = Lab::new(ring, Ack::OnForward, 1);
        let home = lab.home().to_string();
        let good = envelope_in(&home, "s", PayloadCodec::Json, b"body");
        let (mut huge, mut empty) = (vec![0; 64], Vec::new());
        huge[2] = 1;
        two_part::write(b"{}", b"body", &mut empty);
        let quic = replaced(&good, "tcp_server", "quic-response");
        let other = replaced(&good, "tcp_server", "carrier-pigeon");
        let named = replaced(&good, &home, "localhost:80");
        let all = [
            (&b""[..], "too short"),
            (&[0; 40], "control message has 0 bytes"),
            (&huge, "parts are longer"),
            (&empty, "has no member"),
            (&quic, "no member `version`"),
            (&other, "over carrier-pigeon"),
            (&named, "not a numeric IP:PORT"),
        ];
        for (envelope, why) in all {
            lab.caller.send(&frame(LISTEN_PATH, envelope));
            let text = lab.caller.reply();
            let refused = text.starts_with("Server unavailable: ");
            assert!(refused && text.contains(why), "{why}: {text}");
        }
        lab.serves_on_after(all.len());
    }
}

/// Where he can be, a refusal would harm others: he is called.
#[test]
fn callers_of_envelopes_that_a_worker_would_drop_in_silence_are_called() {
    for ring in rings() {
        let mut lab = Lab::new(ring, Ack::OnForward, 1);
        let home = lab.home().to_string();
        let good = envelope_in(&home, "s", PayloadCodec::Json, b"body");
        let other = |from: &str, to: &str| replaced(&good, from, to);
        let (response, request) = (r#"type\":\"response"#, r#"type\":\"request"#);
        let long = format!(r#"\"{}\""#, "s".repeat(65));
        let all = [
            (
                other(r#"context\":\"id-1"#, r#"context\":\"id-2"#),
                "context",
            ),
            (other(response, request), "stream_type"),
            (envelope_in(&home, "s", PayloadCodec::Json, b""), "no body"),
            (
                other("single_in", "many_in"),
                "request_stream_connection_info",
            ),
            (other(r#"\"s\""#, &long), "subject"),
        ];
        for (envelope, why) in &all {
            lab.caller.send(&frame(LISTEN_PATH, envelope));
            assert_eq!(lab.caller.reply(), "", "{why}");
            let mut called = lab.called();
            called.handshake();
            let text = called.error_prologue();
            let typed = text.contains("request.invalid_argument");
            assert!(typed && text.contains(why), "{why}: {text}");
        }
        lab.serves_on_after(all.len());
    }
}

#[test]
fn strangers_are_reset_and_a_ticket_is_good_for_one_call() {
    for ring in rings() {
        let mut lab = Lab::new(ring, Ack::OnForward, 1);
        let (_, asked) = lab.asked();
        for what in 0..5 {
            let mut stranger = asked.dial();
            let mut out = Vec::new();
            match what {
                0 => call_home::write_handshake("s", StreamType::Response, &mut out),
                1 => call_home::write_handshake(&asked.subject, StreamType::Request, &mut out),
                2 => item::write_frame(b"1", PayloadCodec::Json, &mut out),
                3 => two_part::write(b"nonsense", b"", &mut out),
                _ => out.extend([0xff; 64]),
            }
            stranger.say(&out);
            assert_eq!(stranger.message(), None, "{what}");
        }
        let mut worker = asked.call_home();
        worker.say(&call_home::PROLOGUE_OK_FRAME);
        assert_eq!(asked.call_home().message(), None);
        worker.say(&answer(1, PayloadCodec::Json)[38..]);
        let mut caller = lab.called();
        caller.handshake();
        assert_eq!(drained(&mut caller), answer(1, PayloadCodec::Json));
        drop(caller);
        lab.empty();
        let stats = &lab.router.handle.stats.shard;
        assert_eq!(stats.homes_refused.get(), 6);
        assert_eq!(stats.relay_strangers.get(), 0);
    }
}

#[test]
fn load_is_what_is_open_and_nothing_else() {
    for ring in rings() {
        with_growing_times(&TIMES[1..], |time| load_is_what_is_open(ring, time));
    }
}

/// Instances have so long to acknowledge; those that are asked at the end do not.
fn load_is_what_is_open(ring: RingKind, time: Duration) {
    let mut lab = Lab::of(ring, Policy::LeastLoaded, Ack::OnForward, 2, |route| {
        route.ack_timeout_ns = ns(time);
    });
    let mut open: Vec<Vec<Called>> = vec![Vec::new(), Vec::new()];
    let mut callers = Vec::new();
    for _ in 0..6 {
        let (taker, asked) = lab.asked();
        let mut worker = asked.call_home();
        worker.say(&call_home::PROLOGUE_OK_FRAME);
        worker.say(&items(1, PayloadCodec::Json));
        let mut caller = lab.called();
        caller.handshake();
        caller.prologue_ok();
        caller.item(PayloadCodec::Json).unwrap();
        callers.push(caller);
        open[taker].push(worker);
    }
    assert_eq!((open[0].len(), open[1].len()), (3, 3));
    // All streams of one instance end, long ago or not: it is the one with the least.
    let finished = &lab.router.handle.stats.shard.relays_finished;
    for mut worker in open[1].drain(..) {
        worker.say(call_home::final_marker_frame(PayloadCodec::Json));
        worker.say(&call_home::SENTINEL_FRAME);
    }
    wait_until("they are counted off", || finished.get() == 3);
    for _ in 0..3 {
        lab.ask("s", b"x");
        let asked = lab.workers[1].take();
        lab.workers[1].reply("");
        open[1].push(asked.call_home());
        callers.push(lab.called());
    }
    drop((open, callers));
    lab.empty();
}

#[test]
fn a_bidirectional_call_has_both_its_streams_relayed() {
    for ring in rings() {
        let mut lab = Lab::new(ring, Ack::OnForward, 1);
        let envelope = two_way_envelope(&lab.home().to_string());
        lab.caller.send(&frame(LISTEN_PATH, &envelope));
        let asked = lab.workers[0].take_two_way();
        lab.workers[0].reply("");
        assert_eq!(lab.caller.reply(), "");
        assert_ne!(asked.request_subject, asked.response.subject);
        let mut response = lab.called();
        assert_eq!(response.handshake(), "the-response");
        let mut fed = asked.open_request();
        let mut worker = asked.response.call_home();
        let mut feeder = lab.called();
        assert_eq!(feeder.handshake(), "the-request");
        let mut sent = Vec::new();
        for number in 0..200 {
            let data = format!("{{\"n\":{number},\"x\":\"{}\"}}", "y".repeat(number * 50));
            two_part::write(b"", data.as_bytes(), &mut sent);
        }
        two_part::write(call_home::SENTINEL, b"", &mut sent);
        feeder.say(&sent);
        drop(feeder);
        let mut got = Vec::new();
        fed.stream.read_to_end(&mut got).unwrap();
        assert!(got == sent);
        worker.say(&answer(2, PayloadCodec::Json));
        assert_eq!(drained(&mut response), answer(2, PayloadCodec::Json));
        drop((response, fed));
        lab.empty();
    }
}

/// What becomes of call `number`: ours and the handler's part.
fn serve_by_number() -> corelane_engine::handler::MakeHandler {
    ends::handler(|request: Request, mut responder: Responder| async move {
        let number: u64 = String::from_utf8_lossy(request.body()).parse().unwrap();
        if number.is_multiple_of(5) {
            return responder.fail(&DynamoError::stream_incomplete("another one may"));
        }
        for _ in 0..20 {
            if responder.annotated(b"1").await.is_err() {
                return;
            }
            if number.is_multiple_of(3) {
                let _ = responder.sleep(Duration::from_micros(300)).await;
            }
            if number.is_multiple_of(7) {
                // Cut off: it is dropped without an end.
                return;
            }
        }
        responder.finish();
    })
}

/// A relayed route to workers of this program.
fn relay_to(router: &Router, workers: &[ends::Local]) {
    let mut route = route(Policy::LeastLoaded, Ack::OnForward, &[]);
    route.relay = Some(NO_TIMES);
    let instance = |(id, worker): (u64, &ends::Local)| Instance {
        id,
        address: worker.address(),
        path: ends::SERVED.into(),
    };
    route.instances = (1u64..).zip(workers).map(instance).collect();
    router.publish(route);
    let ready = &router.handle.stats.shard.instances_ready;
    wait_until("all instances are connected", || {
        ready.get() == workers.len() as u64
    });
}

#[test]
fn two_thousand_calls_with_all_kinds_of_ends_leave_nothing_behind() {
    const CALLS: u64 = 2_000;
    for ring in rings() {
        let router = relaying(ring);
        let workers = [
            ends::Local::worker(ring, serve_by_number()),
            ends::Local::worker(ring, serve_by_number()),
        ];
        let client = ends::Local::client(ring);
        relay_to(&router, &workers);
        let (mut ended, mut begun) = (0, 0);
        let mut whole = 0;
        while ended < CALLS {
            while begun < CALLS && begun < ended + 64 {
                let mut call = ends::call_to(router.address);
                call.path = LISTEN_PATH.into();
                call.body = begun.to_string().into_bytes();
                client.call(begun, call);
                if begun.is_multiple_of(11) {
                    let kill = begun.is_multiple_of(2);
                    client.end_call(begun, kill);
                }
                begun += 1;
            }
            let event = client.event();
            let early = event.call.is_multiple_of(11);
            match event.what {
                What::Finished if !early => {
                    assert!(!event.call.is_multiple_of(5), "{}", event.call);
                    whole += 1;
                }
                What::Failed(ref error) if !early => {
                    let expected = event.call.is_multiple_of(5) || event.call.is_multiple_of(7);
                    assert!(expected, "{}: {error}", event.call);
                }
                What::Refused(ref text) => panic!("{}: {text}", event.call),
                _ => {}
            }
            ended += u64::from(event.what.is_end());
        }
        assert!(whole > CALLS / 2, "{whole}");
        let stats = &router.handle.stats.shard;
        wait_until("the router has nothing left", || {
            [
                &stats.relays,
                &stats.relay_heads,
                &stats.in_flight,
                &stats.chunks,
            ]
            .iter()
            .all(|gauge| gauge.get() == 0)
        });
        for worker in &workers {
            let stats = &worker.handle.stats.shard;
            wait_until("no handler runs", || stats.handling.get() == 0);
        }
        // The caller's, and one to each worker.
        wait_until("only the shared connections are open", || {
            stats.connections.get() <= 3
        });
        assert!(stats.relays_retried.get() > 0, "{}", router.counters());
    }
}
