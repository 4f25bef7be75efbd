//! A shard: all nouns of one core, and the turn of its loop.
//!
//! The order of a tick is fixed:
//!
//! 1. wait: one system call submits everything and takes what is there;
//! 2. commands from control first: they free or need slots, and are few;
//! 3. completions: accept, or receive -> decode -> route -> forward | respond;
//! 4. timers after data: data may have met a deadline;
//! 5. callers who were held back go on, if what they lacked is there again;
//! 6. sends, gathered: what all completions of this tick have queued for one socket leaves as one;
//! 7. buffers go back to the ring, in one release-store.

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use corelane_gpu_mem::lane::layout::Wish;

use crate::adopt::Errand;
use crate::balance::Balance;
use crate::buffers::Buffers;
use crate::client::Client;
use crate::config::{Idle, ShardConfig};
use crate::connection::{Connection, Role};
use crate::directory::Directory;
use crate::ends::Ends;
use crate::executor::Spawner;
use crate::in_flight::Request;
use crate::lane::Lanes as WorkerLanes;
use crate::ledger::{ENVELOPE_BYTES_MAX, Ledger};
use crate::mesh::{Receiver, Sender};
use crate::operation::{Kind, Operation};
use crate::pieces::Pieces;
use crate::quic::{Outbound, Place, ResponsePlane};
use crate::relay::Relays;
use crate::ring::{Completion, Event, Ring, SPANS_MAX, Span};
use crate::route::Chooser;
use crate::routed::Routed;
use crate::send_pool::SendPool;
use crate::stats::{Stats, flight};
use crate::table::Table;
use crate::tell::Tells;
use crate::timer_wheel::TimerWheel;
use crate::upstream::{InstanceState, Upstream};
use crate::worker::Worker;
use crate::{
    accept, call_link, collect, decode, ends, forward, home, kv, lane, link, local, recv,
    relay_flow, relay_home, respond, routed, settings, tell, weigh,
};

pub use crate::command::{Command, Lanes, Report};
pub(crate) use crate::due::TimerKind;

/// State of a route beside its description.
pub(crate) struct RouteState {
    pub(crate) chooser: Chooser,
    /// Slots of its instances, sorted by id.
    pub(crate) instances: Vec<u32>,
    /// Their ids.
    pub(crate) ids: Vec<u64>,
}

/// All state of one core. The ring comes first so that it is dropped first: no operation may
/// outlive the memory it works on.
pub struct Shard<R: Ring> {
    pub(crate) ring: R,
    pub(crate) pieces: Pieces,
    pub(crate) pool: SendPool,
    pub(crate) connections: Table<Connection>,
    pub(crate) requests: Table<Request>,
    pub(crate) instances: Table<InstanceState>,
    pub(crate) upstreams: Table<Upstream>,
    pub(crate) upstream_at: HashMap<SocketAddr, u32>,
    pub(crate) directory: Arc<Directory>,
    pub(crate) routes: Vec<RouteState>,
    pub(crate) route_at: HashMap<Vec<u8>, u32>,
    pub(crate) timers: TimerWheel,
    pub(crate) ledger: Ledger,
    pub(crate) tells: Tells,
    pub(crate) relays: Relays,
    pub(crate) routed: Routed,
    pub(crate) kv: kv::Kv,
    /// Connections with something in `out`.
    pub(crate) dirty_connections: Vec<u32>,
    /// Upstreams with something unsent.
    pub(crate) dirty_upstreams: Vec<u32>,
    /// Upstreams whose answers are asked for at the end of this tick.
    pub(crate) collecting: Vec<u32>,
    /// Connections whose receive found no buffer, with their generation.
    pub(crate) starved: Vec<(u32, u32)>,
    /// Connections with a frame for which no table had room, not even for its refusal, with their
    /// generation.
    pub(crate) crowded: Vec<(u32, u32)>,
    /// Downstream receives are held back until buffers are free again.
    pub(crate) throttled: bool,
    /// How often that has happened; tells one shortage from the next.
    pub(crate) throttles: u32,
    pub(crate) balance: Balance,
    pub(crate) draining: bool,
    pub(crate) stopping: bool,
    pub(crate) epoch: u64,
    pub(crate) accept_pause_ns: u64,
    pub(crate) now_ns: u64,
    pub(crate) config: ShardConfig,
    pub(crate) stats: Arc<Stats>,
    pub(crate) listener: Option<TcpListener>,
    pub(crate) scratch: Vec<u8>,
    pub(crate) worker: Worker,
    pub(crate) client: Client,
    pub(crate) lanes: WorkerLanes,
    pub(crate) due: Vec<u64>,
    pub(crate) insecure: Sender<Errand>,
    pub(crate) outbound: Sender<Outbound>,
    /// No peer that speaks TLS is reported before this time.
    pub(crate) stranger_told_ns: u64,
    commands: Receiver<Command>,
    pub(crate) reports: Sender<Report>,
}

const LEDGER_BYTES: usize = 4 << 20;
/// The longest that a shard sleeps when it expects nothing.
const IDLE_WAIT: Duration = Duration::from_millis(250);

/// Responses that a shard relays at the same time: each has two sockets.
fn relays_max(config: &ShardConfig) -> usize {
    (config.connections_max as usize / 2).max(8)
}

impl<R: Ring> Shard<R> {
    /// A shard over `ring`, which was made for these `buffers`.
    pub(crate) fn new(
        config: ShardConfig,
        mut ring: R,
        buffers: Buffers,
        listener: Option<TcpListener>,
        stats: Arc<Stats>,
        lanes: Lanes,
        (worker, mut client): (Worker, Client),
    ) -> Shard<R> {
        if let (ResponsePlane::Quic, Some(home)) = (config.response_plane, &config.quic_home) {
            client.writer.wait_on_quic(home);
        }
        let connections_max = config.connections_max as usize;
        let in_flight_max = config.in_flight_max as usize;
        let upstreams_max = config.upstreams_max as usize;
        // One reply chunk for each fourth connection, and some for the error texts of requests.
        let pool = SendPool::new((connections_max / 4).clamp(256, 16 * 1024));
        ring.register_fixed(pool.memory());
        // Each buffer is at most one piece of an incoming list; each request has one piece, and
        // one more for each buffer boundary that a frame crosses.
        let pieces = Pieces::new(in_flight_max + 3 * buffers.count(), buffers);
        let ends = worker.responses.capacity() + client.calls.capacity() + client.links.capacity();
        let timers = 2 * (connections_max + upstreams_max) + relays_max(&config) + ends + 1024;
        let now_ns = ring.now_ns();
        Shard {
            ring,
            pieces,
            pool,
            connections: Table::new(connections_max),
            requests: Table::new(in_flight_max),
            instances: Table::new(config.instances_max as usize),
            upstreams: Table::new(upstreams_max),
            upstream_at: HashMap::new(),
            directory: Arc::default(),
            routes: Vec::new(),
            route_at: HashMap::new(),
            timers: TimerWheel::new(timers),
            ledger: Ledger::new(LEDGER_BYTES),
            tells: Tells::new(),
            relays: Relays::none(),
            routed: Routed::new(config.spans),
            kv: kv::Kv::new(),
            dirty_connections: Vec::with_capacity(connections_max),
            dirty_upstreams: Vec::with_capacity(upstreams_max),
            collecting: Vec::with_capacity(upstreams_max),
            starved: Vec::with_capacity(connections_max),
            crowded: Vec::with_capacity(connections_max),
            throttled: false,
            throttles: 0,
            balance: Balance::default(),
            draining: false,
            stopping: false,
            epoch: 0,
            accept_pause_ns: 0,
            now_ns,
            config,
            stats,
            listener,
            scratch: vec![0; decode::SCRATCH_BYTES],
            worker,
            client,
            lanes: WorkerLanes::new(),
            due: Vec::with_capacity(timers),
            insecure: lanes.insecure,
            outbound: lanes.outbound,
            stranger_told_ns: 0,
            commands: lanes.commands,
            reports: lanes.reports,
        }
    }

    /// A shard that only routes, for whoever drives a ring by himself.
    pub fn router(
        config: ShardConfig,
        ring: R,
        buffers: Buffers,
        listener: Option<TcpListener>,
        stats: Arc<Stats>,
        lanes: Lanes,
    ) -> Shard<R> {
        let ends = Ends::default();
        let client = Client::new(&ends, None);
        let worker = Worker::new(ends, Spawner::local());
        let ends = (worker, client);
        Shard::new(config, ring, buffers, listener, stats, lanes, ends)
    }

    /// Workers whose responses this shard relays call home at `listener`; they are told `address`.
    pub fn relay_home(&mut self, listener: TcpListener, address: SocketAddr) {
        self.relays = Relays::new(listener, address, relays_max(&self.config));
        self.relays.core = self.config.shard;
        self.relays.quic = self.config.quic_home.as_ref().map(Place::new);
    }

    /// Begins to accept, and to watch for commands.
    pub fn start(&mut self) {
        self.watch_wake();
        self.poll_queues();
        accept::begin(self);
        home::arm(self);
        relay_home::arm(self);
        local::show_places(self);
        let address = self
            .listener
            .as_ref()
            .and_then(|listener| listener.local_addr().ok());
        self.report(Report::Started { address });
    }

    fn watch_wake(&mut self) {
        let wake = Operation::new(Kind::Wake, 0, 0);
        self.ring.watch_wake(wake, self.commands.wake_fd());
    }

    /// Whether the loop is to end.
    pub fn is_stopping(&self) -> bool {
        self.stopping
    }

    /// Tells control something. A full queue loses the report, and answers false: control reads
    /// counters as well.
    pub(crate) fn report(&self, report: Report) -> bool {
        self.reports.send(report).is_ok()
    }

    /// One turn of the loop. Returns whether anything happened.
    ///
    /// # Errors
    /// The ring is broken; the shard cannot go on.
    pub fn tick(&mut self, longest: Duration) -> io::Result<bool> {
        self.ring.wait(self.patience(longest))?;
        self.now_ns = self.ring.now_ns();
        self.lanes.wish(Wish::Never);
        let mut completions = 0u32;
        while let Some(completion) = self.ring.next_completion() {
            completions += 1;
            self.complete(completion);
        }
        let lanes = lane::poll(self);
        let timers = self.expire();
        self.relieve();
        self.send_all();
        self.return_buffers();
        routed::wake(self);
        self.show(completions);
        if self.config.idle == Idle::Block {
            self.lanes.wish(Wish::News);
        }
        Ok(completions > 0 || lanes || timers)
    }

    /// How long the wait may last: until the next timer, or not at all when the core spins.
    fn patience(&self, longest: Duration) -> Duration {
        // A core that spins and polls its receive queues lets the ring do both.
        let spins = Duration::from_micros(self.config.busy_poll_us.into());
        let longest = match self.config.idle {
            Idle::Spin => spins,
            Idle::Block => longest.min(IDLE_WAIT),
        };
        if longest.is_zero() || self.lanes.is_ready() {
            return Duration::ZERO;
        }
        let longest = ends::patience(self, longest);
        match self.timers.next_deadline() {
            Some(deadline) => {
                let now_ns = self.ring.now_ns();
                longest.min(Duration::from_nanos(deadline.saturating_sub(now_ns)))
            }
            None => longest,
        }
    }

    /// Time until the next timer of the shard is due.
    pub fn until_next_timer(&self) -> Duration {
        let deadline = self.timers.next_deadline().unwrap_or(u64::MAX);
        Duration::from_nanos(deadline.saturating_sub(self.ring.now_ns()))
    }

    fn complete(&mut self, completion: Completion) {
        let Completion { operation, event } = completion;
        match operation.kind {
            Kind::Accept if operation.slot == home::LISTENER => {
                return home::accepted(self, event);
            }
            Kind::Accept if operation.slot == relay_home::LISTENER => {
                return relay_home::accepted(self, event);
            }
            Kind::Accept => return accept::completed(self, event),
            Kind::Wake if operation.slot > 0 => {
                if let Event::Woken { more } = event {
                    lane::woken(self, operation.slot - 1, operation.generation, more);
                }
                return;
            }
            Kind::Wake => {
                if event.is_last_wake() {
                    self.watch_wake();
                }
                return self.obey();
            }
            Kind::Cancel => return,
            Kind::Receive | Kind::Collect | Kind::Send | Kind::Reply | Kind::Connect => {}
        }
        let slot = operation.slot;
        if !self.connections.is_current(slot, operation.generation) {
            self.stats.shard.stale_completions.add(1);
            return event.give_back(&mut self.ring);
        }
        match event {
            Event::Received {
                buffer,
                bytes,
                more,
            } => {
                // A look beside a receive says nothing of how that goes on.
                let beside = operation.kind == Kind::Collect;
                let more = more && (!beside || self.connections[slot].receiving);
                recv::received(self, slot, buffer, bytes, more);
            }
            Event::Landed { bytes } => recv::landed(self, slot, bytes),
            Event::EndOfStream => recv::ended(self, slot, 0),
            Event::ReceiveFailed { errno } => recv::ended(self, slot, errno),
            Event::NoBuffers => recv::starved(self, slot),
            Event::Sent { bytes } => {
                self.connections[slot].sending = false;
                self.stats.shard.sent_bytes.add(u64::from(bytes));
                self.sent(slot, bytes as usize);
            }
            Event::SendFailed { errno } => {
                self.connections[slot].sending = false;
                self.lost(slot, errno);
            }
            Event::Connected { errno } => {
                self.connections[slot].connecting = false;
                self.connected(slot, errno);
            }
            Event::Accepted { .. } | Event::AcceptFailed { .. } | Event::Woken { .. } => {}
        }
        if let Some(connection) = self.connections.get(slot)
            && connection.closing
            && connection.is_quiet()
        {
            self.retire(slot);
        }
    }

    fn sent(&mut self, slot: u32, bytes: usize) {
        if self.connections[slot].closing {
            return;
        }
        match self.connections[slot].role {
            Role::Downstream => respond::replies_sent(self, slot, bytes),
            Role::Upstream(upstream) => forward::sent(self, upstream, bytes),
            Role::Tell(tell) => tell::sent(self, tell, bytes),
            Role::End(end) => ends::sent(self, slot, end, bytes),
            Role::Relay(leg) => relay_flow::sent(self, slot, leg, bytes),
        }
    }

    fn connected(&mut self, slot: u32, errno: i32) {
        if self.connections[slot].closing {
            return;
        }
        if errno != 0 {
            return self.lost(slot, errno);
        }
        match self.config.secure_dials {
            true => self.hand_out(slot, true),
            false => self.established(slot),
        }
    }

    /// A dialled connection can be used.
    pub(crate) fn established(&mut self, slot: u32) {
        self.receive(slot);
        match self.connections[slot].role {
            Role::Downstream => {}
            Role::Upstream(upstream) => link::connected(self, upstream),
            Role::Tell(tell) => tell::connected(self, tell),
            Role::End(end) => ends::connected(self, slot, end),
            Role::Relay(leg) => relay_flow::connected(self, slot, leg),
        }
    }

    /// The connection is of no use any more: its end of stream, an error, or our own decision.
    pub(crate) fn lost(&mut self, slot: u32, errno: i32) {
        if self.connections[slot].closing {
            return;
        }
        let role = self.connections[slot].role;
        self.note_socket(flight::Kind::Lost, slot, errno.unsigned_abs().into());
        self.close(slot);
        match role {
            Role::Downstream => respond::downstream_lost(self, slot),
            Role::Upstream(upstream) => link::lost(self, upstream, errno),
            Role::Tell(tell) => tell::lost(self, tell, errno),
            Role::End(end) => ends::lost(self, slot, end, errno),
            Role::Relay(leg) => relay_flow::lost(self, leg),
        }
        self.retire_if_quiet(slot);
    }

    /// Closes a socket of ours that does not linger so that its peer sees a reset, no farewell.
    pub(crate) fn reset(&mut self, slot: u32) {
        let operation = self.operation(Kind::Receive, slot);
        let connection = &mut self.connections[slot];
        connection.kernel_tls = false;
        if !connection.closing {
            connection.closing = true;
            if connection.receiving {
                self.ring.cancel_receive(operation, connection.handle);
            }
        }
        self.retire_if_quiet(slot);
    }

    pub(crate) fn operation(&self, kind: Kind, slot: u32) -> Operation {
        Operation::new(kind, slot, self.connections.generation(slot))
    }

    /// Starts the sends that this tick has made necessary.
    fn send_all(&mut self) {
        let mut upstreams = std::mem::take(&mut self.dirty_upstreams);
        for upstream in upstreams.drain(..) {
            forward::flush(self, upstream);
        }
        self.dirty_upstreams = upstreams;
        relay_flow::flush_all(self);
        let mut connections = std::mem::take(&mut self.dirty_connections);
        for slot in connections.drain(..) {
            self.flush(slot);
        }
        self.dirty_connections = connections;
        ends::settle(self);
        lane::settle(self);
        collect::ask(self);
    }

    /// Notes that a connection has something in `out`.
    pub(crate) fn soil(&mut self, slot: u32) {
        let connection = &mut self.connections[slot];
        if !connection.dirty {
            connection.dirty = true;
            self.dirty_connections.push(slot);
        }
    }

    fn flush(&mut self, slot: u32) {
        let Some(connection) = self.connections.get_mut(slot) else {
            return;
        };
        connection.dirty = false;
        if connection.sending || connection.closing || connection.out.is_empty() {
            return;
        }
        let out = connection.out;
        let mut spans = [Span::of(&[]); 16];
        let mut count = 0;
        for (span, bytes) in spans.iter_mut().zip(self.pool.unsent(&out)) {
            *span = Span::of(bytes);
            count += 1;
        }
        const { assert!(16 <= SPANS_MAX) };
        self.send_as(Kind::Reply, slot, &spans[..count]);
    }

    /// Holds callers back, or lets them go on. Before the sends: what they sent meanwhile is
    /// forwarded in this tick.
    fn relieve(&mut self) {
        let (held, count) = (self.pieces.buffers.held(), self.pieces.buffers.count());
        if !self.throttled && held > count - count / 8 {
            recv::throttle(self);
        } else if self.throttled && held < count - count / 4 {
            recv::unthrottle(self);
        }
        if !self.crowded.is_empty() && !self.requests.is_full() {
            recv::make_room(self);
        }
    }

    /// Gives free buffers back, and wakes who waits for one.
    fn return_buffers(&mut self) {
        for buffer in self.pieces.recycled.drain(..) {
            self.ring.recycle(buffer);
        }
        let (held, count) = (self.pieces.buffers.held(), self.pieces.buffers.count());
        if !self.starved.is_empty() && held < count {
            recv::feed_starved(self);
        }
    }

    /// Whether a request may keep its frame after it was sent: only while buffers are plenty.
    pub(crate) fn may_hold(&self) -> bool {
        let (held, count) = (self.pieces.buffers.held(), self.pieces.buffers.count());
        held < count - count / 4
    }

    pub(crate) fn obey(&mut self) {
        self.commands.clear_wake();
        while let Some(command) = self.commands.next() {
            self.note_command(&command);
            match command {
                Command::Directory(directory) => link::publish(self, directory),
                Command::Kv(batch) => kv::apply(self, &batch),
                Command::Loads(reports) => kv::hear(self, &reports),
                Command::Weigh(question) => weigh::answer(self, *question),
                Command::Settings(new) => settings::change(self, new),
                Command::Census(census) => settings::count(self, census),
                Command::Handler(new) => self.worker.add(new),
                Command::Serve(paths) => {
                    self.worker.serve(paths);
                    self.stats.shard.path_updates.add(1);
                }
                Command::Lane(new) => lane::attach(self, *new),
                Command::EndLanes { worker } => lane::end(self, worker),
                Command::InstanceLeft { address, path } => {
                    call_link::instance_left(self, address, &path);
                }
                Command::Adopt { ticket, adoption } => self.adopt(ticket, adoption),
                Command::Broken { ticket, errno } => self.broken(ticket, errno),
                Command::Inbound(inbound) => self.come_home(inbound),
                Command::Run(run) => run.begin(&self.worker.host),
                Command::Wake(task) => self.worker.host.wake(task),
                Command::Neighbours(neighbours) => self.balance.meet(neighbours),
                Command::TakeOver(socket) => accept::take_over(self, socket),
                Command::Steer(program) => self.steer(&program),
                Command::Accept => accept::arm(self),
                // The listener stays open: who still dials is told by a refusal, not by a reset.
                Command::Drain => {
                    self.draining = true;
                    self.stats.shard.draining.set(1);
                }
                Command::Stop => self.stop(),
            }
        }
    }

    fn show(&self, completions: u32) {
        let stats = &self.stats.shard;
        stats.ticks.add(1);
        stats.idle_ticks.add(u64::from(completions == 0));
        stats.connections.set(self.connections.used() as u64);
        stats.in_flight.set(self.requests.used() as u64);
        let held = self.pieces.buffers.held() as u64;
        stats.buffers_held.set(held);
        let peak = held.max(stats.buffers_held_peak.get());
        stats.buffers_held_peak.set(peak);
        stats.pieces.set(self.pieces.used() as u64);
        stats.chunks.set(self.pool.used() as u64);
        stats.timers.set(self.timers.len() as u64);
        stats.ledger.set(self.ledger.len() as u64);
        stats.tells.set(self.tells.len() as u64);
        stats.relays.set(self.relays.table.used() as u64);
        stats.relay_strangers.set(self.relays.strangers as u64);
        stats.relay_heads.set(self.relays.heads.used() as u64);
        stats.system_calls.set(self.ring.system_calls());
    }

    /// The ring, for the executor that drives the shard.
    pub fn ring(&mut self) -> &mut R {
        &mut self.ring
    }
}

const _: () = assert!(ENVELOPE_BYTES_MAX <= LEDGER_BYTES);
