//! The environment: what is set of ours and of Dynamo's, which of it takes effect, and what we say
//! about the rest. One table ([`rows`]): the names of the configuration's keys, and `variables`.
//!
//! A part of the program that comes to be switches its variables on in `variables`; the report at
//! start, `corelane env` and what stops a router follow from there.

use std::collections::BTreeMap;
use std::fmt;

use crate::config::{self, Origin, Problem, nearest};
use crate::nats::RequestPlane;

mod print;
mod table;
mod variables;

pub use print::{Listing, SCHEMA, json, text};
pub use table::{Row, Standing, Variable, rows, variable};
pub use variables::VARIABLES;

use table::names;

/// Prefixes of the names that we look at.
const FAMILIES: [&str; 6] = ["CORELANE_", "DYN_", "ETCD_", "GMS_", "NATS_", "OTEL_"];

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
        let ours = |name: &str| is_family(name) || variable(name).is_some();
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

    /// A value as it stands, also an empty one.
    pub fn said(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(String::as_str)
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

/// Whether a word means yes, as Dynamo reads it (`spec/request-plane.md` §13).
pub(crate) fn is_truthy(text: &str) -> bool {
    let text = text.trim().to_ascii_lowercase();
    matches!(text.as_str(), "1" | "true" | "on" | "yes")
}

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
        .filter(|(name, value)| is_family(name) && !is_link(name, value));
    ours.map(|(name, value)| notice(env, name, value)).collect()
}

/// Whether a name is ours or Dynamo's by its beginning. Others that we look at are set everywhere.
fn is_family(name: &str) -> bool {
    FAMILIES.iter().any(|family| name.starts_with(family))
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
    let known = variable(name);
    match known.map(|variable| variable.standing) {
        Some(Standing::Honoured) => {
            let effect = known.map(|variable| variable.effect);
            line(Level::Info, effect.unwrap_or_default().to_owned())
        }
        Some(Standing::Elsewhere(who)) => line(Level::Info, format!("is for {who}, not for us")),
        Some(Standing::Only(only, _)) if value.trim().eq_ignore_ascii_case(only) => {
            line(Level::Info, format!("is {only}, as always"))
        }
        Some(
            Standing::NotHonoured(reason) | Standing::Only(_, reason) | Standing::Refused(reason),
        ) => line(Level::Warn, format!("is not honoured: {reason}")),
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
    let refusal = |(name, value): (&str, &str)| {
        let at = || Origin::Env {
            name: name.to_owned(),
        };
        if name == "DYN_REQUEST_PLANE" && RequestPlane::of_word(value).is_none() {
            let what = format!("the request plane is tcp or nats, not {value:?}");
            return Some(Problem::error(at(), what, "write tcp or nats, or unset it"));
        }
        match variable(name)?.standing {
            Standing::Refused(reason) => {
                Some(Problem::error(at(), reason, "unset it to go on without"))
            }
            Standing::Only(only, reason) if !value.trim().eq_ignore_ascii_case(only) => Some(
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
            ["environment NATS_SERVER: is the NATS server"]
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
        assert!(refusals(&env(&[("DYN_REQUEST_PLANE", "NATS")])).is_empty());
        let stops = refusals(&env(&[("DYN_REQUEST_PLANE", "http")]));
        assert_eq!(stops.len(), 1);
        assert_eq!(
            stops[0].to_string(),
            "environment DYN_REQUEST_PLANE: the request plane is tcp or nats, not \"http\"; \
             write tcp or nats, or unset it"
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
