//! How the connections of callers lie on the cores: whether each came by the core that handles its
//! packets, and which shard has the fewest.
//!
//! ```text
//! accept --own CPU?--> local | remote          SO_INCOMING_CPU, SO_INCOMING_NAPI_ID
//!        --least_connections, and a neighbour has far fewer--> Command::TakeOver at that one
//! ```
//!
//! A shard reads the counters of its neighbours, which have one writer each, and only when a
//! connection comes.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::command::Command;
use crate::mesh::Sender;
use crate::stats::Stats;

/// What becomes of a connection that comes to a shard that has more than others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Imbalance {
    /// It stays.
    #[default]
    Keep,
    /// It is handed to the shard with the fewest, before anything is read from it.
    LeastConnections,
}

/// From where the packets of a connection come, as the kernel has seen it last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// The CPU that has handled them.
    pub cpu: Option<usize>,
    /// The receive queue that brought them, by its NAPI id; `None` where the device has none.
    pub napi: Option<u32>,
}

/// Another shard of this process.
#[derive(Clone)]
pub struct Neighbour {
    /// Its counters.
    pub stats: Arc<Stats>,
    /// What it listens to.
    pub commands: Sender<Command>,
}

impl fmt::Debug for Neighbour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let callers = self.stats.shard.callers.get();
        write!(f, "Neighbour({callers} callers)")
    }
}

/// NAPI ids that a shard tells apart, at most.
const NAPI_MAX: usize = 64;
/// A neighbour must have so many callers fewer before a connection moves there: it costs a copy of
/// nothing but a wake-up and the connection's warm caches.
const FEWER_MIN: u64 = 4;

/// What a shard knows of the callers of all shards.
#[derive(Debug, Default)]
pub(crate) struct Balance {
    /// Connections of callers that are open here.
    callers: u64,
    neighbours: Vec<Known>,
    napis: Vec<u32>,
}

#[derive(Debug)]
struct Known {
    neighbour: Neighbour,
    /// Connections that it had taken over, from anybody, when that was looked at last.
    taken: u64,
    /// Handed to it and, as far as that number tells, not taken yet.
    under_way: u64,
}

impl Balance {
    /// Hears of the other shards.
    pub(crate) fn meet(&mut self, neighbours: Vec<Neighbour>) {
        let known = |neighbour| Known {
            neighbour,
            taken: 0,
            under_way: 0,
        };
        self.neighbours = neighbours.into_iter().map(known).collect();
    }

    /// A caller has come to stay, or has gone; how many there are now.
    pub(crate) fn came(&mut self) -> u64 {
        self.callers += 1;
        self.callers
    }

    /// See [`Balance::came`].
    pub(crate) fn went(&mut self) -> u64 {
        self.callers = self.callers.saturating_sub(1);
        self.callers
    }

    /// How many receive queues have brought connections, this one among them.
    pub(crate) fn napis(&mut self, napi: u32) -> usize {
        if !self.napis.contains(&napi) && self.napis.len() < NAPI_MAX {
            self.napis.push(napi);
        }
        self.napis.len()
    }

    /// Hands a new connection to the neighbour with the fewest callers if it has far fewer than
    /// this shard: by four, and by an eighth.
    ///
    /// # Errors
    /// Gives it back: it stays here, because nobody has far fewer or who has does not keep up.
    pub(crate) fn hand_over(&mut self, socket: OwnedFd) -> Result<(), OwnedFd> {
        let mut least: Option<(u64, &mut Known)> = None;
        for known in &mut self.neighbours {
            let stats = &known.neighbour.stats.shard;
            // It refuses what comes, or has ended and would never take it.
            if stats.draining.get() == 1 {
                continue;
            }
            // In the order in which its writer is the other way round: none is counted by neither.
            let taken = stats.connections_taken_over.get();
            let callers = stats.callers.get();
            let news = taken.wrapping_sub(known.taken);
            known.under_way = known.under_way.saturating_sub(news);
            known.taken = taken;
            let callers = callers + known.under_way;
            if least.as_ref().is_none_or(|(fewest, _)| callers < *fewest) {
                least = Some((callers, known));
            }
        }
        match least {
            Some((fewest, known)) if fewest + FEWER_MIN.max(self.callers / 8) <= self.callers => {
                let command = Command::TakeOver(socket);
                match known.neighbour.commands.send(command) {
                    Ok(()) => known.under_way += 1,
                    Err(Command::TakeOver(socket)) => return Err(socket),
                    // It gives back what it was given.
                    Err(_) => {}
                }
                Ok(())
            }
            _ => Err(socket),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;
    use crate::mesh::{self, QUEUE_MAX, Receiver};

    fn neighbour(callers: u64) -> (Neighbour, Receiver<Command>) {
        let stats = Arc::new(Stats::new(0));
        stats.shard.callers.set(callers);
        let (commands, receiver) = mesh::lane().unwrap();
        (Neighbour { stats, commands }, receiver)
    }

    fn socket() -> OwnedFd {
        TcpListener::bind("127.0.0.1:0").unwrap().into()
    }

    fn count(receiver: &Receiver<Command>) -> usize {
        std::iter::from_fn(|| receiver.next()).count()
    }

    #[test]
    fn a_connection_goes_to_the_neighbour_with_far_fewer() {
        let (few, at_few) = neighbour(2);
        let (more, at_more) = neighbour(3);
        let stats = Arc::clone(&few.stats);
        let mut balance = Balance::default();
        assert!(balance.hand_over(socket()).is_err(), "there is nobody");
        balance.meet(vec![more, few]);
        for _ in 0..5 {
            balance.came();
        }
        assert!(
            balance.hand_over(socket()).is_err(),
            "3 fewer are not far fewer"
        );
        balance.came();
        assert!(balance.hand_over(socket()).is_ok());
        assert_eq!((count(&at_few), count(&at_more)), (1, 0));
        // The one under way counts: both have 3 now.
        assert!(balance.hand_over(socket()).is_err());
        balance.came();
        assert!(balance.hand_over(socket()).is_ok());
        assert_eq!((count(&at_few), count(&at_more)), (0, 1));
        // What has arrived is not counted twice.
        stats.shard.callers.set(3);
        stats.shard.connections_taken_over.add(1);
        assert!(balance.hand_over(socket()).is_ok());
        assert_eq!((count(&at_few), count(&at_more)), (1, 0));
        assert!(balance.hand_over(socket()).is_err());
        assert_eq!(balance.went(), 6);
    }

    #[test]
    fn a_neighbour_that_does_not_keep_up_gets_no_more() {
        let (idle, at_idle) = neighbour(0);
        let mut balance = Balance::default();
        balance.meet(vec![idle.clone()]);
        for _ in 0..100 {
            balance.came();
        }
        while idle.commands.push(Command::Accept).is_ok() {}
        assert!(balance.hand_over(socket()).is_err());
        assert_eq!(count(&at_idle), QUEUE_MAX);
        assert!(balance.hand_over(socket()).is_ok());
    }

    #[test]
    fn receive_queues_are_told_apart_up_to_a_bound() {
        let mut balance = Balance::default();
        assert_eq!(
            (balance.napis(7), balance.napis(9), balance.napis(7)),
            (1, 2, 2)
        );
        for napi in 0..1_000 {
            balance.napis(napi);
        }
        assert_eq!(balance.napis(5_000), NAPI_MAX);
    }
}
