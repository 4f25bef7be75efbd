//! `corelane events tail` and `corelane events publish`, over NATS.

use anyhow::{Context, Result};
use corelane_codec::event::typed::{self, from_payload};
use corelane_codec::event::{Envelope, KvMetrics, Scope, parse_subject, topic};
use futures_util::StreamExt;
use serde_json::{Value, json};

use super::serve::on_this_thread;
use crate::cli::{self, Exit};
use crate::discovery::{Discovery, MemoryDiscovery, MemoryStore};
use crate::events::Events;
use crate::nats::{Nats, NatsOptions};
use crate::supervise::Signals;

/// What `corelane events tail` shows.
#[derive(Clone, Debug, PartialEq)]
pub struct TailArgs {
    /// One topic, or all.
    pub topic: Option<String>,
    /// One scope, or all.
    pub scope: Option<Scope>,
    /// Ends after so many.
    pub count: Option<u64>,
    /// The server.
    pub nats: NatsOptions,
}

/// What `corelane events publish` sends.
#[derive(Clone, Debug, PartialEq)]
pub struct PublishArgs {
    /// The scope.
    pub scope: Scope,
    /// The topic.
    pub topic: String,
    /// The payload.
    pub body: Value,
    /// How often.
    pub count: u64,
    /// The server.
    pub nats: NatsOptions,
}

/// Prints events until a signal, or until there were enough.
///
/// # Errors
/// No contact with the server, or standard output cannot be written.
pub fn tail(args: TailArgs) -> Result<Exit> {
    on_this_thread(async move {
        let mut signals = Signals::catch().context("cannot catch signals")?;
        let nats = tokio::select! {
            nats = Nats::connect(&args.nats) => nats?,
            _ = signals.next() => return Ok(Exit::Done),
        };
        // Topic and scope are at both ends of a subject, so one of them is looked at here.
        let subject = args.scope.as_ref().map(Scope::subject_prefix);
        let subject = subject.map_or("namespace.>".to_owned(), |prefix| format!("{prefix}.*"));
        let mut messages = nats.client().subscribe(subject.clone()).await?;
        nats.client().flush().await?;
        tracing::info!(subject, "waiting for events");
        let mut left = args.count.unwrap_or(u64::MAX);
        while left > 0 {
            let message = tokio::select! {
                message = messages.next() => message,
                _ = signals.next() => None,
            };
            let Some(message) = message else { break };
            if let Some(line) = line(&message.subject, &message.payload, args.topic.as_deref()) {
                cli::print(&format!("{line}\n"))?;
                left -= 1;
            }
        }
        nats.close().await;
        Ok(Exit::Done)
    })
}

/// Publishes events.
///
/// # Errors
/// No contact with the server, or it does not take them.
pub fn publish(args: PublishArgs) -> Result<Exit> {
    on_this_thread(async move {
        let nats = Nats::connect(&args.nats).await?;
        let discovery = Discovery::Memory(MemoryDiscovery::new(&MemoryStore::default()));
        let events = Events::nats(&discovery, &nats);
        let publisher = events.publisher(&args.scope, &args.topic).await?;
        for _ in 0..args.count {
            publisher.publish(&args.body).await?;
        }
        publisher.flush().await?;
        let done = json!({"publisher_id": publisher.id(), "published": publisher.published()});
        cli::print(&format!("{done}\n"))?;
        nats.close().await;
        Ok(Exit::Done)
    })
}

/// A message as a line; `None` if it is of another topic than the one wanted.
fn line(subject: &str, message: &[u8], wanted: Option<&str>) -> Option<Value> {
    let said = parse_subject(subject);
    let of_subject = said.as_ref().map(|(_, topic)| topic.as_str());
    if wanted.is_some_and(|wanted| of_subject != Some(wanted)) {
        return None;
    }
    Some(match Envelope::decode(message) {
        Ok(envelope) => json!({
            "scope": said.map_or_else(|| subject.to_owned(), |(scope, _)| scope.to_string()),
            "topic": envelope.topic,
            "publisher_id": envelope.publisher_id,
            "sequence": envelope.sequence,
            "published_at_ms": envelope.published_at_ms,
            "payload": shown(envelope.topic, envelope.payload),
        }),
        Err(error) => json!({"subject": subject, "error": error.to_string()}),
    })
}

/// A payload as JSON.
fn shown(of: &str, payload: &[u8]) -> Value {
    let known = match of {
        topic::KV_EVENTS => value_of::<Vec<typed::KvEvent>>(payload),
        topic::KV_METRICS => value_of::<KvMetrics>(payload),
        topic::FORWARD_PASS_METRICS => value_of::<typed::ForwardPass>(payload),
        topic::ACTIVE_SEQUENCES => value_of::<typed::SequenceEvent>(payload),
        _ => None,
    };
    let any = || from_payload::<Value>(payload).ok();
    known.or_else(any).unwrap_or_else(|| {
        let hex: String = payload.iter().map(|byte| format!("{byte:02x}")).collect();
        json!({ "hex": hex })
    })
}

fn value_of<T: serde::de::DeserializeOwned + serde::Serialize>(payload: &[u8]) -> Option<Value> {
    serde_json::to_value(from_payload::<T>(payload).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(topic: &str, payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        let envelope = Envelope {
            publisher_id: 1,
            sequence: 2,
            published_at_ms: 3,
            topic,
            payload,
        };
        envelope.write(&mut out).unwrap();
        out
    }

    #[test]
    fn lines_show_what_an_event_says() {
        let metrics = typed::to_payload(&KvMetrics {
            worker_id: 7,
            ..KvMetrics::default()
        });
        let bytes = message(topic::KV_METRICS, &metrics.unwrap());
        let subject = Scope::endpoint("demo", "backend", "generate").subject(topic::KV_METRICS);
        let shown = line(&subject, &bytes, Some(topic::KV_METRICS)).unwrap();
        assert_eq!(shown["payload"]["worker_id"], 7);
        assert_eq!(
            (&shown["scope"], &shown["sequence"]),
            (&json!("demo/backend/generate"), &json!(2))
        );
        assert_eq!(line(&subject, &bytes, Some("other")), None);
    }

    #[test]
    fn what_is_not_known_is_shown_all_the_same() {
        let subject = "namespace.demo.odd%2Etopic";
        let any = line(subject, &message("odd.topic", b"\x81\xa1a\x01"), None).unwrap();
        assert_eq!(any["payload"], json!({"a": 1}));
        let raw = line(subject, &message("odd.topic", b"\xc1"), None).unwrap();
        assert_eq!(raw["payload"], json!({"hex": "c1"}));
        let none = line(subject, b"not an event", None).unwrap();
        assert!(none["error"].is_string());
    }
}
