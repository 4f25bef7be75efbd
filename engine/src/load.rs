//! How busy an instance is: by what we gave it, or by what it says of itself, corrected by what we
//! have given it since.
//!
//! ```text
//! own       a fading count of requests and blocks given lately; exact where responses are relayed
//! reported  the last report + requests and blocks given after it      until the report is stale
//! ```

use crate::directory::{LoadRule, LoadSource};

/// In direct response mode the router does not see when a response ends, so what an instance was
/// given lately stands for what it is busy with.
pub const LOAD_HALF_LIFE_NS: f64 = 500e6;

/// Work, by three measures.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// Requests.
    pub requests: f64,
    /// Blocks of prompts that are to be computed.
    pub prefill_blocks: f64,
    /// Blocks of KV cache that requests fill.
    pub decode_blocks: f64,
}

impl Work {
    /// One request of so many blocks, of which so many are in the cache already.
    pub fn request(blocks: u32, cached: u32) -> Work {
        Work {
            requests: 1.0,
            prefill_blocks: f64::from(blocks.saturating_sub(cached)),
            decode_blocks: f64::from(blocks),
        }
    }

    /// Blocks of both kinds.
    pub fn blocks(&self) -> f64 {
        self.prefill_blocks + self.decode_blocks
    }

    /// Both together.
    #[must_use]
    pub fn and(&self, more: Work) -> Work {
        Work {
            requests: self.requests + more.requests,
            prefill_blocks: self.prefill_blocks + more.prefill_blocks,
            decode_blocks: self.decode_blocks + more.decode_blocks,
        }
    }

    /// What is left when some is done.
    #[must_use]
    pub fn less(&self, done: Work) -> Work {
        Work {
            requests: (self.requests - done.requests).max(0.0),
            prefill_blocks: (self.prefill_blocks - done.prefill_blocks).max(0.0),
            decode_blocks: (self.decode_blocks - done.decode_blocks).max(0.0),
        }
    }

    fn faded(&self, ns: u64) -> Work {
        let halves = ns as f64 / LOAD_HALF_LIFE_NS;
        let rest = if halves > 40.0 { 0.0 } else { (-halves).exp2() };
        Work {
            requests: self.requests * rest,
            prefill_blocks: self.prefill_blocks * rest,
            decode_blocks: self.decode_blocks * rest,
        }
    }
}

/// What is known of an instance's work.
#[derive(Clone, Debug, Default)]
pub struct Load {
    /// Which of it counts.
    pub rule: LoadRule,
    /// Given lately, as it was at `recent_ns`.
    recent: Work,
    recent_ns: u64,
    /// Requests whose relayed response has not ended.
    running: Work,
    report: Option<Report>,
}

#[derive(Clone, Copy, Debug)]
struct Report {
    at_ns: u64,
    work: Work,
    /// Given since.
    given: Work,
}

impl Load {
    /// Work was given.
    pub fn give(&mut self, now_ns: u64, work: Work) {
        self.recent = self.recent(now_ns).and(work);
        self.recent_ns = now_ns;
        if let Some(report) = &mut self.report {
            report.given = report.given.and(work);
        }
    }

    /// The instance has said what it works on.
    pub fn reported(&mut self, now_ns: u64, work: Work) {
        self.report = Some(Report {
            at_ns: now_ns,
            work,
            given: Work::default(),
        });
    }

    /// A response is relayed from now on.
    pub fn begin(&mut self, work: Work) {
        self.running = self.running.and(work);
    }

    /// A relayed response has ended, or a part of its work is done.
    pub fn end(&mut self, work: Work) {
        self.running = self.running.less(work);
    }

    /// Work of responses that are relayed.
    pub fn running(&self) -> Work {
        self.running
    }

    /// A fading count of what was given lately.
    pub fn recent(&self, now_ns: u64) -> Work {
        self.recent.faded(now_ns.saturating_sub(self.recent_ns))
    }

    /// What the instance has said, with what it was given since; `None` if it is not to be asked,
    /// or has not said anything for too long.
    pub fn report(&self, now_ns: u64) -> Option<Work> {
        let report = self.report?;
        let age_ns = now_ns.saturating_sub(report.at_ns);
        let counts = self.rule.source != LoadSource::Own && age_ns <= self.rule.stale_ns;
        counts.then(|| report.work.and(report.given))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(source: LoadSource) -> Load {
        Load {
            rule: LoadRule {
                source,
                stale_ns: 1000,
                ..LoadRule::OWN
            },
            ..Load::default()
        }
    }

    fn work(requests: f64, prefill_blocks: f64, decode_blocks: f64) -> Work {
        Work {
            requests,
            prefill_blocks,
            decode_blocks,
        }
    }

    #[test]
    fn a_report_is_corrected_by_what_came_after_it_and_ages_out() {
        let mut load = load(LoadSource::Requests);
        load.give(10, Work::request(4, 0));
        assert_eq!(load.report(10), None);
        load.reported(20, work(7.0, 1.0, 30.0));
        assert_eq!(load.report(20), Some(work(7.0, 1.0, 30.0)));
        load.give(30, Work::request(4, 3));
        assert_eq!(load.report(1020), Some(work(8.0, 2.0, 34.0)));
        assert_eq!(load.report(1021), None);
        load.reported(2000, work(1.0, 0.0, 2.0));
        assert_eq!(load.report(2000), Some(work(1.0, 0.0, 2.0)));
    }

    #[test]
    fn who_is_not_asked_is_not_heard() {
        let mut load = load(LoadSource::Own);
        load.reported(20, work(7.0, 1.0, 30.0));
        assert_eq!(load.report(20), None);
    }

    #[test]
    fn what_was_given_fades_and_what_runs_ends() {
        let mut load = load(LoadSource::Own);
        load.give(0, Work::request(8, 2));
        assert_eq!(load.recent(LOAD_HALF_LIFE_NS as u64), work(0.5, 3.0, 4.0));
        assert_eq!(load.recent(u64::MAX), Work::default());
        load.begin(Work::request(8, 2));
        load.end(work(0.0, 6.0, 0.0));
        assert_eq!(load.running(), work(1.0, 0.0, 8.0));
        load.end(work(1.0, 0.0, 9.0));
        assert_eq!(load.running(), Work::default());
    }
}
