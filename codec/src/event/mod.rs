//! The event plane: what publishers and subscribers exchange (spec/events-discovery.md §3, §4.5).
//!
//! An event is an *envelope*, a MessagePack map, with the *payload* as its last member. NATS
//! carries the envelope bare; ZMQ carries four parts of which the last is a *frame*:
//!
//! ```text
//! topic or subject | publisher u64 | sequence u64 | frame
//!                                                   |
//!                    0    1           5             v
//!                    | 01 | bytes u32 | envelope |        integers big-endian
//! ```
//!
//! All views ([`Envelope`], [`KvEvents`], [`KvMetrics`], ...) borrow from the received bytes and
//! allocate nothing; the forms in [`typed`] are for users, and do.
//!
//! ```
//! use corelane_codec::event::{Envelope, Scope, frame, topic};
//!
//! let envelope = Envelope {
//!     publisher_id: 7,
//!     sequence: 0,
//!     published_at_ms: 1_795_289_986_740,
//!     topic: topic::KV_METRICS,
//!     payload: b"\x80",
//! };
//! let (mut bytes, mut message) = (vec![], vec![]);
//! envelope.write(&mut bytes)?;
//! frame::write(&bytes, &mut message)?;
//! assert_eq!(Envelope::decode(frame::payload(&message)?)?, envelope);
//!
//! let scope = Scope::endpoint("demo", "backend", "generate");
//! let subject = "namespace.demo.component.backend.endpoint.generate.kv_metrics";
//! assert_eq!(scope.subject(envelope.topic), subject);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod block_hash;
mod envelope;
mod fields;
pub mod frame;
pub mod hello;
mod kv;
mod kv_query;
mod load;
pub mod multipart;
pub mod origin;
mod record;
mod scope;
mod sequences;
pub mod topic;
mod tracker;
pub mod typed;

pub use block_hash::{BLOCK_HASH_SEED, block_hash, block_hashes};
pub use envelope::{ENVELOPE_BYTES_OVERHEAD_MAX, Envelope, EnvelopeFront};
pub use fields::EventError;
pub use kv::{Block, Blocks, Hashes, KvChange, KvEvent, KvEvents};
pub use kv_query::{KvAnswer, KvQuery, KvQueryKind};
pub use load::{ForwardPass, KvMetrics, QueuedRequests, ScheduledRequests};
pub use record::{
    CHANNELS_BUCKET, EventChannelRecord, EventKey, EventSourceRecord, EventTransport, KvWorker,
    NatsChannel, SOURCES_BUCKET, SourceMetadata, ZmqBrokerChannel, ZmqChannel,
};
pub use scope::{Scope, decode_segment, encode_segment, parse_subject};
pub use sequences::{Sequence, SequenceChange};
pub use tracker::{Tracker, Verdict};
