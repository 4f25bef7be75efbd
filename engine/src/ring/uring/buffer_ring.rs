//! The ring of receive buffers that is shared with the kernel.

use std::io;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::IoUring;
use io_uring::types::BufRingEntry;

use super::BUFFER_GROUP;
use crate::buffers::{BufferId, Buffers};

/// The ring of buffers that the kernel takes from. Layout: io_uring's `struct io_uring_buf_ring`:
/// `count` entries of 16 bytes, with the tail in the last two bytes of the first entry.
pub(super) struct BufferRing {
    entries: *mut BufRingEntry,
    pub(super) count: u16,
    tail: u16,
    base: *mut u8,
    buffer_bytes: usize,
}

impl BufferRing {
    pub(super) fn new(ring: &IoUring, buffers: &Buffers) -> io::Result<BufferRing> {
        let count = buffers.count() as u16;
        let bytes = usize::from(count) * size_of::<BufRingEntry>();
        // SAFETY: an anonymous mapping, page aligned as the kernel wants it.
        let memory = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE,
                -1,
                0,
            )
        };
        if memory == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let mut this = BufferRing {
            entries: memory.cast(),
            count,
            tail: 0,
            base: buffers.start(0),
            buffer_bytes: buffers.buffer_bytes(),
        };
        // SAFETY: the mapping lives until `this` is dropped, after the ring's own drop.
        unsafe {
            ring.submitter()
                .register_buf_ring_with_flags(memory as u64, count, BUFFER_GROUP, 0)?;
        }
        for buffer in 0..count {
            this.add(buffer);
        }
        this.commit();
        Ok(this)
    }

    /// Offers a buffer; the kernel sees it after [`BufferRing::commit`].
    pub(super) fn add(&mut self, buffer: BufferId) {
        let place = usize::from(self.tail & (self.count - 1));
        // SAFETY: `place` is below `count`; the kernel reads entries only below the tail.
        unsafe {
            let entry = &mut *self.entries.add(place);
            entry.set_addr(self.base.add(usize::from(buffer) * self.buffer_bytes) as u64);
            entry.set_len(self.buffer_bytes as u32);
            entry.set_bid(buffer);
        }
        self.tail = self.tail.wrapping_add(1);
    }

    /// One release-store for all that was added.
    pub(super) fn commit(&mut self) {
        // SAFETY: the tail is a u16 inside the first entry, shared with the kernel.
        unsafe {
            let tail = BufRingEntry::tail(self.entries) as *const AtomicU16;
            (*tail).store(self.tail, Ordering::Release);
        }
    }
}

impl Drop for BufferRing {
    fn drop(&mut self) {
        let bytes = usize::from(self.count) * size_of::<BufRingEntry>();
        // SAFETY: mapped in `new`; the ring, dropped before (field order), does not use it.
        unsafe {
            libc::munmap(self.entries.cast(), bytes);
        }
    }
}
