//! The request streams of bidirectional calls: what a caller writes while he reads the reply.

use corelane_codec::control_message::PayloadCodec;
use corelane_codec::error::{DynamoError, Reason};
use corelane_codec::item::write_value;
use corelane_engine::feed as engine;
use serde::Serialize;
use tokio::sync::mpsc;

/// Values between a thread and a shard; a caller who writes more waits.
const VALUES_MAX: usize = 64;

/// The call is over: why comes out of its reply.
fn over() -> DynamoError {
    let text = "the call takes no more input; its reply says why";
    DynamoError::new(Reason::Cancelled, text)
}

/// A value in the codec of the call.
fn encoded<T: Serialize + ?Sized>(
    value: &T,
    codec: PayloadCodec,
    out: &mut Vec<u8>,
) -> Result<(), DynamoError> {
    write_value(value, codec, out).map_err(|why| DynamoError::invalid_argument(why.to_string()))
}

/// Writes the values of one bidirectional call of a [`super::LocalClient`]. Dropped before
/// [`LocalFeed::finish`] it kills the call, so that half an input is not taken for a whole one.
pub struct LocalFeed {
    feed: engine::Feed,
    codec: PayloadCodec,
    scratch: Vec<u8>,
}

impl LocalFeed {
    pub(super) fn new(feed: engine::Feed, codec: PayloadCodec) -> LocalFeed {
        LocalFeed {
            feed,
            codec,
            scratch: Vec::new(),
        }
    }

    /// Writes a value. Waits while 256 KiB wait for the instance.
    ///
    /// # Errors
    /// The value has no form in the call's codec, or the call is over.
    pub async fn send<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), DynamoError> {
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.clear();
        encoded(value, self.codec, &mut scratch)?;
        let sent = self.send_encoded(&scratch).await;
        self.scratch = scratch;
        sent
    }

    /// The same with a value that is encoded already: one value of [`LocalFeed::codec`].
    ///
    /// # Errors
    /// The call is over.
    pub async fn send_encoded(&mut self, value: &[u8]) -> Result<(), DynamoError> {
        self.feed.item(value).await.map_err(|_| over())
    }

    /// How values are encoded.
    pub fn codec(&self) -> PayloadCodec {
        self.codec
    }

    /// Says that this was all. The reply goes on.
    pub fn finish(self) {
        self.feed.finish();
    }
}

/// What goes over to the shard.
enum Fed {
    Value(Vec<u8>),
    Finished,
}

/// Writes the values of one bidirectional call, from any thread. Dropped before [`Feed::finish`] it
/// kills the call, so that half an input is not taken for a whole one.
pub struct Feed {
    out: mpsc::Sender<Fed>,
    codec: PayloadCodec,
}

/// The shard's end of a [`Feed`].
pub(super) struct Fodder(mpsc::Receiver<Fed>);

/// The way from any thread to a call.
pub(super) fn channel(codec: PayloadCodec) -> (Feed, Fodder) {
    let (out, fed) = mpsc::channel(VALUES_MAX);
    (Feed { out, codec }, Fodder(fed))
}

impl Feed {
    /// Writes a value. Waits while 64 of them wait for the shard, and it for the instance.
    ///
    /// # Errors
    /// The value has no form in the call's codec, or the call is over.
    pub async fn send<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), DynamoError> {
        let mut bytes = Vec::new();
        encoded(value, self.codec, &mut bytes)?;
        self.send_encoded(bytes).await
    }

    /// The same with a value that is encoded already: one value of [`Feed::codec`].
    ///
    /// # Errors
    /// The call is over.
    pub async fn send_encoded(&mut self, value: Vec<u8>) -> Result<(), DynamoError> {
        let sent = self.out.send(Fed::Value(value)).await;
        sent.map_err(|_| over())
    }

    /// How values are encoded.
    pub fn codec(&self) -> PayloadCodec {
        self.codec
    }

    /// Says that this was all. The reply goes on.
    ///
    /// # Errors
    /// The call is over.
    pub async fn finish(self) -> Result<(), DynamoError> {
        let sent = self.out.send(Fed::Finished).await;
        sent.map_err(|_| over())
    }
}

/// Hands values over to a call; runs on the shard, until either end goes.
pub(super) async fn pour(mut from: Fodder, mut to: LocalFeed) {
    while let Some(fed) = from.0.recv().await {
        match fed {
            Fed::Value(value) if to.send_encoded(&value).await.is_ok() => {}
            Fed::Value(_) => return,
            Fed::Finished => return to.finish(),
        }
    }
}
