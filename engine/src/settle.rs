//! What becomes of a request once it was forwarded: the instance's answer, another instance, a
//! refusal, or a call home.
//!
//! ```text
//! answered -> settled                        accepted: nobody needs the frame any more
//!          -> refused -> another instance    as long as the frame is kept
//! lost     -> replace -> another instance
//!                     -> fail                refusal, or a call home when acknowledged already
//! ```

use corelane_codec::reply_frame::Reply as Answer;

use crate::connection::Intake;
use crate::in_flight::Reply;
use crate::ledger::ENVELOPE_BYTES_MAX;
use crate::relay::Phase;
use crate::respond::{self, Refusal};
use crate::ring::Ring;
use crate::shard::Shard;
use crate::stats::flight::{Answered, Kind, Why};
use crate::table::NONE;
use crate::{forward, link, relay_life, routed, tell};

/// An instance that said that it is overloaded gets nothing for so long (as in Dynamo's router,
/// spec/request-plane.md §11.4).
pub(crate) const OVERLOADED_NS: u64 = 1_000_000_000;
/// The same for one that is gone or does not answer.
pub(crate) const INHIBITED_NS: u64 = 5_000_000_000;

/// The instance has answered its oldest request. Returns whether the upstream can be read on.
pub(crate) fn answered<R: Ring>(shard: &mut Shard<R>, upstream: u32, answer: Answer<'_>) -> bool {
    let link = &mut shard.upstreams[upstream];
    let (request, slot) = (link.queue.head, link.connection);
    if request == NONE || !shard.requests[request].sent {
        // An answer to nothing, or before the end of the request: the order cannot be trusted.
        shard.stats.shard.protocol_errors.add(1);
        shard.lost(slot, libc::EBADMSG);
        return false;
    }
    unlink_head(shard, upstream);
    let entry = &shard.requests[request];
    let instance = entry.instance;
    let (took_ns, span, detached) = (shard.now_ns - entry.sent_ns, entry.span, entry.detached);
    shard.stats.answer.record(took_ns);
    let said = match &answer {
        Answer::Accepted => Answered::Accepted,
        Answer::Overloaded(_) => Answered::Overloaded,
        Answer::Unavailable(_) => Answered::Unavailable,
        Answer::Other(_) => Answered::Other,
    };
    shard.note(Kind::Answered, said as u32, request, took_ns);
    routed::answered(shard, span, said);
    if said != Answered::Accepted {
        shard.instances[instance].failed += 1;
    }
    match answer {
        // Whoever waited for it knows more already.
        _ if detached => end_if_over(shard, request),
        Answer::Accepted => {
            shard.stats.shard.accepted_upstream.add(1);
            shard.instances[instance].answered += 1;
            if shard.requests[request].held {
                note_caller(shard, request);
            }
            settle(shard, request, Reply::Accepted);
        }
        Answer::Overloaded(text) => {
            shard.instances[instance].overloaded_until_ns = shard.now_ns + OVERLOADED_NS;
            refused(shard, request, text.as_bytes(), tell::Cause::AllOverloaded);
        }
        Answer::Unavailable(text) => {
            shard.instances[instance].inhibited_until_ns = shard.now_ns + INHIBITED_NS;
            refused(shard, request, text.as_bytes(), tell::Cause::NoInstance);
        }
        Answer::Other(text) => {
            shard.stats.shard.protocol_errors.add(1);
            give_up(shard, request, text, tell::Cause::Protocol);
        }
    }
    link::release_instance(shard, instance);
    true
}

/// Takes the oldest request off an upstream.
fn unlink_head<R: Ring>(shard: &mut Shard<R>, upstream: u32) {
    let link = &mut shard.upstreams[upstream];
    let request = link.queue.head;
    let entry = &mut shard.requests[request];
    link.queue.head = entry.next_upstream;
    link.queue.len -= 1;
    if link.queue.head == NONE {
        link.queue.tail = NONE;
    }
    entry.upstream = NONE;
    entry.next_upstream = NONE;
    shard.instances[entry.instance].unanswered -= 1;
}

/// The request is with an instance for good.
fn settle<R: Ring>(shard: &mut Shard<R>, request: u32, reply: Reply) {
    let entry = &mut shard.requests[request];
    if entry.relay == NONE {
        shard.pieces.clear(&mut entry.frame);
    } else {
        relay_life::accepted(shard, request);
    }
    let entry = &mut shard.requests[request];
    if entry.reply == Reply::Open {
        respond::decide(shard, request, reply);
    }
    end_if_over(shard, request);
}

/// The instance will not do it: another one, or its words for the caller.
fn refused<R: Ring>(shard: &mut Shard<R>, request: u32, text: &[u8], cause: tell::Cause) {
    if may_retry(shard, request)
        && let Some(instance) = forward::choose(shard, request)
    {
        shard.stats.shard.retried.add(1);
        return forward::enqueue(shard, request, instance);
    }
    shard.stats.shard.refused_by_instances.add(1);
    let why = match cause {
        tell::Cause::AllOverloaded => Why::AllOverloaded,
        _ => Why::NoInstance,
    };
    shard.note_refused(request, why);
    give_up(shard, request, text, cause);
}

fn give_up<R: Ring>(shard: &mut Shard<R>, request: u32, text: &[u8], cause: tell::Cause) {
    if shard.requests[request].reply == Reply::Open {
        let relay = shard.requests[request].relay;
        respond::decide_text(shard, request, text);
        dismiss(shard, relay);
    } else {
        tell_caller(shard, request, cause);
    }
    if let Some(entry) = shard.requests.get_mut(request) {
        shard.pieces.clear(&mut entry.frame);
        end_if_over(shard, request);
    }
}

/// A caller who was refused expects no response.
fn dismiss<R: Ring>(shard: &mut Shard<R>, relay: u32) {
    if relay != NONE {
        relay_life::end(shard, relay);
    }
}

pub(crate) fn may_retry<R: Ring>(shard: &Shard<R>, request: u32) -> bool {
    let entry = &shard.requests[request];
    let route = &shard.directory.routes[entry.route as usize];
    entry.held && entry.attempts <= route.retries_max
}

/// The connection that a request was given to is gone: another instance, or failure.
pub(crate) fn replace<R: Ring>(shard: &mut Shard<R>, request: u32, refusal: Refusal<'static>) {
    let entry = &mut shard.requests[request];
    let instance = entry.instance;
    entry.upstream = NONE;
    entry.next_upstream = NONE;
    shard.instances[instance].unanswered -= 1;
    if entry.detached || has_called(shard, request) {
        // The worker's own socket says what becomes of it.
        settle(shard, request, Reply::Accepted);
        return link::release_instance(shard, instance);
    }
    shard.requests[request].sent = false;
    shard.instances[instance].failed += 1;
    if may_retry(shard, request)
        && let Some(next) = forward::choose(shard, request)
    {
        shard.stats.shard.retried.add(1);
        forward::enqueue(shard, request, next);
    } else {
        fail(shard, request, refusal);
    }
    link::release_instance(shard, instance);
}

/// Whether the worker of a relayed request has called home, which says more than any answer.
fn has_called<R: Ring>(shard: &Shard<R>, request: u32) -> bool {
    let relay = shard.relays.table.get(shard.requests[request].relay);
    relay.is_some_and(|relay| relay.phase > Phase::Called)
}

/// Nobody can be found for a request: its caller gets a refusal, or is called home with an error
/// if he was told already that all is well.
pub(crate) fn fail<R: Ring>(shard: &mut Shard<R>, request: u32, refusal: Refusal<'static>) {
    let held_back = stop_streaming(shard, request);
    if shard.requests[request].reply == Reply::Open {
        let relay = shard.requests[request].relay;
        respond::refuse_request(shard, request, refusal);
        dismiss(shard, relay);
    } else {
        shard.stats.shard.refused_by_instances.add(1);
        shard.note_refused(request, refusal.why());
        tell_caller(shard, request, tell::Cause::of(refusal));
    }
    if let Some(entry) = shard.requests.get_mut(request) {
        shard.pieces.clear(&mut entry.frame);
        end_if_over(shard, request);
    }
    if let Some(slot) = held_back
        && shard.connections.get(slot).is_some()
    {
        respond::resume_if_ready(shard, slot);
    }
}

/// The rest of a large frame has nowhere to go. Returns its connection if that is held back: it
/// can go on when all is said about this request.
fn stop_streaming<R: Ring>(shard: &mut Shard<R>, request: u32) -> Option<u32> {
    let entry = &mut shard.requests[request];
    if !entry.streaming {
        return None;
    }
    entry.streaming = false;
    let downstream = entry.downstream;
    let connection = shard.connections.get_mut(downstream)?;
    if let Intake::Stream {
        request: streamed,
        left,
    } = connection.intake
        && streamed == request
    {
        connection.intake = Intake::Discard { left };
        return connection.paused.then_some(downstream);
    }
    None
}

/// The sender of a large frame went away in the middle of it. The connection that carries it can
/// carry nothing else any more.
pub(crate) fn abort<R: Ring>(shard: &mut Shard<R>, request: u32) {
    let entry = &mut shard.requests[request];
    entry.streaming = false;
    entry.held = false;
    let upstream = entry.upstream;
    if entry.reply == Reply::Open && entry.downstream == NONE {
        entry.reply = Reply::Accepted;
    }
    if upstream == NONE {
        return end_if_over(shard, request);
    }
    let slot = shard.upstreams[upstream].connection;
    if slot == NONE {
        link::lost(shard, upstream, libc::ECONNABORTED);
    } else {
        shard.lost(slot, libc::ECONNABORTED);
    }
}

/// Frees a request that nobody waits for and nothing is under way for.
pub(crate) fn end_if_over<R: Ring>(shard: &mut Shard<R>, request: u32) {
    let Some(entry) = shard.requests.get_mut(request) else {
        return;
    };
    if entry.upstream != NONE || entry.downstream != NONE || entry.streaming {
        return;
    }
    if entry.relay != NONE {
        return;
    }
    shard.pieces.clear(&mut entry.frame);
    shard.relays.heads.clear(&mut entry.head);
    let reply = entry.reply;
    routed::end_of_request(shard, request);
    shard.requests.remove(request);
    if let Reply::Text(chunk) = reply
        && chunk != NONE
    {
        shard.pool.free(chunk);
    }
}

/// Bytes of the envelope's front: its prefix and its control message (spec/request-plane.md §3.1).
/// 0 when they are not all there, or too many.
fn envelope_bytes<R: Ring>(shard: &Shard<R>, request: u32) -> usize {
    let entry = &shard.requests[request];
    let mut length = [0; 8];
    let offset = entry.payload_offset as usize;
    if entry.dropped_bytes > 0
        || shard.pieces.copy_out(&entry.frame, offset, &mut length) < length.len()
    {
        return 0;
    }
    let bytes = u64::from_be_bytes(length).saturating_add(24);
    let there = (entry.frame.bytes() - offset) as u64;
    if bytes <= there.min(ENVELOPE_BYTES_MAX as u64) {
        bytes as usize
    } else {
        0
    }
}

/// Remembers the caller of a request in case its instance dies.
pub(crate) fn note_caller<R: Ring>(shard: &mut Shard<R>, request: u32) {
    if shard.requests[request].relay != NONE || shard.requests[request].detached {
        return;
    }
    let bytes = envelope_bytes(shard, request);
    let entry = &shard.requests[request];
    if bytes > 0 && entry.instance != NONE {
        // A bulk upstream comes and goes; what dies is the instance.
        let upstream = shard.instances[entry.instance].upstream;
        let key = link::ledger_key(shard, upstream);
        let note = shard.ledger.note(key, shard.now_ns, bytes);
        shard
            .pieces
            .copy_out(&entry.frame, entry.payload_offset as usize, note);
    }
}

fn tell_caller<R: Ring>(shard: &mut Shard<R>, request: u32, cause: tell::Cause) {
    let relay = shard.requests[request].relay;
    if relay != NONE {
        return relay_life::fail(shard, relay, &cause.error());
    }
    let mut envelope = [0; ENVELOPE_BYTES_MAX];
    let envelope = &mut envelope[..envelope_bytes(shard, request)];
    let entry = &shard.requests[request];
    shard
        .pieces
        .copy_out(&entry.frame, entry.payload_offset as usize, envelope);
    tell::tell(shard, envelope, cause);
}
