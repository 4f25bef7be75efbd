//! Makes memory for a writer, and asks again for as long as there is none
//! (`spec/gpu-memory.md` §5.1, S3).

use super::{Domain, Turn, after, v1, v2};
use crate::backend::{Block, CreateError};
use crate::history::Kind;
use crate::lock::{ClientId, Profile};
use crate::stats::Counter;

/// Memory that a writer asked for.
pub(super) struct Wanted {
    pub(super) id: String,
    pub(super) size: u64,
    pub(super) aligned_size: u64,
    pub(super) tag: String,
}

/// A writer that waits for memory. There is one writer, so there is one of these at most.
pub(super) struct Starving {
    pub(super) client: ClientId,
    pub(super) wanted: Wanted,
    pub(super) next_try_ns: u64,
    pub(super) deadline_ns: Option<u64>,
}

impl Domain {
    /// Makes memory for a writer, or lets it wait for some.
    pub(super) fn allocate(&mut self, client: ClientId, wanted: Wanted, turn: &mut Turn<'_>) {
        let timeout = match self.config.policy.profile {
            Profile::V1 => self.config.retry_timeout,
            Profile::V2 => None,
        };
        let deadline_ns = timeout.map(|timeout| after(turn.now_ns, timeout));
        match self.create(wanted.aligned_size) {
            Err(CreateError::OutOfMemory) => {
                self.stats.count(Counter::AllocationOom);
                let (stamp, state) = (self.stamp(client, turn), self.lock.state());
                self.history
                    .note(stamp, Kind::AllocationOom, state, self.store.count());
                let next_try_ns = after(turn.now_ns, self.config.retry_interval);
                self.starving = Some(Starving {
                    client,
                    wanted,
                    next_try_ns,
                    deadline_ns,
                });
            }
            made => self.allocated(client, wanted, made, turn),
        }
    }

    /// Makes ready what the next allocation will need. False if there is nothing to be done.
    pub fn prepare(&mut self) -> bool {
        self.backend.prepare()
    }

    /// Gives up one thing that was made ready. False if there is none.
    pub fn unprepare(&mut self) -> bool {
        self.backend.unprepare()
    }

    /// Asks for memory. Of what was cleared as many bytes go first, so that never more is in use
    /// than was before; all of it goes before memory is said to be short.
    fn create(&mut self, bytes: u64) -> Result<Box<dyn Block>, CreateError> {
        self.discarded.free_bytes(bytes);
        match self.backend.create(bytes) {
            Err(_) if self.discarded.free_all() => self.backend.create(bytes),
            made => made,
        }
    }

    /// Tries again for the writer that waits for memory.
    pub(super) fn feed(&mut self, turn: &mut Turn<'_>) {
        let Some(mut starving) = self.starving.take() else {
            return;
        };
        let client = starving.client;
        match self.create(starving.wanted.aligned_size) {
            Err(CreateError::OutOfMemory) => {
                if starving
                    .deadline_ns
                    .is_some_and(|deadline| deadline <= turn.now_ns)
                {
                    self.stats.count(Counter::AllocationTimedOut);
                    let size = starving.wanted.aligned_size;
                    let text = format!("Timed out waiting for {size} bytes of memory");
                    turn.send(client, self.error(text, true));
                    return;
                }
                let next = after(turn.now_ns, self.config.retry_interval);
                starving.next_try_ns = next.min(starving.deadline_ns.unwrap_or(next));
                self.starving = Some(starving);
            }
            made => self.allocated(client, starving.wanted, made, turn),
        }
    }

    fn allocated(
        &mut self,
        client: ClientId,
        wanted: Wanted,
        made: Result<Box<dyn Block>, CreateError>,
        turn: &mut Turn<'_>,
    ) {
        let Wanted {
            id,
            size,
            aligned_size,
            tag,
        } = wanted;
        let stored = match made {
            Ok(block) => self
                .store
                .insert(id, size, aligned_size, tag, block)
                .map_err(|error| error.to_string()),
            Err(error) => {
                self.stats.count(Counter::BackendErrors);
                tracing::error!(%error, aligned_size, "memory could not be made");
                Err(error.to_string())
            }
        };
        let frame = match (stored, self.config.policy.profile) {
            (Ok(allocation), Profile::V1) => v1::allocated(allocation),
            (Ok(_), Profile::V2) => v2::success(),
            (Err(text), _) => return turn.send(client, self.error(text, false)),
        };
        self.stats.count(Counter::Allocations);
        turn.send(client, frame);
    }
}

/// Rounds a size up to the granularity.
pub(super) fn aligned(size: u64, granularity_bytes: u64) -> Option<u64> {
    size.checked_next_multiple_of(granularity_bytes)
        .filter(|size| *size <= BLOCK_BYTES_MAX)
}

/// No device has more; what is over it is a mistake, not a shortage to be waited for.
pub(super) const BLOCK_BYTES_MAX: u64 = 1 << 46;
