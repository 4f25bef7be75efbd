//! GPU memory that outlives the engines which use it: one process owns it, arbitrates who may write
//! and who may read, and lends it out as file descriptors.
//!
//! ```text
//!  engine process                         this crate, in the service's process
//!  client -> region (reserved addresses)  server (sockets, epoll) -> domain (one pool: sessions)
//!     |  handshake = lock, frames            |                        |        |
//!     +--------- Unix socket ----------------+                      lock     store
//!     +<-------- file descriptor -----------------------------------backend (memfd, CUDA)
//! ```
//!
//! Wire compatible with Dynamo's GPU memory service (`spec/gpu-memory.md`), both generations.
//! The crate is a leaf: it knows no runtime, only descriptors, threads and time.

pub mod backend;
pub mod client;
mod complaints;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod domain;
pub mod failover_lock;
pub mod failover_metrics;
pub mod history;
pub mod ipc;
pub mod lane;
pub mod lock;
pub mod paths;
pub mod pinned;
pub mod protocol;
pub mod region;
pub mod server;
pub mod session;
pub mod stats;
pub mod store;
