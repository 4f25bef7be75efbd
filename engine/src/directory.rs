//! What the router reads: the routes, and for each route the instances that may get its requests.
//!
//! The type belongs to its reader. Control builds a new directory for each change in discovery and
//! publishes it to every shard; a shard swaps the pointer between two ticks and never clones it on
//! behalf of a request.

use std::net::SocketAddr;

/// All routes of this process. A snapshot; never changed once published.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Directory {
    /// In the order of the configuration.
    pub routes: Vec<Route>,
}

/// One endpoint that we offer, and where its requests go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// `ns/comp/ep` as offered; names the route in refusals and metrics.
    pub listen: String,
    /// `ns/comp/ep` of the instances.
    pub target: String,
    /// The exact request paths that select this route (spec/request-plane.md §2.1). More than one
    /// while clients may still hold an address from before a lost lease.
    pub paths: Vec<Vec<u8>>,
    /// How an instance is chosen.
    pub policy: Policy,
    /// Name of the request header that `direct` and `hash` look at.
    pub header: String,
    /// When the caller gets its reply.
    pub ack: Ack,
    /// A forward that the instance has not answered for so long has failed.
    pub ack_timeout_ns: u64,
    /// A request is tried on at most so many instances after the first.
    pub retries_max: u8,
    /// A frame larger than this is not kept for a retry, in bytes.
    pub hold_bytes: u32,
    /// How responses travel: `None`, the worker dials the caller himself.
    pub relay: Option<RelayTimes>,
    /// Its requests go to workers behind lanes, and not to instances.
    pub lane: bool,
    /// What decides where [`Policy::Kv`] is the policy.
    pub kv: Option<KvRule>,
    /// What its instances' load is.
    pub load: LoadRule,
    /// Sorted by id.
    pub instances: Vec<Instance>,
}

/// A route that nothing leads to, and that leads nowhere.
impl Default for Route {
    fn default() -> Self {
        Self {
            listen: String::new(),
            target: String::new(),
            paths: Vec::new(),
            policy: Policy::RoundRobin,
            header: String::new(),
            ack: Ack::OnForward,
            ack_timeout_ns: 0,
            retries_max: 0,
            hold_bytes: 0,
            relay: None,
            lane: false,
            kv: None,
            load: LoadRule::OWN,
            instances: Vec::new(),
        }
    }
}

/// The responses of a route pass through us; how long its instances may take. 0 is for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelayTimes {
    /// From the acknowledgement to the call home.
    pub home_ns: u64,
    /// From the forward to the first item.
    pub first_item_ns: u64,
    /// From one item to the next.
    pub inactivity_ns: u64,
}

/// One instance of a route's target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instance {
    /// The instance id of discovery.
    pub id: u64,
    /// Where its request plane listens.
    pub address: SocketAddr,
    /// The path that its frames carry, 1 to 65 535 bytes, sent as it is.
    pub path: Vec<u8>,
}

/// How a route chooses an instance among those that can be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// One after the other, by id.
    RoundRobin,
    /// Each with equal chance.
    Random,
    /// The less loaded of two drawn at random.
    PowerOfTwoChoices,
    /// The least loaded of all; ties by chance.
    LeastLoaded,
    /// The one whose id, in hex, stands in the route's header.
    Direct,
    /// Rendezvous hashing of the route's header: equal values go to the same instance as long as
    /// it lives. A request without the header is placed round robin.
    Hash,
    /// The one at which the request costs least: by what of its prompt is in the instance's KV
    /// cache, and by how busy it is. See [`KvRule`].
    Kv,
}

/// The cost of a request at an instance, in blocks of KV cache, is Dynamo's:
/// `prefill_scale * max(prefill + prompt - overlap_credit * overlap, 0) + decode + prompt`, where
/// `prefill` and `decode` are what the instance is busy with, and `overlap` is what it has of the
/// prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvRule {
    /// Number of the feed of KV events, and so of the index; routes to one target share it.
    pub feed: u32,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// So many bytes of a body are looked into for token ids; 0: none are.
    pub body_bytes_max: u32,
    /// Blocks of the index, at most.
    pub blocks_max: u32,
    /// Ranks of the index, at most.
    pub ranks_max: u32,
    /// What a block in the cache is worth, in percent of a block to be computed.
    pub overlap_credit_pct: u32,
    /// What a block to be computed costs, in percent of a block held.
    pub prefill_scale_pct: u32,
    /// Percent: 0 takes the least cost; more than that draws, the more evenly the higher it is.
    pub temperature_pct: u32,
}

/// What counts as the load of an instance whose responses are not relayed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadRule {
    /// Whom to believe.
    pub source: LoadSource,
    /// Number of the feed of load events.
    pub feed: u32,
    /// A report older than this does not count.
    pub stale_ns: u64,
    /// Blocks that a request is taken for whose prompt is not known.
    pub request_blocks: u32,
}

impl LoadRule {
    /// What this core knows by itself.
    pub const OWN: LoadRule = LoadRule {
        source: LoadSource::Own,
        feed: 0,
        stale_ns: 0,
        request_blocks: 0,
    };
}

impl Default for LoadRule {
    fn default() -> LoadRule {
        LoadRule::OWN
    }
}

/// Whom to believe about an instance's load, and how it is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadSource {
    /// What this core gave it lately.
    Own,
    /// Requests that it says it has.
    Requests,
    /// Blocks that it says it computes or holds.
    Blocks,
}

/// When the caller of a route gets its reply frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ack {
    /// As soon as the frame has been accepted by a socket of a live instance; we fail over
    /// ourselves after that.
    OnForward,
    /// When the instance has answered, with its answer.
    OnAccept,
}
