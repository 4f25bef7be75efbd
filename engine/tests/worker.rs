//! A shard that answers requests itself, against a hand-made frontend, on every ring.

mod common;
#[path = "common/ends.rs"]
mod ends;

use std::io::Read;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::*;
use corelane_codec::call_home::{KILL_FRAME, SENTINEL_FRAME, STOP_FRAME};
use corelane_codec::control_message::PayloadCodec::{self, Json, MessagePack};
use corelane_codec::error::DynamoError;
use corelane_codec::two_part;
use corelane_engine::ends::Ends;
use corelane_engine::handler::{Handler, MakeHandler, Request};
use corelane_engine::responder::{Gone, Host, Responder};
use corelane_engine::shard::{Command, Report};
use ends::*;

/// Sends the request's value back `items` times.
async fn echo(request: Request, mut responder: Responder, items: u32) {
    let value = match request.value() {
        Ok(value) => value,
        Err(error) => {
            return responder.fail(&DynamoError::invalid_argument(error.to_string()));
        }
    };
    for _ in 0..items {
        if responder.annotated(value).await.is_err() {
            return;
        }
    }
    responder.finish();
}

fn echoing(ring: corelane_engine::config::RingKind, items: u32) -> Local {
    Local::worker(
        ring,
        handler(move |request, responder| echo(request, responder, items)),
    )
}

fn bodies() -> [(PayloadCodec, Vec<u8>, Vec<u8>); 2] {
    let json = br#"{"text":"gr\u00fc\u00dfe","n":[1,2.5,null]}"#.to_vec();
    let packed = b"\x82\xa4text\xa3abc\xa1n\x93\x01\x02\xc0".to_vec();
    let annotated_json = [&b"{\"data\":"[..], &json, b"}"].concat();
    let annotated_packed = [&b"\x81\xa4data"[..], &packed].concat();
    [
        (Json, json, annotated_json),
        (MessagePack, packed, annotated_packed),
    ]
}

#[test]
fn one_item_and_a_hundred_come_back_intact_in_both_codecs() {
    for ring in rings() {
        for items in [0, 1, 100] {
            let worker = echoing(ring, items);
            let mut frontend = Frontend::of(&worker);
            for (codec, body, annotated) in bodies() {
                let got = frontend.call(codec, &body);
                assert_eq!(got, vec![annotated; items as usize]);
            }
            let stats = &worker.handle.stats.shard;
            wait_until("all is given back", || {
                stats.handling.get() == 0 && stats.responses.get() == 0
            });
            assert_eq!(stats.handled.get(), 2);
        }
    }
}

#[test]
fn a_short_answer_is_one_send() {
    for ring in rings() {
        let worker = echoing(ring, 1);
        let mut frontend = Frontend::of(&worker);
        frontend.send("s", Json, b"1");
        let mut called = frontend.called();
        // All five messages are there at the first read.
        let mut chunk = [0; 4096];
        let read = called.stream.read(&mut chunk).unwrap();
        assert!(chunk[..read].ends_with(&SENTINEL_FRAME), "{read} bytes");
    }
}

#[test]
fn large_bodies_and_frames_in_pieces_arrive_whole() {
    for ring in rings() {
        let worker = echoing(ring, 2);
        for bytes in [60_000, 66_000, 300_000, 5 << 20] {
            let mut frontend = Frontend::of(&worker);
            let body = [&b"\""[..], &vec![b'x'; bytes], b"\""].concat();
            let annotated = [&b"{\"data\":"[..], &body, b"}"].concat();
            assert!(frontend.call(Json, &body) == vec![annotated; 2], "{bytes}");
        }
        let mut frontend = Frontend::of(&worker);
        let whole = frontend.frame("subject-1", Json, b"7");
        for cut in (1..whole.len()).step_by(7) {
            frontend.caller.send(&whole[..cut]);
            std::thread::sleep(Duration::from_micros(200));
            frontend.caller.send(&whole[cut..]);
            assert_eq!(frontend.caller.reply(), "");
            let mut called = frontend.called();
            called.handshake();
            called.prologue_ok();
            assert_eq!(called.items_to_the_end(Json).len(), 2);
        }
        let stats = &worker.handle.stats.shard;
        wait_until("all buffers are free", || stats.buffers_held.get() == 0);
    }
}

/// spec/request-plane.md §10.2, all rows of a unary endpoint; where Dynamo's worker falls silent.
#[test]
fn what_the_worker_cannot_read_is_told_by_an_error_prologue() {
    for ring in rings() {
        let worker = echoing(ring, 1);
        let mut frontend = Frontend::of(&worker);
        frontend.send("s", Json, b"{not json");
        let mut called = frontend.called();
        assert_eq!(called.handshake(), "s");
        let text = called.error_prologue();
        let typed = text.contains("request.invalid_argument");
        assert!(typed && text.contains("not json"), "{text}");

        let address = frontend.listener.local_addr().unwrap().to_string();
        let good = envelope_in(&address, "s", Json, b"1");
        let swap = |from: &str, to: &str| {
            let text = String::from_utf8_lossy(&good[24..good.len() - 1]).replace(from, to);
            let mut envelope = Vec::new();
            two_part::write(text.as_bytes(), b"1", &mut envelope);
            envelope
        };
        let undecodable = [
            ("unknown payload_codec", swap("\"json\"", "\"cbor\"")),
            (
                "context is not id",
                swap("\"id\":\"id-1\"", "\"id\":\"id-2\""),
            ),
            ("a stream where none is taken", swap("single_in", "many_in")),
            (
                "wrong stream_type",
                swap("\\\"response\\\"", "\\\"request\\\""),
            ),
            (
                "body missing on a unary endpoint",
                envelope_in(&address, "s", Json, b""),
            ),
        ];
        for (row, envelope) in undecodable {
            frontend.caller.send(&frame(SERVED, &envelope));
            assert_eq!(frontend.caller.reply(), "");
            let mut called = frontend.called();
            assert_eq!(called.handshake(), "s");
            let text = called.error_prologue();
            let told = text.contains("the request cannot be decoded: ");
            assert!(told, "{row}: {text}");
        }
        // Nobody can be told of these; they are counted, and the connection lives.
        let stats = &worker.handle.stats.shard;
        let before = (stats.undecodable.get(), stats.callers_untold.get());
        let mut bad_control = Vec::new();
        two_part::write(b"{\"id\":", b"1", &mut bad_control);
        let rows = [
            &b""[..],
            b"no two-part message",
            &bad_control,
            &swap("tcp_server", "unknown transport"),
        ];
        for payload in rows {
            frontend.caller.send(&frame(SERVED, payload));
            assert_eq!(frontend.caller.reply(), "");
        }
        wait_until("they are counted", || {
            (stats.undecodable.get(), stats.callers_untold.get()) == (before.0 + 4, before.1 + 4)
        });
        let told = std::iter::from_fn(|| worker.handle.reports.next());
        let mut told = told.filter(|report| matches!(report, Report::Undecodable { .. }));
        assert!(told.next().is_some());
        frontend.send("s", Json, b"1");
        frontend.called();
    }
}

/// Items until somebody stops it; counts how it ended.
async fn endless(mut responder: Responder, written: Arc<AtomicU64>, ended: Arc<AtomicU32>) {
    while responder.item(b"1").await == Ok(()) {
        written.fetch_add(1, Ordering::Relaxed);
        if responder.sleep(Duration::from_millis(1)).await == Err(Gone) {
            break;
        }
    }
    assert!(responder.is_stopped());
    ended.fetch_add(
        if responder.is_killed() { 100 } else { 1 },
        Ordering::Relaxed,
    );
}

/// spec/request-plane.md §4.6, the worker's side.
#[test]
fn what_the_frontend_says_is_obeyed() {
    let golden_cases = [
        ("hand_control_stop", 1),
        ("hand_control_kill", 100),
        ("hand_control_sentinel", 100),
        ("hand_control_data_frame", 100),
        ("hand_control_bad_control", 100),
    ];
    for ring in rings() {
        let (written, ended) = (Arc::<AtomicU64>::default(), Arc::<AtomicU32>::default());
        let shared = (Arc::clone(&written), Arc::clone(&ended));
        let worker = Local::worker(
            ring,
            handler(move |_, responder| endless(responder, shared.0.clone(), shared.1.clone())),
        );
        let mut frontend = Frontend::of(&worker);
        for (name, how) in golden_cases {
            ended.store(0, Ordering::Relaxed);
            frontend.send("s", Json, b"1");
            let mut called = frontend.called();
            called.handshake();
            called.prologue_ok();
            assert!(called.item(Json).is_some());
            called.say(&golden(name));
            // Whole items may be under way; after them the socket ends, without a final marker.
            let mut after = 0;
            while let Some((header, body)) = called.message() {
                assert_eq!(header, b"");
                assert_eq!(body, br#"{"data":1,"complete_final":false}"#);
                after += 1;
            }
            assert!(after < 200, "{name}: {after} items after it");
            wait_until("the handler ended", || ended.load(Ordering::Relaxed) == how);
        }
        // A reset kills; an end of stream alone does nothing.
        ended.store(0, Ordering::Relaxed);
        frontend.send("s", Json, b"1");
        let mut called = frontend.called();
        called.stream.shutdown(std::net::Shutdown::Write).unwrap();
        called.handshake();
        called.prologue_ok();
        for _ in 0..20 {
            assert!(called.item(Json).is_some());
        }
        assert_eq!(ended.load(Ordering::Relaxed), 0);
        drop(called);
        wait_until("the reset kills", || ended.load(Ordering::Relaxed) == 100);
        let stats = &worker.handle.stats.shard;
        wait_until("all is given back", || {
            stats.handling.get() == 0 && stats.responses.get() == 0 && stats.timers.get() < 8
        });
    }
}

#[test]
fn a_frontend_that_does_not_read_holds_its_handler_back() {
    for ring in rings() {
        let (written, ended) = (Arc::<AtomicU64>::default(), Arc::<AtomicU32>::default());
        let count = Arc::clone(&written);
        let over = Arc::clone(&ended);
        let worker = Local::worker(
            ring,
            handler(move |_, mut responder: Responder| {
                let (count, over) = (Arc::clone(&count), Arc::clone(&over));
                async move {
                    let data = [&b"\""[..], &[b'x'; 9_998], b"\""].concat();
                    for _ in 0..2_000 {
                        if responder.item(&data).await.is_err() {
                            return;
                        }
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                    responder.finish();
                    over.fetch_add(1, Ordering::Relaxed);
                }
            }),
        );
        let mut frontend = Frontend::of(&worker);
        frontend.send("s", Json, b"1");
        let mut called = frontend.called();
        called.handshake();
        called.prologue_ok();
        // 20 MB are to come; what sockets take is a few, what we keep is a quarter.
        let mut seen = u64::MAX;
        wait_until("it waits", || {
            let now = written.load(Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(50));
            std::mem::replace(&mut seen, now) == now
        });
        assert!(seen < 1_500, "{seen} items of 10 kB were written to nobody");
        assert_eq!(ended.load(Ordering::Relaxed), 0);
        // Others are served meanwhile.
        let mut other = Frontend::of(&worker);
        other.send("t", Json, b"1");
        assert_eq!(other.called().handshake(), "t");
        assert_eq!(called.items_to_the_end(Json).len(), 2_000);
    }
}

#[test]
fn a_panic_becomes_an_error_and_frees_the_slot() {
    for ring in rings() {
        let ends = Ends {
            running_max: 1,
            queue_max: 1,
            ..Ends::worker(vec![handler(
                |request, mut responder: Responder| async move {
                    if request.body() == b"2" {
                        responder.annotated(b"1").await.unwrap();
                    }
                    panic!("on purpose");
                },
            )])
        };
        let worker = Local::serving(ring, ends);
        let mut frontend = Frontend::of(&worker);
        for _ in 0..3 {
            frontend.send("s", Json, b"1");
            let mut called = frontend.called();
            called.handshake();
            let text = called.error_prologue();
            assert!(
                text.contains("panicked") && text.contains("backend.unknown"),
                "{text}"
            );

            frontend.send("s", Json, b"2");
            let mut called = frontend.called();
            called.handshake();
            called.prologue_ok();
            let items = called.items_to_the_end(Json);
            assert_eq!(items[0], br#"{"data":1}"#);
            assert!(String::from_utf8_lossy(&items[1]).contains(r#"{"event":"error","error":"#));
        }
        let stats = &worker.handle.stats.shard;
        wait_until("nothing is left", || stats.handling.get() == 0);
    }
}

#[test]
fn a_responder_that_is_dropped_cuts_the_response_off() {
    for ring in rings() {
        let worker = Local::worker(
            ring,
            handler(|_, mut responder: Responder| async move {
                responder.annotated(b"1").await.unwrap();
                responder.annotated(b"2").await.unwrap();
            }),
        );
        let mut frontend = Frontend::of(&worker);
        frontend.send("s", Json, b"1");
        let mut called = frontend.called();
        called.handshake();
        called.prologue_ok();
        assert!(called.item(Json).is_some() && called.item(Json).is_some());
        assert_eq!(called.message(), None);
    }
}

#[test]
fn more_than_slots_and_queue_is_refused_and_waiting_requests_run_later() {
    for ring in rings() {
        let open = Arc::<AtomicU32>::default();
        let gate = Arc::clone(&open);
        let ends = Ends {
            running_max: 2,
            queue_max: 3,
            ..Ends::worker(vec![handler(move |_, mut responder: Responder| {
                let gate = Arc::clone(&gate);
                async move {
                    while gate.load(Ordering::Relaxed) == 0 {
                        responder.sleep(Duration::from_millis(2)).await.unwrap();
                    }
                    responder.annotated(b"1").await.unwrap();
                    responder.finish();
                }
            })])
        };
        let worker = Local::serving(ring, ends);
        let mut frontend = Frontend::of(&worker);
        for _ in 0..5 {
            frontend.send("s", Json, b"1");
        }
        let over = frontend.frame("s", Json, b"1");
        for _ in 0..3 {
            frontend.caller.send(&over);
            assert_eq!(
                frontend.caller.reply(),
                "Server overloaded: worker at capacity"
            );
        }
        let stats = &worker.handle.stats.shard;
        assert_eq!(
            (stats.handling.get(), stats.refused_overloaded.get()),
            (5, 3)
        );
        open.store(1, Ordering::Relaxed);
        for _ in 0..5 {
            let mut called = frontend.called();
            called.handshake();
            called.prologue_ok();
            assert_eq!(called.items_to_the_end(Json).len(), 1);
        }
        wait_until("all have run", || stats.handling.get() == 0);
        frontend.send("s", Json, b"1");
    }
}

#[test]
fn draining_refuses_new_requests_and_finishes_the_others() {
    for ring in rings() {
        let worker = Local::worker(
            ring,
            handler(|_, mut responder: Responder| async move {
                for _ in 0..20 {
                    responder.annotated(b"1").await.unwrap();
                    responder.sleep(Duration::from_millis(5)).await.unwrap();
                }
                responder.finish();
            }),
        );
        let mut frontend = Frontend::of(&worker);
        frontend.send("s", Json, b"1");
        let mut called = frontend.called();
        called.handshake();
        worker.handle.command(Command::Drain).unwrap();
        let frame = frontend.frame("s", Json, b"1");
        wait_until("it refuses", || {
            frontend.caller.send(&frame);
            let reply = frontend.caller.reply();
            if reply.is_empty() {
                frontend.called();
            }
            reply == format!("Server unavailable: unknown endpoint {SERVED}")
        });
        called.prologue_ok();
        assert_eq!(called.items_to_the_end(Json).len(), 20);
    }
}

/// §4.6: stop and kill before the first item, said when the worker has called.
#[test]
fn what_is_said_before_the_prologue_ends_the_handler_too() {
    for ring in rings() {
        let ended = Arc::<AtomicU32>::default();
        let count = Arc::clone(&ended);
        let worker = Local::worker(
            ring,
            handler(move |_, mut responder: Responder| {
                let count = Arc::clone(&count);
                async move {
                    responder.stopped().await;
                    let weight = if responder.is_killed() { 100 } else { 1 };
                    count.fetch_add(weight, Ordering::Relaxed);
                    // Too late: none of it leaves.
                    assert_eq!(responder.item(b"1").await, Err(Gone));
                }
            }),
        );
        let mut frontend = Frontend::of(&worker);
        for (word, weight) in [(&STOP_FRAME, 1), (&KILL_FRAME, 100)] {
            ended.store(0, Ordering::Relaxed);
            frontend.send("s", Json, b"1");
            let mut called = frontend.called();
            called.handshake();
            called.say(word);
            // No prologue, no final marker, no sentinel.
            assert_eq!(called.message(), None);
            wait_until("the handler ended", || {
                ended.load(Ordering::Relaxed) == weight
            });
        }
        // Nobody waits: the handshake is answered by a reset, which kills.
        ended.store(0, Ordering::Relaxed);
        frontend.send("s", Json, b"1");
        reset(frontend.called());
        wait_until("a reset kills", || ended.load(Ordering::Relaxed) == 100);
        let stats = &worker.handle.stats.shard;
        wait_until("nothing is left", || stats.handling.get() == 0);
    }
}

fn reset(called: Called) {
    let socket = socket2::SockRef::from(&called.stream);
    socket.set_linger(Some(Duration::ZERO)).unwrap();
}

/// §4.6: an engine that ignores its context keeps its slot while it yields nothing, and is ended at
/// its next item, of which nothing leaves.
#[test]
fn a_handler_that_does_not_listen_is_ended_at_its_next_item() {
    for ring in rings() {
        let open = Arc::<AtomicU32>::default();
        let gate = Arc::clone(&open);
        let make: MakeHandler = Box::new(move |host: &Host| {
            let host = host.clone();
            Rc::new(move |_: Request, mut responder: Responder| {
                let (host, gate) = (host.clone(), Arc::clone(&gate));
                async move {
                    responder.item(b"1").await.unwrap();
                    while gate.load(Ordering::Relaxed) == 0 {
                        host.sleep(Duration::from_millis(1)).await;
                    }
                    assert_eq!(responder.item(b"2").await, Err(Gone));
                }
            }) as Rc<dyn Handler>
        });
        let worker = Local::worker(ring, make);
        let stats = &worker.handle.stats.shard;
        for word in [&STOP_FRAME, &KILL_FRAME] {
            open.store(0, Ordering::Relaxed);
            let mut frontend = Frontend::of(&worker);
            frontend.send("s", Json, b"1");
            let mut called = frontend.called();
            called.handshake();
            called.prologue_ok();
            assert_eq!(called.item(Json).unwrap(), b"1");
            called.say(word);
            assert_eq!(called.message(), None);
            assert_eq!(stats.handling.get(), 1, "it keeps its slot");
            open.store(1, Ordering::Relaxed);
            wait_until("its slot is free", || stats.handling.get() == 0);
        }
    }
}

/// spec/request-plane.md §10.2: the call home is refused.
#[test]
fn a_caller_who_cannot_be_reached_costs_his_own_request_only() {
    for ring in rings() {
        let worker = echoing(ring, 1);
        let mut frontend = Frontend::of(&worker);
        // Nobody listens there any more.
        let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = gone.local_addr().unwrap().to_string();
        drop(gone);
        frontend
            .caller
            .send(&frame(SERVED, &envelope_in(&address, "s", Json, b"1")));
        assert_eq!(frontend.caller.reply(), "");
        let stats = &worker.handle.stats.shard;
        wait_until("the dial fails", || stats.responses_unreachable.get() == 1);
        wait_until("the slot is free", || stats.handling.get() == 0);
        assert_eq!(frontend.call(Json, b"1").len(), 1);
    }
}

#[test]
fn pauses_of_handlers_are_as_long_as_they_are_asked_to_be() {
    for ring in rings() {
        let worker = Local::worker(
            ring,
            handler(|_, mut responder: Responder| async move {
                for _ in 0..20 {
                    responder.sleep(Duration::from_micros(500)).await.unwrap();
                    responder.annotated(b"1").await.unwrap();
                }
                responder.finish();
            }),
        );
        let mut frontend = Frontend::of(&worker);
        let began = Instant::now();
        assert_eq!(frontend.call(Json, b"1").len(), 20);
        let took = began.elapsed();
        assert!(took >= Duration::from_millis(10), "{took:?}");
    }
}

#[test]
fn an_error_before_the_first_item_is_a_prologue_and_later_an_item() {
    for ring in rings() {
        let worker = Local::worker(
            ring,
            handler(|request: Request, mut responder: Responder| async move {
                if request.body() == b"2" {
                    responder.annotated(b"1").await.unwrap();
                }
                responder.fail(&DynamoError::rate_limited("slow down"));
            }),
        );
        let mut frontend = Frontend::of(&worker);
        frontend.send("s", Json, b"1");
        let mut called = frontend.called();
        called.handshake();
        assert!(called.error_prologue().contains("request.rate_limited"));
        for codec in [Json, MessagePack] {
            let items = frontend.call(codec, b"2");
            let text = String::from_utf8_lossy(&items[1]);
            assert!(
                text.contains("request.rate_limited") && text.contains("event"),
                "{text}"
            );
        }
    }
}
