//! From samples to what people read: quantiles, medians over rounds, tables with units, the host.

use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use hdrhistogram::Histogram;
use serde::Serialize;
use serde_json::{Value, json};

use crate::progress::Progress;

/// An empty latency histogram: 1 ns to 120 s, three significant digits.
pub(crate) fn new_histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 120_000_000_000, 3).expect("constant bounds are in range")
}

/// The quantiles that every report gives, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Quantiles {
    /// The median.
    pub(crate) p50: f64,
    /// 1 in 10 is slower.
    pub(crate) p90: f64,
    /// 1 in 100 is slower.
    pub(crate) p99: f64,
    /// 1 in 1000 is slower.
    #[serde(rename = "p99.9")]
    pub(crate) p999: f64,
    /// The slowest.
    pub(crate) max: f64,
    /// How many samples there are.
    pub(crate) count: u64,
}

impl Quantiles {
    /// Of a histogram in nanoseconds.
    pub(crate) fn of_ns(histogram: &Histogram<u64>) -> Self {
        let us = |ns: u64| (ns as f64 / 10.0).round() / 100.0;
        let quantile = |q| us(histogram.value_at_quantile(q));
        Self {
            p50: quantile(0.50),
            p90: quantile(0.90),
            p99: quantile(0.99),
            p999: quantile(0.999),
            max: us(histogram.max()),
            count: histogram.len(),
        }
    }
}

/// The middle one of several values and how far they reach.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Spread {
    /// The median.
    pub(crate) median: f64,
    /// The least.
    pub(crate) min: f64,
    /// The greatest.
    pub(crate) max: f64,
}

impl Spread {
    /// Of the finite values among these; `None` if there are none.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values
            .into_iter()
            .filter(|value| value.is_finite())
            .collect();
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let half = values.len() / 2;
        let median = match values.len() % 2 {
            0 => f64::midpoint(values[half - 1], values[half]),
            _ => values[half],
        };
        Some(Self {
            median: round(median),
            min: round(min),
            max: round(max),
        })
    }
}

/// The median alone; 0 of nothing.
pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    Spread::of(values).map_or(0.0, |spread| spread.median)
}

/// Four decimals: more would only be noise in the JSON.
pub(crate) fn round(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}

/// The order of `arms` in a round: forward, then backward, so that a drift of the machine meets
/// every arm alike.
pub(crate) fn order(arms: usize, round: usize) -> Vec<usize> {
    match round % 2 {
        0 => (0..arms).collect(),
        _ => (0..arms).rev().collect(),
    }
}

/// Runs every arm once in each round, in [`order`], and shows how far it is.
pub(crate) fn interleave(
    title: &str,
    rounds: usize,
    arms: &[impl AsRef<str>],
    mut run: impl FnMut(usize, usize) -> Result<()>,
) -> Result<()> {
    let mut progress = Progress::of(rounds * arms.len());
    for number in 0..rounds {
        for index in order(arms.len(), number) {
            let name = arms[index].as_ref();
            let round = number + 1;
            progress.begin(&format!("{title}: round {round} of {rounds}, {name}"));
            run(number, index)?;
        }
    }
    Ok(())
}

/// A value for a table: three significant digits or so, and no more than are known.
pub(crate) fn figure(value: f64) -> String {
    match value.abs() {
        v if !v.is_finite() => "-".into(),
        v if v >= 100.0 => group(value.round()),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// Digits in groups of three.
fn group(value: f64) -> String {
    let digits = format!("{:.0}", value.abs());
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    if value < 0.0 { format!("-{out}") } else { out }
}

/// Rows under a header; the first column to the left, the others to the right.
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these column heads.
    pub(crate) fn new(head: &[&str]) -> Self {
        Self {
            rows: vec![head.iter().map(ToString::to_string).collect()],
        }
    }

    /// Adds a row.
    pub(crate) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// The table as text, a line feed after each row.
    pub(crate) fn text(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells
                .map(|cell: &String| cell.chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut out = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (column, cell) in row.iter().enumerate() {
                let width = widths[column];
                match column {
                    0 => line.push_str(&format!("{cell:<width$}")),
                    _ => line.push_str(&format!("  {cell:>width$}")),
                }
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out
    }
}

/// The present time in UTC, as `2026-01-31T12:00:00Z`.
pub(crate) fn now_utc() -> String {
    let seconds = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs());
    utc(seconds)
}

/// A count of seconds since 1970 as a date of the Gregorian calendar, by whole days in eras of
/// 400 years that begin on the first of March.
fn utc(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let days = days + 719_468; // from 0000-03-01
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let leap_days = day_of_era / 1460 - day_of_era / 36_524 + day_of_era / 146_096;
    let year_of_era = (day_of_era - leap_days) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12 + 1;
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// What the numbers were taken on.
pub(crate) fn host() -> Value {
    let read = |file: &str| {
        fs::read_to_string(file)
            .unwrap_or_default()
            .trim()
            .to_string()
    };
    let cpu_info = read("/proc/cpuinfo");
    let model = cpu_info
        .lines()
        .find_map(|line| line.strip_prefix("model name"));
    let model = model.map_or("unknown", |rest| rest.trim_start_matches([' ', '\t', ':']));
    json!({
        "cpus": std::thread::available_parallelism().map_or(0, usize::from),
        "cpu_model": model,
        "kernel": read("/proc/sys/kernel/osrelease"),
        "tcp_congestion_control": read("/proc/sys/net/ipv4/tcp_congestion_control"),
        "bench_build": if cfg!(debug_assertions) { "debug" } else { "release" },
        "bench_version": env!("CARGO_PKG_VERSION"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_odd_even_and_broken_series() {
        assert_eq!(median([3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median([4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median([f64::NAN, 5.0, f64::INFINITY]), 5.0);
        assert_eq!(median([]), 0.0);
        let spread = Spread::of([2.0, 9.0, 1.0]).unwrap();
        assert_eq!((spread.min, spread.median, spread.max), (1.0, 2.0, 9.0));
    }

    #[test]
    fn quantiles_are_microseconds() {
        let mut histogram = new_histogram();
        for us in 1..=1000_u64 {
            histogram.record(us * 1000).unwrap();
        }
        let q = Quantiles::of_ns(&histogram);
        for (found, wanted) in [
            (q.p50, 500.0),
            (q.p90, 900.0),
            (q.p99, 990.0),
            (q.p999, 999.0),
        ] {
            assert!(
                (found / wanted - 1.0_f64).abs() < 0.002,
                "{found} instead of {wanted}"
            );
        }
        assert!((q.max / 1000.0 - 1.0).abs() < 0.002);
        assert_eq!(q.count, 1000);
    }

    #[test]
    fn arms_alternate_in_direction() {
        assert_eq!(order(3, 0), [0, 1, 2]);
        assert_eq!(order(3, 1), [2, 1, 0]);
        assert_eq!(order(3, 2), [0, 1, 2]);
    }

    #[test]
    fn dates() {
        assert_eq!(utc(0), "1970-01-01T00:00:00Z");
        assert_eq!(utc(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(utc(1_798_761_599), "2026-12-31T23:59:59Z");
        assert_eq!(utc(4_107_542_400), "2100-03-01T00:00:00Z");
    }

    #[test]
    fn figures_and_tables_line_up() {
        assert_eq!(figure(1234567.8), "1,234,568");
        assert_eq!(figure(100.4), "100");
        assert_eq!(figure(12.34), "12.3");
        assert_eq!(figure(0.126), "0.13");
        assert_eq!(figure(f64::NAN), "-");
        let mut table = Table::new(&["arm", "p50"]);
        table.row(vec!["direct".into(), "9".into()]);
        assert_eq!(table.text(), "arm     p50\ndirect    9\n");
    }
}
