//! What is counted of TLS, and how it is shown.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use super::reason::Reason;

/// Counters of TLS. Written by its threads, one addition for a handshake or a reload.
#[derive(Debug, Default)]
pub struct Stats {
    /// Handshakes that succeeded: accepted, dialled.
    done: [AtomicU64; 2],
    /// Handshakes that failed: accepted, dialled, by reason.
    failed: [[AtomicU64; Reason::ALL.len()]; 2],
    /// Handshakes under way.
    pub(super) shaking: AtomicU64,
    /// Connections that are pumped.
    pub(super) pumped: AtomicU64,
    /// Connections by who encrypts them: this process, the kernel.
    carried: [AtomicU64; 2],
    /// Farewells that wait until what was sent before is on its way.
    pub(super) parting: AtomicU64,
    /// Files read anew.
    pub(super) reloads: AtomicU64,
    /// Files that were changed into something of no use.
    pub(super) reload_failures: AtomicU64,
}

const SIDES: [&str; 2] = ["accepted", "dialled"];
const MODES: [&str; 2] = ["user", "kernel"];

impl Stats {
    /// Adds the families of TLS to the text of a scrape.
    pub fn write(self: &Arc<Self>, out: &mut String) {
        let mut registry = Registry::with_prefix("corelane");
        registry.register_collector(Box::new(Shown(Arc::clone(self))));
        // Writing into a string does not fail.
        let _ = text::encode_registry(out, &registry);
    }

    pub(super) fn succeeded(&self, dialled: bool) {
        self.done[usize::from(dialled)].fetch_add(1, Relaxed);
    }

    pub(super) fn carried(&self, kernel: bool) {
        self.carried[usize::from(kernel)].fetch_add(1, Relaxed);
    }

    /// Connections that were ever encrypted by the kernel, or by this process.
    pub fn connections(&self, kernel: bool) -> u64 {
        self.carried[usize::from(kernel)].load(Relaxed)
    }

    pub(super) fn failed(&self, dialled: bool, reason: Reason) {
        self.failed[usize::from(dialled)][reason as usize].fetch_add(1, Relaxed);
    }

    /// Handshakes that succeeded.
    pub fn handshakes(&self, dialled: bool) -> u64 {
        self.done[usize::from(dialled)].load(Relaxed)
    }

    /// Handshakes that failed for this reason.
    pub fn failures(&self, dialled: bool, reason: Reason) -> u64 {
        self.failed[usize::from(dialled)][reason as usize].load(Relaxed)
    }

    /// Connections whose bytes are encrypted in this process.
    pub fn pumped(&self) -> u64 {
        self.pumped.load(Relaxed)
    }

    /// Handshakes under way.
    pub fn shaking(&self) -> u64 {
        self.shaking.load(Relaxed)
    }

    /// Times that changed files were taken over, and times that they could not be.
    pub fn reloads(&self) -> (u64, u64) {
        (
            self.reloads.load(Relaxed),
            self.reload_failures.load(Relaxed),
        )
    }
}

/// The numbers in the form of the library.
#[derive(Debug)]
struct Shown(Arc<Stats>);

impl Collector for Shown {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let stats = &self.0;
        let counter = MetricType::Counter;
        let help = "TLS handshakes that succeeded, by who began the connection.";
        let mut family = encoder.encode_descriptor("tls_handshakes", help, None, counter)?;
        for (dialled, side) in SIDES.into_iter().enumerate() {
            let labels = [("side", side)];
            let mut series = family.encode_family(&labels)?;
            series.encode_counter::<NoLabelSet, _, f64>(&stats.handshakes(dialled == 1), None)?;
        }
        let help = "TLS handshakes that failed, by who began the connection and why.";
        let mut family = encoder.encode_descriptor("tls_failures", help, None, counter)?;
        for (dialled, side) in SIDES.into_iter().enumerate() {
            for reason in Reason::ALL {
                let labels = [("side", side), ("reason", reason.word())];
                let count = stats.failures(dialled == 1, reason);
                let mut series = family.encode_family(&labels)?;
                series.encode_counter::<NoLabelSet, _, f64>(&count, None)?;
            }
        }
        let help = "TLS connections by who encrypts them: the kernel, or threads of this process.";
        let mut family = encoder.encode_descriptor("tls_connections", help, None, counter)?;
        for (kernel, mode) in MODES.into_iter().enumerate() {
            let labels = [("mode", mode)];
            let mut series = family.encode_family(&labels)?;
            series.encode_counter::<NoLabelSet, _, f64>(&stats.connections(kernel == 1), None)?;
        }
        let gauges = [
            (
                "tls_handshaking",
                "TLS handshakes under way.",
                stats.shaking(),
            ),
            (
                "tls_pumped",
                "Connections encrypted by threads of this process.",
                stats.pumped(),
            ),
        ];
        for (name, help, value) in gauges {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            metric.encode_gauge(&value)?;
        }
        let (reloads, failures) = stats.reloads();
        let counters = [
            (
                "tls_reloads",
                "Times that changed TLS files were taken over.",
                reloads,
            ),
            (
                "tls_reload_failures",
                "Times that changed TLS files were of no use.",
                failures,
            ),
        ];
        for (name, help, value) in counters {
            let mut metric = encoder.encode_descriptor(name, help, None, counter)?;
            metric.encode_counter::<NoLabelSet, _, f64>(&value, None)?;
        }
        Ok(())
    }
}
