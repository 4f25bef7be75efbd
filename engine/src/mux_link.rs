//! Connections that the responses of many requests of one caller share: the worker's end
//! ([`corelane_codec::mux`]).
//!
//! ```text
//! Dialing --connected, hello--> Greeting --caller's hello--> Open --lost, or idle--> (gone)
//!    '---- refused, late, lost -----'---> a socket for each response that waits
//! ```
//!
//! One for each caller's call-home address. A response waits while it has no credit, and while the
//! connection has more to send than it should; then its handler does.

use std::collections::HashMap;
use std::net::SocketAddr;

use corelane_codec::call_home::{self, StreamMessage};
use corelane_codec::mux::{self, CHUNK_BYTES_MAX, HELLO_FRAME, Kind, SUBJECT_BYTES, WINDOW_BYTES};
use corelane_codec::{Decoded, two_part};

use crate::connection::{End, Role};
use crate::ends;
use crate::input;
use crate::mux::{Piece, Reader, put_back, take};
use crate::respond_stream;
use crate::ring::Ring;
use crate::served::Outcome;
use crate::shard::{Shard, TimerKind};
use crate::table::{NONE, Table};

/// Shared connections, at most; further callers get a socket for each response.
const LINKS_MAX: usize = 1024;
/// Time for the connect and the caller's hello.
const GREET_NS: u64 = 5_000_000_000;
/// A connection without a response is closed after one to two such times.
const IDLE_NS: u64 = 150_000_000_000;
/// Where no shared connection could be made, none is tried for so long.
const AVOID_NS: u64 = 30_000_000_000;
/// Such addresses that are remembered.
const AVOIDED_MAX: usize = 1024;
/// With more than this unsent, responses wait.
const QUEUE_BYTES_MAX: usize = 4 << 20;
/// A stream's number is its response's slot and the lower bits of its generation.
const SLOT_BITS: u32 = 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Dialing,
    Greeting,
    Open,
}

/// One shared connection.
pub(crate) struct Link {
    address: SocketAddr,
    connection: u32,
    state: State,
    reader: Reader,
    /// Responses under way on it.
    streams: usize,
    /// Those that wait for the connection, by slot and generation.
    waiting: Vec<(u32, u32)>,
    used_ns: u64,
    dirty: bool,
}

/// The shared connections of a worker.
pub(crate) struct Links {
    pub(crate) links: Table<Link>,
    at: HashMap<SocketAddr, u32>,
    avoided: HashMap<SocketAddr, u64>,
    dirty: Vec<u32>,
}

impl Links {
    pub(crate) fn new() -> Links {
        Links {
            links: Table::new(LINKS_MAX),
            at: HashMap::new(),
            avoided: HashMap::new(),
            dirty: Vec::new(),
        }
    }
}

/// The place of a response on a shared connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lane {
    link: u32,
    number: u32,
    pub(crate) subject: u128,
    credit: u32,
    /// Its first chunk has been written.
    opened: bool,
    /// The first chunk was put off once, so that it need not go without what the handler writes.
    hesitated: bool,
    /// It stands among those that wait for the connection.
    waits: bool,
}

/// The subject as it travels here: only UUIDs can.
pub(crate) fn ticket(subject: &str) -> Option<u128> {
    let bytes = subject.as_bytes();
    let dashes = |at: &usize| matches!(at, 8 | 13 | 18 | 23);
    if bytes.len() != 36 {
        return None;
    }
    let mut bits = 0;
    for (at, byte) in bytes.iter().enumerate() {
        match (*byte as char).to_digit(16) {
            Some(digit) if !dashes(&at) => bits = bits << 4 | u128::from(digit),
            None if dashes(&at) && *byte == b'-' => {}
            _ => return None,
        }
    }
    Some(bits)
}

/// The number of the stream that a slot has; `None`: there are no numbers for such slots.
pub(crate) fn number(slot: u32, generation: u32) -> Option<u32> {
    // The highest bit is left for others.
    let number = (generation << SLOT_BITS | slot) & (u32::MAX >> 1);
    (slot >> SLOT_BITS == 0).then_some(number)
}

/// The slot that a stream's number was made of.
pub(crate) fn slot_of(number: u32) -> u32 {
    number & ((1 << SLOT_BITS) - 1)
}

/// One stream more on the connection to an address, which is dialled when it is new.
pub(crate) fn enter<R: Ring>(shard: &mut Shard<R>, address: SocketAddr) -> Option<u32> {
    let link = of_address(shard, address)?;
    let entry = &mut shard.worker.muxes.links[link];
    entry.streams += 1;
    entry.used_ns = shard.now_ns;
    Some(link)
}

/// One stream less.
pub(crate) fn exit<R: Ring>(shard: &mut Shard<R>, link: u32) {
    if let Some(link) = shard.worker.muxes.links.get_mut(link) {
        link.streams -= 1;
        link.used_ns = shard.now_ns;
    }
}

/// Lets a new response share the connection to its caller. `false`: it gets its own socket.
pub(crate) fn join<R: Ring>(shard: &mut Shard<R>, slot: u32, subject: u128) -> bool {
    let address = shard.worker.responses[slot].address();
    let generation = shard.worker.responses.generation(slot);
    let Some(number) = number(slot, generation) else {
        return false;
    };
    let Some(link) = enter(shard, address) else {
        return false;
    };
    shard.worker.responses[slot].lane = Some(Lane {
        link,
        number,
        subject,
        credit: WINDOW_BYTES,
        opened: false,
        hesitated: false,
        waits: false,
    });
    shard.stats.shard.mux_sent.add(1);
    // It is looked at when its handler has had its first turn.
    shard.worker.responses[slot]
        .stream
        .borrow_mut()
        .look_again();
    true
}

/// The connection to an address; dialled when it is new.
fn of_address<R: Ring>(shard: &mut Shard<R>, address: SocketAddr) -> Option<u32> {
    let muxes = &mut shard.worker.muxes;
    if let Some(link) = muxes.at.get(&address) {
        return Some(*link);
    }
    if let Some(until_ns) = muxes.avoided.get(&address) {
        if *until_ns > shard.now_ns {
            return None;
        }
        muxes.avoided.remove(&address);
    }
    if muxes.links.is_full() {
        return None;
    }
    let link = Link {
        address,
        connection: NONE,
        state: State::Dialing,
        reader: Reader::default(),
        streams: 0,
        waiting: Vec::new(),
        used_ns: shard.now_ns,
        dirty: false,
    };
    let link = muxes.links.insert(link).ok()?;
    let Ok(connection) = shard.dial(&address, Role::End(End::MuxLink(link))) else {
        shard.worker.muxes.links.remove(link);
        return None;
    };
    shard.worker.muxes.links[link].connection = connection;
    shard.worker.muxes.at.insert(address, link);
    watch(shard, link, GREET_NS);
    Some(link)
}

fn watch<R: Ring>(shard: &mut Shard<R>, link: u32, pause_ns: u64) {
    let generation = shard.worker.muxes.links.generation(link);
    let deadline_ns = shard.now_ns + pause_ns;
    shard.timer(TimerKind::Mux, link, generation, deadline_ns);
}

/// The connect has succeeded.
pub(crate) fn connected<R: Ring>(shard: &mut Shard<R>, slot: u32, link: u32) {
    shard.worker.muxes.links[link].state = State::Greeting;
    let outgoing = &mut shard.connections[slot].outgoing;
    outgoing.waiting().extend_from_slice(&HELLO_FRAME);
    ends::flush(shard, slot);
}

/// The response has written, or ended, or may go on: what may be sent is.
pub(crate) fn advance<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    let generation = shard.worker.responses.generation(slot);
    let response = &mut shard.worker.responses[slot];
    let Some(lane) = &mut response.lane else {
        return;
    };
    let link = &mut shard.worker.muxes.links[lane.link];
    let outgoing = &mut shard.connections[link.connection].outgoing;
    if link.state != State::Open || outgoing.unsent() > QUEUE_BYTES_MAX {
        if !std::mem::replace(&mut lane.waits, true) {
            link.waiting.push((slot, generation));
        }
        return;
    }
    let mut stream = response.stream.borrow_mut();
    let (out, over) = stream.written();
    if out.is_empty() && !over && !lane.opened && !lane.hesitated {
        lane.hesitated = true;
        return stream.look_again();
    }
    let out_bytes = out.len();
    let (given, ended) = write(lane, out, over, outgoing.waiting());
    if lane.opened && !link.dirty {
        link.dirty = true;
        shard.worker.muxes.dirty.push(lane.link);
    }
    if given > 0 || out_bytes > 0 && ended {
        stream.gave(given);
    }
    drop(stream);
    if ended {
        end(shard, slot);
    }
}

/// Writes chunks as far as credit goes. Answers how many bytes were taken, and whether that was
/// all that there will ever be.
fn write(lane: &mut Lane, out: &[u8], over: bool, to: &mut Vec<u8>) -> (usize, bool) {
    let mut at = 0;
    loop {
        let left = out.len() - at;
        let here = left
            .min(lane.credit as usize)
            .min(CHUNK_BYTES_MAX - SUBJECT_BYTES);
        let end = over && here == left;
        let open = !lane.opened;
        if here == 0 && !open && !end {
            return (at, false);
        }
        let subject_bytes = if open { SUBJECT_BYTES } else { 0 };
        let kind = Kind::Data { open, end };
        to.extend_from_slice(&mux::prefix(lane.number, kind, subject_bytes + here));
        if open {
            to.extend_from_slice(&lane.subject.to_be_bytes());
        }
        to.extend_from_slice(&out[at..at + here]);
        at += here;
        lane.credit -= here as u32;
        lane.opened = true;
        if end {
            return (at, true);
        }
    }
}

/// All of a response has been written: it needs the connection no more.
fn end<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    forget(shard, slot);
    respond_stream::die(shard, slot, false);
}

fn forget<R: Ring>(shard: &mut Shard<R>, slot: u32) -> Option<Lane> {
    let lane = shard.worker.responses[slot].lane.take()?;
    exit(shard, lane.link);
    Some(lane)
}

/// A response ends without all that it should have: as a socket that is closed.
pub(crate) fn leave<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    let Some(lane) = forget(shard, slot) else {
        return;
    };
    if !lane.opened {
        // The caller sees a worker that was lost, as he would see it on a socket.
        let kind = Kind::Data {
            open: true,
            end: true,
        };
        let subject = lane.subject.to_be_bytes();
        let chunk = [&mux::prefix(lane.number, kind, SUBJECT_BYTES)[..], &subject].concat();
        say(shard, lane.link, &chunk);
        return;
    }
    let (open, end) = (false, true);
    let chunk = mux::prefix(lane.number, Kind::Data { open, end }, 0);
    say(shard, lane.link, &chunk);
}

/// Queues a chunk for the caller, once he has greeted. Answers whether he has.
pub(crate) fn say<R: Ring>(shard: &mut Shard<R>, link: u32, chunk: &[u8]) -> bool {
    let Some(entry) = shard.worker.muxes.links.get_mut(link) else {
        return false;
    };
    if entry.state != State::Open {
        return false;
    }
    let outgoing = &mut shard.connections[entry.connection].outgoing;
    outgoing.waiting().extend_from_slice(chunk);
    if !std::mem::replace(&mut entry.dirty, true) {
        shard.worker.muxes.dirty.push(link);
    }
    true
}

/// What was queued in this tick leaves as one.
pub(crate) fn flush<R: Ring>(shard: &mut Shard<R>) {
    let mut dirty = std::mem::take(&mut shard.worker.muxes.dirty);
    for link in dirty.drain(..) {
        if let Some(entry) = shard.worker.muxes.links.get_mut(link) {
            entry.dirty = false;
            let connection = entry.connection;
            ends::flush(shard, connection);
        }
    }
    shard.worker.muxes.dirty = dirty;
}

/// The socket has taken something: those who wait go on.
pub(crate) fn sent<R: Ring>(shard: &mut Shard<R>, link: u32) {
    let Some(entry) = shard.worker.muxes.links.get_mut(link) else {
        return;
    };
    if entry.state != State::Open || entry.waiting.is_empty() {
        return;
    }
    for (slot, generation) in std::mem::take(&mut entry.waiting) {
        if shard.worker.responses.is_current(slot, generation)
            && let Some(lane) = &mut shard.worker.responses[slot].lane
        {
            lane.waits = false;
            advance(shard, slot);
        }
    }
}

/// The caller has said something.
pub(crate) fn arrived<R: Ring>(shard: &mut Shard<R>, slot: u32, link: u32) {
    let bytes = take(shard, slot);
    let mut taken = 0;
    while let Some(entry) = shard.worker.muxes.links.get_mut(link) {
        match entry.reader.next(&bytes[taken..]) {
            Ok(Some((piece, length))) => {
                taken += length;
                if !hear(shard, link, piece) {
                    return shard.lost(slot, libc::EBADMSG);
                }
            }
            Ok(None) => return put_back(shard, slot, bytes, taken),
            Err(_) => return shard.lost(slot, libc::EBADMSG),
        }
    }
}

/// `false`: a caller does not say that.
fn hear<R: Ring>(shard: &mut Shard<R>, link: u32, piece: Piece<'_>) -> bool {
    match piece {
        Piece::Hello => {
            let entry = &mut shard.worker.muxes.links[link];
            if entry.state != State::Greeting {
                return false;
            }
            entry.state = State::Open;
            shard.stats.shard.mux_connected.add(1);
            watch(shard, link, IDLE_NS);
            input::shared::greeted(shard, link);
            sent(shard, link);
        }
        Piece::Open { .. } => return false,
        Piece::Credit { stream, bytes } => {
            if let Some(slot) = of_number(shard, link, stream) {
                let response = &mut shard.worker.responses[slot];
                if let Some(lane) = &mut response.lane {
                    lane.credit = lane.credit.saturating_add(bytes);
                }
                advance(shard, slot);
            }
        }
        Piece::Reset { stream } => {
            if let Some(slot) = of_number(shard, link, stream) {
                forget(shard, slot);
                shard.worker.responses[slot].early = Some(Outcome::Cancelled);
                respond_stream::die(shard, slot, true);
            } else {
                input::shared::reset(shard, link, stream);
            }
        }
        Piece::Bytes { stream, bytes, end } => match of_number(shard, link, stream) {
            Some(slot) => said(shard, slot, bytes),
            None => return input::shared::arrived(shard, link, stream, bytes, end),
        },
    }
    true
}

/// The response with such a number, if it is under way on this connection.
fn of_number<R: Ring>(shard: &Shard<R>, link: u32, number: u32) -> Option<u32> {
    let slot = slot_of(number);
    let lane = shard.worker.responses.get(slot)?.lane?;
    (lane.link == link && lane.number == number).then_some(slot)
}

/// A control message, whole: we never write one in pieces (spec/request-plane.md §4.6).
fn said<R: Ring>(shard: &mut Shard<R>, slot: u32, bytes: &[u8]) {
    if bytes.is_empty() {
        return;
    }
    let kill = match two_part::decode(bytes, Some(bytes.len() as u64)) {
        Decoded::Frame(message) => match call_home::classify(bytes, &message) {
            StreamMessage::Empty => return,
            message => message != StreamMessage::Stop,
        },
        Decoded::Need(_) | Decoded::Bad(_) => true,
    };
    shard.worker.responses[slot].early = Some(Outcome::Cancelled);
    respond_stream::die(shard, slot, kill);
}

/// The connection is gone; it has been closed already.
pub(crate) fn lost<R: Ring>(shard: &mut Shard<R>, link: u32) {
    let Some(entry) = shard.worker.muxes.links.remove(link) else {
        return;
    };
    let muxes = &mut shard.worker.muxes;
    muxes.at.remove(&entry.address);
    let greeted = entry.state == State::Open;
    if !greeted {
        shard.stats.shard.mux_refused.add(1);
        if muxes.avoided.len() >= AVOIDED_MAX {
            muxes.avoided.clear();
        }
        let until_ns = shard.now_ns + AVOID_NS;
        muxes.avoided.insert(entry.address, until_ns);
    } else if entry.streams > 0 {
        shard.stats.shard.mux_lost.add(1);
    }
    if entry.streams == 0 {
        return;
    }
    let responses = &shard.worker.responses;
    let mine = |slot: &u32| responses[*slot].lane.is_some_and(|lane| lane.link == link);
    let slots: Vec<u32> = responses.slots().filter(mine).collect();
    for slot in slots {
        if greeted {
            let response = &mut shard.worker.responses[slot];
            response.lane = None;
            response.early = Some(Outcome::CutOff);
            shard.stats.shard.responses_lost.add(1);
            respond_stream::die(shard, slot, true);
        } else {
            respond_stream::go_alone(shard, slot);
        }
    }
    for source in input::shared::of_link(shard, link) {
        match greeted {
            true => input::shared::lost(shard, source),
            false => input::shared::go_alone(shard, source),
        }
    }
}

/// The timer of a connection: the caller does not greet, or nobody uses it.
pub(crate) fn overdue<R: Ring>(shard: &mut Shard<R>, link: u32) {
    let entry = &shard.worker.muxes.links[link];
    let connection = entry.connection;
    if entry.state != State::Open {
        return shard.lost(connection, libc::ETIMEDOUT);
    }
    if entry.streams == 0 && entry.used_ns + IDLE_NS <= shard.now_ns {
        return shard.lost(connection, 0);
    }
    watch(shard, link, IDLE_NS);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_uuids_are_tickets() {
        let bits = 0x0f0e_0d0c_0b0a_4908_8706_0504_0302_0101;
        let text = crate::call_frame::uuid(bits);
        assert_eq!(ticket(&text), Some(bits));
        for text in [
            "",
            "0f0e",
            &text.replace('-', "0"),
            &text.replacen('0', "-", 1),
        ] {
            assert_eq!(ticket(text), None, "{text}");
        }
    }
}
