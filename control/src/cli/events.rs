//! `corelane events` as clap reads it.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use corelane_codec::event::Scope;

use super::Stop;
use super::options::StoreOptions;
use crate::commands::{KeysArgs, PublishArgs, TailArgs, Transport};
use crate::config::{Backend, Config, Host, Inputs};
use crate::env::Env;
use crate::events::{BrokerUrl, CurveOptions, EventPlane};
use crate::nats::NatsOptions;

/// See events as they are published, or publish some for trying; over ZMQ or NATS
#[derive(Args, Debug)]
pub(super) struct EventsOptions {
    #[command(subcommand)]
    pub(super) command: EventsCommand,
}

#[derive(Debug, Subcommand)]
pub(super) enum EventsCommand {
    Tail(TailOptions),
    Publish(PublishOptions),
    Keys(KeysOptions),
}

/// Make a key pair for CURVE: the secret key into a new file, the public key to standard output
///
/// A broker or publisher keeps its secret key in curve_secret_key_file, and its peers are told the
/// public one. Peers need a pair of their own only where curve_allowed_keys lists them.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  corelane events keys --out broker.key > broker.pub
  corelane events tail --curve-server-key \"$(cat broker.pub)\" \\
      --broker 'xsub=tcp://b.example:5555,xpub=tcp://b.example:5556'")]
pub(super) struct KeysOptions {
    /// Where the secret key goes; only its owner may read it
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

impl KeysOptions {
    pub(super) fn args(self) -> KeysArgs {
        KeysArgs { out: self.out }
    }
}

/// CURVE, if it is not as the environment says.
#[derive(Args, Debug)]
struct CurveFlags {
    /// CURVE: file with our secret key [default: $CORELANE_EVENTS_CURVE_SECRET_KEY_FILE]
    #[arg(long, value_name = "FILE")]
    curve_secret_key_file: Option<PathBuf>,
    /// CURVE: public key of the brokers or publishers that are dialled
    /// [default: $CORELANE_EVENTS_CURVE_SERVER_KEY]
    #[arg(long, value_name = "KEY")]
    curve_server_key: Option<String>,
    /// CURVE: public keys of subscribers that are let in, a list or a file
    /// [default: $CORELANE_EVENTS_CURVE_ALLOWED_KEYS]
    #[arg(long, value_name = "KEYS")]
    curve_allowed_keys: Option<String>,
}

impl CurveFlags {
    fn options(self, env: &Env) -> CurveOptions {
        let said = CurveOptions::read(env);
        CurveOptions {
            secret_key_file: self.curve_secret_key_file.or(said.secret_key_file),
            allowed_keys: self.curve_allowed_keys.or(said.allowed_keys),
            server_key: self.curve_server_key.or(said.server_key),
        }
    }
}

/// What events go over, if it is not as the environment says.
#[derive(Args, Debug)]
struct PlaneOptions {
    /// zmq or nats [default: nats with --nats, else $DYN_EVENT_PLANE, else zmq]
    #[arg(long, value_name = "PLANE", value_parser = plane)]
    plane: Option<EventPlane>,
    /// The NATS server [default: $NATS_SERVER, else nats://localhost:4222]
    #[arg(long, value_name = "URL")]
    nats: Option<String>,
    /// ZMQ brokers: xsub=tcp://HOST:PORT,xpub=tcp://HOST:PORT [default: $DYN_ZMQ_BROKER_URL, or
    /// those in discovery with $DYN_ZMQ_BROKER_ENABLED, else from publishers to subscribers]
    #[arg(long, value_name = "URL")]
    broker: Option<BrokerUrl>,
    #[command(flatten)]
    curve: CurveFlags,
    #[command(flatten)]
    store: StoreOptions,
}

impl PlaneOptions {
    fn transport(self, config: Config, env: &Env) -> Result<Transport, Stop> {
        let plane = match (self.plane, &self.nats) {
            (Some(plane), _) => plane,
            (None, Some(_)) => EventPlane::Nats,
            (None, None) => EventPlane::read(env).map_err(usage)?,
        };
        match plane {
            EventPlane::Nats => {
                let mut options = NatsOptions::read(env).map_err(usage)?;
                if let Some(server) = self.nats {
                    options.server = server;
                }
                options.check().map_err(usage)?;
                Ok(Transport::Nats(options))
            }
            EventPlane::Zmq => {
                let mut discovery = config.discovery;
                if !self.store.is_said(env) {
                    discovery.backend = Backend::Etcd;
                }
                Ok(Transport::Zmq {
                    broker: self.broker,
                    discovery,
                    curve: self.curve.options(env),
                    env: env.clone(),
                })
            }
            EventPlane::Off => Err(usage(
                "DYN_EVENT_PLANE=none: there are no events; write --plane zmq or --plane nats",
            )),
        }
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
  corelane events tail --discovery etcd --etcd http://etcd.example:2379
  corelane events tail --broker 'xsub=tcp://b.example:5555,xpub=tcp://b.example:5556'
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
    plane: PlaneOptions,
}

impl TailOptions {
    pub(super) fn inputs(&self, env: &Env, host: &Host) -> Inputs {
        self.plane.store.inputs(env, host)
    }

    pub(super) fn args(self, config: Config, env: &Env) -> Result<TailArgs, Stop> {
        Ok(TailArgs {
            topic: self.topic,
            scope: self.scope,
            count: self.count,
            transport: self.plane.transport(config, env)?,
        })
    }
}

/// Publish events, for trying
///
/// Over NATS, and through a ZMQ broker, nothing is registered in discovery. From publisher to
/// subscriber over ZMQ it has to be, so that subscribers find it, and they are waited for.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  corelane events publish --scope demo/backend/generate --topic kv_metrics \\
      --body '{\"worker_id\":1,\"dp_rank\":0,\"active_decode_blocks\":7,\"kv_used_blocks\":9}'
  corelane events publish --scope demo --topic hello --body '\"world\"' --count 100
  corelane events publish --scope demo/backend/generate --topic kv-events --worker-id 7 \\
      --body \"$(cat events.json)\"")]
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
    /// Pause after each event, in milliseconds; Ctrl-C ends it
    #[arg(long, value_name = "M", default_value_t = 0)]
    interval_ms: u32,
    /// Over ZMQ, wait so many seconds for the first subscriber: what is published before is lost
    #[arg(long, value_name = "S", default_value_t = 5)]
    wait_s: u32,
    /// Say in discovery that these are KV events about this instance of the endpoint, in decimal:
    /// Dynamo's KV router wants to know
    #[arg(long, value_name = "ID")]
    worker_id: Option<u64>,
    /// The rank of that instance
    #[arg(long, value_name = "RANK", default_value_t = 0, requires = "worker_id")]
    dp_rank: u32,
    #[command(flatten)]
    plane: PlaneOptions,
}

impl PublishOptions {
    pub(super) fn inputs(&self, env: &Env, host: &Host) -> Inputs {
        self.plane.store.inputs(env, host)
    }

    pub(super) fn args(self, config: Config, env: &Env) -> Result<PublishArgs, Stop> {
        let worker = match (self.worker_id, &self.scope) {
            (None, _) => None,
            (Some(worker_id), Scope::Endpoint { endpoint }) => {
                Some((endpoint.clone(), worker_id, self.dp_rank))
            }
            (Some(_), _) => return Err(usage("--worker-id needs --scope NS/COMP/EP")),
        };
        Ok(PublishArgs {
            scope: self.scope,
            topic: self.topic,
            body: self.body,
            count: self.count,
            interval: Duration::from_millis(self.interval_ms.into()),
            wait: Duration::from_secs(self.wait_s.into()),
            worker,
            transport: self.plane.transport(config, env)?,
        })
    }
}

fn plane(text: &str) -> Result<EventPlane, String> {
    match text {
        "zmq" => Ok(EventPlane::Zmq),
        "nats" => Ok(EventPlane::Nats),
        _ => Err("write zmq or nats".to_owned()),
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
