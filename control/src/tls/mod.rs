//! TLS of the request and response planes. Shards move plain bytes; a socket that is to speak TLS
//! comes here for its handshake and goes back as one that carries what was inside.
//!
//! ```text
//! shard --Insecure--> [thread "tls-N": handshake] --Adopt(one end of a pair)--> shard
//!                           peer ==TLS== [pump] == the other end
//! ```
//!
//! Handshakes and encryption have threads of their own: a shard never computes a cipher. Files are
//! looked at every other second, and new handshakes use what they hold; a file of no use changes
//! nothing. What is bounded: handshakes by `HANDSHAKES_MAX` and by their time, connections by
//! the tables of the shards.

pub mod material;
mod pump;
mod reason;
mod stats;
pub(crate) mod trust;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, TcpStream as StdTcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use corelane_engine::adopt::{Adoption, Insecure, Ticket};
use corelane_engine::config::ShardConfig;
use corelane_engine::executor::ShardHandle;
use corelane_engine::mesh::{Receiver, Sender};
use corelane_engine::shard::Command;
use rustls::ServerConfig;
use rustls::pki_types::ServerName;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::mpsc;
use tokio::task::{LocalSet, spawn_local};
use tokio::time::{Instant, interval, sleep, timeout};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use self::material::Dialling;
pub use self::material::Unusable;
pub use self::reason::Reason;
pub use self::stats::Stats;
use crate::config;
use crate::cores::register;

/// What is logged when a peer speaks TLS to a shard that does not.
pub const STRANGER: &str = "a peer speaks TLS where this process does not: give [tls] cert and key \
    (or ca, if it was dialled), or switch TLS off at the peer";

/// Handshakes of a thread at the same time; beyond it peers are turned away.
const HANDSHAKES_MAX: usize = 4096;
/// How long a shard's queue may be full before it is taken for dead.
const COMMAND_MAX: Duration = Duration::from_secs(60);
/// How often files are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Failures of one kind are logged this often at most; all are counted.
const SAY_EVERY: Duration = Duration::from_secs(1);
/// How long the end waits for what is still on its way.
const FINISH_MAX: Duration = Duration::from_secs(2);

/// Why TLS cannot be offered.
#[derive(Debug, Error)]
pub enum TlsError {
    /// A file cannot be used.
    #[error("[tls] {0}")]
    Unusable(#[from] Unusable),
    /// No thread, or no descriptor.
    #[error("cannot start TLS: {0}")]
    Resources(#[from] io::Error),
}

/// The threads that do TLS for the shards of this process.
pub struct Tls {
    threads: Vec<mpsc::UnboundedSender<Lane>>,
    stats: Arc<Stats>,
    next: Cell<usize>,
}

/// A shard, as a thread of ours sees it.
struct Lane {
    insecure: Receiver<Insecure>,
    commands: Sender<Command>,
}

impl Tls {
    /// Starts the threads. None when TLS is off.
    ///
    /// # Errors
    /// A file of the settings is of no use, or no thread can be made.
    pub fn start(settings: &config::Tls) -> Result<Option<Rc<Tls>>, TlsError> {
        if settings.is_off() {
            return Ok(None);
        }
        let shared = Arc::new(Shared {
            material: RwLock::new(Material::read(settings)?),
            settings: settings.clone(),
            stats: Arc::default(),
        });
        let mut threads = Vec::with_capacity(settings.threads);
        for number in 0..settings.threads.max(1) {
            let (lanes, incoming) = mpsc::unbounded_channel();
            let shared = Arc::clone(&shared);
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            std::thread::Builder::new()
                .name(format!("tls-{number}"))
                .spawn(move || {
                    let reloads = number == 0;
                    LocalSet::new().block_on(&runtime, run(shared, incoming, reloads));
                    runtime.shutdown_background();
                })?;
            threads.push(lanes);
        }
        let accepts = settings.server.is_some();
        let dials = settings.client.is_some();
        tracing::info!(accepts, dials, threads = threads.len(), "TLS is on");
        let stats = Arc::clone(&shared.stats);
        let next = Cell::new(0);
        Ok(Some(Rc::new(Tls {
            threads,
            stats,
            next,
        })))
    }

    /// Does the handshakes of a shard from now on.
    pub fn serve(&self, insecure: Receiver<Insecure>, commands: Sender<Command>) {
        let next = self.next.get();
        self.next.set(next + 1);
        let lane = Lane { insecure, commands };
        // Fails only when the thread has panicked; its handshakes then run into their time-outs.
        if self.threads[next % self.threads.len()].send(lane).is_err() {
            tracing::error!("a thread of TLS has ended");
        }
    }

    /// What is counted.
    pub fn stats(&self) -> &Arc<Stats> {
        &self.stats
    }

    /// After the shards have stopped: waits, a short time at most, until their last bytes are on
    /// their way.
    pub async fn finish(&self) {
        let deadline = Instant::now() + FINISH_MAX;
        while self.stats.pumped() > 0 && Instant::now() < deadline {
            sleep(Duration::from_millis(2)).await;
        }
    }
}

/// Sets in a shard's configuration which of its connections come here.
pub fn ask(config: &mut ShardConfig, settings: &config::Tls) {
    config.secure_accepts = settings.server.is_some();
    config.secure_dials = settings.client.is_some();
}

/// Does the handshakes of a shard that was just started, if there is TLS.
pub fn attend(tls: &Option<Rc<Tls>>, handle: &mut ShardHandle) {
    if let (Some(tls), Some(insecure)) = (tls, handle.insecure.take()) {
        tls.serve(insecure, handle.commands());
    }
}

/// What all threads share.
struct Shared {
    settings: config::Tls,
    material: RwLock<Material>,
    stats: Arc<Stats>,
}

/// What the files hold.
#[derive(Clone, Default)]
struct Material {
    server: Option<Arc<ServerConfig>>,
    client: Option<Dialling>,
}

impl Material {
    fn read(settings: &config::Tls) -> Result<Material, Unusable> {
        Ok(Material {
            server: settings.server.as_ref().map(material::server).transpose()?,
            client: settings.client.as_ref().map(material::client).transpose()?,
        })
    }
}

impl Shared {
    fn material(&self) -> Material {
        let guard = self.material.read();
        guard.unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A thread: one task for each shard, one for each connection, and on the first thread one that
/// looks at the files.
async fn run(shared: Arc<Shared>, mut lanes: mpsc::UnboundedReceiver<Lane>, reloads: bool) {
    if reloads {
        spawn_local(reload(Arc::clone(&shared)));
    }
    let log = Rc::new(Log::default());
    while let Some(lane) = lanes.recv().await {
        let wake = lane.insecure.as_fd().try_clone_to_owned();
        let wake = match wake.and_then(register) {
            Ok(wake) => wake,
            Err(error) => {
                tracing::error!("cannot watch a core for TLS: {error}");
                continue;
            }
        };
        let (shared, log) = (Arc::clone(&shared), Rc::clone(&log));
        spawn_local(serve(shared, lane, wake, log));
    }
    // Nobody is left who could want more; what is under way ends with the process.
    std::future::pending::<()>().await;
}

/// Takes over changed files. What is of no use is said once and leaves everything as it was.
async fn reload(shared: Arc<Shared>) {
    let mut seen = material::fingerprint(&shared.settings);
    let mut ticks = interval(LOOK_EVERY);
    loop {
        ticks.tick().await;
        let now = material::fingerprint(&shared.settings);
        if now == seen {
            continue;
        }
        seen = now;
        match Material::read(&shared.settings) {
            Ok(fresh) => {
                let guard = shared.material.write();
                *guard.unwrap_or_else(PoisonError::into_inner) = fresh;
                shared.stats.reloads.fetch_add(1, Relaxed);
                tracing::info!("TLS files have changed: new connections use them");
            }
            Err(error) => {
                shared.stats.reload_failures.fetch_add(1, Relaxed);
                tracing::error!("TLS files have changed and are not taken over: {error}");
            }
        }
    }
}

/// Takes the sockets of one shard.
async fn serve(
    shared: Arc<Shared>,
    lane: Lane,
    wake: tokio::io::unix::AsyncFd<OwnedFd>,
    log: Rc<Log>,
) {
    let Lane { insecure, commands } = lane;
    let commands = Rc::new(commands);
    let shaking = Rc::new(Cell::new(0));
    loop {
        insecure.clear_wake();
        while let Some(insecure) = insecure.next() {
            let connection = Connection {
                shared: Arc::clone(&shared),
                commands: Rc::clone(&commands),
                log: Rc::clone(&log),
                shaking: Rc::clone(&shaking),
            };
            spawn_local(connection.run(insecure));
        }
        if let Ok(mut guard) = wake.readable().await {
            guard.clear_ready();
        }
    }
}

/// One connection from its handshake to its end.
struct Connection {
    shared: Arc<Shared>,
    commands: Rc<Sender<Command>>,
    log: Rc<Log>,
    shaking: Rc<Cell<usize>>,
}

/// What could be shaken hands on.
trait Secured: AsyncRead + AsyncWrite {}
impl<T: AsyncRead + AsyncWrite> Secured for T {}

/// Counts as long as it lives.
struct Counted<'a>(&'a std::sync::atomic::AtomicU64);

impl<'a> Counted<'a> {
    fn new(count: &'a std::sync::atomic::AtomicU64) -> Counted<'a> {
        count.fetch_add(1, Relaxed);
        Counted(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

impl Connection {
    async fn run(self, insecure: Insecure) {
        let Insecure {
            socket,
            ticket,
            dialled,
        } = insecure;
        let patience = self.shared.settings.handshake_timeout;
        let stats = Arc::clone(&self.shared.stats);
        let socket = StdTcpStream::from(socket);
        let peer = socket.peer_addr().ok();
        let shaken = if self.shaking.get() >= HANDSHAKES_MAX {
            Err((Reason::TooMany, None))
        } else {
            let _shaking = Counted::new(&stats.shaking);
            self.shaking.set(self.shaking.get() + 1);
            let shaken = timeout(patience, self.shake(socket, dialled)).await;
            self.shaking.set(self.shaking.get() - 1);
            match shaken {
                Ok(Ok(stream)) => Ok(stream),
                Ok(Err(error)) => Err((Reason::of(&error), Some(error))),
                Err(_) => Err((Reason::Overdue, None)),
            }
        };
        let stream = match shaken {
            Ok(stream) => stream,
            Err((reason, error)) => {
                stats.failed(dialled, reason);
                self.log
                    .say(dialled, reason, peer, error.as_ref(), patience);
                let adoption = Adoption::Failed(reason.errno());
                return self.tell(Command::Adopt { ticket, adoption }).await;
            }
        };
        stats.succeeded(dialled);
        let _pumped = Counted::new(&stats.pumped);
        self.carry(stream, ticket).await;
    }

    async fn shake(&self, socket: StdTcpStream, dialled: bool) -> io::Result<Box<dyn Secured>> {
        socket.set_nonblocking(true)?;
        let material = self.shared.material();
        if !dialled {
            let config = material.server.ok_or(io::ErrorKind::Unsupported)?;
            let socket = TcpStream::from_std(socket)?;
            return Ok(Box::new(TlsAcceptor::from(config).accept(socket).await?));
        }
        let dialling = material.client.ok_or(io::ErrorKind::Unsupported)?;
        let name = match dialling.name {
            Some(name) => name,
            None => ServerName::IpAddress(socket.peer_addr()?.ip().into()),
        };
        let socket = TcpStream::from_std(socket)?;
        let connector = TlsConnector::from(dialling.config);
        Ok(Box::new(connector.connect(name, socket).await?))
    }

    /// Gives the shard its end of a pair and carries bytes until the connection is over.
    async fn carry(&self, stream: Box<dyn Secured>, ticket: Ticket) {
        let pair = StdUnixStream::pair().and_then(|(ours, theirs)| {
            ours.set_nonblocking(true)?;
            Ok((UnixStream::from_std(ours)?, theirs))
        });
        let (ours, theirs) = match pair {
            Ok(pair) => pair,
            Err(error) => {
                let errno = error.raw_os_error().unwrap_or(Reason::TooMany.errno());
                let adoption = Adoption::Failed(errno);
                return self.tell(Command::Adopt { ticket, adoption }).await;
            }
        };
        let adoption = Adoption::Socket(theirs.into());
        self.tell(Command::Adopt { ticket, adoption }).await;
        if let Some(errno) = pump::pump(Box::into_pin(stream), ours).await {
            self.tell(Command::Broken { ticket, errno }).await;
        }
    }

    /// Hands a command to the shard, although its queue is full: it counts on the answer.
    async fn tell(&self, command: Command) {
        let mut next = command;
        let until = Instant::now() + COMMAND_MAX;
        while let Err(back) = self.commands.send(next) {
            if Instant::now() >= until {
                return tracing::error!("a core takes no word about TLS: it has ended");
            }
            next = back;
            sleep(Duration::from_millis(1)).await;
        }
    }
}

/// What has been said lately.
#[derive(Default)]
struct Log {
    said: RefCell<HashMap<(bool, usize), Instant>>,
}

impl Log {
    fn say(
        &self,
        dialled: bool,
        reason: Reason,
        peer: Option<SocketAddr>,
        error: Option<&io::Error>,
        patience: Duration,
    ) {
        let now = Instant::now();
        let mut said = self.said.borrow_mut();
        let last = said.get(&(dialled, reason as usize));
        if last.is_some_and(|last| now.duration_since(*last) < SAY_EVERY) {
            return;
        }
        said.insert((dialled, reason as usize), now);
        let peer = peer.map_or_else(|| "somebody".to_owned(), |peer| peer.to_string());
        let side = if dialled { "dialled" } else { "accepted" };
        let remedy = reason.remedy(dialled, patience);
        let error = error.map(|error| format!(" ({error})")).unwrap_or_default();
        tracing::warn!(%peer, side, reason = reason.word(), "no TLS connection: {remedy}{error}");
    }
}
