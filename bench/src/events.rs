//! `corelane-bench events`: events through corelane's broker, libzmq's proxy and nats-server, arms
//! interleaved in one run.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::cpu::Pins;
use crate::events_broker::{Broker, find_nats};
use crate::events_load::{Found, Load};
use crate::hiccup::HiccupMeter;
use crate::interrupt;
use crate::middle::CorelaneArgs;
use crate::output::{OutputArgs, Told};
use crate::progress::Progress;
use crate::ratio::{Ratio, ratio_text};
use crate::report::{Quantiles, Spread, Table, figure, host, median, now_utc, order, round};
use crate::usage_error;

/// Arguments of `events`.
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  corelane-bench events --python run/venv/bin/python
  corelane-bench events --publishers 64 --subscribers 1,16 --bytes 200 --rounds 5 --json events.json

For each number of publishers and subscribers and each size: events per second of the broker's CPU
while every subscriber gets all as fast as it can, then the latency, from when an event was due, at
half of the rate of the slowest broker. A broker that is not there is left out with a note.")]
pub(crate) struct EventsArgs {
    #[command(flatten)]
    corelane: CorelaneArgs,
    /// A Python that has pyzmq, for libzmq's proxy.
    #[arg(long, value_name = "PATH", default_value = "python3")]
    python: PathBuf,
    /// How many publish.
    #[arg(long, value_delimiter = ',', default_value = "1,64")]
    publishers: Vec<usize>,
    /// How many subscribe, each to everything.
    #[arg(long, value_delimiter = ',', default_value = "1,16")]
    subscribers: Vec<usize>,
    /// Bytes of an event's envelope.
    #[arg(long, value_delimiter = ',', default_value = "200,4096")]
    bytes: Vec<usize>,
    /// Rounds; each runs every arm once, the direction alternates.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Measured seconds of each arm in each round, twice.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Seconds before, not counted.
    #[arg(long, default_value_t = 0.3)]
    warmup: f64,
    /// CPUs of load and brokers, such as client=0,middle=1 [default: none is bound].
    #[arg(long)]
    pin: Option<Pins>,
    #[command(flatten)]
    output: OutputArgs,
}

/// What one broker has shown in one scene, a value for each round.
#[derive(Default)]
struct Record {
    rate: Vec<f64>,
    per_cpu_second: Vec<f64>,
    p50_us: Vec<f64>,
    p99_us: Vec<f64>,
    cpu_share_at_rate: Vec<f64>,
    /// Events that did not reach every subscriber, in all rounds.
    lost: u64,
}

/// One number of publishers and subscribers, one size.
struct Scene {
    publishers: usize,
    subscribers: usize,
    bytes: usize,
    /// What the latencies are of, in events per second.
    rate: f64,
    records: Vec<Record>,
}

/// Runs the whole comparison.
pub(crate) fn run(args: &EventsArgs) -> Result<()> {
    let numbers = [&args.publishers, &args.subscribers, &args.bytes];
    let is_bad = numbers
        .iter()
        .any(|list| list.is_empty() || list.contains(&0));
    if is_bad || args.bytes.iter().any(|bytes| *bytes < 16) || args.rounds == 0 {
        return Err(usage_error(
            "--publishers, --subscribers and --rounds must be at least 1, --bytes at least 16",
        ));
    }
    args.output.check()?;
    interrupt::install();
    let hiccup = HiccupMeter::start()?;
    let dir = tempfile::Builder::new()
        .prefix("corelane-bench-")
        .tempdir()?;
    let brokers = brokers(args, dir.path())?;
    if let Some(cpus) = args.pin.and_then(|pins| pins.client) {
        cpus.bind_this_thread()
            .with_context(|| format!("no CPU {cpus}"))?;
    }
    let (mut scenes, mut tables) = (Vec::new(), String::new());
    for bytes in args.bytes.iter().copied() {
        for publishers in args.publishers.iter().copied() {
            for subscribers in args.subscribers.iter().copied() {
                let mut scene = Scene {
                    publishers,
                    subscribers,
                    bytes,
                    rate: 0.0,
                    records: arms(&brokers).map(|_| Record::default()).collect(),
                };
                scene.run(args, &brokers)?;
                let table = scene.text(&brokers);
                args.output.print_table(&table)?;
                tables.push_str(&table);
                scenes.push(scene);
            }
        }
    }
    let hiccup_us = Quantiles::of_ns(&hiccup.take());
    args.output.finish(&Told {
        kind: "events",
        report: &report(args, &brokers, &scenes, hiccup_us),
        tables: &tables,
        panels: &[],
    })
}

/// Each broker under its name, and the first once more: what that differs by is noise.
fn arms(brokers: &[Broker]) -> impl Iterator<Item = (String, &Broker)> {
    let named = brokers
        .iter()
        .map(|broker| (broker.kind.name().to_owned(), broker));
    let again = brokers
        .first()
        .map(|broker| (format!("{}-again", broker.kind.name()), broker));
    named.chain(again)
}

fn brokers(args: &EventsArgs, dir: &Path) -> Result<Vec<Broker>> {
    let cpus = args.pin.and_then(|pins| pins.middle);
    let program = args.corelane.find()?;
    let program =
        program.context("corelane is not beside this program nor on PATH (--corelane)")?;
    let mut brokers = vec![Broker::corelane(&program, dir, cpus)?];
    match Broker::libzmq(&args.python, dir, cpus) {
        Ok(broker) => brokers.push(broker),
        Err(error) => eprintln!("without libzmq: {error:#}"),
    }
    match find_nats() {
        Some(program) => brokers.push(Broker::nats(&program, dir, cpus)?),
        None => eprintln!("without nats-server: it is not on PATH"),
    }
    Ok(brokers)
}

impl Scene {
    fn run(&mut self, args: &EventsArgs, brokers: &[Broker]) -> Result<()> {
        let times = [args.warmup, args.seconds].map(Duration::from_secs_f64);
        let arms: Vec<_> = arms(brokers).collect();
        let mut progress = Progress::of(2 * args.rounds * arms.len());
        for number in 0..args.rounds {
            for index in order(arms.len(), number) {
                let (name, broker) = &arms[index];
                self.say(&mut progress, name, number);
                let mut load = self.load(broker)?;
                let found = load
                    .at_most(broker, times)
                    .with_context(|| self.of(broker))?;
                let record = &mut self.records[index];
                record.lost += found.lost;
                record.rate.push(found.events as f64 / found.seconds);
                record
                    .per_cpu_second
                    .push(found.events as f64 / found.cpu_us.max(1.0) * 1e6);
            }
        }
        let slowest = self
            .records
            .iter()
            .map(|record| median(record.rate.iter().copied()));
        self.rate = slowest.fold(f64::INFINITY, f64::min) / 2.0;
        for number in 0..args.rounds {
            for index in order(arms.len(), number) {
                let (name, broker) = &arms[index];
                self.say(&mut progress, name, number);
                let mut load = self.load(broker)?;
                let found: Found = load
                    .at_rate(broker, times, self.rate)
                    .with_context(|| self.of(broker))?;
                let latency = Quantiles::of_ns(&found.latency_ns);
                let record = &mut self.records[index];
                record.lost += found.lost;
                record.p50_us.push(latency.p50);
                record.p99_us.push(latency.p99);
                record
                    .cpu_share_at_rate
                    .push(found.cpu_us / 1e6 / found.seconds);
            }
        }
        Ok(())
    }

    fn load(&self, broker: &Broker) -> Result<Load> {
        Load::start(broker, self.publishers, self.subscribers, self.bytes)
            .with_context(|| self.of(broker))
    }

    /// What is measured, for errors.
    fn of(&self, broker: &Broker) -> String {
        format!("{}: {}", broker.kind.name(), self.title())
    }

    fn say(&self, progress: &mut Progress, name: &str, number: usize) {
        progress.begin(&format!("{}: round {}, {name}", self.title(), number + 1));
    }

    fn title(&self) -> String {
        format!(
            "{} publishers, {} subscribers, {} bytes",
            self.publishers, self.subscribers, self.bytes
        )
    }

    fn text(&self, brokers: &[Broker]) -> String {
        let head = [
            "",
            "events/s",
            "events/CPU-s",
            "corelane/",
            "p50 us",
            "p99 us",
            "/corelane",
            "CPU",
            "lost",
        ];
        let mut table = Table::new(&head);
        let ours = &self.records[0];
        for ((name, _), record) in arms(brokers).zip(&self.records) {
            let value = |values: &[f64]| figure(median(values.iter().copied()));
            table.row(vec![
                name,
                value(&record.rate),
                value(&record.per_cpu_second),
                ratio_text(Ratio::of_rounds(
                    &ours.per_cpu_second,
                    &record.per_cpu_second,
                )),
                value(&record.p50_us),
                value(&record.p99_us),
                ratio_text(Ratio::of_rounds(&record.p99_us, &ours.p99_us)),
                value(&record.cpu_share_at_rate),
                record.lost.to_string(),
            ]);
        }
        let rate = figure(self.rate);
        format!(
            "{}; latency at {rate} events/s\n{}\n",
            self.title(),
            table.text()
        )
    }
}

fn report(args: &EventsArgs, brokers: &[Broker], scenes: &[Scene], hiccup_us: Quantiles) -> Value {
    let spread = |values: &[f64]| Spread::of(values.iter().copied());
    let arm = |ours: &Record, name: String, record: &Record| {
        json!({
            "arm": name,
            "events_per_second": spread(&record.rate),
            "events_per_cpu_second": spread(&record.per_cpu_second),
            "p50_us": spread(&record.p50_us),
            "p99_us": spread(&record.p99_us),
            "cpus_at_rate": spread(&record.cpu_share_at_rate),
            "lost": record.lost,
            "corelane_to_it": {
                "events_per_cpu_second":
                    Ratio::of_rounds(&ours.per_cpu_second, &record.per_cpu_second),
                "p99": Ratio::of_rounds(&ours.p99_us, &record.p99_us),
            },
        })
    };
    let scene = |scene: &Scene| {
        let arms = arms(brokers).zip(&scene.records);
        let ours = &scene.records[0];
        json!({
            "load": scene.title(),
            "publishers": scene.publishers,
            "subscribers": scene.subscribers,
            "event_bytes": scene.bytes,
            "latency_at_events_per_second": round(scene.rate),
            "arms": arms.map(|((name, _), record)| arm(ours, name, record)).collect::<Vec<_>>(),
        })
    };
    let version = |broker: &Broker| (broker.kind.name().to_owned(), json!(broker.version));
    json!({
        "schema": "corelane-bench/events/1",
        "when": now_utc(),
        "host": host(),
        "versions": brokers.iter().map(version).collect::<serde_json::Map<_, _>>(),
        "settings": {
            "rounds": args.rounds,
            "seconds": round(args.seconds),
            "warmup_s": round(args.warmup),
        },
        "hiccup_us": hiccup_us,
        "scenes": scenes.iter().map(scene).collect::<Vec<_>>(),
    })
}
