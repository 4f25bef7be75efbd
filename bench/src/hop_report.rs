//! What `hop` tells: the tables and the JSON of its records.

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;
use serde_json::{Value, json};

use crate::curves::{Curve, Interval};
use crate::hop::HopArgs;
use crate::hop_scene::{Arm, Scene};
use crate::load::Found;
use crate::ratio::{Ratio, ratio_text};
use crate::report::{Quantiles, Table, figure, host, median, new_histogram, now_utc};

/// One arm in one round. Microseconds and counts are per request.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Round {
    /// Its number, from 0.
    pub(crate) round: usize,
    /// Latency of the requests.
    pub(crate) latency_us: Quantiles,
    /// Replies in a second.
    pub(crate) requests_per_s: f64,
    /// CPU time of the process in the middle, user and system, all threads.
    pub(crate) middle_cpu_us: f64,
    /// Of it user time, by clock ticks: coarse.
    pub(crate) middle_user_us: f64,
    /// Of it system time, by clock ticks: coarse.
    pub(crate) middle_system_us: f64,
    /// CPU time of the sink.
    pub(crate) sink_cpu_us: f64,
    /// CPU time of the load generator.
    pub(crate) client_cpu_us: f64,
    /// Voluntary context switches of the process in the middle.
    pub(crate) voluntary_switches: f64,
    /// Involuntary ones.
    pub(crate) involuntary_switches: f64,
    /// Refused or dropped requests (a count of the round).
    pub(crate) errors: u64,
    /// Lateness of a thread that wants to wake every millisecond.
    pub(crate) hiccup_us: Quantiles,
    /// Cores that the rest of the machine used.
    pub(crate) others_cores: f64,
    /// Cores that the arms not under test used.
    pub(crate) idle_arms_cores: f64,
    /// Cores that the host took away.
    pub(crate) stolen_cores: f64,
}

/// One arm under one load.
pub(crate) struct Record {
    /// Its rounds.
    pub(crate) rounds: Vec<Round>,
    /// System calls per request, by name.
    pub(crate) calls_per_request: Option<BTreeMap<String, f64>>,
    /// The first refusal.
    pub(crate) refusal: Option<String>,
    /// Latency of all rounds together.
    pub(crate) latency_ns: Histogram<u64>,
    lag_ns: Histogram<u64>,
    hiccup_ns: Histogram<u64>,
    intervals: Vec<Interval>,
}

impl Default for Record {
    fn default() -> Self {
        Self {
            rounds: Vec::new(),
            calls_per_request: None,
            refusal: None,
            latency_ns: new_histogram(),
            lag_ns: new_histogram(),
            hiccup_ns: new_histogram(),
            intervals: Vec::new(),
        }
    }
}

impl Record {
    /// Adds a round that began at `start`, since the run did.
    pub(crate) fn add(
        &mut self,
        round: Round,
        start: Duration,
        found: &Found,
        hiccup_ns: &Histogram<u64>,
    ) {
        self.rounds.push(round);
        // The bounds of all histograms are the same, so adding cannot fail.
        self.latency_ns += &found.latency_ns;
        self.lag_ns += &found.lag_ns;
        self.hiccup_ns += hiccup_ns;
        self.intervals.push(Interval {
            start,
            length: found.elapsed,
            latency_ns: found.latency_ns.clone(),
        });
        if self.refusal.is_none() {
            self.refusal.clone_from(&found.refusal);
        }
    }

    /// Its distributions, an interval for each round.
    pub(crate) fn curve(&self, arm: &Arm) -> Curve {
        Curve {
            arm: arm.name.clone(),
            intervals: self.intervals.clone(),
            requests_per_s: self.median(|r| r.requests_per_s),
            cpu_us: arm
                .version
                .is_some()
                .then(|| self.median(|r| r.middle_cpu_us)),
            hiccup_ns: self.hiccup_ns.clone(),
        }
    }

    /// A figure of each round, in the order of round numbers.
    fn series(&self, figure: impl Fn(&Round) -> f64) -> Vec<f64> {
        self.rounds.iter().map(figure).collect()
    }

    fn median(&self, figure: impl Fn(&Round) -> f64) -> f64 {
        median(self.rounds.iter().map(figure))
    }

    fn calls(&self) -> Option<f64> {
        self.calls_per_request
            .as_ref()
            .map(|calls| calls.values().sum())
    }
}

/// What ratios are made of.
type Figure = (&'static str, fn(&Round) -> f64);
const FIGURES: [Figure; 5] = [
    ("p50", |r| r.latency_us.p50),
    ("p99", |r| r.latency_us.p99),
    ("p99.9", |r| r.latency_us.p999),
    ("requests_per_s", |r| r.requests_per_s),
    ("middle_cpu_us", |r| r.middle_cpu_us),
];

fn ratio(of: &Record, by: &Record, figure: fn(&Round) -> f64) -> Option<Ratio> {
    Ratio::of_rounds(&of.series(figure), &by.series(figure))
}

fn ratios(of: &Record, by: Option<&Record>) -> Value {
    let Some(by) = by else { return Value::Null };
    let entries = FIGURES
        .iter()
        .map(|(name, figure)| ((*name).to_string(), json!(ratio(of, by, *figure))));
    Value::Object(entries.collect())
}

fn place(scene: &Scene, name: &str) -> Option<usize> {
    scene.arms.iter().position(|arm| arm.name == name)
}

/// The whole report as JSON; its members are described in `bench/README.md`.
pub(crate) fn report(args: &HopArgs, scene: &Scene, loads: &[Vec<Record>]) -> Value {
    let haproxy = place(scene, "haproxy");
    let load = |(shape, records): (_, &Vec<Record>)| {
        let arms = scene.arms.iter().zip(records);
        let arms = arms.map(|(arm, record)| {
            arm_report(arm, record, records.first(), haproxy.map(|at| &records[at]))
        });
        json!({ "load": format!("{shape}"), "arms": arms.collect::<Vec<_>>() })
    };
    json!({
        "schema": "corelane-bench/hop/1",
        "when": now_utc(),
        "host": host(),
        "settings": {
            "payload_bytes": args.payload,
            "rounds": args.rounds,
            "seconds": args.seconds,
            "warmup_s": args.warmup,
            "client_cpus": args.pin.and_then(|pins| pins.client).map(|cpus| cpus.to_string()),
            "sink_cpus": scene.sink_cpus,
        },
        "skipped": scene.skipped,
        "loads": args.loads().into_iter().zip(loads).map(load).collect::<Vec<_>>(),
    })
}

fn arm_report(
    arm: &Arm,
    record: &Record,
    direct: Option<&Record>,
    haproxy: Option<&Record>,
) -> Value {
    let lag = (!record.lag_ns.is_empty()).then(|| Quantiles::of_ns(&record.lag_ns));
    json!({
        "arm": arm.name,
        "version": arm.version,
        "cpus": arm.cpus,
        "frame_bytes": arm.frame_bytes(),
        "latency_us": Quantiles::of_ns(&record.latency_ns),
        "send_lag_us": lag,
        "requests_per_s": record.median(|r| r.requests_per_s),
        "cpu_us_per_request": {
            "middle": record.median(|r| r.middle_cpu_us),
            "middle_user": record.median(|r| r.middle_user_us),
            "middle_system": record.median(|r| r.middle_system_us),
            "sink": record.median(|r| r.sink_cpu_us),
            "client": record.median(|r| r.client_cpu_us),
        },
        "voluntary_switches_per_request": record.median(|r| r.voluntary_switches),
        "involuntary_switches_per_request": record.median(|r| r.involuntary_switches),
        "system_calls_per_request": record.calls(),
        "system_calls": record.calls_per_request,
        "hiccup_us": Quantiles::of_ns(&record.hiccup_ns),
        "ratio_to_direct": ratios(record, direct),
        "ratio_to_haproxy": ratios(record, haproxy),
        "rounds": record.rounds,
    })
}

/// The tables for people.
pub(crate) fn text(args: &HopArgs, scene: &Scene, loads: &[Vec<Record>]) -> String {
    let mut out = String::new();
    for arm in scene.arms.iter().filter(|arm| arm.version.is_some()) {
        let version = arm.version.as_deref().unwrap_or_default();
        let cpus = arm.cpus.as_deref().unwrap_or_default();
        out.push_str(&format!("{}: {version}; may run on CPU {cpus}\n", arm.name));
    }
    out.push_str(&format!("sink: may run on CPU {}; ", scene.sink_cpus));
    match args.pin.and_then(|pins| pins.client) {
        Some(cpus) => out.push_str(&format!("load generator: bound to CPU {cpus}\n")),
        None => out.push_str("load generator: not bound\n"),
    }
    for note in &scene.skipped {
        out.push_str(&format!("left out: {note}\n"));
    }
    for (shape, records) in args.loads().into_iter().zip(loads) {
        out.push_str(&format!(
            "\n{shape}; body {} bytes; rounds: {} x {} s\n\n",
            args.payload, args.rounds, args.seconds
        ));
        out.push_str(&figures_table(scene, records).text());
        out.push('\n');
        out.push_str(&ratios_table(scene, records).text());
    }
    out
}

fn figures_table(scene: &Scene, records: &[Record]) -> Table {
    let mut table = Table::new(&[
        "arm",
        "p50 us",
        "p90 us",
        "p99 us",
        "p99.9 us",
        "max us",
        "req/s",
        "cpu us/req",
        "sink cpu",
        "client cpu",
        "switches/req",
        "calls/req",
        "hiccup p99.9 us",
        "others cores",
    ]);
    for (arm, record) in scene.arms.iter().zip(records) {
        let latency = Quantiles::of_ns(&record.latency_ns);
        let has_middle = arm.version.is_some();
        let of_middle = |text: String| if has_middle { text } else { "-".into() };
        table.row(vec![
            arm.name.clone(),
            figure(latency.p50),
            figure(latency.p90),
            figure(latency.p99),
            figure(latency.p999),
            figure(latency.max),
            figure(record.median(|r| r.requests_per_s)),
            of_middle(figure(record.median(|r| r.middle_cpu_us))),
            figure(record.median(|r| r.sink_cpu_us)),
            figure(record.median(|r| r.client_cpu_us)),
            of_middle(figure(record.median(|r| r.voluntary_switches))),
            record.calls().map_or("-".into(), figure),
            figure(Quantiles::of_ns(&record.hiccup_ns).p999),
            figure(record.median(|r| r.others_cores)),
        ]);
    }
    table
}

fn ratios_table(scene: &Scene, records: &[Record]) -> Table {
    let mut table = Table::new(&[
        "ratio [95 %]",
        "p50 / direct",
        "p99 / direct",
        "p99.9 / direct",
        "p50 / haproxy",
        "p99 / haproxy",
        "cpu / haproxy",
    ]);
    let direct = &records[0];
    let haproxy = place(scene, "haproxy").map(|at| &records[at]);
    let [p50, p99, p999, _, cpu] = FIGURES.map(|(_, figure)| figure);
    for (arm, record) in scene.arms.iter().zip(records).skip(1) {
        let by_haproxy = |figure| ratio_text(haproxy.and_then(|by| ratio(record, by, figure)));
        let name = match arm.name.as_str() {
            "direct-again" => "direct-again (noise)".to_string(),
            name => name.to_string(),
        };
        table.row(vec![
            name,
            ratio_text(ratio(record, direct, p50)),
            ratio_text(ratio(record, direct, p99)),
            ratio_text(ratio(record, direct, p999)),
            by_haproxy(p50),
            by_haproxy(p99),
            if arm.version.is_some() {
                by_haproxy(cpu)
            } else {
                "-".into()
            },
        ]);
    }
    table
}
