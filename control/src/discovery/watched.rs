//! The last known directory of one key prefix: what a store said, kept through its absences.
//!
//! ```text
//! store --snapshot, put, delete, gap--> Watched<T> (map by full key) --version bump--> Watch<T>
//! ```
//! Rules (`spec/events-discovery.md` §4.9, §10.2, and our own for outages):
//! * Keys are the identity: put and delete work by full key, whatever the value says.
//! * A value that does not parse never replaces a good one.
//! * A gap is closed by a full snapshot, never by replay.
//! * While the store is away the map stays as it was and says since when it is stale.
//! * A snapshot after an **outage** does not remove at once. When a store comes back empty, or
//!   its leases ran out while nobody could refresh them, every worker is missing from the first
//!   list although most of them live and are about to register again; a directory emptied at
//!   that moment refuses all requests for nothing. Missing keys become *suspects*: they stay
//!   usable, a put or delete settles them, and those that nothing settled within the
//!   confirmation time (min(lease TTL, 10 s) by default) are removed. The price is that an
//!   instance that really died during the outage is dialled a little longer, which the dial
//!   failure itself already handles.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::rc::Rc;
use std::time::Instant;

use super::Entry;

/// Most keys that one watch keeps; further keys are refused and counted.
pub const KEYS_MAX: usize = 65_536;
/// Longest value that is looked at, in bytes; etcd itself takes 1.5 MiB in one request.
pub const VALUE_BYTES_MAX: usize = 2 << 20;

/// Most bytes of values that one watch keeps.
pub const TOTAL_BYTES_MAX: usize = 256 << 20;

/// Turns key and value of a stored record into what a watch keeps.
pub type Parse<T> = fn(key: &str, value: &[u8]) -> Result<T, serde_json::Error>;

/// Whether the directory is what the store says now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freshness {
    /// Listed, and every later change is being received.
    Fresh,
    /// Not in contact with the store; the content is the last known one.
    Stale {
        /// When contact was lost, or when the watch began if there was none yet.
        since: Instant,
    },
}

/// Why changes may have been missed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gap {
    /// The store was in service all the time (compaction, a slow reader): its next list is true.
    Missed,
    /// The store was away, or we were: its next list may lack what is only not back yet.
    Outage,
}

/// One key of the directory.
struct Item<T> {
    raw: Vec<u8>,
    value: Rc<T>,
    suspect: bool,
}

/// The map and its rules; no clock, no task, no socket.
pub struct Watched<T> {
    parse: Parse<T>,
    entries: BTreeMap<String, Item<T>>,
    /// Sum of the lengths of all values.
    bytes: usize,
    /// Hash of the last bad value by key, so that a value is reported once, not at every resync.
    bad: BTreeMap<String, u64>,
    hasher: RandomState,
    freshness: Freshness,
    listed: bool,
    outage: bool,
    /// Counts outages; a confirmation that was planned before the last one is void.
    generation: u64,
    pub(super) rejected: u64,
}

impl<T> Watched<T> {
    /// An empty directory, stale since `now`.
    pub fn new(parse: Parse<T>, now: Instant) -> Self {
        Self {
            parse,
            entries: BTreeMap::new(),
            bytes: 0,
            bad: BTreeMap::new(),
            hasher: RandomState::new(),
            freshness: Freshness::Stale { since: now },
            listed: false,
            outage: false,
            generation: 0,
            rejected: 0,
        }
    }

    /// A key was written. Answers whether the directory changed.
    pub fn put(&mut self, key: &str, value: &[u8]) -> bool {
        if let Some(item) = self.entries.get_mut(key)
            && item.raw == value
        {
            self.bad.remove(key);
            return std::mem::take(&mut item.suspect);
        }
        match self.read(key, value) {
            Ok(parsed) => {
                let item = Item {
                    raw: value.to_vec(),
                    value: Rc::new(parsed),
                    suspect: false,
                };
                self.bad.remove(key);
                self.bytes += value.len();
                let old = self.entries.insert(key.to_owned(), item);
                self.bytes -= old.map_or(0, |item| item.raw.len());
                true
            }
            Err(reason) => self.reject(key, value, &reason),
        }
    }

    /// A key was deleted. Answers whether the directory changed.
    pub fn delete(&mut self, key: &str) -> bool {
        self.bad.remove(key);
        let gone = self.entries.remove(key);
        self.bytes -= gone.as_ref().map_or(0, |item| item.raw.len());
        gone.is_some()
    }

    /// Changes may have been missed from here until the next snapshot.
    pub fn gap(&mut self, gap: Gap, now: Instant) -> bool {
        if gap == Gap::Missed {
            return false;
        }
        if !self.outage {
            self.generation += 1;
        }
        self.outage = self.listed;
        match self.freshness {
            Freshness::Fresh => {
                self.freshness = Freshness::Stale { since: now };
                true
            }
            Freshness::Stale { .. } => false,
        }
    }

    /// The full content of the prefix. Answers what changed and whether removals must be
    /// confirmed by [`Watched::confirm`] with the generation named.
    pub fn snapshot(&mut self, listed: &[Entry]) -> Resynced {
        let mut changed = !self.listed || self.freshness != Freshness::Fresh;
        for Entry { key, value } in listed {
            changed |= self.put(key, value);
        }
        let present: std::collections::BTreeSet<&str> =
            listed.iter().map(|entry| entry.key.as_str()).collect();
        self.bad.retain(|key, _| present.contains(key.as_str()));
        let before = self.entries.len();
        let mut suspects = 0;
        let outage = self.outage;
        self.entries.retain(|key, item| {
            if present.contains(key.as_str()) {
                return true;
            }
            item.suspect |= outage;
            suspects += usize::from(item.suspect);
            self.bytes -= if item.suspect { 0 } else { item.raw.len() };
            item.suspect
        });
        changed |= self.entries.len() != before || (outage && suspects > 0);
        self.listed = true;
        self.outage = false;
        self.freshness = Freshness::Fresh;
        let confirm = (outage && suspects > 0).then_some(self.generation);
        Resynced {
            changed,
            suspects,
            confirm,
        }
    }

    /// The confirmation time after an outage has passed: what nobody put again is gone. Void
    /// when another outage came in between. Answers how many keys were removed.
    pub fn confirm(&mut self, generation: u64) -> usize {
        if generation != self.generation || self.outage {
            return 0;
        }
        let before = self.entries.len();
        self.entries.retain(|_, item| {
            self.bytes -= if item.suspect { item.raw.len() } else { 0 };
            !item.suspect
        });
        before - self.entries.len()
    }

    /// The directory in key order: key, value, and whether it waits for confirmation.
    pub fn entries(&self) -> impl Iterator<Item = (&str, &Rc<T>, bool)> {
        self.entries
            .iter()
            .map(|(key, item)| (key.as_str(), &item.value, item.suspect))
    }

    /// How many keys there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no key.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether the content is what the store says now.
    pub fn freshness(&self) -> Freshness {
        self.freshness
    }

    /// Whether the first list has arrived.
    pub fn listed(&self) -> bool {
        self.listed
    }

    /// Values refused so far: they did not parse, were too long, or there were too many keys.
    pub fn rejected(&self) -> u64 {
        self.rejected
    }

    fn read(&self, key: &str, value: &[u8]) -> Result<T, String> {
        if value.len() > VALUE_BYTES_MAX {
            return Err(format!(
                "{} bytes, at most {VALUE_BYTES_MAX} are read",
                value.len()
            ));
        }
        if self.entries.len() >= KEYS_MAX && !self.entries.contains_key(key) {
            return Err(format!("{KEYS_MAX} keys are watched already"));
        }
        if self.bytes + value.len() > TOTAL_BYTES_MAX {
            return Err(format!("{} bytes are kept already", self.bytes));
        }
        (self.parse)(key, value).map_err(|error| error.to_string())
    }

    /// Keeps what was there. A key that waited for confirmation is in the store after all.
    fn reject(&mut self, key: &str, value: &[u8], reason: &str) -> bool {
        let settled = match self.entries.get_mut(key) {
            Some(item) => std::mem::take(&mut item.suspect),
            None => false,
        };
        let hash = self.hasher.hash_one(value);
        if self.bad.get(key) == Some(&hash) {
            return settled;
        }
        self.rejected += 1;
        if self.bad.len() < KEYS_MAX {
            self.bad.insert(key.to_owned(), hash);
        }
        let kept = self.entries.contains_key(key);
        tracing::warn!(
            key,
            reason,
            last_good_kept = kept,
            "discovery record ignored"
        );
        settled
    }
}

/// What a snapshot did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resynced {
    /// Whether a reader sees a difference.
    pub changed: bool,
    /// Keys that are missing from the snapshot and wait for confirmation.
    pub suspects: usize,
    /// Confirm with this generation after the confirmation time.
    pub confirm: Option<u64>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text(_: &str, value: &[u8]) -> Result<String, serde_json::Error> {
        if value.starts_with(b"bad") {
            return Err(serde::de::Error::custom("bad"));
        }
        Ok(String::from_utf8_lossy(value).into_owned())
    }

    fn empty() -> Watched<String> {
        Watched::new(text, Instant::now())
    }

    fn entry(key: &str, value: &str) -> Entry {
        Entry {
            key: key.to_owned(),
            value: value.as_bytes().to_vec(),
        }
    }

    fn content(watched: &Watched<String>) -> BTreeMap<String, String> {
        watched
            .entries()
            .map(|(key, value, _)| (key.to_owned(), value.to_string()))
            .collect()
    }

    fn keys(watched: &Watched<String>) -> Vec<&str> {
        watched.entries().map(|(key, ..)| key).collect()
    }

    #[test]
    fn a_bad_update_keeps_the_last_good_value_even_through_a_snapshot() {
        let mut watched = empty();
        watched.snapshot(&[entry("a", "1")]);
        assert!(!watched.put("a", b"bad"));
        watched.snapshot(&[entry("a", "bad"), entry("b", "bad")]);
        assert_eq!(
            content(&watched),
            BTreeMap::from([("a".to_owned(), "1".to_owned())])
        );
        assert_eq!(watched.rejected(), 2, "each bad value is counted once");
        watched.put("a", b"bad again");
        assert_eq!(watched.rejected(), 3);
        assert!(watched.put("a", b"2") && watched.delete("a") && watched.is_empty());
    }

    #[test]
    fn removals_after_an_outage_wait_for_confirmation() {
        let mut watched = empty();
        watched.snapshot(&[entry("a", "1"), entry("b", "1"), entry("c", "1")]);
        assert_eq!(watched.freshness(), Freshness::Fresh);
        let lost = Instant::now();
        assert!(watched.gap(Gap::Outage, lost));
        assert!(
            !watched.gap(Gap::Outage, Instant::now()),
            "still the same outage"
        );
        assert_eq!(watched.freshness(), Freshness::Stale { since: lost });
        assert_eq!(keys(&watched), ["a", "b", "c"]);
        // The store came back empty.
        let resynced = watched.snapshot(&[]);
        assert_eq!(
            (resynced.suspects, watched.freshness()),
            (3, Freshness::Fresh)
        );
        assert_eq!(keys(&watched), ["a", "b", "c"]);
        assert!(watched.put("a", b"1") && watched.delete("b"));
        assert_eq!(watched.confirm(resynced.confirm.unwrap()), 1);
        assert_eq!(keys(&watched), ["a"]);
    }

    #[test]
    fn a_second_outage_voids_the_confirmation_of_the_first() {
        let mut watched = empty();
        watched.snapshot(&[entry("a", "1")]);
        watched.gap(Gap::Outage, Instant::now());
        let first = watched.snapshot(&[]).confirm.unwrap();
        watched.gap(Gap::Outage, Instant::now());
        assert_eq!(watched.confirm(first), 0);
        let second = watched.snapshot(&[]).confirm.unwrap();
        assert_eq!((watched.confirm(first), watched.len()), (0, 1));
        assert_eq!(watched.confirm(second), 1);
    }

    #[test]
    fn without_an_outage_a_snapshot_is_true_at_once() {
        let mut watched = empty();
        watched.snapshot(&[entry("a", "1")]);
        assert!(!watched.gap(Gap::Missed, Instant::now()));
        let resynced = watched.snapshot(&[]);
        assert_eq!(
            (resynced.changed, resynced.confirm, watched.len()),
            (true, None, 0)
        );
        // An outage before the first list leaves nothing to confirm.
        let mut watched = empty();
        watched.gap(Gap::Outage, Instant::now());
        assert_eq!(watched.snapshot(&[]).confirm, None);
        assert!(watched.listed());
    }

    #[test]
    fn a_value_too_long_is_refused() {
        let mut watched = empty();
        watched.put("a", &vec![b'x'; VALUE_BYTES_MAX + 1]);
        assert_eq!((watched.len(), watched.rejected()), (0, 1));
    }

    #[derive(Clone, Debug)]
    enum Act {
        Put(u8, u8),
        Delete(u8),
        Outage,
        Compacted,
        Resync,
        ConfirmLatest,
    }

    fn acts() -> impl Strategy<Value = Vec<Act>> {
        let act = prop_oneof![
            4 => (0..6u8, 0..4u8).prop_map(|(key, value)| Act::Put(key, value)),
            3 => (0..6u8).prop_map(Act::Delete),
            1 => Just(Act::Outage),
            1 => Just(Act::Compacted),
            2 => Just(Act::Resync),
            1 => Just(Act::ConfirmLatest),
        ];
        proptest::collection::vec(act, 0..80)
    }

    proptest! {
        /// Whatever happens to the store and to the contact with it: after a last resync and
        /// its confirmation both are equal, and between them nothing that the store has is ever
        /// missing from a directory that calls itself fresh.
        #[test]
        fn ends_equal_to_the_store(acts in acts()) {
            let mut store = BTreeMap::<String, String>::new();
            let mut watched = empty();
            let mut connected = false;
            let mut confirm = None;
            let mut resync = |watched: &mut Watched<String>, store: &BTreeMap<String, String>| {
                let listed: Vec<Entry> =
                    store.iter().map(|(key, value)| entry(key, value)).collect();
                if let Some(generation) = watched.snapshot(&listed).confirm {
                    confirm = Some(generation);
                }
                confirm
            };
            let mut latest = None;
            for act in acts {
                match act {
                    Act::Put(key, value) => {
                        let (key, value) = (format!("k{key}"), format!("v{value}"));
                        store.insert(key.clone(), value.clone());
                        if connected {
                            watched.put(&key, value.as_bytes());
                        }
                    }
                    Act::Delete(key) => {
                        let key = format!("k{key}");
                        if store.remove(&key).is_some() && connected {
                            watched.delete(&key);
                        }
                    }
                    Act::Outage => {
                        connected = false;
                        watched.gap(Gap::Outage, Instant::now());
                    }
                    Act::Compacted => {
                        connected = false;
                        watched.gap(Gap::Missed, Instant::now());
                    }
                    Act::Resync => {
                        connected = true;
                        latest = resync(&mut watched, &store);
                    }
                    Act::ConfirmLatest => {
                        latest.map(|generation| watched.confirm(generation));
                    }
                }
                if connected {
                    let seen = content(&watched);
                    for (key, value) in &store {
                        prop_assert_eq!(seen.get(key), Some(value));
                    }
                }
            }
            latest = resync(&mut watched, &store).or(latest);
            latest.map(|generation| watched.confirm(generation));
            let bytes: usize = store.values().map(String::len).sum();
            prop_assert_eq!(watched.bytes, bytes);
            prop_assert_eq!(content(&watched), store);
        }
    }
}
