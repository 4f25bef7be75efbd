//! The 64 bits that travel with a ring operation and come back with its completion.
//!
//! ```text
//! 63      56 55                32 31                     0
//! +---------+--------------------+------------------------+
//! |  kind   |     generation     |          slot          |
//! +---------+--------------------+------------------------+
//! ```
//!
//! Never a pointer: a completion that outlives its connection carries an old generation, is counted
//! and dropped, and can do no harm.

/// What an operation was for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Multishot accept on a listener; the slot is the listener's index.
    Accept = 1,
    /// Multishot receive on a connection.
    Receive = 2,
    /// One send on a connection.
    Send = 3,
    /// The connect of an outgoing connection.
    Connect = 4,
    /// The eventfd that control and other cores write to.
    Wake = 5,
    /// Cancellation of another operation; its own result is of no interest.
    Cancel = 6,
    /// One look at what a connection has to read, beside its multishot receive.
    Collect = 7,
}

/// Kind, slot and generation of one ring operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operation {
    /// What was asked for.
    pub kind: Kind,
    /// Index of the connection (or listener) it was asked for.
    pub slot: u32,
    /// Generation of that slot when it was asked for; 24 bits.
    pub generation: u32,
}

/// Generations count modulo this.
pub const GENERATIONS: u32 = 1 << 24;

impl Operation {
    /// An operation of `kind` on `slot`.
    pub fn new(kind: Kind, slot: u32, generation: u32) -> Operation {
        debug_assert!(generation < GENERATIONS);
        Operation {
            kind,
            slot,
            generation,
        }
    }

    /// The bits that go into the submission entry.
    pub fn to_bits(self) -> u64 {
        (self.kind as u64) << 56 | u64::from(self.generation) << 32 | u64::from(self.slot)
    }

    /// Reads them back; `None` when the kind is not one of ours.
    pub fn from_bits(bits: u64) -> Option<Operation> {
        let kind = match (bits >> 56) as u8 {
            1 => Kind::Accept,
            2 => Kind::Receive,
            3 => Kind::Send,
            4 => Kind::Connect,
            5 => Kind::Wake,
            6 => Kind::Cancel,
            7 => Kind::Collect,
            _ => return None,
        };
        let generation = (bits >> 32) as u32 & (GENERATIONS - 1);
        Some(Operation {
            kind,
            slot: bits as u32,
            generation,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_round_trip_at_the_edges() {
        for kind in [
            Kind::Accept,
            Kind::Receive,
            Kind::Send,
            Kind::Connect,
            Kind::Wake,
            Kind::Cancel,
            Kind::Collect,
        ] {
            for (slot, generation) in [(0, 0), (u32::MAX, GENERATIONS - 1), (7, 1)] {
                let operation = Operation::new(kind, slot, generation);
                assert_eq!(Operation::from_bits(operation.to_bits()), Some(operation));
            }
        }
        assert_eq!(Operation::from_bits(0), None);
        assert_eq!(Operation::from_bits(u64::MAX), None);
    }
}
