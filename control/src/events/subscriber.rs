//! Subscribing: everything of one scope and topic, read, checked and counted.

use std::sync::Arc;

use bytes::Bytes;
use corelane_codec::event::{Envelope, Scope, typed};
use futures_util::StreamExt;
use serde::de::DeserializeOwned;

use super::losses::{Losses, Numbers};
use super::zmq::{self, Wanted};
use super::{EventsError, Transport};
use crate::discovery::Discovery;

/// One event, as it came.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Event {
    /// The bare topic.
    pub topic: Arc<str>,
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

/// Receives events of one scope and topic, over whatever the process has. Whoever does not take
/// them fast enough loses the newest ones.
pub struct Subscriber {
    topic: Arc<str>,
    inlet: Inlet,
    numbers: Numbers,
}

pub(super) enum Inlet {
    Nats(async_nats::Subscriber),
    Zmq(zmq::Inlet),
}

impl Inlet {
    pub(super) async fn open(
        discovery: &Discovery,
        transport: &Transport,
        scope: Option<&Scope>,
        topic: Option<&str>,
    ) -> Result<Inlet, EventsError> {
        let nats = match transport {
            Transport::Off => return Err(EventsError::Off),
            Transport::Zmq(zmq) => {
                let wanted = Wanted {
                    scope: scope.cloned(),
                    topic: topic.map(str::to_owned),
                };
                return Ok(Inlet::Zmq(zmq.inlet(discovery, wanted).await?));
            }
            Transport::Nats(nats) => nats,
        };
        // Topic and scope are at both ends of a subject, so that not both can be left open there.
        let subject = match (scope, topic) {
            (Some(scope), Some(topic)) => scope.subject(topic),
            (Some(scope), None) => format!("{}.*", scope.subject_prefix()),
            (None, _) => "namespace.>".to_owned(),
        };
        let inlet = nats.client().subscribe(subject).await;
        let inlet = inlet.map_err(|error| EventsError::Send(error.to_string()))?;
        // What is published after this has returned must not be missed.
        nats.settled().await?;
        Ok(Inlet::Nats(inlet))
    }

    /// The next message: its subject and its envelope. Cancel safe.
    pub(super) async fn next(&mut self) -> Option<(Arc<str>, Bytes)> {
        match self {
            Inlet::Nats(inlet) => {
                let message = inlet.next().await?;
                Some((message.subject.as_str().into(), message.payload))
            }
            Inlet::Zmq(inlet) => inlet.next().await,
        }
    }
}

impl Subscriber {
    pub(super) async fn open(
        discovery: &Discovery,
        transport: &Transport,
        scope: &Scope,
        topic: &str,
    ) -> Result<Subscriber, EventsError> {
        Ok(Subscriber {
            topic: topic.into(),
            inlet: Inlet::open(discovery, transport, Some(scope), Some(topic)).await?,
            numbers: Numbers::default(),
        })
    }

    /// The next event; `None` when the connection has been closed. A message that is no event is
    /// an error, after which the next ones come. Cancel safe.
    pub async fn next(&mut self) -> Option<Result<Event, EventsError>> {
        loop {
            let message = match &mut self.inlet {
                Inlet::Nats(inlet) => inlet.next().await?.payload,
                Inlet::Zmq(inlet) => inlet.next().await?.1,
            };
            if let Some(read) = self.read(&message) {
                return Some(read);
            }
        }
    }

    /// Reads a message; `None` for one of another topic, as Dynamo drops it, and for one that
    /// another broker has brought.
    fn read(&mut self, message: &Bytes) -> Option<Result<Event, EventsError>> {
        let envelope = match Envelope::decode(message) {
            Ok(envelope) => envelope,
            Err(error) => {
                self.numbers.losses.unreadable += 1;
                return Some(Err(error.into()));
            }
        };
        if envelope.topic != &*self.topic {
            self.numbers.losses.unreadable += 1;
            return None;
        }
        let (publisher_id, sequence) = (envelope.publisher_id, envelope.sequence);
        if let Inlet::Zmq(zmq::Inlet {
            seen: Some(seen), ..
        }) = &mut self.inlet
            && !seen.is_new(publisher_id, sequence)
        {
            return None;
        }
        self.numbers.came(publisher_id, sequence);
        Some(Ok(Event {
            topic: Arc::clone(&self.topic),
            publisher_id,
            sequence,
            published_at_ms: envelope.published_at_ms,
            payload: message.slice_ref(envelope.payload),
        }))
    }

    /// What was missed so far.
    pub fn losses(&self) -> Losses {
        let losses = self.numbers.losses;
        match &self.inlet {
            Inlet::Nats(_) => losses,
            Inlet::Zmq(inlet) => Losses {
                dropped: inlet.dropped(),
                unreadable: losses.unreadable + inlet.of_others(),
                ..losses
            },
        }
    }
}
