//! The headers of a request frame: a JSON object, string to string (spec/request-plane.md §2.3).
//!
//! Reading is as lenient as Dynamo's server: headers that are not such an object count as none.

use memchr::{memchr, memmem};

use crate::json::{MapWriter, Object, Text};

/// Repeats the frame's path.
pub const ENDPOINT_PATH: &str = "x-endpoint-path";
/// The context id, for logs.
pub const REQUEST_ID: &str = "request-id";
/// Read where [`REQUEST_ID`] is missing.
pub const REQUEST_ID_FALLBACK: &str = "x-dynamo-request-id";
/// Unix time in nanoseconds, decimal, taken just before the send.
pub const FRONTEND_SEND_TS_NS: &str = "x-frontend-send-ts-ns";
/// W3C trace context.
pub const TRACEPARENT: &str = "traceparent";
/// W3C vendor state.
pub const TRACESTATE: &str = "tracestate";
/// A client's own request id.
pub const CLIENT_REQUEST_ID: &str = "x-request-id";

/// Headers of a frame that has none to send.
pub const NONE: &[u8] = b"{}";

/// The value of `key`. `None` if it is absent, or if the headers are not a JSON object of strings.
/// Of a repeated key the last counts, as in a map that is filled in order.
#[must_use]
pub fn find<'a>(headers: &'a [u8], key: &str) -> Option<Text<'a>> {
    let [value] = find_all(headers, [key]);
    value
}

/// The values of several keys in one walk, in the order of `keys`. All `None` if the headers are
/// not a JSON object of strings.
#[must_use]
pub fn find_all<'a, const N: usize>(headers: &'a [u8], keys: [&str; N]) -> [Option<Text<'a>>; N] {
    let mut found = [None; N];
    let valid = walk(headers, |key, value| {
        if let Some(at) = keys.iter().position(|wanted| key == *wanted) {
            found[at] = Some(value);
        }
    });
    // Even a last member that is wrong voids them all: the server keeps no half-read map.
    if valid { found } else { [None; N] }
}

/// A header that every request is asked for and few have: that it is not there takes a search for
/// its name, not a walk.
#[derive(Debug)]
pub struct Rare {
    key: &'static str,
    search: memmem::Finder<'static>,
}

impl Rare {
    /// The one with this key.
    #[must_use]
    pub fn new(key: &'static str) -> Self {
        let search = memmem::Finder::new(key);
        Self { key, search }
    }

    /// What [`find`] finds.
    #[must_use]
    pub fn find<'a>(&self, headers: &'a [u8]) -> Option<Text<'a>> {
        // Behind an escape its name may hide.
        let may_be_there = self.search.find(headers).is_some() || memchr(b'\\', headers).is_some();
        may_be_there.then(|| find(headers, self.key)).flatten()
    }
}

/// True if the headers are a JSON object of strings, which only the strict decoder asks for.
#[must_use]
pub fn is_valid(headers: &[u8]) -> bool {
    walk(headers, |_, _| {})
}

/// Hands each member to `each`, in order, and says whether the whole is a JSON object of strings.
pub fn walk<'a>(headers: &'a [u8], mut each: impl FnMut(Text<'a>, Text<'a>)) -> bool {
    let Ok(mut object) = Object::open(headers) else {
        return false;
    };
    loop {
        match object.next_member() {
            Ok(Some(member)) => match member.value.text() {
                Ok(value) => each(member.key, value),
                Err(_) => return false,
            },
            Ok(None) => return true,
            Err(_) => return false,
        }
    }
}

/// Appends headers; keys must differ.
pub fn write(members: &[(&str, &str)], out: &mut Vec<u8>) {
    let mut map = MapWriter::new(out);
    for (key, value) in members {
        map.member(key, value);
    }
    map.finish();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_last_of_a_repeated_key() {
        let headers = br#"{"a":"1","b":"x\ty","a":"2"}"#;
        assert!(find(headers, "a").unwrap() == "2");
        assert!(find(headers, "b").unwrap() == "x\ty");
        assert!(find(headers, "c").is_none());
        let [b, c, a] = find_all(headers, ["b", "c", "a"]);
        assert!(b.is_some() && c.is_none() && a.unwrap() == "2");
    }

    #[test]
    fn a_rare_key_is_found_however_it_is_written() {
        let rare = Rare::new(TRACEPARENT);
        for headers in [
            r#"{"traceparent":"x"}"#,
            r#"{"a":"traceparent","traceparent":"y","traceparent":"x"}"#,
            r#"{"trace\u0070arent":"x"}"#,
        ] {
            assert!(rare.find(headers.as_bytes()).unwrap() == "x", "{headers}");
        }
        for headers in [
            "",
            r#"{"tracestate":"x"}"#,
            r#"{"a":"traceparent"}"#,
            r#"{"traceparent":"x"#,
        ] {
            assert!(rare.find(headers.as_bytes()).is_none(), "{headers}");
        }
    }

    #[test]
    fn anything_but_a_string_map_counts_as_none() {
        for headers in [
            "",
            "{",
            "[]",
            "null",
            r#"{"a":"1","n":5}"#,
            r#"{"a":"1"}x"#,
            r#"{"a":"1","b":null}"#,
            r#"{"a":"1","b":"\ud800"}"#,
        ] {
            assert!(find(headers.as_bytes(), "a").is_none(), "{headers}");
            assert!(!is_valid(headers.as_bytes()));
        }
        assert!(is_valid(b" {} "));
    }

    #[test]
    fn writes_what_it_reads() {
        let mut out = vec![];
        write(&[("k", "quote\" ☃"), ("empty", "")], &mut out);
        assert!(find(&out, "k").unwrap() == "quote\" ☃");
        assert!(find(&out, "empty").unwrap().is_empty());
        out.clear();
        write(&[], &mut out);
        assert_eq!(out, NONE);
    }
}
