//! The load of `server`, on a shard of its own: callers that wait for their replies, or requests
//! that are sent when they are due whatever has become of those before.
//!
//! ```text
//!            warm-up          window                        drain
//!   ------------------|O------------------------------|-----------------|C   open loop
//!   ------------------|O------------------------------|C-----------------    closed loop
//! ```
//! At O and C counters are read. Latencies are of requests that are due between O and the end of
//! the window, from when they were due (no coordinated omission).

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use corelane::component::{Client, Deadlines, Ending, LocalClient, PayloadCodec, Shard};
use corelane_codec::item;
use hdrhistogram::Histogram;
use serde::de::IgnoredAny;
use serde_json::Value;

use crate::arrivals::Schedule;
use crate::hiccup::set_timer_slack;
use crate::load::Edge;
use crate::report::new_histogram;
use crate::server::Until;
use crate::stock::Load;

/// What is sent, in both codecs.
pub(crate) struct Request {
    json: Vec<u8>,
    packed: Vec<u8>,
    headers: Vec<(String, String)>,
}

impl Request {
    /// Of a value.
    pub(crate) fn new(value: &Value, headers: Vec<(String, String)>) -> anyhow::Result<Self> {
        let (mut json, mut packed) = (Vec::new(), Vec::new());
        item::write_value(value, PayloadCodec::Json, &mut json)?;
        item::write_value(value, PayloadCodec::MessagePack, &mut packed)?;
        Ok(Self {
            json,
            packed,
            headers,
        })
    }
}

/// One slice.
#[derive(Clone)]
pub(crate) struct Plan {
    /// Who is called.
    pub(crate) client: Client,
    /// With what.
    pub(crate) request: Arc<Request>,
    /// How.
    pub(crate) load: Load,
    /// What ends a request for [`Found::intervals`].
    pub(crate) until: Until,
    /// Load that is not counted, before.
    pub(crate) warmup: Duration,
    /// The measured window.
    pub(crate) window: Duration,
    /// Pieces of it.
    pub(crate) interval: Duration,
    /// What a request may take.
    pub(crate) timeout: Duration,
    /// Open loop: requests under way, at most.
    pub(crate) in_flight_max: usize,
    /// Arrivals of different seeds differ.
    pub(crate) seed: u64,
}

/// What a slice found; latencies in ns.
pub(crate) struct Found {
    /// Of each interval of the window, to what [`Plan::until`] says.
    pub(crate) intervals: Vec<Histogram<u64>>,
    /// To the acknowledgement.
    pub(crate) ack_ns: Histogram<u64>,
    /// To the first item.
    pub(crate) first_ns: Histogram<u64>,
    /// To the end of the response.
    pub(crate) end_ns: Histogram<u64>,
    /// Open loop: how late the generator itself sent.
    pub(crate) lag_ns: Histogram<u64>,
    /// Requests that have ended well between the two edges.
    pub(crate) replies: u64,
    /// Requests that have failed, and those that were dropped.
    pub(crate) errors: u64,
    /// Open loop: due requests that were not sent, because too many were under way.
    pub(crate) dropped: u64,
    /// The first failure.
    pub(crate) error: Option<String>,
    /// From the first edge to the last reply of the window, or to its end.
    pub(crate) elapsed: Duration,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Warmup,
    Window,
    Drain,
    Over,
}

struct State {
    phase: Phase,
    until: Until,
    interval: Duration,
    window_start: Instant,
    window_end: Instant,
    last_reply: Instant,
    is_open: bool,
    in_flight: usize,
    /// Requests of the window that still want their end.
    owed: usize,
    found: Found,
}

type Shared = Rc<RefCell<State>>;

/// When the steps of a request happened.
struct Steps {
    ack: Option<Instant>,
    first: Option<Instant>,
    end: Instant,
}

/// Runs a slice on this shard; `edge` is called at both ends of what counters see.
pub(crate) async fn run(shard: Shard, plan: Plan, mut edge: impl FnMut(Edge)) -> Found {
    set_timer_slack();
    let slice = Slice::new(shard, plan);
    match slice.plan.load {
        Load::Closed(callers) => slice.closed(callers, &mut edge).await,
        Load::Open(arrivals, rate) => {
            let schedule = |part: u64| Schedule::new(arrivals, rate, slice.plan.seed * 2 + part);
            let warm = Instant::now() + slice.plan.warmup;
            slice.send_due(schedule(1), Instant::now(), warm).await;
            slice.open_window(&mut edge);
            let (start, end) = slice.window();
            slice.send_due(schedule(0), start, end).await;
            slice.drain(&mut edge).await;
        }
    }
    // Whoever still waits keeps a state of his own from here on.
    let over = State::new(&slice.plan);
    let mut state = slice.state.replace(over);
    let end = state.last_reply.max(state.window_end);
    state.found.elapsed = match state.is_open {
        true => end - state.window_start,
        false => state.window_end - state.window_start,
    };
    state.found
}

/// One request before all others; what went wrong, if anything did.
pub(crate) async fn once(shard: Shard, plan: Plan) -> Result<(), String> {
    Slice::new(shard, plan).call().await.map(drop)
}

#[derive(Clone)]
struct Slice {
    shard: Shard,
    client: LocalClient,
    codec: PayloadCodec,
    plan: Plan,
    state: Shared,
}

impl Slice {
    fn new(shard: Shard, plan: Plan) -> Self {
        Self {
            client: shard.client(&plan.client),
            codec: plan.client.codec(),
            shard,
            state: Rc::new(RefCell::new(State::new(&plan))),
            plan,
        }
    }

    /// Callers that wait for their replies, until the window is over.
    async fn closed(&self, callers: u32, edge: &mut impl FnMut(Edge)) {
        for _ in 0..callers {
            let slice = self.clone();
            let spawned = self.shard.spawn(async move {
                while slice.state.borrow().phase != Phase::Over {
                    let due = Instant::now();
                    let counts = slice.state.borrow_mut().begin(due);
                    if !slice.one(due, counts).await {
                        // Whatever fails at once must not keep everybody else from running.
                        slice.shard.sleep(Duration::from_millis(1)).await;
                    }
                }
            });
            if !spawned {
                self.state
                    .borrow_mut()
                    .drop_one("the load generator has no room for a caller");
            }
        }
        self.shard.sleep(self.plan.warmup).await;
        self.open_window(edge);
        let (_, end) = self.window();
        self.shard
            .sleep(end.saturating_duration_since(Instant::now()))
            .await;
        edge(Edge::Close);
        self.state.borrow_mut().phase = Phase::Over;
        while self.state.borrow().in_flight > 0 {
            self.shard.sleep(Duration::from_millis(1)).await;
        }
    }

    fn open_window(&self, edge: &mut impl FnMut(Edge)) {
        edge(Edge::Open);
        let mut state = self.state.borrow_mut();
        let now = Instant::now();
        state.phase = Phase::Window;
        (state.window_start, state.window_end) = (now, now + self.plan.window);
        state.last_reply = now;
        (state.found.replies, state.found.errors, state.found.dropped) = (0, 0, 0);
        state.found.error = None;
    }

    fn window(&self) -> (Instant, Instant) {
        let state = self.state.borrow();
        (state.window_start, state.window_end)
    }

    /// Sends what is due from `start` to `end`, when it is.
    async fn send_due(&self, mut schedule: Schedule, start: Instant, end: Instant) {
        /// So many at once, then replies are looked at.
        const BATCH: usize = 32;
        loop {
            let mut sent = 0;
            let now = Instant::now();
            loop {
                let due = start + Duration::from_nanos(schedule.due_ns());
                if due >= end {
                    if now >= end {
                        return;
                    }
                    break;
                }
                if due > now || sent == BATCH {
                    break;
                }
                schedule.advance();
                self.send(due, now);
                sent += 1;
            }
            let due = start + Duration::from_nanos(schedule.due_ns());
            match due.min(end).checked_duration_since(Instant::now()) {
                Some(pause) if !pause.is_zero() => self.shard.sleep(pause).await,
                _ => turn().await,
            }
        }
    }

    /// One request of the open loop.
    fn send(&self, due: Instant, now: Instant) {
        let mut state = self.state.borrow_mut();
        if state.phase == Phase::Window {
            let lag_ns = (now - due).as_nanos() as u64;
            state.found.lag_ns.saturating_record(lag_ns.max(1));
        }
        if state.in_flight >= self.plan.in_flight_max {
            state.drop_one("too many requests were under way (--in-flight-max)");
            return;
        }
        let counts = state.begin(due);
        drop(state);
        let slice = self.clone();
        let request = async move {
            slice.one(due, counts).await;
        };
        if !self.shard.spawn(request) {
            let mut state = self.state.borrow_mut();
            state.forget(counts);
            state.drop_one("the load generator has no room for another request");
        }
    }

    /// Until every request of the window has ended, well or badly.
    async fn drain(&self, edge: &mut impl FnMut(Edge)) {
        self.state.borrow_mut().phase = Phase::Drain;
        let patience = Instant::now() + self.plan.timeout + Duration::from_secs(5);
        while self.state.borrow().owed > 0 && Instant::now() < patience {
            self.shard.sleep(Duration::from_micros(200)).await;
        }
        edge(Edge::Close);
        let mut state = self.state.borrow_mut();
        state.phase = Phase::Over;
        if state.owed > 0 {
            state.found.errors += state.owed as u64;
            let why = "requests did not end in time";
            state.found.error.get_or_insert_with(|| why.to_owned());
        }
    }

    /// One request, to its end; whether that was good.
    async fn one(&self, due: Instant, counts: bool) -> bool {
        let outcome = self.call().await;
        let is_good = outcome.is_ok();
        self.state.borrow_mut().end(due, counts, outcome);
        is_good
    }

    async fn call(&self) -> Result<Steps, String> {
        let request = &self.plan.request;
        let body = match self.codec {
            PayloadCodec::Json => request.json.clone(),
            PayloadCodec::MessagePack => request.packed.clone(),
        };
        let mut call = self.plan.client.request_encoded(self.codec, body);
        call = call.deadlines(Deadlines {
            ack: self.plan.timeout,
            first_item: self.plan.timeout,
            total: self.plan.timeout,
        });
        for (name, value) in &request.headers {
            call = call.header(name, value);
        }
        let began = Instant::now();
        let started = self.client.start(call).await;
        let mut reply = started.map_err(|error| error.to_string())?;
        let (mut first, mut failed) = (None, None);
        while let Some(item) = reply.next::<IgnoredAny>().await {
            first.get_or_insert_with(Instant::now);
            if let Err(error) = item {
                failed.get_or_insert_with(|| error.to_string());
            }
        }
        let end = Instant::now();
        match (failed, reply.ending()) {
            (None, Some(Ending::Complete)) => Ok(Steps {
                ack: reply.times().accepted.map(|after| began + after),
                first,
                end,
            }),
            (Some(error), _) => Err(error),
            (None, _) => Err("the response broke off".into()),
        }
    }
}

impl State {
    fn new(plan: &Plan) -> Self {
        let now = Instant::now();
        let pieces = plan.window.as_secs_f64() / plan.interval.as_secs_f64();
        Self {
            phase: Phase::Warmup,
            until: plan.until,
            interval: plan.interval,
            window_start: now,
            window_end: now,
            last_reply: now,
            is_open: matches!(plan.load, Load::Open(..)),
            in_flight: 0,
            owed: 0,
            found: Found {
                intervals: vec![new_histogram(); (pieces.ceil() as usize).max(1)],
                ack_ns: new_histogram(),
                first_ns: new_histogram(),
                end_ns: new_histogram(),
                lag_ns: new_histogram(),
                replies: 0,
                errors: 0,
                dropped: 0,
                error: None,
                elapsed: Duration::ZERO,
            },
        }
    }

    /// Whether the request counts as one of the window.
    fn begin(&mut self, due: Instant) -> bool {
        self.in_flight += 1;
        let is_due = due >= self.window_start && due < self.window_end;
        let counts = self.phase == Phase::Window && is_due;
        self.owed += usize::from(counts);
        counts
    }

    fn forget(&mut self, counts: bool) {
        self.in_flight = self.in_flight.saturating_sub(1);
        self.owed = self.owed.saturating_sub(usize::from(counts));
    }

    fn end(&mut self, due: Instant, counts: bool, outcome: Result<Steps, String>) {
        self.forget(counts);
        // What a caller still waited for at the end is too late to count, but not to have failed.
        if self.phase == Phase::Over && (self.is_open || outcome.is_ok()) {
            return;
        }
        let steps = match outcome {
            Ok(steps) => steps,
            Err(error) => {
                self.found.errors += 1;
                self.found.error.get_or_insert(error);
                return;
            }
        };
        self.found.replies += 1;
        self.last_reply = steps.end;
        if !counts || (!self.is_open && steps.end > self.window_end) {
            return;
        }
        let ns = |at: Instant| (at.saturating_duration_since(due).as_nanos() as u64).max(1);
        let found = &mut self.found;
        found.end_ns.saturating_record(ns(steps.end));
        if let Some(ack) = steps.ack {
            found.ack_ns.saturating_record(ns(ack));
        }
        if let Some(first) = steps.first {
            found.first_ns.saturating_record(ns(first));
        }
        let until = match self.until {
            Until::Ack => steps.ack,
            Until::First => steps.first,
            Until::End => Some(steps.end),
        };
        let since = due - self.window_start;
        let place = (since.as_secs_f64() / self.interval.as_secs_f64()) as usize;
        let place = place.min(found.intervals.len() - 1);
        if let Some(until) = until {
            found.intervals[place].saturating_record(ns(until));
        }
    }

    fn drop_one(&mut self, why: &str) {
        self.found.errors += 1;
        self.found.dropped += 1;
        self.found.error.get_or_insert_with(|| why.to_owned());
    }
}

/// Lets everybody else on the shard run once.
fn turn() -> impl Future<Output = ()> {
    let mut was_here = false;
    poll_fn(move |context| {
        if was_here {
            return Poll::Ready(());
        }
        was_here = true;
        context.waker().wake_by_ref();
        Poll::Pending
    })
}
