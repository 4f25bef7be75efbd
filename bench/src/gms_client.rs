//! A client of the GPU memory service that measures: frames out, frames in, and a clock.
//!
//! It polls its socket without sleeping, so that what is measured is the service and the kernel,
//! not how long this thread takes to wake up.

use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use corelane_gpu_mem::lock::{Grant, LockType};
use corelane_gpu_mem::protocol::fd_pass;
use corelane_gpu_mem::protocol::frame::{Cut, PREFIX_BYTES, REPLY_BYTES_MAX, cut};
use corelane_gpu_mem::protocol::v1::{
    AllocateRequest, CommitRequest, ExportAllocationRequest, GetRuntimeStateRequest,
    GetRuntimeStateResponse, HandshakeRequest, Reply, Request,
};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use crate::interrupt;

/// No answer takes longer, however busy the machine is.
const PATIENCE: Duration = Duration::from_secs(60);
/// A signal is looked for once in so many looks at the socket.
const LOOKS: u32 = 1 << 14;

/// One connection.
pub(crate) struct Client {
    stream: UnixStream,
    input: Vec<u8>,
    /// It sleeps until an answer comes.
    sleeps: bool,
}

impl Client {
    /// Connects.
    pub(crate) fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)
            .with_context(|| format!("cannot connect to {}", socket.display()))?;
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            input: Vec::with_capacity(4096),
            sleeps: false,
        })
    }

    /// Connects and asks for the lock, for ever; does not wait.
    pub(crate) fn queue_up(socket: &Path) -> Result<Self> {
        let mut client = Self::connect(socket)?;
        client.say(HandshakeRequest {
            lock_type: LockType::Rw,
            timeout_ms: None,
        })?;
        Ok(client)
    }

    /// Waits until it holds the lock for writing.
    pub(crate) fn granted(&mut self) -> Result<Instant> {
        match self.hear()? {
            (Reply::Handshake(answer), _, at) if answer.granted_lock_type == Some(Grant::Rw) => {
                Ok(at)
            }
            (other, ..) => bail!("instead of a grant: {other:?}"),
        }
    }

    /// Makes memory; answers its id and how long that took.
    pub(crate) fn allocate(&mut self, bytes: u64) -> Result<(String, Duration)> {
        let began = Instant::now();
        self.say(AllocateRequest {
            size: bytes.into(),
            tag: "weights".into(),
        })?;
        match self.hear()? {
            (Reply::Allocate(made), _, at) => Ok((made.allocation_id, at - began)),
            (other, ..) => bail!("instead of memory: {other:?}"),
        }
    }

    /// Gets a descriptor, which is closed again; answers how long that took.
    pub(crate) fn export(&mut self, id: &str) -> Result<Duration> {
        let began = Instant::now();
        self.say(ExportAllocationRequest {
            allocation_id: id.to_owned(),
        })?;
        match self.hear()? {
            (Reply::ExportAllocation(_), Some(_), at) => Ok(at - began),
            (other, ..) => bail!("instead of a descriptor: {other:?}"),
        }
    }

    /// Publishes; answers when that began and how long it took.
    pub(crate) fn commit(mut self) -> Result<(Instant, Duration)> {
        let began = Instant::now();
        self.say(CommitRequest {})?;
        match self.hear()? {
            (Reply::Commit(_), _, at) => Ok((began, at - began)),
            (other, ..) => bail!("instead of a commit: {other:?}"),
        }
    }

    /// Until there is something to read, or a second is over.
    fn sleep(&self) {
        let mut watched = [PollFd::new(&self.stream, PollFlags::IN)];
        let second = Timespec {
            tv_sec: 1,
            tv_nsec: 0,
        };
        // Whatever it answers, the socket is looked at again.
        let _ = rustix::event::poll(&mut watched, Some(&second));
    }

    fn say(&mut self, request: impl Into<Request>) -> Result<()> {
        let frame = request.into().encode();
        // A small frame and an empty socket: it fits.
        Ok(self.stream.write_all(&frame)?)
    }

    /// The next reply, its descriptor, and when it had come.
    fn hear(&mut self) -> Result<(Reply, Option<OwnedFd>, Instant)> {
        let mut descriptor = None;
        let mut chunk = [0; 4096];
        let began = Instant::now();
        for look in 0_u32.. {
            match fd_pass::receive(&self.stream, &mut chunk) {
                Ok(received) if received.bytes == 0 => bail!("the service closed the connection"),
                Ok(received) => {
                    let at = Instant::now();
                    descriptor = descriptor.or(received.descriptor);
                    self.input.extend_from_slice(&chunk[..received.bytes]);
                    if let Cut::Frame(payload) = cut(&self.input, REPLY_BYTES_MAX) {
                        let taken = PREFIX_BYTES + payload.len();
                        let reply = Reply::decode(payload)?;
                        self.input.drain(..taken);
                        return Ok((reply, descriptor, at));
                    }
                }
                Err(Errno::AGAIN | Errno::INTR) => {
                    if self.sleeps {
                        self.sleep();
                    }
                    if look % LOOKS == 0 {
                        interrupt::check()?;
                        if began.elapsed() > PATIENCE {
                            break;
                        }
                    }
                }
                Err(errno) => return Err(errno.into()),
            }
        }
        bail!("no answer after {PATIENCE:?}")
    }
}

/// How a pool stands.
pub(crate) fn state(socket: &Path) -> Result<GetRuntimeStateResponse> {
    let mut client = Client::connect(socket)?;
    client.say(GetRuntimeStateRequest {})?;
    match client.hear()? {
        (Reply::RuntimeState(state), ..) => Ok(state),
        (other, ..) => bail!("instead of a state: {other:?}"),
    }
}

/// Arguments of the hidden command `gms-writer`.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct WriterArgs {
    /// The socket of the pool.
    socket: PathBuf,
}

/// Holds the lock with some memory until it is killed; says `h` when it does.
pub(crate) fn hold(args: &WriterArgs) -> Result<()> {
    let mut client = Client::queue_up(&args.socket)?;
    // It has the service's CPU, and must not take it. It may wait for long behind others.
    client.sleeps = true;
    let mut watched = [PollFd::new(&client.stream, PollFlags::IN)];
    while rustix::event::poll(&mut watched, None).is_err() {}
    client.granted()?;
    for _ in 0..4 {
        client.allocate(1)?;
    }
    let mut out = std::io::stdout();
    out.write_all(b"h")?;
    out.flush()?;
    loop {
        std::thread::park();
    }
}
