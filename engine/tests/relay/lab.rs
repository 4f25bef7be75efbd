//! A relaying router between a hand-made caller and hand-made workers.
#![allow(dead_code, unreachable_pub)]

use std::net::{SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use corelane_codec::call_home;
use corelane_codec::control_message::{
    self, NewControlMessage, PayloadCodec, RequestType, StreamType, TcpConnection,
    TcpConnectionInfo,
};
use corelane_codec::{Decoded, item, request_frame, two_part};
use corelane_engine::config::RingKind;
use corelane_engine::directory::{Ack, Instance, Policy, RelayTimes, Route};
use corelane_engine::stats::Latency;

use crate::common::{self, Caller, DEADLINE, LISTEN_PATH, Router, wait_until};
use crate::ends::{self, Asked, Called, HandWorker};

/// For ever, as far as tests go.
pub const NO_TIMES: RelayTimes = RelayTimes {
    home_ns: 0,
    first_item_ns: 0,
    inactivity_ns: 0,
};

pub struct Lab {
    pub router: Router,
    pub workers: Vec<HandWorker>,
    pub caller: Caller,
    listener: TcpListener,
}

impl Lab {
    pub fn new(ring: RingKind, ack: Ack, workers: usize) -> Lab {
        Lab::with(ring, ack, workers, |_| {})
    }

    pub fn with(ring: RingKind, ack: Ack, workers: usize, change: impl FnOnce(&mut Route)) -> Lab {
        Lab::of(ring, Policy::RoundRobin, ack, workers, change)
    }

    pub fn of(
        ring: RingKind,
        policy: Policy,
        ack: Ack,
        workers: usize,
        change: impl FnOnce(&mut Route),
    ) -> Lab {
        Lab::before(relaying(ring), policy, ack, workers, change)
    }

    pub fn before(
        router: Router,
        policy: Policy,
        ack: Ack,
        workers: usize,
        change: impl FnOnce(&mut Route),
    ) -> Lab {
        let workers: Vec<HandWorker> = (0..workers).map(|_| HandWorker::default()).collect();
        let mut route = common::route(policy, ack, &[]);
        route.relay = Some(NO_TIMES);
        route.instances = (1u64..).zip(&workers).map(instance).collect();
        change(&mut route);
        router.publish(route);
        let ready = &router.handle.stats.shard.instances_ready;
        wait_until("all instances are connected", || {
            ready.get() == workers.len() as u64
        });
        let caller = Caller::dial(router.address);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        Lab {
            router,
            workers,
            caller,
            listener,
        }
    }

    /// Where the caller is called home.
    pub fn home(&self) -> SocketAddr {
        self.listener.local_addr().unwrap()
    }

    pub fn frame(&self, subject: &str, codec: PayloadCodec, body: &[u8]) -> Vec<u8> {
        let address = self.home().to_string();
        common::frame(
            LISTEN_PATH,
            &common::envelope_in(&address, subject, codec, body),
        )
    }

    pub fn ask(&mut self, subject: &str, body: &[u8]) {
        self.ask_in(subject, PayloadCodec::Json, body);
    }

    pub fn ask_in(&mut self, subject: &str, codec: PayloadCodec, body: &[u8]) {
        let frame = self.frame(subject, codec, body);
        self.caller.send(&frame);
    }

    /// Who got the request, and what it is.
    pub fn taker(&mut self) -> (usize, Asked) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            for (index, worker) in self.workers.iter_mut().enumerate() {
                if worker.has_some() {
                    return (index, worker.take());
                }
            }
            assert!(Instant::now() < deadline, "nobody has the request");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// One request that a worker has accepted: who, and what it is.
    pub fn asked(&mut self) -> (usize, Asked) {
        self.ask("s", b"x");
        let (taker, asked) = self.taker();
        self.workers[taker].reply("");
        (taker, asked)
    }

    /// So many envelopes were refused, and the connection serves on.
    pub fn serves_on_after(&mut self, refused: usize) {
        self.ask("s", b"x");
        self.workers[0].take();
        let stats = &self.router.handle.stats.shard;
        assert_eq!(stats.refused_bad_envelope.get(), refused as u64);
    }

    /// The next call home to the caller.
    pub fn called(&self) -> Called {
        ends::accept(&self.listener)
    }

    /// The same laboratory when nobody listens for the caller any more.
    pub fn without_home(&mut self) -> (Caller, &mut HandWorker) {
        self.listener = TcpListener::bind("127.0.0.1:0").unwrap();
        (Caller::dial(self.router.address), &mut self.workers[0])
    }

    pub fn wait_relays(&self, count: u64) {
        let relays = &self.router.handle.stats.shard.relays;
        wait_until("so many are relayed", || relays.get() == count);
    }

    /// Waits until nothing is left of any request.
    pub fn empty(&self) {
        let stats = &self.router.handle.stats.shard;
        let tables = || {
            [
                stats.relays.get(),
                stats.relay_strangers.get(),
                stats.relay_heads.get(),
                stats.in_flight.get(),
                stats.chunks.get(),
                stats.pieces.get(),
            ]
        };
        let deadline = Instant::now() + DEADLINE;
        while tables() != [0; 6] {
            let left = self.router.counters();
            assert!(Instant::now() < deadline, "something is left: {left}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn instance((id, worker): (u64, &HandWorker)) -> Instance {
    Instance {
        id,
        address: worker.address(),
        path: format!("{id:x}/test/worker/generate").into_bytes(),
    }
}

/// A router that workers can call home.
pub fn relaying(ring: RingKind) -> Router {
    Router::with(ring, |config| config.relay_home = Some(ends::home()))
}

/// So many items of the usual type.
pub fn items(count: usize, codec: PayloadCodec) -> Vec<u8> {
    let mut out = Vec::new();
    for number in 0..count {
        let mut data = Vec::new();
        let value = item::Annotated::from_data(number as u64);
        item::write_value(&value, codec, &mut data).unwrap();
        item::write_frame(&data, codec, &mut out);
    }
    out
}

/// A whole response, from the prologue to the sentinel.
pub fn answer(count: usize, codec: PayloadCodec) -> Vec<u8> {
    let mut out = call_home::PROLOGUE_OK_FRAME.to_vec();
    out.extend(items(count, codec));
    out.extend(call_home::final_marker_frame(codec));
    out.extend(call_home::SENTINEL_FRAME);
    out
}

/// All bytes up to the sentinel, as they come.
pub fn drained(called: &mut Called) -> Vec<u8> {
    let mut out = Vec::new();
    while let Some((header, body)) = called.message() {
        two_part::write(&header, &body, &mut out);
        if header == call_home::SENTINEL {
            return out;
        }
    }
    panic!(
        "it ends without a sentinel: {:?}",
        String::from_utf8_lossy(&out)
    );
}

/// How many latencies were counted.
pub fn total(latency: &Latency) -> u64 {
    latency.counts().iter().map(|(_, count)| count).sum()
}

/// An envelope with another text in its control message.
pub fn replaced(envelope: &[u8], from: &str, to: &str) -> Vec<u8> {
    let message = two_part::decode(envelope, None).frame().unwrap();
    let header = std::str::from_utf8(&envelope[message.header]).unwrap();
    assert!(header.contains(from), "{header} has no {from}");
    let mut out = Vec::new();
    two_part::write(
        header.replace(from, to).as_bytes(),
        &envelope[message.body],
        &mut out,
    );
    out
}

/// The envelope of a bidirectional call.
pub fn two_way_envelope(address: &str) -> Vec<u8> {
    let info = |subject, stream_type| TcpConnection {
        address,
        subject,
        context: "id-1",
        stream_type,
    };
    let control = NewControlMessage {
        id: "id-1",
        request_type: RequestType::ManyIn,
        payload_codec: PayloadCodec::Json,
        connection_info: info("the-response", StreamType::Response),
        metadata: &[("tenant", "alpha")],
        frontend_send_ts_ns: None,
        request_stream_connection_info: Some(info("the-request", StreamType::Request)),
    };
    let mut header = Vec::new();
    control.write(&mut header).unwrap();
    let mut envelope = Vec::new();
    two_part::write(&header, b"", &mut envelope);
    envelope
}

/// A bidirectional request as a worker reads it.
pub struct TwoWay {
    pub response: Asked,
    pub request_subject: String,
    request_address: SocketAddr,
}

impl TwoWay {
    /// Dials for the request stream.
    pub fn open_request(&self) -> Called {
        let dialled = Asked {
            path: String::new(),
            headers: String::new(),
            address: self.request_address,
            subject: self.request_subject.clone(),
            input: None,
            body: Vec::new(),
        };
        let mut called = dialled.dial();
        let mut out = Vec::new();
        call_home::write_handshake(&self.request_subject, StreamType::Request, &mut out);
        called.say(&out);
        called.stream.shutdown(std::net::Shutdown::Write).unwrap();
        called
    }
}

impl HandWorker {
    /// The same for a bidirectional call.
    pub fn take_two_way(&mut self) -> TwoWay {
        let frame = self.take_frame();
        let Decoded::Frame(frame) = request_frame::decode_strict(&frame) else {
            panic!("no frame");
        };
        let parts = two_part::decode(frame.payload, None).frame().unwrap();
        assert!(parts.body.is_empty());
        let control = control_message::decode(&frame.payload[parts.header]).unwrap();
        assert_eq!(control.metadata, Some(&b"{\"tenant\":\"alpha\"}"[..]));
        let read = |info: &control_message::ConnectionInfo<'_>| {
            let mut scratch = [0; 1024];
            let info = TcpConnectionInfo::parse(info, &mut scratch).unwrap();
            (
                info.socket_addr().unwrap(),
                info.subject.to_cow().into_owned(),
            )
        };
        let (address, subject) = read(&control.connection_info);
        let request = control.request_stream_connection_info.unwrap();
        let (request_address, request_subject) = read(&request);
        TwoWay {
            response: Asked {
                path: frame.path.into(),
                headers: String::new(),
                address,
                subject,
                input: None,
                body: Vec::new(),
            },
            request_subject,
            request_address,
        }
    }
}
