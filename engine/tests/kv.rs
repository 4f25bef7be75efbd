//! Requests go where their prompt is in the KV cache, and where there is least to do, on every ring
//! that the host allows.

#[path = "common/ends.rs"]
mod ends;

mod common;
#[path = "relay/lab.rs"]
mod lab;

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::channel;

use common::*;
use corelane_codec::control_message::PayloadCodec;
use corelane_codec::event::block_hashes;
use corelane_codec::kv_headers;
use corelane_engine::config::RingKind;
use corelane_engine::directory::{Ack, Instance, KvRule, LoadRule, LoadSource, Policy, Route};
use corelane_engine::kv::{Batch, Change, RankId, Reports, Stored};
use corelane_engine::load::Work;
use corelane_engine::shard::Command;
use corelane_engine::weigh::{Question, Seen, Weighed, Weighing};

const BLOCK_TOKENS: u32 = 4;
const HOUR_NS: u64 = 3_600_000_000_000;

/// What is to be computed costs so much that load does not matter.
const RULE: KvRule = KvRule {
    feed: 5,
    block_tokens: BLOCK_TOKENS,
    body_bytes_max: 0,
    blocks_max: 10_000,
    ranks_max: 64,
    overlap_credit_pct: 100,
    prefill_scale_pct: 10_000,
    temperature_pct: 0,
};

fn kv_route(rule: KvRule, workers: &[&Worker]) -> Route {
    let mut route = route(Policy::Kv, Ack::OnAccept, workers);
    route.kv = Some(rule);
    route
}

fn tokens(blocks: Range<u32>) -> Vec<u32> {
    (blocks.start * BLOCK_TOKENS..blocks.end * BLOCK_TOKENS).collect()
}

fn hashes(blocks: Range<u32>) -> Vec<u64> {
    block_hashes(&tokens(blocks), BLOCK_TOKENS as usize).collect()
}

/// A worker has stored the first blocks of the one sequence that there is.
fn stored(worker_id: u64, dp_rank: u32, blocks: u32) -> Batch {
    let hashes = hashes(0..blocks);
    let block = |(number, tokens): (usize, &u64)| Stored {
        block: number as u64 + 1,
        tokens: *tokens,
    };
    let rank = RankId { worker_id, dp_rank };
    Batch {
        feed: RULE.feed,
        changes: vec![Change::Stored {
            rank,
            parent: None,
            blocks: 0..hashes.len(),
        }],
        stored: hashes.iter().enumerate().map(block).collect(),
        removed: vec![],
    }
}

fn changed(change: Change, removed: Vec<u64>) -> Batch {
    Batch {
        feed: RULE.feed,
        changes: vec![change],
        stored: vec![],
        removed,
    }
}

trait Asked {
    fn feed(&self, batch: Batch);
    fn weigh(&self, prompt: Vec<u64>) -> Weighing;
    fn overlaps(&self, prompt: Vec<u64>) -> Vec<(u64, u32)> {
        let all = self.weigh(prompt).candidates;
        all.iter().map(|one| (one.id, one.overlap_blocks)).collect()
    }
}

impl Asked for Router {
    fn feed(&self, batch: Batch) {
        let taken = &self.handle.stats.shard.kv_batches;
        let before = taken.get();
        self.handle.command(Command::Kv(Arc::new(batch))).unwrap();
        wait_until("the batch is taken over", || taken.get() > before);
    }

    fn weigh(&self, prompt: Vec<u64>) -> Weighing {
        let (sender, receiver) = channel();
        let answer = Box::new(move |weighing| sender.send(weighing).unwrap());
        let question = Question {
            route: 0,
            headers: Vec::new(),
            prompt,
            candidates_max: 100,
            answer,
        };
        let command = Command::Weigh(Box::new(question));
        self.handle.command(command).unwrap();
        receiver.recv_timeout(DEADLINE).expect("an answer")
    }
}

fn json_body(tokens: &[u32]) -> Vec<u8> {
    format!("{{\"model\":\"m\",\"token_ids\":{tokens:?},\"stop\":{{}}}}").into_bytes()
}

/// Fixed array heads: enough for these tests.
fn msgpack_body(tokens: &[u32]) -> Vec<u8> {
    let mut body = b"\x82\xa5model\xa1m\xa9token_ids\xdc".to_vec();
    body.extend((tokens.len() as u16).to_be_bytes());
    for token in tokens {
        body.push(0xce);
        body.extend(token.to_be_bytes());
    }
    body
}

fn frame_about(headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let mut map = vec![];
    corelane_codec::headers::write(headers, &mut map);
    let home = ([127, 0, 0, 1], 9).into();
    frame_with(LISTEN_PATH, &map, &envelope(&home, "s", body))
}

#[test]
fn requests_go_where_their_prompt_is() {
    for ring in rings() {
        let workers = [1, 2, 3].map(|id| Worker::start(id, Manner::Accept));
        let rule = KvRule {
            body_bytes_max: 4096,
            ..RULE
        };
        let router = Router::start(ring);
        let all: Vec<&Worker> = workers.iter().collect();
        router.publish(kv_route(rule, &all));
        let stats = &router.handle.stats.shard;
        wait_until("all are connected", || stats.instances_ready.get() == 3);
        router.feed(stored(2, 0, 8));
        router.feed(stored(3, 1, 3));
        // All of it is there, so nothing is to be computed, which would be load.
        let prompt = tokens(0..8);
        let by_hash = kv_headers::block_hashes(&hashes(0..8));
        let by_token = kv_headers::token_ids(&prompt);
        let nothing = b"not looked into".as_slice();
        let mut caller = Caller::dial(router.address);
        let frames = [
            frame_about(&[(kv_headers::BLOCK_HASHES, &by_hash)], nothing),
            frame_about(&[(kv_headers::TOKEN_IDS, &by_token)], nothing),
            frame_about(&[], &json_body(&prompt)),
            frame_about(&[], &msgpack_body(&prompt)),
        ];
        for (sent, frame) in frames.iter().enumerate() {
            // In one piece and in two, cut somewhere else each time.
            let (front, back) = frame.split_at(frame.len() * (sent + 1) / 6);
            caller.send(frame);
            assert_eq!(caller.reply(), "");
            caller.send(front);
            std::thread::sleep(std::time::Duration::from_millis(5));
            caller.send(back);
            assert_eq!(caller.reply(), "");
            assert_eq!(workers[1].taken(), 2 * (sent + 1), "{}", router.counters());
        }
        assert_eq!((stats.kv_lookups.get(), stats.kv_hits.get()), (8, 8));
        let ratio = (stats.kv_prompt_blocks.get(), stats.kv_overlap_blocks.get());
        assert_eq!(ratio, (64, 64));
        // One that says nothing, and two that cannot be read.
        let unknown = [
            frame_about(&[], b"{}"),
            frame_about(&[], b"plain"),
            frame_about(&[(kv_headers::TOKEN_IDS, "?")], &json_body(&prompt)),
        ];
        for frame in unknown {
            caller.send(&frame);
            assert_eq!(caller.reply(), "");
        }
        let unread = (
            stats.kv_prompts_unknown.get(),
            stats.kv_prompts_unreadable.get(),
        );
        assert_eq!((unread, stats.kv_lookups.get()), ((1, 2), 8));
    }
}

#[test]
fn bodies_are_left_alone_without_the_switch() {
    for ring in rings() {
        let worker = Worker::start(1, Manner::Accept);
        let router = Router::start(ring);
        router.publish(kv_route(RULE, &[&worker]));
        router.feed(stored(1, 0, 8));
        let mut caller = Caller::dial(router.address);
        caller.send(&frame_about(&[], &json_body(&tokens(0..8))));
        assert_eq!(caller.reply(), "");
        let stats = &router.handle.stats.shard;
        let counts = (stats.kv_prompts_unknown.get(), stats.kv_lookups.get());
        assert_eq!(counts, (1, 0));
    }
}

#[test]
fn the_front_of_a_large_body_is_enough() {
    for ring in rings() {
        let workers = [1, 2].map(|id| Worker::start(id, Manner::Accept));
        let rule = KvRule {
            body_bytes_max: 65_536,
            ..RULE
        };
        let router = Router::start(ring);
        router.publish(kv_route(rule, &[&workers[0], &workers[1]]));
        let stats = &router.handle.stats.shard;
        wait_until("both are connected", || stats.instances_ready.get() == 2);
        router.feed(stored(2, 0, 100));
        let prompt = tokens(0..20_000);
        let body = json_body(&prompt);
        assert!(body.len() > 400_000);
        let mut caller = Caller::dial(router.address);
        caller.send(&frame_about(&[], &body));
        assert_eq!(caller.reply(), "");
        assert_eq!(workers[1].taken(), 1);
        let blocks = (stats.kv_prompt_blocks.get(), stats.kv_overlap_blocks.get());
        assert!(
            blocks.0 > 1000 && blocks.0 < 5000 && blocks.1 == 100,
            "{blocks:?}"
        );
    }
}

#[test]
fn what_changes_in_caches_is_known_at_once() {
    for ring in rings() {
        let workers = [1, 2].map(|id| Worker::start(id, Manner::Accept));
        let router = Router::start(ring);
        router.publish(kv_route(RULE, &[&workers[0], &workers[1]]));
        router.feed(stored(1, 0, 4));
        router.feed(stored(2, 0, 2));
        router.feed(stored(2, 1, 3));
        // Of an instance that nobody has listed yet.
        router.feed(stored(9, 0, 5));
        let prompt = || hashes(0..6);
        assert_eq!(router.overlaps(prompt()), [(1, 4), (2, 3)]);
        let rank = |worker_id, dp_rank| RankId { worker_id, dp_rank };
        let blocks = 0..1;
        let rank_0 = rank(1, 0);
        router.feed(changed(
            Change::Removed {
                rank: rank_0,
                blocks,
            },
            vec![3],
        ));
        assert_eq!(router.overlaps(prompt()), [(1, 2), (2, 3)]);
        router.feed(changed(Change::Cleared(rank(2, 1)), vec![]));
        assert_eq!(router.overlaps(prompt()), [(1, 2), (2, 2)]);
        router.feed(changed(Change::Gone(1), vec![]));
        assert_eq!(router.overlaps(prompt()), [(1, 0), (2, 2)]);
        let stats = &router.handle.stats.shard;
        assert_eq!((stats.kv_stored.get(), stats.kv_removed.get()), (14, 1));
        assert_eq!((stats.kv_cleared.get(), stats.kv_ranks.get()), (2, 2));
        // A feed that no route listens to changes nothing.
        let mut other = stored(1, 0, 4);
        other.feed = 4;
        router.feed(other);
        assert_eq!(router.overlaps(prompt()), [(1, 0), (2, 2)]);
    }
}

/// Two workers whose reports count, and the second has the prompt.
struct Lab2 {
    router: Router,
    workers: [Worker; 2],
    route: Route,
}

impl Lab2 {
    fn start(ring: RingKind) -> Lab2 {
        let workers = [1, 2].map(|id| Worker::start(id, Manner::Accept));
        let rule = KvRule {
            prefill_scale_pct: 100,
            ..RULE
        };
        let mut route = kv_route(rule, &[&workers[0], &workers[1]]);
        route.load = LoadRule {
            source: LoadSource::Blocks,
            feed: RULE.feed,
            stale_ns: HOUR_NS,
            request_blocks: 32,
        };
        let router = Router::start(ring);
        router.publish(route.clone());
        let stats = &router.handle.stats.shard;
        wait_until("both are connected", || stats.instances_ready.get() == 2);
        router.feed(stored(2, 0, 8));
        Lab2 {
            router,
            workers,
            route,
        }
    }

    /// The second says that it is so busy, the first that it is idle.
    fn report(&self, decode_blocks: f64) -> Work {
        let busy = Work {
            requests: 0.0,
            prefill_blocks: 1.0,
            decode_blocks,
        };
        let reports = Reports {
            feed: RULE.feed,
            source: LoadSource::Blocks,
            instances: vec![(1, Work::default()), (2, busy), (77, busy)],
        };
        let heard = &self.router.handle.stats.shard.load_reports;
        let before = heard.get();
        let reports = Command::Loads(Arc::new(reports));
        self.router.handle.command(reports).unwrap();
        wait_until("the reports are heard", || heard.get() == before + 2);
        busy
    }

    fn second(&self) -> Weighed {
        self.router.weigh(vec![]).candidates[1]
    }
}

#[test]
fn caches_are_weighed_against_load() {
    for ring in rings() {
        let lab = Lab2::start(ring);
        for (decode_blocks, chosen) in [(2.0, 2), (7.5, 1)] {
            let busy = lab.report(decode_blocks);
            let weighing = lab.router.weigh(hashes(0..8));
            let want = |id: u64, overlap_blocks: u32, busy: Work, cost: f64| Weighed {
                id,
                address: Some(lab.workers[id as usize - 1].instance.address),
                barrier: None,
                overlap_blocks,
                busy,
                is_reported: true,
                load: busy.blocks(),
                cost,
                seen: Seen::default(),
            };
            let candidates = vec![
                want(1, 0, Work::default(), 16.0),
                want(2, 8, busy, 1.0 + decode_blocks + 8.0),
            ];
            assert_eq!(weighing.candidates, candidates);
            assert_eq!((weighing.prompt_blocks, weighing.chosen), (8, Some(chosen)));
        }
    }
}

#[test]
fn what_was_given_counts_until_the_next_report_and_old_reports_do_not() {
    for ring in rings() {
        let lab = Lab2::start(ring);
        let stats = &lab.router.handle.stats.shard;
        lab.report(0.0);
        let by_hash = kv_headers::block_hashes(&hashes(0..8));
        let frame = frame_about(&[(kv_headers::BLOCK_HASHES, &by_hash)], b"x");
        let mut caller = Caller::dial(lab.router.address);
        caller.send(&frame);
        assert_eq!(caller.reply(), "");
        assert_eq!(
            (lab.workers[1].taken(), stats.chosen_by_report.get()),
            (1, 1)
        );
        let busy = lab.second().busy;
        assert_eq!((busy.decode_blocks, busy.requests), (8.0, 1.0));
        lab.report(0.0);
        assert_eq!(lab.second().busy.decode_blocks, 0.0);
        let mut route = lab.route.clone();
        route.load.stale_ns = 0;
        lab.router.publish(route);
        wait_until("the report is stale", || !lab.second().is_reported);
        caller.send(&frame);
        assert_eq!(caller.reply(), "");
        assert_eq!(stats.chosen_by_own_count.get(), 1);
    }
}

#[test]
fn least_loaded_believes_what_instances_say() {
    for ring in rings() {
        let workers = [1, 2, 3].map(|id| Worker::start(id, Manner::Accept));
        let all: Vec<&Worker> = workers.iter().collect();
        let mut route = route(Policy::LeastLoaded, Ack::OnAccept, &all);
        route.load = LoadRule {
            source: LoadSource::Requests,
            feed: 0,
            stale_ns: HOUR_NS,
            request_blocks: 32,
        };
        let router = Router::start(ring);
        router.publish(route);
        let stats = &router.handle.stats.shard;
        wait_until("all are connected", || stats.instances_ready.get() == 3);
        let busy = |requests: f64| Work {
            requests,
            ..Work::default()
        };
        let instances = vec![(1, busy(9.0)), (2, busy(4.0)), (3, busy(30.0))];
        for source in [LoadSource::Requests, LoadSource::Blocks] {
            let reports = Reports {
                feed: 0,
                source,
                instances: match source {
                    LoadSource::Requests => instances.clone(),
                    // Not what this route listens to.
                    _ => vec![(3, busy(0.0))],
                },
            };
            let reports = Command::Loads(Arc::new(reports));
            router.handle.command(reports).unwrap();
        }
        wait_until("the reports are heard", || stats.load_reports.get() == 3);
        let mut caller = Caller::dial(router.address);
        for _ in 0..15 {
            caller.send(&frame(LISTEN_PATH, b"x"));
            assert_eq!(caller.reply(), "");
        }
        // Five until the second is as busy as the first, then in turns.
        let taken = workers.each_ref().map(Worker::taken);
        assert_eq!(taken, [5, 10, 0], "{:?}", router.weigh(vec![]));
        assert_eq!(stats.chosen_by_report.get(), 15);
    }
}

/// The one with most of the prompt refuses: of those that are left, the one with most of it is
/// next, however the request says what its prompt is.
#[test]
fn a_holder_that_refuses_is_passed_over_for_the_next_best() {
    let by_hash = kv_headers::block_hashes(&hashes(0..8));
    let by_token = kv_headers::token_ids(&tokens(0..8));
    let frames = [
        frame_about(&[(kv_headers::BLOCK_HASHES, &by_hash)], b"x"),
        frame_about(&[(kv_headers::TOKEN_IDS, &by_token)], b"x"),
        frame_about(&[], &json_body(&tokens(0..8))),
    ];
    let tries = rings()
        .into_iter()
        .flat_map(|ring| frames.iter().map(move |frame| (ring, frame)));
    for (ring, frame) in tries {
        let workers = [
            Worker::start(1, Manner::Accept),
            Worker::start(2, Manner::Unavailable),
            Worker::start(3, Manner::Accept),
            Worker::start(4, Manner::Accept),
        ];
        let router = Router::start(ring);
        let rule = KvRule {
            body_bytes_max: 4096,
            ..RULE
        };
        let all: Vec<&Worker> = workers.iter().collect();
        router.publish(kv_route(rule, &all));
        let stats = &router.handle.stats.shard;
        wait_until("all are connected", || stats.instances_ready.get() == 4);
        for (worker, blocks) in [(2, 8), (3, 5), (4, 1)] {
            router.feed(stored(worker, 0, blocks));
        }
        let mut caller = Caller::dial(router.address);
        caller.send(frame);
        assert_eq!(caller.reply(), "");
        assert_eq!(workers.each_ref().map(Worker::taken), [0, 1, 1, 0]);
        let looked_up = (stats.kv_lookups.get(), stats.kv_lookups_again.get());
        assert_eq!(looked_up, (1, 1));
        // The ratio is of first choices.
        let blocks = (stats.kv_prompt_blocks.get(), stats.kv_overlap_blocks.get());
        assert_eq!(blocks, (8, 8));
    }
}

/// Where responses pass through, an instance's work is what has not ended.
#[test]
fn relayed_requests_are_looked_into_as_well() {
    for ring in rings() {
        let mut worker = ends::HandWorker::default();
        let router = lab::relaying(ring);
        let rule = KvRule {
            body_bytes_max: 4096,
            ..RULE
        };
        let mut route = kv_route(rule, &[]);
        route.ack = Ack::OnForward;
        route.relay = Some(lab::NO_TIMES);
        let (id, address, path) = (1, worker.address(), b"1/x".to_vec());
        route.instances = vec![Instance { id, address, path }];
        router.publish(route);
        let stats = &router.handle.stats.shard;
        wait_until("it is connected", || stats.instances_ready.get() == 1);
        router.feed(stored(1, 0, 5));
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let home = listener.local_addr().unwrap().to_string();
        let json = PayloadCodec::Json;
        let body = json_body(&tokens(0..7));
        let request = frame(LISTEN_PATH, &envelope_in(&home, "s", json, &body));
        let mut caller = Caller::dial(router.address);
        caller.send(&request);
        let mut called = {
            let asked = worker.take();
            worker.reply("");
            asked.call_home()
        };
        assert_eq!(caller.reply(), "");
        let blocks = (stats.kv_prompt_blocks.get(), stats.kv_overlap_blocks.get());
        assert_eq!(blocks, (7, 5));
        let busy = router.weigh(vec![]).candidates[0].busy;
        assert_eq!((busy.requests, busy.decode_blocks), (1.0, 7.0));
        assert_eq!(busy.prefill_blocks, 2.0);
        called.say(&lab::answer(3, json));
        let mut home = ends::accept(&listener);
        home.handshake();
        assert_eq!(lab::drained(&mut home), lab::answer(3, json));
        wait_until("nothing is left of it", || {
            router.weigh(vec![]).candidates[0].busy == Work::default()
        });
    }
}

/// The head of a relayed request is the router's own; its headers are the caller's still.
#[test]
fn relayed_requests_are_tried_again_where_their_prompt_is() {
    let by_token = kv_headers::token_ids(&tokens(0..8));
    let in_body = json_body(&tokens(0..8));
    let says = [
        (vec![(kv_headers::TOKEN_IDS, by_token.as_str())], &b"{}"[..]),
        (vec![], &in_body[..]),
    ];
    let tries = rings()
        .into_iter()
        .flat_map(|ring| says.iter().map(move |says| (ring, says)));
    for (ring, (headers, body)) in tries {
        let idle = Worker::start(1, Manner::Accept);
        let holder = Worker::start(2, Manner::Unavailable);
        let mut next = ends::HandWorker::default();
        let router = lab::relaying(ring);
        let rule = KvRule {
            body_bytes_max: 4096,
            ..RULE
        };
        let mut route = kv_route(rule, &[&idle, &holder]);
        route.ack = Ack::OnForward;
        route.relay = Some(lab::NO_TIMES);
        let (id, address, path) = (3, next.address(), b"3/x".to_vec());
        route.instances.push(Instance { id, address, path });
        router.publish(route);
        let stats = &router.handle.stats.shard;
        wait_until("all are connected", || stats.instances_ready.get() == 3);
        router.feed(stored(2, 0, 8));
        router.feed(stored(3, 0, 5));
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let home = listener.local_addr().unwrap().to_string();
        let json = PayloadCodec::Json;
        let mut map = vec![];
        corelane_codec::headers::write(headers, &mut map);
        let mut caller = Caller::dial(router.address);
        let envelope = envelope_in(&home, "s", json, body);
        caller.send(&frame_with(LISTEN_PATH, &map, &envelope));
        let mut called = {
            let asked = next.take();
            next.reply("");
            asked.call_home()
        };
        assert_eq!(caller.reply(), "");
        called.say(&lab::answer(3, json));
        let mut home = ends::accept(&listener);
        home.handshake();
        assert_eq!(lab::drained(&mut home), lab::answer(3, json));
        assert_eq!((idle.taken(), holder.taken()), (0, 1));
        assert_eq!(stats.kv_lookups_again.get(), 1);
    }
}
