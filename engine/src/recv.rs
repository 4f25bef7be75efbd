//! Bytes arrive: filled buffers are appended to their connection.

use crate::buffers::BufferId;
use crate::connection::{Intake, Role};
use crate::ring::Ring;
use crate::shard::{Shard, TimerKind};
use crate::stats::flight::{Buffers as Shortage, Kind};
use crate::table::NONE;
use crate::{decode, ends, forward, lane, relay_flow, relay_life, relay_time, respond};

/// A frame whose bytes stop coming for so long ends its connection.
pub(crate) const FRAME_PAUSE_NS: u64 = 30_000_000_000;

/// A shortage of buffers that lasts so long ends the connections that hold them.
const SHORTAGE_NS: u64 = 1_000_000_000;

/// `buffer[..bytes]` has been filled for the connection.
pub(crate) fn received<R: Ring>(
    shard: &mut Shard<R>,
    slot: u32,
    buffer: BufferId,
    bytes: u32,
    more: bool,
) {
    let connection = &mut shard.connections[slot];
    connection.receiving = more;
    if connection.closing {
        shard.ring.recycle(buffer);
        return;
    }
    shard.stats.shard.received_bytes.add(u64::from(bytes));
    match shard
        .pieces
        .push_received(&mut connection.incoming, buffer, bytes)
    {
        Some(joined) => shard.stats.shard.joined_bytes.add(joined as u64),
        // The table is sized so that this cannot be; if it is, one connection pays.
        None => return shard.lost(slot, libc::ENOBUFS),
    }
    consume(shard, slot);
    if shard.connections.get(slot).is_some() {
        shard.receive(slot);
    }
}

/// So many bytes of a body were received into a worker's slab.
pub(crate) fn landed<R: Ring>(shard: &mut Shard<R>, slot: u32, bytes: u32) {
    let connection = &mut shard.connections[slot];
    connection.receiving = false;
    if connection.closing {
        return;
    }
    shard.stats.shard.received_bytes.add(u64::from(bytes));
    if lane::landed(shard, slot, bytes) {
        decode::requests(shard, slot);
    }
    watch_frame(shard, slot);
    if shard.connections.get(slot).is_some() {
        shard.receive(slot);
    }
}

/// Gives the received bytes to the reader of the connection's role.
pub(crate) fn consume<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    match shard.connections[slot].role {
        Role::Downstream => {
            decode::requests(shard, slot);
            watch_frame(shard, slot);
        }
        Role::Upstream(upstream) => respond::answers(shard, slot, upstream),
        Role::Tell(_) => {
            let connection = &mut shard.connections[slot];
            shard.pieces.clear(&mut connection.incoming);
        }
        Role::End(end) => ends::arrived(shard, slot, end),
        Role::Relay(leg) => relay_flow::consume(shard, slot, leg),
    }
}

/// The peer's end of stream (errno 0), a failure, or the end of a receive that we cancelled.
pub(crate) fn ended<R: Ring>(shard: &mut Shard<R>, slot: u32, errno: i32) {
    let connection = &mut shard.connections[slot];
    connection.receiving = false;
    if connection.closing {
        return;
    }
    if errno == libc::ECANCELED {
        // Cancelled by `pause`; if that is over already, ask again.
        return shard.receive(slot);
    }
    if errno == libc::EIO && connection.kernel_tls {
        return shard.take_record(slot);
    }
    if errno == 0 && connection.role == Role::Downstream {
        // It may have shut down only its own direction: the replies are owed all the same, and
        // frames that had to wait may still lie here.
        connection.end_of_stream = true;
        return respond::downstream_half_closed(shard, slot);
    }
    if let Role::End(end) = connection.role {
        return ends::ended(shard, slot, end, errno);
    }
    if let Role::Relay(leg) = connection.role {
        return relay_flow::ended(shard, slot, leg, errno);
    }
    if shard.connections.get(slot).is_some() {
        shard.lost(slot, errno);
    }
}

/// No buffer was free. The connection is served again as soon as one is.
pub(crate) fn starved<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    shard.stats.shard.buffers_exhausted.add(1);
    note(shard, Shortage::Exhausted, slot);
    let generation = shard.connections.generation(slot);
    let connection = &mut shard.connections[slot];
    connection.receiving = false;
    if !connection.closing && !connection.starved {
        connection.starved = true;
        shard.starved.push((slot, generation));
    }
}

/// Buffers are free again. Connections to instances come first: their answers free more.
pub(crate) fn feed_starved<R: Ring>(shard: &mut Shard<R>) {
    let mut starved = std::mem::take(&mut shard.starved);
    for upstreams in [true, false] {
        for (slot, generation) in starved.iter().copied() {
            if !shard.connections.is_current(slot, generation) {
                continue;
            }
            let connection = &mut shard.connections[slot];
            if connection.starved && matches!(connection.role, Role::Upstream(_)) == upstreams {
                connection.starved = false;
                shard.receive(slot);
            }
        }
    }
    starved.clear();
    shard.starved = starved;
}

/// A table has no room for a frame, not even for its refusal: its connection waits until there is.
pub(crate) fn crowd<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    shard.pause(slot);
    let generation = shard.connections.generation(slot);
    let connection = &mut shard.connections[slot];
    if !connection.crowded {
        connection.crowded = true;
        shard.crowded.push((slot, generation));
    }
}

/// There is room again.
pub(crate) fn make_room<R: Ring>(shard: &mut Shard<R>) {
    // Those who find none after all queue up again behind the rest.
    for _ in 0..shard.crowded.len() {
        let (slot, generation) = shard.crowded.remove(0);
        if !shard.connections.is_current(slot, generation) {
            continue;
        }
        shard.connections[slot].crowded = false;
        respond::resume_if_ready(shard, slot);
        if let Some(connection) = shard.connections.get(slot)
            && let Intake::Stream { request, .. } = connection.intake
            && connection.paused
            && forward::is_backed_up(shard, request)
        {
            crowd(shard, slot);
        }
    }
}

/// Few buffers are left: they are kept for the answers of instances, which free others.
pub(crate) fn throttle<R: Ring>(shard: &mut Shard<R>) {
    shard.throttled = true;
    shard.throttles = shard.throttles.wrapping_add(1);
    note(shard, Shortage::HoldBack, NONE);
    watch_shortage(shard);
    relay_life::let_go(shard);
    let downstream: Vec<u32> = downstream(shard);
    for slot in downstream {
        shard.pause(slot);
    }
}

fn note<R: Ring>(shard: &Shard<R>, what: Shortage, slot: u32) {
    let held = shard.pieces.buffers.held() as u32;
    shard.note(Kind::Shortage, what as u32, held, slot.into());
}

fn watch_shortage<R: Ring>(shard: &mut Shard<R>) {
    let due_ns = shard.now_ns + SHORTAGE_NS;
    shard.timer(TimerKind::Shortage, shard.throttles, 0, due_ns);
}

/// Buffers have been short for long: what holds them are frames that nobody finishes, or their
/// senders may not. The oldest go, until enough is free.
pub(crate) fn look_at_shortage<R: Ring>(shard: &mut Shard<R>, throttles: u32) {
    if !shard.throttled || throttles != shard.throttles {
        return;
    }
    let mut unfinished = downstream(shard);
    unfinished.retain(|slot| !shard.connections[*slot].incoming.is_empty());
    unfinished.sort_unstable_by_key(|slot| shard.connections[*slot].frame_ns);
    for slot in unfinished {
        if shard.may_hold() {
            break;
        }
        shard.stats.shard.slow_frames_closed.add(1);
        shard.lost(slot, libc::ETIMEDOUT);
    }
    relay_time::relieve(shard);
    watch_shortage(shard);
}

/// Enough buffers are free again.
pub(crate) fn unthrottle<R: Ring>(shard: &mut Shard<R>) {
    shard.throttled = false;
    note(shard, Shortage::GoOn, NONE);
    let downstream: Vec<u32> = downstream(shard);
    for slot in downstream {
        respond::resume_if_ready(shard, slot);
    }
}

fn downstream<R: Ring>(shard: &Shard<R>) -> Vec<u32> {
    let slots = shard.connections.slots();
    slots
        .filter(|&slot| shard.connections[slot].role == Role::Downstream)
        .collect()
}

/// Sets the timer that looks at an unfinished frame.
fn watch_frame<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    let generation = shard.connections.generation(slot);
    let Some(connection) = shard.connections.get_mut(slot) else {
        return;
    };
    let unfinished = !connection.incoming.is_empty() || connection.intake != Intake::Frames;
    if connection.frame_ns == 0 || connection.frame_of != connection.frames {
        (connection.frame_ns, connection.frame_of) = (shard.now_ns, connection.frames);
    }
    if unfinished && !connection.frame_timer && !connection.closing {
        connection.frame_timer = true;
        connection.frames_seen = connection.frames;
        connection.streamed_seen = connection.streamed;
        shard.timer(
            TimerKind::Frame,
            slot,
            generation,
            shard.now_ns + FRAME_PAUSE_NS,
        );
    }
}

/// The timer has run out: has the frame been finished meanwhile?
pub(crate) fn look_at_frame<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    let connection = &mut shard.connections[slot];
    connection.frame_timer = false;
    let unfinished = !connection.incoming.is_empty() || connection.intake != Intake::Frames;
    if !unfinished || connection.closing {
        return;
    }
    // Only the sender is to blame for a frame that we have not held back ourselves.
    let moved = connection.frames != connection.frames_seen
        || connection.streamed != connection.streamed_seen;
    if !moved && !connection.paused {
        shard.stats.shard.slow_frames_closed.add(1);
        return shard.lost(slot, libc::ETIMEDOUT);
    }
    watch_frame(shard, slot);
}
