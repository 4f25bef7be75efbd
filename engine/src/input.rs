//! The request streams of bidirectional calls, at the worker (spec/request-plane.md §5).
//!
//! ```text
//! dial -> handshake, then our direction is shut
//!      <- item... -> inbox -> handler
//!      <- sentinel: the input is whole     stop, kill, close, anything else: the request ends
//! ```

use std::cell::RefCell;
use std::rc::Rc;
use std::task::{Context, Poll};

use corelane_codec::call_home::{self, StreamMessage};
use corelane_codec::control_message::{PayloadCodec, StreamType};
use corelane_codec::two_part::{self, Message};
use corelane_codec::{Decoded, item};

use crate::client::What;
use crate::connection::{End, Role};
use crate::ends;
use crate::handler::CallHome;
use crate::local::{Ending, Inbox, Kind, Reply, Shared};
use crate::mux;
use crate::respond_stream;
use crate::ring::Ring;
use crate::served::Outcome;
use crate::shard::Shard;
use crate::table::NONE;

/// The largest item; Dynamo knows no limit, we do not buffer without one.
const MESSAGE_BYTES_MAX: u64 = 64 << 20;

/// What the caller of a bidirectional endpoint sends, item by item.
pub struct Input(Reply);

impl Input {
    /// The next item, one encoded value; `None` when no more comes: see [`Input::is_complete`].
    /// While 64 items or 256 KiB wait here, the caller is not read from.
    pub async fn next(&mut self) -> Option<Vec<u8>> {
        std::future::poll_fn(|context| self.poll_next(context)).await
    }

    /// [`Input::next`] for those who poll.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Vec<u8>>> {
        let next = self.0.poll_next(context);
        next.map(|item| item.and_then(Result::ok).map(|item| item.into_bytes()))
    }

    /// Whether the caller has said that this was all. Otherwise the request is stopped or its
    /// caller is gone.
    pub fn is_complete(&self) -> bool {
        self.0.ending() == Some(Ending::Complete)
    }
}

impl std::fmt::Debug for Input {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Input")
    }
}

/// One request stream and its socket.
pub(crate) struct Source {
    inbox: Shared,
    connection: u32,
    subject: String,
    codec: PayloadCodec,
    /// The response of the same request, by slot and generation.
    response: (u32, u32),
    /// The handshake is written and our direction is shut.
    shut: bool,
    held_up: bool,
}

/// Dials for the request stream of a request whose response is at `response`. `None` when there is
/// no room or no way to dial.
pub(crate) fn open<R: Ring>(
    shard: &mut Shard<R>,
    home: CallHome,
    codec: PayloadCodec,
    response: (u32, u32),
) -> Option<Input> {
    let inbox = Inbox::new(&shard.worker.host, Kind::Input);
    let inbox = Rc::new(RefCell::new(inbox));
    let source = Source {
        inbox: Rc::clone(&inbox),
        connection: NONE,
        subject: home.subject,
        codec,
        response,
        shut: false,
        held_up: false,
    };
    let slot = shard.worker.inputs.insert(source).ok()?;
    let place = (slot, shard.worker.inputs.generation(slot));
    let Ok(connection) = shard.dial(&home.address, Role::End(End::Input(slot))) else {
        shard.worker.inputs.remove(slot);
        return None;
    };
    shard.worker.inputs[slot].connection = connection;
    inbox.borrow_mut().placed(place);
    respond_stream::feeds(shard, response, place);
    Some(Input(Reply::of(inbox)))
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
        shard.ring.shutdown_write(connection.handle);
    }
}

/// What has come is taken, as long as the handler takes it.
pub(crate) fn arrived<R: Ring>(shard: &mut Shard<R>, slot: u32, source: u32) {
    let bytes = mux::take(shard, slot);
    let mut taken = 0;
    while let Some(entry) = shard.worker.inputs.get_mut(source) {
        if !entry.inbox.borrow().has_room() {
            entry.held_up = true;
            entry.inbox.borrow_mut().hold_up();
            mux::put_back(shard, slot, bytes, taken);
            return shard.pause(slot);
        }
        let message = match two_part::decode(&bytes[taken..], Some(MESSAGE_BYTES_MAX)) {
            Decoded::Frame(message) => message,
            Decoded::Need(_) => break,
            Decoded::Bad(_) => return over(shard, source, Some(true)),
        };
        let here = &bytes[taken..taken + message.frame_bytes()];
        taken += here.len();
        if let Some(end) = hear(entry, here, &message) {
            return over(shard, source, end);
        }
    }
    mux::put_back(shard, slot, bytes, taken);
    if shard
        .connections
        .get(slot)
        .is_some_and(|one| one.end_of_stream)
    {
        over(shard, source, Some(true));
    }
}

/// Takes one message. `Some`: it was the last, and says how the request is to end, if early.
fn hear(source: &mut Source, bytes: &[u8], message: &Message) -> Option<Option<bool>> {
    match call_home::classify(bytes, message) {
        StreamMessage::Item(body) => match item::value(&bytes[body], source.codec) {
            Ok(value) => {
                let value = value.to_vec();
                source.inbox.borrow_mut().tell(What::Item(value));
                None
            }
            Err(_) => Some(Some(true)),
        },
        StreamMessage::Sentinel => {
            source.inbox.borrow_mut().tell(What::Finished);
            Some(None)
        }
        StreamMessage::Stop => Some(Some(false)),
        _ => Some(Some(true)),
    }
}

/// No more bytes will come: without a closing message that ends the request.
pub(crate) fn ended<R: Ring>(shard: &mut Shard<R>, slot: u32, source: u32) {
    shard.connections[slot].end_of_stream = true;
    if !shard.worker.inputs[source].held_up {
        arrived(shard, slot, source);
    }
}

/// The handler has taken something, or wants no more.
pub(crate) fn touched<R: Ring>(shard: &mut Shard<R>, source: u32) {
    let entry = &mut shard.worker.inputs[source];
    let connection = entry.connection;
    if entry.inbox.borrow_mut().seen().is_some() {
        return close(shard, source);
    }
    if entry.inbox.borrow().has_room() && std::mem::take(&mut entry.held_up) {
        shard.resume(connection);
        arrived(shard, connection, source);
    }
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
    if let Some(entry) = shard.worker.inputs.remove(source) {
        if entry.inbox.borrow().ending().is_none() {
            entry.inbox.borrow_mut().tell(What::Stopped);
        }
        shard.forget(entry.connection);
    }
}

/// The connection is gone, or could not be made.
pub(crate) fn lost<R: Ring>(shard: &mut Shard<R>, source: u32) {
    if shard.worker.inputs.get(source).is_some() {
        over(shard, source, Some(true));
    }
}
