//! `corelane doctor`: what is wrong with this host for what it is to do, with the values that show
//! it, the cause, and what to do.
//!
//! ```text
//! /proc, /sys, the plan of tune, peers --> sight --> checks side by side --> diagnosis
//!                                          two looks at the counters, a second apart
//! ```
//! A check answers with findings, with what is well, or that it cannot see; it never guesses. It
//! has a thread of its own, and one that does not answer in time has not been seen.

use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Instant;

use serde::Serialize;

mod cpu;
mod host;
mod memory;
mod network;
mod peers;
mod print;
mod process;
mod sight;
mod sockets;
#[cfg(test)]
mod tests;

pub use print::text;
pub use sight::{Sight, Wish};

/// How much a finding matters.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Weight {
    /// Something fails or is refused, or will be.
    Fault,
    /// Latency or CPU time is lost.
    Cost,
    /// Worth knowing; nothing shows that it hurts now.
    Hint,
}

impl Weight {
    /// Its word in text and JSON.
    pub fn word(self) -> &'static str {
        match self {
            Weight::Fault => "fault",
            Weight::Cost => "cost",
            Weight::Hint => "hint",
        }
    }
}

/// A value that was measured, and where.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Evidence {
    /// The value, with what it is of.
    pub value: String,
    /// The file, command or peer that it was read from.
    pub at: String,
}

/// One problem.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Finding {
    /// The check that found it ([`CHECKS`]).
    pub check: &'static str,
    /// How much it matters.
    pub weight: Weight,
    /// Whether the configuration demands what the host refuses (exit code 78).
    pub required: bool,
    /// What is the case: a sentence without its full stop.
    pub what: String,
    /// What shows it, at least one.
    pub evidence: Vec<Evidence>,
    /// Why it is so, or why it hurts: a sentence.
    pub cause: String,
    /// What to do: a sentence with a command or a setting in it.
    pub remedy: String,
}

impl Finding {
    fn new(weight: Weight, what: impl Into<String>) -> Self {
        Self {
            check: "",
            weight,
            required: false,
            what: what.into(),
            evidence: Vec::new(),
            cause: String::new(),
            remedy: String::new(),
        }
    }

    fn seen(mut self, value: impl Into<String>, at: impl Into<String>) -> Self {
        let (value, at) = (value.into(), at.into());
        self.evidence.push(Evidence { value, at });
        self
    }

    fn because(mut self, cause: impl Into<String>) -> Self {
        self.cause = cause.into();
        self
    }

    fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = remedy.into();
        self
    }
}

/// What a check says.
#[derive(Clone, Debug, Eq, PartialEq)]
enum Outcome {
    /// Nothing is wrong; what was seen, in a few words.
    Well(String),
    /// These are.
    Found(Vec<Finding>),
    /// It could not look; why.
    Unseen(String),
}

impl Outcome {
    fn one(finding: Finding) -> Self {
        Self::Found(vec![finding])
    }

    /// Findings, or that all is well if there are none.
    fn of(findings: Vec<Finding>, well: impl FnOnce() -> String) -> Self {
        match findings.is_empty() {
            true => Self::Well(well()),
            false => Self::Found(findings),
        }
    }
}

/// One thing that is looked at.
pub struct Check {
    /// Its name in text and JSON; stable.
    pub name: &'static str,
    look: fn(&Sight) -> Outcome,
}

const fn check(name: &'static str, look: fn(&Sight) -> Outcome) -> Check {
    Check { name, look }
}

/// Everything that is looked at.
pub const CHECKS: [Check; 24] = [
    check("io_uring", process::io_uring),
    check("memlock", process::memlock),
    check("nofile", process::nofile),
    check("cores", process::cores),
    check("quota", cpu::quota),
    check("smt", cpu::siblings),
    check("pressure", cpu::pressure),
    check("steal", cpu::steal),
    check("numa", host::numa),
    check("frequency", host::frequency),
    check("sleep", host::sleep),
    check("clock_source", host::clock_source),
    check("interrupts", network::interrupts),
    check("steering", network::steering),
    check("accept_queues", network::accept_queues),
    check("receive_drops", network::receive_drops),
    check("conntrack", network::conntrack),
    check("ports", sockets::ports),
    check("sidecar", sockets::sidecar),
    check("etcd", peers::etcd),
    check("nagle", peers::nagle),
    check("huge_pages", memory::huge_pages),
    check("swap", memory::swap),
    check("settings", host::settings),
];

/// A check that found nothing.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Well {
    /// The check.
    pub check: &'static str,
    /// What it saw.
    pub what: String,
}

/// A check that could not look.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Unseen {
    /// The check.
    pub check: &'static str,
    /// What was in its way.
    pub why: String,
}

/// What all checks said.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub struct Diagnosis {
    /// Problems, worst first.
    pub findings: Vec<Finding>,
    /// What is well, in the order of [`CHECKS`].
    pub well: Vec<Well>,
    /// What was not seen, in the order of [`CHECKS`].
    pub unseen: Vec<Unseen>,
    /// How long it took.
    pub took_ms: u64,
}

impl Diagnosis {
    /// Runs all checks side by side; those that have not answered within the sight's patience are
    /// unseen.
    pub fn make(sight: &Arc<Sight>) -> Self {
        let patience = sight.wish.patience;
        let began = Instant::now();
        let outcomes = outcomes(sight, began + patience);
        let mut diagnosis = Self::default();
        for (check, outcome) in CHECKS.iter().zip(outcomes) {
            let check = check.name;
            let late = || {
                let why = format!("no answer within {:.1} s", patience.as_secs_f64());
                Outcome::Unseen(why)
            };
            match outcome.unwrap_or_else(late) {
                Outcome::Well(what) => diagnosis.well.push(Well { check, what }),
                Outcome::Unseen(why) => diagnosis.unseen.push(Unseen { check, why }),
                Outcome::Found(found) => diagnosis.findings.extend(
                    found
                        .into_iter()
                        .map(|finding| Finding { check, ..finding }),
                ),
            }
        }
        // Those of the same weight stay in the order of the checks.
        diagnosis.findings.sort_by_key(|finding| finding.weight);
        diagnosis.took_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        diagnosis
    }

    /// Whether there is a fault or a cost; hints alone are none.
    pub fn is_well(&self) -> bool {
        let hint = |finding: &Finding| finding.weight == Weight::Hint;
        self.findings.iter().all(hint)
    }

    /// Whether the host refuses what the configuration demands.
    pub fn refuses(&self) -> bool {
        self.findings.iter().any(|finding| finding.required)
    }
}

/// What each check says, None for those that are not done in time.
fn outcomes(sight: &Arc<Sight>, deadline: Instant) -> Vec<Option<Outcome>> {
    let mut outcomes = vec![None; CHECKS.len()];
    let (sender, receiver) = mpsc::channel();
    for (index, check) in CHECKS.iter().enumerate() {
        let (sight, sender) = (Arc::clone(sight), sender.clone());
        let named = thread::Builder::new().name(check.name.to_owned());
        // A thread that hangs is left to the end of the process.
        let spawned = named.spawn(move || {
            // Nobody listens any more if it took too long.
            let _ = sender.send((index, (check.look)(&sight)));
        });
        if let Err(error) = spawned {
            outcomes[index] = Some(Outcome::Unseen(format!("no thread for it: {error}")));
        }
    }
    drop(sender);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match receiver.recv_timeout(left) {
            Ok((index, outcome)) => outcomes[index] = Some(outcome),
            Err(_) => return outcomes,
        }
    }
}
