//! Whether the core that has a changed configuration is worse off with it. Pure: counts in, a
//! verdict out.

use std::ops::{Add, Sub};

use corelane_engine::stats::ShardStats;

/// So many requests of the other cores say how things are; with fewer the core's own past does.
const ENOUGH: u64 = 20;
/// With so many failures nobody waits for the end of the watch.
const PLENTY: u64 = 10;

/// What counts as a failure, by its name in metrics.
const FAILURES: [&str; 14] = [
    "refused_unknown_endpoint",
    "refused_no_instance",
    "refused_overloaded",
    "refused_frame_too_large",
    "refused_bad_envelope",
    "refused_by_instances",
    "callers_told",
    "callers_untold",
    "ack_timeouts",
    "protocol_errors",
    "connections_refused",
    "relays_failed",
    "relays_cut",
    "relay_timeouts",
];

/// Requests, and what of them went wrong.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Tally {
    /// Requests.
    pub requests: u64,
    /// In the order of their names.
    failures: [u64; FAILURES.len()],
}

impl Tally {
    /// What a core has counted since its start.
    pub fn of(stats: &ShardStats) -> Tally {
        let mut tally = Tally {
            requests: stats.requests.get(),
            ..Tally::default()
        };
        for (name, _, _, value) in stats.each() {
            if let Some(at) = FAILURES.iter().position(|failure| *failure == name) {
                tally.failures[at] = value;
            }
        }
        tally
    }

    /// Refused, failed, overdue: all together.
    pub fn failed(&self) -> u64 {
        self.failures.iter().sum()
    }

    /// A refused frame is no request, so there may be more failures than requests.
    fn percent(&self) -> f64 {
        let all = self.requests.max(self.failed()).max(1);
        self.failed() as f64 * 100.0 / all as f64
    }

    /// Which failures there are.
    fn names(&self) -> String {
        let some = FAILURES.iter().zip(self.failures);
        let some = some.filter(|(_, count)| *count > 0);
        let names = some.map(|(name, count)| format!("{name} {count}"));
        names.collect::<Vec<_>>().join(", ")
    }

    fn with(self, other: Tally, each: impl Fn(u64, u64) -> u64) -> Tally {
        Tally {
            requests: each(self.requests, other.requests),
            failures: std::array::from_fn(|at| each(self.failures[at], other.failures[at])),
        }
    }
}

impl Sub for Tally {
    type Output = Tally;
    fn sub(self, before: Tally) -> Tally {
        self.with(before, u64::saturating_sub)
    }
}

impl Add for Tally {
    type Output = Tally;
    fn add(self, other: Tally) -> Tally {
        self.with(other, |one, other| one + other)
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
        let (requests, failed) = (self.core.requests, self.core.failed());
        if failed == 0 || (!is_over && failed < PLENTY) {
            return None;
        }
        let (whom, usual) = match self.others.requests.max(self.others.failed()) >= ENOUGH {
            true => ("of the other cores' meanwhile", self.others.percent()),
            false => ("before", self.before.percent()),
        };
        let now = self.core.percent();
        (now > usual + f64::from(allowed_pct)).then(|| {
            let names = self.core.names();
            format!(
                "{failed} of {requests} requests failed ({names}): {now:.1} %, {usual:.1} % {whom}"
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(requests: u64, failed: u64) -> Tally {
        let mut tally = Tally {
            requests,
            ..Tally::default()
        };
        tally.failures[1] = failed;
        tally
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
        let says = "10 of 10 requests failed (refused_no_instance 10): 100.0 %, 0.0 % before";
        assert_eq!(why, says);
    }

    #[test]
    fn counts_of_a_core_are_added_up() {
        let stats = ShardStats::default();
        stats.requests.add(7);
        stats.refused_no_instance.add(2);
        stats.ack_timeouts.add(1);
        let counted = Tally::of(&stats) - tally(1, 1);
        assert_eq!((counted.requests, counted.failed()), (6, 2));
        assert_eq!(counted.names(), "refused_no_instance 1, ack_timeouts 1");
        assert_eq!(tally(1, 2) + tally(3, 4), tally(4, 6));
        let known = stats.each().into_iter().map(|(name, ..)| name);
        let known: Vec<&str> = known.collect();
        assert!(
            FAILURES.iter().all(|name| known.contains(name)),
            "a cell has another name"
        );
    }
}
