//! The connections to one caller's process: eight with one bulk lane each, one with eight priority
//! lanes. What fails on one of them ends all.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use corelane_codec::Decoded;
use corelane_codec::quic_frame::{
    self, ALPN, Kind, LANES, PAYLOAD_BYTES_MAX, SERVER_NAME, decode, write,
};
use corelane_engine::quic::QuicCaller;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, Connection, Endpoint, RecvStream, SendStream, TransportConfig, VarInt};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, ring};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, SignatureScheme};
use sha2::{Digest, Sha256};
use thiserror::Error;
use tokio::sync::mpsc;
use tokio::task::spawn_local;
use tokio::time::{Instant, timeout_at};

/// Frames that wait for one lane.
const BULK_QUEUE: usize = 4096;
const PRIORITY_QUEUE: usize = 512;
/// Frames that leave together at most.
const BATCH_FRAMES: usize = 512;
/// What a caller may have said to one response and it has not taken yet.
const BACK_QUEUE: usize = 16;
const KEEP_ALIVE: Duration = Duration::from_secs(5);
/// The code with which a bundle is closed.
const BROKEN: VarInt = VarInt::from_u32(1);

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
    over: Cell<bool>,
}

impl Inner {
    /// Ends everything; every response hears of it.
    fn fail(&self, why: &str) {
        if self.over.replace(true) {
            return;
        }
        tracing::debug!("QUIC bundle closed: {why}");
        for (_, connection) in self.connections.borrow().iter() {
            connection.close(BROKEN, why.as_bytes());
        }
        self.responses.borrow_mut().clear();
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
    ) -> Result<Rc<Bundle>, BundleError> {
        let config = client_config(caller.certificate_sha256)?;
        let inner = Rc::new(Inner {
            connections: RefCell::default(),
            responses: RefCell::default(),
            over: Cell::new(false),
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
                spawn_local(send(to, frames, batch, Rc::clone(&inner)));
                spawn_local(receive(from, Rc::clone(&inner)));
                let lanes = if bulk {
                    &mut bundle.bulk
                } else {
                    &mut bundle.priority
                };
                lanes.push(queue);
            }
        }
        Ok(Rc::new(bundle))
    }

    pub(super) fn is_over(&self) -> bool {
        self.inner.over.get()
    }

    /// Listens to what is said to one response.
    pub(super) fn listen(&self, id: [u8; 16]) -> mpsc::Receiver<Back> {
        let (sender, receiver) = mpsc::channel(BACK_QUEUE);
        if !self.is_over() {
            self.inner.responses.borrow_mut().insert(id, sender);
        }
        receiver
    }

    pub(super) fn forget(&self, id: &[u8; 16]) {
        self.inner.responses.borrow_mut().remove(id);
    }

    /// Queues a frame; waits while its lane is full.
    pub(super) async fn say(
        &self,
        lane: usize,
        kind: Kind,
        id: &[u8; 16],
        payload: &[u8],
    ) -> Result<(), BundleError> {
        let mut frame = Vec::with_capacity(quic_frame::PREFIX_BYTES + payload.len());
        write(kind, id, payload, &mut frame);
        let lanes = match kind {
            Kind::Data | Kind::End => &self.bulk,
            _ => &self.priority,
        };
        let sent = lanes[lane % LANES].send(frame).await;
        sent.map_err(|_| BundleError::Closed)
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
    Ok(connection)
}

/// Writes the frames of one lane, those together that wait together, or that come within `batch`.
async fn send(
    mut to: SendStream,
    mut frames: mpsc::Receiver<Vec<u8>>,
    batch: Duration,
    inner: Rc<Inner>,
) {
    while let Some(mut bytes) = frames.recv().await {
        let until = Instant::now() + batch;
        for _ in 1..BATCH_FRAMES {
            let next = match frames.try_recv() {
                Ok(next) => Some(next),
                Err(_) if batch.is_zero() => None,
                Err(_) => timeout_at(until, frames.recv()).await.ok().flatten(),
            };
            let Some(next) = next else { break };
            bytes.extend_from_slice(&next);
        }
        if let Err(error) = to.write_all(&bytes).await {
            return inner.fail(&error.to_string());
        }
    }
}

/// Hands what a caller says to the responses that it is for.
async fn receive(mut from: RecvStream, inner: Rc<Inner>) {
    let mut bytes = Vec::new();
    loop {
        match from.read_chunk(64 * 1024, true).await {
            Ok(Some(chunk)) => bytes.extend_from_slice(&chunk.bytes),
            Ok(None) => return inner.fail("the caller has ended a lane"),
            Err(error) => return inner.fail(&error.to_string()),
        }
        let mut taken = 0;
        loop {
            let frame = match decode(&bytes[taken..], PAYLOAD_BYTES_MAX) {
                Decoded::Frame(frame) => frame,
                Decoded::Need(_) => break,
                Decoded::Bad(bad) => return inner.fail(&bad.to_string()),
            };
            taken += frame.payload.end;
            let back = match frame.kind {
                Kind::Registered => Back::Registered,
                Kind::Stop => Back::Stop,
                Kind::Kill => Back::Kill,
                Kind::Reset => Back::Reset,
                _ => return inner.fail("the caller sent what a caller does not"),
            };
            let responses = inner.responses.borrow();
            // A response that does not listen is over or has heard as much before.
            if let Some(listener) = responses.get(&frame.id) {
                let _ = listener.try_send(back);
            }
        }
        bytes.drain(..taken);
    }
}

/// TLS that believes exactly one certificate.
fn client_config(certificate_sha256: [u8; 32]) -> Result<ClientConfig, BundleError> {
    let provider = Arc::new(ring::default_provider());
    let exactly = Exactly {
        certificate_sha256,
        algorithms: provider.signature_verification_algorithms,
    };
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(exactly))
        .with_no_client_auth();
    tls.alpn_protocols = vec![ALPN.to_vec()];
    let tls = QuicClientConfig::try_from(tls).map_err(|_| BundleError::Suites)?;
    let mut config = ClientConfig::new(Arc::new(tls));
    let mut transport = TransportConfig::default();
    transport.keep_alive_interval(Some(KEEP_ALIVE));
    config.transport_config(Arc::new(transport));
    Ok(config)
}

#[derive(Debug)]
struct Exactly {
    certificate_sha256: [u8; 32],
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for Exactly {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if Sha256::digest(certificate)[..] == self.certificate_sha256 {
            return Ok(ServerCertVerified::assertion());
        }
        Err(CertificateError::ApplicationVerificationFailure.into())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, certificate, signed, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
