//! What the event plane reports, as lines of the log.

use corelane_engine::events::{Report, Side};

/// Logs a report; the end of the plane is its holder's to judge.
pub(crate) fn tell(report: &Report) {
    match report {
        Report::Opened { peer, side } => {
            tracing::debug!(%peer, "events: {} connected", word(Some(*side)));
        }
        Report::Closed {
            peer,
            side,
            why: None,
        } => {
            tracing::debug!(%peer, "events: {} gone", word(*side));
        }
        Report::Closed {
            peer,
            side,
            why: Some(why),
        } => {
            tracing::warn!(%peer, why, "events: {} disconnected", word(*side));
        }
        Report::Bad { peer, why, so_far } => {
            tracing::warn!(%peer, why, so_far, "events: a publisher's message is no event");
        }
        Report::Dropping { peer, so_far } => {
            tracing::warn!(%peer, so_far, "events: dropped for a slow subscriber");
        }
        Report::Lost {
            publisher_id,
            so_far,
        } => {
            let publisher = format!("{publisher_id:x}");
            tracing::warn!(publisher, so_far, "events: a publisher's events have a gap");
        }
        Report::NotPinned { cpu, why } => {
            tracing::warn!(cpu, why, "events: the thread of the plane is not pinned");
        }
        Report::Stopped { .. } => {}
    }
}

fn word(side: Option<Side>) -> &'static str {
    match side {
        Some(Side::Publisher) => "publisher",
        Some(Side::Subscriber) => "subscriber",
        None => "a peer that never said what it is",
    }
}
