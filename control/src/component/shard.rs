//! What handlers and tasks see of the shard that they run on.

use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use corelane_engine::responder::{Host, Sleep};

use super::client::Client;
use super::local_client::LocalClient;

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

    /// Calls what `client` calls, from here.
    pub fn client(&self, client: &Client) -> LocalClient {
        LocalClient::new(client, self)
    }

    /// Runs `work` on this shard, beside all else. A panic ends it and nothing more. Answers
    /// whether there was room for it.
    pub fn spawn(&self, work: impl Future<Output = ()> + 'static) -> bool {
        self.0.host.spawn(work)
    }

    pub(super) fn host(&self) -> &Host {
        &self.0.host
    }

    /// Waits for so long, at least.
    pub fn sleep(&self, time: Duration) -> Sleep {
        self.0.host.sleep(time)
    }
}
