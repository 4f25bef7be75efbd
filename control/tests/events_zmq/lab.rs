//! What the tests share: event planes on one store, and a publisher made by hand.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use corelane::component::{Events, ZmqOptions};
use corelane::discovery::{Discovery, Entry, MemoryDiscovery, MemoryStore, Record};
use corelane_codec::Decoded;
use corelane_codec::event::{
    CHANNELS_BUCKET, Envelope, EventChannelRecord, EventKey, EventTransport, Scope, ZmqChannel,
    frame,
};
use corelane_codec::zmtp;
use corelane_engine::config::RingKind;
use corelane_engine::preflight;

/// The longest that anything here may take.
pub(crate) const DEADLINE: Duration = Duration::from_secs(300);

/// The ring of `CORELANE_IO`, or the best of this host.
pub(crate) fn ring() -> RingKind {
    let io = std::env::var("CORELANE_IO").ok();
    let io = io.map_or(preflight::Io::Auto, |io| io.parse().unwrap());
    preflight::choose(io, &preflight::probe()).unwrap().ring
}

/// How events go here, unless a test says otherwise.
pub(crate) fn options() -> ZmqOptions {
    ZmqOptions::local(ring())
}

/// The event plane of one process, and its discovery.
pub(crate) fn plane(store: &MemoryStore, options: ZmqOptions) -> (Events, Discovery) {
    let discovery = Discovery::Memory(MemoryDiscovery::new(store));
    (Events::zmq(&discovery, options), discovery)
}

pub(crate) fn scope() -> Scope {
    Scope::endpoint("demo", "backend", "generate")
}

/// Runs a test inside a `LocalSet`, bounded.
pub(crate) fn run(test: impl Future<Output = ()>) {
    let tokio = tokio::runtime::Builder::new_current_thread();
    let tokio = { tokio }.enable_all().build().unwrap();
    let bounded = async { tokio::time::timeout(DEADLINE, test).await.expect("in time") };
    tokio::task::LocalSet::new().block_on(&tokio, bounded);
}

/// Waits for a condition that somebody else makes true.
pub(crate) async fn until(what: &str, condition: impl Fn() -> bool) {
    let waiting = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let waited = tokio::time::timeout(DEADLINE, waiting).await;
    assert!(waited.is_ok(), "not in time: {what}");
}

/// An envelope of Dynamo's form.
pub(crate) fn envelope(publisher_id: u64, sequence: u64, topic: &str) -> Vec<u8> {
    let envelope = Envelope {
        publisher_id,
        sequence,
        published_at_ms: 1,
        topic,
        payload: b"p",
    };
    let mut out = Vec::new();
    envelope.write(&mut out).unwrap();
    out
}

/// A message of any parts.
pub(crate) fn multipart(parts: &[&[u8]]) -> Vec<u8> {
    let mut out = Vec::new();
    for (place, part) in parts.iter().enumerate() {
        zmtp::write_head(part.len(), place + 1 < parts.len(), &mut out);
        out.extend_from_slice(part);
    }
    out
}

/// A message as a good publisher writes it, with this envelope.
pub(crate) fn message(topic: &str, publisher_id: u64, sequence: u64, envelope: &[u8]) -> Vec<u8> {
    let mut framed = Vec::new();
    frame::write(envelope, &mut framed).unwrap();
    let (id, number) = (publisher_id.to_be_bytes(), sequence.to_be_bytes());
    multipart(&[topic.as_bytes(), &id, &number, &framed])
}

/// A PUB socket by hand.
pub(crate) struct Publisher {
    listener: TcpListener,
}

impl Publisher {
    pub(crate) fn new() -> Publisher {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        Publisher { listener }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.listener.local_addr().unwrap()
    }

    /// Its channel record.
    pub(crate) fn record(&self, scope: &Scope, topic: &str, publisher_id: u64) -> Record {
        let key = EventKey {
            scope: scope.clone(),
            topic: topic.to_owned(),
            publisher_id,
        };
        let endpoint = format!("tcp://{}", self.address());
        let record = EventChannelRecord::new(&key, EventTransport::Zmq(ZmqChannel { endpoint }));
        Record::new(format!("by hand {publisher_id}"), move |_| Entry {
            key: key.in_bucket(CHANNELS_BUCKET),
            value: serde_json::to_vec(&record).unwrap(),
        })
    }

    /// Takes the next connection, shakes hands, and waits for this subscription. Blocks.
    pub(crate) fn accept(&self, wanted: &str) -> TcpStream {
        let (mut stream, _) = self.listener.accept().unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.write_all(&zmtp::greeting()).unwrap();
        let mut greeting = [0; zmtp::GREETING_BYTES];
        stream.read_exact(&mut greeting).unwrap();
        let mut ready = Vec::new();
        zmtp::write_ready("PUB", &mut ready);
        stream.write_all(&ready).unwrap();
        assert!(frame_of(&mut stream).1.starts_with(b"\x05READY"));
        let (command, body) = frame_of(&mut stream);
        assert!(command);
        let subscribe = zmtp::decode_command(&body).unwrap();
        assert_eq!(subscribe, zmtp::Command::Subscribe(wanted.as_bytes()));
        stream
    }

    /// The same off this thread, so that others go on.
    pub(crate) async fn accepted(self, wanted: &'static str) -> (Publisher, TcpStream) {
        let accept = move || {
            let stream = self.accept(wanted);
            (self, stream)
        };
        tokio::task::spawn_blocking(accept).await.unwrap()
    }
}

fn frame_of(stream: &mut TcpStream) -> (bool, Vec<u8>) {
    let mut have = Vec::new();
    loop {
        let mut byte = [0];
        match zmtp::decode_head(&have, 1 << 20) {
            Decoded::Frame(head) => {
                let mut body = vec![0; head.body_bytes];
                stream.read_exact(&mut body).unwrap();
                return (head.command, body);
            }
            Decoded::Need(_) => stream.read_exact(&mut byte).unwrap(),
            Decoded::Bad(bad) => panic!("{bad}"),
        }
        have.push(byte[0]);
    }
}
