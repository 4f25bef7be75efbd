//! Request streams on connections that many responses share, at the caller
//! ([`corelane_codec::mux`]).
//!
//! ```text
//! worker --opened with the subject, and ended--> here
//! worker <--items, closing message, end--------- here      worker --credit--> here
//! ```

use corelane_codec::mux::{self, CHUNK_BYTES_MAX, Kind, WINDOW_BYTES};

use super::{Shared, State, advance as go_on, expected};
use crate::mux_home;
use crate::ring::Ring;
use crate::shard::Shard;

/// With more than this unsent, request streams wait.
const QUEUE_BYTES_MAX: usize = 4 << 20;

/// The place of a request stream on a shared connection.
#[derive(Debug)]
pub(crate) struct Place {
    shared: u32,
    number: u32,
    credit: u32,
    /// It stands among those that wait for the connection.
    waits: bool,
}

/// A worker has opened a stream for the requests of a call. `false`: it is for none of ours.
pub(crate) fn begin<R: Ring>(
    shard: &mut Shard<R>,
    shared: u32,
    number: u32,
    subject: u128,
) -> bool {
    let Some((call, feed)) = expected(shard, subject) else {
        return false;
    };
    feed.borrow_mut().shared = Some(Place {
        shared,
        number,
        credit: WINDOW_BYTES,
        waits: false,
    });
    let generation = shard.client.calls.generation(call);
    let feeds = &mut shard.client.shared[shared].feeds;
    feeds.insert(number, (call, generation));
    go_on(shard, call);
    true
}

/// The writer has written, or may go on: what may be sent is.
pub(crate) fn advance<R: Ring>(shard: &mut Shard<R>, call: u32) {
    let generation = shard.client.calls.generation(call);
    let Some(feed) = &shard.client.calls[call].feed else {
        return;
    };
    let mut state = feed.borrow_mut();
    let State {
        shared: Some(place),
        out,
        closed,
        ..
    } = &mut *state
    else {
        return;
    };
    let entry = &mut shard.client.shared[place.shared];
    let outgoing = &mut shard.connections[entry.connection].outgoing;
    if outgoing.unsent() > QUEUE_BYTES_MAX {
        if !std::mem::replace(&mut place.waits, true) {
            entry.waiting.push((call, generation));
        }
        return;
    }
    let (given, ended) = write(place, out, *closed, outgoing.waiting());
    out.drain(..given);
    if given > 0 || ended {
        shard.client.dirty_shared.push(place.shared);
    }
    if ended {
        entry.feeds.remove(&place.number);
        state.shared = None;
    }
    if given > 0 {
        state.wake();
    }
}

/// Writes chunks as far as credit goes. Answers how many bytes were taken, and whether that was
/// all that there will ever be.
fn write(place: &mut Place, out: &[u8], closed: bool, to: &mut Vec<u8>) -> (usize, bool) {
    let mut at = 0;
    loop {
        let left = out.len() - at;
        let here = left.min(place.credit as usize).min(CHUNK_BYTES_MAX);
        let (open, end) = (false, closed && here == left);
        if here == 0 && !end {
            return (at, false);
        }
        to.extend_from_slice(&mux::prefix(place.number, Kind::Data { open, end }, here));
        to.extend_from_slice(&out[at..at + here]);
        at += here;
        place.credit -= here as u32;
        if end {
            return (at, true);
        }
    }
}

/// The stream of a call with that number, if it is under way on that connection.
fn of_number<R: Ring>(shard: &Shard<R>, shared: u32, number: u32) -> Option<(u32, Shared)> {
    let (call, generation) = *shard.client.shared.get(shared)?.feeds.get(&number)?;
    if !shard.client.calls.is_current(call, generation) {
        return None;
    }
    let feed = shard.client.calls[call].feed.as_ref()?;
    Some((call, feed.clone()))
}

/// The worker takes so many bytes more.
pub(crate) fn credited<R: Ring>(shard: &mut Shard<R>, shared: u32, number: u32, bytes: u32) {
    if let Some((call, feed)) = of_number(shard, shared, number) {
        if let Some(place) = &mut feed.borrow_mut().shared {
            place.credit = place.credit.saturating_add(bytes);
        }
        advance(shard, call);
    }
}

/// The worker takes nothing more.
pub(crate) fn refused<R: Ring>(shard: &mut Shard<R>, shared: u32, number: u32) {
    if let Some((_, feed)) = of_number(shard, shared, number) {
        feed.borrow_mut().shared = None;
        feed.borrow_mut().give_up();
        shard.client.shared[shared].feeds.remove(&number);
    }
}

/// The call has ended before all of its input was written: the worker is told that no more comes.
pub(crate) fn leave<R: Ring>(shard: &mut Shard<R>, place: &Place) {
    if let Some(entry) = shard.client.shared.get_mut(place.shared) {
        entry.feeds.remove(&place.number);
        let reset = mux::prefix(place.number, Kind::Reset, 0);
        mux_home::write(shard, place.shared, &reset);
    }
}

/// The socket has taken something: those who wait go on.
pub(crate) fn sent<R: Ring>(shard: &mut Shard<R>, shared: u32) {
    let Some(entry) = shard.client.shared.get_mut(shared) else {
        return;
    };
    for (call, generation) in std::mem::take(&mut entry.waiting) {
        if !shard.client.calls.is_current(call, generation) {
            continue;
        }
        if let Some(feed) = &shard.client.calls[call].feed
            && let Some(place) = &mut feed.borrow_mut().shared
        {
            place.waits = false;
        }
        advance(shard, call);
    }
}

/// The connection is gone: nobody reads any more.
pub(crate) fn lost<R: Ring>(shard: &Shard<R>, feeds: impl Iterator<Item = (u32, u32)>) {
    for (call, generation) in feeds {
        if shard.client.calls.is_current(call, generation)
            && let Some(feed) = &shard.client.calls[call].feed
        {
            let mut state = feed.borrow_mut();
            state.shared = None;
            state.give_up();
        }
    }
}
