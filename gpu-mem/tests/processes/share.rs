//! Committed weights, shared by descriptor between processes, taken over by another writer, and
//! found again at the same addresses by a standby that slept over it.

use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt;
use std::sync::Arc;

use corelane_gpu_mem::backend::Mapper;
use corelane_gpu_mem::backend::host::HostMapper;
use corelane_gpu_mem::client::{Dial, SharedMemory, Woken};
use corelane_gpu_mem::lock::{Grant, LockType, State};

use crate::common::PATIENCE;
use crate::roles::{Stage, number, say, wait_for_word};

/// A kind of memory: how it is mapped and touched.
pub(crate) trait Memory {
    type Maps: Mapper;
    fn mapper() -> Arc<Self::Maps>;
    fn peek(at: u64) -> u8;
    /// What the driver says to a write; where there is none, a forbidden write ends the process.
    fn poke(at: u64, byte: u8) -> Result<(), String>;
}

pub(crate) enum Host {}

impl Memory for Host {
    type Maps = HostMapper;

    fn mapper() -> Arc<HostMapper> {
        Arc::new(HostMapper::default())
    }

    fn peek(at: u64) -> u8 {
        // SAFETY: the address lies in a region that is mapped for reading at least.
        unsafe { (at as *const u8).read_volatile() }
    }

    fn poke(at: u64, byte: u8) -> Result<(), String> {
        // SAFETY: the address lies in a mapped region; a reader's faults, which is what is tested.
        unsafe { (at as *mut u8).write_volatile(byte) };
        Ok(())
    }
}

#[cfg(feature = "cuda")]
pub(crate) enum Cuda {}

#[cfg(feature = "cuda")]
impl Memory for Cuda {
    type Maps = corelane_gpu_mem::backend::cuda::CudaMapper;

    fn mapper() -> Arc<Self::Maps> {
        Arc::new(Self::Maps::new(0).expect("there is a GPU"))
    }

    fn peek(at: u64) -> u8 {
        use cudarc::driver::sys;
        let mut byte = 0_u8;
        // SAFETY: the address lies in a region that is mapped for reading at least.
        let answer = unsafe { sys::cuMemcpyDtoH_v2((&raw mut byte).cast(), at, 1) };
        assert_eq!(answer, sys::CUresult::CUDA_SUCCESS);
        byte
    }

    fn poke(at: u64, byte: u8) -> Result<(), String> {
        use cudarc::driver::sys;
        // SAFETY: the address lies in a mapped region; the driver checks its access.
        match unsafe { sys::cuMemcpyHtoD_v2(at, (&raw const byte).cast(), 1) } {
            sys::CUresult::CUDA_SUCCESS => Ok(()),
            other => Err(format!("{other:?}")),
        }
    }
}

const SIZES: [u64; 2] = [100, 3 << 20];

/// The last byte of each allocation.
fn places<M: Mapper>(memory: &SharedMemory<M>) -> [u64; 2] {
    [0, 1].map(|rank| {
        let (info, region) = memory.get(rank).expect("it is there");
        region.address() + info.aligned_size - 1
    })
}

fn bytes<T: Memory>(memory: &SharedMemory<T::Maps>) -> [u64; 2] {
    places(memory).map(|at| T::peek(at).into())
}

pub(crate) fn play<T: Memory>(role: &str, dial: Dial) {
    match role {
        "build" => drop(build::<T>(dial)),
        "publish" => publish::<T>(dial),
        "read" => read::<T>(dial),
        "stand by" => stand_by::<T>(dial),
        "trespass" => trespass::<T>(dial),
        other => panic!("no such role: {other}"),
    }
}

/// A writer that has built everything and published nothing.
fn build<T: Memory>(dial: Dial) -> SharedMemory<T::Maps> {
    let mut memory = SharedMemory::connect(dial, T::mapper(), LockType::Rw, Some(PATIENCE))
        .expect("the lock is granted");
    for (rank, size) in SIZES.into_iter().enumerate() {
        memory.allocate(size, "weights").expect("memory");
        let byte = number("MARK") as u8 + rank as u8;
        T::poke(places_so_far(&memory, rank), byte).expect("a writer writes");
    }
    say("built");
    wait_for_word();
    memory
}

fn places_so_far<M: Mapper>(memory: &SharedMemory<M>, rank: usize) -> u64 {
    let (info, region) = memory.get(rank).expect("it was just made");
    region.address() + info.aligned_size - 1
}

fn publish<T: Memory>(dial: Dial) {
    let mut memory = build::<T>(dial);
    let before = places(&memory);
    // SAFETY: nothing uses the memory meanwhile.
    unsafe { memory.publish(Some(PATIENCE)) }.expect("published");
    assert_eq!(
        places(&memory),
        before,
        "a writer that stays keeps its addresses"
    );
    let mark = number("MARK");
    assert_eq!(bytes::<T>(&memory), [mark, mark + 1]);
    say("published");
    wait_for_word();
}

fn read<T: Memory>(dial: Dial) {
    let memory = SharedMemory::connect(dial, T::mapper(), LockType::Ro, Some(PATIENCE))
        .expect("the lock is granted");
    let mark = number("MARK");
    assert_eq!(bytes::<T>(&memory), [mark, mark + 1]);
    say("reading");
    wait_for_word();
}

fn stand_by<T: Memory>(dial: Dial) {
    let mut memory = SharedMemory::connect(dial, T::mapper(), LockType::RwOrRo, Some(PATIENCE))
        .expect("the lock is granted");
    assert_eq!((memory.grant(), memory.len()), (Some(Grant::Ro), 2));
    assert_eq!(bytes::<T>(&memory), [10, 11]);
    let before = places(&memory);
    // SAFETY: nothing uses the memory while it sleeps.
    unsafe { memory.sleep() }.expect("it sleeps");
    say("asleep");
    wait_for_word();
    let woken = memory.wake(LockType::Ro, Some(PATIENCE)).expect("it wakes");
    assert_eq!((woken, places(&memory)), (Woken::Remapped, before));
    assert_eq!(bytes::<T>(&memory), [20, 21]);
    say("awake");
    wait_for_word();
}

/// A reader that writes. The driver refuses, or the kernel ends it.
fn trespass<T: Memory>(dial: Dial) {
    let memory = SharedMemory::connect(dial, T::mapper(), LockType::Ro, Some(PATIENCE))
        .expect("the lock is granted");
    let [at, _] = places(&memory);
    say("trespassing");
    let error = T::poke(at, 99).expect_err("a reader's mapping refuses writes");
    say(&format!("a write through a reader's mapping: {error}"));
    if std::env::var_os("BY_HAND").is_some() {
        // The stand-in's memory is the host's, where the same mapping faults by hand too.
        let _ = Host::poke(at, 99);
    }
}

/// The files behind the memory that a process has mapped, by inode.
fn files(pid: u32) -> BTreeSet<String> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).expect("it lives");
    let ours =
        |line: &&str| line.contains("/memfd:corelane-gpu-mem") || line.contains("/memfd:stand-in");
    let inode = |line: &str| line.split_whitespace().nth(4).map(str::to_owned);
    maps.lines().filter(ours).filter_map(inode).collect()
}

pub(crate) fn scenario(stage: &Stage) {
    let service = stage.serve();
    // A writer dies in its work, and leaves nothing.
    let mut dead = stage.start("build", &[("MARK", "50")]);
    dead.hear("built");
    assert_eq!(
        (stage.state().state, stage.state().allocation_count),
        (State::Rw, 2)
    );
    dead.kill();
    stage.until(|state| (state.state, state.allocation_count) == (State::Empty, 0));
    // One process publishes; it and another have the same memory at the same time.
    let mut first = stage.start("publish", &[("MARK", "10")]);
    first.hear("built");
    first.ask("published");
    let mut reader = stage.start("read", &[("MARK", "10")]);
    reader.hear("reading");
    assert_eq!(
        (stage.state().state, stage.state().ro_session_count),
        (State::Ro, 2)
    );
    if stage.has_files() {
        let shared = files(first.pid());
        assert_eq!(
            (shared.len(), &shared),
            (2, &files(reader.pid())),
            "the same pages"
        );
    }
    let mut standby = stage.start("stand by", &[]);
    standby.hear("asleep");
    trespassing(stage);
    // A third takes over: it waits for the readers, and builds the same shape anew.
    let mut third = stage.start("publish", &[("MARK", "20")]);
    stage.until(|state| state.waiting_writers == 1);
    for holder in [first, reader] {
        holder.finish();
    }
    third.hear("built");
    third.ask("published");
    standby.ask("awake");
    assert_eq!(stage.state().ro_session_count, 2);
    // Nobody's death costs what is published.
    third.kill();
    stage.until(|state| (state.state, state.ro_session_count) == (State::Ro, 1));
    standby.finish();
    stage.until(|state| (state.state, state.allocation_count) == (State::Committed, 2));
    service.finish();
}

/// A write through a reader's mapping does not happen, and the others' memory is as it was.
fn trespassing(stage: &Stage) {
    let by_hand: &[(&str, &str)] = match stage.has_files() {
        true => &[("BY_HAND", "1")],
        false => &[],
    };
    let mut trespasser = stage.start("trespass", by_hand);
    trespasser.hear("trespassing");
    if !stage.has_files() {
        println!("{}", trespasser.hear("a write through").trim_end());
    }
    let ended = trespasser.end();
    match stage.has_files() {
        true => assert_eq!(ended.signal(), Some(libc::SIGSEGV), "the write faults"),
        // What a driver does after the refusal is its own affair.
        false => println!("a reader that wrote ended with {ended}"),
    }
    stage.until(|state| state.ro_session_count == 2);
    let mut reader = stage.start("read", &[("MARK", "10")]);
    reader.hear("reading");
    reader.finish();
}
