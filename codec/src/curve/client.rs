//! The handshake of the side that asks for a server by its key.

use std::fmt;
use std::sync::Arc;

use crypto_box::SalsaBox;
use zeroize::Zeroizing;

use super::boxes::{self, CHANCE_BYTES, Pieces, drawn, numbered, shared};
use super::key::{KEY_BYTES, Keys, PublicKey};
use super::server::{COOKIE_BYTES, HELLO, HELLO_PADDING, INITIATE, READY, VOUCH, WELCOME, ZEROS};
use super::{CurveFault, Opened, Outcome, Seal};
use crate::zmtp;

/// Numbers of the two commands of a client's handshake.
const HELLO_NUMBER: u64 = 1;
const INITIATE_NUMBER: u64 = 2;

/// A client's handshake.
pub struct Client {
    own: Arc<Keys>,
    server: PublicKey,
    /// For this connection alone.
    brief: Keys,
    vouch: Zeroizing<[u8; CHANCE_BYTES]>,
    /// What is shared with the server's key for this connection, once it has welcomed us.
    welcomed: Option<SalsaBox>,
}

impl Client {
    /// Bytes of chance that a handshake needs.
    pub const CHANCE_BYTES: usize = KEY_BYTES + CHANCE_BYTES;

    /// A client with these keys, of the server that has this one. Appends its HELLO to `out`.
    ///
    /// # Errors
    /// None that occurs: a HELLO is never too long for its box.
    pub fn new(
        own: Arc<Keys>,
        server: PublicKey,
        chance: &[u8; Self::CHANCE_BYTES],
        out: &mut Vec<u8>,
    ) -> Result<Client, CurveFault> {
        let mut chance = Pieces::inside(chance, "chance");
        let brief = Keys::new(chance.cut()?);
        let mut data = vec![0; HELLO_PADDING];
        data[0] = 1;
        data.extend_from_slice(&brief.public().0);
        data.extend_from_slice(&HELLO_NUMBER.to_be_bytes());
        let key = shared(&server.0, &brief);
        boxes::put(&key, &numbered(HELLO, HELLO_NUMBER), &[&ZEROS], &mut data)?;
        zmtp::write_command("HELLO", &data, out);
        Ok(Client {
            own,
            server,
            brief,
            vouch: Zeroizing::new(*chance.cut()?),
            welcomed: None,
        })
    }

    /// Takes the body of a command of the server; what is to be said is appended to `out`.
    /// `properties` are those that our READY would have.
    ///
    /// # Errors
    /// It is another server, or speaks something else. The connection is to be closed.
    pub fn take(
        &mut self,
        body: &[u8],
        properties: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Outcome, CurveFault> {
        let Some(key) = self.welcomed.take() else {
            return self.welcome(body, properties, out);
        };
        let mut data = Pieces::of(body, "READY")?;
        let number = data.number()?;
        let properties = data.open(&key, &numbered(READY, number))?.to_vec();
        Ok(Outcome::Done(Box::new(Opened {
            seal: Seal::new(key, false, INITIATE_NUMBER, number),
            peer: self.server,
            properties,
        })))
    }

    fn welcome(
        &mut self,
        body: &[u8],
        properties: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Outcome, CurveFault> {
        let mut data = Pieces::of(body, "WELCOME")?;
        let nonce = drawn(WELCOME, data.cut()?);
        let plain = data.open(&shared(&self.server.0, &self.brief), &nonce)?;
        let mut plain = Pieces::inside(&plain, "WELCOME");
        let (theirs, cookie) = (plain.cut::<KEY_BYTES>()?, plain.cut::<COOKIE_BYTES>()?);
        if !plain.rest().is_empty() {
            return Err(CurveFault::Unexpected("WELCOME"));
        }
        // Only who has our own secret key can say that the key of this connection is ours.
        let mut vouch = Vec::new();
        let vouched = [&self.brief.public().0[..], &self.server.0];
        let nonce = drawn(VOUCH, &self.vouch);
        boxes::put(&shared(theirs, &self.own), &nonce, &vouched, &mut vouch)?;
        let own = self.own.public().0;
        let said = [&own[..], &self.vouch[..], &vouch, properties];
        let mut data = cookie.to_vec();
        data.extend_from_slice(&INITIATE_NUMBER.to_be_bytes());
        let key = shared(theirs, &self.brief);
        boxes::put(&key, &numbered(INITIATE, INITIATE_NUMBER), &said, &mut data)?;
        zmtp::write_command("INITIATE", &data, out);
        self.welcomed = Some(key);
        Ok(Outcome::More)
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("own", &self.own)
            .field("server", &self.server)
            .field("is_welcomed", &self.welcomed.is_some())
            .finish_non_exhaustive()
    }
}
