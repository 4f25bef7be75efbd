//! Responses for callers who wait on QUIC (spec/request-plane.md §6).
//!
//! A shard speaks no QUIC. It writes such a response as it writes any other, into one end of a
//! socket pair, and hands the other end to whoever does QUIC in this process, who translates:
//!
//! ```text
//! handler -> respond_stream -> pair --Outbound--> [QUIC: messages become frames] -> caller
//! ```

use std::net::SocketAddr;
use std::os::fd::{IntoRawFd, OwnedFd};

use crate::connection::{End, Role};
use crate::ring::Ring;
use crate::shard::Shard;

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

/// A response that leaves on QUIC.
#[derive(Debug)]
pub struct Outbound {
    /// What the shard writes: handshake, prologue, items, sentinel; and reads: stop, kill.
    pub socket: OwnedFd,
    /// Who waits for it.
    pub caller: QuicCaller,
}

impl<R: Ring> Shard<R> {
    /// Gives a response to who does QUIC. The connection can be written to at once.
    ///
    /// # Errors
    /// No descriptor is left, or nobody takes more.
    pub(crate) fn dial_quic(&mut self, caller: &QuicCaller, end: End) -> Result<u32, i32> {
        let (ours, theirs) = self.ring.pair().map_err(|error| {
            let errno = error.raw_os_error();
            errno.unwrap_or(libc::EMFILE)
        })?;
        let slot = self
            .open(ours.into_raw_fd(), Role::End(end))
            .ok_or(libc::EMFILE)?;
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
}
