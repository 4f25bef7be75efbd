//! The prompt of the request that is being placed: the hashes of its blocks, from its headers, or
//! from its body where a route may look into that.

use corelane_codec::event::block_hash;
use corelane_codec::headers;
use corelane_codec::kv_headers::{self, BLOCK_HASHES, TOKEN_IDS};
use corelane_codec::token_ids::{Progress, Scan};

/// Blocks of a prompt that are looked at; the rest of a longer one counts as not cached.
pub const PROMPT_BLOCKS_MAX: usize = 8 * 1024;
/// Tokens of a block, at most.
pub const BLOCK_TOKENS_MAX: usize = 4096;

/// Where the hashes of a prompt came from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Source {
    /// Nothing is known of it.
    #[default]
    Nothing,
    /// Its headers.
    Headers,
    /// Its body.
    Body,
    /// A header or a body that should tell and cannot be read.
    Unreadable,
}

/// A prompt. Its memory is taken at start.
pub struct Prompt {
    hashes: Vec<u64>,
    tokens: Vec<u32>,
    source: Source,
}

impl Default for Prompt {
    fn default() -> Prompt {
        Prompt::new()
    }
}

impl Prompt {
    /// An empty one, without memory: most shards have no route that wants one.
    #[must_use]
    pub fn new() -> Prompt {
        Prompt {
            hashes: Vec::new(),
            tokens: Vec::new(),
            source: Source::Nothing,
        }
    }

    /// Takes the memory that prompts need.
    pub fn reserve(&mut self) {
        self.hashes.reserve_exact(PROMPT_BLOCKS_MAX);
        self.tokens.reserve_exact(BLOCK_TOKENS_MAX);
    }

    /// The hashes of its blocks.
    #[must_use]
    pub fn hashes(&self) -> &[u64] {
        &self.hashes
    }

    /// Where they came from.
    #[must_use]
    pub fn source(&self) -> Source {
        self.source
    }

    /// Forgets it.
    pub fn clear(&mut self) {
        self.hashes.clear();
        self.tokens.clear();
        self.source = Source::Nothing;
    }

    /// Takes hashes as they are.
    pub fn set(&mut self, hashes: &[u64]) {
        self.clear();
        let known = &hashes[..hashes.len().min(PROMPT_BLOCKS_MAX)];
        self.hashes.extend_from_slice(known);
        self.source = Source::Headers;
    }

    /// Reads what the headers of a request say. Hashes are believed before tokens.
    pub fn read_headers(&mut self, bytes: &[u8], block_tokens: u32) {
        self.clear();
        let read = match headers::find_all(bytes, [BLOCK_HASHES, TOKEN_IDS]) {
            [Some(hashes), _] => kv_headers::read(hashes, |hash| {
                self.hashes.push(u64::from_le_bytes(hash));
                self.hashes.len() < PROMPT_BLOCKS_MAX
            }),
            [None, Some(tokens)] => kv_headers::read(tokens, |token| {
                self.push(u32::from_le_bytes(token), block_tokens)
            }),
            [None, None] => return,
        };
        self.tokens.clear();
        self.source = match read {
            Ok(_) => Source::Headers,
            Err(_) => {
                self.hashes.clear();
                Source::Unreadable
            }
        };
    }

    /// Reads the token ids of a body that lies in pieces, of which no more than `bytes_max` bytes
    /// are looked at.
    pub fn read_body<'a>(
        &mut self,
        pieces: impl Iterator<Item = &'a [u8]>,
        bytes_max: usize,
        block_tokens: u32,
    ) {
        self.clear();
        let mut scan = Scan::new();
        let mut left = bytes_max;
        let mut progress = Progress::More;
        for piece in pieces {
            let here = piece.len().min(left);
            left -= here;
            progress = scan.push(&piece[..here], &mut |token| self.push(token, block_tokens));
            if progress != Progress::More || left == 0 {
                break;
            }
        }
        self.tokens.clear();
        self.source = match progress {
            Progress::Done => Source::Body,
            // The front of a long prompt is of use.
            Progress::More if !self.hashes.is_empty() => Source::Body,
            Progress::Absent => Source::Nothing,
            Progress::More | Progress::Bad => {
                self.hashes.clear();
                Source::Unreadable
            }
        };
    }

    /// One token more; answers whether another is wanted.
    fn push(&mut self, token: u32, block_tokens: u32) -> bool {
        self.tokens.push(token);
        if self.tokens.len() >= (block_tokens as usize).clamp(1, BLOCK_TOKENS_MAX) {
            self.hashes.push(block_hash(&self.tokens));
            self.tokens.clear();
        }
        self.hashes.len() < PROMPT_BLOCKS_MAX
    }
}

#[cfg(test)]
mod tests {
    use corelane_codec::event::block_hashes;

    use super::*;

    fn headers_of(members: &[(&str, &str)]) -> Vec<u8> {
        let mut bytes = vec![];
        headers::write(members, &mut bytes);
        bytes
    }

    #[test]
    fn headers_tell_hashes_or_tokens() {
        let tokens: Vec<u32> = (0..11).collect();
        let want: Vec<u64> = block_hashes(&tokens, 4).collect();
        let mut prompt = Prompt::new();
        let by_hash = kv_headers::block_hashes(&want);
        let by_token = kv_headers::token_ids(&tokens);
        for members in [
            vec![(BLOCK_HASHES, by_hash.as_str())],
            vec![(TOKEN_IDS, by_token.as_str())],
            vec![(TOKEN_IDS, "AQAAAA=="), (BLOCK_HASHES, by_hash.as_str())],
        ] {
            prompt.read_headers(&headers_of(&members), 4);
            assert_eq!(prompt.hashes(), want);
            assert_eq!(prompt.source(), Source::Headers);
        }
        prompt.read_headers(&headers_of(&[(TOKEN_IDS, "x")]), 4);
        assert_eq!(
            (prompt.hashes().len(), prompt.source()),
            (0, Source::Unreadable)
        );
        prompt.read_headers(b"{}", 4);
        assert_eq!(
            (prompt.hashes().len(), prompt.source()),
            (0, Source::Nothing)
        );
    }

    #[test]
    fn a_body_is_read_as_far_as_its_bound() {
        let tokens: Vec<u32> = (1000..1100).collect();
        let body = format!("{{\"model\":\"m\",\"token_ids\":{tokens:?},\"x\":1}}");
        let want: Vec<u64> = block_hashes(&tokens, 16).collect();
        let mut prompt = Prompt::new();
        for cut in [0, 7, 30, body.len()] {
            let (front, back) = body.as_bytes().split_at(cut);
            prompt.read_body([front, back].into_iter(), 64 << 10, 16);
            assert_eq!(
                (prompt.hashes(), prompt.source()),
                (&want[..], Source::Body)
            );
        }
        prompt.read_body([body.as_bytes()].into_iter(), 26 + 6 * 40, 16);
        assert_eq!(
            (prompt.hashes(), prompt.source()),
            (&want[..2], Source::Body)
        );
        prompt.read_body([body.as_bytes()].into_iter(), 20, 16);
        assert_eq!(prompt.source(), Source::Unreadable);
        prompt.read_body([&b"{}"[..]].into_iter(), 20, 16);
        assert_eq!(prompt.source(), Source::Nothing);
        prompt.read_body([&b"plain"[..]].into_iter(), 20, 16);
        assert_eq!(prompt.source(), Source::Unreadable);
    }

    #[test]
    fn long_prompts_end_at_the_bound() {
        let tokens: Vec<u32> = (0..PROMPT_BLOCKS_MAX as u32 + 5).collect();
        let body = format!("{{\"token_ids\":{tokens:?}}}");
        let mut prompt = Prompt::new();
        prompt.reserve();
        prompt.read_body([body.as_bytes()].into_iter(), usize::MAX, 1);
        assert_eq!(prompt.hashes().len(), PROMPT_BLOCKS_MAX);
    }
}
