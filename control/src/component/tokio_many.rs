//! Handlers on tokio whose request is a stream of values: the values go over as items come back,
//! over a bounded queue of their own.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use corelane_codec::control_message::PayloadCodec;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;

use super::error::{Fault, Outcome};
use super::handler::{Request, Stream};
use super::many::{Input, ManyHandler, parse};
use super::tokio_handler::{Bridge, TokioRequest, TokioStream};

/// Values between the shard and tokio; beyond them the caller is held back.
const VALUES_MAX: usize = 64;

/// The values of one request, for a handler on tokio.
pub struct TokioInput {
    values: mpsc::Receiver<Vec<u8>>,
    complete: Arc<AtomicBool>,
    codec: PayloadCodec,
}

impl TokioInput {
    /// The next value; `None` when no more comes: see [`TokioInput::is_complete`].
    pub async fn next<T: DeserializeOwned>(&mut self) -> Option<Result<T, Fault>> {
        let value = self.next_encoded().await?;
        Some(parse(&value, self.codec))
    }

    /// The next value as it came: one encoded value.
    pub async fn next_encoded(&mut self) -> Option<Vec<u8>> {
        self.values.recv().await
    }

    /// Whether the caller has said that this was all, once there is no next value. Otherwise he is
    /// gone, or wants no answer.
    pub fn is_complete(&self) -> bool {
        self.complete.load(Ordering::Acquire)
    }

    /// How its values are encoded.
    pub fn codec(&self) -> PayloadCodec {
        self.codec
    }
}

/// Answers streams of requests on tokio. Functions and closures of
/// `(TokioRequest, TokioInput, TokioStream)` whose future is `Send` are such handlers.
pub trait TokioManyHandler: Clone + Send + Sync + 'static {
    /// Answers one request. It is dropped at its next wait when the caller is gone.
    fn handle(
        &self,
        request: TokioRequest,
        input: TokioInput,
        stream: TokioStream,
    ) -> impl Future<Output = Outcome> + Send + 'static;
}

impl<F, A> TokioManyHandler for F
where
    F: Fn(TokioRequest, TokioInput, TokioStream) -> A + Clone + Send + Sync + 'static,
    A: Future<Output = Outcome> + Send + 'static,
{
    fn handle(
        &self,
        request: TokioRequest,
        input: TokioInput,
        stream: TokioStream,
    ) -> impl Future<Output = Outcome> + Send + 'static {
        self(request, input, stream)
    }
}

impl<H: TokioManyHandler> ManyHandler for Bridge<H> {
    async fn handle(&self, request: Request, input: Input, stream: &mut Stream) -> Outcome {
        let (values, theirs) = mpsc::channel(VALUES_MAX);
        let complete = Arc::new(AtomicBool::new(false));
        let theirs = TokioInput {
            values: theirs,
            complete: Arc::clone(&complete),
            codec: input.codec(),
        };
        // It ends with the request, which ends its input.
        let nudge = self.nudge.clone();
        let pour = async move { nudge.hear(pour(input, values, complete)).await };
        if !stream.shard().spawn(pour) {
            return Err(Fault::new("too many tasks run on this shard"));
        }
        let handler = self.handler.clone();
        let work = |request, stream| async move { handler.handle(request, theirs, stream).await };
        self.run(work, request, stream).await
    }
}

/// Hands values over to tokio; runs on the shard, until either end goes.
async fn pour(mut from: Input, to: mpsc::Sender<Vec<u8>>, complete: Arc<AtomicBool>) {
    while let Some(value) = from.next_encoded().await {
        if to.send(value).await.is_err() {
            return;
        }
    }
    complete.store(from.is_complete(), Ordering::Release);
}
