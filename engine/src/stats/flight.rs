//! The flight recorder of a shard: the last things that happened on it, in a ring of fixed size
//! that is read while the shard writes.
//!
//! ```text
//! record   [number u64][at_ns u64][kind u8, detail u24, subject u32][value u64]     32 bytes
//!           from 1      the tick's   what each means stands at Kind
//! ```
//!
//! The shard is the only writer and uses plain stores: it takes the number out, writes the rest,
//! and puts the new number in. A reader that finds another number before or after its copy has
//! been overtaken, and leaves the record out. The time is that of the tick, which the shard has
//! taken already; nothing here makes a system call.

use std::sync::atomic::{AtomicU64, Ordering, fence};

/// Bytes of one record, in memory and on the wire.
pub const RECORD_BYTES: usize = 32;
/// Most records of one shard: 128 MiB.
pub const RECORDS_MAX: u32 = 1 << 22;

macro_rules! words {
    ($(#[$meta:meta])* $name:ident {
        $($(#[doc = $doc:literal])+ $variant:ident = $word:literal,)+
    }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub enum $name {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl $name {
            /// All of them; each stands at its own number.
            pub const ALL: &[$name] = &[$($name::$variant,)+];

            /// The one with a number; `None` is one of a later version.
            pub fn of(number: u32) -> Option<$name> {
                $name::ALL.get(number as usize).copied()
            }

            /// For people and JSON.
            pub fn word(self) -> &'static str {
                match self {
                    $($name::$variant => $word,)+
                }
            }
        }
    };
}

words! {
    /// What happened: the meaning of `detail`, `subject` and `value`.
    Kind {
        /// Nothing: the slot has never been written
        Nothing = "nothing",
        /// A request begins. Detail: its route; subject: its number; value: its connection in the
        /// upper half, bytes of its frame in the lower
        Begun = "begun",
        /// A request of a handler of this process begins. Detail: the handler; subject: its
        /// connection; value: bytes of its frame
        Handled = "handled",
        /// A request for a worker behind a lane begins. Detail: its route; subject: its number
        /// among those of lanes; value: the connection
        Laned = "laned",
        /// It is given to an instance. Detail: how many it had before; subject: the request;
        /// value: the instance's id
        Routed = "routed",
        /// All of it is in the instance's socket. Subject: the request; value: ns since it began
        Forwarded = "forwarded",
        /// The instance has answered. Detail: an [`Answered`]; subject: the request; value: ns
        /// since it was forwarded
        Answered = "answered",
        /// Its reply goes to the caller. Detail: 0 accepted, 1 a text; subject: the request; value:
        /// the connection
        Replied = "replied",
        /// A request is refused. Detail: a [`Why`]; subject: the connection it came on, if that is
        /// there; value: the request, if it had become one
        Refused = "refused",
        /// A socket is ours. Detail: a [`Side`]; subject: the connection
        Opened = "opened",
        /// It is of no use any more. Detail: a [`Side`]; subject: the connection; value: errno, 0
        /// for the peer's end of stream
        Lost = "lost",
        /// It is closed. Detail: a [`Side`]; subject: the connection
        Closed = "closed",
        /// Receive buffers. Detail: a [`Buffers`]; subject: how many are held; value: the
        /// connection that found none
        Shortage = "shortage",
        /// Control has said something, but for tasks to run or to wake. Detail: an [`Order`];
        /// value: a number that belongs to it
        Command = "command",
        /// A relayed response. Detail: a [`Relayed`]; subject: its number
        Relayed = "relayed",
        /// A caller is called home to hear of a failure. Subject: how many wait for that
        Told = "told",
    }
}

words! {
    /// What an instance has answered.
    Answered {
        /// It has the request
        Accepted = "accepted",
        /// It has too many
        Overloaded = "overloaded",
        /// It is leaving, or does not know the endpoint
        Unavailable = "unavailable",
        /// Words that mean nothing
        Other = "other",
    }
}

words! {
    /// Why a request is refused.
    Why {
        /// No such endpoint here, or not any more
        UnknownEndpoint = "unknown_endpoint",
        /// The path is not text
        BadPath = "bad_path",
        /// The frame is too large
        FrameTooLarge = "frame_too_large",
        /// The envelope of a request to be relayed cannot be used
        BadEnvelope = "bad_envelope",
        /// No instance can be reached
        NoInstance = "no_instance",
        /// The one asked for by name cannot
        NoSuchInstance = "no_such_instance",
        /// The queues to all instances are full
        QueueFull = "queue_full",
        /// A table of the shard is full
        TableFull = "table_full",
        /// All instances that were tried are overloaded
        AllOverloaded = "all_overloaded",
        /// Handlers of this process have all that they can take
        AtCapacity = "at_capacity",
        /// The connection to the instance was lost
        InstanceLost = "instance_lost",
        /// The instance did not answer in time
        AnswerOverdue = "answer_overdue",
    }
}

words! {
    /// Whose a socket is.
    Side {
        /// Somebody who sends us requests
        Downstream = "downstream",
        /// An instance
        Upstream = "upstream",
        /// A caller who is told of a failure
        Tell = "tell",
        /// A request of this process itself
        End = "end",
        /// A response that passes through
        Relay = "relay",
    }
}

words! {
    /// What is the matter with receive buffers.
    Buffers {
        /// A connection found none
        Exhausted = "exhausted",
        /// Few are left: callers are held back
        HoldBack = "hold_back",
        /// There are enough again
        GoOn = "go_on",
    }
}

words! {
    /// What control has said.
    Order {
        /// A new directory; its number
        Directory = "directory",
        /// One more handler
        Handler = "handler",
        /// The paths of handlers; how many
        Serve = "serve",
        /// A worker with a lane
        Lane = "lane",
        /// It is gone; which
        EndLanes = "end_lanes",
        /// An instance has gone; its port
        InstanceLeft = "instance_left",
        /// A handshake has ended
        Adopt = "adopt",
        /// A socket under TLS has broken
        Broken = "broken",
        /// A response on QUIC
        Inbound = "inbound",
        /// Changes of KV caches; how many
        Kv = "kv",
        /// What instances say of their load; of how many
        Loads = "loads",
        /// What would be chosen, and why
        Weigh = "weigh",
        /// Other settings; their number
        Settings = "settings",
        /// Accept from the socket that was handed over
        Accept = "accept",
        /// Refuse new requests
        Drain = "drain",
        /// End
        Stop = "stop",
    }
}

words! {
    /// What becomes of a relayed response.
    Relayed {
        /// Another instance is tried
        Retried = "retried",
        /// It came to its end
        Finished = "finished",
        /// Its caller is told of an error in place of the first item
        Failed = "failed",
        /// It broke off after its first item
        Cut = "cut",
        /// Its caller went away
        Abandoned = "abandoned",
    }
}

/// One record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// How many there were before it on this shard, and one.
    pub number: u64,
    /// CLOCK_MONOTONIC in ns.
    pub at_ns: u64,
    /// A [`Kind`].
    pub kind: u8,
    /// See there; 24 bits.
    pub detail: u32,
    /// See there.
    pub subject: u32,
    /// See there.
    pub value: u64,
}

impl Record {
    /// Its bytes, little endian.
    pub fn to_bytes(&self) -> [u8; RECORD_BYTES] {
        let mut bytes = [0; RECORD_BYTES];
        let words = [self.number, self.at_ns, self.packed(), self.value];
        for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// The record of such bytes.
    pub fn from_bytes(bytes: &[u8; RECORD_BYTES]) -> Record {
        let mut words = [0u64; 4];
        for (word, place) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            let mut eight = [0; 8];
            eight.copy_from_slice(place);
            *word = u64::from_le_bytes(eight);
        }
        Record::of_words(words)
    }

    fn packed(&self) -> u64 {
        pack(self.kind, self.detail, self.subject)
    }

    fn of_words([number, at_ns, packed, value]: [u64; 4]) -> Record {
        Record {
            number,
            at_ns,
            kind: packed as u8,
            detail: (packed >> 8) as u32 & DETAIL_MAX,
            subject: (packed >> 32) as u32,
            value,
        }
    }
}

const DETAIL_MAX: u32 = (1 << 24) - 1;

#[inline]
fn pack(kind: u8, detail: u32, subject: u32) -> u64 {
    u64::from(kind) | u64::from(detail.min(DETAIL_MAX)) << 8 | u64::from(subject) << 32
}

/// Number, time, packed, value.
type Slot = [AtomicU64; 4];

/// The ring of one shard.
#[derive(Debug, Default)]
pub struct Flight {
    slots: Box<[Slot]>,
    /// Records written so far.
    written: AtomicU64,
}

impl Flight {
    /// A ring of at least so many records, rounded up to a power of two and bounded by
    /// [`RECORDS_MAX`]; 0 records nothing.
    pub fn new(records: u32) -> Flight {
        let count = match records.min(RECORDS_MAX) {
            0 => 0,
            records => records.next_power_of_two(),
        };
        Flight {
            slots: (0..count).map(|_| Slot::default()).collect(),
            written: AtomicU64::new(0),
        }
    }

    /// How many records it holds at most.
    pub fn capacity(&self) -> usize {
        self.slots.len()
    }

    /// How many have been written so far.
    pub fn written(&self) -> u64 {
        self.written.load(Ordering::Acquire)
    }

    /// Writes a record. Only for the shard itself: two writers would spoil each other's records.
    #[inline]
    pub(crate) fn note(&self, at_ns: u64, kind: Kind, detail: u32, subject: u32, value: u64) {
        let count = self.slots.len() as u64;
        let written = self.written.load(Ordering::Relaxed);
        // The mask of an empty ring finds no slot.
        let place = (written & count.wrapping_sub(1)) as usize;
        let Some([number, at, packed, last]) = self.slots.get(place) else {
            return;
        };
        number.store(0, Ordering::Relaxed);
        fence(Ordering::Release);
        at.store(at_ns, Ordering::Relaxed);
        packed.store(pack(kind as u8, detail, subject), Ordering::Relaxed);
        last.store(value, Ordering::Relaxed);
        number.store(written + 1, Ordering::Release);
        self.written.store(written + 1, Ordering::Release);
    }

    /// Copies records from the one numbered `from` on, or the oldest that is there, and no more
    /// than `most`. Those that the shard overwrites meanwhile are left out. Answers the number to
    /// go on from.
    pub fn read(&self, from: u64, most: usize, out: &mut Vec<Record>) -> u64 {
        let (written, count) = (self.written(), self.slots.len() as u64);
        let from = from.max(written.saturating_sub(count) + 1);
        let end = (written + 1).min(from.saturating_add(most as u64));
        out.extend((from..end).filter_map(|number| self.find(number)));
        end
    }

    /// The number of the first record that is not older than `at_ns`.
    pub fn since(&self, at_ns: u64) -> u64 {
        let (written, count) = (self.written(), self.slots.len() as u64);
        let (mut low, mut high) = (written.saturating_sub(count) + 1, written + 1);
        while low < high {
            let middle = low + (high - low) / 2;
            match self.find(middle) {
                Some(record) if record.at_ns >= at_ns => high = middle,
                _ => low = middle + 1,
            }
        }
        low
    }

    /// A record, if it is there and whole.
    fn find(&self, number: u64) -> Option<Record> {
        let mask = (self.slots.len() as u64).wrapping_sub(1);
        let slot = self.slots.get(((number - 1) & mask) as usize)?;
        copy(slot, number)
    }
}

/// A copy of a slot while it holds the record with this number.
fn copy([number, at, packed, value]: &Slot, wanted: u64) -> Option<Record> {
    if number.load(Ordering::Acquire) != wanted {
        return None;
    }
    let words = [at, packed, value].map(|word| word.load(Ordering::Relaxed));
    fence(Ordering::Acquire);
    let [at, packed, value] = words;
    let whole = number.load(Ordering::Relaxed) == wanted;
    whole.then(|| Record::of_words([wanted, at, packed, value]))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    use super::*;

    fn all(flight: &Flight, from: u64) -> Vec<Record> {
        let mut out = Vec::new();
        flight.read(from, usize::MAX, &mut out);
        out
    }

    #[test]
    fn the_last_records_are_there_in_their_order() {
        let flight = Flight::new(5);
        assert_eq!(flight.capacity(), 8);
        assert!(all(&flight, 0).is_empty());
        for n in 0..20u64 {
            flight.note(n * 10, Kind::Routed, n as u32, 7, n << 40);
        }
        let records = all(&flight, 0);
        let numbers: Vec<u64> = records.iter().map(|record| record.number).collect();
        assert_eq!(numbers, (13..=20).collect::<Vec<u64>>());
        let last = records[7];
        let wanted = Record {
            number: 20,
            at_ns: 190,
            kind: Kind::Routed as u8,
            detail: 19,
            subject: 7,
            value: 19 << 40,
        };
        assert_eq!(last, wanted);
        assert_eq!(Record::from_bytes(&last.to_bytes()), last);
        let mut some = Vec::new();
        assert_eq!(flight.read(15, 2, &mut some), 17);
        assert_eq!(some, records[2..4]);
        assert_eq!(flight.read(21, 2, &mut some), 21, "nothing new");
        assert_eq!(
            flight.read(99, 2, &mut some),
            21,
            "a number of another life"
        );
        let since = [0, 130, 131, 190, 191].map(|at_ns| flight.since(at_ns));
        assert_eq!(since, [13, 14, 15, 20, 21]);
    }

    #[test]
    fn what_does_not_fit_is_cut_and_nothing_else_changes() {
        let flight = Flight::new(1);
        flight.note(u64::MAX, Kind::Told, u32::MAX, u32::MAX, u64::MAX);
        let record = all(&flight, 0)[0];
        assert_eq!((record.detail, record.subject), (DETAIL_MAX, u32::MAX));
        assert_eq!((record.kind, record.value), (Kind::Told as u8, u64::MAX));
    }

    #[test]
    fn without_slots_nothing_is_kept() {
        let flight = Flight::new(0);
        flight.note(1, Kind::Begun, 0, 0, 0);
        assert!(all(&flight, 0).is_empty());
        assert_eq!(flight.written(), 0);
    }

    #[test]
    fn words_stand_at_their_numbers() {
        for (number, kind) in Kind::ALL.iter().enumerate() {
            assert_eq!(
                (*kind as usize, Kind::of(number as u32)),
                (number, Some(*kind))
            );
        }
        assert_eq!(Kind::of(200), None);
        assert_eq!(
            Why::of(Why::QueueFull as u32).map(Why::word),
            Some("queue_full")
        );
    }

    /// Torn records would show values that do not belong together.
    #[test]
    fn a_reader_never_sees_half_a_record() {
        let flight = Arc::new(Flight::new(256));
        let stop = Arc::new(AtomicBool::new(false));
        let (written, stopped) = (Arc::clone(&flight), Arc::clone(&stop));
        let writer = std::thread::spawn(move || {
            let mut n = 0u64;
            while !stopped.load(Ordering::Relaxed) {
                n += 1;
                written.note(n, Kind::Begun, n as u32 & 0xff, n as u32, n);
            }
        });
        let (mut seen, mut from) = (0u64, 0);
        while seen < 5_000 {
            std::thread::yield_now();
            let mut out = Vec::new();
            from = flight.read(from, 256, &mut out);
            for record in out {
                let n = record.number;
                assert_eq!((record.at_ns, record.value), (n, n));
                assert_eq!((record.subject, record.detail), (n as u32, n as u32 & 0xff));
                seen += 1;
            }
        }
        stop.store(true, Ordering::Relaxed);
        writer.join().unwrap();
    }

    /// `cargo test --release -p corelane-engine --lib flight -- --ignored --nocapture`
    #[test]
    #[ignore = "a measurement"]
    fn what_a_record_costs() {
        for records in [0, 65_536] {
            let flight = Flight::new(records);
            const ROUNDS: u64 = 20_000_000;
            let began = std::time::Instant::now();
            for n in 0..ROUNDS {
                flight.note(n, Kind::Routed, 1, std::hint::black_box(n as u32), n);
            }
            let each = began.elapsed().as_nanos() as f64 / ROUNDS as f64;
            println!("{records} records: {each:.2} ns each");
        }
    }
}
