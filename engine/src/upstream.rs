//! Instances, and the connections to them.
//!
//! An *instance* is an entry of the directory: an endpoint of a worker process. An *upstream* is
//! a connection to a worker's address, shared by all requests of this core to all endpoints there:
//! frames go out gathered, answers come back in order. Large frames that are cut through get
//! upstreams of their own (`bulk`), so that no small frame waits behind one.

use std::net::SocketAddr;

use crate::connection::Fifo;
use crate::directory::LoadSource;
use crate::load::{Load, Work};
use crate::table::NONE;

/// Upstreams for large frames to one address, at most.
pub const BULK_MAX: usize = 16;

/// An instance as the router sees it.
#[derive(Debug)]
pub struct InstanceState {
    /// Instance id of discovery.
    pub id: u64,
    /// Index of its route.
    pub route: u32,
    /// Its address.
    pub address: SocketAddr,
    /// `u16 P, path`: what its frames begin with.
    pub prefix: Box<[u8]>,
    /// The upstream for whole frames.
    pub upstream: u32,
    /// Requests given to it and not answered.
    pub unanswered: u32,
    /// Responses of its that are relayed and have not ended.
    pub streams: u32,
    /// Its responses are relayed: `streams` is its load.
    pub relayed: bool,
    /// It gets nothing before this time: its connection failed or it said that it is gone.
    pub inhibited_until_ns: u64,
    /// It gets nothing before this time: it said that it is overloaded.
    pub overloaded_until_ns: u64,
    /// No longer in the directory; goes away with its last request.
    pub gone: bool,
    /// Mark of the directory update that last listed it.
    pub epoch: u64,
    /// Requests that it has accepted.
    pub answered: u64,
    /// Requests that it has refused or lost, each try for itself.
    pub failed: u64,
    /// What it is busy with.
    pub work: Load,
}

impl InstanceState {
    /// An instance that was just listed.
    pub fn new(id: u64, route: u32, address: SocketAddr, path: &[u8]) -> InstanceState {
        let length = path.len() as u16;
        InstanceState {
            id,
            route,
            address,
            prefix: [&length.to_be_bytes()[..], path].concat().into(),
            upstream: NONE,
            unanswered: 0,
            streams: 0,
            relayed: false,
            inhibited_until_ns: 0,
            overloaded_until_ns: 0,
            gone: false,
            epoch: 0,
            answered: 0,
            failed: 0,
            work: Load::default(),
        }
    }

    /// Load at `now_ns`, in requests or in blocks, as its route's rule says. Where responses are
    /// relayed, exactly those requests whose response has not ended; else what the instance has
    /// reported; else unanswered requests, and the fading count of recent ones.
    pub fn load(&self, now_ns: u64) -> f64 {
        if self.relayed {
            return f64::from(self.streams);
        }
        let in_blocks = self.work.rule.source == LoadSource::Blocks;
        let work = self.work.report(now_ns);
        let work = work.unwrap_or_else(|| self.own(now_ns));
        if in_blocks {
            work.blocks()
        } else {
            work.requests
        }
    }

    /// Its work at `now_ns`, by the same sources.
    pub fn busy(&self, now_ns: u64) -> Work {
        if self.relayed {
            return self.work.running();
        }
        let work = self.work.report(now_ns);
        work.unwrap_or_else(|| self.own(now_ns))
    }

    /// Whether what it reports is what counts.
    pub fn is_reported(&self, now_ns: u64) -> bool {
        !self.relayed && self.work.report(now_ns).is_some()
    }

    /// Counts a request given to it.
    pub fn give(&mut self, now_ns: u64, work: Work) {
        self.work.give(now_ns, work);
        self.unanswered += 1;
    }

    /// What we know of it by ourselves.
    fn own(&self, now_ns: u64) -> Work {
        let unanswered = f64::from(self.unanswered);
        let blocks = f64::from(self.work.rule.request_blocks);
        self.work.recent(now_ns).and(Work {
            requests: unanswered,
            prefill_blocks: 0.0,
            decode_blocks: unanswered * blocks,
        })
    }
}

/// Where a connection to a worker stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UpstreamState {
    /// The connect is under way.
    Connecting,
    /// Frames can be sent.
    Open,
    /// The last connect failed; the next one is due at a timer.
    Waiting,
}

/// One connection to a worker's address.
#[derive(Debug)]
pub struct Upstream {
    /// The worker's request plane.
    pub address: SocketAddr,
    /// The connection; [`NONE`] while there is none.
    pub connection: u32,
    /// Where it stands.
    pub state: UpstreamState,
    /// For large frames, one at a time.
    pub bulk: bool,
    /// Instances that use it; for a bulk upstream 0.
    pub instances: u32,
    /// Requests given to it: sent and unanswered ones, then unsent ones.
    pub queue: Fifo,
    /// The first request that has not been sent completely.
    pub unsent: u32,
    /// Bytes of it that have been sent, its path included.
    pub unsent_offset: u64,
    /// Bytes of all requests that have not been sent completely.
    pub queued_bytes: u64,
    /// It stands in the list of upstreams with something to send.
    pub dirty: bool,
    /// Its answers are read in batches.
    pub lazy: bool,
    /// A timer looks for answers that lie unread.
    pub collect_timer: bool,
    /// When it was looked for them last.
    pub collected_ns: u64,
    /// A timer looks at its oldest request.
    pub timer: bool,
    /// When something is to be done about its connect: dial, or give up a dial that takes too
    /// long. Timers set for an earlier state come before this and mean nothing.
    pub connect_due_ns: u64,
    /// Failed connects in a row.
    pub failures: u32,
    /// It was open once and was lost: callers remembered for it may have to be told.
    pub lost: bool,
    /// Time of the last use, for idle bulk upstreams.
    pub used_ns: u64,
}

impl Upstream {
    /// An upstream whose connect begins now.
    pub fn new(address: SocketAddr, bulk: bool) -> Upstream {
        Upstream {
            address,
            connection: NONE,
            state: UpstreamState::Waiting,
            bulk,
            instances: 0,
            queue: Fifo::EMPTY,
            unsent: NONE,
            unsent_offset: 0,
            queued_bytes: 0,
            dirty: false,
            lazy: false,
            collect_timer: false,
            collected_ns: 0,
            timer: false,
            connect_due_ns: 0,
            failures: 0,
            lost: false,
            used_ns: 0,
        }
    }

    /// Pause before the next connect: 100 ms, doubling to 5 s.
    pub fn backoff_ns(&self) -> u64 {
        (100_000_000u64 << self.failures.saturating_sub(1).min(6)).min(5_000_000_000)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::directory::LoadRule;
    use crate::load::LOAD_HALF_LIFE_NS;

    #[test]
    fn load_fades_and_counts_what_is_unanswered() {
        let mut instance = InstanceState::new(1, 0, ([127, 0, 0, 1], 1).into(), b"1/a/b/c");
        assert_eq!(&instance.prefix[..], b"\x00\x071/a/b/c");
        instance.give(0, Work::request(0, 0));
        instance.give(0, Work::request(0, 0));
        instance.unanswered = 1;
        assert_eq!(instance.load(0), 3.0);
        assert_eq!(instance.load(LOAD_HALF_LIFE_NS as u64), 2.0);
        assert_eq!(instance.load(u64::MAX), 1.0);
    }

    #[test]
    fn a_report_counts_in_the_measure_of_its_rule() {
        for (source, load, own) in [
            (LoadSource::Requests, 4.0, 2.0),
            (LoadSource::Blocks, 71.0, 33.0),
        ] {
            let mut instance = InstanceState::new(1, 0, ([127, 0, 0, 1], 1).into(), b"1/a/b/c");
            instance.work.rule = LoadRule {
                source,
                stale_ns: 1000,
                request_blocks: 32,
                ..LoadRule::OWN
            };
            instance.work.reported(
                0,
                Work {
                    requests: 3.0,
                    prefill_blocks: 10.0,
                    decode_blocks: 60.0,
                },
            );
            let mut one = Work::request(1, 1);
            one.decode_blocks = 1.0;
            instance.give(0, one);
            assert_eq!((instance.load(0), instance.is_reported(0)), (load, true));
            instance.work.reported(0, Work::default());
            assert_eq!(instance.load(0), 0.0);
            let rule = std::mem::take(&mut instance.work).rule;
            instance.work.rule = rule;
            instance.work.give(0, one);
            assert_eq!((instance.load(0), instance.is_reported(0)), (own, false));
            instance.relayed = true;
            assert_eq!(instance.load(0), 0.0);
        }
    }

    #[test]
    fn backoff_doubles_to_its_limit() {
        let mut upstream = Upstream::new(([127, 0, 0, 1], 1).into(), false);
        let pauses: Vec<u64> = (1..9)
            .map(|failures| {
                upstream.failures = failures;
                upstream.backoff_ns() / 1_000_000
            })
            .collect();
        assert_eq!(pauses, [100, 200, 400, 800, 1600, 3200, 5000, 5000]);
    }
}
