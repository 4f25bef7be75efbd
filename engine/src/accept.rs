//! Connections come in: admit them, or refuse when the table is full.

use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};

use crate::balance::{Imbalance, Origin};
use crate::command::Report;
use crate::config::ANY_CPU;
use crate::connection::Role;
use crate::operation::{Kind, Operation};
use crate::ring::{Event, Ring};
use crate::shard::{Shard, TimerKind};
use crate::steering::Program;

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
            come(shard, socket);
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

/// A connection that the kernel has given to this shard: another one may need it more.
fn come<R: Ring>(shard: &mut Shard<R>, socket: OwnedFd) {
    let kept = match shard.config.imbalance {
        Imbalance::Keep => Err(socket),
        Imbalance::LeastConnections => shard.balance.hand_over(socket),
    };
    match kept {
        Ok(()) => shard.stats.shard.connections_handed_over.add(1),
        Err(socket) => admit(shard, socket),
    }
}

/// A connection that another shard has handed over. It stays here, whatever has changed meanwhile.
pub(crate) fn take_over<R: Ring>(shard: &mut Shard<R>, socket: OwnedFd) {
    shard.ring.take_over(socket.as_raw_fd());
    admit(shard, socket);
    shard.stats.shard.connections_taken_over.add(1);
}

fn admit<R: Ring>(shard: &mut Shard<R>, socket: OwnedFd) {
    let fd = socket.into_raw_fd();
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
    let origin = shard.ring.origin(fd);
    if let Some(slot) = shard.open(fd, Role::Downstream) {
        shard.stats.shard.connections_accepted.add(1);
        note_origin(shard, origin);
        shard.connections[slot].paused = shard.throttled;
        shard.connections[slot].careful = shard.lanes.expected;
        shard.welcome(slot);
    }
}

/// Counts where a connection has come from: once, when it comes.
fn note_origin<R: Ring>(shard: &mut Shard<R>, origin: Origin) {
    let stats = &shard.stats.shard;
    stats.callers.set(shard.balance.came());
    match origin.cpu {
        _ if shard.config.cpu == ANY_CPU => {}
        Some(cpu) if cpu == shard.config.cpu => stats.connections_local.add(1),
        Some(_) => stats.connections_remote.add(1),
        None => {}
    }
    if let Some(napi) = origin.napi {
        stats.receive_queues.set(shard.balance.napis(napi) as u64);
    }
}

impl<R: Ring> Shard<R> {
    /// Has the ring poll the devices' receive queues as it is wanted now, which may be that it
    /// ceases to.
    pub(crate) fn poll_queues(&mut self) {
        let wanted_us = self.config.busy_poll_us;
        let polled = &self.stats.shard.busy_poll_us;
        if u64::from(wanted_us) == polled.get() {
            return;
        }
        match self.ring.busy_poll(wanted_us) {
            Ok(()) => polled.set(wanted_us.into()),
            Err(error) => {
                // A core that spins would sleep so long in place of it.
                self.config.busy_poll_us = 0;
                let errno = error.raw_os_error().unwrap_or(0);
                self.report(Report::NoBusyPoll { errno });
            }
        }
    }

    /// Gives the group of the listening socket another program.
    pub(crate) fn steer(&mut self, program: &Program) {
        let Some(Err(error)) = self.listener.as_ref().map(|own| program.attach(own)) else {
            return;
        };
        let errno = error.raw_os_error().unwrap_or(0);
        self.report(Report::Unsteered { errno });
    }
}
