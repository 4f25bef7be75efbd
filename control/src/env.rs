//! The environment: what is set of ours and of Dynamo's, which of it takes effect, and what we say
//! about the rest. One table, together with the names in the table of configuration keys.

use std::collections::BTreeMap;
use std::fmt;

use crate::config::{self, Origin, Problem, nearest};

/// Prefixes of the names that we look at.
const FAMILIES: [&str; 5] = ["CORELANE_", "DYN_", "ETCD_", "NATS_", "OTEL_"];

/// The variables that matter to us, read once.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Env {
    values: BTreeMap<String, String>,
}

impl Env {
    /// The environment of this process. Bytes that are not UTF-8 are replaced.
    pub fn current() -> Self {
        let text = |os: std::ffi::OsString| os.to_string_lossy().into_owned();
        Self::of(std::env::vars_os().map(|(name, value)| (text(name), text(value))))
    }

    /// An environment of these variables.
    pub fn of(pairs: impl IntoIterator<Item = (String, String)>) -> Self {
        let ours = |name: &str| {
            name == "NO_COLOR" || FAMILIES.iter().any(|family| name.starts_with(family))
        };
        Self {
            values: pairs.into_iter().filter(|(name, _)| ours(name)).collect(),
        }
    }

    /// A value; an empty one counts as not set.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.values
            .get(name)
            .map(String::as_str)
            .filter(|value| !value.trim().is_empty())
    }

    /// Whether a switch is on: 1, true, on or yes (`spec/request-plane.md` §13).
    pub fn is_on(&self, name: &str) -> bool {
        self.get(name).is_some_and(is_truthy)
    }

    fn set(&self) -> impl Iterator<Item = (&str, &str)> {
        self.values
            .keys()
            .filter_map(|name| Some((name.as_str(), self.get(name)?)))
    }
}

/// Whether a word means yes, as Dynamo reads it.
pub(crate) fn is_truthy(text: &str) -> bool {
    let text = text.trim().to_ascii_lowercase();
    matches!(text.as_str(), "1" | "true" | "on" | "yes")
}

/// What a variable does here.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Standing {
    /// It has this effect, besides those that set a key of the configuration.
    Effect(&'static str),
    /// We know it and do not honour it, for this reason.
    NotHonoured(&'static str),
    /// Only one value can be had in this version; any other stops us, for this reason.
    Only(&'static str, &'static str),
    /// To ignore it would be dangerous, so it stops us, for this reason.
    Refused(&'static str),
}

/// A variable of Dynamo's, or of ours beside the configuration. A name that ends in `*` stands
/// for all that begin so.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Variable {
    /// Its name.
    pub name: &'static str,
    /// What it does.
    pub standing: Standing,
}

macro_rules! variables {
    ($($standing:expr => [$($name:literal),+ $(,)?];)*) => {
        &[$($(Variable { name: $name, standing: $standing },)+)*]
    };
}

use Standing::{Effect, NotHonoured, Only, Refused};

const NATS: &str = "there is no NATS in this version";
const EVENTS: &str = "there is no event plane in this version";
const OTEL: &str = "nothing is exported over OpenTelemetry in this version";
const POOL: &str = "one connection goes to each instance; its bounds are in [core]";
const THREADS: &str = "there is no thread pool: each data core runs one shard";
const HEALTH: &str = "a router has no engine that could be probed";
const KUBE: &str = "Kubernetes discovery is not in this version";

/// Every variable that is not simply another name of a key. Names: `spec/request-plane.md` §13,
/// `spec/events-discovery.md` §13.
pub const VARIABLES: &[Variable] = variables! {
    Effect("names the configuration file") => ["CORELANE_CONFIG"];
    Effect("filters the log, and wins over DYN_LOG") => ["CORELANE_LOG"];
    Effect("filters the log") => ["DYN_LOG"];
    Effect("makes log lines JSON when on") => ["DYN_LOGGING_JSONL"];
    Effect("is the form of log lines: readable or jsonl") => ["DYN_LOGGING_CONSOLE_FORMAT"];
    Effect("switches colours off when on") => ["DYN_SDK_DISABLE_ANSI_LOGGING"];
    Effect("is the default of worker echo --codec") => ["DYN_REQUEST_PLANE_CODEC"];

    Only("tcp", "the request plane is TCP in this version") => ["DYN_REQUEST_PLANE"];
    Only("tcp", "the response plane is TCP in this version") => ["DYN_RESPONSE_PLANE"];

    NotHonoured(NATS) => [
        "NATS_SERVER", "NATS_STARTUP_CONNECT_TIMEOUT_SECONDS", "NATS_AUTH_USERNAME",
        "NATS_AUTH_PASSWORD", "NATS_AUTH_TOKEN", "NATS_AUTH_NKEY", "NATS_AUTH_CREDENTIALS_FILE",
        "NATS_TLS_CA_CERT_PATH", "NATS_TLS_CLIENT_CERT_PATH", "NATS_TLS_CLIENT_KEY_PATH",
        "NATS_TLS_INSECURE", "DYN_NATS_REQUEST_TIMEOUT_SECS", "DYN_NATS_STREAM_MAX_AGE",
    ];
    NotHonoured(EVENTS) => [
        "DYN_EVENT_PLANE", "DYN_EVENT_PLANE_CODEC", "DYN_EVENT_PLANE_HOST",
        "DYN_ZMQ_EVENT_SUBSCRIBER_CHANNEL_CAPACITY", "DYN_ZMQ_IO_THREADS",
        "DYN_ROUTER_ZMQ_ENDPOINTS_PER_SUB", "DYN_ZMQ_BROKER_URL", "DYN_ZMQ_BROKER_ENABLED",
    ];
    NotHonoured(OTEL) => [
        "OTEL_EXPORT_ENABLED", "OTEL_EXPORTER_OTLP_*", "OTEL_TRACES_SAMPLE_RATIO",
        "OTEL_SERVICE_NAME", "OTEL_METRICS_EXPORTER", "OTEL_METRIC_EXPORT_INTERVAL",
        "OTEL_RESOURCE_ATTRIBUTES", "DYN_LIFECYCLE_TRACE_ENABLED", "DYN_LIFECYCLE_TRACE_MODE",
    ];
    NotHonoured(POOL) => [
        "DYN_TCP_POOL_SIZE", "DYN_TCP_CHANNEL_BUFFER", "DYN_TCP_GLOBAL_CONNECT_LIMIT",
        "DYN_TCP_HOST_IDLE_TTL_SECS",
    ];
    NotHonoured(THREADS) => [
        "DYN_RUNTIME_NUM_WORKER_THREADS", "DYN_RUNTIME_MAX_BLOCKING_THREADS",
        "DYN_COMPUTE_THREADS", "DYN_COMPUTE_STACK_SIZE", "DYN_COMPUTE_THREAD_PREFIX",
        "DYN_ENABLE_POLL_HISTOGRAM", "DYN_TCP_WORKER_POOL_SIZE",
    ];
    NotHonoured("[core] in_flight_max bounds the requests of a core; nothing is queued") => [
        "DYN_TCP_WORK_QUEUE_SIZE", "DYN_ENGINE_REQUEST_LIMIT", "DYN_DYNAMO_REQUEST_QUEUE_LIMIT",
    ];
    NotHonoured("connects have a bound of their own") => ["DYN_TCP_CONNECT_TIMEOUT"];
    NotHonoured("receive buffers have one size, [core] buffer_bytes") => [
        "DYN_TCP_SHRINK_MESSAGE_SIZE",
    ];
    NotHonoured("responses do not pass through the router: the worker dials the caller") => [
        "DYN_TCP_RESPONSE_STREAM_HOST", "DYN_TCP_RESPONSE_STREAM_PORT",
        "DYN_TCP_LISTEN_BACKLOG", "DYN_QUIC_RESPONSE_BATCH_INTERVAL_US",
        "DYN_QUIC_RESPONSE_BUFFER_CAPACITY", "DYN_HTTP_BACKEND_STREAM_TIMEOUT_SECS",
    ];
    NotHonoured("there is no such timing log; see /metrics") => ["DYN_TCP_LATENCY_TRACE"];
    NotHonoured("payloads are passed on unread") => ["DYN_TOKEN_IDS_AS_BYTES"];
    NotHonoured("an instance that failed is tried again after a time of its own") => [
        "DYN_RUNTIME_INHIBITED_DURATION_SECS",
    ];
    NotHonoured("there is no policy by device in this version") => [
        "DYN_ENCODER_CUDA_TO_CPU_RATIO",
    ];
    NotHonoured(KUBE) => ["DYN_KUBE_DISCOVERY_MODE"];
    NotHonoured("routes name their endpoints in full") => ["DYN_NAMESPACE_PREFIX_STRICT"];
    NotHonoured("the paths are /health and /live") => [
        "DYN_SYSTEM_HEALTH_PATH", "DYN_SYSTEM_LIVE_PATH",
    ];
    NotHonoured("[server] status_port = -1 switches the status server off") => [
        "DYN_SYSTEM_ENABLED",
    ];
    NotHonoured(HEALTH) => [
        "DYN_SYSTEM_STARTING_HEALTH_STATUS", "DYN_SYSTEM_USE_ENDPOINT_HEALTH_STATUS",
        "DYN_HEALTH_CHECK_ENABLED", "DYN_HEALTH_CHECK_REQUEST_TIMEOUT", "DYN_CANARY_WAIT_TIME",
        "DYN_LORA_ENABLED",
    ];
    NotHonoured("[drain] holds the times of a stop") => ["DYN_WORKER_GRACEFUL_SHUTDOWN_TIMEOUT"];
    NotHonoured("the log is set by CORELANE_LOG or DYN_LOG") => [
        "DYN_LOGGING_CONFIG_PATH", "DYN_LOGGING_SPAN_EVENTS",
    ];
    NotHonoured("log times are UTC") => ["DYN_LOG_USE_LOCAL_TZ"];
    NotHonoured("metrics keep the names that are listed at /metrics") => ["DYN_METRICS_PREFIX"];
};

/// How loud a line of the report is.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Level {
    /// It takes effect.
    Info,
    /// It does not, or nobody knows it.
    Warn,
}

/// One line of the report.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Notice {
    /// How loud.
    pub level: Level,
    /// The variable.
    pub name: String,
    /// What is to be said.
    pub text: String,
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "environment {}: {}", self.name, self.text)
    }
}

/// A line for each variable of the families that is set. Values are not shown: some are secrets.
pub fn report(env: &Env) -> Vec<Notice> {
    let ours = env
        .set()
        .filter(|(name, value)| *name != "NO_COLOR" && !is_link(name, value));
    ours.map(|(name, value)| notice(env, name, value)).collect()
}

fn notice(env: &Env, name: &str, value: &str) -> Notice {
    let line = |level, text| Notice {
        level,
        name: name.to_owned(),
        text,
    };
    if let Some((key, own)) = key_of(name) {
        let sets = format!("sets {} of {}", key.name, key.section.header());
        return match key.env().filter(|winner| !own && env.get(winner).is_some()) {
            Some(winner) => line(Level::Warn, format!("{sets}, but {winner} wins")),
            None => line(Level::Info, sets),
        };
    }
    match variable(name).map(|variable| variable.standing) {
        Some(Effect(effect)) => line(Level::Info, effect.to_owned()),
        Some(Only(only, _)) if value.trim().eq_ignore_ascii_case(only) => {
            line(Level::Info, format!("is {only}, as always"))
        }
        Some(NotHonoured(reason) | Only(_, reason) | Refused(reason)) => {
            line(Level::Warn, format!("is not honoured: {reason}"))
        }
        None => {
            let known = config::keys()
                .iter()
                .flat_map(|key| names(key))
                .collect::<Vec<_>>();
            let known = known.iter().map(String::as_str);
            let known = known.chain(VARIABLES.iter().map(|variable| variable.name));
            line(
                Level::Warn,
                match nearest(name, known) {
                    Some(near) => format!("is not known and does nothing; did you mean {near}?"),
                    None => "is not known and does nothing".to_owned(),
                },
            )
        }
    }
}

/// The variables that stop a router: what they ask for cannot be had, and to go on without it
/// would break or endanger what the user has.
pub fn refusals(env: &Env) -> Vec<Problem> {
    let refusal =
        |(name, value): (&str, &str)| {
            let at = || Origin::Env {
                name: name.to_owned(),
            };
            match variable(name)?.standing {
                Refused(reason) => Some(Problem::error(at(), reason, "unset it to go on without")),
                Only(only, reason) if !value.trim().eq_ignore_ascii_case(only) => Some(
                    Problem::error(at(), reason, format!("write {only}, or unset it")),
                ),
                _ => None,
            }
        };
    env.set().filter_map(refusal).collect()
}

/// The key that a name sets, and whether it is our own name for it.
fn key_of(name: &str) -> Option<(&'static config::Key, bool)> {
    config::keys().iter().find_map(|key| {
        let own = key.env().is_some_and(|own| own == name);
        let other = key.aliases.iter().any(|alias| alias.name == name);
        (own || other).then_some((*key, own))
    })
}

fn names(key: &'static config::Key) -> Vec<String> {
    let aliases = key.aliases.iter().map(|alias| alias.name.to_owned());
    key.env().into_iter().chain(aliases).collect()
}

fn variable(name: &str) -> Option<&'static Variable> {
    VARIABLES
        .iter()
        .find(|variable| match variable.name.strip_suffix('*') {
            Some(prefix) => name.starts_with(prefix),
            None => variable.name == name,
        })
}

/// Whether Kubernetes wrote this for a service that happens to be called etcd, nats, corelane ...
/// Nobody set it, so nobody is to be told. A name that sets a key is never let go this way.
fn is_link(name: &str, value: &str) -> bool {
    let numbered = name
        .split("_PORT_")
        .skip(1)
        .any(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
    let shaped = name.ends_with("_SERVICE_HOST")
        || name.contains("_SERVICE_PORT")
        || numbered
        || (name.ends_with("_PORT") && value.contains("://"));
    shaped && key_of(name).is_none() && variable(name).is_none()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn env(pairs: &[(&str, &str)]) -> Env {
        Env::of(
            pairs
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned())),
        )
    }

    fn lines(pairs: &[(&str, &str)]) -> Vec<String> {
        report(&env(pairs))
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    #[test]
    fn no_name_stands_twice() {
        let mut seen: HashSet<String> = HashSet::new();
        for key in config::keys() {
            assert!(names(key).into_iter().all(|name| seen.insert(name)));
        }
        for variable in VARIABLES {
            assert!(seen.insert(variable.name.to_owned()), "{}", variable.name);
        }
    }

    #[test]
    fn honoured_known_and_unknown() {
        assert_eq!(
            lines(&[("ETCD_LEASE_TTL", "5")]),
            ["environment ETCD_LEASE_TTL: sets lease_ttl_s of [discovery]"]
        );
        assert_eq!(
            lines(&[("NATS_SERVER", "nats://a")]),
            ["environment NATS_SERVER: is not honoured: there is no NATS in this version"]
        );
        assert_eq!(
            lines(&[("DYN_TCP_RPC_PROT", "1")]),
            [
                "environment DYN_TCP_RPC_PROT: is not known and does nothing; \
             did you mean DYN_TCP_RPC_PORT?"
            ]
        );
        assert_eq!(lines(&[("OTEL_EXPORTER_OTLP_HEADERS", "a=b")]).len(), 1);
        assert!(lines(&[("DYN_LOG", ""), ("HOME", "/"), ("NO_COLOR", "1")]).is_empty());
    }

    #[test]
    fn our_own_name_wins_and_says_so() {
        let set = [("CORELANE_SERVER_PORT", "1"), ("DYN_TCP_RPC_PORT", "2")];
        assert_eq!(
            lines(&set)[1],
            "environment DYN_TCP_RPC_PORT: sets port of [server], \
                                    but CORELANE_SERVER_PORT wins"
        );
    }

    #[test]
    fn service_links_are_nobodys_words() {
        let links = [
            ("ETCD_SERVICE_HOST", "10.0.0.1"),
            ("ETCD_PORT", "tcp://10.0.0.1:2379"),
            ("ETCD_PORT_2379_TCP_ADDR", "10.0.0.1"),
            ("CORELANE_SERVICE_PORT_HTTP", "80"),
        ];
        assert!(lines(&links).is_empty());
        assert_eq!(
            lines(&[("CORELANE_SERVER_PORT", "tcp://10.0.0.1:80")]).len(),
            1
        );
    }

    #[test]
    fn what_stops_a_router() {
        assert!(refusals(&env(&[("DYN_REQUEST_PLANE", "tcp"), ("NATS_SERVER", "a")])).is_empty());
        let stops = refusals(&env(&[
            ("DYN_REQUEST_PLANE", "nats"),
            ("DYN_RESPONSE_PLANE", "quic"),
        ]));
        assert_eq!(stops.len(), 2);
        assert_eq!(
            stops[0].to_string(),
            "environment DYN_REQUEST_PLANE: the request plane is TCP in this version; \
             write tcp, or unset it"
        );
    }

    #[test]
    fn switches() {
        for on in ["1", "TRUE", " yes ", "On"] {
            assert!(
                env(&[("DYN_LOGGING_JSONL", on)]).is_on("DYN_LOGGING_JSONL"),
                "{on}"
            );
        }
        for off in ["0", "", "no", "2"] {
            assert!(
                !env(&[("DYN_LOGGING_JSONL", off)]).is_on("DYN_LOGGING_JSONL"),
                "{off}"
            );
        }
    }
}
