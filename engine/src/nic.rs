//! Queues of network devices: which interrupt each has, and which CPUs handle its packets.
//!
//! ```text
//! device --queue--> interrupt --affinity--> CPU --RPS, if it is on--> CPUs that do the rest
//! ```
//!
//! Files of the kernel are read below a root directory that tests replace (`/` on a host).

use std::fmt;
use std::fs;
use std::path::Path;
use std::str::FromStr;

use crate::placement::{CPUS_MAX, parse_cpu_list};

/// Longest name of a device that the kernel takes.
const NAME_BYTES_MAX: usize = 15;
/// Queues of a device are numbered below this: the kernel counts them in 16 bits.
pub const QUEUES_MAX: usize = 65_535;

/// A receive queue by name: `eth0:2`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct QueueName {
    /// The device.
    pub device: String,
    /// Its queue, from 0.
    pub queue: usize,
}

/// The text is no name of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not DEVICE:QUEUE; write for example `eth0:2`")]
pub struct NotAQueue;

impl FromStr for QueueName {
    type Err = NotAQueue;

    fn from_str(text: &str) -> Result<QueueName, NotAQueue> {
        // Names of devices may have colons themselves (aliases).
        let (device, queue) = text.rsplit_once(':').ok_or(NotAQueue)?;
        let plain = |byte: u8| byte.is_ascii_graphic() && byte != b'/';
        let named = (1..=NAME_BYTES_MAX).contains(&device.len())
            && device.bytes().all(plain)
            && ![".", ".."].contains(&device);
        let digits = !queue.is_empty() && queue.bytes().all(|byte| byte.is_ascii_digit());
        match queue.parse() {
            Ok(queue) if named && digits && queue < QUEUES_MAX => Ok(QueueName {
                device: device.to_owned(),
                queue,
            }),
            _ => Err(NotAQueue),
        }
    }
}

impl fmt::Display for QueueName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.device, self.queue)
    }
}

/// A receive queue of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Queue {
    /// Its number.
    pub number: usize,
    /// Its interrupt; devices without hardware have none.
    pub irq: Option<u32>,
    /// CPUs that the interrupt goes to, ascending.
    pub irq_cpus: Vec<usize>,
    /// CPUs that RPS hands its packets to, ascending; empty where it is off.
    pub rps_cpus: Vec<usize>,
}

impl Queue {
    /// CPUs that handle its packets as far as connections are concerned; empty where the host does
    /// not say.
    pub fn cpus(&self) -> &[usize] {
        match self.rps_cpus.is_empty() {
            true => &self.irq_cpus,
            false => &self.rps_cpus,
        }
    }

    /// What leads its packets to [`Queue::cpus`]: `IRQ 45`, or `RPS`.
    pub fn led_by(&self) -> String {
        match self.irq.filter(|_| self.rps_cpus.is_empty()) {
            Some(irq) => format!("IRQ {irq}"),
            None => "RPS".to_owned(),
        }
    }
}

/// The network devices of the host, sorted.
pub fn devices(root: &Path) -> Vec<String> {
    let mut names = list(&root.join("sys/class/net"));
    names.sort();
    names
}

/// The NUMA node that a device hangs on; `None` where the host does not say.
pub fn node(root: &Path, device: &str) -> Option<usize> {
    let path = format!("sys/class/net/{device}/device/numa_node");
    // -1 is "none", which does not read as a node.
    fs::read_to_string(root.join(path))
        .ok()?
        .trim()
        .parse()
        .ok()
}

/// The kernel's number of a device.
pub fn index(root: &Path, device: &str) -> Option<u32> {
    let path = format!("sys/class/net/{device}/ifindex");
    fs::read_to_string(root.join(path))
        .ok()?
        .trim()
        .parse()
        .ok()
}

/// The receive queues of a device, by number; `None` if there is no such device.
pub fn queues(root: &Path, device: &str) -> Option<Vec<Queue>> {
    let folder = root.join(format!("sys/class/net/{device}"));
    if !folder.exists() {
        return None;
    }
    let interrupts = interrupts(root, device);
    let queue = |name: String| {
        let number: usize = name.strip_prefix("rx-")?.parse().ok()?;
        let rps = fs::read_to_string(folder.join(format!("queues/{name}/rps_cpus")));
        let own = |sends| {
            let mut all = interrupts.iter();
            all.find(move |irq| irq.queue == number && irq.only_sends == sends)
        };
        let irq = own(false).or_else(|| own(true)).map(|irq| irq.number);
        Some(Queue {
            number,
            irq,
            irq_cpus: irq.map_or_else(Vec::new, |irq| affinity(root, irq)),
            rps_cpus: parse_cpu_mask(&rps.unwrap_or_default()),
        })
    };
    let names = list(&folder.join("queues"));
    let mut queues: Vec<Queue> = names.into_iter().filter_map(queue).collect();
    queues.sort_by_key(|queue| queue.number);
    Some(queues)
}

/// An interrupt of a queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interrupt {
    /// The kernel's number.
    pub number: u32,
    /// The queue that it belongs to.
    pub queue: usize,
    /// It tells of sent packets only.
    pub only_sends: bool,
}

/// Those of a device's interrupts that belong to queues, by their numbers.
pub fn interrupts(root: &Path, device: &str) -> Vec<Interrupt> {
    let table = fs::read_to_string(root.join("proc/interrupts")).unwrap_or_default();
    let folder = root.join(format!("sys/class/net/{device}/device"));
    let mut numbers = list(&folder.join("msi_irqs"));
    // A virtio device is a child of the one that has the interrupts.
    numbers.extend(list(&folder.join("../msi_irqs")));
    let interrupt = |number: String| {
        let mark = format!("{number}:");
        let mut lines = table.lines();
        let line = lines.find(|line| line.trim_start().starts_with(&mark))?;
        let name = line.split_whitespace().next_back()?;
        let lower = name.to_ascii_lowercase();
        Some(Interrupt {
            number: number.parse().ok()?,
            queue: queue_number(name)?,
            only_sends: lower.contains("output") || (lower.contains("tx") && !lower.contains("rx")),
        })
    };
    let mut found: Vec<Interrupt> = numbers.into_iter().filter_map(interrupt).collect();
    found.sort_by_key(|interrupt| interrupt.number);
    found.dedup();
    found
}

/// CPUs that an interrupt goes to: where it really goes if the kernel says that, else where it may.
fn affinity(root: &Path, irq: u32) -> Vec<usize> {
    let folder = root.join(format!("proc/irq/{irq}"));
    let read = |name: &str| {
        let text = fs::read_to_string(folder.join(name)).unwrap_or_default();
        parse_cpu_list(&text).unwrap_or_default()
    };
    match read("effective_affinity_list") {
        cpus if cpus.is_empty() => read("smp_affinity_list"),
        cpus => cpus,
    }
}

/// The queue in the name of an interrupt: `eth0-TxRx-3`, `virtio2-input.0`, `mlx5_comp7@pci:0..`.
pub fn queue_number(name: &str) -> Option<usize> {
    const OTHERS: [&str; 8] = [
        "config", "ctrl", "control", "admin", "async", "mgmnt", "fdir", "event",
    ];
    let name = name.split('@').next()?;
    let lower = name.to_ascii_lowercase();
    if OTHERS.iter().any(|other| lower.contains(other)) {
        return None;
    }
    let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
    let device_only = !stem.contains(['-', '.', '_']);
    (!device_only).then(|| name[stem.len()..].parse().ok())?
}

/// CPUs of a mask in the kernel's form: hexadecimal words of 32 bits, the highest first, commas
/// between. What is none is empty.
pub fn parse_cpu_mask(text: &str) -> Vec<usize> {
    let words = text.trim().rsplit(',');
    let mut cpus = Vec::new();
    for (word, digits) in words.enumerate().take(CPUS_MAX / 32) {
        let Ok(bits) = u32::from_str_radix(digits.trim(), 16) else {
            return Vec::new();
        };
        cpus.extend(
            (0..32)
                .filter(|bit| bits >> bit & 1 == 1)
                .map(|bit| word * 32 + bit),
        );
    }
    cpus
}

fn list(folder: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_queues_are_a_device_and_a_number() {
        let name: QueueName = "eth0:2".parse().unwrap();
        assert_eq!((name.device.as_str(), name.queue), ("eth0", 2));
        assert_eq!(name.to_string(), "eth0:2");
        let longest = "a".repeat(NAME_BYTES_MAX);
        assert!(format!("{longest}:0").parse::<QueueName>().is_ok());
        let too_long = format!("{longest}a:0");
        for wrong in [
            "",
            "eth0",
            "eth0:",
            ":1",
            "eth0:+1",
            "eth0:x",
            "a/b:1",
            "..:1",
            "eth 0:1",
            "eth0:65535",
            &too_long,
        ] {
            assert_eq!(wrong.parse::<QueueName>(), Err(NotAQueue), "{wrong}");
        }
    }

    #[test]
    fn queues_are_known_by_the_names_of_their_interrupts() {
        for (name, queue) in [
            ("eth0-TxRx-3", Some(3)),
            ("virtio2-input.0", Some(0)),
            ("virtio2-output.1", Some(1)),
            ("mlx5_comp7@pci:0000:81:00.0", Some(7)),
            ("ens5-Tx-Rx-12", Some(12)),
            ("virtio2-config", None),
            ("mlx5_async0@pci:0000:81:00.0", None),
            ("ena-mgmnt@pci:0000:00:05.0", None),
            ("eth0", None),
        ] {
            assert_eq!(queue_number(name), queue, "{name}");
        }
    }

    #[test]
    fn masks_are_read_as_the_kernel_writes_them() {
        assert_eq!(parse_cpu_mask("3\n"), [0, 1]);
        assert_eq!(parse_cpu_mask("02,00000001"), [0, 33]);
        assert!(parse_cpu_mask("00,00000000").is_empty());
        assert!(parse_cpu_mask("").is_empty());
        assert!(parse_cpu_mask("xyz").is_empty());
    }

    fn write(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn a_queue_leads_to_its_interrupt_and_its_cpus() {
        let host = tempfile::tempdir().unwrap();
        let root = host.path();
        let table = "           CPU0       CPU1\n \
             24:          0          0  PCI-MSI 0-edge  virtio0-config\n \
             25:        100          0  PCI-MSI 1-edge  virtio0-input.0\n \
             26:          9          0  PCI-MSI 2-edge  virtio0-output.0\n \
             27:          0        100  PCI-MSI 3-edge  virtio0-input.1\n";
        write(root, "proc/interrupts", table);
        for irq in ["24", "25", "26", "27"] {
            write(
                root,
                &format!("sys/class/net/eth0/device/msi_irqs/{irq}"),
                "",
            );
        }
        write(root, "sys/class/net/eth0/device/numa_node", "1\n");
        write(root, "sys/class/net/eth0/ifindex", "7\n");
        for queue in ["rx-0", "rx-1", "rx-10", "tx-0"] {
            write(
                root,
                &format!("sys/class/net/eth0/queues/{queue}/rps_cpus"),
                "0\n",
            );
        }
        write(root, "sys/class/net/eth0/queues/rx-10/rps_cpus", "c\n");
        write(root, "proc/irq/25/smp_affinity_list", "0-1\n");
        write(root, "proc/irq/25/effective_affinity_list", "0\n");
        write(root, "proc/irq/27/smp_affinity_list", "1\n");
        let queues = queues(root, "eth0").unwrap();
        let seen: Vec<(usize, Option<u32>, &[usize])> = queues
            .iter()
            .map(|queue| (queue.number, queue.irq, queue.cpus()))
            .collect();
        let wanted: [(usize, Option<u32>, &[usize]); 3] = [
            (0, Some(25), &[0]),
            (1, Some(27), &[1]),
            (10, None, &[2, 3]),
        ];
        assert_eq!(seen, wanted);
        let led: Vec<String> = queues.iter().map(Queue::led_by).collect();
        assert_eq!(led, ["IRQ 25", "IRQ 27", "RPS"]);
        assert_eq!(
            (node(root, "eth0"), index(root, "eth0")),
            (Some(1), Some(7))
        );
        assert_eq!(super::queues(root, "eth1"), None);
        assert_eq!(devices(root), ["eth0"]);
    }
}
