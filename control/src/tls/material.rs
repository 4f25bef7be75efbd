//! From the files of `[tls]` to what rustls works with, and whether they have changed since.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::ring;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use thiserror::Error;

use super::trust::Holder;
use crate::config::{Tls, TlsClient, TlsServer};

/// A longer file is none of ours.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// A file, or the server name, that cannot be used.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
#[error("{}: {why}; name {wanted}", path.display())]
pub struct Unusable {
    /// The file as it was named.
    pub path: PathBuf,
    /// What is wrong with it, without its name.
    pub why: String,
    /// What should be there.
    pub wanted: &'static str,
}

impl Unusable {
    fn new(path: &Path, why: impl Into<String>, wanted: &'static str) -> Unusable {
        Unusable {
            path: path.to_owned(),
            why: why.into(),
            wanted,
        }
    }
}

const CHAIN: &str = "a PEM file with a certificate chain, our own certificate first";
const KEY: &str = "a PEM file with the private key of the certificate";
const AUTHORITIES: &str = "a PEM file with the certificates of authorities";
const NAME: &str = "a host name, or leave it out to check the address";

/// What a dialled connection is made with.
#[derive(Clone, Debug)]
pub struct Dialling {
    /// Roots, our certificate.
    pub config: Arc<ClientConfig>,
    /// The name to check; None: the address that is dialled.
    pub name: Option<ServerName<'static>>,
}

/// Reads the files for accepted connections.
///
/// # Errors
/// One cannot be read, or is not what it should be.
pub fn server(settings: &TlsServer) -> Result<Arc<ServerConfig>, Unusable> {
    let provider = Arc::new(ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| Unusable::new(&settings.cert, error.to_string(), CHAIN))?;
    let builder = match &settings.client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let roots = Arc::new(authorities(path)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider).build();
            let wrong = |error| Unusable::new(path, format!("is of no use: {error}"), AUTHORITIES);
            builder.with_client_cert_verifier(verifier.map_err(wrong)?)
        }
    };
    let (chain, key) = identity(&settings.cert, &settings.key)?;
    let config = builder.with_single_cert(chain, key);
    let mut config = config.map_err(|error| mismatch(&settings.cert, &settings.key, &error))?;
    // For the kernel.
    config.enable_secret_extraction = true;
    Ok(Arc::new(config))
}

/// Reads the files for dialled connections.
///
/// # Errors
/// As [`server`]; and the server name may be no name.
pub fn client(settings: &TlsClient) -> Result<Dialling, Unusable> {
    let provider = Arc::new(ring::default_provider());
    let verifier: Arc<dyn ServerCertVerifier> = match &settings.ca {
        None => Arc::new(Holder::of_any(&provider)),
        Some(path) => {
            let roots = Arc::new(authorities(path)?);
            let builder = WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(&provider));
            let wrong = |error| Unusable::new(path, format!("is of no use: {error}"), AUTHORITIES);
            builder.build().map_err(wrong)?
        }
    };
    let at = settings.ca.as_deref().unwrap_or(Path::new(""));
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| Unusable::new(at, error.to_string(), AUTHORITIES))?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = match &settings.identity {
        None => builder.with_no_client_auth(),
        Some((cert, key)) => {
            let (chain, private) = identity(cert, key)?;
            let config = builder.with_client_auth_cert(chain, private);
            config.map_err(|error| mismatch(cert, key, &error))?
        }
    };
    config.enable_secret_extraction = true;
    let name = settings.server_name.as_ref().map(|name| {
        let parsed = ServerName::try_from(name.clone());
        parsed.map_err(|_| Unusable::new(Path::new(name), "is not a host name", NAME))
    });
    Ok(Dialling {
        config: Arc::new(config),
        name: name.transpose()?,
    })
}

fn mismatch(cert: &Path, key: &Path, error: &rustls::Error) -> Unusable {
    let why = match error {
        rustls::Error::InconsistentKeys(_) => {
            format!("is not the key of the certificate in {}", cert.display())
        }
        other => format!("is of no use with {}: {other}", cert.display()),
    };
    Unusable::new(key, why, KEY)
}

fn identity(
    cert: &Path,
    key: &Path,
) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), Unusable> {
    let chain = certificates(cert, CHAIN)?;
    let text = read(key, KEY)?;
    Ok((chain, parse_key(&text, key)?))
}

fn parse_key(text: &[u8], key: &Path) -> Result<PrivateKeyDer<'static>, Unusable> {
    PrivateKeyDer::from_pem_slice(text).map_err(|error| match error {
        pem::Error::NoItemsFound => Unusable::new(key, "has no private key in it", KEY),
        other => Unusable::new(key, format!("is not PEM: {other}"), KEY),
    })
}

/// From PEM text: what a connection to etcd is dialled with. `authority` signs the server's
/// certificate; `identity` is our certificate and its key.
///
/// # Errors
/// One is not what it should be; its path is a name for messages.
pub(crate) fn client_of_text(
    authority: &str,
    identity: Option<(&str, &str)>,
) -> Result<Arc<ClientConfig>, Unusable> {
    let (ca, cert, key) = (
        Path::new("ca"),
        Path::new("client_cert"),
        Path::new("client_key"),
    );
    let found = parse_certificates(authority.as_bytes(), ca, AUTHORITIES)?;
    let roots = roots(found, ca)?;
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| Unusable::new(ca, error.to_string(), AUTHORITIES))?
        .with_root_certificates(roots);
    let config = match identity {
        None => builder.with_no_client_auth(),
        Some((chain, private)) => {
            let chain = parse_certificates(chain.as_bytes(), cert, CHAIN)?;
            let private = parse_key(private.as_bytes(), key)?;
            let config = builder.with_client_auth_cert(chain, private);
            config.map_err(|error| mismatch(cert, key, &error))?
        }
    };
    Ok(Arc::new(config))
}

fn authorities(path: &Path) -> Result<RootCertStore, Unusable> {
    roots(certificates(path, AUTHORITIES)?, path)
}

fn roots(found: Vec<CertificateDer<'static>>, path: &Path) -> Result<RootCertStore, Unusable> {
    let mut roots = RootCertStore::empty();
    for certificate in found {
        let added = roots.add(certificate);
        added.map_err(|error| {
            let why = format!("holds a certificate of no use: {error}");
            Unusable::new(path, why, AUTHORITIES)
        })?;
    }
    Ok(roots)
}

fn certificates(
    path: &Path,
    wanted: &'static str,
) -> Result<Vec<CertificateDer<'static>>, Unusable> {
    let text = read(path, wanted)?;
    parse_certificates(&text, path, wanted)
}

fn parse_certificates(
    text: &[u8],
    path: &Path,
    wanted: &'static str,
) -> Result<Vec<CertificateDer<'static>>, Unusable> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text).collect();
    match found {
        Ok(found) if found.is_empty() => {
            Err(Unusable::new(path, "has no certificate in it", wanted))
        }
        Ok(found) => Ok(found),
        Err(error) => Err(Unusable::new(path, format!("is not PEM: {error}"), wanted)),
    }
}

fn read(path: &Path, wanted: &'static str) -> Result<Vec<u8>, Unusable> {
    let long = |metadata: &fs::Metadata| metadata.len() > FILE_BYTES_MAX;
    if fs::metadata(path).is_ok_and(|metadata| metadata.is_dir() || long(&metadata)) {
        return Err(Unusable::new(path, "is no file of up to 1 MiB", wanted));
    }
    fs::read(path).map_err(|error| {
        let why = match error.kind() {
            io::ErrorKind::NotFound => "does not exist".to_owned(),
            _ => format!("cannot be read: {error}"),
        };
        Unusable::new(path, why, wanted)
    })
}

/// Device, file, length, and time of change in seconds and nanoseconds.
type Look = (u64, u64, u64, i64, i64);

/// What tells one state of the files from another: device, file, length and time of change of
/// each. Follows links, so that a folder that is swapped as a whole (as Kubernetes does with its
/// secrets) is seen.
pub(super) fn fingerprint(settings: &Tls) -> Vec<Option<Look>> {
    let mut paths: Vec<&Path> = Vec::new();
    if let Some(server) = &settings.server {
        paths.extend([server.cert.as_path(), server.key.as_path()]);
        paths.extend(server.client_ca.as_deref());
    }
    if let Some(client) = &settings.client {
        paths.extend(client.ca.as_deref());
        let identity = client.identity.iter();
        paths.extend(identity.flat_map(|(cert, key)| [cert.as_path(), key.as_path()]));
    }
    let seen = |path: &Path| {
        let seen = fs::metadata(path).ok()?;
        Some((
            seen.dev(),
            seen.ino(),
            seen.len(),
            seen.mtime(),
            seen.mtime_nsec(),
        ))
    };
    paths.into_iter().map(seen).collect()
}
