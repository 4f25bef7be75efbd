//! What is counted of QUIC, and how it is shown.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

/// A number that many read and the thread of QUIC writes.
#[derive(Debug, Default)]
pub struct Number(AtomicU64);

impl Number {
    pub(super) fn add(&self) {
        self.0.fetch_add(1, Relaxed);
    }

    pub(super) fn take(&self) {
        self.0.fetch_sub(1, Relaxed);
    }

    /// Its value now.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// One side of the plane.
#[derive(Debug, Default)]
pub struct Side {
    /// Connections that stand.
    pub connections: Number,
    /// Bundles of them.
    pub bundles: Number,
    /// Responses under way.
    pub responses: Number,
    /// Responses that have begun, all time.
    pub begun: Number,
    /// Connections that could not be made.
    pub handshake_failures: Number,
    /// Connections turned away because there are too many.
    pub turned_away: Number,
    /// Responses that the caller does not wait for, or no longer.
    pub refused: Number,
    /// Responses that we have reset.
    pub resets_sent: Number,
    /// Responses that the peer has reset.
    pub resets_received: Number,
    /// Bundles that broke with all that was on them.
    pub broken: Number,
}

/// Counters of QUIC.
#[derive(Debug, Default)]
pub struct Stats {
    /// Our calls, and responses that we relay: workers connect to us.
    pub caller: Side,
    /// Responses of ours, or that we relay: we connect to callers.
    pub worker: Side,
}

type Shown = (&'static str, &'static str, MetricType, fn(&Side) -> u64);

const FAMILIES: [Shown; 10] = [
    (
        "quic_connections",
        "QUIC connections that stand.",
        MetricType::Gauge,
        |side| side.connections.get(),
    ),
    (
        "quic_bundles",
        "Bundles of QUIC connections, one for each peer.",
        MetricType::Gauge,
        |side| side.bundles.get(),
    ),
    (
        "quic_responses",
        "Responses under way on QUIC.",
        MetricType::Gauge,
        |side| side.responses.get(),
    ),
    (
        "quic_responses_begun",
        "Responses on QUIC.",
        MetricType::Counter,
        |side| side.begun.get(),
    ),
    (
        "quic_handshake_failures",
        "QUIC connections that were not made.",
        MetricType::Counter,
        |side| side.handshake_failures.get(),
    ),
    (
        "quic_turned_away",
        "QUIC connections turned away, too many.",
        MetricType::Counter,
        |side| side.turned_away.get(),
    ),
    (
        "quic_refused",
        "QUIC responses that nobody waited for.",
        MetricType::Counter,
        |side| side.refused.get(),
    ),
    (
        "quic_resets_sent",
        "QUIC responses that we have reset.",
        MetricType::Counter,
        |side| side.resets_sent.get(),
    ),
    (
        "quic_resets_received",
        "QUIC responses that the peer reset.",
        MetricType::Counter,
        |side| side.resets_received.get(),
    ),
    (
        "quic_bundles_broken",
        "Bundles lost with what was on them.",
        MetricType::Counter,
        |side| side.broken.get(),
    ),
];

impl Stats {
    /// Adds the families of QUIC to the text of a scrape.
    pub fn write(self: &Arc<Self>, out: &mut String) {
        let mut registry = Registry::with_prefix("corelane");
        registry.register_collector(Box::new(Sides(Arc::clone(self))));
        // Writing into a string does not fail.
        let _ = text::encode_registry(out, &registry);
    }
}

/// The numbers in the form of the library.
#[derive(Debug)]
struct Sides(Arc<Stats>);

impl Collector for Sides {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let sides = [("caller", &self.0.caller), ("worker", &self.0.worker)];
        for (name, help, kind, value) in FAMILIES {
            let mut family = encoder.encode_descriptor(name, help, None, kind)?;
            for (word, side) in sides {
                let labels = [("side", word)];
                let mut series = family.encode_family(&labels)?;
                match kind {
                    MetricType::Gauge => series.encode_gauge(&value(side))?,
                    _ => series.encode_counter::<NoLabelSet, _, f64>(&value(side), None)?,
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_are_shown() {
        let stats = Arc::new(Stats::default());
        stats.caller.begun.add();
        stats.worker.connections.add();
        stats.worker.connections.add();
        stats.worker.connections.take();
        let mut text = String::new();
        stats.write(&mut text);
        for line in [
            "corelane_quic_responses_begun_total{side=\"caller\"} 1",
            "corelane_quic_connections{side=\"worker\"} 1",
            "corelane_quic_refused_total{side=\"worker\"} 0",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
    }
}
