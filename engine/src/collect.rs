//! Answers that nobody waits for are read in batches.
//!
//! Where callers are acknowledged on forward, an instance's answer only lets the router drop the
//! frame that it has kept. Waking up for each would cost as much as the request itself. So the
//! kernel is told to wake us for [`LOW_WATER_BYTES`] of answers (SO_RCVLOWAT), the end of the
//! stream or an error; fewer are fetched along with the next frames that leave, or after
//! [`COLLECT_NS`] at the latest.

use crate::directory::Ack;
use crate::due::TimerKind;
use crate::operation::Kind;
use crate::ring::Ring;
use crate::shard::Shard;
use crate::table::NONE;
use crate::upstream::UpstreamState;

/// Sixteen answers wake us.
const LOW_WATER_BYTES: u32 = 64;
/// The longest that an answer lies unread.
const COLLECT_NS: u64 = 4_000_000;
/// Answers are fetched along with frames if the last time is so long ago.
const ALONG_NS: u64 = 1_000_000;

/// Chooses how an upstream's answers are read: at once if a caller waits for one of them.
pub(crate) fn tune<R: Ring>(shard: &mut Shard<R>, upstream: u32) {
    let link = &shard.upstreams[upstream];
    if link.state != UpstreamState::Open {
        return;
    }
    let (slot, was) = (link.connection, link.lazy);
    let lazy = !link.bulk && nobody_waits(shard, upstream);
    if lazy != was {
        shard.upstreams[upstream].lazy = lazy;
        let bytes = if lazy { LOW_WATER_BYTES } else { 1 };
        let handle = shard.connections[slot].handle;
        shard.ring.low_water(handle, bytes);
    }
    if lazy && shard.upstreams[upstream].queue.head != NONE {
        // Nothing more may leave for it, and what was answered must not lie there for ever.
        watch(shard, upstream);
    }
}

/// Whether all who are called over an upstream are acknowledged before it answers.
fn nobody_waits<R: Ring>(shard: &Shard<R>, upstream: u32) -> bool {
    let mut instances = shard.instances.slots().map(|slot| &shard.instances[slot]);
    instances.all(|instance| {
        let route = shard.directory.routes.get(instance.route as usize);
        instance.upstream != upstream || route.is_some_and(|route| route.ack == Ack::OnForward)
    })
}

/// Frames are leaving for an upstream: its answers may come along, or are looked for later.
pub(crate) fn along<R: Ring>(shard: &mut Shard<R>, upstream: u32) {
    let link = &mut shard.upstreams[upstream];
    if !link.lazy {
        return;
    }
    if link.collected_ns + ALONG_NS <= shard.now_ns {
        shard.collecting.push(upstream);
    }
    watch(shard, upstream);
}

fn watch<R: Ring>(shard: &mut Shard<R>, upstream: u32) {
    let link = &mut shard.upstreams[upstream];
    if !link.collect_timer {
        link.collect_timer = true;
        let generation = shard.upstreams.generation(upstream);
        let deadline_ns = shard.now_ns + COLLECT_NS;
        shard.timer(TimerKind::Collect, upstream, generation, deadline_ns);
    }
}

/// The timer of an upstream: answers may have lain there for long enough.
pub(crate) fn due<R: Ring>(shard: &mut Shard<R>, upstream: u32) {
    let link = &mut shard.upstreams[upstream];
    link.collect_timer = false;
    if link.lazy && link.queue.head != NONE {
        shard.collecting.push(upstream);
        watch(shard, upstream);
    }
}

/// Asks for what is there, last of all in a tick: a socket may not be closed between the asking
/// and the next submission.
pub(crate) fn ask<R: Ring>(shard: &mut Shard<R>) {
    let mut collecting = std::mem::take(&mut shard.collecting);
    for upstream in collecting.drain(..) {
        let Some(link) = shard.upstreams.get_mut(upstream) else {
            continue;
        };
        link.collected_ns = shard.now_ns;
        let slot = link.connection;
        let operation = shard.operation(Kind::Collect, slot);
        let Some(connection) = shard.connections.get(slot) else {
            continue;
        };
        if connection.receiving && !connection.closing {
            shard.ring.collect(operation, connection.handle);
        }
    }
    shard.collecting = collecting;
}
