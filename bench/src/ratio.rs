//! How much more or less one arm is than another: the median over rounds, how far the rounds reach,
//! and how sure the median is.
//!
//! ```text
//! arm    a1 a2 a3 a4 a5          of_rounds: each round against the same round
//! other  b1 b2 b3 b4 b5          of_runs:   rounds of two runs that never met
//! ```
//! The interval is a bootstrap: rounds are drawn again with replacement, many times over, and 95 of
//! 100 such medians lie in it. Nothing is assumed of how times are distributed.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::report::{Spread, median, round};

/// Times that rounds are drawn again.
const DRAWS: usize = 2000;
/// With fewer rounds the reach of all of them is less than 95 % sure: 5 fall on the same side of
/// the true median once in 16 times.
const ROUNDS_MIN: usize = 6;

/// A ratio over rounds.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
pub(crate) struct Ratio {
    /// The median.
    pub(crate) median: f64,
    /// The least.
    pub(crate) min: f64,
    /// The greatest.
    pub(crate) max: f64,
    /// Lower end of the 95 % confidence interval of the median; none with fewer than 6 rounds.
    pub(crate) low: Option<f64>,
    /// Its upper end.
    pub(crate) high: Option<f64>,
}

impl Ratio {
    /// Of `of[i] / by[i]`: each round against the same round, since machines drift between rounds.
    pub(crate) fn of_rounds(of: &[f64], by: &[f64]) -> Option<Self> {
        let ratios: Vec<f64> = of.iter().zip(by).map(|(of, by)| of / by).collect();
        let ratios: Vec<f64> = ratios.into_iter().filter(|one| one.is_finite()).collect();
        let draws = (ratios.len() >= ROUNDS_MIN).then(|| {
            let mut chance = Chance::new();
            (0..DRAWS)
                .map(move |_| median(chance.draw(&ratios)))
                .collect()
        });
        Self::with(of.iter().zip(by).map(|(of, by)| of / by), None, draws)
    }

    /// Of the medians of two runs; their rounds do not belong together.
    pub(crate) fn of_runs(of: &[f64], by: &[f64]) -> Option<Self> {
        let finite = |values: &[f64]| -> Vec<f64> {
            values
                .iter()
                .copied()
                .filter(|one| one.is_finite())
                .collect()
        };
        let (of, by) = (finite(of), finite(by));
        let middle = median(of.iter().copied()) / median(by.iter().copied());
        let draws = (of.len().min(by.len()) >= ROUNDS_MIN).then(|| {
            let mut chance = Chance::new();
            let one = |_| median(chance.draw(&of)) / median(chance.draw(&by));
            (0..DRAWS).map(one).collect()
        });
        let all = of.iter().flat_map(|of| by.iter().map(move |by| of / by));
        Self::with(all, Some(middle), draws)
    }

    fn with(
        ratios: impl Iterator<Item = f64>,
        middle: Option<f64>,
        draws: Option<Vec<f64>>,
    ) -> Option<Self> {
        let spread = Spread::of(ratios)?;
        let (low, high) = draws.as_deref().and_then(ends).unzip();
        Some(Self {
            median: middle.map_or(spread.median, round),
            min: spread.min,
            max: spread.max,
            low,
            high,
        })
    }

    /// As it stands in a report.
    pub(crate) fn of_json(told: &Value) -> Option<Self> {
        serde_json::from_value(told.clone()).ok()
    }

    /// Whether 1 lies outside the interval: then the arms differ by more than chance between
    /// rounds explains.
    pub(crate) fn is_sure(&self) -> bool {
        self.low.is_some_and(|low| low > 1.0) || self.high.is_some_and(|high| high < 1.0)
    }
}

/// The ends between which 95 of 100 draws lie.
fn ends(draws: &[f64]) -> Option<(f64, f64)> {
    let mut draws: Vec<f64> = draws
        .iter()
        .copied()
        .filter(|one| one.is_finite())
        .collect();
    draws.sort_by(f64::total_cmp);
    let at = |share: f64| {
        let place = (share * draws.len() as f64) as usize;
        draws.get(place.min(draws.len().saturating_sub(1))).copied()
    };
    Some((round(at(0.025)?), round(at(0.975)?)))
}

/// Draws that are the same in each run, so that a report does not change when it is made again.
struct Chance(u64);

impl Chance {
    fn new() -> Self {
        Self(0x5eed)
    }

    /// As many of `values` as there are, with replacement.
    fn draw<'a>(&'a mut self, values: &'a [f64]) -> impl Iterator<Item = f64> + 'a {
        (0..values.len()).map(|_| values[self.below(values.len())])
    }

    /// A number below `bound`, which is not 0; SplitMix64.
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % bound as u64) as usize
    }
}

/// A ratio for a table: `1.23 [1.20..1.31]`, the interval, or the reach of few rounds.
pub(crate) fn ratio_text(ratio: Option<Ratio>) -> String {
    match ratio {
        Some(r) => {
            let (low, high) = (r.low.unwrap_or(r.min), r.high.unwrap_or(r.max));
            format!("{:.2} [{low:.2}..{high:.2}]", r.median)
        }
        None => "-".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_compare_round_with_round() {
        // The machine became twice as slow after the first round: the ratio does not notice.
        let ratio = Ratio::of_rounds(&[20.0, 40.0, 42.0], &[10.0, 20.0, 20.0]).unwrap();
        assert_eq!((ratio.min, ratio.median, ratio.max), (2.0, 2.0, 2.1));
        let six = Ratio::of_rounds(&[4.0, 4.0, 4.0, 4.2, 4.4, 4.0], &[2.0; 6]).unwrap();
        assert_eq!((six.low, six.high), (Some(2.0), Some(2.15)));
        assert_eq!(Ratio::of_rounds(&[1.0], &[0.0]), None);
        assert_eq!(Ratio::of_rounds(&[], &[]), None);
        let few = Ratio::of_rounds(&[3.0, 4.0], &[2.0, 2.0]).unwrap();
        assert_eq!((few.low, few.high), (None, None));
        assert!(!few.is_sure());
    }

    #[test]
    fn an_interval_holds_the_truth_and_narrows_with_rounds() {
        let noisy = |rounds: usize| -> Vec<f64> {
            (0..rounds)
                .map(|n| 1.0 + 0.1 * ((n * 7 % 11) as f64 - 5.0))
                .collect()
        };
        let width = |rounds: usize| {
            let ratio = Ratio::of_rounds(&noisy(rounds), &vec![1.0; rounds]).unwrap();
            let (low, high) = (ratio.low.unwrap(), ratio.high.unwrap());
            assert!(low <= 1.0 && high >= 1.0, "{ratio:?}");
            assert!(!ratio.is_sure());
            high - low
        };
        assert!(width(110) < width(11), "{} {}", width(110), width(11));
        let twice: Vec<f64> = noisy(22).iter().map(|one| one + 1.5).collect();
        assert!(Ratio::of_rounds(&twice, &[1.0; 22]).unwrap().is_sure());
    }

    #[test]
    fn runs_are_compared_by_their_medians() {
        let of = [4.0, 6.0, 5.0, 4.0, 6.0, 5.0];
        let ratio = Ratio::of_runs(&of, &[2.0, 2.5, 3.0, 2.5, 2.0, 3.0]).unwrap();
        assert_eq!(ratio.median, 2.0);
        assert!(
            ratio.low.unwrap() < 2.0 && ratio.high.unwrap() > 2.0,
            "{ratio:?}"
        );
        assert_eq!(Ratio::of_runs(&[], &[1.0]), None);
    }

    #[test]
    fn the_same_rounds_make_the_same_report() {
        let of = [1.0, 1.3, 0.9, 1.1, 1.2, 1.1];
        assert_eq!(
            Ratio::of_rounds(&of, &[1.0; 6]),
            Ratio::of_rounds(&of, &[1.0; 6])
        );
        let text = ratio_text(Ratio::of_rounds(&of, &[1.0; 6]));
        assert!(text.starts_with("1.10 ["), "{text}");
        assert_eq!(ratio_text(None), "-");
    }
}
