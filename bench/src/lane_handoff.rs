//! The first part of `lane`: one body from the memory of this process into that of a worker, and
//! word back that it is there. No router and no wire: what the last hop alone costs.

use std::io::{self, Read as _, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use corelane_gpu_mem::lane::attach::{LaneFds, LaneSize};
use corelane_gpu_mem::lane::layout::{
    BLOCK_HEAD_BYTES, BlockHead, Descriptor, Kind, RECORD_BYTES, Wish,
};
use corelane_gpu_mem::lane::memory::Mapping;
use corelane_gpu_mem::lane::queue::{Queues, Side};
use hdrhistogram::Histogram;
use rustix::event::{PollFd, PollFlags, poll};

use crate::cpu::{Pins, Usage};
use crate::lane_worker::{Way, read_exact};
use crate::report::new_histogram;
use crate::servers::Server;

/// The largest body that any arm carries.
pub(crate) const BODY_BYTES_MAX: usize = 64 << 20;

/// One worker and how it is fed.
pub(crate) struct Handoff {
    feed: Feed,
    server: Server,
    body: Vec<u8>,
}

enum Feed {
    Lane(Box<Feeder>),
    Unix(UnixStream),
    Tcp(TcpStream),
}

/// The router's part of a lane, without a router.
struct Feeder {
    queues: Queues,
    slab: Mapping,
    wake: OwnedFd,
    wake_worker: OwnedFd,
    spin: bool,
    count: u32,
    /// The worker's end of it: closed, it ends.
    _socket: UnixStream,
}

/// What one slice has found.
pub(crate) struct Found {
    /// From the first byte given to the word that all is there.
    pub(crate) latency_ns: Histogram<u64>,
    /// CPU of both processes for each body; of no meaning where they spin.
    pub(crate) cpu_us: f64,
}

impl Handoff {
    /// Starts a worker and connects to it.
    pub(crate) fn start(way: Way, spin: bool, dir: &Path, pins: Pins) -> Result<Handoff> {
        let mode = if spin { "spin" } else { "block" };
        let name = format!("handoff-{}-{mode}", way.name());
        let socket = dir.join(format!("{name}.sock"));
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["lane-worker", way.name(), "handoff", "--socket"]);
        command.arg(&socket).args(spin.then_some("--spin"));
        let listener = match way {
            Way::Lane => Some(UnixListener::bind(&socket)?),
            _ => None,
        };
        let mut server = Server::start(&name, command, dir, pins.sink)?;
        let out = server.stdout.clone();
        let said = move || {
            let text = std::fs::read_to_string(&out).ok()?;
            text.strip_suffix('\n').map(ToOwned::to_owned)
        };
        let feed = match (way, listener) {
            (Way::Lane, Some(listener)) => Feed::Lane(Box::new(Feeder::meet(&listener, spin)?)),
            (Way::Tcp, _) => {
                let address: SocketAddr = server.wait_until("to listen", said)?.parse()?;
                let stream = TcpStream::connect(address)?;
                stream.set_nodelay(true)?;
                stream.set_nonblocking(spin)?;
                Feed::Tcp(stream)
            }
            _ => {
                server.wait_until("to listen", said)?;
                let stream = UnixStream::connect(&socket)?;
                stream.set_nonblocking(spin)?;
                Feed::Unix(stream)
            }
        };
        Ok(Handoff {
            feed,
            server,
            body: vec![b'x'; 4],
        })
    }

    /// Bodies of this size, one after the other, for so long.
    pub(crate) fn slice(
        &mut self,
        bytes: usize,
        warmup: Duration,
        time: Duration,
    ) -> Result<Found> {
        self.body.resize(4 + bytes, b'x');
        self.body[..4].copy_from_slice(&(bytes as u32).to_be_bytes());
        let warm = Instant::now() + warmup;
        while Instant::now() < warm {
            self.one()?;
        }
        let pid = self.server.pid();
        let usage = || (Usage::of_tree(pid), Usage::of_this_thread());
        let before = usage();
        let mut latency_ns = new_histogram();
        let end = Instant::now() + time;
        loop {
            let began = Instant::now();
            if began >= end {
                break;
            }
            self.one()?;
            latency_ns.saturating_record(began.elapsed().as_nanos() as u64);
        }
        let after = usage();
        self.server.check_alive()?;
        let cpu_us = after.0.since(before.0).cpu_us() + after.1.since(before.1).cpu_us();
        Ok(Found {
            cpu_us: cpu_us / latency_ns.len().max(1) as f64,
            latency_ns,
        })
    }

    fn one(&mut self) -> Result<()> {
        match &mut self.feed {
            Feed::Lane(feeder) => feeder.one(&self.body[4..]),
            Feed::Unix(stream) => exchange(stream, &self.body),
            Feed::Tcp(stream) => exchange(stream, &self.body),
        }
    }
}

fn exchange(stream: &mut (impl io::Read + Write), body: &[u8]) -> Result<()> {
    let mut left = body;
    while !left.is_empty() {
        match stream.write(left) {
            Ok(bytes) => left = &left[bytes..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::hint::spin_loop(),
            Err(error) => return Err(error.into()),
        }
    }
    read_exact(stream, &mut [0])
}

impl Feeder {
    fn meet(listener: &UnixListener, spin: bool) -> Result<Feeder> {
        let (mut socket, _) = listener.accept()?;
        socket.read_exact(&mut [0; RECORD_BYTES])?;
        let size = LaneSize {
            entries: 64,
            slab_bytes: 2 * (BODY_BYTES_MAX as u64 + 4096),
        };
        let head = size.head(0, 1, 1);
        let fds = LaneFds::create(&head)?;
        fds.offer(&socket, &head)?;
        let queues = Mapping::new(&fds.queues, head.queue_bytes() as u64)?;
        Ok(Feeder {
            queues: Queues::new(queues, &head, Side::Router)?,
            slab: Mapping::new(&fds.slab, head.slab_bytes.get())?,
            wake: fds.wake_router,
            wake_worker: fds.wake_worker,
            spin,
            count: 0,
            _socket: socket,
        })
    }

    fn one(&mut self, body: &[u8]) -> Result<()> {
        let head = BlockHead {
            body_at: (BLOCK_HEAD_BYTES as u32).into(),
            body_bytes: (body.len() as u32).into(),
            id_bytes: 0.into(),
            headers_bytes: 0.into(),
            codec: 0,
            zero: [0; 47],
        };
        let head = zerocopy::IntoBytes::as_bytes(&head);
        // Here the kernel would write it; there is no socket to receive from.
        if !self.slab.write(0, head) || !self.slab.write(BLOCK_HEAD_BYTES as u64, body) {
            bail!("a body of {} bytes does not fit", body.len());
        }
        self.count = self.count.wrapping_add(1);
        let bytes = (BLOCK_HEAD_BYTES + body.len()) as u32;
        let descriptor = Descriptor::new(Kind::Request, 0, self.count).at(0, bytes);
        if !self.queues.post(&descriptor)? {
            bail!("the worker takes nothing");
        }
        if self.queues.wants_wake(Kind::Request) {
            rustix::io::write(&self.wake_worker, &1u64.to_ne_bytes())?;
        }
        loop {
            if let Some(answer) = self.queues.take()? {
                if answer.generation.get() != self.count {
                    bail!("an answer to another body");
                }
                return Ok(());
            }
            if self.spin {
                std::hint::spin_loop();
                continue;
            }
            if !self.queues.wish(Wish::News) {
                let mut fds = [PollFd::new(&self.wake, PollFlags::IN)];
                poll(&mut fds, None).context("cannot wait for the worker")?;
                rustix::io::read(&self.wake, &mut [0; 8])?;
            }
            self.queues.wish(Wish::Never);
        }
    }
}
