//! Discovery among processes that share a directory, compatible with Dynamo's file backend
//! (`spec/events-discovery.md` §4.12).
//!
//! A watch is a full scan of its bucket, woken by inotify and repeated a few times per TTL:
//! lifetimes must be looked at anyway, and a scan cannot miss what a full event queue dropped.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, SystemTime};

use rustix::fs::inotify;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};

use super::file_store::{self, Place, Scan, TEMPORARY, split_key};
use super::shared::{AbortOnDrop, Shared, Sink};
use super::watched::{Gap, Parse};
use super::{
    CONFIRM_MAX, DiscoveryError, DiscoveryStats, Entry, Record, Registered, Watch, random_id,
};

/// After the first sign of a change, this long is waited for more of them.
const SETTLE: Duration = Duration::from_millis(20);

/// Where and how long files live.
#[derive(Clone, Debug)]
pub struct FileOptions {
    /// The shared directory.
    pub root: PathBuf,
    /// A file that nobody refreshed for this long is dead. All processes must agree; Dynamo's
    /// is 10 s.
    pub ttl: Duration,
}

impl FileOptions {
    /// `DYN_FILE_KV`, or `dynamo_store_kv` in the temporary directory; TTL 10 s.
    pub fn from_env(lookup: impl Fn(&str) -> Option<String>) -> Self {
        let root = lookup("DYN_FILE_KV")
            .filter(|path| !path.is_empty())
            .map(PathBuf::from);
        Self {
            root: root.unwrap_or_else(|| std::env::temp_dir().join("dynamo_store_kv")),
            ttl: Duration::from_secs(10),
        }
    }

    /// How often owners refresh and readers look: three times in a TTL, but at most once a
    /// second.
    fn period(&self) -> Duration {
        (self.ttl / 3).max(Duration::from_secs(1))
    }
}

/// One identity in a shared directory; clones share it.
#[derive(Clone)]
pub struct FileDiscovery(Rc<Handle>);

struct Handle {
    inner: Rc<Inner>,
    refresher: RefCell<Option<AbortOnDrop>>,
}

struct Inner {
    options: FileOptions,
    identity: watch::Sender<u64>,
    records: RefCell<BTreeMap<String, (Place, Vec<u8>)>>,
    /// One change at a time, so that a refresh cannot bring back what was just removed.
    writing: tokio::sync::Mutex<()>,
    closed: Cell<bool>,
    stats: Rc<DiscoveryStats>,
}

impl FileDiscovery {
    /// A new identity, with a random id. The directory is made when it is missing.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub async fn open(options: FileOptions) -> Result<Self, DiscoveryError> {
        let root = options.root.clone();
        let made = blocking(move || std::fs::create_dir_all(root)).await;
        made.map_err(|cause| {
            let root = options.root.display();
            DiscoveryError::Option(format!("file discovery cannot use {root}: {cause}"))
        })?;
        let inner = Rc::new(Inner {
            options,
            identity: watch::Sender::new(random_id()),
            records: RefCell::default(),
            writing: tokio::sync::Mutex::new(()),
            closed: Cell::new(false),
            stats: Rc::default(),
        });
        let refresher = tokio::task::spawn_local(refresh_always(inner.clone())).abort_handle();
        Ok(Self(Rc::new(Handle {
            inner,
            refresher: RefCell::new(Some(AbortOnDrop(refresher))),
        })))
    }

    pub(super) fn identity(&self) -> watch::Receiver<u64> {
        self.0.inner.identity.subscribe()
    }

    pub(super) fn stats(&self) -> &Rc<DiscoveryStats> {
        &self.0.inner.stats
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.0.inner.records.borrow().contains_key(name)
    }

    pub(super) async fn replace(&self, record: Record) -> Result<Registered, DiscoveryError> {
        let inner = &self.0.inner;
        if inner.closed.get() {
            return Err(DiscoveryError::Closed);
        }
        let Entry { key, value } = record.entry(*inner.identity.borrow());
        let place = Place::of(&inner.options.root, &key)
            .map_err(|cause| DiscoveryError::Refused { key, cause })?;
        let _turn = inner.writing.lock().await;
        let owned = (place.clone(), value.clone());
        inner
            .records
            .borrow_mut()
            .insert(record.name().to_owned(), owned);
        match blocking(move || file_store::write(&place, &value)).await {
            Ok(()) => Ok(Registered::Stored),
            Err(cause) => {
                let name = record.name();
                tracing::warn!(
                    name,
                    cause,
                    "file not written, the next refresh tries again"
                );
                inner.stats.add(&inner.stats.writes_deferred, 1);
                Ok(Registered::Deferred)
            }
        }
    }

    pub(super) async fn unregister(&self, name: &str) {
        let inner = &self.0.inner;
        let _turn = inner.writing.lock().await;
        let gone = inner.records.borrow_mut().remove(name);
        if let Some((place, _)) = gone {
            inner.remove(place).await;
        }
    }

    pub(super) async fn unregister_all(&self) {
        let inner = &self.0.inner;
        let _turn = inner.writing.lock().await;
        for (place, _) in inner.records.take().into_values() {
            inner.remove(place).await;
        }
    }

    pub(super) async fn close(&self) {
        self.0.inner.closed.set(true);
        self.unregister_all().await;
        self.0.refresher.borrow_mut().take();
    }

    pub(super) fn watch<T: 'static>(&self, prefix: &str, parse: Parse<T>) -> Watch<T> {
        let (options, stats) = (self.0.inner.options.clone(), self.0.inner.stats.clone());
        let confirm_after = options.ttl.min(CONFIRM_MAX);
        let shared = Shared::new(prefix, parse, stats.clone(), confirm_after);
        let task = follow(options, prefix.to_owned(), shared.clone(), stats);
        let task = tokio::task::spawn_local(task).abort_handle();
        Watch::new(shared, Some(AbortOnDrop(task)))
    }
}

impl Inner {
    /// What cannot be removed dies by its age, because nobody refreshes it any more.
    async fn remove(&self, place: Place) {
        let name = place.name.clone();
        if let Err(cause) = blocking(move || file_store::remove(&place)).await {
            tracing::warn!(name, cause, "file not deleted, it will expire");
        }
    }
}

/// Renews the life signs of our files.
async fn refresh_always(inner: Rc<Inner>) {
    loop {
        sleep(inner.options.period()).await;
        let _turn = inner.writing.lock().await;
        let owned: Vec<(Place, Vec<u8>)> = inner.records.borrow().values().cloned().collect();
        let refreshed = blocking(move || {
            owned
                .iter()
                .try_for_each(|(place, value)| file_store::refresh(place, value))
        });
        if let Err(cause) = refreshed.await {
            tracing::warn!(cause, "files not refreshed");
            inner.stats.add(&inner.stats.writes_deferred, 1);
        }
    }
}

/// Feeds `sink` with scans until the task is ended.
async fn follow(
    options: FileOptions,
    prefix: String,
    sink: Rc<dyn Sink>,
    stats: Rc<DiscoveryStats>,
) {
    let bucket = split_key(&prefix)
        .map_or(prefix.as_str(), |(bucket, _)| bucket)
        .to_owned();
    let directory = options.root.join(&bucket);
    let mut changes = None;
    let mut last_look = None;
    loop {
        if changes.is_none() {
            changes = Changes::of(&directory).await;
        }
        // Who slept longer than a TTL (a suspended machine) finds all files old, its own and
        // those of the living: nothing may be concluded from that look.
        let slept = last_look.is_some_and(|last: SystemTime| {
            last.elapsed().is_ok_and(|elapsed| elapsed > options.ttl)
        });
        let (root, bucket, within) = (options.root.clone(), bucket.clone(), prefix.clone());
        let ttl = options.ttl;
        let look = blocking(move || file_store::scan(&root, &bucket, &within, ttl, !slept)).await;
        match look {
            Ok(Scan { entries, expired }) => {
                if slept {
                    sink.gap(
                        Gap::Outage,
                        "this process did not run for longer than the TTL",
                    );
                }
                stats.add(&stats.expired_files, expired);
                stats.add(&stats.resyncs, u64::from(last_look.is_none() || slept));
                sink.snapshot(&entries);
                last_look = Some(SystemTime::now());
            }
            Err(cause) => {
                stats.add(&stats.reconnects, 1);
                sink.gap(Gap::Outage, &cause);
                (changes, last_look) = (None, None);
            }
        }
        if wait(&mut changes, options.period()).await == Woken::DirectoryGone {
            sink.gap(Gap::Outage, "the directory was removed");
            (changes, last_look) = (None, None);
        }
    }
}

/// Why a wait ended.
#[derive(PartialEq)]
enum Woken {
    ByChangeOrTime,
    /// Whoever takes the directory away takes living records with it: their owners write them
    /// again, and the directory counts as a store that comes back empty.
    DirectoryGone,
}

/// Waits for a change, a period at most.
async fn wait(changes: &mut Option<Changes>, period: Duration) -> Woken {
    let Some(watching) = changes else {
        sleep(period).await;
        return Woken::ByChangeOrTime;
    };
    let intact = match timeout(period, watching.next()).await {
        Ok(intact) => {
            sleep(SETTLE).await;
            // What came in the meantime is seen by the same scan.
            intact && !watching.drain().directory_gone
        }
        Err(_) => true,
    };
    if intact {
        Woken::ByChangeOrTime
    } else {
        Woken::DirectoryGone
    }
}

/// inotify on one directory.
struct Changes(AsyncFd<OwnedFd>);

/// What the kernel's queue held.
#[derive(Default)]
struct Drained {
    changed: bool,
    directory_gone: bool,
}

impl Changes {
    /// Makes the directory when it is missing. None when it cannot be watched: then the
    /// periodic look alone must do.
    async fn of(directory: &Path) -> Option<Self> {
        let directory = directory.to_owned();
        let watched = blocking(move || {
            std::fs::create_dir_all(&directory)?;
            let flags = inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC;
            let descriptor = inotify::init(flags)?;
            let of_interest = inotify::WatchFlags::CREATE
                | inotify::WatchFlags::CLOSE_WRITE
                | inotify::WatchFlags::MOVE
                | inotify::WatchFlags::DELETE
                | inotify::WatchFlags::DELETE_SELF
                | inotify::WatchFlags::MOVE_SELF
                | inotify::WatchFlags::ONLYDIR;
            inotify::add_watch(&descriptor, &directory, of_interest)?;
            Ok(descriptor)
        });
        let watched = watched
            .await
            .and_then(|descriptor| register(descriptor).map_err(to_text));
        watched
            .inspect_err(|cause| tracing::debug!(cause, "no inotify, the directory is polled"))
            .ok()
            .map(Self)
    }

    /// Waits for a change; false when the directory itself is gone.
    async fn next(&mut self) -> bool {
        loop {
            let Ok(mut ready) = self.0.readable_mut().await else {
                return false;
            };
            let drained = drain(ready.get_inner());
            ready.clear_ready();
            if drained.directory_gone {
                return false;
            }
            if drained.changed {
                return true;
            }
        }
    }

    fn drain(&mut self) -> Drained {
        drain(self.0.get_ref())
    }
}

#[expect(
    deprecated,
    reason = "sound for an OwnedFd, which is open and the same until dropped"
)]
fn register(descriptor: OwnedFd) -> std::io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::new(descriptor)
}

fn to_text(error: std::io::Error) -> String {
    error.to_string()
}

/// Reads all events; those of temporary files say nothing.
fn drain(descriptor: &OwnedFd) -> Drained {
    let mut drained = Drained::default();
    let mut space = [MaybeUninit::uninit(); 4096];
    let mut events = inotify::Reader::new(descriptor, &mut space);
    // An error is an empty queue (or a broken descriptor, which the periodic look outlives).
    while let Ok(event) = events.next() {
        let gone = inotify::ReadFlags::IGNORED
            | inotify::ReadFlags::DELETE_SELF
            | inotify::ReadFlags::MOVE_SELF;
        drained.directory_gone |= event.events().intersects(gone);
        let temporary = event
            .file_name()
            .is_some_and(|name| name.to_bytes().starts_with(TEMPORARY.as_bytes()));
        drained.changed |= !temporary;
    }
    drained
}

/// Runs file work off the control thread.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T, String> {
    match spawn_blocking(work).await {
        Ok(done) => done.map_err(to_text),
        Err(stopped) => Err(stopped.to_string()),
    }
}
