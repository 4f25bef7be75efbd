//! Where sockets lie (`spec/gpu-memory.md` §2.2).

use std::env;
use std::path::{Path, PathBuf};

/// Names the directory of all sockets.
pub const SOCKET_DIR_VARIABLE: &str = "GMS_SOCKET_DIR";

/// A Unix socket's path, with its final zero, must fit in this many bytes.
pub const PATH_BYTES_MAX: usize = 108;

/// The directory of all sockets: as the environment says, else where temporary files go.
pub fn socket_dir() -> PathBuf {
    let named = env::var_os(SOCKET_DIR_VARIABLE).filter(|dir| !dir.is_empty());
    named.map_or_else(env::temp_dir, PathBuf::from)
}

/// The seed era's socket: one per GPU.
pub fn d0(dir: &Path, gpu_uuid: &str) -> PathBuf {
    dir.join(format!("gms_{gpu_uuid}.sock"))
}

/// The first generation's socket: one per GPU and pool.
pub fn d1(dir: &Path, gpu_uuid: &str, tag: &str) -> PathBuf {
    dir.join(format!("gms_{gpu_uuid}_{tag}.sock"))
}

/// The second generation's socket: one per CUDA ordinal and pool.
pub fn d2(dir: &Path, ordinal: u32, tag: &str) -> PathBuf {
    dir.join(format!("gms_{ordinal}_{tag}.sock"))
}

/// How a GPU is written: `GPU-` and its 16 bytes in the usual groups.
pub fn gpu_uuid(bytes: [u8; 16]) -> String {
    format!("GPU-{}", uuid::Uuid::from_bytes(bytes).as_hyphenated())
}

/// What stands in for a GPU's id where host memory is served: the device number in it.
pub fn host_uuid(ordinal: u32) -> String {
    gpu_uuid(u128::from(ordinal).to_be_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_upstreams() {
        let dir = Path::new("/run/x");
        let gpu = gpu_uuid(0x12345678_1234_1234_1234_123456789abc_u128.to_be_bytes());
        assert_eq!(gpu, "GPU-12345678-1234-1234-1234-123456789abc");
        assert_eq!(d0(dir, "GPU-1"), Path::new("/run/x/gms_GPU-1.sock"));
        assert_eq!(
            d1(dir, "GPU-1", "weights"),
            Path::new("/run/x/gms_GPU-1_weights.sock")
        );
        assert_eq!(
            d2(dir, 3, "kv_cache"),
            Path::new("/run/x/gms_3_kv_cache.sock")
        );
        assert_eq!(host_uuid(1), "GPU-00000000-0000-0000-0000-000000000001");
    }
}
