//! Whatever people and older programs write where an endpoint is meant
//! (spec/events-discovery.md §2.2, §2.5, §11), read into its names.
//!
//! | form | example |
//! |---|---|
//! | path, dotted | `demo/backend/generate`, `demo.backend.generate` |
//! | URL | `dyn://demo.backend.generate`, `dyn://demo/backend/generate` |
//! | etcd key | `v1/instances/demo/backend/generate/1a2b`, the same with `v1/mdc` |
//! | older etcd path | `demo/components/backend`, `demo/components/backend/generate-1a2b` |
//! | request path | `1a2b/demo/backend/generate`, also behind `10.0.0.1:7000/` |
//! | service name | `demo_backend`; older `demo\|backend` |
//! | subject | `demo_backend.generate-1a2b`; older `demo\|backend.generate-1a2b` |

use super::{
    EndpointId, InstanceKey, ModelKey, TcpTransport, parse_instance_hex, parse_instance_path,
};

/// What a text names: a component, an endpoint of it, or one instance of that.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// Namespace.
    pub namespace: String,
    /// Component.
    pub component: String,
    /// Endpoint, if the text names one.
    pub endpoint: Option<String>,
    /// Instance, if the text names one.
    pub instance_id: Option<u64>,
    /// The endpoint's other reading: names with a `/` were kept whole by the generation before
    /// 1.6.1, which joins their parts by `_`.
    pub endpoint_before: Option<String>,
}

/// A text that no generation reads as a reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadReference {
    /// Nothing is named.
    #[error("{0:?} names no component; write namespace/component/endpoint")]
    Incomplete(String),
    /// A service name in which it cannot be seen where the component begins.
    #[error("{0:?} can be split in more than one way; write namespace/component/endpoint")]
    Ambiguous(String),
}

impl Reference {
    /// Reads any of the forms. Names are taken as they stand, whatever they are made of.
    ///
    /// # Errors
    /// See [`BadReference`].
    pub fn parse(text: &str) -> Result<Self, BadReference> {
        let text = text.trim();
        let own_form = of_key(text)
            .or_else(|| of_address(text))
            .or_else(|| of_older_path(text));
        if let Some(found) = own_form {
            return Ok(found);
        }
        if let Some((namespace, rest)) = text.split_once('|') {
            return of_service(namespace, rest)
                .ok_or_else(|| BadReference::Incomplete(text.to_owned()));
        }
        if !text.contains('/') && text.contains('_') {
            let (service, rest) = match text.split_once('.') {
                Some((service, rest)) => (service, Some(rest)),
                None => (text, None),
            };
            // `a_b.generate-1a2b` is a subject; `a_b.c.d` has dots between all names.
            if rest.is_none_or(|rest| split_instance(rest).1.is_some()) {
                return of_joined(text, service, rest);
            }
        }
        of_names(text).ok_or_else(|| BadReference::Incomplete(text.to_owned()))
    }

    /// The endpoints that the text may mean, the likelier first: the reading of 1.6.1, then that
    /// of the generation before where it differs. A component alone stands for its `generate`.
    #[must_use]
    pub fn endpoints(&self) -> Vec<EndpointId> {
        let name = self.endpoint.as_deref().unwrap_or("generate");
        let names = std::iter::once(name).chain(self.endpoint_before.as_deref());
        names
            .map(|name| EndpointId::new(&self.namespace, &self.component, name))
            .collect()
    }

    fn of_id(endpoint: EndpointId, instance_id: Option<u64>) -> Self {
        Self {
            namespace: endpoint.namespace,
            component: endpoint.component,
            endpoint: Some(endpoint.name),
            instance_id,
            endpoint_before: None,
        }
    }
}

fn of_key(text: &str) -> Option<Reference> {
    if let Some(key) = InstanceKey::parse(text) {
        return Some(Reference::of_id(key.endpoint, Some(key.instance_id)));
    }
    let key = ModelKey::parse(text)?;
    Some(Reference::of_id(key.endpoint, Some(key.instance_id)))
}

/// A request path, alone or behind an address.
fn of_address(text: &str) -> Option<Reference> {
    let path = match TcpTransport::parse(text) {
        Ok(transport) => transport.path,
        // Three names could begin with one that looks like a number; four cannot.
        Err(_) if text.split('/').count() == 4 => text,
        Err(_) => return None,
    };
    let (id, endpoint) = parse_instance_path(path)?;
    Some(Reference::of_id(endpoint, Some(id)))
}

/// `ns/components/comp[/endpoint[-hex]]`.
fn of_older_path(text: &str) -> Option<Reference> {
    let (namespace, rest) = text.split_once("/components/")?;
    let (component, endpoint) = match rest.split_once('/') {
        Some((component, endpoint)) => (component, Some(endpoint)),
        None => (rest, None),
    };
    let names = !namespace.is_empty() && !namespace.contains('/') && !component.is_empty();
    names.then(|| with_endpoint(namespace, component, endpoint))
}

/// `ns|comp` or `ns|comp.endpoint-hex`.
fn of_service(namespace: &str, rest: &str) -> Option<Reference> {
    let (component, endpoint) = match rest.split_once('.') {
        Some((component, endpoint)) => (component, Some(endpoint)),
        None => (rest, None),
    };
    let complete = !namespace.is_empty() && !component.is_empty();
    complete.then(|| with_endpoint(namespace, component, endpoint))
}

/// `ns_comp`, where only one `_` tells namespace from component.
fn of_joined(text: &str, service: &str, endpoint: Option<&str>) -> Result<Reference, BadReference> {
    match service.split_once('_') {
        Some((_, component)) if component.contains('_') => {
            Err(BadReference::Ambiguous(text.to_owned()))
        }
        Some((namespace, component)) if !namespace.is_empty() && !component.is_empty() => {
            Ok(with_endpoint(namespace, component, endpoint))
        }
        _ => Err(BadReference::Incomplete(text.to_owned())),
    }
}

fn with_endpoint(namespace: &str, component: &str, endpoint: Option<&str>) -> Reference {
    let (name, instance_id) = match endpoint.filter(|name| !name.is_empty()) {
        Some(text) => {
            let (name, id) = split_instance(text);
            (Some(name.to_owned()), id)
        }
        None => (None, None),
    };
    Reference {
        namespace: namespace.to_owned(),
        component: component.to_owned(),
        endpoint: name,
        instance_id,
        endpoint_before: None,
    }
}

/// `generate-1a2b`, taken apart.
fn split_instance(text: &str) -> (&str, Option<u64>) {
    match text.rsplit_once('-') {
        Some((name, hex)) if !name.is_empty() && !hex.is_empty() => match parse_instance_hex(hex) {
            Some(id) => (name, Some(id)),
            None => (text, None),
        },
        _ => (text, None),
    }
}

/// Names between dots or slashes, with or without `dyn://`.
fn of_names(text: &str) -> Option<Reference> {
    let bare = text.strip_prefix("dyn://").unwrap_or(text);
    let bare = bare.trim_matches([' ', '/', '.']);
    let parts = bare.split(['.', '/']).filter(|part| !part.is_empty());
    let parts: Vec<&str> = parts.collect();
    let [namespace, component, name @ ..] = parts.as_slice() else {
        return None;
    };
    let joined = (!name.is_empty()).then(|| name.join("_"));
    let before = (name.len() > 1).then(|| name.join("/"));
    Some(Reference {
        namespace: (*namespace).to_owned(),
        component: (*component).to_owned(),
        endpoint: joined,
        instance_id: None,
        endpoint_before: before,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(text: &str) -> (String, Option<u64>) {
        let found = Reference::parse(text).unwrap_or_else(|error| panic!("{error}"));
        let name = found.endpoint.as_deref().unwrap_or("-");
        let names = format!("{}/{}/{name}", found.namespace, found.component);
        (names, found.instance_id)
    }

    #[test]
    fn every_form_of_both_generations_is_read() {
        for (text, names, id) in [
            ("demo/backend/generate", "demo/backend/generate", None),
            ("demo.backend.generate", "demo/backend/generate", None),
            ("dyn://demo.backend.generate", "demo/backend/generate", None),
            ("dyn://demo/backend/generate", "demo/backend/generate", None),
            ("dynamo/processor", "dynamo/processor/-", None),
            ("dynamo.processor", "dynamo/processor/-", None),
            ("dynamo|processor", "dynamo/processor/-", None),
            ("dynamo_processor", "dynamo/processor/-", None),
            (
                "dynamo|processor.generate-1a2b3c4d",
                "dynamo/processor/generate",
                Some(0x1a2b_3c4d),
            ),
            (
                "demo_backend.generate-7d7b",
                "demo/backend/generate",
                Some(0x7d7b),
            ),
            ("a_b.c.d", "a_b/c/d", None),
            ("dynamo/components/processor", "dynamo/processor/-", None),
            (
                "dynamo/components/processor/generate-1a2b",
                "dynamo/processor/generate",
                Some(0x1a2b),
            ),
            (
                "v1/instances/demo/backend/generate/7d7b",
                "demo/backend/generate",
                Some(0x7d7b),
            ),
            (
                "v1/mdc/demo/backend/generate/7d7b",
                "demo/backend/generate",
                Some(0x7d7b),
            ),
            (
                "7d7b/demo/backend/generate",
                "demo/backend/generate",
                Some(0x7d7b),
            ),
            (
                "tcp://10.0.0.1:7000/7d7b/demo/backend/chat%2Fx",
                "demo/backend/chat/x",
                Some(0x7d7b),
            ),
        ] {
            assert_eq!(named(text), (names.to_owned(), id), "{text}");
        }
    }

    #[test]
    fn the_older_yaml_reference_has_two_readings() {
        let found = Reference::parse("dynamo.Processor.chat/completions").unwrap();
        assert_eq!(
            found.endpoints(),
            [
                EndpointId::new("dynamo", "Processor", "chat_completions"),
                EndpointId::new("dynamo", "Processor", "chat/completions"),
            ]
        );
        let one = Reference::parse("dynamo.Processor.generate").unwrap();
        assert_eq!(one.endpoints().len(), 1);
        let component = Reference::parse("dynamo/processor").unwrap();
        assert_eq!(
            component.endpoints(),
            [EndpointId::new("dynamo", "processor", "generate")]
        );
    }

    #[test]
    fn what_names_nothing_is_refused() {
        for text in ["", "x", "dyn://", "|", "a|", "|b", "_a", "a_"] {
            let refused = Reference::parse(text);
            assert!(
                matches!(refused, Err(BadReference::Incomplete(_))),
                "{text:?}"
            );
        }
        assert!(matches!(
            Reference::parse("my_name_space_backend"),
            Err(BadReference::Ambiguous(_))
        ));
    }
}
