//! Boxes as they lie in commands, and the pieces that commands are cut into.

use crypto_box::SalsaBox;
use crypto_box::aead::consts::{U16, U24};
use crypto_box::aead::{AeadCore, AeadInPlace};
use zeroize::Zeroizing;

use super::CurveFault;
use super::key::{KEY_BYTES, Keys};

/// Bytes that a box adds to what it holds: its tag, which comes first.
pub const BOX_BYTES: usize = 16;
/// Bytes of a number on the wire.
pub(super) const NUMBER_BYTES: usize = 8;
/// Bytes of chance in the nonce of a box without a number.
pub(super) const CHANCE_BYTES: usize = 16;

type Nonce = crypto_box::Nonce;

/// A nonce of a name and a number.
pub(super) fn numbered(name: &[u8; 16], number: u64) -> Nonce {
    let mut nonce = Nonce::default();
    nonce[..16].copy_from_slice(name);
    nonce[16..].copy_from_slice(&number.to_be_bytes());
    nonce
}

/// A nonce of a name and chance.
pub(super) fn drawn(name: &[u8; 8], chance: &[u8; CHANCE_BYTES]) -> Nonce {
    let mut nonce = Nonce::default();
    nonce[..8].copy_from_slice(name);
    nonce[8..].copy_from_slice(chance);
    nonce
}

/// What `ours` shares with whoever has the secret half of `theirs`.
pub(super) fn shared(theirs: &[u8; KEY_BYTES], ours: &Keys) -> SalsaBox {
    SalsaBox::new(&crypto_box::PublicKey::from(*theirs), ours.secret())
}

/// A cipher of boxes: of two keys, or of one that nobody else has.
pub(super) trait Sealer: AeadInPlace + AeadCore<NonceSize = U24, TagSize = U16> {}
impl<T: AeadInPlace + AeadCore<NonceSize = U24, TagSize = U16>> Sealer for T {}

/// Appends a box with these pieces in it.
pub(super) fn put(
    sealer: &impl Sealer,
    nonce: &Nonce,
    pieces: &[&[u8]],
    out: &mut Vec<u8>,
) -> Result<(), CurveFault> {
    let bytes = pieces.iter().map(|piece| piece.len()).sum::<usize>();
    // Space for all of it at once: what is not sealed yet is not to lie about in freed memory.
    out.reserve(BOX_BYTES + bytes);
    let tag_at = out.len();
    out.extend_from_slice(&[0; BOX_BYTES]);
    for piece in pieces {
        out.extend_from_slice(piece);
    }
    let (tag, plain) = out[tag_at..].split_at_mut(BOX_BYTES);
    // It fails only for what is too long for the cipher, far beyond any frame.
    let sealed = sealer.encrypt_in_place_detached(nonce, &[], plain);
    tag.copy_from_slice(&sealed.map_err(|_| CurveFault::Exhausted)?);
    Ok(())
}

/// Opens a box where it lies; `None`: it was made with other keys, or changed.
pub(super) fn open<'a>(
    sealer: &impl Sealer,
    nonce: &Nonce,
    sealed: &'a mut [u8],
) -> Option<&'a mut [u8]> {
    let (tag, inside) = sealed.split_first_chunk_mut::<BOX_BYTES>()?;
    let tag = (*tag).into();
    let opened = sealer.decrypt_in_place_detached(nonce, &[], inside, &tag);
    opened.is_ok().then_some(inside)
}

/// The rest of a command, taken apart from its front on.
pub(super) struct Pieces<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> Pieces<'a> {
    /// The data of the command of this name, from a command's body.
    pub(super) fn of(body: &'a [u8], what: &'static str) -> Result<Self, CurveFault> {
        let named = body.split_first();
        let named = named.filter(|(length, _)| usize::from(**length) == what.len());
        let rest = named.and_then(|(_, rest)| rest.strip_prefix(what.as_bytes()));
        let rest = rest.ok_or(CurveFault::Unexpected(what))?;
        Ok(Self { rest, what })
    }

    /// What has come out of a box of that command.
    pub(super) fn inside(rest: &'a [u8], what: &'static str) -> Self {
        Self { rest, what }
    }

    /// The next bytes.
    pub(super) fn cut<const N: usize>(&mut self) -> Result<&'a [u8; N], CurveFault> {
        let cut = self.rest.split_first_chunk();
        let (piece, rest) = cut.ok_or(CurveFault::Unexpected(self.what))?;
        self.rest = rest;
        Ok(piece)
    }

    /// The next number.
    pub(super) fn number(&mut self) -> Result<u64, CurveFault> {
        let bytes = self.cut::<NUMBER_BYTES>()?;
        Ok(u64::from_be_bytes(*bytes))
    }

    /// All that is left.
    pub(super) fn rest(self) -> &'a [u8] {
        self.rest
    }

    /// All that is left is a box, which is opened into memory that is wiped afterwards.
    pub(super) fn open(
        self,
        sealer: &impl Sealer,
        nonce: &Nonce,
    ) -> Result<Zeroizing<Vec<u8>>, CurveFault> {
        unseal(sealer, nonce, self.rest).ok_or(CurveFault::Box(self.what))
    }
}

/// Opens a copy of a box.
pub(super) fn unseal(
    sealer: &impl Sealer,
    nonce: &Nonce,
    sealed: &[u8],
) -> Option<Zeroizing<Vec<u8>>> {
    let mut plain = Zeroizing::new(sealed.to_vec());
    let bytes = open(sealer, nonce, &mut plain)?.len();
    let front = plain.len() - bytes;
    plain.drain(..front);
    Some(plain)
}
