//! A client of the service: a session that is the lock, and memory mapped at addresses that stay.

mod ipc;
mod mappings;
mod session;
mod session_v2;
mod wire;

pub use ipc::{IpcInfo, ipc_state};
pub use mappings::{SharedMemory, Woken};
pub use session::{AllocationInfo, LockState, Session, event_history, runtime_state};
pub use session_v2::{CheckpointControl, SessionV2, checkpoint_control};
pub use wire::Dial;

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::backend::BackendError;
use crate::protocol::Bad;
use crate::protocol::frame::FrameTooLarge;

/// What can go wrong for a client.
#[derive(Debug, Error)]
pub enum ClientError {
    /// The service cannot be reached.
    #[error("cannot reach the service on {}: {source}", path.display())]
    Dial {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The lock was not granted in time.
    #[error("the lock was not granted in time (published contents: {committed})")]
    NotGranted {
        /// Whether something was published then.
        committed: bool,
    },
    /// The service refused the request; the session goes on.
    #[error("the service refused: {0}")]
    Refused(String),
    /// The service closed the connection: the lock is lost.
    #[error("the service closed the connection")]
    Closed,
    /// The service did not answer in time; the session is of no more use.
    #[error("the service did not answer in time")]
    NoAnswer,
    /// An earlier answer was given up: what comes now may belong to that request.
    #[error("an earlier request was left without an answer; open another session")]
    OutOfStep,
    /// The service answered something else.
    #[error("the service answered {0}, which is no answer to this")]
    Unexpected(&'static str),
    /// The answer cannot be read.
    #[error("the answer cannot be read: {0}")]
    Bad(#[from] Bad),
    /// The answer is too large.
    #[error(transparent)]
    TooLarge(FrameTooLarge),
    /// The socket failed.
    #[error("the connection failed: {0}")]
    Io(#[source] io::Error),
    /// A descriptor should have come with the answer.
    #[error("no descriptor came with the answer")]
    NoDescriptor,
    /// The layout is another one than before: everything must be imported from scratch.
    #[error("the layout is stale: {0}; import everything from scratch")]
    Stale(String),
    /// Memory could not be mapped.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// Memory that is lent is still part of a layout.
    #[error("the memory is still lent: a layout holds it, so it must not be freed")]
    Lent,
    /// There is a session already, for which another one would wait.
    #[error("the memory is awake; put it to sleep first")]
    Awake,
    /// There is no session: the memory sleeps.
    #[error("there is no session; wake the memory first")]
    Asleep,
}
