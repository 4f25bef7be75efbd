//! `corelane events tail` and `corelane events publish`, over ZMQ and over NATS.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use corelane_codec::event::typed::{self, from_payload};
use corelane_codec::event::{Envelope, KvMetrics, Scope, parse_subject, topic};
use corelane_codec::path::EndpointId;
use serde_json::{Value, json};
use tokio::time::sleep;

use super::serve::on_this_thread;
use crate::cli::{self, Exit, Stop};
use crate::config;
use crate::discovery::{self, Discovery, MemoryDiscovery, MemoryStore};
use crate::env::Env;
use crate::events::{BrokerUrl, CurveOptions, Events, EventsError, Via, ZmqOptions};
use crate::nats::{Nats, NatsOptions};
use crate::preflight;
use crate::signals::Signals;

/// What events go over.
#[derive(Clone, Debug)]
pub enum Transport {
    /// This NATS server.
    Nats(NatsOptions),
    /// ZMQ.
    Zmq {
        /// Through these brokers, else as the environment says.
        broker: Option<BrokerUrl>,
        /// Where publishers and brokers are found.
        discovery: config::Discovery,
        /// With which keys.
        curve: CurveOptions,
        /// What says how.
        env: Env,
    },
}

/// What `corelane events tail` shows.
#[derive(Clone, Debug)]
pub struct TailArgs {
    /// One topic, or all.
    pub topic: Option<String>,
    /// One scope, or all.
    pub scope: Option<Scope>,
    /// Ends after so many.
    pub count: Option<u64>,
    /// Where.
    pub transport: Transport,
}

/// What `corelane events keys` writes.
#[derive(Clone, Debug)]
pub struct KeysArgs {
    /// The new file of the secret key.
    pub out: PathBuf,
}

/// What `corelane events publish` sends.
#[derive(Clone, Debug)]
pub struct PublishArgs {
    /// The scope.
    pub scope: Scope,
    /// The topic.
    pub topic: String,
    /// The payload.
    pub body: Value,
    /// How often.
    pub count: u64,
    /// The pause after each.
    pub interval: Duration,
    /// How long the first subscriber is waited for, over ZMQ.
    pub wait: Duration,
    /// The instance of an endpoint, and its rank, that the events are about.
    pub worker: Option<(EndpointId, u64, u32)>,
    /// Where.
    pub transport: Transport,
}

/// The event plane of a command.
struct Plane {
    events: Events,
    discovery: Discovery,
    /// What is registered there is seen by others.
    is_found: bool,
    nats: Option<Nats>,
}

impl Plane {
    async fn open(transport: Transport) -> Result<Plane> {
        match transport {
            Transport::Nats(options) => {
                let nats = Nats::connect(&options).await?;
                let discovery = Discovery::Memory(MemoryDiscovery::new(&MemoryStore::default()));
                Ok(Plane {
                    events: Events::nats(&discovery, &nats),
                    discovery,
                    is_found: false,
                    nats: Some(nats),
                })
            }
            Transport::Zmq {
                broker,
                discovery,
                curve,
                env,
            } => {
                let ring = preflight::ring(&env)?;
                let usage = |error: EventsError| Stop::Usage(error.to_string());
                let mut options = ZmqOptions::read_with(&env, ring, &curve).map_err(usage)?;
                if let Some(url) = broker {
                    options.via = Via::Url(url);
                }
                let is_found = !matches!(options.via, Via::Url(_));
                let discovery = match options.via {
                    // Nobody has to be found.
                    Via::Url(_) => Discovery::Memory(MemoryDiscovery::new(&MemoryStore::default())),
                    Via::Direct | Via::Discovered => {
                        discovery::open(&discovery, &MemoryStore::default(), None).await?
                    }
                };
                Ok(Plane {
                    events: Events::zmq(&discovery, options),
                    discovery,
                    is_found,
                    nats: None,
                })
            }
        }
    }

    async fn close(self) {
        self.discovery.close().await;
        self.events.close().await;
        if let Some(nats) = self.nats {
            nats.close().await;
        }
    }
}

/// Writes a new secret key, and prints its public key.
///
/// # Errors
/// The file is there already or cannot be written, or this program has no CURVE.
#[cfg(feature = "curve")]
pub fn keys(args: &KeysArgs) -> Result<Exit> {
    let public = crate::events::new_secret_key(&args.out);
    let public = public.with_context(|| {
        let path = args.out.display();
        format!("cannot write a secret key to {path}; name a file that is not there yet")
    })?;
    cli::print(&format!("{public}\n"))?;
    Ok(Exit::Done)
}

/// Says that this program has no CURVE.
///
/// # Errors
/// Always.
#[cfg(not(feature = "curve"))]
pub fn keys(_: &KeysArgs) -> Result<Exit> {
    let why = "this program was built without its feature curve; build it with --features curve";
    Err(Stop::Usage(why.to_owned()).into())
}

/// Prints events until a signal, or until there were enough.
///
/// # Errors
/// No contact with the server or the store, or standard output cannot be written.
pub fn tail(args: TailArgs) -> Result<Exit> {
    on_this_thread(async move {
        let mut signals = Signals::catch().context("cannot catch signals")?;
        let plane = tokio::select! {
            plane = Plane::open(args.transport) => plane?,
            _ = signals.next() => return Ok(Exit::Done),
        };
        let topic = args.topic.as_deref();
        let mut tap = plane.events.tap(args.scope.as_ref(), topic).await?;
        tracing::info!("waiting for events");
        let mut left = args.count.unwrap_or(u64::MAX);
        while left > 0 {
            let tapped = tokio::select! {
                tapped = tap.next() => tapped,
                _ = signals.next() => None,
            };
            let Some(tapped) = tapped else { break };
            let line = line(&tapped.subject, &tapped.envelope);
            cli::print(&format!("{line}\n"))?;
            left -= 1;
        }
        if tap.dropped() > 0 {
            let events = tap.dropped();
            tracing::warn!(
                events,
                "not shown: they came faster than they could be printed"
            );
        }
        drop(tap);
        plane.close().await;
        Ok(Exit::Done)
    })
}

/// Publishes events.
///
/// # Errors
/// No contact with the server or the store, or it does not take them.
pub fn publish(args: PublishArgs) -> Result<Exit> {
    on_this_thread(async move {
        let mut signals = Signals::catch().context("cannot catch signals")?;
        let plane = tokio::select! {
            plane = Plane::open(args.transport) => plane?,
            _ = signals.next() => return Ok(Exit::Done),
        };
        let publisher = plane.events.publisher(&args.scope, &args.topic).await?;
        if let Some((endpoint, worker_id, dp_rank)) = &args.worker {
            if !plane.is_found {
                let why = "--worker-id needs discovery, which is not used over NATS, nor with the \
                           URL of a broker";
                return Err(Stop::Usage(why.to_owned()).into());
            }
            let worker = (Some(*worker_id), *dp_rank);
            let said = publisher.is_source_with(&plane.discovery, endpoint, worker, None);
            said.await?;
        }
        let publish = async {
            if !publisher.is_wanted(args.wait).await? {
                tracing::warn!(waited = ?args.wait, "no subscriber: what is published is lost");
            }
            for _ in 0..args.count {
                publisher.publish(&args.body).await?;
                if !args.interval.is_zero() {
                    sleep(args.interval).await;
                }
            }
            publisher.flush().await
        };
        tokio::select! {
            published = publish => published?,
            _ = signals.next() => {}
        }
        let done = json!({"publisher_id": publisher.id(), "published": publisher.published()});
        cli::print(&format!("{done}\n"))?;
        drop(publisher);
        plane.close().await;
        Ok(Exit::Done)
    })
}

/// A message as a line.
fn line(subject: &str, message: &[u8]) -> Value {
    let said = parse_subject(subject);
    match Envelope::decode(message) {
        Ok(envelope) => json!({
            "scope": said.map_or_else(|| subject.to_owned(), |(scope, _)| scope.to_string()),
            "topic": envelope.topic,
            "publisher_id": envelope.publisher_id,
            "sequence": envelope.sequence,
            "published_at_ms": envelope.published_at_ms,
            "payload": shown(envelope.topic, envelope.payload),
        }),
        Err(error) => json!({"subject": subject, "error": error.to_string()}),
    }
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
        let shown = line(&subject, &bytes);
        assert_eq!(shown["payload"]["worker_id"], 7);
        assert_eq!(
            (&shown["scope"], &shown["sequence"]),
            (&json!("demo/backend/generate"), &json!(2))
        );
    }

    #[test]
    fn what_is_not_known_is_shown_all_the_same() {
        let subject = "namespace.demo.odd%2Etopic";
        let any = line(subject, &message("odd.topic", b"\x81\xa1a\x01"));
        assert_eq!(any["payload"], json!({"a": 1}));
        let raw = line(subject, &message("odd.topic", b"\xc1"));
        assert_eq!(raw["payload"], json!({"hex": "c1"}));
        let none = line(subject, b"not an event");
        assert!(none["error"].is_string());
    }
}
