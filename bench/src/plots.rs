//! Plots of a run, each an SVG of its own: latency by percentile, latency over time, latency and
//! CPU time against throughput, CPU time for each request.

use std::f64::consts::LOG10_2;
use std::fmt::Write as _;
use std::ops::Range;

use anyhow::{Result, anyhow};
use hdrhistogram::Histogram;
use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, ValueFormatter};
use plotters::prelude::*;

use crate::curves::{Curve, Panel, quantile_us};
use crate::report::figure;

/// Width of a plot.
const WIDTH: u32 = 940;
/// Height of a plot.
const HEIGHT: u32 = 360;
/// What the names of the arms take of the width.
const NAMES_WIDTH: u32 = 210;
/// Percentiles with a line; they lie at their number of nines.
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
const COLOURS: [RGBColor; 8] = [
    RGBColor(0x00, 0x00, 0x00),
    RGBColor(0x00, 0x72, 0xb2),
    RGBColor(0xd5, 0x5e, 0x00),
    RGBColor(0x00, 0x9e, 0x73),
    RGBColor(0xcc, 0x79, 0xa7),
    RGBColor(0xe6, 0x9f, 0x00),
    RGBColor(0x56, 0xb4, 0xe9),
    RGBColor(0x99, 0x99, 0x99),
];
const FAINT: RGBColor = RGBColor(0xbb, 0xbb, 0xbb);
const FONT: &str = "sans-serif";

/// An axis with marks where they are wanted.
#[derive(Clone)]
struct Marked {
    reach: Range<f64>,
    logarithmic: bool,
    marks: Vec<f64>,
}

impl Ranged for Marked {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (begin, end): (i32, i32)) -> i32 {
        let Range {
            start: low,
            end: high,
        } = self.reach;
        let part = match self.logarithmic {
            true => (value / low).ln() / (high / low).ln(),
            false => (value - low) / (high - low),
        };
        begin + (part * f64::from(end - begin)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _hint: Hint) -> Vec<f64> {
        let inside = self.marks.iter().copied();
        inside
            .filter(|mark| self.reach.contains(mark) || *mark == self.reach.end)
            .collect()
    }

    fn range(&self) -> Range<f64> {
        self.reach.clone()
    }
}

impl ValueFormatter<f64> for Marked {
    fn format_ext(&self, value: &f64) -> String {
        short(*value)
    }
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
/// Points of a line.
type Points = Vec<(f64, f64)>;

/// A line, thick or thin, in the colour of an arm.
struct Line {
    colour: RGBColor,
    width: u32,
    dots: bool,
    points: Points,
}

/// What a name beside a plot stands for.
type Name = (RGBColor, String);

/// The axes of a plot.
struct Axes<'a> {
    title: String,
    x: &'a str,
    y: &'a str,
    /// The horizontal axis is of percentiles.
    percentiles: bool,
    /// The vertical axis is logarithmic.
    logarithmic: bool,
}

/// All plots of a run, in the order of the report.
pub(crate) fn all(panels: &[Panel]) -> Result<Vec<String>> {
    let mut plots = Vec::new();
    if panels.len() > 1 {
        plots.push(over_throughput(panels)?);
    }
    let mut curves = panels.iter().flat_map(|panel| &panel.curves);
    if curves.any(|curve| curve.cpu_us.is_some()) {
        plots.push(match panels.len() > 2 {
            true => cpu_over_throughput(panels)?,
            false => cpu_bars(panels)?,
        });
    }
    for panel in panels {
        plots.push(by_percentile(panel)?);
        if panel.curves.iter().any(|curve| curve.intervals.len() > 1) {
            plots.push(over_time(panel)?);
        }
    }
    Ok(plots)
}

/// The plots below each other in one SVG.
pub(crate) fn stacked(plots: &[String]) -> String {
    let height = HEIGHT as usize * plots.len();
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         viewBox=\"0 0 {WIDTH} {height}\">\n"
    );
    for (index, plot) in plots.iter().enumerate() {
        // Writing to a string cannot fail.
        let _ = writeln!(
            out,
            "<g transform=\"translate(0 {})\">\n{plot}</g>",
            HEIGHT as usize * index
        );
    }
    out + "</svg>\n"
}

fn colour(arm: usize) -> RGBColor {
    COLOURS[arm % COLOURS.len()]
}

fn names(panel: &Panel) -> Vec<Name> {
    let arms = panel.curves.iter().enumerate();
    arms.map(|(arm, curve)| (colour(arm), curve.arm.clone()))
        .collect()
}

fn by_percentile(panel: &Panel) -> Result<String> {
    let mut lines: Vec<Line> = Vec::new();
    let mut hiccups = crate::report::new_histogram();
    for (arm, curve) in panel.curves.iter().enumerate() {
        hiccups += &curve.hiccup_ns;
        lines.push(Line {
            colour: colour(arm),
            width: 2,
            dots: false,
            points: distribution(&curve.latency_ns()),
        });
    }
    let mut names = names(panel);
    if !hiccups.is_empty() {
        names.push((FAINT, "hiccups of the machine".into()));
        let points = distribution(&hiccups);
        lines.push(Line {
            colour: FAINT,
            width: 1,
            dots: false,
            points,
        });
    }
    let axes = Axes {
        title: format!("{}: latency by percentile", panel.title),
        x: "percentile",
        y: "latency, us",
        percentiles: true,
        logarithmic: true,
    };
    plot(&axes, &lines, &names)
}

/// Points (nines, us), as far as the samples tell.
fn distribution(histogram: &Histogram<u64>) -> Points {
    if histogram.is_empty() {
        return Points::new();
    }
    let known = (histogram.len() as f64).log10().min(NINES_MAX);
    let points = (0..=STEPS).map(|step| {
        let nines = known * step as f64 / STEPS as f64;
        let value_ns = histogram.value_at_quantile(1.0 - 10_f64.powf(-nines));
        (nines, value_ns.max(1) as f64 / 1e3)
    });
    points.collect()
}

fn over_time(panel: &Panel) -> Result<String> {
    let mut lines = Vec::new();
    for (arm, curve) in panel.curves.iter().enumerate() {
        for (quantile, width) in [(0.5, 1), (0.99, 2)] {
            let dots = width > 1;
            for points in runs(curve, quantile) {
                lines.push(Line {
                    colour: colour(arm),
                    width,
                    dots,
                    points,
                });
            }
        }
    }
    let axes = Axes {
        title: format!("{}: latency over time (thick p99, thin p50)", panel.title),
        x: "seconds since the run began",
        y: "latency, us",
        percentiles: false,
        logarithmic: true,
    };
    plot(&axes, &lines, &names(panel))
}

/// Points (seconds, us), a run for each time that intervals follow each other without a gap: in a
/// gap other arms had their turn.
fn runs(curve: &Curve, quantile: f64) -> Vec<Points> {
    let (mut runs, mut last_end) = (Vec::<Points>::new(), None);
    for interval in &curve.intervals {
        let is_next = last_end.is_some_and(|end| interval.start <= end + interval.length / 2);
        last_end = Some(interval.start + interval.length);
        if !is_next {
            runs.push(Points::new());
        }
        let middle = interval.start + interval.length / 2;
        if let (Some(run), Some(us)) =
            (runs.last_mut(), quantile_us(&interval.latency_ns, quantile))
        {
            run.push((middle.as_secs_f64(), us));
        }
    }
    runs
}

/// A line for each arm over what it achieved under each load.
fn per_load(panels: &[Panel], width: u32, of: impl Fn(&Curve) -> Option<f64>) -> Vec<Line> {
    let arms = panels
        .iter()
        .map(|panel| panel.curves.len())
        .max()
        .unwrap_or(0);
    let line = |arm: usize| {
        let curves = panels.iter().filter_map(|panel| panel.curves.get(arm));
        let points = curves.filter_map(|curve| Some((curve.requests_per_s, of(curve)?)));
        Line {
            colour: colour(arm),
            width,
            dots: true,
            points: points.collect(),
        }
    };
    (0..arms).map(line).collect()
}

fn over_throughput(panels: &[Panel]) -> Result<String> {
    let at = |quantile: f64| move |curve: &Curve| quantile_us(&curve.latency_ns(), quantile);
    let mut lines = per_load(panels, 1, at(0.5));
    lines.extend(per_load(panels, 2, at(0.99)));
    let axes = Axes {
        title: "latency against throughput (thick p99, thin p50)".into(),
        x: "requests answered in a second",
        y: "latency, us",
        percentiles: false,
        logarithmic: true,
    };
    plot(&axes, &lines, &names(&panels[0]))
}

fn cpu_over_throughput(panels: &[Panel]) -> Result<String> {
    let axes = Axes {
        title: "CPU time for each request against throughput".into(),
        x: "requests answered in a second",
        y: "CPU time, us",
        percentiles: false,
        logarithmic: false,
    };
    plot(
        &axes,
        &per_load(panels, 2, |curve| curve.cpu_us),
        &names(&panels[0]),
    )
}

/// Lines on axes, the names of the arms beside them.
fn plot(axes: &Axes<'_>, lines: &[Line], names: &[Name]) -> Result<String> {
    draw(&axes.title, names, |area| lines_on(area, axes, lines))
}

/// The horizontal axis.
fn across(axes: &Axes<'_>, lines: &[Line]) -> Marked {
    let (low, high) = reach(lines, |(x, _)| x);
    let pad = (high - low).max(high * 1e-3) * 0.03;
    let (reach, marks) = match axes.percentiles {
        true => (0.0..NINES_MAX, PERCENTILES.map(|(nines, _)| nines).to_vec()),
        false => ((low - pad).max(0.0)..high + pad, round_marks(low, high)),
    };
    Marked {
        reach,
        logarithmic: false,
        marks,
    }
}

/// The vertical axis.
fn up(axes: &Axes<'_>, lines: &[Line]) -> Marked {
    let (low, high) = reach(lines, |(_, y)| y);
    let (reach, marks) = match axes.logarithmic {
        true => (low * 0.85..high * 1.15, powers(low * 0.85, high * 1.15)),
        false => (0.0..high * 1.1, round_marks(0.0, high * 1.1)),
    };
    Marked {
        reach,
        logarithmic: axes.logarithmic,
        marks,
    }
}

/// The least and the greatest of the points, or some reach where there are none.
fn reach(lines: &[Line], of: impl Fn(&(f64, f64)) -> &f64) -> (f64, f64) {
    let values = lines.iter().flat_map(|line| &line.points).map(of);
    let ends = values.fold((f64::MAX, f64::MIN), |(low, high), value| {
        (low.min(*value), high.max(*value))
    });
    match ends.0 <= ends.1 {
        true => ends,
        false => (1.0, 10.0),
    }
}

fn lines_on(area: &Area<'_>, axes: &Axes<'_>, lines: &[Line]) -> Result<()> {
    let mut chart = ChartBuilder::on(area)
        .margin(8)
        .x_label_area_size(44)
        .y_label_area_size(72)
        .build_cartesian_2d(across(axes, lines), up(axes, lines))
        .map_err(|error| anyhow!("cannot plot: {error}"))?;
    let percentile = |nines: &f64| {
        let named = PERCENTILES.iter().find(|(at, _)| (at - nines).abs() < 1e-9);
        named.map_or(String::new(), |(_, name)| (*name).to_owned())
    };
    let plain = |value: &f64| short(*value);
    let x_text: &dyn Fn(&f64) -> String = if axes.percentiles {
        &percentile
    } else {
        &plain
    };
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(RGBColor(0xdd, 0xdd, 0xdd))
        .label_style((FONT, 13))
        .x_desc(axes.x)
        .y_desc(axes.y)
        .x_label_formatter(x_text)
        .y_label_formatter(&plain)
        .draw()
        .map_err(|error| anyhow!("cannot plot: {error}"))?;
    for line in lines {
        let style = line.colour.stroke_width(line.width);
        let points = line.points.iter().copied();
        chart
            .draw_series(LineSeries::new(points.clone(), style))
            .map_err(|error| anyhow!("cannot plot: {error}"))?;
        if line.dots {
            let dots = points.map(|point| Circle::new(point, 3, line.colour.filled()));
            chart
                .draw_series(dots)
                .map_err(|error| anyhow!("cannot plot: {error}"))?;
        }
    }
    Ok(())
}

/// 1, 2 and 5 times powers of ten from `low` to `high`; the powers alone where these are many.
fn powers(low: f64, high: f64) -> Vec<f64> {
    let digits: &[f64] = match high / low.max(1e-9) > 1e3 {
        true => &[1.0],
        false => &[1.0, 2.0, 5.0],
    };
    let all = (-3..=9).flat_map(|power| digits.iter().map(move |d| d * 10_f64.powi(power)));
    all.filter(|mark| (low..=high).contains(mark)).collect()
}

/// About six round numbers from `low` to `high`.
fn round_marks(low: f64, high: f64) -> Vec<f64> {
    let rough = ((high - low).max(high * 1e-3).max(1e-9) / 6.0).max(1e-9);
    let power = 10_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|digit| digit * power);
    let step = step
        .into_iter()
        .find(|step| *step >= rough)
        .unwrap_or(power);
    let first = (low / step).floor().max(0.0) as u64;
    (first..first + 10).map(|n| n as f64 * step).collect()
}

/// A number beside an axis.
fn short(value: f64) -> String {
    match value {
        0.0 => "0".into(),
        v if v.abs() >= 1e6 => format!("{} M", trimmed(v / 1e6)),
        v if v.abs() >= 1e4 => format!("{} k", trimmed(v / 1e3)),
        v => trimmed(v),
    }
}

fn trimmed(value: f64) -> String {
    let text = format!("{value:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// A bar for each arm under each load, with its value.
fn cpu_bars(panels: &[Panel]) -> Result<String> {
    let mut bars: Vec<(RGBColor, String, f64)> = Vec::new();
    for panel in panels {
        for (arm, curve) in panel.curves.iter().enumerate() {
            let of = |cpu_us| (colour(arm), panel.title.clone(), cpu_us);
            bars.extend(curve.cpu_us.map(of));
        }
    }
    let widest = bars.iter().map(|bar| bar.2).fold(1e-3, f64::max);
    // The value and the load's name stand behind the longest bar, before the names of the arms.
    let letters = panels.iter().map(|panel| panel.title.chars().count()).max();
    let label_width = 60 + 7 * letters.unwrap_or(0) as i32;
    draw(
        "CPU time for each request, us",
        &names(&panels[0]),
        |area| {
            let (width, height) = area.dim_in_pixel();
            let (left, top) = (16, 8);
            let step = ((height as i32 - 2 * top) / bars.len().max(1) as i32).clamp(6, 34);
            let room = (width as i32 - left - label_width).max(100);
            let mut last = "";
            for (index, (colour, title, us)) in bars.iter().enumerate() {
                let y = top + step * index as i32;
                let end = left + (f64::from(room) * us / widest) as i32;
                let bar = Rectangle::new([(left, y), (end, y + step * 2 / 3)], colour.filled());
                let value = Text::new(figure(*us), (end + 6, y), (FONT, 13));
                area.draw(&bar)
                    .and_then(|()| area.draw(&value))
                    .map_err(|e| anyhow!("{e}"))?;
                if last != title {
                    let style = (FONT, 12).into_font().color(&RGBColor(0x66, 0x66, 0x66));
                    area.draw(&Text::new(title.clone(), (end + 60, y), style))
                        .map_err(|e| anyhow!("{e}"))?;
                }
                last = title;
            }
            Ok(())
        },
    )
}

/// An SVG with a title, names at the right, and whatever `content` draws in the rest.
fn draw(
    title: &str,
    names: &[Name],
    content: impl FnOnce(&Area<'_>) -> Result<()>,
) -> Result<String> {
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, (WIDTH, HEIGHT)).into_drawing_area();
        let failed = |error| anyhow!("cannot plot: {error}");
        root.fill(&WHITE).map_err(failed)?;
        let heading = (FONT, 16).into_font().style(FontStyle::Bold);
        root.draw(&Text::new(title.to_owned(), (12, 10), heading))
            .map_err(failed)?;
        let (_, below) = root.split_vertically(32);
        let (left, right) = below.split_horizontally(WIDTH - NAMES_WIDTH);
        for (index, (colour, name)) in names.iter().enumerate() {
            let y = 16 + 22 * index as i32;
            let mark = Rectangle::new([(6, y), (24, y + 5)], colour.filled());
            right.draw(&mark).map_err(failed)?;
            right
                .draw(&Text::new(name.clone(), (32, y - 5), (FONT, 13)))
                .map_err(failed)?;
        }
        content(&left)?;
        root.present().map_err(failed)?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::curves::Interval;
    use crate::report::new_histogram;

    fn curve(arm: &str, samples: u64) -> Curve {
        let interval = |second: u64| {
            let mut latency_ns = new_histogram();
            for us in 1..=samples {
                latency_ns.record(us * 1000).unwrap();
            }
            let (start, length) = (Duration::from_secs(second), Duration::from_secs(1));
            Interval {
                start,
                length,
                latency_ns,
            }
        };
        Curve {
            arm: arm.into(),
            intervals: vec![interval(0), interval(2)],
            requests_per_s: samples as f64,
            cpu_us: Some(12.5),
            hiccup_ns: new_histogram(),
        }
    }

    fn panel(title: &str, samples: u64) -> Panel {
        let curves = vec![curve("direct", samples), curve("a<b", samples)];
        Panel {
            title: title.into(),
            curves,
        }
    }

    #[test]
    fn distributions_rise_and_end_where_samples_do() {
        let points = distribution(&curve("x", 500).latency_ns());
        assert!(points.windows(2).all(|pair| pair[0].1 <= pair[1].1));
        assert!((points.last().unwrap().0 - 3.0).abs() < 1e-9);
        assert!(distribution(&new_histogram()).is_empty());
    }

    #[test]
    fn every_run_has_its_plots_and_no_broken_numbers() {
        let one = [panel("one", 500)];
        let two = [panel("one", 500), panel("two", 900)];
        let many = [panel("one", 100), panel("two", 300), panel("three", 900)];
        let empty = [panel("none", 0)];
        for (panels, count) in [(&one[..], 3), (&two, 6), (&many, 8), (&empty, 3)] {
            let plots = all(panels).unwrap();
            assert_eq!(plots.len(), count);
            for plot in &plots {
                assert!(plot.starts_with("<svg") && plot.trim_end().ends_with("</svg>"));
                assert!(!plot.contains("NaN") && !plot.contains("inf"), "{plot}");
                assert!(plot.contains("a&lt;b") && !plot.contains("a<b"), "{plot}");
            }
            let stack = stacked(&plots);
            assert_eq!(stack.matches("<svg").count(), count + 1);
            assert_eq!(stack.matches("</svg>").count(), count + 1);
        }
    }

    #[test]
    fn lines_over_time_have_gaps_where_others_ran() {
        let mut curve = curve("x", 10);
        assert_eq!(
            runs(&curve, 0.5).iter().map(Vec::len).collect::<Vec<_>>(),
            [1, 1]
        );
        curve.intervals[1].start = Duration::from_secs(1);
        assert_eq!(runs(&curve, 0.5), [vec![(0.5, 5.003), (1.5, 5.003)]]);
    }

    #[test]
    fn numbers_beside_axes_are_short() {
        let texts = [0.0, 0.25, 5.0, 1200.0, 25_000.0, 1_500_000.0].map(short);
        assert_eq!(texts, ["0", "0.25", "5", "1200", "25 k", "1.5 M"]);
        let marks = round_marks(1.2, 13.0);
        assert_eq!(&marks[..4], [0.0, 2.0, 4.0, 6.0]);
        assert_eq!(powers(8.0, 60.0), [10.0, 20.0, 50.0]);
        assert_eq!(powers(8.0, 60_000.0), [10.0, 100.0, 1e3, 1e4]);
    }
}
