//! Requests go to an instance: its path before the untouched rest of the frame, gathered with all
//! others that leave in the same tick.
//!
//! ```text
//! frame as it came    [u16 P][path][u16 H][headers][u32 N][payload]
//! frame as it leaves  [u16 P'][instance's path]  +  [u16 H][headers][u32 N][payload]
//!                      constant of the instance      pieces of receive buffers, not moved
//! ```
//!
//! A frame is kept until the instance has answered, so that it can be given to another one.

use std::net::SocketAddr;

use corelane_codec::request_frame::Prefix;

use crate::connection::Intake;
use crate::directory::{Ack, LoadSource, Policy};
use crate::in_flight::{Reply, Request};
use crate::load::Work;
use crate::respond::{self, Refusal};
use crate::ring::{Ring, SPANS_MAX, Span};
use crate::route::Candidates;
use crate::shard::{Shard, TimerKind};
use crate::stats::flight::Kind;
use crate::table::{NONE, Table};
use crate::upstream::{InstanceState, Upstream, UpstreamState};
use crate::weigh::{Barrier, Seen};
use crate::{collect, kv, link, recv, relay_life, routed, settle};

/// Bytes gathered into one send: enough to fill a socket buffer, not so much that the first
/// answer waits.
const SEND_BYTES_MAX: usize = 256 * 1024;
/// A large frame whose instance does not keep up stops its sender at this backlog, and lets him go
/// on at half of it.
const BACKLOG_BYTES_MAX: u64 = 1 << 20;

/// Makes a request of the frame at the front of a connection, and places it.
pub(crate) fn begin<R: Ring>(
    shard: &mut Shard<R>,
    slot: u32,
    prefix: &Prefix,
    route: u32,
    hint: u64,
) {
    let mut request = Request::new(slot, route, shard.now_ns);
    request.hint = hint;
    request.frame_bytes = prefix.frame_bytes() - prefix.path.end as u64;
    request.payload_offset = (prefix.prefix_bytes - prefix.path.end) as u32;
    kv::read_headers(shard, slot, prefix, route);
    request.span = routed::begin(shard, slot, prefix, route);
    enter(shard, slot, request, prefix.path.end);
}

/// Places a request whose frame begins `skip` bytes from the front of its connection.
pub(crate) fn enter<R: Ring>(shard: &mut Shard<R>, slot: u32, mut request: Request, skip: usize) {
    let connection = &mut shard.connections[slot];
    connection.need = 0;
    connection.frames += 1;
    shard.pieces.advance(&mut connection.incoming, skip);
    let here = request.frame_bytes.min(connection.incoming.bytes() as u64);
    let whole = shard
        .pieces
        .split(&mut connection.incoming, &mut request.frame, here as usize);
    debug_assert!(whole, "room in the table was checked");
    let left = request.frame_bytes - here;
    request.streaming = left > 0;
    shard.stats.shard.requests.add(1);
    let (relay, route, bytes) = (request.relay, request.route, request.frame_bytes);
    match shard.requests.insert(request) {
        Ok(request) => {
            let of = u64::from(slot) << 32 | bytes.min(u32::MAX.into());
            shard.note(Kind::Begun, route, request, of);
            if let Some(relay) = shard.relays.table.get_mut(relay) {
                relay.request = request;
            }
            if left > 0 {
                shard.connections[slot].intake = Intake::Stream { request, left };
            }
            respond::owe(shard, slot, request);
            kv::read_body(shard, request);
            place(shard, request);
            kv::placed(shard);
        }
        // Room was looked for before.
        Err(mut request) => {
            shard.pieces.clear(&mut request.frame);
            routed::end(shard, request.span);
        }
    }
}

/// More of a large frame has arrived. Returns whether it is complete.
pub(crate) fn extend<R: Ring>(shard: &mut Shard<R>, slot: u32, request: u32, bytes: usize) -> bool {
    let Intake::Stream { left, .. } = shard.connections[slot].intake else {
        return false;
    };
    let entry = &mut shard.requests[request];
    let incoming = &mut shard.connections[slot].incoming;
    if !shard.pieces.split(incoming, &mut entry.frame, bytes) {
        shard.lost(slot, libc::ENOBUFS);
        return false;
    }
    let left = left - bytes as u64;
    let complete = left == 0;
    shard.connections[slot].intake = if complete {
        Intake::Frames
    } else {
        Intake::Stream { request, left }
    };
    entry.streaming = !complete;
    let (upstream, route) = (entry.upstream, entry.route);
    let arrived = entry.dropped_bytes + entry.frame.bytes() as u64;
    let hold_bytes = u64::from(shard.directory.routes[route as usize].hold_bytes);
    // When buffers are short nobody keeps a large frame: all would wait for each other's.
    if shard.requests[request].held && (arrived > hold_bytes || !shard.may_hold()) {
        settle::note_caller(shard, request);
        shard.requests[request].held = false;
    }
    if upstream != NONE {
        drop_sent(shard, upstream);
        soil(shard, upstream);
    }
    if !complete && is_backed_up(shard, request) {
        recv::crowd(shard, slot);
    }
    complete
}

/// Whether a large frame's instance is far behind its sender.
pub(crate) fn is_backed_up<R: Ring>(shard: &Shard<R>, request: u32) -> bool {
    let entry = &shard.requests[request];
    entry.frame.bytes() as u64 > BACKLOG_BYTES_MAX && !entry.held || !shard.may_hold()
}

/// Gives a request to an instance, or fails it when there is none.
pub(crate) fn place<R: Ring>(shard: &mut Shard<R>, request: u32) {
    match choose(shard, request) {
        Some(instance) => enqueue(shard, request, instance),
        None => {
            let refusal = why_nobody(shard, request);
            settle::fail(shard, request, refusal);
        }
    }
}

/// The instances of a route, as a request sees them.
pub(crate) struct View<'a> {
    places: &'a [u32],
    instances: &'a Table<InstanceState>,
    upstreams: &'a Table<Upstream>,
    request: &'a Request,
    queue_bytes_max: u64,
    now_ns: u64,
}

impl View<'_> {
    /// What the instance at `place` is busy with.
    pub(crate) fn busy(&self, place: usize) -> Work {
        self.instance(place).busy(self.now_ns)
    }

    /// Whether that is what it has reported.
    pub(crate) fn is_reported(&self, place: usize) -> bool {
        self.instance(place).is_reported(self.now_ns)
    }

    fn instance(&self, place: usize) -> &InstanceState {
        &self.instances[self.places[place]]
    }

    /// Where the instance at `place` is, and what was counted of it.
    pub(crate) fn seen(&self, place: usize) -> (SocketAddr, Seen) {
        let instance = self.instance(place);
        let seen = Seen {
            unanswered: instance.unanswered,
            streams: instance.streams,
            answered: instance.answered,
            failed: instance.failed,
        };
        (instance.address, seen)
    }

    fn is_reachable(&self, place: usize) -> bool {
        use Barrier::{Inhibited, Unreachable};
        !matches!(self.barrier(place), Some(Inhibited { .. } | Unreachable))
    }

    /// Why the instance at `place` gets nothing now.
    #[inline]
    pub(crate) fn barrier(&self, place: usize) -> Option<Barrier> {
        let instance = self.instance(place);
        let upstream = &self.upstreams[instance.upstream];
        // A connect that is under way for the first time is waited for; one that has failed is not.
        let first = upstream.state == UpstreamState::Connecting && upstream.failures == 0;
        if instance.inhibited_until_ns > self.now_ns {
            let left_ns = instance.inhibited_until_ns - self.now_ns;
            return Some(Barrier::Inhibited { left_ns });
        }
        if upstream.state != UpstreamState::Open && (!first || upstream.lost) {
            return Some(Barrier::Unreachable);
        }
        if instance.overloaded_until_ns > self.now_ns {
            let left_ns = instance.overloaded_until_ns - self.now_ns;
            return Some(Barrier::Overloaded { left_ns });
        }
        let is_full = upstream.queued_bytes >= self.queue_bytes_max;
        is_full.then_some(Barrier::QueueFull)
    }
}

impl Candidates for View<'_> {
    fn len(&self) -> usize {
        self.places.len()
    }

    fn is_routable(&self, place: usize) -> bool {
        self.barrier(place).is_none() && !self.request.was_tried_on(self.id(place))
    }

    fn id(&self, place: usize) -> u64 {
        self.instance(place).id
    }

    fn load(&self, place: usize) -> f64 {
        self.instance(place).load(self.now_ns)
    }
}

pub(crate) fn view<R: Ring>(shard: &Shard<R>, request: u32) -> View<'_> {
    view_of(shard, &shard.requests[request])
}

/// The same for a request that stands in no table.
pub(crate) fn view_of<'a, R: Ring>(shard: &'a Shard<R>, request: &'a Request) -> View<'a> {
    View {
        places: &shard.routes[request.route as usize].instances,
        instances: &shard.instances,
        upstreams: &shard.upstreams,
        request,
        queue_bytes_max: u64::from(shard.config.upstream_queue_bytes),
        now_ns: shard.now_ns,
    }
}

pub(crate) fn choose<R: Ring>(shard: &mut Shard<R>, request: u32) -> Option<u32> {
    let (route, hint) = (
        shard.requests[request].route as usize,
        shard.requests[request].hint,
    );
    let rules = &shard.directory.routes[route];
    let (policy, load, caches) = (rules.policy, rules.load, rules.kv);
    shard.requests[request].work = Work::request(load.request_blocks, 0);
    let place = match (policy, caches) {
        (Policy::Kv, Some(rule)) => kv::choose(shard, request, rule),
        _ => {
            let mut chooser = shard.routes[route].chooser.clone();
            let place = chooser.choose(policy, hint, &view(shard, request));
            shard.routes[route].chooser = chooser;
            place
        }
    };
    let instance = shard.routes[route].instances[place?];
    if load.source != LoadSource::Own {
        let stats = &shard.stats.shard;
        match shard.instances[instance].is_reported(shard.now_ns) {
            true => stats.chosen_by_report.add(1),
            false => stats.chosen_by_own_count.add(1),
        }
    }
    Some(instance)
}

fn why_nobody<R: Ring>(shard: &Shard<R>, request: u32) -> Refusal<'static> {
    let view = view(shard, request);
    let reachable: Vec<usize> = (0..view.len())
        .filter(|&place| view.is_reachable(place))
        .collect();
    if reachable.is_empty() {
        return Refusal::NoInstance;
    }
    let route = &shard.directory.routes[view.request.route as usize];
    if route.policy == Policy::Direct
        && !(0..view.len()).any(|place| view.id(place) == view.request.hint)
    {
        return Refusal::NoSuchInstance;
    }
    let overloaded = |&place: &usize| view.instance(place).overloaded_until_ns > view.now_ns;
    if reachable.iter().any(overloaded) {
        return Refusal::AllOverloaded;
    }
    let full = |&place: &usize| {
        view.upstreams[view.instance(place).upstream].queued_bytes >= view.queue_bytes_max
    };
    if reachable.iter().any(full) {
        Refusal::QueueFull
    } else {
        Refusal::InstanceLost
    }
}

pub(crate) fn enqueue<R: Ring>(shard: &mut Shard<R>, request: u32, instance: u32) {
    if !relay_life::place(shard, request, instance) {
        return settle::fail(shard, request, Refusal::TableFull);
    }
    let streaming = shard.requests[request].streaming;
    let target = &shard.instances[instance];
    let upstream = match streaming {
        true => link::bulk(shard, target.address),
        false => Some(target.upstream),
    };
    let Some(upstream) = upstream else {
        return settle::fail(shard, request, Refusal::TableFull);
    };
    let target = &mut shard.instances[instance];
    let entry = &mut shard.requests[request];
    target.give(shard.now_ns, entry.work);
    let lead_bytes = target.prefix.len() as u64 + u64::from(entry.head_bytes);
    let (before, id, address) = (u32::from(entry.attempts), target.id, target.address);
    entry.try_on(id);
    entry.instance = instance;
    entry.upstream = upstream;
    entry.next_upstream = NONE;
    entry.sent = false;
    entry.placed_ns = shard.now_ns;
    let (frame_bytes, span) = (entry.frame_bytes, entry.span);
    let link = &mut shard.upstreams[upstream];
    match link.queue.tail {
        NONE => link.queue.head = request,
        tail => shard.requests[tail].next_upstream = request,
    }
    link.queue.tail = request;
    link.queue.len += 1;
    if link.unsent == NONE {
        link.unsent = request;
        link.unsent_offset = 0;
    }
    link.queued_bytes += lead_bytes + frame_bytes;
    if !link.timer {
        link.timer = true;
        let timeout_ns = answer_timeout_ns(shard, request);
        let generation = shard.upstreams.generation(upstream);
        shard.timer(
            TimerKind::Answer,
            upstream,
            generation,
            shard.now_ns + timeout_ns,
        );
    }
    soil(shard, upstream);
    shard.note(Kind::Routed, before, request, id);
    routed::chosen(shard, span, id, Some(address));
}

/// What goes before a request's frame: the path of its instance, and a head of our own.
fn lead_bytes<R: Ring>(shard: &Shard<R>, entry: &Request) -> u64 {
    let prefix_bytes = shard.instances[entry.instance].prefix.len() as u64;
    prefix_bytes + u64::from(entry.head_bytes)
}

/// How long an instance has for its answer.
pub(crate) fn answer_timeout_ns<R: Ring>(shard: &Shard<R>, request: u32) -> u64 {
    shard.directory.routes[shard.requests[request].route as usize].ack_timeout_ns
}

/// Notes that an upstream has something to send.
pub(crate) fn soil<R: Ring>(shard: &mut Shard<R>, upstream: u32) {
    let link = &mut shard.upstreams[upstream];
    if !link.dirty {
        link.dirty = true;
        shard.dirty_upstreams.push(upstream);
    }
}

/// Starts one send of what waits for an upstream.
pub(crate) fn flush<R: Ring>(shard: &mut Shard<R>, upstream: u32) {
    let Some(link) = shard.upstreams.get_mut(upstream) else {
        return;
    };
    link.dirty = false;
    if link.state != UpstreamState::Open || link.unsent == NONE {
        return;
    }
    let (slot, mut request, mut skip) = (link.connection, link.unsent, link.unsent_offset);
    if shard.connections[slot].sending || shard.connections[slot].closing {
        return;
    }
    let mut spans = [Span::of(&[]); SPANS_MAX];
    let (mut count, mut bytes) = (0, 0);
    while request != NONE && count < SPANS_MAX && bytes < SEND_BYTES_MAX {
        let entry = &shard.requests[request];
        let prefix: &[u8] = &shard.instances[entry.instance].prefix;
        let from_prefix = skip.min(prefix.len() as u64) as usize;
        let mut from_head = skip - from_prefix as u64;
        let lead_bytes = lead_bytes(shard, entry);
        let mut from_frame = skip.saturating_sub(lead_bytes + entry.dropped_bytes);
        let head = shard.relays.heads.unsent(&entry.head);
        let head = head.filter_map(|part| {
            let from = from_head.min(part.len() as u64) as usize;
            from_head -= from as u64;
            (from < part.len()).then(|| &part[from..])
        });
        let pieces = shard
            .pieces
            .iter(&entry.frame)
            .map(|piece| shard.pieces.bytes_of(piece));
        let rest = pieces.filter_map(|piece| {
            let from = from_frame.min(piece.len() as u64) as usize;
            from_frame -= from as u64;
            (from < piece.len()).then(|| &piece[from..])
        });
        let prefix = (from_prefix < prefix.len()).then(|| &prefix[from_prefix..]);
        let all = prefix.into_iter().chain(head).chain(rest);
        for span in all.take(SPANS_MAX - count) {
            spans[count] = Span::of(span);
            count += 1;
            bytes += span.len();
        }
        if entry.streaming {
            break;
        }
        skip = 0;
        request = entry.next_upstream;
    }
    if count > 0 {
        shard.send(slot, &spans[..count]);
        collect::along(shard, upstream);
    }
}

/// Whether bytes that have arrived wait for the socket.
pub(crate) fn has_unsent<R: Ring>(shard: &Shard<R>, upstream: u32) -> bool {
    let link = &shard.upstreams[upstream];
    let Some(entry) = shard.requests.get(link.unsent) else {
        return false;
    };
    let there = lead_bytes(shard, entry) + entry.dropped_bytes + entry.frame.bytes() as u64;
    there > link.unsent_offset
}

/// The socket took `bytes` bytes.
pub(crate) fn sent<R: Ring>(shard: &mut Shard<R>, upstream: u32, bytes: usize) {
    let link = &mut shard.upstreams[upstream];
    link.used_ns = shard.now_ns;
    let mut left = link.unsent_offset + bytes as u64;
    let mut request = link.unsent;
    while request != NONE {
        let entry = &shard.requests[request];
        let total = lead_bytes(shard, entry) + entry.frame_bytes;
        if left < total || entry.streaming {
            break;
        }
        left -= total;
        let next = entry.next_upstream;
        let link = &mut shard.upstreams[upstream];
        link.unsent = next;
        link.queued_bytes -= total;
        complete(shard, request);
        request = next;
    }
    let link = &mut shard.upstreams[upstream];
    link.unsent_offset = left;
    debug_assert!(
        link.unsent != NONE || left == 0,
        "more was sent than queued"
    );
    if link.unsent != NONE {
        drop_sent(shard, upstream);
        soil(shard, upstream);
    }
}

/// All of a request is in the socket of a live instance.
fn complete<R: Ring>(shard: &mut Shard<R>, request: u32) {
    let now_ns = shard.now_ns;
    let may_hold = shard.may_hold();
    let entry = &mut shard.requests[request];
    entry.sent = true;
    entry.sent_ns = now_ns;
    shard.stats.shard.forwarded.add(1);
    let hop_ns = now_ns - entry.received_ns;
    if entry.attempts == 1 {
        shard.stats.hop.record(hop_ns);
    }
    let ack = shard.directory.routes[entry.route as usize].ack;
    let relay = entry.relay;
    shard.note(Kind::Forwarded, 0, request, hop_ns);
    let entry = &shard.requests[request];
    if entry.held && !may_hold {
        settle::note_caller(shard, request);
        shard.requests[request].held = false;
    }
    let entry = &mut shard.requests[request];
    if !entry.held {
        // It cannot be given to another instance any more, so its caller waits for the answer.
        entry.dropped_bytes += entry.frame.bytes() as u64;
        shard.pieces.clear(&mut entry.frame);
    } else if ack == Ack::OnForward && entry.reply == Reply::Open {
        respond::decide(shard, request, Reply::Accepted);
    }
    if relay != NONE {
        relay_life::forwarded(shard, relay);
    }
}

/// Lets go of the sent part of a large frame that is not kept for a retry.
fn drop_sent<R: Ring>(shard: &mut Shard<R>, upstream: u32) {
    let link = &shard.upstreams[upstream];
    let (request, offset) = (link.unsent, link.unsent_offset);
    let Some(entry) = shard.requests.get(request) else {
        return;
    };
    if entry.held {
        return;
    }
    let sent = offset.saturating_sub(lead_bytes(shard, entry));
    let entry = &mut shard.requests[request];
    let droppable = sent.saturating_sub(entry.dropped_bytes);
    shard.pieces.advance(&mut entry.frame, droppable as usize);
    entry.dropped_bytes += droppable;
    let downstream = entry.downstream;
    let paused = shard
        .connections
        .get(downstream)
        .is_some_and(|connection| connection.paused);
    if paused && shard.requests[request].frame.bytes() as u64 <= BACKLOG_BYTES_MAX / 2 {
        respond::resume_if_ready(shard, downstream);
    }
}
