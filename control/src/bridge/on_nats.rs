//! The side of a bridge that is a NATS server: bare envelopes on Dynamo's subjects, with a header
//! where an event has been elsewhere (spec/events-discovery.md §3.4).

use std::rc::Rc;
use std::time::{Duration, Instant};

use async_nats::HeaderMap;
use async_nats::connection::State;
use bytes::Bytes;
use corelane_codec::event::origin::{HEADER, Origin};
use futures_util::StreamExt;
use tokio::time::{interval, sleep};

use super::members::{EVERY, SUBJECT, Word};
use super::outbox::Parcel;
use super::{Bridge, add};
use crate::nats::Nats;

/// While there is no connection it is looked for again after this.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Longest subject that goes to NATS.
const SUBJECT_BYTES_MAX: usize = 1024;

/// Takes what is published on NATS. Gaps in the publishers' numbers tell what was missed while
/// there was no connection, or while we did not keep up.
pub(super) async fn take(bridge: Rc<Bridge>, at: usize) {
    let Some(nats) = &bridge.nats else {
        return;
    };
    let subject = format!("{}>", bridge.prefix);
    loop {
        match nats.client().subscribe(subject.clone()).await {
            Ok(mut messages) => {
                while let Some(message) = messages.next().await {
                    let origin = origin(message.headers.as_ref());
                    let subject = Bytes::copy_from_slice(message.subject.as_bytes());
                    bridge.heard(at, subject, message.payload, origin);
                }
            }
            Err(error) => tracing::warn!(%error, "events: no subscription on NATS"),
        }
        sleep(EVERY).await;
    }
}

fn origin(headers: Option<&HeaderMap>) -> Origin {
    let mark = headers.and_then(|headers| headers.get(HEADER));
    mark.map_or_else(Origin::default, |mark| Origin::parse(mark.as_str()))
}

/// Publishes what waits. Without a connection it waits on, in its bounded outbox.
pub(super) async fn give(bridge: Rc<Bridge>, at: usize) {
    let Some(nats) = &bridge.nats else {
        return;
    };
    let place = &bridge.places[at];
    loop {
        let parcel = place.outbox.take().await;
        let Some(subject) = subject(&parcel.subject) else {
            add(&place.counts.dropped_unfit, 1);
            continue;
        };
        connected(nats).await;
        if parcel.envelope.len() + headroom(&parcel) > nats.message_bytes_max() {
            add(&place.counts.dropped_too_large, 1);
            continue;
        }
        let mut headers = HeaderMap::new();
        headers.insert(HEADER, parcel.origin.to_string());
        let sent = nats
            .client()
            .publish_with_headers(subject, headers, parcel.envelope);
        match sent.await {
            Ok(()) => add(&place.counts.passed, 1),
            Err(_) => add(&place.counts.dropped_full, 1),
        }
    }
}

/// What the header takes; the server counts it.
fn headroom(parcel: &Parcel) -> usize {
    const LINES: usize = "NATS/1.0\r\n: \r\n\r\n".len();
    LINES + HEADER.len() + parcel.origin.to_string().len()
}

async fn connected(nats: &Nats) {
    while nats.client().connection_state() != State::Connected {
        sleep(LOOK_EVERY).await;
    }
}

/// A subject as NATS takes it: segments of Dynamo's alphabet, none of them empty.
fn subject(bytes: &[u8]) -> Option<String> {
    let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"_-%".contains(byte);
    let fits = |segment: &[u8]| !segment.is_empty() && segment.iter().all(is_plain);
    let fit = bytes.len() <= SUBJECT_BYTES_MAX && bytes.split(|byte| *byte == b'.').all(fits);
    let text = std::str::from_utf8(bytes).ok().filter(|_| fit)?;
    Some(text.to_owned())
}

/// Says who we are, and hears who else is there.
pub(super) async fn meet(bridge: Rc<Bridge>) {
    let Some(nats) = &bridge.nats else {
        return;
    };
    let mut heard = None;
    let mut beat = interval(EVERY);
    loop {
        if heard.is_none() {
            heard = nats.client().subscribe(SUBJECT).await.ok();
        }
        let word = async {
            match &mut heard {
                Some(heard) => heard.next().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = beat.tick() => {
                let gone = bridge.course.borrow_mut().members.tick(Instant::now());
                for id in gone {
                    tracing::warn!(bridge = format!("{id:x}"), "events: a bridge is silent");
                }
                say(&bridge, nats, false).await;
            }
            message = word => match message {
                Some(message) => listen(&bridge, &message.payload),
                None => heard = None,
            }
        }
    }
}

fn listen(bridge: &Bridge, payload: &[u8]) {
    let Ok(word) = serde_json::from_slice::<Word>(payload) else {
        return;
    };
    let news = bridge
        .course
        .borrow_mut()
        .members
        .heard(&word, Instant::now());
    if let Some(news) = news {
        tracing::info!(
            bridge = format!("{:x}", word.bridge),
            "events: a bridge {news}"
        );
    }
}

async fn say(bridge: &Bridge, nats: &Nats, leaving: bool) {
    if nats.client().connection_state() != State::Connected {
        return;
    }
    let word = bridge.course.borrow().members.word(leaving);
    // Numbers and switches always have a JSON form.
    let payload = serde_json::to_vec(&word).unwrap_or_default();
    if let Err(error) = nats.client().publish(SUBJECT, payload.into()).await {
        tracing::debug!(%error, "events: the other bridges are not told");
    }
}

/// The last word.
pub(super) async fn leave(bridge: &Bridge) {
    if let Some(nats) = &bridge.nats {
        say(bridge, nats, true).await;
        if nats.client().connection_state() == State::Connected {
            nats.close().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_subjects_that_nats_takes_go_there() {
        let ours = b"namespace.demo.component.a%2Fb.kv-events";
        assert_eq!(subject(ours).as_deref(), std::str::from_utf8(ours).ok());
        for other in [
            &b""[..],
            b"namespace.",
            b"a..b",
            b"a.*",
            b"a.>",
            b"a b",
            b"a\r\nPUB",
            b"\xff",
        ] {
            assert_eq!(subject(other), None);
        }
        assert_eq!(subject(&[b'a'; SUBJECT_BYTES_MAX + 1]), None);
    }

    #[test]
    fn headers_that_are_no_marks_are_none() {
        assert_eq!(origin(None), Origin::default());
        let mut headers = HeaderMap::new();
        headers.insert(HEADER, "1f,x");
        assert_eq!(origin(Some(&headers)).sides(), [0x1f]);
    }
}
