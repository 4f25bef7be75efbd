//! The two ends of a request inside this process, as the shard's loop sees them: the worker's
//! (handlers answer) and the client's (calls are made).
//!
//! ```text
//! callers --requests--> worker -> handler -> respond_stream --call home--> callers
//! tasks --calls--> client -> call_link --requests--> workers
//!                  client <- home      <--call home-- workers
//! ```

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use crate::config::Idle;
use crate::connection::End;
use crate::handler::MakeHandler;
use crate::mesh::budget::Budget;
use crate::ring::{Ring, Span};
use crate::served::Tracing;
use crate::shard::{Shard, TimerKind};
use crate::{call_link, client, feed, home, input, mux_home, mux_link, respond_stream, worker};

/// What a shard is to be besides a router. The default is: nothing.
#[derive(Default)]
pub struct Ends {
    /// Made on the shard's thread; [`crate::command::Command::Serve`] gives them their paths.
    pub handlers: Vec<MakeHandler>,
    /// Requests in handlers at the same time, at most.
    pub running_max: u32,
    /// Acknowledged requests that wait for a handler, at most.
    pub queue_max: u32,
    /// In place of both for all shards that have it.
    pub budget: Option<Arc<Budget>>,
    /// Where workers call home; without it no call can be made.
    pub home: Option<HomeAddress>,
    /// Calls at the same time, at most.
    pub calls_max: u32,
    /// Whether the requests of handlers make spans.
    pub tracing: Tracing,
}

/// The call-home listener of a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HomeAddress {
    /// Where it listens; port 0 takes any.
    pub bind: SocketAddr,
    /// The address that workers are told.
    pub advertise: IpAddr,
}

impl Ends {
    /// A worker with the bounds of Dynamo's (spec/request-plane.md §10.1).
    pub fn worker(handlers: Vec<MakeHandler>) -> Ends {
        Ends {
            handlers,
            running_max: 10_000,
            queue_max: 40_000,
            ..Ends::default()
        }
    }

    /// A client with so many calls at the same time.
    pub fn client(home: HomeAddress, calls_max: u32) -> Ends {
        Ends {
            home: Some(home),
            calls_max,
            ..Ends::default()
        }
    }
}

/// While handlers are at work, the executor gets a turn this often: they may wait for more than
/// what the shard knows of.
const TURN_EVERY: Duration = Duration::from_millis(1);
/// While requests wait for slots that other shards may free, these are looked at this often.
const SLOT_PAUSE: Duration = Duration::from_millis(1);

/// Starts one send of what waits in `outgoing`, if the socket is free for it.
pub(crate) fn flush<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    let connection = &mut shard.connections[slot];
    if connection.sending || connection.closing || connection.connecting {
        return;
    }
    if connection.outgoing.has_lent() {
        let mut spans = [Span::of(&[]); 64];
        let count = connection.outgoing.unsent_spans(&mut spans);
        return match count {
            0 => {}
            count => shard.send(slot, &spans[..count]),
        };
    }
    let span = Span::of(connection.outgoing.unsent_bytes());
    if !span.is_empty() {
        shard.send(slot, &[span]);
    }
}

/// The connect has succeeded.
pub(crate) fn connected<R: Ring>(shard: &mut Shard<R>, slot: u32, end: End) {
    match end {
        End::Response(response) => respond_stream::connected(shard, response),
        End::Link(link) => call_link::connected(shard, slot, link),
        End::MuxLink(link) => mux_link::connected(shard, slot, link),
        End::Input(source) => input::connected(shard, slot, source),
        End::Feed(_) | End::Home(_) | End::MuxHome(_) | End::Goodbye => {}
    }
}

/// The socket took `bytes` bytes.
pub(crate) fn sent<R: Ring>(shard: &mut Shard<R>, slot: u32, end: End, bytes: usize) {
    match end {
        End::Response(response) => respond_stream::sent(shard, response, bytes),
        _ => {
            let outgoing = &mut shard.connections[slot].outgoing;
            outgoing.sent(bytes);
            if end == End::Goodbye && outgoing.is_empty() {
                return shard.forget(slot);
            }
            flush(shard, slot);
            match end {
                End::MuxLink(link) => mux_link::sent(shard, link),
                End::MuxHome(home) => feed::shared::sent(shard, home),
                End::Input(source) => input::sent(shard, slot, source),
                End::Feed(call) => feed::sent(shard, slot, call),
                _ => {}
            }
        }
    }
}

/// Bytes have arrived.
pub(crate) fn arrived<R: Ring>(shard: &mut Shard<R>, slot: u32, end: End) {
    match end {
        End::Response(response) => respond_stream::said(shard, slot, response),
        End::Link(link) => call_link::replies(shard, slot, link),
        End::Home(_) => home::arrived(shard, slot),
        End::MuxLink(link) => mux_link::arrived(shard, slot, link),
        End::MuxHome(home) => mux_home::arrived(shard, slot, home),
        End::Input(source) => input::arrived(shard, slot, source),
        End::Feed(_) | End::Goodbye => {
            let incoming = &mut shard.connections[slot].incoming;
            shard.pieces.clear(incoming);
        }
    }
}

/// No more bytes will arrive: the peer's end of stream (errno 0), or a failure.
pub(crate) fn ended<R: Ring>(shard: &mut Shard<R>, slot: u32, end: End, errno: i32) {
    match end {
        End::Response(response) if errno == 0 => {
            respond_stream::half_closed(shard, slot, response);
        }
        End::Home(_) => home::ended(shard, slot),
        End::Input(source) => input::ended(shard, slot, source),
        // A worker shuts his direction as soon as he has said for which call he reads.
        End::Feed(_) if errno == 0 => shard.connections[slot].end_of_stream = true,
        _ => shard.lost(slot, errno),
    }
}

/// The connection is gone; it has been closed already.
pub(crate) fn lost<R: Ring>(shard: &mut Shard<R>, slot: u32, end: End, errno: i32) {
    match end {
        End::Response(response) => respond_stream::lost(shard, response, errno),
        End::Link(link) => call_link::lost(shard, link, errno),
        End::Home(_) => home::lost(shard, slot),
        End::MuxLink(link) => mux_link::lost(shard, link),
        End::MuxHome(home) => mux_home::lost(shard, home),
        End::Input(source) => input::lost(shard, source),
        End::Feed(call) => feed::lost(shard, slot, call),
        End::Goodbye => {}
    }
}

/// A timer of `kind` has run out.
pub(crate) fn overdue<R: Ring>(shard: &mut Shard<R>, kind: u8, slot: u32, generation: u32) {
    const RESPONSE: u8 = TimerKind::Response as u8;
    const LINK: u8 = TimerKind::Link as u8;
    const CALL: u8 = TimerKind::Call as u8;
    const HOME: u8 = TimerKind::Home as u8;
    const HOME_ACCEPT: u8 = TimerKind::HomeAccept as u8;
    const MUX: u8 = TimerKind::Mux as u8;
    match kind {
        RESPONSE if shard.worker.responses.is_current(slot, generation) => {
            respond_stream::overdue(shard, slot);
        }
        LINK if shard.client.links.is_current(slot, generation) => {
            call_link::overdue(shard, slot);
        }
        CALL if shard.client.calls.is_current(slot, generation) => client::overdue(shard, slot),
        HOME if shard.connections.is_current(slot, generation) => home::overdue(shard, slot),
        HOME_ACCEPT => home::arm(shard),
        MUX if shard.worker.muxes.links.is_current(slot, generation) => {
            mux_link::overdue(shard, slot);
        }
        _ => {}
    }
}

/// How long the next tick may wait at most.
pub(crate) fn patience<R: Ring>(shard: &Shard<R>, longest: Duration) -> Duration {
    let host = &shard.worker.host;
    if host.is_woken() {
        return Duration::ZERO;
    }
    let mut longest = longest;
    if host.tasks() > 0 {
        longest = longest.min(TURN_EVERY);
    }
    if shard.worker.waits_for_others() {
        longest = longest.min(SLOT_PAUSE);
    }
    match host.next_deadline() {
        Some(deadline_ns) => {
            let left_ns = deadline_ns.saturating_sub(shard.ring.now_ns());
            longest.min(Duration::from_nanos(left_ns))
        }
        None => longest,
    }
}

/// At the end of a tick, and after a turn of the executor: what handlers have written and what
/// calls have made necessary is sent.
pub(crate) fn settle<R: Ring>(shard: &mut Shard<R>) {
    shard.worker.host.wake_sleepers(shard.now_ns);
    let mut touched = std::mem::take(&mut shard.worker.touched);
    shard.worker.host.take_touched(&mut touched);
    for (slot, generation) in touched.drain(..) {
        if shard.worker.responses.is_current(slot, generation) {
            respond_stream::advance(shard, slot);
        }
    }
    shard.worker.touched = touched;
    worker::start_waiting(shard);
    mux_link::flush(shard);
    client::settle(shard);
    let stats = &shard.stats.shard;
    stats.handling.set(shard.worker.busy() as u64);
    stats.queued.set(shard.worker.queued() as u64);
    stats.responses.set(shard.worker.responses.used() as u64);
    stats.calls.set(shard.client.calls.used() as u64);
}

impl<R: Ring> Shard<R> {
    /// Whether the executor should have a turn before the next tick.
    pub fn wants_turn(&self) -> bool {
        self.worker.host.is_woken()
    }

    /// Whether handlers are at work.
    pub fn has_tasks(&self) -> bool {
        self.worker.host.tasks() > 0
    }

    /// Whether nothing happens here that the ring does not know of.
    pub fn may_sleep(&self) -> bool {
        let spins = self.config.idle == Idle::Spin;
        let waits = self.worker.waits_for_others();
        !spins && !waits && !self.has_tasks() && !self.lanes.is_ready()
    }

    /// Brackets a turn of the executor: the tasks that were woken before it have run after it.
    pub fn before_turn(&self) {
        self.worker.host.set_woken(false);
    }

    /// What the tasks have written in their turn goes on its way.
    pub fn after_turn(&mut self) {
        settle(self);
    }

    /// The route, or the marked handler, of a request path.
    pub(crate) fn find(&self, path: &[u8]) -> Option<u32> {
        let route = self.route_at.get(path).copied();
        route.or_else(|| self.worker.find(path))
    }
}
