//! What one shard is told at its start. Plain numbers: defaults, files and flags were resolved
//! before.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;

use crate::balance::Imbalance;
use crate::ends::HomeAddress;
use crate::quic::{QuicHome, ResponsePlane};
use crate::served::Tracing;
use crate::steering::Program;

/// In place of a CPU: the kernel moves the shard's thread as it likes.
pub const ANY_CPU: usize = usize::MAX;

/// Settings of one shard.
#[derive(Clone, Debug)]
pub struct ShardConfig {
    /// Index of the shard, from 0; a label in metrics.
    pub shard: usize,
    /// CPU that the shard's thread is pinned to, or [`ANY_CPU`].
    pub cpu: usize,
    /// Which ring moves its bytes.
    pub ring: RingKind,
    /// Whether an idle shard blocks or spins.
    pub idle: Idle,
    /// Where requests are accepted; `None` for a shard that only calls.
    pub listen: Option<SocketAddr>,
    /// A socket that listens already and is used in place of `listen`; other shards may share it.
    /// For epoll it must not block. Nothing is accepted before [`crate::command::Command::Accept`].
    pub handed: Option<Arc<TcpListener>>,
    /// Chooses the shard of a connection in the kernel; all that listen on one port share the one
    /// that was given last.
    pub steering: Option<Program>,
    /// Connections that come here while others have fewer.
    pub imbalance: Imbalance,
    /// Microseconds for which the ring polls the devices' receive queues before it sleeps; 0 leaves
    /// them to their interrupts.
    pub busy_poll_us: u32,
    /// Entries of its ring; a power of two.
    pub ring_depth: u32,
    /// Memory node that its memory is taken from; `None`: where its thread runs.
    pub numa_node: Option<u32>,
    /// Connections of all kinds, at most.
    pub connections_max: u32,
    /// Bytes of one receive buffer.
    pub buffer_bytes: u32,
    /// Receive buffers; a power of two up to 32 768.
    pub buffers: u16,
    /// Requests between their arrival and their end, at most.
    pub in_flight_max: u32,
    /// Largest request frame, all its bytes counted (`DYN_TCP_MAX_MESSAGE_SIZE`).
    pub message_bytes_max: u64,
    /// Bytes that may wait for one instance's socket before its requests are refused.
    pub upstream_queue_bytes: u32,
    /// Addresses of instances that it may be connected to, at most.
    pub upstreams_max: u32,
    /// Instances that it may know, at most; more are left out.
    pub instances_max: u32,
    /// Records of the flight recorder, rounded up to a power of two; 0 is none.
    pub flight_records: u32,
    /// Where workers call home whose responses are relayed; `None` when no route relays.
    pub relay_home: Option<HomeAddress>,
    /// Accepted connections speak TLS, calls home too; see [`crate::adopt`].
    pub secure_accepts: bool,
    /// Dialled connections speak TLS.
    pub secure_dials: bool,
    /// The transport of responses; callers who want another are told so.
    pub response_plane: ResponsePlane,
    /// Where responses come on QUIC: those of calls if that is the plane, and those that are
    /// relayed on it.
    pub quic_home: Option<QuicHome>,
    /// The transport of relayed responses between worker and us; `None`: as the caller asks.
    pub relay_plane: Option<ResponsePlane>,
    /// Whether requests that it routes make spans: [`crate::routed`].
    pub spans: Tracing,
}

/// The implementation of the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingKind {
    /// io_uring under a glommio executor.
    Uring,
    /// epoll on a plain pinned thread.
    Epoll,
}

/// What a shard does when there is nothing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Idle {
    /// Waits in the kernel.
    Block,
    /// Polls without end, for the lowest latency; burns its CPU.
    Spin,
}

impl ShardConfig {
    /// The defaults of the configuration for shard `shard` on `cpu`, listening on `listen`.
    pub fn new(shard: usize, cpu: usize, ring: RingKind, listen: Option<SocketAddr>) -> Self {
        ShardConfig {
            shard,
            cpu,
            ring,
            idle: Idle::Block,
            listen,
            handed: None,
            steering: None,
            imbalance: Imbalance::Keep,
            busy_poll_us: 0,
            ring_depth: 512,
            numa_node: None,
            connections_max: 16_384,
            buffer_bytes: 16_384,
            buffers: 4_096,
            in_flight_max: 65_536,
            message_bytes_max: 33_554_432,
            upstream_queue_bytes: 64 << 20,
            upstreams_max: 16_384,
            instances_max: 65_536,
            flight_records: 65_536,
            relay_home: None,
            secure_accepts: false,
            secure_dials: false,
            response_plane: ResponsePlane::Tcp,
            quic_home: None,
            relay_plane: None,
            spans: Tracing::Off,
        }
    }

    /// What of this may change while the shard runs.
    pub fn live(&self) -> LiveSettings {
        LiveSettings {
            idle: self.idle,
            connections_max: self.connections_max,
            in_flight_max: self.in_flight_max,
            upstream_queue_bytes: self.upstream_queue_bytes,
            message_bytes_max: self.message_bytes_max,
            imbalance: self.imbalance,
            busy_poll_us: self.busy_poll_us,
        }
    }
}

/// What of a [`ShardConfig`] may change while the shard runs, by
/// [`crate::command::Command::Settings`]. The fields mean what they mean there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LiveSettings {
    /// Whether it blocks or spins.
    pub idle: Idle,
    /// Connections, at most; no more than it began with.
    pub connections_max: u32,
    /// Requests, at most; no more than it began with.
    pub in_flight_max: u32,
    /// Bytes that may wait for one instance's socket.
    pub upstream_queue_bytes: u32,
    /// Largest request frame in bytes.
    pub message_bytes_max: u64,
    /// Connections that come here while others have fewer, from now on.
    pub imbalance: Imbalance,
    /// How long receive queues are polled; a ring that refuses it is told of in
    /// [`crate::command::Report::NoBusyPoll`], and does not poll.
    pub busy_poll_us: u32,
}
