//! Our registrations in etcd: one lease, all records under it, and both made anew when the
//! lease is lost (`spec/events-discovery.md` §4.7, §10.1).
//!
//! ```text
//!  keeper task: keep lease alive -> lost? grant another, identity changes -> wake the writer
//!                               -> contact back?                          -> wake the writer
//!  writer task: put whatever is not known to be stored; delete what should be gone
//!  callers:     change the wanted set, try to write at once, leave failures to the writer
//! ```
//! The wanted set is the truth. A failed write is never lost and never ends the process.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use corelane_codec::path::INSTANCES_BUCKET;
use etcd_client::{Client, Compare, CompareOp, PutOptions, Txn, TxnOp, TxnOpResponse};
use tokio::sync::{Mutex, Notify, watch};
use tokio::time::{Instant, sleep, timeout};

use super::etcd_watch::follow;
use super::shared::{AbortOnDrop, Shared};
use super::watched::Parse;
use super::{DiscoveryError, DiscoveryStats, Entry, EtcdOptions, Record, Registered, Watch};
use crate::lease::{self, Backoff, Ended, Lease, jittered};

/// Longest pause between two attempts at start (§4.7).
const STARTUP_PAUSE_LONGEST: Duration = Duration::from_secs(30);
/// A contact that lived this long was a success: the next loss is repaired at once.
const LIVED: Duration = Duration::from_secs(5);
/// Former identities that are remembered.
const FORMER_MAX: usize = 4;
/// Longest time that closing may take.
const CLOSE_MAX: Duration = Duration::from_secs(5);

/// One identity in etcd; clones share it.
#[derive(Clone)]
pub struct EtcdDiscovery(Rc<Handle>);

/// Ends the tasks when the last clone goes, which the tasks' own references could not.
struct Handle {
    inner: Rc<Inner>,
    tasks: RefCell<Vec<AbortOnDrop>>,
}

struct Inner {
    client: Client,
    options: EtcdOptions,
    lease: Cell<Lease>,
    identity: watch::Sender<u64>,
    wanted: RefCell<BTreeMap<String, Wanted>>,
    /// Keys of unregistered records whose deletion has not succeeded yet.
    unwanted: RefCell<BTreeSet<String>>,
    /// One write at a time, so that replace and re-registration cannot overtake each other.
    writing: Mutex<()>,
    wake_writer: Notify,
    /// A write was told that there is no such lease: the keeper must look at once.
    doubt_lease: Notify,
    /// Identities that we had before, the latest last.
    former: RefCell<Vec<u64>>,
    closed: Cell<bool>,
    stats: Rc<DiscoveryStats>,
}

struct Wanted {
    record: Record,
    /// What is known to be stored under the present lease.
    stored: Option<Entry>,
}

impl EtcdDiscovery {
    /// Connects and gets a lease, with pauses of 1, 2, 4 ... 30 s between attempts.
    ///
    /// # Errors
    /// When an endpoint cannot be parsed, or there was no success within the start-up timeout.
    pub async fn connect(options: EtcdOptions) -> Result<Self, DiscoveryError> {
        let began = Instant::now();
        let mut pause = Duration::from_secs(1);
        let (client, lease) = loop {
            let cause = match first_contact(&options, began).await {
                Ok(contact) => break contact,
                Err(FirstContact::Useless(error)) => return Err(error),
                Err(FirstContact::Failed(cause)) => cause,
            };
            let left = options.startup_timeout.saturating_sub(began.elapsed());
            if left <= pause {
                return Err(DiscoveryError::StartUp {
                    store: format!("etcd at {}", options.endpoints.join(",")),
                    waited: began.elapsed(),
                    cause,
                });
            }
            tracing::warn!(cause, ?pause, ?left, "no contact with etcd yet");
            sleep(pause).await;
            pause = (pause * 2).min(STARTUP_PAUSE_LONGEST);
        };
        tracing::info!(lease = format_args!("{:x}", lease.id), ttl = ?lease.ttl, "lease granted");
        let inner = Rc::new(Inner {
            client,
            options,
            lease: Cell::new(lease),
            identity: watch::Sender::new(lease.id as u64),
            wanted: RefCell::default(),
            unwanted: RefCell::default(),
            writing: Mutex::new(()),
            wake_writer: Notify::new(),
            doubt_lease: Notify::new(),
            former: RefCell::default(),
            closed: Cell::new(false),
            stats: Rc::default(),
        });
        let keeper = tokio::task::spawn_local(keep_lease(inner.clone())).abort_handle();
        let writer = tokio::task::spawn_local(write_when_woken(inner.clone())).abort_handle();
        let tasks = RefCell::new(vec![AbortOnDrop(keeper), AbortOnDrop(writer)]);
        Ok(Self(Rc::new(Handle { inner, tasks })))
    }

    pub(super) fn identity(&self) -> watch::Receiver<u64> {
        self.0.inner.identity.subscribe()
    }

    pub(super) fn former(&self) -> Vec<u64> {
        self.0.inner.former.borrow().clone()
    }

    pub(super) fn stats(&self) -> &Rc<DiscoveryStats> {
        &self.0.inner.stats
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.0.inner.wanted.borrow().contains_key(name)
    }

    pub(super) async fn replace(&self, record: Record) -> Result<Registered, DiscoveryError> {
        let inner = &self.0.inner;
        if inner.closed.get() {
            return Err(DiscoveryError::Closed);
        }
        let name = record.name().to_owned();
        inner.want(record);
        match inner.write_one(&name).await {
            Ok(()) => Ok(Registered::Stored),
            Err(cause) => {
                inner.put_off(&name, &cause);
                Ok(Registered::Deferred)
            }
        }
    }

    pub(super) async fn unregister(&self, name: &str) {
        let inner = &self.0.inner;
        if inner.unwant(name)
            && let Err(cause) = inner.delete_unwanted().await
        {
            inner.put_off(name, &cause);
        }
    }

    pub(super) async fn unregister_all(&self) {
        let inner = &self.0.inner;
        let names: Vec<String> = inner.wanted.borrow().keys().cloned().collect();
        for name in &names {
            inner.unwant(name);
        }
        if let Err(cause) = inner.delete_unwanted().await {
            inner.put_off("all records", &cause);
        }
    }

    /// Instances go first, in revisions of their own, so that readers stop sending before the
    /// cards vanish; the lease takes the rest.
    pub(super) async fn close(&self) {
        let inner = &self.0.inner;
        if inner.closed.replace(true) {
            return;
        }
        self.0.tasks.borrow_mut().clear();
        let names: Vec<String> = inner.wanted.borrow().keys().cloned().collect();
        for name in &names {
            inner.unwant(name);
        }
        let instances = format!("{}/", INSTANCES_BUCKET);
        inner
            .unwanted
            .borrow_mut()
            .retain(|key| key.starts_with(&instances));
        let lease = inner.lease.get();
        let ending = async {
            if let Err(cause) = inner.delete_unwanted().await {
                tracing::warn!(cause, "instances not deleted, the lease takes them");
            }
            lease::revoke(&inner.client, lease, inner.options.rpc_timeout).await
        };
        match timeout(CLOSE_MAX, ending).await {
            Ok(Ok(())) => tracing::info!(lease = format_args!("{:x}", lease.id), "lease revoked"),
            Ok(Err(cause)) => tracing::warn!(cause, ttl = ?lease.ttl, "lease left to expire"),
            Err(_) => tracing::warn!(ttl = ?lease.ttl, "etcd is slow, lease left to expire"),
        }
    }

    pub(super) fn watch<T: 'static>(&self, prefix: &str, parse: Parse<T>) -> Watch<T> {
        let inner = &self.0.inner;
        let (stats, options) = (inner.stats.clone(), &inner.options);
        let shared = Shared::new(prefix, parse, stats.clone(), options.confirm_after);
        let task = tokio::task::spawn_local(follow(
            inner.client.clone(),
            prefix.to_owned(),
            options.rpc_timeout,
            shared.clone(),
            stats,
        ));
        Watch::new(shared, Some(AbortOnDrop(task.abort_handle())))
    }
}

enum FirstContact {
    /// No attempt can succeed.
    Useless(DiscoveryError),
    Failed(String),
}

async fn first_contact(
    options: &EtcdOptions,
    began: Instant,
) -> Result<(Client, Lease), FirstContact> {
    let left = options.startup_timeout.saturating_sub(began.elapsed());
    let deadline = options
        .rpc_timeout
        .min(left.max(Duration::from_millis(100)));
    let connecting = Client::connect(&options.endpoints, Some(options.connect_options()));
    let client = match timeout(deadline, connecting).await {
        Ok(Ok(client)) => client,
        Ok(Err(
            error @ (etcd_client::Error::InvalidArgs(_) | etcd_client::Error::InvalidUri(_)),
        )) => {
            let endpoints = options.endpoints.join(",");
            let text = format!("etcd endpoints {endpoints:?}: {error}; write http://host:port");
            return Err(FirstContact::Useless(DiscoveryError::Option(text)));
        }
        Ok(Err(error)) => return Err(FirstContact::Failed(error.to_string())),
        Err(_) => {
            return Err(FirstContact::Failed(format!(
                "no answer within {deadline:?}"
            )));
        }
    };
    let lease = lease::grant(&client, options.lease_ttl, deadline).await;
    lease
        .map(|lease| (client, lease))
        .map_err(FirstContact::Failed)
}

/// The keeper. Never ends by itself.
async fn keep_lease(inner: Rc<Inner>) {
    let mut backoff = Backoff::reconnect();
    let mut in_contact = true;
    loop {
        let began = Instant::now();
        let (lease, deadline) = (inner.lease.get(), inner.options.rpc_timeout);
        let alive = || {
            if !std::mem::replace(&mut in_contact, true) {
                tracing::info!(lease = format_args!("{:x}", lease.id), "lease survived");
                inner.doubt_all();
            }
        };
        let doubt = &inner.doubt_lease;
        let ended = lease::keep_alive(&inner.client, lease, deadline, doubt, alive).await;
        if began.elapsed() >= LIVED {
            backoff.reset();
        }
        match ended {
            Ended::Lost => replace_lease(&inner, lease, &mut backoff).await,
            Ended::Broken(cause) => {
                let pause = backoff.pause();
                tracing::warn!(cause, ?pause, "no contact with etcd, lease in danger");
                inner.stats.add(&inner.stats.reconnects, 1);
                in_contact = false;
                sleep(pause).await;
            }
        }
    }
}

/// Gets a new lease, however long it takes, and with it a new identity.
async fn replace_lease(inner: &Inner, lost: Lease, backoff: &mut Backoff) {
    inner.stats.add(&inner.stats.lease_losses, 1);
    tracing::error!(
        lease = format_args!("{:x}", lost.id),
        "lease lost, asking for another"
    );
    let options = &inner.options;
    let granted = loop {
        match lease::grant(&inner.client, options.lease_ttl, options.rpc_timeout).await {
            Ok(granted) => break granted,
            Err(cause) => {
                let pause = backoff.pause();
                tracing::warn!(cause, ?pause, "no new lease yet");
                sleep(pause).await;
            }
        }
    };
    inner.lease.set(granted);
    inner.remember(lost);
    // Keys of the lost lease went with it.
    inner.unwanted.borrow_mut().clear();
    inner.identity.send_replace(granted.id as u64);
    tracing::warn!(
        lease = format_args!("{:x}", granted.id),
        "new lease, new identity"
    );
    inner.doubt_all();
}

/// The writer. Tries until nothing is left to do, then sleeps until woken.
async fn write_when_woken(inner: Rc<Inner>) {
    let mut announced = inner.lease.get().id;
    loop {
        inner.wake_writer.notified().await;
        let mut backoff = Backoff::reconnect();
        loop {
            let id = inner.lease.get().id;
            if std::mem::replace(&mut announced, id) != id
                && let Some(hook) = &inner.options.before_register
            {
                let ready = timeout(inner.options.hook_max, hook(id as u64)).await;
                if ready.is_err() {
                    tracing::warn!("registering although not everything knows the new identity");
                }
            }
            match inner.write_all().await {
                Ok(()) => break,
                Err(cause) => {
                    tracing::warn!(cause, "records not stored yet");
                    let pause = backoff.pause().max(Duration::from_millis(250));
                    sleep(jittered(pause)).await;
                }
            }
        }
    }
}

/// The gRPC code for what does not exist; of all our writes only a lease can be missing.
fn is_not_found(error: &etcd_client::Error) -> bool {
    const NOT_FOUND: i32 = 5;
    matches!(error, etcd_client::Error::GRpcStatus(status) if status.code() as i32 == NOT_FOUND)
}

impl Inner {
    fn remember(&self, lost: Lease) {
        let mut former = self.former.borrow_mut();
        if former.len() >= FORMER_MAX {
            former.remove(0);
        }
        former.push(lost.id as u64);
    }

    fn want(&self, record: Record) {
        let mut wanted = self.wanted.borrow_mut();
        match wanted.get_mut(record.name()) {
            // What is stored is still known: the write compares against it.
            Some(present) => present.record = record,
            None => {
                let name = record.name().to_owned();
                wanted.insert(
                    name,
                    Wanted {
                        record,
                        stored: None,
                    },
                );
            }
        }
    }

    /// Answers whether there was such a record. Its key is to be deleted even if it is not
    /// known to be stored: a write may have succeeded whose answer was lost.
    fn unwant(&self, name: &str) -> bool {
        let Some(gone) = self.wanted.borrow_mut().remove(name) else {
            return false;
        };
        let key = gone.record.entry(self.lease.get().id as u64).key;
        self.unwanted.borrow_mut().insert(key);
        true
    }

    /// Nothing is known to be stored any more; the writer looks at everything again.
    fn doubt_all(&self) {
        for wanted in self.wanted.borrow_mut().values_mut() {
            wanted.stored = None;
        }
        self.wake_writer.notify_one();
    }

    fn put_off(&self, what: &str, cause: &str) {
        tracing::warn!(what, cause, "etcd write put off");
        self.stats.add(&self.stats.writes_deferred, 1);
        self.wake_writer.notify_one();
    }

    async fn write_all(&self) -> Result<(), String> {
        self.delete_unwanted().await?;
        let names: Vec<String> = self.wanted.borrow().keys().cloned().collect();
        for name in names {
            self.write_one(&name).await?;
        }
        Ok(())
    }

    /// Brings one wanted record into the store, unless it is known to be there.
    async fn write_one(&self, name: &str) -> Result<(), String> {
        let _turn = self.writing.lock().await;
        let lease = self.lease.get();
        let (entry, stored) = {
            let wanted = self.wanted.borrow();
            let Some(wanted) = wanted.get(name) else {
                return Ok(());
            };
            (wanted.record.entry(lease.id as u64), wanted.stored.clone())
        };
        if stored.as_ref() == Some(&entry) {
            return Ok(());
        }
        if stored.is_some() {
            self.put(&entry, lease).await?;
        } else {
            self.create(&entry, lease).await?;
        }
        self.unwanted.borrow_mut().remove(&entry.key);
        if self.lease.get() != lease {
            return Err("the lease changed during the write".to_owned());
        }
        if let Some(wanted) = self.wanted.borrow_mut().get_mut(name) {
            wanted.stored = Some(entry);
        } else {
            // Unregistered while it was being written.
            self.unwanted.borrow_mut().insert(entry.key);
            self.wake_writer.notify_one();
        }
        Ok(())
    }

    /// Creates the key by transaction. One that exists carries our id and is therefore ours: it
    /// is left alone when equal and written over when not.
    async fn create(&self, entry: &Entry, lease: Lease) -> Result<(), String> {
        let key = entry.key.as_str();
        let put = PutOptions::new().with_lease(lease.id);
        let create = Txn::new()
            .when([Compare::version(key, CompareOp::Equal, 0)])
            .and_then([TxnOp::put(key, entry.value.as_slice(), Some(put))])
            .or_else([TxnOp::get(key, None)]);
        let mut kv = self.client.kv_client();
        let answer = self.in_time(kv.txn(create)).await?;
        if answer.succeeded() {
            return Ok(());
        }
        let same = answer.op_responses().iter().any(|response| match response {
            TxnOpResponse::Get(found) => found
                .kvs()
                .iter()
                .any(|kv| kv.value() == entry.value && kv.lease() == lease.id),
            _ => false,
        });
        if same {
            Ok(())
        } else {
            self.put(entry, lease).await
        }
    }

    async fn put(&self, entry: &Entry, lease: Lease) -> Result<(), String> {
        let options = PutOptions::new().with_lease(lease.id);
        let mut kv = self.client.kv_client();
        let put = kv.put(entry.key.as_str(), entry.value.as_slice(), Some(options));
        self.in_time(put).await.map(|_| ())
    }

    async fn delete_unwanted(&self) -> Result<(), String> {
        let _turn = self.writing.lock().await;
        loop {
            let Some(key) = self.unwanted.borrow().first().cloned() else {
                return Ok(());
            };
            let mut kv = self.client.kv_client();
            self.in_time(kv.delete(key.as_str(), None)).await?;
            self.unwanted.borrow_mut().remove(&key);
        }
    }

    async fn in_time<T>(
        &self,
        call: impl Future<Output = Result<T, etcd_client::Error>>,
    ) -> Result<T, String> {
        let deadline = self.options.rpc_timeout;
        match timeout(deadline, call).await {
            Ok(answer) => answer.map_err(|error| {
                if is_not_found(&error) {
                    self.doubt_lease.notify_one();
                }
                error.to_string()
            }),
            Err(_) => Err(format!("no answer within {deadline:?}")),
        }
    }
}
