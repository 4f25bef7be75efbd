//! Registers host memory with CUDA, so that copies of it are one DMA.

use std::ptr::NonNull;
use std::sync::Arc;

use cudarc::driver::sys;
use thiserror::Error;

use super::Slab;
use super::copies::CopyStream;
use super::numa::node_of_pci_device;
use crate::cuda::{Context, CudaError, Driver, check, pci_bus_id};

const FUNCTIONS: [&str; 11] = [
    "cuMemHostRegister_v2",
    "cuMemHostUnregister",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuStreamCreate",
    "cuStreamSynchronize",
    "cuStreamDestroy_v2",
    "cuEventCreate",
    "cuEventRecord",
    "cuEventQuery",
    "cuEventDestroy_v2",
];

/// Why memory is not pinned. It can be used without, at the price of the driver's own copy.
#[derive(Debug, Error)]
pub enum PinError {
    /// The range does not start and end with a page.
    #[error("{bytes} bytes at {address:#x} are no whole pages, and only those can be pinned")]
    NotPages {
        /// Where it starts.
        address: usize,
        /// Its size.
        bytes: usize,
    },
    /// A part of it is pinned already.
    #[error("a part of the range is registered with CUDA already; register a slab once")]
    AlreadyPinned,
    /// The driver refused.
    #[error(transparent)]
    Cuda(#[from] CudaError),
}

/// Pins memory for one GPU and copies it there.
#[derive(Clone, Debug)]
pub struct Pinner {
    context: Arc<Context>,
    ordinal: u32,
}

impl Pinner {
    /// For the GPU with this CUDA ordinal.
    ///
    /// # Errors
    /// There is no driver or no such GPU.
    pub fn new(ordinal: u32) -> Result<Pinner, CudaError> {
        let driver = Driver::load()?;
        driver.require(&FUNCTIONS)?;
        let context = Arc::new(Context::new(driver, ordinal)?);
        Ok(Pinner { context, ordinal })
    }

    /// The NUMA node that the GPU is on; none where the machine does not say. A slab is made there
    /// ([`super::SlabConfig::numa_node`]).
    pub fn numa_node(&self) -> Option<u32> {
        node_of_pci_device(&pci_bus_id(self.ordinal).ok()?)
    }

    /// Pins a range, whoever mapped it. It takes about a second per GiB or two: register a slab
    /// once, at the start.
    ///
    /// # Safety
    /// Until the answer is dropped the range stays mapped as it is: it is not unmapped, moved,
    /// truncated, punched or given back by MADV_DONTNEED, here or by whoever shares it.
    ///
    /// # Errors
    /// The range is no whole pages, cannot be written, is pinned already, or the driver refused.
    pub unsafe fn register(&self, address: NonNull<u8>, bytes: usize) -> Result<Pinned, PinError> {
        let page_bytes = rustix::param::page_size();
        let start = address.as_ptr() as usize;
        if bytes == 0 || !start.is_multiple_of(page_bytes) || !bytes.is_multiple_of(page_bytes) {
            let address = start;
            return Err(PinError::NotPages { address, bytes });
        }
        let _inside = self.context.inside()?;
        // SAFETY: the driver checks the range; the caller vouches that it stays.
        let answer = unsafe {
            let flags = sys::CU_MEMHOSTREGISTER_PORTABLE;
            sys::cuMemHostRegister_v2(address.as_ptr().cast(), bytes, flags)
        };
        check("cuMemHostRegister", answer).map_err(|error| {
            match error.is("CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED") {
                true => PinError::AlreadyPinned,
                false => PinError::Cuda(error),
            }
        })?;
        Ok(Pinned {
            context: Arc::clone(&self.context),
            address,
            bytes,
            _slab: None,
        })
    }

    /// Pins a whole slab, which lives at least as long as it is pinned.
    ///
    /// # Errors
    /// As [`Pinner::register`].
    pub fn register_slab(&self, slab: Arc<Slab>) -> Result<Pinned, PinError> {
        // SAFETY: the slab's seals keep its pages, and the answer keeps the slab.
        let mut pinned = unsafe { self.register(slab.address(), slab.bytes()) }?;
        pinned._slab = Some(slab);
        Ok(pinned)
    }

    /// A stream of copies, for one worker.
    ///
    /// # Errors
    /// The driver refused.
    pub fn stream(&self) -> Result<CopyStream, CudaError> {
        CopyStream::new(Arc::clone(&self.context))
    }
}

/// A range that CUDA has pinned; dropping it unpins.
#[derive(Debug)]
pub struct Pinned {
    context: Arc<Context>,
    address: NonNull<u8>,
    bytes: usize,
    /// Unmapped after it is unpinned: fields are dropped after [`Drop::drop`] has run.
    _slab: Option<Arc<Slab>>,
}

// SAFETY: it is an address and a size; the driver's calls may come from any thread.
unsafe impl Send for Pinned {}
// SAFETY: as above.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// The first byte.
    pub fn address(&self) -> NonNull<u8> {
        self.address
    }

    /// The size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The place of some bytes, if they lie in the range.
    pub(super) fn at(&self, offset: usize, bytes: usize) -> Option<*mut u8> {
        let end = offset.checked_add(bytes)?;
        (end <= self.bytes).then(|| self.address.as_ptr().wrapping_add(offset))
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let Ok(_inside) = self.context.inside() else {
            return;
        };
        // SAFETY: the range was registered by us; streams keep it for as long as they copy.
        let answer = unsafe { sys::cuMemHostUnregister(self.address.as_ptr().cast()) };
        if let Err(error) = check("cuMemHostUnregister", answer) {
            tracing::error!(%error, "host memory stays pinned until this process ends");
        }
    }
}
