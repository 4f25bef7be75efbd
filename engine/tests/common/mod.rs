//! Real sockets around a shard: fake workers, raw callers, and waiting for conditions.
#![allow(dead_code, missing_docs, unreachable_pub)]

pub mod plane;

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use corelane_codec::control_message::{
    NewControlMessage, PayloadCodec, RequestType, StreamType, TcpConnection,
};
use corelane_codec::{Decoded, reply_frame, request_frame, two_part};
use corelane_engine::config::{RingKind, ShardConfig};
use corelane_engine::directory::{Ack, Directory, Instance, Policy, Route};
use corelane_engine::executor::{ShardHandle, spawn};
use corelane_engine::shard::Command;

pub const LISTEN: &str = "test/router/generate";
pub const LISTEN_PATH: &str = "0/test/router/generate";
pub const DEADLINE: Duration = Duration::from_secs(60);

/// The rings that this host allows.
pub fn rings() -> Vec<RingKind> {
    let report = corelane_engine::preflight::probe();
    match report.io_uring == corelane_engine::preflight::Cause::Usable
        && std::env::var("CORELANE_IO").as_deref() != Ok("epoll")
    {
        true => vec![RingKind::Uring, RingKind::Epoll],
        false => vec![RingKind::Epoll],
    }
}

/// Waits until `condition` holds; panics with `what` when it does not come true.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < deadline, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Runs a test of a deadline with the first of these times, and with the next one where that
/// fails: a busy machine may keep whoever is to meet the deadline from his CPU for a while, and
/// whoever waits for it to pass waits as long as it is.
pub fn with_growing_times(times: &[Duration], test: impl Fn(Duration)) {
    let (longest, shorter) = times.split_last().unwrap();
    let passes = |time: &Duration| {
        let attempt = std::panic::AssertUnwindSafe(|| test(*time));
        std::panic::catch_unwind(attempt).is_ok()
    };
    if !shorter.iter().any(passes) {
        test(*longest);
    }
}

/// Times for that, where half a second mostly does.
pub const TIMES: [Duration; 4] = [
    Duration::from_millis(500),
    Duration::from_secs(2),
    Duration::from_secs(8),
    Duration::from_secs(30),
];

/// In nanoseconds, as routes have them.
pub fn ns(time: Duration) -> u64 {
    time.as_nanos() as u64
}

/// One shard that routes.
pub struct Router {
    pub handle: ShardHandle,
    pub address: SocketAddr,
}

impl Router {
    pub fn start(ring: RingKind) -> Router {
        Router::with(ring, |_| {})
    }

    pub fn with(ring: RingKind, change: impl FnOnce(&mut ShardConfig)) -> Router {
        let listen = SocketAddr::from(([127, 0, 0, 1], 0));
        let cpu = corelane_engine::placement::affinity().unwrap()[0];
        let mut config = ShardConfig::new(0, cpu, ring, Some(listen));
        config.buffers = 1024;
        change(&mut config);
        let handle = spawn(config).unwrap();
        let address = handle.address.unwrap();
        Router { handle, address }
    }

    /// The counters that are not zero, for messages of failed tests.
    pub fn counters(&self) -> String {
        let cells = self.handle.stats.shard.each();
        let moved = cells.iter().filter(|cell| cell.3 > 0);
        moved
            .map(|cell| format!("{} {}, ", cell.0, cell.3))
            .collect()
    }

    pub fn publish(&self, route: Route) {
        let directory = Arc::new(Directory {
            routes: vec![route],
        });
        let taken = &self.handle.stats.shard.directories;
        let before = taken.get();
        self.handle.command(Command::Directory(directory)).unwrap();
        wait_until("the directory is taken over", || taken.get() > before);
    }

    /// Publishes `workers` and waits until all can be reached.
    pub fn route_to(&self, policy: Policy, ack: Ack, workers: &[&Worker]) {
        self.publish(route(policy, ack, workers));
        let stats = &self.handle.stats.shard;
        let listed = workers.len() as u64;
        wait_until("all instances are connected", || {
            stats.instances_ready.get() == listed
        });
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        self.handle.stop();
    }
}

pub fn route(policy: Policy, ack: Ack, workers: &[&Worker]) -> Route {
    Route {
        listen: LISTEN.into(),
        target: "test/worker/generate".into(),
        paths: vec![LISTEN_PATH.into()],
        policy,
        header: "x-test".into(),
        ack,
        // Where a test needs it to pass it says so: a worker here may be kept from his CPU.
        ack_timeout_ns: 60_000_000_000,
        retries_max: 3,
        hold_bytes: 1 << 20,
        instances: workers
            .iter()
            .map(|worker| worker.instance.clone())
            .collect(),
        ..Route::default()
    }
}

/// What a fake worker does with a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Manner {
    Accept,
    Overloaded,
    Unavailable,
    Silent,
    /// Accepts, but takes its time.
    Late,
    /// Reads nothing at all.
    Deaf,
}

/// A worker that takes frames and does not respond to callers.
pub struct Worker {
    pub instance: Instance,
    pub frames: Arc<Mutex<Vec<Vec<u8>>>>,
    pub taken: Arc<AtomicUsize>,
    streams: Arc<Mutex<Vec<TcpStream>>>,
    listener: TcpListener,
}

impl Worker {
    pub fn start(id: u64, manner: Manner) -> Worker {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let path = format!("{id:x}/test/worker/generate").into_bytes();
        let worker = Worker {
            instance: Instance { id, address, path },
            frames: Arc::default(),
            taken: Arc::default(),
            streams: Arc::default(),
            listener: listener.try_clone().unwrap(),
        };
        let (frames, taken) = (Arc::clone(&worker.frames), Arc::clone(&worker.taken));
        let streams = Arc::clone(&worker.streams);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(stream) = stream else { return };
                streams.lock().unwrap().push(stream.try_clone().unwrap());
                let (frames, taken) = (Arc::clone(&frames), Arc::clone(&taken));
                std::thread::spawn(move || serve(stream, manner, &frames, &taken));
            }
        });
        worker
    }

    pub fn taken(&self) -> usize {
        self.taken.load(Ordering::Relaxed)
    }

    /// As if the process were killed: the listener refuses, the connections are reset.
    pub fn kill(&self) {
        rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both).unwrap();
        for stream in self.streams.lock().unwrap().drain(..) {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }
}

fn serve(mut stream: TcpStream, manner: Manner, frames: &Mutex<Vec<Vec<u8>>>, taken: &AtomicUsize) {
    stream.set_nodelay(true).unwrap();
    if manner == Manner::Deaf {
        std::thread::sleep(Duration::from_secs(3600));
    }
    let mut bytes = Vec::new();
    let mut chunk = vec![0; 256 * 1024];
    while let Ok(read) = stream.read(&mut chunk) {
        if read == 0 {
            return;
        }
        bytes.extend_from_slice(&chunk[..read]);
        let mut replies = Vec::new();
        let mut at = 0;
        while let Decoded::Frame(prefix) = request_frame::decode_prefix(&bytes[at..]) {
            let end = at + prefix.frame_bytes() as usize;
            if end > bytes.len() {
                break;
            }
            frames.lock().unwrap().push(bytes[at..end].to_vec());
            taken.fetch_add(1, Ordering::Relaxed);
            at = end;
            match manner {
                Manner::Accept | Manner::Late => replies.extend_from_slice(&reply_frame::ACCEPTED),
                Manner::Overloaded => reply_frame::write_overloaded(&mut replies),
                Manner::Unavailable => reply_frame::write_unknown_endpoint("x", &mut replies),
                Manner::Silent | Manner::Deaf => {}
            }
        }
        bytes.drain(..at);
        if manner == Manner::Late {
            std::thread::sleep(Duration::from_millis(200));
        }
        if stream.write_all(&replies).is_err() {
            return;
        }
    }
}

/// A raw caller.
pub struct Caller {
    pub stream: TcpStream,
    bytes: Vec<u8>,
}

impl Caller {
    pub fn dial(address: SocketAddr) -> Caller {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        Caller {
            stream,
            bytes: Vec::new(),
        }
    }

    pub fn send(&mut self, frame: &[u8]) {
        self.stream.write_all(frame).unwrap();
    }

    /// The next reply's text.
    pub fn reply(&mut self) -> String {
        loop {
            if let Decoded::Frame(text) = reply_frame::decode(&self.bytes, 1 << 20) {
                let reply = String::from_utf8(self.bytes[text.clone()].to_vec()).unwrap();
                self.bytes.drain(..text.end);
                return reply;
            }
            let mut chunk = [0; 4096];
            let read = self.stream.read(&mut chunk).expect("a reply in time");
            assert!(read > 0, "the router closed the connection");
            self.bytes.extend_from_slice(&chunk[..read]);
        }
    }
}

/// A frame for `path` with a payload that is no envelope.
pub fn frame(path: &str, payload: &[u8]) -> Vec<u8> {
    frame_with(path, b"{\"request-id\":\"r\"}", payload)
}

pub fn frame_with(path: &str, headers: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    request_frame::write_frame(path.as_bytes(), headers, payload, &mut frame).unwrap();
    frame
}

/// An envelope whose caller listens at `address` for `subject`.
pub fn envelope(address: &SocketAddr, subject: &str, body: &[u8]) -> Vec<u8> {
    envelope_in(&address.to_string(), subject, PayloadCodec::Json, body)
}

/// The same with a body in that codec.
pub fn envelope_in(address: &str, subject: &str, codec: PayloadCodec, body: &[u8]) -> Vec<u8> {
    let control = NewControlMessage {
        id: "id-1",
        request_type: RequestType::SingleIn,
        payload_codec: codec,
        connection_info: TcpConnection {
            address,
            subject,
            context: "id-1",
            stream_type: StreamType::Response,
        },
        metadata: &[],
        frontend_send_ts_ns: None,
        request_stream_connection_info: None,
    };
    let mut header = Vec::new();
    control.write(&mut header).unwrap();
    let mut envelope = Vec::new();
    two_part::write(&header, body, &mut envelope);
    envelope
}

/// What is called home at a listener: subject -> all bytes.
pub struct Home {
    pub address: SocketAddr,
    pub calls: Arc<Mutex<HashMap<usize, Vec<u8>>>>,
}

impl Home {
    pub fn listen() -> Home {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let calls: Arc<Mutex<HashMap<usize, Vec<u8>>>> = Arc::default();
        let seen = Arc::clone(&calls);
        std::thread::spawn(move || {
            for (number, stream) in listener.incoming().enumerate() {
                let Ok(mut stream) = stream else { return };
                let seen = Arc::clone(&seen);
                std::thread::spawn(move || {
                    stream
                        .set_read_timeout(Some(Duration::from_millis(300)))
                        .unwrap();
                    let mut bytes = Vec::new();
                    let _ = stream.read_to_end(&mut bytes);
                    seen.lock().unwrap().insert(number, bytes);
                });
            }
        });
        Home { address, calls }
    }

    /// All calls so far as text.
    pub fn texts(&self) -> Vec<String> {
        let calls = self.calls.lock().unwrap();
        calls
            .values()
            .map(|bytes| String::from_utf8_lossy(bytes).into_owned())
            .collect()
    }
}
