//! Calls whose request is a stream (spec/request-plane.md §5), on every ring: our ends with each
//! other, and each with a hand-made peer.

mod common;
#[path = "common/ends.rs"]
mod ends;

use std::net::Shutdown;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::time::Duration;

use common::*;
use corelane_codec::call_home::{self, KILL, KILL_FRAME, SENTINEL, SENTINEL_FRAME, STOP_FRAME};
use corelane_codec::control_message::PayloadCodec::{self, Json};
use corelane_codec::control_message::{NewControlMessage, RequestType, StreamType, TcpConnection};
use corelane_codec::{item, two_part};
use corelane_engine::feed::Feed;
use corelane_engine::handler::{Handler, MakeHandler, ManyIn, Request};
use corelane_engine::local::{Ending, Reply};
use corelane_engine::responder::{Gone, Responder};
use ends::*;

/// Answers each item of the input with the same.
fn echo() -> MakeHandler {
    let serve = |_: Request, mut responder: Responder| async move {
        let mut input = responder.take_input().expect("a stream");
        assert!(responder.take_input().is_none());
        while let Some(item) = input.next().await {
            if responder.item(&item).await.is_err() {
                return;
            }
        }
        if input.is_complete() {
            responder.finish();
        }
    };
    Box::new(move |_| Rc::new(ManyIn(serve)) as Rc<dyn Handler>)
}

async fn read(mut reply: Reply) -> (Vec<Vec<u8>>, Option<Ending>) {
    let mut items = Vec::new();
    while let Some(item) = reply.next().await {
        if let Ok(item) = item {
            items.push(item.into_bytes());
        }
    }
    (items, reply.ending())
}

#[test]
fn all_that_is_written_comes_back() {
    for ring in rings() {
        let (worker, client) = (Local::worker(ring, echo()), Local::client(ring));
        for (count, bytes) in [(0, 0), (1, 1), (100, 10), (500, 20_000), (3, 700_000)] {
            let address = worker.address();
            let item = format!("\"{}\"", "x".repeat(bytes)).into_bytes();
            let expected = vec![item.clone(); count];
            let outcome = run(&client, move |host| async move {
                let (mut feed, reply) = host.caller().call_many(call_to(address));
                host.spawn(async move {
                    for _ in 0..count {
                        feed.item(&item).await.unwrap();
                    }
                    feed.finish();
                });
                read(reply).await
            });
            let (items, ending) = answered(&outcome);
            assert!(items == expected, "{count} of {bytes}: {}", items.len());
            assert_eq!(ending, Some(Ending::Complete));
        }
        let (ours, theirs) = (&client.handle.stats.shard, &worker.handle.stats.shard);
        // One connection for requests, and one for all responses and request streams.
        wait_until("all is given back", || {
            ours.calls.get() == 0 && theirs.handling.get() == 0 && ours.connections.get() == 2
        });
    }
}

#[test]
fn many_request_streams_share_a_connection_and_none_holds_up_another() {
    const CALLS: usize = 50;
    for ring in rings() {
        let (worker, client) = (Local::worker(ring, echo()), Local::client(ring));
        let address = worker.address();
        // Its writer waits for credit all the time: the handler's items are not read.
        let stuck = run(&client, move |host| async move {
            let (mut feed, reply) = host.caller().call_many(call_to(address));
            let (item, writer) = (vec![b'1'; 20_000], host.clone());
            writer.spawn(async move { while feed.item(&item).await.is_ok() {} });
            let alive = host.clone();
            host.spawn(async move {
                alive.sleep(DEADLINE).await;
                drop(reply);
            })
        });
        assert!(answered(&stuck));
        let outcome = run(&client, move |host| async move {
            let mut replies = Vec::new();
            for number in 0..CALLS {
                let (mut feed, reply) = host.caller().call_many(call_to(address));
                replies.push(reply);
                host.spawn(async move {
                    for _ in 0..20 {
                        feed.item(number.to_string().as_bytes()).await.unwrap();
                    }
                    feed.finish();
                });
            }
            let mut all = Vec::new();
            for reply in replies {
                all.push(read(reply).await);
            }
            all
        });
        for (number, (items, ending)) in answered(&outcome).into_iter().enumerate() {
            assert_eq!(items, vec![number.to_string().into_bytes(); 20]);
            assert_eq!(ending, Some(Ending::Complete));
        }
        let stats = &client.handle.stats.shard;
        assert_eq!(stats.mux_received.get(), CALLS as u64 + 1);
        wait_until("one is left", || stats.calls.get() == 1);
        assert_eq!(stats.connections.get(), 2);
    }
}

/// The ends that a socket's end stands for, where there is none.
#[test]
fn request_streams_that_share_a_connection_break_off() {
    for ring in rings() {
        let choosy = |_: Request, mut responder: Responder| async move {
            let mut input = responder.take_input().expect("a stream");
            let first = input.next().await.expect("an item");
            responder.item(&first).await.unwrap();
            match &first[..] {
                // It wants no more of the input, and goes on.
                b"0" => {
                    drop(input);
                    responder.stopped().await;
                }
                // It waits for the end of an input that is cut off.
                b"1" => {
                    while input.next().await.is_some() {}
                    assert!(!input.is_complete() && responder.is_killed());
                }
                // The response ends before the input.
                _ => responder.finish(),
            }
        };
        let make: MakeHandler = Box::new(move |_| Rc::new(ManyIn(choosy)) as Rc<dyn Handler>);
        let (worker, client) = (Local::worker(ring, make), Local::client(ring));
        let address = worker.address();
        let outcome = run(&client, move |host| async move {
            let mut all = Vec::new();
            for way in 0..3 {
                let (mut feed, mut reply) = host.caller().call_many(call_to(address));
                feed.item(way.to_string().as_bytes()).await.unwrap();
                let first = reply.next().await.unwrap().unwrap();
                assert_eq!(&*first, way.to_string().as_bytes());
                let mut written = Ok(());
                match way {
                    0 => {
                        while written.is_ok() {
                            written = feed.item(b"7").await;
                            host.sleep(Duration::from_millis(1)).await;
                        }
                        reply.stop();
                    }
                    1 => drop(feed),
                    _ => {}
                }
                all.push((written, read(reply).await.1));
            }
            all
        });
        let (stopped, failed) = (Some(Ending::Stopped), Some(Ending::Failed));
        let complete = Some(Ending::Complete);
        assert_eq!(
            answered(&outcome),
            [(Err(Gone), stopped), (Ok(()), failed), (Ok(()), complete)]
        );
        let (ours, theirs) = (&client.handle.stats.shard, &worker.handle.stats.shard);
        wait_until("all is given back", || {
            ours.calls.get() == 0 && theirs.handling.get() == 0 && ours.connections.get() == 2
        });
    }
}

/// A hand-made worker that has got one bidirectional call of `client`.
struct Asking {
    worker: HandWorker,
    writer: Receiver<Result<(), Gone>>,
}

fn asking<F, A>(client: &Local, write: F) -> Asking
where
    F: FnOnce(Feed, Reply) -> A + Send + 'static,
    A: Future<Output = Result<(), Gone>> + 'static,
{
    let worker = HandWorker::default();
    let address = worker.address();
    let writer = run(client, move |host| async move {
        let (feed, reply) = host.caller().call_many(call_to(address));
        write(feed, reply).await
    });
    Asking { worker, writer }
}

/// The worker's end of the request stream.
fn dial(asked: &Asked) -> Called {
    let mut called = asked.dial();
    let mut out = Vec::new();
    let subject = asked.input.as_ref().expect("a second connection info");
    call_home::write_handshake(subject, StreamType::Request, &mut out);
    called.say(&out);
    // He may have been reset already.
    let _ = called.stream.shutdown(Shutdown::Write);
    called
}

#[test]
fn a_worker_gets_items_and_one_closing_message() {
    for ring in rings() {
        let client = Local::client(ring);
        let stats = &client.handle.stats.shard;
        // Finished, dropped, and killed with the call.
        for (how, last) in [("finish", &SENTINEL[..]), ("drop", KILL), ("kill", KILL)] {
            let mut asking = asking(&client, move |mut feed, mut reply| async move {
                feed.item(b"1").await?;
                feed.item(b"[2]").await?;
                match how {
                    "finish" => feed.finish(),
                    "drop" => drop(feed),
                    _ => {
                        reply.begun().await.unwrap();
                        drop(reply);
                        return Ok(());
                    }
                }
                assert_eq!(read(reply).await.1, Some(Ending::Complete));
                Ok(())
            });
            let asked = asking.worker.take();
            assert!(asked.body.is_empty() && asked.input.as_ref() != Some(&asked.subject));
            asking.worker.reply("");
            let mut input = dial(&asked);
            let mut called = asked.call_home();
            called.say(&call_home::PROLOGUE_OK_FRAME);
            let mut said = Vec::new();
            while said.len() < 3 {
                let (header, body) = input.message().expect("more");
                said.push(if header.is_empty() { body } else { header });
            }
            assert_eq!(
                said,
                [b"1".to_vec(), b"[2]".to_vec(), last.to_vec()],
                "{how}"
            );
            if how != "kill" {
                called.say(&call_home::FINAL_MARKER_JSON_FRAME);
                called.say(&SENTINEL_FRAME);
            }
            assert_eq!(input.message(), None);
            answered(&asking.writer).unwrap();
            wait_until("the call is over", || stats.calls.get() == 0);
            // Who comes now is for nobody.
            let before = stats.homes_refused.get();
            assert_eq!(dial(&asked).message(), None);
            assert_eq!(stats.homes_refused.get(), before + 1);
        }
    }
}

#[test]
fn a_writer_waits_for_a_slow_worker_and_hears_of_its_end() {
    for ring in rings() {
        let client = Local::client(ring);
        let mut asking = asking(&client, |mut feed, reply| async move {
            let item = vec![b'1'; 10_000];
            let _reply = reply;
            loop {
                feed.item(&item).await?;
            }
        });
        let asked = asking.worker.take();
        asking.worker.reply("");
        let input = dial(&asked);
        let mut called = asked.call_home();
        called.say(&call_home::PROLOGUE_OK_FRAME);
        assert!(asking.writer.try_recv().is_err(), "it waits");
        // The response ends: so does the writing.
        called.say(&call_home::FINAL_MARKER_JSON_FRAME);
        called.say(&SENTINEL_FRAME);
        assert_eq!(answered(&asking.writer), Err(Gone));
        drop(input);
    }
}

/// A hand-made frontend that has made a bidirectional call to a worker of ours.
fn calling(worker: &Local, codec: PayloadCodec) -> (Frontend, Called, Called) {
    let mut frontend = Frontend::of(worker);
    let frame = frame(SERVED, &many_in(&frontend, codec, b""));
    frontend.caller.send(&frame);
    assert_eq!(frontend.caller.reply(), "");
    let (mut first, mut second) = (frontend.called(), frontend.called());
    let subjects = [first.handshake(), second.handshake()];
    match subjects.each_ref().map(|subject| &**subject) {
        ["in", "out"] => (frontend, first, second),
        ["out", "in"] => (frontend, second, first),
        other => panic!("{other:?}"),
    }
}

fn many_in(frontend: &Frontend, codec: PayloadCodec, body: &[u8]) -> Vec<u8> {
    let address = frontend.listener.local_addr().unwrap().to_string();
    let to = |subject, stream_type| TcpConnection {
        address: &address,
        subject,
        context: "id-1",
        stream_type,
    };
    let message = NewControlMessage {
        id: "id-1",
        request_type: RequestType::ManyIn,
        payload_codec: codec,
        connection_info: to("out", StreamType::Response),
        metadata: &[],
        frontend_send_ts_ns: None,
        request_stream_connection_info: Some(to("in", StreamType::Request)),
    };
    let (mut control, mut envelope) = (Vec::new(), Vec::new());
    message.write(&mut control).unwrap();
    two_part::write(&control, body, &mut envelope);
    envelope
}

fn data(body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    two_part::write(b"", body, &mut out);
    out
}

#[test]
fn our_worker_reads_what_the_frontend_writes() {
    for ring in rings() {
        let worker = Local::worker(ring, echo());
        for (codec, items) in [
            (Json, [&b"1"[..], b"{\"a\":[]}"]),
            (PayloadCodec::MessagePack, [b"\x01", b"\x81\xa1a\x90"]),
        ] {
            let (_frontend, mut input, mut output) = calling(&worker, codec);
            // The worker has nothing to say there.
            assert_eq!(input.message(), None);
            input.say(&data(items[0]));
            output.prologue_ok();
            assert_eq!(output.item(codec).unwrap(), items[0]);
            let whole = data(items[1]);
            for byte in &whole {
                input.say(&[*byte]);
            }
            assert_eq!(output.item(codec).unwrap(), items[1]);
            input.say(&SENTINEL_FRAME);
            assert_eq!(output.items_to_the_end(codec), Vec::<Vec<u8>>::new());
        }
    }
}

/// Every way in which a request stream ends without a sentinel kills or stops the request, and the
/// response socket ends without one.
#[test]
fn a_stream_that_breaks_off_ends_the_request() {
    for ring in rings() {
        let worker = Local::worker(ring, echo());
        let both = {
            let mut out = Vec::new();
            two_part::write(SENTINEL, b"1", &mut out);
            out
        };
        let unknown = {
            let mut out = Vec::new();
            two_part::write(b"\"what\"", b"", &mut out);
            out
        };
        for (name, bytes) in [
            ("stop", STOP_FRAME.to_vec()),
            ("kill", KILL_FRAME.to_vec()),
            ("close", Vec::new()),
            ("close in a message", data(b"12")[..20].to_vec()),
            ("both parts", both),
            ("neither part", data(b"")),
            ("unknown header", unknown),
            ("not a value", data(b"{")),
            ("two values", data(b"1 2")),
        ] {
            let (_frontend, mut input, mut output) = calling(&worker, Json);
            input.say(&data(b"7"));
            output.prologue_ok();
            assert_eq!(output.item(Json).unwrap(), b"7", "{name}");
            input.say(&bytes);
            if name.starts_with("close") {
                drop(input);
            }
            assert_eq!(output.message(), None, "{name}");
        }
        let stats = &worker.handle.stats.shard;
        wait_until("no handler is left", || stats.handling.get() == 0);
    }
}

#[test]
fn stop_and_kill_on_the_response_socket_end_the_input_too() {
    for ring in rings() {
        let worker = Local::worker(ring, echo());
        for word in [&STOP_FRAME[..], &KILL_FRAME] {
            let (_frontend, mut input, mut output) = calling(&worker, Json);
            input.say(&data(b"7"));
            output.prologue_ok();
            output.item(Json).unwrap();
            output.say(word);
            assert_eq!(output.message(), None);
        }
        let stats = &worker.handle.stats.shard;
        wait_until("all is given back", || {
            stats.handling.get() == 0 && stats.responses.get() == 0
        });
    }
}

#[test]
fn what_does_not_fit_the_endpoint_is_told() {
    for ring in rings() {
        let told = |worker: &Local, envelope: &dyn Fn(&Frontend) -> Vec<u8>, why: &str| {
            let mut frontend = Frontend::of(worker);
            let frame = frame(SERVED, &envelope(&frontend));
            frontend.caller.send(&frame);
            assert_eq!(frontend.caller.reply(), "");
            let mut called = frontend.called();
            called.handshake();
            let text = called.error_prologue();
            assert!(text.contains(why), "{text}");
        };
        let worker = Local::worker(ring, echo());
        let unary = |frontend: &Frontend| {
            let address = frontend.listener.local_addr().unwrap().to_string();
            envelope_in(&address, "out", Json, b"1")
        };
        told(&worker, &unary, "takes a stream of requests");
        told(&worker, &|one| many_in(one, Json, b"1"), "with a body");
        let without = |frontend: &Frontend| {
            let envelope = unary(frontend);
            let text = String::from_utf8_lossy(&envelope[24..]).into_owned();
            let control = text.trim_end_matches('1').replace("single_in", "many_in");
            let mut out = Vec::new();
            two_part::write(control.as_bytes(), b"", &mut out);
            out
        };
        told(&worker, &without, "where to dial");
        let make = handler(|_: Request, responder: Responder| async move { responder.finish() });
        let one = Local::worker(ring, make);
        told(
            &one,
            &|frontend| many_in(frontend, Json, b""),
            "not a stream",
        );
    }
}

#[test]
fn a_caller_is_not_read_from_while_the_handler_takes_nothing() {
    for ring in rings() {
        let gate = Arc::new(AtomicBool::new(false));
        let open = Arc::clone(&gate);
        let serve = move |_: Request, mut responder: Responder| {
            let open = Arc::clone(&open);
            async move {
                let mut input = responder.take_input().expect("a stream");
                let first = input.next().await.expect("an item");
                responder.item(&first).await.unwrap();
                while !open.load(Ordering::Relaxed) {
                    let _ = responder.sleep(Duration::from_millis(1)).await;
                }
                let mut count = 1u32;
                while input.next().await.is_some() {
                    count += 1;
                }
                responder.item(count.to_string().as_bytes()).await.unwrap();
                responder.finish();
            }
        };
        let make: MakeHandler = Box::new(move |_| Rc::new(ManyIn(serve)) as Rc<dyn Handler>);
        let worker = Local::worker(ring, make);
        let (_frontend, mut input, mut output) = calling(&worker, Json);
        let mut batch = Vec::new();
        for _ in 0..2_000 {
            let value = format!("\"{}\"", "y".repeat(5_000));
            item::value(value.as_bytes(), Json).unwrap();
            batch.extend_from_slice(&data(value.as_bytes()));
        }
        let writer = std::thread::spawn(move || {
            input.say(&batch);
            input.say(&SENTINEL_FRAME);
            input
        });
        output.prologue_ok();
        output.item(Json).unwrap();
        let stats = &worker.handle.stats.shard;
        wait_until("it does not read on", || stats.receives_paused.get() >= 1);
        gate.store(true, Ordering::Relaxed);
        assert_eq!(output.item(Json).unwrap(), b"2000");
        assert_eq!(output.items_to_the_end(Json), Vec::<Vec<u8>>::new());
        writer.join().unwrap();
    }
}
