//! The words of the lock: what may be asked for, what is granted, and what state results.

use std::fmt;

/// Names one client of the lock. The caller chooses it and never reuses it for another client.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ClientId(pub u64);

/// What a client asks for (`spec/gpu-memory.md` §3.2).
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum LockType {
    /// Exclusive; replaces whatever is there.
    Rw,
    /// Shared; waits for something published.
    Ro,
    /// The first comer writes, everybody after it reads.
    RwOrRo,
    /// Exclusive; adopts a durable layout where there is one, else as [`LockType::Rw`].
    RwDataOrRw,
}

impl LockType {
    /// Whether a waiter of this type keeps new readers out (`rw_or_ro` does not count).
    pub fn counts_as_writer(self) -> bool {
        matches!(self, LockType::Rw | LockType::RwDataOrRw)
    }

    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            LockType::Rw => "rw",
            LockType::Ro => "ro",
            LockType::RwOrRo => "rw_or_ro",
            LockType::RwDataOrRw => "rw_data_or_rw",
        }
    }

    /// Reads the word on the wire.
    pub fn parse(word: &str) -> Option<LockType> {
        Some(match word {
            "rw" => LockType::Rw,
            "ro" => LockType::Ro,
            "rw_or_ro" => LockType::RwOrRo,
            "rw_data_or_rw" => LockType::RwDataOrRw,
            _ => return None,
        })
    }
}

impl fmt::Display for LockType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a client holds.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Grant {
    /// Exclusive, may change shape and contents.
    Rw,
    /// Exclusive, may change contents but not the shape.
    RwData,
    /// Shared, may change nothing.
    Ro,
}

impl Grant {
    /// Whether this grant excludes everybody else.
    pub fn is_writer(self) -> bool {
        self != Grant::Ro
    }

    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Grant::Rw => "rw",
            Grant::RwData => "rw_data",
            Grant::Ro => "ro",
        }
    }

    /// Reads the word on the wire.
    pub fn parse(word: &str) -> Option<Grant> {
        Some(match word {
            "rw" => Grant::Rw,
            "rw_data" => Grant::RwData,
            "ro" => Grant::Ro,
            _ => return None,
        })
    }
}

impl fmt::Display for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The state of a pool. Never stored: derived from who holds what (`spec/gpu-memory.md` §3.1).
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum State {
    /// Nothing published, nobody here.
    Empty,
    /// One writer.
    Rw,
    /// Published, nobody here.
    Committed,
    /// Published, with readers.
    Ro,
    /// Pages and shape are durable, contents not promised; nobody here.
    LayoutCommitted,
}

impl State {
    /// All of them.
    pub const ALL: [State; 5] = [
        State::Empty,
        State::Rw,
        State::Committed,
        State::Ro,
        State::LayoutCommitted,
    ];

    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            State::Empty => "EMPTY",
            State::Rw => "RW",
            State::Committed => "COMMITTED",
            State::Ro => "RO",
            State::LayoutCommitted => "LAYOUT_COMMITTED",
        }
    }

    /// Reads the word on the wire.
    pub fn parse(word: &str) -> Option<State> {
        State::ALL.into_iter().find(|state| state.as_str() == word)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What moved the state (`spec/gpu-memory.md` §3.3, rows 1 to 13).
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Event {
    /// A writer was admitted.
    RwConnect,
    /// The writer published.
    RwCommit,
    /// The writer made shape and pages durable and stays.
    LayoutCommit,
    /// The writer left and nothing of its work is kept.
    RwAbort,
    /// The writer left and its durable layout is kept.
    RwDisconnect,
    /// A reader was admitted.
    RoConnect,
    /// A reader left.
    RoDisconnect,
    /// Ours: memory that belonged to a client went with it, and so what was published in it.
    ContentsLost,
}

impl Event {
    /// The name used in logs and in the audit.
    pub fn as_str(self) -> &'static str {
        match self {
            Event::RwConnect => "RW_CONNECT",
            Event::RwCommit => "RW_COMMIT",
            Event::LayoutCommit => "LAYOUT_COMMIT",
            Event::RwAbort => "RW_ABORT",
            Event::RwDisconnect => "RW_DISCONNECT",
            Event::RoConnect => "RO_CONNECT",
            Event::RoDisconnect => "RO_DISCONNECT",
            Event::ContentsLost => "CONTENTS_LOST",
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One step of the state: who did what, from where to where.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Transition {
    /// Whose doing it was.
    pub client: ClientId,
    /// What was done.
    pub event: Event,
    /// The state before.
    pub from: State,
    /// The state after.
    pub to: State,
}
