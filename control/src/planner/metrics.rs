//! The planner's gauges under both generations' names, and the rules by which an interval moves
//! them (`spec/gpu-memory.md` §7.1).

use std::collections::BTreeSet;
use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use super::plugins::Plugins;
use super::update::{Decisions, Engine, Observed, Update};
use crate::config::PlannerNames;

/// Declares the gauges without labels: variant, name of the first generation, of 1.6.1, meaning.
macro_rules! scalars {
    ($($variant:ident $seed:literal $current:literal $help:literal,)+) => {
        #[derive(Clone, Copy, Debug)]
        enum Scalar { $($variant,)+ }

        /// Names and meanings, in the order of the variants; an empty name is not there.
        const SCALARS: &[(&str, &str, &str)] = &[$(($seed, $current, $help),)+];
    };
}

scalars! {
    PrefillReplicas "num_p_workers" "num_prefill_replicas" "Prefill replicas that run.",
    DecodeReplicas "num_d_workers" "num_decode_replicas" "Decode replicas that run.",
    ObservedTtft "observed_ttft" "observed_ttft_ms" "Time to the first token, milliseconds.",
    ObservedItl "observed_itl" "observed_itl_ms" "Time between tokens, milliseconds.",
    ObservedRate "observed_request_rate" "observed_requests_per_second" "Requests per second.",
    ObservedDuration "observed_request_duration" "observed_request_duration_seconds"
        "Duration of a request, seconds.",
    ObservedInput "observed_isl" "observed_input_sequence_tokens" "Input length, tokens.",
    ObservedOutput "observed_osl" "observed_output_sequence_tokens" "Output length, tokens.",
    PrefillCorrection "p_correction_factor" "" "Observed by interpolated time to first token.",
    DecodeCorrection "d_correction_factor" "" "Observed by interpolated time between tokens.",
    PredictedRate "predicted_request_rate" "predicted_requests_per_second"
        "Requests per second that are expected.",
    PredictedInput "predicted_isl" "predicted_input_sequence_tokens"
        "Input length that is expected, tokens.",
    PredictedOutput "predicted_osl" "predicted_output_sequence_tokens"
        "Output length that is expected, tokens.",
    WantedPrefill "predicted_num_p" "predicted_num_prefill_replicas" "Prefill replicas wanted.",
    WantedDecode "predicted_num_d" "predicted_num_decode_replicas" "Decode replicas wanted.",
    GpuHours "gpu_hours" "gpu_hours" "GPU hours used since the start.",
    SlaTtft "" "sla_target_ttft_ms" "Promised time to the first token, milliseconds.",
    SlaItl "" "sla_target_itl_ms" "Promised time between tokens, milliseconds.",
    EstimatedTtft "" "estimated_ttft_ms" "Time to the first token as planned, milliseconds.",
    EstimatedItl "" "estimated_itl_ms" "Time between tokens as planned, milliseconds.",
    PrefillCapacity "" "engine_prefill_capacity_requests_per_second"
        "Requests per second that a prefill engine can take.",
    DecodeCapacity "" "engine_decode_capacity_requests_per_second"
        "Requests per second that a decode engine can take.",
    PowerBudget "" "power_budget_total_watts" "Power that may be used.",
    PowerProjected "" "power_projected_watts" "Power that the plan would use.",
    PowerUtilization "" "power_budget_utilization" "Projected by allowed power.",
}

/// Different words of one scaler that are remembered, so that each stays a series.
const WORDS_MAX: usize = 16;

/// What became of an update.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Applied {
    /// All of it counts.
    Whole,
    /// Something observed is not known: only replicas and GPU hours count.
    Skipped,
}

/// One scaler's decision, one-hot over all words that it ever said.
#[derive(Clone, Debug, Default)]
struct Decision {
    words: BTreeSet<String>,
    current: String,
}

/// All metrics of one planner; gauges stand at 0 until they are fed.
#[derive(Clone, Debug)]
pub struct PlannerMetrics {
    names: PlannerNames,
    scalars: Vec<f64>,
    load: Decision,
    throughput: Decision,
    engines: Vec<Engine>,
    plugins: Plugins,
    updates: u64,
    skipped: u64,
    refused: u64,
}

impl PlannerMetrics {
    /// Nothing known yet.
    pub fn new(names: PlannerNames) -> Self {
        Self {
            names,
            scalars: vec![0.0; SCALARS.len()],
            load: Decision::default(),
            throughput: Decision::default(),
            engines: Vec::new(),
            plugins: Plugins::new(),
            updates: 0,
            skipped: 0,
            refused: 0,
        }
    }

    /// Takes an interval in, by the planner's own order: replicas and GPU hours, what was
    /// observed, corrections, predictions, sizes.
    ///
    /// # Errors
    /// What is wrong with its numbers; nothing has changed then.
    pub fn apply(&mut self, update: &Update) -> Result<Applied, &'static str> {
        if let Some(fault) = update.fault() {
            self.refused += 1;
            return Err(fault);
        }
        self.updates += 1;
        self.replicas(update);
        self.plugins.apply(update);
        if let Some(observed) = update.observed {
            let Some(known) = known(observed) else {
                self.skipped += 1;
                return Ok(Applied::Skipped);
            };
            self.observed(known, update);
        }
        self.planned(update);
        if let Some(engines) = &update.engines {
            self.engines.clone_from(engines);
        }
        if let Some(Decisions { load, throughput }) = &update.decisions {
            self.load.say(load.as_deref());
            self.throughput.say(throughput.as_deref());
        }
        Ok(Applied::Whole)
    }

    /// Counts a line that was no update.
    pub fn refuse(&mut self) {
        self.refused += 1;
    }

    fn set(&mut self, scalar: Scalar, value: f64) {
        if let Some(cell) = self.scalars.get_mut(scalar as usize) {
            *cell = value;
        }
    }

    fn replicas(&mut self, update: &Update) {
        let mut gpus = 0.0;
        for (group, scalar) in [
            (update.prefill, Scalar::PrefillReplicas),
            (update.decode, Scalar::DecodeReplicas),
        ] {
            if let Some(group) = group {
                self.set(scalar, group.replicas);
                gpus += group.replicas * group.gpus;
            }
        }
        let hours = self.scalars.get_mut(Scalar::GpuHours as usize);
        if let Some(hours) = hours {
            *hours += gpus * update.interval_s / 3_600.0;
        }
    }

    fn observed(&mut self, known: [f64; 6], update: &Update) {
        let [ttft_ms, itl_ms, duration_s, requests, input, output] = known;
        for (scalar, value) in [
            (Scalar::ObservedTtft, ttft_ms),
            (Scalar::ObservedItl, itl_ms),
            (Scalar::ObservedRate, requests / update.interval_s),
            (Scalar::ObservedDuration, duration_s),
            (Scalar::ObservedInput, input),
            (Scalar::ObservedOutput, output),
        ] {
            self.set(scalar, value);
        }
        if let Some(expected) = update.interpolated {
            for (scalar, seen, expected) in [
                (Scalar::PrefillCorrection, ttft_ms, expected.ttft_ms),
                (Scalar::DecodeCorrection, itl_ms, expected.itl_ms),
            ] {
                if expected > 0.0 {
                    self.set(scalar, seen / expected);
                }
            }
        }
    }

    fn planned(&mut self, update: &Update) {
        if let Some(load) = update.predicted {
            self.set(Scalar::PredictedRate, load.requests / update.interval_s);
            self.set(Scalar::PredictedInput, load.input_tokens);
            self.set(Scalar::PredictedOutput, load.output_tokens);
        }
        if let Some(sized) = update.sized {
            self.set(Scalar::WantedPrefill, sized.prefill);
            self.set(Scalar::WantedDecode, sized.decode);
        }
        if let Some(sla) = update.sla_target {
            self.set(Scalar::SlaTtft, sla.ttft_ms);
            self.set(Scalar::SlaItl, sla.itl_ms);
        }
        if let Some(estimated) = update.estimated {
            self.set(Scalar::EstimatedTtft, estimated.ttft_ms);
            self.set(Scalar::EstimatedItl, estimated.itl_ms);
        }
        if let Some(capacity) = update.capacity {
            self.set(Scalar::PrefillCapacity, capacity.prefill);
            self.set(Scalar::DecodeCapacity, capacity.decode);
        }
        if let Some(power) = update.power {
            self.set(Scalar::PowerBudget, power.budget_watts);
            self.set(Scalar::PowerProjected, power.projected_watts);
            let used = power.projected_watts / power.budget_watts;
            self.set(
                Scalar::PowerUtilization,
                if used.is_finite() { used } else { 0.0 },
            );
        }
    }

    /// Writes all families, without the mark of the end.
    pub fn write(&self, out: &mut String) {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(self.clone()));
        // Writing into a string does not fail.
        let _ = text::encode_registry(out, &registry);
    }
}

/// All that was observed, or none if a part is not known.
fn known(observed: Observed) -> Option<[f64; 6]> {
    let parts = [
        observed.ttft_ms,
        observed.itl_ms,
        observed.request_duration_s,
        observed.requests,
        observed.input_tokens,
        observed.output_tokens,
    ];
    let mut known = [0.0; 6];
    for (cell, part) in known.iter_mut().zip(parts) {
        *cell = part.filter(|part| !part.is_nan())?;
    }
    Some(known)
}

impl Decision {
    fn say(&mut self, word: Option<&str>) {
        let Some(word) = word else { return };
        if self.words.len() < WORDS_MAX || self.words.contains(word) {
            self.words.insert(word.to_owned());
            word.clone_into(&mut self.current);
        }
    }
}

impl Collector for PlannerMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let seed = self.names != PlannerNames::Current;
        let current = self.names != PlannerNames::Seed;
        for ((old, new, help), value) in SCALARS.iter().zip(&self.scalars) {
            let old = (seed && !old.is_empty()).then(|| format!("planner:{old}"));
            let new = (current && !new.is_empty()).then(|| format!("dynamo_planner_{new}"));
            for name in [old, new].into_iter().flatten() {
                let kind = MetricType::Gauge;
                let mut metric = encoder.encode_descriptor(&name, help, None, kind)?;
                metric.encode_gauge(value)?;
            }
        }
        if current {
            self.decisions(&mut encoder)?;
            self.engines(&mut encoder)?;
            self.plugins.encode(&mut encoder)?;
        }
        let own = [
            (
                "updates",
                "Intervals that a planner has told.",
                self.updates,
            ),
            (
                "skipped",
                "Those in which something observed was not known.",
                self.skipped,
            ),
            ("refused", "Lines that were no interval.", self.refused),
        ];
        for (name, help, count) in own {
            let name = format!("corelane_planner_{name}");
            count_of(&mut encoder, &name, help, count)?;
        }
        Ok(())
    }
}

fn count_of(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    count: u64,
) -> fmt::Result {
    let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    metric.encode_counter::<NoLabelSet, _, f64>(&count, None)
}

impl PlannerMetrics {
    /// As Prometheus writes a state: a label of the metric's own name, 1 for the one that holds.
    fn decisions(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        for (name, help, decision) in [
            (
                "dynamo_planner_load_scaling_decision",
                "What the scaler that follows load decided.",
                &self.load,
            ),
            (
                "dynamo_planner_throughput_scaling_decision",
                "What the scaler that follows throughput decided.",
                &self.throughput,
            ),
        ] {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for word in &decision.words {
                let is = u64::from(*word == decision.current);
                let labels = [(name, word.as_str())];
                family.encode_family(&labels)?.encode_gauge(&is)?;
            }
        }
        Ok(())
    }

    fn engines(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        type Pick = fn(&Engine) -> f64;
        let families: [(&str, &str, Pick); 3] = [
            (
                "engine_queued_prefill_tokens",
                "Tokens that wait for prefill.",
                |engine| engine.queued_prefill_tokens,
            ),
            (
                "engine_queued_decode_kv_tokens",
                "Tokens that wait for decode.",
                |engine| engine.queued_decode_kv_tokens,
            ),
            (
                "engine_inflight_decode_kv_tokens",
                "Tokens of what is decoded.",
                |engine| engine.inflight_decode_kv_tokens,
            ),
        ];
        for (name, help, pick) in families {
            let name = format!("dynamo_planner_{name}");
            let mut family = encoder.encode_descriptor(&name, help, None, MetricType::Gauge)?;
            for engine in &self.engines {
                let rank = engine.dp_rank.to_string();
                let labels = [
                    ("worker_id", engine.worker_id.as_str()),
                    ("dp_rank", rank.as_str()),
                ];
                family.encode_family(&labels)?.encode_gauge(&pick(engine))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn update(text: &str) -> Update {
        serde_json::from_str(text).unwrap()
    }

    fn value(metrics: &PlannerMetrics, name: &str) -> Option<f64> {
        let mut text = String::new();
        metrics.write(&mut text);
        let line = text
            .lines()
            .find(|line| line.split(' ').next() == Some(name))?;
        line.rsplit(' ').next()?.parse().ok()
    }

    const FULL: &str = r#"{"interval_s":180,
        "prefill":{"replicas":2,"gpus":1},"decode":{"replicas":4,"gpus":2},
        "observed":{"ttft_ms":200,"itl_ms":12,"request_duration_s":3.5,"requests":900,
                    "input_tokens":3000,"output_tokens":150},
        "interpolated":{"ttft_ms":160,"itl_ms":24},
        "predicted":{"requests":1800,"input_tokens":3100,"output_tokens":140},
        "sized":{"prefill":3,"decode":5},
        "decisions":{"load":"scale_up","throughput":"hold"},
        "engines":[{"worker_id":"w1","dp_rank":1,"queued_prefill_tokens":7}],
        "power":{"budget_watts":1000,"projected_watts":800}}"#;

    #[test]
    fn an_interval_moves_both_generations() {
        let mut metrics = PlannerMetrics::new(PlannerNames::Both);
        assert_eq!(value(&metrics, "planner:gpu_hours"), Some(0.0));
        assert_eq!(metrics.apply(&update(FULL)), Ok(Applied::Whole));
        for (name, expected) in [
            ("planner:num_p_workers", 2.0),
            ("dynamo_planner_num_decode_replicas", 4.0),
            ("planner:observed_ttft", 200.0),
            ("dynamo_planner_observed_itl_ms", 12.0),
            ("planner:observed_request_rate", 5.0),
            ("planner:p_correction_factor", 1.25),
            ("planner:d_correction_factor", 0.5),
            ("planner:predicted_request_rate", 10.0),
            ("dynamo_planner_predicted_input_sequence_tokens", 3_100.0),
            ("planner:predicted_num_d", 5.0),
            ("dynamo_planner_power_budget_utilization", 0.8),
            ("corelane_planner_updates_total", 1.0),
        ] {
            assert_eq!(value(&metrics, name), Some(expected), "{name}");
        }
        // 10 GPUs for 180 s, twice.
        metrics.apply(&update(FULL)).unwrap();
        assert_eq!(value(&metrics, "planner:gpu_hours"), Some(1.0));
        assert_eq!(value(&metrics, "dynamo_planner_gpu_hours"), Some(1.0));
        let series = r#"dynamo_planner_engine_queued_prefill_tokens{worker_id="w1",dp_rank="1"}"#;
        assert_eq!(value(&metrics, series), Some(7.0));
        let name = "dynamo_planner_load_scaling_decision";
        let said = |word: &str| format!("{name}{{{name}=\"{word}\"}}");
        metrics
            .apply(&update(r#"{"interval_s":1,"decisions":{"load":"hold"}}"#))
            .unwrap();
        assert_eq!(value(&metrics, &said("scale_up")), Some(0.0));
        assert_eq!(value(&metrics, &said("hold")), Some(1.0));
    }

    #[test]
    fn what_is_not_known_skips_the_interval_but_not_its_gpu_hours() {
        let mut metrics = PlannerMetrics::new(PlannerNames::Seed);
        metrics.apply(&update(FULL)).unwrap();
        let skipped = update(
            r#"{"interval_s":180,"prefill":{"replicas":20,"gpus":1},
                "observed":{"ttft_ms":null,"itl_ms":1,"request_duration_s":1,"requests":1,
                            "input_tokens":1,"output_tokens":1},
                "sized":{"prefill":9,"decode":9}}"#,
        );
        assert_eq!(metrics.apply(&skipped), Ok(Applied::Skipped));
        assert_eq!(value(&metrics, "planner:num_p_workers"), Some(20.0));
        assert_eq!(value(&metrics, "planner:gpu_hours"), Some(1.5));
        assert_eq!(value(&metrics, "planner:observed_itl"), Some(12.0));
        assert_eq!(value(&metrics, "planner:predicted_num_p"), Some(3.0));
        assert_eq!(value(&metrics, "corelane_planner_skipped_total"), Some(1.0));
    }

    #[test]
    fn names_of_one_generation_and_of_seed_only() {
        let text = |names| {
            let mut text = String::new();
            PlannerMetrics::new(names).write(&mut text);
            text
        };
        let (seed, current) = (text(PlannerNames::Seed), text(PlannerNames::Current));
        assert!(seed.contains("planner:num_p_workers") && !seed.contains("dynamo_planner_"));
        assert!(!current.contains("planner:") && current.contains("dynamo_planner_gpu_hours"));
        assert!(!current.contains("correction_factor"), "1.6.1 has none");
        let types = seed
            .lines()
            .filter(|line| line.starts_with("# TYPE planner:"));
        assert_eq!(types.count(), 16, "all of them");
    }

    #[test]
    fn nonsense_is_refused_and_moves_nothing() {
        let mut metrics = PlannerMetrics::new(PlannerNames::Both);
        for text in [
            r#"{"interval_s":0}"#,
            r#"{"interval_s":-1}"#,
            r#"{"interval_s":1,"prefill":{"replicas":-1,"gpus":1}}"#,
        ] {
            assert!(metrics.apply(&update(text)).is_err(), "{text}");
        }
        assert_eq!(value(&metrics, "planner:num_p_workers"), Some(0.0));
        assert_eq!(value(&metrics, "corelane_planner_refused_total"), Some(3.0));
        assert!(serde_json::from_str::<Update>(r#"{"interval_s":1,"obsered":{}}"#).is_err());
        use super::super::update::Increase;
        let mean = |sum, count| Increase { sum, count }.mean();
        assert_eq!((mean(6.0, 3.0), mean(0.0, 0.0)), (Some(2.0), Some(0.0)));
        assert_eq!(mean(f64::NAN, 1.0), None);
    }
}
