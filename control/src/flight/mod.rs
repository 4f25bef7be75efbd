//! What the flight recorders of the cores hold, handed to who asks and written down when a core is
//! in trouble. The shards go on writing meanwhile.
//!
//! ```text
//! block   [clflight][version u32][core u32][cpu u32][count u32]
//!         [now_ns u64][unix_ns u64][next u64][written u64]  then count records of 32 bytes
//! ```
//!
//! `/flight?core=N&from=NUMBER&last_ms=T` answers one block, whose `next` is the `from` to go on
//! with; a file is blocks one after the other. `now_ns` and `unix_ns` are the same moment on the
//! clock of the records and on the calendar's. All numbers are little endian.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use corelane_engine::stats::flight::{RECORD_BYTES, Record};
use hyper::StatusCode;

use crate::cores::CoreView;
use crate::env::Env;

mod print;

pub use print::{json_line, text_line};

/// Where the status server answers.
pub const PATH: &str = "/flight";
/// Records of one answer, at most: 1 MiB.
pub const ANSWER_RECORDS_MAX: usize = 32 * 1024;
/// Bytes before the records of a block.
pub const HEAD_BYTES: usize = 56;
/// Files that a folder keeps; the oldest make room.
const FILES_MAX: usize = 16;

const MAGIC: &[u8; 8] = b"clflight";
const VERSION: u32 = 1;
const OCTETS: &str = "application/octet-stream";
const PLAIN: &str = "text/plain; charset=utf-8";

/// Records of one core, read at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Block {
    /// The core.
    pub core: u32,
    /// Its CPU; `u32::MAX` for any.
    pub cpu: u32,
    /// CLOCK_MONOTONIC at that moment.
    pub now_ns: u64,
    /// The same since 1970.
    pub unix_ns: u64,
    /// The number to go on from.
    pub next: u64,
    /// Records that the core had written.
    pub written: u64,
    /// In the order of their numbers.
    pub records: Vec<Record>,
}

impl Block {
    /// Reads a core: from the record `from` on, but none before the last `last` of time.
    pub fn read(view: &CoreView, from: u64, last: Duration, most: usize) -> Self {
        let flight = &view.stats.flight;
        let (now_ns, unix_ns) = now();
        let begin_ns = now_ns.saturating_sub(u64::try_from(last.as_nanos()).unwrap_or(u64::MAX));
        let mut records = Vec::new();
        let next = flight.read(from.max(flight.since(begin_ns)), most, &mut records);
        Self {
            core: u32::try_from(view.shard).unwrap_or(u32::MAX),
            cpu: u32::try_from(view.cpu).unwrap_or(u32::MAX),
            now_ns,
            unix_ns,
            next,
            written: flight.written(),
            records,
        }
    }

    /// Appends its bytes.
    pub fn write(&self, out: &mut Vec<u8>) {
        let count = u32::try_from(self.records.len()).unwrap_or(u32::MAX);
        out.extend_from_slice(MAGIC);
        for word in [VERSION, self.core, self.cpu, count] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        for word in [self.now_ns, self.unix_ns, self.next, self.written] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        for record in &self.records {
            out.extend_from_slice(&record.to_bytes());
        }
    }

    /// The block at the front of `bytes`, and the rest. `None`: there is no whole one.
    pub fn parse(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let (head, rest) = bytes.split_at_checked(HEAD_BYTES)?;
        let (magic, numbers) = head.split_at_checked(MAGIC.len())?;
        let short = |at: usize| {
            Some(u32::from_le_bytes(
                numbers.get(at..at + 4)?.try_into().ok()?,
            ))
        };
        let long = |at: usize| {
            Some(u64::from_le_bytes(
                numbers.get(at..at + 8)?.try_into().ok()?,
            ))
        };
        if magic != MAGIC || short(0)? != VERSION {
            return None;
        }
        let length = usize::try_from(short(12)?)
            .ok()?
            .checked_mul(RECORD_BYTES)?;
        let (records, rest) = rest.split_at_checked(length)?;
        let record = |bytes: &[u8]| Some(Record::from_bytes(bytes.try_into().ok()?));
        let block = Self {
            core: short(4)?,
            cpu: short(8)?,
            now_ns: long(16)?,
            unix_ns: long(24)?,
            next: long(32)?,
            written: long(40)?,
            records: records
                .chunks_exact(RECORD_BYTES)
                .filter_map(record)
                .collect(),
        };
        Some((block, rest))
    }

    /// When a record was made, in ns since 1970.
    pub fn unix_ns_of(&self, record: &Record) -> u64 {
        let age_ns = self.now_ns.saturating_sub(record.at_ns);
        self.unix_ns.saturating_sub(age_ns)
    }
}

/// All blocks of a file.
///
/// # Errors
/// The offset at which there is no block.
pub fn parse_all(bytes: &[u8]) -> Result<Vec<Block>, usize> {
    let (mut blocks, mut rest) = (Vec::new(), bytes);
    while !rest.is_empty() {
        let (block, after) = Block::parse(rest).ok_or(bytes.len() - rest.len())?;
        blocks.push(block);
        rest = after;
    }
    Ok(blocks)
}

/// Answers a query of `/flight`.
pub fn answer(cores: &[CoreView], query: &str) -> (StatusCode, &'static str, Vec<u8>) {
    let (mut core, mut from, mut last_ms) = (0, 0, u64::MAX);
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let place = match name {
            "core" => &mut core,
            "from" => &mut from,
            "last_ms" => &mut last_ms,
            _ => return wrong("there are core, from and last_ms"),
        };
        match value.parse() {
            Ok(number) => *place = number,
            Err(_) => return wrong("core, from and last_ms are numbers"),
        }
    }
    let Some(view) = cores.iter().find(|view| view.shard as u64 == core) else {
        let text = format!("there is no core {core}; there are {}\n", cores.len());
        return (StatusCode::NOT_FOUND, PLAIN, text.into_bytes());
    };
    let last = Duration::from_millis(last_ms);
    let block = Block::read(view, from, last, ANSWER_RECORDS_MAX);
    let mut bytes = Vec::with_capacity(HEAD_BYTES + block.records.len() * RECORD_BYTES);
    block.write(&mut bytes);
    (StatusCode::OK, OCTETS, bytes)
}

fn wrong(why: &str) -> (StatusCode, &'static str, Vec<u8>) {
    let text = format!("{PATH}: {why}\n");
    (StatusCode::BAD_REQUEST, PLAIN, text.into_bytes())
}

/// Where files go: as configured, else where the service manager wants logs.
pub fn folder(configured: Option<&Path>, env: &Env) -> Option<PathBuf> {
    let logs = env
        .get("LOGS_DIRECTORY")
        .and_then(|logs| logs.split(':').next());
    configured.or(logs.map(Path::new)).map(Path::to_owned)
}

/// Writes all that the cores still hold into a new file of `folder`, and answers which.
///
/// # Errors
/// The folder cannot be written.
pub fn save(cores: &[CoreView], folder: &Path) -> io::Result<PathBuf> {
    fs::create_dir_all(folder)?;
    make_room(folder)?;
    let (_, unix_ns) = now();
    let path = folder.join(format!("flight-{:020}.bin", unix_ns / 1_000_000));
    let mut file = fs::File::create(&path)?;
    for view in cores {
        // A core that goes on may write faster than a disk: what comes from now on is not wanted.
        let (mut from, end) = (0, view.stats.flight.written());
        while from <= end {
            let block = Block::read(view, from, Duration::MAX, ANSWER_RECORDS_MAX);
            let mut bytes = Vec::with_capacity(HEAD_BYTES + block.records.len() * RECORD_BYTES);
            block.write(&mut bytes);
            file.write_all(&bytes)?;
            from = block.next;
        }
    }
    Ok(path)
}

/// Deletes the oldest files, so that one more can be written.
fn make_room(folder: &Path) -> io::Result<()> {
    let mut files: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or("");
        if name.starts_with("flight-") && name.ends_with(".bin") {
            files.push(path);
        }
    }
    files.sort();
    let spare = (files.len() + 1).saturating_sub(FILES_MAX);
    files.iter().take(spare).try_for_each(fs::remove_file)
}

/// This moment on the clock of the shards, and since 1970.
pub(crate) fn now() -> (u64, u64) {
    let monotonic = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let ns = |seconds: i64, ns: i64| seconds as u64 * 1_000_000_000 + ns as u64;
    let unix = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let unix_ns = u64::try_from(unix.as_nanos()).unwrap_or(u64::MAX);
    (ns(monotonic.tv_sec, monotonic.tv_nsec), unix_ns)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use corelane_engine::stats::Stats;

    use super::*;

    fn core(shard: usize) -> CoreView {
        CoreView {
            shard,
            cpu: 4,
            ring: "epoll",
            cause: "configured",
            stats: Arc::new(Stats::new(16)),
        }
    }

    fn block(records: u64) -> Block {
        let record = |number| Record {
            number,
            at_ns: number * 1000,
            kind: 1,
            detail: 2,
            subject: 3,
            value: 4,
        };
        Block {
            core: 1,
            cpu: 4,
            now_ns: 10_000,
            unix_ns: 1_000_000,
            next: records + 1,
            written: records,
            records: (1..=records).map(record).collect(),
        }
    }

    #[test]
    fn blocks_are_read_as_they_were_written() {
        let mut bytes = Vec::new();
        for records in [0, 3] {
            block(records).write(&mut bytes);
        }
        assert_eq!(bytes.len(), 2 * HEAD_BYTES + 3 * RECORD_BYTES);
        assert_eq!(parse_all(&bytes), Ok(vec![block(0), block(3)]));
        let first = block(3).records[0];
        assert_eq!(block(3).unix_ns_of(&first), 1_000_000 - 9_000);
    }

    #[test]
    fn bytes_that_are_no_blocks_are_said_with_their_place() {
        let mut bytes = Vec::new();
        block(2).write(&mut bytes);
        for cut in [1, HEAD_BYTES - 1, bytes.len() - 1] {
            assert_eq!(parse_all(&bytes[..cut]), Err(0), "{cut}");
        }
        let whole = bytes.len();
        bytes.extend_from_slice(b"and so on");
        assert_eq!(parse_all(&bytes), Err(whole));
        bytes[8] = 9;
        assert_eq!(parse_all(&bytes), Err(0), "another version");
    }

    #[test]
    fn queries_are_answered_or_told_what_is_wrong() {
        let cores = [core(0), core(1)];
        let (status, _, bytes) = answer(&cores, "core=1&from=0&last_ms=1000");
        assert_eq!(status, StatusCode::OK);
        let blocks = parse_all(&bytes).unwrap();
        assert_eq!((blocks[0].core, blocks[0].next), (1, 1));
        for (query, wanted) in [
            ("core=2", StatusCode::NOT_FOUND),
            ("core=x", StatusCode::BAD_REQUEST),
            ("cores=1", StatusCode::BAD_REQUEST),
            ("core", StatusCode::BAD_REQUEST),
            ("core=99999999999999999999", StatusCode::BAD_REQUEST),
        ] {
            assert_eq!(answer(&cores, query).0, wanted, "{query}");
        }
    }

    #[test]
    fn a_folder_keeps_the_newest_files() {
        let dir = tempfile::tempdir().unwrap();
        for number in 0..20 {
            fs::write(dir.path().join(format!("flight-{number:020}.bin")), "").unwrap();
        }
        fs::write(dir.path().join("other"), "").unwrap();
        let path = save(&[core(0)], dir.path()).unwrap();
        let mut names: Vec<String> = fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names.len(), FILES_MAX + 1, "{names:?}");
        assert!(names[0].ends_with("05.bin") && names.contains(&"other".to_owned()));
        let saved = fs::read(path).unwrap();
        assert_eq!(parse_all(&saved).unwrap().len(), 1);
    }
}
