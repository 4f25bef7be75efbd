//! Address space that a client keeps while memory comes and goes in it.
//!
//! A standby unmaps its memory and keeps its addresses; when it wakes, the same pages (or new ones
//! of the same shape) appear where they were, so that pointers held elsewhere stay true.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::backend::{Access, BackendError, Mapper};

/// One reservation, with at most one block mapped over all of it.
pub struct Region<M: Mapper> {
    mapper: Arc<M>,
    address: u64,
    bytes: u64,
    mapped: Option<Mapped>,
}

#[derive(Clone, Copy)]
struct Mapped {
    token: u64,
    access: Access,
}

impl<M: Mapper> Region<M> {
    /// Reserves addresses; nothing is mapped yet.
    ///
    /// # Errors
    /// The size is no multiple of the granularity, or there are no addresses left.
    pub fn reserve(mapper: Arc<M>, bytes: u64) -> Result<Region<M>, BackendError> {
        if bytes == 0 || !bytes.is_multiple_of(mapper.granularity_bytes()) {
            let why = format!("{bytes} bytes are no multiple of the granularity");
            return Err(BackendError::new("reserving addresses", why));
        }
        let address = mapper.reserve(bytes)?;
        Ok(Region {
            mapper,
            address,
            bytes,
            mapped: None,
        })
    }

    /// Maps a block here, which must have this region's size.
    ///
    /// # Errors
    /// Something is mapped already, or the block does not fit or forbids the access.
    pub fn map(&mut self, descriptor: OwnedFd, access: Access) -> Result<(), BackendError> {
        if self.mapped.is_some() {
            return Err(BackendError::new(
                "mapping memory",
                "the region is not empty",
            ));
        }
        // SAFETY: the range is our own reservation, whole, and nothing is mapped in it.
        let token = unsafe {
            self.mapper
                .map(self.address, self.bytes, descriptor, access)
        }?;
        self.mapped = Some(Mapped { token, access });
        Ok(())
    }

    /// Takes the block away and keeps the addresses. An empty region stays empty.
    ///
    /// # Safety
    /// Nobody uses memory in this region any more, nor until it is mapped again.
    ///
    /// # Errors
    /// The driver refused.
    pub unsafe fn unmap(&mut self) -> Result<(), BackendError> {
        let Some(Mapped { token, .. }) = self.mapped.take() else {
            return Ok(());
        };
        // SAFETY: the token came from mapping exactly this range; the caller vouches for its users.
        unsafe { self.mapper.unmap(self.address, self.bytes, token) }
    }

    /// The first address; it never changes.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// The size.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What the mapped block allows; none while nothing is mapped.
    pub fn access(&self) -> Option<Access> {
        self.mapped.map(|mapped| mapped.access)
    }
}

impl<M: Mapper> Drop for Region<M> {
    fn drop(&mut self) {
        // SAFETY: the owner of a region is the only one who may know of uses of its memory, and it
        // gives the region up.
        unsafe {
            if let Err(error) = self.unmap() {
                // Addresses that may still be mapped must not be given to anybody else.
                tracing::error!(%error, "a region could not be unmapped; its addresses are lost");
                return;
            }
            self.mapper.release(self.address, self.bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Backend;
    use crate::backend::host::{GRANULARITY_BYTES, HostBackend, HostConfig, HostMapper};

    #[test]
    fn contents_come_back_at_the_same_address() {
        let mut backend = HostBackend::new(HostConfig::default()).expect("sane");
        let block = backend.create(GRANULARITY_BYTES).expect("memory");
        let mapper = Arc::new(HostMapper::default());
        let mut region = Region::reserve(mapper, GRANULARITY_BYTES).expect("addresses");
        let address = region.address();
        let lend = |access| {
            let lent = block.export(access).expect("a descriptor");
            lent.try_clone().expect("another one")
        };
        region
            .map(lend(Access::ReadWrite), Access::ReadWrite)
            .expect("it maps");
        assert!(
            region.map(lend(Access::Read), Access::Read).is_err(),
            "it is not empty"
        );
        // SAFETY: the region is mapped for writing, and nobody else uses it.
        unsafe {
            (address as *mut u8).write(42);
            region.unmap().expect("it unmaps");
        }
        assert_eq!(region.access(), None);
        region
            .map(lend(Access::Read), Access::Read)
            .expect("it maps again");
        assert_eq!(
            (region.address(), region.access()),
            (address, Some(Access::Read))
        );
        // SAFETY: the region is mapped for reading.
        assert_eq!(unsafe { (address as *const u8).read() }, 42);
    }

    #[test]
    fn odd_sizes_are_refused() {
        let mapper = Arc::new(HostMapper::default());
        for bytes in [0, 1, GRANULARITY_BYTES + 1] {
            assert!(Region::reserve(Arc::clone(&mapper), bytes).is_err());
        }
    }
}
