//! Frames in boxes, once the handshake is over.
//!
//! ```text
//! on the wire   head | 7 "MESSAGE" | number, 8 | tag, 16 | flags, 1   body
//! opened                                         unused | head, 2 or 9  body      same memory
//! ```
//!
//! A frame is opened where it lies: what is in the way of its body is longer than a head, so that
//! the frame can be left in front of the body as if it had come without CURVE.

use std::fmt;
use std::ops::Range;

use crypto_box::SalsaBox;

use super::CurveFault;
use super::boxes::{self, BOX_BYTES, NUMBER_BYTES, numbered};
use crate::zmtp::{self, HEAD_BYTES_MAX, Head};

const NAME: &[u8; 8] = b"\x07MESSAGE";
const FROM_CLIENT: &[u8; 16] = b"CurveZMQMESSAGEC";
const FROM_SERVER: &[u8; 16] = b"CurveZMQMESSAGES";
/// Before the box: the name and the number.
const FRONT_BYTES: usize = NAME.len() + NUMBER_BYTES;
const MORE: u8 = 1;
const COMMAND: u8 = 2;

/// Bytes that the body of a frame becomes longer by.
pub const SEAL_BYTES: usize = FRONT_BYTES + BOX_BYTES + 1;

/// The keys of an open connection, and the numbers that have been used.
pub struct Seal {
    shared: SalsaBox,
    is_server: bool,
    sent: u64,
    received: u64,
}

impl Seal {
    pub(super) fn new(shared: SalsaBox, is_server: bool, sent: u64, received: u64) -> Seal {
        Seal {
            shared,
            is_server,
            sent,
            received,
        }
    }

    /// For tests: as if all numbers had been used.
    #[cfg(test)]
    pub(super) fn use_up(&mut self) {
        self.sent = u64::MAX;
    }

    /// Appends a frame with this one in a box.
    ///
    /// # Errors
    /// [`CurveFault::Exhausted`].
    pub fn seal(&mut self, head: &Head, body: &[u8], out: &mut Vec<u8>) -> Result<(), CurveFault> {
        let number = self.sent.checked_add(1).ok_or(CurveFault::Exhausted)?;
        let name = if self.is_server {
            FROM_SERVER
        } else {
            FROM_CLIENT
        };
        let more = if head.more { MORE } else { 0 };
        let flags = if head.command { more | COMMAND } else { more };
        out.reserve(HEAD_BYTES_MAX + SEAL_BYTES + body.len());
        zmtp::write_head(SEAL_BYTES + body.len(), false, out);
        out.extend_from_slice(NAME);
        out.extend_from_slice(&number.to_be_bytes());
        let nonce = numbered(name, number);
        boxes::put(&self.shared, &nonce, &[&[flags], body], out)?;
        self.sent = number;
        Ok(())
    }

    /// Opens a whole frame that begins with `head`, and says where in it the frame lies that was
    /// in its box: its beginning is written anew, its body stays where it is.
    ///
    /// # Errors
    /// It is no MESSAGE, or was made with other keys, repeated or changed; its bytes are then
    /// worth nothing any more.
    pub fn open(&mut self, head: &Head, frame: &mut [u8]) -> Result<Range<usize>, CurveFault> {
        let unexpected = CurveFault::Unexpected("MESSAGE");
        let body = frame.get_mut(head.head_bytes..).ok_or(unexpected)?;
        let (front, sealed) = body
            .split_first_chunk_mut::<FRONT_BYTES>()
            .filter(|(front, _)| front.starts_with(NAME) && !head.more)
            .ok_or(unexpected)?;
        let number = front.last_chunk().ok_or(unexpected)?;
        let number = u64::from_be_bytes(*number);
        if number <= self.received {
            return Err(CurveFault::Replayed);
        }
        let name = if self.is_server {
            FROM_CLIENT
        } else {
            FROM_SERVER
        };
        let inside = boxes::open(&self.shared, &numbered(name, number), sealed);
        let inside = inside.ok_or(CurveFault::Box("MESSAGE"))?;
        let (&mut flags, inner) = inside.split_first_mut().ok_or(unexpected)?;
        if flags & !(MORE | COMMAND) != 0 {
            return Err(unexpected);
        }
        let inner_bytes = inner.len();
        self.received = number;
        let opened = Head {
            command: flags & COMMAND != 0,
            more: flags & MORE != 0,
            head_bytes: 0,
            body_bytes: inner_bytes,
        };
        let (written, bytes) = opened.written();
        let end = frame.len();
        let start = end - inner_bytes - bytes;
        frame[start..start + bytes].copy_from_slice(&written[..bytes]);
        Ok(start..end)
    }
}

impl fmt::Debug for Seal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Seal")
            .field("is_server", &self.is_server)
            .field("sent", &self.sent)
            .field("received", &self.received)
            .finish_non_exhaustive()
    }
}
