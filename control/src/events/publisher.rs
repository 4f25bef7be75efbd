//! Publishing: an id, a sequence, and a record in discovery while it lives.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use corelane_codec::discovery::{EndpointRecord, InstanceRecord};
use corelane_codec::event::{
    CHANNELS_BUCKET, Envelope, EventChannelRecord, EventKey, EventSourceRecord, EventTransport,
    KvWorker, NatsChannel, SOURCES_BUCKET, Scope, SourceMetadata, typed,
};
use corelane_codec::path::EndpointId;
use serde::Serialize;
use tokio::sync::oneshot;
use tokio::task::spawn_local;

use super::zmq;
use super::{EventsError, Transport};
use crate::discovery::{Discovery, Entry, Record, Registered, random_id};
use crate::nats::Nats;

/// Ids of publishers have 53 bits, so that every JSON reader holds them.
const ID_MAX: u64 = (1 << 53) - 1;

/// Publishes events of one scope and topic. Clones share id and sequence, and may be used from
/// any thread; the record is withdrawn when the last one is dropped.
#[derive(Clone)]
pub struct Publisher(Arc<Inner>);

struct Inner {
    key: EventKey,
    sequence: AtomicU64,
    outlet: Outlet,
    /// Dropped with us, which withdraws the records.
    _alive: oneshot::Sender<()>,
}

enum Outlet {
    Nowhere,
    Nats { nats: Nats, subject: String },
    Zmq(zmq::Outlet),
}

impl Publisher {
    pub(super) async fn open(
        discovery: &Discovery,
        transport: &Transport,
        scope: &Scope,
        topic: &str,
    ) -> Result<Publisher, EventsError> {
        let key = EventKey {
            scope: scope.clone(),
            topic: topic.to_owned(),
            publisher_id: random_id() & ID_MAX,
        };
        let mut own = None;
        let (outlet, channel) = match transport {
            Transport::Off => (Outlet::Nowhere, None),
            Transport::Zmq(zmq) => {
                let (outlet, channel, mine) = zmq.outlet(discovery, &key).await?;
                own = Some(mine);
                (Outlet::Zmq(outlet), channel)
            }
            Transport::Nats(nats) => {
                let subject_prefix = scope.subject_prefix();
                let outlet = Outlet::Nats {
                    nats: nats.clone(),
                    subject: scope.subject(topic),
                };
                let channel = EventTransport::Nats(NatsChannel { subject_prefix });
                (outlet, Some(channel))
            }
        };
        let (alive, gone) = oneshot::channel();
        let registered = match channel {
            Some(channel) => discovery.register(channel_record(&key, channel)).await,
            None => Ok(Registered::Stored),
        };
        // A door that nobody can be told of is shut again: `gone` is over at once then.
        if !matches!(outlet, Outlet::Nowhere) {
            spawn_local(withdraw(discovery.clone(), key.clone(), gone, own));
        }
        registered?;
        Ok(Publisher(Arc::new(Inner {
            key,
            sequence: AtomicU64::new(0),
            outlet,
            _alive: alive,
        })))
    }

    /// Says which worker the KV events of this publisher are about: `dp_rank` of this process, as
    /// an instance of `endpoint`. Dynamo's KV router uses no event of a publisher without this
    /// (spec/events-discovery.md §3.9). To be called on the control thread.
    ///
    /// # Errors
    /// The store can never hold the record, or it has been said before.
    pub async fn is_source(
        &self,
        discovery: &Discovery,
        endpoint: &EndpointId,
        dp_rank: u32,
    ) -> Result<(), EventsError> {
        let worker = (None, dp_rank);
        self.is_source_with(discovery, endpoint, worker, None).await
    }

    /// The same, perhaps about an instance that another process has registered, and with the
    /// instance record of where the publisher is asked.
    pub(crate) async fn is_source_with(
        &self,
        discovery: &Discovery,
        endpoint: &EndpointId,
        worker: (Option<u64>, u32),
        asked_at: Option<Record>,
    ) -> Result<(), EventsError> {
        if matches!(self.0.outlet, Outlet::Nowhere) {
            return Ok(());
        }
        let record = source_record(&self.0.key, endpoint.clone(), worker, asked_at);
        discovery.register(record).await?;
        Ok(())
    }

    /// Its own id; not the worker's.
    pub fn id(&self) -> u64 {
        self.0.key.publisher_id
    }

    /// Its scope.
    pub fn scope(&self) -> &Scope {
        &self.0.key.scope
    }

    /// Its topic.
    pub fn topic(&self) -> &str {
        &self.0.key.topic
    }

    /// How many events have been published, or tried.
    pub fn published(&self) -> u64 {
        self.0.sequence.load(Ordering::Relaxed)
    }

    /// Publishes a value as Dynamo does: MessagePack, structs as maps.
    ///
    /// # Errors
    /// The value has no such form, or as [`Publisher::publish_bytes`].
    pub async fn publish<T: Serialize>(&self, event: &T) -> Result<(), EventsError> {
        self.publish_bytes(&typed::to_payload(event)?).await
    }

    /// Publishes a payload as it is. Waits while too much waits for the connection, or for the
    /// thread of the event plane; that it arrives anywhere is not known to anybody.
    ///
    /// # Errors
    /// The event is larger than can be sent, or the connection or plane is closed. Its number is
    /// used up all the same.
    pub async fn publish_bytes(&self, payload: &[u8]) -> Result<(), EventsError> {
        let sequence = self.0.sequence.fetch_add(1, Ordering::Relaxed);
        let envelope = Envelope {
            publisher_id: self.0.key.publisher_id,
            sequence,
            published_at_ms: now_ms(),
            topic: &self.0.key.topic,
            payload,
        };
        match &self.0.outlet {
            Outlet::Nowhere => Ok(()),
            Outlet::Zmq(outlet) => outlet.send(&envelope).await,
            Outlet::Nats { nats, subject } => {
                let mut bytes = Vec::new();
                envelope.write(&mut bytes)?;
                let max_bytes = nats.message_bytes_max();
                if bytes.len() > max_bytes {
                    let bytes = bytes.len();
                    return Err(EventsError::TooLarge { bytes, max_bytes });
                }
                let sent = nats.client().publish(subject.clone(), bytes.into()).await;
                sent.map_err(|error| EventsError::Send(error.to_string()))
            }
        }
    }

    /// Waits until the server has got what was published, or sockets have taken it.
    ///
    /// # Errors
    /// The connection or plane is closed, or a subscriber does not read for a minute.
    pub async fn flush(&self) -> Result<(), EventsError> {
        match &self.0.outlet {
            Outlet::Nowhere => Ok(()),
            Outlet::Zmq(outlet) => outlet.flush().await,
            Outlet::Nats { nats, .. } => Ok(nats.settled().await?),
        }
    }

    /// Waits until somebody is there to get what is published, for so long at most: over ZMQ what
    /// is published before that is lost. Over NATS nobody knows, and the answer is yes at once.
    ///
    /// # Errors
    /// The plane is closed.
    pub async fn is_wanted(&self, within: Duration) -> Result<bool, EventsError> {
        match &self.0.outlet {
            Outlet::Nowhere => Ok(false),
            Outlet::Nats { .. } => Ok(true),
            Outlet::Zmq(outlet) => outlet.is_wanted(within).await,
        }
    }
}

/// Milliseconds since 1970; 0 on a machine whose clock is before that.
fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    })
}

fn channel_name(key: &EventKey) -> String {
    format!("event channel {key}")
}

fn source_name(key: &EventKey) -> String {
    format!("event source {key}")
}

fn channel_record(key: &EventKey, transport: EventTransport) -> Record {
    let record = EventChannelRecord::new(key, transport);
    Record::new(channel_name(key), move |_| Entry {
        key: record.key().in_bucket(CHANNELS_BUCKET),
        value: serde_json::to_vec(&record).unwrap_or_default(),
    })
}

fn source_record(
    key: &EventKey,
    endpoint: EndpointId,
    (worker_id, dp_rank): (Option<u64>, u32),
    asked_at: Option<Record>,
) -> Record {
    let key = key.clone();
    Record::new(source_name(&key), move |own_id| {
        let worker_id = worker_id.unwrap_or(own_id);
        let metadata = SourceMetadata {
            kv_state_endpoint: endpoint.clone(),
            worker: KvWorker { worker_id, dp_rank },
            publisher_id: key.publisher_id,
            recovery_target: asked_at
                .as_ref()
                .and_then(|asked_at| target(asked_at, own_id)),
        };
        let record = EventSourceRecord::new(&key, &metadata);
        let value = record.and_then(|record| serde_json::to_vec(&record));
        Entry {
            key: key.in_bucket(SOURCES_BUCKET),
            // Names and numbers always have a JSON form.
            value: value.unwrap_or_default(),
        }
    })
}

/// An instance of ours as a source record names it.
fn target(asked_at: &Record, id: u64) -> Option<InstanceRecord> {
    let record: EndpointRecord = serde_json::from_slice(&asked_at.entry(id).value).ok()?;
    Some(record.instance)
}

/// Takes the records of a publisher back when it is gone, and shuts its door.
async fn withdraw(
    discovery: Discovery,
    key: EventKey,
    gone: oneshot::Receiver<()>,
    own: Option<zmq::Own>,
) {
    // Nothing is ever sent.
    let _ = gone.await;
    discovery.unregister(&source_name(&key)).await;
    discovery.unregister(&channel_name(&key)).await;
    if let Some(own) = own {
        own.shut().await;
    }
}
