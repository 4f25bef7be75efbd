//! What `server` tells: its records, where the knee is, and how the arms stand to the target, with
//! those of runs that were kept.

use std::fs;
use std::time::Duration;

use anyhow::Result;
use hdrhistogram::Histogram;
use serde::Serialize;
use serde_json::{Value, json};

use crate::curves::{Curve, Interval, Panel, sum_ns};
use crate::ratio::{Ratio, ratio_text};
use crate::report::{Quantiles, Table, figure, host, median, new_histogram, now_utc};
use crate::server::{Other, ServerArgs};
use crate::server_load::Found;
use crate::server_scene::{Reading, TARGET};
use crate::stock::Load;
use crate::usage_error;

/// An arm.
pub(crate) struct Told {
    /// Its name.
    pub(crate) name: String,
    /// Where it is called.
    pub(crate) place: String,
    /// Its process, if that is of this machine.
    pub(crate) process: Option<u32>,
}

/// One arm in one round. Times are microseconds, CPU times are for each request.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Round {
    /// Its number, from 0.
    pub(crate) round: usize,
    /// Latency to what `--until` says.
    pub(crate) latency_us: Quantiles,
    /// Responses in a second.
    pub(crate) requests_per_s: f64,
    /// CPU time of the server, if it is known.
    pub(crate) server_cpu_us: Option<f64>,
    /// CPU time of the load generator.
    pub(crate) client_cpu_us: f64,
    /// Requests that failed or were dropped.
    pub(crate) errors: u64,
    /// Of these, those that were dropped.
    pub(crate) dropped: u64,
    /// Lateness of a thread that wants to wake every millisecond.
    pub(crate) hiccup_us: Quantiles,
    /// Cores that the rest of the machine used.
    pub(crate) others_cores: f64,
    /// Cores that the host took away.
    pub(crate) stolen_cores: f64,
}

/// One arm under one load; latencies of all rounds together, in ns.
pub(crate) struct Record {
    rounds: Vec<Round>,
    intervals: Vec<Interval>,
    ack_ns: Histogram<u64>,
    first_ns: Histogram<u64>,
    end_ns: Histogram<u64>,
    lag_ns: Histogram<u64>,
    hiccup_ns: Histogram<u64>,
    error: Option<String>,
}

impl Default for Record {
    fn default() -> Self {
        Self {
            rounds: Vec::new(),
            intervals: Vec::new(),
            ack_ns: new_histogram(),
            first_ns: new_histogram(),
            end_ns: new_histogram(),
            lag_ns: new_histogram(),
            hiccup_ns: new_histogram(),
            error: None,
        }
    }
}

impl Record {
    /// Adds a round whose window began at `start`, since the run did; `last` is the reading at its
    /// end.
    pub(crate) fn add(
        &mut self,
        round: Round,
        start: Duration,
        interval: Duration,
        found: &Found,
        last: &Reading,
    ) {
        self.rounds.push(round);
        // The bounds of all histograms are the same, so adding cannot fail.
        self.ack_ns += &found.ack_ns;
        self.first_ns += &found.first_ns;
        self.end_ns += &found.end_ns;
        self.lag_ns += &found.lag_ns;
        self.hiccup_ns += last.hiccup_ns();
        self.error = self.error.take().or_else(|| found.error.clone());
        for (index, latency_ns) in found.intervals.iter().enumerate() {
            self.intervals.push(Interval {
                start: start + interval * index as u32,
                length: interval,
                latency_ns: latency_ns.clone(),
            });
        }
    }

    fn series(&self, figure: fn(&Round) -> f64) -> Vec<f64> {
        self.rounds.iter().map(figure).collect()
    }

    fn median(&self, figure: fn(&Round) -> f64) -> f64 {
        median(self.rounds.iter().map(figure))
    }

    fn errors(&self) -> u64 {
        self.rounds.iter().map(|round| round.errors).sum()
    }

    fn cpu_us(&self) -> Option<f64> {
        let is_known = self
            .rounds
            .iter()
            .any(|round| round.server_cpu_us.is_some());
        is_known.then(|| self.median(CPU))
    }

    fn curve(&self, name: &str) -> Curve {
        Curve {
            arm: name.to_owned(),
            intervals: self.intervals.clone(),
            requests_per_s: self.median(|round| round.requests_per_s),
            cpu_us: self.cpu_us(),
            hiccup_ns: self.hiccup_ns.clone(),
        }
    }

    fn latency_us(&self) -> Quantiles {
        Quantiles::of_ns(&sum_ns(&self.intervals))
    }
}

/// Everything that a run has found.
pub(crate) struct Measured {
    /// In the order they ran.
    pub(crate) loads: Vec<Load>,
    /// For each load, a record for each arm.
    pub(crate) records: Vec<Vec<Record>>,
    /// The arms.
    pub(crate) targets: Vec<Told>,
    /// The loads were found, not asked for.
    pub(crate) is_sweep: bool,
}

impl Measured {
    /// Requests that failed, and why the first one did.
    pub(crate) fn errors(&self) -> (u64, Option<String>) {
        let records = || self.records.iter().flatten();
        let why = records().find_map(|record| record.error.clone());
        (records().map(Record::errors).sum(), why)
    }

    /// The distributions.
    pub(crate) fn panels(&self) -> Vec<Panel> {
        let panels = self.loads.iter().zip(&self.records).map(|(load, records)| {
            let curves = self.targets.iter().zip(records);
            Panel {
                title: load.to_string(),
                curves: curves
                    .map(|(arm, record)| record.curve(&arm.name))
                    .collect(),
            }
        });
        panels.collect()
    }

    /// Where each arm's knee is: the highest rate up to which it kept up with every rate, without
    /// errors, and with a p99 of no more than [`KNEE_P99`] times that at the lowest.
    fn knees(&self) -> Vec<Option<Knee>> {
        (0..self.targets.len()).map(|arm| self.knee(arm)).collect()
    }

    fn knee(&self, arm: usize) -> Option<Knee> {
        let mut points: Vec<(f64, &Record)> = Vec::new();
        for (load, records) in self.loads.iter().zip(&self.records) {
            if let Load::Open(_, rate) = load {
                points.push((*rate, records.get(arm)?));
            }
        }
        points.sort_by(|one, other| one.0.total_cmp(&other.0));
        let p99 = |record: &Record| record.median(|round| round.latency_us.p99);
        let least_p99 = p99(points.first()?.1);
        let mut knee = Knee::default();
        for (rate, record) in points {
            let answered = record.median(|round| round.requests_per_s);
            knee.beyond = if record.errors() > 0 {
                Some("errors")
            } else if answered < KNEE_RATE * rate {
                Some("throughput")
            } else if p99(record) > KNEE_P99 * least_p99 {
                Some("latency")
            } else {
                None
            };
            if knee.beyond.is_some() {
                break;
            }
            knee.rate = Some(rate);
            knee.p99_us = Some(p99(record));
        }
        Some(knee)
    }
}

/// Part of the rate that must be answered in the rate's time.
const KNEE_RATE: f64 = 0.97;
/// How many times the p99 of the lowest rate is too much.
const KNEE_P99: f64 = 5.0;

/// A knee.
#[derive(Clone, Copy, Debug, Default, Serialize)]
struct Knee {
    /// The highest good rate; none if the lowest was not good.
    rate: Option<f64>,
    /// Its p99.
    p99_us: Option<f64>,
    /// What was wrong with the next one: errors, throughput or latency; none if all were good.
    beyond: Option<&'static str>,
}

/// A run that was kept.
pub(crate) struct Saved {
    name: String,
    file: String,
    report: Value,
}

/// Reads the runs among those to compare with.
///
/// # Errors
/// A usage error: one cannot be read, or is no report of `server`.
pub(crate) fn read_saved(others: &[Other]) -> Result<Vec<Saved>> {
    let mut saved = Vec::new();
    for other in others {
        let Other::Saved(name, file) = other else {
            continue;
        };
        let shown = file.display();
        let text = fs::read_to_string(file)
            .map_err(|error| usage_error(format!("cannot read {shown}: {error}")))?;
        let report: Value = serde_json::from_str(&text)
            .map_err(|error| usage_error(format!("{shown} is not JSON: {error}")))?;
        if report["schema"] != SCHEMA {
            return Err(usage_error(format!("{shown} is not a report of {SCHEMA}")));
        }
        let (name, file) = (name.clone(), shown.to_string());
        saved.push(Saved { name, file, report });
    }
    Ok(saved)
}

impl Saved {
    /// The rounds of its first arm under a load.
    fn rounds(&self, load: &str) -> Option<&Vec<Value>> {
        let mut loads = self.report["loads"].as_array()?.iter();
        let found = loads.find(|one| one["load"] == load)?;
        found["arms"][0]["rounds"].as_array()
    }
}

const SCHEMA: &str = "corelane-bench/server/1";
const CPU: fn(&Round) -> f64 = |round| round.server_cpu_us.unwrap_or(f64::NAN);

/// What ratios are made of: its name, where it is in a round, and where in a round's JSON.
type Figure = (&'static str, fn(&Round) -> f64, &'static str);
const FIGURES: [Figure; 5] = [
    ("p50", |r| r.latency_us.p50, "/latency_us/p50"),
    ("p99", |r| r.latency_us.p99, "/latency_us/p99"),
    ("p99.9", |r| r.latency_us.p999, "/latency_us/p99.9"),
    ("requests_per_s", |r| r.requests_per_s, "/requests_per_s"),
    ("server_cpu_us", CPU, "/server_cpu_us"),
];

/// The whole report as JSON; its members are described in `bench/README.md`.
pub(crate) fn report(args: &ServerArgs, measured: &Measured, saved: &[Saved]) -> Value {
    let knees = measured.knees();
    let knees = measured.targets.iter().zip(knees);
    let knees = knees.map(|(arm, knee)| (arm.name.clone(), json!(knee)));
    let told = |arm: &Told| json!({"arm": arm.name, "at": arm.place, "process": arm.process});
    let loads = measured.loads.iter().zip(&measured.records);
    json!({
        "schema": SCHEMA,
        "when": now_utc(),
        "host": host(),
        "settings": {
            "until": args.until,
            "payload_bytes": args.value().to_string().len(),
            "rounds": args.rounds,
            "seconds": args.seconds,
            "warmup_s": args.warmup,
            "interval_s": args.interval,
            "timeout_s": args.timeout,
            "in_flight_max": args.in_flight_max,
            "client_cpu": args.pin_client.map(|cpus| cpus.to_string()),
            "sweep": measured.is_sweep,
        },
        "targets": measured.targets.iter().map(told).collect::<Vec<_>>(),
        "knee": knees.collect::<serde_json::Map<_, _>>(),
        "loads": loads
            .map(|(load, records)| load_report(*load, &measured.targets, records, saved))
            .collect::<Vec<_>>(),
    })
}

fn load_report(load: Load, targets: &[Told], records: &[Record], saved: &[Saved]) -> Value {
    let rate = match load {
        Load::Open(_, rate) => Some(rate),
        Load::Closed(_) => None,
    };
    let arms = targets.iter().zip(records);
    let arms = arms.map(|(arm, record)| arm_report(arm, record, &records[0]));
    let title = load.to_string();
    let kept = saved
        .iter()
        .map(|run| saved_report(run, &title, &records[0]));
    json!({
        "load": title,
        "rate": rate,
        "arms": arms.collect::<Vec<_>>(),
        "saved": kept.collect::<Vec<_>>(),
    })
}

fn arm_report(arm: &Told, record: &Record, target: &Record) -> Value {
    let known =
        |histogram: &Histogram<u64>| (!histogram.is_empty()).then(|| Quantiles::of_ns(histogram));
    let ratios = FIGURES.iter().map(|(name, figure, _)| {
        let ratio = Ratio::of_rounds(&record.series(*figure), &target.series(*figure));
        ((*name).to_owned(), json!(ratio))
    });
    let ratios = (arm.name != TARGET).then(|| ratios.collect::<serde_json::Map<_, _>>());
    json!({
        "arm": arm.name,
        "latency_us": record.latency_us(),
        "ack_us": known(&record.ack_ns),
        "first_item_us": known(&record.first_ns),
        "end_us": known(&record.end_ns),
        "send_lag_us": known(&record.lag_ns),
        "hiccup_us": Quantiles::of_ns(&record.hiccup_ns),
        "requests_per_s": record.median(|round| round.requests_per_s),
        "cpu_us_per_request": {
            "server": record.cpu_us(),
            "client": record.median(|round| round.client_cpu_us),
        },
        "errors": record.errors(),
        "error": record.error,
        "ratio_to_target": ratios,
        "rounds": record.rounds,
    })
}

/// How the target stands to a run that was kept.
fn saved_report(run: &Saved, load: &str, target: &Record) -> Value {
    let ratios = run.rounds(load).map(|rounds| {
        let ratios = FIGURES.iter().map(|(name, figure, place)| {
            let theirs = rounds.iter().map(|round| round.pointer(place));
            let theirs = theirs.map(|value| value.and_then(Value::as_f64).unwrap_or(f64::NAN));
            let ratio = Ratio::of_runs(&target.series(*figure), &theirs.collect::<Vec<_>>());
            ((*name).to_owned(), json!(ratio))
        });
        ratios.collect::<serde_json::Map<_, _>>()
    });
    json!({
        "name": run.name,
        "file": run.file,
        "when": run.report["when"],
        "target_to_it": ratios,
    })
}

/// The tables for people.
pub(crate) fn text(measured: &Measured, report: &Value) -> String {
    let mut out = String::new();
    for arm in &measured.targets {
        let process = arm
            .process
            .map_or(String::new(), |pid| format!(", process {pid}"));
        out.push_str(&format!("{}: {}{process}\n", arm.name, arm.place));
    }
    let loads = report["loads"].as_array().into_iter().flatten();
    for (load, records) in loads.zip(&measured.records) {
        let title = load["load"].as_str().unwrap_or_default();
        out.push_str(&format!(
            "\n{title}\n\n{}",
            figures(measured, records).text()
        ));
        out.push_str(&format!("\n{}", ratios(measured, records, load).text()));
    }
    if measured.is_sweep {
        out.push('\n');
        for (arm, knee) in measured.targets.iter().zip(measured.knees()) {
            out.push_str(&knee_text(&arm.name, knee.unwrap_or_default()));
        }
    }
    if let (1.., Some(why)) = measured.errors() {
        out.push_str(&format!("\nthe first error: {why}\n"));
    }
    out
}

fn knee_text(name: &str, knee: Knee) -> String {
    let good = match (knee.rate, knee.p99_us) {
        (Some(rate), Some(p99)) => {
            format!(
                "good up to {} requests/s (p99 {} us)",
                figure(rate),
                figure(p99)
            )
        }
        _ => "no rate was good".to_owned(),
    };
    let beyond = match knee.beyond {
        Some(what) => format!("; beyond: {what}"),
        None => "; its knee was not reached".to_owned(),
    };
    format!("knee of {name}: {good}{beyond}\n")
}

fn figures(measured: &Measured, records: &[Record]) -> Table {
    let mut table = Table::new(&[
        "arm",
        "p50 us",
        "p90 us",
        "p99 us",
        "p99.9 us",
        "max us",
        "req/s",
        "cpu us/req",
        "client cpu",
        "errors",
        "lag p99 us",
        "hiccup p99.9 us",
        "others cores",
    ]);
    for (arm, record) in measured.targets.iter().zip(records) {
        let latency = record.latency_us();
        let lag = Quantiles::of_ns(&record.lag_ns);
        table.row(vec![
            arm.name.clone(),
            figure(latency.p50),
            figure(latency.p90),
            figure(latency.p99),
            figure(latency.p999),
            figure(latency.max),
            figure(record.median(|round| round.requests_per_s)),
            record.cpu_us().map_or("-".into(), figure),
            figure(record.median(|round| round.client_cpu_us)),
            record.errors().to_string(),
            if lag.count > 0 {
                figure(lag.p99)
            } else {
                "-".into()
            },
            figure(Quantiles::of_ns(&record.hiccup_ns).p999),
            figure(record.median(|round| round.others_cores)),
        ]);
    }
    table
}

fn ratios(measured: &Measured, records: &[Record], load: &Value) -> Table {
    let mut table = Table::new(&[
        "ratio [95 %]",
        "p50",
        "p99",
        "p99.9",
        "req/s",
        "cpu",
        "differs",
    ]);
    let mut row = |name: String, ratios: Vec<Option<Ratio>>| {
        let sure = ratios
            .iter()
            .zip(FIGURES)
            .filter(|(ratio, _)| ratio.is_some_and(|ratio| ratio.is_sure()));
        let sure: Vec<_> = sure.map(|(_, (name, ..))| name).collect();
        let mut cells = vec![name];
        cells.extend(ratios.iter().copied().map(ratio_text));
        cells.push(if sure.is_empty() {
            "no".into()
        } else {
            sure.join(" ")
        });
        table.row(cells);
    };
    for (arm, record) in measured.targets.iter().zip(records).skip(1) {
        let noise = if arm.name.ends_with("-again") {
            " (noise)"
        } else {
            ""
        };
        let of = |figure: fn(&Round) -> f64| {
            Ratio::of_rounds(&record.series(figure), &records[0].series(figure))
        };
        row(
            format!("{} / {TARGET}{noise}", arm.name),
            FIGURES.map(|(_, figure, _)| of(figure)).to_vec(),
        );
    }
    for run in load["saved"].as_array().into_iter().flatten() {
        let name = run["name"].as_str().unwrap_or_default();
        let of = |(name, ..): Figure| Ratio::of_json(&run["target_to_it"][name]);
        row(format!("{TARGET} / {name}"), FIGURES.map(of).to_vec());
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arrivals::Arrivals;

    fn record(p99: f64, answered: f64, errors: u64) -> Record {
        let round = |number: usize| Round {
            round: number,
            latency_us: Quantiles {
                p50: p99 / 2.0,
                p99,
                ..Quantiles::default()
            },
            requests_per_s: answered,
            server_cpu_us: None,
            client_cpu_us: 1.0,
            errors,
            dropped: 0,
            hiccup_us: Quantiles::default(),
            others_cores: 0.0,
            stolen_cores: 0.0,
        };
        Record {
            rounds: (0..6).map(round).collect(),
            ..Record::default()
        }
    }

    fn measured(points: &[(f64, Record)]) -> Knee {
        let told = Told {
            name: TARGET.into(),
            place: String::new(),
            process: None,
        };
        let clone = |record: &Record| Record {
            rounds: record.rounds.clone(),
            ..Record::default()
        };
        let measured = Measured {
            loads: points
                .iter()
                .map(|(rate, _)| Load::Open(Arrivals::Even, *rate))
                .collect(),
            records: points
                .iter()
                .map(|(_, record)| vec![clone(record)])
                .collect(),
            targets: vec![told],
            is_sweep: true,
        };
        measured.knees()[0].unwrap()
    }

    #[test]
    fn a_knee_is_the_last_rate_before_something_is_wrong() {
        let good = |rate: f64| (rate, record(100.0, rate, 0));
        let knee = measured(&[good(10.0), good(20.0), (40.0, record(501.0, 40.0, 0))]);
        assert_eq!((knee.rate, knee.beyond), (Some(20.0), Some("latency")));
        let knee = measured(&[good(10.0), (20.0, record(100.0, 19.0, 0)), good(40.0)]);
        assert_eq!((knee.rate, knee.beyond), (Some(10.0), Some("throughput")));
        let knee = measured(&[(10.0, record(100.0, 10.0, 1))]);
        assert_eq!((knee.rate, knee.beyond), (None, Some("errors")));
        let knee = measured(&[good(20.0), good(10.0)]);
        assert_eq!((knee.rate, knee.beyond), (Some(20.0), None));
    }

    #[test]
    fn a_kept_run_is_compared_load_by_load() {
        let load = "open loop, 10 requests/s even";
        let rounds: Vec<_> = (0..6)
            .map(|_| json!({"latency_us": {"p99": 50.0}}))
            .collect();
        let arms = json!([{"arm": "target", "rounds": rounds}]);
        let report = json!({"when": "then", "loads": [{"load": load, "arms": arms}]});
        let run = Saved {
            name: "old".into(),
            file: "old.json".into(),
            report,
        };
        let told = saved_report(&run, load, &record(100.0, 10.0, 0));
        assert_eq!(told["target_to_it"]["p99"]["median"], 2.0);
        assert_eq!(told["target_to_it"]["p99"]["low"], 2.0);
        assert_eq!(told["target_to_it"]["server_cpu_us"], Value::Null);
        let told = saved_report(&run, "another", &record(100.0, 10.0, 0));
        assert_eq!(told["target_to_it"], Value::Null);
    }
}
