//! The memory that events are sent from: receive buffers, and blocks of our own. Each has a count
//! of its holders; whoever queues bytes of it holds it, and nothing is copied.
//!
//! ```text
//! 0 .. buffers        receive buffers; the last release gives them back to the ring
//! buffers ..          blocks: fronts that we write, and what was put aside of slow sessions
//! ```

use crate::buffers::{BufferId, Buffers};

/// A receive buffer, or a block behind them.
pub(super) type BlockId = u32;

struct Block {
    bytes: Vec<u8>,
    holders: u32,
}

/// Buffers and blocks.
pub(super) struct Memory {
    buffers: Buffers,
    blocks: Vec<Block>,
    unused: Vec<u32>,
    /// Buffers whose last holder has gone, for the ring.
    pub(super) recycled: Vec<BufferId>,
}

/// Contiguous bytes of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slice {
    pub(super) block: BlockId,
    pub(super) start: u32,
    pub(super) end: u32,
}

impl Slice {
    pub(super) fn bytes(&self) -> usize {
        (self.end - self.start) as usize
    }

    /// Its bytes `from..to`.
    pub(super) fn part(&self, from: usize, to: usize) -> Slice {
        Slice {
            block: self.block,
            start: self.start + from as u32,
            end: self.start + to as u32,
        }
    }
}

impl Memory {
    pub(super) fn new(buffers: Buffers) -> Memory {
        let recycled = Vec::with_capacity(buffers.count());
        Memory {
            buffers,
            blocks: Vec::new(),
            unused: Vec::new(),
            recycled,
        }
    }

    /// Receive buffers that the ring may fill.
    pub(super) fn free_buffers(&self) -> usize {
        self.buffers.count() - self.buffers.held()
    }

    pub(super) fn buffers(&self) -> usize {
        self.buffers.count()
    }

    pub(super) fn is_buffer(&self, block: BlockId) -> bool {
        (block as usize) < self.buffers.count()
    }

    /// The ring has filled a buffer; we are its first holder.
    pub(super) fn take(&mut self, buffer: BufferId) -> BlockId {
        self.buffers.take(buffer);
        BlockId::from(buffer)
    }

    /// A block of these bytes, with one holder.
    pub(super) fn block(&mut self, bytes: Vec<u8>) -> BlockId {
        let block = Block { bytes, holders: 1 };
        let place = match self.unused.pop() {
            Some(place) => {
                self.blocks[place as usize] = block;
                place
            }
            None => {
                self.blocks.push(block);
                self.blocks.len() as u32 - 1
            }
        };
        place + self.buffers.count() as u32
    }

    /// Appends to a block of our own without moving it; what was there may be on its way to the
    /// kernel. `None`: it has no room left.
    pub(super) fn append(&mut self, block: BlockId, from: &[u8]) -> Option<Slice> {
        let place = block as usize - self.buffers.count();
        let bytes = &mut self.blocks[place].bytes;
        if bytes.capacity() - bytes.len() < from.len() {
            return None;
        }
        let start = bytes.len() as u32;
        bytes.extend_from_slice(from);
        let end = bytes.len() as u32;
        Some(Slice { block, start, end })
    }

    #[inline]
    pub(super) fn bytes(&self, slice: Slice) -> &[u8] {
        let (start, end) = (slice.start as usize, slice.end as usize);
        if self.is_buffer(slice.block) {
            return self.buffers.bytes(slice.block as BufferId, start, end);
        }
        let place = slice.block as usize - self.buffers.count();
        &self.blocks[place].bytes[start..end]
    }

    /// The same, to be changed where it lies; nobody else is to hold these bytes.
    #[cfg(feature = "curve")]
    pub(super) fn bytes_mut(&mut self, slice: Slice) -> &mut [u8] {
        let (start, end) = (slice.start as usize, slice.end as usize);
        if self.is_buffer(slice.block) {
            return self.buffers.bytes_mut(slice.block as BufferId, start, end);
        }
        let place = slice.block as usize - self.buffers.count();
        &mut self.blocks[place].bytes[start..end]
    }

    #[inline]
    pub(super) fn hold(&mut self, block: BlockId) {
        if self.is_buffer(block) {
            return self.buffers.hold(block as BufferId);
        }
        self.blocks[block as usize - self.buffers.count()].holders += 1;
    }

    pub(super) fn release(&mut self, block: BlockId) {
        if self.is_buffer(block) {
            if self.buffers.release(block as BufferId) {
                self.recycled.push(block as BufferId);
            }
            return;
        }
        let place = block as usize - self.buffers.count();
        let entry = &mut self.blocks[place];
        entry.holders -= 1;
        if entry.holders == 0 {
            entry.bytes = Vec::new();
            self.unused.push(place as u32);
        }
    }
}

#[cfg(test)]
impl Memory {
    /// Bytes of all blocks, which come on top of the buffers.
    pub(super) fn block_bytes(&self) -> usize {
        self.blocks.iter().map(|block| block.bytes.capacity()).sum()
    }

    /// For tests: `bytes` as if the ring had received them into `buffer`.
    pub(super) fn received(&mut self, buffer: BufferId, bytes: &[u8]) -> Slice {
        let block = self.take(buffer);
        self.buffers.append(buffer, 0, bytes);
        let (start, end) = (0, bytes.len() as u32);
        Slice { block, start, end }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_do_not_move_and_are_used_again() {
        let mut memory = Memory::new(Buffers::new(2, 64).unwrap());
        let received = memory.received(1, b"abc");
        assert_eq!(
            (memory.bytes(received), memory.free_buffers()),
            (&b"abc"[..], 1)
        );
        let block = memory.block(Vec::with_capacity(16));
        let one = memory.append(block, b"front").unwrap();
        let at = memory.bytes(one).as_ptr();
        let two = memory.append(block, b"behind").unwrap();
        assert_eq!(
            (memory.bytes(one), memory.bytes(two)),
            (&b"front"[..], &b"behind"[..])
        );
        assert_eq!(memory.bytes(one).as_ptr(), at);
        assert_eq!(memory.append(block, b"too much"), None);
        memory.hold(block);
        memory.release(block);
        assert!(memory.block_bytes() >= 16);
        memory.release(block);
        assert_eq!(memory.block_bytes(), 0);
        assert_eq!(memory.block(vec![1]), block);
        memory.release(received.block);
        assert_eq!(memory.recycled, [1]);
    }
}
