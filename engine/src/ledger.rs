//! Who is waiting for a worker that has accepted a request.
//!
//! In direct response mode the worker dials the caller, and the router does not see it. A worker
//! that dies between its acknowledgement and that call leaves a caller who waits without limit. So
//! the front of each accepted request's payload (the envelope with the caller's address, a few
//! hundred bytes) is noted here for some seconds. When the worker dies, its recent callers are
//! called home with an error; a caller who had been called already resets the call, which harms
//! nobody.
//!
//! ```text
//! notes  [upstream, time, place] ... oldest first
//! bytes  |....envelope|envelope|envelope....|   written round and round
//! ```

use std::collections::VecDeque;

/// Largest envelope front that is noted: prefix and control message.
pub const ENVELOPE_BYTES_MAX: usize = 4096;

/// A note is of use for so long after the acknowledgement.
pub const WINDOW_NS: u64 = 10_000_000_000;

struct Note {
    upstream: u64,
    at_ns: u64,
    start: usize,
    bytes: usize,
}

/// The notes of one shard.
pub struct Ledger {
    memory: Box<[u8]>,
    notes: VecDeque<Note>,
    notes_max: usize,
    end: usize,
}

impl Ledger {
    /// A ledger with so much memory for envelopes.
    pub fn new(memory_bytes: usize) -> Ledger {
        assert!(memory_bytes >= ENVELOPE_BYTES_MAX);
        let notes_max = memory_bytes / 256;
        Ledger {
            memory: vec![0; memory_bytes].into(),
            notes: VecDeque::with_capacity(notes_max),
            notes_max,
            end: 0,
        }
    }

    /// Notes kept.
    pub fn len(&self) -> usize {
        self.notes.len()
    }

    /// Whether there is no note.
    pub fn is_empty(&self) -> bool {
        self.notes.is_empty()
    }

    /// A place for a note of `bytes` bytes about a request accepted by `upstream`; the oldest notes
    /// make room.
    pub fn note(&mut self, upstream: u64, now_ns: u64, bytes: usize) -> &mut [u8] {
        assert!(bytes <= ENVELOPE_BYTES_MAX);
        let wraps = self.end + bytes > self.memory.len();
        let start = if wraps { 0 } else { self.end };
        while let Some(oldest) = self.notes.front() {
            let in_the_way = oldest.start < start + bytes && start < oldest.start + oldest.bytes;
            let skipped = wraps && oldest.start >= self.end;
            let stale = now_ns.saturating_sub(oldest.at_ns) > WINDOW_NS;
            if !(in_the_way || skipped || stale || self.notes.len() == self.notes_max) {
                break;
            }
            self.notes.pop_front();
        }
        self.notes.push_back(Note {
            upstream,
            at_ns: now_ns,
            start,
            bytes,
        });
        self.end = start + bytes;
        &mut self.memory[start..start + bytes]
    }

    /// Takes out all notes about `upstream` that are still of use, oldest first.
    pub fn take(&mut self, upstream: u64, now_ns: u64, mut each: impl FnMut(&[u8])) {
        let memory = &self.memory;
        self.notes.retain(|note| {
            if note.upstream != upstream {
                return true;
            }
            if now_ns.saturating_sub(note.at_ns) <= WINDOW_NS {
                each(&memory[note.start..note.start + note.bytes]);
            }
            false
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(ledger: &mut Ledger, upstream: u64, now_ns: u64) -> Vec<u8> {
        let mut firsts = Vec::new();
        ledger.take(upstream, now_ns, |envelope| {
            assert!(envelope.iter().all(|byte| *byte == envelope[0]));
            firsts.push(envelope[0]);
        });
        firsts
    }

    #[test]
    fn the_newest_notes_survive_and_are_whole() {
        let mut ledger = Ledger::new(ENVELOPE_BYTES_MAX);
        for number in 0..100u8 {
            ledger.note(u64::from(number % 2), 0, 700).fill(number);
        }
        assert_eq!(taken(&mut ledger, 1, 0), [95, 97, 99]);
        assert!(taken(&mut ledger, 1, 0).is_empty());
        assert_eq!(taken(&mut ledger, 0, 0), [96, 98]);
    }

    #[test]
    fn old_notes_are_of_no_use() {
        let mut ledger = Ledger::new(ENVELOPE_BYTES_MAX);
        ledger.note(1, 0, 10).fill(1);
        ledger.note(1, WINDOW_NS, 10).fill(2);
        assert_eq!(taken(&mut ledger, 1, WINDOW_NS + 1), [2]);
    }
}
