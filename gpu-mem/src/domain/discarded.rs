//! Memory that was cleared and is still there: given up block by block while nobody waits for an
//! answer, and before anybody is told that memory is short.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::store::Store;

/// What the pools of a service have cleared. Clones are the same: a shortage in one pool is ended
/// by what another has cleared. One thread uses it; the mutex is for the move to that thread.
#[derive(Clone, Default)]
pub struct Discarded {
    heap: Arc<Mutex<Heap>>,
}

#[derive(Default)]
struct Heap {
    stores: VecDeque<Store>,
    /// Given up since something was last cleared, and not yet made use of by an allocation.
    ahead_bytes: u64,
}

impl Discarded {
    /// Gives up one block, or what is left where there is none. False if there is nothing.
    pub fn free_one(&self) -> bool {
        let mut heap = self.heap();
        let freed = heap.free_next();
        heap.ahead_bytes = heap.ahead_bytes.saturating_add(freed.unwrap_or_default());
        freed.is_some()
    }

    /// Gives up everything. False if there was nothing.
    pub fn free_all(&self) -> bool {
        let stores = std::mem::take(&mut self.heap().stores);
        !stores.is_empty()
    }

    /// Gives up so many bytes, or all that there are; what was given up ahead counts.
    pub(super) fn free_bytes(&self, bytes: u64) {
        let mut heap = self.heap();
        let mut freed = heap.ahead_bytes;
        while freed < bytes
            && let Some(more) = heap.free_next()
        {
            freed = freed.saturating_add(more);
        }
        heap.ahead_bytes = freed.saturating_sub(bytes);
    }

    pub(super) fn push(&self, store: Store) {
        if !store.is_empty() {
            let mut heap = self.heap();
            heap.stores.push_back(store);
            heap.ahead_bytes = 0;
        }
    }

    fn heap(&self) -> MutexGuard<'_, Heap> {
        self.heap.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Heap {
    fn free_next(&mut self) -> Option<u64> {
        match self.stores.front_mut()?.shed() {
            Some(bytes) => Some(bytes),
            None => {
                self.stores.pop_front();
                Some(0)
            }
        }
    }
}
