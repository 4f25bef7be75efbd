//! Bytes of our own making on their way to one socket.
//!
//! ```text
//! waiting  [............]  grows while the kernel reads `sending`
//! sending  [sent|unsent ]  not touched until the kernel is done with it
//! ```
//!
//! It lives in the connection, so the kernel never holds bytes that are gone.

/// Two buffers that take turns.
#[derive(Debug, Default)]
pub struct Outgoing {
    sending: Vec<u8>,
    sent: usize,
    waiting: Vec<u8>,
}

/// A buffer that grew beyond this is given back once it is empty.
const KEPT_BYTES_MAX: usize = 1 << 20;

impl Outgoing {
    /// Where more bytes are appended.
    pub fn waiting(&mut self) -> &mut Vec<u8> {
        &mut self.waiting
    }

    /// Bytes that the socket has not taken.
    pub fn unsent(&self) -> usize {
        self.sending.len() - self.sent + self.waiting.len()
    }

    /// Whether the socket has taken all.
    pub fn is_empty(&self) -> bool {
        self.unsent() == 0
    }

    /// What is to be sent next, all that there is. Only while no send is under way.
    pub fn unsent_bytes(&mut self) -> &[u8] {
        if self.sent == self.sending.len() {
            self.sent = 0;
            self.sending.clear();
            if self.sending.capacity() > KEPT_BYTES_MAX {
                self.sending = Vec::new();
            }
            std::mem::swap(&mut self.sending, &mut self.waiting);
        }
        &self.sending[self.sent..]
    }

    /// The socket took `bytes` bytes of what [`Outgoing::unsent_bytes`] answered.
    pub fn sent(&mut self, bytes: usize) {
        self.sent += bytes;
        debug_assert!(self.sent <= self.sending.len(), "more was sent than given");
    }

    /// Forgets what is not being sent.
    pub fn drop_waiting(&mut self) {
        self.waiting.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_appended_during_a_send_follows_it() {
        let mut outgoing = Outgoing::default();
        outgoing.waiting().extend_from_slice(b"abc");
        assert_eq!(outgoing.unsent_bytes(), b"abc");
        outgoing.waiting().extend_from_slice(b"def");
        outgoing.sent(2);
        assert_eq!(outgoing.unsent_bytes(), b"c");
        outgoing.sent(1);
        assert_eq!(
            (outgoing.unsent(), outgoing.unsent_bytes()),
            (3, &b"def"[..])
        );
        outgoing.sent(3);
        assert!(outgoing.is_empty() && outgoing.unsent_bytes().is_empty());
    }
}
