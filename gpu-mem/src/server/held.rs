//! What clients make the service hold: bytes of unfinished frames, and answers that nobody reads.
//! All together has a bound, and who has owed longest goes first when it is reached.

use super::Server;
use crate::stats::Counter;

/// Who holds less is not worth closing.
const SHED_BYTES_MIN: usize = 16 << 10;

impl Server {
    /// Counts what a connection holds now.
    pub(super) fn weigh(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        let now = connection.held_bytes();
        let before = std::mem::replace(&mut connection.counted_bytes, now);
        self.held_bytes = self.held_bytes - before + now;
        while self.held_bytes > self.held_bytes_max
            && let Some(id) = self.heaviest_debtor()
        {
            self.shed(id);
        }
    }

    /// Whose turn it is to go: the one that has owed something longest, else who holds most.
    fn heaviest_debtor(&self) -> Option<u64> {
        let holds = |id: &u64| self.connections.get(id).map_or(0, |it| it.counted_bytes);
        let mut owing = self.deadlines.iter().map(|(_, id)| *id);
        let all = self.connections.keys().copied();
        owing
            .find(|id| holds(id) >= SHED_BYTES_MIN)
            .or_else(|| all.max_by_key(holds))
            .filter(|id| holds(id) > 0)
    }

    fn shed(&mut self, id: u64) {
        let Some(connection) = self.connections.get(&id) else {
            return;
        };
        let (domain, bytes, owes) = (
            connection.domain,
            connection.counted_bytes,
            connection.debt(),
        );
        let max = self.held_bytes_max;
        self.count(domain, Counter::ConnectionsShed);
        if self.may_complain() {
            tracing::warn!(
                session = id,
                bytes,
                ?owes,
                max,
                "clients hold too much; session dropped"
            );
        }
        self.sever(id);
    }
}
