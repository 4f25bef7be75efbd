//! A shard whose requests go to workers over shared-memory lanes, on every ring.

mod common;
#[path = "common/ends.rs"]
mod ends;

use std::io::Read;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use common::*;
use corelane_codec::control_message::PayloadCodec::{Json, MessagePack};
use corelane_engine::config::RingKind;
use corelane_engine::directory::{Ack, Directory, Policy, Route};
use corelane_engine::ends::Ends;
use corelane_engine::lane::{NewLane, RESPONSES_MAX};
use corelane_engine::routed::{Ending, Mode, RoutedSpan};
use corelane_engine::served::{Outcome, Tracing};
use corelane_engine::shard::{Command, Report};
use corelane_engine::stats::ShardStats;
use corelane_engine::stats::flight::Why;
use corelane_gpu_mem::lane::attach::{LaneFds, LaneSize};
use corelane_gpu_mem::lane::layout::{
    ANNOTATED, BLOCK_HEAD_BYTES, Descriptor, Kind, LAST, RECORD_BYTES, SUBMISSIONS_TAKEN,
};
use corelane_gpu_mem::lane::memory::Mapping;
use corelane_gpu_mem::lane::queue::{Queues, Side};
use corelane_gpu_mem::lane::worker::{Event, LaneWorker, Options, Request};
use corelane_gpu_mem::lane::{LaneError, attach};
use ends::*;

const SLAB_BYTES: u64 = 64 << 20;

/// A shard with one route to lanes.
fn router(ring: RingKind, change: impl FnOnce(&mut Route)) -> Local {
    let ends = Ends {
        running_max: RESPONSES_MAX,
        ..Ends::default()
    };
    let local = Local::with(ring, ends, |config| {
        config.spans = Tracing::On { ratio: 1.0 };
    });
    let mut route = route(Policy::RoundRobin, Ack::OnForward, &[]);
    route.paths = vec![SERVED.into()];
    route.lane = true;
    // Machines under load may keep a worker from its CPU for a while.
    route.ack_timeout_ns = 20_000_000_000;
    change(&mut route);
    let routes = vec![route];
    let directory = Command::Directory(Arc::new(Directory { routes }));
    local.handle.command(directory).unwrap();
    wait_until("the route is known", || {
        stats(&local).directories.get() == 1
    });
    local
}

fn stats(local: &Local) -> &ShardStats {
    &local.handle.stats.shard
}

/// The router's end of a worker's socket; what control does when one connects.
fn greet(local: &Local, worker: u64, slab_bytes: u64) -> (UnixStream, UnixStream) {
    let (here, there) = UnixStream::pair().unwrap();
    let size = LaneSize {
        entries: 64,
        slab_bytes,
    };
    let head = size.head(0, 1, worker);
    let fds = LaneFds::create(&head).unwrap();
    fds.offer(&here, &head).unwrap();
    let lane = NewLane::new(0, &head, fds).unwrap();
    let before = stats(local).lanes_attached.get();
    local.handle.command(Command::Lane(Box::new(lane))).unwrap();
    wait_until("the lane is attached", || {
        stats(local).lanes_attached.get() > before
    });
    (here, there)
}

fn worker(local: &Local, id: u64) -> (LaneWorker, UnixStream) {
    let (here, there) = greet(local, id, SLAB_BYTES);
    let worker = LaneWorker::over(there.into(), &Options::default()).unwrap();
    let mut hello = [0; RECORD_BYTES];
    (&here).read_exact(&mut hello).unwrap();
    assert_eq!(worker.id(), id);
    (worker, here)
}

/// A router, its one worker, and a caller.
fn scene(ring: RingKind, id: u64) -> (Local, (LaneWorker, UnixStream), Frontend) {
    let local = router(ring, |_| {});
    let worker = worker(&local, id);
    let frontend = Frontend::of(&local);
    (local, worker, frontend)
}

/// A worker that sends each body back, in a thread of its own, until its socket is closed.
struct Echo {
    socket: UnixStream,
    served: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

fn echo(local: &Local, id: u64) -> Echo {
    let (mut worker, socket) = worker(local, id);
    let served = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&served);
    let thread = std::thread::spawn(move || {
        loop {
            match worker.next(None) {
                Ok(Event::Request(request)) => {
                    let body = worker.body(&request).to_vec();
                    count.fetch_add(1, Ordering::Relaxed);
                    match worker.item(&request, &body, ANNOTATED | LAST) {
                        Err(LaneError::Over) => worker.finish(&request).unwrap(),
                        Err(LaneError::Gone) => return,
                        other => other.unwrap(),
                    }
                }
                Ok(_) => {}
                Err(LaneError::Gone) => return,
                Err(error) => panic!("{error}"),
            }
        }
    });
    Echo {
        socket,
        served,
        thread: Some(thread),
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        let _ = self.socket.shutdown(Shutdown::Both);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
            && !std::thread::panicking()
        {
            panic!("the echo worker failed");
        }
    }
}

fn next_request(worker: &mut LaneWorker) -> Request {
    match worker.next(Some(DEADLINE)).unwrap() {
        Event::Request(request) => request,
        other => panic!("{other:?} instead of a request"),
    }
}

fn text(bytes: usize) -> Vec<u8> {
    let alphabet: Vec<u8> = (b'a'..=b'z').collect();
    let mut filling = alphabet.repeat(bytes / 26 + 1);
    filling.truncate(bytes);
    [&b"\""[..], &filling, b"\""].concat()
}

fn annotated(body: &[u8]) -> Vec<u8> {
    [&b"{\"data\":"[..], body, b"}"].concat()
}

#[test]
fn bodies_of_every_size_come_back_in_both_codecs() {
    for ring in rings() {
        let local = router(ring, |_| {});
        let worker = echo(&local, 1);
        let mut frontend = Frontend::of(&local);
        for bytes in [
            1,
            128,
            3000,
            5000,
            17_000,
            70_000,
            300_000,
            1 << 20,
            9 << 20,
        ] {
            let body = text(bytes);
            assert!(frontend.call(Json, &body) == [annotated(&body)], "{bytes}");
        }
        let packed = b"\x82\xa4text\xa3abc\xa1n\x93\x01\x02\xc0".to_vec();
        let wrapped = [&b"\x81\xa4data"[..], &packed].concat();
        assert_eq!(frontend.call(MessagePack, &packed), [wrapped]);
        assert_eq!(worker.served.load(Ordering::Relaxed), 10);
        let stats = stats(&local);
        wait_until("all is given back", || {
            let left = [
                &stats.lane_jobs,
                &stats.responses,
                &stats.handling,
                &stats.buffers_held,
            ];
            left.iter().all(|cell| cell.get() == 0)
        });
        assert_eq!(
            (stats.lane_requests.get(), stats.lane_faults.get()),
            (10, 0)
        );
    }
}

#[test]
fn a_large_body_is_hardly_copied() {
    for ring in rings() {
        let local = router(ring, |_| {});
        let _worker = echo(&local, 1);
        let mut frontend = Frontend::of(&local);
        let body = text(1 << 20);
        let stats = stats(&local);
        for _ in 0..20 {
            let copied = stats.lane_copied_bytes.get() + stats.joined_bytes.get();
            let items = stats.lane_item_copied_bytes.get();
            assert!(frontend.call(Json, &body) == [annotated(&body)]);
            let copied = stats.lane_copied_bytes.get() + stats.joined_bytes.get() - copied;
            assert!(copied * 50 <= body.len() as u64, "{copied} bytes copied");
            assert_eq!(stats.lane_item_copied_bytes.get(), items);
        }
        let landed = stats.lane_landed_bytes.get();
        assert!(
            landed * 50 >= 20 * 49 * body.len() as u64,
            "{landed} bytes landed"
        );
    }
}

#[test]
fn the_worker_sees_id_headers_and_an_aligned_body() {
    for ring in rings() {
        let (_local, (mut worker, _socket), mut frontend) = scene(ring, 7);
        frontend.send("s", Json, b"{\"a\":1}");
        let request = next_request(&mut worker);
        assert_eq!(worker.request_id(&request), "id-1");
        assert_eq!(worker.body(&request), b"{\"a\":1}");
        assert_eq!(request.body_at().0 % 64, 0);
        let headers = String::from_utf8(worker.headers(&request)).unwrap();
        assert!(
            headers.starts_with('{') && headers.ends_with('}'),
            "{headers}"
        );
        for count in 0..100u32 {
            worker
                .item(&request, count.to_string().as_bytes(), 0)
                .unwrap();
        }
        worker.finish(&request).unwrap();
        assert!(matches!(worker.finish(&request), Err(LaneError::Over)));
        let mut called = frontend.called();
        assert_eq!(called.handshake(), "s");
        called.prologue_ok();
        let items = called.items_to_the_end(Json);
        let wanted = (0..100).map(|count| count.to_string().into_bytes());
        assert!(items.into_iter().eq(wanted));
    }
}

#[test]
fn a_failure_is_an_error_prologue_or_an_error_item() {
    for ring in rings() {
        let (_local, (mut worker, _socket), mut frontend) = scene(ring, 7);
        frontend.send("s", Json, b"1");
        let request = next_request(&mut worker);
        worker.fail(&request, "no such model", 1).unwrap();
        let mut called = frontend.called();
        called.handshake();
        let error = called.error_prologue();
        assert!(error.contains("request.invalid_argument") && error.contains("no such model"));

        frontend.send("s", Json, b"2");
        let request = next_request(&mut worker);
        worker.item(&request, b"1", ANNOTATED).unwrap();
        worker.fail(&request, "out of memory", 0).unwrap();
        let mut called = frontend.called();
        called.handshake();
        called.prologue_ok();
        let items = called.items_to_the_end(Json);
        assert_eq!((items.len(), &items[0][..]), (2, &b"{\"data\":1}"[..]));
        assert!(String::from_utf8_lossy(&items[1]).contains("out of memory"));
    }
}

fn next_span(local: &Local) -> RoutedSpan {
    let mut found = None;
    wait_until("a span is told", || {
        if let Some(Report::Routed(span, _)) = local.handle.reports.next() {
            found = Some(span);
        }
        found.is_some()
    });
    found.unwrap()
}

#[test]
fn a_request_has_one_span_from_its_arrival_to_its_end() {
    for ring in rings() {
        let (local, (mut worker, socket), mut frontend) = scene(ring, 7);
        frontend.send("s", Json, b"{\"a\":1}");
        let request = next_request(&mut worker);
        worker.item(&request, b"12345", ANNOTATED).unwrap();
        worker.finish(&request).unwrap();
        let span = next_span(&local);
        assert_eq!((span.mode, span.route), (Mode::Lane, 0));
        assert_eq!((span.instance_id, span.attempts), (Some(7), 1));
        assert_eq!(span.ending, Ending::Served(Outcome::Finished));
        assert_eq!((span.response_bytes, span.request_id.as_str()), (5, "r"));
        let moments = span.moments;
        let order = [
            moments.received_ns,
            moments.chosen_ns,
            moments.forwarded_ns,
            moments.first_byte_ns,
            moments.ended_ns,
        ];
        assert!(order[0] > 0 && order.is_sorted(), "{moments:?}");

        frontend.send("s", Json, b"1");
        let request = next_request(&mut worker);
        worker.fail(&request, "no such model", 1).unwrap();
        let failed = next_span(&local);
        assert_eq!(failed.ending, Ending::Served(Outcome::Failed));

        frontend.send("s", Json, b"1");
        next_request(&mut worker);
        drop((worker, socket));
        local
            .handle
            .command(Command::EndLanes { worker: 7 })
            .unwrap();
        assert_eq!(next_span(&local).ending, Ending::Refused(Why::InstanceLost));
    }
}

#[test]
fn a_dead_worker_loses_what_it_had_taken_and_nothing_else() {
    for ring in rings() {
        let (local, (mut dying, socket), mut frontend) = scene(ring, 1);
        frontend.send("began", Json, b"1");
        let began = next_request(&mut dying);
        dying.item(&began, b"1", ANNOTATED).unwrap();
        let mut called_began = frontend.called();
        called_began.handshake();
        called_began.prologue_ok();
        assert_eq!(called_began.item(Json), Some(annotated(b"1")));
        frontend.send("taken", Json, b"2");
        next_request(&mut dying);
        let mut called_taken = frontend.called();
        called_taken.handshake();
        // Acknowledged, posted, and never taken.
        let body = text(200_000);
        frontend.send("waiting", Json, &body);
        let mut called_waiting = frontend.called();
        assert_eq!(called_waiting.handshake(), "waiting");
        let heir = echo(&local, 2);
        drop((dying, socket));
        local
            .handle
            .command(Command::EndLanes { worker: 1 })
            .unwrap();

        called_waiting.prologue_ok();
        assert!(called_waiting.items_to_the_end(Json) == [annotated(&body)]);
        let error = called_taken.error_prologue();
        assert!(error.contains("before it began to respond"), "{error}");
        let items = called_began.items_to_the_end(Json);
        assert!(String::from_utf8_lossy(&items[0]).contains("in full"));
        assert_eq!(heir.served.load(Ordering::Relaxed), 1);
        drop((called_began, called_taken, called_waiting));
        let stats = stats(&local);
        assert_eq!((stats.lane_abandoned.get(), stats.retried.get()), (2, 1));
        wait_until("all is given back", || {
            (
                stats.lane_jobs.get(),
                stats.responses.get(),
                stats.lanes.get(),
            ) == (0, 0, 1)
        });
    }
}

#[test]
fn what_a_worker_scribbles_into_a_request_does_not_reach_the_next_one() {
    for ring in rings() {
        let local = router(ring, |_| {});
        let (_here, there) = greet(&local, 1, 1 << 20);
        let (head, fds) = attach::receive(&there).unwrap();
        let slab = Mapping::new(&fds.slab, head.slab_bytes.get()).unwrap();
        let mut frontend = Frontend::of(&local);
        let body = text(100_000);
        frontend.send("s", Json, &body);
        let mut called = frontend.called();
        assert_eq!(called.handshake(), "s");
        // It is posted, and its worker, who has not taken it, changes what says where its body is.
        assert!(slab.write(0, &[0xff; BLOCK_HEAD_BYTES]));
        let heir = echo(&local, 2);
        local
            .handle
            .command(Command::EndLanes { worker: 1 })
            .unwrap();
        called.prologue_ok();
        assert!(called.items_to_the_end(Json) == [annotated(&body)]);
        assert_eq!(heir.served.load(Ordering::Relaxed), 1);
    }
}

#[test]
fn without_a_worker_requests_are_refused() {
    for ring in rings() {
        let local = router(ring, |_| {});
        let mut frontend = Frontend::of(&local);
        let frame = frontend.frame("s", Json, &text(100_000));
        frontend.caller.send(&frame);
        let reply = frontend.caller.reply();
        assert!(reply.starts_with("Server unavailable:"), "{reply}");
        // The frame has passed by; the connection serves on.
        let _worker = echo(&local, 1);
        assert_eq!(frontend.call(Json, b"1"), [annotated(b"1")]);
    }
}

#[test]
fn a_body_under_way_moves_to_another_worker_when_its_own_dies() {
    for ring in rings() {
        let (local, (dying, socket), mut frontend) = scene(ring, 1);
        let body = text(2 << 20);
        let frame = frontend.frame("s", Json, &body);
        let (first, rest) = frame.split_at(frame.len() / 2);
        frontend.caller.send(first);
        let stats = stats(&local);
        wait_until("half of it is there", || {
            stats.lane_landed_bytes.get() > first.len() as u64 / 2
        });
        let heir = echo(&local, 2);
        drop((dying, socket));
        local
            .handle
            .command(Command::EndLanes { worker: 1 })
            .unwrap();
        wait_until("the lane is gone", || stats.lanes_lost.get() == 1);
        frontend.caller.send(rest);
        assert_eq!(frontend.caller.reply(), "");
        let mut called = frontend.called();
        called.handshake();
        called.prologue_ok();
        assert!(called.items_to_the_end(Json) == [annotated(&body)]);
        assert_eq!(heir.served.load(Ordering::Relaxed), 1);

        // With nobody left the rest of a frame passes by and the caller hears a refusal.
        frontend.caller.send(first);
        wait_until("it has begun", || stats.lane_jobs.get() == 1);
        local
            .handle
            .command(Command::EndLanes { worker: 2 })
            .unwrap();
        wait_until("the lane is gone", || stats.lanes_lost.get() == 2);
        frontend.caller.send(rest);
        let reply = frontend.caller.reply();
        assert!(reply.starts_with("Server unavailable:"), "{reply}");
        wait_until("nothing is left", || stats.lane_jobs.get() == 0);
    }
}

#[test]
fn a_caller_who_leaves_in_the_middle_of_a_body_leaves_nothing_behind() {
    for ring in rings() {
        let local = router(ring, |_| {});
        let _worker = echo(&local, 1);
        let stats = stats(&local);
        for whole in [5_000, 100_000, 3 << 20] {
            let mut frontend = Frontend::of(&local);
            let frame = frontend.frame("s", Json, &text(whole));
            frontend.caller.send(&frame[..frame.len() - 10]);
            wait_until("it has begun", || stats.lane_jobs.get() == 1);
            drop(frontend);
            wait_until("it is forgotten", || stats.lane_jobs.get() == 0);
        }
        let mut frontend = Frontend::of(&local);
        assert_eq!(frontend.call(Json, b"1"), [annotated(b"1")]);
    }
}

#[test]
fn stop_and_kill_reach_the_worker() {
    for ring in rings() {
        let (local, (mut worker, _socket), mut frontend) = scene(ring, 1);
        for (word, stop) in [("hand_control_stop", true), ("hand_control_kill", false)] {
            frontend.send("s", Json, b"1");
            let request = next_request(&mut worker);
            worker.item(&request, b"1", ANNOTATED).unwrap();
            let large = text(50_000);
            worker.item(&request, &large, ANNOTATED).unwrap();
            let mut called = frontend.called();
            called.handshake();
            called.prologue_ok();
            assert!(called.item(Json).is_some());
            called.say(&golden(word));
            let event = worker.next(Some(DEADLINE)).unwrap();
            let wanted = match stop {
                true => Event::Stopped(request.key()),
                false => Event::Killed(request.key()),
            };
            assert_eq!(event, wanted);
            assert!(matches!(
                worker.item(&request, b"2", 0),
                Err(LaneError::Over)
            ));
            worker.finish(&request).unwrap();
            while called.message().is_some() {}
        }
        let stats = stats(&local);
        wait_until("all is given back", || {
            (stats.lane_jobs.get(), stats.responses.get()) == (0, 0)
        });
        // All blocks have come back: one as large as the whole area fits.
        frontend.send("s", Json, b"1");
        let request = next_request(&mut worker);
        let whole = text(SLAB_BYTES as usize / 2 - 2);
        worker.item(&request, &whole, ANNOTATED | LAST).unwrap();
        let mut called = frontend.called();
        called.handshake();
        called.prologue_ok();
        assert!(called.items_to_the_end(Json) == [annotated(&whole)]);
    }
}

#[test]
fn a_caller_who_does_not_read_holds_only_his_own_request_back() {
    for ring in rings() {
        let (local, (mut worker, _socket), mut frontend) = scene(ring, 1);
        frontend.send("slow", Json, b"1");
        let slow = next_request(&mut worker);
        let mut called = frontend.called();
        let item = text(100_000);
        // As many as may wait for one caller, and then some for another one.
        for _ in 0..100 {
            worker.item(&slow, &item, ANNOTATED).unwrap();
        }
        let mut other = Frontend::of(&local);
        other.send("fast", Json, b"1");
        let fast = next_request(&mut worker);
        worker.item(&fast, &item, ANNOTATED | LAST).unwrap();
        let mut called_fast = other.called();
        called_fast.handshake();
        called_fast.prologue_ok();
        assert!(called_fast.items_to_the_end(Json) == [annotated(&item)]);
        worker.finish(&slow).unwrap();
        called.handshake();
        called.prologue_ok();
        assert_eq!(called.items_to_the_end(Json).len(), 100);
    }
}

#[test]
fn a_full_slab_is_a_refusal_that_dynamo_understands() {
    for ring in rings() {
        let local = router(ring, |_| {});
        let (here, there) = greet(&local, 1, 1 << 20);
        let mut worker = LaneWorker::over(there.into(), &Options::default()).unwrap();
        let mut frontend = Frontend::of(&local);
        let body = text(300_000);
        frontend.send("s", Json, &body);
        let frame = frontend.frame("t", Json, &body);
        frontend.caller.send(&frame);
        let reply = frontend.caller.reply();
        assert!(reply.starts_with("Server overloaded:"), "{reply}");
        assert_eq!(stats(&local).lane_full.get(), 1);
        let request = next_request(&mut worker);
        worker.finish(&request).unwrap();
        wait_until("the block is free", || stats(&local).lane_jobs.get() == 0);
        frontend.send("s", Json, &body);
        drop(here);
    }
}

/// A worker that writes to the shared memory what it likes.
struct Liar {
    queues: Queues,
    memory: Mapping,
    _socket: UnixStream,
}

fn liar(local: &Local, id: u64) -> Liar {
    let (here, there) = greet(local, id, 1 << 20);
    let (head, fds) = attach::receive(&there).unwrap();
    let map = || Mapping::new(&fds.queues, head.queue_bytes() as u64).unwrap();
    let queues = Queues::new(map(), &head, Side::Worker).unwrap();
    // It wakes the router after whatever it does.
    let wake = fds.wake_router.as_fd().try_clone_to_owned().unwrap();
    std::thread::spawn(move || {
        for _ in 0..20_000 {
            std::thread::sleep(Duration::from_millis(5));
            let _ = rustix::io::write(&wake, &1u64.to_ne_bytes());
        }
    });
    let memory = map();
    drop(here);
    Liar {
        queues,
        memory,
        _socket: there,
    }
}

fn reported(local: &Local) -> (u64, String) {
    let mut found = None;
    wait_until("the lie is found", || {
        while let Some(report) = local.handle.reports.next() {
            if let Report::LaneEnded { worker, why } = report {
                found = Some((worker, why.unwrap_or_default().to_owned()));
            }
        }
        found.is_some()
    });
    found.unwrap()
}

/// Changes what the liar has or says about a request that it has taken.
type Lie = fn(&mut Liar, Descriptor);

/// Words of the report, and the lie.
const LIES: [(&str, Lie); 9] = [
    ("place outside", |liar, mut request| {
        request.kind = (Kind::Item as u16).into();
        liar.queues.post(&request.at(0, 10)).unwrap();
    }),
    ("place outside", |liar, mut request| {
        request.kind = (Kind::Item as u16).into();
        liar.queues.post(&request.at((1 << 20) - 4, 8)).unwrap();
    }),
    ("place outside", |liar, mut request| {
        request.kind = (Kind::Item as u16).into();
        liar.queues
            .post(&request.at(u64::MAX - 3, u32::MAX))
            .unwrap();
    }),
    ("does not have", |liar, mut request| {
        request.kind = (Kind::Finish as u16).into();
        request.generation = (request.generation.get() + 1).into();
        liar.queues.post(&request).unwrap();
    }),
    ("does not have", |liar, mut request| {
        request.kind = (Kind::Finish as u16).into();
        request.request = u32::MAX.into();
        liar.queues.post(&request).unwrap();
    }),
    ("means nothing", |liar, request| {
        liar.queues.post(&request).unwrap();
    }),
    ("is none", |liar, mut request| {
        request.kind = 99.into();
        liar.queues.post(&request).unwrap();
    }),
    ("posted more", |liar, _| {
        assert!(liar.memory.write(256, &1_000_000u32.to_ne_bytes()));
    }),
    ("more words", |liar, mut request| {
        request.kind = (Kind::Fail as u16).into();
        liar.queues.post(&request.at(1 << 19, 5_000)).unwrap();
    }),
];

#[test]
fn every_lie_ends_the_lane_and_its_requests_go_elsewhere() {
    for ring in rings() {
        let local = router(ring, |_| {});
        let honest = echo(&local, 1000);
        let mut frontend = Frontend::of(&local);
        for (index, (wanted, lie)) in LIES.iter().enumerate() {
            let id = index as u64 + 1;
            let mut liar = liar(&local, id);
            // Round robin: of two requests one is the liar's, who takes it.
            let taken = loop {
                frontend.send("s", Json, b"1");
                let mut called = frontend.called();
                called.handshake();
                let mut taken = None;
                wait_until("somebody has it", || {
                    taken = liar.queues.take().unwrap();
                    let served = stats(&local).handled.get();
                    taken.is_some() || served == honest.served.load(Ordering::Relaxed)
                });
                if let Some(taken) = taken {
                    break (taken, called);
                }
            };
            let (request, mut called) = taken;
            lie(&mut liar, request);
            let (worker, why) = reported(&local);
            assert_eq!(worker, id);
            assert!(why.contains(wanted), "{why}");
            assert!(called.error_prologue().contains("died"));
            assert_eq!(frontend.call(Json, b"2"), [annotated(b"2")]);
        }
        assert_eq!(stats(&local).lane_faults.get(), LIES.len() as u64);
        assert_eq!(stats(&local).lanes.get(), 1);
    }
}

#[test]
fn a_worker_that_has_nothing_to_do_keeps_its_lane() {
    for ring in rings() {
        with_growing_times(&TIMES, |time| {
            let local = router(ring, |route| route.ack_timeout_ns = ns(time));
            let _worker = echo(&local, 1);
            let mut frontend = Frontend::of(&local);
            let body = text(50_000);
            // The block of the last item is released while the worker sleeps, who may hear of it
            // late.
            for _ in 0..3 {
                assert!(frontend.call(Json, &body) == [annotated(&body)]);
            }
            let stats = stats(&local);
            // Longer than anybody may take: the timer has looked twice by then.
            let idle = std::time::Instant::now();
            wait_until("it has been idle", || idle.elapsed() > time * 5 / 2);
            assert_eq!((stats.lane_faults.get(), stats.lanes.get()), (0, 1));
            assert!(frontend.call(Json, &body) == [annotated(&body)]);
        });
    }
}

#[test]
fn a_worker_that_takes_nothing_is_given_up_and_another_one_serves() {
    for ring in rings() {
        with_growing_times(&TIMES, |time| an_idle_one_is_given_up(ring, time));
    }
}

fn an_idle_one_is_given_up(ring: RingKind, time: Duration) {
    let local = router(ring, |route| route.ack_timeout_ns = ns(time));
    let _idle = greet(&local, 1, 1 << 20);
    let mut frontend = Frontend::of(&local);
    frontend.send("s", Json, b"1");
    let honest = echo(&local, 2);
    let mut called = frontend.called();
    called.handshake();
    called.prologue_ok();
    assert_eq!(called.items_to_the_end(Json), [annotated(b"1")]);
    assert_eq!(honest.served.load(Ordering::Relaxed), 1);
    let (worker, why) = reported(&local);
    assert!(worker == 1 && why.contains("in time"), "{why}");
    // A counter that runs ahead is found out by the next look at the queue.
    let liar = liar(&local, 3);
    let taken = SUBMISSIONS_TAKEN as u64;
    assert!(liar.memory.write(taken, &77u32.to_ne_bytes()));
    frontend.send("s", Json, b"1");
    frontend.send("s", Json, b"1");
    let (worker, why) = reported(&local);
    assert!(worker == 3 && why.contains("took more"), "{why}");
}
