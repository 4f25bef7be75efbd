//! Sessions with CURVE: their handshake, frames into boxes when they leave, and out of them where
//! they lie when they have come (`corelane_codec::curve` has the layout).
//!
//! ```text
//! receive buffer  [box][box][box of the next ...     what has come: `sealed`
//!                 [frame][frame]                     opened in place, moved together: `incoming`
//! queue           run, run, run                      shared with all other subscribers
//!                 [box][box][box]                    in a block of its own when it leaves
//! ```
//!
//! Each connection has keys of its own, so that an event for N such subscribers is sealed N times:
//! that nothing is copied on the way out holds for the others alone.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;

use corelane_codec::Decoded;
use corelane_codec::curve::{
    Client, CurveFault, KEY_BYTES, Keys, Opened, Outcome, PublicKey, SEAL_BYTES, Seal, Server,
};
use corelane_codec::zmtp;

use super::incoming::Incoming;
use super::memory::Slice;
use super::plane::Plane;
use super::{Security, take};
use crate::ring::Ring;

/// What ZMQ's clients are told who are not let in: its code for "not allowed".
const NOT_ALLOWED: &str = "400";

/// What a server of CURVE is to know.
#[derive(Debug)]
pub struct CurveServer {
    /// Its keys; clients need the public one.
    pub keys: Arc<Keys>,
    /// The keys of clients that are let in; `None`: any.
    pub clients: Option<HashSet<PublicKey>>,
}

/// What a client of CURVE is to know.
#[derive(Debug)]
pub struct CurveClient {
    /// Its keys, by which the server knows it.
    pub keys: Arc<Keys>,
    /// The server's key.
    pub server: PublicKey,
}

/// New keys.
///
/// # Errors
/// The kernel has no chance to give.
pub fn draw_keys() -> io::Result<Keys> {
    Ok(Keys::new(&chance::<KEY_BYTES>()?))
}

fn chance<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    let filled = getrandom::fill(&mut bytes);
    filled.map_err(|error| io::Error::other(error.to_string()))?;
    Ok(bytes)
}

/// What a session has of CURVE.
pub(super) struct Curve {
    step: Step,
    /// Frames in boxes that have not come whole.
    pub(super) sealed: Incoming,
}

enum Step {
    Client(Client),
    Server(Server),
    Open(Seal),
}

impl Curve {
    pub(super) fn is_sealed(&self) -> bool {
        matches!(self.step, Step::Open(_))
    }

    fn seal(&mut self) -> Option<&mut Seal> {
        match &mut self.step {
            Step::Open(seal) => Some(seal),
            Step::Client(_) | Step::Server(_) => None,
        }
    }
}

/// Both have greeted. A client speaks first.
pub(super) fn begin<R: Ring>(plane: &mut Plane<R>, slot: u32) -> bool {
    let mut out = Vec::new();
    let step = match first(&plane.sessions[slot].security, &mut out) {
        Ok(step) => step,
        Err(why) => return plane.refuse(slot, &why),
    };
    let sealed = Incoming::default();
    plane.sessions[slot].curve = Some(Box::new(Curve { step, sealed }));
    if !out.is_empty() {
        plane.push_control(slot, &out);
    }
    true
}

fn first(security: &Security, out: &mut Vec<u8>) -> Result<Step, String> {
    let no_chance = |error: io::Error| format!("no random numbers for its keys: {error}");
    match security {
        Security::Server(server) => {
            let keys = Arc::clone(&server.keys);
            let chance = chance().map_err(no_chance)?;
            Ok(Step::Server(Server::new(keys, chance)))
        }
        Security::Client(client) => {
            let keys = Arc::clone(&client.keys);
            let chance = chance().map_err(no_chance)?;
            let client = Client::new(keys, client.server, &chance, out);
            client.map(Step::Client).map_err(|fault| fault.to_string())
        }
        Security::Null => Err(zmtp::Fault::Mechanism.to_string()),
    }
}

/// A command of the handshake. `false`: the session ends.
pub(super) fn step<R: Ring>(plane: &mut Plane<R>, slot: u32, body: &[u8]) -> bool {
    let session = &mut plane.sessions[slot];
    let properties = zmtp::properties(session.our_type());
    let security = session.security.clone();
    let lets_in = |client: &PublicKey| match &security {
        Security::Server(server) => {
            let clients = server.clients.as_ref();
            clients.is_none_or(|clients| clients.contains(client))
        }
        Security::Client(_) | Security::Null => false,
    };
    let mut out = Vec::new();
    let taken = match session.curve.as_mut().map(|curve| &mut curve.step) {
        Some(Step::Client(client)) => client.take(body, &properties, &mut out),
        Some(Step::Server(server)) => server.take(body, &properties, lets_in, &mut out),
        Some(Step::Open(_)) | None => Err(CurveFault::Unexpected("MESSAGE")),
    };
    match taken {
        Ok(Outcome::More) => {
            plane.push_control(slot, &out);
            true
        }
        Ok(Outcome::Done(opened)) => open(plane, slot, *opened, &out),
        Err(fault) => {
            if matches!(fault, CurveFault::Stranger(_)) {
                return turn_away(plane, slot, &fault);
            }
            refuse(plane, slot, fault)
        }
    }
}

/// The handshake is over: what is queued from now on leaves in boxes, and what comes is in boxes.
fn open<R: Ring>(plane: &mut Plane<R>, slot: u32, opened: Opened, last: &[u8]) -> bool {
    let session = &mut plane.sessions[slot];
    if let Err(why) = session.accepts(&opened.properties) {
        return plane.refuse(slot, &why);
    }
    if !last.is_empty() {
        plane.push_control(slot, last);
    }
    let session = &mut plane.sessions[slot];
    if session.closing {
        return false;
    }
    session.queue.begin_to_seal();
    if let Some(curve) = &mut session.curve {
        curve.step = Step::Open(opened.seal);
        std::mem::swap(&mut curve.sealed, &mut session.incoming);
    }
    plane.opened(slot);
    unpack(plane, slot);
    true
}

fn refuse<R: Ring>(plane: &mut Plane<R>, slot: u32, fault: CurveFault) -> bool {
    plane.stats.plane.sessions_refused_curve.add(1);
    plane.refuse(slot, &fault.to_string())
}

/// Tells a client that it is not let in, as ZMQ does; the session ends when that has been sent.
fn turn_away<R: Ring>(plane: &mut Plane<R>, slot: u32, fault: &CurveFault) -> bool {
    let mut bytes = Vec::new();
    zmtp::write_error(NOT_ALLOWED, &mut bytes);
    plane.push_control(slot, &bytes);
    plane.stats.plane.sessions_refused_stranger.add(1);
    plane.turn_away(slot, &fault.to_string())
}

/// Bytes in boxes have come.
pub(super) fn came<R: Ring>(plane: &mut Plane<R>, slot: u32, slice: Slice) {
    if let Some(curve) = &mut plane.sessions[slot].curve {
        curve.sealed.push(slice);
    }
    unpack(plane, slot);
}

/// Takes all whole frames out of their boxes.
fn unpack<R: Ring>(plane: &mut Plane<R>, slot: u32) {
    while !plane.sessions[slot].closing {
        let refusal = match unpack_one(plane, slot) {
            Ok(true) => continue,
            Ok(false) => return,
            Err(refusal) => refusal,
        };
        // What came before was right.
        take::take(plane, slot);
        match refusal {
            Refusal::Curve(fault) => refuse(plane, slot, fault),
            Refusal::Zmtp(bad) => plane.refuse(slot, &bad.to_string()),
        };
    }
}

enum Refusal {
    Curve(CurveFault),
    Zmtp(corelane_codec::Bad),
}

/// Takes the first frame out of its box; false: it has not come whole.
fn unpack_one<R: Ring>(plane: &mut Plane<R>, slot: u32) -> Result<bool, Refusal> {
    let max_bytes = plane.config.event_bytes_max as usize + SEAL_BYTES;
    let (session, memory) = (&mut plane.sessions[slot], &mut plane.memory);
    let Some(curve) = &mut session.curve else {
        return Ok(false);
    };
    let mut front = [0; zmtp::HEAD_BYTES_MAX];
    let there = curve.sealed.peek(memory, 0, &mut front);
    let head = match zmtp::decode_head(&front[..there], max_bytes) {
        Decoded::Frame(head) => head,
        Decoded::Need(_) => return Ok(false),
        Decoded::Bad(bad) => return Err(Refusal::Zmtp(bad)),
    };
    let bytes = head.frame_bytes();
    if curve.sealed.bytes() < bytes {
        return Ok(false);
    }
    // Where it lies, unless it lies in several pieces.
    let whole = curve.sealed.front().filter(|slice| slice.bytes() >= bytes);
    let slice = match whole {
        Some(slice) => {
            memory.hold(slice.block);
            slice.part(0, bytes)
        }
        None => {
            let mut joined = vec![0; bytes];
            curve.sealed.peek(memory, 0, &mut joined);
            let (block, start, end) = (memory.block(joined), 0, bytes as u32);
            Slice { block, start, end }
        }
    };
    curve.sealed.advance(memory, bytes);
    let opened = match curve.seal() {
        Some(seal) => seal.open(&head, memory.bytes_mut(slice)),
        None => Err(CurveFault::Unexpected("MESSAGE")),
    };
    match opened {
        Ok(inside) => {
            let inside = slice.part(inside.start, inside.end);
            session.incoming.join(memory, inside);
            Ok(true)
        }
        Err(fault) => {
            memory.release(slice.block);
            Err(Refusal::Curve(fault))
        }
    }
}

/// Lists in the plane's slices what leaves now, in boxes.
pub(super) fn depart<R: Ring>(plane: &mut Plane<R>, slot: u32) {
    let bounds = plane.bounds();
    let session = &mut plane.sessions[slot];
    let Some(seal) = session.curve.as_mut().and_then(|curve| curve.seal()) else {
        return;
    };
    let before = session.queue.bytes() as u64;
    let sealed = session.queue.seal(&mut plane.memory, seal, bounds);
    plane.queued_bytes = plane.queued_bytes - before + session.queue.bytes() as u64;
    session.queue.list(&mut plane.slices);
    if let Err(fault) = sealed {
        plane.slices.clear();
        refuse(plane, slot, fault);
    }
}
