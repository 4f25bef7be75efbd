//! What the kernel, the CPUs and the limits of the process should be.

use std::borrow::Cow;
use std::path::Path;

use super::{Goal, Item, Place, Plan, Standing, Topic, View, Want};

/// Exit latency above which a CPU's sleep is felt in a request, in microseconds.
const SLEEP_MAX_US: u64 = 10;
/// Files that are open beside connections: stores, rings, logs.
const FILES_BESIDE: u64 = 1_024;

/// Settings of the kernel: name, what it should be, and what it costs otherwise.
const SYSCTLS: [(&str, Want, &str); 13] = [
    (
        "kernel.io_uring_disabled",
        Want::Is(Cow::Borrowed("0")),
        "io_uring is refused and corelane falls back to epoll, with more system calls for each \
             request",
    ),
    (
        "kernel.numa_balancing",
        Want::Is(Cow::Borrowed("0")),
        "pages of pinned threads are unmapped to see who uses them: faults of tens of \
             microseconds on the request path",
    ),
    (
        "net.core.somaxconn",
        Want::AtLeast(4_096),
        "connections that arrive together overflow the accept queue and come again a second \
             later",
    ),
    (
        "net.ipv4.tcp_max_syn_backlog",
        Want::AtLeast(8_192),
        "handshakes that arrive together are dropped and come again a second later",
    ),
    (
        "net.core.netdev_max_backlog",
        Want::AtLeast(16_384),
        "packets that wait for a CPU are dropped in bursts",
    ),
    (
        "net.core.rmem_max",
        Want::AtLeast(16 << 20),
        "a socket may not ask for a receive buffer that holds a large request",
    ),
    (
        "net.core.wmem_max",
        Want::AtLeast(16 << 20),
        "a socket may not ask for a send buffer that holds a large request",
    ),
    (
        "net.ipv4.tcp_rmem",
        Want::LargestAtLeast(16 << 20),
        "the window of a connection stops growing below what the network could carry",
    ),
    (
        "net.ipv4.tcp_wmem",
        Want::LargestAtLeast(16 << 20),
        "the send buffer of a connection stops growing below what the network could carry",
    ),
    (
        "net.ipv4.ip_local_port_range",
        Want::Range(10_240, 65_535),
        "one connection for each response: the ports towards one address run out",
    ),
    (
        "net.ipv4.tcp_tw_reuse",
        Want::OneOf(&["1", "2"]),
        "ports of connections that have ended cannot be used for a minute",
    ),
    (
        "net.ipv4.tcp_slow_start_after_idle",
        Want::Is(Cow::Borrowed("0")),
        "a connection that was quiet starts slowly again: a large request takes more round \
             trips",
    ),
    (
        "net.ipv4.tcp_autocorking",
        Want::Is(Cow::Borrowed("0")),
        "small segments wait for others while a queue is not empty",
    ),
];

/// Settings of the whole kernel.
pub(super) fn kernel(view: &View, plan: &mut Plan) {
    for (name, want, why) in SYSCTLS {
        let path = format!("proc/sys/{}", name.replace('.', "/"));
        plan.file(view, &path, (Topic::Sysctl, name), want, why);
    }
    let huge = "sys/kernel/mm/transparent_hugepage";
    plan.file(
        view,
        &format!("{huge}/enabled"),
        (Topic::HugePages, "transparent huge pages"),
        Want::OneOf(&["madvise", "never"]),
        "memory is gathered into huge pages behind our back, with stalls",
    );
    plan.file(
        view,
        &format!("{huge}/defrag"),
        (Topic::HugePages, "transparent huge pages: defrag"),
        Want::OneOf(&["madvise", "never", "defer", "defer+madvise"]),
        "a page fault may compact memory first: milliseconds",
    );
}

/// Clock and sleep of the data cores.
pub(super) fn cpus(view: &View, goal: &Goal, plan: &mut Plan) {
    for cpu in &goal.cpus {
        let folder = format!("sys/devices/system/cpu/cpu{cpu}");
        let path = format!("{folder}/cpufreq/scaling_governor");
        plan.file(
            view,
            &path,
            (Topic::Frequency, &format!("cpu {cpu} governor")),
            Want::Is("performance".into()),
            "the clock falls while a core waits and rises late when a request comes",
        );
        for state in view.list(format!("{folder}/cpuidle")) {
            let state = format!("{folder}/cpuidle/{state}");
            let Some(latency) = view.number(format!("{state}/latency")) else {
                continue;
            };
            if latency <= SLEEP_MAX_US {
                continue;
            }
            let name = view.read(format!("{state}/name")).unwrap_or_default();
            let name = format!("cpu {cpu} sleep state {name} ({latency} us) disabled");
            plan.file(
                view,
                &format!("{state}/disable"),
                (Topic::Sleep, &name),
                Want::Is("1".into()),
                "waking from it takes longer than a request's way through the router",
            );
        }
    }
    let balances = |pid: &String| {
        pid.bytes().all(|byte| byte.is_ascii_digit())
            && view
                .read(Path::new("proc").join(pid).join("comm"))
                .as_deref()
                == Some("irqbalance")
    };
    if view.list("proc").iter().any(balances) {
        plan.notes.push(
            "irqbalance runs and moves interrupts back within seconds: stop it, or keep it off \
             these with --banirq"
                .to_owned(),
        );
    }
}

/// Limits that the service manager gives the process.
pub(super) fn limits(view: &View, goal: &Goal, plan: &mut Plan) {
    let files = goal.connections + FILES_BESIDE;
    limit(
        view,
        plan,
        ("Max open files", "LimitNOFILE"),
        files,
        "each connection is a file: beyond the limit they are refused",
    );
    limit(
        view,
        plan,
        ("Max locked memory", "LimitMEMLOCK"),
        u64::MAX,
        "buffers that are registered with io_uring or CUDA are locked memory",
    );
}

fn limit(view: &View, plan: &mut Plan, names: (&str, &str), least: u64, why: &'static str) {
    let limits = view.read("proc/self/limits").unwrap_or_default();
    let Some(line) = limits.lines().find(|line| line.starts_with(names.0)) else {
        return;
    };
    // Soft limit, hard limit, unit.
    let Some(now) = line[names.0.len()..].split_whitespace().nth(1) else {
        return;
    };
    let word = |value: u64| match value {
        u64::MAX => "infinity".to_owned(),
        value => value.to_string(),
    };
    let value = match now {
        "unlimited" => u64::MAX,
        now => now.parse().unwrap_or(0),
    };
    let fine = value >= least;
    plan.items.push(Item {
        topic: Topic::Limit,
        name: names.0.to_lowercase(),
        now: word(value),
        wanted: if fine { word(value) } else { word(least) },
        why,
        standing: if fine {
            Standing::Fine
        } else {
            Standing::Change
        },
        place: Place::Limit(names.1.to_owned()),
    });
}
