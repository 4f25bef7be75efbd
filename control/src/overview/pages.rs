//! The pages of the status server: what the cores say, as JSON.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::rc::Rc;

use corelane_codec::headers;
use corelane_codec::path::instance_hex;
use corelane_engine::config::{ANY_CPU, Idle};
use corelane_engine::directory::{self, Directory};
use corelane_engine::weigh::{Weighed, Weighing};
use hyper::StatusCode;
use serde::Serialize;
use tokio::time::Instant;

use super::ask::Asker;
use super::why::Reasons;
use super::{
    Candidate, Choice, Core, EXPLAIN, Explanation, INSTANCES, INSTANCES_MAX, Instance, OVERVIEW,
    Overview, ROUTES_MAX, Route, VERSION,
};
use crate::config;
use crate::cores::Cores;
use crate::preflight::ring_word;
use crate::publish::{Board, Listed};
use crate::status_server::{Answer, Later};

/// Instances of an answer, at most, all routes taken together.
const LISTED_MAX: usize = 16 * 1024;
const JSON: &str = "application/json";
const PLAIN: &str = "text/plain; charset=utf-8";

/// What the pages are made from.
pub struct Sources {
    /// The routes, and the directory that the cores have.
    pub board: Rc<Board>,
    /// The cores.
    pub cores: Rc<Cores>,
    /// Where callers of the request plane are told to go.
    pub address: SocketAddr,
    /// Where instances are found.
    pub discovery: config::Backend,
    /// Whether the process is leaving.
    pub draining: Box<dyn Fn() -> bool>,
}

/// The pages of a process.
pub struct Pages {
    sources: Sources,
    asker: Asker,
    began: Instant,
}

impl Pages {
    /// Pages that are made from this.
    pub fn new(sources: Sources) -> Rc<Self> {
        Rc::new(Self {
            asker: Asker::new(&sources.cores),
            sources,
            began: Instant::now(),
        })
    }

    /// Paths of the status server, and what answers there.
    pub fn later(self: &Rc<Self>) -> Vec<(&'static str, Later)> {
        let (overview, explain) = (Rc::clone(self), Rc::clone(self));
        let overview: Later = Box::new(move |query| {
            let (pages, query) = (Rc::clone(&overview), query.to_owned());
            Box::pin(async move { pages.overview(&query).await })
        });
        let explain: Later = Box::new(move |query| {
            let (pages, query) = (Rc::clone(&explain), query.to_owned());
            Box::pin(async move { pages.explain(&query).await })
        });
        vec![(OVERVIEW, overview), (EXPLAIN, explain)]
    }

    async fn overview(&self, query: &str) -> Answer {
        let mut most = INSTANCES;
        for (name, value) in form_urlencoded::parse(query.as_bytes()) {
            match (&*name, value.parse()) {
                ("instances", Ok(number)) => most = INSTANCES_MAX.min(number),
                ("instances", Err(_)) => return wrong(OVERVIEW, "instances is a number"),
                _ => return wrong(OVERVIEW, "there is only instances"),
            }
        }
        // Those that a reload has replaced, and that only end, are not among them.
        let mut placed = self.sources.board.placed();
        let left_out = placed.len().saturating_sub(ROUTES_MAX);
        placed.truncate(ROUTES_MAX);
        let most = most.min(LISTED_MAX / placed.len().max(1));
        let places: Vec<usize> = placed.iter().map(|(place, _)| *place).collect();
        let said = self.asker.ask(&places, b"", most).await;
        let answers =
            |core: usize| said.is_empty() || said.iter().any(|by_core| by_core[core].is_some());
        let cores = self.sources.cores.configs().into_iter().enumerate();
        let cores = cores.map(|(index, core)| Core {
            core: core.shard as u64,
            cpu: (core.cpu != ANY_CPU).then_some(core.cpu as u64),
            ring: ring_word(core.ring).to_owned(),
            idle: match core.idle {
                Idle::Block => "block",
                Idle::Spin => "spin",
            }
            .to_owned(),
            buffers: core.buffers.into(),
            answers: answers(index),
        });
        let routes = placed.iter().zip(&said);
        json(&Overview {
            version: VERSION,
            program: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_ms: u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX),
            draining: (self.sources.draining)(),
            identity: self.sources.board.identity().map(instance_hex),
            address: self.sources.address.to_string(),
            discovery: self.sources.discovery.to_string(),
            cores: cores.collect(),
            routes: routes
                .map(|((_, listed), by_core)| route(listed, by_core))
                .collect(),
            routes_left_out: left_out,
        })
    }

    async fn explain(&self, query: &str) -> Answer {
        let (mut path, mut core) = (None, 0);
        let mut members: Vec<(String, String)> = Vec::new();
        for (name, value) in form_urlencoded::parse(query.as_bytes()) {
            match &*name {
                "path" => path = Some(value.into_owned()),
                "core" => match value.parse() {
                    Ok(number) => core = number,
                    Err(_) => return wrong(EXPLAIN, "core is a number"),
                },
                "header" => match value.split_once('=') {
                    Some((name, value)) => members.push((name.to_owned(), value.to_owned())),
                    None => return wrong(EXPLAIN, "a header is NAME=VALUE"),
                },
                _ => return wrong(EXPLAIN, "there are path, header and core"),
            }
        }
        let Some(path) = path else {
            return wrong(EXPLAIN, "name a path");
        };
        let cores = self.sources.cores.count();
        if core >= cores {
            let text = format!("there is no core {core}; there are {cores}\n");
            return (StatusCode::NOT_FOUND, PLAIN, text.into_bytes());
        }
        let directory = self.sources.board.published(core);
        let Some(index) = find(&directory, &path) else {
            return unknown(&directory, &path);
        };
        let members: Vec<(&str, &str)> = members.iter().map(|(n, v)| (&**n, &**v)).collect();
        let mut written = Vec::new();
        headers::write(&members, &mut written);
        let mut said = self.asker.ask(&[index], &written, INSTANCES_MAX).await;
        let by_core = said.pop().unwrap_or_default();
        match by_core.get(core) {
            Some(Some(weighing)) => json(&explanation(
                &directory.routes[index],
                (core, weighing),
                &by_core,
            )),
            _ => {
                let text = format!("core {core} does not answer; /live says whether it moves\n");
                (StatusCode::SERVICE_UNAVAILABLE, PLAIN, text.into_bytes())
            }
        }
    }
}

fn route(listed: &Listed, by_core: &[Option<Weighing>]) -> Route {
    let mut instances = BTreeMap::new();
    for one in by_core.iter().flatten().flat_map(|said| &said.candidates) {
        add(&mut instances, one);
    }
    let left_out = by_core.iter().flatten().map(|said| said.left_out);
    let route = &listed.route;
    Route {
        listen: route.listen.to_string(),
        target: route.target.to_string(),
        policy: route.policy.to_string(),
        response: route.response.to_string(),
        lane: route.lane.is_some(),
        registered: listed.is_registered(),
        fresh: listed.is_fresh(),
        instances: instances.into_values().collect(),
        instances_left_out: left_out.max().unwrap_or(0),
    }
}

fn explanation(
    route: &directory::Route,
    (core, weighing): (usize, &Weighing),
    by_core: &[Option<Weighing>],
) -> Explanation {
    use directory::Policy::{Direct, Hash};
    let reasons = Reasons::new(route, weighing);
    let candidate = |one: &Weighed| Candidate {
        id: instance_hex(one.id),
        address: one.address.map(|address| address.to_string()),
        chosen: weighing.chosen == Some(one.id),
        why: reasons.of(one),
        barrier: one.barrier.map(|barrier| barrier.word().to_owned()),
        barrier_ms: one.barrier.and_then(ms_left),
        load: one.load,
        reported: one.is_reported,
        overlap_blocks: one.overlap_blocks,
        cost: one.cost,
        unanswered: one.seen.unanswered,
        streams: one.seen.streams,
        answered: one.seen.answered,
        failed: one.seen.failed,
    };
    let others = by_core.iter().enumerate();
    let others = others.filter(|(other, _)| *other != core);
    let other = |(core, said): (usize, &Option<Weighing>)| Choice {
        core: core as u64,
        answers: said.is_some(),
        chosen: said.as_ref().and_then(|said| said.chosen).map(instance_hex),
    };
    let looks = matches!(route.policy, Direct | Hash);
    Explanation {
        version: VERSION,
        listen: route.listen.clone(),
        target: route.target.clone(),
        policy: policy_word(route.policy).to_owned(),
        header: looks.then(|| route.header.clone()),
        hint: (weighing.hint != 0).then(|| instance_hex(weighing.hint)),
        prompt_blocks: weighing.prompt_blocks,
        core: core as u64,
        chosen: weighing.chosen.map(instance_hex),
        why: reasons.all(),
        candidates: weighing.candidates.iter().map(candidate).collect(),
        left_out: weighing.left_out,
        others: others.map(other).collect(),
    }
}

/// The route that requests with this path take: a path as it stands in request frames, with or
/// without an address before it, or the endpoint that is offered.
fn find(directory: &Directory, path: &str) -> Option<usize> {
    let path = path.strip_prefix("tcp://").unwrap_or(path);
    let path = match path.split_once('/') {
        Some((address, rest)) if address.parse::<SocketAddr>().is_ok() => rest,
        _ => path,
    };
    let path = path.trim_start_matches('/');
    let is_path = |of: &Vec<u8>| of == path.as_bytes();
    let mut routes = directory.routes.iter();
    let exact = routes.position(|route| route.paths.iter().any(is_path));
    // What a reload has replaced has no paths any more.
    let named = |route: &directory::Route| route.listen == path && !route.paths.is_empty();
    exact.or_else(|| directory.routes.iter().position(named))
}

fn unknown(directory: &Directory, path: &str) -> Answer {
    let offered = directory.routes.iter();
    let offered = offered
        .filter(|route| !route.paths.is_empty())
        .take(ROUTES_MAX);
    let offered: Vec<&str> = offered.map(|route| route.listen.as_str()).collect();
    let offered = offered.join(", ");
    let text = format!(
        "no route has the path {path}: a request with it is refused; offered are {offered}\n"
    );
    (StatusCode::NOT_FOUND, PLAIN, text.into_bytes())
}

/// Adds what one core says of an instance.
fn add(instances: &mut BTreeMap<u64, Instance>, one: &Weighed) {
    let all = instances.entry(one.id).or_insert_with(|| Instance {
        id: instance_hex(one.id),
        address: one.address.map(|address| address.to_string()),
        ..Instance::default()
    });
    all.load = match one.is_reported {
        true => all.load.max(one.load),
        false => all.load + one.load,
    };
    all.reported |= one.is_reported;
    all.unanswered += u64::from(one.seen.unanswered);
    all.streams += u64::from(one.seen.streams);
    all.answered += one.seen.answered;
    all.failed += one.seen.failed;
    if let Some(barrier) = one.barrier {
        all.barred_cores += 1;
        all.barrier_ms = all.barrier_ms.max(ms_left(barrier));
        all.barrier.get_or_insert_with(|| barrier.word().to_owned());
    }
}

fn ms_left(barrier: corelane_engine::weigh::Barrier) -> Option<u64> {
    barrier.left_ns().map(|ns| ns.div_ceil(1_000_000))
}

fn policy_word(policy: directory::Policy) -> &'static str {
    let policy = match policy {
        directory::Policy::RoundRobin => config::Policy::RoundRobin,
        directory::Policy::Random => config::Policy::Random,
        directory::Policy::PowerOfTwoChoices => config::Policy::PowerOfTwoChoices,
        directory::Policy::LeastLoaded => config::Policy::LeastLoaded,
        directory::Policy::Direct => config::Policy::Direct,
        directory::Policy::Hash => config::Policy::Hash,
        directory::Policy::Kv => config::Policy::Kv,
    };
    policy.as_str()
}

fn json(body: &impl Serialize) -> Answer {
    // Structs of strings and numbers always have a JSON form.
    let bytes = serde_json::to_vec(body).unwrap_or_default();
    (StatusCode::OK, JSON, bytes)
}

fn wrong(page: &str, why: &str) -> Answer {
    let text = format!("{page}: {why}\n");
    (StatusCode::BAD_REQUEST, PLAIN, text.into_bytes())
}

#[cfg(test)]
mod tests {
    use corelane_engine::load::Work;
    use corelane_engine::weigh::{Barrier, Seen};

    use super::*;

    #[test]
    fn a_route_is_found_by_its_paths_and_by_its_name() {
        let route = |listen: &str, path: &str| directory::Route {
            listen: listen.into(),
            target: "a/worker/g".into(),
            paths: vec![path.as_bytes().to_vec()],
            ..directory::Route::default()
        };
        let directory = Directory {
            routes: vec![route("a/b/c", "1f/a/b/c"), route("a/b/d", "1f/a/b/d")],
        };
        for (path, place) in [
            ("1f/a/b/c", Some(0)),
            ("1f/a/b/d", Some(1)),
            ("127.0.0.1:7000/1f/a/b/d", Some(1)),
            ("tcp://[::1]:7000/1f/a/b/d", Some(1)),
            ("/a/b/c", Some(0)),
            ("a/b/d", Some(1)),
            ("2f/a/b/d", None),
            ("a/b", None),
            ("", None),
        ] {
            assert_eq!(find(&directory, path), place, "{path}");
        }
        let (status, _, text) = unknown(&directory, "x");
        let text = String::from_utf8(text).unwrap();
        assert_eq!(status, StatusCode::NOT_FOUND);
        assert!(text.contains("offered are a/b/c, a/b/d"), "{text}");
    }

    #[test]
    fn what_the_cores_say_is_added_up() {
        let said = |load: f64, is_reported: bool, barrier: Option<Barrier>| Weighed {
            id: 0x1f,
            address: Some("10.0.0.1:7".parse().unwrap()),
            barrier,
            overlap_blocks: 0,
            busy: Work::default(),
            is_reported,
            load,
            cost: 0.0,
            seen: Seen {
                unanswered: 1,
                streams: 2,
                answered: 3,
                failed: 4,
            },
        };
        let mut instances = BTreeMap::new();
        let left_ns = 1_500_000;
        add(&mut instances, &said(1.0, false, None));
        add(
            &mut instances,
            &said(2.5, false, Some(Barrier::Inhibited { left_ns })),
        );
        let all = &instances[&0x1f];
        assert_eq!((instances.len(), all.id.as_str()), (1, "1f"));
        assert_eq!((all.load, all.reported), (3.5, false));
        let counts = (all.unanswered, all.streams, all.answered, all.failed);
        assert_eq!(counts, (2, 4, 6, 8));
        let barred = (all.barrier.as_deref(), all.barrier_ms, all.barred_cores);
        assert_eq!(barred, (Some("inhibited"), Some(2), 1));
        // What an instance reports, every core knows.
        let mut reported = BTreeMap::new();
        add(&mut reported, &said(5.0, true, None));
        add(&mut reported, &said(4.0, true, None));
        assert_eq!(
            (reported[&0x1f].load, reported[&0x1f].reported),
            (5.0, true)
        );
    }
}
