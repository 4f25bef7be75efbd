//! Keys of the discovery store (spec/events-discovery.md §4.2, §4.10).

use std::fmt;

use super::{EndpointId, parse_instance_hex};

/// Where endpoint records live.
pub const INSTANCES_BUCKET: &str = "v1/instances";
/// Where model records live.
pub const MODELS_BUCKET: &str = "v1/mdc";

/// `v1/instances/{namespace}/{component}/{endpoint}/{id hex}`; the names are raw.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct InstanceKey {
    /// The endpoint.
    pub endpoint: EndpointId,
    /// The instance.
    pub instance_id: u64,
}

impl InstanceKey {
    /// Reads a key. The last part is the id, the first two are namespace and component, and all
    /// that lies between is the endpoint's name: unlike Dynamo's reader this finds the name again
    /// when it holds a slash, so that the removal of such an instance is not missed. A slash in
    /// namespace or component cannot be told apart and shifts the names; the id still holds.
    #[must_use]
    pub fn parse(key: &str) -> Option<Self> {
        let rest = key.strip_prefix(INSTANCES_BUCKET)?.strip_prefix('/')?;
        let (names, hex) = rest.rsplit_once('/')?;
        let mut names = names.splitn(3, '/');
        Some(Self {
            endpoint: EndpointId::new(names.next()?, names.next()?, names.next()?),
            instance_id: parse_instance_hex(hex)?,
        })
    }

    /// The prefix of all keys of one endpoint, with its closing slash.
    #[must_use]
    pub fn endpoint_prefix(endpoint: &EndpointId) -> String {
        format!("{INSTANCES_BUCKET}/{endpoint}/")
    }
}

impl fmt::Display for InstanceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{INSTANCES_BUCKET}/{}/{:x}",
            self.endpoint, self.instance_id
        )
    }
}

/// `v1/mdc/{namespace}/{component}/{endpoint}/{id hex}[/{suffix}]`; the names are raw.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ModelKey {
    /// The endpoint.
    pub endpoint: EndpointId,
    /// The instance.
    pub instance_id: u64,
    /// Names an adapter; absent for a base model, never empty.
    pub suffix: Option<String>,
}

impl ModelKey {
    /// Reads a key of four or five parts after the bucket.
    #[must_use]
    pub fn parse(key: &str) -> Option<Self> {
        let rest = key.strip_prefix(MODELS_BUCKET)?.strip_prefix('/')?;
        let mut parts = rest.split('/');
        let (namespace, component, name) = (parts.next()?, parts.next()?, parts.next()?);
        let instance_id = parse_instance_hex(parts.next()?)?;
        let suffix = parts.next().filter(|suffix| !suffix.is_empty());
        if parts.next().is_some() {
            return None;
        }
        Some(Self {
            endpoint: EndpointId::new(namespace, component, name),
            instance_id,
            suffix: suffix.map(str::to_owned),
        })
    }
}

impl fmt::Display for ModelKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{MODELS_BUCKET}/{}/{:x}",
            self.endpoint, self.instance_id
        )?;
        match self.suffix.as_deref() {
            None | Some("") => Ok(()),
            Some(suffix) => write!(f, "/{suffix}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instance_keys() {
        let text = "v1/instances/demo/backend/generate/7d7ba1ff9b377a25";
        let key = InstanceKey::parse(text).unwrap();
        assert_eq!(key.endpoint, EndpointId::new("demo", "backend", "generate"));
        assert_eq!(key.instance_id, 0x7d7b_a1ff_9b37_7a25);
        assert_eq!(key.to_string(), text);
        assert!(text.starts_with(&InstanceKey::endpoint_prefix(&key.endpoint)));
        let padded = InstanceKey::parse("v1/instances/demo/back:end/g/00AB").unwrap();
        assert_eq!(padded.instance_id, 0xab);
        let slash = InstanceKey::parse("v1/instances/demo/backend/chat/comp%x/1").unwrap();
        assert_eq!(slash.endpoint.name, "chat/comp%x");
        for wrong in [
            "v1/instances/a/b/1",
            "v1/instances/a/b/c/xyz",
            "v1/instancesa/b/c/1",
            "v1/mdc/a/b/c/1",
            "",
        ] {
            assert_eq!(InstanceKey::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn model_keys() {
        let text = "v1/mdc/probe/worker/generate/7d7ba1ff9b377bba/lora-1";
        let key = ModelKey::parse(text).unwrap();
        assert_eq!(key.suffix.as_deref(), Some("lora-1"));
        assert_eq!(key.to_string(), text);
        let base = ModelKey::parse("v1/mdc/demo/backend/generate/7d7b").unwrap();
        assert_eq!(base.suffix, None);
        assert_eq!(base.to_string(), "v1/mdc/demo/backend/generate/7d7b");
        let empty = ModelKey::parse("v1/mdc/demo/backend/generate/7d7b/").unwrap();
        assert_eq!(empty, base);
        for wrong in ["v1/mdc/a/b/c", "v1/mdc/a/b/c/1/s/t", "v1/mdc/a/b/c/zz"] {
            assert_eq!(ModelKey::parse(wrong), None, "{wrong}");
        }
    }
}
