//! What answers requests: async functions of a [`Request`] and a [`Stream`], run on the shard that
//! received the request.

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use corelane_codec::control_message::{PayloadCodec, RequestType};
use corelane_codec::error::{Class, DynamoError};
use corelane_codec::item::{Annotated, CodecError, from_bytes, write_value};
use corelane_codec::json::Text;
use corelane_engine::handler::{self as engine, BadBody, MakeHandler};
use corelane_engine::input::Input;
use corelane_engine::responder::{Host, Responder};
use corelane_engine::stats::HandlerStats;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::error::{Fault, Outcome};
use super::shard::Shard;

/// Answers requests. Async functions and closures of `(Request, &mut Stream)` are handlers.
///
/// A handler lives on one shard: it may hold `Rc`s and `RefCell`s across waits. It must not block
/// the thread; for work that does, or that needs tokio, see
/// [`Endpoint::serve_on`](super::Endpoint::serve_on).
///
/// Returning `Ok` ends the response well; a [`Fault`] ends it with an error, which the caller gets
/// with its reason: as the last item, or before any item if the request was to blame. A panic
/// becomes an error as well, and ends nothing but its request. When the caller kills the request
/// or is gone, the handler's next write fails; a handler that goes on for 10 s after that is
/// dropped at its next wait.
pub trait Handler: 'static {
    /// Answers one request.
    fn handle(&self, request: Request, stream: &mut Stream) -> impl Future<Output = Outcome>;
}

impl<F> Handler for F
where
    F: AsyncFn(Request, &mut Stream) -> Outcome + 'static,
{
    async fn handle(&self, request: Request, stream: &mut Stream) -> Outcome {
        self(request, stream).await
    }
}

/// One request: its identity, its headers, and its body, which is decoded when it is asked for.
#[derive(Debug)]
pub struct Request {
    inner: engine::Request,
}

impl Request {
    /// Its identity, the same at every hop.
    pub fn id(&self) -> &str {
        self.inner.id()
    }

    /// How the body is encoded, and each item of the response is to be.
    pub fn codec(&self) -> PayloadCodec {
        self.inner.codec()
    }

    /// The body as it came, not looked at.
    pub fn body(&self) -> &[u8] {
        self.inner.body()
    }

    /// The one value that the body must be, still encoded: what may be passed on as it is.
    ///
    /// # Errors
    /// The body is not a value of its codec, or more than one.
    pub fn value(&self) -> Result<&[u8], BadBody> {
        self.inner.value()
    }

    /// The body as a value of your type.
    ///
    /// # Errors
    /// It is not one; returned from a handler this tells the caller so.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T, Fault> {
        from_bytes(self.body(), self.codec()).map_err(|why| Fault::unreadable(&why))
    }

    /// The value of a header of the frame, such as `traceparent`.
    pub fn header(&self, name: &str) -> Option<Text<'_>> {
        self.inner.header(name)
    }
}

/// The response to one request, item by item.
///
/// Items wait for the caller up to 64 items or 256 KiB; a handler that writes more waits.
pub struct Stream {
    /// There until the response has ended.
    responder: Option<Responder>,
    scratch: Vec<u8>,
    own: Rc<Own>,
}

/// What all requests of one handler share.
struct Own {
    stats: Arc<HandlerStats>,
    shard: Shard,
}

impl Stream {
    /// Writes a value as one item: `Annotated` with these data, as every Dynamo client expects.
    ///
    /// # Errors
    /// The caller is gone, or the value has no form in the request's codec.
    pub async fn send<T: Serialize + ?Sized>(&mut self, value: &T) -> Outcome {
        let mut scratch = self.encode(value)?;
        let sent = self.send_encoded(&scratch).await;
        scratch.clear();
        self.scratch = scratch;
        sent
    }

    /// The same with a value that is encoded already: one value of [`Stream::codec`].
    ///
    /// # Errors
    /// The caller is gone.
    pub async fn send_encoded(&mut self, value: &[u8]) -> Outcome {
        let (responder, stats) = self.open()?;
        responder.annotated(value).await?;
        stats.items.add(1);
        Ok(())
    }

    /// Writes an item with everything that an item can have: id, event, comment, error.
    ///
    /// # Errors
    /// As [`Stream::send`].
    pub async fn send_annotated<T: Serialize>(&mut self, item: &Annotated<T>) -> Outcome {
        let mut scratch = self.encode(item)?;
        let sent = self.send_item(&scratch).await;
        scratch.clear();
        self.scratch = scratch;
        sent
    }

    /// Writes an item of an endpoint whose items are not `Annotated`: one encoded value.
    ///
    /// # Errors
    /// The caller is gone.
    pub async fn send_item(&mut self, item: &[u8]) -> Outcome {
        let (responder, stats) = self.open()?;
        responder.item(item).await?;
        stats.items.add(1);
        Ok(())
    }

    /// Writes a named value beside the data, as an event of that name.
    ///
    /// # Errors
    /// As [`Stream::send`].
    pub async fn annotate(&mut self, name: &str, value: &impl Serialize) -> Outcome {
        let item = Annotated::<()>::annotation(name, value).map_err(Fault::Unwritable)?;
        self.send_annotated(&item).await
    }

    /// Writes an item that is an error; the response goes on. To end it with an error return one.
    ///
    /// # Errors
    /// The caller is gone.
    pub async fn send_error(&mut self, error: &DynamoError) -> Outcome {
        let (responder, _) = self.open()?;
        responder.error_item(error).await?;
        Ok(())
    }

    /// How items are encoded.
    pub fn codec(&self) -> PayloadCodec {
        self.responder
            .as_ref()
            .map_or_else(PayloadCodec::default, Responder::codec)
    }

    /// Whether the caller asked to stop, or is gone.
    pub fn is_stopped(&self) -> bool {
        self.responder.as_ref().is_none_or(Responder::is_stopped)
    }

    /// Whether the caller asked to be spared the rest, or is gone.
    pub fn is_killed(&self) -> bool {
        self.responder.as_ref().is_none_or(Responder::is_killed)
    }

    /// Waits until [`Stream::is_stopped`].
    pub async fn stopped(&self) {
        if let Some(responder) = &self.responder {
            responder.stopped().await;
        }
    }

    /// Waits for so long, at least.
    ///
    /// # Errors
    /// At once when the caller asks to stop or is gone.
    pub async fn sleep(&self, time: Duration) -> Outcome {
        match &self.responder {
            Some(responder) => Ok(responder.sleep(time).await?),
            None => Ok(()),
        }
    }

    /// The shard that this runs on: for calls to others, tasks and timers.
    pub fn shard(&self) -> &Shard {
        &self.own.shard
    }

    /// The values of the request, where it is a stream of them; once.
    pub(super) fn take_input(&mut self) -> Option<Input> {
        self.responder.as_mut()?.take_input()
    }

    fn encode<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<Vec<u8>, Fault> {
        let mut scratch = std::mem::take(&mut self.scratch);
        write_value(value, self.codec(), &mut scratch)
            .map_err(|error: CodecError| Fault::Unwritable(error))?;
        Ok(scratch)
    }

    fn open(&mut self) -> Result<(&mut Responder, &HandlerStats), Fault> {
        let responder = self.responder.as_mut();
        let responder = responder.ok_or(corelane_engine::responder::Gone)?;
        Ok((responder, &self.own.stats))
    }

    /// The handler has returned.
    async fn end(mut self, outcome: Outcome) {
        let Some(mut responder) = self.responder.take() else {
            return;
        };
        let stats = &self.own.stats;
        if responder.is_stopped() {
            stats.abandoned.add(1);
        }
        match outcome.as_ref().map_err(Fault::told) {
            Ok(()) if responder.is_stopped() => {}
            Ok(()) => {
                stats.finished.add(1);
                responder.finish();
            }
            Err(Some(error)) => {
                if !responder.is_stopped() {
                    stats.failed.add(1);
                }
                // Of an error in the prologue callers keep the reason only if the request was to
                // blame, and take the others for a broken instance (§4.3); of an item always.
                if error.class() == Class::InvalidRequest {
                    return responder.fail(&error);
                }
                if responder.error_item(&error).await.is_ok() {
                    responder.finish();
                }
            }
            // Only a caller who is gone, or a handler that says so.
            Err(None) => {}
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.responder.is_none() {
            return;
        }
        let stats = &self.own.stats;
        if std::thread::panicking() {
            stats.panicked.add(1);
        } else {
            stats.abandoned.add(1);
        }
    }
}

/// A handler as the engine wants it.
struct Adapted<H> {
    handler: Rc<H>,
    takes: RequestType,
    own: Rc<Own>,
}

impl<H: Handler> engine::Handler for Adapted<H> {
    fn handle(
        &self,
        request: engine::Request,
        responder: Responder,
    ) -> Pin<Box<dyn Future<Output = ()>>> {
        let handler = Rc::clone(&self.handler);
        let mut stream = Stream {
            responder: Some(responder),
            scratch: Vec::new(),
            own: Rc::clone(&self.own),
        };
        Box::pin(async move {
            let request = Request { inner: request };
            let outcome = handler.handle(request, &mut stream).await;
            stream.end(outcome).await;
        })
    }

    fn takes(&self) -> RequestType {
        self.takes
    }
}

/// Makes the handler of one shard there, for requests of one kind.
pub(super) fn make<H: Handler>(
    index: usize,
    takes: RequestType,
    stats: Arc<HandlerStats>,
    make: impl FnOnce(&Shard) -> H + Send + 'static,
) -> MakeHandler {
    Box::new(move |host: &Host| {
        let shard = Shard::new(index, host);
        Rc::new(Adapted {
            handler: Rc::new(make(&shard)),
            takes,
            own: Rc::new(Own { stats, shard }),
        })
    })
}
