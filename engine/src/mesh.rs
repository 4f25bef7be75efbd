//! How control and a shard talk: a bounded queue each way, and an eventfd to wake the other side.
//!
//! ```text
//! control --[commands]--> shard      woken by its eventfd, which its ring watches
//! control <--[reports]--- shard      woken by control's eventfd
//! ```
//!
//! Neither side waits for the other: a full queue is an answer, not a pause.

pub mod budget;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

use crossbeam::queue::ArrayQueue;
use rustix::event::{EventfdFlags, eventfd};

/// Entries of each queue.
pub const QUEUE_MAX: usize = 1024;

struct Lane<T> {
    queue: ArrayQueue<T>,
    wake: OwnedFd,
}

/// The sending end of a lane.
pub struct Sender<T>(Arc<Lane<T>>);

/// The receiving end of a lane.
pub struct Receiver<T>(Arc<Lane<T>>);

/// A lane of [`QUEUE_MAX`] entries.
///
/// # Errors
/// No eventfd could be made (out of descriptors).
pub fn lane<T>() -> io::Result<(Sender<T>, Receiver<T>)> {
    lane_of(QUEUE_MAX)
}

/// A lane of so many entries.
///
/// # Errors
/// No eventfd could be made (out of descriptors).
pub fn lane_of<T>(entries: usize) -> io::Result<(Sender<T>, Receiver<T>)> {
    let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let lane = Arc::new(Lane {
        queue: ArrayQueue::new(entries),
        wake,
    });
    Ok((Sender(Arc::clone(&lane)), Receiver(lane)))
}

impl<T> Sender<T> {
    /// Whether the next value would be given back. Only the one who sends can rely on a `false`.
    pub fn is_full(&self) -> bool {
        self.0.queue.is_full()
    }

    /// How many more values it takes; others who send may be faster.
    pub fn room(&self) -> usize {
        self.0.queue.capacity() - self.0.queue.len()
    }

    /// Queues `value`; the receiver sleeps on until [`Sender::wake`].
    ///
    /// # Errors
    /// Gives the value back when the queue is full.
    pub fn push(&self, value: T) -> Result<(), T> {
        self.0.queue.push(value)
    }

    /// Wakes the receiver.
    pub fn wake(&self) {
        // Fails only when the counter is at its limit, and then the receiver is awake.
        let _ = rustix::io::write(&self.0.wake, &1u64.to_ne_bytes());
    }

    /// Queues `value` and wakes the receiver.
    ///
    /// # Errors
    /// Gives the value back when the queue is full.
    pub fn send(&self, value: T) -> Result<(), T> {
        self.push(value)?;
        self.wake();
        Ok(())
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Sender(Arc::clone(&self.0))
    }
}

impl<T> Receiver<T> {
    /// The next value, if there is one.
    pub fn next(&self) -> Option<T> {
        self.0.queue.pop()
    }

    /// Takes the wake-ups that have come so far. Call before [`Receiver::next`], so that none is
    /// missed.
    pub fn clear_wake(&self) {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.0.wake, &mut count);
    }

    /// The eventfd.
    pub fn wake_fd(&self) -> RawFd {
        self.0.wake.as_raw_fd()
    }
}

impl<T> AsFd for Receiver<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.wake.as_fd()
    }
}

impl<T> AsRawFd for Receiver<T> {
    fn as_raw_fd(&self) -> RawFd {
        self.0.wake.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_queue_gives_the_value_back() {
        let (sender, receiver) = lane().unwrap();
        for value in 0..QUEUE_MAX {
            sender.send(value).unwrap();
        }
        assert_eq!(sender.send(7), Err(7));
        receiver.clear_wake();
        assert_eq!(receiver.next(), Some(0));
        assert_eq!(sender.send(8), Ok(()));
    }
}
