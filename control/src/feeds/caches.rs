//! KV events become batches of changes for the indexes of the cores.
//!
//! Events of one rank are numbered. Whoever misses some of them does not know any more what is in
//! that cache. Where its publisher can be asked, he is, and further events wait for the answer;
//! else what was known is forgotten: a block that is thought to be there and is not costs more than
//! one that is there and not known.

use std::collections::HashMap;
use std::ops::Range;

use corelane_codec::event::{Blocks, EventError, Hashes, KvAnswer, KvChange, KvEvent, KvEvents};
use corelane_engine::kv::{Batch, Change, RankId, Stored};

use super::asking::{Ask, Asking, Source, Target, Waiting};

/// Blocks of one batch, about: a core takes a batch in one go.
const BATCH_BLOCKS: usize = 1024;
/// Ranks whose numbers are remembered; beyond that all are forgotten and begin anew.
pub(super) const RANKS_MAX: usize = 16_384;

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
    /// Times that events of a rank were missing.
    pub gaps: u64,
    /// Times that a rank was forgotten because another publisher began to tell of it.
    pub restarts: u64,
    /// Payloads that could not be read to their end.
    pub unreadable: u64,
    /// Events about a rank that is not their publisher's, by discovery.
    pub strangers: u64,
    /// Questions to workers about what is in their caches.
    pub asked: u64,
    /// Of those, answered.
    pub recovered: u64,
    /// Of those, given up: what was known is forgotten, and learned anew.
    pub unanswered: u64,
}

/// How a payload is read.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Reading {
    /// It has just come.
    Live,
    /// It was held until this rank's worker had answered.
    Held(RankId),
    /// It was held in vain, and this rank's worker is not asked for what is missing in it.
    GivenUp(RankId),
}

impl Reading {
    fn only(self) -> Option<RankId> {
        match self {
            Reading::Live => None,
            Reading::Held(rank) | Reading::GivenUp(rank) => Some(rank),
        }
    }
}

/// What is to be done with an event.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Turn {
    Take,
    Skip,
    /// Its rank waits for an answer.
    Hold,
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
    /// By publisher.
    sources: HashMap<u64, Source>,
    asking: Asking,
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
            sources: HashMap::new(),
            asking: Asking::default(),
            batches: Vec::new(),
            counts: Counts::default(),
        }
    }

    /// The batches so far, in order; they are to be handed to all cores.
    pub fn take(&mut self) -> Vec<Batch> {
        std::mem::take(&mut self.batches)
    }

    /// Questions to be asked, each once.
    pub fn asks(&mut self) -> Vec<Ask> {
        self.asking.take()
    }

    /// Ranks that wait for an answer.
    pub fn waiting(&self) -> usize {
        self.asking.len()
    }

    /// Who publishes, by publisher, as discovery says now. Whoever is new is asked, and whoever
    /// tells of another rank now, as a worker does that has lost its lease.
    pub fn publishers(&mut self, now: HashMap<u64, Source>) {
        let before = std::mem::replace(&mut self.sources, now);
        for (publisher_id, source) in &before {
            let is_awaited = self.asking.publisher(source.rank) == Some(*publisher_id);
            let now = self.sources.get(publisher_id);
            if is_awaited && now.is_none_or(|now| now.rank != source.rank) {
                self.give_up(source.rank);
            }
        }
        let new = self
            .sources
            .iter()
            .filter(|(publisher_id, source)| before.get(*publisher_id) != Some(*source));
        let new: Vec<(RankId, u64)> = new.map(|(id, source)| (source.rank, *id)).collect();
        for (rank, publisher_id) in new {
            self.ask(rank, publisher_id, None);
        }
    }

    /// Asks, if there is anybody to be asked.
    fn ask(&mut self, rank: RankId, publisher_id: u64, after: Option<u64>) -> bool {
        let target = |source: &Source| -> Option<Target> { source.target.clone() };
        let Some(target) = self.sources.get(&publisher_id).and_then(target) else {
            return false;
        };
        self.counts.asked += 1;
        self.asking.begin((rank, publisher_id), target, after);
        true
    }

    /// A question has been answered, with an item in MessagePack, or will not be: then the reason
    /// is answered to be told, unless nobody waits for it any more.
    pub fn answered(&mut self, ask: &Ask, answer: Result<Vec<u8>, String>) -> Option<String> {
        let Waiting { ask, held } = self.asking.answered(ask)?;
        let why = match answer {
            Ok(item) => self.learn(&ask, &item).err(),
            Err(why) => Some(why),
        };
        match why {
            None => self.counts.recovered += 1,
            Some(_) => {
                self.counts.unanswered += 1;
                self.forget(ask.rank);
            }
        }
        for payload in held {
            // It could be read when it came.
            let _ = self.read(ask.publisher_id, &payload, Reading::Held(ask.rank));
        }
        why
    }

    /// Takes over what a worker has said of a rank.
    fn learn(&mut self, ask: &Ask, item: &[u8]) -> Result<(), String> {
        let bad = |error: EventError| error.to_string();
        let (rank, publisher_id) = (ask.rank, ask.publisher_id);
        let (mut events, last, after) = match KvAnswer::decode(item).map_err(bad)? {
            KvAnswer::Refused(why) => return Err(why.to_owned()),
            KvAnswer::Dump {
                events,
                last_event_id,
            } => (events, last_event_id, None),
            KvAnswer::Events {
                events,
                last_event_id,
            } => (events, last_event_id, ask.after),
        };
        if after.is_none() {
            self.forget(rank);
        }
        let (mut before, mut any) = (after, false);
        while let Some(event) = events.next_event().map_err(bad)? {
            any = true;
            if rank_of(&event) != rank {
                self.counts.strangers += 1;
                continue;
            }
            if let Some(before) = &mut before {
                // It may begin earlier than it was asked to.
                if event.event_id <= *before {
                    continue;
                }
                if event.event_id != *before + 1 {
                    return Err("events are missing in it".to_owned());
                }
                *before = event.event_id;
            }
            self.take_over(rank, event).map_err(bad)?;
        }
        // A worker that has published nothing yet names no event.
        if any || last > 0 {
            let event_id = before.unwrap_or(last).max(last);
            let last = Last {
                publisher_id,
                event_id,
            };
            self.last.insert(rank, last);
        }
        Ok(())
    }

    /// An answer is not waited for any more.
    fn give_up(&mut self, rank: RankId) {
        if let Some(Waiting { ask, held }) = self.asking.end(rank) {
            self.counts.unanswered += 1;
            self.forget(rank);
            for payload in held {
                let _ = self.read(ask.publisher_id, &payload, Reading::GivenUp(rank));
            }
        }
    }

    /// Nobody knows what a rank holds.
    fn forget(&mut self, rank: RankId) {
        self.last.remove(&rank);
        self.batch().changes.push(Change::Cleared(rank));
    }

    /// A payload of `kv-events` has come.
    pub fn came(&mut self, publisher_id: u64, payload: &[u8]) {
        if self.read(publisher_id, payload, Reading::Live).is_err() {
            self.counts.unreadable += 1;
        }
    }

    /// Reads a payload, or what it says of one rank, whose events are taken up again then.
    fn read(
        &mut self,
        publisher_id: u64,
        payload: &[u8],
        reading: Reading,
    ) -> Result<(), EventError> {
        let mut events = KvEvents::open(payload)?;
        let mut to_hold: Vec<RankId> = Vec::new();
        let read = loop {
            let event = match events.next_event() {
                Ok(Some(event)) => event,
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            };
            let rank = rank_of(&event);
            if reading.only().is_some_and(|only| only != rank) {
                continue;
            }
            match self.turn((rank, publisher_id), event.event_id, reading) {
                Turn::Take => {
                    if let Err(error) = self.take_over(rank, event) {
                        break Err(error);
                    }
                }
                Turn::Hold if !to_hold.contains(&rank) => to_hold.push(rank),
                Turn::Hold | Turn::Skip => {}
            }
        };
        for rank in to_hold {
            if !self.asking.hold(rank, payload) {
                self.give_up(rank);
                let _ = self.read(publisher_id, payload, Reading::GivenUp(rank));
            }
        }
        read
    }

    /// A worker has left discovery.
    pub fn gone(&mut self, worker_id: u64) {
        self.asking.forget(|rank| rank.worker_id == worker_id);
        self.last.retain(|rank, _| rank.worker_id != worker_id);
        self.batch().changes.push(Change::Gone(worker_id));
    }

    /// Nobody knows what was missed: all ranks are forgotten, and all publishers are new.
    pub fn begin_anew(&mut self) {
        self.sources.clear();
        self.forget_all();
    }

    fn forget_all(&mut self) {
        self.asking.forget(|_| true);
        let ranks: Vec<RankId> = self.last.drain().map(|(rank, _)| rank).collect();
        for rank in ranks {
            self.batch().changes.push(Change::Cleared(rank));
        }
    }

    fn take_over(&mut self, rank: RankId, event: KvEvent<'_>) -> Result<(), EventError> {
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

    /// Whether an event is to be taken over now. When some before it are missing, its publisher is
    /// asked for them, or its rank forgotten.
    fn turn(
        &mut self,
        (rank, publisher_id): (RankId, u64),
        event_id: u64,
        reading: Reading,
    ) -> Turn {
        let source = self.sources.get(&publisher_id);
        if source.is_some_and(|source| source.rank != rank) {
            self.counts.strangers += 1;
            return Turn::Skip;
        }
        match self.asking.publisher(rank) {
            Some(awaited) if awaited == publisher_id => return Turn::Hold,
            Some(_) => {
                // Whoever tells of the rank now knows better.
                self.asking.end(rank);
                self.counts.unanswered += 1;
            }
            None => {}
        }
        if self.last.len() >= RANKS_MAX && !self.last.contains_key(&rank) {
            self.forget_all();
        }
        let now = Last {
            publisher_id,
            event_id,
        };
        let Some(before) = self.last.insert(rank, now) else {
            return Turn::Take;
        };
        if before.publisher_id != publisher_id {
            self.counts.restarts += 1;
            self.batch().changes.push(Change::Cleared(rank));
            let asked = reading != Reading::GivenUp(rank) && self.ask(rank, publisher_id, None);
            return if asked { Turn::Hold } else { Turn::Take };
        }
        if event_id <= before.event_id {
            self.last.insert(rank, before);
            self.counts.repeated += u64::from(reading == Reading::Live);
            return Turn::Skip;
        }
        let missing = event_id - before.event_id - 1;
        if missing == 0 {
            return Turn::Take;
        }
        self.counts.lost += missing;
        self.counts.gaps += 1;
        if reading != Reading::GivenUp(rank) && self.ask(rank, publisher_id, Some(before.event_id))
        {
            return Turn::Hold;
        }
        self.batch().changes.push(Change::Cleared(rank));
        Turn::Take
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

fn rank_of(event: &KvEvent<'_>) -> RankId {
    RankId {
        worker_id: event.worker_id,
        dp_rank: event.dp_rank,
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

    pub(super) const RANK: RankId = RankId {
        worker_id: 7,
        dp_rank: 1,
    };

    pub(super) fn stored(
        event_id: u64,
        parent_hash: Option<u64>,
        blocks: Range<u64>,
    ) -> typed::KvEvent {
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

    pub(super) fn changed(event_id: u64, data: typed::KvChange) -> typed::KvEvent {
        let mut event = stored(event_id, None, 0..0);
        event.event.data = data;
        event
    }

    pub(super) fn came(digest: &mut Digest, publisher_id: u64, events: &[typed::KvEvent]) {
        digest.came(publisher_id, &typed::to_payload(&events).unwrap());
    }

    /// What an index makes of the batches so far.
    pub(super) fn overlap(digest: &mut Digest, index: &mut Index, prompt: &[u64]) -> u32 {
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
            ..Counts::default()
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

#[cfg(test)]
#[path = "recovery_tests.rs"]
mod recovery_tests;
