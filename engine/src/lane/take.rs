//! Frames for lanes: the front is looked at, the body goes into a worker's slab.
//!
//! ```text
//! [path, headers, prefix, control message]  copied, read     [body]
//!                                                             |  what lies in receive buffers
//!                                                             |  is copied, the rest is received
//!                                                             v  by the kernel into the slab
//! slab   [BlockHead][id][headers]                            [body]
//! ```

use corelane_codec::request_frame::Prefix;
use corelane_codec::{Decoded, two_part};
use corelane_gpu_mem::lane::layout::{Descriptor, Kind, body_at};
use corelane_gpu_mem::lane::memory::Mapping;
use zerocopy::IntoBytes;

use super::life;
use super::{Job, Tried, View};
use crate::connection::Intake;
use crate::directory::Policy;
use crate::handler::{self, CallHome, Undecodable};
use crate::host::LaneJob;
use crate::in_flight::TRIED_MAX;
use crate::respond::{self, Refusal};
use crate::ring::{Ring, Room};
use crate::routed::{self, Ending};
use crate::served::Outcome;
use crate::shard::Shard;
use crate::stats::flight::{Kind as Noted, Why};
use crate::table::NONE;
use crate::{decode, recv, respond_stream, worker};

/// Bytes before a two-part message's header (spec/request-plane.md §3.1).
const PARTS_BYTES: usize = 24;
/// Dynamo's clients send no longer control message (spec/request-plane.md §3.2).
const CONTROL_BYTES_MAX: usize = 131_072;
/// Received into a slab at once, at most: a slow sender has 30 s for so many bytes.
const ROOM_BYTES_MAX: u32 = 256 * 1024;

/// What the front of a frame says.
struct Front {
    id: String,
    codec: corelane_codec::control_message::PayloadCodec,
    home: CallHome,
    body_bytes: u64,
    /// Behind the body.
    trailing: u64,
}

/// A frame for a lane is at the front of a connection. Returns whether to look again.
pub(crate) fn take<R: Ring>(
    shard: &mut Shard<R>,
    slot: u32,
    prefix: &Prefix,
    route: u32,
    hint: u64,
) -> bool {
    let payload_bytes = prefix.payload_bytes as usize;
    let parts_end = prefix.prefix_bytes + PARTS_BYTES.min(payload_bytes);
    let mut parts = [0; PARTS_BYTES];
    let connection = &mut shard.connections[slot];
    if connection.incoming.bytes() < parts_end {
        connection.need = parts_end;
        return false;
    }
    let copied = shard
        .pieces
        .copy_out(&connection.incoming, prefix.prefix_bytes, &mut parts);
    let parts = match two_part::decode_prefix(&parts[..copied.min(payload_bytes)], None) {
        Decoded::Frame(parts) if parts.header.len() <= CONTROL_BYTES_MAX => parts,
        _ => return undecodable(shard, slot, prefix, none("the envelope has no front")),
    };
    let control_end = prefix.prefix_bytes.saturating_add(parts.header.end);
    if parts.header.end > payload_bytes {
        return undecodable(shard, slot, prefix, none("the envelope is cut off"));
    }
    let connection = &mut shard.connections[slot];
    if connection.incoming.bytes() < control_end {
        connection.need = control_end;
        return false;
    }
    let mut scratch = std::mem::take(&mut shard.lanes.scratch);
    scratch.resize(control_end, 0);
    shard.pieces.copy_out(&connection.incoming, 0, &mut scratch);
    let goes_on = match read(&scratch[prefix.prefix_bytes..], &parts, payload_bytes) {
        Ok(front) => begin(shard, slot, prefix, route, hint, front, &scratch),
        Err(undecoded) => undecodable(shard, slot, prefix, undecoded),
    };
    shard.lanes.scratch = scratch;
    goes_on
}

fn none(why: &str) -> Undecodable {
    Undecodable {
        home: None,
        why: why.into(),
    }
}

/// Reads the front of a payload: the 24 bytes and the control message.
fn read(
    front: &[u8],
    parts: &two_part::Message,
    payload_bytes: usize,
) -> Result<Front, Undecodable> {
    let complain = |why: String| Undecodable {
        home: handler::call_home_of(front),
        why,
    };
    let body_bytes = parts.body.len() as u64;
    let trailing = (payload_bytes as u64)
        .checked_sub(parts.header.end as u64)
        .and_then(|rest| rest.checked_sub(body_bytes))
        .ok_or_else(|| complain("the envelope is cut off".into()))?;
    let (id, codec, mut home) =
        handler::of_control(&front[parts.header.clone()]).map_err(complain)?;
    // Blocks are sent from where they lie, which a shared connection cannot do.
    home.offers_mux = false;
    if body_bytes == 0 {
        return Err(complain(handler::NO_BODY.into()));
    }
    Ok(Front {
        id,
        codec,
        home,
        body_bytes,
        trailing,
    })
}

/// As a worker of Dynamo's does: acknowledged, then told over the call-home address.
fn undecodable<R: Ring>(
    shard: &mut Shard<R>,
    slot: u32,
    prefix: &Prefix,
    undecodable: Undecodable,
) -> bool {
    if !respond::accept(shard, slot) {
        recv::crowd(shard, slot);
        return false;
    }
    worker::complain(shard, undecodable);
    decode::skip(shard, slot, prefix.frame_bytes());
    true
}

/// Chooses a lane for the request and begins to fill its block.
fn begin<R: Ring>(
    shard: &mut Shard<R>,
    slot: u32,
    prefix: &Prefix,
    route: u32,
    hint: u64,
    front: Front,
    bytes: &[u8],
) -> bool {
    let headers = &bytes[prefix.headers.clone()];
    let body_at = body_at(front.id.len(), headers.len());
    let block_bytes = body_at as u64 + front.body_bytes;
    let lane = match choose(shard, route, hint, Tried::default(), block_bytes) {
        Ok(lane) => lane,
        Err(refusal) => return decode::refuse(shard, slot, prefix, refusal),
    };
    let worker = shard.lanes.lanes[lane].worker;
    let mut tried = Tried::default();
    tried.add(worker);
    let mut job = Job {
        home: Some(front.home),
        stream: None,
        hint,
        block: 0,
        block_bytes: 0,
        body_at: body_at as u32,
        id_bytes: front.id.len() as u32,
        headers_bytes: headers.len() as u32,
        arrived: 0,
        downstream: slot,
        trailing: front.trailing,
        codec: front.codec,
        posted: None,
        began: false,
        items: 0,
        attempts: 0,
        tried: [0; TRIED_MAX],
        span: NONE,
    };
    job.set_tried(tried);
    let Some(job) = place(shard, lane, job, block_bytes) else {
        return decode::refuse(shard, slot, prefix, Refusal::QueueFull);
    };
    let entry = &shard.lanes.lanes[lane];
    let (block, head) = (entry.jobs[job].block, entry.jobs[job].head());
    let parts = [head.as_bytes(), front.id.as_bytes(), headers];
    let written = write(&entry.slab, block, &parts);
    debug_assert!(written, "the block was made for it");
    let stats = &shard.stats.shard;
    stats.requests.add(1);
    stats.lane_requests.add(1);
    stats.lane_copied_bytes.add((bytes.len() + body_at) as u64);
    shard.note(Noted::Laned, route, job, slot.into());
    let span = routed::begin(shard, slot, prefix, route);
    shard.lanes.lanes[lane].jobs[job].span = span;
    routed::chosen(shard, span, worker, None);
    let connection = &mut shard.connections[slot];
    connection.need = 0;
    connection.frames += 1;
    shard.pieces.advance(&mut connection.incoming, bytes.len());
    let left = front.body_bytes as u32;
    connection.intake = Intake::Lane { lane, job, left };
    true
}

/// Takes a block for a job and enters it. `None`: there is no room after all.
fn place<R: Ring>(shard: &mut Shard<R>, lane: u32, job: Job, block_bytes: u64) -> Option<u32> {
    let entry = &mut shard.lanes.lanes[lane];
    if entry.jobs.is_full() {
        return None;
    }
    let block = entry.area.take(block_bytes)?;
    let job = Job {
        block,
        block_bytes: block_bytes as u32,
        ..job
    };
    entry.jobs.insert(job).ok()
}

fn write(slab: &Mapping, block: u64, parts: &[&[u8]]) -> bool {
    let mut at = block;
    parts.iter().all(|part| {
        let written = slab.write(at, part);
        at += part.len() as u64;
        written
    })
}

/// A lane of the route that has room for a block of this size.
fn choose<R: Ring>(
    shard: &mut Shard<R>,
    route: u32,
    hint: u64,
    tried: Tried,
    block_bytes: u64,
) -> Result<u32, Refusal<'static>> {
    let policy = shard.directory.routes[route as usize].policy;
    let mut chooser = shard.routes[route as usize].chooser.clone();
    let places = shard.lanes.of_route(route);
    let view = View {
        lanes: &shard.lanes,
        places,
        tried,
        block_bytes,
    };
    let place = chooser.choose(policy, hint, &view);
    let chosen = place.map(|place| places[place]);
    let open = |lane: &&u32| !shard.lanes.lanes[**lane].closing;
    let named = |lane: &u32| shard.lanes.lanes[*lane].worker == hint;
    let refusal = match places.iter().filter(open).count() {
        0 => Refusal::NoInstance,
        _ if policy == Policy::Direct && !places.iter().any(named) => Refusal::NoSuchInstance,
        _ => Refusal::QueueFull,
    };
    shard.routes[route as usize].chooser = chooser;
    if chosen.is_none() && matches!(refusal, Refusal::QueueFull) {
        shard.stats.shard.lane_full.add(1);
    }
    chosen.ok_or(refusal)
}

/// More of a body has arrived in receive buffers: it is copied. Returns whether to look again.
pub(crate) fn fill<R: Ring>(
    shard: &mut Shard<R>,
    slot: u32,
    lane: u32,
    job: u32,
    left: u32,
) -> bool {
    let entry = &mut shard.lanes.lanes[lane];
    let connection = &mut shard.connections[slot];
    let here = connection.incoming.bytes().min(left as usize);
    let body = &mut entry.jobs[job];
    let mut at = body.block + u64::from(body.body_at + body.arrived);
    let mut rest = here;
    for piece in shard.pieces.iter(&connection.incoming) {
        let bytes = shard.pieces.bytes_of(piece);
        let bytes = &bytes[..bytes.len().min(rest)];
        let written = entry.slab.write(at, bytes);
        debug_assert!(written, "the block was made for it");
        at += bytes.len() as u64;
        rest -= bytes.len();
        if rest == 0 {
            break;
        }
    }
    shard.pieces.advance(&mut connection.incoming, here);
    connection.streamed += here as u64;
    shard.stats.shard.lane_copied_bytes.add(here as u64);
    body.arrived += here as u32;
    more(shard, slot, lane, job, left - here as u32)
}

/// So many bytes were received into the slab. Returns whether to look again.
pub(crate) fn landed<R: Ring>(shard: &mut Shard<R>, slot: u32, bytes: u32) -> bool {
    let connection = &mut shard.connections[slot];
    let Intake::Lane { lane, job, left } = connection.intake else {
        return false;
    };
    connection.streamed += u64::from(bytes);
    shard.stats.shard.lane_landed_bytes.add(u64::from(bytes));
    shard.lanes.lanes[lane].jobs[job].arrived += bytes;
    more(shard, slot, lane, job, left - bytes)
}

fn more<R: Ring>(shard: &mut Shard<R>, slot: u32, lane: u32, job: u32, left: u32) -> bool {
    if left > 0 {
        shard.connections[slot].intake = Intake::Lane { lane, job, left };
        // A receive that goes on into buffers is ended: what follows goes into the slab.
        shard.end_receive(slot);
        return false;
    }
    complete(shard, slot, lane, job)
}

/// The body is all there: the caller is acknowledged and the worker told.
fn complete<R: Ring>(shard: &mut Shard<R>, slot: u32, lane: u32, job: u32) -> bool {
    let Some((lane, job)) = life::rescue(shard, slot, lane, job) else {
        return true;
    };
    let entry = &mut shard.lanes.lanes[lane].jobs[job];
    let trailing = entry.trailing;
    entry.downstream = NONE;
    shard.connections[slot].intake = match trailing {
        0 => Intake::Frames,
        left => Intake::Discard { left },
    };
    let entry = &mut shard.lanes.lanes[lane].jobs[job];
    let (home, codec) = (entry.home.take(), entry.codec);
    let stream = home.and_then(|home| respond_stream::open(shard, &home, codec));
    let Some(stream) = stream else {
        life::drop_job(shard, lane, job, Ending::Refused(Why::TableFull));
        if !respond::refuse(shard, slot, Refusal::TableFull) {
            shard.lost(slot, libc::ENOBUFS);
        }
        return true;
    };
    shard.lanes.lanes[lane].jobs[job].stream = Some(stream);
    if !respond::accept(shard, slot) {
        // Not even its reply has room: the caller takes the end of the connection for a no.
        shard.lost(slot, libc::ENOBUFS);
    }
    submit(shard, lane, job);
    true
}

/// Hands a job that is all there to its worker.
pub(super) fn submit<R: Ring>(shard: &mut Shard<R>, lane: u32, job: u32) {
    let key = LaneJob {
        lane: shard.lanes.key(lane),
        job: (job, shard.lanes.lanes[lane].jobs.generation(job)),
    };
    let entry = &mut shard.lanes.lanes[lane];
    match &entry.jobs[job].stream {
        Some(stream) if !stream.borrow().is_over() => stream.borrow_mut().set_job(Some(key)),
        // Its caller cannot be reached: nobody would read what the worker says.
        _ => return life::drop_job(shard, lane, job, Ending::Served(Outcome::Unreachable)),
    }
    let span = entry.jobs[job].span;
    routed::handed_over(shard, span);
    let entry = &mut shard.lanes.lanes[lane];
    let (block, bytes) = (entry.jobs[job].block, entry.jobs[job].block_bytes);
    entry.jobs[job].posted = Some(entry.queues.posted());
    let descriptor = Descriptor::new(Kind::Request, key.job.0, key.job.1).at(block, bytes);
    match entry.post(&descriptor, Kind::Request) {
        Ok(()) => life::watch(shard, lane),
        Err(why) => life::fault(shard, lane, why),
    }
}

/// Where the next bytes of a connection go, if they belong into a slab.
pub(crate) fn room<R: Ring>(shard: &mut Shard<R>, slot: u32) -> Option<Room> {
    let Intake::Lane { lane, job, left } = shard.connections[slot].intake else {
        return None;
    };
    let (lane, job) = life::rescue(shard, slot, lane, job)?;
    let entry = &shard.lanes.lanes[lane];
    let body = &entry.jobs[job];
    let at = body.block + u64::from(body.body_at + body.arrived);
    let bytes = left.min(ROOM_BYTES_MAX);
    let place = entry.slab.place(at, bytes as usize)?;
    Some(Room::of_shared(place, bytes))
}

/// Gives a job that is still arriving to another lane: what is there of it is copied.
pub(super) fn transplant<R: Ring>(
    shard: &mut Shard<R>,
    route: u32,
    from: u32,
    job: u32,
) -> Option<(u32, u32)> {
    let entry = &shard.lanes.lanes[from].jobs[job];
    let (hint, mut tried, bytes) = (entry.hint, entry.tried(), entry.block_bytes);
    if entry.attempts > shard.directory.routes.get(route as usize)?.retries_max {
        return None;
    }
    let lane = choose(shard, route, hint, tried, u64::from(bytes)).ok()?;
    tried.add(shard.lanes.lanes[lane].worker);
    let slab = std::rc::Rc::clone(&shard.lanes.lanes[from].slab);
    let old = shard.lanes.lanes[from].jobs[job].block;
    let mut moved = shard.lanes.lanes[from].remove(job)?;
    moved.posted = None;
    moved.set_tried(tried);
    let (filled, span) = (moved.body_at + moved.arrived, moved.span);
    let Some(place) = place(shard, lane, moved, u64::from(bytes)) else {
        routed::end_as(shard, span, Ending::Refused(Why::QueueFull));
        return None;
    };
    let worker = shard.lanes.lanes[lane].worker;
    routed::chosen(shard, span, worker, None);
    let entry = &shard.lanes.lanes[lane];
    let new = entry.jobs[place].block;
    let copied = entry.slab.copy_from(new, &slab, old, filled as usize)
        && entry.slab.write(new, entry.jobs[place].head().as_bytes());
    debug_assert!(copied, "both blocks lie inside");
    let stats = &shard.stats.shard;
    stats.lane_copied_bytes.add(u64::from(filled));
    stats.retried.add(1);
    Some((lane, place))
}

/// The connection that a job arrived on is gone, and nothing is received for it any more.
pub(crate) fn undo<R: Ring>(shard: &mut Shard<R>, lane: u32, job: u32) {
    life::drop_job(shard, lane, job, Ending::Unanswered);
    life::forget_if_over(shard, lane);
}
