//! Which route has which place in the directory, and on which cores its paths lead there.
//!
//! A route never changes where it lies: a changed one gets a place of its own, and its paths move
//! there in one step. What is under way keeps the route that it began with, until nothing of it is
//! left and the place is free.
//!
//! ```text
//! proposed   in no core's paths, so that its instances are dialled and nothing is sent to them
//! on trial   paths on one core; there the paths of what it replaces are gone
//! in force   paths on all cores
//! retired    no paths; freed once no core has anything of it
//! ```

use std::collections::BTreeSet;
use std::rc::Rc;

use thiserror::Error;

/// Places, at most: routes in force, and those that drain.
pub const PLACES_MAX: usize = 4096;

/// There is no place left.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
#[error("{PLACES_MAX} routes are served or still end; reload again when some have ended")]
pub struct NoPlace;

/// On which cores the paths of a route lead to it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Paths {
    /// On none.
    Nowhere,
    /// On all.
    Everywhere,
    /// On this one.
    Only(usize),
    /// On all others.
    AllBut(usize),
}

impl Paths {
    /// Whether they do on this core.
    pub fn lead(self, core: usize) -> bool {
        match self {
            Paths::Nowhere => false,
            Paths::Everywhere => true,
            Paths::Only(only) => only == core,
            Paths::AllBut(other) => other != core,
        }
    }

    /// Whether it is the same on all cores.
    fn is_uniform(self) -> bool {
        matches!(self, Paths::Nowhere | Paths::Everywhere)
    }
}

struct Slot<T> {
    held: Rc<T>,
    /// What is listened for: no two with paths on one core have the same.
    listen: String,
    paths: Paths,
}

/// The places. `T` is what stands there.
pub struct Slots<T> {
    list: Vec<Option<Slot<T>>>,
    /// Those in force, in the order of the configuration.
    order: Vec<usize>,
    /// Those that are to be in force, or not: nobody knows yet.
    proposed: Vec<usize>,
}

/// A configuration that is not in force yet.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Proposal {
    /// Its places in order.
    order: Vec<usize>,
    /// Those that were not in force.
    added: Vec<usize>,
    /// What has the paths of an added one until now.
    rivals: Vec<usize>,
    /// What would not be in force any more, and whose paths nobody takes over.
    removed: Vec<usize>,
}

impl Proposal {
    /// Whether no route would change.
    pub fn is_empty(&self) -> bool {
        self.added.is_empty() && self.removed.is_empty() && self.rivals.is_empty()
    }
}

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Slots {
            list: Vec::new(),
            order: Vec::new(),
            proposed: Vec::new(),
        }
    }
}

impl<T> Slots<T> {
    /// Those in force, in the order of the configuration.
    pub fn in_force(&self) -> impl Iterator<Item = (usize, &Rc<T>)> {
        let held = |place: &usize| Some((*place, &self.list.get(*place)?.as_ref()?.held));
        self.order.iter().filter_map(held)
    }

    /// What stands at each place, with its paths on one core; nothing at a free one.
    pub fn on(&self, core: usize) -> impl Iterator<Item = Option<(&Rc<T>, bool)>> {
        let on = move |slot: &Slot<T>| slot.paths.lead(core);
        self.list
            .iter()
            .map(move |slot| slot.as_ref().map(|slot| (&slot.held, on(slot))))
    }

    /// Whether all cores see the same.
    pub fn are_uniform(&self) -> bool {
        let mut slots = self.list.iter().flatten();
        slots.all(|slot| slot.paths.is_uniform())
    }

    /// Finds a place for each of `wanted`: that of one in force which it is `same` as, or a free
    /// one.
    ///
    /// # Errors
    /// There is none; nothing has changed then.
    pub fn propose<W>(
        &mut self,
        wanted: impl IntoIterator<Item = (String, W)>,
        same: impl Fn(&T, &W) -> bool,
        make: impl Fn(W) -> T,
    ) -> Result<Proposal, NoPlace> {
        let mut proposal = Proposal::default();
        for (listen, wanted) in wanted {
            let kept = (self.in_force())
                .find(|(_, held)| same(held, &wanted))
                .map(|(place, _)| place);
            let place = match kept {
                Some(place) => place,
                None => {
                    let place = self.insert(listen, make(wanted));
                    let Some(place) = place else {
                        proposal
                            .added
                            .iter()
                            .for_each(|place| self.list[*place] = None);
                        return Err(NoPlace);
                    };
                    proposal.added.push(place);
                    place
                }
            };
            proposal.order.push(place);
        }
        let listen = |place: &usize| self.list[*place].as_ref().map(|slot| &slot.listen);
        let taken: BTreeSet<_> = proposal.added.iter().filter_map(listen).collect();
        let places = 0..self.list.len();
        let with_paths = |place: &usize| {
            let slot = self.list[*place].as_ref();
            slot.is_some_and(|slot| slot.paths != Paths::Nowhere)
        };
        let is_rival = |place: &usize| listen(place).is_some_and(|listen| taken.contains(listen));
        let gone = self
            .order
            .iter()
            .filter(|place| !proposal.order.contains(place));
        let removed = gone.copied().filter(|place| !is_rival(place)).collect();
        proposal.rivals = places.filter(with_paths).filter(is_rival).collect();
        proposal.removed = removed;
        self.proposed.clone_from(&proposal.added);
        Ok(proposal)
    }

    fn insert(&mut self, listen: String, held: T) -> Option<usize> {
        let slot = Some(Slot {
            held: Rc::new(held),
            listen,
            paths: Paths::Nowhere,
        });
        if let Some(place) = self.list.iter().position(Option::is_none) {
            self.list[place] = slot;
            return Some(place);
        }
        if self.list.len() >= PLACES_MAX {
            return None;
        }
        self.list.push(slot);
        Some(self.list.len() - 1)
    }

    fn lead(&mut self, places: &[usize], paths: Paths) {
        for place in places {
            if let Some(slot) = self.list.get_mut(*place).and_then(Option::as_mut) {
                slot.paths = paths;
            }
        }
    }

    /// The same of those that have lost their paths to nobody meanwhile.
    fn lead_rivals(&mut self, places: &[usize], paths: Paths) {
        let has_paths = |place: &&usize| {
            let slot = self.list.get(**place).and_then(Option::as_ref);
            slot.is_some_and(|slot| slot.paths != Paths::Nowhere)
        };
        let places: Vec<usize> = places.iter().filter(has_paths).copied().collect();
        self.lead(&places, paths);
    }

    /// One core has it; what is removed stays there until it is in force.
    pub fn try_on(&mut self, proposal: &Proposal, core: usize) {
        self.lead_rivals(&proposal.rivals, Paths::AllBut(core));
        self.lead(&proposal.added, Paths::Only(core));
    }

    /// All have it. The places whose paths are to be taken away, once callers know, are answered.
    pub fn put_in_force(&mut self, proposal: &Proposal) -> Vec<usize> {
        self.lead(&proposal.rivals, Paths::Nowhere);
        self.lead(&proposal.added, Paths::Everywhere);
        self.order.clone_from(&proposal.order);
        self.proposed.clear();
        proposal.removed.clone()
    }

    /// Nobody has it.
    pub fn take_back(&mut self, proposal: &Proposal) {
        self.lead(&proposal.added, Paths::Nowhere);
        self.proposed.clear();
        self.lead_rivals(&proposal.rivals, Paths::Everywhere);
    }

    /// Takes the paths of something away that is not in force; answers whether it had some.
    pub fn retire(&mut self, held: &Rc<T>) -> bool {
        let same = |slot: &&mut Slot<T>| Rc::ptr_eq(&slot.held, held);
        let Some(slot) = self.list.iter_mut().flatten().find(same) else {
            return false;
        };
        std::mem::replace(&mut slot.paths, Paths::Nowhere) != Paths::Nowhere
    }

    /// What stands at a place.
    pub fn at(&self, place: usize) -> Option<Rc<T>> {
        let slot = self.list.get(place)?.as_ref()?;
        Some(Rc::clone(&slot.held))
    }

    /// Places without paths that are not in force, nor will be.
    pub fn retired(&self) -> Vec<usize> {
        let is_retired = |place: &usize| {
            let slot = self.list[*place].as_ref();
            let awaits = self.order.contains(place) || self.proposed.contains(place);
            slot.is_some_and(|slot| slot.paths == Paths::Nowhere) && !awaits
        };
        (0..self.list.len()).filter(is_retired).collect()
    }

    /// Frees those of `places` that are still retired.
    pub fn free(&mut self, places: &[usize]) {
        let retired = self.retired();
        for place in places.iter().filter(|place| retired.contains(place)) {
            self.list[*place] = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Words = Slots<&'static str>;

    fn propose(slots: &mut Words, wanted: &[(&'static str, &'static str)]) -> Proposal {
        let wanted = wanted
            .iter()
            .map(|(listen, rest)| ((*listen).to_owned(), *rest));
        slots
            .propose(wanted, |held, wanted| held == wanted, |wanted| wanted)
            .unwrap()
    }

    fn on(slots: &Words, core: usize) -> Vec<&'static str> {
        let led = slots.on(core).flatten().filter(|(_, paths)| *paths);
        led.map(|(held, _)| **held).collect()
    }

    fn begun(wanted: &[(&'static str, &'static str)]) -> Words {
        let mut slots = Words::default();
        let first = propose(&mut slots, wanted);
        assert!(slots.put_in_force(&first).is_empty());
        slots
    }

    #[test]
    fn a_changed_route_moves_to_another_place_core_by_core() {
        let mut slots = begun(&[("a", "a1"), ("b", "b1")]);
        let next = propose(&mut slots, &[("a", "a2"), ("b", "b1")]);
        assert_eq!(
            slots.retired(),
            Vec::<usize>::new(),
            "nobody frees what is proposed"
        );
        assert_eq!(
            (on(&slots, 0), on(&slots, 1)),
            (vec!["a1", "b1"], vec!["a1", "b1"])
        );
        assert!(slots.are_uniform());
        slots.try_on(&next, 1);
        assert!(!slots.are_uniform());
        assert_eq!(
            (on(&slots, 0), on(&slots, 1)),
            (vec!["a1", "b1"], vec!["b1", "a2"])
        );
        assert!(slots.put_in_force(&next).is_empty(), "nothing is removed");
        assert_eq!(on(&slots, 0), ["b1", "a2"]);
        let order: Vec<&str> = slots.in_force().map(|(_, held)| **held).collect();
        assert_eq!(order, ["a2", "b1"], "the order is the configuration's");
        assert_eq!(slots.retired(), [0]);
        slots.free(&[0, 1]);
        assert_eq!(slots.retired(), Vec::<usize>::new());
        assert!(
            slots.at(0).is_none() && slots.at(1).is_some(),
            "what is in force stays"
        );
        let again = propose(&mut slots, &[("a", "a3"), ("b", "b1")]);
        assert_eq!(again.added, [0], "its place is used again");
    }

    #[test]
    fn what_is_taken_back_was_never_there() {
        let mut slots = begun(&[("a", "a1"), ("c", "c1")]);
        let next = propose(&mut slots, &[("a", "a2"), ("b", "b1")]);
        slots.try_on(&next, 0);
        assert_eq!(
            on(&slots, 0),
            ["c1", "a2", "b1"],
            "a removed one stays for now"
        );
        slots.take_back(&next);
        assert_eq!(on(&slots, 0), ["a1", "c1"]);
        assert_eq!(slots.retired().len(), 2);
    }

    #[test]
    fn a_removed_route_keeps_its_paths_until_it_is_retired_or_replaced() {
        let mut slots = begun(&[("a", "a1"), ("b", "b1")]);
        let next = propose(&mut slots, &[("a", "a1")]);
        let removed = slots.put_in_force(&next);
        assert_eq!(
            (removed.clone(), on(&slots, 0)),
            (vec![1], vec!["a1", "b1"])
        );
        let held = slots.at(1).unwrap();
        // It comes back, another one, before its time is over.
        let back = propose(&mut slots, &[("a", "a1"), ("b", "b2")]);
        slots.try_on(&back, 0);
        assert_eq!(on(&slots, 0), ["a1", "b2"]);
        slots.put_in_force(&back);
        assert!(!slots.retire(&held), "it has no paths any more");
        assert_eq!(on(&slots, 3), ["a1", "b2"]);
    }

    #[test]
    fn without_a_place_nothing_changes() {
        let mut slots = begun(&[("a", "a1")]);
        let many = (0..PLACES_MAX).map(|n| (n.to_string(), "x"));
        let refused = slots.propose(many, |_, _| false, |wanted| wanted);
        assert_eq!(refused, Err(NoPlace));
        assert_eq!(slots.retired(), Vec::<usize>::new());
        assert_eq!(on(&slots, 0), ["a1"]);
        assert!(propose(&mut slots, &[("a", "a1")]).is_empty());
    }
}
