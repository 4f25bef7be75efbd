//! Which events of a publisher have not come, came late, or came twice, by their numbers
//! (spec/events-discovery.md §3.2: from 0 on, one more with each publish).

use std::collections::HashMap;

use corelane_codec::event::{Tracker, Verdict};

/// Publishers that are known at the same time; one more takes the place of another, in turns.
const PUBLISHERS_MAX: usize = 65_536;

/// A publisher and its numbers.
#[derive(Clone, Debug)]
struct Followed {
    publisher_id: u64,
    tracker: Tracker,
}

/// All publishers.
#[derive(Default)]
pub(super) struct Sequences {
    trackers: Vec<Followed>,
    at: HashMap<u64, u32>,
    turn: usize,
}

impl Sequences {
    pub(super) fn len(&self) -> usize {
        self.trackers.len()
    }

    /// Where a publisher is kept; its next number is the first if it is new.
    pub(super) fn find(&mut self, publisher_id: u64) -> u32 {
        if let Some(place) = self.at.get(&publisher_id) {
            return *place;
        }
        let tracker = Followed {
            publisher_id,
            tracker: Tracker::default(),
        };
        let place = if self.trackers.len() < PUBLISHERS_MAX {
            self.trackers.push(tracker);
            self.trackers.len() as u32 - 1
        } else {
            let place = self.turn;
            self.turn = (place + 1) % PUBLISHERS_MAX;
            self.at.remove(&self.trackers[place].publisher_id);
            self.trackers[place] = tracker;
            place as u32
        };
        self.at.insert(publisher_id, place);
        place
    }

    /// Whether `place` is still this publisher's.
    #[inline]
    pub(super) fn is_at(&self, place: u32, publisher_id: u64) -> bool {
        self.trackers
            .get(place as usize)
            .is_some_and(|tracker| tracker.publisher_id == publisher_id)
    }

    /// An event has come.
    #[inline]
    pub(super) fn came(&mut self, place: u32, sequence: u64) -> Verdict {
        self.trackers[place as usize].tracker.came(sequence)
    }

    /// Nobody wants this publisher's events now: what follows is not to be taken for a loss.
    pub(super) fn begin_anew(&mut self, place: u32) {
        if let Some(followed) = self.trackers.get_mut(place as usize) {
            followed.tracker.begin_anew();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_publisher_counts_for_itself() {
        let mut sequences = Sequences::default();
        let (one, two) = (sequences.find(9), sequences.find(8));
        assert!(sequences.is_at(one, 9) && !sequences.is_at(one, 8));
        assert_eq!(sequences.came(one, 5), Verdict::Next);
        assert_eq!(sequences.came(two, 9), Verdict::Next);
        assert_eq!(sequences.came(one, 10), Verdict::Gap(4));
        sequences.begin_anew(one);
        assert_eq!(sequences.came(one, 5000), Verdict::Next);
        assert_eq!(sequences.came(two, 5000), Verdict::Gap(4990));
    }

    #[test]
    fn the_table_is_bounded() {
        let mut sequences = Sequences::default();
        for id in 0..PUBLISHERS_MAX as u64 {
            sequences.find(id);
        }
        let place = sequences.find(u64::MAX);
        assert_eq!((sequences.len(), place), (PUBLISHERS_MAX, 0));
        assert!(sequences.is_at(0, u64::MAX) && !sequences.at.contains_key(&0));
    }
}
