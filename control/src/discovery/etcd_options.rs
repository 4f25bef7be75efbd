//! How to reach etcd: endpoints, credentials, times; from the environment that Dynamo knows
//! (`spec/events-discovery.md` §4.7, §4.8).

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

use etcd_client::{Certificate, ConnectOptions, Identity, TlsOptions};

use super::{CONFIRM_MAX, DiscoveryError};

/// Awaited (for [`EtcdOptions::hook_max`] at most) after the identity changed and before the
/// records appear under it, so that whoever finds them can already be served.
pub type BeforeRegister = Rc<dyn Fn(u64) -> Pin<Box<dyn Future<Output = ()>>>>;

/// Who we are to etcd; the two ways cannot be combined.
#[derive(Clone, PartialEq, Eq)]
pub enum EtcdAuth {
    /// No credentials.
    None,
    /// User and password, exchanged for a token that is renewed as needed.
    Password {
        /// The user.
        user: String,
        /// The password.
        password: String,
    },
    /// TLS; with certificate and key, the server checks us too.
    Tls {
        /// PEM of the authority that signed the server's certificate.
        authority_pem: String,
        /// PEM of our certificate and of its key.
        identity_pem: Option<(String, String)>,
    },
}

/// Everything that [`super::EtcdDiscovery::connect`] needs.
#[derive(Clone)]
pub struct EtcdOptions {
    /// `http://host:port`, `https://host:port` or `host:port`; one that works is enough.
    pub endpoints: Vec<String>,
    /// Our credentials.
    pub auth: EtcdAuth,
    /// Lease TTL to ask for, whole seconds, at least 1.
    pub lease_ttl: Duration,
    /// How long the first contact is tried.
    pub startup_timeout: Duration,
    /// Deadline of each call.
    pub rpc_timeout: Duration,
    /// HTTP/2 ping interval; none turns pings off.
    pub ping_interval: Option<Duration>,
    /// How long a ping may stay unanswered.
    pub ping_timeout: Duration,
    /// Removals found after an outage wait this long; see [`super::watched`].
    pub confirm_after: Duration,
    /// Runs between a change of identity and the registration under it.
    pub before_register: Option<BeforeRegister>,
    /// Longest wait for `before_register`.
    pub hook_max: Duration,
}

impl Default for EtcdOptions {
    fn default() -> Self {
        Self {
            endpoints: vec!["http://localhost:2379".to_owned()],
            auth: EtcdAuth::None,
            lease_ttl: Duration::from_secs(30),
            startup_timeout: Duration::from_secs(120),
            rpc_timeout: Duration::from_secs(5),
            ping_interval: Some(Duration::from_secs(15)),
            ping_timeout: Duration::from_secs(10),
            confirm_after: CONFIRM_MAX,
            before_register: None,
            hook_max: Duration::from_secs(1),
        }
    }
}

impl EtcdOptions {
    /// Reads Dynamo's variables through `lookup`. Numbers that are zero (where zero means
    /// nothing) or no numbers are replaced by the default with a warning, as Dynamo does. The
    /// confirmation time becomes min(lease TTL, [`CONFIRM_MAX`]).
    ///
    /// # Errors
    /// When certificates are given in part, or a path in their place cannot be read.
    pub fn from_env(lookup: impl Fn(&str) -> Option<String>) -> Result<Self, DiscoveryError> {
        let mut options = Self {
            auth: auth_from_env(&lookup)?,
            ..Self::default()
        };
        if let Some(list) = lookup("ETCD_ENDPOINTS") {
            let items = list
                .split(',')
                .map(str::trim)
                .filter(|item| !item.is_empty());
            options.endpoints = items.map(str::to_owned).collect();
            if options.endpoints.is_empty() {
                let text = "ETCD_ENDPOINTS is empty; write http://host:port[,http://host:port]";
                return Err(DiscoveryError::Option(text.to_owned()));
            }
        }
        let seconds = |name: &str, default: Duration| positive_seconds(&lookup, name, default);
        options.lease_ttl = seconds("ETCD_LEASE_TTL", options.lease_ttl);
        options.startup_timeout = seconds(
            "ETCD_STARTUP_CONNECT_TIMEOUT_SECONDS",
            options.startup_timeout,
        );
        options.ping_timeout = seconds("ETCD_KEEPALIVE_TIMEOUT_SECONDS", options.ping_timeout);
        options.ping_interval = match lookup("ETCD_KEEPALIVE_INTERVAL_SECONDS").as_deref() {
            Some(text) if text.trim() == "0" => None,
            _ => Some(seconds(
                "ETCD_KEEPALIVE_INTERVAL_SECONDS",
                Duration::from_secs(15),
            )),
        };
        options.confirm_after = options.lease_ttl.min(CONFIRM_MAX);
        options.warn_about_pings();
        Ok(options)
    }

    fn warn_about_pings(&self) {
        let Some(interval) = self.ping_interval else {
            return;
        };
        if interval < Duration::from_secs(5) {
            tracing::warn!(
                ?interval,
                "etcd may refuse pings this frequent (too_many_pings)"
            );
        }
        if interval + self.ping_timeout >= self.lease_ttl {
            let (timeout, ttl) = (self.ping_timeout, self.lease_ttl);
            tracing::warn!(
                ?interval,
                ?timeout,
                ?ttl,
                "a dead etcd is noticed after the lease"
            );
        }
    }

    /// The same in the client library's words.
    pub(super) fn connect_options(&self) -> ConnectOptions {
        let mut options = ConnectOptions::new()
            .with_connect_timeout(self.rpc_timeout)
            .with_require_leader(true)
            .with_keep_alive_while_idle(false);
        if let Some(interval) = self.ping_interval {
            options = options.with_keep_alive(interval, self.ping_timeout);
        }
        match &self.auth {
            EtcdAuth::None => options,
            EtcdAuth::Password { user, password } => options
                .with_user(user, password)
                .with_auto_token_refresh(true),
            EtcdAuth::Tls {
                authority_pem,
                identity_pem,
            } => {
                let authority = Certificate::from_pem(authority_pem);
                let tls = TlsOptions::new().ca_certificate(authority);
                options.with_tls(match identity_pem {
                    Some((certificate, key)) => tls.identity(Identity::from_pem(certificate, key)),
                    None => tls,
                })
            }
        }
    }
}

/// User and password first, then TLS, then nothing. Unlike Dynamo we also take an authority
/// alone (the server is checked, we are not), and paths where PEM text is expected.
fn auth_from_env(lookup: &impl Fn(&str) -> Option<String>) -> Result<EtcdAuth, DiscoveryError> {
    let get = |name: &str| lookup(name).filter(|text| !text.is_empty());
    if let (Some(user), Some(password)) = (get("ETCD_AUTH_USERNAME"), get("ETCD_AUTH_PASSWORD")) {
        return Ok(EtcdAuth::Password { user, password });
    }
    let pem = |name: &str| get(name).map(|value| pem_text(name, value)).transpose();
    let authority = pem("ETCD_AUTH_CA")?;
    let certificate = pem("ETCD_AUTH_CLIENT_CERT")?;
    match (authority, certificate, pem("ETCD_AUTH_CLIENT_KEY")?) {
        (None, None, None) => Ok(EtcdAuth::None),
        (Some(authority_pem), None, None) => Ok(EtcdAuth::Tls {
            authority_pem,
            identity_pem: None,
        }),
        (Some(authority_pem), Some(certificate), Some(key)) => Ok(EtcdAuth::Tls {
            authority_pem,
            identity_pem: Some((certificate, key)),
        }),
        _ => Err(DiscoveryError::Option(
            "ETCD_AUTH_CA, ETCD_AUTH_CLIENT_CERT and ETCD_AUTH_CLIENT_KEY belong together; set \
             all three, or the first alone"
                .to_owned(),
        )),
    }
}

/// The value itself when it is PEM, else the content of the file that it names. Read once, at
/// start, before anything is served.
fn pem_text(name: &str, value: String) -> Result<String, DiscoveryError> {
    if value.contains("-----BEGIN") {
        return Ok(value);
    }
    std::fs::read_to_string(&value).map_err(|error| {
        DiscoveryError::Option(format!(
            "{name} is neither PEM text nor a readable file: {error}"
        ))
    })
}

fn positive_seconds(
    lookup: &impl Fn(&str) -> Option<String>,
    name: &str,
    default: Duration,
) -> Duration {
    let Some(text) = lookup(name) else {
        return default;
    };
    match text.trim().parse::<u32>() {
        Ok(seconds @ 1..) => Duration::from_secs(seconds.into()),
        _ => {
            tracing::warn!(
                name,
                text,
                ?default,
                "not a positive number of seconds, default used"
            );
            default
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> Result<EtcdOptions, DiscoveryError> {
        EtcdOptions::from_env(|name| {
            pairs
                .iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn defaults_and_numbers() {
        let options = read(&[]).unwrap();
        assert_eq!(options.endpoints, ["http://localhost:2379"]);
        assert_eq!(options.confirm_after, Duration::from_secs(10));
        let options = read(&[
            ("ETCD_ENDPOINTS", " a:1, http://b:2 ,"),
            ("ETCD_LEASE_TTL", "4"),
            ("ETCD_STARTUP_CONNECT_TIMEOUT_SECONDS", "0"),
            ("ETCD_KEEPALIVE_INTERVAL_SECONDS", "0"),
        ])
        .unwrap();
        assert_eq!(options.endpoints, ["a:1", "http://b:2"]);
        assert_eq!(options.lease_ttl, Duration::from_secs(4));
        assert_eq!(options.confirm_after, Duration::from_secs(4));
        assert_eq!(options.startup_timeout, Duration::from_secs(120));
        assert_eq!(options.ping_interval, None);
        assert!(read(&[("ETCD_ENDPOINTS", " , ")]).is_err());
    }

    #[test]
    fn credentials_in_their_order() {
        let pem = "-----BEGIN CERTIFICATE-----";
        let user = ("ETCD_AUTH_USERNAME", "u");
        let password = ("ETCD_AUTH_PASSWORD", "p");
        let authority = ("ETCD_AUTH_CA", pem);
        let with_both = read(&[user, password, authority]).unwrap();
        assert!(matches!(with_both.auth, EtcdAuth::Password { .. }));
        assert!(matches!(read(&[user]).unwrap().auth, EtcdAuth::None));
        let alone = read(&[authority]).unwrap().auth;
        assert!(matches!(
            alone,
            EtcdAuth::Tls {
                identity_pem: None,
                ..
            }
        ));
        assert!(read(&[authority, ("ETCD_AUTH_CLIENT_CERT", pem)]).is_err());
    }

    #[test]
    fn certificates_may_be_paths() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "-----BEGIN X-----").unwrap();
        let options = read(&[("ETCD_AUTH_CA", file.path().to_str().unwrap())]).unwrap();
        let EtcdAuth::Tls { authority_pem, .. } = options.auth else {
            panic!("not TLS")
        };
        assert_eq!(authority_pem, "-----BEGIN X-----");
        assert!(read(&[("ETCD_AUTH_CA", "/no/such/file")]).is_err());
    }
}
