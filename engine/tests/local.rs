//! Calls that tasks and handlers make on their own shard, on every ring.

mod common;
#[path = "common/ends.rs"]
mod ends;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use common::*;
use corelane_codec::call_home::{self, KILL, STOP};
use corelane_codec::control_message::PayloadCodec::Json;
use corelane_codec::error::{DynamoError, Reason};
use corelane_codec::item;
use corelane_engine::call::{Deadlines, NewCall};
use corelane_engine::ends::Ends;
use corelane_engine::handler::Request;
use corelane_engine::local::{Ending, Reply};
use corelane_engine::responder::{Host, Responder};
use ends::*;

/// All that a reply gave.
#[derive(Debug, PartialEq)]
struct Outcome {
    items: Vec<Result<Vec<u8>, Reason>>,
    ending: Option<Ending>,
}

async fn read(mut reply: Reply) -> Outcome {
    let mut items = Vec::new();
    while let Some(item) = reply.next().await {
        let item = item.map(|item| item.into_bytes());
        items.push(item.map_err(|error| error.reason()));
    }
    assert!(reply.next().await.is_none(), "it has ended");
    Outcome {
        items,
        ending: reply.ending(),
    }
}

/// Makes a call, and gives all of its outcome.
fn call(local: &Local, new: NewCall) -> Receiver<Outcome> {
    run(
        local,
        |host| async move { read(host.caller().call(new)).await },
    )
}

fn items(count: usize, data: &[u8]) -> Outcome {
    Outcome {
        items: vec![Ok(data.to_vec()); count],
        ending: Some(Ending::Complete),
    }
}

fn failed(reason: Reason) -> Outcome {
    Outcome {
        items: vec![Err(reason)],
        ending: Some(Ending::Failed),
    }
}

#[test]
fn one_item_and_a_thousand_come_intact() {
    for ring in rings() {
        let client = Local::client(ring);
        for count in [0, 1, 1_000] {
            let worker = echoing(ring, count as u32);
            let outcome = answered(&call(&client, call_to(worker.address())));
            assert_eq!(outcome, items(count, b"{\"a\":1}"));
        }
        let stats = &client.handle.stats.shard;
        wait_until("all is given back", || {
            stats.calls.get() == 0 && stats.connections.get() <= 6
        });
    }
}

#[test]
fn many_calls_of_one_task_run_at_the_same_time() {
    const CALLS: usize = 300;
    for ring in rings() {
        let (worker, client) = (echoing(ring, 2), Local::client(ring));
        let address = worker.address();
        let done = run(&client, move |host| async move {
            let replies: Vec<Reply> = (0..CALLS)
                .map(|number| {
                    let mut new = call_to(address);
                    new.body = number.to_string().into_bytes();
                    host.caller().call(new)
                })
                .collect();
            let mut outcomes = Vec::new();
            for reply in replies {
                outcomes.push(read(reply).await);
            }
            outcomes
        });
        for (number, outcome) in answered(&done).into_iter().enumerate() {
            assert_eq!(outcome, items(2, number.to_string().as_bytes()));
        }
    }
}

#[test]
fn a_handler_passes_on_what_another_worker_answers() {
    for ring in rings() {
        let last = echoing(ring, 3);
        let address = last.address();
        let nobody = HandWorker::default().address();
        let middle = move |host: &Host| {
            let caller = host.caller();
            let serve = move |request: Request, mut responder: Responder| {
                let there = request.body() != b"0";
                let mut new = call_to(if there { address } else { nobody });
                new.body = request.body().to_vec();
                let mut reply = caller.call(new);
                async move {
                    if let Err(error) = reply.begun().await {
                        return responder.fail(&error);
                    }
                    while let Some(Ok(item)) = reply.next().await {
                        if responder.item(&item).await.is_err() {
                            return;
                        }
                    }
                    responder.finish();
                }
            };
            std::rc::Rc::new(serve) as std::rc::Rc<dyn corelane_engine::handler::Handler>
        };
        let ends = Ends {
            home: Some(home()),
            calls_max: 64,
            ..Ends::worker(vec![Box::new(middle)])
        };
        let middle = Local::serving(ring, ends);
        let mut frontend = Frontend::of(&middle);
        let answered = frontend.call(Json, b"[7]");
        assert_eq!(answered, vec![b"[7]".to_vec(); 3]);
        // Nobody is behind it: the reason comes through.
        frontend.send("subject-2", Json, b"0");
        let mut called = frontend.called();
        assert_eq!(called.handshake(), "subject-2");
        let prologue = called.error_prologue();
        assert!(prologue.contains("transport.cannot_connect"), "{prologue}");
    }
}

#[test]
fn refusals_and_failures_are_errors_with_a_reason() {
    for ring in rings() {
        let client = Local::client(ring);
        let mut worker = HandWorker::default();
        let (refused, broken) = (Some(Ending::Refused), Some(Ending::Failed));
        for (text, reason, ending) in [
            ("Server overloaded: full", Reason::WorkerOverloaded, refused),
            (
                "Server unavailable: gone",
                Reason::WorkerUnavailable,
                refused,
            ),
            ("what?", Reason::BackendProtocol, broken),
        ] {
            let outcome = call(&client, call_to(worker.address()));
            worker.take();
            worker.reply(text);
            let told = Outcome {
                ending,
                ..failed(reason)
            };
            assert_eq!(answered(&outcome), told, "{text}");
        }
        // An item that cannot be understood is one error among the items.
        let outcome = call(&client, call_to(worker.address()));
        let mut called = worker.take().call_home();
        let mut out = call_home::PROLOGUE_OK_FRAME.to_vec();
        item::write_frame(b"1", Json, &mut out);
        corelane_codec::two_part::write(b"", b"{", &mut out);
        item::write_frame(b"2", Json, &mut out);
        out.extend_from_slice(&call_home::FINAL_MARKER_JSON_FRAME);
        out.extend_from_slice(&call_home::SENTINEL_FRAME);
        called.say(&out);
        let outcome = answered(&outcome);
        assert_eq!(outcome.items.len(), 3);
        assert!(outcome.items[1].is_err() && outcome.items[2] == Ok(b"2".to_vec()));
        assert_eq!(outcome.ending, Some(Ending::Complete));
        // A refusal in the prologue comes out of `begun`.
        let address = worker.address();
        let begun = run(&client, move |host| async move {
            let mut reply = host.caller().call(call_to(address));
            let begun = reply.begun().await.map_err(|error| error.reason());
            (begun, reply.next().await.is_none(), reply.ending())
        });
        let error = DynamoError::invalid_argument("too long");
        let mut out = Vec::new();
        call_home::write_prologue_error("too long", Some(&error.to_json()), &mut out);
        worker.take().call_home().say(&out);
        let begun = answered(&begun);
        let expected = Err(Reason::InvalidArgument);
        assert_eq!(begun, (expected, true, Some(Ending::Failed)));
    }
}

#[test]
fn calls_beyond_the_places_for_them_fail_at_once() {
    for ring in rings() {
        let worker = HandWorker::default();
        let address = worker.address();
        let client = Local::start(ring, Ends::client(home(), 2));
        let outcome = run(&client, move |host| async move {
            let caller = host.caller();
            let held = [(); 2].map(|()| caller.call(call_to(address)));
            let third = read(caller.call(call_to(address))).await;
            drop(held);
            third
        });
        assert_eq!(answered(&outcome), failed(Reason::PoolExhausted));
        let worker = echoing(ring, 1);
        let outcome = call(&worker, call_to(address));
        assert_eq!(answered(&outcome), failed(Reason::InvalidArgument));
    }
}

#[test]
fn every_wait_has_its_deadline() {
    for ring in rings() {
        let client = Local::client(ring);
        let mut worker = HandWorker::default();
        let mut new = call_to(worker.address());
        new.deadlines.ack = Duration::from_millis(100);
        let outcome = answered(&call(&client, new));
        assert_eq!(outcome, failed(Reason::ConnectionTimeout));
        worker.take();
        worker.reply("");
        // A reader who takes nothing does not keep a call for ever either.
        let mut new = call_to(worker.address());
        new.deadlines = Deadlines {
            total: Duration::from_millis(300),
            ..Deadlines::default()
        };
        let over = run(&client, move |host| async move {
            let reply = host.caller().call(new);
            while reply.ending().is_none() {
                host.sleep(Duration::from_millis(1)).await;
            }
            reply.ending()
        });
        let mut called = worker.take().call_home();
        called.say(&call_home::PROLOGUE_OK_FRAME);
        assert_eq!(answered(&over), Some(Ending::Failed));
        assert_eq!(
            called.message().map(|(header, _)| header),
            Some(KILL.into())
        );
    }
}

#[test]
fn stop_takes_the_rest_and_kill_or_a_drop_does_not() {
    for ring in rings() {
        let client = Local::client(ring);
        let mut worker = HandWorker::default();
        let stats = &client.handle.stats.shard;
        for how in ["stop", "kill", "drop"] {
            let address = worker.address();
            let outcome = run(&client, move |host| async move {
                let mut reply = host.caller().call(call_to(address));
                reply.begun().await.unwrap();
                let first = reply.next().await.unwrap().unwrap();
                assert_eq!(&first[..], b"1");
                match how {
                    "stop" => reply.stop(),
                    "kill" => reply.kill(),
                    _ => return None,
                }
                Some(read(reply).await)
            });
            let mut called = worker.take().call_home();
            worker.reply("");
            let mut out = call_home::PROLOGUE_OK_FRAME.to_vec();
            item::write_frame(b"1", Json, &mut out);
            called.say(&out);
            let word = if how == "stop" { STOP } else { KILL };
            assert_eq!(called.message().unwrap().0, word, "{how}");
            let mut last = Vec::new();
            item::write_frame(b"2", Json, &mut last);
            if how == "stop" {
                called.say(&last);
                drop(called);
            } else {
                assert_eq!(called.message(), None);
            }
            let items = if how == "stop" {
                vec![Ok(b"2".to_vec())]
            } else {
                vec![]
            };
            let ending = Some(Ending::Stopped);
            let expected = (how != "drop").then_some(Outcome { items, ending });
            assert_eq!(answered(&outcome), expected, "{how}");
        }
        // Killed before the worker has called home: he is told when he does.
        let address = worker.address();
        let outcome = run(&client, move |host| async move {
            let mut reply = host.caller().call(call_to(address));
            host.sleep(Duration::from_millis(20)).await;
            reply.kill();
            (reply.begun().await.is_ok(), read(reply).await)
        });
        let asked = worker.take();
        worker.reply("");
        let (begun, outcome) = answered(&outcome);
        assert!(begun && outcome.items.is_empty());
        let mut called = asked.call_home();
        assert_eq!(called.message().unwrap().0, KILL);
        // Killed before it left the shard: the worker hears nothing of it.
        let outcome = run(&client, move |host| async move {
            let reply = host.caller().call(call_to(address));
            reply.kill();
            read(reply).await
        });
        assert_eq!(answered(&outcome).ending, Some(Ending::Stopped));
        wait_until("all is given back", || stats.calls.get() == 0);
    }
}

#[test]
fn a_reader_who_does_not_read_holds_the_worker_back() {
    const ITEMS: usize = 50_000;
    for ring in rings() {
        let (mut worker, client) = (HandWorker::default(), Local::client(ring));
        let address = worker.address();
        let go = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&go);
        let count = run(&client, move |host| async move {
            let mut reply = host.caller().call(call_to(address));
            while !told.load(Ordering::Relaxed) {
                host.sleep(Duration::from_millis(1)).await;
            }
            let mut count = 0;
            while let Some(item) = reply.next().await {
                let item = item.unwrap();
                assert_eq!(item[..], *format!("\"{count:>400}\"").as_bytes());
                count += 1;
            }
            assert_eq!(reply.ending(), Some(Ending::Complete));
            count
        });
        let mut called = worker.take().call_home();
        worker.reply("");
        let writer = std::thread::spawn(move || {
            let mut batch = call_home::PROLOGUE_OK_FRAME.to_vec();
            for number in 0..ITEMS {
                let data = format!("\"{number:>400}\"");
                item::write_frame(data.as_bytes(), Json, &mut batch);
                if batch.len() > 100_000 {
                    called.say(&batch);
                    batch.clear();
                }
            }
            batch.extend_from_slice(&call_home::FINAL_MARKER_JSON_FRAME);
            batch.extend_from_slice(&call_home::SENTINEL_FRAME);
            called.say(&batch);
            called.message()
        });
        let stats = &client.handle.stats.shard;
        wait_until("it does not read on", || stats.receives_paused.get() >= 1);
        let mut held = u64::MAX;
        wait_until("it holds no more", || {
            let now = stats.buffers_held.get();
            std::thread::sleep(Duration::from_millis(20));
            std::mem::replace(&mut held, now) == now
        });
        assert!(held < 300, "{held} buffers of 16 KiB are held");
        assert!(!writer.is_finished());
        go.store(true, Ordering::Relaxed);
        assert_eq!(answered(&count), ITEMS);
        writer.join().unwrap();
    }
}

#[test]
fn a_task_that_panics_ends_alone() {
    for ring in rings() {
        let (worker, client) = (echoing(ring, 1), Local::client(ring));
        let stats = &client.handle.stats.shard;
        let address = worker.address();
        let gone = run(&client, move |host| async move {
            let _reply = host.caller().call(call_to(address));
            host.sleep(Duration::from_millis(1)).await;
            std::panic::resume_unwind(Box::new("on purpose"));
            #[allow(unreachable_code)]
            ()
        });
        assert!(gone.recv_timeout(DEADLINE).is_err(), "it has panicked");
        let nested = run(&client, |host| async move {
            let (sender, receiver) = channel();
            let inner = host.clone();
            assert!(host.spawn(async move {
                inner.sleep(Duration::from_millis(1)).await;
                sender.send(7).unwrap();
            }));
            loop {
                match receiver.try_recv() {
                    Ok(number) => return number,
                    Err(_) => host.sleep(Duration::from_millis(1)).await,
                }
            }
        });
        assert_eq!(answered(&nested), 7);
        let outcome = answered(&call(&client, call_to(address)));
        assert_eq!(outcome, items(1, b"{\"a\":1}"));
        wait_until("all is given back", || stats.calls.get() == 0);
    }
}
