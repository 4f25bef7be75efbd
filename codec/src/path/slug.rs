//! Slugs: names reduced to `[a-z0-9_-]` (spec/events-discovery.md §2.4).

use std::fmt;

use serde::{Deserialize, Serialize};

use super::is_plain_byte;

/// A name that holds nothing but `[a-z0-9_-]`; may be empty.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Slug(String);

/// A text holds a character that no slug has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a slug: only a-z, 0-9, `_` and `-` are allowed")]
pub struct NotASlug {
    /// The text.
    pub text: String,
}

impl Slug {
    /// Lower-cases, puts `_` for every other character, and drops leading `_`.
    #[must_use]
    pub fn slugify(text: &str) -> Self {
        let slug: String = reduce(text).collect();
        Self(slug.trim_start_matches('_').to_owned())
    }

    /// As [`Self::slugify`], with `-` replaced as well and `_` and the last 8 hex digits of the
    /// original's BLAKE3 hash appended, so that different texts stay different.
    #[must_use]
    pub fn slugify_unique(text: &str) -> Self {
        let mut slug: String = reduce(text)
            .map(|char| if char == '-' { '_' } else { char })
            .collect();
        let hash = blake3::hash(text.as_bytes()).to_hex();
        slug.push('_');
        slug.push_str(&hash[hash.len() - 8..]);
        Self(slug.trim_start_matches('_').to_owned())
    }

    /// Takes a text that already is a slug.
    ///
    /// # Errors
    /// It is not.
    pub fn strict(text: &str) -> Result<Self, NotASlug> {
        Self::try_from(text.to_owned())
    }

    /// The slug as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

fn reduce(text: &str) -> impl Iterator<Item = char> {
    // One `_` per character of the lower-cased text, whatever its length in bytes.
    let lower = text.to_lowercase().chars().collect::<Vec<_>>();
    lower.into_iter().map(|char| match u8::try_from(char) {
        Ok(byte) if is_plain_byte(byte) => char,
        _ => '_',
    })
}

impl TryFrom<String> for Slug {
    type Error = NotASlug;

    fn try_from(text: String) -> Result<Self, NotASlug> {
        if text.bytes().all(is_plain_byte) {
            return Ok(Self(text));
        }
        Err(NotASlug { text })
    }
}

impl From<Slug> for String {
    fn from(slug: Slug) -> Self {
        slug.0
    }
}

impl fmt::Display for Slug {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows of spec/events-discovery.md §2.4, as a real 1.6.1 printed them.
    #[test]
    fn slugs_are_dynamos() {
        for (text, slug, unique) in [
            ("a.b", "a_b", "a_b_06a5215d"),
            ("Foo Bar", "foo_bar", "foo_bar_72574579"),
            ("__x", "x", "x_a25368f1"),
            (
                "demo.sub_backend",
                "demo_sub_backend",
                "demo_sub_backend_33c473ab",
            ),
            ("Ünï", "n_", "n__4fcc51d1"),
            ("a/b|c", "a_b_c", "a_b_c_acffabf3"),
            ("v1/mdc", "v1_mdc", "v1_mdc_e9e95917"),
        ] {
            assert_eq!(Slug::slugify(text).as_str(), slug);
            assert_eq!(Slug::slugify_unique(text).as_str(), unique);
        }
        assert_eq!(
            Slug::slugify("probe.Sub:1_Back.End").as_str(),
            "probe_sub_1_back_end"
        );
    }

    #[test]
    fn strict_takes_slugs_only() {
        assert_eq!(Slug::strict("a-b_9").unwrap().to_string(), "a-b_9");
        assert!(Slug::strict("A").is_err());
        assert!(serde_json::from_str::<Slug>("\"a.b\"").is_err());
        assert_eq!(
            serde_json::from_str::<Slug>("\"ab\"").unwrap().as_str(),
            "ab"
        );
    }
}
