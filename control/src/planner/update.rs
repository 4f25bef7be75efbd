//! One interval of a planner, as a line of JSON says it. Every part may be left out but the length
//! of the interval; a name that is not known is an error, so that nothing is lost to a typo.

use serde::Deserialize;

use crate::words::words;

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
    /// What became of each plugin in each stage of the interval's ticks.
    pub plugins: Option<Vec<PluginCall>>,
    /// The interval's ticks.
    pub ticks: Option<Vec<Tick>>,
    /// Each time that a plan was bent.
    pub bent: Option<Vec<Bent>>,
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

/// One plugin in one stage of a tick.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct PluginCall {
    /// Which plugin.
    pub plugin_id: String,
    /// Which stage of the tick.
    #[serde(default)]
    pub stage: String,
    /// What came of it, if it was its turn.
    pub result: Option<Outcome>,
    /// How long the call took, in seconds; counts where it succeeded.
    pub latency_s: Option<f64>,
    /// How its circuit breaker stands.
    pub circuit: Option<Circuit>,
    /// How old the result is that stood in for a call, in seconds.
    pub cache_age_s: Option<f64>,
    /// What it overrode; the other kinds are then no longer active.
    #[serde(default)]
    pub overrides: Vec<Override>,
    /// How late it was called, in seconds.
    pub lag_s: Option<f64>,
    /// It was not due.
    #[serde(default)]
    pub skipped: bool,
    /// What it needs and was not there.
    pub missing_field: Option<String>,
}

words! {
    /// What came of a call.
    Outcome {
        /// The plugin had nothing to say.
        Accept = "accept",
        /// It set a number.
        Set = "set",
        /// It set a least number.
        AtLeast = "at_least",
        /// It set a greatest number.
        AtMost = "at_most",
        /// It rejected the plan.
        Reject = "reject",
        /// It did not answer in time.
        Timeout = "timeout",
        /// It failed.
        Error = "error",
        /// An earlier result stood in.
        HeldOver = "held_over",
    }
}

words! {
    /// What a plugin overrides.
    Override {
        /// A number.
        Set = "SET",
        /// A least number.
        AtLeast = "AT_LEAST",
        /// A greatest number.
        AtMost = "AT_MOST",
        /// The whole plan.
        Reject = "REJECT",
    }
}

words! {
    /// How a circuit breaker stands.
    Circuit {
        /// Calls go through.
        Closed = "closed",
        /// One call is tried.
        HalfOpen = "half_open",
        /// No calls are made.
        Open = "open",
    }
}

impl Circuit {
    /// Its number in metrics.
    pub fn level(self) -> f64 {
        match self {
            Self::Closed => 0.0,
            Self::HalfOpen => 0.5,
            Self::Open => 1.0,
        }
    }
}

words! {
    /// How a plan was bent.
    Bend {
        /// Clamped while reconciling.
        ReconcileClamped = "reconcile_clamped",
        /// Capped by a constraint.
        ConstrainCapped = "constrain_capped",
        /// Short-circuited by a rejection.
        RejectShortCircuited = "reject_short_circuited",
    }
}

/// One tick of the plugins.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Tick {
    /// How long it took, in seconds.
    pub duration_s: f64,
    /// It took too long and was ended.
    #[serde(default)]
    pub timed_out: bool,
}

/// One plan that was bent.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Bent {
    /// How.
    pub what: Bend,
    /// Of which workers; nothing for a rejection, which is of the whole plan.
    #[serde(default)]
    pub sub_component_type: String,
    /// By which plugin.
    pub source: String,
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
        self.fault_of_words().or_else(|| self.fault_of_plugins())
    }

    fn fault_of_words(&self) -> Option<&'static str> {
        let decisions = self.decisions.iter();
        let decisions = decisions.flat_map(|both| [&both.load, &both.throughput]);
        let engines = self.engines.iter().flatten().map(|one| &one.worker_id);
        let calls = self.plugins.iter().flatten();
        let calls = calls.flat_map(|call| {
            let named = [&call.plugin_id, &call.stage];
            named.into_iter().chain(&call.missing_field)
        });
        let bent = self.bent.iter().flatten();
        let bent = bent.flat_map(|one| [&one.sub_component_type, &one.source]);
        let mut words = decisions.flatten().chain(engines).chain(calls).chain(bent);
        let long = words.any(|word| word.len() > WORD_MAX);
        long.then_some("a word is longer than 64 bytes")
    }

    fn fault_of_plugins(&self) -> Option<&'static str> {
        let calls = self.plugins.as_deref().unwrap_or_default();
        let ticks = self.ticks.as_deref().unwrap_or_default();
        let mut times = calls
            .iter()
            .flat_map(|call| [call.latency_s, call.cache_age_s, call.lag_s])
            .flatten()
            .chain(ticks.iter().map(|tick| tick.duration_s));
        let negative = times.any(|time| time < 0.0);
        negative.then_some("a time cannot be negative")
    }
}

/// Engines in one list.
const ENGINES_MAX: usize = 4_096;
/// Bytes of a word.
const WORD_MAX: usize = 64;
