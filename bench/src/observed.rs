//! Everything that can watch a corelane while it works, switched on for as long as its arm is
//! measured: `/metrics` scraped each second, and `corelane top` on a terminal of its own.
//!
//! The flight recorder and the traces are settings of the process ([`ON`], [`OFF`],
//! [`variables`]).

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, park_timeout, spawn};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::servers::{Server, find_program, http_get};
use crate::usage_error;

/// Lines for the table `[core]` of a process that is watched.
pub(crate) const ON: &[&str] = &["flight_records = 65536"];
/// The same of one that is not.
pub(crate) const OFF: &[&str] = &["flight_records = 0"];
const SCRAPE_EVERY: Duration = Duration::from_secs(1);

/// What is added to the environment of a process that is watched: spans, of which one trace in a
/// hundred is kept.
pub(crate) fn variables() -> Vec<(String, String)> {
    let on = [("DYN_LOGGING_JSONL", "1"), ("OTEL_TRACES_SAMPLE_RATIO", "0.01")];
    let own = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
    on.into_iter().map(own).collect()
}

/// Those who watch, until it is dropped.
pub(crate) struct Watch {
    stop: Arc<AtomicBool>,
    scraper: Option<JoinHandle<u64>>,
    _top: Server,
}

impl Watch {
    /// Looks whether a terminal can be made for `corelane top`.
    pub(crate) fn check() -> Result<()> {
        let found = find_program(Path::new("script"));
        let missing = || usage_error("--observed wants script on PATH (apt-get install bsdutils)");
        found.map(drop).ok_or_else(missing)
    }

    /// Begins to watch the corelane whose status server is at `status`.
    pub(crate) fn start(program: &Path, dir: &Path, status: SocketAddr) -> Result<Self> {
        let top = format!("{} top --address {status}", program.display());
        let mut command = Command::new("script");
        let inside = format!("stty cols 80 rows 24; exec {top}");
        command
            .args(["-q", "-e", "-c", &inside, "/dev/null"])
            .env("TERM", "xterm");
        let top = Server::start("top", command, dir, None)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let scraper = spawn(move || scrape(status, &stopped));
        Ok(Self {
            stop,
            scraper: Some(scraper),
            _top: top,
        })
    }

    /// Ends it; answers how many scrapes there were.
    ///
    /// # Errors
    /// There was none: the arm was not watched.
    pub(crate) fn finish(mut self) -> Result<u64> {
        let scrapes = self.end().unwrap_or(0);
        (scrapes > 0)
            .then_some(scrapes)
            .context("/metrics did not answer while it was to be scraped")
    }

    fn end(&mut self) -> Option<u64> {
        self.stop.store(true, Ordering::Relaxed);
        let scraper = self.scraper.take()?;
        scraper.thread().unpark();
        scraper.join().ok()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.end();
    }
}

fn scrape(status: SocketAddr, stopped: &AtomicBool) -> u64 {
    let mut scrapes = 0;
    while !stopped.load(Ordering::Relaxed) {
        let began = Instant::now();
        scrapes += u64::from(http_get(status, "/metrics").is_ok());
        while !stopped.load(Ordering::Relaxed) && began.elapsed() < SCRAPE_EVERY {
            park_timeout(SCRAPE_EVERY.saturating_sub(began.elapsed()));
        }
    }
    scrapes
}
