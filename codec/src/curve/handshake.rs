//! Both sides of the handshake, each a step for each command of the peer.

use crypto_box::aead::Aead;
use crypto_box::{PublicKey as Public, SalsaBox};

use super::key::{KEY_BYTES, Keys, PublicKey};
use super::{Chance, CurveFault, MAC_BYTES, Seal, long_nonce, nonce};
use crate::zmtp;

const HELLO: &[u8; 16] = b"CurveZMQHELLO---";
const WELCOME: &[u8; 8] = b"WELCOME-";
const INITIATE: &[u8; 16] = b"CurveZMQINITIATE";
const VOUCH: &[u8; 8] = b"VOUCH---";
const READY: &[u8; 16] = b"CurveZMQREADY---";

/// The server's memory of a client, which only it can read; ours is in the connection, so this is
/// nothing but chance.
const COOKIE_BYTES: usize = 96;
const COUNT_BYTES: usize = 8;
const RANDOM_BYTES: usize = 16;
/// Version 1.0, and zeros so that a client sends more than it gets back.
const HELLO_PADDING: usize = 74;
const ZEROS: [u8; 64] = [0; 64];

/// What a command has led to.
pub enum Outcome {
    /// The peer's next command is needed.
    More,
    /// The handshake is over.
    Done(Box<Opened>),
}

/// A connection that both sides have agreed on.
pub struct Opened {
    /// What frames are put into boxes with.
    pub seal: Seal,
    /// The peer's own key; of a server the one that was asked for.
    pub peer: PublicKey,
    /// The peer's properties, as in READY without CURVE.
    pub properties: Vec<u8>,
}

fn box_of(theirs: &[u8; KEY_BYTES], ours: &Keys) -> SalsaBox {
    SalsaBox::new(&Public::from(*theirs), &ours.secret)
}

fn seal(shared: &SalsaBox, nonce: &crypto_box::Nonce, plain: &[u8]) -> Vec<u8> {
    // It fails only beyond 2^38 bytes.
    shared.encrypt(nonce, plain).unwrap_or_default()
}

fn unseal(
    shared: &SalsaBox,
    nonce: &crypto_box::Nonce,
    sealed: &[u8],
    what: &'static str,
) -> Result<Vec<u8>, CurveFault> {
    let plain = shared.decrypt(nonce, sealed);
    plain.map_err(|_| CurveFault::Box(what))
}

/// Takes fixed pieces off the front of a command.
struct Cutter<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> Cutter<'a> {
    /// The data of the command of this name.
    fn new(body: &'a [u8], what: &'static str) -> Result<Self, CurveFault> {
        let named = body.split_first();
        let named = named.filter(|(length, _)| usize::from(**length) == what.len());
        let rest = named.and_then(|(_, rest)| rest.strip_prefix(what.as_bytes()));
        let rest = rest.ok_or(CurveFault::Unexpected(what))?;
        Ok(Self { rest, what })
    }

    fn cut<const N: usize>(&mut self) -> Result<&'a [u8; N], CurveFault> {
        let cut = self.rest.split_first_chunk();
        let (piece, rest) = cut.ok_or(CurveFault::Unexpected(self.what))?;
        self.rest = rest;
        Ok(piece)
    }

    fn count(&mut self) -> Result<u64, CurveFault> {
        self.cut::<COUNT_BYTES>().map(|bytes| u64::from_be_bytes(*bytes))
    }
}

/// The side that dials.
pub struct Client {
    own: Keys,
    server: PublicKey,
    brief: Keys,
    /// Once it has welcomed us.
    welcomed: Option<SalsaBox>,
}

impl Client {
    /// A client with its own keys, of the server that has this key. Appends its HELLO.
    pub fn new(own: &Keys, server: PublicKey, chance: Chance<'_>, out: &mut Vec<u8>) -> Client {
        let brief = Keys::draw(chance);
        let mut data = vec![0; HELLO_PADDING];
        data[0] = 1;
        data.extend_from_slice(&brief.public().0);
        data.extend_from_slice(&1_u64.to_be_bytes());
        let shared = box_of(&server.0, &brief);
        data.extend_from_slice(&seal(&shared, &nonce(HELLO, 1), &ZEROS));
        zmtp::write_command("HELLO", &data, out);
        Client {
            own: own.clone(),
            server,
            brief,
            welcomed: None,
        }
    }

    /// Takes the body of a command of the server; what is to be said is appended. `properties` are
    /// those of our READY.
    ///
    /// # Errors
    /// It is another server, or speaks something else.
    pub fn take(
        &mut self,
        body: &[u8],
        properties: &[u8],
        chance: Chance<'_>,
        out: &mut Vec<u8>,
    ) -> Result<Outcome, CurveFault> {
        let Some(shared) = self.welcomed.take() else {
            return self.welcome(body, properties, chance, out);
        };
        let mut data = Cutter::new(body, "READY")?;
        let number = data.count()?;
        let properties = unseal(&shared, &nonce(READY, number), data.rest, "READY")?;
        // HELLO and INITIATE were the first two.
        let seal = Seal::new(shared, false, 2, number);
        let peer = self.server;
        Ok(Outcome::Done(Box::new(Opened {
            seal,
            peer,
            properties,
        })))
    }

    fn welcome(
        &mut self,
        body: &[u8],
        properties: &[u8],
        chance: Chance<'_>,
        out: &mut Vec<u8>,
    ) -> Result<Outcome, CurveFault> {
        let mut data = Cutter::new(body, "WELCOME")?;
        let random = data.cut::<RANDOM_BYTES>()?;
        let first = box_of(&self.server.0, &self.brief);
        let plain = unseal(&first, &long_nonce(WELCOME, random), data.rest, "WELCOME")?;
        let mut plain = Cutter {
            rest: &plain,
            what: "WELCOME",
        };
        let (theirs, cookie) = (plain.cut::<KEY_BYTES>()?, plain.cut::<COOKIE_BYTES>()?);
        let shared = box_of(theirs, &self.brief);
        let mut random = [0; RANDOM_BYTES];
        chance(&mut random);
        let vouch = [self.brief.public().0, self.server.0].concat();
        let vouch = seal(&box_of(theirs, &self.own), &long_nonce(VOUCH, &random), &vouch);
        let own = self.own.public().0;
        let said = [&own[..], &random, &vouch, properties].concat();
        let mut data = cookie.to_vec();
        data.extend_from_slice(&2_u64.to_be_bytes());
        data.extend_from_slice(&seal(&shared, &nonce(INITIATE, 2), &said));
        zmtp::write_command("INITIATE", &data, out);
        self.welcomed = Some(shared);
        Ok(Outcome::More)
    }
}

/// The side that is dialled.
pub struct Server {
    own: Keys,
    brief: Keys,
    cookie: [u8; COOKIE_BYTES],
    /// The client's key for this connection.
    client: Option<[u8; KEY_BYTES]>,
    number: u64,
}

impl Server {
    /// A server with its own keys, for one connection.
    pub fn new(own: &Keys, chance: Chance<'_>) -> Server {
        let mut cookie = [0; COOKIE_BYTES];
        chance(&mut cookie);
        Server {
            own: own.clone(),
            brief: Keys::draw(chance),
            cookie,
            client: None,
            number: 0,
        }
    }

    /// Takes the body of a command of the client; what is to be said is appended. `properties` are
    /// those of our READY, `lets_in` knows the keys of clients.
    ///
    /// # Errors
    /// It is not let in, uses another key for us, or speaks something else.
    pub fn take(
        &mut self,
        body: &[u8],
        properties: &[u8],
        lets_in: &dyn Fn(PublicKey) -> bool,
        chance: Chance<'_>,
        out: &mut Vec<u8>,
    ) -> Result<Outcome, CurveFault> {
        let Some(client) = self.client else {
            return self.hello(body, chance, out);
        };
        let mut data = Cutter::new(body, "INITIATE")?;
        let cookie = data.cut::<COOKIE_BYTES>()?;
        let number = data.count()?;
        let shared = box_of(&client, &self.brief);
        let said = unseal(&shared, &nonce(INITIATE, number), data.rest, "INITIATE")?;
        if *cookie != self.cookie || number <= self.number {
            return Err(CurveFault::Replayed);
        }
        let mut said = Cutter {
            rest: &said,
            what: "INITIATE",
        };
        let (theirs, random) = (said.cut::<KEY_BYTES>()?, said.cut::<RANDOM_BYTES>()?);
        let sealed = said.cut::<{ 2 * KEY_BYTES + MAC_BYTES }>()?;
        let vouch = box_of(theirs, &self.brief);
        let vouch = unseal(&vouch, &long_nonce(VOUCH, random), sealed, "the vouch")?;
        if vouch != [client, self.own.public().0].concat() {
            return Err(CurveFault::Box("the vouch"));
        }
        let peer = PublicKey(*theirs);
        if !lets_in(peer) {
            return Err(CurveFault::Stranger);
        }
        let mut data = 1_u64.to_be_bytes().to_vec();
        data.extend_from_slice(&seal(&shared, &nonce(READY, 1), properties));
        zmtp::write_command("READY", &data, out);
        Ok(Outcome::Done(Box::new(Opened {
            seal: Seal::new(shared, true, 1, number),
            peer,
            properties: said.rest.to_vec(),
        })))
    }

    fn hello(
        &mut self,
        body: &[u8],
        chance: Chance<'_>,
        out: &mut Vec<u8>,
    ) -> Result<Outcome, CurveFault> {
        let mut data = Cutter::new(body, "HELLO")?;
        let version = data.cut::<HELLO_PADDING>()?;
        if version[0] != 1 {
            return Err(CurveFault::Unexpected("HELLO"));
        }
        let client = data.cut::<KEY_BYTES>()?;
        self.number = data.count()?;
        let shared = box_of(client, &self.own);
        let zeros = unseal(&shared, &nonce(HELLO, self.number), data.rest, "HELLO")?;
        if zeros != ZEROS {
            return Err(CurveFault::Box("HELLO"));
        }
        let mut random = [0; RANDOM_BYTES];
        chance(&mut random);
        let said = [&self.brief.public().0[..], &self.cookie].concat();
        let said = seal(&shared, &long_nonce(WELCOME, &random), &said);
        zmtp::write_command("WELCOME", &[&random[..], &said].concat(), out);
        self.client = Some(*client);
        Ok(Outcome::More)
    }
}
