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

use anyhow::{Context as _, Result, ensure};
use rustix::process::setpriority_process;

use crate::servers::{Server, find_program, http_get};
use crate::usage_error;

const SCRAPE_EVERY: Duration = Duration::from_secs(1);
/// Who watches is elsewhere as a rule; here it takes what CPU time the others leave.
const LAST: i32 = 19;

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
            Self::On => WATCHED,
            Self::OffAgain => AGAIN,
        }
    }

    /// Lines for the table `[core]`.
    pub(crate) fn core(self) -> &'static [&'static str] {
        match self {
            Self::Default | Self::On => &[],
            Self::Off | Self::OffAgain => &["flight_records = 0"],
        }
    }

    /// What is added to the environment: one request in a hundred has a span, which is a line of
    /// JSON when it ends.
    pub(crate) fn variables(self) -> Vec<(String, String)> {
        let on = [
            ("DYN_LOGGING_JSONL", "1"),
            ("DYN_LOGGING_SPAN_EVENTS", "1"),
            ("OTEL_TRACES_SAMPLE_RATIO", "0.01"),
        ];
        let own = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
        let wanted = on.into_iter().filter(|_| self == Self::On);
        wanted.map(own).collect()
    }
}

const WATCHED: &str = "/watched";
const UNWATCHED: &str = "/unwatched";
const AGAIN: &str = "/unwatched-again";

/// The arms that one is compared with, round by round: the watched one with the mean of the two
/// that are not, and the second of those with the first.
pub(crate) fn yardsticks(arm: &str) -> Vec<String> {
    if let Some(kind) = arm.strip_suffix(WATCHED) {
        vec![format!("{kind}{UNWATCHED}"), format!("{kind}{AGAIN}")]
    } else if let Some(kind) = arm.strip_suffix(AGAIN) {
        vec![format!("{kind}{UNWATCHED}")]
    } else {
        Vec::new()
    }
}

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
    status: SocketAddr,
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
        let mut command = Command::new("nice");
        let inside = format!("stty cols 80 rows 24; exec {top}");
        command
            .args(["-n", &LAST.to_string(), "script"])
            .args(["-q", "-e", "-c", &inside, "/dev/null"])
            .env("TERM", "xterm");
        let top = Server::start("top", command, &watched.dir, None)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let scraper = spawn(move || scrape(status, &stopped));
        Ok(Self {
            status,
            stop,
            scraper: Some(scraper),
            top,
        })
    }

    /// Ends it; answers how many scrapes there were.
    ///
    /// # Errors
    /// There was none, `top` has ended, or requests had no spans: the arm was not watched.
    pub(crate) fn finish(mut self) -> Result<u64> {
        self.top.check_alive()?;
        check_spans(&http_get(self.status, "/metrics")?)?;
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

/// Looks whether one request in a hundred has had a span since the program began. Of a few requests
/// there may be none by chance.
fn check_spans(metrics: &str) -> Result<()> {
    const REQUESTS_MIN: f64 = 3_000.0;
    let requests = sum(metrics, "corelane_requests_total{");
    let spans = sum(metrics, "corelane_spans_routed_total{") + sum(metrics, LOST);
    ensure!(
        requests < REQUESTS_MIN || spans > 0.0,
        "none of {requests} requests has had a span: they were not traced"
    );
    Ok(())
}

const LOST: &str = "corelane_spans_lost_total{";

/// All samples of a metric together.
fn sum(metrics: &str, name: &str) -> f64 {
    let samples = metrics.lines().filter(|line| line.starts_with(name));
    let values = samples.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok());
    values.sum()
}

fn scrape(status: SocketAddr, stopped: &AtomicBool) -> u64 {
    // Of this thread alone; without it the noise is larger, and nothing else is lost.
    let _ = setpriority_process(None, LAST);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_watched_arm_is_compared_with_both_that_are_not() {
        let names = |arms: &[Watching]| -> Vec<String> {
            let name = |one: &Watching| format!("corelane/on_accept{}", one.suffix());
            arms.iter().map(name).collect()
        };
        let arms = names(Watching::arms(true));
        assert_eq!(yardsticks(&arms[1]), [arms[0].clone(), arms[2].clone()]);
        assert_eq!(yardsticks(&arms[2]), [arms[0].clone()]);
        assert!(yardsticks(&arms[0]).is_empty() && yardsticks("direct-again").is_empty());
        assert_eq!(names(Watching::arms(false)), ["corelane/on_accept"]);
        assert!(Watching::Off.variables().is_empty() && !Watching::Off.core().is_empty());
        assert!(!Watching::On.variables().is_empty() && Watching::On.core().is_empty());
    }

    #[test]
    fn an_arm_without_spans_was_not_watched() {
        let metrics = |requests: u32, spans: u32| {
            format!(
                "# TYPE corelane_requests counter\n\
                 corelane_requests_total{{core=\"0\",cpu=\"1\"}} {requests}\n\
                 corelane_requests_total{{core=\"1\",cpu=\"2\"}} 1000\n\
                 corelane_spans_routed_total{{core=\"0\",cpu=\"1\"}} {spans}\n"
            )
        };
        assert_eq!(sum(&metrics(5, 0), "corelane_requests_total{"), 1_005.0);
        for (requests, spans, passes) in [(2_000, 0, false), (2_000, 1, true), (10, 0, true)] {
            let checked = check_spans(&metrics(requests, spans));
            assert_eq!(checked.is_ok(), passes, "{requests} {spans}");
        }
    }
}
