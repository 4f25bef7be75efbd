//! Discovery inside one process: for `corelane up`, for instances written in the config, and
//! for tests.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::{Rc, Weak};
use std::time::Duration;

use tokio::sync::watch;

use super::shared::{Shared, Sink};
use super::watched::Parse;
use super::{DiscoveryError, DiscoveryStats, Entry, Record, Registered, Watch, random_id};

/// The store that several [`MemoryDiscovery`] of one process share.
#[derive(Clone, Default)]
pub struct MemoryStore(Rc<Content>);

#[derive(Default)]
struct Content {
    entries: RefCell<BTreeMap<String, Vec<u8>>>,
    watches: RefCell<Vec<(String, Weak<dyn Sink>)>>,
}

impl MemoryStore {
    /// Writes a key; static instances enter here, under ids of the caller's choice.
    pub fn put(&self, key: &str, value: &[u8]) {
        self.0
            .entries
            .borrow_mut()
            .insert(key.to_owned(), value.to_vec());
        self.tell(key, |sink| sink.put(key, value));
    }

    /// Deletes a key; one that is not there is fine.
    pub fn delete(&self, key: &str) {
        if self.0.entries.borrow_mut().remove(key).is_some() {
            self.tell(key, |sink| sink.delete(key));
        }
    }

    fn tell(&self, key: &str, deliver: impl Fn(&dyn Sink)) {
        self.0.watches.borrow_mut().retain(|(prefix, sink)| {
            let Some(sink) = sink.upgrade() else {
                return false;
            };
            if key.starts_with(prefix.as_str()) {
                deliver(&*sink);
            }
            true
        });
    }

    fn attach(&self, prefix: &str, sink: Weak<dyn Sink>) {
        let listed: Vec<Entry> = self
            .0
            .entries
            .borrow()
            .range(prefix.to_owned()..)
            .take_while(|(key, _)| key.starts_with(prefix))
            .map(|(key, value)| Entry {
                key: key.clone(),
                value: value.clone(),
            })
            .collect();
        if let Some(sink) = sink.upgrade() {
            sink.snapshot(&listed);
        }
        self.0.watches.borrow_mut().push((prefix.to_owned(), sink));
    }
}

/// One identity on a [`MemoryStore`]; clones share it.
#[derive(Clone)]
pub struct MemoryDiscovery(Rc<Inner>);

struct Inner {
    store: MemoryStore,
    identity: watch::Sender<u64>,
    records: RefCell<BTreeMap<String, String>>,
    closed: Cell<bool>,
    stats: Rc<DiscoveryStats>,
}

impl MemoryDiscovery {
    /// A new identity, with a random id, on `store`.
    pub fn new(store: &MemoryStore) -> Self {
        Self::with_identity(store, random_id())
    }

    /// An identity of the caller's choice; nobody else on `store` may have it.
    pub fn with_identity(store: &MemoryStore, id: u64) -> Self {
        Self(Rc::new(Inner {
            store: store.clone(),
            identity: watch::Sender::new(id),
            records: RefCell::default(),
            closed: Cell::new(false),
            stats: Rc::default(),
        }))
    }

    pub(super) fn identity(&self) -> watch::Receiver<u64> {
        self.0.identity.subscribe()
    }

    pub(super) fn stats(&self) -> &Rc<DiscoveryStats> {
        &self.0.stats
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.0.records.borrow().contains_key(name)
    }

    pub(super) async fn replace(&self, record: Record) -> Result<Registered, DiscoveryError> {
        if self.0.closed.get() {
            return Err(DiscoveryError::Closed);
        }
        let Entry { key, value } = record.entry(*self.0.identity.borrow());
        let old = self
            .0
            .records
            .borrow_mut()
            .insert(record.name().to_owned(), key.clone());
        if let Some(old) = old.filter(|old| *old != key) {
            self.0.store.delete(&old);
        }
        self.0.store.put(&key, &value);
        Ok(Registered::Stored)
    }

    pub(super) async fn unregister(&self, name: &str) {
        let key = self.0.records.borrow_mut().remove(name);
        if let Some(key) = key {
            self.0.store.delete(&key);
        }
    }

    pub(super) async fn unregister_all(&self) {
        for key in self.0.records.take().into_values() {
            self.0.store.delete(&key);
        }
    }

    pub(super) async fn close(&self) {
        self.0.closed.set(true);
        self.unregister_all().await;
    }

    pub(super) fn watch<T: 'static>(&self, prefix: &str, parse: Parse<T>) -> Watch<T> {
        // Nothing is ever away here, so that no confirmation time is ever used.
        let shared = Shared::new(prefix, parse, self.0.stats.clone(), Duration::ZERO);
        let sink: Rc<dyn Sink> = shared.clone();
        self.0.store.attach(prefix, Rc::downgrade(&sink));
        self.0.stats.add(&self.0.stats.resyncs, 1);
        Watch::new(shared, None)
    }
}
