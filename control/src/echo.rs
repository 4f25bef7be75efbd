//! `corelane worker echo`: a worker that answers each request with items, for trying and testing;
//! and the same worker inside another process, for `corelane up`.
//!
//! ```text
//! start: shard listens -> discovery -> path of our identity served -> registered -> ready
//! drain: out of discovery -> grace -> new requests refused -> running ones end -> lease back
//! ```

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use corelane_codec::control_message::PayloadCodec;
use corelane_codec::error::DynamoError;
use corelane_codec::item::write_value;
use corelane_codec::path::{EndpointId, instance_hex, instance_path};
use corelane_engine::command::LocalPath;
use corelane_engine::ends::Ends;
use corelane_engine::handler::{Handler, MakeHandler, NewHandler, Request};
use corelane_engine::responder::{Gone, Responder};
use corelane_engine::shard::Command;
use corelane_engine::stats::HandlerStats;
use serde_json::json;
use tokio::runtime::Builder;
use tokio::task::{AbortHandle, LocalSet, spawn_local};
use tokio::time::{Instant, sleep};

use crate::cli::{Answer, Codec, EchoArgs, Exit, print};
use crate::config::{Backend, Drain, Server};
use crate::discovery::{
    BeforeRegister, Discovery, EtcdDiscovery, EtcdOptions, FileDiscovery, FileOptions,
    MemoryDiscovery, MemoryStore, Record, Registered,
};
use crate::env::Env;
use crate::health::{self, Endpoints, Settings, State};
use crate::metrics::{ProcessNumbers, ServedNumbers, Snapshot, WorkerNumbers};
use crate::nats::{NatsError, Requests};
use crate::offer::{self, Place};
use crate::peer::Peer;
use crate::status_server::{Health, StatusOptions, StatusServer};
use crate::supervise::Signals;
use crate::trace;

/// Identities whose paths are served at the same time: callers may hold the one from before a
/// lost lease.
const IDENTITIES_MAX: usize = 4;
/// Longest wait until the shard serves a path that it was told.
const SERVED_MAX: Duration = Duration::from_secs(2);
/// How often a drain looks whether requests have ended.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Runs the worker until a signal; a second one ends it at once.
///
/// # Errors
/// The address is taken, or the store cannot be reached.
pub fn run(args: EchoArgs) -> Result<Exit> {
    trace::export();
    let runtime = Builder::new_current_thread().enable_all().build();
    let runtime = runtime.context("cannot make the control runtime")?;
    let local = LocalSet::new();
    let outcome = local.block_on(&runtime, serve(args));
    drop(local);
    runtime.shutdown_background();
    outcome
}

async fn serve(args: EchoArgs) -> Result<Exit> {
    let mut signals = Signals::catch().context("cannot catch signals")?;
    let options = Options::of(&args);
    let started = tokio::select! {
        started = EchoWorker::start(&options, Store::Configured(&args)) => started?,
        name = signals.next() => {
            tracing::info!("{name} before everything had started: ending");
            return Ok(Exit::Done);
        }
    };
    let started = Rc::new(started);
    let status = status(&args.server, &started).await?;
    let mut ready = json!({
        "ready": true,
        "address": started.called_at(),
        "instance": instance_hex(started.instance_id()),
        "endpoint": args.endpoint.to_string(),
    });
    if let Some(status) = &status {
        ready["status"] = status.address().to_string().into();
    }
    print(&format!("{ready}\n"))?;
    let exit = tokio::select! {
        name = signals.next() => {
            tracing::info!("{name}: draining; a second signal ends at once");
            Exit::Done
        }
        why = started.peer.ended() => {
            tracing::error!("the shard has ended: {why}");
            Exit::Failed
        }
    };
    let stop = async {
        started.stop(&args.drain).await;
        if let Some(status) = status {
            status.stop().await;
        }
    };
    tokio::select! {
        () = stop => Ok(exit),
        name = signals.next() => {
            tracing::warn!("{name} again: ending at once");
            Ok(Exit::Failed)
        }
    }
}

/// The status server, where one was asked for.
async fn status(server: &Server, worker: &Rc<EchoWorker>) -> Result<Option<StatusServer>> {
    let Some(port) = server.status_port else {
        return Ok(None);
    };
    let address = SocketAddr::new(server.status_host, port);
    let (health, metrics) = (Rc::clone(worker), Rc::clone(worker));
    let options = StatusOptions::read(address, &Env::current());
    let started =
        StatusServer::start(options, move || health.health(), move || metrics.metrics()).await;
    let status = started.with_context(|| {
        format!("cannot serve /health at {address}; set DYN_SYSTEM_PORT to another port, or to -1")
    })?;
    tracing::info!(address = %status.address(), "status server: /live /health /metrics");
    Ok(Some(status))
}

/// What an echo worker is.
#[derive(Clone, Debug)]
pub struct Options {
    /// The endpoint that it serves.
    pub endpoint: EndpointId,
    /// How it answers.
    pub answer: Answer,
    /// The codec that it offers.
    pub codec: PayloadCodec,
    /// Where it listens.
    pub server: Server,
}

impl Options {
    fn of(args: &EchoArgs) -> Options {
        Options {
            endpoint: args.endpoint.clone(),
            answer: args.answer.clone(),
            codec: match args.codec {
                Codec::Json => PayloadCodec::Json,
                Codec::Msgpack => PayloadCodec::MessagePack,
            },
            server: args.server.clone(),
        }
    }
}

/// Where it is offered.
pub enum Store<'a> {
    /// As its arguments say.
    Configured(&'a EchoArgs),
    /// In this process, shared with others in it.
    Shared(&'a MemoryStore),
}

/// A running echo worker. Needs a `LocalSet`.
pub struct EchoWorker {
    peer: Rc<Peer>,
    paths: Rc<Paths>,
    discovery: Discovery,
    address: SocketAddr,
    requests: Option<Requests>,
    follower: AbortHandle,
    /// Whether callers learn from a store when it leaves.
    is_watched: bool,
    endpoints: Endpoints,
    began: Instant,
}

impl EchoWorker {
    /// Starts the worker; it can be called when this returns.
    ///
    /// # Errors
    /// The address is taken, or the store cannot be reached in time.
    pub async fn start(options: &Options, store: Store<'_>) -> Result<EchoWorker> {
        let server = &options.server;
        let listen = SocketAddr::new(server.host, server.port);
        let ends = || Ends::worker(Vec::new());
        let peer = Rc::new(Peer::start(server, Some(listen), ends).await?);
        let stats = HandlerStats::default();
        let _ = stats.id.set(options.endpoint.clone());
        let stats = Arc::new(stats);
        let new = NewHandler {
            make: handler(options.answer.clone()),
            stats: Arc::clone(&stats),
        };
        peer.command(Command::Handler(new)).await?;
        let (settings, complaints) = Settings::read(&Env::current());
        for complaint in complaints {
            tracing::warn!("{complaint}");
        }
        let endpoints = Endpoints::new(settings);
        let entry = endpoints.add(options.endpoint.clone());
        let port = peer.address().map_or(server.port, |address| address.port());
        let address = SocketAddr::new(server.advertised(), port);
        let paths = Rc::new(Paths {
            peer: Rc::clone(&peer),
            endpoint: options.endpoint.clone(),
            identities: RefCell::default(),
            stats,
            entry: entry.clone(),
        });
        let is_watched = matches!(&store, Store::Configured(args)
            if args.discovery.backend != Backend::Memory);
        let discovery = open(store, &paths).await?;
        paths.be(discovery.instance_id()).await;
        let requests = Requests::from_env(&Env::current(), address).await?;
        let follower = follow(discovery.clone(), Rc::clone(&paths), requests.clone());
        let follower = spawn_local(follower);
        let id = discovery.instance_id();
        let place = offer::place(requests.as_ref(), address, &options.endpoint, id).await?;
        let record = match place {
            Place::Nats => offer::record(&options.endpoint, place, options.codec),
            Place::Tcp(address) => Record::instance(&options.endpoint, address, options.codec),
        };
        if discovery.register(record).await? == Registered::Deferred {
            tracing::warn!("the store is away; the worker will be registered when it is back");
        }
        // Nothing checks an echo: who serves is healthy.
        for state in [State::Registered, State::Running, State::Healthy] {
            entry.turn(state);
        }
        let worker = EchoWorker {
            peer,
            paths,
            discovery,
            address,
            requests,
            follower: follower.abort_handle(),
            is_watched,
            endpoints,
            began: Instant::now(),
        };
        tracing::info!(endpoint = %options.endpoint, at = worker.called_at(), "echo worker ready");
        Ok(worker)
    }

    /// Waits until its shard ends; answers why.
    pub async fn ended(&self) -> String {
        self.peer.ended().await
    }

    /// Where callers dial.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its identity now.
    pub fn instance_id(&self) -> u64 {
        self.discovery.instance_id()
    }

    /// `IP:PORT/PATH`, as `corelane call --address` takes it.
    pub fn called_at(&self) -> String {
        let path = instance_path(self.instance_id(), &self.paths.endpoint);
        format!("{}/{path}", self.address)
    }

    fn health(&self) -> Health {
        let path = (self.paths.endpoint.to_string(), self.called_at());
        Health {
            paths: vec![path],
            ..Health::of(&self.endpoints)
        }
    }

    fn metrics(&self) -> String {
        let process = ProcessNumbers {
            uptime: self.began.elapsed(),
            draining: self.peer.stats().shard.draining.get() == 1,
            ..ProcessNumbers::default()
        };
        let discovery = Some(&**self.discovery.stats());
        let text = Snapshot::take(&[self.peer.view()], Vec::new(), process, discovery);
        let text = text.render_with(|out| self.peer.write_transports(out));
        let served = ServedNumbers {
            id: self.paths.endpoint.clone(),
            stats: vec![Arc::clone(&self.paths.stats)],
        };
        let bounds = Ends::worker(Vec::new());
        let numbers = WorkerNumbers {
            instance_id: self.instance_id(),
            uptime: process.uptime,
            served: vec![served],
            shards: vec![self.peer.stats()],
            bounds: Some((bounds.running_max, bounds.queue_max)),
        };
        numbers.join(text)
    }

    /// Requests that run or wait.
    pub fn busy(&self) -> u64 {
        self.peer.stats().shard.handling.get()
    }

    /// Leaves discovery, then refuses new requests, then waits for those that run.
    pub async fn drain(&self, drain: &Drain) {
        self.endpoints.leave();
        self.paths.entry.turn(State::Stopping);
        self.discovery.unregister_all().await;
        tracing::info!("drain: out of discovery");
        if self.is_watched {
            sleep(Duration::from_secs(drain.grace_s.into())).await;
        }
        if let Some(requests) = &self.requests {
            requests.stop().await;
        }
        if let Err(error) = self.peer.command(Command::Drain).await {
            return tracing::error!("drain: {error:#}");
        }
        let deadline = Instant::now() + Duration::from_secs(drain.timeout_s.into());
        // What the shard counts is true only once it has taken the command in.
        let draining = || self.peer.stats().shard.draining.get() == 1;
        while (self.busy() > 0 || !draining()) && Instant::now() < deadline {
            sleep(LOOK_EVERY).await;
        }
        match self.busy() {
            0 => tracing::info!("drain: nothing runs any more"),
            busy => tracing::warn!(busy, "drain: time is up, requests are cut off"),
        }
    }

    /// Drains, gives the lease back and stops the shard.
    pub async fn stop(&self, drain: &Drain) {
        self.drain(drain).await;
        self.follower.abort();
        if let Some(requests) = &self.requests {
            requests.close().await;
        }
        self.discovery.close().await;
        self.peer.stop().await;
        self.paths.entry.turn(State::Deregistered);
        let handled = self.peer.stats().shard.handled.get();
        tracing::info!(handled, "stopped");
    }
}

async fn open(store: Store<'_>, paths: &Rc<Paths>) -> Result<Discovery> {
    let args = match store {
        Store::Shared(store) => return Ok(Discovery::Memory(MemoryDiscovery::new(store))),
        Store::Configured(args) => args,
    };
    let lookup = |name: &str| args.discovery.variable(name);
    Ok(match args.discovery.backend {
        Backend::Memory => Discovery::Memory(MemoryDiscovery::new(&MemoryStore::default())),
        Backend::File => Discovery::File(FileDiscovery::open(FileOptions::from_env(lookup)).await?),
        Backend::Etcd => {
            let mut options = EtcdOptions::from_env(lookup)?;
            let paths = Rc::clone(paths);
            let hook: BeforeRegister = Rc::new(move |id| {
                let paths = Rc::clone(&paths);
                Box::pin(async move { paths.be(id).await })
            });
            options.before_register = Some(hook);
            Discovery::Etcd(EtcdDiscovery::connect(options).await?)
        }
    })
}

/// The paths that the shard serves: one for each of our last identities.
struct Paths {
    peer: Rc<Peer>,
    endpoint: EndpointId,
    identities: RefCell<Vec<u64>>,
    stats: Arc<HandlerStats>,
    entry: health::Endpoint,
}

impl Paths {
    /// Serves the path of `id` from now on; the shard takes it in before requests that follow.
    async fn be(&self, id: u64) {
        self.stats.instance.set(id);
        self.entry.is_instance(id);
        let paths = {
            let mut identities = self.identities.borrow_mut();
            if identities.contains(&id) {
                return;
            }
            identities.insert(0, id);
            identities.truncate(IDENTITIES_MAX);
            let path = |id: &u64| LocalPath {
                path: instance_path(*id, &self.endpoint).into_bytes(),
                handler: 0,
            };
            identities.iter().map(path).collect()
        };
        let updates = || self.peer.stats().shard.path_updates.get();
        let before = updates();
        if let Err(error) = self.peer.command(Command::Serve(paths)).await {
            return tracing::error!("the path of our new identity is not served: {error:#}");
        }
        let deadline = Instant::now() + SERVED_MAX;
        while updates() == before && Instant::now() < deadline {
            sleep(Duration::from_millis(1)).await;
        }
    }
}

async fn follow(discovery: Discovery, paths: Rc<Paths>, requests: Option<Requests>) {
    let mut identity = discovery.identity();
    loop {
        let id = *identity.borrow_and_update();
        paths.be(id).await;
        if let Err(error) = serve_nats(requests.as_ref(), &paths.endpoint, id).await {
            tracing::error!(%error, "the worker does not take requests over NATS");
        }
        if identity.changed().await.is_err() {
            return;
        }
    }
}

/// Takes requests over NATS too, if that is asked for.
async fn serve_nats(
    requests: Option<&Requests>,
    endpoint: &EndpointId,
    instance_id: u64,
) -> Result<(), NatsError> {
    match requests {
        Some(requests) => requests.serve(endpoint, instance_id).await,
        None => Ok(()),
    }
}

/// The handler: `items` times the request's body, or a text of the size asked for.
fn handler(answer: Answer) -> MakeHandler {
    Box::new(move |_| {
        let texts = answer.item_bytes.map(|bytes| {
            let text = "x".repeat(bytes as usize);
            [PayloadCodec::Json, PayloadCodec::MessagePack].map(|codec| {
                let mut encoded = Vec::new();
                // A text always has a form.
                let _ = write_value(&text, codec, &mut encoded);
                encoded
            })
        });
        let texts = Rc::new(texts);
        let handler = move |request: Request, responder: Responder| {
            let (answer, texts) = (answer.clone(), Rc::clone(&texts));
            async move {
                // The caller is gone: there is nobody to tell.
                let _ = respond(&request, responder, &answer, &texts).await;
            }
        };
        Rc::new(handler) as Rc<dyn Handler>
    })
}

async fn respond(
    request: &Request,
    mut responder: Responder,
    answer: &Answer,
    texts: &Option<[Vec<u8>; 2]>,
) -> Result<(), Gone> {
    let body = match request.value() {
        Ok(body) => body,
        Err(error) => {
            responder.fail(&DynamoError::invalid_argument(error.to_string()));
            return Ok(());
        }
    };
    let item = match (texts, request.codec()) {
        (None, _) => body,
        (Some([json, _]), PayloadCodec::Json) => json,
        (Some([_, packed]), PayloadCodec::MessagePack) => packed,
    };
    for _ in 0..answer.items {
        if !answer.delay.is_zero() {
            responder.sleep(answer.delay).await?;
        }
        responder.annotated(item).await?;
    }
    responder.finish();
    Ok(())
}
