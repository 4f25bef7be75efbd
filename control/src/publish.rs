//! From what discovery knows to the directory of every shard.
//!
//! ```text
//! InstanceWatch of each target --> Board --(only if something differs)--> Directory --> shards
//! our identities, newest first --^
//! ```

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::{Rc, Weak};
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
use crate::discovery::Freshness;
use crate::sights::{Instances, Sight, Sights};
use crate::slots::{NoPlace, Proposal, Slots};
use crate::watch::{Instance, InstanceWatch};

/// Paths of so many of our identities are served: clients keep an address for a while after a
/// lease was lost.
pub const IDENTITIES_MAX: usize = 16;
/// Two directories have this distance at least, so that a crowd of workers that comes at once
/// costs a few directories and not one each.
const PUBLISH_GAP: Duration = Duration::from_millis(5);
/// Longest wait for the shards to take a directory over.
const TAKEN_MAX: Duration = Duration::from_millis(100);

/// One route as control sees it. It never changes: another one takes its place ([`Slots`]).
pub struct Listed {
    /// As configured.
    pub route: config::Route,
    /// Known without discovery.
    statics: Vec<Instance>,
    /// What is known of its target.
    sight: Rc<Sight>,
    /// Whether our record stands in discovery under the present identity.
    registered: Cell<bool>,
    /// It came later than the process, and has not been registered yet.
    joins: Cell<bool>,
}

impl Listed {
    fn new(wanted: Wanted<'_>, sights: &Sights) -> Listed {
        let route = wanted.route.clone();
        let sight = sights.of(&route.target, route.lane.is_some());
        Listed {
            route,
            statics: wanted.statics,
            sight,
            registered: Cell::new(false),
            joins: Cell::new(sights.have_begun()),
        }
    }

    fn is(&self, wanted: &Wanted<'_>) -> bool {
        // Who comes to us over a lane is attached to the place; nobody is dialled for it.
        let statics = self.statics == wanted.statics || self.route.lane.is_some();
        self.route == *wanted.route && statics
    }

    /// The instances now.
    pub fn instances(&self) -> Instances {
        let found = self.sight.instances();
        match self.statics.is_empty() {
            true => found,
            false => merged(&self.statics, found.to_vec()).into(),
        }
    }

    /// Whether its list of instances is what the store says now.
    pub fn is_fresh(&self) -> bool {
        self.sight.is_fresh()
    }

    /// The number of what its workers publish: routes to one target share it.
    pub fn feed(&self) -> u32 {
        self.sight.feed
    }

    /// Tells when the instances change.
    pub fn subscribe(&self) -> watch::Receiver<Instances> {
        self.sight.subscribe()
    }

    /// Whether our record stands in discovery.
    pub fn is_registered(&self) -> bool {
        self.registered.get()
    }

    /// Whether it is new in a process that serves already, and nobody waits for it.
    pub fn joins(&self) -> bool {
        self.joins.get()
    }

    /// Notes whether our record stands in discovery.
    pub fn set_registered(&self, registered: bool) {
        self.registered.set(registered);
        self.joins.set(self.joins.get() && !registered);
    }
}

/// A route of a configuration, and its instances that are written down.
struct Wanted<'a> {
    route: &'a config::Route,
    statics: Vec<Instance>,
}

fn wanted<'a>(
    routes: &'a [config::Route],
    statics: &'a [StaticInstance],
) -> impl Iterator<Item = (String, Wanted<'a>)> {
    routes.iter().map(|route| {
        let own = |instance: &&StaticInstance| instance.endpoint == route.target;
        let own = statics.iter().filter(own);
        let statics = merged(&own.map(static_instance).collect::<Vec<_>>(), Vec::new());
        (route.listen.to_string(), Wanted { route, statics })
    })
}

/// All routes, and the directory that the shards have.
pub struct Board {
    slots: RefCell<Slots<Listed>>,
    sights: Sights,
    identities: RefCell<VecDeque<u64>>,
    cores: Rc<Cores>,
    /// What each core has.
    published: RefCell<Vec<Arc<Directory>>>,
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
        let board = Board {
            slots: RefCell::default(),
            sights: Sights::default(),
            identities: RefCell::default(),
            cores: Rc::clone(cores),
            published: RefCell::new(vec![Arc::default(); cores.count()]),
            publications: Cell::new(0),
            publishing: Mutex::new(()),
            changed: Notify::new(),
        };
        match board.propose(routes, statics) {
            Ok(first) => drop(board.put_in_force(&first)),
            // More than a file of configuration can hold.
            Err(error) => tracing::error!(%error, "no route is served"),
        }
        board.sights.begun();
        Rc::new(board)
    }

    /// The routes in force, in the order of the configuration.
    pub fn routes(&self) -> Vec<Rc<Listed>> {
        let slots = self.slots.borrow();
        slots
            .in_force()
            .map(|(_, listed)| Rc::clone(listed))
            .collect()
    }

    /// The same, each with its place in the directory.
    pub fn placed(&self) -> Vec<(usize, Rc<Listed>)> {
        let slots = self.slots.borrow();
        let placed = slots.in_force();
        placed
            .map(|(place, listed)| (place, Rc::clone(listed)))
            .collect()
    }

    /// What is known of each target.
    pub fn sights(&self) -> &Sights {
        &self.sights
    }

    /// Directories handed to the shards so far.
    pub fn publications(&self) -> u64 {
        self.publications.get()
    }

    /// The directory that a core has, or is about to take over. Free places have no name.
    pub fn published(&self, core: usize) -> Arc<Directory> {
        let published = self.published.borrow();
        published.get(core).map(Arc::clone).unwrap_or_default()
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
        let mut any = false;
        for (core, next) in self.directories().into_iter().enumerate() {
            if self.published.borrow().get(core) == Some(&next) {
                continue;
            }
            let instances = next.routes.iter().map(|route| route.instances.len());
            let instances: usize = instances.sum();
            tracing::debug!(core, instances, "directory published");
            let command = Command::Directory(Arc::clone(&next));
            if self.cores.tell_one(core, command).await || self.cores.has_ended(core) {
                self.published.borrow_mut()[core] = next;
                any = true;
            } else {
                // It stands still; it gets it when it goes on.
                self.changed.notify_one();
            }
        }
        self.publications
            .set(self.publications.get() + u64::from(any));
    }

    /// Publishes whenever something has changed; never ends.
    pub async fn keep_published(&self) {
        loop {
            self.changed.notified().await;
            self.publish().await;
            sleep(PUBLISH_GAP).await;
        }
    }

    /// One for each core; all the same unless a configuration is on trial.
    fn directories(&self) -> Vec<Arc<Directory>> {
        let cores = self.cores.count();
        if self.slots.borrow().are_uniform() {
            let same = Arc::new(self.directory(0));
            return vec![same; cores];
        }
        let of = |core| Arc::new(self.directory(core));
        (0..cores).map(of).collect()
    }

    fn directory(&self, core: usize) -> Directory {
        let identities = self.identities.borrow();
        let place = |held: Option<(&Rc<Listed>, bool)>| {
            let Some((listed, leads)) = held else {
                // A free place.
                return directory::Route::default();
            };
            let ids = identities.iter().filter(|_| leads);
            let paths = ids.map(|id| instance_path(*id, &listed.route.listen).into_bytes());
            let (paths, feed) = (paths.collect(), listed.feed());
            route(&listed.route, paths, &listed.instances(), feed)
        };
        Directory {
            routes: self.slots.borrow().on(core).map(place).collect(),
        }
    }

    /// Finds places for the routes of a configuration; nothing is sent there yet.
    ///
    /// # Errors
    /// Too many routes drain.
    pub fn propose(
        &self,
        routes: &[config::Route],
        statics: &[StaticInstance],
    ) -> Result<Proposal, NoPlace> {
        let make = |wanted: Wanted<'_>| Listed::new(wanted, &self.sights);
        let mut slots = self.slots.borrow_mut();
        slots.propose(
            wanted(routes, statics),
            |held, wanted| held.is(wanted),
            make,
        )
    }

    /// From the next publication on one core has a proposal.
    pub fn try_on(&self, proposal: &Proposal, core: usize) {
        self.slots.borrow_mut().try_on(proposal, core);
    }

    /// From the next publication on all cores have it. Answers what nobody asks for any more: it is
    /// served until [`Board::retire`].
    pub fn put_in_force(&self, proposal: &Proposal) -> Vec<Rc<Listed>> {
        let before = self.routes();
        let removed = self.slots.borrow_mut().put_in_force(proposal);
        for listed in self.routes() {
            // The record of an endpoint stands, whichever route has it now.
            let same = |old: &&Rc<Listed>| old.route.listen == listed.route.listen;
            if let Some(old) = before.iter().find(same) {
                listed.set_registered(old.is_registered());
            }
        }
        let slots = self.slots.borrow();
        removed
            .into_iter()
            .filter_map(|place| slots.at(place))
            .collect()
    }

    /// From the next publication on no core has it.
    pub fn take_back(&self, proposal: &Proposal) {
        self.slots.borrow_mut().take_back(proposal);
    }

    /// Takes the paths of a removed route away; what is under way goes on.
    pub async fn retire(&self, removed: &Rc<Listed>) {
        if self.slots.borrow_mut().retire(removed) {
            self.publish().await;
        }
    }

    /// Frees the places of routes that nothing is under way of any more; answers whether some
    /// remain.
    pub async fn sweep(&self) -> bool {
        let before = self.slots.borrow().retired();
        if before.is_empty() {
            // Somebody may have held a route for longer than it had a place.
            self.sights.tidy();
            return false;
        }
        // From here on no core sends anything there.
        self.publish().await;
        let mut retired = self.slots.borrow().retired();
        retired.retain(|place| before.contains(place));
        if let Some(held) = self.cores.census().await {
            let free = |place: &usize| !held.contains(&(*place as u32));
            let places: Vec<usize> = retired.into_iter().filter(free).collect();
            self.slots.borrow_mut().free(&places);
            self.sights.tidy();
            self.publish().await;
        }
        !self.slots.borrow().retired().is_empty()
    }

    /// Follows the instances of one target; never ends. Those on NATS are dialled at `gateway`.
    pub async fn follow(self: Rc<Self>, sight: Weak<Sight>, mut watch: InstanceWatch) {
        loop {
            watch.changed().await;
            let Some(sight) = sight.upgrade() else { return };
            let fresh = watch.freshness() == Freshness::Fresh;
            if sight.replace(merged(&[], watch.instances())) {
                self.changed.notify_one();
            }
            sight.set_fresh(fresh);
        }
    }

    /// A worker of a route has attached its lanes.
    pub fn lane_attached(&self, place: usize, worker: Instance) {
        self.lanes_are(place, |workers| workers.push(worker));
    }

    /// It is gone.
    pub fn lane_detached(&self, place: usize, worker: u64) {
        self.lanes_are(place, |workers| workers.retain(|other| other.id != worker));
    }

    fn lanes_are(&self, place: usize, change: impl FnOnce(&mut Vec<Instance>)) {
        let listed = self.slots.borrow().at(place);
        if let Some(listed) = listed {
            let mut workers = listed.sight.instances().to_vec();
            change(&mut workers);
            if listed.sight.replace(merged(&[], workers)) {
                self.changed.notify_one();
            }
        }
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
