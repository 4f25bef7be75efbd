//! corelane: library behind the binary.
//!
//! Everything here runs on the control core; the shards of `corelane-engine` are told what they
//! need by snapshots and never wait for it.

pub mod activation;
pub mod bridge;
pub mod broker;
pub mod broker_metrics;
pub mod call;
pub mod cards;
pub mod cli;
pub mod commands;
pub mod component;
pub mod config;
pub mod cores;
pub mod discovery;
pub mod doctor;
pub mod echo;
pub mod engine_routes;
pub mod env;
pub mod events;
pub mod feeds;
pub mod flight;
pub mod gpu_memory;
pub mod gpu_metrics;
pub mod health;
pub mod lanes;
pub mod lease;
pub mod logging;
pub mod manager;
pub mod metrics;
pub mod nats;
pub mod offer;
pub mod overview;
pub mod planner;
pub mod preflight;
pub mod progress;
pub mod publish;
pub mod quic;
pub mod reload;
pub mod roster;
pub mod sights;
pub mod signals;
pub mod slots;
pub mod status_client;
pub mod status_server;
pub mod steering;
pub mod supervise;
pub mod tls;
pub mod top;
pub mod trace;
pub mod tune;
pub mod watch;
pub mod words;
