//! Keys, and their form as text: Z85 as ZMQ writes them, 40 characters (rfc.zeromq.org, 32).

use std::fmt;
use std::str::FromStr;

use crypto_box::SecretKey;
use thiserror::Error;
use zeroize::Zeroizing;

/// Bytes of a key.
pub const KEY_BYTES: usize = 32;
/// Characters of a key as text.
pub const KEY_TEXT_BYTES: usize = 40;

/// Characters that stand for four bytes.
const GROUP: usize = 5;
const DIGITS: &[u8; 85] = b"0123456789abcdefghijklmnopqrstuvwxyz\
                            ABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#";

/// Why a text is no key.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
pub enum KeyError {
    /// Another length.
    #[error("a CURVE key is 40 characters of Z85, as ZMQ writes it; this has {0}")]
    Length(usize),
    /// A character that Z85 does not have, or the last one of too large a number.
    #[error("character {0} of the CURVE key does not belong there; Z85 is what ZMQ writes keys in")]
    Digit(usize),
}

fn read(text: &str) -> Result<Zeroizing<[u8; KEY_BYTES]>, KeyError> {
    let text = text.trim().as_bytes();
    if text.len() != KEY_TEXT_BYTES {
        return Err(KeyError::Length(text.len()));
    }
    let mut key = Zeroizing::new([0; KEY_BYTES]);
    for (place, group) in text.chunks(GROUP).enumerate() {
        let mut value = 0;
        for (at, character) in group.iter().enumerate() {
            let digit = DIGITS.iter().position(|digit| digit == character);
            let digit = digit.ok_or(KeyError::Digit(GROUP * place + at + 1))?;
            value = 85 * value + digit as u64;
        }
        let value = u32::try_from(value).map_err(|_| KeyError::Digit(GROUP * (place + 1)))?;
        key[4 * place..][..4].copy_from_slice(&value.to_be_bytes());
    }
    Ok(key)
}

fn write(key: &[u8; KEY_BYTES]) -> String {
    let mut text = String::with_capacity(KEY_TEXT_BYTES);
    for group in key.as_chunks::<4>().0 {
        let value = u32::from_be_bytes(*group);
        for power in (0..GROUP as u32).rev() {
            let digit = value / 85_u32.pow(power) % 85;
            text.push(char::from(DIGITS[digit as usize]));
        }
    }
    text
}

/// A key that everybody may know. Its text is Z85, which [`FromStr`] reads.
#[derive(Clone, Copy, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct PublicKey(pub [u8; KEY_BYTES]);

impl FromStr for PublicKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        read(text).map(|key| Self(*key))
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&write(&self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({self})")
    }
}

/// A secret key and the public one that belongs to it. It does not show itself, and is wiped when
/// it is dropped. [`FromStr`] reads the secret key's Z85.
#[derive(Clone)]
pub struct Keys {
    secret: SecretKey,
    public: PublicKey,
}

impl Keys {
    /// Those of a secret key: 32 bytes of chance.
    #[must_use]
    pub fn new(secret: &[u8; KEY_BYTES]) -> Self {
        let secret = SecretKey::from(*secret);
        let public = PublicKey(*secret.public_key().as_bytes());
        Self { secret, public }
    }

    /// The public key.
    #[must_use]
    pub fn public(&self) -> PublicKey {
        self.public
    }

    pub(super) fn secret(&self) -> &SecretKey {
        &self.secret
    }

    pub(super) fn secret_bytes(&self) -> Zeroizing<[u8; KEY_BYTES]> {
        Zeroizing::new(self.secret.to_bytes())
    }

    /// The secret key as text, for a file that nobody else may read.
    #[must_use]
    pub fn secret_text(&self) -> Zeroizing<String> {
        Zeroizing::new(write(&self.secret_bytes()))
    }
}

impl FromStr for Keys {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        read(text).map(|secret| Self::new(&secret))
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keys")
            .field("public", &self.public)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The pair of the manual page of libzmq's zmq_curve.
    #[test]
    fn keys_are_written_as_zmq_writes_them() {
        let secret = "JTKVSB%%)wK0E.X)V>+}o?pNmC{O&4W4b!Ni{Lh6";
        let keys: Keys = secret.parse().unwrap();
        let public = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7";
        assert_eq!(keys.public().to_string(), public);
        assert_eq!(*keys.secret_text(), secret);
        assert_eq!(public.parse::<PublicKey>(), Ok(keys.public()));
        assert_eq!(
            format!(" {public}\n").parse::<PublicKey>(),
            Ok(keys.public())
        );
        let shown = format!("{keys:?}");
        assert!(shown.contains(public) && !shown.contains(secret), "{shown}");
    }

    #[test]
    fn what_is_no_key() {
        let wrong = |text: &str| text.parse::<PublicKey>().unwrap_err();
        assert_eq!(wrong("short"), KeyError::Length(5));
        assert_eq!(wrong(&"~".repeat(40)), KeyError::Digit(1));
        assert_eq!(wrong(&"#".repeat(40)), KeyError::Digit(5));
        assert_eq!(
            wrong(&format!("{}\u{fc}", "0".repeat(38))),
            KeyError::Digit(39)
        );
    }

    #[test]
    fn every_byte_is_kept() {
        for byte in 0..=255 {
            let key = PublicKey([byte; KEY_BYTES]);
            assert_eq!(key.to_string().parse(), Ok(key));
        }
    }
}
