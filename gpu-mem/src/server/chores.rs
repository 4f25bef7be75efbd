//! What nobody waits for: memory that was cleared, the log, gauges; and when it is done.

use super::Server;
use crate::domain::Domain;

/// Under load without a pause, the log and the gauges are so much behind at most.
const TIDY_WITHIN_NS: u64 = 10_000_000;

impl Server {
    /// After a look for events. Right after an answer only a block of memory is given up, or one
    /// made ready, because its client may ask again before a line of the log is written; all else
    /// comes before sleep.
    pub(super) fn rest(&mut self, idle: bool) {
        let now_ns = self.now_ns();
        if idle {
            if now_ns >= self.awake_until_ns && !self.unprepare() {
                self.last_answered = None;
                self.chore();
            }
            return;
        }
        self.awake_until_ns = now_ns.saturating_add(self.spin_ns);
        if !self.untidy {
            self.untidy = true;
            self.tidy_by_ns = now_ns.saturating_add(TIDY_WITHIN_NS);
        }
        if now_ns >= self.tidy_by_ns {
            self.chore();
        } else if !self.discarded.free_one() {
            self.prepare();
        }
    }

    /// Makes ready what the next allocation of a writer will need; only between two answers of a
    /// service that does not sleep, which gives it up again before it does.
    fn prepare(&mut self) {
        let _ = self.last_answered.is_some() && self.domains.iter_mut().any(Domain::prepare);
    }

    /// Gives up one thing that was made ready. False if there is none.
    pub(super) fn unprepare(&mut self) -> bool {
        self.domains.iter_mut().any(Domain::unprepare)
    }

    /// Does one thing that nobody waits for; lets others see how the pools stand when all is done.
    fn chore(&mut self) {
        let busy = self.discarded.free_one() || self.domains.iter_mut().any(Domain::log);
        if self.untidy && !busy {
            self.publish();
            self.untidy = false;
        }
    }

    /// Does all of it.
    pub(super) fn tidy_up(&mut self) {
        self.discarded.free_all();
        while self.domains.iter_mut().any(Domain::log) {}
        self.publish();
    }

    /// Lets other threads see how the pools stand.
    fn publish(&self) {
        for (domain, gauges) in self.domains.iter().zip(self.gauges.iter()) {
            gauges.set(domain);
        }
    }
}
