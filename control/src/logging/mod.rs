//! The log: lines on standard error, readable or JSON, filtered by `CORELANE_LOG` or `DYN_LOG`.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::sync::OnceLock;

use serde::Deserialize;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, reload};

use crate::env::Env;
use crate::trace;

mod clock;
mod json;
mod outlet;

use clock::Clock;
#[cfg(feature = "otel")]
pub(crate) use json::Fields;
use json::JsonLines;
pub use outlet::dropped;
pub(crate) use outlet::together;

/// Libraries that are heard only when something is wrong, and the lines of
/// `DYN_LOGGING_SPAN_EVENTS`, which stand there whatever else does; a filter of the user's wins.
const QUIET: &str = "h2=error,hyper=error,hyper_util=error,tonic=error,tower=error,rustls=error,\
                     async_nats=error,opentelemetry=error,opentelemetry-otlp=error,\
                     opentelemetry_sdk=error,request_span=info";
/// A file of filters longer than this is refused.
const FILE_BYTES_MAX: u64 = 1 << 20;
const DEFAULT: &str = "info";
/// Says how lines look, and wins over `DYN_LOGGING_JSONL`.
const FORMAT: &str = "DYN_LOGGING_CONSOLE_FORMAT";

/// Variables with a filter of the log, the one that wins first.
const VARIABLES: [&str; 2] = ["CORELANE_LOG", "DYN_LOG"];

/// The filter in force, and what it was when the log began.
static FILTER: OnceLock<(reload::Handle<EnvFilter, Registry>, String)> = OnceLock::new();

/// How lines look.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Form {
    /// For people, with or without colours.
    Readable {
        /// Whether to use colours.
        colour: bool,
    },
    /// One JSON object on each line, keys as `spec/events-discovery.md` §9.2 has them.
    JsonLines,
}

/// What the log is to be.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Options {
    /// Filter directives: `info`, `corelane=debug,warn`.
    pub filter: String,
    /// How lines look.
    pub form: Form,
    /// Whether times are those of the local zone; else UTC.
    pub local: bool,
    /// What was wrong with the environment, to be logged first.
    pub complaints: Vec<String>,
}

impl Options {
    /// Reads the options; `terminal` says whether standard error is one.
    pub fn read(env: &Env, terminal: bool) -> Self {
        let mut complaints = Vec::new();
        let wanted = VARIABLES
            .iter()
            .find_map(|name| Some((name, env.get(name)?)));
        let file = match env.get("DYN_LOGGING_CONFIG_PATH").map(File::read) {
            Some(Ok(file)) => file,
            Some(Err(why)) => {
                complaints.push(format!(
                    "environment DYN_LOGGING_CONFIG_PATH: {why}; going on without that file"
                ));
                File::default()
            }
            None => File::default(),
        };
        let filter = match wanted {
            Some((name, text)) => match EnvFilter::try_new(text) {
                Ok(_) => text.to_owned(),
                Err(_) => {
                    complaints.push(format!(
                        "environment {name}: not a log filter; going on with {DEFAULT}, write \
                         a level or target=level, with commas between"
                    ));
                    DEFAULT.to_owned()
                }
            },
            None => file.log_level.clone().unwrap_or(DEFAULT.to_owned()),
        };
        let filter = file.filters().fold(filter, |all, one| all + "," + &one);
        let colour =
            terminal && env.get("NO_COLOR").is_none() && !env.is_on("DYN_SDK_DISABLE_ANSI_LOGGING");
        let format = env.get(FORMAT).map(str::trim);
        if format.is_some_and(|word| !matches!(word, "jsonl" | "readable")) {
            complaints.push(format!(
                "environment {FORMAT}: neither readable nor jsonl; going on with readable"
            ));
        }
        let form = if is_json(env) {
            Form::JsonLines
        } else {
            Form::Readable { colour }
        };
        Self {
            filter,
            form,
            local: env.is_on("DYN_LOG_USE_LOCAL_TZ"),
            complaints,
        }
    }
}

/// Whether log lines are JSON.
pub(crate) fn is_json(env: &Env) -> bool {
    match env.get(FORMAT) {
        Some(word) => word.trim() == "jsonl",
        None => env.is_on("DYN_LOGGING_JSONL"),
    }
}

/// What `DYN_LOGGING_CONFIG_PATH` names (`spec/events-discovery.md` §9.1).
#[derive(Debug, Default, Deserialize)]
struct File {
    /// Counts when neither variable is set.
    log_level: Option<String>,
    /// Target and level; these win over the variables.
    #[serde(default)]
    log_filters: BTreeMap<String, String>,
}

impl File {
    fn read(path: &str) -> Result<Self, String> {
        use std::io::Read;
        let mut text = String::new();
        let opened = std::fs::File::open(path.trim());
        opened
            .and_then(|file| file.take(FILE_BYTES_MAX).read_to_string(&mut text))
            .map_err(|_| "cannot be read".to_owned())?;
        let file: Self = toml::from_str(&text)
            .map_err(|_| "is not TOML with log_level and a table log_filters".to_owned())?;
        let level = file.log_level.iter().cloned();
        for directive in level.chain(file.filters()) {
            if EnvFilter::try_new(&directive).is_err() {
                return Err(format!("{directive} is not a log filter"));
            }
        }
        Ok(file)
    }

    fn filters(&self) -> impl Iterator<Item = String> {
        let filters = self.log_filters.iter();
        filters.map(|(target, level)| format!("{target}={level}"))
    }
}

/// Starts the log of this process. A second call does nothing.
pub fn start(env: &Env) {
    let options = Options::read(env, std::io::stderr().is_terminal());
    let (filter, handle) = reload::Layer::new(directives(&options.filter));
    let (clock, complaint) = Clock::new(options.local);
    let builder = tracing_subscriber::fmt::layer().with_writer(outlet::stderr);
    let registry = tracing_subscriber::registry()
        .with(filter)
        .with(trace::lines(env));
    // Failing means that a log is there already.
    let started = match options.form {
        Form::Readable { colour } => {
            let lines = builder.with_timer(clock).with_ansi(colour);
            registry.with(lines).try_init()
        }
        Form::JsonLines => {
            let lines = builder.event_format(JsonLines(clock));
            registry.with(lines).try_init()
        }
    };
    if started.is_ok() {
        let _ = FILTER.set((handle, options.filter));
    }
    for complaint in options.complaints.into_iter().chain(complaint) {
        tracing::warn!("{complaint}");
    }
}

fn directives(filter: &str) -> EnvFilter {
    EnvFilter::try_new(format!("{QUIET},{filter}")).unwrap_or_else(|_| EnvFilter::new(DEFAULT))
}

/// Whether a text is a filter of the log.
pub fn is_filter(text: &str) -> bool {
    EnvFilter::try_new(text).is_ok()
}

/// The variable that has a filter, and so wins over the configuration.
pub fn wins(env: &Env) -> Option<&'static str> {
    VARIABLES.into_iter().find(|name| env.get(name).is_some())
}

/// From now on the log has this filter; `None` is the one that it began with.
pub fn change(filter: Option<&str>) {
    if let Some((handle, first)) = FILTER.get() {
        // Fails only when the log is gone.
        let _ = handle.reload(directives(filter.unwrap_or(first)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(pairs: &[(&str, &str)]) -> Options {
        let pairs = pairs
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        Options::read(&Env::of(pairs), true)
    }

    #[test]
    fn who_wins() {
        assert_eq!(options(&[]).filter, "info");
        assert_eq!(options(&[]).form, Form::Readable { colour: true });
        assert_eq!(
            options(&[("DYN_LOG", "warn"), ("CORELANE_LOG", "debug")]).filter,
            "debug"
        );
        assert_eq!(
            options(&[("NO_COLOR", "1")]).form,
            Form::Readable { colour: false }
        );
        assert_eq!(
            options(&[("DYN_LOGGING_JSONL", "yes")]).form,
            Form::JsonLines
        );
        let both = [
            ("DYN_LOGGING_JSONL", "1"),
            ("DYN_LOGGING_CONSOLE_FORMAT", "readable"),
        ];
        assert_eq!(options(&both).form, Form::Readable { colour: true });
    }

    #[test]
    fn a_file_of_filters() {
        let folder = tempfile::tempdir().unwrap();
        let file = |text: &str| {
            let path = folder.path().join("logging.toml");
            std::fs::write(&path, text).unwrap();
            path.to_string_lossy().into_owned()
        };
        let good = file("log_level = \"warn\"\n[log_filters]\n\"a::b\" = \"debug\"\n");
        let name = "DYN_LOGGING_CONFIG_PATH";
        assert_eq!(options(&[(name, &good)]).filter, "warn,a::b=debug");
        let both = options(&[(name, &good), ("DYN_LOG", "trace")]);
        assert_eq!(both.filter, "trace,a::b=debug");
        for (text, says) in [
            ("log_level = 5", "is not TOML with log_level"),
            ("log_level = \"a=loud\"", "a=loud is not a log filter"),
        ] {
            let options = options(&[(name, &file(text))]);
            assert_eq!(options.filter, "info");
            assert!(options.complaints[0].contains(says), "{options:?}");
        }
        let gone = options(&[(name, "/nonexistent/logging.toml")]);
        assert!(gone.complaints[0].contains("cannot be read"), "{gone:?}");
    }

    #[test]
    fn a_bad_filter_is_said_and_replaced() {
        let options = options(&[("DYN_LOG", "corelane=loud")]);
        assert_eq!(options.filter, "info");
        assert!(options.complaints[0].starts_with("environment DYN_LOG: not a log filter"));
    }
}
