//! The service manager that started this process, systemd or one like it, is told how the process
//! is: one datagram each to the Unix socket that NOTIFY_SOCKET names (`sd_notify(3)`).
//!
//! | told | when |
//! |---|---|
//! | `READY=1` | `/health` says ready for the first time |
//! | `STATUS=` | what is served, or what a drain waits for; when that changes |
//! | `WATCHDOG=1` | each third of WATCHDOG_USEC, while everybody makes progress |
//! | `RELOADING=1` with `MONOTONIC_USEC=` | a reload of the configuration begins |
//! | `READY=1` again | it has ended, however it did |
//! | `STOPPING=1` | a drain begins |
//! | `EXTEND_TIMEOUT_USEC=` | as long as the drain goes on, which has bounds of its own |
//!
//! Nobody waits for the manager: what it does not take now is told again at the next look.

use std::cell::RefCell;
use std::fmt::Write;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use crate::env::Env;

/// How often the process looks at itself, when no watchdog wants it more often.
pub const LOOK_EVERY: Duration = Duration::from_millis(500);
/// A drain asks for so much time more, and asks again after a third of it.
const EXTENSION: Duration = Duration::from_secs(30);
/// A watchdog that wants to hear more often than this is not understood as one: an idle core looks
/// up four times a second.
const WATCHDOG_MIN: Duration = Duration::from_secs(2);

/// How the process is.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Standing {
    /// It serves.
    pub ready: bool,
    /// It takes a changed configuration over.
    pub reloading: bool,
    /// It is leaving.
    pub stopping: bool,
    /// The longest time for which a part of it has made no progress.
    pub still: Duration,
    /// The same for people, one line.
    pub status: String,
}

/// The service manager, if there is one.
#[derive(Debug, Default)]
pub struct Manager {
    told: Option<(UnixDatagram, SocketAddr)>,
    watchdog: Option<Duration>,
    said: RefCell<Said>,
}

/// What it knows.
#[derive(Clone, Debug, Default)]
struct Said {
    ready: bool,
    reloading: bool,
    stopping: bool,
    status: String,
    beat: Option<Instant>,
    extended: Option<Instant>,
}

impl Manager {
    /// The one that the environment names. One that cannot be told is a warning, no failure.
    pub fn from_env(env: &Env) -> Self {
        let told = env.get("NOTIFY_SOCKET").and_then(|name| {
            let opened = open(name);
            let failed = |error: &io::Error| tracing::warn!(%error, "NOTIFY_SOCKET {name}");
            opened.inspect_err(failed).ok()
        });
        let watchdog = told
            .as_ref()
            .and_then(|_| watchdog(env, std::process::id()));
        Self {
            told,
            watchdog,
            said: RefCell::default(),
        }
    }

    /// How long it waits for a sign of life, if it does.
    pub fn watchdog(&self) -> Option<Duration> {
        self.watchdog
    }

    /// How often [`Manager::tell`] is to be called.
    pub fn look_every(&self) -> Duration {
        let beat = self.watchdog.map(|limit| limit / 6);
        beat.map_or(LOOK_EVERY, |beat| beat.min(LOOK_EVERY))
    }

    /// Tells it what it does not know yet.
    pub fn tell(&self, standing: &Standing, now: Instant) {
        let Some((socket, address)) = &self.told else {
            return;
        };
        let mut said = self.said.borrow().clone();
        let message = said.news(standing, self.watchdog, now);
        if message.is_empty() {
            return;
        }
        match socket.send_to_addr(message.as_bytes(), address) {
            Ok(_) => drop(self.said.replace(said)),
            Err(error) => tracing::debug!(%error, "the service manager was not told"),
        }
    }
}

impl Said {
    /// The lines that are news, all in one message; after it they are known.
    fn news(&mut self, standing: &Standing, watchdog: Option<Duration>, now: Instant) -> String {
        let mut out = String::new();
        let mut say = |key: &str, value: &dyn std::fmt::Display| {
            // Writing into a string does not fail.
            let _ = writeln!(out, "{key}={value}");
        };
        if standing.ready && !self.ready && !standing.stopping {
            self.ready = true;
            say("READY", &1);
        } else if self.ready && !standing.stopping && standing.reloading != self.reloading {
            // One that has never said ready has nothing to go back to.
            self.reloading = standing.reloading;
            match standing.reloading {
                true => {
                    say("RELOADING", &1);
                    say("MONOTONIC_USEC", &monotonic_us());
                }
                false => say("READY", &1),
            }
        }
        if standing.stopping && !self.stopping {
            self.stopping = true;
            say("STOPPING", &1);
        }
        if standing.stopping && is_due(self.extended, EXTENSION / 3, now) {
            self.extended = Some(now);
            say("EXTEND_TIMEOUT_USEC", &EXTENSION.as_micros());
        }
        if let Some(limit) = watchdog
            && is_due(self.beat, limit / 3, now)
            && standing.still < limit / 3
        {
            self.beat = Some(now);
            say("WATCHDOG", &1);
        }
        if standing.status != self.status {
            self.status.clone_from(&standing.status);
            say("STATUS", &self.status.replace('\n', " "));
        }
        out
    }
}

/// The clock that a manager compares with the time of its signal.
fn monotonic_us() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1_000
}

fn is_due(last: Option<Instant>, every: Duration, now: Instant) -> bool {
    last.is_none_or(|last| now.saturating_duration_since(last) >= every)
}

/// A socket, and where the manager listens: a path, or with `@` a name without a file.
fn open(name: &str) -> io::Result<(UnixDatagram, SocketAddr)> {
    let address = match name.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None if name.starts_with('/') => SocketAddr::from_pathname(name)?,
        None => {
            let why = "is neither a path nor begins with @; going on without a service manager";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    Ok((socket, address))
}

/// The time after which the manager takes process `own` for dead.
fn watchdog(env: &Env, own: u32) -> Option<Duration> {
    let of = env.get("WATCHDOG_PID").map(str::trim);
    if of.is_some_and(|of| of != own.to_string()) {
        return None;
    }
    let text = env.get("WATCHDOG_USEC")?;
    let limit = text.trim().parse().ok().map(Duration::from_micros);
    match limit {
        Some(limit) if limit >= WATCHDOG_MIN => Some(limit),
        _ => {
            let least = WATCHDOG_MIN.as_micros();
            tracing::warn!(
                "WATCHDOG_USEC is {text}, and at least {least} can be kept: no signs of life are \
                 sent; write WatchdogSec=30 in the unit"
            );
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(30);

    fn env(pairs: &[(&str, &str)]) -> Env {
        Env::of(
            pairs
                .iter()
                .map(|(name, value)| ((*name).into(), (*value).into())),
        )
    }

    fn standing(status: &str) -> Standing {
        Standing {
            status: status.into(),
            ..Standing::default()
        }
    }

    #[test]
    fn news_are_told_once_and_in_the_order_of_a_life() {
        let (mut said, start) = (Said::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut news = |standing: &Standing, at| said.news(standing, None, at);
        let mut now = standing("starting");
        assert_eq!(news(&now, at(0)), "STATUS=starting\n");
        assert_eq!(news(&now, at(1)), "");
        (now.ready, now.status) = (true, "serving\nall".into());
        assert_eq!(news(&now, at(2)), "READY=1\nSTATUS=serving all\n");
        now.ready = false;
        assert_eq!(news(&now, at(3)), "");
        now.ready = true;
        assert_eq!(news(&now, at(4)), "", "ready is said once");
        now.stopping = true;
        assert_eq!(
            news(&now, at(5)),
            "STOPPING=1\nEXTEND_TIMEOUT_USEC=30000000\n"
        );
        assert_eq!(news(&now, at(14)), "");
        assert_eq!(news(&now, at(15)), "EXTEND_TIMEOUT_USEC=30000000\n");
    }

    #[test]
    fn a_reload_begins_and_ends_with_a_word() {
        let mut said = Said::default();
        let start = Instant::now();
        let mut news = |ready, reloading, stopping| {
            let now = Standing {
                ready,
                reloading,
                stopping,
                ..Standing::default()
            };
            said.news(&now, None, start)
        };
        assert_eq!(news(false, true, false), "", "it was not ready yet");
        assert_eq!(news(true, false, false), "READY=1\n");
        let before = monotonic_us();
        let begun = news(true, true, false);
        let time = begun.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap();
        let time: u64 = time.trim_end().parse().unwrap();
        assert!((before..=monotonic_us()).contains(&time));
        assert_eq!(news(false, true, false), "", "it is under way");
        assert_eq!(news(false, false, false), "READY=1\n");
        news(true, true, false);
        let left = news(true, false, true);
        assert!(left.starts_with("STOPPING=1\n") && !left.contains("READY"));
    }

    #[test]
    fn who_leaves_before_it_was_ready_never_says_ready() {
        let mut said = Said::default();
        let now = Standing {
            ready: true,
            stopping: true,
            ..Standing::default()
        };
        let news = said.news(&now, None, Instant::now());
        assert!(
            news.starts_with("STOPPING=1\n") && !news.contains("READY"),
            "{news}"
        );
    }

    #[test]
    fn signs_of_life_stop_with_the_progress_of_one_part() {
        let (mut said, start) = (Said::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut now = Standing::default();
        let mut beats = |still: u64, second| {
            now.still = Duration::from_secs(still);
            said.news(&now, Some(LIMIT), at(second))
                .contains("WATCHDOG=1")
        };
        assert!(beats(0, 0) && !beats(0, 9) && beats(9, 10));
        assert!(!beats(10, 20) && !beats(40, 50), "a part stands still");
        assert!(beats(0, 51), "it goes on");
    }

    #[test]
    fn a_watchdog_is_taken_from_the_environment_if_it_is_ours() {
        let of = |pairs: &[(&str, &str)]| watchdog(&env(pairs), 77);
        let limit = ("WATCHDOG_USEC", "30000000");
        assert_eq!(of(&[limit]), Some(LIMIT));
        assert_eq!(of(&[limit, ("WATCHDOG_PID", "77")]), Some(LIMIT));
        assert_eq!(of(&[limit, ("WATCHDOG_PID", "78")]), None);
        assert_eq!(of(&[]), None);
        for wrong in ["0", "200000", "-1", "soon"] {
            assert_eq!(of(&[("WATCHDOG_USEC", wrong)]), None, "{wrong}");
        }
    }

    #[test]
    fn datagrams_reach_a_path_and_a_name_without_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let name = format!("corelane-test-{}", std::process::id());
        let abstracted = SocketAddr::from_abstract_name(&name).unwrap();
        let places = [
            (
                UnixDatagram::bind(&path).unwrap(),
                path.to_str().unwrap().to_owned(),
            ),
            (
                UnixDatagram::bind_addr(&abstracted).unwrap(),
                format!("@{name}"),
            ),
        ];
        for (listener, name) in places {
            let manager = Manager::from_env(&env(&[("NOTIFY_SOCKET", &name)]));
            manager.tell(&standing("here"), Instant::now());
            let mut bytes = [0; 64];
            let got = listener.recv(&mut bytes).unwrap();
            assert_eq!(&bytes[..got], b"STATUS=here\n");
        }
    }

    #[test]
    fn what_was_not_taken_is_told_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let name = path.to_str().unwrap().to_owned();
        let manager = Manager::from_env(&env(&[("NOTIFY_SOCKET", &name)]));
        manager.tell(&standing("lost"), Instant::now());
        let listener = UnixDatagram::bind(&path).unwrap();
        manager.tell(&standing("lost"), Instant::now());
        let mut bytes = [0; 64];
        let got = listener.recv(&mut bytes).unwrap();
        assert_eq!(&bytes[..got], b"STATUS=lost\n");
        let none = Manager::from_env(&env(&[("NOTIFY_SOCKET", "relative")]));
        assert!(none.told.is_none());
    }
}
