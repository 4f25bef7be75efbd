//! What a writer lends of its own, as part of a pool's layout: handles by name, in the order in
//! which they were offered.

use std::collections::{BTreeMap, HashMap};

use sha2::{Digest, Sha256};
use thiserror::Error;

use super::{Exporter, IpcHandle};
use crate::protocol::v1::IpcEntry;
use crate::store::StoreLimits;

/// One piece of memory that a client lends.
#[derive(Clone, Debug)]
pub struct Offer {
    /// The driver's handle.
    pub handle: IpcHandle,
    /// Bytes of the allocation that the handle opens.
    pub base_bytes: u64,
    /// Where in it the offered memory starts.
    pub offset_bytes: u64,
    /// Offered bytes.
    pub size: u64,
    /// The engine's word for it.
    pub tag: String,
    /// The engine's words about it; never interpreted.
    pub value: Vec<u8>,
}

/// Why an offer is not taken. Nothing changed.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
pub enum OfferError {
    /// The bytes do not lie in the allocation.
    #[error("{size} bytes at {offset_bytes} are out of range: the allocation has {base_bytes}")]
    OutOfRange {
        /// Offered bytes.
        size: u64,
        /// Where they start.
        offset_bytes: u64,
        /// What there is.
        base_bytes: u64,
    },
    /// A limit is reached.
    #[error("the pool's limit of {limit} {what} is reached")]
    Full {
        /// Of what.
        what: &'static str,
        /// How many.
        limit: usize,
    },
    /// The memory of a layout is one process's.
    #[error("process {0} already lends memory in this layout; one process lends all of it")]
    AnotherExporter(u32),
}

/// All that is lent in one layout. One process lends it: the writer that built the layout.
pub struct Offers {
    limits: StoreLimits,
    exporter: Option<Exporter>,
    by_slot: BTreeMap<u64, (String, Offer)>,
    slots: HashMap<String, u64>,
    next_slot: u64,
    value_bytes: usize,
}

impl Offers {
    /// Nothing is lent yet.
    pub fn new(limits: StoreLimits) -> Offers {
        Offers {
            limits,
            exporter: None,
            by_slot: BTreeMap::new(),
            slots: HashMap::new(),
            next_slot: 0,
            value_bytes: 0,
        }
    }

    /// Whether nothing is lent.
    pub fn is_empty(&self) -> bool {
        self.by_slot.is_empty()
    }

    /// Who lends.
    pub fn exporter(&self) -> Option<&Exporter> {
        self.exporter.as_ref().filter(|_| !self.is_empty())
    }

    /// Adds an offer under a new name and answers its slot.
    ///
    /// # Errors
    /// The range makes no sense, a limit is reached, or another process lends already.
    pub fn insert(
        &mut self,
        id: String,
        offer: Offer,
        exporter: Exporter,
    ) -> Result<u64, OfferError> {
        let Offer {
            base_bytes,
            offset_bytes,
            size,
            ..
        } = offer;
        let end = offset_bytes.checked_add(size);
        if size == 0 || end.is_none_or(|end| end > base_bytes) {
            return Err(OfferError::OutOfRange {
                size,
                offset_bytes,
                base_bytes,
            });
        }
        self.check_room(offer.value.len() + offer.tag.len())?;
        if let Some(other) = self.exporter().filter(|it| it.peer != exporter.peer) {
            return Err(OfferError::AnotherExporter(other.peer.pid));
        }
        let slot = self.next_slot;
        self.next_slot += 1;
        self.value_bytes += offer.value.len() + offer.tag.len();
        self.exporter = Some(exporter);
        self.slots.insert(id.clone(), slot);
        self.by_slot.insert(slot, (id, offer));
        Ok(slot)
    }

    fn check_room(&self, value_bytes: usize) -> Result<(), OfferError> {
        let limit = self.limits.allocations_max;
        if self.by_slot.len() >= limit {
            let what = "offers";
            return Err(OfferError::Full { what, limit });
        }
        let limit = self.limits.metadata_bytes_max;
        if self.value_bytes + value_bytes > limit {
            let what = "bytes of offers' values";
            return Err(OfferError::Full { what, limit });
        }
        Ok(())
    }

    /// Takes an offer back. False if there was none.
    pub fn withdraw(&mut self, id: &str) -> bool {
        let slot = self.slots.remove(id);
        let removed = slot.and_then(|slot| self.by_slot.remove(&slot));
        let Some((_, offer)) = removed else {
            return false;
        };
        self.value_bytes -= offer.value.len() + offer.tag.len();
        true
    }

    /// One offer and how it is described.
    pub fn get(&self, id: &str) -> Option<(IpcEntry, &Offer)> {
        let slot = *self.slots.get(id)?;
        let (_, offer) = self.by_slot.get(&slot)?;
        Some((self.describe(slot, id, offer), offer))
    }

    /// Descriptions of all offers, by slot.
    pub fn entries(&self) -> impl Iterator<Item = IpcEntry> {
        let all = self.by_slot.iter();
        all.map(|(slot, (id, offer))| self.describe(*slot, id, offer))
    }

    fn describe(&self, slot: u64, id: &str, offer: &Offer) -> IpcEntry {
        let pid = self.exporter.as_ref().map_or(0, |it| it.peer.pid);
        IpcEntry {
            allocation_id: id.to_owned(),
            base_bytes: offer.base_bytes,
            offset_bytes: offer.offset_bytes,
            size: offer.size,
            tag: offer.tag.clone(),
            slot,
            exporter_pid: pid.into(),
        }
    }

    /// Adds what is lent to a hash of the layout's shape: nothing where nothing is lent. Handles
    /// are no part of the shape, but names are: what is opened by handle is never the same memory
    /// after a rebuild, so every rebuild is another layout.
    pub fn hash_into(&self, hash: &mut Sha256) {
        for (slot, (id, offer)) in &self.by_slot {
            hash.update(b"corelane ipc 1");
            for number in [*slot, offer.base_bytes, offer.offset_bytes, offer.size] {
                hash.update(number.to_le_bytes());
            }
            for text in [id.as_bytes(), offer.tag.as_bytes(), &offer.value] {
                hash.update((text.len() as u64).to_le_bytes());
                hash.update(text);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::Peer;
    use crate::lock::ClientId;

    fn offer(size: u64) -> Offer {
        Offer {
            handle: IpcHandle([1; 64]),
            base_bytes: 100,
            offset_bytes: 10,
            size,
            tag: "t".into(),
            value: vec![1, 2],
        }
    }

    fn here() -> Exporter {
        let (pid, uid) = (std::process::id(), 0);
        Exporter::watch(ClientId(1), Peer { pid, uid }).expect("visible")
    }

    fn hash(offers: &Offers) -> Vec<u8> {
        let mut hash = Sha256::new();
        offers.hash_into(&mut hash);
        hash.finalize().to_vec()
    }

    #[test]
    fn offers_are_named_listed_and_taken_back() {
        let mut offers = Offers::new(StoreLimits::default());
        let nothing = hash(&offers);
        assert_eq!(nothing, Sha256::digest([]).to_vec());
        assert_eq!(offers.insert("a".into(), offer(90), here()), Ok(0));
        assert_eq!(offers.insert("b".into(), offer(1), here()), Ok(1));
        let slots: Vec<_> = offers.entries().map(|entry| entry.slot).collect();
        assert_eq!(slots, [0, 1]);
        let (entry, found) = offers.get("a").expect("there");
        assert_eq!((entry.size, found.handle), (90, IpcHandle([1; 64])));
        assert_eq!(entry.exporter_pid, u64::from(std::process::id()));
        assert_ne!(hash(&offers), nothing);
        assert!(offers.withdraw("a") && !offers.withdraw("a"));
        assert!(offers.withdraw("b") && offers.is_empty());
        assert!(offers.exporter().is_none());
        assert_eq!(hash(&offers), nothing);
    }

    #[test]
    fn ranges_are_checked_and_the_tables_are_bounded() {
        let mut offers = Offers::new(StoreLimits {
            allocations_max: 2,
            metadata_bytes_max: 4,
            ..StoreLimits::default()
        });
        for size in [0, 91, u64::MAX] {
            let refused = offers.insert("a".into(), offer(size), here());
            assert!(matches!(refused, Err(OfferError::OutOfRange { .. })));
        }
        assert!(offers.insert("a".into(), offer(90), here()).is_ok());
        let refused = offers.insert("b".into(), offer(90), here());
        assert!(matches!(refused, Err(OfferError::Full { limit: 4, .. })));
        let small = Offer {
            value: vec![],
            ..offer(1)
        };
        assert!(offers.insert("b".into(), small.clone(), here()).is_ok());
        let refused = offers.insert("c".into(), small, here());
        assert!(matches!(refused, Err(OfferError::Full { limit: 2, .. })));
    }

    #[test]
    fn one_process_lends_all_of_a_layout() {
        let mut offers = Offers::new(StoreLimits::default());
        offers
            .insert("a".into(), offer(1), here())
            .expect("the first");
        let mut other = here();
        other.peer.pid += 1;
        let refused = offers.insert("b".into(), offer(1), other);
        assert!(matches!(refused, Err(OfferError::AnotherExporter(_))));
    }
}
