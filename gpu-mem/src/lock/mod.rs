//! Decides who may write and who may read one pool of memory: a pure state machine, with no IO and
//! no clock inside.
//!
//! ```text
//!             RW_CONNECT                 RW_COMMIT                RO_CONNECT
//!   EMPTY ------------------>  RW  ------------------> COMMITTED ----------> RO (n readers)
//!     ^                        | ^ \                       |  ^               |
//!     +------- RW_ABORT -------+ |  \ RW_DISCONNECT        |  +- RO_DISCONNECT, the last
//!                                |   v  (layout durable)   |
//!             RW_CONNECT         | LAYOUT_COMMITTED        | RW_CONNECT (contents replaced)
//!             (adopt or replace) +----+--------------------+
//! ```
//!
//! The caller says what happened, when it was, and who is still alive; the machine answers with
//! effects that the caller carries out in order. A waiter is asked for its pulse *before* anything
//! is cleared for it: the upstream service clears first and loses published weights to a dead
//! waiter (`spec/gpu-memory.md`, hazards H1 and H2).

mod grant;
mod queue;

pub use grant::{ClientId, Event, Grant, LockType, State, Transition};

use std::collections::BTreeSet;

use thiserror::Error;

use queue::{Queue, Waiter};

/// Says whether a client's peer is still there. Asked right before a grant.
pub type Pulse<'a> = &'a mut dyn FnMut(ClientId) -> bool;

/// Which generation's rules apply where the two differ (`spec/gpu-memory.md` §3.10).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Profile {
    /// D0 and D1: a commit ends the writer's session; layouts can be made durable.
    V1,
    /// D2: a commit turns the writer into a reader.
    V2,
}

/// What an operator may choose.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// The generation of the rules.
    pub profile: Profile,
    /// Holders and waiters together; one more is refused.
    pub clients_max: usize,
    /// Keeps an `rw_or_ro` client waiting where it would wipe a durable layout (hazard H10).
    /// Off by default, because upstream wipes.
    pub guard_layout: bool,
}

impl Policy {
    /// The defaults of a generation.
    pub fn of(profile: Profile) -> Policy {
        Policy {
            profile,
            clients_max: CLIENTS_MAX,
            guard_layout: false,
        }
    }
}

/// What the caller must do, in the order given.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Effect {
    /// Release all memory and forget all metadata.
    Clear(ClearCause),
    /// The state moved; for history and logs.
    Moved(Transition),
    /// Tell this client that it holds the lock.
    Granted {
        /// The new holder.
        client: ClientId,
        /// What it holds.
        grant: Grant,
    },
    /// Tell this client that its time is over.
    TimedOut {
        /// The client that no longer waits.
        client: ClientId,
        /// Whether something is published now.
        committed: bool,
    },
    /// This waiter was found dead when its turn came; close what is left of it.
    Gone {
        /// The client that no longer waits.
        client: ClientId,
    },
}

/// Why memory is cleared.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ClearCause {
    /// A new writer replaces published contents.
    ReplacesPublished,
    /// A new writer replaces a durable layout, or starts from nothing.
    StartsAnew,
    /// The writer left without publishing.
    Aborted,
    /// The memory was a client's own and went with it.
    Lost,
    /// The service is stopping.
    Stopped,
}

/// Why a request never became a waiter.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
pub enum Refusal {
    /// Every place is taken.
    #[error("the lock's table of {0} clients is full; close a session or raise the limit")]
    QueueFull(usize),
    /// This client already holds or waits.
    #[error("this session already holds or awaits the lock")]
    AlreadyHere,
    /// A checkpoint is being taken.
    #[error("a checkpoint is in progress; abort or complete it first")]
    Fenced,
    /// This generation does not know the lock type.
    #[error("lock type {0} does not exist in this protocol generation")]
    UnknownType(LockType),
}

/// Why a holder may not do what it asked.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
pub enum Denied {
    /// The client is not the writer.
    #[error("only the writer may do this")]
    NotWriter,
    /// The layout is durable, so the shape can no longer be published or changed.
    #[error("layout is committed, reconnect with RW to change or publish it")]
    LayoutCommitted,
    /// Sessions, waiters or contents stand in the way of a checkpoint.
    #[error("sessions or waiters are present")]
    NotIdle,
}

/// The numbers that probes report.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Standing {
    /// The derived state.
    pub state: State,
    /// Whether a writer holds the lock.
    pub has_writer: bool,
    /// How many readers hold it.
    pub readers: usize,
    /// How many waiters keep new readers out.
    pub waiting_writers: usize,
    /// How many clients wait in all.
    pub waiters: usize,
    /// Whether something is published.
    pub committed: bool,
    /// Whether a durable layout exists.
    pub layout_committed: bool,
}

impl Standing {
    /// Published and not being rewritten.
    pub fn is_ready(&self) -> bool {
        self.committed && !self.has_writer
    }
}

#[derive(Clone, Copy, Debug)]
struct Writer {
    client: ClientId,
    grant: Grant,
}

/// The lock over one pool.
///
/// Between calls it is *settled*: nobody waits who could be granted. Each public method keeps that.
#[derive(Clone, Debug)]
pub struct Lock {
    policy: Policy,
    writer: Option<Writer>,
    readers: BTreeSet<ClientId>,
    committed: bool,
    layout_committed: bool,
    fenced: bool,
    waiters: Queue,
}

impl Lock {
    /// An empty pool.
    pub fn new(policy: Policy) -> Lock {
        Lock {
            policy,
            writer: None,
            readers: BTreeSet::new(),
            committed: false,
            layout_committed: false,
            fenced: false,
            waiters: Queue::default(),
        }
    }

    /// Asks for the lock. The answer comes as an effect, at once or later.
    ///
    /// `deadline_ns` is absolute, on the clock of `now_ns`; one that has passed makes this a
    /// try-lock, `None` waits for ever.
    ///
    /// # Errors
    /// The client was not admitted as a waiter; it holds nothing.
    pub fn request(
        &mut self,
        client: ClientId,
        lock_type: LockType,
        deadline_ns: Option<u64>,
        now_ns: u64,
        pulse: Pulse<'_>,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        self.may_enter(client, lock_type)?;
        if let Some(grant) = self.grantable(lock_type) {
            match pulse(client) {
                true => self.admit(client, grant, effects),
                false => effects.push(Effect::Gone { client }),
            }
        } else if deadline_ns.is_some_and(|deadline| deadline <= now_ns) {
            effects.push(Effect::TimedOut {
                client,
                committed: self.committed,
            });
        } else {
            self.waiters.push(Waiter {
                client,
                lock_type,
                deadline_ns,
            });
        }
        self.assert_sound();
        Ok(())
    }

    /// Whether [`Lock::commit`] would succeed; for checks that must come before it.
    ///
    /// # Errors
    /// As [`Lock::commit`].
    pub fn may_commit(&self, client: ClientId) -> Result<(), Denied> {
        match self.writer {
            Some(writer) if writer.client == client => match writer.grant {
                Grant::Rw => Ok(()),
                _ => Err(Denied::LayoutCommitted),
            },
            _ => Err(Denied::NotWriter),
        }
    }

    /// Publishes the writer's work. In V1 the writer is out afterwards; in V2 it is a reader.
    ///
    /// # Errors
    /// The client is not a writer with the grant `rw`. Nothing changed.
    pub fn commit(
        &mut self,
        client: ClientId,
        pulse: Pulse<'_>,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Denied> {
        self.may_commit(client)?;
        let from = self.state();
        self.writer = None;
        self.committed = true;
        if self.policy.profile == Profile::V2 {
            self.readers.insert(client);
        }
        self.moved(client, Event::RwCommit, from, effects);
        self.settle(pulse, effects);
        Ok(())
    }

    /// Makes shape and pages durable; the writer stays, and from now on may only change contents.
    ///
    /// # Errors
    /// The client is not a writer with the grant `rw`. Nothing changed.
    pub fn commit_layout(
        &mut self,
        client: ClientId,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Denied> {
        self.may_commit(client)?;
        let from = self.state();
        self.layout_committed = true;
        self.writer = Some(Writer {
            client,
            grant: Grant::RwData,
        });
        self.moved(client, Event::LayoutCommit, from, effects);
        self.assert_sound();
        Ok(())
    }

    /// Takes a client out, whatever it holds or awaits; one that is unknown is no error.
    pub fn disconnect(&mut self, client: ClientId, pulse: Pulse<'_>, effects: &mut Vec<Effect>) {
        let from = self.state();
        if self.writer.is_some_and(|writer| writer.client == client) {
            self.writer = None;
            if self.layout_committed {
                self.moved(client, Event::RwDisconnect, from, effects);
            } else {
                self.moved(client, Event::RwAbort, from, effects);
                effects.push(Effect::Clear(ClearCause::Aborted));
            }
        } else if self.readers.remove(&client) {
            self.moved(client, Event::RoDisconnect, from, effects);
        } else if self.waiters.remove(client).is_none() {
            return;
        }
        self.settle(pulse, effects);
    }

    /// Gives up what is published or durable, because memory that `owner` kept went with it. While
    /// anybody holds the lock nothing happens: holders learn it from what they ask, and the caller
    /// says it again when they have left. Only memory that clients lend each other can go so; what
    /// the service itself owns never does.
    pub fn lose_contents(&mut self, owner: ClientId, pulse: Pulse<'_>, effects: &mut Vec<Effect>) {
        let from = self.state();
        if !matches!(from, State::Committed | State::LayoutCommitted) {
            return;
        }
        self.committed = false;
        self.layout_committed = false;
        self.moved(owner, Event::ContentsLost, from, effects);
        effects.push(Effect::Clear(ClearCause::Lost));
        self.settle(pulse, effects);
    }

    /// Answers everybody whose deadline has come.
    pub fn expire(&mut self, now_ns: u64, pulse: Pulse<'_>, effects: &mut Vec<Effect>) {
        let late = self.waiters.late(now_ns);
        for &client in &late {
            self.waiters.remove(client);
            let committed = self.committed;
            effects.push(Effect::TimedOut { client, committed });
        }
        if !late.is_empty() {
            self.settle(pulse, effects);
        }
    }

    /// The nearest deadline of any waiter.
    pub fn next_deadline_ns(&self) -> Option<u64> {
        self.waiters.next_deadline_ns()
    }

    /// Keeps everybody out (a checkpoint is being taken). Idempotent.
    ///
    /// # Errors
    /// Somebody holds or awaits the lock.
    pub fn fence(&mut self) -> Result<(), Denied> {
        if self.writer.is_some() || !self.readers.is_empty() || !self.waiters.is_empty() {
            return Err(Denied::NotIdle);
        }
        self.fenced = true;
        Ok(())
    }

    /// Lets clients in again. Idempotent.
    pub fn unfence(&mut self) {
        self.fenced = false;
    }

    /// The derived state.
    pub fn state(&self) -> State {
        if self.writer.is_some() {
            State::Rw
        } else if !self.readers.is_empty() {
            State::Ro
        } else if self.committed {
            State::Committed
        } else if self.layout_committed {
            State::LayoutCommitted
        } else {
            State::Empty
        }
    }

    /// Who holds the lock for writing.
    pub fn writer(&self) -> Option<ClientId> {
        self.writer.map(|writer| writer.client)
    }

    /// What this client holds.
    pub fn grant_of(&self, client: ClientId) -> Option<Grant> {
        match self.writer {
            Some(writer) if writer.client == client => Some(writer.grant),
            _ => self.readers.contains(&client).then_some(Grant::Ro),
        }
    }

    /// The numbers for probes.
    pub fn standing(&self) -> Standing {
        Standing {
            state: self.state(),
            has_writer: self.writer.is_some(),
            readers: self.readers.len(),
            waiting_writers: self.waiters.writers(),
            waiters: self.waiters.len(),
            committed: self.committed,
            layout_committed: self.layout_committed,
        }
    }

    fn may_enter(&self, client: ClientId, lock_type: LockType) -> Result<(), Refusal> {
        if self.fenced {
            return Err(Refusal::Fenced);
        }
        if self.policy.profile == Profile::V2 && lock_type == LockType::RwDataOrRw {
            return Err(Refusal::UnknownType(lock_type));
        }
        if self.waiters.contains(client) || self.grant_of(client).is_some() {
            return Err(Refusal::AlreadyHere);
        }
        let clients = usize::from(self.writer.is_some()) + self.readers.len() + self.waiters.len();
        if clients >= self.policy.clients_max {
            return Err(Refusal::QueueFull(self.policy.clients_max));
        }
        Ok(())
    }

    /// What a client of this type would get now. The whole admission rule is here.
    fn grantable(&self, lock_type: LockType) -> Option<Grant> {
        let writer_fits = self.writer.is_none() && self.readers.is_empty();
        let reader_fits = self.committed && self.writer.is_none() && self.waiters.writers() == 0;
        match lock_type {
            LockType::Rw => writer_fits.then_some(Grant::Rw),
            LockType::Ro => reader_fits.then_some(Grant::Ro),
            LockType::RwDataOrRw if self.layout_committed => writer_fits.then_some(Grant::RwData),
            LockType::RwDataOrRw => writer_fits.then_some(Grant::Rw),
            LockType::RwOrRo if reader_fits => Some(Grant::Ro),
            LockType::RwOrRo => {
                let guarded = self.policy.guard_layout && self.layout_committed;
                let in_turn = self.policy.profile == Profile::V1 || self.waiters.writers() == 0;
                (writer_fits && !self.committed && !guarded && in_turn).then_some(Grant::Rw)
            }
        }
    }

    /// Makes a client that is known to be alive the holder of what it can get.
    fn admit(&mut self, client: ClientId, grant: Grant, effects: &mut Vec<Effect>) {
        let from = self.state();
        match grant {
            Grant::Ro => {
                self.readers.insert(client);
                self.moved(client, Event::RoConnect, from, effects);
            }
            Grant::Rw => {
                effects.push(Effect::Clear(match self.committed {
                    true => ClearCause::ReplacesPublished,
                    false => ClearCause::StartsAnew,
                }));
                self.committed = false;
                self.layout_committed = false;
                self.writer = Some(Writer { client, grant });
                self.moved(client, Event::RwConnect, from, effects);
            }
            Grant::RwData => {
                self.writer = Some(Writer { client, grant });
                self.moved(client, Event::RwConnect, from, effects);
            }
        }
        effects.push(Effect::Granted { client, grant });
    }

    /// Whether no client of any type could be granted anything now; spares asking each waiter.
    fn is_closed(&self) -> bool {
        let read_out = !self.readers.is_empty() && self.waiters.writers() > 0;
        self.writer.is_some() || read_out
    }

    /// Grants all that can be granted, in order of arrival.
    fn settle(&mut self, pulse: Pulse<'_>, effects: &mut Vec<Effect>) {
        let mut number = 0;
        while !self.is_closed()
            && let Some((at, waiter)) = self.waiters.from(number)
        {
            number = at + 1;
            let Some(grant) = self.grantable(waiter.lock_type) else {
                continue;
            };
            self.waiters.remove(waiter.client);
            if pulse(waiter.client) {
                self.admit(waiter.client, grant, effects);
            } else {
                effects.push(Effect::Gone {
                    client: waiter.client,
                });
            }
            // A writer that waits no longer may have been all that kept readers before it out.
            if waiter.lock_type.counts_as_writer() {
                number = 0;
            }
        }
        self.assert_sound();
    }

    fn moved(&self, client: ClientId, event: Event, from: State, effects: &mut Vec<Effect>) {
        effects.push(Effect::Moved(Transition {
            client,
            event,
            from,
            to: self.state(),
        }));
    }

    fn assert_sound(&self) {
        debug_assert!(
            self.writer.is_none() || self.readers.is_empty(),
            "a reader beside a writer"
        );
        debug_assert!(
            self.writer.is_none() || !self.committed,
            "a writer on published contents"
        );
        debug_assert!(
            self.readers.is_empty() || self.committed,
            "a reader of nothing"
        );
        debug_assert!(
            !(self.committed && self.layout_committed),
            "published and only durable"
        );
        #[cfg(debug_assertions)]
        assert_eq!(
            self.waiters.writers(),
            self.waiters
                .iter()
                .filter(|w| w.lock_type.counts_as_writer())
                .count(),
        );
    }
}

/// Clients of one pool: engines times ranks on one GPU are tens, so this is ample.
const CLIENTS_MAX: usize = 4096;

#[cfg(test)]
mod explore;
#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
