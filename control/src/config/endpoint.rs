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

#[cfg(test)]
mod tests {
    use corelane_codec::path::EndpointId;

    use super::*;

    /// Three parts here must mean that the codec neither fills up nor joins.
    #[test]
    fn three_parts_are_what_the_codec_reads() {
        for text in ["a.b.c", "dyn://a/b/c", " /a//b..c/ "] {
            let three = EndpointId::new("a", "b", "c");
            assert_eq!(
                (parts(text).len(), EndpointId::parse(text)),
                (3, three),
                "{text}"
            );
        }
        for text in ["", "a", "a/b", "a/b/c/d"] {
            assert_ne!(parts(text).len(), 3, "{text}");
        }
    }

    #[test]
    fn plain_names() {
        assert!(is_plain("back_end-2"));
        for odd in ["", "Demo", "a b", "ü"] {
            assert!(!is_plain(odd), "{odd}");
        }
    }
}
