//! The topics that Dynamo 1.6.1 uses, all in the scope of an endpoint
//! (spec/events-discovery.md §3.8).

/// Blocks of KV cache stored and removed; published by workers.
pub const KV_EVENTS: &str = "kv-events";
/// Load figures; published by workers.
pub const KV_METRICS: &str = "kv_metrics";
/// Figures of the scheduler, about once a second; published by workers.
pub const FORWARD_PASS_METRICS: &str = "forward-pass-metrics";
/// Sequences begun and ended; published by routers that keep each other informed.
pub const ACTIVE_SEQUENCES: &str = "active_sequences_events";
/// The topic of a broker's record.
pub const BROKER: &str = "broker";

/// The text of a topic that is one of these, without a look at each byte.
#[inline]
pub(super) fn known(topic: &[u8]) -> Option<&'static str> {
    match topic {
        b"kv-events" => Some(KV_EVENTS),
        b"kv_metrics" => Some(KV_METRICS),
        b"forward-pass-metrics" => Some(FORWARD_PASS_METRICS),
        b"active_sequences_events" => Some(ACTIVE_SEQUENCES),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_topics_are_themselves() {
        let topics = [
            KV_EVENTS,
            KV_METRICS,
            FORWARD_PASS_METRICS,
            ACTIVE_SEQUENCES,
        ];
        for topic in topics {
            assert_eq!(known(topic.as_bytes()), Some(topic));
        }
        assert_eq!(known(b"kv-event"), None);
    }
}
