//! How the response of each request that a handler of this process answers leaves: on a call-home
//! socket of its own, as below, or on a shared connection (`mux_link`).
//!
//! ```text
//! Dialing --connected--> Open --all written--> Closing --caller's end, or 10 s--> (gone)
//!    |  '-no port left-> Pausing                                  ^
//!    '------ refused, late ---> Dead <--stop, kill, reset, cut off |
//!                                '--the handler has ended----------'
//! ```
//!
//! The dial and the handler run at the same time; what the handler has written when the connect
//! completes leaves with the handshake in one send.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;

use corelane_codec::call_home::{self, StreamMessage};
use corelane_codec::control_message::PayloadCodec;
use corelane_codec::{Decoded, two_part};

use crate::call_frame;
use crate::connection::{End, Role};
use crate::ends;
use crate::handler::CallHome;
use crate::input;
use crate::mux_link::{self, Lane};
use crate::quic::QuicCaller;
use crate::responder::{Shared, Stream};
use crate::ring::Ring;
use crate::served::{Busy, Outcome};
use crate::shard::{Shard, TimerKind};
use crate::table::NONE;
use crate::timer_wheel::TimerId;

/// From the first attempt to dial to the last moment that one may succeed.
const DIAL_NS: u64 = 5_000_000_000;
/// Pause after an attempt that failed for lack of a port, a descriptor or memory.
const PAUSE_NS: u64 = 100_000_000;
/// The caller has so long to close the socket after the sentinel (spec/request-plane.md §4.5).
const CLOSE_NS: u64 = 10_000_000_000;
/// A handler has so long to end once its caller is gone.
const END_NS: u64 = 10_000_000_000;
/// No control message that we know is longer.
const CONTROL_BYTES_MAX: usize = 256;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Dialing,
    Pausing,
    Open,
    Closing,
    Dead,
}

/// One response and its socket.
pub(crate) struct Response {
    pub(crate) stream: Shared,
    connection: u32,
    /// Its place on a shared connection, in place of a socket of its own.
    pub(crate) lane: Option<Lane>,
    address: SocketAddr,
    /// The caller waits on QUIC.
    quic: Option<Box<QuicCaller>>,
    state: State,
    dial_until_ns: u64,
    timer: Option<TimerId>,
    holds_slot: bool,
    /// Counts its request with its handler as long as the slot is held.
    busy: Option<Busy>,
    /// Where the request's values come from, if not out of its body.
    input: Option<(u32, u32)>,
    /// Why it ended before its end.
    pub(crate) early: Option<Outcome>,
}

impl Response {
    /// Where its caller is.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }
}

/// Takes a slot for a response and dials its caller. `None` when the table is full.
pub(crate) fn open<R: Ring>(
    shard: &mut Shard<R>,
    home: &CallHome,
    codec: PayloadCodec,
) -> Option<Shared> {
    let stream = Stream::new(codec, &shard.worker.host);
    let stream = Rc::new(RefCell::new(stream));
    let ticket = home.offers_mux.then(|| mux_link::ticket(&home.subject));
    let response = Response {
        stream: Rc::clone(&stream),
        connection: NONE,
        lane: None,
        address: home.address,
        quic: home.quic.clone(),
        state: State::Dialing,
        dial_until_ns: shard.now_ns + DIAL_NS,
        timer: None,
        holds_slot: true,
        busy: None,
        input: None,
        early: None,
    };
    let slot = shard.worker.responses.insert(response).ok()?;
    let generation = shard.worker.responses.generation(slot);
    stream.borrow_mut().set_place((slot, generation));
    shard.worker.take_slot();
    let shares = ticket
        .flatten()
        .is_some_and(|ticket| mux_link::join(shard, slot, ticket));
    if !shares {
        stream.borrow_mut().shake(&home.subject);
        dial(shard, slot);
    }
    Some(stream)
}

/// The shared connection could not be made: the response gets a socket of its own.
pub(crate) fn go_alone<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    let dial_until_ns = shard.now_ns + DIAL_NS;
    let response = &mut shard.worker.responses[slot];
    if let Some(lane) = response.lane.take() {
        let subject = call_frame::uuid(lane.subject);
        response.stream.borrow_mut().shake(&subject);
        response.dial_until_ns = dial_until_ns;
        dial(shard, slot);
    }
}

/// The response is that of a handler, which has one request more until its slot is free.
pub(crate) fn count<R: Ring>(shard: &mut Shard<R>, stream: &Shared, busy: Busy) {
    let (slot, generation) = stream.borrow().place();
    // A dial that failed at once has left nothing to count.
    if shard.worker.responses.is_current(slot, generation) {
        shard.worker.responses[slot].busy = Some(busy);
    }
}

/// The values of its request come from there.
pub(crate) fn feeds<R: Ring>(shard: &mut Shard<R>, response: (u32, u32), input: (u32, u32)) {
    if shard.worker.responses.is_current(response.0, response.1) {
        shard.worker.responses[response.0].input = Some(input);
    }
}

fn dial<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    let response = &mut shard.worker.responses[slot];
    response.state = State::Dialing;
    let (address, until_ns) = (response.address, response.dial_until_ns);
    let quic = response.quic.clone();
    set_timer(shard, slot, until_ns);
    if let Some(caller) = quic {
        return hand_over(shard, slot, &caller);
    }
    match shard.dial(&address, Role::End(End::Response(slot))) {
        Ok(connection) => shard.worker.responses[slot].connection = connection,
        Err(errno) => not_connected(shard, slot, errno),
    }
}

/// The response goes to who speaks QUIC, and can be written at once.
fn hand_over<R: Ring>(shard: &mut Shard<R>, slot: u32, caller: &QuicCaller) {
    match shard.dial_quic(caller, Role::End(End::Response(slot))) {
        Ok(connection) => {
            shard.worker.responses[slot].connection = connection;
            shard.established(connection);
        }
        Err(errno) => not_connected(shard, slot, errno),
    }
}

/// A dial has failed.
fn not_connected<R: Ring>(shard: &mut Shard<R>, slot: u32, errno: i32) {
    let lacking = [
        libc::EADDRNOTAVAIL,
        libc::EMFILE,
        libc::ENFILE,
        libc::ENOBUFS,
        libc::ENOMEM,
    ];
    let again_ns = shard.now_ns + PAUSE_NS;
    if lacking.contains(&errno) && again_ns < shard.worker.responses[slot].dial_until_ns {
        shard.worker.responses[slot].state = State::Pausing;
        return set_timer(shard, slot, again_ns);
    }
    shard.stats.shard.responses_unreachable.add(1);
    shard.worker.responses[slot].early = Some(Outcome::Unreachable);
    die(shard, slot, true);
}

/// The caller has answered the dial.
pub(crate) fn connected<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    clear_timer(shard, slot);
    shard.worker.responses[slot].state = State::Open;
    advance(shard, slot);
}

/// The handler has written, or ended, or the socket has taken something.
pub(crate) fn advance<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    let response = &mut shard.worker.responses[slot];
    let connection = response.connection;
    response.stream.borrow_mut().seen();
    if response.lane.is_some() && response.state != State::Dead {
        return mux_link::advance(shard, slot);
    }
    match response.state {
        State::Dialing | State::Pausing => return,
        State::Closing | State::Dead => return end_if_over(shard, slot),
        State::Open => {}
    }
    let outgoing = &mut shard.connections[connection].outgoing;
    if !outgoing.is_empty() {
        return;
    }
    if response.stream.borrow_mut().give(outgoing) {
        return ends::flush(shard, connection);
    }
    if response.stream.borrow().is_written() {
        written(shard, slot);
    }
}

/// The socket took `bytes` bytes.
pub(crate) fn sent<R: Ring>(shard: &mut Shard<R>, slot: u32, bytes: usize) {
    let connection = shard.worker.responses[slot].connection;
    let outgoing = &mut shard.connections[connection].outgoing;
    outgoing.sent(bytes);
    if !outgoing.is_empty() {
        return ends::flush(shard, connection);
    }
    shard.worker.host.give_back(outgoing.returned(false));
    shard.worker.responses[slot].stream.borrow_mut().taken();
    advance(shard, slot);
}

/// The whole response is in the socket.
fn written<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    let response = &mut shard.worker.responses[slot];
    let connection = response.connection;
    let complete = response.stream.borrow().is_complete();
    if !complete || shard.connections[connection].end_of_stream {
        // Cut off by its handler, or the caller has closed before us.
        return die(shard, slot, false);
    }
    response.state = State::Closing;
    let until_ns = shard.now_ns + CLOSE_NS;
    set_timer(shard, slot, until_ns);
    end_if_over(shard, slot);
}

/// The socket goes; the entry stays until the handler has ended.
pub(crate) fn die<R: Ring>(shard: &mut Shard<R>, slot: u32, kill: bool) {
    mux_link::leave(shard, slot);
    let response = &mut shard.worker.responses[slot];
    response.state = State::Dead;
    response.stream.borrow_mut().stop(kill);
    let input = response.input.take();
    let connection = std::mem::replace(&mut response.connection, NONE);
    if connection != NONE {
        shard.connections[connection].outgoing.drop_waiting();
        shard.forget(connection);
    }
    if let Some((source, generation)) = input
        && shard.worker.inputs.is_current(source, generation)
    {
        input::close(shard, source);
    }
    let until_ns = shard.now_ns + END_NS;
    set_timer(shard, slot, until_ns);
    end_if_over(shard, slot);
}

/// Frees the slot when the handler has ended, and the entry when the socket is gone as well.
fn end_if_over<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    let response = &mut shard.worker.responses[slot];
    if !response.stream.borrow().is_task_over() {
        return;
    }
    if std::mem::take(&mut response.holds_slot) {
        if let Some(busy) = response.busy.take() {
            let stream = response.stream.borrow();
            let early = response.early.filter(|_| !stream.is_complete());
            busy.end(early, stream.so_far());
        }
        shard.worker.free_slot();
    }
    if shard.worker.responses[slot].state == State::Dead {
        clear_timer(shard, slot);
        shard.worker.responses.remove(slot);
    }
}

/// The caller has said something on the socket (spec/request-plane.md §4.6).
pub(crate) fn said<R: Ring>(shard: &mut Shard<R>, connection: u32, slot: u32) {
    loop {
        let incoming = &mut shard.connections[connection].incoming;
        if shard.worker.responses[slot].state == State::Closing {
            // Too late to matter.
            return shard.pieces.clear(incoming);
        }
        let mut bytes = [0; CONTROL_BYTES_MAX];
        let copied = shard.pieces.copy_out(incoming, 0, &mut bytes);
        let bytes = &bytes[..copied];
        let message = match two_part::decode(bytes, Some(CONTROL_BYTES_MAX as u64)) {
            Decoded::Frame(message) => message,
            Decoded::Need(_) => return,
            Decoded::Bad(_) => return die(shard, slot, true),
        };
        match call_home::classify(bytes, &message) {
            StreamMessage::Empty => shard.pieces.advance(incoming, message.frame_bytes()),
            message => {
                shard.worker.responses[slot].early = Some(Outcome::Cancelled);
                return die(shard, slot, message != StreamMessage::Stop);
            }
        }
    }
}

/// The caller's end of stream. Before the sentinel it means nothing: he may have closed only his
/// own direction.
pub(crate) fn half_closed<R: Ring>(shard: &mut Shard<R>, connection: u32, slot: u32) {
    shard.connections[connection].end_of_stream = true;
    if shard.worker.responses[slot].state == State::Closing {
        shard.lost(connection, 0);
    }
}

/// The connection is gone; it has been closed already.
pub(crate) fn lost<R: Ring>(shard: &mut Shard<R>, slot: u32, errno: i32) {
    let response = &mut shard.worker.responses[slot];
    response.connection = NONE;
    match response.state {
        State::Dialing => not_connected(shard, slot, errno),
        State::Open => {
            shard.stats.shard.responses_lost.add(1);
            shard.worker.responses[slot].early = Some(Outcome::CutOff);
            die(shard, slot, true);
        }
        // A reset after the sentinel is as good as an end of stream (§4.5).
        State::Closing => die(shard, slot, false),
        State::Pausing | State::Dead => {}
    }
}

/// The timer of a response.
pub(crate) fn overdue<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    let response = &mut shard.worker.responses[slot];
    response.timer = None;
    let connection = response.connection;
    match response.state {
        State::Dialing => shard.lost(connection, libc::ETIMEDOUT),
        State::Pausing => dial(shard, slot),
        State::Closing => die(shard, slot, false),
        State::Dead => response.stream.borrow_mut().abandon(),
        State::Open => {}
    }
}

fn set_timer<R: Ring>(shard: &mut Shard<R>, slot: u32, deadline_ns: u64) {
    clear_timer(shard, slot);
    let generation = shard.worker.responses.generation(slot);
    let timer = shard.timer_to_cancel(TimerKind::Response, slot, generation, deadline_ns);
    shard.worker.responses[slot].timer = timer;
}

fn clear_timer<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    if let Some(timer) = shard.worker.responses[slot].timer.take() {
        shard.timers.cancel(timer);
    }
}
