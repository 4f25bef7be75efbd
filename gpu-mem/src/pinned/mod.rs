//! Host memory that a GPU copies from without a stop: page-locked, near the GPU, and the same pages
//! that a ring fills (`spec/gpu-memory.md` §9.1).
//!
//! ```text
//!   socket --recv--> slab (memfd, shared, never resized) --cuMemcpyHtoDAsync--> GPU
//!                     |  registered with CUDA   (`Pinner::register`, pins for DMA)
//!                     +- registered with a ring (`ring_iovecs`, where that buys something)
//! ```
//!
//! [`Slab`] is memory made the right way: a sealed memfd, because CUDA's own host allocations
//! belong to the driver's device file, which older kernels refuse to register with a ring. But
//! [`Pinner::register`] takes any mapping, whoever made it: a lane's slab as well.
//!
//! A page that is punched out of a registered range is silently replaced: the device goes on with
//! the old page, the process sees a new one. So a registered range must stay as it is. A [`Slab`]'s
//! seals make the kernel refuse: it can neither be resized nor punched.
//!
//! What registering with a **ring** buys (kernel 6.18): nothing for receiving from sockets, which
//! refuses fixed buffers; plain and multishot receives write into the slab all the same, with the
//! one copy that there always is. It spares `SEND_ZC` and file reads the pinning of each request.
//! From 7.2 on, plain receives take fixed buffers too. It costs RLIMIT_MEMLOCK, which is counted
//! per *user* over all rings ([`memlock_room_bytes`]); the NVIDIA driver's pins are not counted.

mod numa;
mod slab;

#[cfg(feature = "cuda")]
mod copies;
#[cfg(feature = "cuda")]
mod register;

#[cfg(feature = "cuda")]
pub use copies::{CopyError, CopyStream, Ticket};
pub use numa::{node_of_pci_device, prefer_node};
#[cfg(feature = "cuda")]
pub use register::{PinError, Pinned, Pinner};
pub use slab::{Placement, Slab, SlabConfig, SlabError};

/// The most that one buffer registered with a ring may have.
pub const RING_BUFFER_BYTES_MAX: usize = 1 << 30;

/// A range as the list of buffers that a ring's registration takes (`IORING_REGISTER_BUFFERS`):
/// each at most [`RING_BUFFER_BYTES_MAX`]. They must be unregistered before the range goes.
pub fn ring_iovecs(address: *mut u8, bytes: usize) -> Vec<libc::iovec> {
    let offsets = (0..bytes).step_by(RING_BUFFER_BYTES_MAX);
    let piece = |offset: usize| libc::iovec {
        iov_base: address.wrapping_add(offset).cast(),
        iov_len: RING_BUFFER_BYTES_MAX.min(bytes - offset),
    };
    offsets.map(piece).collect()
}

/// How many bytes this process may still lock for rings, as far as it can know: its limit less
/// what it has pinned itself; none where there is no limit (CAP_IPC_LOCK, or unlimited). Other
/// processes of the same user draw on the same room and are not seen here, so a registration may
/// still fail with ENOMEM, and must then be done without.
pub fn memlock_room_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let capabilities = field(&status, "CapEff:").and_then(|it| u64::from_str_radix(it, 16).ok());
    if capabilities.is_some_and(|set| set & (1 << CAP_IPC_LOCK) != 0) {
        return None;
    }
    let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current?;
    Some(limit.saturating_sub(pinned_bytes()))
}

/// What this process has pinned by registering with rings; stays after an unmap until it is
/// unregistered, so that a leak shows.
pub fn pinned_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib = field(&status, "VmPin:").and_then(|text| text.parse::<u64>().ok());
    kib.unwrap_or_default() * 1024
}

/// The first word after a name in `/proc/self/status`.
fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()
}

const CAP_IPC_LOCK: u32 = 14;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_range_becomes_several_buffers_that_cover_it() {
        let start = 0x7000_0000_0000 as *mut u8;
        let bytes = 2 * RING_BUFFER_BYTES_MAX + 4096;
        let pieces = ring_iovecs(start, bytes);
        assert_eq!(pieces.len(), 3);
        let mut at = start as usize;
        for piece in &pieces {
            assert_eq!(piece.iov_base as usize, at);
            assert!(piece.iov_len <= RING_BUFFER_BYTES_MAX);
            at += piece.iov_len;
        }
        assert_eq!(at, start as usize + bytes);
        assert!(ring_iovecs(start, 0).is_empty());
    }

    #[test]
    fn the_kernels_words_are_read() {
        let status = "Name:\tx\nVmPin:\t    8192 kB\nCapEff:\t000001ffffffffff\n";
        assert_eq!(field(status, "VmPin:"), Some("8192"));
        assert_eq!(field(status, "CapEff:"), Some("000001ffffffffff"));
        assert_eq!(field(status, "VmLck:"), None);
    }
}
