//! What an engine reports about its turns as standby and active one (`spec/gpu-memory.md` §6.3).

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

/// Where an engine stands.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum EngineState {
    /// Loading.
    Init,
    /// Ready and parked.
    Standby,
    /// Has won the lock and maps its memory.
    Waking,
    /// Serves.
    Active,
}

impl EngineState {
    const ALL: [EngineState; 4] = [
        EngineState::Init,
        EngineState::Standby,
        EngineState::Waking,
        EngineState::Active,
    ];

    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            EngineState::Init => "init",
            EngineState::Standby => "standby",
            EngineState::Waking => "waking",
            EngineState::Active => "active",
        }
    }
}

/// The labels that every metric carries.
#[derive(Clone, Debug)]
pub struct EngineLabels {
    /// `0` for the primary.
    pub engine_id: String,
    /// The model.
    pub model: String,
    /// The component that it serves as.
    pub component: String,
}

/// One engine's failover metrics. Updates and scrapes are serialised by one lock.
pub struct FailoverMetrics {
    labels: EngineLabels,
    counters_path: PathBuf,
    inner: Mutex<Inner>,
}

struct Inner {
    state: EngineState,
    entered_s: f64,
    last_stay: Option<(EngineState, f64)>,
    transitions: [[u64; 4]; 4],
    attempts: u64,
    success: u64,
}

impl FailoverMetrics {
    /// Starts in `init`. The switch counters go on where the file beside the lock left them.
    pub fn new(labels: EngineLabels, lock_path: &Path) -> FailoverMetrics {
        let name = format!("failover_metrics_engine-{}.json", labels.engine_id);
        let counters_path = lock_path.parent().unwrap_or(Path::new(".")).join(name);
        let (attempts, success) = load(&counters_path);
        let inner = Inner {
            state: EngineState::Init,
            entered_s: unix_s(),
            last_stay: None,
            transitions: [[0; 4]; 4],
            attempts,
            success,
        };
        FailoverMetrics {
            labels,
            counters_path,
            inner: Mutex::new(inner),
        }
    }

    /// The engine has moved on. `contended` says whether the lock was taken by another at first:
    /// only such turns count as switches, tried when waking and done when active.
    ///
    /// # Errors
    /// The counters could not be written; they are right in memory.
    pub fn enter(&self, state: EngineState, contended: bool) -> io::Result<()> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let now_s = unix_s();
        let from = inner.state;
        inner.transitions[from as usize][state as usize] += 1;
        inner.last_stay = Some((from, (now_s - inner.entered_s).max(0.0)));
        inner.state = state;
        inner.entered_s = now_s;
        match state {
            EngineState::Waking if contended => inner.attempts += 1,
            EngineState::Active if contended => inner.success += 1,
            _ => return Ok(()),
        }
        store(&self.counters_path, inner.attempts, inner.success)
    }

    /// Switches that were tried, and that were done, over all restarts.
    pub fn switches(&self) -> (u64, u64) {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        (inner.attempts, inner.success)
    }

    /// The metrics as Prometheus reads them.
    pub fn render(&self) -> String {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let mut out = Exposition {
            text: String::new(),
            labels: self.labels.clone(),
        };
        out.head("state", "gauge", "Where the engine stands, one of four.");
        for state in EngineState::ALL {
            let value = f64::from(u8::from(state == inner.state));
            out.sample("state", &[("state", state.as_str())], value);
        }
        let name = "state_entered_timestamp_seconds";
        out.head(
            name,
            "gauge",
            "When the engine came to stand there, since 1970.",
        );
        out.sample(name, &[], inner.entered_s);
        let name = "last_state_duration_seconds";
        out.head(
            name,
            "gauge",
            "The last completed stay; of waking, the time of a switch.",
        );
        if let Some((state, seconds)) = inner.last_stay {
            out.sample(name, &[("state", state.as_str())], seconds);
        }
        out.head(
            "transitions_total",
            "counter",
            "Moves from one state to another.",
        );
        for from in EngineState::ALL {
            for to in EngineState::ALL {
                let count = inner.transitions[from as usize][to as usize];
                let labels = [("from_state", from.as_str()), ("to_state", to.as_str())];
                if count > 0 {
                    out.sample("transitions_total", &labels, count as f64);
                }
            }
        }
        out.head(
            "switch_attempts_total",
            "counter",
            "Contended turns that were begun.",
        );
        out.sample("switch_attempts_total", &[], inner.attempts as f64);
        out.head(
            "switch_success_total",
            "counter",
            "Contended turns that ended in serving.",
        );
        out.sample("switch_success_total", &[], inner.success as f64);
        out.text
    }
}

struct Exposition {
    text: String,
    labels: EngineLabels,
}

impl Exposition {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(
            self.text,
            "# HELP {PREFIX}_{name} {help}\n# TYPE {PREFIX}_{name} {kind}"
        );
    }

    fn sample(&mut self, name: &str, more: &[(&str, &str)], value: f64) {
        let EngineLabels {
            engine_id,
            model,
            component,
        } = &self.labels;
        let base: [(&str, &str); 3] = [
            ("engine_id", engine_id),
            ("model", model),
            ("dynamo_component", component),
        ];
        let label = |(key, value): &(&str, &str)| format!("{key}=\"{}\"", escaped(value));
        let labels: Vec<_> = base.iter().chain(more).map(label).collect();
        let _ = writeln!(self.text, "{PREFIX}_{name}{{{}}} {value}", labels.join(","));
    }
}

fn escaped(value: &str) -> String {
    value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

/// Reads `{"attempts": n, "success": m}`; whatever is not that counts as zero.
fn load(path: &Path) -> (u64, u64) {
    let text = fs::read_to_string(path).unwrap_or_default();
    let number = |key: &str| {
        let rest = text
            .split_once(&format!("\"{key}\""))?
            .1
            .trim_start()
            .strip_prefix(':')?;
        let rest = rest.trim_start();
        let end = rest
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(rest.len());
        rest[..end].parse().ok()
    };
    (
        number("attempts").unwrap_or(0),
        number("success").unwrap_or(0),
    )
}

/// Written beside, synced and renamed: a crash leaves the old numbers or the new ones.
fn store(path: &Path, attempts: u64, success: u64) -> io::Result<()> {
    let beside = path.with_extension("json.new");
    let mut file = File::create(&beside)?;
    write!(file, "{{\"attempts\": {attempts}, \"success\": {success}}}")?;
    file.sync_all()?;
    fs::rename(&beside, path)
}

fn unix_s() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs_f64()
}

const PREFIX: &str = "dynamo_component_engine_failover";

#[cfg(test)]
mod tests {
    use super::*;

    fn labels() -> EngineLabels {
        let (engine_id, model, component) = ("0".into(), "m\"x".into(), "backend".into());
        EngineLabels {
            engine_id,
            model,
            component,
        }
    }

    #[test]
    fn all_states_are_there_from_the_first_scrape() {
        let dir = tempfile::tempdir().expect("a directory");
        let metrics = FailoverMetrics::new(labels(), &dir.path().join("failover.lock"));
        let text = metrics.render();
        for (state, value) in [("init", 1), ("standby", 0), ("waking", 0), ("active", 0)] {
            let line = format!(
                "{PREFIX}_state{{engine_id=\"0\",model=\"m\\\"x\",dynamo_component=\"backend\",\
                 state=\"{state}\"}} {value}\n"
            );
            assert!(text.contains(&line), "{text}");
        }
    }

    #[test]
    fn contended_switches_are_counted_and_survive_a_restart() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("failover.lock");
        let metrics = FailoverMetrics::new(labels(), &path);
        for contended in [false, true] {
            metrics.enter(EngineState::Standby, false).expect("written");
            metrics
                .enter(EngineState::Waking, contended)
                .expect("written");
            metrics
                .enter(EngineState::Active, contended)
                .expect("written");
        }
        metrics.enter(EngineState::Waking, true).expect("written");
        assert_eq!(metrics.switches(), (2, 1));
        let text = metrics.render();
        let line = "from_state=\"standby\",to_state=\"waking\"} 2\n";
        assert!(text.contains(line), "{text}");
        let file = dir.path().join("failover_metrics_engine-0.json");
        assert_eq!(
            fs::read_to_string(file).expect("there"),
            r#"{"attempts": 2, "success": 1}"#
        );
        assert_eq!(FailoverMetrics::new(labels(), &path).switches(), (2, 1));
    }

    #[test]
    fn a_broken_file_counts_as_nothing() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("failover.lock");
        fs::write(
            dir.path().join("failover_metrics_engine-0.json"),
            "{\"attempts\": x",
        )
        .expect("");
        assert_eq!(FailoverMetrics::new(labels(), &path).switches(), (0, 0));
    }
}
