//! A subscriber in direct mode: for each publisher that discovery knows a dial, for as long as its
//! record stands (spec/events-discovery.md §3.5).

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use corelane_codec::event::{CHANNELS_BUCKET, EventChannelRecord, EventKey, EventTransport};
use corelane_engine::events::{Command, Group, Side};
use tokio::sync::oneshot;
use tokio::task::spawn_local;
use tokio::time::timeout;

use super::inlet::{Entrance, Subjects, Wanted};
use super::link::Running;
use super::{Zmq, address};
use crate::discovery::{Discovery, Watch};
use crate::events::EventsError;

/// Those who are registered already are dialled before the subscriber is handed out, unless
/// discovery takes longer to list them.
const LISTED: Duration = Duration::from_secs(10);

/// Begins to follow the publishers; ends when the subscriber is `gone`.
pub(super) async fn start(
    zmq: &Zmq,
    running: Rc<Running>,
    discovery: &Discovery,
    wanted: Wanted,
    entrance: Entrance,
    gone: oneshot::Receiver<()>,
) {
    let mut watch: Watch<EventChannelRecord> = discovery.watch(&wanted.key_prefix(), |_, value| {
        serde_json::from_slice(value)
    });
    // The last known directory is better than none.
    let _ = timeout(LISTED, watch.listed()).await;
    let mut follower = Follower {
        zmq: zmq.clone(),
        running,
        wanted,
        entrance,
        dials: BTreeMap::new(),
        refused: BTreeSet::new(),
    };
    follower.look(&watch).await;
    let link = Arc::clone(&follower.running.link);
    spawn_local(async move {
        let ended = async {
            // Nothing is ever sent.
            let _ = gone.await;
        };
        let changes = async {
            loop {
                watch.changed().await;
                follower.look(&watch).await;
            }
        };
        tokio::select! {
            () = ended => {}
            // The subscriber is told by our end of its queue, which goes with us.
            () = link.ended() => {}
            () = changes => {}
        }
        follower.end().await;
    });
}

/// One publisher that is dialled.
struct Dialled {
    group: Group,
    /// Of the dial, and of the consumer beside it.
    number: u64,
}

struct Follower {
    zmq: Zmq,
    running: Rc<Running>,
    wanted: Wanted,
    entrance: Entrance,
    /// By the key of the record; one that is changed in place is not looked at again.
    dials: BTreeMap<String, Dialled>,
    /// Keys of records that cannot be dialled, told once.
    refused: BTreeSet<String>,
}

impl Follower {
    /// Dials who is new, hangs up on who is gone.
    async fn look(&mut self, watch: &Watch<EventChannelRecord>) {
        let mut there = BTreeSet::new();
        let mut new = Vec::new();
        for (key, record, _) in watch.directory().entries() {
            if !self.is_meant(key, record) {
                continue;
            }
            there.insert(key.to_owned());
            if !self.dials.contains_key(key) {
                new.push((key.to_owned(), Rc::clone(record)));
            }
        }
        self.refused.retain(|key| there.contains(key));
        // What is cut off here must be found by `end`: a publisher is in the list while anything
        // of it is in the plane.
        let is_gone = |key: &&String| !there.contains(*key);
        let gone: Vec<String> = self.dials.keys().filter(is_gone).cloned().collect();
        for key in gone {
            self.hang_up(&self.dials[&key]).await;
            if let Some(dialled) = self.dials.remove(&key) {
                self.running.give_back(dialled.group);
            }
        }
        for (key, record) in new {
            if let Err(error) = self.dial(&key, &record).await
                && self.refused.insert(key.clone())
            {
                tracing::warn!(key, %error, "events: a publisher cannot be dialled");
            }
        }
    }

    /// The key decides what exists, the value what is used; both have to be what is wanted.
    fn is_meant(&self, key: &str, record: &EventChannelRecord) -> bool {
        let is_zmq = matches!(record.transport, EventTransport::Zmq(_));
        let Some(said) = EventKey::parse(CHANNELS_BUCKET, key) else {
            return false;
        };
        is_zmq
            && self.wanted.is_meant(&said.scope, &said.topic)
            && self.wanted.is_meant(&record.scope, &record.topic)
    }

    async fn dial(&mut self, key: &str, record: &EventChannelRecord) -> Result<(), EventsError> {
        let EventTransport::Zmq(channel) = &record.transport else {
            return Ok(());
        };
        let address = address::endpoint(&channel.endpoint)?;
        let (group, number) = (self.running.group()?, self.zmq.dial());
        self.dials.insert(key.to_owned(), Dialled { group, number });
        let subject = record.scope.subject(&record.topic).into();
        let subscribe = Command::Subscribe {
            consumer: number,
            group,
            prefixes: vec![record.topic.clone().into_bytes()],
            events: Box::new(self.entrance.of(Subjects::Of(subject))),
        };
        self.running.link.command(subscribe).await?;
        let dial = Command::Dial {
            dial: number,
            address,
            side: Side::Publisher,
            group,
            security: self.zmq.0.options.protection.dials.clone(),
        };
        self.running.link.command(dial).await
    }

    async fn hang_up(&self, dialled: &Dialled) {
        let (link, number) = (&self.running.link, dialled.number);
        // A plane that has stopped has nothing to hang up.
        // The wish goes first: what the publisher sends from then on is not to be taken for lost.
        let wish = Command::Unsubscribe { consumer: number };
        let _ = link.command(wish).await;
        let _ = link.command(Command::Hang { dial: number }).await;
    }

    async fn end(self) {
        for dialled in self.dials.values() {
            self.hang_up(dialled).await;
            self.running.give_back(dialled.group);
        }
    }
}
