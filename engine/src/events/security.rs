//! How sessions are protected: not at all (NULL), or with CURVE where that is built in.

use std::collections::VecDeque;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::SocketAddr;
#[cfg(feature = "curve")]
use std::sync::Arc;

use corelane_codec::zmtp::{self, Command, Fault, Mechanism};

use super::plane::Plane;
use super::session::{Stage, Wire};
use crate::ring::Ring;

/// A refusal of a host for one reason is told this often at most; all are counted.
const TOLD_PAUSE_NS: u64 = 1_000_000_000;
/// Refusals that are remembered; further ones are not told for a second.
const TOLD_MAX: usize = 32;

/// How the connections of a door or of a dial are protected.
#[derive(Clone, Debug, Default)]
pub enum Security {
    /// Not at all.
    #[default]
    Null,
    /// With CURVE; clients know our key.
    #[cfg(feature = "curve")]
    Server(Arc<super::CurveServer>),
    /// With CURVE; we know the server's key.
    #[cfg(feature = "curve")]
    Client(Arc<super::CurveClient>),
}

impl Security {
    pub(super) fn mechanism(&self) -> Mechanism {
        match self {
            Security::Null => Mechanism::Null,
            #[cfg(feature = "curve")]
            Security::Server(_) | Security::Client(_) => Mechanism::Curve,
        }
    }

    /// Whether the other side begins, and asks for us by our key.
    pub(super) fn is_server(&self) -> bool {
        match self {
            Security::Null => false,
            #[cfg(feature = "curve")]
            Security::Server(_) => true,
            #[cfg(feature = "curve")]
            Security::Client(_) => false,
        }
    }
}

/// Both have greeted: the same mechanism is needed, and then its handshake begins. `false`: the
/// session ends.
pub(super) fn begin<R: Ring>(plane: &mut Plane<R>, slot: u32, theirs: Mechanism) -> bool {
    let ours = plane.sessions[slot].security.mechanism();
    if theirs != ours {
        plane.stats.plane.sessions_refused_mechanism.add(1);
        let (theirs, ours) = (theirs.name(), ours.name());
        let why = format!("its security mechanism is {theirs}, {ours} is wanted at this address");
        // Our greeting goes out before, so that it can say the same.
        return plane.turn_away(slot, &why);
    }
    match ours {
        Mechanism::Null => {
            let mut ready = Vec::new();
            zmtp::write_ready(plane.sessions[slot].our_type(), &mut ready);
            plane.push_control(slot, &ready);
            true
        }
        #[cfg(feature = "curve")]
        Mechanism::Curve => super::curve::begin(plane, slot),
        #[cfg(not(feature = "curve"))]
        Mechanism::Curve => plane.refuse(slot, &Fault::Mechanism.to_string()),
    }
}

/// A command of the handshake. `false`: the session ends.
pub(super) fn step<R: Ring>(
    plane: &mut Plane<R>,
    slot: u32,
    body: &[u8],
    command: &Command<'_>,
) -> bool {
    #[cfg(feature = "curve")]
    if plane.sessions[slot].curve.is_some() {
        return super::curve::step(plane, slot, body);
    }
    #[cfg(not(feature = "curve"))]
    let _ = body;
    let Command::Ready(properties) = command else {
        return plane.refuse(slot, &Fault::Unexpected.to_string());
    };
    match plane.sessions[slot].accepts(properties) {
        Ok(()) => {
            plane.opened(slot);
            true
        }
        Err(why) => plane.refuse(slot, &why),
    }
}

/// A peer has gone. If that was in the middle of its greeting it did not like ours: libzmq leaves
/// before it has said its mechanism when it has heard of another.
pub(super) fn left<R: Ring>(plane: &mut Plane<R>, slot: u32) {
    let session = &mut plane.sessions[slot];
    let greets = session.stage == Stage::Greeting && session.wire == Wire::Zmtp;
    if greets && !session.closing && session.introduced {
        plane.stats.plane.sessions_refused_mechanism.add(1);
        let ours = session.security.mechanism().name();
        session.why = Some(format!(
            "it left when it was greeted; its security mechanism may be another than {ours}"
        ));
    }
}

/// Refusals that were told lately: who does not fit comes again many times a second.
#[derive(Debug, Default)]
pub(super) struct Told {
    lately: VecDeque<(u64, u64)>,
}

impl Told {
    /// Whether this host has been refused for this reason within the last second; otherwise that is
    /// noted.
    pub(super) fn is_again(&mut self, peer: SocketAddr, why: &str, now_ns: u64) -> bool {
        let mut hasher = DefaultHasher::new();
        (peer.ip(), why).hash(&mut hasher);
        let refusal = hasher.finish();
        self.lately.retain(|(_, until_ns)| now_ns < *until_ns);
        let is_known = self.lately.iter().any(|(known, _)| *known == refusal);
        if is_known || self.lately.len() == TOLD_MAX {
            return true;
        }
        self.lately.push_back((refusal, now_ns + TOLD_PAUSE_NS));
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_told_once_a_second() {
        let mut told = Told::default();
        let peer = |host: u8| SocketAddr::from(([127, 0, 0, host], 5));
        assert!(!told.is_again(peer(1), "a", 0));
        assert!(told.is_again(peer(1), "a", 1));
        assert!(!told.is_again(peer(1), "b", 1) && !told.is_again(peer(2), "a", 1));
        assert!(!told.is_again(peer(1), "a", TOLD_PAUSE_NS));
        let many = (0..=255).filter(|host| !told.is_again(peer(*host), "c", TOLD_PAUSE_NS));
        assert!(many.count() < TOLD_MAX);
        assert!(!told.is_again(peer(9), "d", 3 * TOLD_PAUSE_NS));
    }
}
