//! Endpoint names as they are typed: what reads as one, and what we may offer under.

/// The parts of a name in any of its forms: an optional `dyn://`, then parts between slashes or
/// dots, blanks at both ends ignored (`spec/events-discovery.md` §2.2).
pub(super) fn parts(text: &str) -> Vec<&str> {
    let text = text.strip_prefix("dyn://").unwrap_or(text);
    let text = text.trim_matches([' ', '/', '.']);
    text.split(['.', '/'])
        .filter(|part| !part.is_empty())
        .collect()
}

/// Whether a part is a name that every reader understands (`spec/events-discovery.md` §2.1).
pub(super) fn is_plain(part: &str) -> bool {
    let plain =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"_-".contains(&byte);
    !part.is_empty() && part.bytes().all(plain)
}

/// Namespace, component and endpoint.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct EndpointId {
    /// First level.
    pub namespace: String,
    /// Second level.
    pub component: String,
    /// Third level.
    pub name: String,
}

/// Reads an endpoint name; never fails, short names are filled up as Dynamo does.
pub fn parse(text: &str) -> EndpointId {
    let parts = parts(text);
    let part = |index: usize, or: &str| parts.get(index).map_or(or, |part| part).to_owned();
    let (namespace, component) = match parts.len() {
        1 => ("NS".to_owned(), part(0, "C")),
        _ => (part(0, "NS"), part(1, "C")),
    };
    let name = if parts.len() > 2 {
        parts[2..].join("_")
    } else {
        "E".to_owned()
    };
    EndpointId {
        namespace,
        component,
        name,
    }
}

impl std::fmt::Display for EndpointId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}/{}", self.namespace, self.component, self.name)
    }
}
