//! KV events become batches of changes for the indexes of the cores.
//!
//! Events of one rank are numbered. Whoever misses some of them does not know any more what is in
//! that cache, so what was known of it is forgotten: a block that is thought to be there and is not
//! costs more than one that is there and not known.

use std::collections::HashMap;
use std::ops::Range;

use corelane_codec::event::{Blocks, EventError, Hashes, KvChange, KvEvent, KvEvents};
use corelane_engine::kv::{Batch, Change, RankId, Stored};

/// Blocks of one batch, about: a core takes a batch in one go.
const BATCH_BLOCKS: usize = 1024;
/// Ranks whose numbers are remembered; beyond that all are forgotten and begin anew.
const RANKS_MAX: usize = 16_384;

/// What has become of events, since the beginning.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Counts {
    /// Events that were taken over.
    pub taken: u64,
    /// Events about other storage than the memory of the GPU.
    pub other_tiers: u64,
    /// Events that had come before.
    pub repeated: u64,
    /// Events that never came, by their numbers.
    pub lost: u64,
    /// Times that a rank was forgotten because some were lost.
    pub gaps: u64,
    /// Times that a rank was forgotten because another publisher began to tell of it.
    pub restarts: u64,
    /// Payloads that could not be read to their end.
    pub unreadable: u64,
}

/// The last event of a rank.
#[derive(Clone, Copy, Debug)]
struct Last {
    publisher_id: u64,
    event_id: u64,
}

/// The events of one target.
#[derive(Debug)]
pub struct Digest {
    feed: u32,
    last: HashMap<RankId, Last>,
    batches: Vec<Batch>,
    /// What became of them.
    pub counts: Counts,
}

impl Digest {
    /// Nothing has come.
    pub fn new(feed: u32) -> Digest {
        Digest {
            feed,
            last: HashMap::new(),
            batches: Vec::new(),
            counts: Counts::default(),
        }
    }

    /// The batches so far, in order; they are to be handed to all cores.
    pub fn take(&mut self) -> Vec<Batch> {
        std::mem::take(&mut self.batches)
    }

    /// A payload of `kv-events` has come.
    pub fn came(&mut self, publisher_id: u64, payload: &[u8]) {
        if self.read(publisher_id, payload).is_err() {
            self.counts.unreadable += 1;
        }
    }

    fn read(&mut self, publisher_id: u64, payload: &[u8]) -> Result<(), EventError> {
        let mut events = KvEvents::open(payload)?;
        while let Some(event) = events.next_event()? {
            self.event(publisher_id, event)?;
        }
        Ok(())
    }

    /// A worker has left discovery.
    pub fn gone(&mut self, worker_id: u64) {
        self.last.retain(|rank, _| rank.worker_id != worker_id);
        self.batch().changes.push(Change::Gone(worker_id));
    }

    /// Nobody knows what was missed: all ranks are forgotten.
    pub fn begin_anew(&mut self) {
        let ranks: Vec<RankId> = self.last.drain().map(|(rank, _)| rank).collect();
        for rank in ranks {
            self.batch().changes.push(Change::Cleared(rank));
        }
    }

    fn event(&mut self, publisher_id: u64, event: KvEvent<'_>) -> Result<(), EventError> {
        let rank = RankId {
            worker_id: event.worker_id,
            dp_rank: event.dp_rank,
        };
        if !self.is_next(rank, publisher_id, event.event_id) {
            return Ok(());
        }
        let is_device = matches!(event.storage_tier, "" | "device");
        if !is_device || !matches!(event.residency_domain, "" | "worker") {
            self.counts.other_tiers += 1;
            return Ok(());
        }
        self.counts.taken += 1;
        match event.change {
            KvChange::Stored {
                parent_hash,
                blocks,
                ..
            } => self.stored(rank, parent_hash, blocks),
            KvChange::Removed(hashes) => self.removed(rank, hashes),
            KvChange::Cleared => {
                self.batch().changes.push(Change::Cleared(rank));
                Ok(())
            }
        }
    }

    /// Whether an event is to be taken over; forgets its rank when some before it are missing.
    fn is_next(&mut self, rank: RankId, publisher_id: u64, event_id: u64) -> bool {
        if self.last.len() >= RANKS_MAX && !self.last.contains_key(&rank) {
            self.begin_anew();
        }
        let now = Last {
            publisher_id,
            event_id,
        };
        let Some(before) = self.last.insert(rank, now) else {
            return true;
        };
        if before.publisher_id != publisher_id {
            self.counts.restarts += 1;
            self.batch().changes.push(Change::Cleared(rank));
            return true;
        }
        if event_id <= before.event_id {
            self.last.insert(rank, before);
            self.counts.repeated += 1;
            return false;
        }
        let missing = event_id - before.event_id - 1;
        if missing > 0 {
            self.counts.lost += missing;
            self.counts.gaps += 1;
            self.batch().changes.push(Change::Cleared(rank));
        }
        true
    }

    fn stored(
        &mut self,
        rank: RankId,
        mut parent: Option<u64>,
        mut blocks: Blocks<'_>,
    ) -> Result<(), EventError> {
        loop {
            let batch = self.batch();
            let begin = batch.stored.len();
            let read = fill(&mut batch.stored, || {
                let block = blocks.next_block()?;
                Ok(block.map(|block| Stored {
                    block: block.block_hash,
                    tokens: block.tokens_hash,
                }))
            });
            let range = begin..batch.stored.len();
            let last = batch.stored.last().map(|last| last.block);
            if !range.is_empty() {
                let blocks = range;
                batch.changes.push(Change::Stored {
                    rank,
                    parent,
                    blocks,
                });
            }
            if !read? {
                return Ok(());
            }
            parent = last;
        }
    }

    fn removed(&mut self, rank: RankId, mut hashes: Hashes<'_>) -> Result<(), EventError> {
        loop {
            let batch = self.batch();
            let begin = batch.removed.len();
            let read = fill(&mut batch.removed, || hashes.next_hash());
            let blocks: Range<usize> = begin..batch.removed.len();
            if !blocks.is_empty() {
                batch.changes.push(Change::Removed { rank, blocks });
            }
            if !read? {
                return Ok(());
            }
        }
    }

    /// The batch that the next change goes to.
    fn batch(&mut self) -> &mut Batch {
        let is_full = self.batches.last().is_none_or(|batch| {
            let blocks = batch.stored.len() + batch.removed.len();
            blocks + batch.changes.len() >= BATCH_BLOCKS
        });
        if is_full {
            self.batches.push(Batch {
                feed: self.feed,
                ..Batch::default()
            });
        }
        let last = self.batches.len() - 1;
        &mut self.batches[last]
    }
}

/// Takes values until there is no more or a batch is full; answers whether there may be more.
fn fill<T>(
    into: &mut Vec<T>,
    mut next: impl FnMut() -> Result<Option<T>, EventError>,
) -> Result<bool, EventError> {
    while into.len() < BATCH_BLOCKS {
        match next()? {
            Some(value) => into.push(value),
            None => return Ok(false),
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use corelane_codec::event::KvWorker;
    use corelane_codec::event::typed::{self, KvBlock};
    use corelane_engine::kv::Index;

    use super::*;

    const RANK: RankId = RankId {
        worker_id: 7,
        dp_rank: 1,
    };

    fn stored(event_id: u64, parent_hash: Option<u64>, blocks: Range<u64>) -> typed::KvEvent {
        let worker = KvWorker {
            worker_id: RANK.worker_id,
            dp_rank: RANK.dp_rank,
        };
        let block = |n: u64| KvBlock {
            block_hash: 1000 + n,
            tokens_hash: n,
            mm_extra_info: None,
        };
        let change = typed::KvChange::Stored {
            parent_hash,
            start_position: None,
            blocks: blocks.map(block).collect(),
        };
        typed::KvEvent::new(worker, event_id, change)
    }

    fn changed(event_id: u64, data: typed::KvChange) -> typed::KvEvent {
        let mut event = stored(event_id, None, 0..0);
        event.event.data = data;
        event
    }

    fn came(digest: &mut Digest, publisher_id: u64, events: &[typed::KvEvent]) {
        digest.came(publisher_id, &typed::to_payload(&events).unwrap());
    }

    /// What an index makes of the batches so far.
    fn overlap(digest: &mut Digest, index: &mut Index, prompt: &[u64]) -> u32 {
        for batch in digest.take() {
            for change in batch.changes {
                match change {
                    Change::Stored {
                        rank,
                        parent,
                        blocks,
                    } => index.stored(rank, parent, &batch.stored[blocks]),
                    Change::Removed { rank, blocks } => index.removed(rank, &batch.removed[blocks]),
                    Change::Cleared(rank) => index.cleared(rank),
                    Change::Gone(worker_id) => index.forget_worker(worker_id),
                }
            }
        }
        index.overlaps(prompt).first().map_or(0, |one| one.blocks)
    }

    #[test]
    fn long_events_are_cut_and_nothing_is_lost() {
        let (mut digest, mut index) = (Digest::new(3), Index::new(10_000, 64));
        let prompt: Vec<u64> = (0..5000).collect();
        came(
            &mut digest,
            1,
            &[stored(0, None, 0..2500), stored(1, Some(3499), 2500..5000)],
        );
        let largest = digest.batches.iter().map(|batch| batch.stored.len()).max();
        assert_eq!((digest.batches.len(), largest), (5, Some(BATCH_BLOCKS)));
        assert!(digest.batches.iter().all(|batch| batch.feed == 3));
        assert_eq!(overlap(&mut digest, &mut index, &prompt), 5000);
        let block_hashes = (1100..6000).rev().collect();
        came(
            &mut digest,
            1,
            &[changed(2, typed::KvChange::Removed { block_hashes })],
        );
        assert_eq!(overlap(&mut digest, &mut index, &prompt), 100);
        assert_eq!((digest.counts.taken, digest.counts.lost), (3, 0));
    }

    #[test]
    fn a_gap_a_restart_and_a_clear_forget_the_rank() {
        let prompt = [0, 1, 2, 3];
        for (event, publisher, left) in [
            (stored(11, Some(1001), 2..3), 1, 3),
            (stored(12, Some(1001), 2..3), 1, 0),
            (stored(12, None, 0..1), 1, 1),
            (stored(11, None, 0..2), 2, 2),
            (stored(3, None, 0..3), 2, 3),
            (changed(11, typed::KvChange::Cleared), 1, 0),
            // One that has come before changes nothing.
            (changed(10, typed::KvChange::Cleared), 1, 2),
        ] {
            let (mut digest, mut index) = (Digest::new(0), Index::new(100, 64));
            came(&mut digest, 1, &[stored(10, None, 0..2)]);
            came(&mut digest, publisher, std::slice::from_ref(&event));
            let found = overlap(&mut digest, &mut index, &prompt);
            assert_eq!(found, left, "{event:?} {:?}", digest.counts);
        }
    }

    #[test]
    fn counts_tell_what_became_of_events() {
        let mut digest = Digest::new(0);
        came(&mut digest, 1, &[stored(1, None, 0..1)]);
        came(
            &mut digest,
            1,
            &[stored(4, None, 0..1), stored(4, None, 0..1)],
        );
        let mut host = stored(5, None, 0..1);
        host.storage_tier = "host_pinned".into();
        came(&mut digest, 1, &[host, stored(6, None, 0..1)]);
        came(&mut digest, 2, &[stored(1, None, 0..1)]);
        digest.came(1, b"\x91\x80");
        digest.came(1, b"x");
        let want = Counts {
            taken: 4,
            other_tiers: 1,
            repeated: 1,
            lost: 2,
            gaps: 1,
            restarts: 1,
            unreadable: 2,
        };
        assert_eq!(digest.counts, want);
    }

    #[test]
    fn who_is_gone_begins_anew() {
        let (mut digest, mut index) = (Digest::new(0), Index::new(100, 64));
        came(&mut digest, 1, &[stored(1, None, 0..2)]);
        digest.gone(RANK.worker_id);
        assert_eq!(overlap(&mut digest, &mut index, &[0, 1]), 0);
        came(&mut digest, 1, &[stored(9, None, 0..2)]);
        assert_eq!(overlap(&mut digest, &mut index, &[0, 1]), 2);
        digest.begin_anew();
        assert_eq!(overlap(&mut digest, &mut index, &[0, 1]), 0);
        assert_eq!(digest.counts.gaps, 0);
    }
}
