//! How the machine is set up: NUMA, clock rates, sleep, clock source, and what `corelane tune`
//! would change besides.

use std::hint::black_box;
use std::time::Instant;

use super::{Finding, Outcome, Sight, Weight};
use crate::config::cpu_list;
use crate::tune::{self, Item, Topic};

/// Names of settings that are listed at most.
const NAMED: usize = 8;

/// Adds what is to be changed, with the first few as evidence.
pub(super) fn evidence(mut finding: Finding, items: &[&Item]) -> Finding {
    const SHOWN: usize = 4;
    for item in items.iter().take(SHOWN) {
        let place = match &item.place {
            tune::Place::File(path) => path.display().to_string(),
            tune::Place::Ethtool { device, flag, .. } => {
                format!("ethtool {} {device}", flag.to_ascii_lowercase())
            }
            tune::Place::Limit(_) => "/proc/self/limits".to_owned(),
        };
        finding = finding.seen(format!("{}: {}", item.name, item.now), place);
    }
    match items.len().saturating_sub(SHOWN) {
        0 => finding,
        more => finding.seen(format!("and {more} more"), "corelane tune"),
    }
}

/// What does it: everything that tune would do, or these settings alone.
pub(super) fn remedy(items: &[&Item]) -> String {
    let Some(first) = items.first() else {
        return String::new();
    };
    let alone = tune::command(&first.place, &first.wanted);
    match items.len() {
        1 => format!("`corelane tune apply`, or only this: `{alone}`."),
        more => format!(
            "`corelane tune apply`, or only these, {more} in all: `{alone}`, and so on \
             (`corelane tune plan`)."
        ),
    }
}

/// Data cores and devices on one NUMA node.
pub(super) fn numa(sight: &Sight) -> Outcome {
    let topology = sight.topology();
    let assigned = sight.assignment();
    let nodes = assigned.nodes(&topology);
    if nodes.is_empty() {
        return Outcome::Unseen("/sys/devices/system/cpu does not say how the CPUs lie".into());
    }
    let mut findings = Vec::new();
    if nodes.len() > 1 {
        findings.push(
            Finding::new(
                Weight::Hint,
                format!("the data cores lie on NUMA nodes {}", cpu_list(&nodes)),
            )
            .seen(
                format!("data cores {}", cpu_list(&assigned.data)),
                "/sys/devices/system/node",
            )
            .because("Requests that cross from one to the other cost more.")
            .remedy("Name CPUs of one node in cpus under [core], that of the network device."),
        );
    }
    for device in tune::looked_at(&sight.view, &sight.wish.goal) {
        let path = format!("/sys/class/net/{device}/device/numa_node");
        let node = sight
            .view
            .number(&path)
            .and_then(|node| usize::try_from(node).ok());
        let Some(node) = node.filter(|node| !nodes.contains(node)) else {
            continue;
        };
        let near: Vec<usize> = (topology.cpus.iter())
            .filter(|cpu| cpu.node == node)
            .map(|cpu| cpu.number)
            .collect();
        findings.push(
            Finding::new(
                Weight::Cost,
                format!(
                    "{device} is on NUMA node {node}, the data cores on {}",
                    cpu_list(&nodes)
                ),
            )
            .seen(format!("node {node}"), path)
            .because("Each packet crosses the bus between the processors, both ways.")
            .remedy(format!(
                "Write cpus = \"{}\" under [core], or a part of it.",
                cpu_list(&near)
            )),
        );
    }
    Outcome::of(findings, || format!("all on node {}", cpu_list(&nodes)))
}

/// Governors of the data cores.
pub(super) fn frequency(sight: &Sight) -> Outcome {
    let (all, wrong) = sight.items(Topic::Frequency);
    if all.is_empty() {
        return Outcome::Unseen(
            "no cpufreq here: a virtual machine, or the firmware governs; ask there".into(),
        );
    }
    if wrong.is_empty() {
        return Outcome::Well("the clock of the data cores stays up".into());
    }
    let what = format!(
        "the clock of {} of {} data cores is scaled",
        wrong.len(),
        all.len()
    );
    Outcome::one(
        evidence(Finding::new(Weight::Cost, what), &wrong)
            .because(format!("{}.", sentence(wrong[0].why)))
            .remedy(remedy(&wrong)),
    )
}

/// Sleep states of the data cores.
pub(super) fn sleep(sight: &Sight) -> Outcome {
    let (all, wrong) = sight.items(Topic::Sleep);
    if all.is_empty() {
        let idle = format!(
            "/sys/devices/system/cpu/cpu{}/cpuidle",
            sight.wish.goal.cpus[0]
        );
        return match sight.view.list(&idle).is_empty() {
            true => Outcome::Unseen("no cpuidle here: the hypervisor, or nobody, decides".into()),
            false => Outcome::Well("no state takes more than 10 us to wake from".into()),
        };
    }
    if wrong.is_empty() {
        return Outcome::Well("deep states of the data cores are off".into());
    }
    Outcome::one(
        evidence(
            Finding::new(Weight::Cost, "data cores may sleep deeply"),
            &wrong,
        )
        .because(format!("{}.", sentence(wrong[0].why)))
        .remedy(remedy(&wrong)),
    )
}

/// What the clock is read from.
pub(super) fn clock_source(sight: &Sight) -> Outcome {
    const FOLDER: &str = "/sys/devices/system/clocksource/clocksource0";
    let file = format!("{FOLDER}/current_clocksource");
    let Some(source) = sight.view.read(&file) else {
        return Outcome::Unseen(format!("{file} is not there"));
    };
    let ns = clock_read_ns();
    let weight = match source.as_str() {
        "tsc" | "arch_sys_counter" | "timebase" | "riscv_clocksource" => {
            return Outcome::Well(format!("{source}, {ns} ns to read"));
        }
        // Read without a system call, from a page of the hypervisor's.
        "kvm-clock" | "hyperv_clocksource_tsc_page" => Weight::Hint,
        _ => Weight::Cost,
    };
    let available = sight
        .view
        .read(format!("{FOLDER}/available_clocksource"))
        .unwrap_or_default();
    let remedy = match available.split_whitespace().any(|name| name == "tsc") {
        true => format!("`echo tsc > {file}`, and `clocksource=tsc` at boot."),
        false => "`dmesg | grep -i tsc` says why the kernel does not trust the TSC; in a virtual \
             machine the hypervisor must offer an invariant one, on hardware add `tsc=reliable` \
             at boot."
            .to_owned(),
    };
    Outcome::one(
        Finding::new(weight, format!("the clock is read from {source}, not tsc"))
            .seen(format!("{source}; available: {available}"), file)
            .seen(format!("{ns} ns to read it"), "measured")
            .because(match weight {
                Weight::Hint => "It is read without a system call, but slower than the TSC.",
                _ => {
                    "Every look at the clock is a system call or a read over the bus, several for \
                     each request."
                }
            })
            .remedy(remedy),
    )
}

/// The best of some rounds, as others may run meanwhile.
fn clock_read_ns() -> u64 {
    const READS: u32 = 2_000;
    let round = || {
        let began = Instant::now();
        for _ in 0..READS {
            black_box(Instant::now());
        }
        (began.elapsed() / READS).as_nanos()
    };
    let best = (0..5).map(|_| round()).min().unwrap_or(0);
    u64::try_from(best).unwrap_or(u64::MAX)
}

/// What tune would change and no other check has named.
pub(super) fn settings(sight: &Sight) -> Outcome {
    let named = |item: &&Item| {
        !matches!(
            item.topic,
            Topic::Frequency
                | Topic::Sleep
                | Topic::HugePages
                | Topic::Interrupt
                | Topic::Receive
                | Topic::Limit
        ) && item.name != "kernel.io_uring_disabled"
    };
    let rest: Vec<&Item> = sight.plan().changes().filter(named).collect();
    let mut notes = sight.plan().notes.iter();
    // Its queues, rings and coalescing are not seen then.
    let blind = notes.find(|note| note.starts_with("ethtool"));
    if rest.is_empty() {
        return match blind {
            Some(note) => Outcome::Unseen(note.clone()),
            None => Outcome::Well("corelane tune would change nothing more".into()),
        };
    }
    let names: Vec<&str> = rest
        .iter()
        .take(NAMED)
        .map(|item| item.name.as_str())
        .collect();
    let more = match rest.len().saturating_sub(NAMED) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let mut finding = Finding::new(
        Weight::Hint,
        format!("{} other settings are not as they should be", rest.len()),
    )
    .seen(format!("{}{more}", names.join(", ")), "corelane tune");
    if let Some(note) = blind {
        finding = finding.seen(note.as_str(), "not seen");
    }
    Outcome::one(
        finding
            .because("Each costs something under load; nothing shows that it does now.")
            .remedy("`corelane tune` says what and why, `corelane tune apply` changes them."),
    )
}

/// With a capital letter.
pub(super) fn sentence(text: &str) -> String {
    let mut letters = text.chars();
    match letters.next() {
        Some(first) => first.to_uppercase().chain(letters).collect(),
        None => String::new(),
    }
}
