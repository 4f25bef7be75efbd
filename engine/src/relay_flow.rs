//! What a worker responds is passed on to the caller as it comes.
//!
//! ```text
//! the worker's socket   [ ready: looked at ....... | not yet ]      bytes stay where they came
//!                          |
//! the caller's socket   [handshake, prologue] [ready] [what we say ourselves at the end]
//! ```
//!
//! Only the fixed parts of messages are looked at, to know where items begin and end. What waits
//! leaves in one send. A caller who falls behind holds his worker back.

use corelane_codec::call_home::{
    self, FINAL_MARKER_JSON, FINAL_MARKER_MSGPACK, PROLOGUE_OK, Prologue, SENTINEL, StreamMessage,
};
use corelane_codec::control_message::{PayloadCodec, StreamType};
use corelane_codec::error::DynamoError;
use corelane_codec::limits::TWO_PART_PREFIX_BYTES;
use corelane_codec::two_part::{self, Message, Shape};
use corelane_codec::{Decoded, item};

use crate::connection::Role;
use crate::operation::Kind;
use crate::pieces::PieceList;
use crate::quic::QuicCaller;
use crate::relay::{Home, Leg, Phase};
use crate::ring::{Ring, SPANS_MAX, Span};
use crate::shard::Shard;
use crate::stats::flight::Relayed;
use crate::table::NONE;
use crate::{relay_control, relay_home, relay_life, routed};

/// A worker is not read from while so much of a stream waits for its caller; half of it lets him
/// go on.
pub(crate) const QUEUE_BYTES_MAX: usize = 256 * 1024;
/// The same while buffers are short.
const QUEUE_BYTES_SHORT: usize = 16 * 1024;
/// Items up to this size are passed on whole, so that a stream can be ended between two; larger
/// ones as they come.
const WHOLE_BYTES_MAX: usize = 64 * 1024;
/// A prologue, or another header, is no longer than this.
const HEADER_BYTES_MAX: usize = 64 * 1024;
/// Items up to this size are looked into once, for their type.
const LOOK_BYTES_MAX: usize = 2048;

/// So many bytes of a stream may wait now before their sender is not read from.
pub(crate) fn queue_bytes_max<R: Ring>(shard: &Shard<R>) -> usize {
    match shard.may_hold() {
        true => QUEUE_BYTES_MAX,
        false => QUEUE_BYTES_SHORT,
    }
}

/// Dials a caller for one of his streams; the handshake waits for the connect. `None`: it cannot
/// be dialled.
pub(crate) fn dial_home<R: Ring>(
    shard: &mut Shard<R>,
    (home, quic): (&Home, Option<&QuicCaller>),
    stream: StreamType,
    role: Role,
) -> Option<u32> {
    let dialled = match quic {
        Some(caller) => shard.dial_quic(caller, role),
        None => shard.dial(&home.address, role),
    };
    let slot = dialled.ok()?;
    let mut handshake = std::mem::take(&mut shard.relays.head);
    handshake.clear();
    call_home::write_handshake(home.subject(), stream, &mut handshake);
    let mut out = shard.connections[slot].out;
    let put = shard.pool.push_all(&mut out, &handshake);
    shard.relays.head = handshake;
    shard.connections[slot].out = out;
    if !put {
        shard.forget(slot);
    } else if quic.is_some() {
        // Nothing is to be waited for.
        shard.established(slot);
    }
    put.then_some(slot)
}

/// The connect has succeeded.
pub(crate) fn connected<R: Ring>(shard: &mut Shard<R>, slot: u32, leg: Leg) {
    match leg {
        Leg::Caller(relay) => soil(shard, relay),
        Leg::Feeder(_) => shard.soil(slot),
        Leg::Stranger | Leg::Worker(_) | Leg::Fed(_) | Leg::Goodbye => {}
    }
}

/// Bytes have arrived.
pub(crate) fn consume<R: Ring>(shard: &mut Shard<R>, slot: u32, leg: Leg) {
    match leg {
        Leg::Stranger => relay_home::arrived(shard, slot),
        Leg::Worker(relay) => arrived(shard, slot, relay),
        Leg::Caller(relay) => relay_control::said(shard, slot, relay),
        Leg::Feeder(relay) => relay_control::feed(shard, relay),
        Leg::Fed(_) | Leg::Goodbye => {
            let incoming = &mut shard.connections[slot].incoming;
            shard.pieces.clear(incoming);
        }
    }
}

/// No more bytes will arrive: the peer's end of stream (errno 0), or a failure.
pub(crate) fn ended<R: Ring>(shard: &mut Shard<R>, slot: u32, leg: Leg, errno: i32) {
    match leg {
        Leg::Stranger => relay_home::refuse(shard, slot),
        Leg::Worker(relay) => {
            shard.connections[slot].end_of_stream = true;
            relay_life::worker_ended(shard, relay);
        }
        Leg::Caller(relay) if errno == 0 => relay_control::half_closed(shard, slot, relay),
        Leg::Feeder(relay) if errno == 0 => relay_control::feeder_ended(shard, slot, relay),
        // A worker shuts its own direction of this socket at once (§5).
        Leg::Fed(_) if errno == 0 => shard.connections[slot].end_of_stream = true,
        Leg::Caller(_) | Leg::Feeder(_) | Leg::Fed(_) | Leg::Goodbye => shard.lost(slot, errno),
    }
}

/// The connection is gone; it has been closed already.
pub(crate) fn lost<R: Ring>(shard: &mut Shard<R>, leg: Leg) {
    match leg {
        Leg::Stranger => shard.relays.strangers -= 1,
        Leg::Worker(relay) => relay_life::worker_ended(shard, relay),
        Leg::Caller(relay) => relay_life::caller_lost(shard, relay),
        Leg::Feeder(relay) | Leg::Fed(relay) => relay_life::drop_feed(shard, relay),
        Leg::Goodbye => {}
    }
}

/// The socket took `bytes` bytes.
pub(crate) fn sent<R: Ring>(shard: &mut Shard<R>, slot: u32, leg: Leg, bytes: usize) {
    match leg {
        Leg::Caller(relay) => taken(shard, slot, relay, bytes),
        Leg::Fed(relay) => relay_control::fed(shard, relay, bytes),
        Leg::Stranger | Leg::Worker(_) | Leg::Feeder(_) | Leg::Goodbye => {
            let mut out = shard.connections[slot].out;
            shard.pool.sent(&mut out, bytes);
            shard.connections[slot].out = out;
            match leg {
                Leg::Goodbye => relay_home::goodbye_sent(shard, slot),
                _ if out.is_empty() => {}
                _ => shard.soil(slot),
            }
        }
    }
}

/// At the end of a tick: who was early is looked at again, and callers get what waits for them.
pub(crate) fn flush_all<R: Ring>(shard: &mut Shard<R>) {
    shard.come_home_late();
    let mut relays = std::mem::take(&mut shard.relays.dirty);
    for relay in relays.drain(..) {
        flush(shard, relay);
    }
    // One that has ended may have given others something to say.
    relays.append(&mut shard.relays.dirty);
    shard.relays.dirty = relays;
}

/// Notes that a relay has something for its caller.
pub(crate) fn soil<R: Ring>(shard: &mut Shard<R>, relay: u32) {
    if let Some(entry) = shard.relays.table.get_mut(relay)
        && !entry.dirty
    {
        entry.dirty = true;
        shard.relays.dirty.push(relay);
    }
}

/// What a look at a worker's bytes has led to.
enum Step {
    /// To the next message.
    On,
    /// Its rest has not come.
    Wait,
    /// To the end of this socket.
    Gone,
}

/// The worker has said something.
pub(crate) fn arrived<R: Ring>(shard: &mut Shard<R>, slot: u32, relay: u32) {
    let now_ns = shard.now_ns;
    let entry = &mut shard.relays.table[relay];
    entry.said_ns = now_ns;
    if entry.ready == 0 {
        entry.taken_ns = now_ns;
    }
    loop {
        match step(shard, slot, relay) {
            Step::On => {}
            Step::Wait => break,
            Step::Gone => return,
        }
    }
    let entry = &shard.relays.table[relay];
    let (ready, passes) = (entry.ready, entry.passes());
    if ready > queue_bytes_max(shard) {
        shard.pause(slot);
    }
    if passes && ready > 0 {
        soil(shard, relay);
    }
}

/// Looks at the next message of a worker, or takes more of a large item.
fn step<R: Ring>(shard: &mut Shard<R>, slot: u32, relay: u32) -> Step {
    let incoming = shard.connections[slot].incoming;
    let entry = &mut shard.relays.table[relay];
    let there = incoming.bytes() - entry.ready;
    if there == 0 {
        return Step::Wait;
    }
    if entry.left > 0 {
        let here = entry.left.min(there as u64);
        entry.ready += here as usize;
        entry.left -= here;
        return Step::On;
    }
    let mut prefix = [0; TWO_PART_PREFIX_BYTES];
    let copied = shard.pieces.copy_out(&incoming, entry.ready, &mut prefix);
    let message = match two_part::decode_prefix(&prefix[..copied], None) {
        Decoded::Frame(message) => message,
        Decoded::Need(_) => return Step::Wait,
        Decoded::Bad(bad) => return violated(shard, relay, &bad.to_string()),
    };
    match (message.shape(), entry.phase) {
        (Shape::Empty, _) => {
            // Means nothing; at the front it is not worth a buffer.
            if entry.ready == 0 {
                let incoming = &mut shard.connections[slot].incoming;
                shard.pieces.advance(incoming, TWO_PART_PREFIX_BYTES);
            } else {
                entry.ready += TWO_PART_PREFIX_BYTES;
            }
            Step::On
        }
        (Shape::Header, _) => header(shard, slot, relay, &message, there),
        (Shape::Data, Phase::First | Phase::Passing) => item(shard, slot, relay, &message, there),
        (Shape::Data, _) => malformed(shard, relay, "a data frame came in its place"),
        (Shape::Both, _) => violated(shard, relay, "a message has a header and data"),
    }
}

/// A message without data: the prologue, or the sentinel.
fn header<R: Ring>(
    shard: &mut Shard<R>,
    slot: u32,
    relay: u32,
    message: &Message,
    there: usize,
) -> Step {
    let bytes = message.frame_bytes();
    if bytes > HEADER_BYTES_MAX {
        return violated(shard, relay, "a header is too long");
    }
    if there < bytes {
        return Step::Wait;
    }
    let ready = shard.relays.table[relay].ready;
    let mut header = std::mem::take(&mut shard.relays.envelope);
    header.clear();
    header.resize(message.header.len(), 0);
    let incoming = shard.connections[slot].incoming;
    let offset = ready + TWO_PART_PREFIX_BYTES;
    shard.pieces.copy_out(&incoming, offset, &mut header);
    let step = match shard.relays.table[relay].phase {
        Phase::Prologue if header == *PROLOGUE_OK => begun(shard, slot, relay, bytes),
        Phase::Prologue => prologue(shard, slot, relay, &header, bytes),
        _ => sentinel(shard, relay, &header, bytes),
    };
    shard.relays.envelope = header;
    step
}

/// The response begins. The caller gets the same prologue from us, and only once: without it he
/// would take our leaving discovery for the end of his request (spec/request-plane.md §4.9).
fn begun<R: Ring>(shard: &mut Shard<R>, slot: u32, relay: u32, bytes: usize) -> Step {
    let incoming = &mut shard.connections[slot].incoming;
    shard.pieces.advance(incoming, bytes);
    shard.relays.table[relay].phase = Phase::First;
    if greet(shard, relay) {
        soil(shard, relay);
    }
    Step::On
}

fn prologue<R: Ring>(
    shard: &mut Shard<R>,
    slot: u32,
    relay: u32,
    header: &[u8],
    bytes: usize,
) -> Step {
    let prologue = match Prologue::decode(header) {
        Ok(prologue) => prologue,
        Err(error) => return malformed(shard, relay, &error.to_string()),
    };
    if prologue.is_ok() {
        return begun(shard, slot, relay, bytes);
    }
    let typed = prologue.typed_error;
    let typed = typed.and_then(|json| item::from_bytes(json, PayloadCodec::Json).ok());
    if let Some(error) = &typed
        && relay_life::retry_after_error(shard, relay, error)
    {
        return Step::Gone;
    }
    if shard.relays.table[relay].greeted {
        let text = prologue.error.map(|text| text.to_cow().into_owned());
        let error = typed.unwrap_or_else(|| DynamoError::unknown(text.unwrap_or_default()));
        relay_life::fail(shard, relay, &error);
        return Step::Gone;
    }
    // The worker's own words are the caller's answer.
    shard.relays.table[relay].ready += bytes;
    relay_life::pass(shard, relay);
    shard.stats.shard.relays_failed.add(1);
    relay_life::note(shard, relay, Relayed::Failed);
    Step::On
}

/// What stock clients make of it (spec/request-plane.md §4.3).
fn malformed<R: Ring>(shard: &mut Shard<R>, relay: u32, why: &str) -> Step {
    shard.stats.shard.protocol_errors.add(1);
    let text =
        format!("Worker generate() failed before response stream: malformed prologue: {why}");
    relay_life::retry(shard, relay, DynamoError::cannot_connect(text));
    Step::Gone
}

/// The worker does not keep to the protocol: another one if that is possible, else the end.
fn violated<R: Ring>(shard: &mut Shard<R>, relay: u32, why: &str) -> Step {
    shard.stats.shard.protocol_errors.add(1);
    let cause = DynamoError::backend_protocol(why);
    let error = DynamoError::disconnected("the worker does not keep to the protocol");
    relay_life::retry(shard, relay, error.with_cause(cause));
    Step::Gone
}

fn sentinel<R: Ring>(shard: &mut Shard<R>, relay: u32, header: &[u8], bytes: usize) -> Step {
    if header != SENTINEL && !is_sentinel(header) {
        return violated(shard, relay, "a header is not the sentinel");
    }
    let entry = &mut shard.relays.table[relay];
    if entry.passes() {
        entry.ready += bytes;
        relay_life::finish(shard, relay);
    } else {
        let text = "Stream ended before generation completed";
        relay_life::retry(shard, relay, DynamoError::disconnected(text));
    }
    Step::Gone
}

/// The same word written in another way.
fn is_sentinel(header: &[u8]) -> bool {
    let mut whole = Vec::new();
    two_part::write(header, b"", &mut whole);
    let message = two_part::decode(&whole, None).frame();
    message.is_some_and(|message| {
        matches!(
            call_home::classify(&whole, &message),
            StreamMessage::Sentinel
        )
    })
}

/// An item, or the final marker.
fn item<R: Ring>(
    shard: &mut Shard<R>,
    slot: u32,
    relay: u32,
    message: &Message,
    there: usize,
) -> Step {
    let bytes = message.frame_bytes();
    if there < bytes && bytes <= WHOLE_BYTES_MAX && shard.may_hold() {
        return Step::Wait;
    }
    let first = shard.relays.table[relay].phase == Phase::First;
    let is_final = look(shard, slot, relay, message, there);
    if first {
        if !greet(shard, relay) {
            relay_life::abandon(shard, relay);
            return Step::Gone;
        }
        relay_life::pass(shard, relay);
    }
    let now_ns = shard.now_ns;
    let entry = &mut shard.relays.table[relay];
    entry.is_final |= is_final;
    if !is_final {
        if let Some(stats) = shard.stats.routes.get(entry.route as usize) {
            match entry.item_ns {
                0 => stats.first_item.record(now_ns - entry.received_ns),
                before => stats.inter_item.record(now_ns - before),
            }
        }
        entry.item_ns = now_ns;
    }
    let here = there.min(bytes);
    entry.ready += here;
    entry.left = (bytes - here) as u64;
    Step::On
}

/// Whether an item is the final marker. The first one of a stream shows what its items are.
fn look<R: Ring>(
    shard: &mut Shard<R>,
    slot: u32,
    relay: u32,
    message: &Message,
    there: usize,
) -> bool {
    let bytes = message.body.len();
    let entry = &mut shard.relays.table[relay];
    let marker: &[u8] = match entry.codec {
        PayloadCodec::Json => FINAL_MARKER_JSON,
        PayloadCodec::MessagePack => FINAL_MARKER_MSGPACK,
    };
    let look = entry.phase == Phase::First && bytes <= LOOK_BYTES_MAX || bytes == marker.len();
    if !look || there < message.frame_bytes() {
        entry.annotated &= entry.phase != Phase::First;
        return false;
    }
    let mut body = [0; LOOK_BYTES_MAX];
    let body = &mut body[..bytes];
    let incoming = shard.connections[slot].incoming;
    let offset = entry.ready + TWO_PART_PREFIX_BYTES;
    shard.pieces.copy_out(&incoming, offset, body);
    if body == marker {
        return true;
    }
    if entry.phase == Phase::First {
        let found = item::decode(body, entry.codec).ok();
        let data = found.as_ref().and_then(|found| found.data.clone());
        entry.annotated = data.is_some_and(|data| item::is_annotated(&body[data], entry.codec));
        return found.is_some_and(|found| found.complete_final);
    }
    false
}

/// The prologue goes behind the handshake, if it has not. `false`: there is no room for it now.
fn greet<R: Ring>(shard: &mut Shard<R>, relay: u32) -> bool {
    let caller = shard.relays.table[relay].caller;
    if shard.relays.table[relay].greeted {
        return true;
    }
    let Some(connection) = shard.connections.get_mut(caller) else {
        return false;
    };
    let mut out = connection.out;
    let put = shard.pool.push(&mut out, &call_home::PROLOGUE_OK_FRAME);
    shard.connections[caller].out = out;
    shard.relays.table[relay].greeted = put;
    put
}

/// Where the bytes of a relay's worker lie.
fn list<R: Ring>(shard: &Shard<R>, relay: u32) -> PieceList {
    let entry = &shard.relays.table[relay];
    match shard.connections.get(entry.worker) {
        Some(connection) => connection.incoming,
        None => entry.rest,
    }
}

/// Starts one send of what waits for the caller.
fn flush<R: Ring>(shard: &mut Shard<R>, relay: u32) {
    let Some(entry) = shard.relays.table.get_mut(relay) else {
        return;
    };
    entry.dirty = false;
    let slot = entry.caller;
    let Some(connection) = shard.connections.get(slot) else {
        return;
    };
    if connection.sending || connection.closing || connection.connecting {
        return;
    }
    let (out, entry) = (connection.out, &shard.relays.table[relay]);
    let mut spans = [Span::of(&[]); SPANS_MAX];
    let mut count = 0;
    let mut put = |bytes: &[u8]| {
        let room = count < SPANS_MAX;
        if room {
            spans[count] = Span::of(bytes);
            count += 1;
        }
        room
    };
    let mut whole = shard.pool.unsent(&out).all(&mut put);
    if entry.passes() && whole {
        let mut left = entry.ready;
        for piece in shard.pieces.iter(&list(shard, relay)) {
            let bytes = shard.pieces.bytes_of(piece);
            let here = bytes.len().min(left);
            if here == 0 || !put(&bytes[..here]) {
                break;
            }
            left -= here;
        }
        whole = left == 0;
    }
    if entry.is_over() && whole {
        whole = shard.pool.unsent(&entry.tail).all(&mut put);
    }
    if count == 0 {
        return relay_life::all_sent(shard, relay);
    }
    // A send whose completion lets nobody go on need not wake us.
    let paused = shard.connections.get(entry.worker);
    let waits = !whole || entry.is_over() || paused.is_some_and(|worker| worker.paused);
    let kind = if waits { Kind::Send } else { Kind::Reply };
    shard.send_as(kind, slot, &spans[..count]);
}

/// The caller's socket took `bytes` bytes.
fn taken<R: Ring>(shard: &mut Shard<R>, slot: u32, relay: u32, bytes: usize) {
    let mut out = shard.connections[slot].out;
    let of_out = shard.pool.unsent_bytes(&out).min(bytes);
    shard.pool.sent(&mut out, of_out);
    shard.connections[slot].out = out;
    let entry = &mut shard.relays.table[relay];
    entry.taken_ns = shard.now_ns;
    let of_list = entry.ready.min(bytes - of_out);
    let list = match shard.connections.get_mut(entry.worker) {
        Some(connection) => &mut connection.incoming,
        None => &mut entry.rest,
    };
    shard.pieces.advance(list, of_list);
    entry.ready -= of_list;
    shard.pool.sent(&mut entry.tail, bytes - of_out - of_list);
    let (worker, ready, span) = (entry.worker, entry.ready, entry.span);
    routed::taken(shard, span, bytes - of_out);
    if worker != NONE && ready <= QUEUE_BYTES_MAX / 2 {
        shard.resume(worker);
    }
    let entry = &shard.relays.table[relay];
    if entry.ready > 0 && entry.passes()
        || entry.is_over()
        || !shard.connections[slot].out.is_empty()
    {
        soil(shard, relay);
    }
}
