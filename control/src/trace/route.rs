//! The span of a request that a shard has routed: `corelane.route`, beside the span of the worker
//! that got it.

use std::net::SocketAddr;
use std::time::{Duration, UNIX_EPOCH};

use corelane_engine::directory::Directory;
use corelane_engine::routed::RoutedSpan;
use corelane_engine::short_text::ShortText;

use super::Span;
use crate::flight;

/// What such a span says besides; each with its name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Hop {
    /// Texts.
    pub texts: Vec<(&'static str, String)>,
    /// Numbers.
    pub numbers: Vec<(&'static str, u64)>,
    /// What happened how long after its begin, in this order as a rule.
    pub moments: Vec<(&'static str, Duration)>,
}

impl Hop {
    /// The text of this name.
    pub(super) fn text(&self, name: &str) -> Option<&str> {
        let found = self.texts.iter().find(|(other, _)| *other == name);
        found.map(|(_, text)| text.as_str())
    }

    /// The number of this name.
    pub(super) fn number(&self, name: &str) -> Option<u64> {
        let found = self.numbers.iter().find(|(other, _)| *other == name);
        found.map(|(_, number)| *number)
    }

    /// The moment of this name.
    pub(super) fn moment(&self, name: &str) -> Option<Duration> {
        let found = self.moments.iter().find(|(other, _)| *other == name);
        found.map(|(_, after)| *after)
    }
}

/// What a shard has told, with names in place of numbers and the time of day in place of its clock.
pub(super) fn span(routed: &RoutedSpan, directory: &Directory) -> Span {
    at(routed, directory, flight::now())
}

/// The same at a moment: on the clock of the shards, and since 1970.
fn at(routed: &RoutedSpan, directory: &Directory, (now_ns, unix_ns): (u64, u64)) -> Span {
    let route = directory.routes.get(routed.route as usize);
    let received_ns = routed.moments.received_ns;
    let began_ns = unix_ns.saturating_sub(now_ns.saturating_sub(received_ns));
    let since = |ns: u64| Duration::from_nanos(ns.saturating_sub(received_ns));
    let text = |text: &ShortText| match text.as_str() {
        "" => None,
        text => Some(text.to_owned()),
    };
    Span {
        name: "corelane.route",
        is_server: true,
        context: routed.context,
        parent_id: routed.parent_id,
        tracestate: None,
        began: UNIX_EPOCH + Duration::from_nanos(began_ns),
        duration: since(routed.moments.ended_ns),
        busy: None,
        outcome: routed.ending.word(),
        failed: routed.ending.is_failure(),
        endpoint: route.and_then(|route| names(&route.target)),
        instance_id: routed.instance_id,
        request_id: text(&routed.request_id),
        x_request_id: text(&routed.x_request_id),
        hop: Some(Box::new(hop(routed, route.map(|route| &*route.listen)))),
    }
}

fn hop(routed: &RoutedSpan, listen: Option<&str>) -> Hop {
    let transport = match (routed.mode.word(), routed.secure) {
        ("lane", _) => "shared_memory",
        (_, true) => "tls",
        (_, false) => "tcp",
    };
    let texts = [
        ("response", Some(routed.mode.word().to_owned())),
        ("route", listen.map(str::to_owned)),
        ("transport", Some(transport.to_owned())),
        (
            "worker_address",
            routed.address.as_ref().map(SocketAddr::to_string),
        ),
    ];
    let passed = routed.response_bytes > 0;
    let numbers = [
        ("attempts", Some(u64::from(routed.attempts))),
        ("request_bytes", Some(routed.request_bytes)),
        ("response_bytes", passed.then_some(routed.response_bytes)),
    ];
    let moments = &routed.moments;
    let times = [
        ("chosen", moments.chosen_ns),
        ("forwarded", moments.forwarded_ns),
        ("acknowledged", moments.acknowledged_ns),
        ("first_byte", moments.first_byte_ns),
    ];
    let after = |ns: u64| Duration::from_nanos(ns.saturating_sub(moments.received_ns));
    let times = times.into_iter().filter(|(_, ns)| *ns > 0);
    Hop {
        texts: there(texts),
        numbers: there(numbers),
        moments: times.map(|(name, ns)| (name, after(ns))).collect(),
    }
}

fn there<T, const N: usize>(all: [(&'static str, Option<T>); N]) -> Vec<(&'static str, T)> {
    let all = all.into_iter();
    all.filter_map(|(name, value)| Some((name, value?)))
        .collect()
}

/// Namespace, component and endpoint.
fn names(target: &str) -> Option<[String; 3]> {
    let mut parts = target.splitn(3, '/').map(str::to_owned);
    Some([parts.next()?, parts.next()?, parts.next()?])
}

#[cfg(test)]
mod tests {
    use corelane_codec::trace_context::TraceContext;
    use corelane_engine::directory::{Ack, LoadRule, Policy, Route};
    use corelane_engine::routed::{Ending, Mode, Moments};
    use corelane_engine::stats::flight::{Answered, Why};
    use corelane_engine::table::NONE;

    use super::*;

    fn directory() -> Directory {
        Directory {
            routes: vec![Route {
                listen: "routed/backend/generate".into(),
                target: "dynamo/backend/generate".into(),
                paths: vec![],
                policy: Policy::RoundRobin,
                header: String::new(),
                ack: Ack::OnForward,
                ack_timeout_ns: 1,
                retries_max: 0,
                hold_bytes: 0,
                relay: None,
                lane: false,
                kv: None,
                load: LoadRule::OWN,
                instances: vec![],
            }],
        }
    }

    fn routed() -> RoutedSpan {
        RoutedSpan {
            context: TraceContext {
                trace_id: 1,
                span_id: 2,
                flags: 1,
            },
            parent_id: Some(3),
            request_id: ShortText::new("r").unwrap(),
            x_request_id: ShortText::EMPTY,
            route: 0,
            mode: Mode::Direct,
            secure: false,
            instance_id: Some(9),
            address: Some(([127, 0, 0, 1], 7).into()),
            attempts: 2,
            ending: Ending::Answered(Answered::Accepted),
            request_bytes: 300,
            response_bytes: 0,
            moments: Moments {
                received_ns: 1_000,
                chosen_ns: 1_000,
                forwarded_ns: 3_000,
                acknowledged_ns: 0,
                first_byte_ns: 0,
                ended_ns: 9_000,
            },
        }
    }

    #[test]
    fn numbers_get_their_names_and_times_their_day() {
        let span = at(&routed(), &directory(), (11_000, 1_000_000));
        assert_eq!(span.began, UNIX_EPOCH + Duration::from_nanos(990_000));
        assert_eq!(span.duration, Duration::from_nanos(8_000));
        assert_eq!(
            span.endpoint,
            Some(["dynamo", "backend", "generate"].map(str::to_owned))
        );
        assert_eq!((span.outcome, span.failed), ("accepted", false));
        assert_eq!(
            (span.request_id.as_deref(), span.x_request_id.as_deref()),
            (Some("r"), None)
        );
        let hop = span.hop.as_ref().unwrap();
        assert_eq!(hop.text("route"), Some("routed/backend/generate"));
        assert_eq!(hop.text("worker_address"), Some("127.0.0.1:7"));
        assert_eq!(hop.text("transport"), Some("tcp"));
        assert_eq!(
            (hop.number("attempts"), hop.number("response_bytes")),
            (Some(2), None)
        );
        assert_eq!(hop.moment("chosen"), Some(Duration::ZERO));
        assert_eq!(hop.moment("forwarded"), Some(Duration::from_nanos(2_000)));
        assert_eq!(hop.moment("acknowledged"), None);
        let fields = span.fields();
        assert!(fields.is_sorted_by_key(|(name, _)| *name), "{fields:?}");
        assert!(
            fields.contains(&("response", "direct".into())),
            "{fields:?}"
        );
    }

    #[test]
    fn a_refused_frame_may_have_no_route() {
        let mut routed = routed();
        (routed.route, routed.instance_id, routed.address) = (NONE, None, None);
        routed.ending = Ending::Refused(Why::UnknownEndpoint);
        let span = at(&routed, &directory(), (11_000, 1_000_000));
        assert_eq!((span.outcome, span.failed), ("unknown_endpoint", true));
        assert_eq!((span.endpoint.clone(), span.instance_id), (None, None));
        assert_eq!(span.hop.unwrap().text("route"), None);
    }
}
