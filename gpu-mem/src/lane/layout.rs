//! Every byte that router and worker share. All numbers are little-endian.
//!
//! Queue memory, `4096 + 64 * entries` bytes:
//!
//! ```text
//!    0  u64 magic "corelane"      8  u32 version          12  u32 entries of each queue, 2^n
//!   16  u64 slab bytes           24  u64 bytes for requests, from the slab's start
//!   32  u32 core                 36  u32 cores            40  u64 worker's id
//!   64  u32 submissions taken    68  u32 wake wish        written by the worker
//!  128  u32 submissions posted                            written by the router
//!  192  u32 completions taken   196  u32 wake wish        written by the router
//!  256  u32 completions posted                            written by the worker
//! 4096  submissions: descriptors of 32 bytes, the next one at posted % entries
//!       completions: the same behind them
//! ```
//!
//! The four counters only count up, modulo 2^32; each has a cache line, and one writer. A
//! descriptor is written before the counter that posts it. A *wake wish* says when its writer,
//! who is about to sleep on its eventfd, wants 1 to be written there: see [`Wish`].
//!
//! A [`Descriptor`]:
//!
//! ```text
//!  0  u16 kind     2  u16 flags     4  u32 request     8  u32 generation    12  u32 length
//! 16  u64 offset in the slab       24  u64 tag
//! ```
//!
//! | kind | direction | what |
//! |---|---|---|
//! | 1 request | to the worker | a block begins at `offset`, `length` bytes, see [`BlockHead`] |
//! | 2 stop | to the worker | the caller wants no more items; finish early |
//! | 3 kill | to the worker | the caller is gone; nothing more will be read |
//! | 4 released | to the worker | the item block with this `offset` and `tag` is free |
//! | 17 item | to the router | one value of the response: `length` bytes at `offset` |
//! | 18 finish | to the router | the response has ended well |
//! | 19 fail | to the router | it has ended badly: `length` bytes of UTF-8 at `offset` say why |
//! | 20 release | to the router | the request's block is not needed any more |
//! | 21 close | to the router | this lane wants no new requests |
//!
//! `request` and `generation` are the router's: the worker repeats them. A worker ends each request
//! with exactly one of: an item with [`LAST`], finish, fail; also after stop and kill. That frees
//! the request's block. `tag` is the worker's; the router repeats it when the block is free, for
//! each item once, in any order. At most [`ITEMS_MAX`] items of a request may be unreleased.
//!
//! A request's block, at a multiple of 256, its body at a multiple of 64:
//!
//! ```text
//!  0  u32 body offset in the block   4  u32 body bytes   8  u32 id bytes   12  u32 headers bytes
//! 16  u8 codec: 0 JSON, 1 MessagePack                   17  zero to 64
//! 64  id, headers (the JSON object of the frame as it came, or nothing), old bytes, body
//! ```

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// `corelane` as a number.
pub const MAGIC: u64 = u64::from_le_bytes(*b"corelane");
/// The version of all layouts here.
pub const VERSION: u32 = 1;
/// Where the submissions begin; all that comes before are counters.
pub const ENTRIES_AT: usize = 4096;
/// Bytes of a descriptor.
pub const DESCRIPTOR_BYTES: usize = size_of::<Descriptor>();
/// Where the counters are.
pub const SUBMISSIONS_TAKEN: usize = 64;
/// Posted by the router.
pub const SUBMISSIONS_POSTED: usize = 128;
/// Taken by the router.
pub const COMPLETIONS_TAKEN: usize = 192;
/// Posted by the worker.
pub const COMPLETIONS_POSTED: usize = 256;
/// A reader's wish stands this far behind its counter.
pub const WISH_AFTER: usize = 4;
/// Blocks of requests begin at multiples of this.
pub const BLOCK_UNIT: u64 = 256;
/// Bodies begin at multiples of this.
pub const BODY_ALIGN: usize = 64;
/// Items of one request that the router has not released, at most.
pub const ITEMS_MAX: u32 = 128;
/// The longest text of a failure.
pub const FAIL_BYTES_MAX: u32 = 4096;
/// A slab is no larger: CUDA and io_uring both register at most a gibibyte at once.
pub const SLAB_BYTES_MAX: u64 = 1 << 30;

/// Flag of an item: the value is the `data` of Dynamo's usual response type, `Annotated`.
pub const ANNOTATED: u16 = 1;
/// Flag of an item: it is the last one, and the response has ended well.
pub const LAST: u16 = 2;
/// Flag of a failure: the request is to blame, and trying it again makes no sense.
pub const INVALID_ARGUMENT: u16 = 1;

/// What a descriptor says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Kind {
    /// A request's block.
    Request = 1,
    /// Finish early.
    Stop = 2,
    /// The caller is gone.
    Kill = 3,
    /// An item block is free.
    Released = 4,
    /// One value of a response.
    Item = 17,
    /// The end of a response.
    Finish = 18,
    /// The bad end of a response.
    Fail = 19,
    /// A request's block is free.
    Release = 20,
    /// No new requests on this lane.
    Close = 21,
}

impl Kind {
    /// The kind with this number.
    pub fn of(number: u16) -> Option<Kind> {
        Some(match number {
            1 => Kind::Request,
            2 => Kind::Stop,
            3 => Kind::Kill,
            4 => Kind::Released,
            17 => Kind::Item,
            18 => Kind::Finish,
            19 => Kind::Fail,
            20 => Kind::Release,
            21 => Kind::Close,
            _ => return None,
        })
    }
}

/// One entry of a queue.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct Descriptor {
    /// A [`Kind`].
    pub kind: U16,
    /// Flags of that kind.
    pub flags: U16,
    /// The router's number of the request.
    pub request: U32,
    /// Tells it from earlier ones of the same number.
    pub generation: U32,
    /// Bytes at `offset`.
    pub length: U32,
    /// From the slab's start.
    pub offset: U64,
    /// The worker's own mark.
    pub tag: U64,
}

impl Descriptor {
    /// A descriptor of `kind` about a request.
    pub fn new(kind: Kind, request: u32, generation: u32) -> Descriptor {
        Descriptor {
            kind: U16::new(kind as u16),
            request: U32::new(request),
            generation: U32::new(generation),
            ..Descriptor::default()
        }
    }

    /// The same with a place in the slab.
    #[must_use]
    pub fn at(mut self, offset: u64, length: u32) -> Descriptor {
        self.offset = U64::new(offset);
        self.length = U32::new(length);
        self
    }
}

/// What a request's block begins with.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct BlockHead {
    /// From the block's start.
    pub body_at: U32,
    /// Bytes of the body.
    pub body_bytes: U32,
    /// Bytes of the request's id.
    pub id_bytes: U32,
    /// Bytes of the headers' JSON object.
    pub headers_bytes: U32,
    /// A [`codec`](Codec).
    pub codec: u8,
    /// Zero.
    pub zero: [u8; 47],
}

/// Bytes of a [`BlockHead`].
pub const BLOCK_HEAD_BYTES: usize = size_of::<BlockHead>();

/// How bodies and items are encoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Codec {
    /// JSON.
    #[default]
    Json = 0,
    /// MessagePack.
    MessagePack = 1,
}

impl Codec {
    /// The codec with this number.
    pub fn of(number: u8) -> Option<Codec> {
        match number {
            0 => Some(Codec::Json),
            1 => Some(Codec::MessagePack),
            _ => None,
        }
    }
}

/// When who sleeps on its eventfd wants to be woken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Wish {
    /// It looks by itself.
    Never = 0,
    /// By everything but [`Kind::Released`].
    News = 1,
    /// By everything: it waits for free blocks.
    All = 2,
}

/// The numbers at the front of the queue memory, which is also what an offer says.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct LaneHead {
    /// [`MAGIC`].
    pub magic: U64,
    /// [`VERSION`]; 0 in an offer that is a refusal, whose words fill the rest.
    pub version: U32,
    /// Entries of each queue, a power of two.
    pub entries: U32,
    /// Bytes of the slab.
    pub slab_bytes: U64,
    /// Bytes of its first part, for requests.
    pub request_bytes: U64,
    /// Which core of the router.
    pub core: U32,
    /// How many there are.
    pub cores: U32,
    /// The worker's id.
    pub worker: U64,
    /// Zero.
    pub zero: [u8; 16],
}

impl LaneHead {
    /// Bytes of the queue memory.
    pub fn queue_bytes(&self) -> usize {
        ENTRIES_AT + 2 * self.entries.get() as usize * DESCRIPTOR_BYTES
    }

    /// Whether the numbers fit each other.
    pub fn is_sane(&self) -> bool {
        let (slab, requests) = (self.slab_bytes.get(), self.request_bytes.get());
        self.magic.get() == MAGIC
            && self.version.get() == VERSION
            && self.entries.get().is_power_of_two()
            && (2..=1 << 16).contains(&self.entries.get())
            && slab <= SLAB_BYTES_MAX
            && requests < slab
            && requests.is_multiple_of(4096)
            && slab.is_multiple_of(4096)
            && self.core.get() < self.cores.get()
    }
}

/// What a worker says first.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Hello {
    /// [`MAGIC`].
    pub magic: U64,
    /// [`VERSION`].
    pub version: U32,
    /// The [`Codec`] that it wants bodies in.
    pub codec: u8,
    /// Zero.
    pub zero: [u8; 3],
    /// The id that it wants, for routing by id; 0: any.
    pub worker: U64,
    /// The NUMA node of its GPU and one more: the slab's pages are taken there. 0: none.
    pub node_plus_one: U32,
    /// Zero.
    pub zero_too: [u8; 36],
}

impl Hello {
    /// What a worker says that wants this codec, this id (0: any) and memory on this NUMA node.
    pub fn new(codec: Codec, worker: u64, numa_node: Option<u32>) -> Hello {
        Hello {
            magic: U64::new(MAGIC),
            version: U32::new(VERSION),
            codec: codec as u8,
            zero: [0; 3],
            worker: U64::new(worker),
            node_plus_one: U32::new(numa_node.map_or(0, |node| node.saturating_add(1))),
            zero_too: [0; 36],
        }
    }

    /// The NUMA node on which the slab should lie.
    pub fn numa_node(&self) -> Option<u32> {
        self.node_plus_one.get().checked_sub(1)
    }
}

/// Bytes of a [`Hello`] and of a [`LaneHead`].
pub const RECORD_BYTES: usize = 64;

const _: () = {
    assert!(DESCRIPTOR_BYTES == 32);
    assert!(BLOCK_HEAD_BYTES == 64);
    assert!(size_of::<LaneHead>() == RECORD_BYTES);
    assert!(size_of::<Hello>() == RECORD_BYTES);
};

/// Where the body begins behind a head, an id and headers.
pub fn body_at(id_bytes: usize, headers_bytes: usize) -> usize {
    (BLOCK_HEAD_BYTES + id_bytes + headers_bytes).next_multiple_of(BODY_ALIGN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_is_written_as_it_is_described() {
        let mut descriptor = Descriptor::new(Kind::Item, 0x0102_0304, 7).at(0x1122, 9);
        descriptor.flags = U16::new(LAST);
        descriptor.tag = U64::new(5);
        let bytes = descriptor.as_bytes();
        assert_eq!(bytes[..8], [17, 0, 2, 0, 4, 3, 2, 1]);
        assert_eq!(bytes[8..16], [7, 0, 0, 0, 9, 0, 0, 0]);
        assert_eq!(bytes[16..18], [0x22, 0x11]);
        assert_eq!(bytes[24], 5);
        assert_eq!(Kind::of(descriptor.kind.get()), Some(Kind::Item));
        assert_eq!(Kind::of(16), None);
    }

    #[test]
    fn a_hello_without_a_node_is_what_it_always_was() {
        let plain = Hello::new(Codec::MessagePack, 0x0102, None);
        let bytes = plain.as_bytes();
        assert_eq!(bytes[..13], *b"corelane\x01\0\0\0\x01");
        assert_eq!((bytes[16], bytes[17]), (2, 1));
        assert!(bytes[18..].iter().all(|byte| *byte == 0));
        let near = Hello::new(Codec::Json, 0, Some(3));
        assert_eq!(near.as_bytes()[24..28], [4, 0, 0, 0]);
        assert_eq!((plain.numa_node(), near.numa_node()), (None, Some(3)));
    }

    #[test]
    fn bodies_are_aligned() {
        assert_eq!(body_at(0, 0), 64);
        assert_eq!(body_at(1, 0), 128);
        assert_eq!(body_at(36, 28), 128);
    }
}
