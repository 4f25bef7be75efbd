//! `corelane tune`: what of a host's settings costs latency, what it should be and why, and the way
//! there and back.
//!
//! ```text
//! /proc, /sys, ethtool --> items: now, wanted, why --> plan (printed, script, drop-in)
//!                                                  '-> apply --> record --> undo
//! ```
//! A plan changes nothing. What is applied is recorded before it is changed, so that an
//! interrupted run can be undone as well.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use corelane_engine::nic::QueueName;
use serde::{Deserialize, Serialize};

mod apply;
mod nic;
mod print;
mod view;
mod wanted;

pub use apply::{Done, Outcome, RECORD, Record, apply, undo};
pub(crate) use nic::looked_at;
pub use print::{command, drop_in, script, text};
pub use view::View;

/// Where a value of the host is kept.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// A file of the kernel's, which is written as a whole.
    File(PathBuf),
    /// An option of a network device: `ethtool FLAG DEVICE NAME VALUE`.
    Ethtool {
        /// The device.
        device: String,
        /// `-G`, `-L` or `-C`.
        flag: String,
        /// The option's name on the command line.
        option: String,
    },
    /// A limit of the process, which its service manager sets: a name of systemd's.
    Limit(String),
}

/// How a value stands.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// It is as it should be, or better.
    Fine,
    /// It should be changed.
    Change,
}

/// What a setting is about.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Topic {
    /// A setting of the kernel, under its name.
    Sysctl,
    /// Transparent huge pages.
    HugePages,
    /// The clock of a CPU.
    Frequency,
    /// A state that a CPU sleeps in.
    Sleep,
    /// Queues, receive ring and coalescing of a device.
    Hardware,
    /// The CPU of a queue's interrupt.
    Interrupt,
    /// Packets handed to other CPUs (RPS).
    Receive,
    /// CPUs of a transmit queue (XPS).
    Transmit,
    /// A limit of the process.
    Limit,
}

/// One setting of the host.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Item {
    /// What it is about.
    pub topic: Topic,
    /// What people call it: `net.core.somaxconn`, `irq 38 (eth0 queue 0)`.
    pub name: String,
    /// What it is.
    pub now: String,
    /// What it should be at least.
    pub wanted: String,
    /// What it costs as it is.
    pub why: &'static str,
    /// Whether there is something to do.
    pub standing: Standing,
    /// Where it is changed.
    pub place: Place,
}

/// Everything that was looked at.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub struct Plan {
    /// Settings, in the order in which they are changed.
    pub items: Vec<Item>,
    /// What could not be looked at, and what works against the plan.
    pub notes: Vec<String>,
}

/// What the host is to be good for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Goal {
    /// CPUs of the data cores, ascending, at least one.
    pub cpus: Vec<usize>,
    /// Network devices; None for all that have hardware and are up.
    pub devices: Option<Vec<String>>,
    /// Connections of all cores together.
    pub connections: u64,
    /// Queues that cores have been given, each with its CPU; others are dealt out in turns.
    pub queues: Vec<(QueueName, usize)>,
    /// Cores poll their receive queues.
    pub polls: bool,
}

impl Goal {
    /// The CPU that a queue of a device should be on.
    pub(super) fn cpu_of(&self, device: &str, queue: usize) -> usize {
        let named = |(name, _): &&(QueueName, usize)| name.device == device && name.queue == queue;
        match self.queues.iter().find(named) {
            Some((_, cpu)) => *cpu,
            None => self.cpus[queue % self.cpus.len()],
        }
    }
}

impl Plan {
    /// Looks at the host; changes nothing.
    pub fn make(view: &View, goal: &Goal) -> Self {
        let mut plan = Self::default();
        wanted::kernel(view, &mut plan);
        wanted::cpus(view, goal, &mut plan);
        nic::devices(view, goal, &mut plan);
        wanted::limits(view, goal, &mut plan);
        plan
    }

    /// What there is to do.
    pub fn changes(&self) -> impl Iterator<Item = &Item> {
        self.items
            .iter()
            .filter(|item| item.standing == Standing::Change)
    }

    /// Adds a file's setting; a file that is not there is no setting of this host.
    fn file(
        &mut self,
        view: &View,
        path: &str,
        (topic, name): (Topic, &str),
        want: Want,
        why: &'static str,
    ) {
        let Some(now) = view.read(path) else { return };
        let now = chosen(&now);
        let (standing, wanted) = want.judge(&now);
        self.items.push(Item {
            topic,
            name: name.to_owned(),
            now,
            wanted,
            why,
            standing,
            place: Place::File(Path::new("/").join(path)),
        });
    }
}

/// Of a list with one word in brackets that word, else all with single spaces.
pub(crate) fn chosen(text: &str) -> String {
    let word = text
        .split_once('[')
        .and_then(|(_, rest)| rest.split_once(']'));
    match word {
        Some((word, _)) => word.to_owned(),
        None => text.split_whitespace().collect::<Vec<_>>().join(" "),
    }
}

/// What a value should be.
#[derive(Clone, Debug)]
enum Want {
    /// Exactly so.
    Is(Cow<'static, str>),
    /// One of these; the first is written.
    OneOf(&'static [&'static str]),
    /// A number that is no smaller.
    AtLeast(u64),
    /// Smallest, default and largest of a buffer in bytes, of which the last is no smaller.
    LargestAtLeast(u64),
    /// A first and a last port, no fewer than these.
    Range(u64, u64),
}

impl Want {
    /// How `now` stands, and what to write in its place.
    fn judge(&self, now: &str) -> (Standing, String) {
        let numbers: Vec<u64> = now
            .split(' ')
            .filter_map(|word| word.parse().ok())
            .collect();
        let (fine, wanted) = match self {
            Self::Is(text) => (now == text, text.to_string()),
            Self::OneOf(words) => (words.contains(&now), words[0].to_owned()),
            Self::AtLeast(least) => (
                numbers.first().is_some_and(|now| now >= least),
                least.to_string(),
            ),
            Self::LargestAtLeast(least) => match numbers[..] {
                [min, default, max] => (max >= *least, format!("{min} {default} {least}")),
                _ => (false, format!("4096 131072 {least}")),
            },
            Self::Range(first, last) => match numbers[..] {
                [from, to] => (from <= *first && to >= *last, format!("{first} {last}")),
                _ => (false, format!("{first} {last}")),
            },
        };
        if fine {
            (Standing::Fine, now.to_owned())
        } else {
            (Standing::Change, wanted)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_judged_by_what_they_are_for() {
        let judged = |want: Want, now| want.judge(now);
        let fine = |now: &str| (Standing::Fine, now.to_owned());
        let change = |wanted: &str| (Standing::Change, wanted.to_owned());
        assert_eq!(judged(Want::AtLeast(10), "10"), fine("10"));
        assert_eq!(judged(Want::AtLeast(10), "9"), change("10"));
        assert_eq!(judged(Want::AtLeast(10), "many"), change("10"));
        assert_eq!(judged(Want::LargestAtLeast(9), "1 2 9"), fine("1 2 9"));
        assert_eq!(judged(Want::LargestAtLeast(9), "1 2 3"), change("1 2 9"));
        assert_eq!(judged(Want::Range(5, 9), "4 9"), fine("4 9"));
        assert_eq!(judged(Want::Range(5, 9), "6 9"), change("5 9"));
        assert_eq!(judged(Want::OneOf(&["a", "b"]), "b"), fine("b"));
        assert_eq!(judged(Want::OneOf(&["a", "b"]), "c"), change("a"));
        assert_eq!(judged(Want::Is("0".into()), "1"), change("0"));
    }

    #[test]
    fn the_word_in_brackets_is_what_holds() {
        assert_eq!(chosen("always [madvise] never\n"), "madvise");
        assert_eq!(chosen("4096\t131072\t6291456\n"), "4096 131072 6291456");
    }
}
