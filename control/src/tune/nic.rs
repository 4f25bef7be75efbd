//! What network devices should be: as many queues as data cores, each queue's interrupt, RPS and
//! XPS on its core, and rings and coalescing that neither drop nor delay.

use std::io;

use corelane_engine::nic;

use super::{Goal, Item, Place, Plan, Topic, View, Want};

/// Receive descriptors that outlast a burst.
const RING: u64 = 4_096;
/// Interrupts are held back no longer than this, in microseconds.
const COALESCE_US: u64 = 8;

/// Polls in vain after which interrupts are on again, and nanoseconds after which a queue that
/// nobody polls is looked at: together they bound what a core that is held up costs its packets.
const DEFERRED: u64 = 2;
const FLUSH_NS: u64 = 200_000;

/// Adds the settings of all devices that count.
pub(super) fn devices(view: &View, goal: &Goal, plan: &mut Plan) {
    let mut ethtool = true;
    for device in &looked_at(view, goal) {
        if view.list(format!("sys/class/net/{device}")).is_empty() {
            plan.notes
                .push(format!("there is no network device {device}"));
            continue;
        }
        if ethtool && let Err(error) = hardware(view, goal, device, plan) {
            ethtool = false;
            plan.notes.push(format!(
                "ethtool cannot be run ({error}): queue counts, rings and coalescing were not \
                 looked at; install Debian's package ethtool"
            ));
        }
        interrupts(view, goal, device, plan);
        steering(view, goal, device, plan);
        if goal.polls {
            deferral(view, device, plan);
        }
    }
}

/// The devices that count: those that were named, else those that have hardware and are up.
pub(crate) fn looked_at(view: &View, goal: &Goal) -> Vec<String> {
    let named = goal.devices.clone();
    named.unwrap_or_else(|| with_hardware(view))
}

fn with_hardware(view: &View) -> Vec<String> {
    let mut devices = view.list("sys/class/net");
    devices.retain(|device| {
        let folder = format!("sys/class/net/{device}");
        !view.list(format!("{folder}/device")).is_empty()
            && view.read(format!("{folder}/operstate")).as_deref() != Some("down")
    });
    devices
}

/// Options of `ethtool`: the flag that sets one, its name there, and its name in what is printed.
const OPTIONS: [(&str, &str, &str); 4] = [
    ("-L", "combined", "Combined"),
    ("-G", "rx", "RX"),
    ("-C", "adaptive-rx", "Adaptive RX"),
    ("-C", "rx-usecs", "rx-usecs"),
];

/// What follows `name:` on a line of its own, up to the next space.
fn value(section: &str, name: &str) -> Option<String> {
    let mut lines = section.lines().map(str::trim);
    let rest = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    rest.split_whitespace().next().map(str::to_owned)
}

/// An option's value, and the largest that it can be where the device says so. None where the
/// device has no such option.
///
/// # Errors
/// `ethtool` cannot be started.
fn option(view: &View, device: &str, option: &str) -> io::Result<Option<(String, Option<u64>)>> {
    let Some((flag, _, printed)) = OPTIONS.iter().find(|(_, known, _)| *known == option) else {
        return Ok(None);
    };
    let text = match view.ethtool(&[&flag.to_ascii_lowercase(), device]) {
        Ok(text) => text,
        // It ran, and this device cannot say.
        Err(error) if error.kind() == io::ErrorKind::Other => return Ok(None),
        Err(error) => return Err(error),
    };
    // Two sections where there is a largest value: what the device can do, and what it does.
    let (most, now) = match text.split_once("Current hardware settings") {
        Some((most, now)) => (value(most, printed), now),
        None => (None, text.as_str()),
    };
    let most = most.and_then(|most| most.parse().ok());
    let known = |now: &String| now != "n/a";
    Ok(value(now, printed).filter(known).map(|now| (now, most)))
}

/// What an option of a device is now.
pub(super) fn current(view: &View, device: &str, name: &str) -> Option<String> {
    Some(option(view, device, name).ok()??.0)
}

/// Queue counts, ring sizes and coalescing.
///
/// # Errors
/// `ethtool` cannot be started; that a device has none of an option is no error.
fn hardware(view: &View, goal: &Goal, device: &str, plan: &mut Plan) -> io::Result<()> {
    let cores = goal.cpus.len() as u64;
    let is = |text: String| Want::Is(text.into());
    for (flag, name, _) in OPTIONS {
        let Some((now, most)) = option(view, device, name)? else {
            continue;
        };
        let number = now.parse::<u64>().ok();
        let (shown, want, why) = match (name, most, number) {
            ("combined", Some(most), _) => (
                "queues",
                is(cores.min(most).to_string()),
                "with fewer queues than data cores some cores get their packets from another, \
                 with more some queues have no core of their own",
            ),
            ("rx", Some(most), _) => (
                "receive ring",
                Want::AtLeast(most.min(RING)),
                "a burst longer than the ring is dropped, and sent again 200 ms later",
            ),
            ("adaptive-rx", ..) => (
                "adaptive coalescing",
                Want::Is("off".into()),
                "the device changes how long it holds interrupts back: latency wanders",
            ),
            ("rx-usecs", _, Some(now)) => (
                "coalescing in us",
                is(now.min(COALESCE_US).to_string()),
                "each request that comes alone waits so many microseconds for its interrupt",
            ),
            _ => continue,
        };
        let (standing, wanted) = want.judge(&now);
        plan.items.push(Item {
            topic: Topic::Hardware,
            name: format!("{device} {shown}"),
            now,
            wanted,
            why,
            standing,
            place: Place::Ethtool {
                device: device.to_owned(),
                flag: flag.to_owned(),
                option: name.to_owned(),
            },
        });
    }
    Ok(())
}

fn interrupts(view: &View, goal: &Goal, device: &str, plan: &mut Plan) {
    for irq in nic::interrupts(&view.path("/"), device) {
        let (number, queue) = (irq.number, irq.queue);
        let cpu = goal.cpu_of(device, queue);
        plan.file(
            view,
            &format!("proc/irq/{number}/smp_affinity_list"),
            (
                Topic::Interrupt,
                &format!("irq {number} ({device} queue {queue})"),
            ),
            Want::Is(cpu.to_string().into()),
            "packets of a queue are handled on another core than the shard that waits for them",
        );
    }
}

/// RPS off, and XPS to the core of the queue.
fn steering(view: &View, goal: &Goal, device: &str, plan: &mut Plan) {
    let folder = format!("sys/class/net/{device}/queues");
    let queues = view.list(&folder);
    let transmit = queues
        .iter()
        .filter(|queue| queue.starts_with("tx-"))
        .count();
    for queue in &queues {
        if queue.starts_with("rx-") {
            let path = format!("{folder}/{queue}/rps_cpus");
            let Some(now) = view.read(&path) else {
                continue;
            };
            plan.file(
                view,
                &path,
                (Topic::Receive, &format!("{device} {queue} RPS")),
                Want::Is(zeros(&now).into()),
                "the kernel hands packets to other cores after the device has chosen one",
            );
        } else if let Some(number) = queue
            .strip_prefix("tx-")
            .and_then(|n| n.parse::<usize>().ok())
            && transmit > 1
        {
            let path = format!("{folder}/{queue}/xps_cpus");
            let Some(now) = view.read(&path) else {
                continue;
            };
            let cpus = goal.cpus.iter().enumerate();
            let own = cpus
                .filter(|(index, _)| index % transmit == number)
                .map(|(_, cpu)| *cpu);
            plan.file(
                view,
                &path,
                (Topic::Transmit, &format!("{device} {queue} XPS")),
                Want::Is(mask(&now, own).into()),
                "cores share a transmit queue and its lock while others are idle",
            );
        }
    }
}

/// Interrupts that stay off while a core polls the queue itself.
fn deferral(view: &View, device: &str, plan: &mut Plan) {
    let why = "cores poll their queues (busy_poll_us), and interrupts come in between all the same";
    let wanted = [
        ("napi_defer_hard_irqs", DEFERRED),
        ("gro_flush_timeout", FLUSH_NS),
    ];
    for (name, least) in wanted {
        let path = format!("sys/class/net/{device}/{name}");
        let shown = format!("{device} {name}");
        let shown = (Topic::Hardware, &*shown);
        plan.file(view, &path, shown, Want::AtLeast(least), why);
    }
}

/// A mask without CPUs, as wide as `like`.
fn zeros(like: &str) -> String {
    mask(like, [].into_iter())
}

/// A mask of these CPUs in the kernel's form (32-bit words, commas between, highest first), as
/// wide as `like` and no narrower than it must be.
fn mask(like: &str, cpus: impl Iterator<Item = usize>) -> String {
    let words: Vec<&str> = like.split(',').collect();
    let mut bits = vec![0_u32; words.len()];
    for cpu in cpus {
        if bits.len() <= cpu / 32 {
            bits.resize(cpu / 32 + 1, 0);
        }
        bits[cpu / 32] |= 1 << (cpu % 32);
    }
    // The first word is as many digits as the host has CPUs for, the others are eight.
    let digits = words.first().map_or(1, |word| word.len());
    let (first, rest) = bits.split_last().unwrap_or((&0, &[]));
    let mut text = format!("{first:0digits$x}");
    for word in rest.iter().rev() {
        text.push_str(&format!(",{word:08x}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_are_as_wide_as_the_kernel_writes_them() {
        assert_eq!(mask("0", [0, 1].into_iter()), "3");
        assert_eq!(mask("00", [4].into_iter()), "10");
        assert_eq!(mask("ff,ffffffff", [33].into_iter()), "02,00000000");
        assert_eq!(zeros("ff,ffffffff"), "00,00000000");
    }
}
