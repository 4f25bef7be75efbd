//! The payload of `kv-events`: which blocks of KV cache a worker has stored or removed
//! (spec/events-discovery.md §3.8).
//!
//! The payload is an array; each view reads on only as far as it is asked to, so an event that is
//! broken in its middle is told when its reader gets there.

use super::fields::{self, EventError};
use crate::msgpack::Reader;

const EVENT_FIELDS: &[&str] = &["worker_id", "storage_tier", "residency_domain", "event"];
const CHANGE_FIELDS: &[&str] = &["event_id", "data", "dp_rank"];
const STORED_FIELDS: &[&str] = &["parent_hash", "start_position", "blocks"];
const REMOVED_FIELDS: &[&str] = &["block_hashes"];
const BLOCK_FIELDS: &[&str] = &["block_hash", "tokens_hash", "mm_extra_info"];

/// The events of one message, one after the other.
#[derive(Debug, Clone)]
pub struct KvEvents<'a> {
    reader: Reader<'a>,
    left: u64,
}

/// What one worker reports.
#[derive(Debug, Clone)]
pub struct KvEvent<'a> {
    /// The instance.
    pub worker_id: u64,
    /// Where the blocks lie; `device` for GPU memory. Empty if not said.
    pub storage_tier: &'a str,
    /// Whom they belong to; `worker` is usual. Empty if not said.
    pub residency_domain: &'a str,
    /// Grows with each event of this worker and rank.
    pub event_id: u64,
    /// The rank within the worker that the event is about.
    pub dp_rank: u32,
    /// What happened.
    pub change: KvChange<'a>,
}

/// What happened to a worker's blocks.
#[derive(Debug, Clone)]
pub enum KvChange<'a> {
    /// Blocks came, each one behind the one before.
    Stored {
        /// The block before the first, by the engine's own hash; none at the begin of a sequence.
        parent_hash: Option<u64>,
        /// Where in the sequence the first one starts, if that is said.
        start_position: Option<u64>,
        /// The blocks.
        blocks: Blocks<'a>,
    },
    /// Blocks went, by the engine's own hashes.
    Removed(Hashes<'a>),
    /// All went.
    Cleared,
}

/// A block that was stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block<'a> {
    /// The engine's own hash of it.
    pub block_hash: u64,
    /// The router's hash of its tokens: [`super::block_hash`].
    pub tokens_hash: u64,
    /// What else went into it, as MessagePack.
    pub mm_extra_info: Option<&'a [u8]>,
}

/// Blocks that were stored, in order.
#[derive(Debug, Clone)]
pub struct Blocks<'a> {
    reader: Reader<'a>,
    left: u64,
}

/// Hashes, in order.
#[derive(Debug, Clone)]
pub struct Hashes<'a> {
    reader: Reader<'a>,
    left: u64,
    name: &'static str,
}

impl<'a> KvEvents<'a> {
    /// Begins to read a payload.
    ///
    /// # Errors
    /// It is no array.
    pub fn open(payload: &'a [u8]) -> Result<Self, EventError> {
        let mut reader = Reader::new(payload);
        let left = fields::array(&mut reader, "the payload of kv-events")?;
        Ok(Self { reader, left })
    }

    /// The next event; `None` behind the last.
    ///
    /// # Errors
    /// It is not what it should be. Nothing behind it can be read.
    pub fn next_event(&mut self) -> Result<Option<KvEvent<'a>>, EventError> {
        if self.left == 0 {
            return Ok(None);
        }
        let event = KvEvent::read(&mut self.reader);
        self.left = if event.is_ok() { self.left - 1 } else { 0 };
        event.map(Some)
    }
}

impl<'a> KvEvent<'a> {
    fn read(reader: &mut Reader<'a>) -> Result<Self, EventError> {
        let mut event = Self {
            worker_id: 0,
            storage_tier: "",
            residency_domain: "",
            event_id: 0,
            dp_rank: 0,
            change: KvChange::Cleared,
        };
        let met = fields::read_struct(reader, "a KV event", EVENT_FIELDS, |index, reader| {
            let name = EVENT_FIELDS[index];
            match index {
                0 => event.worker_id = fields::uint(reader, name)?,
                1 => event.storage_tier = fields::text(reader, name)?,
                2 => event.residency_domain = fields::text(reader, name)?,
                _ => event.read_change(reader)?,
            }
            Ok(())
        })?;
        met.require(0b1001)?;
        Ok(event)
    }

    fn read_change(&mut self, reader: &mut Reader<'a>) -> Result<(), EventError> {
        let met = fields::read_struct(reader, "`event`", CHANGE_FIELDS, |index, reader| {
            let name = CHANGE_FIELDS[index];
            match index {
                0 => self.event_id = fields::uint(reader, name)?,
                1 => self.change = KvChange::read(reader)?,
                _ => self.dp_rank = fields::uint32(reader, name)?,
            }
            Ok(())
        })?;
        met.require(0b011)
    }
}

impl<'a> KvChange<'a> {
    fn read(reader: &mut Reader<'a>) -> Result<Self, EventError> {
        let (name, content) = fields::variant(reader, "data")?;
        match name {
            b"stored" => {
                content.some("stored")?;
                Self::read_stored(reader)
            }
            b"removed" => {
                content.some("removed")?;
                let mut hashes = None;
                fields::read_struct(reader, "removed", REMOVED_FIELDS, |_, reader| {
                    hashes = Some(Hashes::read(reader, "block_hashes")?);
                    Ok(())
                })?;
                let hashes = hashes.ok_or(EventError::Missing("block_hashes"))?;
                Ok(Self::Removed(hashes))
            }
            b"cleared" => {
                content.none(reader, "cleared")?;
                Ok(Self::Cleared)
            }
            _ => Err(EventError::UnknownVariant("data")),
        }
    }

    fn read_stored(reader: &mut Reader<'a>) -> Result<Self, EventError> {
        let (mut parent_hash, mut start_position, mut blocks) = (None, None, None);
        fields::read_struct(reader, "stored", STORED_FIELDS, |index, reader| {
            let name = STORED_FIELDS[index];
            match index {
                0 => parent_hash = fields::optional_uint(reader, name)?,
                1 => start_position = fields::optional_uint(reader, name)?,
                _ => blocks = Some(Blocks::read(reader)?),
            }
            Ok(())
        })?;
        Ok(Self::Stored {
            parent_hash,
            start_position,
            blocks: blocks.ok_or(EventError::Missing("blocks"))?,
        })
    }
}

impl Block<'_> {
    /// Steps over the form that every writer we know of uses, of a block with nothing else in it;
    /// `None`, and no step, for any other.
    #[inline]
    fn as_written(reader: &mut Reader<'_>) -> Option<Block<'static>> {
        let mut next = reader.clone();
        if !next.literal(b"\x83\xaablock_hash") {
            return None;
        }
        let block_hash = next.uint().ok()??;
        if !next.literal(b"\xabtokens_hash") {
            return None;
        }
        let tokens_hash = next.uint().ok()??;
        if !next.literal(b"\xadmm_extra_info\xc0") {
            return None;
        }
        *reader = next;
        Some(Block {
            block_hash,
            tokens_hash,
            mm_extra_info: None,
        })
    }
}

impl<'a> Blocks<'a> {
    /// Takes the array that comes next and steps over it.
    fn read(reader: &mut Reader<'a>) -> Result<Self, EventError> {
        let left = fields::array(reader, "blocks")?;
        let blocks = Self {
            reader: reader.clone(),
            left,
        };
        for _ in 0..left {
            if Block::as_written(reader).is_none() {
                reader.skip()?;
            }
        }
        Ok(blocks)
    }

    /// How many are still to come, by what the message says.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.left
    }

    /// The next block; `None` behind the last.
    ///
    /// # Errors
    /// It is not what it should be. Nothing behind it can be read.
    pub fn next_block(&mut self) -> Result<Option<Block<'a>>, EventError> {
        if self.left == 0 {
            return Ok(None);
        }
        self.left -= 1;
        if let Some(block) = Block::as_written(&mut self.reader) {
            return Ok(Some(block));
        }
        let mut block = Block {
            block_hash: 0,
            tokens_hash: 0,
            mm_extra_info: None,
        };
        let met = fields::read_struct(
            &mut self.reader,
            "a block",
            BLOCK_FIELDS,
            |index, reader| {
                let name = BLOCK_FIELDS[index];
                match index {
                    0 => block.block_hash = fields::uint(reader, name)?,
                    1 => block.tokens_hash = fields::uint(reader, name)?,
                    _ => block.mm_extra_info = fields::optional_raw(reader)?,
                }
                Ok(())
            },
        )
        .and_then(|met| met.require(0b011));
        if met.is_err() {
            self.left = 0;
        }
        met.map(|()| Some(block))
    }
}

impl<'a> Hashes<'a> {
    /// Takes the array that comes next and steps over it.
    pub(super) fn read(reader: &mut Reader<'a>, name: &'static str) -> Result<Self, EventError> {
        let mut reader = Reader::new(reader.raw()?);
        let left = fields::array(&mut reader, name)?;
        Ok(Self { reader, left, name })
    }

    /// How many are still to come, by what the message says.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.left
    }

    /// The next hash; `None` behind the last.
    ///
    /// # Errors
    /// It is no integer. Nothing behind it can be read.
    pub fn next_hash(&mut self) -> Result<Option<u64>, EventError> {
        if self.left == 0 {
            return Ok(None);
        }
        let hash = fields::uint(&mut self.reader, self.name);
        self.left = if hash.is_ok() { self.left - 1 } else { 0 };
        hash.map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first(payload: &[u8]) -> Result<KvEvent<'_>, EventError> {
        KvEvents::open(payload)?
            .next_event()
            .map(|event| event.expect("one event"))
    }

    #[test]
    fn structs_may_be_arrays_and_optional_members_absent() {
        // worker 7, no tier, no domain; event 1, stored one block, without a parent.
        let payload = b"\x91\x82\xa9worker_id\x07\xa5event\x82\xa8event_id\x01\xa4data\
            \x81\xa6stored\x81\xa6blocks\x91\x92\x05\x06";
        let event = first(payload).unwrap();
        assert_eq!((event.worker_id, event.event_id, event.dp_rank), (7, 1, 0));
        assert_eq!((event.storage_tier, event.residency_domain), ("", ""));
        let KvChange::Stored {
            parent_hash: None,
            start_position: None,
            mut blocks,
        } = event.change
        else {
            panic!("stored without a parent");
        };
        let block = blocks.next_block().unwrap().unwrap();
        assert_eq!((block.block_hash, block.tokens_hash), (5, 6));
        assert_eq!(blocks.next_block(), Ok(None));

        let cleared = b"\x91\x94\x07\xa6device\xa6worker\x93\x02\xa7cleared\x01";
        let event = first(cleared).unwrap();
        assert!(matches!(event.change, KvChange::Cleared));
        assert_eq!((event.storage_tier, event.dp_rank), ("device", 1));
        let as_map = b"\x91\x94\x07\xa6device\xa6worker\x93\x02\x81\xa7cleared\xc0\x01";
        assert!(matches!(first(as_map).unwrap().change, KvChange::Cleared));
    }

    #[test]
    fn what_is_wrong_is_named_and_ends_the_reading() {
        let error = first(b"\x91\x81\xa9worker_id\x07").unwrap_err();
        assert_eq!(error, EventError::Missing("event"));
        let error = first(b"\x91\x94\x07\xa0\xa0\x93\x02\xa4gone\x00").unwrap_err();
        assert_eq!(error, EventError::UnknownVariant("data"));
        let error = first(b"\x91\x94\x07\xa0\xa0\x93\x02\xa6stored\x00").unwrap_err();
        assert_eq!(error, EventError::WrongType("stored"));
        let rank = first(b"\x91\x94\x07\xa0\xa0\x93\x02\xa7cleared\xcf\0\0\0\x01\0\0\0\0");
        assert_eq!(rank.unwrap_err(), EventError::TooLarge("dp_rank"));
        assert_eq!(
            KvEvents::open(b"\x80").unwrap_err(),
            EventError::WrongType("the payload of kv-events")
        );

        let removed = b"\x91\x94\x07\xa0\xa0\x93\x02\x81\xa7removed\x91\x93\x01\xa0\x03\x00";
        let KvChange::Removed(mut hashes) = first(removed).unwrap().change else {
            panic!("removed");
        };
        assert_eq!(hashes.left(), 3);
        assert_eq!(hashes.next_hash(), Ok(Some(1)));
        let error = hashes.next_hash().unwrap_err();
        assert_eq!(error, EventError::WrongType("block_hashes"));
        assert_eq!(hashes.next_hash(), Ok(None));

        let mut events = KvEvents::open(b"\x92\x00\x00").unwrap();
        assert!(events.next_event().is_err());
        assert!(matches!(events.next_event(), Ok(None)));
    }
}
