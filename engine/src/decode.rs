//! Frames are found in what a caller has sent.
//!
//! The path and the headers are looked at where they lie; when a buffer boundary cuts through them
//! they are looked at in a copy, and what is forwarded is still the original. The payload is never
//! looked at.

use corelane_codec::limits::REQUEST_PREFIX_BYTES_MAX;
use corelane_codec::path::parse_instance_hex;
use corelane_codec::request_frame::{self, Prefix};
use corelane_codec::{Decoded, TooLarge, headers};

use crate::connection::Intake;
use crate::directory::Policy;
use crate::ledger::ENVELOPE_BYTES_MAX;
use crate::respond::{self, Refusal};
use crate::ring::Ring;
use crate::route::hash_hint;
use crate::shard::Shard;
use crate::stats::flight::Why;
use crate::{adopt, forward, lane, recv, relay_admit, routed, tell, worker};

/// Room for the longest prefix, and for the front of a payload behind it.
pub(crate) const SCRATCH_BYTES: usize = REQUEST_PREFIX_BYTES_MAX + ENVELOPE_BYTES_MAX;

/// Frames up to this size are forwarded when they are whole; larger ones are cut through, on a
/// connection of their own, once so much of them has arrived.
pub(crate) const WHOLE_BYTES_MAX: u64 = 64 * 1024;

/// Takes all frames that are there.
pub(crate) fn requests<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    loop {
        let Some(connection) = shard.connections.get_mut(slot) else {
            return;
        };
        let there = connection.incoming.bytes();
        if connection.closing || there == 0 {
            return;
        }
        let goes_on = match connection.intake {
            Intake::Discard { left } => discard(shard, slot, left),
            Intake::Stream { request, left } => {
                let taken = (there as u64).min(left);
                connection.streamed += taken;
                forward::extend(shard, slot, request, taken as usize)
            }
            Intake::Lane { lane, job, left } => lane::fill(shard, slot, lane, job, left),
            Intake::Collect { handler, left } => worker::collect(shard, slot, handler, left),
            Intake::Frames => there >= connection.need && frame(shard, slot),
        };
        if !goes_on {
            return;
        }
    }
}

fn discard<R: Ring>(shard: &mut Shard<R>, slot: u32, left: u64) -> bool {
    let connection = &mut shard.connections[slot];
    let here = (connection.incoming.bytes() as u64).min(left);
    connection.streamed += here;
    shard
        .pieces
        .advance(&mut connection.incoming, here as usize);
    let left = left - here;
    connection.intake = if left == 0 {
        Intake::Frames
    } else {
        Intake::Discard { left }
    };
    left == 0
}

/// Looks at the front of the incoming bytes. Returns whether it makes sense to look again.
fn frame<R: Ring>(shard: &mut Shard<R>, slot: u32) -> bool {
    let incoming = shard.connections[slot].incoming;
    let front = shard.pieces.front(&incoming);
    match request_frame::decode_prefix(front) {
        Decoded::Frame(prefix) => {
            let route = shard.find(&front[prefix.path.clone()]);
            let hint = route.map_or(0, |route| {
                hint(shard, route, &front[prefix.headers.clone()])
            });
            take(shard, slot, &prefix, route, hint)
        }
        Decoded::Need(bytes) if bytes <= incoming.bytes() => frame_in_copy(shard, slot),
        Decoded::Need(_) if adopt::is_tls(front) => {
            let front: [u8; 3] = [front[0], front[1], front[2]];
            shard.note_stranger(&front);
            shard.lost(slot, libc::EBADMSG);
            false
        }
        Decoded::Need(bytes) => {
            shard.connections[slot].need = bytes;
            false
        }
        // A prefix has no wrong form; this keeps the match whole.
        Decoded::Bad(_) => {
            shard.lost(slot, libc::EBADMSG);
            false
        }
    }
}

/// The same when a buffer boundary cuts through the prefix.
fn frame_in_copy<R: Ring>(shard: &mut Shard<R>, slot: u32) -> bool {
    let incoming = shard.connections[slot].incoming;
    let mut scratch = std::mem::take(&mut shard.scratch);
    let copied = shard
        .pieces
        .copy_out(&incoming, 0, &mut scratch[..REQUEST_PREFIX_BYTES_MAX]);
    let decoded = request_frame::decode_prefix(&scratch[..copied]);
    let goes_on = match decoded {
        Decoded::Frame(prefix) => {
            let route = shard.find(&scratch[prefix.path.clone()]);
            let headers = &scratch[prefix.headers.clone()];
            let hint = route.map_or(0, |route| hint(shard, route, headers));
            shard.scratch = scratch;
            return take(shard, slot, &prefix, route, hint);
        }
        Decoded::Need(bytes) => {
            shard.connections[slot].need = bytes;
            false
        }
        Decoded::Bad(_) => {
            shard.lost(slot, libc::EBADMSG);
            false
        }
    };
    shard.scratch = scratch;
    goes_on
}

/// What the route's policy wants to know of the headers; 0 for nothing.
pub(crate) fn hint<R: Ring>(shard: &Shard<R>, route: u32, headers: &[u8]) -> u64 {
    if route & worker::LOCAL != 0 {
        return 0;
    }
    let route = &shard.directory.routes[route as usize];
    if !matches!(route.policy, Policy::Direct | Policy::Hash) {
        return 0;
    }
    let Some(value) = headers::find(headers, &route.header) else {
        return 0;
    };
    match route.policy {
        Policy::Direct => {
            let mut buffer = [0; 32];
            value
                .unescape_into(&mut buffer)
                .ok()
                .and_then(parse_instance_hex)
                .unwrap_or(0)
        }
        _ => hash_hint(value.raw().as_bytes()),
    }
}

/// The prefix is there. Refuses the frame, waits for more of it, or makes a request of it.
fn take<R: Ring>(
    shard: &mut Shard<R>,
    slot: u32,
    prefix: &Prefix,
    route: Option<u32>,
    hint: u64,
) -> bool {
    let route = match route {
        Some(route) if !shard.draining => route,
        _ => return refuse_path(shard, slot, prefix),
    };
    if let Err(error) = request_frame::check_size(prefix, shard.config.message_bytes_max) {
        return refuse_size(shard, slot, prefix, error);
    }
    let is_lane = route & worker::LOCAL == 0 && shard.directory.routes[route as usize].lane;
    shard.connections[slot].careful = is_lane;
    if is_lane {
        return lane::take(shard, slot, prefix, route, hint);
    }
    if route & worker::LOCAL != 0 {
        return worker::take(shard, slot, prefix, route & !worker::LOCAL);
    }
    if shard.directory.routes[route as usize].relay.is_some() {
        return relay_admit::take(shard, slot, prefix, route, hint);
    }
    let frame_bytes = prefix.frame_bytes();
    let wanted = frame_bytes.min(WHOLE_BYTES_MAX) as usize;
    if shard.connections[slot].incoming.bytes() < wanted {
        shard.connections[slot].need = wanted;
        return false;
    }
    let pieces = wanted / shard.pieces.buffers.buffer_bytes() + 3 + shard.pieces.buffers.count();
    if shard.requests.is_full() || shard.pieces.available() < pieces {
        return refuse(shard, slot, prefix, Refusal::TableFull);
    }
    forward::begin(shard, slot, prefix, route, hint);
    true
}

fn refuse_path<R: Ring>(shard: &mut Shard<R>, slot: u32, prefix: &Prefix) -> bool {
    let incoming = shard.connections[slot].incoming;
    let mut path = [0; respond::ECHO_BYTES_MAX];
    let echoed = prefix.path.len().min(path.len());
    let there = shard
        .pieces
        .copy_out(&incoming, prefix.path.start, &mut path[..echoed]);
    let whole = prefix.path.len() == there;
    match std::str::from_utf8(&path[..there]) {
        Ok(path) => refuse(shard, slot, prefix, Refusal::UnknownEndpoint { path }),
        // Cut in the middle of a character: the longest part that is text.
        Err(error) if !whole && error.error_len().is_none() => {
            let text = std::str::from_utf8(&path[..error.valid_up_to()]).unwrap_or("");
            refuse(shard, slot, prefix, Refusal::UnknownEndpoint { path: text })
        }
        Err(_) => refuse(shard, slot, prefix, Refusal::BadPath),
    }
}

/// Queues a refusal and lets the frame's bytes pass by. When not even the refusal can be queued,
/// the connection waits for one of its replies to leave.
pub(crate) fn refuse<R: Ring>(
    shard: &mut Shard<R>,
    slot: u32,
    prefix: &Prefix,
    refusal: Refusal<'_>,
) -> bool {
    if !respond::refuse(shard, slot, refusal) {
        recv::crowd(shard, slot);
        return false;
    }
    routed::refused(shard, slot, prefix, refusal.why());
    skip(shard, slot, prefix.frame_bytes());
    true
}

/// A frame over the limit. Its caller would take a refusal on this connection for our death, or
/// for success (spec/request-plane.md §2.5), so he is told over his call-home address if the front
/// of the payload, which is waited for, says where that is.
fn refuse_size<R: Ring>(shard: &mut Shard<R>, slot: u32, prefix: &Prefix, error: TooLarge) -> bool {
    let front = (prefix.payload_bytes as usize).min(ENVELOPE_BYTES_MAX);
    let wanted = prefix.prefix_bytes + front;
    let incoming = shard.connections[slot].incoming;
    if incoming.bytes() < wanted {
        shard.connections[slot].need = wanted;
        return false;
    }
    let mut envelope = [0; ENVELOPE_BYTES_MAX];
    let envelope = &mut envelope[..front];
    shard
        .pieces
        .copy_out(&incoming, prefix.prefix_bytes, envelope);
    if tell::can_reach(envelope) {
        if !respond::accept(shard, slot) {
            recv::crowd(shard, slot);
            return false;
        }
        shard.stats.shard.refused_frame_too_large.add(1);
        shard.note_refused_frame(slot, Why::FrameTooLarge);
        routed::refused(shard, slot, prefix, Why::FrameTooLarge);
        tell::tell(shard, envelope, tell::Cause::TooLarge(error));
        skip(shard, slot, prefix.frame_bytes());
        return true;
    }
    refuse(shard, slot, prefix, Refusal::TooLarge(error))
}

/// Lets the bytes of a frame pass by.
pub(crate) fn skip<R: Ring>(shard: &mut Shard<R>, slot: u32, frame_bytes: u64) {
    let connection = &mut shard.connections[slot];
    connection.need = 0;
    connection.frames += 1;
    connection.intake = Intake::Discard { left: frame_bytes };
}
