//! One request that a handler of this process serves: counted, timed and, where that is asked for,
//! made a span of.
//!
//! ```text
//! arrived: new -> (waits for a slot) -> begin: the handler has it -> end: its slot is free
//!                                        |  span: child of the caller's traceparent, or a root
//!                                        '-> passed on by calls that the handler makes
//! ```

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use corelane_codec::headers;
use corelane_codec::trace_context::TraceContext;

use crate::draws::Draws;
use crate::handler::Request;
use crate::responder::{Shared, SoFar};
use crate::ring::monotonic_ns;
use crate::stats::HandlerStats;

/// Whether requests make spans (spec/events-discovery.md §9.3).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Tracing {
    /// They do not, and cost nothing.
    #[default]
    Off,
    /// They do.
    On {
        /// The part of traces, 0 to 1, that is kept of those that begin here. Where the caller
        /// sent a trace it has decided.
        ratio: f64,
    },
}

impl Tracing {
    /// Whether a trace that begins here is kept: 53 bits of its id are a number from 0 to 1.
    pub fn keeps(ratio: f64, trace_id_low: u64) -> bool {
        ((trace_id_low >> 11) as f64) < ratio * (1u64 << 53) as f64
    }
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Its response was written to the end.
    Finished,
    /// It was answered with an error.
    Failed,
    /// Its caller stopped or killed it.
    Cancelled,
    /// Its caller could not be called home.
    Unreachable,
    /// Its caller was lost before the end.
    CutOff,
}

impl Outcome {
    /// Its word in logs and spans.
    pub fn word(self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Unreachable => "unreachable",
            Self::CutOff => "cut_off",
        }
    }
}

/// A span that has ended: what a handler did with one request.
#[derive(Debug)]
pub struct SpanRecord {
    /// Trace, the span's own id, and flags.
    pub context: TraceContext,
    /// The caller's span.
    pub parent_id: Option<u64>,
    /// The caller's `tracestate`, untouched.
    pub tracestate: Option<String>,
    /// The request's id.
    pub request_id: String,
    /// The id that the caller's own client gave it.
    pub x_request_id: Option<String>,
    /// Who served it: [`HandlerStats::id`] and [`HandlerStats::instance`].
    pub handler: Arc<HandlerStats>,
    /// Unix time at which the handler got it, in ns.
    pub began_unix_ns: u64,
    /// From then to the end of the response.
    pub duration_ns: u64,
    /// Of that, the time that the handler was at work.
    pub busy_ns: u64,
    /// How it ended.
    pub outcome: Outcome,
}

impl PartialEq for SpanRecord {
    fn eq(&self, other: &Self) -> bool {
        self.context == other.context
    }
}

impl Eq for SpanRecord {}

/// The spans of one shard.
pub(crate) struct Spans {
    tracing: Tracing,
    draws: Draws,
    ended: RefCell<VecDeque<Box<SpanRecord>>>,
}

impl Spans {
    pub(crate) fn new(tracing: Tracing) -> Self {
        Self {
            tracing,
            draws: Draws::new(),
            ended: RefCell::default(),
        }
    }

    /// The next span that has ended.
    pub(crate) fn next(&self) -> Option<Box<SpanRecord>> {
        self.ended.borrow_mut().pop_front()
    }
}

/// A request from its arrival to its end.
pub(crate) struct Busy {
    stats: Arc<HandlerStats>,
    spans: Rc<Spans>,
    /// When it arrived, then when its handler got it.
    since_ns: u64,
    begun: bool,
    span: Option<Box<SpanRecord>>,
}

impl Busy {
    /// A request has arrived.
    pub(crate) fn new(stats: &Arc<HandlerStats>, spans: &Rc<Spans>) -> Busy {
        stats.busy.set(stats.busy.get() + 1);
        Busy {
            stats: Arc::clone(stats),
            spans: Rc::clone(spans),
            since_ns: monotonic_ns(),
            begun: false,
            span: None,
        }
    }

    /// Its handler gets it.
    pub(crate) fn begin(&mut self, request: &mut Request, stream: &Shared) {
        let now_ns = monotonic_ns();
        let waited_ns = now_ns.saturating_sub(self.since_ns);
        self.stats.times.slot_wait.record(waited_ns);
        self.since_ns = now_ns;
        self.begun = true;
        let Tracing::On { ratio } = self.spans.tracing else {
            return;
        };
        let parent = request.callers_trace();
        let context = self.spans.draws.context(parent, ratio);
        let text = |name| request.header(name).map(|text| text.to_cow().into_owned());
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH);
        self.span = Some(Box::new(SpanRecord {
            context,
            parent_id: parent.map(|parent| parent.span_id),
            tracestate: parent.and_then(|_| text(headers::TRACESTATE)),
            request_id: request.id().to_owned(),
            x_request_id: text(headers::CLIENT_REQUEST_ID),
            handler: Arc::clone(&self.stats),
            began_unix_ns: since_epoch.map_or(0, |time| time.as_nanos() as u64),
            duration_ns: 0,
            busy_ns: 0,
            outcome: Outcome::Finished,
        }));
        request.set_trace(context);
        stream.borrow_mut().time();
    }

    /// It has ended, early or with all that `so_far` says.
    pub(crate) fn end(mut self, early: Option<Outcome>, so_far: SoFar) {
        self.finish(early, so_far);
    }

    fn finish(&mut self, early: Option<Outcome>, so_far: SoFar) {
        if !std::mem::take(&mut self.begun) {
            return;
        }
        let duration_ns = monotonic_ns().saturating_sub(self.since_ns);
        let stats = &self.stats;
        stats.times.duration.record(duration_ns);
        stats.response_bytes.add(so_far.bytes);
        if so_far.began_ns > 0 {
            let first_ns = so_far.began_ns.saturating_sub(self.since_ns);
            stats.times.first_response.record(first_ns);
        }
        let answered = match so_far.failed {
            true => Outcome::Failed,
            false => Outcome::Finished,
        };
        let outcome = early.unwrap_or(answered);
        match outcome {
            Outcome::Finished => {}
            Outcome::Failed => stats.error_answers.add(1),
            Outcome::Cancelled => stats.cancelled.add(1),
            Outcome::Unreachable => stats.unreachable.add(1),
            Outcome::CutOff => stats.cut_off.add(1),
        }
        if let Some(mut span) = self.span.take() {
            span.duration_ns = duration_ns;
            span.busy_ns = so_far.busy_ns;
            span.outcome = outcome;
            // Told in this turn of the shard, so there are never more than slots.
            self.spans.ended.borrow_mut().push_back(span);
        }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        // Its response could not even be begun: what can be said has been said by `end` before.
        self.finish(Some(Outcome::Unreachable), SoFar::default());
        let busy = &self.stats.busy;
        busy.set(busy.get().saturating_sub(1));
    }
}
