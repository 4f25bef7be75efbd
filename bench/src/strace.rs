//! System calls per request of a process in the middle: a slice of its own under `strace -c -f`,
//! since tracing slows what it watches.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use rustix::process::Signal;

use crate::cpu::process_tree;
use crate::servers::{Server, find_program};

/// A running trace.
pub(crate) struct Trace {
    server: Server,
    summary: PathBuf,
}

impl Trace {
    /// Attaches to `pid` and its descendants and waits until it has.
    pub(crate) fn attach(pid: u32, dir: &Path) -> Result<Self> {
        let program = find_program(Path::new("strace"))
            .context("strace is not on PATH (apt-get install strace), or leave out --strace")?;
        let summary = dir.join("strace.txt");
        let mut command = Command::new(program);
        command.args(["-c", "-f", "-o"]).arg(&summary);
        let pids = process_tree(pid);
        for pid in &pids {
            command.arg("-p").arg(pid.to_string());
        }
        let mut server = Server::start("strace", command, dir, None)?;
        let log = dir.join("strace.log");
        server.wait_until("to attach", || {
            let text = fs::read_to_string(&log).unwrap_or_default();
            (text.matches("attached").count() >= pids.len()).then_some(())
        })?;
        Ok(Self { server, summary })
    }

    /// Detaches and returns how often each system call was made.
    pub(crate) fn finish(mut self) -> Result<BTreeMap<String, u64>> {
        self.server.signal(Signal::INT);
        // It repeats the signal that ended it, so its status says nothing.
        let _ = self.server.wait_end(Duration::from_secs(10));
        let text = fs::read_to_string(&self.summary).context("strace left no summary")?;
        Ok(parse_summary(&text))
    }
}

/// The calls of a summary of `strace -c`: columns are share, seconds, microseconds a call, calls,
/// errors (often empty) and the name.
fn parse_summary(text: &str) -> BTreeMap<String, u64> {
    let mut calls = BTreeMap::new();
    for line in text.lines() {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let (Some(share), Some(count), Some(name)) = (fields.first(), fields.get(3), fields.last())
        else {
            continue;
        };
        if share.parse::<f64>().is_err() || *name == "total" {
            continue;
        }
        if let Ok(count) = count.parse::<u64>() {
            calls.insert((*name).to_string(), count);
        }
    }
    calls
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_is_read() {
        let text = "\
% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 60.00    0.000600           6       100           epoll_wait
 40.00    0.000400           2       200        17 recvfrom
  0.00    0.000000           0         1           close
------ ----------- ----------- --------- --------- ----------------
100.00    0.001000           3       301        17 total
";
        let calls = parse_summary(text);
        let wanted = [("close", 1), ("epoll_wait", 100), ("recvfrom", 200)];
        assert_eq!(
            calls,
            wanted.map(|(name, count)| (name.to_string(), count)).into()
        );
    }
}
