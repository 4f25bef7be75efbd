//! Headers by which a caller says what its prompt is, so that a router need not look into the body.
//!
//! Both hold base64 (the standard alphabet, with or without padding) of little-endian integers:
//!
//! | header | integers | from the first block or token on |
//! |---|---|---|
//! | [`BLOCK_HASHES`] | `u64`, one for each whole block | [`crate::event::block_hash`] of it |
//! | [`TOKEN_IDS`] | `u32`, one for each token | as the engine gets them |
//!
//! A front of the prompt is enough: what is not there counts as not cached. All headers of a
//! request together have room for about 6,000 hashes, or 12,000 tokens.

use base64::Engine;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};

use crate::json::Text;

/// Hashes of the prompt's blocks.
pub const BLOCK_HASHES: &str = "x-corelane-block-hashes";
/// Its tokens.
pub const TOKEN_IDS: &str = "x-corelane-token-ids";

/// Characters decoded at once: whole groups of 4, and whole integers of 8 bytes.
const CHUNK_CHARS: usize = 1024;
const CHUNK_BYTES: usize = CHUNK_CHARS / 4 * 3;

const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// A header that is not what it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// It is not base64.
    #[error("it is no base64 of the standard alphabet")]
    NotBase64,
    /// Its bytes are no whole number of integers.
    #[error("its bytes are not whole integers")]
    Partial,
}

/// Hands each integer of a header to `take`, which says whether it wants more; answers how many it
/// got.
///
/// # Errors
/// The header is wrong. What `take` got before is right as far as it goes.
pub fn read<const BYTES: usize>(
    value: Text<'_>,
    mut take: impl FnMut([u8; BYTES]) -> bool,
) -> Result<usize, HeaderError> {
    const { assert!(CHUNK_BYTES.is_multiple_of(BYTES)) };
    // Only a value with escapes, which no usual writer makes of base64, is copied.
    let text = value.to_cow();
    let mut decoded = [0; CHUNK_BYTES];
    let mut count = 0;
    for chunk in text.as_bytes().chunks(CHUNK_CHARS) {
        let bytes = BASE64.decode_slice(chunk, &mut decoded);
        let bytes = bytes.map_err(|_| HeaderError::NotBase64)?;
        let (integers, rest) = decoded[..bytes].as_chunks::<BYTES>();
        for integer in integers {
            count += 1;
            if !take(*integer) {
                return Ok(count);
            }
        }
        if !rest.is_empty() {
            return Err(HeaderError::Partial);
        }
    }
    Ok(count)
}

/// Writes hashes as [`BLOCK_HASHES`] has them.
#[must_use]
pub fn block_hashes(hashes: &[u64]) -> String {
    let bytes: Vec<u8> = hashes.iter().flat_map(|hash| hash.to_le_bytes()).collect();
    BASE64.encode(bytes)
}

/// Writes tokens as [`TOKEN_IDS`] has them.
#[must_use]
pub fn token_ids(tokens: &[u32]) -> String {
    let bytes: Vec<u8> = tokens.iter().flat_map(|id| id.to_le_bytes()).collect();
    BASE64.encode(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::headers;

    fn hashes(value: &str) -> Result<Vec<u64>, HeaderError> {
        let mut members = vec![];
        headers::write(&[(BLOCK_HASHES, value)], &mut members);
        let value = headers::find(&members, BLOCK_HASHES).unwrap();
        let mut all = vec![];
        read(value, |hash| {
            all.push(u64::from_le_bytes(hash));
            true
        })?;
        Ok(all)
    }

    #[test]
    fn reads_what_it_writes() {
        for count in [0, 1, 2, 95, 96, 97, 1000] {
            let all: Vec<u64> = (0..count)
                .map(|n: u64| n.wrapping_mul(u64::MAX / 7))
                .collect();
            let text = block_hashes(&all);
            assert_eq!(hashes(&text), Ok(all.clone()));
            assert_eq!(hashes(text.trim_end_matches('=')), Ok(all));
        }
        // The 8 bytes of one hash, and of two tokens.
        assert_eq!(block_hashes(&[1]), "AQAAAAAAAAA=");
        assert_eq!(token_ids(&[1, 0]), "AQAAAAAAAAA=");
    }

    #[test]
    fn says_what_is_wrong() {
        assert_eq!(hashes("AQAAAA"), Err(HeaderError::Partial));
        assert_eq!(hashes("AQ=AAAA"), Err(HeaderError::NotBase64));
        assert_eq!(hashes("A-_A"), Err(HeaderError::NotBase64));
        assert_eq!(hashes("ü"), Err(HeaderError::NotBase64));
    }

    #[test]
    fn escapes_and_an_early_end() {
        let headers = br#"{"x-corelane-block-hashes":"\/\/\/\/\/\/\/\/\/\/8="}"#;
        let value = headers::find(headers, BLOCK_HASHES).unwrap();
        let read = read(value, |hash| {
            assert_eq!(hash, [255; 8]);
            false
        });
        assert_eq!(read, Ok(1));
    }
}
