//! A line of the log as one JSON object, keys as `spec/events-discovery.md` §9.2 has them.

use std::fmt;

use serde::Serialize;
#[cfg(feature = "otel")]
use serde_json::Map;
use serde_json::Value;
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use super::clock::Clock;

/// One JSON object for each event: time, level, file, line, target, message, then its fields by
/// name.
pub(super) struct JsonLines(pub(super) Clock);

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
        let mut fields = Fields::default();
        event.record(&mut fields);
        let mut line = Line::default();
        line.out.extend_from_slice(b"{\"time\":");
        line.text(&self.0.now())?;
        line.out.extend_from_slice(b",\"level\":");
        line.text(meta.level().as_str())?;
        if let (Some(file), Some(number)) = (meta.file(), meta.line()) {
            line.member("file", file)?;
            line.member("line", &number)?;
        }
        line.member("target", meta.target())?;
        line.member("message", &fields.message)?;
        for (name, value) in fields.sorted() {
            line.member(name, &value)?;
        }
        line.out.extend_from_slice(b"}\n");
        writer.write_str(std::str::from_utf8(&line.out).map_err(|_| fmt::Error)?)
    }
}

/// A line as it grows.
#[derive(Default)]
struct Line {
    out: Vec<u8>,
}

impl Line {
    fn text(&mut self, text: &str) -> fmt::Result {
        self.value(text)
    }

    fn member(&mut self, name: &str, value: &(impl Serialize + ?Sized)) -> fmt::Result {
        self.out.push(b',');
        self.text(name)?;
        self.out.push(b':');
        self.value(value)
    }

    fn value(&mut self, value: &(impl Serialize + ?Sized)) -> fmt::Result {
        serde_json::to_writer(&mut self.out, value).map_err(|_| fmt::Error)
    }
}

/// A text that is a JSON object or list stands in the line as such. (Dynamo does so with numbers
/// too, which changes ids that look like some.)
fn embedded(value: &str) -> Value {
    let shaped = value.starts_with(['{', '[']);
    let read = shaped.then(|| serde_json::from_str(value).ok()).flatten();
    read.unwrap_or_else(|| Value::String(value.to_owned()))
}

/// The fields of an event.
#[derive(Default)]
pub(crate) struct Fields {
    message: String,
    others: Vec<(&'static str, Value)>,
}

impl Fields {
    /// Its message, and everything else by name.
    #[cfg(feature = "otel")]
    pub(crate) fn into_parts(self) -> (String, Map<String, Value>) {
        let others = self.others.into_iter();
        let others = others.map(|(name, value)| (name.to_owned(), value));
        (self.message, others.collect())
    }

    /// All but the message, by name; of a name that comes twice the last.
    fn sorted(&mut self) -> &[(&'static str, Value)] {
        self.others.reverse();
        self.others.sort_by_key(|(name, _)| *name);
        self.others.dedup_by_key(|(name, _)| *name);
        &self.others
    }

    fn put(&mut self, field: &Field, value: Value) {
        // These names are the line's own.
        const TAKEN: [&str; 6] = ["time", "level", "file", "line", "target", "message"];
        if !TAKEN.contains(&field.name()) {
            self.others.push((field.name(), value));
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
            self.put(field, embedded(value));
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
            .event_format(JsonLines(Clock::utc()))
            .with_writer(move || writer.clone())
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            tracing::warn!(zeta = 1, alpha = "a\"b", list = "[1,{}]", "hello {}", 5);
        });
        let line = String::from_utf8(sink.0.lock().unwrap().clone()).unwrap();
        assert_eq!(line.matches('\n').count(), 1);
        let value: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["message"], "hello 5");
        assert_eq!(value["alpha"], "a\"b");
        assert_eq!(value["zeta"], 1);
        assert_eq!(value["list"], serde_json::json!([1, {}]));
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
