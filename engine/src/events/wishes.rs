//! Subscriptions come and go: into the trie, and on to the publishers of their group, who then
//! send only what somebody wants.

use corelane_codec::zmtp;

use super::plane::Plane;
use super::session::Wire;
use super::{Group, Side};
use crate::ring::Ring;

/// The key of a prefix in the trie: its group goes before it.
pub(super) fn key(group: Group, prefix: &[u8]) -> Vec<u8> {
    [&group.to_be_bytes()[..], prefix].concat()
}

impl<R: Ring> Plane<R> {
    /// A subscriber wants a prefix, or no longer. `false`: the session ends.
    pub(super) fn wish(&mut self, slot: u32, subscribe: bool, prefix: &[u8]) -> bool {
        let session = &mut self.sessions[slot];
        if session.side != Side::Subscriber {
            return self.refuse(slot, "a publisher does not subscribe");
        }
        if prefix.len() > zmtp::PREFIX_BYTES_MAX {
            return self.refuse(slot, "a subscription of more than 1024 bytes");
        }
        let group = session.group;
        let asked = session.wishes.get(prefix).copied().unwrap_or(0);
        match (subscribe, asked) {
            (true, 0) => {
                if self.subscriptions.len() >= self.config.subscriptions_max as usize {
                    return self.refuse(slot, "too many subscriptions, of it or of all");
                }
                session.wishes.insert(prefix.into(), 1);
                self.add_wish(group, prefix, slot);
            }
            (true, asked) => {
                session
                    .wishes
                    .insert(prefix.into(), asked.saturating_add(1));
            }
            (false, 0) => {}
            (false, 1) => {
                session.wishes.remove(prefix);
                self.remove_wish(group, prefix, slot);
            }
            (false, asked) => {
                session.wishes.insert(prefix.into(), asked - 1);
            }
        }
        true
    }

    pub(super) fn add_wish(&mut self, group: Group, prefix: &[u8], member: u32) {
        if self.subscriptions.add(&key(group, prefix), member) {
            self.tell_publishers(group, prefix, true);
        }
    }

    pub(super) fn remove_wish(&mut self, group: Group, prefix: &[u8], member: u32) {
        if self.subscriptions.remove(&key(group, prefix), member) {
            self.tell_publishers(group, prefix, false);
        }
    }

    /// All that this subscriber wanted.
    pub(super) fn forget_wishes(&mut self, slot: u32) {
        let session = &mut self.sessions[slot];
        let group = session.group;
        for (prefix, _) in std::mem::take(&mut session.wishes) {
            self.remove_wish(group, &prefix, slot);
        }
    }

    fn tell_publishers(&mut self, group: Group, prefix: &[u8], subscribe: bool) {
        for place in 0..self.publishers.len() {
            let slot = self.publishers[place];
            let session = &self.sessions[slot];
            // Plain publishers send all they have.
            if session.group != group || !session.is_open() || session.wire == Wire::Plain {
                continue;
            }
            let mut bytes = Vec::new();
            zmtp::write_subscription(session.minor, subscribe, prefix, &mut bytes);
            self.push_control(slot, &bytes);
            if !subscribe {
                self.begin_anew(slot, prefix);
            }
        }
    }

    /// The publisher stops sending what begins with `prefix`, unless another wish covers it.
    fn begin_anew(&mut self, slot: u32, prefix: &[u8]) {
        let group = self.sessions[slot].group;
        let mut members = Vec::new();
        for memo in &self.sessions[slot].source.memos {
            if memo.subject.starts_with(prefix) {
                members.clear();
                self.subscriptions
                    .matches(&key(group, &memo.subject), &mut members);
                if members.is_empty() && self.sequences.is_at(memo.tracker, memo.publisher_id) {
                    self.sequences.begin_anew(memo.tracker);
                }
            }
        }
    }

    /// Tells a new publisher all that is wanted in its group.
    pub(super) fn tell_wishes(&mut self, slot: u32) {
        let (group, minor) = (self.sessions[slot].group, self.sessions[slot].minor);
        if self.sessions[slot].wire == Wire::Plain {
            return;
        }
        let mut bytes = Vec::new();
        self.subscriptions.each(&group.to_be_bytes(), |key| {
            let prefix = &key[size_of::<Group>()..];
            zmtp::write_subscription(minor, true, prefix, &mut bytes);
        });
        if !bytes.is_empty() {
            self.push_control(slot, &bytes);
        }
    }
}
