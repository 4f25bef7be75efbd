//! Spans of requests on the control side: whether they are made, and what becomes of those that
//! have ended (`spec/events-discovery.md` §9).
//!
//! ```text
//! shard: a request ends --SpanRecord, by its queue--> tell -> a log line, if those are wanted
//!                                                       '---> `otlp`, if it is exported
//! ```
//!
//! One decision for the whole process, taken once at its start, like the log itself. Three things
//! make spans: requests served, calls made, and requests routed. The router passes headers on as
//! they are, so its span stands beside the worker's, both below the caller's; and it makes only
//! those that somebody sees.

use std::borrow::Cow;
use std::sync::OnceLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use corelane_codec::trace_context::TraceContext;
use corelane_engine::directory::Directory;
use corelane_engine::routed::RoutedSpan;
use corelane_engine::served::{Outcome, SpanRecord, Tracing};

use crate::env::Env;
use crate::logging;

mod call;
#[cfg(feature = "otel")]
mod otlp;
mod route;

pub use call::CallSpan;
pub use route::Hop;

/// What the environment says about spans.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Whether requests make spans: with JSON log lines, or with the export.
    pub on: bool,
    /// Whether the end of a span is a line of the log.
    pub lines: bool,
    /// Whether spans leave this process.
    pub exports: bool,
    /// The part of new traces that is kept, 0 to 1.
    pub ratio: f64,
    /// What could not be understood.
    pub complaints: Vec<String>,
}

impl Settings {
    /// Reads them.
    pub fn read(env: &Env) -> Self {
        let mut complaints = Vec::new();
        let name = "OTEL_TRACES_SAMPLE_RATIO";
        let ratio = match env.get(name).map(|text| text.trim().parse::<f64>()) {
            None => 1.0,
            Some(Ok(ratio)) if (0.0..=1.0).contains(&ratio) => ratio,
            Some(_) => {
                complaints.push(format!(
                    "environment {name}: not a number from 0 to 1; going on with 1"
                ));
                1.0
            }
        };
        let exports = exports(env);
        let on = logging::is_json(env) || exports;
        Self {
            on,
            exports,
            lines: on && env.is_on("DYN_LOGGING_SPAN_EVENTS"),
            ratio,
            complaints,
        }
    }
}

/// Whether spans and log lines leave this process. Without the feature `otel` they cannot.
fn exports(env: &Env) -> bool {
    cfg!(feature = "otel") && env.is_on("OTEL_EXPORT_ENABLED")
}

static SETTINGS: OnceLock<Settings> = OnceLock::new();

/// Decides for this process; a second call changes nothing.
pub fn start(env: &Env) {
    let settings = Settings::read(env);
    #[cfg_attr(
        not(feature = "otel"),
        expect(unused_mut, reason = "the export adds its own")
    )]
    let mut complaints = settings.complaints.clone();
    #[cfg(feature = "otel")]
    if exports(env) {
        complaints.extend(otlp::gather(env));
    }
    if SETTINGS.set(settings).is_ok() {
        for complaint in complaints {
            tracing::warn!("{complaint}");
        }
    }
}

/// Begins the export, if there is one, on the CPU of this thread: to be called once it is pinned.
pub fn export() {
    #[cfg(feature = "otel")]
    otlp::send();
}

/// Ends the export, if there is one: what has ended leaves, in bounded time.
pub fn finish() {
    #[cfg(feature = "otel")]
    otlp::finish();
}

/// What hands lines of the log to the export.
#[cfg(feature = "otel")]
pub(crate) fn lines(env: &Env) -> Option<otlp::Lines> {
    exports(env).then_some(otlp::Lines)
}

/// There is no export in this program.
#[cfg(not(feature = "otel"))]
pub(crate) fn lines(_: &Env) -> Option<tracing_subscriber::layer::Identity> {
    None
}

impl Settings {
    /// Whether requests that are served, and calls, make spans: handlers may pass them on, whoever
    /// sees them here.
    pub fn ends(&self) -> Tracing {
        self.tracing(self.on)
    }

    /// Whether requests that are routed make spans: nothing is made that nobody would see.
    pub fn routes(&self) -> Tracing {
        self.tracing(self.lines || self.exports)
    }

    fn tracing(&self, wanted: bool) -> Tracing {
        let ratio = self.ratio;
        match wanted {
            true => Tracing::On { ratio },
            false => Tracing::Off,
        }
    }
}

/// What shards are told of requests that they serve.
pub fn tracing() -> Tracing {
    SETTINGS.get().map_or(Tracing::Off, Settings::ends)
}

/// What shards are told of requests that they route.
pub fn routes() -> Tracing {
    SETTINGS.get().map_or(Tracing::Off, Settings::routes)
}

/// A span that has ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// `handle_payload` for a request served, `router.route_request` for a call made,
    /// `corelane.route` for a request routed.
    pub name: &'static str,
    /// Whether it took a request; else it made one.
    pub is_server: bool,
    /// Trace, own id, flags.
    pub context: TraceContext,
    /// The span above it.
    pub parent_id: Option<u64>,
    /// The vendors' part of the trace context.
    pub tracestate: Option<String>,
    /// Unix time of its begin.
    pub began: SystemTime,
    /// From there to its end.
    pub duration: Duration,
    /// Of that, the time that somebody was at work, where it is known.
    pub busy: Option<Duration>,
    /// How it ended, one word.
    pub outcome: &'static str,
    /// Whether that is a failure.
    pub failed: bool,
    /// The endpoint: namespace, component, name.
    pub endpoint: Option<[String; 3]>,
    /// The instance, if it is known.
    pub instance_id: Option<u64>,
    /// The request's id, and the one that the caller's own client gave it.
    pub request_id: Option<String>,
    /// See there.
    pub x_request_id: Option<String>,
    /// What a router says besides.
    pub hop: Option<Box<Hop>>,
}

impl From<SpanRecord> for Span {
    fn from(record: SpanRecord) -> Self {
        let id = record.handler.id.get();
        let instance = record.handler.instance.get();
        Self {
            name: "handle_payload",
            is_server: true,
            context: record.context,
            parent_id: record.parent_id,
            tracestate: record.tracestate,
            began: UNIX_EPOCH + Duration::from_nanos(record.began_unix_ns),
            duration: Duration::from_nanos(record.duration_ns),
            busy: Some(Duration::from_nanos(record.busy_ns)),
            outcome: record.outcome.word(),
            failed: !matches!(record.outcome, Outcome::Finished | Outcome::Cancelled),
            endpoint: id.map(|id| [&id.namespace, &id.component, &id.name].map(Clone::clone)),
            instance_id: (instance != 0).then_some(instance),
            request_id: Some(record.request_id),
            x_request_id: record.x_request_id,
            hop: None,
        }
    }
}

impl Span {
    /// What it says besides its ids and times: name and value, in the order of names.
    pub fn fields(&self) -> Vec<(&'static str, Cow<'_, str>)> {
        let [namespace, component, endpoint] = match &self.endpoint {
            Some(names) => names.each_ref().map(|name| Some(Cow::from(name))),
            None => [None, None, None],
        };
        let instance = self.instance_id.map(|id| Cow::from(id.to_string()));
        let fields = [
            ("component", component),
            ("endpoint", endpoint),
            ("instance_id", instance),
            ("namespace", namespace),
            ("otel.kind", Some(Cow::from(self.kind()))),
            ("request.outcome", Some(Cow::from(self.outcome))),
            ("request_id", self.request_id.as_deref().map(Cow::from)),
            ("x_request_id", self.x_request_id.as_deref().map(Cow::from)),
        ];
        let there = fields.into_iter();
        let there = there.filter_map(|(name, value)| Some((name, value?)));
        let hop = self.hop.iter().flat_map(|hop| &hop.texts);
        let hop = hop.map(|(name, text)| (*name, Cow::from(text)));
        let mut all: Vec<_> = there.chain(hop).collect();
        all.sort_unstable_by_key(|(name, _)| *name);
        all
    }

    fn kind(&self) -> &'static str {
        match self.is_server {
            true => "server",
            false => "client",
        }
    }

    /// A line with the names that Dynamo's have.
    fn log(&self) {
        let name = |at: usize| self.endpoint.as_ref().map(|names| names[at].as_str());
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let hop = self.hop.as_deref();
        let text = |name: &str| hop.and_then(|hop| hop.text(name));
        let number = |name: &str| hop.and_then(|hop| hop.number(name));
        let moment = |name: &str| hop.and_then(|hop| hop.moment(name)).map(micros);
        let context = &self.context;
        tracing::info!(
            target: "request_span",
            attempts = number("attempts"),
            component = name(1),
            endpoint = name(2),
            instance_id = self.instance_id.map(|id| id.to_string()),
            namespace = name(0),
            otel.kind = self.kind(),
            parent_id = self.parent_id.map(|id| format!("{id:016x}")),
            request.outcome = self.outcome,
            request_bytes = number("request_bytes"),
            request_id = self.request_id,
            response = text("response"),
            response_bytes = number("response_bytes"),
            route = text("route"),
            span_id = format!("{:016x}", context.span_id),
            span_name = self.name,
            time.acknowledged_us = moment("acknowledged"),
            time.busy_us = self.busy.map(micros),
            time.chosen_us = moment("chosen"),
            time.duration_us = micros(self.duration),
            time.first_byte_us = moment("first_byte"),
            time.forwarded_us = moment("forwarded"),
            time.idle_us = self.busy.map(|busy| micros(self.duration.saturating_sub(busy))),
            trace_flags = format!("{:02x}", context.flags),
            trace_id = format!("{:032x}", context.trace_id),
            tracestate = self.tracestate,
            transport = text("transport"),
            worker_address = text("worker_address"),
            x_request_id = self.x_request_id,
            "SPAN_CLOSED"
        );
    }
}

/// A request that a shard has routed is over.
pub fn tell_routed(routed: &RoutedSpan, directory: &Directory) {
    tell(route::span(routed, directory));
}

/// A span has ended.
pub fn tell(span: impl Into<Span>) {
    let span = span.into();
    if SETTINGS.get().is_some_and(|settings| settings.lines) {
        span.log();
    }
    #[cfg(feature = "otel")]
    otlp::span(span);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(pairs: &[(&str, &str)]) -> Settings {
        let own = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        Settings::read(&Env::of(pairs.iter().map(own)))
    }

    #[test]
    fn spans_come_with_json_lines() {
        assert!(!settings(&[]).on);
        assert!(!settings(&[("DYN_LOGGING_SPAN_EVENTS", "1")]).lines);
        let json = [("DYN_LOGGING_JSONL", "1"), ("DYN_LOGGING_SPAN_EVENTS", "1")];
        assert!(settings(&json).on && settings(&json).lines);
        let wins = [
            ("DYN_LOGGING_JSONL", "1"),
            ("DYN_LOGGING_CONSOLE_FORMAT", "readable"),
        ];
        assert!(!settings(&wins).on);
        let both = |settings: Settings| {
            let is_on = |tracing| matches!(tracing, Tracing::On { .. });
            (is_on(settings.ends()), is_on(settings.routes()))
        };
        assert_eq!(both(settings(&json)), (true, true));
        let unseen = both(settings(&json[..1]));
        assert_eq!(unseen, (true, false), "nobody sees what a router makes");
        assert_eq!(both(settings(&[])), (false, false));
        let exports = [("OTEL_EXPORT_ENABLED", "true")];
        assert_eq!(settings(&exports).on, cfg!(feature = "otel"));
    }

    #[test]
    fn a_ratio_is_a_number_from_0_to_1() {
        let name = "OTEL_TRACES_SAMPLE_RATIO";
        assert_eq!(settings(&[(name, "0.25")]).ratio, 0.25);
        for wrong in ["2", "-1", "NaN", "half"] {
            let settings = settings(&[(name, wrong)]);
            assert_eq!(
                (settings.ratio, settings.complaints.len()),
                (1.0, 1),
                "{wrong}"
            );
        }
    }
}
