//! What a shard tells of each request that its handlers served: numbers always, spans where they
//! are asked for.

mod common;
#[path = "common/ends.rs"]
mod ends;

use std::sync::Arc;
use std::time::Instant;

use common::*;
use corelane_codec::call_home::STOP_FRAME;
use corelane_codec::control_message::PayloadCodec::Json;
use corelane_codec::error::DynamoError;
use corelane_codec::trace_context::TraceContext;
use corelane_codec::{headers, request_frame};
use corelane_engine::command::{LocalPath, Report};
use corelane_engine::config::RingKind;
use corelane_engine::ends::Ends;
use corelane_engine::handler::{NewHandler, Request};
use corelane_engine::responder::Responder;
use corelane_engine::served::{Outcome, SpanRecord, Tracing};
use corelane_engine::shard::Command;
use corelane_engine::stats::HandlerStats;
use ends::*;

const CALLERS: &str = "00-89ace864b2b31368359610792b23f650-60261288d0622a38-01";

/// Answers with the trace that calls of the handler would pass on; `fail` fails, `wait` waits for
/// the caller's stop.
async fn serve(request: Request, mut responder: Responder) {
    match request.body() {
        b"\"fail\"" => responder.fail(&DynamoError::invalid_argument("no".to_owned())),
        b"\"wait\"" => responder.stopped().await,
        _ => {
            let trace = request.trace().map(|trace| trace.to_string());
            let text = format!("{:?}", trace.unwrap_or_default());
            if responder.item(text.as_bytes()).await.is_ok() {
                responder.finish();
            }
        }
    }
}

fn start(ring: RingKind, tracing: Tracing) -> (Local, Arc<HandlerStats>) {
    let worker = Local::start(
        ring,
        Ends {
            tracing,
            ..Ends::worker(Vec::new())
        },
    );
    let stats = Arc::new(HandlerStats::default());
    let new = NewHandler {
        make: handler(serve),
        stats: Arc::clone(&stats),
    };
    let path = SERVED.into();
    let paths = vec![LocalPath { path, handler: 0 }];
    worker.handle.command(Command::Handler(new)).unwrap();
    worker.handle.command(Command::Serve(paths)).unwrap();
    wait_until("it serves", || {
        worker.handle.stats.shard.path_updates.get() == 1
    });
    (worker, stats)
}

/// Sends a request with these headers besides its id.
fn send(frontend: &mut Frontend, more: &[(&str, &str)], body: &[u8]) {
    let address = frontend.listener.local_addr().unwrap().to_string();
    let envelope = envelope_in(&address, "s", Json, body);
    let mut map = Vec::new();
    headers::write(more, &mut map);
    let mut frame = Vec::new();
    request_frame::write_frame(SERVED.as_bytes(), &map, &envelope, &mut frame).unwrap();
    frontend.caller.send(&frame);
    assert_eq!(frontend.caller.reply(), "");
}

/// The text that the handler answers with.
fn answer(frontend: &Frontend) -> String {
    let mut called = frontend.called();
    called.handshake();
    called.prologue_ok();
    let items = called.items_to_the_end(Json);
    String::from_utf8(items[0].clone()).unwrap()
}

fn next_span(worker: &Local) -> Box<SpanRecord> {
    let deadline = Instant::now() + DEADLINE;
    loop {
        match worker.handle.reports.next() {
            Some(Report::Span(span)) => return span,
            Some(_) => {}
            None => assert!(Instant::now() < deadline, "no span"),
        }
        std::thread::yield_now();
    }
}

#[test]
fn a_span_is_the_child_of_its_callers() {
    for ring in rings() {
        let (worker, stats) = start(ring, Tracing::On { ratio: 0.0 });
        let mut frontend = Frontend::of(&worker);
        let more = [
            (headers::TRACEPARENT, CALLERS),
            (headers::TRACESTATE, "a=b"),
            (headers::CLIENT_REQUEST_ID, "mine"),
        ];
        send(&mut frontend, &more, b"1");
        let passed_on = answer(&frontend);
        let span = next_span(&worker);
        let parent = TraceContext::parse(CALLERS).unwrap();
        assert_eq!(span.context.trace_id, parent.trace_id);
        assert_eq!(span.parent_id, Some(parent.span_id));
        assert_ne!(span.context.span_id, parent.span_id);
        assert!(span.context.is_sampled(), "the caller has decided");
        assert_eq!(passed_on, format!("\"{}\"", span.context));
        assert_eq!(span.tracestate.as_deref(), Some("a=b"));
        assert_eq!(span.x_request_id.as_deref(), Some("mine"));
        assert_eq!(span.outcome, Outcome::Finished);
        assert!(Arc::ptr_eq(&span.handler, &stats) && !span.request_id.is_empty());
        assert!(span.busy_ns > 0 && span.busy_ns <= span.duration_ns);
        assert!(span.began_unix_ns > 1_700_000_000_000_000_000);
    }
}

#[test]
fn without_a_trace_of_the_caller_one_begins_here() {
    for ring in rings() {
        for (ratio, kept) in [(0.0, false), (1.0, true)] {
            let (worker, _) = start(ring, Tracing::On { ratio });
            let mut frontend = Frontend::of(&worker);
            // What is no trace context counts as none.
            send(&mut frontend, &[(headers::TRACEPARENT, "00-1-2-3")], b"1");
            answer(&frontend);
            let span = next_span(&worker);
            assert_eq!(span.parent_id, None);
            assert_eq!(span.context.is_sampled(), kept);
        }
    }
}

#[test]
fn without_spans_the_callers_trace_is_passed_on() {
    for ring in rings() {
        let (worker, stats) = start(ring, Tracing::Off);
        let mut frontend = Frontend::of(&worker);
        send(&mut frontend, &[(headers::TRACEPARENT, CALLERS)], b"1");
        assert_eq!(answer(&frontend), format!("\"{CALLERS}\""));
        send(&mut frontend, &[], b"1");
        assert_eq!(answer(&frontend), "\"\"");
        wait_until("both have ended", || stats.busy.get() == 0);
        while let Some(report) = worker.handle.reports.next() {
            assert!(!matches!(report, Report::Span(_)), "{report:?}");
        }
    }
}

#[test]
fn every_end_is_counted_as_what_it_is() {
    for ring in rings() {
        let (worker, stats) = start(ring, Tracing::On { ratio: 0.0 });
        let mut frontend = Frontend::of(&worker);
        send(&mut frontend, &[], b"1");
        answer(&frontend);
        assert_eq!(next_span(&worker).outcome, Outcome::Finished);

        send(&mut frontend, &[], b"\"fail\"");
        let mut called = frontend.called();
        called.handshake();
        assert!(called.error_prologue().contains("no"));
        drop(called);
        assert_eq!(next_span(&worker).outcome, Outcome::Failed);

        send(&mut frontend, &[], b"\"wait\"");
        let mut called = frontend.called();
        called.handshake();
        std::io::Write::write_all(&mut called.stream, &STOP_FRAME).unwrap();
        assert_eq!(next_span(&worker).outcome, Outcome::Cancelled);

        send(&mut frontend, &[], b"\"wait\"");
        let mut called = frontend.called();
        // Before that the worker may not know yet that he has been connected.
        called.handshake();
        socket2::SockRef::from(&called.stream)
            .set_linger(Some(Default::default()))
            .unwrap();
        drop(called);
        assert_eq!(next_span(&worker).outcome, Outcome::CutOff);

        wait_until("nothing runs", || stats.busy.get() == 0);
        let counts = [
            stats.requests.get(),
            stats.error_answers.get(),
            stats.cancelled.get(),
            stats.cut_off.get(),
            stats.unreachable.get(),
        ];
        assert_eq!(counts, [4, 1, 1, 1, 0]);
        assert!(stats.request_bytes.get() > 4 * 100 && stats.response_bytes.get() > 0);
        let times = |buckets: Vec<(f64, u64)>| -> u64 { buckets.iter().map(|pair| pair.1).sum() };
        assert_eq!(times(stats.times.duration.buckets()), 4);
        assert_eq!(times(stats.times.slot_wait.buckets()), 4);
        // Those that were ended early had no prologue.
        assert_eq!(times(stats.times.first_response.buckets()), 2);
    }
}
