//! The log: lines on standard error, readable or JSON, filtered by `CORELANE_LOG` or `DYN_LOG`.

use std::fmt;
use std::io::IsTerminal;

use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use crate::env::Env;

/// Libraries that are heard only when something is wrong; a filter of the user's wins.
const QUIET: &str = "h2=error,hyper=error,hyper_util=error,tonic=error,tower=error,rustls=error";
const DEFAULT: &str = "info";

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
    /// What was wrong with the environment, to be logged first.
    pub complaints: Vec<String>,
}

impl Options {
    /// Reads the options; `terminal` says whether standard error is one.
    pub fn read(env: &Env, terminal: bool) -> Self {
        let mut complaints = Vec::new();
        let wanted = ["CORELANE_LOG", "DYN_LOG"]
            .iter()
            .find_map(|name| Some((name, env.get(name)?)));
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
            None => DEFAULT.to_owned(),
        };
        let colour =
            terminal && env.get("NO_COLOR").is_none() && !env.is_on("DYN_SDK_DISABLE_ANSI_LOGGING");
        let json = match env.get("DYN_LOGGING_CONSOLE_FORMAT").map(str::trim) {
            Some("jsonl") => true,
            Some("readable") => false,
            Some(_) => {
                complaints.push(
                    "environment DYN_LOGGING_CONSOLE_FORMAT: neither readable nor jsonl; going \
                     on with readable"
                        .to_owned(),
                );
                false
            }
            None => env.is_on("DYN_LOGGING_JSONL"),
        };
        let form = if json {
            Form::JsonLines
        } else {
            Form::Readable { colour }
        };
        Self {
            filter,
            form,
            complaints,
        }
    }
}

/// Starts the log of this process. A second call does nothing.
pub fn start(env: &Env) {
    let options = Options::read(env, std::io::stderr().is_terminal());
    let filter = EnvFilter::try_new(format!("{QUIET},{}", options.filter))
        .unwrap_or_else(|_| EnvFilter::new(DEFAULT));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    // Failing means that a log is there already.
    let _ = match options.form {
        Form::Readable { colour } => builder.with_ansi(colour).try_init(),
        Form::JsonLines => builder.event_format(JsonLines).try_init(),
    };
    for complaint in options.complaints {
        tracing::warn!("{complaint}");
    }
}

/// One JSON object for each event: time, level, file, line, target, message, then its fields by
/// name.
struct JsonLines;

impl<S, N> FormatEvent<S, N> for JsonLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let meta = event.metadata();
        let mut time = String::new();
        SystemTime.format_time(&mut Writer::new(&mut time))?;
        let mut fields = Fields::default();
        event.record(&mut fields);
        write!(
            writer,
            "{{\"time\":{},\"level\":\"{}\"",
            text(&time),
            meta.level()
        )?;
        if let (Some(file), Some(line)) = (meta.file(), meta.line()) {
            write!(writer, ",\"file\":{},\"line\":{line}", text(file))?;
        }
        write!(writer, ",\"target\":{}", text(meta.target()))?;
        write!(writer, ",\"message\":{}", text(&fields.message))?;
        for (name, value) in &fields.others {
            write!(writer, ",{}:{value}", text(name))?;
        }
        writeln!(writer, "}}")
    }
}

fn text(text: &str) -> Value {
    Value::String(text.to_owned())
}

/// The fields of an event.
#[derive(Default)]
struct Fields {
    message: String,
    others: Map<String, Value>,
}

impl Fields {
    fn put(&mut self, field: &Field, value: Value) {
        // These names are the line's own.
        const TAKEN: [&str; 6] = ["time", "level", "file", "line", "target", "message"];
        if !TAKEN.contains(&field.name()) {
            self.others.insert(field.name().to_owned(), value);
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.message = format!("{value:?}");
        } else {
            self.put(field, Value::String(format!("{value:?}")));
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            self.message = value.to_owned();
        } else {
            self.put(field, Value::String(value.to_owned()));
        }
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.into());
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex};

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
    fn a_bad_filter_is_said_and_replaced() {
        let options = options(&[("DYN_LOG", "corelane=loud")]);
        assert_eq!(options.filter, "info");
        assert!(options.complaints[0].starts_with("environment DYN_LOG: not a log filter"));
    }

    #[test]
    fn json_lines_have_dynamos_keys_in_order() {
        #[derive(Clone, Default)]
        struct Sink(Arc<Mutex<Vec<u8>>>);
        impl Write for Sink {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                self.0.lock().unwrap().extend_from_slice(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let sink = Sink::default();
        let writer = sink.clone();
        let subscriber = tracing_subscriber::fmt()
            .event_format(JsonLines)
            .with_writer(move || writer.clone())
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            tracing::warn!(zeta = 1, alpha = "a\"b", "hello {}", 5);
        });
        let line = String::from_utf8(sink.0.lock().unwrap().clone()).unwrap();
        assert_eq!(line.matches('\n').count(), 1);
        let value: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["message"], "hello 5");
        assert_eq!(value["alpha"], "a\"b");
        assert_eq!(value["zeta"], 1);
        let at = |key: &str| line.find(&format!("\"{key}\":")).unwrap();
        let order = [
            "time", "level", "file", "line", "target", "message", "alpha", "zeta",
        ];
        assert!(
            order.windows(2).all(|pair| at(pair[0]) < at(pair[1])),
            "{line}"
        );
        assert!(value["time"].as_str().unwrap().ends_with('Z'));
    }
}
