//! Ranks whose worker is being asked what is in its cache: their events are held until it answers.
//! What is held is bounded; beyond that the rank that needs more is given up.

use std::collections::HashMap;
use std::mem;

use bytes::Bytes;
use corelane_codec::event::KvQuery;
use corelane_codec::path::EndpointId;
use corelane_engine::kv::RankId;

use crate::watch::Instance;

/// Bytes of events that are held for all ranks of a target together, at most.
pub(super) const HELD_BYTES_MAX: usize = 16 << 20;

/// A publisher of KV events, as discovery knows it.
#[derive(Clone, Debug, PartialEq)]
pub struct Source {
    /// The rank that all its events are about.
    pub rank: RankId,
    /// Where it is asked; `None` if it keeps nothing that could be asked for.
    pub target: Option<Target>,
}

/// Where a publisher is asked.
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    /// The endpoint.
    pub endpoint: EndpointId,
    /// The one instance that knows.
    pub instance: Instance,
}

/// A question to be asked.
#[derive(Clone, Debug)]
pub struct Ask {
    /// Told apart by this.
    pub number: u64,
    /// About whom.
    pub rank: RankId,
    /// Whom.
    pub target: Target,
    /// What came after this event is enough; `None` asks for everything.
    pub after: Option<u64>,
    pub(super) publisher_id: u64,
}

impl Ask {
    /// The question as it is sent.
    pub fn query(&self) -> KvQuery {
        KvQuery::new(self.rank.worker_id, self.rank.dp_rank, self.after)
    }
}

/// A rank that waits for an answer.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) ask: Ask,
    /// Payloads that came meanwhile.
    pub(super) held: Vec<Bytes>,
}

/// All that wait.
#[derive(Debug, Default)]
pub(super) struct Asking {
    waiting: HashMap<RankId, Waiting>,
    new: Vec<Ask>,
    held_bytes: usize,
    numbers: u64,
}

impl Asking {
    /// Begins to wait, in place of what the rank waited for before.
    pub(super) fn begin(
        &mut self,
        (rank, publisher_id): (RankId, u64),
        target: Target,
        after: Option<u64>,
    ) {
        self.numbers += 1;
        let ask = Ask {
            number: self.numbers,
            rank,
            target,
            after,
            publisher_id,
        };
        self.new.push(ask.clone());
        // What was held for another publisher is of no use to this one.
        self.end(rank);
        let held = Vec::new();
        self.waiting.insert(rank, Waiting { ask, held });
    }

    /// The publisher whose answer a rank waits for.
    pub(super) fn publisher(&self, rank: RankId) -> Option<u64> {
        self.waiting.get(&rank).map(|one| one.ask.publisher_id)
    }

    /// Holds a payload with events of that rank. `false`: there is no room.
    pub(super) fn hold(&mut self, rank: RankId, payload: &[u8]) -> bool {
        let Some(waiting) = self.waiting.get_mut(&rank) else {
            return true;
        };
        let bytes = self.held_bytes + payload.len();
        if bytes > HELD_BYTES_MAX {
            return false;
        }
        self.held_bytes = bytes;
        waiting.held.push(Bytes::copy_from_slice(payload));
        true
    }

    /// Ends the wait of a rank.
    pub(super) fn end(&mut self, rank: RankId) -> Option<Waiting> {
        let waiting = self.waiting.remove(&rank)?;
        let bytes: usize = waiting.held.iter().map(Bytes::len).sum();
        self.held_bytes -= bytes;
        Some(waiting)
    }

    /// Ends the wait for this answer, if it is still waited for.
    pub(super) fn answered(&mut self, ask: &Ask) -> Option<Waiting> {
        let waiting = self.waiting.get(&ask.rank)?;
        match waiting.ask.number == ask.number {
            true => self.end(ask.rank),
            false => None,
        }
    }

    /// Ends the waits of ranks.
    pub(super) fn forget(&mut self, mut which: impl FnMut(RankId) -> bool) {
        let ranks = self.waiting.keys().copied();
        let ranks: Vec<RankId> = ranks.filter(|rank| which(*rank)).collect();
        for rank in ranks {
            self.end(rank);
        }
    }

    /// Questions that have not been taken yet.
    pub(super) fn take(&mut self) -> Vec<Ask> {
        mem::take(&mut self.new)
    }

    /// Ranks that wait.
    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }
}
