//! Where an event that a bridge passes on has been: the mark that keeps it from going round.
//!
//! ```text
//! ZMQ   part 3:  | 01 | bytes u32 | envelope | C1 'O' 'R' 'G' | sides u8 | side u64 | side u64 ...
//! NATS  header   corelane-origin: 1f8cf7a79e752f,763514149a9fb
//! ```
//!
//! A *side* is what bridges join: a NATS server, a broker, each with a number of its own. Dynamo's
//! subscribers ignore what follows a frame's payload (spec/events-discovery.md §3.3), and headers.

use super::frame;

/// The name of the header on NATS.
pub const HEADER: &str = "corelane-origin";
/// Most sides of one mark; an event that has been to as many goes no further.
pub const SIDES_MAX: usize = 16;

const MAGIC: [u8; 4] = *b"\xc1ORG";
const SIDE_BYTES: usize = 8;

/// The sides that an event has been to, or is on its way to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Origin {
    sides: [u64; SIDES_MAX],
    count: usize,
}

impl Origin {
    /// The sides.
    #[must_use]
    pub fn sides(&self) -> &[u64] {
        &self.sides[..self.count]
    }

    /// Whether it has been there.
    #[must_use]
    pub fn has(&self, side: u64) -> bool {
        self.sides().contains(&side)
    }

    /// Adds a side. `false`: there is no room for another one.
    pub fn add(&mut self, side: u64) -> bool {
        if self.has(side) {
            return true;
        }
        let Some(place) = self.sides.get_mut(self.count) else {
            return false;
        };
        *place = side;
        self.count += 1;
        true
    }

    /// Reads the mark behind the payload of a frame that is a whole message. What is no mark is
    /// none.
    #[must_use]
    pub fn of_frame(message: &[u8]) -> Self {
        let Ok(payload) = frame::payload(message) else {
            return Self::default();
        };
        let trailer = &message[frame::PREFIX_BYTES + payload.len()..];
        Self::decode(trailer).unwrap_or_default()
    }

    fn decode(trailer: &[u8]) -> Option<Self> {
        let (&count, sides) = trailer.strip_prefix(&MAGIC)?.split_first()?;
        let mut origin = Self::default();
        let sides = sides.get(..usize::from(count) * SIDE_BYTES)?;
        for side in sides.chunks_exact(SIDE_BYTES) {
            let side = u64::from_be_bytes(*side.first_chunk()?);
            origin.add(side).then_some(())?;
        }
        Some(origin)
    }

    /// Appends the mark to a frame; nothing for an event that has been nowhere.
    pub fn write(&self, out: &mut Vec<u8>) {
        if self.count == 0 {
            return;
        }
        out.extend_from_slice(&MAGIC);
        // Sixteen at most.
        out.push(self.count as u8);
        for side in self.sides() {
            out.extend_from_slice(&side.to_be_bytes());
        }
    }

    /// Reads the value of the header; what is no number in it is passed over.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let mut origin = Self::default();
        for side in text.split(',') {
            if let Ok(side) = u64::from_str_radix(side.trim(), 16) {
                origin.add(side);
            }
        }
        origin
    }
}

/// The value of the header.
impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (place, side) in self.sides().iter().enumerate() {
            let comma = if place == 0 { "" } else { "," };
            write!(f, "{comma}{side:x}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_read_as_they_were_written() {
        let mut origin = Origin::default();
        assert!(origin.add(7) && origin.add(u64::MAX) && origin.add(7));
        let mut message = vec![];
        frame::write(b"abc", &mut message).unwrap();
        origin.write(&mut message);
        let mark = b"\xc1ORG\x02\0\0\0\0\0\0\0\x07\xff\xff\xff\xff\xff\xff\xff\xff";
        assert_eq!(&message[8..], mark);
        // Others see the payload alone.
        assert_eq!(frame::payload(&message), Ok(&b"abc"[..]));
        assert_eq!(Origin::of_frame(&message), origin);
        assert_eq!(Origin::parse(&origin.to_string()), origin);
        assert_eq!(origin.to_string(), "7,ffffffffffffffff");
    }

    #[test]
    fn what_is_no_mark_is_none() {
        for trailer in [&b""[..], b"x", b"\xc1ORG", b"\xc1ORG\x01\0\0", b"\xc1ORF\0"] {
            assert_eq!(
                Origin::decode(trailer).unwrap_or_default(),
                Origin::default()
            );
        }
        assert_eq!(Origin::of_frame(b"\x02"), Origin::default());
        let many = [&b"\xc1ORG\xff"[..], &[0x55; 255 * 8]].concat();
        assert_eq!(Origin::decode(&many).map(|origin| origin.count), Some(1));
        assert_eq!(Origin::parse("no, -1,5").sides(), [5]);
        let mut full = Origin::default();
        for side in 0..SIDES_MAX as u64 {
            assert!(full.add(side));
        }
        assert!(!full.add(99) && full.add(3));
    }
}
