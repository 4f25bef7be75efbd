//! A work queue on JetStream (spec/events-discovery.md §6.6): one stream, durable consumers that
//! share its messages, or each have all of them.

use std::time::Duration;

use async_nats::jetstream;
use async_nats::jetstream::consumer::{AckPolicy, PullConsumer, pull};
use async_nats::jetstream::stream::{Config, Stream};
use bytes::Bytes;
use corelane_codec::path::Slug;
use futures_util::{StreamExt, TryStreamExt};
use tokio::time::timeout;

use super::{Nats, NatsError};

/// The consumer that all share who name none.
pub const WORKER_GROUP: &str = "worker-group";
/// Default of `DYN_NATS_STREAM_MAX_AGE`.
pub const MAX_AGE: Duration = Duration::from_secs(3600);
/// An unacknowledged message is given to another after this.
const ACK_WAIT: Duration = Duration::from_secs(30);
/// A durable consumer that nobody asks is forgotten after this.
const INACTIVE_MAX: Duration = Duration::from_secs(300);
/// Time beyond that of a dequeue in which the server must have answered.
const GRACE: Duration = Duration::from_secs(5);

/// Which consumer a queue takes its messages as.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum QueueRole {
    /// [`WORKER_GROUP`]: each message goes to one of those who share it.
    #[default]
    Shared,
    /// A consumer of this name, which gets every message.
    Named(String),
    /// None: it only publishes.
    PublishOnly,
}

/// A queue. Clones share the consumer.
#[derive(Clone, Debug)]
pub struct WorkQueue {
    context: jetstream::Context,
    stream: Stream,
    name: String,
    consumer: Option<(String, PullConsumer)>,
}

fn failed(error: impl std::error::Error) -> NatsError {
    NatsError::Service(format!("JetStream: {}", super::chain(&error)))
}

impl WorkQueue {
    /// Opens the queue of a name, and makes its stream and consumer if they are not there.
    /// Messages are kept for `max_age`.
    ///
    /// # Errors
    /// The server has no JetStream, or refuses.
    pub async fn open(
        nats: &Nats,
        name: &str,
        role: QueueRole,
        max_age: Duration,
    ) -> Result<WorkQueue, NatsError> {
        let name = Slug::slugify(name).as_str().to_owned();
        let context = jetstream::new(nats.client().clone());
        let stream = context
            .get_or_create_stream(Config {
                name: name.clone(),
                subjects: vec![format!("{name}.*")],
                max_age,
                ..Config::default()
            })
            .await
            .map_err(failed)?;
        let consumer = match role {
            QueueRole::PublishOnly => None,
            QueueRole::Shared => Some(WORKER_GROUP.to_owned()),
            QueueRole::Named(name) => Some(name),
        };
        let consumer = match consumer {
            None => None,
            Some(name) => {
                let made = stream.get_or_create_consumer(&name, settings(&name)).await;
                let made = made.map_err(|error| {
                    NatsError::Service(format!("JetStream: consumer {name}: {error}"))
                })?;
                Some((name, made))
            }
        };
        Ok(WorkQueue {
            context,
            stream,
            name,
            consumer,
        })
    }

    /// The name of its stream.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Puts a message at the end, and waits until the server has stored it; Dynamo does not wait.
    /// Answers its sequence number.
    ///
    /// # Errors
    /// The server did not store it.
    pub async fn enqueue(&self, payload: impl Into<Bytes>) -> Result<u64, NatsError> {
        self.publish("queue", payload).await
    }

    /// The same under another last word of the subject: an event.
    ///
    /// # Errors
    /// As [`WorkQueue::enqueue`].
    pub async fn publish(&self, word: &str, payload: impl Into<Bytes>) -> Result<u64, NatsError> {
        let subject = format!("{}.{word}", self.name);
        let sent = self.context.publish(subject, payload.into()).await;
        let stored = sent.map_err(failed)?.await.map_err(failed)?;
        Ok(stored.sequence)
    }

    fn consumer(&self) -> Result<&(String, PullConsumer), NatsError> {
        let none = || NatsError::Service("this queue only publishes".to_owned());
        self.consumer.as_ref().ok_or_else(none)
    }

    /// Takes the next message, and acknowledges it before it is returned, as Dynamo does: who dies
    /// over it has lost it. Waits `patience` at most; `None` if there was nothing.
    ///
    /// # Errors
    /// The queue only publishes, or the server does not answer.
    pub async fn dequeue(&self, patience: Duration) -> Result<Option<Bytes>, NatsError> {
        let (_, consumer) = self.consumer()?;
        let take = async {
            let fetch = consumer.fetch().max_messages(1).expires(patience);
            let mut batch = fetch.messages().await.map_err(failed)?;
            let Some(message) = batch.next().await else {
                return Ok(None);
            };
            let told = |error: async_nats::Error| NatsError::Service(format!("JetStream: {error}"));
            let message = message.map_err(told)?;
            message.ack().await.map_err(told)?;
            Ok(Some(message.payload.clone()))
        };
        let late = |_| NatsError::Service("JetStream does not answer".to_owned());
        timeout(patience + GRACE, take).await.map_err(late)?
    }

    /// Messages that the own consumer, or the shared one, has not been given yet.
    ///
    /// # Errors
    /// There is no such consumer, or no answer.
    pub async fn size(&self) -> Result<u64, NatsError> {
        let name = self
            .consumer
            .as_ref()
            .map_or(WORKER_GROUP, |(name, _)| name);
        let info = self.stream.consumer_info(name).await.map_err(failed)?;
        Ok(info.num_pending)
    }

    /// Messages in the stream, whoever has read them.
    ///
    /// # Errors
    /// No answer.
    pub async fn stored(&self) -> Result<u64, NatsError> {
        let info = self.stream.get_info().await.map_err(failed)?;
        Ok(info.state.messages)
    }

    /// How many consumers there are.
    ///
    /// # Errors
    /// No answer.
    pub async fn consumer_count(&self) -> Result<usize, NatsError> {
        let info = self.stream.get_info().await.map_err(failed)?;
        Ok(info.state.consumer_count)
    }

    /// Their names.
    ///
    /// # Errors
    /// No answer.
    pub async fn consumers(&self) -> Result<Vec<String>, NatsError> {
        let mut names: Vec<String> = self
            .stream
            .consumer_names()
            .try_collect()
            .await
            .map_err(failed)?;
        names.sort();
        Ok(names)
    }

    /// Removes a consumer; the own one if none is named.
    ///
    /// # Errors
    /// There is none of that name, or no answer.
    pub async fn shutdown(&self, name: Option<&str>) -> Result<(), NatsError> {
        let name = match name {
            Some(name) => name,
            None => &self.consumer()?.0,
        };
        self.stream.delete_consumer(name).await.map_err(failed)?;
        Ok(())
    }

    /// Removes all messages below a sequence number. Answers how many there were.
    ///
    /// # Errors
    /// No answer.
    pub async fn purge_up_to(&self, sequence: u64) -> Result<u64, NatsError> {
        let purged = self.stream.purge().sequence(sequence).await;
        Ok(purged.map_err(failed)?.purged)
    }

    /// Removes all messages.
    ///
    /// # Errors
    /// No answer.
    pub async fn purge(&self) -> Result<u64, NatsError> {
        Ok(self.stream.purge().await.map_err(failed)?.purged)
    }

    /// Removes the messages that all consumers have acknowledged. Unlike Dynamo, a consumer that
    /// has not acknowledged anything yet counts: nothing unread is ever removed.
    ///
    /// # Errors
    /// No answer.
    pub async fn purge_acknowledged(&self) -> Result<u64, NatsError> {
        let mut consumers = self.stream.consumers();
        let mut floor: Option<u64> = None;
        while let Some(consumer) = consumers.try_next().await.map_err(failed)? {
            let acknowledged = consumer.ack_floor.stream_sequence;
            floor = Some(floor.map_or(acknowledged, |floor| floor.min(acknowledged)));
        }
        match floor {
            None | Some(0) => Ok(0),
            Some(floor) => self.purge_up_to(floor + 1).await,
        }
    }
}

fn settings(name: &str) -> pull::Config {
    pull::Config {
        durable_name: Some(name.to_owned()),
        ack_policy: AckPolicy::Explicit,
        ack_wait: ACK_WAIT,
        inactive_threshold: INACTIVE_MAX,
        ..pull::Config::default()
    }
}
