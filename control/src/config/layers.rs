//! Who wins: flag over environment over the file of one core over the main file over the default,
//! with the place of every value that was used.

use std::collections::BTreeMap;
use std::collections::BTreeSet;

use super::keys::{self, Alias, Dialect, Fallback, Key, Section};
use super::problem::{Origin, Problem};
use super::raw::{Entry, RawFile};
use super::value::{Fault, Kind, Value};
use super::{Override, Purpose};
use crate::env::Env;

/// One value that was used: which key, what it is, and where it came from.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Setting {
    /// `server.port`, `route[0].listen`, `core[3].io`.
    pub path: String,
    /// Its key.
    pub key: &'static Key,
    /// As it would be typed; secrets are hidden; none when unset.
    pub value: Option<String>,
    /// Where it came from.
    pub origin: Origin,
}

/// Of which thing a key is asked.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Of {
    /// A table that is written once.
    Once,
    /// The n-th of a table that repeats.
    Item(usize),
    /// The data core on this CPU.
    Core(usize),
}

/// All layers, and what has been found wrong with them so far.
pub(super) struct Layers {
    pub(super) main: RawFile,
    pub(super) cores: BTreeMap<usize, RawFile>,
    /// Flags, then environment: both apply to every table of a section.
    over: Vec<Entry>,
    pub(super) problems: Vec<Problem>,
    pub(super) settings: Vec<Setting>,
    /// Paths of the keys that were asked for.
    pub(super) asked: BTreeSet<String>,
}

impl Layers {
    /// Reads flags and environment on top of what the files say.
    pub(super) fn new(
        main: RawFile,
        cores: BTreeMap<usize, RawFile>,
        flags: &[Override],
        env: &Env,
        purpose: Purpose,
        mut problems: Vec<Problem>,
    ) -> Self {
        let mut over = Vec::new();
        for flag in flags {
            let at = Origin::Flag {
                name: flag.flag.clone(),
            };
            // The last of two flags is the one that counts, as users expect.
            over.retain(|entry: &Entry| entry.key != flag.key);
            if flag.key.only_per_core() {
                let what = format!("{} is of one core", flag.key.name);
                let instead = "write it in cores.d/<n>.toml, n being the core";
                problems.push(Problem::error(at, what, instead));
                continue;
            }
            match flag.key.kind.read_text(flag.key, &flag.text) {
                Ok(value) => over.push(Entry {
                    key: flag.key,
                    value,
                    at,
                }),
                Err(fault) => problems.push(Problem::error(at, fault.what, fault.instead)),
            }
        }
        for key in keys::keys()
            .iter()
            .copied()
            .filter(|key| purpose.reads(key.section))
        {
            for (name, dialect) in names(key) {
                let Some(text) = env.get(&name) else { continue };
                let at = Origin::Env { name };
                match from_env(key, dialect, text) {
                    Ok(value) => over.push(Entry { key, value, at }),
                    Err(fault) => problems.push(Problem::error(at, fault.what, fault.instead)),
                }
            }
        }
        Self {
            main,
            cores,
            over,
            problems,
            settings: Vec::new(),
            asked: BTreeSet::new(),
        }
    }

    /// The value of a key, and where it came from. None when it is unset, or when what was typed
    /// was refused and there is no default.
    pub(super) fn get(&mut self, key: &'static Key, of: Of) -> Option<(Value, Origin)> {
        self.asked.insert(key.path());
        let found = self
            .typed(key, of)
            .map(|entry| (entry.value.clone(), entry.at.clone()));
        let found = found.or_else(|| match key.fallback {
            Fallback::Value(text) => key
                .kind
                .read_text(key, text)
                .ok()
                .map(|value| (value, Origin::Default)),
            Fallback::Unset(_) => None,
            Fallback::Required => {
                self.missing(key, of);
                None
            }
        });
        self.record(key, of, found.as_ref());
        found
    }

    /// What was written for a key, unrecorded.
    pub(super) fn typed(&self, key: &'static Key, of: Of) -> Option<&Entry> {
        let in_file = |file: &'_ RawFile, index| -> Option<usize> {
            let table = file.table(key.section, index)?;
            table.entries.iter().position(|entry| entry.key == key)
        };
        if let Some(entry) = self.over.iter().find(|entry| entry.key == key) {
            return Some(entry);
        }
        let index = match of {
            Of::Item(index) => index,
            Of::Once | Of::Core(_) => 0,
        };
        if let Of::Core(cpu) = of {
            let file = self.cores.get(&cpu);
            if let Some((file, place)) = file.and_then(|f| Some((f, in_file(f, 0)?))) {
                return file.table(key.section, 0)?.entries.get(place);
            }
        }
        let place = in_file(&self.main, index)?;
        self.main.table(key.section, index)?.entries.get(place)
    }

    fn missing(&mut self, key: &'static Key, of: Of) {
        let Of::Item(index) = of else { return };
        let Some(table) = self.main.table(key.section, index) else {
            return;
        };
        if !table.refused.contains(&key.name) {
            self.problems.push(Problem::error(
                table.at.clone(),
                format!("{} has no {}", key.section.header(), key.name),
                format!("write {} = {}", key.name, key.kind.example()),
            ));
        }
    }

    fn record(&mut self, key: &'static Key, of: Of, found: Option<&(Value, Origin)>) {
        let path = match of {
            Of::Once => key.path(),
            Of::Item(n) | Of::Core(n) => format!("{}[{n}].{}", key.section.name(), key.name),
        };
        let hidden = key.kind == Kind::Secret;
        let show = |value: &Value| {
            if hidden {
                "(hidden)".to_owned()
            } else {
                value.show()
            }
        };
        self.settings.push(Setting {
            path,
            key,
            value: found.map(|(value, _)| show(value)),
            origin: found.map_or(Origin::Default, |(_, origin)| origin.clone()),
        });
    }

    /// A number of the type that the configuration has for it.
    pub(super) fn int<T: TryFrom<i64> + Default>(&mut self, key: &'static Key, of: Of) -> T {
        let Some((Value::Int(number), at)) = self.get(key, of) else {
            return T::default();
        };
        T::try_from(number).unwrap_or_else(|_| {
            let what = format!("{} is {number}, which does not fit", key.name);
            self.problems
                .push(Problem::error(at, what, "write a smaller number"));
            T::default()
        })
    }

    /// A text.
    pub(super) fn text(&mut self, key: &'static Key, of: Of) -> Option<(String, Origin)> {
        match self.get(key, of) {
            Some((Value::Text(text), at)) => Some((text, at)),
            _ => None,
        }
    }

    /// One of a set of words; the check of the key has already refused all others.
    pub(super) fn word<T>(&mut self, key: &'static Key, parse: fn(&str) -> Option<T>, or: T) -> T {
        self.word_of(key, Of::Once, parse, or)
    }

    /// The same, of one item or core.
    pub(super) fn word_of<T>(
        &mut self,
        key: &'static Key,
        of: Of,
        parse: fn(&str) -> Option<T>,
        or: T,
    ) -> T {
        self.text(key, of)
            .and_then(|(text, _)| parse(&text))
            .unwrap_or(or)
    }

    /// A number that may be unset.
    pub(super) fn number<T: TryFrom<i64>>(&mut self, key: &'static Key, of: Of) -> Option<T> {
        match self.get(key, of) {
            Some((Value::Int(number), _)) => T::try_from(number).ok(),
            _ => None,
        }
    }

    /// Reports an error.
    pub(super) fn error(&mut self, at: &Origin, what: String, instead: impl Into<String>) {
        self.problems
            .push(Problem::error(at.clone(), what, instead));
    }

    /// Reports a warning.
    pub(super) fn warn(&mut self, at: &Origin, what: String, instead: impl Into<String>) {
        self.problems
            .push(Problem::warning(at.clone(), what, instead));
    }

    /// Where the `index`-th table of a section begins.
    pub(super) fn header(&self, section: Section, index: usize) -> Origin {
        self.main
            .table(section, index)
            .map_or(Origin::Default, |table| table.at.clone())
    }
}

/// The variables of a key, the one that wins first.
fn names(key: &'static Key) -> impl Iterator<Item = (String, Dialect)> {
    let own = key.env().map(|name| (name, Dialect::Same));
    let aliases = key
        .aliases
        .iter()
        .map(|Alias { name, dialect }| ((*name).to_owned(), *dialect));
    own.into_iter().chain(aliases)
}

fn from_env(key: &Key, dialect: Dialect, text: &str) -> Result<Value, Fault> {
    // Kubernetes sets NAME_PORT=tcp://... for every service; one called "corelane-server" would
    // name exactly our variable.
    if text.starts_with("tcp://") && key.name == "port" {
        return Err(Fault {
            what: format!("{} is {text}, a service link of Kubernetes", key.name),
            instead: "set enableServiceLinks: false in the pod, or rename the service".into(),
        });
    }
    let number = text.trim().parse::<i64>();
    let changed = match (dialect, number) {
        (Dialect::SecondsToMillis, Ok(seconds)) => Some(seconds.saturating_mul(1_000).to_string()),
        (Dialect::NegativeIsOff, Ok(number)) if number < 0 => Some("-1".to_owned()),
        (Dialect::Truthy, _) => Some(
            if crate::env::is_truthy(text) {
                "on"
            } else {
                "off"
            }
            .into(),
        ),
        (Dialect::ShortBackend, _) if text == "mem" => Some("memory".to_owned()),
        _ => None,
    };
    key.kind.read_text(key, changed.as_deref().unwrap_or(text))
}
