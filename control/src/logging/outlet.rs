//! Standard error that nobody is kept waiting by: what its reader does not take is dropped, counted
//! and told of as soon as there is room again.
//!
//! A pipe (or terminal, or socket) whose reader stands still is full sooner or later, and writing
//! to it then waits for ever; a thread that serves clients must not. So a line is written only
//! where it fits at once. The kernel says that there is room where a pipe has a whole page left,
//! which is why longer lines go page by page.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
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

/// Lines of this process are gathered until the last of these is dropped, and written a page at a
/// time: for short work that writes many.
pub(crate) fn together() -> Together {
    lock().gatherers += 1;
    Together
}

/// See [`together`].
pub(crate) struct Together;

impl Drop for Together {
    fn drop(&mut self) {
        let mut state = lock();
        state.gatherers -= 1;
        if state.gatherers == 0 {
            let lost = state.write_out(io::stderr().as_fd());
            tell_of(state, lost);
        }
    }
}

struct Outlet;

impl Write for Outlet {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut state = lock();
        let lost = state.put(io::stderr().as_fd(), line);
        tell_of(state, lost);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn lock() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts what was lost just now, or says what was lost before.
fn tell_of(mut state: MutexGuard<'_, State>, lost: u64) {
    DROPPED.fetch_add(lost, Ordering::Relaxed);
    let may_tell = lost == 0 && state.held.is_empty();
    let missed = if may_tell {
        std::mem::take(&mut state.missed)
    } else {
        0
    };
    drop(state);
    if missed > 0 {
        tracing::warn!(
            missed,
            "lines of the log were dropped: whoever reads standard error did not keep up"
        );
    }
}

/// What is known of the reader, and what he has not been given yet.
struct State {
    /// Lines that wait for each other.
    held: Vec<u8>,
    /// How many want that.
    gatherers: usize,
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
            held: Vec::new(),
            gatherers: 0,
            failed: None,
            missed: 0,
            torn: false,
        }
    }

    /// Takes a line; answers how many were dropped for it, that one or those held before it.
    fn put(&mut self, to: BorrowedFd<'_>, line: &[u8]) -> u64 {
        self.held.extend_from_slice(line);
        match self.gatherers > 0 && self.held.len() < PIECE_BYTES {
            true => 0,
            false => self.write_out(to),
        }
    }

    /// Writes what is held; answers how many lines of it were dropped, the rest of a torn one
    /// among them.
    fn write_out(&mut self, to: BorrowedFd<'_>) -> u64 {
        let mut held = std::mem::take(&mut self.held);
        if self.torn && !held.is_empty() {
            held.insert(0, b'\n');
        }
        let mut rest = held.as_slice();
        while !rest.is_empty() {
            if !self.has_room(to) {
                let lost = rest.iter().filter(|byte| **byte == b'\n').count() as u64;
                let lost = lost - u64::from(self.torn && rest.len() == held.len());
                self.failed = Some(Instant::now());
                self.missed += lost;
                return lost;
            }
            match rustix::io::write(to, piece(rest)) {
                Ok(written) => {
                    self.torn = written > 0 && rest[written - 1] != b'\n';
                    rest = &rest[written..];
                }
                Err(rustix::io::Errno::INTR) => {}
                // There is no reader, and nobody to be told.
                Err(_) => return 0,
            }
        }
        held.clear();
        self.held = held;
        0
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

/// What goes at once: whole lines, or a page of one that is longer.
fn piece(rest: &[u8]) -> &[u8] {
    if rest.len() <= PIECE_BYTES {
        return rest;
    }
    let page = &rest[..PIECE_BYTES];
    let end = page.iter().rposition(|byte| *byte == b'\n');
    end.map_or(page, |end| &page[..=end])
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
        while state.put(writer.as_fd(), &line) == 0 {
            written += 1;
        }
        assert!(written >= 50, "a pipe takes 64 KiB: {written}");
        assert_eq!(state.put(writer.as_fd(), &line), 1);
        assert_eq!((state.missed, state.torn), (2, false));
        let mut half = vec![0; 32 << 10];
        reader.read_exact(&mut half).unwrap();
        assert_eq!(state.put(writer.as_fd(), &line), 0, "there is room again");
        drop(writer);
        reader.read_to_end(&mut half).unwrap();
        assert_eq!(half, line.repeat(written + 1), "no line was torn");
    }

    #[test]
    fn a_line_that_was_torn_is_ended_before_the_next() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut state = State::new();
        let long = [[b'x'; 1 << 20].as_slice(), b"\n"].concat();
        assert_eq!(state.put(writer.as_fd(), &long), 1);
        let mut all = vec![0; PIECE_BYTES * 4];
        reader.read_exact(&mut all).unwrap();
        assert_eq!(state.put(writer.as_fd(), b"whole\n"), 0);
        drop(writer);
        reader.read_to_end(&mut all).unwrap();
        assert!(all.ends_with(b"x\nwhole\n") && state.missed == 1);
    }

    #[test]
    fn a_reader_that_is_gone_is_no_reason_to_wait() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        assert_eq!(State::new().put(writer.as_fd(), b"line\n"), 0);
    }

    #[test]
    fn lines_that_are_gathered_go_a_page_at_a_time_and_are_dropped_by_the_line() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut state = State::new();
        state.gatherers = 1;
        let line = [[b'x'; 999].as_slice(), b"\n"].concat();
        let (mut given, mut lost) = (0, 0);
        while lost == 0 {
            lost = state.put(writer.as_fd(), &line);
            given += 1;
        }
        assert!(
            (1..=5).contains(&lost),
            "no more than a page and a line: {lost}"
        );
        assert_eq!((state.missed, state.torn), (lost, false));
        assert_eq!(state.put(writer.as_fd(), &line), 0, "held, for now");
        drop(writer);
        let mut all = Vec::new();
        reader.read_to_end(&mut all).unwrap();
        assert_eq!(all, line.repeat(given - lost as usize));
    }
}
