//! Every request of a scenario, and what has become of it.

use std::net::SocketAddr;

use corelane_codec::control_message::{self, TcpConnectionInfo};
use corelane_codec::reply_frame::Reply;
use corelane_codec::{request_frame, two_part};

use crate::answer::Attempt;
use crate::common::{envelope, frame_with};
use crate::dice::Dice;
use crate::heard::Heard;
use crate::home::Home;

/// What a request is, and so what may become of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// For a route.
    Routed,
    /// Larger than the router allows.
    TooLarge,
    /// For an endpoint that nobody offers.
    Unknown,
    /// With a path that is no text.
    BadPath,
}

/// A worker took the request.
#[derive(Clone, Copy, Debug)]
pub struct Acceptance {
    pub worker: usize,
    pub incarnation: usize,
    pub instance: u64,
    pub at_ns: u64,
}

#[derive(Debug)]
pub struct Entry {
    pub kind: Kind,
    /// The payload is an envelope.
    has_envelope: bool,
    /// The envelope says where the caller listens, and he does.
    pub can_be_told: bool,
    /// Bytes of the frame's path, its length included.
    path_bytes: usize,
    pub frame: Vec<u8>,
    pub accepted: Vec<Acceptance>,
    pub told: usize,
    pub reply: Option<String>,
    /// What its caller has heard of a relayed response.
    pub heard: Heard,
}

#[derive(Default)]
pub struct Book {
    pub entries: Vec<Entry>,
    /// Responses pass through the router.
    pub relayed: bool,
    /// How many of 1000 responses do not go well.
    pub bad_answers: usize,
    /// What workers have begun to respond.
    pub attempts: Vec<Attempt>,
}

/// Frames above this are too large for the router of a scenario.
pub const MESSAGE_BYTES_MAX: usize = 100_000;

impl Book {
    /// Writes a request down and answers its number.
    pub fn write(&mut self, dice: &mut Dice, path: &str, kind: Kind, body_bytes: usize) -> usize {
        let number = self.entries.len();
        let unknown = format!("{:x}/sim/nobody/{number}", dice.of(0..100));
        let path: &[u8] = match kind {
            Kind::Routed | Kind::TooLarge => path.as_bytes(),
            Kind::Unknown => unknown.as_bytes(),
            Kind::BadPath => b"0/\xff\xfe/x",
        };
        let headers = match dice.of(0..10) {
            0 => String::new(),
            1 => "no json".into(),
            at => format!(r#"{{"request-id":"{number}","x-test":"{}"}}"#, at % 5),
        };
        let body_bytes = match kind {
            Kind::TooLarge => MESSAGE_BYTES_MAX + dice.of(0..2000),
            _ => body_bytes,
        };
        let mut body = dice.bytes(body_bytes);
        let has_envelope = !dice.happens(50);
        let has_home = !dice.happens(50);
        let payload = if has_envelope {
            let home = if has_home {
                Home::address()
            } else {
                Home::gone()
            };
            body.extend_from_slice(&(number as u32).to_be_bytes());
            envelope(&home, &format!("subject-{number}"), &body)
        } else {
            body.extend_from_slice(&(number as u32).to_be_bytes());
            body
        };
        let frame = match std::str::from_utf8(path) {
            Ok(path) => frame_with(path, headers.as_bytes(), &payload),
            Err(_) => {
                let mut frame = Vec::new();
                request_frame::write_frame(path, headers.as_bytes(), &payload, &mut frame).unwrap();
                frame
            }
        };
        self.entries.push(Entry {
            kind,
            has_envelope,
            can_be_told: has_envelope && has_home,
            path_bytes: 2 + path.len(),
            frame,
            accepted: Vec::new(),
            told: 0,
            reply: None,
            heard: Heard::default(),
        });
        number
    }

    /// The request that a worker got as `frame`, whose path has `path_bytes` bytes with its length:
    /// nothing but the path may have changed.
    pub fn recognize(&self, frame: &[u8], path_bytes: usize) -> usize {
        let tail = frame.len() - 4;
        let number = u32::from_be_bytes(frame[tail..].try_into().unwrap()) as usize;
        let entry = self.entries.get(number);
        let entry = entry.unwrap_or_else(|| panic!("a worker got what nobody sent: {number}"));
        assert_eq!(
            entry.kind,
            Kind::Routed,
            "request {number} reached a worker"
        );
        assert!(
            entry.frame[entry.path_bytes..] == frame[path_bytes..],
            "request {number} was changed on its way"
        );
        number
    }

    /// The same of a payload whose envelope names the router: its body may not have changed. Also
    /// where the worker calls home, and with which ticket.
    pub fn recognize_relayed(&self, payload: &[u8]) -> (usize, (SocketAddr, String)) {
        let parts = two_part::decode(payload, None).frame().unwrap();
        let control = control_message::decode(&payload[parts.header]).unwrap();
        let mut scratch = [0; 1024];
        let info = TcpConnectionInfo::parse(&control.connection_info, &mut scratch).unwrap();
        let ticket = info.subject.to_cow().into_owned();
        let body = &payload[parts.body];
        let number = body[body.len() - 4..].try_into().unwrap();
        let number = u32::from_be_bytes(number) as usize;
        let entry = &self.entries[number];
        assert_eq!(entry.kind, Kind::Routed, "{number} reached a worker");
        assert!(entry.frame.ends_with(body), "{number} was changed");
        assert!(ticket != format!("subject-{number}"), "he sees the caller");
        (number, (info.socket_addr().unwrap(), ticket))
    }

    /// A caller got a reply to a request.
    pub fn replied(&mut self, number: usize, text: String) {
        let entry = &mut self.entries[number];
        assert!(entry.reply.is_none(), "request {number}: two replies");
        let is_refusal = Reply::classify(text.as_bytes()).is_refusal();
        let fits = match entry.kind {
            Kind::Routed => text.is_empty() || is_refusal,
            Kind::TooLarge if entry.has_envelope => text.is_empty() || is_refusal,
            Kind::TooLarge | Kind::Unknown | Kind::BadPath => is_refusal,
        };
        assert!(fits, "request {number} ({:?}): reply {text:?}", entry.kind);
        entry.reply = Some(text);
    }
}
