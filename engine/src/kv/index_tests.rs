//! The index beside a naive one that walks real paths.

use std::collections::{BTreeMap, HashMap, HashSet};

use proptest::prelude::*;

use super::*;

const fn rank(worker_id: u64) -> RankId {
    RankId {
        worker_id,
        dp_rank: 0,
    }
}

fn chain(blocks: &[(u64, u64)]) -> Vec<Stored> {
    let stored = |(block, tokens): &(u64, u64)| Stored {
        block: *block,
        tokens: *tokens,
    };
    blocks.iter().map(stored).collect()
}

fn overlaps(index: &mut Index, prompt: &[u64]) -> BTreeMap<u64, u32> {
    let found = index.overlaps(prompt).iter();
    found.map(|one| (one.rank.worker_id, one.blocks)).collect()
}

#[test]
fn a_prompt_is_followed_as_far_as_each_has_it() {
    let mut index = Index::new(100, 64);
    index.stored(rank(1), None, &chain(&[(11, 1), (12, 2), (13, 3)]));
    index.stored(rank(2), None, &chain(&[(21, 1)]));
    index.stored(rank(2), Some(21), &chain(&[(22, 2)]));
    index.stored(rank(3), None, &chain(&[(31, 9)]));
    assert_eq!(
        overlaps(&mut index, &[1, 2, 3, 4]),
        BTreeMap::from([(1, 3), (2, 2)])
    );
    assert_eq!(overlaps(&mut index, &[1]), BTreeMap::from([(1, 1), (2, 1)]));
    assert_eq!(overlaps(&mut index, &[9]), BTreeMap::from([(3, 1)]));
    assert_eq!(overlaps(&mut index, &[2, 1]), BTreeMap::new());
    assert_eq!(overlaps(&mut index, &[]), BTreeMap::new());
    assert_eq!((index.blocks(), index.nodes(), index.ranks()), (6, 4, 3));
    // What lies behind a hole does not count.
    index.removed(rank(1), &[12, 99]);
    assert_eq!(
        overlaps(&mut index, &[1, 2, 3]),
        BTreeMap::from([(1, 1), (2, 2)])
    );
    index.cleared(rank(2));
    assert_eq!(overlaps(&mut index, &[1, 2]), BTreeMap::from([(1, 1)]));
    let counts = index.counts();
    assert_eq!((counts.stored, counts.removed, counts.unknown), (6, 1, 1));
    assert_eq!(counts.cleared, 1);
}

#[test]
fn behind_an_unknown_block_nothing_is_stored() {
    let mut index = Index::new(100, 64);
    index.stored(rank(1), Some(5), &chain(&[(6, 6), (7, 7)]));
    // Another rank's block is no parent.
    index.stored(rank(2), None, &chain(&[(5, 5)]));
    index.stored(rank(1), Some(5), &chain(&[(6, 6)]));
    assert_eq!(index.counts().orphans, 3);
    assert_eq!(index.blocks(), 1);
}

#[test]
fn a_rank_that_is_cleared_counts_at_once_and_goes_bit_by_bit() {
    let mut index = Index::new(100_000, 64);
    let blocks: Vec<Stored> = (1..=5_000)
        .map(|n| Stored {
            block: n,
            tokens: n,
        })
        .collect();
    let prompt: Vec<u64> = (1..=5_000).collect();
    index.stored(rank(1), None, &blocks);
    assert_eq!(overlaps(&mut index, &prompt), BTreeMap::from([(1, 5_000)]));
    index.cleared(rank(1));
    assert_eq!(overlaps(&mut index, &prompt), BTreeMap::new());
    assert_eq!(index.blocks(), 5_000 - SWEEP);
    index.stored(rank(1), None, &blocks[..3]);
    assert_eq!(overlaps(&mut index, &prompt), BTreeMap::from([(1, 3)]));
    while index.sweep(100) {}
    assert_eq!((index.blocks(), index.nodes(), index.ranks()), (3, 3, 1));
}

#[test]
fn ranks_are_bounded_and_numbers_are_used_again() {
    let mut index = Index::new(1000, 64);
    for worker in 0..64 {
        index.stored(rank(worker), None, &chain(&[(1, 1)]));
    }
    index.stored(rank(64), None, &chain(&[(1, 1), (2, 2)]));
    assert_eq!((index.ranks(), index.counts().rankless), (64, 2));
    index.forget_worker(7);
    index.stored(rank(64), None, &chain(&[(1, 1)]));
    let found = overlaps(&mut index, &[1]);
    assert!(found.len() == 64 && found.contains_key(&64) && !found.contains_key(&7));
}

#[test]
fn the_oldest_leaf_of_the_largest_makes_room() {
    let mut index = Index::new(6, 64);
    index.stored(rank(1), None, &chain(&[(1, 1), (2, 2), (3, 3), (4, 4)]));
    index.stored(rank(2), None, &chain(&[(1, 1), (2, 2)]));
    index.stored(rank(2), Some(2), &chain(&[(3, 3)]));
    // It was rank 1 that held most, and its first blocks have others behind them.
    let held = overlaps(&mut index, &[1, 2, 3, 4]);
    assert_eq!(held, BTreeMap::from([(1, 3), (2, 3)]));
    assert_eq!((index.blocks(), index.counts().evicted), (6, 1));
}

#[test]
fn the_same_block_again_and_a_name_used_again() {
    let mut index = Index::new(10, 64);
    index.stored(rank(1), None, &chain(&[(1, 1), (2, 2)]));
    index.stored(rank(1), None, &chain(&[(1, 1), (2, 2)]));
    assert_eq!(index.blocks(), 2);
    index.stored(rank(1), None, &chain(&[(2, 7)]));
    assert_eq!(overlaps(&mut index, &[1, 2]), BTreeMap::from([(1, 1)]));
    assert_eq!(overlaps(&mut index, &[7]), BTreeMap::from([(1, 1)]));
}

/// The naive one: for each rank, the engine's names of the paths that it holds.
#[derive(Default)]
struct Naive {
    ranks: HashMap<RankId, HashMap<u64, Vec<u64>>>,
    holds: HashSet<(RankId, Vec<u64>)>,
}

impl Naive {
    fn stored(&mut self, id: RankId, parent: Option<u64>, blocks: &[Stored]) {
        let names = self.ranks.entry(id).or_default();
        let mut path = match parent {
            None => vec![],
            Some(parent) => match names.get(&parent) {
                Some(path) => path.clone(),
                None => return,
            },
        };
        for block in blocks {
            path.push(block.tokens);
            if let Some(before) = names.insert(block.block, path.clone())
                && before != path
            {
                self.holds.remove(&(id, before));
            }
            self.holds.insert((id, path.clone()));
        }
    }

    fn removed(&mut self, id: RankId, blocks: &[u64]) {
        for block in blocks {
            let names = self.ranks.entry(id).or_default();
            if let Some(path) = names.remove(block) {
                self.holds.remove(&(id, path));
            }
        }
    }

    fn cleared(&mut self, id: RankId) {
        self.ranks.remove(&id);
        self.holds.retain(|(rank, _)| *rank != id);
    }

    fn overlap(&self, id: RankId, prompt: &[u64]) -> u32 {
        let held = |depth: &usize| self.holds.contains(&(id, prompt[..*depth].to_vec()));
        (1..=prompt.len()).take_while(held).count() as u32
    }
}

#[derive(Clone, Debug)]
enum Step {
    Stored(u64, u32, Option<u64>, Vec<(u64, u64)>),
    Removed(u64, u32, Vec<u64>),
    Cleared(u64, u32),
    Gone(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let (worker, dp_rank, name) = (0_u64..4, 0_u32..2, 0_u64..12);
    let parent = prop::option::weighted(0.6, name.clone());
    let blocks = prop::collection::vec((name.clone(), 0_u64..3), 0..5);
    let stored = (worker.clone(), dp_rank.clone(), parent, blocks);
    let names = prop::collection::vec(name, 0..4);
    let removed = (worker.clone(), dp_rank.clone(), names);
    let step = prop_oneof![
        8 => stored.prop_map(|(worker, rank, parent, blocks)| {
            Step::Stored(worker, rank, parent, blocks)
        }),
        3 => removed.prop_map(|(worker, rank, names)| Step::Removed(worker, rank, names)),
        1 => (worker.clone(), dp_rank).prop_map(|(worker, rank)| Step::Cleared(worker, rank)),
        1 => worker.prop_map(Step::Gone),
    ];
    prop::collection::vec(step, 0..60)
}

fn all_ranks() -> impl Iterator<Item = RankId> {
    (0..4).flat_map(|worker_id| (0..2).map(move |dp_rank| RankId { worker_id, dp_rank }))
}

proptest! {
    #[test]
    fn finds_what_the_naive_one_finds(
        steps in steps(),
        prompts in prop::collection::vec(prop::collection::vec(0_u64..3, 0..7), 1..6),
    ) {
        let (mut index, mut naive) = (Index::new(10_000, 64), Naive::default());
        for step in steps {
            match step {
                Step::Stored(worker_id, dp_rank, parent, blocks) => {
                    let id = RankId { worker_id, dp_rank };
                    index.stored(id, parent, &chain(&blocks));
                    naive.stored(id, parent, &chain(&blocks));
                }
                Step::Removed(worker_id, dp_rank, names) => {
                    let id = RankId { worker_id, dp_rank };
                    index.removed(id, &names);
                    naive.removed(id, &names);
                }
                Step::Cleared(worker_id, dp_rank) => {
                    let id = RankId { worker_id, dp_rank };
                    index.cleared(id);
                    naive.cleared(id);
                }
                Step::Gone(worker_id) => {
                    index.forget_worker(worker_id);
                    (0..2).for_each(|dp_rank| naive.cleared(RankId { worker_id, dp_rank }));
                }
            }
            for prompt in &prompts {
                let found: HashMap<RankId, u32> =
                    index.overlaps(prompt).iter().map(|one| (one.rank, one.blocks)).collect();
                for id in all_ranks() {
                    let found = found.get(&id).copied().unwrap_or(0);
                    prop_assert_eq!(found, naive.overlap(id, prompt), "{:?} {:?}", id, prompt);
                }
            }
        }
        while index.sweep(100) {}
        let names: usize = naive.ranks.values().map(HashMap::len).sum();
        prop_assert_eq!(index.blocks(), names);
    }

    /// Whatever comes, bounds hold and nothing is claimed that was not stored.
    #[test]
    fn bounds_hold(steps in steps(), max in 1_usize..12) {
        let (mut index, mut naive) = (Index::new(max, 64), Naive::default());
        for step in steps {
            if let Step::Stored(worker_id, dp_rank, parent, blocks) = step {
                let id = RankId { worker_id, dp_rank };
                index.stored(id, parent, &chain(&blocks));
                naive.stored(id, parent, &chain(&blocks));
            }
            prop_assert!(index.blocks() <= max && index.nodes() <= max);
        }
        let all: usize = all_ranks().map(|id| index.blocks_of(id)).sum();
        prop_assert_eq!(index.blocks(), all);
    }
}
