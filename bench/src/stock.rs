//! `corelane-bench stock`: an unmodified Dynamo client calls an unmodified Dynamo worker, directly
//! and through corelane, arm after arm in one interleaved run.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use tempfile::TempDir;

use crate::arrivals::Arrivals;
use crate::cpu::{Machine, Usage};
use crate::dynamo::{
    CLIENT_LIMIT, Counters, ENDPOINT, NAMESPACE, last_report, loopback_variables, peer, program,
    round_of, rounds, start_etcd, start_ready,
};
use crate::hiccup::HiccupMeter;
use crate::interrupt::{self, wait_for};
use crate::middle::{Ack, Corelane, CorelaneArgs, Discovery, Route};
use crate::output::{OutputArgs, Told};
use crate::report::Quantiles;
use crate::servers::{START_LIMIT, Server, version_of};
use crate::stock_report::{self, Round};
use crate::usage_error;

/// Arguments of `stock`.
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  corelane-bench stock --dyn-worker bin/dyn-worker --dyn-client bin/dyn-client
  corelane-bench stock --dyn-worker W --dyn-client C --loads closed:1,burst8:100 --rounds 9
  corelane-bench stock --dyn-worker W --dyn-client C --ack on_forward --json stock.json
  corelane-bench stock --dyn-worker W --dyn-client C --dyn-env DYN_RUNTIME_NUM_WORKER_THREADS=1

W and C take the arguments of a worker and a load generator on dynamo-runtime (--namespace,
--component, --endpoint, --no-logging; the client also -c, -p, -d, -w, -r, --poisson, --burst,
--once, --text) and print JSON. Latency is to the first response item, in microseconds; medians
over rounds. Ratios compare each round with the same round; direct-again shows the noise.")]
pub(crate) struct StockArgs {
    /// The worker on dynamo-runtime.
    #[arg(long, value_name = "PATH")]
    dyn_worker: PathBuf,
    /// The load generator on dynamo-runtime.
    #[arg(long, value_name = "PATH")]
    dyn_client: PathBuf,
    /// The etcd server.
    #[arg(long, value_name = "PATH", default_value = "etcd")]
    etcd: PathBuf,
    #[command(flatten)]
    corelane: CorelaneArgs,
    /// Leave corelane out: the direct arms alone.
    #[arg(long)]
    direct_only: bool,
    /// closed:CALLERS, or even, poisson or burstN with a rate (burst8:100 is 100 requests/s).
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "LOAD,...",
        default_value = "closed:64,burst8:100,burst8:1000,poisson:1000,even:1000"
    )]
    pub(crate) loads: Vec<Load>,
    /// Bytes of each request, echoed as one response item.
    #[arg(long, default_value_t = 128, value_name = "BYTES")]
    pub(crate) payload: usize,
    /// Rounds; each runs every arm once, the direction alternates.
    #[arg(long, default_value_t = 5)]
    pub(crate) rounds: usize,
    /// Measured seconds of each arm in each round.
    #[arg(long, default_value_t = 3.0)]
    pub(crate) seconds: f64,
    /// Seconds of load before, not counted.
    #[arg(long, default_value_t = 1.0)]
    pub(crate) warmup: f64,
    /// A variable for the Dynamo worker and client (may be repeated).
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_variable)]
    pub(crate) dyn_env: Vec<(String, String)>,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

fn parse_variable(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("not NAME=VALUE")?;
    Ok((name.into(), value.into()))
}

impl StockArgs {
    fn check(&self) -> Result<()> {
        if self.rounds == 0 {
            return Err(usage_error("--rounds must be at least 1"));
        }
        if !(0.1..=3600.0).contains(&self.seconds) || !(0.0..=60.0).contains(&self.warmup) {
            return Err(usage_error(
                "--seconds must be 0.1 to 3600, --warmup at most 60",
            ));
        }
        self.output.check()
    }
}

/// One load of the Dynamo client.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Load {
    /// So many callers, each with one request at a time.
    Closed(u32),
    /// So many requests a second, due in this pattern.
    Open(Arrivals, f64),
}

impl FromStr for Load {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("'{text}' is not like closed:64, even:1000 or burst8:100");
        let (kind, number) = text.split_once(':').ok_or_else(wrong)?;
        if kind == "closed" {
            let callers = number.parse().ok().filter(|n| (1..=100_000).contains(n));
            return Ok(Self::Closed(callers.ok_or_else(wrong)?));
        }
        let rate: f64 = number.parse().map_err(|_| wrong())?;
        if !(0.1..=1e6).contains(&rate) {
            return Err(wrong());
        }
        Ok(Self::Open(kind.parse()?, rate))
    }
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed(1) => f.write_str("closed loop, 1 caller"),
            Self::Closed(callers) => write!(f, "closed loop, {callers} callers"),
            Self::Open(arrivals, rate) => write!(f, "open loop, {rate} requests/s {arrivals}"),
        }
    }
}

impl Load {
    fn arguments(self) -> Vec<String> {
        match self {
            Self::Closed(callers) => vec!["-c".into(), callers.to_string()],
            Self::Open(arrivals, rate) => {
                let mut arguments = vec!["-r".into(), rate.to_string()];
                match arrivals {
                    Arrivals::Even => {}
                    Arrivals::Poisson => arguments.push("--poisson".into()),
                    Arrivals::Burst(size) => {
                        arguments.extend(["--burst".into(), size.to_string()]);
                    }
                }
                arguments
            }
        }
    }
}

/// One way of calling the worker.
pub(crate) struct Arm {
    /// Its name in reports.
    pub(crate) name: String,
    /// What corelane calls itself.
    pub(crate) version: Option<String>,
    component: String,
    corelane: Option<Server>,
}

/// Everything that a run has started.
struct Scene {
    arms: Vec<Arm>,
    worker: Server,
    etcd: Server,
    variables: Vec<(String, String)>,
    client: PathBuf,
    hiccup: HiccupMeter,
    dir: TempDir,
}

const TARGET_COMPONENT: &str = "backend";

/// Runs the whole comparison.
pub(crate) fn run(args: &StockArgs) -> Result<()> {
    args.check()?;
    interrupt::install();
    let mut scene = Scene::start(args)?;
    let mut records = Vec::new();
    for load in &args.loads {
        records.push(scene.measure(args, *load)?);
    }
    let report = stock_report::report(args, &scene.arms, &records);
    let tables = stock_report::text(args, &scene.arms, &records);
    args.output.print_table(&tables)?;
    args.output.finish(&Told {
        kind: "stock",
        report: &report,
        tables: &tables,
        panels: &[],
    })?;
    let errors: u64 = records
        .iter()
        .flatten()
        .flatten()
        .map(|round| round.errors)
        .sum();
    if errors > 0 {
        bail!("{errors} requests failed; the numbers beside them mean little");
    }
    Ok(())
}

impl Scene {
    fn start(args: &StockArgs) -> Result<Self> {
        let etcd_program = program(&args.etcd, "--etcd; apt-get install etcd-server")?;
        let worker_program = program(&args.dyn_worker, "--dyn-worker")?;
        let client = program(&args.dyn_client, "--dyn-client")?;
        let dir = tempfile::Builder::new()
            .prefix("corelane-bench-")
            .tempdir()?;
        let (etcd, etcd_url) = start_etcd(&etcd_program, dir.path())?;
        let base = loopback_variables(&etcd_url);
        let variables: Vec<_> = base.iter().chain(&args.dyn_env).cloned().collect();
        let worker = start_worker(&worker_program, dir.path(), &variables)?;
        let hiccup = HiccupMeter::start()?;
        let mut scene = Self {
            arms: Vec::new(),
            worker,
            etcd,
            variables,
            client,
            hiccup,
            dir,
        };
        scene.add_direct("direct");
        if !args.direct_only {
            for ack in args.corelane.ack.list() {
                scene.add_corelane(args, *ack, &base)?;
            }
        }
        scene.add_direct("direct-again");
        scene.wait_until_all_answer()?;
        Ok(scene)
    }

    fn add_direct(&mut self, name: &str) {
        self.arms.push(Arm {
            name: name.into(),
            version: None,
            component: TARGET_COMPONENT.into(),
            corelane: None,
        });
    }

    fn add_corelane(
        &mut self,
        args: &StockArgs,
        ack: Ack,
        variables: &[(String, String)],
    ) -> Result<()> {
        let program = args.corelane.find()?.ok_or_else(|| {
            usage_error("corelane is not there; give --corelane PATH, or --direct-only")
        })?;
        let component = format!("router-{}", ack.to_string().replace('_', "-"));
        let route = Route {
            listen: &format!("{NAMESPACE}/{component}/{ENDPOINT}"),
            target: &format!("{NAMESPACE}/{TARGET_COMPONENT}/{ENDPOINT}"),
            ack,
        };
        let dir = self.dir.path();
        let corelane = Corelane::start(
            &args.corelane,
            &program,
            dir,
            &Discovery::Etcd,
            &route,
            None,
            variables,
        )?;
        self.arms.push(Arm {
            name: format!("corelane/{ack}"),
            version: Some(version_of(&program, "--version")),
            component,
            corelane: Some(corelane.server),
        });
        Ok(())
    }

    /// One request through each arm, until it brings its answer back.
    fn wait_until_all_answer(&mut self) -> Result<()> {
        for index in 0..self.arms.len() {
            let name = self.arms[index].name.clone();
            let mut last = None;
            let answer = wait_for(&format!("an answer through {name}"), START_LIMIT, || {
                self.check_servers(index)?;
                let mut client = self.client(index, &["--once", "--text", "hello"])?;
                let done = client.wait_end(CLIENT_LIMIT);
                let text = fs::read_to_string(&client.stdout)?;
                if done.is_ok() && text.contains("hello") {
                    return Ok(Some(()));
                }
                last = done.err();
                Ok(None)
            });
            if let Err(error) = answer {
                return Err(last.map_or(error, |last| last.context(format!("through {name}"))));
            }
        }
        Ok(())
    }

    fn client(&self, index: usize, arguments: &[&str]) -> Result<Server> {
        let mut command = peer(&self.client, &self.arms[index].component);
        command.args(arguments);
        command.envs(self.variables.iter().cloned());
        Server::start("client", command, self.dir.path(), None)
    }

    fn check_servers(&mut self, index: usize) -> Result<()> {
        self.etcd.check_alive()?;
        self.worker.check_alive()?;
        self.arms[index]
            .corelane
            .as_mut()
            .map_or(Ok(()), Server::check_alive)
    }

    /// All rounds of one load; the rounds of each arm.
    fn measure(&mut self, args: &StockArgs, load: Load) -> Result<Vec<Vec<Round>>> {
        let names: Vec<String> = self.arms.iter().map(|arm| arm.name.clone()).collect();
        rounds(args.rounds, &load.to_string(), &names, |number, index| {
            self.slice(args, load, number, index)
        })
    }

    fn slice(
        &mut self,
        args: &StockArgs,
        load: Load,
        number: usize,
        index: usize,
    ) -> Result<Round> {
        let mut arguments = load.arguments();
        let more = [
            ("-p", args.payload.to_string()),
            ("-n", "1".to_string()),
            ("-d", args.seconds.to_string()),
            ("-w", args.warmup.to_string()),
        ];
        for (flag, value) in more {
            arguments.extend([flag.to_string(), value]);
        }
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let limit = CLIENT_LIMIT + Duration::from_secs_f64(args.seconds + args.warmup);

        self.hiccup.take();
        let before = self.counters(index);
        let mut client = self.client(index, &arguments)?;
        let ended = client.wait_end(limit);
        let after = self.counters(index);
        let hiccups = Quantiles::of_ns(&self.hiccup.take());
        self.check_servers(index)?;
        ended?;
        round_of(number, &last_report(&client)?, &before, &after, hiccups)
    }

    fn counters(&self, index: usize) -> Counters {
        let corelane = self.arms[index].corelane.as_ref();
        Counters {
            at: Instant::now(),
            worker: Usage::of_tree(self.worker.pid()),
            corelane: corelane.map(|server| Usage::of_tree(server.pid())),
            etcd: Usage::of_tree(self.etcd.pid()),
            machine: Machine::now(),
        }
    }
}

fn start_worker(program: &Path, dir: &Path, variables: &[(String, String)]) -> Result<Server> {
    let mut command = peer(program, TARGET_COMPONENT);
    command.args(["-n", "1"]).envs(variables.iter().cloned());
    Ok(start_ready("worker", command, dir)?.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_parse_and_become_arguments_of_the_client() {
        let cases = [
            ("closed:64", vec!["-c", "64"]),
            ("even:1000", vec!["-r", "1000"]),
            ("poisson:0.5", vec!["-r", "0.5", "--poisson"]),
            ("burst8:100", vec!["-r", "100", "--burst", "8"]),
        ];
        for (text, arguments) in cases {
            assert_eq!(
                text.parse::<Load>().unwrap().arguments(),
                arguments,
                "{text}"
            );
        }
        for bad in [
            "closed",
            "closed:0",
            "closed:x",
            "even:",
            "even:0",
            "uniform:5",
            "even:inf",
        ] {
            assert!(bad.parse::<Load>().is_err(), "{bad}");
        }
    }
}
