//! Slow sessions must not hold what others need: when receive buffers become short, what waits for
//! slow subscribers, and what has come of unfinished events, is copied to blocks of our own.

use super::plane::Plane;
use crate::operation::Operation;
use crate::ring::Ring;

/// A send that takes longer makes its session a slow one.
pub(super) const SLOW_NS: u64 = 20_000_000;
/// A send that reads receive buffers may take so long when they are short.
const PATIENCE_NS: u64 = 1_000_000;

/// Looks after the receive buffers at the end of a turn.
pub(super) fn relieve<R: Ring>(plane: &mut Plane<R>) {
    let (all, free) = (plane.memory.buffers(), plane.memory.free_buffers());
    if free < all / 4 {
        put_aside(plane);
    }
    if plane.memory.free_buffers() > all / 8 && !plane.starved.is_empty() {
        for (slot, generation) in std::mem::take(&mut plane.starved) {
            if plane.sessions.is_current(slot, generation) {
                plane.sessions[slot].starved = false;
                plane.receive(slot);
            }
        }
    }
}

fn put_aside<R: Ring>(plane: &mut Plane<R>) {
    let slots: Vec<u32> = plane.sessions.slots().collect();
    let mut copied = 0;
    for slot in slots {
        let session = &mut plane.sessions[slot];
        copied += session.incoming.put_aside(&mut plane.memory);
        #[cfg(feature = "curve")]
        if let Some(curve) = &mut session.curve {
            copied += curve.sealed.put_aside(&mut plane.memory);
        }
        if !session.sending {
            continue;
        }
        copied += session.queue.put_aside(&mut plane.memory, true);
        let overdue = plane.now_ns >= session.send_ns + PATIENCE_NS;
        if overdue && session.queue.flight_pins(&plane.memory) {
            cancel(plane, slot);
        }
    }
    plane.stats.plane.put_aside_bytes.add(copied as u64);
}

/// Ends the send under way; it goes on from other memory, or as one that nobody waits past.
fn cancel<R: Ring>(plane: &mut Plane<R>, slot: u32) {
    let generation = plane.sessions.generation(slot);
    let session = &mut plane.sessions[slot];
    if !session.cancelling {
        session.cancelling = true;
        let operation = Operation::new(session.send_kind, slot, generation);
        let handle = session.handle;
        plane.ring.cancel_send(operation, handle);
    }
}

/// A send has been ended with nothing sent.
pub(super) fn cancelled<R: Ring>(plane: &mut Plane<R>, slot: u32) {
    let session = &mut plane.sessions[slot];
    (session.sending, session.cancelling, session.slow) = (false, false, true);
    if session.closing {
        return;
    }
    let copied = session.queue.put_aside(&mut plane.memory, false);
    plane.stats.plane.put_aside_bytes.add(copied as u64);
    plane.mark(slot);
}

/// Sends that were expected to complete at once, and have not, are begun anew as slow ones: the
/// ring waits past the former kind, which then would cost others time.
pub(super) fn unblock<R: Ring>(plane: &mut Plane<R>) {
    let slots: Vec<u32> = plane.sessions.slots().collect();
    for slot in slots {
        let session = &plane.sessions[slot];
        let overdue = plane.now_ns >= session.send_ns + SLOW_NS;
        if session.sending && !session.slow && overdue {
            cancel(plane, slot);
        }
    }
}
