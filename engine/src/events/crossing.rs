//! Events between peers that speak ZMTP and peers that speak plain TCP: the same frame in the same
//! buffer, with a front written before it or left off.
//!
//! ```text
//! ZMTP   [subject, publisher, sequence] [01 bytes envelope] [mark]
//!         '- front: written once for     '- frame: never copied, the same for both
//!            all subscribers
//! ```

use corelane_codec::event::frame;
use corelane_codec::zmtp::{self, Event};

use super::memory::{BlockId, Memory, Slice};
use super::plain::Subjects;
use super::session::{Memo, Wire};
use super::{incoming, plain};

/// An event as the other wire has it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Crossed {
    front: Option<Slice>,
    frame: Slice,
}

impl Crossed {
    pub(super) fn bytes(&self) -> usize {
        self.front.map_or(0, |front| front.bytes()) + self.frame.bytes()
    }

    /// Its pieces, in order.
    pub(super) fn pieces(&self, into: &mut Vec<Slice>) {
        into.clear();
        into.extend(self.front);
        into.push(self.frame);
    }
}

impl Wire {
    /// The subject of an event that [`Wire::decode`] has named.
    #[inline]
    pub(super) fn subject<'a>(self, named: &'a [u8], subjects: &'a mut Subjects) -> &'a [u8] {
        match self {
            Wire::Zmtp => named,
            Wire::Plain => subjects.of(named),
        }
    }

    /// An event that lies whole at the beginning of `bytes`, and its subject, or its topic where
    /// the wire has no more.
    #[inline]
    pub(super) fn decode(self, bytes: &[u8], max_bytes: usize) -> Option<(Event, &[u8])> {
        match self {
            Wire::Zmtp => {
                let event = zmtp::decode_event(bytes, max_bytes)?;
                let subject = &bytes[event.subject_at..][..event.subject_bytes];
                Some((event, subject))
            }
            Wire::Plain => {
                let (event, topic) = plain::decode(bytes, max_bytes)?;
                Some((event, topic.as_bytes()))
            }
        }
    }
}

/// All events of a run. The block of their fronts, if there is one, has one holder: the caller.
pub(super) fn run(
    memory: &mut Memory,
    memo: &Memo,
    slice: Slice,
    max_bytes: usize,
    into: &mut Vec<Crossed>,
) -> Option<BlockId> {
    into.clear();
    let mut fronts = Vec::new();
    let mut at = 0;
    while let Some((event, _)) = memo.wire.decode(&memory.bytes(slice)[at..], max_bytes) {
        let bytes = &memory.bytes(slice)[at + event.frame_at..at + event.end];
        // What follows a frame inside its part is no frame of a stream.
        let frame_bytes = frame_bytes(bytes);
        let begin = at + event.frame_at;
        let start = fronts.len() as u32;
        write_front(memo, &event, frame_bytes, &mut fronts);
        let end = fronts.len() as u32;
        let block = 0;
        into.push(Crossed {
            front: (end > start).then_some(Slice { block, start, end }),
            frame: slice.part(begin, begin + frame_bytes),
        });
        at += event.end;
    }
    settle(
        memory,
        fronts,
        into.iter_mut().filter_map(|event| event.front.as_mut()),
    )
}

/// An event in pieces: its pieces for the other wire.
pub(super) fn pieces(
    memory: &mut Memory,
    memo: &Memo,
    event: &Event,
    from: &[Slice],
    into: &mut Vec<Slice>,
) -> Option<BlockId> {
    into.clear();
    let mut prefix = [0; frame::PREFIX_BYTES];
    incoming::peek(from, memory, event.frame_at, &mut prefix);
    let frame_bytes = frame_bytes(&prefix);
    let mut front = Vec::new();
    write_front(memo, event, frame_bytes, &mut front);
    if !front.is_empty() {
        let (block, start, end) = (0, 0, front.len() as u32);
        into.push(Slice { block, start, end });
    }
    let block = settle(memory, front, into.iter_mut());
    incoming::cut(from, event.frame_at, event.frame_at + frame_bytes, into);
    block
}

/// Bytes of a frame that begins here, by its own word, which has been checked.
fn frame_bytes(front: &[u8]) -> usize {
    let declared = front.get(1..).and_then(<[u8]>::first_chunk);
    let declared = declared.map_or(0, |bytes| u32::from_be_bytes(*bytes));
    frame::PREFIX_BYTES + declared as usize
}

fn write_front(memo: &Memo, event: &Event, frame_bytes: usize, out: &mut Vec<u8>) {
    if memo.wire == Wire::Plain {
        let (publisher_id, sequence) = (event.publisher_id, event.sequence);
        zmtp::write_event_front(&memo.subject, publisher_id, sequence, frame_bytes, out);
    }
}

/// Makes a block of the fronts that are written, and tells them its name.
fn settle<'a>(
    memory: &mut Memory,
    fronts: Vec<u8>,
    slices: impl Iterator<Item = &'a mut Slice>,
) -> Option<BlockId> {
    if fronts.is_empty() {
        return None;
    }
    let block = memory.block(fronts);
    for slice in slices {
        slice.block = block;
    }
    Some(block)
}
