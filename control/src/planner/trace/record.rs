//! One line of a trace: a request, in one of two forms.

use serde_json::Value;

/// The only schema of Dynamo's request traces that is known.
const SCHEMA: &str = "dynamo.request.trace.v1";

/// How records are written.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
pub enum Format {
    /// `timestamp` in ms, `input_length`, `output_length`.
    Mooncake,
    /// Dynamo's request events.
    Dynamo,
}

impl Format {
    fn name(self) -> &'static str {
        match self {
            Self::Mooncake => "mooncake",
            Self::Dynamo => "dynamo",
        }
    }
}

/// A request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Request {
    pub(super) time_ms: f64,
    pub(super) input_tokens: u64,
    pub(super) output_tokens: u64,
}

/// What a line is.
pub(super) enum Found {
    Request(Format, Request),
    /// Another event of a trace.
    Other(Format),
}

/// Reads a line; `format` is what the trace was found to be before.
pub(super) fn read(line: &[u8], format: Option<Format>) -> Result<Found, String> {
    let value: Value = serde_json::from_slice(line).map_err(|error| {
        // The error's own line number counts within this one line.
        let text = error.to_string();
        let text = text.split(" at line").next().unwrap_or_default();
        format!("is not JSON ({text})")
    })?;
    if !value.is_object() {
        return Err("is no object; each line holds one record in braces".into());
    }
    let event = value.get("event").filter(|event| event.is_object());
    let record = event.unwrap_or(&value);
    let seen = if record.get("schema").is_some() {
        Format::Dynamo
    } else if record.get("timestamp").is_some() || format == Some(Format::Mooncake) {
        Format::Mooncake
    } else {
        return Err(format!(
            "is neither a mooncake record (timestamp, input_length, output_length) nor a Dynamo \
             record (schema {SCHEMA})"
        ));
    };
    if let Some(format) = format.filter(|format| *format != seen) {
        let (seen, format) = (seen.name(), format.name());
        return Err(format!(
            "is a {seen} record in a {format} trace; keep the two apart"
        ));
    }
    match seen {
        Format::Mooncake => mooncake(record),
        Format::Dynamo => dynamo(record),
    }
}

fn mooncake(record: &Value) -> Result<Found, String> {
    let request = Request {
        time_ms: number("timestamp", record.get("timestamp"))?,
        input_tokens: length("input_length", record.get("input_length"))?,
        output_tokens: length("output_length", record.get("output_length"))?,
    };
    Ok(Found::Request(Format::Mooncake, request))
}

fn dynamo(record: &Value) -> Result<Found, String> {
    let schema = record.get("schema").and_then(Value::as_str);
    if schema != Some(SCHEMA) {
        let schema = record.get("schema").unwrap_or(&Value::Null);
        return Err(format!("schema is {schema}; only \"{SCHEMA}\" is known"));
    }
    if record.get("event_type").and_then(Value::as_str) != Some("request_end") {
        return Ok(Found::Other(Format::Dynamo));
    }
    let received = record.pointer("/request/request_received_ms");
    let time_ms = match received.filter(|time| !time.is_null()) {
        Some(time) => number("request.request_received_ms", Some(time))?,
        None => number("event_time_unix_ms", record.get("event_time_unix_ms"))?,
    };
    let input = record.pointer("/request/replay/input_length");
    let output = record.pointer("/request/output_tokens");
    let request = Request {
        time_ms,
        input_tokens: length("request.replay.input_length", input)?,
        output_tokens: length("request.output_tokens", output)?,
    };
    Ok(Found::Request(Format::Dynamo, request))
}

fn number(name: &str, value: Option<&Value>) -> Result<f64, String> {
    let value = value.ok_or_else(|| format!("{name} is missing"))?;
    let number = value.as_f64().filter(|number| number.is_finite());
    number.ok_or_else(|| format!("{name} is {value}; it must be a number"))
}

fn length(name: &str, value: Option<&Value>) -> Result<u64, String> {
    let value = value.ok_or_else(|| format!("{name} is missing"))?;
    value
        .as_u64()
        .ok_or_else(|| format!("{name} is {value}; it must be a whole number from 0"))
}
