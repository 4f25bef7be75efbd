//! The way from any thread to the shards.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Wake, Waker};
use std::thread::{self, ThreadId};
use std::time::Duration;

use corelane_codec::error::DynamoError;
use corelane_engine::local::Run;
use corelane_engine::mesh::Sender;
use corelane_engine::shard::Command;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use super::shard::Shard;
use crate::cores::Cores;

/// Longest wait for room in the queue of a shard.
const ROOM_MAX: Duration = Duration::from_secs(5);

/// What clients of all threads share.
pub(super) struct Hub {
    shards: Vec<Sender<Command>>,
    next: AtomicUsize,
    stopped: watch::Receiver<bool>,
}

/// The way in for those who wake tasks of a shard from other threads: as commands, which a shard
/// takes at once, while its executor would hear of them late.
#[derive(Clone)]
pub(super) struct Nudge(Sender<Command>);

impl Nudge {
    /// Runs `work`, on the shard, which is woken from other threads.
    pub(super) async fn hear<F: Future>(&self, work: F) -> F::Output {
        let mut work = pin!(work);
        let mut known: Option<(Waker, Waker)> = None;
        poll_fn(|context| {
            let task = context.waker();
            let known = match known.take() {
                Some(pair) if pair.0.will_wake(task) => known.insert(pair),
                _ => known.insert((task.clone(), self.knock(task))),
            };
            work.as_mut().poll(&mut Context::from_waker(&known.1))
        })
        .await
    }

    fn knock(&self, task: &Waker) -> Waker {
        let knock = Knock {
            shard: self.0.clone(),
            task: task.clone(),
            thread: thread::current().id(),
        };
        Arc::new(knock).into()
    }
}

/// Wakes a task from any thread.
struct Knock {
    shard: Sender<Command>,
    task: Waker,
    /// That of the shard.
    thread: ThreadId,
}

impl Wake for Knock {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if thread::current().id() == self.thread {
            return self.task.wake_by_ref();
        }
        // With a full queue it comes late, and it comes.
        if self.shard.send(Command::Wake(self.task.clone())).is_err() {
            self.task.wake_by_ref();
            self.shard.wake();
        }
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

    /// The way in to one shard.
    pub(super) fn nudge(&self, index: usize) -> Nudge {
        Nudge(self.shards[index].clone())
    }

    /// Turns true when the shards have ended.
    pub(super) fn stopped(&self) -> watch::Receiver<bool> {
        self.stopped.clone()
    }

    /// Runs what `make` makes on the next shard, which is woken from other threads.
    pub(super) async fn spawn<A>(
        &self,
        make: impl FnOnce(Shard) -> A + Send + 'static,
    ) -> Result<(), DynamoError>
    where
        A: Future<Output = ()> + 'static,
    {
        let run = |index: usize| {
            let nudge = self.nudge(index);
            Run::new(move |host| {
                let work = make(Shard::new(index, &host));
                async move { nudge.hear(work).await }
            })
        };
        self.run(run).await
    }

    /// Runs a task on the next shard, whose index it is told.
    pub(super) async fn run(&self, make: impl FnOnce(usize) -> Run) -> Result<(), DynamoError> {
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
        Ok(())
    }
}
