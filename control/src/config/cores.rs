//! The cores: which of them take requests and which is the control core, the CPU of each, and what
//! each is told (`[core]` and `cores.d/<n>.toml`).

use std::collections::BTreeSet;
use std::net::SocketAddr;

use corelane_engine::nic::QueueName;

use super::layers::{Layers, Of};
use super::problem::{Origin, quoted};
use super::value::Value;
use super::words::{Idle, Io, Role, Switch};
use super::{Host, Inputs, cpu_list, keys, pinning, placing};

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
pub(super) fn cores(layers: &mut Layers, inputs: &Inputs) -> (Vec<Core>, ByRole) {
    let host = &inputs.host;
    let (mut wanted, at) = match layers.get(&keys::CORE_CPUS, Of::Once) {
        Some((Value::Cpus(cpus), at)) => (cpus, at),
        _ => (host.cpus.clone(), Origin::Default),
    };
    let role = control_role(layers, host, &mut wanted);
    let (there, missing): (Vec<usize>, Vec<usize>) = (wanted.into_iter())
        .partition(|number| has_cpu(layers, *number) || host.cpus.contains(number));
    let control = role.as_ref().map(|(cpu, _)| *cpu);
    let can = host.cpu_list();
    if there.is_empty() {
        // Nobody chose the default, so it does not stop a process that was put on other CPUs.
        if at == Origin::Default {
            let first = host.cpus.iter().take(4);
            let first = first.filter_map(|&cpu| core(layers, host, cpu));
            let mut cores: Vec<Core> = first.collect();
            by_queue(layers, inputs, &mut cores, control);
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
    let each = there.into_iter();
    let mut cores: Vec<Core> = each
        .filter_map(|number| core(layers, host, number))
        .collect();
    by_queue(layers, inputs, &mut cores, control);
    let mut taken = BTreeSet::new();
    cores.retain(|core| {
        let is_new = taken.insert(core.cpu);
        if !is_new {
            let at = core_origin(layers, core.number, &keys::CORE_CPU);
            let what = format!("CPU {} is another core's already", core.cpu);
            let instead = "write another cpu, or leave the core out of cpus";
            layers.error(&at, what, instead);
        }
        is_new
    });
    cores.sort_by_key(|core| core.cpu);
    found_by_callers(layers, &cores);
    (cores, role)
}

/// Discovery tells one address: some core must listen there.
fn found_by_callers(layers: &mut Layers, cores: &[Core]) {
    if cores.iter().all(|core| core.listen.is_some())
        && let Some(first) = cores.first()
    {
        let at = core_origin(layers, first.number, &keys::CORE_LISTEN);
        let what = "every core has a listen of its own, so callers find none".to_owned();
        layers.error(&at, what, "leave it out of one file at least");
    }
}

/// Pins cores to the CPUs of their queues, where connections are taken at all.
fn by_queue(layers: &mut Layers, inputs: &Inputs, cores: &mut [Core], control: Option<usize>) {
    if !inputs.purpose.routes() {
        return;
    }
    let control = control.or(control_alone(layers));
    pinning::pin(layers, &inputs.host, cores, control);
}

/// The CPU that was written for the control core and no data core may have.
fn control_alone(layers: &Layers) -> Option<usize> {
    let value = |key| layers.typed(key, Of::Once).map(|entry| &entry.value);
    match (value(&keys::CONTROL_CPU), value(&keys::CONTROL_SHARE)) {
        (_, Some(Value::Text(share))) if share == Switch::On.as_str() => None,
        (Some(Value::Int(cpu)), _) => usize::try_from(*cpu).ok(),
        _ => None,
    }
}

/// The value that the file of a core has for a key, unlooked at by anything above it.
fn in_file<'a>(layers: &'a Layers, number: usize, key: &keys::Key) -> Option<&'a Value> {
    let table = layers.cores.get(&number)?.table(keys::Section::Core, 0)?;
    let entry = table.entries.iter().find(|entry| entry.key == key)?;
    Some(&entry.value)
}

/// Whether its file gives it a CPU, by number or by the queue that it serves.
fn has_cpu(layers: &Layers, number: usize) -> bool {
    let queue = in_file(layers, number, &keys::CORE_NIC_QUEUE);
    let queue = matches!(queue, Some(Value::Text(text)) if text.parse::<QueueName>().is_ok());
    queue || in_file(layers, number, &keys::CORE_CPU).is_some()
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
