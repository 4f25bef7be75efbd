//! Calls from a shard: chosen, made and read without leaving its thread.

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use corelane_codec::control_message::PayloadCodec;
use corelane_codec::error::{DynamoError, Reason};
use corelane_codec::item::Annotated;
use corelane_engine::call::{NewCall, Times};
use corelane_engine::feed::Fate;
use corelane_engine::local::{self as engine, Ending};
use corelane_engine::stats::Cell;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::client::{Call, Client, none};
use super::feed::LocalFeed;
use super::hub::Nudge;
use super::items::{self, Items, error_of};
use super::registry::{Loaded, Member, Members, now_ns};
use super::routing::{Candidate, Chance, Draw, RoutingMode, choose};
use super::shard::Shard;

/// How often a call looks whether the store has listed the instances for the first time.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// A [`Client`] on one shard: for handlers that call others. Nothing here hops to another thread.
#[derive(Clone)]
pub struct LocalClient {
    client: Client,
    shard: Shard,
    chance: Rc<RefCell<Chance>>,
    /// By reading.
    known: Rc<RefCell<Vec<Known>>>,
}

/// The members of a reading, with the version that they are of.
type Known = Option<(u64, Members)>;

impl LocalClient {
    pub(super) fn new(client: &Client, shard: &Shard) -> LocalClient {
        LocalClient {
            client: client.clone(),
            shard: shard.clone(),
            chance: Rc::new(RefCell::new(Chance::new())),
            known: Rc::new(RefCell::new(vec![None; client.readings.len()])),
        }
    }

    /// A call with this value as its request; see [`Client::request`].
    ///
    /// # Errors
    /// The value has no form in the codec of the instances.
    pub fn request<T: Serialize + ?Sized>(&self, value: &T) -> Result<Call, DynamoError> {
        self.client.request(value)
    }

    /// Calls with this value as the request, and waits until an instance has begun to respond.
    ///
    /// # Errors
    /// No instance can take it, or what went wrong on the way, with its reason.
    pub async fn call<T: Serialize + ?Sized>(&self, value: &T) -> Result<LocalReply, DynamoError> {
        let call = self.client.request(value)?;
        self.send(call).await
    }

    /// Sends a call, and waits until an instance has begun to respond.
    ///
    /// # Errors
    /// As [`LocalClient::call`].
    pub async fn send(&self, call: Call) -> Result<LocalReply, DynamoError> {
        let mut reply = self.start(call).await?;
        match reply.reply.begun().await {
            Ok(()) => Ok(reply),
            Err(error) => {
                reply.fault(&error);
                Err(error)
            }
        }
    }

    /// Sends a call, and does not wait until an instance has begun to respond: what goes wrong from
    /// there on comes out of the reply.
    ///
    /// # Errors
    /// No instance can take it.
    pub async fn start(&self, call: Call) -> Result<LocalReply, DynamoError> {
        let caller = self.shard.host().caller();
        let begun = self.begin(call, |new| ((), caller.call(new))).await?;
        Ok(begun.1)
    }

    /// Begins a bidirectional call, see [`Client::call_many`].
    ///
    /// # Errors
    /// No instance can take it. What goes wrong later comes out of the reply.
    pub async fn call_many(&self) -> Result<(LocalFeed, LocalReply), DynamoError> {
        self.send_many(self.client.request_many()).await
    }

    /// Begins a bidirectional call; one of [`Client::request_many`].
    ///
    /// # Errors
    /// As [`LocalClient::call_many`].
    pub async fn send_many(&self, call: Call) -> Result<(LocalFeed, LocalReply), DynamoError> {
        let caller = self.shard.host().caller();
        let (feed, mut reply) = self.begin(call, |new| caller.call_many(new)).await?;
        reply.input = Some(feed.fate());
        Ok((LocalFeed::new(feed, reply.codec), reply))
    }

    /// Chooses an instance, and begins the call there.
    async fn begin<T>(
        &self,
        call: Call,
        begin: impl FnOnce(NewCall) -> (T, engine::Reply),
    ) -> Result<(T, LocalReply), DynamoError> {
        self.listed(call.deadlines.ack).await;
        let (member, loaded) = self.select(call.instance)?;
        let new = NewCall {
            address: member.instance.address,
            path: member.instance.path.clone(),
            id: call.id,
            headers: call.headers,
            body: call.body,
            codec: call.codec,
            deadlines: call.deadlines,
        };
        let settings = &self.client.settings;
        let inhibited = settings.detects_faults.then_some(settings.inhibited);
        let (feed, reply) = begin(new);
        let reply = LocalReply {
            reply,
            input: None,
            codec: call.codec,
            member,
            loaded: Some(loaded),
            inhibited,
            inactivity: call.inactivity,
            shard: self.shard.clone(),
        };
        Ok((feed, reply))
    }

    /// The way in to its shard.
    pub(super) fn nudge(&self) -> Nudge {
        self.client.hub.nudge(self.shard.index())
    }

    /// The shard that it calls from.
    pub fn shard(&self) -> &Shard {
        &self.shard
    }

    /// Waits, a while at most, for the first list of the store.
    async fn listed(&self, patience: Duration) {
        let until_ns = now_ns().saturating_add(patience.as_nanos().min(1 << 62) as u64);
        let readings = &self.client.readings;
        while readings.iter().any(|one| !one.is_listed()) && now_ns() < until_ns {
            if readings.iter().any(|one| !one.members().is_empty()) {
                return;
            }
            self.shard.sleep(LOOK_EVERY).await;
        }
    }

    /// Chooses an instance and counts the call there.
    fn select(&self, exact: Option<u64>) -> Result<(Arc<Member>, Loaded), DynamoError> {
        let members = self.members();
        let endpoint = self.client.endpoint();
        let settings = &self.client.settings;
        let now_ns = now_ns();
        if let Some(id) = exact {
            let named = members.iter().find(|member| member.instance.id == id);
            let member = named.ok_or_else(|| {
                DynamoError::cannot_connect(format!("no instance {id:x} of {endpoint} is known"))
            })?;
            if settings.detects_faults && member.is_overloaded(now_ns) {
                let text = format!("instance {id:x} of {endpoint} is overloaded; try again later");
                return Err(DynamoError::worker_overloaded(text));
            }
            return Ok(self.count(member));
        }
        if settings.mode.is_exact() {
            let text = "this client sends only to the instance that a call names; see Call::to";
            return Err(DynamoError::invalid_argument(text));
        }
        let routable = |member: &&Arc<Member>| !member.has_failed(now_ns);
        let free: Vec<&Arc<Member>> = members
            .iter()
            .filter(|member| routable(member) && !member.is_overloaded(now_ns))
            .collect();
        match self.choose(settings.mode, &free) {
            Some(index) => Ok(self.count(free[index])),
            None => Err(none(endpoint, members.iter().any(|one| routable(&one)))),
        }
    }

    fn choose(&self, mode: RoutingMode, free: &[&Arc<Member>]) -> Option<usize> {
        let candidate = |member: &&Arc<Member>| Candidate {
            load: member.load(),
            is_cpu: member.is_cpu(),
        };
        let candidates: Vec<Candidate> = free.iter().map(candidate).collect();
        let mut draw = Turns {
            turn: &self.client.turns[self.shard.index()],
            chance: &mut self.chance.borrow_mut(),
        };
        choose(mode, self.client.settings.ratio, &candidates, &mut draw)
    }

    fn count(&self, member: &Arc<Member>) -> (Arc<Member>, Loaded) {
        (Arc::clone(member), member.begin(self.shard.index()))
    }

    /// The instances of the reading that has any, taken anew only when they have changed.
    fn members(&self) -> Members {
        let mut known = self.known.borrow_mut();
        let mut first = None;
        for (watched, known) in self.client.readings.iter().zip(known.iter_mut()) {
            let version = watched.version();
            let members = match known {
                Some((of, members)) if *of == version => Arc::clone(members),
                _ => {
                    let members = watched.members();
                    *known = Some((version, Arc::clone(&members)));
                    members
                }
            };
            if !members.is_empty() {
                return members;
            }
            first.get_or_insert(members);
        }
        first.unwrap_or_else(|| Arc::new([]))
    }
}

/// The turn is the client's on this shard; chance is anybody's.
struct Turns<'a> {
    turn: &'a Cell,
    chance: &'a mut Chance,
}

impl Draw for Turns<'_> {
    fn turn(&mut self) -> u64 {
        let turn = self.turn.get();
        self.turn.add(1);
        turn
    }

    fn below(&mut self, bound: usize) -> usize {
        self.chance.below(bound)
    }
}

/// The response to a call of a [`LocalClient`], item by item. Dropped before its end it kills the
/// call.
pub struct LocalReply {
    reply: engine::Reply,
    /// Of a bidirectional call.
    input: Option<Fate>,
    codec: PayloadCodec,
    member: Arc<Member>,
    /// Dropped at the end, or with the first error.
    loaded: Option<Loaded>,
    /// How long an instance that fails is left out, if it is.
    inhibited: Option<Duration>,
    inactivity: Option<Duration>,
    shard: Shard,
}

impl LocalReply {
    /// The next item. An item that is an error, and what ends the response early, come as `Err`;
    /// after the former more may come. `None` is the end.
    pub async fn next<T: DeserializeOwned>(&mut self) -> Option<Result<Annotated<T>, DynamoError>> {
        items::next(self).await
    }

    /// The data of the next item that has any.
    pub async fn next_data<T: DeserializeOwned>(&mut self) -> Option<Result<T, DynamoError>> {
        items::next_data(self).await
    }

    /// The next item as it came: one encoded value. An error item is no `Err` here.
    pub async fn next_item(&mut self) -> Option<Result<Vec<u8>, DynamoError>> {
        let next = match self.inactivity {
            None => self.reply.next().await,
            Some(pause) => match self.next_within(pause).await {
                Ok(next) => next,
                Err(error) => {
                    self.reply.kill();
                    self.fault(&error);
                    return Some(Err(error));
                }
            },
        };
        match next {
            Some(Ok(item)) => {
                let item = item.into_bytes();
                if let Some(error) = error_of(&item, self.codec) {
                    self.fault(&error);
                }
                Some(Ok(item))
            }
            Some(Err(error)) => {
                self.fault(&error);
                Some(Err(error))
            }
            None => {
                self.loaded = None;
                None
            }
        }
    }

    async fn next_within(
        &mut self,
        pause: Duration,
    ) -> Result<Option<Result<engine::Item, DynamoError>>, DynamoError> {
        let mut sleep = self.shard.sleep(pause);
        poll_fn(|context| {
            if let Poll::Ready(next) = self.reply.poll_next(context) {
                return Poll::Ready(Ok(next));
            }
            Pin::new(&mut sleep).poll(context).map(|()| {
                let text = "the instance sent nothing for longer than it may";
                Err(DynamoError::response_timeout(text))
            })
        })
        .await
    }

    /// How its items are encoded.
    pub fn codec(&self) -> PayloadCodec {
        self.codec
    }

    /// Who answers.
    pub fn instance_id(&self) -> u64 {
        self.member.instance.id
    }

    /// Asks the instance to stop; what it still sends is given.
    pub fn stop(&self) {
        self.reply.stop();
    }

    /// Tells the instance to end at once; nothing more is given.
    pub fn kill(&self) {
        self.reply.kill();
    }

    /// How it has ended, if it has.
    pub fn ending(&self) -> Option<Ending> {
        self.reply.ending()
    }

    /// When its steps happened, by the clock of the shard.
    pub fn times(&self) -> Times {
        self.reply.times()
    }

    /// The call counts no more, and its instance may be left out for a while.
    fn fault(&mut self, error: &DynamoError) {
        self.loaded = None;
        let Some(inhibited) = self.inhibited else {
            return;
        };
        // The caller's own doing says nothing of the instance.
        if self.input.as_ref().is_some_and(Fate::is_abandoned) {
            return;
        }
        if error.reason() == Reason::WorkerOverloaded {
            self.member.overload();
        } else if error.chain().any(|error| is_fault(error.reason())) {
            let (id, why) = (self.member.instance.id, error.text());
            tracing::warn!(instance = format!("{id:x}"), why, "an instance failed");
            self.member.fail(inhibited);
        }
    }
}

impl Items for LocalReply {
    fn codec(&self) -> PayloadCodec {
        self.codec
    }

    async fn next_item(&mut self) -> Option<Result<Vec<u8>, DynamoError>> {
        LocalReply::next_item(self).await
    }
}

/// Whether an error says that its instance is broken (`spec/request-plane.md` §11.4).
fn is_fault(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::CannotConnect
            | Reason::Disconnected
            | Reason::ConnectionTimeout
            | Reason::ResponseTimeout
            | Reason::BackendResponseTimeout
            | Reason::EngineShutdown
            | Reason::StreamIncomplete
            | Reason::WorkerUnavailable
    )
}
