//! A bounded table of slots with generations.
//!
//! A slot is an index; a generation tells this holder of the slot from the one before. The memory
//! is reserved at the start and nothing moves after that.

use std::ops::{Index, IndexMut};

use crate::operation::GENERATIONS;

/// No slot.
pub const NONE: u32 = u32::MAX;

struct Entry<T> {
    generation: u32,
    value: Option<T>,
    next_free: u32,
}

/// Slots for values of one kind, `capacity` at most.
pub struct Table<T> {
    entries: Vec<Entry<T>>,
    /// Slots that there is memory for.
    reserved: usize,
    /// Slots that may be in use, as many as that at most.
    capacity: usize,
    free: u32,
    used: usize,
}

impl<T> Table<T> {
    /// An empty table.
    pub fn new(capacity: usize) -> Table<T> {
        Table {
            entries: Vec::with_capacity(capacity),
            reserved: capacity,
            capacity,
            free: NONE,
            used: 0,
        }
    }

    /// Slots in use.
    pub fn used(&self) -> usize {
        self.used
    }

    /// Slots in all.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Whether no slot is left.
    pub fn is_full(&self) -> bool {
        self.used >= self.capacity
    }

    /// Lets so many slots be in use from now on, or as many as there is memory for. Those that are
    /// in use beyond it stay.
    pub fn limit(&mut self, capacity: usize) {
        self.capacity = capacity.min(self.reserved);
    }

    /// Takes a slot; gives the value back when there is none.
    pub fn insert(&mut self, value: T) -> Result<u32, T> {
        if self.is_full() {
            return Err(value);
        }
        if self.free != NONE {
            let slot = self.free;
            let entry = &mut self.entries[slot as usize];
            self.free = entry.next_free;
            entry.value = Some(value);
            self.used += 1;
            return Ok(slot);
        }
        self.entries.push(Entry {
            generation: 0,
            value: Some(value),
            next_free: NONE,
        });
        self.used += 1;
        Ok(self.entries.len() as u32 - 1)
    }

    /// Empties a slot; its next holder has another generation.
    pub fn remove(&mut self, slot: u32) -> Option<T> {
        let entry = self.entries.get_mut(slot as usize)?;
        let value = entry.value.take()?;
        entry.generation = (entry.generation + 1) % GENERATIONS;
        entry.next_free = self.free;
        self.free = slot;
        self.used -= 1;
        Some(value)
    }

    /// The value of a slot in use.
    pub fn get(&self, slot: u32) -> Option<&T> {
        self.entries.get(slot as usize)?.value.as_ref()
    }

    /// The value of a slot in use.
    pub fn get_mut(&mut self, slot: u32) -> Option<&mut T> {
        self.entries.get_mut(slot as usize)?.value.as_mut()
    }

    /// The generation of a slot; that of its next holder when it is empty.
    pub fn generation(&self, slot: u32) -> u32 {
        self.entries
            .get(slot as usize)
            .map_or(0, |entry| entry.generation)
    }

    /// Whether `slot` is in use by the holder of `generation`.
    pub fn is_current(&self, slot: u32, generation: u32) -> bool {
        self.get(slot).is_some() && self.generation(slot) == generation
    }

    /// Slots in use, in order.
    pub fn slots(&self) -> impl Iterator<Item = u32> + use<'_, T> {
        let used = self
            .entries
            .iter()
            .enumerate()
            .filter(|(_, entry)| entry.value.is_some());
        used.map(|(slot, _)| slot as u32)
    }
}

impl<T> Index<u32> for Table<T> {
    type Output = T;

    fn index(&self, slot: u32) -> &T {
        self.get(slot).expect("a slot in use: our own index")
    }
}

impl<T> IndexMut<u32> for Table<T> {
    fn index_mut(&mut self, slot: u32) -> &mut T {
        self.get_mut(slot).expect("a slot in use: our own index")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_that_is_used_again_has_another_generation() {
        let mut table = Table::new(2);
        let first = table.insert('a').unwrap();
        let generation = table.generation(first);
        assert_eq!(table.remove(first), Some('a'));
        assert_eq!(table.remove(first), None);
        let second = table.insert('b').unwrap();
        assert_eq!(first, second);
        assert!(!table.is_current(first, generation));
        assert!(table.is_current(second, table.generation(second)));
    }

    #[test]
    fn a_full_table_gives_the_value_back() {
        let mut table = Table::new(1);
        table.insert(1).unwrap();
        assert!(table.is_full());
        assert_eq!(table.insert(2), Err(2));
    }

    #[test]
    fn a_limit_lets_in_no_more_and_takes_nothing_away() {
        let mut table = Table::new(3);
        let first = table.insert(1).unwrap();
        table.insert(2).unwrap();
        table.limit(1);
        assert_eq!((table.used(), table.is_full()), (2, true));
        table.remove(first);
        assert_eq!(
            table.insert(3),
            Err(3),
            "its slot is free, and the limit is not"
        );
        table.limit(100);
        assert_eq!(table.capacity(), 3, "there is memory for three");
        assert_eq!(table.insert(3), Ok(first));
        table.insert(4).unwrap();
        assert!(table.is_full());
    }
}
