//! The request streams of bidirectional calls, at the worker (spec/request-plane.md §5).
//!
//! ```text
//! dial -> handshake, then our direction is shut
//!      <- item... -> inbox -> handler
//!      <- sentinel: the input is whole     stop, kill, close, anything else: the request ends
//! ```
//!
//! Where the caller offers it, the same bytes come on a connection that is `shared`.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::task::{Context, Poll};

use corelane_codec::call_home::{self, StreamMessage};
use corelane_codec::control_message::{PayloadCodec, StreamType};
use corelane_codec::two_part::{self, Message};
use corelane_codec::{Decoded, item};

use crate::call::What;
use crate::connection::{End, Role};
use crate::ends;
use crate::handler::CallHome;
use crate::local::{Ending, Inbox, Kind, Reply, Shared};
use crate::mux;
use crate::mux_link;
use crate::respond_stream;
use crate::responder;
use crate::ring::Ring;
use crate::served::Outcome;
use crate::shard::Shard;
use crate::table::NONE;

pub(crate) mod shared;

/// The largest item; Dynamo knows no limit, we do not buffer without one.
const MESSAGE_BYTES_MAX: u64 = 64 << 20;
/// Nobody asks when a value of a request stream came.
const NO_TIME: u64 = 0;

/// What the caller of a bidirectional endpoint sends, item by item.
pub struct Input {
    items: Reply,
    response: responder::Shared,
}

impl Input {
    /// The next item, one encoded value; `None` when no more comes: see [`Input::is_complete`].
    /// While 64 items or 256 KiB wait here, the caller is not read from.
    pub async fn next(&mut self) -> Option<Vec<u8>> {
        std::future::poll_fn(|context| self.poll_next(context)).await
    }

    /// [`Input::next`] for those who poll. Whoever waits here has taken the request on: its caller
    /// may wait for the prologue before he sends anything, as with Dynamo's `generate`.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Vec<u8>>> {
        let next = self.items.poll_next(context);
        if next.is_pending() {
            self.response.borrow_mut().take_on();
        }
        next.map(|item| item.and_then(Result::ok).map(|item| item.into_bytes()))
    }

    /// Whether the caller has said that this was all. Otherwise the request is stopped or its
    /// caller is gone.
    pub fn is_complete(&self) -> bool {
        self.items.ending() == Some(Ending::Complete)
    }
}

impl std::fmt::Debug for Input {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Input")
    }
}

/// One request stream, and its socket or its place on a shared one.
pub(crate) struct Source {
    inbox: Shared,
    connection: u32,
    shared: Option<shared::Place>,
    address: SocketAddr,
    subject: String,
    codec: PayloadCodec,
    /// The response of the same request, by slot and generation.
    response: (u32, u32),
    /// The handshake is written and our direction is shut.
    shut: bool,
    held_up: bool,
}

/// Dials for the request stream of the request whose response this is. `None` when there is no
/// room or no way to dial.
pub(crate) fn open<R: Ring>(
    shard: &mut Shard<R>,
    home: CallHome,
    response: &responder::Shared,
) -> Option<Input> {
    let inbox = Inbox::new(&shard.worker.host, Kind::Input);
    let inbox = Rc::new(RefCell::new(inbox));
    let ticket = home.offers_mux.then(|| mux_link::ticket(&home.subject));
    let (codec, place) = {
        let response = response.borrow();
        (response.codec(), response.place())
    };
    let source = Source {
        inbox: Rc::clone(&inbox),
        connection: NONE,
        shared: None,
        address: home.address,
        subject: home.subject,
        codec,
        response: place,
        shut: false,
        held_up: false,
    };
    let slot = shard.worker.inputs.insert(source).ok()?;
    let own = (slot, shard.worker.inputs.generation(slot));
    let shares = ticket
        .flatten()
        .is_some_and(|subject| shared::join(shard, slot, subject));
    if !shares && !dial(shard, slot) {
        shard.worker.inputs.remove(slot);
        return None;
    }
    inbox.borrow_mut().placed(own, NO_TIME);
    respond_stream::feeds(shard, place, own);
    Some(Input {
        items: Reply::of(inbox),
        response: Rc::clone(response),
    })
}

/// Dials for a socket of its own. `false`: there is no way to.
fn dial<R: Ring>(shard: &mut Shard<R>, source: u32) -> bool {
    let address = shard.worker.inputs[source].address;
    match shard.dial(&address, Role::End(End::Input(source))) {
        Ok(connection) => {
            shard.worker.inputs[source].connection = connection;
            true
        }
        Err(_) => false,
    }
}

/// The connect has succeeded.
pub(crate) fn connected<R: Ring>(shard: &mut Shard<R>, slot: u32, source: u32) {
    let subject = &shard.worker.inputs[source].subject;
    let out = shard.connections[slot].outgoing.waiting();
    call_home::write_handshake(subject, StreamType::Request, out);
    ends::flush(shard, slot);
}

/// The socket has taken what was written to it.
pub(crate) fn sent<R: Ring>(shard: &mut Shard<R>, slot: u32, source: u32) {
    let connection = &shard.connections[slot];
    if connection.outgoing.is_empty()
        && let Some(source) = shard.worker.inputs.get_mut(source)
        && !std::mem::replace(&mut source.shut, true)
    {
        shard.end_sending(slot);
    }
}

/// Where reading has come to.
enum Read {
    /// More must come.
    Short,
    /// The handler must take something.
    Full,
    /// That was all, with an early end for the whole request: `Some(kill)`.
    Over(Option<bool>),
}

/// What has come is taken, as long as the handler takes it.
pub(crate) fn arrived<R: Ring>(shard: &mut Shard<R>, slot: u32, source: u32) {
    let Some(entry) = shard.worker.inputs.get_mut(source) else {
        return;
    };
    if entry.held_up {
        return;
    }
    let bytes = mux::take(shard, slot);
    let (taken, read) = shard.worker.inputs[source].read(&bytes);
    mux::put_back(shard, slot, bytes, taken);
    match read {
        Read::Over(end) => over(shard, source, end),
        Read::Full => shard.pause(slot),
        Read::Short if shard.connections[slot].end_of_stream => over(shard, source, Some(true)),
        Read::Short => {}
    }
}

impl Source {
    /// Takes whole messages as long as the handler takes them. Answers how many bytes those were.
    fn read(&mut self, bytes: &[u8]) -> (usize, Read) {
        let mut taken = 0;
        loop {
            if !self.inbox.borrow().has_room() {
                self.held_up = true;
                self.inbox.borrow_mut().hold_up();
                return (taken, Read::Full);
            }
            let message = match two_part::decode(&bytes[taken..], Some(MESSAGE_BYTES_MAX)) {
                Decoded::Frame(message) => message,
                Decoded::Need(_) => return (taken, Read::Short),
                Decoded::Bad(_) => return (taken, Read::Over(Some(true))),
            };
            let here = &bytes[taken..taken + message.frame_bytes()];
            taken += here.len();
            if let Some(end) = hear(self, here, &message) {
                return (taken, Read::Over(end));
            }
        }
    }
}

/// Takes one message. `Some`: it was the last, and says how the request is to end, if early.
fn hear(source: &mut Source, bytes: &[u8], message: &Message) -> Option<Option<bool>> {
    match call_home::classify(bytes, message) {
        StreamMessage::Item(body) => match item::value(&bytes[body], source.codec) {
            Ok(value) => {
                let value = value.to_vec();
                source.inbox.borrow_mut().tell(What::Item(value), NO_TIME);
                None
            }
            Err(_) => Some(Some(true)),
        },
        StreamMessage::Sentinel => {
            source.inbox.borrow_mut().tell(What::Finished, NO_TIME);
            Some(None)
        }
        StreamMessage::Stop => Some(Some(false)),
        _ => Some(Some(true)),
    }
}

/// No more bytes will come: without a closing message that ends the request.
pub(crate) fn ended<R: Ring>(shard: &mut Shard<R>, slot: u32, source: u32) {
    shard.connections[slot].end_of_stream = true;
    arrived(shard, slot, source);
}

/// The handler has taken something, or wants no more.
pub(crate) fn touched<R: Ring>(shard: &mut Shard<R>, source: u32) {
    let entry = &mut shard.worker.inputs[source];
    let connection = entry.connection;
    if entry.inbox.borrow_mut().seen().is_some() {
        return close(shard, source);
    }
    if !entry.inbox.borrow().has_room() || !std::mem::take(&mut entry.held_up) {
        return;
    }
    if entry.shared.is_some() {
        return shared::go_on(shard, source);
    }
    shard.resume(connection);
    arrived(shard, connection, source);
}

/// The input is over, with `end` before its end: then the whole request is.
fn over<R: Ring>(shard: &mut Shard<R>, source: u32, end: Option<bool>) {
    let (slot, generation) = shard.worker.inputs[source].response;
    close(shard, source);
    if let Some(kill) = end
        && shard.worker.responses.is_current(slot, generation)
    {
        shard.worker.responses[slot].early = Some(Outcome::Cancelled);
        respond_stream::die(shard, slot, kill);
    }
}

/// Closes the socket; the handler hears that no more comes.
pub(crate) fn close<R: Ring>(shard: &mut Shard<R>, source: u32) {
    let Some(mut entry) = shard.worker.inputs.remove(source) else {
        return;
    };
    if entry.inbox.borrow().ending().is_none() {
        entry.inbox.borrow_mut().tell(What::Stopped, NO_TIME);
    }
    match entry.shared.take() {
        Some(place) => shared::leave(shard, &place),
        None if entry.connection != NONE => shard.forget(entry.connection),
        None => {}
    }
}

/// The connection is gone, or could not be made.
pub(crate) fn lost<R: Ring>(shard: &mut Shard<R>, source: u32) {
    if shard.worker.inputs.get(source).is_some() {
        over(shard, source, Some(true));
    }
}
