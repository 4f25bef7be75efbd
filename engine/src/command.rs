//! What control and a shard say to each other.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::task::Waker;

use crate::adopt::{Adoption, Errand, Ticket};
use crate::balance::Neighbour;
use crate::config::LiveSettings;
use crate::directory::Directory;
use crate::handler::NewHandler;
use crate::kv::{Batch, Reports};
use crate::lane::NewLane;
use crate::local::Run;
use crate::mesh::{Receiver, Sender};
use crate::quic::{Inbound, Outbound};
use crate::routed::RoutedSpan;
use crate::served::SpanRecord;
use crate::settings::Census;
use crate::steering::Program;
use crate::weigh::Question;

/// What control asks of a shard.
#[derive(Debug)]
pub enum Command {
    /// A new directory.
    Directory(Arc<Directory>),
    /// KV caches have changed.
    Kv(Arc<Batch>),
    /// Instances have said how busy they are.
    Loads(Arc<Reports>),
    /// What would be chosen, and why.
    Weigh(Box<Question>),
    /// Other settings, from now on.
    Settings(LiveSettings),
    /// Which routes are still in use.
    Census(Census),
    /// One more handler: the next index, served once [`Command::Serve`] gives it a path.
    Handler(NewHandler),
    /// From now on exactly these paths are served by handlers of this process.
    Serve(Vec<LocalPath>),
    /// An instance that calls may be under way to has left discovery.
    InstanceLeft {
        /// Its address.
        address: SocketAddr,
        /// Its path.
        path: Vec<u8>,
    },
    /// A worker shares memory with this shard.
    Lane(Box<NewLane>),
    /// A worker with lanes is gone.
    EndLanes {
        /// Which.
        worker: u64,
    },
    /// The handshake on a socket of the shard's has ended.
    Adopt {
        /// Which socket.
        ticket: Ticket,
        /// What it is now.
        adoption: Adoption,
    },
    /// The peer of an adopted socket has reset it.
    Broken {
        /// Which socket.
        ticket: Ticket,
        /// Why.
        errno: i32,
    },
    /// A worker has answered on QUIC.
    Inbound(Inbound),
    /// Run a task on the shard. It is dropped at once when 65,536 such tasks run already.
    Run(Run),
    /// Wake a task of the shard. Its executor hears late of those who do it from other threads:
    /// glommio looks for them every 100 ms.
    Wake(Waker),
    /// The other shards of this process, for [`crate::balance::Imbalance::LeastConnections`].
    Neighbours(Vec<Neighbour>),
    /// A connection that another shard has accepted and that is to be served here; nothing was read
    /// from it.
    TakeOver(OwnedFd),
    /// Another program chooses the shard of a connection from now on, for all that listen together
    /// with this one; connections that are open stay where they are.
    Steer(Program),
    /// Accept connections from the socket that was handed over; to be said once.
    Accept,
    /// Refuse new requests from now on.
    Drain,
    /// End the loop after this tick.
    Stop,
}

/// A request path and who answers there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalPath {
    /// The path, byte for byte.
    pub path: Vec<u8>,
    /// Index into [`crate::ends::Ends::handlers`], to which [`Command::Handler`] adds.
    pub handler: u32,
}

/// What a shard tells control.
#[expect(
    clippy::large_enum_variant,
    reason = "a shard takes no memory for a request that it routes"
)]
#[derive(Debug, PartialEq, Eq)]
pub enum Report {
    /// The shard listens.
    Started {
        /// Where.
        address: Option<SocketAddr>,
    },
    /// A request was acknowledged and then could not be understood; at most one a second is told,
    /// the counter has them all.
    Undecodable {
        /// What was wrong.
        why: String,
    },
    /// A worker has lost its lane to this shard and should lose the others.
    LaneEnded {
        /// Which worker.
        worker: u64,
        /// What it did.
        why: Option<&'static str>,
    },
    /// A peer speaks TLS where we do not; at most one a second is told.
    Stranger,
    /// The ring does not poll the devices' queues as it was told to.
    NoBusyPoll {
        /// The kernel's answer.
        errno: i32,
    },
    /// The program of [`Command::Steer`] does not steer; the one before it does.
    Unsteered {
        /// The kernel's answer.
        errno: i32,
    },
    /// The span of a request that has ended; only where spans are made, and lost when this queue is
    /// full.
    Span(Box<SpanRecord>),
    /// The span of a request that was routed, and the directory that its route is a place of; lost
    /// when this queue is nearly full.
    Routed(RoutedSpan, Arc<Directory>),
    /// The shard has ended; nobody reads its queue any more.
    Stopped {
        /// Why, if not because it was asked to.
        failure: Option<String>,
    },
}

/// The shard's ends of its queues from and to control.
pub struct Lanes {
    /// What control asks.
    pub commands: Receiver<Command>,
    /// What the shard tells.
    pub reports: Sender<Report>,
    /// Sockets that wait for their handshake, or for a farewell; unused without TLS.
    pub insecure: Sender<Errand>,
    /// Responses that leave on QUIC.
    pub outbound: Sender<Outbound>,
}
