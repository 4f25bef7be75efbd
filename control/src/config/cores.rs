//! The cores: which of them take requests and which is the control core, the CPU of each, and what
//! each is told (`[core]` and `cores.d/<n>.toml`).

use std::collections::BTreeSet;
use std::net::SocketAddr;

use corelane_engine::nic::QueueName;

use super::layers::{Layers, Of};
use super::problem::{Origin, quoted};
use super::value::Value;
use super::words::{Idle, Io, Role};
use super::{Host, cpu_list, keys, placing};

/// Sockets and files that are open besides connections: rings, listeners, stores.
const OTHER_FILES: u64 = 64;

/// `[core]`, of one data core.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Core {
    /// What `cpus` and its file in `cores.d/` call it.
    pub number: usize,
    /// The CPU that it is pinned to.
    pub cpu: usize,
    /// Memory node that its memory is taken from; None: that of its CPU.
    pub numa_node: Option<u32>,
    /// Where it listens by itself; None: where all do.
    pub listen: Option<SocketAddr>,
    /// Entries of its io_uring, a power of two.
    pub ring_depth: u32,
    /// What it does with nothing to do.
    pub idle: Idle,
    /// Which kernel interface moves bytes.
    pub io: Io,
    /// The queue of a network device whose connections it takes.
    pub nic_queue: Option<QueueName>,
    /// How long it polls its receive queues before it sleeps; 0: not at all.
    pub busy_poll_us: u32,
    /// Sockets at most.
    pub connections_max: u32,
    /// Size of a receive buffer.
    pub buffer_bytes: u32,
    /// Receive buffers, a power of two.
    pub buffers: u16,
    /// Unanswered requests at most.
    pub in_flight_max: u32,
    /// Bytes waiting for one instance's socket at most.
    pub upstream_queue_bytes: u32,
    /// Connections to instances at most.
    pub upstreams_max: u32,
    /// Instances that it may know.
    pub instances_max: u32,
    /// Records of the flight recorder.
    pub flight_records: u32,
}

/// A CPU, and where it was said that it is the control core's.
pub(super) type ByRole = Option<(usize, Origin)>;

/// The data cores that this machine has, and the control core if one of `cores.d/` is it.
pub(super) fn cores(layers: &mut Layers, host: &Host) -> (Vec<Core>, ByRole) {
    let (mut wanted, at) = match layers.get(&keys::CORE_CPUS, Of::Once) {
        Some((Value::Cpus(cpus), at)) => (cpus, at),
        _ => (host.cpus.clone(), Origin::Default),
    };
    let role = control_role(layers, host, &mut wanted);
    let (there, missing): (Vec<usize>, Vec<usize>) = (wanted.into_iter())
        .partition(|number| has_cpu(layers, *number) || host.cpus.contains(number));
    let can = host.cpu_list();
    if there.is_empty() {
        // Nobody chose the default, so it does not stop a process that was put on other CPUs.
        if at == Origin::Default {
            let first = host.cpus.iter().take(4);
            let cores = first.filter_map(|&cpu| core(layers, host, cpu)).collect();
            return (cores, role);
        }
        let what = format!("cpus names no CPU that this process may use ({can})");
        layers.error(&at, what, format!("write cpus = \"{can}\" or a part of it"));
    } else if !missing.is_empty() && at != Origin::Default {
        let what = format!(
            "this process may not use CPU {} (only {can})",
            cpu_list(&missing)
        );
        layers.warn(
            &at,
            what,
            format!("going on with cpus = \"{}\"", cpu_list(&there)),
        );
    }
    let by_role = |number: &usize| is_control(layers, *number);
    let unused = layers.cores.iter();
    let unused = unused.filter(|(number, _)| !there.contains(number) && !by_role(number));
    let unused: Vec<_> = unused.map(|(cpu, file)| (*cpu, file.start())).collect();
    for (cpu, at) in unused {
        let what = format!("CPU {cpu} is no data core, so this file does nothing");
        layers.warn(
            &at,
            what,
            format!("add {cpu} to cpus under [core], or remove the file"),
        );
    }
    let mut taken = BTreeSet::new();
    let mut cores = Vec::with_capacity(there.len());
    for number in there {
        let Some(core) = core(layers, host, number) else {
            continue;
        };
        if taken.insert(core.cpu) {
            cores.push(core);
        } else {
            let at = core_origin(layers, core.number, &keys::CORE_CPU);
            let what = format!("CPU {} is another core's already", core.cpu);
            layers.error(
                &at,
                what,
                "write another cpu, or leave the core out of cpus",
            );
        }
    }
    cores.sort_by_key(|core| core.cpu);
    if cores.iter().all(|core| core.listen.is_some())
        && let Some(first) = cores.first()
    {
        let at = core_origin(layers, first.number, &keys::CORE_LISTEN);
        let what = "every core has a listen of its own, so callers find none".to_owned();
        layers.error(&at, what, "leave it out of one file at least");
    }
    (cores, role)
}

/// The value that the file of a core has for a key, unlooked at by anything above it.
fn in_file<'a>(layers: &'a Layers, number: usize, key: &keys::Key) -> Option<&'a Value> {
    let table = layers.cores.get(&number)?.table(keys::Section::Core, 0)?;
    let entry = table.entries.iter().find(|entry| entry.key == key)?;
    Some(&entry.value)
}

fn has_cpu(layers: &Layers, number: usize) -> bool {
    in_file(layers, number, &keys::CORE_CPU).is_some()
}

fn is_control(layers: &Layers, number: usize) -> bool {
    let role = in_file(layers, number, &keys::CORE_ROLE);
    matches!(role, Some(Value::Text(text)) if text == Role::Control.as_str())
}

/// Takes the cores that are the control core out of the data cores.
fn control_role(layers: &mut Layers, host: &Host, wanted: &mut Vec<usize>) -> ByRole {
    let numbers: Vec<usize> = layers.cores.keys().copied().collect();
    let mut found: ByRole = None;
    for number in numbers {
        if !is_control(layers, number) {
            continue;
        }
        wanted.retain(|other| *other != number);
        let cpu = pinned(layers, host, number);
        let _ = layers.get(&keys::CORE_ROLE, Of::Core(number));
        let at = core_origin(layers, number, &keys::CORE_ROLE);
        if found.is_some() {
            let what = "role = \"control\" is another core's already".to_owned();
            layers.error(&at, what, "write it in one file only");
        }
        found = found.or(cpu.map(|cpu| (cpu, at)));
    }
    found
}

/// The CPU of a core: its number, unless its file has another.
fn pinned(layers: &mut Layers, host: &Host, number: usize) -> Option<usize> {
    let (cpu, at) = match layers.get(&keys::CORE_CPU, Of::Core(number)) {
        None => return Some(number),
        Some((Value::Int(cpu), at)) => (usize::try_from(cpu).unwrap_or(usize::MAX), at),
        Some((_, at)) => (host.cpus.last().copied().unwrap_or_default(), at),
    };
    if host.cpus.contains(&cpu) {
        return Some(cpu);
    }
    let can = host.cpu_list();
    let what = format!("cpu is {cpu}, which this process may not use ({can})");
    layers.error(&at, what, r#"write one of these, or "last""#);
    None
}

fn core_origin(layers: &Layers, number: usize, key: &keys::Key) -> Origin {
    let path = format!("core[{number}].{}", key.name);
    let mut found = layers.settings.iter().rev();
    let found = found.find(|setting| setting.path == path);
    found.map_or(Origin::Default, |setting| setting.origin.clone())
}

fn core(layers: &mut Layers, host: &Host, number: usize) -> Option<Core> {
    let of = Of::Core(number);
    let cpu = pinned(layers, host, number);
    // A word of the contract that has only one value here: read, so that it shows.
    let _ = layers.get(&keys::CORE_ROLE, of);
    let core = Core {
        number,
        cpu: cpu.unwrap_or(number),
        numa_node: layers.number(&keys::CORE_NUMA_NODE, of),
        listen: own_listen(layers, of),
        ring_depth: layers.int(&keys::CORE_RING_DEPTH, of),
        idle: layers.word_of(&keys::CORE_IDLE, of, Idle::parse, Idle::Block),
        io: layers.word_of(&keys::CORE_IO, of, Io::parse, Io::Auto),
        nic_queue: placing::queue(layers, of),
        busy_poll_us: layers.int(&keys::CORE_BUSY_POLL_US, of),
        connections_max: layers.int(&keys::CORE_CONNECTIONS_MAX, of),
        buffer_bytes: layers.int(&keys::CORE_BUFFER_BYTES, of),
        buffers: layers.int(&keys::CORE_BUFFERS, of),
        in_flight_max: layers.int(&keys::CORE_IN_FLIGHT_MAX, of),
        upstream_queue_bytes: layers.int(&keys::CORE_UPSTREAM_QUEUE_BYTES, of),
        upstreams_max: layers.int(&keys::CORE_UPSTREAMS_MAX, of),
        instances_max: layers.int(&keys::CORE_INSTANCES_MAX, of),
        flight_records: layers.int(&keys::CORE_FLIGHT_RECORDS, of),
    };
    cpu.map(|_| core)
}

/// The address that a core has for itself.
fn own_listen(layers: &mut Layers, of: Of) -> Option<SocketAddr> {
    let (text, at) = layers.text(&keys::CORE_LISTEN, of)?;
    let address = text.trim().parse().ok();
    if address.is_none() {
        let what = format!("listen is {}, not IP:PORT", quoted(&text));
        layers.error(&at, what, r#"write it like "127.0.0.1:7001""#);
    }
    address
}

/// Whether the kernel lets us have as many sockets as are promised.
pub(super) fn open_files(layers: &mut Layers, host: &Host, cores: &[Core]) {
    let Some(files_max) = host.files_max else {
        return;
    };
    let at = cores.iter().map(|core| {
        let path = format!("core[{}].connections_max", core.number);
        let found = layers.settings.iter().find(|setting| setting.path == path);
        found.map_or(Origin::Default, |setting| setting.origin.clone())
    });
    // Nobody asked for the default, so it is taken as far as the limit goes.
    let Some(at) = at.min().filter(|at| *at != Origin::Default) else {
        return;
    };
    let sockets: u64 = cores
        .iter()
        .map(|core| u64::from(core.connections_max))
        .sum();
    if sockets + OTHER_FILES > files_max {
        let what = format!("connections_max of all cores is {sockets}, open files {files_max}");
        let instead = format!("raise the limit (ulimit -n {})", sockets + OTHER_FILES);
        layers.warn(&at, what, instead);
    }
}
