//! Where an event that has come on one side goes: pure, so that loops can be looked for in tests.
//!
//! ```text
//! come on a side --known there?--> mark read --> for each other side:
//!     in the mark already?   it has been there, or a bridge has promised to bring it
//!     whose is it?           of several bridges between the same two sides one, by publisher
//!     known there?           it has come there by another way
//! ```

use corelane_codec::event::origin::{Origin, SIDES_MAX};

use super::members::Members;
use crate::events::seen::Seen;

/// Sides of one bridge.
pub(super) const SIDES: usize = 3;

/// One thing that is joined to others.
#[derive(Debug)]
pub(super) struct Side {
    /// Its number in marks: the same for all who join the same thing.
    pub(super) id: u64,
    /// Nobody else joins it: no other bridge need be asked.
    pub(super) ours: bool,
    /// Events that have been there lately.
    seen: Seen,
}

/// What becomes of an event.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Verdict {
    /// The sides that it is passed on to.
    pub(super) to: [bool; SIDES],
    /// The mark that it gets.
    pub(super) origin: Origin,
    /// It is one that a bridge brought, or that comes twice.
    pub(super) came_back: bool,
    /// Sides that it is left to another bridge to bring it to.
    pub(super) left: u64,
    /// It has been to so many sides that no mark holds more.
    pub(super) too_far: bool,
}

/// The sides of this bridge, and what it knows of others.
#[derive(Debug)]
pub(super) struct Course {
    sides: Vec<Side>,
    pub(super) members: Members,
}

impl Course {
    /// With at most [`SIDES`] sides.
    pub(super) fn new(sides: Vec<(u64, bool)>, members: Members) -> Course {
        let sides = sides.into_iter().map(|(id, ours)| Side {
            id,
            ours,
            seen: Seen::default(),
        });
        Course {
            sides: sides.collect(),
            members,
        }
    }

    /// Their numbers.
    #[cfg(test)]
    fn ids(&self) -> Vec<u64> {
        self.sides.iter().map(|side| side.id).collect()
    }

    /// An event has come on the side `from`.
    pub(super) fn decide(
        &mut self,
        from: usize,
        publisher_id: u64,
        sequence: u64,
        origin: Origin,
    ) -> Verdict {
        let mut verdict = Verdict {
            origin,
            ..Verdict::default()
        };
        if !self.sides[from].seen.is_new(publisher_id, sequence) {
            verdict.came_back = true;
            return verdict;
        }
        // All our sides are promised: what we leave to others, they bring there.
        let mine = self.sides.iter().map(|side| side.id);
        if origin.sides().len() + self.sides.len() > SIDES_MAX {
            verdict.too_far = true;
            return verdict;
        }
        for id in mine {
            verdict.origin.add(id);
        }
        for to in 0..self.sides.len() {
            let (source, target) = (&self.sides[from], &self.sides[to]);
            if to == from || origin.has(target.id) {
                continue;
            }
            let alone = source.ours || target.ours;
            let is_mine = alone || self.members.is_mine(source.id, target.id, publisher_id);
            let is_new = self.sides[to].seen.is_new(publisher_id, sequence);
            if !is_mine {
                verdict.left += 1;
            } else if is_new {
                verdict.to[to] = true;
            }
        }
        verdict
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::{Duration, Instant};

    use super::super::members::{Members, Word};
    use super::*;

    const NATS: u64 = 1;
    const BROKER: u64 = 2;
    const DOORS: usize = 0;

    /// A bridge whose own doors are the side with its own number.
    fn bridge(id: u64, others: &[u64]) -> Course {
        let sides: Vec<(u64, bool)> = [(id, true), (NATS, false), (BROKER, false)].into();
        let ids = sides.iter().map(|side| side.0).collect();
        let began = Instant::now();
        let mut members = Members::new(id, ids, began);
        for other in others.iter().chain([&id]) {
            let word = Word {
                bridge: *other,
                sides: vec![*other, NATS, BROKER],
                active: true,
                leaving: false,
            };
            members.heard(&word, began);
        }
        members.tick(began + Duration::from_secs(3));
        Course::new(sides, members)
    }

    /// Lets an event run through all bridges, in any order that `seed` says, until none passes it
    /// on; says how often it came to each side.
    fn run(bridges: &mut [Course], from: u64, publisher: u64, mut seed: u64) -> Vec<(u64, u32)> {
        let mut came: BTreeMap<u64, u32> = BTreeMap::from([(from, 1)]);
        let arrive = |bridges: &[Course], side: u64, origin: Origin| -> Vec<_> {
            let joins = |place: &usize| bridges[*place].ids().contains(&side);
            let places = (0..bridges.len()).filter(joins);
            places.map(|place| (place, side, origin)).collect()
        };
        let mut under_way = arrive(bridges, from, Origin::default());
        let mut steps = 0;
        while !under_way.is_empty() {
            steps += 1;
            assert!(steps < 100, "it goes round");
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let next = (seed >> 33) as usize % under_way.len();
            let (place, side, origin) = under_way.swap_remove(next);
            let ids = bridges[place].ids();
            let at = ids.iter().position(|id| *id == side).unwrap();
            let verdict = bridges[place].decide(at, publisher, 7, origin);
            for (to, id) in ids.iter().enumerate() {
                if verdict.to[to] {
                    *came.entry(*id).or_default() += 1;
                    under_way.extend(arrive(bridges, *id, verdict.origin));
                }
            }
        }
        came.into_iter().collect()
    }

    #[test]
    fn one_bridge_brings_each_event_to_each_other_side_once() {
        for from in [10, NATS, BROKER] {
            let mut bridges = [bridge(10, &[])];
            let came = run(&mut bridges, from, 5, 1);
            assert_eq!(came, [(NATS, 1), (BROKER, 1), (10, 1)], "{from}");
        }
    }

    #[test]
    fn two_bridges_between_the_same_sides_bring_each_event_once() {
        for from in [10, 11, NATS, BROKER] {
            // Each publisher is one bridge's or the other's.
            for publisher in 0..200 {
                let mut bridges = [bridge(10, &[11]), bridge(11, &[10])];
                let came = run(&mut bridges, from, publisher, publisher);
                let want = [(NATS, 1), (BROKER, 1), (10, 1), (11, 1)];
                assert_eq!(came, want, "{from} {publisher}");
            }
        }
    }

    #[test]
    fn both_of_two_bridges_have_work() {
        let mut bridges = [bridge(10, &[11]), bridge(11, &[10])];
        let mut mine = [0, 0];
        for publisher in 0..64 {
            for (place, bridge) in bridges.iter_mut().enumerate() {
                let verdict = bridge.decide(1, publisher, 0, Origin::default());
                mine[place] += u32::from(verdict.to[2]);
                assert!(verdict.to[DOORS]);
            }
        }
        assert_eq!(mine[0] + mine[1], 64);
        assert!(mine[0] > 16 && mine[1] > 16, "{mine:?}");
    }

    #[test]
    fn an_event_that_has_been_everywhere_goes_nowhere() {
        let mut origin = Origin::default();
        for side in 100..100 + SIDES_MAX as u64 {
            origin.add(side);
        }
        let verdict = bridge(10, &[]).decide(1, 5, 5, origin);
        assert!(verdict.too_far && verdict.to == [false; SIDES]);
    }
}
