//! Bytes of our own making on their way to one socket.
//!
//! ```text
//! waiting  [............]  grows while the kernel reads `sending`
//! sending  [sent|unsent ]  not touched until the kernel is done with it
//! ```
//!
//! It lives in the connection, so the kernel never holds bytes that are gone. Blocks of a lane's
//! slab stand between bytes of ours without being copied: they are [`Lent`].

use std::rc::Rc;

use corelane_gpu_mem::lane::memory::Mapping;

use crate::ring::Span;

/// A block of a worker's slab on its way to a socket.
#[derive(Debug)]
pub struct Lent {
    /// Where it lies; mapped as long as this is here.
    pub slab: Rc<Mapping>,
    /// From the slab's start.
    pub offset: u64,
    /// Its size.
    pub bytes: u32,
    /// The worker's mark.
    pub tag: u64,
    /// Slot and generation of the lane.
    pub lane: (u32, u32),
    /// Slot and generation of the request in the lane.
    pub job: (u32, u32),
}

impl Lent {
    fn span(&self, from: usize) -> Option<Span> {
        let length = self.bytes as usize - from;
        let place = self.slab.place(self.offset + from as u64, length)?;
        Some(Span::of_shared(place, length))
    }
}

/// Bytes of ours with lent blocks between them, each before the byte at its index.
#[derive(Debug, Default)]
struct Mixed {
    bytes: Vec<u8>,
    lent: Vec<(usize, Lent)>,
    lent_bytes: usize,
}

impl Mixed {
    fn len(&self) -> usize {
        self.bytes.len() + self.lent_bytes
    }
}

/// Two buffers that take turns.
#[derive(Debug, Default)]
pub struct Outgoing {
    sending: Mixed,
    sent: usize,
    waiting: Mixed,
    /// Blocks that were sent or will never be; they go back to their worker.
    returned: Vec<Lent>,
}

/// A buffer that grew beyond this is given back once it is empty.
const KEPT_BYTES_MAX: usize = 1 << 20;

impl Outgoing {
    /// Where more bytes are appended.
    pub fn waiting(&mut self) -> &mut Vec<u8> {
        &mut self.waiting.bytes
    }

    /// Takes blocks to be sent before the given indices of [`Outgoing::waiting`].
    pub fn lend(&mut self, lent: &mut Vec<(usize, Lent)>) {
        let bytes: usize = lent.iter().map(|(_, lent)| lent.bytes as usize).sum();
        self.waiting.lent_bytes += bytes;
        self.waiting.lent.append(lent);
    }

    /// Blocks that nobody sends any more. All of them once the kernel is done with the socket.
    pub fn returned(&mut self, over: bool) -> impl Iterator<Item = Lent> {
        if over {
            let rest = [&mut self.sending, &mut self.waiting];
            for mixed in rest {
                mixed.lent_bytes = 0;
                self.returned
                    .extend(mixed.lent.drain(..).map(|(_, lent)| lent));
            }
        }
        self.returned.drain(..)
    }

    /// Whether blocks stand between our bytes.
    pub fn has_lent(&self) -> bool {
        !self.sending.lent.is_empty() || !self.waiting.lent.is_empty()
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
    /// Of a connection that has no lent blocks.
    pub fn unsent_bytes(&mut self) -> &[u8] {
        self.turn();
        debug_assert!(self.sending.lent.is_empty(), "blocks are sent as spans");
        &self.sending.bytes[self.sent..]
    }

    /// The same for one that has: fills `spans` from the front and answers how many there are.
    pub fn unsent_spans(&mut self, spans: &mut [Span]) -> usize {
        self.turn();
        let (mut count, mut skip, mut from) = (0, self.sent, 0);
        let mut push = |length: usize, span: &dyn Fn(usize) -> Option<Span>| {
            let here = skip.min(length);
            skip -= here;
            if here < length
                && count < spans.len()
                && let Some(span) = span(here)
            {
                spans[count] = span;
                count += 1;
            }
        };
        let Mixed { bytes, lent, .. } = &self.sending;
        for (at, lent) in lent {
            let ours = &bytes[from..*at];
            push(ours.len(), &|skip| Some(Span::of(&ours[skip..])));
            push(lent.bytes as usize, &|skip| lent.span(skip));
            from = *at;
        }
        let ours = &bytes[from..];
        push(ours.len(), &|skip| Some(Span::of(&ours[skip..])));
        count
    }

    /// Once all is sent, what waits takes its place.
    fn turn(&mut self) {
        if self.sent < self.sending.len() {
            return;
        }
        self.sent = 0;
        self.sending.bytes.clear();
        self.sending.lent_bytes = 0;
        let lent = self.sending.lent.drain(..);
        self.returned.extend(lent.map(|(_, lent)| lent));
        if self.sending.bytes.capacity() > KEPT_BYTES_MAX {
            self.sending.bytes = Vec::new();
        }
        std::mem::swap(&mut self.sending, &mut self.waiting);
    }

    /// The socket took `bytes` bytes of what [`Outgoing::unsent_bytes`] answered.
    pub fn sent(&mut self, bytes: usize) {
        self.sent += bytes;
        debug_assert!(self.sent <= self.sending.len(), "more was sent than given");
        if self.sent == self.sending.len() && !self.sending.lent.is_empty() {
            self.turn();
        }
    }

    /// Forgets what is not being sent.
    pub fn drop_waiting(&mut self) {
        self.waiting.bytes.clear();
        self.waiting.lent_bytes = 0;
        let lent = self.waiting.lent.drain(..);
        self.returned.extend(lent.map(|(_, lent)| lent));
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

    #[test]
    fn lent_blocks_stand_where_they_belong_and_come_back() {
        let memory = corelane_gpu_mem::lane::memory::create("test", 4096).unwrap();
        let slab = Rc::new(Mapping::new(&memory, 4096).unwrap());
        assert!(slab.write(100, b"LENT"));
        let block = |tag, bytes| Lent {
            slab: Rc::clone(&slab),
            offset: 100,
            bytes,
            tag,
            lane: (0, 0),
            job: (0, 0),
        };
        let mut outgoing = Outgoing::default();
        outgoing.waiting().extend_from_slice(b"abcd");
        outgoing.lend(&mut vec![
            (2, block(1, 4)),
            (2, block(2, 2)),
            (4, block(3, 1)),
        ]);
        assert_eq!((outgoing.unsent(), outgoing.has_lent()), (11, true));
        let whole = b"abLENTLEcdL";
        for sent in 0..whole.len() {
            let mut spans = [Span::of(&[]); 8];
            let count = outgoing.unsent_spans(&mut spans);
            let bytes: Vec<u8> = spans[..count]
                .iter()
                .flat_map(|span| {
                    let start = span.0.iov_base.cast();
                    // SAFETY: spans of live memory that nobody writes to now.
                    unsafe { std::slice::from_raw_parts(start, span.len()) }.to_vec()
                })
                .collect();
            assert_eq!(bytes, whole[sent..]);
            assert_eq!(outgoing.returned(false).count(), 0);
            outgoing.sent(1);
        }
        let tags: Vec<u64> = outgoing.returned(false).map(|lent| lent.tag).collect();
        assert_eq!((tags, outgoing.is_empty()), (vec![1, 2, 3], true));
        outgoing.lend(&mut vec![(0, block(4, 4))]);
        outgoing.unsent_spans(&mut [Span::of(&[])]);
        outgoing.lend(&mut vec![(0, block(5, 4))]);
        outgoing.drop_waiting();
        let dropped: Vec<u64> = outgoing.returned(false).map(|lent| lent.tag).collect();
        let rest: Vec<u64> = outgoing.returned(true).map(|lent| lent.tag).collect();
        assert_eq!((dropped, rest), (vec![5], vec![4]));
    }
}
