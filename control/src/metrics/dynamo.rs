//! The families that Dynamo's worker has too, under its names and with its labels
//! (`spec/events-discovery.md` §8), as far as they mean the same here.
//!
//! ```text
//! dynamo_component_*{dynamo_namespace,dynamo_component,dynamo_endpoint,worker_id}  each endpoint
//! dynamo_component_uptime_seconds{worker_id}                                       the process
//! dynamo_work_handler_*   dynamo_engine_request   dynamo_request_queue   dynamo_rejection_*
//! ```
//! What is not here: the transit time, for which a worker would have to look into the headers of
//! each request and trust the clock of another machine, and what belongs to Dynamo's dispatcher.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use corelane_codec::path::{EndpointId, instance_hex};
use corelane_engine::stats::{HandlerStats, Stats};
use corelane_engine::times::{Histogram, Times};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

/// Ends a text of this format.
const END: &str = "# EOF\n";

/// One endpoint that this process serves.
#[derive(Clone, Debug)]
pub struct ServedNumbers {
    /// Its name.
    pub id: EndpointId,
    /// Its counters, one for each shard.
    pub stats: Vec<Arc<HandlerStats>>,
}

/// What a process says of itself as a worker.
#[derive(Clone, Debug, Default)]
pub struct WorkerNumbers {
    /// Its instance in discovery.
    pub instance_id: u64,
    /// Since its start.
    pub uptime: Duration,
    /// What it serves.
    pub served: Vec<ServedNumbers>,
    /// Its shards.
    pub shards: Vec<Arc<Stats>>,
    /// Requests in handlers and requests that wait for one, at most; of all shards together.
    /// None for a process that serves nothing.
    pub bounds: Option<(u32, u32)>,
}

impl WorkerNumbers {
    /// The families, put before the end of `text`, which is a scrape.
    pub fn join(self, text: String) -> String {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(self));
        let mut out = text;
        out.truncate(out.strip_suffix(END).map_or(out.len(), str::len));
        // Writing into a string does not fail.
        let _ = text::encode(&mut out, &registry);
        out
    }

    fn sum(&self, number: impl Fn(&HandlerStats) -> u64) -> u64 {
        let stats = self.served.iter().flat_map(|served| &served.stats);
        stats.map(|stats| number(stats)).sum()
    }

    fn gauge(&self, number: impl Fn(&Stats) -> u64) -> u64 {
        self.shards.iter().map(|stats| number(stats)).sum()
    }
}

/// A name as a label's value: letters, digits and `_` (`spec/events-discovery.md` §8.1).
fn sanitized(name: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
    let name: String = name.chars().map(plain).collect();
    let bare = name.trim_start_matches('_');
    // One underscore may lead, two are the system's own.
    match name.starts_with('_') || bare.starts_with(|c: char| c.is_ascii_digit()) {
        true => format!("_{bare}"),
        false => name,
    }
}

impl ServedNumbers {
    fn sum(&self, number: impl Fn(&HandlerStats) -> u64) -> u64 {
        self.stats.iter().map(|stats| number(stats)).sum()
    }

    fn labels(&self, worker_id: &str) -> [(&'static str, String); 4] {
        [
            ("dynamo_component", sanitized(&self.id.component)),
            ("dynamo_endpoint", sanitized(&self.id.name)),
            ("dynamo_namespace", sanitized(&self.id.namespace)),
            ("worker_id", worker_id.to_owned()),
        ]
    }

    /// Requests that a handler has: those that it got less those that have ended.
    fn running(&self) -> u64 {
        let count = |histogram: &Histogram| -> u64 {
            histogram.buckets().iter().map(|(_, count)| count).sum()
        };
        let running = |stats: &Arc<HandlerStats>| {
            count(&stats.times.slot_wait).saturating_sub(count(&stats.times.duration))
        };
        self.stats.iter().map(running).sum()
    }
}

/// The same histogram of several shards, added.
fn added<'a>(all: impl Iterator<Item = &'a Histogram>) -> (f64, u64, Vec<(f64, u64)>) {
    let (mut sum_s, mut buckets): (f64, Vec<(f64, u64)>) = (0.0, Vec::new());
    for one in all {
        sum_s += one.sum_s();
        let counts = one.buckets();
        if buckets.is_empty() {
            buckets = counts;
        } else {
            let pairs = buckets.iter_mut().zip(counts);
            pairs.for_each(|(bucket, (_, more))| bucket.1 += more);
        }
    }
    let count = buckets.iter().map(|(_, count)| count).sum();
    (sum_s, count, buckets)
}

impl Collector for WorkerNumbers {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let worker_id = instance_hex(self.instance_id);
        let help = "Time since the start of the process.";
        let name = "dynamo_component_uptime_seconds";
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        let label = [("worker_id", &*worker_id)];
        family
            .encode_family(&label)?
            .encode_gauge(&self.uptime.as_secs_f64())?;
        if self.bounds.is_some() {
            self.endpoints(&mut encoder, &worker_id)?;
            self.errors(&mut encoder, &worker_id)?;
            self.pool(&mut encoder)?;
            self.waits(&mut encoder)?;
        }
        Ok(())
    }
}

type Count = fn(&HandlerStats) -> u64;

impl WorkerNumbers {
    fn endpoints(&self, encoder: &mut DescriptorEncoder, worker_id: &str) -> fmt::Result {
        let counters: [(&str, &str, Count); 4] = [
            ("requests", "Requests that arrived.", |stats| {
                stats.requests.get()
            }),
            (
                "request_bytes",
                "Bytes of the envelopes of requests.",
                |stats| stats.request_bytes.get(),
            ),
            ("response_bytes", "Bytes of response items.", |stats| {
                stats.response_bytes.get()
            }),
            (
                "cancellation",
                "Requests that their callers stopped.",
                |stats| stats.cancelled.get(),
            ),
        ];
        for (name, help, count) in counters {
            let name = format!("dynamo_component_{name}");
            let mut family = encoder.encode_descriptor(&name, help, None, MetricType::Counter)?;
            for served in &self.served {
                let value = served.sum(count);
                family
                    .encode_family(&served.labels(worker_id))?
                    .encode_counter::<NoLabelSet, _, f64>(&value, None)?;
            }
        }
        let (name, help) = (
            "dynamo_component_inflight_requests",
            "Requests in handlers.",
        );
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for served in &self.served {
            let labels = served.labels(worker_id);
            family
                .encode_family(&labels)?
                .encode_gauge(&served.running())?;
        }
        let name = "dynamo_component_request_duration_seconds";
        let help = "From the moment that a handler got a request to the end of its response.";
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
        for served in &self.served {
            let durations = served.stats.iter().map(|stats| &stats.times.duration);
            let (sum_s, count, buckets) = added(durations);
            family
                .encode_family(&served.labels(worker_id))?
                .encode_histogram::<NoLabelSet>(sum_s, count, &buckets, None::<&HashMap<_, _>>)?;
        }
        Ok(())
    }

    fn errors(&self, encoder: &mut DescriptorEncoder, worker_id: &str) -> fmt::Result {
        let kinds: [(&str, Count); 4] = [
            ("deserialization", |stats| stats.undecodable.get()),
            ("generate", |stats| stats.error_answers.get()),
            ("publish_response", |stats| stats.cut_off.get()),
            ("response_stream", |stats| stats.unreachable.get()),
        ];
        let (name, help) = (
            "dynamo_component_errors",
            "Requests that came to nothing, by cause.",
        );
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for served in &self.served {
            let [component, endpoint, namespace, worker] = served.labels(worker_id);
            for (kind, count) in kinds {
                let kind = ("error_type", kind.to_owned());
                let labels = [&component, &endpoint, &namespace, &kind, &worker].map(Clone::clone);
                family
                    .encode_family(&labels)?
                    .encode_counter::<NoLabelSet, _, f64>(&served.sum(count), None)?;
            }
        }
        Ok(())
    }

    /// Slots and queue, of all endpoints together.
    fn pool(&self, encoder: &mut DescriptorEncoder) -> fmt::Result {
        let (running_max, queue_max) = self.bounds.unwrap_or_default();
        let queued = self.gauge(|stats| stats.shard.queued.get());
        let handling = self.gauge(|stats| stats.shard.handling.get());
        let running = handling.saturating_sub(queued);
        for (name, help, value) in [
            (
                "dynamo_work_handler_queue_depth",
                "Requests that wait for a slot.",
                queued,
            ),
            (
                "dynamo_work_handler_queue_capacity",
                "Most of them.",
                queue_max.into(),
            ),
            (
                "dynamo_work_handler_pool_active_tasks",
                "Slots in use.",
                running,
            ),
            (
                "dynamo_work_handler_pool_capacity",
                "Slots.",
                running_max.into(),
            ),
            (
                "dynamo_engine_request",
                "Requests that handlers have.",
                running,
            ),
            (
                "dynamo_request_queue",
                "Requests that wait for a handler.",
                queued,
            ),
        ] {
            let mut gauge = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            gauge.encode_gauge(&value)?;
        }
        let help = "Requests refused because slots and queue were full.";
        let name = "dynamo_rejection_request";
        let mut counter = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        counter.encode_counter::<NoLabelSet, _, f64>(&self.sum(|stats| stats.refused.get()), None)
    }

    /// Times of all endpoints together.
    fn waits(&self, encoder: &mut DescriptorEncoder) -> fmt::Result {
        type Pick = fn(&Times) -> &Histogram;
        let histograms: [(&str, &str, Pick); 2] = [
            (
                "dynamo_work_handler_time_to_first_response_seconds",
                "From the moment that a handler got a request to the prologue of its response.",
                |times| &times.first_response,
            ),
            (
                "dynamo_work_handler_permit_wait_seconds",
                "From a request's arrival to the moment that a handler got it.",
                |times| &times.slot_wait,
            ),
        ];
        for (name, help, pick) in histograms {
            let stats = self.served.iter().flat_map(|served| &served.stats);
            let (sum_s, count, buckets) = added(stats.map(|stats| pick(&stats.times)));
            if buckets.is_empty() {
                continue;
            }
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
            family.encode_histogram::<NoLabelSet>(
                sum_s,
                count,
                &buckets,
                None::<&HashMap<_, _>>,
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_labels() {
        for (name, label) in [
            ("generate", "generate"),
            ("back-end", "back_end"),
            ("back:end", "back_end"),
            ("1st", "_1st"),
            ("__x", "_x"),
            ("_x", "_x"),
            ("a__b", "a__b"),
        ] {
            assert_eq!(sanitized(name), label, "{name}");
        }
    }

    #[test]
    fn shards_are_added() {
        let stats: Vec<Arc<HandlerStats>> = (0..2).map(|_| Arc::default()).collect();
        for (stats, times) in stats.iter().zip([1, 2]) {
            for _ in 0..times {
                stats.requests.add(1);
                stats.times.slot_wait.record(1);
            }
            stats.times.duration.record(1_000_000);
        }
        let id = EndpointId::new("demo", "back-end", "generate");
        let numbers = WorkerNumbers {
            instance_id: 0x1a,
            served: vec![ServedNumbers { id, stats }],
            bounds: Some((5, 7)),
            ..WorkerNumbers::default()
        };
        let text = numbers.join("a 1\n# EOF\n".to_owned());
        let labels = "dynamo_component=\"back_end\",dynamo_endpoint=\"generate\",\
                      dynamo_namespace=\"demo\",worker_id=\"1a\"";
        for line in [
            "a 1\n".to_owned(),
            format!("dynamo_component_requests_total{{{labels}}} 3\n"),
            format!("dynamo_component_inflight_requests{{{labels}}} 1\n"),
            format!("dynamo_component_request_duration_seconds_count{{{labels}}} 2\n"),
            "dynamo_work_handler_permit_wait_seconds_count 3\n".to_owned(),
            "dynamo_work_handler_queue_capacity 7\n".to_owned(),
            "dynamo_component_uptime_seconds{worker_id=\"1a\"} 0.0\n".to_owned(),
        ] {
            assert!(text.contains(&line), "{line}\n{text}");
        }
        assert!(text.ends_with(END) && text.matches(END).count() == 1);
    }
}
