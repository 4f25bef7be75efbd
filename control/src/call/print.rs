//! What `corelane call` prints: items as people or programs read them.

use std::io::{BufWriter, Stdout, Write};

use anyhow::{Context, Result};
use corelane_codec::control_message::PayloadCodec;
use corelane_codec::error::DynamoError;
use corelane_codec::item::{self, Annotated};
use corelane_codec::path::instance_hex;
use serde_json::{Value, json};

use super::{Ended, Running};

/// An item as people read it.
pub(super) enum Item {
    Data(Value),
    Note(Annotated<Value>),
    Error(DynamoError),
}

impl Item {
    /// Most endpoints answer with `Annotated`; what does not look like it is shown as it is.
    pub(super) fn read(data: &[u8], codec: PayloadCodec) -> Item {
        const MEMBERS: [&str; 5] = ["data", "id", "event", "comment", "error"];
        let value: Value = match item::from_bytes(data, codec) {
            Ok(value) => value,
            Err(error) => {
                let text = format!("the item cannot be shown: {error}");
                return Item::Error(DynamoError::unknown(text));
            }
        };
        let annotated = match &value {
            Value::Object(members) => members.keys().all(|name| MEMBERS.contains(&name.as_str())),
            _ => false,
        };
        if !annotated {
            return Item::Data(value);
        }
        match serde_json::from_value::<Annotated<Value>>(value.clone()) {
            Ok(item) => match (item.to_error(), item.data) {
                (Some(error), _) => Item::Error(error),
                (None, Some(data)) => Item::Data(data),
                (None, None) => Item::Note(Annotated { data: None, ..item }),
            },
            Err(_) => Item::Data(value),
        }
    }
}

/// Writes to standard output, for people or for programs.
pub(super) struct Printer {
    json: bool,
    out: BufWriter<Stdout>,
    /// The reader went away (`| head`), which is no failure.
    deaf: bool,
}

impl Printer {
    pub(super) fn new(json: bool) -> Printer {
        Printer {
            json,
            out: BufWriter::new(std::io::stdout()),
            deaf: false,
        }
    }

    pub(super) fn line(&mut self, text: &str) -> Result<()> {
        let written = writeln!(self.out, "{text}");
        self.heard(written)
    }

    pub(super) fn flush(&mut self) -> Result<()> {
        let written = self.out.flush();
        self.heard(written)
    }

    fn heard(&mut self, written: std::io::Result<()>) -> Result<()> {
        match written {
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {
                self.deaf = true;
                Ok(())
            }
            _ if self.deaf => Ok(()),
            other => other.context("cannot write to standard output"),
        }
    }

    /// The item of a call at that index.
    pub(super) fn item(
        &mut self,
        (call, index): (u64, u64),
        instance: Option<u64>,
        at_us: f64,
        item: &Item,
    ) -> Result<()> {
        if !self.json {
            return match item {
                Item::Data(data) => self.line(&data.to_string()),
                Item::Note(note) => self.line(&serde_json::to_string(note)?),
                Item::Error(error) => self.line(&format!("error item: {error}")),
            };
        }
        let mut line = json!({
            "type": "item",
            "call": call,
            "index": index,
            "at_us": at_us,
            "instance": instance.map(instance_hex),
        });
        match item {
            Item::Data(data) => line["data"] = data.clone(),
            Item::Note(note) => {
                line["type"] = "note".into();
                line["event"] = json!(note.event);
                line["comment"] = json!(note.comment);
            }
            Item::Error(error) => {
                line["type"] = "error".into();
                line["error"] = json!({
                    "class": error.class().name(),
                    "reason": error.reason().name(),
                    "text": error.text(),
                });
            }
        }
        self.line(&line.to_string())
    }

    pub(super) fn end(&mut self, running: &Running, ended: &Ended<'_>) -> Result<()> {
        if self.json {
            let line = json!({
                "type": "end",
                "call": ended.call,
                "instance": ended.instance.map(instance_hex),
                "outcome": ended.outcome.word(),
                "error": ended.error,
                "items": running.items,
                "ack_us": ended.ack_us,
                "first_us": running.first_us,
                "last_us": running.last_us,
                "end_us": ended.end_us,
            });
            return self.line(&line.to_string());
        }
        let mut text = format!("{}: {} items", ended.outcome.word(), running.items);
        if let Some(instance) = ended.instance {
            text += &format!(" from {instance:x}");
        }
        if let (Some(first), Some(last)) = (running.first_us, running.last_us) {
            let (first, last) = (milliseconds(first), milliseconds(last));
            text += &format!(", first after {first}, last after {last}");
        }
        text += &format!(", end after {}", milliseconds(ended.end_us));
        if let Some(error) = ended.error {
            text += &format!("; {error}");
        }
        self.line(&text)
    }

    pub(super) fn summary(&mut self, summary: &Value) -> Result<()> {
        if self.json {
            return self.line(&summary.to_string());
        }
        let number = |name: &str| summary[name].as_u64().unwrap_or(0);
        let (ok, stopped, failed) = (number("ok"), number("stopped"), number("failed"));
        let rate = summary["calls_per_second"].as_f64().unwrap_or(0.0);
        self.line(&format!(
            "{ok} ok, {stopped} stopped, {failed} failed, {} items, {rate:.0} calls/s",
            number("items")
        ))?;
        for (name, what) in [("first_us", "first item"), ("end_us", "whole call")] {
            let us = |quantile: &str| milliseconds(summary[name][quantile].as_f64().unwrap_or(0.0));
            if !summary[name].is_null() {
                let [p50, p90, p99, max] = ["p50", "p90", "p99", "max"].map(us);
                self.line(&format!(
                    "{what}: p50 {p50}, p90 {p90}, p99 {p99}, max {max}"
                ))?;
            }
        }
        let errors = summary["errors"].as_object();
        for (text, count) in errors.into_iter().flatten() {
            self.line(&format!("{count} x {text}"))?;
        }
        Ok(())
    }
}

fn milliseconds(us: f64) -> String {
    format!("{:.3} ms", us / 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(json: &str) -> String {
        match Item::read(json.as_bytes(), PayloadCodec::Json) {
            Item::Data(data) => format!("data {data}"),
            Item::Note(note) => format!("note {:?}", note.event),
            Item::Error(error) => format!("error {error}"),
        }
    }

    #[test]
    fn annotated_items_are_unwrapped_and_others_shown_whole() {
        for (json, want) in [
            (r#"{"data":{"i":1}}"#, r#"data {"i":1}"#),
            (r#"{"data":1,"id":"7"}"#, "data 1"),
            (
                r#"{"event":"token_ids","comment":["[1]"]}"#,
                r#"note Some("token_ids")"#,
            ),
            (r#"{"event":"error","comment":["a"]}"#, "error Internal: a"),
            (r#"{"text":"x","data":1}"#, r#"data {"data":1,"text":"x"}"#),
            ("[1]", "data [1]"),
            (r#"{"id":5}"#, r#"data {"id":5}"#),
        ] {
            assert_eq!(shown(json), want);
        }
        assert!(shown("{").starts_with("error Internal: the item cannot be shown"));
    }
}
