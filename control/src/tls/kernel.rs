//! Connections that the kernel encrypts once hands are shaken: whether it can, the handing over of
//! keys, and the farewell that it does not say by itself.

use std::io;
use std::net::{Ipv4Addr, TcpListener, TcpStream as StdTcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use corelane_engine::ring::ktls::{self, Cipher, Direction, IV_BYTES, Keys, Version};
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType, shutdown, socket_with};
use rustls::{CipherSuite, CommonState, ConnectionTrafficSecrets, ProtocolVersion};
use thiserror::Error;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep};
use tokio_rustls::TlsStream;

use super::cork::Corked;
use crate::config::{self, KernelTls};

/// What sockets are tried with.
const VERSIONS: [Version; 2] = [Version::Tls12, Version::Tls13];
const CIPHERS: [Cipher; 3] = [
    Cipher::Aes128Gcm,
    Cipher::Aes256Gcm,
    Cipher::Chacha20Poly1305,
];
/// How long the last bytes and the farewell may take.
const FAREWELL_MAX: Duration = Duration::from_secs(10);
/// The pauses after which it is tried again whether they have left.
const FAREWELL_PAUSE: Duration = Duration::from_millis(1);
const FAREWELL_PAUSE_MAX: Duration = Duration::from_millis(100);

/// Why the kernel does not encrypt.
#[derive(Debug, Error)]
pub enum Unavailable {
    /// It is said so.
    #[error("[tls] kernel is off")]
    Off,
    /// There is no module.
    #[error("the kernel has no module tls: load it (modprobe tls), or take a kernel that has it")]
    NoModule,
    /// It refuses.
    #[error("the kernel's TLS cannot be used: {0}")]
    Refused(#[from] io::Error),
    /// It encrypts with nothing that we shake hands for.
    #[error("the kernel's TLS has none of our ciphers: load aes and gcm (modprobe gcm)")]
    NoCipher,
}

/// What the kernel can encrypt.
#[derive(Clone, Debug, Default)]
pub struct Kernel {
    takes: Vec<(Version, Cipher)>,
}

/// Whether the kernel has TLS at all, found out on one socket that is never connected.
///
/// # Errors
/// Why not, and what to do.
pub fn look() -> Result<(), Unavailable> {
    let (inet, stream) = (AddressFamily::INET, SocketType::STREAM);
    let socket = socket_with(inet, stream, SocketFlags::CLOEXEC, None).map_err(io::Error::from)?;
    match ktls::prepare(socket.as_fd()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
        Err(error) => Err(Unavailable::of(error)),
    }
}

/// Whether this host can do what `[tls]` demands of its kernel.
///
/// # Errors
/// The kernel is required, and why it cannot.
pub fn demanded(settings: &config::Tls) -> Result<(), String> {
    if settings.is_off() || settings.kernel != KernelTls::Required {
        return Ok(());
    }
    let why = |why| format!("[tls] kernel is required: {why}");
    Kernel::of(settings).map(|_| ()).map_err(why)
}

/// Who encrypts on this host, in words.
pub fn who_encrypts(wish: KernelTls) -> String {
    let found = match wish {
        KernelTls::Off => Err(Unavailable::Off),
        KernelTls::Auto | KernelTls::Required => look(),
    };
    match found {
        Ok(()) => "the kernel encrypts".to_owned(),
        Err(why) if wish == KernelTls::Required => format!("serve would refuse to start: {why}"),
        Err(why) => format!("threads of this process encrypt: {why}"),
    }
}

impl Unavailable {
    fn of(error: io::Error) -> Unavailable {
        match error.kind() {
            io::ErrorKind::NotFound => Unavailable::NoModule,
            _ => Unavailable::Refused(error),
        }
    }
}

impl Kernel {
    /// What the kernel can do, as far as the settings want it.
    ///
    /// # Errors
    /// Why it encrypts nothing.
    pub fn of(settings: &config::Tls) -> Result<Kernel, Unavailable> {
        if settings.kernel == KernelTls::Off {
            return Err(Unavailable::Off);
        }
        look()?;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let pairs = VERSIONS.into_iter().flat_map(|v| CIPHERS.map(|c| (v, c)));
        let mut takes = Vec::new();
        for (version, cipher) in pairs {
            if tried(&listener, version, cipher)? {
                takes.push((version, cipher));
            }
        }
        match takes.is_empty() {
            true => Err(Unavailable::NoCipher),
            false => Ok(Kernel { takes }),
        }
    }

    /// What is to be done by the kernel on this connection. None: it cannot.
    pub(super) fn fits(&self, session: &CommonState) -> Option<(Version, Cipher)> {
        let version = match session.protocol_version()? {
            ProtocolVersion::TLSv1_2 => Version::Tls12,
            ProtocolVersion::TLSv1_3 => Version::Tls13,
            _ => return None,
        };
        let wanted = (version, cipher(session.negotiated_cipher_suite()?.suite())?);
        self.takes.contains(&wanted).then_some(wanted)
    }
}

fn cipher(suite: CipherSuite) -> Option<Cipher> {
    Some(match suite {
        CipherSuite::TLS13_AES_128_GCM_SHA256
        | CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256
        | CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256 => Cipher::Aes128Gcm,
        CipherSuite::TLS13_AES_256_GCM_SHA384
        | CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384
        | CipherSuite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384 => Cipher::Aes256Gcm,
        CipherSuite::TLS13_CHACHA20_POLY1305_SHA256
        | CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256
        | CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256 => Cipher::Chacha20Poly1305,
        _ => return None,
    })
}

/// Whether the kernel takes keys of this kind, on a connection of ours to ourselves.
fn tried(listener: &TcpListener, version: Version, cipher: Cipher) -> io::Result<bool> {
    let socket = StdTcpStream::connect(listener.local_addr()?)?;
    let _peer = listener.accept()?;
    ktls::prepare(socket.as_fd())?;
    let keys = Keys {
        version,
        cipher,
        key: &[0; 32][..cipher.key_bytes()],
        iv: &[0; IV_BYTES],
        sequence: 0,
    };
    let mut ways = [Direction::Send, Direction::Receive].into_iter();
    Ok(ways.all(|way| ktls::install(socket.as_fd(), way, &keys).is_ok()))
}

/// Gives the keys of a connection whose hands are shaken to the kernel. None, and all is as it was,
/// if it cannot be; an error costs the connection.
pub(super) fn hand_over(
    stream: TlsStream<Corked<TcpStream>>,
    (version, cipher): (Version, Cipher),
) -> Result<io::Result<StdTcpStream>, Box<TlsStream<Corked<TcpStream>>>> {
    // What TLS itself still has to write, or has read already, would be lost.
    let (corked, session) = stream.get_ref();
    if session.wants_write() || ktls::prepare(corked.get_ref().as_fd()).is_err() {
        return Err(Box::new(stream));
    }
    let (corked, secrets) = match stream {
        TlsStream::Client(stream) => {
            let (corked, session) = stream.into_inner();
            (corked, session.dangerous_extract_secrets())
        }
        TlsStream::Server(stream) => {
            let (corked, session) = stream.into_inner();
            (corked, session.dangerous_extract_secrets())
        }
    };
    let install = || {
        let secrets = secrets.map_err(io::Error::other)?;
        let torn = || io::Error::other("the handshake has left half a record");
        let socket = corked.into_inner().ok_or_else(torn)?.into_std()?;
        let ways = [
            (Direction::Send, &secrets.tx),
            (Direction::Receive, &secrets.rx),
        ];
        for (way, (sequence, secrets)) in ways {
            let (key, iv) = parts(secrets).ok_or(io::ErrorKind::Unsupported)?;
            let keys = Keys {
                version,
                cipher,
                key,
                iv,
                sequence: *sequence,
            };
            ktls::install(socket.as_fd(), way, &keys)?;
        }
        Ok(socket)
    };
    Ok(install())
}

fn parts(secrets: &ConnectionTrafficSecrets) -> Option<(&[u8], &[u8; IV_BYTES])> {
    let (key, iv) = match secrets {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv }
        | ConnectionTrafficSecrets::Aes256Gcm { key, iv }
        | ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (key, iv),
        _ => return None,
    };
    Some((key.as_ref(), iv.as_ref().try_into().ok()?))
}

/// Says farewell on a socket that was written to for the last time, once all before it is on its
/// way, and shuts our direction down.
pub(super) async fn part(socket: OwnedFd) {
    let deadline = Instant::now() + FAREWELL_MAX;
    let mut pause = FAREWELL_PAUSE;
    // An error: the peer has gone already.
    while let Ok(false) = ktls::farewell(socket.as_fd()) {
        if Instant::now() >= deadline {
            break;
        }
        sleep(pause).await;
        pause = (2 * pause).min(FAREWELL_PAUSE_MAX);
    }
    let _ = shutdown(&socket, Shutdown::Write);
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::crypto::ring;

    #[test]
    fn every_suite_that_we_shake_hands_for_has_a_cipher() {
        for suite in ring::default_provider().cipher_suites {
            assert!(cipher(suite.suite()).is_some(), "{:?}", suite.suite());
        }
    }

    #[test]
    fn what_is_off_is_not_tried_and_what_is_required_must_be_there() {
        let off = config::Tls {
            kernel: KernelTls::Off,
            ..config::Tls::default()
        };
        assert!(matches!(Kernel::of(&off), Err(Unavailable::Off)));
        let required = |client| config::Tls {
            kernel: KernelTls::Required,
            client,
            ..config::Tls::default()
        };
        assert_eq!(demanded(&required(None)), Ok(()));
        let client = config::TlsClient {
            ca: None,
            identity: None,
            server_name: None,
        };
        let demanded = demanded(&required(Some(client)));
        assert_eq!(demanded.is_ok(), look().is_ok(), "{demanded:?}");
    }
}
