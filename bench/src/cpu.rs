//! What processes cost: CPU time and context switches of a process tree, the load of the rest of
//! the machine, and on which CPUs a process may run; all read from `/proc`.

use std::fmt;
use std::fs;
use std::str::FromStr;
use std::sync::OnceLock;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// CPU time and context switches of some processes so far, or in a window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    /// Time on a CPU by the scheduler's clock, user and system together; 0 where the kernel keeps
    /// no such count.
    pub(crate) run_ns: u64,
    /// User time in clock ticks (10 ms).
    pub(crate) user_ticks: u64,
    /// System time in clock ticks.
    pub(crate) system_ticks: u64,
    /// Times that a thread gave up its CPU to wait.
    pub(crate) voluntary: u64,
    /// Times that a thread lost its CPU.
    pub(crate) involuntary: u64,
}

impl Usage {
    /// Of a process with all its threads and its descendants. What has ended counts as nothing.
    pub(crate) fn of_tree(pid: u32) -> Self {
        let mut sum = Self::default();
        for pid in process_tree(pid) {
            sum = sum.plus(Self::of_process(pid));
        }
        sum
    }

    fn of_process(pid: u32) -> Self {
        let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).ok();
        let (user_ticks, system_ticks) = read("stat")
            .as_deref()
            .and_then(parse_stat)
            .unwrap_or_default();
        let mut sum = Self {
            user_ticks,
            system_ticks,
            ..Self::default()
        };
        for thread in threads(pid) {
            sum = sum.plus(Self::of_thread(pid, thread));
        }
        sum
    }

    /// Of the calling thread (time and switches, not ticks).
    pub(crate) fn of_this_thread() -> Self {
        let thread = rustix::thread::gettid().as_raw_pid().unsigned_abs();
        Self::of_thread(std::process::id(), thread)
    }

    fn of_thread(pid: u32, thread: u32) -> Self {
        let read = |file| fs::read_to_string(format!("/proc/{pid}/task/{thread}/{file}")).ok();
        let run_ns = read("schedstat")
            .as_deref()
            .and_then(parse_schedstat)
            .unwrap_or(0);
        let (voluntary, involuntary) = read("status")
            .as_deref()
            .and_then(parse_switches)
            .unwrap_or_default();
        Self {
            run_ns,
            voluntary,
            involuntary,
            ..Self::default()
        }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            run_ns: self.run_ns + other.run_ns,
            user_ticks: self.user_ticks + other.user_ticks,
            system_ticks: self.system_ticks + other.system_ticks,
            voluntary: self.voluntary + other.voluntary,
            involuntary: self.involuntary + other.involuntary,
        }
    }

    /// What was used since `start`. (Never negative: a thread that ended takes its count along.)
    pub(crate) fn since(self, start: Self) -> Self {
        Self {
            run_ns: self.run_ns.saturating_sub(start.run_ns),
            user_ticks: self.user_ticks.saturating_sub(start.user_ticks),
            system_ticks: self.system_ticks.saturating_sub(start.system_ticks),
            voluntary: self.voluntary.saturating_sub(start.voluntary),
            involuntary: self.involuntary.saturating_sub(start.involuntary),
        }
    }

    /// CPU time in microseconds: the scheduler's clock, or ticks where there is none.
    pub(crate) fn cpu_us(self) -> f64 {
        match self.run_ns {
            0 => (self.user_ticks + self.system_ticks) as f64 * tick_us(),
            ns => ns as f64 / 1e3,
        }
    }
}

/// Length of a clock tick in microseconds.
pub(crate) fn tick_us() -> f64 {
    static TICK: OnceLock<f64> = OnceLock::new();
    *TICK.get_or_init(|| 1e6 / rustix::param::clock_ticks_per_second().max(1) as f64)
}

/// `pid` and its descendants.
pub(crate) fn process_tree(pid: u32) -> Vec<u32> {
    let mut tree = vec![pid];
    let mut next = 0;
    while next < tree.len() {
        let parent = tree[next];
        next += 1;
        for thread in threads(parent) {
            let children = fs::read_to_string(format!("/proc/{parent}/task/{thread}/children"));
            let children = children.unwrap_or_default();
            tree.extend(
                children
                    .split_ascii_whitespace()
                    .filter_map(|c| c.parse::<u32>().ok()),
            );
        }
    }
    tree
}

fn threads(pid: u32) -> Vec<u32> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect()
}

/// User and system ticks of `/proc/PID/stat`. The name of the program may hold spaces and
/// parentheses; the fields after it begin at the last one.
fn parse_stat(stat: &str) -> Option<(u64, u64)> {
    let mut fields = stat[stat.rfind(')')? + 1..]
        .split_ascii_whitespace()
        .skip(11);
    Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
}

/// Nanoseconds on a CPU of `/proc/PID/task/TID/schedstat`.
fn parse_schedstat(schedstat: &str) -> Option<u64> {
    schedstat.split_ascii_whitespace().next()?.parse().ok()
}

/// Voluntary and involuntary context switches of `/proc/PID/task/TID/status`.
fn parse_switches(status: &str) -> Option<(u64, u64)> {
    let field = |name| status_field(status, name)?.parse().ok();
    Some((
        field("voluntary_ctxt_switches")?,
        field("nonvoluntary_ctxt_switches")?,
    ))
}

fn status_field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status
        .lines()
        .find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim()))
}

/// On which CPUs the threads of a process may run, as `/proc` prints it: `0-1`, or `0 0-1` where
/// threads differ.
pub(crate) fn allowed_cpus(pid: u32) -> String {
    let mut lists: Vec<String> = process_tree(pid)
        .into_iter()
        .flat_map(|pid| threads(pid).into_iter().map(move |thread| (pid, thread)))
        .filter_map(|(pid, thread)| {
            let status = fs::read_to_string(format!("/proc/{pid}/task/{thread}/status")).ok()?;
            Some(status_field(&status, "Cpus_allowed_list")?.to_string())
        })
        .collect();
    lists.sort();
    lists.dedup();
    lists.join(" ")
}

/// CPU ticks of the whole machine so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Machine {
    /// Ticks in which a CPU worked.
    pub(crate) busy: u64,
    /// Ticks that the host took away from this guest.
    pub(crate) stolen: u64,
}

impl Machine {
    /// CPU time in microseconds that was used since `start`, and that the host took away.
    pub(crate) fn since_us(self, start: Self) -> (f64, f64) {
        let us = |now: u64, then: u64| now.saturating_sub(then) as f64 * tick_us();
        (us(self.busy, start.busy), us(self.stolen, start.stolen))
    }

    /// Read now.
    pub(crate) fn now() -> Self {
        fs::read_to_string("/proc/stat")
            .ok()
            .as_deref()
            .and_then(parse_machine)
            .unwrap_or_default()
    }
}

fn parse_machine(stat: &str) -> Option<Machine> {
    let fields: Vec<u64> = stat
        .lines()
        .next()?
        .strip_prefix("cpu ")?
        .split_ascii_whitespace()
        .map_while(|field| field.parse().ok())
        .collect();
    let field = |index: usize| fields.get(index).copied();
    // user, nice, system, (idle, iowait), irq, softirq, steal
    let busy = field(0)? + field(1)? + field(2)? + field(5)? + field(6)?;
    Some(Machine {
        busy,
        stolen: field(7)?,
    })
}

/// Some CPUs, written as a number or a range: `1`, `0-3`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CpuRange {
    first: usize,
    last: usize,
}

impl FromStr for CpuRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        match (first.parse(), last.parse()) {
            (Ok(first), Ok(last)) if first <= last && last < CpuSet::MAX_CPU => {
                Ok(Self { first, last })
            }
            _ => Err(format!("'{text}' is not a CPU or a range of CPUs (1, 0-3)")),
        }
    }
}

impl fmt::Display for CpuRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.first == self.last {
            true => write!(f, "{}", self.first),
            false => write!(f, "{}-{}", self.first, self.last),
        }
    }
}

impl CpuRange {
    /// Their numbers.
    pub(crate) fn cpus(self) -> std::ops::RangeInclusive<usize> {
        self.first..=self.last
    }

    /// The first and the last CPU that the calling thread may use, if there are two.
    pub(crate) fn ends_of_this_thread() -> std::io::Result<Option<(Self, Self)>> {
        let set = sched_getaffinity(None)?;
        let mut allowed = (0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu));
        let alone = |cpu| Self {
            first: cpu,
            last: cpu,
        };
        let first = allowed.next();
        Ok(first
            .zip(allowed.next_back())
            .map(|(first, last)| (alone(first), alone(last))))
    }

    /// Binds the calling thread, and what it starts from now on, to these CPUs. One system call
    /// and no allocation, so it may run between fork and exec.
    pub(crate) fn bind_this_thread(self) -> std::io::Result<()> {
        let mut set = CpuSet::new();
        for cpu in self.first..=self.last {
            set.set(cpu);
        }
        Ok(sched_setaffinity(None, &set)?)
    }
}

/// Who runs where: `client=0,middle=1,sink=0`, each part optional.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pins {
    /// The load generator's thread.
    pub(crate) client: Option<CpuRange>,
    /// Each process in the middle.
    pub(crate) middle: Option<CpuRange>,
    /// The worker at the end.
    pub(crate) sink: Option<CpuRange>,
}

impl FromStr for Pins {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut pins = Self::default();
        for part in text.split(',') {
            let (role, cpus) = part
                .split_once('=')
                .ok_or_else(|| format!("'{part}' is not ROLE=CPUS (client=0,middle=1,sink=0)"))?;
            let cpus = Some(cpus.parse()?);
            match role {
                "client" => pins.client = cpus,
                "middle" => pins.middle = cpus,
                "sink" => pins.sink = cpus,
                _ => return Err(format!("'{role}' is not client, middle or sink")),
            }
        }
        Ok(pins)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_is_read_after_a_name_with_parentheses() {
        let stat = "42 (a) b (c)) S 1 42 42 0 -1 4194560 9 0 0 0 123 45 6 7 20 0 1 0 99 1 2";
        assert_eq!(parse_stat(stat), Some((123, 45)));
        assert_eq!(parse_stat("42 (short) S 1"), None);
        assert_eq!(parse_stat(""), None);
    }

    #[test]
    fn schedstat_and_switches_are_read() {
        assert_eq!(parse_schedstat("897957 12 1\n"), Some(897_957));
        assert_eq!(parse_schedstat(""), None);
        let status = "Name:\tx\nvoluntary_ctxt_switches:\t17\nnonvoluntary_ctxt_switches:\t3\n";
        assert_eq!(parse_switches(status), Some((17, 3)));
        assert_eq!(parse_switches("voluntary_ctxt_switches:\t17\n"), None);
    }

    #[test]
    fn the_machine_line_is_read() {
        let stat = "cpu  10 20 30 400 50 6 7 8 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n";
        assert_eq!(
            parse_machine(stat),
            Some(Machine {
                busy: 73,
                stolen: 8
            })
        );
        assert_eq!(parse_machine("intr 1"), None);
    }

    #[test]
    fn usage_of_this_process_grows_with_work() {
        let start = Usage::of_this_thread();
        let tree = Usage::of_tree(std::process::id());
        let mut spent = 0_u64;
        while Usage::of_this_thread().since(start).run_ns < 2_000_000 {
            spent = spent.wrapping_add(std::hint::black_box(1));
            if Usage::of_this_thread().run_ns == 0 {
                return; // a kernel without schedstat
            }
        }
        let used = Usage::of_tree(std::process::id()).since(tree);
        assert!(used.cpu_us() >= 1_900.0, "{used:?}");
    }

    #[test]
    fn the_tree_holds_children() {
        let mut child = std::process::Command::new("sleep")
            .arg("30")
            .spawn()
            .unwrap();
        let tree = process_tree(std::process::id());
        let found = tree.contains(&child.id());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(found, "{tree:?}");
    }

    #[test]
    fn pins_parse() {
        let pins: Pins = "client=0,middle=1-3".parse().unwrap();
        assert_eq!(pins.client.unwrap().to_string(), "0");
        assert_eq!(pins.middle.unwrap().to_string(), "1-3");
        assert_eq!(pins.sink, None);
        for bad in [
            "",
            "client",
            "client=",
            "client=x",
            "other=1",
            "sink=3-1",
            "sink=999999",
        ] {
            assert!(bad.parse::<Pins>().is_err(), "{bad}");
        }
    }
}
