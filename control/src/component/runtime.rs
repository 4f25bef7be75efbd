//! The runtime of one process: shards, discovery, what is served and what is called, from the
//! start to the end of the drain.
//!
//! ```text
//! start: shards listen -> status server -> discovery
//! stop:  not ready -> all endpoints out of discovery -> grace -> new requests refused
//!        -> running and queued ones end (bounded) -> lease back -> shards stop -> status server
//! ```

use std::cell::RefCell;
use std::future::Future;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use corelane_codec::control_message::PayloadCodec;
use corelane_codec::error::DynamoError;
use corelane_codec::path::{EndpointId, Reference, instance_path, parse_instance_path};
use corelane_engine::config::RingKind;
use corelane_engine::ends::{Ends, HomeAddress};
use corelane_engine::mesh::budget::Budget;
use corelane_engine::shard::Command;
use corelane_engine::stats::Cell;
use serde_json::json;
use tokio::runtime::Builder;
use tokio::sync::{Mutex, watch};
use tokio::task::LocalSet;
use tokio::time::{Instant, sleep};

use super::client::Client;
use super::endpoint::{Endpoint, Namespace};
use super::error::Error;
use super::hub::Hub;
use super::metrics;
use super::names;
use super::open::Opened;
use super::options::Options;
use super::paths::Paths;
use super::registry::{Registry, Watched};
use super::run;
use super::serving::Serving;
use super::shard::Shard;
use crate::broker_metrics;
use crate::config::{self, Backend};
use crate::cores::Cores;
use crate::discovery::Discovery;
use crate::engine_routes::EngineRoutes;
use crate::events::Events;
use crate::flight;
use crate::health::{Endpoints, Hold, Settings, State};
use crate::metrics::{ProcessNumbers, ServedNumbers, Snapshot, WorkerNumbers};
use crate::nats::{Nats, Requests};
use crate::status_server::{Health, StatusOptions, StatusServer};
use crate::trace;
use crate::watch::Instance;

/// Everything of one process. Clones are the same runtime; it stays on the thread that made it,
/// while [`super::Client`]s may go anywhere.
#[derive(Clone)]
pub struct Runtime(Rc<Inner>);

pub(super) struct Inner {
    pub(super) options: Options,
    pub(super) cores: Rc<Cores>,
    pub(super) hub: Arc<Hub>,
    pub(super) discovery: Discovery,
    pub(super) events: Events,
    pub(super) requests: Option<Requests>,
    nats: Option<Nats>,
    /// Where callers are told to dial.
    pub(super) address: SocketAddr,
    pub(super) endpoints: Endpoints,
    pub(super) paths: Rc<Paths>,
    pub(super) serving: RefCell<Vec<Rc<Serving>>>,
    pub(super) serving_turn: Mutex<()>,
    /// Handlers that the shards have.
    pub(super) handlers: std::cell::Cell<u32>,
    pub(super) stopping: watch::Sender<bool>,
    /// The shards have ended.
    stopped: watch::Sender<bool>,
    registry: Registry,
    began: Instant,
    engine: EngineRoutes,
    status: RefCell<Option<StatusServer>>,
}

impl Inner {
    pub(super) fn is_stopping(&self) -> bool {
        *self.stopping.borrow()
    }

    /// Whether callers learn from a store when we leave.
    fn is_watched(&self) -> bool {
        self.options.discovery.backend != Backend::Memory
    }
}

impl Runtime {
    /// Runs `main` with a runtime on this thread, and stops in good order when `main` returns, or
    /// at SIGTERM or SIGINT (unless [`Options::signals`] says otherwise): a second signal ends at
    /// once. `main` is told by [`Runtime::stopping`]; once everything has been drained it has
    /// `DYN_WORKER_GRACEFUL_SHUTDOWN_TIMEOUT` seconds (30) to return.
    ///
    /// # Errors
    /// The start fails (an address is taken, the store cannot be reached in time), `main` fails,
    /// or a second signal came.
    pub fn run<T>(
        options: Options,
        main: impl AsyncFnOnce(Runtime) -> Result<T>,
    ) -> Result<Option<T>> {
        let tokio = Builder::new_current_thread().enable_all().build();
        let tokio = tokio.context("cannot make the control runtime")?;
        let local = LocalSet::new();
        let outcome = local.block_on(&tokio, run::run(options, main));
        // Tasks may hold what others wait for: they go first, and nobody waits for file work.
        drop(local);
        tokio.shutdown_background();
        trace::finish();
        outcome
    }

    /// Starts a runtime inside a `tokio::task::LocalSet` of yours. End it with [`Runtime::stop`].
    ///
    /// # Errors
    /// An address is taken, the host cannot do what is required, or the store cannot be reached
    /// in time.
    pub async fn start(mut options: Options) -> Result<Runtime> {
        // A health check is a call.
        options.checks.enabled &= options.calls_max > 0;
        trace::start(&options.env);
        trace::export();
        let plan = options.plan()?;
        let home = HomeAddress {
            bind: SocketAddr::new(options.server.host, 0),
            advertise: options.server.advertised(),
        };
        let shards = plan.shards.len();
        let cores = Cores::spawn_with(&plan, ends(&options, shards, home))?;
        cores.started().await?;
        let address = SocketAddr::new(options.server.advertised(), cores.address().port());
        let paths = Paths::new(&cores);
        // There is at least one shard.
        let ring = plan.shards.first().map(|shard| shard.config.ring);
        let ring = ring.unwrap_or(RingKind::Epoll);
        let opened = match Opened::open(&options, &paths, cores.address(), ring).await {
            Ok(opened) => opened,
            Err(error) => {
                cores.stop().await;
                return Err(error);
            }
        };
        let Opened {
            discovery,
            nats,
            requests,
            events,
        } = opened;
        let (settings, complaints) = Settings::read(&options.env);
        for complaint in complaints {
            tracing::warn!("{complaint}");
        }
        let stopped = watch::Sender::new(false);
        let gateway = requests.as_ref().map(Requests::gateway);
        let registry = Registry::new(&discovery, &cores, shards, gateway);
        let runtime = Runtime(Rc::new(Inner {
            hub: Hub::new(&cores, stopped.subscribe()),
            options,
            cores,
            events,
            requests,
            nats,
            discovery,
            address,
            endpoints: Endpoints::new(settings),
            paths,
            serving: RefCell::default(),
            serving_turn: Mutex::new(()),
            handlers: std::cell::Cell::new(0),
            stopping: watch::Sender::new(false),
            stopped,
            registry,
            began: Instant::now(),
            engine: EngineRoutes::default(),
            status: RefCell::default(),
        }));
        if let Err(error) = runtime.serve_status().await {
            runtime.stop().await;
            return Err(error);
        }
        tracing::info!(%address, shards, "runtime ready");
        Ok(runtime)
    }

    pub(super) fn inner(&self) -> &Rc<Inner> {
        &self.0
    }

    /// A namespace to offer work in.
    ///
    /// # Errors
    /// The name is not one that may be made up: `^[a-z0-9_-]+$`.
    pub fn namespace(&self, name: &str) -> Result<Namespace, Error> {
        names::check(names::NAMESPACE, name)?;
        Ok(Namespace {
            runtime: self.clone(),
            name: name.to_owned(),
        })
    }

    /// The endpoint of any name that anybody uses: `a/b/c`, `a.b.c`, `dyn://a.b.c`, a key of etcd,
    /// a service name or subject of NATS, a request path; also as the generation before 1.6.1
    /// wrote them. Where that has two readings this is the one of 1.6.1.
    ///
    /// # Errors
    /// The text names no component, or can be split in more than one way.
    pub fn endpoint(&self, reference: &str) -> Result<Endpoint, Error> {
        let mut readings = Reference::parse(reference)?.endpoints();
        Ok(Endpoint::new(self, readings.swap_remove(0)))
    }

    /// An endpoint that is served under whatever name a person has given it.
    pub(crate) fn endpoint_of_any_name(&self, id: &EndpointId) -> Endpoint {
        Endpoint::of_any_name(self, id.clone())
    }

    /// A client of the endpoint of any name, see [`Runtime::endpoint`]. Where a name has two
    /// readings, instances under either are called.
    ///
    /// # Errors
    /// As [`Runtime::endpoint`].
    pub fn client(&self, reference: &str) -> Result<Client, Error> {
        Ok(self.client_of(&Reference::parse(reference)?.endpoints()))
    }

    /// A client of one instance, wherever discovery has it or not: `IP:PORT/PATH`, as
    /// [`super::Served::called_at`] answers. Its requests are JSON.
    ///
    /// # Errors
    /// The text is not one.
    pub fn client_at(&self, instance: &str) -> Result<Client, Error> {
        let bad = || Error::Address(instance.to_owned());
        let (address, path) = config::address(instance).ok_or_else(bad)?;
        let (id, endpoint) = parse_instance_path(path).unwrap_or_else(|| {
            // To messages it is what was written.
            (0, EndpointId::new("", "", instance))
        });
        let instance = Instance {
            id,
            address,
            path: path.as_bytes().to_vec(),
            codec: PayloadCodec::Json,
            device: None,
        };
        Ok(self.client_of_instance(&endpoint, &instance))
    }

    /// A client of one instance that is known from elsewhere.
    pub(crate) fn client_of_instance(&self, id: &EndpointId, instance: &Instance) -> Client {
        let fixed = self.0.registry.fixed(id.clone(), instance.clone());
        self.client_with([fixed].into())
    }

    pub(crate) fn client_of(&self, readings: &[EndpointId]) -> Client {
        let watch = |id| self.0.registry.watch(id);
        self.client_with(readings.iter().map(watch).collect())
    }

    fn client_with(&self, readings: Arc<[Arc<Watched>]>) -> Client {
        let inner = &self.0;
        let shards = inner.hub.shards();
        Client {
            hub: Arc::clone(&inner.hub),
            readings,
            settings: Arc::new(inner.options.calls.clone()),
            turns: (0..shards).map(|_| Cell::default()).collect(),
        }
    }

    /// Runs a task on the next shard: `make` is called there, and what it makes runs beside the
    /// handlers, need not be `Send`, and is woken from any thread. Calls that it makes with
    /// [`Shard::client`] cost no hop. It is dropped when the shards end, and a panic ends it and
    /// nothing more.
    ///
    /// # Errors
    /// The shard is too busy to take it, or has ended.
    pub async fn spawn<A>(
        &self,
        make: impl FnOnce(Shard) -> A + Send + 'static,
    ) -> Result<(), DynamoError>
    where
        A: Future<Output = ()> + 'static,
    {
        self.0.hub.spawn(make).await
    }

    /// Waits until a shard has ended by itself, which no work survives: to be stopped then.
    pub async fn failed(&self) {
        self.0.cores.failed().await;
    }

    /// Endpoints that clients of this process watch in discovery, each once.
    pub fn watches(&self) -> usize {
        self.0.registry.count()
    }

    /// Where requests come in, as callers are told.
    pub fn address(&self) -> SocketAddr {
        self.0.address
    }

    /// Where `/health`, `/live` and `/metrics` are, unless they are off.
    pub fn status_address(&self) -> Option<SocketAddr> {
        self.0.status.borrow().as_ref().map(StatusServer::address)
    }

    /// Our identity in discovery; another one after a lost lease.
    pub fn instance_id(&self) -> u64 {
        self.0.discovery.instance_id()
    }

    /// The states of all endpoints, for whoever shows them.
    pub fn endpoints(&self) -> &Endpoints {
        &self.0.endpoints
    }

    /// What answers at `/engine/{path}` of the status server.
    pub fn engine_routes(&self) -> &EngineRoutes {
        &self.0.engine
    }

    /// Whether no request, response, call or task is left on any shard.
    pub fn is_idle(&self) -> bool {
        let left = |stats: &corelane_engine::stats::Stats| {
            let shard = &stats.shard;
            shard.handling.get() + shard.responses.get() + shard.calls.get()
        };
        self.0.cores.sum(left) == 0
    }

    /// Keeps the process not ready until what is returned is dropped: while a model is loaded,
    /// for example.
    pub fn hold_readiness(&self) -> Hold {
        self.0.endpoints.hold()
    }

    /// What each endpoint counts, and what its [`Endpoint::stats`] tells.
    pub fn stats(&self) -> serde_json::Value {
        let of = |serving: &Rc<Serving>| {
            let own = serving.stats_handler.as_ref().map(|stats| stats());
            json!({
                "endpoint": serving.id.to_string(),
                "instance_id": serving.instance_id.get(),
                "requests": serving.sum(|stats| stats.requests.get()),
                "refused": serving.sum(|stats| stats.refused.get()),
                "finished": serving.sum(|stats| stats.finished.get()),
                "failed": serving.sum(|stats| stats.failed.get()),
                "busy": serving.busy(),
                "data": own,
            })
        };
        let serving = self.0.serving.borrow();
        serde_json::Value::Array(serving.iter().map(of).collect())
    }

    /// Waits until the runtime is to end: a signal, or [`Runtime::stop`].
    pub async fn stopping(&self) {
        // The sender is ours.
        let _ = self.0.stopping.subscribe().wait_for(|stop| *stop).await;
    }

    /// Stops in the documented order; when this returns nothing runs any more.
    pub async fn stop(&self) {
        let inner = &self.0;
        if inner.stopping.send_replace(true) {
            return self.drained().await;
        }
        let began = Instant::now();
        inner.endpoints.leave();
        let serving = inner.serving.borrow().clone();
        for serving in &serving {
            if !serving.is_stopping() {
                serving.withdraw(inner).await;
            }
        }
        if inner.is_watched() && !serving.is_empty() {
            let grace = Duration::from_secs(inner.options.drain.grace_s.into());
            tracing::info!(?grace, "drain: still accepting");
            sleep(grace).await;
        }
        tracing::info!("drain: refusing new requests");
        if let Some(requests) = &inner.requests {
            requests.stop().await;
        }
        inner.cores.tell(|| Command::Drain).await;
        let draining = |stats: &corelane_engine::stats::Stats| stats.shard.draining.get();
        inner
            .cores
            .reached(1, Duration::from_secs(2), draining)
            .await;
        let deadline = Instant::now() + Duration::from_secs(inner.options.drain.timeout_s.into());
        // Nobody ends what a shard left that has ended by itself.
        for serving in serving.iter().filter(|_| inner.cores.all_run()) {
            let left = deadline.saturating_duration_since(Instant::now());
            serving.emptied(left).await;
        }
        if let Some(nats) = &inner.nats {
            nats.close().await;
        }
        inner.discovery.close().await;
        // Nobody is led to our publishers any more.
        inner.events.close().await;
        tracing::info!("drain: left the store");
        for serving in &serving {
            serving.entry.turn(State::Deregistered);
        }
        inner.cores.stop().await;
        inner.stopped.send_replace(true);
        let status = inner.status.take();
        if let Some(status) = status {
            status.stop().await;
        }
        tracing::info!(took = ?began.elapsed(), "stopped");
    }

    /// An endpoint has been taken away.
    pub(super) fn forget(inner: &Inner, serving: &Rc<Serving>) {
        let mut all = inner.serving.borrow_mut();
        all.retain(|other| !Rc::ptr_eq(other, serving));
    }

    async fn serve_status(&self) -> Result<()> {
        let Some(address) = self.0.options.status else {
            return Ok(());
        };
        let (health, numbers) = (Rc::downgrade(&self.0), Rc::downgrade(&self.0));
        let health = move || health.upgrade().map(|inner| inner.health());
        let numbers = move || numbers.upgrade().map(|inner| inner.metrics());
        let cores = Rc::clone(&self.0.cores);
        let records = move |query: &str| flight::answer(&cores.view(), query);
        let started = StatusServer::start(
            StatusOptions {
                engine: self.0.engine.clone(),
                extras: vec![(flight::PATH, Box::new(records))],
                ..StatusOptions::read(address, &self.0.options.env)
            },
            move || health().unwrap_or_default(),
            move || numbers().unwrap_or_default(),
        );
        let status = started
            .await
            .with_context(|| format!("cannot serve /health at {address}; choose another port"))?;
        tracing::info!(address = %status.address(), "status server: /live /health /metrics");
        self.0.status.replace(Some(status));
        Ok(())
    }
}

impl Inner {
    fn health(&self) -> Health {
        let seen = self.endpoints.seen();
        let path = |id: &EndpointId, instance: u64| {
            let path = instance_path(instance, id);
            (id.to_string(), format!("{}/{path}", self.address))
        };
        let health = Health::of(&self.endpoints);
        Health {
            ready: health.ready && self.cores.all_run(),
            paths: seen
                .iter()
                .filter_map(|seen| Some(path(&seen.id, seen.instance_id?)))
                .collect(),
            ..health
        }
    }

    fn metrics(&self) -> String {
        let process = ProcessNumbers {
            uptime: self.began.elapsed(),
            draining: self.is_stopping(),
            ..ProcessNumbers::default()
        };
        let stats = Some(&**self.discovery.stats());
        let cores = Snapshot::take(&self.cores.view(), Vec::new(), process, stats);
        let cores = cores.render_with(|out| {
            self.cores.write_transports(out);
            if let Some(stats) = self.events.stats() {
                broker_metrics::write_stats(&stats, out);
            }
        });
        let serving = self.serving.borrow();
        let text = metrics::with_endpoints(cores, &self.endpoints.seen(), &serving);
        let served = |serving: &Rc<Serving>| ServedNumbers {
            id: serving.id.clone(),
            stats: serving.stats.clone(),
        };
        let admission = self.options.admission;
        let views = self.cores.view().into_iter();
        let numbers = WorkerNumbers {
            instance_id: self.discovery.instance_id(),
            uptime: self.began.elapsed(),
            served: serving.iter().map(served).collect(),
            shards: views.map(|core| core.stats).collect(),
            bounds: Some((admission.running_max, admission.queue_max)),
        };
        numbers.join(text)
    }
}

/// What each shard takes on.
fn ends(options: &Options, shards: usize, home: HomeAddress) -> impl Fn(usize) -> Ends + use<> {
    let (admission, calls_max) = (options.admission, options.calls_max);
    let budget = Budget::new(admission.running_max, admission.queue_max);
    let budget = admission.is_shared(shards).then(|| Arc::new(budget));
    move |index| {
        let part = match &budget {
            Some(_) => admission,
            None => admission.part(index, shards),
        };
        Ends {
            budget: budget.clone(),
            running_max: part.running_max,
            queue_max: part.queue_max,
            home: (calls_max > 0).then_some(home),
            calls_max,
            ..Ends::default()
        }
    }
}

impl Runtime {
    /// Waits until a stop that somebody else has begun is over.
    pub(super) async fn drained(&self) {
        // The sender is ours.
        let _ = self
            .0
            .stopped
            .subscribe()
            .wait_for(|stopped| *stopped)
            .await;
    }
}
