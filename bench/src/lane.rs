//! `corelane-bench lane`: requests to a worker process of this host over a shared-memory lane, a
//! Unix socket and TCP loopback, arms interleaved in one run.

use std::time::Duration;

use anyhow::{Context as _, Result};
use hdrhistogram::Histogram;
use serde_json::{Value, json};

use crate::cpu::Pins;
use crate::hiccup::HiccupMeter;
use crate::interrupt;
use crate::lane_handoff::{BODY_BYTES_MAX, Handoff};
use crate::lane_path::PathArm;
use crate::lane_worker::Way;
use crate::middle::CorelaneArgs;
use crate::output::{OutputArgs, Told};
use crate::ratio::{Ratio, ratio_text};
use crate::report::{Quantiles, Spread, Table, figure, host, interleave, median, now_utc, round};
use crate::usage_error;

/// Arguments of `lane`.
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  corelane-bench lane                                  all sizes, both parts
  corelane-bench lane --bodies 128,1048576 --rounds 9 --json lane.json
  corelane-bench lane --pin client=0,middle=1,sink=1

Hand-off: a body from this process's memory into the worker's, and word back; spinning and blocking.
Path: whole requests of Dynamo's wire, to the worker's memory, and the response to the caller.
Ratios are medians over rounds, each round against tcp of the same round, [95 % interval].
tcp-again is tcp once more: what it differs by is noise.")]
pub(crate) struct LaneArgs {
    #[command(flatten)]
    corelane: CorelaneArgs,
    /// Bytes of the bodies.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "128,65536,1048576,16777216"
    )]
    bodies: Vec<usize>,
    /// Rounds; each runs every arm once, the direction alternates.
    #[arg(long, default_value_t = 6)]
    rounds: usize,
    /// Measured seconds of each arm in each round.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Seconds before, not counted.
    #[arg(long, default_value_t = 0.2)]
    warmup: f64,
    /// CPUs of the parts, such as client=0,middle=1,sink=1 [default: none is bound, and corelane
    /// binds itself to CPU 0].
    #[arg(long)]
    pin: Option<Pins>,
    #[command(flatten)]
    output: OutputArgs,
}

const WAYS: [Way; 3] = [Way::Lane, Way::Unix, Way::Tcp];
const PATHS: [&str; 4] = ["lane", "tcp", "unix-direct", "tcp-direct"];
/// `tcp` once more, over the same sockets: what it differs by is noise.
const AGAIN: &str = "tcp-again";

/// What one arm has shown with one size, a value for each round.
#[derive(Clone, Default)]
struct Record {
    p50_us: Vec<f64>,
    p99_us: Vec<f64>,
    whole_p50_us: Vec<f64>,
    cpu_us: Vec<f64>,
    router_us: Vec<f64>,
    worker_us: Vec<f64>,
    copied: Vec<f64>,
}

impl Record {
    /// Takes in the latencies of one round.
    fn count(&mut self, latency_ns: &Histogram<u64>) {
        let latency = Quantiles::of_ns(latency_ns);
        self.p50_us.push(latency.p50);
        self.p99_us.push(latency.p99);
    }
}

/// All arms of one size and mode, the one that others are divided by named `tcp`.
struct Group {
    title: String,
    body_bytes: usize,
    arms: Vec<(String, Record)>,
}

/// Runs the whole comparison.
pub(crate) fn run(args: &LaneArgs) -> Result<()> {
    let too_long = args
        .bodies
        .iter()
        .any(|bytes| !(64..=BODY_BYTES_MAX / 2).contains(bytes));
    if args.bodies.is_empty() || too_long || args.rounds == 0 {
        return Err(usage_error(
            "--bodies must be 64 bytes to 32 MiB, --rounds at least 1",
        ));
    }
    args.output.check()?;
    interrupt::install();
    let hiccup = HiccupMeter::start()?;
    let program = args.corelane.find()?;
    let program =
        program.context("corelane is not beside this program nor on PATH (--corelane)")?;
    let dir = tempfile::Builder::new()
        .prefix("corelane-bench-")
        .tempdir()?;
    let pins = args.pin.unwrap_or_default();
    let mut groups = Vec::new();
    for spin in [true, false] {
        let start = |way| Handoff::start(way, spin, dir.path(), pins);
        let mut arms = WAYS.into_iter().map(start).collect::<Result<Vec<_>>>()?;
        bind(pins)?;
        for body_bytes in args.bodies.iter().copied() {
            groups.push(handoff(args, spin, body_bytes, &mut arms)?);
        }
    }
    let start = |name| PathArm::start(name, &args.corelane, &program, dir.path(), pins);
    let mut arms = PATHS.into_iter().map(start).collect::<Result<Vec<_>>>()?;
    bind(pins)?;
    for body_bytes in args.bodies.iter().copied() {
        groups.push(path(args, body_bytes, &mut arms)?);
    }
    let hiccup_us = Quantiles::of_ns(&hiccup.take());
    let tables = text(&groups);
    args.output.print_table(&tables)?;
    args.output.finish(&Told {
        kind: "lane",
        report: &report(args, &groups, hiccup_us),
        tables: &tables,
        panels: &[],
    })
}

/// Only after the children were started: they take over the CPUs of the thread that starts them.
fn bind(pins: Pins) -> Result<()> {
    match pins.client {
        Some(cpus) => cpus
            .bind_this_thread()
            .with_context(|| format!("no CPU {cpus}")),
        None => Ok(()),
    }
}

fn times(args: &LaneArgs) -> (Duration, Duration) {
    let of = Duration::from_secs_f64;
    (of(args.warmup), of(args.seconds))
}

fn handoff(args: &LaneArgs, spin: bool, body_bytes: usize, arms: &mut [Handoff]) -> Result<Group> {
    let mode = if spin { "spinning" } else { "blocking" };
    let title = format!("hand-off of {body_bytes} bytes, {mode}");
    let names = [WAYS.map(Way::name).as_slice(), &[AGAIN]].concat();
    let tcp = WAYS.iter().position(|way| *way == Way::Tcp).unwrap_or(0);
    let mut records = vec![Record::default(); names.len()];
    let (warmup, seconds) = times(args);
    interleave(&title, args.rounds, &names, |_, index| {
        let arm = if index == WAYS.len() { tcp } else { index };
        let found = arms[arm].slice(body_bytes, warmup, seconds)?;
        let record = &mut records[index];
        record.count(&found.latency_ns);
        if !spin {
            record.cpu_us.push(found.cpu_us);
        }
        Ok(())
    })?;
    let names = names.into_iter().map(str::to_owned);
    Ok(Group {
        title,
        body_bytes,
        arms: names.zip(records).collect(),
    })
}

fn path(args: &LaneArgs, body_bytes: usize, arms: &mut [PathArm]) -> Result<Group> {
    let title = format!("path of {body_bytes} bytes");
    let mut names: Vec<String> = arms.iter().map(|arm| arm.name.to_owned()).collect();
    let tcp = names.iter().position(|name| name == "tcp").unwrap_or(0);
    names.push(AGAIN.to_owned());
    let mut records = vec![Record::default(); names.len()];
    let (warmup, seconds) = times(args);
    interleave(&title, args.rounds, &names, |_, index| {
        let arm = if index == arms.len() { tcp } else { index };
        let found = arms[arm].slice(body_bytes, warmup, seconds)?;
        let record = &mut records[index];
        record.count(&found.request_ns);
        let whole = Quantiles::of_ns(&found.whole_ns);
        record.whole_p50_us.push(whole.p50);
        record.cpu_us.push(found.cpu_us.iter().sum());
        record.router_us.push(found.cpu_us[0]);
        record.worker_us.push(found.cpu_us[1]);
        record.copied.extend(found.copied);
        Ok(())
    })?;
    Ok(Group {
        title,
        body_bytes,
        arms: names.into_iter().zip(records).collect(),
    })
}

impl Group {
    /// What the others are compared with.
    fn tcp(&self) -> &Record {
        let tcp = self.arms.iter().find(|(name, _)| name == "tcp");
        &tcp.expect("every group has it").1
    }
}

fn text(groups: &[Group]) -> String {
    let mut out = String::new();
    for group in groups {
        let tcp = group.tcp();
        let head = [
            "",
            "p50 us",
            "/tcp",
            "p99 us",
            "to the end",
            "CPU us",
            "/tcp",
            "copied",
        ];
        let mut table = Table::new(&head);
        for (name, record) in &group.arms {
            let value = |values: &[f64]| match values {
                [] => "-".to_owned(),
                values => figure(median(values.iter().copied())),
            };
            let copied = match record.copied.as_slice() {
                [] => "-".to_owned(),
                values => format!("{:.4}", median(values.iter().copied())),
            };
            table.row(vec![
                name.clone(),
                value(&record.p50_us),
                ratio_text(Ratio::of_rounds(&record.p50_us, &tcp.p50_us)),
                value(&record.p99_us),
                value(&record.whole_p50_us),
                value(&record.cpu_us),
                ratio_text(Ratio::of_rounds(&record.cpu_us, &tcp.cpu_us)),
                copied,
            ]);
        }
        out.push_str(&format!("{}\n{}\n", group.title, table.text()));
    }
    out
}

fn report(args: &LaneArgs, groups: &[Group], hiccup_us: Quantiles) -> Value {
    let arm = |group: &Group, name: &str, record: &Record| {
        let spread = |values: &[f64]| Spread::of(values.iter().copied());
        let tcp = group.tcp();
        json!({
            "arm": name,
            "p50_us": spread(&record.p50_us),
            "p99_us": spread(&record.p99_us),
            "whole_p50_us": spread(&record.whole_p50_us),
            "cpu_us_per_request": spread(&record.cpu_us),
            "router_cpu_us": spread(&record.router_us),
            "worker_cpu_us": spread(&record.worker_us),
            "copied_per_byte": spread(&record.copied),
            "ratio_to_tcp": {
                "p50": Ratio::of_rounds(&record.p50_us, &tcp.p50_us),
                "cpu_us": Ratio::of_rounds(&record.cpu_us, &tcp.cpu_us),
                "router_cpu_us": Ratio::of_rounds(&record.router_us, &tcp.router_us),
            },
        })
    };
    let group = |group: &Group| {
        let arms = group.arms.iter();
        json!({
            "group": group.title,
            "body_bytes": group.body_bytes,
            "arms": arms.map(|(name, record)| arm(group, name, record)).collect::<Vec<_>>(),
        })
    };
    json!({
        "schema": "corelane-bench/lane/1",
        "when": now_utc(),
        "host": host(),
        "settings": {
            "rounds": args.rounds,
            "seconds": round(args.seconds),
            "warmup_s": round(args.warmup),
        },
        "hiccup_us": hiccup_us,
        "groups": groups.iter().map(group).collect::<Vec<_>>(),
    })
}
