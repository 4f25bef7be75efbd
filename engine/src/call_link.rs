//! Connections to the workers that this process calls: one for each address, shared by all calls,
//! pipelined; replies come in the order of requests (spec/request-plane.md §2.5, §2.6).

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;

use corelane_codec::Decoded;
use corelane_codec::error::DynamoError;
use corelane_codec::reply_frame::{self, Reply};

use crate::call::{Phase, Target, What};
use crate::client;
use crate::connection::{End, Role};
use crate::ends;
use crate::ring::Ring;
use crate::shard::{Shard, TimerKind};
use crate::table::NONE;

/// Time for a connect.
const CONNECT_NS: u64 = 5_000_000_000;
/// A connection without a call is closed after one to two such times.
const IDLE_NS: u64 = 150_000_000_000;
/// The longest reply that is understood.
const REPLY_BYTES_MAX: u64 = 64 * 1024;

/// One connection to a worker.
pub(crate) struct Link {
    address: SocketAddr,
    connection: u32,
    open: bool,
    /// Calls in the order of their requests, by slot and generation; their replies are owed.
    unanswered: VecDeque<(u32, u32)>,
    used_ns: u64,
    dirty: bool,
}

/// Puts the frame of a call on the connection to its worker.
pub(crate) fn send<R: Ring>(shard: &mut Shard<R>, address: SocketAddr, call: u32, frame: &[u8]) {
    let link = match of_address(shard, address) {
        Ok(link) => link,
        Err(error) => return client::end(shard, call, What::Failed(error)),
    };
    let generation = shard.client.calls.generation(call);
    let entry = &mut shard.client.links[link];
    let outgoing = &mut shard.connections[entry.connection].outgoing;
    let queued = outgoing.unsent();
    if queued > 0 && queued + frame.len() > shard.config.upstream_queue_bytes as usize {
        let text = format!("{queued} bytes wait for {address} already");
        let error = DynamoError::resource_exhausted(text);
        return client::end(shard, call, What::Failed(error));
    }
    outgoing.waiting().extend_from_slice(frame);
    entry.unanswered.push_back((call, generation));
    entry.used_ns = shard.now_ns;
    if !entry.dirty {
        entry.dirty = true;
        shard.client.dirty_links.push(link);
    }
}

/// The link to an address; dialled when it is new.
fn of_address<R: Ring>(shard: &mut Shard<R>, address: SocketAddr) -> Result<u32, DynamoError> {
    if let Some(link) = shard.client.link_at.get(&address) {
        return Ok(*link);
    }
    if shard.client.links.is_full() {
        make_room(shard);
    }
    let link = Link {
        address,
        connection: NONE,
        open: false,
        unanswered: VecDeque::new(),
        used_ns: shard.now_ns,
        dirty: false,
    };
    let Ok(link) = shard.client.links.insert(link) else {
        let text = "calls are under way to too many workers at the same time";
        return Err(DynamoError::resource_exhausted(text));
    };
    match shard.dial(&address, Role::End(End::Link(link))) {
        Ok(connection) => {
            shard.client.links[link].connection = connection;
            shard.client.link_at.insert(address, link);
            watch(shard, link, CONNECT_NS);
            Ok(link)
        }
        Err(errno) => {
            shard.client.links.remove(link);
            Err(cannot_connect(address, errno))
        }
    }
}

fn cannot_connect(address: SocketAddr, errno: i32) -> DynamoError {
    let why = io::Error::from_raw_os_error(errno);
    DynamoError::cannot_connect(format!("TCP connection to {address} failed: {why}"))
}

fn make_room<R: Ring>(shard: &mut Shard<R>) {
    let links = &shard.client.links;
    let idle = links
        .slots()
        .find(|link| links[*link].unanswered.is_empty());
    if let Some(idle) = idle {
        let connection = links[idle].connection;
        shard.lost(connection, 0);
    }
}

fn watch<R: Ring>(shard: &mut Shard<R>, link: u32, pause_ns: u64) {
    let generation = shard.client.links.generation(link);
    let deadline_ns = shard.now_ns + pause_ns;
    shard.timer(TimerKind::Link, link, generation, deadline_ns);
}

/// The connect has succeeded.
pub(crate) fn connected<R: Ring>(shard: &mut Shard<R>, slot: u32, link: u32) {
    shard.client.links[link].open = true;
    ends::flush(shard, slot);
}

/// What was queued in this tick leaves as one.
pub(crate) fn flush<R: Ring>(shard: &mut Shard<R>, link: u32) {
    if let Some(entry) = shard.client.links.get_mut(link) {
        entry.dirty = false;
        let connection = entry.connection;
        ends::flush(shard, connection);
    }
}

/// Replies of the worker, each to the oldest request that has none.
pub(crate) fn replies<R: Ring>(shard: &mut Shard<R>, slot: u32, link: u32) {
    loop {
        let Some(connection) = shard.connections.get(slot) else {
            return;
        };
        if connection.closing || connection.incoming.is_empty() {
            return;
        }
        let mut incoming = connection.incoming;
        let mut scratch = std::mem::take(&mut shard.scratch);
        let copied = shard.pieces.copy_out(&incoming, 0, &mut scratch);
        let decoded = reply_frame::decode(&scratch[..copied], REPLY_BYTES_MAX);
        let goes_on = match decoded {
            Decoded::Frame(text) => {
                shard.pieces.advance(&mut incoming, text.end);
                shard.connections[slot].incoming = incoming;
                replied(shard, link, Reply::classify(&scratch[text]))
            }
            Decoded::Need(_) => false,
            Decoded::Bad(_) => {
                shard.note_stranger(&scratch[..copied]);
                shard.lost(slot, libc::EBADMSG);
                false
            }
        };
        shard.scratch = scratch;
        if !goes_on {
            return;
        }
    }
}

fn replied<R: Ring>(shard: &mut Shard<R>, link: u32, reply: Reply<'_>) -> bool {
    let entry = &mut shard.client.links[link];
    let Some((call, generation)) = entry.unanswered.pop_front() else {
        // A reply to nothing: the order cannot be trusted.
        let connection = entry.connection;
        shard.lost(connection, libc::EBADMSG);
        return false;
    };
    if !shard.client.calls.is_current(call, generation) {
        return true;
    }
    match reply {
        Reply::Accepted => client::acked(shard, call),
        Reply::Overloaded(text) | Reply::Unavailable(text) => {
            client::end(shard, call, What::Refused(text.to_owned()));
        }
        Reply::Other(text) => {
            let text = String::from_utf8_lossy(text);
            let error = DynamoError::backend_protocol(format!("the worker answered {text:?}"));
            client::end(shard, call, What::Failed(error));
        }
    }
    true
}

/// The connection is gone, or could not be made. Calls whose worker has called home go on.
pub(crate) fn lost<R: Ring>(shard: &mut Shard<R>, link: u32, errno: i32) {
    let Some(entry) = shard.client.links.remove(link) else {
        return;
    };
    shard.client.link_at.remove(&entry.address);
    let error = match entry.open {
        false => cannot_connect(entry.address, errno),
        true => DynamoError::cannot_connect(format!(
            "the connection to {} closed before the request was acknowledged",
            entry.address
        )),
    };
    for (call, generation) in entry.unanswered {
        if shard.client.calls.is_current(call, generation)
            && shard.client.calls[call].phase == Phase::Waiting
        {
            client::end(shard, call, What::Failed(error.clone()));
        }
    }
    give_up(shard, |target| {
        target.left && target.address == entry.address
    });
}

/// An instance has left discovery. Whoever waits for its call home is told, if the connection to it
/// is gone as well or goes later: a worker that drains leaves first and answers then
/// (spec/request-plane.md §4.9, §10.3; Dynamo's client does not wait for those).
pub(crate) fn instance_left<R: Ring>(shard: &mut Shard<R>, address: SocketAddr, path: &[u8]) {
    let gone = Target::new(address, path);
    let link = shard.client.link_at.get(&address);
    let open = link.is_some_and(|link| shard.client.links[*link].open);
    if !open {
        return give_up(shard, |target| target.is(&gone));
    }
    let slots: Vec<u32> = shard.client.calls.slots().collect();
    for slot in slots {
        let target = &mut shard.client.calls[slot].target;
        target.left |= target.is(&gone);
    }
}

/// Calls of these targets fail whose worker has not called home: who has speaks for himself.
fn give_up<R: Ring>(shard: &mut Shard<R>, of: impl Fn(&Target) -> bool) {
    let calls = &shard.client.calls;
    let waits = |slot: &u32| {
        let call = &calls[*slot];
        call.phase == Phase::Waiting && !call.is_late() && of(&call.target)
    };
    let waiting: Vec<u32> = calls.slots().filter(waits).collect();
    for call in waiting {
        let text = "the instance has gone, from discovery too, before it called home";
        client::end(shard, call, What::Failed(DynamoError::disconnected(text)));
    }
}

/// The timer of a link: the connect takes too long, or nobody uses it.
pub(crate) fn overdue<R: Ring>(shard: &mut Shard<R>, link: u32) {
    let entry = &shard.client.links[link];
    let connection = entry.connection;
    if !entry.open {
        return shard.lost(connection, libc::ETIMEDOUT);
    }
    if entry.unanswered.is_empty() && entry.used_ns + IDLE_NS <= shard.now_ns {
        return shard.lost(connection, 0);
    }
    watch(shard, link, IDLE_NS);
}
