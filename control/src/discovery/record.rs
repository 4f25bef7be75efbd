//! Discovery records: how an endpoint instance and a model card are named, written and read
//! (`spec/events-discovery.md` §4.2 to §4.4).
//!
//! ```text
//! v1/instances/{namespace}/{component}/{endpoint}/{id hex}            -> InstanceRecord
//! v1/mdc/{namespace}/{component}/{endpoint}/{id hex}[/{suffix}]       -> CardRecord
//! ```
//! Readers accept unknown fields; writers keep the field order of the specification.

use std::fmt;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use thiserror::Error;

/// Bucket of endpoint instances.
pub const INSTANCES: &str = "v1/instances";
/// Bucket of model cards.
pub const CARDS: &str = "v1/mdc";

/// Why a stored value is not a record that we can use.
#[derive(Debug, Error)]
pub enum RecordError {
    /// The value is not the JSON object that its bucket asks for.
    #[error("not a {kind} record: {cause}")]
    Json {
        /// `Endpoint` or `Model`.
        kind: &'static str,
        /// What the JSON reader found wrong, with line and column.
        cause: serde_json::Error,
    },
    /// The `type` tag names another kind.
    #[error("type is {found:?}, expected {expected:?}")]
    Kind {
        /// The tag in the value.
        found: String,
        /// The tag of this bucket.
        expected: &'static str,
    },
}

/// Namespace, component and endpoint: what instances are grouped by.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EndpointName {
    /// First level; may contain dots (nested namespaces).
    pub namespace: String,
    /// Second level.
    pub component: String,
    /// Third level.
    pub endpoint: String,
}

impl EndpointName {
    /// Puts the three names together; nothing is checked, any text can be met in a store.
    pub fn new(namespace: &str, component: &str, endpoint: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            component: component.to_owned(),
            endpoint: endpoint.to_owned(),
        }
    }

    /// The key prefix of this endpoint in `bucket`, with the closing slash.
    pub fn prefix(&self, bucket: &str) -> String {
        format!("{bucket}/{self}/")
    }

    /// The key of instance `id` of this endpoint in `bucket`.
    pub fn key(&self, bucket: &str, id: u64) -> String {
        format!("{bucket}/{self}/{id:x}")
    }

    /// The path that requests to instance `id` carry: `{id hex}/{ns}/{comp}/{ep}`, where `%` and
    /// `/` inside a name are escaped (§2.5).
    pub fn request_path(&self, id: u64) -> String {
        let escaped = |name: &str| name.replace('%', "%25").replace('/', "%2F");
        format!(
            "{id:x}/{}/{}/{}",
            escaped(&self.namespace),
            escaped(&self.component),
            escaped(&self.endpoint)
        )
    }
}

impl fmt::Display for EndpointName {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            namespace,
            component,
            endpoint,
        } = self;
        write!(out, "{namespace}/{component}/{endpoint}")
    }
}

/// How a request payload is written; an absent field in a record means JSON (§4.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PayloadCodec {
    /// UTF-8 JSON.
    #[default]
    Json,
    /// MessagePack.
    Msgpack,
}

/// What an instance computes on; read by device-aware routing only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceType {
    /// No GPU.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

/// Where an instance takes requests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transport {
    /// `[tcp://]{ip}:{port}/{path}`.
    Tcp(String),
    /// A NATS subject.
    NatsTcp(String),
}

/// One endpoint instance, the value of a key in [`INSTANCES`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstanceRecord {
    /// Whose instance it is.
    pub name: EndpointName,
    /// The id that clients use, whatever the key says.
    pub instance_id: u64,
    /// Where it takes requests.
    pub transport: Transport,
    /// What it computes on, if it says so.
    pub device_type: Option<DeviceType>,
    /// The payload codec that it asks for, if it says so.
    pub codec: Option<PayloadCodec>,
}

/// The JSON form of [`InstanceRecord`]; the order of the fields is the order on the wire.
#[derive(Serialize, Deserialize)]
struct InstanceJson {
    r#type: String,
    component: String,
    endpoint: String,
    namespace: String,
    instance_id: u64,
    transport: Transport,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    device_type: Option<DeviceType>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    request_plane_codec: Option<PayloadCodec>,
}

impl InstanceRecord {
    /// A record of ours: TCP, with the standard request path.
    pub fn tcp(name: EndpointName, id: u64, address: SocketAddr, codec: PayloadCodec) -> Self {
        let transport = Transport::Tcp(format!("{address}/{}", name.request_path(id)));
        Self {
            name,
            instance_id: id,
            transport,
            device_type: None,
            codec: Some(codec),
        }
    }

    /// Reads a stored value.
    ///
    /// # Errors
    /// When it is not JSON of this shape: missing fields, an unknown transport, another `type`.
    pub fn parse(value: &[u8]) -> Result<Self, RecordError> {
        let json: InstanceJson =
            serde_json::from_slice(value).map_err(|cause| RecordError::Json {
                kind: "Endpoint",
                cause,
            })?;
        expect_kind(json.r#type, "Endpoint")?;
        Ok(Self {
            name: EndpointName {
                namespace: json.namespace,
                component: json.component,
                endpoint: json.endpoint,
            },
            instance_id: json.instance_id,
            transport: json.transport,
            device_type: json.device_type,
            codec: json.request_plane_codec,
        })
    }

    /// The compact JSON that is stored.
    pub fn to_json(&self) -> Vec<u8> {
        to_compact_json(&InstanceJson {
            r#type: "Endpoint".to_owned(),
            component: self.name.component.clone(),
            endpoint: self.name.endpoint.clone(),
            namespace: self.name.namespace.clone(),
            instance_id: self.instance_id,
            transport: self.transport.clone(),
            device_type: self.device_type,
            request_plane_codec: self.codec,
        })
    }
}

/// One model card, the value of a key in [`CARDS`].
#[derive(Clone, Debug)]
pub struct CardRecord {
    /// Whose card it is.
    pub name: EndpointName,
    /// The instance that serves the model.
    pub instance_id: u64,
    /// The card itself, byte for byte as it was stored.
    pub card: Box<RawValue>,
    /// Names an adapter (LoRA); none for a base model.
    pub suffix: Option<String>,
}

/// The JSON form of [`CardRecord`]; the order of the fields is the order on the wire.
#[derive(Serialize, Deserialize)]
struct CardJson {
    r#type: String,
    namespace: String,
    component: String,
    endpoint: String,
    instance_id: u64,
    card_json: Box<RawValue>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    model_suffix: Option<String>,
}

impl CardRecord {
    /// Reads a stored value; the card's own content is not looked at.
    ///
    /// # Errors
    /// When it is not JSON of this shape.
    pub fn parse(value: &[u8]) -> Result<Self, RecordError> {
        let json: CardJson = serde_json::from_slice(value).map_err(|cause| RecordError::Json {
            kind: "Model",
            cause,
        })?;
        expect_kind(json.r#type, "Model")?;
        Ok(Self {
            name: EndpointName {
                namespace: json.namespace,
                component: json.component,
                endpoint: json.endpoint,
            },
            instance_id: json.instance_id,
            card: json.card_json,
            suffix: json.model_suffix.filter(|suffix| !suffix.is_empty()),
        })
    }

    /// The compact JSON that is stored.
    pub fn to_json(&self) -> Vec<u8> {
        to_compact_json(&CardJson {
            r#type: "Model".to_owned(),
            namespace: self.name.namespace.clone(),
            component: self.name.component.clone(),
            endpoint: self.name.endpoint.clone(),
            instance_id: self.instance_id,
            card_json: self.card.clone(),
            model_suffix: self.suffix.clone(),
        })
    }

    /// The key of this card.
    pub fn key(&self) -> String {
        let base = self.name.key(CARDS, self.instance_id);
        match &self.suffix {
            Some(suffix) => format!("{base}/{suffix}"),
            None => base,
        }
    }
}

fn expect_kind(found: String, expected: &'static str) -> Result<(), RecordError> {
    if found == expected {
        Ok(())
    } else {
        Err(RecordError::Kind { found, expected })
    }
}

/// Structs of strings and numbers always have a JSON form, so that the error branch is dead; it
/// yields an empty value, which every reader skips, instead of a panic.
fn to_compact_json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    // Values of real processes: `dumps/etcd-worker-tcp.json`, `etcd-worker-nats-request-plane.json`.
    const TCP: &str = r#"{"type":"Endpoint","component":"backend","endpoint":"generate","namespace":"demo","instance_id":9041998796069239308,"transport":{"tcp":"127.0.0.1:35923/7d7ba1ff9b377a0c/demo/backend/generate"},"device_type":"cuda","request_plane_codec":"msgpack"}"#;
    const NATS: &str = r#"{"type":"Endpoint","component":"backend","endpoint":"generate","namespace":"demo","instance_id":9041998796069239465,"transport":{"nats_tcp":"demo_backend.generate-7d7ba1ff9b377aa9"},"device_type":"cuda","request_plane_codec":"msgpack"}"#;

    #[test]
    fn instance_records_come_back_byte_for_byte() {
        for text in [TCP, NATS] {
            let record = InstanceRecord::parse(text.as_bytes()).unwrap();
            assert_eq!(String::from_utf8(record.to_json()).unwrap(), text);
        }
    }

    #[test]
    fn our_own_record_has_the_standard_path() {
        let name = EndpointName::new("demo", "backend", "chat/x");
        let address = "127.0.0.1:80".parse().unwrap();
        let record = InstanceRecord::tcp(name.clone(), 0xab, address, PayloadCodec::Msgpack);
        let path = "127.0.0.1:80/ab/demo/backend/chat%2Fx".to_owned();
        assert_eq!(record.transport, Transport::Tcp(path));
        assert_eq!(
            name.key(INSTANCES, 0xab),
            "v1/instances/demo/backend/chat/x/ab"
        );
    }

    #[test]
    fn tolerance_is_that_of_real_readers() {
        let minimal = r#"{"type":"Endpoint","component":"b","endpoint":"g","namespace":"d","instance_id":161,"transport":{"tcp":"127.0.0.1:1/x"},"new":1}"#;
        let record = InstanceRecord::parse(minimal.as_bytes()).unwrap();
        assert_eq!((record.codec, record.device_type), (None, None));
        for bad in [
            TCP.replace("\"tcp\"", "\"http\""),
            TCP.replace("\"cuda\"", "\"tpu\""),
            TCP.replace("Endpoint", "Model"),
            TCP.replace("\"type\":\"Endpoint\",", ""),
            "not json".to_owned(),
        ] {
            assert!(InstanceRecord::parse(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn card_content_is_untouched() {
        let text = r#"{"type":"Model","namespace":"d","component":"b","endpoint":"g","instance_id":7,"card_json":{"z":1.50, "a":[ ]},"model_suffix":"lora-1"}"#;
        let record = CardRecord::parse(text.as_bytes()).unwrap();
        assert_eq!(record.card.get(), r#"{"z":1.50, "a":[ ]}"#);
        assert_eq!(record.key(), "v1/mdc/d/b/g/7/lora-1");
        assert_eq!(String::from_utf8(record.to_json()).unwrap(), text);
        let empty = text.replace("lora-1", "");
        assert_eq!(CardRecord::parse(empty.as_bytes()).unwrap().suffix, None);
    }
}
