//! The thread of a shard: pinned to its core, with an executor above the ring.
//!
//! On io_uring the shard is a task of a glommio executor and goes through three gears:
//!
//! * *hot*: completions keep coming; the shard ticks, and gives the executor a turn when one of
//!   its tasks was woken, and once a millisecond in any case;
//! * *warm*: nothing is there; it waits in the ring's own system call, for a bounded time;
//! * *cold*: it has waited in vain for a while; it sleeps in the executor, whose other tasks then
//!   have the core to themselves, until the ring's eventfd calls.
//!
//! On epoll the thread is a plain one and the tick waits by itself.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use futures_executor::{LocalPool, LocalSpawner};
use futures_task::LocalSpawn;
use rustix::event::{PollFd, PollFlags, poll};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::adopt::Errand;
use crate::buffers::Buffers;
use crate::client::Client;
use crate::config::{ANY_CPU, RingKind, ShardConfig};
use crate::ends::{Ends, HomeAddress};
use crate::mesh::{self, Receiver, Sender};
use crate::quic::Outbound;
use crate::ring::Ring;
use crate::ring::epoll::Epoll;
use crate::ring::uring::{Settings, Uring};
use crate::shard::{Command, Lanes, Report, Shard};
use crate::stats::Stats;
use crate::worker::Worker;

/// Longest wait of a warm shard: glommio's own timers and files are served this often at least.
const WARM_WAIT: Duration = Duration::from_millis(50);
/// Waits in vain after which a shard goes cold.
const COLD_AFTER: u32 = 8;
/// The executor gets a turn this often while the shard is hot.
const TURN_EVERY: Duration = Duration::from_millis(1);
/// A cold shard looks after itself this often: its timers are not the executor's.
const COLD_WAIT_MAX: Duration = Duration::from_millis(250);
const LISTEN_BACKLOG: i32 = 4096;

/// Why a shard could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The address cannot be bound.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Memory or descriptors are missing.
    #[error("shard {shard}: {step}: {source}")]
    Resources {
        /// The shard.
        shard: usize,
        /// What was being made.
        step: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// A running shard, as control holds it.
pub struct ShardHandle {
    /// Index of the shard.
    pub shard: usize,
    /// Its counters.
    pub stats: Arc<Stats>,
    /// Where it listens.
    pub address: Option<SocketAddr>,
    commands: Sender<Command>,
    /// What it tells control; its descriptor is readable when there is something.
    pub reports: Receiver<Report>,
    /// Its sockets that wait for a handshake; to be taken by who does these.
    pub insecure: Option<Receiver<Errand>>,
    /// Its responses that leave on QUIC; to be taken by who speaks it.
    pub outbound: Option<Receiver<Outbound>>,
    /// Why its program does not steer connections, if it was told one and that is so.
    pub unsteered: Option<io::Error>,
    thread: Option<JoinHandle<()>>,
}

impl ShardHandle {
    /// Hands a command to the shard.
    ///
    /// # Errors
    /// Gives it back when the shard does not keep up; try again later.
    pub fn command(&self, command: Command) -> Result<(), Command> {
        self.commands.send(command)
    }

    /// Hands commands over from any thread, as long as the shard runs.
    pub fn commands(&self) -> Sender<Command> {
        self.commands.clone()
    }

    /// Stops the shard and waits for its thread.
    pub fn stop(&mut self) {
        let mut command = Command::Stop;
        while let Err(back) = self.commands.send(command) {
            command = back;
            std::thread::yield_now();
        }
        self.join();
    }

    /// Whether the thread has ended.
    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits for the thread, which has been told to stop.
    pub fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            // A panic was printed by its thread already.
            let _ = thread.join();
        }
    }
}

/// A socket that listens on `address`; `shared` ones of several shards take turns at a port.
///
/// # Errors
/// The address is in use or is not ours.
pub fn listen(address: SocketAddr, shared: bool, nonblocking: bool) -> io::Result<TcpListener> {
    let kind = Type::STREAM.cloexec();
    let kind = if nonblocking {
        kind.nonblocking()
    } else {
        kind
    };
    let socket = Socket::new(Domain::for_address(address), kind, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(shared)?;
    // Accepted sockets inherit it: acknowledgements are small and must not wait for each other.
    socket.set_tcp_nodelay(true)?;
    socket.bind(&address.into())?;
    socket.listen(LISTEN_BACKLOG)?;
    Ok(socket.into())
}

/// A socket that somebody else has made, as [`listen`] would have.
fn take_over(handed: &TcpListener) -> io::Result<TcpListener> {
    let listener = handed.try_clone()?;
    SockRef::from(&listener).set_tcp_nodelay(true)?;
    Ok(listener)
}

/// Starts the thread of a shard.
///
/// # Errors
/// The address cannot be bound, or no thread can be made. Whatever fails later is reported as
/// [`Report::Stopped`].
pub fn spawn(config: ShardConfig) -> Result<ShardHandle, StartError> {
    spawn_with(config, Ends::default())
}

/// Starts the thread of a shard that also answers requests, or makes calls, itself.
///
/// # Errors
/// As [`spawn`].
pub fn spawn_with(config: ShardConfig, ends: Ends) -> Result<ShardHandle, StartError> {
    let shard = config.shard;
    let resources = |step| {
        move |source| StartError::Resources {
            shard,
            step,
            source,
        }
    };
    let nonblocking = config.ring == RingKind::Epoll;
    let listener = match (&config.handed, config.listen) {
        (Some(handed), _) => Some(take_over(handed).map_err(resources("socket handed over"))?),
        (None, Some(address)) => {
            let listener = listen(address, true, nonblocking);
            Some(listener.map_err(|source| StartError::Listen { address, source })?)
        }
        (None, None) => None,
    };
    let address = listener
        .as_ref()
        .and_then(|listener| listener.local_addr().ok());
    let unsteered = match (&config.steering, &listener) {
        (Some(program), Some(listener)) => program.attach(listener).err(),
        _ => None,
    };
    let home = ends
        .home
        .map(|home| home_listener(home, nonblocking))
        .transpose()?;
    let relay = config
        .relay_home
        .map(|home| home_listener(home, nonblocking))
        .transpose()?;
    let (commands, command_receiver) = mesh::lane().map_err(resources("eventfd"))?;
    let (report_sender, reports) = mesh::lane().map_err(resources("eventfd"))?;
    let (insecure_sender, insecure) = mesh::lane().map_err(resources("eventfd"))?;
    let (outbound_sender, outbound) = mesh::lane().map_err(resources("eventfd"))?;
    let stats = Arc::new(Stats::new(config.flight_records));
    let parts = Parts {
        config,
        listener,
        stats: Arc::clone(&stats),
        lanes: Lanes {
            commands: command_receiver,
            reports: report_sender,
            insecure: insecure_sender,
            outbound: outbound_sender,
        },
        ends,
        home,
        relay,
    };
    let thread = std::thread::Builder::new()
        .name(format!("shard-{shard}"))
        .spawn(move || run(parts))
        .map_err(resources("thread"))?;
    Ok(ShardHandle {
        shard,
        stats,
        address,
        commands,
        reports,
        insecure: Some(insecure),
        outbound: Some(outbound),
        unsteered,
        thread: Some(thread),
    })
}

/// The call-home listener and the address that workers are told.
fn home_listener(
    home: HomeAddress,
    nonblocking: bool,
) -> Result<(TcpListener, SocketAddr), StartError> {
    let address = home.bind;
    let bound = listen(address, false, nonblocking).and_then(|listener| {
        // Accepted sockets inherit it: whom we do not know is reset, as Dynamo's frontend does.
        SockRef::from(&listener).set_linger(Some(Duration::ZERO))?;
        let port = listener.local_addr()?.port();
        Ok((listener, SocketAddr::new(home.advertise, port)))
    });
    bound.map_err(|source| StartError::Listen { address, source })
}

/// What the thread takes along.
struct Parts {
    config: ShardConfig,
    listener: Option<TcpListener>,
    stats: Arc<Stats>,
    lanes: Lanes,
    ends: Ends,
    home: Option<(TcpListener, SocketAddr)>,
    relay: Option<(TcpListener, SocketAddr)>,
}

/// Where the tasks of handlers run.
pub(crate) enum Spawner {
    /// The glommio executor that the shard itself is a task of.
    Glommio,
    /// A small executor that gets its turns between ticks.
    Local(LocalSpawner),
}

impl Spawner {
    /// For a shard without handlers: nothing is ever spawned.
    pub(crate) fn local() -> Spawner {
        Spawner::Local(LocalPool::new().spawner())
    }

    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        match self {
            Spawner::Glommio => {
                glommio::spawn_local(task).detach();
            }
            Spawner::Local(spawner) => {
                // Fails only when the pool is gone, and then the shard is as well.
                let _ = spawner.spawn_local_obj(Box::new(task).into());
            }
        }
    }
}

/// However a shard ends, its neighbours see that it takes no connections any more.
struct Ended(Arc<Stats>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.shard.draining.set(1);
    }
}

fn run(parts: Parts) {
    let _ended = Ended(Arc::clone(&parts.stats));
    let reports = parts.lanes.reports.clone();
    let result = match parts.config.ring {
        RingKind::Uring => run_uring(parts),
        RingKind::Epoll => run_epoll(parts),
    };
    let failure = result.err().map(|error| error.to_string());
    let _ = reports.send(Report::Stopped { failure });
}

fn run_epoll(parts: Parts) -> io::Result<()> {
    prefer_node(&parts.config);
    if parts.config.cpu != ANY_CPU {
        // Not being pinned costs speed and nothing else; preflight has said so.
        let _ = crate::placement::pin_current_thread(parts.config.cpu);
    }
    let buffers = buffers(&parts.config)?;
    let ring = Epoll::new(&buffers)?;
    let mut pool = LocalPool::new();
    let mut shard = parts.shard(ring, buffers, Spawner::Local(pool.spawner()));
    shard.start();
    while !shard.is_stopping() {
        shard.tick(COLD_WAIT_MAX)?;
        if shard.wants_turn() || shard.has_tasks() {
            shard.before_turn();
            pool.run_until_stalled();
            shard.after_turn();
        }
    }
    Ok(())
}

fn run_uring(parts: Parts) -> io::Result<()> {
    let cpu = parts.config.cpu;
    let placement = match cpu {
        ANY_CPU => glommio::Placement::Unbound,
        cpu => glommio::Placement::Fixed(cpu),
    };
    let executor = glommio::LocalExecutorBuilder::new(placement)
        .name("shard")
        .ring_depth(32)
        .io_memory(64 << 10)
        .make()
        .map_err(|error| io::Error::other(format!("glommio executor on CPU {cpu}: {error}")))?;
    executor.run(async move {
        prefer_node(&parts.config);
        let buffers = buffers(&parts.config)?;
        let settings = Settings {
            entries: parts.config.ring_depth,
            files: parts.config.connections_max,
        };
        let ring = Uring::new(settings, &buffers).map_err(io::Error::other)?;
        let mut shard = parts.shard(ring, buffers, Spawner::Glommio);
        shard.start();
        drive(&mut shard).await
    })
}

/// The gears.
async fn drive(shard: &mut Shard<Uring>) -> io::Result<()> {
    let executor = glommio::executor();
    let mut idle_waits = 0;
    let mut last_turn = Instant::now();
    while !shard.is_stopping() {
        if shard.tick(WARM_WAIT)? {
            idle_waits = 0;
        } else {
            idle_waits += 1;
        }
        if shard.wants_turn() || last_turn.elapsed() >= TURN_EVERY {
            shard.before_turn();
            executor.yield_now().await;
            shard.after_turn();
            last_turn = Instant::now();
        }
        if idle_waits >= COLD_AFTER && shard.may_sleep() {
            sleep(shard).await;
            // One look is enough to go cold again when it was only a timer.
            idle_waits = COLD_AFTER - 1;
        }
    }
    Ok(())
}

/// Cold: a thread of the executor's pool waits for the ring, the executor for that thread.
async fn sleep(shard: &mut Shard<Uring>) {
    let patience = shard.until_next_timer().min(COLD_WAIT_MAX);
    let Some(eventfd) = shard.ring().park() else {
        return;
    };
    shard.stats.shard.parks.add(1);
    // What completed before the ring was told to signal is not signalled: look once more.
    let looked = shard.ring().wait(Duration::ZERO);
    if looked.is_ok() && !shard.ring().is_ready() {
        glommio::executor()
            .spawn_blocking(move || wait_readable(eventfd, patience))
            .await;
    }
    shard.ring().unpark();
}

/// Waits until an eventfd is readable, and clears it.
fn wait_readable(eventfd: RawFd, patience: Duration) {
    // SAFETY: the ring owns the descriptor and outlives the wait, which its task awaits.
    let eventfd = unsafe { BorrowedFd::borrow_raw(eventfd) };
    let mut fds = [PollFd::new(&eventfd, PollFlags::IN)];
    let timeout = rustix::event::Timespec {
        tv_sec: patience.as_secs() as i64,
        tv_nsec: i64::from(patience.subsec_nanos()),
    };
    if poll(&mut fds, Some(&timeout)).is_ok_and(|ready| ready > 0) {
        let mut count = [0; 8];
        let _ = rustix::io::read(eventfd, &mut count);
    }
}

/// Memory of the shard comes from the node that it was told, if it was told one.
fn prefer_node(config: &ShardConfig) {
    if let Some(node) = config.numa_node {
        // Memory of another node costs speed and nothing else.
        let _ = crate::placement::memory::prefer_node(node);
    }
}

fn buffers(config: &ShardConfig) -> io::Result<Buffers> {
    Buffers::new(config.buffers, config.buffer_bytes as usize)
}

impl Parts {
    fn shard<R: Ring>(self, ring: R, buffers: Buffers, spawner: Spawner) -> Shard<R> {
        let client = Client::new(&self.ends, self.home);
        let worker = Worker::new(self.ends, spawner);
        let ends = (worker, client);
        let mut shard = Shard::new(
            self.config,
            ring,
            buffers,
            self.listener,
            self.stats,
            self.lanes,
            ends,
        );
        if let Some((listener, address)) = self.relay {
            shard.relay_home(listener, address);
        }
        shard
    }
}
