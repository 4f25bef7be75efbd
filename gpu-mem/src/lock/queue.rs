//! Who waits, in order of arrival; nothing here takes longer because more wait.

use std::collections::{BTreeMap, BTreeSet};

use super::{ClientId, LockType};

/// One client that waits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Waiter {
    pub(super) client: ClientId,
    pub(super) lock_type: LockType,
    /// When it waits no longer; none waits for ever.
    pub(super) deadline_ns: Option<u64>,
}

/// All who wait.
#[derive(Clone, Debug, Default)]
pub(super) struct Queue {
    /// By number of arrival.
    waiters: BTreeMap<u64, Waiter>,
    numbers: BTreeMap<ClientId, u64>,
    /// Deadlines with the numbers of their waiters.
    deadlines: BTreeSet<(u64, u64)>,
    /// How many count as writers.
    writers: usize,
    next: u64,
}

impl Queue {
    pub(super) fn len(&self) -> usize {
        self.waiters.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiters.is_empty()
    }

    /// How many keep new readers out.
    pub(super) fn writers(&self) -> usize {
        self.writers
    }

    pub(super) fn contains(&self, client: ClientId) -> bool {
        self.numbers.contains_key(&client)
    }

    /// Adds one at the end; it does not wait yet.
    pub(super) fn push(&mut self, waiter: Waiter) {
        let number = self.next;
        self.next += 1;
        self.writers += usize::from(waiter.lock_type.counts_as_writer());
        self.numbers.insert(waiter.client, number);
        if let Some(deadline_ns) = waiter.deadline_ns {
            self.deadlines.insert((deadline_ns, number));
        }
        self.waiters.insert(number, waiter);
    }

    /// Takes one out, wherever it stands.
    pub(super) fn remove(&mut self, client: ClientId) -> Option<Waiter> {
        let number = self.numbers.remove(&client)?;
        let waiter = self.waiters.remove(&number)?;
        self.writers -= usize::from(waiter.lock_type.counts_as_writer());
        if let Some(deadline_ns) = waiter.deadline_ns {
            self.deadlines.remove(&(deadline_ns, number));
        }
        Some(waiter)
    }

    /// The first one whose number is at least this, and its number.
    pub(super) fn from(&self, number: u64) -> Option<(u64, Waiter)> {
        let (number, waiter) = self.waiters.range(number..).next()?;
        Some((*number, *waiter))
    }

    /// The nearest deadline.
    pub(super) fn next_deadline_ns(&self) -> Option<u64> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }

    /// Those whose deadline has come, in order of arrival.
    pub(super) fn late(&self, now_ns: u64) -> Vec<ClientId> {
        let late = self.deadlines.range(..=(now_ns, u64::MAX));
        let numbers: BTreeSet<u64> = late.map(|(_, number)| *number).collect();
        let waiters = numbers.iter().filter_map(|n| self.waiters.get(n));
        waiters.map(|waiter| waiter.client).collect()
    }

    /// All of them.
    #[cfg(any(test, debug_assertions))]
    pub(super) fn iter(&self) -> impl Iterator<Item = &Waiter> {
        self.waiters.values()
    }

    /// Brings every deadline nearer.
    #[cfg(test)]
    pub(super) fn advance(&mut self, by_ns: u64) {
        self.deadlines.clear();
        for (number, waiter) in &mut self.waiters {
            waiter.deadline_ns = waiter.deadline_ns.map(|at| at - by_ns);
            self.deadlines
                .extend(waiter.deadline_ns.map(|at| (at, *number)));
        }
    }
}
