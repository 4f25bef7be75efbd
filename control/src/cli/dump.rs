//! `corelane dump` as clap reads it.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use crate::commands::{DumpArgs, Source};

/// Print what the cores of a running router have done last
///
/// Each core keeps its last records ([core] flight_records): requests begun, routed, forwarded,
/// answered, refused, connections, shortages, commands. They are read while it goes on. Files are
/// what a router has written when a core was in trouble ([control] flight_dir).
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  corelane dump --last 10s
  corelane dump --status 10.0.0.7:9090 --core 2 --json | jq -c 'select(.kind == \"refused\")'
  corelane dump /var/log/corelane/flight-00000001763800308123.bin")]
pub(super) struct DumpOptions {
    /// A file, in place of a running process
    file: Option<PathBuf>,
    /// Where the status server of the process is
    #[arg(
        long,
        value_name = "HOST:PORT",
        default_value = "127.0.0.1:9090",
        conflicts_with = "file"
    )]
    status: String,
    /// How far back: 500ms, 10s, 5m
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = duration,
          conflicts_with = "file")]
    last: Duration,
    /// One core [default: all]
    #[arg(long, value_name = "N")]
    core: Option<u32>,
    /// Print JSON lines
    #[arg(long)]
    json: bool,
}

impl DumpOptions {
    pub(super) fn args(self) -> DumpArgs {
        DumpArgs {
            source: match self.file {
                Some(file) => Source::File(file),
                None => Source::Running(self.status),
            },
            last: self.last,
            core: self.core,
            json: self.json,
        }
    }
}

/// A whole number and a unit.
fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let ms = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        _ => 0,
    };
    let number = number.parse::<u64>().ok().filter(|_| ms > 0);
    let total = number.and_then(|number| number.checked_mul(ms));
    total
        .map(Duration::from_millis)
        .ok_or_else(|| "write a number and ms, s or m, as in 10s".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_a_unit() {
        for (text, ms) in [("500ms", 500), ("10s", 10_000), ("5m", 300_000), ("0s", 0)] {
            assert_eq!(duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for wrong in [
            "",
            "10",
            "s",
            "-1s",
            "1.5s",
            "10 s",
            "1h",
            "99999999999999999999s",
        ] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }
}
