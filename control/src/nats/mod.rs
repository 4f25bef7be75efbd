//! A connection to NATS: made with patience, kept by its library, shared by all who need one
//! (spec/events-discovery.md §6).
//!
//! ```text
//! NatsOptions (variables) --connect, bounded--> Nats --clone--> events, requests, queues
//! ```
//! Its tasks run on the control thread's tokio; a [`Nats`] may be used from any thread.

mod egress;
mod home;
mod ingress;
mod objects;
mod options;
mod plane;
mod queue;
mod shards;
mod stats;

use std::time::{Duration, Instant};

use async_nats::client::RequestErrorKind;
use async_nats::{Client, ConnectErrorKind, ConnectOptions};
use bytes::Bytes;
use thiserror::Error;
use tokio::time::sleep;

pub use egress::Egress;
pub use ingress::{Ingress, ServiceData, service_name};
pub use objects::{OBJECT_BYTES_MAX, ObjectName, Objects};
pub use plane::{RequestPlane, Requests};
pub use queue::{MAX_AGE, QueueRole, WORKER_GROUP, WorkQueue};
pub use stats::{EndpointFigures, EndpointStats, ServiceStats};

pub use options::{NatsAuth, NatsOptionError, NatsOptions, NatsTls, SERVER_DEFAULT};

use crate::config::TlsClient;
use crate::tls::material;

/// Longest wait for one attempt.
const ATTEMPT_MAX: Duration = Duration::from_secs(5);
/// Most bytes of a message unless the server says otherwise.
const MESSAGE_BYTES_MAX_DEFAULT: usize = 1 << 20;
/// Messages that wait in front of the socket before publishers wait.
const WAITING_MAX: usize = 2048;
/// Messages that wait for a slow subscriber before new ones are dropped.
pub(crate) const SUBSCRIPTION_MAX: usize = 64 * 1024;

/// Why there is no connection.
#[derive(Debug, Error)]
pub enum NatsError {
    /// A variable cannot be used.
    #[error(transparent)]
    Option(#[from] NatsOptionError),
    /// A service or a question of ours was refused.
    #[error("NATS: {0}")]
    Service(String),
    /// A file of theirs cannot be used.
    #[error("{0}")]
    File(String),
    /// It was tried long enough, or it is of no use to try again.
    #[error("no contact with NATS at {server} after {waited:?}: {cause}; {advice}")]
    Unreachable {
        /// Where it was looked for.
        server: String,
        /// How long.
        waited: Duration,
        /// The last failure.
        cause: String,
        /// What to do about it.
        advice: &'static str,
    },
}

/// A connection. Clones are the same one.
#[derive(Clone, Debug)]
pub struct Nats {
    client: Client,
    request_max: Duration,
}

impl Nats {
    /// Connects, and tries again while the server cannot be reached: pauses of 1, 2, 4, 5, 5 ...
    /// seconds, as long as `startup_max`. A server that refuses us, or whose certificate is not
    /// trusted, is not tried again. Must run inside tokio.
    ///
    /// # Errors
    /// See [`NatsError`].
    pub async fn connect(options: &NatsOptions) -> Result<Nats, NatsError> {
        options.check()?;
        let connect = prepare(options).await?;
        let servers: Vec<&str> = options.servers().collect();
        let began = Instant::now();
        let mut pause = Duration::from_secs(1);
        loop {
            let error = match connect.clone().connect(servers.as_slice()).await {
                Ok(client) => {
                    tracing::info!(server = options.shown(), auth = ?options.auth, "NATS");
                    let request_max = options.request_max;
                    return Ok(Nats {
                        client,
                        request_max,
                    });
                }
                Err(error) => error,
            };
            let waited = began.elapsed();
            let (again, advice) = verdict(error.kind());
            if !again || waited + pause > options.startup_max {
                return Err(NatsError::Unreachable {
                    server: options.shown(),
                    waited,
                    cause: chain(&error),
                    advice,
                });
            }
            tracing::warn!(
                server = options.shown(),
                cause = chain(&error),
                ?pause,
                "no NATS yet"
            );
            sleep(pause).await;
            pause = (2 * pause).min(ATTEMPT_MAX);
        }
    }

    /// Connects in the background, as long as it takes: for what may do without. Until then
    /// requests find nobody.
    ///
    /// # Errors
    /// An option or a file cannot be used.
    pub async fn connect_later(options: &NatsOptions) -> Result<Nats, NatsError> {
        options.check()?;
        let servers: Vec<&str> = options.servers().collect();
        let connect = prepare(options).await?.retry_on_initial_connect();
        let connected = connect.connect(servers.as_slice()).await;
        let client = connected.map_err(|error| NatsError::Service(chain(&error)))?;
        let request_max = options.request_max;
        tracing::info!(server = options.shown(), auth = ?options.auth, "NATS, when it is there");
        Ok(Nats {
            client,
            request_max,
        })
    }

    /// The library's own handle.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// How long an answer is waited for.
    pub fn request_max(&self) -> Duration {
        self.request_max
    }

    /// Most bytes of one message, as the server says.
    pub fn message_bytes_max(&self) -> usize {
        match self.client.server_info().max_payload {
            // It has not said so yet.
            0 => MESSAGE_BYTES_MAX_DEFAULT,
            bytes => bytes,
        }
    }

    /// Waits until the server has taken in all that was sent before: a flush of the library's is
    /// over when the socket has it. It is asked for somebody who does not exist, and says so.
    ///
    /// # Errors
    /// The connection is closed, or there is no answer in time.
    pub async fn settled(&self) -> Result<(), NatsError> {
        let nobody = self.client.new_inbox();
        match self.client.request(nobody, Bytes::new()).await {
            Err(error) if error.kind() != RequestErrorKind::NoResponders => {
                Err(NatsError::Service(chain(&error)))
            }
            _ => Ok(()),
        }
    }

    /// Sends what waits and closes; a few seconds at most.
    pub async fn close(&self) {
        let flushed = tokio::time::timeout(ATTEMPT_MAX, self.client.flush()).await;
        if !matches!(flushed, Ok(Ok(()))) {
            tracing::warn!("NATS did not take everything before it was closed");
        }
        // The library has no other way to end a connection for all clones.
        let _ = self.client.drain().await;
    }
}

/// Whether another attempt makes sense, and what to say if none is made.
fn verdict(kind: ConnectErrorKind) -> (bool, &'static str) {
    match kind {
        ConnectErrorKind::Dns | ConnectErrorKind::Io | ConnectErrorKind::TimedOut => {
            (true, "check that it runs and that NATS_SERVER names it")
        }
        ConnectErrorKind::Authentication | ConnectErrorKind::AuthorizationViolation => {
            (false, "check NATS_AUTH_*")
        }
        ConnectErrorKind::Tls => (false, "check NATS_TLS_* and that the server speaks TLS"),
        _ => (false, "check NATS_SERVER"),
    }
}

/// An error with all its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let more = inner.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = inner.source();
    }
    text
}

/// What the library is to do, files read and checked.
async fn prepare(options: &NatsOptions) -> Result<ConnectOptions, NatsError> {
    let connect = ConnectOptions::new()
        .connection_timeout(ATTEMPT_MAX)
        .request_timeout(Some(options.request_max))
        .client_capacity(WAITING_MAX)
        .subscription_capacity(SUBSCRIPTION_MAX)
        .require_tls(options.servers().all(|url| url.starts_with("tls://")))
        .event_callback(|event| async move { tracing::info!(%event, "NATS") });
    let connect = match &options.auth {
        NatsAuth::User { name, password } => {
            connect.user_and_password(name.clone(), password.clone())
        }
        NatsAuth::Token(token) => connect.token(token.clone()),
        NatsAuth::Nkey(seed) => connect.nkey(seed.clone()),
        NatsAuth::Credentials(path) => {
            let read = connect.credentials_file(path).await;
            read.map_err(|error| {
                let path = path.display();
                NatsError::File(format!(
                    "NATS_AUTH_CREDENTIALS_FILE: {path}: {error}; name a file with a JWT and a seed"
                ))
            })?
        }
    };
    certificates(connect, &options.tls)
}

fn certificates(connect: ConnectOptions, tls: &NatsTls) -> Result<ConnectOptions, NatsError> {
    if tls.ca.is_none() && !tls.insecure {
        return Ok(connect);
    }
    // All files are read once now, so that what is wrong with them is said by name. With an
    // authority the library reads them again for each connection it makes.
    let settings = TlsClient {
        ca: tls.ca.clone().filter(|_| !tls.insecure),
        identity: tls.identity.clone(),
        server_name: None,
    };
    let dialling = material::client(&settings).map_err(|bad| NatsError::File(bad.to_string()))?;
    if tls.insecure {
        return Ok(connect.tls_client_config((*dialling.config).clone()));
    }
    let connect = match &tls.ca {
        Some(ca) => connect.add_root_certificates(ca.clone()),
        None => connect,
    };
    Ok(match &tls.identity {
        Some((cert, key)) => connect.add_client_certificate(cert.clone(), key.clone()),
        None => connect,
    })
}
