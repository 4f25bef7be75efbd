//! Events of and for tasks of this process, and the rest of what control tells the plane.

use corelane_codec::zmtp::{self, Event};

use super::memory::Slice;
use super::plane::{DialState, Plane};
use super::session::{Memo, Source, Wire};
use super::{Command, Group, LocalEvent, Sink, asks, fan_out, take};
use crate::ring::Ring;

/// Members of the trie from here on are consumers of this process, not sessions.
const CONSUMERS: u32 = 1 << 31;

/// A task that takes events.
pub(super) struct Consumer {
    consumer: u64,
    group: Group,
    prefixes: Vec<Vec<u8>>,
    events: Box<dyn Sink>,
    /// It stands in the list of those who are to be woken.
    has_news: bool,
}

pub(super) fn is_consumer(member: u32) -> bool {
    member >= CONSUMERS
}

/// Does what control wants.
pub(super) fn obey<R: Ring>(plane: &mut Plane<R>, command: Command) {
    match command {
        Command::Open(door) => plane.open_door(door),
        Command::Dial {
            dial,
            address,
            side,
            group,
            security,
        } => {
            plane.dials.push(DialState {
                dial,
                address,
                side,
                group,
                security,
                slot: None,
                again_ns: 0,
                pause_ns: 0,
            });
            let place = plane.dials.len() - 1;
            plane.dial(place);
        }
        Command::Hang { dial } => {
            let Some(place) = plane.dials.iter().position(|state| state.dial == dial) else {
                return;
            };
            if let Some(slot) = plane.dials.remove(place).slot {
                plane.close(slot);
            }
        }
        Command::Subscribe {
            consumer,
            group,
            mut prefixes,
            events,
        } => {
            prefixes.sort();
            prefixes.dedup();
            let entry = Consumer {
                consumer,
                group,
                prefixes,
                events,
                has_news: false,
            };
            subscribe(plane, entry);
        }
        Command::Unsubscribe { consumer } => unsubscribe(plane, consumer),
        Command::Shut { group } => plane.shut(group),
        Command::Ask {
            group,
            until,
            within,
            answer,
        } => asks::ask(plane, group, until, within, answer),
        Command::Publish { group, event } => publish(plane, group, &event),
        Command::Stop => {}
    }
}

fn subscribe<R: Ring>(plane: &mut Plane<R>, consumer: Consumer) {
    let (group, prefixes) = (consumer.group, consumer.prefixes.clone());
    let free = plane.consumers.iter().position(Option::is_none);
    let place = free.unwrap_or(plane.consumers.len());
    match plane.consumers.get_mut(place) {
        Some(entry) => *entry = Some(consumer),
        None => plane.consumers.push(Some(consumer)),
    }
    for prefix in prefixes {
        plane.add_wish(group, &prefix, CONSUMERS + place as u32);
    }
}

fn unsubscribe<R: Ring>(plane: &mut Plane<R>, consumer: u64) {
    let is_it = |entry: &Option<Consumer>| {
        entry
            .as_ref()
            .is_some_and(|entry| entry.consumer == consumer)
    };
    let Some(place) = plane.consumers.iter().position(is_it) else {
        return;
    };
    if let Some(entry) = plane.consumers[place].take() {
        for prefix in &entry.prefixes {
            plane.remove_wish(entry.group, prefix, CONSUMERS + place as u32);
        }
    }
}

/// An event of this process: written once, into a block that all subscribers share.
fn publish<R: Ring>(plane: &mut Plane<R>, group: Group, event: &LocalEvent) {
    let mut bytes = Vec::with_capacity(event.subject.len() + event.frame.len() + 64);
    let (id, sequence) = (event.publisher_id, event.sequence);
    zmtp::write_event_front(&event.subject, id, sequence, event.frame.len(), &mut bytes);
    bytes.extend_from_slice(&event.frame);
    let end = bytes.len() as u32;
    let block = plane.memory.block(bytes);
    let mut memo = Memo {
        subject: event.subject.clone(),
        wire: Wire::Zmtp,
        publisher_id: id,
        tracker: plane.sequences.find(id),
        topic: plane.stats.topic(&event.subject),
        version: 0,
        members: Vec::new(),
    };
    let key = super::wishes::key(group, &event.subject);
    plane.subscriptions.matches(&key, &mut memo.members);
    let source = Source {
        memos: vec![memo],
        ..Source::default()
    };
    let slice = Slice {
        block,
        start: 0,
        end,
    };
    plane.runs.clear();
    plane.runs.push(take::Run {
        memo: 0,
        slice,
        events: 1,
    });
    fan_out::runs(plane, &source);
    plane.memory.release(block);
}

/// Whole events that follow each other, for a task.
pub(super) fn deliver_run<R: Ring>(plane: &mut Plane<R>, member: u32, memo: &Memo, slice: Slice) {
    let max_bytes = plane.config.event_bytes_max as usize;
    let place = (member - CONSUMERS) as usize;
    let Some(Some(consumer)) = plane.consumers.get_mut(place) else {
        return;
    };
    let mut rest = plane.memory.bytes(slice);
    let mut dropped = 0;
    while let Some((event, _)) = memo.wire.decode(rest, max_bytes) {
        let delivered = consumer.events.take(LocalEvent {
            subject: memo.subject.clone(),
            publisher_id: event.publisher_id,
            sequence: event.sequence,
            frame: rest[event.frame_at..event.end].to_vec(),
        });
        dropped += u64::from(!delivered);
        rest = &rest[event.end..];
    }
    delivered(plane, place, dropped);
}

/// An event in pieces, for a task.
pub(super) fn deliver_pieces<R: Ring>(
    plane: &mut Plane<R>,
    member: u32,
    memo: &Memo,
    pieces: &[Slice],
    event: &Event,
) {
    let place = (member - CONSUMERS) as usize;
    let Some(Some(consumer)) = plane.consumers.get_mut(place) else {
        return;
    };
    let mut frame = Vec::with_capacity(event.end);
    for piece in pieces {
        frame.extend_from_slice(plane.memory.bytes(*piece));
    }
    frame.drain(..event.frame_at);
    let taken = consumer.events.take(LocalEvent {
        subject: memo.subject.clone(),
        publisher_id: event.publisher_id,
        sequence: event.sequence,
        frame,
    });
    delivered(plane, place, u64::from(!taken));
}

fn delivered<R: Ring>(plane: &mut Plane<R>, place: usize, dropped: u64) {
    plane.stats.plane.events_dropped_local.add(dropped);
    if let Some(Some(consumer)) = plane.consumers.get_mut(place)
        && !std::mem::replace(&mut consumer.has_news, true)
    {
        plane.news.push(place);
    }
}

/// Once a turn, whatever has come.
pub(super) fn wake_consumers<R: Ring>(plane: &mut Plane<R>) {
    for place in plane.news.drain(..) {
        if let Some(Some(consumer)) = plane.consumers.get_mut(place)
            && std::mem::take(&mut consumer.has_news)
        {
            consumer.events.wake();
        }
    }
}
