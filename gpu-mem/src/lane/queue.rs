//! The two queues of a lane as one of its sides sees them: what it posts, what it takes.
//!
//! Places are kept in memory of our own. Of the other side's counters only the difference to ours
//! is believed, and only if a queue can hold it.

use std::sync::atomic::{Ordering, fence};

use zerocopy::{FromBytes, IntoBytes};

use super::LaneError;
use super::layout::{
    COMPLETIONS_POSTED, COMPLETIONS_TAKEN, DESCRIPTOR_BYTES, Descriptor, ENTRIES_AT, Kind,
    LaneHead, SUBMISSIONS_POSTED, SUBMISSIONS_TAKEN, WISH_AFTER, Wish,
};
use super::memory::Mapping;

/// Whose queues these are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Posts submissions, takes completions.
    Router,
    /// Takes submissions, posts completions.
    Worker,
}

/// One queue: where its counters and entries lie.
#[derive(Clone, Copy, Debug)]
struct Place {
    posted: usize,
    taken: usize,
    entries: usize,
}

/// Both queues of a lane.
#[derive(Debug)]
pub struct Queues {
    memory: Mapping,
    entries: u32,
    sends: Place,
    takes: Place,
    /// Posted by us so far.
    posted: u32,
    /// Taken by us so far.
    taken: u32,
}

impl Queues {
    /// The queues in fresh memory of the size that `head` says. The router writes the head.
    ///
    /// # Errors
    /// The memory is too small for so many entries.
    pub fn new(memory: Mapping, head: &LaneHead, side: Side) -> Result<Queues, LaneError> {
        if memory.len() != head.queue_bytes() || !head.is_sane() {
            return Err(LaneError::Broken("queue memory of another size"));
        }
        let entries = head.entries.get();
        let submissions = Place {
            posted: SUBMISSIONS_POSTED,
            taken: SUBMISSIONS_TAKEN,
            entries: ENTRIES_AT,
        };
        let completions = Place {
            posted: COMPLETIONS_POSTED,
            taken: COMPLETIONS_TAKEN,
            entries: ENTRIES_AT + entries as usize * DESCRIPTOR_BYTES,
        };
        let (sends, takes) = match side {
            Side::Router => (submissions, completions),
            Side::Worker => (completions, submissions),
        };
        if side == Side::Router && !memory.write(0, head.as_bytes()) {
            return Err(LaneError::Broken("queue memory of another size"));
        }
        Ok(Queues {
            memory,
            entries,
            sends,
            takes,
            posted: 0,
            taken: 0,
        })
    }

    /// Posted descriptors that the other side has not taken.
    ///
    /// # Errors
    /// Its counter says that it took what was never posted.
    pub fn waiting(&self) -> Result<u32, LaneError> {
        let taken = self.memory.counter(self.sends.taken);
        let waiting = self.posted.wrapping_sub(taken.load(Ordering::Acquire));
        if waiting > self.entries {
            return Err(LaneError::Broken("it took more than was posted"));
        }
        Ok(waiting)
    }

    /// How many descriptors we have posted, modulo 2^32.
    pub fn posted(&self) -> u32 {
        self.posted
    }

    /// How many we have taken, modulo 2^32.
    pub fn taken(&self) -> u32 {
        self.taken
    }

    /// Posts one descriptor; `false` when the queue is full. Then look at [`Queues::wants_wake`].
    ///
    /// # Errors
    /// As [`Queues::waiting`].
    pub fn post(&mut self, descriptor: &Descriptor) -> Result<bool, LaneError> {
        if self.waiting()? == self.entries {
            return Ok(false);
        }
        let at = self.entry(self.sends, self.posted);
        for (index, word) in descriptor.as_bytes().chunks_exact(8).enumerate() {
            let word = u64::from_ne_bytes(word.try_into().expect("eight bytes"));
            self.memory
                .word(at + 8 * index)
                .store(word, Ordering::Relaxed);
        }
        self.posted = self.posted.wrapping_add(1);
        let posted = self.memory.counter(self.sends.posted);
        posted.store(self.posted, Ordering::Release);
        Ok(true)
    }

    /// Whether the other side sleeps and wants to be woken after news of this kind were posted.
    pub fn wants_wake(&self, kind: Kind) -> bool {
        // Orders the counter before the look: the other side writes its wish, then looks again.
        fence(Ordering::SeqCst);
        let wish = self.memory.counter(self.sends.taken + WISH_AFTER);
        match wish.load(Ordering::Relaxed) {
            0 => false,
            1 => kind != Kind::Released,
            _ => true,
        }
    }

    /// Whether the other side has posted something that we have not taken.
    pub fn is_ready(&self) -> bool {
        let posted = self.memory.counter(self.takes.posted);
        posted.load(Ordering::Acquire) != self.taken
    }

    /// The next descriptor, copied out.
    ///
    /// # Errors
    /// The counter says that more was posted than the queue holds.
    pub fn take(&mut self) -> Result<Option<Descriptor>, LaneError> {
        let posted = self.memory.counter(self.takes.posted);
        let waiting = posted.load(Ordering::Acquire).wrapping_sub(self.taken);
        if waiting > self.entries {
            return Err(LaneError::Broken("it posted more than the queue holds"));
        }
        if waiting == 0 {
            return Ok(None);
        }
        let at = self.entry(self.takes, self.taken);
        let mut bytes = [0; DESCRIPTOR_BYTES];
        for (index, word) in bytes.chunks_exact_mut(8).enumerate() {
            let read = self.memory.word(at + 8 * index).load(Ordering::Relaxed);
            word.copy_from_slice(&read.to_ne_bytes());
        }
        self.taken = self.taken.wrapping_add(1);
        let taken = self.memory.counter(self.takes.taken);
        taken.store(self.taken, Ordering::Release);
        // Any bytes are a descriptor, so this never fails.
        Ok(Descriptor::read_from_bytes(&bytes).ok())
    }

    /// Says when we want to be woken. Answers whether there is something already: then sleep not.
    pub fn wish(&self, wish: Wish) -> bool {
        let word = self.memory.counter(self.takes.taken + WISH_AFTER);
        word.store(wish as u32, Ordering::Relaxed);
        if wish == Wish::Never {
            return false;
        }
        // Orders the wish before the look: the other side posts, then looks for wishes.
        fence(Ordering::SeqCst);
        self.is_ready()
    }

    /// Whether a descriptor that was posted as the `number`th has been taken.
    ///
    /// # Errors
    /// As [`Queues::waiting`].
    pub fn was_taken(&self, number: u32) -> Result<bool, LaneError> {
        let behind = self.posted.wrapping_sub(number);
        Ok(behind > self.waiting()?)
    }

    fn entry(&self, queue: Place, number: u32) -> usize {
        queue.entries + (number & (self.entries - 1)) as usize * DESCRIPTOR_BYTES
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use zerocopy::little_endian::{U32, U64};

    use super::super::layout::{MAGIC, VERSION};
    use super::super::memory::create;
    use super::*;

    pub(crate) fn head(entries: u32) -> LaneHead {
        LaneHead {
            magic: U64::new(MAGIC),
            version: U32::new(VERSION),
            entries: U32::new(entries),
            slab_bytes: U64::new(1 << 20),
            request_bytes: U64::new(1 << 19),
            core: U32::new(0),
            cores: U32::new(1),
            worker: U64::new(1),
            zero: [0; 16],
        }
    }

    fn both() -> (Queues, Queues, Mapping) {
        let head = head(4);
        let bytes = head.queue_bytes() as u64;
        let memory = create("test", bytes).expect("memory");
        let map = || Mapping::new(&memory, bytes).expect("it maps");
        let router = Queues::new(map(), &head, Side::Router).expect("it fits");
        let worker = Queues::new(map(), &head, Side::Worker).expect("it fits");
        (router, worker, map())
    }

    fn number(descriptor: Option<Descriptor>) -> Option<u32> {
        descriptor.map(|descriptor| descriptor.request.get())
    }

    #[test]
    fn what_is_posted_is_taken_in_order_and_a_full_queue_says_so() {
        let (mut router, mut worker, _) = both();
        for round in 0..5u32 {
            for request in 0..4 {
                let descriptor = Descriptor::new(Kind::Request, round * 4 + request, 1);
                assert!(router.post(&descriptor).expect("honest"));
            }
            assert!(!router.post(&Descriptor::default()).expect("honest"));
            let first = router.posted().wrapping_sub(4);
            assert!(!router.was_taken(first).expect("honest"));
            for request in 0..4 {
                let taken = number(worker.take().expect("honest"));
                assert_eq!(taken, Some(round * 4 + request));
            }
            assert!(router.was_taken(first).expect("honest"));
            assert_eq!(number(worker.take().expect("honest")), None);
        }
        assert!(
            worker
                .post(&Descriptor::new(Kind::Finish, 9, 1))
                .expect("honest")
        );
        assert_eq!(number(router.take().expect("honest")), Some(9));
    }

    #[test]
    fn who_wants_to_be_woken_is_woken_by_what_he_wished() {
        let (mut router, worker, _) = both();
        assert!(!router.wants_wake(Kind::Request));
        assert!(!worker.wish(Wish::News));
        assert!(router.wants_wake(Kind::Request) && !router.wants_wake(Kind::Released));
        assert!(!worker.wish(Wish::All));
        assert!(router.wants_wake(Kind::Released));
        router.post(&Descriptor::default()).expect("honest");
        assert!(worker.wish(Wish::All), "there is something");
        worker.wish(Wish::Never);
        assert!(!router.wants_wake(Kind::Request));
    }

    #[test]
    fn counters_that_lie_are_found_out() {
        let (mut router, mut worker, memory) = both();
        for (at, value) in [(SUBMISSIONS_TAKEN, 1u32), (SUBMISSIONS_TAKEN, u32::MAX)] {
            assert!(memory.write(at as u64, &value.to_ne_bytes()));
            assert!(router.post(&Descriptor::default()).is_err() == (value == 1));
            assert!(memory.write(at as u64, &0u32.to_ne_bytes()));
        }
        for value in [5u32, u32::MAX] {
            assert!(memory.write(COMPLETIONS_POSTED as u64, &value.to_ne_bytes()));
            assert!(router.take().is_err());
        }
        assert!(memory.write(SUBMISSIONS_POSTED as u64, &9u32.to_ne_bytes()));
        assert!(worker.take().is_err());
    }
}
