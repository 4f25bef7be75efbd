//! One client's socket: what has come in, what must still go out, and how long each may take.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::event::epoll::EventFlags;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::protocol::fd_pass;
use crate::protocol::frame::{Cut, PREFIX_BYTES, REQUEST_BYTES_MAX, cut};

/// A frame on its way out.
struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
    /// Let go once its frame's first bytes are sent, or with the connection.
    descriptor: Option<Arc<OwnedFd>>,
}

/// What a connection must do before its time is over.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Owes {
    /// Send its first frame.
    FirstFrame,
    /// Send the rest of a frame.
    RestOfFrame,
    /// Take what we send.
    Reading,
}

/// What a read brought.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Filled {
    Bytes,
    Nothing,
    End,
    /// A descriptor came, which no client may send.
    Descriptor,
}

pub(super) struct Connection {
    pub(super) socket: OwnedFd,
    /// Which pool it is a client of.
    pub(super) domain: usize,
    input: Vec<u8>,
    output: VecDeque<Outgoing>,
    /// The pool has forgotten it; it is closed once `output` is empty.
    pub(super) closing: bool,
    /// The peer sends no more.
    pub(super) ended: bool,
    heard: bool,
    /// What it owes, and by when.
    owes: Option<(Owes, u64)>,
    /// What epoll watches for; none before it was told of this connection.
    pub(super) watched: Option<EventFlags>,
    /// What of [`Connection::held_bytes`] the service has counted.
    pub(super) counted_bytes: usize,
}

impl Connection {
    pub(super) fn new(socket: OwnedFd, domain: usize) -> Connection {
        Connection {
            socket,
            domain,
            input: Vec::new(),
            output: VecDeque::new(),
            closing: false,
            ended: false,
            heard: false,
            owes: None,
            watched: None,
            counted_bytes: 0,
        }
    }

    /// Whether the peer is still there: it has not closed, nor shut down its sending side.
    pub(super) fn is_alive(&self) -> bool {
        let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        let mut watched = [PollFd::new(&self.socket, PollFlags::RDHUP)];
        match poll(
            &mut watched,
            Some(&Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            }),
        ) {
            Ok(_) => !watched[0].revents().intersects(gone),
            Err(_) => true,
        }
    }

    /// Reads once. At most one frame and one read beyond it are ever held.
    pub(super) fn fill(&mut self, scratch: &mut [u8]) -> Result<Filled, Errno> {
        let received = match fd_pass::receive(self.socket.as_fd(), scratch) {
            Err(Errno::AGAIN | Errno::INTR) => return Ok(Filled::Nothing),
            received => received?,
        };
        if received.descriptor.is_some() || received.too_many {
            return Ok(Filled::Descriptor);
        }
        if received.bytes == 0 {
            self.ended = true;
            return Ok(Filled::End);
        }
        self.input.extend_from_slice(&scratch[..received.bytes]);
        Ok(Filled::Bytes)
    }

    /// The frame at the front of what has come in.
    pub(super) fn front(&self) -> Cut<'_> {
        cut(&self.input, REQUEST_BYTES_MAX)
    }

    /// Drops the frame at the front, which was dealt with.
    pub(super) fn consume(&mut self, payload_bytes: usize) {
        self.input.drain(..PREFIX_BYTES + payload_bytes);
        if self.input.len() < INPUT_BYTES_KEPT {
            self.input.shrink_to(INPUT_BYTES_KEPT);
        }
        self.heard = true;
        self.owes = None;
    }

    pub(super) fn push(&mut self, bytes: Vec<u8>, descriptor: Option<Arc<OwnedFd>>) {
        self.output.push_back(Outgoing {
            bytes,
            sent: 0,
            descriptor,
        });
    }

    /// Puts another frame in the place of the one that is next, of which nothing was sent.
    pub(super) fn replace_front(&mut self, bytes: Vec<u8>) {
        self.output.pop_front();
        self.output.push_front(Outgoing {
            bytes,
            sent: 0,
            descriptor: None,
        });
    }

    /// Memory that it takes, beyond what every connection has.
    pub(super) fn held_bytes(&self) -> usize {
        let output = self.output.iter().map(|frame| frame.bytes.capacity());
        let input = match self.input.capacity() {
            kept if kept <= INPUT_BYTES_KEPT => self.input.len(),
            more => more,
        };
        input + output.sum::<usize>()
    }

    /// Whether something must still go out.
    pub(super) fn is_sending(&self) -> bool {
        !self.output.is_empty()
    }

    /// Sends what the socket takes.
    pub(super) fn flush(&mut self) -> Result<(), Errno> {
        while let Some(front) = self.output.front_mut() {
            let rest = &front.bytes[front.sent..];
            let descriptor = front
                .descriptor
                .as_ref()
                .map(|descriptor| descriptor.as_fd());
            match fd_pass::send(self.socket.as_fd(), rest, descriptor) {
                Ok(sent) => {
                    // The descriptor went with the first byte.
                    front.descriptor = None;
                    front.sent += sent;
                    if front.sent == front.bytes.len() {
                        self.output.pop_front();
                        self.owes = None;
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    /// What to watch for: the end always, bytes only while they can be dealt with.
    pub(super) fn wants(&self, busy: bool) -> EventFlags {
        let mut wants = EventFlags::RDHUP;
        if self.is_sending() {
            wants |= EventFlags::OUT;
        } else if !busy && !self.closing {
            wants |= EventFlags::IN;
        }
        wants
    }

    /// Starts or keeps the clock of what the peer owes; answers when it is over.
    pub(super) fn deadline_ns(&mut self, busy: bool, limits: Limits, now_ns: u64) -> Option<u64> {
        let owes = if self.is_sending() {
            Some((Owes::Reading, limits.frame_ns))
        } else if busy {
            None
        } else if !self.input.is_empty() {
            Some((Owes::RestOfFrame, limits.frame_ns))
        } else if !self.heard {
            Some((Owes::FirstFrame, limits.first_frame_ns))
        } else {
            None
        };
        self.owes = match (owes, self.owes) {
            (Some((what, _)), Some((before, deadline))) if what == before => Some((what, deadline)),
            (Some((what, limit)), _) => Some((what, now_ns.saturating_add(limit))),
            (None, _) => None,
        };
        self.owes.map(|(_, deadline)| deadline)
    }

    /// What it owes now.
    pub(super) fn debt(&self) -> Option<Owes> {
        self.owes.map(|(what, _)| what)
    }
}

/// How long a peer may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) first_frame_ns: u64,
    pub(super) frame_ns: u64,
}

/// What is taken beyond that is given back.
const INPUT_BYTES_KEPT: usize = 4 << 10;
