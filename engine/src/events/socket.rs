//! Sockets of the plane: accepted, dialled, written to, closed.

use std::net::SocketAddr;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};

use super::plane::{DialState, Plane};
use super::session::{Session, Stage, Wire, greet};
use super::{Door, DoorKind, Report, Security, Side};
use crate::operation::{Kind, Operation};
use crate::ring::{Event, Handle, Ring, Span};
use crate::table::NONE;

/// A peer whose host has gone is found out after about so long without a word.
const KEEPALIVE: Duration = Duration::from_secs(30);
/// First pause before a dial is tried again; it doubles up to the last.
const PAUSE_FIRST_NS: u64 = 100_000_000;
const PAUSE_LAST_NS: u64 = 5_000_000_000;
/// Whoever came in by a door that is shut has so long to take what waits for him.
const LEAVE_NS: u64 = 1_000_000_000;
/// A pause after an accept that failed, for lack of descriptors for example.
const ACCEPT_PAUSE_NS: u64 = 100_000_000;

impl<R: Ring> Plane<R> {
    pub(super) fn operation(&self, kind: Kind, slot: u32) -> Operation {
        Operation::new(kind, slot, self.sessions.generation(slot))
    }

    /// Asks for connections at a door.
    pub(super) fn arm(&mut self, door: usize) {
        let state = &mut self.doors[door];
        let Some(entry) = state.door.as_ref().filter(|_| !state.closing) else {
            return;
        };
        let listener = entry.listener.as_raw_fd();
        state.armed = true;
        let operation = Operation::new(Kind::Accept, door as u32, 0);
        self.ring.accept(operation, listener);
    }

    /// Nobody comes in by the doors of this group any more; who is in stays until he has got what
    /// waits for him.
    pub(super) fn shut(&mut self, group: super::Group) {
        for place in 0..self.doors.len() {
            let state = &mut self.doors[place];
            let Some(door) = state.door.as_ref().filter(|door| door.group == group) else {
                continue;
            };
            state.closing = true;
            if state.armed {
                let fd = door.listener.as_raw_fd();
                let operation = Operation::new(Kind::Accept, place as u32, 0);
                self.ring
                    .cancel_receive(operation, Handle { fd, slot: NONE });
            } else {
                self.close_door(place);
            }
        }
        let leave_ns = self.now_ns + LEAVE_NS;
        for slot in self.sessions.slots().collect::<Vec<u32>>() {
            let session = &mut self.sessions[slot];
            if session.group == group && session.dial.is_none() {
                session.leave_ns = Some(leave_ns);
            }
        }
        self.see_off();
    }

    fn close_door(&mut self, place: usize) {
        if let Some(door) = self.doors[place].door.take() {
            let fd = door.listener.into_raw_fd();
            self.ring.close(Handle { fd, slot: NONE });
        }
    }

    /// Closes those whose doors are shut and for whom nothing waits, or has waited too long.
    pub(super) fn see_off(&mut self) {
        let now_ns = self.now_ns;
        let goes = |session: &Session| {
            let leaves = |leave_ns| session.queue.is_empty() || now_ns >= leave_ns;
            !session.closing && session.leave_ns.is_some_and(leaves)
        };
        let slots = self.sessions.slots();
        let going: Vec<u32> = slots.filter(|slot| goes(&self.sessions[*slot])).collect();
        for slot in going {
            self.close(slot);
        }
    }

    pub(super) fn accepted(&mut self, door: u32, event: Event) {
        let Some(entry) = self.doors.get_mut(door as usize) else {
            return;
        };
        if entry.closing {
            entry.armed = matches!(event, Event::Accepted { more: true, .. });
            if !entry.armed {
                self.close_door(door as usize);
            }
            return;
        }
        let Some(Door {
            kind,
            group,
            ref security,
            ..
        }) = entry.door
        else {
            return;
        };
        let security = security.clone();
        match event {
            Event::Accepted { socket, more } => {
                entry.armed = more;
                if !more && !self.stopping {
                    self.arm(door as usize);
                }
                self.admit(socket, kind, group, security);
            }
            _ => {
                entry.armed = false;
                entry.again_ns = self.now_ns + ACCEPT_PAUSE_NS;
            }
        }
    }

    fn admit(&mut self, socket: OwnedFd, kind: DoorKind, group: super::Group, security: Security) {
        let (side, wire) = match kind {
            DoorKind::Publishers => (Side::Publisher, Wire::Zmtp),
            DoorKind::Subscribers => (Side::Subscriber, Wire::Zmtp),
            // Its hello says what it is.
            DoorKind::Plain => (Side::Subscriber, Wire::Plain),
        };
        let peer = SockRef::from(&socket).peer_addr().ok();
        let peer = peer.and_then(|peer| peer.as_socket());
        // A socket without a peer has been reset already.
        let (Some(peer), false) = (peer, self.stopping) else {
            return;
        };
        prepare(&SockRef::from(&socket));
        if let Some(slot) = self.open(socket.into_raw_fd(), peer, side, group) {
            let session = &mut self.sessions[slot];
            (session.wire, session.source.wire) = (wire, wire);
            session.security = security;
            greet(self, slot);
            self.receive(slot);
        }
    }

    /// Puts a socket into the table. `None`, and the socket is closed, when that is full.
    fn open(
        &mut self,
        fd: std::os::fd::RawFd,
        peer: SocketAddr,
        side: Side,
        group: super::Group,
    ) -> Option<u32> {
        let session = Session::new(Handle { fd, slot: NONE }, peer, group, side);
        match self.sessions.insert(session) {
            Ok(slot) => {
                self.sessions[slot].handle.slot = slot;
                self.sessions[slot].since_ns = self.now_ns;
                self.ring.attach(self.sessions[slot].handle);
                Some(slot)
            }
            Err(session) => {
                self.stats.plane.sessions_turned_away.add(1);
                self.ring.close(session.handle);
                None
            }
        }
    }

    /// Begins to connect.
    pub(super) fn dial(&mut self, place: usize) {
        let DialState {
            dial,
            address,
            side,
            group,
            security,
            ..
        } = self.dials[place].clone();
        let slot = match self.ring.connect_socket(&address) {
            Ok(fd) => self.open(fd, address, side, group),
            Err(_) => None,
        };
        let Some(slot) = slot else {
            return self.dial_later(dial);
        };
        self.dials[place].slot = Some(slot);
        let session = &mut self.sessions[slot];
        (session.dial, session.stage, session.connecting) = (Some(dial), Stage::Dialling, true);
        session.security = security;
        let handle = session.handle;
        let operation = self.operation(Kind::Connect, slot);
        self.ring.connect(operation, handle, &address);
    }

    /// The connection of a dial has gone, or could not be made.
    pub(super) fn dial_later(&mut self, dial: u64) {
        let now_ns = self.now_ns;
        if let Some(state) = self.dials.iter_mut().find(|state| state.dial == dial) {
            state.slot = None;
            state.pause_ns = (state.pause_ns * 2).clamp(PAUSE_FIRST_NS, PAUSE_LAST_NS);
            state.again_ns = now_ns + state.pause_ns;
        }
    }

    pub(super) fn connected(&mut self, slot: u32, errno: i32) {
        let session = &mut self.sessions[slot];
        session.connecting = false;
        if session.closing {
            return;
        }
        if errno != 0 {
            return self.close(slot);
        }
        greet(self, slot);
        self.receive(slot);
    }

    /// Asks for a multishot receive unless there is one or none is wanted.
    pub(super) fn receive(&mut self, slot: u32) {
        let operation = self.operation(Kind::Receive, slot);
        let session = &mut self.sessions[slot];
        if session.receiving || session.closing || session.connecting || session.starved {
            return;
        }
        session.receiving = true;
        self.ring.receive(operation, session.handle);
    }

    /// Queues bytes that are no event; a peer that never reads them goes.
    pub(super) fn push_control(&mut self, slot: u32, bytes: &[u8]) {
        let session = &mut self.sessions[slot];
        if session.closing {
            return;
        }
        if session.queue.push_control(&mut self.memory, bytes) {
            self.queued_bytes += bytes.len() as u64;
            self.mark(slot);
        } else {
            self.refuse(slot, "it does not read what it is told");
        }
    }

    /// It has something to send.
    #[inline]
    pub(super) fn mark(&mut self, slot: u32) {
        let session = &mut self.sessions[slot];
        if !session.dirty {
            session.dirty = true;
            self.dirty.push(slot);
        }
    }

    /// Everything that this turn has queued leaves, as one send for each socket.
    pub(super) fn send_all(&mut self) {
        let mut dirty = std::mem::take(&mut self.dirty);
        for slot in dirty.drain(..) {
            if let Some(session) = self.sessions.get_mut(slot) {
                session.dirty = false;
                if !session.sending && !session.closing && !session.connecting {
                    self.send(slot);
                }
            }
        }
        self.dirty = dirty;
    }

    fn send(&mut self, slot: u32) {
        self.slices.clear();
        self.depart(slot);
        if self.slices.is_empty() {
            return;
        }
        self.spans.clear();
        let memory = &self.memory;
        let spans = self
            .slices
            .iter()
            .map(|slice| Span::of(memory.bytes(*slice)));
        self.spans.extend(spans);
        let session = &mut self.sessions[slot];
        // The completion of a send that empties the queue of a reader that keeps up is no reason
        // to wake up.
        let kind = match session.slow || session.queue.has_more() {
            true => Kind::Send,
            false => Kind::Reply,
        };
        (session.sending, session.send_ns) = (true, self.now_ns);
        session.send_kind = kind;
        let (handle, generation) = (session.handle, self.sessions.generation(slot));
        let operation = Operation::new(kind, slot, generation);
        self.ring.send(operation, handle, &self.spans);
    }

    /// Lists in `slices` what leaves now.
    fn depart(&mut self, slot: u32) {
        #[cfg(feature = "curve")]
        if self.sessions[slot].is_sealed() {
            return super::curve::depart(self, slot);
        }
        let bounds = self.bounds();
        self.sessions[slot].queue.depart(bounds, &mut self.slices);
    }

    pub(super) fn sent(&mut self, slot: u32, bytes: usize) {
        let took_ns = self.now_ns.saturating_sub(self.sessions[slot].send_ns);
        let session = &mut self.sessions[slot];
        (session.sending, session.cancelling) = (false, false);
        session.slow = took_ns > super::relief::SLOW_NS;
        let events = session.queue.departed(&mut self.memory, bytes);
        self.queued_bytes -= bytes as u64;
        self.stats.plane.events_sent.add(events);
        if !session.queue.is_empty() && !session.closing {
            self.mark(slot);
        } else if session.leave_ns.is_some() {
            self.close(slot);
        }
    }

    /// Ends a session for what its peer did; `false`, for who passes it on.
    pub(super) fn refuse(&mut self, slot: u32, why: &str) -> bool {
        let session = &mut self.sessions[slot];
        if !session.closing {
            session.why = Some(why.to_owned());
            self.stats.plane.sessions_refused.add(1);
            self.close(slot);
        }
        false
    }

    /// The same when what waits for the peer has been sent, which tells it why.
    pub(super) fn turn_away(&mut self, slot: u32, why: &str) -> bool {
        let session = &mut self.sessions[slot];
        if session.queue.is_empty() {
            return self.refuse(slot, why);
        }
        session.stage = Stage::Leaving;
        session.leave_ns = Some(self.now_ns + LEAVE_NS);
        session.why = Some(why.to_owned());
        self.stats.plane.sessions_refused.add(1);
        false
    }

    /// Shuts the socket down; the slot is freed when the kernel holds nothing of it.
    pub(super) fn close(&mut self, slot: u32) {
        let session = &mut self.sessions[slot];
        if session.closing {
            return;
        }
        session.closing = true;
        self.ring.shutdown(session.handle);
        let open = session.stage == Stage::Open;
        let (peer, side, why) = (session.peer, session.side, session.why.take());
        if session.stage != Stage::Dialling {
            let side = open.then_some(side);
            let now_ns = self.now_ns;
            let is_again = |why: &String| !open && self.told.is_again(peer, why, now_ns);
            if !why.as_ref().is_some_and(is_again) {
                self.report(Report::Closed { peer, side, why });
            }
        }
        if open && side == Side::Subscriber {
            self.subscribers -= 1;
        }
        self.publishers.retain(|publisher| *publisher != slot);
        self.forget_wishes(slot);
    }

    /// The end of the plane: peers see it at once. The ring, which may still hold operations, goes
    /// before the memory they work on.
    pub(super) fn hang_up(&mut self) {
        // An accept under way holds its socket until the kernel has taken the ring down, which may
        // be a while after us; who comes next is to have the port at once.
        for door in self.doors.iter().filter_map(|state| state.door.as_ref()) {
            let (fd, slot) = (door.listener.as_raw_fd(), NONE);
            self.ring.shutdown(Handle { fd, slot });
        }
        for slot in self.sessions.slots().collect::<Vec<u32>>() {
            let handle = self.sessions[slot].handle;
            self.ring.shutdown(handle);
            self.ring.close(handle);
        }
    }

    pub(super) fn retire_if_quiet(&mut self, slot: u32) {
        let session = self.sessions.get(slot);
        if session.is_some_and(|session| session.closing && session.is_quiet()) {
            self.retire(slot);
        }
    }

    fn retire(&mut self, slot: u32) {
        let Some(mut session) = self.sessions.remove(slot) else {
            return;
        };
        session.incoming.clear(&mut self.memory);
        #[cfg(feature = "curve")]
        if let Some(curve) = &mut session.curve {
            curve.sealed.clear(&mut self.memory);
        }
        self.queued_bytes -= session.queue.bytes() as u64;
        let left = session.queue.clear(&mut self.memory);
        self.stats.plane.events_dropped_disconnect.add(left);
        self.ring.detach(session.handle);
        self.ring.close(session.handle);
        if let Some(dial) = session.dial {
            self.dial_later(dial);
        }
    }
}

fn prepare(socket: &SockRef<'_>) {
    // What is refused costs latency, or leaves a dead peer longer; nothing else.
    let _ = socket.set_tcp_nodelay(true);
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE)
        .with_interval(KEEPALIVE / 3);
    let _ = socket.set_tcp_keepalive(&keepalive);
}
