//! The processes of a `hop` run and one slice of it: start them, put the load on an arm, read what
//! the window cost.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use hdrhistogram::Histogram;
use tempfile::TempDir;

use crate::cpu::{Machine, Pins, Usage, allowed_cpus, tick_us};
use crate::frames::RequestFrame;
use crate::hiccup::HiccupMeter;
use crate::hop::{HopArgs, Vs};
use crate::hop_report::{Record, Round};
use crate::interrupt::wait_for;
use crate::load::{self, Edge, Found, Shape, Slice};
use crate::middle::{Ack, Corelane, Discovery, Proxy, Route, instance_address};
use crate::observed::{Watch, Watched, Watching};
use crate::progress::Progress;
use crate::report::{Quantiles, order, round};
use crate::servers::{START_LIMIT, Server, version_of};
use crate::strace::Trace;

/// One way from the load generator to the sink.
pub(crate) struct Arm {
    /// Its name in reports.
    pub(crate) name: String,
    /// What its program calls itself.
    pub(crate) version: Option<String>,
    /// On which CPUs its threads may run.
    pub(crate) cpus: Option<String>,
    target: SocketAddr,
    frame: RequestFrame,
    middle: Option<Server>,
    watched: Option<Watched>,
}

impl Arm {
    /// Length of each request on the wire.
    pub(crate) fn frame_bytes(&self) -> usize {
        self.frame.len()
    }
}

/// Everything that a run has started.
pub(crate) struct Scene {
    /// The ways to compare, direct first, direct again last.
    pub(crate) arms: Vec<Arm>,
    /// What was left out and why.
    pub(crate) skipped: Vec<String>,
    /// On which CPUs the sink may run.
    pub(crate) sink_cpus: String,
    sink: Server,
    hiccup: HiccupMeter,
    began: Instant,
    dir: TempDir,
}

/// The endpoint of the sink and the one that corelane offers in front of it.
const TARGET: &str = "bench/sink/generate";
const LISTEN: &str = "bench/router/generate";
const DIRECT_PATH: &str = "1/bench/sink/generate";

impl Scene {
    /// Starts everything and waits until each arm has answered a request.
    pub(crate) fn start(args: &HopArgs) -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("corelane-bench-")
            .tempdir()?;
        let pins = args.pin.unwrap_or_default();
        let (sink, address) = start_sink(dir.path(), pins)?;
        let mut scene = Self {
            arms: Vec::new(),
            skipped: Vec::new(),
            sink_cpus: allowed_cpus(sink.pid()),
            sink,
            hiccup: HiccupMeter::start()?,
            began: Instant::now(),
            dir,
        };
        scene.add_direct("direct", address, args)?;
        if args.vs.contains(&Vs::Corelane) {
            scene.add_corelane(args, address)?;
        }
        let mut proxies = Vec::new();
        if args.vs.contains(&Vs::Haproxy) {
            proxies.push(Proxy::Haproxy);
        }
        if args.haproxy_splice {
            proxies.push(Proxy::HaproxySplice);
        }
        if args.vs.contains(&Vs::Nginx) {
            proxies.push(Proxy::Nginx);
        }
        for proxy in proxies {
            scene.add_proxy(proxy, args, address)?;
        }
        scene.add_direct("direct-again", address, args)?;
        scene.wait_until_all_answer()?;
        // Only now: what is started takes over the CPUs of the thread that starts it.
        if let Some(cpus) = pins.client {
            cpus.bind_this_thread()
                .with_context(|| format!("cannot run on CPU {cpus}"))?;
        }
        Ok(scene)
    }

    fn add_direct(&mut self, name: &str, sink: SocketAddr, args: &HopArgs) -> Result<()> {
        self.arms.push(Arm {
            name: name.into(),
            version: None,
            cpus: None,
            target: sink,
            frame: RequestFrame::new(DIRECT_PATH, args.payload)?,
            middle: None,
            watched: None,
        });
        Ok(())
    }

    fn add_corelane(&mut self, args: &HopArgs, sink: SocketAddr) -> Result<()> {
        let Some(program) = args.corelane.find()? else {
            self.skipped
                .push("corelane is not beside this program nor on PATH (--corelane)".into());
            return Ok(());
        };
        if args.observed {
            Watch::check()?;
        }
        for ack in args.corelane.ack.list() {
            for watching in Watching::arms(args.observed) {
                self.add_one_corelane(args, &program, sink, *ack, *watching)?;
            }
        }
        Ok(())
    }

    fn add_one_corelane(
        &mut self,
        args: &HopArgs,
        program: &Path,
        sink: SocketAddr,
        ack: Ack,
        watching: Watching,
    ) -> Result<()> {
        let dir = self.dir.path().join(format!("{ack}{}", watching.suffix()));
        fs::create_dir_all(&dir)?;
        let corelane = Corelane::start(
            &args.corelane.with_core(watching.core()),
            program,
            &dir,
            &Discovery::Memory(&instance_address(sink, DIRECT_PATH)),
            &Route {
                listen: LISTEN,
                target: TARGET,
                ack,
            },
            args.pin.unwrap_or_default().middle,
            &watching.variables(),
        )?;
        let watched = Watched {
            program: program.to_owned(),
            dir,
            status: corelane.status,
        };
        self.arms.push(Arm {
            name: format!("corelane/{ack}{}", watching.suffix()),
            version: Some(version_of(program, "--version")),
            cpus: Some(allowed_cpus(corelane.server.pid())),
            target: corelane.address,
            frame: RequestFrame::new(&corelane.path, args.payload)?,
            middle: Some(corelane.server),
            watched: (watching == Watching::On).then_some(watched),
        });
        Ok(())
    }

    fn add_proxy(&mut self, proxy: Proxy, args: &HopArgs, sink: SocketAddr) -> Result<()> {
        let program = match proxy.find() {
            Ok(program) => program,
            Err(why) => {
                self.skipped.push(why);
                return Ok(());
            }
        };
        let cpus = args.pin.unwrap_or_default().middle;
        let (server, target) = proxy.start(&program, self.dir.path(), sink, cpus)?;
        self.arms.push(Arm {
            name: proxy.name().into(),
            version: Some(proxy.version(&program)),
            cpus: Some(allowed_cpus(server.pid())),
            target,
            frame: RequestFrame::new(DIRECT_PATH, args.payload)?,
            middle: Some(server),
            watched: None,
        });
        Ok(())
    }

    /// One request through each arm, until it is accepted.
    fn wait_until_all_answer(&mut self) -> Result<()> {
        for Arm {
            name,
            target,
            frame,
            middle,
            ..
        } in &mut self.arms
        {
            let mut last = String::from("no reply");
            let answer = wait_for(&format!("{name} to accept a request"), START_LIMIT, || {
                if let Some(server) = middle {
                    server.check_alive()?;
                }
                match load::probe(*target, frame) {
                    Ok(None) => return Ok(Some(())),
                    Ok(Some(refusal)) => last = refusal,
                    Err(error) => last = format!("{error:#}"),
                }
                Ok(None)
            });
            answer.with_context(|| format!("the last answer was: {last}"))?;
        }
        Ok(())
    }

    /// All rounds of one load; a record per arm.
    pub(crate) fn measure(&mut self, args: &HopArgs, shape: Shape) -> Result<Vec<Record>> {
        let mut records: Vec<Record> = self.arms.iter().map(|_| Record::default()).collect();
        let traced = if args.strace { self.arms.len() } else { 0 };
        let mut progress = Progress::of(args.rounds * self.arms.len() + traced);
        for number in 0..args.rounds {
            for index in order(self.arms.len(), number) {
                let name = &self.arms[index].name;
                let (round, rounds) = (number + 1, args.rounds);
                progress.begin(&format!("{shape}: round {round} of {rounds}, {name}"));
                self.slice(args, shape, number, index, &mut records[index])?;
            }
        }
        if args.strace {
            for (index, record) in records.iter_mut().enumerate() {
                progress.begin(&format!(
                    "{shape}: system calls of {}",
                    self.arms[index].name
                ));
                record.calls_per_request = self.trace(args, shape, index)?;
            }
        }
        Ok(records)
    }

    fn slice(
        &mut self,
        args: &HopArgs,
        shape: Shape,
        number: usize,
        index: usize,
        record: &mut Record,
    ) -> Result<()> {
        let Self {
            arms,
            sink,
            hiccup,
            began,
            ..
        } = self;
        let Arm {
            name,
            target,
            frame,
            middle,
            watched,
            ..
        } = &mut arms[index];
        let middle_pid = middle.as_ref().map(Server::pid);
        let (mut before, mut after) = (Counters::default(), Counters::default());
        let (mut hiccups, mut start) = (None, Duration::ZERO);
        let slice = Slice {
            target: *target,
            frame,
            shape,
            warmup: Duration::from_secs_f64(args.warmup),
            window: Duration::from_secs_f64(args.seconds),
            seed: number as u64 + 1,
        };
        let watch = watched.as_ref().map(Watch::start).transpose()?;
        let found = load::run(slice, &mut |edge| {
            match edge {
                Edge::Open => {
                    hiccup.take();
                    start = began.elapsed();
                    before = Counters::read(middle_pid, sink.pid());
                }
                Edge::Close => {
                    after = Counters::read(middle_pid, sink.pid());
                    hiccups = Some(hiccup.take());
                }
            }
            Ok(())
        });
        if let Some(server) = middle {
            server.check_alive()?;
        }
        let found = found.with_context(|| format!("arm {name}, {shape}"))?;
        watch.map(Watch::finish).transpose()?;
        let hiccups = hiccups.context("the window never closed")?;
        record.add(
            round_of(number, &found, before, after, &hiccups),
            start,
            &found,
            &hiccups,
        );
        Ok(())
    }

    /// System calls per request of the arm's middle in a slice of its own.
    fn trace(
        &mut self,
        args: &HopArgs,
        shape: Shape,
        index: usize,
    ) -> Result<Option<BTreeMap<String, f64>>> {
        let Arm {
            name,
            target,
            frame,
            middle: Some(server),
            ..
        } = &mut self.arms[index]
        else {
            return Ok(None);
        };
        let slice = Slice {
            target: *target,
            frame,
            shape,
            warmup: Duration::from_secs_f64(args.warmup),
            window: Duration::from_secs_f64(args.seconds.min(2.0)),
            seed: 1,
        };
        let dir = self.dir.path();
        let (mut trace, mut calls) = (None, BTreeMap::new());
        let found = load::run(slice, &mut |edge| {
            match edge {
                Edge::Open => trace = Some(Trace::attach(server.pid(), dir)?),
                Edge::Close => {
                    calls = trace
                        .take()
                        .map(Trace::finish)
                        .transpose()?
                        .unwrap_or_default();
                }
            }
            Ok(())
        })
        .with_context(|| format!("arm {name} under strace, {shape}"))?;
        let requests = found.replies.max(1) as f64;
        let per_request = |(call, count): (String, u64)| (call, round(count as f64 / requests));
        Ok(Some(calls.into_iter().map(per_request).collect()))
    }
}

fn start_sink(dir: &Path, pins: Pins) -> Result<(Server, SocketAddr)> {
    let program = std::env::current_exe().context("cannot tell where this program is")?;
    let mut command = Command::new(program);
    command.arg("sink");
    let mut sink = Server::start("sink", command, dir, pins.sink)?;
    let out = sink.stdout.clone();
    let address = sink.wait_until("to listen", || {
        let text = fs::read_to_string(&out).ok()?;
        text.strip_suffix('\n')?.parse().ok()
    })?;
    Ok((sink, address))
}

/// What is read at both ends of a window.
#[derive(Clone, Copy, Default)]
struct Counters {
    middle: Usage,
    sink: Usage,
    client: Usage,
    /// The bench and everything it started.
    all: Usage,
    machine: Machine,
}

impl Counters {
    fn read(middle: Option<u32>, sink: u32) -> Self {
        Self {
            client: Usage::of_this_thread(),
            middle: middle.map(Usage::of_tree).unwrap_or_default(),
            sink: Usage::of_tree(sink),
            all: Usage::of_tree(std::process::id()),
            machine: Machine::now(),
        }
    }
}

fn round_of(
    number: usize,
    found: &Found,
    before: Counters,
    after: Counters,
    hiccups: &Histogram<u64>,
) -> Round {
    let seconds = found.elapsed.as_secs_f64();
    let requests = found.replies.max(1) as f64;
    let middle = after.middle.since(before.middle);
    let sink = after.sink.since(before.sink);
    let client = after.client.since(before.client);
    let all_us = after.all.since(before.all).cpu_us();
    let (busy_us, stolen_us) = after.machine.since_us(before.machine);
    let idle_arms_us = all_us - middle.cpu_us() - sink.cpu_us() - client.cpu_us();
    let cores = |us: f64| round((us / 1e6 / seconds).max(0.0));
    Round {
        round: number,
        latency_us: Quantiles::of_ns(&found.latency_ns),
        requests_per_s: round(found.replies as f64 / seconds),
        middle_cpu_us: round(middle.cpu_us() / requests),
        middle_user_us: round(middle.user_ticks as f64 * tick_us() / requests),
        middle_system_us: round(middle.system_ticks as f64 * tick_us() / requests),
        sink_cpu_us: round(sink.cpu_us() / requests),
        client_cpu_us: round(client.cpu_us() / requests),
        voluntary_switches: round(middle.voluntary as f64 / requests),
        involuntary_switches: round(middle.involuntary as f64 / requests),
        errors: found.errors,
        hiccup_us: Quantiles::of_ns(hiccups),
        others_cores: cores(busy_us - all_us),
        idle_arms_cores: cores(idle_arms_us),
        stolen_cores: cores(stolen_us),
    }
}
