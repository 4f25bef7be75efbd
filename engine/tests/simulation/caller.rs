//! Callers: they send requests in many manners and read replies, or do not.

use std::net::SocketAddr;

use corelane_codec::reply_frame;
use corelane_engine::ring::sim::{Net, PeerId, PeerState};

use crate::book::Book;
use crate::dice::Dice;

/// How a caller leaves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exit {
    Close,
    Reset,
    /// Sends its end of stream and reads on.
    Half,
    /// Sends nothing more and stays.
    Stall,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    Open,
    /// We have left.
    Left,
    /// The router, or the network, has ended it.
    Lost,
}

pub struct Caller {
    pub peer: PeerId,
    /// Numbers of its requests, in order.
    pub plan: Vec<usize>,
    bytes: Vec<u8>,
    /// Where each request ends in `bytes`.
    ends: Vec<usize>,
    written: usize,
    inbox: Vec<u8>,
    pub replies: usize,
    pub state: State,
    /// Requests that may wait for their reply at a time.
    pipeline: usize,
    /// Most bytes of one write.
    crumb_bytes: usize,
    /// It does not read until the scenario settles.
    pub deaf: bool,
    /// Where in `bytes` it leaves, and how.
    pub exit: Option<(usize, Exit)>,
    /// Its bytes are no requests.
    pub garbage: bool,
    half_closed: bool,
}

impl Caller {
    pub fn dial(net: &Net, router: SocketAddr, book: &Book, plan: Vec<usize>) -> Caller {
        let mut bytes = Vec::new();
        let mut ends = Vec::new();
        for number in &plan {
            bytes.extend_from_slice(&book.entries[*number].frame);
            ends.push(bytes.len());
        }
        Caller {
            peer: net.peer_connect(router).expect("the router listens"),
            plan,
            bytes,
            ends,
            written: 0,
            inbox: Vec::new(),
            replies: 0,
            state: State::Open,
            pipeline: usize::MAX,
            crumb_bytes: usize::MAX,
            deaf: false,
            exit: None,
            garbage: false,
            half_closed: false,
        }
    }

    /// One that sends what is no frame, or one without an end.
    pub fn babbling(net: &Net, router: SocketAddr, book: &Book, dice: &mut Dice) -> Caller {
        let mut caller = Caller::dial(net, router, book, Vec::new());
        let count = dice.of(1..3000);
        caller.bytes = dice.bytes(count);
        if dice.happens(300) {
            caller.bytes.fill(0);
        }
        caller.garbage = true;
        caller
    }

    pub fn take_manners(&mut self, dice: &mut Dice) {
        if dice.happens(400) {
            self.pipeline = dice.of(1..4);
        }
        if dice.happens(200) {
            self.crumb_bytes = dice.pick(&[1, 7, 50, 1500]);
            // Large frames in single bytes would take for ever and show nothing new.
            self.crumb_bytes = self.crumb_bytes.max(self.bytes.len() / 300);
        }
        self.deaf = dice.happens(150);
        if dice.happens(250) && !self.bytes.is_empty() {
            let at = dice.of(0..self.bytes.len() + 1);
            let at = match dice.happens(400) {
                true => self.bytes.len(),
                false => at,
            };
            let exits = [
                Exit::Close,
                Exit::Reset,
                Exit::Half,
                Exit::Half,
                Exit::Stall,
            ];
            self.exit = Some((at, dice.pick(&exits)));
        }
    }

    /// Requests that were written to their last byte.
    pub fn complete(&self) -> usize {
        self.ends
            .iter()
            .take_while(|end| **end <= self.written)
            .count()
    }

    /// It waits for nothing.
    pub fn is_quiet(&self) -> bool {
        let written = match self.exit {
            Some((at, _)) => self.written >= at,
            None => self.written == self.bytes.len(),
        };
        self.state != State::Open || written && self.replies == self.complete()
    }

    fn may_write(&self) -> usize {
        let waited_for = self.replies.saturating_add(self.pipeline);
        let limit = match self.ends.get(waited_for.saturating_sub(1)) {
            Some(end) => *end,
            None => self.bytes.len(),
        };
        let limit = match self.exit {
            Some((at, _)) => limit.min(at),
            None => limit,
        };
        limit.min(self.written.saturating_add(self.crumb_bytes))
    }

    pub fn step(&mut self, net: &Net, book: &mut Book) -> bool {
        if self.state != State::Open {
            return false;
        }
        let mut moved = false;
        let limit = self.may_write();
        if !self.half_closed && limit > self.written {
            let sent = net.peer_write(self.peer, &self.bytes[self.written..limit]);
            self.written += sent;
            moved |= sent > 0;
        }
        if !self.deaf {
            let read = net.peer_read(self.peer, usize::MAX);
            moved |= !read.is_empty();
            self.inbox.extend(read);
            self.take_replies(book);
        }
        if let Some((at, exit)) = self.exit
            && self.written >= at
        {
            match exit {
                Exit::Close => self.leave(net),
                Exit::Reset => {
                    net.peer_reset(self.peer);
                    self.state = State::Left;
                }
                Exit::Half if !self.half_closed => {
                    self.half_closed = true;
                    net.peer_shutdown(self.peer);
                }
                Exit::Half | Exit::Stall => {}
            }
        }
        if self.state == State::Open && !self.deaf && net.peer_state(self.peer) != PeerState::Open {
            self.state = State::Lost;
            net.peer_close(self.peer);
        }
        moved
    }

    pub fn leave(&mut self, net: &Net) {
        if self.state == State::Open {
            net.peer_close(self.peer);
            self.state = State::Left;
        }
    }

    fn take_replies(&mut self, book: &mut Book) {
        let mut at = 0;
        while let Some(text) = reply_frame::decode(&self.inbox[at..], 1 << 20).frame() {
            if !self.garbage {
                let number = self.plan.get(self.replies);
                let number = *number.expect("a reply to nothing");
                let reply = String::from_utf8(self.inbox[at..][text.clone()].to_vec()).unwrap();
                let begun = self.replies == 0 || self.ends[self.replies - 1] < self.written;
                assert!(begun, "a reply to request {number}, which was not sent");
                book.replied(number, reply);
                self.replies += 1;
            }
            at += text.end;
        }
        self.inbox.drain(..at);
    }
}
