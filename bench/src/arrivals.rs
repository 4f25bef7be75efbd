//! When requests are due in an open loop: evenly, as a Poisson process, or in bursts.

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};

/// The pattern of arrivals at a given mean rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arrivals {
    /// The same gap between any two.
    Even,
    /// Exponentially distributed gaps: callers that know nothing of each other.
    Poisson,
    /// So many at the same instant, the instants evenly spaced. The rate stays that of requests.
    Burst(u32),
}

impl FromStr for Arrivals {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "even" => return Ok(Self::Even),
            "poisson" => return Ok(Self::Poisson),
            _ => {}
        }
        match text.strip_prefix("burst").map(str::parse) {
            Some(Ok(size @ 1..=10_000)) => Ok(Self::Burst(size)),
            _ => Err(format!(
                "'{text}' is not even, poisson or burstN (burst8; N up to 10000)"
            )),
        }
    }
}

impl fmt::Display for Arrivals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Even => f.write_str("even"),
            Self::Poisson => f.write_str("poisson"),
            Self::Burst(size) => write!(f, "burst{size}"),
        }
    }
}

impl Serialize for Arrivals {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

/// The due times of one slice, in nanoseconds from its begin; the first is 0.
pub(crate) struct Schedule {
    arrivals: Arrivals,
    gap_ns: f64,
    due_ns: f64,
    left_in_burst: u32,
    random: XorShift,
}

impl Schedule {
    /// A schedule of `rate` requests a second; the same `seed` gives the same times.
    pub(crate) fn new(arrivals: Arrivals, rate: f64, seed: u64) -> Self {
        let burst = match arrivals {
            Arrivals::Burst(size) => size,
            _ => 1,
        };
        let gap_ns = 1e9 * f64::from(burst) / rate;
        Self {
            arrivals,
            gap_ns,
            due_ns: 0.0,
            left_in_burst: burst,
            random: XorShift::new(seed),
        }
    }

    /// When the next request is due.
    pub(crate) fn due_ns(&self) -> u64 {
        self.due_ns as u64
    }

    /// Goes on to the request after it.
    pub(crate) fn advance(&mut self) {
        self.left_in_burst -= 1;
        if self.left_in_burst > 0 {
            return;
        }
        self.left_in_burst = match self.arrivals {
            Arrivals::Burst(size) => size,
            _ => 1,
        };
        self.due_ns += match self.arrivals {
            Arrivals::Poisson => -self.random.unit().ln() * self.gap_ns,
            _ => self.gap_ns,
        };
    }
}

/// Marsaglia's xorshift64: arrivals need spread, not secrecy.
struct XorShift(u64);

impl XorShift {
    fn new(seed: u64) -> Self {
        // Zero is the one state that it never leaves.
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// Uniform in (0, 1]: never 0, whose logarithm is infinite.
    fn unit(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((self.0 >> 11) as f64 + 1.0) / (1_u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(arrivals: Arrivals, rate: f64, count: usize) -> Vec<u64> {
        let mut schedule = Schedule::new(arrivals, rate, 7);
        (0..count)
            .map(|_| {
                let due = schedule.due_ns();
                schedule.advance();
                due
            })
            .collect()
    }

    fn gaps(times: &[u64]) -> Vec<f64> {
        times.windows(2).map(|w| (w[1] - w[0]) as f64).collect()
    }

    #[test]
    fn even_arrivals_have_equal_gaps() {
        let times = times(Arrivals::Even, 1000.0, 1001);
        assert_eq!(times[0], 0);
        assert!(gaps(&times).iter().all(|gap| (gap - 1e6).abs() <= 1.0));
        assert_eq!(times[1000], 1_000_000_000);
    }

    #[test]
    fn poisson_arrivals_keep_the_rate_and_are_exponential() {
        let times = times(Arrivals::Poisson, 1000.0, 200_001);
        let gaps = gaps(&times);
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        assert!((mean / 1e6 - 1.0).abs() < 0.01, "mean gap {mean} ns");
        let variance = gaps.iter().map(|g| (g - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        let variation = variance.sqrt() / mean;
        assert!(
            (variation - 1.0).abs() < 0.02,
            "coefficient of variation {variation}"
        );
        let above = gaps.iter().filter(|gap| **gap > mean).count() as f64 / gaps.len() as f64;
        assert!(
            (above - (-1.0_f64).exp()).abs() < 0.01,
            "{above} of the gaps above the mean"
        );
    }

    #[test]
    fn bursts_are_due_at_one_instant_and_keep_the_rate_of_requests() {
        let times = times(Arrivals::Burst(8), 1000.0, 801);
        for burst in times[..800].chunks(8) {
            assert!(burst.iter().all(|due| *due == burst[0]));
        }
        assert_eq!(times[8], 8_000_000);
        assert_eq!(times[800], 800_000_000);
    }

    #[test]
    fn names_parse_and_print() {
        for name in ["even", "poisson", "burst8", "burst1"] {
            assert_eq!(name.parse::<Arrivals>().unwrap().to_string(), name);
        }
        for bad in ["", "burst", "burst0", "burst-1", "burst99999", "uniform"] {
            assert!(bad.parse::<Arrivals>().is_err(), "{bad}");
        }
    }

    #[test]
    fn different_seeds_give_different_times() {
        let mut one = Schedule::new(Arrivals::Poisson, 1000.0, 1);
        let mut two = Schedule::new(Arrivals::Poisson, 1000.0, 2);
        one.advance();
        two.advance();
        assert_ne!(one.due_ns(), two.due_ns());
    }
}
