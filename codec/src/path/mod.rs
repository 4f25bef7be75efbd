//! Names: endpoints, instances, their paths, keys and slugs (spec/events-discovery.md §2, §4.2).

mod endpoint_id;
mod key;
mod reference;
mod slug;
mod transport;

pub use endpoint_id::EndpointId;
pub use key::{INSTANCES_BUCKET, InstanceKey, MODELS_BUCKET, ModelKey};
pub use reference::{BadReference, Reference};
pub use slug::{NotASlug, Slug};
pub use transport::{TcpTransport, TransportError};

use std::fmt::Write;

/// True if a name that we make up may be used for a namespace, component or endpoint:
/// `^[a-z0-9_-]+$`. What others call theirs is never refused.
#[must_use]
pub fn is_plain_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(is_plain_byte)
}

fn is_plain_byte(byte: u8) -> bool {
    matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-')
}

/// An instance id as it stands in keys and paths: lower-case hex, not padded.
#[must_use]
pub fn instance_hex(instance_id: u64) -> String {
    format!("{instance_id:x}")
}

/// Reads an instance id from a key: hex of either case, leading zeros allowed.
#[must_use]
pub fn parse_instance_hex(hex: &str) -> Option<u64> {
    // `from_str_radix` would take a sign.
    if !hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    u64::from_str_radix(hex, 16).ok()
}

/// The path under which a TCP worker serves an endpoint:
/// `{id hex}/{namespace}/{component}/{endpoint}`, with `%` and `/` escaped in the three names
/// (spec/request-plane.md §2.1).
#[must_use]
pub fn instance_path(instance_id: u64, endpoint: &EndpointId) -> String {
    let mut path = instance_hex(instance_id);
    for name in [&endpoint.namespace, &endpoint.component, &endpoint.name] {
        path.push('/');
        for char in name.chars() {
            match char {
                '%' => path.push_str("%25"),
                '/' => path.push_str("%2F"),
                _ => path.push(char),
            }
        }
    }
    path
}

/// Reads a path made by [`instance_path`]. `None` for any other: a path is opaque to routing, and
/// this is for tools that show it.
#[must_use]
pub fn parse_instance_path(path: &str) -> Option<(u64, EndpointId)> {
    let mut parts = path.split('/');
    let instance_id = parse_instance_hex(parts.next().filter(|hex| !hex.is_empty())?)?;
    let endpoint = EndpointId {
        namespace: unescape(parts.next()?)?,
        component: unescape(parts.next()?)?,
        name: unescape(parts.next()?)?,
    };
    parts.next().is_none().then_some((instance_id, endpoint))
}

fn unescape(name: &str) -> Option<String> {
    let mut pieces = name.split('%');
    let mut out = String::from(pieces.next()?);
    for piece in pieces {
        let (char, rest) = match piece.split_at_checked(2)? {
            ("25", rest) => ('%', rest),
            ("2F", rest) => ('/', rest),
            _ => return None,
        };
        out.push(char);
        out.push_str(rest);
    }
    Some(out)
}

/// The NATS subject of an instance: `{namespace}_{component}.{endpoint}-{id hex}`, not slugged
/// (spec/events-discovery.md §2.5).
#[must_use]
pub fn instance_subject(instance_id: u64, endpoint: &EndpointId) -> String {
    let EndpointId {
        namespace,
        component,
        name,
    } = endpoint;
    let mut subject = format!("{namespace}_{component}.{name}-");
    // Writing to a String cannot fail.
    let _ = write!(subject, "{instance_id:x}");
    subject
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instance_paths_escape_two_characters() {
        let endpoint = EndpointId::new("demo", "backend", "chat/comp%x");
        let path = instance_path(9_041_998_796_069_239_509, &endpoint);
        assert_eq!(path, "7d7ba1ff9b377ad5/demo/backend/chat%2Fcomp%25x");
        assert_eq!(
            parse_instance_path(&path),
            Some((9_041_998_796_069_239_509, endpoint))
        );
        for odd in [
            "",
            "x/a/b/c",
            "1/a/b",
            "1/a/b/c/d",
            "/a/b/c",
            "1/a/b/%zz",
            "1/a/b/%2",
        ] {
            assert_eq!(parse_instance_path(odd), None, "{odd}");
        }
        let plain = EndpointId::new("ns", "c", "é");
        assert_eq!(instance_path(0, &plain), "0/ns/c/é");
    }

    #[test]
    fn hex_is_lenient_when_read() {
        assert_eq!(instance_hex(0x7d7b), "7d7b");
        assert_eq!(parse_instance_hex("00AB"), Some(0xab));
        assert_eq!(parse_instance_hex("ffffffffffffffff"), Some(u64::MAX));
        for wrong in ["", "+1", "-1", "0x1", "1ffffffffffffffff", "g"] {
            assert_eq!(parse_instance_hex(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn plain_names() {
        for name in ["a", "a-b_c9", "-"] {
            assert!(is_plain_name(name));
        }
        for name in ["", "A", "a.b", "a/b", "é", " "] {
            assert!(!is_plain_name(name));
        }
    }

    #[test]
    fn subjects_are_not_slugged() {
        let endpoint = EndpointId::new("demo", "backend", "generate");
        assert_eq!(
            instance_subject(0x7d7b_a1ff_9b37_7aa9, &endpoint),
            "demo_backend.generate-7d7ba1ff9b377aa9"
        );
    }
}
