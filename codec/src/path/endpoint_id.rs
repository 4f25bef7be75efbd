//! The three-part name of an endpoint and its text forms (spec/events-discovery.md §2.2).

use std::convert::Infallible;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

const SCHEME: &str = "dyn://";

/// Namespace, component and endpoint name. JSON: an object with exactly these keys.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct EndpointId {
    /// Namespace.
    pub namespace: String,
    /// Component.
    pub component: String,
    /// Endpoint.
    pub name: String,
}

impl EndpointId {
    /// Takes the three names as they are.
    #[must_use]
    pub fn new(namespace: &str, component: &str, name: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            component: component.to_owned(),
            name: name.to_owned(),
        }
    }

    /// Reads any text, as Dynamo does: this never fails. Separators are `.` and `/`; what is
    /// missing becomes `NS`, `C` and `E`; parts beyond the third are joined to it by `_`.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let text = text.strip_prefix(SCHEME).unwrap_or(text);
        let text = text.trim_matches([' ', '/', '.']);
        let parts: Vec<&str> = text
            .split(['.', '/'])
            .filter(|part| !part.is_empty())
            .collect();
        match parts.as_slice() {
            [] => Self::new("NS", "C", "E"),
            [component] => Self::new("NS", component, "E"),
            [namespace, component] => Self::new(namespace, component, "E"),
            [namespace, component, name @ ..] => Self::new(namespace, component, &name.join("_")),
        }
    }

    /// The URL form, `dyn://namespace.component.name`.
    #[must_use]
    pub fn url(&self) -> String {
        format!(
            "{SCHEME}{}.{}.{}",
            self.namespace, self.component, self.name
        )
    }
}

impl FromStr for EndpointId {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(Self::parse(text))
    }
}

impl fmt::Display for EndpointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.namespace, self.component, self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table of spec/events-discovery.md §2.2, each row as a real 1.6.1 parsed it.
    #[test]
    fn parses_as_dynamo_does() {
        for (text, namespace, component, name) in [
            ("", "NS", "C", "E"),
            ("   ", "NS", "C", "E"),
            ("dyn://", "NS", "C", "E"),
            ("x", "NS", "x", "E"),
            ("a.b", "a", "b", "E"),
            ("a/b", "a", "b", "E"),
            ("a.b.c", "a", "b", "c"),
            ("dyn://a.b.c", "a", "b", "c"),
            ("dyn://a/b/c", "a", "b", "c"),
            ("/a//b..c/", "a", "b", "c"),
            ("a.b.c.d.e", "a", "b", "c_d_e"),
            ("dyn://a/b.c/d", "a", "b", "c_d"),
            ("A.B.C", "A", "B", "C"),
            (" a . b . c ", "a ", " b ", " c"),
            ("DYN://a.b.c", "DYN:", "a", "b_c"),
            ("a.b.c/d e", "a", "b", "c_d e"),
            (
                "dynamo.Processor.chat/completions",
                "dynamo",
                "Processor",
                "chat_completions",
            ),
        ] {
            let id = EndpointId::parse(text);
            assert_eq!(id, EndpointId::new(namespace, component, name), "{text:?}");
            assert_eq!(id.to_string(), format!("{namespace}/{component}/{name}"));
            assert_eq!(id.url(), format!("dyn://{namespace}.{component}.{name}"));
        }
    }

    #[test]
    fn plain_names_round_trip_in_both_forms() {
        let id = EndpointId::new("ns", "comp", "name");
        assert_eq!(id.to_string().parse(), Ok(id.clone()));
        assert_eq!(id.url().parse(), Ok(id.clone()));
        let json = r#"{"namespace":"ns","component":"comp","name":"name"}"#;
        assert_eq!(serde_json::to_string(&id).unwrap(), json);
        assert_eq!(serde_json::from_str::<EndpointId>(json).unwrap(), id);
    }
}
