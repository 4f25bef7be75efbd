//! Dynamo's typed error, as it travels in prologues and items (spec/request-plane.md §7.4).
//!
//! One [`Reason`] out of a closed catalogue says everything about the kind of an error: its class
//! and its legacy type name follow from it. Policy is to look at the reason.

mod reason;
mod wire;

use std::fmt;

pub use reason::{Class, Legacy, Reason};
pub use wire::PublicDetails;

use crate::limits::{CAUSES_MAX, DIAGNOSTIC_BYTES_MAX};

/// Ends a text that was cut.
pub const TRUNCATED: &str = "...[truncated]";

/// An error with a reason, a text, what the user may see of it, and the error that caused it.
///
/// Serialises to Dynamo's exact members in Dynamo's order, in JSON and in MessagePack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DynamoError {
    reason: Reason,
    text: String,
    public: Option<PublicDetails>,
    caused_by: Option<Box<DynamoError>>,
}

impl DynamoError {
    /// An error of that reason. A text over 4096 bytes is cut and says so.
    #[must_use]
    pub fn new(reason: Reason, text: impl Into<String>) -> Self {
        Self {
            reason,
            text: cut(text.into()),
            public: None,
            caused_by: None,
        }
    }

    /// The same error with details meant for the user.
    #[must_use]
    pub fn with_public(mut self, public: PublicDetails) -> Self {
        self.public = Some(public);
        self
    }

    /// The same error with its cause, in place of any it had. Causes beyond
    /// [`CAUSES_MAX`] are dropped, deepest first.
    #[must_use]
    pub fn with_cause(mut self, cause: Self) -> Self {
        let mut cause = Box::new(cause);
        let mut last = &mut *cause;
        for _ in 1..CAUSES_MAX {
            match last.caused_by {
                Some(ref mut next) => last = next,
                None => break,
            }
        }
        last.caused_by = None;
        self.caused_by = Some(cause);
        self
    }

    /// What it is.
    #[must_use]
    pub fn reason(&self) -> Reason {
        self.reason
    }

    /// The class that the reason belongs to.
    #[must_use]
    pub fn class(&self) -> Class {
        self.reason.class()
    }

    /// The text, for logs and operators.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The JSON that goes into a prologue's `typed_error`.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        // Strings, numbers and maps with string keys always serialise.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// What the user may see, if anything.
    #[must_use]
    pub fn public(&self) -> Option<&PublicDetails> {
        self.public.as_ref()
    }

    /// This error, its cause, the cause of that, and so on.
    pub fn chain(&self) -> impl Iterator<Item = &Self> {
        std::iter::successors(Some(self), |error| error.caused_by.as_deref())
    }

    /// True if any error of the chain has a reason after which nothing is to be tried again.
    #[must_use]
    pub fn blocks_migration(&self) -> bool {
        self.chain().any(|error| error.reason.blocks_migration())
    }
}

impl DynamoError {
    /// True if Dynamo's migration would try the request again after this error: some error of the
    /// chain has a reason for it, and none a reason against it (spec/request-plane.md §12).
    #[must_use]
    pub fn migrates(&self) -> bool {
        self.chain().any(|error| error.reason.migrates()) && !self.blocks_migration()
    }
}

/// Shortens a text to [`DIAGNOSTIC_BYTES_MAX`] bytes, its mark included, between two characters.
fn cut(mut text: String) -> String {
    if text.len() > DIAGNOSTIC_BYTES_MAX {
        let mut end = DIAGNOSTIC_BYTES_MAX - TRUNCATED.len();
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        text.push_str(TRUNCATED);
    }
    text
}

impl fmt::Display for DynamoError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.class().name(), self.text)
    }
}

impl std::error::Error for DynamoError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        let cause = self.caused_by.as_deref()?;
        Some(cause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_texts_are_cut_between_characters() {
        let exact = "x".repeat(DIAGNOSTIC_BYTES_MAX);
        assert_eq!(DynamoError::internal(exact.clone()).text(), exact);
        let long = "é".repeat(DIAGNOSTIC_BYTES_MAX);
        let error = DynamoError::internal(long);
        assert!(error.text().ends_with("é...[truncated]"));
        assert!(error.text().len() <= DIAGNOSTIC_BYTES_MAX);
        assert!(error.text().len() > DIAGNOSTIC_BYTES_MAX - 4);
    }

    #[test]
    fn chains_are_walked_and_bounded() {
        let mut error = DynamoError::cancelled("deepest");
        for depth in 0..CAUSES_MAX - 1 {
            error = DynamoError::cannot_connect(depth.to_string()).with_cause(error);
        }
        assert_eq!(error.chain().count(), CAUSES_MAX);
        assert!(error.blocks_migration());
        let error = DynamoError::disconnected("outer").with_cause(error);
        assert_eq!(error.chain().count(), CAUSES_MAX + 1);
        let error = DynamoError::disconnected("outer").with_cause(error);
        assert_eq!(
            error.chain().count(),
            CAUSES_MAX + 1,
            "the deepest was dropped"
        );
        assert!(!error.blocks_migration());
        assert!(error.migrates());
        assert!(!DynamoError::invalid_argument("x").migrates());
        let cancelled = DynamoError::disconnected("x").with_cause(DynamoError::cancelled("y"));
        assert!(!cancelled.migrates());
        assert_eq!(error.to_string(), "Unavailable: outer");
        let source = std::error::Error::source(&error).unwrap();
        assert_eq!(source.to_string(), "Unavailable: outer");
    }
}
