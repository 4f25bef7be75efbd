//! Shared-memory lanes between the router and worker processes of the same host.
//!
//! ```text
//!            Unix socket (0600, uid checked): hello, then one offer for each core
//!  router  ---------------------------------------------------------------->  worker process
//!    |      queues  [ submissions > ]  descriptors: offset, length, request     |
//!    |              [ < completions ]                                           |
//!    '----> slab    [ request blocks | item blocks ]  <-------------------------'
//!           written by the router's kernel   written by the worker
//! ```
//!
//! One *lane* joins one worker and one core of the router: two queues of fixed-size descriptors
//! with one writer and one reader each, and a slab of which the first part is the router's to give
//! out (blocks of requests) and the second the worker's (blocks of items). Both are sealed memfds
//! that the router makes, so that neither side can shrink them under the other. An eventfd each
//! way wakes who asked to be woken. The bytes are described in [`layout`].
//!
//! Each side keeps what it relies on in memory of its own: its place in each queue, and which
//! blocks are given out. What the other side writes is copied out, then checked. The socket stays
//! open as long as the worker lives; its end is the end of the lane.

pub mod area;
pub mod attach;
pub mod layout;
pub mod memory;
pub mod queue;
pub mod worker;

/// What can go wrong with a lane.
#[derive(Debug, thiserror::Error)]
pub enum LaneError {
    /// The kernel refused something.
    #[error("{step}: {source}")]
    System {
        /// What was being done.
        step: &'static str,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// The router does not take this worker.
    #[error("the router refuses this worker: {why}")]
    Refused {
        /// Its words.
        why: String,
    },
    /// What the other side says or has written makes no sense.
    #[error("the other side of the lane broke the rules: {0}")]
    Broken(&'static str),
    /// The other side has closed the socket, or its process is gone.
    #[error("the other side of the lane is gone")]
    Gone,
    /// The value can never fit into the worker's part of the slab.
    #[error("an item of {bytes} bytes does not fit into the {max_bytes} bytes for items")]
    TooLarge {
        /// Its size.
        bytes: usize,
        /// What there is.
        max_bytes: usize,
    },
    /// The caller of this request wants nothing more.
    #[error("the request is over: its caller is gone or has had its answer")]
    Over,
}

impl LaneError {
    pub(crate) fn system(step: &'static str) -> impl Fn(rustix::io::Errno) -> LaneError {
        move |errno| LaneError::System {
            step,
            source: errno.into(),
        }
    }
}
