//! Elects the active one among standby engines: a file, and the kernel's own lock on it
//! (`spec/gpu-memory.md` §6).
//!
//! The kernel releases the lock when its holder dies, so nobody checks anybody's health. Two traps
//! are avoided here. A second acquire in one process would wait for itself for ever: it is an error
//! at once. And a child that was forked without exec inherits the descriptor, and with it the lock,
//! beyond its parent's death: such a child closes it before anything else runs in it.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use thiserror::Error;

/// Names the lock file.
pub const LOCK_PATH_VARIABLE: &str = "FAILOVER_LOCK_PATH";

/// Where the lock file is unless the variable says otherwise.
pub const LOCK_PATH_DEFAULT: &str = "/shared/failover.lock";

/// Why the lock is not held.
#[derive(Debug, Error)]
pub enum FailoverError {
    /// Another engine holds it.
    #[error("{} was not free in time; its last owner says {owner:?}", path.display())]
    TimedOut {
        /// The file.
        path: PathBuf,
        /// The text in it: a hint, which may be stale.
        owner: String,
    },
    /// This process holds it already, through this value or another.
    #[error("this process holds {} already; release it first", path.display())]
    HeldHere {
        /// The file.
        path: PathBuf,
    },
    /// The process holds too many locks of this kind.
    #[error("this process holds {HELD_MAX} failover locks already; release one first")]
    TooMany,
    /// The file cannot be used.
    #[error("cannot use the lock file {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// One engine's view of the lock.
#[derive(Debug)]
pub struct FailoverLock {
    path: PathBuf,
    held: Option<Held>,
    was_contended: bool,
}

#[derive(Debug)]
struct Held {
    file: File,
    owner: String,
    key: FileKey,
    place: &'static AtomicI32,
}

/// Device and inode.
type FileKey = (u64, u64);

impl FailoverLock {
    /// Nothing is held yet.
    pub fn new(path: impl Into<PathBuf>) -> FailoverLock {
        FailoverLock {
            path: path.into(),
            held: None,
            was_contended: false,
        }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits to become the active engine: at most `timeout`, none is for ever.
    ///
    /// # Errors
    /// Not free in time, held by this very process, or the file cannot be used.
    pub fn acquire(
        &mut self,
        engine_id: &str,
        timeout: Option<Duration>,
    ) -> Result<(), FailoverError> {
        self.was_contended = false;
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        loop {
            let file = self.open()?;
            let key = self.key_of(&file)?;
            let reservation = Reservation::take(key).ok_or_else(|| self.held_here())?;
            // Before there is a lock: a child that is forked right after it must know it already.
            let place = Place::claim(file.as_raw_fd()).ok_or(FailoverError::TooMany)?;
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                // Somebody may have replaced the file between our opening and our locking it; the
                // lock on a file without a name excludes nobody.
                Ok(()) if self.is_current(key) => {
                    return self.take(file, reservation, place, engine_id);
                }
                Ok(()) | Err(Errno::INTR) => continue,
                Err(Errno::WOULDBLOCK) => self.was_contended = true,
                Err(errno) => return Err(self.io(errno.into())),
            }
            drop((place, reservation, file));
            let wait = match deadline {
                Some(deadline) => deadline.saturating_duration_since(Instant::now()),
                None => POLL_INTERVAL,
            };
            if wait.is_zero() {
                return Err(FailoverError::TimedOut {
                    path: self.path.clone(),
                    owner: self.owner().unwrap_or_default(),
                });
            }
            thread::sleep(wait.min(POLL_INTERVAL));
        }
    }

    /// Whether the last acquire found the lock taken at first.
    pub fn was_contended(&self) -> bool {
        self.was_contended
    }

    /// Whether it is held through this value.
    pub fn is_held(&self) -> bool {
        self.held.is_some()
    }

    /// Lets the next engine become active. The file and its text stay.
    pub fn release(&mut self) {
        let Some(held) = self.held.take() else { return };
        if self.owner().ok().as_deref() != Some(held.owner.as_str()) {
            let path = self.path.display().to_string();
            tracing::warn!(
                path,
                owner = held.owner,
                "the lock file names somebody else"
            );
        }
    }

    /// The engine that is written in the file. A hint only: the kernel's lock is the truth, and the
    /// text stays when its writer dies.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn owner(&self) -> io::Result<String> {
        let mut text = String::new();
        File::open(&self.path)?
            .take(OWNER_BYTES_MAX)
            .read_to_string(&mut text)?;
        Ok(text)
    }

    fn open(&self) -> Result<File, FailoverError> {
        // The standard library opens with O_CLOEXEC.
        OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&self.path)
            .map_err(|error| self.io(error))
    }

    fn key_of(&self, file: &File) -> Result<FileKey, FailoverError> {
        let found = file.metadata().map_err(|error| self.io(error))?;
        Ok((found.dev(), found.ino()))
    }

    fn is_current(&self, key: FileKey) -> bool {
        std::fs::metadata(&self.path).is_ok_and(|found| (found.dev(), found.ino()) == key)
    }

    fn take(
        &mut self,
        mut file: File,
        reservation: Reservation,
        place: Place,
        engine_id: &str,
    ) -> Result<(), FailoverError> {
        let owner = format!("engine-{engine_id}");
        let written = file
            .set_len(0)
            .and_then(|()| file.seek(SeekFrom::Start(0)))
            .and_then(|_| file.write_all(owner.as_bytes()));
        let (key, place) = (reservation.keep(), place.keep());
        self.held = Some(Held {
            file,
            owner,
            key,
            place,
        });
        written.map_err(|error| {
            self.held = None;
            self.io(error)
        })
    }

    fn held_here(&self) -> FailoverError {
        FailoverError::HeldHere {
            path: self.path.clone(),
        }
    }

    fn io(&self, source: io::Error) -> FailoverError {
        FailoverError::Io {
            path: self.path.clone(),
            source,
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let ours = self.file.as_raw_fd();
        // In a forked child the place was emptied and the descriptor closed; its number may belong
        // to something else by now, so it must not be closed again.
        match self
            .place
            .compare_exchange(ours, NOTHING, Ordering::AcqRel, Ordering::Acquire)
        {
            Ok(_) => {
                held_here().remove(&(std::process::id(), self.key));
                // `flock` is released explicitly: a descriptor that some child did inherit would
                // otherwise keep it.
                let _ = rustix::fs::flock(&self.file, FlockOperation::Unlock);
            }
            Err(_) => forget_descriptor(&mut self.file),
        }
    }
}

/// Puts a harmless descriptor where a closed one was, so that dropping the file closes only that.
fn forget_descriptor(file: &mut File) {
    if let Ok(null) = File::open("/dev/null") {
        std::mem::forget(std::mem::replace(file, null));
    }
}

/// What this process holds, or is just trying for. With its id: what a forked child finds here is
/// its parent's, and no reason to refuse it.
static HELD_HERE: Mutex<BTreeSet<(u32, FileKey)>> = Mutex::new(BTreeSet::new());

fn held_here() -> MutexGuard<'static, BTreeSet<(u32, FileKey)>> {
    HELD_HERE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A file that this process tries to lock; nobody else in it may meanwhile.
struct Reservation {
    key: Option<FileKey>,
}

impl Reservation {
    fn take(key: FileKey) -> Option<Reservation> {
        // The guard must be gone before a reservation that is not wanted could be dropped.
        let is_new = held_here().insert((std::process::id(), key));
        is_new.then(|| Reservation { key: Some(key) })
    }

    fn keep(mut self) -> FileKey {
        self.key.take().unwrap_or_default()
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            held_here().remove(&(std::process::id(), key));
        }
    }
}

/// Descriptors of held locks, for a forked child to close.
static HELD: [AtomicI32; HELD_MAX] = [const { AtomicI32::new(NOTHING) }; HELD_MAX];

/// A descriptor that a forked child will close.
struct Place {
    place: &'static AtomicI32,
    descriptor: RawFd,
}

impl Place {
    fn claim(descriptor: RawFd) -> Option<Place> {
        heed_forks();
        let is_free = |place: &&AtomicI32| {
            place
                .compare_exchange(NOTHING, descriptor, Ordering::AcqRel, Ordering::Acquire)
                .is_ok()
        };
        let place = HELD.iter().find(is_free)?;
        Some(Place { place, descriptor })
    }

    /// From now on somebody else empties it.
    fn keep(self) -> &'static AtomicI32 {
        std::mem::ManuallyDrop::new(self).place
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let (ours, none) = (self.descriptor, NOTHING);
        let _ = self
            .place
            .compare_exchange(ours, none, Ordering::AcqRel, Ordering::Acquire);
    }
}

/// Makes forked children look at [`HELD`] before they do anything else.
fn heed_forks() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the handler only loads and stores atomics and closes descriptors, all of which is
        // allowed in the child of a process with threads.
        let answer = unsafe { libc::pthread_atfork(None, None, Some(close_in_child)) };
        if answer != 0 {
            tracing::warn!(
                answer,
                "children that are forked without exec would keep the lock"
            );
        }
    });
}

/// Runs in a forked child before anything else: the lock stays with the parent alone.
extern "C" fn close_in_child() {
    for place in &HELD {
        let descriptor = place.swap(NOTHING, Ordering::AcqRel);
        if descriptor != NOTHING {
            // SAFETY: the descriptor was open when the process was forked, and `Held::drop` in this
            // child finds its place empty and leaves it alone.
            unsafe { libc::close(descriptor) };
        }
    }
}

const NOTHING: i32 = -1;
const HELD_MAX: usize = 16;
const OWNER_BYTES_MAX: u64 = 4096;
/// Upstream's; a standby is active at most this much after its turn has come.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    fn lock() -> (tempfile::TempDir, FailoverLock) {
        let dir = tempfile::tempdir().expect("a directory");
        let lock = FailoverLock::new(dir.path().join("failover.lock"));
        (dir, lock)
    }

    #[test]
    fn one_process_holds_it_once_and_says_so() {
        let (_dir, mut lock) = lock();
        lock.acquire("0", None).expect("it is free");
        assert!(lock.is_held() && !lock.was_contended());
        assert_eq!(lock.owner().expect("a file"), "engine-0");
        let again = lock.acquire("0", Some(Duration::ZERO));
        assert!(matches!(again, Err(FailoverError::HeldHere { .. })));
        let mut other = FailoverLock::new(lock.path());
        let refused = other.acquire("1", None);
        assert!(
            matches!(refused, Err(FailoverError::HeldHere { .. })),
            "it would wait for itself"
        );
        lock.release();
        other
            .acquire("1", Some(Duration::ZERO))
            .expect("it is free again");
        assert_eq!(other.owner().expect("a file"), "engine-1");
        drop(other);
        assert_eq!(
            lock.owner().expect("a file"),
            "engine-1",
            "the text stays, and is stale"
        );
    }

    /// Holds the lock as another process would: through a file of its own.
    fn outsider(path: &Path) -> File {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(path);
        let file = file.expect("it opens");
        rustix::fs::flock(&file, FlockOperation::LockExclusive).expect("it locks");
        file
    }

    #[test]
    fn contention_times_out_and_is_remembered_when_it_is_won() {
        let (_dir, mut lock) = lock();
        let holder = outsider(lock.path());
        let late = lock.acquire("1", Some(Duration::from_millis(20)));
        assert!(matches!(late, Err(FailoverError::TimedOut { .. })));
        drop(holder);
        // It comes free after a while; on a busy machine we may look only when it is over.
        for held_ms in [30, 300, 3_000, 30_000] {
            let holder = outsider(lock.path());
            let frees = thread::spawn(move || {
                thread::sleep(Duration::from_millis(held_ms));
                drop(holder);
            });
            lock.acquire("1", Some(Duration::from_secs(120)))
                .expect("it comes free");
            frees.join().expect("it ended");
            if lock.was_contended() {
                break;
            }
            lock.release();
        }
        assert!(lock.was_contended());
        lock.release();
        lock.acquire("1", None).expect("it is free");
        assert!(!lock.was_contended());
    }

    #[test]
    fn a_file_that_was_replaced_is_not_mistaken_for_the_lock() {
        let (_dir, mut lock) = lock();
        let holder = outsider(lock.path());
        std::fs::remove_file(lock.path()).expect("it is there");
        lock.acquire("2", Some(Duration::ZERO))
            .expect("the new file is free");
        assert!(lock.is_current(lock.held.as_ref().expect("held").key));
        drop(holder);
    }
}
