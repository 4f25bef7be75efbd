//! The export over OTLP (`spec/events-discovery.md` §9.4): spans that are kept and lines of the log
//! leave in batches, by a thread of their own.
//!
//! ```text
//! tell, log line --try_send--> queue (bounded) --> thread: 512 at most, or what came in a second
//!                    '- full: lost, and counted      '--> /v1/traces, /v1/logs, or gRPC
//! ```
//!
//! The thread is begun by the control core after it has been pinned, so it shares that CPU. Where
//! to, with which headers and in how much time is read by the exporter itself, from the variables
//! that `corelane env` lists under tracing.

use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result};
use opentelemetry::logs::{AnyValue, LogRecord, Logger, LoggerProvider, Severity};
use opentelemetry::trace::{Event, SpanContext, SpanKind, Status, TraceFlags, TraceState};
use opentelemetry::{InstrumentationScope, KeyValue, SpanId, TraceId};
use opentelemetry_otlp::{LogExporter, Protocol, SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::logs::SdkLoggerProvider;
use opentelemetry_sdk::logs::{LogBatch, LogExporter as _, SdkLogRecord, SdkLogger};
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanExporter as _, SpanLinks};
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tracing::{Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

use super::Span;
use crate::env::Env;
use crate::logging::Fields;

/// Spans and lines that wait, at most.
const QUEUE_MAX: usize = 8_192;
/// Spans and lines of one batch, at most.
const BATCH_MAX: usize = 512;
/// The longest that a batch is gathered.
const BATCH_TIME: Duration = Duration::from_secs(1);
/// The longest that the end of the process waits for what is still to leave.
const FINISH_MAX: Duration = Duration::from_secs(5);
/// The pause between two complaints.
const COMPLAIN_EVERY: Duration = Duration::from_secs(60);
/// Beginnings of targets that are not exported: those of the export itself, which would feed on
/// its own lines.
const OWN: [&str; 7] = [
    "corelane::trace",
    "opentelemetry",
    "h2",
    "hyper",
    "tonic",
    "tower",
    "reqwest",
];

enum Item {
    Span(Box<Span>),
    Line(Box<Line>),
}

struct Line {
    time: SystemTime,
    level: Level,
    target: &'static str,
    fields: Fields,
}

struct Export {
    service: String,
    /// For spans, for lines.
    protocols: [Protocol; 2],
    sender: Mutex<Option<mpsc::Sender<Item>>>,
    receiver: Mutex<Option<mpsc::Receiver<Item>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    lost: Mutex<u64>,
}

static EXPORT: OnceLock<Export> = OnceLock::new();

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Begins to gather; answers what could not be understood.
pub(super) fn gather(env: &Env) -> Vec<String> {
    let mut complaints = Vec::new();
    let mut protocol = |own: &str| {
        let names = [own, "OTEL_EXPORTER_OTLP_PROTOCOL"];
        let found = names
            .into_iter()
            .find_map(|name| Some((name, env.get(name)?.trim())));
        match found {
            None | Some((_, "grpc")) => Protocol::Grpc,
            Some((_, "http/protobuf")) => Protocol::HttpBinary,
            Some((name, _)) => {
                complaints.push(format!(
                    "environment {name}: neither grpc nor http/protobuf; going on with grpc"
                ));
                Protocol::Grpc
            }
        }
    };
    let protocols = [
        protocol("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"),
        protocol("OTEL_EXPORTER_OTLP_LOGS_PROTOCOL"),
    ];
    EXPORT.get_or_init(|| {
        let (sender, receiver) = mpsc::channel(QUEUE_MAX);
        Export {
            service: env.get("OTEL_SERVICE_NAME").unwrap_or("dynamo").to_owned(),
            protocols,
            sender: Mutex::new(Some(sender)),
            receiver: Mutex::new(Some(receiver)),
            thread: Mutex::default(),
            lost: Mutex::default(),
        }
    });
    complaints
}

/// Begins to send, from a thread that begins on the CPUs of this one.
pub(super) fn send() {
    let Some(export) = EXPORT.get() else { return };
    let Some(receiver) = lock(&export.receiver).take() else {
        return;
    };
    let thread = std::thread::Builder::new().name("otlp".to_owned());
    match thread.spawn(move || run(export, receiver)) {
        Ok(thread) => *lock(&export.thread) = Some(thread),
        Err(error) => tracing::error!(%error, "nothing is exported: no thread can be made"),
    }
}

/// Sends what is left and ends, in bounded time.
pub(super) fn finish() {
    let Some(export) = EXPORT.get() else { return };
    drop(lock(&export.sender).take());
    let Some(thread) = lock(&export.thread).take() else {
        return;
    };
    let deadline = Instant::now() + FINISH_MAX;
    while !thread.is_finished() {
        if Instant::now() >= deadline {
            return tracing::warn!("not everything was exported: the collector is slow");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn put(item: Item) {
    let Some(export) = EXPORT.get() else { return };
    let sent = lock(&export.sender)
        .as_ref()
        .map(|sender| sender.try_send(item));
    if matches!(sent, Some(Err(mpsc::error::TrySendError::Full(_)))) {
        *lock(&export.lost) += 1;
    }
}

/// A span that has ended leaves, if its trace is kept.
pub(super) fn span(span: Span) {
    if span.context.is_sampled() {
        put(Item::Span(Box::new(span)));
    }
}

/// Hands lines of the log to the export.
pub(crate) struct Lines;

impl<S: Subscriber> Layer<S> for Lines {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        let target = event.metadata().target();
        if OWN.iter().any(|own| target.starts_with(own)) {
            return;
        }
        let mut fields = Fields::default();
        event.record(&mut fields);
        put(Item::Line(Box::new(Line {
            time: SystemTime::now(),
            level: *event.metadata().level(),
            target,
            fields,
        })));
    }
}

fn run(export: &'static Export, receiver: mpsc::Receiver<Item>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let outcome = match runtime {
        Ok(runtime) => runtime.block_on(export_all(export, receiver)),
        Err(error) => Err(error.into()),
    };
    if let Err(error) = outcome {
        tracing::error!("nothing is exported: {error:#}");
    }
}

async fn export_all(export: &Export, mut receiver: mpsc::Receiver<Item>) -> Result<()> {
    let resource = Resource::builder_empty()
        .with_service_name(export.service.clone())
        .build();
    let mut spans = spans_to(export.protocols[0]).context("the exporter of spans")?;
    spans.set_resource(&resource);
    let mut lines = lines_to(export.protocols[1]).context("the exporter of log lines")?;
    lines.set_resource(&resource);
    // Only these can make records.
    let logger = SdkLoggerProvider::builder().build().logger("corelane");
    let scope = InstrumentationScope::builder(export.service.clone()).build();
    let mut complained: Option<Instant> = None;
    while let Some(batch) = next_batch(&mut receiver).await {
        let (mut data, mut records) = (Vec::new(), Vec::new());
        for item in batch {
            match item {
                Item::Span(span) => data.push(span_data(*span, &scope)),
                Item::Line(line) => records.push(record(*line, &logger)),
            }
        }
        let mut failures = Vec::new();
        if !data.is_empty()
            && let Err(error) = spans.export(data).await
        {
            failures.push(error.to_string());
        }
        let pairs: Vec<(&SdkLogRecord, &InstrumentationScope)> = records
            .iter()
            .map(|(record, scope)| (record, scope))
            .collect();
        if !pairs.is_empty()
            && let Err(error) = lines.export(LogBatch::new(&pairs)).await
        {
            failures.push(error.to_string());
        }
        let lost = *lock(&export.lost);
        let quiet = complained.is_some_and(|at| at.elapsed() < COMPLAIN_EVERY);
        if let Some(why) = failures.first().filter(|_| !quiet) {
            complained = Some(Instant::now());
            tracing::warn!(
                why,
                lost,
                "a batch was not exported; is the collector there?"
            );
        }
    }
    Ok(())
}

/// What has come within a second of the first, or as much as one batch holds; None at the end.
async fn next_batch(receiver: &mut mpsc::Receiver<Item>) -> Option<Vec<Item>> {
    let mut batch = vec![receiver.recv().await?];
    let gather = async {
        while batch.len() < BATCH_MAX {
            match receiver.recv().await {
                Some(item) => batch.push(item),
                None => return,
            }
        }
    };
    // Time is up: what has come is the batch.
    let _ = timeout(BATCH_TIME, gather).await;
    Some(batch)
}

fn spans_to(protocol: Protocol) -> Result<SpanExporter> {
    let builder = SpanExporter::builder();
    Ok(match protocol {
        Protocol::Grpc => builder.with_tonic().build()?,
        other => builder.with_http().with_protocol(other).build()?,
    })
}

fn lines_to(protocol: Protocol) -> Result<LogExporter> {
    let builder = LogExporter::builder();
    Ok(match protocol {
        Protocol::Grpc => builder.with_tonic().build()?,
        other => builder.with_http().with_protocol(other).build()?,
    })
}

fn span_data(span: Span, scope: &InstrumentationScope) -> SpanData {
    let context = &span.context;
    let state = span
        .tracestate
        .as_deref()
        .and_then(|text| text.parse().ok());
    let kind = match span.is_server {
        true => SpanKind::Server,
        false => SpanKind::Client,
    };
    // The kind has a place of its own.
    let fields = span
        .fields()
        .into_iter()
        .filter(|(name, _)| *name != "otel.kind");
    let attributes = fields.map(|(name, value)| KeyValue::new(name, value.into_owned()));
    let hop = span.hop.as_deref();
    let numbers = hop.iter().flat_map(|hop| &hop.numbers);
    let number = |number: &u64| i64::try_from(*number).unwrap_or(i64::MAX);
    let numbers = numbers.map(|(name, value)| KeyValue::new(*name, number(value)));
    let moments = hop.iter().flat_map(|hop| &hop.moments);
    let moments = moments.map(|(name, after)| Event::new(*name, span.began + *after, vec![], 0));
    let mut events = SpanEvents::default();
    events.events = moments.collect();
    SpanData {
        span_context: SpanContext::new(
            TraceId::from(context.trace_id),
            SpanId::from(context.span_id),
            TraceFlags::new(context.flags),
            false,
            state.unwrap_or(TraceState::NONE),
        ),
        parent_span_id: span.parent_id.map_or(SpanId::INVALID, SpanId::from),
        parent_span_is_remote: span.parent_id.is_some(),
        span_kind: kind,
        name: span.name.into(),
        start_time: span.began,
        end_time: span.began + span.duration,
        attributes: attributes.chain(numbers).collect(),
        dropped_attributes_count: 0,
        events,
        links: SpanLinks::default(),
        status: match span.failed {
            true => Status::error(span.outcome),
            false => Status::Unset,
        },
        instrumentation_scope: scope.clone(),
    }
}

fn record(line: Line, logger: &SdkLogger) -> (SdkLogRecord, InstrumentationScope) {
    let mut record = logger.create_log_record();
    let (text, severity) = match line.level {
        Level::ERROR => ("ERROR", Severity::Error),
        Level::WARN => ("WARN", Severity::Warn),
        Level::INFO => ("INFO", Severity::Info),
        Level::DEBUG => ("DEBUG", Severity::Debug),
        Level::TRACE => ("TRACE", Severity::Trace),
    };
    record.set_timestamp(line.time);
    record.set_observed_timestamp(line.time);
    record.set_severity_text(text);
    record.set_severity_number(severity);
    let (message, fields) = line.fields.into_parts();
    record.set_body(AnyValue::from(message));
    for (name, value) in fields {
        let value = match value {
            Value::Bool(value) => AnyValue::from(value),
            Value::Number(number) if number.is_i64() => {
                AnyValue::from(number.as_i64().unwrap_or_default())
            }
            Value::Number(number) => AnyValue::from(number.as_f64().unwrap_or_default()),
            Value::String(text) => AnyValue::from(text),
            other => AnyValue::from(other.to_string()),
        };
        record.add_attribute(name, value);
    }
    (record, InstrumentationScope::builder(line.target).build())
}
