//! A file of bounds that a report must keep: which member of which arm under which load may be how
//! much. What is broken fails the run, by name.
//!
//! ```toml
//! [[threshold]]
//! load = "1000 requests/s"      # part of the load's (or group's) name; all where left out
//! arm = "target"                # the arm's name; all where left out
//! value = "latency_us/p99"      # members of the arm in the JSON, from the outer to the inner
//! max = 800                     # and, or: min
//! ```

use std::fs;
use std::path::Path;

use anyhow::Result;
use serde::Deserialize;
use serde_json::Value;

use crate::report::figure;
use crate::usage_error;

/// Loads are called by one of these members.
const LOAD_NAMES: [&str; 2] = ["load", "group"];

/// What became of the bounds.
#[derive(Debug)]
pub(crate) struct Verdict {
    /// How many there are.
    pub(crate) bounds: usize,
    /// What is broken, a sentence each.
    pub(crate) broken: Vec<String>,
}

/// All bounds of a file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Thresholds {
    #[serde(rename = "threshold")]
    all: Vec<Threshold>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Threshold {
    load: Option<String>,
    arm: Option<String>,
    value: String,
    min: Option<f64>,
    max: Option<f64>,
}

impl Thresholds {
    /// Reads the file.
    ///
    /// # Errors
    /// A usage error: it is not there, or is not as it should be.
    pub(crate) fn read(file: &Path) -> Result<Self> {
        let name = file.display();
        let text = fs::read_to_string(file)
            .map_err(|error| usage_error(format!("cannot read {name}: {error}")))?;
        Self::parse(&text).map_err(|error| usage_error(format!("{name}: {error}")))
    }

    fn parse(text: &str) -> Result<Self, String> {
        let read: Self = toml::from_str(text).map_err(|error| error.to_string())?;
        for one in &read.all {
            if one.min.is_none() && one.max.is_none() {
                return Err(format!("the threshold of {} needs min or max", one.value));
            }
        }
        match read.all.is_empty() {
            true => Err("no [[threshold]] in it".into()),
            false => Ok(read),
        }
    }

    /// Looks at a report. A bound that finds nothing to look at is broken.
    pub(crate) fn judge(&self, report: &Value) -> Verdict {
        let mut broken = Vec::new();
        for one in &self.all {
            let mut seen = 0;
            walk(report, "", &mut |load, arm| {
                one.look(load, arm, &mut seen, &mut broken)
            });
            if seen == 0 {
                broken.push(format!(
                    "{} has nothing to look at: {}",
                    one.value,
                    one.place()
                ));
            }
        }
        let bounds = self.all.len();
        Verdict { bounds, broken }
    }
}

impl Threshold {
    fn look(&self, load: &str, arm: &Value, seen: &mut usize, broken: &mut Vec<String>) {
        let name = arm["arm"].as_str().unwrap_or_default();
        let is_other = self.arm.as_deref().is_some_and(|wanted| wanted != name);
        if is_other || !load.contains(self.load.as_deref().unwrap_or_default()) {
            return;
        }
        let Some(value) = self.member(arm) else {
            return;
        };
        *seen += 1;
        let under = if load.is_empty() {
            String::new()
        } else {
            format!(" under {load}")
        };
        let what = format!("{} of {name}{under}", self.value);
        if value.is_nan() {
            broken.push(format!("{what} was not measured"));
            return;
        }
        let mut say = |than: &str, bound: f64| {
            let (value, bound) = (figure(value), figure(bound));
            broken.push(format!("{what} is {value}, {than} {bound}"));
        };
        if let Some(max) = self.max.filter(|max| value > *max) {
            say("more than", max);
        }
        if let Some(min) = self.min.filter(|min| value < *min) {
            say("less than", min);
        }
    }

    /// Not a number where nothing was measured: quantiles of nothing are 0, which keeps any bound.
    fn member(&self, arm: &Value) -> Option<f64> {
        let mut at = arm;
        for part in self.value.split('/') {
            if part != "count" && at.get("count").and_then(Value::as_u64) == Some(0) {
                return Some(f64::NAN);
            }
            at = match part.parse::<usize>() {
                Ok(place) if at.is_array() => at.get(place)?,
                _ => at.get(part)?,
            };
        }
        at.as_f64()
    }

    fn place(&self) -> String {
        let or_any = |name: &Option<String>| name.clone().unwrap_or_else(|| "any".into());
        format!("arm {}, load {}", or_any(&self.arm), or_any(&self.load))
    }
}

/// Calls `see` with every arm in a report, and the load that it stands under.
fn walk(value: &Value, load: &str, see: &mut dyn FnMut(&str, &Value)) {
    match value {
        Value::Array(values) => values.iter().for_each(|value| walk(value, load, see)),
        Value::Object(members) => {
            let named = LOAD_NAMES
                .iter()
                .find_map(|name| members.get(*name)?.as_str());
            let load = named.unwrap_or(load);
            if members.get("arm").is_some_and(Value::is_string) {
                see(load, value);
            } else {
                members.values().for_each(|value| walk(value, load, see));
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn report() -> Value {
        let arm = |name: &str, p999: f64| {
            let latency = json!({"p99.9": p999});
            json!({"arm": name, "latency_us": latency, "rounds": [{"errors": 3}]})
        };
        json!({"loads": [
            {"load": "closed, 1", "arms": [arm("direct", 10.0), arm("corelane", 20.0)]},
            {"load": "closed, 64", "arms": [arm("direct", 100.0), arm("corelane", 250.0)]},
        ]})
    }

    fn broken(text: &str) -> Vec<String> {
        Thresholds::parse(text).unwrap().judge(&report()).broken
    }

    #[test]
    fn bounds_name_what_breaks_them() {
        let text = "[[threshold]]\nvalue = \"latency_us/p99.9\"\nmax = 100\n";
        let wanted = "latency_us/p99.9 of corelane under closed, 64 is 250, more than 100";
        assert_eq!(broken(text), [wanted]);
        let text = "[[threshold]]\nvalue = \"latency_us/p99.9\"\narm = \"direct\"\nmin = 50\n";
        assert_eq!(
            broken(text),
            ["latency_us/p99.9 of direct under closed, 1 is 10.0, less than 50.0"]
        );
    }

    #[test]
    fn loads_and_places_in_lists_are_found() {
        let text = "[[threshold]]\nvalue = \"rounds/0/errors\"\nload = \"64\"\nmax = 2\n";
        assert_eq!(broken(text).len(), 2, "{:?}", broken(text));
        assert_eq!(broken(&text.replace("max = 2", "max = 3")), [""; 0]);
    }

    #[test]
    fn quantiles_of_nothing_keep_no_bound() {
        let latency = json!({"p99": 0.0, "count": 0});
        let report = json!({"load": "open", "arms": [{"arm": "target", "latency_us": latency}]});
        let judge = |text: &str| Thresholds::parse(text).unwrap().judge(&report).broken;
        let p99 = "[[threshold]]\nvalue = \"latency_us/p99\"\nmax = 1\n";
        assert_eq!(
            judge(p99),
            ["latency_us/p99 of target under open was not measured"]
        );
        assert_eq!(judge(&p99.replace("p99", "count")), [""; 0]);
    }

    #[test]
    fn a_bound_that_sees_nothing_is_broken() {
        let text = "[[threshold]]\nvalue = \"latency_us/p98\"\nmax = 1\n";
        let broken = broken(text);
        assert!(broken[0].contains("nothing to look at"), "{broken:?}");
    }

    #[test]
    fn mistakes_are_told() {
        for (text, wanted) in [
            ("", "threshold"),
            ("threshold = []", "no [[threshold]]"),
            ("[[threshold]]\nvalue = \"a\"\n", "needs min or max"),
            ("[[threshold]]\nvalue = \"a\"\nmaximum = 1\n", "maximum"),
        ] {
            let error = Thresholds::parse(text).unwrap_err();
            assert!(error.contains(wanted), "{text}: {error}");
        }
    }
}
