//! The QUIC response plane, worker's side (`spec/request-plane.md` §6): responses that shards write
//! into socket pairs leave as frames on the lanes of the caller's bundle.
//!
//! ```text
//! shard --Outbound(pair)--> [response: messages <-> frames] --> [bundle: lanes] --> caller
//! ```
//!
//! One thread with a runtime of its own, started by the first response that is to leave so.

mod bundle;
mod response;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use corelane_engine::executor::ShardHandle;
use corelane_engine::mesh::Receiver;
use corelane_engine::quic::{Outbound, QuicCaller};
use tokio::io::unix::AsyncFd;
use tokio::sync::{OnceCell, mpsc};
use tokio::task::{LocalSet, spawn_local};
use tokio::time::{Instant, sleep, timeout};

use self::bundle::{Bundle, BundleError};
use crate::cores::register;

/// Longest time for the nine connections of a bundle.
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// Callers' processes that are connected to at the same time.
const BUNDLES_MAX: usize = 1024;
/// A failure is logged this often at most.
const SAY_EVERY: Duration = Duration::from_secs(1);
/// How long the end waits for what is still on its way.
const FINISH_MAX: Duration = Duration::from_secs(2);

/// What does QUIC for the shards of this process. Needs a `LocalSet`.
pub struct Quic {
    batch: Duration,
    active: Arc<AtomicU64>,
    thread: RefCell<Option<Lanes>>,
}

type Lanes = mpsc::UnboundedSender<Receiver<Outbound>>;

impl Quic {
    /// Nothing runs yet. `batch` is how long bulk lanes gather items.
    pub fn new(batch: Duration) -> Rc<Quic> {
        Rc::new(Quic {
            batch,
            active: Arc::default(),
            thread: RefCell::default(),
        })
    }

    /// Takes the responses of a shard that was just started, from the first one on.
    pub fn attend(self: &Rc<Self>, handle: &mut ShardHandle) {
        let Some(outbound) = handle.outbound.take() else {
            return;
        };
        let wake = outbound.as_fd().try_clone_to_owned().and_then(register);
        let quic = Rc::downgrade(self);
        spawn_local(async move {
            let ready = match &wake {
                Ok(wake) => wake.readable().await.map(drop),
                Err(error) => Err(io::Error::from(error.kind())),
            };
            let Some(quic) = quic.upgrade() else { return };
            let given = ready.and_then(|()| quic.lanes());
            match given.map(|lanes| lanes.send(outbound).is_ok()) {
                Ok(true) => {}
                Ok(false) => tracing::error!("the thread of QUIC has ended"),
                Err(error) => tracing::error!("cannot take responses to QUIC: {error}"),
            }
        });
    }

    /// The way to the thread, which is started when it does not run.
    fn lanes(&self) -> io::Result<Lanes> {
        let mut thread = self.thread.borrow_mut();
        if let Some(lanes) = &*thread {
            return Ok(lanes.clone());
        }
        let (lanes, incoming) = mpsc::unbounded_channel();
        let (active, batch) = (Arc::clone(&self.active), self.batch);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        std::thread::Builder::new()
            .name("quic".into())
            .spawn(move || {
                LocalSet::new().block_on(&runtime, run(incoming, active, batch));
                runtime.shutdown_background();
            })?;
        *thread = Some(lanes.clone());
        Ok(lanes)
    }

    /// After the shards have stopped: waits, a short time at most, until their last bytes are on
    /// their way.
    pub async fn finish(&self) {
        let deadline = Instant::now() + FINISH_MAX;
        while self.active.load(Relaxed) > 0 && Instant::now() < deadline {
            sleep(Duration::from_millis(2)).await;
        }
    }
}

/// The thread: a task for each shard, which makes one for each response.
async fn run(
    mut lanes: mpsc::UnboundedReceiver<Receiver<Outbound>>,
    active: Arc<AtomicU64>,
    batch: Duration,
) {
    let pool = Rc::new(Pool {
        bundles: RefCell::default(),
        batch,
        active,
        said: Cell::new(None),
    });
    while let Some(outbound) = lanes.recv().await {
        match outbound.as_fd().try_clone_to_owned().and_then(register) {
            Ok(wake) => {
                spawn_local(serve(Rc::clone(&pool), outbound, wake));
            }
            Err(error) => tracing::error!("cannot watch a core for QUIC: {error}"),
        }
    }
    std::future::pending::<()>().await;
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
            if let Err(error) = response::carry(&bundle, &caller, pair).await {
                pool.say(&caller, &error.to_string());
            }
        }
        Err(error) => {
            response::give_up(pair).await;
            pool.say(&caller, &error.to_string());
        }
    }
}

type Key = (std::net::SocketAddr, [u8; 16], [u8; 32]);

/// The bundles: one for each caller's process.
struct Pool {
    bundles: RefCell<HashMap<Key, Rc<OnceCell<Rc<Bundle>>>>>,
    batch: Duration,
    active: Arc<AtomicU64>,
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
            if bundles.get(&key).is_some_and(dead) {
                bundles.remove(&key);
            }
            if bundles.len() >= BUNDLES_MAX && !bundles.contains_key(&key) {
                bundles.retain(|_, cell| !dead(cell));
                if bundles.len() >= BUNDLES_MAX {
                    return Err(BundleError::TooMany);
                }
            }
            Rc::clone(bundles.entry(key).or_default())
        };
        let connect = || async {
            match timeout(CONNECT_MAX, Bundle::connect(caller, self.batch)).await {
                Ok(bundle) => bundle,
                Err(_) => Err(BundleError::Slow),
            }
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

    fn say(&self, caller: &QuicCaller, why: &str) {
        let now = Instant::now();
        let last = self.said.get();
        if last.is_none_or(|last| now.duration_since(last) >= SAY_EVERY) {
            self.said.set(Some(now));
            tracing::warn!(caller = %caller.address, "a response is lost on QUIC: {why}");
        }
    }
}
