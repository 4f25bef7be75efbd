//! The rows of spec/events-discovery.md §3.2, §3.3 and §3.5, seen by a subscriber: each comes on
//! the wire of a publisher made by hand, with a good event behind it. The codec's own tests hold
//! the same rows byte by byte.

use std::io::Write;

use corelane::component::{Event, EventsError, Losses, MemoryStore};
use corelane_codec::event::frame;

use crate::lab::{Publisher, envelope, message, multipart, options, plane, run, scope};

/// What the subscriber of topic `t` is given for these bytes of publisher 5, and after that an
/// event with number 100, and what it has missed.
fn given(bytes: Vec<u8>) -> (Vec<Result<Event, EventsError>>, Losses) {
    let mut came = Vec::new();
    let mut losses = Losses::default();
    run(async {
        let (events, discovery) = plane(&MemoryStore::default(), options());
        let publisher = Publisher::new();
        let record = publisher.record(&scope(), "t", 5);
        discovery.register(record).await.unwrap();
        let mut subscriber = events.subscriber(&scope(), "t").await.unwrap();
        let (_publisher, mut stream) = publisher.accepted("t").await;
        stream.write_all(&bytes).unwrap();
        stream
            .write_all(&message("t", 5, 100, &envelope(5, 100, "t")))
            .unwrap();
        loop {
            let next = subscriber.next().await.unwrap();
            if next.as_ref().is_ok_and(|event| event.sequence == 100) {
                break;
            }
            came.push(next);
        }
        losses = subscriber.losses();
    });
    (came, losses)
}

/// What it is given for one message with this envelope.
fn given_envelope(envelope: &[u8]) -> (Vec<Result<Event, EventsError>>, Losses) {
    given(message("t", 5, 1, envelope))
}

#[track_caller]
fn is_event(given: (Vec<Result<Event, EventsError>>, Losses)) {
    let [Ok(event)] = given.0.as_slice() else {
        panic!("{given:?}");
    };
    assert_eq!(
        (event.publisher_id, event.sequence, &event.payload[..]),
        (5, 1, &b"p"[..])
    );
}

/// §3.2, table of keys, rows 1 to 5: `publisher_id`, `sequence`, `published_at`, `topic`,
/// `payload`, in this order.
#[test]
fn keys_in_order() {
    let bytes = b"\x85\xacpublisher_id\x05\xa8sequence\x01\xacpublished_at\x02\xa5topic\xa1t\
                  \xa7payload\xc4\x01p";
    assert_eq!(
        given_envelope(bytes).0[0].as_ref().unwrap().published_at_ms,
        2
    );
    is_event(given_envelope(bytes));
}

/// §3.2, table of tolerance, row 1: keys in another order, unknown extra keys.
#[test]
fn keys_in_another_order_and_unknown_ones() {
    let bytes = b"\x86\xa7payload\xc4\x01p\xa5later\x92\x01\xc0\xa5topic\xa1t\xa8sequence\x01\
                  \xacpublished_at\x02\xacpublisher_id\x05";
    is_event(given_envelope(bytes));
}

/// §3.2, table of tolerance, row 2: an array of five elements.
#[test]
fn an_array() {
    is_event(given_envelope(b"\x95\x05\x01\x02\xa1t\xc4\x01p"));
}

/// §3.2, table of tolerance, row 3: payload as text.
#[test]
fn payload_as_text() {
    is_event(given_envelope(b"\x95\x05\x01\x02\xa1t\xa1p"));
}

/// §3.2, table of tolerance, row 4: payload as an array of integers is rejected.
#[test]
fn payload_as_integers() {
    let (came, losses) = given_envelope(b"\x95\x05\x01\x02\xa1t\x91\x70");
    assert!(
        matches!(came.as_slice(), [Err(EventsError::Envelope(_))]),
        "{came:?}"
    );
    assert_eq!(losses.unreadable, 1);
}

/// §3.2, table of tolerance, row 5: JSON is an error item, and the stream goes on.
#[test]
fn json() {
    let (came, losses) = given_envelope(br#"{"publisher_id":5,"sequence":1}"#);
    assert!(
        matches!(came.as_slice(), [Err(EventsError::Envelope(_))]),
        "{came:?}"
    );
    assert_eq!(losses.unreadable, 1);
}

/// §3.2, table of tolerance, row 6: another topic in the envelope is dropped in silence.
#[test]
fn another_topic() {
    let (came, losses) = given_envelope(&envelope(5, 1, "t2"));
    assert!(came.is_empty(), "{came:?}");
    assert_eq!(losses.unreadable, 1);
}

/// §3.2, table of tolerance, row 7: repeated numbers are delivered again.
#[test]
fn repeated_numbers() {
    let twice = message("t", 5, 1, &envelope(5, 1, "t")).repeat(2);
    let (came, losses) = given(twice);
    assert!(
        came.len() == 2 && came.iter().all(Result::is_ok),
        "{came:?}"
    );
    assert_eq!((losses.duplicate, losses.lost), (1, 98));
}

fn framed(frame: &[u8]) -> Vec<u8> {
    let (id, number) = (5_u64.to_be_bytes(), 1_u64.to_be_bytes());
    multipart(&[b"t", &id, &number, frame])
}

fn good_frame() -> Vec<u8> {
    let mut out = Vec::new();
    frame::write(&envelope(5, 1, "t"), &mut out).unwrap();
    out
}

/// Nothing was given, as if it had not come; the numbers are counted from the next event on.
#[track_caller]
fn is_dropped(bytes: Vec<u8>) {
    let (came, losses) = given(bytes);
    assert!(came.is_empty(), "{came:?}");
    assert_eq!((losses.unreadable, losses.lost), (0, 0));
}

/// §3.3, table, row 1 (offset 0): another version than 1 is dropped.
#[test]
fn the_frames_version() {
    let mut bytes = good_frame();
    is_event(given(framed(&bytes)));
    for version in [0, 2, 255] {
        bytes[0] = version;
        is_dropped(framed(&bytes));
    }
}

/// §3.3, table, row 2 (offset 1): a length that is more than there is, as one in little-endian, is
/// dropped.
#[test]
fn the_frames_length() {
    let mut bytes = good_frame();
    bytes[1..5].reverse();
    is_dropped(framed(&bytes));
    is_dropped(framed(&bytes[..4]));
    let good = good_frame();
    is_dropped(framed(&good[..good.len() - 1]));
}

/// §3.3, table, row 3 (offset 5): one envelope; bytes behind it are ignored.
#[test]
fn the_frames_payload() {
    let mut bytes = good_frame();
    bytes.extend_from_slice(b"more");
    is_event(given(framed(&bytes)));
}

/// §3.5, table of parts, row 1 (part 0): the bare topic. ZMQ compares only its beginning, and so
/// does Dynamo's usual subscriber; the envelope decides.
#[test]
fn part_0_is_the_topic() {
    is_event(given(message("t2", 5, 1, &envelope(5, 1, "t"))));
    let (came, _) = given(message("t2", 5, 1, &envelope(5, 1, "t2")));
    assert!(came.is_empty(), "{came:?}");
}

/// §3.5, table of parts, rows 2 and 3 (parts 1 and 2): 8 bytes each, or the message is dropped;
/// contradictions are accepted.
#[test]
fn parts_1_and_2_are_numbers() {
    let (id, number, frame) = (5_u64.to_be_bytes(), 1_u64.to_be_bytes(), good_frame());
    is_dropped(multipart(&[b"t", &id[1..], &number, &frame]));
    is_dropped(multipart(&[b"t", &id, &number[1..], &frame]));
    is_dropped(multipart(&[b"t", &[id, id].concat(), &number, &frame]));
    is_event(given(message("t", 6, 7, &envelope(5, 1, "t"))));
}

/// §3.5, table of parts, row 4 (part 3): the frame; and exactly four parts.
#[test]
fn part_3_is_the_frame() {
    let (id, number, frame) = (5_u64.to_be_bytes(), 1_u64.to_be_bytes(), good_frame());
    is_dropped(multipart(&[b"t", &id, &number]));
    is_dropped(multipart(&[b"t", &id, &number, &frame, b""]));
    is_dropped(multipart(&[b"t", &id, &number, b""]));
    is_event(given(multipart(&[b"t", &id, &number, &frame])));
}

/// §3.5, subscriber, item 5 and Q6: the socket goes with its record; a record that is changed in
/// place is ignored.
#[test]
fn the_record_decides_who_is_dialled() {
    run(async {
        let (events, discovery) = plane(&MemoryStore::default(), options());
        let (publisher, moved) = (Publisher::new(), Publisher::new());
        let record = publisher.record(&scope(), "t", 5);
        let name = record.name().to_owned();
        discovery.register(record).await.unwrap();
        let mut subscriber = events.subscriber(&scope(), "t").await.unwrap();
        let (publisher, mut stream) = publisher.accepted("t").await;
        discovery
            .replace(moved.record(&scope(), "t", 5))
            .await
            .unwrap();
        stream
            .write_all(&message("t", 5, 0, &envelope(5, 0, "t")))
            .unwrap();
        assert_eq!(subscriber.next().await.unwrap().unwrap().sequence, 0);
        // It comes again when the connection was lost: to the same address.
        drop(stream);
        let (_publisher, mut stream) = publisher.accepted("t").await;
        stream
            .write_all(&message("t", 5, 1, &envelope(5, 1, "t")))
            .unwrap();
        assert_eq!(subscriber.next().await.unwrap().unwrap().sequence, 1);
        discovery.unregister(&name).await;
        let ended = move || {
            let mut rest = Vec::new();
            std::io::Read::read_to_end(&mut stream, &mut rest)
        };
        tokio::task::spawn_blocking(ended).await.unwrap().unwrap();
    });
}
