//! Calls that tasks of this shard make (`local`): ended by a worker, a deadline or whoever began
//! them.
//!
//! ```text
//! begin -> frame on a shared connection (call_link) -> ack
//!                                     (home) handshake -> prologue -> items -> final -> end
//! ```
//!
//! A call always ends, and its reader always hears of it: while he takes nothing, the call keeps
//! its place and its socket is not read.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::net::{SocketAddr, TcpListener};
use std::rc::Rc;
use std::time::Duration;

use corelane_codec::call_home::{KILL_FRAME, STOP_FRAME};
use corelane_codec::control_message::PayloadCodec;
use corelane_codec::error::DynamoError;

use crate::call::{NewCall, Phase, Target, What};
use crate::call_frame::FrameWriter;
use crate::call_link::{self, Link};
use crate::ends::Ends;
use crate::feed;
use crate::home;
use crate::local;
use crate::mux_home;
use crate::quic;
use crate::ring::Ring;
use crate::shard::{Shard, TimerKind};
use crate::table::{NONE, Table};
use crate::timer_wheel::TimerId;

/// Connections to workers, at most; idle ones make room.
const LINKS_MAX: usize = 1024;
/// Memory for a frame beyond this is given back.
const FRAME_KEPT_BYTES_MAX: usize = 64 * 1024;
/// A worker that calls home within this time after its call was ended is told so.
const LATE_NS: u64 = 10_000_000_000;

/// One call.
pub(crate) struct Call {
    /// What its reader sees of it.
    pub(crate) inbox: local::Shared,
    pub(crate) target: Target,
    pub(crate) codec: PayloadCodec,
    pub(crate) subject: u128,
    /// Its request stream, if it has one.
    pub(crate) feed: Option<feed::Shared>,
    pub(crate) acked: bool,
    pub(crate) phase: Phase,
    /// The socket that the worker called home on.
    pub(crate) home: u32,
    /// The response's place on that socket, if it is shared.
    pub(crate) stream: Option<mux_home::Stream>,
    pub(crate) has_item: bool,
    /// Its reader wants it to end: `Some(kill)`.
    early: Option<bool>,
    /// It ended before the worker called home, who is told when he does.
    late: bool,
    /// Its socket is not read because its reader takes nothing.
    pub(crate) held_up: bool,
    ack_ns: u64,
    first_item_ns: u64,
    total_ns: u64,
    timer: Option<TimerId>,
}

/// The calls of one shard.
pub(crate) struct Client {
    pub(crate) calls: Table<Call>,
    pub(crate) links: Table<Link>,
    pub(crate) link_at: HashMap<SocketAddr, u32>,
    pub(crate) dirty_links: Vec<u32>,
    pub(crate) shared: Table<mux_home::Shared>,
    pub(crate) dirty_shared: Vec<u32>,
    pub(crate) listener: Option<TcpListener>,
    pub(crate) writer: FrameWriter,
    /// The frame that is being written.
    frame: Vec<u8>,
    subjects: HashMap<u128, u32>,
    /// Scratch for what tasks want.
    pub(crate) begun: Vec<local::Wished>,
    pub(crate) touched: Vec<(u32, u32)>,
    random: [RandomState; 2],
    drawn: u64,
}

impl Client {
    pub(crate) fn new(ends: &Ends, home: Option<(TcpListener, SocketAddr)>) -> Client {
        let calls_max = if home.is_some() { ends.calls_max } else { 0 } as usize;
        let (listener, address) = match home {
            Some((listener, address)) => (Some(listener), address.to_string()),
            None => (None, String::new()),
        };
        Client {
            calls: Table::new(calls_max),
            links: Table::new(LINKS_MAX),
            link_at: HashMap::new(),
            dirty_links: Vec::new(),
            shared: Table::new(mux_home::HOMES_MAX),
            dirty_shared: Vec::new(),
            listener,
            writer: FrameWriter::new(&address),
            frame: Vec::new(),
            subjects: HashMap::with_capacity(calls_max),
            begun: Vec::new(),
            touched: Vec::new(),
            random: [RandomState::new(), RandomState::new()],
            drawn: 0,
        }
    }

    /// Whether the reader of a call can be told more now.
    pub(crate) fn has_room_for(&self, call: u32) -> bool {
        self.calls[call].inbox.borrow().has_room()
    }

    /// The call that a subject was made for.
    pub(crate) fn of_subject(&self, subject: u128) -> Option<u32> {
        self.subjects.get(&subject).copied()
    }

    /// A random UUID, version 4: a keyed hash (SipHash under keys of the operating system) of a
    /// counter, which nobody can guess who does not know the keys, and no system call.
    pub(crate) fn draw(&mut self) -> u128 {
        self.drawn += 1;
        let [high, low] = [0, 1].map(|half| self.random[half].hash_one(self.drawn));
        let bits = u128::from(high) << 64 | u128::from(low);
        bits & !(0xf << 76 | 0xc << 60) | 0x4 << 76 | 0x8 << 60
    }
}

/// Begins a call for the reader of `inbox`.
pub(crate) fn begin<R: Ring>(
    shard: &mut Shard<R>,
    new: NewCall,
    inbox: local::Shared,
    feed: Option<feed::Shared>,
) -> Result<(), DynamoError> {
    let began_ns = shard.now_ns;
    shard.stats.shard.calls_made.add(1);
    if shard.client.calls.is_full() {
        return Err(local::too_many());
    }
    let subject = quic::mark(shard.client.draw(), shard.config.shard);
    let frame = frame(shard, &new, subject, feed.as_ref())?;
    let after = |time: Duration| began_ns.saturating_add(time.as_nanos().min(1 << 62) as u64);
    let call = Call {
        inbox: Rc::clone(&inbox),
        target: Target::new(new.address, &new.path),
        feed,
        codec: new.codec,
        subject,
        acked: false,
        phase: Phase::Waiting,
        home: NONE,
        stream: None,
        has_item: false,
        early: None,
        late: false,
        held_up: false,
        ack_ns: after(new.deadlines.ack),
        first_item_ns: after(new.deadlines.first_item),
        total_ns: after(new.deadlines.total),
        timer: None,
    };
    let slot = shard.client.calls.insert(call);
    let slot = slot.map_err(|_| local::too_many())?;
    shard.client.subjects.insert(subject, slot);
    let place = (slot, shard.client.calls.generation(slot));
    if let Some(feed) = &shard.client.calls[slot].feed {
        feed.borrow_mut().begin(place);
        shard.client.subjects.insert(feed.borrow().subject, slot);
    }
    inbox.borrow_mut().placed(place, began_ns);
    watch(shard, slot);
    call_link::send(shard, new.address, slot, &frame);
    if frame.capacity() <= FRAME_KEPT_BYTES_MAX {
        shard.client.frame = frame;
    }
    Ok(())
}

/// The frame of a call, in memory that is used again.
fn frame<R: Ring>(
    shard: &mut Shard<R>,
    new: &NewCall,
    subject: u128,
    feed: Option<&feed::Shared>,
) -> Result<Vec<u8>, DynamoError> {
    let fresh = shard.client.draw();
    if let Some(feed) = feed {
        feed.borrow_mut().subject = shard.client.draw();
    }
    let mut frame = std::mem::take(&mut shard.client.frame);
    frame.clear();
    let writer = &mut shard.client.writer;
    let written = match feed {
        None => writer.write(new, subject, fresh, &mut frame),
        Some(feed) => {
            let input = feed.borrow().subject;
            writer.write_many(new, [subject, input], fresh, &mut frame)
        }
    };
    if let Err(error) = written {
        return Err(DynamoError::invalid_argument(error.to_string()));
    }
    let bytes_max = shard.config.message_bytes_max;
    if frame.len() as u64 > bytes_max {
        let text = format!(
            "the request has {} bytes of at most {bytes_max}",
            frame.len()
        );
        return Err(DynamoError::invalid_argument(text));
    }
    Ok(frame)
}

/// Tells of something that is not an end. Whoever calls this has made sure of room.
pub(crate) fn tell<R: Ring>(shard: &mut Shard<R>, slot: u32, what: What) {
    let inbox = &shard.client.calls[slot].inbox;
    inbox.borrow_mut().tell(what, shard.now_ns);
}

/// The worker's prologue was good.
pub(crate) fn begun<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    let call = &mut shard.client.calls[slot];
    call.phase = Phase::Items;
    call.inbox.borrow_mut().begin();
}

/// The worker has accepted the call.
pub(crate) fn acked<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    let call = &mut shard.client.calls[slot];
    if !call.acked && !call.late {
        call.acked = true;
        tell(shard, slot, What::Acked);
    }
}

impl Call {
    /// Whether it has ended, and only its worker is still to be told so.
    pub(crate) fn is_late(&self) -> bool {
        self.late
    }

    /// Whether its reader has asked for an early end.
    pub(crate) fn is_ended_early(&self) -> bool {
        self.early.is_some()
    }

    fn next_deadline(&self) -> u64 {
        let mut deadline_ns = self.total_ns;
        if !self.has_item {
            deadline_ns = deadline_ns.min(self.first_item_ns);
        }
        if !self.acked && self.phase == Phase::Waiting {
            deadline_ns = deadline_ns.min(self.ack_ns);
        }
        deadline_ns
    }
}

/// The call has ended: its reader is told, its socket goes, and its place is free.
pub(crate) fn end<R: Ring>(shard: &mut Shard<R>, slot: u32, what: What) {
    let call = &mut shard.client.calls[slot];
    if call.late {
        return;
    }
    let home = std::mem::replace(&mut call.home, NONE);
    if let Some(feed) = call.feed.take() {
        shard.client.subjects.remove(&feed.borrow().subject);
        feed::end(shard, &feed);
    }
    match shard.client.calls[slot].stream.take() {
        Some(stream) => mux_home::leave(shard, &stream),
        None if home != NONE => home::hang_up(shard, home),
        None => {}
    }
    let call = &mut shard.client.calls[slot];
    call.inbox.borrow_mut().tell(what, shard.now_ns);
    // A worker who has not called home yet will, and is told then that nobody waits.
    call.late = call.early.is_some() && call.phase == Phase::Waiting;
    call.total_ns = shard.now_ns + LATE_NS;
    match call.late {
        true => watch(shard, slot),
        false => remove(shard, slot),
    }
}

fn remove<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    if let Some(call) = shard.client.calls.remove(slot) {
        shard.client.subjects.remove(&call.subject);
        if let Some(timer) = call.timer {
            shard.timers.cancel(timer);
        }
    }
}

/// The call waits until its reader takes something.
pub(crate) fn hold_up<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    let call = &mut shard.client.calls[slot];
    if !std::mem::replace(&mut call.held_up, true) {
        call.inbox.borrow_mut().hold_up();
    }
}

/// The reader of a call wants it to end.
pub(crate) fn end_early<R: Ring>(shard: &mut Shard<R>, slot: u32, kill: bool) {
    let call = &mut shard.client.calls[slot];
    if call.late || call.early.is_some_and(|killed| killed || !kill) {
        return;
    }
    call.early = Some(kill);
    let phase = call.phase;
    feed::stop(shard, slot, kill);
    match phase {
        Phase::Waiting | Phase::CalledHome => say_end(shard, slot),
        Phase::Items | Phase::Final if kill => say_end(shard, slot),
        // What still comes is taken, until the worker closes.
        Phase::Items | Phase::Final => say(shard, slot, &STOP_FRAME),
    }
}

/// Tells the worker of the early end, if he has called home, and ends the call.
fn say_end<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    let call = &shard.client.calls[slot];
    let kill = call.early != Some(false);
    say(shard, slot, if kill { &KILL_FRAME } else { &STOP_FRAME });
    end(shard, slot, What::Stopped);
}

/// A worker has called home for a call that had ended: its place is free. Answers whether he is to
/// be told to end at once.
pub(crate) fn settle_late<R: Ring>(shard: &mut Shard<R>, slot: u32) -> bool {
    let kill = shard.client.calls[slot].early != Some(false);
    remove(shard, slot);
    kill
}

/// The worker of a call has called home, on a socket of its own or on a shared one.
pub(crate) fn called_home<R: Ring>(
    shard: &mut Shard<R>,
    slot: u32,
    home: u32,
    stream: Option<mux_home::Stream>,
) {
    let call = &mut shard.client.calls[slot];
    call.home = home;
    call.stream = stream;
    call.phase = Phase::CalledHome;
}

/// Writes a control frame to the worker of a call, if he has called home.
pub(crate) fn say<R: Ring>(shard: &mut Shard<R>, slot: u32, frame: &[u8]) {
    let call = &shard.client.calls[slot];
    let home = call.home;
    if call.stream.is_some() {
        mux_home::tell(shard, slot, frame);
    } else if home != NONE {
        home::say(shard, home, frame);
    }
}

fn watch<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    let generation = shard.client.calls.generation(slot);
    let call = &mut shard.client.calls[slot];
    let deadline_ns = match call.late {
        true => call.total_ns,
        false => call.next_deadline(),
    };
    if let Some(timer) = call.timer.take() {
        shard.timers.cancel(timer);
    }
    let timer = shard.timer_to_cancel(TimerKind::Call, slot, generation, deadline_ns);
    shard.client.calls[slot].timer = timer;
}

/// The timer of a call.
pub(crate) fn overdue<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    let now_ns = shard.now_ns;
    let call = &mut shard.client.calls[slot];
    call.timer = None;
    if call.late {
        return remove(shard, slot);
    }
    let error = if call.total_ns <= now_ns {
        DynamoError::deadline_exceeded("the call took longer than it may")
    } else if !call.has_item && call.first_item_ns <= now_ns {
        DynamoError::response_timeout("the worker sent no item in time")
    } else if !call.acked && call.phase == Phase::Waiting && call.ack_ns <= now_ns {
        DynamoError::connection_timeout("the worker did not acknowledge the request in time")
    } else {
        return watch(shard, slot);
    };
    call.early = Some(true);
    say(shard, slot, &KILL_FRAME);
    end(shard, slot, What::Failed(error));
}

/// At the end of a tick: what tasks have asked for is begun, and requests leave.
pub(crate) fn settle<R: Ring>(shard: &mut Shard<R>) {
    local::settle(shard);
    let mut links = std::mem::take(&mut shard.client.dirty_links);
    for link in links.drain(..) {
        call_link::flush(shard, link);
    }
    shard.client.dirty_links = links;
    mux_home::flush(shard);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call_frame::uuid;

    #[test]
    fn subjects_are_uuids_of_version_4_and_all_differ() {
        let mut client = Client::new(&Ends::default(), None);
        let mut seen = std::collections::HashSet::new();
        for _ in 0..10_000 {
            let text = uuid(client.draw());
            assert_eq!((text.len(), &text[14..15]), (36, "4"));
            assert!("89ab".contains(&text[19..20]), "{text}");
            assert!(seen.insert(text));
        }
    }
}
