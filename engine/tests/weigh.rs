//! What a core says that it would choose, beside what it chooses; and what it says of instances
//! that refuse, are silent or gone.

mod common;

use std::sync::mpsc::channel;

use common::*;
use corelane_engine::directory::{Ack, Policy};
use corelane_engine::shard::Command;
use corelane_engine::weigh::{Barrier, Question, Weighed, Weighing};

fn weigh(router: &Router, headers: &[u8]) -> Weighing {
    let (sender, receiver) = channel();
    let question = Question {
        route: 0,
        headers: headers.to_vec(),
        prompt: Vec::new(),
        candidates_max: 100,
        answer: Box::new(move |weighing| sender.send(weighing).unwrap()),
    };
    let command = Command::Weigh(Box::new(question));
    router.handle.command(command).unwrap();
    receiver.recv_timeout(DEADLINE).expect("an answer")
}

fn taken(workers: &[&Worker]) -> Vec<usize> {
    workers.iter().map(|worker| worker.taken()).collect()
}

#[test]
fn what_is_said_is_what_the_next_request_gets() {
    for ring in rings() {
        for policy in [
            Policy::RoundRobin,
            Policy::Random,
            Policy::PowerOfTwoChoices,
            Policy::Direct,
            Policy::Hash,
        ] {
            let workers = [3, 0x2f, 77].map(|id| Worker::start(id, Manner::Accept));
            let workers: Vec<&Worker> = workers.iter().collect();
            let router = Router::start(ring);
            router.route_to(policy, Ack::OnAccept, &workers);
            let mut caller = Caller::dial(router.address);
            for headers in [
                &b"{\"x-test\":\"2f\"}"[..],
                b"{\"x-test\":\"3\"}",
                b"{\"a\":\"b\"}",
            ] {
                if policy == Policy::Direct && headers.starts_with(b"{\"a") {
                    assert_eq!(weigh(&router, headers).chosen, None);
                    continue;
                }
                // Asked twice: the first question has changed nothing.
                let said = weigh(&router, headers);
                let again = weigh(&router, headers);
                assert_eq!(said.chosen, again.chosen, "{policy:?}");
                let before = taken(&workers);
                caller.send(&frame_with(LISTEN_PATH, headers, b"x"));
                assert_eq!(caller.reply(), "");
                let after = taken(&workers);
                let place = (0..3).find(|place| after[*place] > before[*place]).unwrap();
                let id = workers[place].instance.id;
                assert_eq!(said.chosen, Some(id), "{policy:?}, {said:?}");
                let ids: Vec<u64> = said.candidates.iter().map(|one| one.id).collect();
                assert_eq!(ids, [3, 0x2f, 77]);
                let wanted = Some(workers[0].instance.address);
                assert_eq!(said.candidates[0].address, wanted);
            }
        }
    }
}

/// What is said of an instance once it has taken part in a request.
fn after_one(ring: corelane_engine::config::RingKind, manner: Manner) -> (Weighed, Option<u64>) {
    let (bad, good) = (Worker::start(1, manner), Worker::start(2, Manner::Accept));
    let router = Router::start(ring);
    router.route_to(Policy::RoundRobin, Ack::OnAccept, &[&bad, &good]);
    let mut caller = Caller::dial(router.address);
    while bad.taken() == 0 {
        caller.send(&frame(LISTEN_PATH, b"x"));
        assert_eq!(
            caller.reply(),
            "",
            "the other one takes what this one does not"
        );
    }
    let weighing = weigh(&router, b"");
    (weighing.candidates[0], weighing.chosen)
}

#[test]
fn who_does_not_do_his_part_is_counted_and_kept_out() {
    for ring in rings() {
        for (manner, word) in [
            (Manner::Overloaded, "overloaded"),
            (Manner::Unavailable, "inhibited"),
        ] {
            let (one, chosen) = after_one(ring, manner);
            assert!(
                one.seen.failed >= 1 && one.seen.answered == 0,
                "{manner:?} {one:?}"
            );
            // On a slow machine the time may have passed.
            if let Some(barrier) = one.barrier {
                assert_eq!(barrier.word(), word);
                assert!(barrier.left_ns().is_some_and(|ns| ns > 0));
                assert_eq!(chosen, Some(2));
            }
        }
    }
}

#[test]
fn who_is_gone_cannot_be_reached() {
    for ring in rings() {
        let workers = [1, 2].map(|id| Worker::start(id, Manner::Accept));
        let router = Router::start(ring);
        router.route_to(
            Policy::LeastLoaded,
            Ack::OnAccept,
            &[&workers[0], &workers[1]],
        );
        assert!(
            weigh(&router, b"")
                .candidates
                .iter()
                .all(|one| one.barrier.is_none())
        );
        workers[0].kill();
        wait_until("its end is noticed", || {
            let weighing = weigh(&router, b"");
            let barrier = weighing.candidates[0].barrier;
            let is_out = barrier == Some(Barrier::Unreachable);
            is_out && weighing.chosen == Some(2)
        });
        router.handle.command(Command::Drain).unwrap();
        wait_until("the core says that it drains", || {
            weigh(&router, b"").draining
        });
    }
}
