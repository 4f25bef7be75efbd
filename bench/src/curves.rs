//! Whole distributions of a run, as plots and files for other eyes want them: loads, their arms,
//! and intervals of time.

use std::time::Duration;

use hdrhistogram::Histogram;

use crate::report::new_histogram;

/// One load and what each arm has shown under it.
#[derive(Clone, Debug)]
pub(crate) struct Panel {
    /// The load.
    pub(crate) title: String,
    /// The arms, in the order of the report.
    pub(crate) curves: Vec<Curve>,
}

/// One arm under one load.
#[derive(Clone, Debug)]
pub(crate) struct Curve {
    /// The arm.
    pub(crate) arm: String,
    /// Its latencies in time order.
    pub(crate) intervals: Vec<Interval>,
    /// Replies in a second, the median over rounds.
    pub(crate) requests_per_s: f64,
    /// CPU time of what is measured for each request, where it is known.
    pub(crate) cpu_us: Option<f64>,
    /// The hiccup meter in the same seconds.
    pub(crate) hiccup_ns: Histogram<u64>,
}

/// A piece of the measured time.
#[derive(Clone, Debug)]
pub(crate) struct Interval {
    /// When it began, since the run began.
    pub(crate) start: Duration,
    /// How long it took.
    pub(crate) length: Duration,
    /// Latencies in ns of what began in it.
    pub(crate) latency_ns: Histogram<u64>,
}

impl Curve {
    /// The latencies of all intervals in ns.
    pub(crate) fn latency_ns(&self) -> Histogram<u64> {
        sum_ns(&self.intervals)
    }
}

/// The latencies of all intervals in ns.
pub(crate) fn sum_ns(intervals: &[Interval]) -> Histogram<u64> {
    let mut sum = new_histogram();
    for interval in intervals {
        // The bounds of all histograms are the same, so adding cannot fail.
        sum += &interval.latency_ns;
    }
    sum
}

/// `latency_ns` of an interval at a quantile, in microseconds; none where nothing was measured.
pub(crate) fn quantile_us(latency_ns: &Histogram<u64>, quantile: f64) -> Option<f64> {
    let value_ns = latency_ns.value_at_quantile(quantile).max(1);
    (!latency_ns.is_empty()).then_some(value_ns as f64 / 1e3)
}
