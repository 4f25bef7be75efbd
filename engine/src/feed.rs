//! The request streams of bidirectional calls, at the caller (spec/request-plane.md §5).
//!
//! ```text
//! writer --item, finish--> out --(handshake of the worker)--> socket
//! ```
//!
//! One closing message ends it: the sentinel when the writer has finished, stop or kill when the
//! call ends before that. The worker may ask for it on a connection that is `shared`.

use std::cell::RefCell;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use corelane_codec::call_home::{KILL_FRAME, SENTINEL_FRAME, STOP_FRAME};
use corelane_codec::two_part;

use crate::connection::{End, Role};
use crate::ends;
use crate::home;
use crate::host::Host;
use crate::responder::Gone;
use crate::ring::Ring;
use crate::shard::Shard;
use crate::table::NONE;

pub(crate) mod shared;

/// Bytes that may wait for the worker before the writer has to.
const BYTES_MAX: usize = 256 * 1024;

/// Writes the requests of one bidirectional call. Dropped before [`Feed::finish`] it ends the
/// stream with a kill, so that half an input is not taken for a whole one.
pub struct Feed {
    state: Shared,
}

impl Feed {
    pub(crate) fn new(host: &Host) -> Feed {
        Feed {
            state: Rc::new(RefCell::new(State {
                out: Vec::new(),
                sending_bytes: 0,
                closed: false,
                over: false,
                abandoned: false,
                waker: None,
                place: None,
                touched: false,
                host: host.clone(),
                subject: 0,
                connection: NONE,
                shared: None,
            })),
        }
    }

    pub(crate) fn state(&self) -> Shared {
        Rc::clone(&self.state)
    }

    /// Writes one item, one value encoded by the call's codec. Waits while 256 KiB wait for the
    /// worker.
    ///
    /// # Errors
    /// [`Gone`]: the call is over, or its worker takes no more.
    pub async fn item(&mut self, value: &[u8]) -> Result<(), Gone> {
        poll_fn(|context| self.state.borrow_mut().poll_room(context)).await?;
        let mut state = self.state.borrow_mut();
        two_part::write(b"", value, &mut state.out);
        state.touch();
        Ok(())
    }

    /// What became of it, for whoever reads the reply.
    pub fn fate(&self) -> Fate {
        Fate(self.state())
    }

    /// Says that this was all.
    pub fn finish(self) {
        self.state.borrow_mut().close(&SENTINEL_FRAME);
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        let mut state = self.state.borrow_mut();
        state.abandoned = !state.closed && !state.over;
        state.close(&KILL_FRAME);
    }
}

/// What became of a [`Feed`] that somebody else has.
pub struct Fate(Shared);

impl Fate {
    /// Whether it was dropped unfinished while its call went on: then that is why the call fails.
    pub fn is_abandoned(&self) -> bool {
        self.0.borrow().abandoned
    }
}

/// What a writer and its call share.
pub(crate) struct State {
    /// Not given to the socket.
    out: Vec<u8>,
    /// Given to it, and not taken.
    sending_bytes: usize,
    /// The closing message is written.
    closed: bool,
    /// Nobody reads any more.
    over: bool,
    /// Its writer has dropped it before either.
    abandoned: bool,
    waker: Option<Waker>,
    /// The call, by slot and generation, once it has begun.
    place: Option<(u32, u32)>,
    touched: bool,
    host: Host,
    /// The ticket of the worker's socket.
    pub(crate) subject: u128,
    connection: u32,
    /// Its place on a shared connection, in place of a socket of its own.
    shared: Option<shared::Place>,
}

/// A stream as its call and its writer hold it.
pub(crate) type Shared = Rc<RefCell<State>>;

impl State {
    pub(crate) fn begin(&mut self, place: (u32, u32)) {
        self.place = Some(place);
    }

    /// Nobody reads any more.
    pub(crate) fn give_up(&mut self) {
        self.over = true;
        self.wake();
    }

    fn poll_room(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Gone>> {
        if self.over || self.closed {
            return Poll::Ready(Err(Gone));
        }
        if self.out.len() + self.sending_bytes < BYTES_MAX {
            return Poll::Ready(Ok(()));
        }
        self.waker = Some(context.waker().clone());
        Poll::Pending
    }

    fn close(&mut self, frame: &[u8]) {
        if !self.closed && !self.over {
            self.closed = true;
            self.out.extend_from_slice(frame);
            self.touch();
            self.wake();
        }
    }

    fn touch(&mut self) {
        if let Some(place) = self.place
            && !std::mem::replace(&mut self.touched, true)
        {
            self.host.wishes().touch(place);
        }
    }

    fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            self.host.wake(waker);
        }
    }
}

/// The call whose request stream a worker with this subject may read, and the stream.
fn expected<R: Ring>(shard: &Shard<R>, subject: u128) -> Option<(u32, Shared)> {
    let call = shard.client.of_subject(subject)?;
    let entry = &shard.client.calls[call];
    let feed = entry.feed.as_ref().filter(|_| !entry.is_late())?;
    let state = feed.borrow();
    let taken = state.connection != NONE || state.shared.is_some();
    (state.subject == subject && !taken && !state.over).then(|| (call, Rc::clone(feed)))
}

/// A worker has dialled for a request stream. `false`: it is for none of ours.
pub(crate) fn begin<R: Ring>(shard: &mut Shard<R>, slot: u32, subject: u128) -> bool {
    let Some((call, feed)) = expected(shard, subject) else {
        return false;
    };
    feed.borrow_mut().connection = slot;
    shard.connections[slot].role = Role::End(End::Feed(call));
    advance(shard, call);
    true
}

/// The writer has written, or the socket has taken what it had.
pub(crate) fn advance<R: Ring>(shard: &mut Shard<R>, call: u32) {
    let Some(feed) = &shard.client.calls[call].feed else {
        return;
    };
    let mut state = feed.borrow_mut();
    state.touched = false;
    if state.shared.is_some() {
        drop(state);
        return shared::advance(shard, call);
    }
    let Some(connection) = shard.connections.get_mut(state.connection) else {
        return;
    };
    if !connection.outgoing.is_empty() || state.out.is_empty() {
        return;
    }
    std::mem::swap(connection.outgoing.waiting(), &mut state.out);
    state.sending_bytes = connection.outgoing.unsent();
    let slot = state.connection;
    drop(state);
    ends::flush(shard, slot);
}

/// The socket has taken something.
pub(crate) fn sent<R: Ring>(shard: &mut Shard<R>, slot: u32, call: u32) {
    if !shard.connections[slot].outgoing.is_empty() {
        return;
    }
    let Some(feed) = &shard.client.calls[call].feed else {
        return;
    };
    let mut state = feed.borrow_mut();
    state.sending_bytes = 0;
    state.wake();
    if state.closed && state.out.is_empty() {
        drop(state);
        // The socket stays until the call ends: closing it might cost what it still has.
        return shard.end_sending(slot);
    }
    drop(state);
    advance(shard, call);
}

/// The worker does not read any more.
pub(crate) fn lost<R: Ring>(shard: &mut Shard<R>, slot: u32, call: u32) {
    if let Some(entry) = shard.client.calls.get(call)
        && let Some(feed) = &entry.feed
        && feed.borrow().connection == slot
    {
        let mut state = feed.borrow_mut();
        state.connection = NONE;
        state.give_up();
    }
}

/// The hearer of the call wants it to end.
pub(crate) fn stop<R: Ring>(shard: &mut Shard<R>, call: u32, kill: bool) {
    if let Some(feed) = &shard.client.calls[call].feed {
        let frame = if kill { &KILL_FRAME } else { &STOP_FRAME };
        feed.borrow_mut().close(frame);
        advance(shard, call);
    }
}

/// The call has ended: nothing more is read.
pub(crate) fn end<R: Ring>(shard: &mut Shard<R>, feed: &Shared) {
    let mut state = feed.borrow_mut();
    state.close(&KILL_FRAME);
    state.give_up();
    let rest = std::mem::take(&mut state.out);
    let slot = std::mem::replace(&mut state.connection, NONE);
    let place = state.shared.take();
    drop(state);
    if let Some(place) = place {
        shared::leave(shard, &place);
    }
    if slot != NONE {
        shard.connections[slot]
            .outgoing
            .waiting()
            .extend_from_slice(&rest);
        ends::flush(shard, slot);
        home::hang_up(shard, slot);
    }
}
