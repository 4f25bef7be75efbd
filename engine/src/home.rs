//! Workers call home: each with one socket for the response of one call
//! (spec/request-plane.md §4.2, §4.4, §4.7).
//!
//! ```text
//! accept -> handshake, 10 s -> prologue -> item... -> final marker -> sentinel or close
//!              '-> unknown or bad: reset
//! ```

use std::os::fd::{AsRawFd, IntoRawFd};

use corelane_codec::call_home::{self, Handshake, KILL_FRAME, Prologue, STOP_FRAME, StreamMessage};
use corelane_codec::control_message::{PayloadCodec, StreamType};
use corelane_codec::error::{Class, DynamoError};
use corelane_codec::limits::TWO_PART_PREFIX_BYTES;
use corelane_codec::two_part::{self, Message, Shape};
use corelane_codec::{Decoded, item, mux};

use crate::call::{Phase, What};
use crate::client;
use crate::connection::{End, Intake, Role};
use crate::ends;
use crate::feed;
use crate::mux_home;
use crate::operation::{Kind, Operation};
use crate::ring::{Event, Handle, Ring};
use crate::shard::{Shard, TimerKind};
use crate::table::NONE;

/// The call-home listener's number among the listeners of a shard.
pub(crate) const LISTENER: u32 = 1;

/// Time for the handshake (§4.7).
const HANDSHAKE_NS: u64 = 10_000_000_000;
/// A handshake is no longer than this.
const HANDSHAKE_BYTES_MAX: u64 = 4096;
/// The largest message of a response; Dynamo knows no limit, we do not buffer without one.
const MESSAGE_BYTES_MAX: u64 = 64 << 20;
/// Messages up to this size wait where they were received until they are whole.
const WAIT_BYTES_MAX: usize = 64 * 1024;
/// Pause after a failed accept.
const ACCEPT_PAUSE_NS: u64 = 100_000_000;

/// Asks for calls home, again and again.
pub(crate) fn arm<R: Ring>(shard: &mut Shard<R>) {
    if let Some(listener) = &shard.client.listener {
        let operation = Operation::new(Kind::Accept, LISTENER, 0);
        shard.ring.accept(operation, listener.as_raw_fd());
    }
}

/// A worker has called home, or the accept has failed.
pub(crate) fn accepted<R: Ring>(shard: &mut Shard<R>, event: Event) {
    let Event::Accepted { socket, more } = event else {
        shard.stats.shard.accept_failures.add(1);
        let at_ns = shard.now_ns + ACCEPT_PAUSE_NS;
        return shard.timer(TimerKind::HomeAccept, 0, 0, at_ns);
    };
    if !more {
        arm(shard);
    }
    let fd = socket.into_raw_fd();
    if shard.connections.is_full() {
        shard.stats.shard.connections_refused.add(1);
        return shard.ring.close(Handle { fd, slot: NONE });
    }
    let Some(slot) = shard.open(fd, Role::End(End::Home(NONE))) else {
        return;
    };
    let generation = shard.connections.generation(slot);
    let until_ns = shard.now_ns + HANDSHAKE_NS;
    let timer = shard.timer_to_cancel(TimerKind::Home, slot, generation, until_ns);
    shard.connections[slot].timer = timer;
    shard.welcome(slot);
}

/// Nobody has said for which call, or nobody takes our last word.
pub(crate) fn overdue<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    shard.connections[slot].timer = None;
    match shard.connections[slot].role {
        Role::End(End::Home(NONE)) => refuse(shard, slot),
        _ => shard.reset(slot),
    }
}

fn refuse<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    shard.stats.shard.homes_refused.add(1);
    let mut front = [0; 3];
    let incoming = &shard.connections[slot].incoming;
    let copied = shard.pieces.copy_out(incoming, 0, &mut front);
    shard.note_stranger(&front[..copied]);
    shard.reset(slot);
}

fn call_of<R: Ring>(shard: &Shard<R>, slot: u32) -> u32 {
    match shard.connections[slot].role {
        Role::End(End::Home(call)) => call,
        _ => NONE,
    }
}

/// Takes all whole messages that are there, as long as whoever called takes events.
pub(crate) fn arrived<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    loop {
        let Some(connection) = shard.connections.get(slot) else {
            return;
        };
        if connection.closing {
            return;
        }
        let call = call_of(shard, slot);
        if call != NONE && !shard.client.has_room_for(call) {
            client::hold_up(shard, call);
            return shard.pause(slot);
        }
        let Some(message) = next_message(shard, slot) else {
            return;
        };
        match (message, call) {
            (Got::Bad(_), NONE) => return refuse(shard, slot),
            (Got::Handshake(subject), NONE) => {
                if !shake(shard, slot, subject) {
                    return;
                }
            }
            (Got::Mux, NONE) => return share(shard, slot),
            (Got::Reader(subject), NONE) => return reads(shard, slot, subject),
            (got, call) => take(shard, call, got),
        }
    }
}

/// Whoever called takes events again.
pub(crate) fn go_on<R: Ring>(shard: &mut Shard<R>, call: u32) {
    let entry = &shard.client.calls[call];
    let slot = entry.home;
    if entry.stream.is_some() {
        return mux_home::go_on(shard, call);
    }
    if slot == NONE {
        return;
    }
    shard.resume(slot);
    arrived(shard, slot);
    finish_if_ended(shard, slot);
}

/// No more bytes will come. A reset says no more than an end of stream: what counts is whether the
/// final marker has come.
pub(crate) fn ended<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    shard.connections[slot].end_of_stream = true;
    arrived(shard, slot);
    finish_if_ended(shard, slot);
}

fn finish_if_ended<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    let Some(connection) = shard.connections.get(slot) else {
        return;
    };
    if !connection.end_of_stream || connection.closing {
        return;
    }
    match call_of(shard, slot) {
        NONE => refuse(shard, slot),
        call if shard.client.calls[call].held_up => {}
        call => end_of_socket(shard, call),
    }
}

/// A send has failed: the worker is gone. What he had sent is taken first.
pub(crate) fn lost<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    let call = call_of(shard, slot);
    if call != NONE {
        shard.client.calls[call].home = NONE;
        end_of_socket(shard, call);
    }
}

/// The socket's end, and what it means for the call (§4.4).
pub(crate) fn end_of_socket<R: Ring>(shard: &mut Shard<R>, call: u32) {
    let entry = &shard.client.calls[call];
    let disconnected = |text| What::Failed(DynamoError::disconnected(text));
    let what = match entry.phase {
        Phase::Final => What::Finished,
        _ if entry.is_ended_early() => What::Stopped,
        Phase::Waiting | Phase::CalledHome => {
            disconnected("Worker disconnected before response stream was established")
        }
        Phase::Items => disconnected("Stream ended before generation completed"),
    };
    client::end(shard, call, what);
}

/// Closes a socket as soon as what was said to the worker has been sent.
pub(crate) fn hang_up<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    let generation = shard.connections.generation(slot);
    let connection = &mut shard.connections[slot];
    if connection.closing {
        return;
    }
    if connection.outgoing.is_empty() {
        return shard.forget(slot);
    }
    connection.role = Role::End(End::Goodbye);
    let until_ns = shard.now_ns + HANDSHAKE_NS;
    let timer = shard.timer_to_cancel(TimerKind::Home, slot, generation, until_ns);
    shard.connections[slot].timer = timer;
}

/// What a message says, owned.
pub(crate) enum Got {
    Handshake(u128),
    Mux,
    Reader(u128),
    Begun,
    Refused(DynamoError),
    Item { data: Option<Vec<u8>>, last: bool },
    BadItem(DynamoError),
    Sentinel,
    Nothing,
    Bad(String),
}

/// The next whole message, taken off the connection. Large ones are copied out as they arrive, and
/// all of them are when few buffers are left: many halves must not hold what one whole needs.
fn next_message<R: Ring>(shard: &mut Shard<R>, slot: u32) -> Option<Got> {
    let stage = stage(shard, slot);
    let may_wait = shard.may_hold();
    let connection = &mut shard.connections[slot];
    if let Intake::Collect { left, .. } = connection.intake {
        return collect(shard, slot, left, stage);
    }
    let there = connection.incoming.bytes();
    if there == 0 || (there < connection.need && may_wait) {
        return None;
    }
    connection.need = 0;
    let mut prefix = [0; TWO_PART_PREFIX_BYTES];
    let copied = shard.pieces.copy_out(&connection.incoming, 0, &mut prefix);
    let message_bytes = match two_part::decode_prefix(&prefix[..copied], Some(stage.bytes_max())) {
        Decoded::Frame(message) => message.frame_bytes(),
        Decoded::Need(bytes) => bytes,
        Decoded::Bad(bad) => return Some(Got::Bad(bad.to_string())),
    };
    if there < message_bytes {
        if may_wait && message_bytes <= WAIT_BYTES_MAX {
            connection.need = message_bytes;
            return None;
        }
        return collect(shard, slot, message_bytes as u64, stage);
    }
    let front = shard.pieces.front(&connection.incoming);
    if let Some(bytes) = front.get(..message_bytes) {
        let got = read(bytes, stage);
        let incoming = &mut connection.incoming;
        shard.pieces.advance(incoming, message_bytes);
        return Some(got);
    }
    let mut bytes = Vec::with_capacity(message_bytes);
    let incoming = &mut connection.incoming;
    shard.pieces.move_out(incoming, message_bytes, &mut bytes);
    Some(read(&bytes, stage))
}

/// Copies out what has come of the `left` bytes that are known to belong to a message.
fn collect<R: Ring>(shard: &mut Shard<R>, slot: u32, left: u64, stage: Stage) -> Option<Got> {
    let connection = &mut shard.connections[slot];
    let mut left = left;
    loop {
        let here = (connection.incoming.bytes() as u64).min(left) as usize;
        let (incoming, collected) = (&mut connection.incoming, &mut connection.collected);
        shard.pieces.move_out(incoming, here, collected);
        left -= here as u64;
        connection.intake = Intake::Collect {
            handler: NONE,
            left,
        };
        if left > 0 {
            return None;
        }
        // It may have been only the prefix that was known to come.
        match two_part::decode(collected, Some(stage.bytes_max())) {
            Decoded::Need(bytes) => left = (bytes - collected.len()) as u64,
            Decoded::Frame(_) | Decoded::Bad(_) => break,
        }
    }
    connection.intake = Intake::Frames;
    let bytes = std::mem::take(&mut connection.collected);
    Some(read(&bytes, stage))
}

/// What may come now.
#[derive(Clone, Copy)]
pub(crate) enum Stage {
    Handshake,
    Prologue,
    Items(PayloadCodec),
}

impl Stage {
    /// The longest message that may.
    pub(crate) fn bytes_max(self) -> u64 {
        match self {
            Stage::Handshake => HANDSHAKE_BYTES_MAX,
            Stage::Prologue | Stage::Items(_) => MESSAGE_BYTES_MAX,
        }
    }
}

fn stage<R: Ring>(shard: &Shard<R>, slot: u32) -> Stage {
    stage_of(shard, call_of(shard, slot))
}

/// What may come for a call now.
pub(crate) fn stage_of<R: Ring>(shard: &Shard<R>, call: u32) -> Stage {
    match shard.client.calls.get(call) {
        None => Stage::Handshake,
        Some(call) if call.phase == Phase::CalledHome => Stage::Prologue,
        Some(call) => Stage::Items(call.codec),
    }
}

/// Reads one whole message.
pub(crate) fn read(bytes: &[u8], stage: Stage) -> Got {
    let message = match two_part::decode(bytes, Some(stage.bytes_max())) {
        Decoded::Frame(message) => message,
        Decoded::Need(_) => return Got::Bad("message cut".into()),
        Decoded::Bad(bad) => return Got::Bad(bad.to_string()),
    };
    let header = &bytes[message.header.clone()];
    match stage {
        Stage::Handshake => read_handshake(header, &message),
        Stage::Prologue => read_prologue(header, &message),
        Stage::Items(codec) => read_item(bytes, &message, codec),
    }
}

fn read_handshake(header: &[u8], message: &Message) -> Got {
    if message.shape() != Shape::Header {
        return Got::Bad("no handshake".into());
    }
    if header == mux::HELLO {
        return Got::Mux;
    }
    match Handshake::decode(header) {
        Ok(handshake) => {
            let digits = handshake.subject.to_cow().replace('-', "");
            match (u128::from_str_radix(&digits, 16), handshake.stream_type) {
                _ if digits.len() != 32 => Got::Bad("the subject is none of ours".into()),
                (Ok(subject), StreamType::Response) => Got::Handshake(subject),
                (Ok(subject), StreamType::Request) => Got::Reader(subject),
                (Err(_), _) => Got::Bad("the subject is none of ours".into()),
            }
        }
        Err(error) => Got::Bad(error.to_string()),
    }
}

/// The second message: what `generate` would return in Dynamo (§4.3).
fn read_prologue(header: &[u8], message: &Message) -> Got {
    let failed = |text: &str| {
        DynamoError::cannot_connect(format!(
            "Worker generate() failed before response stream: {text}"
        ))
    };
    if message.shape() == Shape::Empty {
        return Got::Nothing;
    }
    if message.shape() != Shape::Header {
        let text = "malformed prologue: a data frame came in its place";
        return Got::Refused(failed(text));
    }
    let prologue = match Prologue::decode(header) {
        Ok(prologue) => prologue,
        Err(error) => return Got::Refused(failed(&format!("malformed prologue: {error}"))),
    };
    let Some(text) = prologue.error else {
        return Got::Begun;
    };
    let typed = prologue.typed_error;
    let typed = typed.and_then(|json| item::from_bytes(json, PayloadCodec::Json).ok());
    Got::Refused(match typed {
        Some(error) if keeps_its_kind(&error) => error,
        Some(error) if !error.blocks_migration() => failed(&text.to_cow()).with_cause(error),
        _ => failed(&text.to_cow()),
    })
}

fn keeps_its_kind(error: &DynamoError) -> bool {
    error.class() == Class::InvalidRequest && !error.blocks_migration()
}

fn read_item(bytes: &[u8], message: &Message, codec: PayloadCodec) -> Got {
    match call_home::classify(bytes, message) {
        StreamMessage::Empty => Got::Nothing,
        StreamMessage::Sentinel => Got::Sentinel,
        StreamMessage::Item(body) => {
            let body = &bytes[body];
            match item::decode(body, codec) {
                Ok(found) => Got::Item {
                    data: found.data.map(|range| body[range].to_vec()),
                    last: found.complete_final,
                },
                Err(error) => Got::BadItem(DynamoError::unknown(error.to_string())),
            }
        }
        _ => Got::Bad("the worker sent what a worker does not".into()),
    }
}

/// The call that waits for a worker with this subject, or has ended and owes him that word.
pub(crate) fn expected<R: Ring>(shard: &Shard<R>, subject: u128) -> Option<u32> {
    shard.client.of_subject(subject).filter(|call| {
        let call = &shard.client.calls[*call];
        call.subject == subject && call.phase == Phase::Waiting
    })
}

/// The socket says for which call it is. `false`: it is for none, and gone.
fn shake<R: Ring>(shard: &mut Shard<R>, slot: u32, subject: u128) -> bool {
    let Some(call) = expected(shard, subject) else {
        refuse(shard, slot);
        return false;
    };
    if let Some(timer) = shard.connections[slot].timer.take() {
        shard.timers.cancel(timer);
    }
    if shard.client.calls[call].is_late() {
        let kill = client::settle_late(shard, call);
        say(shard, slot, if kill { &KILL_FRAME } else { &STOP_FRAME });
        hang_up(shard, slot);
        return false;
    }
    shard.connections[slot].role = Role::End(End::Home(call));
    client::called_home(shard, call, slot, None);
    true
}

/// The worker reads the request stream of a call there.
fn reads<R: Ring>(shard: &mut Shard<R>, slot: u32, subject: u128) {
    if let Some(timer) = shard.connections[slot].timer.take() {
        shard.timers.cancel(timer);
    }
    if !feed::begin(shard, slot, subject) {
        refuse(shard, slot);
    }
}

/// The socket is to be shared by many responses.
fn share<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    if let Some(timer) = shard.connections[slot].timer.take() {
        shard.timers.cancel(timer);
    }
    if !mux_home::begin(shard, slot) {
        refuse(shard, slot);
    }
}

/// Writes a control frame to a worker.
pub(crate) fn say<R: Ring>(shard: &mut Shard<R>, slot: u32, frame: &[u8]) {
    let connection = &mut shard.connections[slot];
    connection.outgoing.waiting().extend_from_slice(frame);
    ends::flush(shard, slot);
}

/// A message of a call's response.
pub(crate) fn take<R: Ring>(shard: &mut Shard<R>, call: u32, got: Got) {
    let entry = &mut shard.client.calls[call];
    match got {
        Got::Nothing => {}
        Got::Begun => client::begun(shard, call),
        Got::Refused(error) => client::end(shard, call, What::Failed(error)),
        Got::Item { data, last } => take_item(shard, call, data, last),
        Got::BadItem(error) => {
            entry.has_item = true;
            client::tell(shard, call, What::BadItem(error));
        }
        Got::Sentinel => end_of_socket(shard, call),
        Got::Handshake(_) | Got::Mux | Got::Reader(_) => {
            violated(shard, call, "a second handshake")
        }
        Got::Bad(why) => violated(shard, call, &why),
    }
}

/// The worker does not keep to the protocol: he is told to end, and the call is broken off.
pub(crate) fn violated<R: Ring>(shard: &mut Shard<R>, call: u32, why: &str) {
    client::say(shard, call, &KILL_FRAME);
    let cause = DynamoError::backend_protocol(why);
    let error = DynamoError::disconnected("Stream ended before generation completed");
    client::end(shard, call, What::Failed(error.with_cause(cause)));
}

fn take_item<R: Ring>(shard: &mut Shard<R>, call: u32, data: Option<Vec<u8>>, last: bool) {
    let entry = &mut shard.client.calls[call];
    let late = entry.phase == Phase::Final;
    if last {
        entry.phase = Phase::Final;
    }
    let what = match data {
        _ if late => {
            let text = "Response received after generation ended - this should never happen";
            What::BadItem(DynamoError::unknown(text))
        }
        Some(data) => What::Item(data),
        None if last => return,
        None => {
            let text = "Empty response received - this should never happen";
            What::BadItem(DynamoError::unknown(text))
        }
    };
    entry.has_item = true;
    client::tell(shard, call, what);
}
