//! Connections and cores: where they come from is counted, a program steers them, and a core with
//! many hands new ones over; on both rings.

mod common;

use std::net::TcpStream;
use std::sync::Arc;

use common::*;
use corelane_engine::balance::{Imbalance, Neighbour};
use corelane_engine::command::{Command, Report};
use corelane_engine::config::{RingKind, ShardConfig};
use corelane_engine::directory::{Ack, Policy};
use corelane_engine::placement::{affinity, pin_current_thread};
use corelane_engine::stats::Stats;
use corelane_engine::steering::Program;

/// Two routers on one port, on the first CPU and on the last.
fn two(rings: [RingKind; 2], change: impl Fn(&mut ShardConfig)) -> [Router; 2] {
    let last = *affinity().unwrap().last().unwrap();
    let first = Router::with(rings[0], &change);
    let address = first.address;
    let second = Router::with(rings[1], |config| {
        change(config);
        (config.shard, config.cpu, config.listen) = (1, last, Some(address));
    });
    [first, second]
}

fn meet(routers: &[Router; 2]) {
    for (own, other) in [(0, 1), (1, 0)] {
        let neighbour = Neighbour {
            stats: Arc::clone(&routers[other].handle.stats),
            commands: routers[other].handle.commands(),
        };
        let command = Command::Neighbours(vec![neighbour]);
        routers[own].handle.command(command).unwrap();
    }
}

fn stats(router: &Router) -> &Stats {
    &router.handle.stats
}

/// Connections made on one CPU, over loopback: that CPU handles their packets.
fn dial_on(cpu: usize, router: &Router, count: usize) -> Vec<TcpStream> {
    let address = router.address;
    let dial = move || {
        pin_current_thread(cpu).unwrap();
        (0..count)
            .map(|_| TcpStream::connect(address).unwrap())
            .collect()
    };
    std::thread::spawn(dial).join().unwrap()
}

#[test]
fn connections_are_counted_by_the_cpu_that_has_their_packets() {
    let cpus = affinity().unwrap();
    for ring in rings() {
        let router = Router::start(ring);
        let at = &stats(&router).shard;
        let local = dial_on(cpus[0], &router, 5);
        wait_until("all are counted", || at.connections_local.get() == 5);
        let remote = match cpus.get(1) {
            Some(other) => dial_on(*other, &router, 3),
            None => Vec::new(),
        };
        let count = remote.len() as u64;
        wait_until("the others too", || at.connections_remote.get() == count);
        wait_until("they are shown", || at.callers.get() == 5 + count);
        drop((local, remote));
        wait_until("they are gone", || at.callers.get() == 0);
        assert_eq!(at.connections_local.get(), 5);
        assert_eq!(at.receive_queues.get(), 0, "loopback has none");
    }
}

#[test]
fn a_program_brings_each_connection_to_the_core_of_its_packets() {
    let cpus = affinity().unwrap();
    let (first, last) = (cpus[0], cpus[cpus.len() - 1]);
    if first == last {
        return;
    }
    let places = [(first, 0), (last, 1)];
    for ring in rings() {
        let routers = two([ring; 2], |config| {
            config.steering = Some(Program::by_cpu(&places));
        });
        assert!(
            routers
                .iter()
                .all(|router| router.handle.unsteered.is_none())
        );
        let open = [
            dial_on(first, &routers[0], 20),
            dial_on(last, &routers[0], 20),
        ];
        for router in &routers {
            let at = &stats(router).shard;
            wait_until("each has its own", || at.connections_local.get() == 20);
            assert_eq!(at.connections_remote.get(), 0);
        }
        drop(open);
    }
}

#[test]
fn a_core_with_many_hands_new_ones_over_and_they_are_served() {
    let all = rings();
    let mixed = [all[0], all[all.len() - 1]];
    for rings in [[all[0]; 2], mixed, [mixed[1], mixed[0]]] {
        let routers = two(rings, |config| {
            config.imbalance = Imbalance::LeastConnections;
            // All come to the first one.
            config.steering = Some(Program::by_cpu(
                &affinity()
                    .unwrap()
                    .iter()
                    .map(|cpu| (*cpu, 0))
                    .collect::<Vec<_>>(),
            ));
        });
        meet(&routers);
        let worker = Worker::start(1, Manner::Accept);
        for router in &routers {
            router.route_to(Policy::RoundRobin, Ack::OnForward, &[&worker]);
        }
        let mut callers: Vec<Caller> = (0..40).map(|_| Caller::dial(routers[0].address)).collect();
        let of = |router: &Router| stats(router).shard.callers.get();
        wait_until("all are in", || of(&routers[0]) + of(&routers[1]) == 40);
        let moved = stats(&routers[0]).shard.connections_handed_over.get();
        let taken = || stats(&routers[1]).shard.connections_taken_over.get();
        wait_until("all have arrived", || taken() == moved);
        // Until they differ by less than four.
        assert_eq!(moved, 18, "of 40");
        for caller in &mut callers {
            caller.send(&frame(LISTEN_PATH, b"{}"));
            assert_eq!(caller.reply(), "");
        }
        assert!(stats(&routers[1]).shard.requests.get() >= moved);
    }
}

#[test]
fn receive_queues_are_polled_or_it_is_said_that_they_are_not() {
    for ring in rings() {
        let router = Router::with(ring, |config| config.busy_poll_us = 20);
        let polled = || stats(&router).shard.busy_poll_us.get() == 20;
        let mut refused = false;
        wait_until("it polls, or says why not", || {
            while let Some(report) = router.handle.reports.next() {
                refused |= matches!(report, Report::NoBusyPoll { errno } if errno > 0);
            }
            refused || polled()
        });
        assert_ne!(refused, polled());
        let mut caller = Caller::dial(router.address);
        caller.send(&frame(LISTEN_PATH, b"{}"));
        assert!(
            caller.reply().starts_with("Server unavailable"),
            "it serves"
        );
    }
}

#[test]
fn who_gets_connections_changes_while_it_runs() {
    let cpus = affinity().unwrap();
    let (first, last) = (cpus[0], cpus[cpus.len() - 1]);
    if first == last {
        return;
    }
    for ring in rings() {
        let routers = two([ring; 2], |_| {});
        meet(&routers);
        let steer = |place: u32| {
            let all: Vec<(usize, u32)> = cpus.iter().map(|cpu| (*cpu, place)).collect();
            let command = Command::Steer(Program::by_cpu(&all));
            let before = stats(&routers[1]).shard.ticks.get();
            routers[1].handle.command(command).unwrap();
            let ticks = || stats(&routers[1]).shard.ticks.get();
            wait_until("it is taken", || ticks() >= before + 2);
        };
        let accepted = |at: usize| stats(&routers[at]).shard.connections_accepted.get();
        steer(1);
        let mut open = dial_on(first, &routers[0], 20);
        wait_until("all are there", || accepted(1) == 20);
        steer(0);
        open.extend(dial_on(first, &routers[0], 20));
        wait_until("all are here", || accepted(0) == 20);
        assert_eq!(accepted(1), 20);

        let mut settings = ShardConfig::new(0, first, ring, None).live();
        settings.imbalance = Imbalance::LeastConnections;
        routers[0]
            .handle
            .command(Command::Settings(settings))
            .unwrap();
        let shard = &stats(&routers[0]).shard;
        wait_until("it is told", || shard.settings.get() == 1);
        open.extend(dial_on(first, &routers[0], 20));
        wait_until("they are dealt out", || accepted(0) + accepted(1) == 60);
        let handed = || shard.connections_handed_over.get();
        wait_until("what is there was handed over", || {
            accepted(1) == 20 + handed()
        });
        // The first ones stay, as there were as many here as there.
        assert!((5..=9).contains(&handed()), "{}", handed());
    }
}

#[test]
fn polling_begins_and_ends_while_it_runs() {
    for ring in rings() {
        let router = Router::start(ring);
        let mut refused = false;
        for (round, wanted_us) in [20, 50, 0].into_iter().enumerate() {
            let mut settings = ShardConfig::new(0, 0, ring, None).live();
            settings.busy_poll_us = wanted_us;
            let command = Command::Settings(settings);
            router.handle.command(command).unwrap();
            let shard = &stats(&router).shard;
            wait_until("it is told", || shard.settings.get() == round as u64 + 1);
            while let Some(report) = router.handle.reports.next() {
                refused |= matches!(report, Report::NoBusyPoll { errno } if errno > 0);
            }
            let polled = if refused { 0 } else { wanted_us };
            assert_eq!(shard.busy_poll_us.get(), u64::from(polled));
        }
        let mut caller = Caller::dial(router.address);
        caller.send(&frame(LISTEN_PATH, b"{}"));
        assert!(caller.reply().starts_with("Server unavailable"));
    }
}
