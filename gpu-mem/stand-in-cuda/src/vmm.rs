//! Virtual memory management: blocks made without a context, shared by descriptor, mapped at
//! addresses that the caller reserved.

use std::ffi::{c_int, c_uint, c_ulonglong, c_void};

use crate::{
    ANONYMOUS, Answer, FIXED, GRANULARITY, INVALID_DEVICE, INVALID_VALUE, Mapped, NORESERVE,
    NOT_PERMITTED, NOT_SUPPORTED, OUT_OF_MEMORY, Out, PRIVATE, SHARED, SUCCESS, devices, dup,
    ftruncate, lseek, memfd_create, mmap, mprotect, munmap, setting, started,
};

const POSIX_DESCRIPTOR: c_uint = 1;
const SEEK_END: c_int = 2;

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
        let slowly = setting("STAND_IN_CREATE_SLEEPS_MS", 0);
        std::thread::sleep(std::time::Duration::from_millis(slowly));
        if !state.has_room(bytes) || state.creations <= setting("STAND_IN_CREATE_OOM", 0) {
            return OUT_OF_MEMORY;
        }
        if state.creations == setting("STAND_IN_CREATE_FAILS", 0) {
            return NOT_PERMITTED;
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
        let Some(start) = crate::reserve(bytes) else {
            return OUT_OF_MEMORY;
        };
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
