//! Whether everybody makes progress: each core, and each other thread with a loop, counts its
//! turns, and a count that stands still is noticed.
//!
//! An idle core makes a turn four times a second. Only time that this side has spent looking
//! counts: after a pause of the whole machine nobody is blamed for it.

use std::time::{Duration, Instant};

/// A part that has stood still for so long is named in the log and in `/metrics`.
pub const STILL_TOLD: Duration = Duration::from_secs(10);
/// After so long `/live` says so too: an orchestrator is to start the process again.
pub const STILL_DEAD: Duration = Duration::from_secs(30);
/// The longest time between two looks that counts.
const LOOK_COUNTS_MAX: Duration = Duration::from_secs(1);

/// How many turns a part has made; `None` once it has ended, which others see to.
pub type Turns = Box<dyn Fn() -> Option<u64>>;

struct Part {
    name: String,
    turns: Turns,
    seen: Option<u64>,
    still: Duration,
    told: bool,
}

/// All parts that are looked at.
#[derive(Default)]
pub struct Progress {
    parts: Vec<Part>,
    looked: Option<Instant>,
}

impl Progress {
    /// Looks at one more part from now on.
    pub fn watch(&mut self, name: impl Into<String>, turns: Turns) {
        self.parts.push(Part {
            name: name.into(),
            turns,
            seen: None,
            still: Duration::ZERO,
            told: false,
        });
    }

    /// Looks at all; answers those that have just been still for [`STILL_TOLD`].
    pub fn look(&mut self, now: Instant) -> Vec<String> {
        let since = self.looked.replace(now);
        let passed = since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        let passed = passed.min(LOOK_COUNTS_MAX);
        let mut stuck = Vec::new();
        for part in &mut self.parts {
            let turns = (part.turns)();
            if turns.is_none() || turns != part.seen {
                if part.told {
                    tracing::warn!("{} goes on after standing still", part.name);
                }
                (part.seen, part.still, part.told) = (turns, Duration::ZERO, false);
                continue;
            }
            part.still += passed;
            if part.still >= STILL_TOLD && !part.told {
                part.told = true;
                tracing::error!(still = ?part.still, "{} makes no progress", part.name);
                stuck.push(part.name.clone());
            }
        }
        stuck
    }

    /// The longest time for which a part has stood still.
    pub fn still(&self) -> Duration {
        let still = self.parts.iter().map(|part| part.still);
        still.max().unwrap_or_default()
    }

    /// Those that have stood still for so long.
    pub fn stuck(&self, limit: Duration) -> Vec<String> {
        let stuck = self.parts.iter().filter(|part| part.still >= limit);
        stuck.map(|part| part.name.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::rc::Rc;

    use super::*;

    fn watched(progress: &mut Progress, name: &str) -> Rc<Cell<Option<u64>>> {
        let turns = Rc::new(Cell::new(Some(0)));
        let seen = Rc::clone(&turns);
        progress.watch(name, Box::new(move || seen.get()));
        turns
    }

    #[test]
    fn one_that_stands_still_is_noticed_and_forgiven() {
        let mut progress = Progress::default();
        let (one, other) = (
            watched(&mut progress, "core 0"),
            watched(&mut progress, "core 1"),
        );
        let start = Instant::now();
        let mut told = Vec::new();
        for half in 0..62 {
            one.set(Some(half));
            told.extend(progress.look(start + Duration::from_millis(500) * half as u32));
        }
        assert_eq!(told, ["core 1"], "told once");
        assert_eq!(progress.stuck(STILL_DEAD), ["core 1"]);
        assert!(progress.still() >= STILL_DEAD);
        other.set(Some(1));
        assert!(progress.look(start + Duration::from_secs(32)).is_empty());
        assert_eq!(
            progress.still(),
            LOOK_COUNTS_MAX,
            "core 0 stood still since"
        );
        assert!(progress.stuck(STILL_TOLD).is_empty());
    }

    #[test]
    fn a_pause_of_the_whole_machine_is_nobodys_fault() {
        let mut progress = Progress::default();
        let _one = watched(&mut progress, "core 0");
        let start = Instant::now();
        progress.look(start);
        progress.look(start + Duration::from_secs(3600));
        assert_eq!(progress.still(), LOOK_COUNTS_MAX);
    }

    #[test]
    fn one_that_has_ended_does_not_count() {
        let mut progress = Progress::default();
        watched(&mut progress, "core 0").set(None);
        let start = Instant::now();
        for second in 0..60 {
            assert!(
                progress
                    .look(start + Duration::from_secs(second))
                    .is_empty()
            );
        }
        assert_eq!(progress.still(), Duration::ZERO);
    }
}
