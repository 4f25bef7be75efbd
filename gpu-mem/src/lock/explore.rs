//! Exhaustive search: every order of events of up to four clients, to any depth.
//!
//! Clients are interchangeable, so states that differ only in names are one state, and the search
//! ends when no new state appears: what holds in every state found holds after any number of
//! events. A client's life is asking (each type; for ever, for a while, or not at all), holding,
//! committing, making a layout durable, dying unnoticed, being noticed, and coming back as new; and
//! at any moment memory that a client lent may be lost.
//! Time is a rank: waiting clients share one deadline by default and two with
//! `CORELANE_GPU_MEM_EXPLORE_DEADLINES=2`, so every subset of a queue can expire together.

use std::collections::{BTreeSet, HashSet};

use super::*;

const CLIENTS: u64 = 4;
const TYPES: [LockType; 4] = [
    LockType::Rw,
    LockType::Ro,
    LockType::RwOrRo,
    LockType::RwDataOrRw,
];

#[derive(Clone)]
struct World {
    lock: Lock,
    /// Dead, and the lock does not know yet.
    dead: BTreeSet<ClientId>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Act {
    Ask(ClientId, LockType, Option<u64>),
    Commit(ClientId),
    CommitLayout(ClientId),
    Die(ClientId),
    Leave(ClientId),
    Expire(u64),
    Lose,
}

type QueueKey = Vec<(LockType, Option<u64>, bool)>;
type Key = (Option<(Grant, bool)>, usize, usize, bool, bool, QueueKey);

impl World {
    /// The state with the names taken out.
    fn key(&self) -> Key {
        let is_dead = |client: &ClientId| self.dead.contains(client);
        let lock = &self.lock;
        let dead_readers = lock.readers.iter().filter(|client| is_dead(client)).count();
        let queue = lock.waiters.iter();
        (
            lock.writer
                .map(|writer| (writer.grant, is_dead(&writer.client))),
            lock.readers.len(),
            dead_readers,
            lock.committed,
            lock.layout_committed,
            queue
                .map(|w| (w.lock_type, w.deadline_ns, is_dead(&w.client)))
                .collect(),
        )
    }

    fn acts(&self, deadlines: u64) -> Vec<Act> {
        let mut acts = Vec::new();
        for client in (0..CLIENTS).map(ClientId) {
            let waits = self.lock.waiters.contains(client);
            if !waits && self.lock.grant_of(client).is_none() {
                for lock_type in TYPES {
                    acts.push(Act::Ask(client, lock_type, None));
                    acts.extend((0..=deadlines).map(|at| Act::Ask(client, lock_type, Some(at))));
                }
                continue;
            }
            acts.push(Act::Leave(client));
            if !self.dead.contains(&client) {
                acts.push(Act::Die(client));
            }
            if self.lock.grant_of(client).is_some() {
                acts.extend([Act::Commit(client), Act::CommitLayout(client)]);
            }
        }
        acts.extend((1..=deadlines).map(Act::Expire));
        acts.push(Act::Lose);
        acts
    }

    fn act(&mut self, act: Act) -> Vec<Effect> {
        let mut effects = Vec::new();
        let dead = self.dead.clone();
        let pulse: Pulse<'_> = &mut |client| !dead.contains(&client);
        let lock = &mut self.lock;
        match act {
            Act::Ask(client, lock_type, deadline) => {
                let _ = lock.request(client, lock_type, deadline, 0, pulse, &mut effects);
            }
            Act::Commit(client) => {
                let _ = lock.commit(client, pulse, &mut effects);
            }
            Act::CommitLayout(client) => {
                let _ = lock.commit_layout(client, &mut effects);
            }
            Act::Die(client) => {
                self.dead.insert(client);
            }
            Act::Leave(client) => {
                self.dead.remove(&client);
                lock.disconnect(client, pulse, &mut effects);
            }
            Act::Lose => lock.lose_contents(ClientId(CLIENTS), pulse, &mut effects),
            Act::Expire(now) => {
                lock.expire(now, pulse, &mut effects);
                // The clock starts anew at zero.
                lock.waiters.advance(now);
            }
        }
        // Whoever is out of the lock is a new client when it asks again.
        self.dead.retain(|client| {
            self.lock.grant_of(*client).is_some() || self.lock.waiters.contains(*client)
        });
        effects
    }
}

/// What must hold in every state, whatever led to it.
fn check_state(world: &World) {
    let lock = &world.lock;
    lock.assert_sound();
    assert!(
        lock.writer.is_none() || lock.readers.is_empty(),
        "one writer, no reader beside it"
    );
    assert!(
        lock.readers.is_empty() || lock.committed,
        "readers read what is published"
    );
    let writer_waits = lock
        .waiters
        .iter()
        .any(|waiter| waiter.lock_type.counts_as_writer());
    for waiter in lock.waiters.iter() {
        // Stated apart from `grantable`: somebody alive must justify each wait, or the contents.
        let reason = match waiter.lock_type {
            LockType::Rw | LockType::RwDataOrRw => {
                lock.writer.is_some() || !lock.readers.is_empty()
            }
            LockType::Ro => lock.writer.is_some() || writer_waits || !lock.committed,
            LockType::RwOrRo => lock.writer.is_some() || (lock.committed && writer_waits),
        };
        let in_turn = lock.policy.profile == Profile::V2 && writer_waits;
        assert!(
            reason || in_turn,
            "{waiter:?} waits for nobody in {:?}",
            lock.state()
        );
    }
}

/// What must hold of every step.
fn check_step(before: &World, act: Act, effects: &[Effect], after: &World) {
    let published = before.lock.committed;
    let writer_before = before.lock.writer;
    for (index, effect) in effects.iter().enumerate() {
        match *effect {
            Effect::Granted { client, grant } => {
                assert!(!before.dead.contains(&client), "a grant to a dead client");
                assert_eq!(after.lock.grant_of(client), Some(grant));
                if grant == Grant::Ro {
                    assert_eq!(
                        after.lock.waiters.writers(),
                        0,
                        "a reader passed a waiting writer"
                    );
                }
            }
            Effect::Clear(ClearCause::Aborted) => {
                let own = writer_before.is_some_and(|writer| act == Act::Leave(writer.client));
                assert!(
                    own && !published,
                    "{act:?} cleared what was not its own unpublished work"
                );
            }
            Effect::Clear(ClearCause::Lost) => {
                let idle = writer_before.is_none() && before.lock.readers.is_empty();
                assert!(act == Act::Lose && idle, "{act:?} lost what somebody holds");
            }
            Effect::Clear(_) => {
                let heir = effects[index..].iter().find_map(|later| match later {
                    Effect::Granted {
                        client,
                        grant: Grant::Rw,
                    } => Some(*client),
                    _ => None,
                });
                let heir = heir.expect("memory is cleared only for a new writer");
                assert!(
                    !before.dead.contains(&heir),
                    "memory was cleared for a dead client"
                );
            }
            Effect::TimedOut { client, .. } | Effect::Gone { client } => {
                assert_eq!(after.lock.grant_of(client), None);
                assert!(!after.lock.waiters.contains(client));
            }
            Effect::Moved(step) => assert_table(step, after.lock.policy.profile),
        }
    }
    check_nothing_lost(before, act, effects, after);
}

/// What is published or durable goes only when it is cleared, and everybody who is late is told.
fn check_nothing_lost(before: &World, act: Act, effects: &[Effect], after: &World) {
    let published = before.lock.committed;
    let is_clear = |effect: &Effect| matches!(effect, Effect::Clear(_));
    if published && !effects.iter().any(is_clear) {
        assert!(
            after.lock.committed,
            "{act:?} lost published contents without a word"
        );
    }
    let cleared = effects.iter().any(is_clear);
    if before.lock.layout_committed && !cleared {
        assert!(after.lock.layout_committed, "{act:?} lost a durable layout");
    }
    if let Act::Expire(now) = act {
        let late = before
            .lock
            .waiters
            .iter()
            .filter(|w| w.deadline_ns.is_some_and(|d| d <= now));
        let answered = effects
            .iter()
            .filter(|e| matches!(e, Effect::TimedOut { .. }))
            .count();
        assert_eq!(late.count(), answered, "everybody who is late is told");
    }
}

/// The table of `spec/gpu-memory.md` §3.3: every pair that is not listed is wrong.
fn assert_table(step: Transition, profile: Profile) {
    use State::*;
    let listed: &[(State, State)] = match step.event {
        Event::RwConnect => &[(Empty, Rw), (Committed, Rw), (LayoutCommitted, Rw)],
        Event::RwCommit if profile == Profile::V2 => &[(Rw, Ro)],
        Event::RwCommit => &[(Rw, Committed)],
        Event::LayoutCommit => &[(Rw, Rw)],
        Event::RwAbort => &[(Rw, Empty)],
        Event::RwDisconnect => &[(Rw, LayoutCommitted)],
        Event::RoConnect => &[(Committed, Ro), (Ro, Ro)],
        Event::RoDisconnect => &[(Ro, Ro), (Ro, Committed)],
        // Not upstream's: only where clients lend memory of their own.
        Event::ContentsLost => &[(Committed, Empty), (LayoutCommitted, Empty)],
    };
    assert!(
        listed.contains(&(step.from, step.to)),
        "{step:?} is not in the table"
    );
}

/// Searches everything reachable; answers (states, steps).
fn explore(profile: Profile, deadlines: u64) -> (usize, usize) {
    let start = World {
        lock: Lock::new(Policy::of(profile)),
        dead: BTreeSet::new(),
    };
    let mut seen: HashSet<Key> = HashSet::from([start.key()]);
    let mut open = vec![start];
    let mut steps = 0;
    while let Some(world) = open.pop() {
        check_state(&world);
        for act in world.acts(deadlines) {
            let mut next = world.clone();
            let effects = next.act(act);
            check_step(&world, act, &effects, &next);
            steps += 1;
            if seen.insert(next.key()) {
                open.push(next);
            }
        }
    }
    (seen.len(), steps)
}

fn deadlines() -> u64 {
    let word = std::env::var("CORELANE_GPU_MEM_EXPLORE_DEADLINES").unwrap_or_default();
    word.parse().unwrap_or(1)
}

#[test]
fn every_order_of_events_of_four_clients_is_right_in_v1() {
    let (states, steps) = explore(Profile::V1, deadlines());
    println!("v1: {states} states, {steps} steps");
    assert!(states > 10_000, "the search is cut short: {states} states");
}

#[test]
fn every_order_of_events_of_four_clients_is_right_in_v2() {
    let (states, steps) = explore(Profile::V2, deadlines());
    println!("v2: {states} states, {steps} steps");
    assert!(states > 5_000, "the search is cut short: {states} states");
}
