//! The pool without sockets: messages in, actions out, time by hand.

use super::*;
use crate::backend::host::{GRANULARITY_BYTES, HostBackend, HostConfig};
use crate::protocol::frame::{Cut, REPLY_BYTES_MAX, cut};
use crate::protocol::v1::{
    AllocateRequest, Bytes, ClearAllRequest, CommitLayoutRequest, CommitRequest, ErrorResponse,
    ExportAllocationRequest, ExportRequest, FreeAllocationRequest, GetRuntimeStateRequest,
    HandshakeRequest, HandshakeResponse, MetadataGetRequest, MetadataListRequest,
    MetadataPutRequest, Reply, Request,
};

pub(super) struct Stage {
    pub(super) domain: Domain,
    pub(super) stats: Arc<Stats>,
    now_ns: u64,
    pub(super) dead: Vec<u64>,
    closed: Vec<u64>,
    descriptors: usize,
}

const MS: u64 = 1_000_000;

impl Stage {
    pub(super) fn new() -> Stage {
        Stage::over(HostConfig::default())
    }

    fn over(host: HostConfig) -> Stage {
        Stage::on(HostBackend::new(host).expect("sane"))
    }

    fn on(backend: HostBackend) -> Stage {
        let stats = Arc::new(Stats::default());
        let config = DomainConfig::new(Profile::V1, "GPU-x", "weights");
        let audit = Audit::default();
        let (stats_too, discarded) = (Arc::clone(&stats), Discarded::default());
        let domain = Domain::new(config, Box::new(backend), stats_too, audit, discarded);
        Stage {
            domain,
            stats,
            now_ns: 0,
            dead: vec![],
            closed: vec![],
            descriptors: 0,
        }
    }

    pub(super) fn turn(
        &mut self,
        act: impl FnOnce(&mut Domain, &mut Turn<'_>),
    ) -> Vec<(u64, Reply)> {
        let mut actions = Vec::new();
        let dead = &self.dead;
        let pulse: Pulse<'_> = &mut |client| !dead.contains(&client.0);
        let (now_ns, unix_ms) = (self.now_ns, 0);
        act(
            &mut self.domain,
            &mut Turn {
                now_ns,
                unix_ms,
                pulse,
                actions: &mut actions,
            },
        );
        let mut replies = Vec::new();
        for action in actions {
            match action {
                Action::Send {
                    client,
                    frame,
                    descriptor,
                } => {
                    self.descriptors += usize::from(descriptor.is_some());
                    let Cut::Frame(payload) = cut(&frame, REPLY_BYTES_MAX) else {
                        panic!()
                    };
                    replies.push((client.0, Reply::decode(payload).expect("a reply")));
                }
                Action::Close { client } => self.closed.push(client.0),
            }
        }
        replies
    }

    pub(super) fn say(&mut self, id: u64, request: impl Into<Request>) -> Vec<(u64, Reply)> {
        let frame = request.into().encode();
        self.turn(|domain, turn| {
            assert_eq!(domain.message(ClientId(id), &frame[4..], turn), None);
        })
    }

    /// Says something that has exactly one answer.
    pub(super) fn ask(&mut self, id: u64, request: impl Into<Request>) -> Reply {
        let mut replies = self.say(id, request);
        assert_eq!(replies.len(), 1, "{replies:?}");
        let (to, reply) = replies.remove(0);
        assert_eq!(to, id);
        reply
    }

    pub(super) fn open(&mut self, id: u64, lock_type: LockType) -> Vec<(u64, Reply)> {
        self.domain.connect(ClientId(id), Peer::default());
        self.say(
            id,
            HandshakeRequest {
                lock_type,
                timeout_ms: None,
            },
        )
    }

    pub(super) fn leave(&mut self, id: u64) -> Vec<(u64, Reply)> {
        self.turn(|domain, turn| domain.disconnect(ClientId(id), turn))
    }

    fn pass(&mut self, ns: u64) -> Vec<(u64, Reply)> {
        self.now_ns += ns;
        self.turn(|domain, turn| domain.tick(turn))
    }

    fn allocate(&mut self, id: u64, size: i128) -> Reply {
        self.ask(
            id,
            AllocateRequest {
                size,
                tag: "t".into(),
            },
        )
    }

    /// Asks for memory that may not be there.
    fn starve(&mut self, id: u64) -> Vec<(u64, Reply)> {
        let (size, tag) = (1, "t".into());
        self.say(id, AllocateRequest { size, tag })
    }

    fn id_of(reply: Reply) -> String {
        match reply {
            Reply::Allocate(made) => made.allocation_id,
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn kinds(&self) -> Vec<String> {
        self.domain
            .history
            .events()
            .into_iter()
            .map(|event| event.kind)
            .collect()
    }
}

pub(super) fn is_error(reply: &Reply, word: &str) -> bool {
    matches!(reply, Reply::Error(ErrorResponse { error, .. }) if error.contains(word))
}

pub(super) fn granted_to(replies: &[(u64, Reply)]) -> Vec<(u64, Option<Grant>)> {
    let grant = |(id, reply): &(u64, Reply)| match reply {
        Reply::Handshake(HandshakeResponse {
            granted_lock_type, ..
        }) => Some((*id, *granted_lock_type)),
        _ => None,
    };
    replies.iter().filter_map(grant).collect()
}

#[test]
fn a_writer_builds_publishes_and_a_reader_gets_descriptors() {
    let mut stage = Stage::new();
    assert_eq!(
        granted_to(&stage.open(1, LockType::RwOrRo)),
        [(1, Some(Grant::Rw))]
    );
    let id = Stage::id_of(stage.allocate(1, 10));
    let key = "layer.0".to_owned();
    let put = |offset_bytes| MetadataPutRequest {
        key: key.clone(),
        allocation_id: id.clone(),
        offset_bytes,
        value: Bytes(b"v".to_vec()),
    };
    assert!(is_error(
        &stage.ask(1, put(GRANULARITY_BYTES.into())),
        "out of range"
    ));
    assert!(matches!(stage.ask(1, put(5)), Reply::MetadataPut(_)));
    assert!(matches!(stage.ask(1, CommitRequest {}), Reply::Commit(_)));
    assert_eq!(stage.closed, [1], "the server closes after a commit");
    stage.open(2, LockType::Ro);
    let Reply::MetadataGet(got) = stage.ask(2, MetadataGetRequest { key: key.clone() }) else {
        panic!()
    };
    assert_eq!(
        (got.allocation_id.as_deref(), got.offset_bytes),
        (Some(id.as_str()), Some(5))
    );
    let export = ExportAllocationRequest {
        allocation_id: id.clone(),
    };
    assert!(matches!(stage.ask(2, export), Reply::ExportAllocation(_)));
    let export = ExportRequest { allocation_id: id };
    assert!(matches!(stage.ask(2, export), Reply::GetAllocation(_)));
    assert_eq!(stage.descriptors, 2);
    assert!(is_error(&stage.allocate(2, 10), "not allowed"));
    assert!(is_error(&stage.ask(2, CommitRequest {}), "not allowed"));
    assert!(is_error(
        &stage.ask(
            2,
            ExportRequest {
                allocation_id: "?".into()
            }
        ),
        "Unknown alloc"
    ));
    assert_eq!(stage.closed, [1], "the reader's session goes on");
}

#[test]
fn an_abort_records_two_events_and_a_replacement_records_them_in_its_order() {
    let mut stage = Stage::new();
    stage.open(1, LockType::Rw);
    stage.leave(1);
    assert_eq!(
        stage.kinds(),
        ["rw_connected", "rw_aborted", "allocations_cleared"]
    );
    stage.open(2, LockType::Rw);
    stage.allocate(2, 10);
    stage.ask(2, CommitRequest {});
    stage.open(3, LockType::Rw);
    assert_eq!(
        stage.kinds()[3..],
        [
            "rw_connected",
            "committed",
            "allocations_cleared",
            "rw_connected"
        ]
    );
    let counts: Vec<_> = stage
        .domain
        .history
        .events()
        .iter()
        .map(|e| e.allocation_count)
        .collect();
    assert_eq!(counts[3..], [0, 1, 1, 0]);
    assert_eq!(stage.domain.usage(), (0, 0));
}

#[test]
fn a_durable_layout_is_adopted_with_its_ids_and_hash() {
    let mut stage = Stage::new();
    stage.open(1, LockType::RwDataOrRw);
    let id = Stage::id_of(stage.allocate(1, 10));
    let Reply::CommitLayout(sealed) = stage.ask(1, CommitLayoutRequest {}) else {
        panic!()
    };
    assert_eq!(sealed.granted_lock_type, Some(Grant::RwData));
    for request in [
        Request::from(CommitRequest {}),
        CommitLayoutRequest {}.into(),
    ] {
        assert!(is_error(&stage.ask(1, request), "layout is committed"));
    }
    assert!(is_error(&stage.allocate(1, 10), "not allowed"));
    stage.leave(1);
    assert_eq!(
        granted_to(&stage.open(2, LockType::RwDataOrRw)),
        [(2, Some(Grant::RwData))]
    );
    let export = ExportAllocationRequest { allocation_id: id };
    assert!(matches!(stage.ask(2, export), Reply::ExportAllocation(_)));
    assert_eq!(stage.domain.layout_hash, sealed.memory_layout_hash);
    stage.leave(2);
    stage.open(3, LockType::Rw);
    assert_eq!(
        (stage.domain.usage().0, stage.domain.layout_hash.as_str()),
        (0, "")
    );
    assert_eq!(
        stage.kinds(),
        [
            "rw_connected",
            "layout_committed",
            "rw_disconnected",
            "rw_connected",
            "rw_disconnected",
            "rw_connected"
        ]
    );
}

#[test]
fn memory_that_is_short_is_waited_for_and_recorded_once() {
    let host = HostConfig {
        capacity_bytes: Some(GRANULARITY_BYTES),
        ..HostConfig::default()
    };
    let backend = HostBackend::new(host).expect("sane");
    let mut other = backend.clone();
    let hog = other.create(GRANULARITY_BYTES).expect("memory");
    let mut stage = Stage::on(backend);
    stage.open(1, LockType::Rw);
    assert!(stage.starve(1).is_empty());
    assert!(stage.domain.is_busy(ClientId(1)));
    assert_eq!(stage.domain.next_deadline_ns(), Some(500 * MS));
    assert!(stage.pass(500 * MS).is_empty());
    drop(hog);
    assert!(matches!(
        stage.pass(500 * MS)[..],
        [(1, Reply::Allocate(_))]
    ));
    assert!(!stage.domain.is_busy(ClientId(1)));
    assert!(stage.starve(1).is_empty());
    let mut answers = Vec::new();
    while answers.is_empty() {
        answers = stage.pass(500 * MS);
        assert!(stage.now_ns <= 61_000 * MS, "the wait has no end");
    }
    assert!(is_error(&answers[0].1, "Timed out"));
    assert_eq!(
        stage
            .kinds()
            .iter()
            .filter(|kind| *kind == "allocation_oom")
            .count(),
        2
    );
    assert!(stage.starve(1).is_empty());
    stage.leave(1);
    assert_eq!(
        stage.domain.next_deadline_ns(),
        None,
        "nobody starves any more"
    );
    assert_eq!(stage.stats.get(Counter::Aborts), 1);
}

#[test]
fn sizes_that_make_no_sense_are_errors_and_nothing_is_made() {
    let mut stage = Stage::new();
    stage.open(1, LockType::Rw);
    assert!(is_error(&stage.allocate(1, 0), "size must be > 0"));
    assert!(is_error(&stage.allocate(1, -5), "size must be > 0"));
    assert!(is_error(
        &stage.allocate(1, u64::MAX.into()),
        "out of range"
    ));
    assert_eq!(stage.domain.usage(), (0, 0));
    assert_eq!(stage.domain.lock.state(), crate::lock::State::Rw);
}

#[test]
fn d0_frees_and_clears_on_the_same_socket() {
    let mut stage = Stage::new();
    stage.open(1, LockType::Rw);
    let id = Stage::id_of(stage.allocate(1, 10));
    stage.allocate(1, 10);
    let free = || crate::protocol::v1::FreeRequest {
        allocation_id: id.clone(),
    };
    assert!(matches!(stage.ask(1, free()), Reply::Free(freed) if freed.success));
    assert!(matches!(stage.ask(1, free()), Reply::Free(freed) if !freed.success));
    let unknown = FreeAllocationRequest {
        allocation_id: id.clone(),
    };
    assert!(matches!(stage.ask(1, unknown), Reply::FreeAllocation(freed) if !freed.success));
    let cleared = stage.ask(1, ClearAllRequest {});
    assert!(matches!(cleared, Reply::ClearAll(cleared) if cleared.cleared_count == 1));
}

#[test]
fn what_is_no_message_costs_the_session_and_what_is_out_of_place_does_not() {
    let mut stage = Stage::new();
    stage.open(1, LockType::Rw);
    let handshake = HandshakeRequest {
        lock_type: LockType::Rw,
        timeout_ms: None,
    };
    assert!(is_error(&stage.ask(1, handshake), "not allowed"));
    assert!(is_error(
        &stage.ask(1, GetRuntimeStateRequest {}),
        "not allowed"
    ));
    let reply = Reply::from(ErrorResponse {
        error: "x".into(),
        code: 0,
    })
    .encode();
    let answer = stage.turn(|domain, turn| {
        domain.message(ClientId(1), &reply[4..], turn);
    });
    assert!(is_error(&answer[0].1, "not allowed"));
    assert!(stage.closed.is_empty());
    let silence = stage.turn(|domain, turn| {
        domain.message(ClientId(1), b"\x91", turn);
    });
    assert!(silence.is_empty());
    assert_eq!(stage.closed, [1]);
    assert_eq!(stage.domain.lock.state(), crate::lock::State::Empty);
    stage.domain.connect(ClientId(2), Peer::default());
    assert!(is_error(
        &stage.ask(2, CommitRequest {}),
        "Expected HandshakeRequest"
    ));
    assert_eq!(stage.closed, [1, 2]);
}

#[test]
fn a_stop_answers_waiters_and_closes_everybody() {
    let mut stage = Stage::new();
    stage.open(1, LockType::Rw);
    stage.allocate(1, 1);
    assert!(stage.open(2, LockType::Rw).is_empty());
    let told = stage.turn(|domain, turn| domain.stop(turn));
    assert_eq!(granted_to(&told), [(2, None)]);
    stage.closed.sort_unstable();
    assert_eq!(stage.closed, [1, 2]);
    assert_eq!(stage.domain.usage(), (0, 0));
}

#[test]
fn a_dead_waiter_costs_nothing_and_is_counted() {
    let mut stage = Stage::new();
    stage.open(1, LockType::Rw);
    stage.allocate(1, 1);
    stage.ask(1, CommitRequest {});
    stage.open(2, LockType::Ro);
    stage.open(3, LockType::Rw);
    stage.open(4, LockType::Ro);
    stage.dead.push(3);
    assert_eq!(granted_to(&stage.leave(2)), [(4, Some(Grant::Ro))]);
    assert_eq!(
        (
            stage.domain.usage().0,
            stage.stats.get(Counter::WaitersGone)
        ),
        (1, 1)
    );
}

#[test]
fn a_commit_is_answered_before_its_heir_and_what_was_cleared_makes_room_for_more() {
    let mut stage = Stage::over(HostConfig {
        capacity_bytes: Some(GRANULARITY_BYTES),
        ..HostConfig::default()
    });
    stage.open(1, LockType::Rw);
    stage.allocate(1, 1);
    assert!(stage.open(2, LockType::Rw).is_empty(), "it waits");
    let replies = stage.say(1, CommitRequest {});
    assert!(
        matches!(
            replies.as_slice(),
            [(1, Reply::Commit(_)), (2, Reply::Handshake(_))]
        ),
        "{replies:?}"
    );
    assert_eq!(
        (stage.closed.as_slice(), stage.domain.usage()),
        (&[1][..], (0, 0))
    );
    Stage::id_of(stage.allocate(2, 1));
    assert!(stage.leave(2).is_empty());
    // A line for each record of the history.
    let mut lines = 0;
    while stage.domain.log() {
        lines += 1;
    }
    assert!(lines > 4, "{lines}");
    stage.open(3, LockType::Rw);
    Stage::id_of(stage.allocate(3, 1));
    assert_eq!(stage.stats.get(Counter::AllocationOom), 0);
}

#[test]
fn what_was_cleared_goes_as_it_is_asked_for_and_all_of_it_before_a_shortage() {
    let backend = HostBackend::new(HostConfig {
        capacity_bytes: Some(4 * GRANULARITY_BYTES),
        populate_bytes_max: 0,
        ..HostConfig::default()
    })
    .expect("sane");
    let mut stage = Stage::on(backend.clone());
    let granularity = i128::from(GRANULARITY_BYTES);
    stage.open(1, LockType::Rw);
    for _ in 0..3 {
        Stage::id_of(stage.allocate(1, granularity));
    }
    stage.leave(1);
    assert_eq!(stage.domain.usage(), (0, 0));
    let used = || backend.used_bytes() / GRANULARITY_BYTES;
    assert_eq!(used(), 3, "nothing has gone yet");
    stage.open(2, LockType::Rw);
    Stage::id_of(stage.allocate(2, granularity));
    assert_eq!(used(), 3, "one for another");
    Stage::id_of(stage.allocate(2, 3 * granularity));
    assert_eq!(used(), 4);
    // Of another pool's: what it cleared is not short here.
    stage.leave(2);
    let mut other = Stage::on(backend.clone());
    other.domain.discarded = stage.domain.discarded.clone();
    other.open(3, LockType::Rw);
    Stage::id_of(other.allocate(3, 2 * granularity));
    assert_eq!(other.stats.get(Counter::AllocationOom), 0);
    while other.domain.discarded.free_one() {}
    assert_eq!(used(), 2, "the rest goes by itself");
}

#[test]
fn an_answer_that_nobody_can_read_is_an_error_and_a_part_of_it_is_not() {
    let mut stage = Stage::new();
    stage.open(1, LockType::Rw);
    let id = Stage::id_of(stage.allocate(1, 1));
    let long = "k".repeat(900 << 10);
    for number in 0..75 {
        stage.ask(
            1,
            MetadataPutRequest {
                key: format!("{number:02}{long}"),
                allocation_id: id.clone(),
                offset_bytes: 0,
                value: Bytes(Vec::new()),
            },
        );
    }
    let list = |stage: &mut Stage, prefix: &str| {
        let prefix = prefix.to_owned();
        stage.ask(1, MetadataListRequest { prefix })
    };
    let all = list(&mut stage, "");
    assert!(
        matches!(&all, Reply::Error(error) if error.error.contains("prefix")),
        "an answer"
    );
    assert!(matches!(list(&mut stage, "0"), Reply::MetadataList(some) if some.keys.len() == 10));
}
