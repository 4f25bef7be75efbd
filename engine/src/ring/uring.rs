//! The io_uring ring: one `io_uring_enter` per tick carries all submissions, wait and time-out.
//!
//! Used: SINGLE_ISSUER and DEFER_TASKRUN (completions run on our thread, when we ask), registered
//! files (connections by slot), a buffer ring; multishot receive, accept and poll.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use self::buffer_ring::BufferRing;
use super::{Completion, Event, Handle, Ring, Room, SPANS_MAX, Span, sockets};
use crate::balance::Origin;
use crate::buffers::{BufferId, Buffers};
use crate::operation::{Kind, Operation};

mod buffer_ring;

/// Settings of an io_uring ring.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Submission queue entries; the completion queue has eight times as many.
    pub entries: u32,
    /// Places in the table of registered files: connections that are addressed by slot.
    pub files: u32,
}

/// Where the shard stands when the ring cannot be made.
#[derive(Debug, thiserror::Error)]
#[error("{step}: {source}")]
pub struct SetupError {
    /// Which step failed, in words.
    pub step: &'static str,
    /// The kernel's answer.
    pub source: io::Error,
}

/// An io_uring with its buffer ring.
pub struct Uring {
    ring: IoUring,
    buffer_ring: BufferRing,
    /// Spans and message headers of the sends of this tick: the kernel reads them when they are
    /// submitted and not after, so they are reused after each submit.
    spans: Vec<libc::iovec>,
    messages: Vec<libc::msghdr>,
    /// Addresses of connects under way, by ring of places: also read at submission only.
    addresses: Vec<socket2::SockAddr>,
    fixed: Option<Range<usize>>,
    reaped: VecDeque<Completion>,
    eventfd: OwnedFd,
    files: u32,
    /// Operations under way whose completion is no reason to wake up, see [`Uring::wanted`]: all,
    /// and those of this tick.
    quiet: usize,
    quiet_new: usize,
    system_calls: u64,
}

/// A wait past quiet operations lasts no longer: one of them may not complete after all, and then
/// the completion of another kind is not enough to end it.
const QUIET_WAIT: Duration = Duration::from_millis(4);
const BUFFER_GROUP: u16 = 0;
/// Sends that can be prepared between two submits.
const MESSAGES_MAX: usize = 1024;
const SPANS_ARENA: usize = 16 * 1024;
const ADDRESSES_MAX: usize = 256;

/// The same entry on either kind of target.
macro_rules! on {
    ($target:expr, $file:ident => $entry:expr) => {
        match $target {
            Target::Fixed($file) => $entry,
            Target::Fd($file) => $entry,
        }
    };
}

impl Uring {
    /// Makes the ring for `buffers`, which must outlive it.
    ///
    /// # Errors
    /// [`SetupError`] names the step: the caller falls back to epoll and says why.
    pub fn new(settings: Settings, buffers: &Buffers) -> Result<Uring, SetupError> {
        let step = |step| move |source| SetupError { step, source };
        let ring = build(settings.entries).map_err(step("io_uring_setup"))?;
        let mut probe = io_uring::Probe::new();
        ring.submitter()
            .register_probe(&mut probe)
            .map_err(step("probe of operations"))?;
        for code in [
            opcode::RecvMulti::CODE,
            opcode::Accept::CODE,
            opcode::SendMsg::CODE,
        ] {
            if !probe.is_supported(code) {
                let source = io::Error::from_raw_os_error(libc::EOPNOTSUPP);
                return Err(SetupError {
                    step: "an operation of io_uring is missing",
                    source,
                });
            }
        }
        let files = register_files(&ring, settings.files);
        let buffer_ring = BufferRing::new(&ring, buffers).map_err(step("buffer ring"))?;
        // SAFETY: a fresh descriptor that nobody else owns.
        let eventfd = unsafe {
            let fd = libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK);
            if fd < 0 {
                return Err(step("eventfd")(io::Error::last_os_error()));
            }
            OwnedFd::from_raw_fd(fd)
        };
        Ok(Uring {
            ring,
            buffer_ring,
            spans: Vec::with_capacity(SPANS_ARENA),
            messages: Vec::with_capacity(MESSAGES_MAX),
            addresses: Vec::with_capacity(ADDRESSES_MAX),
            fixed: None,
            reaped: VecDeque::with_capacity(settings.entries as usize * 8),
            eventfd,
            files,
            quiet: 0,
            quiet_new: 0,
            system_calls: 0,
        })
    }

    /// Whether completions wait to be reaped.
    pub fn is_ready(&mut self) -> bool {
        !self.reaped.is_empty() || !self.ring.completion().is_empty()
    }

    fn push(&mut self, entry: squeue::Entry) {
        // SAFETY: what the entry points to lives until the next submit (spans, messages and
        // addresses are reset only there) or until the completion (buffers, sockets).
        while unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.flush();
        }
    }

    /// Hands the queue to the kernel without waiting.
    fn flush(&mut self) {
        self.system_calls += 1;
        self.buffer_ring.commit();
        // A failure here is met again, and reported, by the next wait.
        if self.ring.submit().is_ok() {
            self.submitted();
        }
    }

    fn cancel(&mut self, operation: Operation) {
        let cancel = Operation::new(Kind::Cancel, operation.slot, operation.generation);
        let entry = opcode::AsyncCancel::new(operation.to_bits());
        self.push(entry.build().user_data(cancel.to_bits()));
    }

    /// One receive into a buffer; 0 bytes stand for all of it.
    fn receive_one(&mut self, operation: Operation, handle: Handle, bytes: u32, flags: i32) {
        let entry = on!(self.target(handle), file => {
            opcode::Recv::new(file, std::ptr::null_mut(), bytes)
                .buf_group(BUFFER_GROUP)
                .flags(flags)
                .build()
                .flags(squeue::Flags::BUFFER_SELECT)
        });
        self.push(entry.user_data(operation.to_bits()));
    }

    /// Counts an operation that completes while it is submitted, as a rule.
    fn quiet(&mut self, kind: Kind) {
        if is_quiet(kind) {
            self.quiet += 1;
            self.quiet_new += 1;
        }
    }

    /// How many completions end a wait. Sends of replies complete within their submission unless
    /// the socket is full; to return for them alone would double the system calls of a request.
    /// They are waited past as long as none has been left over from before.
    fn wanted(&mut self) -> usize {
        let new = std::mem::take(&mut self.quiet_new);
        if self.quiet == new { 1 + new } else { 1 }
    }

    fn submitted(&mut self) {
        if self.ring.submission().is_empty() {
            self.spans.clear();
            self.messages.clear();
            self.addresses.clear();
        }
    }

    fn target(&self, handle: Handle) -> Target {
        if handle.slot < self.files {
            Target::Fixed(types::Fixed(handle.slot))
        } else {
            Target::Fd(types::Fd(handle.fd))
        }
    }

    /// Moves what the kernel has posted to our own list: acting on a completion may need the
    /// queue again.
    fn reap(&mut self) {
        let buffer_ring = &self.buffer_ring;
        for entry in self.ring.completion() {
            let Some(operation) = Operation::from_bits(entry.user_data()) else {
                continue;
            };
            if is_quiet(operation.kind) {
                self.quiet -= 1;
            }
            if let Some(event) = event_of(operation.kind, &entry) {
                self.reaped.push_back(Completion { operation, event });
            } else if let Some(buffer) = cqueue::buffer_select(entry.flags()) {
                debug_assert!(buffer < buffer_ring.count);
            }
        }
    }
}

enum Target {
    Fixed(types::Fixed),
    Fd(types::Fd),
}

impl Ring for Uring {
    fn name(&self) -> &'static str {
        "uring"
    }

    fn accept(&mut self, operation: Operation, listener: RawFd) {
        let entry = opcode::AcceptMulti::new(types::Fd(listener))
            .flags(libc::SOCK_CLOEXEC)
            .build();
        self.push(entry.user_data(operation.to_bits()));
    }

    fn attach(&mut self, handle: Handle) {
        if handle.slot < self.files {
            self.system_calls += 1;
            let update = self
                .ring
                .submitter()
                .register_files_update(handle.slot, &[handle.fd]);
            debug_assert!(update.is_ok(), "a slot below `files` can be updated");
        }
    }

    fn detach(&mut self, handle: Handle) {
        if handle.slot < self.files {
            self.system_calls += 1;
            let update = self
                .ring
                .submitter()
                .register_files_update(handle.slot, &[-1]);
            debug_assert!(update.is_ok(), "a slot below `files` can be updated");
        }
    }

    fn connect(&mut self, operation: Operation, handle: Handle, address: &SocketAddr) {
        if self.addresses.len() == ADDRESSES_MAX {
            self.flush();
        }
        self.addresses.push((*address).into());
        let address = self.addresses.last().expect("pushed above");
        let (pointer, length) = (address.as_ptr(), address.len());
        let entry = opcode::Connect::new(types::Fd(handle.fd), pointer.cast(), length).build();
        self.push(entry.user_data(operation.to_bits()));
    }

    fn receive(&mut self, operation: Operation, handle: Handle) {
        let entry =
            on!(self.target(handle), file => opcode::RecvMulti::new(file, BUFFER_GROUP).build());
        self.push(entry.user_data(operation.to_bits()));
    }

    fn receive_once(&mut self, operation: Operation, handle: Handle, bytes: u32) {
        self.receive_one(operation, handle, bytes, 0);
    }

    fn receive_into(&mut self, operation: Operation, handle: Handle, room: Room) {
        // All of it or what comes before an end: fewer completions for a large body.
        let entry = on!(self.target(handle), file => {
            opcode::Recv::new(file, room.start.as_ptr(), room.bytes)
                .flags(libc::MSG_WAITALL)
                .build()
        });
        self.push(entry.user_data(operation.to_bits()));
    }

    fn collect(&mut self, operation: Operation, handle: Handle) {
        self.quiet(operation.kind);
        self.receive_one(operation, handle, 0, libc::MSG_DONTWAIT);
    }

    fn low_water(&mut self, handle: Handle, bytes: u32) {
        self.system_calls += 1;
        sockets::low_water(handle.fd, bytes);
    }

    fn keep_sent(&mut self, handle: Handle) {
        self.system_calls += 1;
        sockets::keep_sent(handle.fd);
    }

    fn cancel_receive(&mut self, operation: Operation, _handle: Handle) {
        self.cancel(operation);
    }

    fn send(&mut self, operation: Operation, handle: Handle, spans: &[Span]) {
        self.quiet(operation.kind);
        debug_assert!(!spans.is_empty() && spans.len() <= SPANS_MAX);
        if let [span] = spans {
            let (pointer, length) = (span.0.iov_base as *const u8, span.0.iov_len as u32);
            let is_fixed = |range: &Range<usize>| range.contains(&(pointer as usize));
            let entry = if self.fixed.as_ref().is_some_and(is_fixed) {
                on!(self.target(handle), file => {
                    opcode::WriteFixed::new(file, pointer, length, 0).build()
                })
            } else {
                on!(self.target(handle), file => {
                    opcode::Send::new(file, pointer, length).flags(libc::MSG_NOSIGNAL).build()
                })
            };
            return self.push(entry.user_data(operation.to_bits()));
        }
        if self.messages.len() == MESSAGES_MAX || self.spans.len() + spans.len() > SPANS_ARENA {
            self.flush();
        }
        let first = self.spans.len();
        self.spans.extend(spans.iter().map(|span| span.0));
        // SAFETY: all-zero is a valid msghdr.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.spans[first..].as_mut_ptr();
        message.msg_iovlen = spans.len() as _;
        self.messages.push(message);
        let message = self.messages.last().expect("pushed above") as *const _;
        let flags = libc::MSG_NOSIGNAL as u32;
        let entry = on!(self.target(handle), file => {
            opcode::SendMsg::new(file, message).flags(flags).build()
        });
        self.push(entry.user_data(operation.to_bits()));
    }

    fn connect_socket(&mut self, address: &SocketAddr) -> io::Result<RawFd> {
        self.system_calls += 2;
        sockets::connect_socket(address, false)
    }

    fn shutdown(&mut self, handle: Handle) {
        self.system_calls += 1;
        sockets::shutdown(handle.fd);
    }

    fn close(&mut self, handle: Handle) {
        self.system_calls += 1;
        sockets::close(handle.fd);
    }

    fn unwatch_wake(&mut self, operation: Operation, _eventfd: RawFd) {
        self.cancel(operation);
    }

    fn watch_wake(&mut self, operation: Operation, eventfd: RawFd) {
        let entry = opcode::PollAdd::new(types::Fd(eventfd), libc::POLLIN as u32)
            .multi(true)
            .build();
        self.push(entry.user_data(operation.to_bits()));
    }

    fn register_fixed(&mut self, memory: &'static [u8]) -> bool {
        let vector = [Span::of(memory).0];
        // SAFETY: the memory is never unmapped.
        let registered = unsafe { self.ring.submitter().register_buffers(&vector) };
        if registered.is_ok() {
            let start = memory.as_ptr() as usize;
            self.fixed = Some(start..start + memory.len());
        }
        registered.is_ok()
    }

    fn recycle(&mut self, buffer: BufferId) {
        self.buffer_ring.add(buffer);
    }

    fn wait(&mut self, timeout: Duration) -> io::Result<()> {
        self.buffer_ring.commit();
        self.system_calls += 1;
        let wanted = self.wanted();
        let result = if timeout.is_zero() || !self.reaped.is_empty() {
            self.ring.submit_and_wait(0)
        } else {
            let timeout = if wanted > 1 {
                timeout.min(QUIET_WAIT)
            } else {
                timeout
            };
            let timespec = types::Timespec::from(timeout);
            let arguments = types::SubmitArgs::new().timespec(&timespec);
            self.ring.submitter().submit_with_args(wanted, &arguments)
        };
        match result {
            Ok(_) => {}
            Err(error) => match error.raw_os_error() {
                // ETIME: nothing came. EINTR: a signal. EBUSY: reap first, then submit again.
                Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN) => {}
                _ => return Err(error),
            },
        }
        self.submitted();
        self.reap();
        Ok(())
    }

    fn next_completion(&mut self) -> Option<Completion> {
        self.reaped.pop_front()
    }

    fn park(&mut self) -> Option<RawFd> {
        self.system_calls += 1;
        let registered = self
            .ring
            .submitter()
            .register_eventfd(self.eventfd.as_raw_fd());
        registered.ok().map(|()| self.eventfd.as_raw_fd())
    }

    fn unpark(&mut self) {
        self.system_calls += 1;
        // Fails only when `park` has failed, and then there is nothing to undo.
        let _ = self.ring.submitter().unregister_eventfd();
    }

    fn origin(&mut self, fd: RawFd) -> Origin {
        self.system_calls += 2;
        sockets::origin(fd)
    }

    fn take_over(&mut self, fd: RawFd) {
        self.system_calls += 1;
        sockets::make_blocking(fd);
    }

    fn busy_poll(&mut self, microseconds: u32) -> io::Result<()> {
        if microseconds == 0 {
            return self
                .ring
                .submitter()
                .unregister_napi(&mut types::Napi::new());
        }
        // Interrupts stay off between two polls where the host defers them (`tune` says how). What
        // was registered before is replaced.
        let mut napi = types::Napi::new()
            .set_busy_poll_timeout(microseconds)
            .set_prefer_busy_poll(true);
        self.ring.submitter().register_napi(&mut napi)
    }

    fn now_ns(&self) -> u64 {
        super::monotonic_ns()
    }

    fn system_calls(&self) -> u64 {
        self.system_calls
    }
}

fn is_quiet(kind: Kind) -> bool {
    matches!(kind, Kind::Reply | Kind::Collect)
}

fn event_of(kind: Kind, entry: &cqueue::Entry) -> Option<Event> {
    let (result, more) = (entry.result(), cqueue::more(entry.flags()));
    Some(match kind {
        Kind::Accept if result >= 0 => {
            // SAFETY: the kernel has just made this descriptor for us.
            let socket = unsafe { OwnedFd::from_raw_fd(result) };
            Event::Accepted { socket, more }
        }
        Kind::Accept => Event::AcceptFailed { errno: -result },
        Kind::Collect => match cqueue::buffer_select(entry.flags()) {
            Some(buffer) if result > 0 => Event::Received {
                buffer,
                bytes: result as u32,
                more: true,
            },
            _ => return None,
        },
        Kind::Receive if result > 0 => match cqueue::buffer_select(entry.flags()) {
            Some(buffer) => Event::Received {
                buffer,
                bytes: result as u32,
                more,
            },
            // Not into a buffer of ours: into the room that was named.
            None => Event::Landed {
                bytes: result as u32,
            },
        },
        Kind::Receive if result == 0 => Event::EndOfStream,
        Kind::Receive if result == -libc::ENOBUFS => Event::NoBuffers,
        Kind::Receive => Event::ReceiveFailed { errno: -result },
        Kind::Send | Kind::Reply if result >= 0 => Event::Sent {
            bytes: result as u32,
        },
        Kind::Send | Kind::Reply => Event::SendFailed { errno: -result },
        Kind::Connect => Event::Connected { errno: -result },
        Kind::Wake => Event::Woken { more },
        Kind::Cancel => return None,
    })
}

/// The best flags that this kernel takes: DEFER_TASKRUN from 6.1 on, plain COOP before.
fn build(entries: u32) -> io::Result<IoUring> {
    let best = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .setup_submit_all()
        .setup_cqsize(entries * 8)
        .build(entries);
    match best {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => IoUring::builder()
            .setup_coop_taskrun()
            .setup_submit_all()
            .setup_cqsize(entries * 8)
            .build(entries),
        other => other,
    }
}

/// Registers an empty table; a host that allows fewer files gets a smaller table, and sockets
/// beyond it are addressed by descriptor.
fn register_files(ring: &IoUring, wanted: u32) -> u32 {
    let mut files = wanted;
    while files >= 64 {
        if ring.submitter().register_files_sparse(files).is_ok() {
            return files;
        }
        files /= 2;
    }
    0
}
