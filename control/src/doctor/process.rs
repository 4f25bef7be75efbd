//! What this process may do: io_uring, limits, and the CPUs that it was promised.

use corelane_engine::preflight::{Cause, FILES_RESERVED, MEMLOCK_NEEDED_BYTES};

use super::{Finding, Outcome, Sight, Weight};
use crate::config::{Io, cpu_list};

const DISABLED: &str = "proc/sys/kernel/io_uring_disabled";
const STATUS: &str = "/proc/self/status";
const LIMITS: &str = "/proc/self/limits";

/// Whether io_uring can be used, as a shard uses it; why not, if not.
pub(super) fn io_uring(sight: &Sight) -> Outcome {
    let cause = &sight.report.io_uring;
    let kernel = &sight.report.kernel;
    if sight.wish.io.iter().all(|io| *io == Io::Epoll) {
        return Outcome::Well("not wanted: io = \"epoll\"".into());
    }
    let required = sight.wish.io.contains(&Io::Uring);
    match cause {
        Cause::Usable => return Outcome::Well(format!("it works here, on Linux {kernel}")),
        Cause::Memlock { .. } => {
            return Outcome::Unseen("too little memory may be locked: see memlock".into());
        }
        _ => {}
    }
    let weight = if required {
        Weight::Fault
    } else {
        Weight::Cost
    };
    let mut finding = Finding::new(weight, format!("io_uring is off: {}", cause.explain()));
    finding.required = required;
    let sysctl = sight.view.read(DISABLED);
    let sysctl = sysctl.as_deref().unwrap_or("not there");
    finding = finding.seen(
        format!("kernel.io_uring_disabled: {sysctl}"),
        format!("/{DISABLED}"),
    );
    let seccomp = sight.status("Seccomp:");
    let seccomp = match seccomp.as_deref() {
        Some("0") => "0, no filter",
        Some("2") => "2, a filter",
        Some(other) => other,
        None => "not there",
    };
    finding = finding
        .seen(format!("Seccomp: {seccomp}"), STATUS)
        .seen(format!("Linux {kernel}"), "/proc/sys/kernel/osrelease");
    let then = match required {
        true => "the configuration demands it (io = \"uring\"), so `corelane serve` ends with 78.",
        false => "corelane runs on epoll instead, with more system calls for each request.",
    };
    Outcome::one(
        finding
            .because(format!(
                "A ring was made as a shard makes it, and was refused; {then}"
            ))
            .remedy(cause.remedy()),
    )
}

/// Memory that may be locked.
pub(super) fn memlock(sight: &Sight) -> Outcome {
    let limit = sight.report.memlock_bytes;
    let refused = matches!(sight.report.io_uring, Cause::Memlock { .. });
    if limit.soft >= MEMLOCK_NEEDED_BYTES && !refused {
        return Outcome::Well(match limit.soft {
            u64::MAX => "no limit".into(),
            bytes => format!("{} KiB may be locked", bytes / 1024),
        });
    }
    let cause = Cause::Memlock {
        soft_bytes: limit.soft,
    };
    let required = sight.wish.io.contains(&Io::Uring);
    let mut finding = Finding::new(Weight::Fault, cause.explain())
        .seen(
            format!("Max locked memory: {} KiB", limit.soft / 1024),
            LIMITS,
        )
        .because(
            "The rings of a core, and buffers that are registered with them, are locked memory; \
             without it corelane runs on epoll.",
        )
        .remedy(format!(
            "{} `corelane tune plan --systemd FILE` writes a drop-in with LimitMEMLOCK=.",
            cause.remedy()
        ));
    finding.required = required;
    Outcome::one(finding)
}

/// Open files for all connections.
pub(super) fn nofile(sight: &Sight) -> Outcome {
    let cores = sight.assignment().data.len() as u64;
    let (limit, most) = (sight.report.files.soft, sight.wish.connections_max);
    let Some(found) = sight.report.too_few_files(most, cores) else {
        return Outcome::Well(match limit {
            u64::MAX => "no limit".into(),
            files => format!("{files} files, for {cores} cores of {most} connections"),
        });
    };
    Outcome::one(
        Finding::new(Weight::Fault, found.what)
            .seen(format!("Max open files: {limit}"), LIMITS)
            .because(format!(
                "Each connection is a file, and {FILES_RESERVED} are needed besides; corelane \
                 raises its limit as far as it may, and that is as far."
            ))
            .remedy(format!(
                "{} `corelane tune plan --systemd FILE` writes a drop-in with LimitNOFILE=.",
                found.remedy
            )),
    )
}

/// Whether the CPUs that the configuration names are to be had.
pub(super) fn cores(sight: &Sight) -> Outcome {
    let mask = sight.mask();
    if mask.is_empty() {
        return Outcome::Unseen(format!("{STATUS} does not say which CPUs may be used"));
    }
    let wanted = &sight.wish.goal.cpus;
    let may = cpu_list(&mask);
    let seen =
        |finding: Finding| finding.seen(format!("CPUs that this process may use: {may}"), STATUS);
    let online: Vec<usize> = sight.topology().cpus.iter().map(|cpu| cpu.number).collect();
    let missing: Vec<usize> = wanted
        .iter()
        .copied()
        .filter(|cpu| !mask.contains(cpu))
        .collect();
    if !missing.is_empty() {
        let barred = missing.iter().any(|cpu| online.contains(cpu));
        let why = match barred {
            true => {
                "The host has them, but the cpuset of the control group, or taskset, keeps this \
                 process off them."
            }
            false => "The host has no such CPUs online.",
        };
        let remedy = match barred {
            true => format!(
                "Give it the CPUs (AllowedCPUs={} of the systemd unit, `--cpuset-cpus` of the \
                 container, a static CPU manager in Kubernetes), or write cpus = \"{may}\" under \
                 [core].",
                cpu_list(wanted)
            ),
            false => format!("Write cpus = \"{may}\" under [core], or a part of it."),
        };
        let what = format!(
            "the configuration names CPUs {}, and {} are not to be had",
            cpu_list(wanted),
            cpu_list(&missing)
        );
        let finding = seen(Finding::new(Weight::Fault, what)).seen(
            format!("CPUs online: {}", cpu_list(&online)),
            "/sys/devices/system/cpu/online",
        );
        return Outcome::one(finding.because(why).remedy(remedy));
    }
    let assigned = sight.assignment();
    if mask.len() == 1 {
        let what = format!("CPU {may} is the only one: data and control share it");
        return Outcome::one(
            seen(Finding::new(Weight::Cost, what))
                .because("Whatever the control core does (discovery, metrics), requests wait for.")
                .remedy("Give the process two CPUs or more."),
        );
    }
    Outcome::Well(format!(
        "data cores {}, control core {}, of {may}",
        cpu_list(&assigned.data),
        assigned.control
    ))
}
