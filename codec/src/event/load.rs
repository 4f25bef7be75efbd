//! The payloads of `kv_metrics` and `forward-pass-metrics`: how busy a worker is
//! (spec/events-discovery.md §3.8).

use super::fields::{self, EventError};
use crate::msgpack::Reader;

const KV_FIELDS: &[&str] = &[
    "worker_id",
    "dp_rank",
    "active_decode_blocks",
    "active_prefill_tokens",
    "kv_used_blocks",
];
const PASS_FIELDS: &[&str] = &[
    "version",
    "worker_id",
    "dp_rank",
    "counter_id",
    "wall_time",
    "scheduled_requests",
    "queued_requests",
];
const SCHEDULED_FIELDS: &[&str] = &[
    "num_prefill_requests",
    "sum_prefill_tokens",
    "var_prefill_length",
    "sum_prefill_kv_tokens",
    "num_decode_requests",
    "sum_decode_kv_tokens",
    "var_decode_kv_tokens",
];
const QUEUED_FIELDS: &[&str] = &[
    "num_prefill_requests",
    "sum_prefill_tokens",
    "var_prefill_length",
    "num_decode_requests",
    "sum_decode_kv_tokens",
    "var_decode_kv_tokens",
];

/// The payload of `kv_metrics`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct KvMetrics {
    /// The instance.
    pub worker_id: u64,
    /// The rank within it.
    #[serde(default)]
    pub dp_rank: u32,
    /// Blocks of sequences that are being decoded.
    #[serde(default)]
    pub active_decode_blocks: u64,
    /// Tokens of prompts that are being computed; unknown to some engines.
    #[serde(default)]
    pub active_prefill_tokens: Option<u64>,
    /// Blocks in use.
    #[serde(default)]
    pub kv_used_blocks: u64,
}

impl KvMetrics {
    /// Reads a payload. All but the worker's id may be absent, and is then 0 or none.
    ///
    /// # Errors
    /// It is not what it should be.
    pub fn decode(payload: &[u8]) -> Result<Self, EventError> {
        let mut metrics = Self::default();
        let reader = &mut Reader::new(payload);
        let met = fields::read_struct(reader, "KV metrics", KV_FIELDS, |index, reader| {
            let name = KV_FIELDS[index];
            match index {
                0 => metrics.worker_id = fields::uint(reader, name)?,
                1 => metrics.dp_rank = fields::uint32(reader, name)?,
                2 => metrics.active_decode_blocks = fields::uint(reader, name)?,
                3 => metrics.active_prefill_tokens = fields::optional_uint(reader, name)?,
                _ => metrics.kv_used_blocks = fields::uint(reader, name)?,
            }
            Ok(())
        })?;
        met.require(0b1)?;
        Ok(metrics)
    }
}

/// The payload of `forward-pass-metrics`.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ForwardPass<'a> {
    /// Version of the payload: 1.
    pub version: u64,
    /// The instance, in decimal; see [`ForwardPass::instance_id`].
    pub worker_id: &'a str,
    /// The rank within it.
    pub dp_rank: u32,
    /// Grows with each message.
    pub counter_id: u64,
    /// Seconds that the pass took; 0 in a heartbeat.
    pub wall_time: f64,
    /// What the pass worked on.
    pub scheduled: ScheduledRequests,
    /// What waits.
    pub queued: QueuedRequests,
}

/// What a forward pass worked on.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct ScheduledRequests {
    /// Requests in prefill.
    pub num_prefill_requests: u64,
    /// Tokens of their prompts computed in this pass.
    pub sum_prefill_tokens: u64,
    /// Variance of their lengths.
    pub var_prefill_length: f64,
    /// Tokens of theirs that were in the cache.
    pub sum_prefill_kv_tokens: u64,
    /// Requests in decode.
    pub num_decode_requests: u64,
    /// Tokens of theirs in the cache.
    pub sum_decode_kv_tokens: u64,
    /// Variance of that.
    pub var_decode_kv_tokens: f64,
}

/// What waits for a forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct QueuedRequests {
    /// Requests that wait for prefill.
    pub num_prefill_requests: u64,
    /// Tokens of their prompts.
    pub sum_prefill_tokens: u64,
    /// Variance of their lengths.
    pub var_prefill_length: f64,
    /// Requests that were decoding and wait again.
    pub num_decode_requests: u64,
    /// Tokens of theirs in the cache.
    pub sum_decode_kv_tokens: u64,
    /// Variance of that.
    pub var_decode_kv_tokens: f64,
}

impl<'a> ForwardPass<'a> {
    /// Reads a payload. All but the worker's id may be absent, and is then 0.
    ///
    /// # Errors
    /// It is not what it should be.
    pub fn decode(payload: &'a [u8]) -> Result<Self, EventError> {
        let mut pass = Self::default();
        let reader = &mut Reader::new(payload);
        let met = fields::read_struct(reader, "a forward pass", PASS_FIELDS, |index, reader| {
            let name = PASS_FIELDS[index];
            match index {
                0 => pass.version = fields::uint(reader, name)?,
                1 => pass.worker_id = fields::text(reader, name)?,
                2 => pass.dp_rank = fields::uint32(reader, name)?,
                3 => pass.counter_id = fields::uint(reader, name)?,
                4 => pass.wall_time = fields::float(reader, name)?,
                5 => pass.scheduled = ScheduledRequests::read(reader)?,
                _ => pass.queued = QueuedRequests::read(reader)?,
            }
            Ok(())
        })?;
        met.require(0b10)?;
        Ok(pass)
    }

    /// The instance; `None` if the text is no number.
    #[must_use]
    pub fn instance_id(&self) -> Option<u64> {
        self.worker_id.parse().ok()
    }
}

impl ScheduledRequests {
    fn read(reader: &mut Reader<'_>) -> Result<Self, EventError> {
        let mut all = Self::default();
        let what = "scheduled_requests";
        fields::read_struct(reader, what, SCHEDULED_FIELDS, |index, reader| {
            let name = SCHEDULED_FIELDS[index];
            match index {
                0 => all.num_prefill_requests = fields::uint(reader, name)?,
                1 => all.sum_prefill_tokens = fields::uint(reader, name)?,
                2 => all.var_prefill_length = fields::float(reader, name)?,
                3 => all.sum_prefill_kv_tokens = fields::uint(reader, name)?,
                4 => all.num_decode_requests = fields::uint(reader, name)?,
                5 => all.sum_decode_kv_tokens = fields::uint(reader, name)?,
                _ => all.var_decode_kv_tokens = fields::float(reader, name)?,
            }
            Ok(())
        })?;
        Ok(all)
    }
}

impl QueuedRequests {
    fn read(reader: &mut Reader<'_>) -> Result<Self, EventError> {
        let mut all = Self::default();
        let what = "queued_requests";
        fields::read_struct(reader, what, QUEUED_FIELDS, |index, reader| {
            let name = QUEUED_FIELDS[index];
            match index {
                0 => all.num_prefill_requests = fields::uint(reader, name)?,
                1 => all.sum_prefill_tokens = fields::uint(reader, name)?,
                2 => all.var_prefill_length = fields::float(reader, name)?,
                3 => all.num_decode_requests = fields::uint(reader, name)?,
                4 => all.sum_decode_kv_tokens = fields::uint(reader, name)?,
                _ => all.var_decode_kv_tokens = fields::float(reader, name)?,
            }
            Ok(())
        })?;
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_in_any_form() {
        let pass = ForwardPass::decode(
            b"\x83\xa9worker_id\xa2-7\xa9wall_time\xff\xb2scheduled_requests\
              \x81\xb2var_prefill_length\xca\x3f\x80\x00\x00",
        )
        .unwrap();
        assert_eq!((pass.wall_time, pass.version), (-1.0, 0));
        assert_eq!(pass.scheduled.var_prefill_length, 1.0);
        assert_eq!(pass.instance_id(), None);
        let wrong = ForwardPass::decode(b"\x82\xa9worker_id\xa17\xa9wall_time\xc3");
        assert_eq!(wrong.unwrap_err(), EventError::WrongType("wall_time"));
        let none = ForwardPass::decode(b"\x80").unwrap_err();
        assert_eq!(none, EventError::Missing("worker_id"));
    }

    #[test]
    fn kv_metrics_need_a_worker() {
        let metrics = KvMetrics::decode(b"\x91\x07").unwrap();
        assert_eq!(metrics.worker_id, 7);
        assert_eq!(metrics.active_prefill_tokens, None);
        let none = KvMetrics::decode(b"\x81\xa7dp_rank\x01").unwrap_err();
        assert_eq!(none, EventError::Missing("worker_id"));
    }
}
