//! What one pool holds: allocations in the order of their slots, metadata by key, and the hash of
//! their shape (`spec/gpu-memory.md` §3.6).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound;

use sha2::{Digest, Sha256};
use thiserror::Error;

use crate::backend::Block;
use crate::ipc::Offers;

/// How much one pool may hold. A pool's tables are bounded by these, whatever a writer asks for.
#[derive(Clone, Copy, Debug)]
pub struct StoreLimits {
    /// Allocations at a time.
    pub allocations_max: usize,
    /// Entries of metadata at a time.
    pub metadata_max: usize,
    /// Keys and values of the metadata together.
    pub metadata_bytes_max: usize,
}

impl Default for StoreLimits {
    /// A model has thousands of tensors with some hundred bytes of metadata each.
    fn default() -> StoreLimits {
        StoreLimits {
            allocations_max: 1 << 16,
            metadata_max: 1 << 18,
            metadata_bytes_max: 256 << 20,
        }
    }
}

/// Why the store does not do what it was asked. Nothing changed.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
pub enum StoreError {
    /// No allocation has this id.
    #[error("Unknown allocation: {0}")]
    UnknownAllocation(String),
    /// The client's name for an allocation is taken.
    #[error("allocation {0} exists already")]
    Duplicate(String),
    /// The offset lies outside its allocation.
    #[error("offset {offset} is out of range: the allocation has {aligned_size} bytes")]
    OffsetOutOfRange {
        /// What was given.
        offset: i128,
        /// What there is.
        aligned_size: u64,
    },
    /// A limit is reached.
    #[error("the pool's limit of {limit} {what} is reached")]
    Full {
        /// Of what.
        what: &'static str,
        /// How many.
        limit: usize,
    },
}

/// One allocation.
pub struct Allocation {
    /// Its name; opaque.
    pub id: String,
    /// Bytes that were asked for.
    pub size: u64,
    /// Bytes that it has.
    pub aligned_size: u64,
    /// The engine's word for it.
    pub tag: String,
    /// Its place in the order of allocation; never used again in this layout.
    pub slot: u64,
    /// The memory.
    pub block: Box<dyn Block>,
    /// Keys of the metadata that points here.
    keys: BTreeSet<String>,
}

/// One entry of metadata.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Entry {
    /// The slot of the allocation that it lies in.
    pub slot: u64,
    /// Where in the allocation it starts.
    pub offset_bytes: u64,
    /// The engine's words; never interpreted.
    pub value: Vec<u8>,
}

/// The contents of one pool.
pub struct Store {
    limits: StoreLimits,
    allocations: BTreeMap<u64, Allocation>,
    slots: HashMap<String, u64>,
    next_slot: u64,
    total_bytes: u64,
    metadata: BTreeMap<String, Entry>,
    metadata_bytes: usize,
    /// Memory of the writer's own, beside what the pool made.
    offers: Offers,
}

impl Store {
    /// An empty pool.
    pub fn new(limits: StoreLimits) -> Store {
        Store {
            limits,
            allocations: BTreeMap::new(),
            slots: HashMap::new(),
            next_slot: 0,
            total_bytes: 0,
            metadata: BTreeMap::new(),
            metadata_bytes: 0,
            offers: Offers::new(limits),
        }
    }

    /// Memory that the writer lends of its own.
    pub fn offers(&self) -> &Offers {
        &self.offers
    }

    /// The same, for the writer.
    pub fn offers_mut(&mut self) -> &mut Offers {
        &mut self.offers
    }

    /// How many allocations there are.
    pub fn count(&self) -> u64 {
        self.allocations.len() as u64
    }

    /// Their aligned sizes together.
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// Whether another allocation of this name may be added; asked before memory is made for it.
    ///
    /// # Errors
    /// The table is full or the name is taken.
    pub fn may_insert(&self, id: &str) -> Result<(), StoreError> {
        if self.slots.contains_key(id) {
            return Err(StoreError::Duplicate(id.to_owned()));
        }
        let limit = self.limits.allocations_max;
        match self.allocations.len() < limit {
            true => Ok(()),
            false => Err(StoreError::Full {
                what: "allocations",
                limit,
            }),
        }
    }

    /// Adds an allocation in the next slot.
    ///
    /// # Errors
    /// As [`Store::may_insert`]; the block is dropped.
    pub fn insert(
        &mut self,
        id: String,
        size: u64,
        aligned_size: u64,
        tag: String,
        block: Box<dyn Block>,
    ) -> Result<&Allocation, StoreError> {
        self.may_insert(&id)?;
        let slot = self.next_slot;
        self.next_slot += 1;
        self.total_bytes += aligned_size;
        self.slots.insert(id.clone(), slot);
        let keys = BTreeSet::new();
        let allocation = Allocation {
            id,
            size,
            aligned_size,
            tag,
            slot,
            block,
            keys,
        };
        Ok(self.allocations.entry(slot).or_insert(allocation))
    }

    /// Finds an allocation by name.
    ///
    /// # Errors
    /// There is none.
    pub fn allocation(&self, id: &str) -> Result<&Allocation, StoreError> {
        let slot = self.slots.get(id);
        slot.and_then(|slot| self.allocations.get(slot))
            .ok_or_else(|| StoreError::UnknownAllocation(id.to_owned()))
    }

    /// Finds an allocation by slot.
    pub fn allocation_in(&self, slot: u64) -> Option<&Allocation> {
        self.allocations.get(&slot)
    }

    /// All allocations in the order of their slots.
    pub fn allocations(&self) -> impl Iterator<Item = &Allocation> {
        self.allocations.values()
    }

    /// Removes an allocation with the metadata that points at it. False if there was none.
    pub fn free(&mut self, id: &str) -> bool {
        let removed = self
            .slots
            .remove(id)
            .and_then(|slot| self.allocations.remove(&slot));
        let Some(allocation) = removed else {
            return false;
        };
        self.total_bytes -= allocation.aligned_size;
        for key in &allocation.keys {
            if let Some(entry) = self.metadata.remove(key) {
                self.metadata_bytes -= key.len() + entry.value.len();
            }
        }
        true
    }

    /// Removes everything; slots start at zero again. Answers what there was.
    pub fn clear(&mut self) -> Store {
        let empty = Store::new(self.limits);
        std::mem::replace(self, empty)
    }

    /// Whether there is nothing at all.
    pub fn is_empty(&self) -> bool {
        self.allocations.is_empty() && self.metadata.is_empty() && self.offers.is_empty()
    }

    /// Gives up the first block of a store that was cleared, and answers how large it was. None if
    /// there is no block.
    pub fn shed(&mut self) -> Option<u64> {
        let (_, allocation) = self.allocations.pop_first()?;
        Some(allocation.aligned_size)
    }

    /// Stores an entry, silently in the place of another with its key.
    ///
    /// # Errors
    /// The allocation is unknown, the offset outside it, or a limit is reached.
    pub fn put(
        &mut self,
        key: String,
        id: &str,
        offset: i128,
        value: Vec<u8>,
    ) -> Result<(), StoreError> {
        let allocation = self.allocation(id)?;
        let (slot, aligned_size) = (allocation.slot, allocation.aligned_size);
        let out_of_range = StoreError::OffsetOutOfRange {
            offset,
            aligned_size,
        };
        let offset_bytes = u64::try_from(offset).map_err(|_| out_of_range.clone())?;
        if offset_bytes >= aligned_size {
            return Err(out_of_range);
        }
        self.check_room(&key, value.len())?;
        self.delete(&key);
        self.metadata_bytes += key.len() + value.len();
        if let Some(allocation) = self.allocations.get_mut(&slot) {
            allocation.keys.insert(key.clone());
        }
        self.metadata.insert(
            key,
            Entry {
                slot,
                offset_bytes,
                value,
            },
        );
        Ok(())
    }

    fn check_room(&self, key: &str, value_bytes: usize) -> Result<(), StoreError> {
        let replaced = self.metadata.get(key);
        let limit = self.limits.metadata_max;
        if replaced.is_none() && self.metadata.len() >= limit {
            return Err(StoreError::Full {
                what: "metadata entries",
                limit,
            });
        }
        let freed = replaced.map_or(0, |entry| key.len() + entry.value.len());
        let limit = self.limits.metadata_bytes_max;
        if self.metadata_bytes - freed + key.len() + value_bytes > limit {
            return Err(StoreError::Full {
                what: "bytes of metadata",
                limit,
            });
        }
        Ok(())
    }

    /// Finds an entry.
    pub fn entry(&self, key: &str) -> Option<&Entry> {
        self.metadata.get(key)
    }

    /// Removes an entry. False if there was none.
    pub fn delete(&mut self, key: &str) -> bool {
        let Some(entry) = self.metadata.remove(key) else {
            return false;
        };
        self.metadata_bytes -= key.len() + entry.value.len();
        if let Some(allocation) = self.allocations.get_mut(&entry.slot) {
            allocation.keys.remove(key);
        }
        true
    }

    /// All keys that start with `prefix`, sorted by their bytes.
    pub fn keys<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'a String> {
        let from = self
            .metadata
            .range::<str, _>((Bound::Included(prefix), Bound::Unbounded));
        from.map(|(key, _)| key)
            .take_while(move |key| key.starts_with(prefix))
    }

    /// Whether every entry points into an allocation; what a commit demands.
    pub fn is_whole(&self) -> bool {
        self.metadata.values().all(|entry| {
            let allocation = self.allocations.get(&entry.slot);
            allocation.is_some_and(|allocation| entry.offset_bytes < allocation.aligned_size)
        })
    }

    /// The hash that upstream's clients compare: of the shape, not of the contents. Allocations are
    /// named by rank, so an identical rebuild has the same hash although every id is new. Offered
    /// memory is part of it where there is any; else it is exactly upstream's.
    pub fn layout_hash(&self) -> String {
        let mut hash = Sha256::new();
        let slots = self.slots_in_order();
        for (rank, allocation) in self.allocations.values().enumerate() {
            let Allocation {
                size,
                aligned_size,
                tag,
                ..
            } = allocation;
            hash.update(format!("{rank}:{size}:{aligned_size}:{tag}"));
        }
        for (key, entry) in &self.metadata {
            let rank = rank_of(entry.slot, &slots);
            hash.update(format!("{key}:{rank}:{}:", entry.offset_bytes));
            hash.update(&entry.value);
        }
        self.offers.hash_into(&mut hash);
        hex(&hash.finalize())
    }

    /// A digest of the same facts in which no two records can run together: every text has its
    /// length before it.
    pub fn layout_digest(&self) -> String {
        let mut hash = Sha256::new();
        let slots = self.slots_in_order();
        hash.update(b"corelane layout 1");
        hash.update(self.count().to_le_bytes());
        for allocation in self.allocations.values() {
            hash.update(allocation.size.to_le_bytes());
            hash.update(allocation.aligned_size.to_le_bytes());
            hash.update((allocation.tag.len() as u64).to_le_bytes());
            hash.update(&allocation.tag);
        }
        for (key, entry) in &self.metadata {
            let rank = rank_of(entry.slot, &slots) as u64;
            hash.update((key.len() as u64).to_le_bytes());
            hash.update(key);
            hash.update(rank.to_le_bytes());
            hash.update(entry.offset_bytes.to_le_bytes());
            hash.update((entry.value.len() as u64).to_le_bytes());
            hash.update(&entry.value);
        }
        self.offers.hash_into(&mut hash);
        hex(&hash.finalize())
    }

    /// The slots in order: the place of one here is its rank, with the gaps closed.
    fn slots_in_order(&self) -> Vec<u64> {
        self.allocations.keys().copied().collect()
    }
}

fn rank_of(slot: u64, slots: &[u64]) -> usize {
    slots.binary_search(&slot).unwrap_or_default()
}

fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |nibble: u8| char::from(DIGITS[usize::from(nibble & 15)]);
    let digits = bytes.iter().flat_map(|byte| [byte >> 4, *byte]);
    digits.map(digit).collect()
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::sync::Arc;

    use super::*;
    use crate::backend::{Access, BackendError};

    struct Nothing;

    impl Block for Nothing {
        fn export(&self, _: Access) -> Result<Arc<OwnedFd>, BackendError> {
            Err(BackendError::new("exporting", "there is nothing"))
        }
    }

    const MIB2: u64 = 2 << 20;

    fn store() -> Store {
        Store::new(StoreLimits::default())
    }

    fn add(store: &mut Store, id: &str, size: u64, tag: &str) {
        store
            .insert(id.to_owned(), size, MIB2, tag.to_owned(), Box::new(Nothing))
            .expect("there is room");
    }

    #[test]
    fn hashes_are_the_measured_ones() {
        let mut one = store();
        assert!(one.layout_hash().starts_with("e3b0c442"));
        add(&mut one, "x", 10, "w");
        assert_eq!(
            one.layout_hash(),
            "b970cb366bceccf4a49f71ac2bb41f04a05801fcf3df94377a0a606d1a06bcfc"
        );
        let mut three = store();
        add(&mut three, "first", 10, "kv_cache");
        add(&mut three, "freed", 15, "kv_cache");
        add(&mut three, "third", 20, "kv_cache");
        assert!(three.free("freed"));
        three
            .put("z".into(), "third", 7, b"VAL".to_vec())
            .expect("in range");
        three
            .put("a".into(), "first", 0, vec![1])
            .expect("in range");
        assert_eq!(
            three.layout_hash(),
            "018303d3bfc186b685658057318e5e5c8e59237413246841ee27d68d9f1b0243"
        );
    }

    #[test]
    fn the_digest_tells_apart_what_the_hash_runs_together() {
        let (mut one, mut other) = (store(), store());
        add(&mut one, "x", 1, "a1:1:2097152:b");
        add(&mut other, "x", 1, "a");
        add(&mut other, "y", 1, "b");
        assert_eq!(one.layout_hash(), other.layout_hash());
        assert_ne!(one.layout_digest(), other.layout_digest());
    }

    #[test]
    fn an_identical_rebuild_has_the_same_hash_under_new_ids() {
        let (mut one, mut other) = (store(), store());
        add(&mut one, "x", 1, "a");
        add(&mut other, "gone", 1, "a");
        other.free("gone");
        add(&mut other, "y", 1, "a");
        assert_eq!(one.layout_hash(), other.layout_hash());
        assert_eq!(one.layout_digest(), other.layout_digest());
    }

    #[test]
    fn a_free_takes_its_metadata_and_its_slot_along() {
        let mut pool = store();
        add(&mut pool, "a", 1, "t");
        add(&mut pool, "b", 1, "t");
        pool.put("k".into(), "a", 0, vec![1, 2]).expect("in range");
        pool.put("moved".into(), "a", 0, vec![]).expect("in range");
        pool.put("moved".into(), "b", 0, vec![]).expect("in range");
        assert!(pool.free("a"));
        assert!(!pool.free("a"));
        assert_eq!(pool.entry("k"), None);
        assert!(pool.entry("moved").is_some(), "it points at b now");
        add(&mut pool, "c", 1, "t");
        assert_eq!(pool.allocation("c").map(|c| c.slot), Ok(2));
        let cleared = pool.clear();
        assert_eq!(
            (cleared.count(), pool.count(), pool.total_bytes()),
            (2, 0, 0)
        );
        add(&mut pool, "d", 1, "t");
        assert_eq!(pool.allocation("d").map(|d| d.slot), Ok(0));
    }

    #[test]
    fn offsets_are_checked_and_nothing_changes_when_they_are_wrong() {
        let mut pool = store();
        add(&mut pool, "a", 1, "t");
        for offset in [-1, i128::from(MIB2), i128::from(u64::MAX)] {
            let refused = pool.put("k".into(), "a", offset, vec![]);
            assert!(matches!(refused, Err(StoreError::OffsetOutOfRange { .. })));
        }
        assert!(matches!(
            pool.put("k".into(), "b", 0, vec![]),
            Err(StoreError::UnknownAllocation(_))
        ));
        assert_eq!(pool.entry("k"), None);
        pool.put("k".into(), "a", i128::from(MIB2) - 1, vec![])
            .expect("the last byte");
    }

    #[test]
    fn keys_are_sorted_and_filtered() {
        let mut pool = store();
        add(&mut pool, "a", 1, "t");
        for key in ["b.2", "a", "b.1", "c", "b"] {
            pool.put(key.into(), "a", 0, vec![]).expect("in range");
        }
        assert_eq!(pool.keys("b").collect::<Vec<_>>(), ["b", "b.1", "b.2"]);
        assert_eq!(pool.keys("").count(), 5);
        assert!(pool.is_whole());
    }

    #[test]
    fn every_table_has_a_bound() {
        let limits = StoreLimits {
            allocations_max: 1,
            metadata_max: 1,
            metadata_bytes_max: 4,
        };
        let mut pool = Store::new(limits);
        add(&mut pool, "a", 1, "t");
        assert!(matches!(pool.may_insert("b"), Err(StoreError::Full { .. })));
        assert!(matches!(
            pool.may_insert("a"),
            Err(StoreError::Duplicate(_))
        ));
        pool.put("k".into(), "a", 0, vec![0; 3]).expect("it fits");
        pool.put("k".into(), "a", 0, vec![1; 3])
            .expect("in the place of the other");
        assert!(matches!(
            pool.put("l".into(), "a", 0, vec![]),
            Err(StoreError::Full { .. })
        ));
        assert!(matches!(
            pool.put("k".into(), "a", 0, vec![0; 4]),
            Err(StoreError::Full { .. })
        ));
        assert!(pool.delete("k") && !pool.delete("k"));
        pool.put("l".into(), "a", 0, vec![0; 3])
            .expect("room again");
    }
}
