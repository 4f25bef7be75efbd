//! The tree of blocks, flat: a block is found by the hash of its whole path, with the ranks that
//! hold it in the same cache line.
//!
//! ```text
//! tokens     [block 0][block 1][block 2]
//! key         k0 = step(ROOT, h0)   k1 = step(k0, h1)   k2 = step(k1, h2)
//! slot        [key | ranks, one bit each, 64 in a word]
//! ```
//!
//! The keys of a prompt follow from its hashes alone, so a walk down the tree waits for no pointer.
//! The table is cut into segments that grow one by one: no event waits until millions of slots have
//! moved.

/// The key above the first block of a sequence; no block has it.
pub(super) const ROOT: u64 = 0;

/// Parts of the table; the highest bits of a key name one.
const SEGMENTS: usize = 64;
/// Slots of a segment at first.
const SLOTS_MIN: usize = 16;

/// The key of a block below `parent` whose tokens have the hash `tokens`.
#[inline]
#[must_use]
pub(super) fn step(parent: u64, tokens: u64) -> u64 {
    mix(parent.rotate_left(23) ^ tokens).max(1)
}

/// A mixing of 64 bits in which each bit of the input moves half of the output (splitmix64).
#[inline]
#[must_use]
pub fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}

/// All blocks that some rank holds.
pub(super) struct Nodes {
    segments: Vec<Segment>,
    /// Words of ranks in a slot.
    words: usize,
    used: usize,
}

/// Linear probing; a slot is a key, [`ROOT`] if it is free, and words of ranks.
struct Segment {
    slots: Vec<u64>,
    mask: usize,
    used: usize,
}

impl Nodes {
    /// None, for `words` times 64 ranks.
    pub(super) fn new(words: usize) -> Nodes {
        let segment = |_| Segment::new(SLOTS_MIN, words);
        Nodes {
            segments: (0..SEGMENTS).map(segment).collect(),
            words,
            used: 0,
        }
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.used
    }

    /// The ranks that hold a block, in as many words as the table was made for; `None` if nobody
    /// does.
    #[inline]
    pub(super) fn ranks<const WORDS: usize>(&self, key: u64) -> Option<&[u64; WORDS]> {
        debug_assert_eq!(WORDS, self.words, "the walk is that of another index");
        let segment = &self.segments[place(key)];
        let mask = segment.mask;
        let mut slot = key as usize & mask;
        loop {
            let (found, ranks) = segment.slots.get(slot * (1 + WORDS)..)?.split_first()?;
            if *found == key {
                return ranks.first_chunk();
            }
            if *found == ROOT {
                return None;
            }
            slot = (slot + 1) & mask;
        }
    }

    /// Notes that `rank` holds a block.
    pub(super) fn set(&mut self, key: u64, rank: usize) {
        let words = self.words;
        let segment = &mut self.segments[place(key)];
        let at = match segment.find(key, words) {
            Some(at) => at,
            None => {
                self.used += 1;
                segment.insert(key, words)
            }
        };
        segment.slots[at + 1 + rank / 64] |= 1 << (rank % 64);
    }

    /// Notes that `rank` no longer holds it. A block that nobody holds is forgotten.
    pub(super) fn clear(&mut self, key: u64, rank: usize) {
        let words = self.words;
        let segment = &mut self.segments[place(key)];
        let Some(at) = segment.find(key, words) else {
            return;
        };
        segment.slots[at + 1 + rank / 64] &= !(1 << (rank % 64));
        if segment.slots[at + 1..=at + words]
            .iter()
            .all(|word| *word == 0)
        {
            segment.remove(at, words);
            self.used -= 1;
        }
    }
}

/// The segment of a key.
#[inline]
fn place(key: u64) -> usize {
    (key >> (u64::BITS - SEGMENTS.trailing_zeros())) as usize
}

impl Segment {
    fn new(slots: usize, words: usize) -> Segment {
        Segment {
            slots: vec![0; slots * (1 + words)],
            mask: slots - 1,
            used: 0,
        }
    }

    /// Where a key would lie if nobody were there.
    #[inline]
    fn home(&self, key: u64) -> usize {
        key as usize & self.mask
    }

    /// The offset of the key's slot.
    #[inline]
    fn find(&self, key: u64, words: usize) -> Option<usize> {
        let mut slot = self.home(key);
        loop {
            let at = slot * (1 + words);
            match self.slots[at] {
                found if found == key => return Some(at),
                ROOT => return None,
                _ => slot = (slot + 1) & self.mask,
            }
        }
    }

    /// Takes a slot for a key that is not there; grows before two thirds are taken.
    fn insert(&mut self, key: u64, words: usize) -> usize {
        if 3 * (self.used + 1) > 2 * (self.mask + 1) {
            self.grow(words);
        }
        self.used += 1;
        let at = self.free(key, words);
        self.slots[at] = key;
        at
    }

    fn free(&self, key: u64, words: usize) -> usize {
        let mut slot = self.home(key);
        while self.slots[slot * (1 + words)] != ROOT {
            slot = (slot + 1) & self.mask;
        }
        slot * (1 + words)
    }

    fn grow(&mut self, words: usize) {
        let mut larger = Segment::new(2 * (self.mask + 1), words);
        for slot in self.slots.chunks_exact(1 + words) {
            if slot[0] != ROOT {
                let at = larger.free(slot[0], words);
                larger.slots[at..=at + words].copy_from_slice(slot);
            }
        }
        larger.used = self.used;
        *self = larger;
    }

    /// Frees a slot, and moves those behind it that lie there only because it was taken.
    fn remove(&mut self, at: usize, words: usize) {
        let stride = 1 + words;
        let mut hole = at / stride;
        let mut next = hole;
        loop {
            next = (next + 1) & self.mask;
            let key = self.slots[next * stride];
            if key == ROOT {
                break;
            }
            // Slots from its home to where it lies; the hole must be among them.
            let way = next.wrapping_sub(self.home(key)) & self.mask;
            let back = next.wrapping_sub(hole) & self.mask;
            if way >= back {
                let from = next * stride;
                self.slots.copy_within(from..from + stride, hole * stride);
                hole = next;
            }
        }
        self.slots[hole * stride..(hole + 1) * stride].fill(0);
        self.used -= 1;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against a map: whatever comes and goes, in a table that grows and whose keys collide.
        #[test]
        fn is_a_map_of_sets(
            steps in prop::collection::vec((0_u64..90, 0_usize..130, any::<bool>()), 1..600),
        ) {
            let mut nodes = Nodes::new(3);
            let mut model: HashMap<u64, HashSet<usize>> = HashMap::new();
            // All in one segment, with few homes.
            let key = |n: u64| 7 << 58 | (n % 11) << 20 | (n / 11 % 4) | 1;
            for (n, rank, set) in steps {
                let key = key(n);
                if set {
                    nodes.set(key, rank);
                    model.entry(key).or_default().insert(rank);
                } else {
                    nodes.clear(key, rank);
                    if let Some(ranks) = model.get_mut(&key) {
                        ranks.remove(&rank);
                        if ranks.is_empty() {
                            model.remove(&key);
                        }
                    }
                }
            }
            prop_assert_eq!(nodes.len(), model.len());
            for n in 0..90 {
                let words = nodes.ranks::<3>(key(n));
                let ranks = words.map(|words| {
                    (0..192).filter(|rank| words[rank / 64] >> (rank % 64) & 1 == 1).collect()
                });
                prop_assert_eq!(ranks, model.get(&key(n)).cloned());
            }
        }
    }

    #[test]
    fn keys_follow_the_whole_path() {
        let [a, b] = [step(ROOT, 1), step(ROOT, 2)];
        assert!(a != b && step(a, 2) != step(b, 1) && step(a, 1) != a);
    }
}
