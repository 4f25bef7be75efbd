//! Long random runs beside a reference model that was written from the specification's sentences
//! and shares nothing with the machine: it keeps one list of people and asks questions of it.

use proptest::prelude::*;

use super::*;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    Waits(LockType, Option<u64>),
    Holds(Grant),
}

/// People in order of arrival, and two facts about the memory.
#[derive(Debug, Default)]
struct Model {
    people: Vec<(ClientId, Phase)>,
    published: bool,
    durable: bool,
    dead: BTreeSet<ClientId>,
    /// Answers in order: a grant, or none for a time that is over.
    answers: Vec<(ClientId, Option<Grant>)>,
    clears: usize,
}

impl Model {
    fn holders(&self, writer: bool) -> usize {
        let holds = |phase: &Phase| matches!(phase, Phase::Holds(g) if g.is_writer() == writer);
        self.people.iter().filter(|(_, phase)| holds(phase)).count()
    }

    fn a_writer_waits(&self) -> bool {
        use LockType::{Rw, RwDataOrRw};
        self.people
            .iter()
            .any(|(_, p)| matches!(p, Phase::Waits(Rw | RwDataOrRw, _)))
    }

    fn offer(&self, lock_type: LockType) -> Option<Grant> {
        let nobody = self.holders(true) == 0 && self.holders(false) == 0;
        let may_read = self.published && self.holders(true) == 0 && !self.a_writer_waits();
        match lock_type {
            LockType::Ro => may_read.then_some(Grant::Ro),
            LockType::Rw => nobody.then_some(Grant::Rw),
            LockType::RwDataOrRw => nobody.then_some(if self.durable {
                Grant::RwData
            } else {
                Grant::Rw
            }),
            LockType::RwOrRo if nobody && !self.published => Some(Grant::Rw),
            LockType::RwOrRo => may_read.then_some(Grant::Ro),
        }
    }

    /// Wakes everybody; each looks again in order of arrival, until nobody's lot changes.
    fn wake(&mut self) {
        while let Some((place, grant)) = self.people.iter().enumerate().find_map(|(i, (_, p))| {
            let Phase::Waits(lock_type, _) = *p else {
                return None;
            };
            self.offer(lock_type).map(|grant| (i, grant))
        }) {
            self.take_up(place, grant);
        }
    }

    fn take_up(&mut self, place: usize, grant: Grant) {
        let client = self.people[place].0;
        if self.dead.contains(&client) {
            self.people.remove(place);
            return;
        }
        if grant == Grant::Rw {
            self.published = false;
            self.durable = false;
            self.clears += 1;
        }
        self.people[place].1 = Phase::Holds(grant);
        self.answers.push((client, Some(grant)));
    }

    fn ask(&mut self, client: ClientId, lock_type: LockType, deadline: Option<u64>, now: u64) {
        if self.people.iter().any(|(other, _)| *other == client) {
            return;
        }
        match self.offer(lock_type) {
            Some(grant) => {
                self.people
                    .push((client, Phase::Waits(lock_type, deadline)));
                self.take_up(self.people.len() - 1, grant);
            }
            None if deadline.is_some_and(|at| at <= now) => self.answers.push((client, None)),
            None => self
                .people
                .push((client, Phase::Waits(lock_type, deadline))),
        }
    }

    fn leave(&mut self, client: ClientId) {
        self.dead.remove(&client);
        let Some(place) = self.people.iter().position(|(other, _)| *other == client) else {
            return;
        };
        let (_, phase) = self.people.remove(place);
        if matches!(phase, Phase::Holds(grant) if grant.is_writer()) && !self.durable {
            self.clears += 1;
        }
        self.wake();
    }

    fn commit(&mut self, client: ClientId) {
        let place = self
            .people
            .iter()
            .position(|p| *p == (client, Phase::Holds(Grant::Rw)));
        if let Some(place) = place {
            self.people.remove(place);
            self.published = true;
            self.wake();
        }
    }

    fn commit_layout(&mut self, client: ClientId) {
        let mine = self
            .people
            .iter_mut()
            .find(|p| **p == (client, Phase::Holds(Grant::Rw)));
        if let Some(person) = mine {
            person.1 = Phase::Holds(Grant::RwData);
            self.durable = true;
        }
    }

    fn lose(&mut self) {
        let idle = self.holders(true) == 0 && self.holders(false) == 0;
        if idle && (self.published || self.durable) {
            self.published = false;
            self.durable = false;
            self.clears += 1;
            self.wake();
        }
    }

    fn expire(&mut self, now: u64) {
        let late = |p: &Phase| matches!(p, Phase::Waits(_, Some(at)) if *at <= now);
        let answers = &mut self.answers;
        self.people.retain(|(client, phase)| {
            let late = late(phase);
            if late {
                answers.push((*client, None));
            }
            !late
        });
        self.wake();
    }

    fn state(&self) -> State {
        match (
            self.holders(true),
            self.holders(false),
            self.published,
            self.durable,
        ) {
            (1, ..) => State::Rw,
            (0, 1.., ..) => State::Ro,
            (0, 0, true, _) => State::Committed,
            (0, 0, false, true) => State::LayoutCommitted,
            _ => State::Empty,
        }
    }
}

#[derive(Clone, Debug)]
enum Act {
    Ask(u64, LockType, Option<u64>),
    Commit(u64),
    CommitLayout(u64),
    Die(u64),
    Leave(u64),
    Pass(u64),
    Lose,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let client = || 0..8u64;
    let lock_type = prop_oneof![
        Just(LockType::Rw),
        Just(LockType::Ro),
        Just(LockType::RwOrRo),
        Just(LockType::RwDataOrRw)
    ];
    let act = prop_oneof![
        4 => (client(), lock_type, proptest::option::of(0..40u64))
            .prop_map(|(client, lock_type, wait)| Act::Ask(client, lock_type, wait)),
        2 => client().prop_map(Act::Commit),
        1 => client().prop_map(Act::CommitLayout),
        1 => client().prop_map(Act::Die),
        3 => client().prop_map(Act::Leave),
        1 => (1..20u64).prop_map(Act::Pass),
        1 => Just(Act::Lose),
    ];
    proptest::collection::vec(act, 1..400)
}

fn run(acts: &[Act]) {
    let mut lock = Lock::new(Policy::of(Profile::V1));
    let mut model = Model::default();
    let mut now = 0;
    let (mut answers, mut clears) = (Vec::new(), 0);
    for act in acts {
        let mut effects = Vec::new();
        let dead = model.dead.clone();
        let pulse: Pulse<'_> = &mut |client| !dead.contains(&client);
        match *act {
            Act::Ask(client, lock_type, wait) => {
                let (client, deadline) = (ClientId(client), wait.map(|wait| now + wait));
                if dead.contains(&client) {
                    continue;
                }
                let _ = lock.request(client, lock_type, deadline, now, pulse, &mut effects);
                model.ask(client, lock_type, deadline, now);
            }
            Act::Commit(client) => {
                let _ = lock.commit(ClientId(client), pulse, &mut effects);
                model.commit(ClientId(client));
            }
            Act::CommitLayout(client) => {
                let _ = lock.commit_layout(ClientId(client), &mut effects);
                model.commit_layout(ClientId(client));
            }
            Act::Die(client) => {
                model.dead.insert(ClientId(client));
            }
            Act::Leave(client) => {
                lock.disconnect(ClientId(client), pulse, &mut effects);
                model.leave(ClientId(client));
            }
            Act::Lose => {
                lock.lose_contents(ClientId(u64::MAX), pulse, &mut effects);
                model.lose();
            }
            Act::Pass(time) => {
                now += time;
                lock.expire(now, pulse, &mut effects);
                model.expire(now);
            }
        }
        for effect in effects {
            match effect {
                Effect::Granted { client, grant } => answers.push((client, Some(grant))),
                Effect::TimedOut { client, .. } => answers.push((client, None)),
                Effect::Clear(_) => clears += 1,
                Effect::Moved(_) | Effect::Gone { .. } => {}
            }
        }
        assert_eq!(lock.state(), model.state(), "after {act:?}");
        assert_eq!(answers, model.answers, "after {act:?}");
        assert_eq!(clears, model.clears, "after {act:?}");
        assert_eq!(lock.standing().waiters + lock.readers.len(), {
            let writers = model.holders(true);
            model.people.len() - writers
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 300,
        failure_persistence: None,
        ..Default::default()
    })]
    #[test]
    fn long_random_runs_agree_with_the_reference_model(acts in acts()) {
        run(&acts);
    }
}
