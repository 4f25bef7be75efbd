//! The configuration: `corelane.toml`, `cores.d/<n>.toml`, environment and flags become one
//! [`Config`] of plain values, each with the place it came from, or a list of everything that is
//! wrong with them.
//!
//! ```text
//! flag  >  CORELANE_* > Dynamo's name  >  cores.d/<n>.toml  >  corelane.toml  >  default
//!            keys (one table)  ->  raw (what was typed)  ->  layers (who wins)  ->  resolve
//! ```
//!
//! Nothing here opens a socket or starts a thread: `corelane check` and `corelane serve` see the
//! same.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use corelane_engine::placement::ControlCpu;
use corelane_engine::{balance, quic, steering};

use crate::env::Env;

mod cores;
mod endpoint;
mod events;
mod gpu;
mod host;
pub(crate) mod keys;
mod kv;
mod layers;
mod lists;
mod live;
mod pinning;
mod placing;
mod planner;
mod problem;
mod raw;
mod resolve;
mod routes;
mod suggest;
mod tls;
mod value;
mod words;

pub use corelane_codec::path::EndpointId;
pub use cores::Core;
pub use events::{BridgeConfig, Broker};
pub use host::Host;
pub use keys::{Alias, Dialect, Fallback, Key, Section, find, keys};
pub use kv::{RouteKv, RouteLoad};
pub use layers::Setting;
pub use problem::{Origin, Problem, Severity};
pub use tls::{Tls, TlsClient, TlsServer};
pub use value::{Kind, Value, address};
pub use words::{
    Ack, Backend, Bridge, DurableLayout, Generation, GpuBackend, Idle, Imbalance, Io, KernelTls,
    LoadSource, Overflow, PlannerNames, Policy, RelayPlane, Response, ResponsePlane, Role,
    Steering, Switch,
};

pub use crate::words::Word;

pub(crate) use host::cpu_list;
pub(crate) use problem::quoted;
pub(crate) use suggest::nearest;

use crate::events::CurveOptions;
use layers::Layers;
pub(crate) use raw::plain as plain_error;
use raw::{FileKind, RawFile};

/// Everything that the router is told, checked: plain values only.
#[derive(Clone, Debug)]
pub struct Config {
    /// What we listen on.
    pub server: Server,
    /// Where instances are found.
    pub discovery: Discovery,
    /// The endpoints that we offer, in the order of the file.
    pub routes: Vec<Route>,
    /// Instances known without discovery, in the order of the file.
    pub instances: Vec<StaticInstance>,
    /// The data cores in ascending order of their CPUs, at least one.
    pub cores: Vec<Core>,
    /// The control core.
    pub control: Control,
    /// How we stop.
    pub drain: Drain,
    /// The GPU memory service, if there is one.
    pub gpu: Option<Gpu>,
    /// Where a planner is listened to, if it is.
    pub planner: Option<Planner>,
    /// How a changed configuration is taken over.
    pub reload: Reload,
    /// The broker of events, if there is one.
    pub broker: Option<Broker>,
    /// Which events over ZMQ are encrypted, and with which keys.
    pub curve: CurveOptions,
    /// Every value that was used, with the place it came from.
    pub settings: Vec<Setting>,
}

/// `[server]`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Server {
    /// Address to bind.
    pub host: IpAddr,
    /// Address to advertise; None means `host`, or behind a wildcard [`Server::advertised`].
    pub advertise_host: Option<IpAddr>,
    /// Port of the request plane; 0 is any.
    pub port: u16,
    /// Where workers of relayed routes call home.
    pub home_host: IpAddr,
    /// First port of that, one for each core; 0 is any.
    pub home_port: u16,
    /// Address of the status server.
    pub status_host: IpAddr,
    /// Port of the status server; 0 is any, None is off.
    pub status_port: Option<u16>,
    /// Largest whole request frame.
    pub message_bytes_max: u32,
    /// What chooses the core of a connection.
    pub steering: steering::Steering,
    /// What becomes of a connection that comes to a core with more than others.
    pub imbalance: balance::Imbalance,
    /// How the responses that this process makes travel.
    pub responses: Responses,
    /// `[tls]`: who speaks TLS, and how.
    pub tls: Tls,
}

impl Server {
    /// The address that callers are told. Behind a wildcard it is the one from which this machine
    /// would send to the outside, and loopback where there is no way out; nothing is sent.
    pub fn advertised(&self) -> IpAddr {
        self.advertised_for(self.host)
    }

    /// The address that workers of relayed routes are told.
    pub fn home_advertised(&self) -> IpAddr {
        self.advertised_for(self.home_host)
    }

    fn advertised_for(&self, bound: IpAddr) -> IpAddr {
        if let Some(host) = self.advertise_host.filter(|_| bound == self.host) {
            return host;
        }
        if !bound.is_unspecified() {
            return bound;
        }
        routed(bound).unwrap_or(match bound {
            IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        })
    }
}

/// The address from which this machine would send to the outside, of the family of `any`; nothing
/// is sent. `None` where there is no way out.
pub(crate) fn routed(any: IpAddr) -> Option<IpAddr> {
    let (any, far) = match any {
        IpAddr::V4(_) => ("0.0.0.0:0", "192.0.2.1:9"),
        IpAddr::V6(_) => ("[::]:0", "[2001:db8::1]:9"),
    };
    // Connecting a datagram socket only looks up the route.
    let local = std::net::UdpSocket::bind(any).and_then(|socket| {
        socket.connect(far)?;
        socket.local_addr()
    });
    let local = local.ok().map(|local| local.ip());
    local.filter(|local| !local.is_unspecified())
}

/// How responses travel: `response_plane`, `relay_plane`, `quic_batch_us` and `quic_buffer_items`
/// of `[server]`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Responses {
    /// On which transport.
    pub plane: quic::ResponsePlane,
    /// How long QUIC gathers items after the first.
    pub quic_batch: Duration,
    /// Items of one QUIC response that may wait for who reads them.
    pub quic_buffer_items: u32,
    /// How workers bring us the responses of relayed routes; `None`: as their caller asks.
    pub relay_plane: Option<quic::ResponsePlane>,
}

/// `[discovery]`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Discovery {
    /// Which store.
    pub backend: Backend,
    /// etcd servers: `HOST:PORT` or a URL each.
    pub endpoints: Vec<String>,
    /// Time to live of our lease.
    pub lease_ttl_s: u32,
    /// How long to try at start.
    pub connect_timeout_s: u32,
    /// HTTP/2 ping interval; 0 is off.
    pub keepalive_interval_s: u32,
    /// HTTP/2 ping time-out.
    pub keepalive_timeout_s: u32,
    /// User and password of etcd; with them the certificates are not used.
    pub login: Option<(String, Secret)>,
    /// Certificate authority of etcd: PEM text (contains `-----BEGIN`) or a path.
    pub ca: Option<String>,
    /// Client certificate and its key, PEM text or a path each; only together with `ca`.
    pub client_cert: Option<(String, Secret)>,
    /// Folder of the file backend.
    pub path: PathBuf,
}

impl Discovery {
    /// These settings under the names of Dynamo's variables, for code that reads those. The value
    /// is the resolved one, wherever it came from.
    pub fn variable(&self, name: &str) -> Option<String> {
        match name {
            "ETCD_ENDPOINTS" => Some(self.endpoints.join(",")),
            "ETCD_LEASE_TTL" => Some(self.lease_ttl_s.to_string()),
            "ETCD_STARTUP_CONNECT_TIMEOUT_SECONDS" => Some(self.connect_timeout_s.to_string()),
            "ETCD_KEEPALIVE_INTERVAL_SECONDS" => Some(self.keepalive_interval_s.to_string()),
            "ETCD_KEEPALIVE_TIMEOUT_SECONDS" => Some(self.keepalive_timeout_s.to_string()),
            "ETCD_AUTH_USERNAME" => self.login.as_ref().map(|(user, _)| user.clone()),
            "ETCD_AUTH_PASSWORD" => self.login.as_ref().map(|(_, secret)| secret.0.clone()),
            "ETCD_AUTH_CA" => self.ca.clone(),
            "ETCD_AUTH_CLIENT_CERT" => self.client_cert.as_ref().map(|(cert, _)| cert.clone()),
            "ETCD_AUTH_CLIENT_KEY" => self.client_cert.as_ref().map(|(_, key)| key.0.clone()),
            "DYN_FILE_KV" => Some(self.path.to_string_lossy().into_owned()),
            _ => None,
        }
    }
}

/// Text that no log and no listing shows.
#[derive(Clone, Eq, PartialEq)]
pub struct Secret(String);

impl Secret {
    /// The text itself, for handing it to a peer.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(hidden)")
    }
}

/// `[[route]]`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Route {
    /// Endpoint that we offer.
    pub listen: EndpointId,
    /// Endpoint whose instances get the requests.
    pub target: EndpointId,
    /// How an instance is chosen.
    pub policy: Policy,
    /// Header of the policies `direct` and `hash`; always there for these two.
    pub header: Option<String>,
    /// Who dials whom for the response.
    pub response: Response,
    /// What the acknowledgement means.
    pub ack: Ack,
    /// How long an instance may take to acknowledge.
    pub ack_timeout_ms: u32,
    /// Further instances to try.
    pub retries_max: u8,
    /// Largest request that is kept to be sent again.
    pub hold_bytes: u32,
    /// How long the steps of a relayed response may take; for [`Response::Relay`] only.
    pub relay: RelayTimes,
    /// Workers that share memory take the place of instances.
    pub lane: Option<RouteLane>,
    /// Tokens of a block of KV cache.
    pub block_tokens: u32,
    /// What is remembered of KV caches; for [`Policy::Kv`] only.
    pub kv: Option<RouteKv>,
    /// What the load of its instances is.
    pub load: RouteLoad,
}

/// The deadlines of a relayed route; 0 is for ever.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct RelayTimes {
    /// From an instance's acknowledgement to its call home.
    pub home_timeout_ms: u32,
    /// From the forward to the first item.
    pub first_item_timeout_ms: u32,
    /// From one item to the next.
    pub inactivity_timeout_ms: u32,
}

/// Where the workers of a route attach.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RouteLane {
    /// The Unix socket.
    pub socket: PathBuf,
    /// Shared memory of each core with each worker.
    pub bytes: u64,
    /// Users that may attach besides root and ourselves.
    pub uids: Vec<u32>,
}

/// `[[instance]]`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct StaticInstance {
    /// Endpoint that it serves.
    pub endpoint: EndpointId,
    /// Where it listens.
    pub socket: SocketAddr,
    /// The path that its request frames carry, byte for byte.
    pub path: String,
    /// Its id.
    pub id: u64,
}

/// `[control]`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Control {
    /// The CPU of the control core; may be one of the data cores on a small machine.
    pub cpu: usize,
    /// A data core may run there too.
    pub share: bool,
    /// Where flight records of a core in trouble are written.
    pub flight_dir: Option<PathBuf>,
    /// Filter of the log, unless a variable has one.
    pub log: Option<String>,
}

/// `[reload]`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Reload {
    /// How long the first core is watched.
    pub watch: Duration,
    /// Failed requests in percent, beyond those of the others, that are too many.
    pub failures_pct: u8,
    /// How long a core may take to take it over, or stand still.
    pub taken_timeout: Duration,
}

impl Control {
    /// As the placement of cores takes it.
    pub fn placed(&self) -> ControlCpu {
        match self.share {
            true => ControlCpu::Shared(self.cpu),
            false => ControlCpu::Cpu(self.cpu),
        }
    }
}

/// `[drain]`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Drain {
    /// How long to keep accepting after leaving discovery.
    pub grace_s: u32,
    /// How long running requests may then take.
    pub timeout_s: u32,
}

/// `[gpu]`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Gpu {
    /// GPUs by CUDA ordinal, at least one.
    pub devices: Vec<u32>,
    /// Pools of each, at least one.
    pub tags: Vec<String>,
    /// Which memory.
    pub backend: GpuBackend,
    /// Which protocol.
    pub generation: Generation,
    /// Where the sockets lie.
    pub socket_dir: PathBuf,
    /// Who may connect; empty is our own user.
    pub uids: Vec<u32>,
    /// Most host memory of one device.
    pub capacity_bytes: Option<u64>,
    /// Host memory up to this size gets its pages at once.
    pub populate_bytes_max: u64,
    /// Clients at a time.
    pub connections_max: u32,
    /// Allocations of one pool.
    pub allocations_max: u32,
    /// Keys and values of one pool.
    pub metadata_bytes_max: u64,
    /// How often memory that is short is asked for again.
    pub alloc_retry_interval_ms: u32,
    /// How long that goes on; 0 is as long as the client lives.
    pub alloc_retry_timeout_ms: u32,
    /// What `rw_or_ro` does to a durable layout.
    pub durable_layout: DurableLayout,
    /// How long the service looks for events before it sleeps.
    pub spin_us: u32,
}

/// `[planner]`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Planner {
    /// The Unix socket.
    pub socket: PathBuf,
    /// Names of the metrics.
    pub names: PlannerNames,
}

/// What the configuration is read for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Purpose {
    /// A router: at least one route.
    Serve,
    /// A router with workers in the same process.
    Up,
    /// A worker or a caller: only `[server]`, `[discovery]`, `[tls]` and `[drain]` count.
    Peer,
    /// The GPU memory service alone: only `[server]`, for its status port, and `[gpu]` count.
    Gms,
}

impl Purpose {
    fn reads(self, section: Section) -> bool {
        match self {
            Self::Serve | Self::Up => true,
            Self::Peer => matches!(
                section,
                Section::Server | Section::Discovery | Section::Tls | Section::Drain
            ),
            Self::Gms => matches!(section, Section::Server | Section::Gpu),
        }
    }

    /// Whether there are cores, routes and instances.
    fn routes(self) -> bool {
        matches!(self, Self::Serve | Self::Up)
    }
}

/// A value from the command line.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Override {
    /// The flag as the user would type it: `--set server.port`, `--discovery`.
    pub flag: String,
    /// What it sets.
    pub key: &'static Key,
    /// The value as typed.
    pub text: String,
}

/// Where the main file is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Main {
    /// There is none.
    Nothing,
    /// On disk; `cores.d` is looked for beside it.
    File(PathBuf),
    /// Here, under a name for messages; there is no `cores.d`.
    Text {
        /// The name.
        name: String,
        /// The content.
        text: String,
    },
}

/// Everything that a configuration is made of.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// What it is for.
    pub purpose: Purpose,
    /// The main file.
    pub main: Main,
    /// Flags.
    pub overrides: Vec<Override>,
    /// Environment.
    pub env: Env,
    /// This machine.
    pub host: Host,
}

/// The outcome of reading a configuration.
#[derive(Clone, Debug)]
pub struct Checked {
    /// There unless a problem is an error.
    pub config: Option<Config>,
    /// Everything found, in the order of places.
    pub problems: Vec<Problem>,
    /// Every value that was looked at, also when there is no config.
    pub settings: Vec<Setting>,
}

impl Checked {
    /// The findings that stop the program.
    pub fn errors(&self) -> impl Iterator<Item = &Problem> {
        self.problems.iter().filter(|problem| problem.is_error())
    }

    /// The findings that do not.
    pub fn warnings(&self) -> impl Iterator<Item = &Problem> {
        self.problems.iter().filter(|problem| !problem.is_error())
    }
}

/// Reads and checks a configuration. Never fails: what is wrong is in the answer.
pub fn load(inputs: &Inputs) -> Checked {
    let mut layers = layers(inputs);
    layers.problems.extend(crate::env::refusals(&inputs.env));
    let config = resolve::config(&mut layers, inputs);
    let mut problems = layers.problems;
    problems.sort_by(|left, right| left.at.cmp(&right.at));
    problems.dedup();
    let settings = layers.settings;
    let failed = problems.iter().any(Problem::is_error);
    let config = config.filter(|_| !failed).map(|config| Config {
        settings: settings.clone(),
        ..config
    });
    Checked {
        config,
        problems,
        settings,
    }
}

fn layers(inputs: &Inputs) -> Layers {
    let mut problems = Vec::new();
    let main = match &inputs.main {
        Main::Nothing => RawFile::empty(),
        Main::File(path) => raw::read_file(path, FileKind::Main, &mut problems),
        Main::Text { name, text } => {
            raw::read_text(name.as_str().into(), text, FileKind::Main, &mut problems)
        }
    };
    let cores = match &inputs.main {
        Main::File(path) => core_files(path, &mut problems),
        Main::Nothing | Main::Text { .. } => BTreeMap::new(),
    };
    Layers::new(
        main,
        cores,
        &inputs.overrides,
        &inputs.env,
        inputs.purpose,
        problems,
    )
}

/// The files of `cores.d` beside the main file, by CPU. Other files than `*.toml` are let be.
fn core_files(main: &Path, problems: &mut Vec<Problem>) -> BTreeMap<usize, RawFile> {
    let folder = main.parent().unwrap_or(Path::new("")).join("cores.d");
    let start = |path: &Path| Origin::File {
        path: path.to_string_lossy().into(),
        line: 1,
        column: 1,
    };
    let entries = match std::fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return BTreeMap::new(),
        Err(error) => {
            let what = format!("cannot be read: {}", raw::plain(&error));
            problems.push(Problem::error(
                start(&folder),
                what,
                "make it a readable folder",
            ));
            return BTreeMap::new();
        }
    };
    let mut paths: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    paths.retain(|path| {
        path.extension()
            .is_some_and(|extension| extension == "toml")
    });
    paths.sort();
    let mut files = BTreeMap::new();
    for path in paths {
        let stem = path
            .file_stem()
            .and_then(|stem| stem.to_str())
            .unwrap_or_default();
        match stem.parse::<usize>() {
            Ok(cpu) if cpu.to_string() == stem => {
                files.insert(cpu, raw::read_file(&path, FileKind::Core, problems));
            }
            _ => problems.push(Problem::error(
                start(&path),
                "is not named after a CPU",
                "name it like 0.toml or 12.toml, or give it another ending",
            )),
        }
    }
    files
}
