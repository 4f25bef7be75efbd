//! Whether the core that has a changed configuration is worse off with it. Pure: counts in, a
//! verdict out.

use std::ops::{Add, Sub};

use corelane_engine::stats::ShardStats;

/// So many requests of the other cores say how things are; with fewer the core's own past does.
const ENOUGH: u64 = 20;
/// With so many failures nobody waits for the end of the watch.
const PLENTY: u64 = 10;

/// Requests, and those of them that went wrong.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Tally {
    /// Requests.
    pub requests: u64,
    /// Refused, failed, overdue.
    pub failed: u64,
}

impl Tally {
    /// What a core has counted since its start.
    pub fn of(stats: &ShardStats) -> Tally {
        let failed = [
            &stats.refused_unknown_endpoint,
            &stats.refused_no_instance,
            &stats.refused_overloaded,
            &stats.refused_frame_too_large,
            &stats.refused_bad_envelope,
            &stats.refused_by_instances,
            &stats.callers_told,
            &stats.callers_untold,
            &stats.ack_timeouts,
            &stats.protocol_errors,
            &stats.connections_refused,
            &stats.relays_failed,
            &stats.relays_cut,
            &stats.relay_timeouts,
        ];
        Tally {
            requests: stats.requests.get(),
            failed: failed.iter().map(|cell| cell.get()).sum(),
        }
    }

    /// A refused frame is no request, so there may be more failures than requests.
    fn percent(self) -> f64 {
        let all = self.requests.max(self.failed).max(1);
        self.failed as f64 * 100.0 / all as f64
    }
}

impl Sub for Tally {
    type Output = Tally;
    fn sub(self, before: Tally) -> Tally {
        Tally {
            requests: self.requests.saturating_sub(before.requests),
            failed: self.failed.saturating_sub(before.failed),
        }
    }
}

impl Add for Tally {
    type Output = Tally;
    fn add(self, other: Tally) -> Tally {
        Tally {
            requests: self.requests + other.requests,
            failed: self.failed + other.failed,
        }
    }
}

/// What was counted of a watch.
#[derive(Clone, Copy, Debug, Default)]
pub struct Watched {
    /// Of the core, before it.
    pub before: Tally,
    /// Of the core, during it.
    pub core: Tally,
    /// Of all others, during it.
    pub others: Tally,
}

impl Watched {
    /// Why the core is worse off, if it is: more of its requests fail than of the others' and
    /// `allowed_pct` percent. Before the end of the watch only many failures count.
    pub fn worse(&self, allowed_pct: u8, is_over: bool) -> Option<String> {
        if self.core.failed == 0 || (!is_over && self.core.failed < PLENTY) {
            return None;
        }
        let (whom, usual) = match self.others.requests.max(self.others.failed) >= ENOUGH {
            true => ("of the other cores' meanwhile", self.others.percent()),
            false => ("before", self.before.percent()),
        };
        let now = self.core.percent();
        (now > usual + f64::from(allowed_pct)).then(|| {
            let Tally { requests, failed } = self.core;
            format!("{failed} of {requests} requests failed: {now:.1} %, {usual:.1} % {whom}")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(requests: u64, failed: u64) -> Tally {
        Tally { requests, failed }
    }

    fn worse(before: Tally, core: Tally, others: Tally, is_over: bool) -> bool {
        let watched = Watched {
            before,
            core,
            others,
        };
        watched.worse(1, is_over).is_some()
    }

    #[test]
    fn others_are_what_it_is_measured_by() {
        let none = Tally::default();
        assert!(!worse(none, tally(1_000, 0), none, true));
        assert!(
            !worse(none, tally(1_000, 10), tally(1_000, 0), true),
            "one percent is allowed"
        );
        assert!(worse(none, tally(1_000, 11), tally(1_000, 0), true));
        assert!(
            !worse(none, tally(1_000, 500), tally(1_000, 495), true),
            "all are badly off"
        );
        assert!(worse(tally(9, 9), tally(1_000, 500), tally(1_000, 0), true));
    }

    #[test]
    fn without_others_its_past_counts() {
        let (few, past) = (tally(5, 5), tally(10_000, 3_000));
        assert!(!worse(past, tally(100, 31), few, true));
        assert!(worse(past, tally(100, 32), few, true));
        assert!(
            worse(Tally::default(), tally(0, 1), few, true),
            "a refused frame is no request"
        );
    }

    #[test]
    fn many_failures_end_the_watch_and_few_do_not() {
        let none = Tally::default();
        assert!(!worse(none, tally(9, 9), none, false));
        assert!(worse(none, tally(10, 10), none, false));
        let watched = Watched {
            core: tally(10, 10),
            ..Watched::default()
        };
        let why = watched.worse(1, false).unwrap();
        assert_eq!(why, "10 of 10 requests failed: 100.0 %, 0.0 % before");
    }

    #[test]
    fn counts_of_a_core_are_added_up() {
        let stats = ShardStats::default();
        stats.requests.add(7);
        stats.refused_no_instance.add(2);
        stats.ack_timeouts.add(1);
        assert_eq!(Tally::of(&stats) - tally(1, 1), tally(6, 2));
        assert_eq!(tally(1, 2) + tally(3, 4), tally(4, 6));
    }
}
