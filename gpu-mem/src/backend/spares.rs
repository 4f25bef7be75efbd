//! Empty memfds made ahead, while nobody waits for them, for a writer that allocates again and
//! again. Making one takes the kernel longer than all else that an allocation does.

use std::os::fd::OwnedFd;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;

/// Descriptors that are held ahead at most, by each pool.
const SPARES_MAX: usize = 4;

/// Empty memfds: without size, pages or seals.
#[derive(Debug, Default)]
pub(super) struct Spares {
    ready: Vec<OwnedFd>,
    /// One more with each that is taken, none after they were given up: who allocates once only
    /// is not prepared for.
    wanted: usize,
}

impl Spares {
    /// One that is ready, or a new one.
    ///
    /// # Errors
    /// As `memfd_create(2)`.
    pub(super) fn take(&mut self) -> Result<OwnedFd, Errno> {
        self.wanted = SPARES_MAX.min(self.wanted + 1);
        self.ready.pop().map_or_else(make, Ok)
    }

    /// Makes one if too few are ready. False if there are enough, or there can be no more.
    pub(super) fn refill(&mut self) -> bool {
        if self.ready.len() >= self.wanted {
            return false;
        }
        match make() {
            Ok(one) => self.ready.push(one),
            // Whoever really needs one is told why there is none.
            Err(_) => self.wanted = 0,
        }
        self.wanted > 0
    }

    /// Closes one. False if there is none.
    pub(super) fn give_up(&mut self) -> bool {
        self.wanted = 0;
        self.ready.pop().is_some()
    }
}

impl Clone for Spares {
    /// A clone has spares of its own.
    fn clone(&self) -> Spares {
        Spares::default()
    }
}

fn make() -> Result<OwnedFd, Errno> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    memfd_create("corelane-gpu-mem", flags)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spares_follow_what_is_taken_and_have_a_bound() {
        let mut spares = Spares::default();
        assert!(!spares.refill(), "nobody has asked yet");
        for taken in 1..=2 * SPARES_MAX {
            spares.take().expect("a memfd");
            while spares.refill() {}
            assert_eq!(spares.ready.len(), taken.min(SPARES_MAX));
        }
        assert!(spares.clone().ready.is_empty());
        for _ in 0..SPARES_MAX {
            assert!(spares.give_up());
        }
        assert!(!spares.give_up() && !spares.refill());
    }
}
