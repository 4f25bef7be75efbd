//! `corelane trace extract` as clap reads it.

use clap::{Args, Subcommand};

use crate::planner::trace::{Extract, Format};

/// Work with traces of requests
#[derive(Args, Debug)]
pub(super) struct TraceOptions {
    #[command(subcommand)]
    pub(super) command: TraceCommand,
}

#[derive(Debug, Subcommand)]
pub(super) enum TraceCommand {
    Extract(ExtractOptions),
}

/// Add a trace up by interval: requests, mean input and output lengths, as JSON
///
/// Reads mooncake records (timestamp in ms, input_length, output_length; times stay as they are)
/// or Dynamo's request traces (their request_end events; times count from the first). A mistake is
/// told as file:line, and nothing is printed then.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  corelane trace extract trace.jsonl
  corelane trace extract traces/ --interval-s 60 > load.json
  corelane trace extract 'traces/*.jsonl.gz' --format dynamo
  corelane trace extract mooncake.jsonl --sparse")]
pub(super) struct ExtractOptions {
    /// Files, globs, or folders of .jsonl and .jsonl.gz shards
    #[arg(required = true, value_name = "INPUT")]
    inputs: Vec<String>,
    /// Seconds of an interval
    #[arg(long, value_name = "S", default_value_t = 180,
          value_parser = clap::value_parser!(u32).range(1..))]
    interval_s: u32,
    /// How records are written [default: as the first one is]
    #[arg(long, value_enum, value_name = "FORMAT")]
    format: Option<Format>,
    /// Leave intervals without requests out, as Dynamo's first extractor did
    #[arg(long)]
    sparse: bool,
}

impl ExtractOptions {
    pub(super) fn args(self) -> Extract {
        Extract {
            inputs: self.inputs,
            interval_s: self.interval_s,
            format: self.format,
            sparse: self.sparse,
        }
    }
}
