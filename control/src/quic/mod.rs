//! The QUIC response plane (`spec/request-plane.md` §6), on a thread of its own.
//!
//! ```text
//! shard --Outbound(pair)--> [response: messages -> frames] --> [bundle: lanes] --> caller
//! shard <--Inbound(pair)-- [taken: frames -> messages] <-- [home: lanes] <-- worker
//! ```
//!
//! The thread starts with the first response that is to leave so, or where responses may come so.

mod bundle;
mod home;
mod response;
pub mod stats;
mod taken;
mod wire;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use corelane_engine::config::ShardConfig;
use corelane_engine::ends::HomeAddress;
use corelane_engine::executor::ShardHandle;
use corelane_engine::mesh::{Receiver, Sender};
use corelane_engine::quic::{Outbound, QuicCaller, QuicHome, ResponsePlane};
use corelane_engine::shard::Command;
use thiserror::Error;
use tokio::io::unix::AsyncFd;
use tokio::sync::{OnceCell, mpsc, oneshot};
use tokio::task::{LocalSet, spawn_local};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use self::bundle::{Bundle, BundleError};
use self::home::{Door, Home};
use self::stats::Stats;
use crate::config::Responses;
use crate::cores::register;

/// What the JSON of an error says that has a type.
const TYPED_ERROR: &str = "dynamo.quic.typed_error";
/// Longest time for the nine connections of a bundle.
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// Callers' processes that are connected to at the same time.
const BUNDLES_MAX: usize = 1024;
/// A failure is logged this often at most.
const SAY_EVERY: Duration = Duration::from_secs(1);
/// For what connections have, and peers may not.
const LINGER: Duration = Duration::from_millis(50);
/// How long the end waits for what is still on its way.
const FINISH_MAX: Duration = Duration::from_secs(2);

/// Why QUIC cannot be offered.
#[derive(Debug, Error)]
pub enum QuicError {
    /// The address is taken, or not ours.
    #[error("cannot listen for QUIC on {address}: {source}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The kernel's answer.
        source: io::Error,
    },
    /// No certificate could be made.
    #[error("cannot make a certificate for QUIC: {0}")]
    Certificate(String),
    /// No thread, or no descriptor.
    #[error("cannot start QUIC: {0}")]
    Resources(#[from] io::Error),
}

/// What does QUIC for the shards of this process. Needs a `LocalSet`.
pub struct Quic {
    settings: Responses,
    active: Arc<AtomicU64>,
    stats: Arc<Stats>,
    home: Cell<Option<QuicHome>>,
    thread: RefCell<Option<Thread>>,
}

type Thread = mpsc::UnboundedSender<Message>;

/// What the thread is told.
enum Message {
    /// A shard runs.
    Attend(Attended),
    /// The process ends; to be dropped when all peers have been told.
    Leave(oneshot::Sender<()>),
}

struct Attended {
    core: usize,
    outbound: Receiver<Outbound>,
    commands: Sender<Command>,
}

impl Quic {
    /// Nothing runs yet.
    pub fn new(settings: Responses) -> Rc<Quic> {
        Rc::new(Quic {
            settings,
            active: Arc::default(),
            stats: Arc::default(),
            home: Cell::new(None),
            thread: RefCell::default(),
        })
    }

    /// What is counted.
    pub fn stats(&self) -> &Arc<Stats> {
        &self.stats
    }

    /// Has a shard speak the planes that the settings say, before it is started. `calls_home` is
    /// where workers call it home on TCP, if it makes calls: QUIC is at the same address. The
    /// first shard that needs it opens the socket of all.
    ///
    /// # Errors
    /// The address cannot be bound, or no thread can be made.
    pub fn ask(
        &self,
        config: &mut ShardConfig,
        calls_home: Option<HomeAddress>,
    ) -> Result<(), QuicError> {
        config.response_plane = self.settings.plane;
        config.relay_plane = self.settings.relay_plane;
        let waits = config.relay_home.or(calls_home);
        let on_quic = [Some(self.settings.plane), self.settings.relay_plane];
        if let Some(at) = waits.filter(|_| on_quic.contains(&Some(ResponsePlane::Quic))) {
            config.quic_home = Some(self.home(at)?);
        }
        Ok(())
    }

    /// Where responses come, from now on.
    fn home(&self, at: HomeAddress) -> Result<QuicHome, QuicError> {
        if let Some(home) = self.home.get() {
            return Ok(home);
        }
        let door = Door::open(at)?;
        let home = door.home;
        *self.thread.borrow_mut() = Some(self.start(Some(door))?);
        tracing::info!(address = %home.address, "workers may answer on QUIC");
        self.home.set(Some(home));
        Ok(home)
    }

    /// Takes the responses of a shard that was just started, from the first one on.
    pub fn attend(self: &Rc<Self>, handle: &mut ShardHandle) {
        let Some(outbound) = handle.outbound.take() else {
            return;
        };
        let attended = Attended {
            core: handle.shard,
            outbound,
            commands: handle.commands(),
        };
        if self.thread.borrow().is_some() {
            return self.tell(attended);
        }
        let wake = attended.outbound.as_fd().try_clone_to_owned();
        let wake = wake.and_then(register);
        let quic = Rc::downgrade(self);
        spawn_local(async move {
            let ready = match &wake {
                Ok(wake) => wake.readable().await.map(drop),
                Err(error) => Err(io::Error::from(error.kind())),
            };
            match (quic.upgrade(), ready) {
                (None, _) => {}
                (Some(quic), Ok(())) => quic.tell(attended),
                (_, Err(error)) => tracing::error!("cannot take responses to QUIC: {error}"),
            }
        });
    }

    /// Hands a shard to the thread, which is started when it does not run.
    fn tell(&self, attended: Attended) {
        let mut thread = self.thread.borrow_mut();
        if thread.is_none() {
            match self.start(None) {
                Ok(started) => *thread = Some(started),
                Err(error) => return tracing::error!("cannot take responses to QUIC: {error}"),
            }
        }
        let sent = thread
            .as_ref()
            .map(|thread| thread.send(Message::Attend(attended)));
        if !matches!(sent, Some(Ok(()))) {
            tracing::error!("the thread of QUIC has ended");
        }
    }

    /// Starts the thread.
    fn start(&self, door: Option<Door>) -> io::Result<Thread> {
        let (thread, messages) = mpsc::unbounded_channel();
        let pool = (Arc::clone(&self.active), Arc::clone(&self.stats));
        let settings = self.settings;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        std::thread::Builder::new()
            .name("quic".into())
            .spawn(move || {
                LocalSet::new().block_on(&runtime, run(messages, door, pool, settings));
                runtime.shutdown_background();
            })?;
        Ok(thread)
    }

    /// After the shards have stopped: waits, a short time at most, until their last bytes are on
    /// their way, and peers know that we leave.
    pub async fn finish(&self) {
        let deadline = Instant::now() + FINISH_MAX;
        while self.active.load(Relaxed) > 0 && Instant::now() < deadline {
            sleep(Duration::from_millis(2)).await;
        }
        let thread = self.thread.borrow().clone();
        if let Some(thread) = thread {
            let (done, left) = oneshot::channel();
            if thread.send(Message::Leave(done)).is_ok() {
                // It is dropped when they know.
                let _ = timeout_at(deadline, left).await;
            }
        }
    }
}

/// The thread: a task for each shard, which makes one for each response.
async fn run(
    mut messages: mpsc::UnboundedReceiver<Message>,
    door: Option<Door>,
    (active, stats): (Arc<AtomicU64>, Arc<Stats>),
    settings: Responses,
) {
    let items_max = settings.quic_buffer_items.max(1) as usize;
    let home = door.map(|door| Home::start(door, Arc::clone(&stats), items_max));
    let home = home.and_then(|home| match home {
        Ok(home) => Some(home),
        Err(error) => {
            tracing::error!("QUIC cannot take responses of workers: {error}");
            None
        }
    });
    let pool = Rc::new(Pool {
        bundles: RefCell::default(),
        batch: settings.quic_batch,
        active,
        stats,
        said: Cell::new(None),
    });
    while let Some(message) = messages.recv().await {
        match message {
            Message::Attend(attended) => attend(&pool, home.as_ref(), attended),
            Message::Leave(done) => {
                pool.leave().await;
                if let Some(home) = &home {
                    home.leave().await;
                }
                drop(done);
            }
        }
    }
}

fn attend(pool: &Rc<Pool>, home: Option<&Rc<Home>>, attended: Attended) {
    let Attended {
        core,
        outbound,
        commands,
    } = attended;
    if let Some(home) = home {
        home.attend(core, commands);
    }
    match outbound.as_fd().try_clone_to_owned().and_then(register) {
        Ok(wake) => {
            spawn_local(serve(Rc::clone(pool), outbound, wake));
        }
        Err(error) => tracing::error!(core, "cannot watch a core for QUIC: {error}"),
    }
}

async fn serve(pool: Rc<Pool>, outbound: Receiver<Outbound>, wake: AsyncFd<OwnedFd>) {
    loop {
        outbound.clear_wake();
        while let Some(outbound) = outbound.next() {
            pool.active.fetch_add(1, Relaxed);
            let pool = Rc::clone(&pool);
            spawn_local(async move {
                respond(&pool, outbound).await;
                pool.active.fetch_sub(1, Relaxed);
            });
        }
        if let Ok(mut guard) = wake.readable().await {
            guard.clear_ready();
        }
    }
}

async fn respond(pool: &Pool, outbound: Outbound) {
    let Outbound { socket, caller } = outbound;
    let pair = match response::pair(socket) {
        Ok(pair) => pair,
        Err(error) => return pool.say(&caller, &error.to_string()),
    };
    match pool.bundle(&caller).await {
        Ok(bundle) => {
            let stats = &pool.stats.worker;
            stats.responses.add();
            stats.begun.add();
            let carried = response::carry(&bundle, &caller, pair).await;
            stats.responses.take();
            if let Err(error) = carried {
                pool.say(&caller, &error.to_string());
            }
        }
        Err(error) => {
            response::give_up(pair).await;
            pool.say(&caller, &error.to_string());
        }
    }
}

type Key = (SocketAddr, [u8; 16], [u8; 32]);

/// The bundles: one for each caller's process.
struct Pool {
    bundles: RefCell<HashMap<Key, Rc<OnceCell<Rc<Bundle>>>>>,
    batch: Duration,
    active: Arc<AtomicU64>,
    stats: Arc<Stats>,
    said: Cell<Option<Instant>>,
}

impl Pool {
    /// The caller's bundle, connected when there is none; who asks meanwhile waits for the same.
    async fn bundle(&self, caller: &QuicCaller) -> Result<Rc<Bundle>, BundleError> {
        let key = (
            caller.address,
            caller.frontend_id,
            caller.certificate_sha256,
        );
        let cell = {
            let mut bundles = self.bundles.borrow_mut();
            let dead =
                |cell: &Rc<OnceCell<Rc<Bundle>>>| cell.get().is_some_and(|bundle| bundle.is_over());
            if bundles.get(&key).is_none_or(dead) {
                bundles.retain(|_, cell| !dead(cell));
                if bundles.len() >= BUNDLES_MAX {
                    self.stats.worker.turned_away.add();
                    return Err(BundleError::TooMany);
                }
            }
            Rc::clone(bundles.entry(key).or_default())
        };
        let connect = || async {
            let connect = Bundle::connect(caller, self.batch, &self.stats);
            let connected = match timeout(CONNECT_MAX, connect).await {
                Ok(bundle) => bundle,
                Err(_) => Err(BundleError::Slow),
            };
            if connected.is_err() {
                self.stats.worker.handshake_failures.add();
            }
            connected
        };
        let bundle = cell.get_or_try_init(connect).await;
        if bundle.is_err() {
            let mut bundles = self.bundles.borrow_mut();
            if bundles.get(&key).is_some_and(|cell| !cell.initialized()) {
                bundles.remove(&key);
            }
        }
        bundle.map(Rc::clone)
    }

    /// Tells all callers that we leave, once they have what is on its way.
    async fn leave(&self) {
        let bundles = self.bundles.take();
        let bundles: Vec<_> = bundles.values().filter_map(|cell| cell.get()).collect();
        let deadline = Instant::now() + FINISH_MAX / 2;
        while !bundles.iter().all(|bundle| bundle.is_quiet()) && Instant::now() < deadline {
            sleep(Duration::from_millis(2)).await;
        }
        // Nobody says what a peer has not acknowledged: it gets a little time.
        if !bundles.is_empty() {
            sleep(LINGER).await;
        }
    }

    fn say(&self, caller: &QuicCaller, why: &str) {
        let now = Instant::now();
        let last = self.said.get();
        if last.is_none_or(|last| now.duration_since(last) >= SAY_EVERY) {
            self.said.set(Some(now));
            tracing::warn!(caller = %caller.address, "a response is lost on QUIC: {why}");
        }
    }
}
