//! Counters and gauges of the event plane.

use std::sync::OnceLock;

use crate::stats::{Cell, CellKind, cells};

/// Topics that are counted one by one; events of others are counted under [`OTHER_TOPICS`].
pub const TOPICS_MAX: usize = 64;
/// The name of the counters of all other topics.
pub const OTHER_TOPICS: &str = "(other)";
/// Longest name of a topic in metrics.
const TOPIC_BYTES_MAX: usize = 128;

cells! {
    /// What happened on the event plane.
    PlaneStats {
        /// Events received from publishers
        Counter events_received,
        /// Bytes of events received, as they were on the wire
        Counter bytes_received,
        /// Events handed to the sockets of subscribers, once for each
        Counter events_sent,
        /// Events that nobody wanted when they came
        Counter events_unwanted,
        /// Messages of publishers that are no events: dropped
        Counter events_bad,
        /// Numbers of publishers that were passed over: events lost before they came here
        Counter events_lost,
        /// Events counted as lost that came after all
        Counter events_late,
        /// Events whose number had come before; passed on all the same
        Counter events_duplicate,
        /// Events dropped for a subscriber because its queue was at its bound: the new one
        Counter events_dropped_newest,
        /// Events dropped for a subscriber because its queue was at its bound: older ones
        Counter events_dropped_oldest,
        /// Events that waited for a subscriber that was disconnected or went away
        Counter events_dropped_disconnect,
        /// Events dropped because a task of this process does not take them fast enough
        Counter events_dropped_local,
        /// Events that are larger than a plain subscriber said it takes: dropped for it
        Counter events_dropped_too_large,
        /// Subscribers disconnected because their queue was at its bound
        Counter subscribers_overrun,
        /// Sessions ended by us because the peer broke the protocol
        Counter sessions_refused,
        /// Sessions that ended with the greetings: the peer's security mechanism is another, or
        /// it left when it had heard of ours
        Counter sessions_refused_mechanism,
        /// Of those refused: a wrong CURVE key, or a CURVE handshake or message that is not right
        Counter sessions_refused_curve,
        /// Of those refused: clients whose CURVE key is not among the allowed ones
        Counter sessions_refused_stranger,
        /// Connections closed because the table of sessions was full
        Counter sessions_turned_away,
        /// Bytes of slow sessions that were copied so that receive buffers are free for others
        Counter put_aside_bytes,
        /// Times that no receive buffer was free
        Counter buffers_exhausted,
        /// Publishers connected
        Gauge publishers,
        /// Subscribers connected
        Gauge subscribers,
        /// Publishers and subscribers among them that speak plain TCP
        Gauge plain_peers,
        /// Publishers and subscribers among them whose connection is encrypted with CURVE
        Gauge curve_peers,
        /// Pairs of a subscriber and a prefix
        Gauge subscriptions,
        /// Publishers whose numbers are followed
        Gauge publishers_followed,
        /// Bytes that wait for subscribers
        Gauge queued_bytes,
        /// Events that wait for the subscriber with the longest queue
        Gauge queued_events_longest,
        /// Receive buffers in use
        Gauge buffers_in_use,
        /// Turns of the loop
        Counter ticks,
        /// Turns that found nothing to do
        Counter idle_ticks,
        /// CPU time of the thread, in microseconds
        Counter cpu_us,
        /// Whether the thread is pinned to the CPU that is named for it
        Gauge pinned,
        /// System calls made by the ring
        Counter system_calls,
    }
}

/// Counters of one topic.
#[derive(Debug, Default)]
pub struct TopicStats {
    name: OnceLock<Box<str>>,
    /// Events received.
    pub events: Cell,
    /// Bytes of them, as they were on the wire.
    pub bytes: Cell,
}

/// All counters of the plane.
#[derive(Debug)]
pub struct Stats {
    /// Of the plane as a whole.
    pub plane: PlaneStats,
    topics: Box<[TopicStats]>,
}

impl Default for Stats {
    fn default() -> Stats {
        Stats {
            plane: PlaneStats::default(),
            topics: (0..=TOPICS_MAX).map(|_| TopicStats::default()).collect(),
        }
    }
}

impl Stats {
    /// Each topic that has been seen: name, events, bytes.
    pub fn topics(&self) -> Vec<(&str, u64, u64)> {
        let named = self.topics.iter().filter_map(|topic| {
            let name = topic.name.get()?;
            Some((&**name, topic.events.get(), topic.bytes.get()))
        });
        named.collect()
    }

    /// The place of a subject's topic: what follows its last dot. For the one writer.
    pub(super) fn topic(&self, subject: &[u8]) -> usize {
        let topic = subject
            .rsplit(|byte| *byte == b'.')
            .next()
            .unwrap_or_default();
        let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"_-%:/".contains(byte);
        let name = match str::from_utf8(topic) {
            Ok(name) if name.len() <= TOPIC_BYTES_MAX && topic.iter().all(is_plain) => name,
            _ => OTHER_TOPICS,
        };
        for (place, topic) in self.topics[..TOPICS_MAX].iter().enumerate() {
            match topic.name.get() {
                Some(known) if **known == *name => return place,
                Some(_) => {}
                None => {
                    let _ = topic.name.set(name.into());
                    return place;
                }
            }
        }
        let _ = self.topics[TOPICS_MAX].name.set(OTHER_TOPICS.into());
        TOPICS_MAX
    }

    pub(super) fn count_topic(&self, place: usize, events: u64, bytes: u64) {
        self.topics[place].events.add(events);
        self.topics[place].bytes.add(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topics_are_bounded() {
        let stats = Stats::default();
        let metrics = stats.topic(b"namespace.demo.component.a.kv_metrics");
        assert_eq!(stats.topic(b"kv_metrics"), metrics);
        stats.count_topic(metrics, 2, 300);
        assert_eq!(stats.topics(), [("kv_metrics", 2, 300)]);
        for topic in 0..2 * TOPICS_MAX {
            stats.topic(format!("topic-{topic}").as_bytes());
        }
        assert_eq!(stats.topic(b"one-more"), TOPICS_MAX);
        assert_eq!(stats.topic(b"kv_metrics"), metrics);
        let topics = stats.topics();
        assert_eq!(
            (topics.len(), topics[TOPICS_MAX].0),
            (TOPICS_MAX + 1, OTHER_TOPICS)
        );
    }
}
