//! `corelane reload`: a running router reads its configuration again.

use std::fmt::Write;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::cli::{self, Exit};
use crate::reload::{Outcome, PATH, Report};
use crate::status_client;

/// How often it is looked whether a long one has ended.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// What is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReloadArgs {
    /// The status server of the process: `HOST:PORT`.
    pub status: String,
    /// Whether to print the answer as it came.
    pub json: bool,
}

/// Asks for it, waits for its end, and prints what came of it.
///
/// # Errors
/// Nobody answers, or it has begun another one already; standard output cannot be written.
pub fn reload(args: &ReloadArgs) -> Result<Exit> {
    let address = &args.status;
    let asked = || format!("cannot ask {address}; name its status server with --status HOST:PORT");
    let (mut status, mut body) = status_client::post(address, PATH).with_context(asked)?;
    if status == 409 {
        bail!("{address} reloads already, or ends; ask again");
    }
    let report = loop {
        if !matches!(status, 200 | 202) {
            let said = String::from_utf8_lossy(&body);
            bail!("{address} answers {status}: {}", said.trim());
        }
        let report = serde_json::from_slice::<Report>(&body);
        let report = report.with_context(|| {
            format!("{address} answers with something else; is it of another version?")
        })?;
        if !report.busy {
            break report;
        }
        std::thread::sleep(LOOK_EVERY);
        (status, body) = status_client::get(address, PATH).with_context(asked)?;
    };
    match args.json {
        true => cli::print(&(serde_json::to_string(&report)? + "\n"))?,
        false => cli::print(&text(&report))?,
    }
    Ok(match report.result {
        Outcome::Applied | Outcome::Unchanged => Exit::Done,
        Outcome::Refused => Exit::Usage,
        Outcome::None | Outcome::RolledBack | Outcome::GivenUp => Exit::Failed,
    })
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    let what = match report.result {
        Outcome::Applied => "applied",
        Outcome::Unchanged => "nothing has changed",
        Outcome::Refused => "refused, nothing is changed",
        Outcome::RolledBack => "taken back, all is as it was",
        Outcome::None | Outcome::GivenUp => "given up",
    };
    for reason in &report.reasons {
        let _ = writeln!(text, "{reason}");
    }
    for warning in &report.warnings {
        let _ = writeln!(text, "warning: {warning}");
    }
    let _ = writeln!(text, "{what}: generation {}", report.generation);
    for key in &report.changed {
        let _ = writeln!(text, "  {key}");
    }
    if let Some(core) = report.core {
        let (requests, took) = (report.watched_requests, report.took_ms);
        let _ = writeln!(
            text,
            "core {core} was first, with {requests} requests; {took} ms"
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_refused_is_said_line_by_line() {
        let report = Report {
            result: Outcome::Refused,
            reasons: vec!["c.toml:3:8: port cannot change".into()],
            ..Report::default()
        };
        let said = text(&report);
        let lines: Vec<&str> = said.lines().collect();
        let nothing = "refused, nothing is changed: generation 1";
        assert_eq!(lines, ["c.toml:3:8: port cannot change", nothing]);
    }
}
