//! corelane's data plane.
//!
//! A *shard* owns everything of one core: its ring, its buffers, its sockets, its copy of the
//! directory, its counters. See ARCHITECTURE.md for the life of a request.

pub mod buffers;
pub mod operation;
pub mod placement;
pub mod ring;
pub mod timer_wheel;
