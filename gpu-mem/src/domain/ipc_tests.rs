//! Lent memory without a driver: handles are opaque here, and owners are processes that sleep.

use std::process::{Child, Command};

use super::tests::{Stage, granted_to, is_error};
use crate::history::Peer;
use crate::ipc::HANDLE_BYTES;
use crate::lock::{ClientId, Grant, LockType, State};
use crate::protocol::v1::{
    AllocateRequest, Bytes, CommitLayoutRequest, CommitRequest, GetAllocationStateRequest,
    GetEventHistoryRequest, GetMemoryLayoutHashRequest, GetRuntimeStateRequest, HandshakeRequest,
    IpcListRequest, IpcOfferRequest, IpcOpenRequest, IpcStateRequest, IpcWithdrawRequest,
    ListAllocationsRequest, Reply,
};
use crate::stats::Counter;

/// A process that lends memory; killed when this is dropped.
struct Owner(Child);

impl Owner {
    fn new() -> Owner {
        let mut sleep = Command::new("sleep");
        Owner(sleep.arg("600").spawn().expect("it starts"))
    }

    fn die(&mut self) {
        self.0.kill().expect("ours");
        self.0.wait().expect("ours");
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn offer(size: i128) -> IpcOfferRequest {
    IpcOfferRequest {
        handle: Bytes(vec![9; HANDLE_BYTES]),
        base_bytes: 4 << 20,
        offset_bytes: 512,
        size,
        tag: "weights".into(),
        value: Bytes(b"words".to_vec()),
    }
}

impl Stage {
    /// A session of a process.
    fn enter(&mut self, id: u64, pid: u32, lock_type: LockType) -> Vec<(u64, Reply)> {
        self.domain.connect(ClientId(id), Peer { pid, uid: 0 });
        let timeout_ms = None;
        self.say(
            id,
            HandshakeRequest {
                lock_type,
                timeout_ms,
            },
        )
    }

    /// A published layout whose memory is this owner's; answers its id.
    fn lent(&mut self, id: u64, owner: &Owner) -> String {
        self.enter(id, owner.0.id(), LockType::Rw);
        let Reply::IpcOffer(taken) = self.ask(id, offer(100)) else {
            panic!("it is not taken")
        };
        assert_eq!(taken.slot, 0);
        assert!(matches!(self.ask(id, CommitRequest {}), Reply::Commit(_)));
        taken.allocation_id
    }

    fn handle(&mut self, id: u64, allocation: &str) -> Reply {
        let allocation_id = allocation.to_owned();
        self.ask(id, IpcOpenRequest { allocation_id })
    }

    /// The first and only message of a connection.
    fn is_held(&mut self, id: u64, allocation: &str) -> (bool, u64) {
        self.domain.connect(ClientId(id), Peer::default());
        let allocation_id = allocation.to_owned();
        match self.ask(id, IpcStateRequest { allocation_id }) {
            Reply::IpcState(state) => (state.held, state.holders),
            other => panic!("{other:?}"),
        }
    }

    fn hash(&mut self, id: u64) -> String {
        match self.ask(id, GetMemoryLayoutHashRequest {}) {
            Reply::LayoutHash(hash) => hash.memory_layout_hash,
            other => panic!("{other:?}"),
        }
    }
}

const READER: u32 = 4_000_000;

#[test]
fn a_reader_gets_the_handle_and_a_writer_waits_until_it_has_left() {
    let (mut stage, owner) = (Stage::new(), Owner::new());
    let id = stage.lent(1, &owner);
    assert_eq!(stage.is_held(10, &id), (true, 0));
    stage.enter(2, READER, LockType::Ro);
    let Reply::IpcOpen(opened) = stage.handle(2, &id) else {
        panic!("a reader may open it")
    };
    assert_eq!(opened.handle.0, vec![9; HANDLE_BYTES]);
    assert_eq!(opened.value.0, b"words");
    let entry = &opened.entry;
    assert_eq!((entry.size, entry.offset_bytes), (100, 512));
    assert_eq!(entry.exporter_pid, u64::from(owner.0.id()));
    assert_eq!(stage.is_held(11, &id), (true, 1));
    assert!(stage.enter(3, READER, LockType::Rw).is_empty(), "it waits");
    assert_eq!(granted_to(&stage.leave(2)), [(3, Some(Grant::Rw))]);
    assert_eq!(stage.is_held(12, &id), (false, 0), "now it may be freed");
    assert!(is_error(&stage.handle(3, &id), "Unknown allocation"));
    assert_eq!(stage.stats.get(Counter::IpcOpens), 1);
}

#[test]
fn only_the_writer_lends_and_its_own_process_opens_nothing() {
    let (mut stage, owner) = (Stage::new(), Owner::new());
    let id = stage.lent(1, &owner);
    stage.enter(2, READER, LockType::Ro);
    let allocation_id = id.clone();
    assert!(is_error(&stage.ask(2, offer(1)), "not allowed"));
    let withdraw = IpcWithdrawRequest { allocation_id };
    assert!(is_error(&stage.ask(2, withdraw), "not allowed"));
    // The owner came back as a reader.
    stage.enter(3, owner.0.id(), LockType::Ro);
    assert!(is_error(&stage.handle(3, &id), "not allowed"));
    // Without the lock nothing is said.
    stage.domain.connect(ClientId(4), Peer::default());
    assert!(is_error(&stage.handle(4, &id), "Expected HandshakeRequest"));
    let allocation_id = id;
    let inside = stage.ask(2, IpcStateRequest { allocation_id });
    assert!(
        is_error(&inside, "not allowed"),
        "that is asked from outside"
    );
}

#[test]
fn offers_that_make_no_sense_are_errors_and_nothing_is_lent() {
    let (mut stage, owner) = (Stage::new(), Owner::new());
    stage.enter(1, owner.0.id(), LockType::Rw);
    for size in [0, -1, 4 << 20, i128::from(u64::MAX)] {
        assert!(
            is_error(&stage.ask(1, offer(size)), "out of range"),
            "{size}"
        );
    }
    for bytes in [0, 63, 65] {
        let handle = Bytes(vec![1; bytes]);
        let odd = IpcOfferRequest { handle, ..offer(1) };
        assert!(is_error(&stage.ask(1, odd), "64 bytes"), "{bytes}");
    }
    let list = stage.ask(1, IpcListRequest { tag: None });
    assert!(matches!(list, Reply::IpcList(list) if list.allocations.is_empty()));
    stage.leave(1);
    // A process that the service cannot see could die unnoticed.
    stage.enter(2, 0, LockType::Rw);
    assert!(is_error(&stage.ask(2, offer(1)), "cannot see"));
    // One that dies while it lends has lent nothing.
    stage.leave(2);
    stage.enter(3, owner.0.id(), LockType::Rw);
    stage.dead.push(3);
    assert!(is_error(&stage.ask(3, offer(1)), "cannot see"));
}

#[test]
fn offers_are_listed_by_word_and_taken_back() {
    let (mut stage, owner) = (Stage::new(), Owner::new());
    stage.enter(1, owner.0.id(), LockType::Rw);
    let tag = "kv".to_owned();
    let other = IpcOfferRequest { tag, ..offer(1) };
    let Reply::IpcOffer(first) = stage.ask(1, offer(1)) else {
        panic!("it is taken")
    };
    assert!(matches!(stage.ask(1, other), Reply::IpcOffer(taken) if taken.slot == 1));
    let mut count = |tag: Option<&str>| {
        let tag = tag.map(str::to_owned);
        match stage.ask(1, IpcListRequest { tag }) {
            Reply::IpcList(list) => list.allocations.len(),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(
        (count(None), count(Some("kv")), count(Some("x"))),
        (2, 1, 0)
    );
    let allocation_id = first.allocation_id;
    let withdraw = IpcWithdrawRequest { allocation_id };
    for success in [true, false] {
        let done = stage.ask(1, withdraw.clone());
        assert!(matches!(done, Reply::IpcWithdraw(done) if done.success == success));
    }
}

/// Stock peers see a pool in which nothing is lent: no message, no field, no allocation more.
#[test]
fn who_does_not_ask_sees_nothing_of_it_but_another_hash() {
    let (mut stage, owner) = (Stage::new(), Owner::new());
    stage.lent(1, &owner);
    stage.enter(2, READER, LockType::Ro);
    let listed = stage.ask(2, ListAllocationsRequest { tag: None });
    assert!(matches!(listed, Reply::ListAllocations(list) if list.allocations.is_empty()));
    let counted = stage.ask(2, GetAllocationStateRequest {});
    assert!(matches!(counted, Reply::AllocationState(state) if state.allocation_count == 0));
    let hash = stage.hash(2);
    stage.leave(2);
    // The same shape once more is another layout: what it lends is other memory.
    stage.lent(3, &owner);
    stage.enter(4, READER, LockType::Ro);
    assert_ne!(stage.hash(4), hash);
    stage.leave(4);
    // A layout that lends nothing has upstream's hash.
    stage.enter(5, READER, LockType::Rw);
    stage.ask(5, CommitRequest {});
    stage.enter(6, READER, LockType::Ro);
    assert!(stage.hash(6).starts_with("e3b0c442"));
}

#[test]
fn a_dead_owner_is_named_and_its_layout_goes_with_the_last_reader() {
    let (mut stage, mut owner) = (Stage::new(), Owner::new());
    let id = stage.lent(1, &owner);
    stage.enter(2, READER, LockType::Ro);
    owner.die();
    assert!(is_error(&stage.handle(2, &id), "lost"));
    // Another reader comes in beside it, and is told the same.
    let beside = stage.enter(3, READER, LockType::RwOrRo);
    assert_eq!(granted_to(&beside), [(3, Some(Grant::Ro))]);
    assert!(is_error(&stage.handle(3, &id), "lost"));
    stage.leave(2);
    assert_eq!(stage.domain.standing().state, State::Ro);
    stage.leave(3);
    assert_eq!(stage.domain.standing().state, State::Empty);
    assert_eq!(stage.stats.get(Counter::ContentsLost), 1);
    let kinds = stage.kinds();
    assert_eq!(
        kinds[kinds.len() - 2..],
        ["contents_lost", "allocations_cleared"]
    );
    let next = stage.enter(4, READER, LockType::RwOrRo);
    assert_eq!(granted_to(&next), [(4, Some(Grant::Rw))]);
}

#[test]
fn a_dead_owner_is_seen_by_whoever_asks_first() {
    for probe in [false, true] {
        let (mut stage, mut owner) = (Stage::new(), Owner::new());
        stage.lent(1, &owner);
        owner.die();
        if probe {
            stage.domain.connect(ClientId(2), Peer::default());
            let state = stage.ask(2, GetRuntimeStateRequest {});
            assert!(matches!(state, Reply::RuntimeState(now) if now.state == State::Empty));
        } else {
            let next = stage.enter(2, READER, LockType::RwOrRo);
            assert_eq!(granted_to(&next), [(2, Some(Grant::Rw))]);
        }
        stage.domain.connect(ClientId(3), Peer::default());
        let history = stage.ask(3, GetEventHistoryRequest {});
        let Reply::EventHistory(history) = history else {
            panic!("{history:?}")
        };
        assert!(
            history
                .events
                .iter()
                .any(|event| event.kind == "contents_lost")
        );
    }
}

#[test]
fn a_durable_layout_is_adopted_with_its_handles_and_lost_with_their_owner() {
    let (mut stage, mut owner) = (Stage::new(), Owner::new());
    stage.enter(1, owner.0.id(), LockType::Rw);
    let Reply::IpcOffer(taken) = stage.ask(1, offer(1)) else {
        panic!("it is taken")
    };
    stage.ask(1, CommitLayoutRequest {});
    assert!(is_error(&stage.ask(1, offer(1)), "not allowed"));
    stage.leave(1);
    let adopted = stage.enter(2, READER, LockType::RwDataOrRw);
    assert_eq!(granted_to(&adopted), [(2, Some(Grant::RwData))]);
    let opened = stage.handle(2, &taken.allocation_id);
    assert!(
        matches!(opened, Reply::IpcOpen(_)),
        "an adopter may open it"
    );
    owner.die();
    stage.leave(2);
    let next = stage.enter(3, READER, LockType::RwDataOrRw);
    assert_eq!(
        granted_to(&next),
        [(3, Some(Grant::Rw))],
        "there is nothing to adopt"
    );
}

/// A layout of both kinds: the service's part is never lost, the lent part is refused by name.
#[test]
fn a_mixed_layout_keeps_what_the_service_owns() {
    let (mut stage, mut owner) = (Stage::new(), Owner::new());
    stage.enter(1, owner.0.id(), LockType::Rw);
    let (size, tag) = (1, "t".into());
    stage.ask(1, AllocateRequest { size, tag });
    let Reply::IpcOffer(taken) = stage.ask(1, offer(1)) else {
        panic!("it is taken")
    };
    stage.ask(1, CommitRequest {});
    owner.die();
    let next = stage.enter(2, READER, LockType::RwOrRo);
    assert_eq!(granted_to(&next), [(2, Some(Grant::Ro))]);
    assert!(is_error(&stage.handle(2, &taken.allocation_id), "lost"));
    stage.leave(2);
    assert_eq!(stage.domain.standing().state, State::Committed);
    assert_eq!(stage.domain.usage().0, 1);
}

/// What the pool itself owns never goes with anybody.
#[test]
fn a_writers_death_costs_nothing_that_the_service_owns() {
    let (mut stage, mut writer) = (Stage::new(), Owner::new());
    stage.enter(1, writer.0.id(), LockType::Rw);
    let (size, tag) = (1, "t".into());
    let made = stage.ask(1, AllocateRequest { size, tag });
    assert!(matches!(made, Reply::Allocate(_)));
    stage.ask(1, CommitRequest {});
    writer.die();
    stage.enter(2, READER, LockType::Ro);
    stage.leave(2);
    assert_eq!(stage.domain.standing().state, State::Committed);
    assert_eq!(stage.domain.usage().0, 1);
}
