//! What a planner exports: the metrics of Dynamo's planner under the names of both of its
//! generations, fed by whoever plans (`spec/gpu-memory.md` §7.1).
//!
//! ```text
//! planner --JSON lines--> [planner] socket -> feed -> metrics -> /metrics of `serve`
//!                                             update: one interval, the rules of its gauges
//! ```
//! Beside that, `trace` makes what planners warm up with from traces of requests.

pub mod feed;
pub mod metrics;
mod plugins;
pub mod trace;
pub mod update;

pub use feed::Feed;
pub use metrics::{Applied, PlannerMetrics};
pub use update::Update;
