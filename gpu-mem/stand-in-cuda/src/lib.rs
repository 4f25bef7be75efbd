//! A libcuda that keeps "GPU" memory in memfds: just the functions that the CUDA backend calls, and
//! strict where the driver is strict, so that what passes here is what the driver accepts.
//!
//! It is reached through the C interface only. Pointers for answers come as [`Out`], structures
//! that are read come as references that may be null.
//!
//! Faults are injected by environment: `STAND_IN_CREATE_OOM=n` makes the first n creations run out
//! of memory, `STAND_IN_EXPORT_FAILS=1` refuses exports, `STAND_IN_DEVICES=n` sets the number of
//! GPUs, `STAND_IN_CAPACITY=bytes` the memory of each.

#![allow(non_snake_case, reason = "the names are the driver's")]

use std::collections::HashMap;
use std::ffi::{c_char, c_int, c_uint, c_ulonglong, c_void};
use std::sync::{Mutex, MutexGuard, PoisonError};

// SAFETY: as libc declares them on Linux; those that touch no memory are safe to call.
unsafe extern "C" {
    fn memfd_create(name: *const c_char, flags: c_uint) -> c_int;
    safe fn ftruncate(fd: c_int, bytes: i64) -> c_int;
    safe fn lseek(fd: c_int, offset: i64, whence: c_int) -> i64;
    safe fn dup(fd: c_int) -> c_int;
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
const INVALID_HANDLE: Answer = 400;
const ILLEGAL_ADDRESS: Answer = 700;
const NOT_SUPPORTED: Answer = 801;

const GRANULARITY: usize = 2 << 20;
const POSIX_DESCRIPTOR: c_uint = 1;
const SEEK_END: c_int = 2;
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

/// As the driver lays it out.
#[repr(C)]
pub struct Properties {
    kind: c_uint,
    handle_types: c_uint,
    location_kind: c_uint,
    location: c_int,
    win32: *mut c_void,
    flags: [u8; 8],
}

/// As the driver lays it out.
#[repr(C)]
pub struct AccessDesc {
    location_kind: c_uint,
    location: c_int,
    flags: c_uint,
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
}

static STATE: Mutex<Option<State>> = Mutex::new(None);

thread_local! {
    static CURRENT: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

fn state() -> MutexGuard<'static, Option<State>> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
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

fn devices() -> c_int {
    setting("STAND_IN_DEVICES", 1) as c_int
}

impl State {
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
        let mut bytes = [0xc0; 16];
        bytes[15] = device as u8;
        uuid.put(bytes);
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemGetAllocationGranularity(
    bytes: Out<usize>,
    _properties: *const Properties,
    _option: c_uint,
) -> Answer {
    started(|_| {
        bytes.put(GRANULARITY);
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemCreate(
    handle: Out<u64>,
    bytes: usize,
    properties: Option<&Properties>,
    flags: c_ulonglong,
) -> Answer {
    started(|state| {
        let Some(properties) = properties else {
            return INVALID_VALUE;
        };
        let is_pinned_on_device = (properties.kind, properties.location_kind) == (1, 1);
        if flags != 0 || bytes == 0 || !bytes.is_multiple_of(GRANULARITY) || !is_pinned_on_device {
            return INVALID_VALUE;
        }
        if properties.location < 0 || properties.location >= devices() {
            return INVALID_DEVICE;
        }
        state.creations += 1;
        let full = state.created_bytes + bytes > setting("STAND_IN_CAPACITY", 1 << 40) as usize;
        if full || state.creations <= setting("STAND_IN_CREATE_OOM", 0) {
            return OUT_OF_MEMORY;
        }
        // SAFETY: the name is a C string of the program's lifetime.
        let fd = unsafe { memfd_create(c"stand-in".as_ptr(), 1) };
        if fd < 0 || ftruncate(fd, bytes as i64) != 0 {
            return OUT_OF_MEMORY;
        }
        state.created_bytes += bytes;
        let shareable = properties.handle_types & POSIX_DESCRIPTOR != 0;
        handle.put(state.insert(fd, bytes, shareable, true));
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemRelease(handle: u64) -> Answer {
    started(|state| {
        match state.memories.get_mut(&handle) {
            Some(memory) if memory.handles > 0 => memory.handles -= 1,
            _ => return INVALID_VALUE,
        }
        state.drop_reference(handle);
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemExportToShareableHandle(
    into: Out<c_int>,
    handle: u64,
    kind: c_uint,
    flags: c_ulonglong,
) -> Answer {
    started(|state| match state.memories.get(&handle) {
        Some(memory) if memory.handles > 0 => {
            if kind != POSIX_DESCRIPTOR || flags != 0 || !memory.shareable {
                return INVALID_VALUE;
            }
            if setting("STAND_IN_EXPORT_FAILS", 0) != 0 {
                return NOT_SUPPORTED;
            }
            into.put(dup(memory.fd));
            SUCCESS
        }
        _ => INVALID_VALUE,
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemImportFromShareableHandle(
    handle: Out<u64>,
    descriptor: *mut c_void,
    kind: c_uint,
) -> Answer {
    started(|state| {
        // The descriptor stays the caller's.
        let fd = dup(descriptor as usize as c_int);
        let bytes = if fd < 0 { -1 } else { lseek(fd, 0, SEEK_END) };
        if kind != POSIX_DESCRIPTOR || bytes <= 0 || !(bytes as usize).is_multiple_of(GRANULARITY) {
            return INVALID_VALUE;
        }
        handle.put(state.insert(fd, bytes as usize, true, false));
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemAddressReserve(
    address: Out<u64>,
    bytes: usize,
    align: usize,
    _hint: u64,
    flags: c_ulonglong,
) -> Answer {
    started(|state| {
        if bytes == 0 || !bytes.is_multiple_of(GRANULARITY) || flags != 0 || align > GRANULARITY {
            return INVALID_VALUE;
        }
        let kind = PRIVATE | ANONYMOUS | NORESERVE;
        // SAFETY: a new mapping at a place of the kernel's choice.
        let at = unsafe { mmap(std::ptr::null_mut(), bytes + GRANULARITY, 0, kind, -1, 0) };
        if at as isize == -1 {
            return OUT_OF_MEMORY;
        }
        // The odd ends stay mapped: this library lives for one test.
        let start = (at as u64).next_multiple_of(GRANULARITY as u64);
        state.reserved.insert(start, bytes);
        address.put(start);
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemAddressFree(address: u64, bytes: usize) -> Answer {
    started(|state| {
        let whole = state.reserved.get(&address) == Some(&bytes);
        if !whole || state.overlaps_mapping(address, bytes) {
            return INVALID_VALUE;
        }
        state.reserved.remove(&address);
        // SAFETY: the range was reserved here, and nothing is mapped into it.
        unsafe { munmap(address as *mut c_void, bytes) };
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemMap(
    address: u64,
    bytes: usize,
    offset: usize,
    handle: u64,
    flags: c_ulonglong,
) -> Answer {
    started(|state| {
        let inside = state
            .reserved
            .iter()
            .any(|(start, len)| *start <= address && address + bytes as u64 <= start + *len as u64);
        if offset != 0 || flags != 0 || !inside || state.overlaps_mapping(address, bytes) {
            return INVALID_VALUE;
        }
        let Some(memory) = state
            .memories
            .get_mut(&handle)
            .filter(|memory| memory.bytes == bytes)
        else {
            return INVALID_VALUE;
        };
        // No access until it is set, as on the device.
        let at = address as *mut c_void;
        // SAFETY: the range lies in one that was reserved here, and nothing is mapped into it.
        if unsafe { mmap(at, bytes, 0, SHARED | FIXED, memory.fd, 0) } as isize == -1 {
            return INVALID_VALUE;
        }
        memory.references += 1;
        state.mapped.insert(
            address,
            Mapped {
                bytes,
                memory: handle,
                access: 0,
            },
        );
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemUnmap(address: u64, bytes: usize) -> Answer {
    started(|state| {
        let whole = state
            .mapped
            .get(&address)
            .is_some_and(|mapped| mapped.bytes == bytes);
        if !whole {
            return INVALID_VALUE;
        }
        let kind = PRIVATE | ANONYMOUS | NORESERVE | FIXED;
        // SAFETY: the range was mapped here; what takes its place is the bare reservation.
        unsafe { mmap(address as *mut c_void, bytes, 0, kind, -1, 0) };
        if let Some(mapped) = state.mapped.remove(&address) {
            state.drop_reference(mapped.memory);
        }
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemSetAccess(
    address: u64,
    bytes: usize,
    wanted: Option<&AccessDesc>,
    count: usize,
) -> Answer {
    started(|state| {
        let whole = state
            .mapped
            .get(&address)
            .is_some_and(|mapped| mapped.bytes == bytes);
        let Some(wanted) = wanted else {
            return INVALID_VALUE;
        };
        if !whole || count != 1 || wanted.location_kind != 1 || wanted.location >= devices() {
            return INVALID_VALUE;
        }
        // The driver's 1 is reading, 3 is both; the kernel's are the same.
        let protection = match wanted.flags {
            0 | 1 | 3 => wanted.flags as c_int,
            _ => return INVALID_VALUE,
        };
        // SAFETY: the range was mapped here.
        unsafe { mprotect(address as *mut c_void, bytes, protection) };
        if let Some(mapped) = state.mapped.get_mut(&address) {
            mapped.access = wanted.flags;
        }
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuPointerGetAttribute(data: Out<u64>, attribute: c_uint, address: u64) -> Answer {
    const DEVICE_POINTER: c_uint = 3;
    started(|state| {
        if attribute != DEVICE_POINTER || !state.overlaps_mapping(address, 1) {
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
/// `from` is `bytes` bytes of the caller's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyHtoD_v2(to: u64, from: *const u8, bytes: usize) -> Answer {
    started(|state| {
        if CURRENT.get() == 0 {
            return INVALID_CONTEXT;
        }
        if !state.allows(to, bytes, 3) {
            return ILLEGAL_ADDRESS;
        }
        // SAFETY: the range was mapped here for writing; the caller vouches for its own bytes.
        unsafe { std::ptr::copy_nonoverlapping(from, to as *mut u8, bytes) };
        SUCCESS
    })
}

/// # Safety
///
/// `to` is `bytes` bytes of the caller's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoH_v2(to: *mut u8, from: u64, bytes: usize) -> Answer {
    started(|state| {
        if CURRENT.get() == 0 {
            return INVALID_CONTEXT;
        }
        if !state.allows(from, bytes, 1) {
            return ILLEGAL_ADDRESS;
        }
        // SAFETY: the range was mapped here for reading; the caller vouches for its own bytes.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to, bytes) };
        SUCCESS
    })
}
