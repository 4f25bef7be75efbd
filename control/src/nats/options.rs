//! How a NATS server is reached, as Dynamo's variables say it (spec/events-discovery.md §6.1-§6.3).

use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

use crate::env::Env;

/// Default of `NATS_SERVER`.
pub const SERVER_DEFAULT: &str = "nats://localhost:4222";
/// Default of `NATS_STARTUP_CONNECT_TIMEOUT_SECONDS`.
const STARTUP_MAX: Duration = Duration::from_secs(120);
/// Default of `DYN_NATS_REQUEST_TIMEOUT_SECS`.
const REQUEST_MAX: Duration = Duration::from_secs(10);
/// User and password where nothing else is set: Dynamo sends them, and a server that asks for
/// nothing ignores them.
const NOBODY: &str = "user";

/// Who we say that we are. The variables are looked at in this order.
#[derive(Clone, Eq, PartialEq)]
pub enum NatsAuth {
    /// `NATS_AUTH_USERNAME` and `NATS_AUTH_PASSWORD`, both of them.
    User {
        /// The user.
        name: String,
        /// The password.
        password: String,
    },
    /// `NATS_AUTH_TOKEN`.
    Token(String),
    /// `NATS_AUTH_NKEY`: a seed, with which the server's challenge is signed.
    Nkey(String),
    /// `NATS_AUTH_CREDENTIALS_FILE`.
    Credentials(PathBuf),
}

impl std::fmt::Debug for NatsAuth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Secrets do not go into logs.
        f.write_str(match self {
            Self::User { .. } => "user and password",
            Self::Token(_) => "token",
            Self::Nkey(_) => "nkey",
            Self::Credentials(_) => "credentials file",
        })
    }
}

/// TLS beyond `tls://` alone.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct NatsTls {
    /// The one authority that is trusted; the host's own without it.
    pub ca: Option<PathBuf>,
    /// Certificate and key that we show.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// Trusts every certificate.
    pub insecure: bool,
}

/// All of it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct NatsOptions {
    /// `nats://` or `tls://`, host and port; several with commas between.
    pub server: String,
    /// Who we say that we are.
    pub auth: NatsAuth,
    /// Certificates.
    pub tls: NatsTls,
    /// How long the server is tried at start.
    pub startup_max: Duration,
    /// How long an answer is waited for.
    pub request_max: Duration,
}

/// A variable that cannot be used.
#[derive(Debug, Error, Eq, PartialEq)]
pub enum NatsOptionError {
    /// The URL is of another scheme.
    #[error("NATS_SERVER: {0:?} must begin with nats:// or tls://")]
    Scheme(String),
    /// TLS variables without TLS.
    #[error("{0} needs a server URL that begins with tls://")]
    NotTls(&'static str),
    /// One of certificate and key without the other.
    #[error("NATS_TLS_CLIENT_CERT_PATH and NATS_TLS_CLIENT_KEY_PATH go together; set both")]
    HalfIdentity,
    /// A client certificate without a CA.
    #[error("a client certificate for NATS needs NATS_TLS_CA_CERT_PATH, or NATS_TLS_INSECURE=1")]
    IdentityAlone,
}

impl Default for NatsOptions {
    fn default() -> Self {
        NatsOptions {
            server: SERVER_DEFAULT.to_owned(),
            auth: NatsAuth::User {
                name: NOBODY.to_owned(),
                password: NOBODY.to_owned(),
            },
            tls: NatsTls::default(),
            startup_max: STARTUP_MAX,
            request_max: REQUEST_MAX,
        }
    }
}

impl NatsOptions {
    /// A server, with nothing else said.
    #[must_use]
    pub fn server(server: impl Into<String>) -> Self {
        NatsOptions {
            server: server.into(),
            ..NatsOptions::default()
        }
    }

    /// As the variables say.
    ///
    /// # Errors
    /// See [`NatsOptionError`]; nothing is opened or read here.
    pub fn read(env: &Env) -> Result<Self, NatsOptionError> {
        let default = NatsOptions::default();
        let seconds = |name: &str, default: Duration| {
            let set = env.get(name).and_then(|text| text.trim().parse().ok());
            let set = set.filter(|seconds| *seconds > 0);
            set.map_or(default, Duration::from_secs)
        };
        let path = |name: &str| env.get(name).map(PathBuf::from);
        let identity = match (
            path("NATS_TLS_CLIENT_CERT_PATH"),
            path("NATS_TLS_CLIENT_KEY_PATH"),
        ) {
            (Some(cert), Some(key)) => Some((cert, key)),
            (None, None) => None,
            _ => return Err(NatsOptionError::HalfIdentity),
        };
        let options = NatsOptions {
            server: env.get("NATS_SERVER").unwrap_or(SERVER_DEFAULT).to_owned(),
            auth: auth(env).unwrap_or(default.auth),
            tls: NatsTls {
                ca: path("NATS_TLS_CA_CERT_PATH"),
                identity,
                insecure: env.is_on("NATS_TLS_INSECURE"),
            },
            startup_max: seconds("NATS_STARTUP_CONNECT_TIMEOUT_SECONDS", STARTUP_MAX),
            request_max: seconds("DYN_NATS_REQUEST_TIMEOUT_SECS", REQUEST_MAX),
        };
        options.check()?;
        Ok(options)
    }

    /// The servers, one by one.
    pub(super) fn servers(&self) -> impl Iterator<Item = &str> {
        self.server.split(',').map(str::trim)
    }

    /// Checks what belongs together.
    ///
    /// # Errors
    /// See [`NatsOptionError`].
    pub fn check(&self) -> Result<(), NatsOptionError> {
        let known = |url: &&str| url.starts_with("nats://") || url.starts_with("tls://");
        if let Some(other) = self.servers().find(|url| !known(url)) {
            return Err(NatsOptionError::Scheme(without_secret(other)));
        }
        let is_tls = self.servers().all(|url| url.starts_with("tls://"));
        let custom = if self.tls.ca.is_some() {
            "NATS_TLS_CA_CERT_PATH"
        } else if self.tls.insecure {
            "NATS_TLS_INSECURE"
        } else if self.tls.identity.is_some() {
            return Err(NatsOptionError::IdentityAlone);
        } else {
            return Ok(());
        };
        if is_tls {
            return Ok(());
        }
        Err(NatsOptionError::NotTls(custom))
    }

    /// The servers as they may be shown.
    #[must_use]
    pub fn shown(&self) -> String {
        let shown: Vec<String> = self.servers().map(without_secret).collect();
        shown.join(",")
    }
}

/// A URL without the user and password that may stand in it.
fn without_secret(url: &str) -> String {
    match url.split_once("://") {
        Some((scheme, rest)) => match rest.rsplit_once('@') {
            Some((_, host)) => format!("{scheme}://{host}"),
            None => url.to_owned(),
        },
        None => url
            .rsplit_once('@')
            .map_or(url, |(_, host)| host)
            .to_owned(),
    }
}

/// The first that is set. A user without a password counts as none.
fn auth(env: &Env) -> Option<NatsAuth> {
    let text = |name: &str| env.get(name).map(str::to_owned);
    if let (Some(name), Some(password)) = (text("NATS_AUTH_USERNAME"), text("NATS_AUTH_PASSWORD")) {
        return Some(NatsAuth::User { name, password });
    }
    if let Some(token) = text("NATS_AUTH_TOKEN") {
        return Some(NatsAuth::Token(token));
    }
    if let Some(seed) = text("NATS_AUTH_NKEY") {
        return Some(NatsAuth::Nkey(seed));
    }
    let file = text("NATS_AUTH_CREDENTIALS_FILE")?;
    Some(NatsAuth::Credentials(PathBuf::from(file)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> Result<NatsOptions, NatsOptionError> {
        let own = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        NatsOptions::read(&Env::of(pairs.iter().map(own)))
    }

    fn auth_of(pairs: &[(&str, &str)]) -> NatsAuth {
        read(pairs).unwrap().auth
    }

    /// The table of spec/events-discovery.md §6.2, with the variables of its capture.
    #[test]
    fn the_first_that_is_set_counts() {
        let user = |name: &str, password: &str| NatsAuth::User {
            name: name.to_owned(),
            password: password.to_owned(),
        };
        let token = ("NATS_AUTH_TOKEN", "tok");
        let file = ("NATS_AUTH_CREDENTIALS_FILE", "/nonexistent");
        let nkey = ("NATS_AUTH_NKEY", "SU");
        let name = ("NATS_AUTH_USERNAME", "u");
        let password = ("NATS_AUTH_PASSWORD", "p");
        assert_eq!(auth_of(&[]), user("user", "user"));
        assert_eq!(auth_of(&[file, token]), NatsAuth::Token("tok".into()));
        assert_eq!(auth_of(&[name, password, token]), user("u", "p"));
        assert_eq!(auth_of(&[nkey, file]), NatsAuth::Nkey("SU".into()));
        assert_eq!(auth_of(&[name, token]), NatsAuth::Token("tok".into()));
        let path = PathBuf::from("/nonexistent");
        assert_eq!(auth_of(&[file]), NatsAuth::Credentials(path));
        let secret = ("NATS_AUTH_TOKEN", "hunter2");
        assert!(!format!("{:?}", auth_of(&[secret])).contains("hunter2"));
    }

    /// The rules of spec/events-discovery.md §6.3.
    #[test]
    fn certificates_want_tls_and_each_other() {
        let tls = ("NATS_SERVER", "tls://h:4222");
        let ca = ("NATS_TLS_CA_CERT_PATH", "ca.pem");
        let cert = ("NATS_TLS_CLIENT_CERT_PATH", "c.pem");
        let key = ("NATS_TLS_CLIENT_KEY_PATH", "k.pem");
        let insecure = ("NATS_TLS_INSECURE", "true");
        assert!(read(&[tls]).is_ok());
        assert!(read(&[tls, ca, cert, key]).unwrap().tls.identity.is_some());
        assert!(read(&[tls, insecure, cert, key]).is_ok());
        assert_eq!(
            read(&[ca]).unwrap_err(),
            NatsOptionError::NotTls("NATS_TLS_CA_CERT_PATH")
        );
        assert_eq!(
            read(&[insecure]).unwrap_err(),
            NatsOptionError::NotTls("NATS_TLS_INSECURE")
        );
        assert!(read(&[("NATS_TLS_INSECURE", "0")]).is_ok());
        assert_eq!(
            read(&[tls, ca, cert]).unwrap_err(),
            NatsOptionError::HalfIdentity
        );
        assert_eq!(
            read(&[tls, ca, key]).unwrap_err(),
            NatsOptionError::HalfIdentity
        );
        assert_eq!(
            read(&[tls, cert, key]).unwrap_err(),
            NatsOptionError::IdentityAlone
        );
    }

    #[test]
    fn servers_and_times() {
        let two = read(&[("NATS_SERVER", "nats://a:1, nats://me:secret@b:2")]).unwrap();
        assert_eq!(two.servers().collect::<Vec<_>>().len(), 2);
        assert_eq!(two.shown(), "nats://a:1,nats://b:2");
        for url in ["http://a", "a:4222", "NATS://a", "me:secret@a"] {
            let error = read(&[("NATS_SERVER", url)]).unwrap_err();
            assert!(!error.to_string().contains("secret"));
            assert!(matches!(error, NatsOptionError::Scheme(_)), "{url}");
        }
        let times = |text: &str| {
            let options = read(&[
                ("NATS_STARTUP_CONNECT_TIMEOUT_SECONDS", text),
                ("DYN_NATS_REQUEST_TIMEOUT_SECS", text),
            ]);
            let options = options.unwrap();
            (options.startup_max.as_secs(), options.request_max.as_secs())
        };
        assert_eq!(times("7"), (7, 7));
        assert_eq!(times("0"), (120, 10));
        assert_eq!(times("soon"), (120, 10));
    }
}
