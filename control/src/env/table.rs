//! What is known of a variable: its default, its unit, what it does, and whether it does so here.

use crate::config::{self, Dialect, Fallback, Kind};

use super::variables::VARIABLES;

/// What becomes of a variable here.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Standing {
    /// It does what its row says.
    Honoured,
    /// We know it and do not honour it, for this reason.
    NotHonoured(&'static str),
    /// Only one value can be had in this version; any other stops a router, for this reason.
    Only(&'static str, &'static str),
    /// To ignore it would be dangerous, so it stops a router, for this reason.
    Refused(&'static str),
    /// Another program of a Dynamo cluster reads it; here is which.
    Elsewhere(&'static str),
}

/// A variable of Dynamo's, or of ours beside the configuration. A name that ends in `*` stands
/// for all that begin so and have no row of their own.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Variable {
    /// Its name.
    pub name: &'static str,
    /// What it belongs to.
    pub group: &'static str,
    /// What counts when it is not set: ours if it is honoured, else Dynamo's.
    pub default: &'static str,
    /// What its value is: a unit, the words to choose from, `switch` ...
    pub unit: &'static str,
    /// What becomes of it.
    pub standing: Standing,
    /// What it does, as the rest of a sentence that begins with its name.
    pub effect: &'static str,
}

/// One row of `corelane env`: a variable that sets a key, or one with a row of its own.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Row {
    /// Its name.
    pub name: String,
    /// What it belongs to.
    pub group: &'static str,
    /// What counts when it is not set.
    pub default: String,
    /// What its value is.
    pub unit: String,
    /// What becomes of it.
    pub standing: Standing,
    /// What it does.
    pub effect: String,
    /// The key of the configuration that it sets.
    pub key: Option<&'static config::Key>,
    /// Whether its value must not be shown.
    pub secret: bool,
}

/// Rows that set keys of the configuration stand under this.
const CONFIGURATION: &str = "configuration";

/// Beginnings and ends of the names whose values nobody is to see.
const SECRET: [&str; 5] = ["PASSWORD", "TOKEN", "NKEY", "CLIENT_KEY", "HEADERS"];

/// Every variable that we know, those that set keys first.
pub fn rows() -> Vec<Row> {
    let keys = config::keys().iter().flat_map(|key| key_rows(key));
    keys.chain(VARIABLES.iter().map(row)).collect()
}

fn key_rows(key: &'static config::Key) -> Vec<Row> {
    let default = match key.fallback {
        Fallback::Value(value) => value.to_owned(),
        Fallback::Unset(means) => means.to_owned(),
        Fallback::Required => "must be written".to_owned(),
    };
    let row = |name: String| Row {
        name,
        group: CONFIGURATION,
        default: default.clone(),
        unit: key.kind.describe(),
        standing: Standing::Honoured,
        effect: format!("sets {} of {}", key.name, key.section.header()),
        key: Some(key),
        secret: key.kind == Kind::Secret,
    };
    let own = key.env().into_iter().map(&row);
    let theirs = key.aliases.iter().map(|alias| {
        let row = row(alias.name.to_owned());
        let (unit, default) = match alias.dialect {
            Dialect::Same => (row.unit, row.default),
            Dialect::SecondsToMillis => {
                let seconds = row.default.parse::<f64>().map(|ms| (ms / 1e3).to_string());
                ("seconds".to_owned(), seconds.unwrap_or(row.default))
            }
            Dialect::ShortBackend => (
                row.unit.replace("memory", "mem"),
                "mem, while Dynamo's is etcd".to_owned(),
            ),
            Dialect::Truthy => ("switch".to_owned(), row.default),
            Dialect::NegativeIsOff => (row.unit, format!("{}, while Dynamo's is -1", row.default)),
        };
        Row {
            unit,
            default,
            ..row
        }
    });
    own.chain(theirs).collect()
}

fn row(variable: &Variable) -> Row {
    Row {
        name: variable.name.to_owned(),
        group: variable.group,
        default: variable.default.to_owned(),
        unit: variable.unit.to_owned(),
        standing: variable.standing,
        effect: variable.effect.to_owned(),
        key: None,
        // A path tells nothing.
        secret: SECRET.iter().any(|end| variable.name.ends_with(end)),
    }
}

/// Our own name of a key, then Dynamo's.
pub(super) fn names(key: &'static config::Key) -> Vec<String> {
    let aliases = key.aliases.iter().map(|alias| alias.name.to_owned());
    key.env().into_iter().chain(aliases).collect()
}

/// The row of a name; one that names it in full wins over one that ends in `*`.
pub fn variable(name: &str) -> Option<&'static Variable> {
    let begins = |variable: &&Variable| {
        let prefix = variable.name.strip_suffix('*');
        prefix.is_some_and(|prefix| name.starts_with(prefix))
    };
    let exact = VARIABLES.iter().find(|variable| variable.name == name);
    exact.or_else(|| VARIABLES.iter().find(begins))
}
