//! The connections to one caller's process: eight with one bulk lane each, one with eight priority
//! lanes. What fails on one of them ends all.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use corelane_codec::quic_frame::{ALPN, Kind, LANES, SERVER_NAME, write};
use corelane_engine::quic::QuicCaller;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, Connection, Endpoint, SendStream};
use rustls::crypto::ring;
use thiserror::Error;
use tokio::sync::mpsc;
use tokio::task::spawn_local;

use super::stats::{Side, Stats};
use super::wire::{BROKEN, Lane, LaneError, send, transport};
use crate::tls::trust::Holder;

/// Frames that wait for one lane.
const BULK_QUEUE: usize = 4096;
const PRIORITY_QUEUE: usize = 512;
/// Responses for one caller's process under way.
const RESPONSES_MAX: usize = 65_536;
/// What a caller may have said to one response and it has not taken yet.
const BACK_QUEUE: usize = 16;

/// Why there is no bundle.
#[derive(Debug, Error)]
pub(super) enum BundleError {
    #[error("a UDP socket: {0}")]
    Socket(#[from] std::io::Error),
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    #[error("the connection could not be begun: {0}")]
    Connect(#[from] quinn::ConnectError),
    #[error("the connection was lost: {0}")]
    Lost(#[from] quinn::ConnectionError),
    #[error("the caller takes nothing: {0}")]
    Write(#[from] quinn::WriteError),
    #[error("the cipher suites do not fit")]
    Suites,
    #[error("not connected in time")]
    Slow,
    #[error("too many callers' processes are connected to")]
    TooMany,
    #[error("the bundle was closed")]
    Closed,
    #[error("the caller does not know this response any more")]
    Unknown,
    #[error("the response could not be read: {0}")]
    Response(&'static str),
}

/// What a caller says to one response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Back {
    Registered,
    Stop,
    Kill,
    Reset,
}

/// The connections, and who listens on them.
pub(super) struct Bundle {
    bulk: Vec<mpsc::Sender<Vec<u8>>>,
    priority: Vec<mpsc::Sender<Vec<u8>>>,
    inner: Rc<Inner>,
}

struct Inner {
    connections: RefCell<Vec<(Endpoint, Connection)>>,
    responses: RefCell<HashMap<[u8; 16], mpsc::Sender<Back>>>,
    /// All its lanes are open.
    whole: Cell<bool>,
    over: Cell<bool>,
    /// Lanes that have frames in their hands.
    busy: Cell<usize>,
    stats: Arc<Stats>,
}

impl Inner {
    /// Ends everything; every response hears of it.
    fn fail(&self, why: &str) {
        if self.over.replace(true) {
            return;
        }
        tracing::debug!("QUIC bundle of a caller closed: {why}");
        let stats = &self.stats.worker;
        if !self.responses.take().is_empty() {
            stats.broken.add();
        }
        if self.whole.get() {
            stats.bundles.take();
        }
        // Their sockets go with them.
        for (_, connection) in self.connections.take() {
            connection.close(BROKEN, why.as_bytes());
            stats.connections.take();
        }
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        self.inner.fail("no longer used");
    }
}

impl Bundle {
    /// Opens the nine connections, one after the other as Dynamo does, and their lanes.
    pub(super) async fn connect(
        caller: &QuicCaller,
        batch: Duration,
        stats: &Arc<Stats>,
    ) -> Result<Rc<Bundle>, BundleError> {
        let config = client_config(caller.certificate_sha256)?;
        let inner = Rc::new(Inner {
            connections: RefCell::default(),
            responses: RefCell::default(),
            whole: Cell::new(false),
            over: Cell::new(false),
            busy: Cell::new(0),
            stats: Arc::clone(stats),
        });
        let mut bundle = Bundle {
            bulk: Vec::with_capacity(LANES),
            priority: Vec::with_capacity(LANES),
            inner: Rc::clone(&inner),
        };
        let mut hello = Vec::new();
        write(
            Kind::Bundle,
            uuid::Uuid::new_v4().as_bytes(),
            b"",
            &mut hello,
        );
        for number in 0..=LANES {
            let connection = dial(caller.address, config.clone(), &inner).await?;
            let bulk = number < LANES;
            for _ in 0..if bulk { 1 } else { LANES } {
                let (mut to, from) = connection.open_bi().await?;
                to.write_all(&hello).await?;
                let depth = if bulk { BULK_QUEUE } else { PRIORITY_QUEUE };
                let (queue, frames) = mpsc::channel(depth);
                let batch = if bulk { batch } else { Duration::ZERO };
                spawn_local(say(to, frames, batch, Rc::clone(&inner)));
                spawn_local(listen(Lane::new(from), Rc::clone(&inner)));
                let lanes = if bulk {
                    &mut bundle.bulk
                } else {
                    &mut bundle.priority
                };
                lanes.push(queue);
            }
        }
        stats.worker.bundles.add();
        inner.whole.set(true);
        Ok(Rc::new(bundle))
    }

    pub(super) fn is_over(&self) -> bool {
        self.inner.over.get()
    }

    /// Whether all frames have been given to the connections.
    pub(super) fn is_quiet(&self) -> bool {
        let empty = |lane: &mpsc::Sender<Vec<u8>>| lane.capacity() == lane.max_capacity();
        let mut lanes = self.bulk.iter().chain(&self.priority);
        self.is_over() || self.inner.busy.get() == 0 && lanes.all(empty)
    }

    /// Listens to what is said to one response. Nothing will be said to one too many.
    pub(super) fn listen(&self, id: [u8; 16]) -> mpsc::Receiver<Back> {
        let (sender, receiver) = mpsc::channel(BACK_QUEUE);
        let mut responses = self.inner.responses.borrow_mut();
        if !self.is_over() && responses.len() < RESPONSES_MAX {
            responses.insert(id, sender);
        }
        receiver
    }

    pub(super) fn forget(&self, id: &[u8; 16]) {
        self.inner.responses.borrow_mut().remove(id);
    }

    pub(super) fn stats(&self) -> &Side {
        &self.inner.stats.worker
    }

    /// Waits until the lane of a frame of this kind has room for it. Nothing is lost when this is
    /// dropped before it is ready.
    pub(super) async fn room(
        &self,
        lane: usize,
        kind: Kind,
    ) -> Result<mpsc::Permit<'_, Vec<u8>>, BundleError> {
        let lanes = match kind {
            Kind::Data | Kind::End => &self.bulk,
            _ => &self.priority,
        };
        let room = lanes[lane % LANES].reserve().await;
        room.map_err(|_| BundleError::Closed)
    }
}

/// One connection from a UDP socket of its own.
async fn dial(
    address: SocketAddr,
    config: ClientConfig,
    inner: &Inner,
) -> Result<Connection, BundleError> {
    let any: SocketAddr = match address {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let endpoint = Endpoint::client(any)?;
    let connection = endpoint.connect_with(config, address, SERVER_NAME)?.await?;
    let entry = (endpoint, connection.clone());
    inner.connections.borrow_mut().push(entry);
    inner.stats.worker.connections.add();
    Ok(connection)
}

/// Writes one lane.
async fn say(
    mut to: SendStream,
    mut frames: mpsc::Receiver<Vec<u8>>,
    batch: Duration,
    inner: Rc<Inner>,
) {
    if let Err(error) = send(&mut to, &mut frames, batch, &inner.busy).await {
        inner.fail(&error.to_string());
    }
}

/// Hands what a caller says to the responses that it is for.
async fn listen(mut lane: Lane, inner: Rc<Inner>) {
    loop {
        let frame = match lane.next().await {
            Ok(frame) => frame,
            Err(error) => return inner.fail(&error.to_string()),
        };
        let back = match frame.kind {
            Kind::Registered => Back::Registered,
            Kind::Stop => Back::Stop,
            Kind::Kill => Back::Kill,
            Kind::Reset => Back::Reset,
            kind => return inner.fail(&LaneError::Astray(kind).to_string()),
        };
        let responses = inner.responses.borrow();
        // A response that does not listen is over or has heard as much before.
        if let Some(listener) = responses.get(&frame.id) {
            let _ = listener.try_send(back);
        }
    }
}

/// TLS that believes exactly one certificate.
fn client_config(certificate_sha256: [u8; 32]) -> Result<ClientConfig, BundleError> {
    let provider = Arc::new(ring::default_provider());
    let holder = Holder::of(certificate_sha256, &provider);
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(holder))
        .with_no_client_auth();
    tls.alpn_protocols = vec![ALPN.to_vec()];
    let tls = QuicClientConfig::try_from(tls).map_err(|_| BundleError::Suites)?;
    let mut config = ClientConfig::new(Arc::new(tls));
    config.transport_config(Arc::new(transport()));
    Ok(config)
}
