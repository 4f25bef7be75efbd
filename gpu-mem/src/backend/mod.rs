//! Where memory comes from: what a service needs of it, and what a client needs.
//!
//! The service makes blocks and lends descriptors; it never maps one, so no fault of a mapping can
//! reach it. Clients map descriptors at addresses that they reserved.

pub mod choice;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod host;
mod spares;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use thiserror::Error;

/// What a mapping, or a descriptor for one, allows.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Access {
    /// Reading only; writing faults.
    Read,
    /// Reading and writing.
    ReadWrite,
}

/// A source of memory, on the service's side.
pub trait Backend: Send {
    /// The name in logs and options.
    fn name(&self) -> &'static str;

    /// Sizes are multiples of this many bytes; a power of two.
    fn granularity_bytes(&self) -> u64;

    /// Makes one block of `bytes`, which is a multiple of the granularity and not zero.
    ///
    /// # Errors
    /// Memory is short (worth trying again), or the driver refused.
    fn create(&mut self, bytes: u64) -> Result<Box<dyn Block>, CreateError>;

    /// Makes ready one thing that a [`Backend::create`] soon will need, where there were some
    /// lately. False if there is nothing to be done.
    fn prepare(&mut self) -> bool {
        false
    }

    /// Gives up one thing that was made ready. False if there is none.
    fn unprepare(&mut self) -> bool {
        false
    }
}

/// One block of memory. Dropping it gives up the service's reference; the memory itself lives as
/// long as any descriptor or mapping of it, in any process.
pub trait Block: Send {
    /// A descriptor to be sent to one client: the block's own where it has one that gives this
    /// access, else a fresh one. A driver's are never cached, because a cached one does not survive
    /// a checkpoint of the process.
    ///
    /// # Errors
    /// The driver or the kernel refused.
    fn export(&self, access: Access) -> Result<Arc<OwnedFd>, BackendError>;

    /// The contents are published: as far as the source can, nobody may map them for writing.
    fn freeze(&self) {}
}

/// Why there is no block.
#[derive(Debug, Error)]
pub enum CreateError {
    /// Memory is short; it may come back when somebody else's goes.
    #[error("out of memory")]
    OutOfMemory,
    /// Anything else; the service goes on.
    #[error(transparent)]
    Failed(#[from] BackendError),
}

/// What the kernel or the driver refused.
#[derive(Debug, Error)]
#[error("{what} failed: {why}")]
pub struct BackendError {
    /// The call.
    pub what: &'static str,
    /// Its error.
    pub why: String,
}

impl BackendError {
    /// Names a failed call.
    pub fn new(what: &'static str, why: impl std::fmt::Display) -> BackendError {
        BackendError {
            what,
            why: why.to_string(),
        }
    }
}

/// Address space and mappings, on the client's side.
///
/// # Safety
/// An implementor promises that a reservation belongs to its caller until it is released, and that
/// `map` and `unmap` touch nothing outside the range that they are given.
pub unsafe trait Mapper: Send + Sync {
    /// Sizes and addresses are multiples of this many bytes.
    fn granularity_bytes(&self) -> u64;

    /// Reserves address space that nothing is mapped in.
    ///
    /// # Errors
    /// There is none left, or the driver refused.
    fn reserve(&self, bytes: u64) -> Result<u64, BackendError>;

    /// Maps a block over a reserved range that is empty, and answers what `unmap` needs.
    ///
    /// # Safety
    /// The range is one whole reservation of this mapper with nothing mapped in it.
    ///
    /// # Errors
    /// The descriptor is no block of this size, or forbids the access.
    unsafe fn map(
        &self,
        address: u64,
        bytes: u64,
        descriptor: OwnedFd,
        access: Access,
    ) -> Result<u64, BackendError>;

    /// Takes a mapping away and keeps the reservation.
    ///
    /// # Safety
    /// `mapping` came from `map` with the same range, and nobody uses the range any more.
    ///
    /// # Errors
    /// The driver refused; the range must not be used again.
    unsafe fn unmap(&self, address: u64, bytes: u64, mapping: u64) -> Result<(), BackendError>;

    /// Gives a reservation back.
    ///
    /// # Safety
    /// The range is one whole reservation with nothing mapped in it, not used from now on.
    unsafe fn release(&self, address: u64, bytes: u64);

    /// Waits until no work of this process uses any mapping.
    ///
    /// # Errors
    /// The driver reports that work failed.
    fn synchronize(&self) -> Result<(), BackendError> {
        Ok(())
    }

    /// Checks that an address is what the driver thinks it is, after a remap.
    ///
    /// # Errors
    /// It is not.
    fn verify(&self, _address: u64) -> Result<(), BackendError> {
        Ok(())
    }
}
