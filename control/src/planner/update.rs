//! One interval of a planner, as a line of JSON says it. Every part may be left out but the length
//! of the interval; a name that is not known is an error, so that nothing is lost to a typo.

use serde::Deserialize;

/// One adjustment interval. Numbers must be finite; null is "not known".
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Update {
    /// How long it was, in seconds.
    pub interval_s: f64,
    /// Prefill replicas that run.
    pub prefill: Option<Group>,
    /// Decode replicas that run.
    pub decode: Option<Group>,
    /// What was measured. When a part of it is null the interval is skipped from here on.
    pub observed: Option<Observed>,
    /// What the interpolation expected of what was measured: makes the correction factors.
    pub interpolated: Option<Latency>,
    /// The next interval's load.
    pub predicted: Option<Load>,
    /// Replicas wanted, within the GPU budget.
    pub sized: Option<Sized>,
    /// Latencies that are promised.
    pub sla_target: Option<Latency>,
    /// Latencies that are expected of what is planned.
    pub estimated: Option<Latency>,
    /// Requests per second that one engine can take.
    pub capacity: Option<Capacity>,
    /// What the two scalers decided.
    pub decisions: Option<Decisions>,
    /// Each engine's queues; the list replaces the one before.
    pub engines: Option<Vec<Engine>>,
    /// Power, where it is planned.
    pub power: Option<Power>,
    /// How often plans were bent, since the planner's start.
    pub bent: Option<Bent>,
}

/// Replicas of one kind.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// How many.
    pub replicas: f64,
    /// GPUs of each.
    pub gpus: f64,
}

/// What was measured over the interval.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Observed {
    /// Mean time to the first token, in milliseconds.
    pub ttft_ms: Option<f64>,
    /// Mean time between tokens, in milliseconds.
    pub itl_ms: Option<f64>,
    /// Mean duration of a request, in seconds.
    pub request_duration_s: Option<f64>,
    /// Requests in the interval.
    pub requests: Option<f64>,
    /// Mean input length, in tokens.
    pub input_tokens: Option<f64>,
    /// Mean output length, in tokens.
    pub output_tokens: Option<f64>,
}

/// Two latencies.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Latency {
    /// Time to the first token, in milliseconds.
    pub ttft_ms: f64,
    /// Time between tokens, in milliseconds.
    pub itl_ms: f64,
}

/// A load.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Load {
    /// Requests in an interval of the same length.
    pub requests: f64,
    /// Mean input length, in tokens.
    pub input_tokens: f64,
    /// Mean output length, in tokens.
    pub output_tokens: f64,
}

/// Replicas wanted.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Sized {
    /// Of prefill.
    pub prefill: f64,
    /// Of decode.
    pub decode: f64,
}

/// What one engine can take.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Capacity {
    /// A prefill engine, in requests per second.
    pub prefill: f64,
    /// A decode engine, in requests per second.
    pub decode: f64,
}

/// One word for each scaler, such as `scale_up`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Decisions {
    /// Of the one that follows load.
    pub load: Option<String>,
    /// Of the one that follows throughput.
    pub throughput: Option<String>,
}

/// One engine's queues, in tokens.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Engine {
    /// Which worker.
    pub worker_id: String,
    /// Which rank of it.
    #[serde(default)]
    pub dp_rank: u32,
    /// Waiting for prefill.
    #[serde(default)]
    pub queued_prefill_tokens: f64,
    /// Waiting for decode.
    #[serde(default)]
    pub queued_decode_kv_tokens: f64,
    /// Being decoded.
    #[serde(default)]
    pub inflight_decode_kv_tokens: f64,
}

/// Power, in watts.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Power {
    /// What may be used.
    pub budget_watts: f64,
    /// What the plan would use.
    pub projected_watts: f64,
}

/// Counts of bent plans.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Bent {
    /// Clamped while reconciling.
    pub reconcile_clamped: u64,
    /// Capped by a constraint.
    pub constrain_capped: u64,
    /// Short-circuited by a rejection.
    pub reject_short_circuited: u64,
}

/// How a sum and a count grew over an interval, as a Prometheus query tells; planners average so.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Increase {
    /// Of the sum.
    pub sum: f64,
    /// Of the count.
    pub count: f64,
}

impl Increase {
    /// The mean; 0 where nothing was counted, none where the query had no number.
    pub fn mean(self) -> Option<f64> {
        match self {
            Self { sum, count } if sum.is_nan() || count.is_nan() => None,
            Self { count: 0.0, .. } => Some(0.0),
            Self { sum, count } => Some(sum / count),
        }
    }
}

impl Update {
    /// What is wrong with its numbers, if anything is.
    pub fn fault(&self) -> Option<&'static str> {
        if !(self.interval_s.is_finite() && self.interval_s > 0.0) {
            return Some("interval_s must be more than 0");
        }
        let groups = [self.prefill, self.decode];
        let negative = |group: Group| group.replicas < 0.0 || group.gpus < 0.0;
        if groups.into_iter().flatten().any(negative) {
            return Some("replicas and gpus cannot be negative");
        }
        let engines = self.engines.as_deref().unwrap_or_default();
        if engines.len() > ENGINES_MAX {
            return Some("engines has more than 4096 entries");
        }
        let words = self.decisions.iter();
        let mut words = words.flat_map(|both| [&both.load, &both.throughput]);
        let long = |word: &Option<String>| word.as_ref().is_some_and(|word| word.len() > WORD_MAX);
        if words.any(long)
            || engines
                .iter()
                .any(|engine| engine.worker_id.len() > WORD_MAX)
        {
            return Some("a word is longer than 64 bytes");
        }
        None
    }
}

/// Engines in one list.
const ENGINES_MAX: usize = 4_096;
/// Bytes of a word.
const WORD_MAX: usize = 64;
