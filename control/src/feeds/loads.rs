//! What workers publish of their load becomes reports for the cores: of each instance the sum over
//! its ranks (spec/events-discovery.md §3.8).

use std::collections::HashMap;
use std::time::{Duration, Instant};

use corelane_codec::event::{EventError, ForwardPass, KvMetrics, topic};
use corelane_engine::directory::LoadSource;
use corelane_engine::kv::{RankId, Reports};
use corelane_engine::load::Work;

/// Ranks that are remembered; one more and those that have been silent are forgotten, then all.
const RANKS_MAX: usize = 16_384;

/// The load events of one target and one topic.
#[derive(Debug)]
pub struct Gauge {
    feed: u32,
    source: LoadSource,
    block_tokens: f64,
    /// After that long a rank that says nothing does not count.
    stale: Duration,
    ranks: HashMap<RankId, (Instant, Work)>,
    /// Instances of which something has come since reports were taken.
    news: Vec<u64>,
    /// Payloads that could not be read.
    pub unreadable: u64,
}

impl Gauge {
    /// Nothing has come.
    pub fn new(feed: u32, source: LoadSource, block_tokens: u32, stale: Duration) -> Gauge {
        Gauge {
            feed,
            source,
            block_tokens: f64::from(block_tokens.max(1)),
            stale,
            ranks: HashMap::new(),
            news: Vec::new(),
            unreadable: 0,
        }
    }

    /// The topic that it wants.
    pub fn topic(&self) -> &'static str {
        match self.source {
            LoadSource::Blocks => topic::KV_METRICS,
            LoadSource::Requests | LoadSource::Own => topic::FORWARD_PASS_METRICS,
        }
    }

    /// A payload has come.
    pub fn came(&mut self, payload: &[u8], now: Instant) {
        let read = match self.source {
            LoadSource::Blocks => self.kv_metrics(payload),
            LoadSource::Requests | LoadSource::Own => self.forward_pass(payload),
        };
        let Ok(Some((rank, work))) = read else {
            self.unreadable += 1;
            return;
        };
        if self.ranks.len() >= RANKS_MAX && !self.ranks.contains_key(&rank) {
            let stale = self.stale;
            self.ranks
                .retain(|_, (at, _)| now.duration_since(*at) <= stale);
            if self.ranks.len() >= RANKS_MAX {
                self.ranks.clear();
            }
        }
        self.ranks.insert(rank, (now, work));
        if !self.news.contains(&rank.worker_id) {
            self.news.push(rank.worker_id);
        }
    }

    fn kv_metrics(&self, payload: &[u8]) -> Result<Option<(RankId, Work)>, EventError> {
        let metrics = KvMetrics::decode(payload)?;
        let rank = RankId {
            worker_id: metrics.worker_id,
            dp_rank: metrics.dp_rank,
        };
        let tokens = metrics.active_prefill_tokens.unwrap_or(0);
        let work = Work {
            requests: 0.0,
            prefill_blocks: tokens as f64 / self.block_tokens,
            decode_blocks: metrics.active_decode_blocks as f64,
        };
        Ok(Some((rank, work)))
    }

    fn forward_pass(&self, payload: &[u8]) -> Result<Option<(RankId, Work)>, EventError> {
        let pass = ForwardPass::decode(payload)?;
        let Some(worker_id) = pass.instance_id() else {
            return Ok(None);
        };
        let rank = RankId {
            worker_id,
            dp_rank: pass.dp_rank,
        };
        let (now, next) = (pass.scheduled, pass.queued);
        let requests = [
            now.num_prefill_requests,
            now.num_decode_requests,
            next.num_prefill_requests,
            next.num_decode_requests,
        ];
        let sum = |numbers: &[u64]| numbers.iter().map(|number| *number as f64).sum::<f64>();
        let prefill = sum(&[now.sum_prefill_tokens, next.sum_prefill_tokens]);
        let decode = sum(&[now.sum_decode_kv_tokens, next.sum_decode_kv_tokens]);
        let work = Work {
            requests: sum(&requests),
            prefill_blocks: prefill / self.block_tokens,
            decode_blocks: decode / self.block_tokens,
        };
        Ok(Some((rank, work)))
    }

    /// Reports of the instances that something has come of; `None` if there is nothing new.
    pub fn take(&mut self, now: Instant) -> Option<Reports> {
        if self.news.is_empty() {
            return None;
        }
        let mut sums: HashMap<u64, Work> = self
            .news
            .drain(..)
            .map(|id| (id, Work::default()))
            .collect();
        for (rank, (at, work)) in &self.ranks {
            if now.duration_since(*at) > self.stale {
                continue;
            }
            if let Some(sum) = sums.get_mut(&rank.worker_id) {
                *sum = sum.and(*work);
            }
        }
        Some(Reports {
            feed: self.feed,
            source: self.source,
            instances: sums.into_iter().collect(),
        })
    }

    /// Instances whose word counts now.
    pub fn fresh(&self, now: Instant) -> usize {
        let fresh = self.ranks.iter();
        let fresh = fresh.filter(|(_, (at, _))| now.duration_since(*at) <= self.stale);
        let ids: std::collections::HashSet<u64> = fresh.map(|(rank, _)| rank.worker_id).collect();
        ids.len()
    }
}

#[cfg(test)]
mod tests {
    use corelane_codec::event::typed;
    use corelane_codec::event::{QueuedRequests, ScheduledRequests};

    use super::*;

    const STALE: Duration = Duration::from_secs(5);

    fn sorted(reports: Option<Reports>) -> Vec<(u64, Work)> {
        let mut instances = reports.map_or(vec![], |reports| reports.instances);
        instances.sort_by_key(|(id, _)| *id);
        instances
    }

    #[test]
    fn blocks_of_all_ranks_are_added_until_one_is_silent_for_long() {
        let mut gauge = Gauge::new(2, LoadSource::Blocks, 16, STALE);
        assert_eq!(gauge.topic(), "kv_metrics");
        let begin = Instant::now();
        let metrics = |dp_rank, blocks, tokens| KvMetrics {
            worker_id: 9,
            dp_rank,
            active_decode_blocks: blocks,
            active_prefill_tokens: tokens,
            kv_used_blocks: 99,
        };
        let came = |gauge: &mut Gauge, metrics: KvMetrics, at| {
            gauge.came(&typed::to_payload(&metrics).unwrap(), at);
        };
        came(&mut gauge, metrics(0, 10, None), begin);
        came(&mut gauge, metrics(1, 20, Some(32)), begin);
        let work = |prefill_blocks, decode_blocks| Work {
            requests: 0.0,
            prefill_blocks,
            decode_blocks,
        };
        assert_eq!(sorted(gauge.take(begin)), [(9, work(2.0, 30.0))]);
        assert_eq!(gauge.take(begin), None);
        let later = begin + STALE + Duration::from_millis(1);
        came(&mut gauge, metrics(0, 11, None), later);
        assert_eq!(sorted(gauge.take(later)), [(9, work(0.0, 11.0))]);
        assert_eq!((gauge.fresh(later), gauge.fresh(later + 2 * STALE)), (1, 0));
    }

    #[test]
    fn forward_passes_tell_requests_and_blocks() {
        let mut gauge = Gauge::new(0, LoadSource::Requests, 4, STALE);
        assert_eq!(gauge.topic(), "forward-pass-metrics");
        let pass = |worker_id: &str| typed::ForwardPass {
            version: 1,
            worker_id: worker_id.into(),
            dp_rank: 0,
            counter_id: 1,
            wall_time: 0.5,
            scheduled_requests: ScheduledRequests {
                num_prefill_requests: 1,
                sum_prefill_tokens: 8,
                num_decode_requests: 2,
                sum_decode_kv_tokens: 40,
                ..ScheduledRequests::default()
            },
            queued_requests: QueuedRequests {
                num_prefill_requests: 4,
                sum_prefill_tokens: 16,
                ..QueuedRequests::default()
            },
        };
        let now = Instant::now();
        gauge.came(&typed::to_payload(&pass("12")).unwrap(), now);
        gauge.came(&typed::to_payload(&pass("no number")).unwrap(), now);
        gauge.came(b"x", now);
        let work = Work {
            requests: 7.0,
            prefill_blocks: 6.0,
            decode_blocks: 10.0,
        };
        assert_eq!(sorted(gauge.take(now)), [(12, work)]);
        assert_eq!(gauge.unreadable, 2);
    }
}
