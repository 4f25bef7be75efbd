//! What several processes do with one pool of memory: on the host, on a stand-in for the CUDA
//! driver's library that this test builds, and on a real GPU where there is one.
//!
//! Processes play roles: this program is run again with `ROLE`, `DIR` and `MEMORY` set. Whether the
//! driver is the real one is decided by their `LD_LIBRARY_PATH` alone. The program needs nothing
//! beside it to run on a GPU: copied to a machine that has one, `processes --nocapture real_gpu`
//! plays everything there. `CORELANE_TEST_GPU=1` makes a missing GPU a failure.

#[path = "../common/mod.rs"]
mod common;
#[cfg(feature = "cuda")]
mod faults;
#[cfg(feature = "cuda")]
mod ipc;
#[cfg(feature = "cuda")]
mod pinned;
mod roles;
mod share;
#[cfg(feature = "cuda")]
mod strict;

use roles::Stage;

/// Does nothing unless a role is named.
#[test]
fn a_role_is_played() {
    roles::play();
}

#[test]
fn processes_share_memory_of_the_host() {
    share::scenario(&Stage::host());
}

#[cfg(feature = "cuda")]
mod cuda {
    use super::*;
    use corelane_gpu_mem::backend::cuda::{CudaBackend, CudaError, CudaMapper, gpu_uuid};

    #[test]
    fn processes_share_memory_of_the_stand_in() {
        // The first creation finds no memory, and is tried again.
        share::scenario(&Stage::stand_in(&[("STAND_IN_CREATE_OOM", "1")]));
    }

    #[test]
    fn everything_works_on_a_real_gpu() {
        // The machine's own library, not the stand-in.
        if let Err(error) = gpu_uuid(0) {
            assert!(
                std::env::var_os("CORELANE_TEST_GPU").is_none(),
                "CORELANE_TEST_GPU is set, and {error}"
            );
            println!("left out: there is no GPU here ({error})");
            return;
        }
        let started = std::time::Instant::now();
        let step = |name: &str| println!("{name}: ok at {:?}", started.elapsed());
        share::scenario(&Stage::gpu());
        step("blocks are shared by descriptor");
        ipc::lent_memory_is_closed_before_it_is_freed(&Stage::gpu());
        ipc::an_owners_death_is_seen(&Stage::gpu());
        step("legacy memory is lent by handle");
        Stage::gpu().start("pin", &[]).finish();
        step("pinned memory is copied on a stream");
        strict::refusals(&Stage::gpu());
        step("the driver refuses what the stand-in refuses");
    }

    /// Hazard H6: a socket is named for the GPU that the ordinal means here, and NVML's index would
    /// name another where a mask is set.
    #[test]
    fn h06_a_gpu_is_known_by_its_ordinal_behind_the_mask() {
        let stage = Stage::stand_in(&[]);
        let masked = [("STAND_IN_DEVICES", "3"), ("CUDA_VISIBLE_DEVICES", "2,0")];
        let mut role = stage.start("identify", &masked);
        let line = role.hear("GPUs:");
        let words = line.split_whitespace();
        let ids: Vec<&str> = words.filter(|word| word.starts_with("GPU-")).collect();
        assert!(ids[0].ends_with("02") && ids[1].ends_with("00"), "{line}");
        assert!(role.hear("no third").contains("the driver sees 2"));
        role.finish();
    }

    #[test]
    fn b30_without_a_driver_the_error_says_so() {
        match CudaBackend::new(0) {
            Err(CudaError::NoLibrary) => {
                let text = CudaError::NoLibrary.to_string();
                assert!(text.contains("install the NVIDIA driver"), "{text}");
                assert!(
                    matches!(CudaMapper::new(0), Err(CudaError::NoLibrary)),
                    "and again"
                );
                let pinner = corelane_gpu_mem::pinned::Pinner::new(0);
                assert!(matches!(pinner, Err(CudaError::NoLibrary)));
                let legacy = corelane_gpu_mem::ipc::LegacyCuda::new(0);
                assert!(matches!(legacy, Err(CudaError::NoLibrary)));
            }
            Ok(_) | Err(_) => println!("left out: this machine has a driver"),
        }
    }
}
