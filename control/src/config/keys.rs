//! The table of every key of the configuration: validation, `corelane check --explain`, the
//! environment report and the documentation all read this one list.

use super::value::Kind;
use super::words::{
    Ack, Backend, Bridge, DurableLayout, Generation, GpuBackend, Idle, Imbalance, Io, KernelTls,
    LoadSource, Overflow, PlannerNames, Policy, RelayPlane, Response, ResponsePlane, Role,
    Steering, Switch,
};

/// A table of `corelane.toml`.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Section {
    /// `[server]`: what we listen on.
    Server,
    /// `[discovery]`: where instances are found and our endpoints are offered.
    Discovery,
    /// `[[route]]`: one endpoint that we offer, and who answers it.
    Route,
    /// `[[instance]]`: an instance known without discovery.
    Instance,
    /// `[core]`: what each data core does; the only table of a file in `cores.d/`.
    Core,
    /// `[control]`: the control core.
    Control,
    /// `[tls]`: encryption of the request and response planes.
    Tls,
    /// `[drain]`: how we stop.
    Drain,
    /// `[gpu]`: the GPU memory service.
    Gpu,
    /// `[planner]`: where a planner tells what it exports.
    Planner,
    /// `[events]`: the event plane.
    Events,
    /// `[reload]`: how a changed configuration is taken over.
    Reload,
}

impl Section {
    /// All sections in the order in which they are documented.
    pub const ALL: [Self; 12] = [
        Self::Server,
        Self::Discovery,
        Self::Route,
        Self::Instance,
        Self::Core,
        Self::Control,
        Self::Tls,
        Self::Drain,
        Self::Gpu,
        Self::Planner,
        Self::Events,
        Self::Reload,
    ];

    /// The table's name, without brackets.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Server => "server",
            Self::Discovery => "discovery",
            Self::Route => "route",
            Self::Instance => "instance",
            Self::Core => "core",
            Self::Control => "control",
            Self::Tls => "tls",
            Self::Drain => "drain",
            Self::Gpu => "gpu",
            Self::Planner => "planner",
            Self::Events => "events",
            Self::Reload => "reload",
        }
    }

    /// Whether the table is written once for each thing, in double brackets.
    pub const fn repeats(self) -> bool {
        matches!(self, Self::Route | Self::Instance)
    }

    /// The name as it is written in the file: `[core]` or `[[route]]`.
    pub fn header(self) -> String {
        if self.repeats() {
            format!("[[{}]]", self.name())
        } else {
            format!("[{}]", self.name())
        }
    }
}

/// What a key is when nobody wrote it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fallback {
    /// This value, as it would be typed without quotes.
    Value(&'static str),
    /// No value; the text says what happens then.
    Unset(&'static str),
    /// It must be written.
    Required,
}

/// How the value of one of Dynamo's variables becomes ours.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Dialect {
    /// The same words and units.
    Same,
    /// Their seconds are our milliseconds.
    SecondsToMillis,
    /// Their `mem` is our `memory`.
    ShortBackend,
    /// Any negative number is our -1.
    NegativeIsOff,
    /// 1, true, on and yes are our `on`, everything else is our `off`.
    Truthy,
}

/// A variable of Dynamo's that sets one of our keys.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Alias {
    /// The variable's name.
    pub name: &'static str,
    /// How its value is read.
    pub dialect: Dialect,
}

/// One key of the configuration.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Key {
    /// The table it stands in.
    pub section: Section,
    /// Its name in that table.
    pub name: &'static str,
    /// Type, bounds and unit.
    pub kind: Kind,
    /// The value when nobody wrote one.
    pub fallback: Fallback,
    /// Dynamo's names for the same thing; our own name, [`Key::env`], wins over them.
    pub aliases: &'static [Alias],
    /// One line for users.
    pub doc: &'static str,
}

impl Key {
    /// `section.name`, as `--set` takes it.
    pub fn path(&self) -> String {
        format!("{}.{}", self.section.name(), self.name)
    }

    /// Our own variable: `CORELANE_SERVER_PORT`, and for `[core]` without the section,
    /// `CORELANE_IO`. None for tables that repeat.
    pub fn env(&self) -> Option<String> {
        let name = self.name.to_ascii_uppercase();
        match self.section {
            section if section.repeats() || self.only_per_core() => None,
            Section::Core => Some(format!("CORELANE_{name}")),
            section => Some(format!(
                "CORELANE_{}_{name}",
                section.name().to_ascii_uppercase()
            )),
        }
    }

    /// Whether a file in `cores.d/` may set it.
    pub fn per_core(&self) -> bool {
        self.section == Section::Core && *self != CORE_CPUS
    }

    /// Whether nothing but a file in `cores.d/` may set it.
    pub fn only_per_core(&self) -> bool {
        [CORE_CPU, CORE_ROLE, CORE_LISTEN].contains(self)
    }
}

/// Every key, in the order of the documentation.
pub fn keys() -> &'static [&'static Key] {
    KEYS
}

/// The key at `section.name`, if there is one.
pub fn find(path: &str) -> Option<&'static Key> {
    KEYS.iter().copied().find(|key| key.path() == path)
}

/// The keys of one section.
pub(super) fn of(section: Section) -> impl Iterator<Item = &'static Key> {
    KEYS.iter()
        .copied()
        .filter(move |key| key.section == section)
}

const fn same(name: &'static str) -> Alias {
    Alias {
        name,
        dialect: Dialect::Same,
    }
}

macro_rules! keys {
    ($($id:ident = $section:ident $name:literal, $kind:expr, $fallback:expr, [$($alias:expr),*],
       $doc:literal;)*) => {
        $(
            #[doc = $doc]
            pub(crate) const $id: Key = Key {
                section: Section::$section,
                name: $name,
                kind: $kind,
                fallback: $fallback,
                aliases: &[$($alias),*],
                doc: $doc,
            };
        )*
        const KEYS: &[&Key] = &[$(&$id),*];
    };
}

use Fallback::{Required, Unset, Value};

const fn int(min: i64, max: i64, unit: &'static str) -> Kind {
    Kind::Int { min, max, unit }
}

keys! {
    SERVER_HOST = Server "host", Kind::Ip, Value("127.0.0.1"), [same("DYN_TCP_RPC_HOST")],
        "Address to bind; advertised too, unless it is 0.0.0.0 or [::]";
    SERVER_ADVERTISE_HOST = Server "advertise_host", Kind::Ip,
        Unset("host; behind 0.0.0.0, the address of the default route"), [],
        "Address that discovery tells to callers";
    SERVER_PORT = Server "port", int(0, 65_535, "port"), Value("0"), [same("DYN_TCP_RPC_PORT")],
        "Port of the request plane, the same on every core; 0 takes any free one";
    SERVER_HOME_HOST = Server "home_host", Kind::Ip, Unset("host"),
        [same("DYN_TCP_RESPONSE_STREAM_HOST")],
        "Where workers of relayed routes call home: bound, and told to them as advertise_host is";
    SERVER_HOME_PORT = Server "home_port", int(0, 65_535, "port"), Value("0"),
        [same("DYN_TCP_RESPONSE_STREAM_PORT")],
        "First port of that: core n takes home_port + n; 0 takes any free ones";
    SERVER_STATUS_HOST = Server "status_host", Kind::Ip, Unset("host"),
        [same("DYN_SYSTEM_HOST")],
        "Address of /health, /live and /metrics";
    SERVER_STATUS_PORT = Server "status_port", int(-1, 65_535, "port"), Value("9090"),
        [Alias { name: "DYN_SYSTEM_PORT", dialect: Dialect::NegativeIsOff }],
        "Port of /health, /live and /metrics; 0 takes any free one, -1 switches them off";
    SERVER_STEERING = Server "steering", Kind::Words(Steering::WORDS), Value("auto"), [],
        "Who accepts: any core (off), that of the packet's CPU or of its queue; auto: queue or off";
    SERVER_IMBALANCE = Server "imbalance", Kind::Words(Imbalance::WORDS), Value("keep"), [],
        "A new connection stays, or is handed to the core with the fewest if those are far fewer";
    SERVER_MESSAGE_BYTES_MAX = Server "message_bytes_max", int(4_096, 1 << 30, "bytes"),
        Value("33554432"), [same("DYN_TCP_MAX_MESSAGE_SIZE")],
        "Largest whole request frame; a longer one is refused";

    SERVER_RESPONSE_PLANE = Server "response_plane", Kind::Words(ResponsePlane::WORDS),
        Value("tcp"), [same("DYN_RESPONSE_PLANE")],
        "Transport of the responses of this process: those it makes and those of its calls";
    SERVER_RELAY_PLANE = Server "relay_plane", Kind::Words(RelayPlane::WORDS), Value("caller"), [],
        "Transport of relayed responses from worker to router; caller: as the caller asks";
    SERVER_QUIC_BATCH_US = Server "quic_batch_us", int(0, 100_000, "microseconds"),
        Value("5000"), [same("DYN_QUIC_RESPONSE_BATCH_INTERVAL_US")],
        "How long items of QUIC responses are gathered after the first";
    SERVER_QUIC_BUFFER_ITEMS = Server "quic_buffer_items", int(1, 65_536, "items"),
        Value("16384"), [same("DYN_QUIC_RESPONSE_BUFFER_CAPACITY")],
        "Items of a QUIC response that may wait here; one more and it is reset";

    DISCOVERY_BACKEND = Discovery "backend", Kind::Words(Backend::WORDS), Value("memory"),
        [Alias { name: "DYN_DISCOVERY_BACKEND", dialect: Dialect::ShortBackend }],
        "Where instances are found: memory is this process and [[instance]]";
    DISCOVERY_ENDPOINTS = Discovery "endpoints", Kind::Urls, Value("http://localhost:2379"),
        [same("ETCD_ENDPOINTS")],
        "etcd servers; in the environment a comma list";
    DISCOVERY_LEASE_TTL_S = Discovery "lease_ttl_s", int(2, 3_600, "seconds"), Value("30"),
        [same("ETCD_LEASE_TTL")],
        "How long our records outlive a crash in etcd";
    DISCOVERY_CONNECT_TIMEOUT_S = Discovery "connect_timeout_s", int(1, 3_600, "seconds"),
        Value("120"), [same("ETCD_STARTUP_CONNECT_TIMEOUT_SECONDS")],
        "How long to try etcd at start before giving up";
    DISCOVERY_KEEPALIVE_INTERVAL_S = Discovery "keepalive_interval_s", int(0, 3_600, "seconds"),
        Value("15"), [same("ETCD_KEEPALIVE_INTERVAL_SECONDS")],
        "HTTP/2 ping to etcd; 0 is off";
    DISCOVERY_KEEPALIVE_TIMEOUT_S = Discovery "keepalive_timeout_s", int(1, 3_600, "seconds"),
        Value("10"), [same("ETCD_KEEPALIVE_TIMEOUT_SECONDS")],
        "How long an HTTP/2 ping may go unanswered";
    DISCOVERY_USERNAME = Discovery "username", Kind::Text { bytes_max: 256 },
        Unset("no log-in"), [same("ETCD_AUTH_USERNAME")],
        "User of etcd";
    DISCOVERY_PASSWORD = Discovery "password", Kind::Secret, Unset("no log-in"),
        [same("ETCD_AUTH_PASSWORD")],
        "Password of that user; better given in the environment than in a file";
    DISCOVERY_CA = Discovery "ca", Kind::Pem, Unset("the system's roots"),
        [same("ETCD_AUTH_CA")],
        "Certificate authority of etcd: PEM text or the path of a file";
    DISCOVERY_CLIENT_CERT = Discovery "client_cert", Kind::Pem, Unset("no client certificate"),
        [same("ETCD_AUTH_CLIENT_CERT")],
        "Our certificate towards etcd: PEM text or the path of a file";
    DISCOVERY_CLIENT_KEY = Discovery "client_key", Kind::Secret, Unset("no client certificate"),
        [same("ETCD_AUTH_CLIENT_KEY")],
        "The key of client_cert: PEM text or the path of a file";
    DISCOVERY_PATH = Discovery "path", Kind::Path, Unset("dynamo_store_kv in the temp folder"),
        [same("DYN_FILE_KV")],
        "Folder of the file backend, shared by all processes";

    ROUTE_LISTEN = Route "listen", Kind::Endpoint, Required, [],
        "Endpoint that we offer in discovery: namespace/component/endpoint";
    ROUTE_TARGET = Route "target", Kind::Endpoint, Required, [],
        "Endpoint whose instances get the requests";
    ROUTE_POLICY = Route "policy", Kind::Words(Policy::WORDS), Value("least_loaded"), [],
        "How an instance is chosen";
    ROUTE_HEADER = Route "header", Kind::Header,
        Unset("x-corelane-instance for direct; hash must name one"), [],
        "Request header that names the instance (direct) or the affinity key (hash)";
    ROUTE_RESPONSE = Route "response", Kind::Words(Response::WORDS), Value("direct"), [],
        "direct: the worker dials the caller; relay: it dials us, and responses pass through";
    ROUTE_ACK = Route "ack", Kind::Words(Ack::WORDS), Value("on_forward"), [],
        "on_forward: answer at once and fail over ourselves; on_accept: the worker's answer";
    ROUTE_ACK_TIMEOUT_MS = Route "ack_timeout_ms", int(1, 600_000, "milliseconds"), Value("5000"),
        [Alias { name: "DYN_TCP_REQUEST_TIMEOUT", dialect: Dialect::SecondsToMillis }],
        "How long an instance may take to acknowledge a request";
    ROUTE_RETRIES_MAX = Route "retries_max", int(0, 16, "attempts"), Value("2"), [],
        "Further instances to try after the first refused or went away";
    ROUTE_HOLD_BYTES = Route "hold_bytes", int(0, 1 << 30, "bytes"), Value("1048576"), [],
        "Largest request that is kept until it is acknowledged, so that it can be sent again";
    ROUTE_LANE = Route "lane", Kind::Path, Unset("requests go to instances over TCP"), [],
        "Unix socket at which workers of this host attach for shared memory, instead of instances";
    ROUTE_LANE_BYTES = Route "lane_bytes", int(1 << 20, 1 << 30, "bytes"), Value("134217728"), [],
        "Shared memory of each core with each worker: half for requests, half for items";
    ROUTE_LANE_UIDS = Route "lane_uids", Kind::Text { bytes_max: 256 },
        Unset("only this process's user and root"), [],
        "Numbers of further users whose workers may attach: \"1000,1001\"";

    ROUTE_HOME_TIMEOUT_MS = Route "home_timeout_ms", int(0, 86_400_000, "milliseconds"),
        Value("30000"), [],
        "relay: how long an instance may take to call home after it accepted; 0 is for ever";
    ROUTE_FIRST_ITEM_TIMEOUT_MS = Route "first_item_timeout_ms",
        int(0, 86_400_000, "milliseconds"), Value("0"), [],
        "relay: how long an instance may take to its first item; 0 is for ever";
    ROUTE_INACTIVITY_TIMEOUT_MS = Route "inactivity_timeout_ms",
        int(0, 86_400_000, "milliseconds"), Value("0"),
        [Alias { name: "DYN_HTTP_BACKEND_STREAM_TIMEOUT_SECS", dialect: Dialect::SecondsToMillis }],
        "relay: how long a response may pause between two items; 0 is for ever";

    ROUTE_BLOCK_TOKENS = Route "block_tokens", int(1, 4_096, "tokens"), Value("16"), [],
        "Tokens of a block of KV cache at the workers (kv_cache_block_size of their model card)";
    ROUTE_KV_BODY_BYTES_MAX = Route "kv_body_bytes_max", int(0, 65_536, "bytes"), Value("0"), [],
        "kv: bytes of a body that are looked into for token_ids; 0: bodies are left alone";
    ROUTE_KV_BLOCKS_MAX = Route "kv_blocks_max", int(1_024, 1 << 26, "blocks"), Value("1048576"),
        [],
        "kv: blocks that a core remembers, each for every worker; beyond it the oldest leaf goes";
    ROUTE_KV_RANKS_MAX = Route "kv_ranks_max", int(1, 1_024, "ranks"), Value("256"), [],
        "kv: workers that a core remembers blocks of, each data-parallel rank for itself";
    ROUTE_KV_OVERLAP_CREDIT_PCT = Route "kv_overlap_credit_pct", int(0, 1_000, "percent"),
        Value("100"), [],
        "kv: what a block in the cache takes off the blocks to be computed";
    ROUTE_KV_PREFILL_SCALE_PCT = Route "kv_prefill_scale_pct", int(0, 10_000, "percent"),
        Value("100"), [],
        "kv: what a block to be computed costs beside one that is held";
    ROUTE_KV_TEMPERATURE_PCT = Route "kv_temperature_pct", int(0, 10_000, "percent"), Value("0"),
        [],
        "kv: 0 takes the least cost; more draws by chance, the more evenly the higher it is";
    ROUTE_LOAD = Route "load", Kind::Words(LoadSource::WORDS), Value("own"), [],
        "Load of an instance: what each core gave it, or what the instance publishes as events";
    ROUTE_LOAD_STALE_MS = Route "load_stale_ms", int(100, 3_600_000, "milliseconds"),
        Value("5000"), [],
        "How long what an instance published counts; after that, what this core gave it";
    ROUTE_LOAD_REQUEST_BLOCKS = Route "load_request_blocks", int(1, 65_536, "blocks"),
        Value("32"), [],
        "Blocks that a request is taken for whose prompt is not known";

    INSTANCE_ENDPOINT = Instance "endpoint", Kind::Endpoint, Required, [],
        "Endpoint that the instance serves";
    INSTANCE_ADDRESS = Instance "address", Kind::Address, Required, [],
        "IP:PORT/PATH as discovery would give it; the path often begins with the instance id";
    INSTANCE_ID = Instance "id", Kind::Hex, Unset("the path's first part, else made from address"),
        [],
        "Instance id in hexadecimal";

    CORE_CPUS = Core "cpus", Kind::Cpus, Value("0-3"), [],
        "Data cores, one shard each; those that this machine lacks are left out";
    CORE_CPU = Core "cpu", Kind::CpuOrLast, Unset("that of nic_queue, else the file's number"), [],
        "CPU that the core of this file is pinned to";
    CORE_ROLE = Core "role", Kind::Words(Role::WORDS), Unset("data"), [],
        "data takes requests, control is the control core; every data core serves lanes";
    CORE_NUMA_NODE = Core "numa_node", int(0, 1_023, "node"),
        Unset("that of its CPU"), [],
        "Memory node that buffers and tables of the core are taken from";
    CORE_LISTEN = Core "listen", Kind::Text { bytes_max: 64 },
        Unset("[server] host and port, shared with the other cores"), [],
        "IP:PORT of this core alone, which discovery does not tell; port 0 is any";
    CORE_RING_DEPTH = Core "ring_depth", Kind::PowerOfTwo { min: 64, max: 32_768, unit: "entries" },
        Value("512"), [],
        "Entries of the submission queue of a core's io_uring";
    CORE_IDLE = Core "idle", Kind::Words(Idle::WORDS), Value("block"), [],
        "What a core does with nothing to do: block sleeps, spin polls";
    CORE_IO = Core "io", Kind::Words(Io::WORDS), Value("auto"), [],
        "auto takes io_uring where the kernel allows it, else epoll";
    CORE_NIC_QUEUE = Core "nic_queue", Kind::NicQueue, Value("none"), [],
        "Queue of a network device whose connections this core takes, such as eth0:2; see steering";
    CORE_BUSY_POLL_US = Core "busy_poll_us", int(0, 10_000, "microseconds"), Value("0"), [],
        "How long a core polls its receive queues before it sleeps; 0 leaves that to interrupts";
    CORE_CONNECTIONS_MAX = Core "connections_max", int(16, 1_000_000, "connections"),
        Value("16384"), [],
        "Sockets of one core, both sides together";
    CORE_BUFFER_BYTES = Core "buffer_bytes", int(1_024, 1 << 20, "bytes"), Value("16384"), [],
        "Size of one receive buffer";
    CORE_BUFFERS = Core "buffers", Kind::PowerOfTwo { min: 16, max: 32_768, unit: "buffers" },
        Value("4096"), [],
        "Receive buffers of one core; buffers x buffer_bytes are taken at start";
    CORE_IN_FLIGHT_MAX = Core "in_flight_max", int(1, 1 << 20, "requests"), Value("65536"), [],
        "Unanswered requests of one core; more are refused";
    CORE_UPSTREAM_QUEUE_BYTES = Core "upstream_queue_bytes", int(65_536, 1 << 30, "bytes"),
        Value("67108864"), [],
        "Bytes waiting for one instance's socket; more are refused";
    CORE_UPSTREAMS_MAX = Core "upstreams_max", int(16, 65_536, "connections"), Value("16384"), [],
        "Connections of one core to instances";
    CORE_INSTANCES_MAX = Core "instances_max", int(16, 262_144, "instances"), Value("65536"), [],
        "Instances that one core may know; more are left out";
    CORE_FLIGHT_RECORDS = Core "flight_records", int(0, 1 << 22, "records"), Value("65536"), [],
        "Last things that happened on a core, 32 bytes each, for corelane dump; 0 keeps none";

    CONTROL_CPU = Control "cpu", Kind::CpuOrLast, Value("last"), [],
        "CPU of the control core; last is the last one, free of data cores where there is one";
    CONTROL_SHARE = Control "share", Kind::Words(Switch::WORDS), Value("off"), [],
        "Whether the control core's CPU may be one of cpus as well, and run both";
    CONTROL_FLIGHT_DIR = Control "flight_dir", Kind::Path,
        Unset("the first of LOGS_DIRECTORY, which systemd sets, else nothing is written"), [],
        "Folder for the last records of a core that ends by itself, or makes no progress";
    CONTROL_LOG = Control "log", Kind::Text { bytes_max: 1_024 }, Unset("info"), [],
        "Filter of the log, as in CORELANE_LOG and DYN_LOG, which win";

    TLS_CERT = Tls "cert", Kind::Path, Unset("accept connections without TLS"),
        [same("DYN_TCP_TLS_CERT_PATH")],
        "Certificate chain (PEM file) shown to those who connect to us; switches TLS on for them";
    TLS_KEY = Tls "key", Kind::Path, Unset("accept connections without TLS"),
        [same("DYN_TCP_TLS_KEY_PATH")],
        "The key of cert (PEM file)";
    TLS_CLIENT_CA = Tls "client_ca", Kind::Path, Unset("no client certificates are asked for"),
        [same("DYN_TCP_TLS_CLIENT_CA_CERT_PATH")],
        "Authorities (PEM file) of those who connect to us: demands a certificate of them";
    TLS_CA = Tls "ca", Kind::Path, Unset("dial without TLS"), [same("DYN_TCP_TLS_CA_CERT_PATH")],
        "Authorities (PEM file) of those whom we dial; switches TLS on for our connections";
    TLS_INSECURE = Tls "insecure", Kind::Words(Switch::WORDS), Value("off"),
        [Alias { name: "DYN_TCP_TLS_INSECURE", dialect: Dialect::Truthy }],
        "on: dial with TLS and believe whoever answers; for trials only";
    TLS_CLIENT_CERT = Tls "client_cert", Kind::Path, Unset("no client certificate"),
        [same("DYN_TCP_TLS_CLIENT_CERT_PATH")],
        "Certificate chain (PEM file) that we show to those whom we dial";
    TLS_CLIENT_KEY = Tls "client_key", Kind::Path, Unset("no client certificate"),
        [same("DYN_TCP_TLS_CLIENT_KEY_PATH")],
        "The key of client_cert (PEM file)";
    TLS_SERVER_NAME = Tls "server_name", Kind::Text { bytes_max: 253 },
        Unset("the IP address that is dialled"), [same("DYN_TCP_TLS_SERVER_NAME")],
        "Name that certificates of those whom we dial must bear";
    TLS_HANDSHAKE_TIMEOUT_S = Tls "handshake_timeout_s", int(1, 600, "seconds"), Value("3"),
        [same("DYN_TCP_TLS_HANDSHAKE_TIMEOUT_SECS")],
        "How long a handshake may take";
    TLS_THREADS = Tls "threads", int(1, 64, "threads"), Value("1"), [],
        "Threads for handshakes and encryption, shared by the cores";
    TLS_KERNEL = Tls "kernel", Kind::Words(KernelTls::WORDS), Value("auto"), [],
        "Who encrypts after the handshake: auto, the kernel if it has TLS, else threads";

    DRAIN_GRACE_S = Drain "grace_s", int(0, 3_600, "seconds"), Value("5"),
        [same("DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS")],
        "After the stop signal: keep accepting so long, while callers see us leave discovery";
    DRAIN_TIMEOUT_S = Drain "timeout_s", int(0, 86_400, "seconds"), Value("900"),
        [same("DYN_RUNTIME_GRACEFUL_SHUTDOWN_TIMEOUT_SECS")],
        "After that: how long running requests may take to finish";

    GPU_DEVICES = Gpu "devices", Kind::Numbers { max: 63, unit: "devices" },
        Unset("no GPU memory service; corelane gms serves 0"), [],
        "GPUs whose memory is lent; with host memory, numbers of stand-ins";
    GPU_TAGS = Gpu "tags", Kind::Names, Value("weights,kv_cache"), [],
        "Pools of each device, each with a lock and a socket of its own";
    GPU_BACKEND = Gpu "backend", Kind::Words(GpuBackend::WORDS), Value("auto"), [],
        "auto takes the GPU's memory where there is a driver, else the host's";
    GPU_GENERATION = Gpu "generation", Kind::Words(Generation::WORDS), Value("first"), [],
        "Protocol; second is what Dynamo's --use-v1 speaks, on sockets of its own";
    GPU_SOCKET_DIR = Gpu "socket_dir", Kind::Path, Unset("the temp folder"),
        [same("GMS_SOCKET_DIR")],
        "Folder of the sockets";
    GPU_UIDS = Gpu "uids", Kind::Numbers { max: u32::MAX, unit: "user ids" },
        Unset("the user that corelane runs as"), [],
        "Users that may connect; the kernel says who does";
    GPU_CAPACITY_BYTES = Gpu "capacity_bytes", int(4_096, 1 << 50, "bytes"),
        Unset("as much as there is"), [],
        "Most host memory of one device, all its pools together";
    GPU_POPULATE_BYTES_MAX = Gpu "populate_bytes_max", int(0, 1 << 40, "bytes"),
        Value("67108864"), [],
        "Host memory up to this size gets its pages when it is made, larger when it is touched";
    GPU_CONNECTIONS_MAX = Gpu "connections_max", int(1, 65_536, "connections"), Value("4096"), [],
        "Clients at a time, all pools together";
    GPU_ALLOCATIONS_MAX = Gpu "allocations_max", int(1, 1 << 24, "allocations"),
        Value("65536"), [],
        "Allocations of one pool";
    GPU_METADATA_BYTES_MAX = Gpu "metadata_bytes_max", int(4_096, 1 << 40, "bytes"),
        Value("268435456"), [],
        "Keys and values that writers may leave in one pool";
    GPU_ALLOC_RETRY_INTERVAL_MS = Gpu "alloc_retry_interval_ms",
        int(1, 3_600_000, "milliseconds"), Value("500"), [],
        "How often memory that is short is asked for again";
    GPU_ALLOC_RETRY_TIMEOUT_MS = Gpu "alloc_retry_timeout_ms",
        int(0, 86_400_000, "milliseconds"), Value("60000"), [],
        "How long a writer waits for memory; 0 is as long as it lives";
    GPU_DURABLE_LAYOUT = Gpu "durable_layout", Kind::Words(DurableLayout::WORDS),
        Value("replace"), [],
        "What rw_or_ro does to a durable layout: replace as upstream, or keep and wait";
    GPU_SPIN_US = Gpu "spin_us", int(0, 1_000_000, "microseconds"), Value("50"), [],
        "How long the service looks for the next request before it sleeps; 0 sleeps at once";

    PLANNER_SOCKET = Planner "socket", Kind::Path, Unset("no planner is listened to"), [],
        "Unix socket that takes a planner's intervals as lines of JSON";
    PLANNER_NAMES = Planner "names", Kind::Words(PlannerNames::WORDS), Value("both"), [],
        "Names of its metrics: planner:* (seed), dynamo_planner_* (1.6.1), or both";

    EVENTS_BROKER = Events "broker", Kind::Words(Switch::WORDS), Value("off"), [],
        "Whether events are taken from publishers and passed on to subscribers, by ZMQ";
    EVENTS_NAMESPACE = Events "namespace", Kind::Text { bytes_max: 256 }, Value("dynamo"),
        [same("ZMQ_BROKER_NAMESPACE")],
        "Namespace whose publishers and subscribers find the broker in discovery";
    EVENTS_XSUB = Events "xsub", Kind::Text { bytes_max: 64 }, Unset("[server] host, port 5555"),
        [same("ZMQ_BROKER_XSUB_BIND")],
        "Where publishers connect: tcp://IP:PORT; port 0 is any";
    EVENTS_XPUB = Events "xpub", Kind::Text { bytes_max: 64 }, Unset("[server] host, port 5556"),
        [same("ZMQ_BROKER_XPUB_BIND")],
        "Where subscribers connect: tcp://IP:PORT; port 0 is any";
    EVENTS_TCP = Events "tcp", Kind::Text { bytes_max: 64 }, Unset("no plain TCP"), [],
        "Where publishers and subscribers without ZMTP connect: tcp://IP:PORT; port 0 is any";
    EVENTS_CPU = Events "cpu", Kind::CpuOrLast, Unset("that of the control core"), [],
        "CPU that the thread of the broker is pinned to";
    EVENTS_IDLE = Events "idle", Kind::Words(Idle::WORDS), Value("block"), [],
        "What that thread does with nothing to do";
    EVENTS_BRIDGE = Events "bridge", Kind::Words(Bridge::WORDS), Value("off"), [],
        "What the broker exchanges events with: NATS, another ZMQ broker, both, or nothing";
    EVENTS_BRIDGE_XSUB = Events "bridge_xsub", Kind::Text { bytes_max: 64 },
        Unset("no other broker"), [],
        "Where the other broker takes events: tcp://IP:PORT";
    EVENTS_BRIDGE_XPUB = Events "bridge_xpub", Kind::Text { bytes_max: 64 },
        Unset("no other broker"), [],
        "Where the other broker gives events: tcp://IP:PORT";
    EVENTS_BRIDGE_NAMESPACE = Events "bridge_namespace", Kind::Text { bytes_max: 256 },
        Unset("all namespaces"), [],
        "The one namespace whose events are exchanged";
    EVENTS_BRIDGE_SIDE = Events "bridge_side", Kind::Text { bytes_max: 256 },
        Unset("nobody shares them"), [],
        "Name of our own peers, if they connect to other brokers of the same name as well";
    EVENTS_CURVE_SECRET_KEY_FILE = Events "curve_secret_key_file", Kind::Path,
        Unset("peers connect without CURVE"), [],
        "File with our secret key (corelane events keys); with it xsub and xpub want CURVE";
    EVENTS_CURVE_ALLOWED_KEYS = Events "curve_allowed_keys", Kind::Text { bytes_max: 4_096 },
        Unset("whoever knows our public key"), [],
        "Public keys of peers that are let in: a list, or a file with one at the start of a line";
    EVENTS_CURVE_SERVER_KEY = Events "curve_server_key", Kind::Text { bytes_max: 40 },
        Unset("whom we dial is dialled without CURVE"), [],
        "Public key of those whom we dial: the other broker, and publishers of events";
    EVENTS_CURVE_XSUB = Events "curve_xsub", Kind::Text { bytes_max: 64 },
        Unset("xsub wants CURVE itself"), [],
        "Where publishers with CURVE connect, beside xsub for those without: tcp://IP:PORT";
    EVENTS_CURVE_XPUB = Events "curve_xpub", Kind::Text { bytes_max: 64 },
        Unset("xpub wants CURVE itself"), [],
        "Where subscribers with CURVE connect, beside xpub for those without: tcp://IP:PORT";
    EVENTS_OVERFLOW = Events "overflow", Kind::Words(Overflow::WORDS), Value("drop_newest"), [],
        "What happens to an event that a subscriber's queue has no room for";
    EVENTS_QUEUE_EVENTS_MAX = Events "queue_events_max", int(1, 1 << 24, "events"),
        Value("100000"), [],
        "Events that wait for one subscriber, at most";
    EVENTS_QUEUE_BYTES_MAX = Events "queue_bytes_max", int(65_536, 1 << 31, "bytes"),
        Value("67108864"), [],
        "Bytes of them, at most";
    EVENTS_MEMORY_BYTES_MAX = Events "memory_bytes_max", int(1 << 20, 1 << 40, "bytes"),
        Value("536870912"), [],
        "Bytes that wait for all subscribers; beyond it each may have 1 MiB waiting, no more";
    EVENTS_EVENT_BYTES_MAX = Events "event_bytes_max", int(1_024, 1 << 28, "bytes"),
        Value("8388608"), [],
        "Largest event; a publisher that declares a larger one is disconnected";
    EVENTS_SESSIONS_MAX = Events "sessions_max", int(16, 65_536, "sessions"), Value("4096"), [],
        "Publishers and subscribers at a time";
    EVENTS_SUBSCRIPTIONS_MAX = Events "subscriptions_max", int(1, 1 << 24, "subscriptions"),
        Value("65536"), [],
        "Prefixes that all subscribers ask for, added up";
    EVENTS_BUFFERS = Events "buffers",
        Kind::PowerOfTwo { min: 16, max: 32_768, unit: "buffers" }, Value("2048"), [],
        "Receive buffers, which events are also sent from";
    EVENTS_BUFFER_BYTES = Events "buffer_bytes", int(4_096, 1 << 20, "bytes"), Value("32768"), [],
        "Size of each";

    RELOAD_WATCH_MS = Reload "watch_ms", int(0, 600_000, "milliseconds"), Value("2000"), [],
        "How long one core is watched with a changed configuration before the others get it";
    RELOAD_FAILURES_PCT = Reload "failures_pct", int(0, 100, "percent"), Value("1"), [],
        "Failed requests of that core, beyond what the others have, at which it is taken back";
    RELOAD_TAKEN_TIMEOUT_S = Reload "taken_timeout_s", int(1, 600, "seconds"), Value("10"), [],
        "How long a core may take to take it over, or stand still, before it is taken back";
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_name_is_used_once() {
        let mut paths = HashSet::new();
        let mut names = HashSet::new();
        for key in keys() {
            assert!(paths.insert(key.path()), "{} twice", key.path());
            assert!(find(&key.path()) == Some(key));
            let own = key.env().into_iter();
            for name in own.chain(key.aliases.iter().map(|alias| alias.name.to_owned())) {
                assert!(names.insert(name.clone()), "{name} twice");
            }
        }
        for section in Section::ALL {
            assert!(of(section).count() > 0, "{} has no key", section.header());
        }
    }

    #[test]
    fn every_default_passes_its_own_check() {
        for key in keys() {
            if let Value(text) = key.fallback {
                let read = key.kind.read_text(key, text);
                assert!(read.is_ok(), "{}: {:?}", key.path(), read);
            }
        }
    }

    #[test]
    fn every_key_says_one_line() {
        for key in keys() {
            assert!(key.doc.len() > 10 && key.doc.len() < 100, "{}", key.path());
            assert!(
                !key.doc.contains('\n') && !key.doc.ends_with('.'),
                "{}",
                key.path()
            );
        }
    }

    #[test]
    fn own_variable_names() {
        assert_eq!(CORE_IO.env().as_deref(), Some("CORELANE_IO"));
        assert_eq!(SERVER_PORT.env().as_deref(), Some("CORELANE_SERVER_PORT"));
        assert_eq!(ROUTE_LISTEN.env(), None);
    }
}
