//! Single situations, each named for what it shows. Those marked H are upstream's bugs
//! (`spec/gpu-memory.md`, appendix C), which must not appear here.

use super::*;

/// Drives a lock with everybody alive but the named ones.
struct Stage {
    lock: Lock,
    dead: Vec<u64>,
    now: u64,
}

impl Stage {
    fn new() -> Stage {
        Stage::with(Policy::of(Profile::V1))
    }

    fn with(policy: Policy) -> Stage {
        Stage {
            lock: Lock::new(policy),
            dead: Vec::new(),
            now: 0,
        }
    }

    fn ask_until(&mut self, id: u64, lock_type: LockType, deadline: Option<u64>) -> Vec<Effect> {
        let mut effects = Vec::new();
        let dead = &self.dead;
        let pulse: Pulse<'_> = &mut |client| !dead.contains(&client.0);
        self.lock
            .request(
                ClientId(id),
                lock_type,
                deadline,
                self.now,
                pulse,
                &mut effects,
            )
            .expect("the table has room");
        effects
    }

    fn ask(&mut self, id: u64, lock_type: LockType) -> Vec<Effect> {
        self.ask_until(id, lock_type, None)
    }

    fn leave(&mut self, id: u64) -> Vec<Effect> {
        let mut effects = Vec::new();
        let dead = &self.dead;
        self.lock
            .disconnect(ClientId(id), &mut |c| !dead.contains(&c.0), &mut effects);
        effects
    }

    fn commit(&mut self, id: u64) -> Vec<Effect> {
        let mut effects = Vec::new();
        let dead = &self.dead;
        let pulse: Pulse<'_> = &mut |client| !dead.contains(&client.0);
        self.lock
            .commit(ClientId(id), pulse, &mut effects)
            .expect("a writer may commit");
        effects
    }

    fn commit_layout(&mut self, id: u64) -> Result<(), Denied> {
        self.lock.commit_layout(ClientId(id), &mut Vec::new())
    }

    fn expire(&mut self, now: u64) -> Vec<Effect> {
        self.now = now;
        let mut effects = Vec::new();
        let dead = &self.dead;
        self.lock
            .expire(now, &mut |c| !dead.contains(&c.0), &mut effects);
        effects
    }

    /// A pool with published contents and nobody in it.
    fn published() -> Stage {
        let mut stage = Stage::new();
        stage.ask(100, LockType::Rw);
        stage.commit(100);
        stage
    }

    fn state(&self) -> State {
        self.lock.state()
    }
}

fn grants(effects: &[Effect]) -> Vec<(u64, Grant)> {
    let grant = |effect: &Effect| match effect {
        Effect::Granted { client, grant } => Some((client.0, *grant)),
        _ => None,
    };
    effects.iter().filter_map(grant).collect()
}

fn cleared(effects: &[Effect]) -> bool {
    effects
        .iter()
        .any(|effect| matches!(effect, Effect::Clear(_)))
}

#[test]
fn a_writer_publishes_and_readers_share_until_the_last_leaves() {
    let mut stage = Stage::new();
    assert_eq!(grants(&stage.ask(1, LockType::RwOrRo)), [(1, Grant::Rw)]);
    assert_eq!(stage.state(), State::Rw);
    stage.commit(1);
    assert_eq!(stage.state(), State::Committed);
    assert_eq!(grants(&stage.ask(2, LockType::RwOrRo)), [(2, Grant::Ro)]);
    assert_eq!(grants(&stage.ask(3, LockType::Ro)), [(3, Grant::Ro)]);
    stage.leave(2);
    assert_eq!(stage.state(), State::Ro);
    stage.leave(3);
    assert_eq!(stage.state(), State::Committed);
    assert!(
        stage.leave(1).is_empty(),
        "the writer's close after its commit moves nothing"
    );
}

#[test]
fn an_abort_clears_after_the_transition_and_a_replacement_before_it() {
    let mut stage = Stage::new();
    stage.ask(1, LockType::Rw);
    let effects = stage.leave(1);
    assert!(matches!(
        effects[..],
        [
            Effect::Moved(Transition {
                event: Event::RwAbort,
                ..
            }),
            Effect::Clear(_)
        ]
    ));
    let mut stage = Stage::published();
    let effects = stage.ask(1, LockType::Rw);
    assert_eq!(effects[0], Effect::Clear(ClearCause::ReplacesPublished));
    assert!(matches!(
        effects[1],
        Effect::Moved(Transition {
            event: Event::RwConnect,
            ..
        })
    ));
    assert_eq!(
        effects[2],
        Effect::Granted {
            client: ClientId(1),
            grant: Grant::Rw
        }
    );
}

#[test]
fn both_writers_run_in_order_and_then_all_readers_together() {
    let mut stage = Stage::new();
    stage.ask(0, LockType::Rw);
    stage.ask(1, LockType::Rw);
    stage.ask(2, LockType::Ro);
    stage.ask(3, LockType::Rw);
    stage.ask(4, LockType::RwOrRo);
    assert_eq!(grants(&stage.commit(0)), [(1, Grant::Rw)]);
    assert_eq!(grants(&stage.commit(1)), [(3, Grant::Rw)]);
    assert_eq!(grants(&stage.commit(3)), [(2, Grant::Ro), (4, Grant::Ro)]);
}

#[test]
fn a_waiting_writer_keeps_new_readers_out_until_it_times_out() {
    let mut stage = Stage::published();
    stage.ask(1, LockType::Ro);
    stage.ask_until(2, LockType::Rw, Some(50));
    assert!(stage.ask(3, LockType::Ro).is_empty());
    assert!(stage.ask(4, LockType::RwOrRo).is_empty());
    assert_eq!(stage.lock.next_deadline_ns(), Some(50));
    assert!(stage.expire(49).is_empty());
    let effects = stage.expire(50);
    assert_eq!(
        effects[0],
        Effect::TimedOut {
            client: ClientId(2),
            committed: true
        }
    );
    assert_eq!(grants(&effects), [(3, Grant::Ro), (4, Grant::Ro)]);
}

#[test]
fn rw_or_ro_behind_a_writer_becomes_what_the_writer_leaves() {
    for (commits, expected) in [(true, Grant::Ro), (false, Grant::Rw)] {
        let mut stage = Stage::new();
        stage.ask(1, LockType::Rw);
        stage.ask(2, LockType::RwOrRo);
        let effects = if commits {
            stage.commit(1)
        } else {
            stage.leave(1)
        };
        assert_eq!(grants(&effects), [(2, expected)]);
    }
}

#[test]
fn a_durable_layout_survives_its_writer_and_is_adopted_or_replaced() {
    let mut stage = Stage::new();
    stage.ask(1, LockType::RwDataOrRw);
    assert_eq!(stage.lock.grant_of(ClientId(1)), Some(Grant::Rw));
    stage.commit_layout(1).expect("rw may commit a layout");
    assert_eq!(stage.lock.grant_of(ClientId(1)), Some(Grant::RwData));
    assert_eq!(stage.commit_layout(1), Err(Denied::LayoutCommitted));
    assert_eq!(
        stage.lock.may_commit(ClientId(1)),
        Err(Denied::LayoutCommitted)
    );
    assert!(!cleared(&stage.leave(1)));
    assert_eq!(stage.state(), State::LayoutCommitted);
    assert!(
        stage.ask(2, LockType::Ro).is_empty(),
        "contents are not promised to readers"
    );
    let effects = stage.ask(3, LockType::RwDataOrRw);
    assert!(!cleared(&effects));
    assert_eq!(grants(&effects), [(3, Grant::RwData)]);
    stage.leave(3);
    let effects = stage.ask(4, LockType::Rw);
    assert_eq!(effects[0], Effect::Clear(ClearCause::StartsAnew));
    stage.leave(4);
    assert_eq!(stage.state(), State::Empty);
}

#[test]
fn rw_data_or_rw_replaces_what_is_published() {
    let mut stage = Stage::published();
    let effects = stage.ask(1, LockType::RwDataOrRw);
    assert_eq!(effects[0], Effect::Clear(ClearCause::ReplacesPublished));
    assert_eq!(grants(&effects), [(1, Grant::Rw)]);
}

#[test]
fn h1_a_dead_waiter_never_costs_the_published_weights() {
    let mut stage = Stage::published();
    stage.ask(1, LockType::Ro);
    stage.ask(2, LockType::Rw);
    stage.ask(3, LockType::Ro);
    stage.dead.push(2);
    let effects = stage.leave(1);
    assert!(!cleared(&effects));
    assert_eq!(
        effects[1],
        Effect::Gone {
            client: ClientId(2)
        }
    );
    assert_eq!(
        grants(&effects),
        [(3, Grant::Ro)],
        "whoever waited behind it goes on at once"
    );
}

#[test]
fn h1_a_dead_waiter_is_never_granted_the_lock_for_good() {
    let mut stage = Stage::new();
    stage.ask(1, LockType::Rw);
    stage.ask(2, LockType::Rw);
    stage.ask(3, LockType::Rw);
    stage.dead.push(2);
    assert_eq!(grants(&stage.leave(1)), [(3, Grant::Rw)]);
}

#[test]
fn h2_a_client_that_dies_before_its_own_grant_clears_nothing() {
    let mut stage = Stage::published();
    stage.dead.push(1);
    assert_eq!(
        stage.ask(1, LockType::Rw),
        [Effect::Gone {
            client: ClientId(1)
        }]
    );
    assert_eq!(stage.state(), State::Committed);
}

#[test]
fn h3_no_time_to_wait_is_a_try_lock() {
    let mut stage = Stage::new();
    stage.now = 7;
    assert!(!grants(&stage.ask_until(1, LockType::Rw, Some(7))).is_empty());
    let told = stage.ask_until(2, LockType::Rw, Some(7));
    assert_eq!(
        told,
        [Effect::TimedOut {
            client: ClientId(2),
            committed: false
        }]
    );
    assert_eq!(stage.lock.standing().waiters, 0);
}

#[test]
fn h10_a_guarded_layout_is_not_wiped_by_rw_or_ro() {
    for guard_layout in [false, true] {
        let mut stage = Stage::with(Policy {
            guard_layout,
            ..Policy::of(Profile::V1)
        });
        stage.ask(1, LockType::Rw);
        stage.commit_layout(1).expect("rw may commit a layout");
        stage.leave(1);
        assert_eq!(cleared(&stage.ask(2, LockType::RwOrRo)), !guard_layout);
        if guard_layout {
            assert_eq!(
                grants(&stage.ask(3, LockType::RwDataOrRw)),
                [(3, Grant::RwData)]
            );
        }
    }
}

#[test]
fn lost_contents_are_given_up_when_nobody_holds_them() {
    let mut stage = Stage::published();
    let lose = |stage: &mut Stage| {
        let mut effects = Vec::new();
        stage
            .lock
            .lose_contents(ClientId(100), &mut |_| true, &mut effects);
        effects
    };
    stage.ask(1, LockType::Ro);
    assert!(lose(&mut stage).is_empty(), "a reader holds them");
    stage.leave(1);
    let effects = lose(&mut stage);
    assert_eq!(effects[1], Effect::Clear(ClearCause::Lost));
    assert_eq!(stage.state(), State::Empty);
    assert!(lose(&mut stage).is_empty(), "there is nothing more to lose");
    assert_eq!(grants(&stage.ask(2, LockType::RwOrRo)), [(2, Grant::Rw)]);
    stage.commit_layout(2).expect("rw may commit a layout");
    stage.leave(2);
    assert!(stage.ask(3, LockType::Ro).is_empty());
    assert!(cleared(&lose(&mut stage)));
    assert_eq!(stage.lock.standing().waiters, 1, "a reader waits on");
}

#[test]
fn tables_are_bounded_and_clients_are_known_once() {
    let mut lock = Lock::new(Policy {
        clients_max: 2,
        ..Policy::of(Profile::V1)
    });
    let mut effects = Vec::new();
    let mut ask = |id, lock: &mut Lock| {
        lock.request(
            ClientId(id),
            LockType::Rw,
            None,
            0,
            &mut |_| true,
            &mut effects,
        )
    };
    assert_eq!(ask(1, &mut lock), Ok(()));
    assert_eq!(ask(1, &mut lock), Err(Refusal::AlreadyHere));
    assert_eq!(ask(2, &mut lock), Ok(()));
    assert_eq!(ask(2, &mut lock), Err(Refusal::AlreadyHere));
    assert_eq!(ask(3, &mut lock), Err(Refusal::QueueFull(2)));
}

#[test]
fn in_v2_a_commit_makes_the_writer_a_reader_and_a_fence_keeps_all_out() {
    let mut stage = Stage::with(Policy::of(Profile::V2));
    stage.ask(1, LockType::RwOrRo);
    assert_eq!(stage.lock.fence(), Err(Denied::NotIdle));
    stage.ask(2, LockType::Ro);
    assert_eq!(grants(&stage.commit(1)), [(2, Grant::Ro)]);
    assert_eq!(stage.lock.grant_of(ClientId(1)), Some(Grant::Ro));
    stage.leave(1);
    stage.leave(2);
    stage.lock.fence().expect("nobody is here");
    let mut effects = Vec::new();
    let asked = stage.lock.request(
        ClientId(3),
        LockType::Ro,
        None,
        0,
        &mut |_| true,
        &mut effects,
    );
    assert_eq!(asked, Err(Refusal::Fenced));
    stage.lock.unfence();
    assert_eq!(grants(&stage.ask(3, LockType::Ro)), [(3, Grant::Ro)]);
}

#[test]
fn words_are_read_as_they_are_written() {
    for lock_type in [
        LockType::Rw,
        LockType::Ro,
        LockType::RwOrRo,
        LockType::RwDataOrRw,
    ] {
        assert_eq!(LockType::parse(lock_type.as_str()), Some(lock_type));
    }
    for grant in [Grant::Rw, Grant::RwData, Grant::Ro] {
        assert_eq!(Grant::parse(grant.as_str()), Some(grant));
    }
    let states = [
        State::Empty,
        State::Rw,
        State::Committed,
        State::Ro,
        State::LayoutCommitted,
    ];
    for state in states {
        assert_eq!(State::parse(state.as_str()), Some(state));
    }
    assert_eq!(
        LockType::parse("rw_data"),
        None,
        "rw_data is never asked for by name"
    );
}
