//! The CUDA driver: found at run time, started once, and asked before it is called.
//!
//! The driver's library is asked for every function that is used before any is called, because the
//! binding panics over a missing one; so a machine without a driver, or with one that is too old,
//! gets an error that says so.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::marker::PhantomData;
use std::ptr;
use std::sync::OnceLock;

use cudarc::driver::sys;
use thiserror::Error;

use crate::backend::BackendError;
use crate::paths;

/// Why CUDA cannot be used. Each has its own remedy, so each is its own case.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
pub enum CudaError {
    /// There is no driver.
    #[error("libcuda was not found: install the NVIDIA driver, or serve host memory")]
    NoLibrary,
    /// The driver lacks a function.
    #[error("libcuda lacks {0}: the driver is too old (CUDA 11.4 or later is needed)")]
    Incomplete(&'static str),
    /// The driver does not start.
    #[error("the CUDA driver does not start: {0}")]
    NotStarted(String),
    /// There is no such GPU.
    #[error("there is no GPU {ordinal}: the driver sees {count} (CUDA_VISIBLE_DEVICES counts)")]
    NoDevice {
        /// Which was asked for.
        ordinal: u32,
        /// How many there are.
        count: u32,
    },
    /// The driver refused something.
    #[error("{call} failed: {name}")]
    Driver {
        /// The call.
        call: &'static str,
        /// The driver's name for the error.
        name: String,
    },
}

impl CudaError {
    /// Whether the driver refused with this name.
    pub fn is(&self, wanted: &str) -> bool {
        matches!(self, CudaError::Driver { name, .. } if name == wanted)
    }
}

impl From<CudaError> for BackendError {
    fn from(error: CudaError) -> BackendError {
        match error {
            CudaError::Driver { call, name } => BackendError::new(call, name),
            other => BackendError::new("using CUDA", other),
        }
    }
}

/// What everybody needs.
const FUNCTIONS: [&str; 10] = [
    "cuInit",
    "cuGetErrorName",
    "cuDeviceGet",
    "cuDeviceGetCount",
    "cuDeviceGetUuid",
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuCtxSynchronize",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
];

/// Proof that the driver is loaded, complete and started: only then may it be called.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Driver;

impl Driver {
    /// Loads and starts the driver, once per process.
    pub(crate) fn load() -> Result<Driver, CudaError> {
        static LOADED: OnceLock<Result<Driver, CudaError>> = OnceLock::new();
        LOADED.get_or_init(Driver::load_once).clone()
    }

    fn load_once() -> Result<Driver, CudaError> {
        // SAFETY: looks for the library by name and runs its initialisers, which is what is wanted.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::NoLibrary);
        }
        Driver.require(&FUNCTIONS)?;
        // SAFETY: the function is there.
        let started = unsafe { sys::cuInit(0) };
        match check("cuInit", started) {
            Ok(()) => Ok(Driver),
            Err(CudaError::Driver { name, .. }) => Err(CudaError::NotStarted(name)),
            Err(other) => Err(other),
        }
    }

    /// Looks for functions that not everybody needs, before any is called.
    pub(crate) fn require(self, functions: &[&'static str]) -> Result<(), CudaError> {
        // SAFETY: the library is there, so this does not panic.
        let library = unsafe { sys::culib() };
        for function in functions {
            // SAFETY: the symbol is only looked up, never used through this type.
            let found = unsafe { library.get::<*const c_void>(function.as_bytes()) };
            if found.is_err() {
                return Err(CudaError::Incomplete(function));
            }
        }
        Ok(())
    }

    pub(crate) fn device(self, ordinal: u32) -> Result<sys::CUdevice, CudaError> {
        let mut count: c_int = 0;
        // SAFETY: the pointer is to a live value.
        let answer = unsafe { sys::cuDeviceGetCount(&raw mut count) };
        check("cuDeviceGetCount", answer)?;
        let count = u32::try_from(count).unwrap_or_default();
        if ordinal >= count {
            return Err(CudaError::NoDevice { ordinal, count });
        }
        let mut device: sys::CUdevice = 0;
        // SAFETY: the pointer is to a live value, and the ordinal is one of the driver's.
        let answer = unsafe { sys::cuDeviceGet(&raw mut device, ordinal as c_int) };
        check("cuDeviceGet", answer).map(|()| device)
    }
}

/// Turns the driver's answer into a result.
pub(crate) fn check(call: &'static str, answer: sys::CUresult) -> Result<(), CudaError> {
    if answer == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut name = ptr::null();
    // SAFETY: the pointer is to a live value; the driver puts a static text there or nothing.
    let named = unsafe { sys::cuGetErrorName(answer, &raw mut name) };
    let name = if named == sys::CUresult::CUDA_SUCCESS && !name.is_null() {
        // SAFETY: the driver's text ends with a zero and is never freed.
        unsafe { CStr::from_ptr(name) }
            .to_string_lossy()
            .into_owned()
    } else {
        format!("error {answer:?}")
    };
    Err(CudaError::Driver { call, name })
}

/// The GPU's id as clients write it in socket names, found by CUDA ordinal: NVML's index ignores
/// `CUDA_VISIBLE_DEVICES` and may name another GPU (hazard H6).
///
/// # Errors
/// There is no driver or no such GPU.
pub fn gpu_uuid(ordinal: u32) -> Result<String, CudaError> {
    let device = Driver::load()?.device(ordinal)?;
    let mut uuid = sys::CUuuid { bytes: [0; 16] };
    // SAFETY: the pointer is to a live value.
    let answer = unsafe { sys::cuDeviceGetUuid(&raw mut uuid, device) };
    check("cuDeviceGetUuid", answer)?;
    Ok(paths::gpu_uuid(uuid.bytes.map(|byte| byte as u8)))
}

/// Where a GPU sits on the PCI bus, as the kernel writes it: `0000:65:00.0`.
///
/// # Errors
/// There is no driver or no such GPU.
pub fn pci_bus_id(ordinal: u32) -> Result<String, CudaError> {
    let driver = Driver::load()?;
    driver.require(&["cuDeviceGetPCIBusId"])?;
    let device = driver.device(ordinal)?;
    let mut text = [0 as c_char; 32];
    // SAFETY: the pointer is to as many bytes as are named.
    let answer =
        unsafe { sys::cuDeviceGetPCIBusId(text.as_mut_ptr(), text.len() as c_int, device) };
    check("cuDeviceGetPCIBusId", answer)?;
    let bytes: Vec<u8> = text
        .iter()
        .map(|c| *c as u8)
        .take_while(|c| *c != 0)
        .collect();
    Ok(String::from_utf8_lossy(&bytes).to_ascii_lowercase())
}

/// A device's primary context, kept for as long as this lives.
#[derive(Debug)]
pub(crate) struct Context {
    device: sys::CUdevice,
    /// The driver's pointer, which any thread may use.
    context: usize,
}

impl Context {
    pub(crate) fn new(driver: Driver, ordinal: u32) -> Result<Context, CudaError> {
        let device = driver.device(ordinal)?;
        let mut context = ptr::null_mut();
        // SAFETY: the pointer is to a live value.
        let answer = unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut context, device) };
        check("cuDevicePrimaryCtxRetain", answer)?;
        Ok(Context {
            device,
            context: context as usize,
        })
    }

    pub(crate) fn device(&self) -> sys::CUdevice {
        self.device
    }

    /// Makes sure that this thread has a context; one that an engine has made current stays.
    pub(crate) fn enter(&self) -> Result<(), CudaError> {
        if current()? != 0 {
            return Ok(());
        }
        set_current(self.context)
    }

    /// Makes this context the thread's until the answer is dropped; for calls that work on the
    /// current device, which may be another one of the engine's.
    pub(crate) fn inside(&self) -> Result<Inside, CudaError> {
        let before = current()?;
        if before != self.context {
            set_current(self.context)?;
        }
        Ok(Inside {
            restore: (before != self.context).then_some(before),
            _here: PhantomData,
        })
    }
}

fn current() -> Result<usize, CudaError> {
    let mut current = ptr::null_mut();
    // SAFETY: the pointer is to a live value.
    let answer = unsafe { sys::cuCtxGetCurrent(&raw mut current) };
    check("cuCtxGetCurrent", answer).map(|()| current as usize)
}

fn set_current(context: usize) -> Result<(), CudaError> {
    // SAFETY: the context is retained by a living `Context`, or was current before, or is none.
    let answer = unsafe { sys::cuCtxSetCurrent(context as sys::CUcontext) };
    check("cuCtxSetCurrent", answer)
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once by `new`.
        unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

/// This thread works in a context of ours; what was current before comes back.
pub(crate) struct Inside {
    restore: Option<usize>,
    /// Belongs to its thread.
    _here: PhantomData<*const ()>,
}

impl Drop for Inside {
    fn drop(&mut self) {
        if let Some(before) = self.restore {
            // An error here is one of the driver's that its next call reports.
            let _ = set_current(before);
        }
    }
}
