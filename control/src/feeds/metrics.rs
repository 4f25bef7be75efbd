//! What `/metrics` says of the feeds.
//!
//! ```text
//! corelane_feed_<number>{target,topic}         of every feed
//! corelane_feed_kv_<counter>_total{target}     of KV events
//! ```

use std::fmt;
use std::rc::Rc;
use std::time::Instant;

use corelane_engine::stats::CellKind;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use super::{Feed, What};

/// One number of one feed.
type Number = (&'static str, CellKind, &'static str, f64);

#[derive(Debug)]
struct Snapshot(Vec<([(&'static str, String); 2], Vec<Number>)>);

/// Writes all families, without the mark of the end.
pub(super) fn write(feeds: &[Rc<Feed>], out: &mut String) {
    let of = |feed: &Rc<Feed>| {
        let target = ("target", feed.target.to_string());
        ([target, ("topic", feed.topic.to_owned())], numbers(feed))
    };
    let mut registry = Registry::with_prefix("corelane_feed");
    registry.register_collector(Box::new(Snapshot(feeds.iter().map(of).collect())));
    // Writing into a string does not fail.
    let _ = text::encode_registry(out, &registry);
}

fn numbers(feed: &Feed) -> Vec<Number> {
    use CellKind::{Counter, Gauge};
    let (before, now) = feed.missed.get();
    let is_connected = f64::from(u8::from(feed.connected.get()));
    let lag_s = feed.lag_ms.get() as f64 / 1000.0;
    let mut unreadable = before.unreadable + now.unreadable;
    let mut more: Vec<Number> = match &feed.what {
        What::Loads(gauge) => {
            let gauge = gauge.borrow();
            unreadable += gauge.unreadable;
            let fresh = gauge.fresh(Instant::now()) as f64;
            let help = "Instances whose own word counts as their load";
            vec![("fresh_instances", Gauge, help, fresh)]
        }
        What::Caches(digest) => {
            let counts = digest.borrow().counts;
            unreadable += counts.unreadable;
            let number = |name, help, value: u64| (name, Counter, help, value as f64);
            vec![
                number("kv_taken", "KV events taken over", counts.taken),
                number(
                    "kv_other_tiers",
                    "KV events about other storage than the memory of the GPU",
                    counts.other_tiers,
                ),
                number(
                    "kv_repeated",
                    "KV events that had come before",
                    counts.repeated,
                ),
                number(
                    "kv_lost",
                    "KV events that never came, by their numbers",
                    counts.lost,
                ),
                number(
                    "kv_gaps",
                    "Ranks learned anew because some were lost",
                    counts.gaps,
                ),
                number(
                    "kv_restarts",
                    "Ranks learned anew because another publisher tells of them",
                    counts.restarts,
                ),
            ]
        }
    };
    let events = feed.events.get() as f64;
    let lost = (before.lost + now.lost) as f64;
    more.extend([
        (
            "connected",
            Gauge,
            "1 while the subscription stands",
            is_connected,
        ),
        (
            "lag_seconds",
            Gauge,
            "Age of the last event when it came",
            lag_s,
        ),
        ("events", Counter, "Events that came", events),
        (
            "lost",
            Counter,
            "Events that never came, by their publishers' numbers",
            lost,
        ),
        (
            "unreadable",
            Counter,
            "Events that are none",
            unreadable as f64,
        ),
    ]);
    more
}

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let mut names: Vec<&Number> = Vec::new();
        for number in self.0.iter().flat_map(|(_, numbers)| numbers) {
            if names.iter().all(|other| other.0 != number.0) {
                names.push(number);
            }
        }
        for (name, kind, help, _) in names {
            let kind_of = match kind {
                CellKind::Counter => MetricType::Counter,
                CellKind::Gauge => MetricType::Gauge,
            };
            let help = format!("{help}.");
            let mut family = encoder.encode_descriptor(name, &help, None, kind_of)?;
            for (labels, numbers) in &self.0 {
                let Some(number) = numbers.iter().find(|number| number.0 == *name) else {
                    continue;
                };
                let mut metric = family.encode_family(labels)?;
                match kind {
                    CellKind::Counter => {
                        metric.encode_counter::<NoLabelSet, _, u64>(&number.3, None)?;
                    }
                    CellKind::Gauge => metric.encode_gauge(&number.3)?,
                }
            }
        }
        Ok(())
    }
}
