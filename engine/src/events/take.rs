//! What peers have sent becomes handshakes, subscriptions and events.
//!
//! Events of a publisher mostly lie whole, one behind the other, in a receive buffer. They are
//! looked at in place; neighbours that go to the same subscribers are one [`Run`] from here on.
//! An event that a boundary of buffers cuts through is walked over, frame by frame.

use std::fmt::Display;

use corelane_codec::event::Verdict;
use corelane_codec::zmtp::{self, Event, Walk};
use corelane_codec::{Bad, Decoded};

use super::memory::Slice;
use super::plane::Plane;
use super::session::{self, Memo, Small, Source, Stage, Wire};
use super::{Report, Side, fan_out, plain, wishes};
use crate::ring::Ring;

/// Subjects that a session remembers: publishers have one, bridges some.
const MEMOS_MAX: usize = 16;
/// A peer's faults are reported this often at most; all are counted.
const REPORT_PAUSE_NS: u64 = 1_000_000_000;

/// Neighbouring events of one subject in one buffer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    /// Which of the session's subjects.
    pub(super) memo: usize,
    pub(super) slice: Slice,
    pub(super) events: u32,
}

/// Takes all that can be taken of what has come.
pub(super) fn take<R: Ring>(plane: &mut Plane<R>, slot: u32) {
    loop {
        let session = &plane.sessions[slot];
        if session.closing || session.incoming.bytes() == 0 {
            return;
        }
        let goes_on = match (session.stage, session.side) {
            (Stage::Dialling, _) => false,
            (Stage::Leaving, _) => {
                plain::ignore(plane, slot);
                false
            }
            (Stage::Greeting, _) if session.wire == Wire::Plain => plain::shake_hands(plane, slot),
            (Stage::Greeting, _) => session::shake_hands(plane, slot),
            (Stage::Handshake, _) => session::handshake(plane, slot),
            (Stage::Open, Side::Subscriber) => subscriber(plane, slot),
            (Stage::Open, Side::Publisher) => publisher(plane, slot),
        };
        if !goes_on {
            return;
        }
    }
}

/// A subscriber's command or message.
fn subscriber<R: Ring>(plane: &mut Plane<R>, slot: u32) -> bool {
    if plane.sessions[slot].wire == Wire::Plain {
        return plane.refuse(slot, "a plain subscriber says nothing after its hello");
    }
    let Small::There { command, more } = session::small_frame(plane, slot) else {
        return false;
    };
    let body = std::mem::take(&mut plane.scratch);
    let goes_on = match command {
        true => session::command(plane, slot, &body),
        false => match zmtp::decode_subscription(&body) {
            Some((subscribe, prefix)) if !more => plane.wish(slot, subscribe, prefix),
            // Messages of its user, which no publisher asked for.
            _ => true,
        },
    };
    plane.scratch = body;
    goes_on
}

/// A publisher's events: those that lie whole in the first slice, then what comes behind them.
fn publisher<R: Ring>(plane: &mut Plane<R>, slot: u32) -> bool {
    let mut source = std::mem::take(&mut plane.sessions[slot].source);
    if source.walk == Walk::default() {
        let bytes = find_runs(plane, slot, &mut source);
        if bytes > 0 {
            fan_out::runs(plane, &source);
            let session = &mut plane.sessions[slot];
            session.incoming.advance(&mut plane.memory, bytes);
            session.source = source;
            return true;
        }
    }
    let goes_on = match source.wire {
        Wire::Zmtp => slowly(plane, slot, &mut source),
        Wire::Plain => plain::slowly(plane, slot, &mut source),
    };
    plane.sessions[slot].source = source;
    goes_on
}

/// Lists the runs of the first slice in `plane.runs`; returns the bytes that they take.
fn find_runs<R: Ring>(plane: &mut Plane<R>, slot: u32, source: &mut Source) -> usize {
    let group = plane.sessions[slot].group;
    let max_bytes = plane.config.event_bytes_max as usize;
    let Plane {
        memory,
        sessions,
        subscriptions,
        sequences,
        stats,
        runs,
        ..
    } = plane;
    runs.clear();
    let Some(front) = sessions[slot].incoming.front() else {
        return 0;
    };
    let bytes = memory.bytes(front);
    let mut noted = Noted::default();
    let mut at = 0;
    let (wire, mut subjects) = (source.wire, std::mem::take(&mut source.subjects));
    while let Some((event, named)) = wire.decode(&bytes[at..], max_bytes) {
        let subject = wire.subject(named, &mut subjects);
        let version = subscriptions.version();
        let known = source.find(subject, event.publisher_id, version);
        let memo = match known {
            Some(memo) => memo,
            // A place that a run of this list stands for is not taken.
            None if !runs.is_empty() && source.memos.len() == MEMOS_MAX => break,
            None => {
                let tracker = sequences.find(event.publisher_id);
                let topic = stats.topic(subject);
                let memo = source.place(subject, event.publisher_id, tracker, topic);
                let entry = &mut source.memos[memo];
                entry.version = version;
                entry.members.clear();
                subscriptions.matches(&wishes::key(group, subject), &mut entry.members);
                memo
            }
        };
        let entry = &source.memos[memo];
        if !sequences.is_at(entry.tracker, event.publisher_id) {
            source.forget(memo);
            if runs.is_empty() { continue } else { break }
        }
        noted.note(
            sequences.came(entry.tracker, event.sequence),
            event.publisher_id,
        );
        if entry.members.is_empty() {
            sequences.begin_anew(entry.tracker);
        }
        let slice = front.part(at, at + event.end);
        at += event.end;
        match runs.last_mut() {
            Some(run) if run.memo == memo => {
                run.slice.end = slice.end;
                run.events += 1;
            }
            _ => runs.push(Run {
                memo,
                slice,
                events: 1,
            }),
        }
    }
    source.subjects = subjects;
    noted.show(plane);
    at
}

/// What the numbers of some events said.
#[derive(Default)]
struct Noted {
    lost: u64,
    late: u64,
    duplicate: u64,
    publisher_id: u64,
}

impl Noted {
    #[inline]
    fn note(&mut self, verdict: Verdict, publisher_id: u64) {
        match verdict {
            Verdict::Next => {}
            Verdict::Gap(events) => {
                self.lost = self.lost.wrapping_add(events);
                self.publisher_id = publisher_id;
            }
            Verdict::Late => self.late += 1,
            Verdict::Duplicate => self.duplicate += 1,
        }
    }

    fn show<R: Ring>(&self, plane: &mut Plane<R>) {
        let stats = &plane.stats.plane;
        if self.late | self.duplicate > 0 {
            stats.events_late.add(self.late);
            stats.events_duplicate.add(self.duplicate);
        }
        if self.lost > 0 {
            stats.events_lost.add(self.lost);
            if plane.now_ns >= plane.lost_told_ns {
                plane.lost_told_ns = plane.now_ns + REPORT_PAUSE_NS;
                let (publisher_id, so_far) = (self.publisher_id, stats.events_lost.get());
                plane.report(Report::Lost {
                    publisher_id,
                    so_far,
                });
            }
        }
    }
}

impl Source {
    /// The place of a subject that is known and up to date; the last one first.
    #[inline]
    fn find(&mut self, subject: &[u8], publisher_id: u64, version: u64) -> Option<usize> {
        let is_it = |memo: &Memo| {
            memo.publisher_id == publisher_id && memo.version == version && memo.subject == subject
        };
        if self.memos.get(self.next).is_some_and(is_it) {
            return Some(self.next);
        }
        let place = self.memos.iter().position(is_it)?;
        self.next = place;
        Some(place)
    }

    /// A place for a subject: its former one, a new one, or that of another subject.
    fn place(&mut self, subject: &[u8], publisher_id: u64, tracker: u32, topic: usize) -> usize {
        let same = |memo: &Memo| memo.publisher_id == publisher_id && memo.subject == subject;
        let place = match self.memos.iter().position(same) {
            Some(place) => place,
            None if self.memos.len() < MEMOS_MAX => self.memos.len(),
            None => (self.next + 1) % MEMOS_MAX,
        };
        let memo = Memo {
            subject: subject.to_vec(),
            wire: self.wire,
            publisher_id,
            tracker,
            topic,
            version: 0,
            members: Vec::new(),
        };
        match self.memos.get_mut(place) {
            Some(known) => *known = memo,
            None => self.memos.push(memo),
        }
        self.next = place;
        place
    }

    /// The publisher's place among all publishers was given to another.
    fn forget(&mut self, memo: usize) {
        self.memos[memo].version = 0;
    }
}

/// One step with what does not lie whole in the first slice, or is no event.
fn slowly<R: Ring>(plane: &mut Plane<R>, slot: u32, source: &mut Source) -> bool {
    let max_bytes = plane.config.event_bytes_max as usize;
    let mut front = [0; zmtp::HEAD_BYTES_MAX];
    while !source.walk.is_done() {
        let session = &plane.sessions[slot];
        let there = session
            .incoming
            .peek(&plane.memory, source.walk.at(), &mut front);
        let head = match zmtp::decode_head(&front[..there], max_bytes) {
            Decoded::Frame(head) => head,
            Decoded::Need(_) => return false,
            Decoded::Bad(bad) => return plane.refuse(slot, &bad.to_string()),
        };
        if head.command && source.walk == Walk::default() {
            return command(plane, slot);
        }
        if let Err(fault) = source.walk.step(&head, max_bytes) {
            return plane.refuse(slot, &Bad::Zmtp(fault).to_string());
        }
    }
    let end = source.walk.at();
    let session = &plane.sessions[slot];
    if session.incoming.bytes() < end {
        return false;
    }
    let (incoming, memory) = (&session.incoming, &plane.memory);
    let event = source.walk.event(|at, to| {
        incoming.peek(memory, at, to);
    });
    source.walk = Walk::default();
    match event {
        Ok(event) => scattered(plane, slot, source, &event),
        Err(fault) => bad_event(plane, slot, &fault),
    }
    let session = &mut plane.sessions[slot];
    session.incoming.advance(&mut plane.memory, end);
    true
}

/// A publisher's command.
fn command<R: Ring>(plane: &mut Plane<R>, slot: u32) -> bool {
    let Small::There { .. } = session::small_frame(plane, slot) else {
        return false;
    };
    let body = std::mem::take(&mut plane.scratch);
    let goes_on = session::command(plane, slot, &body);
    plane.scratch = body;
    goes_on
}

/// An event that lies in several slices.
fn scattered<R: Ring>(plane: &mut Plane<R>, slot: u32, source: &mut Source, event: &Event) {
    let session = &plane.sessions[slot];
    let mut subject = std::mem::take(&mut plane.scratch);
    subject.clear();
    subject.resize(event.subject_bytes, 0);
    session
        .incoming
        .peek(&plane.memory, event.subject_at, &mut subject);
    pass_pieces(plane, slot, source, &subject, event);
    plane.scratch = subject;
}

/// Passes the event at the front of what has come on, in the pieces that it lies in.
pub(super) fn pass_pieces<R: Ring>(
    plane: &mut Plane<R>,
    slot: u32,
    source: &mut Source,
    subject: &[u8],
    event: &Event,
) {
    let mut pieces = std::mem::take(&mut plane.slices);
    pieces.clear();
    plane.sessions[slot].incoming.cut(0, event.end, &mut pieces);
    let memo = look_up(plane, slot, source, subject, event);
    fan_out::scattered(plane, &source.memos[memo], &pieces, event);
    plane.slices = pieces;
}

/// The subject's place, with its number counted.
fn look_up<R: Ring>(
    plane: &mut Plane<R>,
    slot: u32,
    source: &mut Source,
    subject: &[u8],
    event: &Event,
) -> usize {
    let version = plane.subscriptions.version();
    let group = plane.sessions[slot].group;
    let tracker = plane.sequences.find(event.publisher_id);
    let memo = match source.find(subject, event.publisher_id, version) {
        Some(memo) => memo,
        None => {
            let topic = plane.stats.topic(subject);
            let memo = source.place(subject, event.publisher_id, tracker, topic);
            let entry = &mut source.memos[memo];
            entry.version = version;
            plane
                .subscriptions
                .matches(&wishes::key(group, subject), &mut entry.members);
            memo
        }
    };
    let mut noted = Noted::default();
    source.memos[memo].tracker = tracker;
    noted.note(
        plane.sequences.came(tracker, event.sequence),
        event.publisher_id,
    );
    if source.memos[memo].members.is_empty() {
        plane.sequences.begin_anew(tracker);
    }
    noted.show(plane);
    memo
}

/// A message that is no event is counted, its publisher named, and passed over.
pub(super) fn bad_event<R: Ring>(plane: &mut Plane<R>, slot: u32, fault: &dyn Display) {
    plane.stats.plane.events_bad.add(1);
    let session = &mut plane.sessions[slot];
    session.bad += 1;
    if plane.now_ns >= session.quiet_ns {
        session.quiet_ns = plane.now_ns + REPORT_PAUSE_NS;
        let (peer, so_far) = (session.peer, session.bad);
        let why = fault.to_string();
        plane.report(Report::Bad { peer, why, so_far });
    }
}
