//! A warm request allocates nothing: an allocator counts what the thread of the shard takes.

#[path = "common/ends.rs"]
mod ends;

mod common;
#[path = "relay/lab.rs"]
mod lab;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::*;
use corelane_codec::control_message::PayloadCodec;
use corelane_codec::event::block_hash;
use corelane_engine::buffers::Buffers;
use corelane_engine::config::{RingKind, ShardConfig};
use corelane_engine::directory::{Ack, Directory, Instance, KvRule, Policy, Route};
use corelane_engine::executor::listen;
use corelane_engine::kv::{Batch, Change, RankId, Stored};
use corelane_engine::mesh::{self, Sender};
use corelane_engine::ring::uring::{Settings, Uring};
use corelane_engine::served::Tracing;
use corelane_engine::shard::{Command, Lanes, Shard};
use corelane_engine::stats::Stats;

/// The system's allocator, with a count of the allocations of shards.
struct Counting;

static BY_SHARDS: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// Whether this thread is a shard's. Unknown until its first allocation.
    static IS_SHARD: Cell<Option<bool>> = const { Cell::new(None) };
}

/// Looks at the thread's name, which costs no memory.
fn is_shard() -> bool {
    IS_SHARD.with(|known| match known.get() {
        Some(known) => known,
        None => {
            let mut name = [0u8; 16];
            // SAFETY: the kernel writes 16 bytes at most.
            unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
            let is_shard = name.starts_with(b"shard");
            // A thread that has just begun has no name of its own yet.
            if is_shard {
                known.set(Some(true));
            }
            is_shard
        }
    })
}

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's contract is that of the system's allocator.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(memory, layout, bytes) }
    }
}

fn count() {
    if is_shard() {
        BY_SHARDS.fetch_add(1, Ordering::Relaxed);
        if WATCHED.swap(false, Ordering::Relaxed) {
            eprintln!("{}", std::backtrace::Backtrace::force_capture());
        }
    }
}

/// Where the next allocation of a shard comes from is shown; see `CORELANE_TRACE`.
static WATCHED: AtomicBool = AtomicBool::new(false);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const REQUESTS: usize = 2_048;
const WARM_UP: usize = 2_048;

/// Sends `count` requests over the callers in turn, up to eight at a time on each.
fn exchange(callers: &mut [Caller], frame: &[u8], count: usize) {
    const BURST: usize = 8;
    let burst = frame.repeat(BURST);
    for _ in 0..count / (callers.len() * BURST) {
        for caller in callers.iter_mut() {
            caller.send(&burst);
        }
        for caller in callers.iter_mut() {
            for _ in 0..BURST {
                assert_eq!(caller.reply(), "");
            }
        }
    }
}

/// A shard on io_uring that is driven by a plain thread: no executor allocates beside it.
struct Bare {
    address: SocketAddr,
    stats: Arc<Stats>,
    commands: Sender<Command>,
    thread: Option<JoinHandle<()>>,
}

impl Bare {
    fn start() -> Bare {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut config = ShardConfig::new(0, 0, RingKind::Uring, Some(any));
        config.buffers = 1024;
        // Half of all requests have a span: neither they nor the others take memory.
        config.spans = Tracing::On { ratio: 0.5 };
        let listener = listen(any, false, false).unwrap();
        let address = listener.local_addr().unwrap();
        let (commands, command_receiver) = mesh::lane().unwrap();
        let (report_sender, _) = mesh::lane().unwrap();
        let stats = Arc::new(Stats::new(4096));
        let shown = Arc::clone(&stats);
        let drive = move || {
            let bytes = config.buffer_bytes as usize;
            let buffers = Buffers::new(config.buffers, bytes).unwrap();
            let settings = Settings {
                entries: 512,
                files: config.connections_max,
            };
            let ring = Uring::new(settings, &buffers).unwrap();
            let listener = Some(listener);
            let lanes = Lanes {
                commands: command_receiver,
                reports: report_sender,
                insecure: mesh::lane().unwrap().0,
                outbound: mesh::lane().unwrap().0,
            };
            let mut shard = Shard::router(config, ring, buffers, listener, shown, lanes);
            let home = listen(any, false, false).unwrap();
            let home_address = home.local_addr().unwrap();
            shard.relay_home(home, home_address);
            shard.start();
            while !shard.is_stopping() {
                shard.tick(Duration::from_millis(50)).unwrap();
            }
        };
        let thread = std::thread::Builder::new().name("shard-0".into());
        Bare {
            address,
            stats,
            commands,
            thread: Some(thread.spawn(drive).unwrap()),
        }
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        self.commands.send(Command::Stop).unwrap();
        let _ = self.thread.take().unwrap().join();
    }
}

/// Allocations of the shard at `address` for [`REQUESTS`] warm requests.
fn allocated(address: SocketAddr, connections: usize) -> u64 {
    let home = SocketAddr::from(([127, 0, 0, 1], 9));
    // Both ways of telling a prompt: a header is believed before a body.
    let mut headers = br#"{"request-id":"r","x-test":"session-7""#.to_vec();
    if connections == 1 {
        headers.extend(br#","x-corelane-block-hashes":"AQAAAAAAAAACAAAAAAAAAA==""#);
    }
    headers.push(b'}');
    let body = br#"{"model":"m","token_ids":[1,2,3,4,5,6,7,8,9],"more":"..............."}"#;
    let frame = frame_with(LISTEN_PATH, &headers, &envelope(&home, "s", body));
    let mut callers: Vec<Caller> = (0..connections).map(|_| Caller::dial(address)).collect();
    exchange(&mut callers, &frame, WARM_UP);
    let before = BY_SHARDS.load(Ordering::Relaxed);
    WATCHED.store(
        std::env::var_os("CORELANE_TRACE").is_some(),
        Ordering::Relaxed,
    );
    exchange(&mut callers, &frame, REQUESTS);
    WATCHED.store(false, Ordering::Relaxed);
    BY_SHARDS.load(Ordering::Relaxed) - before
}

/// One test, so that no other shard runs meanwhile. With `CORELANE_TRACE` set it shows where the
/// first allocation of a warm shard comes from.
#[test]
fn a_warm_request_allocates_nothing() {
    for ring in rings() {
        for ack in [Ack::OnForward, Ack::OnAccept] {
            for policy in [
                Policy::RoundRobin,
                Policy::PowerOfTwoChoices,
                Policy::LeastLoaded,
                Policy::Hash,
                Policy::Kv,
            ] {
                let workers = [
                    Worker::start(1, Manner::Accept),
                    Worker::start(2, Manner::Accept),
                ];
                let mut route = route(policy, ack, &[&workers[0], &workers[1]]);
                route.kv = (policy == Policy::Kv).then_some(CACHES);
                for connections in [1, 16] {
                    let counted = match ring {
                        RingKind::Uring => on_bare_ring(&route, connections),
                        RingKind::Epoll => {
                            let router = Router::start(ring);
                            router.publish(route.clone());
                            let ready = &router.handle.stats.shard.instances_ready;
                            wait_until("all are connected", || ready.get() == 2);
                            router.handle.command(stored()).unwrap();
                            allocated(router.address, connections)
                        }
                    };
                    let what = format!("{ring:?} {ack:?} {policy:?} {connections}");
                    assert_eq!(counted, 0, "{what}");
                }
                wait_until("the workers have all", || {
                    workers[0].taken() + workers[1].taken() == 2 * (WARM_UP + REQUESTS)
                });
            }
        }
        relayed(ring);
        under_its_executor(ring);
    }
}

/// A relayed response, with its two sockets.
fn relayed(ring: RingKind) {
    const RESPONSES: usize = 256;
    let mut worker = ends::HandWorker::default();
    let mut route = route(Policy::LeastLoaded, Ack::OnForward, &[]);
    route.relay = Some(lab::NO_TIMES);
    let (id, address, path) = (1, worker.address(), b"1/x".to_vec());
    route.instances = vec![Instance { id, address, path }];
    let (bare, router);
    let (address, stats, publish): (_, _, Box<dyn Fn(Arc<Directory>)>) = match ring {
        RingKind::Uring => {
            bare = Bare::start();
            let publish = |directory| bare.commands.send(Command::Directory(directory)).unwrap();
            (bare.address, &bare.stats, Box::new(publish))
        }
        RingKind::Epoll => {
            router = lab::relaying(ring);
            let publish = |directory| {
                router
                    .handle
                    .command(Command::Directory(directory))
                    .unwrap()
            };
            (router.address, &router.handle.stats, Box::new(publish))
        }
    };
    publish(Arc::new(Directory {
        routes: vec![route],
    }));
    wait_until("the instance is connected", || {
        stats.shard.instances_ready.get() == 1
    });
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let home = listener.local_addr().unwrap().to_string();
    let json = PayloadCodec::Json;
    let frame = frame(
        LISTEN_PATH,
        &envelope_in(&home, "a-subject", json, &[7; 300]),
    );
    let answer = lab::answer(8, json);
    let mut caller = Caller::dial(address);
    let mut exchange = |count: usize| {
        for _ in 0..count {
            caller.send(&frame);
            let mut worker = {
                let asked = worker.take();
                worker.reply("");
                asked.call_home()
            };
            worker.say(&answer);
            let mut called = ends::accept(&listener);
            called.handshake();
            assert_eq!(lab::drained(&mut called), answer);
            assert_eq!(caller.reply(), "");
        }
    };
    exchange(RESPONSES);
    let before = BY_SHARDS.load(Ordering::Relaxed);
    WATCHED.store(
        std::env::var_os("CORELANE_TRACE").is_some(),
        Ordering::Relaxed,
    );
    exchange(RESPONSES);
    WATCHED.store(false, Ordering::Relaxed);
    let counted = BY_SHARDS.load(Ordering::Relaxed) - before;
    assert_eq!(counted, 0, "{ring:?}, relayed");
    wait_until("nothing is left", || stats.shard.relays.get() == 0);
}

fn on_bare_ring(route: &Route, connections: usize) -> u64 {
    let bare = Bare::start();
    let directory = Arc::new(Directory {
        routes: vec![route.clone()],
    });
    bare.commands.send(Command::Directory(directory)).unwrap();
    let ready = &bare.stats.shard.instances_ready;
    wait_until("all instances are connected", || {
        ready.get() == route.instances.len() as u64
    });
    bare.commands.send(stored()).unwrap();
    allocated(bare.address, connections)
}

/// Bodies are looked into, and one instance has a part of the prompt.
const CACHES: KvRule = KvRule {
    feed: 0,
    block_tokens: 4,
    body_bytes_max: 4096,
    blocks_max: 1024,
    ranks_max: 64,
    overlap_credit_pct: 100,
    prefill_scale_pct: 100,
    temperature_pct: 50,
};

fn stored() -> Command {
    let hashes = [1, 2, block_hash(&[1, 2, 3, 4])];
    let block = |tokens: &u64| Stored {
        block: *tokens,
        tokens: *tokens,
    };
    let change = |blocks| Change::Stored {
        rank: RankId {
            worker_id: 1,
            dp_rank: 0,
        },
        parent: None,
        blocks,
    };
    Command::Kv(Arc::new(Batch {
        feed: CACHES.feed,
        changes: vec![change(0..2), change(2..3)],
        stored: hashes.iter().map(block).collect(),
        removed: vec![],
    }))
}

/// A turn of glommio's own allocates a little, at most once in a millisecond while the shard is
/// hot; requests still do not.
fn under_its_executor(ring: RingKind) {
    const PER_TURN: u64 = 4;
    let worker = Worker::start(1, Manner::Accept);
    let router = Router::start(ring);
    router.route_to(Policy::RoundRobin, Ack::OnForward, &[&worker]);
    let begin = Instant::now();
    let counted = allocated(router.address, 16);
    let turns = begin.elapsed().as_millis() as u64 + 1;
    assert!(counted <= PER_TURN * turns, "{counted} in {turns} turns");
}
