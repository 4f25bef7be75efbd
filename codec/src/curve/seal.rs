//! Frames in boxes, once the handshake is over.

use crypto_box::SalsaBox;
use crypto_box::aead::Aead;

use super::{CurveFault, MAC_BYTES, nonce};
use crate::zmtp;

const NAME: &[u8; 8] = b"\x07MESSAGE";
const FROM_CLIENT: &[u8; 16] = b"CurveZMQMESSAGEC";
const FROM_SERVER: &[u8; 16] = b"CurveZMQMESSAGES";
/// Before the box: the name and the number.
const FRONT_BYTES: usize = NAME.len() + 8;
const MORE: u8 = 1;
const COMMAND: u8 = 2;

/// Bytes that a frame becomes longer by, its head not counted.
pub(super) const SEAL_BYTES: usize = FRONT_BYTES + MAC_BYTES + 1;

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

    /// Most bytes that the body of a frame on the wire has whose body inside has `bytes`.
    #[must_use]
    pub fn body_bytes_max(bytes: usize) -> usize {
        bytes.saturating_add(SEAL_BYTES)
    }

    /// Appends a frame with this one in a box.
    ///
    /// # Errors
    /// [`CurveFault::Exhausted`].
    pub fn seal(
        &mut self,
        head: &zmtp::Head,
        body: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(), CurveFault> {
        self.sent = self.sent.checked_add(1).ok_or(CurveFault::Exhausted)?;
        let name = if self.is_server { FROM_SERVER } else { FROM_CLIENT };
        let mut plain = Vec::with_capacity(1 + body.len());
        plain.push(u8::from(head.more) * MORE | u8::from(head.command) * COMMAND);
        plain.extend_from_slice(body);
        let sealed = self.shared.encrypt(&nonce(name, self.sent), &plain[..]);
        let sealed = sealed.map_err(|_| CurveFault::Exhausted)?;
        zmtp::write_head(FRONT_BYTES + sealed.len(), false, out);
        out.extend_from_slice(NAME);
        out.extend_from_slice(&self.sent.to_be_bytes());
        out.extend_from_slice(&sealed);
        Ok(())
    }

    /// Appends the frame that is in the box of this body.
    ///
    /// # Errors
    /// It is no MESSAGE, it was repeated or changed.
    pub fn open(&mut self, body: &[u8], out: &mut Vec<u8>) -> Result<(), CurveFault> {
        let front = body.split_first_chunk::<FRONT_BYTES>();
        let Some((front, sealed)) = front.filter(|(front, _)| front.starts_with(NAME)) else {
            return Err(CurveFault::Unexpected("MESSAGE"));
        };
        let number = front.last_chunk().map_or(0, |number| u64::from_be_bytes(*number));
        if number <= self.received {
            return Err(CurveFault::Replayed);
        }
        let name = if self.is_server { FROM_CLIENT } else { FROM_SERVER };
        let plain = self.shared.decrypt(&nonce(name, number), sealed);
        let plain = plain.map_err(|_| CurveFault::Box("MESSAGE"))?;
        let Some((flags, inner)) = plain.split_first() else {
            return Err(CurveFault::Box("MESSAGE"));
        };
        self.received = number;
        let head = zmtp::Head {
            command: flags & COMMAND != 0,
            more: flags & MORE != 0,
            head_bytes: 0,
            body_bytes: inner.len(),
        };
        zmtp::write_frame_head(&head, out);
        out.extend_from_slice(inner);
        Ok(())
    }
}
