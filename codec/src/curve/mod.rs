//! CURVE, the mechanism of ZMTP that encrypts and knows its peers by their keys
//! (rfc.zeromq.org, 25 and 26; X25519, XSalsa20 and Poly1305): the handshake as both sides see it,
//! and the frames behind it.
//!
//! ```text
//! client  HELLO ------->                 made a key for this connection, and knows the server's
//!                       <------ WELCOME  the server's key for this connection, and a cookie
//!         INITIATE ---->                 the cookie, the client's own key and its vouch, metadata
//!                       <------ READY    the server's metadata
//! both    MESSAGE: 7 "MESSAGE" | number, 8 | box: tag, 16; flags, 1; body       one for each frame
//! ```
//!
//! Sans-IO as all of this crate: bytes in, bytes out, and chance comes from the caller. Nothing
//! that is received is believed before its box has been opened; tags are compared in constant
//! time, and what else is compared is either public or has come out of a box. Secrets are wiped
//! when they are dropped and are in no `Debug`.

mod boxes;
mod client;
pub(crate) mod fuzz;
mod key;
mod seal;
mod server;

pub use boxes::BOX_BYTES;
pub use client::Client;
pub use key::{KEY_BYTES, KEY_TEXT_BYTES, KeyError, Keys, PublicKey};
pub use seal::{SEAL_BYTES, Seal};
pub use server::Server;

use thiserror::Error;

/// Why a peer is not let in, or its bytes are not taken.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
pub enum CurveFault {
    /// A command of another kind or length than is needed next.
    #[error("CURVE: {0} was to come, and something else came")]
    Unexpected(&'static str),
    /// A box that does not open: another key was used, or somebody has changed it.
    #[error("CURVE: {0} cannot be opened; compare the keys of both sides")]
    Box(&'static str),
    /// A client whose key is not among those that are let in.
    #[error("CURVE: the client's key {0} is not among those that are allowed")]
    Stranger(PublicKey),
    /// A number that has been used: a message that came twice, or late.
    #[error("CURVE: a message came twice or out of order")]
    Replayed,
    /// All numbers are used up; the peers have to connect anew.
    #[error("CURVE: no numbers are left for messages of this connection")]
    Exhausted,
}

/// What a command of the handshake has led to.
#[derive(Debug)]
pub enum Outcome {
    /// The peer's next command is needed.
    More,
    /// The handshake is over.
    Done(Box<Opened>),
}

/// A connection that both sides have agreed on.
#[derive(Debug)]
pub struct Opened {
    /// What puts frames into boxes and takes them out.
    pub seal: Seal,
    /// The peer's own key; of a server the one that was asked for.
    pub peer: PublicKey,
    /// The peer's properties, as those of READY without CURVE; see [`crate::zmtp::property`].
    pub properties: Vec<u8>,
}

#[cfg(test)]
mod tests;
