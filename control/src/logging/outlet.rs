//! Standard error that nobody is kept waiting by: what its reader does not take is dropped, counted
//! and told of as soon as there is room again.
//!
//! A pipe (or terminal, or socket) whose reader stands still is full sooner or later, and writing
//! to it then waits for ever; a thread that serves clients must not. So a line is written only
//! where it fits at once. The kernel says that there is room where a pipe has a whole page left,
//! which is why longer lines go page by page.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, BorrowedFd};

/// What a pipe with room takes at once (PIPE_BUF).
const PIECE_BYTES: usize = 4096;
/// How long a reader that took everything so far is waited for.
const PATIENCE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 200_000_000,
};
/// One that did not is waited for no more until so much time has gone by.
const FORGIVEN: Duration = Duration::from_secs(10);

/// Lines of this process that were dropped.
static DROPPED: AtomicU64 = AtomicU64::new(0);
/// Of standard error; its lock keeps two threads from seeing the same room.
static STATE: Mutex<State> = Mutex::new(State::new());

/// How many lines of the log were dropped since this process began.
pub fn dropped() -> u64 {
    DROPPED.load(Ordering::Relaxed)
}

/// Writes lines of the log to standard error; each write is one line.
pub(super) fn stderr() -> impl Write {
    Outlet
}

struct Outlet;

impl Write for Outlet {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let missed = {
            let mut state = STATE.lock().unwrap_or_else(PoisonError::into_inner);
            let to = io::stderr();
            match state.put(to.as_fd(), line) {
                true => std::mem::take(&mut state.missed),
                false => {
                    DROPPED.fetch_add(1, Ordering::Relaxed);
                    0
                }
            }
        };
        if missed > 0 {
            tracing::warn!(
                missed,
                "lines of the log were dropped: whoever reads standard error did not keep up"
            );
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What is known of the reader.
struct State {
    /// When a line was dropped last.
    failed: Option<Instant>,
    /// Lines that were dropped and not yet told of.
    missed: u64,
    /// The last line was written in part.
    torn: bool,
}

impl State {
    const fn new() -> Self {
        Self {
            failed: None,
            missed: 0,
            torn: false,
        }
    }

    /// Writes a line; false if it was dropped, or what was left of it.
    fn put(&mut self, to: BorrowedFd<'_>, line: &[u8]) -> bool {
        let end: &[u8] = if self.torn { b"\n" } else { b"" };
        let whole = [end, line].concat();
        let mut rest = whole.as_slice();
        while !rest.is_empty() {
            if !self.has_room(to) {
                self.failed = Some(Instant::now());
                self.missed += 1;
                self.torn |= rest.len() < whole.len();
                return false;
            }
            match rustix::io::write(to, &rest[..rest.len().min(PIECE_BYTES)]) {
                Ok(written) => rest = &rest[written..],
                Err(rustix::io::Errno::INTR) => {}
                // There is no reader, and nobody to be told.
                Err(_) => return true,
            }
        }
        self.torn = false;
        true
    }

    fn has_room(&self, to: BorrowedFd<'_>) -> bool {
        let failed_lately = self.failed.is_some_and(|at| at.elapsed() < FORGIVEN);
        let patience = match failed_lately {
            true => Timespec::default(),
            false => PATIENCE,
        };
        let mut watched = [PollFd::from_borrowed_fd(to, PollFlags::OUT)];
        // An error is for the write to find.
        poll(&mut watched, Some(&patience)).is_ok_and(|ready| ready > 0)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn lines_that_nobody_takes_are_dropped_whole_and_counted() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut state = State::new();
        let line = [[b'x'; 999].as_slice(), b"\n"].concat();
        let mut written = 0;
        while state.put(writer.as_fd(), &line) {
            written += 1;
        }
        assert!(written >= 50, "a pipe takes 64 KiB: {written}");
        assert!(!state.put(writer.as_fd(), &line));
        assert_eq!((state.missed, state.torn), (2, false));
        let mut half = vec![0; 32 << 10];
        reader.read_exact(&mut half).unwrap();
        assert!(state.put(writer.as_fd(), &line), "there is room again");
        drop(writer);
        reader.read_to_end(&mut half).unwrap();
        assert_eq!(half, line.repeat(written + 1), "no line was torn");
    }

    #[test]
    fn a_line_that_was_torn_is_ended_before_the_next() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut state = State::new();
        assert!(!state.put(writer.as_fd(), &[b'x'; 1 << 20]));
        let mut all = vec![0; PIECE_BYTES * 4];
        reader.read_exact(&mut all).unwrap();
        assert!(state.put(writer.as_fd(), b"whole\n"));
        drop(writer);
        reader.read_to_end(&mut all).unwrap();
        assert!(all.ends_with(b"x\nwhole\n") && state.missed == 1);
    }

    #[test]
    fn a_reader_that_is_gone_is_no_reason_to_wait() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        assert!(State::new().put(writer.as_fd(), b"line\n"));
    }
}
