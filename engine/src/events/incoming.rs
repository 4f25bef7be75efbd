//! What a peer has sent and nobody has taken yet: slices in order, where the kernel put them.

use std::collections::VecDeque;

use super::memory::{Memory, Slice};

/// Slices of one session.
#[derive(Debug, Default)]
pub(super) struct Incoming {
    slices: VecDeque<Slice>,
    bytes: usize,
}

impl Incoming {
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Appends what this session holds from now on.
    pub(super) fn push(&mut self, slice: Slice) {
        self.bytes += slice.bytes();
        self.slices.push_back(slice);
    }

    /// Appends it to the last slice if that lies before it in the same block: its bytes are moved
    /// there, over bytes that nobody needs any more, so that what belongs together is one piece.
    #[cfg(feature = "curve")]
    pub(super) fn join(&mut self, memory: &mut Memory, slice: Slice) {
        match self.slices.back_mut() {
            Some(last) if last.block == slice.block && last.end <= slice.start => {
                let (from, bytes) = ((slice.start - last.end) as usize, slice.bytes());
                let start = last.end;
                let both = memory.bytes_mut(Slice { start, ..slice });
                both.copy_within(from.., 0);
                last.end += bytes as u32;
                self.bytes += bytes;
                memory.release(slice.block);
            }
            _ => self.push(slice),
        }
    }

    /// The first slice.
    pub(super) fn front(&self) -> Option<Slice> {
        self.slices.front().copied()
    }

    /// Copies bytes from `offset` on; returns how many there were.
    pub(super) fn peek(&self, memory: &Memory, offset: usize, to: &mut [u8]) -> usize {
        peek(&self.slices, memory, offset, to)
    }

    /// The slices of the bytes `from..to`, each in order; nothing is held for it.
    pub(super) fn cut(&self, from: usize, to: usize, into: &mut Vec<Slice>) {
        cut(&self.slices, from, to, into);
    }

    /// Drops the first `bytes` bytes.
    pub(super) fn advance(&mut self, memory: &mut Memory, bytes: usize) {
        self.bytes -= bytes;
        let mut rest = bytes;
        while rest > 0 {
            let Some(slice) = self.slices.front_mut() else {
                return;
            };
            let here = slice.bytes().min(rest);
            slice.start += here as u32;
            rest -= here;
            if slice.start == slice.end {
                memory.release(slice.block);
                self.slices.pop_front();
            }
        }
    }

    pub(super) fn clear(&mut self, memory: &mut Memory) {
        for slice in self.slices.drain(..) {
            memory.release(slice.block);
        }
        self.bytes = 0;
    }

    /// Puts all aside into a block of our own, so that the receive buffers are free again. Returns
    /// the bytes copied.
    pub(super) fn put_aside(&mut self, memory: &mut Memory) -> usize {
        if !self
            .slices
            .iter()
            .any(|slice| memory.is_buffer(slice.block))
        {
            return 0;
        }
        let mut bytes = vec![0; self.bytes];
        self.peek(memory, 0, &mut bytes);
        let all = self.bytes;
        self.clear(memory);
        let block = memory.block(bytes);
        let (start, end) = (0, all as u32);
        self.push(Slice { block, start, end });
        all
    }
}

/// Copies bytes of slices that follow each other, from `offset` on; returns how many there were.
pub(super) fn peek<'a>(
    slices: impl IntoIterator<Item = &'a Slice>,
    memory: &Memory,
    offset: usize,
    to: &mut [u8],
) -> usize {
    let (mut skip, mut filled) = (offset, 0);
    for slice in slices {
        if skip >= slice.bytes() {
            skip -= slice.bytes();
            continue;
        }
        let from = &memory.bytes(*slice)[skip..];
        skip = 0;
        let here = from.len().min(to.len() - filled);
        to[filled..filled + here].copy_from_slice(&from[..here]);
        filled += here;
        if filled == to.len() {
            break;
        }
    }
    filled
}

/// Lists the parts of slices that follow each other which hold the bytes `from..to`.
pub(super) fn cut<'a>(
    slices: impl IntoIterator<Item = &'a Slice>,
    from: usize,
    to: usize,
    into: &mut Vec<Slice>,
) {
    let mut at = 0;
    for slice in slices {
        let (begin, end) = (from.max(at), to.min(at + slice.bytes()));
        if begin < end {
            into.push(slice.part(begin - at, end - at));
        }
        at += slice.bytes();
        if at >= to {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffers::Buffers;

    #[test]
    fn bytes_are_read_and_dropped_across_slices() {
        let mut memory = Memory::new(Buffers::new(4, 64).unwrap());
        let mut incoming = Incoming::default();
        for (buffer, bytes) in [(0, &b"abc"[..]), (1, b"de"), (2, b"fgh")] {
            let slice = memory.received(buffer, bytes);
            incoming.push(slice);
        }
        let mut to = [0; 4];
        assert_eq!(incoming.peek(&memory, 2, &mut to), 4);
        assert_eq!(&to, b"cdef");
        assert_eq!(incoming.peek(&memory, 6, &mut to), 2);
        let mut cut = Vec::new();
        incoming.cut(1, 6, &mut cut);
        let cut: Vec<_> = cut.iter().map(|slice| memory.bytes(*slice)).collect();
        assert_eq!(cut, [&b"bc"[..], b"de", b"f"]);
        incoming.advance(&mut memory, 4);
        assert_eq!((incoming.bytes(), memory.recycled.len()), (4, 1));
        assert_eq!(incoming.put_aside(&mut memory), 4);
        assert_eq!(memory.free_buffers(), 4);
        assert_eq!(memory.bytes(incoming.front().unwrap()), b"efgh");
        assert_eq!(incoming.put_aside(&mut memory), 0);
        incoming.clear(&mut memory);
        assert_eq!((incoming.bytes(), memory.block_bytes()), (0, 0));
    }
}
