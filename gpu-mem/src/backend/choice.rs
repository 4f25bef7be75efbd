//! Opens the backend that an operator asked for, on machines with and without a GPU.

use thiserror::Error;

use super::host::{HostBackend, HostConfig};
use super::{Backend, BackendError};
use crate::paths;

/// Which memory to serve.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum BackendChoice {
    /// The GPU's; an error where there is none.
    Cuda,
    /// The host's.
    Host,
    /// The GPU's where there is one, else the host's.
    Auto,
}

/// Why the backend is not open.
#[derive(Debug, Error)]
pub enum OpenError {
    /// This program was built without CUDA.
    #[error("this program was built without CUDA (feature `cuda`); serve host memory instead")]
    NotBuilt,
    /// CUDA was demanded and cannot be used.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Cuda(#[from] super::cuda::CudaError),
    /// The host's memory cannot be used so.
    #[error(transparent)]
    Host(#[from] BackendError),
}

/// One device's memory, ready to be served.
pub struct Opened {
    /// Makes a backend for each pool of the device; host pools share one capacity.
    make: Box<dyn Fn() -> Box<dyn Backend>>,
    /// The device as clients name it.
    pub gpu_uuid: String,
    /// Why `auto` did not take the GPU.
    pub fallback: Option<String>,
}

impl Opened {
    /// A backend for one more pool.
    pub fn backend(&self) -> Box<dyn Backend> {
        (self.make)()
    }
}

/// Opens a device: by CUDA ordinal, or a stand-in of that number in host memory.
///
/// # Errors
/// CUDA was demanded and is not there, or the host's config makes no sense.
pub fn open(choice: BackendChoice, ordinal: u32, host: HostConfig) -> Result<Opened, OpenError> {
    let why = match choice {
        BackendChoice::Host => None,
        BackendChoice::Cuda => return open_cuda(ordinal),
        BackendChoice::Auto => match open_cuda(ordinal) {
            Ok(opened) => return Ok(opened),
            Err(error) => Some(error.to_string()),
        },
    };
    let backend = HostBackend::new(host)?;
    Ok(Opened {
        make: Box::new(move || Box::new(backend.clone())),
        gpu_uuid: paths::host_uuid(ordinal),
        fallback: why,
    })
}

#[cfg(feature = "cuda")]
fn open_cuda(ordinal: u32) -> Result<Opened, OpenError> {
    use super::cuda::{CudaBackend, gpu_uuid};

    let gpu_uuid = gpu_uuid(ordinal)?;
    let backend = CudaBackend::new(ordinal)?;
    Ok(Opened {
        make: Box::new(move || Box::new(backend)),
        gpu_uuid,
        fallback: None,
    })
}

#[cfg(not(feature = "cuda"))]
fn open_cuda(_ordinal: u32) -> Result<Opened, OpenError> {
    Err(OpenError::NotBuilt)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_always_finds_memory_and_says_why_it_is_the_hosts() {
        let opened = open(BackendChoice::Auto, 0, HostConfig::default()).expect("memory");
        assert_eq!(opened.fallback.is_some(), opened.backend().name() == "host");
        match open(BackendChoice::Cuda, 0, HostConfig::default()) {
            Ok(cuda) => assert_eq!(cuda.backend().name(), "cuda"),
            Err(error) => assert!(!matches!(error, OpenError::Host(_)), "{error}"),
        }
    }

    #[test]
    fn pools_of_one_host_device_share_its_capacity() {
        let granularity = super::super::host::GRANULARITY_BYTES;
        let host = HostConfig {
            capacity_bytes: Some(granularity),
            ..HostConfig::default()
        };
        let opened = open(BackendChoice::Host, 1, host).expect("memory");
        let _block = opened.backend().create(granularity).expect("memory");
        assert!(opened.backend().create(granularity).is_err());
        assert!(opened.gpu_uuid.ends_with("01"));
    }
}
