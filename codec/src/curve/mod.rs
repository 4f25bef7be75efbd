//! CURVE, the mechanism of ZMTP that encrypts and knows its peers by their keys
//! (rfc.zeromq.org, 26; X25519, XSalsa20 and Poly1305): the handshake as both sides see it, and the
//! frames behind it.
//!
//! ```text
//! client   HELLO ----->                    proves that it has made a key for this connection
//!                      <----- WELCOME      the server's key for this connection, and a cookie
//!          INITIATE -->                    the cookie, the client's own key, its metadata
//!                      <----- READY        the server's metadata
//! both     MESSAGE: [07 "MESSAGE"] [nonce, 8] [box: flags, body]      one for each frame
//! ```
//!
//! Sans-IO as all of this crate: bytes in, bytes out, and chance comes from the caller. What is
//! received is never believed before its box has been opened.

mod handshake;
mod key;
mod seal;

pub use handshake::{Client, Opened, Outcome, Server};
pub use key::{KEY_BYTES, KeyError, Keys, PublicKey, SECRET_TEXT_BYTES};
pub use seal::Seal;

use thiserror::Error;

/// Where random bytes come from; the program ends if there are none.
pub type Chance<'a> = &'a mut dyn FnMut(&mut [u8]);

/// Why a peer is not let in, or its bytes are not taken.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
pub enum CurveFault {
    /// A command of another kind or length than the handshake needs next.
    #[error("CURVE: {0} was needed, and something else came")]
    Unexpected(&'static str),
    /// A box that does not open: another key was used, or somebody has changed it.
    #[error("CURVE: {0} cannot be opened; are the keys of both sides right?")]
    Box(&'static str),
    /// A client that nobody knows.
    #[error("CURVE: the client's key is not among those that are let in")]
    Stranger,
    /// A number that has been used: a repeated message.
    #[error("CURVE: a message came twice")]
    Replayed,
    /// All numbers are used up.
    #[error("CURVE: too many messages for one connection")]
    Exhausted,
}

/// Bytes that a box adds to what it holds.
const MAC_BYTES: usize = 16;

/// A nonce of a name and a number.
fn nonce(name: &[u8; 16], number: u64) -> crypto_box::Nonce {
    let mut nonce = crypto_box::Nonce::default();
    nonce[..16].copy_from_slice(name);
    nonce[16..].copy_from_slice(&number.to_be_bytes());
    nonce
}

/// A nonce of a name and chance.
fn long_nonce(name: &[u8; 8], random: &[u8; 16]) -> crypto_box::Nonce {
    let mut nonce = crypto_box::Nonce::default();
    nonce[..8].copy_from_slice(name);
    nonce[8..].copy_from_slice(random);
    nonce
}
