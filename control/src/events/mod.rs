//! The event plane for programs: publishers and subscribers of a scope and a topic, on NATS
//! (spec/events-discovery.md §3).
//!
//! ```text
//! publisher --envelope--> NATS subject --> subscriber --> Event
//!     '--> discovery: v1/event_channels/... (and v1/event_sources/... for KV events)
//! ```
//! Events are best effort everywhere in Dynamo: a subscriber misses what was sent before it was
//! there and what it is too slow for. [`Subscriber::losses`] says how much that was.

mod losses;
mod publisher;
pub(crate) mod seen;
mod subscriber;

use std::rc::Rc;

use corelane_codec::event::Scope;
use corelane_codec::event::typed::PayloadError;
use corelane_codec::{EncodeError, event};
use thiserror::Error;

pub use losses::Losses;
pub(crate) use losses::Numbers;
pub use publisher::Publisher;
pub use subscriber::{Event, Subscriber};

use crate::discovery::{Discovery, DiscoveryError};
use crate::env::Env;
use crate::nats::{Nats, NatsError};

/// Which transport events take.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum EventPlane {
    /// None: what is published goes nowhere.
    Off,
    /// A NATS server.
    Nats,
    /// ZMQ, Dynamo's default; not there yet, so who publishes or subscribes is told.
    #[default]
    Zmq,
}

impl EventPlane {
    /// As `DYN_EVENT_PLANE` says, trimmed and in any case.
    ///
    /// # Errors
    /// It says something else; the text says what can be had.
    pub fn read(env: &Env) -> Result<EventPlane, EventsError> {
        let Some(text) = env.get("DYN_EVENT_PLANE") else {
            return Ok(EventPlane::Zmq);
        };
        match text.trim().to_ascii_lowercase().as_str() {
            "none" => Ok(EventPlane::Off),
            "nats" => Ok(EventPlane::Nats),
            "zmq" => Ok(EventPlane::Zmq),
            _ => Err(EventsError::UnknownPlane(text.to_owned())),
        }
    }
}

/// Why an event cannot be published or subscribed to.
#[derive(Debug, Error)]
pub enum EventsError {
    /// `DYN_EVENT_PLANE` has another value.
    #[error("DYN_EVENT_PLANE: {0:?} is none; write nats or none")]
    UnknownPlane(String),
    /// Events are off.
    #[error("events are switched off; set DYN_EVENT_PLANE=nats")]
    Off,
    /// They would go over ZMQ.
    #[error("there are no events over ZMQ here; set DYN_EVENT_PLANE=nats, or none")]
    NoZmq,
    /// No contact with NATS.
    #[error(transparent)]
    Nats(#[from] NatsError),
    /// The connection refuses what is sent.
    #[error("NATS: {0}")]
    Send(String),
    /// The event is larger than the server takes.
    #[error("an event of {bytes} bytes; the server takes {max_bytes}")]
    TooLarge {
        /// Its envelope.
        bytes: usize,
        /// The bound.
        max_bytes: usize,
    },
    /// The event does not fit its length fields.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// The payload has no MessagePack form, or another one.
    #[error(transparent)]
    Payload(#[from] PayloadError),
    /// What came is no event.
    #[error(transparent)]
    Envelope(#[from] event::EventError),
    /// The store refuses the record.
    #[error(transparent)]
    Discovery(#[from] DiscoveryError),
}

/// What events go over.
#[derive(Clone, Debug)]
enum Transport {
    Off,
    Zmq,
    Nats(Nats),
}

/// The event plane of a process. Clones are the same one. It stays on the control thread, inside
/// a `tokio::task::LocalSet`; publishers and subscribers may go anywhere.
#[derive(Clone)]
pub struct Events(Rc<Inner>);

struct Inner {
    discovery: Discovery,
    transport: Transport,
}

impl Events {
    /// Events that go nowhere.
    pub fn off(discovery: &Discovery) -> Events {
        Events::of(discovery, Transport::Off)
    }

    /// Events that would go over ZMQ.
    pub fn zmq(discovery: &Discovery) -> Events {
        Events::of(discovery, Transport::Zmq)
    }

    /// Events over a connection to NATS; publishers are registered in `discovery`.
    pub fn nats(discovery: &Discovery, nats: &Nats) -> Events {
        Events::of(discovery, Transport::Nats(nats.clone()))
    }

    fn of(discovery: &Discovery, transport: Transport) -> Events {
        Events(Rc::new(Inner {
            discovery: discovery.clone(),
            transport,
        }))
    }

    /// A publisher, with an id and a sequence of its own. It is registered when this returns, and
    /// until its last clone is dropped.
    ///
    /// # Errors
    /// The store can never hold its record, or the process is leaving it.
    pub async fn publisher(&self, scope: &Scope, topic: &str) -> Result<Publisher, EventsError> {
        Publisher::open(&self.0.discovery, &self.0.transport, scope, topic).await
    }

    /// Everything that is published from now on with this scope and topic, by anybody.
    ///
    /// # Errors
    /// Events are off, or the connection is closed.
    pub async fn subscriber(&self, scope: &Scope, topic: &str) -> Result<Subscriber, EventsError> {
        Subscriber::open(&self.0.transport, scope, topic).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn planes_by_their_names() {
        let read = |value: &str| {
            EventPlane::read(&Env::of([("DYN_EVENT_PLANE".to_owned(), value.to_owned())]))
        };
        assert_eq!(read("nats").unwrap(), EventPlane::Nats);
        assert_eq!(read(" NATS ").unwrap(), EventPlane::Nats);
        assert_eq!(read("none").unwrap(), EventPlane::Off);
        assert_eq!(read("").unwrap(), EventPlane::Zmq);
        let error = read("kafka").unwrap_err().to_string();
        assert!(
            error.contains("\"kafka\"") && error.contains("nats"),
            "{error}"
        );
    }
}
