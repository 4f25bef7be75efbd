//! From what discovery knows to the directory of every shard.
//!
//! ```text
//! InstanceWatch of each route --> Board --(only if something differs)--> Directory --> shards
//! our identities, newest first --^
//! ```

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use corelane_codec::control_message::PayloadCodec;
use corelane_codec::path::instance_path;
use corelane_engine::directory::{self, Directory};
use corelane_engine::shard::Command;
use tokio::sync::{Mutex, Notify, watch};
use tokio::time::sleep;

use crate::config::{self, StaticInstance};
use crate::cores::Cores;
use crate::discovery::{Discovery, Freshness};
use crate::watch::{Instance, InstanceWatch};

/// Paths of so many of our identities are served: clients keep an address for a while after a
/// lease was lost.
pub const IDENTITIES_MAX: usize = 16;
/// Two directories have this distance at least, so that a crowd of workers that comes at once
/// costs a few directories and not one each.
const PUBLISH_GAP: Duration = Duration::from_millis(5);
/// Longest wait for the shards to take a directory over.
const TAKEN_MAX: Duration = Duration::from_millis(100);

/// The instances of one route, shared by whoever wants to know when they change.
pub type Instances = Rc<[Instance]>;

/// One route as control sees it.
pub struct Listed {
    /// As configured.
    pub route: config::Route,
    /// Known without discovery.
    statics: Vec<Instance>,
    /// Known now.
    instances: watch::Sender<Instances>,
    /// Workers that are attached over lanes.
    attached: RefCell<Vec<Instance>>,
    /// Whether our record stands in discovery under the present identity.
    registered: Cell<bool>,
    /// Whether the list is what the store says now, and not the last known one.
    fresh: watch::Sender<bool>,
}

impl Listed {
    /// The instances now.
    pub fn instances(&self) -> Instances {
        self.instances.borrow().clone()
    }

    /// Tells about changes.
    pub fn subscribe(&self) -> watch::Receiver<Instances> {
        self.instances.subscribe()
    }

    /// Whether our record stands in discovery.
    pub fn is_registered(&self) -> bool {
        self.registered.get()
    }

    /// Notes whether our record stands in discovery.
    pub fn set_registered(&self, registered: bool) {
        self.registered.set(registered);
    }

    /// Whether the list of instances is what the store says now.
    pub fn is_fresh(&self) -> bool {
        *self.fresh.borrow()
    }

    /// Waits until the store has listed the instances for the first time.
    pub async fn listed(&self) {
        // The sender is ours.
        let _ = self.fresh.subscribe().wait_for(|fresh| *fresh).await;
    }
}

/// All routes, and the directory that the shards have.
pub struct Board {
    routes: Vec<Listed>,
    identities: RefCell<VecDeque<u64>>,
    cores: Rc<Cores>,
    published: RefCell<Arc<Directory>>,
    publications: Cell<u64>,
    /// One publication at a time, so that an older directory never follows a newer one.
    publishing: Mutex<()>,
    changed: Notify,
}

impl Board {
    /// A board with no instance but the static ones, and no identity yet.
    pub fn new(
        routes: &[config::Route],
        statics: &[StaticInstance],
        cores: &Rc<Cores>,
    ) -> Rc<Board> {
        let listed = |route: &config::Route| {
            let own = |instance: &&StaticInstance| instance.endpoint == route.target;
            let own = statics.iter().filter(own);
            let statics: Vec<Instance> = own.map(static_instance).collect();
            Listed {
                route: route.clone(),
                instances: watch::Sender::new(merged(&statics, Vec::new()).into()),
                statics,
                attached: RefCell::default(),
                registered: Cell::new(false),
                fresh: watch::Sender::new(false),
            }
        };
        Rc::new(Board {
            routes: routes.iter().map(listed).collect(),
            identities: RefCell::default(),
            cores: Rc::clone(cores),
            published: RefCell::default(),
            publications: Cell::new(0),
            publishing: Mutex::new(()),
            changed: Notify::new(),
        })
    }

    /// The routes, in the order of the configuration.
    pub fn routes(&self) -> &[Listed] {
        &self.routes
    }

    /// The number of what the workers of a route publish: routes to one target share it.
    pub fn feed(&self, index: usize) -> u32 {
        let target = &self.routes[index].route.target;
        let first = self
            .routes
            .iter()
            .position(|other| other.route.target == *target);
        first.unwrap_or(index) as u32
    }

    /// Directories handed to the shards so far.
    pub fn publications(&self) -> u64 {
        self.publications.get()
    }

    /// The directory that the shards have, or are about to take over.
    pub fn published(&self) -> Arc<Directory> {
        Arc::clone(&self.published.borrow())
    }

    /// Our identity now, once there is one.
    pub fn identity(&self) -> Option<u64> {
        self.identities.borrow().front().copied()
    }

    /// Notes that we are `id` from now on. The paths of earlier identities stay served.
    pub fn be(&self, id: u64) {
        let mut identities = self.identities.borrow_mut();
        if identities.front() == Some(&id) {
            return;
        }
        identities.retain(|earlier| *earlier != id);
        identities.push_front(id);
        identities.truncate(IDENTITIES_MAX);
        drop(identities);
        self.changed.notify_one();
    }

    /// Becomes `id`, and waits until the shards know the paths under it, a moment at most.
    pub async fn be_and_publish(&self, id: u64) {
        self.be(id);
        self.publish().await;
        self.cores.settled(TAKEN_MAX).await;
    }

    /// Hands the shards a new directory if it differs from the one they have.
    pub async fn publish(&self) {
        let _turn = self.publishing.lock().await;
        let next = Arc::new(self.directory());
        if *self.published.borrow() == next {
            return;
        }
        self.published.replace(Arc::clone(&next));
        self.publications.set(self.publications.get() + 1);
        let instances = next.routes.iter().map(|route| route.instances.len());
        let instances: usize = instances.sum();
        tracing::debug!(instances, "directory published");
        let tell = || Command::Directory(Arc::clone(&next));
        self.cores.tell(tell).await;
    }

    /// Publishes whenever something has changed; never ends.
    pub async fn keep_published(&self) {
        loop {
            self.changed.notified().await;
            self.publish().await;
            sleep(PUBLISH_GAP).await;
        }
    }

    fn directory(&self) -> Directory {
        let identities = self.identities.borrow();
        let route = |(index, listed): (usize, &Listed)| {
            let paths = identities
                .iter()
                .map(|id| instance_path(*id, &listed.route.listen).into_bytes())
                .collect();
            let feed = self.feed(index);
            route(&listed.route, paths, &listed.instances.borrow(), feed)
        };
        Directory {
            routes: self.routes.iter().enumerate().map(route).collect(),
        }
    }

    /// Follows the instances of one route; never ends. Those on NATS are dialled at `gateway`.
    pub async fn follow(&self, index: usize, discovery: &Discovery, gateway: Option<SocketAddr>) {
        let Some(listed) = self.routes.get(index) else {
            return;
        };
        if listed.route.lane.is_some() {
            // Its workers come to us.
            listed.fresh.send_replace(true);
            return std::future::pending().await;
        }
        let watch = InstanceWatch::new(discovery, &listed.route.target);
        let mut watch = watch.over_nats(gateway);
        loop {
            watch.changed().await;
            let found = merged(&listed.statics, watch.instances());
            self.found(listed, found);
            let fresh = watch.freshness() == Freshness::Fresh;
            listed.fresh.send_replace(fresh);
        }
    }

    /// A worker of a route has attached its lanes.
    pub fn lane_attached(&self, index: usize, worker: Instance) {
        if let Some(listed) = self.routes.get(index) {
            listed.attached.borrow_mut().push(worker);
            self.found(listed, merged(&[], listed.attached.borrow().clone()));
        }
    }

    /// It is gone.
    pub fn lane_detached(&self, index: usize, worker: u64) {
        if let Some(listed) = self.routes.get(index) {
            listed
                .attached
                .borrow_mut()
                .retain(|other| other.id != worker);
            self.found(listed, merged(&[], listed.attached.borrow().clone()));
        }
    }

    fn found(&self, listed: &Listed, found: Vec<Instance>) {
        let before = listed.instances();
        if *before == *found {
            return;
        }
        let (listen, target) = (&listed.route.listen, &listed.route.target);
        let (count, was) = (found.len(), before.len());
        tracing::info!(%listen, %target, instances = count, was, "instances changed");
        listed.instances.send_replace(found.into());
        self.changed.notify_one();
    }
}

fn static_instance(instance: &StaticInstance) -> Instance {
    Instance {
        id: instance.id,
        address: instance.socket,
        path: instance.path.clone().into_bytes(),
        codec: PayloadCodec::default(),
        device: None,
    }
}

/// Static instances and found ones, sorted by id; of two with one id the found one counts.
fn merged(statics: &[Instance], found: Vec<Instance>) -> Vec<Instance> {
    let mut all = found;
    for instance in statics {
        if all.iter().all(|other| other.id != instance.id) {
            all.push(instance.clone());
        }
    }
    all.sort_by_key(|instance| instance.id);
    all
}

fn route(
    route: &config::Route,
    paths: Vec<Vec<u8>>,
    instances: &[Instance],
    feed: u32,
) -> directory::Route {
    let instance = |instance: &Instance| directory::Instance {
        id: instance.id,
        address: instance.address,
        path: instance.path.clone(),
    };
    directory::Route {
        listen: route.listen.to_string(),
        target: route.target.to_string(),
        paths,
        policy: policy(route.policy),
        header: route.header.clone().unwrap_or_default(),
        ack: match route.ack {
            config::Ack::OnForward => directory::Ack::OnForward,
            config::Ack::OnAccept => directory::Ack::OnAccept,
        },
        ack_timeout_ns: u64::from(route.ack_timeout_ms) * 1_000_000,
        retries_max: route.retries_max,
        hold_bytes: route.hold_bytes,
        relay: (route.response == config::Response::Relay).then(|| relay_times(&route.relay)),
        lane: route.lane.is_some(),
        kv: route.kv.as_ref().map(|kv| kv_rule(route, kv, feed)),
        load: load_rule(&route.load, feed),
        // Workers with lanes are not dialled.
        instances: match route.lane {
            Some(_) => Vec::new(),
            None => instances.iter().map(instance).collect(),
        },
    }
}

fn relay_times(times: &config::RelayTimes) -> directory::RelayTimes {
    let ns = |ms: u32| u64::from(ms) * 1_000_000;
    directory::RelayTimes {
        home_ns: ns(times.home_timeout_ms),
        first_item_ns: ns(times.first_item_timeout_ms),
        inactivity_ns: ns(times.inactivity_timeout_ms),
    }
}

fn kv_rule(route: &config::Route, kv: &config::RouteKv, feed: u32) -> directory::KvRule {
    directory::KvRule {
        feed,
        block_tokens: route.block_tokens,
        body_bytes_max: kv.body_bytes_max,
        blocks_max: kv.blocks_max,
        ranks_max: kv.ranks_max,
        overlap_credit_pct: kv.overlap_credit_pct,
        prefill_scale_pct: kv.prefill_scale_pct,
        temperature_pct: kv.temperature_pct,
    }
}

fn load_rule(load: &config::RouteLoad, feed: u32) -> directory::LoadRule {
    directory::LoadRule {
        source: match load.source {
            config::LoadSource::Own => directory::LoadSource::Own,
            config::LoadSource::ForwardPass => directory::LoadSource::Requests,
            config::LoadSource::KvMetrics => directory::LoadSource::Blocks,
        },
        feed,
        stale_ns: u64::from(load.stale_ms) * 1_000_000,
        request_blocks: load.request_blocks,
    }
}

fn policy(policy: config::Policy) -> directory::Policy {
    match policy {
        config::Policy::RoundRobin => directory::Policy::RoundRobin,
        config::Policy::Random => directory::Policy::Random,
        config::Policy::PowerOfTwoChoices => directory::Policy::PowerOfTwoChoices,
        config::Policy::LeastLoaded => directory::Policy::LeastLoaded,
        config::Policy::Direct => directory::Policy::Direct,
        config::Policy::Hash => directory::Policy::Hash,
        config::Policy::Kv => directory::Policy::Kv,
    }
}

#[cfg(test)]
mod tests {
    use corelane_codec::path::EndpointId;

    use super::*;

    #[test]
    fn found_instances_stand_before_static_ones_of_the_same_id() {
        let statics = [Instance::sample(7, 1), Instance::sample(2, 2)];
        let all = merged(
            &statics,
            vec![Instance::sample(9, 9), Instance::sample(7, 70)],
        );
        let seen: Vec<(u64, u16)> = all
            .iter()
            .map(|instance| (instance.id, instance.address.port()))
            .collect();
        assert_eq!(seen, [(2, 2), (7, 70), (9, 9)]);
    }

    #[test]
    fn a_route_is_handed_over_in_the_shards_words() {
        let mut configured = config::Route {
            listen: EndpointId::new("a", "router", "g"),
            target: EndpointId::new("a", "worker", "g"),
            policy: config::Policy::Hash,
            header: Some("x-session".into()),
            response: config::Response::Direct,
            ack: config::Ack::OnAccept,
            ack_timeout_ms: 1_500,
            retries_max: 3,
            hold_bytes: 4_096,
            relay: config::RelayTimes {
                first_item_timeout_ms: 250,
                ..config::RelayTimes::default()
            },
            lane: None,
            block_tokens: 16,
            kv: None,
            load: config::RouteLoad::default(),
        };
        let handed = route(
            &configured,
            vec![b"0/a/router/g".to_vec()],
            &[Instance::sample(3, 30)],
            0,
        );
        assert_eq!(
            (handed.listen.as_str(), handed.target.as_str()),
            ("a/router/g", "a/worker/g")
        );
        assert_eq!(handed.policy, directory::Policy::Hash);
        assert_eq!(handed.ack, directory::Ack::OnAccept);
        assert_eq!(
            (handed.header.as_str(), handed.ack_timeout_ns),
            ("x-session", 1_500_000_000)
        );
        assert_eq!(handed.instances[0].path, b"3/x");
        assert_eq!(handed.relay, None);
        configured.response = config::Response::Relay;
        let times = route(&configured, vec![], &[], 0).relay.unwrap();
        assert_eq!((times.first_item_ns, times.home_ns), (250_000_000, 0));
    }
}
