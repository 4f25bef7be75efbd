//! What a running process says beside `/metrics`: how its instances stand with its cores, and what
//! it would choose for a request, and why. Read by `corelane top` and `corelane explain`.
//!
//! | path | query | answer |
//! |---|---|---|
//! | `/overview` | `instances`: so many of each route are listed, 256 if absent | an [`Overview`] |
//! | `/explain` | `path`; `header=NAME=VALUE`, again for each; `core` | an [`Explanation`] |
//!
//! Both are JSON. Members are added to them, and not taken away, without a new `version`. An
//! answer has [`ROUTES_MAX`] routes at most. The cores are asked by a command each and answer
//! between two turns; one that does not within [`ANSWER_MAX`] is left out and said so, and one that
//! has [`UNANSWERED_MAX`] questions before it is asked no more.

use std::time::Duration;

use serde::{Deserialize, Serialize};

mod ask;
mod pages;
mod why;

pub use pages::{Pages, Sources};

/// Where an [`Overview`] is.
pub const OVERVIEW: &str = "/overview";
/// Where an [`Explanation`] is.
pub const EXPLAIN: &str = "/explain";
/// The shape of both.
pub const VERSION: u32 = 1;
/// Routes of an answer, at most.
pub const ROUTES_MAX: usize = 256;
/// Instances of each route that are listed, at most, and fewer where there are many routes: 16,384
/// in all.
pub const INSTANCES_MAX: usize = 4096;
/// The same, unless the query says otherwise.
pub const INSTANCES: usize = 256;
/// Longest wait for what the cores say.
pub const ANSWER_MAX: Duration = Duration::from_secs(2);
/// Questions that a core has not answered, at most: as many as its queue can take beside commands.
pub const UNANSWERED_MAX: usize = 512;

/// A process at one moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Overview {
    /// [`VERSION`].
    pub version: u32,
    /// Of the program.
    pub program: String,
    /// Since its start.
    pub uptime_ms: u64,
    /// Whether it is leaving.
    pub draining: bool,
    /// Our instance id in discovery, in hexadecimal; with etcd it is our lease.
    pub identity: Option<String>,
    /// Where callers of the request plane are told to go.
    pub address: String,
    /// Where instances are found: `memory`, `file`, `etcd`, ...
    pub discovery: String,
    /// Its cores.
    pub cores: Vec<Core>,
    /// Its routes, in the order of the configuration.
    pub routes: Vec<Route>,
    /// Routes that are not listed.
    pub routes_left_out: usize,
}

/// One core.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Core {
    /// Its number, as in the labels of metrics.
    pub core: u64,
    /// Its CPU; none if it is on any.
    pub cpu: Option<u64>,
    /// `uring` or `epoll`.
    pub ring: String,
    /// `block` or `spin`.
    pub idle: String,
    /// Receive buffers that it has.
    pub buffers: u64,
    /// Whether it has answered.
    pub answers: bool,
}

/// One route.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Route {
    /// The endpoint that we offer.
    pub listen: String,
    /// The endpoint whose instances get the requests.
    pub target: String,
    /// How one is chosen.
    pub policy: String,
    /// `direct` or `relay`.
    pub response: String,
    /// Whether its workers are behind lanes.
    pub lane: bool,
    /// Whether our record stands in discovery.
    pub registered: bool,
    /// Whether the list of instances is what the store says now.
    pub fresh: bool,
    /// In the order of their ids.
    pub instances: Vec<Instance>,
    /// Instances that are not listed.
    pub instances_left_out: usize,
}

/// One instance, all cores taken together.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Instance {
    /// Its id, in hexadecimal.
    pub id: String,
    /// Where it is dialled; none behind a lane.
    pub address: Option<String>,
    /// What policies by load compare: the sum over the cores, or the most that one has by report.
    pub load: f64,
    /// Whether that is what it reports.
    pub reported: bool,
    /// Requests given to it and not answered.
    pub unanswered: u64,
    /// Responses of its that are relayed and have not ended; requests of its lanes.
    pub streams: u64,
    /// Requests that it has accepted.
    pub answered: u64,
    /// Requests that it has refused or lost.
    pub failed: u64,
    /// Why it gets nothing from some core: `inhibited`, `unreachable`, `overloaded`, `queue_full`
    /// or `closing`.
    pub barrier: Option<String>,
    /// How long that lasts, where it is known.
    pub barrier_ms: Option<u64>,
    /// Cores from which it gets nothing.
    pub barred_cores: u64,
}

/// What would be chosen for a request, and why.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Explanation {
    /// [`VERSION`].
    pub version: u32,
    /// The endpoint that the path means.
    pub listen: String,
    /// The endpoint whose instances get the request.
    pub target: String,
    /// How one is chosen.
    pub policy: String,
    /// The header that the policy looks at.
    pub header: Option<String>,
    /// What it has found there: an instance id, or a hash, in hexadecimal.
    pub hint: Option<String>,
    /// Blocks of the prompt, where the policy looks at it.
    pub prompt_blocks: u32,
    /// The core whose choice this is: each chooses for the connections that it has.
    pub core: u64,
    /// The instance that would get the request.
    pub chosen: Option<String>,
    /// Why that one, or why none.
    pub why: String,
    /// In the order of their ids.
    pub candidates: Vec<Candidate>,
    /// Candidates that are not listed.
    pub left_out: usize,
    /// What the other cores would choose.
    pub others: Vec<Choice>,
}

/// What another core would choose.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Choice {
    /// The core.
    pub core: u64,
    /// Whether it has answered.
    pub answers: bool,
    /// The instance.
    pub chosen: Option<String>,
}

/// One candidate.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Candidate {
    /// Its id, in hexadecimal.
    pub id: String,
    /// Where it is dialled; none behind a lane.
    pub address: Option<String>,
    /// Whether it would get the request.
    pub chosen: bool,
    /// Why, or why not.
    pub why: String,
    /// Why it gets nothing now, as in [`Instance::barrier`].
    pub barrier: Option<String>,
    /// How long that lasts, where it is known.
    pub barrier_ms: Option<u64>,
    /// What policies by load compare.
    pub load: f64,
    /// Whether that is what it reports.
    pub reported: bool,
    /// Blocks of the prompt in its KV cache.
    pub overlap_blocks: u32,
    /// What the policy `kv` compares.
    pub cost: f64,
    /// Requests given to it and not answered.
    pub unanswered: u32,
    /// Responses of its that are relayed and have not ended; requests of its lanes.
    pub streams: u32,
    /// Requests that it has accepted.
    pub answered: u64,
    /// Requests that it has refused or lost.
    pub failed: u64,
}
