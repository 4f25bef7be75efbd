//! Sealed memory that two processes share, and copies in and out of it.
//!
//! No reference to this memory is ever formed: the other process may write to it at any time.
//! Bytes are copied out, then looked at.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64};

use rustix::fs::{
    MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, ftruncate, memfd_create,
};

use super::LaneError;

/// Makes memory of so many bytes that nobody can make smaller or larger.
///
/// # Errors
/// Out of descriptors or memory.
pub fn create(name: &str, bytes: u64) -> Result<OwnedFd, LaneError> {
    let step = LaneError::system("making shared memory");
    let memory =
        memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).map_err(&step)?;
    ftruncate(&memory, bytes).map_err(&step)?;
    fcntl_add_seals(&memory, SEALS | SealFlags::SEAL).map_err(&step)?;
    Ok(memory)
}

const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);

/// Shared memory in this process's address space.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping belongs to no thread; what is read and written through it is either atomic
// or copied, and never referred to.
unsafe impl Send for Mapping {}

impl Mapping {
    /// Maps all of a descriptor that holds `bytes` sealed bytes.
    ///
    /// # Errors
    /// It holds another number of bytes, it could be made smaller, or there are no addresses.
    pub fn new(memory: impl AsFd, bytes: u64) -> Result<Mapping, LaneError> {
        let step = LaneError::system("looking at shared memory");
        let seals = fcntl_get_seals(&memory).map_err(&step)?;
        let stat = rustix::fs::fstat(&memory).map_err(&step)?;
        if !seals.contains(SEALS) || u64::try_from(stat.st_size) != Ok(bytes) || bytes == 0 {
            return Err(LaneError::Broken(
                "shared memory of another size, or not sealed",
            ));
        }
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                bytes as usize,
                rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE,
                rustix::mm::MapFlags::SHARED,
                &memory,
                0,
            )
        };
        let start = start.map_err(LaneError::system("mapping shared memory"))?;
        Ok(Mapping {
            start: NonNull::new(start.cast()).ok_or(LaneError::System {
                step: "mapping shared memory",
                source: io::Error::from_raw_os_error(libc::ENOMEM),
            })?,
            bytes: bytes as usize,
        })
    }

    /// Its size.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Never: a mapping has bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Where it begins, to register it with a device.
    pub fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// The place of `length` bytes at `offset`, if they lie inside. For the kernel and for devices;
    /// who reads through it must expect any bytes, changing.
    pub fn place(&self, offset: u64, length: usize) -> Option<NonNull<u8>> {
        let offset = usize::try_from(offset).ok()?;
        let end = offset.checked_add(length)?;
        // SAFETY: in bounds by the check.
        (end <= self.bytes).then(|| unsafe { self.start.add(offset) })
    }

    /// Copies `from` in. `false`, and nothing is written: it does not fit at `offset`.
    #[must_use]
    pub fn write(&self, offset: u64, from: &[u8]) -> bool {
        let Some(place) = self.place(offset, from.len()) else {
            return false;
        };
        // SAFETY: in bounds; `from` is memory of this process and not of this mapping.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), place.as_ptr(), from.len()) };
        true
    }

    /// Appends a copy of `length` bytes. `false`, and nothing is appended: they are not all inside.
    #[must_use]
    pub fn read(&self, offset: u64, length: usize, to: &mut Vec<u8>) -> bool {
        let Some(place) = self.place(offset, length) else {
            return false;
        };
        to.reserve(length);
        // SAFETY: in bounds; the vector has room behind its end, which becomes its new end.
        unsafe {
            let end = to.as_mut_ptr().add(to.len());
            std::ptr::copy_nonoverlapping(place.as_ptr(), end, length);
            to.set_len(to.len() + length);
        }
        true
    }

    /// Copies a block from another mapping. `false`: one of the places is outside.
    #[must_use]
    pub fn copy_from(&self, to: u64, other: &Mapping, from: u64, length: usize) -> bool {
        let (Some(to), Some(from)) = (self.place(to, length), other.place(from, length)) else {
            return false;
        };
        // SAFETY: both in bounds; `copy` allows that they overlap.
        unsafe { std::ptr::copy(from.as_ptr(), to.as_ptr(), length) };
        true
    }

    /// A counter. Panics when it is outside or crooked: offsets of counters are constants.
    pub(crate) fn counter(&self, offset: usize) -> &AtomicU32 {
        let place = self.place(offset as u64, 4).expect("counters lie inside");
        assert!(place.addr().get().is_multiple_of(4));
        // SAFETY: in bounds, aligned, and both processes use it as an atomic only.
        unsafe { place.cast().as_ref() }
    }

    /// Eight bytes of a queue's entry, shared as one word.
    pub(crate) fn word(&self, offset: usize) -> &AtomicU64 {
        let place = self.place(offset as u64, 8).expect("entries lie inside");
        assert!(place.addr().get().is_multiple_of(8));
        // SAFETY: in bounds, aligned; written by the other process as it likes, read as an atomic.
        unsafe { place.cast().as_ref() }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length; whoever lent places out has taken them back.
        unsafe {
            let _ = rustix::mm::munmap(self.start.as_ptr().cast(), self.bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_read_or_written_outside() {
        let memory = create("test", 8192).expect("memory");
        let mapping = Mapping::new(&memory, 8192).expect("it maps");
        assert!(mapping.write(8190, b"ab") && !mapping.write(8191, b"ab"));
        assert!(!mapping.write(u64::MAX, b"a"));
        let mut out = b"-".to_vec();
        assert!(mapping.read(8190, 2, &mut out) && !mapping.read(8191, 2, &mut out));
        assert!(!mapping.read(u64::MAX, 1, &mut out));
        assert_eq!(out, b"-ab");
        assert!(mapping.copy_from(0, &mapping, 8190, 2));
        assert!(!mapping.copy_from(8191, &mapping, 0, 2));
        assert!(mapping.read(0, 2, &mut out));
        assert_eq!(out, b"-abab");
    }

    #[test]
    fn what_could_shrink_is_not_mapped() {
        let open = memfd_create("test", MemfdFlags::ALLOW_SEALING).expect("memory");
        ftruncate(&open, 4096).expect("it grows");
        assert!(Mapping::new(&open, 4096).is_err());
        let sealed = create("test", 4096).expect("memory");
        assert!(Mapping::new(&sealed, 8192).is_err());
        assert!(ftruncate(&sealed, 0).is_err());
    }
}
