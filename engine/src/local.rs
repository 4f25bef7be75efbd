//! The calls that tasks and handlers make without leaving their core.
//!
//! ```text
//! Command::Run, Host::spawn ---> task
//! task --Caller::call--> new --(client)--> worker
//! task <--Reply::next--- inbox <--(home)--- worker
//! ```
//!
//! A call ends for one of four reasons: its response is over, it fails, a deadline passes, or its
//! [`Reply`] is dropped, which kills it.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::ops::Deref;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use corelane_codec::error::{DynamoError, Reason};
use corelane_codec::reply_frame;

use crate::call::{NewCall, Times, What};
use crate::client;
use crate::feed::{self, Feed};
use crate::home;
use crate::input;
use crate::responder::Host;
use crate::ring::Ring;
use crate::shard::Shard;
use crate::tasks::Job;
pub use crate::tasks::Run;

/// Items of a reply that may wait for their reader before the worker's socket is left unread.
const ITEMS_MAX: usize = 64;
/// Bytes that may.
const BYTES_MAX: usize = 256 * 1024;

/// A call that a task wants to make.
pub(crate) struct Wished {
    new: NewCall,
    inbox: Shared,
    feed: Option<feed::Shared>,
}

/// What the tasks of a shard have asked for since the shard looked last.
#[derive(Default)]
pub(crate) struct Wishes {
    calls: RefCell<Vec<Wished>>,
    /// Calls that their reader has touched, by slot and generation.
    touched: RefCell<Vec<(u32, u32)>>,
    /// The same for request streams that handlers read.
    inputs: RefCell<Vec<(u32, u32)>>,
    pub(crate) jobs: RefCell<Vec<Job>>,
    /// Jobs that have not ended.
    pub(crate) running: Cell<usize>,
    /// Calls that there are places for; `None` on a shard that makes no calls.
    places: Cell<Option<usize>>,
}

impl Wishes {
    pub(crate) fn set_places(&self, places: Option<usize>) {
        self.places.set(places);
    }

    pub(crate) fn take_calls(&self, into: &mut Vec<Wished>) {
        into.append(&mut self.calls.borrow_mut());
    }

    pub(crate) fn take_touched(&self, into: &mut Vec<(u32, u32)>) {
        into.append(&mut self.touched.borrow_mut());
    }

    /// A call is to be looked at.
    pub(crate) fn touch(&self, place: (u32, u32)) {
        self.touched.borrow_mut().push(place);
    }

    fn take_inputs(&self) -> Vec<(u32, u32)> {
        std::mem::take(&mut *self.inputs.borrow_mut())
    }

    pub(crate) fn take_jobs(&self) -> Vec<Job> {
        std::mem::take(&mut *self.jobs.borrow_mut())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.calls.borrow().is_empty()
            && self.touched.borrow().is_empty()
            && self.jobs.borrow().is_empty()
            && self.inputs.borrow().is_empty()
    }
}

impl Host {
    /// What makes calls from this shard.
    pub fn caller(&self) -> Caller {
        Caller { host: self.clone() }
    }
}

/// Makes calls from the shard that it belongs to. Cheap to clone.
#[derive(Clone)]
pub struct Caller {
    host: Host,
}

impl Caller {
    /// Begins a call. What goes wrong, from the beginning on, comes out of the reply.
    pub fn call(&self, new: NewCall) -> Reply {
        self.begin(new, None)
    }

    /// Begins a bidirectional call: its values are written to the [`Feed`], and
    /// [`NewCall::body`] means nothing.
    pub fn call_many(&self, new: NewCall) -> (Feed, Reply) {
        let feed = Feed::new(&self.host);
        let reply = self.begin(new, Some(feed.state()));
        (feed, reply)
    }

    fn begin(&self, new: NewCall, feed: Option<feed::Shared>) -> Reply {
        let inbox = Rc::new(RefCell::new(Inbox::new(&self.host, Kind::Reply)));
        let wishes = self.host.wishes();
        let places = wishes.places.get();
        if let Some(feed) = &feed
            && matches!(places, None | Some(0))
        {
            feed.borrow_mut().give_up();
        }
        match places {
            None => {
                let text = "this shard has no call-home listener, so it cannot call";
                inbox
                    .borrow_mut()
                    .refuse(DynamoError::invalid_argument(text));
            }
            Some(0) => inbox.borrow_mut().refuse(too_many()),
            Some(places) => {
                wishes.places.set(Some(places - 1));
                let inbox = Rc::clone(&inbox);
                wishes.calls.borrow_mut().push(Wished { new, inbox, feed });
            }
        }
        Reply { inbox }
    }

    /// The shard that it belongs to.
    pub fn host(&self) -> &Host {
        &self.host
    }
}

/// No place is left for another call.
pub(crate) fn too_many() -> DynamoError {
    let text = "too many calls at the same time; raise calls_max or call less at once";
    DynamoError::resource_exhausted(text)
}

/// One item of a reply: the data of its wrapper, still encoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item(Vec<u8>);

impl Item {
    /// The bytes, owned.
    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}

impl Deref for Item {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

/// How a reply has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The whole response has come.
    Complete,
    /// It ended early because its reader wanted that.
    Stopped,
    /// The worker refused it in place of accepting it: nothing of it has run. The error was the
    /// last thing that it gave.
    Refused,
    /// It came to nothing, or broke off; the error was the last thing that it gave.
    Failed,
}

/// The response of one call. Dropped before its end it kills the call.
///
/// Up to 64 items or 256 KiB wait for their reader; then the worker is not read from, and is held
/// back in its turn. The deadlines of the call hold in any case.
pub struct Reply {
    inbox: Shared,
}

impl Reply {
    pub(crate) fn of(inbox: Shared) -> Reply {
        Reply { inbox }
    }

    /// The next item, or an error; `None` at the end. An error is the last thing that comes,
    /// unless it is an item that could not be understood.
    pub async fn next(&mut self) -> Option<Result<Item, DynamoError>> {
        poll_fn(|context| self.poll_next(context)).await
    }

    /// [`Reply::next`] for those who poll.
    pub fn poll_next(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Item, DynamoError>>> {
        let mut inbox = self.inbox.borrow_mut();
        if let Some(item) = inbox.take() {
            return Poll::Ready(Some(item.map(Item)));
        }
        if inbox.ending.is_some() {
            return Poll::Ready(None);
        }
        inbox.wait(context)
    }

    /// Waits until the worker has begun to respond: its prologue says that the request is good.
    /// A call that is stopped before that has begun as well; it gives no items.
    ///
    /// # Errors
    /// Why the call came to nothing.
    pub async fn begun(&mut self) -> Result<(), DynamoError> {
        poll_fn(|context| self.poll_begun(context)).await
    }

    /// [`Reply::begun`] for those who poll.
    pub fn poll_begun(&mut self, context: &mut Context<'_>) -> Poll<Result<(), DynamoError>> {
        let mut inbox = self.inbox.borrow_mut();
        if inbox.begun {
            return Poll::Ready(Ok(()));
        }
        if inbox.ending.is_none() {
            return inbox.wait(context);
        }
        match inbox.take() {
            Some(Err(error)) => Poll::Ready(Err(error)),
            _ => Poll::Ready(Ok(())),
        }
    }

    /// Waits until the worker has accepted the request: it stands in its queue, or runs. It need
    /// not be waited for. A call that is stopped before that has been accepted as well.
    ///
    /// # Errors
    /// Why the call came to nothing.
    pub async fn accepted(&mut self) -> Result<(), DynamoError> {
        poll_fn(|context| self.poll_accepted(context)).await
    }

    /// [`Reply::accepted`] for those who poll.
    pub fn poll_accepted(&mut self, context: &mut Context<'_>) -> Poll<Result<(), DynamoError>> {
        {
            let mut inbox = self.inbox.borrow_mut();
            if inbox.times.accepted.is_some() {
                return Poll::Ready(Ok(()));
            }
            inbox.wants_accepted = true;
        }
        self.poll_begun(context)
    }

    /// Asks the worker to stop. What it still sends is given.
    pub fn stop(&self) {
        self.inbox.borrow_mut().wish(false);
    }

    /// Tells the worker to end at once; nothing more is given.
    pub fn kill(&self) {
        self.inbox.borrow_mut().wish(true);
    }

    /// How it has ended, if it has. Items may still lie here.
    pub fn ending(&self) -> Option<Ending> {
        self.inbox.borrow().ending
    }

    /// When its steps happened.
    pub fn times(&self) -> Times {
        self.inbox.borrow().times
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        let mut inbox = self.inbox.borrow_mut();
        inbox.waker = None;
        inbox.wish(true);
    }
}

/// Whose an inbox is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A call's.
    Reply,
    /// A request stream's.
    Input,
}

/// What a call, or a request stream, and its reader share.
pub(crate) struct Inbox {
    kind: Kind,
    /// With the time at which each came, since the call began.
    items: VecDeque<(Duration, Result<Vec<u8>, DynamoError>)>,
    bytes: usize,
    began_ns: u64,
    times: Times,
    /// The reader waits for the acknowledgement.
    wants_accepted: bool,
    begun: bool,
    ending: Option<Ending>,
    waker: Option<Waker>,
    /// The call's slot and generation, once it has one.
    place: Option<(u32, u32)>,
    /// The reader wants it to end: `Some(kill)`.
    wish: Option<bool>,
    /// The call waits for room here.
    held_up: bool,
    touched: bool,
    host: Host,
}

/// An inbox as a call and its reader hold it.
pub(crate) type Shared = Rc<RefCell<Inbox>>;

impl Inbox {
    pub(crate) fn new(host: &Host, kind: Kind) -> Inbox {
        Inbox {
            kind,
            items: VecDeque::new(),
            bytes: 0,
            began_ns: u64::MAX,
            times: Times::default(),
            wants_accepted: false,
            begun: false,
            ending: None,
            waker: None,
            place: None,
            wish: None,
            held_up: false,
            touched: false,
            host: host.clone(),
        }
    }

    // --- for the reader --------------------------------------------------------------

    fn take(&mut self) -> Option<Result<Vec<u8>, DynamoError>> {
        let (came, item) = self.items.pop_front()?;
        self.times.item = Some(came);
        if let Ok(data) = &item {
            self.bytes -= data.len();
        }
        if self.held_up && self.has_room() {
            self.held_up = false;
            self.touch();
        }
        Some(item)
    }

    fn wait<T>(&mut self, context: &mut Context<'_>) -> Poll<T> {
        match &self.waker {
            Some(waker) if waker.will_wake(context.waker()) => {}
            _ => self.waker = Some(context.waker().clone()),
        }
        Poll::Pending
    }

    fn wish(&mut self, kill: bool) {
        if kill {
            self.items.clear();
            self.bytes = 0;
        }
        if self.ending.is_none() && !self.wish.is_some_and(|killed| killed || !kill) {
            self.wish = Some(kill);
            self.touch();
        }
    }

    fn touch(&mut self) {
        if let Some(place) = self.place
            && !self.touched
        {
            self.touched = true;
            let wishes = self.host.wishes();
            let list = match self.kind {
                Kind::Reply => &wishes.touched,
                Kind::Input => &wishes.inputs,
            };
            list.borrow_mut().push(place);
        }
    }

    // --- for the call ----------------------------------------------------------------

    /// The call has a slot, and begins.
    pub(crate) fn placed(&mut self, place: (u32, u32), now_ns: u64) {
        self.place = Some(place);
        self.began_ns = now_ns;
    }

    /// Whether the reader wants it to end, and how; told once.
    pub(crate) fn seen(&mut self) -> Option<bool> {
        self.touched = false;
        self.wish
    }

    /// How it has ended, if it has.
    pub(crate) fn ending(&self) -> Option<Ending> {
        self.ending
    }

    /// Whether another item can be taken.
    pub(crate) fn has_room(&self) -> bool {
        self.items.len() < ITEMS_MAX && self.bytes < BYTES_MAX
    }

    /// The call waits until [`Inbox::has_room`].
    pub(crate) fn hold_up(&mut self) {
        self.held_up = true;
    }

    /// The prologue was good.
    pub(crate) fn begin(&mut self) {
        self.begun = true;
        self.wake();
    }

    /// Something has happened to the call.
    pub(crate) fn tell(&mut self, what: What, now_ns: u64) {
        let since = Duration::from_nanos(now_ns.saturating_sub(self.began_ns));
        let ending = match what {
            What::Acked => {
                self.times.accepted = Some(since);
                if self.wants_accepted {
                    self.wake();
                }
                return;
            }
            What::Item(data) => {
                self.bytes += data.len();
                self.items.push_back((since, Ok(data)));
                return self.wake();
            }
            What::BadItem(error) => {
                self.items.push_back((since, Err(error)));
                return self.wake();
            }
            What::Finished => Ending::Complete,
            What::Stopped => Ending::Stopped,
            What::Refused(text) => {
                self.items.push_back((since, Err(refused(text))));
                Ending::Refused
            }
            What::Failed(error) => {
                self.items.push_back((since, Err(error)));
                Ending::Failed
            }
        };
        self.ending = Some(ending);
        self.times.ended = Some(since);
        self.wake();
    }

    /// The call does not even begin.
    fn refuse(&mut self, error: DynamoError) {
        self.tell(What::Failed(error), 0);
    }

    fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            self.host.wake(waker);
        }
    }
}

/// A worker's refusal as an error (spec/request-plane.md §2.5).
fn refused(text: String) -> DynamoError {
    let reason = match reply_frame::Reply::classify(text.as_bytes()) {
        reply_frame::Reply::Overloaded(_) => Reason::WorkerOverloaded,
        _ => Reason::WorkerUnavailable,
    };
    DynamoError::new(reason, text)
}

/// Does what tasks have asked for since the last time.
pub(crate) fn settle<R: Ring>(shard: &mut Shard<R>) {
    let host = shard.worker.host.clone();
    if !host.wishes().is_empty() {
        for job in host.wishes().take_jobs() {
            shard.worker.spawner.spawn(job);
        }
        let mut begun = std::mem::take(&mut shard.client.begun);
        host.wishes().take_calls(&mut begun);
        for wished in begun.drain(..) {
            begin_local(shard, wished);
        }
        shard.client.begun = begun;
        let mut touched = std::mem::take(&mut shard.client.touched);
        host.wishes().take_touched(&mut touched);
        for (slot, generation) in touched.drain(..) {
            if shard.client.calls.is_current(slot, generation) {
                hear_reader(shard, slot);
            }
        }
        shard.client.touched = touched;
        for (slot, generation) in host.wishes().take_inputs() {
            if shard.worker.inputs.is_current(slot, generation) {
                input::touched(shard, slot);
            }
        }
    }
    show_places(shard);
}

/// Tells tasks how many calls they may begin.
pub(crate) fn show_places<R: Ring>(shard: &Shard<R>) {
    let calls = &shard.client.calls;
    let places = calls.capacity() - calls.used();
    let can_call = shard.client.listener.is_some();
    let wishes = shard.worker.host.wishes();
    wishes.set_places(can_call.then_some(places));
}

/// The reader of a reply has taken something, or wants the call to end.
fn hear_reader<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    let call = &mut shard.client.calls[slot];
    let wish = call.inbox.borrow_mut().seen();
    let has_room = call.inbox.borrow().has_room();
    if has_room && std::mem::take(&mut call.held_up) {
        home::go_on(shard, slot);
    }
    if shard.client.calls.get(slot).is_some() {
        feed::advance(shard, slot);
    }
    // It may have ended just now.
    if let Some(kill) = wish
        && shard.client.calls.get(slot).is_some()
    {
        client::end_early(shard, slot, kill);
    }
}

/// Begins a call for a task.
fn begin_local<R: Ring>(shard: &mut Shard<R>, wished: Wished) {
    let Wished { new, inbox, feed } = wished;
    let unused = feed.clone();
    if inbox.borrow_mut().seen().is_some() {
        give_up(unused);
        return inbox.borrow_mut().tell(What::Stopped, shard.now_ns);
    }
    if let Err(error) = client::begin(shard, new, Rc::clone(&inbox), feed) {
        give_up(unused);
        inbox.borrow_mut().refuse(error);
    }
}

fn give_up(feed: Option<feed::Shared>) {
    if let Some(feed) = feed {
        feed.borrow_mut().give_up();
    }
}
