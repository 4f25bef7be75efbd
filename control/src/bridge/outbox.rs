//! What waits to be brought to one side: bounded in events and bytes; what finds no room is
//! dropped and counted.

use std::cell::RefCell;
use std::collections::VecDeque;

use bytes::Bytes;
use corelane_codec::event::origin::Origin;
use tokio::sync::Notify;

/// Events that wait for one side.
pub(super) const EVENTS_MAX: usize = 65_536;
/// Bytes of them.
pub(super) const BYTES_MAX: usize = 64 << 20;

/// An event on its way.
#[derive(Clone, Debug)]
pub(super) struct Parcel {
    pub(super) subject: Bytes,
    pub(super) publisher_id: u64,
    pub(super) sequence: u64,
    pub(super) envelope: Bytes,
    pub(super) origin: Origin,
}

impl Parcel {
    fn bytes(&self) -> usize {
        self.subject.len() + self.envelope.len()
    }
}

/// The queue of a side.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    waiting: RefCell<(VecDeque<Parcel>, usize)>,
    news: Notify,
}

impl Outbox {
    /// `false`: there is no room.
    pub(super) fn put(&self, parcel: Parcel) -> bool {
        let (waiting, bytes) = &mut *self.waiting.borrow_mut();
        if waiting.len() >= EVENTS_MAX || *bytes + parcel.bytes() > BYTES_MAX {
            return false;
        }
        *bytes += parcel.bytes();
        waiting.push_back(parcel);
        self.news.notify_one();
        true
    }

    /// The oldest one, when there is one.
    pub(super) async fn take(&self) -> Parcel {
        loop {
            {
                let (waiting, bytes) = &mut *self.waiting.borrow_mut();
                if let Some(parcel) = waiting.pop_front() {
                    *bytes -= parcel.bytes();
                    return parcel;
                }
            }
            self.news.notified().await;
        }
    }

    /// Events that wait.
    pub(super) fn len(&self) -> usize {
        self.waiting.borrow().0.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parcel(bytes: usize) -> Parcel {
        Parcel {
            subject: Bytes::new(),
            publisher_id: 1,
            sequence: 1,
            envelope: vec![0; bytes].into(),
            origin: Origin::default(),
        }
    }

    #[tokio::test]
    async fn both_bounds_hold() {
        let outbox = Outbox::default();
        assert!(outbox.put(parcel(BYTES_MAX - 1)) && outbox.put(parcel(1)));
        assert!(!outbox.put(parcel(1)) && outbox.put(parcel(0)));
        assert_eq!(outbox.take().await.envelope.len(), BYTES_MAX - 1);
        while outbox.len() < EVENTS_MAX {
            assert!(outbox.put(parcel(0)));
        }
        assert!(!outbox.put(parcel(0)));
    }
}
