//! The words on a lane's Unix socket: a worker's hello, then an offer with four descriptors for
//! each core, or a refusal.
//!
//! ```text
//! worker -> router   Hello, 64 bytes
//! router -> worker   LaneHead, 64 bytes, beside its first byte: queues, slab, worker's eventfd
//!                    (the worker waits), router's eventfd (the worker writes); once for each core
//! router -> worker   or one LaneHead of version 0: a refusal, its words from byte 12 on
//! ```
//!
//! Neither says anything after that; the end of the socket is the end of the lanes.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::LaneError;
use super::layout::{LaneHead, MAGIC, RECORD_BYTES, VERSION};
use super::memory;
use crate::pinned::prefer_node;

/// Descriptors with an offer.
const FDS: usize = 4;

/// What both sides of a lane hold.
#[derive(Debug)]
pub struct LaneFds {
    /// Queue memory.
    pub queues: OwnedFd,
    /// The slab.
    pub slab: OwnedFd,
    /// The worker sleeps on it, the router writes it.
    pub wake_worker: OwnedFd,
    /// The router sleeps on it, the worker writes it.
    pub wake_router: OwnedFd,
}

/// What a lane is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaneSize {
    /// Entries of each queue.
    pub entries: u32,
    /// Bytes of the slab, a multiple of 8192: half for requests, half for items.
    pub slab_bytes: u64,
}

impl LaneSize {
    /// The head of the lane of one core.
    pub fn head(&self, core: u32, cores: u32, worker: u64) -> LaneHead {
        LaneHead {
            magic: U64::new(MAGIC),
            version: U32::new(VERSION),
            entries: U32::new(self.entries),
            slab_bytes: U64::new(self.slab_bytes),
            request_bytes: U64::new(self.slab_bytes / 2),
            core: U32::new(core),
            cores: U32::new(cores),
            worker: U64::new(worker),
            zero: [0; 16],
        }
    }
}

impl LaneFds {
    /// Makes the memory and the eventfds of a lane.
    ///
    /// # Errors
    /// Out of descriptors or memory.
    pub fn create(head: &LaneHead) -> Result<LaneFds, LaneError> {
        if !head.is_sane() {
            return Err(LaneError::Broken(
                "a lane of sizes that do not fit each other",
            ));
        }
        let wake = || {
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
                .map_err(LaneError::system("making an eventfd"))
        };
        Ok(LaneFds {
            queues: memory::create("corelane-lane-queues", head.queue_bytes() as u64)?,
            slab: memory::create("corelane-lane-slab", head.slab_bytes.get())?,
            wake_worker: wake()?,
            wake_router: wake()?,
        })
    }

    /// Asks that the slab's pages come from a NUMA node, whoever touches them first. To be called
    /// before anybody does.
    ///
    /// # Errors
    /// The kernel knows no such node; the slab is as good as without.
    pub fn prefer_node(&self, head: &LaneHead, node: u32) -> Result<(), LaneError> {
        let slab = memory::Mapping::new(&self.slab, head.slab_bytes.get())?;
        // The wish belongs to the memory, not to the mapping, and outlives it.
        prefer_node(slab.start().as_ptr() as usize, slab.len(), node).map_err(|source| {
            let step = "placing a slab near its GPU";
            LaneError::System { step, source }
        })
    }

    /// Sends the offer of this lane. On a socket that does not block an answer of EAGAIN is an
    /// error: the few offers of a lane fit into its buffer.
    ///
    /// # Errors
    /// The worker is gone.
    pub fn offer(&self, socket: impl AsFd, head: &LaneHead) -> Result<(), LaneError> {
        let fds = [
            self.queues.as_fd(),
            self.slab.as_fd(),
            self.wake_worker.as_fd(),
            self.wake_router.as_fd(),
        ];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let room = control.push(SendAncillaryMessage::ScmRights(&fds));
        debug_assert!(room, "the space is made for it");
        let bytes = [IoSlice::new(head.as_bytes())];
        match sendmsg(socket, &bytes, &mut control, SendFlags::NOSIGNAL) {
            Ok(RECORD_BYTES) => Ok(()),
            Ok(_) => Err(LaneError::Gone),
            Err(Errno::PIPE | Errno::CONNRESET) => Err(LaneError::Gone),
            Err(errno) => Err(LaneError::system("offering a lane")(errno)),
        }
    }
}

/// A refusal in words, cut to what fits.
pub fn refusal(why: &str) -> [u8; RECORD_BYTES] {
    let mut record = LaneHead::new_zeroed();
    record.magic = U64::new(MAGIC);
    let mut bytes = [0; RECORD_BYTES];
    bytes.copy_from_slice(record.as_bytes());
    let room = RECORD_BYTES - REFUSAL_AT;
    let end = (0..=why.len().min(room))
        .rev()
        .find(|end| why.is_char_boundary(*end));
    let words = &why.as_bytes()[..end.unwrap_or(0)];
    bytes[REFUSAL_AT..REFUSAL_AT + words.len()].copy_from_slice(words);
    bytes
}

const REFUSAL_AT: usize = 12;

/// Receives one offer. Blocks.
///
/// # Errors
/// A refusal, an end of the socket, or something that is no offer.
pub fn receive(socket: impl AsFd) -> Result<(LaneHead, LaneFds), LaneError> {
    let mut bytes = [0; RECORD_BYTES];
    let mut fds = Vec::with_capacity(FDS);
    let mut filled = 0;
    while filled < RECORD_BYTES {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut into = [IoSliceMut::new(&mut bytes[filled..])];
        let message = recvmsg(&socket, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC);
        let message = match message {
            Err(Errno::INTR) => continue,
            Err(Errno::CONNRESET) => return Err(LaneError::Gone),
            other => other.map_err(LaneError::system("receiving a lane"))?,
        };
        if message.bytes == 0 {
            return Err(LaneError::Gone);
        }
        filled += message.bytes;
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = part {
                fds.extend(received);
            }
        }
    }
    let head = LaneHead::read_from_bytes(&bytes)
        .map_err(|_| LaneError::Broken("an offer of another size"))?;
    if head.magic.get() == MAGIC && head.version.get() == 0 {
        let words = bytes[REFUSAL_AT..].split(|byte| *byte == 0).next();
        let why = String::from_utf8_lossy(words.unwrap_or_default()).into_owned();
        return Err(LaneError::Refused { why });
    }
    let mut fds = fds.into_iter();
    let (Some(queues), Some(slab), Some(wake_worker), Some(wake_router), true) = (
        fds.next(),
        fds.next(),
        fds.next(),
        fds.next(),
        head.is_sane(),
    ) else {
        return Err(LaneError::Broken("no offer of a lane of this version"));
    };
    let fds = LaneFds {
        queues,
        slab,
        wake_worker,
        wake_router,
    };
    Ok((head, fds))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn an_offer_arrives_with_its_descriptors() {
        let (router, worker) = UnixStream::pair().expect("a pair");
        let size = LaneSize {
            entries: 8,
            slab_bytes: 1 << 16,
        };
        let head = size.head(1, 2, 77);
        let fds = LaneFds::create(&head).expect("it is made");
        fds.offer(&router, &head).expect("it is sent");
        let (received, fds) = receive(&worker).expect("it arrives");
        assert_eq!((received, received.worker.get()), (head, 77));
        let queues = memory::Mapping::new(&fds.queues, head.queue_bytes() as u64);
        assert!(queues.is_ok());
        drop(router);
        assert!(matches!(receive(&worker), Err(LaneError::Gone)));
    }

    /// Of the kernel's <linux/mempolicy.h>: the policy of an address.
    const MPOL_F_ADDR: libc::c_ulong = 2;

    /// Where the kernel takes the page at an address from: kind of policy, first nodes.
    fn policy_at(address: usize) -> (i32, u64) {
        let (mut mode, mut nodes) = (-1, [0u64; 16]);
        // SAFETY: both pointers are to live values of the sizes that are named.
        let answer = unsafe {
            libc::syscall(
                libc::SYS_get_mempolicy,
                &raw mut mode,
                nodes.as_mut_ptr(),
                64 * nodes.len(),
                address,
                MPOL_F_ADDR,
            )
        };
        assert_eq!(answer, 0, "{}", std::io::Error::last_os_error());
        (mode, nodes[0])
    }

    #[test]
    fn a_slab_lies_near_its_gpu_for_everybody_who_maps_it() {
        let size = LaneSize {
            entries: 8,
            slab_bytes: 1 << 16,
        };
        let head = size.head(0, 1, 1);
        let fds = LaneFds::create(&head).expect("it is made");
        assert!(fds.prefer_node(&head, 4_096).is_err(), "no such node");
        if let Err(error) = fds.prefer_node(&head, 0) {
            return eprintln!("this machine places no memory: {error}");
        }
        let slab = memory::Mapping::new(&fds.slab, 1 << 16).expect("it maps");
        let found = policy_at(slab.start().as_ptr() as usize);
        assert_eq!(found, (libc::MPOL_PREFERRED, 1));
    }

    #[test]
    fn a_refusal_arrives_in_words() {
        let (mut router, worker) = UnixStream::pair().expect("a pair");
        let long = "über".repeat(40);
        for why in ["no", &long] {
            router.write_all(&refusal(why)).expect("it is sent");
            let Err(LaneError::Refused { why: got }) = receive(&worker) else {
                panic!("no refusal");
            };
            assert!(why.starts_with(&got) && got.len() >= why.len().min(50));
        }
        router.write_all(&[7; RECORD_BYTES]).expect("it is sent");
        assert!(matches!(receive(&worker), Err(LaneError::Broken(_))));
    }
}
