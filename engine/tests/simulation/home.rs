//! Where callers are called home.

use std::net::SocketAddr;

use corelane_codec::call_home::{StreamMessage, classify};
use corelane_codec::two_part;
use corelane_engine::ring::sim::{ListenerId, Net, PeerId, PeerState};

use crate::book::Book;
use crate::dice::Dice;
use crate::heard::Ear;

pub struct Home {
    listener: ListenerId,
    calls: Vec<Call>,
    /// Calls of a router that relays.
    ears: Vec<Ear>,
    /// Calls that ended before their message was whole.
    pub cut: usize,
}

struct Call {
    peer: PeerId,
    bytes: Vec<u8>,
    /// The caller has read everything and does not hang up.
    lingers: bool,
}

impl Home {
    pub fn address() -> SocketAddr {
        "10.2.0.1:9".parse().unwrap()
    }

    /// A caller who has left listens here no more.
    pub fn gone() -> SocketAddr {
        "10.2.0.2:9".parse().unwrap()
    }

    pub fn open(net: &Net) -> Home {
        Home {
            listener: net.peer_listen(Home::address()),
            calls: Vec::new(),
            ears: Vec::new(),
            cut: 0,
        }
    }

    /// Whether no call is under way.
    pub fn is_quiet(&self) -> bool {
        self.calls.is_empty() && self.ears.is_empty()
    }

    pub fn step(&mut self, net: &Net, book: &mut Book, dice: &mut Dice) -> bool {
        let mut moved = false;
        while let Some(peer) = net.peer_accept(self.listener) {
            if book.relayed {
                self.ears.push(Ear::of(peer, dice));
                continue;
            }
            self.calls.push(Call {
                peer,
                bytes: Vec::new(),
                lingers: false,
            });
        }
        self.ears.retain_mut(|ear| {
            let goes_on = ear.step(net, book);
            moved |= ear.moved;
            goes_on
        });
        let cut = &mut self.cut;
        self.calls.retain_mut(|call| {
            let read = net.peer_read(call.peer, usize::MAX);
            moved |= !read.is_empty();
            call.bytes.extend(read);
            if !call.lingers && told(&call.bytes, book) {
                if dice.happens(900) {
                    net.peer_close(call.peer);
                    return false;
                }
                call.lingers = true;
            }
            if net.peer_state(call.peer) == PeerState::Open {
                return true;
            }
            *cut += usize::from(!call.lingers);
            net.peer_close(call.peer);
            false
        });
        moved
    }
}

/// Whether a call is complete: handshake, error prologue and sentinel; notes whom it was for.
fn told(bytes: &[u8], book: &mut Book) -> bool {
    let mut rest = bytes;
    let mut number = None;
    let mut failed = false;
    while let Some(message) = two_part::decode(rest, None).frame() {
        match (classify(rest, &message), number, failed) {
            (StreamMessage::Handshake(handshake), None, false) => {
                let subject = handshake.subject.to_cow();
                let digits = subject.strip_prefix("subject-").expect("a subject of ours");
                number = Some(digits.parse::<usize>().unwrap());
            }
            (StreamMessage::Prologue(prologue), Some(_), false) => {
                assert!(!prologue.is_ok() && prologue.typed_error.is_some());
                failed = true;
            }
            (StreamMessage::Sentinel, Some(number), true) => {
                assert_eq!(rest.len(), message.frame_bytes(), "bytes after a sentinel");
                book.entries[number].told += 1;
                return true;
            }
            other => panic!("called home with {other:?}"),
        }
        rest = &rest[message.frame_bytes()..];
    }
    false
}
