//! What workers publish about themselves reaches the cores: KV events for indexes, load for the
//! choice by load (spec/events-discovery.md §3.8).
//!
//! ```text
//! event plane --kv-events-----------> caches: numbers checked, decoded once --Batch---> every core
//! event plane --forward-pass-metrics, kv_metrics--> loads: added up --------Reports---> every core
//! discovery --instances that are gone--'
//! ```
//!
//! There is one feed for each target and topic that some route wants. Events are best effort: what
//! was missed is counted, and asked for where it matters, or forgotten.

mod asking;
mod caches;
mod loads;
mod metrics;
mod recovery;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use corelane_codec::event::{Scope, topic};
use corelane_codec::path::EndpointId;
use corelane_engine::config::RingKind;
use corelane_engine::directory::LoadSource;
use corelane_engine::kv::RankId;
use corelane_engine::shard::Command;
use futures_util::FutureExt;
use tokio::task::{AbortHandle, JoinSet, spawn_local};
use tokio::time::sleep;

use crate::config;
use crate::cores::Cores;
use crate::discovery::Discovery;
use crate::env::Env;
use crate::events::{
    CurveOptions, Event, EventPlane, Events, EventsError, Losses, Subscriber, ZmqOptions,
};
use crate::nats::{Nats, NatsOptions};
use crate::publish::Board;

use self::recovery::{Recovery, Sources};
pub use asking::{Ask, Source, Target};
pub use caches::{Counts, Digest};
pub use loads::Gauge;

/// Events that are taken together, if they are there.
const TOGETHER: usize = 256;
/// Reports of load go to the cores so often at most.
const REPORT_GAP: Duration = Duration::from_millis(5);
/// Between two attempts to subscribe.
const AGAIN: Duration = Duration::from_secs(2);

/// All feeds of a router.
pub struct Feeds {
    hearing: Rc<Hearing>,
    list: Vec<Rc<Feed>>,
    tasks: Vec<AbortHandle>,
}

/// What all feeds hear with, and whom they tell.
struct Hearing {
    events: Events,
    discovery: Discovery,
    /// Where instances on NATS are dialled.
    gateway: Option<SocketAddr>,
    recovery: Recovery,
    board: Rc<Board>,
    cores: Rc<Cores>,
}

/// Questions under way.
#[derive(Default)]
struct Asked {
    tasks: JoinSet<(Ask, Result<Vec<u8>, String>)>,
    /// One of each rank: what a newer one replaces is not waited for any more.
    last: HashMap<RankId, AbortHandle>,
}

/// One topic of one target.
struct Feed {
    number: u32,
    target: EndpointId,
    topic: &'static str,
    what: What,
    /// The subscription stands.
    connected: Cell<bool>,
    /// Events that came.
    events: Cell<u64>,
    /// What earlier subscriptions have missed, and this one.
    missed: Cell<(Losses, Losses)>,
    /// From the publisher's clock to ours, of the last event.
    lag_ms: Cell<u64>,
}

enum What {
    Caches(RefCell<Digest>),
    Loads(RefCell<Gauge>),
}

/// What the routes of a configuration want to hear.
fn wanted(board: &Board) -> BTreeMap<(u32, &'static str), (EndpointId, What)> {
    let mut wanted = BTreeMap::new();
    for listed in board.routes() {
        let (number, route) = (listed.feed(), &listed.route);
        if route.kv.is_some() {
            let what = What::Caches(RefCell::new(Digest::new(number)));
            let key = (number, topic::KV_EVENTS);
            wanted.insert(key, (route.target.clone(), what));
        }
        let source = match route.load.source {
            config::LoadSource::Own => continue,
            config::LoadSource::ForwardPass => LoadSource::Requests,
            config::LoadSource::KvMetrics => LoadSource::Blocks,
        };
        let stale = Duration::from_millis(route.load.stale_ms.into());
        let gauge = Gauge::new(number, source, route.block_tokens, stale);
        let key = (number, gauge.topic());
        let what = What::Loads(RefCell::new(gauge));
        wanted.insert(key, (route.target.clone(), what));
    }
    wanted
}

/// The event plane as the environment asks for it, with the keys of the configuration: over the
/// NATS connection that stands, if one does, or over ZMQ on this kind of ring.
///
/// # Errors
/// A variable or a key cannot be used.
pub async fn open(
    env: &Env,
    curve: &CurveOptions,
    discovery: &Discovery,
    nats: Option<&Nats>,
    ring: RingKind,
) -> Result<Events> {
    Ok(match (EventPlane::read(env)?, nats) {
        (EventPlane::Off, _) => Events::off(discovery),
        (EventPlane::Zmq, _) => Events::zmq(discovery, ZmqOptions::read_with(env, ring, curve)?),
        (EventPlane::Nats, Some(nats)) => Events::nats(discovery, nats),
        (EventPlane::Nats, None) => {
            let nats = Nats::connect_later(&NatsOptions::read(env)?).await?;
            Events::nats(discovery, &nats)
        }
    })
}

/// Whether a configuration wants any feed.
pub fn are_wanted(routes: &[config::Route]) -> bool {
    let wants =
        |route: &config::Route| route.kv.is_some() || route.load.source != config::LoadSource::Own;
    routes.iter().any(wants)
}

impl Feeds {
    /// Subscribes to what the routes of `config` want, and hands it to the cores from now on. Does
    /// not wait. `gateway` is where instances on NATS are dialled. Needs a `LocalSet`.
    ///
    /// # Errors
    /// The environment says what workers cannot be called with.
    pub fn start(
        config: &config::Config,
        (events, discovery, gateway): (Events, &Discovery, Option<SocketAddr>),
        board: &Rc<Board>,
        cores: &Rc<Cores>,
    ) -> Result<Feeds> {
        let hearing = Rc::new(Hearing {
            events,
            discovery: discovery.clone(),
            gateway,
            recovery: Recovery::new(config)?,
            board: Rc::clone(board),
            cores: Rc::clone(cores),
        });
        let (mut list, mut tasks) = (Vec::new(), Vec::new());
        for ((number, topic), (target, what)) in wanted(board) {
            let feed = Rc::new(Feed {
                number,
                target,
                topic,
                what,
                connected: Cell::new(false),
                events: Cell::new(0),
                missed: Cell::default(),
                lag_ms: Cell::new(0),
            });
            let (followed, hearing) = (Rc::clone(&feed), Rc::clone(&hearing));
            let task = spawn_local(async move { followed.follow(&hearing).await });
            tasks.push(task.abort_handle());
            list.push(feed);
        }
        Ok(Feeds {
            hearing,
            list,
            tasks,
        })
    }

    /// Writes metric families, without the mark of the end.
    pub fn write(&self, out: &mut String) {
        metrics::write(&self.list, out);
    }

    /// Hears no more.
    pub async fn stop(&self) {
        for task in &self.tasks {
            task.abort();
        }
        self.hearing.recovery.stop().await;
        self.hearing.events.close().await;
    }
}

impl Feed {
    /// Never ends.
    async fn follow(&self, hearing: &Rc<Hearing>) {
        let mut known = self.present(&hearing.board);
        loop {
            let mut subscriber = self.subscribed(&hearing.events).await;
            self.connected.set(true);
            tracing::info!(target = %self.target, topic = self.topic, "listening to workers");
            self.hear(&mut subscriber, &mut known, hearing).await;
            self.connected.set(false);
            let (before, now) = self.missed.get();
            self.missed.set((sum(before, now), Losses::default()));
            tracing::warn!(target = %self.target, topic = self.topic, "events have ended");
            if let What::Caches(digest) = &self.what {
                digest.borrow_mut().begin_anew();
                self.hand_over(&hearing.cores).await;
            }
            sleep(AGAIN).await;
        }
    }

    async fn subscribed(&self, events: &Events) -> Subscriber {
        let scope = Scope::of(self.target.clone());
        let mut told = false;
        loop {
            match events.subscriber(&scope, self.topic).await {
                Ok(subscriber) => return subscriber,
                Err(error) => {
                    if !told {
                        let (target, topic) = (&self.target, self.topic);
                        tracing::warn!(%target, topic, %error, "no events of workers; trying on");
                    }
                    told = true;
                    sleep(AGAIN).await;
                }
            }
        }
    }

    /// Until the subscription ends.
    async fn hear(
        &self,
        subscriber: &mut Subscriber,
        known: &mut HashSet<u64>,
        hearing: &Rc<Hearing>,
    ) {
        let (board, cores) = (&hearing.board, &hearing.cores);
        let Some(sight) = board.sights().of_feed(self.number) else {
            return std::future::pending().await;
        };
        let mut changes = sight.subscribe();
        let mut sources = self.sources(hearing);
        let mut asked = Asked::default();
        loop {
            tokio::select! {
                event = subscriber.next() => match event {
                    Some(event) => self.came(event),
                    None => return,
                },
                Ok(()) = changes.changed() => self.compare(known, board),
                list = listed(&mut sources) => self.publishers(list),
                Some(done) = asked.tasks.join_next() => {
                    // One that was replaced has no answer.
                    if let Ok((ask, answer)) = done {
                        self.answered(&ask, answer);
                    }
                }
            }
            for _ in 1..TOGETHER {
                match subscriber.next().now_or_never() {
                    Some(Some(event)) => self.came(event),
                    Some(None) => return self.hand_over(cores).await,
                    None => break,
                }
            }
            self.missed.set((self.missed.get().0, subscriber.losses()));
            self.hand_over(cores).await;
            match &self.what {
                What::Caches(digest) => ask(digest.borrow_mut().asks(), &mut asked, hearing),
                What::Loads(_) => sleep(REPORT_GAP).await,
            }
        }
    }

    /// Who publishes, where that matters.
    fn sources(&self, hearing: &Hearing) -> Option<Sources> {
        let What::Caches(_) = self.what else {
            return None;
        };
        let (discovery, gateway) = (&hearing.discovery, hearing.gateway);
        Some(Sources::new(discovery, &self.target, gateway))
    }

    fn publishers(&self, list: HashMap<u64, Source>) {
        if let What::Caches(digest) = &self.what {
            digest.borrow_mut().publishers(list);
        }
    }

    fn answered(&self, ask: &Ask, answer: Result<Vec<u8>, String>) {
        let What::Caches(digest) = &self.what else {
            return;
        };
        if let Some(why) = digest.borrow_mut().answered(ask, answer) {
            let (worker, dp_rank) = (format_args!("{:x}", ask.rank.worker_id), ask.rank.dp_rank);
            tracing::warn!(
                target = %self.target, %worker, dp_rank, why,
                "a worker does not say what is in its KV cache, which is learned as it changes"
            );
        }
    }

    fn came(&self, event: Result<Event, EventsError>) {
        // One that is none is among the losses of the subscriber.
        let Ok(event) = event else {
            return;
        };
        self.events.set(self.events.get() + 1);
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now_ms = now.map_or(0, |now| now.as_millis() as u64);
        self.lag_ms
            .set(now_ms.saturating_sub(event.published_at_ms));
        match &self.what {
            What::Caches(digest) => {
                let mut digest = digest.borrow_mut();
                let gaps = digest.counts.gaps;
                digest.came(event.publisher_id, &event.payload);
                if digest.counts.gaps > gaps {
                    let lost = digest.counts.lost;
                    tracing::warn!(
                        target = %self.target, lost,
                        "KV events were lost: their worker is asked for them, or its cache learned \
                         anew"
                    );
                }
            }
            What::Loads(gauge) => gauge.borrow_mut().came(&event.payload, Instant::now()),
        }
    }

    /// The instances that are there.
    fn present(&self, board: &Board) -> HashSet<u64> {
        let sight = board.sights().of_feed(self.number);
        let instances = sight.map(|sight| sight.instances());
        let ids = instances.iter().flat_map(|found| found.iter());
        ids.map(|instance| instance.id).collect()
    }

    /// Forgets those that are gone.
    fn compare(&self, known: &mut HashSet<u64>, board: &Board) {
        let now = self.present(board);
        if let What::Caches(digest) = &self.what {
            for gone in known.difference(&now) {
                digest.borrow_mut().gone(*gone);
            }
        }
        *known = now;
    }

    /// Gives all cores what has come.
    async fn hand_over(&self, cores: &Cores) {
        match &self.what {
            What::Caches(digest) => {
                let batches = digest.borrow_mut().take();
                for batch in batches {
                    let batch = Arc::new(batch);
                    cores.tell(|| Command::Kv(Arc::clone(&batch))).await;
                }
            }
            What::Loads(gauge) => {
                let reports = gauge.borrow_mut().take(Instant::now());
                if let Some(reports) = reports.map(Arc::new) {
                    cores.tell(|| Command::Loads(Arc::clone(&reports))).await;
                }
            }
        }
    }
}

/// Who publishes, whenever that changes.
async fn listed(sources: &mut Option<Sources>) -> HashMap<u64, Source> {
    match sources {
        Some(sources) => {
            sources.changed().await;
            sources.list()
        }
        None => std::future::pending().await,
    }
}

/// Begins to ask.
fn ask(asks: Vec<Ask>, asked: &mut Asked, hearing: &Rc<Hearing>) {
    if asks.is_empty() {
        return;
    }
    asked.last.retain(|_, task| !task.is_finished());
    for ask in asks {
        let (hearing, rank) = (Rc::clone(hearing), ask.rank);
        let task = asked.tasks.spawn_local(async move {
            let answer = hearing.recovery.ask(&ask).await;
            (ask, answer)
        });
        if let Some(replaced) = asked.last.insert(rank, task) {
            replaced.abort();
        }
    }
}

fn sum(before: Losses, now: Losses) -> Losses {
    Losses {
        lost: before.lost + now.lost,
        unreadable: before.unreadable + now.unreadable,
        ..now
    }
}
