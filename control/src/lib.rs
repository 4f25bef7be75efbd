//! corelane: library behind the binary.

pub mod cards;
pub mod discovery;
pub mod lease;
pub mod status_server;
pub mod watch;
