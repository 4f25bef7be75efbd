//! Receive buffers: one block of memory cut into equal buffers, with a count of holders for each.
//!
//! ```text
//! unfilled (the ring may write) -> filled (we hold it, count >= 1) -> unfilled
//! ```
//!
//! The count lives in the shard's table: no `Arc`, no atomics. A buffer goes back to the ring when
//! the last frame in it has left.

use std::io;
use std::ptr::NonNull;

/// Index of a receive buffer.
pub type BufferId = u16;

/// The memory of all receive buffers of one shard.
pub struct Buffers {
    base: NonNull<u8>,
    buffer_bytes: usize,
    holders: Vec<u32>,
    held: usize,
}

impl Buffers {
    /// Maps `count` buffers of `buffer_bytes` each. `count` is a power of two up to 32 768, as the
    /// kernel's buffer ring wants it.
    ///
    /// # Errors
    /// The kernel's answer when the memory cannot be mapped.
    pub fn new(count: u16, buffer_bytes: usize) -> io::Result<Buffers> {
        assert!(
            count.is_power_of_two(),
            "the ring's mask needs a power of two"
        );
        let bytes = usize::from(count) * buffer_bytes;
        // SAFETY: an anonymous private mapping at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).expect("mmap never returns null");
        Ok(Buffers {
            base,
            buffer_bytes,
            holders: vec![0; usize::from(count)],
            held: 0,
        })
    }

    /// Number of buffers.
    pub fn count(&self) -> usize {
        self.holders.len()
    }

    /// Bytes of each buffer.
    pub fn buffer_bytes(&self) -> usize {
        self.buffer_bytes
    }

    /// Buffers that are filled and held by somebody.
    pub fn held(&self) -> usize {
        self.held
    }

    /// Where buffer `id` begins. Valid as long as `self` lives.
    pub(crate) fn start(&self, id: BufferId) -> *mut u8 {
        assert!(usize::from(id) < self.holders.len());
        // SAFETY: in bounds by the line above.
        unsafe { self.base.as_ptr().add(usize::from(id) * self.buffer_bytes) }
    }

    /// The bytes `range` of a filled buffer.
    pub fn bytes(&self, id: BufferId, start: usize, end: usize) -> &[u8] {
        assert!(start <= end && end <= self.buffer_bytes);
        debug_assert!(
            self.holders[usize::from(id)] > 0,
            "read of a buffer nobody holds"
        );
        // SAFETY: in bounds; a held buffer is not written by the ring.
        unsafe { std::slice::from_raw_parts(self.start(id).add(start), end - start) }
    }

    /// The bytes `range` of a filled buffer, to be changed where they lie. Others that hold the
    /// buffer, and sends that the kernel has not taken yet, are to hold other bytes of it.
    pub fn bytes_mut(&mut self, id: BufferId, start: usize, end: usize) -> &mut [u8] {
        assert!(start <= end && end <= self.buffer_bytes);
        debug_assert!(
            self.holders[usize::from(id)] > 0,
            "change of a buffer nobody holds"
        );
        // SAFETY: in bounds; a held buffer is not written by the ring, and whoever reads these
        // bytes in this process borrows us as well.
        unsafe { std::slice::from_raw_parts_mut(self.start(id).add(start), end - start) }
    }

    /// Appends `from` after position `at` of a buffer that has one holder only. Used to join the
    /// crumbs of a slow sender, never on the way of a frame that arrived whole.
    pub fn append(&mut self, id: BufferId, at: usize, from: &[u8]) {
        assert!(at + from.len() <= self.buffer_bytes);
        assert_eq!(self.holders[usize::from(id)], 1);
        // SAFETY: in bounds, held by the caller alone; `from` is another buffer.
        unsafe {
            std::ptr::copy_nonoverlapping(from.as_ptr(), self.start(id).add(at), from.len());
        }
    }

    /// The first holder: the ring filled the buffer and hands it to us.
    pub fn take(&mut self, id: BufferId) {
        debug_assert_eq!(self.holders[usize::from(id)], 0);
        self.holders[usize::from(id)] = 1;
        self.held += 1;
    }

    /// One more holder.
    pub fn hold(&mut self, id: BufferId) {
        debug_assert!(self.holders[usize::from(id)] > 0);
        self.holders[usize::from(id)] += 1;
    }

    /// Holders of a buffer.
    pub fn holders(&self, id: BufferId) -> u32 {
        self.holders[usize::from(id)]
    }

    /// One holder less. `true` when it was the last: the caller gives the buffer back to the ring.
    #[must_use]
    pub fn release(&mut self, id: BufferId) -> bool {
        let holders = &mut self.holders[usize::from(id)];
        debug_assert!(*holders > 0, "released once too often");
        *holders -= 1;
        if *holders == 0 {
            self.held -= 1;
        }
        *holders == 0
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length; the ring was dropped before us.
        unsafe {
            libc::munmap(
                self.base.as_ptr().cast(),
                self.holders.len() * self.buffer_bytes,
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_release_gives_the_buffer_back() {
        let mut buffers = Buffers::new(4, 64).unwrap();
        buffers.take(2);
        buffers.hold(2);
        assert_eq!(buffers.held(), 1);
        assert!(!buffers.release(2));
        assert!(buffers.release(2));
        assert_eq!(buffers.held(), 0);
    }

    #[test]
    fn append_joins_after_what_is_there() {
        let mut buffers = Buffers::new(2, 16).unwrap();
        buffers.take(0);
        buffers.append(0, 0, b"abc");
        buffers.append(0, 3, b"de");
        assert_eq!(buffers.bytes(0, 0, 5), b"abcde");
        assert!(buffers.release(0));
    }
}
