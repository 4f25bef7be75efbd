//! Responses that pass through this shard (`response = "relay"`): who is at either end, how far
//! they have come, and the tickets that join sockets to them.
//!
//! ```text
//! worker --calls home--> [listener of this core] -- Relay -- [dialled by us] --> caller
//!          handshake, ticket of ours                         handshake, his own subject
//!          prologue, items, final marker, sentinel  ------>  the same bytes
//!          stop, kill                               <------  the same bytes
//! ```
//!
//! A ticket is a subject of our own making. Each attempt has another one, so a worker that was
//! given up finds nobody when he calls after all.

use std::net::{SocketAddr, TcpListener};

use corelane_codec::control_message::{PayloadCodec, StreamType};

use crate::draws::Draws;
use crate::load::Work;
use crate::operation::GENERATIONS;
use crate::pieces::PieceList;
use crate::quic::{self, Inbound, Place, QuicCaller};
use crate::send_pool::{CHUNK_BYTES, ChunkQueue, SendPool};
use crate::short_text::{self, ShortText};
use crate::table::{NONE, Table};
use crate::timer_wheel::TimerId;

/// Bytes of a ticket as text: a UUID.
pub(crate) const TICKET_BYTES: usize = 36;
/// The longest subject of a caller that is remembered.
pub(crate) const SUBJECT_BYTES_MAX: usize = short_text::BYTES_MAX;

/// What a relay's socket is for. The number is the relay's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leg {
    /// A worker has called and not said yet with which ticket.
    Stranger,
    /// The worker's response comes in here.
    Worker(u32),
    /// It goes out here, to the caller.
    Caller(u32),
    /// The caller's request stream comes in here (spec/request-plane.md §5).
    Feeder(u32),
    /// It goes out here, to the worker.
    Fed(u32),
    /// A worker that is told that nobody waits; then the socket is closed.
    Goodbye,
}

/// How far a response has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    /// The worker has not called home.
    Called,
    /// It has, and owes the prologue.
    Prologue,
    /// It owes the first item.
    First,
    /// The caller gets what comes.
    Passing,
    /// The worker is done with; the caller takes the rest, and closes.
    Closing,
    /// The same, but it is we who close when all is sent.
    Cutting,
}

/// A caller's stream: where it is dialled, and with which subject.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Home {
    pub(crate) address: SocketAddr,
    subject: ShortText,
}

impl Home {
    /// `None` when the subject is too long to be remembered.
    pub(crate) fn new(address: SocketAddr, subject: &str) -> Option<Home> {
        let subject = ShortText::new(subject)?;
        Some(Home { address, subject })
    }

    /// The subject as the caller wrote it.
    pub(crate) fn subject(&self) -> &str {
        self.subject.as_str()
    }
}

/// One relayed response.
pub(crate) struct Relay {
    /// The request, as long as it may be tried again; [`NONE`] after that.
    pub(crate) request: u32,
    pub(crate) route: u32,
    /// The instance that it counts as a stream of; [`NONE`] while none has it.
    pub(crate) instance: u32,
    /// What it costs that instance.
    pub(crate) work: Work,
    pub(crate) phase: Phase,
    /// Where the caller is called home.
    pub(crate) home: Home,
    /// He waits there on QUIC.
    pub(crate) quic: Option<Box<QuicCaller>>,
    /// Where he is dialled for his request stream, of a bidirectional call.
    pub(crate) feed: Option<Box<Home>>,
    pub(crate) codec: PayloadCodec,
    /// The unguessable part of the ticket of this attempt.
    pub(crate) secret: u64,
    /// Where the tickets stand in the request's head; the second one 0 when there is none.
    pub(crate) ticket_at: [u32; 2],
    /// The sockets, [`NONE`] while there is none.
    pub(crate) worker: u32,
    pub(crate) caller: u32,
    pub(crate) feeder: u32,
    pub(crate) fed: u32,
    /// Bytes at the front of what the worker has sent that have been looked at: they go to the
    /// caller as soon as anything does.
    pub(crate) ready: usize,
    /// Bytes of the message under way that have not come.
    pub(crate) left: u64,
    /// What is left of the worker's bytes once its socket is gone.
    pub(crate) rest: PieceList,
    /// What we say ourselves after them.
    pub(crate) tail: ChunkQueue,
    /// The worker has acknowledged the request.
    pub(crate) accepted: bool,
    /// The caller has asked for an early end: nothing is tried again.
    pub(crate) stopped: bool,
    /// A request stream has been opened: what was read from it cannot be had again.
    pub(crate) opened: bool,
    /// The caller has been given a prologue: there is no other one to come, whoever answers.
    pub(crate) greeted: bool,
    /// The final marker has been passed on.
    pub(crate) is_final: bool,
    /// Its items are Dynamo's `Annotated`, so an error can be said in one. That is so as a rule,
    /// and taken for granted until an item has been seen.
    pub(crate) annotated: bool,
    /// It stands in the list of relays with something to send.
    pub(crate) dirty: bool,
    /// The span of its request; [`NONE`] as a rule.
    pub(crate) span: u32,
    /// When the request had arrived.
    pub(crate) received_ns: u64,
    /// When this attempt began, and when its worker acknowledged.
    pub(crate) placed_ns: u64,
    pub(crate) accepted_ns: u64,
    /// When the caller was dialled.
    pub(crate) dialled_ns: u64,
    /// When the worker has last said something, and when the caller has last taken something.
    pub(crate) said_ns: u64,
    pub(crate) taken_ns: u64,
    /// When the worker has last taken something of the request stream, or could begin to.
    pub(crate) fed_ns: u64,
    /// When the last item came.
    pub(crate) item_ns: u64,
    pub(crate) timer: Option<TimerId>,
    pub(crate) timer_ns: u64,
}

impl Relay {
    /// A relay whose request has not been given to anybody.
    pub(crate) fn new(route: u32, home: Home, codec: PayloadCodec, now_ns: u64) -> Relay {
        Relay {
            request: NONE,
            route,
            instance: NONE,
            work: Work::default(),
            phase: Phase::Called,
            home,
            quic: None,
            feed: None,
            codec,
            secret: 0,
            ticket_at: [0; 2],
            worker: NONE,
            caller: NONE,
            feeder: NONE,
            fed: NONE,
            ready: 0,
            left: 0,
            rest: PieceList::EMPTY,
            tail: ChunkQueue::EMPTY,
            accepted: false,
            stopped: false,
            opened: false,
            greeted: false,
            is_final: false,
            annotated: true,
            dirty: false,
            span: NONE,
            received_ns: now_ns,
            placed_ns: now_ns,
            accepted_ns: 0,
            dialled_ns: 0,
            said_ns: now_ns,
            taken_ns: now_ns,
            fed_ns: now_ns,
            item_ns: 0,
            timer: None,
            timer_ns: 0,
        }
    }

    /// Whether the caller gets bytes of the worker's now.
    pub(crate) fn passes(&self) -> bool {
        self.phase >= Phase::Passing
    }

    /// Whether nothing is expected of a worker any more.
    pub(crate) fn is_over(&self) -> bool {
        self.phase >= Phase::Closing
    }
}

/// All relays of one shard.
pub(crate) struct Relays {
    /// Where workers call home, on this core alone.
    pub(crate) listener: Option<TcpListener>,
    /// That place as workers are told it.
    pub(crate) address: String,
    /// Where workers call us home on QUIC, if they can.
    pub(crate) quic: Option<Place>,
    /// This core, which each ticket names.
    pub(crate) core: usize,
    pub(crate) table: Table<Relay>,
    /// The fronts of relayed requests: headers and rewritten envelopes.
    pub(crate) heads: SendPool,
    pub(crate) dirty: Vec<u32>,
    /// Responses on QUIC whose requests we do not know to be sent yet.
    pub(crate) early: Vec<Inbound>,
    /// Sockets of workers that have not said for whom they call.
    pub(crate) strangers: usize,
    /// Memory for one envelope as it came, and as it leaves.
    pub(crate) envelope: Vec<u8>,
    pub(crate) head: Vec<u8>,
    draws: Draws,
}

impl Relays {
    /// With nobody in it, and no place to call.
    pub(crate) fn none() -> Relays {
        Relays {
            listener: None,
            address: String::new(),
            quic: None,
            core: 0,
            table: Table::new(0),
            heads: SendPool::new(0),
            dirty: Vec::new(),
            early: Vec::new(),
            strangers: 0,
            envelope: Vec::new(),
            head: Vec::new(),
            draws: Draws::new(),
        }
    }

    /// For `relays_max` at the same time, whose workers call `listener` home at `address`.
    pub(crate) fn new(listener: TcpListener, address: SocketAddr, relays_max: usize) -> Relays {
        Relays {
            listener: Some(listener),
            address: address.to_string(),
            table: Table::new(relays_max),
            // One chunk for each, as a rule, until its first item; long envelopes take more.
            heads: SendPool::new(relays_max + 64),
            dirty: Vec::with_capacity(relays_max),
            ..Relays::none()
        }
    }

    /// Whether a relay with a head of `head_bytes` finds room.
    pub(crate) fn has_room(&self, head_bytes: usize) -> bool {
        let chunks = head_bytes / CHUNK_BYTES + 1;
        !self.table.is_full() && self.heads.free_chunks() >= chunks
    }

    /// A number that nobody can guess.
    pub(crate) fn draw(&self) -> u64 {
        self.draws.draw()
    }

    /// The ticket of a relay's present attempt, for one of its streams.
    pub(crate) fn ticket(&self, relay: u32, stream: StreamType) -> u128 {
        let secret = self.table.get(relay).map_or(0, |relay| relay.secret);
        let ticket = ticket(relay, self.table.generation(relay), stream, secret);
        quic::mark(ticket, self.core)
    }

    /// The relay that a worker's subject is a ticket of.
    pub(crate) fn of_ticket(&self, subject: &str, stream: StreamType) -> Option<u32> {
        self.of_number(parse_ticket(subject)?, stream)
    }

    /// The same of a ticket that is no text.
    pub(crate) fn of_number(&self, number: u128, stream: StreamType) -> Option<u32> {
        let relay = (number >> 96) as u32;
        self.table.get(relay)?;
        (self.ticket(relay, stream) == number).then_some(relay)
    }
}

/// ```text
/// 127   96 95         80 79  76 75             66  65,64  63,62 61       0
/// | slot | generation  | 0100 | generation     | stream |  10 | secret   |
/// ```
/// with the core in the last bits of the secret ([`quic::mark`]), which is a UUID of version 4 to
/// everybody else.
fn ticket(relay: u32, generation: u32, stream: StreamType, secret: u64) -> u128 {
    const { assert!(GENERATIONS <= 1 << 24) };
    let stream = match stream {
        StreamType::Response => 0,
        StreamType::Request => 1,
    };
    u128::from(relay) << 96
        | u128::from(generation >> 8) << 80
        | 0x4 << 76
        | u128::from(generation & 0xff) << 68
        | stream << 64
        | 0b10 << 62
        | u128::from(secret >> 2)
}

/// Writes a ticket as the text of a UUID.
pub(crate) fn write_ticket(ticket: u128, out: &mut [u8; TICKET_BYTES]) {
    let mut shift = 128;
    for (at, byte) in out.iter_mut().enumerate() {
        if matches!(at, 8 | 13 | 18 | 23) {
            *byte = b'-';
            continue;
        }
        shift -= 4;
        *byte = b"0123456789abcdef"[(ticket >> shift) as usize & 0xf];
    }
}

fn parse_ticket(text: &str) -> Option<u128> {
    let text = text.as_bytes();
    if text.len() != TICKET_BYTES {
        return None;
    }
    let mut ticket = 0;
    for (at, byte) in text.iter().enumerate() {
        if matches!(at, 8 | 13 | 18 | 23) {
            if *byte != b'-' {
                return None;
            }
            continue;
        }
        let digit = (*byte as char).to_digit(16)?;
        ticket = ticket << 4 | u128::from(digit);
    }
    Some(ticket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_is_a_uuid_and_names_slot_generation_and_stream() {
        let mut seen = std::collections::HashSet::new();
        for relay in [0, 1, 77, u32::MAX - 1] {
            for generation in [0, 255, 256, GENERATIONS - 1] {
                for stream in [StreamType::Response, StreamType::Request] {
                    let number = ticket(relay, generation, stream, u64::MAX / 3);
                    let mut text = [0; TICKET_BYTES];
                    write_ticket(number, &mut text);
                    let text = std::str::from_utf8(&text).unwrap();
                    assert_eq!(parse_ticket(text), Some(number));
                    assert_eq!((&text[14..15], &text[8..9]), ("4", "-"));
                    assert!(matches!(&text[19..20], "8" | "9" | "a" | "b"), "{text}");
                    assert_eq!((number >> 96) as u32, relay);
                    assert!(seen.insert(number));
                }
            }
        }
        for bad in ["", "x", "00000000-0000-0000-0000-00000000000", "g"] {
            assert_eq!(parse_ticket(bad), None);
        }
        assert_eq!(parse_ticket(&"0".repeat(36)), None);
    }
}
