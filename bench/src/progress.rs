//! A bar on the terminal that says what runs now, how much of the run is done and how long the rest
//! will take. Nothing where standard error is not a terminal.

use std::io::IsTerminal as _;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A run of so many steps. Dropping it takes the bar away.
pub(crate) struct Progress {
    bar: ProgressBar,
    begun: bool,
}

impl Progress {
    /// A run of `steps` slices, none of them begun.
    pub(crate) fn of(steps: usize) -> Self {
        let target = match std::io::stderr().is_terminal() {
            true => ProgressDrawTarget::stderr(),
            false => ProgressDrawTarget::hidden(),
        };
        let bar = ProgressBar::with_draw_target(Some(steps as u64), target);
        if let Ok(style) = ProgressStyle::with_template("[{bar:24}] {pos}/{len} {eta} left  {msg}")
        {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.enable_steady_tick(Duration::from_millis(500));
        Self { bar, begun: false }
    }

    /// The slice before, if any, is done; this one begins.
    pub(crate) fn begin(&mut self, text: &str) {
        if self.begun {
            self.bar.inc(1);
        }
        self.begun = true;
        self.bar.set_message(text.to_owned());
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
