//! `/metrics`: one snapshot of everything that is counted, written as Prometheus text.
//!
//! ```text
//! corelane_<counter>_total{core,cpu}   corelane_<gauge>{core,cpu}      each shard's cells
//! corelane_refused_total{core,cpu,reason}                              all refusals, one family
//! corelane_hop_seconds{core,cpu}   corelane_answer_seconds{core,cpu}   histograms
//! corelane_ring_info{core,cpu,ring,cause}   corelane_build_info{version}
//! corelane_route_*{listen,target}   corelane_discovery_*               control's own
//! ```
//! A scrape copies numbers and asks nobody: shards write their cells whether they are read or not.

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use corelane_engine::stats::{CellKind, Latency};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use crate::cores::CoreView;
use crate::discovery::DiscoveryStats;

/// Buckets of latency histograms: two for each doubling, from 1.5 us to 8.6 s.
const BUCKETS: usize = 46;
/// Cells of shards with this beginning become reasons of one family.
const REFUSED: &str = "refused_";

/// Everything that a scrape shows, copied at one moment.
#[derive(Debug)]
pub struct Snapshot {
    cores: Vec<CoreNumbers>,
    routes: Vec<RouteNumbers>,
    own: Vec<Number>,
}

#[derive(Debug)]
struct CoreNumbers {
    labels: [(&'static str, String); 2],
    ring: &'static str,
    cause: &'static str,
    cells: Vec<Number>,
    hop: Histogram,
    answer: Histogram,
}

#[derive(Debug)]
struct Number {
    name: &'static str,
    kind: CellKind,
    help: &'static str,
    value: f64,
}

#[derive(Debug)]
struct Histogram {
    sum_s: f64,
    count: u64,
    /// Upper bound in seconds and count, not cumulative; the last bound is infinite.
    buckets: Vec<(f64, u64)>,
}

/// What is known of one route.
#[derive(Clone, Debug)]
pub struct RouteNumbers {
    /// The endpoint that we offer.
    pub listen: String,
    /// The endpoint whose instances get the requests.
    pub target: String,
    /// Instances in the directory.
    pub instances: usize,
    /// Whether our record stands in discovery.
    pub registered: bool,
}

/// What control knows beside its cores and routes.
#[derive(Clone, Copy, Debug, Default)]
pub struct ProcessNumbers {
    /// Since the start.
    pub uptime: Duration,
    /// Directories handed to the shards.
    pub directories: u64,
    /// Whether the process is leaving.
    pub draining: bool,
}

impl Snapshot {
    /// Copies all numbers.
    pub fn take(
        cores: &[CoreView],
        routes: Vec<RouteNumbers>,
        process: ProcessNumbers,
        discovery: Option<&DiscoveryStats>,
    ) -> Self {
        let mut own = process.numbers();
        own.extend(discovery.into_iter().flat_map(discovery_numbers));
        Self {
            cores: cores.iter().map(core_numbers).collect(),
            routes,
            own,
        }
    }

    /// The text of a scrape.
    pub fn render(self) -> String {
        let mut registry = Registry::with_prefix("corelane");
        registry.register_collector(Box::new(self));
        let mut out = String::with_capacity(64 << 10);
        // Writing into a string does not fail.
        let _ = text::encode(&mut out, &registry);
        out
    }
}

impl ProcessNumbers {
    fn numbers(self) -> Vec<Number> {
        let gauge = |name, help, value| number(name, CellKind::Gauge, help, value);
        let counter = |name, help, value| number(name, CellKind::Counter, help, value);
        vec![
            gauge(
                "uptime_seconds",
                "Time since the start",
                self.uptime.as_secs_f64(),
            ),
            gauge(
                "draining",
                "1 while this process is leaving",
                f64::from(u8::from(self.draining)),
            ),
            counter(
                "directories_published",
                "Directories handed to the cores",
                self.directories as f64,
            ),
        ]
    }
}

fn number(name: &'static str, kind: CellKind, help: &'static str, value: f64) -> Number {
    Number {
        name,
        kind,
        help,
        value,
    }
}

fn core_numbers(core: &CoreView) -> CoreNumbers {
    let cells = core.stats.shard.each().into_iter();
    CoreNumbers {
        labels: [
            ("core", core.shard.to_string()),
            ("cpu", core.cpu.to_string()),
        ],
        ring: core.ring,
        cause: core.cause,
        cells: cells
            .map(|(name, kind, help, value)| number(name, kind, help, value as f64))
            .collect(),
        hop: histogram(&core.stats.hop),
        answer: histogram(&core.stats.answer),
    }
}

/// Fixed buckets, whatever has been counted: series that come and go break rates.
fn histogram(latency: &Latency) -> Histogram {
    let bounds: Vec<u64> = (0..BUCKETS)
        .map(|index| Latency::bound_ns(2 * index + 1))
        .collect();
    let mut counts = vec![0; BUCKETS + 1];
    let mut count = 0;
    for (bound_ns, times) in latency.counts() {
        counts[bounds.partition_point(|bound| *bound < bound_ns)] += times;
        count += times;
    }
    let seconds = |ns: u64| ns as f64 / 1e9;
    let bounds = bounds.into_iter().map(seconds).chain([f64::INFINITY]);
    Histogram {
        sum_s: seconds(latency.sum_ns()),
        count,
        buckets: bounds.zip(counts).collect(),
    }
}

fn discovery_numbers(stats: &DiscoveryStats) -> Vec<Number> {
    use CellKind::{Counter, Gauge};
    [
        (
            "discovery_watched_keys",
            Gauge,
            "Keys in all watched directories",
            &stats.watched_keys,
        ),
        (
            "discovery_stale_watches",
            Gauge,
            "Watches without contact to the store; their last known directory is kept",
            &stats.stale_watches,
        ),
        (
            "discovery_reconnects",
            Counter,
            "Times that contact to the store was lost and sought again",
            &stats.reconnects,
        ),
        (
            "discovery_resyncs",
            Counter,
            "Full lists taken over, the first of each watch included",
            &stats.resyncs,
        ),
        (
            "discovery_lease_losses",
            Counter,
            "Leases lost; each gave this process a new identity",
            &stats.lease_losses,
        ),
        (
            "discovery_writes_deferred",
            Counter,
            "Writes that failed and were put off",
            &stats.writes_deferred,
        ),
        (
            "discovery_rejected_records",
            Counter,
            "Stored values that are no records, too long, or too many",
            &stats.rejected_records,
        ),
        (
            "discovery_rejected_instances",
            Counter,
            "Instances that cannot be dialled",
            &stats.rejected_instances,
        ),
        (
            "discovery_mismatched_instances",
            Counter,
            "Instances whose key and value disagree",
            &stats.mismatched_instances,
        ),
        (
            "discovery_removals_deferred",
            Counter,
            "Lists after an outage that left removals to be confirmed",
            &stats.removals_deferred,
        ),
        (
            "discovery_card_conflicts",
            Counter,
            "Model cards left out because another one holds their place",
            &stats.card_conflicts,
        ),
        (
            "discovery_expired_files",
            Counter,
            "Files of others deleted because nobody refreshed them",
            &stats.expired_files,
        ),
    ]
    .into_iter()
    .map(|(name, kind, help, cell)| number(name, kind, help, cell.get() as f64))
    .collect()
}

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        self.infos(&mut encoder)?;
        self.cells(&mut encoder)?;
        self.refusals(&mut encoder)?;
        self.latencies(&mut encoder)?;
        self.routes(&mut encoder)?;
        for number in &self.own {
            let help = format!("{}.", number.help);
            let metric = encoder.encode_descriptor(number.name, &help, None, kind(number.kind))?;
            write(metric, number)?;
        }
        Ok(())
    }
}

impl Snapshot {
    fn infos(&self, encoder: &mut DescriptorEncoder) -> fmt::Result {
        let help = "The version of this program.";
        let mut build = encoder.encode_descriptor("build", help, None, MetricType::Info)?;
        build.encode_info(&[("version", env!("CARGO_PKG_VERSION"))])?;
        let help = "The ring of each core, and why it is not the other one.";
        let mut ring = encoder.encode_descriptor("ring", help, None, MetricType::Info)?;
        for core in &self.cores {
            let [(_, number), (_, cpu)] = &core.labels;
            ring.encode_info(&[
                ("core", number.as_str()),
                ("cpu", cpu),
                ("ring", core.ring),
                ("cause", core.cause),
            ])?;
        }
        Ok(())
    }

    /// Every cell of the shards but refusals: one family each, one series for each core.
    fn cells(&self, encoder: &mut DescriptorEncoder) -> fmt::Result {
        let Some(first) = self.cores.first() else {
            return Ok(());
        };
        for (index, cell) in first.cells.iter().enumerate() {
            if cell.name.starts_with(REFUSED) {
                continue;
            }
            let help = format!("{}.", cell.help);
            let mut family = encoder.encode_descriptor(cell.name, &help, None, kind(cell.kind))?;
            for core in &self.cores {
                // The list is the type's, so that every core has the same.
                if let Some(cell) = core.cells.get(index) {
                    write(family.encode_family(&core.labels)?, cell)?;
                }
            }
        }
        Ok(())
    }

    fn refusals(&self, encoder: &mut DescriptorEncoder) -> fmt::Result {
        let help = "Requests refused, by reason.";
        let mut family = encoder.encode_descriptor("refused", help, None, MetricType::Counter)?;
        for core in &self.cores {
            for cell in &core.cells {
                let Some(reason) = cell.name.strip_prefix(REFUSED) else {
                    continue;
                };
                let [(_, number), (_, cpu)] = &core.labels;
                let labels = [
                    ("core", number.as_str()),
                    ("cpu", cpu.as_str()),
                    ("reason", reason),
                ];
                write(family.encode_family(&labels)?, cell)?;
            }
        }
        Ok(())
    }

    fn latencies(&self, encoder: &mut DescriptorEncoder) -> fmt::Result {
        type Pick = fn(&CoreNumbers) -> &Histogram;
        let families: [(&str, &str, Pick); 2] = [
            (
                "hop_seconds",
                "From a request's arrival to its frame being in an instance's socket.",
                |core| &core.hop,
            ),
            (
                "answer_seconds",
                "From there to the instance's answer.",
                |core| &core.answer,
            ),
        ];
        for (name, help, pick) in families {
            let kind = MetricType::Histogram;
            let mut family = encoder.encode_descriptor(name, help, None, kind)?;
            for core in &self.cores {
                let histogram = pick(core);
                let mut series = family.encode_family(&core.labels)?;
                series.encode_histogram::<NoLabelSet>(
                    histogram.sum_s,
                    histogram.count,
                    &histogram.buckets,
                    None::<&HashMap<usize, _>>,
                )?;
            }
        }
        Ok(())
    }

    fn routes(&self, encoder: &mut DescriptorEncoder) -> fmt::Result {
        type Pick = fn(&RouteNumbers) -> u64;
        let families: [(&str, &str, Pick); 2] = [
            (
                "route_instances",
                "Instances that discovery knows of a route's target.",
                |route| route.instances as u64,
            ),
            (
                "route_registered",
                "1 while a route's listen endpoint stands in discovery.",
                |route| u64::from(route.registered),
            ),
        ];
        for (name, help, pick) in families {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for route in &self.routes {
                let labels = [
                    ("listen", route.listen.as_str()),
                    ("target", route.target.as_str()),
                ];
                family.encode_family(&labels)?.encode_gauge(&pick(route))?;
            }
        }
        Ok(())
    }
}

fn kind(kind: CellKind) -> MetricType {
    match kind {
        CellKind::Counter => MetricType::Counter,
        CellKind::Gauge => MetricType::Gauge,
    }
}

fn write(mut metric: MetricEncoder, number: &Number) -> fmt::Result {
    match number.kind {
        CellKind::Counter => metric.encode_counter::<NoLabelSet, _, u64>(&number.value, None),
        CellKind::Gauge => metric.encode_gauge(&number.value),
    }
}
