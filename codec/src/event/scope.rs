//! Where an event belongs, and the subjects and paths made of that
//! (spec/events-discovery.md §3.1).
//!
//! ```text
//! subject  namespace.NS[.component.C[.endpoint.E]].TOPIC
//! path     namespace/NS[/component/C[/endpoint/E]]/topic/TOPIC/PUBLISHER      in keys
//! ```
//!
//! Names and topics are percent-encoded in both. Scopes do not nest: an event of an endpoint does
//! not reach a subscriber of its component.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::path::EndpointId;

/// A namespace, a component or an endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Scope {
    /// A namespace by itself.
    Namespace {
        /// Its name.
        name: String,
    },
    /// A component by itself.
    Component {
        /// Its namespace.
        namespace: String,
        /// Its name.
        component: String,
    },
    /// An endpoint; all topics that Dynamo uses are of this scope.
    Endpoint {
        /// Its names.
        endpoint: EndpointId,
    },
}

impl Scope {
    /// The scope of a namespace.
    #[must_use]
    pub fn namespace(name: &str) -> Self {
        let name = name.to_owned();
        Self::Namespace { name }
    }

    /// The scope of a component.
    #[must_use]
    pub fn component(namespace: &str, component: &str) -> Self {
        Self::Component {
            namespace: namespace.to_owned(),
            component: component.to_owned(),
        }
    }

    /// The scope of an endpoint.
    #[must_use]
    pub fn endpoint(namespace: &str, component: &str, name: &str) -> Self {
        Self::of(EndpointId::new(namespace, component, name))
    }

    /// The scope of an endpoint whose names are at hand together.
    #[must_use]
    pub fn of(endpoint: EndpointId) -> Self {
        Self::Endpoint { endpoint }
    }

    /// The namespace that it lies in, or is.
    #[must_use]
    pub fn namespace_name(&self) -> &str {
        match self {
            Self::Namespace { name } => name,
            Self::Component { namespace, .. } => namespace,
            Self::Endpoint { endpoint } => &endpoint.namespace,
        }
    }

    /// The kinds and names, outermost first.
    fn levels(&self) -> Vec<(&'static str, &str)> {
        match self {
            Self::Namespace { name } => vec![(NAMESPACE, name)],
            Self::Component {
                namespace,
                component,
            } => vec![(NAMESPACE, namespace), (COMPONENT, component)],
            Self::Endpoint { endpoint } => vec![
                (NAMESPACE, &endpoint.namespace),
                (COMPONENT, &endpoint.component),
                (ENDPOINT, &endpoint.name),
            ],
        }
    }

    fn joined(&self, separator: char) -> String {
        let mut out = String::new();
        for (kind, name) in self.levels() {
            if !out.is_empty() {
                out.push(separator);
            }
            out.push_str(kind);
            out.push(separator);
            out.push_str(&encode_segment(name));
        }
        out
    }

    /// What comes before the topic in a subject, without the dot between.
    #[must_use]
    pub fn subject_prefix(&self) -> String {
        self.joined('.')
    }

    /// What comes before `/topic/` in a key.
    #[must_use]
    pub fn path_prefix(&self) -> String {
        self.joined('/')
    }

    /// The subject of a topic: what NATS subscribes to, and the first part of a message that goes
    /// through a ZMQ broker.
    #[must_use]
    pub fn subject(&self, topic: &str) -> String {
        let mut subject = self.subject_prefix();
        subject.push('.');
        subject.push_str(&encode_segment(topic));
        subject
    }

    /// Reads kinds and names from segments that are still encoded.
    pub(super) fn from_segments(segments: &[&str]) -> Option<Self> {
        match *segments {
            [NAMESPACE, namespace] => Some(Self::Namespace {
                name: decode_segment(namespace)?.into_owned(),
            }),
            [NAMESPACE, namespace, COMPONENT, component] => Some(Self::Component {
                namespace: decode_segment(namespace)?.into_owned(),
                component: decode_segment(component)?.into_owned(),
            }),
            [
                NAMESPACE,
                namespace,
                COMPONENT,
                component,
                ENDPOINT,
                endpoint,
            ] => Some(Self::endpoint(
                &decode_segment(namespace)?,
                &decode_segment(component)?,
                &decode_segment(endpoint)?,
            )),
            _ => None,
        }
    }
}

const NAMESPACE: &str = "namespace";
const COMPONENT: &str = "component";
const ENDPOINT: &str = "endpoint";

impl std::fmt::Display for Scope {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<&str> = self.levels().into_iter().map(|(_, name)| name).collect();
        f.write_str(&names.join("/"))
    }
}

/// Reads a subject made by [`Scope::subject`]; `None` for any other.
#[must_use]
pub fn parse_subject(subject: &str) -> Option<(Scope, String)> {
    let (scope, topic) = subject.rsplit_once('.')?;
    let segments: Vec<&str> = scope.splitn(7, '.').collect();
    let scope = Scope::from_segments(&segments)?;
    Some((scope, decode_segment(topic)?.into_owned()))
}

fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-'
}

/// Letters, digits, `_` and `-` stay; every other byte becomes `%` and two upper-case hex digits.
#[must_use]
pub fn encode_segment(segment: &str) -> Cow<'_, str> {
    if segment.bytes().all(is_plain) {
        return Cow::Borrowed(segment);
    }
    let mut out = String::with_capacity(3 * segment.len());
    for byte in segment.bytes() {
        if is_plain(byte) {
            out.push(char::from(byte));
        } else {
            out.push('%');
            for nibble in [byte >> 4, byte & 15] {
                let digit = char::from_digit(nibble.into(), 16).unwrap_or_default();
                out.push(digit.to_ascii_uppercase());
            }
        }
    }
    Cow::Owned(out)
}

/// Undoes [`encode_segment`]; hex digits of either case are taken. `None` without two hex digits
/// behind a `%`, or if the outcome is not UTF-8.
#[must_use]
pub fn decode_segment(segment: &str) -> Option<Cow<'_, str>> {
    if !segment.contains('%') {
        return Some(Cow::Borrowed(segment));
    }
    let mut out = Vec::with_capacity(segment.len());
    let mut pieces = segment.split('%');
    out.extend_from_slice(pieces.next()?.as_bytes());
    for piece in pieces {
        let (hex, rest) = piece.split_at_checked(2)?;
        // `from_str_radix` would take a sign.
        if !hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return None;
        }
        out.push(u8::from_str_radix(hex, 16).ok()?);
        out.extend_from_slice(rest.as_bytes());
    }
    String::from_utf8(out).ok().map(Cow::Owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table of spec/events-discovery.md §3.1.
    #[test]
    fn scopes_in_json_subjects_and_paths() {
        for (scope, json, subject) in [
            (
                Scope::namespace("probe"),
                r#"{"kind":"namespace","name":"probe"}"#,
                "namespace.probe",
            ),
            (
                Scope::component("probe", "worker"),
                r#"{"kind":"component","namespace":"probe","component":"worker"}"#,
                "namespace.probe.component.worker",
            ),
            (
                Scope::endpoint("probe", "worker", "generate"),
                concat!(
                    r#"{"kind":"endpoint","endpoint":"#,
                    r#"{"namespace":"probe","component":"worker","name":"generate"}}"#
                ),
                "namespace.probe.component.worker.endpoint.generate",
            ),
        ] {
            assert_eq!(serde_json::to_string(&scope).unwrap(), json);
            assert_eq!(serde_json::from_str::<Scope>(json).unwrap(), scope);
            assert_eq!(scope.subject_prefix(), subject);
            assert_eq!(scope.path_prefix(), subject.replace('.', "/"));
            let whole = scope.subject("kv-events");
            assert_eq!(whole, format!("{subject}.kv-events"));
            assert_eq!(parse_subject(&whole), Some((scope, "kv-events".into())));
        }
    }

    #[test]
    fn odd_names_and_topics_are_encoded() {
        let scope = Scope::endpoint("Demo", "back:end", "chat/comp%x");
        let subject = scope.subject("topic.with/odd*chars");
        assert_eq!(
            subject,
            "namespace.Demo.component.back%3Aend.endpoint.chat%2Fcomp%25x\
             .topic%2Ewith%2Fodd%2Achars"
        );
        let topic = "topic.with/odd*chars".to_owned();
        assert_eq!(parse_subject(&subject), Some((scope, topic)));
        assert_eq!(encode_segment("é ~"), "%C3%A9%20%7E");
        assert_eq!(decode_segment("%c3%A9%20~").unwrap(), "é ~");
        for wrong in ["%", "%2", "%zz", "%+1", "%ff", "a%2", "%é0"] {
            assert_eq!(decode_segment(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn other_subjects_are_none_of_ours() {
        for wrong in [
            "",
            "namespace",
            "namespace.a",
            "component.a.topic",
            "namespace.a.endpoint.b.t",
            "namespace.a.component.b.endpoint.c.d.t",
            "namespace.a%.t",
            "$SRV.STATS",
        ] {
            assert_eq!(parse_subject(wrong), None, "{wrong}");
        }
    }
}
