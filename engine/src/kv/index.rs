//! Which worker has how much of a prompt in its KV cache, as its events say
//! (spec/events-discovery.md §3.8).
//!
//! ```text
//! events  --> held: rank and engine's hash of a block --> its key --> nodes: ranks that hold it
//! prompt  --> keys of its blocks, from the first on    ------------>  until nobody is left
//! ```
//!
//! A worker may have several *ranks*, with a cache each. Memory is bounded: by blocks, each counted
//! for every rank that holds it, and by ranks. Beyond the first the *oldest leaf* of the rank that
//! holds most makes room; beyond the second a rank is not taken in.

use std::collections::HashMap;

use super::held::{Held, Line, NONE};
use super::nodes::{Nodes, ROOT, step};

/// Ranks of one index, at most.
pub const RANKS_MAX: usize = 1024;
const WORDS_MAX: usize = RANKS_MAX / 64;

/// Entries looked at for one that nothing is stored behind, when one must go.
const LEAF_TRIES: usize = 16;
/// Blocks of ranks that are gone which are forgotten along with each change.
const SWEEP: usize = 1024;

/// One cache: a worker's instance id, and the rank within it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RankId {
    /// The instance.
    pub worker_id: u64,
    /// The rank.
    pub dp_rank: u32,
}

/// A block that was stored, as an event tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored {
    /// The engine's own hash of it.
    pub block: u64,
    /// The hash of its tokens.
    pub tokens: u64,
}

/// What has become of changes, since the beginning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Blocks stored, those that were there already included.
    pub stored: u64,
    /// Blocks removed.
    pub removed: u64,
    /// Blocks that were to be removed and were not there.
    pub unknown: u64,
    /// Blocks dropped because the block before them is not known.
    pub orphans: u64,
    /// Blocks that made room for others.
    pub evicted: u64,
    /// Blocks of ranks for which there was no room.
    pub rankless: u64,
    /// Ranks cleared.
    pub cleared: u64,
}

struct Rank {
    id: RankId,
    line: Line,
    /// Its blocks do not count any more, and are being forgotten.
    gone: bool,
}

/// How much of a prompt one rank has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overlap {
    /// Who.
    pub rank: RankId,
    /// Blocks from the first on, without a gap.
    pub blocks: u32,
}

/// The index of one core and one target.
pub struct Index {
    nodes: Nodes,
    held: Held,
    ranks: Vec<Option<Rank>>,
    number_of: HashMap<RankId, u16>,
    /// Numbers of ranks that are gone and still have blocks.
    going: Vec<u16>,
    /// Ranks that count.
    live: [u64; WORDS_MAX],
    words: usize,
    overlaps: Vec<Overlap>,
    counts: Counts,
}

impl Index {
    /// An empty one for `blocks_max` blocks and `ranks_max` ranks, which is rounded up to 64, 128,
    /// ... [`RANKS_MAX`].
    #[must_use]
    pub fn new(blocks_max: usize, ranks_max: usize) -> Index {
        let words = ranks_max.div_ceil(64).clamp(1, WORDS_MAX);
        let words = words.next_power_of_two();
        Index {
            nodes: Nodes::new(words),
            held: Held::new(blocks_max.clamp(1, NONE as usize / 2)),
            ranks: (0..64 * words).map(|_| None).collect(),
            number_of: HashMap::with_capacity(64 * words),
            going: Vec::with_capacity(64 * words),
            live: [0; WORDS_MAX],
            words,
            overlaps: Vec::with_capacity(64 * words),
            counts: Counts::default(),
        }
    }

    /// Blocks, each counted for every rank that holds it.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.held.len()
    }

    /// Different blocks.
    #[must_use]
    pub fn nodes(&self) -> usize {
        self.nodes.len()
    }

    /// Ranks that are known.
    #[must_use]
    pub fn ranks(&self) -> usize {
        self.number_of.len()
    }

    /// What has become of changes.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Blocks that a rank holds.
    #[must_use]
    pub fn blocks_of(&self, id: RankId) -> usize {
        let number = self.number_of.get(&id);
        let rank = number.and_then(|number| self.ranks[usize::from(*number)].as_ref());
        rank.map_or(0, |rank| rank.line.blocks as usize)
    }

    /// Blocks were stored, each behind the one before; the first behind `parent`, by the engine's
    /// own hash, or at the begin of a sequence.
    pub fn stored(&mut self, id: RankId, parent: Option<u64>, blocks: &[Stored]) {
        self.sweep(SWEEP);
        let Some(rank) = self.number(id) else {
            self.counts.rankless += blocks.len() as u64;
            return;
        };
        let mut key = match parent {
            None => ROOT,
            Some(parent) => match self.held.find(rank, parent) {
                Some(at) => self.held.get(at).key,
                None => {
                    self.counts.orphans += blocks.len() as u64;
                    return;
                }
            },
        };
        let mut parent = parent;
        self.counts.stored += blocks.len() as u64;
        for block in blocks {
            key = step(key, block.tokens);
            self.store(rank, block.block, parent, key);
            parent = Some(block.block);
        }
    }

    fn store(&mut self, rank: u16, block: u64, parent: Option<u64>, key: u64) {
        if let Some(at) = self.held.find(rank, block) {
            if self.held.get(at).key == key {
                let line = &mut rank_of(&mut self.ranks, rank).line;
                self.held.renew(at, line);
                // Another name of the same block may have been removed.
                return self.nodes.set(key, usize::from(rank));
            }
            // The engine uses the name again for something else.
            self.forget(at);
        }
        if self.held.is_full() {
            self.make_room();
        }
        if let Some(before) = parent.and_then(|parent| self.held.find(rank, parent)) {
            self.held.get_mut(before).children += 1;
        }
        let line = &mut rank_of(&mut self.ranks, rank).line;
        self.held.insert(rank, (block, parent, key), line);
        self.nodes.set(key, usize::from(rank));
    }

    /// Blocks were removed, by the engine's own hashes.
    pub fn removed(&mut self, id: RankId, blocks: &[u64]) {
        self.sweep(SWEEP);
        let number = self.number_of.get(&id).copied();
        for block in blocks {
            match number.and_then(|rank| self.held.find(rank, *block)) {
                Some(at) => {
                    self.forget(at);
                    self.counts.removed += 1;
                }
                None => self.counts.unknown += 1,
            }
        }
    }

    /// All blocks of a rank went, or nobody knows any more which are there.
    pub fn cleared(&mut self, id: RankId) {
        if let Some(number) = self.number_of.remove(&id) {
            self.retire(number);
        }
        self.sweep(SWEEP);
    }

    /// A worker is gone, with all its ranks.
    pub fn forget_worker(&mut self, worker_id: u64) {
        for number in 0..self.ranks.len() {
            let is_his = |rank: &Rank| rank.id.worker_id == worker_id && !rank.gone;
            if self.ranks[number].as_ref().is_some_and(is_his) {
                let id = rank_of(&mut self.ranks, number as u16).id;
                self.number_of.remove(&id);
                self.retire(number as u16);
            }
        }
        self.sweep(SWEEP);
    }

    /// A rank does not count from now on; its blocks are forgotten bit by bit.
    fn retire(&mut self, number: u16) {
        self.live[usize::from(number) / 64] &= !(1 << (number % 64));
        rank_of(&mut self.ranks, number).gone = true;
        self.going.push(number);
        self.counts.cleared += 1;
    }

    /// Forgets some blocks of ranks that are gone, and the ranks that have none left. Answers
    /// whether any was left.
    pub fn sweep(&mut self, blocks: usize) -> bool {
        let mut left = blocks;
        while let Some(number) = self.going.last().copied() {
            let oldest = rank_of(&mut self.ranks, number).line.oldest;
            if oldest == NONE {
                self.ranks[usize::from(number)] = None;
                self.going.pop();
                continue;
            }
            if left == 0 {
                return true;
            }
            self.forget(oldest);
            left -= 1;
        }
        false
    }

    /// The number of a rank; a new one gets the lowest that is free.
    fn number(&mut self, id: RankId) -> Option<u16> {
        if let Some(number) = self.number_of.get(&id) {
            return Some(*number);
        }
        if self.ranks.iter().all(Option::is_some) {
            self.sweep(usize::MAX);
        }
        let free = self.ranks.iter().position(Option::is_none)?;
        self.ranks[free] = Some(Rank {
            id,
            line: Line::EMPTY,
            gone: false,
        });
        self.live[free / 64] |= 1 << (free % 64);
        self.number_of.insert(id, free as u16);
        Some(free as u16)
    }

    fn forget(&mut self, at: u32) {
        let rank = self.held.get(at).rank;
        let line = &mut rank_of(&mut self.ranks, rank).line;
        let entry = self.held.remove(at, line);
        self.nodes.clear(entry.key, usize::from(rank));
        let before = entry.parent.and_then(|parent| self.held.find(rank, parent));
        if let Some(before) = before {
            let children = &mut self.held.get_mut(before).children;
            *children = children.saturating_sub(1);
        }
    }

    /// Forgets a block: of a rank that is gone, else the oldest leaf of the rank that holds most.
    fn make_room(&mut self) {
        self.sweep(SWEEP);
        if !self.held.is_full() {
            return;
        }
        let ranks = self.ranks.iter().enumerate();
        let blocks = ranks.filter_map(|(number, rank)| Some((number, rank.as_ref()?.line.blocks)));
        let Some((largest, _)) = blocks.max_by_key(|(_, blocks)| *blocks) else {
            return;
        };
        for _ in 0..LEAF_TRIES {
            let line = &mut rank_of(&mut self.ranks, largest as u16).line;
            let oldest = line.oldest;
            if self.held.get(oldest).children == 0 {
                break;
            }
            self.held.renew(oldest, line);
        }
        let oldest = rank_of(&mut self.ranks, largest as u16).line.oldest;
        self.forget(oldest);
        self.counts.evicted += 1;
    }

    /// How much of the prompt with these block hashes each rank has; ranks that have nothing of it
    /// are not listed. Allocates nothing.
    pub fn overlaps(&mut self, prompt: &[u64]) -> &[Overlap] {
        self.overlaps.clear();
        match self.words {
            1 => self.walk::<1>(prompt),
            2 => self.walk::<2>(prompt),
            4 => self.walk::<4>(prompt),
            8 => self.walk::<8>(prompt),
            _ => self.walk::<WORDS_MAX>(prompt),
        }
        &self.overlaps
    }

    /// The walk down the tree, for tables of so many words.
    fn walk<const WORDS: usize>(&mut self, prompt: &[u64]) {
        let mut active: [u64; WORDS] = std::array::from_fn(|word| self.live[word]);
        let (mut key, mut depth) = (ROOT, 0);
        for tokens in prompt {
            key = step(key, *tokens);
            let Some(ranks) = self.nodes.ranks::<WORDS>(key) else {
                break;
            };
            let next: [u64; WORDS] = std::array::from_fn(|word| active[word] & ranks[word]);
            if next != active && depth > 0 {
                for (word, (before, now)) in active.iter().zip(next).enumerate() {
                    note(
                        &mut self.overlaps,
                        &self.ranks,
                        (word, before & !now),
                        depth,
                    );
                }
            }
            active = next;
            if active == [0; WORDS] {
                return;
            }
            depth += 1;
        }
        if depth > 0 {
            for (word, active) in active.iter().enumerate() {
                note(&mut self.overlaps, &self.ranks, (word, *active), depth);
            }
        }
    }
}

/// Lists the ranks of one word's bits.
fn note(
    overlaps: &mut Vec<Overlap>,
    ranks: &[Option<Rank>],
    (word, mut bits): (usize, u64),
    blocks: u32,
) {
    while bits != 0 {
        let number = 64 * word + bits.trailing_zeros() as usize;
        bits &= bits - 1;
        if let Some(rank) = &ranks[number] {
            let rank = rank.id;
            overlaps.push(Overlap { rank, blocks });
        }
    }
}

/// A rank that has a number.
fn rank_of(ranks: &mut [Option<Rank>], number: u16) -> &mut Rank {
    match &mut ranks[usize::from(number)] {
        Some(rank) => rank,
        // Entries and numbers name only ranks that are there.
        None => unreachable!("a number of no rank"),
    }
}

#[cfg(test)]
#[path = "index_tests.rs"]
mod tests;
