//! The instances that this process calls: one watch for each endpoint, however many clients look.
//!
//! ```text
//! discovery -> one task -> Watched (list, version) <- clients on all shards and threads
//!                             '- Member: load by shard, failed until, overloaded until, busy
//! ```
//! A client reads the version, which costs nothing, and takes the list again only when it has
//! changed. The load of a member has one writer for each shard.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashSet};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use corelane_codec::discovery::DeviceType;
use corelane_codec::path::EndpointId;
use corelane_engine::shard::Command;
use corelane_engine::stats::Cell;
use tokio::sync::{oneshot, watch};
use tokio::task::spawn_local;

use crate::cores::Cores;
use crate::discovery::{Discovery, Freshness};
use crate::watch::{Instance, InstanceWatch};

/// An instance that said that it is overloaded gets nothing for so long
/// (`spec/request-plane.md` §11.4).
const OVERLOADED: Duration = Duration::from_secs(1);

/// One instance and what this process knows of it beyond discovery.
pub(super) struct Member {
    pub(super) instance: Instance,
    /// Calls under way, by shard.
    load: Box<[Cell]>,
    /// Monotonic time until which it is left out after a fault; 0 for not at all.
    failed_until_ns: AtomicU64,
    overloaded_until_ns: AtomicU64,
    /// A load monitor says so.
    busy: AtomicBool,
}

impl Member {
    fn new(instance: Instance, shards: usize) -> Member {
        Member {
            instance,
            load: (0..shards).map(|_| Cell::default()).collect(),
            failed_until_ns: AtomicU64::new(0),
            overloaded_until_ns: AtomicU64::new(0),
            busy: AtomicBool::new(false),
        }
    }

    /// Calls of this process that are under way there.
    pub(super) fn load(&self) -> u64 {
        self.load.iter().map(Cell::get).sum()
    }

    /// One more; to be called on that shard.
    pub(super) fn begin(self: &Arc<Self>, shard: usize) -> Loaded {
        let cell = &self.load[shard];
        cell.set(cell.get() + 1);
        Loaded {
            member: Arc::clone(self),
            shard,
        }
    }

    /// Leaves it out for a while.
    pub(super) fn fail(&self, time: Duration) {
        if !time.is_zero() {
            let until = now_ns().saturating_add(nanos(time));
            self.failed_until_ns.store(until, Ordering::Relaxed);
        }
    }

    /// It has no room at the moment.
    pub(super) fn overload(&self) {
        let until = now_ns().saturating_add(nanos(OVERLOADED));
        self.overloaded_until_ns.store(until, Ordering::Relaxed);
    }

    pub(super) fn has_failed(&self, now_ns: u64) -> bool {
        self.failed_until_ns.load(Ordering::Relaxed) > now_ns
    }

    pub(super) fn is_overloaded(&self, now_ns: u64) -> bool {
        self.busy.load(Ordering::Relaxed)
            || self.overloaded_until_ns.load(Ordering::Relaxed) > now_ns
    }

    /// Whether calls to that instance come here.
    fn is_behind(&self, other: &Instance) -> bool {
        (self.instance.address, &self.instance.path) == (other.address, &other.path)
    }

    pub(super) fn is_cpu(&self) -> bool {
        self.instance.device == Some(DeviceType::Cpu)
    }
}

/// Nanoseconds since this process first asked, and never 0.
pub(super) fn now_ns() -> u64 {
    static BEGAN: LazyLock<Instant> = LazyLock::new(Instant::now);
    nanos(BEGAN.elapsed()).saturating_add(1)
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// A call under way at a member, counted until it is dropped, on the shard that began it.
pub(super) struct Loaded {
    member: Arc<Member>,
    shard: usize,
}

impl Drop for Loaded {
    fn drop(&mut self) {
        let cell = &self.member.load[self.shard];
        cell.set(cell.get().saturating_sub(1));
    }
}

/// The members of an endpoint at one moment, sorted by id.
pub(super) type Members = Arc<[Arc<Member>]>;

/// One watched endpoint.
pub(super) struct Watched {
    pub(super) id: EndpointId,
    members: Mutex<Members>,
    changed: watch::Sender<u64>,
    version: AtomicU64,
    listed: AtomicBool,
    shards: usize,
    /// Dropped with the last client, which ends the watch.
    _alive: oneshot::Sender<()>,
}

impl Watched {
    /// Nobody is known yet. What is answered beside it hears when the last client has gone.
    fn new(id: EndpointId, shards: usize) -> (Watched, oneshot::Receiver<()>) {
        let (alive, gone) = oneshot::channel();
        let watched = Watched {
            id,
            members: Mutex::new(Arc::new([])),
            changed: watch::Sender::new(0),
            version: AtomicU64::new(0),
            listed: AtomicBool::new(false),
            shards,
            _alive: alive,
        };
        (watched, gone)
    }

    /// Changes with the members.
    pub(super) fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// The members now.
    pub(super) fn members(&self) -> Members {
        self.lock().clone()
    }

    /// Whether the store has listed them.
    pub(super) fn is_listed(&self) -> bool {
        self.listed.load(Ordering::Acquire)
    }

    /// Tells about changes.
    pub(super) fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Exactly these are busy.
    pub(super) fn set_busy(&self, ids: &HashSet<u64>) {
        for member in self.members().iter() {
            let busy = ids.contains(&member.instance.id);
            member.busy.store(busy, Ordering::Relaxed);
            if !busy {
                member.overloaded_until_ns.store(0, Ordering::Relaxed);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Members> {
        // A list is replaced whole.
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes over what discovery lists. Members that stay keep their load; every change gives all
    /// another chance. Answers those that have left.
    fn take(&self, instances: Vec<Instance>, fresh: bool) -> Vec<Arc<Member>> {
        let mut members = self.lock();
        let mut left = Vec::new();
        let same = members.len() == instances.len()
            && members
                .iter()
                .zip(&instances)
                .all(|(member, instance)| member.instance == *instance);
        if !same {
            let member = |instance: Instance| {
                let known = members.iter().find(|member| member.instance == instance);
                match known {
                    Some(member) => {
                        member.failed_until_ns.store(0, Ordering::Relaxed);
                        Arc::clone(member)
                    }
                    None => Arc::new(Member::new(instance, self.shards)),
                }
            };
            let next: Members = instances.into_iter().map(member).collect();
            let stays = |member: &Member| next.iter().any(|one| one.is_behind(&member.instance));
            let gone = members.iter().filter(|member| !stays(member));
            left.extend(gone.cloned());
            tracing::info!(endpoint = %self.id, instances = next.len(), "instances changed");
            *members = next;
        }
        drop(members);
        if fresh {
            self.listed.store(true, Ordering::Release);
        }
        if !same || fresh {
            self.version.fetch_add(1, Ordering::Release);
            self.changed.send_modify(|count| *count += 1);
        }
        left
    }
}

/// All watched endpoints of a process. Clones are the same.
#[derive(Clone)]
pub(super) struct Registry(Rc<Entries>);

struct Entries {
    discovery: Discovery,
    cores: Rc<Cores>,
    /// Where instances on NATS are dialled.
    gateway: Option<SocketAddr>,
    shards: usize,
    watched: RefCell<BTreeMap<EndpointId, Weak<Watched>>>,
}

impl Registry {
    pub(super) fn new(
        discovery: &Discovery,
        cores: &Rc<Cores>,
        shards: usize,
        gateway: Option<SocketAddr>,
    ) -> Registry {
        Registry(Rc::new(Entries {
            discovery: discovery.clone(),
            cores: Rc::clone(cores),
            gateway,
            shards,
            watched: RefCell::default(),
        }))
    }

    /// The watch of an endpoint: the one that there is, or a new one.
    pub(super) fn watch(&self, id: &EndpointId) -> Arc<Watched> {
        let mut entries = self.0.watched.borrow_mut();
        if let Some(watched) = entries.get(id).and_then(Weak::upgrade) {
            return watched;
        }
        entries.retain(|_, watched| watched.strong_count() > 0);
        let (watched, gone) = Watched::new(id.clone(), self.0.shards);
        let watched = Arc::new(watched);
        entries.insert(id.clone(), Arc::downgrade(&watched));
        let watch = InstanceWatch::new(&self.0.discovery, id).over_nats(self.0.gateway);
        let cores = Rc::clone(&self.0.cores);
        spawn_local(follow(watch, Arc::downgrade(&watched), cores, gone));
        watched
    }

    /// One instance that is known without discovery.
    pub(super) fn fixed(&self, id: EndpointId, instance: Instance) -> Arc<Watched> {
        let (watched, _) = Watched::new(id, self.0.shards);
        watched.take(vec![instance], true);
        Arc::new(watched)
    }

    /// Endpoints that are watched now.
    pub(super) fn count(&self) -> usize {
        let entries = self.0.watched.borrow();
        let alive = |watched: &&Weak<Watched>| watched.strong_count() > 0;
        entries.values().filter(alive).count()
    }
}

async fn follow(
    mut watch: InstanceWatch,
    watched: Weak<Watched>,
    cores: Rc<Cores>,
    mut gone: oneshot::Receiver<()>,
) {
    loop {
        tokio::select! {
            () = watch.changed() => {}
            _ = &mut gone => return,
        }
        let Some(watched) = watched.upgrade() else {
            return;
        };
        let fresh = watch.freshness() == Freshness::Fresh;
        let left = watched.take(watch.instances(), fresh);
        drop(watched);
        // Whoever waits for one of these may wait in vain.
        for member in left.iter().filter(|member| member.load() > 0) {
            let Instance { address, path, .. } = &member.instance;
            let left = || Command::InstanceLeft {
                address: *address,
                path: path.clone(),
            };
            cores.tell(left).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watched() -> Watched {
        Watched::new(EndpointId::new("a", "b", "c"), 2).0
    }

    #[test]
    fn members_that_stay_keep_their_load_and_get_another_chance() {
        let watched = watched();
        watched.take(vec![Instance::sample(1, 1), Instance::sample(2, 2)], true);
        let before = watched.members();
        let loaded = before[0].begin(1);
        before[0].fail(Duration::from_secs(60));
        assert!(before[0].has_failed(now_ns()));
        let version = watched.version();
        watched.take(vec![Instance::sample(1, 1), Instance::sample(3, 3)], true);
        assert!(watched.version() > version);
        let after = watched.members();
        assert!(Arc::ptr_eq(&before[0], &after[0]) && after.len() == 2);
        assert_eq!((after[0].load(), after[1].load()), (1, 0));
        assert!(!after[0].has_failed(now_ns()));
        drop(loaded);
        assert_eq!(after[0].load(), 0);
        // The same id at another address is another member.
        watched.take(vec![Instance::sample(1, 9)], true);
        assert!(!Arc::ptr_eq(&after[0], &watched.members()[0]));
    }

    #[test]
    fn who_is_busy_is_told_by_the_monitor_and_by_refusals() {
        let watched = watched();
        watched.take(vec![Instance::sample(1, 1), Instance::sample(2, 2)], true);
        let members = watched.members();
        let busy = |member: &Member| member.is_overloaded(now_ns());
        members[1].overload();
        assert!(!busy(&members[0]) && busy(&members[1]));
        // What the monitor says holds in either direction.
        watched.set_busy(&HashSet::from([1]));
        assert!(busy(&members[0]) && !busy(&members[1]));
        members[0].fail(Duration::ZERO);
        assert!(!members[0].has_failed(now_ns()));
    }
}
