//! Which other bridges there are, so that of several between the same two sides one passes an
//! event on.
//!
//! ```text
//! corelane.bridge.members    {"bridge":"1f8c...","sides":["1","2"],"active":true}     each second
//! ```
//!
//! Bridges tell each other on NATS, which all of them that share two sides have in common. A new
//! one listens first, and is `active` after that; one that falls silent is given up.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// The subject that bridges tell each other on.
pub(super) const SUBJECT: &str = "corelane.bridge.members";
/// Between two words of a bridge.
pub(super) const EVERY: Duration = Duration::from_secs(1);
/// A new bridge listens for so long.
const SETTLE: Duration = Duration::from_millis(2500);
/// One that says nothing for so long is gone.
const SILENCE: Duration = Duration::from_secs(5);
/// Others that are remembered.
const MEMBERS_MAX: usize = 256;
/// Sides of another.
const SIDES_MAX: usize = 16;

/// What a bridge says of itself.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub(super) struct Word {
    /// Its number.
    #[serde(with = "hex")]
    pub(super) bridge: u64,
    /// What it joins.
    #[serde(with = "hexes")]
    pub(super) sides: Vec<u64>,
    /// It passes events on.
    pub(super) active: bool,
    /// It is its last word.
    #[serde(default)]
    pub(super) leaving: bool,
}

#[derive(Debug)]
struct Member {
    sides: Vec<u64>,
    active: bool,
    heard: Instant,
}

/// The bridges that are known, this one included once it has heard itself.
#[derive(Debug)]
pub(super) struct Members {
    me: u64,
    sides: Vec<u64>,
    began: Instant,
    known: HashMap<u64, Member>,
    settled: bool,
}

impl Members {
    /// Nobody is known yet.
    pub(super) fn new(me: u64, sides: Vec<u64>, now: Instant) -> Members {
        Members {
            me,
            sides,
            began: now,
            known: HashMap::new(),
            settled: false,
        }
    }

    /// What is to be said now.
    pub(super) fn word(&self, leaving: bool) -> Word {
        Word {
            bridge: self.me,
            sides: self.sides.clone(),
            active: self.settled,
            leaving,
        }
    }

    /// Somebody has said something; possibly we ourselves. Says who is new or gone.
    pub(super) fn heard(&mut self, word: &Word, now: Instant) -> Option<&'static str> {
        if word.sides.len() > SIDES_MAX {
            return None;
        }
        if word.leaving {
            return self.known.remove(&word.bridge).map(|_| "has left");
        }
        let is_known = self.known.contains_key(&word.bridge);
        if !is_known && self.known.len() >= MEMBERS_MAX {
            return None;
        }
        let member = Member {
            sides: word.sides.clone(),
            active: word.active,
            heard: now,
        };
        let before = self.known.insert(word.bridge, member);
        let was_active = before.is_some_and(|before| before.active);
        (word.active && !was_active).then_some("passes events on")
    }

    /// Time goes by: those who are silent are given up. Says whom.
    pub(super) fn tick(&mut self, now: Instant) -> Vec<u64> {
        self.settled = now.duration_since(self.began) >= SETTLE;
        let silent = |member: &Member| now.duration_since(member.heard) >= SILENCE;
        let gone: Vec<u64> = self
            .known
            .iter()
            .filter(|(_, member)| silent(member))
            .map(|(id, _)| *id)
            .collect();
        for id in &gone {
            self.known.remove(id);
        }
        gone
    }

    /// How many others pass events on.
    pub(super) fn others(&self) -> usize {
        let others = self
            .known
            .iter()
            .filter(|(id, member)| **id != self.me && member.active);
        others.count()
    }

    /// Whether the events of this publisher are ours to bring from one side to another: of all
    /// who join both, the one that draws highest has them.
    pub(super) fn is_mine(&self, from: u64, to: u64, publisher_id: u64) -> bool {
        if !self.settled {
            return false;
        }
        let joins = |member: &Member| {
            member.active && member.sides.contains(&from) && member.sides.contains(&to)
        };
        let mine = draw(self.me, publisher_id);
        self.known.iter().all(|(id, member)| {
            *id == self.me || !joins(member) || (draw(*id, publisher_id), *id) < (mine, self.me)
        })
    }
}

/// The same number for the same two everywhere.
fn draw(bridge: u64, publisher_id: u64) -> u64 {
    let mut x = bridge
        ^ publisher_id
            .rotate_left(32)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for factor in [0xbf58_476d_1ce4_e5b9, 0x94d0_49bb_1331_11eb] {
        x = (x ^ (x >> 30)).wrapping_mul(factor);
    }
    x ^ (x >> 31)
}

/// A number as hexadecimal text: JSON readers elsewhere hold 53 bits.
mod hex {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(value: &u64, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&format_args!("{value:x}"))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
        let text = String::deserialize(from)?;
        u64::from_str_radix(&text, 16).map_err(D::Error::custom)
    }
}

/// Several of them.
mod hexes {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(values: &[u64], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(values.iter().map(|value| format!("{value:x}")))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u64>, D::Error> {
        let texts = Vec::<String>::deserialize(from)?;
        let values = texts.iter().map(|text| u64::from_str_radix(text, 16));
        values.collect::<Result<_, _>>().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_read_as_they_were_written() {
        let word = Members::new(0x1f, vec![1, u64::MAX], Instant::now()).word(false);
        let text = serde_json::to_string(&word).unwrap();
        let want =
            r#"{"bridge":"1f","sides":["1","ffffffffffffffff"],"active":false,"leaving":false}"#;
        assert_eq!(text, want);
        assert_eq!(serde_json::from_str::<Word>(&text).unwrap(), word);
        let short = r#"{"bridge":"1f","sides":[],"active":true}"#;
        assert!(!serde_json::from_str::<Word>(short).unwrap().leaving);
        assert!(
            serde_json::from_str::<Word>(r#"{"bridge":"x","sides":[],"active":true}"#).is_err()
        );
    }

    #[test]
    fn events_have_one_owner_who_is_replaced_when_he_is_gone() {
        let began = Instant::now();
        let mut ours = Members::new(1, vec![7, 8], began);
        let theirs = Members::new(2, vec![7, 8, 9], began);
        // Not before we have listened for a while.
        assert!(!ours.is_mine(7, 8, 5));
        let later = began + SETTLE;
        ours.tick(later);
        assert!((0..64).all(|publisher| ours.is_mine(7, 8, publisher)));
        let mut word = theirs.word(false);
        assert_eq!(ours.heard(&word, later), None);
        assert_eq!(ours.others(), 0);
        word.active = true;
        assert_eq!(ours.heard(&word, later), Some("passes events on"));
        let mine = (0..64)
            .filter(|publisher| ours.is_mine(7, 8, *publisher))
            .count();
        assert!((8..57).contains(&mine), "{mine}");
        // What only we join is ours.
        assert!((0..64).all(|publisher| ours.is_mine(7, 6, publisher)));
        assert_eq!(ours.others(), 1);
        assert_eq!(ours.tick(later + SILENCE), [2]);
        assert!((0..64).all(|publisher| ours.is_mine(7, 8, publisher)));
        ours.heard(&word, later);
        word.leaving = true;
        assert_eq!(ours.heard(&word, later), Some("has left"));
        assert_eq!(ours.others(), 0);
    }

    #[test]
    fn strangers_are_bounded() {
        let now = Instant::now();
        let mut members = Members::new(0, vec![], now);
        for bridge in 1..2 * MEMBERS_MAX as u64 {
            let word = Word {
                bridge,
                sides: vec![],
                active: true,
                leaving: false,
            };
            members.heard(&word, now);
        }
        assert_eq!(members.known.len(), MEMBERS_MAX);
    }
}
