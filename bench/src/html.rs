//! A report as one HTML page that needs nothing else: what was run where, whether it kept its
//! thresholds, how much of it is noise, plots, tables, and the JSON.

use std::fmt::Write as _;

use serde_json::Value;

use crate::curves::{Panel, quantile_us};
use crate::thresholds::Verdict;

/// What a page is made of.
pub(crate) struct Page<'a> {
    /// The subcommand.
    pub(crate) kind: &'a str,
    /// The report.
    pub(crate) report: &'a Value,
    /// Its tables as text.
    pub(crate) tables: &'a str,
    /// Its distributions; none where the subcommand has only their quantiles.
    pub(crate) panels: &'a [Panel],
    /// Plots, each an SVG.
    pub(crate) plots: &'a [String],
    /// What became of the thresholds, if there are any.
    pub(crate) verdict: Option<&'a Verdict>,
}

const STYLE: &str = "\
body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:1100px;margin:2em auto;padding:0 1em}
h1{font-size:1.5em;margin-bottom:0}h2{font-size:1.15em;margin-top:2em}
pre{font:12.5px/1.45 ui-monospace,monospace;background:#f6f6f6;padding:.8em;overflow-x:auto}
svg{max-width:100%;height:auto;display:block;margin:1em 0}
.by{color:#666;margin-top:.2em}.good{color:#00703c}.bad{color:#b00020}
table{border-collapse:collapse}td,th{padding:.15em 1em .15em 0;text-align:left;vertical-align:top}
";

impl Page<'_> {
    /// The page.
    pub(crate) fn html(&self) -> String {
        let when = self.report["when"].as_str().unwrap_or_default();
        let title = format!("corelane-bench {}", self.kind);
        let mut out = format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width\">\n\
             <title>{} {}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n\
             <h1>{}</h1>\n<p class=\"by\">{}</p>\n",
            escape(&title),
            escape(when),
            escape(&title),
            escape(&self.byline(when)),
        );
        self.put_verdict(&mut out);
        self.put_noise(&mut out);
        if !self.plots.is_empty() {
            out.push_str("<h2>Plots</h2>\n");
        }
        for plot in self.plots {
            out.push_str(plot);
        }
        let tables = escape(self.tables.trim());
        put(&mut out, &format!("<h2>Numbers</h2>\n<pre>{tables}</pre>"));
        self.put_facts(&mut out);
        let json = escape(&format!("{:#}", self.report));
        let what = "The report as JSON; its members are described in bench/README.md";
        put(
            &mut out,
            &format!("<details><summary>{what}</summary><pre>{json}</pre></details>"),
        );
        out.push_str("</body>\n</html>\n");
        out
    }

    fn byline(&self, when: &str) -> String {
        let host = &self.report["host"];
        let text = |name: &str| host[name].as_str().unwrap_or("unknown").to_owned();
        format!(
            "{when}; {} CPUs ({}), Linux {}, {} build of {}",
            host["cpus"],
            text("cpu_model"),
            text("kernel"),
            text("bench_build"),
            text("bench_version"),
        )
    }

    fn put_verdict(&self, out: &mut String) {
        let Some(verdict) = self.verdict else { return };
        out.push_str("<h2>Thresholds</h2>\n");
        if verdict.broken.is_empty() {
            put(
                out,
                &format!("<p class=\"good\">All {} are kept.</p>", verdict.bounds),
            );
            return;
        }
        out.push_str("<ul class=\"bad\">\n");
        for one in &verdict.broken {
            put(out, &format!("<li>{}</li>", escape(one)));
        }
        out.push_str("</ul>\n");
    }

    /// What the arms differ by that are the same thing twice.
    fn put_noise(&self, out: &mut String) {
        let pairs = self.panels.iter().flat_map(|panel| {
            let curves = panel.curves.iter();
            curves.filter_map(move |again| {
                let name = again.arm.strip_suffix("-again")?;
                let once = panel.curves.iter().find(|curve| curve.arm == name)?;
                Some((panel, once, again))
            })
        });
        let mut rows = String::new();
        for (panel, once, again) in pairs {
            let percent = |quantile: f64| {
                let us = |curve: &crate::curves::Curve| quantile_us(&curve.latency_ns(), quantile);
                match us(again).zip(us(once)) {
                    Some((again, once)) => format!("{:+.1} %", (again / once - 1.0) * 100.0),
                    None => "-".into(),
                }
            };
            let hiccup = quantile_us(&again.hiccup_ns, 0.999);
            let hiccup = hiccup.map_or("-".into(), |us| format!("{us:.0} us"));
            let cells = [escape(&panel.title), percent(0.5), percent(0.99), hiccup];
            put(
                &mut rows,
                &format!("<tr><td>{}</td></tr>", cells.join("</td><td>")),
            );
        }
        if rows.is_empty() {
            return;
        }
        put(
            out,
            &format!(
                "<h2>Noise</h2>\n<p>An arm was measured twice, as if it were two. What the two \
                 differ by is noise; differences of other arms that are not larger mean nothing. \
                 A hiccup is how late a thread woke that wanted to wake every millisecond.</p>\n\
                 <table><tr><th>load</th><th>p50</th><th>p99</th><th>hiccups, p99.9</th></tr>\n\
                 {rows}</table>"
            ),
        );
    }

    fn put_facts(&self, out: &mut String) {
        let Some(settings) = self.report["settings"].as_object() else {
            return;
        };
        out.push_str("<h2>Settings</h2>\n<table>\n");
        for (name, value) in settings {
            let value = value
                .as_str()
                .map_or_else(|| value.to_string(), ToOwned::to_owned);
            let (name, value) = (escape(name), escape(&value));
            put(out, &format!("<tr><td>{name}</td><td>{value}</td></tr>"));
        }
        out.push_str("</table>\n");
    }
}

/// A line; writing to a string cannot fail.
fn put(out: &mut String, line: &str) {
    let _ = writeln!(out, "{line}");
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_page_stands_alone_and_says_what_broke() {
        let report = json!({
            "when": "2026-01-31T12:00:00Z",
            "host": {"cpus": 2, "cpu_model": "<x>", "kernel": "6", "bench_build": "debug",
                     "bench_version": "1"},
            "settings": {"rounds": 3, "note": "a & b"},
        });
        let verdict = Verdict {
            bounds: 2,
            broken: vec!["p99 of <a> is 3".into()],
        };
        let plots = ["<svg></svg>\n".to_owned()];
        let page = Page {
            kind: "hop",
            report: &report,
            tables: "arm  p50\n<a>  1",
            panels: &[],
            plots: &plots,
            verdict: Some(&verdict),
        };
        let text = page.html();
        assert!(text.starts_with("<!DOCTYPE html>") && text.ends_with("</html>\n"));
        for wanted in [
            "p99 of &lt;a&gt; is 3",
            "a &amp; b",
            "&lt;x&gt;",
            "<svg></svg>",
        ] {
            assert!(text.contains(wanted), "{wanted}: {text}");
        }
        for foreign in ["http:", "https:", "src=", "<link", "<script"] {
            assert!(!text.contains(foreign), "{foreign} in {text}");
        }
        let kept = Verdict {
            bounds: 2,
            broken: Vec::new(),
        };
        let text = Page {
            verdict: Some(&kept),
            ..page
        }
        .html();
        assert!(text.contains("All 2 are kept"), "{text}");
    }
}
