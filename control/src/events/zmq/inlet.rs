//! Where a subscriber's events come in.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use corelane_codec::event::{CHANNELS_BUCKET, EventKey, Scope, frame};
use corelane_engine::events::{Command, LocalEvent, Sink};
use tokio::sync::{mpsc, oneshot};
use tokio::task::spawn_local;

use super::{Socket, Zmq, follow};
use crate::discovery::Discovery;
use crate::events::EventsError;
use crate::events::seen::Seen;

/// Which events.
#[derive(Clone, Debug, Default)]
pub(in crate::events) struct Wanted {
    /// Of this scope; of all.
    pub(in crate::events) scope: Option<Scope>,
    /// On this topic; on all.
    pub(in crate::events) topic: Option<String>,
}

impl Wanted {
    /// What the keys of all channels begin with that may be meant.
    pub(super) fn key_prefix(&self) -> String {
        match (&self.scope, &self.topic) {
            (Some(scope), Some(topic)) => EventKey::prefix(CHANNELS_BUCKET, scope, topic),
            (Some(scope), None) => format!("{CHANNELS_BUCKET}/{}/", scope.path_prefix()),
            (None, _) => format!("{CHANNELS_BUCKET}/"),
        }
    }

    pub(super) fn is_meant(&self, scope: &Scope, topic: &str) -> bool {
        self.scope.as_ref().is_none_or(|wanted| wanted == scope)
            && self.topic.as_ref().is_none_or(|wanted| wanted == topic)
    }

    /// What the subjects of all events begin with that may be meant.
    fn subject_prefix(&self) -> String {
        match (&self.scope, &self.topic) {
            (Some(scope), Some(topic)) => scope.subject(topic),
            (Some(scope), None) => format!("{}.", scope.subject_prefix()),
            (None, _) => "namespace.".to_owned(),
        }
    }

    fn subject(&self) -> Option<Arc<str>> {
        let (scope, topic) = (self.scope.as_ref()?, self.topic.as_ref()?);
        Some(scope.subject(topic).into())
    }
}

/// An event on its way to its reader.
pub(super) struct Came {
    subject: Arc<str>,
    frame: Vec<u8>,
}

/// Counted by the plane's thread, read by the subscriber's.
#[derive(Debug, Default)]
struct Counts {
    dropped: AtomicU64,
    other: AtomicU64,
}

/// What the first part of a message says.
#[derive(Clone)]
pub(super) enum Subjects {
    /// The bare topic; what discovery says of the publisher counts.
    Of(Arc<str>),
    /// This and nothing that only begins so.
    Exactly(Arc<str>),
    /// The subject.
    Any,
}

/// The plane's end of a subscriber's queue.
#[derive(Clone)]
pub(super) struct Entrance {
    subjects: Subjects,
    events: mpsc::Sender<Came>,
    counts: Arc<Counts>,
}

impl Entrance {
    pub(super) fn of(&self, subjects: Subjects) -> Entrance {
        Entrance {
            subjects,
            ..self.clone()
        }
    }
}

impl Sink for Entrance {
    fn take(&mut self, event: LocalEvent) -> bool {
        let subject = match &self.subjects {
            Subjects::Of(subject) => Arc::clone(subject),
            Subjects::Exactly(subject) if subject.as_bytes() == event.subject => {
                Arc::clone(subject)
            }
            Subjects::Exactly(_) => {
                self.counts.other.fetch_add(1, Ordering::Relaxed);
                return true;
            }
            Subjects::Any => String::from_utf8_lossy(&event.subject).into(),
        };
        let frame = event.frame;
        match self.events.try_send(Came { subject, frame }) {
            // Nobody is there any more: nothing is lost by it.
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => true,
            Err(mpsc::error::TrySendError::Full(_)) => {
                self.counts.dropped.fetch_add(1, Ordering::Relaxed);
                false
            }
        }
    }
}

/// A subscriber's end of its queue; it may be used from any thread.
pub(in crate::events) struct Inlet {
    events: mpsc::Receiver<Came>,
    counts: Arc<Counts>,
    /// Events that came by several brokers are taken once.
    pub(in crate::events) seen: Option<Seen>,
    /// Dropped with us, which ends the subscription.
    _alive: oneshot::Sender<()>,
}

impl Inlet {
    /// The next message: its subject and its envelope. Cancel safe.
    pub(in crate::events) async fn next(&mut self) -> Option<(Arc<str>, Bytes)> {
        let Came { subject, frame } = self.events.recv().await?;
        let frame = Bytes::from(frame);
        // The plane passes on only what has a good frame.
        let envelope = frame::payload(&frame).map(|payload| frame.slice_ref(payload));
        Some((subject, envelope.unwrap_or_default()))
    }

    /// Events that found the queue full.
    pub(in crate::events) fn dropped(&self) -> u64 {
        self.counts.dropped.load(Ordering::Relaxed)
    }

    /// Messages whose subject only begins like ours.
    pub(in crate::events) fn of_others(&self) -> u64 {
        self.counts.other.load(Ordering::Relaxed)
    }
}

impl Zmq {
    /// A way in for a new subscriber.
    pub(in crate::events) async fn inlet(
        &self,
        discovery: &Discovery,
        wanted: Wanted,
    ) -> Result<Inlet, EventsError> {
        let (to, events) = mpsc::channel(self.0.options.queue_events_max);
        let (alive, gone) = oneshot::channel();
        let counts = Arc::new(Counts::default());
        let entrance = Entrance {
            subjects: Subjects::Any,
            events: to,
            counts: Arc::clone(&counts),
        };
        let namespace = wanted.scope.as_ref().map(Scope::namespace_name);
        let mut seen = None;
        if let Some(brokers) = self.brokers(discovery, namespace).await? {
            let (group, count) = self.broker_group(&brokers.xpub, Socket::Xpub).await?;
            seen = (count > 1).then(Seen::default);
            let subjects = wanted.subject().map_or(Subjects::Any, Subjects::Exactly);
            let (running, consumer) = (self.running()?, self.dial());
            let subscribe = Command::Subscribe {
                consumer,
                group,
                prefixes: vec![wanted.subject_prefix().into_bytes()],
                events: Box::new(entrance.of(subjects)),
            };
            running.link.command(subscribe).await?;
            spawn_local(async move {
                // Nothing is ever sent.
                let _ = gone.await;
                let _ = running
                    .link
                    .command(Command::Unsubscribe { consumer })
                    .await;
            });
        } else {
            let running = self.running()?;
            follow::start(self, running, discovery, wanted, entrance, gone).await;
        }
        Ok(Inlet {
            events,
            counts,
            seen,
            _alive: alive,
        })
    }
}
