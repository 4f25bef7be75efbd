//! What `/metrics` shows of discovery.

use corelane_engine::stats::CellKind;

use super::{Number, number};
use crate::discovery::DiscoveryStats;

type DiscoveryCell = (
    &'static str,
    CellKind,
    &'static str,
    fn(&DiscoveryStats) -> &std::cell::Cell<u64>,
);

/// Everything that discovery counts.
const DISCOVERY: &[DiscoveryCell] = &[
    (
        "discovery_watched_keys",
        CellKind::Gauge,
        "Keys in all watched directories",
        |stats| &stats.watched_keys,
    ),
    (
        "discovery_stale_watches",
        CellKind::Gauge,
        "Watches without contact to the store; their last known directory is kept",
        |stats| &stats.stale_watches,
    ),
    (
        "discovery_reconnects",
        CellKind::Counter,
        "Times that contact to the store was lost and sought again",
        |stats| &stats.reconnects,
    ),
    (
        "discovery_resyncs",
        CellKind::Counter,
        "Full lists taken over, the first of each watch included",
        |stats| &stats.resyncs,
    ),
    (
        "discovery_lease_losses",
        CellKind::Counter,
        "Leases lost; each gave this process a new identity",
        |stats| &stats.lease_losses,
    ),
    (
        "discovery_writes_deferred",
        CellKind::Counter,
        "Writes that failed and were put off",
        |stats| &stats.writes_deferred,
    ),
    (
        "discovery_rejected_records",
        CellKind::Counter,
        "Stored values that are no records, too long, or too many",
        |stats| &stats.rejected_records,
    ),
    (
        "discovery_rejected_instances",
        CellKind::Counter,
        "Instances that cannot be dialled",
        |stats| &stats.rejected_instances,
    ),
    (
        "discovery_mismatched_instances",
        CellKind::Counter,
        "Instances whose key and value disagree",
        |stats| &stats.mismatched_instances,
    ),
    (
        "discovery_removals_deferred",
        CellKind::Counter,
        "Lists after an outage that left removals to be confirmed",
        |stats| &stats.removals_deferred,
    ),
    (
        "discovery_card_conflicts",
        CellKind::Counter,
        "Model cards left out because another one holds their place",
        |stats| &stats.card_conflicts,
    ),
    (
        "discovery_expired_files",
        CellKind::Counter,
        "Files of others deleted because nobody refreshed them",
        |stats| &stats.expired_files,
    ),
];

/// Its numbers at this moment.
pub(super) fn discovery_numbers(stats: &DiscoveryStats) -> Vec<Number> {
    let cells = DISCOVERY.iter();
    cells
        .map(|(name, kind, help, cell)| number(name, *kind, help, cell(stats).get()))
        .collect()
}
