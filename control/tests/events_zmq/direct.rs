//! From publishers to subscribers (spec/events-discovery.md §3.5).

use std::io::Write;
use std::time::Duration;

use corelane::component::{EventPlane, EventsError, MemoryStore, Options, Runtime, ZmqOptions};
use corelane::discovery::Watch;
use corelane_codec::event::typed::{KvChange, KvEvent};
use corelane_codec::event::{
    CHANNELS_BUCKET, EventChannelRecord, EventSourceRecord, EventTransport, KvMetrics,
    SOURCES_BUCKET, topic,
};

use crate::lab::{DEADLINE, Publisher, envelope, message, options, plane, run, scope, until};

const METRICS: KvMetrics = KvMetrics {
    worker_id: 0x7d7b_a1ff_9b37_7a16,
    dp_rank: 0,
    active_decode_blocks: 7,
    active_prefill_tokens: None,
    kv_used_blocks: 9,
};

#[test]
fn published_events_arrive_in_order_from_each_publisher() {
    run(async {
        let store = MemoryStore::default();
        let (events, _) = plane(&store, options());
        let (others, _) = plane(&store, options());
        // One publisher is there before the subscriber, one comes later.
        let first = events.publisher(&scope(), topic::KV_METRICS).await.unwrap();
        let mut subscriber = others
            .subscriber(&scope(), topic::KV_METRICS)
            .await
            .unwrap();
        let second = events.publisher(&scope(), topic::KV_METRICS).await.unwrap();
        let other = events.publisher(&scope(), "kv_metrics2").await.unwrap();
        for publisher in [&first, &second] {
            assert!(publisher.is_wanted(DEADLINE).await.unwrap());
        }
        for _ in 0..500 {
            first.publish(&METRICS).await.unwrap();
            second.publish_bytes(b"raw").await.unwrap();
            other.publish(&METRICS).await.unwrap();
        }
        first.flush().await.unwrap();
        let mut next = [0; 2];
        for _ in 0..1000 {
            let event = subscriber.next().await.unwrap().unwrap();
            let which = usize::from(event.publisher_id == second.id());
            assert_eq!(
                (event.sequence, &*event.topic),
                (next[which], topic::KV_METRICS)
            );
            next[which] += 1;
            match which {
                0 => assert_eq!(event.parse::<KvMetrics>().unwrap(), METRICS),
                _ => assert_eq!(&event.payload[..], b"raw"),
            }
        }
        let losses = subscriber.losses();
        assert_eq!((losses.lost, losses.dropped, losses.publishers), (0, 0, 2));
        // A publisher that goes is taken out, and its subscriber goes on.
        drop(first);
        second.publish(&METRICS).await.unwrap();
        assert_eq!(subscriber.next().await.unwrap().unwrap().sequence, 500);
        events.close().await;
        let closed = second.publish(&METRICS).await.unwrap_err();
        assert!(matches!(closed, EventsError::Closed), "{closed}");
    });
}

fn watch<T: serde::de::DeserializeOwned + 'static>(
    watcher: &corelane::discovery::Discovery,
    bucket: &str,
) -> Watch<T> {
    watcher.watch(&format!("{bucket}/"), |_, value| {
        serde_json::from_slice(value)
    })
}

/// spec/events-discovery.md §3.9, ZMQ direct: a channel and a source record for KV events.
#[test]
fn publishers_stand_in_discovery_while_they_live() {
    run(async {
        let store = MemoryStore::default();
        let start = Options::local().unwrap().signals(false).memory(&store);
        let runtime = Runtime::start(start.zmq(options())).await.unwrap();
        let (_, watcher) = plane(&store, options());
        let mut channels = watch::<EventChannelRecord>(&watcher, CHANNELS_BUCKET);
        let sources = watch::<EventSourceRecord>(&watcher, SOURCES_BUCKET);
        let namespace = runtime.namespace("demo").unwrap();
        let endpoint = namespace
            .component("backend")
            .unwrap()
            .endpoint("generate")
            .unwrap();
        let mut subscriber = endpoint.subscriber(topic::KV_EVENTS).await.unwrap();
        let publisher = endpoint.kv_publisher(3).await.unwrap();
        let prefix = "v1/event_channels/namespace/demo/component/backend/endpoint/generate";
        {
            let directory = channels.directory();
            let (key, channel, _) = directory.entries().next().unwrap();
            assert_eq!(
                key,
                format!("{prefix}/topic/kv-events/{:x}", publisher.id())
            );
            let EventTransport::Zmq(zmq) = &channel.transport else {
                panic!("not ZMQ");
            };
            assert!(
                zmq.endpoint.starts_with("tcp://127.0.0.1:"),
                "{}",
                zmq.endpoint
            );
            let directory = sources.directory();
            let (_, source, _) = directory.entries().next().unwrap();
            assert_eq!(source.kv().unwrap().publisher_id, publisher.id());
            assert_eq!(source.kv().unwrap().worker.worker_id, runtime.instance_id());
        }
        assert!(publisher.is_wanted(DEADLINE).await.unwrap());
        let worker = sources
            .directory()
            .entries()
            .next()
            .unwrap()
            .1
            .kv()
            .unwrap()
            .worker;
        let event = KvEvent::new(worker, 1, KvChange::Cleared);
        publisher.publish(&[&event]).await.unwrap();
        let read: Vec<KvEvent> = subscriber.next().await.unwrap().unwrap().parse().unwrap();
        assert_eq!(read, [event]);
        drop(publisher);
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
        assert!(subscriber.next().await.is_none());
    });
}

/// The port of a publisher that has gone is nobody's any more.
#[test]
fn a_publishers_port_goes_with_it() {
    run(async {
        let store = MemoryStore::default();
        let (events, watcher) = plane(&store, options());
        let channels = watch::<EventChannelRecord>(&watcher, CHANNELS_BUCKET);
        for _ in 0..3 {
            let publisher = events.publisher(&scope(), "t").await.unwrap();
            let address = {
                let directory = channels.directory();
                let (_, channel, _) = directory.entries().next().unwrap();
                let EventTransport::Zmq(zmq) = &channel.transport else {
                    panic!("not ZMQ");
                };
                zmq.endpoint.strip_prefix("tcp://").unwrap().to_owned()
            };
            assert!(std::net::TcpStream::connect(&address).is_ok());
            drop(publisher);
            until("the port is closed", || {
                std::net::TcpStream::connect(&address).is_err()
            })
            .await;
        }
    });
}

/// Losses before us, by the numbers of a publisher that skips some.
#[test]
fn losses_are_counted_exactly() {
    run(async {
        let store = MemoryStore::default();
        let (events, discovery) = plane(&store, options());
        let publisher = Publisher::new();
        discovery
            .register(publisher.record(&scope(), "t", 5))
            .await
            .unwrap();
        let mut subscriber = events.subscriber(&scope(), "t").await.unwrap();
        let (_publisher, mut stream) = publisher.accepted("t").await;
        let numbers = [4, 5, 8, 7, 7, 20, 5, 21];
        for sequence in numbers {
            let bytes = message("t", 5, sequence, &envelope(5, sequence, "t"));
            stream.write_all(&bytes).unwrap();
        }
        for sequence in numbers {
            let event = subscriber.next().await.unwrap().unwrap();
            assert_eq!((event.publisher_id, event.sequence), (5, sequence));
        }
        let losses = subscriber.losses();
        assert_eq!((losses.lost, losses.late, losses.duplicate), (2 + 11, 1, 2));
        assert_eq!((losses.dropped, losses.publishers), (0, 1));
    });
}

/// Who does not take his events loses the newest ones, and knows how many.
#[test]
fn a_subscriber_that_is_too_slow_loses_what_is_counted() {
    run(async {
        let store = MemoryStore::default();
        let few = ZmqOptions {
            queue_events_max: 50,
            ..options()
        };
        let (events, _) = plane(&store, options());
        let (others, _) = plane(&store, few);
        let publisher = events.publisher(&scope(), "t").await.unwrap();
        let mut slow = others.subscriber(&scope(), "t").await.unwrap();
        assert!(publisher.is_wanted(DEADLINE).await.unwrap());
        for _ in 0..3000 {
            publisher.publish(&1).await.unwrap();
        }
        let stats = others.stats().unwrap();
        until("received", || stats.plane.events_received.get() == 3000).await;
        until("dropped", || stats.plane.events_dropped_local.get() == 2950).await;
        assert_eq!(slow.losses().dropped, 2950);
        for sequence in 0..50 {
            assert_eq!(slow.next().await.unwrap().unwrap().sequence, sequence);
        }
        publisher.publish(&1).await.unwrap();
        assert_eq!(slow.next().await.unwrap().unwrap().sequence, 3000);
        assert_eq!(slow.losses().lost, slow.losses().dropped);
    });
}

#[test]
fn publishers_and_subscribers_work_on_any_thread() {
    run(async {
        let store = MemoryStore::default();
        let (events, _) = plane(&store, options());
        let publisher = events.publisher(&scope(), "t").await.unwrap();
        let mut subscriber = events.subscriber(&scope(), "t").await.unwrap();
        assert!(publisher.is_wanted(DEADLINE).await.unwrap());
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let publisher = publisher.clone();
                std::thread::spawn(move || {
                    let tokio = tokio::runtime::Builder::new_current_thread()
                        .build()
                        .unwrap();
                    for _ in 0..500 {
                        tokio.block_on(publisher.publish(&7)).unwrap();
                    }
                })
            })
            .collect();
        let mut came = std::collections::BTreeSet::new();
        for _ in 0..2000 {
            came.insert(subscriber.next().await.unwrap().unwrap().sequence);
        }
        assert_eq!((came.len(), came.last()), (2000, Some(&1999)));
        for thread in threads {
            thread.join().unwrap();
        }
    });
}

#[test]
fn an_event_that_is_too_large_is_refused_here() {
    run(async {
        let (events, _) = plane(&MemoryStore::default(), options());
        let publisher = events.publisher(&scope(), "t").await.unwrap();
        let large = vec![0; 8 << 20];
        let error = publisher.publish_bytes(&large).await.unwrap_err();
        assert!(matches!(error, EventsError::TooLarge { .. }), "{error}");
        let nobody = publisher.is_wanted(Duration::from_millis(1)).await.unwrap();
        assert!(!nobody && publisher.published() == 1);
    });
}

/// `DYN_EVENT_PLANE=none`.
#[test]
fn events_can_be_switched_off() {
    run(async {
        let options = Options::local().unwrap().signals(false);
        let runtime = Runtime::start(options.events(EventPlane::Off))
            .await
            .unwrap();
        let namespace = runtime.namespace("demo").unwrap();
        let publisher = namespace.publisher("t").await.unwrap();
        publisher.publish(&1).await.unwrap();
        assert!(!publisher.is_wanted(DEADLINE).await.unwrap());
        let refused = namespace.subscriber("t").await.err().unwrap();
        assert!(matches!(refused, EventsError::Off), "{refused}");
        runtime.stop().await;
    });
}
