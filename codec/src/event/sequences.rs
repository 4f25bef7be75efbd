//! The payload of `active_sequences_events`: what one router tells the others
//! (spec/events-discovery.md §3.8).

use super::fields::{self, EventError};
use super::kv::Hashes;
use crate::msgpack::Reader;

const FIELDS: &[&str] = &["request_id", "worker", "data", "router_id", "lora_name"];
const WORKER_FIELDS: &[&str] = &["worker_id", "dp_rank"];
const ADD_FIELDS: &[&str] = &[
    "token_sequence",
    "track_prefill_tokens",
    "expected_output_tokens",
    "prefill_load_hint",
];

/// A step in the life of a request.
#[derive(Debug, Clone)]
pub struct Sequence<'a> {
    /// The request.
    pub request_id: &'a str,
    /// The instance that has it.
    pub worker_id: u64,
    /// The rank within it.
    pub dp_rank: u32,
    /// The instance id of the router that says so.
    pub router_id: u64,
    /// The adapter, if any.
    pub lora_name: Option<&'a str>,
    /// The step.
    pub change: SequenceChange<'a>,
}

/// What became of a request.
#[derive(Debug, Clone)]
pub enum SequenceChange<'a> {
    /// It was given to the worker.
    AddRequest {
        /// Hashes of its blocks, each with all before it.
        token_sequence: Hashes<'a>,
        /// Whether its prompt counts as load.
        track_prefill_tokens: bool,
        /// How long its answer may be, as MessagePack.
        expected_output_tokens: Option<&'a [u8]>,
        /// What its prompt costs, as MessagePack.
        prefill_load_hint: Option<&'a [u8]>,
    },
    /// Its prompt has been computed.
    MarkPrefillCompleted,
    /// It has ended.
    Free,
}

impl<'a> Sequence<'a> {
    /// Reads a payload.
    ///
    /// # Errors
    /// It is not what it should be.
    pub fn decode(payload: &'a [u8]) -> Result<Self, EventError> {
        let mut sequence = Self {
            request_id: "",
            worker_id: 0,
            dp_rank: 0,
            router_id: 0,
            lora_name: None,
            change: SequenceChange::Free,
        };
        let reader = &mut Reader::new(payload);
        let met = fields::read_struct(reader, "a sequence event", FIELDS, |index, reader| {
            let name = FIELDS[index];
            match index {
                0 => sequence.request_id = fields::text(reader, name)?,
                1 => sequence.read_worker(reader)?,
                2 => sequence.change = SequenceChange::read(reader)?,
                3 => sequence.router_id = fields::uint(reader, name)?,
                _ if reader.nil()? => {}
                _ => sequence.lora_name = Some(fields::text(reader, name)?),
            }
            Ok(())
        })?;
        met.require(0b0_1111)?;
        Ok(sequence)
    }

    fn read_worker(&mut self, reader: &mut Reader<'a>) -> Result<(), EventError> {
        let met = fields::read_struct(reader, "worker", WORKER_FIELDS, |index, reader| {
            let name = WORKER_FIELDS[index];
            match index {
                0 => self.worker_id = fields::uint(reader, name)?,
                _ => self.dp_rank = fields::uint32(reader, name)?,
            }
            Ok(())
        })?;
        met.require(0b1)
    }
}

impl<'a> SequenceChange<'a> {
    fn read(reader: &mut Reader<'a>) -> Result<Self, EventError> {
        let (name, content) = fields::variant(reader, "data")?;
        match name {
            b"AddRequest" => {
                content.some("AddRequest")?;
                Self::read_add(reader)
            }
            b"MarkPrefillCompleted" => {
                content.none(reader, "MarkPrefillCompleted")?;
                Ok(Self::MarkPrefillCompleted)
            }
            b"Free" => {
                content.none(reader, "Free")?;
                Ok(Self::Free)
            }
            _ => Err(EventError::UnknownVariant("data")),
        }
    }

    fn read_add(reader: &mut Reader<'a>) -> Result<Self, EventError> {
        let (mut hashes, mut track, mut expected, mut hint) = (None, false, None, None);
        fields::read_struct(reader, "AddRequest", ADD_FIELDS, |index, reader| {
            let name = ADD_FIELDS[index];
            match index {
                0 => hashes = Some(Hashes::read(reader, name)?),
                1 => track = reader.bool()?.ok_or(EventError::WrongType(name))?,
                2 => expected = fields::optional_raw(reader)?,
                _ => hint = fields::optional_raw(reader)?,
            }
            Ok(())
        })?;
        Ok(Self::AddRequest {
            token_sequence: hashes.ok_or(EventError::Missing("token_sequence"))?,
            track_prefill_tokens: track,
            expected_output_tokens: expected,
            prefill_load_hint: hint,
        })
    }
}
