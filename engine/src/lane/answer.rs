//! What workers say: items, ends, blocks given back. Everything is copied out, then checked; the
//! first lie ends the worker's lane.

use corelane_codec::error::DynamoError;
use corelane_gpu_mem::lane::layout::{
    ANNOTATED, Descriptor, FAIL_BYTES_MAX, INVALID_ARGUMENT, ITEMS_MAX, Kind, LAST,
};

use super::{LENT_MAX, Lane, life, why};
use crate::outgoing::Lent;
use crate::ring::Ring;
use crate::routed::{self, Ending};
use crate::served::Outcome;
use crate::shard::Shard;

/// Descriptors taken from one lane in one turn, so that others have theirs.
const BATCH: usize = 256;
/// Items up to this size are copied behind each other: cheaper than to send each from its place.
const COPY_BYTES_MAX: u32 = 2048;

/// Takes what workers have posted; answers whether there was something.
pub(crate) fn poll<R: Ring>(shard: &mut Shard<R>) -> bool {
    if shard.lanes.is_empty() {
        return false;
    }
    let mut any = false;
    shard.lanes.more = false;
    let alive: Vec<u32> = shard.lanes.alive().collect();
    for lane in alive {
        for count in 0.. {
            if count == BATCH {
                shard.lanes.more = true;
                break;
            }
            let taken = shard.lanes.lanes[lane].queues.take().map_err(why);
            let done = match taken {
                Ok(None) => break,
                Ok(Some(descriptor)) => {
                    any = true;
                    said(shard, lane, &descriptor)
                }
                Err(why) => Err(why),
            };
            if let Err(why) = done {
                life::fault(shard, lane, why);
                break;
            }
        }
    }
    any
}

type Checked = Result<(), &'static str>;

fn said<R: Ring>(shard: &mut Shard<R>, lane: u32, descriptor: &Descriptor) -> Checked {
    let entry = &mut shard.lanes.lanes[lane];
    let kind = Kind::of(descriptor.kind.get()).ok_or("a kind of descriptor that is none")?;
    if kind == Kind::Close {
        entry.closing = true;
        return Ok(());
    }
    let job = descriptor.request.get();
    let known = entry.jobs.is_current(job, descriptor.generation.get());
    if !known || entry.jobs[job].posted.is_none() {
        return Err("a request that it does not have");
    }
    match kind {
        Kind::Item => item(shard, lane, job, descriptor),
        Kind::Finish => {
            finish(shard, lane, job);
            Ok(())
        }
        Kind::Fail => fail(shard, lane, job, descriptor),
        Kind::Release => {
            entry.free_block(job);
            Ok(())
        }
        _ => Err("a descriptor that means nothing to the router"),
    }
}

/// Whether what a descriptor names lies in the worker's part of the slab.
fn check_place(lane: &Lane, descriptor: &Descriptor) -> Checked {
    let offset = descriptor.offset.get();
    let length = descriptor.length.get() as usize;
    let inside = offset >= lane.items_at && lane.slab.place(offset, length).is_some();
    inside.then_some(()).ok_or("a place outside of its memory")
}

fn item<R: Ring>(shard: &mut Shard<R>, lane: u32, job: u32, descriptor: &Descriptor) -> Checked {
    let key = shard.lanes.key(lane);
    let entry = &mut shard.lanes.lanes[lane];
    check_place(entry, descriptor)?;
    let (offset, bytes) = (descriptor.offset.get(), descriptor.length.get());
    let (annotated, last) = flags(descriptor);
    let stats = &shard.stats.shard;
    stats.lane_items.add(1);
    stats.lane_item_bytes.add(u64::from(bytes));
    let generation = entry.jobs.generation(job);
    let body = &mut entry.jobs[job];
    let span = body.span;
    let mut released = true;
    if let Some(stream) = body
        .stream
        .as_ref()
        .filter(|stream| !stream.borrow().is_over())
    {
        body.began = true;
        let mut stream = stream.borrow_mut();
        if bytes <= COPY_BYTES_MAX && !stream.is_full() {
            let mut data = Vec::with_capacity(bytes as usize);
            if !entry.slab.read(offset, bytes as usize, &mut data) {
                return Err("a place outside of its memory");
            }
            stats.lane_item_copied_bytes.add(2 * u64::from(bytes));
            stream.lane_item(&data, annotated);
        } else {
            if body.items >= ITEMS_MAX || entry.lent >= LENT_MAX {
                return Err("more items than may wait for their callers");
            }
            body.items += 1;
            entry.lent += 1;
            released = false;
            let lent = Lent {
                slab: std::rc::Rc::clone(&entry.slab),
                offset,
                bytes,
                tag: descriptor.tag.get(),
                lane: key,
                job: (job, generation),
            };
            stream.lend_item(lent, annotated);
        }
    }
    if released {
        release(entry, descriptor.tag.get(), offset)?;
    }
    routed::responds(shard, span);
    routed::taken(shard, span, bytes as usize);
    if last {
        finish(shard, lane, job);
    }
    Ok(())
}

fn flags(descriptor: &Descriptor) -> (bool, bool) {
    let flags = descriptor.flags.get();
    (flags & ANNOTATED != 0, flags & LAST != 0)
}

/// Tells the worker that an item's block is free.
fn release(lane: &mut Lane, tag: u64, offset: u64) -> Checked {
    let mut descriptor = Descriptor::new(Kind::Released, 0, 0).at(offset, 0);
    descriptor.tag = tag.into();
    lane.post(&descriptor, Kind::Released)
}

fn finish<R: Ring>(shard: &mut Shard<R>, lane: u32, job: u32) {
    if let Some(job) = shard.lanes.lanes[lane].remove(job) {
        if let Some(stream) = job.stream {
            let mut stream = stream.borrow_mut();
            stream.finish();
            stream.set_job(None);
        }
        routed::end_as(shard, job.span, Ending::Served(Outcome::Finished));
    }
    shard.stats.shard.handled.add(1);
}

fn fail<R: Ring>(shard: &mut Shard<R>, lane: u32, job: u32, descriptor: &Descriptor) -> Checked {
    let entry = &mut shard.lanes.lanes[lane];
    check_place(entry, descriptor)?;
    let (offset, bytes) = (descriptor.offset.get(), descriptor.length.get());
    let mut text = Vec::new();
    if bytes > FAIL_BYTES_MAX || !entry.slab.read(offset, bytes as usize, &mut text) {
        return Err("a failure of more words than are read");
    }
    let text = String::from_utf8_lossy(&text).into_owned();
    let error = match descriptor.flags.get() & INVALID_ARGUMENT {
        0 => DynamoError::backend_unknown(text),
        _ => DynamoError::invalid_argument(text),
    };
    release(entry, descriptor.tag.get(), offset)?;
    if let Some(job) = entry.remove(job) {
        if let Some(stream) = job.stream {
            let mut stream = stream.borrow_mut();
            stream.fail(&error);
            stream.set_job(None);
        }
        routed::end_as(shard, job.span, Ending::Served(Outcome::Failed));
    }
    shard.stats.shard.lane_failures.add(1);
    Ok(())
}

/// At the end of a turn: callers who want no more, blocks that were sent, and workers to wake.
pub(crate) fn settle<R: Ring>(shard: &mut Shard<R>) {
    let (mut stopped, mut returned) = (Vec::new(), Vec::new());
    shard.worker.host.take_stopped(&mut stopped);
    shard.worker.host.take_returned(&mut returned);
    for (key, kill) in stopped {
        let (lane, generation) = key.lane;
        if !shard.lanes.lanes.is_current(lane, generation) {
            continue;
        }
        let entry = &mut shard.lanes.lanes[lane];
        if entry.gone || !entry.jobs.is_current(key.job.0, key.job.1) {
            continue;
        }
        entry.jobs[key.job.0].stream = None;
        let span = entry.jobs[key.job.0].span;
        let kind = if kill { Kind::Kill } else { Kind::Stop };
        let descriptor = Descriptor::new(kind, key.job.0, key.job.1);
        let posted = entry.post(&descriptor, kind);
        routed::turns(shard, span, Ending::Served(Outcome::Cancelled));
        if let Err(why) = posted {
            life::fault(shard, lane, why);
        }
    }
    for lent in returned {
        let (lane, generation) = lent.lane;
        if !shard.lanes.lanes.is_current(lane, generation) || shard.lanes.lanes[lane].gone {
            continue;
        }
        let entry = &mut shard.lanes.lanes[lane];
        entry.lent -= 1;
        if entry.jobs.is_current(lent.job.0, lent.job.1) {
            entry.jobs[lent.job.0].items -= 1;
        }
        if let Err(why) = release(entry, lent.tag, lent.offset) {
            life::fault(shard, lane, why);
        }
    }
    if shard.lanes.is_empty() && !shard.lanes.expected {
        return;
    }
    wake(shard);
    shard.stats.shard.lane_jobs.set(shard.lanes.jobs() as u64);
}

fn wake<R: Ring>(shard: &mut Shard<R>) {
    for place in (0..shard.lanes.by_route.len()).rev() {
        for at in (0..shard.lanes.by_route[place].len()).rev() {
            let lane = shard.lanes.by_route[place][at];
            let entry = &mut shard.lanes.lanes[lane];
            if let Err(why) = entry.work_off() {
                life::fault(shard, lane, why);
                continue;
            }
            if let Some(kind) = entry.news.take()
                && entry.queues.wants_wake(kind)
            {
                // Fails only when the counter is at its limit, and then the worker is awake.
                let _ = rustix::io::write(&entry.wake_worker, &1u64.to_ne_bytes());
                shard.stats.shard.lane_wakes.add(1);
            }
        }
    }
}
