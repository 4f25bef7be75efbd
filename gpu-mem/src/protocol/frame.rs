//! Cuts a stream of bytes into frames and puts payloads into frames.

use thiserror::Error;

/// The length prefix: four bytes, big endian, not counting itself.
pub const PREFIX_BYTES: usize = 4;

/// The longest payload that a server accepts. Upstream's first generation has no limit and buffers
/// whatever is declared (hazard H5); its second has this one.
pub const REQUEST_BYTES_MAX: usize = 1 << 20;

/// The longest payload that our client accepts: a list of every allocation of a full pool.
pub const REPLY_BYTES_MAX: usize = 64 << 20;

/// What lies at the front of a buffer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Cut<'a> {
    /// A whole frame: its payload. It takes `PREFIX_BYTES + payload.len()` bytes.
    Frame(&'a [u8]),
    /// At least this many more bytes are missing.
    Need(usize),
    /// No frame can start here.
    Bad(FrameTooLarge),
}

/// The declared length is over the limit. Nothing was allocated for it.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
#[error("a frame of {declared} bytes is over the limit of {limit}")]
pub struct FrameTooLarge {
    /// What the prefix says.
    pub declared: usize,
    /// What is accepted.
    pub limit: usize,
}

/// Looks at the front of `bytes` for one frame of at most `payload_bytes_max`.
pub fn cut(bytes: &[u8], payload_bytes_max: usize) -> Cut<'_> {
    let Some((prefix, rest)) = bytes.split_first_chunk::<PREFIX_BYTES>() else {
        return Cut::Need(PREFIX_BYTES - bytes.len());
    };
    let declared = u32::from_be_bytes(*prefix) as usize;
    if declared > payload_bytes_max {
        return Cut::Bad(FrameTooLarge {
            declared,
            limit: payload_bytes_max,
        });
    }
    match rest.get(..declared) {
        Some(payload) => Cut::Frame(payload),
        None => Cut::Need(declared - rest.len()),
    }
}

/// Makes a frame whose payload is what `write` appends.
///
/// A payload cannot reach 4 GiB here: every table that goes into one is bounded far below.
pub(crate) fn build(write: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut bytes = vec![0; PREFIX_BYTES];
    write(&mut bytes);
    let payload_bytes = u32::try_from(bytes.len() - PREFIX_BYTES).unwrap_or(u32::MAX);
    bytes[..PREFIX_BYTES].copy_from_slice(&payload_bytes.to_be_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_prefix_of_a_frame_asks_for_what_is_missing() {
        let frame = build(|out| out.extend_from_slice(b"abc"));
        assert_eq!(cut(&frame, 3), Cut::Frame(b"abc"));
        assert_eq!(cut(&[], 3), Cut::Need(4));
        assert_eq!(cut(&frame[..3], 3), Cut::Need(1));
        assert_eq!(cut(&frame[..5], 3), Cut::Need(2));
    }

    #[test]
    fn a_declared_length_over_the_limit_is_refused_from_the_prefix_alone() {
        let bad = FrameTooLarge {
            declared: 0xffff_ffff,
            limit: 8,
        };
        assert_eq!(cut(&[0xff; 4], 8), Cut::Bad(bad));
    }

    #[test]
    fn an_empty_payload_is_a_frame_and_what_follows_is_left() {
        assert_eq!(cut(&[0, 0, 0, 0, 9, 9], 8), Cut::Frame(b""));
    }
}
