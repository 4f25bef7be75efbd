//! Which events of one publisher have not come, came late, or came twice, by their numbers
//! (spec/events-discovery.md §3.2: from 0 on, one more with each publish).

/// Numbers before the highest one of which it is known whether they came.
const WINDOW: u64 = 128;

/// What an event's number says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is the one after the last, or the first that we see.
    Next,
    /// So many before it have not come.
    Gap(u64),
    /// It was missing until now, or is so old that nobody knows.
    Late,
    /// It has come before.
    Duplicate,
}

/// The numbers of one publisher. Its first one is where counting begins.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tracker {
    /// The highest number that has come.
    highest: u64,
    /// Bit n: `highest` - n has come, or was never expected.
    came: u128,
    /// A number has come since the beginning.
    begun: bool,
}

impl Tracker {
    /// An event has come.
    #[inline]
    pub fn came(&mut self, sequence: u64) -> Verdict {
        if !self.begun {
            (self.begun, self.highest, self.came) = (true, sequence, u128::MAX);
            return Verdict::Next;
        }
        if sequence > self.highest {
            let ahead = sequence - self.highest;
            self.highest = sequence;
            self.came = match ahead < WINDOW {
                true => self.came << ahead | 1,
                false => 1,
            };
            return match ahead {
                1 => Verdict::Next,
                ahead => Verdict::Gap(ahead - 1),
            };
        }
        let behind = self.highest - sequence;
        if behind >= WINDOW {
            // Too long ago to know; whoever begins to count anew with the same id is late as well.
            return Verdict::Late;
        }
        let bit = 1 << behind;
        if self.came & bit != 0 {
            return Verdict::Duplicate;
        }
        self.came |= bit;
        Verdict::Late
    }

    /// What follows is not to be taken for a loss: nobody wanted what came before it.
    pub fn begin_anew(&mut self) {
        self.begun = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_are_counted_exactly() {
        let mut tracker = Tracker::default();
        assert_eq!(tracker.came(5), Verdict::Next);
        assert_eq!(tracker.came(6), Verdict::Next);
        assert_eq!(tracker.came(10), Verdict::Gap(3));
        assert_eq!(tracker.came(8), Verdict::Late);
        assert_eq!(tracker.came(8), Verdict::Duplicate);
        assert_eq!(tracker.came(10), Verdict::Duplicate);
        assert_eq!(tracker.came(3), Verdict::Duplicate);
        assert_eq!(tracker.came(1000), Verdict::Gap(989));
        assert_eq!(tracker.came(999), Verdict::Late);
        assert_eq!(tracker.came(10), Verdict::Late);
        tracker.begin_anew();
        assert_eq!(tracker.came(5000), Verdict::Next);
        assert_eq!(tracker.came(5001), Verdict::Next);
    }

    #[test]
    fn numbers_at_the_edge_do_no_harm() {
        let mut tracker = Tracker::default();
        assert_eq!(tracker.came(0), Verdict::Next);
        assert_eq!(tracker.came(u64::MAX), Verdict::Gap(u64::MAX - 1));
        assert_eq!(tracker.came(u64::MAX), Verdict::Duplicate);
        assert_eq!(tracker.came(0), Verdict::Late);
    }
}
