//! What happened to a pool: the short ring that the protocol can ask for, and the full audit.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use crate::lock::{ClientId, Event, State, Transition};
use crate::protocol::v1::EventRecord;

/// How many events the protocol can ask for (`spec/gpu-memory.md` §3.8).
pub const EVENTS_MAX: usize = 256;

/// How many audit records are kept; older ones are in the log only.
pub const AUDIT_MAX: usize = 4096;

/// Records that the log may lag behind.
const UNLOGGED_MAX: usize = 256;

/// The process at the other end of a socket, as the kernel tells (SO_PEERCRED).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Peer {
    /// Its process id when it connected.
    pub pid: u32,
    /// Its user.
    pub uid: u32,
}

/// The kinds of the short ring.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// A writer was admitted.
    RwConnected,
    /// The writer published.
    Committed,
    /// The writer made its layout durable.
    LayoutCommitted,
    /// The writer left without publishing.
    RwAborted,
    /// The writer left a durable layout.
    RwDisconnected,
    /// Memory was released.
    AllocationsCleared,
    /// An allocation found no memory for the first time.
    AllocationOom,
    /// Ours: memory that a client lent went with it, and what was published in it.
    ContentsLost,
}

impl Kind {
    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::RwConnected => "rw_connected",
            Kind::Committed => "committed",
            Kind::LayoutCommitted => "layout_committed",
            Kind::RwAborted => "rw_aborted",
            Kind::RwDisconnected => "rw_disconnected",
            Kind::AllocationsCleared => "allocations_cleared",
            Kind::AllocationOom => "allocation_oom",
            Kind::ContentsLost => "contents_lost",
        }
    }

    /// The kind that a transition leaves in the ring; readers leave none.
    pub fn of(event: Event) -> Option<Kind> {
        Some(match event {
            Event::RwConnect => Kind::RwConnected,
            Event::RwCommit => Kind::Committed,
            Event::LayoutCommit => Kind::LayoutCommitted,
            Event::RwAbort => Kind::RwAborted,
            Event::RwDisconnect => Kind::RwDisconnected,
            Event::ContentsLost => Kind::ContentsLost,
            Event::RoConnect | Event::RoDisconnect => return None,
        })
    }
}

/// One record of the audit: who, when, what, from where to where.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct AuditRecord {
    /// Milliseconds since 1970.
    pub unix_ms: u64,
    /// The pool.
    pub pool: Arc<str>,
    /// The session.
    pub session: u64,
    /// The process behind it.
    pub peer: Peer,
    /// What was done: a transition's name or a kind of the ring.
    pub what: &'static str,
    /// The state before.
    pub from: State,
    /// The state after.
    pub to: State,
    /// Allocations in the pool, or that were released.
    pub allocation_count: u64,
}

/// The audit of a whole service, for any thread to read.
#[derive(Clone, Debug, Default)]
pub struct Audit {
    records: Arc<Mutex<VecDeque<AuditRecord>>>,
}

impl Audit {
    /// The records that are kept, oldest first.
    pub fn records(&self) -> Vec<AuditRecord> {
        let records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        records.iter().cloned().collect()
    }

    fn push(&self, record: AuditRecord) {
        let mut records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        if records.len() == AUDIT_MAX {
            records.pop_front();
        }
        records.push_back(record);
    }
}

/// When and by whom something was done.
#[derive(Clone, Copy, Debug)]
pub struct Stamp {
    /// Milliseconds since 1970.
    pub unix_ms: u64,
    /// The session.
    pub session: ClientId,
    /// The process behind it.
    pub peer: Peer,
}

/// One pool's history.
pub struct History {
    pool: Arc<str>,
    events: VecDeque<EventRecord>,
    audit: Audit,
    /// What the log has not been told yet.
    unlogged: VecDeque<AuditRecord>,
}

impl History {
    /// An empty history that also writes to a service's audit.
    pub fn new(pool: Arc<str>, audit: Audit) -> History {
        History {
            pool,
            events: VecDeque::with_capacity(EVENTS_MAX),
            audit,
            unlogged: VecDeque::new(),
        }
    }

    /// Writes one record to the log; false if it knows all of them. A line may take longer than all
    /// that it tells of, and nobody who waits for an answer should wait for that; so it says itself
    /// when that was.
    pub fn log(&mut self) -> bool {
        let Some(record) = self.unlogged.pop_front() else {
            return false;
        };
        let AuditRecord {
            unix_ms,
            pool,
            session,
            peer,
            what,
            from,
            to,
            allocation_count,
        } = record;
        tracing::info!(
            pool = &*pool, session, pid = peer.pid, uid = peer.uid, %from, %to,
            allocations = allocation_count, unix_ms, "{what}"
        );
        true
    }

    /// The ring, oldest first.
    pub fn events(&self) -> Vec<EventRecord> {
        self.events.iter().cloned().collect()
    }

    /// Keeps a transition.
    pub fn moved(&mut self, stamp: Stamp, step: Transition, allocation_count: u64) {
        if let Some(kind) = Kind::of(step.event) {
            self.remember(stamp, kind, allocation_count);
        }
        self.write(
            stamp,
            step.event.as_str(),
            step.from,
            step.to,
            allocation_count,
        );
    }

    /// Keeps something that did not move the state.
    pub fn note(&mut self, stamp: Stamp, kind: Kind, state: State, allocation_count: u64) {
        self.remember(stamp, kind, allocation_count);
        self.write(stamp, kind.as_str(), state, state, allocation_count);
    }

    fn remember(&mut self, stamp: Stamp, kind: Kind, allocation_count: u64) {
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
        }
        self.events.push_back(EventRecord {
            kind: kind.as_str().to_owned(),
            allocation_count,
            unix_ms: stamp.unix_ms.into(),
            session: stamp.session.0.into(),
            pid: u64::from(stamp.peer.pid).into(),
        });
    }

    fn write(&mut self, stamp: Stamp, what: &'static str, from: State, to: State, count: u64) {
        let record = AuditRecord {
            unix_ms: stamp.unix_ms,
            pool: Arc::clone(&self.pool),
            session: stamp.session.0,
            peer: stamp.peer,
            what,
            from,
            to,
            allocation_count: count,
        };
        if self.unlogged.len() >= UNLOGGED_MAX {
            self.log();
        }
        self.unlogged.push_back(record.clone());
        self.audit.push(record);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ring_keeps_the_last_and_the_audit_keeps_readers_too() {
        let audit = Audit::default();
        let mut history = History::new("weights".into(), audit.clone());
        let stamp = Stamp {
            unix_ms: 1,
            session: ClientId(7),
            peer: Peer { pid: 9, uid: 0 },
        };
        for count in 0..300 {
            history.note(stamp, Kind::AllocationsCleared, State::Empty, count);
        }
        let events = history.events();
        assert_eq!(events.len(), EVENTS_MAX);
        assert_eq!(
            (events[0].allocation_count, events[255].allocation_count),
            (44, 299)
        );
        let step = Transition {
            client: ClientId(7),
            event: Event::RoConnect,
            from: State::Committed,
            to: State::Ro,
        };
        history.moved(stamp, step, 5);
        assert_eq!(
            history.events().last().map(|e| e.allocation_count),
            Some(299)
        );
        let last = audit.records().pop().expect("a record");
        assert_eq!(
            (last.what, last.from, last.to),
            ("RO_CONNECT", State::Committed, State::Ro)
        );
        assert_eq!(
            (last.session, last.peer.pid, &*last.pool),
            (7, 9, "weights")
        );
    }

    #[test]
    fn the_audit_is_bounded() {
        let audit = Audit::default();
        let mut history = History::new("kv".into(), audit.clone());
        let stamp = Stamp {
            unix_ms: 1,
            session: ClientId(7),
            peer: Peer::default(),
        };
        for _ in 0..AUDIT_MAX + 10 {
            history.note(stamp, Kind::Committed, State::Empty, 0);
        }
        assert_eq!(audit.records().len(), AUDIT_MAX);
    }
}
