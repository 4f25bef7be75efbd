//! The epoll ring: the behaviour of the io_uring ring on hosts where io_uring is refused.
//!
//! Each socket is registered once, edge-triggered, for all events. What the kernel reported is
//! remembered per slot, and work is done when somebody wants it *and* the socket is ready:
//!
//! ```text
//! wait: epoll_wait -> flags per slot -> sends and connects that waited -> accepts
//!                                    -> one buffer for each readable slot with a receive (a round)
//! send: sendmsg at once; what would block is kept and finished at the next EPOLLOUT
//! ```
//!
//! A slot has at most one receive, one send and one connect under way. Nothing is allocated once
//! every slot has been used.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use socket2::SockRef;

use super::sockets::{self, connect_result, errno, send_now};
use super::{Completion, Event, Handle, Ring, Room, SPANS_MAX, Span};
use crate::balance::Origin;
use crate::buffers::{BufferId, Buffers};
use crate::operation::Operation;

mod intake;

/// An epoll descriptor that behaves like a ring.
pub struct Epoll {
    epoll: OwnedFd,
    events: Vec<libc::epoll_event>,
    memory: Memory,
    slots: Vec<Slot>,
    listeners: Vec<Listener>,
    /// Watched eventfds; the places of those that are not watched any more are taken again.
    wakes: Vec<Option<(RawFd, Operation)>>,
    /// Slots that are readable and have a receive, in the order of their turn.
    ready: VecDeque<u32>,
    reaped: VecDeque<Completion>,
    nanosecond_waits: bool,
    system_calls: u64,
}

/// Where received bytes go.
struct Memory {
    base: *mut u8,
    buffer_bytes: usize,
    /// The last one given back is the first one filled: its lines are still in the cache.
    free: Vec<BufferId>,
}

/// What we know of one attached socket, and what is wanted of it.
#[derive(Default)]
struct Slot {
    attached: bool,
    /// The kernel's answer when it did not want to watch the socket; 0: it does.
    refused: i32,
    /// A receive may find something: set by an edge, cleared by a receive that drained it.
    readable: bool,
    /// The end is in sight, so a short receive does not mean that nothing follows.
    ending: bool,
    /// In the `ready` list; survives a detach, as the list entry does.
    queued: bool,
    receive: Option<Operation>,
    /// The receive is one of so many bytes at most; 0: it goes on and on.
    once_bytes: u32,
    /// Where the receive goes if not into a buffer.
    room: Option<Room>,
    send: Option<Operation>,
    connect: Option<Operation>,
    fd: RawFd,
    /// What the send under way has still to send.
    spans: Vec<libc::iovec>,
}

struct Listener {
    fd: RawFd,
    accept: Option<Operation>,
    ready: bool,
}

/// Events taken per `epoll_wait`.
const EVENTS_MAX: usize = 512;
/// Receives in one round: bounds the time to the next look at everything else.
const RECEIVES_PER_ROUND: usize = 512;
/// Accepts on one listener in one round.
const ACCEPTS_PER_ROUND: usize = 64;

/// What an event belongs to: in the upper half of its 64 bits, the index in the lower.
const ON_SLOT: u64 = 0;
const ON_LISTENER: u64 = 1 << 32;
const ON_WAKE: u64 = 2 << 32;

const EDGES: i32 = libc::EPOLLIN | libc::EPOLLOUT | libc::EPOLLRDHUP | libc::EPOLLET;
const READABLE: u32 = (libc::EPOLLIN | libc::EPOLLRDHUP | libc::EPOLLHUP | libc::EPOLLERR) as u32;
const ENDING: u32 = (libc::EPOLLRDHUP | libc::EPOLLHUP | libc::EPOLLERR) as u32;
const WRITABLE: u32 = (libc::EPOLLOUT | libc::EPOLLHUP | libc::EPOLLERR) as u32;

impl Epoll {
    /// Makes the ring for `buffers`, which must outlive it.
    ///
    /// # Errors
    /// The kernel's answer when no epoll descriptor can be made.
    pub fn new(buffers: &Buffers) -> io::Result<Epoll> {
        // SAFETY: no pointers; the descriptor is fresh and ours.
        let epoll = unsafe {
            let fd = libc::epoll_create1(libc::EPOLL_CLOEXEC);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            OwnedFd::from_raw_fd(fd)
        };
        let count = buffers.count();
        Ok(Epoll {
            epoll,
            events: Vec::with_capacity(EVENTS_MAX),
            memory: Memory {
                base: buffers.start(0),
                buffer_bytes: buffers.buffer_bytes(),
                free: (0..count).rev().map(|id| id as BufferId).collect(),
            },
            slots: Vec::new(),
            listeners: Vec::new(),
            wakes: Vec::new(),
            ready: VecDeque::with_capacity(EVENTS_MAX),
            reaped: VecDeque::with_capacity(2 * EVENTS_MAX),
            nanosecond_waits: true,
            system_calls: 1,
        })
    }

    fn complete(&mut self, operation: Operation, event: Event) {
        self.reaped.push_back(Completion { operation, event });
    }

    /// Watches a descriptor, or watches it anew: another edge comes if it is ready now.
    fn watch(&mut self, fd: RawFd, events: i32, data: u64) -> i32 {
        let mut event = libc::epoll_event {
            events: events as u32,
            u64: data,
        };
        for action in [libc::EPOLL_CTL_ADD, libc::EPOLL_CTL_MOD] {
            self.system_calls += 1;
            // SAFETY: the event is read during the call only.
            if unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), action, fd, &mut event) } == 0 {
                return 0;
            }
            if errno() != libc::EEXIST {
                break;
            }
        }
        errno()
    }

    /// The one system call that may block. Fills `events`.
    fn poll(&mut self, timeout: Duration) -> io::Result<()> {
        self.system_calls += 1;
        let count = if self.nanosecond_waits {
            let timespec = libc::timespec {
                tv_sec: timeout.as_secs().min(i32::MAX as u64) as libc::time_t,
                tv_nsec: timeout.subsec_nanos().into(),
            };
            // SAFETY: the kernel writes at most EVENTS_MAX events, the vector's capacity.
            unsafe {
                libc::syscall(
                    libc::SYS_epoll_pwait2,
                    self.epoll.as_raw_fd(),
                    self.events.as_mut_ptr(),
                    EVENTS_MAX as libc::c_int,
                    &timespec,
                    std::ptr::null::<libc::sigset_t>(),
                    0usize,
                ) as i32
            }
        } else {
            // Rounded up: a wait that ends too early would only be begun again.
            let milliseconds = timeout.as_nanos().div_ceil(1_000_000).min(i32::MAX as u128);
            // SAFETY: as above.
            unsafe {
                libc::epoll_wait(
                    self.epoll.as_raw_fd(),
                    self.events.as_mut_ptr(),
                    EVENTS_MAX as libc::c_int,
                    milliseconds as i32,
                )
            }
        };
        if let Ok(count) = usize::try_from(count) {
            // SAFETY: so many events were written.
            unsafe { self.events.set_len(count) };
            return Ok(());
        }
        self.events.clear();
        match errno() {
            libc::EINTR => Ok(()),
            // A kernel before 5.11, or a seccomp profile that is older than the call.
            libc::ENOSYS | libc::EPERM if self.nanosecond_waits => {
                self.nanosecond_waits = false;
                self.poll(timeout)
            }
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    /// Notes what the kernel reported, and finishes what waited for it.
    fn take_events(&mut self) {
        for place in 0..self.events.len() {
            let (events, data) = (self.events[place].events, self.events[place].u64);
            let index = data as u32;
            match data & !u64::from(u32::MAX) {
                ON_SLOT => self.slot_ready(index, events),
                ON_LISTENER => self.listeners[index as usize].ready = true,
                _ => self.woken(index as usize),
            }
        }
    }

    fn slot_ready(&mut self, index: u32, events: u32) {
        let slot = &mut self.slots[index as usize];
        if !slot.attached {
            return;
        }
        if let Some(operation) = slot.connect {
            if events & WRITABLE == 0 {
                return;
            }
            slot.connect = None;
            self.system_calls += 1;
            let errno = connect_result(slot.fd, events);
            self.complete(operation, Event::Connected { errno });
        }
        let slot = &mut self.slots[index as usize];
        slot.readable |= events & READABLE != 0;
        slot.ending |= events & ENDING != 0;
        if events & WRITABLE != 0 {
            self.finish_send(index);
        }
        self.queue(index);
    }

    fn finish_send(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        let Some(operation) = slot.send else { return };
        self.system_calls += 1;
        if let Some(event) = send_now(slot.fd, slot.spans.as_ptr(), slot.spans.len()) {
            slot.send = None;
            self.complete(operation, event);
        }
    }

    fn woken(&mut self, index: usize) {
        let Some((fd, operation)) = self.wakes[index] else {
            return;
        };
        let mut count = 0u64;
        self.system_calls += 1;
        // SAFETY: eight bytes into a u64. What it answers does not matter: somebody wrote.
        unsafe { libc::read(fd, (&raw mut count).cast(), size_of::<u64>()) };
        self.complete(operation, Event::Woken { more: true });
    }

    /// Gives the slot a turn if it is readable and somebody wants to receive.
    fn queue(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        if slot.readable && slot.receive.is_some() && !slot.queued {
            slot.queued = true;
            self.ready.push_back(index);
        }
    }

    /// One buffer for each slot whose turn it is; slots with more to read come again at the end.
    fn receive_round(&mut self) {
        for _ in 0..self.ready.len().min(RECEIVES_PER_ROUND) {
            let Some(index) = self.ready.pop_front() else {
                return;
            };
            self.slots[index as usize].queued = false;
            self.receive_once(index);
            self.queue(index);
        }
    }

    fn receive_once(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        let (Some(operation), true) = (slot.receive, slot.readable) else {
            return;
        };
        if let Some(room) = slot.room {
            return self.land(index, operation, room);
        }
        let Some(buffer) = self.memory.free.pop() else {
            slot.receive = None;
            return self.complete(operation, Event::NoBuffers);
        };
        self.system_calls += 1;
        let limit = match slot.once_bytes {
            0 => self.memory.buffer_bytes,
            bytes => self.memory.buffer_bytes.min(bytes as usize),
        };
        match self.memory.fill(slot.fd, buffer, limit) {
            Ok(0) => {
                self.memory.free.push(buffer);
                slot.receive = None;
                self.complete(operation, Event::EndOfStream);
            }
            Ok(bytes) => {
                slot.readable = slot.ending || bytes == limit;
                let (bytes, more) = (bytes as u32, slot.once_bytes == 0);
                if !more {
                    slot.receive = None;
                }
                self.complete(
                    operation,
                    Event::Received {
                        buffer,
                        bytes,
                        more,
                    },
                );
            }
            Err(errno) => {
                self.memory.free.push(buffer);
                match errno {
                    libc::EAGAIN => slot.readable = false,
                    libc::EINTR => {}
                    _ => {
                        slot.receive = None;
                        self.complete(operation, Event::ReceiveFailed { errno });
                    }
                }
            }
        }
    }

    /// A receive into `room`.
    fn land(&mut self, index: u32, operation: Operation, room: Room) {
        let slot = &mut self.slots[index as usize];
        self.system_calls += 1;
        let received = sockets::receive_now(slot.fd, room);
        let event = match received {
            Ok(0) => Event::EndOfStream,
            Ok(bytes) => {
                slot.readable = slot.ending || bytes == room.bytes;
                Event::Landed { bytes }
            }
            Err(libc::EAGAIN) => {
                slot.readable = false;
                return;
            }
            Err(libc::EINTR) => return,
            Err(errno) => Event::ReceiveFailed { errno },
        };
        (slot.receive, slot.room) = (None, None);
        self.complete(operation, event);
    }

    fn idle(&self) -> bool {
        let acceptable = |listener: &Listener| listener.ready && listener.accept.is_some();
        self.ready.is_empty() && !self.listeners.iter().any(acceptable)
    }
}

impl Ring for Epoll {
    fn name(&self) -> &'static str {
        "epoll"
    }

    fn accept(&mut self, operation: Operation, listener: RawFd) {
        let place = |fd| self.listeners.iter().position(|known| known.fd == fd);
        // The place of a listener that was closed may be taken.
        let index = place(listener).or_else(|| place(-1));
        let index = index.unwrap_or(self.listeners.len());
        let (fd, accept) = (listener, Some(operation));
        let ready = true;
        let entry = Listener { fd, accept, ready };
        match self.listeners.get_mut(index) {
            Some(place) => *place = entry,
            None => self.listeners.push(entry),
        }
        let events = libc::EPOLLIN | libc::EPOLLET;
        let errno = self.watch(listener, events, ON_LISTENER | index as u64);
        if errno != 0 {
            self.listeners[index].accept = None;
            self.complete(operation, Event::AcceptFailed { errno });
        }
    }

    fn attach(&mut self, handle: Handle) {
        let index = handle.slot as usize;
        if index >= self.slots.len() {
            self.slots.resize_with(index + 1, Slot::default);
        }
        let refused = self.watch(handle.fd, EDGES, ON_SLOT | u64::from(handle.slot));
        let slot = &mut self.slots[index];
        debug_assert!(!slot.attached, "a slot holds one socket at a time");
        (slot.attached, slot.fd, slot.refused) = (true, handle.fd, refused);
        (slot.readable, slot.ending) = (false, false);
    }

    fn detach(&mut self, handle: Handle) {
        self.system_calls += 1;
        // SAFETY: no event is read for a removal. A descriptor that is not watched is no harm.
        unsafe {
            let (epoll, nothing) = (self.epoll.as_raw_fd(), std::ptr::null_mut());
            libc::epoll_ctl(epoll, libc::EPOLL_CTL_DEL, handle.fd, nothing);
        }
        let slot = &mut self.slots[handle.slot as usize];
        slot.attached = false;
        let under_way = [slot.receive.take(), slot.send.take(), slot.connect.take()];
        debug_assert_eq!(under_way, [None; 3], "detached with something under way");
    }

    fn connect(&mut self, operation: Operation, handle: Handle, address: &SocketAddr) {
        let slot = &mut self.slots[handle.slot as usize];
        if slot.refused != 0 {
            let errno = slot.refused;
            return self.complete(operation, Event::Connected { errno });
        }
        // What was reported of the unconnected socket says nothing about the connected one.
        (slot.readable, slot.ending) = (false, false);
        self.system_calls += 1;
        // SAFETY: the caller keeps an attached descriptor open.
        let fd = unsafe { BorrowedFd::borrow_raw(handle.fd) };
        let errno = match SockRef::from(&fd).connect(&(*address).into()) {
            Ok(()) => 0,
            Err(error) => error.raw_os_error().unwrap_or(libc::EINVAL),
        };
        if matches!(errno, libc::EINPROGRESS | libc::EINTR) {
            slot.connect = Some(operation);
        } else {
            self.complete(operation, Event::Connected { errno });
        }
    }

    fn receive(&mut self, operation: Operation, handle: Handle) {
        self.want(operation, handle, 0, None);
    }

    fn receive_once(&mut self, operation: Operation, handle: Handle, bytes: u32) {
        self.want(operation, handle, bytes, None);
    }

    fn receive_into(&mut self, operation: Operation, handle: Handle, room: Room) {
        self.want(operation, handle, 0, Some(room));
    }

    fn collect(&mut self, _operation: Operation, handle: Handle) {
        self.slots[handle.slot as usize].readable = true;
        self.queue(handle.slot);
    }

    fn secured(&mut self, handle: Handle) {
        // Watched anew: what has come before is reported as TLS sees it. A short receive may end at
        // a record of another kind, for which there is no edge any more.
        let refused = self.watch(handle.fd, EDGES, ON_SLOT | u64::from(handle.slot));
        let slot = &mut self.slots[handle.slot as usize];
        (slot.refused, slot.readable, slot.ending) = (refused, true, true);
    }

    fn low_water(&mut self, handle: Handle, bytes: u32) {
        self.system_calls += 1;
        sockets::low_water(handle.fd, bytes);
    }

    fn keep_sent(&mut self, handle: Handle) {
        self.system_calls += 1;
        sockets::keep_sent(handle.fd);
    }

    fn cancel_receive(&mut self, operation: Operation, handle: Handle) {
        self.end_early(operation, handle.slot as usize);
    }

    fn send(&mut self, operation: Operation, handle: Handle, spans: &[Span]) {
        debug_assert!(!spans.is_empty() && spans.len() <= SPANS_MAX);
        let slot = &mut self.slots[handle.slot as usize];
        debug_assert!(slot.send.is_none(), "one send per socket at a time");
        self.system_calls += 1;
        // A span is an iovec and nothing else.
        let sent = send_now(handle.fd, spans.as_ptr().cast(), spans.len());
        match sent {
            Some(event) => self.complete(operation, event),
            None if slot.refused != 0 => {
                let errno = slot.refused;
                self.complete(operation, Event::SendFailed { errno });
            }
            None => {
                slot.send = Some(operation);
                slot.spans.clear();
                slot.spans.extend(spans.iter().map(|span| span.0));
            }
        }
    }

    fn connect_socket(&mut self, address: &SocketAddr) -> io::Result<RawFd> {
        self.system_calls += 2;
        sockets::connect_socket(address, true)
    }

    fn shutdown(&mut self, handle: Handle) {
        self.system_calls += 1;
        // The kernel reports an edge for it, which ends what is under way.
        sockets::shutdown(handle.fd);
    }

    fn close(&mut self, handle: Handle) {
        self.system_calls += 1;
        for listener in &mut self.listeners {
            if listener.fd == handle.fd {
                listener.fd = -1;
                listener.accept = None;
            }
        }
        sockets::close(handle.fd);
    }

    fn watch_wake(&mut self, operation: Operation, eventfd: RawFd) {
        let same = |wake: &Option<_>| wake.is_none_or(|(fd, _)| fd == eventfd);
        let index = self.wakes.iter().position(same);
        let index = index.unwrap_or(self.wakes.len());
        self.wakes.resize(self.wakes.len().max(index + 1), None);
        self.wakes[index] = Some((eventfd, operation));
        let data = ON_WAKE | index as u64;
        let errno = self.watch(eventfd, libc::EPOLLIN | libc::EPOLLET, data);
        debug_assert_eq!(errno, 0, "an eventfd can be watched");
    }

    fn unwatch_wake(&mut self, operation: Operation, eventfd: RawFd) {
        let watched = Some((eventfd, operation));
        if let Some(wake) = self.wakes.iter_mut().find(|wake| **wake == watched) {
            *wake = None;
            self.system_calls += 1;
            // SAFETY: no event is read for a removal.
            unsafe {
                let (epoll, nothing) = (self.epoll.as_raw_fd(), std::ptr::null_mut());
                libc::epoll_ctl(epoll, libc::EPOLL_CTL_DEL, eventfd, nothing);
            }
        }
    }

    fn register_fixed(&mut self, _memory: &'static [u8]) -> bool {
        false
    }

    fn recycle(&mut self, buffer: BufferId) {
        debug_assert!(self.memory.free.len() < self.memory.free.capacity());
        self.memory.free.push(buffer);
    }

    fn wait(&mut self, timeout: Duration) -> io::Result<()> {
        let busy = !self.reaped.is_empty() || !self.idle();
        self.poll(if busy { Duration::ZERO } else { timeout })?;
        self.take_events();
        self.accept_round();
        self.receive_round();
        Ok(())
    }

    fn next_completion(&mut self) -> Option<Completion> {
        self.reaped.pop_front()
    }

    /// None: an epoll shard has its thread to itself and sleeps in [`Ring::wait`].
    fn park(&mut self) -> Option<RawFd> {
        None
    }

    fn unpark(&mut self) {}

    fn origin(&mut self, fd: RawFd) -> Origin {
        self.system_calls += 2;
        sockets::origin(fd)
    }

    fn busy_poll(&mut self, microseconds: u32) -> io::Result<()> {
        self.system_calls += 1;
        sockets::poll_queues(self.epoll.as_raw_fd(), microseconds)
    }

    fn now_ns(&self) -> u64 {
        super::monotonic_ns()
    }

    /// Counts receives, sends and accepts too: here each is a system call of its own.
    fn system_calls(&self) -> u64 {
        self.system_calls
    }
}
