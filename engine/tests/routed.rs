//! The spans of requests that a shard routes, on real sockets, on every ring that the host allows.

#[path = "common/ends.rs"]
mod ends;

mod common;
#[path = "relay/lab.rs"]
mod lab;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use common::*;
use corelane_codec::control_message::PayloadCodec::Json;
use corelane_codec::headers;
use corelane_codec::trace_context::TraceContext;
use corelane_engine::config::RingKind;
use corelane_engine::directory::{Ack, Directory, Policy};
use corelane_engine::routed::{Ending, Mode, RoutedSpan};
use corelane_engine::served::Tracing;
use corelane_engine::shard::Report;
use corelane_engine::stats::flight::{Answered, Relayed, Why};
use corelane_engine::table::NONE;
use lab::{Lab, answer, drained};

const KEPT: &str = "00-89ace864b2b31368359610792b23f650-60261288d0622a38-01";
const NOT_KEPT: &str = "00-89ace864b2b31368359610792b23f650-60261288d0622a38-00";

/// A router with spans: of traces that begin there, so many are kept.
fn router(ring: RingKind, ratio: f64) -> Router {
    Router::with(ring, |config| config.spans = Tracing::On { ratio })
}

/// A frame with these headers, and one whose caller keeps its trace.
fn with(more: &[(&str, &str)], payload: &[u8]) -> Vec<u8> {
    let mut map = Vec::new();
    headers::write(more, &mut map);
    frame_with(LISTEN_PATH, &map, payload)
}

fn kept(request_id: &str) -> Vec<u8> {
    let of_caller = [
        (headers::TRACEPARENT, KEPT),
        (headers::REQUEST_ID, request_id),
    ];
    with(&of_caller, b"x")
}

/// The next span that the shard tells; the directory names its route.
fn next_span(router: &Router) -> (RoutedSpan, Arc<Directory>) {
    let deadline = Instant::now() + DEADLINE;
    loop {
        match router.handle.reports.next() {
            Some(Report::Routed(span, directory)) => return (span, directory),
            Some(_) => {}
            None => assert!(Instant::now() < deadline, "no span: {}", router.counters()),
        }
        std::thread::yield_now();
    }
}

/// The span of the request with this id, which is the next one that is told.
fn span_of(router: &Router, request_id: &str) -> RoutedSpan {
    let (span, _) = next_span(router);
    assert_eq!(span.request_id.as_str(), request_id);
    span
}

#[test]
fn a_span_is_the_child_of_its_callers_and_headers_stay_as_they_are() {
    for ring in rings() {
        for ack in [Ack::OnForward, Ack::OnAccept] {
            let (router, worker) = (router(ring, 0.0), Worker::start(0xab, Manner::Accept));
            router.route_to(Policy::RoundRobin, ack, &[&worker]);
            let mut caller = Caller::dial(router.address);
            let more = [
                (headers::TRACEPARENT, KEPT),
                (headers::REQUEST_ID, "the-id"),
                (headers::CLIENT_REQUEST_ID, "mine"),
            ];
            let frame = with(&more, b"payload");
            caller.send(&frame);
            assert_eq!(caller.reply(), "");
            let (span, directory) = next_span(&router);
            let parent = TraceContext::parse(KEPT).unwrap();
            assert_eq!(span.context.trace_id, parent.trace_id);
            assert_eq!(span.parent_id, Some(parent.span_id));
            assert!(span.context.span_id != parent.span_id && span.context.is_sampled());
            assert_eq!(span.request_id.as_str(), "the-id");
            assert_eq!(span.x_request_id.as_str(), "mine");
            assert_eq!(directory.routes[span.route as usize].listen, LISTEN);
            assert_eq!((span.mode, span.secure), (Mode::Direct, false));
            let to = (span.instance_id, span.address);
            assert_eq!(to, (Some(0xab), Some(worker.instance.address)));
            assert_eq!(span.attempts, 1);
            assert_eq!(span.ending, Ending::Answered(Answered::Accepted));
            assert_eq!(span.request_bytes, frame.len() as u64);
            let moments = span.moments;
            let order = [
                moments.received_ns,
                moments.chosen_ns,
                moments.forwarded_ns,
                moments.acknowledged_ns,
                moments.ended_ns,
            ];
            assert!(order[0] > 0 && order.is_sorted(), "{moments:?}");
            assert_eq!((moments.first_byte_ns, span.response_bytes), (0, 0));
            let frames = worker.frames.lock().unwrap();
            let passed_on = String::from_utf8_lossy(&frames[0]).into_owned();
            assert!(passed_on.contains(KEPT), "{passed_on}");
        }
    }
}

#[test]
fn what_is_not_kept_has_no_span() {
    for ring in rings() {
        let (router, worker) = (router(ring, 0.0), Worker::start(1, Manner::Accept));
        router.route_to(Policy::RoundRobin, Ack::OnAccept, &[&worker]);
        let mut caller = Caller::dial(router.address);
        let unsampled = [(headers::TRACEPARENT, NOT_KEPT)];
        let broken = [(headers::TRACEPARENT, "00-1-2-3")];
        for frame in [
            with(&unsampled, b"x"),
            with(&broken, b"x"),
            with(&[], b"x"),
            frame_with(LISTEN_PATH, b"no headers at all", b"x"),
            kept("the only one"),
        ] {
            caller.send(&frame);
            assert_eq!(caller.reply(), "");
        }
        // Told in the order of their ends.
        span_of(&router, "the only one");
        assert_eq!(router.handle.stats.shard.spans_routed.get(), 1);
    }
}

#[test]
fn without_a_trace_of_the_caller_one_begins_here() {
    for ring in rings() {
        let (router, worker) = (router(ring, 1.0), Worker::start(1, Manner::Accept));
        router.route_to(Policy::RoundRobin, Ack::OnAccept, &[&worker]);
        let mut caller = Caller::dial(router.address);
        let mut traces = Vec::new();
        for _ in 0..2 {
            caller.send(&with(&[(headers::REQUEST_ID_FALLBACK, "r")], b"x"));
            assert_eq!(caller.reply(), "");
            let span = span_of(&router, "r");
            assert_eq!(span.parent_id, None);
            assert!(span.context.is_sampled() && span.context.span_id != 0);
            traces.push(span.context.trace_id);
        }
        assert_ne!(traces[0], traces[1]);
        // Who does not keep his own keeps none here, whatever the ratio.
        caller.send(&with(&[(headers::TRACEPARENT, NOT_KEPT)], b"x"));
        assert_eq!(caller.reply(), "");
        caller.send(&kept("next"));
        assert_eq!(caller.reply(), "");
        span_of(&router, "next");
    }
}

#[test]
fn without_spans_none_is_made() {
    for ring in rings() {
        let (router, worker) = (Router::start(ring), Worker::start(1, Manner::Accept));
        router.route_to(Policy::RoundRobin, Ack::OnAccept, &[&worker]);
        let mut caller = Caller::dial(router.address);
        caller.send(&kept("r"));
        assert_eq!(caller.reply(), "");
        let stats = &router.handle.stats.shard;
        wait_until("nothing is left of it", || stats.in_flight.get() == 0);
        assert_eq!((stats.spans_routed.get(), stats.spans_lost.get()), (0, 0));
    }
}

#[test]
fn refusals_say_why_and_further_tries_are_counted() {
    for ring in rings() {
        let router = router(ring, 0.0);
        router.publish(route(Policy::RoundRobin, Ack::OnAccept, &[]));
        let mut caller = Caller::dial(router.address);
        caller.send(&kept("nobody"));
        assert!(caller.reply().contains("no instance of"));
        let span = span_of(&router, "nobody");
        assert_eq!(span.ending, Ending::Refused(Why::NoInstance));
        assert_eq!((span.instance_id, span.attempts), (None, 0));

        // One that never becomes a request has a span as well, where its headers can be read.
        let of_caller = [
            (headers::TRACEPARENT, KEPT),
            (headers::REQUEST_ID, "nowhere"),
        ];
        let mut map = Vec::new();
        headers::write(&of_caller, &mut map);
        caller.send(&frame_with("0/no/such/endpoint", &map, b"x"));
        assert!(caller.reply().contains("unknown endpoint"));
        let span = span_of(&router, "nowhere");
        assert_eq!(span.ending, Ending::Refused(Why::UnknownEndpoint));
        assert_eq!(span.route, NONE);

        let busy = Worker::start(1, Manner::Overloaded);
        router.route_to(Policy::RoundRobin, Ack::OnAccept, &[&busy]);
        caller.send(&kept("overloaded"));
        assert!(caller.reply().contains("overloaded"));
        let span = span_of(&router, "overloaded");
        assert_eq!(span.ending, Ending::Refused(Why::AllOverloaded));
        assert_eq!((span.instance_id, span.attempts), (Some(1), 1));

        let (first, free) = (
            Worker::start(2, Manner::Overloaded),
            Worker::start(3, Manner::Accept),
        );
        router.route_to(Policy::RoundRobin, Ack::OnAccept, &[&first, &free]);
        // Whoever is first in turn: the second request finds the overloaded one set aside.
        for number in ["one", "two"] {
            caller.send(&kept(number));
            assert_eq!(caller.reply(), "");
        }
        let spans = ["one", "two"].map(|number| span_of(&router, number));
        for span in spans {
            assert_eq!(span.ending, Ending::Answered(Answered::Accepted));
            assert_eq!(span.instance_id, Some(3));
        }
        assert_eq!(spans.map(|span| span.attempts).iter().max(), Some(&2));
    }
}

#[test]
fn a_queue_that_nobody_reads_loses_spans_and_nothing_else() {
    const REQUESTS: u64 = 2_000;
    for ring in rings() {
        let (router, worker) = (router(ring, 1.0), Worker::start(1, Manner::Accept));
        router.route_to(Policy::RoundRobin, Ack::OnAccept, &[&worker]);
        let mut caller = Caller::dial(router.address);
        for _ in 0..REQUESTS / 100 {
            caller.send(&with(&[], b"x").repeat(100));
            for _ in 0..100 {
                assert_eq!(caller.reply(), "");
            }
        }
        let stats = &router.handle.stats.shard;
        wait_until("all are over", || {
            stats.spans_routed.get() + stats.spans_lost.get() == REQUESTS
        });
        assert!(stats.spans_lost.get() > 0, "{}", router.counters());
        while let Some(report) = router.handle.reports.next() {
            assert!(matches!(
                report,
                Report::Routed(..) | Report::Started { .. }
            ));
        }
        caller.send(&kept("after"));
        assert_eq!(caller.reply(), "");
        span_of(&router, "after");
    }
}

/// A frame whose caller keeps its trace, for a relaying router.
fn relayed(home: SocketAddr, request_id: &str) -> Vec<u8> {
    let of_caller = [
        (headers::TRACEPARENT, KEPT),
        (headers::REQUEST_ID, request_id),
    ];
    let envelope = envelope_in(&home.to_string(), "s", Json, b"1");
    with(&of_caller, &envelope)
}

fn relaying(ring: RingKind, workers: usize) -> Lab {
    let router = Router::with(ring, |config| {
        config.relay_home = Some(ends::home());
        config.spans = Tracing::On { ratio: 0.0 };
    });
    Lab::before(router, Policy::RoundRobin, Ack::OnForward, workers, |_| {})
}

#[test]
fn the_span_of_a_relayed_request_ends_with_its_response() {
    for ring in rings() {
        let mut lab = relaying(ring, 2);
        lab.caller.send(&relayed(lab.home(), "whole"));
        // The first one hangs up, so the other one gets it.
        let (first, asked) = lab.taker();
        lab.workers[first].reply("");
        drop(asked.call_home());
        let asked = lab.workers[1 - first].take();
        assert!(asked.headers.contains(KEPT), "{}", asked.headers);
        lab.workers[1 - first].reply("");
        let mut worker = asked.call_home();
        let response = answer(3, Json);
        worker.say(&response);
        let mut caller = lab.called();
        caller.handshake();
        assert_eq!(drained(&mut caller), response);
        drop(caller);
        let span = span_of(&lab.router, "whole");
        assert_eq!((span.mode, span.attempts), (Mode::Relay, 2));
        assert_eq!(span.instance_id, Some(2 - first as u64));
        assert_eq!(span.ending, Ending::Relayed(Relayed::Finished));
        // The prologue is the router's own.
        let prologue = corelane_codec::call_home::PROLOGUE_OK_FRAME.len();
        assert_eq!(span.response_bytes, (response.len() - prologue) as u64);
        let moments = span.moments;
        let order = [
            moments.received_ns,
            moments.chosen_ns,
            moments.forwarded_ns,
            moments.first_byte_ns,
            moments.ended_ns,
        ];
        assert!(order[0] > 0 && order.is_sorted(), "{moments:?}");
        assert!(moments.acknowledged_ns >= moments.chosen_ns);
        lab.empty();
        assert_eq!(lab.router.handle.stats.shard.spans_routed.get(), 1);
    }
}

#[test]
fn a_relayed_request_that_fails_says_how() {
    for ring in rings() {
        // Nobody is left.
        let mut lab = relaying(ring, 1);
        lab.caller.send(&relayed(lab.home(), "failed"));
        let (_, asked) = lab.taker();
        lab.workers[0].reply("");
        drop(asked.call_home());
        let mut caller = lab.called();
        caller.handshake();
        caller.error_prologue();
        drop(caller);
        let span = span_of(&lab.router, "failed");
        assert_eq!(span.ending, Ending::Relayed(Relayed::Failed));

        // It breaks off after its first item.
        let mut lab = relaying(ring, 1);
        lab.caller.send(&relayed(lab.home(), "cut"));
        let (_, asked) = lab.taker();
        lab.workers[0].reply("");
        let mut worker = asked.call_home();
        let response = answer(1, Json);
        let end = lab::items(1, Json).len() + corelane_codec::call_home::PROLOGUE_OK_FRAME.len();
        worker.say(&response[..end]);
        let mut caller = lab.called();
        caller.handshake();
        caller.prologue_ok();
        assert!(caller.item(Json).is_some());
        drop(worker);
        // To the sentinel: after that it is the caller who closes.
        drained(&mut caller);
        drop(caller);
        let span = span_of(&lab.router, "cut");
        assert_eq!(span.ending, Ending::Relayed(Relayed::Cut));
        assert!(span.moments.first_byte_ns > 0 && span.ending.is_failure());

        // Its envelope cannot be used, and names nobody to be called.
        lab.caller.send(&kept("bad"));
        assert_eq!(lab.caller.reply(), "");
        assert!(lab.caller.reply().contains("envelope"));
        let span = span_of(&lab.router, "bad");
        assert_eq!(span.ending, Ending::Refused(Why::BadEnvelope));
        assert_eq!((span.mode, span.route), (Mode::Relay, 0));
        lab.empty();
    }
}
