//! A call as control asks for it, and what it hears of it.

use std::hash::{DefaultHasher, Hasher};
use std::net::SocketAddr;
use std::time::Duration;

use corelane_codec::control_message::PayloadCodec;
use corelane_codec::error::DynamoError;

/// What control wants to call.
#[derive(Clone, Debug)]
pub struct NewCall {
    /// Names the call in its events; control's choice, different for all calls under way.
    pub number: u64,
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

/// Something that happened to a call. Times are of the monotonic clock, in ns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallEvent {
    /// The number that control gave the call.
    pub call: u64,
    /// When the shard began it.
    pub began_ns: u64,
    /// When this happened.
    pub at_ns: u64,
    /// What.
    pub what: What,
}

/// What happens to calls. The last five are ends: no further event follows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// The worker has accepted it. Does not come when the worker called home at once and its
    /// connection was then lost.
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
    /// It ended early because control wanted that.
    Stopped,
}

impl What {
    /// Whether no further event follows.
    pub fn is_end(&self) -> bool {
        !matches!(self, What::Acked | What::Item(_) | What::BadItem(_))
    }
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
