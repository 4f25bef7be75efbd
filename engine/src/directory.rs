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
    /// Sorted by id.
    pub instances: Vec<Instance>,
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
