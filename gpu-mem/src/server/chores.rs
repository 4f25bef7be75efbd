//! What nobody waits for: the log, memory that was cleared, gauges; and when it is done.

use super::Server;
use crate::domain::Domain;

impl Server {
    /// After a look for events: one chore while a client thinks about its answer, none while it
    /// may ask again at any moment, and all before sleep.
    pub(super) fn rest(&mut self, idle: bool) {
        let now_ns = self.now_ns();
        if !idle {
            self.awake_until_ns = now_ns.saturating_add(self.spin_ns);
            self.untidy = true;
            self.chore();
        } else if now_ns >= self.awake_until_ns {
            self.chore();
        }
    }

    /// Does one thing that nobody waits for; lets others see how the pools stand when all is done.
    fn chore(&mut self) {
        if self.untidy && !self.domains.iter_mut().any(Domain::chore) {
            self.publish();
            self.untidy = false;
        }
    }

    /// Lets other threads see how the pools stand.
    pub(super) fn publish(&self) {
        for (domain, gauges) in self.domains.iter().zip(self.gauges.iter()) {
            gauges.set(domain);
        }
    }

    /// Memory that was cleared is free before anybody can ask for some, in whatever pool.
    pub(super) fn give_up(&mut self) {
        self.domains.iter_mut().for_each(Domain::give_up);
    }
}
