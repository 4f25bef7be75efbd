//! The spans of requests that are routed: one for each that is kept, told to control when the
//! request is over.
//!
//! ```text
//! begin     a frame becomes a request: is it kept?  no: NONE, and that was all
//! chosen    an instance gets it
//! answered  that has answered, or has called home
//! turns     a refusal, or what became of its response
//! end       request and response are over --RoutedSpan, by the queue of reports--> control
//! ```
//!
//! A span stands beside the worker's own: both are children of the caller's, since headers pass
//! through as they came. What it says was measured already: all times are those of ticks. Where
//! spans are off a request costs one branch here and a few comparisons with [`NONE`]; where they
//! are on, one look at its headers.

use std::net::SocketAddr;
use std::sync::Arc;

use corelane_codec::headers::{self, Rare};
use corelane_codec::json::Text;
use corelane_codec::request_frame::Prefix;
use corelane_codec::trace_context::{TEXT_BYTES, TraceContext};

use crate::command::Report;
use crate::directory::Route;
use crate::draws::Draws;
use crate::due::TimerKind;
use crate::in_flight::Request;
use crate::mesh::QUEUE_MAX;
use crate::ring::Ring;
use crate::served::{Outcome, Tracing};
use crate::shard::Shard;
use crate::short_text::{BYTES_MAX, ShortText};
use crate::stats::flight::{Answered, Relayed, Why};
use crate::table::{NONE, Table};

/// Requests of one shard that have a span at the same time, at most; others are counted as lost.
pub const SPANS_MAX: usize = 4096;
/// Entries of the queue of reports that spans leave to what is said once.
const ROOM_BESIDE_SPANS: usize = 64;
/// Control sleeps on while there is so much room in that queue ...
const ROOM_TO_SLEEP: usize = QUEUE_MAX / 2;
/// ... but no longer than this: to be woken for each span costs it more than the span does.
const SLEEP_NS: u64 = 10_000_000;

/// How the response of a request goes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The worker dials the caller.
    Direct,
    /// It passes through this shard.
    Relay,
    /// It leaves a lane, and this shard writes it.
    Lane,
}

impl Mode {
    /// That of a route.
    fn of(route: Option<&Route>) -> Mode {
        match route {
            Some(route) if route.lane => Self::Lane,
            Some(route) if route.relay.is_some() => Self::Relay,
            _ => Self::Direct,
        }
    }

    /// Its word in logs and spans.
    pub fn word(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Relay => "relay",
            Self::Lane => "lane",
        }
    }
}

/// How a request ended, in the words of the flight recorder and of served requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Nobody has said anything: its sender went away before it was whole, for example.
    Unanswered,
    /// So its instance has answered.
    Answered(Answered),
    /// It was refused, or its caller was told that it failed.
    Refused(Why),
    /// That became of its response.
    Relayed(Relayed),
    /// That became of the response that a worker behind a lane gave.
    Served(Outcome),
}

impl Ending {
    /// Its word in logs and spans.
    pub fn word(self) -> &'static str {
        match self {
            Self::Unanswered => "unanswered",
            Self::Answered(answered) => answered.word(),
            Self::Refused(why) => why.word(),
            Self::Relayed(relayed) => relayed.word(),
            Self::Served(outcome) => outcome.word(),
        }
    }

    /// Whether that is a failure.
    pub fn is_failure(self) -> bool {
        !matches!(
            self,
            Self::Answered(Answered::Accepted)
                | Self::Relayed(Relayed::Finished)
                | Self::Served(Outcome::Finished | Outcome::Cancelled)
        )
    }

    /// What is known once `next` has been said. The first failure is the cause of what follows; an
    /// answer only says who is asked next.
    fn then(self, next: Ending) -> Ending {
        match self {
            Self::Refused(_) | Self::Served(_) => self,
            Self::Relayed(Relayed::Failed | Relayed::Cut | Relayed::Abandoned) => self,
            Self::Relayed(_) if matches!(next, Self::Answered(_)) => self,
            _ => next,
        }
    }
}

/// When something happened: CLOCK_MONOTONIC in ns, that of the tick; 0 where it has not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moments {
    /// Its prefix had arrived.
    pub received_ns: u64,
    /// The instance was chosen; the last one, where more than one was tried.
    pub chosen_ns: u64,
    /// All of it was in that one's socket, or in its lane.
    pub forwarded_ns: u64,
    /// That one had answered, or had called home.
    pub acknowledged_ns: u64,
    /// The first bytes of the response were for the caller; never in direct mode.
    pub first_byte_ns: u64,
    /// It was over.
    pub ended_ns: u64,
}

/// The span of a request that was routed, or refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoutedSpan {
    /// Trace, the span's own id, and flags: that of a trace that is kept.
    pub context: TraceContext,
    /// The caller's span.
    pub parent_id: Option<u64>,
    /// The request's id; empty where that has over [`BYTES_MAX`] bytes, or is none.
    pub request_id: ShortText,
    /// The id that the caller's own client gave it; empty as above.
    pub x_request_id: ShortText,
    /// Place of its route in the directory; [`NONE`] where no route has its path.
    pub route: u32,
    /// How its response goes back.
    pub mode: Mode,
    /// Whether the way to the instance is encrypted.
    pub secure: bool,
    /// Who has it: the id of an instance, or of a worker behind a lane.
    pub instance_id: Option<u64>,
    /// Where that is.
    pub address: Option<SocketAddr>,
    /// How many have been tried.
    pub attempts: u8,
    /// How it ended.
    pub ending: Ending,
    /// Bytes of its frame.
    pub request_bytes: u64,
    /// Bytes of its response: relayed, those that the caller has taken; of a lane, those of its
    /// items; 0 in direct mode.
    pub response_bytes: u64,
    /// When.
    pub moments: Moments,
}

/// The spans of one shard.
pub(crate) struct Routed {
    /// Of traces that begin here; `None`: there are no spans.
    ratio: Option<f64>,
    draws: Draws,
    traceparent: Rare,
    table: Table<RoutedSpan>,
    /// Control was told of spans and is to be woken when the timer says so ...
    rings_later: bool,
    /// ... or at the end of this tick.
    rings_now: bool,
}

impl Routed {
    pub(crate) fn new(tracing: Tracing) -> Routed {
        let (ratio, spans) = match tracing {
            Tracing::Off => (None, 0),
            Tracing::On { ratio } => (Some(ratio), SPANS_MAX),
        };
        Routed {
            ratio,
            draws: Draws::new(),
            traceparent: Rare::new(headers::TRACEPARENT),
            table: Table::new(spans),
            rings_later: false,
            rings_now: false,
        }
    }
}

/// A frame that begins at the front of a connection is about to become a request. [`NONE`] where
/// it has no span.
#[inline]
pub(crate) fn begin<R: Ring>(shard: &mut Shard<R>, slot: u32, prefix: &Prefix, route: u32) -> u32 {
    if shard.routed.ratio.is_none() {
        return NONE;
    }
    let Some(span) = look(shard, slot, prefix, route) else {
        return NONE;
    };
    let put = shard.routed.table.insert(span);
    put.unwrap_or_else(|_| {
        shard.stats.shard.spans_lost.add(1);
        NONE
    })
}

/// What the headers say, if its trace is kept.
fn look<R: Ring>(
    shard: &mut Shard<R>,
    slot: u32,
    prefix: &Prefix,
    route: u32,
) -> Option<RoutedSpan> {
    let ratio = shard.routed.ratio?;
    let incoming = shard.connections[slot].incoming;
    let scratch = &mut shard.scratch;
    let front = shard.pieces.lay_out(&incoming, prefix.headers.end, scratch);
    let headers = front.get(prefix.headers.clone())?;
    let mut text = [0; 2 * TEXT_BYTES];
    let parent = shard
        .routed
        .traceparent
        .find(headers)
        .and_then(|value| value.unescape_into(&mut text).ok())
        .and_then(TraceContext::parse);
    let context = shard.routed.draws.kept(parent, ratio)?;
    let [id, older_id, client_id] = headers::find_all(
        headers,
        [
            headers::REQUEST_ID,
            headers::REQUEST_ID_FALLBACK,
            headers::CLIENT_REQUEST_ID,
        ],
    );
    let mode = Mode::of(shard.directory.routes.get(route as usize));
    Some(RoutedSpan {
        context,
        parent_id: parent.map(|parent| parent.span_id),
        request_id: short(id.or(older_id)),
        x_request_id: short(client_id),
        route,
        mode,
        secure: shard.config.secure_dials && mode != Mode::Lane,
        instance_id: None,
        address: None,
        attempts: 0,
        ending: Ending::Unanswered,
        request_bytes: prefix.frame_bytes(),
        response_bytes: 0,
        moments: Moments {
            received_ns: shard.now_ns,
            ..Moments::default()
        },
    })
}

fn short(text: Option<Text<'_>>) -> ShortText {
    let mut bytes = [0; BYTES_MAX];
    let text = text.and_then(|text| ShortText::new(text.unescape_into(&mut bytes).ok()?));
    text.unwrap_or(ShortText::EMPTY)
}

/// An instance gets the request.
#[inline]
pub(crate) fn chosen<R: Ring>(
    shard: &mut Shard<R>,
    span: u32,
    instance_id: u64,
    address: Option<SocketAddr>,
) {
    let now_ns = shard.now_ns;
    let Some(entry) = shard.routed.table.get_mut(span) else {
        return;
    };
    entry.attempts = entry.attempts.saturating_add(1);
    (entry.instance_id, entry.address) = (Some(instance_id), address);
    let moments = &mut entry.moments;
    moments.chosen_ns = now_ns;
    (moments.forwarded_ns, moments.acknowledged_ns) = (0, 0);
}

/// All of it has been handed to a worker behind a lane.
pub(crate) fn handed_over<R: Ring>(shard: &mut Shard<R>, span: u32) {
    let now_ns = shard.now_ns;
    if let Some(entry) = shard.routed.table.get_mut(span) {
        entry.moments.forwarded_ns = now_ns;
    }
}

/// That one has answered. What it answers to requests that are over means nothing.
#[inline]
pub(crate) fn answered<R: Ring>(shard: &mut Shard<R>, span: u32, said: Answered) {
    let now_ns = shard.now_ns;
    if let Some(entry) = shard.routed.table.get_mut(span) {
        entry.ending = entry.ending.then(Ending::Answered(said));
        entry.moments.acknowledged_ns = now_ns;
    }
}

/// Its worker has called home, which says that it has accepted.
pub(crate) fn called_home<R: Ring>(shard: &mut Shard<R>, span: u32) {
    if let Some(entry) = shard.routed.table.get(span)
        && entry.moments.acknowledged_ns == 0
    {
        answered(shard, span, Answered::Accepted);
    }
}

/// The first bytes of its response are for the caller.
pub(crate) fn responds<R: Ring>(shard: &mut Shard<R>, span: u32) {
    let now_ns = shard.now_ns;
    if let Some(entry) = shard.routed.table.get_mut(span)
        && entry.moments.first_byte_ns == 0
    {
        entry.moments.first_byte_ns = now_ns;
    }
}

/// So many bytes of the response have been taken by its caller, or given by its lane.
#[inline]
pub(crate) fn taken<R: Ring>(shard: &mut Shard<R>, span: u32, bytes: usize) {
    if let Some(entry) = shard.routed.table.get_mut(span) {
        entry.response_bytes += bytes as u64;
    }
}

/// It has taken such a turn.
pub(crate) fn turns<R: Ring>(shard: &mut Shard<R>, span: u32, next: Ending) {
    if let Some(entry) = shard.routed.table.get_mut(span) {
        entry.ending = entry.ending.then(next);
    }
}

/// The request has done its part: the rest is its relay's. Answers its span, if it had one.
pub(crate) fn leaves(request: &mut Request, routed: &mut Routed) -> u32 {
    let span = std::mem::replace(&mut request.span, NONE);
    if let Some(entry) = routed.table.get_mut(span) {
        note_forwarded(entry, request);
    }
    span
}

/// What the request knows by itself.
fn note_forwarded(span: &mut RoutedSpan, request: &Request) {
    if request.sent_ns >= span.moments.chosen_ns && request.sent_ns > 0 {
        span.moments.forwarded_ns = request.sent_ns;
    }
}

/// A request whose response does not pass through here is over.
#[inline]
pub(crate) fn end_of_request<R: Ring>(shard: &mut Shard<R>, request: u32) {
    let Some(entry) = shard.requests.get_mut(request) else {
        return;
    };
    if entry.span != NONE {
        let span = leaves(entry, &mut shard.routed);
        end(shard, span);
    }
}

/// All of it is over: control is told.
pub(crate) fn end<R: Ring>(shard: &mut Shard<R>, span: u32) {
    if let Some(span) = shard.routed.table.remove(span) {
        tell(shard, span);
    }
}

/// The same, with the turn that it has taken last.
pub(crate) fn end_as<R: Ring>(shard: &mut Shard<R>, span: u32, ending: Ending) {
    turns(shard, span, ending);
    end(shard, span);
}

/// A frame at the front of a connection is refused that never became a request.
#[inline]
pub(crate) fn refused<R: Ring>(shard: &mut Shard<R>, slot: u32, prefix: &Prefix, why: Why) {
    if shard.routed.ratio.is_some() {
        tell_refused(shard, slot, prefix, why);
    }
}

fn tell_refused<R: Ring>(shard: &mut Shard<R>, slot: u32, prefix: &Prefix, why: Why) {
    let incoming = shard.connections[slot].incoming;
    let scratch = &mut shard.scratch;
    let front = shard.pieces.lay_out(&incoming, prefix.path.end, scratch);
    let path = front.get(prefix.path.clone()).unwrap_or_default();
    let route = shard.route_at.get(path).copied();
    // What handlers of this process refuse was not to be routed.
    if route.is_none() && shard.worker.find(path).is_some() {
        return;
    }
    if let Some(mut span) = look(shard, slot, prefix, route.unwrap_or(NONE)) {
        span.ending = Ending::Refused(why);
        tell(shard, span);
    }
}

fn tell<R: Ring>(shard: &mut Shard<R>, mut span: RoutedSpan) {
    span.moments.ended_ns = shard.now_ns;
    let report = Report::Routed(span, Arc::clone(&shard.directory));
    let told = shard.reports.room() > ROOM_BESIDE_SPANS && shard.reports.push(report).is_ok();
    let stats = &shard.stats.shard;
    match told {
        true => stats.spans_routed.add(1),
        false => stats.spans_lost.add(1),
    }
    let now_ns = shard.now_ns;
    if shard.reports.room() < ROOM_TO_SLEEP {
        shard.routed.rings_now = true;
    } else if !std::mem::replace(&mut shard.routed.rings_later, true) {
        shard.timer(TimerKind::Spans, 0, 0, now_ns + SLEEP_NS);
    }
}

/// Control has slept long enough.
pub(crate) fn due<R: Ring>(shard: &mut Shard<R>) {
    shard.routed.rings_later = false;
    shard.routed.rings_now = true;
}

/// At the end of a tick: control is woken once for all that it was told.
#[inline]
pub(crate) fn wake<R: Ring>(shard: &mut Shard<R>) {
    if std::mem::take(&mut shard.routed.rings_now) {
        shard.reports.wake();
    }
}
