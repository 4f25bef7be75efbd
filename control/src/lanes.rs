//! Workers of this host that attach for shared-memory lanes: a Unix socket for each route that has
//! one, who may connect there, and what each core and the board are told of them.
//!
//! ```text
//! worker --connect, hello--> here: uid checked, memory made
//! worker <--offer, 4 descriptors for each core-- here
//!                             |--> shards: a lane each
//!                             '--> board: an instance of the route
//! ```
//!
//! The socket stays open as long as the worker lives. Its end, or a lie that a core has found out,
//! ends all lanes of the worker.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, VecDeque};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result};
use corelane_codec::control_message::PayloadCodec;
use corelane_engine::lane::{LANES_MAX, NewLane};
use corelane_engine::shard::Command;
use corelane_gpu_mem::lane::attach::{LaneFds, LaneSize, refusal};
use corelane_gpu_mem::lane::layout::{Codec, Hello, MAGIC, RECORD_BYTES, VERSION};
use corelane_gpu_mem::server::listener::Listener;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::{AbortHandle, spawn_local};
use tokio::time::{sleep, timeout};
use zerocopy::FromBytes;

use crate::config::{self, RouteLane};
use crate::cores::Cores;
use crate::publish::Board;
use crate::watch::Instance;

/// Descriptors in each queue of a lane.
const ENTRIES: u32 = 2048;
/// A worker has so long to say hello.
const HELLO_MAX: Duration = Duration::from_secs(5);
/// Pause after an accept that failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Connections that have not said hello, at most.
const GREETING_MAX: usize = 64;

/// The lane sockets of all routes. Dropped, it takes them away; workers that are attached stay
/// until their cores stop.
pub struct LaneSockets {
    tasks: Vec<AbortHandle>,
    _listeners: Vec<Listener>,
}

struct Hub {
    cores: Rc<Cores>,
    board: Rc<Board>,
    /// Ids of attached workers.
    workers: RefCell<BTreeSet<u64>>,
    greeting: Cell<usize>,
    next: Cell<u64>,
}

impl LaneSockets {
    /// Listens for the workers of all routes that have a lane. Needs a `LocalSet`.
    ///
    /// # Errors
    /// A socket cannot be made where it should lie, or a living router has it.
    pub fn listen(routes: &[config::Route], cores: &Rc<Cores>, board: &Rc<Board>) -> Result<Self> {
        let hub = Rc::new(Hub {
            cores: Rc::clone(cores),
            board: Rc::clone(board),
            workers: RefCell::default(),
            greeting: Cell::new(0),
            next: Cell::new(u64::from(std::process::id()) << 32 | 1),
        });
        let (mut tasks, mut listeners) = (Vec::new(), Vec::new());
        for (index, route) in routes.iter().enumerate() {
            let Some(lane) = &route.lane else { continue };
            let (listener, kept) = bind(lane)
                .with_context(|| format!("cannot listen for the workers of {}", route.listen))?;
            tracing::info!(
                listen = %route.listen, socket = %lane.socket.display(),
                "waiting for workers with lanes"
            );
            listeners.push(kept);
            let (hub, lane) = (Rc::clone(&hub), lane.clone());
            let task = spawn_local(async move { hub.accept(index, lane, listener).await });
            tasks.push(task.abort_handle());
        }
        Ok(Self {
            tasks,
            _listeners: listeners,
        })
    }
}

impl Drop for LaneSockets {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// A socket for its owner alone, unless further users are named: then for all, as the peer's uid
/// is looked at in any case.
fn bind(lane: &RouteLane) -> Result<(UnixListener, Listener)> {
    let kept = Listener::bind(&lane.socket, !lane.uids.is_empty())?;
    let socket: OwnedFd = kept.socket.try_clone()?;
    let listener = UnixListener::from_std(socket.into())?;
    Ok((listener, kept))
}

impl Hub {
    async fn accept(self: Rc<Self>, route: usize, lane: RouteLane, listener: UnixListener) {
        loop {
            let Ok((socket, _)) = listener.accept().await else {
                sleep(ACCEPT_PAUSE).await;
                continue;
            };
            if self.greeting.get() >= GREETING_MAX {
                tracing::warn!("too many workers attach at once; one has to come again");
                continue;
            }
            self.greeting.set(self.greeting.get() + 1);
            let (hub, lane) = (Rc::clone(&self), lane.clone());
            spawn_local(async move {
                let greeted = hub.greet(route, &lane, socket).await;
                hub.greeting.set(hub.greeting.get() - 1);
                if let Some((socket, worker)) = greeted {
                    hub.keep(route, socket, worker).await;
                }
            });
        }
    }

    /// Checks who connects and gives him his lanes.
    async fn greet(
        &self,
        route: usize,
        lane: &RouteLane,
        mut socket: UnixStream,
    ) -> Option<(UnixStream, u64)> {
        let path = &lane.socket;
        let hello = match self.check(lane, &mut socket).await {
            Ok(hello) => hello,
            Err(why) => {
                tracing::warn!(socket = %path.display(), why, "a worker was refused");
                // One that is gone does not hear it.
                let _ = socket.write_all(&refusal(&why)).await;
                return None;
            }
        };
        let worker = match hello.worker.get() {
            0 => self.next.replace(self.next.get() + 1),
            id => id,
        };
        self.workers.borrow_mut().insert(worker);
        let node = hello.numa_node();
        if let Err(error) = self.attach(route, lane, worker, node, &socket).await {
            tracing::warn!(socket = %path.display(), %error, "a worker could not be attached");
            self.cores.tell(|| Command::EndLanes { worker }).await;
            self.workers.borrow_mut().remove(&worker);
            return None;
        }
        let codec = match Codec::of(hello.codec) {
            Some(Codec::MessagePack) => PayloadCodec::MessagePack,
            _ => PayloadCodec::Json,
        };
        self.board
            .lane_attached(route, instance(worker, path, codec));
        Some((socket, worker))
    }

    async fn check(&self, lane: &RouteLane, socket: &mut UnixStream) -> Result<Hello, String> {
        let peer = socket.peer_cred().map_err(|error| error.to_string())?;
        let ours = rustix::process::geteuid().as_raw();
        let uid = peer.uid();
        if uid != ours && uid != 0 && !lane.uids.contains(&uid) {
            return Err(format!("user {uid} is not in lane_uids"));
        }
        let mut hello = [0; RECORD_BYTES];
        let read = timeout(HELLO_MAX, socket.read_exact(&mut hello)).await;
        let read = read.map_err(|_| "no hello in time".to_owned())?;
        read.map_err(|error| error.to_string())?;
        let hello = Hello::read_from_bytes(&hello).map_err(|error| error.to_string())?;
        if hello.magic.get() != MAGIC || hello.version.get() != VERSION {
            return Err(format!("this router speaks version {VERSION} of lanes"));
        }
        if self.workers.borrow().contains(&hello.worker.get()) {
            return Err("a worker with this id is attached".into());
        }
        if self.workers.borrow().len() >= LANES_MAX {
            return Err(format!("{LANES_MAX} workers are attached already"));
        }
        Ok(hello)
    }

    /// Makes the lanes of a worker, offers them, and tells the cores.
    async fn attach(
        &self,
        route: usize,
        lane: &RouteLane,
        worker: u64,
        numa_node: Option<u32>,
        socket: &UnixStream,
    ) -> Result<()> {
        let size = LaneSize {
            entries: ENTRIES,
            slab_bytes: lane.bytes,
        };
        let cores = self.cores.count();
        let mut lanes = VecDeque::with_capacity(cores);
        for core in 0..cores {
            let head = size.head(core as u32, cores as u32, worker);
            let fds = LaneFds::create(&head)?;
            if let Some(node) = numa_node
                && let Err(error) = fds.prefer_node(&head, node)
            {
                tracing::warn!(worker, core, node, %error, "a slab is not near its GPU");
            }
            fds.offer(socket, &head)?;
            lanes.push_back(Box::new(NewLane::new(route as u32, &head, fds)?));
        }
        let lanes = RefCell::new(lanes);
        let next = |_| match lanes.borrow_mut().pop_front() {
            Some(lane) => Command::Lane(lane),
            None => Command::EndLanes { worker },
        };
        self.cores.tell_each(next).await;
        Ok(())
    }

    /// Waits for the end of a worker.
    async fn keep(&self, route: usize, mut socket: UnixStream, worker: u64) {
        let pid = socket.peer_cred().ok().and_then(|peer| peer.pid());
        tracing::info!(worker, pid, "a worker has attached its lanes");
        let mut faults = self.cores.lane_faults();
        let fault = async {
            loop {
                match faults.recv().await {
                    Ok((of, why)) if of == worker => return why,
                    Ok(_) | Err(tokio::sync::broadcast::error::RecvError::Lagged(_)) => {}
                    Err(_) => std::future::pending().await,
                }
            }
        };
        let mut byte = [0];
        tokio::select! {
            // It has nothing to say, so whatever comes is its end.
            _ = socket.read(&mut byte) => {
                tracing::info!(worker, pid, "a worker with lanes is gone");
            }
            why = fault => {
                tracing::warn!(worker, pid, why, "a worker has lost its lanes");
            }
        }
        self.board.lane_detached(route, worker);
        self.cores.tell(|| Command::EndLanes { worker }).await;
        self.workers.borrow_mut().remove(&worker);
    }
}

/// How discovery's side of the house sees a worker: nobody dials it.
fn instance(worker: u64, path: &Path, codec: PayloadCodec) -> Instance {
    Instance {
        id: worker,
        address: ([0, 0, 0, 0], 0).into(),
        path: path.as_os_str().as_encoded_bytes().to_vec(),
        codec,
        device: None,
    }
}
