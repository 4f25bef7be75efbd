//! Events over a real NATS server: the bytes and subjects that Dynamo uses, and what a subscriber
//! does with what is none.

use serde::de::DeserializeOwned;

use crate::lab::{DEADLINE, NatsServer, run};
use std::process::{Command, Stdio};
use std::time::Instant;

use corelane::component::{EventPlane, EventsError, Options, Runtime};
use corelane::discovery::{Discovery, MemoryDiscovery, MemoryStore, Watch};
use corelane::events::Events;
use corelane::nats::Nats;
use corelane_codec::event::typed::{KvChange, KvEvent};
use corelane_codec::event::{
    CHANNELS_BUCKET, Envelope, EventChannelRecord, EventSourceRecord, EventTransport, KvMetrics,
    KvWorker, SOURCES_BUCKET, Scope, frame, topic,
};

const METRICS: KvMetrics = KvMetrics {
    worker_id: 0x7d7b_a1ff_9b37_7a16,
    dp_rank: 0,
    active_decode_blocks: 7,
    active_prefill_tokens: None,
    kv_used_blocks: 9,
};

async fn plane(server: &NatsServer, store: &MemoryStore) -> (Events, Nats, Discovery) {
    let nats = Nats::connect(&server.options()).await.unwrap();
    let discovery = Discovery::Memory(MemoryDiscovery::new(store));
    (Events::nats(&discovery, &nats), nats, discovery)
}

#[test]
fn published_events_arrive_in_order_and_scopes_do_not_nest() {
    let server = NatsServer::start();
    run(async {
        let store = MemoryStore::default();
        let (events, ..) = plane(&server, &store).await;
        let (others, ..) = plane(&server, &store).await;
        let endpoint = Scope::endpoint("demo", "backend", "generate");
        let component = Scope::component("demo", "backend");
        let mut inner = others
            .subscriber(&endpoint, topic::KV_METRICS)
            .await
            .unwrap();
        let mut outer = others
            .subscriber(&component, topic::KV_METRICS)
            .await
            .unwrap();
        let publisher = events
            .publisher(&endpoint, topic::KV_METRICS)
            .await
            .unwrap();
        let above = events
            .publisher(&component, topic::KV_METRICS)
            .await
            .unwrap();
        for _ in 0..100 {
            publisher.publish(&METRICS).await.unwrap();
        }
        above.publish_bytes(b"raw").await.unwrap();
        for sequence in 0..100 {
            let event = inner.next().await.unwrap().unwrap();
            assert_eq!(
                (event.publisher_id, event.sequence),
                (publisher.id(), sequence)
            );
            assert_eq!(event.parse::<KvMetrics>().unwrap(), METRICS);
            assert!(event.published_at_ms > 1_700_000_000_000);
        }
        let event = outer.next().await.unwrap().unwrap();
        assert_eq!(
            (&event.payload[..], event.publisher_id),
            (&b"raw"[..], above.id())
        );
        let losses = inner.losses();
        assert_eq!(
            (losses.lost, losses.unreadable, losses.publishers),
            (0, 0, 1)
        );
        assert!(publisher.id() < 1 << 53 && publisher.published() == 100);
    });
}

/// The rows of spec/events-discovery.md §3.2 and §3.4, published by hand.
#[test]
fn what_is_no_event_is_told_and_the_next_ones_come() {
    let server = NatsServer::start();
    run(async {
        let store = MemoryStore::default();
        let (events, nats, _) = plane(&server, &store).await;
        let scope = Scope::endpoint("demo", "backend", "generate");
        let mut subscriber = events.subscriber(&scope, "t").await.unwrap();
        let envelope = |sequence, topic: &str| {
            let mut out = vec![];
            let envelope = Envelope {
                publisher_id: 1,
                sequence,
                published_at_ms: 1,
                topic,
                payload: b"p",
            };
            envelope.write(&mut out).unwrap();
            out
        };
        let mut framed = vec![];
        frame::write(&envelope(1, "t"), &mut framed).unwrap();
        let messages = [
            envelope(0, "t"),
            framed,
            br#"{"publisher_id":1}"#.to_vec(),
            envelope(1, "other"),
            envelope(5, "t"),
            envelope(5, "t"),
        ];
        for message in messages {
            let subject = "namespace.demo.component.backend.endpoint.generate.t";
            nats.client()
                .publish(subject, message.into())
                .await
                .unwrap();
        }
        assert_eq!(subscriber.next().await.unwrap().unwrap().sequence, 0);
        for _ in 0..2 {
            let error = subscriber.next().await.unwrap().unwrap_err();
            assert!(matches!(error, EventsError::Envelope(_)), "{error}");
        }
        assert_eq!(subscriber.next().await.unwrap().unwrap().sequence, 5);
        assert_eq!(subscriber.next().await.unwrap().unwrap().sequence, 5);
        let losses = subscriber.losses();
        assert_eq!((losses.lost, losses.late, losses.duplicate), (4, 0, 1));
        assert_eq!(losses.unreadable, 3);
    });
}

fn watch<T: DeserializeOwned + 'static>(watcher: &Discovery, bucket: &str) -> Watch<T> {
    watcher.watch(&format!("{bucket}/"), |_, value| {
        serde_json::from_slice(value)
    })
}

#[test]
fn publishers_stand_in_discovery_while_they_live() {
    let server = NatsServer::start();
    run(async {
        let options = Options::local().unwrap().signals(false);
        let store = MemoryStore::default();
        let options = options
            .memory(&store)
            .events(EventPlane::Nats)
            .nats(server.options());
        let runtime = Runtime::start(options).await.unwrap();
        let watcher = Discovery::Memory(MemoryDiscovery::new(&store));
        let mut channels = watch::<EventChannelRecord>(&watcher, CHANNELS_BUCKET);
        let sources = watch::<EventSourceRecord>(&watcher, SOURCES_BUCKET);
        let namespace = runtime.namespace("demo").unwrap();
        let component = namespace.component("backend").unwrap();
        let endpoint = component.endpoint("generate").unwrap();
        let mut subscriber = endpoint.subscriber(topic::KV_EVENTS).await.unwrap();
        let publisher = endpoint.kv_publisher(3).await.unwrap();

        let (key, channel) = {
            let directory = channels.directory();
            let (key, channel, _) = directory.entries().next().unwrap();
            (key.to_owned(), channel.clone())
        };
        let prefix = "v1/event_channels/namespace/demo/component/backend/endpoint/generate";
        assert_eq!(
            key,
            format!("{prefix}/topic/kv-events/{:x}", publisher.id())
        );
        let EventTransport::Nats(nats) = &channel.transport else {
            panic!("not NATS");
        };
        assert_eq!(nats.subject_prefix, endpoint.scope().subject_prefix());
        let source = {
            let directory = sources.directory();
            let (_, source, _) = directory.entries().next().unwrap();
            source.kv().unwrap()
        };
        let worker_id = runtime.instance_id();
        assert_eq!(
            source.worker,
            KvWorker {
                worker_id,
                dp_rank: 3
            }
        );
        assert_eq!(source.publisher_id, publisher.id());

        let event = KvEvent::new(source.worker, 1, KvChange::Cleared);
        publisher.publish(&[&event]).await.unwrap();
        let read: Vec<KvEvent> = subscriber.next().await.unwrap().unwrap().parse().unwrap();
        assert_eq!(read, [event]);

        drop(publisher);
        // Both are withdrawn.
        let gone = async {
            while !channels.directory().is_empty() || !sources.directory().is_empty() {
                channels.changed().await;
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(DEADLINE, gone)
            .await
            .expect("withdrawn");
        runtime.stop().await;
    });
}

#[test]
fn without_events_publishing_does_nothing_and_subscribing_is_an_error() {
    run(async {
        let options = Options::local().unwrap().signals(false);
        let runtime = Runtime::start(options.events(EventPlane::Off))
            .await
            .unwrap();
        let namespace = runtime.namespace("demo").unwrap();
        let publisher = namespace.publisher("t").await.unwrap();
        publisher.publish(&1).await.unwrap();
        assert_eq!(publisher.published(), 1);
        let refused = namespace.subscriber("t").await.err().unwrap();
        assert!(matches!(refused, EventsError::Off), "{refused}");
        runtime.stop().await;
    });
}

#[test]
fn an_event_larger_than_the_server_takes_is_refused_here() {
    let server = NatsServer::start();
    run(async {
        let store = MemoryStore::default();
        let (events, ..) = plane(&server, &store).await;
        let scope = Scope::namespace("demo");
        let publisher = events.publisher(&scope, "t").await.unwrap();
        let error = publisher
            .publish_bytes(&vec![0; 1 << 20])
            .await
            .unwrap_err();
        assert!(matches!(error, EventsError::TooLarge { .. }), "{error}");
        publisher.publish_bytes(&vec![0; 1 << 19]).await.unwrap();
        publisher.flush().await.unwrap();
        assert_eq!(publisher.published(), 2);
    });
}

fn command(server: &NatsServer, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_corelane"));
    command.arg("events").args(args).env_clear();
    command.env("NATS_SERVER", server.url("nats"));
    command.env("DYN_EVENT_PLANE", "nats");
    command.stdin(Stdio::null()).stderr(Stdio::null());
    command
}

#[test]
fn tail_shows_what_publish_sends() {
    let server = NatsServer::start();
    let tail = ["tail", "--topic", "odd.topic", "--count", "2"];
    let mut tail = command(&server, &tail)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let scope = [
        "publish",
        "--scope",
        "demo/backend/generate",
        "--body",
        "{\"a\":[1]}",
    ];
    let began = Instant::now();
    // Nobody knows when it has subscribed.
    while tail.try_wait().unwrap().is_none() {
        for topic in ["odd.topic", "other"] {
            let mut publish = command(&server, &scope);
            let sent = publish.args(["--topic", topic]).output().unwrap();
            assert!(sent.status.success());
        }
        assert!(began.elapsed() < DEADLINE, "tail saw nothing");
    }
    let shown = tail.wait_with_output().unwrap();
    assert!(shown.status.success());
    let lines = String::from_utf8(shown.stdout).unwrap();
    assert_eq!(lines.lines().count(), 2, "{lines}");
    for line in lines.lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!(line["scope"], "demo/backend/generate");
        assert_eq!(
            (&line["topic"], &line["payload"]["a"][0]),
            (&"odd.topic".into(), &1.into())
        );
    }
}
