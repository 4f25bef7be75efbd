//! What a runtime is made of: shards, addresses, discovery, limits and times.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Result, anyhow};
use corelane_codec::control_message::PayloadCodec;
use corelane_engine::call::Deadlines;
use corelane_engine::config::{ANY_CPU, ShardConfig};
use corelane_engine::preflight as host;
use corelane_engine::quic::ResponsePlane;

use super::client::Settings;
use super::error::Error;
use super::routing::{Ratio, RoutingMode};
use crate::cli::Stop;
use crate::config::{self, Backend, Drain, Host, Inputs, Main, Problem, Purpose, Server};
use crate::discovery::MemoryStore;
use crate::env::Env;
use crate::events::{EventPlane, ZmqOptions};
use crate::nats::{NatsOptions, RequestPlane};
use crate::preflight::{self, Plan, Planned};
use crate::steering::Placing;
use crate::tls;

/// Receive buffers of a shard: it needs fewer than a router's.
const BUFFERS: u16 = 1024;

/// How a [`super::Runtime`] is to be. [`Options::from_env`] reads what Dynamo's own workers read;
/// the setters change it.
///
/// ```no_run
/// # fn main() -> anyhow::Result<()> {
/// use corelane::component::Options;
/// let options = Options::from_env()?.shards(4).port(7001);
/// # let _ = options; Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Options {
    pub(super) shards: usize,
    pub(super) cpus: Vec<usize>,
    pub(super) io: host::Io,
    pub(super) calls_only: bool,
    pub(super) server: Server,
    pub(super) status: Option<SocketAddr>,
    pub(super) discovery: config::Discovery,
    pub(super) memory: Option<MemoryStore>,
    pub(super) drain: Drain,
    pub(super) work_max: Duration,
    pub(super) admission: Admission,
    pub(super) calls_max: u32,
    pub(super) codec: PayloadCodec,
    pub(super) checks: Checks,
    pub(super) calls: Settings,
    pub(super) events: EventPlane,
    pub(super) zmq: Option<ZmqOptions>,
    pub(super) nats: NatsOptions,
    pub(super) request_plane: RequestPlane,
    pub(super) env: Env,
    pub(super) signals: bool,
}

/// How many requests a process takes on (`spec/request-plane.md` §10.1). Beyond both numbers a
/// request is refused at once, with `Server overloaded`, which callers understand.
///
/// The default is divided among the shards; any other is kept by all of them together.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Admission {
    /// Requests in handlers at the same time, at least 1. A slot is held until the response has
    /// been written out.
    pub running_max: u32,
    /// Acknowledged requests that wait for a slot; 0 means that none ever waits.
    pub queue_max: u32,
}

impl Default for Admission {
    fn default() -> Self {
        Admission {
            running_max: 10_000,
            queue_max: 40_000,
        }
    }
}

impl Admission {
    /// Dynamo's variables, except that the queue limits 0 and 1 mean what they say.
    fn from_env(env: &Env) -> Result<Admission, Error> {
        let number = |name: &str| number(env, name);
        let default = Admission::default();
        let Some(slots) = number("DYN_ENGINE_REQUEST_LIMIT")? else {
            let running = number("DYN_TCP_WORKER_POOL_SIZE")?;
            let queued = number("DYN_TCP_WORK_QUEUE_SIZE")?;
            return Ok(Admission {
                running_max: running.unwrap_or(default.running_max).max(1),
                queue_max: queued.unwrap_or(default.queue_max),
            });
        };
        Ok(Admission {
            running_max: slots.max(1),
            queue_max: number("DYN_DYNAMO_REQUEST_QUEUE_LIMIT")?.unwrap_or(16),
        })
    }

    /// Whether it is too little to be divided among shards: one connection, which one of them has,
    /// is to get all of it.
    pub(super) fn is_shared(self, shards: usize) -> bool {
        shards > 1 && self != Admission::default()
    }

    /// The part of one shard, such that the parts of all add up. Each gets one slot at least.
    pub(super) fn part(self, index: usize, shards: usize) -> Admission {
        let part = |all: u32| {
            let (index, shards) = (index as u32, shards as u32);
            all / shards + u32::from(index < all % shards)
        };
        Admission {
            running_max: part(self.running_max).max(1),
            queue_max: part(self.queue_max),
        }
    }
}

/// When endpoints with a health check are checked (`spec/events-discovery.md` §7.2).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Checks {
    /// Whether they are checked at all; those without a payload never are.
    pub enabled: bool,
    /// A check comes after so much time without an item to anybody.
    pub wait: Duration,
    /// The first item of the answer must come within this.
    pub timeout: Duration,
}

impl Default for Checks {
    fn default() -> Self {
        Checks {
            enabled: false,
            wait: Duration::from_secs(10),
            timeout: Duration::from_secs(3),
        }
    }
}

impl Checks {
    fn from_env(env: &Env) -> Result<Checks, Error> {
        let default = Checks::default();
        Ok(Checks {
            enabled: env.is_on("DYN_HEALTH_CHECK_ENABLED"),
            wait: seconds(env, "DYN_CANARY_WAIT_TIME", default.wait)?,
            timeout: seconds(env, "DYN_HEALTH_CHECK_REQUEST_TIMEOUT", default.timeout)?,
        })
    }
}

fn number(env: &Env, name: &str) -> Result<Option<u32>, Error> {
    let Some(text) = env.get(name) else {
        return Ok(None);
    };
    let parsed = text.trim().parse();
    let parsed = parsed.map_err(|_| {
        Error::Environment(format!("environment {name}: write a whole number, as 16"))
    });
    parsed.map(Some)
}

fn seconds(env: &Env, name: &str, default: Duration) -> Result<Duration, Error> {
    let seconds = number(env, name)?;
    Ok(seconds.map_or(default, |seconds| Duration::from_secs(seconds.into())))
}

/// How calls go, as Dynamo's variables say.
fn settings(env: &Env) -> Result<Settings, Error> {
    let default = Deadlines::default();
    let pause = seconds(env, "DYN_HTTP_BACKEND_STREAM_TIMEOUT_SECS", Duration::ZERO)?;
    let ratio = number(env, "DYN_ENCODER_CUDA_TO_CPU_RATIO")?;
    let five = Duration::from_secs(5);
    Ok(Settings {
        mode: RoutingMode::default(),
        ratio: ratio.map_or_else(Ratio::default, |ratio| Ratio(ratio.max(1).into())),
        detects_faults: true,
        inhibited: seconds(env, "DYN_RUNTIME_INHIBITED_DURATION_SECS", five)?,
        deadlines: Deadlines {
            ack: seconds(env, "DYN_TCP_REQUEST_TIMEOUT", default.ack)?,
            ..default
        },
        inactivity: Some(pause).filter(|pause| !pause.is_zero()),
    })
}

impl Options {
    /// As the environment of this process says: Dynamo's variables and ours, see `corelane env`
    /// and the README. Discovery is etcd unless they say otherwise.
    ///
    /// # Errors
    /// A variable cannot be understood, or asks for what this version cannot do.
    pub fn from_env() -> Result<Options> {
        Options::of_env(&Env::current())
    }

    fn of_env(env: &Env) -> Result<Options> {
        let mut options = Options::read(env)?;
        let said = ["CORELANE_DISCOVERY_BACKEND", "DYN_DISCOVERY_BACKEND"];
        if said.iter().all(|name| env.get(name).is_none()) {
            options.discovery.backend = Backend::Etcd;
        }
        Ok(options)
    }

    /// For one process alone: discovery in memory, any free port on loopback, and nothing of the
    /// environment but `CORELANE_IO`.
    ///
    /// # Errors
    /// None in practice: the defaults are good.
    pub fn local() -> Result<Options> {
        let io = Env::current().get("CORELANE_IO").map(str::to_owned);
        let io = io.map(|io| ("CORELANE_IO".to_owned(), io));
        let mut options = Options::read(&Env::of(io))?;
        options.discovery.backend = Backend::Memory;
        Ok(options)
    }

    fn read(env: &Env) -> Result<Options> {
        let inputs = Inputs {
            purpose: Purpose::Peer,
            main: Main::Nothing,
            overrides: Vec::new(),
            env: env.clone(),
            host: Host::current(),
        };
        let checked = config::load(&inputs);
        let problems: Vec<String> = checked.errors().map(Problem::to_string).collect();
        let config = checked
            .config
            .ok_or_else(|| anyhow!(Error::Environment(problems.join("\n"))))?;
        Options::of(config.server, config.discovery, config.drain, env)
    }

    /// Of what a command was given; what the environment says beside it is read here. Nothing of
    /// it needs events.
    pub(crate) fn of_command(
        server: Server,
        discovery: config::Discovery,
        drain: Drain,
    ) -> Result<Options> {
        let options = Options::of(server, discovery, drain, &Env::current());
        let options = options.map_err(|why| Stop::Usage(format!("{why:#}")))?;
        Ok(options.events(EventPlane::Off))
    }

    /// Of what was configured elsewhere.
    fn of(
        server: Server,
        discovery: config::Discovery,
        drain: Drain,
        env: &Env,
    ) -> Result<Options> {
        let io = preflight::wanted_io(env)?;
        let codec = match env.get("DYN_REQUEST_PLANE_CODEC").map(str::trim) {
            Some("json") => PayloadCodec::Json,
            _ => PayloadCodec::MessagePack,
        };
        let wanted = ["CORELANE_SERVER_STATUS_PORT", "DYN_SYSTEM_PORT"];
        let wanted = wanted.iter().any(|name| env.get(name).is_some());
        let status = server.status_port.filter(|_| wanted);
        let thirty = Duration::from_secs(30);
        Ok(Options {
            shards: 1,
            cpus: Vec::new(),
            io,
            calls_only: false,
            status: status.map(|port| SocketAddr::new(server.status_host, port)),
            server,
            discovery,
            memory: None,
            drain,
            work_max: seconds(env, "DYN_WORKER_GRACEFUL_SHUTDOWN_TIMEOUT", thirty)?,
            admission: Admission::from_env(env)?,
            calls_max: 16_384,
            codec,
            checks: Checks::from_env(env)?,
            calls: settings(env)?,
            events: EventPlane::read(env)?,
            zmq: None,
            nats: NatsOptions::read(env)?,
            // Another word has been an error of the configuration.
            request_plane: RequestPlane::read(env).unwrap_or_default(),
            env: env.clone(),
            signals: true,
        })
    }

    /// How many shards run, each a thread; 1 unless it is said. With [`Options::cpus`] those count.
    #[must_use]
    pub fn shards(mut self, shards: usize) -> Self {
        self.shards = shards.max(1);
        self
    }

    /// One shard pinned to each of these CPUs.
    #[must_use]
    pub fn cpus(mut self, cpus: impl IntoIterator<Item = usize>) -> Self {
        self.cpus = cpus.into_iter().collect();
        self
    }

    /// Serves nothing: no port is opened for requests, so that a client can run where a worker has
    /// the port of `DYN_TCP_RPC_PORT`.
    #[must_use]
    pub fn calls_only(mut self) -> Self {
        self.calls_only = true;
        self
    }

    /// The address to bind and to advertise.
    #[must_use]
    pub fn host(mut self, host: IpAddr) -> Self {
        self.server.host = host;
        self
    }

    /// The port that requests come to; 0 takes any.
    #[must_use]
    pub fn port(mut self, port: u16) -> Self {
        self.server.port = port;
        self
    }

    /// The transport of responses, of the endpoints served here and of the calls made here: it must
    /// be the same at all peers.
    #[must_use]
    pub fn response_plane(mut self, plane: ResponsePlane) -> Self {
        self.server.responses.plane = plane;
        self
    }

    /// Where `/health`, `/live` and `/metrics` are served; `None` for nowhere.
    #[must_use]
    pub fn status(mut self, address: impl Into<Option<SocketAddr>>) -> Self {
        self.status = address.into();
        self
    }

    /// Discovery inside this process, shared with other runtimes of the same thread.
    #[must_use]
    pub fn memory(mut self, store: &MemoryStore) -> Self {
        self.discovery.backend = Backend::Memory;
        self.memory = Some(store.clone());
        self
    }

    /// Discovery in these etcd servers: `http://host:port` or `host:port` each.
    #[must_use]
    pub fn etcd(mut self, endpoints: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.discovery.backend = Backend::Etcd;
        self.discovery.endpoints = endpoints.into_iter().map(Into::into).collect();
        self
    }

    /// The time to live of our lease in etcd, in seconds.
    #[must_use]
    pub fn lease_ttl_s(mut self, seconds: u32) -> Self {
        self.discovery.lease_ttl_s = seconds;
        self
    }

    /// How many requests are taken on.
    #[must_use]
    pub fn admission(mut self, admission: Admission) -> Self {
        self.admission = admission;
        self
    }

    /// When health checks are made.
    #[must_use]
    pub fn checks(mut self, checks: Checks) -> Self {
        self.checks = checks;
        self
    }

    /// How a stop goes: requests are still taken for `grace` after we left discovery, and running
    /// ones may then take `timeout`.
    #[must_use]
    pub fn drain(mut self, grace: Duration, timeout: Duration) -> Self {
        let seconds = |time: Duration| u32::try_from(time.as_secs()).unwrap_or(u32::MAX);
        self.drain.grace_s = seconds(grace);
        self.drain.timeout_s = seconds(timeout);
        self
    }

    /// Calls that one shard makes at the same time, at most; 0 opens no port for responses, and
    /// then there are no health checks either, which are calls.
    #[must_use]
    pub fn calls_max(mut self, calls: u32) -> Self {
        self.calls_max = calls;
        self
    }

    /// How long an instance that failed is left out; zero never leaves one out.
    #[must_use]
    pub fn inhibited(mut self, time: Duration) -> Self {
        self.calls.inhibited = time;
        self
    }

    /// What events go over; `DYN_EVENT_PLANE` unless it is said.
    #[must_use]
    pub fn events(mut self, plane: EventPlane) -> Self {
        self.events = plane;
        self
    }

    /// How events go over ZMQ; as `DYN_ZMQ_*` and `DYN_EVENT_PLANE_HOST` say unless it is said.
    #[must_use]
    pub fn zmq(mut self, options: ZmqOptions) -> Self {
        self.zmq = Some(options);
        self
    }

    /// The NATS server, for all that goes over NATS; as `NATS_*` say unless it is said.
    #[must_use]
    pub fn nats(mut self, options: NatsOptions) -> Self {
        self.nats = options;
        self
    }

    /// Where requests to our endpoints come in; `DYN_REQUEST_PLANE` unless it is said. Instances
    /// of others are called wherever they are.
    #[must_use]
    pub fn request_plane(mut self, plane: RequestPlane) -> Self {
        self.request_plane = plane;
        self
    }

    /// Whether SIGTERM and SIGINT end the runtime; they do unless it is said.
    #[must_use]
    pub fn signals(mut self, caught: bool) -> Self {
        self.signals = caught;
        self
    }

    /// The shards to start.
    pub(super) fn plan(&self) -> Result<Plan, Stop> {
        host::raise_limits();
        let choice = host::choose(self.io, &host::probe());
        let choice = choice.map_err(|refused| Stop::HostCannot(refused.to_string()))?;
        tracing::info!("ring {}", choice.explain);
        tls::kernel::demanded(&self.server.tls).map_err(Stop::HostCannot)?;
        let listen = SocketAddr::new(self.server.host, self.server.port);
        let listen = (!self.calls_only).then_some(listen);
        let cpus = match self.cpus.is_empty() {
            true => vec![ANY_CPU; self.shards],
            false => self.cpus.clone(),
        };
        let planned = |(shard, cpu): (usize, &usize)| {
            let mut config = ShardConfig::new(shard, *cpu, choice.ring, listen);
            config.buffers = BUFFERS;
            config.message_bytes_max = u64::from(self.server.message_bytes_max);
            Planned {
                config,
                cause: choice.cause.word(),
                required: self.io == host::Io::Uring,
                alone: false,
            }
        };
        Ok(Plan {
            control_cpu: ANY_CPU,
            shards: cpus.iter().enumerate().map(planned).collect(),
            tls: self.server.tls.clone(),
            responses: self.server.responses,
            placing: Placing::default(),
            status: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admission(pairs: &[(&str, &str)]) -> Admission {
        let pairs = pairs
            .iter()
            .map(|(a, b)| ((*a).to_owned(), (*b).to_owned()));
        Admission::from_env(&Env::of(pairs)).unwrap()
    }

    #[test]
    fn limits_mean_what_they_say() {
        assert_eq!(admission(&[]), Admission::default());
        for (queue, want) in [("0", 0), ("1", 1), ("7", 7)] {
            let set = [
                ("DYN_ENGINE_REQUEST_LIMIT", "2"),
                ("DYN_DYNAMO_REQUEST_QUEUE_LIMIT", queue),
            ];
            let found = admission(&set);
            assert_eq!((found.running_max, found.queue_max), (2, want));
        }
        let found = admission(&[("DYN_ENGINE_REQUEST_LIMIT", "0")]);
        assert_eq!((found.running_max, found.queue_max), (1, 16));
        let found = admission(&[
            ("DYN_TCP_WORKER_POOL_SIZE", "8"),
            ("DYN_TCP_WORK_QUEUE_SIZE", "0"),
            ("DYN_DYNAMO_REQUEST_QUEUE_LIMIT", "3"),
        ]);
        assert_eq!((found.running_max, found.queue_max), (8, 0));
    }

    #[test]
    fn discovery_is_etcd_unless_it_is_said() {
        for (set, backend) in [
            (vec![], Backend::Etcd),
            (
                vec![("ETCD_ENDPOINTS", "http://127.0.0.1:1")],
                Backend::Etcd,
            ),
            (vec![("DYN_DISCOVERY_BACKEND", "mem")], Backend::Memory),
            (vec![("CORELANE_DISCOVERY_BACKEND", "file")], Backend::File),
        ] {
            let env = set.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned()));
            let options = Options::of_env(&Env::of(env)).unwrap();
            assert_eq!(options.discovery.backend, backend, "{set:?}");
        }
    }

    #[test]
    fn the_parts_of_shards_add_up() {
        let all = Admission {
            running_max: 10,
            queue_max: 2,
        };
        let parts: Vec<_> = (0..4).map(|index| all.part(index, 4)).collect();
        assert_eq!(parts.iter().map(|part| part.running_max).sum::<u32>(), 10);
        assert_eq!(parts.iter().map(|part| part.queue_max).sum::<u32>(), 2);
    }
}
