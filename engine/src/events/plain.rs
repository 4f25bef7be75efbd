//! Peers without ZMTP: a hello, its answer, and then frames (`corelane_codec::event::hello` has
//! the layout).
//!
//! ```text
//! publisher  --hello: its scope-->     <--answer--    --frame--frame--frame-->
//! subscriber --hello: its prefixes-->  <--answer--    <--frame--frame--frame--
//! ```
//!
//! A frame says its topic, its publisher and its number in its envelope, which is looked at where
//! it lies; the subject is the session's scope and that topic.

use corelane_codec::event::hello::{self, Answer, Role, Verdict};
use corelane_codec::event::{Envelope, EnvelopeFront, encode_segment, frame};
use corelane_codec::zmtp::Event;
use corelane_codec::{Bad, Decoded};

use super::plane::Plane;
use super::session::{Session, Source};
use super::{Side, take};
use crate::ring::Ring;

/// Bytes of an envelope that are looked at when its payload lies in several pieces: more than any
/// writer we know of puts before it.
const FRONT_BYTES: usize = 256;
/// Longest subject.
const SUBJECT_BYTES_MAX: usize = 4096;

/// Largest payload of a frame where an event may have so many bytes.
pub(super) fn payload_bytes_max(event_bytes_max: usize) -> usize {
    event_bytes_max.saturating_sub(frame::PREFIX_BYTES)
}

/// An event that lies whole at the beginning of `bytes`, and its topic.
#[inline]
pub(super) fn decode(bytes: &[u8], max_bytes: usize) -> Option<(Event, &str)> {
    let payload = frame::decode(bytes, payload_bytes_max(max_bytes)).frame()?;
    let end = payload.end;
    let envelope = Envelope::decode(&bytes[payload]).ok()?;
    let (publisher_id, sequence) = (envelope.publisher_id, envelope.sequence);
    Some((event(publisher_id, sequence, end), envelope.topic))
}

fn event(publisher_id: u64, sequence: u64, end: usize) -> Event {
    Event {
        subject_at: 0,
        subject_bytes: 0,
        publisher_id,
        sequence,
        frame_at: 0,
        end,
    }
}

/// The subjects of a publisher: its scope, and behind it the last topic.
#[derive(Debug, Default)]
pub(super) struct Subjects {
    bytes: Vec<u8>,
    scope_bytes: usize,
}

impl Subjects {
    fn new(scope: &[u8]) -> Subjects {
        let mut bytes = scope.to_vec();
        if !bytes.is_empty() {
            bytes.push(b'.');
        }
        let scope_bytes = bytes.len();
        Subjects { bytes, scope_bytes }
    }

    /// The subject of a topic, which is UTF-8.
    #[inline]
    pub(super) fn of(&mut self, topic: &[u8]) -> &[u8] {
        self.bytes.truncate(self.scope_bytes);
        let topic = encode_segment(std::str::from_utf8(topic).unwrap_or_default());
        // A subject that is too long is cut, and then wanted by nobody but those of its beginning.
        let room = SUBJECT_BYTES_MAX - self.scope_bytes.min(SUBJECT_BYTES_MAX);
        let topic = &topic.as_bytes()[..topic.len().min(room)];
        self.bytes.extend_from_slice(topic);
        &self.bytes
    }
}

/// A step of the handshake with what has come. `false`: more is needed, or the session ends.
pub(super) fn shake_hands<R: Ring>(plane: &mut Plane<R>, slot: u32) -> bool {
    let session = &plane.sessions[slot];
    let mut bytes = vec![0; hello::FIXED_BYTES];
    let there = session.incoming.peek(&plane.memory, 0, &mut bytes);
    if let Decoded::Need(whole) = hello::decode_hello(&bytes[..there]) {
        if session.incoming.bytes() < whole {
            return false;
        }
        bytes.resize(whole, 0);
        session.incoming.peek(&plane.memory, 0, &mut bytes);
    }
    let read = hello::decode_hello(&bytes);
    let read = match read {
        Decoded::Frame(read) => read,
        Decoded::Need(_) => return false,
        Decoded::Bad(bad) => {
            return turn_away(plane, slot, Verdict::NotUnderstood, &bad.to_string());
        }
    };
    if let Err((verdict, why)) = judge(plane, &read) {
        return turn_away(plane, slot, verdict, &why);
    }
    let session = &mut plane.sessions[slot];
    session.incoming.advance(&mut plane.memory, read.bytes());
    (session.side, session.frame_bytes_max) = match read.role {
        Role::Publisher => (Side::Publisher, 0),
        Role::Subscriber => (Side::Subscriber, frame_bytes_max(read.payload_bytes_max)),
    };
    answer(plane, slot, Verdict::Accepted, "");
    plane.opened(slot);
    match read.role {
        Role::Publisher => {
            let scope = read.prefixes().next().unwrap_or_default();
            plane.sessions[slot].source.subjects = Subjects::new(scope);
        }
        Role::Subscriber => {
            for prefix in read.prefixes() {
                if !plane.wish(slot, true, prefix) {
                    return false;
                }
            }
        }
    }
    true
}

fn frame_bytes_max(payload_bytes_max: u32) -> usize {
    match payload_bytes_max {
        0 => usize::MAX,
        bytes => frame::PREFIX_BYTES + bytes as usize,
    }
}

/// Whether what a hello asks for can be had.
fn judge<R: Ring>(plane: &Plane<R>, read: &hello::Hello<'_>) -> Result<(), (Verdict, String)> {
    let max = payload_bytes_max(plane.config.event_bytes_max as usize);
    let bytes = read.payload_bytes_max;
    if read.role == Role::Publisher && bytes as usize > max {
        let why = format!("frames of {bytes} bytes are announced; {max} are taken");
        return Err((Verdict::TooLarge, why));
    }
    let room = plane.config.subscriptions_max as usize - plane.subscriptions.len();
    let wanted = read.prefixes().count();
    if read.role == Role::Subscriber && wanted > room {
        let why = format!("{wanted} prefixes; there is room for {room}");
        return Err((Verdict::TooManyPrefixes, why));
    }
    Ok(())
}

fn answer<R: Ring>(plane: &mut Plane<R>, slot: u32, verdict: Verdict, text: &str) {
    let max = payload_bytes_max(plane.config.event_bytes_max as usize);
    let mut bytes = Vec::new();
    let answer = Answer {
        verdict,
        payload_bytes_max: u32::try_from(max).unwrap_or(u32::MAX),
        queue_events_max: plane.config.queue_events_max,
        text,
    };
    answer.write(&mut bytes);
    plane.push_control(slot, &bytes);
}

/// Tells a peer why it is not served; the session ends when that has been sent.
fn turn_away<R: Ring>(plane: &mut Plane<R>, slot: u32, verdict: Verdict, why: &str) -> bool {
    answer(plane, slot, verdict, why);
    plane.turn_away(slot, why)
}

/// What comes of a peer that is leaving is of no interest.
pub(super) fn ignore<R: Ring>(plane: &mut Plane<R>, slot: u32) {
    let session: &mut Session = &mut plane.sessions[slot];
    session.incoming.clear(&mut plane.memory);
}

/// One step with what does not lie whole in the first slice, or is no event.
pub(super) fn slowly<R: Ring>(plane: &mut Plane<R>, slot: u32, source: &mut Source) -> bool {
    let max_bytes = payload_bytes_max(plane.config.event_bytes_max as usize);
    let mut prefix = [0; frame::PREFIX_BYTES];
    let incoming = &plane.sessions[slot].incoming;
    let there = incoming.peek(&plane.memory, 0, &mut prefix);
    let end = match frame::decode(&prefix[..there], max_bytes) {
        Decoded::Frame(payload) => payload.end,
        Decoded::Need(end) => end,
        Decoded::Bad(bad) => return plane.refuse(slot, &of_stream(bad)),
    };
    if there < prefix.len() || incoming.bytes() < end {
        return false;
    }
    let mut envelope = [0; FRONT_BYTES];
    let payload_bytes = end - frame::PREFIX_BYTES;
    let here = payload_bytes.min(FRONT_BYTES);
    incoming.peek(&plane.memory, frame::PREFIX_BYTES, &mut envelope[..here]);
    match EnvelopeFront::decode(&envelope[..here]) {
        Some(front) if front.bytes <= payload_bytes as u64 => {
            let event = event(front.publisher_id, front.sequence, end);
            pass(plane, slot, source, front.topic, &event);
        }
        _ => in_any_form(plane, slot, source, end),
    }
    let session = &mut plane.sessions[slot];
    session.incoming.advance(&mut plane.memory, end);
    true
}

/// An event in pieces whose envelope is written in another way, or is none: joined to be read.
fn in_any_form<R: Ring>(plane: &mut Plane<R>, slot: u32, source: &mut Source, end: usize) {
    let mut bytes = vec![0; end - frame::PREFIX_BYTES];
    let incoming = &plane.sessions[slot].incoming;
    incoming.peek(&plane.memory, frame::PREFIX_BYTES, &mut bytes);
    match Envelope::decode(&bytes) {
        Ok(envelope) => {
            let event = event(envelope.publisher_id, envelope.sequence, end);
            pass(plane, slot, source, envelope.topic, &event);
        }
        Err(error) => take::bad_event(plane, slot, &error),
    }
}

fn pass<R: Ring>(plane: &mut Plane<R>, slot: u32, source: &mut Source, topic: &str, event: &Event) {
    let mut subjects = std::mem::take(&mut source.subjects);
    take::pass_pieces(plane, slot, source, subjects.of(topic.as_bytes()), event);
    source.subjects = subjects;
}

/// A stream of frames cannot go on after one that is none.
fn of_stream(bad: Bad) -> String {
    format!("no frame where one should begin: {bad}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subjects_are_scopes_and_encoded_topics() {
        let mut subjects = Subjects::new(b"namespace.demo");
        assert_eq!(subjects.of(b"kv-events"), b"namespace.demo.kv-events");
        assert_eq!(subjects.of(b"a.b"), b"namespace.demo.a%2Eb");
        assert_eq!(Subjects::new(b"").of(b"kv_metrics"), b"kv_metrics");
        let long = "x".repeat(2 * SUBJECT_BYTES_MAX);
        assert_eq!(subjects.of(long.as_bytes()).len(), SUBJECT_BYTES_MAX);
    }

    #[test]
    fn an_event_is_read_where_it_lies() {
        let envelope = Envelope {
            publisher_id: 7,
            sequence: 3,
            published_at_ms: 1,
            topic: "kv-events",
            payload: b"xyz",
        };
        let mut bytes = vec![];
        corelane_codec::event::multipart::write_frame(&envelope, &mut bytes).unwrap();
        let end = bytes.len();
        bytes.push(1);
        let (event, topic) = decode(&bytes, 1 << 20).unwrap();
        assert_eq!((event.publisher_id, event.sequence, event.end), (7, 3, end));
        assert_eq!(topic, "kv-events");
        assert!(decode(&bytes[..end - 1], 1 << 20).is_none());
        assert!(decode(&bytes, end - 1).is_none());
    }
}
