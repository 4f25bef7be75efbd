//! TLS of the request and response planes. Shards move plain bytes; a socket that is to speak TLS
//! comes here for its handshake and goes back as one that carries what was inside.
//!
//! ```text
//! shard --Handshake--> [thread "tls-N": handshake] --Adopt(the same)--> shard ==TLS, kernel== peer
//!                                                '--Adopt(one end of a pair)--> shard
//!                           peer ==TLS== [pump] == the other end
//! ```
//!
//! The kernel encrypts where it can ([`kernel`]). Otherwise encryption has the threads of the
//! handshakes, and a shard never computes a cipher. Files are
//! looked at every other second, and new handshakes use what they hold; a file of no use changes
//! nothing. What is bounded: handshakes by `HANDSHAKES_MAX` and by their time, connections by
//! the tables of the shards.

mod cork;
pub mod kernel;
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

use corelane_engine::adopt::{Adoption, Errand, Insecure, Ticket};
use corelane_engine::config::ShardConfig;
use corelane_engine::executor::ShardHandle;
use corelane_engine::mesh::{Receiver, Sender};
use corelane_engine::shard::Command;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustls::ServerConfig;
use rustls::pki_types::ServerName;
use thiserror::Error;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::mpsc;
use tokio::task::{LocalSet, spawn_local};
use tokio::time::{Instant, interval, sleep, timeout};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use self::cork::{Corked, Gate};
use self::kernel::{Kernel, Unavailable};
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
    /// The kernel is to encrypt, and cannot.
    #[error("[tls] kernel is required: {0}")]
    Kernel(Unavailable),
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
    insecure: Receiver<Errand>,
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
        let kernel = Kernel::of(settings);
        let shared = Arc::new(Shared {
            material: RwLock::new(Material::read(settings)?),
            kernel: said(kernel, settings.kernel)?,
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
    pub fn serve(&self, insecure: Receiver<Errand>, commands: Sender<Command>) {
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
        loop {
            // First of all, that what the shards have handed out last is taken.
            sleep(Duration::from_millis(2)).await;
            let busy = self.stats.pumped() + self.stats.parting.load(Relaxed) > 0;
            if !busy || Instant::now() >= deadline {
                return;
            }
        }
    }
}

/// Logs who encrypts.
fn said(
    kernel: Result<Kernel, Unavailable>,
    wish: config::KernelTls,
) -> Result<Option<Kernel>, TlsError> {
    match kernel {
        Ok(kernel) => {
            tracing::info!("TLS: the kernel encrypts");
            Ok(Some(kernel))
        }
        Err(why) if wish == config::KernelTls::Required => Err(TlsError::Kernel(why)),
        Err(why) => {
            tracing::info!("TLS: threads of this process encrypt: {why}");
            Ok(None)
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
    /// None: the kernel encrypts nothing.
    kernel: Option<Kernel>,
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
        while let Some(errand) = insecure.next() {
            let insecure = match errand {
                Errand::Handshake(insecure) => insecure,
                Errand::Farewell(socket) => {
                    let stats = Arc::clone(&shared.stats);
                    spawn_local(async move {
                        let _parting = Counted::new(&stats.parting);
                        kernel::part(socket).await;
                    });
                    continue;
                }
            };
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

/// A connection whose hands are shaken.
struct Shaken {
    stream: TlsStream<Corked<TcpStream>>,
    gate: Rc<Gate>,
    /// The flags that the shard had given its socket.
    flags: OFlags,
}

/// Who carries the bytes of a connection from now on.
enum Carrier {
    Kernel,
    Pump(Box<TlsStream<Corked<TcpStream>>>),
}

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
        let carrier = shaken.and_then(|shaken| {
            let carrier = self.carrier(shaken);
            carrier.map_err(|error| (Reason::Kernel, Some(error)))
        });
        let carrier = match carrier {
            Ok(carrier) => carrier,
            Err((reason, error)) => {
                stats.failed(dialled, reason);
                self.log
                    .say(dialled, reason, peer, error.as_ref(), patience);
                let adoption = Adoption::Failed(reason.errno());
                return self.tell(Command::Adopt { ticket, adoption }).await;
            }
        };
        stats.succeeded(dialled);
        match carrier {
            Carrier::Kernel => {
                stats.carried(true);
                let adoption = Adoption::Same;
                self.tell(Command::Adopt { ticket, adoption }).await;
            }
            Carrier::Pump(stream) => {
                stats.carried(false);
                let _pumped = Counted::new(&stats.pumped);
                self.carry(*stream, ticket).await;
            }
        }
    }

    async fn shake(&self, socket: StdTcpStream, dialled: bool) -> io::Result<Shaken> {
        let flags = fcntl_getfl(&socket)?;
        socket.set_nonblocking(true)?;
        let material = self.shared.material();
        let gate = Rc::new(Gate::default());
        if self.shared.kernel.is_none() {
            gate.open();
        }
        let address = socket.peer_addr()?.ip();
        let socket = Corked::new(TcpStream::from_std(socket)?, Rc::clone(&gate));
        let mut stream: TlsStream<_> = if !dialled {
            let config = material.server.ok_or(io::ErrorKind::Unsupported)?;
            let accept = TlsAcceptor::from(config).accept(socket);
            cork::exactly(&gate, accept).await?.into()
        } else {
            let dialling = material.client.ok_or(io::ErrorKind::Unsupported)?;
            let name = dialling
                .name
                .unwrap_or(ServerName::IpAddress(address.into()));
            let connect = TlsConnector::from(dialling.config).connect(name, socket);
            cork::exactly(&gate, connect).await?.into()
        };
        stream.flush().await?;
        Ok(Shaken {
            stream,
            gate,
            flags,
        })
    }

    /// Hands the connection to the kernel if it can do with it.
    fn carrier(&self, shaken: Shaken) -> io::Result<Carrier> {
        let Shaken {
            stream,
            gate,
            flags,
        } = shaken;
        let session = stream.get_ref().1;
        let kernel = self.shared.kernel.as_ref();
        let stream = match kernel.and_then(|kernel| kernel.fits(session)) {
            Some(fits) => match kernel::hand_over(stream, fits) {
                Ok(socket) => {
                    // They are shared with the socket of the shard.
                    fcntl_setfl(&socket?, flags)?;
                    return Ok(Carrier::Kernel);
                }
                Err(stream) => stream,
            },
            None => Box::new(stream),
        };
        gate.open();
        Ok(Carrier::Pump(stream))
    }

    /// Gives the shard its end of a pair and carries bytes until the connection is over.
    async fn carry(&self, stream: TlsStream<Corked<TcpStream>>, ticket: Ticket) {
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
        if let Some(errno) = pump::pump(stream, ours).await {
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
