//! Lanes: workers of this host that share memory with us instead of a connection.
//!
//! ```text
//! caller --frame--> take --block in the slab, descriptor--> worker process
//!                    |   the kernel writes the body there
//!                    '-- respond_stream: dials the caller
//! caller <--items--- respond_stream <-- answer <--descriptors, blocks-- worker process
//! ```
//!
//! Here are the nouns: lanes, the requests (*jobs*) that they have, and the choice of one. A
//! worker may write anything to the shared memory at any time. What we rely on is kept in memory
//! of our own; what it says is copied out, then checked; a lie ends its lanes (`life`).

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use corelane_codec::control_message::PayloadCodec;
use corelane_gpu_mem::lane::LaneError;
use corelane_gpu_mem::lane::area::Area;
use corelane_gpu_mem::lane::attach::LaneFds;
use corelane_gpu_mem::lane::layout::{
    BLOCK_UNIT, BlockHead, Codec, Descriptor, Kind, LaneHead, Wish,
};
use corelane_gpu_mem::lane::memory::Mapping;
use corelane_gpu_mem::lane::queue::{Queues, Side};
use zerocopy::little_endian::U32;

use crate::handler::CallHome;
use crate::in_flight::TRIED_MAX;
use crate::load::Work;
use crate::operation::{Kind as OperationKind, Operation};
use crate::responder::Shared;
use crate::ring::Ring;
use crate::route::Candidates;
use crate::shard::Shard;
use crate::table::{NONE, Table};
use crate::weigh::{Barrier, Seen, Weighed, Weighing};

mod answer;
mod life;
mod take;

pub(crate) use answer::{poll, settle};
pub(crate) use life::{attach, end, overdue, woken};
pub(crate) use take::{fill, landed, room, take, undo};

/// Lanes of one shard, at most.
pub const LANES_MAX: usize = 16;
/// Requests of one lane between arrival and end, at most.
pub const JOBS_MAX: usize = 512;
/// Responses that all lanes of a shard can have at once.
pub const RESPONSES_MAX: u32 = (LANES_MAX * JOBS_MAX) as u32;
/// Item blocks of one lane that wait for their callers, at most.
const LENT_MAX: usize = 4096;
/// Descriptors that wait for room in a full queue; more means that nobody takes them.
const BACKLOG_MAX: usize = 3 * LENT_MAX;

/// A lane as control hands it to a shard.
#[derive(Debug)]
pub struct NewLane {
    /// Index of its route in the directory.
    pub route: u32,
    /// The worker; the same for its lanes to all shards.
    pub worker: u64,
    head: LaneHead,
    queues: Queues,
    slab: Mapping,
    wake: OwnedFd,
    wake_worker: OwnedFd,
}

impl NewLane {
    /// Maps what was made for the lane that `head` describes.
    ///
    /// # Errors
    /// No addresses or descriptors are left.
    pub fn new(route: u32, head: &LaneHead, fds: LaneFds) -> Result<NewLane, LaneError> {
        let queues = Mapping::new(&fds.queues, head.queue_bytes() as u64)?;
        Ok(NewLane {
            route,
            worker: head.worker.get(),
            head: *head,
            queues: Queues::new(queues, head, Side::Router)?,
            slab: Mapping::new(&fds.slab, head.slab_bytes.get())?,
            wake: fds.wake_router,
            wake_worker: fds.wake_worker,
        })
    }
}

/// One worker, as this shard reaches it.
pub(crate) struct Lane {
    route: u32,
    worker: u64,
    queues: Queues,
    slab: Rc<Mapping>,
    /// The first byte of the worker's part of the slab.
    items_at: u64,
    area: Area,
    jobs: Table<Job>,
    /// Descriptors that found the queue full, in order.
    backlog: VecDeque<Descriptor>,
    /// Item blocks that have not been released.
    lent: usize,
    wake: OwnedFd,
    wake_worker: OwnedFd,
    /// What was posted since the worker was looked after: it may have to be woken.
    news: Option<Kind>,
    /// It wants no new requests.
    closing: bool,
    /// It has been given up; what is left are frames that still arrive for it.
    gone: bool,
    /// A timer looks whether it takes what is posted.
    timer: bool,
    /// What it had taken when the timer was set.
    taken_then: u32,
    /// The number of the last descriptor that it has to take soon. That blocks are free it may
    /// hear when it likes: nobody wakes it for that.
    last_news: Option<u32>,
}

/// A request that a lane has.
pub(crate) struct Job {
    home: Option<CallHome>,
    stream: Option<Shared>,
    hint: u64,
    /// Its block in the slab: offset, size; size 0 once it was given back.
    block: u64,
    block_bytes: u32,
    /// Where the body begins in the block.
    body_at: u32,
    /// Bytes of the id and of the headers, which lie before it.
    id_bytes: u32,
    headers_bytes: u32,
    /// Bytes of the body that are there.
    arrived: u32,
    /// The connection that it still arrives on.
    downstream: u32,
    /// Bytes of the frame behind the body, which mean nothing.
    trailing: u64,
    codec: PayloadCodec,
    /// The number under which it was posted.
    posted: Option<u32>,
    /// An item has gone to its caller.
    began: bool,
    /// Its items that have not been released.
    items: u32,
    attempts: u8,
    tried: [u64; TRIED_MAX],
    /// Its span; [`NONE`] as a rule.
    span: u32,
}

/// Whom a job was tried on.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tried {
    attempts: u8,
    ids: [u64; TRIED_MAX],
}

impl Tried {
    fn has(&self, id: u64) -> bool {
        self.ids[..usize::from(self.attempts).min(TRIED_MAX)].contains(&id)
    }

    fn add(&mut self, id: u64) {
        self.ids[usize::from(self.attempts) % TRIED_MAX] = id;
        self.attempts = self.attempts.saturating_add(1);
    }
}

impl Job {
    /// What its block begins with. From our own memory: what stands in the slab a worker can have
    /// changed, and the next one would believe it.
    fn head(&self) -> BlockHead {
        BlockHead {
            body_at: U32::new(self.body_at),
            body_bytes: U32::new(self.block_bytes - self.body_at),
            id_bytes: U32::new(self.id_bytes),
            headers_bytes: U32::new(self.headers_bytes),
            codec: match self.codec {
                PayloadCodec::Json => Codec::Json,
                PayloadCodec::MessagePack => Codec::MessagePack,
            } as u8,
            zero: [0; 47],
        }
    }

    fn tried(&self) -> Tried {
        Tried {
            attempts: self.attempts,
            ids: self.tried,
        }
    }

    fn set_tried(&mut self, tried: Tried) {
        (self.attempts, self.tried) = (tried.attempts, tried.ids);
    }
}

impl Lane {
    fn new(new: NewLane) -> Lane {
        let requests = new.head.request_bytes.get();
        Lane {
            route: new.route,
            worker: new.worker,
            queues: new.queues,
            slab: Rc::new(new.slab),
            items_at: requests,
            area: Area::new(0, requests, BLOCK_UNIT),
            jobs: Table::new(JOBS_MAX),
            backlog: VecDeque::new(),
            lent: 0,
            wake: new.wake,
            wake_worker: new.wake_worker,
            news: None,
            closing: false,
            gone: false,
            timer: false,
            taken_then: 0,
            last_news: None,
        }
    }

    /// Posts a descriptor, or keeps it until there is room.
    fn post(&mut self, descriptor: &Descriptor, kind: Kind) -> Result<(), &'static str> {
        if kind != Kind::Released {
            self.last_news = Some(self.queues.posted());
        }
        if self.news != Some(Kind::Request) {
            self.news = Some(match kind {
                Kind::Released => Kind::Released,
                _ => Kind::Request,
            });
        }
        if self.backlog.is_empty() && self.queues.post(descriptor).map_err(why)? {
            return Ok(());
        }
        if self.backlog.len() >= BACKLOG_MAX {
            return Err("it takes none of what is posted");
        }
        self.backlog.push_back(*descriptor);
        Ok(())
    }

    /// Posts what waits, as far as there is room.
    fn work_off(&mut self) -> Result<(), &'static str> {
        while let Some(descriptor) = self.backlog.front() {
            if !self.queues.post(descriptor).map_err(why)? {
                break;
            }
            self.backlog.pop_front();
            self.news.get_or_insert(Kind::Released);
        }
        Ok(())
    }

    /// Gives the block of a request back.
    fn free_block(&mut self, job: u32) {
        let entry = &mut self.jobs[job];
        let bytes = std::mem::take(&mut entry.block_bytes);
        if bytes > 0 {
            self.area.give(entry.block, u64::from(bytes));
        }
    }

    /// Forgets a request and frees its block.
    fn remove(&mut self, job: u32) -> Option<Job> {
        self.free_block(job);
        self.jobs.remove(job)
    }

    fn has_room(&self, block_bytes: u64) -> bool {
        !self.closing
            && !self.gone
            && !self.jobs.is_full()
            && self.backlog.is_empty()
            && self.area.fits(block_bytes)
    }
}

/// What is said about a lie.
fn why(error: LaneError) -> &'static str {
    match error {
        LaneError::Broken(why) => why,
        _ => "its queues are broken",
    }
}

/// All lanes of a shard.
pub(crate) struct Lanes {
    lanes: Table<Lane>,
    /// Slots by route.
    by_route: Vec<Vec<u32>>,
    /// Some route goes to lanes: what callers send is received so that bodies can go there.
    pub(crate) expected: bool,
    /// The fronts of frames that are being looked at.
    scratch: Vec<u8>,
    /// Bytes that were told to look again because a poll did not take everything.
    more: bool,
}

impl Lanes {
    /// None.
    pub(crate) fn new() -> Lanes {
        Lanes {
            lanes: Table::new(LANES_MAX),
            by_route: Vec::new(),
            expected: false,
            scratch: Vec::new(),
            more: false,
        }
    }

    /// Whether a worker has posted something that was not looked at.
    pub(crate) fn is_ready(&self) -> bool {
        self.more || self.alive().any(|slot| self.lanes[slot].queues.is_ready())
    }

    /// Tells all workers whether we are about to sleep.
    pub(crate) fn wish(&self, wish: Wish) {
        for slot in self.alive() {
            self.lanes[slot].queues.wish(wish);
        }
    }

    /// Whether there is a lane at all.
    pub(crate) fn is_empty(&self) -> bool {
        self.lanes.used() == 0
    }

    fn alive(&self) -> impl Iterator<Item = u32> + use<'_> {
        self.by_route.iter().flatten().copied()
    }

    /// Requests of all lanes.
    pub(crate) fn jobs(&self) -> usize {
        let slots = self.lanes.slots();
        slots.map(|slot| self.lanes[slot].jobs.used()).sum()
    }

    fn key(&self, lane: u32) -> (u32, u32) {
        (lane, self.lanes.generation(lane))
    }

    fn of_route(&self, route: u32) -> &[u32] {
        self.by_route.get(route as usize).map_or(&[], Vec::as_slice)
    }

    fn wake_operation(&self, lane: u32) -> Operation {
        Operation::new(OperationKind::Wake, lane + 1, self.lanes.generation(lane))
    }
}

/// The lanes of a route, for the choice of one.
struct View<'a> {
    lanes: &'a Lanes,
    places: &'a [u32],
    tried: Tried,
    block_bytes: u64,
}

impl Candidates for View<'_> {
    fn len(&self) -> usize {
        self.places.len()
    }

    fn is_routable(&self, place: usize) -> bool {
        let lane = &self.lanes.lanes[self.places[place]];
        lane.has_room(self.block_bytes) && !self.tried.has(lane.worker)
    }

    fn id(&self, place: usize) -> u64 {
        self.lanes.lanes[self.places[place]].worker
    }

    fn load(&self, place: usize) -> f64 {
        self.lanes.lanes[self.places[place]].jobs.used() as f64
    }
}

/// What the policy of a route would choose among its lanes.
pub(crate) fn weigh<R: Ring>(shard: &Shard<R>, route: u32, hint: u64) -> Weighing {
    let policy = shard.directory.routes[route as usize].policy;
    let view = View {
        lanes: &shard.lanes,
        places: shard.lanes.of_route(route),
        tried: Tried::default(),
        block_bytes: BLOCK_UNIT,
    };
    let mut chooser = shard.routes[route as usize].chooser.clone();
    let chosen = chooser.choose(policy, hint, &view);
    let weighed = |place: usize| {
        let lane = &view.lanes.lanes[view.places[place]];
        let barrier = match lane.closing || lane.gone {
            true => Some(Barrier::Closing),
            false => (!view.is_routable(place)).then_some(Barrier::QueueFull),
        };
        let jobs = lane.jobs.used() as u32;
        Weighed {
            id: lane.worker,
            address: None,
            barrier,
            overlap_blocks: 0,
            busy: Work {
                requests: f64::from(jobs),
                ..Work::default()
            },
            is_reported: false,
            load: view.load(place),
            cost: 0.0,
            seen: Seen {
                streams: jobs,
                ..Seen::default()
            },
        }
    };
    Weighing {
        candidates: (0..view.len()).map(weighed).collect(),
        chosen: chosen.map(|place| view.id(place)),
        ..Weighing::default()
    }
}

const _: () = assert!(NONE > LANES_MAX as u32);
