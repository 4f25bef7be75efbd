//! All nouns of the event plane, and the turn of its loop.
//!
//! ```text
//! wait          one system call submits everything and takes what is there
//! completions   accept | receive -> take -> fan out | sent | control's commands
//! housekeeping  ten times a second: handshakes and dials that are due
//! relief        when buffers are short: what slow sessions pin is put aside
//! sends         all that this turn has queued for one socket leaves as one
//! buffers       go back to the ring
//! ```

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use corelane_codec::zmtp::Mechanism;
use rustix::time::{ClockId, clock_gettime};

use super::crossing::Crossed;
use super::memory::{Memory, Slice};
use super::security::Told;
use super::sequence::Sequences;
use super::session::{HANDSHAKE_NS, Session, Stage, Wire};
use super::stats::Stats;
use super::subscriptions::Subscriptions;
use super::{
    Command, Door, Group, PlaneConfig, Report, Security, Side, asks, local, relief, security, take,
};
use crate::buffers::Buffers;
use crate::config::{Idle, RingKind};
use crate::mesh::{Receiver, Sender};
use crate::operation::{Kind, Operation};
use crate::ring::{Completion, Event, Ring, Span};
use crate::table::Table;

/// Between two looks at deadlines.
const HOUSEKEEPING_NS: u64 = 100_000_000;
/// Queues are emptied for so long at the end.
const LINGER_NS: u64 = 1_000_000_000;

pub(super) struct DoorState {
    /// `None`: it has been closed, and another may take its place.
    pub(super) door: Option<Door>,
    /// It is to be closed as soon as the kernel has let go of it.
    pub(super) closing: bool,
    pub(super) armed: bool,
    pub(super) again_ns: u64,
}

/// A socket that we connect to, again and again.
#[derive(Clone)]
pub(super) struct DialState {
    pub(super) dial: u64,
    pub(super) address: SocketAddr,
    pub(super) side: Side,
    pub(super) group: Group,
    pub(super) security: Security,
    pub(super) slot: Option<u32>,
    pub(super) again_ns: u64,
    pub(super) pause_ns: u64,
}

/// The plane. The ring comes first so that it is dropped first: no operation may outlive the
/// memory it works on.
pub(super) struct Plane<R: Ring> {
    pub(super) ring: R,
    pub(super) memory: Memory,
    pub(super) sessions: Table<Session>,
    /// Slots of open publishers.
    pub(super) publishers: Vec<u32>,
    /// How many subscribers are open.
    pub(super) subscribers: u64,
    pub(super) doors: Vec<DoorState>,
    pub(super) dials: Vec<DialState>,
    pub(super) consumers: Vec<Option<local::Consumer>>,
    /// Places of consumers that something was delivered to in this turn.
    pub(super) news: Vec<usize>,
    pub(super) asks: Vec<asks::Ask>,
    pub(super) subscriptions: Subscriptions,
    pub(super) sequences: Sequences,
    pub(super) queued_bytes: u64,
    /// Sessions with something to send.
    pub(super) dirty: Vec<u32>,
    /// Sessions whose receive found no buffer, with their generation.
    pub(super) starved: Vec<(u32, u32)>,
    pub(super) config: PlaneConfig,
    pub(super) stats: Arc<Stats>,
    pub(super) now_ns: u64,
    pub(super) stopping: bool,
    pub(super) scratch: Vec<u8>,
    pub(super) slices: Vec<Slice>,
    pub(super) spans: Vec<Span>,
    pub(super) runs: Vec<take::Run>,
    pub(super) crossed: Vec<Crossed>,
    pub(super) lost_told_ns: u64,
    pub(super) told: Told,
    housekeeping_ns: u64,
    stop_ns: u64,
    commands: Receiver<Command>,
    reports: Sender<Report>,
}

impl<R: Ring> Plane<R> {
    pub(super) fn new(
        config: PlaneConfig,
        ring: R,
        buffers: Buffers,
        stats: Arc<Stats>,
        commands: Receiver<Command>,
        reports: Sender<Report>,
    ) -> Plane<R> {
        let sessions_max = config.sessions_max as usize;
        let now_ns = ring.now_ns();
        Plane {
            ring,
            memory: Memory::new(buffers),
            sessions: Table::new(sessions_max),
            publishers: Vec::new(),
            subscribers: 0,
            doors: Vec::new(),
            dials: Vec::new(),
            consumers: Vec::new(),
            news: Vec::new(),
            asks: Vec::new(),
            subscriptions: Subscriptions::new(),
            sequences: Sequences::default(),
            queued_bytes: 0,
            dirty: Vec::with_capacity(sessions_max),
            starved: Vec::new(),
            config,
            stats,
            now_ns,
            stopping: false,
            scratch: Vec::new(),
            slices: Vec::new(),
            spans: Vec::new(),
            runs: Vec::new(),
            crossed: Vec::new(),
            lost_told_ns: 0,
            told: Told::default(),
            housekeeping_ns: 0,
            stop_ns: u64::MAX,
            commands,
            reports,
        }
    }

    /// Begins to watch for commands, and to accept at the doors.
    pub(super) fn start(&mut self, doors: Vec<Door>) {
        self.watch_wake();
        for door in doors {
            self.open_door(door);
        }
    }

    pub(super) fn open_door(&mut self, door: Door) {
        // io_uring waits by itself, and only on blocking sockets.
        let nonblocking = self.config.ring == RingKind::Epoll;
        let _ = door.listener.set_nonblocking(nonblocking);
        let state = DoorState {
            door: Some(door),
            closing: false,
            armed: false,
            again_ns: 0,
        };
        let free = self.doors.iter().position(|state| state.door.is_none());
        let place = free.unwrap_or(self.doors.len());
        match self.doors.get_mut(place) {
            Some(known) => *known = state,
            None => self.doors.push(state),
        }
        self.arm(place);
    }

    fn watch_wake(&mut self) {
        let wake = Operation::new(Kind::Wake, 0, 0);
        self.ring.watch_wake(wake, self.commands.wake_fd());
    }

    /// Tells control something. A full queue loses it: control reads counters as well.
    pub(super) fn report(&self, report: Report) {
        let _ = self.reports.send(report);
    }

    /// One turn of the loop.
    ///
    /// # Errors
    /// The ring is broken.
    pub(super) fn tick(&mut self) -> io::Result<()> {
        let patience = match self.config.idle {
            Idle::Block => Duration::from_nanos(HOUSEKEEPING_NS),
            Idle::Spin => Duration::ZERO,
        };
        self.ring.wait(patience)?;
        self.now_ns = self.ring.now_ns();
        let mut idle = true;
        while let Some(completion) = self.ring.next_completion() {
            idle = false;
            self.complete(completion);
        }
        self.stats.plane.idle_ticks.add(u64::from(idle));
        if self.now_ns >= self.housekeeping_ns {
            self.housekeeping_ns = self.now_ns + HOUSEKEEPING_NS;
            self.keep_house();
        }
        relief::relieve(self);
        self.send_all();
        for buffer in self.memory.recycled.drain(..) {
            self.ring.recycle(buffer);
        }
        local::wake_consumers(self);
        asks::answer(self);
        self.stats.plane.ticks.add(1);
        Ok(())
    }

    /// Whether the loop is to end: told to, and nothing waits any more or the time is over.
    pub(super) fn is_over(&self) -> bool {
        self.stopping && (self.queued_bytes == 0 || self.now_ns >= self.stop_ns)
    }

    fn complete(&mut self, completion: Completion) {
        let Completion { operation, event } = completion;
        let slot = operation.slot;
        match operation.kind {
            Kind::Accept => return self.accepted(slot, event),
            Kind::Wake => {
                if event.is_last_wake() {
                    self.watch_wake();
                }
                return self.obey();
            }
            _ => {}
        }
        if !self.sessions.is_current(slot, operation.generation) {
            return event.give_back(&mut self.ring);
        }
        match event {
            Event::Received {
                buffer,
                bytes,
                more,
            } => {
                self.sessions[slot].receiving = more;
                let block = self.memory.take(buffer);
                let (start, end) = (0, bytes);
                self.came(slot, Slice { block, start, end });
                take::take(self, slot);
                self.receive(slot);
            }
            Event::EndOfStream | Event::ReceiveFailed { .. } => {
                self.sessions[slot].receiving = false;
                security::left(self, slot);
                self.close(slot);
            }
            Event::NoBuffers => {
                let session = &mut self.sessions[slot];
                (session.receiving, session.starved) = (false, true);
                self.starved.push((slot, operation.generation));
                self.stats.plane.buffers_exhausted.add(1);
            }
            Event::Sent { bytes } => self.sent(slot, bytes as usize),
            Event::SendFailed {
                errno: libc::ECANCELED,
            } => relief::cancelled(self, slot),
            Event::SendFailed { .. } => {
                self.sessions[slot].sending = false;
                self.close(slot);
            }
            Event::Connected { errno } => self.connected(slot, errno),
            _ => {}
        }
        self.retire_if_quiet(slot);
    }

    /// Bytes have come; out of their boxes, if that is what they are in.
    fn came(&mut self, slot: u32, slice: Slice) {
        #[cfg(feature = "curve")]
        if self.sessions[slot].is_sealed() {
            return super::curve::came(self, slot, slice);
        }
        self.sessions[slot].incoming.push(slice);
    }

    fn obey(&mut self) {
        self.commands.clear_wake();
        while let Some(command) = self.commands.next() {
            match command {
                Command::Stop => {
                    self.stopping = true;
                    self.stop_ns = self.now_ns + LINGER_NS;
                }
                command => local::obey(self, command),
            }
        }
    }

    /// A session's handshake has ended well.
    pub(super) fn opened(&mut self, slot: u32) {
        let session = &mut self.sessions[slot];
        session.stage = Stage::Open;
        let (peer, side, dial) = (session.peer, session.side, session.dial);
        if let Some(state) = self.dials.iter_mut().find(|state| Some(state.dial) == dial) {
            state.pause_ns = 0;
        }
        match side {
            Side::Publisher => {
                self.publishers.push(slot);
                self.tell_wishes(slot);
            }
            Side::Subscriber => self.subscribers += 1,
        }
        self.report(Report::Opened { peer, side });
    }

    fn keep_house(&mut self) {
        let now_ns = self.now_ns;
        for door in 0..self.doors.len() {
            let state = &self.doors[door];
            if !state.armed && !state.closing && now_ns >= state.again_ns && !self.stopping {
                self.arm(door);
            }
        }
        for place in 0..self.dials.len() {
            let state = &self.dials[place];
            if state.slot.is_none() && now_ns >= state.again_ns && !self.stopping {
                self.dial(place);
            }
        }
        let overdue = |session: &Session| {
            session.stage != Stage::Open && now_ns >= session.since_ns + HANDSHAKE_NS
        };
        let late: Vec<u32> = self
            .sessions
            .slots()
            .filter(|s| overdue(&self.sessions[*s]))
            .collect();
        for slot in late {
            self.refuse(slot, "its handshake took longer than 30 s");
        }
        self.see_off();
        // Those of which the kernel held nothing when they were closed have no completion to come.
        let closed: Vec<u32> = self
            .sessions
            .slots()
            .filter(|slot| self.sessions[*slot].closing)
            .collect();
        for slot in closed {
            self.retire_if_quiet(slot);
        }
        relief::unblock(self);
        self.show();
    }

    fn show(&mut self) {
        let plane = &self.stats.plane;
        plane.publishers.set(self.publishers.len() as u64);
        plane.subscribers.set(self.subscribers);
        plane.subscriptions.set(self.subscriptions.len() as u64);
        plane.publishers_followed.set(self.sequences.len() as u64);
        plane.queued_bytes.set(self.queued_bytes);
        let plain = |slot: &u32| {
            let session = &self.sessions[*slot];
            session.wire == Wire::Plain && session.is_open()
        };
        plane
            .plain_peers
            .set(self.sessions.slots().filter(plain).count() as u64);
        let sealed = |slot: &u32| {
            let session = &self.sessions[*slot];
            session.security.mechanism() == Mechanism::Curve && session.is_open()
        };
        plane
            .curve_peers
            .set(self.sessions.slots().filter(sealed).count() as u64);
        let cpu = clock_gettime(ClockId::ThreadCPUTime);
        let cpu_us = cpu.tv_sec * 1_000_000 + cpu.tv_nsec / 1000;
        plane.cpu_us.set(cpu_us as u64);
        let queues = self
            .sessions
            .slots()
            .map(|slot| self.sessions[slot].queue.messages());
        plane
            .queued_events_longest
            .set(queues.max().unwrap_or(0) as u64);
        let in_use = self.memory.buffers() - self.memory.free_buffers();
        plane.buffers_in_use.set(in_use as u64);
        plane.system_calls.set(self.ring.system_calls());
    }
}
