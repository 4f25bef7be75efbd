//! corelane: library behind the binary.
pub mod config;
pub mod env;
pub mod logging;
