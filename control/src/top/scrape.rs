//! The text of `/metrics`, as numbers.

use std::collections::HashMap;

/// One series of a family.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    labels: Vec<(String, String)>,
    /// Its value.
    pub value: f64,
}

impl Series {
    /// The value of a label.
    pub fn label(&self, name: &str) -> Option<&str> {
        let mut labels = self.labels.iter();
        let found = labels.find(|(label, _)| label == name);
        found.map(|(_, value)| value.as_str())
    }
}

/// All series of a scrape, by the name that stands before their labels.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scrape(HashMap<String, Vec<Series>>);

impl Scrape {
    /// Reads a text; lines that are no series are passed over.
    pub fn parse(text: &str) -> Self {
        let mut all: HashMap<String, Vec<Series>> = HashMap::new();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            if let Some((name, series)) = parse(line) {
                match all.get_mut(name) {
                    Some(family) => family.push(series),
                    None => drop(all.insert(name.to_owned(), vec![series])),
                }
            }
        }
        Self(all)
    }

    /// The series of a name.
    pub fn each(&self, name: &str) -> &[Series] {
        self.0.get(name).map_or(&[], Vec::as_slice)
    }

    /// The sum of those that have all these labels; `None` if there are none.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let has = |series: &&Series| {
            let mut labels = labels.iter();
            labels.all(|(name, value)| series.label(name) == Some(value))
        };
        let mut found = self.each(name).iter().filter(has).peekable();
        found.peek()?;
        Some(found.map(|series| series.value).sum())
    }
}

fn parse(line: &str) -> Option<(&str, Series)> {
    let end = line.find(['{', ' '])?;
    let (name, mut rest) = line.split_at(end);
    let mut labels = Vec::new();
    if let Some(inner) = rest.strip_prefix('{') {
        rest = inner;
        loop {
            rest = rest.trim_start_matches([',', ' ']);
            if let Some(after) = rest.strip_prefix('}') {
                rest = after;
                break;
            }
            let (label, value) = rest.split_once("=\"")?;
            let (value, after) = unescape(value)?;
            labels.push((label.to_owned(), value));
            rest = after;
        }
    }
    let value = rest.split_ascii_whitespace().next()?.parse().ok()?;
    Some((name, Series { labels, value }))
}

/// The text up to the closing quote, and what is behind that.
fn unescape(text: &str) -> Option<(String, &str)> {
    let mut out = String::new();
    let mut chars = text.char_indices();
    loop {
        match chars.next()? {
            (at, '"') => return Some((out, &text[at + 1..])),
            (_, '\\') => match chars.next()?.1 {
                'n' => out.push('\n'),
                other => out.push(other),
            },
            (_, other) => out.push(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_are_read_and_summed() {
        let text = "# HELP a_total Help.\n# TYPE a_total counter\n\
                    a_total{core=\"0\",cpu=\"4\"} 3\na_total{core=\"1\",cpu=\"5\"} 4\n\
                    b 1.5\nc_bucket{le=\"+Inf\"} 2 # {trace_id=\"x\"} 0.1\nodd{ 1\nodder\n\
                    d{listen=\"a/\\\"b\\\\c\\n\"} 1e-3\ne{a=\"1\" 2\nf NaN\n# EOF\n";
        let scrape = Scrape::parse(text);
        assert_eq!(scrape.sum("a_total", &[]), Some(7.0));
        assert_eq!(
            scrape.sum("a_total", &[("core", "1"), ("cpu", "5")]),
            Some(4.0)
        );
        assert_eq!(scrape.sum("a_total", &[("core", "2")]), None);
        assert_eq!(scrape.sum("b", &[]), Some(1.5));
        assert_eq!(scrape.sum("c_bucket", &[("le", "+Inf")]), Some(2.0));
        assert_eq!(scrape.each("d")[0].label("listen"), Some("a/\"b\\c\n"));
        for absent in ["odd", "odder", "e", "a"] {
            assert!(scrape.each(absent).is_empty(), "{absent}");
        }
    }
}
