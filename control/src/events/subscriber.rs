//! Subscribing: everything of one scope and topic, read, checked and counted.

use bytes::Bytes;
use corelane_codec::event::{Envelope, Scope, typed};
use futures_util::StreamExt;
use serde::de::DeserializeOwned;

use super::losses::{Losses, Numbers};
use super::{EventsError, Transport};

/// One event, as it came.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Event {
    /// Who published it.
    pub publisher_id: u64,
    /// Its number there.
    pub sequence: u64,
    /// Unix time in milliseconds, by the publisher's clock.
    pub published_at_ms: u64,
    /// What it says.
    pub payload: Bytes,
}

impl Event {
    /// The payload as a value.
    ///
    /// # Errors
    /// It is not of this type.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T, EventsError> {
        Ok(typed::from_payload(&self.payload)?)
    }
}

/// Receives events of one scope and topic. Whoever does not take them fast enough loses the
/// newest ones.
pub struct Subscriber {
    topic: String,
    inlet: async_nats::Subscriber,
    numbers: Numbers,
}

impl Subscriber {
    pub(super) async fn open(
        transport: &Transport,
        scope: &Scope,
        topic: &str,
    ) -> Result<Subscriber, EventsError> {
        let nats = match transport {
            Transport::Nats(nats) => nats,
            Transport::Off => return Err(EventsError::Off),
            Transport::Zmq => return Err(EventsError::NoZmq),
        };
        let send = |error: &dyn std::error::Error| EventsError::Send(error.to_string());
        let client = nats.client();
        let inlet = client.subscribe(scope.subject(topic)).await;
        let inlet = inlet.map_err(|error| send(&error))?;
        // What is published after this has returned must not be missed.
        nats.settled().await?;
        Ok(Subscriber {
            topic: topic.to_owned(),
            inlet,
            numbers: Numbers::default(),
        })
    }

    /// The next event; `None` when the connection has been closed. A message that is no event is
    /// an error, after which the next ones come. Cancel safe.
    pub async fn next(&mut self) -> Option<Result<Event, EventsError>> {
        loop {
            let message = self.inlet.next().await?;
            if let Some(read) = self.read(&message.payload) {
                return Some(read);
            }
        }
    }

    /// Reads a message; `None` for one of another topic, as Dynamo drops it.
    fn read(&mut self, message: &Bytes) -> Option<Result<Event, EventsError>> {
        let envelope = match Envelope::decode(message) {
            Ok(envelope) => envelope,
            Err(error) => {
                self.numbers.losses.unreadable += 1;
                return Some(Err(error.into()));
            }
        };
        if envelope.topic != self.topic {
            self.numbers.losses.unreadable += 1;
            return None;
        }
        self.numbers.came(envelope.publisher_id, envelope.sequence);
        Some(Ok(Event {
            publisher_id: envelope.publisher_id,
            sequence: envelope.sequence,
            published_at_ms: envelope.published_at_ms,
            payload: message.slice_ref(envelope.payload),
        }))
    }

    /// What was missed so far.
    pub fn losses(&self) -> Losses {
        self.numbers.losses
    }
}
