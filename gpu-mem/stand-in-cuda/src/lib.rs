//! A libcuda that keeps "GPU" memory in memfds: just the functions that the CUDA backend calls, and
//! strict where the driver is strict, so that what passes here is what the driver accepts. What the
//! driver leaves undefined (memory freed while another process has it open, a host range
//! unregistered under a running copy) ends the process here, with a word.
//!
//! It is reached through the C interface only. Pointers for answers come as [`Out`], structures
//! that are read come as references that may be null.
//!
//! Faults are injected by environment:
//!
//! | variable | effect |
//! | --- | --- |
//! | `STAND_IN_DEVICES=n` | the number of GPUs (1); `CUDA_VISIBLE_DEVICES` masks them |
//! | `STAND_IN_CAPACITY=bytes` | the memory of each process's GPU |
//! | `STAND_IN_CREATE_OOM=n` | the first n creations run out of memory |
//! | `STAND_IN_CREATE_FAILS=n` | the n-th creation is refused for another reason |
//! | `STAND_IN_CREATE_SLEEPS_MS=ms` | each creation takes that long |
//! | `STAND_IN_EXPORT_FAILS=1` | exports are refused |
//! | `STAND_IN_IPC_OPEN_FAILS=1` | foreign legacy memory cannot be mapped |
//! | `STAND_IN_HOST_REGISTER_FAILS=1` | host memory cannot be pinned |
//! | `STAND_IN_COPY_TURNS=n` | a copy is done when its event was asked for n times |
//! | `STAND_IN_PCI_BUS_ID=id` | where the GPU sits |

#![allow(non_snake_case, reason = "the names are the driver's")]

mod host;
mod legacy;
mod vmm;

use std::collections::HashMap;
use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::{Mutex, MutexGuard, PoisonError};

// SAFETY: as libc declares them on Linux; those that touch no memory are safe to call.
unsafe extern "C" {
    fn memfd_create(name: *const c_char, flags: c_uint) -> c_int;
    safe fn ftruncate(fd: c_int, bytes: i64) -> c_int;
    safe fn lseek(fd: c_int, offset: i64, whence: c_int) -> i64;
    safe fn dup(fd: c_int) -> c_int;
    safe fn flock(fd: c_int, operation: c_int) -> c_int;
    fn close(fd: c_int) -> c_int;
    fn mmap(
        at: *mut c_void,
        len: usize,
        prot: c_int,
        flags: c_int,
        fd: c_int,
        off: i64,
    ) -> *mut c_void;
    fn munmap(at: *mut c_void, len: usize) -> c_int;
    fn mprotect(at: *mut c_void, len: usize, prot: c_int) -> c_int;
}

type Answer = c_int;
const SUCCESS: Answer = 0;
const INVALID_VALUE: Answer = 1;
const OUT_OF_MEMORY: Answer = 2;
const NOT_INITIALIZED: Answer = 3;
const INVALID_DEVICE: Answer = 101;
const INVALID_CONTEXT: Answer = 201;
const MAP_FAILED: Answer = 205;
const INVALID_HANDLE: Answer = 400;
const NOT_READY: Answer = 600;
const ILLEGAL_ADDRESS: Answer = 700;
const ALREADY_REGISTERED: Answer = 712;
const NOT_REGISTERED: Answer = 713;
const NOT_PERMITTED: Answer = 800;
const NOT_SUPPORTED: Answer = 801;

const GRANULARITY: usize = 2 << 20;
const SHARED: c_int = 1;
const PRIVATE: c_int = 2;
const FIXED: c_int = 0x10;
const ANONYMOUS: c_int = 0x20;
const NORESERVE: c_int = 0x4000;

/// Where a caller wants an answer.
#[repr(transparent)]
pub struct Out<T>(*mut T);

impl<T> Out<T> {
    fn put(self, value: T) {
        // SAFETY: the driver's contract is that the place can be written; callers keep it.
        unsafe { self.0.write(value) };
    }
}

struct Memory {
    fd: c_int,
    bytes: usize,
    /// The handle itself, while it is held, and every mapping.
    references: usize,
    handles: usize,
    shareable: bool,
    created_here: bool,
}

struct Mapped {
    bytes: usize,
    memory: u64,
    /// 0 nothing, 1 reading, 3 both.
    access: c_uint,
}

#[derive(Default)]
struct State {
    started: bool,
    memories: HashMap<u64, Memory>,
    next_handle: u64,
    reserved: HashMap<u64, usize>,
    mapped: HashMap<u64, Mapped>,
    creations: u64,
    created_bytes: usize,
    contexts: usize,
    legacy: legacy::Legacy,
    host: host::Host,
}

static STATE: Mutex<Option<State>> = Mutex::new(None);

thread_local! {
    static CURRENT: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

fn state() -> MutexGuard<'static, Option<State>> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs with the state of a driver that was started, on a thread that has a context.
fn in_context(act: impl FnOnce(&mut State) -> Answer) -> Answer {
    started(|state| match CURRENT.get() {
        0 => INVALID_CONTEXT,
        _ => act(state),
    })
}

/// Runs with the state of a driver that was started.
fn started(act: impl FnOnce(&mut State) -> Answer) -> Answer {
    match state().as_mut() {
        Some(state) if state.started => act(state),
        _ => NOT_INITIALIZED,
    }
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|value| value.parse().ok())
        .unwrap_or(default)
}

/// The GPUs that this process may see, by their place in the machine.
fn visible() -> Vec<c_int> {
    let count = setting("STAND_IN_DEVICES", 1) as c_int;
    match std::env::var("CUDA_VISIBLE_DEVICES") {
        Ok(mask) => {
            let listed = mask.split(',').map_while(|word| word.trim().parse().ok());
            listed.take_while(|device| (0..count).contains(device)).collect()
        }
        Err(_) => (0..count).collect(),
    }
}

fn devices() -> c_int {
    visible().len() as c_int
}

impl State {
    /// Whether so much more fits on the GPU.
    fn has_room(&self, bytes: usize) -> bool {
        let used = self.created_bytes + self.legacy.own_bytes();
        used + bytes <= setting("STAND_IN_CAPACITY", 1 << 40) as usize
    }

    fn drop_reference(&mut self, handle: u64) {
        let Some(memory) = self.memories.get_mut(&handle) else {
            return;
        };
        memory.references -= 1;
        if memory.references == 0 {
            // SAFETY: the descriptor is ours, and nothing holds it any more.
            unsafe { close(memory.fd) };
            if memory.created_here {
                self.created_bytes -= memory.bytes;
            }
            self.memories.remove(&handle);
        }
    }

    fn insert(&mut self, fd: c_int, bytes: usize, shareable: bool, created_here: bool) -> u64 {
        self.next_handle += 1;
        let memory = Memory {
            fd,
            bytes,
            references: 1,
            handles: 1,
            shareable,
            created_here,
        };
        self.memories.insert(self.next_handle, memory);
        self.next_handle
    }

    /// Whether a copy may touch this range.
    fn allows(&self, at: u64, bytes: usize, access: c_uint) -> bool {
        self.legacy.contains(at, bytes) || self.allows_mapped(at, bytes, access)
    }

    fn allows_mapped(&self, at: u64, bytes: usize, access: c_uint) -> bool {
        self.mapped.iter().any(|(start, mapped)| {
            let inside = *start <= at && at + bytes as u64 <= start + mapped.bytes as u64;
            inside && mapped.access & access == access
        })
    }

    fn overlaps_mapping(&self, at: u64, bytes: usize) -> bool {
        self.mapped
            .iter()
            .any(|(start, mapped)| at < start + mapped.bytes as u64 && *start < at + bytes as u64)
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuInit(flags: c_uint) -> Answer {
    if flags != 0 {
        return INVALID_VALUE;
    }
    state().get_or_insert_default().started = true;
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGetErrorName(error: Answer, name: Out<*const c_char>) -> Answer {
    let text = match error {
        SUCCESS => c"CUDA_SUCCESS",
        INVALID_VALUE => c"CUDA_ERROR_INVALID_VALUE",
        OUT_OF_MEMORY => c"CUDA_ERROR_OUT_OF_MEMORY",
        NOT_INITIALIZED => c"CUDA_ERROR_NOT_INITIALIZED",
        INVALID_DEVICE => c"CUDA_ERROR_INVALID_DEVICE",
        INVALID_CONTEXT => c"CUDA_ERROR_INVALID_CONTEXT",
        INVALID_HANDLE => c"CUDA_ERROR_INVALID_HANDLE",
        ILLEGAL_ADDRESS => c"CUDA_ERROR_ILLEGAL_ADDRESS",
        MAP_FAILED => c"CUDA_ERROR_MAP_FAILED",
        NOT_READY => c"CUDA_ERROR_NOT_READY",
        ALREADY_REGISTERED => c"CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED",
        NOT_REGISTERED => c"CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED",
        NOT_PERMITTED => c"CUDA_ERROR_NOT_PERMITTED",
        NOT_SUPPORTED => c"CUDA_ERROR_NOT_SUPPORTED",
        _ => return INVALID_VALUE,
    };
    name.put(text.as_ptr());
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetCount(count: Out<c_int>) -> Answer {
    started(|_| {
        count.put(devices());
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGet(device: Out<c_int>, ordinal: c_int) -> Answer {
    started(|_| {
        if ordinal < 0 || ordinal >= devices() {
            return INVALID_DEVICE;
        }
        device.put(ordinal);
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetUuid(uuid: Out<[u8; 16]>, device: c_int) -> Answer {
    started(|_| {
        let Some(place) = visible().get(device as usize).copied() else {
            return INVALID_DEVICE;
        };
        let mut bytes = [0xc0; 16];
        bytes[15] = place as u8;
        uuid.put(bytes);
        SUCCESS
    })
}

/// Reserves addresses in steps of the granularity.
fn reserve(bytes: usize) -> Option<u64> {
    let kind = PRIVATE | ANONYMOUS | NORESERVE;
    // SAFETY: a new mapping at a place of the kernel's choice.
    let at = unsafe { mmap(std::ptr::null_mut(), bytes + GRANULARITY, 0, kind, -1, 0) };
    // The odd ends stay mapped: this library lives for one test.
    (at as isize != -1).then(|| (at as u64).next_multiple_of(GRANULARITY as u64))
}

/// Ends the process over what the driver leaves undefined.
fn undefined(what: &str) -> ! {
    eprintln!("stand-in for libcuda: {what}");
    std::process::abort()
}

#[unsafe(no_mangle)]
pub extern "C" fn cuPointerGetAttribute(data: Out<u64>, attribute: c_uint, address: u64) -> Answer {
    const DEVICE_POINTER: c_uint = 3;
    started(|state| {
        let known = state.overlaps_mapping(address, 1) || state.legacy.contains(address, 1);
        if attribute != DEVICE_POINTER || !known {
            return INVALID_VALUE;
        }
        data.put(address);
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxGetCurrent(context: Out<usize>) -> Answer {
    started(|_| {
        context.put(CURRENT.get());
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSetCurrent(context: usize) -> Answer {
    started(|_| {
        CURRENT.set(context);
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSynchronize() -> Answer {
    started(|_| {
        if CURRENT.get() == 0 {
            INVALID_CONTEXT
        } else {
            SUCCESS
        }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRetain(context: Out<usize>, device: c_int) -> Answer {
    started(|state| {
        state.contexts += 1;
        context.put(0x1000 + device as usize);
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRelease_v2(_device: c_int) -> Answer {
    started(|state| match state.contexts {
        0 => INVALID_CONTEXT,
        _ => {
            state.contexts -= 1;
            SUCCESS
        }
    })
}

/// # Safety
///
/// `text` is `len` bytes of the caller's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetPCIBusId(text: *mut u8, len: c_int, device: c_int) -> Answer {
    started(|_| {
        let id = std::env::var("STAND_IN_PCI_BUS_ID");
        let id = id.unwrap_or_else(|_| format!("0000:{device:02X}:1F.7"));
        if text.is_null() || len <= id.len() as c_int || device < 0 || device >= devices() {
            return INVALID_VALUE;
        }
        // SAFETY: the text and its zero fit into the caller's bytes.
        unsafe {
            text.copy_from_nonoverlapping(id.as_ptr(), id.len());
            text.add(id.len()).write(0);
        }
        SUCCESS
    })
}
