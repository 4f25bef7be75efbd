//! Clients: what any thread calls endpoints with.
//!
//! ```text
//! Client::send --Command::Run--> a shard: choose, call, read --items--> Reply
//! ```
//! The work is done on a shard, as [`super::LocalClient`] does it there; here is the way to it and
//! back. Every wait has a deadline, and a reply that is dropped kills its call.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use corelane_codec::control_message::PayloadCodec;
use corelane_codec::error::DynamoError;
use corelane_codec::item::write_value;
use corelane_codec::path::EndpointId;
use corelane_engine::call::Deadlines;
use corelane_engine::stats::Cell;
use serde::Serialize;
use tokio::time::timeout;

use super::feed::Feed;
use super::hub::Hub;
use super::registry::{Members, Watched, now_ns};
use super::reply::{self, Reply};
use super::routing::{Ratio, RoutingMode};

/// How the calls of a client go unless a call says otherwise.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub(super) mode: RoutingMode,
    pub(super) ratio: Ratio,
    /// Whether instances that fail are left out for a while.
    pub(super) detects_faults: bool,
    pub(super) inhibited: Duration,
    pub(super) deadlines: Deadlines,
    pub(super) inactivity: Option<Duration>,
}

/// Calls one endpoint, wherever its instances are. Cheap to clone, and usable from any thread and
/// any tokio runtime; on a shard use [`super::Shard::client`], which needs no hop.
///
/// All clients of a process that call the same endpoint share what they know of its instances:
/// one watch in discovery, the calls under way, and who has failed.
#[derive(Clone)]
pub struct Client {
    pub(super) hub: Arc<Hub>,
    /// The endpoint; a second one where its name has two readings.
    pub(super) readings: Arc<[Arc<Watched>]>,
    pub(super) settings: Arc<Settings>,
    /// Whose turn it is, by shard.
    pub(super) turns: Arc<[Cell]>,
}

/// One request to be sent: its body, and what differs from how the client sends all.
#[derive(Clone, Debug)]
pub struct Call {
    pub(super) body: Vec<u8>,
    pub(super) codec: PayloadCodec,
    pub(super) id: String,
    pub(super) headers: Vec<(String, String)>,
    pub(super) instance: Option<u64>,
    pub(super) deadlines: Deadlines,
    pub(super) inactivity: Option<Duration>,
}

impl Call {
    /// Only this instance may answer; needed with [`RoutingMode::Direct`] and [`RoutingMode::Kv`].
    #[must_use]
    pub fn to(mut self, instance_id: u64) -> Self {
        self.instance = Some(instance_id);
        self
    }

    /// The request's identity, the same at every hop; a fresh UUID unless it is said.
    #[must_use]
    pub fn id(mut self, id: impl Into<String>) -> Self {
        self.id = id.into();
        self
    }

    /// One more header of the request's frame, such as `traceparent`.
    #[must_use]
    pub fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// How long its steps may take.
    #[must_use]
    pub fn deadlines(mut self, deadlines: Deadlines) -> Self {
        self.deadlines = deadlines;
        self
    }

    /// How long the whole call may take.
    #[must_use]
    pub fn within(mut self, total: Duration) -> Self {
        self.deadlines = Deadlines {
            ack: self.deadlines.ack.min(total),
            first_item: self.deadlines.first_item.min(total),
            total,
        };
        self
    }

    /// How long the first item, or the end, may take.
    #[must_use]
    pub fn first_item_within(mut self, time: Duration) -> Self {
        self.deadlines.first_item = time;
        self
    }

    /// The longest pause between two items; `None` for no bound but the call's own.
    #[must_use]
    pub fn inactivity(mut self, pause: Option<Duration>) -> Self {
        self.inactivity = pause;
        self
    }
}

/// An instance as its clients know it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SeenInstance {
    /// Its id.
    pub id: u64,
    /// Calls of this process that are under way there.
    pub load: u64,
    /// It failed, and gets nothing for a while.
    pub failed: bool,
    /// It is overloaded or busy, and gets nothing for a while.
    pub overloaded: bool,
}

impl Client {
    /// How instances are chosen; [`RoutingMode::RoundRobin`] unless it is said.
    #[must_use]
    pub fn mode(self, mode: RoutingMode) -> Self {
        self.with(|settings| settings.mode = mode)
    }

    /// Whether instances that fail are left out for a while, which they are unless it is said.
    #[must_use]
    pub fn detect_faults(self, detects: bool) -> Self {
        self.with(|settings| settings.detects_faults = detects)
    }

    /// How long the steps of its calls may take: 5 s, 60 s and 600 s unless it is said.
    #[must_use]
    pub fn deadlines(self, deadlines: Deadlines) -> Self {
        self.with(|settings| settings.deadlines = deadlines)
    }

    fn with(mut self, change: impl FnOnce(&mut Settings)) -> Self {
        change(Arc::make_mut(&mut self.settings));
        self
    }

    /// What it calls.
    pub fn endpoint(&self) -> &EndpointId {
        &self.readings[0].id
    }

    /// Waits until there is an instance.
    ///
    /// # Errors
    /// There is none within `patience`.
    pub async fn wait_for_instances(&self, patience: Duration) -> Result<(), DynamoError> {
        let mut changes: Vec<_> = self.readings.iter().map(|one| one.subscribe()).collect();
        let there = async {
            while self.members().is_empty() {
                match &mut changes[..] {
                    [one] => drop(one.changed().await),
                    [one, other, ..] => tokio::select! {
                        _ = one.changed() => {}
                        _ = other.changed() => {}
                    },
                    [] => return,
                }
            }
        };
        let waited = timeout(patience, there).await;
        waited.map_err(|_| none(self.endpoint(), false))
    }

    /// The instances as they are known now, by id.
    pub fn instances(&self) -> Vec<SeenInstance> {
        let now_ns = now_ns();
        let members = self.members();
        let seen = members.iter().map(|member| SeenInstance {
            id: member.instance.id,
            load: member.load(),
            failed: member.has_failed(now_ns),
            overloaded: member.is_overloaded(now_ns),
        });
        seen.collect()
    }

    /// Exactly these instances are busy, as a load monitor finds ([`super::busy`]): they get no
    /// call until this says otherwise. Holds for all clients of the endpoint.
    pub fn set_busy(&self, instances: &HashSet<u64>) {
        for watched in self.readings.iter() {
            watched.set_busy(instances);
        }
    }

    /// A call with this value as its request.
    ///
    /// # Errors
    /// The value has no form in the codec of the instances.
    pub fn request<T: Serialize + ?Sized>(&self, value: &T) -> Result<Call, DynamoError> {
        let codec = self.codec();
        let mut body = Vec::new();
        write_value(value, codec, &mut body)
            .map_err(|error| DynamoError::invalid_argument(error.to_string()))?;
        Ok(self.request_encoded(codec, body))
    }

    /// A call whose request is one encoded value.
    pub fn request_encoded(&self, codec: PayloadCodec, body: Vec<u8>) -> Call {
        Call {
            body,
            codec,
            id: String::new(),
            headers: Vec::new(),
            instance: None,
            deadlines: self.settings.deadlines,
            inactivity: self.settings.inactivity,
        }
    }

    /// A bidirectional call: its values are written once it has begun.
    pub fn request_many(&self) -> Call {
        self.request_encoded(self.codec(), Vec::new())
    }

    /// The codec that all instances read: MessagePack if every one asks for it, else JSON.
    pub fn codec(&self) -> PayloadCodec {
        let members = self.members();
        let packed = |member: &Arc<super::registry::Member>| {
            member.instance.codec == PayloadCodec::MessagePack
        };
        match !members.is_empty() && members.iter().all(packed) {
            true => PayloadCodec::MessagePack,
            false => PayloadCodec::Json,
        }
    }

    /// Calls with this value as the request, and waits until an instance has begun to respond.
    /// Needs a tokio runtime with time enabled.
    ///
    /// # Errors
    /// No instance can take it, or what went wrong on the way, with its reason.
    pub async fn call<T: Serialize + ?Sized>(&self, value: &T) -> Result<Reply, DynamoError> {
        let call = self.request(value)?;
        self.send(call).await
    }

    /// Sends a call, and waits until an instance has begun to respond.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub async fn send(&self, call: Call) -> Result<Reply, DynamoError> {
        reply::send(self, call).await
    }

    /// Begins a bidirectional call: values are written to the [`Feed`] while the reply is read. It
    /// does not wait until the instance has begun to respond, which may need the first values.
    /// Needs a tokio runtime with time enabled.
    ///
    /// # Errors
    /// No instance can take it. What goes wrong later comes out of the reply.
    pub async fn call_many(&self) -> Result<(Feed, Reply), DynamoError> {
        self.send_many(self.request_many()).await
    }

    /// Begins a bidirectional call; one of [`Client::request_many`].
    ///
    /// # Errors
    /// As [`Client::call_many`].
    pub async fn send_many(&self, call: Call) -> Result<(Feed, Reply), DynamoError> {
        reply::send_many(self, call).await
    }

    /// The instances of the reading that has any.
    pub(super) fn members(&self) -> Members {
        let reading = self.readings.iter().find(|one| !one.members().is_empty());
        reading.unwrap_or(&self.readings[0]).members()
    }
}

/// Nobody can take a call.
pub(super) fn none(endpoint: &EndpointId, busy: bool) -> DynamoError {
    match busy {
        true => DynamoError::resource_exhausted(format!(
            "every instance of {endpoint} is busy; try again later"
        )),
        false => DynamoError::unavailable(format!("no instance of {endpoint} can be called")),
    }
}
