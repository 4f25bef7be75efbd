//! The payloads as owned serde types, for users who publish and subscribe
//! (spec/events-discovery.md §3.8). Written as maps in Dynamo's order.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::record::KvWorker;
pub use super::{KvMetrics, QueuedRequests, ScheduledRequests};

/// Why a payload could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum PayloadError {
    /// It is not of the type asked for.
    #[error("payload of an event: {0}")]
    Read(#[from] rmp_serde::decode::Error),
    /// The value has no MessagePack form.
    #[error("payload of an event: {0}")]
    Write(#[from] rmp_serde::encode::Error),
}

/// Reads a payload.
///
/// # Errors
/// It is not of this type.
pub fn from_payload<T: DeserializeOwned>(payload: &[u8]) -> Result<T, PayloadError> {
    Ok(rmp_serde::from_slice(payload)?)
}

/// Writes a payload as Dynamo does: structs as maps with text keys.
///
/// # Errors
/// The value has no MessagePack form.
pub fn to_payload<T: Serialize>(value: &T) -> Result<Vec<u8>, PayloadError> {
    Ok(rmp_serde::to_vec_named(value)?)
}

/// One element of the payload of `kv-events`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct KvEvent {
    /// The instance.
    pub worker_id: u64,
    /// Where the blocks lie.
    #[serde(default = "device")]
    pub storage_tier: String,
    /// Whom they belong to.
    #[serde(default = "worker")]
    pub residency_domain: String,
    /// What happened.
    pub event: KvEventBody,
}

fn device() -> String {
    "device".to_owned()
}

fn worker() -> String {
    "worker".to_owned()
}

/// What happened to a worker's blocks, with its number.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct KvEventBody {
    /// Grows with each event of this worker and rank.
    pub event_id: u64,
    /// What happened.
    pub data: KvChange,
    /// The rank within the worker.
    #[serde(default)]
    pub dp_rank: u32,
}

/// What happened to a worker's blocks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvChange {
    /// Blocks came.
    Stored {
        /// The block before the first, by the engine's own hash.
        #[serde(default)]
        parent_hash: Option<u64>,
        /// Where in the sequence the first one starts.
        #[serde(default)]
        start_position: Option<u64>,
        /// The blocks, each one behind the one before.
        blocks: Vec<KvBlock>,
    },
    /// Blocks went.
    Removed {
        /// The engine's own hashes of them.
        block_hashes: Vec<u64>,
    },
    /// All went.
    Cleared,
}

/// A block that was stored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct KvBlock {
    /// The engine's own hash of it.
    pub block_hash: u64,
    /// The router's hash of its tokens: [`super::block_hash`].
    pub tokens_hash: u64,
    /// What else went into it.
    #[serde(default)]
    pub mm_extra_info: Option<Value>,
}

impl KvEvent {
    /// An event about blocks in the GPU memory of a worker.
    #[must_use]
    pub fn new(worker: KvWorker, event_id: u64, data: KvChange) -> Self {
        Self {
            worker_id: worker.worker_id,
            storage_tier: device(),
            residency_domain: self::worker(),
            event: KvEventBody {
                event_id,
                data,
                dp_rank: worker.dp_rank,
            },
        }
    }
}

/// The answer to a [`super::KvQuery`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum KvAnswer {
    /// All that a cache holds.
    TreeDump {
        /// As if it were stored now.
        events: Vec<KvEvent>,
        /// What comes behind this event is not in it.
        last_event_id: u64,
        /// Of what storage all is told: `all`.
        #[serde(default)]
        reset_scope: String,
    },
    /// The events that were asked for.
    Events {
        /// In order.
        events: Vec<KvEvent>,
        /// The number of the last.
        last_event_id: u64,
    },
    /// They have not happened yet.
    TooNew {
        /// The first that was asked for.
        requested_start: u64,
        /// The last that was asked for.
        requested_end: Option<u64>,
        /// The number of the last that there is.
        newest_available: u64,
    },
    /// It cannot say what is in the cache.
    TreeDumpFailed {
        /// The number of the last event.
        last_event_id: u64,
        /// Why.
        message: String,
    },
    /// What was asked is wrong.
    Error(String),
}

/// The payload of `forward-pass-metrics`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ForwardPass {
    /// Version of the payload: 1.
    pub version: u64,
    /// The instance, in decimal.
    pub worker_id: String,
    /// The rank within it.
    pub dp_rank: u32,
    /// Grows with each message.
    pub counter_id: u64,
    /// Seconds that the pass took; 0 in a heartbeat.
    pub wall_time: f64,
    /// What the pass worked on.
    pub scheduled_requests: ScheduledRequests,
    /// What waits.
    pub queued_requests: QueuedRequests,
}

/// The payload of `active_sequences_events`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SequenceEvent {
    /// The request.
    pub request_id: String,
    /// The rank of a worker that has it.
    pub worker: KvWorker,
    /// The step.
    pub data: SequenceChange,
    /// The instance id of the router that says so.
    pub router_id: u64,
    /// The adapter, if any.
    pub lora_name: Option<String>,
}

/// What became of a request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum SequenceChange {
    /// It was given to the worker.
    AddRequest {
        /// Hashes of its blocks, each with all before it.
        token_sequence: Vec<u64>,
        /// Whether its prompt counts as load.
        track_prefill_tokens: bool,
        /// How long its answer may be.
        expected_output_tokens: Option<Value>,
        /// What its prompt costs.
        prefill_load_hint: Option<PrefillLoadHint>,
    },
    /// Its prompt has been computed.
    MarkPrefillCompleted,
    /// It has ended.
    Free,
}

/// What a prompt costs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PrefillLoadHint {
    /// Tokens that are not in the worker's cache.
    pub initial_effective_prefill_tokens: u64,
    /// How long they should take.
    pub expected_prefill_duration: Option<Value>,
}
