//! Host memory that is pinned, and copies: at once, or on a stream with events between them.
//!
//! A copy on a stream is not done when it is asked for: it is done when its event was asked for
//! often enough, or somebody waits. So a caller that touches the bytes too early sees it.

use std::collections::{HashMap, VecDeque};
use std::ffi::c_uint;

use crate::{
    ALREADY_REGISTERED, Answer, ILLEGAL_ADDRESS, INVALID_HANDLE, INVALID_VALUE, NOT_READY,
    NOT_REGISTERED, NOT_SUPPORTED, OUT_OF_MEMORY, Out, SUCCESS, State, in_context, setting,
    undefined,
};

const PORTABLE: c_uint = 1;
const DEVICE_MAP: c_uint = 2;
const READ_ONLY: c_uint = 8;

#[derive(Default)]
pub(crate) struct Host {
    /// Pinned ranges: first address and bytes.
    pinned: HashMap<u64, usize>,
    streams: HashMap<usize, VecDeque<Work>>,
    /// Events by handle: the stream that they wait in, and how often they must still be asked.
    events: HashMap<usize, Option<(usize, u64)>>,
    next_name: usize,
}

#[derive(Clone, Copy, PartialEq)]
enum Work {
    Copy { to: u64, from: u64, bytes: usize },
    Event(usize),
}

impl Host {
    fn name(&mut self) -> usize {
        self.next_name += 1;
        0x5000 + self.next_name * 16
    }

    fn pins(&self, at: u64, bytes: usize) -> bool {
        self.pinned
            .iter()
            .any(|(start, len)| *start <= at && at + bytes as u64 <= start + *len as u64)
    }

    fn overlaps_pinned(&self, at: u64, bytes: usize) -> bool {
        self.pinned
            .iter()
            .any(|(start, len)| at < start + *len as u64 && *start < at + bytes as u64)
    }

    /// Does a stream's work, up to an event or all of it.
    fn run(&mut self, stream: usize, until: Option<usize>) {
        while let Some(work) = self.streams.get_mut(&stream).and_then(VecDeque::pop_front) {
            match work {
                Work::Copy { to, from, bytes } => copy(to, from, bytes),
                Work::Event(event) => {
                    self.events.insert(event, None);
                    if until == Some(event) {
                        return;
                    }
                }
            }
        }
    }
}

fn copy(to: u64, from: u64, bytes: usize) {
    // SAFETY: both ranges were checked when the copy was asked for, and the callers' contract is
    // that they stay until it is done. They may be one memory mapped twice, hence not "apart".
    unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) };
}

/// Whether the kernel lets this process read and write all of a range.
fn is_writable(at: u64, bytes: usize) -> bool {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let mut reached = at;
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let range = words.next().and_then(|range| range.split_once('-'));
        let Some((Ok(start), Ok(end))) = range.map(|(start, end)| {
            let number = |text| u64::from_str_radix(text, 16);
            (number(start), number(end))
        }) else {
            continue;
        };
        let writable = words.next().is_some_and(|access| access.starts_with("rw"));
        if writable && start <= reached && reached < end {
            reached = end;
        }
    }
    reached >= at + bytes as u64
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemHostRegister_v2(address: u64, bytes: usize, flags: c_uint) -> Answer {
    in_context(|state| {
        if flags & READ_ONLY != 0 {
            return NOT_SUPPORTED;
        }
        if address == 0 || bytes == 0 || flags & !(PORTABLE | DEVICE_MAP) != 0 {
            return INVALID_VALUE;
        }
        if state.host.overlaps_pinned(address, bytes) {
            return ALREADY_REGISTERED;
        }
        if !is_writable(address, bytes) {
            return INVALID_VALUE;
        }
        if setting("STAND_IN_HOST_REGISTER_FAILS", 0) != 0 {
            return OUT_OF_MEMORY;
        }
        state.host.pinned.insert(address, bytes);
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemHostUnregister(address: u64) -> Answer {
    in_context(|state| {
        let Some(bytes) = state.host.pinned.remove(&address) else {
            return NOT_REGISTERED;
        };
        let inside = |at: u64| address <= at && at < address + bytes as u64;
        let touches = |work: &Work| match work {
            Work::Copy { to, from, .. } => inside(*to) || inside(*from),
            Work::Event(_) => false,
        };
        if state.host.streams.values().flatten().any(touches) {
            undefined("host memory was unregistered while a copy uses it");
        }
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamCreate(stream: Out<usize>, flags: c_uint) -> Answer {
    in_context(|state| {
        if flags > 1 {
            return INVALID_VALUE;
        }
        let name = state.host.name();
        state.host.streams.insert(name, VecDeque::new());
        stream.put(name);
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamSynchronize(stream: usize) -> Answer {
    in_context(|state| {
        if !state.host.streams.contains_key(&stream) {
            return INVALID_HANDLE;
        }
        state.host.run(stream, None);
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamDestroy_v2(stream: usize) -> Answer {
    in_context(|state| {
        if !state.host.streams.contains_key(&stream) {
            return INVALID_HANDLE;
        }
        state.host.run(stream, None);
        state.host.streams.remove(&stream);
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventCreate(event: Out<usize>, flags: c_uint) -> Answer {
    in_context(|state| {
        // Blocking, without timing, and both.
        if flags > 3 {
            return INVALID_VALUE;
        }
        let name = state.host.name();
        state.host.events.insert(name, None);
        event.put(name);
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventRecord(event: usize, stream: usize) -> Answer {
    in_context(|state| {
        let host = &mut state.host;
        if !host.events.contains_key(&event) || !host.streams.contains_key(&stream) {
            return INVALID_HANDLE;
        }
        for works in host.streams.values_mut() {
            works.retain(|work| *work != Work::Event(event));
        }
        let turns = setting("STAND_IN_COPY_TURNS", 0);
        host.events.insert(event, Some((stream, turns)));
        if let Some(works) = host.streams.get_mut(&stream) {
            works.push_back(Work::Event(event));
        }
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventQuery(event: usize) -> Answer {
    in_context(|state| match state.host.events.get_mut(&event) {
        None => INVALID_HANDLE,
        // What was never recorded is done.
        Some(None) => SUCCESS,
        Some(Some((stream, 0))) => {
            let stream = *stream;
            state.host.run(stream, Some(event));
            SUCCESS
        }
        Some(Some((_, turns))) => {
            *turns -= 1;
            NOT_READY
        }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventSynchronize(event: usize) -> Answer {
    in_context(|state| match state.host.events.get(&event).copied() {
        None => INVALID_HANDLE,
        Some(None) => SUCCESS,
        Some(Some((stream, _))) => {
            state.host.run(stream, Some(event));
            SUCCESS
        }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventDestroy_v2(event: usize) -> Answer {
    in_context(|state| match state.host.events.remove(&event) {
        None => INVALID_HANDLE,
        Some(_) => {
            for works in state.host.streams.values_mut() {
                works.retain(|work| *work != Work::Event(event));
            }
            SUCCESS
        }
    })
}

/// Puts a copy into a stream; one from or to memory that is not pinned is done before it returns.
fn queue(state: &mut State, stream: usize, to: u64, from: u64, bytes: usize, host: u64) -> Answer {
    let pinned = state.host.pins(host, bytes);
    let Some(works) = state.host.streams.get_mut(&stream) else {
        return INVALID_HANDLE;
    };
    works.push_back(Work::Copy { to, from, bytes });
    if !pinned {
        state.host.run(stream, None);
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyHtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: usize) -> Answer {
    in_context(|state| match state.allows(to, bytes, 3) {
        true => queue(state, stream, to, from, bytes, from),
        false => ILLEGAL_ADDRESS,
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoHAsync_v2(to: u64, from: u64, bytes: usize, stream: usize) -> Answer {
    in_context(|state| match state.allows(from, bytes, 1) {
        true => queue(state, stream, to, from, bytes, to),
        false => ILLEGAL_ADDRESS,
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyHtoD_v2(to: u64, from: u64, bytes: usize) -> Answer {
    in_context(|state| match state.allows(to, bytes, 3) {
        true => {
            copy(to, from, bytes);
            SUCCESS
        }
        false => ILLEGAL_ADDRESS,
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoH_v2(to: u64, from: u64, bytes: usize) -> Answer {
    in_context(|state| match state.allows(from, bytes, 1) {
        true => {
            copy(to, from, bytes);
            SUCCESS
        }
        false => ILLEGAL_ADDRESS,
    })
}
