//! Host memory: sealed memfds. For workers on the CPU, and for everything that needs no GPU to be
//! tried out.
//!
//! A block can neither shrink nor grow, so no client can pull pages from under another. A reader's
//! descriptor is opened read-only, so a mapping of it faults on a write and cannot be made
//! writable. Once published, nobody can map the block for writing at all.

use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FallocateFlags, Mode, OFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

use super::spares::Spares;
use super::{Access, Backend, BackendError, Block, CreateError, Mapper};

/// What current GPUs use, so that sizes agree.
pub const GRANULARITY_BYTES: u64 = 2 << 20;

/// How host memory is made.
#[derive(Clone, Copy, Debug)]
pub struct HostConfig {
    /// Sizes are multiples of this; a power of two, at least a page.
    pub granularity_bytes: u64,
    /// The most that may exist at a time, over all pools of the backend.
    pub capacity_bytes: Option<u64>,
    /// Blocks up to this size get their pages when they are made, so that a client never meets a
    /// missing page; larger ones when they are touched, because clearing them would hold up
    /// everybody else on the service's thread (about 0.3 s per GiB).
    pub populate_bytes_max: u64,
}

impl Default for HostConfig {
    fn default() -> HostConfig {
        HostConfig {
            granularity_bytes: GRANULARITY_BYTES,
            capacity_bytes: None,
            populate_bytes_max: 64 << 20,
        }
    }
}

/// Makes blocks of host memory. Clones share the capacity.
#[derive(Clone, Debug)]
pub struct HostBackend {
    config: HostConfig,
    used_bytes: Arc<AtomicU64>,
    spares: Spares,
}

impl HostBackend {
    /// A backend with nothing made yet.
    ///
    /// # Errors
    /// The granularity is not a power of two or is smaller than a page.
    pub fn new(config: HostConfig) -> Result<HostBackend, BackendError> {
        let granularity = config.granularity_bytes;
        if !granularity.is_power_of_two() || granularity < page_bytes() {
            let why = "it must be a power of two and at least a page";
            return Err(BackendError::new("using this granularity", why));
        }
        Ok(HostBackend {
            config,
            used_bytes: Arc::default(),
            spares: Spares::default(),
        })
    }

    /// What exists now, over all clones.
    pub fn used_bytes(&self) -> u64 {
        self.used_bytes.load(Ordering::Relaxed)
    }

    /// Counts a new block in, if it fits.
    fn claim(&self, bytes: u64) -> Result<Claim, CreateError> {
        let capacity = self.config.capacity_bytes.unwrap_or(u64::MAX);
        let fits = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= capacity);
        self.used_bytes
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits)
            .map_err(|_| CreateError::OutOfMemory)?;
        Ok(Claim {
            used_bytes: Arc::clone(&self.used_bytes),
            bytes,
        })
    }
}

impl Backend for HostBackend {
    fn name(&self) -> &'static str {
        "host"
    }

    fn granularity_bytes(&self) -> u64 {
        self.config.granularity_bytes
    }

    fn create(&mut self, bytes: u64) -> Result<Box<dyn Block>, CreateError> {
        let claim = self.claim(bytes)?;
        let memory = self
            .spares
            .take()
            .map_err(|errno| short_or("memfd_create", errno))?;
        rustix::fs::ftruncate(&memory, bytes).map_err(|errno| short_or("ftruncate", errno))?;
        if bytes <= self.config.populate_bytes_max {
            rustix::fs::fallocate(&memory, FallocateFlags::empty(), 0, bytes)
                .map_err(|errno| short_or("fallocate", errno))?;
        }
        rustix::fs::fcntl_add_seals(&memory, SealFlags::SHRINK | SealFlags::GROW)
            .map_err(|errno| BackendError::new("sealing the size", errno))?;
        Ok(Box::new(HostBlock {
            memory: Arc::new(memory),
            _claim: claim,
        }))
    }

    fn prepare(&mut self) -> bool {
        self.spares.refill()
    }

    fn unprepare(&mut self) -> bool {
        self.spares.give_up()
    }
}

/// Memory that is short is a reason to try again; all else is a failure.
fn short_or(what: &'static str, errno: Errno) -> CreateError {
    match errno {
        Errno::NOMEM | Errno::NOSPC => CreateError::OutOfMemory,
        other => CreateError::Failed(BackendError::new(what, other)),
    }
}

struct HostBlock {
    memory: Arc<OwnedFd>,
    _claim: Claim,
}

impl Block for HostBlock {
    fn export(&self, access: Access) -> Result<Arc<OwnedFd>, BackendError> {
        match access {
            Access::ReadWrite => Ok(Arc::clone(&self.memory)),
            Access::Read => {
                let path = format!("/proc/self/fd/{}", self.memory.as_raw_fd());
                let flags = OFlags::RDONLY | OFlags::CLOEXEC;
                rustix::fs::open(path, flags, Mode::empty())
                    .map(Arc::new)
                    .map_err(|errno| BackendError::new("opening for reading", errno))
            }
        }
    }

    fn freeze(&self) {
        let seals = SealFlags::FUTURE_WRITE | SealFlags::SEAL;
        if let Err(errno) = rustix::fs::fcntl_add_seals(&self.memory, seals) {
            tracing::warn!(%errno, "published memory could not be sealed against writing");
        }
    }
}

/// A share of the capacity, given back when its block is dropped.
struct Claim {
    used_bytes: Arc<AtomicU64>,
    bytes: u64,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.used_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Maps blocks of host memory into this process.
#[derive(Clone, Copy, Debug)]
pub struct HostMapper {
    granularity_bytes: u64,
}

impl HostMapper {
    /// A mapper for blocks of a backend with the same granularity.
    pub fn new(granularity_bytes: u64) -> HostMapper {
        HostMapper {
            granularity_bytes: granularity_bytes.max(page_bytes()),
        }
    }
}

impl Default for HostMapper {
    fn default() -> HostMapper {
        HostMapper::new(GRANULARITY_BYTES)
    }
}

// SAFETY: a reservation is an anonymous mapping of our own that only `release` gives back; `map`
// and `unmap` replace exactly the pages of the range by MAP_FIXED.
unsafe impl Mapper for HostMapper {
    fn granularity_bytes(&self) -> u64 {
        self.granularity_bytes
    }

    fn reserve(&self, bytes: u64) -> Result<u64, BackendError> {
        reserve_aligned(bytes, self.granularity_bytes)
            .map_err(|errno| BackendError::new("reserving addresses", errno))
    }

    unsafe fn map(
        &self,
        address: u64,
        bytes: u64,
        descriptor: OwnedFd,
        access: Access,
    ) -> Result<u64, BackendError> {
        let failed = |why: &dyn std::fmt::Display| BackendError::new("mapping memory", why);
        let size = rustix::fs::fstat(&descriptor)
            .map_err(|errno| failed(&errno))?
            .st_size;
        if u64::try_from(size).ok() != Some(bytes) {
            return Err(failed(&format!(
                "the descriptor has {size} bytes, not {bytes}"
            )));
        }
        let protection = match access {
            Access::Read => ProtFlags::READ,
            Access::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
        };
        // SAFETY: the caller owns the range, so replacing its pages harms nobody.
        unsafe {
            let (at, len) = (address as *mut _, bytes as usize);
            let flags = MapFlags::SHARED | MapFlags::FIXED;
            rustix::mm::mmap(at, len, protection, flags, &descriptor, 0)
        }
        .map_err(|errno| failed(&errno))?;
        Ok(0)
    }

    unsafe fn unmap(&self, address: u64, bytes: u64, _mapping: u64) -> Result<(), BackendError> {
        // SAFETY: the caller owns the range and uses it no more; the pages are replaced by an empty
        // reservation in one step, so nobody else's mapping can slip in between.
        unsafe {
            let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
            let (at, len) = (address as *mut _, bytes as usize);
            rustix::mm::mmap_anonymous(at, len, ProtFlags::empty(), flags)
        }
        .map_err(|errno| BackendError::new("unmapping memory", errno))?;
        Ok(())
    }

    unsafe fn release(&self, address: u64, bytes: u64) {
        // SAFETY: the caller owns the range and uses it no more.
        unsafe { unmap_range(address, bytes) }
    }
}

/// Takes addresses at a multiple of `align` that nothing is mapped at; `munmap` gives them back.
pub(crate) fn reserve_aligned(bytes: u64, align: u64) -> Result<u64, Errno> {
    let padded = bytes.checked_add(align).ok_or(Errno::NOMEM)?;
    let padded = usize::try_from(padded).map_err(|_| Errno::NOMEM)?;
    // SAFETY: a fresh mapping at an address of the kernel's choice touches nothing of ours.
    let start = unsafe {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        rustix::mm::mmap_anonymous(ptr::null_mut(), padded, ProtFlags::empty(), flags)
    }? as u64;
    let address = start.next_multiple_of(align);
    let before = address - start;
    // SAFETY: both ranges are the unused ends of the mapping that was just made.
    unsafe {
        unmap_range(start, before);
        unmap_range(address + bytes, align - before);
    }
    Ok(address)
}

/// # Safety
/// The range is mapped by us and used by nobody.
unsafe fn unmap_range(address: u64, bytes: u64) {
    if bytes > 0 {
        // SAFETY: by the contract above. It can only fail where the kernel is out of mappings, and
        // then the reservation stays, which harms nobody.
        let _ = unsafe { rustix::mm::munmap(address as *mut _, bytes as usize) };
    }
}

fn page_bytes() -> u64 {
    rustix::param::page_size() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As a client gets it: of its own.
    fn own(lent: Arc<OwnedFd>) -> OwnedFd {
        lent.try_clone().expect("a descriptor")
    }

    fn backend(capacity_bytes: Option<u64>) -> HostBackend {
        HostBackend::new(HostConfig {
            capacity_bytes,
            ..HostConfig::default()
        })
        .expect("sane")
    }

    #[test]
    fn a_block_cannot_be_resized_by_a_client() {
        let block = backend(None).create(GRANULARITY_BYTES).expect("memory");
        let lent = block.export(Access::ReadWrite).expect("a descriptor");
        assert_eq!(rustix::fs::ftruncate(&lent, 0), Err(Errno::PERM));
        assert_eq!(
            rustix::fs::ftruncate(&lent, 2 * GRANULARITY_BYTES),
            Err(Errno::PERM)
        );
    }

    #[test]
    fn a_readers_descriptor_maps_for_reading_only() {
        let block = backend(None).create(GRANULARITY_BYTES).expect("memory");
        let mapper = HostMapper::default();
        let address = mapper.reserve(GRANULARITY_BYTES).expect("addresses");
        assert_eq!(address % GRANULARITY_BYTES, 0);
        let lent = block.export(Access::Read).expect("a descriptor");
        // SAFETY: the range was just reserved, and is released unused.
        unsafe {
            let refused = mapper.map(address, GRANULARITY_BYTES, own(lent), Access::ReadWrite);
            assert!(
                refused.is_err(),
                "a read-only descriptor must not map for writing"
            );
            let lent = block.export(Access::Read).expect("a descriptor");
            mapper
                .map(address, GRANULARITY_BYTES, own(lent), Access::Read)
                .expect("it maps");
            let all = rustix::mm::MprotectFlags::READ | rustix::mm::MprotectFlags::WRITE;
            let made = rustix::mm::mprotect(address as *mut _, GRANULARITY_BYTES as usize, all);
            assert_eq!(made, Err(Errno::ACCESS));
            mapper
                .unmap(address, GRANULARITY_BYTES, 0)
                .expect("it unmaps");
            mapper.release(address, GRANULARITY_BYTES);
        }
    }

    #[test]
    fn a_frozen_block_maps_for_writing_no_more() {
        let block = backend(None).create(GRANULARITY_BYTES).expect("memory");
        let before = block.export(Access::ReadWrite).expect("a descriptor");
        block.freeze();
        let mapper = HostMapper::default();
        let address = mapper.reserve(GRANULARITY_BYTES).expect("addresses");
        // SAFETY: the range was just reserved, and is released unused.
        unsafe {
            let refused = mapper.map(address, GRANULARITY_BYTES, own(before), Access::ReadWrite);
            assert!(refused.is_err());
            mapper.release(address, GRANULARITY_BYTES);
        }
    }

    #[test]
    fn capacity_is_shared_and_comes_back() {
        let mut one = backend(Some(2 * GRANULARITY_BYTES));
        let mut other = one.clone();
        let first = one.create(GRANULARITY_BYTES).expect("memory");
        let _second = other.create(GRANULARITY_BYTES).expect("memory");
        assert!(matches!(
            one.create(GRANULARITY_BYTES),
            Err(CreateError::OutOfMemory)
        ));
        drop(first);
        assert!(one.create(GRANULARITY_BYTES).is_ok());
    }

    #[test]
    fn odd_granularities_are_refused() {
        for granularity_bytes in [0, 1, 3 << 20, 512] {
            let config = HostConfig {
                granularity_bytes,
                ..HostConfig::default()
            };
            assert!(HostBackend::new(config).is_err(), "{granularity_bytes}");
        }
    }
}
