//! Responses on QUIC (spec/request-plane.md §6).
//!
//! A shard speaks no QUIC. It writes such a response as it writes any other, into one end of a
//! socket pair, and hands the other end to whoever does QUIC in this process, who translates; and
//! it reads one from a pair that it was handed:
//!
//! ```text
//! handler, relay -> pair --Outbound--> [QUIC: messages become frames] -> caller
//! call, relay <- pair <--Inbound-- [QUIC: frames become messages] <- worker
//! ```
//!
//! On a pair that was handed in there is no handshake: the shard says [`WELCOME`] when it waits for
//! this response, and closes it when it does not. All else is as on a worker's own connection.

use std::net::SocketAddr;
use std::os::fd::{IntoRawFd, OwnedFd};

use corelane_codec::limits::TWO_PART_PREFIX_BYTES;
use corelane_codec::quic_frame::{self, QuicConnection, QuicConnectionInfo};

use crate::call_frame;
use crate::connection::{End, Role};
use crate::relay::Leg;
use crate::ring::Ring;
use crate::shard::Shard;
use crate::{client, home, relay_home};

/// What a shard writes first on a pair whose response it waits for: an empty message.
pub const WELCOME: [u8; TWO_PART_PREFIX_BYTES] = [0; TWO_PART_PREFIX_BYTES];

/// Workers who have answered before we know that they have the request.
const EARLY_MAX: usize = 1024;

/// Bits of a registration that name the core that waits, so that whoever reads it knows.
const CORE_BITS: u32 = 12;
/// Cores that can be named.
pub const CORES_MAX: usize = 1 << CORE_BITS;

/// Which transport responses take, for the whole process (`DYN_RESPONSE_PLANE`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ResponsePlane {
    /// A TCP connection for each.
    #[default]
    Tcp,
    /// QUIC.
    Quic,
}

impl ResponsePlane {
    /// Its name in Dynamo's messages.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            ResponsePlane::Tcp => "tcp",
            ResponsePlane::Quic => "quic",
        }
    }
}

/// A caller who waits on QUIC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuicCaller {
    /// His UDP socket.
    pub address: SocketAddr,
    /// His process.
    pub frontend_id: [u8; 16],
    /// The response that he waits for.
    pub registration_id: [u8; 16],
    /// SHA-256 of the DER of his certificate.
    pub certificate_sha256: [u8; 32],
    /// The lane that his request takes: the same among bulk and among priority lanes.
    pub lane: usize,
}

impl QuicCaller {
    /// Where a connection info says that its caller waits.
    pub(crate) fn read(info: &QuicConnectionInfo<'_>) -> Result<QuicCaller, String> {
        let id =
            |text: &str| quic_frame::uuid(text).ok_or("an id in the connection info is no UUID");
        let certificate = info.certificate();
        Ok(QuicCaller {
            address: info.socket_addr().map_err(|error| error.to_string())?,
            frontend_id: id(&info.frontend_id.to_cow())?,
            registration_id: id(&info.registration_id.to_cow())?,
            certificate_sha256: certificate.ok_or("certificate_sha256 is no SHA-256")?,
            lane: quic_frame::lane(&info.request_id.to_cow()),
        })
    }
}

/// Where responses come to this process on QUIC, as workers are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuicHome {
    /// The UDP socket.
    pub address: SocketAddr,
    /// This process.
    pub frontend_id: [u8; 16],
    /// SHA-256 of the DER of its certificate.
    pub certificate_sha256: [u8; 32],
}

/// The same as text.
pub(crate) struct Place {
    address: String,
    frontend_id: String,
    certificate_sha256: String,
}

impl Place {
    pub(crate) fn new(home: &QuicHome) -> Place {
        let digits = home.certificate_sha256.iter();
        Place {
            address: home.address.to_string(),
            frontend_id: call_frame::uuid(u128::from_be_bytes(home.frontend_id)),
            certificate_sha256: digits.map(|byte| format!("{byte:02x}")).collect(),
        }
    }

    /// What the worker of one request is told.
    pub(crate) fn connection<'a>(
        &'a self,
        registration_id: &'a str,
        request_id: &'a str,
    ) -> QuicConnection<'a> {
        QuicConnection {
            address: &self.address,
            frontend_id: &self.frontend_id,
            registration_id,
            request_id,
            certificate_sha256: &self.certificate_sha256,
        }
    }
}

/// The number with the core in it that waits under it.
pub(crate) fn mark(number: u128, core: usize) -> u128 {
    let mask = CORES_MAX as u128 - 1;
    number & !mask | core as u128 & mask
}

/// The core that waits under a registration, if it is one of ours.
#[must_use]
pub fn core_of(registration_id: &[u8; 16]) -> usize {
    u128::from_be_bytes(*registration_id) as usize & (CORES_MAX - 1)
}

/// A response that leaves on QUIC.
#[derive(Debug)]
pub struct Outbound {
    /// What the shard writes: handshake, prologue, items, sentinel; and reads: stop, kill.
    pub socket: OwnedFd,
    /// Who waits for it.
    pub caller: QuicCaller,
}

/// A response that has come on QUIC.
#[derive(Debug)]
pub struct Inbound {
    /// What the shard reads: prologue, items, sentinel; and writes: [`WELCOME`], stop, kill. A
    /// blocking stream socket.
    pub socket: OwnedFd,
    /// Whom it is for.
    pub registration_id: [u8; 16],
}

impl<R: Ring> Shard<R> {
    /// Gives a response to who does QUIC. Once [`Shard::established`] has been told, the connection
    /// can be written to.
    ///
    /// # Errors
    /// No descriptor is left, or nobody takes more.
    pub(crate) fn dial_quic(&mut self, caller: &QuicCaller, role: Role) -> Result<u32, i32> {
        let (ours, theirs) = self.ring.pair().map_err(|error| {
            let errno = error.raw_os_error();
            errno.unwrap_or(libc::EMFILE)
        })?;
        let slot = self.open(ours.into_raw_fd(), role).ok_or(libc::EMFILE)?;
        let outbound = Outbound {
            socket: theirs,
            caller: caller.clone(),
        };
        if self.outbound.send(outbound).is_err() {
            self.forget(slot);
            return Err(libc::ENOBUFS);
        }
        Ok(slot)
    }

    /// Those who were early are heard, if it is time.
    pub(crate) fn come_home_late(&mut self) {
        if !self.relays.early.is_empty() {
            for inbound in std::mem::take(&mut self.relays.early) {
                self.come_home(inbound);
            }
        }
    }

    /// A worker has answered on QUIC. The pair is closed when nobody waits, or no longer.
    pub(crate) fn come_home(&mut self, inbound: Inbound) {
        let number = u128::from_be_bytes(inbound.registration_id);
        let role = match home::expected(self, number) {
            Some(call) if self.client.calls[call].is_late() => {
                client::settle_late(self, call);
                None
            }
            Some(call) => Some(Role::End(End::Home(call))),
            None => match relay_home::expected(self, number) {
                Some((_, false)) if self.relays.early.len() < EARLY_MAX => {
                    return self.relays.early.push(inbound);
                }
                Some((relay, true)) => Some(Role::Relay(Leg::Worker(relay))),
                _ => None,
            },
        };
        let Some(role) = role.filter(|_| !self.connections.is_full()) else {
            return self.stats.shard.homes_refused.add(1);
        };
        let Some(slot) = self.open(inbound.socket.into_raw_fd(), role) else {
            return;
        };
        self.receive(slot);
        match role {
            Role::End(End::Home(call)) => {
                client::called_home(self, call, slot, None);
                home::say(self, slot, &WELCOME);
            }
            Role::Relay(Leg::Worker(relay)) => relay_home::welcome(self, slot, relay),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registration_names_its_core() {
        for core in [0, 1, 77, CORES_MAX - 1] {
            let number = mark(u128::MAX / 3, core);
            assert_eq!(core_of(&number.to_be_bytes()), core);
            assert_eq!(number >> CORE_BITS, (u128::MAX / 3) >> CORE_BITS);
        }
    }
}
