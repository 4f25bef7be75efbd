//! What differs between the configuration in force and a new one, and what of it cannot be had
//! without a restart: all of that is found before anything is changed.

use std::collections::{BTreeMap, BTreeSet};

use crate::config::{
    Config, Core, LoadSource, Origin, Problem, Response, Route, Section, Setting, cpu_list, quoted,
};

/// What the process was started with, and cannot grow beyond.
#[derive(Clone, Debug)]
pub struct Began {
    /// A route relayed, so that workers can call home.
    relays: bool,
    /// What is heard of workers.
    wishes: BTreeSet<String>,
    /// The cores, by number.
    cores: BTreeMap<usize, Core>,
}

impl Began {
    /// With this configuration.
    pub fn with(config: &Config) -> Began {
        let relays = |route: &Route| route.response == Response::Relay;
        Began {
            relays: config.routes.iter().any(relays),
            wishes: config.routes.iter().flat_map(wishes).collect(),
            cores: by_number(config).collect(),
        }
    }
}

fn by_number(config: &Config) -> impl Iterator<Item = (usize, Core)> {
    config.cores.iter().map(|core| (core.number, core.clone()))
}

/// What a route wants to hear of its workers; indexes and subscriptions are made once.
fn wishes(route: &Route) -> impl Iterator<Item = String> + use<> {
    let target = &route.target;
    let caches = route.kv.as_ref().map(|kv| {
        let (blocks, ranks) = (kv.blocks_max, kv.ranks_max);
        format!("{target} kv {} {blocks} {ranks}", route.block_tokens)
    });
    let load = (route.load.source != LoadSource::Own).then(|| {
        let (source, stale) = (route.load.source, route.load.stale_ms);
        format!("{target} load {source} {} {stale}", route.block_tokens)
    });
    caches.into_iter().chain(load)
}

/// The keys that have other values, by their paths in the new configuration; for a route or an
/// instance that comes or goes, its name.
///
/// # Errors
/// What cannot be had without a restart, in the order of places.
pub fn compare(old: &Config, new: &Config, began: &Began) -> Result<Vec<String>, Vec<Problem>> {
    let mut look = Look {
        old,
        new,
        began,
        changed: Vec::new(),
        problems: Vec::new(),
    };
    look.cores();
    look.tables();
    look.secrets();
    look.routes();
    if old.instances != new.instances {
        look.changed.push("instance".to_owned());
    }
    look.problems.sort_by(|left, right| left.at.cmp(&right.at));
    match look.problems.is_empty() {
        true => Ok(look.changed),
        false => Err(look.problems),
    }
}

struct Look<'a> {
    old: &'a Config,
    new: &'a Config,
    began: &'a Began,
    changed: Vec<String>,
    problems: Vec<Problem>,
}

impl Look<'_> {
    fn fixed(&mut self, at: &Origin, what: String, instead: String) {
        self.problems
            .push(Problem::error(at.clone(), what, instead));
    }

    /// Which cores there are, and which is the control core.
    fn cores(&mut self) {
        let numbers = |config: &Config| -> BTreeSet<usize> {
            config.cores.iter().map(|core| core.number).collect()
        };
        let (old, new) = (numbers(self.old), numbers(self.new));
        if old == new {
            self.pins();
        } else {
            let [old, new] = [old, new].map(Vec::from_iter);
            let at = origin(self.new, "core.cpus");
            let (old, new) = (cpu_list(&old), cpu_list(&new));
            let what = format!("data cores would be {new} in place of {old}");
            self.fixed(&at, what, "restart, or leave the cores as they are".into());
        }
        if self.old.control.cpu != self.new.control.cpu {
            let at = origin(self.new, "control.cpu");
            let (old, new) = (self.old.control.cpu, self.new.control.cpu);
            let what = format!("the control core would be {new} in place of {old}");
            self.fixed(&at, what, "restart, or leave it as it is".into());
        }
    }

    /// Cores that are there before and after: each on its CPU.
    fn pins(&mut self) {
        let before: BTreeMap<usize, Core> = by_number(self.old).collect();
        for core in &self.new.cores {
            let Some(was) = before.get(&core.number).filter(|was| was.cpu != core.cpu) else {
                continue;
            };
            let (number, old, new) = (core.number, was.cpu, core.cpu);
            let place = |config, key| origin(config, &format!("core[{number}].{key}"));
            let places = [
                place(self.new, "cpu"),
                place(self.new, "nic_queue"),
                place(self.old, "cpu"),
                place(self.old, "nic_queue"),
            ];
            // A line that was taken out has no place; where it stood says more than nothing.
            let mut written = places.into_iter();
            let at = written.find(|at| !matches!(at, Origin::Default | Origin::Host { .. }));
            let what = format!("core {number} would be on CPU {new} in place of {old}");
            let instead = format!("restart, or write cpu = {old} in its file");
            self.fixed(&at.unwrap_or(Origin::Default), what, instead);
        }
    }

    /// The tables that stand once, and those of cores that stay.
    fn tables(&mut self) {
        let before: BTreeMap<&str, &Setting> = once(self.old).collect();
        for (path, setting) in once(self.new) {
            let Some(was) = before.get(path) else {
                // Of a core that was not there, or of a broker that was off: told elsewhere.
                continue;
            };
            let is_cpu = setting.key.name == "cpu" && setting.key.section == Section::Core;
            let told = is_cpu || path == "core.cpus" || path == "control.cpu";
            if told || was.value == setting.value {
                continue;
            }
            self.changed.push(path.to_owned());
            if !setting.key.is_live() {
                self.needs_restart(was, setting);
            }
            if setting.key.section == Section::Core {
                self.core_limit(path, setting);
            }
        }
    }

    fn needs_restart(&mut self, was: &Setting, setting: &Setting) {
        let show = |setting: &Setting| setting.value.clone().unwrap_or("unset".to_owned());
        let (old, new) = (show(was), show(setting));
        let what = format!("{} cannot change from {old} to {new} live", setting.path);
        // A line that was taken out has no place; where it stood says more than nothing.
        let at = match setting.origin {
            Origin::Default => &was.origin,
            _ => &setting.origin,
        };
        self.fixed(at, what, format!("restart, or write {old} again"));
    }

    /// Tables of a core are made for what it began with.
    fn core_limit(&mut self, path: &str, setting: &Setting) {
        let mut cores = self.new.cores.iter();
        let of_core = |core: &&Core| path == format!("core[{}].{}", core.number, setting.key.name);
        let Some(core) = cores.find(of_core) else {
            return;
        };
        let Some(began) = self.began.cores.get(&core.number) else {
            return;
        };
        let (now, then) = match setting.key.name {
            "connections_max" => (core.connections_max, began.connections_max),
            "in_flight_max" => (core.in_flight_max, began.in_flight_max),
            _ => return,
        };
        if now > then {
            let what = format!("{path} is {now}, and the core has memory for {then}");
            self.fixed(
                &setting.origin,
                what,
                format!("restart, or write {then} or less"),
            );
        }
    }

    /// What no listing shows.
    fn secrets(&mut self) {
        let is_discovery = |setting: &&Setting| setting.key.section == Section::Discovery;
        let named = self
            .changed
            .iter()
            .any(|path| path.starts_with("discovery."));
        if self.old.discovery == self.new.discovery || named {
            return;
        }
        let mut settings = self.new.settings.iter().filter(is_discovery);
        let secret = settings.find(|setting| setting.value.as_deref() == Some("(hidden)"));
        let at = secret.map_or(Origin::Default, |setting| setting.origin.clone());
        let what = "secrets of [discovery] cannot change live".to_owned();
        self.fixed(&at, what, "restart, or write the old one again".into());
    }

    fn routes(&mut self) {
        let (old, new) = (self.old, self.new);
        for (index, route) in new.routes.iter().enumerate() {
            let before = old
                .routes
                .iter()
                .position(|other| other.listen == route.listen);
            let Some(before) = before else {
                self.changed.push(format!("route {}", route.listen));
                if route.lane.is_some() {
                    let at = origin(new, &format!("route[{index}].lane"));
                    let what = format!("{} would be a new route with a lane", route.listen);
                    self.fixed(&at, what, "restart, or leave lane out".into());
                }
                self.grown(index, route);
                continue;
            };
            if old.routes[before] != *route {
                self.route(before, index);
                self.grown(index, route);
            }
        }
        for (index, route) in old.routes.iter().enumerate() {
            if new.routes.iter().all(|other| other.listen != route.listen) {
                self.changed.push(format!("route {}", route.listen));
                if route.lane.is_some() {
                    let at = origin(old, &format!("route[{index}].listen"));
                    let what = format!("{} has a lane and cannot go live", route.listen);
                    self.fixed(&at, what, "restart, or leave the route".into());
                }
            }
        }
    }

    /// A route that is there before and after.
    fn route(&mut self, before: usize, after: usize) {
        let (old, new) = (self.old, self.new);
        let has_lane = old.routes[before].lane.is_some();
        let begin = format!("route[{after}].");
        let of_route = |setting: &&Setting| setting.path.starts_with(&begin);
        for setting in new.settings.iter().filter(of_route) {
            let was = format!("route[{before}].{}", setting.key.name);
            let was = old.settings.iter().find(|other| other.path == was);
            let Some(was) = was.filter(|was| was.value != setting.value) else {
                continue;
            };
            self.changed.push(setting.path.clone());
            if !setting.key.is_live() {
                self.needs_restart(was, setting);
            } else if has_lane {
                let listen = quoted(&new.routes[after].listen.to_string());
                let what = format!("{listen} has a lane and cannot change live");
                self.fixed(
                    &setting.origin,
                    what,
                    "restart, or write it as it was".into(),
                );
            }
        }
    }

    /// What a route wants that is made at the start only.
    fn grown(&mut self, index: usize, route: &Route) {
        if route.response == Response::Relay && !self.began.relays {
            let at = origin(self.new, &format!("route[{index}].response"));
            let what = "response = \"relay\" where no route has relayed since the start".to_owned();
            self.fixed(&at, what, "restart, or write \"direct\"".into());
        }
        if wishes(route).any(|wish| !self.began.wishes.contains(&wish)) {
            let key = if route.kv.is_some() { "policy" } else { "load" };
            let at = origin(self.new, &format!("route[{index}].{key}"));
            let what = format!("nothing is heard of the workers of {} so far", route.target);
            let instead = format!("restart, or choose {key} as no worker has to tell of");
            self.fixed(&at, what, instead);
        }
    }
}

/// The settings of tables that do not repeat, and of cores.
fn once(config: &Config) -> impl Iterator<Item = (&str, &Setting)> {
    let settings = config.settings.iter();
    let settings = settings.filter(|setting| !setting.key.section.repeats());
    settings.map(|setting| (setting.path.as_str(), setting))
}

fn origin(config: &Config, path: &str) -> Origin {
    let found = config.settings.iter().find(|setting| setting.path == path);
    found.map_or(Origin::Default, |setting| setting.origin.clone())
}
