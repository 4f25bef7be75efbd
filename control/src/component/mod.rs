//! Dynamo's component model for Rust programs: workers that answer on the shards of this process,
//! and clients that call what others, or this process, serve.
//!
//! ```text
//! Runtime -> namespace("production") -> component("worker") -> endpoint("generate")
//!                                              serve(handler) <--'
//! ```
//!
//! ```no_run
//! use corelane::component::{Options, Outcome, Request, Runtime, Stream};
//!
//! async fn echo(request: Request, stream: &mut Stream) -> Outcome {
//!     let text: String = request.parse()?;
//!     for word in text.split(' ') {
//!         stream.send(word).await?;
//!     }
//!     Ok(())
//! }
//!
//! fn main() -> anyhow::Result<()> {
//!     Runtime::run(Options::from_env()?, async |runtime| {
//!         let component = runtime.namespace("production")?.component("worker")?;
//!         component.endpoint("generate")?.serve(echo).await?;
//!         runtime.stopping().await;
//!         Ok(())
//!     })?;
//!     Ok(())
//! }
//! ```
//!
//! A client is made of any name that anybody uses for an endpoint, and calls whoever serves it:
//!
//! ```no_run
//! use corelane::component::{Options, Runtime};
//!
//! fn main() -> anyhow::Result<()> {
//!     Runtime::run(Options::from_env()?.calls_only(), async |runtime| {
//!         let client = runtime.client("production/worker/generate")?;
//!         client.wait_for_instances(std::time::Duration::from_secs(10)).await?;
//!         let mut reply = client.call("the quick brown fox").await?;
//!         while let Some(word) = reply.next_data::<String>().await {
//!             println!("{}", word?);
//!         }
//!         Ok(())
//!     })?;
//!     Ok(())
//! }
//! ```
//!
//! [`Options::from_env`] looks for etcd at `http://localhost:2379`, as Dynamo does; with
//! `DYN_DISCOVERY_BACKEND=file` worker and client find each other through a folder, and
//! [`Options::local`] is for one process alone. What happens is told to `tracing`: begin `main`
//! with `corelane::logging::start(&corelane::env::Env::current())` for the log of the program
//! `corelane`, or with a subscriber of your own.
//!
//! # What runs where
//!
//! A runtime has one or more *shards*, each a thread with sockets, buffers and an executor of its
//! own, and the thread that called [`Runtime::run`], which does discovery, health and metrics and
//! runs your `main`. A handler runs on the shard that received the request, without a hop to
//! another thread, and needs no `Send`. It must not block: what does goes to tokio, by
//! [`Endpoint::serve_on`].
//!
//! A [`Client`] may go to any thread and into any tokio runtime; each of its calls hops to a shard
//! and back. On a shard, [`Shard::client`] makes calls without a hop: [`Stream::shard`] is that of
//! a handler, [`Endpoint::serve_with`] makes a handler for each, and [`Runtime::spawn`] runs tasks
//! there.
//!
//! # Streams of requests
//!
//! An endpoint served by [`Endpoint::serve_many`] takes a stream of values in place of one, and
//! answers while they come. [`Client::call_many`] begins such a call: it gives a [`Feed`] for the
//! values and a [`Reply`]. Between two processes of corelane neither takes a socket of its own.
//!
//! ```no_run
//! # use corelane::component::{Input, Outcome, Request, Stream};
//! async fn sums(_: Request, mut input: Input, stream: &mut Stream) -> Outcome {
//!     let mut sum = 0;
//!     while let Some(value) = input.next::<i64>().await {
//!         sum += value?;
//!         stream.send(&sum).await?;
//!     }
//!     Ok(())
//! }
//! ```
//!
//! # The life of an endpoint
//!
//! | state | what it means |
//! |---|---|
//! | [`State::Created`] | it exists, or its lease was lost and a new record is being written |
//! | [`State::Registered`] | handlers are in place, and the record stands in discovery |
//! | [`State::Running`] | it takes requests |
//! | [`State::Healthy`] | its health check was answered, or it has none |
//! | [`State::Stopping`] | out of discovery; running and queued requests end |
//! | [`State::Deregistered`] | nothing of it runs any more |
//!
//! Each change is a line of the log, and is seen in `/health` and `/metrics`.
//!
//! # Events
//!
//! [`Endpoint::publisher`] and [`Endpoint::subscriber`] (and those of namespaces and components)
//! exchange events as Dynamo's programs do: over ZMQ, from publishers to subscribers
//! (`DYN_EVENT_PLANE=zmq`, the default) or through brokers (`DYN_ZMQ_BROKER_URL`,
//! `DYN_ZMQ_BROKER_ENABLED`), or over NATS (`nats`), or not at all (`none`).
//! [`Subscriber::losses`](crate::events::Subscriber::losses) says what was missed.
//!
//! # Requests over NATS
//!
//! With `DYN_REQUEST_PLANE=nats` requests come to a NATS service for each component
//! ([`Component::service_name`]), which answers `$SRV.STATS` with what [`Endpoint::stats`] tells.
//! Responses go to the caller over TCP. Instances of others on NATS are called as those on TCP.

pub mod busy;
mod canary;
mod client;
mod endpoint;
mod error;
mod events;
mod feed;
mod handler;
mod hub;
mod items;
mod local_client;
mod many;
mod metrics;
mod names;
mod open;
mod options;
mod paths;
mod registry;
mod reply;
mod routing;
mod run;
mod runtime;
mod serving;
mod shard;
mod tokio_handler;
mod tokio_many;

pub use corelane_codec::control_message::PayloadCodec;
pub use corelane_codec::error::{Class, DynamoError, Reason};
pub use corelane_codec::item::Annotated;
pub use corelane_codec::path::{EndpointId, Reference};

pub use crate::discovery::MemoryStore;
pub use crate::events::{
    BrokerUrl, CurveError, CurveOptions, Event, EventPlane, Events, EventsError, Losses,
    Protection, Publisher, Subscriber, Via, ZmqOptions,
};
pub use crate::health::State;
pub use crate::nats::{NatsAuth, NatsOptions, NatsTls, RequestPlane};

pub use corelane_engine::call::{Deadlines, Times};
pub use corelane_engine::local::Ending;
pub use corelane_engine::quic::ResponsePlane;

pub use client::{Call, Client, SeenInstance};
pub use endpoint::{Component, Endpoint, Namespace};
pub use error::{Error, Fault, Outcome};
pub use feed::{Feed, LocalFeed};
pub use handler::{Handler, Request, Stream};
pub use local_client::{LocalClient, LocalReply};
pub use many::{Input, ManyHandler};
pub use names::BadName;
pub use options::{Admission, Checks, Options};
pub use reply::Reply;
pub use routing::{Ratio, RoutingMode, UnknownMode};
pub use runtime::Runtime;
pub use serving::Served;
pub use shard::Shard;
pub use tokio_handler::{TokioHandler, TokioRequest, TokioStream};
pub use tokio_many::{TokioInput, TokioManyHandler};
