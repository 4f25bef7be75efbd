//! The time at the beginning of a line: microseconds, UTC or local.

use std::fmt;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::FormatTime;

/// What time is written in.
pub(super) struct Clock(Option<TimeZone>);

impl Clock {
    /// UTC, marked by `Z`.
    pub(super) fn utc() -> Self {
        Self(None)
    }

    /// The zone of this machine if `local`; UTC and a complaint when it has none that is known.
    pub(super) fn new(local: bool) -> (Self, Option<String>) {
        match local.then(TimeZone::try_system) {
            None => (Self::utc(), None),
            Some(Ok(zone)) => (Self(Some(zone)), None),
            Some(Err(_)) => {
                let what =
                    "environment DYN_LOG_USE_LOCAL_TZ: the zone of this machine is not known";
                let complaint = format!("{what}; going on with UTC, set TZ or /etc/localtime");
                (Self::utc(), Some(complaint))
            }
        }
    }

    /// The time of day.
    pub(super) fn now(&self) -> String {
        self.text(Timestamp::now())
    }

    fn text(&self, now: Timestamp) -> String {
        match &self.0 {
            None => format!("{now:.6}"),
            Some(zone) => {
                let local = now.to_zoned(zone.clone());
                local.strftime("%Y-%m-%dT%H:%M:%S%.6f%:z").to_string()
            }
        }
    }
}

impl FormatTime for Clock {
    fn format_time(&self, writer: &mut Writer<'_>) -> fmt::Result {
        writer.write_str(&self.now())
    }
}

#[cfg(test)]
mod tests {
    use jiff::tz;

    use super::*;

    #[test]
    fn both_forms() {
        let at: Timestamp = "2026-11-21T19:37:25.568893Z".parse().unwrap();
        assert_eq!(Clock::utc().text(at), "2026-11-21T19:37:25.568893Z");
        let zone =
            TimeZone::fixed(tz::offset(5).saturating_add(jiff::SignedDuration::from_mins(30)));
        let local = Clock(Some(zone));
        assert_eq!(local.text(at), "2026-11-22T01:07:25.568893+05:30");
        let whole: Timestamp = "2026-11-21T19:37:25Z".parse().unwrap();
        assert_eq!(Clock::utc().text(whole), "2026-11-21T19:37:25.000000Z");
    }
}
