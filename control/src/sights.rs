//! The instances of each target as discovery, or a worker that attaches, tells of them: one for
//! each target, whichever routes lead there.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use corelane_codec::path::EndpointId;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::watch::Instance;

/// A list of instances, shared by whoever wants to know when it changes.
pub type Instances = Rc<[Instance]>;

/// What is known of one target.
pub struct Sight {
    /// The endpoint.
    pub target: EndpointId,
    /// The number of what its workers publish.
    pub feed: u32,
    /// It stays although no route leads there: others hear by its number.
    pub stays: bool,
    /// Its workers come to us; nobody has to look for them.
    pub comes: bool,
    found: watch::Sender<Instances>,
    /// Whether the list is what the store says now, and not the last known one.
    fresh: watch::Sender<bool>,
    follower: RefCell<Option<AbortHandle>>,
}

impl Sight {
    fn new(target: EndpointId, feed: u32, stays: bool, comes: bool) -> Sight {
        Sight {
            target,
            feed,
            stays,
            comes,
            found: watch::Sender::new(Vec::new().into()),
            fresh: watch::Sender::new(comes),
            follower: RefCell::default(),
        }
    }

    /// The instances now.
    pub fn instances(&self) -> Instances {
        self.found.borrow().clone()
    }

    /// Tells about changes.
    pub fn subscribe(&self) -> watch::Receiver<Instances> {
        self.found.subscribe()
    }

    /// Whether the list is what the store says now.
    pub fn is_fresh(&self) -> bool {
        *self.fresh.borrow()
    }

    /// Notes whether it is.
    pub fn set_fresh(&self, fresh: bool) {
        self.fresh.send_replace(fresh);
    }

    /// Waits until the store has listed the instances for the first time.
    pub async fn listed(&self) {
        // The sender is ours.
        let _ = self.fresh.subscribe().wait_for(|fresh| *fresh).await;
    }

    /// Takes a list over; answers whether it is another one.
    pub fn replace(&self, found: Vec<Instance>) -> bool {
        let before = self.instances();
        if *before == *found {
            return false;
        }
        let (target, count, was) = (&self.target, found.len(), before.len());
        tracing::info!(%target, instances = count, was, "instances changed");
        self.found.send_replace(found.into());
        true
    }

    /// Whether somebody looks for its instances.
    pub fn is_followed(&self) -> bool {
        self.comes || self.follower.borrow().is_some()
    }

    /// Notes who does; he ends with the last holder of this.
    pub fn followed_by(&self, follower: AbortHandle) {
        self.follower.replace(Some(follower));
    }
}

impl Drop for Sight {
    fn drop(&mut self) {
        if let Some(follower) = self.follower.get_mut() {
            follower.abort();
        }
    }
}

/// All of them, by the number of their feed.
#[derive(Default)]
pub struct Sights {
    list: RefCell<Vec<Option<Rc<Sight>>>>,
    /// The process has begun: what is made from now on goes with its last route.
    begun: Cell<bool>,
}

impl Sights {
    /// The one of a target; `lane` is a route of which the workers come to us.
    pub fn of(&self, target: &EndpointId, lane: bool) -> Rc<Sight> {
        let mut list = self.list.borrow_mut();
        let same = |sight: &&Rc<Sight>| sight.target == *target && !lane && !sight.comes;
        if let Some(sight) = list.iter().flatten().find(same) {
            return Rc::clone(sight);
        }
        let free = list.iter().position(Option::is_none);
        let feed = free.unwrap_or(list.len());
        let sight = Sight::new(target.clone(), feed as u32, !self.begun.get(), lane);
        let sight = Rc::new(sight);
        match list.get_mut(feed) {
            Some(place) => *place = Some(Rc::clone(&sight)),
            None => list.push(Some(Rc::clone(&sight))),
        }
        sight
    }

    /// Those of the first configuration are all made.
    pub fn begun(&self) {
        self.begun.set(true);
    }

    /// Whether they are.
    pub fn have_begun(&self) -> bool {
        self.begun.get()
    }

    /// The one of a feed.
    pub fn of_feed(&self, feed: u32) -> Option<Rc<Sight>> {
        self.list.borrow().get(feed as usize)?.clone()
    }

    /// All of them.
    pub fn all(&self) -> Vec<Rc<Sight>> {
        self.list.borrow().iter().flatten().cloned().collect()
    }

    /// Forgets those that nobody else holds.
    pub fn tidy(&self) {
        for place in self.list.borrow_mut().iter_mut() {
            let unused = |sight: &Rc<Sight>| !sight.stays && Rc::strong_count(sight) == 1;
            if place.as_ref().is_some_and(unused) {
                *place = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_to_one_target_share_what_is_known_of_it() {
        let (first, second) = (
            EndpointId::new("a", "b", "c"),
            EndpointId::new("a", "b", "d"),
        );
        let sights = Sights::default();
        let kept = sights.of(&first, false);
        assert!(Rc::ptr_eq(&kept, &sights.of(&first, false)));
        assert!(
            !Rc::ptr_eq(&kept, &sights.of(&first, true)),
            "workers that come are others"
        );
        sights.begun();
        let later = sights.of(&second, false);
        assert_eq!((kept.feed, later.feed), (0, 2));
        drop((kept, later));
        sights.tidy();
        assert!(sights.of_feed(0).is_some(), "those of the beginning stay");
        assert!(sights.of_feed(2).is_none());
        assert_eq!(
            sights.of(&second, false).feed,
            2,
            "the number is free again"
        );
    }
}
