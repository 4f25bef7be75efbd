//! What a subscriber has missed, by the numbers that publishers give their events.

use std::collections::HashMap;

use corelane_codec::event::{Tracker, Verdict};

/// Publishers whose numbers are remembered; beyond that all are forgotten and begin anew.
const PUBLISHERS_MAX: usize = 16_384;

/// What has been counted.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Losses {
    /// Events whose numbers were skipped. One that comes late after all stays counted here.
    pub lost: u64,
    /// Those of them that came after others; also those that are too old to know.
    pub late: u64,
    /// Events whose number had come before; they are delivered all the same.
    pub duplicate: u64,
    /// Events that came and found this subscriber's queue full; they are among the lost ones too,
    /// once the next one comes.
    pub dropped: u64,
    /// Messages that were no events, or of another topic.
    pub unreadable: u64,
    /// Publishers that were seen.
    pub publishers: u64,
}

/// The numbers of each publisher.
#[derive(Debug, Default)]
pub(crate) struct Numbers {
    of: HashMap<u64, Tracker>,
    pub(crate) losses: Losses,
}

impl Numbers {
    /// An event has come.
    pub(crate) fn came(&mut self, publisher_id: u64, sequence: u64) {
        if self.of.len() >= PUBLISHERS_MAX && !self.of.contains_key(&publisher_id) {
            self.of.clear();
        }
        let losses = &mut self.losses;
        let tracker = self.of.entry(publisher_id).or_insert_with(|| {
            losses.publishers += 1;
            Tracker::default()
        });
        match tracker.came(sequence) {
            Verdict::Next => {}
            Verdict::Gap(events) => losses.lost = losses.lost.saturating_add(events),
            Verdict::Late => losses.late += 1,
            Verdict::Duplicate => losses.duplicate += 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_and_repetitions_by_publisher() {
        let mut numbers = Numbers::default();
        for (publisher, sequence) in [(1, 5), (1, 6), (2, 0), (1, 9), (1, 7), (1, 7), (2, 1)] {
            numbers.came(publisher, sequence);
        }
        let want = Losses {
            lost: 2,
            late: 1,
            duplicate: 1,
            publishers: 2,
            ..Losses::default()
        };
        assert_eq!(numbers.losses, want);
        numbers.came(3, u64::MAX);
        numbers.came(3, u64::MAX);
        assert_eq!((numbers.losses.lost, numbers.losses.duplicate), (2, 2));
    }

    #[test]
    fn the_table_is_bounded() {
        let mut numbers = Numbers::default();
        for publisher in 0..2 * PUBLISHERS_MAX as u64 {
            numbers.came(publisher, 0);
        }
        assert!(numbers.of.len() <= PUBLISHERS_MAX);
        assert_eq!(numbers.losses.lost, 0);
    }
}
