//! The stand-in for the CUDA driver's library.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Builds the stand-in, once, and gives it the name by which the driver's library is looked for.
pub(crate) fn library() -> tempfile::TempDir {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let library = BUILT.get_or_init(|| {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("stand-in-cuda/Cargo.toml");
        let target = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("stand-in-cuda");
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let built = Command::new(cargo)
            .args(["build", "--quiet", "--offline", "--manifest-path"])
            .arg(source)
            .arg("--target-dir")
            .arg(&target)
            .status()
            .expect("cargo runs");
        assert!(built.success());
        target.join("debug/libcuda_stand_in.so")
    });
    let dir = tempfile::tempdir().expect("a directory");
    for name in ["libcuda.so", "libcuda.so.1"] {
        std::fs::copy(library, dir.path().join(name)).expect("it was built");
    }
    dir
}
