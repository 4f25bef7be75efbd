//! Whom `server` calls, and the slices of a run: rounds in which every arm has its turn.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use corelane::component::{Client, Runtime, Shard};
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::cpu::{Machine, Usage};
use crate::hiccup::HiccupMeter;
use crate::interrupt;
use crate::listener::process_at;
use crate::load::Edge;
use crate::progress::Progress;
use crate::report::{Quantiles, order, round};
use crate::server::{Other, ServerArgs, Target, seconds};
use crate::server_load::{self, Found, Plan, Request};
use crate::server_report::{Record, Round, Told};
use crate::stock::Load;

/// How long instances may take to appear in discovery.
const APPEAR_MAX: Duration = Duration::from_secs(10);

/// Windows in which nothing was answered until a server is said to answer nothing.
const CAPACITY_ATTEMPTS: u64 = 5;

/// What the first arm is called.
pub(crate) const TARGET: &str = "target";

/// Everybody who is called, in the order of the report.
pub(crate) struct Scene<'a> {
    runtime: &'a Runtime,
    args: &'a ServerArgs,
    arms: Vec<Arm>,
    request: Arc<Request>,
    hiccup: Arc<HiccupMeter>,
    began: Instant,
}

struct Arm {
    name: String,
    place: String,
    client: Client,
    process: Option<u32>,
}

/// One load, and how often each arm has it.
#[derive(Clone, Copy)]
pub(crate) struct Slices {
    /// The load.
    pub(crate) load: Load,
    /// Rounds.
    pub(crate) rounds: usize,
}

impl<'a> Scene<'a> {
    /// Finds everybody, and calls each once.
    pub(crate) async fn open(
        runtime: &'a Runtime,
        args: &'a ServerArgs,
        target: Target,
    ) -> Result<Self> {
        let mut arms = vec![Arm::find(runtime, TARGET, &target).await?];
        for other in &args.vs {
            if let Other::Server(name, target) = other {
                arms.push(Arm::find(runtime, name, target).await?);
            }
        }
        let again = &arms[0];
        let again = Arm {
            name: format!("{TARGET}-again"),
            place: again.place.clone(),
            client: again.client.clone(),
            process: again.process,
        };
        arms.push(again);
        let scene = Self {
            runtime,
            args,
            arms,
            request: Arc::new(Request::new(&args.value(), args.header.clone())?),
            hiccup: Arc::new(HiccupMeter::start()?),
            began: Instant::now(),
        };
        for arm in 0..scene.arms.len() - 1 {
            scene.try_once(arm).await?;
        }
        Ok(scene)
    }

    /// What the arms are, for the report.
    pub(crate) fn told(&self) -> Vec<Told> {
        let arms = self.arms.iter().map(|arm| Told {
            name: arm.name.clone(),
            place: arm.place.clone(),
            process: arm.process,
        });
        arms.collect()
    }

    /// Requests a second that the first arm answers to so many callers.
    pub(crate) async fn capacity(&self, callers: u32) -> Result<f64> {
        let mut progress = Progress::of(1);
        progress.begin("what the server can do");
        let mut why = None;
        // A window in which this very process stood still says nothing.
        for attempt in 0..CAPACITY_ATTEMPTS {
            let (found, _) = self.slice(0, Load::Closed(callers), attempt).await?;
            if found.replies > 0 {
                return Ok(found.replies as f64 / found.elapsed.as_secs_f64().max(1e-9));
            }
            why = found.error;
        }
        bail!("nothing was answered: {}", why.unwrap_or_default())
    }

    /// All rounds of one load; a record per arm.
    pub(crate) async fn measure(&self, slices: Slices) -> Result<Vec<Record>> {
        let Slices { load, rounds } = slices;
        let mut records: Vec<Record> = self.arms.iter().map(|_| Record::default()).collect();
        let mut progress = Progress::of(rounds * self.arms.len());
        for number in 0..rounds {
            for index in order(self.arms.len(), number) {
                let (round, name) = (number + 1, &self.arms[index].name);
                progress.begin(&format!("{load}: round {round} of {rounds}, {name}"));
                let (found, ends) = self
                    .slice(index, load, number as u64 + 1)
                    .await
                    .with_context(|| format!("arm {}, {load}", self.arms[index].name))?;
                let start = ends.0.at.saturating_duration_since(self.began);
                let interval = seconds(self.args.interval);
                records[index].add(
                    round_of(number, &found, &ends),
                    start,
                    interval,
                    &found,
                    &ends.1,
                );
            }
        }
        Ok(records)
    }

    /// One request that must be answered.
    async fn try_once(&self, arm: usize) -> Result<()> {
        let plan = self.plan(arm, Load::Closed(1), 0);
        let once = self.on_shard(move |shard| server_load::once(shard, plan));
        once.await?.map_err(|error| {
            let Arm { name, place, .. } = &self.arms[arm];
            anyhow!("{name} ({place}) does not answer: {error}")
        })
    }

    fn plan(&self, arm: usize, load: Load, seed: u64) -> Plan {
        Plan {
            client: self.arms[arm].client.clone(),
            request: Arc::clone(&self.request),
            load,
            until: self.args.until,
            warmup: seconds(self.args.warmup),
            window: seconds(self.args.seconds),
            interval: seconds(self.args.interval),
            timeout: seconds(self.args.timeout),
            in_flight_max: self.args.in_flight_max as usize,
            seed,
        }
    }

    /// A slice, and what counters said at its two edges.
    async fn slice(&self, arm: usize, load: Load, seed: u64) -> Result<(Found, Ends)> {
        let (plan, process) = (self.plan(arm, load, seed), self.arms[arm].process);
        let hiccup = Arc::clone(&self.hiccup);
        let (found, ends) = self
            .on_shard(move |shard| async move {
                let (mut first, mut last) = (None, None);
                let found = server_load::run(shard, plan, |edge| {
                    let reading = Reading::now(process, &hiccup);
                    match edge {
                        Edge::Open => first = Some(reading),
                        Edge::Close => last = Some(reading),
                    }
                });
                (found.await, first.zip(last))
            })
            .await?;
        Ok((found, ends.context("the window never closed")?))
    }

    /// Runs something on the shard of the load generator, until it has ended or a signal comes.
    async fn on_shard<T, A>(&self, make: impl FnOnce(Shard) -> A + Send + 'static) -> Result<T>
    where
        T: Send + 'static,
        A: Future<Output = T> + 'static,
    {
        let (sender, mut receiver) = oneshot::channel();
        let begun = self.runtime.spawn(move |shard| async move {
            // Whoever waits for it has given up where this fails.
            let _ = sender.send(make(shard).await);
        });
        begun.await.context("the load generator takes no work")?;
        loop {
            match timeout(Duration::from_millis(100), &mut receiver).await {
                Ok(Ok(done)) => return Ok(done),
                Ok(Err(_)) => bail!("the load generator has ended by itself"),
                Err(_) => interrupt::check()?,
            }
        }
    }
}

impl Arm {
    async fn find(runtime: &Runtime, name: &str, target: &Target) -> Result<Self> {
        let (client, place, socket) = match target {
            Target::At(place) => {
                let client = runtime.client_at(place)?;
                let socket = place
                    .split('/')
                    .next()
                    .and_then(|socket| socket.parse().ok());
                (client, place.clone(), socket)
            }
            Target::Endpoint(endpoint) => {
                let client = runtime.client(&endpoint.to_string())?;
                client
                    .wait_for_instances(APPEAR_MAX)
                    .await
                    .with_context(|| format!("{endpoint} is not in discovery"))?;
                let count = client.instances().len();
                (client, format!("{endpoint}, {count} instances"), None)
            }
        };
        Ok(Self {
            name: name.to_owned(),
            place,
            client: client.detect_faults(false),
            process: socket.and_then(|socket: SocketAddr| process_at(socket)),
        })
    }
}

/// Counters at an edge of a window.
pub(crate) struct Reading {
    at: Instant,
    server: Option<Usage>,
    client: Usage,
    machine: Machine,
    /// Since the reading before.
    hiccup_ns: hdrhistogram::Histogram<u64>,
}

/// The readings at both edges.
type Ends = (Reading, Reading);

impl Reading {
    fn now(process: Option<u32>, hiccup: &HiccupMeter) -> Self {
        Self {
            at: Instant::now(),
            server: process.map(Usage::of_tree),
            client: Usage::of_tree(std::process::id()),
            machine: Machine::now(),
            hiccup_ns: hiccup.take(),
        }
    }

    /// The hiccup meter since the reading before.
    pub(crate) fn hiccup_ns(&self) -> &hdrhistogram::Histogram<u64> {
        &self.hiccup_ns
    }
}

fn round_of(number: usize, found: &Found, (first, last): &Ends) -> Round {
    let requests = found.replies.max(1) as f64;
    let wall = last
        .at
        .saturating_duration_since(first.at)
        .as_secs_f64()
        .max(1e-9);
    let client = last.client.since(first.client);
    let server = last
        .server
        .zip(first.server)
        .map(|(last, first)| last.since(first));
    let (busy_us, stolen_us) = last.machine.since_us(first.machine);
    let others_us = busy_us - client.cpu_us() - server.map_or(0.0, Usage::cpu_us);
    let cores = |us: f64| round((us / 1e6 / wall).max(0.0));
    let mut latency = crate::report::new_histogram();
    for interval in &found.intervals {
        latency += interval;
    }
    Round {
        round: number,
        latency_us: Quantiles::of_ns(&latency),
        requests_per_s: round(found.replies as f64 / found.elapsed.as_secs_f64().max(1e-9)),
        server_cpu_us: server.map(|used| round(used.cpu_us() / requests)),
        client_cpu_us: round(client.cpu_us() / requests),
        errors: found.errors,
        dropped: found.dropped,
        hiccup_us: Quantiles::of_ns(&last.hiccup_ns),
        others_cores: cores(others_us),
        stolen_cores: cores(stolen_us),
    }
}
