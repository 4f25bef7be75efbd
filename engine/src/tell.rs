//! Calling a caller home to tell him that his request has failed.
//!
//! A caller who was answered "accepted" listens only at his call-home address from then on. What
//! goes wrong after that is told there, as a worker would: handshake, error prologue, sentinel
//! (spec/request-plane.md §4.2, §4.3).

use std::collections::VecDeque;
use std::net::SocketAddr;

use corelane_codec::call_home::{self, SENTINEL_FRAME};
use corelane_codec::control_message::{self, StreamType, TcpConnectionInfo};
use corelane_codec::error::DynamoError;
use corelane_codec::limits::CONNECTION_INFO_SCRATCH_BYTES;
use corelane_codec::quic_frame::{QUIC_RESPONSE, QuicConnectionInfo};
use corelane_codec::{Decoded, TooLarge, two_part};

use crate::connection::Role;
use crate::ends;
use crate::quic::QuicCaller;
use crate::respond::Refusal;
use crate::ring::Ring;
use crate::shard::{Shard, TimerKind};
use crate::stats::flight::Kind as Noted;
use crate::table::{NONE, Table};

/// Callers told at the same time.
const ACTIVE_MAX: usize = 64;
/// Callers who wait to be told; more are counted as untold.
const WAITING_MAX: usize = 16 * 1024;
/// Time for connect, message and the caller's end of stream.
const DEADLINE_NS: u64 = 5_000_000_000;

/// What a caller is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// His frame is too large.
    TooLarge(TooLarge),
    /// No instance can be reached.
    NoInstance,
    /// All instances tried were overloaded.
    AllOverloaded,
    /// The connection to the instance was lost and no other could be tried.
    InstanceLost,
    /// No instance answered in time.
    AnswerOverdue,
    /// The worker that had accepted his request has died.
    WorkerDied,
    /// The instance answered something that means nothing.
    Protocol,
    /// His envelope cannot be used.
    BadEnvelope,
}

impl Cause {
    /// The same fact as a refusal.
    pub(crate) fn of(refusal: Refusal<'static>) -> Cause {
        match refusal {
            Refusal::TooLarge(error) => Cause::TooLarge(error),
            Refusal::AllOverloaded
            | Refusal::AtCapacity
            | Refusal::QueueFull
            | Refusal::TableFull => Cause::AllOverloaded,
            Refusal::InstanceLost => Cause::InstanceLost,
            Refusal::AnswerOverdue => Cause::AnswerOverdue,
            Refusal::UnknownEndpoint { .. }
            | Refusal::BadPath
            | Refusal::BadEnvelope { .. }
            | Refusal::NoInstance
            | Refusal::NoSuchInstance => Cause::NoInstance,
        }
    }

    /// The typed error: classes that Dynamo's migration tries again are used only where trying
    /// again makes sense (§12).
    pub(crate) fn error(self) -> DynamoError {
        match self {
            Cause::TooLarge(error) => DynamoError::invalid_argument(error.to_string()),
            Cause::NoInstance => {
                DynamoError::worker_unavailable("no instance of the endpoint can be reached")
            }
            Cause::AllOverloaded => {
                DynamoError::worker_overloaded("all instances of the endpoint are overloaded")
            }
            Cause::InstanceLost => {
                DynamoError::cannot_connect("the connection to the instance was lost")
            }
            Cause::AnswerOverdue => {
                DynamoError::connection_timeout("no instance accepted the request in time")
            }
            Cause::WorkerDied => {
                DynamoError::disconnected("the worker died before it began to respond")
            }
            Cause::Protocol => {
                DynamoError::backend_protocol("the instance gave an answer that means nothing")
            }
            Cause::BadEnvelope => {
                DynamoError::invalid_argument("the request's envelope cannot be used")
            }
        }
    }
}

struct Tell {
    connection: u32,
    /// What is to be said; empty once the connection has it.
    message: Vec<u8>,
    /// The socket has taken all of it.
    said: bool,
    cause: Cause,
}

/// Where a caller waits.
enum Place {
    Tcp(SocketAddr),
    Quic(Box<QuicCaller>),
}

/// Callers who are being told, and those who wait for it.
pub(crate) struct Tells {
    active: Table<Tell>,
    waiting: VecDeque<(Place, Vec<u8>, Cause)>,
}

impl Tells {
    /// With nobody in it.
    pub(crate) fn new() -> Tells {
        Tells {
            active: Table::new(ACTIVE_MAX),
            waiting: VecDeque::new(),
        }
    }

    /// Callers not told yet.
    pub(crate) fn len(&self) -> usize {
        self.active.used() + self.waiting.len()
    }
}

/// Whether the front of a payload says where its caller is.
pub(crate) fn can_reach(envelope: &[u8]) -> bool {
    message(envelope, &Cause::NoInstance.error()).is_some()
}

/// Calls the sender of `envelope` home. Does not wait.
pub(crate) fn tell<R: Ring>(shard: &mut Shard<R>, envelope: &[u8], cause: Cause) {
    tell_error(shard, envelope, cause, &cause.error());
}

/// The same with an error of its own.
pub(crate) fn tell_error<R: Ring>(
    shard: &mut Shard<R>,
    envelope: &[u8],
    cause: Cause,
    error: &DynamoError,
) {
    match message(envelope, error) {
        Some((place, message)) if shard.tells.waiting.len() < WAITING_MAX => {
            shard.tells.waiting.push_back((place, message, cause));
            let waiting = shard.tells.waiting.len() as u32;
            shard.note(Noted::Told, 0, waiting, 0);
            start(shard);
        }
        _ => shard.stats.shard.callers_untold.add(1),
    }
}

/// Where the caller listens, and what is to be written there.
fn message(envelope: &[u8], error: &DynamoError) -> Option<(Place, Vec<u8>)> {
    let Decoded::Frame(parts) = two_part::decode_prefix(envelope, None) else {
        return None;
    };
    let control = control_message::decode(envelope.get(parts.header)?).ok()?;
    let mut scratch = [0; CONNECTION_INFO_SCRATCH_BYTES];
    let info = &control.connection_info;
    let (place, subject) = if info.transport == QUIC_RESPONSE {
        let info = QuicConnectionInfo::parse(info, &mut scratch).ok()?;
        let caller = QuicCaller::read(&info).ok()?;
        (Place::Quic(Box::new(caller)), info.registration_id.to_cow())
    } else {
        let info = TcpConnectionInfo::parse(info, &mut scratch).ok()?;
        (Place::Tcp(info.socket_addr().ok()?), info.subject.to_cow())
    };
    let mut message = Vec::with_capacity(1024);
    call_home::write_handshake(&subject, StreamType::Response, &mut message);
    call_home::write_prologue_error(error.text(), Some(&error.to_json()), &mut message);
    message.extend_from_slice(&SENTINEL_FRAME);
    Some((place, message))
}

/// Dials as many callers as may be told at the same time.
fn start<R: Ring>(shard: &mut Shard<R>) {
    while !shard.tells.active.is_full() {
        let Some((place, message, cause)) = shard.tells.waiting.pop_front() else {
            return;
        };
        let tell = Tell {
            connection: NONE,
            message,
            said: false,
            cause,
        };
        let Ok(tell) = shard.tells.active.insert(tell) else {
            return;
        };
        let dialled = match &place {
            Place::Tcp(address) => shard.dial(address, Role::Tell(tell)),
            Place::Quic(caller) => shard.dial_quic(caller, Role::Tell(tell)),
        };
        match dialled {
            Ok(slot) => {
                shard.tells.active[tell].connection = slot;
                let generation = shard.tells.active.generation(tell);
                shard.timer(
                    TimerKind::Tell,
                    tell,
                    generation,
                    shard.now_ns + DEADLINE_NS,
                );
                if matches!(place, Place::Quic(_)) {
                    shard.established(slot);
                }
            }
            Err(_) => {
                shard.tells.active.remove(tell);
                shard.stats.shard.callers_untold.add(1);
            }
        }
    }
}

/// The caller has answered the dial: say it all in one write. The connection keeps the bytes until
/// the kernel is done with them, whatever becomes of us.
pub(crate) fn connected<R: Ring>(shard: &mut Shard<R>, tell: u32) {
    let entry = &mut shard.tells.active[tell];
    let (slot, message) = (entry.connection, std::mem::take(&mut entry.message));
    *shard.connections[slot].outgoing.waiting() = message;
    ends::flush(shard, slot);
}

/// The socket took `bytes` bytes.
pub(crate) fn sent<R: Ring>(shard: &mut Shard<R>, tell: u32, bytes: usize) {
    let entry = &mut shard.tells.active[tell];
    let slot = entry.connection;
    let outgoing = &mut shard.connections[slot].outgoing;
    outgoing.sent(bytes);
    entry.said = outgoing.is_empty();
    if !entry.said {
        ends::flush(shard, slot);
    }
}

/// The connection is over: the caller knows, or had been called home before, or is gone.
pub(crate) fn lost<R: Ring>(shard: &mut Shard<R>, tell: u32, _errno: i32) {
    let Some(entry) = shard.tells.active.remove(tell) else {
        return;
    };
    let stats = &shard.stats.shard;
    match entry.said {
        // Who was called home by his worker resets a second call.
        _ if entry.cause == Cause::WorkerDied => stats.callers_settled.add(1),
        true => stats.callers_told.add(1),
        false => stats.callers_untold.add(1),
    }
    start(shard);
}

/// The caller takes too long.
pub(crate) fn overdue<R: Ring>(shard: &mut Shard<R>, tell: u32, generation: u32) {
    if shard.tells.active.is_current(tell, generation) {
        let slot = shard.tells.active[tell].connection;
        shard.lost(slot, libc::ETIMEDOUT);
    }
}
