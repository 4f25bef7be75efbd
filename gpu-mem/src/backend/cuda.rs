//! Memory of NVIDIA GPUs, through the driver's virtual memory management: blocks that are shared by
//! descriptor and mapped by each client where it likes (`spec/gpu-memory.md` §5).

use std::ffi::c_void;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys;

use super::{Access, Backend, BackendError, Block, CreateError, Mapper};
use crate::cuda::{Context, Driver, check};
pub use crate::cuda::{CudaError, gpu_uuid};

/// What is called below.
const FUNCTIONS: [&str; 11] = [
    "cuMemGetAllocationGranularity",
    "cuMemCreate",
    "cuMemRelease",
    "cuMemExportToShareableHandle",
    "cuMemImportFromShareableHandle",
    "cuMemAddressReserve",
    "cuMemAddressFree",
    "cuMemMap",
    "cuMemUnmap",
    "cuMemSetAccess",
    "cuPointerGetAttribute",
];

/// The driver, if it can do what is done here.
fn driver() -> Result<Driver, CudaError> {
    let driver = Driver::load()?;
    driver.require(&FUNCTIONS).map(|()| driver)
}

/// What every block is: pinned memory of one device that can be shared by descriptor.
fn properties(device: sys::CUdevice) -> sys::CUmemAllocationProp {
    sys::CUmemAllocationProp {
        type_: sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
        requestedHandleTypes: POSIX_DESCRIPTOR,
        location: location(device),
        win32HandleMetaData: ptr::null_mut(),
        allocFlags: sys::CUmemAllocationProp_st__bindgen_ty_1 {
            compressionType: 0,
            gpuDirectRDMACapable: 0,
            usage: 0,
            reserved: [0; 4],
        },
    }
}

fn location(device: sys::CUdevice) -> sys::CUmemLocation {
    sys::CUmemLocation {
        type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE,
        id: device,
    }
}

const POSIX_DESCRIPTOR: sys::CUmemAllocationHandleType =
    sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;

fn granularity_bytes(_: Driver, device: sys::CUdevice) -> Result<u64, CudaError> {
    let properties = properties(device);
    let mut bytes = 0;
    let minimum = sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM;
    // SAFETY: both pointers are to live values.
    let answer = unsafe {
        sys::cuMemGetAllocationGranularity(&raw mut bytes, &raw const properties, minimum)
    };
    check("cuMemGetAllocationGranularity", answer).map(|()| bytes as u64)
}

/// Makes blocks of one GPU's memory. It has no context and maps nothing, so it takes no memory of
/// the GPU for itself and no fault of a context reaches it.
#[derive(Clone, Copy, Debug)]
pub struct CudaBackend {
    device: sys::CUdevice,
    granularity_bytes: u64,
}

impl CudaBackend {
    /// A backend for the GPU with this CUDA ordinal.
    ///
    /// # Errors
    /// There is no driver or no such GPU.
    pub fn new(ordinal: u32) -> Result<CudaBackend, CudaError> {
        let driver = driver()?;
        let device = driver.device(ordinal)?;
        Ok(CudaBackend {
            device,
            granularity_bytes: granularity_bytes(driver, device)?,
        })
    }
}

impl Backend for CudaBackend {
    fn name(&self) -> &'static str {
        "cuda"
    }

    fn granularity_bytes(&self) -> u64 {
        self.granularity_bytes
    }

    fn create(&mut self, bytes: u64) -> Result<Box<dyn Block>, CreateError> {
        let properties = properties(self.device);
        let mut handle = 0;
        // SAFETY: both pointers are to live values; a backend exists only with a loaded driver.
        let answer =
            unsafe { sys::cuMemCreate(&raw mut handle, bytes as usize, &raw const properties, 0) };
        if answer == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Err(CreateError::OutOfMemory);
        }
        check("cuMemCreate", answer).map_err(BackendError::from)?;
        Ok(Box::new(CudaBlock { handle }))
    }
}

struct CudaBlock {
    handle: sys::CUmemGenericAllocationHandle,
}

impl Block for CudaBlock {
    /// The driver's descriptors carry no access right: whether a mapping can be written is chosen
    /// by the client that maps it.
    fn export(&self, _access: Access) -> Result<Arc<OwnedFd>, BackendError> {
        let mut descriptor: RawFd = -1;
        // SAFETY: for this kind of handle the driver writes a descriptor where the pointer points.
        let answer = unsafe {
            let into = (&raw mut descriptor).cast::<c_void>();
            sys::cuMemExportToShareableHandle(into, self.handle, POSIX_DESCRIPTOR, 0)
        };
        check("cuMemExportToShareableHandle", answer)?;
        // SAFETY: the driver has just opened it for us.
        Ok(Arc::new(unsafe { OwnedFd::from_raw_fd(descriptor) }))
    }
}

impl Drop for CudaBlock {
    fn drop(&mut self) {
        // SAFETY: the handle is ours and is not used again.
        let answer = unsafe { sys::cuMemRelease(self.handle) };
        if let Err(error) = check("cuMemRelease", answer) {
            tracing::error!(%error, "a block of GPU memory is lost");
        }
    }
}

/// Maps blocks of GPU memory into this process.
#[derive(Debug)]
pub struct CudaMapper {
    context: Context,
    granularity_bytes: u64,
}

impl CudaMapper {
    /// A mapper for the GPU with this CUDA ordinal.
    ///
    /// # Errors
    /// There is no driver or no such GPU.
    pub fn new(ordinal: u32) -> Result<CudaMapper, CudaError> {
        let driver = driver()?;
        let device = driver.device(ordinal)?;
        Ok(CudaMapper {
            granularity_bytes: granularity_bytes(driver, device)?,
            context: Context::new(driver, ordinal)?,
        })
    }

    fn import(&self, descriptor: OwnedFd) -> Result<u64, CudaError> {
        let mut handle = 0;
        // The descriptor travels as a pointer's value; it is closed here, whatever the answer.
        let value = descriptor.as_raw_fd() as usize as *mut c_void;
        // SAFETY: the first pointer is to a live value; the second is a number by contract.
        let answer = unsafe {
            sys::cuMemImportFromShareableHandle(&raw mut handle, value, POSIX_DESCRIPTOR)
        };
        check("cuMemImportFromShareableHandle", answer).map(|()| handle)
    }

    /// # Safety
    /// As [`Mapper::map`].
    unsafe fn map_handle(
        &self,
        address: u64,
        bytes: u64,
        handle: u64,
        access: Access,
    ) -> Result<(), CudaError> {
        // SAFETY: the caller owns the range, in which nothing is mapped.
        let answer = unsafe { sys::cuMemMap(address, bytes as usize, 0, handle, 0) };
        check("cuMemMap", answer)?;
        let flags = match access {
            Access::Read => sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READ,
            Access::ReadWrite => sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        let wanted = sys::CUmemAccessDesc {
            location: location(self.context.device()),
            flags,
        };
        // SAFETY: the range was just mapped; the pointer is to one live value.
        let answer = unsafe { sys::cuMemSetAccess(address, bytes as usize, &raw const wanted, 1) };
        check("cuMemSetAccess", answer).inspect_err(|_| {
            // SAFETY: nobody can have used a mapping without access.
            unsafe { sys::cuMemUnmap(address, bytes as usize) };
        })
    }
}

// SAFETY: reservations and mappings are the driver's, which keeps them apart; each call is given
// exactly the range that the caller owns.
unsafe impl Mapper for CudaMapper {
    fn granularity_bytes(&self) -> u64 {
        self.granularity_bytes
    }

    fn reserve(&self, bytes: u64) -> Result<u64, BackendError> {
        let mut address = 0;
        let align = self.granularity_bytes as usize;
        // SAFETY: the pointer is to a live value; the driver chooses the address.
        let answer =
            unsafe { sys::cuMemAddressReserve(&raw mut address, bytes as usize, align, 0, 0) };
        Ok(check("cuMemAddressReserve", answer).map(|()| address)?)
    }

    unsafe fn map(
        &self,
        address: u64,
        bytes: u64,
        descriptor: OwnedFd,
        access: Access,
    ) -> Result<u64, BackendError> {
        self.context.enter()?;
        let handle = self.import(descriptor)?;
        // SAFETY: the caller's contract is the same.
        let mapped = unsafe { self.map_handle(address, bytes, handle, access) };
        mapped.inspect_err(|_| {
            // SAFETY: the handle is ours and nothing is mapped from it.
            unsafe { sys::cuMemRelease(handle) };
        })?;
        Ok(handle)
    }

    unsafe fn unmap(&self, address: u64, bytes: u64, mapping: u64) -> Result<(), BackendError> {
        // SAFETY: the range is mapped from this handle, and nobody uses it any more.
        let answers = unsafe {
            (
                sys::cuMemUnmap(address, bytes as usize),
                sys::cuMemRelease(mapping),
            )
        };
        check("cuMemUnmap", answers.0)?;
        Ok(check("cuMemRelease", answers.1)?)
    }

    unsafe fn release(&self, address: u64, bytes: u64) {
        // SAFETY: the reservation is whole and empty.
        let answer = unsafe { sys::cuMemAddressFree(address, bytes as usize) };
        if let Err(error) = check("cuMemAddressFree", answer) {
            tracing::error!(%error, "a reservation of GPU addresses is lost");
        }
    }

    fn synchronize(&self) -> Result<(), BackendError> {
        self.context.enter()?;
        // SAFETY: this thread has a context.
        Ok(check("cuCtxSynchronize", unsafe {
            sys::cuCtxSynchronize()
        })?)
    }

    fn verify(&self, address: u64) -> Result<(), BackendError> {
        let mut known: sys::CUdeviceptr = 0;
        let which = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_POINTER;
        // SAFETY: for this attribute the driver writes an address where the pointer points.
        let answer = unsafe {
            sys::cuPointerGetAttribute((&raw mut known).cast::<c_void>(), which, address)
        };
        check("cuPointerGetAttribute", answer)?;
        match known == address {
            true => Ok(()),
            false => Err(BackendError::new(
                "checking an address",
                "the driver knows another",
            )),
        }
    }
}
