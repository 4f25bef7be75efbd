//! Where a publisher's events leave.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use corelane_codec::event::{Envelope, EventKey, EventTransport, ZmqChannel, multipart};
use corelane_engine::events::{Command, Door, DoorKind, Group, LocalEvent, Until};
use corelane_engine::executor::listen;

use super::{Link, Socket, Zmq, address};
use crate::discovery::Discovery;
use crate::events::EventsError;

/// What is published is waited for so long, until it has left.
const SENT: Duration = Duration::from_secs(60);
/// Bytes of a message beside subject and frame, at most.
const HEADS_BYTES_MAX: usize = 64;

/// One publisher's way out; it may be used from any thread.
pub(in crate::events) struct Outlet {
    link: Arc<Link>,
    group: Group,
    /// Part 0 of its messages: the bare topic, or the full subject through a broker.
    subject: Vec<u8>,
}

/// What ends with a publisher: its door, if it has one.
pub(in crate::events) struct Own(Option<(Zmq, Group)>);

impl Own {
    /// Nobody comes in any more; who is in gets what waits for him.
    pub(in crate::events) async fn shut(self) {
        let Some((zmq, group)) = self.0 else { return };
        let running = zmq.0.running.borrow().clone();
        if let Some(running) = running {
            // A plane that has stopped has no doors.
            let _ = running.link.command(Command::Shut { group }).await;
            running.give_back(group);
        }
    }
}

impl Zmq {
    /// A way out for a new publisher, what it is to be registered as, if at all, and what is to be
    /// shut when it goes.
    pub(in crate::events) async fn outlet(
        &self,
        discovery: &Discovery,
        key: &EventKey,
    ) -> Result<(Outlet, Option<EventTransport>, Own), EventsError> {
        let namespace = Some(key.scope.namespace_name());
        if let Some(brokers) = self.brokers(discovery, namespace).await? {
            let (group, _) = self.broker_group(&brokers.xsub, Socket::Xsub).await?;
            let outlet = Outlet {
                link: Arc::clone(&self.running()?.link),
                group,
                subject: key.scope.subject(&key.topic).into_bytes(),
            };
            // Publishers behind a broker are found by it (spec/events-discovery.md §3.6).
            return Ok((outlet, None, Own(None)));
        }
        let host = self.0.options.host;
        let listener = listen(SocketAddr::new(bound(host), 0), false, false);
        let listener = listener.map_err(EventsError::Bind)?;
        let port = listener.local_addr().map_err(EventsError::Bind)?.port();
        let running = self.running()?;
        let group = running.group()?;
        let own = Own(Some((self.clone(), group)));
        let door = Door {
            listener,
            kind: DoorKind::Subscribers,
            group,
            security: self.0.options.protection.doors.clone(),
        };
        running.link.command(Command::Open(door)).await?;
        let outlet = Outlet {
            link: Arc::clone(&running.link),
            group,
            subject: key.topic.clone().into_bytes(),
        };
        let endpoint = address::url(SocketAddr::new(host, port));
        Ok((
            outlet,
            Some(EventTransport::Zmq(ZmqChannel { endpoint })),
            own,
        ))
    }
}

/// Every interface, as Dynamo does; but nobody from outside is let in who could not be told of.
fn bound(advertised: IpAddr) -> IpAddr {
    match advertised {
        host if host.is_loopback() => host,
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    }
}

impl Outlet {
    /// Hands an event to the plane; waits while that has no room.
    pub(in crate::events) async fn send(&self, envelope: &Envelope<'_>) -> Result<(), EventsError> {
        let mut frame = Vec::new();
        multipart::write_frame(envelope, &mut frame)?;
        let bytes = frame.len() + self.subject.len() + HEADS_BYTES_MAX;
        let max_bytes = self.link.event_bytes_max;
        if bytes > max_bytes {
            return Err(EventsError::TooLarge { bytes, max_bytes });
        }
        let event = LocalEvent {
            subject: self.subject.clone(),
            publisher_id: envelope.publisher_id,
            sequence: envelope.sequence,
            frame,
        };
        let group = self.group;
        self.link.command(Command::Publish { group, event }).await
    }

    /// Waits until sockets have taken what was published.
    pub(in crate::events) async fn flush(&self) -> Result<(), EventsError> {
        match self.link.ask(self.group, Until::Sent, SENT).await? {
            true => Ok(()),
            false => Err(EventsError::Busy),
        }
    }

    /// Waits until somebody has subscribed to anything.
    pub(in crate::events) async fn is_wanted(&self, within: Duration) -> Result<bool, EventsError> {
        self.link.ask(self.group, Until::Wanted, within).await
    }
}
