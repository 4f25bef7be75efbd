//! `corelane-bench pair`: clients and workers, Dynamo's and corelane's, in pairs, arm after arm in
//! one interleaved run. Requests go straight to the worker; no router is between.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::cpu::{Machine, Usage};
use crate::dynamo::{
    CLIENT_LIMIT, Counters, ENDPOINT, NAMESPACE, last_report, loopback_variables, peer, program,
    round_of, rounds, start_etcd, start_ready,
};
use crate::hiccup::HiccupMeter;
use crate::interrupt;
use crate::output::{OutputArgs, Told};
use crate::report::{Quantiles, Table, figure, host, median, now_utc};
use crate::servers::Server;
use crate::stock_report::Round;
use crate::usage_error;

/// Arguments of `pair`.
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  corelane-bench pair --dyn-worker bin/dyn-worker --dyn-client bin/dyn-client
  corelane-bench pair --dyn-worker W --dyn-client C --loads unary:128:64,stream:16 --rounds 3

W and C as for `stock`. Arms: Dynamo's pair in its three best configurations, Dynamo's client with
`corelane worker echo`, and corelane's client with it. CPU is user and system time of each process
for one request.")]
pub(crate) struct PairArgs {
    /// The worker on dynamo-runtime.
    #[arg(long, value_name = "PATH")]
    dyn_worker: PathBuf,
    /// The load generator on dynamo-runtime.
    #[arg(long, value_name = "PATH")]
    dyn_client: PathBuf,
    /// The etcd server.
    #[arg(long, value_name = "PATH", default_value = "etcd")]
    etcd: PathBuf,
    /// The program [default: `corelane` beside this one, else on PATH].
    #[arg(long, value_name = "PATH")]
    corelane: Option<PathBuf>,
    /// unary:BYTES:CALLERS (echoed as one item), or stream:CALLERS (128 items of 64 bytes).
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "LOAD,...",
        default_value = "unary:128:1,unary:128:16,unary:128:64,unary:128:256,\
                         unary:4096:1,unary:4096:64,unary:65536:1,unary:65536:64,\
                         stream:1,stream:16,stream:64"
    )]
    loads: Vec<Load>,
    /// Rounds; each runs every arm once, the direction alternates.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Measured seconds of each arm in each round.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Seconds of load before, not counted.
    #[arg(long, default_value_t = 1.0)]
    warmup: f64,
    #[command(flatten)]
    output: OutputArgs,
}

/// What is asked, and by how many at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Load {
    /// Bytes of a request that is echoed; `None` for the stream.
    payload: Option<usize>,
    callers: u32,
}

/// Items of a stream, and bytes of each.
const STREAM: (u32, u32) = (128, 64);

impl FromStr for Load {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("'{text}' is not like unary:128:64 or stream:16");
        let parts: Vec<&str> = text.split(':').collect();
        let (payload, callers) = match parts[..] {
            ["unary", bytes, callers] => (Some(bytes.parse().map_err(|_| wrong())?), callers),
            ["stream", callers] => (None, callers),
            _ => return Err(wrong()),
        };
        let callers = callers.parse().ok();
        let callers = callers.filter(|callers| (1..=10_000).contains(callers));
        Ok(Load {
            payload,
            callers: callers.ok_or_else(wrong)?,
        })
    }
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.payload {
            Some(bytes) => write!(f, "{bytes} bytes each way, {} in flight", self.callers),
            None => {
                let (items, bytes) = STREAM;
                write!(
                    f,
                    "{items} items of {bytes} bytes, {} in flight",
                    self.callers
                )
            }
        }
    }
}

impl Load {
    fn arguments(self, args: &PairArgs) -> Vec<String> {
        let items = self.payload.map_or(STREAM.0, |_| 1);
        let pairs = [
            ("-c", self.callers.to_string()),
            ("-p", self.payload.unwrap_or(128).to_string()),
            ("-n", items.to_string()),
            ("-d", args.seconds.to_string()),
            ("-w", args.warmup.to_string()),
        ];
        let flat = pairs
            .into_iter()
            .flat_map(|(flag, value)| [flag.to_string(), value]);
        flat.collect()
    }
}

/// Who calls whom: the client's configuration, or corelane's client; and the worker's name.
#[derive(Clone, Copy)]
struct Arm {
    name: &'static str,
    client: Option<usize>,
    worker: usize,
}

/// Dynamo's best configurations: no logging, and these variables on both sides.
const CONFIGS: [(&str, &[(&str, &str)]); 3] = [
    ("plain", &[]),
    ("1thread", &[("DYN_RUNTIME_NUM_WORKER_THREADS", "1")]),
    (
        "quic0",
        &[
            ("DYN_RESPONSE_PLANE", "quic"),
            ("DYN_QUIC_RESPONSE_BATCH_INTERVAL_US", "0"),
        ],
    ),
];
/// The corelane worker's place behind those of Dynamo.
const CORELANE: usize = CONFIGS.len();
const ARMS: [Arm; 7] = [
    arm("stock plain", Some(0), 0),
    arm("stock 1thread", Some(1), 1),
    arm("stock quic0", Some(2), 2),
    arm("stock client + corelane worker", Some(0), CORELANE),
    arm("stock 1thread client + corelane worker", Some(1), CORELANE),
    arm("corelane client + corelane worker", None, CORELANE),
    // The first one once more: noise.
    arm("stock plain-again", Some(0), 0),
];
const STOCK: std::ops::Range<usize> = 0..3;
const MIXED: std::ops::Range<usize> = 3..5;
const OURS: usize = 5;

const fn arm(name: &'static str, client: Option<usize>, worker: usize) -> Arm {
    Arm {
        name,
        client,
        worker,
    }
}

/// A worker and what it is called.
struct Worker {
    server: Server,
    component: String,
    address: String,
}

struct Scene {
    /// For unary requests, then for streams.
    workers: [Vec<Worker>; 2],
    etcd: Server,
    base: Vec<(String, String)>,
    client: PathBuf,
    hiccup: HiccupMeter,
    dir: TempDir,
}

/// Runs the whole comparison.
pub(crate) fn run(args: &PairArgs) -> Result<()> {
    let times = (0.1..=600.0).contains(&args.seconds) && (0.0..=60.0).contains(&args.warmup);
    if args.rounds == 0 || !times {
        return Err(usage_error(
            "--rounds must be at least 1, --seconds 0.1 to 600, --warmup at most 60",
        ));
    }
    args.output.check()?;
    interrupt::install();
    let mut scene = Scene::start(args)?;
    let (mut reports, mut tables) = (Vec::new(), String::new());
    let mut errors = 0;
    for load in &args.loads {
        let records = scene.measure(args, *load)?;
        errors += records
            .iter()
            .flatten()
            .map(|round| round.errors)
            .sum::<u64>();
        let table = text(args, *load, &records);
        args.output.print_table(&table)?;
        tables.push_str(&table);
        reports.push(json!({ "load": load.to_string(), "arms": arms(&records) }));
    }
    let report = json!({
        "schema": "corelane-bench/pair/1",
        "when": now_utc(),
        "host": host(),
        "settings": {
            "rounds": args.rounds, "seconds": args.seconds, "warmup_s": args.warmup,
        },
        "loads": reports,
    });
    args.output.finish(&Told {
        kind: "pair",
        report: &report,
        tables: &tables,
        panels: &[],
    })?;
    if errors > 0 {
        bail!("{errors} requests failed; the numbers beside them mean little");
    }
    Ok(())
}

impl Scene {
    fn start(args: &PairArgs) -> Result<Self> {
        let etcd_program = program(&args.etcd, "--etcd; apt-get install etcd-server")?;
        let dyn_worker = program(&args.dyn_worker, "--dyn-worker")?;
        let client = program(&args.dyn_client, "--dyn-client")?;
        let beside = std::env::current_exe()?.with_file_name("corelane");
        let corelane = args.corelane.clone().unwrap_or(beside);
        let corelane = program(&corelane, "--corelane")?;
        let dir = tempfile::Builder::new()
            .prefix("corelane-bench-")
            .tempdir()?;
        let (etcd, etcd_url) = start_etcd(&etcd_program, dir.path())?;
        let base = loopback_variables(&etcd_url);
        let mut workers = [Vec::new(), Vec::new()];
        for (stream, workers) in workers.iter_mut().enumerate() {
            let shape = ["unary", "stream"][stream];
            for (name, variables) in CONFIGS {
                let component = format!("{name}-{shape}");
                let mut command = peer(&dyn_worker, &component);
                match stream {
                    0 => command.args(["-n", "1"]),
                    _ => command.args(["-n", &STREAM.0.to_string(), "-m", &STREAM.1.to_string()]),
                };
                command
                    .envs(base.iter().cloned())
                    .envs(variables.iter().copied());
                workers.push(start_worker(component, command, dir.path())?);
            }
            let component = format!("corelane-{shape}");
            let mut command = Command::new(&corelane);
            let endpoint = format!("{NAMESPACE}/{component}/{ENDPOINT}");
            command.args(["worker", "echo", "--discovery", "etcd"]);
            command.args(["--endpoint", &endpoint]);
            if stream == 1 {
                command.args(["--items", &STREAM.0.to_string()]);
                command.args(["--item-bytes", &STREAM.1.to_string()]);
            }
            command
                .envs(base.iter().cloned())
                .env("CORELANE_LOG", "warn");
            workers.push(start_worker(component, command, dir.path())?);
        }
        Ok(Self {
            workers,
            etcd,
            base,
            client,
            hiccup: HiccupMeter::start()?,
            dir,
        })
    }

    fn client(&self, arm: Arm, worker: &Worker, arguments: &[String]) -> Result<Server> {
        let mut command = match arm.client {
            Some(config) => {
                let mut command = peer(&self.client, &worker.component);
                command.envs(CONFIGS[config].1.iter().copied());
                command
            }
            None => {
                let mut command = Command::new(std::env::current_exe()?);
                command.args(["pair-client", "--address", &worker.address]);
                command
            }
        };
        command.args(arguments).envs(self.base.iter().cloned());
        Server::start("client", command, self.dir.path(), None)
    }

    /// All rounds of one load; the rounds of each arm.
    fn measure(&mut self, args: &PairArgs, load: Load) -> Result<Vec<Vec<Round>>> {
        let names = ARMS.map(|arm| arm.name);
        rounds(args.rounds, &load.to_string(), &names, |number, index| {
            self.slice(args, load, number, ARMS[index])
        })
    }

    fn slice(&mut self, args: &PairArgs, load: Load, number: usize, arm: Arm) -> Result<Round> {
        let stream = usize::from(load.payload.is_none());
        let limit = CLIENT_LIMIT + Duration::from_secs_f64(args.seconds + args.warmup);
        self.hiccup.take();
        let pids = (
            self.workers[stream][arm.worker].server.pid(),
            self.etcd.pid(),
        );
        let before = counters(pids);
        let worker = &self.workers[stream][arm.worker];
        let mut client = self.client(arm, worker, &load.arguments(args))?;
        let ended = client.wait_end(limit);
        let after = counters(pids);
        let hiccups = Quantiles::of_ns(&self.hiccup.take());
        self.etcd.check_alive()?;
        self.workers[stream][arm.worker].server.check_alive()?;
        ended?;
        round_of(number, &last_report(&client)?, &before, &after, hiccups)
    }
}

fn counters((worker, etcd): (u32, u32)) -> Counters {
    Counters {
        at: Instant::now(),
        worker: Usage::of_tree(worker),
        corelane: None,
        etcd: Usage::of_tree(etcd),
        machine: Machine::now(),
    }
}

fn start_worker(component: String, command: Command, dir: &Path) -> Result<Worker> {
    let (server, ready) = start_ready(&component, command, dir)?;
    let address = ready["address"].as_str().unwrap_or_default().to_owned();
    Ok(Worker {
        server,
        component,
        address,
    })
}

fn middle(rounds: &[Round], figure: impl Fn(&Round) -> f64) -> f64 {
    median(rounds.iter().map(figure))
}

fn p50(rounds: &[Round]) -> f64 {
    middle(rounds, |round| {
        round
            .first_item_us
            .as_ref()
            .map_or(f64::NAN, |first| first.p50)
    })
}

fn arms(records: &[Vec<Round>]) -> Value {
    let arms = ARMS.iter().zip(records).map(|(arm, rounds)| {
        json!({
            "arm": arm.name,
            "requests_per_s": middle(rounds, |round| round.requests_per_s),
            "client_cpu_us": middle(rounds, |round| round.client_cpu_us),
            "worker_cpu_us": middle(rounds, |round| round.worker_cpu_us),
            "rounds": rounds,
        })
    });
    arms.collect()
}

/// The table of one load, and how corelane's arms stand to the best of Dynamo's.
fn text(args: &PairArgs, load: Load, records: &[Vec<Round>]) -> String {
    let mut table = Table::new(&[
        "arm",
        "first item p50 us",
        "p99 us",
        "end p50 us",
        "p99 us",
        "req/s",
        "client cpu us",
        "worker cpu us",
        "both",
        "errors",
    ]);
    for (arm, rounds) in ARMS.iter().zip(records) {
        let first = |quantile: fn(&Quantiles) -> f64| {
            middle(rounds, |round| {
                round.first_item_us.as_ref().map_or(f64::NAN, quantile)
            })
        };
        let end = |quantile: fn(&Quantiles) -> f64| {
            middle(rounds, |round| {
                round.last_item_us.as_ref().map_or(f64::NAN, quantile)
            })
        };
        table.row(vec![
            arm.name.to_string(),
            figure(first(|of| of.p50)),
            figure(first(|of| of.p99)),
            figure(end(|of| of.p50)),
            figure(end(|of| of.p99)),
            figure(middle(rounds, |round| round.requests_per_s)),
            figure(middle(rounds, |round| round.client_cpu_us)),
            figure(middle(rounds, |round| round.worker_cpu_us)),
            figure(middle(rounds, |round| round.all_cpu_us)),
            rounds
                .iter()
                .map(|round| round.errors)
                .sum::<u64>()
                .to_string(),
        ]);
    }
    let least = |arms: std::ops::Range<usize>, of: fn(&Round) -> f64| {
        arms.map(|arm| middle(&records[arm], of))
            .fold(f64::INFINITY, f64::min)
    };
    let worker = least(MIXED, |r| r.worker_cpu_us) / least(STOCK, |r| r.worker_cpu_us);
    let per_cpu = least(STOCK, |r| r.all_cpu_us) / middle(&records[OURS], |r| r.all_cpu_us);
    let best = STOCK
        .map(|arm| p50(&records[arm]))
        .fold(f64::INFINITY, f64::min);
    let latency = p50(&records[OURS]) / best;
    format!(
        "\n{load}; medians over rounds: {} x {} s\n\n{}\nto the best of Dynamo's: worker CPU with \
         Dynamo's client {worker:.2}, requests per CPU-second of our pair {per_cpu:.1}, p50 \
         {latency:.2}\n",
        args.rounds,
        args.seconds,
        table.text(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_parse() {
        let load = |payload, callers| Ok(Load { payload, callers });
        assert_eq!("unary:128:64".parse(), load(Some(128), 64));
        assert_eq!("stream:16".parse(), load(None, 16));
        for bad in [
            "unary:128",
            "stream",
            "stream:0",
            "unary:x:1",
            "burst:1",
            "",
        ] {
            assert!(bad.parse::<Load>().is_err(), "{bad}");
        }
    }
}
