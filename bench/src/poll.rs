//! Waiting for sockets: a thin epoll with a timeout in nanoseconds, for the load generator and the
//! sink. `rustix` rounds timeouts to milliseconds, which an open loop cannot use.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

/// What a socket is watched for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Interest {
    /// Input only.
    Read,
    /// Input, and room for output.
    ReadWrite,
}

impl Interest {
    fn flags(self) -> EventFlags {
        match self {
            Self::Read => EventFlags::IN,
            Self::ReadWrite => EventFlags::IN | EventFlags::OUT,
        }
    }
}

/// One thing that happened to a watched socket.
#[derive(Clone, Copy)]
pub(crate) struct Ready {
    /// The number given to [`Poller::add`].
    pub(crate) token: u64,
    /// Input, end of stream or an error is there to be read.
    pub(crate) readable: bool,
    /// There is room for output.
    pub(crate) writable: bool,
}

/// An epoll instance and the events of its last wait.
pub(crate) struct Poller {
    epoll: OwnedFd,
    events: Vec<libc::epoll_event>,
    ready: usize,
}

impl Poller {
    /// A poller that hands out at most `batch` events a time.
    pub(crate) fn new(batch: usize) -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        Ok(Self {
            epoll,
            events: vec![libc::epoll_event { events: 0, u64: 0 }; batch],
            ready: 0,
        })
    }

    /// Watches `socket`; its events carry `token`.
    pub(crate) fn add(&self, socket: impl AsFd, token: u64, interest: Interest) -> io::Result<()> {
        Ok(epoll::add(
            &self.epoll,
            socket,
            EventData::new_u64(token),
            interest.flags(),
        )?)
    }

    /// Watches `socket` for something else from now on.
    pub(crate) fn modify(&self, socket: impl AsFd, token: u64, to: Interest) -> io::Result<()> {
        Ok(epoll::modify(
            &self.epoll,
            socket,
            EventData::new_u64(token),
            to.flags(),
        )?)
    }

    /// Waits until something is ready or `timeout_ns` have passed, and returns how many events
    /// there are. A signal ends the wait with none.
    pub(crate) fn wait(&mut self, timeout_ns: Option<u64>) -> io::Result<usize> {
        let limit = timeout_ns.map(|ns| libc::timespec {
            tv_sec: (ns / 1_000_000_000) as libc::time_t,
            tv_nsec: (ns % 1_000_000_000) as libc::c_long,
        });
        let limit = limit.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: the event array is valid for its length, the timeout is null or points to a
        // live timespec, and no signal mask is given. Called by number since older C libraries
        // lack the wrapper.
        let found = unsafe {
            libc::syscall(
                libc::SYS_epoll_pwait2,
                self.epoll.as_raw_fd(),
                self.events.as_mut_ptr(),
                self.events.len() as libc::c_int,
                limit,
                std::ptr::null::<libc::sigset_t>(),
                0_usize,
            )
        };
        self.ready = match usize::try_from(found) {
            Ok(found) => found,
            Err(_) => match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::Interrupted => 0,
                e => return Err(e),
            },
        };
        Ok(self.ready)
    }

    /// Event number `index` of the last wait.
    pub(crate) fn ready(&self, index: usize) -> Ready {
        let event = self.events[index];
        let flags = event.events as i32;
        Ready {
            token: event.u64,
            readable: flags & (libc::EPOLLIN | libc::EPOLLHUP | libc::EPOLLERR) != 0,
            writable: flags & libc::EPOLLOUT != 0,
        }
    }
}
