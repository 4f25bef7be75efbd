//! The directory that the file backend shares with others: names, locks, lifetimes
//! (`spec/events-discovery.md` §4.12). Every function here blocks and runs on the blocking pool.
//!
//! ```text
//! {root}/v1/instances/demo%2Fbackend%2Fgenerate%2F1680be164a4bb04     content: the JSON value
//!        `- bucket -' `- key inside the bucket, percent-encoded -'    mtime:   the life sign
//! ```

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{
    AtFlags, CWD, FlockOperation, Mode, OFlags, Timespec, Timestamps, UTIME_NOW, flock, open,
    utimensat,
};

use super::Entry;
use super::watched::{KEYS_MAX, TOTAL_BYTES_MAX, VALUE_BYTES_MAX};

/// Names that begin so are being written and are nobody's record.
pub(super) const TEMPORARY: &str = ".tmp_";
/// Longest file name, in bytes.
const NAME_BYTES_MAX: usize = 255;
/// The directory lock is tried this often, this far apart.
const LOCK_TRIES: u32 = 100;
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// Where a key lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) directory: PathBuf,
    pub(super) name: String,
}

impl Place {
    /// The place of `key` under `root`; the error says why there is none.
    pub(super) fn of(root: &Path, key: &str) -> Result<Self, String> {
        let (bucket, inside) = split_key(key).ok_or("a key is bucket/part/name")?;
        let name = encode(inside);
        if name.len() > NAME_BYTES_MAX {
            return Err(format!(
                "its file name would be {} bytes long, {NAME_BYTES_MAX} fit; use shorter names",
                name.len()
            ));
        }
        Ok(Self {
            directory: root.join(bucket),
            name,
        })
    }

    fn path(&self) -> PathBuf {
        self.directory.join(&self.name)
    }
}

/// The bucket (the first two parts) and the rest.
pub(super) fn split_key(key: &str) -> Option<(&str, &str)> {
    let (second, _) = key.match_indices('/').nth(1)?;
    Some((&key[..second], &key[second + 1..]))
}

/// Every byte that is not an ASCII letter or digit becomes `%` and two upper-case hex digits.
fn encode(text: &str) -> String {
    let mut name = String::with_capacity(text.len() + text.len() / 2);
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() {
            name.push(char::from(byte));
        } else {
            name.push_str(&format!("%{byte:02X}"));
        }
    }
    name
}

/// The reverse; bytes that need not have been encoded are taken as they are.
fn decode(name: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(name.len());
    let mut rest = name.as_bytes();
    while let [first, after @ ..] = rest {
        rest = after;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digits = std::str::from_utf8(rest.get(..2)?).ok()?;
        if digits.starts_with('+') {
            return None;
        }
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        rest = &rest[2..];
    }
    String::from_utf8(bytes).ok()
}

/// Holds the directory's exclusive lock until dropped (closing the descriptor releases it).
struct Locked(#[expect(dead_code, reason = "held for its drop")] OwnedFd);

fn lock(directory: &Path) -> io::Result<Locked> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let descriptor = open(directory, flags, Mode::empty())?;
    for _ in 0..LOCK_TRIES {
        match flock(&descriptor, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(Locked(descriptor)),
            Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        std::thread::sleep(LOCK_PAUSE);
    }
    let text = format!("{} stayed locked by another process", directory.display());
    Err(io::Error::new(io::ErrorKind::TimedOut, text))
}

/// Writes `value` so that readers see the old file or the new one, never a part: into a
/// temporary file, then linked (a new key) or renamed (one that is ours already).
pub(super) fn write(place: &Place, value: &[u8]) -> io::Result<()> {
    fs::create_dir_all(&place.directory)?;
    let _locked = lock(&place.directory)?;
    let temporary = place
        .directory
        .join(format!("{TEMPORARY}{:016x}", super::random_id()));
    let written = File::options()
        .write(true)
        .create_new(true)
        .open(&temporary)
        .and_then(|mut file| file.write_all(value))
        .and_then(|()| match fs::hard_link(&temporary, place.path()) {
            // The key carries our id: what is there is an older value of ours.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                fs::rename(&temporary, place.path())
            }
            linked => linked,
        });
    // After a rename there is none any more; nothing depends on it otherwise.
    let _ = fs::remove_file(&temporary);
    written
}

/// Deletes a file; one that is not there is fine (unlike with Dynamo, Q23).
pub(super) fn remove(place: &Place) -> io::Result<()> {
    let _locked = match lock(&place.directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        locked => locked?,
    };
    match fs::remove_file(place.path()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// Gives the file a new life sign; writes it again when somebody deleted it.
pub(super) fn refresh(place: &Place, value: &[u8]) -> io::Result<()> {
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: UTIME_NOW,
    };
    let times = Timestamps {
        last_access: now,
        last_modification: now,
    };
    // By path, so that no open and close shows up as a change to those who watch.
    match utimensat(CWD, place.path(), &times, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::NOENT) => write(place, value),
        Err(error) => Err(error.into()),
    }
}

/// What a look at a bucket found.
#[derive(Debug, Default)]
pub(super) struct Scan {
    pub(super) entries: Vec<Entry>,
    /// Files deleted because their owners stopped refreshing them.
    pub(super) expired: u64,
}

/// Reads all living files of `bucket` whose key begins with `prefix`. With `delete_expired`
/// the dead ones are removed, else only left out.
pub(super) fn scan(
    root: &Path,
    bucket: &str,
    prefix: &str,
    ttl: Duration,
    delete_expired: bool,
) -> io::Result<Scan> {
    let directory = root.join(bucket);
    let mut found = Scan::default();
    let (mut dead, mut bytes) = (Vec::new(), 0);
    for file in fs::read_dir(&directory)? {
        let file = file?;
        let Ok(name) = file.file_name().into_string() else {
            continue;
        };
        if name.starts_with(TEMPORARY) || found.entries.len() >= KEYS_MAX {
            continue;
        }
        let Some(key) = decode(&name).map(|inside| format!("{bucket}/{inside}")) else {
            continue;
        };
        if !key.starts_with(prefix) {
            continue;
        }
        // Its owner may have deleted it since the directory was read.
        let Ok(metadata) = file.metadata() else {
            continue;
        };
        if !metadata.is_file() {
            continue;
        }
        if is_dead(&metadata, ttl) {
            dead.push(file.path());
        } else if let Some(value) = read(&file.path()) {
            bytes += value.len();
            found.entries.push(Entry { key, value });
        }
        if bytes > TOTAL_BYTES_MAX {
            let text = format!("more than {TOTAL_BYTES_MAX} bytes lie in this bucket");
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, text));
        }
    }
    if delete_expired && !dead.is_empty() {
        found.expired = delete_dead(&directory, &dead, ttl)?;
    }
    Ok(found)
}

/// A time in the future (another clock) counts as alive.
fn is_dead(metadata: &fs::Metadata, ttl: Duration) -> bool {
    metadata
        .modified()
        .ok()
        .and_then(|modified| SystemTime::now().duration_since(modified).ok())
        .is_some_and(|age| age > ttl)
}

/// One byte more than allowed is read, so that the reader can tell and refuse.
fn read(path: &Path) -> Option<Vec<u8>> {
    let mut value = Vec::new();
    let file = File::open(path).ok()?;
    file.take(VALUE_BYTES_MAX as u64 + 1)
        .read_to_end(&mut value)
        .ok()?;
    Some(value)
}

/// Looks again under the lock: an owner may have come back in between.
fn delete_dead(directory: &Path, dead: &[PathBuf], ttl: Duration) -> io::Result<u64> {
    let _locked = lock(directory)?;
    let mut deleted = 0;
    for path in dead {
        let still_dead = fs::symlink_metadata(path).is_ok_and(|found| is_dead(&found, ttl));
        if still_dead && fs::remove_file(path).is_ok() {
            deleted += 1;
        }
    }
    Ok(deleted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_real_listings() {
        let root = Path::new("/r");
        let place = Place::of(root, "v1/instances/demo/backend/generate/1680be164a4bb04").unwrap();
        assert_eq!(place.directory, Path::new("/r/v1/instances"));
        assert_eq!(place.name, "demo%2Fbackend%2Fgenerate%2F1680be164a4bb04");
        assert_eq!(encode("topic/kv_metrics-x"), "topic%2Fkv%5Fmetrics%2Dx");
        assert!(Place::of(root, "v1/instances").is_err());
        assert!(Place::of(root, &format!("v1/mdc/{}", "/".repeat(86))).is_err());
    }

    #[test]
    fn decoding_reverses_and_refuses_what_is_no_name() {
        for text in ["a/b-c_d", "", "ünï/%", "x"] {
            assert_eq!(decode(&encode(text)).as_deref(), Some(text));
        }
        for bad in ["%", "%2", "%zz", "%+1", "%FF"] {
            assert_eq!(decode(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_written_key_is_listed_until_it_dies() {
        let root = tempfile::tempdir().unwrap();
        let place = Place::of(root.path(), "v1/instances/a/b/c/1").unwrap();
        write(&place, b"one").unwrap();
        write(&place, b"two").unwrap();
        fs::write(place.directory.join(".tmp_0123456789abcdef"), "half").unwrap();
        let look = |delete| {
            let ttl = Duration::from_secs(10);
            scan(
                root.path(),
                "v1/instances",
                "v1/instances/a/b/c/",
                ttl,
                delete,
            )
            .unwrap()
        };
        let entry = Entry {
            key: "v1/instances/a/b/c/1".into(),
            value: b"two".to_vec(),
        };
        assert_eq!(look(true).entries, [entry]);

        let file = File::options().write(true).open(place.path()).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(11))
            .unwrap();
        assert_eq!(
            (look(false).entries.len(), place.path().exists()),
            (0, true)
        );
        assert_eq!((look(true).expired, place.path().exists()), (1, false));

        refresh(&place, b"three").unwrap();
        assert_eq!(look(true).entries[0].value, b"three");
        remove(&place).unwrap();
        remove(&place).unwrap();
        assert!(look(true).entries.is_empty());
    }
}
