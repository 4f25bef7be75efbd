//! The worker's side: attach to a router, take requests, write items, finish.
//!
//! ```no_run
//! use corelane_gpu_mem::lane::layout::{ANNOTATED, LAST};
//! use corelane_gpu_mem::lane::worker::{Event, LaneWorker, Options};
//!
//! let mut worker = LaneWorker::attach("lane.sock", &Options::default())?;
//! loop {
//!     if let Event::Request(request) = worker.next(None)? {
//!         let body = worker.body(&request).to_vec();
//!         worker.item(&request, &body, ANNOTATED | LAST)?;
//!     }
//! }
//! # #[allow(unreachable_code)]
//! # Ok::<(), corelane_gpu_mem::lane::LaneError>(())
//! ```
//!
//! One thread serves the lanes of all cores. Bodies lie in the slab until their request has ended,
//! at addresses that do not change: [`LaneWorker::slabs`] are what to register with a device once,
//! which `LaneWorker::pin` does for CUDA.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::ptr::NonNull;
#[cfg(feature = "cuda")]
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, IntoBytes};

use super::LaneError;
use super::area::Area;
use super::attach;
use super::layout::{
    BLOCK_HEAD_BYTES, BLOCK_UNIT, BlockHead, Codec, Descriptor, FAIL_BYTES_MAX, Hello, ITEMS_MAX,
    Kind, LAST, Wish,
};
use super::memory::Mapping;
use super::queue::{Queues, Side};
#[cfg(feature = "cuda")]
use crate::pinned::{PinError, Pinned, Pinner};

/// What a worker wants.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// The codec in which callers are asked to send.
    pub codec: Codec,
    /// The id under which it can be asked for; 0: any.
    pub id: u64,
    /// The NUMA node of its GPU, on which the slabs are to lie (`Pinner::numa_node`).
    pub numa_node: Option<u32>,
    /// How long it looks for work before it sleeps; burns its CPU meanwhile.
    pub spin: Duration,
}

/// A request that is being answered. Ended by an item with [`LAST`], [`LaneWorker::finish`] or
/// [`LaneWorker::fail`], one of which every request needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    key: Key,
    block: u64,
    head: BlockHead,
}

impl Request {
    /// What tells it from others.
    pub fn key(&self) -> Key {
        self.key
    }

    /// How its body is encoded, and its items are to be.
    pub fn codec(&self) -> Codec {
        Codec::of(self.head.codec).unwrap_or_default()
    }

    /// Where its body lies: from the start of the slab of its lane, and how long it is.
    pub fn body_at(&self) -> (u64, usize) {
        let at = self.block + u64::from(self.head.body_at.get());
        (at, self.head.body_bytes.get() as usize)
    }
}

/// Names a request of this worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// Which lane, from 0.
    pub lane: usize,
    number: u32,
    generation: u32,
}

/// What has happened.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// A request to be answered.
    Request(Request),
    /// The caller of this request wants no more items; it still has to be ended.
    Stopped(Key),
    /// The caller of this request is gone; it still has to be ended.
    Killed(Key),
    /// Nothing, for as long as was waited.
    Idle,
}

/// Memory for one item, to be written in place.
#[derive(Debug)]
pub struct Item {
    key: Key,
    offset: u64,
    bytes: usize,
}

struct Lane {
    queues: Queues,
    slab: Mapping,
    area: Area,
    wake: OwnedFd,
    wake_router: OwnedFd,
    /// Item blocks that the router has not released: size and whose.
    lent: HashMap<u64, (usize, Key)>,
}

struct Open {
    items: u32,
    over: bool,
}

/// A worker that is attached to a router.
pub struct LaneWorker {
    socket: OwnedFd,
    lanes: Vec<Lane>,
    open: HashMap<Key, Open>,
    events: VecDeque<Event>,
    id: u64,
    spin: Duration,
    turn: usize,
}

impl LaneWorker {
    /// Attaches to the router that listens at `path`.
    ///
    /// # Errors
    /// Nobody listens there, or the router refuses this worker.
    pub fn attach(path: impl AsRef<Path>, options: &Options) -> Result<LaneWorker, LaneError> {
        let step = LaneError::system("connecting to the router's lane socket");
        let flags = SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(&step)?;
        let address = SocketAddrUnix::new(path.as_ref()).map_err(&step)?;
        rustix::net::connect(&socket, &address).map_err(&step)?;
        LaneWorker::over(socket, options)
    }

    /// The same over a socket that is connected to a router.
    ///
    /// # Errors
    /// The router refuses this worker, or is gone.
    pub fn over(socket: OwnedFd, options: &Options) -> Result<LaneWorker, LaneError> {
        let hello = Hello::new(options.codec, options.id, options.numa_node);
        rustix::io::write(&socket, hello.as_bytes()).map_err(LaneError::system("greeting"))?;
        let mut worker = LaneWorker {
            socket,
            lanes: Vec::new(),
            open: HashMap::new(),
            events: VecDeque::new(),
            id: 0,
            spin: options.spin,
            turn: 0,
        };
        loop {
            let (head, fds) = attach::receive(&worker.socket)?;
            let queues = Mapping::new(&fds.queues, head.queue_bytes() as u64)?;
            let (slab, requests) = (head.slab_bytes.get(), head.request_bytes.get());
            worker.lanes.push(Lane {
                queues: Queues::new(queues, &head, Side::Worker)?,
                slab: Mapping::new(&fds.slab, slab)?,
                area: Area::new(requests, slab - requests, BLOCK_UNIT),
                wake: fds.wake_worker,
                wake_router: fds.wake_router,
                lent: HashMap::new(),
            });
            worker.id = head.worker.get();
            if worker.lanes.len() >= head.cores.get() as usize {
                return Ok(worker);
            }
        }
    }

    /// The id under which it can be asked for.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Address and size of the slab of each lane, to register them with a device.
    pub fn slabs(&self) -> Vec<(NonNull<u8>, usize)> {
        let slabs = self.lanes.iter().map(|lane| &lane.slab);
        slabs.map(|slab| (slab.start(), slab.len())).collect()
    }

    /// Registers the slabs of all lanes with CUDA, so that bodies are copied to the GPU from where
    /// they lie: one range for each lane, in which [`Request::body_at`] says the offset.
    ///
    /// # Safety
    /// This worker outlives what is answered, and all copies that use it.
    ///
    /// # Errors
    /// The driver refused.
    #[cfg(feature = "cuda")]
    pub unsafe fn pin(&self, pinner: &Pinner) -> Result<Vec<Arc<Pinned>>, PinError> {
        let pin = |(address, bytes)| {
            // SAFETY: sealed memory that stays mapped as long as this worker lives; the caller
            // vouches for that.
            unsafe { pinner.register(address, bytes) }.map(Arc::new)
        };
        self.slabs().into_iter().map(pin).collect()
    }

    /// Waits for the next event, `timeout` at most; without one for ever.
    ///
    /// # Errors
    /// The router is gone, or breaks the rules.
    pub fn next(&mut self, timeout: Option<Duration>) -> Result<Event, LaneError> {
        let began = Instant::now();
        loop {
            self.take_all()?;
            if let Some(event) = self.events.pop_front() {
                return Ok(event);
            }
            let waited = began.elapsed();
            if timeout.is_some_and(|timeout| waited >= timeout) {
                return Ok(Event::Idle);
            }
            if waited < self.spin {
                std::hint::spin_loop();
                continue;
            }
            let left = timeout.map(|timeout| timeout - waited);
            self.sleep(Wish::News, left)?;
        }
    }

    /// The body of a request. It stays where it is until the request has ended.
    pub fn body(&self, request: &Request) -> &[u8] {
        let (at, bytes) = request.body_at();
        let place = self.lanes[request.key.lane].slab.place(at, bytes);
        // Checked when the request came.
        let place = place.unwrap_or(NonNull::dangling());
        // SAFETY: inside the mapping, which lives as long as `self`; the router does not write to
        // a block between its request and its end.
        unsafe { std::slice::from_raw_parts(place.as_ptr(), bytes) }
    }

    /// The request's id, the same at every hop.
    pub fn request_id(&self, request: &Request) -> String {
        let bytes = self.copy(request, BLOCK_HEAD_BYTES, request.head.id_bytes.get());
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The headers of its frame: a JSON object as the caller sent it, or nothing.
    pub fn headers(&self, request: &Request) -> Vec<u8> {
        let at = BLOCK_HEAD_BYTES + request.head.id_bytes.get() as usize;
        self.copy(request, at, request.head.headers_bytes.get())
    }

    fn copy(&self, request: &Request, at: usize, bytes: u32) -> Vec<u8> {
        let mut out = Vec::new();
        let slab = &self.lanes[request.key.lane].slab;
        // All parts were checked to lie in the block.
        let _ = slab.read(request.block + at as u64, bytes as usize, &mut out);
        out
    }

    /// Memory for an item of `bytes` bytes. Waits until there is some.
    ///
    /// # Errors
    /// [`LaneError::Over`] when nobody reads this request's items any more (it still has to be
    /// ended), [`LaneError::TooLarge`] when it can never fit.
    pub fn reserve(&mut self, request: &Request, bytes: usize) -> Result<Item, LaneError> {
        let key = request.key;
        let max_bytes = self.lanes[key.lane].area.bytes() as usize;
        if bytes > max_bytes {
            return Err(LaneError::TooLarge { bytes, max_bytes });
        }
        loop {
            let open = self.open.get(&key).filter(|open| !open.over);
            let items = open.ok_or(LaneError::Over)?.items;
            let lane = &mut self.lanes[key.lane];
            if items < ITEMS_MAX
                && let Some(offset) = lane.area.take(bytes as u64)
            {
                return Ok(Item { key, offset, bytes });
            }
            self.take_all()?;
            let open = self.open.get(&key);
            if open.is_some_and(|open| open.items == items && !open.over) {
                self.sleep(Wish::All, None)?;
            }
        }
    }

    /// Where to write an item.
    pub fn bytes_of(&mut self, item: &mut Item) -> &mut [u8] {
        let slab = &self.lanes[item.key.lane].slab;
        let place = slab.place(item.offset, item.bytes);
        // An item lies inside by its making.
        let place = place.unwrap_or(NonNull::dangling());
        // SAFETY: inside the mapping; the block is this item's alone until it is sent, and the
        // router reads it only then.
        unsafe { std::slice::from_raw_parts_mut(place.as_ptr(), item.bytes) }
    }

    /// Sends an item; with [`LAST`] among the flags it ends the request.
    ///
    /// # Errors
    /// The router is gone.
    pub fn send(&mut self, item: Item, flags: u16) -> Result<(), LaneError> {
        let Item { key, offset, bytes } = item;
        let Some(open) = self.open.get_mut(&key) else {
            self.lanes[key.lane].area.give(offset, bytes as u64);
            return Err(LaneError::Over);
        };
        open.items += 1;
        if flags & LAST != 0 {
            self.open.remove(&key);
        }
        self.lanes[key.lane].lent.insert(offset, (bytes, key));
        let mut descriptor = self.about(Kind::Item, key).at(offset, bytes as u32);
        descriptor.flags = U16::new(flags);
        descriptor.tag = U64::new(offset);
        self.post(key.lane, &descriptor)
    }

    /// Copies `data` into the slab and sends it as an item.
    ///
    /// # Errors
    /// As [`LaneWorker::reserve`].
    pub fn item(&mut self, request: &Request, data: &[u8], flags: u16) -> Result<(), LaneError> {
        let mut item = self.reserve(request, data.len())?;
        self.bytes_of(&mut item).copy_from_slice(data);
        self.send(item, flags)
    }

    /// Ends a request well.
    ///
    /// # Errors
    /// The router is gone, or the request has ended before.
    pub fn finish(&mut self, request: &Request) -> Result<(), LaneError> {
        self.open.remove(&request.key).ok_or(LaneError::Over)?;
        let descriptor = self.about(Kind::Finish, request.key);
        self.post(request.key.lane, &descriptor)
    }

    /// Ends a request badly; `flags` is 0 or
    /// [`INVALID_ARGUMENT`](super::layout::INVALID_ARGUMENT).
    ///
    /// # Errors
    /// As [`LaneWorker::finish`].
    pub fn fail(&mut self, request: &Request, why: &str, flags: u16) -> Result<(), LaneError> {
        let key = request.key;
        let end = why.len().min(FAIL_BYTES_MAX as usize);
        let why = &why.as_bytes()[..end];
        let item = match self.reserve(request, why.len()) {
            Err(LaneError::Over) if self.open.contains_key(&key) => return self.finish(request),
            other => other?,
        };
        let lane = &mut self.lanes[key.lane];
        if !lane.slab.write(item.offset, why) {
            return Err(LaneError::Broken("an item outside the slab"));
        }
        lane.lent.insert(item.offset, (item.bytes, key));
        self.open.remove(&key);
        let mut descriptor = self
            .about(Kind::Fail, key)
            .at(item.offset, why.len() as u32);
        descriptor.flags = U16::new(flags);
        descriptor.tag = U64::new(item.offset);
        self.post(key.lane, &descriptor)
    }

    /// Asks for no new requests; those that come all the same want an answer.
    ///
    /// # Errors
    /// The router is gone.
    pub fn close(&mut self) -> Result<(), LaneError> {
        for lane in 0..self.lanes.len() {
            self.post(lane, &Descriptor::new(Kind::Close, 0, 0))?;
        }
        Ok(())
    }

    /// Requests that have not ended.
    pub fn open_requests(&self) -> usize {
        self.open.len()
    }

    fn about(&self, kind: Kind, key: Key) -> Descriptor {
        Descriptor::new(kind, key.number, key.generation)
    }

    fn post(&mut self, lane: usize, descriptor: &Descriptor) -> Result<(), LaneError> {
        while !self.lanes[lane].queues.post(descriptor)? {
            // The router takes completions whatever else it does; it is gone or very busy.
            self.take_all()?;
            self.sleep(Wish::Never, Some(Duration::from_millis(1)))?;
        }
        let lane = &self.lanes[lane];
        if lane.queues.wants_wake(Kind::Item) {
            // Fails only when the counter is at its limit, and then the router is awake.
            let _ = rustix::io::write(&lane.wake_router, &1u64.to_ne_bytes());
        }
        Ok(())
    }

    fn take_all(&mut self) -> Result<(), LaneError> {
        let lanes = self.lanes.len();
        for step in 0..lanes {
            let lane = (self.turn + step) % lanes;
            while let Some(descriptor) = self.lanes[lane].queues.take()? {
                self.taken(lane, &descriptor)?;
            }
        }
        self.turn = self.turn.wrapping_add(1) % lanes.max(1);
        Ok(())
    }

    fn taken(&mut self, lane: usize, descriptor: &Descriptor) -> Result<(), LaneError> {
        let key = Key {
            lane,
            number: descriptor.request.get(),
            generation: descriptor.generation.get(),
        };
        match Kind::of(descriptor.kind.get()) {
            Some(Kind::Request) => {
                let request = self.read(key, descriptor)?;
                self.open.insert(
                    key,
                    Open {
                        items: 0,
                        over: false,
                    },
                );
                self.events.push_back(Event::Request(request));
            }
            Some(kind @ (Kind::Stop | Kind::Kill)) => {
                // One that has ended meanwhile crossed the word on its way.
                if let Some(open) = self.open.get_mut(&key) {
                    open.over = true;
                    self.events.push_back(match kind {
                        Kind::Stop => Event::Stopped(key),
                        _ => Event::Killed(key),
                    });
                }
            }
            Some(Kind::Released) => {
                let lane = &mut self.lanes[lane];
                let released = lane.lent.remove(&descriptor.tag.get());
                let (bytes, key) =
                    released.ok_or(LaneError::Broken("a block was released that nobody lent"))?;
                lane.area.give(descriptor.tag.get(), bytes as u64);
                if let Some(open) = self.open.get_mut(&key) {
                    open.items -= 1;
                }
            }
            _ => {
                return Err(LaneError::Broken(
                    "a descriptor that means nothing to a worker",
                ));
            }
        }
        Ok(())
    }

    fn read(&self, key: Key, descriptor: &Descriptor) -> Result<Request, LaneError> {
        let broken = LaneError::Broken("a request outside the slab");
        let (block, bytes) = (descriptor.offset.get(), descriptor.length.get());
        let slab = &self.lanes[key.lane].slab;
        let mut head = Vec::with_capacity(BLOCK_HEAD_BYTES);
        let read = slab.read(block, BLOCK_HEAD_BYTES, &mut head);
        let head = BlockHead::read_from_bytes(&head).ok().filter(|_| read);
        let Some(head) = head else { return Err(broken) };
        let before = u64::from(head.id_bytes.get()) + u64::from(head.headers_bytes.get());
        let body_at = u64::from(head.body_at.get());
        let end = body_at + u64::from(head.body_bytes.get());
        let fits = before + BLOCK_HEAD_BYTES as u64 <= body_at && end <= u64::from(bytes);
        if !fits || slab.place(block, bytes as usize).is_none() {
            return Err(broken);
        }
        Ok(Request { key, block, head })
    }

    /// Sleeps until the router has something, or the time is over.
    fn sleep(&mut self, wish: Wish, timeout: Option<Duration>) -> Result<(), LaneError> {
        let mut there = false;
        for lane in &self.lanes {
            there |= lane.queues.wish(wish);
        }
        let result = if there { Ok(()) } else { self.poll(timeout) };
        for lane in &self.lanes {
            lane.queues.wish(Wish::Never);
        }
        result
    }

    fn poll(&self, timeout: Option<Duration>) -> Result<(), LaneError> {
        let mut fds: Vec<PollFd<'_>> = vec![PollFd::new(&self.socket, PollFlags::IN)];
        fds.extend(
            self.lanes
                .iter()
                .map(|lane| PollFd::new(&lane.wake, PollFlags::IN)),
        );
        let timeout = timeout.map(|timeout| Timespec {
            tv_sec: timeout.as_secs() as i64,
            tv_nsec: i64::from(timeout.subsec_nanos()),
        });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(LaneError::system("waiting for the router")(errno)),
        }
        // Nothing is ever said on it, so whatever it has to read is its end.
        if !fds[0].revents().is_empty() {
            return Err(LaneError::Gone);
        }
        for (lane, fd) in self.lanes.iter().zip(&fds[1..]) {
            if !fd.revents().is_empty() {
                let _ = rustix::io::read(&lane.wake, &mut [0; 8]);
            }
        }
        Ok(())
    }
}

impl AsFd for LaneWorker {
    /// The socket: readable when the router is gone.
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
