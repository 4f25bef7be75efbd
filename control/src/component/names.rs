//! Names that this process makes up for what it serves (`spec/events-discovery.md` §2.1). What
//! others call theirs is read whatever it is.

use corelane_codec::path::{EndpointId, is_plain_name};

/// Longest name in bytes; three of them, an id and the slashes fit any key and path.
const NAME_BYTES_MAX: usize = 255;

/// A name that is not to be made up: other programs would misread it.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error(
    "{name:?} cannot be the name of {what}: write 1 to 255 of a-z, 0-9, `_` and `-`, \
     for example {example:?}"
)]
pub struct BadName {
    /// `a namespace`, `a component` or `an endpoint`.
    pub what: &'static str,
    /// The name.
    pub name: String,
    /// What would do.
    pub example: String,
}

/// Checks one name.
pub(super) fn check(what: &'static str, name: &str) -> Result<(), BadName> {
    if is_plain_name(name) && name.len() <= NAME_BYTES_MAX {
        return Ok(());
    }
    let plain = |c: char| match c.to_ascii_lowercase() {
        c @ ('a'..='z' | '0'..='9' | '_' | '-') => c,
        _ => '_',
    };
    let example: String = name.chars().take(NAME_BYTES_MAX).map(plain).collect();
    let example = match example.is_empty() {
        true => "production".to_owned(),
        false => example,
    };
    Err(BadName {
        what,
        name: name.chars().take(NAME_BYTES_MAX).collect(),
        example,
    })
}

/// Checks all three.
pub(super) fn check_all(id: &EndpointId) -> Result<(), BadName> {
    check(NAMESPACE, &id.namespace)?;
    check(COMPONENT, &id.component)?;
    check(ENDPOINT, &id.name)
}

/// What the first name is called in complaints.
pub(super) const NAMESPACE: &str = "a namespace";
/// The second.
pub(super) const COMPONENT: &str = "a component";
/// The third.
pub(super) const ENDPOINT: &str = "an endpoint";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_names_are_made() {
        for good in ["a", "production", "a-b_9", &"x".repeat(255)] {
            check(NAMESPACE, good).unwrap();
        }
        for (bad, example) in [
            ("", "production"),
            ("Prod", "prod"),
            ("a.b", "a_b"),
            ("a/b", "a_b"),
            ("chat completions", "chat_completions"),
        ] {
            let error = check(ENDPOINT, bad).unwrap_err();
            assert_eq!(error.example, example);
            assert!(error.to_string().contains("an endpoint"));
        }
        assert!(check(COMPONENT, &"x".repeat(256)).is_err());
    }
}
