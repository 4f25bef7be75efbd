//! The real shard on a simulated network: seeded scenarios in which callers, workers and the
//! network do their worst, and what must hold all the same.
//!
//! A failure names its seed; `CORELANE_SEED=<seed> cargo test -p corelane-engine --test simulation`
//! plays that scenario alone, step for step the same, and `<first>..<end>` plays as many as wanted
//! (behind `--`, `relayed` or `thousand` names the kind).

#![allow(missing_docs, unreachable_pub)]

mod common;

#[path = "simulation/answer.rs"]
mod answer;
#[path = "simulation/book.rs"]
mod book;
#[path = "simulation/caller.rs"]
mod caller;
#[path = "simulation/dice.rs"]
mod dice;
#[path = "simulation/heard.rs"]
mod heard;
#[path = "simulation/home.rs"]
mod home;
#[path = "simulation/scenario.rs"]
mod scenario;
#[path = "simulation/worker.rs"]
mod worker;

use corelane_codec::call_home;
use corelane_codec::control_message::{
    self, NewControlMessage, PayloadCodec, RequestType, StreamType, TcpConnection,
    TcpConnectionInfo,
};
use corelane_codec::{reply_frame, request_frame, two_part};
use corelane_engine::config::ShardConfig;
use corelane_engine::directory::{Ack, Instance, Policy, RelayTimes};
use corelane_engine::ring::sim::Faults;
use corelane_engine::stats::Stats;

use caller::{Exit, State};
use scenario::{Weather, World};
use worker::Manner;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// The scenarios of one test, or those that the environment names: `7`, or `2000..9000`.
fn play_all(seeds: Range<u64>, run: fn(u64) -> Arc<Stats>, events: &[&str]) {
    // Big tables of thousands of shards: their untouched pages must stay untouched.
    // SAFETY: sets a number of the allocator.
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, 128 << 10) };
    let number = |text: &str| {
        text.parse::<u64>()
            .expect("CORELANE_SEED is a number or a range")
    };
    let named = std::env::var("CORELANE_SEED").ok();
    let seeds = match named
        .as_deref()
        .map(|text| text.split_once("..").ok_or(text))
    {
        None => seeds,
        Some(Ok((first, end))) => number(first)..number(end),
        Some(Err(seed)) => {
            run(number(seed));
            return;
        }
    };
    let mut seen = BTreeMap::new();
    let mut ends_badly = |seed: &u64| {
        let stats = catch_unwind(AssertUnwindSafe(|| run(*seed)));
        for (name, _, _, value) in stats.iter().flat_map(|stats| stats.shard.each()) {
            *seen.entry(name).or_insert(0) += value;
        }
        stats.is_err()
    };
    // Some failures say more than one; all say no more than some.
    let failed: Vec<u64> = seeds.filter(&mut ends_badly).take(FAILURES_MAX).collect();
    assert!(
        failed.is_empty(),
        "replay with CORELANE_SEED= one of {failed:?}"
    );
    for name in events {
        assert!(seen[name] > 0, "no scenario shows {name}: {seen:?}");
    }
}

/// What some scenario must have shown, so that the scenarios are worth their time.
const EVENTS: [&str; 15] = [
    "accepted_upstream",
    "retried",
    "refused_unknown_endpoint",
    "refused_no_instance",
    "refused_frame_too_large",
    "refused_bad_frame",
    "refused_by_instances",
    "callers_told",
    "callers_untold",
    "callers_settled",
    "ack_timeouts",
    "protocol_errors",
    "slow_frames_closed",
    "upstreams_lost",
    "receives_paused",
];

/// The same where responses pass through the router.
const RELAYED_EVENTS: [&str; 11] = [
    "relays_begun",
    "relays_finished",
    "relays_retried",
    "relays_failed",
    "relays_cut",
    "relays_abandoned",
    "relay_timeouts",
    "homes_refused",
    "refused_bad_envelope",
    "protocol_errors",
    "receives_paused",
];

const FAILURES_MAX: usize = 10;

#[test]
fn a_thousand_scenarios_end_well() {
    play_all(0..1000, scenario::run, &EVENTS);
}

#[test]
fn a_thousand_more_scenarios_end_well() {
    play_all(1000..2000, scenario::run, &EVENTS);
}

#[test]
fn five_hundred_relayed_scenarios_end_well() {
    play_all(0..500, scenario::run_relayed, &RELAYED_EVENTS);
}

#[test]
fn a_seed_is_a_run() {
    let counted = |seed| scenario::run(seed).shard.each();
    let relayed = |seed| scenario::run_relayed(seed).shard.each();
    for seed in 3000..3020 {
        assert_eq!(counted(seed), counted(seed), "seed {seed}");
        assert_eq!(relayed(seed), relayed(seed), "relayed seed {seed}");
    }
    assert_ne!(counted(3000), counted(3001));
}

/// A calm world with one route and one worker.
fn calm(ack: Ack, change: impl FnOnce(&mut ShardConfig)) -> World {
    let mut world = World::new(1, Weather::Calm, change);
    world.add_route(Policy::RoundRobin, ack);
    world.add_worker();
    world.publish();
    world.until("the worker is connected", |world| {
        world.stats.shard.instances_ready.get() == 1
    });
    world
}

#[test]
fn a_caller_who_has_shut_his_side_down_gets_what_he_is_owed() {
    for ack in [Ack::OnForward, Ack::OnAccept] {
        let mut world = calm(ack, |_| {});
        world.add_caller(&[10, 10]);
        let bytes = world.book.entries.iter().map(|entry| entry.frame.len());
        world.callers[0].exit = Some((bytes.sum(), Exit::Half));
        world.until("he has his replies", |world| world.callers[0].replies == 2);
        world.settle();
        world.end();
    }
}

#[test]
fn a_frame_that_found_all_tables_full_is_served_when_there_is_room() {
    let mut world = calm(Ack::OnAccept, |config| config.in_flight_max = 2);
    world.workers[0].manner = Manner::Late;
    for _ in 0..5 {
        world.add_caller(&[10, 10, 10]);
    }
    world.settle();
    world.end();
}

#[test]
fn a_dead_worker_is_dialled_now_and_then() {
    let mut world = calm(Ack::OnAccept, |_| {});
    world.workers[0].die_for_good(&world.net);
    let end_ns = world.net.now_ns() + 120_000_000_000;
    world.until("two minutes have passed", |world| {
        world.net.now_ns() > end_ns
    });
    let failures = world.stats.shard.connect_failures.get();
    assert!(
        (20..40).contains(&failures),
        "{failures} dials in two minutes"
    );
    assert!(world.stats.shard.timers.get() < 4);
    world.end();
}

#[test]
fn words_of_an_instance_that_mean_nothing_are_a_refusal() {
    let mut world = calm(Ack::OnAccept, |_| {});
    world.workers[0].manner = Manner::Babble;
    world.add_caller(&[10; 8]);
    // The book wants a refusal that the caller's client understands.
    world.settle();
    assert!(world.stats.shard.protocol_errors.get() > 0);
    world.end();
}

#[test]
fn a_large_frame_that_finds_no_descriptor_is_refused() {
    let mut world = calm(Ack::OnAccept, |_| {});
    world.net.set_faults(Faults {
        no_socket: 1000,
        ..Faults::NONE
    });
    world.add_caller(&[90_000]);
    world.settle();
    assert!(world.book.entries[0].reply.as_deref() != Some(""));
    world.end();
}

#[test]
fn a_large_frame_cut_short_by_half_a_close_leaves_nothing_behind() {
    for ack in [Ack::OnForward, Ack::OnAccept] {
        let mut world = calm(ack, |_| {});
        world.add_caller(&[90_000]);
        world.callers[0].exit = Some((80_000, Exit::Half));
        world.until("his connection is closed", |world| {
            world.callers[0].state == State::Lost
        });
        assert!(world.book.entries[0].reply.as_deref() != Some(""));
        world.end();
    }
}

#[test]
fn an_instance_whose_first_dial_failed_is_dialled_again() {
    let mut world = World::new(1, Weather::Calm, |_| {});
    world.net.set_faults(Faults {
        no_socket: 1000,
        ..Faults::NONE
    });
    world.add_route(Policy::RoundRobin, Ack::OnForward);
    world.add_worker();
    world.publish();
    world.until("the dial has failed", |world| {
        world.stats.shard.connect_failures.get() > 0
    });
    world.net.set_faults(Faults::NONE);
    world.until("it is connected", |world| {
        world.stats.shard.instances_ready.get() == 1
    });
    world.end();
}

#[test]
fn callers_who_never_finish_their_frames_cannot_take_all_buffers_for_ever() {
    let mut world = calm(Ack::OnAccept, |config| config.buffers = 16);
    for _ in 0..20 {
        world.add_caller(&[10]).exit = Some((5, Exit::Stall));
    }
    world.until("they are all there", |world| {
        world.stats.shard.connections_accepted.get() == 20
    });
    world.add_caller(&[10]);
    world.until("the one who does is served", |world| {
        world.callers[20].replies == 1
    });
    world.end();
}

#[test]
fn large_frames_kept_for_a_retry_do_not_hold_each_other_up() {
    let mut world = calm(Ack::OnForward, |config| config.buffers = 128);
    for _ in 0..6 {
        world.add_caller(&[95_000, 95_000]);
    }
    world.settle();
    world.end();
}

#[test]
fn a_large_frame_to_an_instance_that_reads_nothing_ends() {
    for frames in [1, 3] {
        let mut world = calm(Ack::OnForward, |config| {
            config.message_bytes_max = 8 << 20;
        });
        world.workers[0].manner = Manner::Deaf;
        for _ in 0..frames {
            world.add_caller(&[4 << 20]);
        }
        world.settle();
        world.end();
    }
}

/// The frame of a bidirectional request of somebody who is called home there.
fn two_way_frame(home: SocketAddr) -> Vec<u8> {
    let address = home.to_string();
    let to = |subject, stream_type| TcpConnection {
        address: &address,
        subject,
        context: "id-1",
        stream_type,
    };
    let message = NewControlMessage {
        id: "id-1",
        request_type: RequestType::ManyIn,
        payload_codec: PayloadCodec::Json,
        connection_info: to("out", StreamType::Response),
        metadata: &[],
        frontend_send_ts_ns: None,
        request_stream_connection_info: Some(to("in", StreamType::Request)),
    };
    let (mut control, mut envelope) = (Vec::new(), Vec::new());
    message.write(&mut control).unwrap();
    two_part::write(&control, b"", &mut envelope);
    common::frame(&scenario::listen_path(0), &envelope)
}

/// Callers of bidirectional calls who write and write, and workers who dial for that and do not
/// read it.
#[test]
fn request_streams_that_nobody_takes_cannot_keep_all_buffers() {
    let mut world = World::with(1, Weather::Calm, true, |config| config.buffers = 64);
    // No deadline is to end them.
    world.add_route(Policy::RoundRobin, Ack::OnForward).relay = Some(RelayTimes {
        home_ns: 0,
        first_item_ns: 0,
        inactivity_ns: 0,
    });
    let home: SocketAddr = "10.2.0.7:9".parse().unwrap();
    let worker: SocketAddr = "10.1.0.77:1".parse().unwrap();
    let (homes, asked) = (world.net.peer_listen(home), world.net.peer_listen(worker));
    world.directory.routes[0].instances.push(Instance {
        id: 1,
        address: worker,
        path: b"1/sim/worker/0".to_vec(),
    });
    world.publish();
    world.until("the worker is connected", |world| {
        world.stats.shard.instances_ready.get() == 1
    });
    let requests = world.net.peer_accept(asked).unwrap();
    let mut frames = Vec::new();
    let mut feeders = Vec::new();
    for number in 0..12 {
        let caller = world.net.peer_connect(scenario::router()).unwrap();
        let frame = two_way_frame(home);
        assert_eq!(world.net.peer_write(caller, &frame), frame.len());
        let frame = loop {
            world.step();
            frames.extend(world.net.peer_read(requests, usize::MAX));
            if let Some(frame) = request_frame::decode_strict(&frames).frame() {
                break frames.drain(..frame.frame_bytes).collect::<Vec<u8>>();
            }
        };
        // An acknowledgement, and the call for the request stream alone.
        world.net.peer_write(requests, &reply_frame::ACCEPTED);
        let ticket = request_ticket(&frame);
        let taker = world.net.peer_connect(scenario::relay_home()).unwrap();
        let mut handshake = Vec::new();
        call_home::write_handshake(&ticket, StreamType::Request, &mut handshake);
        world.net.peer_write(taker, &handshake);
        // The router calls the caller home twice: for the response, then for this.
        while feeders.len() < 2 * (number + 1) {
            world.step();
            feeders.extend(world.net.peer_accept(homes));
        }
    }
    let data = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0];
    let mut message = [&data[..], &[0; 8]].concat();
    message.resize(60_000, b'1');
    let write = |world: &mut World| {
        for feeder in feeders.iter().skip(1).step_by(2) {
            world.net.peer_write(*feeder, &message);
        }
    };
    for _ in 0..100 {
        write(&mut world);
        world.step();
    }
    let held = world.stats.shard.buffers_held.get();
    assert!(held > 40, "{held} buffers are held");
    world.add_caller(&[10]);
    world.until("somebody else is heard", |world| {
        world.callers[0].replies == 1
    });
}

fn request_ticket(frame: &[u8]) -> String {
    let frame = request_frame::decode_strict(frame).frame().unwrap();
    let parts = two_part::decode(frame.payload, None).frame().unwrap();
    let control = control_message::decode(&frame.payload[parts.header]).unwrap();
    let info = control.request_stream_connection_info.unwrap();
    let mut scratch = [0; 1024];
    let info = TcpConnectionInfo::parse(&info, &mut scratch).unwrap();
    info.subject.to_cow().into_owned()
}
