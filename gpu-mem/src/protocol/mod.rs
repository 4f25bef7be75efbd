//! The bytes on the socket: frames, the MessagePack in them, the messages of both generations, and
//! descriptors beside them (`spec/gpu-memory.md` §4).
//!
//! ```text
//!  +----------------+-----------------------------------------------+
//!  | length, u32 BE | one MessagePack map {"type": tag, field: ...} |   + at most one descriptor,
//!  +----------------+-----------------------------------------------+     sent with the first byte
//! ```

pub mod fd_pass;
pub mod frame;
mod message;
mod msgpack;
pub mod v1;
pub mod v2;

pub use message::{Extra, WireInt};
pub use msgpack::Bad;

#[cfg(test)]
mod golden;
