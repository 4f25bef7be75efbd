//! Requests between their arrival and their end.

use crate::load::Work;
use crate::pieces::PieceList;
use crate::send_pool::{ChunkId, ChunkQueue};
use crate::table::NONE;

/// Instances that one request has been tried on, at most; more are not remembered.
pub const TRIED_MAX: usize = 4;

/// The reply frame owed to the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Not known yet.
    Open,
    /// Empty: accepted.
    Accepted,
    /// A refusal, or the instance's own words, in a chunk of the send pool.
    Text(ChunkId),
}

/// One request.
#[derive(Debug)]
pub struct Request {
    /// Connection that it came on; [`NONE`] once the reply has been written or the caller is gone.
    pub downstream: u32,
    /// The next request of that connection.
    pub next_reply: u32,
    /// Where it is queued or unanswered; [`NONE`] when nowhere.
    pub upstream: u32,
    /// The next request of that upstream.
    pub next_upstream: u32,
    /// Index of its route.
    pub route: u32,
    /// Instance that it was given to, while `upstream` is set.
    pub instance: u32,
    /// The frame without its path: `u16 H, headers, u32 N, payload`, as far as it has arrived and
    /// is kept.
    pub frame: PieceList,
    /// Bytes of all that when complete.
    pub frame_bytes: u64,
    /// Bytes of `frame` that were dropped from its front after they were sent.
    pub dropped_bytes: u64,
    /// Where the payload begins in it.
    pub payload_offset: u32,
    /// The reply.
    pub reply: Reply,
    /// All of the frame received so far is kept, so that another instance can have it.
    pub held: bool,
    /// Its last byte has not arrived.
    pub streaming: bool,
    /// It has been written to an instance's socket, and waits for the answer.
    pub sent: bool,
    /// How many instances it was tried on.
    pub attempts: u8,
    /// Their ids, the last few.
    pub tried: [u64; TRIED_MAX],
    /// What it costs the instance that it was given to.
    pub work: Work,
    /// Hash of the affinity header, or the instance asked for; 0 when there is none.
    pub hint: u64,
    /// The relay that its response comes back through; [`NONE`] in direct mode, and once that can
    /// do without the request.
    pub relay: u32,
    /// Its relay goes on without it: only its place in the line of answers is of use.
    pub detached: bool,
    /// Bytes of our own between the instance's path and `frame`, in the relays' pool: what leaves
    /// in place of headers and envelope.
    pub head: ChunkQueue,
    /// How many they are.
    pub head_bytes: u32,
    /// Its span; [`NONE`] as a rule, and once that is its relay's alone.
    pub span: u32,
    /// When its prefix had arrived.
    pub received_ns: u64,
    /// When it was given to its instance.
    pub placed_ns: u64,
    /// When it was written to the socket.
    pub sent_ns: u64,
}

impl Request {
    /// A request that nobody has been chosen for.
    pub fn new(downstream: u32, route: u32, received_ns: u64) -> Request {
        Request {
            downstream,
            next_reply: NONE,
            upstream: NONE,
            next_upstream: NONE,
            route,
            instance: NONE,
            frame: PieceList::EMPTY,
            frame_bytes: 0,
            dropped_bytes: 0,
            payload_offset: 0,
            reply: Reply::Open,
            held: true,
            streaming: false,
            sent: false,
            attempts: 0,
            tried: [0; TRIED_MAX],
            work: Work::default(),
            hint: 0,
            relay: NONE,
            detached: false,
            head: ChunkQueue::EMPTY,
            head_bytes: 0,
            span: NONE,
            received_ns,
            placed_ns: 0,
            sent_ns: 0,
        }
    }

    /// Whether `instance` has had it already.
    pub fn was_tried_on(&self, id: u64) -> bool {
        let tried = usize::from(self.attempts).min(TRIED_MAX);
        self.tried[..tried].contains(&id)
    }

    /// Remembers an instance.
    pub fn try_on(&mut self, id: u64) {
        let place = usize::from(self.attempts) % TRIED_MAX;
        self.tried[place] = id;
        self.attempts = self.attempts.saturating_add(1);
    }
}
