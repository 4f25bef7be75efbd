//! What callers hear of relayed responses, and how they leave.

use corelane_codec::call_home::{KILL_FRAME, STOP_FRAME, StreamMessage, classify};
use corelane_codec::control_message::PayloadCodec;
use corelane_codec::{item, two_part};
use corelane_engine::ring::sim::{Net, PeerId, PeerState};

use crate::answer::Attempt;
use crate::book::Book;
use crate::dice::Dice;

/// How the response to one request has ended at its caller.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// Final marker and sentinel after items alone.
    Whole,
    /// A sentinel, and no final marker.
    NoFinal,
    /// An error among the items.
    ErrorItem,
    /// An error in the prologue.
    Prologue,
    /// The end of the stream before a sentinel.
    Cut,
    /// The caller did not want to hear the end.
    Left,
}

/// What has come of one request.
#[derive(Default, Debug)]
pub struct Heard {
    /// Calls home.
    pub calls: usize,
    begun: bool,
    /// Whose items they are.
    pub attempt: Option<usize>,
    pub items: usize,
    failed: bool,
    is_final: bool,
    pub end: Option<End>,
}

/// How a caller leaves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Leave {
    Stop,
    Kill,
    Reset,
    /// He stays where he is when all is said.
    Linger,
}

/// One call home, at the caller's end.
pub struct Ear {
    peer: PeerId,
    number: Option<usize>,
    bytes: Vec<u8>,
    messages: usize,
    /// After how many messages he leaves.
    leave: Option<(usize, Leave)>,
    stopped: bool,
    lingers: bool,
    /// Steps for which he reads nothing.
    nap: usize,
    crumb_bytes: usize,
    pub moved: bool,
}

impl Ear {
    pub fn of(peer: PeerId, dice: &mut Dice) -> Ear {
        let ways = [Leave::Stop, Leave::Kill, Leave::Reset, Leave::Linger];
        let leave = (dice.pick(&[1, 1, 2, 3, 10]), dice.pick(&ways));
        Ear {
            peer,
            number: None,
            bytes: Vec::new(),
            messages: 0,
            leave: dice.happens(250).then_some(leave),
            stopped: false,
            lingers: false,
            nap: dice.pick(&[0, 0, 0, 40]),
            crumb_bytes: dice.pick(&[1 << 20, 1 << 20, 64, 900]),
            moved: false,
        }
    }

    /// Answers whether it goes on.
    pub fn step(&mut self, net: &Net, book: &mut Book) -> bool {
        self.moved = self.nap > 0;
        if self.nap > 0 {
            self.nap -= 1;
            return true;
        }
        let read = net.peer_read(self.peer, self.crumb_bytes);
        self.moved |= !read.is_empty();
        self.bytes.extend(read);
        while let Some(message) = two_part::decode(&self.bytes, None).frame() {
            let frame: Vec<u8> = self.bytes.drain(..message.frame_bytes()).collect();
            self.hear(&frame, classify(&frame, &message), book);
            self.messages += 1;
            if self.is_over(book) {
                assert!(self.bytes.is_empty(), "bytes after a sentinel");
            }
        }
        if !self.leaves(net, book) {
            return false;
        }
        if self.is_over(book) && !self.lingers {
            net.peer_close(self.peer);
            return false;
        }
        let state = net.peer_state(self.peer);
        let drained = self.moved && self.crumb_bytes < 1 << 20;
        if state == PeerState::Open || drained && state == PeerState::Ended {
            return true;
        }
        self.ended(book, End::Cut);
        net.peer_close(self.peer);
        false
    }

    /// He may leave now. Answers whether he is still there.
    fn leaves(&mut self, net: &Net, book: &mut Book) -> bool {
        let Some((after, how)) = self.leave.filter(|(after, _)| *after <= self.messages) else {
            return true;
        };
        match how {
            Leave::Linger => {
                self.lingers = true;
                return true;
            }
            _ if self.is_over(book) || self.stopped => return true,
            Leave::Stop => {
                net.peer_write(self.peer, &STOP_FRAME);
                self.stopped = true;
                // Before the prologue he says so and goes (spec/request-plane.md §4.6).
                if after > 1 {
                    return true;
                }
                net.peer_close(self.peer);
            }
            Leave::Kill => {
                net.peer_write(self.peer, &KILL_FRAME);
                net.peer_close(self.peer);
            }
            Leave::Reset => net.peer_reset(self.peer),
        }
        self.ended(book, End::Left);
        false
    }

    fn is_over(&self, book: &Book) -> bool {
        let number = self.number.map(|number| &book.entries[number].heard);
        number.is_some_and(|heard| heard.end.is_some())
    }

    fn ended(&self, book: &mut Book, end: End) {
        let Some(number) = self.number else {
            return;
        };
        let end = match (end, self.stopped) {
            (End::Cut, true) => End::Left,
            (end, _) => end,
        };
        book.entries[number].heard.end.get_or_insert(end);
    }

    fn hear(&mut self, frame: &[u8], message: StreamMessage<'_>, book: &mut Book) {
        let Some(number) = self.number else {
            let StreamMessage::Handshake(handshake) = message else {
                panic!("called home with {message:?}");
            };
            let subject = handshake.subject.to_cow();
            let digits = subject.strip_prefix("subject-").expect("a subject of ours");
            let number: usize = digits.parse().unwrap();
            book.entries[number].heard.calls += 1;
            self.number = Some(number);
            return;
        };
        let heard = &mut book.entries[number].heard;
        assert_eq!(heard.end, None, "{number}: {message:?} after the end");
        match message {
            StreamMessage::Prologue(prologue) if !heard.begun => {
                heard.begun = true;
                if !prologue.is_ok() {
                    assert!(prologue.typed_error.is_some(), "{number}");
                    heard.failed = true;
                }
            }
            StreamMessage::Item(body) if heard.begun && !heard.is_final => {
                take(heard, number, &frame[body], &book.attempts);
            }
            StreamMessage::Sentinel if heard.begun => {
                heard.end = Some(match (heard.failed, heard.is_final) {
                    (false, true) => End::Whole,
                    (false, false) => End::NoFinal,
                    (true, true) => End::ErrorItem,
                    (true, false) => End::Prologue,
                });
            }
            other => panic!("{number} heard {other:?} after {heard:?}"),
        }
    }
}

type Data = item::Annotated<(usize, usize, usize, String)>;

/// An item must be the next one of its attempt, and of the attempt that began.
fn take(heard: &mut Heard, number: usize, body: &[u8], attempts: &[Attempt]) {
    let wrapper = item::decode(body, PayloadCodec::Json).unwrap();
    heard.is_final = wrapper.complete_final;
    let Some(data) = wrapper.data else {
        return assert!(heard.is_final);
    };
    assert!(!heard.failed, "{number}: an item after an error");
    let data: Data = item::from_bytes(&body[data], PayloadCodec::Json).unwrap();
    if data.to_error().is_some() {
        heard.failed = true;
        return;
    }
    let (of, attempt, index, _) = data.data.expect("an item of ours");
    assert_eq!((of, index), (number, heard.items), "{number}");
    assert_eq!(*heard.attempt.get_or_insert(attempt), attempt, "{number}");
    assert_eq!(attempts[attempt].number, number);
    heard.items += 1;
}
