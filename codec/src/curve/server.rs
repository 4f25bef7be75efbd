//! The handshake of the side that has the key that clients ask for.
//!
//! Between WELCOME and INITIATE a server knows nothing of a client but the key of its cookie: the
//! keys of the connection are in the cookie, which the client brings back, and which is good for
//! this connection alone.

use std::fmt;
use std::sync::Arc;

use crypto_secretbox::{Key, KeyInit, XSalsa20Poly1305};
use zeroize::Zeroizing;

use super::boxes::{self, BOX_BYTES, CHANCE_BYTES, Pieces, drawn, numbered, shared};
use super::key::{KEY_BYTES, Keys, PublicKey};
use super::{CurveFault, Opened, Outcome, Seal};
use crate::zmtp;

// What nonces begin with.
pub(super) const HELLO: &[u8; 16] = b"CurveZMQHELLO---";
pub(super) const WELCOME: &[u8; 8] = b"WELCOME-";
const COOKIE: &[u8; 8] = b"COOKIE--";
pub(super) const INITIATE: &[u8; 16] = b"CurveZMQINITIATE";
pub(super) const VOUCH: &[u8; 8] = b"VOUCH---";
pub(super) const READY: &[u8; 16] = b"CurveZMQREADY---";

/// A cookie: chance, and a box with the client's and our key of this connection.
pub(super) const COOKIE_BYTES: usize = CHANCE_BYTES + BOX_BYTES + 2 * KEY_BYTES;
/// Version 1.0, and zeros so that a client sends more than it gets back.
pub(super) const HELLO_PADDING: usize = 74;
/// What is in the box of a HELLO.
pub(super) const ZEROS: [u8; 64] = [0; 64];
const READY_NUMBER: u64 = 1;

/// A server's handshake with one client.
pub struct Server {
    own: Arc<Keys>,
    step: Step,
}

enum Step {
    /// HELLO is to come.
    Greeted(Zeroizing<[u8; Server::CHANCE_BYTES]>),
    /// INITIATE is to come.
    Welcomed {
        cookie: Zeroizing<[u8; KEY_BYTES]>,
        number: u64,
    },
    /// It is over.
    Over,
}

impl Server {
    /// Bytes of chance that a handshake needs.
    pub const CHANCE_BYTES: usize = 2 * KEY_BYTES + 2 * CHANCE_BYTES;

    /// A server with these keys, for one connection.
    #[must_use]
    pub fn new(own: Arc<Keys>, chance: [u8; Self::CHANCE_BYTES]) -> Server {
        let step = Step::Greeted(Zeroizing::new(chance));
        Server { own, step }
    }

    /// Takes the body of a command of the client; what is to be said is appended to `out`.
    /// `properties` are those that our READY would have, `lets_in` knows the keys of clients.
    ///
    /// # Errors
    /// It is not let in, asks for a server with another key, or speaks something else. The
    /// connection is to be closed.
    pub fn take(
        &mut self,
        body: &[u8],
        properties: &[u8],
        lets_in: impl FnOnce(&PublicKey) -> bool,
        out: &mut Vec<u8>,
    ) -> Result<Outcome, CurveFault> {
        match std::mem::replace(&mut self.step, Step::Over) {
            Step::Greeted(chance) => self.hello(body, &chance, out),
            Step::Welcomed { cookie, number } => {
                let opened = self.initiate(body, &cookie, number)?;
                if !lets_in(&opened.peer) {
                    return Err(CurveFault::Stranger(opened.peer));
                }
                opened.welcome_in(properties, out)
            }
            Step::Over => Err(CurveFault::Unexpected("MESSAGE")),
        }
    }

    fn hello(
        &mut self,
        body: &[u8],
        chance: &[u8; Self::CHANCE_BYTES],
        out: &mut Vec<u8>,
    ) -> Result<Outcome, CurveFault> {
        let mut data = Pieces::of(body, "HELLO")?;
        if data.cut::<HELLO_PADDING>()?[..2] != [1, 0] {
            return Err(CurveFault::Unexpected("HELLO"));
        }
        let client = data.cut::<KEY_BYTES>()?;
        let number = data.number()?;
        let key = shared(client, &self.own);
        if data.open(&key, &numbered(HELLO, number))?[..] != ZEROS {
            return Err(CurveFault::Box("HELLO"));
        }
        let mut chance = Pieces::inside(chance, "chance");
        let (brief, cookie_key) = (Keys::new(chance.cut()?), chance.cut::<KEY_BYTES>()?);
        let (cookie_nonce, nonce) = (chance.cut::<CHANCE_BYTES>()?, chance.cut()?);
        let mut cookie = cookie_nonce.to_vec();
        let sealer = XSalsa20Poly1305::new(Key::from_slice(cookie_key));
        let remembered = [&client[..], &*brief.secret_bytes()];
        boxes::put(
            &sealer,
            &drawn(COOKIE, cookie_nonce),
            &remembered,
            &mut cookie,
        )?;
        let mut said = nonce.to_vec();
        let pieces = [&brief.public().0[..], &cookie];
        boxes::put(&key, &drawn(WELCOME, nonce), &pieces, &mut said)?;
        zmtp::write_command("WELCOME", &said, out);
        self.step = Step::Welcomed {
            cookie: Zeroizing::new(*cookie_key),
            number,
        };
        Ok(Outcome::More)
    }

    fn initiate(
        &self,
        body: &[u8],
        cookie_key: &[u8; KEY_BYTES],
        last_number: u64,
    ) -> Result<Initiated, CurveFault> {
        let mut data = Pieces::of(body, "INITIATE")?;
        let mut cookie = Pieces::inside(data.cut::<COOKIE_BYTES>()?, "INITIATE");
        let sealer = XSalsa20Poly1305::new(Key::from_slice(cookie_key));
        let nonce = drawn(COOKIE, cookie.cut()?);
        let remembered = boxes::unseal(&sealer, &nonce, cookie.rest());
        let remembered = remembered.ok_or(CurveFault::Box("the cookie"))?;
        let mut remembered = Pieces::inside(&remembered, "the cookie");
        let client = remembered.cut::<KEY_BYTES>()?;
        let brief = Keys::new(remembered.cut()?);
        let number = data.number()?;
        if number <= last_number {
            return Err(CurveFault::Replayed);
        }
        let key = shared(client, &brief);
        let said = data.open(&key, &numbered(INITIATE, number))?;
        let mut said = Pieces::inside(&said, "INITIATE");
        let theirs = said.cut::<KEY_BYTES>()?;
        let nonce = drawn(VOUCH, said.cut()?);
        let vouch = said.cut::<{ 2 * KEY_BYTES + BOX_BYTES }>()?;
        let vouch = boxes::unseal(&shared(theirs, &brief), &nonce, vouch);
        let vouched = [&client[..], &self.own.public().0].concat();
        if vouch.is_none_or(|vouch| *vouch != vouched) {
            return Err(CurveFault::Box("the client's vouch"));
        }
        Ok(Initiated {
            key,
            number,
            peer: PublicKey(*theirs),
            properties: said.rest().to_vec(),
        })
    }
}

/// A client that is who it says.
struct Initiated {
    key: crypto_box::SalsaBox,
    number: u64,
    peer: PublicKey,
    properties: Vec<u8>,
}

impl Initiated {
    fn welcome_in(self, properties: &[u8], out: &mut Vec<u8>) -> Result<Outcome, CurveFault> {
        let mut data = READY_NUMBER.to_be_bytes().to_vec();
        let nonce = numbered(READY, READY_NUMBER);
        boxes::put(&self.key, &nonce, &[properties], &mut data)?;
        zmtp::write_command("READY", &data, out);
        Ok(Outcome::Done(Box::new(Opened {
            seal: Seal::new(self.key, true, READY_NUMBER, self.number),
            peer: self.peer,
            properties: self.properties,
        })))
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let step = match self.step {
            Step::Greeted(_) => "HELLO is to come",
            Step::Welcomed { .. } => "INITIATE is to come",
            Step::Over => "over",
        };
        f.debug_struct("Server")
            .field("own", &self.own)
            .field("step", &step)
            .finish_non_exhaustive()
    }
}
