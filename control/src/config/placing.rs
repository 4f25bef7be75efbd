//! Which core takes which connections: queues of network devices, steering, what becomes of an
//! imbalance.

use std::path::Path;

use corelane_engine::balance;
use corelane_engine::nic::{self, Queue, QueueName};
use corelane_engine::placement::Topology;
use corelane_engine::steering;

use super::keys;
use super::layers::{Layers, Of};
use super::problem::{Origin, quoted};
use super::words::{Idle, Imbalance, Steering};
use super::{Core, cpu_list};

/// Queues that are named as alternatives, at most.
const NAMED_MAX: usize = 8;

/// `[core] nic_queue` of one core; its text has been checked.
pub(super) fn queue(layers: &mut Layers, of: Of) -> Option<QueueName> {
    let (text, _) = layers.text(&keys::CORE_NIC_QUEUE, of)?;
    text.parse().ok()
}

/// `[server] imbalance`.
pub(super) fn imbalance(layers: &mut Layers) -> balance::Imbalance {
    let key = &keys::SERVER_IMBALANCE;
    match layers.word(key, Imbalance::parse, Imbalance::Keep) {
        Imbalance::Keep => balance::Imbalance::Keep,
        Imbalance::LeastConnections => balance::Imbalance::LeastConnections,
    }
}

/// `[server] steering`, with the queues that cores serve looked up below `root`.
pub(super) fn steering(layers: &mut Layers, cores: &[Core], root: &Path) -> steering::Steering {
    let word = layers.word(&keys::SERVER_STEERING, Steering::parse, Steering::Auto);
    let steering_at = super::resolve::origin(layers, &keys::SERVER_STEERING);
    let mut queues = Vec::new();
    let mut by_number: Vec<&Core> = cores.iter().collect();
    by_number.sort_by_key(|core| core.number);
    for core in by_number {
        let Some(name) = &core.nic_queue else {
            continue;
        };
        let at = origin(layers, core, &keys::CORE_NIC_QUEUE);
        if queues.contains(&name) {
            let what = format!("nic_queue {name} is another core's too");
            let instead = "write it for one core, in cores.d/<n>.toml";
            layers.error(&at, what, instead);
        } else {
            look_up(layers, core, name, &at, root);
        }
        queues.push(name);
    }
    polling(layers, cores);
    match word {
        Steering::Auto if queues.is_empty() => steering::Steering::Hash,
        Steering::Auto => steering::Steering::Queue,
        Steering::Off => steering::Steering::Hash,
        Steering::Cpu => steering::Steering::Cpu,
        Steering::Queue => {
            if queues.is_empty() {
                let what = "steering = \"queue\", and no core has a nic_queue".to_owned();
                let instead = "write nic_queue in cores.d/<n>.toml, or steering = \"cpu\"";
                layers.error(&steering_at, what, instead);
            }
            steering::Steering::Queue
        }
    }
}

/// Where the value of one core came from.
pub(super) fn origin(layers: &Layers, core: &Core, key: &keys::Key) -> Origin {
    let path = format!("core[{}].{}", core.number, key.name);
    let mut settings = layers.settings.iter();
    let found = settings.find(|setting| setting.path == path);
    found.map_or(Origin::Default, |setting| setting.origin.clone())
}

/// Whether the queue is there, and its packets are where the core is.
fn look_up(layers: &mut Layers, core: &Core, name: &QueueName, at: &Origin, root: &Path) {
    let device = &name.device;
    let Some(queues) = nic::queues(root, device) else {
        let what = format!("there is no network device {}", quoted(device));
        let others = nic::devices(root).join(", ");
        layers.error(at, what, format!("write one of: {others}"));
        return;
    };
    let Some(queue) = queues.iter().find(|queue| queue.number == name.queue) else {
        let what = format!(
            "{device} has {} receive queues, {name} is none",
            queues.len()
        );
        let last = queues.len().saturating_sub(1);
        layers.error(at, what, format!("write a queue from 0 to {last}"));
        return;
    };
    let handled = queue.cpus();
    // Why a core that goes by its queue is elsewhere was said when it was pinned.
    let by_queue = matches!(origin(layers, core, &keys::CORE_CPU), Origin::Host { .. });
    let pinned = !by_queue || handled.contains(&core.cpu);
    if pinned && !handled.is_empty() && handled != [core.cpu] {
        let what = format!(
            "packets of {name} are handled on CPU {}, this core is CPU {}",
            cpu_list(handled),
            core.cpu
        );
        layers.warn(at, what, alternative(device, &queues, core.cpu));
    }
    let topology = Topology::read(&root.join("sys/devices/system"));
    let own = topology.cpu(core.cpu).map(|cpu| cpu.node);
    if let (Some(node), Some(own)) = (nic::node(root, device), own)
        && node != own
    {
        let near = topology.cpus.iter().filter(|cpu| cpu.node == node);
        let near: Vec<usize> = near.map(|cpu| cpu.number).collect();
        let what = format!(
            "{device} is on NUMA node {node}, CPU {} on node {own}",
            core.cpu
        );
        layers.warn(
            at,
            what,
            format!("use CPUs of node {node}: {}", cpu_list(&near)),
        );
    }
}

/// What to do about a queue whose packets are elsewhere.
fn alternative(device: &str, queues: &[Queue], cpu: usize) -> String {
    let tune = "let `corelane tune apply` put its interrupt there";
    let here = queues.iter().filter(|queue| queue.cpus() == [cpu]);
    let here: Vec<String> = here
        .take(NAMED_MAX)
        .map(|queue| format!("{device}:{}", queue.number))
        .collect();
    match here.is_empty() {
        true => tune.to_owned(),
        false => format!("write {} instead, or {tune}", here.join(" or ")),
    }
}

/// Polling of receive queues that does not go with what else a core does.
fn polling(layers: &mut Layers, cores: &[Core]) {
    for core in cores.iter().filter(|core| core.busy_poll_us > 0) {
        if core.idle == Idle::Spin && core.busy_poll_us > 100 {
            let at = origin(layers, core, &keys::CORE_BUSY_POLL_US);
            let what = format!(
                "busy_poll_us is {} with idle = \"spin\": tasks of the core wait as long",
                core.busy_poll_us
            );
            layers.warn(&at, what, "write 100 or less, or idle = \"block\"");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::config::{Host, Inputs, Main, Problem, Purpose};
    use crate::env::Env;

    /// What is said of `text` and the files of cores 0, 1, ... on a host below `root` where the
    /// queues of eth0 are on CPUs 1, 3, 3.
    fn said(root: &Path, text: &str, cores: &[&str]) -> (steering::Steering, Vec<String>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("corelane.toml");
        let route = "[[route]]\nlisten = \"a/b/c\"\ntarget = \"a/d/c\"\n[core]\ncpus = \"0-3\"\n";
        fs::write(&path, format!("{route}{text}")).unwrap();
        fs::create_dir(folder.path().join("cores.d")).unwrap();
        for (number, text) in cores.iter().enumerate() {
            let path = folder.path().join(format!("cores.d/{number}.toml"));
            fs::write(path, format!("[core]\n{text}")).unwrap();
        }
        let inputs = Inputs {
            purpose: Purpose::Serve,
            main: Main::File(path),
            overrides: Vec::new(),
            env: Env::default(),
            host: Host {
                cpus: (0..4).collect(),
                root: root.to_owned(),
                ..Host::default()
            },
        };
        let mut layers = super::super::layers(&inputs);
        let (cores, _) = super::super::cores::cores(&mut layers, &inputs);
        let by = steering(&mut layers, &cores, root);
        let problems = layers.problems.iter().map(Problem::to_string).collect();
        (by, problems)
    }

    fn host() -> tempfile::TempDir {
        let host = tempfile::tempdir().unwrap();
        let file = |path: &str, text: &str| {
            let path = host.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        for (queue, mask) in [("rx-0", "2"), ("rx-1", "8"), ("rx-2", "8")] {
            file(&format!("sys/class/net/eth0/queues/{queue}/rps_cpus"), mask);
        }
        file("sys/class/net/eth0/device/numa_node", "1");
        file("sys/devices/system/cpu/online", "0-3");
        file("sys/devices/system/node/online", "0-1");
        file("sys/devices/system/node/node0/cpulist", "0-1");
        file("sys/devices/system/node/node1/cpulist", "2-3");
        host
    }

    #[test]
    fn a_queue_is_held_against_the_host() {
        let host = host();
        let on = |cpu: usize, queue: &str| format!("cpu = {cpu}\nnic_queue = \"{queue}\"\n");
        let said = |files: &[&str]| said(host.path(), "", files).1;
        let first = |queue: &str| said(&[&on(0, queue)]).remove(0);
        let text = first("eth1:0");
        assert!(
            text.contains("no network device \"eth1\"; write one of: eth0"),
            "{text}"
        );
        let text = first("eth0:3");
        assert!(
            text.contains("has 3 receive queues, eth0:3 is none"),
            "{text}"
        );
        let text = first("eth0:1");
        assert!(
            text.contains("are handled on CPU 3, this core is CPU 0"),
            "{text}"
        );
        assert!(text.contains("let `corelane tune apply`"), "{text}");
        let all = said(&[&on(0, "eth0:1")]);
        assert!(
            all[1].contains("is on NUMA node 1, CPU 0 on node 0"),
            "{all:?}"
        );
        assert!(all[1].contains("use CPUs of node 1: 2-3"), "{all:?}");
        assert_eq!(all.len(), 2, "{all:?}");
        let twice = said(&[&on(1, "eth0:0"), &on(0, "eth0:0")]);
        let twice = twice
            .iter()
            .filter(|text| text.contains("1.toml:3:13: nic_queue eth0:0 is another core's too"));
        assert_eq!(twice.count(), 1);
    }

    #[test]
    fn queues_of_the_core_are_named_where_there_are_some() {
        let host = host();
        let queues = nic::queues(host.path(), "eth0").unwrap();
        let text = alternative("eth0", &queues, 3);
        assert!(
            text.starts_with("write eth0:1 or eth0:2 instead, or "),
            "{text}"
        );
    }

    #[test]
    fn a_named_queue_is_steered_by_unless_it_is_said() {
        let host = host();
        let by = |text: &str| said(host.path(), text, &[]).0;
        assert_eq!(by(""), steering::Steering::Hash);
        assert_eq!(by("nic_queue = \"eth0:0\"\n"), steering::Steering::Queue);
        let cpu = "nic_queue = \"eth0:0\"\n[server]\nsteering = \"cpu\"\n";
        assert_eq!(by(cpu), steering::Steering::Cpu);
        let off = "nic_queue = \"eth0:0\"\n[server]\nsteering = \"off\"\n";
        assert_eq!(by(off), steering::Steering::Hash);
    }
}
