//! Memory of the `cuMemAlloc` family and its 64-byte handles.
//!
//! A handle names the exporter's process, one of its descriptors, and a word that only this memory
//! has, so that a handle of freed memory is told from one that lives. Whoever opens a handle holds
//! a shared lock on the file, so that a free under an open mapping is seen.

use std::collections::HashMap;
use std::ffi::{CString, c_int, c_uint, c_void};
use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::os::fd::{AsRawFd, FromRawFd};

use crate::{
    Answer, FIXED, GRANULARITY, INVALID_CONTEXT, INVALID_HANDLE, INVALID_VALUE, MAP_FAILED,
    OUT_OF_MEMORY, Out, SHARED, SUCCESS, flock, ftruncate, in_context, memfd_create, mmap, munmap,
    reserve, setting, undefined,
};

/// As the driver lays it out: 64 bytes that say nothing to others.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Handle([u8; 64]);

const MAGIC: u64 = 0x0006_da1b_d5c0_de17;
const LOCK_SHARED: c_int = 1;
const LOCK_EXCLUSIVE_TRY: c_int = 2 | 4;
const LAZY_PEER_ACCESS: c_uint = 1;

/// What this process has of it, by first address.
#[derive(Default)]
pub(crate) struct Legacy {
    own: HashMap<u64, Own>,
    opened: HashMap<u64, Opened>,
    count: u64,
}

struct Own {
    file: File,
    bytes: usize,
    word: u64,
}

struct Opened {
    /// Holds the shared lock until it is closed.
    _file: File,
    bytes: usize,
    word: u64,
    count: usize,
}

impl Legacy {
    pub(crate) fn contains(&self, at: u64, bytes: usize) -> bool {
        let own = self.own.iter().map(|(start, own)| (*start, own.bytes));
        let opened = self.opened.iter().map(|(start, it)| (*start, it.bytes));
        own.chain(opened)
            .any(|(start, len)| start <= at && at + bytes as u64 <= start + len as u64)
    }

    pub(crate) fn own_bytes(&self) -> usize {
        self.own.values().map(|own| own.bytes).sum()
    }

    /// The base of the allocation of this process that an address lies in.
    fn base(&self, at: u64) -> Option<(u64, &Own)> {
        self.own
            .iter()
            .find(|(start, own)| **start <= at && at < **start + own.bytes as u64)
            .map(|(start, own)| (*start, own))
    }
}

fn name(word: u64) -> String {
    format!("stand-in-legacy-{word:016x}")
}

fn handle_of(own: &Own) -> Handle {
    let mut handle = [0; 64];
    handle[..8].copy_from_slice(&MAGIC.to_le_bytes());
    handle[8..16].copy_from_slice(&own.word.to_le_bytes());
    handle[16..24].copy_from_slice(&(own.bytes as u64).to_le_bytes());
    handle[24..28].copy_from_slice(&std::process::id().to_le_bytes());
    handle[28..32].copy_from_slice(&own.file.as_raw_fd().to_le_bytes());
    Handle(handle)
}

fn word_at(handle: &Handle, at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&handle.0[at..at + 8]);
    u64::from_le_bytes(word)
}

/// Maps a file's bytes for reading and writing at addresses of our choice.
fn map(file: &File, bytes: usize) -> Option<u64> {
    let start = reserve(bytes)?;
    // SAFETY: the range was just reserved, so nobody's pages are replaced.
    let at = unsafe {
        let at = start as *mut c_void;
        mmap(at, bytes, 3, SHARED | FIXED, file.as_raw_fd(), 0)
    };
    (at as isize != -1).then_some(start)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemAlloc_v2(address: Out<u64>, bytes: usize) -> Answer {
    in_context(|state| {
        if bytes == 0 {
            return INVALID_VALUE;
        }
        let bytes = bytes.next_multiple_of(GRANULARITY);
        if !state.has_room(bytes) {
            return OUT_OF_MEMORY;
        }
        state.legacy.count += 1;
        let count = state.legacy.count;
        let word = RandomState::new().hash_one((std::process::id(), count));
        let Ok(text) = CString::new(name(word)) else {
            return OUT_OF_MEMORY;
        };
        // SAFETY: the name is a C string that lives during the call.
        let fd = unsafe { memfd_create(text.as_ptr(), 1) };
        if fd < 0 || ftruncate(fd, bytes as i64) != 0 {
            return OUT_OF_MEMORY;
        }
        // SAFETY: the descriptor was just opened and is nobody else's.
        let file = unsafe { File::from_raw_fd(fd) };
        let Some(start) = map(&file, bytes) else {
            return OUT_OF_MEMORY;
        };
        state.legacy.own.insert(start, Own { file, bytes, word });
        address.put(start);
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFree_v2(address: u64) -> Answer {
    in_context(|state| {
        let Some(own) = state.legacy.own.remove(&address) else {
            return INVALID_VALUE;
        };
        if flock(own.file.as_raw_fd(), LOCK_EXCLUSIVE_TRY) != 0 {
            undefined("memory was freed while another process has it open");
        }
        // SAFETY: the range was mapped for this allocation, which nobody uses any more.
        unsafe { munmap(address as *mut c_void, own.bytes) };
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemGetAddressRange_v2(
    base: Option<&mut u64>,
    bytes: Option<&mut usize>,
    address: u64,
) -> Answer {
    in_context(|state| {
        let Some((start, own)) = state.legacy.base(address) else {
            return INVALID_VALUE;
        };
        if let Some(base) = base {
            *base = start;
        }
        if let Some(bytes) = bytes {
            *bytes = own.bytes;
        }
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuIpcGetMemHandle(handle: Out<Handle>, address: u64) -> Answer {
    in_context(|state| {
        // The handle of an inner pointer is that of its base; blocks of the virtual memory
        // management, and what others lent, have none.
        let Some((_, own)) = state.legacy.base(address) else {
            return INVALID_VALUE;
        };
        handle.put(handle_of(own));
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuIpcOpenMemHandle_v2(
    address: Out<u64>,
    handle: Handle,
    flags: c_uint,
) -> Answer {
    in_context(|state| {
        if flags != LAZY_PEER_ACCESS {
            return INVALID_VALUE;
        }
        if word_at(&handle, 0) != MAGIC {
            return INVALID_HANDLE;
        }
        let word = word_at(&handle, 8);
        let pid = word_at(&handle, 24) as u32;
        if pid == std::process::id() {
            return INVALID_CONTEXT;
        }
        if setting("STAND_IN_IPC_OPEN_FAILS", 0) != 0 {
            return MAP_FAILED;
        }
        let again = state.legacy.opened.iter_mut();
        if let Some((start, opened)) = again.into_iter().find(|(_, it)| it.word == word) {
            opened.count += 1;
            address.put(*start);
            return SUCCESS;
        }
        let descriptor = (word_at(&handle, 24) >> 32) as c_int;
        let Some(file) = open_foreign(pid, descriptor, word) else {
            return INVALID_HANDLE;
        };
        let bytes = word_at(&handle, 16) as usize;
        let Some(start) = map(&file, bytes) else {
            return MAP_FAILED;
        };
        let opened = Opened {
            _file: file,
            bytes,
            word,
            count: 1,
        };
        state.legacy.opened.insert(start, opened);
        address.put(start);
        SUCCESS
    })
}

/// Opens another process's memory, if it is still the memory that the handle named.
fn open_foreign(pid: u32, descriptor: c_int, word: u64) -> Option<File> {
    let path = format!("/proc/{pid}/fd/{descriptor}");
    let file = File::options().read(true).write(true).open(path).ok()?;
    let here = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()?;
    if !here.to_string_lossy().contains(&name(word)) {
        return None;
    }
    (flock(file.as_raw_fd(), LOCK_SHARED) == 0).then_some(file)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuIpcCloseMemHandle(address: u64) -> Answer {
    in_context(|state| {
        let Some(opened) = state.legacy.opened.get_mut(&address) else {
            return INVALID_VALUE;
        };
        opened.count -= 1;
        if opened.count == 0 {
            let bytes = opened.bytes;
            state.legacy.opened.remove(&address);
            // SAFETY: the range was mapped when the handle was opened, and nobody uses it now.
            unsafe { munmap(address as *mut c_void, bytes) };
        }
        SUCCESS
    })
}
