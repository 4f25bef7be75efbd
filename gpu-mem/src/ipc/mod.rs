//! Memory of the `cuMemAlloc` family, lent by its 64-byte CUDA IPC handle and arbitrated by the
//! same lock as the service's own memory (`spec/gpu-memory.md` §5.3).
//!
//! ```text
//!  exporter (a writer)                    service                     importer (reader, adopter)
//!  cuMemAlloc
//!  cuIpcGetMemHandle
//!  rw granted, offer(handle) -----------> layout += offer
//!  commit ------------------------------> COMMITTED
//!                                         ro granted  <-------------- asks for the lock
//!                                         handle ------------------>  cuIpcOpenMemHandle
//!                                                                     reads
//!  may I free it?  ---------------------> no: held                    cuIpcCloseMemHandle
//!                                         ro released <-------------- closes its session
//!  the next writer replaces the layout    offer dropped
//!  may I free it?  ---------------------> yes
//!  cuMemFree
//! ```
//!
//! A handle is bytes and no reference: it keeps nothing alive. So what the driver leaves undefined
//! is kept from happening by the lock. Who holds a grant may have handles open; whoever gives the
//! grant up has closed them before; and memory is freed only when the layout that names it is gone,
//! which no new writer can make it while a reader is there.
//!
//! What it cannot do is what the handle cannot do: a mapping for reading only (a reader must keep
//! its word), addresses of the importer's choice, and to survive the exporter. When the exporter's
//! process ends, the service refuses its handles by name; and as soon as nobody holds the lock, a
//! layout of lent memory alone is given up (`contents_lost` in the history), so that the next
//! `rw_or_ro` builds it anew instead of reading what is gone. A layout that also has memory of the
//! service's own stays, because that is still there. Memory that must outlive its writer is the
//! service's own.

#[cfg(feature = "cuda")]
mod cuda;
mod exporter;
#[cfg(feature = "cuda")]
mod imports;
mod offers;

#[cfg(feature = "cuda")]
pub use cuda::{LegacyCuda, LegacyMemory, OpenedMemory};
pub use exporter::Exporter;
#[cfg(feature = "cuda")]
pub use imports::Imports;
pub use offers::{Offer, OfferError, Offers};

use std::fmt;

/// The length of every handle.
pub const HANDLE_BYTES: usize = 64;

/// A CUDA IPC handle: opaque, and no reference to the memory that it names.
#[derive(Clone, Copy, Eq, PartialEq)]
pub struct IpcHandle(pub [u8; HANDLE_BYTES]);

impl IpcHandle {
    /// Reads a handle; none if there are not exactly [`HANDLE_BYTES`], or all are zero.
    pub fn from_bytes(bytes: &[u8]) -> Option<IpcHandle> {
        let handle = <[u8; HANDLE_BYTES]>::try_from(bytes).ok()?;
        (handle != [0; HANDLE_BYTES]).then_some(IpcHandle(handle))
    }
}

impl fmt::Debug for IpcHandle {
    /// Whoever has the bytes can open the memory, so logs have only a few of them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IpcHandle({:02x?}…)", &self.0[..4])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handle_has_its_length_and_is_not_nothing() {
        assert!(IpcHandle::from_bytes(&[1; HANDLE_BYTES]).is_some());
        for bytes in [&[1; 63][..], &[1; 65], &[], &[0; HANDLE_BYTES]] {
            assert_eq!(IpcHandle::from_bytes(bytes), None);
        }
        let shown = format!("{:?}", IpcHandle([7; HANDLE_BYTES]));
        assert!(shown.len() < 40, "{shown}");
    }
}
