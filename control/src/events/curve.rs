//! CURVE for events over ZMQ: which keys are named, and how doors and dials are protected by them.
//!
//! Whoever is connected to is CURVE's server, whoever dials its client. Our doors want CURVE when
//! we have a secret key, and whom we dial is dialled with CURVE when its public key is named; no
//! record of discovery has a place for keys.

use std::path::PathBuf;

use corelane_engine::events::Security;
use thiserror::Error;

use crate::config::keys::{self, Key};
use crate::env::Env;

/// The keys of CURVE, as they are named in `[events]`, by flags and in the environment.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct CurveOptions {
    /// File with our secret key, as `corelane events keys` writes it: 40 characters of Z85.
    pub secret_key_file: Option<PathBuf>,
    /// Public keys of clients that are let in: a list, with commas or blanks between them, or the
    /// path of a file with one at the start of each line. `None`: any that knows our public key.
    pub allowed_keys: Option<String>,
    /// Public key of those whom we dial. `None`: they are dialled without CURVE.
    pub server_key: Option<String>,
}

/// How what we listen on and whom we dial is protected.
#[derive(Clone, Debug, Default)]
pub struct Protection {
    /// What we listen on.
    pub doors: Security,
    /// Whom we dial.
    pub dials: Security,
}

/// Why keys of CURVE cannot be used. The text does not say which setting it is about.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
pub enum CurveError {
    /// Left out when this program was built.
    #[error("{}: this program was built without its feature curve", .0.name)]
    NotBuilt(&'static Key),
    /// A file cannot be read.
    #[error("{}: {path} cannot be read: {why}", .key.name)]
    File {
        /// Which setting.
        key: &'static Key,
        /// The file.
        path: String,
        /// The system's answer.
        why: String,
    },
    /// A text is no key.
    #[error("{}: {why}", .key.name)]
    NoKey {
        /// Which setting.
        key: &'static Key,
        /// What is wrong, and where.
        why: String,
    },
    /// Clients are let in by their keys, but not with CURVE.
    #[error("curve_allowed_keys without curve_secret_key_file: everybody would be let in")]
    NoSecret,
    /// The kernel has no random numbers.
    #[error("no random numbers for a key: {0}")]
    NoChance(String),
}

impl CurveError {
    /// The setting that is wrong.
    pub(crate) fn key(&self) -> &'static Key {
        match self {
            Self::NotBuilt(key) | Self::File { key, .. } | Self::NoKey { key, .. } => key,
            Self::NoSecret => &keys::EVENTS_CURVE_ALLOWED_KEYS,
            Self::NoChance(_) => &keys::EVENTS_CURVE_SERVER_KEY,
        }
    }

    /// What is to be done about it.
    pub(crate) fn instead(&self) -> &'static str {
        match self {
            Self::NotBuilt(_) => "build it with --features curve, or leave the key out",
            Self::File { .. } => "name a file that can be read; corelane events keys writes one",
            Self::NoKey { .. } => "write the 40 characters that corelane events keys has told",
            Self::NoSecret => "write curve_secret_key_file too",
            Self::NoChance(_) => "try again",
        }
    }
}

impl CurveOptions {
    /// As `CORELANE_EVENTS_CURVE_*` say.
    pub fn read(env: &Env) -> CurveOptions {
        let text = |key: &Key| {
            let name = key.env()?;
            env.get(&name).map(str::to_owned)
        };
        CurveOptions {
            secret_key_file: text(&keys::EVENTS_CURVE_SECRET_KEY_FILE).map(PathBuf::from),
            allowed_keys: text(&keys::EVENTS_CURVE_ALLOWED_KEYS),
            server_key: text(&keys::EVENTS_CURVE_SERVER_KEY),
        }
    }

    /// Reads the files and keys that are named.
    ///
    /// # Errors
    /// One of them is of no use, or this program has no CURVE.
    #[cfg(not(feature = "curve"))]
    pub fn load(&self) -> Result<Protection, CurveError> {
        let named = [
            (
                &keys::EVENTS_CURVE_SECRET_KEY_FILE,
                self.secret_key_file.is_some(),
            ),
            (
                &keys::EVENTS_CURVE_ALLOWED_KEYS,
                self.allowed_keys.is_some(),
            ),
            (&keys::EVENTS_CURVE_SERVER_KEY, self.server_key.is_some()),
        ];
        match named.into_iter().find(|(_, is_named)| *is_named) {
            Some((key, _)) => Err(CurveError::NotBuilt(key)),
            None => Ok(Protection::default()),
        }
    }
}

#[cfg(feature = "curve")]
pub use loaded::new_secret_key;

#[cfg(feature = "curve")]
mod loaded {
    use std::collections::HashSet;
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    use std::path::Path;
    use std::sync::Arc;

    use corelane_codec::curve::{Keys, PublicKey};
    use corelane_engine::events::{CurveClient, CurveServer, Security, draw_keys};
    use zeroize::Zeroizing;

    use super::{CurveError, CurveOptions, Protection};
    use crate::config::keys::{self, Key};

    impl CurveOptions {
        /// Reads the files and keys that are named.
        ///
        /// # Errors
        /// One of them is of no use.
        pub fn load(&self) -> Result<Protection, CurveError> {
            let secret = self.secret_key_file.as_deref().map(secret).transpose()?;
            let clients = self.allowed_keys.as_deref().map(allowed).transpose()?;
            let doors = match (&secret, clients) {
                (Some(keys), clients) => Security::Server(Arc::new(CurveServer {
                    keys: Arc::clone(keys),
                    clients,
                })),
                (None, Some(_)) => return Err(CurveError::NoSecret),
                (None, None) => Security::Null,
            };
            let dials = match &self.server_key {
                Some(server) => {
                    let key = &keys::EVENTS_CURVE_SERVER_KEY;
                    let server = server.parse().map_err(|error| no_key(key, &error))?;
                    // A client that nobody has to know draws a key.
                    let keys = match secret {
                        Some(keys) => keys,
                        None => Arc::new(draw()?),
                    };
                    Security::Client(Arc::new(CurveClient { keys, server }))
                }
                None => Security::Null,
            };
            Ok(Protection { doors, dials })
        }
    }

    fn draw() -> Result<Keys, CurveError> {
        draw_keys().map_err(|error| CurveError::NoChance(error.to_string()))
    }

    fn no_key(key: &'static Key, why: &dyn std::fmt::Display) -> CurveError {
        let why = why.to_string();
        CurveError::NoKey { key, why }
    }

    fn read(key: &'static Key, path: &Path) -> Result<Zeroizing<String>, CurveError> {
        let text = std::fs::read_to_string(path);
        text.map(Zeroizing::new).map_err(|error| CurveError::File {
            key,
            path: path.display().to_string(),
            why: crate::config::plain_error(&error),
        })
    }

    fn secret(path: &Path) -> Result<Arc<Keys>, CurveError> {
        let key = &keys::EVENTS_CURVE_SECRET_KEY_FILE;
        let keys = read(key, path)?.parse::<Keys>();
        let keys = keys.map_err(|error| no_key(key, &format!("{}: {error}", path.display())));
        keys.map(Arc::new)
    }

    /// A list of keys, or the path of a file with them.
    fn allowed(text: &str) -> Result<HashSet<PublicKey>, CurveError> {
        let words = text.split([',', ' ', '\t', '\n']);
        let listed: Result<HashSet<PublicKey>, _> = words
            .filter(|word| !word.is_empty())
            .map(str::parse)
            .collect();
        if let Ok(listed) = listed
            && !listed.is_empty()
        {
            return Ok(listed);
        }
        let key = &keys::EVENTS_CURVE_ALLOWED_KEYS;
        let text_of_file = read(key, Path::new(text.trim()))?;
        let mut found = HashSet::new();
        for (number, line) in (1..).zip(text_of_file.lines()) {
            // What follows a key on its line says whose it is.
            let Some(word) = line.split_whitespace().next() else {
                continue;
            };
            let wrong = |error| no_key(key, &format!("{text}:{number}: {error}"));
            found.insert(word.parse().map_err(wrong)?);
        }
        if found.is_empty() {
            return Err(no_key(
                key,
                &format!("{text} has no key, so that nobody is let in"),
            ));
        }
        Ok(found)
    }

    /// Writes a new secret key to a new file that only its owner may read, and returns its public
    /// key as text.
    ///
    /// # Errors
    /// The file is there already, or cannot be written.
    pub fn new_secret_key(path: &Path) -> std::io::Result<String> {
        let keys = draw_keys()?;
        let mut options = std::fs::OpenOptions::new();
        let mut file = options
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)?;
        file.write_all(keys.secret_text().as_bytes())?;
        file.write_all(b"\n")?;
        file.sync_all()?;
        Ok(keys.public().to_string())
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        fn options(secret: Option<&Path>) -> CurveOptions {
            CurveOptions {
                secret_key_file: secret.map(Path::to_owned),
                ..CurveOptions::default()
            }
        }

        fn refused(options: &CurveOptions) -> String {
            options.load().unwrap_err().to_string()
        }

        #[test]
        fn a_key_pair_protects_doors_and_dials() {
            use std::os::unix::fs::PermissionsExt;
            let folder = tempfile::tempdir().unwrap();
            let file = folder.path().join("broker.key");
            let public = new_secret_key(&file).unwrap();
            let mode = std::fs::metadata(&file).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
            assert!(new_secret_key(&file).is_err(), "an old key was overwritten");
            let off = CurveOptions::default().load().unwrap();
            assert!(matches!(
                (off.doors, off.dials),
                (Security::Null, Security::Null)
            ));
            let ours = options(Some(&file)).load().unwrap();
            let Security::Server(server) = ours.doors else {
                panic!("{ours:?}");
            };
            assert_eq!(server.keys.public().to_string(), public);
            assert!(server.clients.is_none() && matches!(ours.dials, Security::Null));
            let theirs = CurveOptions {
                server_key: Some(public.clone()),
                ..CurveOptions::default()
            };
            let Security::Client(client) = theirs.load().unwrap().dials else {
                panic!("{theirs:?}");
            };
            assert_eq!(client.server.to_string(), public);
        }

        #[test]
        fn clients_are_listed_or_in_a_file() {
            let folder = tempfile::tempdir().unwrap();
            let file = folder.path().join("broker.key");
            let public = new_secret_key(&file).unwrap();
            let other = new_secret_key(&folder.path().join("other.key")).unwrap();
            let clients = |allowed: &str| {
                let options = CurveOptions {
                    allowed_keys: Some(allowed.to_owned()),
                    ..options(Some(&file))
                };
                let protection = options.load().map_err(|error| error.to_string())?;
                match protection.doors {
                    Security::Server(server) => Ok(server.clients.clone().unwrap()),
                    doors => Err(format!("{doors:?}")),
                }
            };
            let both = HashSet::from([public.parse().unwrap(), other.parse().unwrap()]);
            assert_eq!(clients(&format!("{public}, {other}")), Ok(both.clone()));
            let list = folder.path().join("allowed");
            std::fs::write(&list, format!("{public} the worker\n\n  {other}\n")).unwrap();
            let list = list.to_str().unwrap();
            assert_eq!(clients(list), Ok(both));
            std::fs::write(list, format!("{public}\nnonsense\n")).unwrap();
            let error = clients(list).unwrap_err();
            assert!(error.contains(&format!("{list}:2: ")), "{error}");
            std::fs::write(list, "\n").unwrap();
            assert!(clients(list).unwrap_err().contains("nobody is let in"));
        }

        #[test]
        fn what_is_no_key_is_told() {
            let folder = tempfile::tempdir().unwrap();
            let absent = folder.path().join("absent");
            let error = refused(&options(Some(&absent)));
            assert!(error.starts_with("curve_secret_key_file: ") && error.contains("absent"));
            std::fs::write(&absent, "not a key").unwrap();
            assert!(refused(&options(Some(&absent))).contains("40 characters"));
            let server = CurveOptions {
                server_key: Some("~".repeat(40)),
                ..CurveOptions::default()
            };
            assert!(refused(&server).starts_with("curve_server_key: character 1 "));
            let open = CurveOptions {
                allowed_keys: Some("x".to_owned()),
                ..CurveOptions::default()
            };
            assert_eq!(open.load().unwrap_err().key().name, "curve_allowed_keys");
        }
    }
}
