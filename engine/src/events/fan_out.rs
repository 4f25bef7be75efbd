//! Events go to the queues of those who want them. Nothing is copied: a queue holds the buffers.

use corelane_codec::zmtp::Event;

use super::memory::Slice;
use super::plane::Plane;
use super::queue::{Bounds, Queued};
use super::session::{Memo, Source, Wire};
use super::{Overflow, Report, crossing, local};
use crate::ring::Ring;

/// Each subscriber may have so much waiting even when the memory of all queues is used up.
const BYTES_MIN: usize = 1 << 20;
/// Drops of one subscriber are reported this often at most; all are counted.
const REPORT_PAUSE_NS: u64 = 1_000_000_000;

/// The runs of `plane.runs`, in order.
pub(super) fn runs<R: Ring>(plane: &mut Plane<R>, source: &Source) {
    let runs = std::mem::take(&mut plane.runs);
    for run in &runs {
        let memo = &source.memos[run.memo];
        received(plane, memo, u64::from(run.events), run.slice.bytes());
        let mut crosses = false;
        for member in &memo.members {
            if local::is_consumer(*member) {
                local::deliver_run(plane, *member, memo, run.slice);
            } else if speaks(plane, *member, memo.wire) {
                queue_run(plane, *member, memo.wire, run.slice, run.events);
            } else {
                crosses = true;
            }
        }
        if crosses {
            cross_run(plane, memo, run.slice);
        }
    }
    plane.runs = runs;
}

/// A run for those of its members that speak the other wire.
fn cross_run<R: Ring>(plane: &mut Plane<R>, memo: &Memo, slice: Slice) {
    let max_bytes = plane.config.event_bytes_max as usize;
    let mut events = std::mem::take(&mut plane.crossed);
    let mut pieces = std::mem::take(&mut plane.slices);
    let fronts = crossing::run(&mut plane.memory, memo, slice, max_bytes, &mut events);
    for member in &memo.members {
        if local::is_consumer(*member) || speaks(plane, *member, memo.wire) {
            continue;
        }
        for event in &events {
            event.pieces(&mut pieces);
            queue_pieces(plane, *member, &pieces, event.bytes());
        }
    }
    if let Some(block) = fronts {
        plane.memory.release(block);
    }
    plane.slices = pieces;
    plane.crossed = events;
}

fn speaks<R: Ring>(plane: &Plane<R>, slot: u32, wire: Wire) -> bool {
    let session = plane.sessions.get(slot);
    session.is_some_and(|session| session.wire == wire)
}

/// One event that lies in these pieces, for one subscriber.
fn queue_pieces<R: Ring>(plane: &mut Plane<R>, slot: u32, pieces: &[Slice], bytes: usize) {
    if make_room(plane, slot, bytes) {
        let session = &mut plane.sessions[slot];
        session.queue.push_pieces(&mut plane.memory, pieces);
        plane.queued_bytes += bytes as u64;
        plane.mark(slot);
    }
}

/// An event in pieces.
pub(super) fn scattered<R: Ring>(
    plane: &mut Plane<R>,
    memo: &Memo,
    pieces: &[Slice],
    event: &Event,
) {
    received(plane, memo, 1, event.end);
    let mut crosses = false;
    for member in &memo.members {
        if local::is_consumer(*member) {
            local::deliver_pieces(plane, *member, memo, pieces, event);
        } else if speaks(plane, *member, memo.wire) {
            queue_pieces(plane, *member, pieces, event.end);
        } else {
            crosses = true;
        }
    }
    if !crosses {
        return;
    }
    let mut crossed = Vec::new();
    let front = crossing::pieces(&mut plane.memory, memo, event, pieces, &mut crossed);
    let bytes = crossed.iter().map(Slice::bytes).sum();
    for member in &memo.members {
        if !local::is_consumer(*member) && !speaks(plane, *member, memo.wire) {
            queue_pieces(plane, *member, &crossed, bytes);
        }
    }
    if let Some(block) = front {
        plane.memory.release(block);
    }
}

fn received<R: Ring>(plane: &Plane<R>, memo: &Memo, events: u64, bytes: usize) {
    let stats = &plane.stats;
    stats.plane.events_received.add(events);
    stats.plane.bytes_received.add(bytes as u64);
    stats.count_topic(memo.topic, events, bytes as u64);
    if memo.members.is_empty() {
        stats.plane.events_unwanted.add(events);
    }
}

impl<R: Ring> Plane<R> {
    pub(super) fn bounds(&self) -> Bounds {
        let is_full = self.queued_bytes >= self.config.memory_bytes_max;
        let bytes = self.config.queue_bytes_max as usize;
        Bounds {
            messages: self.config.queue_events_max as usize,
            bytes: if is_full { bytes.min(BYTES_MIN) } else { bytes },
        }
    }
}

/// Whole events that follow each other: as one run if they fit, otherwise one by one.
fn queue_run<R: Ring>(plane: &mut Plane<R>, slot: u32, wire: Wire, slice: Slice, events: u32) {
    let bounds = plane.bounds();
    // What would be dropped at once stays small beside the bound.
    let merge = (bounds.messages / 8).clamp(1, 4096) as u32;
    let Some(session) = plane.sessions.get_mut(slot) else {
        return;
    };
    if session.closing {
        return;
    }
    let fits = session.queue.fits(bounds, events as usize, slice.bytes())
        && slice.bytes() <= session.frame_bytes_max;
    if fits && (events <= merge || plane.config.overflow != Overflow::DropOldest) {
        session.queue.push(&mut plane.memory, slice, events, merge);
        plane.queued_bytes += slice.bytes() as u64;
        return plane.mark(slot);
    }
    let max_bytes = plane.config.event_bytes_max as usize;
    let mut rest = slice;
    while rest.start < rest.end {
        let Some((event, _)) = wire.decode(plane.memory.bytes(rest), max_bytes) else {
            return;
        };
        let end = rest.start + event.end as u32;
        if make_room(plane, slot, event.end) {
            let session = &mut plane.sessions[slot];
            session
                .queue
                .push(&mut plane.memory, Slice { end, ..rest }, 1, merge);
            plane.queued_bytes += event.end as u64;
            plane.mark(slot);
        }
        rest.start = end;
    }
}

/// Whether one event of `bytes` may be queued, after the policy has been applied if need be.
fn make_room<R: Ring>(plane: &mut Plane<R>, slot: u32, bytes: usize) -> bool {
    let bounds = plane.bounds();
    let overflow = plane.config.overflow;
    let Some(session) = plane.sessions.get_mut(slot) else {
        return false;
    };
    if session.closing {
        return false;
    }
    if bytes > session.frame_bytes_max {
        plane.stats.plane.events_dropped_too_large.add(1);
        return false;
    }
    if session.queue.fits(bounds, 1, bytes) {
        return true;
    }
    let before = session.queue.bytes();
    let queued = session
        .queue
        .overflow(&mut plane.memory, overflow, bounds, bytes);
    plane.queued_bytes -= (before - session.queue.bytes()) as u64;
    let stats = &plane.stats.plane;
    let fits = session.queue.fits(bounds, 1, bytes);
    let dropped = match queued {
        Queued::Dropped => {
            stats.events_dropped_newest.add(1);
            1
        }
        Queued::Instead(events) => {
            stats.events_dropped_oldest.add(events);
            stats.events_dropped_newest.add(u64::from(!fits));
            events + u64::from(!fits)
        }
        Queued::Disconnect => {
            stats.subscribers_overrun.add(1);
            stats.events_dropped_disconnect.add(1);
            plane.refuse(
                slot,
                "its queue is at its bound: it does not read fast enough",
            );
            return false;
        }
    };
    session.dropped += dropped;
    if plane.now_ns >= session.quiet_ns {
        session.quiet_ns = plane.now_ns + REPORT_PAUSE_NS;
        let (peer, so_far) = (session.peer, session.dropped);
        plane.report(Report::Dropping { peer, so_far });
    }
    fits
}
