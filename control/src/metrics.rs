//! `/metrics`: one snapshot of everything that is counted, written as Prometheus text.
//!
//! ```text
//! corelane_<counter>_total{core,cpu}   corelane_<gauge>{core,cpu}      each shard's cells
//! corelane_refused_total{core,cpu,reason}                              all refusals, one family
//! corelane_hop_seconds{core,cpu}   corelane_answer_seconds{core,cpu}   histograms
//! corelane_locality_ratio{core,cpu}   corelane_locality_ratio_all       of accepted connections
//! corelane_ring_info{core,cpu,ring,cause}   corelane_build_info{version}
//! corelane_{first,inter}_item_seconds{core,cpu,listen,target}         of relayed routes
//! corelane_route_*{listen,target}   corelane_discovery_*               control's own
//! dynamo_*                                                             see `dynamo`
//! ```
//! A scrape copies numbers and asks nobody: shards write their cells whether they are read or not.

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use corelane_engine::config::ANY_CPU;
use corelane_engine::stats::{CellKind, Latency};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::registry::Registry;

use crate::cores::CoreView;
use crate::discovery::DiscoveryStats;
use crate::logging::dropped;

mod discovery;
mod dynamo;
mod locality;

use self::discovery::discovery_numbers;
use self::locality::Locality;
pub use dynamo::{ServedNumbers, WorkerNumbers};

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
    uptime: Duration,
}

#[derive(Debug)]
struct CoreNumbers {
    labels: [(&'static str, String); 2],
    ring: &'static str,
    cause: &'static str,
    cells: Vec<Number>,
    hop: Histogram,
    answer: Histogram,
    locality: Locality,
    /// First item and inter-item latencies of each relayed route, by its place.
    relayed: Vec<(usize, [Histogram; 2])>,
}

#[derive(Debug)]
struct Number {
    name: &'static str,
    kind: CellKind,
    help: &'static str,
    value: u64,
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
    /// Its place in the directory, if its responses are relayed.
    pub relayed_at: Option<usize>,
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
    /// Parts of it that make no progress.
    pub stuck: u64,
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
            cores: cores
                .iter()
                .map(|core| core_numbers(core, &routes))
                .collect(),
            routes,
            own,
            uptime: process.uptime,
        }
    }

    /// The text of a scrape.
    pub fn render(self) -> String {
        self.render_with(|_| {})
    }

    /// The text of a scrape to which others of this process add families of their own.
    pub fn render_with(self, more: impl FnOnce(&mut String)) -> String {
        let mut registry = Registry::with_prefix("corelane");
        registry.register_collector(Box::new(self));
        let mut out = String::with_capacity(64 << 10);
        // Writing into a string does not fail.
        let _ = text::encode_registry(&mut out, &registry);
        more(&mut out);
        let _ = text::encode_eof(&mut out);
        out
    }
}

impl ProcessNumbers {
    fn numbers(self) -> Vec<Number> {
        let gauge = |name, help, value| number(name, CellKind::Gauge, help, value);
        let counter = |name, help, value| number(name, CellKind::Counter, help, value);
        vec![
            gauge(
                "process_draining",
                "1 while this process is leaving",
                u64::from(self.draining),
            ),
            gauge(
                "process_stuck",
                "Cores, and other threads, that have made no progress for 10 s",
                self.stuck,
            ),
            counter(
                "directories_published",
                "Directories handed to the cores",
                self.directories,
            ),
            counter(LOG_LINES_DROPPED.0, LOG_LINES_DROPPED.1, dropped()),
        ]
    }
}

/// What a process says of its log that serves neither cores nor routes.
pub fn write_log(out: &mut String) {
    let mut registry = Registry::with_prefix("corelane");
    let (name, help) = LOG_LINES_DROPPED;
    registry.register(name, help, ConstCounter::new(dropped()));
    // Writing into a string does not fail.
    let _ = text::encode_registry(out, &registry);
}

const LOG_LINES_DROPPED: (&str, &str) = (
    "log_lines_dropped",
    "Lines of the log that whoever reads standard error did not take",
);

fn number(name: &'static str, kind: CellKind, help: &'static str, value: u64) -> Number {
    Number {
        name,
        kind,
        help,
        value,
    }
}

fn core_numbers(core: &CoreView, routes: &[RouteNumbers]) -> CoreNumbers {
    let relayed = |(route, numbers): (usize, &RouteNumbers)| {
        let stats = core.stats.routes.get(numbers.relayed_at?)?;
        let both = [&stats.first_item, &stats.inter_item].map(histogram);
        Some((route, both))
    };
    let cells = core.stats.shard.each().into_iter();
    CoreNumbers {
        labels: [("core", core.shard.to_string()), ("cpu", cpu(core.cpu))],
        ring: core.ring,
        cause: core.cause,
        cells: cells
            .map(|(name, kind, help, value)| number(name, kind, help, value))
            .collect(),
        hop: histogram(&core.stats.hop),
        answer: histogram(&core.stats.answer),
        locality: Locality::of(&core.stats),
        relayed: routes.iter().enumerate().filter_map(relayed).collect(),
    }
}

fn cpu(cpu: usize) -> String {
    match cpu {
        ANY_CPU => "any".to_owned(),
        cpu => cpu.to_string(),
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

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        self.infos(&mut encoder)?;
        self.cells(&mut encoder)?;
        self.refusals(&mut encoder)?;
        self.latencies(&mut encoder)?;
        self.locality(&mut encoder)?;
        self.relayed(&mut encoder)?;
        self.routes(&mut encoder)?;
        let help = "Time since the start.";
        let mut uptime =
            encoder.encode_descriptor("uptime_seconds", help, None, MetricType::Gauge)?;
        uptime.encode_gauge(&self.uptime.as_secs_f64())?;
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
                write_histogram(family.encode_family(&core.labels)?, pick(core))?;
            }
        }
        Ok(())
    }

    /// What only a router that relays can see: the times of the responses themselves.
    fn relayed(&self, encoder: &mut DescriptorEncoder) -> fmt::Result {
        let families = [
            (
                "first_item_seconds",
                "From a request's arrival to the first item of its relayed response.",
            ),
            (
                "inter_item_seconds",
                "From one item of a relayed response to the next.",
            ),
        ];
        if self.cores.iter().all(|core| core.relayed.is_empty()) {
            return Ok(());
        }
        for (which, (name, help)) in families.into_iter().enumerate() {
            let kind = MetricType::Histogram;
            let mut family = encoder.encode_descriptor(name, help, None, kind)?;
            for core in &self.cores {
                let [(_, number), (_, cpu)] = &core.labels;
                for (route, histograms) in &core.relayed {
                    let Some(route) = self.routes.get(*route) else {
                        continue;
                    };
                    let labels = [
                        ("core", number.as_str()),
                        ("cpu", cpu),
                        ("listen", &route.listen),
                        ("target", &route.target),
                    ];
                    write_histogram(family.encode_family(&labels)?, &histograms[which])?;
                }
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

fn write_histogram(mut series: MetricEncoder, histogram: &Histogram) -> fmt::Result {
    series.encode_histogram::<NoLabelSet>(
        histogram.sum_s,
        histogram.count,
        &histogram.buckets,
        None::<&HashMap<usize, _>>,
    )
}

fn kind(kind: CellKind) -> MetricType {
    match kind {
        CellKind::Counter => MetricType::Counter,
        CellKind::Gauge => MetricType::Gauge,
    }
}

fn write(mut metric: MetricEncoder, number: &Number) -> fmt::Result {
    match number.kind {
        CellKind::Counter => metric.encode_counter::<NoLabelSet, _, f64>(&number.value, None),
        CellKind::Gauge => metric.encode_gauge(&number.value),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::sync::Arc;

    use corelane_engine::stats::Stats;

    use super::*;

    fn core(shard: usize, cause: &'static str) -> CoreView {
        CoreView {
            shard,
            cpu: shard + 4,
            ring: "epoll",
            cause,
            stats: Arc::new(Stats::default()),
        }
    }

    fn route() -> RouteNumbers {
        RouteNumbers {
            listen: "a/b/c".into(),
            target: "a/\"d/c".into(),
            relayed_at: None,
            instances: 3,
            registered: true,
        }
    }

    fn process() -> ProcessNumbers {
        ProcessNumbers {
            uptime: Duration::from_millis(1_500),
            directories: 7,
            draining: false,
            stuck: 0,
        }
    }

    /// Series and their values.
    fn series(text: &str) -> BTreeMap<&str, f64> {
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let pairs = lines.map(|line| line.rsplit_once(' ').unwrap());
        pairs
            .map(|(name, value)| (name, value.parse().unwrap()))
            .collect()
    }

    #[test]
    fn every_family_stands_once_and_says_what_it_is() {
        let stats = DiscoveryStats::default();
        let cores = [core(0, "seccomp"), core(1, "seccomp")];
        let text = Snapshot::take(&cores, vec![route(), route()], process(), Some(&stats)).render();
        assert!(text.ends_with("# EOF\n"));
        let mut types = BTreeMap::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                assert!(types.insert(name, kind).is_none(), "{name} twice");
            }
            if let Some(rest) = line.strip_prefix("# HELP ") {
                assert!(rest.ends_with('.') && !rest.ends_with(".."), "{rest}");
            }
        }
        for name in series(&text).keys() {
            let bare = name.split('{').next().unwrap();
            assert!(bare.starts_with("corelane_"), "{bare}");
            let suffixes = ["_total", "_info", "_sum", "_count", "_bucket", ""];
            let typed = suffixes
                .iter()
                .filter_map(|suffix| types.get(bare.strip_suffix(suffix)?));
            assert_eq!(typed.count(), 1, "{bare}");
        }
        assert_eq!(types["corelane_refused"], "counter");
        assert!(
            !types
                .keys()
                .any(|name| name.starts_with("corelane_refused_"))
        );
    }

    #[test]
    fn numbers_stand_where_they_belong() {
        let cores = [core(0, "usable"), core(1, "memlock")];
        let cells = &cores[1].stats.shard;
        cells.requests.add(12);
        cells.in_flight.set(2);
        cells.refused_no_instance.add(5);
        let stats = DiscoveryStats::default();
        stats.lease_losses.set(1);
        let text = Snapshot::take(&cores, vec![route()], process(), Some(&stats)).render();
        let series = series(&text);
        for (name, value) in [
            (r#"corelane_requests_total{core="1",cpu="5"}"#, 12.0),
            (r#"corelane_requests_total{core="0",cpu="4"}"#, 0.0),
            (r#"corelane_in_flight{core="1",cpu="5"}"#, 2.0),
            (
                r#"corelane_refused_total{core="1",cpu="5",reason="no_instance"}"#,
                5.0,
            ),
            (
                r#"corelane_ring_info{core="1",cpu="5",ring="epoll",cause="memlock"}"#,
                1.0,
            ),
            (
                r#"corelane_route_instances{listen="a/b/c",target="a/\"d/c"}"#,
                3.0,
            ),
            (
                r#"corelane_route_registered{listen="a/b/c",target="a/\"d/c"}"#,
                1.0,
            ),
            ("corelane_uptime_seconds", 1.5),
            ("corelane_directories_published_total", 7.0),
            ("corelane_process_draining", 0.0),
            ("corelane_discovery_lease_losses_total", 1.0),
        ] {
            assert_eq!(series.get(name), Some(&value), "{name}\n{text}");
        }
        let version = format!(
            r#"corelane_build_info{{version="{}"}}"#,
            env!("CARGO_PKG_VERSION")
        );
        assert!(series.contains_key(version.as_str()));
        assert!(text.contains("corelane_requests_total{core=\"1\",cpu=\"5\"} 12\n"));
    }

    #[test]
    fn relayed_routes_have_the_times_of_their_items() {
        let core = core(0, "usable");
        let route = |listen: &str, relayed_at| RouteNumbers {
            listen: listen.into(),
            target: "a/b/c".into(),
            relayed_at,
            instances: 1,
            registered: true,
        };
        let take = || {
            let routes = vec![route("direct/r/g", None), route("relay/r/g", Some(1))];
            let cores = std::slice::from_ref(&core);
            Snapshot::take(cores, routes, process(), None).render()
        };
        assert!(!take().contains("first_item"));
        core.stats.routes.open(1);
        core.stats
            .routes
            .get(1)
            .unwrap()
            .first_item
            .record(1_000_000);
        let text = take();
        let labels = r#"{core="0",cpu="4",listen="relay/r/g",target="a/b/c"}"#;
        let series = series(&text);
        assert_eq!(
            series[&*format!("corelane_first_item_seconds_count{labels}")],
            1.0
        );
        assert_eq!(
            series[&*format!("corelane_inter_item_seconds_count{labels}")],
            0.0
        );
        assert!(!text.contains("direct/r/g\",target=\"a/b/c\",le"));
    }

    #[test]
    fn latencies_become_cumulative_buckets_that_are_always_the_same() {
        let bounds = |text: &str| -> BTreeSet<String> {
            let of = |line: &str| {
                line.split("le=\"")
                    .nth(1)?
                    .split('"')
                    .next()
                    .map(str::to_owned)
            };
            text.lines().filter_map(of).collect()
        };
        let core = core(0, "usable");
        let take = || {
            let cores = std::slice::from_ref(&core);
            Snapshot::take(cores, Vec::new(), process(), None).render()
        };
        let empty = take();
        core.stats.hop.record(900);
        core.stats.hop.record(10_000);
        core.stats.hop.record(3_600_000_000_000);
        let text = take();
        assert_eq!(bounds(&empty), bounds(&text));
        let series = series(&text);
        let bucket = |le: &str| {
            series[&*format!(r#"corelane_hop_seconds_bucket{{le="{le}",core="0",cpu="4"}}"#)]
        };
        assert_eq!(bucket("0.000001536"), 1.0);
        assert_eq!(bucket("0.000008192"), 1.0);
        assert_eq!(bucket("0.000012288"), 2.0);
        assert_eq!(bucket("8.589934592"), 2.0);
        assert_eq!(bucket("+Inf"), 3.0);
        assert_eq!(
            series[r#"corelane_hop_seconds_count{core="0",cpu="4"}"#],
            3.0
        );
        let sum = series[r#"corelane_hop_seconds_sum{core="0",cpu="4"}"#];
        assert!((sum - 3600.0000109).abs() < 1e-6, "{sum}");
        assert_eq!(
            series[r#"corelane_answer_seconds_count{core="0",cpu="4"}"#],
            0.0
        );
    }
}
