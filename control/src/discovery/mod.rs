//! Who exists and where: registration of our own records and watches on those of others, over
//! a store in memory, in a directory of files, or in etcd.
//!
//! ```text
//!  Record (name + builder) --register--> Discovery { Memory | File | Etcd } --> store
//!  store --> backend task --> shared::Shared<T> --> Watch<T> (router, cards)
//! ```
//! Records are builders, not bytes: when the identity changes (a lost lease), id, key and JSON
//! of every record are built again for the new id.
//!
//! Everything here lives on the single-threaded control runtime and must be used inside a
//! `tokio::task::LocalSet`; nothing blocks that thread (file work goes to the blocking pool).

pub mod etcd;
mod etcd_options;
mod etcd_watch;
pub mod file;
mod file_store;
pub mod memory;
mod shared;
pub mod watched;

use std::cell::Cell;
use std::fmt;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use corelane_codec::control_message::PayloadCodec;
use corelane_codec::discovery::{EndpointRecord, ModelRecord, Transport};
use corelane_codec::path::{EndpointId, TcpTransport, instance_path};
use serde::Serialize;
use serde_json::value::RawValue;
use thiserror::Error;
use tokio::sync::watch;

use crate::config::{self, Backend};

pub use etcd::EtcdDiscovery;
pub use etcd_options::{BeforeRegister, EtcdAuth, EtcdOptions};
pub use file::{FileDiscovery, FileOptions};
pub use memory::{MemoryDiscovery, MemoryStore};
pub use shared::Watch;
pub use watched::Freshness;

/// Longest wait for a confirmation after an outage; see [`watched`].
pub const CONFIRM_MAX: Duration = Duration::from_secs(10);

/// A key and its value, as stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The full key, bucket included.
    pub key: String,
    /// The JSON value.
    pub value: Vec<u8>,
}

impl Entry {
    /// A key and a record under it.
    fn new(key: String, record: &impl Serialize) -> Self {
        // Records are structs of strings and numbers, which always have a JSON form; an empty
        // value, which every reader skips, stands where a panic would.
        let value = serde_json::to_vec(record).unwrap_or_default();
        Self { key, value }
    }
}

/// Builds a record's key and value for an identity.
type Build = Rc<dyn Fn(u64) -> Entry>;

/// A record of ours: a name that is unique in this process, and how to build it for an id.
#[derive(Clone)]
pub struct Record {
    name: String,
    build: Build,
}

impl Record {
    /// Any record; `build` gets the current instance id and must always answer the same for it.
    pub fn new(name: impl Into<String>, build: impl Fn(u64) -> Entry + 'static) -> Self {
        Self {
            name: name.into(),
            build: Rc::new(build),
        }
    }

    /// The instance record of an endpoint that we serve at `address`.
    pub fn instance(endpoint: &EndpointId, address: SocketAddr, codec: PayloadCodec) -> Self {
        let endpoint = endpoint.clone();
        Self::new(Self::instance_name(&endpoint), move |id| {
            let path = instance_path(id, &endpoint);
            let tcp = TcpTransport {
                address,
                path: &path,
            };
            let transport = Transport::Tcp(tcp.value());
            let mut record = EndpointRecord::new(&endpoint, id, transport);
            record.request_plane_codec = Some(codec);
            Entry::new(record.key().to_string(), &record)
        })
    }

    /// The name that [`Record::instance`] gives.
    pub fn instance_name(endpoint: &EndpointId) -> String {
        format!("instance {endpoint}")
    }

    /// A model card under an endpoint of ours; the card's content is passed on untouched.
    pub fn card(endpoint: &EndpointId, suffix: Option<&str>, card: &RawValue) -> Self {
        let name = Self::card_name(endpoint, suffix);
        let (endpoint, card) = (endpoint.clone(), card.to_owned());
        let suffix = suffix.map(str::to_owned);
        Self::new(name, move |id| {
            let mut record = ModelRecord::new(&endpoint, id, card.clone());
            record.model_suffix = suffix.clone();
            Entry::new(record.key().to_string(), &record)
        })
    }

    /// The name that [`Record::card`] gives.
    pub fn card_name(endpoint: &EndpointId, suffix: Option<&str>) -> String {
        format!("card {endpoint} {}", suffix.unwrap_or(""))
    }

    /// Unique in this process; what [`Discovery::unregister`] asks for.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Key and value under `id`.
    pub fn entry(&self, id: u64) -> Entry {
        (self.build)(id)
    }
}

impl fmt::Debug for Record {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Record")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// What became of a registration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Registered {
    /// The record is in the store.
    Stored,
    /// The store is away; the record is remembered and will be stored when it is back.
    Deferred,
}

/// Why discovery refused.
#[derive(Debug, Error)]
pub enum DiscoveryError {
    /// An option cannot be used.
    #[error("{0}")]
    Option(String),
    /// The store could not be reached at start.
    #[error(
        "no contact with {store} after {waited:?}: {cause}; check that it runs and can be reached"
    )]
    StartUp {
        /// Which store, with its address.
        store: String,
        /// How long it was tried.
        waited: Duration,
        /// The last failure.
        cause: String,
    },
    /// A record of this name is registered already; use replace.
    #[error("{0:?} is registered already; replace it or unregister it first")]
    AlreadyRegistered(String),
    /// The store cannot hold this record, now or later.
    #[error("cannot store {key:?}: {cause}")]
    Refused {
        /// The record's key.
        key: String,
        /// What is wrong with it.
        cause: String,
    },
    /// The discovery was closed.
    #[error("discovery is closed; nothing can be registered any more")]
    Closed,
}

/// Plain counters and gauges of one discovery, read when metrics are scraped.
#[derive(Debug, Default)]
pub struct DiscoveryStats {
    /// Counter: contact lost and sought again, by lease keeper and watches together.
    pub reconnects: Cell<u64>,
    /// Counter: full lists applied (the first one of each watch included).
    pub resyncs: Cell<u64>,
    /// Counter: leases lost; each one gave us a new identity.
    pub lease_losses: Cell<u64>,
    /// Counter: writes that failed and were put off.
    pub writes_deferred: Cell<u64>,
    /// Gauge: watches that are stale now; 0 means that every directory is fresh.
    pub stale_watches: Cell<u64>,
    /// Gauge: keys in all watched directories.
    pub watched_keys: Cell<u64>,
    /// Counter: stored values refused by watches (not a record, too long, too many).
    pub rejected_records: Cell<u64>,
    /// Counter: instances that are good records but cannot be dialled, once per key and reason.
    pub rejected_instances: Cell<u64>,
    /// Counter: instances whose key and value disagree, once per key.
    pub mismatched_instances: Cell<u64>,
    /// Counter: resyncs after an outage that left removals to be confirmed.
    pub removals_deferred: Cell<u64>,
    /// Counter: model cards not republished because another card holds their place.
    pub card_conflicts: Cell<u64>,
    /// Counter: files of others deleted because nobody refreshed them (file backend).
    pub expired_files: Cell<u64>,
}

impl DiscoveryStats {
    /// Adds `count` to one of the counters.
    pub(crate) fn add(&self, counter: &Cell<u64>, count: u64) {
        counter.set(counter.get() + count);
    }
}

/// One process's access to discovery; clones share identity and records.
#[derive(Clone)]
pub enum Discovery {
    /// In this process only.
    Memory(MemoryDiscovery),
    /// Processes that share a directory.
    File(FileDiscovery),
    /// A cluster.
    Etcd(EtcdDiscovery),
}

macro_rules! each {
    ($self:expr, $backend:ident => $call:expr) => {
        match $self {
            Discovery::Memory($backend) => $call,
            Discovery::File($backend) => $call,
            Discovery::Etcd($backend) => $call,
        }
    };
}

impl Discovery {
    /// The id under which our records are stored now.
    pub fn instance_id(&self) -> u64 {
        *each!(self, backend => backend.identity()).borrow()
    }

    /// Says when the identity changed. It turns before the records appear under the new id.
    pub fn identity(&self) -> watch::Receiver<u64> {
        each!(self, backend => backend.identity())
    }

    /// All ids whose requests are meant for us: the present one first, then a few former ones,
    /// which clients may still use until they have seen the change.
    pub fn served_ids(&self) -> Vec<u64> {
        let mut ids = vec![self.instance_id()];
        if let Self::Etcd(etcd) = self {
            ids.extend(etcd.former().into_iter().rev());
        }
        ids
    }

    /// The request paths under which `endpoint` is asked of us: one for each of
    /// [`Discovery::served_ids`], in that order.
    pub fn request_paths(&self, endpoint: &EndpointId) -> Vec<Vec<u8>> {
        let path = |id| instance_path(id, endpoint).into_bytes();
        self.served_ids().into_iter().map(path).collect()
    }

    /// Our counters.
    pub fn stats(&self) -> &Rc<DiscoveryStats> {
        each!(self, backend => backend.stats())
    }

    /// Stores a record and keeps it stored until it is unregistered.
    ///
    /// # Errors
    /// When its name is taken, the store can never hold it, or the discovery is closed. A store
    /// that is away is no error: [`Registered::Deferred`].
    pub async fn register(&self, record: Record) -> Result<Registered, DiscoveryError> {
        if each!(self, backend => backend.has(record.name())) {
            return Err(DiscoveryError::AlreadyRegistered(record.name().to_owned()));
        }
        self.replace(record).await
    }

    /// Stores another content under the same name; registers it when there was none.
    ///
    /// # Errors
    /// As [`Discovery::register`], except that the name may be taken.
    pub async fn replace(&self, record: Record) -> Result<Registered, DiscoveryError> {
        each!(self, backend => backend.replace(record).await)
    }

    /// Removes the record of this name; nothing happens when there is none. While the store is
    /// away the removal is remembered.
    pub async fn unregister(&self, name: &str) {
        each!(self, backend => backend.unregister(name).await)
    }

    /// Removes all records but stays usable.
    pub async fn unregister_all(&self) {
        each!(self, backend => backend.unregister_all().await)
    }

    /// Removes all records, gives the lease back and refuses later registrations. Takes a few
    /// seconds at most; what could not be removed expires by itself.
    pub async fn close(&self) {
        each!(self, backend => backend.close().await)
    }

    /// Watches all keys under `prefix` (bucket, then names, with the closing slash).
    pub fn watch<T: 'static>(&self, prefix: &str, parse: watched::Parse<T>) -> Watch<T> {
        each!(self, backend => backend.watch(prefix, parse))
    }
}

/// Opens what the configuration says: our own memory is `store`, and `before_register` is etcd's.
///
/// # Errors
/// The store cannot be reached.
pub(crate) async fn open(
    config: &config::Discovery,
    store: &MemoryStore,
    before_register: Option<BeforeRegister>,
) -> anyhow::Result<Discovery> {
    let lookup = |name: &str| config.variable(name);
    Ok(match config.backend {
        Backend::Memory => Discovery::Memory(MemoryDiscovery::new(store)),
        Backend::File => Discovery::File(FileDiscovery::open(FileOptions::from_env(lookup)).await?),
        Backend::Etcd => {
            let mut settings = EtcdOptions::from_env(lookup)?;
            settings.before_register = before_register;
            let endpoints = settings.endpoints.join(",");
            tracing::info!(endpoints, "connecting to etcd");
            Discovery::Etcd(EtcdDiscovery::connect(settings).await?)
        }
    })
}

/// A random identity for stores that grant none; positive as an `i64`, like etcd's lease ids.
pub(crate) fn random_id() -> u64 {
    let (high, low) = uuid::Uuid::new_v4().as_u64_pair();
    // Version and variant bits of one half are hidden under random bits of the other.
    ((high ^ low.rotate_left(17)) >> 1).max(1)
}
