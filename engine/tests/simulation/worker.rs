//! Fake workers: they take frames, check and answer them, die and come back.

use std::net::SocketAddr;

use corelane_codec::{reply_frame, request_frame};
use corelane_engine::directory::Instance;
use corelane_engine::ring::sim::{ListenerId, Net, PeerId, PeerState};

use crate::answer::Answer;
use crate::book::{Acceptance, Book};
use crate::dice::Dice;

/// What a worker does with a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Manner {
    Accept,
    Overloaded,
    Unavailable,
    /// Any of the three.
    Moody,
    /// Takes it and never answers.
    Silent,
    /// Answers with words that mean nothing.
    Babble,
    /// Accepts, and reads a few bytes at a time.
    Slow,
    /// Accepts, and answers late.
    Late,
    /// Reads nothing at all.
    Deaf,
}

const MANNERS: [Manner; 9] = [
    Manner::Accept,
    Manner::Overloaded,
    Manner::Unavailable,
    Manner::Moody,
    Manner::Silent,
    Manner::Babble,
    Manner::Slow,
    Manner::Late,
    Manner::Deaf,
];

pub struct Worker {
    number: usize,
    pub address: SocketAddr,
    pub instances: Vec<Instance>,
    listener: Option<ListenerId>,
    conns: Vec<Conn>,
    /// Its responses, where the router relays them.
    answers: Vec<Answer>,
    pub manner: Manner,
    pub incarnation: usize,
    /// When each incarnation died.
    pub deaths_ns: Vec<u64>,
    revival_ns: Option<u64>,
}

struct Conn {
    peer: PeerId,
    inbox: Vec<u8>,
    out: Vec<u8>,
    /// A frame was not answered, so no later one can be.
    mute: bool,
}

impl Worker {
    pub fn start(net: &Net, number: usize) -> Worker {
        let address = SocketAddr::from(([10, 1, 0, number as u8 + 1], 1));
        let instance = |endpoint: u64| {
            let id = (number as u64 + 1) << 4 | endpoint;
            Instance {
                id,
                address,
                path: format!("{id:x}/sim/worker/{endpoint}").into_bytes(),
            }
        };
        Worker {
            number,
            address,
            instances: vec![instance(0), instance(1)],
            listener: Some(net.peer_listen(address)),
            conns: Vec::new(),
            answers: Vec::new(),
            manner: Manner::Accept,
            incarnation: 0,
            deaths_ns: Vec::new(),
            revival_ns: None,
        }
    }

    pub fn change(&mut self, dice: &mut Dice) {
        self.manner = if dice.happens(500) {
            Manner::Accept
        } else {
            dice.pick(&MANNERS)
        };
    }

    pub fn is_alive(&self) -> bool {
        self.listener.is_some()
    }

    /// As if the process were killed. It may come back after a time that nobody can overlook.
    pub fn die(&mut self, net: &Net, dice: &mut Dice) {
        if self.listener.is_none() {
            return;
        }
        self.die_for_good(net);
        let pause_ns = dice.of(500_000_000..3_000_000_000) as u64;
        self.revival_ns = dice.happens(600).then_some(net.now_ns() + pause_ns);
    }

    pub fn die_for_good(&mut self, net: &Net) {
        self.listener = None;
        net.refuse(self.address);
        for conn in self.conns.drain(..) {
            net.peer_reset(conn.peer);
        }
        for answer in self.answers.drain(..) {
            answer.die(net);
        }
        self.deaths_ns.push(net.now_ns());
    }

    pub fn step(&mut self, net: &Net, book: &mut Book, dice: &mut Dice) -> bool {
        if self.revival_ns.is_some_and(|at_ns| at_ns <= net.now_ns()) {
            self.revival_ns = None;
            self.incarnation += 1;
            self.listener = Some(net.peer_listen(self.address));
        }
        let Some(listener) = self.listener else {
            return false;
        };
        while let Some(peer) = net.peer_accept(listener) {
            self.conns.push(Conn {
                peer,
                inbox: Vec::new(),
                out: Vec::new(),
                mute: false,
            });
        }
        let mut moved = false;
        let mut conns = std::mem::take(&mut self.conns);
        conns.retain_mut(|conn| {
            let bytes_max = match self.manner {
                Manner::Deaf => 0,
                Manner::Slow => dice.of(1..600),
                _ => usize::MAX,
            };
            let read = net.peer_read(conn.peer, bytes_max);
            moved |= !read.is_empty();
            if !read.is_empty() {
                conn.inbox.extend(read);
                self.take_frames(conn, net, book, dice);
            }
            if self.manner != Manner::Late || dice.happens(30) {
                let sent = net.peer_write(conn.peer, &conn.out);
                moved |= sent > 0;
                conn.out.drain(..sent);
            }
            let over = net.peer_state(conn.peer) != PeerState::Open;
            if over {
                net.peer_close(conn.peer);
            }
            !over
        });
        self.conns = conns;
        self.answers.retain_mut(|answer| {
            let goes_on = answer.step(net);
            moved |= answer.moved;
            goes_on
        });
        moved
    }

    fn take_frames(&mut self, conn: &mut Conn, net: &Net, book: &mut Book, dice: &mut Dice) {
        let mut at = 0;
        while let Some(prefix) = request_frame::decode_prefix(&conn.inbox[at..]).frame() {
            let frame_bytes = prefix.frame_bytes() as usize;
            let Some(frame) = conn.inbox.get(at..at + frame_bytes) else {
                break;
            };
            let path = &frame[prefix.path.clone()];
            let instance = self.instances.iter().find(|known| known.path == path);
            let instance = instance
                .unwrap_or_else(|| panic!("path {path:?} is not ours"))
                .id;
            let (number, relayed) = match book.relayed {
                false => (book.recognize(frame, prefix.path.end), None),
                true => {
                    let (number, home) = book.recognize_relayed(&frame[prefix.prefix_bytes..]);
                    (number, Some(home))
                }
            };
            at += frame_bytes;
            let accepts = Acceptance {
                worker: self.number,
                incarnation: self.incarnation,
                instance,
                at_ns: net.now_ns(),
            };
            let accepted = &mut book.entries[number].accepted;
            let manner = match self.manner {
                Manner::Moody => {
                    dice.pick(&[Manner::Accept, Manner::Overloaded, Manner::Unavailable])
                }
                manner => manner,
            };
            conn.mute |= manner == Manner::Silent;
            if conn.mute {
                continue;
            }
            match manner {
                Manner::Accept | Manner::Slow | Manner::Late | Manner::Deaf => {
                    conn.out.extend_from_slice(&reply_frame::ACCEPTED);
                    accepted.push(accepts);
                    if let Some(home) = relayed {
                        let by = (self.number, self.incarnation);
                        self.answers.push(Answer::to(number, home, by, book, dice));
                    }
                }
                Manner::Overloaded => reply_frame::write_overloaded(&mut conn.out),
                Manner::Unavailable => reply_frame::write_unknown_endpoint("x", &mut conn.out),
                Manner::Babble => {
                    let text = "x".repeat(dice.of(1..5000));
                    let start = dice.pick(&["Server unavailable:", "Read error: ", "x"]);
                    reply_frame::write(&[start, &text], &mut conn.out);
                }
                Manner::Silent | Manner::Moody => {}
            }
        }
        conn.inbox.drain(..at);
    }
}
