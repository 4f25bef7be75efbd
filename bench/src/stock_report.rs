//! What `stock` tells: the tables and the JSON of its rounds.

use serde::Serialize;
use serde_json::{Value, json};

use crate::ratio::{Ratio, ratio_text};
use crate::report::{Quantiles, Spread, Table, figure, host, median, now_utc};
use crate::stock::{Arm, StockArgs};

/// One arm in one round. Microseconds and counts are per request.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Round {
    /// Its number, from 0.
    pub(crate) round: usize,
    /// Time to the first response item; none if no request was answered.
    pub(crate) first_item_us: Option<Quantiles>,
    /// Time to the end of the response.
    pub(crate) last_item_us: Option<Quantiles>,
    /// Open loop: how late the client itself sent.
    pub(crate) send_lag_p99_us: Option<f64>,
    /// Answered requests in a second.
    pub(crate) requests_per_s: f64,
    /// CPU time of the client in the window.
    pub(crate) client_cpu_us: f64,
    /// CPU time of the worker, warm-up included.
    pub(crate) worker_cpu_us: f64,
    /// CPU time of corelane, warm-up included; 0 if it has no part in the arm.
    pub(crate) corelane_cpu_us: f64,
    /// CPU time of etcd, which no request touches: what it costs to be there.
    pub(crate) etcd_cpu_us: f64,
    /// Client, worker and corelane together.
    pub(crate) all_cpu_us: f64,
    /// Voluntary context switches of the worker.
    pub(crate) worker_switches: f64,
    /// Voluntary context switches of corelane.
    pub(crate) corelane_switches: f64,
    /// Failed requests (a count of the round).
    pub(crate) errors: u64,
    /// Lateness of a thread that wants to wake every millisecond.
    pub(crate) hiccup_us: Quantiles,
    /// Cores that the host took away.
    pub(crate) stolen_cores: f64,
}

/// What ratios are made of.
type Figure = (&'static str, fn(&Round) -> f64);
const FIGURES: [Figure; 8] = [
    ("p50", |r| first(r, |q| q.p50)),
    ("p99", |r| first(r, |q| q.p99)),
    ("p99.9", |r| first(r, |q| q.p999)),
    ("end_p50", |r| last(r, |q| q.p50)),
    ("end_p99", |r| last(r, |q| q.p99)),
    ("end_p99.9", |r| last(r, |q| q.p999)),
    ("requests_per_s", |r| r.requests_per_s),
    ("all_cpu_us", |r| r.all_cpu_us),
];

/// A quantile of one of the two latencies of a round.
type Latency = fn(&Round, fn(&Quantiles) -> f64) -> f64;

/// NaN, which medians pass over, where there is no latency.
fn first(round: &Round, quantile: fn(&Quantiles) -> f64) -> f64 {
    round.first_item_us.as_ref().map_or(f64::NAN, quantile)
}

fn last(round: &Round, quantile: fn(&Quantiles) -> f64) -> f64 {
    round.last_item_us.as_ref().map_or(f64::NAN, quantile)
}

fn ratio(of: &[Round], by: &[Round], figure: fn(&Round) -> f64) -> Option<Ratio> {
    let series = |rounds: &[Round]| rounds.iter().map(figure).collect::<Vec<_>>();
    Ratio::of_rounds(&series(of), &series(by))
}

fn middle(rounds: &[Round], figure: impl Fn(&Round) -> f64) -> f64 {
    median(rounds.iter().map(figure))
}

/// The whole report as JSON; its members are described in `bench/README.md`.
pub(crate) fn report(args: &StockArgs, arms: &[Arm], loads: &[Vec<Vec<Round>>]) -> Value {
    let load = |(load, records): (_, &Vec<Vec<Round>>)| {
        let arms = arms.iter().zip(records);
        let arms = arms.map(|(arm, rounds)| arm_report(arm, rounds, &records[0]));
        json!({ "load": format!("{load}"), "arms": arms.collect::<Vec<_>>() })
    };
    json!({
        "schema": "corelane-bench/stock/1",
        "when": now_utc(),
        "host": host(),
        "settings": {
            "payload_bytes": args.payload,
            "rounds": args.rounds,
            "seconds": args.seconds,
            "warmup_s": args.warmup,
            "dyn_env": args.dyn_env.iter().map(|(n, v)| format!("{n}={v}")).collect::<Vec<_>>(),
        },
        "loads": args.loads.iter().zip(loads).map(load).collect::<Vec<_>>(),
    })
}

fn arm_report(arm: &Arm, rounds: &[Round], direct: &[Round]) -> Value {
    let quantiles = |of: Latency| {
        json!({
            "p50": middle(rounds, |r| of(r, |q| q.p50)),
            "p90": middle(rounds, |r| of(r, |q| q.p90)),
            "p99": middle(rounds, |r| of(r, |q| q.p99)),
            "p99.9": middle(rounds, |r| of(r, |q| q.p999)),
            "max": middle(rounds, |r| of(r, |q| q.max)),
        })
    };
    let ratios = FIGURES
        .iter()
        .map(|(name, figure)| ((*name).to_string(), json!(ratio(rounds, direct, *figure))));
    json!({
        "arm": arm.name,
        "version": arm.version,
        "first_item_us": quantiles(first),
        "last_item_us": quantiles(last),
        "requests_per_s": middle(rounds, |r| r.requests_per_s),
        "cpu_us_per_request": {
            "all": middle(rounds, |r| r.all_cpu_us),
            "client": middle(rounds, |r| r.client_cpu_us),
            "worker": middle(rounds, |r| r.worker_cpu_us),
            "corelane": middle(rounds, |r| r.corelane_cpu_us),
            "etcd": middle(rounds, |r| r.etcd_cpu_us),
        },
        "errors": rounds.iter().map(|r| r.errors).sum::<u64>(),
        "ratio_to_direct": Value::Object(ratios.collect()),
        "rounds": rounds,
    })
}

/// The tables for people.
pub(crate) fn text(args: &StockArgs, arms: &[Arm], loads: &[Vec<Vec<Round>>]) -> String {
    let mut out = String::new();
    for (load, records) in args.loads.iter().zip(loads) {
        out.push_str(&format!(
            "\n{load}; {} bytes each way; medians over rounds: {} x {} s\n\n",
            args.payload, args.rounds, args.seconds
        ));
        out.push_str(&figures_table(arms, records).text());
        out.push('\n');
        out.push_str(&ratios_table(arms, records).text());
    }
    out
}

fn figures_table(arms: &[Arm], records: &[Vec<Round>]) -> Table {
    let mut table = Table::new(&[
        "arm",
        "first item p50 us",
        "p99 us",
        "p99.9 us",
        "end p50 us",
        "p99 us",
        "req/s",
        "cpu us/req",
        "client",
        "worker",
        "corelane",
        "hiccup p99 us",
        "lag p99 us",
        "errors",
    ]);
    for (arm, rounds) in arms.iter().zip(records) {
        let lags = rounds.iter().filter_map(|round| round.send_lag_p99_us);
        table.row(vec![
            arm.name.clone(),
            figure(middle(rounds, |r| first(r, |q| q.p50))),
            figure(middle(rounds, |r| first(r, |q| q.p99))),
            figure(middle(rounds, |r| first(r, |q| q.p999))),
            figure(middle(rounds, |r| last(r, |q| q.p50))),
            figure(middle(rounds, |r| last(r, |q| q.p99))),
            figure(middle(rounds, |r| r.requests_per_s)),
            figure(middle(rounds, |r| r.all_cpu_us)),
            figure(middle(rounds, |r| r.client_cpu_us)),
            figure(middle(rounds, |r| r.worker_cpu_us)),
            figure(middle(rounds, |r| r.corelane_cpu_us)),
            figure(middle(rounds, |r| r.hiccup_us.p99)),
            Spread::of(lags).map_or("-".into(), |lag| figure(lag.median)),
            rounds.iter().map(|r| r.errors).sum::<u64>().to_string(),
        ]);
    }
    table
}

fn ratios_table(arms: &[Arm], records: &[Vec<Round>]) -> Table {
    let mut table = Table::new(&[
        "ratio to direct [least..greatest]",
        "first item p50",
        "p99",
        "p99.9",
        "end p50",
        "end p99",
        "req/s",
        "cpu",
    ]);
    let [p50, p99, p999, end_p50, end_p99, _, rate, cpu] = FIGURES.map(|(_, figure)| figure);
    for (arm, rounds) in arms.iter().zip(records).skip(1) {
        let by_direct = |figure| ratio_text(ratio(rounds, &records[0], figure));
        let name = match arm.name.as_str() {
            "direct-again" => "direct-again (noise)".to_string(),
            name => name.to_string(),
        };
        let mut cells = vec![name];
        cells.extend([p50, p99, p999, end_p50, end_p99, rate, cpu].map(by_direct));
        table.row(cells);
    }
    table
}
