//! The way from any thread to the shards.

use std::sync::Arc;

use corelane_engine::mesh::Sender;
use corelane_engine::shard::Command;

use crate::cores::Cores;

/// What clients of all threads share.
pub(super) struct Hub {
    shards: Vec<Sender<Command>>,
}

impl Hub {
    /// To shards that have started.
    pub(super) fn new(cores: &Cores) -> Arc<Hub> {
        Arc::new(Hub {
            shards: cores.commands(),
        })
    }

    /// How many there are.
    pub(super) fn shards(&self) -> usize {
        self.shards.len()
    }
}
