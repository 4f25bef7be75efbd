//! Reads `token_ids` out of a request's body while it comes, in pieces of any size: the one thing
//! of a body that a router may want to know (spec/request-plane.md §0.2, §13).
//!
//! ```text
//! JSON         {"model":"m","token_ids":[1,2,300],...}
//! MessagePack  {"model":"m","token_ids":[1,2,300],...}
//!              {"model":"m","token_ids": bin of int32, little-endian,...}   DYN_TOKEN_IDS_AS_BYTES
//! ```
//!
//! The first byte tells which of the two it is. What comes before the member is stepped over, what
//! follows is not looked at. It reads and does not check: a body that is broken elsewhere is
//! somebody else's to refuse.

mod json;
mod msgpack;

/// The member that is looked for.
const KEY: &[u8; 9] = b"token_ids";

/// How far a scan has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// The next bytes are wanted.
    More,
    /// All token ids were there, or no more of them are wanted.
    Done,
    /// The body has no such member, or it is null.
    Absent,
    /// The body is neither of the two, or the member is no list of token ids.
    Bad,
}

/// A scan of one body.
///
/// ```
/// use corelane_codec::token_ids::{Progress, Scan};
///
/// let (mut scan, mut tokens) = (Scan::new(), vec![]);
/// let mut take = |token| {
///     tokens.push(token);
///     true
/// };
/// assert_eq!(scan.push(br#"{"model":"m","token_ids":[1,2"#, &mut take), Progress::More);
/// assert_eq!(scan.push(br#"5,300],"max"#, &mut take), Progress::Done);
/// assert_eq!(tokens, [1, 25, 300]);
/// ```
#[derive(Debug, Clone)]
pub struct Scan(State);

#[derive(Debug, Clone)]
enum State {
    /// Nothing but blanks has come.
    Begin,
    Json(json::Json),
    MsgPack(msgpack::MsgPack),
    Over(Progress),
}

impl Default for Scan {
    fn default() -> Self {
        Self::new()
    }
}

impl Scan {
    /// A scan that has seen nothing.
    #[must_use]
    pub const fn new() -> Self {
        Self(State::Begin)
    }

    /// Takes the next bytes, and hands each token id to `take`, which says whether it wants more.
    /// After anything but [`Progress::More`] it takes nothing in any more.
    pub fn push(&mut self, mut bytes: &[u8], take: &mut impl FnMut(u32) -> bool) -> Progress {
        if let State::Begin = self.0 {
            while let [b' ' | b'\t' | b'\n' | b'\r', rest @ ..] = bytes {
                bytes = rest;
            }
            self.0 = match bytes.first() {
                None => return Progress::More,
                Some(b'{') => State::Json(json::Json::new()),
                Some(0x80..=0x8f | 0xde | 0xdf) => State::MsgPack(msgpack::MsgPack::new()),
                Some(_) => State::Over(Progress::Bad),
            };
        }
        let progress = match &mut self.0 {
            State::Json(json) => json.push(bytes, take),
            State::MsgPack(msgpack) => msgpack.push(bytes, take),
            State::Over(progress) => return *progress,
            State::Begin => Progress::More,
        };
        if progress != Progress::More {
            self.0 = State::Over(progress);
        }
        progress
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    /// Scans `body` in pieces that end at `cuts`.
    fn scan(body: &[u8], cuts: &[usize]) -> (Progress, Vec<u32>) {
        let (mut scan, mut tokens) = (Scan::new(), vec![]);
        let mut at = 0;
        let mut progress = Progress::More;
        for end in cuts.iter().copied().chain([body.len()]) {
            let end = end.clamp(at, body.len());
            progress = scan.push(&body[at..end], &mut |token| {
                tokens.push(token);
                true
            });
            at = end;
        }
        (progress, tokens)
    }

    fn msgpack(value: &impl serde::Serialize) -> Vec<u8> {
        rmp_serde::to_vec_named(value).unwrap()
    }

    #[test]
    fn finds_the_member_behind_and_before_others() {
        let body = json!({
            "a": {"token_ids": [9], "b": [1, [2, {"c": "}]\""}]]},
            "b\"": "{\"token_ids\":[7]}",
            "n": -1.5e3, "t": true, "z": null,
            "token_ids": [0, 1, 65_535, 4_294_967_295_u32],
            "zz": [1]
        });
        let want = (Progress::Done, vec![0, 1, 65_535, u32::MAX]);
        let text = serde_json::to_string_pretty(&body).unwrap();
        for body in [text.as_bytes(), &msgpack(&body)] {
            for cut in 0..body.len() {
                assert_eq!(scan(body, &[cut]), want, "{cut}");
            }
            let every: Vec<usize> = (0..body.len()).collect();
            assert_eq!(scan(body, &every), want);
        }
    }

    #[test]
    fn ids_may_be_one_blob() {
        let mut body = b"\x82\xa1a\xc4\x01x\xa9token_ids\xc4\x0b".to_vec();
        for token in [1_u32, 70_000] {
            body.extend(token.to_le_bytes());
        }
        // What is left of a fourth id is none.
        body.extend([1, 2, 3]);
        for cut in 0..body.len() {
            assert_eq!(scan(&body, &[cut]), (Progress::Done, vec![1, 70_000]));
        }
    }

    #[test]
    fn tells_what_is_absent_and_what_is_wrong() {
        use Progress::{Absent, Bad, Done, More};
        for (body, want) in [
            ("{}", Absent),
            (" \n", More),
            (r#"{"token_ids":null}"#, Absent),
            (r#"{"token_ids":[]}"#, Done),
            (r#"{"token_ids":[1,-2]}"#, Bad),
            (r#"{"token_ids":[1.5]}"#, Bad),
            (r#"{"token_ids":[4294967296]}"#, Bad),
            (r#"{"token_ids":"x"}"#, Bad),
            (r#"{"token_ids":{}}"#, Bad),
            (r#"{"token_ids":[,1]}"#, Bad),
            (r#"{"token_id":[1],"token_idss":[2]}"#, Absent),
            (r#"{"a":1"#, More),
            (r#"[1]"#, Bad),
            ("x", Bad),
        ] {
            assert_eq!(scan(body.as_bytes(), &[]).0, want, "{body}");
        }
        for (body, want) in [
            (&b"\x80"[..], Absent),
            (b"\x81\xa9token_ids\xc0", Absent),
            (b"\x81\xa9token_ids\x90", Done),
            (b"\x81\xa9token_ids\x91\xff", Bad),
            (b"\x81\xa9token_ids\x91\xcf\0\0\0\x01\0\0\0\0", Bad),
            (b"\x81\xa9token_ids\x91\xd3\0\0\0\0\0\0\0\x05", Done),
            (b"\x81\xa9token_ids\x05", Bad),
            (b"\x81\x05\x91\xc0", Absent),
            (b"\x81\x92\xa1x\x81\x01\x02\x03", Absent),
            (b"\x81\xc1", Bad),
            (b"\x82\xa1a\x01", More),
        ] {
            assert_eq!(scan(body, &[]).0, want, "{body:x?}");
        }
    }

    #[test]
    fn stops_when_enough_was_taken() {
        for body in [
            serde_json::to_vec(&json!({"token_ids": [1, 2, 3, 4]})).unwrap(),
            msgpack(&json!({"token_ids": [1, 2, 3, 4]})),
            b"\x81\xa9token_ids\xc4\x08\x01\0\0\0\x02\0\0\0".to_vec(),
        ] {
            let mut tokens = vec![];
            let progress = Scan::new().push(&body, &mut |token| {
                tokens.push(token);
                tokens.len() < 2
            });
            assert_eq!((progress, tokens), (Progress::Done, vec![1, 2]));
        }
    }

    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f32>().prop_map(|float| json!(float)),
            ".{0,12}".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 16, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map(".{0,10}", inner, 0..4)
                    .prop_map(|map| map.into_iter().collect()),
            ]
        })
    }

    proptest! {
        /// Whatever stands around it and wherever it is cut, the ids are those of serde's reader.
        #[test]
        fn reads_as_serde_does(
            before in prop::collection::btree_map("[a-s]{1,9}|[\"\\\\ü]{1,3}", value(), 0..4),
            after in prop::collection::btree_map("[u-z]{1,9}", value(), 0..3),
            tokens in prop::collection::vec(any::<u32>(), 0..40),
            pretty in any::<bool>(),
            cuts in prop::collection::vec(0_usize..400, 0..6),
        ) {
            let mut body = serde_json::Map::new();
            body.extend(before);
            body.insert("token_ids".into(), json!(tokens));
            body.extend(after);
            let text = match pretty {
                true => serde_json::to_vec_pretty(&body).unwrap(),
                false => serde_json::to_vec(&body).unwrap(),
            };
            let mut cuts = cuts;
            cuts.sort_unstable();
            prop_assert_eq!(scan(&text, &cuts), (Progress::Done, tokens.clone()));
            prop_assert_eq!(scan(&msgpack(&body), &cuts), (Progress::Done, tokens));
        }

        /// Cuts change nothing, whatever the bytes are.
        #[test]
        fn cuts_change_nothing(
            front in prop_oneof![
                Just(&b"{"[..]), Just(&b"{\"token_ids\":["[..]), Just(&b"\x83"[..]),
                Just(&b"\x81\xa9token_ids\x95"[..]), Just(&b""[..]),
            ],
            rest in prop::collection::vec(any::<u8>(), 0..80),
            cut in 0_usize..90,
        ) {
            let body = [front, &rest].concat();
            prop_assert_eq!(scan(&body, &[cut]), scan(&body, &[]));
        }
    }
}
