//! Limits that several shards keep together, for processes that are told small ones.
//!
//! A shard that alone has a limit counts for itself and touches nothing of others; this is for
//! limits that would be too small to be divided: one connection, which one shard has, is to get
//! all of it. Shards that look at the same instant may both take the last place.

use std::sync::atomic::{AtomicU32, Ordering};

/// Requests that run and that wait, of all shards of a process.
#[derive(Debug)]
pub struct Budget {
    running_max: u32,
    queue_max: u32,
    running: AtomicU32,
    waiting: AtomicU32,
}

impl Budget {
    /// Room for so many.
    pub fn new(running_max: u32, queue_max: u32) -> Budget {
        Budget {
            running_max,
            queue_max,
            running: AtomicU32::new(0),
            waiting: AtomicU32::new(0),
        }
    }

    pub(crate) fn may_run(&self) -> bool {
        self.running.load(Ordering::Relaxed) < self.running_max
    }

    pub(crate) fn may_wait(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) < self.queue_max
    }

    /// Nobody waits anywhere.
    pub(crate) fn is_clear(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) == 0
    }

    pub(crate) fn run(&self) {
        self.running.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn ran(&self) {
        self.running.fetch_sub(1, Ordering::Relaxed);
    }

    pub(crate) fn wait(&self) {
        self.waiting.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn waited(&self) {
        self.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}
