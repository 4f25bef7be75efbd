//! Whole latency distributions for other eyes: an HdrHistogram interval log, and an SVG with one
//! panel per load in which every arm is a curve over the percentiles.

use std::f64::consts::LOG10_2;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use hdrhistogram::Histogram;
use hdrhistogram::serialization::V2DeflateSerializer;
use hdrhistogram::serialization::interval_log::{IntervalLogWriterBuilder, Tag};

/// Where distributions go.
#[derive(clap::Args, Clone, Debug, Default)]
pub(crate) struct ExportArgs {
    /// Write the distributions as an HdrHistogram interval log (V2), one tag per load and arm;
    /// values are nanoseconds, the printed maxima microseconds.
    #[arg(long, value_name = "FILE")]
    hlog: Option<PathBuf>,
    /// Draw the distributions as an SVG: latency over percentile, a panel per load.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// One load and its curves.
pub(crate) struct Panel<'a> {
    /// The load.
    pub(crate) title: String,
    /// Name of each arm and its latencies in ns.
    pub(crate) curves: Vec<(&'a str, &'a Histogram<u64>)>,
    /// How long each arm was measured.
    pub(crate) measured: Duration,
}

impl ExportArgs {
    /// Writes what was asked for.
    pub(crate) fn write(&self, panels: &[Panel<'_>]) -> Result<()> {
        if let Some(file) = &self.hlog {
            save(file, &interval_log(panels)?)?;
        }
        if let Some(file) = &self.svg {
            save(file, svg(panels).as_bytes())?;
        }
        Ok(())
    }
}

fn save(file: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(file, bytes).with_context(|| format!("cannot write {}", file.display()))
}

fn interval_log(panels: &[Panel<'_>]) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut serializer = V2DeflateSerializer::new();
    let mut log = IntervalLogWriterBuilder::new()
        .add_comment("[corelane-bench: tags are load/arm, values are nanoseconds]")
        .with_max_value_divisor(1e3)
        .begin_log_with(&mut bytes, &mut serializer)?;
    let mut start = Duration::ZERO;
    for panel in panels {
        for (arm, histogram) in &panel.curves {
            let tag = format!("{}/{arm}", panel.title).replace([',', ' '], "_");
            log.write_histogram(histogram, start, panel.measured, Tag::new(&tag))
                .map_err(|error| anyhow!("cannot write the interval log: {error}"))?;
        }
        start += panel.measured;
    }
    Ok(bytes)
}

const WIDTH: f64 = 900.0;
const HEIGHT: f64 = 360.0;
const LEFT: f64 = 80.0;
const RIGHT: f64 = 200.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 40.0;
/// Percentiles with a line: the place is the number of nines.
const PERCENTILES: [(f64, &str); 6] = [
    (0.0, "0"),
    (LOG10_2, "50"),
    (1.0, "90"),
    (2.0, "99"),
    (3.0, "99.9"),
    (4.0, "99.99"),
];
const NINES_MAX: f64 = 4.0;
const STEPS: usize = 160;
/// Colours that remain apart for most colour-blind eyes.
const COLOURS: [&str; 8] = [
    "#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999",
];

fn svg(panels: &[Panel<'_>]) -> String {
    let height = HEIGHT * panels.len() as f64;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"white\"/>\n"
    );
    for (index, panel) in panels.iter().enumerate() {
        let _ = writeln!(
            out,
            "<g transform=\"translate(0 {})\">",
            HEIGHT * index as f64
        );
        draw_panel(panel, &mut out);
        out.push_str("</g>\n");
    }
    out.push_str("</svg>\n");
    out
}

/// Writing to a string cannot fail, so results of `writeln!` are dropped here.
fn draw_panel(panel: &Panel<'_>, out: &mut String) {
    let scale = Scale::of(panel);
    let _ = writeln!(
        out,
        "<text x=\"{LEFT}\" y=\"20\" font-size=\"14\">{}: latency in us over percentile</text>",
        escape(&panel.title)
    );
    for (nines, label) in PERCENTILES {
        let x = Scale::x(nines);
        let (top, bottom, text) = (TOP, HEIGHT - BOTTOM, HEIGHT - BOTTOM + 16.0);
        let _ = writeln!(
            out,
            "<path d=\"M{x:.1} {top}V{bottom}\" stroke=\"#ddd\"/>\
             <text x=\"{x:.1}\" y=\"{text}\" text-anchor=\"middle\">{label}</text>"
        );
    }
    for us in scale.marks() {
        let (y, right, text) = (scale.y(us), WIDTH - RIGHT, LEFT - 6.0);
        let _ = writeln!(
            out,
            "<path d=\"M{LEFT} {y:.1}H{right}\" stroke=\"#ddd\"/>\
             <text x=\"{text}\" y=\"{:.1}\" text-anchor=\"end\">{us}</text>",
            y + 4.0
        );
    }
    for (index, (arm, histogram)) in panel.curves.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        let points: Vec<String> = curve(histogram)
            .map(|(nines, us)| format!("{:.1},{:.1}", Scale::x(nines), scale.y(us)))
            .collect();
        let (x, y) = (WIDTH - RIGHT + 12.0, TOP + 14.0 + 18.0 * index as f64);
        let _ = writeln!(
            out,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.6\"/>\
             <text x=\"{x}\" y=\"{y}\" fill=\"{colour}\">{}</text>",
            points.join(" "),
            escape(arm)
        );
    }
}

/// Points of a curve (nines, us), as far as its samples tell.
fn curve(histogram: &Histogram<u64>) -> impl Iterator<Item = (f64, f64)> + '_ {
    let known = (histogram.len().max(1) as f64).log10().min(NINES_MAX);
    (0..=STEPS).map(move |step| {
        let nines = known * step as f64 / STEPS as f64;
        let value_ns = histogram.value_at_quantile(1.0 - 10_f64.powf(-nines));
        (nines, (value_ns.max(1)) as f64 / 1e3)
    })
}

/// Logarithmic latency of one panel.
struct Scale {
    low: f64,
    high: f64,
}

impl Scale {
    fn of(panel: &Panel<'_>) -> Self {
        let ends = panel
            .curves
            .iter()
            .flat_map(|(_, histogram)| curve(histogram));
        let (mut low, mut high) = (f64::MAX, f64::MIN);
        for (_, us) in ends {
            low = low.min(us.log10());
            high = high.max(us.log10());
        }
        match low <= high {
            true => Self {
                low: low - 0.05,
                high: high + 0.05,
            },
            false => Self {
                low: 0.0,
                high: 1.0,
            },
        }
    }

    fn x(nines: f64) -> f64 {
        LEFT + (WIDTH - LEFT - RIGHT) * nines / NINES_MAX
    }

    fn y(&self, us: f64) -> f64 {
        let share = (us.log10() - self.low) / (self.high - self.low);
        HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share
    }

    /// 1, 2 and 5 times powers of ten that lie in the panel.
    fn marks(&self) -> Vec<f64> {
        (-3..=8)
            .flat_map(|power| [1.0, 2.0, 5.0].map(|digit| digit * 10_f64.powi(power)))
            .filter(|us| (self.low..=self.high).contains(&us.log10()))
            .collect()
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use hdrhistogram::serialization::interval_log::{IntervalLogIterator, LogEntry};

    use super::*;
    use crate::report::new_histogram;

    fn histogram() -> Histogram<u64> {
        let mut histogram = new_histogram();
        for us in 1..=1000_u64 {
            histogram.record(us * 1000).unwrap();
        }
        histogram
    }

    #[test]
    fn the_interval_log_can_be_read_back() {
        let histogram = histogram();
        let curves = vec![("direct", &histogram), ("x/y", &histogram)];
        let title = "closed loop, 1 connection".to_string();
        let panel = Panel {
            title,
            curves,
            measured: Duration::from_secs(2),
        };
        let bytes = interval_log(&[panel]).unwrap();
        let entries: Vec<_> = IntervalLogIterator::new(&bytes)
            .map(Result::unwrap)
            .collect();
        let tags: Vec<_> = entries
            .iter()
            .filter_map(|entry| match entry {
                LogEntry::Interval(interval) => Some(interval.tag().unwrap().as_str().to_string()),
                _ => None,
            })
            .collect();
        assert_eq!(
            tags,
            [
                "closed_loop__1_connection/direct",
                "closed_loop__1_connection/x/y"
            ]
        );
    }

    #[test]
    fn curves_rise_and_end_where_samples_do() {
        let histogram = histogram();
        let points: Vec<_> = curve(&histogram).collect();
        assert!(points.windows(2).all(|pair| pair[0].1 <= pair[1].1));
        assert!((points.last().unwrap().0 - 3.0).abs() < 1e-9);
        let empty = new_histogram();
        let title = "a<b".to_string();
        let panel = Panel {
            title,
            curves: vec![("e", &empty)],
            measured: Duration::ZERO,
        };
        let text = svg(&[panel]);
        assert!(
            text.contains("a&lt;b") && !text.contains("NaN") && !text.contains("inf"),
            "{text}"
        );
    }
}
