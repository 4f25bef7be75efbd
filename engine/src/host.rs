//! What the tasks of one shard share with it: pauses, the responses that they have touched, and
//! whether one of them is to run.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use crate::local::Wishes;
use crate::outgoing::Lent;
use crate::ring::monotonic_ns;

/// What the handlers of one shard share: its timers, and the list of responses to look at.
#[derive(Clone, Default)]
pub struct Host(Rc<HostState>);

#[derive(Default)]
struct HostState {
    /// Responses that a handler has touched, by slot and generation.
    touched: RefCell<Vec<(u32, u32)>>,
    /// By deadline and number. The shard's timer wheel counts milliseconds; pauses between items
    /// are shorter.
    sleepers: RefCell<BTreeMap<(u64, u64), Waker>>,
    next_sleeper: Cell<u64>,
    /// A task was spawned or woken since the executor's last turn.
    woken: Cell<bool>,
    tasks: Cell<usize>,
    wishes: Wishes,
    /// Requests of lanes whose caller wants no more, and whether he is gone.
    stopped: RefCell<Vec<(LaneJob, bool)>>,
    /// Blocks of lanes that nobody sends any more.
    returned: RefCell<Vec<Lent>>,
}

/// A request that the worker behind a lane answers: lane and job, each slot and generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LaneJob {
    pub(crate) lane: (u32, u32),
    pub(crate) job: (u32, u32),
}

impl Host {
    /// Waits for so long, at least.
    pub fn sleep(&self, time: Duration) -> Sleep {
        let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        Sleep {
            host: self.clone(),
            deadline_ns: monotonic_ns().saturating_add(ns),
            number: None,
        }
    }

    /// Whether the executor has something to do.
    pub(crate) fn is_woken(&self) -> bool {
        self.0.woken.get()
    }

    pub(crate) fn set_woken(&self, woken: bool) {
        self.0.woken.set(woken);
    }

    /// Tasks that have not ended.
    pub(crate) fn tasks(&self) -> usize {
        self.0.tasks.get()
    }

    /// A response is to be looked at.
    pub(crate) fn touched(&self, place: (u32, u32)) {
        self.0.touched.borrow_mut().push(place);
    }

    pub(crate) fn take_touched(&self, into: &mut Vec<(u32, u32)>) {
        into.append(&mut self.0.touched.borrow_mut());
    }

    /// The caller of a lane's request wants no more.
    pub(crate) fn stopped(&self, job: LaneJob, kill: bool) {
        self.0.stopped.borrow_mut().push((job, kill));
    }

    pub(crate) fn take_stopped(&self, into: &mut Vec<(LaneJob, bool)>) {
        into.append(&mut self.0.stopped.borrow_mut());
    }

    pub(crate) fn take_returned(&self, into: &mut Vec<Lent>) {
        into.append(&mut self.0.returned.borrow_mut());
    }

    /// Blocks go back to their worker.
    pub(crate) fn give_back(&self, lent: impl Iterator<Item = Lent>) {
        self.0.returned.borrow_mut().extend(lent);
    }

    /// When the first sleeper is to be woken.
    pub(crate) fn next_deadline(&self) -> Option<u64> {
        let sleepers = self.0.sleepers.borrow();
        sleepers
            .first_key_value()
            .map(|((deadline, _), _)| *deadline)
    }

    /// Wakes the sleepers whose time has come.
    pub(crate) fn wake_sleepers(&self, now_ns: u64) {
        loop {
            let mut sleepers = self.0.sleepers.borrow_mut();
            match sleepers.first_entry() {
                Some(first) if first.key().0 <= now_ns => {
                    let waker = first.remove();
                    drop(sleepers);
                    self.wake(waker);
                }
                _ => return,
            }
        }
    }

    pub(crate) fn wake(&self, waker: Waker) {
        self.set_woken(true);
        waker.wake();
    }

    pub(crate) fn task_began(&self) {
        self.0.tasks.set(self.tasks() + 1);
        self.set_woken(true);
    }

    pub(crate) fn task_ended(&self) {
        self.0.tasks.set(self.tasks() - 1);
    }

    /// What tasks want of the shard.
    pub(crate) fn wishes(&self) -> &Wishes {
        &self.0.wishes
    }
}

/// A pause of a handler.
#[must_use = "a future does nothing unless it is awaited"]
pub struct Sleep {
    host: Host,
    deadline_ns: u64,
    number: Option<u64>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if monotonic_ns() >= self.deadline_ns {
            return Poll::Ready(());
        }
        let state = Rc::clone(&self.host.0);
        let number = *self.number.get_or_insert_with(|| {
            state.next_sleeper.set(state.next_sleeper.get() + 1);
            state.next_sleeper.get()
        });
        let waker = context.waker().clone();
        let mut sleepers = state.sleepers.borrow_mut();
        sleepers.insert((self.deadline_ns, number), waker);
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(number) = self.number {
            let mut sleepers = self.host.0.sleepers.borrow_mut();
            sleepers.remove(&(self.deadline_ns, number));
        }
    }
}
