//! One peer: its socket, how far its handshake is, what it has sent, what it is to get.

use std::collections::HashMap;
use std::net::SocketAddr;

use corelane_codec::Decoded;
use corelane_codec::zmtp::{self, Command, Fault, Walk};

use super::incoming::Incoming;
use super::plain::Subjects;
use super::plane::Plane;
use super::queue::Queue;
use super::{Group, Security, Side, security};
use crate::operation::Kind;
use crate::ring::{Handle, Ring};

/// A handshake that is not over after so long ends the session.
pub(super) const HANDSHAKE_NS: u64 = 30_000_000_000;

/// How far a session is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// We dial.
    Dialling,
    /// Its greeting is to come, or its hello.
    Greeting,
    /// ZMTP: its READY is to come.
    Handshake,
    /// Events pass.
    Open,
    /// It is told why it is not served, and then it goes.
    Leaving,
}

/// How a peer speaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Wire {
    /// Messages of four parts.
    #[default]
    Zmtp,
    /// Frames, after a hello.
    Plain,
}

/// What a publisher's session knows of the subjects that it brings.
#[derive(Debug, Default)]
pub(super) struct Source {
    pub(super) memos: Vec<Memo>,
    pub(super) next: usize,
    /// How its events are written.
    pub(super) wire: Wire,
    /// What its topics become; of plain peers.
    pub(super) subjects: Subjects,
    /// The beginning of a message that has not come whole.
    pub(super) walk: Walk,
}

/// A subject of a publisher, looked up.
#[derive(Debug)]
pub(super) struct Memo {
    pub(super) subject: Vec<u8>,
    pub(super) wire: Wire,
    pub(super) publisher_id: u64,
    pub(super) tracker: u32,
    pub(super) topic: usize,
    /// Valid for this version of the subscriptions.
    pub(super) version: u64,
    pub(super) members: Vec<u32>,
}

/// A session.
pub(super) struct Session {
    pub(super) handle: Handle,
    pub(super) peer: SocketAddr,
    pub(super) group: Group,
    pub(super) side: Side,
    pub(super) wire: Wire,
    pub(super) stage: Stage,
    pub(super) dial: Option<u64>,
    pub(super) security: Security,
    /// Its handshake, keys and sealed bytes, from the greetings on.
    #[cfg(feature = "curve")]
    pub(super) curve: Option<Box<super::curve::Curve>>,
    /// We have said which mechanism is ours: the rest of our greeting is out.
    pub(super) introduced: bool,
    /// The peer's minor version of ZMTP 3.
    pub(super) minor: u8,
    pub(super) receiving: bool,
    pub(super) sending: bool,
    pub(super) connecting: bool,
    pub(super) closing: bool,
    pub(super) starved: bool,
    /// It stands in the list of sessions with something to send.
    pub(super) dirty: bool,
    /// Its sends take longer than a turn of the loop.
    pub(super) slow: bool,
    /// Its send is being ended so that its memory can be put aside.
    pub(super) cancelling: bool,
    /// When the handshake began.
    pub(super) since_ns: u64,
    /// Its door has been shut: it is closed when nothing waits for it, at this time at the latest.
    pub(super) leave_ns: Option<u64>,
    /// When the send under way began.
    pub(super) send_ns: u64,
    pub(super) send_kind: Kind,
    /// No report of drops or bad events before this time.
    pub(super) quiet_ns: u64,
    pub(super) incoming: Incoming,
    pub(super) queue: Queue,
    pub(super) source: Source,
    /// Its prefixes, and how often it has asked for each.
    pub(super) wishes: HashMap<Box<[u8]>, u32>,
    /// Largest frame that a plain subscriber takes.
    pub(super) frame_bytes_max: usize,
    pub(super) dropped: u64,
    pub(super) bad: u64,
    /// Why we end it.
    pub(super) why: Option<String>,
}

impl Session {
    pub(super) fn new(handle: Handle, peer: SocketAddr, group: Group, side: Side) -> Session {
        Session {
            handle,
            peer,
            group,
            side,
            wire: Wire::Zmtp,
            stage: Stage::Greeting,
            dial: None,
            security: Security::Null,
            #[cfg(feature = "curve")]
            curve: None,
            introduced: false,
            minor: 0,
            receiving: false,
            sending: false,
            connecting: false,
            closing: false,
            starved: false,
            dirty: false,
            slow: false,
            cancelling: false,
            since_ns: 0,
            leave_ns: None,
            send_ns: 0,
            send_kind: Kind::Send,
            quiet_ns: 0,
            incoming: Incoming::default(),
            queue: Queue::default(),
            source: Source::default(),
            wishes: HashMap::new(),
            frame_bytes_max: usize::MAX,
            dropped: 0,
            bad: 0,
            why: None,
        }
    }

    pub(super) fn is_quiet(&self) -> bool {
        !self.receiving && !self.sending && !self.connecting
    }

    pub(super) fn is_open(&self) -> bool {
        self.stage == Stage::Open && !self.closing
    }

    /// What we call ourselves: proxies behind doors, plain sockets where we dial.
    pub(super) fn our_type(&self) -> &'static str {
        match (self.side, self.dial) {
            (Side::Publisher, None) => "XSUB",
            (Side::Publisher, Some(_)) => "SUB",
            (Side::Subscriber, None) => "XPUB",
            (Side::Subscriber, Some(_)) => "PUB",
        }
    }

    /// Whether the peer's socket belongs here, by its properties.
    ///
    /// # Errors
    /// The text says why not.
    pub(super) fn accepts(&self, properties: &[u8]) -> Result<(), String> {
        let kind = zmtp::property(properties, "Socket-Type").map_err(|fault| fault.to_string())?;
        let (wanted, fits) = match (self.side, kind) {
            (Side::Publisher, kind) => ("PUB or XPUB", matches!(kind, Some(b"PUB" | b"XPUB"))),
            (Side::Subscriber, kind) => ("SUB or XSUB", matches!(kind, Some(b"SUB" | b"XSUB"))),
        };
        if fits {
            return Ok(());
        }
        let kind = String::from_utf8_lossy(kind.unwrap_or(b"of no type"));
        Err(format!(
            "its socket is {kind}, {wanted} is wanted at this address"
        ))
    }

    /// Whether frames come and go in boxes.
    #[cfg(feature = "curve")]
    pub(super) fn is_sealed(&self) -> bool {
        let curve = self.curve.as_ref();
        curve.is_some_and(|curve| curve.is_sealed())
    }
}

/// The connection stands: we greet, with the signature. Plain peers speak first.
pub(super) fn greet<R: Ring>(plane: &mut Plane<R>, slot: u32) {
    plane.sessions[slot].stage = Stage::Greeting;
    plane.sessions[slot].since_ns = plane.now_ns;
    if plane.sessions[slot].wire == Wire::Zmtp {
        let greeting = our_greeting(&plane.sessions[slot]);
        plane.push_control(slot, &greeting[..zmtp::SIGNATURE_BYTES]);
    }
}

fn our_greeting(session: &Session) -> [u8; zmtp::GREETING_BYTES] {
    zmtp::greeting_with(session.security.mechanism(), session.security.is_server())
}

/// The rest of our greeting, when the peer's signature is there. libzmq may hear of a mechanism
/// that is not its own before it has sent a byte, and leaves for good then: we would not know that
/// it was a peer, and could not tell anybody why it stays away.
fn introduce<R: Ring>(plane: &mut Plane<R>, slot: u32) {
    let session = &mut plane.sessions[slot];
    if !session.introduced {
        session.introduced = true;
        let greeting = our_greeting(session);
        plane.push_control(slot, &greeting[zmtp::SIGNATURE_BYTES..]);
    }
}

/// A step of the handshake with what has come. `false`: more is needed, or the session ends.
pub(super) fn shake_hands<R: Ring>(plane: &mut Plane<R>, slot: u32) -> bool {
    let mut bytes = [0; zmtp::GREETING_BYTES];
    let session = &plane.sessions[slot];
    let there = session.incoming.peek(&plane.memory, 0, &mut bytes);
    let read = zmtp::decode_greeting(&bytes[..there]);
    if there >= zmtp::SIGNATURE_BYTES && !matches!(read, Decoded::Bad(_)) {
        introduce(plane, slot);
    }
    match read {
        Decoded::Need(_) => false,
        Decoded::Bad(bad) => plane.refuse(slot, &bad.to_string()),
        Decoded::Frame(greeting) => {
            let session = &mut plane.sessions[slot];
            session.minor = greeting.minor;
            session.stage = Stage::Handshake;
            session
                .incoming
                .advance(&mut plane.memory, zmtp::GREETING_BYTES);
            security::begin(plane, slot, greeting.mechanism)
        }
    }
}

/// A command or a short message has come whole, or has not yet.
pub(super) enum Small {
    /// It is in `plane.scratch`: whether it is a command, and whether more parts follow.
    There { command: bool, more: bool },
    /// More bytes are needed, or the session ends.
    No,
}

/// Takes one small frame out of what has come, into the plane's scratch.
pub(super) fn small_frame<R: Ring>(plane: &mut Plane<R>, slot: u32) -> Small {
    let session = &mut plane.sessions[slot];
    let mut front = [0; zmtp::HEAD_BYTES_MAX];
    let there = session.incoming.peek(&plane.memory, 0, &mut front);
    let head = match zmtp::decode_head(&front[..there], zmtp::COMMAND_BYTES_MAX) {
        Decoded::Frame(head) => head,
        Decoded::Need(_) => return Small::No,
        Decoded::Bad(bad) => {
            plane.refuse(slot, &bad.to_string());
            return Small::No;
        }
    };
    if session.incoming.bytes() < head.frame_bytes() {
        return Small::No;
    }
    plane.scratch.clear();
    plane.scratch.resize(head.body_bytes, 0);
    let incoming = &mut session.incoming;
    incoming.peek(&plane.memory, head.head_bytes, &mut plane.scratch);
    incoming.advance(&mut plane.memory, head.frame_bytes());
    let (command, more) = (head.command, head.more);
    Small::There { command, more }
}

/// A command of the handshake. `false`: it has not come, or the session ends.
pub(super) fn handshake<R: Ring>(plane: &mut Plane<R>, slot: u32) -> bool {
    match small_frame(plane, slot) {
        Small::There { command: true, .. } => {}
        Small::There { .. } => return plane.refuse(slot, &Fault::Unexpected.to_string()),
        Small::No => return false,
    }
    let body = std::mem::take(&mut plane.scratch);
    let goes_on = match zmtp::decode_command(&body) {
        Ok(Command::Error(reason)) => {
            let why = format!("it gave up: {}", String::from_utf8_lossy(reason));
            plane.refuse(slot, &why)
        }
        Ok(command) => security::step(plane, slot, &body, &command),
        Err(fault) => plane.refuse(slot, &fault.to_string()),
    };
    plane.scratch = body;
    goes_on
}

/// A command of an open session. `false`: the session ends.
pub(super) fn command<R: Ring>(plane: &mut Plane<R>, slot: u32, body: &[u8]) -> bool {
    match zmtp::decode_command(body) {
        Ok(Command::Ping { context, .. }) => {
            let mut pong = Vec::new();
            zmtp::write_command("PONG", context, &mut pong);
            plane.push_control(slot, &pong);
            true
        }
        Ok(Command::Subscribe(prefix)) => plane.wish(slot, true, prefix),
        Ok(Command::Cancel(prefix)) => plane.wish(slot, false, prefix),
        Ok(Command::Pong(_) | Command::Other(_)) => true,
        Ok(Command::Ready(_)) => plane.refuse(slot, &Fault::Unexpected.to_string()),
        Ok(Command::Error(reason)) => {
            let why = format!("it gave up: {}", String::from_utf8_lossy(reason));
            plane.refuse(slot, &why)
        }
        Err(fault) => plane.refuse(slot, &fault.to_string()),
    }
}
