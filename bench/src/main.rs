//! Entry point of `corelane-bench`: what corelane adds and saves, measured beside other ways in
//! one interleaved run.

mod arrivals;
mod cpu;
mod curves;
mod dynamo;
mod event_codec;
mod events;
mod events_broker;
mod events_load;
mod frames;
mod gms;
mod gms_client;
mod gms_report;
mod gms_scene;
mod hdr_files;
mod hiccup;
mod hop;
mod hop_report;
mod hop_scene;
mod html;
mod instructions;
mod interrupt;
mod kv;
mod lane;
mod lane_handoff;
mod lane_path;
mod lane_worker;
mod listener;
mod load;
mod middle;
mod observed;
mod output;
mod pair;
mod pair_client;
mod plots;
mod poll;
mod progress;
mod ratio;
mod report;
mod server;
mod server_load;
mod server_report;
mod server_scene;
mod servers;
mod sink;
mod stock;
mod stock_report;
mod strace;
mod thresholds;

use std::process::ExitCode;

use clap::Parser;

/// Latency and throughput of corelane beside other ways, arms interleaved in one run.
#[derive(Parser)]
#[command(
    name = "corelane-bench",
    version,
    after_help = "\
Examples:
  corelane-bench hop --rounds 6 --seconds 2 --html hop.html
  corelane-bench server --address 127.0.0.1:7000/0/dynamo/router/generate
  corelane-bench stock --dyn-worker PATH --dyn-client PATH
  corelane-bench pair --dyn-worker PATH --dyn-client PATH --loads unary:128:64
  corelane-bench gms --python run/venv/bin/python

Exit status: 0 done, 1 failed (also when requests were refused or thresholds broken), 2 bad usage."
)]
struct Cli {
    #[command(subcommand)]
    command: Job,
}

#[derive(clap::Subcommand)]
enum Job {
    /// Raw request frames and their acks: directly, through corelane, HAProxy and nginx
    Hop(Box<hop::HopArgs>),
    /// Any address of Dynamo's request plane: at rates, or swept to the knee
    Server(Box<server::ServerArgs>),
    /// An unmodified Dynamo client and worker: directly, and through corelane
    Stock(Box<stock::StockArgs>),
    /// Requests to a worker process of this host: a shared-memory lane, Unix socket, TCP loopback
    Lane(Box<lane::LaneArgs>),
    /// The worker behind every arm of `lane`
    #[command(hide = true)]
    LaneWorker(lane_worker::WorkerArgs),
    /// Clients and workers, Dynamo's and corelane's, in pairs
    Pair(Box<pair::PairArgs>),
    /// The GPU memory service, and the same protocol on an asyncio loop
    Gms(Box<gms::GmsArgs>),
    /// Events through corelane's broker, libzmq's proxy and nats-server
    Events(Box<events::EventsArgs>),
    /// Reading an event in place, and with rmp-serde: instructions and nanoseconds
    EventCodec(event_codec::EventCodecArgs),
    /// Looking a prompt up in the index of KV caches: instructions and nanoseconds
    Kv(kv::KvArgs),
    /// The writer that `gms` kills
    #[command(hide = true)]
    GmsWriter(gms_client::WriterArgs),
    /// The corelane client of `pair`
    #[command(hide = true)]
    PairClient(pair_client::ClientArgs),
    /// The worker behind every arm of `hop`
    #[command(hide = true)]
    Sink(sink::SinkArgs),
}

/// An error that is the user's to mend in the command line: exit status 2.
#[derive(Debug)]
struct UsageError(String);

impl std::fmt::Display for UsageError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for UsageError {}

/// Makes a [`UsageError`].
pub(crate) fn usage_error(text: impl Into<String>) -> anyhow::Error {
    UsageError(text.into()).into()
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Job::Hop(args) => hop::run(&args),
        Job::Server(args) => server::run(&args),
        Job::Stock(args) => stock::run(&args),
        Job::Lane(args) => lane::run(&args),
        Job::LaneWorker(args) => lane_worker::run(&args),
        Job::Pair(args) => pair::run(&args),
        Job::PairClient(args) => pair_client::run(&args),
        Job::Gms(args) => gms::run(&args),
        Job::GmsWriter(args) => gms_client::hold(&args),
        Job::Events(args) => events::run(&args),
        Job::EventCodec(args) => event_codec::run(&args),
        Job::Kv(args) => kv::run(&args),
        Job::Sink(args) => sink::run(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("corelane-bench: {error:#}");
            ExitCode::from(if error.is::<UsageError>() { 2 } else { 1 })
        }
    }
}
