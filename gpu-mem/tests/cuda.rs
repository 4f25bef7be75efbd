//! The CUDA path, on a stand-in for the driver's library that this test builds, and on a real GPU
//! where `CORELANE_TEST_GPU=1` says that there is one.
//!
//! Processes play roles: this program is run again with `ROLE` and `DIR` set. Whether the driver is
//! the real one is decided by their `LD_LIBRARY_PATH` alone.

#![cfg(feature = "cuda")]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use common::PATIENCE;
use corelane_gpu_mem::backend::cuda::{CudaBackend, CudaError, CudaMapper, gpu_uuid};
use corelane_gpu_mem::client::{ClientError, Dial, Session, SharedMemory, Woken};
use corelane_gpu_mem::domain::DomainConfig;
use corelane_gpu_mem::lock::{Grant, LockType, Profile};
use corelane_gpu_mem::server::{PoolConfig, Server, ServerConfig};
use cudarc::driver::sys;

/// A child that plays a role; killed when this is dropped.
struct Role {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Role {
    fn start(role: &str, dir: &Path, library: Option<&Path>, more: &[(&str, &str)]) -> Role {
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command
            .args([
                "--exact",
                "a_role_is_played",
                "--nocapture",
                "--test-threads=1",
            ])
            .env("ROLE", role)
            .env("DIR", dir)
            .envs(more.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        if let Some(library) = library {
            command.env("LD_LIBRARY_PATH", library);
        }
        let mut child = command.spawn().expect("it starts");
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        Role {
            child,
            stdin,
            stdout,
        }
    }

    /// Waits until it says this word.
    fn hear(&mut self, word: &str) {
        let mut line = String::new();
        while self.stdout.read_line(&mut line).expect("it speaks") > 0 {
            if line.contains(word) {
                return;
            }
            line.clear();
        }
        panic!("it ended without saying {word}");
    }

    fn tell(&mut self) {
        self.stdin
            .as_mut()
            .expect("open")
            .write_all(b"go\n")
            .expect("it listens");
    }

    fn finish(mut self) {
        self.stdin = None;
        self.hear("test result: ok");
        assert!(self.child.wait().expect("it ended").success());
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn say(word: &str) {
    println!("{word}");
    std::io::stdout().flush().expect("somebody listens");
}

fn wait_for_word() {
    std::io::stdin()
        .lock()
        .read_line(&mut String::new())
        .expect("somebody speaks");
}

/// Does nothing unless a role is named.
#[test]
fn a_role_is_played() {
    let (Ok(role), Some(dir)) = (std::env::var("ROLE"), std::env::var_os("DIR")) else {
        return;
    };
    let dial = Dial::new(Path::new(&dir).join("weights.sock"));
    match role.as_str() {
        "serve" => serve(&dial),
        "write" => drop(write(&dial)),
        "stand by" => stand_by(&dial),
        "refused" => refused(&dial),
        other => panic!("no such role: {other}"),
    }
}

fn serve(dial: &Dial) {
    let gpu = gpu_uuid(0).expect("there is a GPU");
    assert!(gpu.starts_with("GPU-") && gpu.len() == 40, "{gpu}");
    let none = CudaBackend::new(99).err();
    assert!(
        matches!(none, Some(CudaError::NoDevice { ordinal: 99, .. })),
        "{none:?}"
    );
    let mut domain = DomainConfig::new(Profile::V1, &gpu, "weights");
    domain.retry_interval = Duration::from_millis(20);
    let pool = PoolConfig {
        path: dial.path.clone(),
        domain,
        backend: Box::new(CudaBackend::new(0).expect("there is a GPU")),
        checkpoint_group: None,
    };
    let handle = Server::start(ServerConfig::new(vec![pool])).expect("the service starts");
    say("serving");
    wait_for_word();
    drop(handle);
}

fn mark() -> u8 {
    std::env::var("MARK")
        .ok()
        .and_then(|mark| mark.parse().ok())
        .expect("a mark")
}

const SIZES: [u64; 2] = [100, 3 << 20];

/// Copies one byte to the last place of an allocation.
fn poke(memory: &SharedMemory<CudaMapper>, rank: usize, byte: u8) -> Result<(), String> {
    let at = place(memory, rank);
    // SAFETY: the address lies in a mapped region; the driver checks its access.
    match unsafe { sys::cuMemcpyHtoD_v2(at, (&raw const byte).cast(), 1) } {
        sys::CUresult::CUDA_SUCCESS => Ok(()),
        other => Err(format!("{other:?}")),
    }
}

fn peek(memory: &SharedMemory<CudaMapper>, rank: usize) -> u8 {
    let mut byte = 0_u8;
    // SAFETY: the address lies in a region that is mapped for reading at least.
    let answer = unsafe { sys::cuMemcpyDtoH_v2((&raw mut byte).cast(), place(memory, rank), 1) };
    assert_eq!(answer, sys::CUresult::CUDA_SUCCESS);
    byte
}

fn place(memory: &SharedMemory<CudaMapper>, rank: usize) -> u64 {
    let (info, region) = memory.get(rank).expect("it is there");
    region.address() + info.aligned_size - 1
}

fn write(dial: &Dial) -> SharedMemory<CudaMapper> {
    let mapper = Arc::new(CudaMapper::new(0).expect("there is a GPU"));
    let mut memory = SharedMemory::connect(dial.clone(), mapper, LockType::Rw, Some(PATIENCE))
        .expect("the lock is granted");
    for (rank, size) in SIZES.into_iter().enumerate() {
        memory.allocate(size, "weights").expect("memory");
        poke(&memory, rank, mark() + rank as u8).expect("a writer writes");
    }
    // SAFETY: nothing uses the memory meanwhile.
    unsafe { memory.publish(Some(PATIENCE)) }.expect("published");
    assert_eq!((peek(&memory, 0), peek(&memory, 1)), (mark(), mark() + 1));
    let error = poke(&memory, 0, 0).expect_err("a reader's mapping refuses writes");
    say(&format!("a write through a reader's mapping: {error}"));
    memory
}

fn stand_by(dial: &Dial) {
    let mapper = Arc::new(CudaMapper::new(0).expect("there is a GPU"));
    let mut memory = SharedMemory::connect(dial.clone(), mapper, LockType::RwOrRo, Some(PATIENCE))
        .expect("the lock is granted");
    assert_eq!((memory.grant(), memory.len()), (Some(Grant::Ro), 2));
    assert_eq!((peek(&memory, 0), peek(&memory, 1)), (10, 11));
    let places = (place(&memory, 0), place(&memory, 1));
    // SAFETY: nothing uses the memory while it sleeps.
    unsafe { memory.sleep() }.expect("it sleeps");
    say("asleep");
    wait_for_word();
    let woken = memory.wake(LockType::Ro, Some(PATIENCE)).expect("it wakes");
    assert_eq!(
        (woken, (place(&memory, 0), place(&memory, 1))),
        (Woken::Remapped, places)
    );
    assert_eq!((peek(&memory, 0), peek(&memory, 1)), (20, 21));
    say("awake");
}

/// The driver refuses exports: a request fails, the service goes on (hazard H7).
fn refused(dial: &Dial) {
    let mut session = Session::open(dial, LockType::Rw, Some(PATIENCE)).expect("granted");
    let id = session.allocate(1, "t").expect("memory").allocation_id;
    let error = session.export(&id).expect_err("the driver refuses");
    assert!(matches!(&error, ClientError::Refused(text) if text.contains("NOT_SUPPORTED")));
    assert_eq!(session.allocations(None).expect("it goes on").len(), 1);
}

/// Two writers after each other, and a standby that sleeps over the change.
fn scenario(library: Option<&Path>, faults: &[(&str, &str)]) {
    let dir = tempfile::tempdir().expect("a directory");
    let start = |role, more: &[(&str, &str)]| Role::start(role, dir.path(), library, more);
    let mut service = start("serve", faults);
    service.hear("serving");
    start("write", &[("MARK", "10")]).finish();
    let mut standby = start("stand by", &[]);
    standby.hear("asleep");
    let mut second = start("write", &[("MARK", "20")]);
    second.hear("a write through a reader's mapping");
    second.finish();
    standby.tell();
    standby.hear("awake");
    standby.finish();
    service.finish();
}

#[test]
fn the_cuda_path_works_on_the_stand_in() {
    let library = stand_in();
    // The first creation finds no memory, and is tried again.
    scenario(Some(library.path()), &[("STAND_IN_CREATE_OOM", "1")]);
}

#[test]
fn a_driver_that_refuses_costs_a_request_and_not_the_service() {
    let (library, dir) = (stand_in(), tempfile::tempdir().expect("a directory"));
    let faults = [("STAND_IN_EXPORT_FAILS", "1")];
    let mut service = Role::start("serve", dir.path(), Some(library.path()), &faults);
    service.hear("serving");
    Role::start("refused", dir.path(), Some(library.path()), &[]).finish();
    service.finish();
}

#[test]
fn the_cuda_path_works_on_a_real_gpu() {
    if std::env::var_os("CORELANE_TEST_GPU").is_none() {
        println!("left out: CORELANE_TEST_GPU is not set");
        return;
    }
    scenario(None, &[]);
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
        }
        Ok(_) | Err(_) => println!("left out: this machine has a driver"),
    }
}

/// Builds the stand-in and gives it the name by which the driver's library is looked for.
fn stand_in() -> tempfile::TempDir {
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
    let dir = tempfile::tempdir().expect("a directory");
    for name in ["libcuda.so", "libcuda.so.1"] {
        std::fs::copy(
            target.join("debug/libcuda_stand_in.so"),
            dir.path().join(name),
        )
        .expect("it was built");
    }
    dir
}
