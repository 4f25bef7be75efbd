//! Requests go where their prompt is in the KV cache: what each core knows of its instances'
//! caches, and the choice by that and by load.
//!
//! ```text
//! control --batches of events--> index (one for each feed)         each core has its own
//! request --headers, body------> prompt: hashes of its blocks
//!                                  '--> overlap of each candidate --> cost --> the cheapest
//! ```
//!
//! A batch is decoded once and shared by all cores; an index belongs to one. Looking a prompt up
//! allocates nothing and takes no lock.

use std::ops::Range;
use std::sync::Arc;

use crate::directory::{Directory, KvRule, LoadSource};
use crate::forward::{self, View};
use crate::load::Work;
use crate::ring::Ring;
use crate::route::Chooser;
use crate::shard::Shard;
use crate::table::NONE;

mod held;
mod index;
mod nodes;
mod prompt;
mod reading;

pub use index::{Counts, Index, Overlap, RANKS_MAX, RankId, Stored};
pub use nodes::mix;
pub use prompt::{BLOCK_TOKENS_MAX, PROMPT_BLOCKS_MAX, Prompt, Source};
pub(crate) use reading::{read_body, read_headers};

/// Changes of caches, in order, for one feed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Number of the feed.
    pub feed: u32,
    /// What happened.
    pub changes: Vec<Change>,
    /// The blocks that [`Change::Stored`] means.
    pub stored: Vec<Stored>,
    /// The engine's hashes that [`Change::Removed`] means.
    pub removed: Vec<u64>,
}

/// One change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Blocks came, each behind the one before.
    Stored {
        /// To whom.
        rank: RankId,
        /// Behind which block, by the engine's own hash; none at the begin of a sequence.
        parent: Option<u64>,
        /// Which of [`Batch::stored`].
        blocks: Range<usize>,
    },
    /// Blocks went.
    Removed {
        /// From whom.
        rank: RankId,
        /// Which of [`Batch::removed`].
        blocks: Range<usize>,
    },
    /// All blocks of a rank went, or events about it were lost.
    Cleared(RankId),
    /// A worker is gone.
    Gone(u64),
}

/// Instances have said how busy they are.
#[derive(Debug, PartialEq)]
pub struct Reports {
    /// Number of the feed.
    pub feed: u32,
    /// Which rules they are for.
    pub source: LoadSource,
    /// Instance ids, and the work of each, all its ranks added up.
    pub instances: Vec<(u64, Work)>,
}

/// What a core knows of caches.
pub(crate) struct Kv {
    /// By the number of the feed.
    indexes: Vec<Option<Index>>,
    prompt: Prompt,
    /// Whose prompt it is; [`NONE`] once its request is placed, and when one is tried again.
    request: u32,
    /// Those of a request that is tried again.
    headers: Vec<u8>,
    /// Overlap of each instance of a route, by its place.
    pub(crate) overlaps: Vec<u32>,
}

impl Kv {
    pub(crate) fn new() -> Kv {
        Kv {
            indexes: Vec::new(),
            prompt: Prompt::new(),
            request: NONE,
            headers: Vec::new(),
            overlaps: Vec::new(),
        }
    }

    /// Makes what the routes of a directory need.
    pub(crate) fn prepare(&mut self, directory: &Directory) {
        for route in &directory.routes {
            let Some(rule) = &route.kv else {
                continue;
            };
            let feed = rule.feed as usize;
            if self.indexes.len() <= feed {
                self.indexes.resize_with(feed + 1, || None);
            }
            self.indexes[feed].get_or_insert_with(|| {
                Index::new(rule.blocks_max as usize, rule.ranks_max as usize)
            });
            self.prompt.reserve();
            self.headers.reserve(usize::from(u16::MAX));
            let places = route.instances.len();
            self.overlaps
                .reserve(places.saturating_sub(self.overlaps.len()));
        }
    }

    /// Finds what each instance has of a prompt.
    pub(crate) fn measure(&mut self, rule: KvRule, ids: &[u64], prompt: Option<&[u64]>) {
        self.overlaps.clear();
        self.overlaps.resize(ids.len(), 0);
        let index = self.indexes.get_mut(rule.feed as usize);
        let Some(index) = index.and_then(Option::as_mut) else {
            return;
        };
        let prompt = prompt.unwrap_or(self.prompt.hashes());
        for overlap in index.overlaps(prompt) {
            if let Ok(place) = ids.binary_search(&overlap.rank.worker_id) {
                let best = &mut self.overlaps[place];
                *best = overlap.blocks.max(*best);
            }
        }
    }
}

/// What a request costs at each place.
pub(crate) struct Costs<'a> {
    pub(crate) view: &'a View<'a>,
    pub(crate) overlaps: &'a [u32],
    pub(crate) rule: KvRule,
    pub(crate) prompt_blocks: u32,
}

impl Costs<'_> {
    pub(crate) fn overlap(&self, place: usize) -> u32 {
        self.overlaps.get(place).copied().unwrap_or(0)
    }

    pub(crate) fn at(&self, place: usize) -> f64 {
        let busy = self.view.busy(place);
        cost(&self.rule, self.prompt_blocks, self.overlap(place), busy)
    }
}

/// The cost of a request; see [`KvRule`].
pub fn cost(rule: &KvRule, prompt_blocks: u32, overlap_blocks: u32, busy: Work) -> f64 {
    let percent = |percent: u32| f64::from(percent) / 100.0;
    let prompt = f64::from(prompt_blocks);
    let credit = percent(rule.overlap_credit_pct) * f64::from(overlap_blocks);
    let prefill = (busy.prefill_blocks + prompt - credit).max(0.0);
    percent(rule.prefill_scale_pct) * prefill + busy.decode_blocks + prompt
}

/// The prompt of a request that has been placed is of no use to others.
pub(crate) fn placed<R: Ring>(shard: &mut Shard<R>) {
    shard.kv.request = NONE;
}

/// The place of the cheapest instance.
pub(crate) fn choose<R: Ring>(shard: &mut Shard<R>, request: u32, rule: KvRule) -> Option<usize> {
    let route = shard.requests[request].route as usize;
    let again = shard.kv.request != request;
    if again {
        reading::read_again(shard, request, rule);
    }
    let prompt_blocks = shard.kv.prompt.hashes().len() as u32;
    shard.kv.measure(rule, &shard.routes[route].ids, None);
    let mut chooser = shard.routes[route].chooser.clone();
    let view = forward::view(shard, request);
    let costs = Costs {
        view: &view,
        overlaps: &shard.kv.overlaps,
        rule,
        prompt_blocks,
    };
    let place = draw(&mut chooser, &costs);
    let overlap = place.map_or(0, |place| costs.overlap(place));
    shard.routes[route].chooser = chooser;
    if prompt_blocks > 0 {
        match again {
            true => shard.stats.shard.kv_lookups_again.add(1),
            false => count(shard, prompt_blocks, overlap),
        }
        shard.requests[request].work = Work::request(prompt_blocks, overlap);
    }
    place
}

fn count<R: Ring>(shard: &Shard<R>, prompt_blocks: u32, overlap: u32) {
    let stats = &shard.stats.shard;
    stats.kv_lookups.add(1);
    stats.kv_hits.add(u64::from(overlap > 0));
    stats.kv_prompt_blocks.add(u64::from(prompt_blocks));
    stats.kv_overlap_blocks.add(u64::from(overlap));
}

/// The place of the cheapest, or one that is cheap.
pub(crate) fn draw(chooser: &mut Chooser, costs: &Costs<'_>) -> Option<usize> {
    let temperature = f64::from(costs.rule.temperature_pct) / 100.0;
    match costs.rule.temperature_pct {
        0 => chooser.least(costs.view, |place| costs.at(place)),
        _ => chooser.soft_least(costs.view, temperature, |place| costs.at(place)),
    }
}

/// Takes changes over.
pub(crate) fn apply<R: Ring>(shard: &mut Shard<R>, batch: &Batch) {
    let index = shard.kv.indexes.get_mut(batch.feed as usize);
    if let Some(index) = index.and_then(Option::as_mut) {
        for change in &batch.changes {
            match change {
                Change::Stored {
                    rank,
                    parent,
                    blocks,
                } => {
                    let blocks = batch.stored.get(blocks.clone()).unwrap_or_default();
                    index.stored(*rank, *parent, blocks);
                }
                Change::Removed { rank, blocks } => {
                    let blocks = batch.removed.get(blocks.clone()).unwrap_or_default();
                    index.removed(*rank, blocks);
                }
                Change::Cleared(rank) => index.cleared(*rank),
                Change::Gone(worker_id) => index.forget_worker(*worker_id),
            }
        }
    }
    shard.stats.shard.kv_batches.add(1);
    show(shard);
}

fn show<R: Ring>(shard: &Shard<R>) {
    let stats = &shard.stats.shard;
    let indexes = || shard.kv.indexes.iter().flatten();
    let gauge = |number: fn(&Index) -> usize| indexes().map(|index| number(index) as u64).sum();
    stats.kv_blocks.set(gauge(Index::blocks));
    stats.kv_nodes.set(gauge(Index::nodes));
    stats.kv_ranks.set(gauge(Index::ranks));
    let count =
        |number: fn(Counts) -> u64| indexes().map(|index| number(index.counts())).sum::<u64>();
    stats.kv_stored.set(count(|counts| counts.stored));
    stats.kv_removed.set(count(|counts| counts.removed));
    stats.kv_removed_unknown.set(count(|counts| counts.unknown));
    stats.kv_orphans.set(count(|counts| counts.orphans));
    stats.kv_evicted.set(count(|counts| counts.evicted));
    stats.kv_rankless.set(count(|counts| counts.rankless));
    stats.kv_cleared.set(count(|counts| counts.cleared));
}

/// Takes reports of load over.
pub(crate) fn hear<R: Ring>(shard: &mut Shard<R>, reports: &Reports) {
    let directory = Arc::clone(&shard.directory);
    for (index, route) in directory.routes.iter().enumerate() {
        let rule = route.load;
        if (rule.feed, rule.source) != (reports.feed, reports.source) {
            continue;
        }
        let Some(state) = shard.routes.get(index) else {
            continue;
        };
        for (id, work) in &reports.instances {
            if let Ok(place) = state.ids.binary_search(id) {
                let slot = state.instances[place];
                shard.instances[slot].work.reported(shard.now_ns, *work);
                shard.stats.shard.load_reports.add(1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULE: KvRule = KvRule {
        feed: 0,
        block_tokens: 4,
        body_bytes_max: 0,
        blocks_max: 100,
        ranks_max: 64,
        overlap_credit_pct: 100,
        prefill_scale_pct: 100,
        temperature_pct: 0,
    };

    /// What a stock KV router has logged for a prompt of 4 blocks (dumps: 8 and, with all of it in
    /// the cache, 4).
    #[test]
    fn costs_are_dynamos() {
        let idle = Work::default();
        assert_eq!(cost(&RULE, 4, 0, idle), 8.0);
        assert_eq!(cost(&RULE, 4, 4, idle), 4.0);
        let busy = Work {
            requests: 2.0,
            prefill_blocks: 3.0,
            decode_blocks: 10.0,
        };
        assert_eq!(cost(&RULE, 4, 1, busy), 6.0 + 14.0);
        let rule = KvRule {
            overlap_credit_pct: 200,
            prefill_scale_pct: 50,
            ..RULE
        };
        assert_eq!(cost(&rule, 4, 1, busy), 2.5 + 14.0);
        // Credit makes nothing cheaper than free.
        assert_eq!(cost(&rule, 4, 4, idle), 4.0);
    }
}
