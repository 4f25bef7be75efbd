//! `corelane dump`: what the cores of a running router have done last.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::cli::{self, Exit};
use crate::flight::{self, Block};
use crate::status_client;

/// Lines printed at once.
const LINES: usize = 4096;

/// What is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DumpArgs {
    /// Where the records are.
    pub source: Source,
    /// Records before the last so much of time are left out; for a process that runs.
    pub last: Duration,
    /// One core, or all.
    pub core: Option<u32>,
    /// Whether to print JSON lines.
    pub json: bool,
}

/// Where flight records are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// In a process, whose status server is here: `HOST:PORT`.
    Running(String),
    /// In a file that such a process has written.
    File(PathBuf),
}

/// Prints them in the order of their times.
///
/// # Errors
/// Nobody answers, the file is none of ours, or standard output cannot be written.
pub fn dump(args: &DumpArgs) -> Result<Exit> {
    let blocks = match &args.source {
        Source::Running(address) => fetch(address, args)?,
        Source::File(path) => {
            let bytes = std::fs::read(path)
                .with_context(|| format!("cannot read the file {}", path.display()))?;
            flight::parse_all(&bytes).map_err(|at| {
                let path = path.display();
                anyhow::anyhow!("{path}: no flight records at byte {at}; it is cut off, or no dump")
            })?
        }
    };
    let blocks = blocks.iter();
    let wanted = blocks.filter(|block| args.core.is_none_or(|core| core == block.core));
    let mut lines: Vec<(u64, u64, u32, &_)> = wanted
        .flat_map(|block| {
            let line = |record| (block.unix_ns_of(record), record.number, block.core, record);
            block.records.iter().map(line)
        })
        .collect();
    lines.sort_by_key(|(unix_ns, number, core, _)| (*unix_ns, *core, *number));
    for some in lines.chunks(LINES) {
        let mut text = String::new();
        for (unix_ns, _, core, record) in some {
            text += &match args.json {
                true => flight::json_line(*core, *unix_ns, record),
                false => flight::text_line(*core, *unix_ns, record),
            };
            text.push('\n');
        }
        cli::print(&text)?;
    }
    Ok(Exit::Done)
}

/// Asks core after core, each until it has nothing older than the question.
fn fetch(address: &str, args: &DumpArgs) -> Result<Vec<Block>> {
    let mut blocks = Vec::new();
    let cores = args.core.map_or(0..=u32::MAX, |core| core..=core);
    let last_ms = u64::try_from(args.last.as_millis()).unwrap_or(u64::MAX);
    for core in cores {
        let (mut from, mut end) = (0, u64::MAX);
        while from <= end {
            let path = format!("{}?core={core}&from={from}&last_ms={last_ms}", flight::PATH);
            let asked = status_client::get(address, &path);
            let (status, body) = asked.with_context(|| {
                format!("cannot ask {address}; name its status server with --status HOST:PORT")
            })?;
            match status {
                200 => {}
                404 if args.core.is_none() && core > 0 => return Ok(blocks),
                status => {
                    let said = String::from_utf8_lossy(&body);
                    bail!("{address} answers {status}: {}", said.trim());
                }
            }
            let Some((block, _)) = Block::parse(&body) else {
                bail!("{address} answers with something else; is it of another version?");
            };
            end = end.min(block.written);
            from = block.next;
            blocks.push(block);
        }
    }
    Ok(blocks)
}
