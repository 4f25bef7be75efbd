//! What `/metrics` says of the broker of events, and of the event plane of a worker.
//!
//! ```text
//! corelane_events_<counter>_total, corelane_events_<gauge>    the plane as a whole
//! corelane_events_topic_received_total{topic}                 64 topics, and one for the others
//! corelane_events_topic_bytes_total{topic}
//! ```

use std::fmt;

use corelane_engine::events::stats::Stats;
use corelane_engine::stats::CellKind;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use crate::broker::Broker;

#[derive(Debug)]
struct Snapshot {
    cells: Vec<(&'static str, CellKind, &'static str, u64)>,
    topics: Vec<(String, u64, u64)>,
}

/// Writes all families, without the mark of the end.
pub fn write(broker: &Broker, out: &mut String) {
    write_stats(broker.stats(), out);
}

/// Writes those of a plane.
pub(crate) fn write_stats(stats: &Stats, out: &mut String) {
    let topics = stats.topics().into_iter();
    let snapshot = Snapshot {
        cells: stats.plane.each(),
        topics: topics
            .map(|(name, events, bytes)| (name.to_owned(), events, bytes))
            .collect(),
    };
    let mut registry = Registry::with_prefix("corelane_events");
    registry.register_collector(Box::new(snapshot));
    // Writing into a string does not fail.
    let _ = text::encode_registry(out, &registry);
}

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        for (name, kind, help, value) in &self.cells {
            let name = name.strip_prefix("events_").unwrap_or(name);
            let help = format!("{help}.");
            match kind {
                CellKind::Counter => encoder
                    .encode_descriptor(name, &help, None, MetricType::Counter)?
                    .encode_counter::<NoLabelSet, _, u64>(value, None)?,
                CellKind::Gauge => encoder
                    .encode_descriptor(name, &help, None, MetricType::Gauge)?
                    .encode_gauge(value)?,
            }
        }
        self.of_topics(
            &mut encoder,
            "topic_received",
            "Events received.",
            |topic| topic.1,
        )?;
        self.of_topics(&mut encoder, "topic_bytes", "Bytes of them.", |topic| {
            topic.2
        })
    }
}

impl Snapshot {
    fn of_topics(
        &self,
        encoder: &mut DescriptorEncoder<'_>,
        name: &str,
        help: &str,
        read: impl Fn(&(String, u64, u64)) -> u64,
    ) -> fmt::Result {
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for topic in &self.topics {
            let labels = [("topic", topic.0.clone())];
            let value = read(topic);
            family
                .encode_family(&labels)?
                .encode_counter::<NoLabelSet, _, u64>(&value, None)?;
        }
        Ok(())
    }
}
