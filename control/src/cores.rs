//! The shards of this process as control sees them: started, watched, told, stopped.
//!
//! ```text
//! control --command--> shard 0, 1, ...        bounded queues; nobody waits on a lock
//! control <--report--- shard 0, 1, ...        one task for each, asleep on its eventfd
//! ```

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;

use corelane_engine::config::{RingKind, ShardConfig};
use corelane_engine::ends::Ends;
use corelane_engine::executor::{self, ShardHandle, StartError};
use corelane_engine::mesh;
use corelane_engine::settings::Census;
use corelane_engine::shard::{Command, Report};
use corelane_engine::stats::Stats;
use thiserror::Error;
use tokio::io::unix::AsyncFd;
use tokio::sync::{broadcast, oneshot, watch};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::preflight::{Plan, Planned, ring_word};
use crate::quic::{Quic, QuicError};
use crate::steering::{self, Group};
use crate::tls::{self, Tls, TlsError};
use crate::{logging, trace};

mod together;

pub(crate) use self::together::register;
use self::together::{os, wanted_address};

/// Longest wait until all shards listen; taking gigabytes of buffers takes a while.
const START_MAX: Duration = Duration::from_secs(30);
/// Longest wait for room in a shard's queue, which holds a thousand commands.
const COMMAND_MAX: Duration = Duration::from_secs(5);
/// Longest wait for the end of a shard that was told to stop.
const STOP_MAX: Duration = Duration::from_secs(5);
/// Reports of lost lanes that one who follows them may be behind.
const LANE_FAULTS: usize = 1024;
/// A thread that ended without a report is noticed this late at most.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Longest wait, before we are offered, until listed instances can be reached.
const REACH_MAX: Duration = Duration::from_secs(1);
/// How often it is looked whether they have.
const REACH_EVERY: Duration = Duration::from_millis(10);

/// Why the shards do not run.
#[derive(Debug, Error)]
pub enum CoresError {
    /// One could not be made.
    #[error(transparent)]
    Start(#[from] StartError),
    /// TLS is wanted and cannot be had.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// QUIC is wanted and cannot be had.
    #[error(transparent)]
    Quic(#[from] QuicError),
    /// The port is taken.
    #[error(
        "cannot listen on {address}: {source}; write another [server] host or port, or port = 0 \
         for any free one"
    )]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// One ended before it listened.
    #[error("core {shard} on CPU {cpu} did not start: {why}")]
    Ended {
        /// The shard.
        shard: usize,
        /// Its CPU.
        cpu: usize,
        /// What it said last.
        why: String,
    },
    /// Not all listen in time.
    #[error("not every core listens after {START_MAX:?}")]
    Slow,
    /// No descriptor to watch its reports with.
    #[error("cannot watch core {shard}: {source}; raise the limit of open files (ulimit -n)")]
    Watch {
        /// The shard.
        shard: usize,
        /// The kernel's answer.
        source: std::io::Error,
    },
}

/// How a shard is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Its thread runs, but does not listen yet.
    Starting,
    /// It listens.
    Running,
    /// It has ended: by itself if there is a failure, else because it was told to.
    Ended {
        /// What went wrong.
        failure: Option<String>,
    },
}

/// One shard, as metrics show it.
#[derive(Clone, Debug)]
pub struct CoreView {
    /// Index of the shard.
    pub shard: usize,
    /// Its CPU.
    pub cpu: usize,
    /// Its ring: `uring` or `epoll`.
    pub ring: &'static str,
    /// Why this ring: one word.
    pub cause: &'static str,
    /// Its counters.
    pub stats: Arc<Stats>,
}

struct Core {
    planned: RefCell<Planned>,
    handle: RefCell<ShardHandle>,
    state: RefCell<State>,
}

impl Core {
    fn has_ended(&self) -> bool {
        matches!(&*self.state.borrow(), State::Ended { .. })
    }
}

/// What a shard is to be besides a router, by its index; asked again when one starts on another
/// ring.
type MakeEnds = Box<dyn Fn(usize) -> Ends>;

/// All shards.
pub struct Cores {
    ends: MakeEnds,
    list: Vec<Core>,
    address: SocketAddr,
    /// Counts changes of state.
    changes: watch::Sender<u64>,
    stopping: Cell<bool>,
    /// Workers that have lost a lane, and why.
    lane_faults: broadcast::Sender<(u64, &'static str)>,
    tls: Option<Rc<Tls>>,
    quic: Rc<Quic>,
    group: Group,
}

impl Cores {
    /// Starts the threads of all shards; those that are to listen do so on one port when this
    /// returns, and take connections soon after. Needs a `LocalSet`.
    ///
    /// # Errors
    /// The port is taken, or threads and descriptors are not to be had.
    pub fn spawn(plan: &Plan) -> Result<Rc<Cores>, CoresError> {
        Cores::spawn_with(plan, |_| Ends::default())
    }

    /// The same, of shards that answer requests or make calls themselves: `ends` says what the one
    /// of an index is to be.
    ///
    /// # Errors
    /// As [`Cores::spawn`].
    pub fn spawn_with(
        plan: &Plan,
        ends: impl Fn(usize) -> Ends + 'static,
    ) -> Result<Rc<Cores>, CoresError> {
        let tls = Tls::start(&plan.tls)?;
        let quic = Quic::new(plan.responses);
        let tracing = trace::tracing();
        let ends = move |index| Ends {
            tracing,
            ..ends(index)
        };
        let mut address = wanted_address(plan)?;
        let mut list: Vec<Core> = Vec::with_capacity(plan.shards.len());
        let group = Group::of(plan);
        for planned in &plan.shards {
            let mut planned = planned.clone();
            planned.config.steering = group.program(planned.config.shard);
            planned.config.spans = trace::routes();
            planned.listen_at(address);
            tls::ask(&mut planned.config, &plan.tls);
            let own = ends(planned.config.shard);
            quic.ask(&mut planned.config, own.home)?;
            let mut handle = executor::spawn_with(planned.config.clone(), own)?;
            steering::look(&mut handle);
            tls::attend(&tls, &mut handle);
            quic.attend(&mut handle);
            // The first one has chosen the port of all.
            if !planned.alone {
                address = handle.address.unwrap_or(address);
            }
            if let Some(own) = handle.address.filter(|_| planned.alone) {
                tracing::info!(core = handle.shard, address = %own, "a core listens by itself");
            }
            list.push(Core {
                planned: RefCell::new(planned),
                handle: RefCell::new(handle),
                state: RefCell::new(State::Starting),
            });
        }
        let cores = Rc::new(Cores {
            ends: Box::new(ends),
            list,
            address,
            changes: watch::Sender::new(0),
            stopping: Cell::new(false),
            lane_faults: broadcast::Sender::new(LANE_FAULTS),
            tls,
            quic,
            group,
        });
        for index in 0..cores.list.len() {
            cores.listen_to(index)?;
        }
        Ok(cores)
    }

    /// Where they listen.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Waits until all listen. One that cannot run on io_uring after all is started again on
    /// epoll, unless io_uring was required.
    ///
    /// # Errors
    /// One has ended, or they take too long.
    pub async fn started(self: &Rc<Self>) -> Result<(), CoresError> {
        let deadline = Instant::now() + START_MAX;
        let mut changes = self.changes.subscribe();
        loop {
            for index in 0..self.list.len() {
                let failure = match &*self.list[index].state.borrow() {
                    State::Ended { failure } => failure.clone().unwrap_or_default(),
                    _ => continue,
                };
                self.start_again(index, failure)?;
            }
            if self.all_run() {
                self.introduce().await;
                return Ok(());
            }
            match timeout_at(deadline, changes.changed()).await {
                Ok(_) => {}
                Err(_) => return Err(CoresError::Slow),
            }
        }
    }

    fn start_again(self: &Rc<Self>, index: usize, why: String) -> Result<(), CoresError> {
        let core = &self.list[index];
        let config = {
            let mut planned = core.planned.borrow_mut();
            if planned.config.ring == RingKind::Epoll || planned.required {
                let (shard, cpu) = (planned.config.shard, planned.config.cpu);
                return Err(CoresError::Ended { shard, cpu, why });
            }
            tracing::warn!(
                core = planned.config.shard,
                cpu = planned.config.cpu,
                "ring epoll: io_uring did not start here: {why}"
            );
            planned.config.ring = RingKind::Epoll;
            planned.cause = "start_failed";
            planned.listen_at(self.address);
            self.group.again(index);
            planned.config.steering = self.group.program(index);
            if let Some(handed) = &planned.config.handed {
                // Its mode is that of all who share it; io_uring takes either.
                let _ = handed.set_nonblocking(true);
            }
            planned.config.clone()
        };
        let own = (self.ends)(config.shard);
        let mut handle = executor::spawn_with(config, own)?;
        steering::look(&mut handle);
        tls::attend(&self.tls, &mut handle);
        self.quic.attend(&mut handle);
        core.handle.borrow_mut().join();
        core.handle.replace(handle);
        core.state.replace(State::Starting);
        self.listen_to(index)
    }

    /// Starts the task that reads one shard's reports.
    fn listen_to(self: &Rc<Self>, index: usize) -> Result<(), CoresError> {
        let handle = self.list[index].handle.borrow();
        let failed = |source| CoresError::Watch {
            shard: handle.shard,
            source,
        };
        let wake = handle
            .reports
            .as_fd()
            .try_clone_to_owned()
            .map_err(failed)?;
        let wake = register(wake).map_err(failed)?;
        tokio::task::spawn_local(read_reports(Rc::downgrade(self), index, wake));
        Ok(())
    }

    /// Takes what one shard has reported; answers whether more is to be expected.
    fn read(&self, index: usize) -> bool {
        let core = &self.list[index];
        let handle = core.handle.borrow();
        // Looked at first: what it reported before its end is then in the queue.
        let ended = handle.is_finished();
        handle.reports.clear_wake();
        let _together = logging::together();
        while let Some(report) = handle.reports.next() {
            match report {
                Report::Started { .. } => self.turn(core, State::Running),
                Report::Undecodable { why } => {
                    let core = handle.shard;
                    tracing::warn!(core, why, "a request cannot be decoded");
                }
                Report::LaneEnded { worker, why } => {
                    // Nobody listens when the worker has gone by himself.
                    let _ = self
                        .lane_faults
                        .send((worker, why.unwrap_or("it has ended")));
                }
                Report::Stranger => {
                    tracing::warn!(core = handle.shard, "{}", tls::STRANGER);
                }
                Report::NoBusyPoll { errno } => steering::unpolled(handle.shard, &os(errno)),
                Report::Unsteered { errno } => steering::unsteered(handle.shard, &os(errno)),
                Report::Span(span) => trace::tell(*span),
                Report::Routed(span, directory) => trace::tell_routed(&span, &directory),
                Report::Stopped { failure } => {
                    self.turn(core, State::Ended { failure });
                    return false;
                }
            }
        }
        if ended {
            let failure = Some("its thread ended without a word".to_owned());
            self.turn(core, State::Ended { failure });
        }
        !ended
    }

    fn turn(&self, core: &Core, state: State) {
        if let State::Ended { failure } = &state {
            let planned = core.planned.borrow();
            let (core, cpu) = (planned.config.shard, planned.config.cpu);
            match failure {
                Some(why) => tracing::error!(core, cpu, why, "a core has ended by itself"),
                None if self.stopping.get() => tracing::debug!(core, cpu, "core stopped"),
                None => tracing::error!(core, cpu, "a core has ended without being told to"),
            }
        }
        core.state.replace(state);
        self.changes.send_modify(|count| *count += 1);
    }

    /// What does TLS for them, unless it is off.
    pub fn tls(&self) -> Option<&Rc<Tls>> {
        self.tls.as_ref()
    }

    /// Adds what is counted of TLS and QUIC to the text of a scrape.
    pub fn write_transports(&self, out: &mut String) {
        if let Some(tls) = &self.tls {
            tls.stats().write(out);
        }
        self.quic.stats().write(out);
    }

    /// Whether every shard runs.
    pub fn all_run(&self) -> bool {
        let runs = |core: &Core| *core.state.borrow() == State::Running;
        self.list.iter().all(runs)
    }

    /// Waits until a shard has ended that was not told to.
    pub async fn failed(&self) {
        let mut changes = self.changes.subscribe();
        while self.stopping.get() || !self.list.iter().any(Core::has_ended) {
            // The sender is ours.
            let _ = changes.changed().await;
        }
    }

    /// Hands a command to every shard that runs; waits a little where a queue is full.
    pub async fn tell(&self, command: impl Fn() -> Command) {
        self.tell_each(|_| command()).await;
    }

    /// The same with a command for each, by its index.
    pub async fn tell_each(&self, command: impl Fn(usize) -> Command) {
        for index in 0..self.list.len() {
            self.tell_one(index, command(index)).await;
        }
    }

    /// The same to one, by its index; answers whether it has it.
    pub async fn tell_one(&self, index: usize, command: Command) -> bool {
        let deadline = Instant::now() + COMMAND_MAX;
        let mut next = command;
        while let Some(core) = self.list.get(index).filter(|core| !core.has_ended()) {
            let outcome = core.handle.borrow().command(next);
            let Err(back) = outcome else { return true };
            next = back;
            if Instant::now() >= deadline {
                let core = core.planned.borrow().config.shard;
                tracing::error!(core, "a core does not take commands");
                return false;
            }
            sleep(Duration::from_millis(1)).await;
        }
        false
    }

    /// Whether a core takes nothing any more.
    pub fn has_ended(&self, index: usize) -> bool {
        self.list.get(index).is_none_or(Core::has_ended)
    }

    /// Places in the directory whose routes some shard still has requests or responses of; `None`
    /// if one does not say.
    pub async fn census(&self) -> Option<BTreeSet<u32>> {
        let mut answers = Vec::with_capacity(self.list.len());
        for index in 0..self.list.len() {
            if self.has_ended(index) {
                continue;
            }
            let (send, answer) = oneshot::channel();
            // Nobody waits any more when it is given up.
            let told = Box::new(move |places| drop(send.send(places)));
            let census = Command::Census(Census { answer: told });
            self.tell_one(index, census).await;
            answers.push(answer);
        }
        let mut all = BTreeSet::new();
        for answer in answers {
            all.extend(timeout(COMMAND_MAX, answer).await.ok()?.ok()?);
        }
        Some(all)
    }

    /// The numbers of one shard, by its index; `None` once it has ended.
    pub fn stats(&self, index: usize) -> Option<Arc<Stats>> {
        let core = self.list.get(index)?;
        (!core.has_ended()).then(|| Arc::clone(&core.handle.borrow().stats))
    }

    /// The ways to hand commands to each shard from any thread; they hold as long as no shard is
    /// started again, which happens only before [`Cores::started`] returns.
    pub fn commands(&self) -> Vec<mesh::Sender<Command>> {
        let of = |core: &Core| core.handle.borrow().commands();
        self.list.iter().map(of).collect()
    }

    /// How many turns a shard has made, by its index; `None` once it has ended.
    pub fn turns(&self, index: usize) -> Option<u64> {
        let core = self.list.get(index)?;
        (!core.has_ended()).then(|| core.handle.borrow().stats.shard.ticks.get())
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.list.len()
    }

    /// Tells of workers that have lost a lane, from now on.
    pub fn lane_faults(&self) -> broadcast::Receiver<(u64, &'static str)> {
        self.lane_faults.subscribe()
    }

    /// What metrics show of each.
    pub fn view(&self) -> Vec<CoreView> {
        let view = |core: &Core| {
            let planned = core.planned.borrow();
            CoreView {
                shard: planned.config.shard,
                cpu: planned.config.cpu,
                ring: ring_word(planned.config.ring),
                cause: planned.cause,
                stats: Arc::clone(&core.handle.borrow().stats),
            }
        };
        self.list.iter().map(view).collect()
    }

    /// What each was told at its start.
    pub fn configs(&self) -> Vec<ShardConfig> {
        let each = self.list.iter();
        each.map(|core| core.planned.borrow().config.clone())
            .collect()
    }

    /// Sums one number over the shards that run.
    pub fn sum(&self, number: impl Fn(&Stats) -> u64) -> u64 {
        let runs = |core: &&Core| *core.state.borrow() == State::Running;
        let each = self.list.iter().filter(runs);
        each.map(|core| number(&core.handle.borrow().stats)).sum()
    }

    /// Waits until `number` is at least `goal` on every shard that runs, `patience` at most;
    /// answers whether it is.
    pub async fn reached(
        &self,
        goal: u64,
        patience: Duration,
        number: impl Fn(&Stats) -> u64,
    ) -> bool {
        let deadline = Instant::now() + patience;
        let behind = |core: &Core| !core.has_ended() && number(&core.handle.borrow().stats) < goal;
        while self.list.iter().any(behind) {
            if Instant::now() >= deadline {
                return false;
            }
            sleep(Duration::from_millis(1)).await;
        }
        true
    }

    /// Waits until every shard has made two turns: what it was told before is in force then.
    /// An idle shard makes its second turn late; nobody waits longer than `patience`.
    pub async fn settled(&self, patience: Duration) {
        let turns = |core: &Core| core.handle.borrow().stats.shard.ticks.get();
        let before: Vec<u64> = self.list.iter().map(turns).collect();
        let deadline = Instant::now() + patience;
        let mut pairs = self.list.iter().zip(before).peekable();
        while let Some((core, before)) = pairs.peek() {
            if turns(core) >= before + 2 || Instant::now() >= deadline {
                pairs.next();
            } else {
                sleep(Duration::from_millis(2)).await;
            }
        }
    }

    /// Waits until every shard knows the instances that it was told of and is connected to them, a
    /// second at most.
    pub async fn reach_instances(&self) {
        self.settled(REACH_MAX / 10).await;
        let missing = |stats: &Stats| {
            let shard = &stats.shard;
            shard
                .instances
                .get()
                .saturating_sub(shard.instances_ready.get())
        };
        let deadline = Instant::now() + REACH_MAX;
        while self.sum(missing) > 0 && Instant::now() < deadline {
            sleep(REACH_EVERY).await;
        }
    }

    /// Stops all shards and waits for their threads, a few seconds at most.
    pub async fn stop(&self) {
        self.stopping.set(true);
        self.tell(|| Command::Stop).await;
        let mut changes = self.changes.subscribe();
        let all = async {
            while !self.list.iter().all(Core::has_ended) {
                let _ = changes.changed().await;
            }
        };
        if timeout(STOP_MAX, all).await.is_err() {
            tracing::error!("not every core has stopped after {STOP_MAX:?}");
        }
        for core in self.list.iter().filter(|core| core.has_ended()) {
            // It has said its last word, so this does not wait.
            core.handle.borrow_mut().join();
        }
        if let Some(tls) = &self.tls {
            tls.finish().await;
        }
        self.quic.finish().await;
    }
}

async fn read_reports(cores: Weak<Cores>, index: usize, wake: AsyncFd<OwnedFd>) {
    loop {
        let readable = timeout(LOOK_EVERY, wake.readable()).await;
        let Some(cores) = cores.upgrade() else { return };
        if !cores.read(index) {
            return;
        }
        if let Ok(Ok(mut guard)) = readable {
            guard.clear_ready();
        }
    }
}
