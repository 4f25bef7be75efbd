//! The event plane for programs: publishers and subscribers of a scope and a topic, over ZMQ or
//! NATS (spec/events-discovery.md §3).
//!
//! ```text
//! publisher --envelope--> NATS subject, or ZMQ directly or by a broker --> subscriber --> Event
//!     '--> discovery: v1/event_channels/... (and v1/event_sources/... for KV events)
//! ```
//! Events are best effort everywhere in Dynamo: a subscriber misses what was sent before it was
//! there and what it is too slow for. [`Subscriber::losses`] says how much that was.

mod curve;
mod losses;
mod publisher;
pub(crate) mod reports;
pub(crate) mod seen;
mod subscriber;
mod tap;
mod zmq;

use std::rc::Rc;
use std::sync::Arc;

use corelane_codec::event::Scope;
use corelane_codec::event::typed::PayloadError;
use corelane_codec::{EncodeError, event};
use corelane_engine::events::stats::Stats;
use thiserror::Error;

#[cfg(feature = "curve")]
pub use curve::new_secret_key;
pub use curve::{CurveError, CurveOptions, Protection};
pub use losses::Losses;
pub(crate) use losses::Numbers;
pub use publisher::Publisher;
pub use subscriber::{Event, Subscriber};
pub use tap::{Tap, Tapped};
pub(crate) use zmq::BROKER_COMPONENT;
pub use zmq::{AddressError, BrokerUrl, Via, ZmqOptions};

use crate::discovery::{Discovery, DiscoveryError};
use crate::env::Env;
use crate::nats::{Nats, NatsError};
use zmq::Zmq;

/// Which transport events take.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum EventPlane {
    /// None: what is published goes nowhere.
    Off,
    /// A NATS server.
    Nats,
    /// ZMQ, Dynamo's default: from publishers to subscribers, or through brokers.
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
    #[error("DYN_EVENT_PLANE: {0:?} is none; write zmq, nats or none")]
    UnknownPlane(String),
    /// Events are off.
    #[error("events are switched off; set DYN_EVENT_PLANE to zmq or nats")]
    Off,
    /// No contact with NATS.
    #[error(transparent)]
    Nats(#[from] NatsError),
    /// The connection refuses what is sent.
    #[error("NATS: {0}")]
    Send(String),
    /// An address of ZMQ cannot be used.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// Keys of CURVE cannot be used.
    #[error("{0}; {instead}", instead = .0.instead())]
    Curve(#[from] CurveError),
    /// Nobody is registered who passes events on.
    #[error(
        "no broker of events is registered in namespace {0:?}; start one (corelane serve with \
         broker = true under [events]), name one in DYN_ZMQ_BROKER_URL, or unset \
         DYN_ZMQ_BROKER_ENABLED"
    )]
    NoBroker(String),
    /// No socket for a publisher.
    #[error("cannot listen for subscribers: {0}")]
    Bind(std::io::Error),
    /// No thread for events.
    #[error("cannot start the event plane: {0}")]
    Plane(std::io::Error),
    /// The thread of the event plane does not keep up, or a subscriber does not read.
    #[error("the event plane does not keep up with what is published; publish less at a time")]
    Busy,
    /// The event plane has been stopped.
    #[error("the event plane has been stopped")]
    Closed,
    /// The event is larger than can be sent.
    #[error("an event of {bytes} bytes; at most {max_bytes} can be sent")]
    TooLarge {
        /// Its envelope, or all of its message.
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
#[derive(Clone)]
enum Transport {
    Off,
    Zmq(Zmq),
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

    /// Events over ZMQ; publishers are registered and found in `discovery`. A thread for them is
    /// started with the first publisher or subscriber.
    pub fn zmq(discovery: &Discovery, options: ZmqOptions) -> Events {
        Events::of(discovery, Transport::Zmq(Zmq::new(options)))
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
    /// The store can never hold its record, or the process is leaving it; there is no broker
    /// where one is asked for; no port or thread is to be had.
    pub async fn publisher(&self, scope: &Scope, topic: &str) -> Result<Publisher, EventsError> {
        Publisher::open(&self.0.discovery, &self.0.transport, scope, topic).await
    }

    /// Everything that is published from now on with this scope and topic, by anybody. Over ZMQ
    /// that is from when its connection to the publisher or broker stands, which is not waited for.
    ///
    /// # Errors
    /// Events are off, the connection is closed, or there is no broker where one is asked for.
    pub async fn subscriber(&self, scope: &Scope, topic: &str) -> Result<Subscriber, EventsError> {
        Subscriber::open(&self.0.discovery, &self.0.transport, scope, topic).await
    }

    /// What is published, as it came: on one topic or all, of one scope (not what is below it) or
    /// all.
    ///
    /// # Errors
    /// As [`Events::subscriber`].
    pub async fn tap(
        &self,
        scope: Option<&Scope>,
        topic: Option<&str>,
    ) -> Result<Tap, EventsError> {
        Tap::open(&self.0.discovery, &self.0.transport, scope, topic).await
    }

    /// Ends what goes over ZMQ; what waits for others is given a second. Publishers and
    /// subscribers that are left get an error, or the end.
    pub async fn close(&self) {
        if let Transport::Zmq(zmq) = &self.0.transport {
            zmq.close().await;
        }
    }

    /// The counters of what goes over ZMQ, once anything does.
    pub fn stats(&self) -> Option<Arc<Stats>> {
        match &self.0.transport {
            Transport::Zmq(zmq) => zmq.stats(),
            Transport::Off | Transport::Nats(_) => None,
        }
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
