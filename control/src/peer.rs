//! One shard of our own for `corelane worker echo` and `corelane call`: started on the ring that
//! this host allows, told and heard without waiting for it.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use corelane_engine::client::CallEvent;
use corelane_engine::config::{ANY_CPU, RingKind, ShardConfig};
use corelane_engine::ends::Ends;
use corelane_engine::executor::{ShardHandle, spawn_with};
use corelane_engine::preflight as host;
use corelane_engine::shard::{Command, Report};
use corelane_engine::stats::Stats;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep, timeout_at};

use crate::cli::Stop;
use crate::config::Server;
use crate::cores::{CoreView, register};
use crate::env::Env;
use crate::preflight::ring_word;
use crate::quic::Quic;
use crate::tls::{self, Tls};
use crate::trace;

/// Longest wait until the shard listens.
const START_MAX: Duration = Duration::from_secs(30);
/// Longest wait for room in the shard's queue.
const COMMAND_MAX: Duration = Duration::from_secs(5);
/// Longest wait for the end of a shard that was told to stop.
const STOP_MAX: Duration = Duration::from_secs(5);
/// Receive buffers: a peer needs fewer than a router.
const BUFFERS: u16 = 1024;

/// A running shard that is nobody's router.
pub struct Peer {
    handle: RefCell<ShardHandle>,
    reports: AsyncFd<OwnedFd>,
    events: AsyncFd<OwnedFd>,
    ring: RingKind,
    cause: &'static str,
    tls: Option<Rc<Tls>>,
    quic: Rc<Quic>,
}

impl Peer {
    /// Starts the shard and waits until it runs. `ends` says what it is to do; it is asked again
    /// when io_uring fails at start and epoll takes its place.
    ///
    /// # Errors
    /// The address is taken, io_uring is required and refused, or the host lacks something.
    pub async fn start(
        server: &Server,
        listen: Option<SocketAddr>,
        ends: impl Fn() -> Ends,
    ) -> Result<Peer> {
        host::raise_limits();
        let (ring, cause, required) = ring()?;
        let mut config = ShardConfig::new(0, ANY_CPU, ring, listen);
        config.buffers = BUFFERS;
        config.message_bytes_max = u64::from(server.message_bytes_max);
        tls::kernel::demanded(&server.tls).map_err(Stop::HostCannot)?;
        tls::ask(&mut config, &server.tls);
        let tls = Tls::start(&server.tls)?;
        let quic = Quic::new(server.responses);
        match Peer::on_ring(
            config.clone(),
            cause,
            ends(),
            (tls.clone(), Rc::clone(&quic)),
        )
        .await
        {
            Err(error) if ring == RingKind::Uring && !required => {
                tracing::warn!("ring epoll: io_uring did not start here: {error:#}");
                config.ring = RingKind::Epoll;
                Peer::on_ring(config, "start_failed", ends(), (tls, quic)).await
            }
            other => other,
        }
    }

    async fn on_ring(
        mut config: ShardConfig,
        cause: &'static str,
        ends: Ends,
        (tls, quic): (Option<Rc<Tls>>, Rc<Quic>),
    ) -> Result<Peer> {
        let ring = config.ring;
        let tracing = trace::tracing();
        let ends = Ends { tracing, ..ends };
        quic.ask(&mut config, ends.home)?;
        let mut handle = spawn_with(config, ends)?;
        tls::attend(&tls, &mut handle);
        quic.attend(&mut handle);
        let watch = |fd: std::os::fd::BorrowedFd<'_>| register(fd.try_clone_to_owned()?);
        let peer = Peer {
            reports: watch(handle.reports.as_fd()).context("cannot watch the shard")?,
            events: watch(handle.events.as_fd()).context("cannot watch the shard")?,
            handle: RefCell::new(handle),
            ring,
            cause,
            tls,
            quic,
        };
        let deadline = Instant::now() + START_MAX;
        match timeout_at(deadline, peer.report()).await {
            Ok(Report::Started { .. }) => Ok(peer),
            Ok(Report::Stopped { failure }) => {
                bail!(
                    "{}",
                    failure.unwrap_or_else(|| "the shard ended at once".into())
                )
            }
            Ok(
                Report::Undecodable { .. }
                | Report::LaneEnded { .. }
                | Report::Stranger
                | Report::Span(_),
            ) => Ok(peer),
            Err(_) => bail!("the shard does not run after {START_MAX:?}"),
        }
    }

    /// Where it listens for requests.
    pub fn address(&self) -> Option<SocketAddr> {
        self.handle.borrow().address
    }

    /// Its counters.
    pub fn stats(&self) -> Arc<Stats> {
        Arc::clone(&self.handle.borrow().stats)
    }

    /// The shard as metrics show it.
    pub fn view(&self) -> CoreView {
        CoreView {
            shard: 0,
            cpu: ANY_CPU,
            ring: ring_word(self.ring),
            cause: self.cause,
            stats: self.stats(),
        }
    }

    /// Adds what is counted of TLS and QUIC to the text of a scrape.
    pub fn write_transports(&self, out: &mut String) {
        if let Some(tls) = &self.tls {
            tls.stats().write(out);
        }
        self.quic.stats().write(out);
    }

    /// Hands a command over; waits a little while its queue is full.
    ///
    /// # Errors
    /// The shard has ended, or takes no commands.
    pub async fn command(&self, command: Command) -> Result<()> {
        let deadline = Instant::now() + COMMAND_MAX;
        let mut next = command;
        loop {
            match self.handle.borrow().command(next) {
                Ok(()) => return Ok(()),
                Err(back) => next = back,
            }
            if self.handle.borrow().is_finished() || Instant::now() >= deadline {
                bail!("the shard takes no commands");
            }
            sleep(Duration::from_millis(1)).await;
        }
    }

    /// Waits for the next thing that it reports.
    async fn report(&self) -> Report {
        loop {
            self.handle.borrow().reports.clear_wake();
            if let Some(report) = self.handle.borrow().reports.next() {
                return report;
            }
            if let Ok(mut guard) = self.reports.readable().await {
                guard.clear_ready();
            }
        }
    }

    /// Logs what it reports until it ends; answers why.
    pub async fn ended(&self) -> String {
        loop {
            match self.report().await {
                Report::Started { .. } | Report::LaneEnded { .. } => {}
                Report::Undecodable { why } => {
                    tracing::warn!(why, "a request cannot be decoded");
                }
                Report::Stranger => tracing::warn!("{}", tls::STRANGER),
                Report::Span(span) => trace::tell(*span),
                Report::Stopped { failure } => {
                    return failure.unwrap_or_else(|| "without a reason".into());
                }
            }
        }
    }

    /// The next event of a call, if there is one.
    pub fn next_event(&self) -> Option<CallEvent> {
        self.handle.borrow().events.next()
    }

    /// Waits for the next event of a call.
    pub async fn event(&self) -> CallEvent {
        loop {
            self.handle.borrow().events.clear_wake();
            if let Some(event) = self.handle.borrow().events.next() {
                return event;
            }
            if let Ok(mut guard) = self.events.readable().await {
                guard.clear_ready();
            }
        }
    }

    /// Stops the shard and waits for its thread, a few seconds at most.
    pub async fn stop(&self) {
        if self.command(Command::Stop).await.is_err() {
            return;
        }
        let deadline = Instant::now() + STOP_MAX;
        while !self.handle.borrow().is_finished() {
            if Instant::now() >= deadline {
                return tracing::error!("the shard has not stopped after {STOP_MAX:?}");
            }
            sleep(Duration::from_millis(1)).await;
        }
        self.handle.borrow_mut().join();
        if let Some(tls) = &self.tls {
            tls.finish().await;
        }
        self.quic.finish().await;
    }
}

/// The ring that `CORELANE_IO` and this host allow, why, and whether it must be that one.
pub(crate) fn ring() -> Result<(RingKind, &'static str, bool), Stop> {
    let env = Env::current();
    let io = match env.get("CORELANE_IO") {
        Some(text) => text
            .parse::<host::Io>()
            .map_err(|error| Stop::Usage(error.to_string()))?,
        None => host::Io::Auto,
    };
    let choice = host::choose(io, &host::probe());
    let choice = choice.map_err(|refused| Stop::HostCannot(refused.to_string()))?;
    tracing::info!("ring {}", choice.explain);
    let required = io == host::Io::Uring;
    Ok((choice.ring, choice.cause.word(), required))
}
