//! Who is too busy for another call: loads that instances publish, against thresholds
//! (`spec/request-plane.md` §12). Pure; who hears of loads feeds a [`Monitor`] and hands on what
//! it finds to [`super::Client::set_busy`].

use std::collections::{BTreeMap, HashSet};

/// Batched tokens of an engine that does not say how many it takes.
const BATCHED_TOKENS: u64 = 10_000_000;

/// What makes a rank of an instance busy; any one is enough, none is set unless it is said.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Thresholds {
    /// A share of the blocks, 0 to 1: busy above it, in decoding or in the cache, and free again
    /// only when both are at or below it.
    pub blocks: Option<f64>,
    /// Tokens waiting to be prefilled: busy above so many.
    pub prefill_tokens: Option<u64>,
    /// The same as a share of the tokens of one batch.
    pub prefill_share: Option<f64>,
}

/// What one rank of an instance has published last; what is not known counts as nothing.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct RankLoad {
    /// Blocks of requests that are decoded.
    pub decode_blocks: u64,
    /// Blocks of the cache in use.
    pub cache_blocks: u64,
    /// Blocks that there are; 0 if that is not known.
    pub total_blocks: u64,
    /// Tokens waiting to be prefilled.
    pub prefill_tokens: u64,
    /// Tokens of one batch; 0 if that is not known.
    pub batched_tokens: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Rank {
    load: RankLoad,
    /// The share of blocks has been above its threshold and not wholly below since.
    latched: bool,
}

/// The loads of all ranks of all instances.
#[derive(Clone, Debug, Default)]
pub struct Monitor {
    thresholds: Thresholds,
    /// By instance and rank. `None` for a rank that is known and has published nothing.
    ranks: BTreeMap<(u64, u32), Option<Rank>>,
}

impl Monitor {
    /// One that knows of nobody.
    pub fn new(thresholds: Thresholds) -> Monitor {
        Monitor {
            thresholds,
            ranks: BTreeMap::new(),
        }
    }

    /// An instance has ranks 0 to `ranks`, which count as free until they publish.
    pub fn expect(&mut self, instance: u64, ranks: u32) {
        for rank in 0..ranks {
            self.ranks.entry((instance, rank)).or_default();
        }
    }

    /// A rank has published its load.
    pub fn update(&mut self, instance: u64, rank: u32, load: RankLoad) {
        let entry = self.ranks.entry((instance, rank)).or_default();
        let mut latched = entry.is_some_and(|rank| rank.latched);
        if let Some(share) = self.thresholds.blocks {
            latched = above(load.decode_blocks, load.total_blocks, share)
                || above(load.cache_blocks, load.total_blocks, share);
        }
        *entry = Some(Rank { load, latched });
    }

    /// Only these instances are left.
    pub fn retain(&mut self, instances: &HashSet<u64>) {
        self.ranks.retain(|(id, _), _| instances.contains(id));
    }

    /// Other thresholds from now on.
    pub fn set(&mut self, thresholds: Thresholds) {
        self.thresholds = thresholds;
        let ranks = std::mem::take(&mut self.ranks);
        for ((instance, rank), known) in ranks {
            match known {
                Some(known) => self.update(instance, rank, known.load),
                None => self.expect_one(instance, rank),
            }
        }
    }

    fn expect_one(&mut self, instance: u64, rank: u32) {
        self.ranks.entry((instance, rank)).or_default();
    }

    /// The instances all of whose ranks are busy.
    pub fn busy(&self) -> HashSet<u64> {
        let mut busy = HashSet::new();
        let mut free = HashSet::new();
        for ((instance, _), rank) in &self.ranks {
            match rank.is_some_and(|rank| self.is_busy(&rank)) {
                true => busy.insert(*instance),
                false => free.insert(*instance),
            };
        }
        busy.retain(|instance| !free.contains(instance));
        busy
    }

    fn is_busy(&self, rank: &Rank) -> bool {
        let Thresholds {
            prefill_tokens,
            prefill_share,
            ..
        } = self.thresholds;
        let waiting = rank.load.prefill_tokens;
        let batch = match rank.load.batched_tokens {
            0 => BATCHED_TOKENS,
            batch => batch,
        };
        rank.latched
            || prefill_tokens.is_some_and(|most| waiting > most)
            || prefill_share.is_some_and(|share| waiting as f64 > share * batch as f64)
    }
}

fn above(used: u64, total: u64, share: f64) -> bool {
    total > 0 && used as f64 > share * total as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(decode: u64, cache: u64, prefill: u64) -> RankLoad {
        RankLoad {
            decode_blocks: decode,
            cache_blocks: cache,
            total_blocks: 100,
            prefill_tokens: prefill,
            batched_tokens: 1_000,
        }
    }

    #[test]
    fn nobody_is_busy_without_thresholds() {
        let mut monitor = Monitor::new(Thresholds::default());
        monitor.update(1, 0, load(100, 100, u64::MAX));
        assert!(monitor.busy().is_empty());
    }

    #[test]
    fn blocks_are_busy_above_and_free_when_both_are_not() {
        let thresholds = Thresholds {
            blocks: Some(0.8),
            ..Thresholds::default()
        };
        let mut monitor = Monitor::new(thresholds);
        for (decode, cache, busy) in [
            (80, 80, false),
            (81, 0, true),
            (10, 90, true),
            (10, 80, false),
            (0, 81, true),
        ] {
            monitor.update(1, 0, load(decode, cache, 0));
            assert_eq!(monitor.busy().contains(&1), busy, "{decode} {cache}");
        }
        let unknown = RankLoad {
            total_blocks: 0,
            ..load(90, 90, 0)
        };
        monitor.update(1, 0, unknown);
        assert!(monitor.busy().is_empty());
    }

    #[test]
    fn an_instance_is_busy_only_if_all_its_ranks_are() {
        let thresholds = Thresholds {
            prefill_tokens: Some(10),
            prefill_share: Some(0.5),
            ..Thresholds::default()
        };
        let mut monitor = Monitor::new(thresholds);
        monitor.expect(1, 2);
        monitor.update(1, 0, load(0, 0, 11));
        assert!(monitor.busy().is_empty(), "rank 1 has said nothing");
        monitor.update(1, 1, load(0, 0, 501));
        monitor.update(2, 0, load(0, 0, 10));
        assert_eq!(monitor.busy(), HashSet::from([1]));
        monitor.set(Thresholds {
            prefill_tokens: None,
            ..thresholds
        });
        assert!(monitor.busy().is_empty(), "11 is no half of 1,000");
        monitor.retain(&HashSet::from([2]));
        assert_eq!(monitor.ranks.len(), 1);
    }
}
