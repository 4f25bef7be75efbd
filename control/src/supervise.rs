//! The life of a router: start, serve until told to stop, drain in Dynamo's order, end
//! (`spec/events-discovery.md` §5.3, `spec/request-plane.md` §10.3).
//!
//! ```text
//! start:  shards listen -> discovery -> directory to the shards -> instances reached
//! offer:  registered, with cards -> ready
//! drain:  not ready -> out of discovery -> grace -> new requests refused
//!         -> requests in flight end (bounded) -> lease back -> shards stop
//! ```
//! A second signal ends it at once. A shard that ends by itself starts the drain of the others.

use std::cell::{Cell, RefCell};
use std::net::{SocketAddr, TcpListener};
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result};
use corelane_codec::path::instance_path;
use corelane_engine::ends::Ends;
use corelane_engine::lane::RESPONSES_MAX;
use corelane_engine::shard::Command;
use tokio::task::{AbortHandle, JoinHandle, spawn_blocking, spawn_local};
use tokio::time::{Instant, sleep};

use crate::cli::Exit;
use crate::config::{self, Backend, Config, Inputs};
use crate::cores::Cores;
use crate::discovery::{
    BeforeRegister, Discovery, DiscoveryError, DiscoveryStats, EtcdDiscovery, EtcdOptions,
    FileDiscovery, FileOptions, MemoryDiscovery, MemoryStore,
};
use crate::env::Env;
use crate::feeds::{self, Feeds};
use crate::flight;
use crate::health::State;
use crate::lanes::LaneSockets;
use crate::manager::{Manager, Standing};
use crate::metrics::{ProcessNumbers, RouteNumbers, Snapshot, WorkerNumbers};
use crate::nats::Requests;
use crate::overview::{Pages, Sources};
use crate::preflight::Plan;
use crate::progress::{Progress, STILL_DEAD, STILL_TOLD, Turns};
use crate::publish::{Board, Listed};
use crate::reload::{self, Live, Reloader};
use crate::roster::Roster;
use crate::signals::{Hangups, Signals};
use crate::status_server::{Health, StatusOptions, StatusServer};

/// How often a drain looks whether requests have ended.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// How often a long drain says what it waits for.
const SAY_EVERY: Duration = Duration::from_secs(5);

/// Where a router looks for instances.
pub enum Store {
    /// As configured.
    Configured,
    /// In this process, shared with others in it.
    Shared(MemoryStore),
}

/// Writes metric families of another part of this process, without the mark of the end.
pub type MoreMetrics = Box<dyn Fn(&mut String)>;

/// What health and metrics are made from.
struct Pulse {
    more: RefCell<Vec<MoreMetrics>>,
    cores: Rc<Cores>,
    board: Rc<Board>,
    began: Instant,
    address: SocketAddr,
    draining: Cell<bool>,
    reloading: Cell<bool>,
    discovery: RefCell<Option<Rc<DiscoveryStats>>>,
    progress: RefCell<Progress>,
    manager: Manager,
    backend: Backend,
    live: Rc<Live>,
    reloader: RefCell<Option<Rc<Reloader>>>,
}

/// A running router.
pub struct Router {
    pulse: Rc<Pulse>,
    discovery: Discovery,
    roster: Rc<Roster>,
    requests: Option<Requests>,
    status: Option<StatusServer>,
    _lanes: LaneSockets,
    followers: Vec<AbortHandle>,
    feeds: Option<Rc<Feeds>>,
}

impl Router {
    /// Starts everything but what callers see of us: see [`Router::offer`]. May be given up at any
    /// time. Needs a `LocalSet`.
    ///
    /// # Errors
    /// A port is taken, a core cannot run, or the store cannot be reached in time.
    pub async fn start(config: &Config, plan: &Plan, store: Store) -> Result<Self> {
        let lanes = config.routes.iter().any(|route| route.lane.is_some());
        let cores = Cores::spawn_with(plan, move |_| Ends {
            // Who calls callers home for workers that share memory with us.
            running_max: if lanes { RESPONSES_MAX } else { 0 },
            ..Ends::default()
        })?;
        let board = Board::new(&config.routes, &config.instances, &cores);
        let advertised = config.server.advertised();
        let pulse = Rc::new(Pulse {
            address: SocketAddr::new(advertised, cores.address().port()),
            cores: Rc::clone(&cores),
            board: Rc::clone(&board),
            began: Instant::now(),
            draining: Cell::new(false),
            reloading: Cell::new(false),
            discovery: RefCell::new(None),
            more: RefCell::default(),
            progress: RefCell::new(watch_cores(&cores)),
            manager: Manager::from_env(&Env::current()),
            backend: config.discovery.backend,
            live: Rc::new(Live::new(config)),
            reloader: RefCell::default(),
        });
        cores.started().await?;
        tracing::info!(
            address = %cores.address(), advertised = %pulse.address,
            cores = plan.shards.len(), "listening"
        );
        let lanes = LaneSockets::listen(&config.routes, &cores, &board)?;
        let status = status(&config.server, plan.status.as_deref(), &pulse).await?;
        let discovery = open(config, store, &board).await?;
        pulse.discovery.replace(Some(Rc::clone(discovery.stats())));
        let requests = Requests::from_env(&Env::current(), cores.address()).await?;
        let roster = Roster::new(&board, &discovery, requests.as_ref(), pulse.address);
        let mut router = Self {
            pulse,
            discovery,
            roster: Rc::new(roster),
            requests,
            status,
            _lanes: lanes,
            followers: Vec::new(),
            feeds: None,
        };
        if let Some(requests) = router.requests.clone() {
            router.add_metrics(Box::new(move |out| requests.write_metrics(out)));
        }
        router.follow().await;
        if plan.is_handed() {
            router.pulse.cores.tell(|| Command::Accept).await;
        }
        let attending = Rc::clone(&router.pulse);
        let attending = spawn_local(async move { attending.attend().await });
        router.followers.push(attending.abort_handle());
        router.listen_to_workers(config, plan).await?;
        Ok(router)
    }

    /// Where callers of the request plane are told to go.
    pub fn address(&self) -> SocketAddr {
        self.pulse.address
    }

    /// Where `/health`, `/live` and `/metrics` are, unless they are off.
    pub fn status_address(&self) -> Option<SocketAddr> {
        self.status.as_ref().map(StatusServer::address)
    }

    /// Each listen endpoint with the address that reaches it: `IP:PORT/PATH`.
    pub fn paths(&self) -> Vec<(String, String)> {
        self.pulse.paths()
    }

    /// Where this router is registered.
    pub fn discovery(&self) -> &Discovery {
        &self.discovery
    }

    /// Adds what another part of this process counts to `/metrics`.
    pub fn add_metrics(&self, more: MoreMetrics) {
        self.pulse.more.borrow_mut().push(more);
    }

    /// Expects progress of another part of this process.
    pub fn watch(&self, name: &str, turns: Turns) {
        self.pulse.progress.borrow_mut().watch(name, turns);
    }

    /// Watches the instances of all routes, and waits until the shards know and reach those that
    /// are there: callers must not find us before we can serve them.
    async fn follow(&mut self) {
        let board = &self.pulse.board;
        board.be(self.discovery.instance_id());
        self.roster.follow().await;
        board.publish().await;
        let publisher = Rc::clone(board);
        let publisher = spawn_local(async move { publisher.keep_published().await });
        self.followers.push(publisher.abort_handle());
        self.pulse.cores.reach_instances().await;
    }

    /// Hears what workers publish about themselves, if a route wants to know.
    async fn listen_to_workers(&mut self, config: &Config, plan: &Plan) -> Result<()> {
        let ring = plan.shards.first().map(|shard| shard.config.ring);
        let Some(ring) = ring.filter(|_| feeds::are_wanted(&config.routes)) else {
            return Ok(());
        };
        let nats = self.requests.as_ref().map(Requests::nats);
        let events =
            feeds::open(&Env::current(), &config.curve, &self.discovery, nats, ring).await?;
        let gateway = self.requests.as_ref().map(Requests::gateway);
        let heard = (events, &self.discovery, gateway);
        let feeds = Feeds::start(config, heard, &self.pulse.board, &self.pulse.cores)?;
        let feeds = Rc::new(feeds);
        let written = Rc::clone(&feeds);
        self.add_metrics(Box::new(move |out| written.write(out)));
        self.feeds = Some(feeds);
        Ok(())
    }

    /// Registers the listen endpoints and their cards, and keeps them so. Does not wait; from here
    /// on only [`Router::run`] leaves in good order.
    pub fn offer(&mut self) {
        let roster = Rc::clone(&self.roster);
        let offering = spawn_local(async move { roster.offer().await });
        self.followers.push(offering.abort_handle());
    }

    /// Takes changes of the configuration over from now on: when `hangups` tells to, or the status
    /// server is asked to. `inputs` are those that `config` was read from.
    pub fn reload_with(&mut self, inputs: Inputs, config: &Config, mut hangups: Hangups) {
        let pulse = Rc::downgrade(&self.pulse);
        let told = move |begins| {
            if let Some(pulse) = pulse.upgrade() {
                pulse.reloading.set(begins);
                pulse.say();
            }
        };
        let parts = reload::Parts {
            cores: Rc::clone(&self.pulse.cores),
            board: Rc::clone(&self.pulse.board),
            roster: Rc::clone(&self.roster),
            live: Rc::clone(&self.pulse.live),
            told: Box::new(told),
        };
        let reloader = Rc::new(Reloader::new(inputs, config, parts));
        self.pulse.reloader.replace(Some(Rc::clone(&reloader)));
        let written = Rc::clone(&reloader);
        self.add_metrics(Box::new(move |out| written.write_metrics(out)));
        let hearing = spawn_local(async move {
            loop {
                hangups.next().await;
                reloader.hang_up();
            }
        });
        self.followers.push(hearing.abort_handle());
    }

    /// Serves until a signal, the end of a core, or `others_failed`; then drains. `after_stop`
    /// runs when nothing comes in any more and before the cores stop.
    pub async fn run(
        self,
        mut signals: Signals,
        others_failed: impl Future<Output = ()>,
        after_stop: impl Future<Output = ()>,
    ) -> Exit {
        let exit = tokio::select! {
            name = signals.next() => {
                tracing::info!("{name}: draining; a second signal ends at once");
                Exit::Done
            }
            () = self.pulse.cores.failed() => {
                tracing::error!("a core has ended: draining the others");
                self.pulse.save_flight();
                Exit::Failed
            }
            () = others_failed => {
                tracing::error!("a part of this process has ended: draining");
                Exit::Failed
            }
        };
        let draining = async {
            self.drain(after_stop).await;
            exit
        };
        tokio::select! {
            exit = draining => exit,
            name = signals.next() => {
                tracing::warn!("{name} again: ending at once");
                Exit::Failed
            }
        }
    }

    async fn drain(mut self, after_stop: impl Future<Output = ()>) {
        let began = Instant::now();
        let pulse = Rc::clone(&self.pulse);
        pulse.draining.set(true);
        pulse.say();
        if let Some(reloader) = pulse.reloader.take() {
            reloader.stop();
        }
        let endpoints = self.roster.withdraw().await;
        tracing::info!(endpoints, "drain: out of discovery");
        let drain = pulse.live.drain.get();
        let grace = Duration::from_secs(drain.grace_s.into());
        tracing::info!(
            in_flight = pulse.in_flight(),
            ?grace,
            "drain: still accepting"
        );
        sleep(grace).await;
        let timeout = Duration::from_secs(drain.timeout_s.into());
        tracing::info!(
            in_flight = pulse.in_flight(),
            ?timeout,
            "drain: refusing new requests"
        );
        if let Some(requests) = &self.requests {
            requests.stop().await;
        }
        pulse.cores.tell(|| Command::Drain).await;
        pulse.emptied(timeout).await;
        after_stop.await;
        for follower in &self.followers {
            follower.abort();
        }
        if let Some(feeds) = &self.feeds {
            feeds.stop().await;
        }
        if let Some(requests) = self.requests.take() {
            requests.close().await;
        }
        self.discovery.close().await;
        tracing::info!("drain: left the store");
        pulse.cores.stop().await;
        if let Some(status) = self.status.take() {
            status.stop().await;
        }
        let served = pulse.cores.view();
        let requests = served.iter().map(|core| core.stats.shard.requests.get());
        let requests: u64 = requests.sum();
        tracing::info!(requests, took = ?began.elapsed(), "stopped");
    }
}

/// Opens discovery; whoever finds us under a new identity can be served under it already.
async fn open(config: &Config, store: Store, board: &Rc<Board>) -> Result<Discovery> {
    let settings = &config.discovery;
    let lookup = |name: &str| settings.variable(name);
    let discovery = match (store, settings.backend) {
        (Store::Shared(store), _) => Discovery::Memory(MemoryDiscovery::with_identity(&store, 0)),
        (Store::Configured, Backend::Memory) => {
            Discovery::Memory(MemoryDiscovery::with_identity(&MemoryStore::default(), 0))
        }
        (Store::Configured, Backend::File) => {
            Discovery::File(FileDiscovery::open(FileOptions::from_env(lookup)).await?)
        }
        (Store::Configured, Backend::Etcd) => {
            let mut options = EtcdOptions::from_env(lookup)?;
            let board = Rc::clone(board);
            let hook: BeforeRegister = Rc::new(move |id| {
                let board = Rc::clone(&board);
                Box::pin(async move { board.be_and_publish(id).await })
            });
            options.before_register = Some(hook);
            connect(options).await?
        }
    };
    Ok(discovery)
}

async fn connect(options: EtcdOptions) -> Result<Discovery, DiscoveryError> {
    let endpoints = options.endpoints.join(",");
    tracing::info!(endpoints, "discovery: connecting to etcd");
    Ok(Discovery::Etcd(EtcdDiscovery::connect(options).await?))
}

/// Expects progress of all cores.
fn watch_cores(cores: &Rc<Cores>) -> Progress {
    let mut progress = Progress::default();
    for index in 0..cores.count() {
        let cores = Rc::clone(cores);
        progress.watch(
            format!("core {index}"),
            Box::new(move || cores.turns(index)),
        );
    }
    progress
}

async fn status(
    server: &config::Server,
    handed: Option<&TcpListener>,
    pulse: &Rc<Pulse>,
) -> Result<Option<StatusServer>> {
    let Some(port) = server.status_port else {
        return Ok(None);
    };
    let address = SocketAddr::new(server.status_host, port);
    let (health, metrics) = (Rc::clone(pulse), Rc::clone(pulse));
    let mut options = StatusOptions::read(address, &Env::current());
    let cores = Rc::clone(&pulse.cores);
    let records = move |query: &str| flight::answer(&cores.view(), query);
    options.extras.push((flight::PATH, Box::new(records)));
    options.later = overview(pulse).later();
    let reloading = Rc::clone(pulse);
    options.actions.push((
        reload::PATH,
        Box::new(move |post| reload::answer(reloading.reloader.borrow().clone(), post)),
    ));
    options.handed = handed.map(TcpListener::try_clone).transpose()?;
    let started =
        StatusServer::start(options, move || health.health(), move || metrics.metrics()).await;
    let status = started.with_context(|| {
        format!(
            "cannot serve /health at {address}; write another [server] status_port, or -1 for none"
        )
    })?;
    tracing::info!(address = %status.address(), "status server: /live /health /metrics");
    Ok(Some(status))
}

/// What is said of instances and choices.
fn overview(pulse: &Rc<Pulse>) -> Rc<Pages> {
    let watched = Rc::clone(pulse);
    Pages::new(Sources {
        board: Rc::clone(&pulse.board),
        cores: Rc::clone(&pulse.cores),
        address: pulse.address,
        discovery: pulse.backend,
        draining: Box::new(move || watched.draining.get()),
    })
}

impl Pulse {
    /// Looks whether everybody makes progress, and tells the service manager, until the end.
    async fn attend(&self) {
        let every = self.manager.look_every();
        loop {
            let stuck = self.progress.borrow_mut().look(Instant::now().into_std());
            if !stuck.is_empty() {
                self.save_flight();
            }
            self.say();
            sleep(every).await;
        }
    }

    /// Writes down what the cores have done last. Does not wait for the disk.
    fn save_flight(&self) -> Option<JoinHandle<()>> {
        let (folder, cores) = (self.live.flight_dir.borrow().clone()?, self.cores.view());
        Some(spawn_blocking(move || {
            match flight::save(&cores, &folder) {
                Ok(path) => tracing::info!(path = %path.display(), "flight records saved"),
                Err(error) => tracing::error!(%error, "flight records not saved"),
            }
        }))
    }

    /// Tells the service manager how we are.
    fn say(&self) {
        let (ready, stopping) = (self.health().ready, self.draining.get());
        let routes = self.board.routes().len();
        let status = match (stopping, ready) {
            (true, _) => format!("draining: {} requests in flight", self.in_flight()),
            (false, true) => format!("serving {routes} routes at {}", self.address),
            (false, false) => "not ready: /health says what is missing".to_owned(),
        };
        let still = self.progress.borrow().still();
        let standing = Standing {
            ready,
            reloading: self.reloading.get(),
            stopping,
            still,
            status,
        };
        self.manager.tell(&standing, Instant::now().into_std());
    }

    fn health(&self) -> Health {
        let routes = self.board.routes();
        let registered = routes
            .iter()
            .all(|listed| listed.is_registered() || listed.joins());
        let opened = self.discovery.borrow().is_some();
        let draining = self.draining.get();
        // The engine counts instances that can be reached for each core, not for each route.
        let reached = self.cores.sum(|stats| stats.shard.instances_ready.get()) > 0;
        let served = |listed: &Listed| reached && !listed.instances().is_empty();
        let endpoint = |listed: &Rc<Listed>| {
            let ready = listed.is_registered() && served(listed) && !draining;
            (listed.route.listen.to_string(), ready)
        };
        let state = |listed: &Rc<Listed>| {
            let state = match (draining, listed.is_registered(), served(listed)) {
                (true, ..) => State::Stopping,
                (false, false, _) => State::Created,
                (false, true, false) => State::Registered,
                (false, true, true) => State::Running,
            };
            (listed.route.listen.to_string(), state)
        };
        Health {
            ready: !draining && opened && registered && self.cores.all_run(),
            endpoints: routes.iter().map(endpoint).collect(),
            paths: self.paths(),
            stuck: self.progress.borrow().stuck(STILL_DEAD),
            states: routes.iter().map(state).collect(),
            generation: self
                .reloader
                .borrow()
                .as_ref()
                .map(|reloader| reloader.generation()),
        }
    }

    fn paths(&self) -> Vec<(String, String)> {
        let Some(id) = self.board.identity() else {
            return Vec::new();
        };
        let path = |listed: &Rc<Listed>| {
            let listen = &listed.route.listen;
            let path = instance_path(id, listen);
            (listen.to_string(), format!("{}/{path}", self.address))
        };
        self.board.routes().iter().map(path).collect()
    }

    fn metrics(&self) -> String {
        let relays = |listed: &Listed| listed.route.response == config::Response::Relay;
        let route = |(place, listed): (usize, Rc<Listed>)| RouteNumbers {
            relayed_at: relays(&listed).then_some(place),
            listen: listed.route.listen.to_string(),
            target: listed.route.target.to_string(),
            instances: listed.instances().len(),
            registered: listed.is_registered(),
        };
        let process = ProcessNumbers {
            uptime: self.began.elapsed(),
            directories: self.board.publications(),
            draining: self.draining.get(),
            stuck: self.progress.borrow().stuck(STILL_TOLD).len() as u64,
        };
        let routes = self.board.placed().into_iter().map(route).collect();
        let discovery = self.discovery.borrow();
        let own = Snapshot::take(&self.cores.view(), routes, process, discovery.as_deref());
        let text = own.render_with(|out| {
            self.cores.write_transports(out);
            self.more.borrow().iter().for_each(|more| more(out));
        });
        let numbers = WorkerNumbers {
            instance_id: self.board.identity().unwrap_or_default(),
            uptime: self.began.elapsed(),
            ..WorkerNumbers::default()
        };
        numbers.join(text)
    }

    /// Requests between arrival and end, callers being told of failures, and relayed responses.
    fn in_flight(&self) -> u64 {
        let busy = |stats: &corelane_engine::stats::Stats| {
            let shard = &stats.shard;
            let lanes = shard.lane_jobs.get().max(shard.handling.get());
            shard.in_flight.get() + shard.tells.get() + shard.relays.get() + lanes
        };
        self.cores.sum(busy)
    }

    /// Waits until nothing is in flight, `patience` at most.
    async fn emptied(&self, patience: Duration) {
        // What a core counts is true only once it has taken the command in.
        self.cores.settled(SAY_EVERY.min(patience) / 20).await;
        let began = Instant::now();
        let mut said = began;
        loop {
            let in_flight = self.in_flight();
            if in_flight == 0 {
                tracing::info!(waited = ?began.elapsed(), "drain: nothing is in flight");
                return;
            }
            if began.elapsed() >= patience {
                tracing::warn!(
                    in_flight,
                    ?patience,
                    "drain: time is up, requests are cut off"
                );
                return;
            }
            if said.elapsed() >= SAY_EVERY {
                said = Instant::now();
                tracing::info!(in_flight, waited = ?began.elapsed(), "drain: waiting");
            }
            sleep(LOOK_EVERY).await;
        }
    }
}
