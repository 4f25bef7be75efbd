//! How long requests of handlers take: histograms with the bounds that Dynamo's have
//! (spec/events-discovery.md §8.3), so that both can be read side by side.

use crate::stats::Cell;

/// Bounds of [`Times::duration`], in microseconds.
const DURATION: [u64; 17] = [
    5_000,
    10_000,
    25_000,
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    20_000_000,
    30_000_000,
    60_000_000,
    120_000_000,
    300_000_000,
    600_000_000,
];
/// Bounds of [`Times::first_response`].
const FIRST_RESPONSE: [u64; 14] = [
    1_000, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000,
    5_000_000, 10_000_000, 30_000_000, 60_000_000,
];
/// Bounds of [`Times::slot_wait`].
const SLOT_WAIT: [u64; 11] = [
    100, 1_000, 10_000, 50_000, 100_000, 500_000, 1_000_000, 5_000_000, 10_000_000, 30_000_000,
    60_000_000,
];

/// A histogram with one writer.
#[derive(Debug)]
pub struct Histogram {
    bounds_us: &'static [u64],
    /// One more than there are bounds.
    counts: Box<[Cell]>,
    sum_ns: Cell,
}

impl Histogram {
    fn new(bounds_us: &'static [u64]) -> Self {
        Self {
            bounds_us,
            counts: (0..=bounds_us.len()).map(|_| Cell::default()).collect(),
            sum_ns: Cell::default(),
        }
    }

    /// Counts one time. A time equal to a bound lies below it.
    pub fn record(&self, ns: u64) {
        let below = |bound: &u64| bound * 1_000 < ns;
        self.counts[self.bounds_us.partition_point(below)].add(1);
        self.sum_ns.add(ns);
    }

    /// Pairs of (upper bound in seconds, times counted between it and the one before); the last
    /// bound is infinite.
    pub fn buckets(&self) -> Vec<(f64, u64)> {
        let bounds = self.bounds_us.iter().map(|us| *us as f64 / 1e6);
        let counts = self.counts.iter().map(Cell::get);
        bounds.chain([f64::INFINITY]).zip(counts).collect()
    }

    /// Sum of all times, in seconds.
    pub fn sum_s(&self) -> f64 {
        self.sum_ns.get() as f64 / 1e9
    }
}

/// What is measured of each request of a handler.
#[derive(Debug)]
pub struct Times {
    /// From the moment that the handler got it to the end of its response.
    pub duration: Histogram,
    /// From there to the prologue of the response.
    pub first_response: Histogram,
    /// From the request's arrival to the moment that the handler got it.
    pub slot_wait: Histogram,
}

impl Default for Times {
    fn default() -> Self {
        Self {
            duration: Histogram::new(&DURATION),
            first_response: Histogram::new(&FIRST_RESPONSE),
            slot_wait: Histogram::new(&SLOT_WAIT),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_counted_once_and_below_its_bound() {
        let times = Times::default();
        for ns in [0, 5_000_000, 5_000_001, 600_000_000_000, 600_000_000_001] {
            times.duration.record(ns);
        }
        let buckets = times.duration.buckets();
        let counted: Vec<u64> = buckets.iter().map(|(_, count)| *count).collect();
        assert_eq!(buckets.len(), DURATION.len() + 1);
        assert_eq!(
            (counted[0], counted[1], counted[16], counted[17]),
            (2, 1, 1, 1)
        );
        assert_eq!(counted.iter().sum::<u64>(), 5);
        assert!((times.duration.sum_s() - 1_200.010_000_002).abs() < 1e-9);
    }

    #[test]
    fn bounds_ascend() {
        for bounds in [&DURATION[..], &FIRST_RESPONSE, &SLOT_WAIT] {
            assert!(bounds.windows(2).all(|pair| pair[0] < pair[1]));
        }
    }
}
