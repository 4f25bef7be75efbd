//! Which events of a publisher have not come, came late, or came twice, by their numbers
//! (spec/events-discovery.md §3.2: from 0 on, one more with each publish).

use std::collections::HashMap;

/// Publishers that are known at the same time; one more takes the place of another, in turns.
const PUBLISHERS_MAX: usize = 65_536;
/// Numbers before the highest one of which it is known whether they came.
const WINDOW: u64 = 128;

/// What an event's number says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is the one after the last, or the first that we see.
    Next,
    /// So many before it have not come.
    Gap(u64),
    /// It was missing until now.
    Late,
    /// It has come before.
    Duplicate,
}

/// What is known of a publisher.
#[derive(Clone, Debug)]
struct Tracker {
    publisher_id: u64,
    /// The highest number that has come.
    highest: u64,
    /// Bit n: `highest` - n has come, or was never expected.
    came: u128,
    /// The next number begins anew, because nobody wanted the events for a while.
    begins: bool,
}

/// All publishers.
#[derive(Default)]
pub(super) struct Sequences {
    trackers: Vec<Tracker>,
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
        let tracker = Tracker {
            publisher_id,
            highest: 0,
            came: 0,
            begins: true,
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
        let tracker = &mut self.trackers[place as usize];
        if tracker.begins {
            tracker.begins = false;
            (tracker.highest, tracker.came) = (sequence, u128::MAX);
            return Verdict::Next;
        }
        if sequence > tracker.highest {
            let ahead = sequence - tracker.highest;
            tracker.highest = sequence;
            tracker.came = match ahead < WINDOW {
                true => tracker.came << ahead | 1,
                false => 1,
            };
            return match ahead {
                1 => Verdict::Next,
                ahead => Verdict::Gap(ahead - 1),
            };
        }
        let behind = tracker.highest - sequence;
        if behind >= WINDOW {
            // Too long ago to know; whoever begins to count anew with the same id is late as well.
            return Verdict::Late;
        }
        let bit = 1 << behind;
        if tracker.came & bit != 0 {
            return Verdict::Duplicate;
        }
        tracker.came |= bit;
        Verdict::Late
    }

    /// Nobody wants this publisher's events now: what follows is not to be taken for a loss.
    pub(super) fn begin_anew(&mut self, place: u32) {
        if let Some(tracker) = self.trackers.get_mut(place as usize) {
            tracker.begins = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_are_counted_exactly() {
        let mut sequences = Sequences::default();
        let place = sequences.find(9);
        assert!(sequences.is_at(place, 9) && !sequences.is_at(place, 8));
        let mut came = |sequence| sequences.came(place, sequence);
        assert_eq!(came(5), Verdict::Next);
        assert_eq!(came(6), Verdict::Next);
        assert_eq!(came(10), Verdict::Gap(3));
        assert_eq!(came(8), Verdict::Late);
        assert_eq!(came(8), Verdict::Duplicate);
        assert_eq!(came(10), Verdict::Duplicate);
        assert_eq!(came(3), Verdict::Duplicate);
        assert_eq!(came(1000), Verdict::Gap(989));
        assert_eq!(came(999), Verdict::Late);
        assert_eq!(came(10), Verdict::Late);
        sequences.begin_anew(place);
        assert_eq!(sequences.came(place, 5000), Verdict::Next);
        assert_eq!(sequences.came(place, 5001), Verdict::Next);
    }

    #[test]
    fn numbers_at_the_edge_do_no_harm() {
        let mut sequences = Sequences::default();
        let place = sequences.find(0);
        assert_eq!(sequences.came(place, 0), Verdict::Next);
        assert_eq!(sequences.came(place, u64::MAX), Verdict::Gap(u64::MAX - 1));
        assert_eq!(sequences.came(place, u64::MAX), Verdict::Duplicate);
        assert_eq!(sequences.came(place, 0), Verdict::Late);
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
