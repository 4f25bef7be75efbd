//! Timers of a shard: what each is for, and what is done when it is due.

use crate::ring::Ring;
use crate::shard::Shard;
use crate::timer_wheel::TimerId;
use crate::{accept, collect, ends, lane, link, recv, relay_home, relay_time, routed, tell};

/// What a timer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum TimerKind {
    /// Accept again after a failure.
    Accept = 1,
    /// Connect to an upstream again.
    Connect,
    /// Look at the oldest unanswered request of an upstream, or at an idle bulk upstream.
    Answer,
    /// Look at an unfinished frame of a connection.
    Frame,
    /// A caller has not taken what it was told.
    Tell,
    /// A response of a handler of ours.
    Response,
    /// A connection to a worker that we call.
    Link,
    /// A call of ours.
    Call,
    /// A call home that has not said for whom.
    Home,
    /// Accept calls home again after a failure.
    HomeAccept,
    /// Buffers have been short for long.
    Shortage,
    /// Answers may lie unread at an upstream.
    Collect,
    /// A relayed response.
    Relay,
    /// A worker's call to a relaying router that has not said for which request.
    RelayHome,
    /// Accept such calls again after a failure.
    RelayAccept,
    /// A shared connection to a caller.
    Mux,
    /// Control was told of spans and sleeps.
    Spans,
    /// A worker may not take what is posted on its lane.
    Lane = 40,
}

impl<R: Ring> Shard<R> {
    /// Sets a timer. A full wheel means far more timers than connections: our own mistake, which
    /// costs a deadline and not the process.
    pub(crate) fn timer(&mut self, kind: TimerKind, slot: u32, generation: u32, deadline_ns: u64) {
        self.timer_to_cancel(kind, slot, generation, deadline_ns);
    }

    /// Sets a timer that its owner may cancel.
    pub(crate) fn timer_to_cancel(
        &mut self,
        kind: TimerKind,
        slot: u32,
        generation: u32,
        deadline_ns: u64,
    ) -> Option<TimerId> {
        let token = (kind as u64) << 56 | u64::from(generation) << 32 | u64::from(slot);
        let set = self.timers.insert(deadline_ns, token);
        debug_assert!(set.is_ok(), "the wheel has room for every timer");
        set.ok()
    }

    pub(crate) fn expire(&mut self) -> bool {
        const RELAY: u8 = TimerKind::Relay as u8;
        const RELAY_HOME: u8 = TimerKind::RelayHome as u8;
        const RELAY_ACCEPT: u8 = TimerKind::RelayAccept as u8;
        const SPANS: u8 = TimerKind::Spans as u8;
        let mut due = std::mem::take(&mut self.due);
        self.timers
            .expire(self.now_ns, &mut |token| due.push(token));
        for token in due.iter().copied() {
            let generation = (token >> 32) as u32 & (crate::operation::GENERATIONS - 1);
            let slot = token as u32;
            match (token >> 56) as u8 {
                1 => accept::arm(self),
                2 if self.upstreams.is_current(slot, generation) => link::connect_due(self, slot),
                3 if self.upstreams.is_current(slot, generation) => link::overdue(self, slot),
                4 if self.connections.is_current(slot, generation) => {
                    recv::look_at_frame(self, slot);
                }
                5 => tell::overdue(self, slot, generation),
                12 if self.upstreams.is_current(slot, generation) => collect::due(self, slot),
                11 => recv::look_at_shortage(self, slot),
                RELAY if self.relays.table.is_current(slot, generation) => {
                    relay_time::overdue(self, slot);
                }
                RELAY_HOME if self.connections.is_current(slot, generation) => {
                    relay_home::overdue(self, slot);
                }
                RELAY_ACCEPT => relay_home::arm(self),
                SPANS => routed::due(self),
                40 => lane::overdue(self, slot, generation),
                kind => ends::overdue(self, kind, slot, generation),
            }
        }
        let any = !due.is_empty();
        due.clear();
        self.due = due;
        any
    }
}
