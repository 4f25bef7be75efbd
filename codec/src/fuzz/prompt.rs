//! Hooks for what a router may learn of a prompt.

use serde::Deserialize;

use crate::json::Value;
use crate::kv_headers::{self, HeaderError};
use crate::token_ids::{Progress, Scan};

/// The body as serde's derived reader sees it.
#[derive(Deserialize)]
struct Derived {
    token_ids: Vec<u32>,
}

fn scan<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> (Progress, Vec<u32>) {
    let (mut scan, mut tokens) = (Scan::new(), vec![]);
    let mut progress = Progress::More;
    for piece in pieces {
        progress = scan.push(piece, &mut |token| {
            tokens.push(token);
            true
        });
    }
    (progress, tokens)
}

/// Token ids in bodies: cuts change nothing, and whatever serde reads is read alike.
pub fn token_ids(data: &[u8]) {
    let read = scan([data].into_iter());
    assert_eq!(scan(data.chunks(1)), read);
    assert_eq!(scan(data.chunks(7)), read);
    let is_json = data.trim_ascii_start().first() == Some(&b'{');
    let derived = match is_json {
        // A key may be escaped, which only serde looks through.
        true if data.contains(&b'\\') => return,
        true => serde_json::from_slice::<Derived>(data).ok(),
        false => rmp_serde::from_slice::<Derived>(data).ok(),
    };
    if let (Some(derived), Progress::Done) = (derived, read.0) {
        let is_same = read.1 == derived.token_ids;
        assert!(is_same || Some(&read.1) == blob(&derived.token_ids).as_ref());
    }
}

/// Token ids of a blob, which serde gives byte by byte.
fn blob(bytes: &[u32]) -> Option<Vec<u32>> {
    let bytes: Vec<u8> = bytes
        .iter()
        .map(|byte| u8::try_from(*byte).ok())
        .collect::<Option<_>>()?;
    let tokens = bytes
        .chunks(4)
        .map(|token| Some(u32::from_le_bytes(token.try_into().ok()?)));
    tokens.collect()
}

/// Values of the headers for hashes and token ids.
pub fn kv_headers(data: &[u8]) {
    let Some(text) = Value::parse(data).ok().and_then(|value| value.text().ok()) else {
        return;
    };
    let mut hashes = vec![];
    let read = kv_headers::read(text, |hash| {
        hashes.push(u64::from_le_bytes(hash));
        true
    });
    let mut tokens = vec![];
    let as_tokens = kv_headers::read(text, |token| {
        tokens.push(u32::from_le_bytes(token));
        true
    });
    match read {
        Ok(count) => {
            assert_eq!((count, as_tokens), (hashes.len(), Ok(2 * count)));
            let again = kv_headers::block_hashes(&hashes);
            assert_eq!(again, kv_headers::token_ids(&tokens));
        }
        Err(HeaderError::NotBase64) => assert_eq!(as_tokens, read),
        Err(HeaderError::Partial) => assert_ne!(as_tokens, Err(HeaderError::NotBase64)),
    }
}
