//! What a planner's plugins did: calls, latencies, circuits, overrides, ticks and bent plans, as
//! the families of 1.6.1 (`spec/gpu-memory.md` §7.1); the first generation has no plugins.

use std::collections::BTreeMap;
use std::fmt;

use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;

use super::update::{Bend, Circuit, Outcome, Override, PluginCall, Tick, Update};

/// Declares the families: variant, kind, name, labels, meaning.
macro_rules! families {
    ($($variant:ident $kind:ident $name:literal [$($label:literal),*] $help:literal,)+) => {
        #[derive(Clone, Copy, Debug)]
        enum Family { $($variant,)+ }

        const FAMILIES: &[(MetricType, &str, &[&str], &str)] =
            &[$((MetricType::$kind, $name, &[$($label),*], $help),)+];
    };
}

families! {
    Evaluations Counter "plugin_evaluations" ["plugin_id", "stage", "result"]
        "Calls of plugins by outcome.",
    Latency Histogram "plugin_latency_seconds" ["plugin_id", "stage"]
        "Time of calls that succeeded.",
    CircuitState Gauge "plugin_circuit_state" ["plugin_id"]
        "Circuit breaker: 0 closed, 0.5 half open, 1 open.",
    HeldOver Counter "plugin_held_over" ["plugin_id", "stage"]
        "Results that stood in for a call.",
    CacheAge Gauge "plugin_cache_age_seconds" ["plugin_id"] "Age of the result that stood in.",
    OverrideActive Gauge "plugin_override_active" ["plugin_id", "stage", "override_type"]
        "1 where the plugin overrode something in its last call.",
    ReconcileClamped Counter "reconcile_clamped" ["sub_component_type", "source"]
        "Plans clamped while reconciling.",
    ConstrainCapped Counter "constrain_capped" ["sub_component_type", "source"]
        "Plans capped by a constraint.",
    RejectShortCircuited Counter "reject_short_circuited" ["plugin_id"]
        "Plans short-circuited by a rejection.",
    TickSkipped Counter "tick_skipped" ["plugin_id"] "Ticks in which the plugin was not due.",
    RequiresUnsatisfied Counter "tick_requires_unsatisfied" ["plugin_id", "missing_field"]
        "Ticks in which something that the plugin needs was not there.",
    TickLag Gauge "tick_lag_seconds" ["plugin_id"] "How late the plugin was called.",
    TickDuration Histogram "tick_duration_seconds" [] "Time of a tick.",
    TickTimeout Counter "tick_timeout" [] "Ticks that took too long and were ended.",
}

const LATENCY_BOUNDS_S: &[f64] = &[0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0];
const TICK_BOUNDS_S: &[f64] = &[0.01, 0.05, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0];

/// Series of all families together; what would be one more is counted and left out.
const SERIES_MAX: usize = 4_096;

/// A number and, for histograms, how often it lay below each bound; the last has none.
#[derive(Clone, Debug, Default)]
struct Series {
    sum: f64,
    counts: Vec<u64>,
}

/// All series.
#[derive(Clone, Debug)]
pub(super) struct Plugins {
    families: Vec<BTreeMap<Vec<String>, Series>>,
    dropped: u64,
}

impl Plugins {
    /// Nothing done yet.
    pub(super) fn new() -> Self {
        let mut plugins = Self {
            families: vec![BTreeMap::new(); FAMILIES.len()],
            dropped: 0,
        };
        // Without labels there is one series, from the start.
        for family in [Family::TickDuration, Family::TickTimeout] {
            plugins.families[family as usize].insert(Vec::new(), Series::default());
        }
        plugins
    }

    /// Takes in what an interval says of plugins.
    pub(super) fn apply(&mut self, update: &Update) {
        for call in update.plugins.iter().flatten() {
            self.call(call);
        }
        for Tick {
            duration_s,
            timed_out,
        } in update.ticks.iter().flatten()
        {
            self.observe(Family::TickDuration, &[], *duration_s, TICK_BOUNDS_S);
            self.add(Family::TickTimeout, &[], f64::from(*timed_out));
        }
        for bent in update.bent.iter().flatten() {
            let (kind, source) = (bent.sub_component_type.as_str(), bent.source.as_str());
            match bent.what {
                Bend::ReconcileClamped => self.add(Family::ReconcileClamped, &[kind, source], 1.0),
                Bend::ConstrainCapped => self.add(Family::ConstrainCapped, &[kind, source], 1.0),
                Bend::RejectShortCircuited => {
                    self.add(Family::RejectShortCircuited, &[source], 1.0);
                }
            }
        }
    }

    fn call(&mut self, call: &PluginCall) {
        let (plugin, stage) = (call.plugin_id.as_str(), call.stage.as_str());
        if let Some(outcome) = call.result {
            self.add(Family::Evaluations, &[plugin, stage, outcome.as_str()], 1.0);
            self.add(
                Family::HeldOver,
                &[plugin, stage],
                f64::from(outcome == Outcome::HeldOver),
            );
            for one in Override::ALL.iter().copied() {
                let labels = [plugin, stage, one.as_str()];
                let active = f64::from(call.overrides.contains(&one));
                self.set(Family::OverrideActive, &labels, active);
            }
        }
        // A call that failed has no latency: it would say how long the patience is.
        let succeeded = !matches!(
            call.result,
            Some(Outcome::Timeout | Outcome::Error | Outcome::HeldOver)
        );
        if let Some(latency_s) = call.latency_s.filter(|_| succeeded) {
            let labels = [plugin, stage];
            self.observe(Family::Latency, &labels, latency_s, LATENCY_BOUNDS_S);
        }
        for (family, value) in [
            (Family::CircuitState, call.circuit.map(Circuit::level)),
            (Family::CacheAge, call.cache_age_s),
            (Family::TickLag, call.lag_s),
        ] {
            if let Some(value) = value {
                self.set(family, &[plugin], value);
            }
        }
        if call.skipped {
            self.add(Family::TickSkipped, &[plugin], 1.0);
        }
        if let Some(field) = &call.missing_field {
            self.add(Family::RequiresUnsatisfied, &[plugin, field.as_str()], 1.0);
        }
    }

    fn series(&mut self, family: Family, labels: &[&str]) -> Option<&mut Series> {
        let key: Vec<String> = labels.iter().map(|&label| label.to_owned()).collect();
        let all: usize = self.families.iter().map(BTreeMap::len).sum();
        let family = &mut self.families[family as usize];
        if all >= SERIES_MAX && !family.contains_key(&key) {
            self.dropped += 1;
            return None;
        }
        Some(family.entry(key).or_default())
    }

    fn set(&mut self, family: Family, labels: &[&str], value: f64) {
        if let Some(series) = self.series(family, labels) {
            series.sum = value;
        }
    }

    fn add(&mut self, family: Family, labels: &[&str], value: f64) {
        if let Some(series) = self.series(family, labels) {
            series.sum += value;
        }
    }

    fn observe(&mut self, family: Family, labels: &[&str], value: f64, bounds: &[f64]) {
        if let Some(series) = self.series(family, labels) {
            series.sum += value;
            series.counts.resize(bounds.len() + 1, 0);
            let bucket = bounds.iter().position(|bound| value <= *bound);
            series.counts[bucket.unwrap_or(bounds.len())] += 1;
        }
    }

    /// Writes all families.
    pub(super) fn encode(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        for ((kind, name, labels, help), all) in FAMILIES.iter().zip(&self.families) {
            let name = format!("dynamo_planner_{name}");
            let mut family = encoder.encode_descriptor(&name, help, None, *kind)?;
            for (values, series) in all {
                let values = values.iter().map(String::as_str);
                let set: Vec<(&str, &str)> = labels.iter().copied().zip(values).collect();
                if set.is_empty() {
                    encode_one(&mut family, *kind, series, TICK_BOUNDS_S)?;
                } else {
                    let mut one = family.encode_family(&set)?;
                    encode_one(&mut one, *kind, series, LATENCY_BOUNDS_S)?;
                }
            }
        }
        let help = "Series of plugins that were left out, because there are too many.";
        let name = "corelane_planner_series_dropped";
        let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        metric.encode_counter::<NoLabelSet, _, f64>(&self.dropped, None)
    }
}

fn encode_one(
    metric: &mut MetricEncoder<'_>,
    kind: MetricType,
    series: &Series,
    bounds: &[f64],
) -> fmt::Result {
    match kind {
        MetricType::Counter => metric.encode_counter::<NoLabelSet, _, f64>(&series.sum, None),
        MetricType::Histogram => {
            let (count, buckets) = buckets(series, bounds);
            metric.encode_histogram::<NoLabelSet>(series.sum, count, &buckets, None)
        }
        _ => metric.encode_gauge(&series.sum),
    }
}

/// How many there are in all, and in each bucket.
fn buckets(series: &Series, bounds: &[f64]) -> (u64, Vec<(f64, u64)>) {
    let mut counts = series.counts.clone();
    counts.resize(bounds.len() + 1, 0);
    // The last has no bound.
    let bounds = bounds.iter().copied().chain([f64::INFINITY]);
    (
        counts.iter().sum(),
        bounds.zip(counts.iter().copied()).collect(),
    )
}

#[cfg(test)]
mod tests {
    use super::super::PlannerMetrics;
    use super::*;
    use crate::config::PlannerNames;

    fn told(lines: &[&str]) -> String {
        let mut metrics = PlannerMetrics::new(PlannerNames::Both);
        for line in lines {
            metrics.apply(&serde_json::from_str(line).unwrap()).unwrap();
        }
        let mut text = String::new();
        metrics.write(&mut text);
        text
    }

    #[test]
    fn calls_ticks_and_bent_plans_are_counted_under_upstreams_labels() {
        let line = r#"{"interval_s":5,
            "plugins":[
              {"plugin_id":"cap","stage":"reconcile","result":"at_most","latency_s":0.02,
               "circuit":"half_open","overrides":["AT_MOST"],"lag_s":1.5},
              {"plugin_id":"cap","stage":"propose","result":"timeout","latency_s":5},
              {"plugin_id":"old","stage":"propose","result":"held_over","cache_age_s":7},
              {"plugin_id":"idle","skipped":true},
              {"plugin_id":"idle","missing_field":"prediction.load"}],
            "ticks":[{"duration_s":0.2},{"duration_s":31,"timed_out":true}],
            "bent":[
              {"what":"reconcile_clamped","sub_component_type":"prefill","source":"cap"},
              {"what":"reject_short_circuited","source":"safety"}]}"#;
        let text = told(&[line, line]);
        for expected in [
            r#"evaluations_total{plugin_id="cap",stage="reconcile",result="at_most"} 2"#,
            r#"evaluations_total{plugin_id="old",stage="propose",result="held_over"} 2"#,
            r#"plugin_latency_seconds_bucket{le="0.01",plugin_id="cap",stage="reconcile"} 0"#,
            r#"plugin_latency_seconds_bucket{le="0.05",plugin_id="cap",stage="reconcile"} 2"#,
            r#"plugin_latency_seconds_count{plugin_id="cap",stage="reconcile"} 2"#,
            r#"plugin_circuit_state{plugin_id="cap"} 0.5"#,
            r#"plugin_held_over_total{plugin_id="old",stage="propose"} 2"#,
            r#"plugin_cache_age_seconds{plugin_id="old"} 7"#,
            r#"active{plugin_id="cap",stage="reconcile",override_type="AT_MOST"} 1"#,
            r#"active{plugin_id="cap",stage="reconcile",override_type="SET"} 0"#,
            r#"reconcile_clamped_total{sub_component_type="prefill",source="cap"} 2"#,
            r#"reject_short_circuited_total{plugin_id="safety"} 2"#,
            r#"tick_skipped_total{plugin_id="idle"} 2"#,
            r#"unsatisfied_total{plugin_id="idle",missing_field="prediction.load"} 2"#,
            r#"tick_lag_seconds{plugin_id="cap"} 1.5"#,
            r#"tick_duration_seconds_bucket{le="0.5"} 2"#,
            r#"tick_duration_seconds_bucket{le="+Inf"} 4"#,
            "tick_timeout_total 2",
        ] {
            assert!(text.contains(expected), "{expected} is not in\n{text}");
        }
        // How long a call that failed took is nobody's latency.
        assert!(!text.contains(r#"latency_seconds_count{plugin_id="cap",stage="propose"}"#));
    }

    #[test]
    fn series_have_a_bound() {
        let lines: Vec<String> = (0..SERIES_MAX + 10)
            .map(|n| format!(r#"{{"interval_s":1,"plugins":[{{"plugin_id":"{n}","lag_s":1}}]}}"#))
            .collect();
        let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
        let text = told(&lines);
        assert_eq!(
            text.matches("dynamo_planner_tick_lag_seconds{").count(),
            SERIES_MAX - 2
        );
        assert!(
            text.contains("corelane_planner_series_dropped_total 12\n"),
            "{text}"
        );
    }
}
