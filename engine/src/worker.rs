//! Requests for handlers of this process: taken whole, admitted or refused, acknowledged, run.
//!
//! ```text
//! frame -> admit -> ack -> envelope -> running (a slot) -> handler + call-home socket
//!            |                  |-----> queue, first come first served
//!            '-> refusal        '-----> cannot be decoded: its caller is called home with an error
//! ```

use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;

use corelane_codec::error::DynamoError;
use corelane_codec::request_frame::Prefix;

use crate::command::{LocalPath, Report};
use crate::connection::Intake;
use crate::decode::{self, WHOLE_BYTES_MAX};
use crate::ends::Ends;
use crate::executor::Spawner;
use crate::handler::{
    self, Arrived, CallHome, Handler, MakeHandler, NewHandler, Request, Task, Undecodable,
};
use crate::input::{self, Source};
use crate::mesh::budget::Budget;
use crate::mux_link::Links;
use crate::recv;
use crate::respond::{self, Refusal};
use crate::respond_stream::{self, Response};
use crate::responder::{Host, Responder};
use crate::ring::Ring;
use crate::served::{Busy, Spans};
use crate::shard::Shard;
use crate::stats::HandlerStats;
use crate::stats::flight::Kind;
use crate::table::Table;

/// Marks an index as that of a handler, where it could also be that of a route.
pub(crate) const LOCAL: u32 = 1 << 31;

/// Bytes of requests that wait or still arrive; beyond this requests are refused.
const HELD_BYTES_MAX: usize = 256 << 20;
/// Undecodable requests are reported this often at most; all are counted.
const REPORT_PAUSE_NS: u64 = 1_000_000_000;

/// A handler and where its requests are counted.
struct Served {
    handler: Rc<dyn Handler>,
    stats: Arc<HandlerStats>,
}

struct Waiting {
    handler: u32,
    busy: Busy,
    request: Request,
    home: CallHome,
    input: Option<CallHome>,
}

/// The handlers of one shard and the requests that they have.
pub(crate) struct Worker {
    handlers: Vec<Served>,
    at: HashMap<Vec<u8>, u32>,
    queue: VecDeque<Waiting>,
    queue_max: usize,
    /// Limits that are kept with other shards, in place of those here.
    budget: Option<Arc<Budget>>,
    running: usize,
    running_max: usize,
    /// Bytes of queued requests and of large frames that are arriving.
    held_bytes: usize,
    pub(crate) responses: Table<Response>,
    pub(crate) muxes: Links,
    pub(crate) inputs: Table<Source>,
    pub(crate) host: Host,
    pub(crate) spawner: Spawner,
    /// Slots may have become free since the queue was looked at.
    may_start: bool,
    pub(crate) touched: Vec<(u32, u32)>,
    reported_ns: u64,
    spans: Rc<Spans>,
}

impl Worker {
    pub(crate) fn new(ends: Ends, spawner: Spawner) -> Worker {
        let host = Host::default();
        let served = |make: MakeHandler| Served {
            handler: make(&host),
            stats: Arc::default(),
        };
        let handlers = ends.handlers.into_iter().map(served).collect();
        let spans = Rc::new(Spans::new(ends.tracing));
        // Beside those that run there are those whose caller has not closed his socket yet.
        let responses = if ends.running_max == 0 {
            0
        } else {
            2 * ends.running_max + 64
        };
        Worker {
            handlers,
            at: HashMap::new(),
            queue: VecDeque::new(),
            queue_max: ends.queue_max as usize,
            budget: ends.budget,
            running: 0,
            running_max: ends.running_max as usize,
            held_bytes: 0,
            responses: Table::new(responses as usize),
            muxes: Links::new(),
            inputs: Table::new(ends.running_max as usize),
            host,
            spawner,
            may_start: false,
            touched: Vec::new(),
            reported_ns: 0,
            spans,
        }
    }

    /// The handler at a path, marked as such.
    pub(crate) fn find(&self, path: &[u8]) -> Option<u32> {
        self.at.get(path).map(|handler| handler | LOCAL)
    }

    /// Takes in one more handler.
    pub(crate) fn add(&mut self, new: NewHandler) {
        let handler = (new.make)(&self.host);
        let stats = new.stats;
        self.handlers.push(Served { handler, stats });
    }

    /// Takes over which paths are served.
    pub(crate) fn serve(&mut self, paths: Vec<LocalPath>) {
        let known = self.handlers.len();
        let paths = paths
            .into_iter()
            .filter(|local| (local.handler as usize) < known);
        self.at = paths.map(|local| (local.path, local.handler)).collect();
    }

    /// Requests that wait.
    pub(crate) fn queued(&self) -> usize {
        self.queue.len()
    }

    /// Requests that run or wait.
    pub(crate) fn busy(&self) -> usize {
        self.running + self.queue.len()
    }

    /// The counters of a handler.
    fn count(&self, handler: u32) -> &Arc<HandlerStats> {
        &self.handlers[handler as usize].stats
    }

    fn admits(&self, bytes: usize) -> bool {
        let may_wait = match &self.budget {
            Some(budget) => budget.may_wait(),
            None => self.queue.len() < self.queue_max,
        };
        (self.may_run_at_once() || may_wait) && self.held_bytes + bytes <= HELD_BYTES_MAX
    }

    /// Whether there is a slot that nobody waits for.
    fn may_run_at_once(&self) -> bool {
        let clear = self.budget.as_ref().is_none_or(|budget| budget.is_clear());
        clear && self.queue.is_empty() && self.has_slot()
    }

    /// Whether requests wait for slots that other shards may free.
    pub(crate) fn waits_for_others(&self) -> bool {
        self.budget.is_some() && !self.queue.is_empty()
    }

    fn has_slot(&self) -> bool {
        let free = match &self.budget {
            Some(budget) => budget.may_run(),
            None => self.running < self.running_max,
        };
        free && !self.responses.is_full()
    }

    /// A large frame will not be completed.
    pub(crate) fn let_go(&mut self, bytes: usize) {
        self.held_bytes -= bytes.min(self.held_bytes);
    }

    pub(crate) fn take_slot(&mut self) {
        self.running += 1;
        if let Some(budget) = &self.budget {
            budget.run();
        }
    }

    pub(crate) fn free_slot(&mut self) {
        self.running -= 1;
        if let Some(budget) = &self.budget {
            budget.ran();
        }
        self.may_start = true;
    }
}

/// A frame for a handler is at the front of a connection. Returns whether to look again.
pub(crate) fn take<R: Ring>(
    shard: &mut Shard<R>,
    slot: u32,
    prefix: &Prefix,
    handler: u32,
) -> bool {
    let frame_bytes = prefix.frame_bytes();
    let may_wait = frame_bytes <= WHOLE_BYTES_MAX && shard.may_hold();
    let connection = &mut shard.connections[slot];
    let whole = connection.incoming.bytes() as u64 >= frame_bytes;
    if may_wait && !whole {
        connection.need = frame_bytes as usize;
        return false;
    }
    let bytes = frame_bytes as usize - prefix.path.end;
    if !shard.worker.admits(bytes) {
        shard.worker.count(handler).refused.add(1);
        return decode::refuse(shard, slot, prefix, Refusal::AtCapacity);
    }
    if whole && !respond::accept(shard, slot) {
        recv::crowd(shard, slot);
        return false;
    }
    let connection = &mut shard.connections[slot];
    connection.need = 0;
    connection.frames += 1;
    let path_bytes = prefix.path.end;
    shard.pieces.advance(&mut connection.incoming, path_bytes);
    connection.intake = Intake::Collect {
        handler,
        left: bytes as u64,
    };
    true
}

/// More of a frame has arrived. It is copied out at once, so that many half frames cannot hold all
/// receive buffers. Returns whether to look again.
pub(crate) fn collect<R: Ring>(shard: &mut Shard<R>, slot: u32, handler: u32, left: u64) -> bool {
    let connection = &mut shard.connections[slot];
    let here = (connection.incoming.bytes() as u64).min(left) as usize;
    // Who comes in pieces is acknowledged when he is whole.
    let pieced = left > here as u64 || !connection.collected.is_empty();
    if pieced && shard.worker.held_bytes + here > HELD_BYTES_MAX {
        return give_up(shard, slot, left);
    }
    let (incoming, collected) = (&mut connection.incoming, &mut connection.collected);
    shard.pieces.move_out(incoming, here, collected);
    connection.streamed += here as u64;
    let left = left - here as u64;
    connection.intake = Intake::Collect { handler, left };
    if pieced {
        shard.worker.held_bytes += here;
    }
    if left > 0 {
        return false;
    }
    if pieced {
        if !shard.worker.admits(0) {
            shard.worker.count(handler).refused.add(1);
            return give_up(shard, slot, 0);
        }
        if !respond::accept(shard, slot) {
            shard.lost(slot, libc::ENOBUFS);
            return false;
        }
    }
    let connection = &mut shard.connections[slot];
    connection.intake = Intake::Frames;
    let frame = std::mem::take(&mut connection.collected);
    if pieced {
        shard.worker.let_go(frame.len());
    }
    shard.stats.shard.requests.add(1);
    shard.note(Kind::Handled, handler, slot, frame.len() as u64);
    begin(shard, handler, frame);
    true
}

/// A frame in pieces that there is no room for any more is refused; `left` bytes of it pass by.
fn give_up<R: Ring>(shard: &mut Shard<R>, slot: u32, left: u64) -> bool {
    if !respond::refuse(shard, slot, Refusal::AtCapacity) {
        // Without a reply the caller would wait in vain: he is told by a closed connection.
        shard.lost(slot, libc::ENOBUFS);
        return false;
    }
    let connection = &mut shard.connections[slot];
    shard.worker.let_go(connection.collected.len());
    connection.collected = Vec::new();
    connection.intake = match left {
        0 => Intake::Frames,
        left => Intake::Discard { left },
    };
    true
}

/// An acknowledged request, without its path.
fn begin<R: Ring>(shard: &mut Shard<R>, handler: u32, frame: Vec<u8>) {
    let stats = shard.worker.count(handler);
    stats.requests.add(1);
    let takes = shard.worker.handlers[handler as usize].handler.takes();
    match handler::read(frame, takes) {
        Ok(Arrived { home, .. }) if home.plane() != shard.config.response_plane => {
            stats.undecodable.add(1);
            mismatched(shard, &home);
        }
        Ok(Arrived {
            request,
            home,
            input,
        }) => {
            stats.request_bytes.add(request.payload_bytes() as u64);
            let waiting = Waiting {
                handler,
                busy: Busy::new(stats, &shard.worker.spans),
                request,
                home,
                input,
            };
            if shard.worker.may_run_at_once() {
                start(shard, waiting);
            } else {
                shard.worker.held_bytes += waiting.request.held_bytes();
                shard.worker.queue.push_back(waiting);
                if let Some(budget) = &shard.worker.budget {
                    budget.wait();
                }
            }
        }
        Err(undecodable) => {
            stats.undecodable.add(1);
            complain(shard, undecodable);
        }
    }
}

/// The caller waits on another transport than this process is configured for: he is told there,
/// as Dynamo's worker does (spec/request-plane.md §6).
fn mismatched<R: Ring>(shard: &mut Shard<R>, home: &CallHome) {
    let (wanted, ours) = (home.plane().name(), shard.config.response_plane.name());
    let why =
        format!("response plane mismatch: frontend requested {wanted}, worker configured {ours}");
    let error = DynamoError::invalid_argument(why.clone());
    match respond_stream::open(shard, home, Default::default()) {
        Some(stream) => stream.borrow_mut().fail(&error),
        None => shard.stats.shard.callers_untold.add(1),
    }
    report(shard, why);
}

/// Nothing can be run, but the caller may be told.
pub(crate) fn complain<R: Ring>(shard: &mut Shard<R>, undecodable: Undecodable) {
    let Undecodable { home, why } = undecodable;
    shard.stats.shard.undecodable.add(1);
    let told = home.is_some_and(|home| {
        let error = DynamoError::invalid_argument(format!("the request cannot be decoded: {why}"));
        let opened = respond_stream::open(shard, &home, Default::default());
        if let Some(stream) = &opened {
            stream.borrow_mut().fail(&error);
        }
        opened.is_some()
    });
    if !told {
        shard.stats.shard.callers_untold.add(1);
    }
    report(shard, why);
}

fn report<R: Ring>(shard: &mut Shard<R>, why: String) {
    if shard.worker.reported_ns + REPORT_PAUSE_NS <= shard.now_ns {
        shard.worker.reported_ns = shard.now_ns;
        shard.report(Report::Undecodable { why });
    }
}

fn start<R: Ring>(shard: &mut Shard<R>, waiting: Waiting) {
    let Waiting {
        handler,
        mut busy,
        mut request,
        home,
        input,
    } = waiting;
    let Some(stream) = respond_stream::open(shard, &home, request.codec()) else {
        shard.stats.shard.callers_untold.add(1);
        return;
    };
    shard.stats.shard.handled.add(1);
    let mut responder = Responder::new(&stream);
    if let Some(input) = input {
        match input::open(shard, input, &stream) {
            Some(input) => responder.set_input(input),
            None => {
                let text = "the worker cannot dial for the request stream";
                let error = DynamoError::cannot_connect(text);
                return stream.borrow_mut().fail(&error);
            }
        }
    }
    busy.begin(&mut request, &stream);
    respond_stream::count(shard, &stream, busy);
    let handler = Rc::clone(&shard.worker.handlers[handler as usize].handler);
    let task = Task::new(handler, request, responder, stream);
    shard.worker.spawner.spawn(task);
}

/// Hands the spans of requests that have ended to control, as far as it takes them.
fn tell_spans<R: Ring>(shard: &mut Shard<R>) {
    while let Some(span) = shard.worker.spans.next() {
        if !shard.report(Report::Span(span)) {
            shard.stats.shard.spans_lost.add(1);
        }
    }
}

/// Gives free slots to those who wait.
pub(crate) fn start_waiting<R: Ring>(shard: &mut Shard<R>) {
    if !std::mem::take(&mut shard.worker.may_start) && !shard.worker.waits_for_others() {
        return;
    }
    tell_spans(shard);
    while shard.worker.has_slot() {
        let Some(waiting) = shard.worker.queue.pop_front() else {
            return;
        };
        shard.worker.let_go(waiting.request.held_bytes());
        if let Some(budget) = &shard.worker.budget {
            budget.waited();
        }
        start(shard, waiting);
    }
}
