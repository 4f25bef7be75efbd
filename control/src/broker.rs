//! The broker of events in `corelane serve`: the engine's event plane with two doors, its record in
//! discovery, its log lines (`spec/events-discovery.md` §3.6).
//!
//! ```text
//! Dynamo's publishers --tcp--> xsub                 xpub --tcp--> Dynamo's subscribers
//!        '---- v1/event_channels/namespace/NS/component/zmq_broker/topic/broker/ID ----'
//! ```

use std::cell::{Cell, RefCell};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::Arc;

use anyhow::{Context, Result};
use corelane_codec::event::{
    CHANNELS_BUCKET, EventChannelRecord, EventKey, EventTransport, Scope, ZmqBrokerChannel,
};
use corelane_engine::config::RingKind;
use corelane_engine::events::stats::Stats;
use corelane_engine::events::{
    self, Command, Door, DoorKind, Overflow, PlaneConfig, PlaneHandle, Report, Security,
};
use corelane_engine::executor::listen;
use corelane_engine::mesh::Sender;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use tokio::task::spawn_local;

use crate::config::{self, Config};
use crate::cores;
use crate::discovery::{Discovery, Entry, Record, Registered};
use crate::events::{BROKER_COMPONENT, CurveOptions, reports};
use crate::preflight;

/// The topic of the records of brokers.
const TOPIC: &str = "broker";
const RECORD: &str = "event broker";

/// A running broker.
pub struct Broker {
    plane: RefCell<PlaneHandle>,
    stats: Arc<Stats>,
    channel: ZmqBrokerChannel,
    tcp: Option<SocketAddr>,
    namespace: String,
    stopping: Cell<bool>,
    ended: Notify,
}

impl Broker {
    /// Listens, and passes events on from now on. Needs a `LocalSet`.
    ///
    /// # Errors
    /// A port is taken, or there is no thread for it.
    pub fn start(config: &Config, broker: &config::Broker, ring: RingKind) -> Result<Rc<Self>> {
        let protection = config.curve.load()?;
        let (mut doors, (xsub, xpub)) = doors(broker, &protection.doors)?;
        let mut tcp = None;
        if let Some(address) = broker.tcp {
            let (bound, plain) = door(address, DoorKind::Plain, &Security::Null, "tcp")?;
            tracing::info!(tcp = %bound, "events: listening for plain TCP");
            doors.push(plain);
            tcp = Some(bound);
        }
        let url = |bound: SocketAddr| {
            let told = told(bound.ip(), config);
            vec![format!("tcp://{}", SocketAddr::new(told, bound.port()))]
        };
        let channel = ZmqBrokerChannel {
            xsub_endpoints: url(xsub),
            xpub_endpoints: url(xpub),
        };
        let plane = events::spawn(plane_config(config, broker, ring), doors);
        let plane = plane.context("cannot start the event plane")?;
        tracing::info!(
            xsub = channel.xsub_endpoints[0], xpub = channel.xpub_endpoints[0],
            overflow = %broker.overflow, curve = words(&config.curve, broker),
            "events: broker listening"
        );
        let wake = plane.reports.as_fd().try_clone_to_owned();
        let wake = wake.and_then(cores::register);
        let wake = wake.context("cannot watch the event plane")?;
        let this = Rc::new(Self {
            stats: Arc::clone(&plane.stats),
            plane: RefCell::new(plane),
            channel,
            tcp,
            namespace: broker.namespace.clone(),
            stopping: Cell::new(false),
            ended: Notify::new(),
        });
        spawn_local(read_reports(Rc::clone(&this), wake));
        Ok(this)
    }

    /// Where Dynamo's peers are told to go.
    pub fn channel(&self) -> &ZmqBrokerChannel {
        &self.channel
    }

    /// Where it listens for plain TCP.
    pub fn tcp(&self) -> Option<SocketAddr> {
        self.tcp
    }

    /// Hands its plane commands, as long as it runs.
    pub fn commands(&self) -> Sender<Command> {
        self.plane.borrow().commands()
    }

    /// Its counters.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// How many turns its thread has made; `None` once it is to end.
    pub fn turns(&self) -> Option<u64> {
        (!self.stopping.get()).then(|| self.stats.plane.ticks.get())
    }

    /// Registers it, so that Dynamo's publishers and subscribers find it.
    pub async fn offer(&self, discovery: &Discovery) {
        match discovery.replace(self.record()).await {
            Ok(Registered::Stored) => {
                tracing::info!(namespace = self.namespace, "events: broker registered");
            }
            Ok(Registered::Deferred) => {
                tracing::warn!("events: the store is away; the broker is registered later");
            }
            Err(error) => tracing::error!(%error, "events: broker not registered"),
        }
    }

    fn record(&self) -> Record {
        let (channel, namespace) = (self.channel.clone(), self.namespace.clone());
        Record::new(RECORD, move |id| {
            let key = EventKey {
                scope: Scope::component(&namespace, BROKER_COMPONENT),
                topic: TOPIC.to_owned(),
                publisher_id: id,
            };
            let transport = EventTransport::ZmqBroker(channel.clone());
            let record = EventChannelRecord::new(&key, transport);
            Entry {
                key: key.in_bucket(CHANNELS_BUCKET),
                // Strings and numbers always have a JSON form.
                value: serde_json::to_vec(&record).unwrap_or_default(),
            }
        })
    }

    /// Waits until it has ended without having been told to.
    pub async fn ended(&self) {
        self.ended.notified().await;
    }

    /// Empties queues for a second at most, and ends.
    pub fn stop(&self) {
        self.stopping.set(true);
        self.plane.borrow_mut().stop();
        let sent = self.stats.plane.events_sent.get();
        let received = self.stats.plane.events_received.get();
        tracing::info!(received, sent, "events: broker stopped");
    }

    fn hear(&self, report: Report) {
        reports::tell(&report);
        if let Report::Stopped { failure } = report
            && !self.stopping.get()
        {
            let failure = failure.unwrap_or_else(|| "for no known reason".to_owned());
            tracing::error!(failure, "events: the broker has ended by itself");
            self.ended.notify_one();
        }
    }
}

/// The doors for ZMTP, and where those are that discovery tells of: the ones without CURVE where
/// there are both.
fn doors(
    broker: &config::Broker,
    security: &Security,
) -> Result<(Vec<Door>, (SocketAddr, SocketAddr))> {
    let pair = |(xsub, xpub), security, keys: [&str; 2]| {
        let (xsub, publishers) = door(xsub, DoorKind::Publishers, security, keys[0])?;
        let (xpub, subscribers) = door(xpub, DoorKind::Subscribers, security, keys[1])?;
        anyhow::Ok((vec![publishers, subscribers], (xsub, xpub)))
    };
    let first = if broker.curve.is_some() {
        &Security::Null
    } else {
        security
    };
    let (mut doors, told) = pair((broker.xsub, broker.xpub), first, ["xsub", "xpub"])?;
    if let Some(addresses) = broker.curve {
        let keys = ["curve_xsub", "curve_xpub"];
        let (sealed, (xsub, xpub)) = pair(addresses, security, keys)?;
        tracing::info!(%xsub, %xpub, "events: listening for ZMQ with CURVE");
        doors.extend(sealed);
    }
    Ok((doors, told))
}

fn door(
    address: SocketAddr,
    kind: DoorKind,
    security: &Security,
    key: &str,
) -> Result<(SocketAddr, Door)> {
    let bound = listen(address, false, false).and_then(|listener: TcpListener| {
        let address = listener.local_addr()?;
        Ok((address, listener))
    });
    let (bound, listener) = bound.with_context(|| {
        format!("cannot listen on {address} for events; write another {key} under [events]")
    })?;
    let door = Door {
        listener,
        kind,
        group: 0,
        security: security.clone(),
    };
    Ok((bound, door))
}

/// Whom those addresses are for.
fn words(curve: &CurveOptions, broker: &config::Broker) -> &'static str {
    match (&curve.secret_key_file, broker.curve) {
        (Some(_), None) => "wanted",
        (Some(_), Some(_)) => "beside",
        (None, _) => "off",
    }
}

/// The address that others are told of a bound one.
fn told(bound: IpAddr, config: &Config) -> IpAddr {
    if bound == config.server.host || bound.is_unspecified() {
        let advertised = config.server.advertised();
        // Behind our own wildcard, `[server] host` may still be loopback.
        if bound == config.server.host || !advertised.is_loopback() {
            return advertised;
        }
        let any = config::Server {
            host: bound,
            ..config.server.clone()
        };
        return any.advertised();
    }
    bound
}

fn plane_config(config: &Config, broker: &config::Broker, ring: RingKind) -> PlaneConfig {
    PlaneConfig {
        cpu: broker.cpu.unwrap_or(config.control.cpu),
        idle: preflight::idle(broker.idle),
        overflow: match broker.overflow {
            config::Overflow::DropNewest => Overflow::DropNewest,
            config::Overflow::DropOldest => Overflow::DropOldest,
            config::Overflow::Disconnect => Overflow::Disconnect,
        },
        queue_events_max: broker.queue_events_max,
        queue_bytes_max: broker.queue_bytes_max,
        memory_bytes_max: broker.memory_bytes_max,
        event_bytes_max: broker.event_bytes_max,
        sessions_max: broker.sessions_max,
        subscriptions_max: broker.subscriptions_max,
        buffers: broker.buffers,
        buffer_bytes: broker.buffer_bytes,
        ..PlaneConfig::new(ring)
    }
}

async fn read_reports(broker: Rc<Broker>, wake: AsyncFd<std::os::fd::OwnedFd>) {
    loop {
        let Ok(mut ready) = wake.readable().await else {
            return;
        };
        ready.clear_ready();
        let reports: Vec<Report> = {
            let Ok(plane) = broker.plane.try_borrow() else {
                return;
            };
            plane.reports.clear_wake();
            std::iter::from_fn(|| plane.reports.next()).collect()
        };
        for report in reports {
            broker.hear(report);
        }
    }
}
