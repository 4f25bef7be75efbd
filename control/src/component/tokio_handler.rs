//! Handlers that run on tokio: for work that needs its timers, its sockets, or libraries built on
//! them. Requests go over from the shard, items come back, both over bounded queues.

use std::future::Future;

use corelane_codec::control_message::PayloadCodec;
use corelane_codec::error::DynamoError;
use corelane_codec::headers::TRACEPARENT;
use corelane_codec::item::{Annotated, from_bytes, write_value};
use corelane_engine::responder::Gone;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;

use super::error::{Fault, Outcome};
use super::handler::{Handler, Request, Stream};
use super::hub::Nudge;

/// Items between tokio and the shard; a handler that writes more waits.
const ITEMS_MAX: usize = 64;

/// One request as it goes over to tokio: a copy that belongs to no shard.
#[derive(Clone, Debug)]
pub struct TokioRequest {
    id: String,
    codec: PayloadCodec,
    body: Vec<u8>,
    traceparent: Option<String>,
}

impl TokioRequest {
    fn of(request: &Request) -> TokioRequest {
        let traceparent = request.header(TRACEPARENT);
        TokioRequest {
            id: request.id().to_owned(),
            codec: request.codec(),
            body: request.body().to_vec(),
            traceparent: traceparent.map(|text| text.to_cow().into_owned()),
        }
    }

    /// Its identity, the same at every hop.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// How the body is encoded, and each item of the response is to be.
    pub fn codec(&self) -> PayloadCodec {
        self.codec
    }

    /// The body as it came, not looked at.
    pub fn body(&self) -> &[u8] {
        &self.body
    }

    /// The span of its caller, if he sent one.
    pub fn traceparent(&self) -> Option<&str> {
        self.traceparent.as_deref()
    }

    /// The body as a value of your type.
    ///
    /// # Errors
    /// It is not one; returned from a handler this tells the caller so.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T, Fault> {
        from_bytes(&self.body, self.codec).map_err(|why| Fault::unreadable(&why))
    }
}

/// Answers requests on tokio. Functions and closures of `(TokioRequest, TokioStream)` whose future
/// is `Send` are such handlers.
pub trait TokioHandler: Clone + Send + Sync + 'static {
    /// Answers one request. It is dropped at its next wait when the caller is gone.
    fn handle(
        &self,
        request: TokioRequest,
        stream: TokioStream,
    ) -> impl Future<Output = Outcome> + Send + 'static;
}

impl<F, A> TokioHandler for F
where
    F: Fn(TokioRequest, TokioStream) -> A + Clone + Send + Sync + 'static,
    A: Future<Output = Outcome> + Send + 'static,
{
    fn handle(
        &self,
        request: TokioRequest,
        stream: TokioStream,
    ) -> impl Future<Output = Outcome> + Send + 'static {
        self(request, stream)
    }
}

enum Said {
    /// The data of an `Annotated`, encoded.
    Data(Vec<u8>),
    /// A whole item, encoded.
    Item(Vec<u8>),
    Error(DynamoError),
    Ended(Outcome),
}

/// The response to one request, for a handler on tokio.
pub struct TokioStream {
    codec: PayloadCodec,
    out: mpsc::Sender<Said>,
    stopped: watch::Receiver<bool>,
}

impl TokioStream {
    /// How items are encoded.
    pub fn codec(&self) -> PayloadCodec {
        self.codec
    }

    /// Writes a value as one item: `Annotated` with these data.
    ///
    /// # Errors
    /// The caller is gone, or the value has no form in the request's codec.
    pub async fn send<T: Serialize + Sync + ?Sized>(&mut self, value: &T) -> Outcome {
        let mut data = Vec::new();
        write_value(value, self.codec, &mut data).map_err(Fault::Unwritable)?;
        self.say(Said::Data(data)).await
    }

    /// Writes an item with everything that an item can have.
    ///
    /// # Errors
    /// As [`TokioStream::send`].
    pub async fn send_annotated<T: Serialize + Sync>(&mut self, item: &Annotated<T>) -> Outcome {
        let mut data = Vec::new();
        write_value(item, self.codec, &mut data).map_err(Fault::Unwritable)?;
        self.say(Said::Item(data)).await
    }

    /// Writes an item of an endpoint whose items are not `Annotated`: one encoded value.
    ///
    /// # Errors
    /// The caller is gone.
    pub async fn send_item(&mut self, item: Vec<u8>) -> Outcome {
        self.say(Said::Item(item)).await
    }

    /// Writes an item that is an error; the response goes on.
    ///
    /// # Errors
    /// The caller is gone.
    pub async fn send_error(&mut self, error: DynamoError) -> Outcome {
        self.say(Said::Error(error)).await
    }

    /// Whether the caller asked to stop, or is gone.
    pub fn is_stopped(&self) -> bool {
        *self.stopped.borrow() || self.out.is_closed()
    }

    /// Waits until [`TokioStream::is_stopped`].
    pub async fn stopped(&mut self) {
        tokio::select! {
            _ = self.stopped.wait_for(|stopped| *stopped) => {}
            () = self.out.closed() => {}
        }
    }

    async fn say(&mut self, said: Said) -> Outcome {
        let sent = self.out.send(said).await;
        Ok(sent.map_err(|_| Gone)?)
    }
}

/// The shard's end of a handler on tokio.
#[derive(Clone)]
pub(super) struct Bridge<H> {
    pub(super) handler: H,
    pub(super) tokio: Handle,
    pub(super) nudge: Nudge,
}

/// Ends the work on tokio when the shard's end of it goes.
struct Work(AbortHandle);

impl Drop for Work {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl<H: TokioHandler> Handler for Bridge<H> {
    async fn handle(&self, request: Request, stream: &mut Stream) -> Outcome {
        let handler = self.handler.clone();
        let work = |request, stream| async move { handler.handle(request, stream).await };
        self.run(work, request, stream).await
    }
}

impl<H> Bridge<H> {
    /// Runs what `make` makes on tokio, and writes what it says.
    pub(super) async fn run<A>(
        &self,
        make: impl FnOnce(TokioRequest, TokioStream) -> A + Send + 'static,
        request: Request,
        stream: &mut Stream,
    ) -> Outcome
    where
        A: Future<Output = Outcome> + Send + 'static,
    {
        let (out, mut said) = mpsc::channel(ITEMS_MAX);
        let (tell_stopped, stopped) = watch::channel(false);
        let theirs = TokioStream {
            codec: stream.codec(),
            out: out.clone(),
            stopped,
        };
        let request = TokioRequest::of(&request);
        let work = async move {
            let outcome = make(request, theirs).await;
            let _ = out.send(Said::Ended(outcome)).await;
        };
        let task = self.tokio.spawn(work);
        let _work = Work(task.abort_handle());
        let written = write(&mut said, &tell_stopped, stream);
        self.nudge.hear(written).await
    }
}

/// Writes what comes from tokio, until the end.
async fn write(
    said: &mut mpsc::Receiver<Said>,
    tell_stopped: &watch::Sender<bool>,
    stream: &mut Stream,
) -> Outcome {
    loop {
        let next = tokio::select! {
            next = said.recv() => next,
            () = stream.stopped(), if !*tell_stopped.borrow() => {
                tell_stopped.send_replace(true);
                if stream.is_killed() {
                    return Err(Gone.into());
                }
                continue;
            }
        };
        match next {
            Some(Said::Data(data)) => stream.send_encoded(&data).await?,
            Some(Said::Item(item)) => stream.send_item(&item).await?,
            Some(Said::Error(error)) => stream.send_error(&error).await?,
            Some(Said::Ended(outcome)) => return outcome,
            // Its task has gone without a word.
            None => return Err(panicked()),
        }
    }
}

fn panicked() -> Fault {
    Fault::new("the handler of this request panicked")
}
