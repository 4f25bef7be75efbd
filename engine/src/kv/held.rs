//! What each rank holds, by the engine's own names of its blocks: that is how removals and parents
//! are told.
//!
//! ```text
//! heads [hash of rank and block] -> entry -> entry      chains of one table of entries
//! rank  oldest <-> ... <-> newest                       in the order in which they were stored
//! ```

use super::nodes::mix;

/// In place of an entry: there is none.
pub(super) const NONE: u32 = u32::MAX;

/// Entries that are allocated together, so that nothing is ever moved.
const CHUNK: usize = 1024;

/// One block of one rank.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    /// The engine's own hash.
    pub(super) block: u64,
    /// That of the block before it, if there is one.
    pub(super) parent: Option<u64>,
    /// Its key in the tree.
    pub(super) key: u64,
    /// Blocks of the same rank that were stored behind it.
    pub(super) children: u32,
    /// The rank.
    pub(super) rank: u16,
    /// The next one with the same head; or the next free one.
    chain: u32,
    pub(super) older: u32,
    pub(super) newer: u32,
}

/// The entries of one rank, in order.
#[derive(Clone, Copy, Debug)]
pub(super) struct Line {
    pub(super) oldest: u32,
    pub(super) newest: u32,
    pub(super) blocks: u32,
}

impl Line {
    pub(super) const EMPTY: Line = Line {
        oldest: NONE,
        newest: NONE,
        blocks: 0,
    };
}

/// All entries of an index.
pub(super) struct Held {
    chunks: Vec<Box<[Entry; CHUNK]>>,
    heads: Vec<u32>,
    free: u32,
    used: usize,
    max: usize,
}

impl Held {
    /// None, of `max` at most.
    pub(super) fn new(max: usize) -> Held {
        Held {
            chunks: Vec::with_capacity(max.div_ceil(CHUNK)),
            heads: vec![NONE; max.next_power_of_two()],
            free: NONE,
            used: 0,
            max,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.used
    }

    pub(super) fn is_full(&self) -> bool {
        self.used >= self.max
    }

    pub(super) fn get(&self, at: u32) -> &Entry {
        &self.chunks[at as usize / CHUNK][at as usize % CHUNK]
    }

    pub(super) fn get_mut(&mut self, at: u32) -> &mut Entry {
        &mut self.chunks[at as usize / CHUNK][at as usize % CHUNK]
    }

    fn head(&self, rank: u16, block: u64) -> usize {
        let spread = u64::from(rank).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        mix(block ^ spread) as usize & (self.heads.len() - 1)
    }

    /// The entry of a rank's block.
    pub(super) fn find(&self, rank: u16, block: u64) -> Option<u32> {
        let mut at = self.heads[self.head(rank, block)];
        while at != NONE {
            let entry = self.get(at);
            if entry.block == block && entry.rank == rank {
                return Some(at);
            }
            at = entry.chain;
        }
        None
    }

    /// Adds an entry that is not there, as the newest of its rank. There must be room.
    pub(super) fn insert(
        &mut self,
        rank: u16,
        (block, parent, key): (u64, Option<u64>, u64),
        line: &mut Line,
    ) {
        let head = self.head(rank, block);
        let entry = Entry {
            block,
            parent,
            key,
            children: 0,
            rank,
            chain: self.heads[head],
            older: NONE,
            newer: NONE,
        };
        if self.free == NONE {
            self.add_chunk(entry);
        }
        let at = self.free;
        self.free = self.get(at).chain;
        *self.get_mut(at) = entry;
        self.heads[head] = at;
        self.used += 1;
        self.append(at, line);
    }

    fn add_chunk(&mut self, blank: Entry) {
        let begin = (self.chunks.len() * CHUNK) as u32;
        let mut chunk = Box::new([blank; CHUNK]);
        for (at, entry) in chunk.iter_mut().enumerate() {
            entry.chain = begin + at as u32 + 1;
        }
        chunk[CHUNK - 1].chain = NONE;
        self.chunks.push(chunk);
        self.free = begin;
    }

    /// Forgets an entry and answers what it was.
    pub(super) fn remove(&mut self, at: u32, line: &mut Line) -> Entry {
        let entry = *self.get(at);
        self.unlink(at, line);
        let head = self.head(entry.rank, entry.block);
        if self.heads[head] == at {
            self.heads[head] = entry.chain;
        } else {
            let mut before = self.heads[head];
            while self.get(before).chain != at {
                before = self.get(before).chain;
            }
            self.get_mut(before).chain = entry.chain;
        }
        self.get_mut(at).chain = self.free;
        self.free = at;
        self.used -= 1;
        entry
    }

    /// Makes an entry the newest of its rank.
    pub(super) fn renew(&mut self, at: u32, line: &mut Line) {
        if line.newest != at {
            self.unlink(at, line);
            self.append(at, line);
        }
    }

    fn append(&mut self, at: u32, line: &mut Line) {
        let newest = line.newest;
        let entry = self.get_mut(at);
        (entry.older, entry.newer) = (newest, NONE);
        match newest {
            NONE => line.oldest = at,
            newest => self.get_mut(newest).newer = at,
        }
        line.newest = at;
        line.blocks += 1;
    }

    fn unlink(&mut self, at: u32, line: &mut Line) {
        let (older, newer) = (self.get(at).older, self.get(at).newer);
        match older {
            NONE => line.oldest = newer,
            older => self.get_mut(older).newer = newer,
        }
        match newer {
            NONE => line.newest = older,
            newer => self.get_mut(newer).older = older,
        }
        line.blocks -= 1;
    }
}
