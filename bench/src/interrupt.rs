//! Ctrl-C and SIGTERM: remembered, and asked for wherever the bench waits, so that everything it
//! started is stopped on the way out.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

static ASKED: AtomicBool = AtomicBool::new(false);

extern "C" fn remember(_signal: libc::c_int) {
    ASKED.store(true, Ordering::Relaxed);
}

/// From now on SIGINT, SIGTERM and SIGHUP end the run in order.
pub(crate) fn install() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: the handler only stores to an atomic, which a signal handler may do. The flags
        // are those of `signal` in the C library; waits that it restarts ask `check` in time.
        unsafe { libc::signal(signal, remember as *const () as libc::sighandler_t) };
    }
}

/// An error once the user has asked to stop.
pub(crate) fn check() -> Result<()> {
    if ASKED.load(Ordering::Relaxed) {
        bail!("stopped by a signal");
    }
    Ok(())
}

/// Asks `ready` every 10 ms until it has an answer; an error after `limit` names `what`.
pub(crate) fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut ready: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(answer) = ready()? {
            return Ok(answer);
        }
        check()?;
        if Instant::now() >= deadline {
            bail!("waited {} s for {what} in vain", limit.as_secs_f64());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
