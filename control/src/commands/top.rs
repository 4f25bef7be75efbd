//! `corelane top`: a live view of a running process.

use std::io::{IsTerminal, stdout};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use crate::cli::{self, Exit, Stop};
use crate::top::{self, Ui};

/// What is wanted.
#[derive(Clone, Debug, PartialEq)]
pub struct TopArgs {
    /// The status server of the process: `HOST:PORT`.
    pub address: String,
    /// Between two looks.
    pub interval: Duration,
    /// What is shown, at first.
    pub ui: Ui,
    /// One page as text, so many columns wide, and no terminal.
    pub once: Option<u16>,
}

/// Shows it.
///
/// # Errors
/// Nobody answers, or there is no terminal.
pub fn top(args: &TopArgs) -> Result<Exit> {
    if let Some(width) = args.once {
        let page = top::once(&args.address, args.interval, args.ui, width);
        cli::print(&page.map_err(|why| unreachable(&why))?)?;
        return Ok(Exit::Done);
    }
    if !stdout().is_terminal() {
        let text = "standard output is no terminal; --once prints one page as text";
        return Err(Stop::Usage(text.into()).into());
    }
    // Who is not there at all is told before the screen is taken.
    top::fetch(&args.address, std::time::Instant::now()).map_err(|why| unreachable(&why))?;
    top::live(&args.address, args.interval, args.ui).context("cannot use this terminal")?;
    Ok(Exit::Done)
}

fn unreachable(why: &str) -> anyhow::Error {
    anyhow!("{why}; name the status server of a process with --address HOST:PORT")
}
