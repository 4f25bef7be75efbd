//! Memory that was cleared and is still there: given up block by block while nobody waits for an
//! answer, and before anybody is told that memory is short.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::store::Store;

/// What the pools of a service have cleared. Clones are the same: a shortage in one pool is ended
/// by what another has cleared. One thread uses it; the mutex is for the move to that thread.
#[derive(Clone, Default)]
pub struct Discarded {
    stores: Arc<Mutex<VecDeque<Store>>>,
}

impl Discarded {
    /// Gives up one block, or what is left where there is none. False if there is nothing.
    pub fn free_one(&self) -> bool {
        self.free_next().is_some()
    }

    /// Gives up everything. False if there was nothing.
    pub fn free_all(&self) -> bool {
        let stores = std::mem::take(&mut *self.stores());
        !stores.is_empty()
    }

    /// Gives up so many bytes, or all that there are.
    pub(super) fn free_bytes(&self, bytes: u64) {
        let mut freed = 0;
        while freed < bytes
            && let Some(more) = self.free_next()
        {
            freed = freed.saturating_add(more);
        }
    }

    pub(super) fn push(&self, store: Store) {
        if !store.is_empty() {
            self.stores().push_back(store);
        }
    }

    fn free_next(&self) -> Option<u64> {
        let mut stores = self.stores();
        match stores.front_mut()?.shed() {
            Some(bytes) => Some(bytes),
            None => {
                stores.pop_front();
                Some(0)
            }
        }
    }

    fn stores(&self) -> MutexGuard<'_, VecDeque<Store>> {
        self.stores.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
