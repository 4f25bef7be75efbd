//! A call as another thread sees it: begun and read on a shard, its items handed over.

use corelane_codec::control_message::PayloadCodec;
use corelane_codec::error::DynamoError;
use corelane_codec::item::Annotated;
use corelane_engine::local::Ending;
use serde::de::DeserializeOwned;
use tokio::sync::{mpsc, watch};

use super::client::{Call, Client};
use super::feed::{self, Feed, Fodder};
use super::items::{self, Items};
use super::local_client::{LocalClient, LocalReply};
use super::shard::Shard;

/// Items between a shard and a reply's reader; beyond them the instance is held back.
const ITEMS_MAX: usize = 64;

/// What a shard says of a call.
enum Said {
    /// Instance of that id has begun to respond.
    Began(u64),
    Item(Vec<u8>),
    Failed(DynamoError),
    Ended(Option<Ending>),
}

/// What the reader wants of a call.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
enum Wish {
    #[default]
    Nothing,
    Stop,
    Kill,
}

/// The response to a call, item by item. Dropped before its end it kills the call.
pub struct Reply {
    said: mpsc::Receiver<Said>,
    wish: watch::Sender<Wish>,
    stopped: watch::Receiver<bool>,
    codec: PayloadCodec,
    instance_id: u64,
    ending: Option<Ending>,
    /// The shard has gone without a last word.
    cut: bool,
    over: bool,
}

/// Sends a call from any thread.
pub(super) async fn send(client: &Client, call: Call) -> Result<Reply, DynamoError> {
    carried(client, call, None).await
}

/// Begins a bidirectional call from any thread.
pub(super) async fn send_many(client: &Client, call: Call) -> Result<(Feed, Reply), DynamoError> {
    let (feed, fodder) = feed::channel(call.codec);
    let reply = carried(client, call, Some(fodder)).await?;
    Ok((feed, reply))
}

async fn carried(
    client: &Client,
    call: Call,
    fodder: Option<Fodder>,
) -> Result<Reply, DynamoError> {
    let (out, said) = mpsc::channel(ITEMS_MAX);
    let (wish, wishes) = watch::channel(Wish::default());
    let codec = call.codec;
    let own = client.clone();
    let carried = move |shard| carry(own, shard, call, fodder, Out { out, wishes });
    client.hub.spawn(carried).await?;
    let mut reply = Reply {
        said,
        wish,
        stopped: client.hub.stopped(),
        codec,
        instance_id: 0,
        ending: None,
        cut: false,
        over: false,
    };
    match reply.hear().await {
        Said::Began(id) => {
            reply.instance_id = id;
            Ok(reply)
        }
        Said::Failed(error) => Err(error),
        Said::Item(_) | Said::Ended(_) => Err(gone()),
    }
}

fn gone() -> DynamoError {
    DynamoError::disconnected("the runtime that made this call has stopped")
}

impl Reply {
    /// The next item. An item that is an error, and what ends the response early, come as `Err`;
    /// after the former more may come. `None` is the end.
    pub async fn next<T: DeserializeOwned>(&mut self) -> Option<Result<Annotated<T>, DynamoError>> {
        items::next(self).await
    }

    /// The data of the next item that has any.
    pub async fn next_data<T: DeserializeOwned>(&mut self) -> Option<Result<T, DynamoError>> {
        items::next_data(self).await
    }

    /// The next item as it came: one encoded value. An error item is no `Err` here.
    pub async fn next_item(&mut self) -> Option<Result<Vec<u8>, DynamoError>> {
        if self.over {
            return None;
        }
        match self.hear().await {
            Said::Item(item) => Some(Ok(item)),
            Said::Failed(error) => Some(Err(error)),
            Said::Began(_) => None,
            Said::Ended(ending) => {
                self.over = true;
                self.ending = ending;
                None
            }
        }
    }

    /// How its items are encoded.
    pub fn codec(&self) -> PayloadCodec {
        self.codec
    }

    /// Who answers.
    pub fn instance_id(&self) -> u64 {
        self.instance_id
    }

    /// How it has ended, once [`Reply::next`] has answered `None`.
    pub fn ending(&self) -> Option<Ending> {
        self.ending
    }

    /// Asks the instance to stop; what it still sends is given.
    pub fn stop(&self) {
        self.wish(Wish::Stop);
    }

    /// Tells the instance to end at once; nothing more is given.
    pub fn kill(&self) {
        self.wish(Wish::Kill);
    }

    fn wish(&self, wish: Wish) {
        self.wish.send_if_modified(|before| {
            let stronger = *before != wish && *before != Wish::Kill;
            if stronger {
                *before = wish;
            }
            stronger
        });
    }

    /// What the shard says next. A shard that goes before the end says nothing: that is told as an
    /// error, once, and never taken for the end of a whole response.
    async fn hear(&mut self) -> Said {
        if self.cut {
            return Said::Ended(Some(Ending::Failed));
        }
        let said = tokio::select! {
            biased;
            said = self.said.recv() => said,
            _ = self.stopped.wait_for(|stopped| *stopped) => None,
        };
        match said {
            Some(said) => said,
            // Whoever has killed a call does not ask how it broke off.
            None if *self.wish.borrow() == Wish::Kill => Said::Ended(Some(Ending::Stopped)),
            None => {
                self.cut = true;
                Said::Failed(gone())
            }
        }
    }
}

impl Items for Reply {
    fn codec(&self) -> PayloadCodec {
        self.codec
    }

    async fn next_item(&mut self) -> Option<Result<Vec<u8>, DynamoError>> {
        Reply::next_item(self).await
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if !self.over {
            // The shard sees that nobody listens, and drops the call, which kills it.
            self.said.close();
            self.wish(Wish::Kill);
        }
    }
}

/// The shard's end.
struct Out {
    out: mpsc::Sender<Said>,
    wishes: watch::Receiver<Wish>,
}

/// Makes a call and hands its items over; runs on the shard.
async fn carry(client: Client, shard: Shard, call: Call, fodder: Option<Fodder>, mut to: Out) {
    let local = LocalClient::new(&client, &shard);
    let begun = tokio::select! {
        begun = begin(&local, call, fodder) => begun,
        () = to.out.closed() => return,
    };
    let mut reply = match begun {
        Ok(reply) => reply,
        Err(error) => {
            // Nothing else was said, so that there is room.
            let _ = to.out.try_send(Said::Failed(error));
            return;
        }
    };
    if !to.say(Said::Began(reply.instance_id()), &reply).await {
        return;
    }
    loop {
        let item = tokio::select! {
            item = reply.next_item() => item,
            changed = to.wishes.changed() => match changed {
                Ok(()) => {
                    obey(*to.wishes.borrow_and_update(), &reply);
                    continue;
                }
                Err(_) => return,
            },
        };
        let said = match item {
            Some(Ok(item)) => Said::Item(item),
            Some(Err(error)) => Said::Failed(error),
            None => {
                let ending = reply.ending();
                // It is over: the call must not wait for a reader who is slow.
                drop(reply);
                let _ = to.out.send(Said::Ended(ending)).await;
                return;
            }
        };
        if !to.say(said, &reply).await {
            return;
        }
    }
}

async fn begin(
    local: &LocalClient,
    call: Call,
    fodder: Option<Fodder>,
) -> Result<LocalReply, DynamoError> {
    let Some(fodder) = fodder else {
        return local.send(call).await;
    };
    let (feed, reply) = local.send_many(call).await?;
    let nudge = local.nudge();
    let pour = async move { nudge.hear(feed::pour(fodder, feed)).await };
    if !local.shard().spawn(pour) {
        let text = "too many tasks run on this shard";
        return Err(DynamoError::resource_exhausted(text));
    }
    Ok(reply)
}

fn obey(wish: Wish, reply: &LocalReply) {
    match wish {
        Wish::Nothing => {}
        Wish::Stop => reply.stop(),
        Wish::Kill => reply.kill(),
    }
}

impl Out {
    /// Waits for room; wishes are obeyed meanwhile. False when nobody listens.
    async fn say(&mut self, said: Said, reply: &LocalReply) -> bool {
        let room = loop {
            tokio::select! {
                room = self.out.reserve() => break room,
                changed = self.wishes.changed() => match changed {
                    Ok(()) => obey(*self.wishes.borrow_and_update(), reply),
                    Err(_) => return false,
                },
            }
        };
        match room {
            Ok(room) => {
                room.send(said);
                true
            }
            Err(_) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use corelane_codec::error::Reason;

    use super::*;

    /// A reply whose shard has said one item, and what the shard holds of it.
    fn begun() -> (Reply, mpsc::Sender<Said>, watch::Sender<bool>) {
        let (out, said) = mpsc::channel(ITEMS_MAX);
        let (ended, stopped) = watch::channel(false);
        out.try_send(Said::Item(b"1".to_vec())).ok().unwrap();
        let reply = Reply {
            said,
            wish: watch::channel(Wish::default()).0,
            stopped,
            codec: PayloadCodec::Json,
            instance_id: 0,
            ending: None,
            cut: false,
            over: false,
        };
        (reply, out, ended)
    }

    async fn is_cut_off(mut reply: Reply) {
        assert_eq!(reply.next_item().await, Some(Ok(b"1".to_vec())));
        let cut = reply.next_item().await.unwrap().unwrap_err();
        assert_eq!(cut.reason(), Reason::Disconnected);
        for _ in 0..2 {
            assert_eq!(reply.next_item().await, None);
            assert_eq!(reply.ending(), Some(Ending::Failed));
        }
    }

    /// The shard drops its tasks as it ends, or ends and leaves them: the same for the reader.
    #[tokio::test]
    async fn a_response_that_is_cut_off_with_its_shard_does_not_look_complete() {
        let (reply, out, _running) = begun();
        drop(out);
        is_cut_off(reply).await;
        let (reply, _out, ended) = begun();
        ended.send_replace(true);
        is_cut_off(reply).await;
    }

    #[tokio::test]
    async fn a_killed_response_gives_nothing_more_when_its_shard_goes() {
        let (mut reply, out, _running) = begun();
        assert_eq!(reply.next_item().await, Some(Ok(b"1".to_vec())));
        reply.kill();
        drop(out);
        assert_eq!(reply.next_item().await, None);
        assert_eq!(reply.ending(), Some(Ending::Stopped));
    }
}
