//! A changed configuration is taken over while the router runs.
//!
//! ```text
//! read, checked -> compared (what needs a restart is named: nothing is done then)
//!   -> new routes get places, their instances are dialled, nothing is sent there yet
//!   -> one core has it, and is watched     worse, or not taken: taken back
//!   -> all cores have it -> discovery      what is removed leaves it first, then is served for a
//!                                          while, then ends with its last request
//! ```
//!
//! No connection is closed and no request is moved: what is under way keeps the route that it began
//! with ([`crate::slots`]).

mod canary;
mod changes;
mod report;
mod watched;

use std::cell::{Cell, RefCell};
use std::path::PathBuf;
use std::rc::{Rc, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use corelane_engine::config::LiveSettings;
use corelane_engine::shard::Command;
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use hyper::StatusCode;
use tokio::sync::Notify;
use tokio::task::{AbortHandle, spawn_local};
use tokio::time::{Instant, sleep, timeout};

use crate::config::{self, Config, Core, Inputs, Problem, load};
use crate::cores::Cores;
use crate::env::Env;
use crate::flight;
use crate::logging;
use crate::preflight;
use crate::publish::{Board, Listed};
use crate::roster::Roster;
use crate::slots::Proposal;
use crate::status_server::Answer;

pub use canary::{Tally, Watched};
pub use changes::{Began, compare};
pub use report::{Counts, Outcome, Report, SCHEMA};

/// Where the status server takes it.
pub const PATH: &str = "/reload";
/// A POST waits so long for the end; who asks looks again after that.
const ANSWER_MAX: Duration = Duration::from_secs(15);
/// How often it is looked whether something of a retired route is under way.
const SWEEP_EVERY: Duration = Duration::from_millis(500);
/// A core that stands still is given back what was in force so often, at most.
const TAKE_BACK_TRIES: u32 = 20;

/// Who has asked, if it was a signal.
const HANGUP: &str = "SIGHUP";

/// What of the configuration control itself goes by.
pub struct Live {
    /// `[drain]`.
    pub drain: Cell<config::Drain>,
    /// Where flight records go.
    pub flight_dir: RefCell<Option<PathBuf>>,
}

impl Live {
    /// As configured.
    pub fn new(config: &Config) -> Live {
        let live = Live {
            drain: Cell::new(config.drain),
            flight_dir: RefCell::default(),
        };
        live.become_like(config);
        live
    }

    fn become_like(&self, config: &Config) {
        self.drain.set(config.drain);
        let folder = flight::folder(config.control.flight_dir.as_deref(), &Env::current());
        self.flight_dir.replace(folder);
    }
}

/// Who is told of changes.
pub struct Parts {
    /// The shards.
    pub cores: Rc<Cores>,
    /// Their directory.
    pub board: Rc<Board>,
    /// What is followed and offered.
    pub roster: Rc<Roster>,
    /// What control goes by.
    pub live: Rc<Live>,
    /// Is called when one begins (true) and when it has ended.
    pub told: Box<dyn Fn(bool)>,
}

/// Reads the configuration again and takes over what has changed, one at a time.
pub struct Reloader {
    inputs: Inputs,
    began: Began,
    parts: Parts,
    config: RefCell<Config>,
    report: RefCell<Report>,
    counts: RefCell<Counts>,
    ended: Notify,
    running: RefCell<Option<AbortHandle>>,
    sweeping: Cell<bool>,
    /// A signal has come while one was under way.
    again: Cell<bool>,
    stopped: Cell<bool>,
}

/// How a reload ends that does not come through.
enum Halt {
    Refused(Vec<String>),
    RolledBack(String),
}

impl Reloader {
    /// Nothing was reloaded yet; `inputs` are what `config` was read from.
    pub fn new(inputs: Inputs, config: &Config, parts: Parts) -> Reloader {
        Reloader {
            inputs,
            began: Began::with(config),
            parts,
            config: RefCell::new(config.clone()),
            report: RefCell::default(),
            counts: RefCell::default(),
            ended: Notify::new(),
            running: RefCell::default(),
            sweeping: Cell::new(false),
            again: Cell::new(false),
            stopped: Cell::new(false),
        }
    }

    /// Number of the configuration in force.
    pub fn generation(&self) -> u64 {
        self.report.borrow().generation
    }

    /// The last reload.
    pub fn report(&self) -> Report {
        self.report.borrow().clone()
    }

    /// Writes metric families, without the mark of the end.
    pub fn write_metrics(&self, out: &mut String) {
        report::write(&self.report.borrow(), &self.counts.borrow(), out);
    }

    /// Begins one; answers false when one is under way. Needs a `LocalSet`.
    pub fn begin(self: &Rc<Self>, by: &'static str) -> bool {
        if self.stopped.get() || self.report.borrow().busy {
            tracing::warn!(by, "reload: not begun, as one is under way or all ends");
            return false;
        }
        self.report.borrow_mut().busy = true;
        (self.parts.told)(true);
        let reloader = Rc::clone(self);
        let running = spawn_local(async move { reloader.run(by).await });
        self.running.replace(Some(running.abort_handle()));
        true
    }

    /// Begins one when a signal has come, at once or after that which is under way: the file may
    /// have been read before its last edit.
    pub fn hang_up(self: &Rc<Self>) {
        if self.report.borrow().busy {
            self.again.set(true);
        } else {
            self.begin(HANGUP);
        }
    }

    /// Gives up what is under way: the process ends.
    pub fn stop(&self) {
        self.stopped.set(true);
        if let Some(running) = self.running.take() {
            running.abort();
        }
        let mut report = self.report.borrow_mut();
        if std::mem::take(&mut report.busy) {
            report.result = Outcome::GivenUp;
            self.counts.borrow_mut().add(Outcome::GivenUp);
            self.ended.notify_waiters();
        }
    }

    async fn run(self: Rc<Self>, by: &'static str) {
        let began = Instant::now();
        let mut report = Report {
            by: by.to_owned(),
            generation: self.generation(),
            ..Report::default()
        };
        report.result = match self.reload(&mut report).await {
            Ok(outcome) => outcome,
            Err(Halt::Refused(reasons)) => {
                report.reasons = reasons;
                Outcome::Refused
            }
            Err(Halt::RolledBack(why)) => {
                report.reasons = vec![why];
                Outcome::RolledBack
            }
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        report.at_s = now.map_or(0, |now| now.as_secs());
        report.took_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        say(&report);
        self.counts.borrow_mut().add(report.result);
        self.report.replace(report);
        (self.parts.told)(false);
        self.ended.notify_waiters();
        if self.again.take() {
            self.begin(HANGUP);
        }
    }

    async fn reload(self: &Rc<Self>, report: &mut Report) -> Result<Outcome, Halt> {
        let checked = load(&self.inputs_now());
        let lines = |problem: &Problem| problem.line();
        report.warnings = checked.warnings().map(lines).collect();
        let refused = |problems: &mut dyn Iterator<Item = &Problem>| {
            Halt::Refused(problems.map(|problem| problem.line()).collect())
        };
        let Some(new) = checked.config.clone() else {
            return Err(refused(&mut checked.errors()));
        };
        let old = self.config.borrow().clone();
        let changed = compare(&old, &new, &self.began);
        report.changed = changed.map_err(|problems| refused(&mut problems.iter()))?;
        if report.changed.is_empty() {
            self.config.replace(new);
            return Ok(Outcome::Unchanged);
        }
        let proposal = self.prepare(&new).await?;
        let first = self.first_core(&old, &new);
        report.core = first.or((!proposal.is_empty()).then_some(0));
        if let Some(core) = report.core {
            let seen = match self.try_on(core, &proposal, &new).await {
                Ok(()) => watched::watch(&self.parts.cores, core, &new.reload).await,
                Err(why) => Err(why),
            };
            match seen {
                Ok(watched) => report.watched_requests = watched.core.requests,
                Err(why) => {
                    self.take_back(core, &proposal, &old).await;
                    return Err(Halt::RolledBack(why));
                }
            }
        }
        self.put_in_force(&proposal, &new).await;
        report.generation += 1;
        Ok(Outcome::Applied)
    }

    /// What the configuration is read from, and where the cores are that have their CPU from a
    /// queue: they stay there.
    fn inputs_now(&self) -> Inputs {
        let mut inputs = self.inputs.clone();
        let config = self.config.borrow();
        let pinned = |core: &Core| Some((core.number, (core.nic_queue.clone()?, core.cpu)));
        inputs.host.pinned = config.cores.iter().filter_map(pinned).collect();
        inputs
    }

    /// Finds places for new routes and reaches their instances; nothing is sent there yet.
    async fn prepare(&self, new: &Config) -> Result<Proposal, Halt> {
        let Parts {
            board,
            roster,
            cores,
            ..
        } = &self.parts;
        let proposal = board.propose(&new.routes, &new.instances);
        let proposal = proposal.map_err(|error| Halt::Refused(vec![error.to_string()]))?;
        if !proposal.is_empty() {
            roster.follow().await;
            board.publish().await;
            cores.reach_instances().await;
        }
        Ok(proposal)
    }

    /// The first core whose own settings change.
    fn first_core(&self, old: &Config, new: &Config) -> Option<usize> {
        let views = self.parts.cores.view();
        let differs =
            |view: &&crate::cores::CoreView| settings(old, view.cpu) != settings(new, view.cpu);
        views.iter().find(differs).map(|view| view.shard)
    }

    async fn try_on(&self, core: usize, proposal: &Proposal, new: &Config) -> Result<(), String> {
        self.parts.board.try_on(proposal, core);
        self.hand_over(core, new).await
    }

    /// Gives a core the directory and its settings, and waits until it has taken both.
    async fn hand_over(&self, core: usize, config: &Config) -> Result<(), String> {
        let cores = &self.parts.cores;
        let Some(stats) = cores.stats(core) else {
            return Err(format!("core {core} has ended"));
        };
        let patience = config.reload.taken_timeout;
        self.parts.board.publish().await;
        let cpu = cores.view().get(core).map(|view| view.cpu);
        let goal = stats.shard.settings.get() + 1;
        let settings = cpu.and_then(|cpu| settings(config, cpu));
        let Some(settings) = settings else {
            return Ok(());
        };
        // Commands are taken in their order, so the directory is taken before this is.
        if !cores.tell_one(core, Command::Settings(settings)).await {
            return Err(format!("core {core} takes no commands"));
        }
        let taken = async {
            while stats.shard.settings.get() < goal {
                sleep(Duration::from_millis(1)).await;
            }
        };
        let taken = timeout(patience, taken).await;
        taken.map_err(|_| format!("core {core} has not taken it over after {patience:?}"))
    }

    async fn take_back(self: &Rc<Self>, core: usize, proposal: &Proposal, old: &Config) {
        self.parts.board.take_back(proposal);
        for _ in 0..TAKE_BACK_TRIES {
            let Err(why) = self.hand_over(core, old).await else {
                break;
            };
            tracing::error!(core, why, "reload: what was in force is not taken back yet");
            if self.parts.cores.has_ended(core) {
                break;
            }
        }
        self.sweep();
    }

    async fn put_in_force(self: &Rc<Self>, proposal: &Proposal, new: &Config) {
        let Parts {
            board,
            roster,
            cores,
            live,
            ..
        } = &self.parts;
        let removed = board.put_in_force(proposal);
        for core in 0..cores.count() {
            if let Err(why) = self.hand_over(core, new).await {
                // It has the commands and takes them when it goes on; or it has ended.
                tracing::error!(core, why, "reload: a core is late");
            }
        }
        let cpus: Vec<usize> = cores.view().iter().map(|core| core.cpu).collect();
        cores.steer(preflight::placing(new, &cpus)).await;
        live.become_like(new);
        logging::change(new.control.log.as_deref());
        self.config.replace(new.clone());
        roster.offer().await;
        let grace = Duration::from_secs(new.drain.grace_s.into());
        for listed in removed {
            self.retire_later(listed, grace);
        }
        self.sweep();
    }

    /// Who has read of it in discovery a moment ago is still served for a while.
    fn retire_later(self: &Rc<Self>, removed: Rc<Listed>, grace: Duration) {
        let reloader = Rc::downgrade(self);
        spawn_local(async move {
            sleep(grace).await;
            if let Some(reloader) = Weak::upgrade(&reloader) {
                reloader.parts.board.retire(&removed).await;
                reloader.sweep();
            }
        });
    }

    /// Frees the places of retired routes as they become empty.
    fn sweep(self: &Rc<Self>) {
        if self.sweeping.replace(true) {
            return;
        }
        let reloader = Rc::clone(self);
        spawn_local(async move {
            while reloader.parts.board.sweep().await && !reloader.stopped.get() {
                sleep(SWEEP_EVERY).await;
            }
            reloader.sweeping.set(false);
        });
    }
}

/// What a core on this CPU is told.
fn settings(config: &Config, cpu: usize) -> Option<LiveSettings> {
    preflight::live(config, cpu)
}

fn say(report: &Report) {
    let Report { generation, by, .. } = report;
    let (result, changed) = (report.result, report.changed.join(" "));
    match result {
        Outcome::Applied | Outcome::Unchanged => {
            tracing::info!(generation, by, %result, changed, "reload");
        }
        _ => tracing::warn!(generation, by, %result, changed, "reload"),
    }
    for warning in &report.warnings {
        tracing::warn!("reload: {warning}");
    }
    for reason in &report.reasons {
        tracing::warn!("reload {result}: {reason}");
    }
}

/// Answers a GET, or begins a reload for a POST and waits for its end, if that comes soon.
pub fn answer(reloader: Option<Rc<Reloader>>, post: bool) -> LocalBoxFuture<'static, Answer> {
    async move {
        let Some(reloader) = reloader else {
            let why = b"starting or ending: there is nothing to reload\n".to_vec();
            return (
                StatusCode::SERVICE_UNAVAILABLE,
                "text/plain; charset=utf-8",
                why,
            );
        };
        let mut status = StatusCode::OK;
        if post {
            let ended = reloader.ended.notified();
            if !reloader.begin("http") {
                status = StatusCode::CONFLICT;
            } else if timeout(ANSWER_MAX, ended).await.is_err() {
                status = StatusCode::ACCEPTED;
            }
        }
        // A struct of strings and numbers always has a JSON form.
        let body = serde_json::to_vec(&reloader.report()).unwrap_or_default();
        (status, "application/json", body)
    }
    .boxed_local()
}
