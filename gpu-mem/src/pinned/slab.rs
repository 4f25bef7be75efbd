//! One slab of host memory that can be registered with CUDA, with a ring, or with both.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use thiserror::Error;

use super::numa::prefer_node;
use super::{RING_BUFFER_BYTES_MAX, ring_iovecs};
use crate::backend::host::reserve_aligned;

/// What a slab is made from.
#[derive(Clone, Copy, Debug, Default)]
pub struct SlabConfig {
    /// Its size; rounded up to 2 MiB, at most 1 GiB, because one buffer of a ring has no more.
    pub bytes: usize,
    /// The NUMA node that the GPU is on, if it is known.
    pub numa_node: Option<u32>,
}

/// Why there is no slab.
#[derive(Debug, Error)]
pub enum SlabError {
    /// Nothing was asked for, or too much for one slab.
    #[error("{0} bytes are no slab: from 1 byte to 1 GiB; take several for more")]
    Size(usize),
    /// The kernel refused.
    #[error("making a slab of host memory failed: {0}")]
    Kernel(#[source] io::Error),
}

impl From<Errno> for SlabError {
    fn from(errno: Errno) -> SlabError {
        SlabError::Kernel(errno.into())
    }
}

/// Where a slab's pages are.
#[derive(Debug)]
pub enum Placement {
    /// No node was asked for.
    Anywhere,
    /// On this node, as long as it had any.
    Preferred(u32),
    /// A node was asked for and the kernel would not; the slab is as good as without.
    Fallback(io::Error),
}

/// Shared host memory of fixed size whose pages are all there. Nobody can resize it, nor punch
/// pages out of it, nor map it for writing after it was made.
#[derive(Debug)]
pub struct Slab {
    memory: OwnedFd,
    address: NonNull<u8>,
    bytes: usize,
    placement: Placement,
}

// SAFETY: the slab is plain shared memory; whoever touches its bytes does so through raw pointers
// and answers for order and overlap.
unsafe impl Send for Slab {}
// SAFETY: as above.
unsafe impl Sync for Slab {}

impl Slab {
    /// Makes a slab, with all its pages.
    ///
    /// # Errors
    /// The size makes no sense, or there is no memory.
    pub fn new(config: SlabConfig) -> Result<Slab, SlabError> {
        let size = SlabError::Size(config.bytes);
        let rounded = config.bytes.checked_next_multiple_of(ALIGN_BYTES);
        let bytes = match rounded {
            Some(bytes) if (1..=RING_BUFFER_BYTES_MAX).contains(&bytes) => bytes,
            _ => return Err(size),
        };
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let memory = rustix::fs::memfd_create("corelane-pinned", flags)?;
        rustix::fs::ftruncate(&memory, bytes as u64)?;
        let address = map_aligned(&memory, bytes)?;
        let mut slab = Slab {
            memory,
            address,
            bytes,
            placement: Placement::Anywhere,
        };
        // Before the first touch, which takes the pages.
        if let Some(node) = config.numa_node {
            slab.placement = match prefer_node(address.as_ptr() as usize, bytes, node) {
                Ok(()) => Placement::Preferred(node),
                Err(error) => {
                    tracing::warn!(node, %error, "pinned memory is not near its GPU");
                    Placement::Fallback(error)
                }
            };
        }
        slab.populate()?;
        // Our mapping stays writable; from now on nobody makes another, nor resizes, nor punches.
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE;
        rustix::fs::fcntl_add_seals(&slab.memory, seals | SealFlags::SEAL)?;
        Ok(slab)
    }

    /// Takes all pages now, so that no copy or receive ever waits for one.
    fn populate(&self) -> Result<(), SlabError> {
        let at = self.address.as_ptr();
        // SAFETY: the range is our own mapping; its contents stay.
        let populated =
            unsafe { rustix::mm::madvise(at.cast(), self.bytes, Advice::LinuxPopulateWrite) };
        match populated {
            Ok(()) => Ok(()),
            // A kernel before 5.14: touching does the same, but has no error to give.
            Err(Errno::INVAL) => {
                for offset in (0..self.bytes).step_by(rustix::param::page_size()) {
                    // SAFETY: the byte lies in our mapping, which nobody else knows yet.
                    unsafe { at.add(offset).write_volatile(0) };
                }
                Ok(())
            }
            Err(errno) => Err(errno.into()),
        }
    }

    /// The first byte. Aligned to 2 MiB.
    pub fn address(&self) -> NonNull<u8> {
        self.address
    }

    /// The size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Where its pages are.
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    /// For another process, which can map it for reading only.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }

    /// The slab as a ring's registration takes it.
    pub fn iovecs(&self) -> Vec<libc::iovec> {
        ring_iovecs(self.address.as_ptr(), self.bytes)
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and whoever drops the slab uses it no more.
        let _ = unsafe { rustix::mm::munmap(self.address.as_ptr().cast(), self.bytes) };
    }
}

/// Maps a memfd at a multiple of [`ALIGN_BYTES`].
fn map_aligned(memory: &OwnedFd, bytes: usize) -> Result<NonNull<u8>, SlabError> {
    let address = reserve_aligned(bytes as u64, ALIGN_BYTES as u64)? as usize;
    // SAFETY: the addresses are ours alone, and are replaced in one step, so nobody else's pages
    // come between.
    unsafe {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        rustix::mm::mmap(address as *mut _, bytes, access, flags, memory, 0)?;
    }
    NonNull::new(address as *mut u8).ok_or(SlabError::Size(bytes))
}

/// A huge page, and the granularity of current GPUs.
const ALIGN_BYTES: usize = 2 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use std::ptr;

    use crate::pinned::pinned_bytes;
    use rustix::fs::FallocateFlags;

    fn slab() -> Slab {
        let bytes = ALIGN_BYTES - 1;
        let numa_node = None;
        Slab::new(SlabConfig { bytes, numa_node }).expect("there is memory")
    }

    #[test]
    fn a_slab_is_aligned_whole_and_ours_to_write() {
        let slab = slab();
        assert_eq!(slab.bytes(), ALIGN_BYTES);
        assert_eq!(slab.address().as_ptr() as usize % ALIGN_BYTES, 0);
        // SAFETY: the last byte lies in the slab, which nobody else uses.
        unsafe {
            let last = slab.address().as_ptr().add(slab.bytes() - 1);
            last.write(7);
            assert_eq!(last.read(), 7);
        }
        let blocks = rustix::fs::fstat(slab.descriptor())
            .expect("ours")
            .st_blocks;
        assert_eq!(blocks as usize * 512, ALIGN_BYTES, "all pages are there");
    }

    #[test]
    fn sizes_that_make_no_sense_are_refused() {
        for bytes in [0, RING_BUFFER_BYTES_MAX + 1, usize::MAX] {
            let numa_node = None;
            let refused = Slab::new(SlabConfig { bytes, numa_node });
            assert!(matches!(refused, Err(SlabError::Size(_))), "{bytes}");
        }
    }

    #[test]
    fn nobody_resizes_punches_or_maps_it_for_writing() {
        let slab = slab();
        let memory = slab.descriptor();
        assert_eq!(rustix::fs::ftruncate(memory, 0), Err(Errno::PERM));
        assert_eq!(rustix::fs::ftruncate(memory, 8 << 20), Err(Errno::PERM));
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let punched = rustix::fs::fallocate(memory, hole, 0, 4096);
        assert_eq!(punched, Err(Errno::PERM));
        let at = slab.address().as_ptr().cast();
        // SAFETY: the slab is used by nobody else, and the kernel refuses.
        let removed = unsafe { rustix::mm::madvise(at, 4096, Advice::LinuxRemove) };
        assert!(removed.is_err(), "punching through the mapping");
        // SAFETY: a new mapping at a place of the kernel's choice.
        let mapped = unsafe {
            let access = ProtFlags::READ | ProtFlags::WRITE;
            rustix::mm::mmap(ptr::null_mut(), 4096, access, MapFlags::SHARED, memory, 0)
        };
        assert_eq!(mapped.err(), Some(Errno::PERM));
    }

    #[test]
    fn a_node_is_asked_for_and_one_that_is_not_there_does_no_harm() {
        let on = |node| {
            let bytes = 1;
            Slab::new(SlabConfig {
                bytes,
                numa_node: Some(node),
            })
            .expect("a slab all the same")
        };
        match on(0).placement() {
            Placement::Preferred(0) => {}
            // A kernel without NUMA, or a container that may not.
            Placement::Fallback(error) => println!("no node is taken here: {error}"),
            Placement::Anywhere | Placement::Preferred(_) => panic!("node 0 was asked for"),
        }
        assert!(matches!(on(1000).placement(), Placement::Fallback(_)));
    }

    #[test]
    fn a_ring_takes_the_slab_and_gives_its_pins_back() {
        let slab = slab();
        let before = pinned_bytes();
        let Some(ring) = Ring::new() else {
            println!("left out: there is no io_uring here");
            return;
        };
        if let Err(error) = ring.register(&slab.iovecs()) {
            assert_eq!(error.raw_os_error(), Some(libc::ENOMEM), "{error}");
            println!("left out: RLIMIT_MEMLOCK has no room for 2 MiB ({error})");
            return;
        }
        assert_eq!(pinned_bytes() - before, ALIGN_BYTES as u64);
        drop(ring);
        // The kernel unpins after the close, when it gets to it.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while pinned_bytes() > before {
            assert!(std::time::Instant::now() < deadline, "the pins stay");
            std::thread::yield_now();
        }
    }

    /// As much of a ring as registers buffers.
    struct Ring(OwnedFd);

    impl Ring {
        fn new() -> Option<Ring> {
            use std::os::fd::FromRawFd;
            let mut parameters = [0_u8; 120];
            // SAFETY: the pointer is to as many bytes as the kernel's structure has.
            let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, parameters.as_mut_ptr()) };
            // SAFETY: the kernel has just opened it for us.
            (fd >= 0).then(|| Ring(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
        }

        fn register(&self, pieces: &[libc::iovec]) -> io::Result<()> {
            use std::os::fd::AsRawFd;
            const REGISTER_BUFFERS: u32 = 0;
            // SAFETY: the pieces are living mappings, and the ring is dropped before they are.
            let answer = unsafe {
                let ring = self.0.as_raw_fd();
                libc::syscall(
                    libc::SYS_io_uring_register,
                    ring,
                    REGISTER_BUFFERS,
                    pieces.as_ptr(),
                    pieces.len(),
                )
            };
            match answer {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        }
    }
}
