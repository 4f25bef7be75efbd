//! The way from any thread to the shards.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use corelane_codec::error::DynamoError;
use corelane_engine::local::Run;
use corelane_engine::mesh::Sender;
use corelane_engine::shard::Command;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use crate::cores::Cores;

/// Longest wait for room in the queue of a shard.
const ROOM_MAX: Duration = Duration::from_secs(5);

/// What clients of all threads share.
pub(super) struct Hub {
    shards: Vec<Sender<Command>>,
    next: AtomicUsize,
    stopped: watch::Receiver<bool>,
}

/// Wakes a shard: what was done to its tasks from outside is looked at soon.
#[derive(Clone)]
pub(super) struct Nudge(Sender<Command>);

impl Nudge {
    #[cfg(test)]
    pub(super) fn of(shard: Sender<Command>) -> Nudge {
        Nudge(shard)
    }

    pub(super) fn now(&self) {
        self.0.wake();
    }
}

impl Hub {
    /// To shards that have started; `stopped` turns true when they have ended.
    pub(super) fn new(cores: &Cores, stopped: watch::Receiver<bool>) -> Arc<Hub> {
        Arc::new(Hub {
            shards: cores.commands(),
            next: AtomicUsize::new(0),
            stopped,
        })
    }

    /// How many there are.
    pub(super) fn shards(&self) -> usize {
        self.shards.len()
    }

    /// Wakes one shard.
    pub(super) fn nudge(&self, index: usize) -> Nudge {
        Nudge(self.shards[index].clone())
    }

    /// Turns true when the shards have ended.
    pub(super) fn stopped(&self) -> watch::Receiver<bool> {
        self.stopped.clone()
    }

    /// Runs a task on the next shard, whose index it is told.
    pub(super) async fn run(&self, make: impl FnOnce(usize) -> Run) -> Result<Nudge, DynamoError> {
        let index = self.next.fetch_add(1, Ordering::Relaxed) % self.shards.len();
        let shard = &self.shards[index];
        let mut command = Command::Run(make(index));
        let deadline = Instant::now() + ROOM_MAX;
        while let Err(back) = shard.send(command) {
            if *self.stopped.borrow() || Instant::now() >= deadline {
                let text = "the shard takes no calls: it is too busy, or has stopped";
                return Err(DynamoError::resource_exhausted(text));
            }
            command = back;
            sleep(Duration::from_millis(1)).await;
        }
        Ok(Nudge(shard.clone()))
    }
}
