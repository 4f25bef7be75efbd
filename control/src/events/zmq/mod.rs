//! Events over ZMQ: publishers that bind a socket of their own each, subscribers that dial all of
//! them, or both by way of brokers (spec/events-discovery.md §3.5, §3.6).
//!
//! ```text
//! direct   publisher = door of its own group <--ZMTP-- subscriber = a dial and a group for each
//! broker   publishers = one group --dials--> XSUB      publisher that discovery knows
//!          subscribers = another group --dials--> XPUB
//! ```
//! The bytes are moved by the engine's event plane, on a thread of its own, which is started with
//! the first publisher or subscriber. Groups keep apart what does not belong together.

mod address;
mod follow;
mod inlet;
mod link;
mod outlet;

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use corelane_codec::event::{CHANNELS_BUCKET, EventChannelRecord, EventTransport, Scope};
use corelane_engine::config::RingKind;
use corelane_engine::events::stats::Stats;
use corelane_engine::events::{Command, Group, PlaneConfig, Side};
use tokio::time::timeout;

pub use address::{AddressError, BrokerUrl};
pub(super) use inlet::{Inlet, Wanted};
pub(super) use outlet::{Outlet, Own};

use super::{CurveOptions, EventsError, Protection};
use crate::discovery::{Discovery, Watch};
use crate::env::Env;
use link::{Link, Running};

/// The component that brokers are registered under.
pub(crate) const BROKER_COMPONENT: &str = "zmq_broker";
/// Events that wait for one subscriber of this process.
const QUEUE_EVENTS_MAX: usize = 100_000;
/// How long discovery may take to list the brokers.
const LISTED: Duration = Duration::from_secs(10);

/// Where events pass.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum Via {
    /// From each publisher to each subscriber.
    #[default]
    Direct,
    /// Through these brokers.
    Url(BrokerUrl),
    /// Through the brokers that discovery knows in the namespace of the events.
    Discovered,
}

/// How events go over ZMQ.
#[derive(Clone, Debug)]
pub struct ZmqOptions {
    /// Which ring moves them.
    pub ring: RingKind,
    /// The address that subscribers elsewhere are told.
    pub host: IpAddr,
    /// Where they pass.
    pub via: Via,
    /// Whether they are encrypted, and with which keys.
    pub protection: Protection,
    /// Events that wait for one subscriber of this process, at most.
    pub queue_events_max: usize,
}

impl ZmqOptions {
    /// On loopback, from publishers to subscribers.
    pub fn local(ring: RingKind) -> ZmqOptions {
        ZmqOptions {
            ring,
            host: Ipv4Addr::LOCALHOST.into(),
            via: Via::Direct,
            protection: Protection::default(),
            queue_events_max: QUEUE_EVENTS_MAX,
        }
    }

    /// As `DYN_EVENT_PLANE_HOST`, `DYN_ZMQ_BROKER_URL`, `DYN_ZMQ_BROKER_ENABLED`,
    /// `DYN_ZMQ_EVENT_SUBSCRIBER_CHANNEL_CAPACITY` and `CORELANE_EVENTS_CURVE_*` say.
    ///
    /// # Errors
    /// One of them cannot be understood; the text says what to write.
    pub fn read(env: &Env, ring: RingKind) -> Result<ZmqOptions, EventsError> {
        Self::read_with(env, ring, &CurveOptions::read(env))
    }

    /// The same with these keys of CURVE, whatever the environment says of them.
    pub(crate) fn read_with(
        env: &Env,
        ring: RingKind,
        curve: &CurveOptions,
    ) -> Result<ZmqOptions, EventsError> {
        let via = match env.said("DYN_ZMQ_BROKER_URL") {
            Some(url) => Via::Url(url.parse()?),
            None if env.is_on("DYN_ZMQ_BROKER_ENABLED") => Via::Discovered,
            None => Via::Direct,
        };
        let capacity = env.get("DYN_ZMQ_EVENT_SUBSCRIBER_CHANNEL_CAPACITY");
        let capacity = capacity.and_then(|text| text.trim().parse().ok());
        let capacity = capacity.filter(|capacity| *capacity > 0);
        Ok(ZmqOptions {
            ring,
            host: address::host(env.get("DYN_EVENT_PLANE_HOST"))?,
            via,
            protection: curve.load()?,
            queue_events_max: capacity.unwrap_or(QUEUE_EVENTS_MAX),
        })
    }

    fn plane(&self) -> PlaneConfig {
        PlaneConfig {
            sessions_max: 8192,
            buffers: 256,
            ..PlaneConfig::new(self.ring)
        }
    }
}

/// Events over ZMQ. Clones are the same; it lives inside a `LocalSet`.
#[derive(Clone)]
pub(super) struct Zmq(Rc<Inner>);

struct Inner {
    options: ZmqOptions,
    running: RefCell<Option<Rc<Running>>>,
    /// The group of each set of sockets of brokers that is dialled.
    dialled: RefCell<HashMap<(Vec<SocketAddr>, Socket), Group>>,
    next_dial: std::cell::Cell<u64>,
}

/// Which of a broker's two.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
enum Socket {
    Xsub,
    Xpub,
}

impl Zmq {
    pub(super) fn new(options: ZmqOptions) -> Zmq {
        Zmq(Rc::new(Inner {
            options,
            running: RefCell::default(),
            dialled: RefCell::default(),
            next_dial: std::cell::Cell::new(0),
        }))
    }

    /// The counters of the plane, once it runs.
    pub(super) fn stats(&self) -> Option<std::sync::Arc<Stats>> {
        let running = self.0.running.borrow();
        running.as_ref().map(|running| running.stats.clone())
    }

    /// Ends everything; what waits for others is given a second.
    pub(super) async fn close(&self) {
        let running = self.0.running.borrow().clone();
        if let Some(running) = running {
            running.stop().await;
        }
    }

    fn running(&self) -> Result<Rc<Running>, EventsError> {
        let mut running = self.0.running.borrow_mut();
        if let Some(running) = &*running {
            return Ok(Rc::clone(running));
        }
        let started = Running::start(self.0.options.plane())?;
        *running = Some(Rc::clone(&started));
        Ok(started)
    }

    fn dial(&self) -> u64 {
        let dial = self.0.next_dial.get() + 1;
        self.0.next_dial.set(dial);
        dial
    }

    /// The brokers of a scope; `None` in direct mode.
    async fn brokers(
        &self,
        discovery: &Discovery,
        namespace: Option<&str>,
    ) -> Result<Option<BrokerUrl>, EventsError> {
        match &self.0.options.via {
            Via::Direct => Ok(None),
            Via::Url(url) => Ok(Some(url.clone())),
            Via::Discovered => {
                let namespace = namespace.unwrap_or("dynamo");
                discovered(discovery, namespace).await.map(Some)
            }
        }
    }

    /// The group whose dials lead to these sockets of brokers, and how many they are.
    async fn broker_group(
        &self,
        endpoints: &[String],
        socket: Socket,
    ) -> Result<(Group, usize), EventsError> {
        let addresses = address::resolve(endpoints).await?;
        let count = addresses.len();
        let running = self.running()?;
        let key = (addresses, socket);
        if let Some(group) = self.0.dialled.borrow().get(&key) {
            return Ok((*group, count));
        }
        let group = running.group()?;
        self.0.dialled.borrow_mut().insert(key.clone(), group);
        let side = match socket {
            Socket::Xsub => Side::Subscriber,
            Socket::Xpub => Side::Publisher,
        };
        for address in key.0 {
            let dial = Command::Dial {
                dial: self.dial(),
                address,
                side,
                group,
                security: self.0.options.protection.dials.clone(),
            };
            running.link.command(dial).await?;
        }
        Ok((group, count))
    }
}

/// The brokers that are registered in a namespace, by all of their sockets.
async fn discovered(discovery: &Discovery, namespace: &str) -> Result<BrokerUrl, EventsError> {
    let scope = Scope::component(namespace, BROKER_COMPONENT);
    let prefix = format!("{CHANNELS_BUCKET}/{}/", scope.path_prefix());
    let mut watch: Watch<EventChannelRecord> =
        discovery.watch(&prefix, |_, value| serde_json::from_slice(value));
    // What is there by then counts.
    let _ = timeout(LISTED, watch.listed()).await;
    let mut found = BrokerUrl::default();
    for (_, record, _) in watch.directory().entries() {
        // Discovery lists narrower scopes as well.
        if record.scope != scope {
            continue;
        }
        if let EventTransport::ZmqBroker(broker) = &record.transport {
            found.xsub.extend(broker.xsub_endpoints.iter().cloned());
            found.xpub.extend(broker.xpub_endpoints.iter().cloned());
        }
    }
    match found.xsub.is_empty() || found.xpub.is_empty() {
        true => Err(EventsError::NoBroker(namespace.to_owned())),
        false => Ok(found),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> Result<ZmqOptions, EventsError> {
        let own = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        ZmqOptions::read(&Env::of(pairs.iter().map(own)), RingKind::Epoll)
    }

    /// spec/events-discovery.md §3.6: the URL if it is there at all, else the switch.
    #[test]
    fn where_events_pass() {
        let url = "xsub=tcp://b:1,xpub=tcp://b:2";
        let (key, switch) = ("DYN_ZMQ_BROKER_URL", "DYN_ZMQ_BROKER_ENABLED");
        assert_eq!(read(&[]).unwrap().via, Via::Direct);
        assert_eq!(read(&[(switch, "Yes ")]).unwrap().via, Via::Discovered);
        assert_eq!(read(&[(switch, "0")]).unwrap().via, Via::Direct);
        let both = read(&[(key, url), (switch, "1")]).unwrap();
        assert_eq!(both.via, Via::Url(url.parse().unwrap()));
        let error = read(&[(key, ""), (switch, "1")]).unwrap_err().to_string();
        assert!(
            error.starts_with("\"\" names no broker (DYN_ZMQ_BROKER_URL)"),
            "{error}"
        );
    }

    /// spec/events-discovery.md §3.5: zero or garbage is the default.
    #[test]
    fn the_bound_of_a_subscriber() {
        let name = "DYN_ZMQ_EVENT_SUBSCRIBER_CHANNEL_CAPACITY";
        for (text, want) in [("7", 7), ("0", 100_000), ("many", 100_000), ("-1", 100_000)] {
            assert_eq!(read(&[(name, text)]).unwrap().queue_events_max, want);
        }
        assert_eq!(read(&[]).unwrap().queue_events_max, 100_000);
    }
}
