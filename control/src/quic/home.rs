//! The caller's side: workers connect to us and bring responses, of our calls and of those that we
//! relay.
//!
//! ```text
//! worker ==QUIC==> [here: connections -> bundles -> responses] --Inbound--> the core that waits
//! ```
//!
//! What fails on one lane ends its bundle, and all responses on it, as in Dynamo.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet, VecDeque};
use std::net::{SocketAddr, UdpSocket};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use corelane_codec::quic_frame::{ALPN, Kind, LANES, SERVER_NAME, write};
use corelane_engine::ends::HomeAddress;
use corelane_engine::mesh::Sender;
use corelane_engine::quic::QuicHome;
use corelane_engine::shard::Command;
use quinn::crypto::rustls::QuicServerConfig;
use quinn::{
    Connection, Endpoint, EndpointConfig, Incoming, RecvStream, SendStream, ServerConfig,
    TokioRuntime, VarInt,
};
use rustls::crypto::ring;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::sync::mpsc;
use tokio::task::spawn_local;
use tokio::time::timeout;

use super::QuicError;
use super::stats::Stats;
use super::taken::{self, Heed, Taken};
use super::wire::{BROKEN, Lane, LaneError, send, transport};
use crate::tls::trust;

/// Time for a handshake, and for the first frame of a lane.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
/// Handshakes under way; whoever comes beyond it is turned away.
const HANDSHAKES_MAX: usize = 1024;
/// From so many on a peer must show that his address is his own.
const HANDSHAKES_TRUSTED: usize = 128;
/// Connections, at most: those of 1,024 workers.
const CONNECTIONS_MAX: u64 = 1024 * CONNECTIONS_OF_BUNDLE as u64;
/// Connections and streams of one bundle.
const CONNECTIONS_OF_BUNDLE: usize = LANES + 1;
const STREAMS_OF_BUNDLE: usize = 2 * LANES;
/// What may wait to be said on one lane; a worker that takes nothing loses its bundle.
const SAID_MAX: usize = 16_384;
/// Responses of one bundle under way.
const RESPONSES_MAX: usize = 65_536;
/// Responses that are over and whose workers have been told, as far as they are remembered.
const TOLD_MAX: usize = 4096;
/// Time for the last words at the end.
const GOODBYE_MAX: Duration = Duration::from_millis(200);

/// What is needed to take responses, before a thread for it runs.
pub(super) struct Door {
    socket: UdpSocket,
    config: ServerConfig,
    /// What workers are told.
    pub(super) home: QuicHome,
}

impl Door {
    /// Binds a UDP socket, and makes a certificate for it that nobody has seen before.
    pub(super) fn open(at: HomeAddress) -> Result<Door, QuicError> {
        let failed = |source| QuicError::Bind {
            address: at.bind,
            source,
        };
        let socket = UdpSocket::bind(at.bind).map_err(failed)?;
        socket.set_nonblocking(true).map_err(failed)?;
        let port = socket.local_addr().map_err(failed)?.port();
        let certified = rcgen::generate_simple_self_signed([SERVER_NAME.to_owned()]);
        let certified = certified.map_err(|error| QuicError::Certificate(error.to_string()))?;
        let certificate = certified.cert.der().clone();
        let home = QuicHome {
            address: SocketAddr::new(at.advertise, port),
            frontend_id: *uuid::Uuid::new_v4().as_bytes(),
            certificate_sha256: trust::hash(&certificate),
        };
        let key = PrivateKeyDer::Pkcs8(certified.key_pair.serialize_der().into());
        Ok(Door {
            socket,
            config: server_config(certificate, key)?,
            home,
        })
    }
}

fn server_config(
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
) -> Result<ServerConfig, QuicError> {
    let failed = |error: rustls::Error| QuicError::Certificate(error.to_string());
    let mut tls = rustls::ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(failed)?
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .map_err(failed)?;
    tls.alpn_protocols = vec![ALPN.to_vec()];
    let tls = QuicServerConfig::try_from(tls)
        .map_err(|_| QuicError::Certificate("the cipher suites do not fit".into()))?;
    let mut config = ServerConfig::with_crypto(Arc::new(tls));
    let mut transport = transport();
    transport.max_concurrent_bidi_streams(VarInt::from_u32(LANES as u32));
    transport.max_concurrent_uni_streams(VarInt::from_u32(0));
    config.transport_config(Arc::new(transport));
    Ok(config)
}

/// What all connections share.
pub(super) struct Home {
    endpoint: Endpoint,
    /// The ways to the cores, by their index.
    cores: RefCell<HashMap<usize, Sender<Command>>>,
    bundles: RefCell<HashMap<[u8; 16], Rc<Bundle>>>,
    pub(super) stats: Arc<Stats>,
    /// Items of one response that may wait for its core.
    pub(super) items_max: usize,
    /// Bytes of all responses that wait for their cores.
    pub(super) waiting_bytes: Rc<Cell<usize>>,
    handshakes: Cell<usize>,
}

impl Home {
    /// Begins to take connections. To be called on the thread of QUIC.
    pub(super) fn start(
        door: Door,
        stats: Arc<Stats>,
        items_max: usize,
    ) -> std::io::Result<Rc<Home>> {
        let (config, server) = (EndpointConfig::default(), Some(door.config));
        let runtime = Arc::new(TokioRuntime);
        let endpoint = Endpoint::new(config, server, door.socket, runtime)?;
        let home = Rc::new(Home {
            endpoint,
            cores: RefCell::default(),
            bundles: RefCell::default(),
            stats,
            items_max,
            waiting_bytes: Rc::default(),
            handshakes: Cell::new(0),
        });
        spawn_local(accept(Rc::clone(&home)));
        Ok(home)
    }

    /// The way to a core.
    pub(super) fn core(&self, index: usize) -> Option<Sender<Command>> {
        self.cores.borrow().get(&index).cloned()
    }

    /// A core runs, for the first time or again.
    pub(super) fn attend(&self, index: usize, commands: Sender<Command>) {
        self.cores.borrow_mut().insert(index, commands);
    }

    /// Tells all workers that we leave.
    pub(super) async fn leave(&self) {
        self.endpoint
            .close(VarInt::from_u32(0), b"the process ends");
        let _ = timeout(GOODBYE_MAX, self.endpoint.wait_idle()).await;
    }

    /// The bundle of this id; `None`: there are too many.
    fn bundle(self: &Rc<Self>, id: [u8; 16]) -> Option<Rc<Bundle>> {
        let mut bundles = self.bundles.borrow_mut();
        if !bundles.contains_key(&id) {
            if bundles.len() as u64 >= CONNECTIONS_MAX {
                return None;
            }
            self.stats.caller.bundles.add();
            bundles.insert(id, Rc::new(Bundle::new(id, Rc::clone(self))));
        }
        bundles.get(&id).map(Rc::clone)
    }
}

async fn accept(home: Rc<Home>) {
    while let Some(incoming) = home.endpoint.accept().await {
        let (shaking, stats) = (home.handshakes.get(), &home.stats.caller);
        if shaking >= HANDSHAKES_MAX || stats.connections.get() >= CONNECTIONS_MAX {
            stats.turned_away.add();
            incoming.refuse();
        } else if shaking >= HANDSHAKES_TRUSTED && !incoming.remote_address_validated() {
            // It may be retried once, and is not here.
            let _ = incoming.retry();
        } else {
            home.handshakes.set(shaking + 1);
            spawn_local(serve(Rc::clone(&home), incoming));
        }
    }
}

/// One connection: its handshake, then its lanes.
async fn serve(home: Rc<Home>, incoming: Incoming) {
    let peer = incoming.remote_address();
    let shaken = async {
        let connecting = incoming.accept().map_err(|error| error.to_string())?;
        let connected = timeout(HANDSHAKE_MAX, connecting).await;
        let connected = connected.map_err(|_| format!("no handshake within {HANDSHAKE_MAX:?}"))?;
        connected.map_err(|error| error.to_string())
    };
    let shaken = shaken.await;
    home.handshakes.set(home.handshakes.get() - 1);
    let stats = &home.stats.caller;
    let connection = match shaken {
        Ok(connection) => connection,
        Err(why) => {
            stats.handshake_failures.add();
            return tracing::debug!(%peer, "no QUIC connection of a worker's: {why}");
        }
    };
    stats.connections.add();
    match timeout(HANDSHAKE_MAX, connection.accept_bi()).await {
        Ok(Ok(stream)) => {
            begin(&home, &connection, stream);
            while let Ok(stream) = connection.accept_bi().await {
                begin(&home, &connection, stream);
            }
        }
        Ok(Err(_)) => {}
        Err(_) => connection.close(BROKEN, b"no lane was opened"),
    }
    stats.connections.take();
}

fn begin(home: &Rc<Home>, connection: &Connection, (to, from): (SendStream, RecvStream)) {
    let (home, connection) = (Rc::clone(home), connection.clone());
    spawn_local(async move {
        let mut lane = Lane::new(from);
        let first = timeout(HANDSHAKE_MAX, lane.next()).await;
        let bundle = match first {
            Ok(Ok(frame)) if frame.kind == Kind::Bundle => home.bundle(frame.id),
            _ => None,
        };
        match bundle {
            Some(bundle) => bundle.serve(connection, to, lane).await,
            None => connection.close(BROKEN, b"a lane without a bundle"),
        }
    });
}

/// The connections of one worker.
pub(super) struct Bundle {
    id: [u8; 16],
    pub(super) home: Rc<Home>,
    connections: RefCell<Vec<Connection>>,
    streams: Cell<usize>,
    responses: RefCell<HashMap<[u8; 16], Taken>>,
    told: RefCell<Told>,
    over: Cell<bool>,
}

/// Responses whose workers know that they are over: of those no more is said.
#[derive(Default)]
struct Told {
    ids: HashSet<[u8; 16]>,
    order: VecDeque<[u8; 16]>,
}

impl Told {
    /// Whether it was not there before.
    fn insert(&mut self, id: [u8; 16]) -> bool {
        if !self.ids.insert(id) {
            return false;
        }
        self.order.push_back(id);
        if self.order.len() > TOLD_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.ids.remove(&oldest);
        }
        true
    }
}

impl Bundle {
    fn new(id: [u8; 16], home: Rc<Home>) -> Bundle {
        Bundle {
            id,
            home,
            connections: RefCell::default(),
            streams: Cell::new(0),
            responses: RefCell::default(),
            told: RefCell::default(),
            over: Cell::new(false),
        }
    }

    /// Ends everything; every response hears of it.
    fn fail(&self, why: &str) {
        if self.over.replace(true) {
            return;
        }
        tracing::debug!("QUIC bundle of a worker closed: {why}");
        self.home.bundles.borrow_mut().remove(&self.id);
        let stats = &self.home.stats.caller;
        stats.bundles.take();
        if !self.responses.borrow().is_empty() {
            stats.broken.add();
        }
        for connection in self.connections.take() {
            connection.close(BROKEN, why.as_bytes());
        }
        self.responses.take();
    }

    /// Takes one lane, until it fails, and the bundle with it.
    async fn serve(self: Rc<Self>, connection: Connection, to: SendStream, lane: Lane) {
        let streams = self.streams.get() + 1;
        self.streams.set(streams);
        let crowd = self.join(&connection) > CONNECTIONS_OF_BUNDLE || streams > STREAMS_OF_BUNDLE;
        if self.over.get() {
            return connection.close(BROKEN, b"the bundle is closed");
        }
        if crowd {
            return self.fail("more lanes than a bundle has");
        }
        let (said, frames) = mpsc::channel(SAID_MAX);
        spawn_local(say(Rc::clone(&self), to, frames));
        let Err(error) = self.listen(lane, Back(said)).await;
        self.fail(&error.to_string());
    }

    /// Notes whose connection it is; answers how many there are now.
    fn join(&self, connection: &Connection) -> usize {
        let mut connections = self.connections.borrow_mut();
        let same = |other: &Connection| other.stable_id() == connection.stable_id();
        if !connections.iter().any(same) {
            connections.push(connection.clone());
        }
        connections.len()
    }

    async fn listen(
        self: &Rc<Self>,
        mut lane: Lane,
        back: Back,
    ) -> Result<std::convert::Infallible, LaneError> {
        loop {
            let frame = lane.next().await?;
            let id = frame.id;
            match frame.kind {
                Kind::Bundle | Kind::Stop | Kind::Kill | Kind::Registered => {
                    return Err(LaneError::Astray(frame.kind));
                }
                Kind::Register => self.register(id, &back),
                kind => {
                    let mut responses = self.responses.borrow_mut();
                    let payload = lane.payload(&frame);
                    let taken = responses.get_mut(&id);
                    let heed = taken.map(|taken| taken.hear(kind, payload));
                    drop(responses);
                    self.heed(heed, kind, id, &back);
                }
            }
            if self.over.get() || back.is_stuck() {
                self.fail("the worker takes nothing that is said to it");
                return Err(LaneError::Ended);
            }
        }
    }

    /// What a frame meant for its response; `None`: it is for none.
    fn heed(&self, heed: Option<Heed>, kind: Kind, id: [u8; 16], back: &Back) {
        let stats = &self.home.stats.caller;
        match heed {
            Some(Heed::On) => {}
            Some(Heed::Over) => self.forget(&id),
            Some(Heed::Reset) => {
                stats.resets_received.add();
                self.forget(&id);
            }
            Some(Heed::Refused) => {
                stats.resets_sent.add();
                back.say(Kind::Reset, &id);
                self.forget(&id);
            }
            None if kind == Kind::Reset => {}
            None => self.refuse(id, back),
        }
    }

    /// A worker asks for whoever waits.
    fn register(self: &Rc<Self>, id: [u8; 16], back: &Back) {
        self.told.borrow_mut().ids.remove(&id);
        let mut responses = self.responses.borrow_mut();
        if responses.contains_key(&id) || responses.len() >= RESPONSES_MAX {
            drop(responses);
            return self.refuse(id, back);
        }
        let (taken, mailbox) = Taken::new(self.home.items_max, &self.home.waiting_bytes);
        responses.insert(id, taken);
        let (bundle, back) = (Rc::clone(self), back.clone());
        spawn_local(async move {
            let stats = &bundle.home.stats.caller;
            stats.responses.add();
            taken::carry(&bundle, id, &back, mailbox).await;
            stats.responses.take();
        });
    }

    /// Nobody waits for this response.
    pub(super) fn refuse(&self, id: [u8; 16], back: &Back) {
        self.responses.borrow_mut().remove(&id);
        if self.told.borrow_mut().insert(id) {
            self.home.stats.caller.refused.add();
            back.say(Kind::Reset, &id);
        }
    }

    /// This response is over, and its worker knows.
    pub(super) fn forget(&self, id: &[u8; 16]) {
        self.responses.borrow_mut().remove(id);
        self.told.borrow_mut().insert(*id);
    }
}

/// What goes back on the lane that a worker has registered on.
#[derive(Clone)]
pub(super) struct Back(mpsc::Sender<Vec<u8>>);

impl Back {
    pub(super) fn say(&self, kind: Kind, id: &[u8; 16]) {
        let mut frame = Vec::new();
        write(kind, id, b"", &mut frame);
        // When it is full the bundle ends.
        let _ = self.0.try_send(frame);
    }

    fn is_stuck(&self) -> bool {
        self.0.capacity() == 0
    }
}

async fn say(bundle: Rc<Bundle>, mut to: SendStream, mut frames: mpsc::Receiver<Vec<u8>>) {
    let busy = Cell::new(0);
    if let Err(error) = send(&mut to, &mut frames, Duration::ZERO, &busy).await {
        bundle.fail(&error.to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_responses_are_remembered_as_told() {
        let mut told = Told::default();
        let id = |number: usize| (number as u128).to_be_bytes();
        for number in 0..2 * TOLD_MAX {
            assert!(told.insert(id(number)));
            assert!(!told.insert(id(number)));
        }
        assert_eq!((told.ids.len(), told.order.len()), (TOLD_MAX, TOLD_MAX));
        assert!(told.insert(id(0)) && !told.insert(id(2 * TOLD_MAX - 1)));
    }
}
