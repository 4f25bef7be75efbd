//! Memory that stalls: huge pages gathered behind our back, and swap.

use super::host::{evidence, remedy, sentence};
use super::{Finding, Outcome, Sight, Weight};
use crate::tune::Topic;

const SWAPS: &str = "/proc/swaps";
const VMSTAT: &str = "/proc/vmstat";

/// Transparent huge pages.
pub(super) fn huge_pages(sight: &Sight) -> Outcome {
    let (all, wrong) = sight.items(Topic::HugePages);
    if all.is_empty() {
        return Outcome::Unseen("/sys/kernel/mm/transparent_hugepage is not there".into());
    }
    let Some(first) = wrong.first() else {
        return Outcome::Well("transparent huge pages only where they are asked for".into());
    };
    let mut finding = evidence(
        Finding::new(Weight::Cost, format!("{} is {}", first.name, first.now)),
        &wrong,
    );
    if let Some(stalls) = sight.counter("vmstat.compact_stall") {
        finding = finding.seen(
            format!(
                "compact_stall: {}, {} of them just now",
                stalls.total, stalls.rise
            ),
            VMSTAT,
        );
    }
    Outcome::one(
        finding
            .because(format!("{}.", sentence(first.why)))
            .remedy(remedy(&wrong)),
    )
}

/// Whether memory is swapped out.
pub(super) fn swap(sight: &Sight) -> Outcome {
    let Some(table) = sight.view.read(SWAPS) else {
        return Outcome::Unseen(format!("{SWAPS} cannot be read"));
    };
    // Name, type, size, used, priority; the first line names them.
    let number = |line: &str, column: usize| -> Option<u64> {
        line.split_whitespace().nth(column)?.parse().ok()
    };
    let lines: Vec<&str> = table.lines().skip(1).collect();
    let sum = |column| -> u64 { lines.iter().filter_map(|line| number(line, column)).sum() };
    let (size, used) = (sum(2), sum(3));
    if size == 0 {
        return Outcome::Well("there is none".into());
    }
    let rise = |name: &str| sight.counter(name).map_or(0, |count| count.rise);
    let moved = rise("vmstat.pswpin") + rise("vmstat.pswpout");
    if moved == 0 && used == 0 {
        return Outcome::Well(format!("{} MiB, none of it in use", size / 1024));
    }
    let (weight, what) = match moved {
        0 => (Weight::Hint, "memory has been swapped out"),
        _ => (Weight::Fault, "memory is being swapped right now"),
    };
    Outcome::one(
        Finding::new(weight, what)
            .seen(format!("{} of {} MiB", used / 1024, size / 1024), SWAPS)
            .seen(format!("{moved} pages moved just now"), VMSTAT)
            .because("A request that needs a page from the disk waits for milliseconds.")
            .remedy(
                "`swapoff -a`, or MemorySwapMax=0 in the systemd unit; and give the host enough \
                 memory for receive buffers (`corelane check` says how much they are).",
            ),
    )
}
