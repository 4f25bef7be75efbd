//! Which events have been taken already, where several brokers bring the same ones
//! (spec/events-discovery.md §3.6).

use std::collections::{HashSet, VecDeque};

/// Events that are remembered.
const SEEN_MAX: usize = 100_000;

/// The last events, by publisher and number.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    events: HashSet<(u64, u64)>,
    order: VecDeque<(u64, u64)>,
}

impl Seen {
    /// Whether this one is new; it is remembered from now on.
    pub(crate) fn is_new(&mut self, publisher_id: u64, sequence: u64) -> bool {
        let event = (publisher_id, sequence);
        if !self.events.insert(event) {
            return false;
        }
        self.order.push_back(event);
        if self.order.len() > SEEN_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.events.remove(&oldest);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// spec/events-discovery.md §3.6: 100 000 pairs of publisher and sequence.
    #[test]
    fn the_last_ones_are_remembered() {
        let mut seen = Seen::default();
        assert!(seen.is_new(1, 0) && seen.is_new(2, 0) && !seen.is_new(1, 0));
        for sequence in 1..SEEN_MAX as u64 - 1 {
            assert!(seen.is_new(1, sequence));
        }
        assert!(!seen.is_new(1, 0));
        assert!(seen.is_new(3, 0));
        // The first one had to go.
        assert!(seen.is_new(1, 0) && !seen.is_new(1, 2));
        assert_eq!(seen.events.len(), SEEN_MAX);
    }
}
