//! A lane's beginning and its end: by its worker's death, by a lie, or because it stands still.
//!
//! ```text
//! not taken by the worker     another lane, as long as the route allows; else an error
//! taken                       the caller gets an error: it may have been acted upon
//! still arriving              another lane when its next bytes come; else the frame is refused
//! ```

use std::os::fd::AsRawFd;

use corelane_codec::error::DynamoError;

use super::take;
use super::{Lane, NewLane};
use crate::command::Report;
use crate::connection::Intake;
use crate::respond::{self, Refusal};
use crate::ring::Ring;
use crate::routed::{self, Ending};
use crate::shard::{Shard, TimerKind};
use crate::stats::flight::Why;

/// Takes a lane over. A full table gives it back to nobody: its worker hears of it by the report.
pub(crate) fn attach<R: Ring>(shard: &mut Shard<R>, new: NewLane) {
    let (route, worker) = (new.route as usize, new.worker);
    let Ok(lane) = shard.lanes.lanes.insert(Lane::new(new)) else {
        shard.report(Report::LaneEnded {
            worker,
            why: Some("this core has all the lanes that it can have"),
        });
        return;
    };
    if shard.lanes.by_route.len() <= route {
        shard.lanes.by_route.resize_with(route + 1, Vec::new);
    }
    shard.lanes.by_route[route].push(lane);
    let operation = shard.lanes.wake_operation(lane);
    let wake = shard.lanes.lanes[lane].wake.as_raw_fd();
    shard.ring.watch_wake(operation, wake);
    shard.stats.shard.lanes_attached.add(1);
    count(shard);
}

fn count<R: Ring>(shard: &Shard<R>) {
    let alive = shard.lanes.alive().count() as u64;
    shard.stats.shard.lanes.set(alive);
}

/// The worker's eventfd was written, or its watch has ended.
pub(crate) fn woken<R: Ring>(shard: &mut Shard<R>, lane: u32, generation: u32, more: bool) {
    let current = shard.lanes.lanes.is_current(lane, generation);
    if current && !more && !shard.lanes.lanes[lane].gone {
        let operation = shard.lanes.wake_operation(lane);
        let wake = shard.lanes.lanes[lane].wake.as_raw_fd();
        shard.ring.watch_wake(operation, wake);
    }
}

/// All lanes of a worker are over: its process is gone.
pub(crate) fn end<R: Ring>(shard: &mut Shard<R>, worker: u64) {
    let of_worker = |lane: &u32| shard.lanes.lanes[*lane].worker == worker;
    let lanes: Vec<u32> = shard.lanes.alive().filter(of_worker).collect();
    for lane in lanes {
        detach(shard, lane);
    }
}

/// A worker has broken the rules: it has no lane any more.
pub(crate) fn fault<R: Ring>(shard: &mut Shard<R>, lane: u32, why: &'static str) {
    if shard.lanes.lanes[lane].gone {
        return;
    }
    shard.stats.shard.lane_faults.add(1);
    let worker = shard.lanes.lanes[lane].worker;
    shard.report(Report::LaneEnded {
        worker,
        why: Some(why),
    });
    detach(shard, lane);
}

/// Looks from time to time whether the worker takes what is posted.
pub(super) fn watch<R: Ring>(shard: &mut Shard<R>, lane: u32) {
    let entry = &mut shard.lanes.lanes[lane];
    if entry.timer || entry.gone {
        return;
    }
    let Some(route) = shard.directory.routes.get(entry.route as usize) else {
        return;
    };
    entry.timer = true;
    let waiting = entry.queues.waiting().unwrap_or(0);
    entry.taken_then = entry.queues.posted().wrapping_sub(waiting);
    let generation = shard.lanes.lanes.generation(lane);
    let due_ns = shard.now_ns + route.ack_timeout_ns;
    shard.timer(TimerKind::Lane, lane, generation, due_ns);
}

/// The timer of a lane.
pub(crate) fn overdue<R: Ring>(shard: &mut Shard<R>, lane: u32, generation: u32) {
    if !shard.lanes.lanes.is_current(lane, generation) || shard.lanes.lanes[lane].gone {
        return;
    }
    let entry = &mut shard.lanes.lanes[lane];
    entry.timer = false;
    let Some(news) = entry.last_news else {
        return;
    };
    let (waiting, taken) = (entry.queues.waiting(), entry.queues.was_taken(news));
    match (waiting, taken) {
        (Ok(_), Ok(true)) => {}
        (Ok(waiting), Ok(false))
            if entry.queues.posted().wrapping_sub(waiting) != entry.taken_then =>
        {
            watch(shard, lane);
        }
        (Ok(_), Ok(false)) => {
            shard.stats.shard.ack_timeouts.add(1);
            fault(shard, lane, "it does not take what is posted in time");
        }
        _ => fault(shard, lane, "it took more than was posted"),
    }
}

/// A lane is over: what it had goes elsewhere or fails.
fn detach<R: Ring>(shard: &mut Shard<R>, lane: u32) {
    let operation = shard.lanes.wake_operation(lane);
    let entry = &mut shard.lanes.lanes[lane];
    if std::mem::replace(&mut entry.gone, true) {
        return;
    }
    shard.ring.unwatch_wake(operation, entry.wake.as_raw_fd());
    let route = entry.route;
    for places in &mut shard.lanes.by_route {
        places.retain(|place| *place != lane);
    }
    shard.stats.shard.lanes_lost.add(1);
    count(shard);
    let jobs: Vec<u32> = shard.lanes.lanes[lane].jobs.slots().collect();
    for job in jobs {
        let entry = &mut shard.lanes.lanes[lane];
        let body = &entry.jobs[job];
        let Some(posted) = body.posted else {
            // Still arriving: a receive into its block may be under way.
            let downstream = body.downstream;
            shard.end_receive(downstream);
            continue;
        };
        let taken = entry.queues.was_taken(posted).unwrap_or(true);
        let waited_for = body.stream.is_some();
        if !taken
            && waited_for
            && let Some((other, job)) = take::transplant(shard, route, lane, job)
        {
            take::submit(shard, other, job);
            continue;
        }
        abandon(shard, lane, job);
    }
    forget_if_over(shard, lane);
}

/// A job is of no use any more; so its span ends.
pub(super) fn drop_job<R: Ring>(shard: &mut Shard<R>, lane: u32, job: u32, ending: Ending) {
    if let Some(job) = shard.lanes.lanes[lane].remove(job) {
        routed::end_as(shard, job.span, ending);
    }
}

/// The caller of a request is told that its worker has died.
fn abandon<R: Ring>(shard: &mut Shard<R>, lane: u32, job: u32) {
    let Some(job) = shard.lanes.lanes[lane].remove(job) else {
        return;
    };
    if let Some(stream) = job.stream {
        shard.stats.shard.lane_abandoned.add(1);
        let text = match job.began {
            true => "the worker died before it had responded in full",
            false => "the worker died before it began to respond",
        };
        let mut stream = stream.borrow_mut();
        stream.fail(&DynamoError::disconnected(text));
        stream.set_job(None);
    }
    routed::end_as(shard, job.span, Ending::Refused(Why::InstanceLost));
}

/// Where a job that still arrives belongs: if its lane is gone, another one is found, or its frame
/// is refused and passes by.
pub(super) fn rescue<R: Ring>(
    shard: &mut Shard<R>,
    slot: u32,
    lane: u32,
    job: u32,
) -> Option<(u32, u32)> {
    let entry = &shard.lanes.lanes[lane];
    if !entry.gone {
        return Some((lane, job));
    }
    let route = entry.route;
    let Intake::Lane { left, .. } = shard.connections[slot].intake else {
        return None;
    };
    let moved = take::transplant(shard, route, lane, job);
    if let Some((other, job)) = moved {
        forget_if_over(shard, lane);
        let lane = other;
        shard.connections[slot].intake = Intake::Lane { lane, job, left };
        return moved;
    }
    let body = &shard.lanes.lanes[lane].jobs[job];
    // What the intake says is left may be of before the bytes that have just arrived.
    let rest = u64::from(body.block_bytes - body.body_at - body.arrived);
    let rest = rest + body.trailing;
    let span = body.span;
    routed::turns(shard, span, Ending::Refused(Why::InstanceLost));
    take::undo(shard, lane, job);
    shard.connections[slot].intake = match rest {
        0 => Intake::Frames,
        left => Intake::Discard { left },
    };
    if !respond::refuse(shard, slot, Refusal::InstanceLost) {
        // Not even for the refusal is there room: the end of the connection says it, later.
        let handle = shard.connections[slot].handle;
        shard.ring.shutdown(handle);
    }
    None
}

/// Frees a lane that is gone once nothing arrives for it any more.
pub(super) fn forget_if_over<R: Ring>(shard: &mut Shard<R>, lane: u32) {
    let over = |lane: &Lane| lane.gone && lane.jobs.used() == 0;
    if shard.lanes.lanes.get(lane).is_some_and(over) {
        shard.lanes.lanes.remove(lane);
    }
}
