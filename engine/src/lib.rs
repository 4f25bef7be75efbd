//! corelane's data plane.
//!
//! A *shard* owns everything of one core: its ring, its buffers, its sockets, its copy of the
//! directory, its counters. See ARCHITECTURE.md for the life of a request.

mod accept;
pub mod adopt;
pub mod buffers;
pub mod call;
mod call_frame;
mod call_link;
pub mod client;
mod collect;
pub mod command;
pub mod config;
pub mod connection;
mod decode;
pub mod directory;
mod due;
pub mod ends;
pub mod executor;
mod forward;
pub mod handler;
mod home;
pub mod host;
pub mod in_flight;
pub mod lane;
pub mod ledger;
mod link;
pub mod local;
pub mod mesh;
mod mux;
mod mux_home;
mod mux_link;
pub mod operation;
pub mod outgoing;
pub mod pieces;
pub mod placement;
pub mod preflight;
mod recv;
mod respond;
mod respond_stream;
pub mod responder;
pub mod ring;
pub mod route;
pub mod send_pool;
pub mod served;
mod settle;
pub mod shard;
mod socket;
pub mod stats;
pub mod table;
mod tell;
pub mod timer_wheel;
pub mod times;
pub mod upstream;
mod worker;
