//! The request frame, frontend to worker (spec/request-plane.md §2.2, §2.4).
//!
//! ```text
//! 0      2        2+P    4+P         4+P+H   8+P+H
//! | P u16 | path P | H u16 | headers H | N u32 | payload N |      all integers big-endian
//! |<---------------- prefix ------------------>|
//! ```

use std::ops::Range;

use zerocopy::big_endian::{U16, U32};
use zerocopy::{FromBytes, IntoBytes};

use crate::limits::{HEADERS_BYTES_MAX, PATH_BYTES_MAX, REQUEST_FIXED_BYTES};
use crate::{Bad, Decoded, EncodeError, TooLarge, headers};

/// Everything of a request frame but its payload, as offsets into the decoded input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prefix {
    /// Where the endpoint path is. Not checked to be UTF-8.
    pub path: Range<usize>,
    /// Where the headers JSON is; empty if the frame has none. Not checked to be JSON.
    pub headers: Range<usize>,
    /// Declared payload length N.
    pub payload_bytes: u32,
    /// 8 + P + H: where the payload starts.
    pub prefix_bytes: usize,
}

impl Prefix {
    /// Bytes of the whole frame: prefix and payload.
    #[must_use]
    pub fn frame_bytes(&self) -> u64 {
        self.prefix_bytes as u64 + u64::from(self.payload_bytes)
    }

    /// Where the payload is, in an input that holds the whole frame.
    #[must_use]
    pub fn payload(&self) -> Range<usize> {
        self.prefix_bytes..self.prefix_bytes + self.payload_bytes as usize
    }
}

/// Reads the prefix of a request frame as a Dynamo server does: it judges neither the size, nor
/// the path, nor the headers. It never answers `Bad`; the payload need not have arrived.
pub fn decode_prefix(input: &[u8]) -> Decoded<Prefix> {
    let Ok((path_bytes, rest)) = U16::read_from_prefix(input) else {
        return Decoded::Need(REQUEST_FIXED_BYTES);
    };
    let path = 2..2 + usize::from(path_bytes.get());
    let Some((headers_bytes, _)) = rest
        .get(path.len()..)
        .and_then(|rest| U16::read_from_prefix(rest).ok())
    else {
        return Decoded::Need(REQUEST_FIXED_BYTES + path.len());
    };
    let headers = path.end + 2..path.end + 2 + usize::from(headers_bytes.get());
    let prefix_bytes = headers.end + 4;
    let Some((payload_bytes, _)) = input
        .get(headers.end..)
        .and_then(|rest| U32::read_from_prefix(rest).ok())
    else {
        return Decoded::Need(prefix_bytes);
    };
    Decoded::Frame(Prefix {
        path,
        headers,
        payload_bytes: payload_bytes.get(),
        prefix_bytes,
    })
}

/// Compares the whole frame with the receiver's limit (`DYN_TCP_MAX_MESSAGE_SIZE`).
///
/// # Errors
/// The frame is larger than `max_bytes`; equal is allowed.
pub fn check_size(prefix: &Prefix, max_bytes: u64) -> Result<(), TooLarge> {
    let frame_bytes = prefix.frame_bytes();
    if frame_bytes > max_bytes {
        return Err(TooLarge {
            frame_bytes,
            max_bytes,
        });
    }
    Ok(())
}

/// A complete request frame that passed the strict rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Endpoint path.
    pub path: &'a str,
    /// Headers: a JSON object of strings.
    pub headers: &'a [u8],
    /// The two-part envelope.
    pub payload: &'a [u8],
    /// Bytes of the whole frame; what follows in the input is the next one.
    pub frame_bytes: usize,
}

/// Reads a whole frame by the rules of Dynamo's one-shot decoder, which is stricter than its
/// server: the path must be UTF-8 and the headers a JSON object of strings (H = 0 is an error).
/// Bytes after the frame are ignored. It knows no size limit.
pub fn decode_strict(input: &[u8]) -> Decoded<Frame<'_>> {
    let prefix = match decode_prefix(input) {
        Decoded::Frame(prefix) => prefix,
        Decoded::Need(bytes) => return Decoded::Need(bytes),
        Decoded::Bad(bad) => return Decoded::Bad(bad),
    };
    let path = match std::str::from_utf8(&input[prefix.path.clone()]) {
        Ok(path) => path,
        Err(error) => {
            let at = error.valid_up_to();
            return Decoded::Bad(Bad::PathNotUtf8 { at });
        }
    };
    let headers = &input[prefix.headers.clone()];
    if !headers::is_valid(headers) {
        return Decoded::Bad(Bad::HeadersNotJson);
    }
    let whole = prefix.payload();
    match input.get(whole.clone()) {
        Some(payload) => Decoded::Frame(Frame {
            path,
            headers,
            payload,
            frame_bytes: whole.end,
        }),
        None => Decoded::Need(whole.end),
    }
}

/// Bytes that come before the payload of a frame with such a path and headers.
#[must_use]
pub fn prefix_bytes(path: &[u8], headers: &[u8]) -> usize {
    REQUEST_FIXED_BYTES + path.len() + headers.len()
}

/// Checks that the three parts fit their length fields.
fn lengths(path: &[u8], headers: &[u8], payload: usize) -> Result<(U16, U16, U32), EncodeError> {
    if path.len() > PATH_BYTES_MAX {
        return Err(EncodeError::PathTooLong { bytes: path.len() });
    }
    if headers.len() > HEADERS_BYTES_MAX {
        let bytes = headers.len();
        return Err(EncodeError::HeadersTooLong { bytes });
    }
    let Ok(payload_bytes) = u32::try_from(payload) else {
        return Err(EncodeError::PayloadTooLong { bytes: payload });
    };
    // Both were compared with u16::MAX above.
    Ok((
        U16::new(path.len() as u16),
        U16::new(headers.len() as u16),
        U32::new(payload_bytes),
    ))
}

/// Appends the prefix of a frame whose payload of `payload_bytes` bytes the caller sends itself.
///
/// # Errors
/// A part does not fit its length field.
pub fn write_prefix(
    path: &[u8],
    headers: &[u8],
    payload_bytes: usize,
    out: &mut Vec<u8>,
) -> Result<(), EncodeError> {
    let (path_len, headers_len, payload_len) = lengths(path, headers, payload_bytes)?;
    out.reserve(prefix_bytes(path, headers));
    out.extend_from_slice(path_len.as_bytes());
    out.extend_from_slice(path);
    out.extend_from_slice(headers_len.as_bytes());
    out.extend_from_slice(headers);
    out.extend_from_slice(payload_len.as_bytes());
    Ok(())
}

/// Writes the prefix to the start of `out` and says how many bytes that took.
///
/// # Errors
/// A part does not fit its length field, or `out` is too short.
pub fn write_prefix_into(
    path: &[u8],
    headers: &[u8],
    payload_bytes: usize,
    out: &mut [u8],
) -> Result<usize, EncodeError> {
    let (path_len, headers_len, payload_len) = lengths(path, headers, payload_bytes)?;
    let need_bytes = prefix_bytes(path, headers);
    if out.len() < need_bytes {
        return Err(EncodeError::BufferTooShort {
            need_bytes,
            have_bytes: out.len(),
        });
    }
    let mut at = 0;
    for part in [
        path_len.as_bytes(),
        path,
        headers_len.as_bytes(),
        headers,
        payload_len.as_bytes(),
    ] {
        out[at..at + part.len()].copy_from_slice(part);
        at += part.len();
    }
    Ok(need_bytes)
}

/// Appends a whole frame.
///
/// # Errors
/// A part does not fit its length field.
pub fn write_frame(
    path: &[u8],
    headers: &[u8],
    payload: &[u8],
    out: &mut Vec<u8>,
) -> Result<(), EncodeError> {
    write_prefix(path, headers, payload.len(), out)?;
    out.extend_from_slice(payload);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame() -> Vec<u8> {
        let mut out = Vec::new();
        write_frame(b"test", br#"{"a":"b"}"#, b"12345", &mut out).unwrap();
        out
    }

    #[test]
    fn need_is_exact_at_every_length() {
        let bytes = frame();
        assert_eq!(bytes.len(), 26);
        for have in 0..21 {
            let want = match have {
                0..2 => 8,
                2..8 => 12,
                _ => 21,
            };
            assert_eq!(decode_prefix(&bytes[..have]), Decoded::Need(want), "{have}");
            assert_eq!(decode_strict(&bytes[..have]), Decoded::Need(want), "{have}");
        }
        for have in 21..26 {
            assert_eq!(decode_strict(&bytes[..have]), Decoded::Need(26), "{have}");
        }
        let prefix = decode_prefix(&bytes[..21]).frame().unwrap();
        assert_eq!((prefix.path.clone(), prefix.headers.clone()), (2..6, 8..17));
        assert_eq!((prefix.prefix_bytes, prefix.frame_bytes()), (21, 26));
        assert_eq!(decode_strict(&bytes).frame().unwrap().payload, b"12345");
    }

    #[test]
    fn size_limit_counts_the_whole_frame() {
        let prefix = decode_prefix(&frame()).frame().unwrap();
        assert_eq!(check_size(&prefix, 26), Ok(()));
        let error = check_size(&prefix, 25).unwrap_err();
        assert_eq!(
            error.to_string(),
            "message too large: 26 bytes (max: 25 bytes)"
        );
    }

    #[test]
    fn the_strict_decoder_judges_path_and_headers() {
        let mut bytes = Vec::new();
        write_frame(b"a\xff", b"{}", b"", &mut bytes).unwrap();
        assert_eq!(
            decode_strict(&bytes),
            Decoded::Bad(Bad::PathNotUtf8 { at: 1 })
        );
        assert!(decode_prefix(&bytes).frame().is_some());
        bytes.clear();
        write_frame(b"a", b"", b"", &mut bytes).unwrap();
        assert_eq!(decode_strict(&bytes), Decoded::Bad(Bad::HeadersNotJson));
        assert!(decode_prefix(&bytes).frame().unwrap().headers.is_empty());
    }

    #[test]
    fn writers_agree_and_refuse_what_does_not_fit() {
        let mut out = vec![];
        write_prefix(b"p", b"{}", 3, &mut out).unwrap();
        let mut slice = [0; 11];
        assert_eq!(write_prefix_into(b"p", b"{}", 3, &mut slice), Ok(11));
        assert_eq!(out, slice);
        assert_eq!(
            write_prefix_into(b"p", b"{}", 3, &mut slice[..10]),
            Err(EncodeError::BufferTooShort {
                need_bytes: 11,
                have_bytes: 10
            })
        );
        let long = vec![b'a'; 65_536];
        out.clear();
        assert_eq!(
            write_prefix(&long, b"", 0, &mut out),
            Err(EncodeError::PathTooLong { bytes: 65_536 })
        );
        assert_eq!(
            write_prefix(b"", &long, 0, &mut out),
            Err(EncodeError::HeadersTooLong { bytes: 65_536 })
        );
        assert_eq!(
            write_prefix(b"", b"", 1 << 32, &mut out),
            Err(EncodeError::PayloadTooLong { bytes: 1 << 32 })
        );
        assert!(out.is_empty(), "a refused frame leaves nothing behind");
    }
}
