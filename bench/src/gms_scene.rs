//! One pool of one service with a queue of writers, and what is measured on it.
//!
//! ```text
//! turn:  the holder allocates, exports, commits -> the first of the queue is granted
//!        -> whoever held before queues up again, so that as many wait as before
//! kill:  a process holds the lock; SIGKILL -> the first of the queue is granted
//! ```

use std::collections::VecDeque;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use hdrhistogram::Histogram;
use rustix::fs::OFlags;
use rustix::process::{Pid, Signal, set_parent_process_death_signal};

use crate::cpu::CpuRange;
use crate::gms_client::{Client, state};
use crate::interrupt::{self, wait_for};
use crate::report::new_histogram;

/// What is measured.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Step {
    /// From the request for memory to its reply.
    Allocate,
    /// From the request for a descriptor to its reply.
    Export,
    /// From the commit to its reply.
    Commit,
    /// From the commit of the holder to the grant of the next.
    Grant,
    /// From the SIGKILL of the holder to the grant of the next.
    Handover,
    /// From the moment at which the kernel has closed the killed holder's first file to the grant.
    AfterClose,
}

impl Step {
    /// All of them, in the order of reports.
    pub(crate) const ALL: [Self; 6] = [
        Self::Grant,
        Self::Commit,
        Self::Allocate,
        Self::Export,
        Self::Handover,
        Self::AfterClose,
    ];

    /// Its name in reports.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Allocate => "allocate",
            Self::Export => "export",
            Self::Commit => "commit",
            Self::Grant => "grant",
            Self::Handover => "handover",
            Self::AfterClose => "handover_after_close",
        }
    }
}

/// Latencies in nanoseconds, by step.
pub(crate) struct Samples {
    by_step: [Histogram<u64>; Step::ALL.len()],
}

impl Samples {
    /// None yet.
    pub(crate) fn new() -> Self {
        Self {
            by_step: std::array::from_fn(|_| new_histogram()),
        }
    }

    /// Those of a step.
    pub(crate) fn of(&self, step: Step) -> &Histogram<u64> {
        let index = Step::ALL.iter().position(|other| *other == step);
        &self.by_step[index.unwrap_or_default()]
    }

    /// Adds others.
    pub(crate) fn add(&mut self, other: &Self) {
        for (mine, theirs) in self.by_step.iter_mut().zip(&other.by_step) {
            // Both have the same bounds.
            let _ = mine.add(theirs);
        }
    }

    fn record(&mut self, step: Step, took: Duration) {
        let index = Step::ALL.iter().position(|other| *other == step);
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.by_step[index.unwrap_or_default()].saturating_record(ns.max(1));
    }
}

/// A holder and those who wait behind it.
pub(crate) struct Queue {
    socket: PathBuf,
    holder: Option<Client>,
    waiting: VecDeque<Client>,
}

impl Queue {
    /// A pool with one holder and `waiting` writers behind it.
    pub(crate) fn start(socket: &Path, waiting: usize) -> Result<Self> {
        let mut holder = Client::queue_up(socket)?;
        holder.granted()?;
        let mut queue = Self {
            socket: socket.to_owned(),
            holder: Some(holder),
            waiting: VecDeque::new(),
        };
        for so_far in 0..waiting {
            queue.enqueue()?;
            queue.settle(so_far + 1)?;
        }
        Ok(queue)
    }

    fn enqueue(&mut self) -> Result<()> {
        self.waiting.push_back(Client::queue_up(&self.socket)?);
        Ok(())
    }

    /// Waits until the service has seen all who wait, so that it has them in our order.
    fn settle(&self, waiting: usize) -> Result<()> {
        let began = Instant::now();
        while state(&self.socket)?.waiting_writers != waiting as u64 {
            interrupt::check()?;
            if began.elapsed() > Duration::from_secs(60) {
                bail!("the queue of {waiting} does not form");
            }
        }
        Ok(())
    }

    fn next(&mut self) -> Result<(Client, Instant)> {
        let mut next = self.waiting.pop_front().context("nobody waits")?;
        let at = next.granted()?;
        Ok((next, at))
    }

    /// One life of a holder, from memory to publication.
    pub(crate) fn turn(&mut self, allocations: usize, samples: &mut Samples) -> Result<()> {
        interrupt::check()?;
        let mut holder = self.holder.take().context("nobody holds the lock")?;
        for _ in 0..allocations {
            let (id, took) = holder.allocate(1)?;
            samples.record(Step::Allocate, took);
            samples.record(Step::Export, holder.export(&id)?);
        }
        let (began, took) = holder.commit()?;
        samples.record(Step::Commit, took);
        let (next, at) = self.next()?;
        samples.record(Step::Grant, at - began);
        self.holder = Some(next);
        self.enqueue()
    }

    /// One holder that is killed, which runs on `cpus`.
    pub(crate) fn kill(&mut self, cpus: Option<CpuRange>, samples: &mut Samples) -> Result<()> {
        let waiting = self.waiting.len();
        self.settle(waiting)?;
        let mut victim = Victim::start(&self.socket, cpus)?;
        self.settle(waiting + 1)?;
        // Everybody before the victim comes and goes, and stands behind it afterwards.
        for _ in 0..waiting {
            interrupt::check()?;
            drop(self.holder.take());
            self.holder = Some(self.next()?.0);
            self.enqueue()?;
            self.settle(waiting + 1)?;
        }
        drop(self.holder.take());
        victim.holds()?;
        self.settle(waiting)?;
        let mut next = self.waiting.pop_front().context("nobody waits")?;
        calm_down();
        let (killed, closed) = victim.kill()?;
        let at = next.granted()?;
        samples.record(Step::Handover, at - killed);
        samples.record(Step::AfterClose, at.saturating_duration_since(closed));
        self.holder = Some(next);
        self.enqueue()?;
        self.settle(waiting)
    }
}

/// Waits until a service that stays awake after an event sleeps: a holder does not die in the same
/// moment in which somebody asks for the lock, and the service has its CPU.
fn calm_down() {
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(1) {
        std::hint::spin_loop();
    }
}

/// A process that holds the lock.
struct Victim {
    child: Child,
    out: ChildStdout,
}

impl Victim {
    /// On CPUs where it need not wait for the client that polls.
    fn start(socket: &Path, cpus: Option<CpuRange>) -> Result<Self> {
        use std::os::unix::process::CommandExt as _;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("gms-writer").arg(socket);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        // SAFETY: between fork and exec only system calls are made: no allocation, no lock.
        unsafe {
            command.pre_exec(move || {
                set_parent_process_death_signal(Some(Signal::KILL))?;
                cpus.map_or(Ok(()), CpuRange::bind_this_thread)
            });
        }
        let mut child = command.spawn().context("cannot start the writer")?;
        let out = child.stdout.take().context("no pipe")?;
        rustix::fs::fcntl_setfl(&out, OFlags::NONBLOCK)?;
        Ok(Self { child, out })
    }

    fn holds(&mut self) -> Result<()> {
        wait_for(
            "the writer to hold the lock",
            Duration::from_secs(60),
            || {
                let mut word = [0];
                match self.out.read(&mut word) {
                    Ok(0) => bail!("the writer has ended"),
                    Ok(_) => Ok(Some(())),
                    Err(_) => Ok(None),
                }
            },
        )
    }

    /// Kills it; answers when, and when its end of the pipe was closed.
    fn kill(&mut self) -> Result<(Instant, Instant)> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        let pid = pid.context("no process id")?;
        let killed = Instant::now();
        rustix::process::kill_process(pid, Signal::KILL)?;
        let mut rest = [0; 8];
        loop {
            match self.out.read(&mut rest) {
                Ok(0) => return Ok((killed, Instant::now())),
                Ok(_) => {}
                Err(_) if killed.elapsed() > Duration::from_secs(60) => {
                    bail!("the writer does not die")
                }
                Err(_) => {}
            }
        }
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        // Both fail only if it is gone.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
