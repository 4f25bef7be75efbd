//! The outcome tables of spec/request-plane.md §4.3, §4.4, §4.6 and §10.2 as users of the component
//! model see them: a client against a worker made by hand, row by row. The same rows on the level
//! of the engine, and all others, are in `engine/tests/outcomes.rs`.

#[path = "../../engine/tests/common/mod.rs"]
mod common;
mod component_lab;
#[path = "../../engine/tests/common/ends.rs"]
mod ends;

use std::net::Shutdown;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use component_lab::{DEADLINE, options, until, with_runtime};
use corelane::component::{
    Client, Deadlines, DynamoError, Ending, MemoryStore, Reason, Reply, Runtime,
};
use corelane_codec::call_home::{self, KILL, PROLOGUE_OK_FRAME, SENTINEL_FRAME, STOP};
use corelane_codec::control_message::PayloadCodec::Json;
use corelane_codec::item;
use ends::{Called, HandWorker, golden};
use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::timeout;

const ENDPOINT: &str = "production/worker/generate";
const KEY: &str = "v1/instances/production/worker/generate/1";

/// A worker by hand is the only instance; answers its client, which never gives it up.
async fn client_of(runtime: &Runtime, store: &MemoryStore, worker: &HandWorker) -> Client {
    let address = worker.address();
    let value = json!({
        "type": "Endpoint", "namespace": "production", "component": "worker",
        "endpoint": "generate", "instance_id": 1,
        "transport": {"tcp": format!("{address}/1/{ENDPOINT}")},
    });
    store.put(KEY, value.to_string().as_bytes());
    let client = runtime.client(ENDPOINT).unwrap().detect_faults(false);
    client.wait_for_instances(DEADLINE).await.unwrap();
    // No row may owe its outcome to a deadline.
    client.deadlines(Deadlines {
        ack: DEADLINE,
        first_item: DEADLINE,
        total: DEADLINE,
    })
}

/// What a caller has of a call: errors by their reason.
#[derive(Debug, Default, PartialEq)]
struct Outcome {
    items: Vec<Result<Value, Reason>>,
    refused: Option<Reason>,
    ending: Option<Ending>,
}

async fn outcome(called: Result<Reply, DynamoError>) -> Outcome {
    let mut found = Outcome::default();
    let mut reply = match called {
        Ok(reply) => reply,
        Err(error) => {
            found.refused = Some(error.reason());
            return found;
        }
    };
    while let Some(item) = reply.next_item().await {
        let item = item.map(|item| serde_json::from_slice(&item).unwrap());
        found.items.push(item.map_err(|error| error.reason()));
    }
    found.ending = reply.ending();
    found
}

/// Takes one request, acknowledges it, calls home and says `bytes`; `closes` before it waits.
fn respond(worker: HandWorker, bytes: Vec<u8>, closes: bool) -> JoinHandle<(HandWorker, Called)> {
    std::thread::spawn(move || {
        let mut worker = worker;
        let asked = worker.take();
        worker.reply("");
        let mut called = asked.call_home();
        called.say(&bytes);
        if closes {
            // The client may have reset it already.
            let _ = called.stream.shutdown(Shutdown::Write);
        }
        (worker, called)
    })
}

fn prologue(error: &DynamoError) -> Vec<u8> {
    let mut out = Vec::new();
    call_home::write_prologue_error(error.text(), Some(&error.to_json()), &mut out);
    out.extend_from_slice(&SENTINEL_FRAME);
    out
}

fn refused(reason: Reason) -> Outcome {
    Outcome {
        refused: Some(reason),
        ..Outcome::default()
    }
}

fn gave(items: &[Result<i64, Reason>], ending: Ending) -> Outcome {
    let annotated = |item: &Result<i64, Reason>| item.map(|number| json!({"data": number}));
    Outcome {
        items: items.iter().map(annotated).collect(),
        refused: None,
        ending: Some(ending),
    }
}

/// One row: what the worker says after its handshake, whether it closes then, and what becomes of
/// it.
type Row = (&'static str, Vec<u8>, bool, Outcome);

fn hand(name: &str) -> Vec<u8> {
    golden(&format!("hand_worker_{name}"))
}

fn rows_of_prologues() -> Vec<Row> {
    let invalid = DynamoError::new(Reason::BackendInvalidArgument, "prompt too long");
    let other = DynamoError::new(Reason::EngineShutdown, "going down");
    let (cannot, lost) = (Reason::CannotConnect, Reason::Disconnected);
    let rows = [
        ("§4.3 InvalidRequest", prologue(&invalid), invalid.reason()),
        ("§4.3 any other error", prologue(&other), cannot),
        ("§4.3 text alone", hand("prologue_error_text"), cannot),
        ("§4.3 a data frame", hand("prologue_is_data_frame"), cannot),
        ("§4.3 no prologue", hand("prologue_not_json"), cannot),
        ("§4.3 closes before it", Vec::new(), lost),
        ("§4.3 panics", SENTINEL_FRAME.to_vec(), cannot),
    ];
    let row = |(row, bytes, reason): (_, Vec<u8>, _)| {
        let closes = bytes.is_empty();
        (row, bytes, closes, refused(reason))
    };
    rows.into_iter().map(row).collect()
}

fn rows_of_streams() -> Vec<Row> {
    let (one, lost) = (Ok(1), Err(Reason::Disconnected));
    let bad = Err(Reason::Unclassified);
    let (complete, failed) = (Ending::Complete, Ending::Failed);
    let rows: [(_, _, _, &[_], _); 9] = [
        ("final, close", "final_then_close", true, &[one], complete),
        (
            "no final",
            "sentinel_without_final",
            false,
            &[one, lost],
            failed,
        ),
        ("close", "close_before_final", true, &[one, lost], failed),
        (
            "after final",
            "data_after_final",
            false,
            &[one, bad],
            complete,
        ),
        (
            "final with data",
            "final_with_data",
            false,
            &[Ok(9)],
            complete,
        ),
        ("no data", "empty_wrapper", false, &[bad], complete),
        ("not decoded", "bad_payload", false, &[bad], complete),
        (
            "no complete_final",
            "missing_complete_final",
            false,
            &[bad],
            complete,
        ),
        (
            "a caller's word",
            "worker_sends_stop",
            false,
            &[one, lost],
            failed,
        ),
    ];
    let rows = rows.into_iter();
    let mut rows: Vec<Row> = rows
        .map(|(row, name, closes, items, ending)| (row, hand(name), closes, gave(items, ending)))
        .collect();
    let last = [&call_home::FINAL_MARKER_JSON_FRAME[..], &SENTINEL_FRAME].concat();
    let whole = [&say(&[1, 2])[..], &last].concat();
    rows.push((
        "final, sentinel",
        whole,
        false,
        gave(&[one, Ok(2)], complete),
    ));
    rows
}

/// A prologue and these items.
fn say(numbers: &[i64]) -> Vec<u8> {
    let mut out = PROLOGUE_OK_FRAME.to_vec();
    for number in numbers {
        let data = format!("{{\"data\":{number}}}");
        item::write_frame(data.as_bytes(), Json, &mut out);
    }
    out
}

/// §4.3 and §4.4.
#[test]
fn every_row_of_responses() {
    let store = MemoryStore::default();
    with_runtime(options().memory(&store), async |runtime| {
        let mut worker = HandWorker::default();
        let client = client_of(runtime, &store, &worker).await;
        let rows = rows_of_prologues().into_iter().chain(rows_of_streams());
        for (row, bytes, closes, wanted) in rows {
            let thread = respond(worker, bytes, closes);
            let found = outcome(client.call(&7).await).await;
            assert_eq!(found, wanted, "{row}");
            worker = thread.join().unwrap().0;
        }
        let seen = || client.instances().iter().all(|seen| seen.load == 0);
        until("no call is left", seen).await;
    });
}

/// A worker that tells what it hears: `called` once it has called home and said `bytes`, then the
/// words of the caller, until he ends the socket. Before it calls it waits for `go`.
struct Hearing {
    thread: JoinHandle<HandWorker>,
    words: UnboundedReceiver<Vec<u8>>,
    go: Sender<()>,
}

fn hearing(mut worker: HandWorker, bytes: Vec<u8>) -> Hearing {
    let (words, heard) = unbounded_channel();
    let (go, gone) = channel();
    let thread = std::thread::spawn(move || {
        let asked = worker.take();
        worker.reply("");
        words.send(b"asked".to_vec()).unwrap();
        gone.recv_timeout(DEADLINE).unwrap();
        let mut called = asked.call_home();
        called.say(&bytes);
        words.send(b"called".to_vec()).unwrap();
        while let Some((word, _)) = called.message() {
            words.send(word).unwrap();
        }
        worker
    });
    Hearing {
        thread,
        words: heard,
        go,
    }
}

impl Hearing {
    async fn word(&mut self) -> Option<Vec<u8>> {
        timeout(DEADLINE, self.words.recv()).await.unwrap()
    }

    async fn rest(mut self) -> (HandWorker, Vec<Vec<u8>>) {
        let mut words = Vec::new();
        while let Some(word) = self.word().await {
            words.push(word);
        }
        (self.thread.join().unwrap(), words)
    }
}

/// §4.6: what the worker hears of a call that ends in mid-stream, until its socket ends.
#[test]
fn every_row_of_early_ends_in_the_stream() {
    let store = MemoryStore::default();
    with_runtime(options().memory(&store), async |runtime| {
        let mut worker = HandWorker::default();
        let client = client_of(runtime, &store, &worker).await;
        for (row, words) in [
            ("kill", vec![KILL]),
            ("drop", vec![KILL]),
            ("stop, then kill", vec![STOP, KILL]),
        ] {
            let mut hearing = hearing(worker, say(&[1]));
            hearing.go.send(()).unwrap();
            let mut reply = client.call(&7).await.unwrap();
            assert_eq!(reply.next_data::<i64>().await.unwrap().unwrap(), 1, "{row}");
            for word in ["asked", "called"] {
                assert_eq!(hearing.word().await.unwrap(), word.as_bytes());
            }
            let mut heard = Vec::new();
            match row {
                "drop" => drop(reply),
                "kill" => reply.kill(),
                _ => {
                    reply.stop();
                    heard.extend(hearing.word().await);
                    reply.kill();
                }
            }
            let rest;
            (worker, rest) = hearing.rest().await;
            heard.extend(rest);
            assert_eq!(heard, words, "{row}");
        }
    });
}

/// §4.6: the same before the prologue. A worker whose call crosses the end is reset, which says
/// the same as a kill.
#[test]
fn every_row_of_early_ends_before_the_stream() {
    let store = MemoryStore::default();
    with_runtime(options().memory(&store), async |runtime| {
        let mut worker = HandWorker::default();
        let client = client_of(runtime, &store, &worker).await;
        for calls_first in [true, false] {
            let mut hearing = hearing(worker, Vec::new());
            let call = client.call(&7);
            let wait = async {
                assert_eq!(hearing.word().await.unwrap(), b"asked");
                if calls_first {
                    hearing.go.send(()).unwrap();
                    assert_eq!(hearing.word().await.unwrap(), b"called");
                }
            };
            tokio::select! {
                _ = call => panic!("nothing was said"),
                () = wait => {}
            }
            // The call has been dropped.
            if !calls_first {
                let idle = || client.instances().iter().all(|seen| seen.load == 0);
                until("the call is over", idle).await;
                hearing.go.send(()).unwrap();
                assert_eq!(hearing.word().await.unwrap(), b"called");
            }
            let heard;
            (worker, heard) = hearing.rest().await;
            assert!(heard.is_empty() || heard == [KILL], "{heard:?}");
        }
    });
}

/// §10.2: a worker that has acknowledged and falls silent, for whatever reason.
#[test]
fn silence_after_the_acknowledgement_meets_a_deadline() {
    let store = MemoryStore::default();
    with_runtime(options().memory(&store), async |runtime| {
        let worker = HandWorker::default();
        let client = client_of(runtime, &store, &worker).await;
        let hearing = hearing(worker, Vec::new());
        let deadlines = Deadlines {
            ack: DEADLINE,
            first_item: Duration::from_millis(200),
            total: DEADLINE,
        };
        let call = client.request(&7).unwrap().deadlines(deadlines);
        let found = outcome(client.send(call).await).await;
        assert_eq!(found, refused(Reason::ResponseTimeout));
        hearing.go.send(()).unwrap();
        hearing.rest().await;
    });
}

/// §4.3, its last row, and §4.9: the worker does nothing, until its instance leaves discovery.
#[test]
fn a_worker_that_is_gone_is_not_waited_for() {
    let store = MemoryStore::default();
    with_runtime(options().memory(&store), async |runtime| {
        for connection_first in [true, false] {
            let worker = HandWorker::default();
            let client = client_of(runtime, &store, &worker).await;
            let thread = std::thread::spawn(move || {
                let mut worker = worker;
                worker.take();
                worker.reply("");
                worker
            });
            let dies = async {
                while client.instances()[0].load == 0 || !thread.is_finished() {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                let worker = thread.join().unwrap();
                if connection_first {
                    drop(worker);
                    store.delete(KEY);
                } else {
                    store.delete(KEY);
                    until("it has left", || client.instances().is_empty()).await;
                    drop(worker);
                }
            };
            let (called, ()) = tokio::join!(client.call(&7), dies);
            assert_eq!(outcome(called).await, refused(Reason::Disconnected));
            until("clients know", || client.instances().is_empty()).await;
        }
    });
}

/// §10.3: one that leaves discovery to drain still answers.
#[test]
fn a_worker_that_drains_is_waited_for() {
    let store = MemoryStore::default();
    with_runtime(options().memory(&store), async |runtime| {
        let worker = HandWorker::default();
        let client = client_of(runtime, &store, &worker).await;
        let whole = [
            &say(&[1])[..],
            &call_home::FINAL_MARKER_JSON_FRAME,
            &SENTINEL_FRAME,
        ]
        .concat();
        let mut hearing = hearing(worker, whole);
        let leaves = async {
            assert_eq!(hearing.word().await.unwrap(), b"asked");
            store.delete(KEY);
            until("it has left", || client.instances().is_empty()).await;
            hearing.go.send(()).unwrap();
        };
        let (called, ()) = tokio::join!(client.call(&7), leaves);
        assert_eq!(outcome(called).await, gave(&[Ok(1)], Ending::Complete));
        hearing.rest().await;
    });
}
