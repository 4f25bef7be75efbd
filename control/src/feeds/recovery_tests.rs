//! Digests whose workers can be asked: nothing is claimed that a worker has not, and what it has is
//! known again once it has answered.

use std::net::SocketAddr;

use corelane_codec::control_message::PayloadCodec;
use corelane_codec::event::typed;
use corelane_codec::path::EndpointId;
use corelane_engine::kv::Index;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::super::asking::HELD_BYTES_MAX;
use super::tests::{RANK, came, changed, overlap, stored};
use super::*;
use crate::watch::Instance;

const PUBLISHER: u64 = 1;
const OTHER: u64 = 2;

fn source(rank: RankId) -> Source {
    let instance = Instance {
        id: rank.worker_id,
        address: SocketAddr::from(([127, 0, 0, 1], 9)),
        path: b"x".to_vec(),
        codec: PayloadCodec::MessagePack,
        device: None,
    };
    let endpoint = EndpointId::new("n", "c", "worker_kv_query_source_1");
    let target = Some(Target { endpoint, instance });
    Source { rank, target }
}

fn sources(publishers: &[u64]) -> HashMap<u64, Source> {
    publishers.iter().map(|id| (*id, source(RANK))).collect()
}

/// The one question there is.
fn asked(digest: &mut Digest) -> Ask {
    let mut asks = digest.asks();
    assert_eq!(asks.len(), 1, "{asks:?}");
    asks.remove(0)
}

fn item(name: &str, events: &[typed::KvEvent], last_event_id: u64) -> Vec<u8> {
    let events = serde_json::to_value(events).unwrap();
    let answer = json!({name: {"events": events, "last_event_id": last_event_id}});
    typed::to_payload::<Value>(&answer).unwrap()
}

struct Lab {
    digest: Digest,
    index: Index,
}

impl Lab {
    /// One publisher, which is being asked.
    fn start() -> (Lab, Ask) {
        let mut lab = Lab {
            digest: Digest::new(0),
            index: Index::new(1000, 64),
        };
        lab.digest.publishers(sources(&[PUBLISHER]));
        let ask = asked(&mut lab.digest);
        assert_eq!((ask.rank, ask.after), (RANK, None));
        (lab, ask)
    }

    /// One that has answered, with the first two blocks, up to event 10.
    fn known() -> Lab {
        let (mut lab, ask) = Lab::start();
        let dump = item("TreeDump", &[stored(0, None, 0..2)], 10);
        assert_eq!(lab.digest.answered(&ask, Ok(dump)), None);
        assert_eq!(lab.overlap(), 2);
        lab
    }

    fn came(&mut self, publisher_id: u64, event: typed::KvEvent) {
        came(&mut self.digest, publisher_id, &[event]);
    }

    fn overlap(&mut self) -> u32 {
        let prompt: Vec<u64> = (0..20).collect();
        overlap(&mut self.digest, &mut self.index, &prompt)
    }
}

#[test]
fn a_new_publisher_is_asked_and_events_wait_for_the_answer() {
    let (mut lab, ask) = Lab::start();
    // One that the answer has already, and one that it has not.
    lab.came(PUBLISHER, stored(10, Some(1000), 1..2));
    lab.came(PUBLISHER, stored(11, Some(1001), 2..3));
    assert_eq!((lab.overlap(), lab.digest.waiting()), (0, 1));
    let dump = item(
        "TreeDump",
        &[stored(0, None, 0..1), stored(9, Some(1000), 1..2)],
        10,
    );
    assert_eq!(lab.digest.answered(&ask, Ok(dump)), None);
    assert_eq!((lab.overlap(), lab.digest.waiting()), (3, 0));
    lab.came(PUBLISHER, stored(12, Some(1002), 3..4));
    assert_eq!(lab.overlap(), 4);
    let counts = lab.digest.counts;
    assert_eq!(
        (counts.asked, counts.recovered, counts.unanswered),
        (1, 1, 0)
    );
    assert_eq!((counts.gaps, counts.repeated, counts.lost), (0, 0, 0));
    // Who is known already is not asked again, and an answer counts once.
    lab.digest.publishers(sources(&[PUBLISHER]));
    assert!(lab.digest.asks().is_empty());
    assert_eq!(lab.digest.answered(&ask, Err("late".into())), None);
    assert_eq!(lab.overlap(), 4);
}

#[test]
fn what_was_lost_is_asked_for() {
    let mut lab = Lab::known();
    lab.came(PUBLISHER, stored(13, Some(1003), 4..5));
    lab.came(PUBLISHER, stored(14, Some(1004), 5..6));
    let ask = asked(&mut lab.digest);
    assert_eq!(ask.query().start_event_id, Some(11));
    // What is known stays known meanwhile.
    assert_eq!(lab.overlap(), 2);
    let missing = [
        stored(10, None, 0..2),
        stored(11, Some(1001), 2..3),
        stored(12, Some(1002), 3..4),
        stored(13, Some(1003), 4..5),
    ];
    assert_eq!(
        lab.digest.answered(&ask, Ok(item("Events", &missing, 13))),
        None
    );
    assert_eq!(lab.overlap(), 6);
    let counts = lab.digest.counts;
    assert_eq!((counts.gaps, counts.lost, counts.recovered), (1, 2, 2));
}

#[test]
fn a_dump_in_place_of_events_replaces_what_was_known() {
    let mut lab = Lab::known();
    lab.came(PUBLISHER, stored(13, None, 7..8));
    let ask = asked(&mut lab.digest);
    let dump = item("TreeDump", &[stored(0, None, 0..1)], 13);
    assert_eq!(lab.digest.answered(&ask, Ok(dump)), None);
    assert_eq!(lab.overlap(), 1);
}

#[test]
fn without_an_answer_the_rank_is_learned_anew() {
    let stays = |name: &str, events: &[typed::KvEvent]| Ok(item(name, events, 13));
    for answer in [
        Err("no answer".to_owned()),
        Ok(b"\xc1".to_vec()),
        Ok(typed::to_payload(&json!({"Error": "no"})).unwrap()),
        // Something is missing in it.
        stays(
            "Events",
            &[stored(11, Some(1001), 2..3), stored(13, Some(1003), 4..5)],
        ),
    ] {
        let mut lab = Lab::known();
        lab.came(PUBLISHER, stored(13, None, 0..1));
        let ask = asked(&mut lab.digest);
        assert!(
            lab.digest.answered(&ask, answer.clone()).is_some(),
            "{answer:?}"
        );
        assert_eq!((lab.overlap(), lab.digest.waiting()), (1, 0), "{answer:?}");
        lab.came(PUBLISHER, stored(14, Some(1000), 1..2));
        assert_eq!(lab.overlap(), 2);
        assert_eq!(lab.digest.counts.unanswered, 1);
    }
}

#[test]
fn a_hole_in_what_was_held_is_asked_for_again() {
    let (mut lab, ask) = Lab::start();
    lab.came(PUBLISHER, stored(11, Some(1001), 2..3));
    lab.came(PUBLISHER, stored(13, Some(1003), 4..5));
    let dump = item("TreeDump", &[stored(0, None, 0..2)], 10);
    assert_eq!(lab.digest.answered(&ask, Ok(dump)), None);
    assert_eq!(lab.overlap(), 3);
    let again = asked(&mut lab.digest);
    assert_eq!(again.after, Some(11));
    let missing = item("Events", &[stored(12, Some(1002), 3..4)], 12);
    assert_eq!(lab.digest.answered(&again, Ok(missing)), None);
    assert_eq!((lab.overlap(), lab.digest.waiting()), (5, 0));
}

#[test]
fn another_publisher_of_a_rank_is_asked_in_place_of_the_first() {
    let mut lab = Lab::known();
    lab.came(PUBLISHER, stored(15, None, 0..1));
    let old = asked(&mut lab.digest);
    // One that is in discovery, and then one that is not.
    lab.digest.publishers(sources(&[PUBLISHER, OTHER]));
    let ask = asked(&mut lab.digest);
    assert_eq!(lab.digest.answered(&old, Err("late".into())), None);
    lab.came(OTHER, stored(4, Some(1000), 1..2));
    let dump = item("TreeDump", &[stored(0, None, 0..1)], 3);
    assert_eq!(lab.digest.answered(&ask, Ok(dump)), None);
    assert_eq!(lab.overlap(), 2);
    lab.came(77, stored(1, None, 0..1));
    assert_eq!((lab.overlap(), lab.digest.waiting()), (1, 0));
    assert_eq!(lab.digest.counts.restarts, 1);
}

#[test]
fn who_is_gone_is_waited_for_no_more() {
    let (mut lab, ask) = Lab::start();
    lab.came(PUBLISHER, stored(3, None, 0..2));
    lab.digest.publishers(HashMap::new());
    assert_eq!((lab.overlap(), lab.digest.waiting()), (2, 0));
    assert_eq!(
        lab.digest.answered(&ask, Ok(item("TreeDump", &[], 9))),
        None
    );
    assert_eq!(lab.overlap(), 2);
    let (mut lab, ask) = Lab::start();
    lab.came(PUBLISHER, stored(3, None, 0..2));
    lab.digest.gone(RANK.worker_id);
    assert_eq!((lab.overlap(), lab.digest.waiting()), (0, 0));
    assert_eq!(
        lab.digest.answered(&ask, Ok(item("TreeDump", &[], 9))),
        None
    );
    // All are new when the subscription begins anew.
    let mut lab = Lab::known();
    lab.digest.begin_anew();
    assert_eq!(lab.overlap(), 0);
    lab.digest.publishers(sources(&[PUBLISHER]));
    assert_eq!(asked(&mut lab.digest).after, None);
}

/// A worker that has lost its lease keeps its publisher, and is another worker for all others.
#[test]
fn a_publisher_that_tells_of_another_rank_is_asked_again() {
    for is_awaited in [true, false] {
        let mut lab = match is_awaited {
            true => Lab::start().0,
            false => Lab::known(),
        };
        let other = RankId {
            worker_id: RANK.worker_id + 1,
            ..RANK
        };
        lab.digest
            .publishers(HashMap::from([(PUBLISHER, source(other))]));
        let ask = asked(&mut lab.digest);
        assert_eq!((ask.rank, ask.after), (other, None));
        assert_eq!(lab.digest.waiting(), 1);
    }
}

#[test]
fn events_about_others_ranks_are_dropped() {
    let mut lab = Lab::known();
    let mut lie = stored(11, None, 0..9);
    lie.worker_id += 1;
    lab.came(PUBLISHER, lie.clone());
    assert_eq!((lab.overlap(), lab.digest.counts.strangers), (2, 1));
    // Whoever is not in discovery is believed.
    lab.came(OTHER, lie);
    assert_eq!(lab.overlap(), 2);
    let others = lab.index.overlaps(&[0, 1, 2, 3, 4, 5, 6, 7, 8]);
    assert!(others.iter().any(|one| one.rank != RANK && one.blocks == 9));
}

#[test]
fn what_is_held_is_bounded() {
    let (mut lab, ask) = Lab::start();
    // One stored block in each payload, the rest is padding.
    let padding = "x".repeat(1 << 20);
    let mut sent = 0;
    while lab.digest.waiting() > 0 {
        let mut event = stored(20 + sent, Some(999 + sent), sent..sent + 1);
        event.storage_tier = "device".into();
        if sent == 0 {
            event = stored(20, None, 0..1);
        }
        let other = typed::KvEvent {
            storage_tier: padding.clone(),
            ..stored(20 + sent, None, 0..0)
        };
        came(&mut lab.digest, PUBLISHER, &[event, other]);
        sent += 1;
        assert!(sent < 40, "it is still held");
    }
    assert_eq!(sent as usize, HELD_BYTES_MAX / (1 << 20));
    // All that was held is known all the same, and the answer comes too late.
    assert_eq!(u64::from(lab.overlap()), sent);
    assert_eq!(lab.digest.counts.unanswered, 1);
    assert_eq!(
        lab.digest.answered(&ask, Ok(item("TreeDump", &[], 9))),
        None
    );
    assert_eq!(u64::from(lab.overlap()), sent);
}

/// A worker: its events so far, and what it holds, block by block of one sequence.
#[derive(Default)]
struct Worker {
    events: Vec<typed::KvEvent>,
    holds: [bool; 8],
}

impl Worker {
    /// Stores or removes a block, or clears; the events are numbered from 1.
    fn act(&mut self, block: u64, act: u8) -> typed::KvEvent {
        let id = self.events.len() as u64 + 1;
        let at = block as usize;
        let parent_held = at == 0 || self.holds[at - 1];
        let event = match act {
            0..=5 if parent_held => {
                self.holds[at] = true;
                stored(
                    id,
                    block.checked_sub(1).map(|before| 1000 + before),
                    block..block + 1,
                )
            }
            6..=8 => {
                // What lies behind it goes with it.
                self.holds[at..].fill(false);
                let block_hashes = (1000 + block..1008).collect();
                changed(id, typed::KvChange::Removed { block_hashes })
            }
            9 => {
                self.holds.fill(false);
                changed(id, typed::KvChange::Cleared)
            }
            _ => changed(
                id,
                typed::KvChange::Removed {
                    block_hashes: vec![],
                },
            ),
        };
        self.events.push(event.clone());
        event
    }

    fn overlap(&self) -> u32 {
        self.holds.iter().take_while(|holds| **holds).count() as u32
    }

    fn answer(&self, ask: &Ask, how: u8) -> Result<Vec<u8>, String> {
        let last = self.events.len() as u64;
        match (how, ask.after) {
            (0, _) => Err("no answer".to_owned()),
            (1..=4, Some(after)) => Ok(item("Events", &self.events[after as usize..], last)),
            _ => {
                let length = u64::from(self.overlap());
                Ok(item("TreeDump", &[stored(0, None, 0..length)], last))
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    /// The worker does something, and the event arrives, or does not.
    Act(u64, u8, bool),
    /// Questions are answered, one way or another.
    Answer(u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let act = (0_u64..8, 0_u8..10, prop::bool::weighted(0.8));
    let act = act.prop_map(|(block, act, arrives)| Step::Act(block, act, arrives));
    prop::collection::vec(
        prop_oneof![4 => act, 1 => (0_u8..8).prop_map(Step::Answer)],
        0..80,
    )
}

proptest! {
    /// Whatever is lost, and however questions are answered: in the end nothing is claimed that the
    /// worker does not hold, and if the last question was answered nothing is missing.
    #[test]
    fn what_is_known_is_true_in_the_end(steps in steps()) {
        let mut worker = Worker::default();
        let mut lab = Lab { digest: Digest::new(0), index: Index::new(1000, 64) };
        lab.digest.publishers(sources(&[PUBLISHER]));
        let mut refused = false;
        let mut open = lab.digest.asks();
        let mut answer = |lab: &mut Lab, worker: &Worker, open: &mut Vec<Ask>, how: u8| {
            while let Some(ask) = open.pop() {
                let said = worker.answer(&ask, how);
                let complete = matches!(how, 5..) || ask.after.is_none();
                match said {
                    Err(_) => refused = true,
                    // All of it is known again.
                    Ok(_) if complete => refused = false,
                    Ok(_) => {}
                }
                lab.digest.answered(&ask, said);
                open.extend(lab.digest.asks());
            }
        };
        for step in steps {
            match step {
                Step::Act(block, act, arrives) => {
                    let event = worker.act(block, act);
                    if arrives {
                        lab.came(PUBLISHER, event);
                    }
                    open.extend(lab.digest.asks());
                }
                Step::Answer(how) => answer(&mut lab, &worker, &mut open, how),
            }
        }
        // One more event that arrives tells what is missing.
        let event = worker.act(7, 10);
        lab.came(PUBLISHER, event);
        open.extend(lab.digest.asks());
        answer(&mut lab, &worker, &mut open, 5);
        prop_assert_eq!(lab.digest.waiting(), 0);
        let (known, truth) = (lab.overlap(), worker.overlap());
        prop_assert!(known <= truth, "{} of {}", known, truth);
        if !refused {
            prop_assert_eq!(known, truth);
        }
    }
}
