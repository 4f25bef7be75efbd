//! The blocks that a worker has published as stored, so that it can be asked for them.

use std::collections::{HashMap, HashSet};

use corelane_codec::event::KvWorker;
use corelane_codec::event::typed::{KvBlock, KvChange, KvEvent};

/// A block, and where it came in.
#[derive(Clone, Debug)]
struct Kept {
    parent_hash: Option<u64>,
    block: KvBlock,
    order: u64,
}

/// What a cache holds, by its own changes. Bounded: a cache with more blocks is not kept.
#[derive(Debug)]
pub(super) struct Ledger {
    kept: HashMap<u64, Kept>,
    blocks_max: usize,
    /// There were more than that, since the cache was last cleared.
    overflowed: bool,
    /// Blocks that have come so far.
    order: u64,
    /// Number of the last change; the first is 1, as Dynamo's is.
    last_event_id: u64,
}

impl Ledger {
    /// Nothing is in the cache.
    pub(super) fn new(blocks_max: usize) -> Ledger {
        Ledger {
            kept: HashMap::new(),
            blocks_max,
            overflowed: false,
            order: 0,
            last_event_id: 0,
        }
    }

    /// Number of the last change.
    pub(super) fn last_event_id(&self) -> u64 {
        self.last_event_id
    }

    /// A change, and its number.
    pub(super) fn note(&mut self, change: &KvChange) -> u64 {
        match change {
            KvChange::Stored {
                parent_hash,
                blocks,
                ..
            } => self.stored(*parent_hash, blocks),
            KvChange::Removed { block_hashes } => {
                for block in block_hashes {
                    self.kept.remove(block);
                }
            }
            KvChange::Cleared => {
                self.kept.clear();
                self.overflowed = false;
            }
        }
        self.last_event_id += 1;
        self.last_event_id
    }

    fn stored(&mut self, parent_hash: Option<u64>, blocks: &[KvBlock]) {
        if self.overflowed {
            return;
        }
        let mut parent_hash = parent_hash;
        for block in blocks {
            self.order += 1;
            let kept = Kept {
                parent_hash,
                block: block.clone(),
                order: self.order,
            };
            parent_hash = Some(block.block_hash);
            // What is stored again takes no more room.
            self.kept.insert(block.block_hash, kept);
            if self.kept.len() > self.blocks_max {
                // A part of it would be taken for all.
                self.overflowed = true;
                self.kept = HashMap::new();
                return;
            }
        }
    }

    /// All that is in the cache, as if it were stored now, parents first; `None` if that was too
    /// much to be kept.
    pub(super) fn dump(&self, worker: KvWorker) -> Option<Vec<KvEvent>> {
        if self.overflowed {
            return None;
        }
        let mut all: Vec<&Kept> = self.kept.values().collect();
        all.sort_unstable_by_key(|kept| kept.order);
        let (mut told, mut events) = (HashSet::with_capacity(all.len()), Vec::new());
        let mut way = Vec::new();
        for kept in all {
            // Parents that were stored again later.
            let mut next = Some(kept);
            while let Some(kept) = next.filter(|kept| told.insert(kept.block.block_hash)) {
                way.push(kept);
                next = kept.parent_hash.and_then(|parent| self.kept.get(&parent));
            }
            for kept in way.drain(..).rev() {
                tell(kept, worker, &mut events);
            }
        }
        Some(events)
    }
}

/// Adds a block to the last event, if it comes behind its last block, or to a new one.
fn tell(kept: &Kept, worker: KvWorker, events: &mut Vec<KvEvent>) {
    if let Some(KvChange::Stored { blocks, .. }) =
        events.last_mut().map(|event| &mut event.event.data)
        && let Some(last) = blocks.last()
        && kept.parent_hash == Some(last.block_hash)
    {
        return blocks.push(kept.block.clone());
    }
    let change = KvChange::Stored {
        parent_hash: kept.parent_hash,
        start_position: None,
        blocks: vec![kept.block.clone()],
    };
    events.push(KvEvent::new(worker, events.len() as u64, change));
}

#[cfg(test)]
mod tests {
    use corelane_engine::kv::{Index, RankId, Stored};
    use proptest::prelude::*;

    use super::*;

    const WORKER: KvWorker = KvWorker {
        worker_id: 7,
        dp_rank: 0,
    };

    fn index_of(changes: &[KvChange]) -> Index {
        let rank = RankId {
            worker_id: 7,
            dp_rank: 0,
        };
        let mut index = Index::new(1000, 64);
        for change in changes {
            match change {
                KvChange::Stored {
                    parent_hash,
                    blocks,
                    ..
                } => {
                    let stored = |block: &KvBlock| Stored {
                        block: block.block_hash,
                        tokens: block.tokens_hash,
                    };
                    let blocks: Vec<Stored> = blocks.iter().map(stored).collect();
                    index.stored(rank, *parent_hash, &blocks);
                }
                KvChange::Removed { block_hashes } => index.removed(rank, block_hashes),
                KvChange::Cleared => index.cleared(rank),
            }
        }
        index
    }

    /// Names follow from the path, as an engine's do, so that a name is always the same block.
    fn chain(path: &[u64], from: usize) -> KvChange {
        let name = |path: &[u64]| path.iter().fold(1, |name, step| name * 4 + step);
        let block = |end: usize| KvBlock {
            block_hash: name(&path[..end]),
            tokens_hash: path[end - 1],
            mm_extra_info: None,
        };
        KvChange::Stored {
            parent_hash: (from > 0).then(|| name(&path[..from])),
            start_position: None,
            blocks: (from + 1..=path.len()).map(block).collect(),
        }
    }

    fn changes() -> impl Strategy<Value = Vec<KvChange>> {
        let path = || prop::collection::vec(0_u64..3, 1..5);
        let stored = (path(), 0_usize..4).prop_map(|(path, from)| {
            let from = from.min(path.len() - 1);
            chain(&path, from)
        });
        let removed = path().prop_map(|path| {
            let KvChange::Stored { blocks, .. } = chain(&path, path.len() - 1) else {
                unreachable!("a chain is stored");
            };
            let block_hashes = blocks.iter().map(|block| block.block_hash).collect();
            KvChange::Removed { block_hashes }
        });
        let cleared = Just(KvChange::Cleared);
        let change = prop_oneof![12 => stored, 4 => removed, 1 => cleared];
        prop::collection::vec(change, 0..40)
    }

    proptest! {
        /// Whoever has heard all changes knows nothing that whoever asks later is not told.
        #[test]
        fn a_dump_tells_what_the_changes_told(
            changes in changes(),
            prompts in prop::collection::vec(prop::collection::vec(0_u64..3, 1..5), 1..8),
        ) {
            let mut ledger = Ledger::new(1000);
            for (number, change) in changes.iter().enumerate() {
                prop_assert_eq!(ledger.note(change), number as u64 + 1);
            }
            let dump = ledger.dump(WORKER).unwrap();
            let dump: Vec<KvChange> = dump.into_iter().map(|event| event.event.data).collect();
            let (mut heard, mut told) = (index_of(&changes), index_of(&dump));
            for prompt in prompts {
                let heard = heard.overlaps(&prompt).first().map_or(0, |one| one.blocks);
                let told = told.overlaps(&prompt).first().map_or(0, |one| one.blocks);
                prop_assert!(heard <= told, "{:?}: {} and {}", &prompt, heard, told);
            }
        }
    }

    #[test]
    fn runs_are_one_event_and_parents_come_first() {
        let mut ledger = Ledger::new(10);
        ledger.note(&chain(&[1, 2, 3], 0));
        ledger.note(&chain(&[2], 0));
        // Stored again, behind its children.
        ledger.note(&chain(&[1], 0));
        let dump = ledger.dump(WORKER).unwrap();
        let lengths = dump.iter().map(|event| match &event.event.data {
            KvChange::Stored { blocks, .. } => blocks.len(),
            _ => 0,
        });
        assert_eq!(lengths.collect::<Vec<_>>(), [3, 1]);
        assert_eq!((dump[1].event.event_id, ledger.last_event_id()), (1, 3));
        ledger.note(&KvChange::Cleared);
        assert_eq!(ledger.dump(WORKER), Some(vec![]));
    }

    #[test]
    fn too_much_is_told_so_until_it_is_cleared() {
        let mut ledger = Ledger::new(3);
        ledger.note(&chain(&[1, 2], 0));
        ledger.note(&chain(&[1, 2], 0));
        assert_eq!(ledger.dump(WORKER).unwrap().len(), 1);
        ledger.note(&chain(&[2, 2], 0));
        ledger.note(&chain(&[0], 0));
        assert_eq!(ledger.dump(WORKER), None);
        ledger.note(&KvChange::Cleared);
        ledger.note(&chain(&[0], 0));
        assert_eq!(ledger.dump(WORKER).unwrap().len(), 1);
    }
}
