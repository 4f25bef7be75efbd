//! Distributions in the formats of HdrHistogram: the interval log (V2, `.hlog`) and the table of
//! percentiles (`.hgrm`), which its plotters open.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::SystemTime;

use anyhow::{Context as _, Result, anyhow};
use hdrhistogram::Histogram;
use hdrhistogram::serialization::V2DeflateSerializer;
use hdrhistogram::serialization::interval_log::{IntervalLogWriterBuilder, Tag};

use crate::curves::{Curve, Panel};

/// An interval log of all loads and arms, the intervals in time order; `began` is when the run did.
pub(crate) fn interval_log(panels: &[Panel], began: SystemTime) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut serializer = V2DeflateSerializer::new();
    let mut log = IntervalLogWriterBuilder::new()
        .add_comment("[Histogram log format version 1.3]")
        .add_comment("[corelane-bench: tags are load/arm, values are nanoseconds]")
        .with_start_time(began)
        .with_base_time(began)
        .with_max_value_divisor(1e3)
        .begin_log_with(&mut bytes, &mut serializer)?;
    let mut entries = Vec::new();
    for panel in panels {
        for curve in &panel.curves {
            let tag = format!("{}/{}", panel.title, curve.arm).replace([',', ' '], "_");
            entries.extend(curve.intervals.iter().map(|one| (one, tag.clone())));
        }
    }
    entries.sort_by_key(|(interval, _)| interval.start);
    for (interval, tag) in entries {
        log.write_histogram(
            &interval.latency_ns,
            interval.start,
            interval.length,
            Tag::new(&tag),
        )
        .map_err(|error| anyhow!("cannot write the interval log: {error}"))?;
    }
    Ok(bytes)
}

/// A file for each arm and load in `dir`: `LOAD-ARM.hgrm`.
pub(crate) fn write_percentiles(panels: &[Panel], dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    for panel in panels {
        for curve in &panel.curves {
            let file = dir.join(file_name(panel, curve));
            fs::write(&file, percentiles(&curve.latency_ns()))
                .with_context(|| format!("cannot write {}", file.display()))?;
        }
    }
    Ok(())
}

fn file_name(panel: &Panel, curve: &Curve) -> String {
    let mut name = String::new();
    for part in format!("{}-{}", panel.title, curve.arm).split(|c: char| !c.is_alphanumeric()) {
        if !part.is_empty() {
            name.push_str(if name.is_empty() { "" } else { "-" });
            name.push_str(part);
        }
    }
    name + ".hgrm"
}

/// Lines for each halving of the distance to 100 %.
const TICKS_PER_HALF: u32 = 5;

/// The table of one distribution, in microseconds.
fn percentiles(latency_ns: &Histogram<u64>) -> String {
    let us = |ns: f64| ns / 1e3;
    let mut out = format!(
        "{:>12} {:>14} {:>10} {:>14}\n\n",
        "Value", "Percentile", "TotalCount", "1/(1-Percentile)"
    );
    let mut count = 0;
    for step in latency_ns.iter_quantiles(TICKS_PER_HALF) {
        count += step.count_since_last_iteration();
        let (value, part) = (
            us(step.value_iterated_to() as f64),
            step.quantile_iterated_to(),
        );
        // Writing to a string cannot fail.
        let _ = match part < 1.0 {
            true => writeln!(
                out,
                "{value:12.3} {part:2.12} {count:10} {:14.2}",
                1.0 / (1.0 - part)
            ),
            false => writeln!(out, "{value:12.3} {part:2.12} {count:10}"),
        };
    }
    let _ = writeln!(
        out,
        "#[Mean    = {:12.3}, StdDeviation   = {:12.3}]\n\
         #[Max     = {:12.3}, Total count    = {:12}]\n\
         #[Buckets = {:12}, SubBuckets     = {:12}]",
        us(latency_ns.mean()),
        us(latency_ns.stdev()),
        us(latency_ns.max() as f64),
        latency_ns.len(),
        latency_ns.buckets(),
        2 * 10_u64.pow(latency_ns.sigfig().into()).next_power_of_two(),
    );
    out
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use base64::Engine as _;
    use hdrhistogram::serialization::Deserializer;
    use hdrhistogram::serialization::interval_log::{IntervalLogIterator, LogEntry};

    use super::*;
    use crate::curves::Interval;
    use crate::report::new_histogram;

    fn panel(title: &str) -> Panel {
        let interval = |second: u64| {
            let mut latency_ns = new_histogram();
            for us in 1..=500 {
                latency_ns.record((500 * second + us) * 1000).unwrap();
            }
            let (start, length) = (Duration::from_secs(second), Duration::from_secs(1));
            Interval {
                start,
                length,
                latency_ns,
            }
        };
        let curve = |arm: &str| Curve {
            arm: arm.into(),
            intervals: vec![interval(0), interval(1)],
            requests_per_s: 1000.0,
            cpu_us: None,
            hiccup_ns: new_histogram(),
        };
        let curves = vec![curve("direct"), curve("x/y")];
        Panel {
            title: title.into(),
            curves,
        }
    }

    #[test]
    fn the_interval_log_is_read_back_with_all_that_was_recorded() {
        let bytes = interval_log(&[panel("closed loop, 1 connection")], SystemTime::now()).unwrap();
        let text = String::from_utf8(bytes.clone()).unwrap();
        assert!(
            text.starts_with("#[Histogram log format version 1.3]\n"),
            "{text}"
        );
        assert!(
            text.contains("#[StartTime: ") && text.contains("#[BaseTime: "),
            "{text}"
        );
        let mut seen = Vec::new();
        for entry in IntervalLogIterator::new(&bytes) {
            let LogEntry::Interval(interval) = entry.unwrap() else {
                continue;
            };
            let packed = base64::engine::general_purpose::STANDARD
                .decode(interval.encoded_histogram())
                .unwrap();
            let read: Histogram<u64> = Deserializer::new()
                .deserialize(&mut packed.as_slice())
                .unwrap();
            assert_eq!((read.len(), interval.duration().as_secs()), (500, 1));
            let tag = interval.tag().unwrap().as_str().to_owned();
            seen.push((
                tag,
                interval.start_timestamp().as_secs(),
                read.max() / 1_000_000,
            ));
        }
        let (one, other) = (
            "closed_loop__1_connection/direct",
            "closed_loop__1_connection/x/y",
        );
        let wanted = [(one, 0, 0), (other, 0, 0), (one, 1, 1), (other, 1, 1)];
        let wanted = wanted.map(|(tag, at, max)| (tag.to_owned(), at, max));
        assert_eq!(seen, wanted);
    }

    /// As HdrHistogram's plotter reads it: rows of three or four numbers, `#` begins a remark.
    fn rows(text: &str) -> Vec<Vec<f64>> {
        let mut lines = text.lines();
        let head = lines.next().unwrap();
        assert_eq!(
            head.split_whitespace().collect::<Vec<_>>(),
            ["Value", "Percentile", "TotalCount", "1/(1-Percentile)"]
        );
        let rows = lines.filter(|line| !line.trim().is_empty() && !line.starts_with('#'));
        rows.map(|row| {
            row.split_whitespace()
                .map(|cell| cell.parse().unwrap())
                .collect()
        })
        .collect()
    }

    #[test]
    fn a_table_of_percentiles_is_what_plotters_read() {
        let text = percentiles(&panel("a").curves[0].latency_ns());
        let rows = rows(&text);
        for row in &rows {
            assert!(
                row.len() == 4 || (row.len() == 3 && row[1] == 1.0),
                "{row:?}"
            );
        }
        assert!(
            rows.windows(2)
                .all(|two| two[0][0] <= two[1][0] && two[0][2] <= two[1][2])
        );
        let half = rows.iter().find(|row| row[1] == 0.5).unwrap();
        assert!(
            (half[0] / 500.0 - 1.0).abs() < 0.002 && half[3] == 2.0,
            "{half:?}"
        );
        let last = rows.last().unwrap();
        assert!(
            (last[0] / 1000.0 - 1.0).abs() < 0.002 && last[2] == 1000.0,
            "{last:?}"
        );
        assert!(text.contains("Total count    =         1000]"), "{text}");
        assert!(text.contains("SubBuckets     =         2048]"), "{text}");
    }

    #[test]
    fn an_empty_table_has_its_head_and_remarks() {
        let text = percentiles(&new_histogram());
        assert!(rows(&text).len() <= 1, "{text}");
        assert!(text.contains("Total count    =            0]"), "{text}");
    }

    #[test]
    fn each_load_and_arm_has_its_file() {
        let dir = tempfile::tempdir().unwrap();
        write_percentiles(&[panel("open loop, 1000/s")], dir.path()).unwrap();
        let mut names: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(
            names,
            ["open-loop-1000-s-direct.hgrm", "open-loop-1000-s-x-y.hgrm"]
        );
    }
}
