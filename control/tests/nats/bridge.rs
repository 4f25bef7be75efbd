//! The bridge of events between a real NATS server, another broker, and peers on plain TCP.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use async_nats::Client;
use bytes::BytesMut;
use corelane::bridge::Bridge;
use corelane::broker::Broker;
use corelane::config::{Config, Host, Inputs, Main, Purpose, load};
use corelane::env::Env;
use corelane::nats::Nats;
use corelane_codec::Decoded;
use corelane_codec::event::hello::{Role, Verdict, decode_answer, write_hello};
use corelane_codec::event::{Envelope, frame, multipart};
use corelane_engine::config::RingKind;
use corelane_engine::events::Security;
use futures_util::StreamExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::spawn_local;
use tokio::time::sleep;

use crate::lab::{NatsServer, run};

const SCOPE: &str = "namespace.demo.component.a.endpoint.e";
const TOPIC: &str = "kv_metrics";

/// A broker with all doors, and what `[events]` says besides.
fn broker(more: &str) -> (Rc<Broker>, Config) {
    let text = format!(
        "[server]\nhost = \"127.0.0.1\"\n[events]\nbroker = true\nxsub = \"tcp://127.0.0.1:0\"\n\
         xpub = \"tcp://127.0.0.1:0\"\ntcp = \"tcp://127.0.0.1:0\"\n{more}"
    );
    let checked = load(&Inputs {
        purpose: Purpose::Serve,
        main: Main::Text {
            name: "c.toml".into(),
            text,
        },
        overrides: Vec::new(),
        env: Env::default(),
        host: Host::current(),
    });
    let problems: Vec<String> = checked.problems.iter().map(ToString::to_string).collect();
    let config = checked.config.unwrap_or_else(|| panic!("{problems:?}"));
    let settings = config.broker.clone().unwrap();
    let broker = Broker::start(&config, &settings, RingKind::Epoll).unwrap();
    (broker, config)
}

/// A broker with a bridge.
async fn bridged(server: &NatsServer, more: &str) -> (Rc<Broker>, Rc<Bridge>) {
    let (broker, config) = broker(more);
    let settings = config.broker.unwrap().bridge.unwrap();
    let bridge = Bridge::start(&settings, &server.options(), Security::Null, &broker).await;
    (broker, bridge.unwrap())
}

fn metrics(bridge: &Bridge) -> String {
    let mut out = String::new();
    bridge.write_metrics(&mut out);
    out
}

/// The value of a sample of `/metrics`.
fn metric(bridge: &Bridge, sample: &str) -> u64 {
    let text = metrics(bridge);
    let line = text.lines().find_map(|line| line.strip_prefix(sample));
    let value = line.unwrap_or_else(|| panic!("no {sample} in {text}"));
    value.trim().parse().unwrap()
}

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let wait = async {
        while !condition() {
            sleep(Duration::from_millis(5)).await;
        }
    };
    let waited = tokio::time::timeout(crate::lab::DEADLINE, wait).await;
    assert!(waited.is_ok(), "not in time: {what}");
}

/// A connection over plain TCP.
async fn plain(broker: &Broker, role: Role, prefix: &str) -> TcpStream {
    let mut stream = TcpStream::connect(broker.tcp().unwrap()).await.unwrap();
    let mut hello = Vec::new();
    write_hello(role, 0, &[prefix.as_bytes()], &mut hello).unwrap();
    stream.write_all(&hello).await.unwrap();
    let mut answer = [0; 16];
    stream.read_exact(&mut answer).await.unwrap();
    let answer = decode_answer(&answer).frame().unwrap();
    assert_eq!(answer.verdict, Verdict::Accepted);
    stream
}

/// How often each event came to somebody: publisher and number.
type Came = Rc<std::cell::RefCell<BTreeMap<(u64, u64), u32>>>;

fn note(came: &Came, envelope: &[u8]) {
    let envelope = Envelope::decode(envelope).unwrap();
    let event = (envelope.publisher_id, envelope.sequence);
    *came.borrow_mut().entry(event).or_default() += 1;
}

/// A subscriber at the plain door of a broker.
async fn listen_plain(broker: &Broker) -> Came {
    let mut stream = plain(broker, Role::Subscriber, "namespace.").await;
    let came = Came::default();
    let noted = Rc::clone(&came);
    spawn_local(async move {
        let mut bytes = BytesMut::new();
        loop {
            while let Decoded::Frame(at) = frame::decode(&bytes, 1 << 20) {
                let event = bytes.split_to(at.end);
                note(&noted, &event[at]);
            }
            if stream.read_buf(&mut bytes).await.unwrap_or(0) == 0 {
                return;
            }
        }
    });
    came
}

/// A subscriber on NATS, as a stock one: it looks at no header.
async fn listen_nats(client: &Client) -> Came {
    let mut messages = client.subscribe("namespace.>").await.unwrap();
    let came = Came::default();
    let noted = Rc::clone(&came);
    spawn_local(async move {
        while let Some(message) = messages.next().await {
            note(&noted, &message.payload);
        }
    });
    came
}

fn envelope(publisher_id: u64, sequence: u64, payload: &[u8]) -> Envelope<'_> {
    Envelope {
        publisher_id,
        sequence,
        published_at_ms: 1,
        topic: TOPIC,
        payload,
    }
}

fn on_nats(publisher_id: u64, sequence: u64) -> Vec<u8> {
    let mut out = Vec::new();
    envelope(publisher_id, sequence, b"xyz")
        .write(&mut out)
        .unwrap();
    out
}

fn framed(publisher_id: u64, sequence: u64, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    multipart::write_frame(&envelope(publisher_id, sequence, payload), &mut out).unwrap();
    out
}

fn addresses(broker: &Broker) -> (SocketAddr, SocketAddr) {
    let address = |urls: &[String]| urls[0].strip_prefix("tcp://").unwrap().parse().unwrap();
    let channel = broker.channel();
    (
        address(&channel.xsub_endpoints),
        address(&channel.xpub_endpoints),
    )
}

const PUBLISHERS: u64 = 8;
const EVENTS: u64 = 20;

/// Publishers of one place have these numbers.
fn publishers(place: u64) -> impl Iterator<Item = u64> {
    (0..PUBLISHERS).map(move |publisher| 1000 * (place + 1) + publisher)
}

/// Events of several publishers on NATS and at each broker's plain door; how often each is to come.
async fn publish_everywhere(client: &Client, brokers: [&Broker; 3]) -> BTreeMap<(u64, u64), u32> {
    let mut wanted = BTreeMap::new();
    let mut doors = Vec::new();
    for broker in brokers {
        doors.push(plain(broker, Role::Publisher, SCOPE).await);
    }
    for sequence in 0..EVENTS {
        for publisher in publishers(0) {
            let subject = format!("{SCOPE}.{TOPIC}");
            let event = on_nats(publisher, sequence);
            client.publish(subject, event.into()).await.unwrap();
            wanted.insert((publisher, sequence), 1);
        }
        for (place, door) in (1..).zip(&mut doors) {
            for publisher in publishers(place) {
                let event = framed(publisher, sequence, b"xyz");
                door.write_all(&event).await.unwrap();
                wanted.insert((publisher, sequence), 1);
            }
        }
    }
    wanted
}

/// Two bridges, each with peers of its own, between one NATS and one other broker.
#[test]
fn two_bridges_bring_every_event_to_every_side_once() {
    let server = NatsServer::start();
    run(async {
        let (other, _) = broker("");
        let (xsub, xpub) = addresses(&other);
        let both = format!(
            "bridge = \"both\"\nbridge_xsub = \"tcp://{xsub}\"\nbridge_xpub = \"tcp://{xpub}\"\n"
        );
        let (one, first) = bridged(&server, &both).await;
        let (two, second) = bridged(&server, &both).await;
        let nats = Nats::connect(&server.options()).await.unwrap();
        let mut all = vec![listen_nats(nats.client()).await];
        for broker in [&other, &one, &two] {
            all.push(listen_plain(broker).await);
        }
        nats.settled().await.unwrap();
        until("the bridges know each other", || {
            [&first, &second]
                .iter()
                .all(|bridge| metric(bridge, "corelane_bridge_others") == 1)
        })
        .await;
        // Its own doors, the other broker's events, the plain one, and what the other broker wants.
        let subscriptions = |broker: &Broker| broker.stats().plane.subscriptions.get();
        until("joined", || {
            subscriptions(&other) == 3
                && [&one, &two].iter().all(|broker| subscriptions(broker) == 4)
        })
        .await;
        let wanted = publish_everywhere(nats.client(), [&other, &one, &two]).await;
        for came in &all {
            until("all events at one place", || {
                came.borrow().len() == wanted.len()
            })
            .await;
        }
        // What comes twice comes until nothing is under way any more.
        let waiting = |bridge: &Bridge| {
            ["doors", "nats", "zmq"]
                .iter()
                .map(|side| {
                    metric(
                        bridge,
                        &format!("corelane_bridge_waiting{{side=\"{side}\"}}"),
                    )
                })
                .sum::<u64>()
        };
        until("nothing waits", || waiting(&first) + waiting(&second) == 0).await;
        nats.settled().await.unwrap();
        for came in &all {
            assert_eq!(*came.borrow(), wanted);
        }
        // Both had their share of what either could have brought.
        let mark = "corelane_bridge_left_total{side=\"nats\"}";
        assert!(metric(&first, mark) > 0 && metric(&second, mark) > 0);
        for bridge in [&first, &second] {
            assert_eq!(
                metric(bridge, "corelane_bridge_lost_total{side=\"nats\"}"),
                0
            );
            bridge.stop().await;
        }
        [&one, &two, &other].iter().for_each(|broker| broker.stop());
    });
}

#[test]
fn nats_goes_and_comes_back_and_what_was_missed_is_counted() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = NatsServer::configured(folder, "max_payload: 65536\n");
    run(async {
        let (broker, bridge) = bridged(&server, "bridge = \"nats\"\n").await;
        let connected = "corelane_bridge_nats_connected";
        until("connected", || metric(&bridge, connected) == 1).await;
        let mut door = plain(&broker, Role::Publisher, SCOPE).await;
        let came = listen_plain(&broker).await;
        let passed = "corelane_bridge_passed_total{side=\"nats\"}";
        door.write_all(&framed(1, 0, b"x")).await.unwrap();
        until("passed", || metric(&bridge, passed) == 1).await;
        let nats = Nats::connect(&server.options()).await.unwrap();
        let subject = || format!("{SCOPE}.{TOPIC}");
        // Whether it has subscribed already is not known: the first ones may miss it.
        let mut sequence = 0;
        while came.borrow().get(&(2, sequence)).is_none() {
            sequence += 1;
            let event = on_nats(2, sequence);
            nats.client()
                .publish(subject(), event.into())
                .await
                .unwrap();
            sleep(Duration::from_millis(50)).await;
        }
        until("all that it has heard of", || {
            came.borrow().contains_key(&(2, sequence))
        })
        .await;
        server.kill();
        until("disconnected", || metric(&bridge, connected) == 0).await;
        for sequence in 1..101 {
            door.write_all(&framed(1, sequence, b"x")).await.unwrap();
        }
        // One is in its hand.
        let waiting = "corelane_bridge_waiting{side=\"nats\"}";
        until("waiting", || metric(&bridge, waiting) == 99).await;
        server.again();
        until("sent after all", || metric(&bridge, passed) == 101).await;
        let nats = Nats::connect(&server.options()).await.unwrap();
        let lost = "corelane_bridge_lost_total{side=\"nats\"}";
        let before = metric(&bridge, lost);
        let event = on_nats(2, sequence + 4);
        nats.client()
            .publish(subject(), event.into())
            .await
            .unwrap();
        until("the gap is seen", || metric(&bridge, lost) == before + 3).await;
        // What NATS does not take stays here, by name; the next one passes.
        door.write_all(&framed(1, 101, &[0; 65_500])).await.unwrap();
        door.write_all(&framed(1, 102, b"x")).await.unwrap();
        until("the next one", || metric(&bridge, passed) == 102).await;
        let large = "corelane_bridge_dropped_total{side=\"nats\",reason=\"too_large\"}";
        assert_eq!(metric(&bridge, large), 1);
        bridge.stop().await;
        broker.stop();
    });
}
