//! What the checks look at: the host, what it is to be good for, and its counters twice.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use corelane_engine::placement::{
    Assignment, ControlCpu, Topology, assign, cpu_groups, parse_cpu_list,
};
use corelane_engine::preflight::Report;

use crate::config::Io;
use crate::discovery::EtcdAuth;
use crate::tune::{self, Goal, Item, Plan, Standing, Topic, View};

/// What the host is to be good for.
#[derive(Clone)]
pub struct Wish {
    /// Data cores, devices, connections.
    pub goal: Goal,
    /// The CPU of the control core.
    pub control: ControlCpu,
    /// Most connections of one core.
    pub connections_max: u64,
    /// How each data core moves bytes.
    pub io: Vec<Io>,
    /// etcd's endpoints and who we are there, if it is discovery.
    pub etcd: Option<(Vec<String>, EtcdAuth)>,
    /// Workers to ask.
    pub peers: Vec<SocketAddr>,
    /// How long all checks may take.
    pub patience: Duration,
}

/// What all checks see.
pub struct Sight {
    /// The host.
    pub view: View,
    /// What it is to be good for.
    pub wish: Wish,
    /// Limits of the process, and whether io_uring can be used.
    pub report: Report,
    /// Time between the two looks at the counters.
    pub window: Duration,
    began: Instant,
    before: Counters,
    after: OnceLock<Counters>,
    plan: OnceLock<Plan>,
}

impl Sight {
    /// Looks at the counters for the first time.
    pub fn new(view: View, wish: Wish, report: Report, window: Duration) -> Self {
        let before = Counters::read(&view, &wish.goal);
        Self {
            view,
            wish,
            report,
            window,
            began: Instant::now(),
            before,
            after: OnceLock::new(),
            plan: OnceLock::new(),
        }
    }

    /// What [`Plan::make`] says of this host.
    pub(super) fn plan(&self) -> &Plan {
        self.plan
            .get_or_init(|| Plan::make(&self.view, &self.wish.goal))
    }

    /// Settings of a topic: all, and those that should be changed.
    pub(super) fn items(&self, topic: Topic) -> (Vec<&Item>, Vec<&Item>) {
        let all: Vec<&Item> = self.plan().items.iter().collect();
        let all: Vec<&Item> = all.into_iter().filter(|i| i.topic == topic).collect();
        let change = |item: &&Item| item.standing == Standing::Change;
        let wrong = all.iter().copied().filter(change).collect();
        (all, wrong)
    }

    /// What a sysctl is, if it should be changed.
    pub(super) fn wrong(&self, sysctl: &str) -> Option<&Item> {
        let mut changes = self.plan().changes();
        changes.find(|item| item.name == sysctl)
    }

    /// CPUs that this process may use; empty where the kernel does not say.
    pub(super) fn mask(&self) -> Vec<usize> {
        let list = self.status("Cpus_allowed_list:").unwrap_or_default();
        parse_cpu_list(&list).unwrap_or_default()
    }

    /// A line of this process's status.
    pub(super) fn status(&self, key: &str) -> Option<String> {
        let status = self.view.read("proc/self/status")?;
        let line = status.lines().find_map(|line| line.strip_prefix(key))?;
        Some(line.trim().to_owned())
    }

    /// A path below the view's root as one of the host's.
    pub(super) fn shown(&self, path: &Path) -> String {
        let inside = path.strip_prefix(self.view.path("/")).unwrap_or(path);
        Path::new("/").join(inside).display().to_string()
    }

    /// Who would run where.
    pub(super) fn assignment(&self) -> Assignment {
        let mask = match self.mask() {
            mask if mask.is_empty() => self.wish.goal.cpus.clone(),
            mask => mask,
        };
        assign(&self.wish.goal.cpus, self.wish.control, &mask)
    }

    /// How the CPUs lie.
    pub(super) fn topology(&self) -> Topology {
        Topology::read(&self.view.path("sys/devices/system"))
    }

    /// A counter's value, and how much it rose between the two looks. None: it is not there.
    pub(super) fn counter(&self, name: &str) -> Option<Count> {
        let total = *self.after().named.get(name)?;
        let before = self.before.named.get(name).copied().unwrap_or(total);
        let rise = total.saturating_sub(before);
        Some(Count { total, rise })
    }

    /// Ticks of a CPU between the two looks, and since the host started.
    pub(super) fn ticks(&self, cpu: usize) -> Option<(Ticks, Ticks)> {
        let now = *self.after().cpus.get(&cpu)?;
        let before = *self.before.cpus.get(&cpu)?;
        Some((now.since(before), now))
    }

    /// Waits for the second look.
    fn after(&self) -> &Counters {
        self.after.get_or_init(|| {
            let passed = self.began.elapsed();
            thread::sleep(self.window.saturating_sub(passed));
            Counters::read(&self.view, &self.wish.goal)
        })
    }
}

/// A counter.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Count {
    /// Since the host started, or the network namespace, or the group.
    pub(super) total: u64,
    /// Between the two looks.
    pub(super) rise: u64,
}

/// Time of a CPU in ticks, 10 ms each.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Ticks {
    /// Neither idle nor waiting for a disk.
    pub(super) busy: u64,
    /// Taken by the hypervisor for others.
    pub(super) steal: u64,
    /// All.
    pub(super) all: u64,
}

impl Ticks {
    fn since(self, before: Ticks) -> Ticks {
        Ticks {
            busy: self.busy.saturating_sub(before.busy),
            steal: self.steal.saturating_sub(before.steal),
            all: self.all.saturating_sub(before.all),
        }
    }

    /// A part in percent.
    pub(super) fn percent(self, part: u64) -> f64 {
        100.0 * part as f64 / self.all.max(1) as f64
    }
}

/// Counters of the host at one moment: of CPUs, and others by name, such as
/// `TcpExt.ListenOverflows`, `softnet.dropped`, `vmstat.pswpin`, `eth0.rx_missed_errors`,
/// `conntrack.drop`, `cgroup.nr_throttled`.
#[derive(Debug, Default)]
struct Counters {
    cpus: BTreeMap<usize, Ticks>,
    named: BTreeMap<String, u64>,
}

/// What a device counts of packets that it had no room for.
pub(super) const DEVICE_DROPS: [&str; 3] = ["rx_missed_errors", "rx_fifo_errors", "rx_over_errors"];

impl Counters {
    fn read(view: &View, goal: &Goal) -> Self {
        let mut counters = Self {
            cpus: cpus(&view.read("proc/stat").unwrap_or_default()),
            named: BTreeMap::new(),
        };
        for file in ["proc/net/netstat", "proc/net/snmp"] {
            counters.protocols(&view.read(file).unwrap_or_default());
        }
        let softnet = view.read("proc/net/softnet_stat").unwrap_or_default();
        let dropped = |line: &str| u64::from_str_radix(line.split_whitespace().nth(1)?, 16).ok();
        if !softnet.is_empty() {
            let dropped = softnet.lines().filter_map(dropped).sum();
            counters.named.insert("softnet.dropped".into(), dropped);
        }
        counters.pairs("vmstat", &view.read("proc/vmstat").unwrap_or_default());
        counters.conntrack(&view.read("proc/net/stat/nf_conntrack").unwrap_or_default());
        for device in tune::looked_at(view, goal) {
            for name in DEVICE_DROPS {
                let path = format!("sys/class/net/{device}/statistics/{name}");
                if let Some(value) = view.number(path) {
                    counters.named.insert(format!("{device}.{name}"), value);
                }
            }
        }
        // Groups above ours count the throttling of others too.
        if let Some(group) = cpu_groups(&view.path("/")).first() {
            let text = std::fs::read_to_string(group.join("cpu.stat"));
            counters.pairs("cgroup", &text.unwrap_or_default());
        }
        counters
    }

    /// Lines of a name and a value each.
    fn pairs(&mut self, of: &str, text: &str) {
        for line in text.lines() {
            if let Some((name, value)) = line.split_once(' ')
                && let Ok(value) = value.trim().parse()
            {
                self.named.insert(format!("{of}.{name}"), value);
            }
        }
    }

    /// Pairs of lines: names, and below them values, both after the protocol.
    fn protocols(&mut self, text: &str) {
        let lines: Vec<&str> = text.lines().collect();
        for pair in lines.chunks_exact(2) {
            let (Some((of, names)), Some((_, values))) =
                (pair[0].split_once(':'), pair[1].split_once(':'))
            else {
                continue;
            };
            for (name, value) in names.split_whitespace().zip(values.split_whitespace()) {
                if let Ok(value) = value.parse() {
                    self.named.insert(format!("{of}.{name}"), value);
                }
            }
        }
    }

    /// A line of names, then a line of hexadecimal numbers for each CPU.
    fn conntrack(&mut self, text: &str) {
        let mut lines = text.lines();
        let names: Vec<&str> = lines.next().unwrap_or("").split_whitespace().collect();
        for line in lines {
            for (name, value) in names.iter().zip(line.split_whitespace()) {
                let value = u64::from_str_radix(value, 16).unwrap_or(0);
                *self.named.entry(format!("conntrack.{name}")).or_default() += value;
            }
        }
    }
}

/// `cpu3 user nice system idle iowait irq softirq steal ...` in ticks.
fn cpus(text: &str) -> BTreeMap<usize, Ticks> {
    let ticks = |line: &str| {
        let mut words = line.split_whitespace();
        // The line of all CPUs together has no number.
        let cpu = words.next()?.strip_prefix("cpu")?.parse().ok()?;
        let times: Vec<u64> = words.filter_map(|word| word.parse().ok()).collect();
        // Time of guests is in that of users already.
        let [user, nice, system, idle, iowait, irq, softirq, steal] = *times.first_chunk()?;
        let busy = user + nice + system + irq + softirq;
        let all = busy + idle + iowait + steal;
        Some((cpu, Ticks { busy, steal, all }))
    };
    text.lines().filter_map(ticks).collect()
}
