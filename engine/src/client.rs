//! Calls that this process makes: begun by control or by a task of the shard (`local`), ended by a
//! worker, a deadline or whoever began them.
//!
//! ```text
//! begin -> frame on a shared connection (call_link) -> ack
//!                                     (home) handshake -> prologue -> items -> final -> end
//! ```
//!
//! A call always ends, and its last event always arrives: while control does not take events, the
//! call keeps its place and its socket is not read.

use std::collections::hash_map::RandomState;
use std::collections::{HashMap, VecDeque};
use std::hash::BuildHasher;
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use corelane_codec::call_home::{KILL_FRAME, STOP_FRAME};
use corelane_codec::control_message::PayloadCodec;
use corelane_codec::error::DynamoError;

pub use crate::call::{CallEvent, Deadlines, NewCall, What};
pub(crate) use crate::call::{Phase, Target};
use crate::call_frame::FrameWriter;
use crate::call_link::{self, Link};
use crate::ends::Ends;
use crate::feed;
use crate::home;
use crate::local;
use crate::mesh::Sender;
use crate::mux_home;
use crate::quic;
use crate::ring::Ring;
use crate::shard::{Shard, TimerKind};
use crate::table::{NONE, Table};
use crate::timer_wheel::TimerId;

/// Connections to workers, at most; idle ones make room.
const LINKS_MAX: usize = 1024;
/// Events that wait for control beside those of calls, at most; then no command is taken.
const UNDELIVERED_MAX: usize = 256;
/// Memory for a frame beyond this is given back.
const FRAME_KEPT_BYTES_MAX: usize = 64 * 1024;
/// A worker that calls home within this time after its call was ended is told so.
const LATE_NS: u64 = 10_000_000_000;

/// Who hears of a call.
pub(crate) enum Hearer {
    /// Control, by the number that it gave the call.
    Control(u64),
    /// A task of this shard.
    Task(local::Shared),
}

/// One call.
pub(crate) struct Call {
    pub(crate) hearer: Hearer,
    pub(crate) target: Target,
    began_ns: u64,
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
    /// Its hearer wants it to end: `Some(kill)`.
    early: Option<bool>,
    /// How it ended, as long as that has not been told.
    end: Option<(u64, What)>,
    /// It ended before the worker called home, who is told when he does.
    late: bool,
    /// Its socket is not read because its hearer does not take events.
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
    numbers: HashMap<u64, u32>,
    events: Sender<CallEvent>,
    unwoken: bool,
    undelivered: VecDeque<CallEvent>,
    /// Calls that wait for control to take events.
    held_up: Vec<(u32, u32)>,
    /// Scratch for what tasks want.
    pub(crate) begun: Vec<local::Wished>,
    pub(crate) touched: Vec<(u32, u32)>,
    /// Commands wait for the same.
    clogged: bool,
    random: [RandomState; 2],
    drawn: u64,
}

impl Client {
    pub(crate) fn new(
        ends: &Ends,
        home: Option<(TcpListener, SocketAddr)>,
        events: Sender<CallEvent>,
    ) -> Client {
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
            numbers: HashMap::with_capacity(calls_max),
            events,
            unwoken: false,
            undelivered: VecDeque::new(),
            held_up: Vec::new(),
            begun: Vec::new(),
            touched: Vec::new(),
            clogged: false,
            random: [RandomState::new(), RandomState::new()],
            drawn: 0,
        }
    }

    /// Whether control must take events before another command is looked at.
    pub(crate) fn is_clogged(&mut self) -> bool {
        self.clogged = self.undelivered.len() >= UNDELIVERED_MAX;
        self.clogged
    }

    /// Whether something waits for control to take events.
    pub(crate) fn is_held_up(&self) -> bool {
        !self.held_up.is_empty() || !self.undelivered.is_empty() || self.clogged
    }

    /// Whether control can be told another event now.
    fn has_room(&self) -> bool {
        self.undelivered.is_empty() && !self.events.is_full()
    }

    /// Whether another event of a call can be told now.
    pub(crate) fn has_room_for(&self, call: u32) -> bool {
        match &self.calls[call].hearer {
            Hearer::Control(_) => self.has_room(),
            Hearer::Task(inbox) => inbox.borrow().has_room(),
        }
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

    fn push(&mut self, event: CallEvent) {
        self.unwoken = true;
        if let Err(event) = self.events.push(event) {
            self.undelivered.push_back(event);
        }
    }

    fn deliver(&mut self) {
        while let Some(event) = self.undelivered.pop_front() {
            self.unwoken = true;
            if let Err(event) = self.events.push(event) {
                return self.undelivered.push_front(event);
            }
        }
    }
}

/// Begins a call for control.
pub(crate) fn begin<R: Ring>(shard: &mut Shard<R>, new: NewCall) {
    let (number, began_ns) = (new.number, shard.now_ns);
    if let Err(error) = begin_for(shard, new, Hearer::Control(number), None) {
        shard.client.push(CallEvent {
            call: number,
            began_ns,
            at_ns: began_ns,
            what: What::Failed(error),
        });
    }
}

/// Begins a call for whoever is to hear of it.
pub(crate) fn begin_for<R: Ring>(
    shard: &mut Shard<R>,
    new: NewCall,
    hearer: Hearer,
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
        hearer,
        target: Target::new(new.address, &new.path),
        feed,
        began_ns,
        codec: new.codec,
        subject,
        acked: false,
        phase: Phase::Waiting,
        home: NONE,
        stream: None,
        has_item: false,
        early: None,
        end: None,
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
    match &shard.client.calls[slot].hearer {
        Hearer::Control(number) => {
            shard.client.numbers.insert(*number, slot);
        }
        Hearer::Task(inbox) => inbox.borrow_mut().placed(place),
    }
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

/// Tells of something that is not an end. The caller has made sure of room, except for the
/// acknowledgement, of which there is one for each call.
pub(crate) fn tell<R: Ring>(shard: &mut Shard<R>, slot: u32, what: What) {
    let call = &shard.client.calls[slot];
    match &call.hearer {
        Hearer::Task(inbox) => inbox.borrow_mut().tell(what),
        Hearer::Control(number) => {
            let event = CallEvent {
                call: *number,
                began_ns: call.began_ns,
                at_ns: shard.now_ns,
                what,
            };
            shard.client.push(event);
        }
    }
}

/// The worker's prologue was good.
pub(crate) fn begun<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    let call = &mut shard.client.calls[slot];
    call.phase = Phase::Items;
    if let Hearer::Task(inbox) = &call.hearer {
        inbox.borrow_mut().begin();
    }
}

/// The worker has accepted the call.
pub(crate) fn acked<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    let call = &mut shard.client.calls[slot];
    if !call.acked && !call.is_over() {
        call.acked = true;
        tell(shard, slot, What::Acked);
    }
}

impl Call {
    /// Whether its end is known.
    pub(crate) fn is_over(&self) -> bool {
        self.end.is_some() || self.late
    }

    /// Whether only its worker is still to be told of its end.
    pub(crate) fn is_late(&self) -> bool {
        self.late
    }

    /// Whether its hearer has asked for an early end.
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

/// The call has ended: its socket goes, and its hearer is told as soon as he takes events.
pub(crate) fn end<R: Ring>(shard: &mut Shard<R>, slot: u32, what: What) {
    let call = &mut shard.client.calls[slot];
    if call.is_over() {
        return;
    }
    call.end = Some((shard.now_ns, what));
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
    if !report_end(shard, slot) {
        hold_up(shard, slot);
    }
}

/// Tells the end if there is room, and frees the call's place.
fn report_end<R: Ring>(shard: &mut Shard<R>, slot: u32) -> bool {
    let to_control = matches!(shard.client.calls[slot].hearer, Hearer::Control(_));
    if to_control && !shard.client.has_room() {
        return false;
    }
    let call = &mut shard.client.calls[slot];
    let Some((at_ns, what)) = call.end.take() else {
        return true;
    };
    // A worker who has not called home yet will, and is told then that nobody waits.
    call.late = call.early.is_some() && call.phase == Phase::Waiting;
    call.total_ns = shard.now_ns + LATE_NS;
    let late = call.late;
    match &call.hearer {
        Hearer::Task(inbox) => inbox.borrow_mut().tell(what),
        Hearer::Control(number) => {
            let number = *number;
            let event = CallEvent {
                call: number,
                began_ns: call.began_ns,
                at_ns,
                what,
            };
            shard.client.push(event);
            shard.client.numbers.remove(&number);
        }
    }
    match late {
        true => watch(shard, slot),
        false => remove(shard, slot),
    }
    true
}

fn remove<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    if let Some(call) = shard.client.calls.remove(slot) {
        shard.client.subjects.remove(&call.subject);
        if let Some(timer) = call.timer {
            shard.timers.cancel(timer);
        }
    }
}

/// The call waits until its hearer takes events.
pub(crate) fn hold_up<R: Ring>(shard: &mut Shard<R>, slot: u32) {
    let generation = shard.client.calls.generation(slot);
    let call = &mut shard.client.calls[slot];
    if std::mem::replace(&mut call.held_up, true) {
        return;
    }
    match &call.hearer {
        Hearer::Control(_) => shard.client.held_up.push((slot, generation)),
        Hearer::Task(inbox) => inbox.borrow_mut().hold_up(),
    }
}

/// Control wants a call to end.
pub(crate) fn end_early<R: Ring>(shard: &mut Shard<R>, number: u64, kill: bool) {
    if let Some(slot) = shard.client.numbers.get(&number).copied() {
        end_one_early(shard, slot, kill);
    }
}

/// Whoever hears of a call wants it to end.
pub(crate) fn end_one_early<R: Ring>(shard: &mut Shard<R>, slot: u32, kill: bool) {
    let call = &mut shard.client.calls[slot];
    if call.is_over() || call.early.is_some_and(|killed| killed || !kill) {
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
    if call.is_over() {
        return;
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

/// At the end of a tick: requests leave, and events go to control.
pub(crate) fn settle<R: Ring>(shard: &mut Shard<R>) {
    local::settle(shard);
    let mut links = std::mem::take(&mut shard.client.dirty_links);
    for link in links.drain(..) {
        call_link::flush(shard, link);
    }
    shard.client.dirty_links = links;
    mux_home::flush(shard);
    if shard.client.is_held_up() {
        shard.client.deliver();
        go_on(shard);
    }
    if std::mem::take(&mut shard.client.unwoken) {
        shard.client.events.wake();
    }
}

/// Control may have taken events: those who waited for it go on.
fn go_on<R: Ring>(shard: &mut Shard<R>) {
    let mut held_up = std::mem::take(&mut shard.client.held_up).into_iter();
    while shard.client.has_room() {
        let Some((slot, generation)) = held_up.next() else {
            break;
        };
        if !shard.client.calls.is_current(slot, generation) {
            continue;
        }
        let call = &mut shard.client.calls[slot];
        call.held_up = false;
        if call.is_over() {
            report_end(shard, slot);
        } else {
            home::go_on(shard, slot);
        }
    }
    // Those who were first in line stay so.
    let again = std::mem::replace(&mut shard.client.held_up, held_up.collect());
    shard.client.held_up.extend(again);
    if shard.client.clogged && !shard.client.is_clogged() {
        shard.obey();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call_frame::uuid;

    #[test]
    fn subjects_are_uuids_of_version_4_and_all_differ() {
        let (events, _taken) = crate::mesh::lane().unwrap();
        let mut client = Client::new(&Ends::default(), None, events);
        let mut seen = std::collections::HashSet::new();
        for _ in 0..10_000 {
            let text = uuid(client.draw());
            assert_eq!((text.len(), &text[14..15]), (36, "4"));
            assert!("89ab".contains(&text[19..20]), "{text}");
            assert!(seen.insert(text));
        }
    }
}
