//! `corelane worker echo`: a worker that answers each request with items, for trying and testing;
//! and the same worker inside another process, for `corelane up`. It is a user of the component
//! API like any other.

use std::net::SocketAddr;

use anyhow::Result;
use corelane_codec::control_message::PayloadCodec;
use corelane_codec::item::write_value;
use corelane_codec::path::{EndpointId, instance_hex};
use serde_json::json;

use crate::cli::{Answer, Codec, EchoArgs, Exit, print};
use crate::component::{Handler, Options, Outcome, Request, Runtime, Served, Stream};

/// Runs the worker until a signal; a second one ends it at once.
///
/// # Errors
/// The address is taken, the store cannot be reached, the shard has ended by itself, or a second
/// signal came.
pub fn run(args: EchoArgs) -> Result<Exit> {
    let server = &args.server;
    let status = server.status_port;
    let status = status.map(|port| SocketAddr::new(server.status_host, port));
    let options = Options::of_command(args.server, args.discovery, args.drain)?;
    let options = options.status(status).calls_max(0);
    let codec = match args.codec {
        Codec::Json => PayloadCodec::Json,
        Codec::Msgpack => PayloadCodec::MessagePack,
    };
    Runtime::run(options, async |runtime| {
        let worker = EchoWorker::serve(runtime, &args.endpoint, &args.answer, codec).await?;
        print(&format!("{}\n", worker.ready()))?;
        worker.runtime.stopping().await;
        Ok(())
    })?;
    Ok(Exit::Done)
}

/// A running echo worker.
pub struct EchoWorker {
    runtime: Runtime,
    served: Served,
}

impl EchoWorker {
    /// Starts the worker beside others in this process; it can be called when this returns. Needs
    /// a `LocalSet`.
    ///
    /// # Errors
    /// The address is taken, or the store cannot be reached in time.
    pub async fn start(
        options: Options,
        endpoint: &EndpointId,
        answer: &Answer,
    ) -> Result<EchoWorker> {
        let runtime = Runtime::start(options).await?;
        EchoWorker::serve(runtime, endpoint, answer, PayloadCodec::MessagePack).await
    }

    async fn serve(
        runtime: Runtime,
        endpoint: &EndpointId,
        answer: &Answer,
        codec: PayloadCodec,
    ) -> Result<EchoWorker> {
        let endpoint = runtime.endpoint_of_any_name(endpoint).codec(codec);
        let answer = answer.clone();
        let served = endpoint.serve_with(move |_| Echo::new(&answer)).await?;
        let worker = EchoWorker { runtime, served };
        let (endpoint, at) = (worker.served.id(), worker.called_at());
        tracing::info!(%endpoint, at, "echo worker ready");
        Ok(worker)
    }

    /// What is printed when it can be called.
    fn ready(&self) -> serde_json::Value {
        let mut ready = json!({
            "ready": true,
            "address": self.called_at(),
            "instance": instance_hex(self.runtime.instance_id()),
            "endpoint": self.served.id().to_string(),
        });
        if let Some(status) = self.runtime.status_address() {
            ready["status"] = status.to_string().into();
        }
        ready
    }

    /// `IP:PORT/PATH`, as `corelane call --address` takes it.
    pub fn called_at(&self) -> String {
        self.served.called_at().unwrap_or_default()
    }

    /// Waits until its shard ends by itself.
    pub async fn failed(&self) {
        self.runtime.failed().await;
    }

    /// Leaves discovery, lets running requests end, and stops.
    pub async fn stop(&self) {
        self.runtime.stop().await;
        let handled = self.served.count(|stats| stats.requests.get());
        tracing::info!(handled, "stopped");
    }
}

/// The handler: `items` times the request's body, or a text of the size asked for.
struct Echo {
    answer: Answer,
    /// The text in JSON and in MessagePack.
    texts: Option<[Vec<u8>; 2]>,
}

impl Echo {
    fn new(answer: &Answer) -> Echo {
        let texts = answer.item_bytes.map(|bytes| {
            let text = "x".repeat(bytes as usize);
            [PayloadCodec::Json, PayloadCodec::MessagePack].map(|codec| {
                let mut encoded = Vec::new();
                // A text always has a form.
                let _ = write_value(&text, codec, &mut encoded);
                encoded
            })
        });
        let answer = answer.clone();
        Echo { answer, texts }
    }
}

impl Handler for Echo {
    async fn handle(&self, request: Request, stream: &mut Stream) -> Outcome {
        let body = request.value()?;
        let item = match (&self.texts, request.codec()) {
            (None, _) => body,
            (Some([json, _]), PayloadCodec::Json) => json,
            (Some([_, packed]), PayloadCodec::MessagePack) => packed,
        };
        for _ in 0..self.answer.items {
            if !self.answer.delay.is_zero() {
                stream.sleep(self.answer.delay).await?;
            }
            stream.send_encoded(item).await?;
        }
        Ok(())
    }
}
