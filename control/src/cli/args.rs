//! What the commands are given: checked, plain values.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum;

use crate::config::{Config, Discovery, Drain, EndpointId, Gpu, Inputs, Server};
use crate::gpu_memory::Names;

/// Of `corelane up`.
#[derive(Clone, Debug)]
pub struct UpArgs {
    /// The router: one route, discovery in memory.
    pub config: Config,
    /// Echo workers to start, at least one.
    pub workers: u16,
    /// How they answer.
    pub answer: Answer,
}

/// Of `corelane serve`.
#[derive(Clone, Debug)]
pub struct ServeArgs {
    /// Everything.
    pub config: Config,
    /// What it was read from, to read it again.
    pub inputs: Inputs,
}

/// Of `corelane gms`.
#[derive(Clone, Debug)]
pub struct GmsArgs {
    /// Devices, pools and limits.
    pub gpu: Gpu,
    /// Names that were given by hand.
    pub names: Names,
    /// Where the status server listens; nothing else of it counts.
    pub server: Server,
}

/// Of `corelane gms probe`.
#[derive(Clone, Debug)]
pub struct ProbeArgs {
    /// Sockets to ask; none means those in `folder`.
    pub sockets: Vec<PathBuf>,
    /// Where sockets lie.
    pub folder: PathBuf,
    /// Whether to ask for the history too.
    pub history: bool,
    /// Whether a pool without published contents is a failure.
    pub ready: bool,
    /// Whether to print JSON lines.
    pub json: bool,
    /// Longest wait for one answer.
    pub timeout: Duration,
}

/// How an echo worker answers a request.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Answer {
    /// Items of each response; 0 is an empty stream.
    pub items: u32,
    /// Size of an item; None sends the request's body back.
    pub item_bytes: Option<u32>,
    /// Pause before each item.
    pub delay: Duration,
}

/// Of `corelane worker echo`.
#[derive(Clone, Debug)]
pub struct EchoArgs {
    /// The endpoint that it serves.
    pub endpoint: EndpointId,
    /// How it answers.
    pub answer: Answer,
    /// The codec that it offers.
    pub codec: Codec,
    /// Where it listens: host, port, advertised address, bound of a frame.
    pub server: Server,
    /// Where it is offered.
    pub discovery: Discovery,
    /// How it stops.
    pub drain: Drain,
}

/// Of `corelane call`.
#[derive(Clone, Debug)]
pub struct CallArgs {
    /// Whom to call.
    pub target: Target,
    /// The body, valid JSON.
    pub body: String,
    /// Headers of the request frame, names unique, in the order given.
    pub headers: Vec<(String, String)>,
    /// Calls to make, at least one.
    pub count: u64,
    /// Calls at once, at least one.
    pub concurrency: u32,
    /// From the request to the end of its response.
    pub timeout: Duration,
    /// When to end a response early.
    pub early: Option<Early>,
    /// Whether to print JSON lines.
    pub json: bool,
    /// Where responses are taken: `host` and its advertised address; ports do not count.
    pub server: Server,
    /// Where an endpoint is looked up.
    pub discovery: Discovery,
}

/// Whom to call.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Target {
    /// An endpoint, to be looked up.
    Endpoint(EndpointId),
    /// An instance, known without looking up.
    Address {
        /// Where it listens.
        socket: SocketAddr,
        /// The path that request frames carry.
        path: String,
        /// What to call it in messages, when it was said.
        endpoint: Option<EndpointId>,
    },
}

/// How a response is ended before its end, after so many items.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Early {
    /// Ask to stop: the worker may still send what it has.
    Stop(u64),
    /// Kill: nothing more is wanted.
    Kill(u64),
}

/// How bodies and items are written.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum Codec {
    /// JSON.
    Json,
    /// MessagePack.
    Msgpack,
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Json => "json",
            Self::Msgpack => "msgpack",
        })
    }
}
