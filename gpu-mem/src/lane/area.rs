//! Which blocks of a part of the slab are given out: the lowest free place that fits.
//!
//! Low places are used again and again, so that a quiet lane stays in the cache and touches few
//! pages.

/// A part of a slab.
#[derive(Debug)]
pub struct Area {
    /// Free ranges in units, by place; no two of them touch.
    free: Vec<(u64, u64)>,
    unit: u64,
    start: u64,
    units: u64,
}

impl Area {
    /// All of `bytes` bytes from `start` on, in multiples of `unit`.
    pub fn new(start: u64, bytes: u64, unit: u64) -> Area {
        Area {
            free: vec![(0, bytes / unit)],
            unit,
            start,
            units: bytes / unit,
        }
    }

    /// Bytes in all.
    pub fn bytes(&self) -> u64 {
        self.units * self.unit
    }

    /// Bytes that are free, in however many places.
    pub fn free_bytes(&self) -> u64 {
        self.free.iter().map(|(_, units)| units * self.unit).sum()
    }

    /// Whether a block of `bytes` could be had now.
    pub fn fits(&self, bytes: u64) -> bool {
        let units = self.units_of(bytes);
        self.free.iter().any(|(_, free)| *free >= units)
    }

    /// A block of at least `bytes`: its offset in the slab.
    pub fn take(&mut self, bytes: u64) -> Option<u64> {
        let units = self.units_of(bytes);
        let index = self.free.iter().position(|(_, free)| *free >= units)?;
        let (at, free) = &mut self.free[index];
        let taken = *at;
        (*at, *free) = (*at + units, *free - units);
        if *free == 0 {
            self.free.remove(index);
        }
        Some(self.start + taken * self.unit)
    }

    /// Gives a block back that was taken with this offset and size.
    pub fn give(&mut self, offset: u64, bytes: u64) {
        let units = self.units_of(bytes);
        let at = (offset - self.start) / self.unit;
        debug_assert!(at + units <= self.units, "a block of this area");
        let index = self.free.partition_point(|(free, _)| *free < at);
        let before = index.checked_sub(1).filter(|&before| {
            let (start, length) = self.free[before];
            start + length == at
        });
        let after = self.free.get(index).filter(|next| next.0 == at + units);
        match (before, after.copied()) {
            (Some(before), Some((_, next))) => {
                self.free[before].1 += units + next;
                self.free.remove(index);
            }
            (Some(before), None) => self.free[before].1 += units,
            (None, Some((_, next))) => self.free[index] = (at, units + next),
            (None, None) => self.free.insert(index, (at, units)),
        }
    }

    fn units_of(&self, bytes: u64) -> u64 {
        bytes.div_ceil(self.unit).max(1)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn places_come_back_whole() {
        let mut area = Area::new(4096, 1024, 256);
        let blocks: Vec<u64> = (0..4).map(|_| area.take(200).expect("room")).collect();
        assert_eq!(blocks, [4096, 4352, 4608, 4864]);
        assert_eq!(area.take(1), None);
        for block in [4352, 4864, 4096, 4608] {
            area.give(block, 200);
        }
        assert_eq!((area.free_bytes(), area.take(1024)), (1024, Some(4096)));
    }

    proptest! {
        #[test]
        fn no_two_blocks_overlap_and_none_is_lost(
            steps in proptest::collection::vec((any::<bool>(), 1..3000u64), 1..200)
        ) {
            let mut area = Area::new(256, 16 * 1024, 256);
            let mut taken: Vec<(u64, u64)> = Vec::new();
            for (take, bytes) in steps {
                if take {
                    if let Some(offset) = area.take(bytes) {
                        let end = offset + bytes;
                        prop_assert!(offset >= 256 && end <= 256 + 16 * 1024);
                        for (other, length) in &taken {
                            prop_assert!(end <= *other || other + length <= offset);
                        }
                        taken.push((offset, bytes));
                    }
                } else if !taken.is_empty() {
                    let (offset, bytes) = taken.swap_remove(bytes as usize % taken.len());
                    area.give(offset, bytes);
                }
            }
            for (offset, bytes) in taken {
                area.give(offset, bytes);
            }
            prop_assert_eq!(area.free_bytes(), 16 * 1024);
            prop_assert_eq!(area.free.len(), 1);
        }
    }
}
