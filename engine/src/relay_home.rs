//! Workers call home to the router: each with one socket for one stream of one request
//! (spec/request-plane.md §4.7, §5).

use std::os::fd::{AsRawFd, IntoRawFd};

use corelane_codec::Decoded;
use corelane_codec::call_home::{Handshake, KILL_FRAME};
use corelane_codec::control_message::StreamType;
use corelane_codec::limits::TWO_PART_PREFIX_BYTES;
use corelane_codec::two_part::{self, Shape};

use crate::connection::Role;
use crate::operation::{Kind, Operation};
use crate::quic::WELCOME;
use crate::relay::{Leg, Phase, TICKET_BYTES};
use crate::ring::{Event, Handle, Ring};
use crate::shard::{Shard, TimerKind};
use crate::table::NONE;
use crate::{relay_control, relay_flow, relay_life};

/// The number of the routers' call-home listener among the listeners of a shard.
pub(crate) const LISTENER: u32 = 2;

/// Time for the handshake, and for a last word to be taken.
const HANDSHAKE_NS: u64 = 10_000_000_000;
/// A handshake is no longer than this.
const HANDSHAKE_BYTES_MAX: usize = 1024;
/// Pause after a failed accept.
const ACCEPT_PAUSE_NS: u64 = 100_000_000;

/// Asks for calls home, again and again.
pub(crate) fn arm<R: Ring>(shard: &mut Shard<R>) {
    if let Some(listener) = &shard.relays.listener {
        let operation = Operation::new(Kind::Accept, LISTENER, 0);
        shard.ring.accept(operation, listener.as_raw_fd());
    }
}

/// A worker has called, or the accept has failed.
pub(crate) fn accepted<R: Ring>(shard: &mut Shard<R>, event: Event) {
    let Event::Accepted { socket, more } = event else {
        shard.stats.shard.accept_failures.add(1);
        let at_ns = shard.now_ns + ACCEPT_PAUSE_NS;
        return shard.timer(TimerKind::RelayAccept, 0, 0, at_ns);
    };
    if !more {
        arm(shard);
    }
    let fd = socket.into_raw_fd();
    // Nobody calls who was not asked to; a few more may, who were given up meanwhile.
    let strangers_max = 2 * shard.relays.table.used() + 64;
    if shard.connections.is_full() || shard.relays.strangers >= strangers_max {
        shard.stats.shard.connections_refused.add(1);
        return shard.ring.close(Handle { fd, slot: NONE });
    }
    let Some(slot) = shard.open(fd, Role::Relay(Leg::Stranger)) else {
        return;
    };
    shard.relays.strangers += 1;
    watch(shard, slot);
    shard.welcome(slot);
}

/// The socket has so long for what it owes.
fn watch<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    let generation = shard.connections.generation(slot);
    let until_ns = shard.now_ns + HANDSHAKE_NS;
    let timer = shard.timer_to_cancel(TimerKind::RelayHome, slot, generation, until_ns);
    shard.connections[slot].timer = timer;
}

/// A stranger has not said whom he calls for, or nobody takes our last word.
pub(crate) fn overdue<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    shard.connections[slot].timer = None;
    match shard.connections[slot].role {
        Role::Relay(Leg::Stranger) => refuse(shard, slot),
        _ => shard.reset(slot),
    }
}

/// A stranger goes: reset, so that he notices at once.
pub(crate) fn refuse<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    shard.stats.shard.homes_refused.add(1);
    known(shard, slot, Leg::Goodbye);
    shard.reset(slot);
}

/// He is no stranger any more.
fn known<R: Ring>(shard: &mut Shard<R>, slot: u32, leg: Leg) {
    shard.relays.strangers -= 1;
    shard.connections[slot].role = Role::Relay(leg);
    if let Some(timer) = shard.connections[slot].timer.take() {
        shard.timers.cancel(timer);
    }
}

/// A stranger has said something.
pub(crate) fn arrived<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    let mut bytes = [0; HANDSHAKE_BYTES_MAX];
    let incoming = shard.connections[slot].incoming;
    let copied = shard.pieces.copy_out(&incoming, 0, &mut bytes);
    let bytes = &bytes[..copied];
    let found = match two_part::decode(bytes, Some(HANDSHAKE_BYTES_MAX as u64)) {
        Decoded::Need(_) => return,
        Decoded::Bad(_) => None,
        Decoded::Frame(message) if message.shape() == Shape::Header => {
            let handshake = Handshake::decode(&bytes[message.header.clone()]).ok();
            let mut subject = [0; TICKET_BYTES];
            handshake.and_then(|handshake| {
                let subject = handshake.subject.unescape_into(&mut subject).ok()?;
                let stream = handshake.stream_type;
                let relay = shard.relays.of_ticket(subject, stream)?;
                Some((relay, stream, message.frame_bytes()))
            })
        }
        Decoded::Frame(_) => None,
    };
    let Some((relay, stream, handshake_bytes)) =
        found.filter(|found| is_due(shard, found.0, found.1))
    else {
        return refuse(shard, slot);
    };
    let incoming = &mut shard.connections[slot].incoming;
    shard.pieces.advance(incoming, handshake_bytes);
    match stream {
        StreamType::Response => {
            known(shard, slot, Leg::Worker(relay));
            let entry = &mut shard.relays.table[relay];
            (entry.worker, entry.phase) = (slot, Phase::Prologue);
            relay_life::called_home(shard, relay);
            // His caller may have been given up just now.
            if shard.connections[slot].role == Role::Relay(Leg::Worker(relay)) {
                relay_flow::arrived(shard, slot, relay);
            }
        }
        StreamType::Request => {
            known(shard, slot, Leg::Fed(relay));
            shard.relays.table[relay].fed = slot;
            relay_control::open_feed(shard, relay);
        }
    }
}

/// The relay whose worker is waited for under this registration on QUIC, and whether we know that
/// it has the request: its answer comes by another way than that word, and may overtake it.
pub(crate) fn expected<R: Ring>(shard: &Shard<R>, registration: u128) -> Option<(u32, bool)> {
    let relay = shard.relays.of_number(registration, StreamType::Response)?;
    let entry = &shard.relays.table[relay];
    let waits = entry.phase == Phase::Called;
    waits.then(|| (relay, is_whole(shard, entry.request)))
}

/// Whether a frame is not on its way any more: nobody can have understood a part of it.
fn is_whole<R: Ring>(shard: &Shard<R>, request: u32) -> bool {
    match shard.requests.get(request) {
        Some(request) => request.upstream == NONE || request.sent,
        None => true,
    }
}

/// Its worker has called, and is told so. What he says will be received.
pub(crate) fn welcome<R: Ring>(shard: &mut Shard<R>, slot: u32, relay: u32) {
    let entry = &mut shard.relays.table[relay];
    (entry.worker, entry.phase) = (slot, Phase::Prologue);
    let mut out = shard.connections[slot].out;
    if !shard.pool.push(&mut out, &WELCOME) {
        // He takes the end for what it is.
        return shard.lost(slot, libc::ENOBUFS);
    }
    shard.connections[slot].out = out;
    shard.soil(slot);
    relay_life::called_home(shard, relay);
}

/// Whether such a call is waited for: none has come with this ticket before.
fn is_due<R: Ring>(shard: &Shard<R>, relay: u32, stream: StreamType) -> bool {
    let entry = &shard.relays.table[relay];
    match stream {
        StreamType::Response => entry.phase == Phase::Called && is_whole(shard, entry.request),
        StreamType::Request => {
            let waits = entry.fed == NONE && entry.feed.is_some();
            waits && !entry.is_over() && is_whole(shard, entry.request)
        }
    }
}

/// A worker is told that nobody waits for him, and its socket is closed when he has been.
pub(crate) fn hang_up<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    let connection = &mut shard.connections[slot];
    if connection.closing {
        return;
    }
    let mut out = connection.out;
    connection.role = Role::Relay(Leg::Goodbye);
    shard.pieces.clear(&mut connection.incoming);
    if !shard.pool.push(&mut out, &KILL_FRAME) {
        // The reset says the same.
        return shard.reset(slot);
    }
    shard.connections[slot].out = out;
    shard.soil(slot);
    watch(shard, slot);
}

/// The last word has been taken, or a part of it.
pub(crate) fn goodbye_sent<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    match shard.connections[slot].out.is_empty() {
        true => shard.forget(slot),
        false => shard.soil(slot),
    }
}

const _: () = assert!(HANDSHAKE_BYTES_MAX > TWO_PART_PREFIX_BYTES);
