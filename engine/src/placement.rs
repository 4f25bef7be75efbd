//! Which CPU each shard gets: what the process may use, how the CPUs lie, and who is put where.
//!
//! CPU `n` is not core number `n` in a container: the kernel's mask counts, so everything here
//! starts from it. Files of the kernel are read below a root directory that tests replace.

pub mod memory;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Why a list of CPUs cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CpuListError {
    /// A part is neither a number nor a range.
    #[error("`{0}` is not a CPU or a range of CPUs; write for example `0-3,8`")]
    NotACpu(String),
    /// A range ends before it begins.
    #[error("the range `{0}` ends before it begins; write the smaller CPU first")]
    Backwards(String),
    /// A number that no Linux host has.
    #[error("CPU {0} is beyond {max}, the last that can be named", max = CPUS_MAX - 1)]
    TooLarge(usize),
}

/// CPUs are numbered below this: the size of the mask that the kernel is asked for.
pub const CPUS_MAX: usize = CpuSet::MAX_CPU;

/// Reads the kernel's list syntax (`0-3,8`): ascending, each CPU once. Nothing but spaces is the
/// empty list, as the kernel writes it for a node without CPUs.
///
/// # Errors
/// [`CpuListError`] names the part that is wrong.
pub fn parse_cpu_list(text: &str) -> Result<Vec<usize>, CpuListError> {
    let mut cpus = Vec::new();
    if text.trim().is_empty() {
        return Ok(cpus);
    }
    for part in text.split(',').map(str::trim) {
        let number = |digits: &str| {
            // `parse` alone would take a sign.
            let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
            let value = plain.then(|| digits.parse::<usize>().unwrap_or(usize::MAX));
            value.ok_or_else(|| CpuListError::NotACpu(part.to_owned()))
        };
        let (first, last) = match part.split_once('-') {
            Some((first, last)) => (number(first)?, number(last)?),
            None => (number(part)?, number(part)?),
        };
        if last >= CPUS_MAX {
            return Err(CpuListError::TooLarge(last));
        }
        if last < first {
            return Err(CpuListError::Backwards(part.to_owned()));
        }
        cpus.extend(first..=last);
    }
    cpus.sort_unstable();
    cpus.dedup();
    Ok(cpus)
}

/// The CPUs that this thread may run on, ascending.
///
/// # Errors
/// The kernel's answer: EINVAL on a host with more than [`CPUS_MAX`] CPUs.
pub fn affinity() -> io::Result<Vec<usize>> {
    let mask = sched_getaffinity(None)?;
    Ok((0..CPUS_MAX).filter(|cpu| mask.is_set(*cpu)).collect())
}

/// Binds the calling thread to one CPU.
///
/// # Errors
/// EINVAL when the CPU does not exist, is offline or is outside the process's cpuset.
pub fn pin_current_thread(cpu: usize) -> io::Result<()> {
    if cpu >= CPUS_MAX {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let mut mask = CpuSet::new();
    mask.set(cpu);
    Ok(sched_setaffinity(None, &mask)?)
}

/// Where one CPU lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cpu {
    /// The kernel's number.
    pub number: usize,
    /// Physical package (socket); 0 where the host does not say.
    pub package: usize,
    /// NUMA node; 0 where the host does not say.
    pub node: usize,
    /// CPUs of the same physical core, itself among them.
    pub siblings: Vec<usize>,
}

/// The CPUs of the host, ascending.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Topology {
    /// The CPUs that are online.
    pub cpus: Vec<Cpu>,
    /// CPUs that the scheduler puts nobody on by itself (`isolcpus`), ascending.
    pub isolated: Vec<usize>,
}

impl Topology {
    /// Reads `/sys/devices/system` of this host.
    pub fn of_host() -> Topology {
        Topology::read(Path::new("/sys/devices/system"))
    }

    /// Reads `cpu` and `node` below `system`. What cannot be read (containers hide parts of it) is
    /// taken to be one package, one node and no siblings.
    pub fn read(system: &Path) -> Topology {
        let cpus = read_list(&system.join("cpu/online"));
        let nodes = read_list(&system.join("node/online"));
        let nodes: Vec<(usize, Vec<usize>)> = nodes
            .into_iter()
            .map(|node| {
                let cpulist = system.join(format!("node/node{node}/cpulist"));
                (node, read_list(&cpulist))
            })
            .collect();
        let cpu = |number| {
            let directory = system.join(format!("cpu/cpu{number}/topology"));
            let package = fs::read_to_string(directory.join("physical_package_id"));
            let package = package.ok().and_then(|text| text.trim().parse().ok());
            let siblings = read_list(&directory.join("thread_siblings_list"));
            let node = nodes.iter().find(|(_, cpus)| cpus.contains(&number));
            Cpu {
                number,
                package: package.unwrap_or(0),
                node: node.map_or(0, |(node, _)| *node),
                siblings: if siblings.contains(&number) {
                    siblings
                } else {
                    vec![number]
                },
            }
        };
        Topology {
            cpus: cpus.into_iter().map(cpu).collect(),
            isolated: read_list(&system.join("cpu/isolated")),
        }
    }

    /// The CPU with this number, if it is online.
    pub fn cpu(&self, number: usize) -> Option<&Cpu> {
        self.cpus.iter().find(|cpu| cpu.number == number)
    }
}

fn read_list(path: &Path) -> Vec<usize> {
    let text = fs::read_to_string(path).unwrap_or_default();
    parse_cpu_list(&text).unwrap_or_default()
}

/// The CPUs that this process's control groups below `root` (`/` but in tests) leave it; `None`
/// where they do not say.
pub fn cpuset(root: &Path) -> Option<Vec<usize>> {
    let list = |group: PathBuf| {
        // Of v2, and of v1.
        let names = ["cpuset.cpus.effective", "cpuset.effective_cpus"];
        let lists = names.iter().map(|name| read_list(&group.join(name)));
        lists.into_iter().find(|cpus| !cpus.is_empty())
    };
    groups(root, "cpuset").into_iter().find_map(list)
}

/// How much CPU time the process's control group may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuQuota {
    /// Microseconds of CPU time in each period.
    pub quota_us: u64,
    /// Microseconds of a period.
    pub period_us: u64,
}

impl CpuQuota {
    /// The quota as a number of CPUs.
    pub fn cpus(&self) -> f64 {
        self.quota_us as f64 / self.period_us as f64
    }

    /// The tightest quota of this process's control groups below `root` (`/` but in tests).
    /// `None`: no limit.
    pub fn read(root: &Path) -> Option<CpuQuota> {
        let quotas = cpu_groups(root).into_iter();
        quotas
            .filter_map(|group| CpuQuota::of_group(&group))
            .min_by(|one, other| one.cpus().total_cmp(&other.cpus()))
    }

    /// The quota of the group in one folder: `cpu.max`, or `cpu.cfs_quota_us` of cgroup v1.
    pub fn of_group(group: &Path) -> Option<CpuQuota> {
        let read = |name: &str| fs::read_to_string(group.join(name));
        if let Ok(text) = read("cpu.max") {
            return parse_cpu_max(&text);
        }
        let (quota, period) = (
            read("cpu.cfs_quota_us").ok()?,
            read("cpu.cfs_period_us").ok()?,
        );
        // No limit is -1 there, which is no quota here either.
        parse_cpu_max(&format!("{} {}", quota.trim(), period.trim()))
    }
}

/// Folders of the control groups below `root` that bound the CPU time of this process: its own and
/// those above it, of cgroup v2 and of v1.
pub fn cpu_groups(root: &Path) -> Vec<PathBuf> {
    groups(root, "cpu")
}

/// The same of any controller.
fn groups(root: &Path, controller: &str) -> Vec<PathBuf> {
    let table = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let mut folders = Vec::new();
    for line in table.lines() {
        // `0::/group` of v2, `4:cpu,cpuacct:/group` of v1.
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(group)) = (parts.next(), parts.next()) else {
            continue;
        };
        let mounts = match controllers {
            "" => ["sys/fs/cgroup".to_owned(), "sys/fs/cgroup/unified".into()],
            list if list.split(',').any(|name| name == controller) => {
                [controller, list].map(|name| format!("sys/fs/cgroup/{name}"))
            }
            _ => continue,
        };
        let mark = match controllers {
            "" => "cgroup.controllers",
            _ => "cgroup.procs",
        };
        let mut mounts = mounts.iter().map(|path| root.join(path));
        let Some(mount) = mounts.find(|mount| mount.join(mark).exists()) else {
            continue;
        };
        let mut folder = mount.join(group.trim_start_matches('/'));
        while folder.starts_with(&mount) {
            folders.push(folder.clone());
            if !folder.pop() {
                break;
            }
        }
    }
    folders
}

/// `QUOTA PERIOD` in microseconds; the quota `max` is no limit.
fn parse_cpu_max(text: &str) -> Option<CpuQuota> {
    let mut words = text.split_whitespace();
    let quota_us = words.next()?.parse().ok()?;
    let period_us = words.next()?.parse().ok().filter(|period| *period > 0)?;
    Some(CpuQuota {
        quota_us,
        period_us,
    })
}

/// Which CPU the control core takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ControlCpu {
    /// The last of the mask.
    Last,
    /// This one.
    Cpu(usize),
    /// This one, and a shard may run there as well.
    Shared(usize),
}

/// Who runs where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assignment {
    /// One CPU for each shard, ascending; at least one.
    pub data: Vec<usize>,
    /// The CPU of the control core.
    pub control: usize,
    /// What differs from what was asked for, and what to know: sentences for the log.
    pub notes: Vec<String>,
}

/// Gives each wanted CPU that is in `mask` to a shard. The control core has its own, unless there
/// is only one.
pub fn assign(wanted: &[usize], control: ControlCpu, mask: &[usize]) -> Assignment {
    let mut notes = Vec::new();
    let last = mask.last().copied().unwrap_or(0);
    let shared = matches!(control, ControlCpu::Shared(_));
    let control = match control {
        ControlCpu::Cpu(cpu) | ControlCpu::Shared(cpu) if mask.contains(&cpu) => cpu,
        ControlCpu::Cpu(cpu) | ControlCpu::Shared(cpu) => {
            notes.push(format!(
                "the control core cannot have CPU {cpu}: this process may not run there; it \
                 takes CPU {last}"
            ));
            last
        }
        ControlCpu::Last => last,
    };
    if mask.len() <= 1 {
        notes.push(format!(
            "CPU {control} is the only one: the shard and the control core share it"
        ));
        return Assignment {
            data: vec![control],
            control,
            notes,
        };
    }
    let (mut data, absent): (Vec<usize>, Vec<usize>) =
        wanted.iter().partition(|cpu| mask.contains(cpu));
    data.sort_unstable();
    data.dedup();
    if !absent.is_empty() {
        notes.push(format!(
            "left out {}: not on this host, or this process may not run there (it may use {})",
            cpus_in_words(&absent),
            cpus_in_words(mask)
        ));
    }
    if data.contains(&control) && shared {
        notes.push(format!(
            "CPU {control} runs the control core and a shard, as it was told: they wait for each \
             other"
        ));
    } else if data.contains(&control) {
        data.retain(|cpu| *cpu != control);
        notes.push(format!(
            "CPU {control} runs the control core and so no shard"
        ));
    }
    if data.is_empty() {
        let spare = mask.iter().copied().find(|cpu| *cpu != control);
        data.push(spare.unwrap_or(control));
        notes.push(format!(
            "none of the CPUs asked for is left: the one shard takes CPU {}",
            data[0]
        ));
    }
    Assignment {
        data,
        control,
        notes,
    }
}

impl Assignment {
    /// All CPUs of this process, ascending.
    pub fn used(&self) -> Vec<usize> {
        let mut used = self.data.clone();
        used.push(self.control);
        used.sort_unstable();
        used.dedup();
        used
    }

    /// Pairs of our CPUs that are threads of one physical core.
    pub fn shared(&self, topology: &Topology) -> Vec<(usize, usize)> {
        let used = self.used();
        let other = |cpu: &usize| {
            let siblings = &topology.cpu(*cpu)?.siblings;
            let mut others = siblings.iter().copied();
            let other = others.find(|other| other > cpu && used.contains(other))?;
            Some((*cpu, other))
        };
        used.iter().filter_map(other).collect()
    }

    /// NUMA nodes that the shards lie on, ascending.
    pub fn nodes(&self, topology: &Topology) -> Vec<usize> {
        let node = |cpu: &usize| topology.cpu(*cpu).map(|cpu| cpu.node);
        let mut nodes: Vec<usize> = self.data.iter().filter_map(node).collect();
        nodes.sort_unstable();
        nodes.dedup();
        nodes
    }

    /// Adds notes on what the host's shape, the control group's quota and its cpuset mean for this
    /// assignment.
    pub fn advise(
        &mut self,
        topology: &Topology,
        quota: Option<CpuQuota>,
        cpuset: Option<&[usize]>,
    ) {
        let used = self.used();
        if let Some(left) = cpuset.filter(|left| left.len() < topology.cpus.len()) {
            self.notes.push(format!(
                "the control group (cpuset) leaves this process {} of {}",
                cpus_in_words(left),
                topology.cpus.len()
            ));
        }
        for (cpu, other) in self.shared(topology) {
            self.notes.push(format!(
                "CPUs {cpu} and {other} are threads of one physical core and slow each other"
            ));
        }
        let nodes = self.nodes(topology);
        if nodes.len() > 1 {
            self.notes.push(format!(
                "the shards lie on NUMA nodes {nodes:?}: requests that cross them cost more"
            ));
        }
        let isolated = &topology.isolated;
        if !isolated.is_empty() && !self.data.iter().any(|cpu| isolated.contains(cpu)) {
            self.notes.push(format!(
                "the host keeps {} free of other work (isolcpus), and no shard runs there",
                cpus_in_words(isolated)
            ));
        }
        if let Some(quota) = quota.filter(|quota| quota.cpus() < used.len() as f64) {
            self.notes.push(format!(
                "the control group allows {:.2} CPUs and {} are used: threads will be stopped for \
                 parts of each {} us; raise the limit or use fewer CPUs",
                quota.cpus(),
                used.len(),
                quota.period_us
            ));
        }
    }
}

fn cpus_in_words(cpus: &[usize]) -> String {
    let numbers: Vec<String> = cpus.iter().map(usize::to_string).collect();
    let noun = if cpus.len() == 1 { "CPU" } else { "CPUs" };
    format!("{noun} {}", numbers.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists_read_as_the_kernel_writes_them() {
        assert_eq!(parse_cpu_list("0-3,8\n"), Ok(vec![0, 1, 2, 3, 8]));
        assert_eq!(parse_cpu_list("2,0-1,1"), Ok(vec![0, 1, 2]));
        assert_eq!(parse_cpu_list("\n"), Ok(vec![]));
        let too_large = CpuListError::TooLarge(CPUS_MAX);
        assert_eq!(parse_cpu_list(&CPUS_MAX.to_string()), Err(too_large));
        assert_eq!(
            parse_cpu_list("3-1"),
            Err(CpuListError::Backwards("3-1".into()))
        );
        for wrong in [
            "a", "0-", "-1", "+1", "0,,1", "0-1-2", "0x1", "1 2", ",", "0-3:2",
        ] {
            let error = parse_cpu_list(wrong).unwrap_err();
            assert!(matches!(error, CpuListError::NotACpu(_)), "{wrong}");
        }
        assert_eq!(
            parse_cpu_list("0-99999999999999999999999"),
            Err(CpuListError::TooLarge(usize::MAX))
        );
    }

    #[test]
    fn a_thread_can_be_pinned_to_each_cpu_of_its_mask() {
        let mask = affinity().unwrap();
        assert!(!mask.is_empty());
        for cpu in mask {
            let pinned = std::thread::spawn(move || {
                pin_current_thread(cpu).unwrap();
                affinity().unwrap()
            });
            assert_eq!(pinned.join().unwrap(), [cpu]);
        }
        assert!(pin_current_thread(CPUS_MAX).is_err());
    }

    #[test]
    fn each_shard_gets_its_own_cpu_and_control_the_last() {
        let assignment = assign(&[0, 1, 2, 3], ControlCpu::Last, &[0, 1]);
        assert_eq!((&assignment.data[..], assignment.control), (&[0][..], 1));
        assert_eq!(assignment.notes.len(), 2, "{:?}", assignment.notes);
        assert!(assignment.notes[0].starts_with("left out CPUs 2, 3:"));

        let assignment = assign(&[0, 1, 2], ControlCpu::Last, &[0, 1, 2, 3]);
        assert_eq!(assignment.data, [0, 1, 2]);
        assert_eq!(assignment.control, 3);
        assert!(assignment.notes.is_empty());

        let assignment = assign(&[4, 5, 6], ControlCpu::Cpu(4), &[4, 5, 6]);
        assert_eq!(assignment.data, [5, 6]);
        assert_eq!(assignment.control, 4);

        let assignment = assign(&[4, 5], ControlCpu::Shared(4), &[4, 5]);
        assert_eq!((&assignment.data[..], assignment.control), (&[4, 5][..], 4));
        assert_eq!(assignment.notes.len(), 1, "{:?}", assignment.notes);
    }

    #[test]
    fn odd_wishes_still_give_an_assignment() {
        let only = assign(&[0], ControlCpu::Last, &[3]);
        assert_eq!((&only.data[..], only.control), (&[3][..], 3));
        assert_eq!(only.notes.len(), 1);

        let none_left = assign(&[7], ControlCpu::Cpu(9), &[2, 3]);
        assert_eq!((&none_left.data[..], none_left.control), (&[2][..], 3));
        assert_eq!(none_left.notes.len(), 3);

        let all_control = assign(&[1], ControlCpu::Cpu(1), &[0, 1]);
        assert_eq!((&all_control.data[..], all_control.control), (&[0][..], 1));
    }

    fn write(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn topology_is_read_and_its_gaps_are_filled() {
        let host = tempfile::tempdir().unwrap();
        let root = host.path();
        write(root, "cpu/online", "0-3\n");
        write(root, "node/online", "0-1\n");
        write(root, "node/node0/cpulist", "0,2\n");
        write(root, "node/node1/cpulist", "1,3\n");
        for cpu in [0, 1, 2] {
            let topology = format!("cpu/cpu{cpu}/topology");
            let package = format!("{topology}/physical_package_id");
            write(root, &package, &format!("{}\n", cpu % 2));
            let siblings = format!("{topology}/thread_siblings_list");
            write(root, &siblings, if cpu == 1 { "1,3\n" } else { "0,2\n" });
        }
        write(root, "cpu/isolated", "3\n");
        let topology = Topology::read(root);
        assert_eq!(topology.isolated, [3]);
        let last = topology.cpu(3).unwrap();
        assert_eq!((last.package, last.node), (0, 1));
        assert_eq!(last.siblings, [3], "the file is not there");
        let third = topology.cpu(2).unwrap();
        assert_eq!((third.package, third.node), (0, 0));
        assert_eq!(third.siblings, [0, 2]);
        assert_eq!(Topology::read(&root.join("nowhere")), Topology::default());

        let mut assignment = assign(&[0, 1, 2], ControlCpu::Last, &[0, 1, 2, 3]);
        assignment.advise(
            &topology,
            Some(CpuQuota {
                quota_us: 150_000,
                period_us: 100_000,
            }),
            Some(&[0, 1, 2, 3]),
        );
        assert_eq!(assignment.notes.len(), 5, "{:?}", assignment.notes);
        assert!(assignment.notes[0].contains("CPUs 0 and 2"));
        assert!(assignment.notes[1].contains("CPUs 1 and 3"));
        assert!(assignment.notes[4].contains("1.50 CPUs and 4 are used"));

        let mut elsewhere = assign(&[0], ControlCpu::Cpu(1), &[0, 1, 2, 3]);
        elsewhere.advise(&topology, None, Some(&[0, 1]));
        assert_eq!(elsewhere.notes.len(), 2, "{:?}", elsewhere.notes);
        assert!(elsewhere.notes[0].ends_with("CPUs 0, 1 of 4"));
        assert!(
            elsewhere.notes[1].contains("keeps CPU 3"),
            "{:?}",
            elsewhere.notes
        );
    }

    #[test]
    fn the_nearest_cpuset_counts() {
        let host = tempfile::tempdir().unwrap();
        let root = host.path();
        assert_eq!(cpuset(root), None);
        write(root, "proc/self/cgroup", "0::/pods/one\n");
        write(root, "sys/fs/cgroup/cgroup.controllers", "cpuset\n");
        write(root, "sys/fs/cgroup/cpuset.cpus.effective", "0-7\n");
        assert_eq!(cpuset(root), Some((0..8).collect()));
        write(
            root,
            "sys/fs/cgroup/pods/one/cpuset.cpus.effective",
            "2-3\n",
        );
        assert_eq!(cpuset(root), Some(vec![2, 3]));
        write(root, "proc/self/cgroup", "3:cpuset:/old\n");
        write(root, "sys/fs/cgroup/cpuset/cgroup.procs", "1\n");
        write(
            root,
            "sys/fs/cgroup/cpuset/old/cpuset.effective_cpus",
            "1\n",
        );
        assert_eq!(cpuset(root), Some(vec![1]));
    }

    #[test]
    fn the_tightest_quota_counts() {
        let host = tempfile::tempdir().unwrap();
        let root = host.path();
        assert_eq!(CpuQuota::read(root), None);
        write(root, "proc/self/cgroup", "1:cpu:/old\n0::/pods/one\n");
        write(root, "sys/fs/cgroup/cgroup.controllers", "cpu\n");
        write(root, "sys/fs/cgroup/pods/one/cpu.max", "max 100000\n");
        assert_eq!(CpuQuota::read(root), None);
        write(root, "sys/fs/cgroup/pods/cpu.max", "250000 100000\n");
        assert_eq!(CpuQuota::read(root).unwrap().cpus(), 2.5);
        write(root, "sys/fs/cgroup/pods/one/cpu.max", "50000 100000\n");
        assert_eq!(CpuQuota::read(root).unwrap().cpus(), 0.5);
        write(root, "sys/fs/cgroup/pods/one/cpu.max", "50000 0\n");
        assert_eq!(CpuQuota::read(root).unwrap().cpus(), 2.5);
        let old = "sys/fs/cgroup/cpu";
        write(
            root,
            "proc/self/cgroup",
            "4:cpuset:/\n1:cpu,cpuacct:/old\n0::/\n",
        );
        write(root, &format!("{old}/cgroup.procs"), "1\n");
        write(root, &format!("{old}/old/cpu.cfs_quota_us"), "-1\n");
        write(root, &format!("{old}/old/cpu.cfs_period_us"), "100000\n");
        assert_eq!(CpuQuota::read(root), None);
        write(root, &format!("{old}/old/cpu.cfs_quota_us"), "150000\n");
        assert_eq!(CpuQuota::read(root).unwrap().cpus(), 1.5);
    }
}
