//! `corelane-bench hop`: the same frames to the sink directly and through each process in the
//! middle, arm after arm in one interleaved run.

use std::time::SystemTime;

use anyhow::{Result, bail};
use clap::ValueEnum;

use crate::arrivals::Arrivals;
use crate::cpu::Pins;
use crate::curves::Panel;
use crate::hop_report::{self, Record};
use crate::hop_scene::Scene;
use crate::interrupt;
use crate::load::Shape;
use crate::middle::CorelaneArgs;
use crate::output::{ExportArgs, OutputArgs, Told};
use crate::usage_error;

/// What may stand in the middle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Vs {
    /// This project's router.
    Corelane,
    /// HAProxy in TCP mode.
    Haproxy,
    /// nginx with its stream module.
    Nginx,
    /// Nothing: the direct arms alone.
    None,
}

/// Arguments of `hop`.
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  corelane-bench hop                                  closed loop, 1 and 64 connections, all arms
  corelane-bench hop --vs haproxy --connections 1 --rounds 10 --seconds 3
  corelane-bench hop --pin client=0,middle=1,sink=0 --strace --json hop.json
  corelane-bench hop --rate 1000,20000 --arrivals poisson,burst8 --ack on_accept
  corelane-bench hop --observed --vs corelane --ack on_accept --connections 64 --rounds 10
  corelane-bench hop --corelane-core 'idle = \"spin\"' --json - | jq '.loads[].arms[]'

Latencies are in microseconds. CPU is user and system time of the process in the middle with all
its threads. Ratios are medians over rounds, each round against the same round, with the least
and the greatest. direct-again is the same as direct: what it differs by is noise.")]
pub(crate) struct HopArgs {
    /// What to compare with the direct way; a program that is not installed is left out.
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "corelane,haproxy,nginx"
    )]
    pub(crate) vs: Vec<Vs>,
    /// One more arm: HAProxy with `option splice-auto`.
    #[arg(long)]
    pub(crate) haproxy_splice: bool,
    /// What it costs to be watched: further arms of corelane without flight recorder, and with
    /// all that can watch it: flight recorder, traces (1 %), /metrics each second, corelane top.
    #[arg(long)]
    pub(crate) observed: bool,
    #[command(flatten)]
    pub(crate) corelane: CorelaneArgs,
    /// Connections of each load [default: 1,64; with --rate: 1].
    #[arg(long, value_delimiter = ',', value_name = "N,...")]
    connections: Vec<usize>,
    /// Closed loop: requests in flight on each connection.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pipeline: usize,
    /// Open loop instead: requests due per second.
    #[arg(long, value_delimiter = ',', value_name = "R,...")]
    rate: Vec<f64>,
    /// Open loop: even, poisson or burstN (so many due at the same instant).
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "even",
        value_name = "A,..."
    )]
    arrivals: Vec<Arrivals>,
    /// Bytes of each request's body.
    #[arg(long, default_value_t = 128, value_name = "BYTES")]
    pub(crate) payload: usize,
    /// Rounds; each runs every arm once, the direction alternates.
    #[arg(long, default_value_t = 6)]
    pub(crate) rounds: usize,
    /// Measured seconds of each arm in each round.
    #[arg(long, default_value_t = 2.0)]
    pub(crate) seconds: f64,
    /// Seconds of load before, not counted.
    #[arg(long, default_value_t = 0.3)]
    pub(crate) warmup: f64,
    /// CPUs of the parts, such as client=0,middle=1,sink=0 [default: none is bound, and corelane
    /// binds itself to CPU 0].
    #[arg(long)]
    pub(crate) pin: Option<Pins>,
    /// Count system calls per request in slices of their own (needs strace).
    #[arg(long)]
    pub(crate) strace: bool,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    #[command(flatten)]
    export: ExportArgs,
}

impl HopArgs {
    fn check(&self) -> Result<()> {
        if self.rounds == 0 || self.pipeline == 0 || self.connections.contains(&0) {
            return Err(usage_error(
                "--rounds, --pipeline and --connections must be at least 1",
            ));
        }
        if self.connections.iter().any(|n| *n > 10_000) || self.pipeline > 10_000 {
            return Err(usage_error(
                "--connections and --pipeline must be at most 10000",
            ));
        }
        if self
            .rate
            .iter()
            .any(|rate| !rate.is_finite() || *rate < 1.0 || *rate > 1e7)
        {
            return Err(usage_error(
                "--rate must be between 1 and 10000000 requests/s",
            ));
        }
        if !(0.01..=3600.0).contains(&self.seconds) || !(0.0..=60.0).contains(&self.warmup) {
            return Err(usage_error(
                "--seconds must be 0.01 to 3600, --warmup at most 60",
            ));
        }
        if !(1..=30 << 20).contains(&self.payload) {
            return Err(usage_error("--payload must be 1 byte to 30 MiB"));
        }
        self.output.check()
    }

    /// The loads in the order they run.
    pub(crate) fn loads(&self) -> Vec<Shape> {
        let is_open = !self.rate.is_empty();
        let default: &[usize] = if is_open { &[1] } else { &[1, 64] };
        let counts = if self.connections.is_empty() {
            default
        } else {
            &self.connections
        };
        let mut loads = Vec::new();
        for connections in counts.iter().copied() {
            if !is_open {
                loads.push(Shape::Closed {
                    connections,
                    pipeline: self.pipeline,
                });
            }
            for rate in self.rate.iter().copied() {
                for arrivals in self.arrivals.iter().copied() {
                    loads.push(Shape::Open {
                        connections,
                        rate,
                        arrivals,
                    });
                }
            }
        }
        loads
    }
}

/// Runs the whole comparison.
pub(crate) fn run(args: &HopArgs) -> Result<()> {
    args.check()?;
    interrupt::install();
    let began = SystemTime::now();
    let mut scene = Scene::start(args)?;
    for note in &scene.skipped {
        eprintln!("left out: {note}");
    }
    let mut records = Vec::new();
    for shape in args.loads() {
        records.push(scene.measure(args, shape)?);
    }
    let report = hop_report::report(args, &scene, &records);
    let tables = hop_report::text(args, &scene, &records);
    let panels = panels(args, &scene, &records);
    args.output.print_table(&tables)?;
    args.export.write(&panels, began)?;
    args.output.finish(&Told {
        kind: "hop",
        report: &report,
        tables: &tables,
        panels: &panels,
    })?;
    let errors: u64 = records
        .iter()
        .flatten()
        .flat_map(|r| &r.rounds)
        .map(|r| r.errors)
        .sum();
    if errors > 0 {
        let refusal = records.iter().flatten().find_map(|r| r.refusal.clone());
        bail!(
            "{errors} requests were refused or dropped: {}",
            refusal.unwrap_or_default()
        );
    }
    Ok(())
}

/// The distributions of each load.
fn panels(args: &HopArgs, scene: &Scene, records: &[Vec<Record>]) -> Vec<Panel> {
    let panel = |(shape, records): (Shape, &Vec<Record>)| {
        let curves = scene.arms.iter().zip(records);
        Panel {
            title: shape.to_string(),
            curves: curves.map(|(arm, record)| record.curve(arm)).collect(),
        }
    };
    args.loads().into_iter().zip(records).map(panel).collect()
}
