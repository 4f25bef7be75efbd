//! Which keys may change while the router runs.

use super::keys::{self, Key, Section};

/// Keys of tables that are otherwise fixed.
const LIVE: [Key; 11] = [
    keys::SERVER_MESSAGE_BYTES_MAX,
    keys::SERVER_STEERING,
    keys::SERVER_IMBALANCE,
    keys::CORE_IDLE,
    keys::CORE_NIC_QUEUE,
    keys::CORE_BUSY_POLL_US,
    keys::CORE_CONNECTIONS_MAX,
    keys::CORE_IN_FLIGHT_MAX,
    keys::CORE_UPSTREAM_QUEUE_BYTES,
    keys::CONTROL_FLIGHT_DIR,
    keys::CONTROL_LOG,
];
/// Keys that decide over memory and sockets of a route, which are made once.
const FIXED: [Key; 8] = [
    keys::ROUTE_LANE,
    keys::ROUTE_LANE_BYTES,
    keys::ROUTE_LANE_UIDS,
    keys::ROUTE_BLOCK_TOKENS,
    keys::ROUTE_KV_BLOCKS_MAX,
    keys::ROUTE_KV_RANKS_MAX,
    keys::ROUTE_LOAD,
    keys::ROUTE_LOAD_STALE_MS,
];

impl Key {
    /// Whether a reload takes a new value over. Some values cannot be had even so: a limit above
    /// what memory was taken for, `response = "relay"` where no route relayed at start, or a
    /// `nic_queue` that puts the core on another CPU.
    pub fn is_live(&self) -> bool {
        match self.section {
            Section::Route => !FIXED.contains(self),
            Section::Instance | Section::Drain | Section::Reload => true,
            _ => LIVE.contains(self),
        }
    }
}
