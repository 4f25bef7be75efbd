//! What handlers and tasks see of the shard that they run on.

use std::rc::Rc;
use std::time::Duration;

use corelane_engine::responder::{Host, Sleep};

/// The shard that a handler or a task runs on. Cheap to clone; never leaves its thread.
#[derive(Clone)]
pub struct Shard(Rc<Inner>);

struct Inner {
    index: usize,
    host: Host,
}

impl Shard {
    pub(super) fn new(index: usize, host: &Host) -> Shard {
        Shard(Rc::new(Inner {
            index,
            host: host.clone(),
        }))
    }

    /// Which of the runtime's shards it is, from 0.
    pub fn index(&self) -> usize {
        self.0.index
    }

    /// Waits for so long, at least.
    pub fn sleep(&self, time: Duration) -> Sleep {
        self.0.host.sleep(time)
    }
}
