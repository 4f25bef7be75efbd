//! The W3C trace context of a request: `traceparent` (spec/events-discovery.md §9.5).
//!
//! ```text
//! 00-89ace864b2b31368359610792b23f650-60261288d0622a38-01
//! version-trace id-------------------- -span id of the sender -flags
//! ```

use std::fmt;

/// Bytes of its text, version 00.
pub const TEXT_BYTES: usize = 55;
/// The flag that says that this trace is kept.
const SAMPLED: u8 = 1;

/// Which trace a request belongs to, and which span of it has sent the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceContext {
    /// The trace; not all zero.
    pub trace_id: u128,
    /// The span; not zero.
    pub span_id: u64,
    /// Flags as they came.
    pub flags: u8,
}

impl TraceContext {
    /// Reads a header's value. `None` for anything that is not exactly a trace context: whoever
    /// gets such a value begins a trace of his own.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.as_bytes();
        let (head, rest) = text.split_at_checked(TEXT_BYTES)?;
        let dashes = head[2] == b'-' && head[35] == b'-' && head[52] == b'-';
        let version = hex(&head[..2])?;
        // Later versions may go on behind another dash.
        let ends = rest.is_empty() || (version > 0 && rest[0] == b'-');
        if !dashes || !ends || version == 0xff {
            return None;
        }
        let trace_id = hex(&head[3..35])?;
        let span_id = u64::try_from(hex(&head[36..52])?).ok()?;
        let flags = u8::try_from(hex(&head[53..])?).ok()?;
        (trace_id != 0 && span_id != 0).then_some(Self {
            trace_id,
            span_id,
            flags,
        })
    }

    /// Whether the sender keeps this trace.
    #[must_use]
    pub fn is_sampled(&self) -> bool {
        self.flags & SAMPLED != 0
    }

    /// The same with that flag set or not.
    #[must_use]
    pub fn sampled(self, keep: bool) -> Self {
        let flags = if keep {
            self.flags | SAMPLED
        } else {
            self.flags & !SAMPLED
        };
        Self { flags, ..self }
    }
}

/// Lower-case digits only, at most 32 of them.
fn hex(digits: &[u8]) -> Option<u128> {
    digits.iter().try_fold(0, |number: u128, digit| {
        let digit = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => return None,
        };
        Some(number << 4 | u128::from(digit))
    })
}

/// As a header's value, version 00.
impl fmt::Display for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            trace_id,
            span_id,
            flags,
        } = self;
        write!(f, "00-{trace_id:032x}-{span_id:016x}-{flags:02x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REAL: &str = "00-89ace864b2b31368359610792b23f650-60261288d0622a38-01";

    #[test]
    fn reads_and_writes_what_dynamo_sends() {
        let context = TraceContext::parse(REAL).unwrap();
        assert_eq!(context.trace_id, 0x89ac_e864_b2b3_1368_3596_1079_2b23_f650);
        assert_eq!(context.span_id, 0x6026_1288_d062_2a38);
        assert!(context.is_sampled() && !context.sampled(false).is_sampled());
        assert_eq!(context.to_string(), REAL);
        assert_eq!(REAL.len(), TEXT_BYTES);
    }

    #[test]
    fn anything_else_is_none() {
        for text in [
            "",
            "00",
            "00-89ace864b2b31368359610792b23f650-60261288d0622a38",
            "00-89ace864b2b31368359610792b23f650-60261288d0622a38-01-x",
            "00-89ace864b2b31368359610792b23f650-60261288d0622a38-01 ",
            "00-89ACE864b2b31368359610792b23f650-60261288d0622a38-01",
            "00-00000000000000000000000000000000-60261288d0622a38-01",
            "00-89ace864b2b31368359610792b23f650-0000000000000000-01",
            "ff-89ace864b2b31368359610792b23f650-60261288d0622a38-01",
            "00_89ace864b2b31368359610792b23f650_60261288d0622a38_01",
            "00-89ace864b2b31368359610792b23f65-060261288d0622a38-01",
            "00-89ace864b2b31368359610792b23f65☃-60261288d0622a3-01",
        ] {
            assert_eq!(TraceContext::parse(text), None, "{text}");
        }
        let later = "01-89ace864b2b31368359610792b23f650-60261288d0622a38-01-more";
        assert!(TraceContext::parse(later).is_some());
    }
}
