//! `corelane events` as clap reads it.

use clap::{Args, Subcommand};
use corelane_codec::event::Scope;

use super::Stop;
use crate::commands::{PublishArgs, TailArgs};
use crate::env::Env;
use crate::nats::NatsOptions;

/// See events as they are published, or publish some for trying; over NATS
#[derive(Args, Debug)]
pub(super) struct EventsOptions {
    #[command(subcommand)]
    pub(super) command: EventsCommand,
}

#[derive(Debug, Subcommand)]
pub(super) enum EventsCommand {
    Tail(TailOptions),
    Publish(PublishOptions),
}

/// The server, if it is not the one of the environment.
#[derive(Args, Debug)]
struct ServerOption {
    /// The NATS server [default: $NATS_SERVER, else nats://localhost:4222]
    #[arg(long, value_name = "URL")]
    nats: Option<String>,
}

impl ServerOption {
    fn options(self, env: &Env) -> Result<NatsOptions, Stop> {
        let mut options = NatsOptions::read(env).map_err(usage)?;
        if let Some(server) = self.nats {
            options.server = server;
        }
        options.check().map_err(usage)?;
        Ok(options)
    }
}

fn usage(error: impl std::fmt::Display) -> Stop {
    Stop::Usage(error.to_string())
}

/// Print each event as one line of JSON, until Ctrl-C
///
/// Payloads of Dynamo's topics, and others in MessagePack, are shown as JSON; what is none of that
/// as hexadecimal. What was missed, by the numbers of the publishers, is told at the end.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  corelane events tail
  corelane events tail --topic kv-events --scope demo/backend/generate
  corelane events tail --count 10 --nats nats://nats.example:4222")]
pub(super) struct TailOptions {
    /// Only this topic [default: all]
    #[arg(long, value_name = "TOPIC")]
    topic: Option<String>,
    /// Only this NS, NS/COMP or NS/COMP/EP, not what is below it [default: all]
    #[arg(long, value_name = "SCOPE", value_parser = scope)]
    scope: Option<Scope>,
    /// End after so many events
    #[arg(long, value_name = "N")]
    count: Option<u64>,
    #[command(flatten)]
    server: ServerOption,
}

impl TailOptions {
    pub(super) fn args(self, env: &Env) -> Result<TailArgs, Stop> {
        Ok(TailArgs {
            topic: self.topic,
            scope: self.scope,
            count: self.count,
            nats: self.server.options(env)?,
        })
    }
}

/// Publish events, for trying; nothing is registered in discovery
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  corelane events publish --scope demo/backend/generate --topic kv_metrics \\
      --body '{\"worker_id\":1,\"dp_rank\":0,\"active_decode_blocks\":7,\"kv_used_blocks\":9}'
  corelane events publish --scope demo --topic hello --body '\"world\"' --count 100")]
pub(super) struct PublishOptions {
    /// NS, NS/COMP or NS/COMP/EP
    #[arg(long, value_name = "SCOPE", value_parser = scope)]
    scope: Scope,
    /// The topic
    #[arg(long, value_name = "TOPIC")]
    topic: String,
    /// The payload as JSON; it is sent as MessagePack
    #[arg(long, value_name = "JSON", default_value = "null", value_parser = json)]
    body: serde_json::Value,
    /// How often
    #[arg(long, value_name = "N", default_value_t = 1)]
    count: u64,
    #[command(flatten)]
    server: ServerOption,
}

impl PublishOptions {
    pub(super) fn args(self, env: &Env) -> Result<PublishArgs, Stop> {
        Ok(PublishArgs {
            scope: self.scope,
            topic: self.topic,
            body: self.body,
            count: self.count,
            nats: self.server.options(env)?,
        })
    }
}

fn scope(text: &str) -> Result<Scope, String> {
    let parts: Vec<&str> = text.split('/').collect();
    match parts.as_slice() {
        [namespace] if !namespace.is_empty() => Ok(Scope::namespace(namespace)),
        [namespace, component] => Ok(Scope::component(namespace, component)),
        [namespace, component, name] => Ok(Scope::endpoint(namespace, component, name)),
        _ => Err("write NS, NS/COMP or NS/COMP/EP".to_owned()),
    }
}

fn json(text: &str) -> Result<serde_json::Value, String> {
    serde_json::from_str(text).map_err(|error| format!("not JSON: {error}"))
}
