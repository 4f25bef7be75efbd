//! Which CPU a core is pinned to that has a `nic_queue` and no `cpu`: the one that handles the
//! packets of the queue.
//!
//! ```text
//! cores.d/2.toml  nic_queue = "eth0:3"  ->  IRQ 45  ->  CPU 6  ->  core 2 is on CPU 6
//!                                              '-- none that it can have: by its number, with a
//!                                                  warning, so that `tune` can move the interrupt
//! ```

use std::collections::BTreeMap;

use corelane_engine::nic::{self, Queue, QueueName};

use super::layers::{Layers, Of};
use super::problem::Origin;
use super::{Core, Host, cpu_list, keys};

/// Pins such cores, each to a CPU of its own that is neither another core's nor `control`.
pub(super) fn pin(layers: &mut Layers, host: &Host, cores: &mut [Core], control: Option<usize>) {
    let by_queue = |core: &Core| {
        let cpu = layers.typed(&keys::CORE_CPU, Of::Core(core.number));
        core.nic_queue.is_some() && cpu.is_none()
    };
    let (by_queue, others): (Vec<usize>, Vec<usize>) =
        (0..cores.len()).partition(|index| by_queue(&cores[*index]));
    let mut look = Look {
        host,
        taken: others.iter().map(|index| cores[*index].cpu).collect(),
        devices: BTreeMap::new(),
    };
    look.taken.extend(control);
    let mut left = Vec::new();
    // Those that know come first: who takes what is left must not take it from them.
    for index in by_queue {
        let core = &mut cores[index];
        match look.cpu(core) {
            Ok((cpu, why)) => {
                core.cpu = cpu;
                look.taken.push(cpu);
                told(layers, core, why);
            }
            Err(why) => left.push((index, why)),
        }
    }
    for (index, why) in left {
        look.spare(layers, &mut cores[index], why);
    }
}

/// Why a queue leads to no CPU for its core; `None` where the queue itself is wrong, which is said
/// elsewhere.
type Missing = Option<String>;

/// The host, and what of it is taken.
struct Look<'a> {
    host: &'a Host,
    taken: Vec<usize>,
    /// Queues of the devices that were looked at.
    devices: BTreeMap<String, Option<Vec<Queue>>>,
}

impl Look<'_> {
    fn is_free(&self, cpu: usize) -> bool {
        self.host.cpus.contains(&cpu) && !self.taken.contains(&cpu)
    }

    /// The CPU that a core gets from its queue, and how.
    fn cpu(&mut self, core: &Core) -> Result<(usize, String), Missing> {
        let name = core.nic_queue.as_ref().ok_or(None)?;
        let from = from(name);
        // A core that runs is not moved because its interrupt was.
        if let Some((queue, cpu)) = self.host.pinned.get(&core.number)
            && queue == name
            && self.is_free(*cpu)
        {
            return Ok((*cpu, format!("{from}, as at the start")));
        }
        let queue = self.queue(name).ok_or(None)?;
        let (handled, led_by) = (queue.cpus().to_vec(), queue.led_by());
        if handled.is_empty() {
            let why = "the host does not say which CPU handles packets of";
            return Err(Some(format!("{why} {name}")));
        }
        let free = |cpu: &&usize| self.is_free(**cpu);
        // Of several its own number is as good as any.
        let own = handled.iter().find(|cpu| **cpu == core.number);
        match own.filter(free).or_else(|| handled.iter().find(free)) {
            Some(cpu) => Ok((*cpu, format!("{from}: {led_by}"))),
            None => Err(Some(self.why_none(name, &handled))),
        }
    }

    fn why_none(&self, name: &QueueName, handled: &[usize]) -> String {
        let theirs = cpu_list(handled);
        let whose = match handled.iter().any(|cpu| self.host.cpus.contains(cpu)) {
            true => "which another core has".to_owned(),
            false => format!("which this process may not use ({})", self.host.cpu_list()),
        };
        format!("packets of {name} are handled on CPU {theirs}, {whose}")
    }

    fn queue(&mut self, name: &QueueName) -> Option<&Queue> {
        let device = self.devices.entry(name.device.clone());
        let queues = device.or_insert_with(|| nic::queues(&self.host.root, &name.device));
        let mut queues = queues.as_ref()?.iter();
        queues.find(|queue| queue.number == name.queue)
    }

    /// Puts a core on the CPU of its number, or on one that nobody has.
    fn spare(&mut self, layers: &mut Layers, core: &mut Core, why: Missing) {
        let at = super::placing::origin(layers, core, &keys::CORE_NIC_QUEUE);
        let own = Some(core.number).filter(|cpu| self.is_free(*cpu));
        let spare = || self.host.cpus.iter().find(|cpu| self.is_free(**cpu));
        let Some(cpu) = own.or_else(|| spare().copied()) else {
            let what = why.unwrap_or_else(|| "its queue tells no CPU".to_owned());
            let what = format!("{what}, and no CPU is left for core {}", core.number);
            layers.error(&at, what, "leave a core out of cpus");
            return;
        };
        core.cpu = cpu;
        self.taken.push(cpu);
        if let Some(what) = why {
            let what = format!("{what}: core {} is on CPU {cpu}", core.number);
            let instead = "let `corelane tune apply` put its interrupt there, or write cpu";
            layers.warn(&at, what, instead);
        }
        let name = core.nic_queue.as_ref().map(from).unwrap_or_default();
        told(layers, core, format!("{name}, which leads to none"));
    }
}

fn from(name: &QueueName) -> String {
    format!("nic_queue {} of {}", name.queue, name.device)
}

/// Has the listing of the core's CPU say where it came from.
fn told(layers: &mut Layers, core: &Core, why: String) {
    let path = format!("core[{}].{}", core.number, keys::CORE_CPU.name);
    let mut settings = layers.settings.iter_mut();
    if let Some(setting) = settings.find(|setting| setting.path == path) {
        setting.value = Some(core.cpu.to_string());
        setting.origin = Origin::Host { why };
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::config::{Checked, Inputs, Main, Purpose, load};
    use crate::env::Env;

    const HEAD: &str = "[[route]]\nlisten = \"a/b/c\"\ntarget = \"a/d/c\"\n\
                        [[instance]]\nendpoint = \"a/d/c\"\naddress = \"127.0.0.1:9/1/a/d/c\"\n";

    /// A host with CPUs 0 to 7 on which the interrupt of queue n of eth0 goes to `affinity[n]`.
    fn host(affinity: &[&str]) -> (tempfile::TempDir, Host) {
        let folder = tempfile::tempdir().unwrap();
        let file = |path: String, text: &str| {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let mut table = "           CPU0       CPU1\n".to_owned();
        for (queue, cpus) in affinity.iter().enumerate() {
            let irq = 40 + queue;
            table += &format!(" {irq}:          0          0  PCI-MSI  eth0-TxRx-{queue}\n");
            file(format!("sys/class/net/eth0/device/msi_irqs/{irq}"), "");
            file(
                format!("sys/class/net/eth0/queues/rx-{queue}/rps_cpus"),
                "0",
            );
            file(format!("proc/irq/{irq}/smp_affinity_list"), cpus);
        }
        file("proc/interrupts".into(), &table);
        let host = Host {
            cpus: (0..8).collect(),
            root: folder.path().to_owned(),
            ..Host::default()
        };
        (folder, host)
    }

    /// The configuration of a router with these cores, and files of some of them.
    fn checked(host: &Host, main: &str, files: &[(usize, &str)]) -> Checked {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("cores.d")).unwrap();
        let path = folder.path().join("corelane.toml");
        fs::write(&path, format!("{HEAD}{main}")).unwrap();
        for (number, text) in files {
            let path = folder.path().join(format!("cores.d/{number}.toml"));
            fs::write(path, format!("[core]\n{text}\n")).unwrap();
        }
        let mut checked = load(&Inputs {
            purpose: Purpose::Serve,
            main: Main::File(path),
            overrides: Vec::new(),
            env: Env::default(),
            host: host.clone(),
        });
        let cut = format!("{}/", folder.path().display());
        for problem in &mut checked.problems {
            if let Origin::File { path, .. } = &mut problem.at {
                *path = path.replace(&cut, "").into();
            }
        }
        checked
    }

    /// Number and CPU of each core, by number; and what was said.
    fn pins(checked: &Checked) -> (Vec<(usize, usize)>, Vec<String>) {
        let cores = checked.config.iter().flat_map(|config| &config.cores);
        let mut pins: Vec<(usize, usize)> = cores.map(|core| (core.number, core.cpu)).collect();
        pins.sort_unstable();
        let said = checked.problems.iter().map(ToString::to_string);
        (pins, said.collect())
    }

    fn queue(number: usize) -> String {
        format!("nic_queue = \"eth0:{number}\"")
    }

    #[test]
    fn a_core_goes_to_the_cpu_of_its_queue_and_says_why() {
        let (_folder, host) = host(&["5", "0", "1", "7"]);
        let files = [
            (0, &*queue(2)),
            (1, &*queue(1)),
            (2, &*queue(0)),
            // Its own number is no CPU of the process.
            (9, &*queue(3)),
        ];
        let checked = checked(&host, "[core]\ncpus = \"0-3,9\"\n", &files);
        let (pins, said) = pins(&checked);
        assert_eq!(pins, [(0, 1), (1, 0), (2, 5), (3, 3), (9, 7)]);
        assert_eq!(said, [""; 0]);
        let mut settings = checked.settings.iter();
        let cpu = settings
            .find(|setting| setting.path == "core[2].cpu")
            .unwrap();
        let shown = (cpu.value.as_deref(), cpu.origin.to_string());
        let why = "from nic_queue 0 of eth0: IRQ 40".to_owned();
        assert_eq!(shown, (Some("5"), why));
        // The control core takes one that is left.
        assert_eq!(checked.config.unwrap().control.cpu, 6);
    }

    #[test]
    fn a_queue_that_leads_to_no_cpu_leaves_the_core_where_its_number_is() {
        let (_folder, mut host) = host(&["6", "6", "", "0-3"]);
        host.cpus.truncate(7);
        let instead = "let `corelane tune apply` put its interrupt there, or write cpu";
        let of = |host: &Host, main: &str, files: &[(usize, &str)]| {
            pins(&checked(
                host,
                &format!("[core]\ncpus = \"0-3\"\n{main}"),
                files,
            ))
        };
        let (found, said) = of(&host, "", &[(0, &queue(0)), (1, &queue(1))]);
        assert_eq!(found[..2], [(0, 6), (1, 1)]);
        let why = "packets of eth0:1 are handled on CPU 6, which another core has";
        let line = "cores.d/1.toml:2:13: warning: ";
        assert_eq!(
            said,
            [format!("{line}{why}: core 1 is on CPU 1; {instead}")]
        );

        let (found, said) = of(&host, "", &[(1, &queue(2))]);
        assert_eq!(found[1], (1, 1));
        let why = "the host does not say which CPU handles packets of eth0:2";
        assert_eq!(
            said,
            [format!("{line}{why}: core 1 is on CPU 1; {instead}")]
        );

        // Of several the one of its number, and that it is one of several.
        let (found, said) = of(&host, "", &[(1, &queue(3))]);
        assert_eq!(found[1], (1, 1));
        let why = "packets of eth0:3 are handled on CPU 0-3, this core is CPU 1";
        assert!(said[0].starts_with(&format!("{line}{why}; ")), "{said:?}");
        assert_eq!(said.len(), 1);

        // The control core's, unless that is shared.
        let (found, said) = of(&host, "[control]\ncpu = 6\n", &[(1, &queue(0))]);
        assert_eq!((found[1], said.len()), ((1, 1), 1));
        let shared = "[control]\ncpu = 6\nshare = \"on\"\n";
        let (found, said) = of(&host, shared, &[(1, &queue(0))]);
        assert_eq!((found[1], said.len()), ((1, 6), 0));

        host.cpus.truncate(4);
        let (found, said) = of(&host, "", &[(1, &queue(0))]);
        assert_eq!(found[1], (1, 1));
        let why = "packets of eth0:0 are handled on CPU 6, which this process may not use (0-3)";
        assert_eq!(
            said,
            [format!("{line}{why}: core 1 is on CPU 1; {instead}")]
        );
    }

    #[test]
    fn a_written_cpu_counts_and_what_is_wrong_stays_an_error() {
        let (_folder, mut host) = host(&["5", "2"]);
        let main = "[core]\ncpus = \"0-1\"\n";
        let text = format!("cpu = 3\n{}", queue(0));
        let (found, said) = pins(&checked(&host, main, &[(0, &text)]));
        assert_eq!((found[0], said.len()), ((0, 3), 1));
        let says =
            "cores.d/0.toml:3:13: warning: packets of eth0:0 are handled on CPU 5, this core";
        assert!(said[0].starts_with(says), "{said:?}");

        let twice = [(0, &*queue(0)), (1, &*queue(0))];
        let (found, said) = pins(&checked(&host, main, &twice));
        assert!(found.is_empty());
        let says = "cores.d/1.toml:2:13: nic_queue eth0:0 is another core's too";
        assert!(said.iter().any(|line| line.starts_with(says)), "{said:?}");

        let none = [(0, &*queue(7))];
        let (found, said) = pins(&checked(&host, main, &none));
        assert!(found.is_empty());
        let says = "cores.d/0.toml:2:13: eth0 has 2 receive queues, eth0:7 is none; \
                    write a queue from 0 to 1";
        assert_eq!(said, [says]);

        host.cpus = vec![0];
        let (found, said) = pins(&checked(&host, main, &[(1, &queue(1))]));
        assert!(found.is_empty());
        let says = "cores.d/1.toml:2:13: packets of eth0:1 are handled on CPU 2, which this \
                    process may not use (0), and no CPU is left for core 1; \
                    leave a core out of cpus";
        assert!(said.iter().any(|line| line == says), "{said:?}");
    }

    #[test]
    fn a_core_that_runs_stays_where_it_is_wherever_its_interrupt_goes() {
        let (_folder, mut host) = host(&["5", "2"]);
        host.pinned.insert(0, ("eth0:0".parse().unwrap(), 4));
        let main = "[core]\ncpus = \"0-1\"\n";
        let found = checked(&host, main, &[(0, &queue(0))]);
        assert_eq!(pins(&found).0[0], (0, 4));
        let mut settings = found.settings.iter();
        let cpu = settings
            .find(|setting| setting.path == "core[0].cpu")
            .unwrap();
        let why = "from nic_queue 0 of eth0, as at the start";
        assert_eq!(cpu.origin.to_string(), why);
        // Another queue is another matter.
        let (found, _) = pins(&checked(&host, main, &[(0, &queue(1))]));
        assert_eq!(found[0], (0, 2));
    }
}
