//! Replies to callers, in the order of their requests, and the answers of instances that they
//! follow from.

use corelane_codec::reply_frame::{self, Reply as Answer};
use corelane_codec::{Decoded, TooLarge};

use crate::connection::{Connection, Fifo, Intake};
use crate::in_flight::{Reply, Request};
use crate::ring::Ring;
use crate::send_pool::{CHUNK_BYTES, ChunkId};
use crate::shard::Shard;
use crate::stats::flight::Kind;
use crate::table::NONE;
use crate::{decode, forward, settle};

/// So much of an unknown path is repeated in its refusal.
pub(crate) const ECHO_BYTES_MAX: usize = 512;
/// The longest reply of an instance that is understood; more ends the connection to it.
const ANSWER_BYTES_MAX: u64 = 64 * 1024;
/// Chunks of unread replies after which a caller is not listened to any more.
const UNREAD_CHUNKS_MAX: usize = 4;
/// Requests of one connection that may wait for their reply.
const REPLIES_MAX: u32 = 16 * 1024;

/// Why a request is not forwarded. Dynamo's client understands two beginnings
/// (spec/request-plane.md §2.5); any other text it takes for success.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Refusal<'a> {
    /// We offer no such endpoint, or not any more.
    UnknownEndpoint {
        /// The path, as far as it is repeated.
        path: &'a str,
    },
    /// The path is not text.
    BadPath,
    /// The frame is too large.
    TooLarge(TooLarge),
    /// The route relays, and the envelope cannot be used for that.
    BadEnvelope {
        /// Why not.
        why: &'a str,
    },
    /// No instance can be reached.
    NoInstance,
    /// The instance asked for by name cannot be reached.
    NoSuchInstance,
    /// The queues to all instances are full.
    QueueFull,
    /// A table of this shard is full.
    TableFull,
    /// All instances tried were overloaded.
    AllOverloaded,
    /// Our own handlers have all that they can take.
    AtCapacity,
    /// The connection to the instance was lost and no other could be tried.
    InstanceLost,
    /// The instance did not answer in time and no other could be tried.
    AnswerOverdue,
}

/// Writes the text of a refusal behind its length. `listen` and `target` name the route.
fn write_refusal(out: &mut Vec<u8>, refusal: Refusal<'_>, target: &str) {
    let unavailable = |text: &[&str], out: &mut Vec<u8>| {
        let mut pieces = [reply_frame::UNAVAILABLE_PREFIX, "", "", "", ""];
        pieces[1..=text.len()].copy_from_slice(text);
        reply_frame::write(&pieces[..=text.len()], out);
    };
    match refusal {
        Refusal::UnknownEndpoint { path } => reply_frame::write_unknown_endpoint(path, out),
        Refusal::BadPath => unavailable(&[" invalid endpoint path"], out),
        Refusal::TooLarge(error) => unavailable(&[" ", &error.to_string()], out),
        Refusal::BadEnvelope { why } => unavailable(&[" ", why], out),
        Refusal::NoInstance => unavailable(&[" no instance of ", target], out),
        Refusal::NoSuchInstance => {
            unavailable(
                &[" the instance asked for is not among those of ", target],
                out,
            );
        }
        Refusal::QueueFull => {
            let text = " the queues to all instances are full";
            reply_frame::write(&[reply_frame::OVERLOADED_PREFIX, text], out);
        }
        Refusal::TableFull => {
            let text = " the router has too many requests in flight";
            reply_frame::write(&[reply_frame::OVERLOADED_PREFIX, text], out);
        }
        Refusal::AllOverloaded | Refusal::AtCapacity => reply_frame::write_overloaded(out),
        Refusal::InstanceLost => unavailable(&[" the connection to ", target, " was lost"], out),
        Refusal::AnswerOverdue => unavailable(&[" ", target, " did not answer in time"], out),
    }
}

fn count<R: Ring>(shard: &Shard<R>, refusal: Refusal<'_>) {
    let stats = &shard.stats.shard;
    match refusal {
        Refusal::UnknownEndpoint { .. } => stats.refused_unknown_endpoint.add(1),
        Refusal::BadPath => stats.refused_bad_frame.add(1),
        Refusal::TooLarge(_) => stats.refused_frame_too_large.add(1),
        Refusal::BadEnvelope { .. } => stats.refused_bad_envelope.add(1),
        Refusal::NoInstance | Refusal::NoSuchInstance => stats.refused_no_instance.add(1),
        Refusal::QueueFull | Refusal::TableFull | Refusal::AtCapacity => {
            stats.refused_overloaded.add(1);
        }
        Refusal::AllOverloaded | Refusal::InstanceLost | Refusal::AnswerOverdue => {
            stats.refused_by_instances.add(1);
        }
    }
}

/// Refuses a frame that never became a request. `false`: there is no room for the reply now.
pub(crate) fn refuse<R: Ring>(shard: &mut Shard<R>, slot: u32, refusal: Refusal<'_>) -> bool {
    let Some(chunk) = text(shard, refusal, "") else {
        return false;
    };
    if !reply_now(shard, slot, Reply::Text(chunk)) {
        shard.pool.free(chunk);
        return false;
    }
    count(shard, refusal);
    shard.note_refused_frame(slot, refusal.why());
    true
}

/// Acknowledges a frame that never became a request. `false`: no room for the reply now.
pub(crate) fn accept<R: Ring>(shard: &mut Shard<R>, slot: u32) -> bool {
    reply_now(shard, slot, Reply::Accepted)
}

fn reply_now<R: Ring>(shard: &mut Shard<R>, slot: u32, reply: Reply) -> bool {
    let mut request = Request::new(slot, NONE, shard.now_ns);
    request.reply = reply;
    let Ok(request) = shard.requests.insert(request) else {
        return false;
    };
    owe(shard, slot, request);
    pay(shard, slot);
    true
}

/// The text of a refusal in a chunk of its own.
fn text<R: Ring>(shard: &mut Shard<R>, refusal: Refusal<'_>, target: &str) -> Option<ChunkId> {
    let mut bytes = Vec::with_capacity(128);
    write_refusal(&mut bytes, refusal, target);
    chunk_of(shard, &bytes)
}

fn chunk_of<R: Ring>(shard: &mut Shard<R>, bytes: &[u8]) -> Option<ChunkId> {
    let chunk = shard.pool.allocate()?;
    if !shard.pool.write(chunk, bytes) {
        shard.pool.free(chunk);
        return None;
    }
    Some(chunk)
}

/// A request joins the replies that its connection is owed.
pub(crate) fn owe<R: Ring>(shard: &mut Shard<R>, slot: u32, request: u32) {
    let replies = &mut shard.connections[slot].replies;
    match replies.tail {
        NONE => replies.head = request,
        tail => shard.requests[tail].next_reply = request,
    }
    replies.tail = request;
    replies.len += 1;
}

/// Decides a request's reply with a refusal.
pub(crate) fn refuse_request<R: Ring>(shard: &mut Shard<R>, request: u32, refusal: Refusal<'_>) {
    let route = shard.requests[request].route;
    let target = shard
        .directory
        .routes
        .get(route as usize)
        .map(|route| route.target.clone());
    count(shard, refusal);
    shard.note_refused(request, refusal.why());
    let chunk = text(shard, refusal, target.as_deref().unwrap_or(""));
    // Without a chunk the caller gets the one word that makes him try again elsewhere.
    decide(shard, request, chunk.map_or(Reply::Text(NONE), Reply::Text));
}

/// Decides a request's reply; it leaves when those before it have.
pub(crate) fn decide<R: Ring>(shard: &mut Shard<R>, request: u32, reply: Reply) {
    let entry = &mut shard.requests[request];
    debug_assert_eq!(entry.reply, Reply::Open);
    entry.reply = reply;
    match entry.downstream {
        NONE => {}
        slot => pay(shard, slot),
    }
}

/// Moves decided replies from the front of the line to the connection's output.
pub(crate) fn pay<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    let Some(connection) = shard.connections.get(slot) else {
        return;
    };
    let (mut replies, mut out) = (connection.replies, connection.out);
    let mut paid = false;
    while replies.head != NONE {
        let request = replies.head;
        let entry = &shard.requests[request];
        let written = match entry.reply {
            Reply::Open => break,
            Reply::Accepted => shard.pool.push(&mut out, &reply_frame::ACCEPTED),
            Reply::Text(NONE) => shard.pool.push(&mut out, &OVERLOADED_FRAME),
            Reply::Text(chunk) => {
                let bytes = shard.pool.written(chunk);
                let mut copy = [0; CHUNK_BYTES];
                copy[..bytes.len()].copy_from_slice(bytes);
                let bytes = bytes.len();
                shard.pool.push(&mut out, &copy[..bytes])
            }
        };
        if !written {
            break;
        }
        let accepted = entry.reply == Reply::Accepted;
        if accepted {
            shard.stats.shard.acknowledged.add(1);
        }
        shard.note(Kind::Replied, u32::from(!accepted), request, slot.into());
        replies.head = entry.next_reply;
        replies.len -= 1;
        paid = true;
        shard.requests[request].downstream = NONE;
        settle::end_if_over(shard, request);
    }
    if replies.head == NONE {
        replies.tail = NONE;
    }
    let connection = &mut shard.connections[slot];
    (connection.replies, connection.out) = (replies, out);
    if paid {
        shard.soil(slot);
    }
    hold_back_if_unread(shard, slot);
}

/// `Server overloaded: router out of memory for replies`, the one refusal that needs no chunk.
const OVERLOADED_FRAME: [u8; 4 + 51] = {
    let text = b"Server overloaded: router out of memory for replies";
    let mut frame = [0; 55];
    frame[3] = 51;
    let mut at = 0;
    while at < text.len() {
        frame[4 + at] = text[at];
        at += 1;
    }
    frame
};

/// A caller who does not read his replies is not listened to until he does.
fn hold_back_if_unread<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    let connection = &shard.connections[slot];
    if connection.closing || is_ready(shard, connection) {
        return;
    }
    shard.pause(slot);
}

fn is_ready<R: Ring>(shard: &Shard<R>, connection: &Connection) -> bool {
    connection.replies.len < REPLIES_MAX
        && (connection.out.is_empty() || shard.pool.chunks(&connection.out) < UNREAD_CHUNKS_MAX)
}

/// Listens to a caller again if nothing of ours stands in the way.
pub(crate) fn resume_if_ready<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    let connection = &shard.connections[slot];
    if !connection.paused {
        return close_if_over(shard, slot);
    }
    if connection.closing || !is_ready(shard, connection) {
        return;
    }
    if let Intake::Stream { request, .. } = connection.intake
        && forward::is_backed_up(shard, request)
    {
        return;
    }
    shard.resume(slot);
    // What had arrived before the pause may hold whole frames.
    if !shard.connections[slot].paused {
        decode::requests(shard, slot);
    }
    close_if_over(shard, slot);
}

/// The socket took `bytes` bytes of replies.
pub(crate) fn replies_sent<R: Ring>(shard: &mut Shard<R>, slot: u32, bytes: usize) {
    let mut out = shard.connections[slot].out;
    shard.pool.sent(&mut out, bytes);
    shard.connections[slot].out = out;
    pay(shard, slot);
    let connection = &shard.connections[slot];
    if !connection.out.is_empty() {
        shard.soil(slot);
    }
    resume_if_ready(shard, slot);
}

/// Closes the connection of a caller who sends nothing more and is owed nothing more.
fn close_if_over<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    let Some(connection) = shard.connections.get(slot) else {
        return;
    };
    let owed = connection.replies.len > 0 || !connection.out.is_empty();
    let waits = connection.paused && !connection.incoming.is_empty();
    if connection.end_of_stream && !connection.closing && !owed && !waits {
        shard.lost(slot, 0);
    }
}

/// The caller will send nothing more, but is owed replies.
pub(crate) fn downstream_half_closed<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    decode::requests(shard, slot);
    let Some(connection) = shard.connections.get_mut(slot) else {
        return;
    };
    if let Intake::Stream { request, .. } = connection.intake {
        connection.intake = Intake::Frames;
        settle::abort(shard, request);
    } else if let Intake::Lane { .. } = connection.intake {
        return shard.lost(slot, libc::ECONNABORTED);
    }
    close_if_over(shard, slot);
}

/// The caller's connection is gone. Requests that are complete go on: the caller hears of them over
/// his call-home address.
pub(crate) fn downstream_lost<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    let connection = &mut shard.connections[slot];
    let mut request = connection.replies.head;
    connection.replies = Fifo::EMPTY;
    let intake = std::mem::replace(&mut connection.intake, Intake::Frames);
    while request != NONE {
        let next = shard.requests[request].next_reply;
        shard.requests[request].downstream = NONE;
        settle::end_if_over(shard, request);
        request = next;
    }
    if let Intake::Stream { request, .. } = intake {
        settle::abort(shard, request);
    } else if let Intake::Lane { .. } = intake {
        // The kernel may still write there: it is undone when the connection is retired.
        shard.connections[slot].intake = intake;
    }
}

/// Answers of an instance: each belongs to the oldest request that waits there.
pub(crate) fn answers<R: Ring>(shard: &mut Shard<R>, slot: u32, upstream: u32) {
    loop {
        let Some(connection) = shard.connections.get_mut(slot) else {
            return;
        };
        if connection.closing || connection.incoming.is_empty() {
            return;
        }
        let mut incoming = connection.incoming;
        let front = shard.pieces.front(&incoming);
        // Nearly all answers are empty, and many come at once.
        let empty = front
            .chunks_exact(4)
            .take_while(|chunk| *chunk == reply_frame::ACCEPTED);
        let empty = empty.count();
        if empty > 0 {
            shard.pieces.advance(&mut incoming, empty * 4);
            shard.connections[slot].incoming = incoming;
            for _ in 0..empty {
                if !settle::answered(shard, upstream, Answer::Accepted) {
                    return;
                }
            }
            continue;
        }
        if !one_answer(shard, slot, upstream) {
            return;
        }
    }
}

/// An answer with a text, or one that a buffer boundary cuts through.
fn one_answer<R: Ring>(shard: &mut Shard<R>, slot: u32, upstream: u32) -> bool {
    let mut incoming = shard.connections[slot].incoming;
    let mut scratch = std::mem::take(&mut shard.scratch);
    let copied = shard.pieces.copy_out(&incoming, 0, &mut scratch);
    let goes_on = match reply_frame::decode(&scratch[..copied], ANSWER_BYTES_MAX) {
        Decoded::Frame(text) => {
            shard.pieces.advance(&mut incoming, text.end);
            shard.connections[slot].incoming = incoming;
            settle::answered(shard, upstream, Answer::classify(&scratch[text]))
        }
        Decoded::Need(_) => false,
        Decoded::Bad(_) => {
            shard.stats.shard.protocol_errors.add(1);
            shard.note_stranger(&scratch[..copied]);
            shard.lost(slot, libc::EBADMSG);
            false
        }
    };
    shard.scratch = scratch;
    goes_on
}

/// What the caller gets before words of an instance that he would take for success
/// (spec/request-plane.md §2.5): he would wait for a response that never comes.
const MEANINGLESS: &[u8] = b"Server unavailable: the instance answered: ";

/// The instance's own words, for the caller. Words that do not fit a chunk are cut.
pub(crate) fn decide_text<R: Ring>(shard: &mut Shard<R>, request: u32, text: &[u8]) {
    let before = match Answer::classify(text).is_refusal() {
        true => &[],
        false => MEANINGLESS,
    };
    let text = &text[..text.len().min(CHUNK_BYTES - 4 - before.len())];
    let start = 4 + before.len();
    let end = start + text.len();
    let mut frame = [0; CHUNK_BYTES];
    frame[..4].copy_from_slice(&(end as u32 - 4).to_be_bytes());
    frame[4..start].copy_from_slice(before);
    frame[start..end].copy_from_slice(text);
    let chunk = chunk_of(shard, &frame[..end]);
    decide(shard, request, chunk.map_or(Reply::Text(NONE), Reply::Text));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_begins_as_dynamos_client_wants_it() {
        let error = TooLarge {
            frame_bytes: 10,
            max_bytes: 9,
        };
        for refusal in [
            Refusal::UnknownEndpoint { path: "0/a/b/c" },
            Refusal::BadPath,
            Refusal::TooLarge(error),
            Refusal::BadEnvelope { why: "it is empty" },
            Refusal::NoInstance,
            Refusal::NoSuchInstance,
            Refusal::QueueFull,
            Refusal::TableFull,
            Refusal::AllOverloaded,
            Refusal::AtCapacity,
            Refusal::InstanceLost,
            Refusal::AnswerOverdue,
        ] {
            let mut out = Vec::new();
            write_refusal(&mut out, refusal, "ns/comp/ep");
            let text = reply_frame::decode(&out, 1024).frame().unwrap();
            assert_eq!(text.end, out.len());
            assert!(Answer::classify(&out[text]).is_refusal(), "{refusal:?}");
        }
        let text = reply_frame::decode(&OVERLOADED_FRAME, 1024)
            .frame()
            .unwrap();
        assert_eq!(text.end, OVERLOADED_FRAME.len());
        assert!(Answer::classify(&OVERLOADED_FRAME[text]).is_refusal());
    }
}
