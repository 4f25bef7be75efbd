//! One endpoint that this process serves: in place, registered, checked, and taken away again in
//! Dynamo's order (`spec/events-discovery.md` §5.2, §5.3; `spec/request-plane.md` §10.3).
//!
//! ```text
//! serve: handler on every shard -> path served -> Registered -> Running -> Healthy
//! lease lost: Created -> the path of the new identity -> Registered -> ...
//! stop:  out of discovery -> path unknown -> running and queued requests end -> Deregistered
//! ```

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;

use corelane_codec::control_message::PayloadCodec;
use corelane_codec::path::{EndpointId, instance_path};
use corelane_engine::stats::HandlerStats;
use tokio::sync::watch;
use tokio::task::{JoinHandle, spawn_local};
use tokio::time::{Instant, sleep, timeout_at};

use super::canary::keep_checking;
use super::runtime::{Inner, Runtime};
use crate::discovery::{Record, Registered};
use crate::health::{self, State};
use crate::nats::Requests;
use crate::offer;

/// A record that could not be stored at once is looked at this often until it is.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// How often the service on NATS learns what an endpoint tells of itself.
const TELL_EVERY: Duration = Duration::from_millis(500);
/// Longest wait for what is being written when an endpoint leaves.
const WRITE_MAX: Duration = Duration::from_secs(6);
/// How often a drain looks whether requests have ended.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// How often a long drain says what it waits for.
const SAY_EVERY: Duration = Duration::from_secs(5);

/// Answers what an endpoint tells of itself.
pub(super) type StatsHandler = Box<dyn Fn() -> serde_json::Value>;

/// The state of one served endpoint.
pub(super) struct Serving {
    pub(super) id: EndpointId,
    pub(super) codec: PayloadCodec,
    /// One for each shard.
    pub(super) stats: Vec<Arc<HandlerStats>>,
    pub(super) entry: health::Endpoint,
    pub(super) canary: Option<Vec<u8>>,
    pub(super) stats_handler: Option<StatsHandler>,
    pub(super) instance_id: Cell<Option<u64>>,
    stopping: watch::Sender<bool>,
    tasks: RefCell<Vec<JoinHandle<()>>>,
}

impl Serving {
    pub(super) fn new(
        id: EndpointId,
        codec: PayloadCodec,
        entry: health::Endpoint,
        shards: usize,
    ) -> Serving {
        Serving {
            codec,
            stats: (0..shards).map(|_| counters(&id)).collect(),
            id,
            entry,
            canary: None,
            stats_handler: None,
            instance_id: Cell::new(None),
            stopping: watch::Sender::new(false),
            tasks: RefCell::default(),
        }
    }

    /// Requests that run or wait.
    pub(super) fn busy(&self) -> u64 {
        self.sum(|stats| stats.busy.get())
    }

    /// Sums a number over the shards.
    pub(super) fn sum(&self, number: impl Fn(&HandlerStats) -> u64) -> u64 {
        self.stats.iter().map(|stats| number(stats)).sum()
    }

    /// Whether it has begun to leave.
    pub(super) fn is_stopping(&self) -> bool {
        *self.stopping.borrow()
    }

    /// Registers and keeps registered, checks and keeps checking.
    pub(super) fn begin(self: &Rc<Self>, inner: &Rc<Inner>) {
        let mut tasks = self.tasks.borrow_mut();
        let keeper = keep(Rc::downgrade(inner), Rc::clone(self));
        tasks.push(spawn_local(keeper));
        let offered = inner.requests.as_ref().is_some_and(Requests::is_offered);
        if offered && self.stats_handler.is_some() {
            let told = keep_told(Rc::downgrade(inner), Rc::clone(self));
            tasks.push(spawn_local(told));
        }
        if self.canary.is_some() && inner.options.checks.enabled {
            let checks = keep_checking(Rc::downgrade(inner), Rc::clone(self));
            tasks.push(spawn_local(checks));
        }
    }

    /// Steps 1 of the stop: out of discovery, and not ready.
    pub(super) async fn withdraw(&self, inner: &Inner) {
        self.stopping.send_replace(true);
        self.entry.turn(State::Stopping);
        // What is being written is awaited: cut off it could arrive after the removal.
        let deadline = Instant::now() + WRITE_MAX;
        for mut task in self.tasks.take() {
            if timeout_at(deadline, &mut task).await.is_err() {
                tracing::warn!(endpoint = %self.id, "the store is slow; leaving it anyway");
                task.abort();
            }
        }
        let name = Record::instance_name(&self.id);
        inner.discovery.unregister(&name).await;
        tracing::info!(endpoint = %self.id, "drain: out of discovery");
    }

    /// Waits until nothing runs or waits, `patience` at most.
    pub(super) async fn emptied(&self, patience: Duration) {
        let began = Instant::now();
        let mut said = began;
        while self.busy() > 0 {
            let requests = self.busy();
            if began.elapsed() >= patience {
                tracing::warn!(
                    endpoint = %self.id, requests, ?patience,
                    "drain: time is up, requests are cut off"
                );
                return;
            }
            if said.elapsed() >= SAY_EVERY {
                said = Instant::now();
                tracing::info!(endpoint = %self.id, requests, "drain: waiting");
            }
            sleep(LOOK_EVERY).await;
        }
        tracing::info!(endpoint = %self.id, waited = ?began.elapsed(), "drain: nothing runs");
    }
}

/// Counters that know whose they are.
fn counters(id: &EndpointId) -> Arc<HandlerStats> {
    let stats = HandlerStats::default();
    let _ = stats.id.set(id.clone());
    Arc::new(stats)
}

/// Keeps the record of an endpoint in discovery under the identity of the day.
async fn keep(inner: Weak<Inner>, serving: Rc<Serving>) {
    let Some(mut identity) = inner.upgrade().map(|inner| inner.discovery.identity()) else {
        return;
    };
    let mut stopping = serving.stopping.subscribe();
    let mut stored_as = None;
    while !serving.is_stopping() {
        let Some(strong) = inner.upgrade() else {
            return;
        };
        let id = *identity.borrow_and_update();
        if stored_as != Some(id) {
            serving.entry.turn(State::Created);
            strong.paths.be(id).await;
            if register(&strong, &serving, id).await {
                stored_as = Some(id);
            }
        }
        drop(strong);
        let again = stored_as.is_none();
        tokio::select! {
            changed = identity.changed() => if changed.is_err() { return },
            _ = stopping.wait_for(|stop| *stop) => return,
            () = sleep(LOOK_AGAIN), if again => {}
        }
    }
}

/// Has the service on NATS know what the endpoint tells of itself.
async fn keep_told(inner: Weak<Inner>, serving: Rc<Serving>) {
    let mut stopping = serving.stopping.subscribe();
    loop {
        let Some(strong) = inner.upgrade() else {
            return;
        };
        let requests = strong.requests.as_ref();
        let stats = serving.stats_handler.as_ref();
        if let (Some(requests), Some(stats), Some(id)) =
            (requests, stats, serving.instance_id.get())
        {
            requests.tell(&serving.id, id, stats());
        }
        drop(strong);
        tokio::select! {
            _ = stopping.wait_for(|stop| *stop) => return,
            () = sleep(TELL_EVERY) => {}
        }
    }
}

/// Answers whether the record stands in the store.
async fn register(inner: &Inner, serving: &Serving, id: u64) -> bool {
    let requests = inner.requests.as_ref();
    let place = match offer::place(requests, inner.address, &serving.id, id).await {
        Ok(place) => place,
        Err(error) => {
            tracing::error!(endpoint = %serving.id, %error, "endpoint not offered on NATS");
            return false;
        }
    };
    let record = offer::record(&serving.id, place, serving.codec);
    match inner.discovery.replace(record).await {
        Ok(Registered::Stored) => {}
        Ok(Registered::Deferred) => {
            tracing::warn!(endpoint = %serving.id, "the store is away; registered when it is back");
            return false;
        }
        Err(error) => {
            tracing::error!(endpoint = %serving.id, %error, "endpoint not registered");
            return false;
        }
    }
    serving.instance_id.set(Some(id));
    serving.entry.is_instance(id);
    for stats in &serving.stats {
        stats.instance.set(id);
    }
    serving.entry.turn(State::Registered);
    // The shards took the path over before the record was written, so requests are answered.
    serving.entry.turn(State::Running);
    if serving.canary.is_none() || !inner.options.checks.enabled {
        serving.entry.turn(State::Healthy);
    }
    let path = instance_path(id, &serving.id);
    tracing::info!(endpoint = %serving.id, "registered as {}/{path}", inner.address);
    true
}

/// An endpoint that is served: what [`super::Endpoint::serve`] answers. Dropped it is served on.
#[derive(Clone)]
pub struct Served {
    pub(super) serving: Rc<Serving>,
    pub(super) runtime: Weak<Inner>,
}

impl Served {
    /// What is served.
    pub fn id(&self) -> &EndpointId {
        &self.serving.id
    }

    /// How far its life has come.
    pub fn state(&self) -> State {
        self.serving.entry.state()
    }

    /// Waits until it is in that state, or beyond; the whole wait is bounded by `patience`.
    /// Answers whether it is.
    pub async fn reached(&self, state: State, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        while self.state() < state {
            if Instant::now() >= deadline {
                return false;
            }
            sleep(LOOK_EVERY).await;
        }
        true
    }

    /// The instance that it is in discovery; another one after a lost lease.
    pub fn instance_id(&self) -> Option<u64> {
        self.serving.instance_id.get()
    }

    /// `IP:PORT/PATH`, as `corelane call --address` takes it.
    pub fn called_at(&self) -> Option<String> {
        let inner = self.runtime.upgrade()?;
        let path = instance_path(inner.discovery.instance_id(), &self.serving.id);
        Some(format!("{}/{path}", inner.address))
    }

    /// Requests that run or wait for a slot.
    pub fn busy(&self) -> u64 {
        self.serving.busy()
    }

    /// A counter, summed over the shards.
    pub fn count(&self, number: impl Fn(&HandlerStats) -> u64) -> u64 {
        self.serving.sum(number)
    }

    /// Takes this endpoint away and leaves the others: out of discovery, then unknown to callers,
    /// then running and queued requests end, which takes as long as the drain may take at most.
    pub async fn stop(&self) {
        let Some(inner) = self.runtime.upgrade() else {
            return;
        };
        if self.serving.is_stopping() {
            return;
        }
        self.serving.withdraw(&inner).await;
        inner.paths.remove(&self.serving.id).await;
        let patience = Duration::from_secs(inner.options.drain.timeout_s.into());
        self.serving.emptied(patience).await;
        self.serving.entry.turn(State::Deregistered);
        Runtime::forget(&inner, &self.serving);
    }
}
