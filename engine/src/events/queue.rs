//! What waits for one subscriber's socket: runs of whole messages, in the memory that they came in.
//!
//! ```text
//! runs    [buffer 3: 12 messages] [buffer 9: 40 messages] ...      may still be dropped
//! flight  [buffer 2: 7 messages]                                   the kernel reads it, or has
//!                                                                  begun to
//! ```
//!
//! Messages that follow each other in one buffer are one run and leave as one span. Bounded in
//! messages and in bytes; what happens at the bound is the subscriber's [`Overflow`].

use std::collections::VecDeque;

#[cfg(feature = "curve")]
mod sealed;

use super::Overflow;
use super::memory::{Memory, Slice};

/// Spans of one send, and bytes of it, about.
const SPANS_MAX: usize = 128;
const SEND_BYTES: usize = 512 * 1024;
/// Blocks that slow sessions' messages are put aside to.
const ASIDE_BYTES: usize = 256 * 1024;
/// Bytes of commands that may wait beside the messages.
const CONTROL_BYTES_MAX: usize = 1 << 20;
/// Blocks of commands: many leave as one span.
const CONTROL_BLOCK_BYTES: usize = 256;

#[derive(Clone, Copy, Debug)]
struct Run {
    slice: Slice,
    /// Messages that end in it.
    messages: u32,
    /// Its last message goes on in the next run.
    open: bool,
}

/// Bounds of a queue.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    pub(super) messages: usize,
    pub(super) bytes: usize,
}

/// What became of messages that were to be queued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Queued {
    /// The queue is at its bound; so many older ones were dropped for them.
    Instead(u64),
    /// The queue is at its bound, and they were dropped.
    Dropped,
    /// The queue is at its bound, and the subscriber is to be disconnected.
    Disconnect,
}

/// The queue of a session.
#[derive(Debug, Default)]
pub(super) struct Queue {
    runs: VecDeque<Run>,
    flight: VecDeque<Run>,
    bytes: usize,
    messages: usize,
    control_bytes: usize,
    /// Of those, bytes that are in the flight of a session with boxes, as they were before.
    boxed_control: usize,
    /// The last run that has left was part of a message that goes on.
    half: bool,
}

impl Queue {
    pub(super) fn is_empty(&self) -> bool {
        self.runs.is_empty() && self.flight.is_empty()
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn messages(&self) -> usize {
        self.messages
    }

    /// Whether runs wait that are not in the send under way.
    pub(super) fn has_more(&self) -> bool {
        !self.runs.is_empty()
    }

    /// Whether `messages` of `bytes` more keep the bounds.
    pub(super) fn fits(&self, bounds: Bounds, messages: usize, bytes: usize) -> bool {
        self.messages + messages <= bounds.messages && self.bytes + bytes <= bounds.bytes
    }

    /// Queues whole messages that lie in one slice; its block gets a holder more. The caller has
    /// looked at the bounds.
    pub(super) fn push(&mut self, memory: &mut Memory, slice: Slice, messages: u32, merge: u32) {
        self.bytes += slice.bytes();
        self.messages += messages as usize;
        if let Some(last) = self.runs.back_mut()
            && last.slice.block == slice.block
            && last.slice.end == slice.start
            && !last.open
            && last.messages > 0
            && last.messages + messages <= merge
        {
            last.slice.end = slice.end;
            last.messages += messages;
            return;
        }
        memory.hold(slice.block);
        self.runs.push_back(Run {
            slice,
            messages,
            open: false,
        });
    }

    /// Queues one message that lies in several slices.
    pub(super) fn push_pieces(&mut self, memory: &mut Memory, pieces: &[Slice]) {
        let last = pieces.len().saturating_sub(1);
        for (place, piece) in pieces.iter().enumerate() {
            memory.hold(piece.block);
            self.bytes += piece.bytes();
            self.runs.push_back(Run {
                slice: *piece,
                messages: u32::from(place == last),
                open: place != last,
            });
        }
        self.messages += 1;
    }

    /// Queues bytes that are no message and are never dropped. `false`: the peer reads so little
    /// that it must go.
    #[must_use]
    pub(super) fn push_control(&mut self, memory: &mut Memory, bytes: &[u8]) -> bool {
        if self.control_bytes + bytes.len() > CONTROL_BYTES_MAX {
            return false;
        }
        self.control_bytes += bytes.len();
        self.bytes += bytes.len();
        if let Some(last) = self.runs.back_mut()
            && last.messages == 0
            && !last.open
            && let Some(slice) = memory.append(last.slice.block, bytes)
        {
            last.slice.end = slice.end;
            return true;
        }
        let block = memory.block(Vec::with_capacity(bytes.len().max(CONTROL_BLOCK_BYTES)));
        let (start, end) = (0, 0);
        let empty = Slice { block, start, end };
        self.runs.push_back(Run {
            slice: memory.append(block, bytes).unwrap_or(empty),
            messages: 0,
            open: false,
        });
        true
    }

    /// Applies the policy to one message of `bytes` that does not fit.
    pub(super) fn overflow(
        &mut self,
        memory: &mut Memory,
        overflow: Overflow,
        bounds: Bounds,
        bytes: usize,
    ) -> Queued {
        match overflow {
            Overflow::DropNewest => Queued::Dropped,
            Overflow::Disconnect => Queued::Disconnect,
            Overflow::DropOldest => {
                let mut dropped = 0;
                while !self.fits(bounds, 1, bytes) {
                    match self.drop_front(memory) {
                        0 => break,
                        messages => dropped += u64::from(messages),
                    }
                }
                match self.fits(bounds, 1, bytes) {
                    true => Queued::Instead(dropped),
                    // All that is left is on its way, or the message is larger than the bound.
                    false if dropped == 0 => Queued::Dropped,
                    false => Queued::Instead(dropped),
                }
            }
        }
    }

    /// Drops the oldest run that has not been begun, with all of its messages. 0: there is none.
    fn drop_front(&mut self, memory: &mut Memory) -> u32 {
        // What follows a message that is half sent belongs to it.
        let mut at = 0;
        if self.flight.back().map_or(self.half, |run| run.open) {
            at = self.runs.iter().take_while(|run| run.open).count() + 1;
        }
        while self
            .runs
            .get(at)
            .is_some_and(|run| run.messages == 0 && !run.open)
        {
            at += 1;
        }
        let mut dropped = 0;
        while dropped == 0 {
            let Some(run) = self.runs.remove(at) else {
                return 0;
            };
            self.bytes -= run.slice.bytes();
            memory.release(run.slice.block);
            dropped = run.messages;
        }
        self.messages -= dropped as usize;
        dropped
    }

    /// Moves runs into the flight, up to what one send takes, and lists their slices. A quarter of
    /// the bounds at most: what is on its way cannot be dropped any more.
    pub(super) fn depart(&mut self, bounds: Bounds, into: &mut Vec<Slice>) {
        let bytes_max = SEND_BYTES.min(bounds.bytes / 4);
        let messages_max = bounds.messages / 4;
        let (mut bytes, mut messages) = (0, 0);
        for run in &self.flight {
            bytes += run.slice.bytes();
            messages += run.messages as usize;
        }
        while self.flight.len() < SPANS_MAX {
            let fits = |run: &Run| {
                bytes + run.slice.bytes() <= bytes_max
                    && messages + run.messages as usize <= messages_max
            };
            if !self.flight.is_empty() && !self.runs.front().is_some_and(fits) {
                break;
            }
            let Some(run) = self.runs.pop_front() else {
                break;
            };
            bytes += run.slice.bytes();
            messages += run.messages as usize;
            self.flight.push_back(run);
        }
        self.list(into);
    }

    /// Lists the slices of the flight.
    pub(super) fn list(&self, into: &mut Vec<Slice>) {
        into.extend(self.flight.iter().map(|run| run.slice));
    }

    /// The socket has taken so many bytes of the flight. Returns the messages that have left.
    pub(super) fn departed(&mut self, memory: &mut Memory, bytes: usize) -> u64 {
        self.bytes -= bytes;
        let (mut rest, mut messages) = (bytes, 0);
        while rest > 0 {
            let Some(run) = self.flight.front_mut() else {
                break;
            };
            let here = run.slice.bytes().min(rest);
            run.slice.start += here as u32;
            rest -= here;
            if run.messages == 0 && !run.open && self.boxed_control == 0 {
                // A command; the parts of a message in pieces are open or end one.
                self.control_bytes = self.control_bytes.saturating_sub(here);
            }
            if run.slice.start < run.slice.end {
                break;
            }
            messages += run.messages;
            self.half = run.open;
            memory.release(run.slice.block);
            self.flight.pop_front();
        }
        if self.flight.is_empty() {
            let boxed = std::mem::take(&mut self.boxed_control);
            self.control_bytes = self.control_bytes.saturating_sub(boxed);
        }
        self.messages -= messages as usize;
        u64::from(messages)
    }

    /// Whether the send under way reads receive buffers.
    pub(super) fn flight_pins(&self, memory: &Memory) -> bool {
        self.flight
            .iter()
            .any(|run| memory.is_buffer(run.slice.block))
    }

    /// Puts what lies in receive buffers aside into blocks of our own; the flight only when no
    /// send is under way. Returns the bytes copied.
    pub(super) fn put_aside(&mut self, memory: &mut Memory, sending: bool) -> usize {
        let mut copied = aside(&mut self.runs, memory);
        if !sending {
            copied += aside(&mut self.flight, memory);
        }
        copied
    }

    /// Drops all, and returns how many messages that were.
    pub(super) fn clear(&mut self, memory: &mut Memory) -> u64 {
        for run in self.runs.drain(..).chain(self.flight.drain(..)) {
            memory.release(run.slice.block);
        }
        let messages = self.messages as u64;
        (self.bytes, self.messages, self.control_bytes) = (0, 0, 0);
        messages
    }
}

fn aside(runs: &mut VecDeque<Run>, memory: &mut Memory) -> usize {
    let mut copied = 0;
    let mut into = None;
    for run in runs.iter_mut() {
        if !memory.is_buffer(run.slice.block) {
            continue;
        }
        let bytes = memory.bytes(run.slice).to_vec();
        copied += bytes.len();
        let there = into.and_then(|block| memory.append(block, &bytes));
        let slice = there.unwrap_or_else(|| {
            if let Some(block) = into.take() {
                memory.release(block);
            }
            let block = memory.block(Vec::with_capacity(bytes.len().max(ASIDE_BYTES)));
            into = Some(block);
            let (start, end) = (0, 0);
            let empty = Slice { block, start, end };
            memory.append(block, &bytes).unwrap_or(empty)
        });
        memory.hold(slice.block);
        memory.release(run.slice.block);
        run.slice = slice;
    }
    if let Some(block) = into {
        memory.release(block);
    }
    copied
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffers::Buffers;

    const MERGE: u32 = 100;
    const BOUNDS: Bounds = Bounds {
        messages: 4,
        bytes: 1 << 20,
    };

    const WIDE: Bounds = Bounds {
        messages: 1 << 20,
        bytes: 1 << 30,
    };

    fn slice(whole: Slice, start: u32, end: u32) -> Slice {
        Slice {
            start,
            end,
            ..whole
        }
    }

    fn wire(queue: &mut Queue, memory: &Memory) -> Vec<u8> {
        let mut slices = Vec::new();
        queue.depart(WIDE, &mut slices);
        slices
            .iter()
            .flat_map(|slice| memory.bytes(*slice).to_vec())
            .collect()
    }

    #[test]
    fn neighbours_are_one_run_and_buffers_go_back_when_sent() {
        let mut memory = Memory::new(Buffers::new(4, 64).unwrap());
        let mut queue = Queue::default();
        let received = memory.received(0, b"aabbcc");
        queue.push(&mut memory, slice(received, 0, 2), 1, MERGE);
        queue.push(&mut memory, slice(received, 2, 6), 2, MERGE);
        assert_eq!(
            (queue.runs.len(), queue.messages(), queue.bytes()),
            (1, 3, 6)
        );
        memory.release(received.block);
        assert_eq!(wire(&mut queue, &memory), b"aabbcc");
        assert_eq!(queue.departed(&mut memory, 5), 0);
        assert!(memory.recycled.is_empty());
        assert_eq!(queue.departed(&mut memory, 1), 3);
        assert_eq!((memory.recycled.len(), queue.is_empty()), (1, true));
    }

    #[test]
    fn the_oldest_that_have_not_been_begun_are_dropped() {
        let mut memory = Memory::new(Buffers::new(4, 64).unwrap());
        let mut queue = Queue::default();
        let received = memory.received(0, b"aabbccddee");
        for at in 0..4 {
            queue.push(&mut memory, slice(received, 2 * at, 2 * at + 2), 1, 1);
        }
        assert!(!queue.fits(BOUNDS, 1, 2));
        let mut first = Vec::new();
        queue.depart(WIDE, &mut first);
        // All of them are on their way now.
        let overflow = |queue: &mut Queue, memory: &mut Memory, policy| {
            queue.overflow(memory, policy, BOUNDS, 2)
        };
        let oldest = Overflow::DropOldest;
        assert_eq!(overflow(&mut queue, &mut memory, oldest), Queued::Dropped);
        assert_eq!(queue.departed(&mut memory, 8), 4);
        for at in 0..4 {
            queue.push(&mut memory, slice(received, 2 * at, 2 * at + 2), 1, 1);
        }
        assert_eq!(
            overflow(&mut queue, &mut memory, oldest),
            Queued::Instead(1)
        );
        queue.push(&mut memory, slice(received, 8, 10), 1, 1);
        assert_eq!(wire(&mut queue, &memory), b"bbccddee");
        let newest = Overflow::DropNewest;
        assert_eq!(overflow(&mut queue, &mut memory, newest), Queued::Dropped);
        let end = Overflow::Disconnect;
        assert_eq!(overflow(&mut queue, &mut memory, end), Queued::Disconnect);
    }

    #[test]
    fn a_quarter_of_the_bounds_is_on_its_way() {
        let mut memory = Memory::new(Buffers::new(4, 64).unwrap());
        let mut queue = Queue::default();
        let received = memory.received(0, b"aabbccddee");
        for at in 0..4 {
            queue.push(&mut memory, slice(received, 2 * at, 2 * at + 2), 1, 1);
        }
        let mut slices = Vec::new();
        queue.depart(BOUNDS, &mut slices);
        assert_eq!(slices.len(), 1);
        assert_eq!(queue.departed(&mut memory, 1), 0);
        slices.clear();
        queue.depart(BOUNDS, &mut slices);
        assert_eq!((slices.len(), slices[0].bytes()), (1, 1));
        assert_eq!(queue.departed(&mut memory, 1), 1);
    }

    #[test]
    fn a_message_that_is_half_sent_is_never_cut() {
        let mut memory = Memory::new(Buffers::new(4, 64).unwrap());
        let mut queue = Queue::default();
        let (one, two) = (memory.received(0, b"abc"), memory.received(1, b"def"));
        let pieces = [slice(one, 0, 3), slice(two, 0, 1)];
        queue.push_pieces(&mut memory, &pieces);
        queue.push(&mut memory, slice(two, 1, 3), 1, 1);
        // Only the first piece has been begun.
        let run = queue.runs.pop_front().unwrap();
        queue.flight.push_back(run);
        assert_eq!(queue.drop_front(&mut memory), 1);
        assert_eq!(queue.drop_front(&mut memory), 0);
        assert_eq!(wire(&mut queue, &memory), b"abcd");
        assert_eq!((queue.departed(&mut memory, 4), queue.bytes()), (1, 0));
        // The first piece has left altogether.
        queue.push_pieces(&mut memory, &pieces);
        queue.push(&mut memory, slice(two, 1, 3), 1, 1);
        let run = queue.runs.pop_front().unwrap();
        queue.flight.push_back(run);
        assert_eq!(queue.departed(&mut memory, 3), 0);
        assert_eq!(queue.drop_front(&mut memory), 1);
        assert_eq!(wire(&mut queue, &memory), b"d");
        assert_eq!((queue.departed(&mut memory, 1), queue.bytes()), (1, 0));
        // Dropped whole when nothing of it has been begun; commands never are.
        assert!(queue.push_control(&mut memory, b"PONG"));
        queue.push_pieces(&mut memory, &pieces);
        assert_eq!(queue.drop_front(&mut memory), 1);
        assert_eq!(wire(&mut queue, &memory), b"PONG");
        assert_eq!(
            (queue.departed(&mut memory, 4), queue.control_bytes),
            (0, 0)
        );
    }

    #[test]
    fn what_is_put_aside_reads_the_same() {
        let mut memory = Memory::new(Buffers::new(4, 64).unwrap());
        let mut queue = Queue::default();
        let (one, two) = (memory.received(0, b"abc"), memory.received(1, b"def"));
        queue.push(&mut memory, one, 1, MERGE);
        queue.push(&mut memory, two, 1, MERGE);
        memory.release(one.block);
        memory.release(two.block);
        let mut slices = Vec::new();
        queue.depart(WIDE, &mut slices);
        assert!(queue.flight_pins(&memory));
        assert_eq!(queue.put_aside(&mut memory, true), 0);
        assert_eq!(queue.put_aside(&mut memory, false), 6);
        assert_eq!(memory.free_buffers(), 4);
        assert_eq!(wire(&mut queue, &memory), b"abcdef");
        assert_eq!(queue.clear(&mut memory), 2);
        assert_eq!(memory.block_bytes(), 0);
    }
}
