//! The span of a call that this process makes: `router.route_request`, whose id goes to the worker
//! as `traceparent`.

use std::time::{Instant, SystemTime};

use corelane_codec::trace_context::TraceContext;
use corelane_engine::served::Tracing;
use uuid::Uuid;

use super::{Span, tell, tracing};

/// A call under way.
#[derive(Clone, Copy, Debug)]
pub struct CallSpan {
    context: TraceContext,
    parent_id: Option<u64>,
    began: SystemTime,
    since: Instant,
}

/// 64 random bits, not all zero.
fn draw() -> u64 {
    // Version and variant stand in different halves: each is covered by bits that are random.
    let (high, low) = Uuid::new_v4().as_u64_pair();
    (high ^ low).max(1)
}

impl CallSpan {
    /// A call begins, below `parent` if there is one. None where no spans are made.
    pub fn begin(parent: Option<TraceContext>) -> Option<Self> {
        let Tracing::On { ratio } = tracing() else {
            return None;
        };
        let context = match parent {
            Some(parent) => TraceContext {
                span_id: draw(),
                ..parent
            },
            None => {
                let (high, low) = (draw(), draw());
                let root = TraceContext {
                    trace_id: u128::from(high) << 64 | u128::from(low),
                    span_id: draw(),
                    flags: 0,
                };
                root.sampled(Tracing::keeps(ratio, low))
            }
        };
        Some(Self {
            context,
            parent_id: parent.map(|parent| parent.span_id),
            began: SystemTime::now(),
            since: Instant::now(),
        })
    }

    /// What the worker gets as `traceparent`.
    pub fn context(&self) -> TraceContext {
        self.context
    }

    /// The call has ended.
    pub fn end(self, outcome: &'static str, failed: bool, instance_id: u64) {
        tell(Span {
            name: "router.route_request",
            is_server: false,
            context: self.context,
            parent_id: self.parent_id,
            tracestate: None,
            began: self.began,
            duration: self.since.elapsed(),
            busy: None,
            outcome,
            failed,
            endpoint: None,
            instance_id: Some(instance_id),
            request_id: None,
            x_request_id: None,
            hop: None,
        });
    }
}
