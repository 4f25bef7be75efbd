//! The way of packets to the data cores: interrupts, steering, queues that overflow, connection
//! tracking.

use super::host::{evidence, remedy, sentence};
use super::sight::{Count, DEVICE_DROPS};
use super::{Finding, Outcome, Sight, Weight};
use crate::tune::{self, Topic};

const NETSTAT: &str = "/proc/net/netstat";

/// Interrupts of device queues on the cores whose packets they bring.
pub(super) fn interrupts(sight: &Sight) -> Outcome {
    let devices = tune::looked_at(&sight.view, &sight.wish.goal);
    if devices.is_empty() {
        return Outcome::Unseen("no network device with hardware is up".into());
    }
    let (all, wrong) = sight.items(Topic::Interrupt);
    if all.is_empty() {
        return Outcome::Unseen(format!(
            "the interrupts of {} are not to be seen (/proc/interrupts, /proc/irq)",
            devices.join(", ")
        ));
    }
    let balance = sight.plan().notes.iter();
    let mut balance = balance.filter(|note| note.starts_with("irqbalance"));
    let balance = balance.next();
    if wrong.is_empty() {
        return match balance {
            None => Outcome::Well(format!("each of {} on the core of its queue", all.len())),
            Some(note) => Outcome::one(
                Finding::new(
                    Weight::Hint,
                    "interrupts are where they should be, for now: irqbalance runs",
                )
                .seen("irqbalance runs", "/proc/*/comm")
                .because(format!("{}.", sentence(note)))
                .remedy("`systemctl disable --now irqbalance`."),
            ),
        };
    }
    let what = format!(
        "{} of {} interrupts of device queues go to other cores",
        wrong.len(),
        all.len()
    );
    let mut finding = evidence(Finding::new(Weight::Cost, what), &wrong);
    let mut fix = remedy(&wrong);
    if balance.is_some() {
        finding = finding.seen("irqbalance runs, and moves them back", "/proc/*/comm");
        fix = format!("First `systemctl disable --now irqbalance`; then {fix}");
    }
    Outcome::one(
        finding
            .because(format!("{}.", sentence(wrong[0].why)))
            .remedy(fix),
    )
}

/// Whether the kernel hands packets to other cores after the device has chosen one.
pub(super) fn steering(sight: &Sight) -> Outcome {
    let (all, wrong) = sight.items(Topic::Receive);
    if all.is_empty() {
        return Outcome::Unseen("no receive queue of a network device is to be seen".into());
    }
    if wrong.is_empty() {
        return Outcome::Well("RPS is off on all receive queues".into());
    }
    let what = format!(
        "RPS hands packets of {} of {} receive queues to other cores",
        wrong.len(),
        all.len()
    );
    Outcome::one(
        evidence(Finding::new(Weight::Cost, what), &wrong)
            .because(
                "The device has chosen a core by its queue, and the kernel chooses again: packets \
                 wait for two cores, and connections are not where their packets are.",
            )
            .remedy(remedy(&wrong)),
    )
}

/// A counter as evidence.
fn counted(finding: Finding, name: &str, count: Count, at: &str) -> Finding {
    let name = name.rsplit('.').next().unwrap_or(name);
    finding.seen(
        format!("{name}: {}, {} of them just now", count.total, count.rise),
        at,
    )
}

/// Weight of a counter that should stand still: it rises, or has risen since the host started.
fn weight(count: Count, rising: Weight) -> Option<Weight> {
    match (count.rise, count.total) {
        (0, 0) => None,
        (0, _) => Some(Weight::Hint),
        _ => Some(rising),
    }
}

/// Connections that found the accept queue full.
pub(super) fn accept_queues(sight: &Sight) -> Outcome {
    let names = ["TcpExt.ListenOverflows", "TcpExt.TCPReqQFullDrop"];
    let counts: Vec<_> = names
        .iter()
        .filter_map(|name| Some((*name, sight.counter(name)?)))
        .collect();
    if counts.is_empty() {
        return Outcome::Unseen(format!("{NETSTAT} does not count them"));
    }
    let heaviest = counts
        .iter()
        .filter_map(|(_, count)| weight(*count, Weight::Fault))
        .min();
    let Some(heaviest) = heaviest else {
        return Outcome::Well("never full".into());
    };
    let what = match heaviest {
        Weight::Hint => "connections have been dropped at a full accept queue, if not just now",
        _ => "connections are dropped at a full accept queue",
    };
    let mut finding = Finding::new(heaviest, what);
    for (name, count) in counts {
        finding = counted(finding, name, count, NETSTAT);
    }
    let path = "/proc/sys/net/core/somaxconn";
    if let Some(most) = sight.view.read(path) {
        finding = finding.seen(format!("net.core.somaxconn: {most}"), path);
    }
    let fix = match sight.wrong("net.core.somaxconn") {
        Some(item) => format!(
            "{} A program that listens already must be started again.",
            remedy(&[item])
        ),
        None => "`ss -ltn` shows whose queue it is (Recv-Q near Send-Q): that program accepts too \
                 late, or asks for a short queue."
            .to_owned(),
    };
    Outcome::one(
        finding
            .because("Whoever connects then tries again a second later, or gives up.")
            .remedy(fix),
    )
}

/// A place where packets are dropped: counters, where they are read, what it is, what to do, and
/// the settings that do it.
struct Drop {
    counters: Vec<String>,
    at: String,
    what: String,
    cause: &'static str,
    setting: &'static str,
    fix: &'static str,
}

/// Packets that were received and had no room.
pub(super) fn receive_drops(sight: &Sight) -> Outcome {
    let mut findings = Vec::new();
    let mut seen = false;
    for place in drops(sight) {
        let mut found: Option<Finding> = None;
        for name in &place.counters {
            let Some(count) = sight.counter(name) else {
                continue;
            };
            seen = true;
            let Some(weight) = weight(count, Weight::Cost) else {
                continue;
            };
            let so_far = found.unwrap_or_else(|| Finding::new(weight, place.what.as_str()));
            let weight = weight.min(so_far.weight);
            found = Some(counted(
                Finding { weight, ..so_far },
                name,
                count,
                &place.at,
            ));
        }
        if let Some(mut finding) = found {
            if finding.weight == Weight::Hint {
                finding.what = format!("{}, if not just now", finding.what);
            }
            let fix = sight.wrong(place.setting).map(|item| remedy(&[item]));
            findings.push(
                finding
                    .because(place.cause)
                    .remedy(fix.unwrap_or_else(|| place.fix.to_owned())),
            );
        }
    }
    if !seen {
        return Outcome::Unseen("nothing here counts them".into());
    }
    Outcome::of(findings, || "none, from the device to the sockets".into())
}

fn drops(sight: &Sight) -> Vec<Drop> {
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    let mut drops = vec![
        Drop {
            counters: names(&["softnet.dropped"]),
            at: "/proc/net/softnet_stat".into(),
            what: "packets dropped in the queue before the CPU".into(),
            cause: "A CPU did not get to its packets before net.core.netdev_max_backlog of them \
                    had gathered.",
            setting: "net.core.netdev_max_backlog",
            fix: "`sysctl -w net.core.netdev_max_backlog=65536`; and look which CPU is busy.",
        },
        Drop {
            counters: names(&[
                "TcpExt.TCPRcvQDrop",
                "TcpExt.RcvPruned",
                "TcpExt.TCPBacklogDrop",
            ]),
            at: NETSTAT.into(),
            what: "segments dropped because a TCP socket had no room".into(),
            cause: "What a program has not read fills the receive buffer of its socket.",
            setting: "net.ipv4.tcp_rmem",
            fix: "The program that reads is too slow: `ss -tmp` shows whose Recv-Q is full.",
        },
        Drop {
            counters: names(&["Udp.RcvbufErrors"]),
            at: "/proc/net/snmp".into(),
            what: "datagrams dropped because a UDP socket had no room".into(),
            cause: "Responses on QUIC, and others' datagrams, come faster than they are read.",
            setting: "net.core.rmem_max",
            fix: "`ss -uamp` shows whose socket drops (d in skmem); give it a larger SO_RCVBUF.",
        },
    ];
    for device in tune::looked_at(&sight.view, &sight.wish.goal) {
        drops.push(Drop {
            counters: DEVICE_DROPS.map(|name| format!("{device}.{name}")).to_vec(),
            at: format!("/sys/class/net/{device}/statistics"),
            what: format!("packets dropped by {device}"),
            cause: "The receive ring of the device was full, or the bus too slow.",
            setting: "",
            fix: "`ethtool -g DEVICE` shows the ring and how long it may be (`corelane tune` \
                  lengthens it); and spread the interrupts over the data cores.",
        });
    }
    drops
}

/// The table of tracked connections.
pub(super) fn conntrack(sight: &Sight) -> Outcome {
    const FOLDER: &str = "/proc/sys/net/netfilter";
    let count = sight.view.number(format!("{FOLDER}/nf_conntrack_count"));
    let most = sight.view.number(format!("{FOLDER}/nf_conntrack_max"));
    let (Some(count), Some(most @ 1..)) = (count, most) else {
        let module = sight.view.path(FOLDER).exists();
        return match module {
            false => Outcome::Well("connections are not tracked here".into()),
            true => Outcome::Unseen(format!("{FOLDER}/nf_conntrack_count cannot be read")),
        };
    };
    let failed = ["conntrack.drop", "conntrack.early_drop"].map(|name| sight.counter(name));
    let failed = failed.into_iter().flatten();
    let rise: u64 = failed.map(|count| count.rise).sum();
    let percent = count * 100 / most;
    let weight = match (rise, percent) {
        (1.., _) | (_, 95..) => Weight::Fault,
        (0, 75..) => Weight::Cost,
        _ => return Outcome::Well(format!("{count} of {most} connections tracked")),
    };
    let what = match weight {
        Weight::Fault => "the table of tracked connections is full",
        _ => "the table of tracked connections fills up",
    };
    Outcome::one(
        Finding::new(weight, what)
            .seen(
                format!("nf_conntrack_count: {count} of {most}, {percent} %"),
                FOLDER,
            )
            .seen(
                format!("drop, early_drop: {rise} just now"),
                "/proc/net/stat/nf_conntrack",
            )
            .because(
                "A firewall or NAT remembers every connection, also for two minutes after its \
                 end; with direct responses each request makes one. When the table is full, \
                 packets of new ones are dropped.",
            )
            .remedy(format!(
                "`sysctl -w net.netfilter.nf_conntrack_max={}`; or do not track corelane's ports \
                 (a `notrack` rule of nftables in the hooks prerouting and output).",
                most * 4
            )),
    )
}
