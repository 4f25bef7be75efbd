//! `corelane-bench gms`: the GPU memory service beside the same protocol on one asyncio loop, turn
//! by turn in one interleaved run.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use tempfile::TempDir;

use crate::cpu::CpuRange;
use crate::gms_report::{self, Record};
use crate::gms_scene::{Queue, Samples};
use crate::hiccup::HiccupMeter;
use crate::output::{OutputArgs, Told};
use crate::progress::Progress;
use crate::report::{Quantiles, order};
use crate::servers::{Server, find_program, version_of};
use crate::{interrupt, usage_error};

/// Arguments of `gms`.
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  corelane-bench gms --python run/venv/bin/python
  nice -n -20 corelane-bench gms --rounds 20 --turns 1000 --json gms.json
  corelane-bench gms --waiting 1,256 --kills 20 --pin-client 0 --pin-service 2-3

Latencies are in microseconds, seen by a client that polls. The client has the first CPU that it may
use and the services the last, each alone unless the machine is busy: `nice -n -20` keeps others out
for client and services alike. `handover` begins with the SIGKILL of the holder and so contains its
teardown by the kernel; `handover_after_close` begins when the kernel closes its files. Memory is
the host's and gets its pages when it is touched, which nobody does here.")]
pub(crate) struct GmsArgs {
    /// The program [default: `corelane` beside this one, else on PATH].
    #[arg(long, value_name = "PATH")]
    corelane: Option<PathBuf>,
    /// A Python with msgspec, for the asyncio arm; without it there is only one arm
    /// [default: python3 if it has msgspec].
    #[arg(long, value_name = "PATH")]
    python: Option<PathBuf>,
    /// The asyncio server [default: bench/gms_asyncio.py of this repository].
    #[arg(long, value_name = "FILE")]
    script: Option<PathBuf>,
    /// Clients that wait for the lock.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "1,16,256",
        value_name = "N,..."
    )]
    waiting: Vec<usize>,
    /// Rounds; each runs every arm once, the direction alternates.
    #[arg(long, default_value_t = 10)]
    rounds: usize,
    /// Lives of a holder in each arm, round and number of waiting clients.
    #[arg(long, default_value_t = 500)]
    turns: usize,
    /// Allocations, each exported once, in a life.
    #[arg(long, default_value_t = 4)]
    allocations: usize,
    /// Holders that are killed in each arm, round and number of waiting clients.
    #[arg(long, default_value_t = 10)]
    kills: usize,
    /// Turns before, not counted.
    #[arg(long, default_value_t = 50)]
    warmup: usize,
    /// CPUs of the measuring client [default: the first].
    #[arg(long, value_name = "CPUS")]
    pin_client: Option<CpuRange>,
    /// CPUs of the services and of holders that are killed [default: the last].
    #[arg(long, value_name = "CPUS")]
    pin_service: Option<CpuRange>,
    /// Neither service logs its transitions.
    #[arg(long)]
    quiet: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// A service and its queues, one for each number of waiting clients.
struct Arm {
    name: &'static str,
    version: String,
    queues: Vec<Queue>,
    server: Server,
}

/// Runs it.
pub(crate) fn run(args: &GmsArgs) -> Result<()> {
    if args.rounds == 0 || args.waiting.contains(&0) || args.waiting.is_empty() {
        return Err(usage_error("--rounds and --waiting must be at least 1"));
    }
    args.output.check()?;
    interrupt::install();
    let hiccup = HiccupMeter::start()?;
    raise_files()?;
    let ends = CpuRange::ends_of_this_thread()?;
    let args = &GmsArgs {
        pin_client: args.pin_client.or(ends.map(|(first, _)| first)),
        pin_service: args.pin_service.or(ends.map(|(_, last)| last)),
        ..args.clone()
    };
    let dir = tempfile::tempdir().context("no scratch folder")?;
    let mut skipped = Vec::new();
    let mut arms = vec![corelane(args, &dir)?];
    match asyncio(args, &dir)? {
        Some(arm) => arms.push(arm),
        None => skipped.push("asyncio: no Python with msgspec; name one with --python".to_owned()),
    }
    if let Some(cpus) = args.pin_client {
        cpus.bind_this_thread()?;
    }
    let told = measure(args, &mut arms)?;
    let hiccup_us = Quantiles::of_ns(&hiccup.take());
    let tables = gms_report::table(&told, &skipped);
    args.output.print_table(&tables)?;
    let settings = serde_json::json!({
        "rounds": args.rounds, "turns": args.turns, "allocations": args.allocations,
        "kills": args.kills, "logs_transitions": !args.quiet,
        "client_cpus": args.pin_client.map(|cpus| cpus.to_string()),
        "service_cpus": args.pin_service.map(|cpus| cpus.to_string()),
    });
    args.output.finish(&Told {
        kind: "gms",
        report: &gms_report::json(&told, &skipped, settings, hiccup_us),
        tables: &tables,
        panels: &[],
    })
}

/// All rounds; what each arm has shown, and the first arm once more: its difference is noise.
fn measure(args: &GmsArgs, arms: &mut [Arm]) -> Result<Vec<gms_report::Arm>> {
    let records = || args.waiting.iter().map(|n| Record::new(*n)).collect();
    let mut told: Vec<gms_report::Arm> = Vec::new();
    for (arm, suffix) in arms
        .iter()
        .zip([""; 2])
        .chain(arms.first().zip(Some("-again")))
    {
        told.push(gms_report::Arm {
            name: format!("{}{suffix}", arm.name),
            version: arm.version.clone(),
            records: records(),
        });
    }
    let mut progress = Progress::of(args.rounds * args.waiting.len() * told.len());
    for round in 0..args.rounds {
        for (index, waiting) in args.waiting.iter().enumerate() {
            for at in order(told.len(), round) {
                let (round_of, rounds, name) = (round + 1, args.rounds, &told[at].name);
                let what = format!("round {round_of} of {rounds}: {name} with {waiting} waiting");
                progress.begin(&what);
                let arm = if at == arms.len() { 0 } else { at };
                arms[arm].server.check_alive()?;
                let samples = slice(args, &mut arms[arm].queues[index])?;
                told[at].records[index].add(samples);
            }
        }
    }
    Ok(told)
}

fn slice(args: &GmsArgs, queue: &mut Queue) -> Result<Samples> {
    let mut ignored = Samples::new();
    for _ in 0..args.warmup {
        queue.turn(args.allocations, &mut ignored)?;
    }
    let mut samples = Samples::new();
    for _ in 0..args.turns {
        queue.turn(args.allocations, &mut samples)?;
    }
    for _ in 0..args.kills {
        queue.kill(args.pin_service, &mut samples)?;
    }
    Ok(samples)
}

fn corelane(args: &GmsArgs, dir: &TempDir) -> Result<Arm> {
    let program = match &args.corelane {
        Some(path) => find_program(path)
            .ok_or_else(|| usage_error(format!("--corelane {} is not there", path.display())))?,
        None => beside().context("corelane is neither beside this program nor on PATH")?,
    };
    let tags: Vec<String> = args
        .waiting
        .iter()
        .map(|n| format!("waiting-{n}"))
        .collect();
    let mut command = Command::new(&program);
    command.args(["gms", "--backend", "host", "--gpu-uuid", "GPU-bench"]);
    command.args([
        "--set",
        "gpu.populate_bytes_max=0",
        "--tag",
        &tags.join(","),
    ]);
    command.arg("--socket-dir").arg(dir.path());
    if args.quiet {
        command.env("CORELANE_LOG", "warn");
    }
    let mut server = Server::start("corelane-gms", command, dir.path(), args.pin_service)?;
    let sockets: Vec<PathBuf> = tags
        .iter()
        .map(|tag| dir.path().join(format!("gms_GPU-bench_{tag}.sock")))
        .collect();
    let queues = queues(args, &mut server, &sockets)?;
    Ok(Arm {
        name: "corelane",
        version: version_of(&program, "--version"),
        queues,
        server,
    })
}

fn beside() -> Option<PathBuf> {
    let beside = std::env::current_exe().ok()?.with_file_name("corelane");
    let beside = beside.is_file().then_some(beside);
    beside.or_else(|| find_program(Path::new("corelane")))
}

fn asyncio(args: &GmsArgs, dir: &TempDir) -> Result<Option<Arm>> {
    let named = args.python.clone();
    let python = named.unwrap_or_else(|| PathBuf::from("python3"));
    let asked = Command::new(&python)
        .args([
            "-c",
            "import msgspec, sys; print(sys.version.split()[0], msgspec.__version__)",
        ])
        .output();
    let has = asked.ok().filter(|done| done.status.success());
    let Some(has) = has else {
        if args.python.is_some() {
            let text = format!("--python {} has no msgspec", python.display());
            return Err(usage_error(text));
        }
        return Ok(None);
    };
    let script = args
        .script
        .clone()
        .unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("gms_asyncio.py"));
    let sockets: Vec<PathBuf> = args
        .waiting
        .iter()
        .map(|n| dir.path().join(format!("asyncio-{n}.sock")))
        .collect();
    let mut command = Command::new(&python);
    command.arg(script);
    if !args.quiet {
        command.arg("--log");
    }
    command.args(&sockets);
    let mut server = Server::start("asyncio-gms", command, dir.path(), args.pin_service)?;
    let queues = queues(args, &mut server, &sockets)?;
    let text = String::from_utf8_lossy(&has.stdout);
    let version = match text.trim().split_once(' ') {
        Some((python, msgspec)) => format!("Python {python}, msgspec {msgspec}"),
        None => "unknown".to_owned(),
    };
    Ok(Some(Arm {
        name: "asyncio",
        version,
        queues,
        server,
    }))
}

fn queues(args: &GmsArgs, server: &mut Server, sockets: &[PathBuf]) -> Result<Vec<Queue>> {
    for socket in sockets {
        server.wait_until("to listen", || {
            std::os::unix::net::UnixStream::connect(socket)
                .ok()
                .map(drop)
        })?;
    }
    let pairs = sockets.iter().zip(&args.waiting);
    pairs.map(|(socket, n)| Queue::start(socket, *n)).collect()
}

/// Both ends of some hundred connections are ours.
fn raise_files() -> Result<()> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    setrlimit(Resource::Nofile, raised).context("cannot raise the limit of open files")
}
