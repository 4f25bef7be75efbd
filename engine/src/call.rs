//! A call as whoever makes it asks for it, and what he hears of it.

use std::hash::{DefaultHasher, Hasher};
use std::net::SocketAddr;
use std::time::Duration;

use corelane_codec::control_message::PayloadCodec;
use corelane_codec::error::DynamoError;

/// What is to be called.
#[derive(Clone, Debug)]
pub struct NewCall {
    /// The worker's request plane.
    pub address: SocketAddr,
    /// The path that the worker serves.
    pub path: Vec<u8>,
    /// The request's identity; a fresh UUID when empty.
    pub id: String,
    /// Further headers of the frame.
    pub headers: Vec<(String, String)>,
    /// One value encoded by `codec`.
    pub body: Vec<u8>,
    /// Encoding of body and items.
    pub codec: PayloadCodec,
    /// How long it may take.
    pub deadlines: Deadlines,
}

/// How long the steps of a call may take, each from its beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadlines {
    /// The worker's acknowledgement, or its call home.
    pub ack: Duration,
    /// The first item, or the end.
    pub first_item: Duration,
    /// The end.
    pub total: Duration,
}

impl Default for Deadlines {
    /// As Dynamo's client for the acknowledgement, and generous for the rest.
    fn default() -> Self {
        Deadlines {
            ack: Duration::from_secs(5),
            first_item: Duration::from_secs(60),
            total: Duration::from_secs(600),
        }
    }
}

/// When the steps of a call happened, each since its shard began it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Times {
    /// The worker has accepted it. `None` until then; it stays so when the worker called home at
    /// once and its connection was then lost.
    pub accepted: Option<Duration>,
    /// The item that was given last has come.
    pub item: Option<Duration>,
    /// It has ended.
    pub ended: Option<Duration>,
}

/// What happens to calls. The last four are ends: nothing follows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum What {
    /// The worker has accepted it.
    Acked,
    /// An item: the data of its wrapper, still encoded.
    Item(Vec<u8>),
    /// An item that could not be understood, or came where none may. The response goes on.
    BadItem(DynamoError),
    /// The whole response has come.
    Finished,
    /// The worker has refused it, in these words.
    Refused(String),
    /// It came to nothing, or broke off.
    Failed(DynamoError),
    /// It ended early because its reader wanted that.
    Stopped,
}

/// Who was called.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target {
    pub(crate) address: SocketAddr,
    /// A hash of the path: good enough to tell the instances of one address apart.
    path: u64,
    /// It has left discovery.
    pub(crate) left: bool,
}

impl Target {
    pub(crate) fn new(address: SocketAddr, path: &[u8]) -> Target {
        let mut hasher = DefaultHasher::new();
        hasher.write(path);
        Target {
            address,
            path: hasher.finish(),
            left: false,
        }
    }

    pub(crate) fn is(&self, other: &Target) -> bool {
        (self.address, self.path) == (other.address, other.path)
    }
}

/// How far the response of a call has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The worker has not called home.
    Waiting,
    /// It has, and owes the prologue.
    CalledHome,
    /// Items may come.
    Items,
    /// The final marker has come; the socket's end is missing.
    Final,
}
