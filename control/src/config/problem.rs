//! What is wrong with a setting, and where it was written: the one shape in which every check of
//! this module reports, and the one place that turns it into a line of text.

use std::fmt;
use std::sync::Arc;

/// Where a value came from, or where a fault lies.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Origin {
    /// A flag of the command line, such as `--set core.io`.
    Flag {
        /// The flag as the user would type it.
        name: String,
    },
    /// An environment variable.
    Env {
        /// Its name.
        name: String,
    },
    /// A place in a file. Line and column count from 1; the column counts characters.
    File {
        /// The path as it was given on the command line, or made from it (`cores.d/1.toml`).
        path: Arc<str>,
        /// Line, from 1.
        line: u32,
        /// Column in characters, from 1.
        column: u32,
    },
    /// Nobody wrote it.
    Default,
    /// Nobody wrote it, and it follows from how this host is set up.
    Host {
        /// From what: `nic_queue 3 of eth0: IRQ 45`.
        why: String,
    },
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag { name } => write!(f, "flag {name}"),
            Self::Env { name } => write!(f, "environment {name}"),
            Self::File { path, line, column } => write!(f, "{path}:{line}:{column}"),
            Self::Default => f.write_str("default"),
            Self::Host { why } => write!(f, "from {why}"),
        }
    }
}

/// How bad it is.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Severity {
    /// Nothing starts.
    Error,
    /// It starts, but probably not as meant.
    Warning,
}

/// One finding: where, what is wrong, what to write instead.
///
/// Printed as `file:line:column: what; instead`, with `warning: ` before `what` for a warning.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Problem {
    /// Error or warning.
    pub severity: Severity,
    /// The place.
    pub at: Origin,
    /// What is wrong, one clause without a full stop.
    pub what: String,
    /// What to do about it, one clause without a full stop.
    pub instead: String,
}

impl Problem {
    /// An error at `at`.
    pub fn error(at: Origin, what: impl Into<String>, instead: impl Into<String>) -> Self {
        Self {
            severity: Severity::Error,
            at,
            what: what.into(),
            instead: instead.into(),
        }
    }

    /// A warning at `at`.
    pub fn warning(at: Origin, what: impl Into<String>, instead: impl Into<String>) -> Self {
        Self {
            severity: Severity::Warning,
            at,
            what: what.into(),
            instead: instead.into(),
        }
    }

    /// The line without the word `warning`, for a log that has a level of its own.
    pub fn line(&self) -> String {
        format!("{}: {}; {}", self.at, self.what, self.instead)
    }

    /// Whether this stops the program.
    pub fn is_error(&self) -> bool {
        self.severity == Severity::Error
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = if self.is_error() { "" } else { "warning: " };
        write!(f, "{}: {word}{}; {}", self.at, self.what, self.instead)
    }
}

/// Text of a file with its name, for turning byte offsets into places.
pub(super) struct Source<'t> {
    pub(super) path: Arc<str>,
    pub(super) text: &'t str,
}

impl Source<'_> {
    /// The place of byte `offset`; an offset behind the end, or inside a character, is moved back.
    pub(super) fn at(&self, offset: usize) -> Origin {
        let mut end = offset.min(self.text.len());
        while !self.text.is_char_boundary(end) {
            end -= 1;
        }
        let before = &self.text[..end];
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        let lines = before.bytes().filter(|&byte| byte == b'\n').count();
        let columns = before[line_start..].chars().count();
        Origin::File {
            path: Arc::clone(&self.path),
            line: u32::try_from(lines + 1).unwrap_or(u32::MAX),
            column: u32::try_from(columns + 1).unwrap_or(u32::MAX),
        }
    }
}

/// `text` in double quotes for a message: control characters escaped, long text cut.
pub(crate) fn quoted(text: &str) -> String {
    const CHARS_MAX: usize = 80;
    let mut out = String::from("\"");
    for (count, c) in text.chars().enumerate() {
        if count == CHARS_MAX {
            out.push('…');
            break;
        }
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c.is_control() => out.extend(c.escape_default()),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_become_lines_and_character_columns() {
        let source = Source {
            path: "x.toml".into(),
            text: "a = 1\nüü = 2\n",
        };
        let place = |offset| source.at(offset).to_string();
        assert_eq!(place(0), "x.toml:1:1");
        assert_eq!(place(4), "x.toml:1:5");
        assert_eq!(place(6), "x.toml:2:1");
        assert_eq!(place(13), "x.toml:2:6", "two letters of two bytes each");
        assert_eq!(place(7), "x.toml:2:1", "inside a letter");
        assert_eq!(place(9_999), "x.toml:3:1");
    }

    #[test]
    fn quoting_escapes_and_cuts() {
        assert_eq!(quoted("a\"b\n"), r#""a\"b\n""#);
        assert_eq!(quoted(&"x".repeat(500)).chars().count(), 83);
    }
}
