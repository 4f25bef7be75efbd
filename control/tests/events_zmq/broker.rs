//! Through brokers (spec/events-discovery.md §3.6).

use std::net::SocketAddr;

use corelane::component::{BrokerUrl, EventsError, MemoryStore, Via, ZmqOptions};
use corelane::discovery::{Discovery, Entry, Record};
use corelane_codec::event::{
    CHANNELS_BUCKET, EventChannelRecord, EventKey, EventTransport, Scope, ZmqBrokerChannel,
};
use corelane_engine::events::{Door, DoorKind, PlaneConfig, PlaneHandle, Security, spawn};
use corelane_engine::executor::listen;

use crate::lab::{DEADLINE, options, plane, ring, run, scope, until};
use crate::ports::free_port;

/// A broker, on the engine's plane alone.
pub(crate) struct Broker {
    pub(crate) handle: PlaneHandle,
    xsub: SocketAddr,
    xpub: SocketAddr,
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.handle.stop();
    }
}

impl Broker {
    pub(crate) fn start() -> Broker {
        Broker::protected(&Security::Null)
    }

    pub(crate) fn protected(security: &Security) -> Broker {
        let door = |kind| {
            // A port that nobody takes while the broker is away.
            let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
            let listener = listen(address, false, false).unwrap();
            let group = 0;
            let door = Door {
                listener,
                kind,
                group,
                security: security.clone(),
            };
            (address, door)
        };
        let (xsub, publishers) = door(DoorKind::Publishers);
        let (xpub, subscribers) = door(DoorKind::Subscribers);
        let config = PlaneConfig {
            buffers: 64,
            ..PlaneConfig::new(ring())
        };
        let handle = spawn(config, vec![publishers, subscribers]).unwrap();
        Broker { handle, xsub, xpub }
    }

    pub(crate) fn url(&self) -> String {
        format!("xsub=tcp://{},xpub=tcp://{}", self.xsub, self.xpub)
    }

    async fn subscribed(&self, count: u64) {
        let stats = &self.handle.stats;
        until("subscribed", || stats.plane.subscriptions.get() == count).await;
    }

    /// Its record, as Dynamo's broker registers itself.
    fn record(&self, scope: &Scope, id: u64) -> Record {
        let key = EventKey {
            scope: scope.clone(),
            topic: "broker".to_owned(),
            publisher_id: id,
        };
        let transport = EventTransport::ZmqBroker(ZmqBrokerChannel {
            xsub_endpoints: vec![format!("tcp://{}", self.xsub)],
            xpub_endpoints: vec![format!("tcp://{}", self.xpub)],
        });
        let record = EventChannelRecord::new(&key, transport);
        Record::new(format!("broker {id} of {scope}"), move |_| Entry {
            key: key.in_bucket(CHANNELS_BUCKET),
            value: serde_json::to_vec(&record).unwrap(),
        })
    }
}

fn via(via: Via) -> ZmqOptions {
    ZmqOptions { via, ..options() }
}

/// Nothing but these records of `discovery` is in the store.
fn channels(discovery: &Discovery) -> usize {
    let watch = discovery.watch(&format!("{CHANNELS_BUCKET}/"), |_, _| Ok(()));
    let directory = watch.directory();
    directory.len()
}

/// §3.6, items 1, 3 and 4: brokers by their URL; publishers dial and are not registered;
/// subscribers want the full subject, and part 0 has to be exactly that.
#[test]
fn by_its_url() {
    run(async {
        let broker = Broker::start();
        let url = Via::Url(broker.url().parse().unwrap());
        let store = MemoryStore::default();
        let (events, discovery) = plane(&store, via(url.clone()));
        let (others, _) = plane(&store, via(url));
        let mut subscriber = others.subscriber(&scope(), "t").await.unwrap();
        let mut second = others.subscriber(&scope(), "t").await.unwrap();
        broker.subscribed(1).await;
        let publisher = events.publisher(&scope(), "t").await.unwrap();
        let longer = events.publisher(&scope(), "t2").await.unwrap();
        assert!(publisher.is_wanted(DEADLINE).await.unwrap());
        assert_eq!(channels(&discovery), 0);
        for _ in 0..100 {
            longer.publish(&1).await.unwrap();
            publisher.publish(&2).await.unwrap();
        }
        for sequence in 0..100 {
            for subscriber in [&mut subscriber, &mut second] {
                let event = subscriber.next().await.unwrap().unwrap();
                assert_eq!(
                    (event.publisher_id, event.sequence),
                    (publisher.id(), sequence)
                );
            }
        }
        let losses = subscriber.losses();
        assert_eq!((losses.lost, losses.unreadable), (0, 100));
        let topics = broker.handle.stats.topics();
        assert!(topics.iter().any(|(name, ..)| *name == "t"), "{topics:?}");
        drop((subscriber, second));
        broker.subscribed(0).await;
    });
}

/// §3.6, items 2 and 4: all brokers of the scope's namespace, found once; what several of them
/// bring is taken once.
#[test]
fn found_in_discovery() {
    run(async {
        let (one, two) = (Broker::start(), Broker::start());
        let store = MemoryStore::default();
        let (events, discovery) = plane(&store, via(Via::Discovered));
        let missing = events.publisher(&scope(), "t").await.err().unwrap();
        assert!(matches!(missing, EventsError::NoBroker(_)), "{missing}");
        let missing = events.subscriber(&scope(), "t").await.err().unwrap();
        assert!(missing.to_string().contains("\"demo\""), "{missing}");
        let place = Scope::component("demo", "zmq_broker");
        let elsewhere = Scope::component("other", "zmq_broker");
        let narrower = Scope::endpoint("demo", "zmq_broker", "x");
        let nobody = Broker::start();
        for record in [
            one.record(&place, 1),
            two.record(&place, 2),
            nobody.record(&elsewhere, 3),
            nobody.record(&narrower, 4),
        ] {
            discovery.register(record).await.unwrap();
        }
        let mut subscriber = events.subscriber(&scope(), "t").await.unwrap();
        one.subscribed(1).await;
        two.subscribed(1).await;
        let publisher = events.publisher(&scope(), "t").await.unwrap();
        for broker in [&one, &two] {
            let stats = &broker.handle.stats;
            until("both have the publisher", || {
                stats.plane.publishers.get() == 1
            })
            .await;
        }
        // A broker tells its publishers what is wanted; we have heard of one at least.
        assert!(publisher.is_wanted(DEADLINE).await.unwrap());
        let mut sent = 0;
        // Until what one has brought came by the other as well.
        while one.handle.stats.plane.events_received.get() < 100
            || two.handle.stats.plane.events_received.get() < 100
        {
            publisher.publish(&sent).await.unwrap();
            assert_eq!(subscriber.next().await.unwrap().unwrap().sequence, sent);
            sent += 1;
        }
        publisher.publish(&sent).await.unwrap();
        assert_eq!(subscriber.next().await.unwrap().unwrap().sequence, sent);
        let losses = subscriber.losses();
        assert_eq!((losses.lost, losses.late, losses.duplicate), (0, 0, 0));
        assert_eq!(nobody.handle.stats.plane.publishers.get(), 0);
    });
}

/// A broker that comes back is dialled again, and what it has missed is known.
#[test]
fn a_restart_is_survived() {
    run(async {
        let broker = Broker::start();
        let (xsub, xpub) = (broker.xsub, broker.xpub);
        let url = Via::Url(broker.url().parse().unwrap());
        let store = MemoryStore::default();
        let (events, _) = plane(&store, via(url.clone()));
        let (others, _) = plane(&store, via(url));
        let mut subscriber = others.subscriber(&scope(), "t").await.unwrap();
        broker.subscribed(1).await;
        let publisher = events.publisher(&scope(), "t").await.unwrap();
        assert!(publisher.is_wanted(DEADLINE).await.unwrap());
        publisher.publish(&0).await.unwrap();
        assert_eq!(subscriber.next().await.unwrap().unwrap().sequence, 0);
        drop(broker);
        let plane = events.stats().unwrap();
        until("lost", || plane.plane.subscribers.get() == 0).await;
        for _ in 0..5 {
            publisher.publish(&0).await.unwrap();
        }
        let again = |address, kind| {
            let listener = listen(address, false, false).unwrap();
            let group = 0;
            Door {
                listener,
                kind,
                group,
                security: Security::Null,
            }
        };
        let doors = vec![
            again(xsub, DoorKind::Publishers),
            again(xpub, DoorKind::Subscribers),
        ];
        let handle = spawn(PlaneConfig::new(ring()), doors).unwrap();
        let broker = Broker { handle, xsub, xpub };
        broker.subscribed(1).await;
        assert!(publisher.is_wanted(DEADLINE).await.unwrap());
        publisher.publish(&0).await.unwrap();
        assert_eq!(subscriber.next().await.unwrap().unwrap().sequence, 6);
        assert_eq!(subscriber.losses().lost, 5);
    });
}

/// §3.6, item 1, the URL's grammar, as users see it.
#[test]
fn what_is_no_url_is_told() {
    let error = "tcp://b:5555".parse::<BrokerUrl>().unwrap_err();
    assert!(error.to_string().contains("write xsub=tcp://"), "{error}");
}
