//! How sessions are protected: not at all (NULL), or with CURVE where that is built in.

#[cfg(feature = "curve")]
use std::sync::Arc;

use corelane_codec::zmtp::{self, Command, Fault, Mechanism};

use super::plane::Plane;
use crate::ring::Ring;

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
        return plane.refuse(slot, &why);
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
