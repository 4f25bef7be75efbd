//! One pool behind one socket: sessions, lock, store and history, moved by messages and time.
//!
//! It does no IO of its own but what the backend does. A message goes in, actions come out, and
//! everything that one message changes is changed before the next one is looked at.

mod discarded;
mod fence;
mod ipc;
mod memory;
mod v1;
mod v2;

pub use discarded::Discarded;
pub use fence::Fence;

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use crate::backend::{Access, Backend};
use crate::complaints::Complaints;
use crate::history::{Audit, History, Kind, Peer, Stamp};
use crate::lock::{
    ClearCause, ClientId, Effect, Event, Grant, Lock, LockType, Policy, Profile, Pulse, Standing,
    Transition,
};
use crate::protocol::frame::{PREFIX_BYTES, REPLY_BYTES_MAX};
use crate::session::{Phase, Session};
use crate::stats::{Counter, Stats};
use crate::store::{Store, StoreLimits};
use memory::{BLOCK_BYTES_MAX, Starving, Wanted, aligned};

/// What one pool is made from.
#[derive(Clone, Debug)]
pub struct DomainConfig {
    /// The pool's word: `weights`, `kv_cache`, or the operator's own.
    pub tag: String,
    /// The GPU that its memory is on, as clients know it.
    pub gpu_uuid: String,
    /// The lock's rules; also decides which generation the socket speaks.
    pub policy: Policy,
    /// How much it may hold.
    pub limits: StoreLimits,
    /// How often memory is asked for again while there is none.
    pub retry_interval: Duration,
    /// How long that goes on; none is for as long as the client lives. The second generation has
    /// no such limit.
    pub retry_timeout: Option<Duration>,
    /// Random, one per service; the second generation's clients compare it.
    pub server_nonce: String,
}

impl DomainConfig {
    /// Upstream's defaults for a pool.
    pub fn new(profile: Profile, gpu_uuid: &str, tag: &str) -> DomainConfig {
        DomainConfig {
            tag: tag.to_owned(),
            gpu_uuid: gpu_uuid.to_owned(),
            policy: Policy::of(profile),
            limits: StoreLimits::default(),
            retry_interval: Duration::from_millis(500),
            retry_timeout: Some(Duration::from_secs(60)),
            server_nonce: uuid::Uuid::new_v4().to_string(),
        }
    }
}

/// What the caller does for a pool, in order.
#[derive(Debug)]
pub enum Action {
    /// Send a frame, with a descriptor beside its first byte if there is one.
    Send {
        /// To whom.
        client: ClientId,
        /// The whole frame.
        frame: Vec<u8>,
        /// What goes with it.
        descriptor: Option<Arc<OwnedFd>>,
    },
    /// Close the connection once all frames are sent; the pool has forgotten it.
    Close {
        /// Whose.
        client: ClientId,
    },
}

/// One moment: the time, who is alive, and where actions go.
pub struct Turn<'a> {
    /// Monotonic.
    pub now_ns: u64,
    /// Milliseconds since 1970, for records.
    pub unix_ms: u64,
    /// Whether a client's peer is still there.
    pub pulse: Pulse<'a>,
    /// What is to be done.
    pub actions: &'a mut Vec<Action>,
}

impl Turn<'_> {
    fn send(&mut self, client: ClientId, frame: Vec<u8>) {
        self.actions.push(Action::Send {
            client,
            frame,
            descriptor: None,
        });
    }
}

/// A second-generation request that concerns both pools of a GPU.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Checkpoint {
    /// Keep everybody out.
    Prepare,
    /// Say how it stands.
    Query,
    /// It was not taken.
    Abort(String),
    /// It was taken and restored.
    Complete(String),
}

/// One pool.
pub struct Domain {
    config: DomainConfig,
    backend: Box<dyn Backend>,
    lock: Lock,
    store: Store,
    /// What this pool and others have cleared and not yet given up.
    discarded: Discarded,
    history: History,
    complaints: Complaints,
    stats: Arc<Stats>,
    sessions: HashMap<ClientId, Session>,
    starving: Option<Starving>,
    /// Empty until something is committed, and after every clear.
    layout_hash: String,
    layout_digest: String,
}

impl Domain {
    /// An empty pool, beside others that share audit and cleared memory with it.
    pub fn new(
        config: DomainConfig,
        backend: Box<dyn Backend>,
        stats: Arc<Stats>,
        audit: Audit,
        discarded: Discarded,
    ) -> Domain {
        Domain {
            lock: Lock::new(config.policy),
            store: Store::new(config.limits),
            discarded,
            history: History::new(config.tag.as_str().into(), audit),
            complaints: Complaints::default(),
            sessions: HashMap::new(),
            starving: None,
            layout_hash: String::new(),
            layout_digest: String::new(),
            config,
            backend,
            stats,
        }
    }

    /// What it was made from.
    pub fn config(&self) -> &DomainConfig {
        &self.config
    }

    /// The lock's numbers.
    pub fn standing(&self) -> Standing {
        self.lock.standing()
    }

    /// The process that holds the lock for writing, if one does.
    pub fn writer(&self) -> Option<Peer> {
        let writer = self.lock.writer()?;
        self.sessions.get(&writer).map(|session| session.peer)
    }

    /// Allocations and their bytes.
    pub fn usage(&self) -> (u64, u64) {
        (self.store.count(), self.store.total_bytes())
    }

    /// A client has connected.
    pub fn connect(&mut self, client: ClientId, peer: Peer) {
        self.sessions.insert(
            client,
            Session {
                peer,
                phase: Phase::New,
            },
        );
    }

    /// Whether the client awaits an answer, so that its next message must wait.
    pub fn is_busy(&self, client: ClientId) -> bool {
        let waits = self
            .sessions
            .get(&client)
            .is_some_and(|s| s.phase == Phase::Waiting);
        waits
            || self
                .starving
                .as_ref()
                .is_some_and(|starving| starving.client == client)
    }

    /// A client has sent one payload. Answers what only the caller can do: a checkpoint.
    pub fn message(
        &mut self,
        client: ClientId,
        payload: &[u8],
        turn: &mut Turn<'_>,
    ) -> Option<Checkpoint> {
        match self.config.policy.profile {
            Profile::V1 => {
                self.message_v1(client, payload, turn);
                None
            }
            Profile::V2 => self.message_v2(client, payload, turn),
        }
    }

    /// A client is gone. One that is unknown is no error.
    pub fn disconnect(&mut self, client: ClientId, turn: &mut Turn<'_>) {
        if !self.sessions.contains_key(&client) {
            return;
        }
        self.starving.take_if(|starving| starving.client == client);
        let mut effects = Vec::new();
        self.lock.disconnect(client, turn.pulse, &mut effects);
        self.apply(effects, turn);
        self.sessions.remove(&client);
        self.notice_lost(turn);
    }

    /// Time has passed.
    pub fn tick(&mut self, turn: &mut Turn<'_>) {
        let mut effects = Vec::new();
        self.lock.expire(turn.now_ns, turn.pulse, &mut effects);
        self.apply(effects, turn);
        if self
            .starving
            .as_ref()
            .is_some_and(|starving| starving.next_try_ns <= turn.now_ns)
        {
            self.feed(turn);
        }
    }

    /// When [`Domain::tick`] has something to do.
    pub fn next_deadline_ns(&self) -> Option<u64> {
        let feed = self.starving.as_ref().map(|starving| starving.next_try_ns);
        [self.lock.next_deadline_ns(), feed]
            .into_iter()
            .flatten()
            .min()
    }

    /// Writes one line of the log, for which nobody waits. False if there is nothing to write.
    pub fn log(&mut self) -> bool {
        self.history.log()
    }

    /// What a client is told in place of a descriptor that the kernel would not pass on.
    pub fn withheld(&self) -> Vec<u8> {
        self.stats.count(Counter::ExportsWithheld);
        let text = "too many descriptors are under way to clients that do not take them; try again";
        self.error(text.to_owned(), false)
    }

    /// The service stops: waiters are told, everybody is closed, all memory is given up.
    pub fn stop(&mut self, turn: &mut Turn<'_>) {
        for (client, session) in std::mem::take(&mut self.sessions) {
            if session.phase == Phase::Waiting {
                turn.send(client, self.no_grant());
            }
            turn.actions.push(Action::Close { client });
        }
        self.starving = None;
        self.lock = Lock::new(self.config.policy);
        self.clear(ClearCause::Stopped, None);
    }

    /// Ends a session from this side.
    fn close(&mut self, client: ClientId, turn: &mut Turn<'_>) {
        self.disconnect(client, turn);
        turn.actions.push(Action::Close { client });
    }

    fn stamp(&self, client: ClientId, turn: &Turn<'_>) -> Stamp {
        let peer = self
            .sessions
            .get(&client)
            .map(|session| session.peer)
            .unwrap_or_default();
        Stamp {
            unix_ms: turn.unix_ms,
            session: client,
            peer,
        }
    }

    /// Asks the lock for a client whose first message was a handshake.
    fn request(
        &mut self,
        client: ClientId,
        lock_type: LockType,
        deadline_ns: Option<u64>,
        turn: &mut Turn<'_>,
    ) {
        if let Some(session) = self.sessions.get_mut(&client) {
            session.phase = Phase::Waiting;
        }
        let mut effects = Vec::new();
        let asked = self.lock.request(
            client,
            lock_type,
            deadline_ns,
            turn.now_ns,
            turn.pulse,
            &mut effects,
        );
        match asked {
            Ok(()) => self.apply(effects, turn),
            Err(refusal) => {
                self.stats.count(Counter::Refused);
                turn.send(client, self.error(refusal.to_string(), false));
                self.close(client, turn);
            }
        }
    }

    /// Carries out what the lock decided, in its order.
    fn apply(&mut self, effects: Vec<Effect>, turn: &mut Turn<'_>) {
        for (index, effect) in effects.iter().enumerate() {
            match *effect {
                Effect::Clear(cause) => {
                    let actor =
                        actor_of_clear(&effects, index).map(|client| self.stamp(client, turn));
                    self.clear(cause, actor);
                }
                Effect::Moved(step) => self.moved(step, turn),
                Effect::Granted { client, grant } => self.granted(client, grant, turn),
                Effect::TimedOut { client, committed } => {
                    self.stats.count(Counter::WaitsTimedOut);
                    turn.send(client, v1::not_granted(committed));
                    self.forget(client, turn);
                }
                Effect::Gone { client } => {
                    self.stats.count(Counter::WaitersGone);
                    self.forget(client, turn);
                }
            }
        }
    }

    /// The lock knows this client no more; neither does the pool.
    fn forget(&mut self, client: ClientId, turn: &mut Turn<'_>) {
        self.sessions.remove(&client);
        turn.actions.push(Action::Close { client });
    }

    fn clear(&mut self, cause: ClearCause, actor: Option<Stamp>) {
        let cleared = self.store.clear();
        let count = cleared.count();
        self.discarded.push(cleared);
        self.layout_hash.clear();
        self.layout_digest.clear();
        if cause == ClearCause::StartsAnew && count > 0 {
            let pool = &self.config.tag;
            tracing::warn!(pool, count, "a durable layout is wiped by a new writer");
        }
        // As upstream does: what was never published leaves no such record, but an abort does.
        let recorded = matches!(
            cause,
            ClearCause::ReplacesPublished | ClearCause::Aborted | ClearCause::Lost
        );
        if let Some(stamp) = actor.filter(|_| recorded) {
            self.history
                .note(stamp, Kind::AllocationsCleared, self.lock.state(), count);
        }
    }

    fn moved(&mut self, step: Transition, turn: &mut Turn<'_>) {
        match step.event {
            Event::RwCommit => self.stats.count(Counter::Commits),
            Event::LayoutCommit => self.stats.count(Counter::LayoutCommits),
            Event::RwAbort => self.stats.count(Counter::Aborts),
            Event::ContentsLost => self.stats.count(Counter::ContentsLost),
            _ => {}
        }
        let stamp = self.stamp(step.client, turn);
        self.history.moved(stamp, step, self.store.count());
    }

    fn granted(&mut self, client: ClientId, grant: Grant, turn: &mut Turn<'_>) {
        self.stats.count(match grant.is_writer() {
            true => Counter::GrantsWriter,
            false => Counter::GrantsReader,
        });
        if let Some(session) = self.sessions.get_mut(&client) {
            session.phase = Phase::Holding;
        }
        let frame = match self.config.policy.profile {
            Profile::V1 => v1::granted(grant),
            Profile::V2 => self.granted_v2(grant),
        };
        turn.send(client, frame);
    }

    /// Publishes or makes durable: hashed first, because the state may move on at once.
    fn seal_layout(&mut self) {
        self.layout_hash = self.store.layout_hash();
        self.layout_digest = self.store.layout_digest();
    }

    fn commit(&mut self, client: ClientId, turn: &mut Turn<'_>) -> Result<(), String> {
        self.lock
            .may_commit(client)
            .map_err(|denied| denied.to_string())?;
        self.check_whole()?;
        self.seal_layout();
        let mut effects = Vec::new();
        let done = self.lock.commit(client, turn.pulse, &mut effects);
        self.apply(effects, turn);
        done.map_err(|denied| denied.to_string())?;
        // Before anybody is told; but where the next writer was waiting, nothing of it is left.
        for allocation in self.store.allocations() {
            allocation.block.freeze();
        }
        Ok(())
    }

    fn check_whole(&self) -> Result<(), String> {
        match self.store.is_whole() {
            true => Ok(()),
            false => Err("metadata points outside its allocation; nothing was committed".into()),
        }
    }

    /// Lends a descriptor: readers get one that maps for reading only.
    fn export(&mut self, client: ClientId, id: &str) -> Result<Arc<OwnedFd>, String> {
        let access = match self.lock.grant_of(client) {
            Some(Grant::Rw | Grant::RwData) => Access::ReadWrite,
            Some(Grant::Ro) | None => Access::Read,
        };
        let allocation = self
            .store
            .allocation(id)
            .map_err(|error| error.to_string())?;
        let exported = allocation.block.export(access).map_err(|error| {
            tracing::error!(%error, id, "a descriptor could not be made");
            error.to_string()
        });
        self.stats.count(match exported {
            Ok(_) => Counter::Exports,
            Err(_) => Counter::BackendErrors,
        });
        exported
    }

    /// Sends an answer that may be long, or says that it is too long to be read by anybody.
    fn reply(&self, client: ClientId, frame: Vec<u8>, turn: &mut Turn<'_>) {
        let bytes = frame.len() - PREFIX_BYTES;
        turn.send(
            client,
            match bytes <= REPLY_BYTES_MAX {
                true => frame,
                false => self.error(
                    format!(
                        "the answer has {bytes} bytes, over the limit of {REPLY_BYTES_MAX}; ask \
                         for a part of it, by tag or prefix"
                    ),
                    false,
                ),
            },
        );
    }

    /// An error reply of this generation.
    fn error(&self, text: String, out_of_memory: bool) -> Vec<u8> {
        match self.config.policy.profile {
            Profile::V1 => v1::error(text),
            Profile::V2 => v2::error(text, out_of_memory),
        }
    }

    /// What a waiter is told when the service stops.
    fn no_grant(&self) -> Vec<u8> {
        match self.config.policy.profile {
            Profile::V1 => v1::not_granted(self.lock.standing().committed),
            Profile::V2 => v2::error("the service is stopping".into(), false),
        }
    }

    /// A payload that is no message: the sender loses its session without an answer.
    fn drop_for(&mut self, client: ClientId, bad: impl std::fmt::Display, turn: &mut Turn<'_>) {
        self.stats.count(Counter::FramesBad);
        if self.complaints.may(turn.now_ns) {
            let pid = self.sessions.get(&client).map(|session| session.peer.pid);
            let pool = &self.config.tag;
            tracing::warn!(pool, session = client.0, pid, %bad, "session dropped");
        }
        self.close(client, turn);
    }
}

/// Whose doing a clear is: the transition next to it says.
fn actor_of_clear(effects: &[Effect], index: usize) -> Option<ClientId> {
    let neighbours = effects
        .get(index + 1)
        .into_iter()
        .chain(effects[..index].last());
    neighbours
        .filter_map(|effect| match effect {
            Effect::Moved(step) => Some(*step),
            _ => None,
        })
        .find(|step| {
            let event = step.event;
            matches!(
                event,
                Event::RwConnect | Event::RwAbort | Event::ContentsLost
            )
        })
        .map(|step| step.client)
}

/// A point in time, far enough away to be never if it must.
pub(crate) fn after(now_ns: u64, wait: Duration) -> u64 {
    now_ns.saturating_add(u64::try_from(wait.as_nanos()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod ipc_tests;
#[cfg(test)]
mod tests;
