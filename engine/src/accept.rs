//! Connections come in: admit them, or refuse when the table is full.

use std::os::fd::IntoRawFd;

use crate::connection::Role;
use crate::operation::{Kind, Operation};
use crate::ring::{Event, Ring};
use crate::shard::{Shard, TimerKind};

/// First pause after a failed accept; it doubles up to the last.
const PAUSE_FIRST_NS: u64 = 5_000_000;
const PAUSE_LAST_NS: u64 = 1_000_000_000;

/// The shard begins. From a socket that was handed over nothing is taken before
/// [`crate::command::Command::Accept`]: callers may have waited there for long, and must not be
/// refused because no directory has come yet.
pub(crate) fn begin<R: Ring>(shard: &mut Shard<R>) {
    if shard.config.handed.is_none() {
        arm(shard);
    }
}

/// Asks for connections, again and again.
pub(crate) fn arm<R: Ring>(shard: &mut Shard<R>) {
    if let Some(listener) = shard.listener_fd() {
        shard
            .ring
            .accept(Operation::new(Kind::Accept, 0, 0), listener);
    }
}

/// A connection has come, or the accept has failed.
pub(crate) fn completed<R: Ring>(shard: &mut Shard<R>, event: Event) {
    match event {
        Event::Accepted { socket, more } => {
            shard.accept_pause_ns = 0;
            admit(shard, socket.into_raw_fd());
            if !more {
                arm(shard);
            }
        }
        // Out of descriptors or memory: trying again at once would only spin.
        _ => {
            shard.stats.shard.accept_failures.add(1);
            let pause = (shard.accept_pause_ns * 2).clamp(PAUSE_FIRST_NS, PAUSE_LAST_NS);
            shard.accept_pause_ns = pause;
            shard.timer(TimerKind::Accept, 0, 0, shard.now_ns + pause);
        }
    }
}

fn admit<R: Ring>(shard: &mut Shard<R>, fd: std::os::fd::RawFd) {
    // Some places are kept for the connections that we make ourselves.
    let kept = (shard.config.connections_max as usize / 16).clamp(8, 1024);
    if shard.connections.used() + kept >= shard.config.connections_max as usize {
        shard.stats.shard.connections_refused.add(1);
        shard.ring.close(crate::ring::Handle {
            fd,
            slot: crate::table::NONE,
        });
        return;
    }
    if let Some(slot) = shard.open(fd, Role::Downstream) {
        shard.stats.shard.connections_accepted.add(1);
        shard.connections[slot].paused = shard.throttled;
        shard.connections[slot].careful = shard.lanes.expected;
        shard.welcome(slot);
    }
}
