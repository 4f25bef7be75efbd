//! The topics that Dynamo 1.6.1 uses, all in the scope of an endpoint
//! (spec/events-discovery.md §3.8).

/// Blocks of KV cache stored and removed; published by workers.
pub const KV_EVENTS: &str = "kv-events";
/// Load figures; published by workers.
pub const KV_METRICS: &str = "kv_metrics";
/// Figures of the scheduler, about once a second; published by workers.
pub const FORWARD_PASS_METRICS: &str = "forward-pass-metrics";
/// Sequences begun and ended; published by routers that keep each other informed.
pub const ACTIVE_SEQUENCES: &str = "active_sequences_events";
/// The topic of a broker's record.
pub const BROKER: &str = "broker";
