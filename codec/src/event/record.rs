//! What discovery stores about events: channels and sources (spec/events-discovery.md §4.2, §4.5).
//!
//! A *channel* says how to reach a publisher, or a broker. A *source* says which worker the KV
//! events of a publisher are about; a KV router uses no events without one (§3.9).

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::scope::{Scope, decode_segment, encode_segment};
use crate::discovery::InstanceRecord;
use crate::path::{EndpointId, parse_instance_hex};

/// Where channel records live.
pub const CHANNELS_BUCKET: &str = "v1/event_channels";
/// Where source records live.
pub const SOURCES_BUCKET: &str = "v1/event_sources";

/// `{bucket}/{scope}/topic/{topic}/{publisher hex}`, names and topic percent-encoded.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct EventKey {
    /// Whose events.
    pub scope: Scope,
    /// Which ones.
    pub topic: String,
    /// By whom.
    pub publisher_id: u64,
}

impl EventKey {
    /// The key in a bucket: [`CHANNELS_BUCKET`] or [`SOURCES_BUCKET`].
    #[must_use]
    pub fn in_bucket(&self, bucket: &str) -> String {
        let prefix = Self::prefix(bucket, &self.scope, &self.topic);
        format!("{prefix}{:x}", self.publisher_id)
    }

    /// What the keys of all publishers of a topic begin with, closing slash included.
    #[must_use]
    pub fn prefix(bucket: &str, scope: &Scope, topic: &str) -> String {
        let topic = encode_segment(topic);
        format!("{bucket}/{}/topic/{topic}/", scope.path_prefix())
    }

    /// Reads a key of a bucket.
    #[must_use]
    pub fn parse(bucket: &str, key: &str) -> Option<Self> {
        let rest = key.strip_prefix(bucket)?.strip_prefix('/')?;
        let segments: Vec<&str> = rest.splitn(10, '/').collect();
        let [scope @ .., "topic", topic, publisher] = segments.as_slice() else {
            return None;
        };
        Some(Self {
            scope: Scope::from_segments(scope)?,
            topic: decode_segment(topic)?.into_owned(),
            publisher_id: parse_instance_hex(publisher)?,
        })
    }
}

/// The `type` of a channel record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum ChannelTag {
    EventChannel,
}

/// The `type` of a source record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum SourceTag {
    EventSource,
}

/// How events reach their subscribers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", content = "config")]
pub enum EventTransport {
    /// By a NATS server.
    Nats(NatsChannel),
    /// From the publisher's own socket.
    Zmq(ZmqChannel),
    /// Through a broker.
    ZmqBroker(ZmqBrokerChannel),
}

/// Events on NATS.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NatsChannel {
    /// What comes before the topic in their subject.
    pub subject_prefix: String,
}

/// A publisher's own socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ZmqChannel {
    /// `tcp://IP:PORT`.
    pub endpoint: String,
}

/// A broker's sockets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ZmqBrokerChannel {
    /// Where publishers connect.
    pub xsub_endpoints: Vec<String>,
    /// Where subscribers connect.
    pub xpub_endpoints: Vec<String>,
}

/// A publisher, and how to reach it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventChannelRecord {
    #[serde(rename = "type")]
    tag: ChannelTag,
    /// Whose events.
    pub scope: Scope,
    /// Which ones.
    pub topic: String,
    /// The publisher's id; no instance, in spite of its name.
    pub instance_id: u64,
    /// How to reach it.
    pub transport: EventTransport,
}

impl EventChannelRecord {
    /// A record.
    #[must_use]
    pub fn new(key: &EventKey, transport: EventTransport) -> Self {
        Self {
            tag: ChannelTag::EventChannel,
            scope: key.scope.clone(),
            topic: key.topic.clone(),
            instance_id: key.publisher_id,
            transport,
        }
    }

    /// The key that it is stored under, in [`CHANNELS_BUCKET`].
    #[must_use]
    pub fn key(&self) -> EventKey {
        EventKey {
            scope: self.scope.clone(),
            topic: self.topic.clone(),
            publisher_id: self.instance_id,
        }
    }
}

/// A publisher of state about a worker.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct EventSourceRecord {
    #[serde(rename = "type")]
    tag: SourceTag,
    /// Whose events.
    pub scope: Scope,
    /// Which ones.
    pub topic: String,
    /// By whom.
    pub publisher_id: u64,
    /// Opaque JSON; of KV publishers a [`SourceMetadata`].
    pub metadata: Box<RawValue>,
}

/// What KV publishers say about themselves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceMetadata {
    /// The endpoint whose state it is.
    pub kv_state_endpoint: EndpointId,
    /// The worker whose state it is.
    pub worker: KvWorker,
    /// The publisher.
    pub publisher_id: u64,
    /// Where it is asked for what it has published ([`super::KvQuery`]), if it keeps that: the
    /// instance of an endpoint that answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recovery_target: Option<InstanceRecord>,
}

/// A rank of a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct KvWorker {
    /// The instance.
    pub worker_id: u64,
    /// The rank within it.
    #[serde(default)]
    pub dp_rank: u32,
}

impl EventSourceRecord {
    /// The record of a KV publisher.
    ///
    /// # Errors
    /// Never for names that are text; JSON says so by a result.
    pub fn new(key: &EventKey, metadata: &SourceMetadata) -> Result<Self, serde_json::Error> {
        Ok(Self {
            tag: SourceTag::EventSource,
            scope: key.scope.clone(),
            topic: key.topic.clone(),
            publisher_id: key.publisher_id,
            metadata: serde_json::value::to_raw_value(metadata)?,
        })
    }

    /// What a KV publisher says about itself.
    ///
    /// # Errors
    /// The metadata are of another shape.
    pub fn kv(&self) -> Result<SourceMetadata, serde_json::Error> {
        serde_json::from_str(self.metadata.get())
    }

    /// The key that it is stored under, in [`SOURCES_BUCKET`].
    #[must_use]
    pub fn key(&self) -> EventKey {
        EventKey {
            scope: self.scope.clone(),
            topic: self.topic.clone(),
            publisher_id: self.publisher_id,
        }
    }
}

impl fmt::Display for EventKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} {} of {:x}",
            self.scope, self.topic, self.publisher_id
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::discovery::Transport;

    #[test]
    fn keys_of_all_scopes() {
        for (scope, path) in [
            (Scope::namespace("probe"), "namespace/probe"),
            (
                Scope::component("probe", "back:end"),
                "namespace/probe/component/back%3Aend",
            ),
            (
                Scope::endpoint("probe", "worker", "a/b"),
                "namespace/probe/component/worker/endpoint/a%2Fb",
            ),
        ] {
            let key = EventKey {
                scope,
                topic: "odd.topic".into(),
                publisher_id: 0xb0b,
            };
            let text = key.in_bucket(CHANNELS_BUCKET);
            let want = format!("v1/event_channels/{path}/topic/odd%2Etopic/b0b");
            assert_eq!(text, want);
            assert_eq!(EventKey::parse(CHANNELS_BUCKET, &text), Some(key));
            assert_eq!(EventKey::parse(SOURCES_BUCKET, &text), None);
        }
        for wrong in [
            "v1/event_channels/namespace/a/topic/t",
            "v1/event_channels/namespace/a/topic/t/xyz",
            "v1/event_channels/namespace/a/subject/t/1",
            "v1/event_channels/namespace/a/b/topic/t/1",
            "v1/event_channels/topic/t/1",
            "v1/event_channels",
        ] {
            assert_eq!(EventKey::parse(CHANNELS_BUCKET, wrong), None, "{wrong}");
        }
    }

    /// As a stock worker writes it that keeps an index of its own.
    #[test]
    fn a_source_says_where_it_is_asked() {
        let text = concat!(
            r#"{"type":"EventSource","scope":{"kind":"endpoint","endpoint":{"namespace":"n","#,
            r#""component":"c","name":"e"}},"topic":"kv-events","publisher_id":171,"metadata":"#,
            r#"{"kv_state_endpoint":{"namespace":"n","component":"c","name":"e"},"#,
            r#""worker":{"worker_id":7,"dp_rank":0},"publisher_id":171,"recovery_target":"#,
            r#"{"component":"c","endpoint":"worker_kv_query_source_ab","namespace":"n","#,
            r#""instance_id":7,"transport":{"tcp":"127.0.0.1:5/7/n/c/worker_kv_query_source_ab"},"#,
            r#""device_type":"cuda","request_plane_codec":"msgpack"}}}"#
        );
        let record: EventSourceRecord = serde_json::from_str(text).unwrap();
        let kv = record.kv().unwrap();
        let target = kv.recovery_target.as_ref().unwrap();
        assert_eq!((target.instance_id, &*target.namespace), (7, "n"));
        assert!(matches!(&target.transport, Transport::Tcp(text) if text.starts_with("127")));
        let again = EventSourceRecord::new(&record.key(), &kv).unwrap();
        assert_eq!(serde_json::to_string(&again).unwrap(), text);
    }

    #[test]
    fn unknown_transports_make_a_record_unreadable() {
        let text = concat!(
            r#"{"type":"EventChannel","scope":{"kind":"namespace","name":"n"},"topic":"t","#,
            r#""instance_id":1,"transport":{"kind":"Zmq","config":{"endpoint":"tcp://h:1"}}}"#
        );
        assert!(serde_json::from_str::<EventChannelRecord>(text).is_ok());
        for (from, to) in [
            ("\"Zmq\"", "\"Kafka\""),
            ("EventChannel", "EventSource"),
            ("endpoint", "address"),
            ("\"namespace\"", "\"cluster\""),
        ] {
            assert!(text.contains(from));
            let other = text.replacen(from, to, 1);
            assert!(serde_json::from_str::<EventChannelRecord>(&other).is_err());
        }
    }
}
