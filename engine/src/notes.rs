//! What a shard notes in its flight recorder, in the words of its types.

use crate::command::Command;
use crate::connection::Role;
use crate::respond::Refusal;
use crate::ring::Ring;
use crate::routed::{self, Ending};
use crate::shard::Shard;
use crate::stats::flight::{Kind, Order, Side, Why};
use crate::table::NONE;

/// In place of the number of a request where there is none.
const NO_REQUEST: u64 = NONE as u64;

impl<R: Ring> Shard<R> {
    /// Notes what has happened in this tick; a few stores, whoever reads them.
    #[inline]
    pub(crate) fn note(&self, kind: Kind, detail: u32, subject: u32, value: u64) {
        let flight = &self.stats.flight;
        flight.note(self.now_ns, kind, detail, subject, value);
    }

    /// The same of a socket.
    pub(crate) fn note_socket(&self, kind: Kind, slot: u32, value: u64) {
        let Some(connection) = self.connections.get(slot) else {
            return;
        };
        self.note(kind, side(connection.role) as u32, slot, value);
    }

    /// A frame is refused that never became a request.
    pub(crate) fn note_refused_frame(&self, slot: u32, why: Why) {
        self.note(Kind::Refused, why as u32, slot, NO_REQUEST);
    }

    /// A request is refused; its connection may be gone.
    pub(crate) fn note_refused(&mut self, request: u32, why: Why) {
        let entry = self.requests.get(request);
        let (connection, span) = entry.map_or((NONE, NONE), |entry| (entry.downstream, entry.span));
        routed::turns(self, span, Ending::Refused(why));
        self.note(Kind::Refused, why as u32, connection, request.into());
    }

    /// Control has said something. Tasks to be run or woken are too many, and say nothing here.
    pub(crate) fn note_command(&self, command: &Command) {
        let (order, value) = match command {
            Command::Directory(_) => (Order::Directory, self.stats.shard.directories.get() + 1),
            Command::Handler(_) => (Order::Handler, 0),
            Command::Serve(paths) => (Order::Serve, paths.len() as u64),
            Command::Lane(_) => (Order::Lane, 0),
            Command::EndLanes { worker } => (Order::EndLanes, *worker),
            Command::InstanceLeft { address, .. } => (Order::InstanceLeft, address.port().into()),
            Command::Adopt { .. } => (Order::Adopt, 0),
            Command::Broken { .. } => (Order::Broken, 0),
            Command::Inbound(_) => (Order::Inbound, 0),
            Command::Kv(batch) => (Order::Kv, batch.changes.len() as u64),
            Command::Loads(reports) => (Order::Loads, reports.instances.len() as u64),
            Command::Weigh(_) => (Order::Weigh, 0),
            Command::Settings(_) => (Order::Settings, self.stats.shard.settings.get() + 1),
            Command::Accept => (Order::Accept, 0),
            Command::Drain => (Order::Drain, 0),
            Command::Stop => (Order::Stop, 0),
            Command::Run(_) | Command::Wake(_) | Command::Census(_) => return,
            // Who is there is no event, and the socket itself is noted.
            Command::Neighbours(_) | Command::TakeOver(_) | Command::Steer(_) => return,
        };
        self.note(Kind::Command, order as u32, 0, value);
    }
}

fn side(role: Role) -> Side {
    match role {
        Role::Downstream => Side::Downstream,
        Role::Upstream(_) => Side::Upstream,
        Role::Tell(_) => Side::Tell,
        Role::End(_) => Side::End,
        Role::Relay(_) => Side::Relay,
    }
}

impl Refusal<'_> {
    /// The same without what is said to the caller.
    pub(crate) fn why(self) -> Why {
        match self {
            Refusal::UnknownEndpoint { .. } => Why::UnknownEndpoint,
            Refusal::BadPath => Why::BadPath,
            Refusal::TooLarge(_) => Why::FrameTooLarge,
            Refusal::BadEnvelope { .. } => Why::BadEnvelope,
            Refusal::NoInstance => Why::NoInstance,
            Refusal::NoSuchInstance => Why::NoSuchInstance,
            Refusal::QueueFull => Why::QueueFull,
            Refusal::TableFull => Why::TableFull,
            Refusal::AllOverloaded => Why::AllOverloaded,
            Refusal::AtCapacity => Why::AtCapacity,
            Refusal::InstanceLost => Why::InstanceLost,
            Refusal::AnswerOverdue => Why::AnswerOverdue,
        }
    }
}
