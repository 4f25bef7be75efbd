//! What control may change of a shard while it runs, and what it may ask of its tables: both are
//! taken between two ticks, and no connection hears of them.

use std::fmt;

use crate::config::LiveSettings;
use crate::ring::Ring;
use crate::shard::Shard;
use crate::worker::LOCAL;

/// Asks which routes of the directory requests and relayed responses still hold: the place of a
/// route that is not among them may be given to another.
pub struct Census {
    /// Is called with the places, ascending, on the core's thread, so it must be quick.
    pub answer: Box<dyn FnOnce(Vec<u32>) + Send>,
}

impl fmt::Debug for Census {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Census")
    }
}

/// Takes new settings over. Limits above what the shard has memory for are cut to that; what is
/// over a lower limit already stays.
pub(crate) fn change<R: Ring>(shard: &mut Shard<R>, new: LiveSettings) {
    let connections = shard.connections.capacity();
    let config = &mut shard.config;
    config.idle = new.idle;
    config.connections_max = new
        .connections_max
        .min(u32::try_from(connections).unwrap_or(u32::MAX));
    config.in_flight_max = new.in_flight_max;
    config.upstream_queue_bytes = new.upstream_queue_bytes;
    config.message_bytes_max = new.message_bytes_max;
    config.imbalance = new.imbalance;
    if config.busy_poll_us != new.busy_poll_us {
        config.busy_poll_us = new.busy_poll_us;
        shard.poll_queues();
    }
    shard.requests.limit(new.in_flight_max as usize);
    shard.stats.shard.settings.add(1);
}

/// Answers a [`Census`].
pub(crate) fn count<R: Ring>(shard: &Shard<R>, census: Census) {
    let requests = shard
        .requests
        .slots()
        .map(|slot| shard.requests[slot].route);
    let relays = &shard.relays.table;
    let relays = relays.slots().map(|slot| relays[slot].route);
    let mut places: Vec<u32> = requests
        .chain(relays)
        .filter(|route| route & LOCAL == 0)
        .collect();
    places.sort_unstable();
    places.dedup();
    (census.answer)(places);
}
