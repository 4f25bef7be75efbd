//! A healthy host made of files, each problem put into it, and what the doctor says then.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use corelane_engine::placement::ControlCpu;
use corelane_engine::preflight::{Cause, Limit, Report};

use super::*;
use crate::config::Io;
use crate::tune::{Goal, View};

/// Four CPUs of eight threads, one device with two queues, three data cores.
struct Fake {
    folder: tempfile::TempDir,
    wish: Wish,
    report: Report,
}

const CPU: &str = "sys/devices/system/cpu";
const NET: &str = "sys/class/net/eth0";

impl Fake {
    fn new() -> Self {
        let limit = |soft| Limit { soft, hard: soft };
        let fake = Self {
            folder: tempfile::tempdir().unwrap(),
            wish: Wish {
                goal: Goal {
                    cpus: vec![0, 1, 2],
                    devices: None,
                    connections: 3 * 16_384,
                    queues: Vec::new(),
                    polls: false,
                },
                control: ControlCpu::Cpu(3),
                connections_max: 16_384,
                io: vec![Io::Auto; 3],
                etcd: None,
                peers: Vec::new(),
                patience: Duration::from_secs(600),
            },
            report: Report {
                io_uring: Cause::Usable,
                kernel: "6.12".into(),
                files: limit(1 << 20),
                memlock_bytes: limit(u64::MAX),
            },
        };
        for (path, text) in [KERNEL, NETWORK].concat() {
            fake.file(path, text);
        }
        for cpu in 0..8 {
            let folder = format!("{CPU}/cpu{cpu}");
            let siblings = format!("{},{}", cpu % 4, cpu % 4 + 4);
            fake.file(
                &format!("{folder}/topology/thread_siblings_list"),
                &siblings,
            );
            fake.file(&format!("{folder}/cpufreq/scaling_governor"), "performance");
            for (state, latency, disabled) in [("state0", "2", "0"), ("state3", "133", "1")] {
                let state = format!("{folder}/cpuidle/{state}");
                fake.file(&format!("{state}/name"), "C6");
                fake.file(&format!("{state}/latency"), latency);
                fake.file(&format!("{state}/disable"), disabled);
            }
        }
        fake
    }

    fn file(&self, path: &str, text: &str) {
        let path = self.folder.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, format!("{text}\n")).unwrap();
    }

    fn sight(&self) -> Sight {
        let view = View::of(self.folder.path(), Path::new("no-ethtool-here"));
        Sight::new(view, self.wish.clone(), self.report.clone(), Duration::ZERO)
    }

    fn diagnosis(&self) -> Diagnosis {
        Diagnosis::make(&Arc::new(self.sight()))
    }

    /// The diagnosis when a file changes between the two looks.
    fn later(&self, path: &str, text: &str) -> Diagnosis {
        let sight = self.sight();
        self.file(path, text);
        Diagnosis::make(&Arc::new(sight))
    }
}

const KERNEL: &[(&str, &str)] = &[
    ("proc/self/status", "Cpus_allowed_list:\t0-3\nSeccomp:\t0"),
    ("proc/self/cgroup", "0::/pods/one"),
    ("sys/fs/cgroup/cgroup.controllers", "cpu"),
    ("sys/fs/cgroup/pods/one/cpu.max", "max 100000"),
    ("sys/fs/cgroup/pods/one/cpu.stat", "nr_throttled 0"),
    ("proc/stat", STAT),
    ("proc/vmstat", "pswpin 0\npswpout 0\ncompact_stall 7"),
    ("proc/swaps", "Filename Type Size Used Priority"),
    (
        "proc/pressure/cpu",
        "some avg10=0.30 avg60=0.10 avg300=0.10 total=9",
    ),
    ("proc/sys/kernel/io_uring_disabled", "0"),
    ("proc/sys/kernel/numa_balancing", "0"),
    (
        "sys/kernel/mm/transparent_hugepage/enabled",
        "always [madvise] never",
    ),
    (
        "sys/kernel/mm/transparent_hugepage/defrag",
        "always defer [madvise] never",
    ),
    (
        "sys/devices/system/clocksource/clocksource0/current_clocksource",
        "tsc",
    ),
    (
        "sys/devices/system/clocksource/clocksource0/available_clocksource",
        "tsc hpet",
    ),
    ("sys/devices/system/cpu/online", "0-7"),
    ("sys/devices/system/node/online", "0-1"),
    ("sys/devices/system/node/node0/cpulist", "0-7"),
    ("sys/devices/system/node/node1/cpulist", "8-15"),
    ("proc/77/comm", "bash"),
];

const STAT: &str = "cpu  800 0 0 7200 0 0 0 0 0 0\n\
    cpu0 100 0 0 900 0 0 0 0 0 0\ncpu1 100 0 0 900 0 0 0 0 0 0\n\
    cpu2 100 0 0 900 0 0 0 0 0 0\ncpu3 100 0 0 900 0 0 0 0 0 0\n\
    cpu4 100 0 0 900 0 0 0 0 0 0\ncpu5 100 0 0 900 0 0 0 0 0 0";

const NETWORK: &[(&str, &str)] = &[
    ("proc/sys/net/core/somaxconn", "4096"),
    ("proc/sys/net/core/netdev_max_backlog", "16384"),
    ("proc/sys/net/core/rmem_max", "16777216"),
    ("proc/sys/net/ipv4/tcp_rmem", "4096\t131072\t16777216"),
    ("proc/sys/net/ipv4/ip_local_port_range", "10240\t65535"),
    ("proc/sys/net/ipv4/tcp_tw_reuse", "1"),
    ("proc/sys/net/netfilter/nf_conntrack_count", "10"),
    ("proc/sys/net/netfilter/nf_conntrack_max", "1000"),
    (
        "proc/net/stat/nf_conntrack",
        "entries drop early_drop\n0a 00 00\n0a 00 00",
    ),
    (
        "proc/net/netstat",
        "TcpExt: ListenOverflows TCPRcvQDrop\nTcpExt: 0 0",
    ),
    ("proc/net/snmp", "Udp: InErrors RcvbufErrors\nUdp: 0 0"),
    (
        "proc/net/softnet_stat",
        "0000ffff 00000000 00000003\n0000ffff 00000000 00000003",
    ),
    ("proc/net/tcp", TCP_HEAD),
    (
        "proc/interrupts",
        "   CPU0\n 41: 0 x eth0-TxRx-0\n 42: 0 x eth0-TxRx-1",
    ),
    ("proc/irq/41/smp_affinity_list", "0"),
    ("proc/irq/42/smp_affinity_list", "1"),
    ("sys/class/net/eth0/operstate", "up"),
    ("sys/class/net/eth0/device/msi_irqs/41", "msix"),
    ("sys/class/net/eth0/device/msi_irqs/42", "msix"),
    ("sys/class/net/eth0/device/numa_node", "0"),
    ("sys/class/net/eth0/queues/rx-0/rps_cpus", "00"),
    ("sys/class/net/eth0/statistics/rx_missed_errors", "0"),
];

const TCP_HEAD: &str = "  sl  local_address rem_address   st tx_queue rx_queue";

/// The one finding of a check.
fn one<'a>(diagnosis: &'a Diagnosis, check: &str) -> &'a Finding {
    let found: Vec<&Finding> = diagnosis
        .findings
        .iter()
        .filter(|f| f.check == check)
        .collect();
    assert_eq!(found.len(), 1, "{check}: {:#?}", diagnosis.findings);
    found[0]
}

/// That it is the only one, of this weight, and that these words are in what is measured (with its
/// file) and in the remedy.
#[track_caller]
fn only(diagnosis: &Diagnosis, check: &str, weight: Weight, evidence: &str, remedy: &str) {
    let finding = one(diagnosis, check);
    assert_eq!(diagnosis.findings.len(), 1, "{:#?}", diagnosis.findings);
    assert_eq!(finding.weight, weight, "{finding:#?}");
    let seen: Vec<String> = (finding.evidence.iter())
        .map(|evidence| format!("{} ({})", evidence.value, evidence.at))
        .collect();
    assert!(
        seen.iter().any(|seen| seen.contains(evidence)),
        "{finding:#?}"
    );
    assert!(finding.remedy.contains(remedy), "{finding:#?}");
    assert!(finding.remedy.ends_with('.'), "{finding:#?}");
    assert!(finding.cause.ends_with('.'), "{finding:#?}");
    assert!(
        !finding.what.is_empty() && !finding.what.ends_with('.'),
        "{finding:#?}"
    );
    assert_eq!(diagnosis.is_well(), weight == Weight::Hint);
}

/// The same with one file otherwise.
#[track_caller]
fn file(change: (&str, &str), check: &str, weight: Weight, evidence: &str, remedy: &str) {
    let fake = Fake::new();
    fake.file(change.0, change.1);
    only(&fake.diagnosis(), check, weight, evidence, remedy);
}

/// The same with a file that changes between the two looks.
#[track_caller]
fn later(change: (&str, &str), check: &str, weight: Weight, evidence: &str, remedy: &str) {
    let diagnosis = Fake::new().later(change.0, change.1);
    only(&diagnosis, check, weight, evidence, remedy);
}

#[test]
fn a_healthy_host_gives_no_finding() {
    let diagnosis = Fake::new().diagnosis();
    assert_eq!(diagnosis.findings, []);
    let unseen: Vec<&str> = diagnosis.unseen.iter().map(|unseen| unseen.check).collect();
    // There is no ethtool to ask for queues, rings and coalescing.
    assert_eq!(unseen, ["nagle", "settings"], "{diagnosis:#?}");
    assert_eq!(diagnosis.well.len(), CHECKS.len() - 2);
    assert!(diagnosis.is_well() && !diagnosis.refuses());
    let text = text(&diagnosis);
    assert!(text.contains("well    clock_source: tsc, "), "{text}");
    assert!(
        text.contains("\nnothing found; 22 checks well, 2 unseen; in "),
        "{text}"
    );
}

#[test]
fn what_cannot_be_seen_is_said_and_not_guessed() {
    let mut fake = Fake::new();
    fake.folder = tempfile::tempdir().unwrap();
    let diagnosis = fake.diagnosis();
    assert_eq!(diagnosis.findings, []);
    let why = |check: &str| {
        let found = diagnosis.unseen.iter().find(|unseen| unseen.check == check);
        found
            .unwrap_or_else(|| panic!("{check}: {diagnosis:#?}"))
            .why
            .clone()
    };
    assert!(why("pressure").contains("/proc/pressure/cpu is not there"));
    assert!(why("frequency").contains("virtual machine"));
    assert!(why("interrupts").contains("no network device"));
    for check in [
        "cores",
        "quota",
        "smt",
        "steal",
        "accept_queues",
        "ports",
        "swap",
    ] {
        assert!(!why(check).is_empty(), "{check}");
    }
}

#[test]
fn io_uring_that_is_off_has_its_cause() {
    let off = |cause: Cause, evidence: &str, remedy: &str| {
        let mut fake = Fake::new();
        fake.report.io_uring = cause;
        only(
            &fake.diagnosis(),
            "io_uring",
            Weight::Cost,
            evidence,
            remedy,
        );
        fake.wish.io[1] = Io::Uring;
        let diagnosis = fake.diagnosis();
        only(&diagnosis, "io_uring", Weight::Fault, evidence, remedy);
        assert!(diagnosis.refuses());
        fake.wish.io = vec![Io::Epoll; 3];
        assert_eq!(fake.diagnosis().findings, []);
    };
    let sysctl = "kernel.io_uring_disabled: 0 (/proc/sys/kernel/io_uring_disabled)";
    off(
        Cause::SysctlOff,
        sysctl,
        "sysctl -w kernel.io_uring_disabled=0",
    );
    off(Cause::SysctlRestricted, sysctl, "kernel.io_uring_group");
    off(
        Cause::Seccomp,
        "Seccomp: 0, no filter (/proc/self/status)",
        "seccomp profile",
    );
    off(Cause::NoSystemCall, "Linux 6.12", "kernel of 6.0 or later");
    off(
        Cause::MissingOperations(vec!["accept"]),
        "Linux 6.12",
        "kernel of 6.0 or later",
    );
    off(Cause::SecurityModule, "Seccomp: 0", "audit log");
}

#[test]
fn limits_of_the_process_are_counted() {
    let mut fake = Fake::new();
    let soft = 64 << 10;
    fake.report.memlock_bytes.soft = soft;
    fake.report.io_uring = Cause::Memlock { soft_bytes: soft };
    let kib = "Max locked memory: 64 KiB (/proc/self/limits)";
    only(
        &fake.diagnosis(),
        "memlock",
        Weight::Fault,
        kib,
        "LimitMEMLOCK=",
    );
    let mut fake = Fake::new();
    fake.report.files.soft = 1024;
    let files = "Max open files: 1024 (/proc/self/limits)";
    only(
        &fake.diagnosis(),
        "nofile",
        Weight::Fault,
        files,
        "LimitNOFILE=",
    );
}

#[test]
fn cpus_that_are_not_to_be_had_are_named() {
    let status = "Cpus_allowed_list:\t0-1,3\nSeccomp:\t0";
    let file = |wish: &[usize]| {
        let mut fake = Fake::new();
        fake.file("proc/self/status", status);
        fake.wish.goal.cpus = wish.to_vec();
        fake.diagnosis()
    };
    let barred = file(&[0, 1, 2]);
    let may = "CPUs that this process may use: 0-1,3 (/proc/self/status)";
    only(&barred, "cores", Weight::Fault, may, "AllowedCPUs=0-2");
    let absent = file(&[0, 1, 9]);
    only(
        &absent,
        "cores",
        Weight::Fault,
        "CPUs online: 0-7",
        "cpus = \"0-1,3\"",
    );
}

#[test]
fn time_that_is_not_ours_is_seen() {
    let max = "sys/fs/cgroup/pods/one/cpu.max";
    let quota = "1.50 CPUs: 150000 us in each 100000 us (/sys/fs/cgroup/pods/one/cpu.max)";
    file(
        (max, "150000 100000"),
        "quota",
        Weight::Cost,
        quota,
        "CPUQuota=",
    );
    let fake = Fake::new();
    fake.file(max, "900000 100000");
    assert_eq!(fake.diagnosis().findings, []);
    let throttled = fake.later("sys/fs/cgroup/pods/one/cpu.stat", "nr_throttled 3");
    let seen = "nr_throttled: 3, 3 of them just now (/sys/fs/cgroup/pods/one/cpu.stat)";
    only(&throttled, "quota", Weight::Fault, seen, "CPUQuota=");

    let busy = STAT.replace("cpu4 100", "cpu4 180");
    let seen = "CPU 4: 100 % busy just now (/proc/stat)";
    later(
        ("proc/stat", &busy),
        "smt",
        Weight::Cost,
        seen,
        "cpu4/online",
    );
    let siblings = format!("{CPU}/cpu0/topology/thread_siblings_list");
    file(
        (&siblings, "0,1"),
        "smt",
        Weight::Cost,
        "siblings: 0 and 1",
        "one thread of each",
    );

    let pressure = "some avg10=39.33 avg60=31.72 avg300=22.21 total=1";
    let seen = "some avg10=39.33 (/proc/pressure/cpu)";
    file(
        ("proc/pressure/cpu", pressure),
        "pressure",
        Weight::Cost,
        seen,
        "isolcpus=0-2",
    );

    let stolen = STAT.replace("cpu1 100 0 0 900 0 0 0 0", "cpu1 100 0 0 990 0 0 0 10");
    let seen = "10.0 % just now, 0.9 % since the start (/proc/stat)";
    later(
        ("proc/stat", &stolen),
        "steal",
        Weight::Cost,
        seen,
        "dedicated CPUs",
    );
    let stolen = STAT.replace("cpu1 100 0 0 900 0 0 0 0", "cpu1 100 0 0 900 0 0 0 90");
    let seen = "0.0 % just now, 8.3 % since the start";
    file(
        ("proc/stat", &stolen),
        "steal",
        Weight::Hint,
        seen,
        "dedicated CPUs",
    );
}

#[test]
fn how_the_machine_is_set_up_is_judged_as_tune_judges_it() {
    let governor = format!("{CPU}/cpu1/cpufreq/scaling_governor");
    let alone = format!("`echo performance > /{governor}`");
    let seen = format!("cpu 1 governor: powersave (/{governor})");
    file(
        (&governor, "powersave"),
        "frequency",
        Weight::Cost,
        &seen,
        &alone,
    );
    let deep = format!("{CPU}/cpu2/cpuidle/state3/disable");
    let alone = format!("`echo 1 > /{deep}`");
    file(
        (&deep, "0"),
        "sleep",
        Weight::Cost,
        "state C6 (133 us)",
        &alone,
    );

    let source = "sys/devices/system/clocksource/clocksource0/current_clocksource";
    let echo = format!("`echo tsc > /{source}`");
    file(
        (source, "hpet"),
        "clock_source",
        Weight::Cost,
        "hpet; available: tsc hpet",
        &echo,
    );
    file(
        (source, "kvm-clock"),
        "clock_source",
        Weight::Hint,
        "ns to read it (measured)",
        &echo,
    );
}

#[test]
fn memory_that_is_far_or_stalls_is_seen() {
    let node = format!("{NET}/device/numa_node");
    let seen = format!("node 1 (/{node})");
    let fake = Fake::new();
    fake.file(&format!("{CPU}/online"), "0-15");
    fake.file(&node, "1");
    only(
        &fake.diagnosis(),
        "numa",
        Weight::Cost,
        &seen,
        "cpus = \"8-15\"",
    );
    let split = ("sys/devices/system/node/node1/cpulist", "2,8-15");
    let fake = Fake::new();
    fake.file("sys/devices/system/node/node0/cpulist", "0-1,3-7");
    fake.file(split.0, split.1);
    only(
        &fake.diagnosis(),
        "numa",
        Weight::Hint,
        "data cores 0-2",
        "CPUs of one node",
    );

    let sysctl = ("proc/sys/kernel/numa_balancing", "1");
    file(
        sysctl,
        "settings",
        Weight::Hint,
        "kernel.numa_balancing",
        "corelane tune apply",
    );
    let huge = (
        "sys/kernel/mm/transparent_hugepage/enabled",
        "[always] madvise never",
    );
    let seen = "compact_stall: 7, 0 of them just now (/proc/vmstat)";
    file(
        huge,
        "huge_pages",
        Weight::Cost,
        seen,
        "echo madvise > /sys/kernel/mm",
    );
}

#[test]
fn packets_on_the_wrong_core_are_seen() {
    let irq = "proc/irq/42/smp_affinity_list";
    let seen = "irq 42 (eth0 queue 1): 3 (/proc/irq/42/smp_affinity_list)";
    let alone = "`corelane tune apply`, or only this: `echo 1 > /proc/irq/42/smp_affinity_list`";
    file((irq, "3"), "interrupts", Weight::Cost, seen, alone);
    let fake = Fake::new();
    fake.file("proc/77/comm", "irqbalance");
    let stop = "systemctl disable --now irqbalance";
    only(
        &fake.diagnosis(),
        "interrupts",
        Weight::Hint,
        "irqbalance runs",
        stop,
    );
    fake.file(irq, "3");
    only(
        &fake.diagnosis(),
        "interrupts",
        Weight::Cost,
        "moves them back",
        stop,
    );

    let rps = format!("{NET}/queues/rx-0/rps_cpus");
    let seen = format!("eth0 rx-0 RPS: ff (/{rps})");
    let alone = format!("`echo 00 > /{rps}`");
    file((&rps, "ff"), "steering", Weight::Cost, &seen, &alone);
}

#[test]
fn queues_that_overflow_are_told_by_their_counters() {
    let netstat = "proc/net/netstat";
    let full = "TcpExt: ListenOverflows TCPRcvQDrop\nTcpExt: 41 0";
    let seen = "ListenOverflows: 41, 41 of them just now (/proc/net/netstat)";
    later(
        (netstat, full),
        "accept_queues",
        Weight::Fault,
        seen,
        "ss -ltn",
    );
    let seen = "ListenOverflows: 41, 0 of them just now";
    file(
        (netstat, full),
        "accept_queues",
        Weight::Hint,
        seen,
        "ss -ltn",
    );
    let fake = Fake::new();
    fake.file("proc/sys/net/core/somaxconn", "128");
    let diagnosis = fake.later(netstat, full);
    let finding = one(&diagnosis, "accept_queues");
    assert!(
        finding
            .remedy
            .contains("echo 4096 > /proc/sys/net/core/somaxconn"),
        "{finding:#?}"
    );
}

#[test]
fn packets_that_are_dropped_are_told_by_where() {
    let netstat = "proc/net/netstat";
    let missed = format!("{NET}/statistics/rx_missed_errors");
    let cases = [
        (
            "proc/net/softnet_stat",
            "00ff 0000000a 0",
            "dropped: 10, 10",
            "netdev_max_backlog",
        ),
        (
            netstat,
            "TcpExt: TCPRcvQDrop\nTcpExt: 9",
            "TCPRcvQDrop: 9, 9",
            "ss -tmp",
        ),
        (
            "proc/net/snmp",
            "Udp: RcvbufErrors\nUdp: 8",
            "RcvbufErrors: 8, 8",
            "ss -uamp",
        ),
        (&missed, "7", "7, 7 of them", "ethtool -g"),
    ];
    for (path, text, seen, remedy) in cases {
        later((path, text), "receive_drops", Weight::Cost, seen, remedy);
        file(
            (path, text),
            "receive_drops",
            Weight::Hint,
            "0 of them just now",
            remedy,
        );
    }
}

#[test]
fn tables_and_memory_that_run_out_are_seen() {
    let count = "proc/sys/net/netfilter/nf_conntrack_count";
    let most = "sysctl -w net.netfilter.nf_conntrack_max=4000";
    file(
        (count, "800"),
        "conntrack",
        Weight::Cost,
        "800 of 1000, 80 %",
        most,
    );
    file(
        (count, "990"),
        "conntrack",
        Weight::Fault,
        "990 of 1000, 99 %",
        most,
    );
    let drops = (
        "proc/net/stat/nf_conntrack",
        "entries drop early_drop\n0a 10 00\n0a 01 00",
    );
    later(
        drops,
        "conntrack",
        Weight::Fault,
        "early_drop: 17 just now",
        most,
    );

    let table = "Filename Type Size Used Priority\n/dev/sda2 partition 2097152 1048576 -2";
    let fake = Fake::new();
    fake.file("proc/swaps", table);
    only(
        &fake.diagnosis(),
        "swap",
        Weight::Hint,
        "1024 of 2048 MiB",
        "swapoff -a",
    );
    let moving = fake.later("proc/vmstat", "pswpin 40\npswpout 2\ncompact_stall 7");
    only(
        &moving,
        "swap",
        Weight::Fault,
        "42 pages moved just now (/proc/vmstat)",
        "swapoff -a",
    );
}

/// A line of /proc/net/tcp.
fn line(local: (&str, u16), remote: (&str, u16), state: &str) -> String {
    let address = |(ip, port): (&str, u16)| {
        let ip: std::net::Ipv4Addr = ip.parse().unwrap();
        format!("{:08X}:{port:04X}", u32::from_ne_bytes(ip.octets()))
    };
    format!(
        "\n   0: {} {} {state} 00000000:00000000",
        address(local),
        address(remote)
    )
}

#[test]
fn sockets_show_ports_that_run_out_and_proxies() {
    let fake = Fake::new();
    fake.file("proc/sys/net/ipv4/ip_local_port_range", "40000 40099");
    let fill = |count: u16| {
        let lines = (0..count).map(|n| {
            let state = if n < 5 { "01" } else { "06" };
            line(("10.0.0.1", 40_000 + n), ("10.0.0.2", 9000), state)
        });
        let others = (0..90).map(|n| line(("10.0.0.1", 40_000 + n), ("10.0.0.3", n), "01"));
        TCP_HEAD.to_owned() + &lines.chain(others).collect::<String>()
    };
    fake.file("proc/net/tcp", &fill(40));
    let range = |diagnosis: &Diagnosis| {
        let weight = |f: &Finding| (f.check != "settings").then_some((f.check, f.weight));
        diagnosis
            .findings
            .iter()
            .filter_map(weight)
            .collect::<Vec<_>>()
    };
    assert_eq!(range(&fake.diagnosis()), []);
    fake.file("proc/net/tcp", &fill(60));
    assert_eq!(range(&fake.diagnosis()), [("ports", Weight::Cost)]);
    fake.file("proc/net/tcp", &fill(90));
    let diagnosis = fake.diagnosis();
    let finding = one(&diagnosis, "ports");
    assert_eq!(finding.weight, Weight::Fault);
    let seen = "90 of 100 ports towards 10.0.0.2:9000, 85 of them in TIME_WAIT";
    assert_eq!(finding.evidence[0].value, seen);
    let set = "echo '10240 65535' > /proc/sys/net/ipv4/ip_local_port_range";
    assert!(finding.remedy.contains(set), "{finding:#?}");

    let any = ("0.0.0.0", 0);
    let mesh = TCP_HEAD.to_owned()
        + &line(("0.0.0.0", 15_001), any, "0A")
        + &line(("0.0.0.0", 15_006), any, "0A");
    let seen = "ports 15001 (outbound) and 15006 (inbound) are listened on (/proc/net/tcp)";
    file(
        ("proc/net/tcp", &mesh),
        "sidecar",
        Weight::Cost,
        seen,
        "sidecar.istio.io/inject",
    );
}

#[test]
fn the_worst_comes_first_and_text_has_all_of_it() {
    let mut fake = Fake::new();
    fake.report.files.soft = 1024;
    fake.file("proc/sys/kernel/numa_balancing", "1");
    fake.file(&format!("{NET}/queues/rx-0/rps_cpus"), "ff");
    let diagnosis = fake.diagnosis();
    let order: Vec<&str> = diagnosis.findings.iter().map(|found| found.check).collect();
    assert_eq!(order, ["nofile", "steering", "settings"]);
    let text = text(&diagnosis);
    assert!(
        text.starts_with("fault   nofile: RLIMIT_NOFILE is 1024 and 3 cores"),
        "{text}"
    );
    let seen = "\n        seen:   Max open files: 1024 (/proc/self/limits)\n        cause:  Each ";
    assert!(text.contains(seen), "{text}");
    assert!(
        text.contains("\n1 fault, 1 cost, 1 hint; 20 checks well, 1 unseen; in "),
        "{text}"
    );
}

#[test]
fn a_peer_that_is_away_is_no_finding() {
    let mut fake = Fake::new();
    // Nobody listens on a port that was just let go.
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address: SocketAddr = gone.local_addr().unwrap();
    drop(gone);
    fake.wish.peers = vec![address];
    let diagnosis = fake.diagnosis();
    assert_eq!(diagnosis.findings, []);
    assert!(
        diagnosis.unseen[0].why.contains(&address.to_string()),
        "{diagnosis:#?}"
    );
}

#[test]
fn a_check_that_hangs_is_unseen() {
    let mut fake = Fake::new();
    fake.wish.patience = Duration::from_millis(200);
    // Reading a pipe that nobody writes to waits for ever.
    let pipe = fake.folder.path().join("proc/swaps");
    fs::remove_file(&pipe).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RWXU).unwrap();
    let diagnosis = fake.diagnosis();
    let swap = diagnosis
        .unseen
        .iter()
        .find(|unseen| unseen.check == "swap");
    assert_eq!(swap.unwrap().why, "no answer within 0.2 s");
    assert_eq!(diagnosis.findings, []);
}
