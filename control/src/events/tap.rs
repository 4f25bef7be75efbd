//! Listening to many scopes and topics at once, for whoever shows or passes on what there is.

use std::sync::Arc;

use bytes::Bytes;
use corelane_codec::event::{Envelope, Scope, parse_subject};

use super::subscriber::Inlet;
use super::zmq;
use super::{EventsError, Transport};
use crate::discovery::Discovery;

/// A message of some publisher.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Tapped {
    /// Its full subject: scope and topic.
    pub subject: Arc<str>,
    /// The envelope, which nobody has looked at.
    pub envelope: Bytes,
}

/// Receives what is published on some topics of some scopes.
pub struct Tap {
    inlet: Inlet,
    topic: Option<String>,
}

impl Tap {
    pub(super) async fn open(
        discovery: &Discovery,
        transport: &Transport,
        scope: Option<&Scope>,
        topic: Option<&str>,
    ) -> Result<Tap, EventsError> {
        Ok(Tap {
            inlet: Inlet::open(discovery, transport, scope, topic).await?,
            topic: topic.map(str::to_owned),
        })
    }

    /// The next message; `None` when the connection has been closed. Cancel safe.
    pub async fn next(&mut self) -> Option<Tapped> {
        loop {
            let (subject, envelope) = self.inlet.next().await?;
            if self.is_wanted(&subject) && self.is_new(&envelope) {
                return Some(Tapped { subject, envelope });
            }
        }
    }

    /// Events that came and found our queue full.
    pub fn dropped(&self) -> u64 {
        match &self.inlet {
            Inlet::Nats(_) => 0,
            Inlet::Zmq(inlet) => inlet.dropped(),
        }
    }

    fn is_wanted(&self, subject: &str) -> bool {
        let Some(wanted) = &self.topic else {
            return true;
        };
        parse_subject(subject).is_some_and(|(_, topic)| topic == *wanted)
    }

    /// Where several brokers bring the same events, the first one counts.
    fn is_new(&mut self, envelope: &[u8]) -> bool {
        let Inlet::Zmq(zmq::Inlet {
            seen: Some(seen), ..
        }) = &mut self.inlet
        else {
            return true;
        };
        let read = Envelope::decode(envelope);
        read.is_ok_and(|read| seen.is_new(read.publisher_id, read.sequence))
    }
}
