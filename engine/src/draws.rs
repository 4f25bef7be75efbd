//! Numbers that nobody can guess, and the ids of spans that are made of them.

use std::cell::Cell;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;

use corelane_codec::trace_context::TraceContext;

use crate::served::Tracing;

/// Numbers drawn on one shard: a keyed hash of a counter, which nobody can guess who does not know
/// the key.
pub(crate) struct Draws {
    random: RandomState,
    drawn: Cell<u64>,
    /// Roots until one is kept; none before the first.
    passes: Cell<Option<u64>>,
}

impl Draws {
    /// With a key of its own.
    pub(crate) fn new() -> Draws {
        Draws {
            random: RandomState::new(),
            drawn: Cell::new(0),
            passes: Cell::new(None),
        }
    }

    /// The next one.
    pub(crate) fn draw(&self) -> u64 {
        self.drawn.set(self.drawn.get() + 1);
        self.random.hash_one(self.drawn.get())
    }

    /// The same where zero means none.
    fn id(&self) -> u64 {
        self.draw().max(1)
    }

    /// A span below `parent`, or the root of a trace of its own.
    pub(crate) fn context(&self, parent: Option<TraceContext>, ratio: f64) -> TraceContext {
        match parent {
            Some(parent) => self.child(parent),
            None => {
                let low = self.id();
                self.root(low).sampled(Tracing::keeps(ratio, low))
            }
        }
    }

    /// The same, if its trace is kept; `ratio` is always the same. How many roots pass before one
    /// is kept is drawn at once, so that those cost next to nothing.
    pub(crate) fn kept(&self, parent: Option<TraceContext>, ratio: f64) -> Option<TraceContext> {
        if let Some(parent) = parent {
            return parent.is_sampled().then(|| self.child(parent));
        }
        let left = self.passes.get().unwrap_or_else(|| self.gap(ratio));
        self.passes.set(left.checked_sub(1));
        (left == 0).then(|| self.root(self.kept_id(ratio)).sampled(true))
    }

    /// How many in a row are not kept: of a geometric distribution.
    fn gap(&self, ratio: f64) -> u64 {
        // Between 0 and 1, and neither.
        let chance = ((self.draw() >> 12) as f64 + 0.5) / (1u64 << 52) as f64;
        // 0 for a ratio of 1; for one of 0 infinite, which is the greatest number here.
        (chance.ln() / (-ratio).ln_1p()) as u64
    }

    /// One of those that [`Tracing::keeps`].
    fn kept_id(&self, ratio: f64) -> u64 {
        let drawn = self.draw();
        let high = ((drawn >> 11) as f64 * ratio) as u64;
        (high << 11 | drawn & 0x7ff).max(1)
    }

    fn child(&self, parent: TraceContext) -> TraceContext {
        let span_id = self.id();
        TraceContext { span_id, ..parent }
    }

    /// A trace with these lower bits.
    fn root(&self, low: u64) -> TraceContext {
        TraceContext {
            trace_id: u128::from(self.id()) << 64 | u128::from(low),
            span_id: self.id(),
            flags: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: TraceContext = TraceContext {
        trace_id: 5,
        span_id: 7,
        flags: 0,
    };

    #[test]
    fn a_child_keeps_what_its_parent_decided() {
        let draws = Draws::new();
        let child = draws.context(Some(PARENT), 1.0);
        assert_eq!((child.trace_id, child.flags), (5, 0));
        assert!(child.span_id != 7 && child.span_id != 0);
        assert_eq!(draws.kept(Some(PARENT), 1.0), None);
        let kept = draws.kept(Some(PARENT.sampled(true)), 0.0).unwrap();
        assert_eq!((kept.trace_id, kept.flags), (5, 1));
        assert!(kept.span_id != 7 && kept.span_id != child.span_id);
    }

    #[test]
    fn roots_are_kept_by_the_ratio() {
        let draws = Draws::new();
        let kept = |ratio| {
            let roots = (0..1_000).map(|_| draws.context(None, ratio));
            roots.filter(TraceContext::is_sampled).count()
        };
        assert_eq!((kept(0.0), kept(1.0)), (0, 1_000));
        assert!((100..400).contains(&kept(0.25)));
        let kept = |ratio| (0..1_000).filter_map(move |_| Draws::new().kept(None, ratio));
        assert!(kept(1.0).all(|root| root.is_sampled() && root.span_id != 0));
        assert_eq!((kept(0.0).count(), kept(1.0).count()), (0, 1_000));
        assert!((100..400).contains(&kept(0.25).count()));
        let draws = Draws::new();
        let kept: Vec<_> = (0..1_000).filter_map(|_| draws.kept(None, 0.25)).collect();
        assert!((150..350).contains(&kept.len()), "{}", kept.len());
        assert!(
            kept.iter()
                .all(|root| Tracing::keeps(0.25, root.trace_id as u64))
        );
        let mut ids: Vec<u128> = (0..100)
            .map(|_| draws.context(None, 1.0).trace_id)
            .collect();
        ids.dedup();
        assert_eq!(ids.len(), 100);
    }
}
