//! What is said of reloads: the answer of `/reload`, and metrics.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;
use serde::{Deserialize, Serialize};

use crate::words::words;

/// Name and version of the answer's form.
pub const SCHEMA: &str = "corelane.reload/1";

words! {
    /// How a reload has ended.
    #[derive(Default, serde::Serialize)]
    Outcome {
        /// There was none yet.
        #[default]
        None = "none",
        /// All cores have the new configuration.
        Applied = "applied",
        /// It says what is in force already.
        Unchanged = "unchanged",
        /// It is wrong, or needs a restart; nothing was changed.
        Refused = "refused",
        /// The first core was worse off with it, or did not take it; nothing is changed now.
        RolledBack = "rolled_back",
        /// The process has begun to end.
        GivenUp = "given_up",
    }
}

/// The last reload, and the configuration in force. Also what `GET /reload` answers.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Report {
    /// Always [`SCHEMA`].
    pub schema: String,
    /// Number of the configuration in force, from 1.
    pub generation: u64,
    /// Whether one is under way; what follows is of the one before then.
    pub busy: bool,
    /// How the last one has ended.
    pub result: Outcome,
    /// Who asked for it: `SIGHUP` or `http`.
    pub by: String,
    /// Keys that were to change, and names of routes that were to come or go.
    pub changed: Vec<String>,
    /// Why it was refused or taken back: lines `file:line:column: what; instead`.
    pub reasons: Vec<String>,
    /// What is doubtful in the new configuration, likewise.
    pub warnings: Vec<String>,
    /// The core that was watched with it.
    pub core: Option<usize>,
    /// Requests of that core meanwhile.
    pub watched_requests: u64,
    /// When it ended, in seconds of Unix time; 0 for none.
    pub at_s: u64,
    /// How long it took.
    pub took_ms: u64,
}

impl Default for Report {
    fn default() -> Self {
        Report {
            schema: SCHEMA.to_owned(),
            generation: 1,
            busy: false,
            result: Outcome::None,
            by: String::new(),
            changed: Vec::new(),
            reasons: Vec::new(),
            warnings: Vec::new(),
            core: None,
            watched_requests: 0,
            at_s: 0,
            took_ms: 0,
        }
    }
}

/// How often reloads have ended in each way.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts([u64; Outcome::ALL.len()]);

impl Counts {
    /// One more.
    pub fn add(&mut self, outcome: Outcome) {
        if let Some(count) = self.0.get_mut(outcome as usize) {
            *count += 1;
        }
    }
}

#[derive(Debug)]
struct Snapshot(Report, Counts);

/// Writes metric families, without the mark of the end.
pub(super) fn write(report: &Report, counts: &Counts, out: &mut String) {
    let mut registry = Registry::with_prefix("corelane_config");
    registry.register_collector(Box::new(Snapshot(report.clone(), *counts)));
    // Writing into a string does not fail.
    let _ = text::encode_registry(out, &registry);
}

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Snapshot(report, counts) = self;
        let failed = matches!(report.result, Outcome::Refused | Outcome::RolledBack);
        let gauges = [
            (
                "generation",
                "Number of the configuration in force.",
                report.generation,
            ),
            (
                "last_reload_successful",
                "0 when the last reload was refused or taken back.",
                u64::from(!failed),
            ),
            (
                "last_reload_timestamp_seconds",
                "When the last reload ended; 0 for none.",
                report.at_s,
            ),
        ];
        for (name, help, value) in gauges {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            family.encode_gauge(&value)?;
        }
        let help = "Reloads by how they ended.";
        let mut family = encoder.encode_descriptor("reloads", help, None, MetricType::Counter)?;
        for (outcome, count) in Outcome::ALL.iter().zip(counts.0).skip(1) {
            family
                .encode_family(&[("result", outcome.as_str())])?
                .encode_counter::<NoLabelSet, _, u64>(&count, None)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_result_and_all_before_are_counted() {
        let mut counts = Counts::default();
        for outcome in [Outcome::Applied, Outcome::Applied, Outcome::Refused] {
            counts.add(outcome);
        }
        let report = Report {
            generation: 3,
            result: Outcome::Refused,
            ..Report::default()
        };
        let mut out = String::new();
        write(&report, &counts, &mut out);
        for line in [
            "corelane_config_generation 3",
            "corelane_config_last_reload_successful 0",
            "corelane_config_reloads_total{result=\"applied\"} 2",
            "corelane_config_reloads_total{result=\"refused\"} 1",
            "corelane_config_reloads_total{result=\"rolled_back\"} 0",
        ] {
            assert!(out.contains(line), "{line}\n{out}");
        }
        let said = serde_json::to_string(&report).unwrap();
        let heard: Report = serde_json::from_str(&said).unwrap();
        assert_eq!(
            (heard.result, heard.schema.as_str()),
            (Outcome::Refused, SCHEMA)
        );
    }
}
