//! Dynamo's wire formats (dynamo-runtime 1.6.1): views over received bytes, writers, names, errors.
//!
//! This crate knows no socket and no clock. A decoder takes the bytes that have arrived so far,
//! allocates nothing, copies nothing, and answers [`Decoded`]: a frame, how many bytes it needs, or
//! what is wrong. Views hold ranges or slices of the caller's bytes. Typed serde forms
//! ([`mod@error`], [`discovery`], [`item::Annotated`]) are for the edges and do allocate.
//!
//! ```
//! use corelane_codec::{Decoded, headers, request_frame};
//!
//! let mut bytes = Vec::new();
//! let map = br#"{"request-id":"r-1"}"#;
//! request_frame::write_frame(b"2a/dynamo/backend/generate", map, b"payload", &mut bytes)?;
//!
//! // A few bytes are not enough, and the decoder says how many are.
//! assert_eq!(request_frame::decode_prefix(&bytes[..2]), Decoded::Need(8 + 26));
//!
//! let Decoded::Frame(prefix) = request_frame::decode_prefix(&bytes) else { panic!() };
//! request_frame::check_size(&prefix, corelane_codec::limits::MESSAGE_BYTES_MAX_DEFAULT)?;
//! assert_eq!(&bytes[prefix.path.clone()], b"2a/dynamo/backend/generate");
//! assert_eq!(&bytes[prefix.payload()], b"payload");
//! let id = headers::find(&bytes[prefix.headers.clone()], "request-id");
//! assert!(id.is_some_and(|id| id == "r-1"));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod call_home;
pub mod control_message;
#[cfg(feature = "curve")]
pub mod curve;
mod decoded;
pub mod discovery;
pub mod error;
pub mod event;
#[doc(hidden)]
pub mod fuzz;
pub mod headers;
pub mod item;
pub mod json;
pub mod kv_headers;
pub mod limits;
mod msgpack;
pub mod mux;
pub mod path;
pub mod quic_frame;
pub mod reply_frame;
pub mod request_frame;
pub mod token_ids;
pub mod trace_context;
pub mod two_part;
pub mod zmtp;

pub use decoded::{Bad, Decoded, EncodeError, TooLarge};
