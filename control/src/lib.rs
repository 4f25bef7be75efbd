//! corelane: library behind the binary.
pub mod cli;
pub mod commands;
pub mod config;
pub mod env;
pub mod logging;
