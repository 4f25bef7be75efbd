//! What a subscriber has missed, by the numbers that publishers give their events.

use std::collections::HashMap;

/// Publishers whose numbers are remembered; beyond that all are forgotten and begin anew.
const PUBLISHERS_MAX: usize = 16_384;

/// What has been counted.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Losses {
    /// Events whose numbers were skipped. One that comes late after all stays counted here.
    pub lost: u64,
    /// Events whose number was no higher than that of one before.
    pub repeated_or_late: u64,
    /// Messages that were no events, or of another topic.
    pub unreadable: u64,
    /// Publishers that were seen.
    pub publishers: u64,
}

/// The next number of each publisher.
#[derive(Debug, Default)]
pub(crate) struct Numbers {
    next: HashMap<u64, u64>,
    pub(crate) losses: Losses,
}

impl Numbers {
    /// An event has come.
    pub(crate) fn came(&mut self, publisher_id: u64, sequence: u64) {
        if self.next.len() >= PUBLISHERS_MAX && !self.next.contains_key(&publisher_id) {
            self.next.clear();
        }
        let after = sequence.saturating_add(1);
        match self.next.get_mut(&publisher_id) {
            None => {
                self.losses.publishers += 1;
                self.next.insert(publisher_id, after);
            }
            Some(next) if sequence < *next => self.losses.repeated_or_late += 1,
            Some(next) => {
                self.losses.lost += sequence - *next;
                *next = after;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_and_repetitions_by_publisher() {
        let mut numbers = Numbers::default();
        for (publisher, sequence) in [(1, 5), (1, 6), (2, 0), (1, 9), (1, 7), (2, 1), (1, 10)] {
            numbers.came(publisher, sequence);
        }
        let want = Losses {
            lost: 2,
            repeated_or_late: 1,
            unreadable: 0,
            publishers: 2,
        };
        assert_eq!(numbers.losses, want);
        numbers.came(3, u64::MAX);
        numbers.came(3, u64::MAX);
        assert_eq!(numbers.losses.lost, 2);
    }

    #[test]
    fn the_table_is_bounded() {
        let mut numbers = Numbers::default();
        for publisher in 0..2 * PUBLISHERS_MAX as u64 {
            numbers.came(publisher, 0);
        }
        assert!(numbers.next.len() <= PUBLISHERS_MAX);
        assert_eq!(numbers.losses.lost, 0);
    }
}
