//! What this machine offers to this process, as far as the configuration asks: CPUs, files, and
//! queues of network devices.

use std::collections::BTreeMap;
use std::path::PathBuf;

use corelane_engine::nic::QueueName;

/// The limits of this process.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Host {
    /// CPUs that it may run on, as the kernel counts them, ascending, never empty.
    pub cpus: Vec<usize>,
    /// Files that it may have open at most (the hard limit); None for no limit.
    pub files_max: Option<u64>,
    /// The folder that the kernel's files lie in: `/`, but in tests.
    pub root: PathBuf,
    /// Queue and CPU of each core that runs already, by its number: it stays there, wherever the
    /// queue's interrupt goes now.
    pub pinned: BTreeMap<usize, (QueueName, usize)>,
}

impl Default for Host {
    /// CPU 0 alone.
    fn default() -> Self {
        Self {
            cpus: vec![0],
            files_max: None,
            root: "/".into(),
            pinned: BTreeMap::new(),
        }
    }
}

impl Host {
    /// Reads the affinity mask of the calling thread. Where the kernel does not tell, CPU 0 and
    /// up, as many as the standard library counts.
    pub fn current() -> Self {
        let cpus = match rustix::thread::sched_getaffinity(None) {
            Ok(set) => (0..rustix::thread::CpuSet::MAX_CPU)
                .filter(|&cpu| set.is_set(cpu))
                .collect(),
            Err(_) => Vec::new(),
        };
        let files_max = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
        if cpus.is_empty() {
            let count = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
            return Self {
                cpus: (0..count).collect(),
                files_max,
                ..Self::default()
            };
        }
        Self {
            cpus,
            files_max,
            ..Self::default()
        }
    }

    /// `0-3,5`: the CPUs in the list syntax of the configuration.
    pub fn cpu_list(&self) -> String {
        cpu_list(&self.cpus)
    }
}

/// Ascending CPU numbers in list syntax: `0-3,5`.
pub(crate) fn cpu_list(cpus: &[usize]) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for &cpu in cpus {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == cpu => *last = cpu,
            _ => runs.push((cpu, cpu)),
        }
    }
    let text = |(first, last): &(usize, usize)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    };
    runs.iter().map(text).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_a_cpu() {
        assert!(!Host::current().cpus.is_empty());
    }

    #[test]
    fn runs_are_folded() {
        assert_eq!(cpu_list(&[0, 1, 2, 3, 5, 7, 8]), "0-3,5,7-8");
        assert_eq!(cpu_list(&[]), "");
    }
}
