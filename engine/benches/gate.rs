//! What `scripts/gate` counts: instructions of the codec's decoders, and of a shard's tick for each
//! request that it routes, under callgrind. Counts hang on the compiler and the C library, not on
//! how busy a machine is.
//!
//! The shard is the real one on the simulated ring, so its tick includes what the simulation does
//! in place of the kernel; callers and workers, who are simulated too, are left out.

#![allow(missing_docs, unused_qualifications)]

use std::hint::black_box;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use corelane_codec::control_message::{
    self, NewControlMessage, PayloadCodec, RequestType, StreamType, TcpConnection,
    TcpConnectionInfo,
};
use corelane_codec::event::{Envelope, frame, multipart, topic};
use corelane_codec::limits::MESSAGE_BYTES_MAX_DEFAULT;
use corelane_codec::{headers, reply_frame, request_frame, two_part};
use corelane_engine::buffers::Buffers;
use corelane_engine::config::{RingKind, ShardConfig};
use corelane_engine::directory::{Ack, Directory, Instance, Policy, Route};
use corelane_engine::mesh::{self, Receiver, Sender};
use corelane_engine::ring::sim::{Faults, ListenerId, Net, PeerId, Sim};
use corelane_engine::shard::{Command, Lanes, Report, Shard};
use corelane_engine::stats::Stats;
use gungraun::{
    Callgrind, EntryPoint, LibraryBenchmarkConfig, library_benchmark, library_benchmark_group, main,
};

/// Requests, or calls of a decoder, in each count.
const TIMES: usize = 256;
const PATH: &str = "0/gate/router/generate";
/// As long as the other, so that a request is as long on its way out.
const WORKER_PATH: &str = "1/gate/worker/generate";
const ID: &str = "5eed0000-0000-4000-8000-000000000001";

fn request(body_bytes: usize) -> Vec<u8> {
    let mut control = Vec::new();
    let message = NewControlMessage {
        id: ID,
        request_type: RequestType::SingleIn,
        payload_codec: PayloadCodec::MessagePack,
        connection_info: TcpConnection {
            address: "10.0.0.3:9",
            subject: ID,
            context: ID,
            stream_type: StreamType::Response,
        },
        metadata: &[],
        frontend_send_ts_ns: None,
        request_stream_connection_info: None,
    };
    message.write(&mut control).expect("constants have a form");
    let (mut payload, mut head, mut bytes) = (Vec::new(), Vec::new(), Vec::new());
    two_part::write(&control, &vec![b'x'; body_bytes], &mut payload);
    headers::write(&[("x-endpoint-path", PATH), ("request-id", ID)], &mut head);
    request_frame::write_frame(PATH.as_bytes(), &head, &payload, &mut bytes)
        .expect("constants have a form");
    bytes
}

fn event(payload_bytes: usize) -> Vec<u8> {
    let mut out = Vec::new();
    let envelope = Envelope {
        publisher_id: 7,
        sequence: 70_000,
        published_at_ms: 1_795_289_986_740,
        topic: topic::KV_EVENTS,
        payload: &vec![7; payload_bytes],
    };
    multipart::write_frame(&envelope, &mut out).expect("constants have a form");
    out
}

// A request's frame, found, and its request id looked up.
#[library_benchmark]
#[bench::bytes_128(request(128))]
fn decode_request(bytes: Vec<u8>) {
    for _ in 0..TIMES {
        let Some(read) = request_frame::decode_strict(black_box(&bytes)).frame() else {
            return;
        };
        let _ = black_box(headers::find(read.headers, "request-id"));
    }
}

// A request's envelope, its control message, and where its caller is.
#[library_benchmark]
#[bench::bytes_128(request(128))]
fn decode_envelope(bytes: Vec<u8>) {
    let mut scratch = [0; 1024];
    for _ in 0..TIMES {
        let Some(read) = request_frame::decode_strict(black_box(&bytes)).frame() else {
            return;
        };
        let Some(envelope) = two_part::decode(read.payload, None).frame() else {
            return;
        };
        if let Ok(control) = control_message::decode(&read.payload[envelope.header]) {
            let home = TcpConnectionInfo::parse(&control.connection_info, &mut scratch);
            let _ = black_box(home.map(|home| home.socket_addr()));
        }
    }
}

#[library_benchmark]
#[bench::refused(b"\0\0\0\x10instance is busy".to_vec())]
fn decode_reply(bytes: Vec<u8>) {
    for _ in 0..TIMES {
        let _ =
            black_box(reply_frame::decode(black_box(&bytes), MESSAGE_BYTES_MAX_DEFAULT).frame());
    }
}

#[library_benchmark]
#[bench::bytes_200(event(140))]
fn decode_event(bytes: Vec<u8>) {
    for _ in 0..TIMES {
        let _ = black_box(frame::payload(black_box(&bytes)).map(Envelope::decode));
    }
}

/// A shard, its caller, and its worker.
struct Routing {
    net: Net,
    shard: Shard<Sim>,
    caller: PeerId,
    worker: PeerId,
    request: Vec<u8>,
    _commands: Sender<Command>,
    _reports: Receiver<Report>,
    _stats: Arc<Stats>,
}

/// What is counted; by its name, see `main`.
#[inline(never)]
fn counted_tick(shard: &mut Shard<Sim>) {
    drop(black_box(shard.tick(TICK)));
}

impl Routing {
    /// A shard that has routed some requests already.
    fn start(ack: Ack, body_bytes: usize) -> Routing {
        let at = |text: &str| text.parse::<SocketAddr>().expect("constant");
        let (router, worker) = (at("10.0.0.1:1"), at("10.0.0.2:1"));
        let mut config = ShardConfig::new(0, 0, RingKind::Epoll, None);
        config.connections_max = 64;
        // Small ones: the simulation overwrites each that is given back, which is not to drown
        // everything else.
        (config.buffers, config.buffer_bytes) = (256, 1024);
        let net = Net::new(1, Faults::NONE);
        let buffers = Buffers::new(config.buffers, config.buffer_bytes as usize).expect("memory");
        let ring = Sim::beside(&net, &buffers);
        let listener = TcpListener::from(net.listen(router).expect("a simulated listener"));
        let (commands, command_receiver) = mesh::lane().expect("memory");
        let (report_sender, reports) = mesh::lane().expect("memory");
        let stats = Arc::new(Stats::default());
        let lanes = Lanes {
            commands: command_receiver,
            reports: report_sender,
            insecure: mesh::lane().expect("memory").0,
            outbound: mesh::lane().expect("memory").0,
        };
        let shown = Arc::clone(&stats);
        let mut shard = Shard::router(config, ring, buffers, Some(listener), shown, lanes);
        let listening = net.peer_listen(worker);
        shard.start();
        let directory = Directory {
            routes: vec![route(ack, worker)],
        };
        commands.send(Command::Directory(Arc::new(directory))).ok();
        let (worker, caller) = connect(&net, &mut shard, listening, router);
        let mut routing = Routing {
            net,
            shard,
            caller,
            worker,
            request: request(body_bytes),
            _commands: commands,
            _reports: reports,
            _stats: stats,
        };
        routing.exchange(64, 8, |shard| drop(shard.tick(TICK)));
        routing
    }

    /// So many requests, `burst` of them at a time; each is answered before the next burst.
    fn exchange(&mut self, count: usize, burst: usize, tick: fn(&mut Shard<Sim>)) {
        let requests = self.request.repeat(burst);
        for _ in 0..count / burst {
            let (mut sent, mut arrived, mut answered, mut acks) = (0, 0, 0, 0);
            for _ in 0..STEPS_MAX {
                sent += self.net.peer_write(self.caller, &requests[sent..]);
                tick(&mut self.shard);
                arrived += self.net.peer_read(self.worker, 1 << 20).len();
                let whole = arrived / self.request.len();
                let replies = vec![0; REPLY_BYTES * (whole - answered)];
                self.net.peer_write(self.worker, &replies);
                answered = whole;
                acks += self.net.peer_read(self.caller, 1 << 20).len() / REPLY_BYTES;
                if acks == burst && answered == burst {
                    break;
                }
            }
            assert_eq!((answered, acks), (burst, burst), "requests were lost");
        }
    }
}

/// The longest wait of a tick, in simulated time.
const TICK: Duration = Duration::from_millis(1);
/// Ticks that anything here may take.
const STEPS_MAX: usize = 10_000;
/// An empty reply.
const REPLY_BYTES: usize = 4;

fn route(ack: Ack, worker: SocketAddr) -> Route {
    Route {
        listen: "gate/router/generate".into(),
        target: "gate/worker/generate".into(),
        paths: vec![PATH.into()],
        policy: Policy::LeastLoaded,
        ack,
        ack_timeout_ns: 60_000_000_000,
        retries_max: 3,
        hold_bytes: 1 << 20,
        instances: vec![Instance {
            id: 1,
            address: worker,
            path: WORKER_PATH.into(),
        }],
        ..Route::default()
    }
}

/// The worker's end of the shard's connection to it, and a caller's end.
fn connect(
    net: &Net,
    shard: &mut Shard<Sim>,
    listening: ListenerId,
    router: SocketAddr,
) -> (PeerId, PeerId) {
    let caller = net.peer_connect(router).expect("the shard listens");
    for _ in 0..STEPS_MAX {
        let _ = shard.tick(TICK);
        if let Some(worker) = net.peer_accept(listening) {
            // The shard hears of it, and takes the caller in.
            for _ in 0..16 {
                let _ = shard.tick(TICK);
            }
            return (worker, caller);
        }
    }
    panic!("the shard never connected to its worker");
}

// Ticks for so many requests, one at a time and in bursts.
#[library_benchmark]
#[bench::alone(Routing::start(Ack::OnForward, 128), 1)]
#[bench::burst_16(Routing::start(Ack::OnForward, 128), 16)]
#[bench::on_accept(Routing::start(Ack::OnAccept, 128), 1)]
#[bench::bytes_8192(Routing::start(Ack::OnForward, 8192), 1)]
fn tick(mut routing: Routing, burst: usize) -> Routing {
    routing.exchange(TIMES, burst, counted_tick);
    routing
}

library_benchmark_group!(
    name = decode,
    benchmarks = [decode_request, decode_envelope, decode_reply, decode_event]
);
library_benchmark_group!(
    name = shard,
    config = LibraryBenchmarkConfig::default()
        .tool(Callgrind::default().entry_point(EntryPoint::Custom("*::counted_tick".into()))),
    benchmarks = tick
);
main!(library_benchmark_groups = [decode, shard]);
