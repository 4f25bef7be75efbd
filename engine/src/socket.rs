//! Sockets of a shard: opened, listened to, written to, closed. What each operation means to its
//! connection's role is decided in `shard.rs`; here is what all roles share.

use std::net::SocketAddr;
use std::os::fd::{AsRawFd, RawFd};

use crate::connection::{Connection, Intake, Role};
use crate::lane;
use crate::operation::Kind;
use crate::ring::{Handle, Ring, Span};
use crate::shard::Shard;
use crate::stats::flight::Kind as Noted;
use crate::table::NONE;

/// Received at once of frames whose bodies may belong into a slab.
const CAREFUL_BYTES: u32 = 4096;

impl<R: Ring> Shard<R> {
    /// Descriptor of the listener.
    pub(crate) fn listener_fd(&self) -> Option<RawFd> {
        self.listener.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Puts a socket into the table. `None`, and the socket is closed, when the table is full.
    pub(crate) fn open(&mut self, fd: RawFd, role: Role) -> Option<u32> {
        let connection = Connection::new(Handle { fd, slot: NONE }, role);
        match self.connections.insert(connection) {
            Ok(slot) => {
                self.connections[slot].handle.slot = slot;
                self.ring.attach(self.connections[slot].handle);
                self.note_socket(Noted::Opened, slot, 0);
                Some(slot)
            }
            Err(connection) => {
                self.ring.close(connection.handle);
                None
            }
        }
    }

    /// Dials `address`; the connect is under way when this returns a slot.
    pub(crate) fn dial(&mut self, address: &SocketAddr, role: Role) -> Result<u32, i32> {
        let fd = self.ring.connect_socket(address).map_err(|error| {
            // No errno means that the address itself was refused.
            error.raw_os_error().unwrap_or(libc::EINVAL)
        })?;
        let slot = self.open(fd, role).ok_or(libc::EMFILE)?;
        let operation = self.operation(Kind::Connect, slot);
        let connection = &mut self.connections[slot];
        connection.connecting = true;
        self.ring.connect(operation, connection.handle, address);
        Ok(slot)
    }

    /// Asks for a multishot receive unless there is one or none is wanted.
    pub(crate) fn receive(&mut self, slot: u32) {
        let operation = self.operation(Kind::Receive, slot);
        let connection = &mut self.connections[slot];
        let unwanted = connection.receiving || connection.paused || connection.end_of_stream;
        if unwanted || connection.closing || connection.starved || connection.connecting {
            return;
        }
        let room = lane::room(self, slot);
        let connection = &mut self.connections[slot];
        connection.receiving = true;
        match room {
            Some(room) => self.ring.receive_into(operation, connection.handle, room),
            None if connection.careful => {
                let bytes = CAREFUL_BYTES;
                self.ring.receive_once(operation, connection.handle, bytes);
            }
            None => self.ring.receive(operation, connection.handle),
        }
    }

    /// Ends a receive that is under way; what is wanted then is asked for anew.
    pub(crate) fn end_receive(&mut self, slot: u32) {
        let operation = self.operation(Kind::Receive, slot);
        if let Some(connection) = self.connections.get(slot)
            && connection.receiving
        {
            self.ring.cancel_receive(operation, connection.handle);
        }
    }

    /// Stops receiving until [`Shard::resume`].
    pub(crate) fn pause(&mut self, slot: u32) {
        let operation = self.operation(Kind::Receive, slot);
        let connection = &mut self.connections[slot];
        if connection.paused {
            return;
        }
        connection.paused = true;
        self.stats.shard.receives_paused.add(1);
        if connection.receiving {
            self.ring.cancel_receive(operation, connection.handle);
        }
    }

    /// Goes on receiving, unless all of downstream is held back.
    pub(crate) fn resume(&mut self, slot: u32) {
        let downstream = self.connections[slot].role == Role::Downstream;
        if self.connections[slot].paused && !(self.throttled && downstream) {
            self.connections[slot].paused = false;
            self.receive(slot);
        }
    }

    /// Starts one send of `spans`.
    pub(crate) fn send(&mut self, slot: u32, spans: &[Span]) {
        self.send_as(Kind::Send, slot, spans);
    }

    pub(crate) fn send_as(&mut self, kind: Kind, slot: u32, spans: &[Span]) {
        let operation = self.operation(kind, slot);
        let connection = &mut self.connections[slot];
        debug_assert!(!connection.sending && !connection.closing);
        connection.sending = true;
        self.ring.send(operation, connection.handle, spans);
    }

    /// Shuts the socket down; the slot is freed when the kernel holds nothing of it.
    pub(crate) fn close(&mut self, slot: u32) {
        let connection = &mut self.connections[slot];
        if connection.closing {
            return;
        }
        connection.closing = true;
        match connection.kernel_tls {
            true => self.end_operations(slot),
            false => self.ring.shutdown(connection.handle),
        }
    }

    /// Closes a connection that nobody wants to hear of any more.
    pub(crate) fn forget(&mut self, slot: u32) {
        self.close(slot);
        self.retire_if_quiet(slot);
    }

    pub(crate) fn retire_if_quiet(&mut self, slot: u32) {
        if self.connections.get(slot).is_some_and(Connection::is_quiet) {
            self.retire(slot);
        }
    }

    pub(crate) fn retire(&mut self, slot: u32) {
        self.note_socket(Noted::Closed, slot, 0);
        let Some(mut connection) = self.connections.remove(slot) else {
            return;
        };
        self.pieces.clear(&mut connection.incoming);
        self.pool.clear(&mut connection.out);
        let lent = connection.outgoing.returned(true);
        self.worker.host.give_back(lent);
        if let Intake::Lane { lane, job, .. } = connection.intake {
            lane::undo(self, lane, job);
        }
        if connection.role == Role::Downstream {
            self.worker.let_go(connection.collected.len());
            self.stats.shard.callers.set(self.balance.went());
        }
        if let Some(timer) = connection.timer {
            self.timers.cancel(timer);
        }
        self.ring.detach(connection.handle);
        match connection.kernel_tls {
            true => self.part(connection.handle),
            false => self.ring.close(connection.handle),
        }
        self.stats.shard.connections_closed.add(1);
    }
}
