//! A service that runs on a thread of its own, seen from others.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use super::{PoolConfig, Server, ServerConfig, ServerError};
use crate::domain::Domain;
use crate::history::Audit;
use crate::lock::{Profile, State};
use crate::stats::{Counter, Stats};

/// How one pool stands, for metrics. Numbers are of one moment each, not of the same one.
#[derive(Debug)]
pub struct PoolGauges {
    /// The pool's word.
    pub tag: String,
    /// The GPU.
    pub gpu_uuid: String,
    /// Where it listens.
    pub path: PathBuf,
    /// Which generation it speaks.
    pub profile: Profile,
    /// Where its memory comes from.
    pub backend: &'static str,
    stats: Arc<Stats>,
    writer_pid: AtomicU64,
    state: AtomicU64,
    readers: AtomicU64,
    waiters: AtomicU64,
    waiting_writers: AtomicU64,
    allocations: AtomicU64,
    bytes: AtomicU64,
}

impl PoolGauges {
    pub(super) fn new(pool: &PoolConfig) -> PoolGauges {
        PoolGauges {
            tag: pool.domain.tag.clone(),
            gpu_uuid: pool.domain.gpu_uuid.clone(),
            path: pool.path.clone(),
            profile: pool.domain.policy.profile,
            backend: pool.backend.name(),
            stats: Arc::default(),
            writer_pid: AtomicU64::new(0),
            state: AtomicU64::new(0),
            readers: AtomicU64::new(0),
            waiters: AtomicU64::new(0),
            waiting_writers: AtomicU64::new(0),
            allocations: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        }
    }

    pub(super) fn set(&self, domain: &Domain) {
        let standing = domain.standing();
        let (allocations, bytes) = domain.usage();
        let state = State::ALL
            .iter()
            .position(|state| *state == standing.state)
            .unwrap_or_default();
        let writer_pid = domain.writer().map_or(0, |peer| peer.pid);
        // Readers need no order between these: each is a gauge of its own.
        self.writer_pid.store(writer_pid.into(), Ordering::Relaxed);
        self.state.store(state as u64, Ordering::Relaxed);
        self.readers
            .store(standing.readers as u64, Ordering::Relaxed);
        self.waiters
            .store(standing.waiters as u64, Ordering::Relaxed);
        self.waiting_writers
            .store(standing.waiting_writers as u64, Ordering::Relaxed);
        self.allocations.store(allocations, Ordering::Relaxed);
        self.bytes.store(bytes, Ordering::Relaxed);
    }

    /// The derived state.
    pub fn state(&self) -> State {
        let index = self.state.load(Ordering::Relaxed) as usize;
        State::ALL.get(index).copied().unwrap_or(State::Empty)
    }

    /// How often something has happened to this pool.
    pub fn count(&self, counter: Counter) -> u64 {
        self.stats.get(counter)
    }

    pub(super) fn stats(&self) -> &Arc<Stats> {
        &self.stats
    }

    /// The process that holds the lock for writing; 0 is nobody, or one in another namespace.
    pub fn writer_pid(&self) -> u64 {
        self.writer_pid.load(Ordering::Relaxed)
    }

    /// How many readers are connected.
    pub fn readers(&self) -> u64 {
        self.readers.load(Ordering::Relaxed)
    }

    /// How many clients wait.
    pub fn waiters(&self) -> u64 {
        self.waiters.load(Ordering::Relaxed)
    }

    /// How many of them keep new readers out.
    pub fn waiting_writers(&self) -> u64 {
        self.waiting_writers.load(Ordering::Relaxed)
    }

    /// How many allocations there are.
    pub fn allocations(&self) -> u64 {
        self.allocations.load(Ordering::Relaxed)
    }

    /// Their bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

/// A running service. Dropping it stops the service.
pub struct ServerHandle {
    stop: Arc<AtomicBool>,
    finished: Arc<AtomicBool>,
    wake: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
    gauges: Arc<[PoolGauges]>,
    audit: Audit,
}

impl Server {
    /// Binds all sockets and serves on a new thread.
    ///
    /// # Errors
    /// As [`Server::bind`], or there is no thread.
    pub fn start(config: ServerConfig) -> Result<ServerHandle, ServerError> {
        let server = Server::bind(config)?;
        let mut handle = server.handle();
        let thread = thread::Builder::new()
            .name("gpu-mem".into())
            .spawn(move || server.run())
            .map_err(|source| ServerError::Os {
                what: "starting a thread",
                source,
            })?;
        handle.thread = Some(thread);
        Ok(handle)
    }

    /// What other threads see of it; for a caller that calls [`Server::run`] itself.
    pub fn handle(&self) -> ServerHandle {
        ServerHandle {
            stop: Arc::clone(&self.stop),
            finished: Arc::clone(&self.finished),
            wake: Arc::clone(&self.wake),
            thread: None,
            gauges: Arc::clone(&self.gauges),
            audit: self.audit.clone(),
        }
    }
}

impl ServerHandle {
    /// Tells the service to stop and waits until it has.
    pub fn stop(&mut self) {
        self.tell_to_stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }

    /// Tells the service to stop and does not wait.
    pub fn tell_to_stop(&self) {
        self.stop.store(true, Ordering::Release);
        // The counter of an eventfd cannot overflow here.
        let _ = rustix::io::write(&*self.wake, &1_u64.to_ne_bytes());
    }

    /// Whether the service has ended, by itself or because it was told to.
    pub fn is_finished(&self) -> bool {
        let ended = self.thread.as_ref().is_some_and(JoinHandle::is_finished);
        ended || self.finished.load(Ordering::Acquire)
    }

    /// How the pools stand, in the order of the config.
    pub fn pools(&self) -> &[PoolGauges] {
        &self.gauges
    }

    /// How often something has happened, over all pools.
    pub fn count(&self, counter: Counter) -> u64 {
        self.gauges.iter().map(|pool| pool.count(counter)).sum()
    }

    /// The full record of who did what.
    pub fn audit(&self) -> &Audit {
        &self.audit
    }
}

impl Drop for ServerHandle {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.stop();
        }
    }
}
