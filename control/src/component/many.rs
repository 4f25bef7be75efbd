//! Bidirectional endpoints: handlers whose request is a stream of values
//! (`spec/request-plane.md` §5).

use std::future::Future;

use corelane_codec::control_message::PayloadCodec;
use corelane_codec::item::from_bytes;
use serde::de::DeserializeOwned;

use super::error::{Fault, Outcome};
use super::handler::{Handler, Request, Stream};

/// Answers streams of requests. Async functions and closures of `(Request, Input, &mut Stream)` are
/// such handlers.
///
/// All that is said of [`Handler`] holds; the request has no body, its values come from the input.
/// Input and response go on side by side: a handler may write before it has read, and go on
/// writing when the input is over.
pub trait ManyHandler: 'static {
    /// Answers one request.
    fn handle(
        &self,
        request: Request,
        input: Input,
        stream: &mut Stream,
    ) -> impl Future<Output = Outcome>;
}

impl<F> ManyHandler for F
where
    F: AsyncFn(Request, Input, &mut Stream) -> Outcome + 'static,
{
    async fn handle(&self, request: Request, input: Input, stream: &mut Stream) -> Outcome {
        self(request, input, stream).await
    }
}

/// The values of one request, one by one.
///
/// While 64 of them or 256 KiB wait here, the caller is not read from. When the caller stops, kills
/// or goes before he has said that this was all, the whole request ends with him.
pub struct Input {
    inner: corelane_engine::input::Input,
    codec: PayloadCodec,
}

impl Input {
    /// The next value; `None` when no more comes: see [`Input::is_complete`].
    pub async fn next<T: DeserializeOwned>(&mut self) -> Option<Result<T, Fault>> {
        let value = self.inner.next().await?;
        Some(parse(&value, self.codec))
    }

    /// The next value as it came: one encoded value.
    pub async fn next_encoded(&mut self) -> Option<Vec<u8>> {
        self.inner.next().await
    }

    /// Whether the caller has said that this was all. Otherwise he is gone, or wants no answer.
    pub fn is_complete(&self) -> bool {
        self.inner.is_complete()
    }

    /// How its values are encoded.
    pub fn codec(&self) -> PayloadCodec {
        self.codec
    }
}

/// One value of an input.
pub(super) fn parse<T: DeserializeOwned>(value: &[u8], codec: PayloadCodec) -> Result<T, Fault> {
    from_bytes(value, codec).map_err(|why| Fault::unreadable(&why))
}

/// A handler of streams where the engine knows only handlers.
pub(super) struct Many<H>(pub(super) H);

impl<H: ManyHandler> Handler for Many<H> {
    async fn handle(&self, request: Request, stream: &mut Stream) -> Outcome {
        let codec = request.codec();
        let inner = stream.take_input();
        // The engine hands over no request of another kind.
        let inner = inner.ok_or_else(|| Fault::new("the request has no stream of values"))?;
        self.0.handle(request, Input { inner, codec }, stream).await
    }
}
