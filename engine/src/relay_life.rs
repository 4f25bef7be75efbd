//! What becomes of a relayed response: placed, called home, passed on, tried again, failed, ended.
//!
//! ```text
//! place -> forwarded (the caller is dialled) -> called_home -> pass -> finish -> end
//!   ^          |             |            |                     |
//!   '- retry --+-------------+------------'                     '-> fail (cut off)
//!        '-> fail: the caller is told over his own socket
//! ```

use std::ops::ControlFlow;

use corelane_codec::call_home::{self, SENTINEL_FRAME};
use corelane_codec::control_message::StreamType;
use corelane_codec::error::{DynamoError, Reason};
use corelane_codec::{item, two_part};

use crate::connection::Role;
use crate::in_flight::{Reply, Request};
use crate::load::Work;
use crate::pieces::PieceList;
use crate::relay::{Leg, Phase};
use crate::ring::Ring;
use crate::routed::Ending;
use crate::send_pool::ChunkQueue;
use crate::shard::Shard;
use crate::stats::flight::{Kind, Relayed};
use crate::table::NONE;
use crate::upstream::UpstreamState;
use crate::{
    forward, link, relay_admit, relay_flow, relay_home, relay_time, respond, routed, settle,
};

/// Frames up to this size are copied out of short buffers rather than let go.
const KEPT_BYTES_MAX: usize = 8 * 1024;

pub(crate) fn note<R: Ring>(shard: &mut Shard<R>, relay: u32, what: Relayed) {
    shard.note(Kind::Relayed, what as u32, relay, 0);
    if what != Relayed::Retried {
        let span = shard.relays.table[relay].span;
        routed::turns(shard, span, Ending::Relayed(what));
    }
}

/// A request is about to be queued for an instance. `false`: there is no room for its head.
pub(crate) fn place<R: Ring>(shard: &mut Shard<R>, request: u32, instance: u32) -> bool {
    let entry = &shard.requests[request];
    let (relay, again, work) = (entry.relay, entry.attempts > 0, entry.work);
    if relay == NONE {
        return true;
    }
    if again {
        let mut old = entry.head;
        let Some(new) = relay_admit::renew_head(shard, relay, &old) else {
            return false;
        };
        shard.relays.heads.clear(&mut old);
        shard.requests[request].head = new;
    }
    leave(shard, relay);
    shard.instances[instance].streams += 1;
    shard.instances[instance].work.begin(work);
    let now_ns = shard.now_ns;
    let entry = &mut shard.relays.table[relay];
    entry.instance = instance;
    entry.work = work;
    entry.phase = Phase::Called;
    entry.accepted = false;
    entry.placed_ns = now_ns;
    relay_time::watch(shard, relay);
    true
}

/// The whole request is in the instance's socket: its caller is dialled meanwhile.
pub(crate) fn forwarded<R: Ring>(shard: &mut Shard<R>, relay: u32) {
    if shard.relays.table[relay].caller == NONE && !dial_caller(shard, relay) {
        abandon(shard, relay);
    }
}

fn dial_caller<R: Ring>(shard: &mut Shard<R>, relay: u32) -> bool {
    let entry = &shard.relays.table[relay];
    let (home, quic) = (entry.home, entry.quic.clone());
    let leg = Role::Relay(Leg::Caller(relay));
    let place = (&home, quic.as_deref());
    let dialled = relay_flow::dial_home(shard, place, StreamType::Response, leg);
    let now_ns = shard.now_ns;
    let entry = &mut shard.relays.table[relay];
    entry.caller = dialled.unwrap_or(NONE);
    entry.dialled_ns = now_ns;
    relay_time::watch(shard, relay);
    dialled.is_some()
}

/// The instance has acknowledged.
pub(crate) fn accepted<R: Ring>(shard: &mut Shard<R>, request: u32) {
    let relay = shard.requests[request].relay;
    let now_ns = shard.now_ns;
    let entry = &mut shard.relays.table[relay];
    entry.accepted = true;
    entry.accepted_ns = now_ns;
    let (held, count) = (shard.pieces.buffers.held(), shard.pieces.buffers.count());
    if held > count / 4 {
        compact(shard, request);
    }
    relay_time::watch(shard, relay);
}

/// The worker has called home, which says that it has accepted.
pub(crate) fn called_home<R: Ring>(shard: &mut Shard<R>, relay: u32) {
    let entry = &shard.relays.table[relay];
    let (request, span) = (entry.request, entry.span);
    routed::called_home(shard, span);
    if let Some(entry) = shard.requests.get(request)
        && entry.reply == Reply::Open
    {
        respond::decide(shard, request, Reply::Accepted);
    }
    if shard.relays.table[relay].caller == NONE {
        forwarded(shard, relay);
    }
}

/// From now on the caller gets what comes: nothing can be tried again.
pub(crate) fn pass<R: Ring>(shard: &mut Shard<R>, relay: u32) {
    let entry = &mut shard.relays.table[relay];
    entry.phase = Phase::Passing;
    let span = entry.span;
    // The first item says that the prompt has been computed.
    let prefill_blocks = std::mem::take(&mut entry.work.prefill_blocks);
    if let Some(instance) = shard.instances.get_mut(entry.instance) {
        instance.work.end(Work {
            prefill_blocks,
            ..Work::default()
        });
    }
    routed::responds(shard, span);
    detach(shard, relay);
    relay_time::watch(shard, relay);
}

/// The request is of no use to its relay any more.
fn detach<R: Ring>(shard: &mut Shard<R>, relay: u32) {
    let request = std::mem::replace(&mut shard.relays.table[relay].request, NONE);
    let Some(entry) = shard.requests.get_mut(request) else {
        return;
    };
    routed::leaves(entry, &mut shard.routed);
    entry.relay = NONE;
    entry.detached = true;
    entry.held = false;
    if entry.upstream == NONE || entry.sent {
        shard.pieces.clear(&mut entry.frame);
        shard.relays.heads.clear(&mut entry.head);
    }
    if entry.reply == Reply::Open {
        respond::decide(shard, request, Reply::Accepted);
    }
    settle::end_if_over(shard, request);
}

/// It does not count as its instance's any more.
fn leave<R: Ring>(shard: &mut Shard<R>, relay: u32) {
    let instance = std::mem::replace(&mut shard.relays.table[relay].instance, NONE);
    if instance != NONE {
        let work = std::mem::take(&mut shard.relays.table[relay].work);
        shard.instances[instance].streams -= 1;
        shard.instances[instance].work.end(work);
        link::release_instance(shard, instance);
    }
}

/// The worker's socket goes; he is told that nobody waits.
fn drop_worker<R: Ring>(shard: &mut Shard<R>, relay: u32) {
    drop_feed(shard, relay);
    let worker = std::mem::replace(&mut shard.relays.table[relay].worker, NONE);
    if worker == NONE {
        return;
    }
    match shard.connections[worker].end_of_stream {
        true => shard.forget(worker),
        false => relay_home::hang_up(shard, worker),
    }
}

/// The sockets of the request stream go.
pub(crate) fn drop_feed<R: Ring>(shard: &mut Shard<R>, relay: u32) {
    let Some(entry) = shard.relays.table.get_mut(relay) else {
        return;
    };
    for slot in [&mut entry.fed, &mut entry.feeder].map(|slot| std::mem::replace(slot, NONE)) {
        if slot != NONE {
            shard.forget(slot);
        }
    }
}

/// An attempt has failed before anything was passed on: another instance gets the request, or the
/// caller the error. After the first item: the stream is cut off with the error.
pub(crate) fn retry<R: Ring>(shard: &mut Shard<R>, relay: u32, error: DynamoError) {
    blame(shard, relay);
    if try_again(shard, relay).is_continue() {
        fail(shard, relay, &error);
    }
}

/// Counts a failure of the instance that has the request.
fn blame<R: Ring>(shard: &mut Shard<R>, relay: u32) {
    let instance = shard.relays.table[relay].instance;
    if let Some(instance) = shard.instances.get_mut(instance) {
        instance.failed += 1;
    }
}

/// Another instance gets the request, if that is possible.
fn try_again<R: Ring>(shard: &mut Shard<R>, relay: u32) -> ControlFlow<()> {
    let entry = &shard.relays.table[relay];
    let request = entry.request;
    if entry.passes() || entry.stopped || entry.opened || request == NONE {
        return ControlFlow::Continue(());
    }
    // In the line of answers it keeps its place; only what was sent whole can be there twice.
    let in_line = shard.requests[request].upstream != NONE;
    let stuck = in_line && (shard.requests.is_full() || !shard.requests[request].sent);
    if stuck || !settle::may_retry(shard, request) {
        return ControlFlow::Continue(());
    }
    let Some(instance) = forward::choose(shard, request) else {
        return ControlFlow::Continue(());
    };
    let request = match in_line {
        true => split(shard, relay, request),
        false => request,
    };
    drop_worker(shard, relay);
    let entry = &mut shard.relays.table[relay];
    (entry.ready, entry.left) = (0, 0);
    shard.stats.shard.retried.add(1);
    shard.stats.shard.relays_retried.add(1);
    note(shard, relay, Relayed::Retried);
    forward::enqueue(shard, request, instance);
    ControlFlow::Break(())
}

/// A request that waits for the answer of the instance that failed it leaves a stand-in there.
fn split<R: Ring>(shard: &mut Shard<R>, relay: u32, request: u32) -> u32 {
    let old = &mut shard.requests[request];
    let mut new = Request::new(NONE, old.route, old.received_ns);
    new.hint = old.hint;
    (new.attempts, new.tried) = (old.attempts, old.tried);
    (new.frame_bytes, new.head_bytes) = (old.frame_bytes, old.head_bytes);
    new.frame = std::mem::replace(&mut old.frame, PieceList::EMPTY);
    new.head = std::mem::replace(&mut old.head, ChunkQueue::EMPTY);
    (new.relay, new.span) = (relay, old.span);
    new.reply = Reply::Accepted;
    // Room was looked for before.
    let new = shard.requests.insert(new).unwrap_or(request);
    shard.relays.table[relay].request = request;
    detach(shard, relay);
    shard.relays.table[relay].request = new;
    new
}

/// The worker has said why it cannot. Whether another one is asked (spec/request-plane.md §12).
pub(crate) fn retry_after_error<R: Ring>(
    shard: &mut Shard<R>,
    relay: u32,
    error: &DynamoError,
) -> bool {
    blame(shard, relay);
    if !error.migrates() {
        return false;
    }
    if let Some(instance) = shard.instances.get_mut(shard.relays.table[relay].instance) {
        match error.reason() {
            Reason::WorkerOverloaded => {
                instance.overloaded_until_ns = shard.now_ns + settle::OVERLOADED_NS;
            }
            Reason::WorkerUnavailable | Reason::EngineShutdown => {
                instance.inhibited_until_ns = shard.now_ns + settle::INHIBITED_NS;
            }
            _ => {}
        }
    }
    try_again(shard, relay).is_break()
}

/// No instance is left, or none may be tried: the caller is told over the socket on which he
/// expects the response.
pub(crate) fn fail<R: Ring>(shard: &mut Shard<R>, relay: u32, error: &DynamoError) {
    let entry = &shard.relays.table[relay];
    let (passing, greeted) = (entry.passes(), entry.greeted);
    keep_rest(shard, relay);
    drop_worker(shard, relay);
    detach(shard, relay);
    leave(shard, relay);
    let mut words = Vec::with_capacity(1024);
    let what = match passing {
        true => {
            shard.stats.shard.relays_cut.add(1);
            Relayed::Cut
        }
        false => {
            shard.stats.shard.relays_failed.add(1);
            Relayed::Failed
        }
    };
    note(shard, relay, what);
    let entry = &mut shard.relays.table[relay];
    if greeted {
        // Who reads other items than Dynamo's, or half of one, is told by the end itself: he
        // makes the same error of it (§4.4).
        if entry.left == 0 && entry.annotated && !entry.stopped {
            item::write_error_frame(error, entry.codec, &mut words);
            words.extend_from_slice(call_home::final_marker_frame(entry.codec));
            words.extend_from_slice(&SENTINEL_FRAME);
        }
    } else if !passing {
        call_home::write_prologue_error(error.text(), Some(&error.to_json()), &mut words);
        words.extend_from_slice(&SENTINEL_FRAME);
    }
    let put = shard.pool.push_all(&mut entry.tail, &words);
    if !put {
        shard.pool.clear(&mut entry.tail);
    }
    let said = put && !words.is_empty();
    close(
        shard,
        relay,
        if said { Phase::Closing } else { Phase::Cutting },
    );
    if shard.relays.table[relay].caller == NONE && !dial_caller(shard, relay) {
        shard.stats.shard.callers_untold.add(1);
        end(shard, relay);
    }
}

/// What of the worker's bytes is the caller's outlives the worker's socket.
fn keep_rest<R: Ring>(shard: &mut Shard<R>, relay: u32) {
    let entry = &mut shard.relays.table[relay];
    if let Some(connection) = shard.connections.get_mut(entry.worker) {
        entry.rest = std::mem::replace(&mut connection.incoming, PieceList::EMPTY);
    }
    if !entry.passes() {
        entry.ready = 0;
    }
    if entry.ready == 0 {
        shard.pieces.clear(&mut entry.rest);
    }
}

fn close<R: Ring>(shard: &mut Shard<R>, relay: u32, phase: Phase) {
    let now_ns = shard.now_ns;
    let entry = &mut shard.relays.table[relay];
    entry.phase = phase;
    entry.taken_ns = now_ns;
    relay_time::watch(shard, relay);
    relay_flow::soil(shard, relay);
}

/// The worker's sentinel has come: it is done.
pub(crate) fn finish<R: Ring>(shard: &mut Shard<R>, relay: u32) {
    keep_rest(shard, relay);
    let worker = std::mem::replace(&mut shard.relays.table[relay].worker, NONE);
    shard.forget(worker);
    over(shard, relay, Phase::Closing);
}

fn over<R: Ring>(shard: &mut Shard<R>, relay: u32, phase: Phase) {
    drop_feed(shard, relay);
    detach(shard, relay);
    leave(shard, relay);
    shard.stats.shard.relays_finished.add(1);
    note(shard, relay, Relayed::Finished);
    close(shard, relay, phase);
}

/// The worker's socket has come to its end without a sentinel.
pub(crate) fn worker_ended<R: Ring>(shard: &mut Shard<R>, relay: u32) {
    let entry = &shard.relays.table[relay];
    if !entry.passes() {
        let text = "Worker disconnected before response stream was established";
        return match entry.stopped {
            true => abandon(shard, relay),
            false => retry(shard, relay, DynamoError::disconnected(text)),
        };
    }
    if entry.is_final && entry.left == 0 || entry.stopped {
        keep_rest(shard, relay);
        let worker = std::mem::replace(&mut shard.relays.table[relay].worker, NONE);
        shard.forget(worker);
        return over(shard, relay, Phase::Cutting);
    }
    let text = "the worker went away in the middle of its response";
    fail(shard, relay, &DynamoError::disconnected(text));
}

/// All that there is for the caller has been sent.
pub(crate) fn all_sent<R: Ring>(shard: &mut Shard<R>, relay: u32) {
    if shard.relays.table[relay].phase == Phase::Cutting {
        end(shard, relay);
    }
}

/// The caller is gone, cannot be dialled, or has said that he wants nothing more.
pub(crate) fn abandon<R: Ring>(shard: &mut Shard<R>, relay: u32) {
    shard.stats.shard.relays_abandoned.add(1);
    note(shard, relay, Relayed::Abandoned);
    end(shard, relay);
}

/// The caller's socket is gone.
pub(crate) fn caller_lost<R: Ring>(shard: &mut Shard<R>, relay: u32) {
    let Some(entry) = shard.relays.table.get_mut(relay) else {
        return;
    };
    entry.caller = NONE;
    match entry.is_over() {
        true => end(shard, relay),
        false => abandon(shard, relay),
    }
}

/// Frees a relay and all that it holds.
pub(crate) fn end<R: Ring>(shard: &mut Shard<R>, relay: u32) {
    drop_worker(shard, relay);
    detach(shard, relay);
    leave(shard, relay);
    let Some(mut entry) = shard.relays.table.remove(relay) else {
        return;
    };
    shard.pieces.clear(&mut entry.rest);
    shard.pool.clear(&mut entry.tail);
    if let Some(timer) = entry.timer {
        shard.timers.cancel(timer);
    }
    if entry.caller != NONE {
        shard.forget(entry.caller);
    }
    routed::end(shard, entry.span);
}

/// The connection to a worker is lost, which had acknowledged requests and not called home.
pub(crate) fn upstream_lost<R: Ring>(shard: &mut Shard<R>, upstream: u32) {
    let waits = |relay: &u32| {
        let entry = &shard.relays.table[*relay];
        let instance = shard.instances.get(entry.instance);
        let behind = instance.is_some_and(|instance| instance.upstream == upstream);
        entry.phase == Phase::Called && entry.accepted && behind
    };
    let waiting: Vec<u32> = shard.relays.table.slots().filter(waits).collect();
    for relay in waiting {
        let text = "the worker died before it began to respond";
        retry(shard, relay, DynamoError::disconnected(text));
    }
}

/// Discovery has dropped instances: who still waits for a prologue of theirs is better off with
/// another one. Where there is none, only the connection says whether the worker is dead.
pub(crate) fn directory_changed<R: Ring>(shard: &mut Shard<R>) {
    let waits = |relay: &u32| {
        let entry = &shard.relays.table[*relay];
        let gone = shard.instances.get(entry.instance);
        entry.phase <= Phase::Prologue && gone.is_some_and(|instance| instance.gone)
    };
    let waiting: Vec<u32> = shard.relays.table.slots().filter(waits).collect();
    for relay in waiting {
        let entry = &shard.relays.table[relay];
        let upstream = shard.instances[entry.instance].upstream;
        let open = shard.upstreams[upstream].state == UpstreamState::Open;
        let called = entry.phase == Phase::Prologue;
        if try_again(shard, relay).is_continue() && !open && !called {
            let text = "the worker is gone from discovery and cannot be reached";
            fail(shard, relay, &DynamoError::disconnected(text));
        }
    }
}

/// Buffers are short: frames that are only kept for another try give theirs back.
pub(crate) fn let_go<R: Ring>(shard: &mut Shard<R>) {
    let requests = shard.relays.table.slots();
    let requests: Vec<u32> = requests
        .map(|relay| shard.relays.table[relay].request)
        .filter(|request| *request != NONE)
        .collect();
    for request in requests {
        compact(shard, request);
        let entry = &mut shard.requests[request];
        if entry.upstream == NONE && entry.held && !entry.frame.is_empty() {
            entry.held = false;
            shard.pieces.clear(&mut entry.frame);
            shard.stats.shard.relays_let_go.add(1);
        }
    }
}

/// Copies a small frame that nobody reads now to where its head is.
fn compact<R: Ring>(shard: &mut Shard<R>, request: u32) {
    let entry = &mut shard.requests[request];
    let bytes = entry.frame.bytes();
    let scarce = shard.relays.heads.free_chunks() < shard.relays.table.capacity() / 2;
    let whole = bytes as u64 == entry.frame_bytes && entry.dropped_bytes == 0;
    if entry.upstream != NONE || bytes == 0 || bytes > KEPT_BYTES_MAX || scarce || !whole {
        return;
    }
    let mut head = std::mem::take(&mut shard.relays.head);
    head.clear();
    head.resize(bytes, 0);
    shard.pieces.copy_out(&entry.frame, 0, &mut head);
    if shard.relays.heads.push_all(&mut entry.head, &head) {
        entry.head_bytes += bytes as u32;
        entry.frame_bytes = 0;
        shard.pieces.clear(&mut entry.frame);
    }
    shard.relays.head = head;
}

const _: () = assert!(two_part::prefix(0, 0).len() == 24);
