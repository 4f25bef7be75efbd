//! Sockets that must speak TLS before they are of use here.
//!
//! A shard moves plain bytes only. Where TLS is wanted, a socket that was accepted, or dialled and
//! connected, is handed to whoever does handshakes (a duplicate goes over a lane of its own, so
//! that the shard can still shut it down), and comes back by [`Command::Adopt`]:
//!
//! ```text
//! accept, connect --Insecure--> handshake --Adopt: the same socket, now encrypted by the kernel
//!                                         |-Adopt: one end of a pair whose other end is pumped
//!                                         '-Adopt: failed
//! ```
//!
//! Until then the connection counts as connecting: nothing is received or sent on it. Without TLS
//! nothing here runs.
//!
//! Where the kernel encrypts, a receive fails with EIO for a record that is no data, which is
//! looked at here. Such a socket is not shut down: it is handed out once more, because its peer
//! takes an end without TLS's farewell for a truncation.
//!
//! [`Command::Adopt`]: crate::command::Command::Adopt

use std::os::fd::{IntoRawFd, OwnedFd};

use crate::command::Report;
use crate::connection::{End, Role};
use crate::decode::SCRATCH_BYTES;
use crate::operation::Kind;
use crate::recv;
use crate::relay::Leg;
use crate::ring::ktls::{self, Meaning, RECORD_BYTES_MAX};
use crate::ring::{Handle, Ring};
use crate::shard::Shard;

const _: () = assert!(RECORD_BYTES_MAX <= SCRATCH_BYTES);

/// Which connection of a shard is meant. It means nothing any more once that is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    slot: u32,
    generation: u32,
    dialled: bool,
}

/// A connected socket that waits for its handshake.
#[derive(Debug)]
pub struct Insecure {
    /// A duplicate of the shard's; its flags are shared with it.
    pub socket: OwnedFd,
    /// To be given back.
    pub ticket: Ticket,
    /// We dialled, so we begin the handshake; otherwise the peer did.
    pub dialled: bool,
}

/// What is asked of whoever does TLS.
#[derive(Debug)]
pub enum Errand {
    /// A handshake; [`Command::Adopt`](crate::command::Command::Adopt) answers.
    Handshake(Insecure),
    /// The last byte was sent on this socket, whose TLS is the kernel's: to say farewell and to
    /// shut our direction down. No answer.
    Farewell(OwnedFd),
}

/// What came of a handshake.
#[derive(Debug)]
pub enum Adoption {
    /// The kernel encrypts: the shard goes on with its own socket, whose flags are as they were.
    Same,
    /// This one, a blocking stream socket, carries the plain bytes.
    Socket(OwnedFd),
    /// There is no connection: an errno.
    Failed(i32),
}

/// Strangers are reported this often at most; all are counted.
const REPORT_PAUSE_NS: u64 = 1_000_000_000;

/// Whether the front of what a peer has sent is a record of TLS: none of our units can begin so.
/// (A request frame could by its lengths, but its path would begin with a control character.)
pub(crate) fn is_tls(front: &[u8]) -> bool {
    matches!(front, [0x14..=0x17, 3, 0..=4, ..])
}

impl<R: Ring> Shard<R> {
    /// A connection is about to be closed for what it has brought: if that is TLS, it is counted
    /// and said.
    pub(crate) fn note_stranger(&mut self, front: &[u8]) {
        if !is_tls(front) {
            return;
        }
        self.stats.shard.tls_strangers.add(1);
        if self.now_ns >= self.stranger_told_ns {
            self.stranger_told_ns = self.now_ns + REPORT_PAUSE_NS;
            self.report(Report::Stranger);
        }
    }

    /// A connection was accepted: receive, or see to it that it can be.
    pub(crate) fn welcome(&mut self, slot: u32) {
        match self.config.secure_accepts {
            true => self.hand_out(slot, false),
            false => self.receive(slot),
        }
    }

    /// Gives a duplicate of the socket away for its handshake.
    pub(crate) fn hand_out(&mut self, slot: u32, dialled: bool) {
        let ticket = Ticket {
            slot,
            generation: self.connections.generation(slot),
            dialled,
        };
        self.connections[slot].connecting = true;
        let duplicate = self.ring.duplicate(self.connections[slot].handle);
        let errno = match duplicate {
            Ok(socket) => {
                let insecure = Insecure {
                    socket,
                    ticket,
                    dialled,
                };
                match self.insecure.send(Errand::Handshake(insecure)) {
                    Ok(()) => return,
                    Err(_) => libc::ENOBUFS,
                }
            }
            Err(error) => error.raw_os_error().unwrap_or(libc::EMFILE),
        };
        self.stats.shard.handshakes_refused.add(1);
        self.adopt(ticket, Adoption::Failed(errno));
    }

    /// A handshake has come to its end.
    pub(crate) fn adopt(&mut self, ticket: Ticket, adoption: Adoption) {
        let slot = ticket.slot;
        if !self.connections.is_current(slot, ticket.generation) {
            return;
        }
        let connection = &mut self.connections[slot];
        connection.connecting = false;
        if connection.closing {
            return self.retire_if_quiet(slot);
        }
        match adoption {
            Adoption::Failed(errno) => return self.lost(slot, errno),
            Adoption::Same => {
                connection.kernel_tls = true;
                self.ring.secured(connection.handle);
            }
            Adoption::Socket(socket) => {
                self.ring.detach(connection.handle);
                self.ring.close(connection.handle);
                connection.handle.fd = socket.into_raw_fd();
                self.ring.attach(connection.handle);
            }
        }
        match ticket.dialled {
            true => self.established(slot),
            false => self.receive(slot),
        }
    }

    /// The peer of an adopted connection has reset it. What it had sent before may be lost, as
    /// with any reset, except for a response: that counts up to its last byte, so its end is
    /// read from the socket itself.
    pub(crate) fn broken(&mut self, ticket: Ticket, errno: i32) {
        if !self.connections.is_current(ticket.slot, ticket.generation) {
            return;
        }
        match self.connections[ticket.slot].role {
            Role::End(End::Home(_)) | Role::Relay(Leg::Stranger | Leg::Worker(_)) => {}
            _ => self.lost(ticket.slot, errno),
        }
    }
}

/// Connections whose TLS the kernel does.
impl<R: Ring> Shard<R> {
    /// A receive has failed with EIO: there is a record that is no data.
    pub(crate) fn take_record(&mut self, slot: u32) {
        let handle = self.connections[slot].handle;
        let taken = self.ring.take_record(handle, &mut self.scratch);
        let meaning = match taken {
            Ok((kind, bytes)) => ktls::meaning(kind, &self.scratch[..bytes]),
            Err(_) => Meaning::Failure,
        };
        match meaning {
            Meaning::Nothing => self.receive(slot),
            Meaning::Farewell => recv::ended(self, slot, 0),
            Meaning::KeyUpdate => {
                self.stats.shard.tls_key_updates_refused.add(1);
                recv::ended(self, slot, libc::EKEYREJECTED);
            }
            Meaning::Failure => recv::ended(self, slot, libc::ECONNRESET),
        }
    }

    /// Ends what is under way on a connection that is closing. Its socket is not shut down, so that
    /// a farewell can be said when it retires.
    pub(crate) fn end_operations(&mut self, slot: u32) {
        let handle = self.connections[slot].handle;
        let (receiving, sending) = {
            let connection = &self.connections[slot];
            (connection.receiving, connection.sending)
        };
        if receiving {
            let operation = self.operation(Kind::Receive, slot);
            self.ring.cancel_receive(operation, handle);
        }
        if sending {
            // Of which kind is not known; one that is not under way cannot be ended.
            for kind in [Kind::Send, Kind::Reply] {
                let operation = self.operation(kind, slot);
                self.ring.cancel_send(operation, handle);
            }
        }
    }

    /// Hands the socket of a connection that has retired out for its farewell.
    pub(crate) fn part(&mut self, handle: Handle) {
        let socket = self.ring.release(handle);
        // Without the farewell if too many wait already: it is closed.
        if self.insecure.send(Errand::Farewell(socket)).is_err() {
            self.stats.shard.tls_farewells_lost.add(1);
        }
    }

    /// Shuts our direction down after all that was sent; the peer sees an end of stream.
    pub(crate) fn end_sending(&mut self, slot: u32) {
        let connection = &self.connections[slot];
        let handle = connection.handle;
        if !connection.kernel_tls {
            return self.ring.shutdown_write(handle);
        }
        let handed = match self.ring.duplicate(handle) {
            Ok(socket) => self.insecure.send(Errand::Farewell(socket)).is_ok(),
            Err(_) => false,
        };
        if !handed {
            self.stats.shard.tls_farewells_lost.add(1);
            self.ring.shutdown_write(handle);
        }
    }

    /// The shard ends after this tick: farewell to all.
    pub(crate) fn stop(&mut self) {
        self.stopping = true;
        let slots: Vec<u32> = self.connections.slots().collect();
        for slot in slots {
            if self.connections[slot].kernel_tls && !self.connections[slot].closing {
                self.end_sending(slot);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_of_tls_are_told_from_our_units() {
        for tls in [
            &b"\x16\x03\x01\x02\x00\x01"[..],
            b"\x15\x03\x03\x00\x02\x02\x28",
        ] {
            assert!(is_tls(tls));
        }
        // A request frame, a two-part message, an acknowledgement, a refusal, and too little.
        let ours: [&[u8]; 5] = [
            b"\x00\x181/dynamo/backend/generate",
            b"\x00\x00\x00\x00\x00\x00\x00\x4b",
            b"\x00\x00\x00\x00",
            b"\x00\x00\x00\x26Server",
            b"\x16\x03",
        ];
        assert!(ours.iter().all(|bytes| !is_tls(bytes)));
        // A path of 5,635 bytes.
        assert!(!is_tls(b"\x16\x031/a/b/c"));
    }
}
