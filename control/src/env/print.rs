//! `corelane env`: every variable that we know, as text or JSON, with the values that are set.
//!
//! With `--json` one object is printed, whose keys are stable ([`Listing`]):
//!
//! ```json
//! {"schema":"corelane.env/1",
//!  "variables":[{"name":"ETCD_LEASE_TTL","group":"configuration","default":"30",
//!                "unit":"seconds, 2 to 3600","effect":"sets lease_ttl_s of [discovery]",
//!                "standing":"honoured","reason":null,"key":"discovery.lease_ttl_s",
//!                "value":"9"}],
//!  "unknown":["DYN_TCP_RPC_PROT"]}
//! ```
//! `standing` is `honoured`, `one_value` (any other than the one in `reason` stops a router),
//! `not_honoured`, `refused` (it stops a router) or `elsewhere`. `value` is null when the variable
//! is not set, and `(hidden)` for secrets.

use std::fmt::Write;

use serde::Serialize;

use super::table::{Row, Standing, rows, variable};
use super::{Env, is_family, is_link, key_of};

/// Name and version of the JSON form.
pub const SCHEMA: &str = "corelane.env/1";

/// Shown in place of a secret.
const HIDDEN: &str = "(hidden)";

/// What `--json` prints.
#[derive(Clone, Debug, Serialize)]
pub struct Listing {
    /// Always [`SCHEMA`].
    pub schema: &'static str,
    /// Every variable that we know.
    pub variables: Vec<Listed>,
    /// Names of our and Dynamo's families that are set and that nobody knows.
    pub unknown: Vec<String>,
}

/// One variable of it.
#[derive(Clone, Debug, Serialize)]
pub struct Listed {
    /// Its name; one that ends in `*` stands for all others that begin so.
    pub name: String,
    /// What it belongs to.
    pub group: &'static str,
    /// What counts when it is not set.
    pub default: String,
    /// What its value is.
    pub unit: String,
    /// What it does.
    pub effect: String,
    /// What becomes of it here.
    pub standing: &'static str,
    /// Why, unless it is honoured.
    pub reason: Option<String>,
    /// The key of the configuration that it sets.
    pub key: Option<String>,
    /// Its value.
    pub value: Option<String>,
}

/// All rows as plain values.
pub fn json(env: &Env) -> Listing {
    let listed = |row: Row| {
        let (standing, reason) = standing(row.standing);
        let value = shown(env, &row);
        Listed {
            name: row.name,
            group: row.group,
            default: row.default,
            unit: row.unit,
            effect: row.effect,
            standing,
            reason,
            key: row.key.map(super::config::Key::path),
            value,
        }
    };
    Listing {
        schema: SCHEMA,
        variables: rows().into_iter().map(listed).collect(),
        unknown: unknown(env),
    }
}

/// All rows as a text; with `only_set` those that are set.
pub fn text(env: &Env, only_set: bool) -> String {
    let mut text = String::new();
    let mut group = "";
    for row in rows() {
        let value = shown(env, &row);
        if only_set && value.is_none() {
            continue;
        }
        if row.group != group {
            let gap = if group.is_empty() { "" } else { "\n" };
            group = row.group;
            // Writing into a string does not fail.
            let _ = writeln!(text, "{gap}{group}");
        }
        let _ = writeln!(text, "  {}: {}", row.name, row.effect);
        let default = match row.default.as_str() {
            "" => String::new(),
            default => format!("; default {default}"),
        };
        let _ = writeln!(text, "    {}{default}", row.unit);
        match standing(row.standing) {
            ("honoured", _) => {}
            (word, reason) => {
                let word = word.replace('_', " ");
                let _ = writeln!(text, "    {word}: {}", reason.unwrap_or_default());
            }
        }
        if let Some(value) = value {
            let _ = writeln!(text, "    = {value}");
        }
    }
    let unknown = unknown(env);
    if !unknown.is_empty() {
        let _ = writeln!(
            text,
            "\nset, and known to nobody\n  {}",
            unknown.join("\n  ")
        );
    }
    text
}

fn standing(standing: Standing) -> (&'static str, Option<String>) {
    match standing {
        Standing::Honoured => ("honoured", None),
        Standing::NotHonoured(reason) => ("not_honoured", Some(reason.to_owned())),
        Standing::Only(only, reason) => ("one_value", Some(format!("{only}: {reason}"))),
        Standing::Refused(reason) => ("refused", Some(reason.to_owned())),
        Standing::Elsewhere(who) => ("elsewhere", Some(who.to_owned())),
    }
}

/// The value of a row, if it is set, without what nobody is to see.
fn shown(env: &Env, row: &Row) -> Option<String> {
    let value = env.get(&row.name)?;
    Some(if row.secret {
        HIDDEN.to_owned()
    } else {
        without_login(value)
    })
}

/// The text with user and password of every URL in it hidden, and on one line.
fn without_login(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("://") {
        out.push_str(before);
        out.push_str("://");
        let end = after.find(['/', ',', ' ', '?']).unwrap_or(after.len());
        rest = match after[..end].rfind('@') {
            Some(at) => {
                out.push_str(HIDDEN);
                &after[at..]
            }
            None => after,
        };
    }
    out.push_str(rest);
    out.replace(['\n', '\r'], " ")
}

fn unknown(env: &Env) -> Vec<String> {
    let strange = |(name, value): &(&str, &str)| {
        let known = key_of(name).is_some() || variable(name).is_some();
        is_family(name) && !known && !is_link(name, value)
    };
    let names = env.set().filter(strange).map(|(name, _)| name.to_owned());
    names.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(pairs: &[(&str, &str)]) -> Env {
        let own = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        Env::of(pairs.iter().map(own))
    }

    #[test]
    fn nobody_sees_a_secret() {
        let set = env(&[
            ("ETCD_AUTH_PASSWORD", "s3cret"),
            ("CORELANE_DISCOVERY_CLIENT_KEY", "s3cret"),
            ("NATS_AUTH_TOKEN", "s3cret"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "x-api-key=s3cret"),
            (
                "NATS_SERVER",
                "nats://me:s3cret@a:1,nats://me:s3c@ret@b:2/x",
            ),
            ("NATS_TLS_CLIENT_KEY_PATH", "/etc/key"),
        ]);
        let all = text(&set, false) + &serde_json::to_string(&json(&set)).unwrap();
        assert!(!all.contains("s3c"), "{all}");
        assert_eq!(all.matches(HIDDEN).count(), 12, "six in each form");
        assert!(all.contains("nats://(hidden)@a:1,nats://(hidden)@b:2/x"));
        assert!(all.contains("    = /etc/key\n"));
    }

    #[test]
    fn what_is_set_and_what_is_strange() {
        let set = env(&[
            ("DYN_LOG", "debug"),
            ("DYN_TCP_RPC_PROT", "1"),
            ("ETCD_SERVICE_HOST", "10.0.0.1"),
            ("HOSTNAME", "h"),
        ]);
        let listing = json(&set);
        assert_eq!(listing.unknown, ["DYN_TCP_RPC_PROT"]);
        let set_ones = listing.variables.iter().filter(|row| row.value.is_some());
        assert_eq!(set_ones.count(), 2);
        let text = text(&set, true);
        assert!(
            text.starts_with("log\n  DYN_LOG: filters the log\n"),
            "{text}"
        );
        assert!(
            text.ends_with("set, and known to nobody\n  DYN_TCP_RPC_PROT\n"),
            "{text}"
        );
    }
}
