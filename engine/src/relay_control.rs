//! What goes from a caller to a worker: stop and kill, and the request stream of a bidirectional
//! call (spec/request-plane.md §4.6, §5).

use corelane_codec::Decoded;
use corelane_codec::call_home::{self, STOP_FRAME, StreamMessage};
use corelane_codec::control_message::StreamType;
use corelane_codec::two_part;

use crate::connection::Role;
use crate::relay::{Leg, Phase};
use crate::ring::{Ring, SPANS_MAX, Span};
use crate::shard::Shard;
use crate::table::NONE;
use crate::{relay_flow, relay_life};

/// No control message that we know is longer.
const CONTROL_BYTES_MAX: usize = 256;

/// The caller has said something on the response's socket.
pub(crate) fn said<R: Ring>(shard: &mut Shard<R>, slot: u32, relay: u32) {
    loop {
        let incoming = &mut shard.connections[slot].incoming;
        if shard.relays.table[relay].is_over() {
            // Too late to matter.
            return shard.pieces.clear(incoming);
        }
        let mut bytes = [0; CONTROL_BYTES_MAX];
        let copied = shard.pieces.copy_out(incoming, 0, &mut bytes);
        let bytes = &bytes[..copied];
        let message = match two_part::decode(bytes, Some(CONTROL_BYTES_MAX as u64)) {
            Decoded::Frame(message) => message,
            Decoded::Need(_) => return,
            Decoded::Bad(_) => return relay_life::abandon(shard, relay),
        };
        match call_home::classify(bytes, &message) {
            StreamMessage::Empty => shard.pieces.advance(incoming, message.frame_bytes()),
            StreamMessage::Stop => {
                shard.pieces.advance(incoming, message.frame_bytes());
                if !stop(shard, relay) {
                    return;
                }
            }
            _ => return relay_life::abandon(shard, relay),
        }
    }
}

/// The caller wants no more items. `false`: the relay is over.
fn stop<R: Ring>(shard: &mut Shard<R>, relay: u32) -> bool {
    let entry = &mut shard.relays.table[relay];
    if std::mem::replace(&mut entry.stopped, true) {
        return true;
    }
    let worker = entry.worker;
    if entry.phase == Phase::Called || worker == NONE {
        // Whoever calls now finds nobody, which he takes for a kill.
        relay_life::abandon(shard, relay);
        return false;
    }
    let mut out = shard.connections[worker].out;
    if !shard.pool.push(&mut out, &STOP_FRAME) {
        relay_life::abandon(shard, relay);
        return false;
    }
    shard.connections[worker].out = out;
    shard.soil(worker);
    true
}

/// The caller's end of stream on the response's socket. After a stop it means that he is gone;
/// without one it means nothing: he may have closed only his own direction (§4.6).
pub(crate) fn half_closed<R: Ring>(shard: &mut Shard<R>, slot: u32, relay: u32) {
    shard.connections[slot].end_of_stream = true;
    let entry = &shard.relays.table[relay];
    if entry.is_over() {
        return shard.lost(slot, 0);
    }
    if entry.stopped && !entry.passes() {
        // `generate` has returned at the caller, with nothing. The worker has been told.
        relay_life::abandon(shard, relay);
    }
}

/// The worker has dialled for the request stream: the caller is dialled for it.
pub(crate) fn open_feed<R: Ring>(shard: &mut Shard<R>, relay: u32) {
    let entry = &mut shard.relays.table[relay];
    entry.opened = true;
    let Some(home) = entry.feed.as_deref().copied() else {
        return;
    };
    let fed = entry.fed;
    let handle = shard.connections[fed].handle;
    shard.ring.keep_sent(handle);
    let leg = Role::Relay(Leg::Feeder(relay));
    let dialled = relay_flow::dial_home(shard, (&home, None), StreamType::Request, leg);
    match dialled {
        Some(slot) => shard.relays.table[relay].feeder = slot,
        None => relay_life::abandon(shard, relay),
    }
}

/// Items of the request stream have come from the caller, or the worker has taken some.
pub(crate) fn feed<R: Ring>(shard: &mut Shard<R>, relay: u32) {
    let entry = &shard.relays.table[relay];
    let (feeder, fed) = (entry.feeder, entry.fed);
    if feeder == NONE || fed == NONE {
        return;
    }
    let waiting = shard.connections[feeder].incoming;
    let over = shard.connections[feeder].end_of_stream;
    if waiting.bytes() > relay_flow::queue_bytes_max(shard) {
        shard.pause(feeder);
    } else if !over && waiting.bytes() <= relay_flow::QUEUE_BYTES_MAX / 2 {
        shard.resume(feeder);
    }
    let connection = &shard.connections[fed];
    if connection.sending || connection.closing {
        return;
    }
    if waiting.is_empty() {
        if over {
            // All is said: what the worker has not taken the kernel gives it.
            shard.relays.table[relay].fed = NONE;
            shard.relays.table[relay].feeder = NONE;
            shard.forget(fed);
            shard.forget(feeder);
        }
        return;
    }
    let mut spans = [Span::of(&[]); SPANS_MAX];
    let mut count = 0;
    for (span, piece) in spans.iter_mut().zip(shard.pieces.iter(&waiting)) {
        *span = Span::of(shard.pieces.bytes_of(piece));
        count += 1;
    }
    shard.relays.table[relay].fed_ns = shard.now_ns;
    shard.send(fed, &spans[..count]);
}

/// The worker's socket took `bytes` bytes of the request stream.
pub(crate) fn fed<R: Ring>(shard: &mut Shard<R>, relay: u32, bytes: usize) {
    let feeder = shard.relays.table[relay].feeder;
    if let Some(connection) = shard.connections.get_mut(feeder) {
        shard.pieces.advance(&mut connection.incoming, bytes);
    }
    feed(shard, relay);
}

/// No more items will come from the caller.
pub(crate) fn feeder_ended<R: Ring>(shard: &mut Shard<R>, slot: u32, relay: u32) {
    shard.connections[slot].end_of_stream = true;
    feed(shard, relay);
}
