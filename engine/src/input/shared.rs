//! Request streams on connections that many responses share, at the worker
//! ([`corelane_codec::mux`]).
//!
//! We open a stream with the subject of the request stream and end it at once: all that would be
//! said on its socket. What the caller sends there waits for the handler, one window at most.

use corelane_codec::mux::{self, Kind, SUBJECT_BYTES, WINDOW_BYTES};

use super::{Read, dial, over};
use crate::mux_link;
use crate::ring::Ring;
use crate::shard::Shard;

/// Tells the number of a request stream from that of a response.
const REQUEST: u32 = 1 << 31;
/// Credit is granted in such steps.
const CREDIT_BYTES: u32 = WINDOW_BYTES / 4;

/// The place of a request stream on a shared connection.
#[derive(Debug)]
pub(crate) struct Place {
    link: u32,
    number: u32,
    subject: u128,
    /// What has come and could not be taken, or is no whole message.
    pending: Vec<u8>,
    /// Bytes that the caller may still send.
    window: u32,
    /// Bytes that he may send more, once he is told.
    owed: u32,
    /// He has been told that we read.
    opened: bool,
    /// Nothing more will come.
    ended: bool,
}

/// Lets a new request stream share the connection to its caller. `false`: it gets its own socket.
pub(crate) fn join<R: Ring>(shard: &mut Shard<R>, source: u32, subject: u128) -> bool {
    let generation = shard.worker.inputs.generation(source);
    let Some(number) = mux_link::number(source, generation) else {
        return false;
    };
    let entry = &shard.worker.inputs[source];
    let Some(link) = mux_link::enter(shard, entry.address) else {
        return false;
    };
    shard.worker.inputs[source].shared = Some(Place {
        link,
        number: number | REQUEST,
        subject,
        pending: Vec::new(),
        window: WINDOW_BYTES,
        owed: 0,
        opened: false,
        ended: false,
    });
    open(shard, source);
    true
}

/// Tells the caller that we read, as soon as the connection stands.
fn open<R: Ring>(shard: &mut Shard<R>, source: u32) {
    let Some(place) = &mut shard.worker.inputs[source].shared else {
        return;
    };
    let (open, end) = (true, true);
    let prefix = mux::prefix(place.number, Kind::Data { open, end }, SUBJECT_BYTES);
    let chunk = [&prefix[..], &place.subject.to_be_bytes()].concat();
    let link = place.link;
    let opened = mux_link::say(shard, link, &chunk);
    if let Some(place) = &mut shard.worker.inputs[source].shared {
        place.opened = opened;
    }
}

/// The request streams on a connection.
pub(crate) fn of_link<R: Ring>(shard: &Shard<R>, link: u32) -> Vec<u32> {
    let inputs = &shard.worker.inputs;
    let mine = |source: &u32| {
        let place = inputs[*source].shared.as_ref();
        place.is_some_and(|place| place.link == link)
    };
    inputs.slots().filter(mine).collect()
}

/// The connection stands.
pub(crate) fn greeted<R: Ring>(shard: &mut Shard<R>, link: u32) {
    for source in of_link(shard, link) {
        open(shard, source);
    }
}

/// The connection could not be made: the stream gets a socket of its own.
pub(crate) fn go_alone<R: Ring>(shard: &mut Shard<R>, source: u32) {
    shard.worker.inputs[source].shared = None;
    if !dial(shard, source) {
        over(shard, source, Some(true));
    }
}

/// The connection is gone, and the stream with it.
pub(crate) fn lost<R: Ring>(shard: &mut Shard<R>, source: u32) {
    shard.worker.inputs[source].shared = None;
    over(shard, source, Some(true));
}

/// The request stream with such a number, if it is under way on that connection.
fn of_number<R: Ring>(shard: &Shard<R>, link: u32, number: u32) -> Option<u32> {
    if number & REQUEST == 0 {
        return None;
    }
    let source = mux_link::slot_of(number & !REQUEST);
    let place = shard.worker.inputs.get(source)?.shared.as_ref()?;
    (place.link == link && place.number == number).then_some(source)
}

/// The caller has sent something on a stream that is no response. `false`: more than he may.
pub(crate) fn arrived<R: Ring>(
    shard: &mut Shard<R>,
    link: u32,
    number: u32,
    bytes: &[u8],
    end: bool,
) -> bool {
    let Some(source) = of_number(shard, link, number) else {
        return true;
    };
    let Some(place) = &mut shard.worker.inputs[source].shared else {
        return true;
    };
    let count = bytes.len() as u32;
    if count > place.window {
        return false;
    }
    place.window -= count;
    place.owed += count;
    place.ended |= end;
    place.pending.extend_from_slice(bytes);
    if !shard.worker.inputs[source].held_up {
        go_on(shard, source);
    }
    true
}

/// What has come is taken, as long as the handler takes it; the caller gets credit for it.
pub(crate) fn go_on<R: Ring>(shard: &mut Shard<R>, source: u32) {
    let entry = &mut shard.worker.inputs[source];
    let Some(place) = &mut entry.shared else {
        return;
    };
    let mut pending = std::mem::take(&mut place.pending);
    let (taken, read) = entry.read(&pending);
    pending.drain(..taken);
    let held_bytes = match read {
        Read::Over(end) => return over(shard, source, end),
        Read::Full => pending.len(),
        // The front of a message that has not come whole takes no room of the window: it must be
        // able to grow.
        Read::Short => 0,
    };
    let Some(place) = &mut entry.shared else {
        return;
    };
    place.pending = pending;
    if place.ended && matches!(read, Read::Short) {
        return over(shard, source, Some(true));
    }
    let grant = place.owed.saturating_sub(held_bytes as u32);
    if grant >= CREDIT_BYTES && !place.ended {
        place.owed -= grant;
        place.window += grant;
        let (link, credit) = (place.link, mux::credit(place.number, grant));
        mux_link::say(shard, link, &credit);
    }
}

/// The caller has broken the stream off.
pub(crate) fn reset<R: Ring>(shard: &mut Shard<R>, link: u32, number: u32) {
    if let Some(source) = of_number(shard, link, number) {
        if let Some(place) = &mut shard.worker.inputs[source].shared {
            place.ended = true;
        }
        over(shard, source, Some(true));
    }
}

/// Nobody reads the stream any more. The caller hears of it if he is still writing.
pub(crate) fn leave<R: Ring>(shard: &mut Shard<R>, place: &Place) {
    if place.opened && !place.ended {
        let reset = mux::prefix(place.number, Kind::Reset, 0);
        mux_link::say(shard, place.link, &reset);
    }
    mux_link::exit(shard, place.link);
}
