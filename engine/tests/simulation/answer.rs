//! Responses of fake workers that call a relaying router home: whole ones, and all that can go
//! wrong with one.

use std::net::SocketAddr;

use corelane_codec::call_home::{
    FINAL_MARKER_JSON_FRAME, PROLOGUE_OK_FRAME, SENTINEL_FRAME, StreamMessage, classify,
    write_handshake, write_prologue_error,
};
use corelane_codec::control_message::{PayloadCodec, StreamType};
use corelane_codec::error::DynamoError;
use corelane_codec::{item, two_part};
use corelane_engine::ring::sim::{Net, PeerId, PeerState};

use crate::book::Book;
use crate::dice::Dice;

/// How a response goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    Whole,
    /// Never calls home.
    Silent,
    /// Calls, and goes before a prologue.
    HangsUp,
    /// An error that another instance may do better with.
    GivesUp,
    /// An error that is the request's own fault.
    Refuses,
    /// Something in the prologue's place that is none.
    Babbles,
    /// Ends after some items without saying so.
    Breaks,
    /// The same, with a reset.
    Resets,
    /// Says what it may not after some items.
    Violates,
    /// Ends inside an item.
    Halves,
    /// Says nothing more after some items.
    Stalls,
    /// A sentinel after some items, and no final marker.
    NoFinal,
}

const WAYS: [Way; 11] = [
    Way::Silent,
    Way::HangsUp,
    Way::GivesUp,
    Way::Refuses,
    Way::Babbles,
    Way::Breaks,
    Way::Resets,
    Way::Violates,
    Way::Halves,
    Way::Stalls,
    Way::NoFinal,
];

/// What a worker meant to respond.
#[derive(Clone, Copy, Debug)]
pub struct Attempt {
    pub number: usize,
    pub way: Way,
    pub items: usize,
    /// The worker, and which of its lives.
    pub by: (usize, usize),
}

/// One response on its way.
pub struct Answer {
    home: SocketAddr,
    way: Way,
    peer: Option<PeerId>,
    out: Vec<u8>,
    said: usize,
    inbox: Vec<u8>,
    /// Steps before it begins.
    pause: usize,
    crumb_bytes: usize,
    pub moved: bool,
}

impl Answer {
    /// Draws one, to request `number`, which calls `home` with its ticket.
    pub fn to(
        number: usize,
        (home, ticket): (SocketAddr, String),
        by: (usize, usize),
        book: &mut Book,
        dice: &mut Dice,
    ) -> Answer {
        let way = match dice.happens(book.bad_answers) {
            false => Way::Whole,
            true => dice.pick(&WAYS),
        };
        let items = dice.pick(&[0, 1, 1, 2, 5, 20]);
        let attempt = book.attempts.len();
        book.attempts.push(Attempt {
            number,
            way,
            items,
            by,
        });
        let mut out = Vec::new();
        write_handshake(&ticket, StreamType::Response, &mut out);
        script(&mut out, (number, attempt), way, items, dice);
        Answer {
            home,
            way,
            peer: None,
            out,
            said: 0,
            inbox: Vec::new(),
            pause: dice.pick(&[0, 0, 1, 5, 30]),
            crumb_bytes: dice.pick(&[1 << 20, 1 << 20, 100, 700]),
            moved: false,
        }
    }

    /// Its process dies.
    pub fn die(&self, net: &Net) {
        if let Some(peer) = self.peer {
            net.peer_reset(peer);
        }
    }

    /// Answers whether it goes on.
    pub fn step(&mut self, net: &Net) -> bool {
        self.moved = false;
        if self.way == Way::Silent {
            return false;
        }
        if self.pause > 0 {
            self.pause -= 1;
            self.moved = true;
            return true;
        }
        let peer = match self.peer {
            Some(peer) => peer,
            None => match net.peer_connect(self.home) {
                Some(peer) => *self.peer.insert(peer),
                None => return false,
            },
        };
        let until = self.out.len().min(self.said + self.crumb_bytes);
        let sent = net.peer_write(peer, &self.out[self.said..until]);
        self.said += sent;
        let heard = net.peer_read(peer, usize::MAX);
        self.moved |= sent + heard.len() > 0;
        self.inbox.extend(heard);
        if self.is_told_to_end() || net.peer_state(peer) == PeerState::Reset {
            net.peer_close(peer);
            return false;
        }
        if self.said < self.out.len() {
            return true;
        }
        match self.way {
            Way::HangsUp | Way::Breaks | Way::Halves => net.peer_close(peer),
            Way::Resets => net.peer_reset(peer),
            // After a sentinel the other end closes.
            _ if net.peer_state(peer) == PeerState::Open => return true,
            _ => net.peer_close(peer),
        }
        self.moved = true;
        false
    }

    /// Stop and kill end it, without a word.
    fn is_told_to_end(&self) -> bool {
        let message = two_part::decode(&self.inbox, None).frame();
        message.is_some_and(|message| match classify(&self.inbox, &message) {
            StreamMessage::Stop | StreamMessage::Kill => true,
            other => panic!("a worker was told {other:?}"),
        })
    }
}

/// What is said after the handshake.
fn script(
    out: &mut Vec<u8>,
    (number, attempt): (usize, usize),
    way: Way,
    items: usize,
    dice: &mut Dice,
) {
    let error = match way {
        Way::HangsUp => return,
        Way::GivesUp => DynamoError::engine_shutdown("going down"),
        Way::Refuses => DynamoError::invalid_argument("too long"),
        Way::Babbles => {
            let other = [&b"[]"[..], b"\"sentinel\"", b"{"][dice.of(0..3)];
            return two_part::write(other, b"", out);
        }
        _ => {
            out.extend(PROLOGUE_OK_FRAME);
            for index in 0..items {
                let text = "x".repeat(dice.pick(&[0, 0, 10, 3000]));
                let data = format!("{{\"data\":[{number},{attempt},{index},\"{text}\"]}}");
                item::write_frame(data.as_bytes(), PayloadCodec::Json, out);
            }
            return end(out, way);
        }
    };
    write_prologue_error(error.text(), Some(&error.to_json()), out);
    out.extend(SENTINEL_FRAME);
}

fn end(out: &mut Vec<u8>, way: Way) {
    match way {
        Way::Whole => {
            out.extend(FINAL_MARKER_JSON_FRAME);
            out.extend(SENTINEL_FRAME);
        }
        Way::NoFinal => out.extend(SENTINEL_FRAME),
        Way::Violates => two_part::write(b"\"what\"", b"", out),
        Way::Halves => {
            item::write_frame(b"{\"data\":\"half\"}", PayloadCodec::Json, out);
            out.truncate(out.len() - 9);
        }
        _ => {}
    }
}
