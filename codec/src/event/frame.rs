//! The frame of events on ZMQ, and on plain TCP (spec/events-discovery.md §3.3).
//!
//! ```text
//! 0         1           5
//! | version | bytes u32 | payload |       version 1; bytes big-endian
//! ```

use std::ops::Range;

use zerocopy::big_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::{Bad, Decoded, EncodeError, TooLarge};

/// The one version that there is.
pub const VERSION: u8 = 1;
/// Bytes before the payload.
pub const PREFIX_BYTES: usize = 5;
/// Most payload that the length field can say.
pub const PAYLOAD_BYTES_MAX: usize = u32::MAX as usize;
/// What readers of a stream allow when nothing else is said: a NATS server's own limit is 1 MiB.
pub const PAYLOAD_BYTES_MAX_DEFAULT: usize = 4 << 20;

/// The fixed part.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Prefix {
    /// [`VERSION`].
    pub version: u8,
    /// Bytes of payload that follow.
    pub payload_bytes: U32,
}

const _: () = assert!(size_of::<Prefix>() == PREFIX_BYTES);

impl Prefix {
    /// The prefix of a frame with such a payload.
    ///
    /// # Errors
    /// The length does not fit its field; Dynamo's sender would cut it off in silence.
    pub fn new(payload_bytes: usize) -> Result<Self, EncodeError> {
        let bytes = u32::try_from(payload_bytes).map_err(|_| EncodeError::PayloadTooLong {
            bytes: payload_bytes,
        })?;
        Ok(Self {
            version: VERSION,
            payload_bytes: U32::new(bytes),
        })
    }
}

/// Why a message that is there as a whole is no frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Fewer bytes than the prefix has.
    #[error("event frame of {bytes} bytes; its prefix alone has 5")]
    TooShort {
        /// How many there are.
        bytes: usize,
    },
    /// Another version.
    #[error("event frame of version {version}; 1 is understood")]
    Version {
        /// The first byte.
        version: u8,
    },
    /// The frame says more than there is.
    #[error("event frame says {declared} bytes of payload and has {bytes}")]
    Truncated {
        /// What it says.
        declared: u32,
        /// What is there.
        bytes: usize,
    },
}

/// The payload of a frame that is a whole message. Bytes after the payload are ignored, as Dynamo
/// does.
///
/// # Errors
/// See [`FrameError`]; Dynamo drops such a message, and so should its reader.
#[inline]
pub fn payload(message: &[u8]) -> Result<&[u8], FrameError> {
    let Ok((prefix, rest)) = Prefix::ref_from_prefix(message) else {
        let bytes = message.len();
        return Err(FrameError::TooShort { bytes });
    };
    if prefix.version != VERSION {
        let version = prefix.version;
        return Err(FrameError::Version { version });
    }
    let declared = prefix.payload_bytes.get();
    rest.get(..declared as usize).ok_or(FrameError::Truncated {
        declared,
        bytes: rest.len(),
    })
}

/// Reads one frame from a stream and says where its payload is; the next one starts at its end.
/// `payload_bytes_max` bounds what a peer may declare; exactly that is allowed.
pub fn decode(input: &[u8], payload_bytes_max: usize) -> Decoded<Range<usize>> {
    let Ok((prefix, rest)) = Prefix::ref_from_prefix(input) else {
        return Decoded::Need(PREFIX_BYTES);
    };
    if prefix.version != VERSION {
        let version = prefix.version;
        return Decoded::Bad(Bad::EventVersion { version });
    }
    let bytes = prefix.payload_bytes.get() as usize;
    if bytes > payload_bytes_max {
        return Decoded::Bad(Bad::TooLarge(TooLarge {
            frame_bytes: (PREFIX_BYTES + bytes) as u64,
            max_bytes: payload_bytes_max.saturating_add(PREFIX_BYTES) as u64,
        }));
    }
    let end = PREFIX_BYTES + bytes;
    if rest.len() < bytes {
        return Decoded::Need(end);
    }
    Decoded::Frame(PREFIX_BYTES..end)
}

/// Appends a frame.
///
/// # Errors
/// The payload does not fit the length field; nothing has been written then.
pub fn write(payload: &[u8], out: &mut Vec<u8>) -> Result<(), EncodeError> {
    let prefix = Prefix::new(payload.len())?;
    out.reserve(PREFIX_BYTES + payload.len());
    out.extend_from_slice(prefix.as_bytes());
    out.extend_from_slice(payload);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame() -> Vec<u8> {
        let mut out = vec![];
        write(b"abc", &mut out).unwrap();
        out
    }

    /// Each row of spec/events-discovery.md §3.3.
    #[test]
    fn whole_messages() {
        assert_eq!(frame(), b"\x01\x00\x00\x00\x03abc");
        assert_eq!(payload(&frame()), Ok(&b"abc"[..]));
        // Bytes after the payload are ignored.
        assert_eq!(payload(b"\x01\0\0\0\x03abcdef"), Ok(&b"abc"[..]));
        assert_eq!(payload(b"\x01\0\0\0\0"), Ok(&b""[..]));
        let version = payload(b"\x02\0\0\0\x03abc").unwrap_err();
        assert_eq!(version, FrameError::Version { version: 2 });
        for bytes in 0..PREFIX_BYTES {
            let short = payload(&frame()[..bytes]).unwrap_err();
            assert_eq!(short, FrameError::TooShort { bytes });
        }
        for bytes in 0..3 {
            let short = payload(&frame()[..PREFIX_BYTES + bytes]).unwrap_err();
            assert_eq!(short, FrameError::Truncated { declared: 3, bytes });
        }
        // A little-endian length is a huge one: 90 = 0x5a.
        let little = payload(b"\x01\x5a\0\0\0").unwrap_err();
        let declared = 1_509_949_440;
        assert_eq!(little, FrameError::Truncated { declared, bytes: 0 });
        assert_eq!(
            little.to_string(),
            "event frame says 1509949440 bytes of payload and has 0"
        );
    }

    #[test]
    fn streams() {
        let mut two = frame();
        two.extend(frame());
        assert_eq!(decode(&two, 3), Decoded::Frame(5..8));
        assert_eq!(decode(&two[8..], 3), Decoded::Frame(5..8));
        for have in 0..8 {
            let need = if have < 5 { 5 } else { 8 };
            assert_eq!(decode(&two[..have], 3), Decoded::Need(need), "{have}");
        }
        // Judged before the payload has come.
        assert_eq!(
            decode(b"\x02\0\0\0\x09", 3),
            Decoded::Bad(Bad::EventVersion { version: 2 })
        );
        let Decoded::Bad(Bad::TooLarge(large)) = decode(&two, 2) else {
            panic!("three bytes of payload, two allowed");
        };
        assert_eq!((large.frame_bytes, large.max_bytes), (8, 7));
        // Nothing is set aside for what is merely declared.
        let declared = b"\x01\xff\xff\xff\xff";
        assert_eq!(
            decode(declared, usize::MAX),
            Decoded::Need(5 + u32::MAX as usize)
        );
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        assert!(Prefix::new(PAYLOAD_BYTES_MAX).is_ok());
        assert_eq!(
            Prefix::new(1 << 32).unwrap_err(),
            EncodeError::PayloadTooLong { bytes: 1 << 32 }
        );
    }
}
