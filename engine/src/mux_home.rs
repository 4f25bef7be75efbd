//! Connections that the responses of many calls share: the caller's end
//! ([`corelane_codec::mux`]).
//!
//! A worker opens one at the call-home listener. Each stream on it is the response of one call, or
//! takes the request stream of one ([`crate::feed::shared`]). A call whose hearer takes nothing
//! keeps what has come, one window at most, and gives no credit.

use std::collections::HashMap;

use corelane_codec::call_home::{KILL_FRAME, STOP_FRAME};
use corelane_codec::mux::{self, HELLO_CHUNK, Kind, WINDOW_BYTES};
use corelane_codec::{Decoded, two_part};

use crate::client;
use crate::connection::{End, Role};
use crate::ends;
use crate::feed;
use crate::home;
use crate::mux::{Piece, Reader, put_back, take};
use crate::ring::Ring;
use crate::shard::Shard;
use crate::table::NONE;

/// Shared connections from workers, at most.
pub(crate) const HOMES_MAX: usize = 1024;
/// Credit is granted in such steps.
const CREDIT_BYTES: u32 = WINDOW_BYTES / 4;

/// One shared connection.
pub(crate) struct Shared {
    pub(crate) connection: u32,
    reader: Reader,
    /// Calls by the number of their stream, with their generation.
    streams: HashMap<u32, (u32, u32)>,
    /// The same by the number of their request stream.
    pub(crate) feeds: HashMap<u32, (u32, u32)>,
    /// Calls whose request stream waits for room, with their generation.
    pub(crate) waiting: Vec<(u32, u32)>,
}

/// The response of a call as a stream of a shared connection.
#[derive(Debug)]
pub(crate) struct Stream {
    shared: u32,
    number: u32,
    /// What has come and could not be taken, or is no whole message.
    pending: Vec<u8>,
    /// Bytes that the worker may still send.
    window: u32,
    /// Bytes that it may send more, once it is told.
    owed: u32,
    /// Nothing more will come.
    ended: bool,
}

/// A worker has said hello on a connection: from now on many share it. `false`: there are too many.
pub(crate) fn begin<R: Ring>(shard: &mut Shard<R>, slot: u32) -> bool {
    let shared = Shared {
        connection: slot,
        reader: Reader::default(),
        streams: HashMap::new(),
        feeds: HashMap::new(),
        waiting: Vec::new(),
    };
    let Ok(shared) = shard.client.shared.insert(shared) else {
        return false;
    };
    let connection = &mut shard.connections[slot];
    connection.role = Role::End(End::MuxHome(shared));
    connection
        .outgoing
        .waiting()
        .extend_from_slice(&HELLO_CHUNK);
    ends::flush(shard, slot);
    arrived(shard, slot, shared);
    true
}

/// Chunks have arrived.
pub(crate) fn arrived<R: Ring>(shard: &mut Shard<R>, slot: u32, shared: u32) {
    let bytes = take(shard, slot);
    let mut taken = 0;
    while let Some(entry) = shard.client.shared.get_mut(shared) {
        match entry.reader.next(&bytes[taken..]) {
            Ok(Some((piece, length))) => {
                taken += length;
                if !hear(shard, shared, piece) {
                    return shard.lost(slot, libc::EBADMSG);
                }
            }
            Ok(None) => return put_back(shard, slot, bytes, taken),
            Err(_) => return shard.lost(slot, libc::EBADMSG),
        }
    }
}

/// `false`: a worker does not say that.
fn hear<R: Ring>(shard: &mut Shard<R>, shared: u32, piece: Piece<'_>) -> bool {
    match piece {
        Piece::Open { stream, subject } => return open(shard, shared, stream, subject),
        Piece::Bytes { stream, bytes, end } => return more(shard, shared, stream, bytes, end),
        Piece::Reset { stream } => match of_number(shard, shared, stream) {
            Some(call) => finish(shard, call),
            None => feed::shared::refused(shard, shared, stream),
        },
        // Of a response he sends, and takes none.
        Piece::Credit { stream, .. } if of_number(shard, shared, stream).is_some() => {
            return false;
        }
        Piece::Credit { stream, bytes } => feed::shared::credited(shard, shared, stream, bytes),
        Piece::Hello => return false,
    }
    true
}

fn open<R: Ring>(shard: &mut Shard<R>, shared: u32, number: u32, subject: u128) -> bool {
    let entry = &shard.client.shared[shared];
    if entry.streams.contains_key(&number) || entry.feeds.contains_key(&number) {
        return false;
    }
    match home::expected(shard, subject) {
        Some(call) if shard.client.calls[call].is_late() => {
            let kill = client::settle_late(shard, call);
            let frame = if kill { &KILL_FRAME } else { &STOP_FRAME };
            say(shard, shared, number, frame);
        }
        Some(call) => {
            let generation = shard.client.calls.generation(call);
            let entry = &mut shard.client.shared[shared];
            entry.streams.insert(number, (call, generation));
            let connection = entry.connection;
            let stream = Stream {
                shared,
                number,
                pending: Vec::new(),
                window: WINDOW_BYTES,
                owed: 0,
                ended: false,
            };
            client::called_home(shard, call, connection, Some(stream));
            shard.stats.shard.mux_received.add(1);
        }
        None if feed::shared::begin(shard, shared, number, subject) => {}
        None => {
            shard.stats.shard.homes_refused.add(1);
            write(shard, shared, &mux::prefix(number, Kind::Reset, 0));
        }
    }
    true
}

fn of_number<R: Ring>(shard: &Shard<R>, shared: u32, number: u32) -> Option<u32> {
    let entry = shard.client.shared.get(shared)?;
    let (call, generation) = *entry.streams.get(&number)?;
    let calls = &shard.client.calls;
    calls.is_current(call, generation).then_some(call)
}

/// More of a response. That of a call which has ended is dropped.
fn more<R: Ring>(shard: &mut Shard<R>, shared: u32, number: u32, bytes: &[u8], end: bool) -> bool {
    let Some(call) = of_number(shard, shared, number) else {
        return true;
    };
    let Some(stream) = &mut shard.client.calls[call].stream else {
        return true;
    };
    let count = bytes.len() as u32;
    if count > stream.window {
        return false;
    }
    stream.window -= count;
    stream.owed += count;
    stream.ended |= end;
    if stream.pending.is_empty() {
        let taken = read(shard, call, bytes);
        if let Some(entry) = shard.client.calls.get_mut(call)
            && let Some(stream) = &mut entry.stream
        {
            stream.pending.extend_from_slice(&bytes[taken..]);
        }
    } else {
        stream.pending.extend_from_slice(bytes);
        read_pending(shard, call);
    }
    settle(shard, shared, number);
    true
}

/// The hearer of a call takes events again.
pub(crate) fn go_on<R: Ring>(shard: &mut Shard<R>, call: u32) {
    if let Some(stream) = &shard.client.calls[call].stream {
        let (shared, number) = (stream.shared, stream.number);
        read_pending(shard, call);
        if shard
            .client
            .calls
            .get(call)
            .is_some_and(|call| call.home == NONE)
        {
            // The connection is gone meanwhile; only what had come was left to be taken.
            return finish_if_read(shard, call);
        }
        settle(shard, shared, number);
    }
}

fn read_pending<R: Ring>(shard: &mut Shard<R>, call: u32) {
    let Some(stream) = &mut shard.client.calls[call].stream else {
        return;
    };
    let mut pending = std::mem::take(&mut stream.pending);
    let taken = read(shard, call, &pending);
    if let Some(entry) = shard.client.calls.get_mut(call)
        && let Some(stream) = &mut entry.stream
    {
        pending.drain(..taken);
        stream.pending = pending;
    }
}

/// Takes whole messages as long as the hearer takes events. Answers how many bytes that were.
fn read<R: Ring>(shard: &mut Shard<R>, call: u32, bytes: &[u8]) -> usize {
    let mut at = 0;
    while at < bytes.len() {
        match shard.client.calls.get(call) {
            Some(entry) if entry.stream.is_some() => {}
            _ => return bytes.len(),
        }
        if !shard.client.has_room_for(call) {
            client::hold_up(shard, call);
            return at;
        }
        let stage = home::stage_of(shard, call);
        match two_part::decode(&bytes[at..], Some(stage.bytes_max())) {
            Decoded::Frame(message) => {
                let end = at + message.frame_bytes();
                let got = home::read(&bytes[at..end], stage);
                at = end;
                home::take(shard, call, got);
            }
            Decoded::Need(_) => return at,
            Decoded::Bad(bad) => {
                home::violated(shard, call, &bad.to_string());
                return bytes.len();
            }
        }
    }
    at
}

/// After bytes were taken: credit for them, or the end of the stream.
fn settle<R: Ring>(shard: &mut Shard<R>, shared: u32, number: u32) {
    let Some(call) = of_number(shard, shared, number) else {
        return;
    };
    let entry = &mut shard.client.calls[call];
    let Some(stream) = &mut entry.stream else {
        return;
    };
    if stream.ended {
        return finish_if_read(shard, call);
    }
    // The front of a message that has not come whole takes no room of the window: it must be able
    // to grow.
    let held = if entry.held_up {
        stream.pending.len()
    } else {
        0
    };
    let grant = stream.owed.saturating_sub(held as u32);
    if grant >= CREDIT_BYTES {
        stream.owed -= grant;
        stream.window += grant;
        write(shard, shared, &mux::credit(number, grant));
    }
}

fn finish_if_read<R: Ring>(shard: &mut Shard<R>, call: u32) {
    if shard
        .client
        .calls
        .get(call)
        .is_some_and(|call| !call.held_up)
    {
        finish(shard, call);
    }
}

/// The stream has ended, as a socket does.
fn finish<R: Ring>(shard: &mut Shard<R>, call: u32) {
    if let Some(stream) = &mut shard.client.calls[call].stream {
        stream.ended = true;
    }
    home::end_of_socket(shard, call);
}

/// Writes a control message to the worker of a call.
pub(crate) fn tell<R: Ring>(shard: &mut Shard<R>, call: u32, frame: &[u8]) {
    if let Some(stream) = &shard.client.calls[call].stream
        && shard.client.calls[call].home != NONE
    {
        let (shared, number) = (stream.shared, stream.number);
        say(shard, shared, number, frame);
    }
}

fn say<R: Ring>(shard: &mut Shard<R>, shared: u32, number: u32, frame: &[u8]) {
    let (open, end) = (false, false);
    let prefix = mux::prefix(number, Kind::Data { open, end }, frame.len());
    write(shard, shared, &prefix);
    write(shard, shared, frame);
}

/// Queues bytes for the worker.
pub(crate) fn write<R: Ring>(shard: &mut Shard<R>, shared: u32, bytes: &[u8]) {
    let connection = shard.client.shared[shared].connection;
    let outgoing = &mut shard.connections[connection].outgoing;
    outgoing.waiting().extend_from_slice(bytes);
    shard.client.dirty_shared.push(shared);
}

/// What was queued in this tick leaves as one.
pub(crate) fn flush<R: Ring>(shard: &mut Shard<R>) {
    while let Some(shared) = shard.client.dirty_shared.pop() {
        if let Some(entry) = shard.client.shared.get(shared) {
            let connection = entry.connection;
            ends::flush(shard, connection);
        }
    }
}

/// The call has ended: its stream is no more. The worker hears of it if he is still writing.
pub(crate) fn leave<R: Ring>(shard: &mut Shard<R>, stream: &Stream) {
    let Some(entry) = shard.client.shared.get_mut(stream.shared) else {
        return;
    };
    entry.streams.remove(&stream.number);
    if !stream.ended {
        let reset = mux::prefix(stream.number, Kind::Reset, 0);
        write(shard, stream.shared, &reset);
    }
}

/// The connection is gone; it has been closed already. Its responses have broken off.
pub(crate) fn lost<R: Ring>(shard: &mut Shard<R>, shared: u32) {
    let Some(entry) = shard.client.shared.remove(shared) else {
        return;
    };
    feed::shared::lost(shard, entry.feeds.into_values());
    let calls = entry.streams.into_values();
    let mut broken = false;
    for (call, generation) in calls {
        if !shard.client.calls.is_current(call, generation) {
            continue;
        }
        broken = true;
        let entry = &mut shard.client.calls[call];
        entry.home = NONE;
        if let Some(stream) = &mut entry.stream {
            stream.ended = true;
            stream.shared = NONE;
        }
        finish_if_read(shard, call);
    }
    if broken {
        shard.stats.shard.mux_lost.add(1);
    }
}
