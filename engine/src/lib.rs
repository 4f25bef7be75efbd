//! corelane's data plane.
//!
//! A *shard* owns everything of one core: its ring, its buffers, its sockets, its copy of the
//! directory, its counters. See ARCHITECTURE.md for the life of a request.

pub mod buffers;
pub mod config;
pub mod connection;
pub mod directory;
pub mod in_flight;
pub mod ledger;
pub mod operation;
pub mod pieces;
pub mod placement;
pub mod preflight;
pub mod ring;
pub mod route;
pub mod send_pool;
pub mod stats;
pub mod table;
pub mod timer_wheel;
pub mod upstream;
