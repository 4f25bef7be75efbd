//! Keys, and their form as text: Z85 as ZMQ writes them, 40 characters (rfc.zeromq.org, 32).

use std::fmt;
use std::str::FromStr;

use crypto_box::SecretKey;
use thiserror::Error;

use super::Chance;

/// Bytes of a key.
pub const KEY_BYTES: usize = 32;
/// Characters of a key.
pub const SECRET_TEXT_BYTES: usize = 40;

const DIGITS: &[u8; 85] = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/\
*?&<>()[]{}@%$#";

/// Why a text is no key.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
pub enum KeyError {
    /// Another length.
    #[error("a CURVE key has 40 characters, this has {0}")]
    Length(usize),
    /// A character that Z85 does not have, or too large a number.
    #[error("character {0} of the CURVE key is none of Z85")]
    Digit(usize),
}

fn read(text: &str) -> Result<[u8; KEY_BYTES], KeyError> {
    let text = text.trim().as_bytes();
    if text.len() != SECRET_TEXT_BYTES {
        return Err(KeyError::Length(text.len()));
    }
    let mut key = [0; KEY_BYTES];
    for (place, group) in text.chunks(5).enumerate() {
        let mut value = 0_u64;
        for (at, digit) in group.iter().enumerate() {
            let digit_value = DIGITS.iter().position(|known| known == digit);
            let wrong = KeyError::Digit(5 * place + at + 1);
            value = 85 * value + digit_value.ok_or(wrong)? as u64;
        }
        let value = u32::try_from(value).map_err(|_| KeyError::Digit(5 * place + 5))?;
        key[4 * place..][..4].copy_from_slice(&value.to_be_bytes());
    }
    Ok(key)
}

fn write(key: &[u8; KEY_BYTES]) -> String {
    let mut text = String::with_capacity(SECRET_TEXT_BYTES);
    for group in key.as_chunks::<4>().0 {
        let value = u32::from_be_bytes(*group);
        for power in [85 * 85 * 85 * 85, 85 * 85 * 85, 85 * 85, 85, 1] {
            text.push(char::from(DIGITS[(value / power % 85) as usize]));
        }
    }
    text
}

/// A key that everybody may know.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct PublicKey(pub [u8; KEY_BYTES]);

impl FromStr for PublicKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        read(text).map(Self)
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&write(&self.0))
    }
}

/// A secret key, and the public one that belongs to it. It does not show itself.
#[derive(Clone)]
pub struct Keys {
    pub(super) secret: SecretKey,
}

impl Keys {
    /// New ones.
    pub fn draw(chance: Chance<'_>) -> Self {
        let mut secret = [0; KEY_BYTES];
        chance(&mut secret);
        Self {
            secret: SecretKey::from(secret),
        }
    }

    /// The public key.
    #[must_use]
    pub fn public(&self) -> PublicKey {
        PublicKey(*self.secret.public_key().as_bytes())
    }

    /// The secret key as text, for a file that nobody else may read.
    #[must_use]
    pub fn secret_text(&self) -> String {
        write(&self.secret.to_bytes())
    }
}

impl FromStr for Keys {
    type Err = KeyError;

    /// Reads the secret key.
    fn from_str(text: &str) -> Result<Self, KeyError> {
        let secret = SecretKey::from(read(text)?);
        Ok(Self { secret })
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Keys({})", self.public())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The pair of the documentation of libzmq's options.
    #[test]
    fn keys_are_written_as_zmq_writes_them() {
        let secret = "JTKVSB%%)wK0E.X)V>+}o?pNmC{O&4W4b!Ni{Lh6";
        let keys: Keys = secret.parse().unwrap();
        let public = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7";
        assert_eq!(keys.public().to_string(), public);
        assert_eq!(keys.secret_text(), secret);
        assert_eq!(public.parse::<PublicKey>(), Ok(keys.public()));
        assert!(!format!("{keys:?}").contains(secret));
    }

    #[test]
    fn what_is_no_key() {
        let wrong = |text: &str| text.parse::<PublicKey>().unwrap_err();
        assert_eq!(wrong("short"), KeyError::Length(5));
        assert_eq!(wrong(&"~".repeat(40)), KeyError::Digit(1));
        assert_eq!(wrong(&"#".repeat(40)), KeyError::Digit(5));
    }
}
