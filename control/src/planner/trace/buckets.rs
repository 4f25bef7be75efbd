//! Requests added up by interval.

use std::collections::BTreeMap;

use serde::Serialize;

/// Most intervals of an answer, empty ones included: more is a wrong unit of time.
const INTERVALS_MAX: i64 = 10_000_000;

/// The load of one interval, as it is printed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Interval {
    /// Its start in seconds, a multiple of its length.
    pub interval_start: i64,
    /// Requests in it.
    pub request_count: u64,
    /// Their mean input length in tokens; 0 without requests.
    pub avg_isl: f64,
    /// Their mean output length in tokens; 0 without requests.
    pub avg_osl: f64,
}

#[derive(Clone, Copy, Default)]
struct Sum {
    requests: u64,
    input_tokens: u128,
    output_tokens: u128,
}

/// What has been added so far.
pub(super) struct Buckets {
    interval_s: u32,
    by_index: BTreeMap<i64, Sum>,
    /// Requests whose times count from the earliest of them, which is known only at the end.
    rebased: Vec<(f64, u64, u64)>,
}

impl Buckets {
    pub(super) fn new(interval_s: u32) -> Self {
        Self {
            interval_s: interval_s.max(1),
            by_index: BTreeMap::new(),
            rebased: Vec::new(),
        }
    }

    /// Adds a request.
    pub(super) fn add(
        &mut self,
        time_ms: f64,
        input_tokens: u64,
        output_tokens: u64,
        rebased: bool,
    ) -> Result<(), String> {
        if rebased {
            self.rebased.push((time_ms, input_tokens, output_tokens));
            return Ok(());
        }
        self.put(time_ms, input_tokens, output_tokens)
    }

    fn put(&mut self, time_ms: f64, input_tokens: u64, output_tokens: u64) -> Result<(), String> {
        let index = (time_ms / 1e3 / f64::from(self.interval_s)).floor();
        // Seconds of any clock are far below this, and it fits.
        if index.abs() > 1e15 {
            return Err(format!("the time {time_ms} ms is out of range"));
        }
        let sum = self.by_index.entry(index as i64).or_default();
        sum.requests += 1;
        sum.input_tokens += u128::from(input_tokens);
        sum.output_tokens += u128::from(output_tokens);
        Ok(())
    }

    /// The intervals in order; those between the first and the last that are empty are zeros, or
    /// left out.
    pub(super) fn intervals(mut self, sparse: bool) -> Result<Vec<Interval>, String> {
        let rebased = std::mem::take(&mut self.rebased);
        let first_ms = rebased
            .iter()
            .map(|(time, ..)| *time)
            .fold(f64::MAX, f64::min);
        for (time_ms, input_tokens, output_tokens) in rebased {
            self.put(time_ms - first_ms, input_tokens, output_tokens)?;
        }
        let ends = self
            .by_index
            .keys()
            .next()
            .zip(self.by_index.keys().next_back());
        let Some((&first, &last)) = ends else {
            return Ok(Vec::new());
        };
        if !sparse && last - first >= INTERVALS_MAX {
            return Err(format!(
                "the trace spans {} intervals of {} s; its times are in milliseconds, or the \
                 interval must be longer, or leave empty ones out",
                last - first + 1,
                self.interval_s
            ));
        }
        let seconds = i64::from(self.interval_s);
        let interval = |index: i64, sum: Sum| {
            let mean = |tokens: u128| match sum.requests {
                0 => 0.0,
                requests => tokens as f64 / requests as f64,
            };
            Interval {
                interval_start: index * seconds,
                request_count: sum.requests,
                avg_isl: mean(sum.input_tokens),
                avg_osl: mean(sum.output_tokens),
            }
        };
        if sparse {
            let sums = self.by_index.into_iter();
            return Ok(sums.map(|(index, sum)| interval(index, sum)).collect());
        }
        let sum = |index| self.by_index.get(&index).copied().unwrap_or_default();
        Ok((first..=last)
            .map(|index| interval(index, sum(index)))
            .collect())
    }
}
