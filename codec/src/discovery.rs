//! What discovery stores: endpoint and model records (spec/events-discovery.md §4.3, §4.4).
//!
//! Values are compact JSON with members in a fixed order. Reading ignores unknown members and
//! takes absent or null optional ones; an unknown transport, device or codec makes the record
//! unreadable, and readers skip it (§4.10).

use std::ops::{Deref, DerefMut};

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::control_message::PayloadCodec;
use crate::path::{EndpointId, InstanceKey, ModelKey};

/// The `type` of an endpoint record: one word, required.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum EndpointTag {
    Endpoint,
}

/// The `type` of a model record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum ModelTag {
    Model,
}

/// How requests reach an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transport {
    /// `IP:PORT/PATH`; see [`crate::path::TcpTransport`].
    Tcp(String),
    /// A NATS subject.
    NatsTcp(String),
}

/// What an instance computes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceType {
    /// No accelerator.
    Cpu,
    /// An accelerator, or so the worker believes.
    Cuda,
}

/// One instance of one endpoint, as records of several types hold it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceRecord {
    /// Component.
    pub component: String,
    /// Endpoint.
    pub endpoint: String,
    /// Namespace.
    pub namespace: String,
    /// The instance; counts even where the key says otherwise.
    pub instance_id: u64,
    /// How to reach it.
    pub transport: Transport,
    /// What it computes on; taken for an accelerator if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_type: Option<DeviceType>,
    /// How it wants its requests encoded; JSON if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_plane_codec: Option<PayloadCodec>,
}

impl InstanceRecord {
    /// The endpoint that it is an instance of.
    #[must_use]
    pub fn endpoint_id(&self) -> EndpointId {
        EndpointId::new(&self.namespace, &self.component, &self.endpoint)
    }

    /// The key that it is stored under.
    #[must_use]
    pub fn key(&self) -> InstanceKey {
        InstanceKey {
            endpoint: self.endpoint_id(),
            instance_id: self.instance_id,
        }
    }

    /// The codec to send it requests in.
    #[must_use]
    pub fn payload_codec(&self) -> PayloadCodec {
        self.request_plane_codec.unwrap_or_default()
    }
}

/// The record of an instance: what is said of it, behind the type.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointRecord {
    #[serde(rename = "type")]
    tag: EndpointTag,
    /// The instance.
    #[serde(flatten)]
    pub instance: InstanceRecord,
}

impl EndpointRecord {
    /// A record with neither device nor codec.
    #[must_use]
    pub fn new(endpoint: &EndpointId, instance_id: u64, transport: Transport) -> Self {
        Self {
            tag: EndpointTag::Endpoint,
            instance: InstanceRecord {
                component: endpoint.component.clone(),
                endpoint: endpoint.name.clone(),
                namespace: endpoint.namespace.clone(),
                instance_id,
                transport,
                device_type: None,
                request_plane_codec: None,
            },
        }
    }
}

impl Deref for EndpointRecord {
    type Target = InstanceRecord;

    fn deref(&self) -> &InstanceRecord {
        &self.instance
    }
}

impl DerefMut for EndpointRecord {
    fn deref_mut(&mut self) -> &mut InstanceRecord {
        &mut self.instance
    }
}

/// One model that an instance serves. The card is kept byte for byte.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ModelRecord {
    #[serde(rename = "type")]
    tag: ModelTag,
    /// Namespace.
    pub namespace: String,
    /// Component.
    pub component: String,
    /// Endpoint.
    pub endpoint: String,
    /// The instance that serves it.
    pub instance_id: u64,
    /// The card, opaque JSON; see [`ModelRecord::card`].
    pub card_json: Box<RawValue>,
    /// Names an adapter; absent for a base model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_suffix: Option<String>,
}

/// The few members of a card that the runtime itself looks at.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Card {
    /// The name that users call it by.
    pub display_name: String,
    /// Where it came from.
    #[serde(default)]
    pub source_path: Option<String>,
    /// Other names.
    #[serde(default)]
    pub aliases: Option<Vec<String>>,
}

impl ModelRecord {
    /// A record of a base model.
    #[must_use]
    pub fn new(endpoint: &EndpointId, instance_id: u64, card_json: Box<RawValue>) -> Self {
        Self {
            tag: ModelTag::Model,
            namespace: endpoint.namespace.clone(),
            component: endpoint.component.clone(),
            endpoint: endpoint.name.clone(),
            instance_id,
            card_json,
            model_suffix: None,
        }
    }

    /// The members of the card that matter here.
    ///
    /// # Errors
    /// The card has no `display_name`, or one of the members is of the wrong type.
    pub fn card(&self) -> Result<Card, serde_json::Error> {
        serde_json::from_str(self.card_json.get())
    }

    /// The key that it is stored under; an empty suffix counts as none.
    #[must_use]
    pub fn key(&self) -> ModelKey {
        ModelKey {
            endpoint: EndpointId::new(&self.namespace, &self.component, &self.endpoint),
            instance_id: self.instance_id,
            suffix: self
                .model_suffix
                .clone()
                .filter(|suffix| !suffix.is_empty()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAST: &str = concat!(
        r#"{"type":"Endpoint","component":"c","endpoint":"e","namespace":"n","#,
        r#""instance_id":18446744073709551615,"transport":{"tcp":"h:1/p"}}"#
    );

    #[test]
    fn absent_members_default_and_unknown_ones_are_ignored() {
        let record: EndpointRecord = serde_json::from_str(LEAST).unwrap();
        assert_eq!(record.instance_id, u64::MAX);
        assert_eq!(record.payload_codec(), PayloadCodec::Json);
        assert_eq!(serde_json::to_string(&record).unwrap(), LEAST);
        let more = LEAST.replacen('{', r#"{"later":{"a":[]},"device_type":null,"#, 1);
        assert_eq!(
            serde_json::from_str::<EndpointRecord>(&more).unwrap(),
            record
        );
        assert_eq!(
            record.key().to_string(),
            "v1/instances/n/c/e/ffffffffffffffff"
        );
    }

    #[test]
    fn unreadable_records_are_errors() {
        for (from, to) in [
            (r#""type":"Endpoint","#, ""),
            ("Endpoint\"", "Model\""),
            (r#","transport":{"tcp":"h:1/p"}"#, ""),
            ("{\"tcp\"", "{\"http\""),
            ("}}", r#"},"device_type":"tpu"}"#),
            ("}}", r#"},"request_plane_codec":"cbor"}"#),
            ("18446744073709551615", "18446744073709551616"),
            ("18446744073709551615", "-1"),
            (r#""namespace":"n""#, r#""namespace":"n","namespace":"n""#),
        ] {
            assert!(LEAST.contains(from));
            let text = LEAST.replacen(from, to, 1);
            assert!(
                serde_json::from_str::<EndpointRecord>(&text).is_err(),
                "{text}"
            );
        }
    }

    #[test]
    fn model_suffixes_go_into_the_key() {
        let endpoint = EndpointId::new("n", "c", "e");
        let card = RawValue::from_string(r#"{ "display_name":"m" }"#.to_owned()).unwrap();
        let mut record = ModelRecord::new(&endpoint, 10, card);
        assert_eq!(record.card().unwrap().display_name, "m");
        let text = serde_json::to_string(&record).unwrap();
        assert!(
            text.ends_with(r#""card_json":{ "display_name":"m" }}"#),
            "{text}"
        );
        record.model_suffix = Some(String::new());
        assert_eq!(record.key().to_string(), "v1/mdc/n/c/e/a");
        record.model_suffix = Some("lora-1".into());
        assert_eq!(record.key().to_string(), "v1/mdc/n/c/e/a/lora-1");
    }
}
