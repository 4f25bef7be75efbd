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

use super::{Counts, Feed, What};

/// One number of one feed.
type Number = (&'static str, CellKind, &'static str, f64);

/// Target and topic of a feed.
type Labels = [(&'static str, String); 2];

#[derive(Debug)]
struct Snapshot(Vec<(Labels, Vec<Number>)>);

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
    let (mut numbers, unreadable) = match &feed.what {
        What::Loads(gauge) => {
            let gauge = gauge.borrow();
            let fresh = gauge.fresh(Instant::now()) as f64;
            let help = "Instances whose own word counts as their load";
            let fresh = ("fresh_instances", Gauge, help, fresh);
            (vec![fresh], gauge.unreadable)
        }
        What::Caches(digest) => {
            let digest = digest.borrow();
            let mut numbers = of_caches(digest.counts);
            let help = "Ranks whose worker is being asked what is in its KV cache";
            numbers.push(("kv_asking", Gauge, help, digest.waiting() as f64));
            (numbers, digest.counts.unreadable)
        }
    };
    let unreadable = before.unreadable + now.unreadable + unreadable;
    let lost = before.lost + now.lost;
    let lag_s = feed.lag_ms.get() as f64 / 1000.0;
    let is_connected = f64::from(u8::from(feed.connected.get()));
    let help = "1 while the subscription stands";
    numbers.push(("connected", Gauge, help, is_connected));
    let help = "Age of the last event when it came";
    numbers.push(("lag_seconds", Gauge, help, lag_s));
    for (name, help, value) in [
        ("events", "Events that came", feed.events.get()),
        (
            "lost",
            "Events that never came, by their publishers' numbers",
            lost,
        ),
        ("unreadable", "Events that are none", unreadable),
    ] {
        numbers.push((name, Counter, help, value as f64));
    }
    numbers
}

fn of_caches(counts: Counts) -> Vec<Number> {
    let tiers = "KV events about other storage than the memory of the GPU";
    let restarts = "Ranks learned anew because another publisher tells of them";
    let strangers = "KV events about a rank that is not their publisher's, by discovery";
    let asked = "Questions to workers about what is in their KV caches";
    let unanswered = "Of those, given up: the cache is learned as it changes";
    let all = [
        ("kv_taken", "KV events taken over", counts.taken),
        ("kv_other_tiers", tiers, counts.other_tiers),
        (
            "kv_repeated",
            "KV events that had come before",
            counts.repeated,
        ),
        (
            "kv_lost",
            "KV events that never came, by their numbers",
            counts.lost,
        ),
        (
            "kv_gaps",
            "Times that KV events of a rank were missing",
            counts.gaps,
        ),
        ("kv_restarts", restarts, counts.restarts),
        ("kv_strangers", strangers, counts.strangers),
        ("kv_asked", asked, counts.asked),
        ("kv_recovered", "Of those, answered", counts.recovered),
        ("kv_unanswered", unanswered, counts.unanswered),
    ];
    let number = |(name, help, value): (_, _, u64)| (name, CellKind::Counter, help, value as f64);
    all.into_iter().map(number).collect()
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
                        metric.encode_counter::<NoLabelSet, _, u64>(&(number.3 as u64), None)?;
                    }
                    CellKind::Gauge => metric.encode_gauge(&number.3)?,
                }
            }
        }
        Ok(())
    }
}
