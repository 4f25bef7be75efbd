//! The hiccup meter: a thread that wants to wake every millisecond and records how late it was.
//! What it sees is the machine, not the program under test: no tail is believed beside a bad one.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use hdrhistogram::Histogram;

use crate::report::new_histogram;

const PERIOD: Duration = Duration::from_millis(1);

/// The running meter; dropping it ends its thread.
pub(crate) struct HiccupMeter {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    stop: AtomicBool,
    lateness_ns: Mutex<Histogram<u64>>,
}

impl HiccupMeter {
    /// Starts the thread.
    pub(crate) fn start() -> Result<Self> {
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            lateness_ns: new_histogram().into(),
        });
        let thread = std::thread::Builder::new()
            .name("hiccup".into())
            .spawn({
                let shared = shared.clone();
                move || shared.measure()
            })
            .context("cannot start the thread of the hiccup meter")?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// The lateness in ns since the last call, which begins a new record.
    pub(crate) fn take(&self) -> Histogram<u64> {
        std::mem::replace(
            &mut *self
                .shared
                .lateness_ns
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
            new_histogram(),
        )
    }
}

impl Shared {
    fn measure(&self) {
        // Without it the kernel may wait 50 us for company before it wakes a sleeper.
        set_timer_slack();
        let mut due = Instant::now();
        while !self.stop.load(Ordering::Relaxed) {
            due += PERIOD;
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            let late = due.elapsed();
            let late_ns = u64::try_from(late.as_nanos()).unwrap_or(u64::MAX);
            self.lateness_ns
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .saturating_record(late_ns.max(1));
            if late > PERIOD {
                due = Instant::now();
            }
        }
    }
}

impl Drop for HiccupMeter {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It ends within a period; a panic there has been printed already.
            let _ = thread.join();
        }
    }
}

/// Makes sleeps and timed waits of the calling thread end when they should, to some microseconds.
pub(crate) fn set_timer_slack() {
    // SAFETY: sets a property of the calling thread; the unused arguments are 0 as asked for.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1_u64, 0_u64, 0_u64, 0_u64) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_meter_records_and_begins_anew() {
        let meter = HiccupMeter::start().unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut seen = 0;
        while seen < 5 {
            assert!(Instant::now() < deadline, "{seen} wake-ups in 10 s");
            std::thread::yield_now();
            seen += meter.take().len();
        }
    }
}
