//! The router's hash of the tokens of a block (spec/events-discovery.md §3.8): XXH3-64 with a seed
//! over the tokens, four bytes each, little-endian. A block stands for itself; what comes before
//! it does not count.

use xxhash_rust::xxh3::{Xxh3, xxh3_64_with_seed};

/// The seed of the hash.
pub const BLOCK_HASH_SEED: u64 = 1337;

/// Tokens that are hashed in one go; larger blocks take a second one.
const TOKENS_AT_ONCE: usize = 64;

/// The hash of one block.
#[must_use]
pub fn block_hash(tokens: &[u32]) -> u64 {
    if tokens.len() > TOKENS_AT_ONCE {
        let mut hash = Xxh3::with_seed(BLOCK_HASH_SEED);
        for token in tokens {
            hash.update(&token.to_le_bytes());
        }
        return hash.digest();
    }
    let mut bytes = [0; 4 * TOKENS_AT_ONCE];
    for (bytes, token) in bytes.chunks_exact_mut(4).zip(tokens) {
        bytes.copy_from_slice(&token.to_le_bytes());
    }
    xxh3_64_with_seed(&bytes[..4 * tokens.len()], BLOCK_HASH_SEED)
}

/// The hashes of all whole blocks of `block_tokens` tokens; what is left at the end has none.
pub fn block_hashes(tokens: &[u32], block_tokens: usize) -> impl Iterator<Item = u64> {
    tokens.chunks_exact(block_tokens.max(1)).map(block_hash)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The values of spec/events-discovery.md §3.8.
    #[test]
    fn as_dynamo_hashes() {
        for (tokens, hash) in [
            ([1, 2, 3, 4], 14_643_705_804_678_351_452),
            ([5, 6, 7, 8], 16_777_012_769_546_811_212),
            ([2, 2, 2, 2], 11_189_908_752_501_997_813),
            ([2, 3, 2, 3], 12_574_851_434_110_851_480),
        ] {
            assert_eq!(block_hash(&tokens), hash, "{tokens:?}");
        }
    }

    #[test]
    fn whole_blocks_only() {
        let tokens = [1, 2, 3, 4, 5, 6, 7, 8, 9];
        let hashes: Vec<u64> = block_hashes(&tokens, 4).collect();
        assert_eq!(
            hashes,
            [block_hash(&tokens[..4]), block_hash(&tokens[4..8])]
        );
        assert_eq!(block_hashes(&tokens, 10).count(), 0);
        assert_eq!(block_hashes(&[], 0).count(), 0);
    }

    #[test]
    fn long_blocks_hash_as_their_bytes() {
        for tokens in [63, 64, 65, 1000] {
            let tokens: Vec<u32> = (0..tokens).collect();
            let bytes: Vec<u8> = tokens
                .iter()
                .flat_map(|token| token.to_le_bytes())
                .collect();
            assert_eq!(block_hash(&tokens), xxh3_64_with_seed(&bytes, 1337));
        }
    }
}
