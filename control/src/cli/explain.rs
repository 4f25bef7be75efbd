//! `corelane explain` as clap reads it.

use clap::{Args, Subcommand};

use super::options::header;
use crate::commands::ExplainArgs;

/// Ask a running process why it does what it does
#[derive(Args, Debug)]
pub(super) struct ExplainOptions {
    #[command(subcommand)]
    pub(super) command: ExplainCommand,
}

#[derive(Debug, Subcommand)]
pub(super) enum ExplainCommand {
    Route(RouteOptions),
}

/// Say which instance a request would get, why, and why not the others
///
/// Nothing is sent to an instance. Each core chooses for the connections that it has, by what it
/// knows; one core's choice is explained, those of the others are named. The body of a request is
/// not part of the question: for the policy kv, give the prompt in a header. Ends with 1 when no
/// instance would get it.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  corelane explain route --path dynamo/router/generate
  corelane explain route --path 10.0.0.7:7000/1f/dynamo/router/generate --header x-session=alice
  corelane explain route --path dynamo/router/generate --core 3 --json | jq .candidates[].why")]
pub(super) struct RouteOptions {
    /// The path of the request, with or without an address before it; or the endpoint offered
    #[arg(long, value_name = "PATH")]
    path: String,
    /// A header of the request; may be given again
    #[arg(long = "header", value_name = "NAME=VALUE", value_parser = header)]
    headers: Vec<(String, String)>,
    /// The core whose choice is explained
    #[arg(long, value_name = "N", default_value_t = 0)]
    core: u32,
    /// Where the status server of the process is
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:9090")]
    address: String,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

impl RouteOptions {
    pub(super) fn args(self) -> ExplainArgs {
        ExplainArgs {
            address: self.address,
            path: self.path,
            headers: self.headers,
            core: self.core,
            json: self.json,
        }
    }
}
