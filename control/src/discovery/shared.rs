//! A watched directory between the task of a backend, which writes it, and its reader, who is
//! woken by what differs; it keeps the gauges and confirms absences in time.

use std::cell::{Ref, RefCell};
use std::rc::{Rc, Weak};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::watched::{Freshness, Gap, Parse, Watched};
use super::{DiscoveryStats, Entry};

/// Where a backend delivers; one per watch.
pub(crate) trait Sink {
    fn put(&self, key: &str, value: &[u8]);
    fn delete(&self, key: &str);
    fn snapshot(&self, listed: &[Entry]);
    fn gap(&self, gap: Gap, cause: &str);
}

/// A directory shared by the backend's task, which writes, and a [`Watch`], which reads.
pub(crate) struct Shared<T> {
    prefix: String,
    watched: RefCell<Watched<T>>,
    version: watch::Sender<u64>,
    stats: Rc<DiscoveryStats>,
    confirm_after: Duration,
    this: Weak<Shared<T>>,
}

impl<T: 'static> Shared<T> {
    pub(crate) fn new(
        prefix: &str,
        parse: Parse<T>,
        stats: Rc<DiscoveryStats>,
        confirm_after: Duration,
    ) -> Rc<Self> {
        stats.stale_watches.set(stats.stale_watches.get() + 1);
        Rc::new_cyclic(|this| Self {
            prefix: prefix.to_owned(),
            watched: RefCell::new(Watched::new(parse, Instant::now())),
            version: watch::Sender::new(0),
            stats,
            confirm_after,
            this: this.clone(),
        })
    }

    /// Runs `change`, keeps the gauges true, and wakes readers when it answers true.
    fn update(&self, change: impl FnOnce(&mut Watched<T>) -> bool) {
        let mut watched = self.watched.borrow_mut();
        let before = (watched.len(), watched.freshness(), watched.rejected);
        let changed = change(&mut watched);
        let stats = &self.stats;
        stats
            .watched_keys
            .set(stats.watched_keys.get() + watched.len() as u64 - before.0 as u64);
        stats.add(&stats.rejected_records, watched.rejected - before.2);
        let is_stale = |freshness| u64::from(freshness != Freshness::Fresh);
        let stale = stats.stale_watches.get() + is_stale(watched.freshness()) - is_stale(before.1);
        stats.stale_watches.set(stale);
        drop(watched);
        if changed {
            self.version.send_modify(|version| *version += 1);
        }
    }

    fn confirm_later(&self, generation: u64) {
        let (this, after) = (self.this.clone(), self.confirm_after);
        tokio::task::spawn_local(async move {
            tokio::time::sleep(after).await;
            let Some(shared) = this.upgrade() else { return };
            shared.update(|watched| {
                let removed = watched.confirm(generation);
                if removed > 0 {
                    tracing::info!(prefix = shared.prefix, removed, "absence confirmed");
                }
                removed > 0
            });
        });
    }
}

impl<T: 'static> Sink for Shared<T> {
    fn put(&self, key: &str, value: &[u8]) {
        self.update(|watched| watched.put(key, value));
    }

    fn delete(&self, key: &str) {
        self.update(|watched| watched.delete(key));
    }

    fn snapshot(&self, listed: &[Entry]) {
        let mut confirm = None;
        self.update(|watched| {
            let was = watched.freshness();
            let resynced = watched.snapshot(listed);
            if let Freshness::Stale { since } = was {
                let (away, suspects) = (since.elapsed(), resynced.suspects);
                tracing::info!(prefix = self.prefix, ?away, suspects, "directory is fresh");
            }
            confirm = resynced.confirm;
            resynced.changed
        });
        if let Some(generation) = confirm {
            self.stats.add(&self.stats.removals_deferred, 1);
            self.confirm_later(generation);
        }
    }

    fn gap(&self, gap: Gap, cause: &str) {
        self.update(|watched| {
            let turned_stale = watched.gap(gap, Instant::now());
            if turned_stale {
                let keys = watched.len();
                tracing::warn!(
                    prefix = self.prefix,
                    keys,
                    cause,
                    "store away, directory kept"
                );
            }
            turned_stale
        });
    }
}

impl<T> Drop for Shared<T> {
    fn drop(&mut self) {
        let watched = self.watched.get_mut();
        let stale = u64::from(watched.freshness() != Freshness::Fresh);
        self.stats
            .watched_keys
            .set(self.stats.watched_keys.get() - watched.len() as u64);
        self.stats
            .stale_watches
            .set(self.stats.stale_watches.get() - stale);
    }
}

/// Ends the task that feeds a watch together with the watch.
pub(crate) struct AbortOnDrop(pub(crate) AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A reader's end of one watched prefix; dropping it ends the watch.
pub struct Watch<T> {
    shared: Rc<Shared<T>>,
    seen: watch::Receiver<u64>,
    _task: Option<AbortOnDrop>,
}

impl<T: 'static> Watch<T> {
    pub(crate) fn new(shared: Rc<Shared<T>>, task: Option<AbortOnDrop>) -> Self {
        let mut seen = shared.version.subscribe();
        seen.mark_changed();
        Self {
            shared,
            seen,
            _task: task,
        }
    }

    /// Waits until something differs from what the last call reported: content, freshness or
    /// suspicion. The first call returns at once. Safe to cancel. Bursts come as one change.
    pub async fn changed(&mut self) {
        // The sender lives in `shared`, which we hold: this cannot fail.
        let _ = self.seen.changed().await;
    }

    /// Waits until the first list has arrived; bound it with a timeout of your own.
    pub async fn listed(&mut self) {
        let mut seen = self.shared.version.subscribe();
        while !self.shared.watched.borrow().listed() {
            if seen.changed().await.is_err() {
                return;
            }
        }
    }

    /// The directory as it is now. Do not hold it across an await.
    pub fn directory(&self) -> Ref<'_, Watched<T>> {
        self.shared.watched.borrow()
    }

    /// The key prefix that is watched.
    pub fn prefix(&self) -> &str {
        &self.shared.prefix
    }

    /// The counters of the discovery that this watch belongs to.
    pub fn stats(&self) -> &Rc<DiscoveryStats> {
        &self.shared.stats
    }
}
