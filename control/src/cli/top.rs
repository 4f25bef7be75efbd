//! `corelane top` as clap reads it.

use std::time::Duration;

use clap::Args;

use crate::commands::TopArgs;
use crate::top::{Sort, Ui, View};

/// Watch a running router: its cores, routes, instances, planes and GPU locks
///
/// Asks its status server for /metrics and /overview. CALLS are system calls per request, BUF LOW
/// the least receive buffers that were ever free, LOCAL the part of connections that came by the
/// core's own NIC queue. A core is hot while most of its turns have something to do, cold when it
/// sleeps, still when it does not answer.
///
/// Keys: q quit, s sort, n and p next and previous page, space pause, 1 to 5 or tab what is shown.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  corelane top
  corelane top --address 10.0.0.7:9090 --interval 5
  corelane top --once                              one page as text, for scripts
  corelane top --once --view routes --sort load --width 120")]
pub(super) struct TopOptions {
    /// Where the status server of the process is
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:9090")]
    address: String,
    /// Seconds between two looks
    #[arg(long, value_name = "S", default_value_t = 1.0, value_parser = seconds)]
    interval: f64,
    /// What is shown
    #[arg(long, value_enum, default_value_t)]
    view: View,
    /// What by
    #[arg(long, value_enum, default_value_t)]
    sort: Sort,
    /// Look twice, print one page with all rows, and end
    #[arg(long)]
    once: bool,
    /// Columns of that page
    #[arg(long, value_name = "N", default_value_t = 80, requires = "once",
          value_parser = clap::value_parser!(u16).range(40..=500))]
    width: u16,
}

impl TopOptions {
    pub(super) fn args(self) -> TopArgs {
        TopArgs {
            address: self.address,
            interval: Duration::from_secs_f64(self.interval),
            ui: Ui {
                view: self.view,
                sort: self.sort,
                ..Ui::default()
            },
            once: self.once.then_some(self.width),
        }
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds = text.parse::<f64>().ok();
    let seconds = seconds.filter(|seconds| (0.1..=3600.0).contains(seconds));
    seconds.ok_or_else(|| "write seconds, 0.1 to 3600".to_owned())
}
