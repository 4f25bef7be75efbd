//! Responses that share a connection: our worker and our caller with each other, and each with a
//! hand-made peer, on every ring.

mod common;
#[path = "common/ends.rs"]
mod ends;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use common::*;
use corelane_codec::call_home::{self, KILL, KILL_FRAME, STOP, STOP_FRAME};
use corelane_codec::control_message::{CallTemplate, PayloadCodec::Json};
use corelane_codec::error::Reason;
use corelane_codec::mux::{self, Kind, WINDOW_BYTES};
use corelane_codec::{Decoded, item, two_part};
use corelane_engine::ends::Ends;
use corelane_engine::handler::Request;
use corelane_engine::responder::Responder;
use ends::*;

const SUBJECT: &str = "00000000-0000-4000-8000-00000000000";

/// One end of a shared connection, hand-made.
struct Wire {
    stream: TcpStream,
    bytes: Vec<u8>,
}

impl Wire {
    fn new(stream: TcpStream) -> Wire {
        stream.set_nonblocking(false).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.set_nodelay(true).unwrap();
        let bytes = Vec::new();
        Wire { stream, bytes }
    }

    fn fill(&mut self) -> bool {
        let mut chunk = [0; 65_536];
        match self.stream.read(&mut chunk) {
            Ok(0) => false,
            Ok(read) => {
                self.bytes.extend_from_slice(&chunk[..read]);
                true
            }
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => false,
            Err(error) => panic!("nothing comes: {error}"),
        }
    }

    /// The next chunk; `None` at the end of the connection.
    fn chunk(&mut self) -> Option<(u32, Kind, Vec<u8>)> {
        loop {
            if let Decoded::Frame(chunk) = mux::decode(&self.bytes)
                && let Some(payload) = self.bytes[8..].get(..chunk.bytes)
            {
                let payload = payload.to_vec();
                self.bytes.drain(..8 + chunk.bytes);
                return Some((chunk.stream, chunk.kind, payload));
            }
            if !self.fill() {
                return None;
            }
        }
    }

    fn say(&mut self, stream: u32, kind: Kind, payload: &[u8]) {
        let prefix = mux::prefix(stream, kind, payload.len());
        let chunk = [&prefix[..], payload].concat();
        self.stream.write_all(&chunk).unwrap();
    }

    /// As a worker: opens a stream for a call.
    fn open(&mut self, stream: u32, asked: &Asked, bytes: &[u8], end: bool) {
        let subject = u128::from_str_radix(&asked.subject.replace('-', ""), 16).unwrap();
        let payload = [&subject.to_be_bytes()[..], bytes].concat();
        self.say(stream, Kind::Data { open: true, end }, &payload);
    }

    /// As a worker: hello, and the caller's answer.
    fn to(asked: &Asked) -> Wire {
        let mut wire = Wire::new(TcpStream::connect(asked.address).unwrap());
        wire.stream.write_all(&mux::HELLO_FRAME).unwrap();
        assert_eq!(wire.chunk(), Some((0, Kind::Hello, vec![])));
        wire
    }
}

fn data(end: bool) -> Kind {
    Kind::Data { open: false, end }
}

fn response(items: &[&str]) -> Vec<u8> {
    let mut out = call_home::PROLOGUE_OK_FRAME.to_vec();
    for data in items {
        item::write_frame(data.as_bytes(), Json, &mut out);
    }
    out
}

fn whole(items: &[&str]) -> Vec<u8> {
    let mut out = response(items);
    out.extend_from_slice(&call_home::FINAL_MARKER_JSON_FRAME);
    out.extend_from_slice(&call_home::SENTINEL_FRAME);
    out
}

fn header_of(bytes: &[u8]) -> Vec<u8> {
    let message = two_part::decode(bytes, None).frame().unwrap();
    bytes[message.header].to_vec()
}

/// A caller that offers a shared connection, and takes it.
struct Offering {
    caller: Caller,
    listener: TcpListener,
}

impl Offering {
    fn of(worker: &Local) -> Offering {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let caller = Caller::dial(worker.address());
        Offering { caller, listener }
    }

    fn send(&mut self, number: u32, body: &[u8]) {
        let address = self.listener.local_addr().unwrap().to_string();
        let template = CallTemplate::new(&address, Json, true);
        let (mut control, mut envelope) = (Vec::new(), Vec::new());
        let subject = format!("{SUBJECT}{number}");
        template.write("id-1", &subject, &mut control).unwrap();
        two_part::write(&control, body, &mut envelope);
        self.caller.send(&frame(SERVED, &envelope));
        assert_eq!(self.caller.reply(), "");
    }

    fn accept(&self) -> TcpStream {
        self.listener.set_nonblocking(true).unwrap();
        let deadline = Instant::now() + DEADLINE;
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false).unwrap();
                    return stream;
                }
                Err(_) => assert!(Instant::now() < deadline, "nobody calls home"),
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn greet(&self) -> Wire {
        let mut wire = Wire::new(self.accept());
        while wire.bytes.len() < mux::HELLO_FRAME.len() {
            assert!(wire.fill(), "a hello");
        }
        assert_eq!(wire.bytes, mux::HELLO_FRAME);
        wire.bytes.clear();
        wire.stream.write_all(&mux::HELLO_CHUNK).unwrap();
        wire
    }
}

/// Subject and data of a stream's first chunk.
fn opened(payload: &[u8]) -> (u128, &[u8]) {
    let (subject, bytes) = payload.split_first_chunk().unwrap();
    (u128::from_be_bytes(*subject), bytes)
}

#[test]
fn many_calls_share_one_connection_and_need_no_other() {
    const CALLS: u64 = 500;
    for ring in rings() {
        for items in [1, 100] {
            let (worker, client) = (echoing(ring, items), Local::client(ring));
            for number in 0..CALLS {
                let mut call = call_to(worker.address());
                call.body = number.to_string().into_bytes();
                client.call(number, call);
            }
            let (mut finished, mut seen) = (0, 0);
            while finished < CALLS {
                let event = client.event();
                match event.what {
                    What::Acked => {}
                    What::Item(data) => {
                        assert_eq!(data, event.call.to_string().as_bytes());
                        seen += 1;
                    }
                    what => {
                        assert_eq!(what, What::Finished);
                        finished += 1;
                    }
                }
            }
            assert_eq!(seen, CALLS * u64::from(items));
            let (ours, theirs) = (&client.handle.stats.shard, &worker.handle.stats.shard);
            assert_eq!(ours.mux_received.get(), CALLS);
            assert_eq!(theirs.mux_sent.get(), CALLS);
            assert_eq!(theirs.mux_connected.get(), 1);
            wait_until("all is given back", || {
                ours.calls.get() == 0 && theirs.responses.get() == 0
            });
            assert_eq!(ours.connections.get(), 2);
        }
    }
}

#[test]
fn a_large_item_and_a_reader_who_stands_still() {
    for ring in rings() {
        let (worker, client) = (echoing(ring, 300), Local::client(ring));
        // 300 items of 64 KiB, and control takes none of its 20 MB for a while.
        let data = format!("\"{}\"", "x".repeat(65_000));
        let mut call = call_to(worker.address());
        call.body = data.clone().into_bytes();
        client.call(1, call);
        // Meanwhile other calls go on.
        let ours = &client.handle.stats.shard;
        wait_until("it has come home", || ours.mux_received.get() == 1);
        let items = client.outcome();
        assert_eq!(items.len(), 301);
        assert!(
            items[..300]
                .iter()
                .all(|what| *what == What::Item(data.clone().into()))
        );
        assert_eq!(items[300], What::Finished);
    }
    // One item that is larger than the window.
    for ring in rings() {
        let (worker, client) = (echoing(ring, 3), Local::client(ring));
        let mut call = call_to(worker.address());
        call.body = format!("\"{}\"", "y".repeat(3_000_000)).into_bytes();
        let expected = call.body.clone();
        client.call(1, call);
        let items = client.outcome();
        assert_eq!(items.len(), 4);
        assert!(
            items[..3]
                .iter()
                .all(|what| *what == What::Item(expected.clone()))
        );
    }
}

#[test]
fn stop_and_kill_reach_the_worker_at_every_stage() {
    for ring in rings() {
        let (mut worker, client) = (HandWorker::default(), Local::client(ring));
        client.call(1, call_to(worker.address()));
        let asked = worker.take();
        worker.reply("");
        let mut wire = Wire::to(&asked);
        wire.open(1, &asked, &whole(&["7"]), true);
        assert_eq!(
            client.outcome(),
            [What::Item(b"7".to_vec()), What::Finished]
        );
        for kill in [false, true] {
            let word = if kill { KILL } else { STOP };
            let end = |client: &Local| {
                client.end_call(1, kill);
            };
            // In the middle of the items.
            client.call(1, call_to(worker.address()));
            let asked = worker.take();
            worker.reply("");
            wire.open(2, &asked, &response(&["1"]), false);
            assert_eq!(client.event().what, What::Acked);
            assert_eq!(client.event().what, What::Item(b"1".to_vec()));
            end(&client);
            let (stream, kind, payload) = wire.chunk().unwrap();
            assert_eq!((stream, kind), (2, data(false)));
            assert_eq!(header_of(&payload), word);
            if kill {
                assert_eq!(client.event().what, What::Stopped);
                assert_eq!(wire.chunk(), Some((2, Kind::Reset, vec![])));
            } else {
                let mut more = Vec::new();
                item::write_frame(b"9", Json, &mut more);
                wire.say(2, data(true), &more);
                assert_eq!(client.event().what, What::Item(b"9".to_vec()));
                assert_eq!(client.event().what, What::Stopped);
            }
            // Before the stream: said when it opens.
            client.call(1, call_to(worker.address()));
            let asked = worker.take();
            end(&client);
            assert_eq!(client.event().what, What::Stopped);
            worker.reply("");
            wire.open(3, &asked, &[], false);
            let (stream, _, payload) = wire.chunk().unwrap();
            assert_eq!((stream, header_of(&payload)), (3, word.to_vec()));
        }
        // A stream that is for nobody.
        wire.open(4, &asked, &[], false);
        assert_eq!(wire.chunk(), Some((4, Kind::Reset, vec![])));
        let stats = &client.handle.stats.shard;
        wait_until("all is given back", || stats.calls.get() == 0);
    }
}

#[test]
fn ends_of_streams_mean_what_ends_of_sockets_do() {
    for ring in rings() {
        let (mut worker, client) = (HandWorker::default(), Local::client(ring));
        let mut begin = |client: &Local| {
            client.call(1, call_to(worker.address()));
            let asked = worker.take();
            worker.reply("");
            asked
        };
        let first = begin(&client);
        let mut wire = Wire::to(&first);
        let reason = |what: &What| match what {
            What::Failed(error) => error.reason(),
            what => panic!("{what:?}"),
        };
        // Ends, or is reset, before and after the prologue.
        wire.open(1, &first, &[], true);
        assert_eq!(reason(&client.outcome()[0]), Reason::Disconnected);
        let asked = begin(&client);
        wire.open(2, &asked, &response(&["1"]), true);
        let outcome = client.outcome();
        assert_eq!(outcome[0], What::Item(b"1".to_vec()));
        assert_eq!(reason(&outcome[1]), Reason::Disconnected);
        let asked = begin(&client);
        wire.open(3, &asked, &response(&[]), false);
        wire.say(3, Kind::Reset, b"");
        assert_eq!(reason(&client.outcome()[0]), Reason::Disconnected);
        // Bytes cut anywhere.
        let bytes = whole(&["1", "2"]);
        for cut in 0..bytes.len() {
            let asked = begin(&client);
            wire.open(5, &asked, &bytes[..cut], false);
            wire.say(5, data(true), &bytes[cut..]);
            let items = [1, 2].map(|number| What::Item(number.to_string().into_bytes()));
            assert_eq!(client.outcome(), [&items[..], &[What::Finished]].concat());
        }
        // The connection dies: all its streams do, one of which was whole but for its end.
        let (one, two) = (begin(&client), {
            client.call(2, call_to(worker.address()));
            let asked = worker.take();
            worker.reply("");
            asked
        });
        wire.open(6, &one, &response(&["1"]), false);
        let mut complete = response(&["2"]);
        complete.extend_from_slice(&call_home::FINAL_MARKER_JSON_FRAME);
        wire.open(7, &two, &complete, false);
        let stats = &client.handle.stats.shard;
        let came = stats.mux_received.get();
        assert!(came > 0);
        drop(wire);
        let mut ends = std::collections::BTreeMap::new();
        while ends.len() < 2 {
            let event = client.event();
            if event.what.is_end() {
                ends.insert(event.call, event.what);
            }
        }
        assert_eq!(reason(&ends[&1]), Reason::Disconnected);
        assert_eq!(ends[&2], What::Finished);
        assert_eq!(stats.mux_lost.get(), 1);
    }
}

#[test]
fn a_worker_that_breaks_the_rules_loses_the_connection() {
    for ring in rings() {
        let (mut worker, client) = (HandWorker::default(), Local::client(ring));
        for wrong in 0..5 {
            client.call(1, call_to(worker.address()));
            let asked = worker.take();
            worker.reply("");
            let mut wire = Wire::to(&asked);
            wire.open(1, &asked, &response(&[]), false);
            match wrong {
                0 => wire.say(0, Kind::Hello, b""),
                1 => wire.say(1, Kind::Credit, &[0; 4]),
                2 => wire.open(1, &asked, b"", false),
                3 => wire.stream.write_all(&[9; 64]).unwrap(),
                _ => {
                    // Far more than the window, of which the caller takes nothing: control sleeps.
                    let mut batch = Vec::new();
                    for _ in 0..4_000 {
                        item::write_frame(&[b'1'; 16], Json, &mut batch);
                    }
                    let mut sent = 0;
                    while sent < 40 * WINDOW_BYTES as usize {
                        let chunks = batch.chunks(60_000);
                        for part in chunks {
                            let prefix = mux::prefix(1, data(false), part.len());
                            let chunk = [&prefix[..], part].concat();
                            if wire.stream.write_all(&chunk).is_err() {
                                break;
                            }
                        }
                        sent += batch.len();
                    }
                }
            }
            while wire.chunk().is_some() {}
            let last = client.outcome().pop().unwrap();
            let What::Failed(error) = last else {
                panic!("{wrong}: {last:?}");
            };
            assert_eq!(error.reason(), Reason::Disconnected, "{wrong}");
        }
    }
}

#[test]
fn our_worker_keeps_to_credit_and_obeys() {
    for ring in rings() {
        let worker = echoing(ring, 100_000);
        let mut caller = Offering::of(&worker);
        caller.send(1, b"[1]");
        let mut wire = caller.greet();
        // It sends one window and waits.
        let mut bytes = Vec::new();
        let number = loop {
            let (number, kind, payload) = wire.chunk().unwrap();
            match kind {
                Kind::Data { open: true, .. } => bytes.extend_from_slice(opened(&payload).1),
                _ => bytes.extend_from_slice(&payload),
            }
            if bytes.len() >= WINDOW_BYTES as usize {
                break number;
            }
        };
        assert_eq!(bytes.len(), WINDOW_BYTES as usize);
        // A second stream is not held up by the first.
        caller.send(2, b"[2]");
        let (second, kind, payload) = wire.chunk().unwrap();
        assert_eq!(
            kind,
            Kind::Data {
                open: true,
                end: false
            }
        );
        assert_eq!(opened(&payload).0 & 0xf, 2);
        // With credit it goes on, so much and no more.
        let mut rest = payload.len() - 16;
        while rest < WINDOW_BYTES as usize {
            let (stream, _, payload) = wire.chunk().unwrap();
            assert_eq!(stream, second);
            rest += payload.len();
        }
        wire.stream.write_all(&mux::credit(number, 1_000)).unwrap();
        let (stream, kind, payload) = wire.chunk().unwrap();
        assert_eq!((stream, kind, payload.len()), (number, data(false), 1_000));
        // Stop: the stream ends with nothing more.
        wire.say(number, data(false), &STOP_FRAME);
        assert_eq!(wire.chunk(), Some((number, data(true), vec![])));
        wire.say(second, data(false), &KILL_FRAME);
        assert_eq!(wire.chunk(), Some((second, data(true), vec![])));
        // Reset: it needs no answer.
        caller.send(3, b"[3]");
        let (third, _, payload) = wire.chunk().unwrap();
        assert_eq!(opened(&payload).0 & 0xf, 3);
        wire.say(third, Kind::Reset, b"");
        let stats = &worker.handle.stats.shard;
        wait_until("nothing is left of them", || stats.responses.get() == 0);
        // The connection dies: so do the responses on it.
        caller.send(4, b"[4]");
        wait_until("it runs", || stats.responses.get() == 1);
        drop(wire);
        wait_until("nothing is left of it", || stats.responses.get() == 0);
        assert_eq!(stats.mux_lost.get(), 1);
    }
}

#[test]
fn a_silent_handler_can_be_stopped() {
    for ring in rings() {
        let make = handler(|_: Request, responder: Responder| async move {
            responder.stopped().await;
        });
        let worker = Local::worker(ring, make);
        let mut caller = Offering::of(&worker);
        caller.send(1, b"1");
        let mut wire = caller.greet();
        let (number, kind, payload) = wire.chunk().unwrap();
        let open = Kind::Data {
            open: true,
            end: false,
        };
        assert_eq!((kind, payload.len()), (open, 16));
        wire.say(number, data(false), &STOP_FRAME);
        assert_eq!(wire.chunk(), Some((number, data(true), vec![])));
        let stats = &worker.handle.stats.shard;
        wait_until("it has ended", || stats.handling.get() == 0);
    }
}

#[test]
fn where_no_connection_is_shared_each_response_gets_its_own() {
    for ring in rings() {
        let worker = echoing(ring, 1);
        let mut caller = Offering::of(&worker);
        caller.send(1, b"[1]");
        caller.send(2, b"[2]");
        // He offers, and does not keep it.
        drop(caller.accept());
        let mut got = Vec::new();
        for _ in 0..2 {
            let mut called = Called::of(caller.accept());
            let subject = called.handshake();
            called.prologue_ok();
            let items = called.items_to_the_end(Json);
            got.push((subject, items));
        }
        got.sort();
        for (number, (subject, items)) in [1, 2].into_iter().zip(got) {
            assert_eq!(subject, format!("{SUBJECT}{number}"));
            assert_eq!(items, [format!("[{number}]").into_bytes()]);
        }
        // For a while it is not tried again.
        caller.send(3, b"[3]");
        let mut called = Called::of(caller.accept());
        assert_eq!(called.handshake(), format!("{SUBJECT}3"));
        let stats = &worker.handle.stats.shard;
        assert_eq!(stats.mux_refused.get(), 1);
    }
}

#[test]
fn many_calls_that_end_anyhow_leave_nothing_behind() {
    const CALLS: u64 = 2_000;
    for ring in rings() {
        let worker = echoing(ring, 20);
        let client = Local::start(ring, Ends::client(home(), 8_192));
        let (mut begun, mut over) = (0, 0);
        let mut outcomes = std::collections::HashMap::new();
        while over < CALLS {
            while begun < CALLS && begun - over < 200 {
                let mut call = call_to(worker.address());
                call.body = vec![b'1'; 1 + (begun as usize * 37) % 3_000];
                client.call(begun, call);
                if begun % 3 == 0 {
                    let kill = begun % 2 == 0;
                    client.end_call(begun, kill);
                }
                begun += 1;
            }
            let event = client.event();
            match event.what {
                What::Acked => {}
                What::Item(_) => *outcomes.entry(event.call).or_insert(0) += 1,
                What::Finished => {
                    assert_eq!(outcomes.get(&event.call), Some(&20));
                    over += 1;
                }
                What::Stopped => over += 1,
                what => panic!("{what:?}"),
            }
        }
        let (ours, theirs) = (&client.handle.stats.shard, &worker.handle.stats.shard);
        wait_until("nothing is left", || {
            ours.calls.get() == 0 && theirs.responses.get() == 0 && theirs.handling.get() == 0
        });
        assert_eq!(theirs.mux_connected.get(), 1);
        assert_eq!((ours.mux_lost.get(), ours.connections.get()), (0, 2));
    }
}
