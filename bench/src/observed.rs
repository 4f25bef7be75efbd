//! Everything that can watch a corelane while it works, switched on for as long as its arm is
//! measured: `/metrics` scraped each second, and `corelane top` on a terminal of its own.
//!
//! The flight recorder and the traces are settings of the process ([`Watching`]).

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, park_timeout, spawn};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::servers::{Server, find_program, http_get};
use crate::usage_error;

const SCRAPE_EVERY: Duration = Duration::from_secs(1);

/// How a corelane is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Watching {
    /// As it comes: flight recorder, and nobody who asks.
    Default,
    /// Not at all.
    Off,
    /// By everything.
    On,
    /// Not at all, once more: what this differs by from the first is noise.
    OffAgain,
}

impl Watching {
    /// The arms of a run.
    pub(crate) fn arms(observed: bool) -> &'static [Self] {
        match observed {
            true => &[Self::Off, Self::On, Self::OffAgain],
            false => &[Self::Default],
        }
    }

    /// What the name of an arm ends with.
    pub(crate) fn suffix(self) -> &'static str {
        match self {
            Self::Default => "",
            Self::Off => UNWATCHED,
            Self::On => "/watched",
            Self::OffAgain => "/unwatched-again",
        }
    }

    /// Lines for the table `[core]`.
    pub(crate) fn core(self) -> &'static [&'static str] {
        match self {
            Self::Default | Self::On => &[],
            Self::Off | Self::OffAgain => &["flight_records = 0"],
        }
    }

    /// What is added to the environment: spans, of which one trace in a hundred is kept.
    pub(crate) fn variables(self) -> Vec<(String, String)> {
        let on = [
            ("DYN_LOGGING_JSONL", "1"),
            ("OTEL_TRACES_SAMPLE_RATIO", "0.01"),
        ];
        let own = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
        let wanted = on.into_iter().filter(|_| self == Self::On);
        wanted.map(own).collect()
    }
}

/// What the arm is called that others of its kind are compared with.
pub(crate) const UNWATCHED: &str = "/unwatched";

/// A corelane that is to be watched while it is measured.
pub(crate) struct Watched {
    /// The program that `top` is of.
    pub(crate) program: PathBuf,
    /// For its output.
    pub(crate) dir: PathBuf,
    /// Its status server.
    pub(crate) status: SocketAddr,
}

/// Those who watch, until it is dropped.
pub(crate) struct Watch {
    stop: Arc<AtomicBool>,
    scraper: Option<JoinHandle<u64>>,
    top: Server,
}

impl Watch {
    /// Looks whether a terminal can be made for `corelane top`.
    pub(crate) fn check() -> Result<()> {
        let found = find_program(Path::new("script"));
        let missing = || usage_error("--observed wants script on PATH (apt-get install bsdutils)");
        found.map(drop).ok_or_else(missing)
    }

    /// Begins to watch.
    pub(crate) fn start(watched: &Watched) -> Result<Self> {
        let (status, program) = (watched.status, watched.program.display());
        let top = format!("'{program}' top --address {status}");
        let mut command = Command::new("script");
        let inside = format!("stty cols 80 rows 24; exec {top}");
        command
            .args(["-q", "-e", "-c", &inside, "/dev/null"])
            .env("TERM", "xterm");
        let top = Server::start("top", command, &watched.dir, None)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let scraper = spawn(move || scrape(status, &stopped));
        Ok(Self {
            stop,
            scraper: Some(scraper),
            top,
        })
    }

    /// Ends it; answers how many scrapes there were.
    ///
    /// # Errors
    /// There was none, or `top` has ended: the arm was not watched.
    pub(crate) fn finish(mut self) -> Result<u64> {
        self.top.check_alive()?;
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
