//! `[tls]`: who speaks TLS and with which files; what belongs together, and whether the files are
//! there and of use.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::keys::{self, Key};
use super::layers::{Layers, Of};
use super::resolve::origin;
use super::words::{KernelTls, Switch};
use crate::tls::material::{self, Unusable};

/// TLS of the request and response planes: towards those who connect to us (callers, and workers
/// that call home), and towards those whom we dial. Each by itself, as in Dynamo
/// (`spec/request-plane.md` §13); the default is neither.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Tls {
    /// Accepted connections speak TLS.
    pub server: Option<TlsServer>,
    /// Dialled connections do.
    pub client: Option<TlsClient>,
    /// How long a handshake may take.
    pub handshake_timeout: Duration,
    /// Threads for handshakes and encryption.
    pub threads: usize,
    /// Whether the kernel encrypts.
    pub kernel: KernelTls,
}

/// What those who connect to us see.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct TlsServer {
    /// Certificate chain.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// Authorities of client certificates, which are demanded then.
    pub client_ca: Option<PathBuf>,
}

/// What those whom we dial are measured by, and see.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct TlsClient {
    /// Authorities; None believes everybody.
    pub ca: Option<PathBuf>,
    /// Our certificate chain and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// The name that certificates must bear; None is the address that is dialled.
    pub server_name: Option<String>,
}

impl Tls {
    /// Whether there is none at all.
    pub fn is_off(&self) -> bool {
        self.server.is_none() && self.client.is_none()
    }
}

/// Reads `[tls]` and checks it, the content of its files too.
pub(super) fn tls(layers: &mut Layers) -> Tls {
    let seconds: u32 = layers.int(&keys::TLS_HANDSHAKE_TIMEOUT_S, Of::Once);
    let threads: u16 = layers.int(&keys::TLS_THREADS, Of::Once);
    let tls = Tls {
        server: server(layers),
        client: client(layers),
        handshake_timeout: Duration::from_secs(seconds.into()),
        threads: threads.into(),
        kernel: layers.word(&keys::TLS_KERNEL, KernelTls::parse, KernelTls::Auto),
    };
    if let Some(server) = &tls.server
        && let Err(error) = material::server(server)
    {
        let named = [
            (&keys::TLS_CERT, Some(server.cert.as_path())),
            (&keys::TLS_KEY, Some(&server.key)),
            (&keys::TLS_CLIENT_CA, server.client_ca.as_deref()),
        ];
        unusable(layers, &error, &named);
    }
    if let Some(client) = &tls.client
        && let Err(error) = material::client(client)
    {
        let (cert, key) = client.identity.as_ref().map(|(c, k)| (&**c, &**k)).unzip();
        let named = [
            (&keys::TLS_CA, client.ca.as_deref()),
            (&keys::TLS_CLIENT_CERT, cert),
            (&keys::TLS_CLIENT_KEY, key),
            (
                &keys::TLS_SERVER_NAME,
                client.server_name.as_deref().map(Path::new),
            ),
        ];
        unusable(layers, &error, &named);
    }
    tls
}

fn server(layers: &mut Layers) -> Option<TlsServer> {
    let identity = identity(layers, &keys::TLS_CERT, &keys::TLS_KEY);
    let client_ca = path(layers, &keys::TLS_CLIENT_CA);
    match (identity, client_ca) {
        (Some((cert, key)), client_ca) => Some(TlsServer {
            cert,
            key,
            client_ca,
        }),
        (None, Some(_)) => {
            let what = "client_ca without cert and key: nobody would be asked for a certificate";
            complain(layers, &keys::TLS_CLIENT_CA, what, "write cert and key too");
            None
        }
        (None, None) => None,
    }
}

fn client(layers: &mut Layers) -> Option<TlsClient> {
    let ca = path(layers, &keys::TLS_CA);
    let insecure = layers.word(&keys::TLS_INSECURE, Switch::parse, Switch::Off) == Switch::On;
    let identity = identity(layers, &keys::TLS_CLIENT_CERT, &keys::TLS_CLIENT_KEY);
    let server_name = layers.text(&keys::TLS_SERVER_NAME, Of::Once);
    let at = origin(layers, &keys::TLS_INSECURE);
    match (&ca, insecure) {
        (None, false) => {
            if identity.is_some() {
                let what = "client_cert without ca: we would dial without TLS";
                complain(layers, &keys::TLS_CLIENT_CERT, what, "write ca too");
            }
            return None;
        }
        (Some(_), true) => {
            let what = "insecure and ca contradict each other; ca wins".to_owned();
            layers.warn(&at, what, "remove one of them");
        }
        (None, true) => {
            let what = "whoever answers is believed to be the worker or the caller".to_owned();
            layers.warn(&at, what, "write ca = \"FILE\" instead of insecure");
        }
        (Some(_), false) => {}
    }
    let server_name = server_name.map(|(name, _)| name);
    Some(TlsClient {
        ca,
        identity,
        server_name,
    })
}

fn path(layers: &mut Layers, key: &'static Key) -> Option<PathBuf> {
    layers.text(key, Of::Once).map(|(path, _)| path.into())
}

/// A certificate chain and its key: both or neither.
fn identity(
    layers: &mut Layers,
    cert: &'static Key,
    key: &'static Key,
) -> Option<(PathBuf, PathBuf)> {
    let (there, missing) = match (path(layers, cert), path(layers, key)) {
        (Some(cert), Some(key)) => return Some((cert, key)),
        (None, None) => return None,
        (Some(_), None) => (cert, key),
        (None, Some(_)) => (key, cert),
    };
    let what = format!("{} without {}", there.name, missing.name);
    let instead = format!("write {} too, or leave both out", missing.name);
    complain(layers, there, &what, &instead);
    None
}

fn complain(layers: &mut Layers, key: &'static Key, what: &str, instead: &str) {
    let at = origin(layers, key);
    layers.error(&at, what.to_owned(), instead);
}

/// Says what is wrong with a file, at the key that names it.
fn unusable(layers: &mut Layers, unusable: &Unusable, named: &[(&'static Key, Option<&Path>)]) {
    let names = |(_, path): &&(&'static Key, Option<&Path>)| *path == Some(&unusable.path);
    let Some((key, _)) = named.iter().find(names).or(named.first()) else {
        return;
    };
    let what = format!("{} {}", key.name, unusable.why);
    complain(layers, key, &what, &format!("write {}", unusable.wanted));
}
