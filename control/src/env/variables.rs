//! Every variable that is not simply another name of a key: one line each, and one constant for
//! each part of the program, so that a part that comes is switched on in one place.
//!
//! Names and Dynamo's defaults: `spec/request-plane.md` §13, `spec/events-discovery.md` §13,
//! `spec/gpu-memory.md` §2.4.

use super::table::Standing::{self, Elsewhere, Honoured, NotHonoured};
use super::table::Variable;

// The parts that are not here, or not as Dynamo has them. `Honoured` in its place switches a
// part's variables on.

const NATS: Standing = Honoured;
const EVENTS: Standing = Honoured;
const KUBERNETES: Standing = NotHonoured("Kubernetes discovery is not in this version");
const OTEL: Standing = match cfg!(feature = "otel") {
    true => Honoured,
    false => NotHonoured("this program was built without the feature otel"),
};
const OTEL_METRICS: Standing = NotHonoured("metrics are not pushed; scrape /metrics");
const LIFECYCLE: Standing = NotHonoured("the spans of a request's life cycle are not made here");
// Programs written against `corelane::component` are workers and clients, and honour what a router
// has no use for.
const ADMISSION: Standing = NotHonoured(
    "a router queues nothing, [core] in_flight_max bounds its requests; workers written against \
     corelane::component honour it",
);
const CANARY: Standing = NotHonoured(
    "a router has no engine to check; workers written against corelane::component honour it",
);
const CALLS: Standing = NotHonoured(
    "a router has times of its own; clients written against corelane::component honour it",
);
const HOME: Standing = NotHonoured("the backlog of every listener is 4096");
const POOL: Standing =
    NotHonoured("one connection goes to each instance; its bounds are in [core]");
const THREADS: Standing = NotHonoured(NO_THREADS);
const NO_THREADS: &str = "there is no thread pool: each data core runs one shard";

const ENGINE: Standing = Elsewhere("the engine's GPU memory worker");
const FRONTEND: Standing = Elsewhere("Dynamo's HTTP frontend");
const KV_ROUTER: Standing = Elsewhere("Dynamo's KV router");

macro_rules! variables {
    ($($group:literal { $($name:literal, $default:literal, $unit:literal, $standing:expr,
        $effect:literal;)* })*) => {
        &[$($(Variable {
            name: $name,
            group: $group,
            default: $default,
            unit: $unit,
            standing: $standing,
            effect: $effect,
        },)*)*]
    };
}

/// The rows, by what they belong to.
pub const VARIABLES: &[Variable] = variables! {
    "program" {
        "CORELANE_CONFIG", "corelane.toml", "path", Honoured, "names the configuration file";
        "DYN_REQUEST_PLANE_CODEC", "msgpack", "json or msgpack", Honoured,
            "is the default of worker echo --codec";
        "CUDA_VISIBLE_DEVICES", "unset", "device list", Honoured,
            "makes device_type of our records cpu when empty, -1, none or void";
        "NVIDIA_VISIBLE_DEVICES", "unset", "device list", Honoured,
            "makes device_type of our records cpu when none or void";
    }
    "service manager" {
        "NOTIFY_SOCKET", "unset", "path, or @ and a name", Honoured,
            "names the socket at which a service manager is told how a router is";
        "WATCHDOG_USEC", "unset", "microseconds", Honoured,
            "is how long the manager waits for a sign of life; at least 2000000";
        "WATCHDOG_PID", "this process", "number", Honoured, "is the process that this is meant for";
        "LISTEN_FDS", "0", "sockets", Honoured,
            "is how many listening sockets are handed to a router, from descriptor 3 on";
        "LISTEN_PID", "this process", "number", Honoured, "is the process that this is meant for";
        "LISTEN_FDNAMES", "requests", "names between colons", Honoured,
            "says what each is for: requests or status";
        "LOGS_DIRECTORY", "unset", "paths between colons", Honoured,
            "is where flight records go when [control] flight_dir is not set";
    }
    "request plane" {
        "DYN_REQUEST_PLANE", "tcp", "tcp or nats", Honoured,
            "is the transport of requests to our endpoints";
        "DYN_TOKEN_IDS_AS_BYTES", "off", "switch",
            NotHonoured("payloads are passed on unread"),
            "writes token_ids of a request as one blob of int32";
        "DYN_TCP_CONNECT_TIMEOUT", "5", "seconds",
            NotHonoured("connects have a bound of their own"), "bounds a connect to an instance";
        "DYN_TCP_POOL_SIZE", "100", "connections", POOL, "bounds connections to one host";
        "DYN_TCP_CHANNEL_BUFFER", "1024", "requests", POOL,
            "bounds unacknowledged requests of a connection";
        "DYN_TCP_GLOBAL_CONNECT_LIMIT", "64", "connects", POOL, "bounds connects at once";
        "DYN_TCP_HOST_IDLE_TTL_SECS", "300", "seconds", POOL,
            "drops connections to a host that nobody uses";
        "DYN_TCP_LATENCY_TRACE", "off", "switch",
            NotHonoured("there is no such timing log; see /metrics"), "logs times of each write";
        "DYN_TCP_SHRINK_MESSAGE_SIZE", "8388608", "bytes",
            NotHonoured("receive buffers have one size, [core] buffer_bytes"),
            "shrinks read buffers above this";
        "DYN_RUNTIME_INHIBITED_DURATION_SECS", "5", "seconds",
            CALLS, "keeps an instance that failed out of use so long";
        "DYN_ENCODER_CUDA_TO_CPU_RATIO", "8", "ratio",
            CALLS, "weighs instances with a GPU against those without";
    }
    "admission" {
        "DYN_TCP_WORKER_POOL_SIZE", "10000", "requests", ADMISSION,
            "bounds requests in handlers at the same time";
        "DYN_TCP_WORK_QUEUE_SIZE", "40000", "requests", ADMISSION,
            "bounds requests that wait for a handler";
        "DYN_ENGINE_REQUEST_LIMIT", "unset", "requests", ADMISSION,
            "bounds requests in the engine, over the two above";
        "DYN_DYNAMO_REQUEST_QUEUE_LIMIT", "16", "requests", ADMISSION,
            "bounds requests that wait, beside DYN_ENGINE_REQUEST_LIMIT";
        "DYN_HTTP_OVERLOAD_STATUS_CODE", "503", "HTTP status", FRONTEND,
            "is the frontend's answer when workers are overloaded";
    }
    "response plane" {
        "DYN_TCP_LISTEN_BACKLOG", "4096", "connections", HOME, "is the backlog of that listener";
    }
    "NATS" {
        "NATS_SERVER", "nats://localhost:4222", "URL", NATS, "is the NATS server";
        "NATS_STARTUP_CONNECT_TIMEOUT_SECONDS", "120", "seconds", NATS,
            "is how long it is tried at start";
        "NATS_AUTH_USERNAME", "user", "text", NATS, "is the user there";
        "NATS_AUTH_PASSWORD", "user", "text", NATS, "is the password there";
        "NATS_AUTH_TOKEN", "unset", "text", NATS, "is a token instead";
        "NATS_AUTH_NKEY", "unset", "text", NATS, "is an nkey seed instead";
        "NATS_AUTH_CREDENTIALS_FILE", "unset", "path", NATS, "names a credentials file instead";
        "NATS_TLS_CA_CERT_PATH", "unset", "path", NATS, "names the server's authority";
        "NATS_TLS_CLIENT_CERT_PATH", "unset", "path", NATS, "names our certificate there";
        "NATS_TLS_CLIENT_KEY_PATH", "unset", "path", NATS, "names its key";
        "NATS_TLS_INSECURE", "off", "switch", NATS, "trusts every certificate";
        "DYN_NATS_REQUEST_TIMEOUT_SECS", "10", "seconds", NATS, "bounds a request over NATS";
        "DYN_NATS_STREAM_MAX_AGE", "3600", "seconds",
            NotHonoured("a router has no work queues"), "is how long streams keep messages";
    }
    "event plane" {
        "DYN_EVENT_PLANE", "zmq", "zmq, nats or none", EVENTS, "is the transport of events";
        "DYN_EVENT_PLANE_CODEC", "unused", "json or msgpack",
            NotHonoured("it does nothing in Dynamo either"), "does nothing";
        "DYN_EVENT_PLANE_HOST", "auto", "IP address or network interface", EVENTS,
            "is advertised to subscribers";
        "DYN_ZMQ_EVENT_SUBSCRIBER_CHANNEL_CAPACITY", "100000", "events", EVENTS,
            "bounds events that wait";
        "DYN_ZMQ_IO_THREADS", "4", "threads",
            NotHonoured("one thread moves all events of a process"),
            "are the I/O threads of ZMQ";
        "DYN_ZMQ_BROKER_URL", "unset", "URL", EVENTS, "names a broker between both sides";
        "DYN_ZMQ_BROKER_ENABLED", "off", "switch", EVENTS, "looks that broker up in discovery";
        "DYN_ROUTER_ZMQ_ENDPOINTS_PER_SUB", "1", "endpoints", KV_ROUTER,
            "groups publishers into one socket";
    }
    "discovery" {
        "DYN_KUBE_DISCOVERY_MODE", "pod", "pod or container", KUBERNETES,
            "is what an instance is named after";
        "POD_NAME", "unset", "name", KUBERNETES, "is the pod's name";
        "POD_UID", "unset", "text", KUBERNETES, "is the pod's uid";
        "POD_NAMESPACE", "default", "name", KUBERNETES, "is the pod's namespace";
        "CONTAINER_NAME", "unset", "name", KUBERNETES,
            "is the container's name, in mode container";
        "DYN_NAMESPACE_PREFIX_STRICT", "off", "switch",
            NotHonoured("routes name their endpoints in full"),
            "makes a prefix of namespaces match one generation of workers";
    }
    "health" {
        "DYN_SYSTEM_HEALTH_PATH", "/health", "path of a URL", Honoured,
            "is the path of /health";
        "DYN_SYSTEM_LIVE_PATH", "/live", "path of a URL", Honoured, "is the path of /live";
        "DYN_SYSTEM_STARTING_HEALTH_STATUS", "notready", "ready or notready", Honoured,
            "is what a worker without endpoints says of itself; a router has its routes";
        "DYN_SYSTEM_USE_ENDPOINT_HEALTH_STATUS", "[]", "JSON list of names", Honoured,
            "names the endpoints of a worker that decide, as [\"generate\"]";
        "DYN_SYSTEM_ENABLED", "ignored", "switch",
            NotHonoured("[server] status_port = -1 switches the status server off"),
            "does nothing";
        "DYN_HEALTH_CHECK_ENABLED", "off", "switch", CANARY,
            "sends a health check to each endpoint that has one";
        "DYN_CANARY_WAIT_TIME", "10", "seconds", CANARY,
            "is how long an endpoint must be idle before it is checked";
        "DYN_HEALTH_CHECK_REQUEST_TIMEOUT", "3", "seconds", CANARY, "bounds a health check";
        "DYN_LORA_ENABLED", "off", "switch", NotHonoured("there is no engine here to load into"),
            "opens /v1/loras";
    }
    "runtime" {
        "DYN_WORKER_GRACEFUL_SHUTDOWN_TIMEOUT", "30", "seconds",
            NotHonoured(
                "[drain] holds the times of a stop; programs written against corelane::component \
                 honour it",
            ),
            "is how long the application may take to end";
        "DYN_RUNTIME_NUM_WORKER_THREADS", "cores", "threads", THREADS, "sizes a thread pool";
        "DYN_RUNTIME_MAX_BLOCKING_THREADS", "cores", "threads", THREADS, "sizes a thread pool";
        "DYN_COMPUTE_THREADS", "half the cores", "threads", THREADS, "sizes a thread pool";
        "DYN_COMPUTE_STACK_SIZE", "2097152", "bytes", THREADS, "is the stack of its threads";
        "DYN_COMPUTE_THREAD_PREFIX", "compute", "text", THREADS, "names its threads";
        "DYN_ENABLE_POLL_HISTOGRAM", "off", "switch", THREADS, "measures polls of tokio";
    }
    "log" {
        "CORELANE_LOG", "info", "directives", Honoured, "filters the log, and wins over DYN_LOG";
        "DYN_LOG", "info", "directives", Honoured, "filters the log";
        "DYN_LOGGING_CONFIG_PATH", "unset", "path", Honoured,
            "names a TOML file with log_level and log_filters";
        "DYN_LOGGING_CONSOLE_FORMAT", "readable", "readable or jsonl", Honoured,
            "is the form of log lines: readable or jsonl";
        "DYN_LOGGING_JSONL", "off", "switch", Honoured, "makes log lines JSON when on";
        "DYN_SDK_DISABLE_ANSI_LOGGING", "off", "switch", Honoured, "switches colours off when on";
        "NO_COLOR", "unset", "any", Honoured, "switches colours off when set";
        "DYN_LOG_USE_LOCAL_TZ", "off", "switch", Honoured, "writes local time instead of UTC";
        "DYN_LOGGING_SPAN_EVENTS", "off", "switch", Honoured,
            "writes a line when the span of a request ends, if lines are JSON";
    }
    "tracing" {
        "OTEL_EXPORT_ENABLED", "off", "switch", OTEL, "exports spans and log lines over OTLP";
        "OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "grpc or http/protobuf", OTEL,
            "is the protocol of the export";
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "as above", "grpc or http/protobuf", OTEL,
            "is the same for spans, and wins";
        "OTEL_EXPORTER_OTLP_LOGS_PROTOCOL", "as above", "grpc or http/protobuf", OTEL,
            "is the same for log lines, and wins";
        "OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4317, or :4318 for http/protobuf", "URL",
            OTEL, "is the collector; over HTTP, /v1/traces and /v1/logs are appended";
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "from the above", "URL", OTEL,
            "is where spans go, as it is";
        "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "from the above", "URL", OTEL,
            "is where log lines go, as it is";
        "OTEL_EXPORTER_OTLP_HEADERS", "unset", "k=v,k=v", OTEL, "goes with each export";
        "OTEL_EXPORTER_OTLP_TRACES_HEADERS", "as above", "k=v,k=v", OTEL,
            "goes with spans instead";
        "OTEL_EXPORTER_OTLP_LOGS_HEADERS", "as above", "k=v,k=v", OTEL,
            "goes with log lines instead";
        "OTEL_TRACES_SAMPLE_RATIO", "1", "0 to 1", Honoured,
            "is the part of new traces that is kept";
        "OTEL_SERVICE_NAME", "dynamo", "text", OTEL, "is service.name of what is exported";
        "DYN_LIFECYCLE_TRACE_ENABLED", "off", "switch", LIFECYCLE,
            "adds spans for the steps of a request";
        "DYN_LIFECYCLE_TRACE_MODE", "core", "core or investigation", LIFECYCLE,
            "is how much they say";
        "HOSTNAME", "unset", "name", LIFECYCLE, "is dynamo.instance.id of those spans";
        "OTEL_EXPORTER_OTLP_*", "", "any", NotHonoured("only the variables listed are read"),
            "is OpenTelemetry's";
    }
    "metrics" {
        "OTEL_METRICS_EXPORTER", "none", "none or otlp", OTEL_METRICS, "pushes metrics over OTLP";
        "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "grpc", "grpc", OTEL_METRICS, "is how";
        "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "http://localhost:4317", "URL", OTEL_METRICS,
            "is where to";
        "OTEL_EXPORTER_OTLP_METRICS_HEADERS", "unset", "k=v,k=v", OTEL_METRICS, "goes with them";
        "OTEL_METRIC_EXPORT_INTERVAL", "60000", "milliseconds", OTEL_METRICS, "is how often";
        "OTEL_RESOURCE_ATTRIBUTES", "unset", "k=v,k=v", OTEL_METRICS, "goes with them";
        "DYN_METRICS_PREFIX", "dynamo_frontend", "text", FRONTEND,
            "begins the names of the frontend's metrics";
    }
    "GPU memory" {
        "FAILOVER_LOCK_PATH", "/shared/failover.lock", "path", ENGINE,
            "is the lock of engines that stand in for each other";
        "ENGINE_ID", "unset", "number", ENGINE, "makes engine 0 the one that writes";
        "DYN_VLLM_GMS_SHADOW_MODE", "off", "switch", ENGINE, "makes an engine a shadow";
        "DYN_GMS_SCRATCH_KV_ENABLED", "off", "switch", ENGINE,
            "begins the KV cache on scratch memory";
        "DYN_GMS_PERSIST_KV", "off", "switch", ENGINE, "keeps the KV cache across restarts";
        "DYN_GMS_USE_V1", "off", "switch", ENGINE, "makes engines speak the other profile";
        "DYN_GMS_VLLM_LOG_LEVEL", "unset", "level", ENGINE, "is the level of its log";
        "DYN_GMS_VMM_GRANULARITY", "unset", "bytes", ENGINE, "is read by nobody";
    }
};
