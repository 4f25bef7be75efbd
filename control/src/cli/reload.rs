//! `corelane reload` as clap reads it.

use clap::Args;

use crate::commands::ReloadArgs;

/// Have a running router read its configuration again
///
/// It is checked first, and what needs a restart is named with its place: then nothing is changed.
/// One core has it first and is watched ([reload] watch_ms); if it is worse off, all stays as it
/// was. No connection is closed and no request is lost. SIGHUP does the same. Exit code 0 when the
/// file is in force, 2 when it was refused, 1 when it was taken back.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  corelane reload
  corelane reload --status 127.0.0.1:9191 --json
  corelane check && kill -HUP $(pidof corelane)")]
pub(super) struct ReloadOptions {
    /// Where the status server of the process is, on this host
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:9090")]
    status: String,
    /// Print the answer of the process, one JSON object
    #[arg(long)]
    json: bool,
}

impl ReloadOptions {
    pub(super) fn args(self) -> ReloadArgs {
        ReloadArgs {
            status: self.status,
            json: self.json,
        }
    }
}
