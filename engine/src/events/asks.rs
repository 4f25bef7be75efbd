//! Who waits for something to be so: that all has been sent, or that somebody wants something.

use std::time::Duration;

use super::plane::Plane;
use super::{Answer, Group, Until};
use crate::ring::Ring;

/// Those who wait at the same time.
const ASKS_MAX: usize = 1024;

/// One of them.
pub(super) struct Ask {
    group: Group,
    until: Until,
    until_ns: u64,
    answer: Answer,
}

/// Takes a question in; it is answered at the end of this turn at the earliest.
pub(super) fn ask<R: Ring>(
    plane: &mut Plane<R>,
    group: Group,
    until: Until,
    within: Duration,
    answer: Answer,
) {
    if plane.asks.len() < ASKS_MAX {
        let within_ns = u64::try_from(within.as_nanos()).unwrap_or(u64::MAX);
        plane.asks.push(Ask {
            group,
            until,
            until_ns: plane.now_ns.saturating_add(within_ns),
            answer,
        });
    }
}

/// Answers those that can be answered.
pub(super) fn answer<R: Ring>(plane: &mut Plane<R>) {
    if plane.asks.is_empty() {
        return;
    }
    for ask in std::mem::take(&mut plane.asks) {
        let is_so = match ask.until {
            Until::Sent => is_sent(plane, ask.group),
            Until::Wanted => is_wanted(plane, ask.group),
        };
        if is_so || plane.now_ns >= ask.until_ns {
            (ask.answer)(is_so);
        } else {
            plane.asks.push(ask);
        }
    }
}

fn is_sent<R: Ring>(plane: &Plane<R>, group: Group) -> bool {
    plane.sessions.slots().all(|slot| {
        let session = &plane.sessions[slot];
        session.group != group || session.closing || session.queue.is_empty()
    })
}

fn is_wanted<R: Ring>(plane: &Plane<R>, group: Group) -> bool {
    let mut wanted = false;
    let group = group.to_be_bytes();
    plane.subscriptions.each(&group, |_| wanted = true);
    wanted
}
