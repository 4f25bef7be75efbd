//! The driver's side of lent memory: allocated here or opened from another process, and given back
//! in the order that the driver needs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cudarc::driver::sys;

use super::{IpcHandle, Offer};
use crate::client::{ClientError, Dial, Session, ipc_state};
use crate::cuda::{Context, CudaError, Driver, check};

const FUNCTIONS: [&str; 6] = [
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemGetAddressRange_v2",
    "cuIpcGetMemHandle",
    "cuIpcOpenMemHandle_v2",
    "cuIpcCloseMemHandle",
];

/// A handle opens the whole block that the driver cut an allocation from. Allocations of whole
/// blocks have no neighbours in them.
const BLOCK_BYTES: u64 = 2 << 20;

/// Legacy memory of one GPU, in its primary context.
#[derive(Clone, Debug)]
pub struct LegacyCuda {
    context: Arc<Context>,
}

impl LegacyCuda {
    /// The GPU with this CUDA ordinal.
    ///
    /// # Errors
    /// There is no driver or no such GPU.
    pub fn new(ordinal: u32) -> Result<LegacyCuda, CudaError> {
        let driver = Driver::load()?;
        driver.require(&FUNCTIONS)?;
        let context = Arc::new(Context::new(driver, ordinal)?);
        Ok(LegacyCuda { context })
    }

    /// Allocates, in whole blocks, so that lending exposes no other allocation.
    ///
    /// # Errors
    /// There is no memory, or the driver refused.
    pub fn allocate(&self, bytes: u64) -> Result<LegacyMemory, CudaError> {
        let _inside = self.context.inside()?;
        let bytes = bytes.max(1).next_multiple_of(BLOCK_BYTES);
        let mut address = 0;
        // SAFETY: the pointer is to a live value.
        let answer = unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes as usize) };
        check("cuMemAlloc", answer)?;
        Ok(LegacyMemory {
            cuda: self.clone(),
            address,
            bytes,
            lent: Vec::new(),
        })
    }

    /// Describes memory that an engine has allocated itself: the handle is its base allocation's,
    /// which may hold other things too; the offset is what leads to it there.
    ///
    /// Lending it by [`Session::offer_ipc`] makes the caller answer for what [`LegacyMemory`]
    /// takes care of: nothing is freed before [`ipc_state`] says that it is no more held.
    ///
    /// # Errors
    /// The address lies in no legacy allocation of this process.
    pub fn describe(&self, address: u64, size: u64, tag: &str) -> Result<Offer, CudaError> {
        let _inside = self.context.inside()?;
        let (mut base, mut base_bytes) = (0, 0);
        // SAFETY: both pointers are to live values; the driver only looks the address up.
        let answer =
            unsafe { sys::cuMemGetAddressRange_v2(&raw mut base, &raw mut base_bytes, address) };
        check("cuMemGetAddressRange", answer)?;
        let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
        // SAFETY: the pointer is to a live value; the driver only looks the address up.
        let answer = unsafe { sys::cuIpcGetMemHandle(&raw mut handle, base) };
        check("cuIpcGetMemHandle", answer)?;
        Ok(Offer {
            handle: IpcHandle(handle.reserved.map(|byte| byte as u8)),
            base_bytes: base_bytes as u64,
            offset_bytes: address - base,
            size,
            tag: tag.to_owned(),
            value: Vec::new(),
        })
    }

    /// Opens another process's memory. Opening it again gives the same address and is counted.
    ///
    /// A session that allows it must be held until the answer is dropped; [`super::Imports`] sees
    /// to that.
    ///
    /// # Errors
    /// The handle is this process's own, or its memory is gone.
    pub fn open(&self, offer: &Offer) -> Result<OpenedMemory, CudaError> {
        let _inside = self.context.inside()?;
        let reserved = offer.handle.0.map(|byte| byte as std::ffi::c_char);
        let flags = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        let mut base = 0;
        // SAFETY: the pointer is to a live value; the driver checks the handle.
        let answer = unsafe {
            let handle = sys::CUipcMemHandle { reserved };
            sys::cuIpcOpenMemHandle_v2(&raw mut base, handle, flags)
        };
        check("cuIpcOpenMemHandle", answer)?;
        Ok(OpenedMemory {
            cuda: self.clone(),
            base,
            offset_bytes: offer.offset_bytes,
            bytes: offer.size,
        })
    }

    /// Waits until no work of this process uses any memory of the context.
    ///
    /// # Errors
    /// The driver reports that work failed.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        let _inside = self.context.inside()?;
        // SAFETY: this thread has a context.
        check("cuCtxSynchronize", unsafe { sys::cuCtxSynchronize() })
    }
}

/// Where a piece of memory was lent.
#[derive(Clone, Debug)]
struct Lent {
    dial: Dial,
    id: String,
    server_nonce: String,
}

impl Lent {
    /// Whether nobody can have it open any more. A service that cannot be asked, or is another
    /// than before, knows nothing of who still has it.
    fn is_over(&self) -> Result<bool, ClientError> {
        // One try: a service that is not there now need not come back.
        let dial = Dial {
            dial_timeout: Duration::ZERO,
            ..self.dial.clone()
        };
        let state = ipc_state(&dial, &self.id)?;
        if state.server_nonce != self.server_nonce {
            return Err(ClientError::Stale("the service is another one".into()));
        }
        Ok(!state.held)
    }
}

/// Memory of this process's own, which can be lent.
///
/// Dropping it frees it, unless it is lent: what others may have open is never freed under them.
/// It stays allocated then, until the process ends, and the log says so.
#[derive(Debug)]
pub struct LegacyMemory {
    cuda: LegacyCuda,
    address: u64,
    bytes: u64,
    lent: Vec<Lent>,
}

impl LegacyMemory {
    /// Its address on the GPU, in this process.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Its size.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Makes it a part of the layout that a writer's session builds. Answers its name there.
    ///
    /// # Errors
    /// Not allowed by the grant, the driver gives no handle, or the connection failed.
    pub fn lend(
        &mut self,
        dial: &Dial,
        session: &mut Session,
        tag: &str,
        value: &[u8],
    ) -> Result<String, ClientError> {
        let described = self.cuda.describe(self.address, self.bytes, tag);
        let offer = Offer {
            value: value.to_vec(),
            ..described.map_err(crate::backend::BackendError::from)?
        };
        let taken = session.offer_ipc(&offer)?;
        self.lent.push(Lent {
            dial: dial.clone(),
            id: taken.allocation_id.clone(),
            server_nonce: taken.server_nonce,
        });
        Ok(taken.allocation_id)
    }

    /// Whether it may be freed: no layout holds it.
    ///
    /// # Errors
    /// The service cannot be asked, or is another than the one that knew who holds it.
    pub fn is_free(&mut self) -> Result<bool, ClientError> {
        while let Some(lent) = self.lent.last() {
            if !lent.is_over()? {
                return Ok(false);
            }
            self.lent.pop();
        }
        Ok(true)
    }

    /// Waits until it may be freed, asking now and then. A writer that wants it back sooner asks
    /// for the lock, which replaces the layout once all readers have left.
    ///
    /// # Errors
    /// As [`LegacyMemory::is_free`], or the time is over.
    pub fn wait_until_free(&mut self, wait: Duration) -> Result<(), ClientError> {
        let deadline = Instant::now() + wait;
        while !self.is_free()? {
            if Instant::now() >= deadline {
                return Err(ClientError::Lent);
            }
            std::thread::sleep(ASK_INTERVAL);
        }
        Ok(())
    }
}

impl Drop for LegacyMemory {
    fn drop(&mut self) {
        if !matches!(self.is_free(), Ok(true)) {
            let bytes = self.bytes;
            tracing::error!(bytes, "lent memory is kept: others may have it open");
            return;
        }
        let Ok(_inside) = self.cuda.context.inside() else {
            return;
        };
        // SAFETY: the allocation is ours, and nobody has it open.
        let answer = unsafe { sys::cuMemFree_v2(self.address) };
        if let Err(error) = check("cuMemFree", answer) {
            tracing::error!(%error, "an allocation of GPU memory is lost");
        }
    }
}

/// Another process's memory, open here. Dropping it closes it.
#[derive(Debug)]
pub struct OpenedMemory {
    cuda: LegacyCuda,
    base: u64,
    offset_bytes: u64,
    bytes: u64,
}

impl OpenedMemory {
    /// Where the lent bytes are in this process. The driver chose it, and another opening may lie
    /// elsewhere. It can be written through, whatever the grant: a reader must not.
    pub fn address(&self) -> u64 {
        self.base + self.offset_bytes
    }

    /// How many lent bytes there are.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for OpenedMemory {
    fn drop(&mut self) {
        let Ok(_inside) = self.cuda.context.inside() else {
            return;
        };
        // SAFETY: opened once by `open`, and whoever drops this uses it no more.
        let answer = unsafe { sys::cuIpcCloseMemHandle(self.base) };
        if let Err(error) = check("cuIpcCloseMemHandle", answer) {
            tracing::error!(%error, "lent memory stays open until this process ends");
        }
    }
}

const ASK_INTERVAL: Duration = Duration::from_millis(50);
