//! Tasks of a shard that are no handlers: made by control or by other tasks.

use std::fmt;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::task::{Context, Poll};

use crate::host::Host;

/// Tasks of one shard that are no handlers, at most.
const JOBS_MAX: usize = 64 * 1024;

type Work = Pin<Box<dyn Future<Output = ()>>>;

/// What [`crate::command::Command::Run`] carries: makes a task on the thread of its shard.
pub struct Run(Box<dyn FnOnce(Host) -> Work + Send>);

impl Run {
    /// A task that `make` makes there.
    pub fn new<F, A>(make: F) -> Run
    where
        F: FnOnce(Host) -> A + Send + 'static,
        A: Future<Output = ()> + 'static,
    {
        Run(Box::new(move |host| Box::pin(make(host))))
    }

    /// Makes the task inside itself, so that a panic of `make` ends no more than the task.
    pub(crate) fn begin(self, host: &Host) {
        let (Run(make), own) = (self, host.clone());
        host.spawn(async move { make(own).await });
    }
}

impl fmt::Debug for Run {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Run")
    }
}

impl Host {
    /// Runs `work` on this shard, beside all else. A panic ends it and nothing more. Answers
    /// whether there was room: 65,536 such tasks can run at the same time.
    pub fn spawn(&self, work: impl Future<Output = ()> + 'static) -> bool {
        let wishes = self.wishes();
        if wishes.running.get() >= JOBS_MAX {
            return false;
        }
        wishes.running.set(wishes.running.get() + 1);
        self.task_began();
        let job = Job {
            work: Some(Box::pin(work)),
            host: self.clone(),
        };
        wishes.jobs.borrow_mut().push(job);
        true
    }
}

/// A task that is no handler.
pub(crate) struct Job {
    work: Option<Work>,
    host: Host,
}

impl Job {
    fn put_down(&mut self) {
        let work = self.work.take();
        let _ = catch_unwind(AssertUnwindSafe(|| drop(work)));
    }
}

impl Future for Job {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if let Some(work) = &mut self.work {
            let poll = catch_unwind(AssertUnwindSafe(|| work.as_mut().poll(context)));
            if matches!(poll, Ok(Poll::Pending)) {
                return Poll::Pending;
            }
        }
        self.put_down();
        Poll::Ready(())
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.put_down();
        let wishes = self.host.wishes();
        wishes.running.set(wishes.running.get() - 1);
        self.host.task_ended();
    }
}
