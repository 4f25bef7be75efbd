//! The event plane: one thread with a ring of its own that takes events from publishers and passes
//! them on to subscribers (spec/events-discovery.md §3).
//!
//! ```text
//! publishers --ZMTP--> [door XSUB]  --.                  .--> [door XPUB] --ZMTP--> subscribers
//!            --plain-> [door plain] --+--> trie, queues -+--> [door plain] -frames->
//! dialled PUB sockets of others ------'                  '--> dialled XSUB sockets of others
//! ```
//!
//! An event is received once. What is queued for a subscriber is where it lies: a buffer, a
//! beginning and an end; the bytes of a ZMTP message are the same on its way in and on its way out,
//! so that events which follow each other leave as one span. A subscriber that does not read has
//! a bounded queue and delays nobody.
//!
//! The plane is a shard of its own rather than a role of the request shards: every subscriber wants
//! the events of every publisher, so on several shards each event would cross between them, and
//! their requests would wait behind bursts of events.

use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

mod asks;
mod crossing;
#[cfg(feature = "curve")]
mod curve;
mod fan_out;
mod incoming;
mod local;
mod memory;
mod plain;
mod plane;
mod queue;
mod relief;
mod security;
mod sequence;
mod session;
mod socket;
pub mod stats;
mod subscriptions;
mod take;
mod thread;
mod wishes;

#[cfg(feature = "curve")]
pub use curve::{CurveClient, CurveServer, draw_keys};
pub use security::Security;
pub use thread::{PlaneHandle, spawn};

use crate::config::{Idle, RingKind};
use crate::mesh::Sender;

/// What happens to an event that a subscriber's queue has no room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overflow {
    /// It is dropped for this subscriber.
    DropNewest,
    /// The oldest that have not been begun are dropped for it.
    DropOldest,
    /// The subscriber is disconnected, and may come again.
    Disconnect,
}

/// Who comes in by a door, and how he speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DoorKind {
    /// ZMTP publishers; we are their XSUB.
    Publishers,
    /// ZMTP subscribers; we are their XPUB.
    Subscribers,
    /// Both, without ZMTP: a hello, then frames.
    Plain,
}

/// Sessions of one group see each other's events and no others': the broker is group 0, and each
/// publisher or subscriber in direct mode has one of its own.
pub type Group = u16;

/// A listening socket.
#[derive(Debug)]
pub struct Door {
    /// It is bound and listens.
    pub listener: TcpListener,
    /// For whom.
    pub kind: DoorKind,
    /// Whose events.
    pub group: Group,
    /// How it is protected; plain doors are not.
    pub security: Security,
}

/// Settings of the plane.
#[derive(Clone, Debug)]
pub struct PlaneConfig {
    /// CPU that its thread is pinned to, or [`crate::config::ANY_CPU`].
    pub cpu: usize,
    /// Which ring moves its bytes.
    pub ring: RingKind,
    /// Whether it sleeps in the kernel when there is nothing to do.
    pub idle: Idle,
    /// Sessions with publishers and subscribers, at most.
    pub sessions_max: u32,
    /// Bytes of one receive buffer.
    pub buffer_bytes: u32,
    /// Receive buffers; a power of two up to 32 768.
    pub buffers: u16,
    /// Largest event, all parts counted; a publisher that declares more is disconnected.
    pub event_bytes_max: u32,
    /// Events that wait for one subscriber, at most.
    pub queue_events_max: u32,
    /// Bytes of them, at most.
    pub queue_bytes_max: u32,
    /// Bytes that wait for all subscribers; beyond it, each may have 1 MiB waiting and no more.
    pub memory_bytes_max: u64,
    /// What happens at the bound.
    pub overflow: Overflow,
    /// Pairs of a subscriber and a prefix, at most.
    pub subscriptions_max: u32,
}

impl PlaneConfig {
    /// The defaults of the configuration.
    #[must_use]
    pub fn new(ring: RingKind) -> PlaneConfig {
        PlaneConfig {
            cpu: crate::config::ANY_CPU,
            ring,
            idle: Idle::Block,
            sessions_max: 4096,
            buffer_bytes: 32 << 10,
            buffers: 2048,
            event_bytes_max: 8 << 20,
            queue_events_max: 100_000,
            queue_bytes_max: 64 << 20,
            memory_bytes_max: 512 << 20,
            overflow: Overflow::DropNewest,
            subscriptions_max: 65_536,
        }
    }
}

/// An event on its way from or to a task of this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalEvent {
    /// Full subject, or the bare topic in a group of direct mode.
    pub subject: Vec<u8>,
    /// The publisher's number.
    pub publisher_id: u64,
    /// The event's number.
    pub sequence: u64,
    /// The 5-byte prefix and the envelope.
    pub frame: Vec<u8>,
}

/// Where the events of a subscription of this process go. It is called on the plane's thread, which
/// it must not hold up.
pub trait Sink: Send {
    /// Takes an event. `false`: there is no room for it; it is dropped and counted.
    fn take(&mut self, event: LocalEvent) -> bool;

    /// Called once after everything that a turn of the plane has brought.
    fn wake(&mut self) {}
}

impl Sink for Sender<LocalEvent> {
    fn take(&mut self, event: LocalEvent) -> bool {
        self.push(event).is_ok()
    }

    fn wake(&mut self) {
        Sender::wake(self);
    }
}

/// What somebody waits for, see [`Command::Ask`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// Nothing waits for the group's subscribers any more.
    Sent,
    /// A subscriber of the group wants something.
    Wanted,
}

/// Told whether what was waited for has come.
pub type Answer = Box<dyn FnOnce(bool) + Send>;

/// Which side of a session the peer is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// It sends events to us.
    Publisher,
    /// It takes events from us.
    Subscriber,
}

/// What the plane is told.
pub enum Command {
    /// Another door, for a publisher in direct mode for example.
    Open(Door),
    /// Connects to a ZMTP socket, again and again when it is lost: to a publisher's PUB, or to a
    /// broker's XPUB ([`Side::Publisher`]); to a broker's XSUB ([`Side::Subscriber`]).
    Dial {
        /// To be named by [`Command::Hang`].
        dial: u64,
        /// Where.
        address: SocketAddr,
        /// What is there.
        side: Side,
        /// Whose events.
        group: Group,
        /// How it is protected.
        security: Security,
    },
    /// Ends a dial, and its session.
    Hang {
        /// Which one.
        dial: u64,
    },
    /// Ends the doors of a group, and whoever came in by them once nothing waits for him any more,
    /// or after a second.
    Shut {
        /// Whose doors.
        group: Group,
    },
    /// Events of this group whose subjects begin with one of the prefixes go to this sink.
    Subscribe {
        /// To be named by [`Command::Unsubscribe`].
        consumer: u64,
        /// Whose events.
        group: Group,
        /// Which ones.
        prefixes: Vec<Vec<u8>>,
        /// Where to.
        events: Box<dyn Sink>,
    },
    /// Ends it.
    Unsubscribe {
        /// Which one.
        consumer: u64,
    },
    /// An event of this process.
    Publish {
        /// Whose.
        group: Group,
        /// What.
        event: LocalEvent,
    },
    /// Answers once something is so, or when the time is over. Commands before it have been done.
    Ask {
        /// Of which group.
        group: Group,
        /// What.
        until: Until,
        /// How long it is waited for.
        within: Duration,
        /// Called on the plane's thread; dropped uncalled if too many ask, or at the end.
        answer: Answer,
    },
    /// The end: doors are closed, queues are emptied for a second at most.
    Stop,
}

/// What the plane tells control, for its log. Repeated ones are told once a second.
#[derive(Debug)]
pub enum Report {
    /// A session is established.
    Opened {
        /// The peer.
        peer: SocketAddr,
        /// What it is.
        side: Side,
    },
    /// A session has ended.
    Closed {
        /// The peer.
        peer: SocketAddr,
        /// What it was; `None` if it never said.
        side: Option<Side>,
        /// Why we ended it; `None`: the peer did.
        why: Option<String>,
    },
    /// A publisher's event was no event, and was dropped.
    Bad {
        /// The publisher.
        peer: SocketAddr,
        /// What was wrong.
        why: String,
        /// So many of this session until now.
        so_far: u64,
    },
    /// Events are dropped for a subscriber that does not read fast enough.
    Dropping {
        /// The subscriber.
        peer: SocketAddr,
        /// So many of this session until now.
        so_far: u64,
    },
    /// A publisher's numbers have a gap.
    Lost {
        /// The publisher's number.
        publisher_id: u64,
        /// Events that have not come, of all publishers until now.
        so_far: u64,
    },
    /// The thread goes on without the CPU that was meant for it.
    NotPinned {
        /// Which one.
        cpu: usize,
        /// Why.
        why: String,
    },
    /// The thread has ended.
    Stopped {
        /// Why, unless it was told to.
        failure: Option<String>,
    },
}
