//! Structs in MessagePack as serde reads them: maps with keys in any order, or arrays in order.

use crate::msgpack::{Container, MsgPackError, Reader};

/// Why bytes are not the event that they should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EventError {
    /// Not MessagePack.
    #[error("event: {0}")]
    MsgPack(#[from] MsgPackError),
    /// A member, or the whole, is of another type.
    #[error("event: {0} has the wrong type")]
    WrongType(&'static str),
    /// A member is absent.
    #[error("event has no `{0}`")]
    Missing(&'static str),
    /// A member comes twice.
    #[error("event has `{0}` twice")]
    Repeated(&'static str),
    /// An array has more elements than the struct has members.
    #[error("event: {0} has too many elements")]
    TooMany(&'static str),
    /// A text is not UTF-8.
    #[error("event: `{0}` is not UTF-8")]
    NotUtf8(&'static str),
    /// A number does not fit.
    #[error("event: `{0}` is too large")]
    TooLarge(&'static str),
    /// None of the variants.
    #[error("event: `{0}` is none of its variants")]
    UnknownVariant(&'static str),
}

/// Reads a struct: calls `read` with the index of each member that is there, to step over its
/// value. Unknown members are skipped. Answers the members met, one bit each. `what` names the
/// whole in errors.
///
/// # Errors
/// Neither map nor array, a member twice, an array that is too long, or what `read` says.
pub(super) fn read_struct<'a>(
    reader: &mut Reader<'a>,
    what: &'static str,
    names: &'static [&'static str],
    mut read: impl FnMut(usize, &mut Reader<'a>) -> Result<(), EventError>,
) -> Result<Met, EventError> {
    let mut met = Met { bits: 0, names };
    match reader.container()? {
        Some(Container::Map(members)) => {
            let mut next = 0;
            for _ in 0..members {
                let Some(index) = member(reader, names, next)? else {
                    reader.skip()?;
                    continue;
                };
                met.add(index)?;
                read(index, reader)?;
                next = index + 1;
            }
        }
        Some(Container::Array(elements)) => {
            if elements > names.len() as u64 {
                return Err(EventError::TooMany(what));
            }
            for index in 0..elements as usize {
                met.add(index)?;
                read(index, reader)?;
            }
        }
        None => return Err(EventError::WrongType(what)),
    }
    Ok(met)
}

/// The index of the member that a key names. Most come in order, so `next` is tried first. Like
/// serde, takes the index itself as a key.
fn member(
    reader: &mut Reader<'_>,
    names: &[&str],
    next: usize,
) -> Result<Option<usize>, EventError> {
    if let Some(index) = reader.uint()? {
        let index = usize::try_from(index).ok();
        return Ok(index.filter(|index| *index < names.len()));
    }
    let key = reader.key()?.ok_or(EventError::WrongType("a key"))?;
    if names.get(next).is_some_and(|name| name.as_bytes() == key) {
        return Ok(Some(next));
    }
    Ok(names.iter().position(|name| name.as_bytes() == key))
}

/// The members that a struct had.
#[derive(Debug, Clone, Copy)]
pub(super) struct Met {
    bits: u32,
    names: &'static [&'static str],
}

impl Met {
    fn add(&mut self, index: usize) -> Result<(), EventError> {
        let bit = 1 << index;
        if self.bits & bit != 0 {
            return Err(EventError::Repeated(self.names[index]));
        }
        self.bits |= bit;
        Ok(())
    }

    /// Complains about the first member of these bits that was not there.
    pub(super) fn require(self, bits: u32) -> Result<(), EventError> {
        match bits & !self.bits {
            0 => Ok(()),
            missing => {
                let index = missing.trailing_zeros() as usize;
                Err(EventError::Missing(self.names[index]))
            }
        }
    }
}

/// The string or binary that must come next.
pub(super) fn bytes<'a>(
    reader: &mut Reader<'a>,
    name: &'static str,
) -> Result<&'a [u8], EventError> {
    reader.key()?.ok_or(EventError::WrongType(name))
}

/// The text that must come next.
pub(super) fn text<'a>(reader: &mut Reader<'a>, name: &'static str) -> Result<&'a str, EventError> {
    std::str::from_utf8(bytes(reader, name)?).map_err(|_| EventError::NotUtf8(name))
}

/// The integer that must come next.
pub(super) fn uint(reader: &mut Reader<'_>, name: &'static str) -> Result<u64, EventError> {
    reader.uint()?.ok_or(EventError::WrongType(name))
}

/// The integer of 32 bits that must come next.
pub(super) fn uint32(reader: &mut Reader<'_>, name: &'static str) -> Result<u32, EventError> {
    u32::try_from(uint(reader, name)?).map_err(|_| EventError::TooLarge(name))
}

/// The integer or nil that must come next.
pub(super) fn optional_uint(
    reader: &mut Reader<'_>,
    name: &'static str,
) -> Result<Option<u64>, EventError> {
    if reader.nil()? {
        return Ok(None);
    }
    uint(reader, name).map(Some)
}

/// The number that must come next.
pub(super) fn float(reader: &mut Reader<'_>, name: &'static str) -> Result<f64, EventError> {
    reader.float()?.ok_or(EventError::WrongType(name))
}

/// The array that must come next: how many elements follow.
pub(super) fn array(reader: &mut Reader<'_>, name: &'static str) -> Result<u64, EventError> {
    match reader.container()? {
        Some(Container::Array(elements)) => Ok(elements),
        _ => Err(EventError::WrongType(name)),
    }
}

/// The value or nil that must come next, left as it is.
pub(super) fn optional_raw<'a>(reader: &mut Reader<'a>) -> Result<Option<&'a [u8]>, EventError> {
    if reader.nil()? {
        return Ok(None);
    }
    Ok(Some(reader.raw()?))
}

/// An enum as serde writes it: the name of a variant, or a map of one from the name to its
/// content, before which the reader then stands.
pub(super) fn variant<'a>(
    reader: &mut Reader<'a>,
    name: &'static str,
) -> Result<(&'a [u8], HasContent), EventError> {
    match reader.container()? {
        Some(Container::Map(1)) => Ok((bytes(reader, name)?, HasContent(true))),
        None => Ok((bytes(reader, name)?, HasContent(false))),
        Some(_) => Err(EventError::WrongType(name)),
    }
}

/// Whether the content of a variant follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct HasContent(bool);

impl HasContent {
    /// The end of a variant that has no content, except perhaps nil.
    pub(super) fn none(
        self,
        reader: &mut Reader<'_>,
        name: &'static str,
    ) -> Result<(), EventError> {
        if self.0 && !reader.nil()? {
            return Err(EventError::WrongType(name));
        }
        Ok(())
    }

    /// The begin of a variant that must have content.
    pub(super) fn some(self, name: &'static str) -> Result<(), EventError> {
        if self.0 {
            return Ok(());
        }
        Err(EventError::WrongType(name))
    }
}
