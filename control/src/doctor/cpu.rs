//! Time that the data cores do not get: quota, threads of the same physical core, others who run,
//! the hypervisor.

use corelane_engine::placement::{CpuQuota, cpu_groups};

use super::{Finding, Outcome, Sight, Weight};
use crate::config::cpu_list;

/// A sibling that is busier than this is felt, in percent.
const SIBLING_BUSY: f64 = 20.0;
/// Tasks that wait for a CPU for more of the time than this, in percent.
const PRESSURE: f64 = 10.0;
/// Time taken by the hypervisor, in percent: now, and since the host started.
const STEAL: f64 = 3.0;
const STEAL_EVER: f64 = 1.0;

const STAT: &str = "/proc/stat";

/// The control group's quota of CPU time, and whether it stops us.
pub(super) fn quota(sight: &Sight) -> Outcome {
    let groups = cpu_groups(&sight.view.path("/"));
    let Some(own) = groups.first() else {
        return Outcome::Unseen("no control group of this process is to be seen".into());
    };
    let used = sight.assignment().used().len();
    let limited = |group: &std::path::PathBuf| Some((CpuQuota::of_group(group)?, group.clone()));
    let tightest = groups
        .iter()
        .filter_map(limited)
        .min_by(|(one, _), (other, _)| one.cpus().total_cmp(&other.cpus()));
    let throttled = sight.counter("cgroup.nr_throttled");
    let rising = throttled.is_some_and(|count| count.rise > 0);
    let at = |folder: &std::path::Path, name: &str| sight.shown(&folder.join(name));
    let Some((quota, group)) = tightest else {
        return Outcome::Well("no quota of CPU time".into());
    };
    let file = match group.join("cpu.max").exists() {
        true => "cpu.max",
        false => "cpu.cfs_quota_us",
    };
    let short = quota.cpus() < used as f64;
    if !short && !rising {
        return Outcome::Well(format!("{:.2} CPUs for {used}", quota.cpus()));
    }
    let what = match rising {
        true => "threads are stopped because the quota of CPU time is used up".to_owned(),
        false => format!("the quota is {:.2} CPUs and {used} are used", quota.cpus()),
    };
    let weight = if rising { Weight::Fault } else { Weight::Cost };
    let mut finding = Finding::new(weight, what).seen(
        format!(
            "{:.2} CPUs: {} us in each {} us",
            quota.cpus(),
            quota.quota_us,
            quota.period_us
        ),
        at(&group, file),
    );
    if let Some(count) = throttled {
        finding = finding.seen(
            format!(
                "nr_throttled: {}, {} of them just now",
                count.total, count.rise
            ),
            at(own, "cpu.stat"),
        );
    }
    Outcome::one(
        finding
            .because(format!(
                "A control group that has used its quota stands still until the next period of \
                 {} us: that is the tail of the latency.",
                quota.period_us
            ))
            .remedy(
                "Remove the limit (`systemctl set-property UNIT CPUQuota=`, no `limits.cpu` in \
                 Kubernetes, no `--cpus` of the container) and keep the process to CPUs of its own \
                 instead; or name fewer cpus under [core].",
            ),
    )
}

/// Threads of the data cores' physical cores: ours, or somebody's who is busy.
pub(super) fn siblings(sight: &Sight) -> Outcome {
    let topology = sight.topology();
    if topology.cpus.is_empty() {
        return Outcome::Unseen("/sys/devices/system/cpu does not say how the CPUs lie".into());
    }
    let assigned = sight.assignment();
    let mut findings = Vec::new();
    let siblings =
        |cpu: usize| format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
    let shared = assigned.shared(&topology);
    for (cpu, other) in &shared {
        findings.push(
            Finding::new(
                Weight::Cost,
                format!("CPUs {cpu} and {other}, both ours, are threads of one physical core"),
            )
            .seen(format!("siblings: {cpu} and {other}"), siblings(*cpu))
            .because("They share its units and caches, and slow each other by a third or more.")
            .remedy(
                "Name one thread of each physical core in cpus under [core], and give the control \
                 core (cpu under [control]) one of its own.",
            ),
        );
    }
    let ours = assigned.used();
    for cpu in &assigned.data {
        let others = topology.cpu(*cpu).map_or(&[][..], |cpu| &cpu.siblings);
        for other in others.iter().filter(|other| !ours.contains(other)) {
            let Some((now, _)) = sight.ticks(*other) else {
                continue;
            };
            let busy = now.percent(now.busy);
            if busy < SIBLING_BUSY {
                continue;
            }
            findings.push(
                Finding::new(
                    Weight::Cost,
                    format!("data core {cpu} shares its physical core with CPU {other}, busy"),
                )
                .seen(format!("CPU {other}: {busy:.0} % busy just now"), STAT)
                .seen(format!("siblings: {cpu} and {other}"), siblings(*cpu))
                .because("Whoever runs on the sibling takes units and caches from the data core.")
                .remedy(format!(
                    "Keep others off it (`isolcpus={other}` at boot, AllowedCPUs= of their units), \
                     or take it offline: `echo 0 > /sys/devices/system/cpu/cpu{other}/online`."
                )),
            );
        }
    }
    let alone = assigned
        .data
        .iter()
        .all(|cpu| topology.cpu(*cpu).is_none_or(|cpu| cpu.siblings.len() < 2));
    Outcome::of(findings, || match alone {
        true => "the data cores have no siblings".into(),
        false => "the siblings of the data cores are quiet".into(),
    })
}

/// Whether tasks wait for CPUs, by the kernel's own account.
pub(super) fn pressure(sight: &Sight) -> Outcome {
    const FILE: &str = "/proc/pressure/cpu";
    let text = sight.view.read(FILE).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("some "));
    let field = |name: &str| {
        let mut words = line?.split_whitespace();
        let value = words.find_map(|word| word.strip_prefix(name)?.strip_prefix('='))?;
        value.parse::<f64>().ok()
    };
    let Some(some) = field("avg10") else {
        return Outcome::Unseen(format!(
            "{FILE} is not there: the kernel keeps no account of pressure (psi=1 at boot)"
        ));
    };
    let data = sight.assignment().data;
    if some < PRESSURE {
        return Outcome::Well(format!("tasks wait for a CPU {some:.1} % of the time"));
    }
    let busy = |cpu: &usize| {
        let (now, _) = sight.ticks(*cpu)?;
        Some(format!("CPU {cpu} {:.0} %", now.percent(now.busy)))
    };
    let busy: Vec<String> = data.iter().filter_map(busy).take(8).collect();
    let mut finding = Finding::new(
        Weight::Cost,
        format!("tasks wait for a CPU {some:.0} % of the time"),
    )
    .seen(format!("some avg10={some:.2}"), FILE);
    if !busy.is_empty() {
        finding = finding.seen(format!("data cores busy: {}", busy.join(", ")), STAT);
    }
    Outcome::one(
        finding
            .because(
                "More runs here than there are CPUs for; a data core that is scheduled away \
                 answers milliseconds later.",
            )
            .remedy(format!(
                "Find it with `top -H`, and keep it off the data cores ({}): AllowedCPUs= of its \
                 unit, `taskset`, or `isolcpus={}` at boot.",
                cpu_list(&data),
                cpu_list(&data)
            )),
    )
}

/// Time that the hypervisor gives to others.
pub(super) fn steal(sight: &Sight) -> Outcome {
    let used = sight.assignment().used();
    let times: Vec<_> = used.iter().filter_map(|cpu| sight.ticks(*cpu)).collect();
    if times.is_empty() {
        return Outcome::Unseen(format!("{STAT} has no times of our CPUs"));
    }
    let worst = |part: fn(&(super::sight::Ticks, super::sight::Ticks)) -> f64| {
        times.iter().map(part).fold(0.0, f64::max)
    };
    let now = worst(|(now, _)| now.percent(now.steal));
    let ever = worst(|(_, ever)| ever.percent(ever.steal));
    let weight = match (now >= STEAL, ever >= STEAL_EVER) {
        (true, _) => Weight::Cost,
        (false, true) => Weight::Hint,
        (false, false) => return Outcome::Well(format!("{ever:.1} % since the start")),
    };
    let what = match weight {
        Weight::Cost => "the hypervisor takes time of our CPUs",
        _ => "the hypervisor has taken time of our CPUs, if not just now",
    };
    Outcome::one(
        Finding::new(weight, what)
            .seen(
                format!("steal, worst CPU: {now:.1} % just now, {ever:.1} % since the start"),
                STAT,
            )
            .because("Another guest of the same machine runs while ours is ready to.")
            .remedy(
                "Nothing inside this guest helps: ask for dedicated CPUs (no burstable type, no \
                 overcommit), and have the host pin them.",
            ),
    )
}
