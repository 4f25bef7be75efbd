//! What the flight recorder of a shard says of requests, connections and commands; and sockets that
//! shards are handed.

mod common;

use std::net::TcpListener;
use std::sync::Arc;

use common::*;
use corelane_engine::config::RingKind;
use corelane_engine::directory::{Ack, Policy};
use corelane_engine::shard::Command;
use corelane_engine::stats::flight::{Answered, Kind, Order, Record, Side, Why};

fn records(router: &Router) -> Vec<Record> {
    let mut out = Vec::new();
    router.handle.stats.flight.read(0, usize::MAX, &mut out);
    out
}

fn of(records: &[Record], kind: Kind) -> Vec<&Record> {
    records
        .iter()
        .filter(|record| record.kind == kind as u8)
        .collect()
}

#[test]
fn a_request_is_followed_from_its_beginning_to_its_reply() {
    for ring in rings() {
        let (router, worker) = (Router::start(ring), Worker::start(0xab, Manner::Accept));
        router.route_to(Policy::RoundRobin, Ack::OnAccept, &[&worker]);
        let mut caller = Caller::dial(router.address);
        let sent = frame(LISTEN_PATH, b"payload");
        caller.send(&sent);
        assert_eq!(caller.reply(), "");
        caller.send(&frame("0/no/such/one", b"x"));
        assert!(caller.reply().starts_with("Server unavailable"));
        drop(caller);
        wait_until("the connection is closed", || {
            let all = records(&router);
            let closed = of(&all, Kind::Closed);
            closed
                .iter()
                .any(|one| one.detail == Side::Downstream as u32)
        });
        let all = records(&router);
        assert!(all.iter().map(|one| one.number).eq(1..=all.len() as u64));
        assert!(all.is_sorted_by_key(|one| one.at_ns));

        let begun = of(&all, Kind::Begun)[0];
        let request = begun.subject;
        let connection = (begun.value >> 32) as u32;
        // What is forwarded: all but the path and its length.
        let bytes = sent.len() - 2 - LISTEN_PATH.len();
        assert_eq!((begun.detail, begun.value as u32), (0, bytes as u32));
        let life: Vec<&Record> = all
            .iter()
            .filter(|one| one.number >= begun.number && one.subject == request)
            .filter(|one| (Kind::Begun as u8..=Kind::Replied as u8).contains(&one.kind))
            .take(5)
            .collect();
        let kinds: Vec<u8> = life.iter().map(|one| one.kind).collect();
        let wanted = [
            Kind::Begun,
            Kind::Routed,
            Kind::Forwarded,
            Kind::Answered,
            Kind::Replied,
        ];
        assert_eq!(kinds, wanted.map(|kind| kind as u8), "{ring:?}: {all:?}");
        assert_eq!((life[1].detail, life[1].value), (0, 0xab));
        assert_eq!(life[2].value, life[2].at_ns - begun.at_ns);
        assert_eq!(life[3].detail, Answered::Accepted as u32);
        assert_eq!((life[4].detail, life[4].value), (0, connection.into()));

        let refused = of(&all, Kind::Refused)[0];
        assert_eq!(
            (refused.detail, refused.subject),
            (Why::UnknownEndpoint as u32, connection)
        );
        let opened: Vec<u32> = of(&all, Kind::Opened)
            .iter()
            .map(|one| one.detail)
            .collect();
        assert_eq!(opened, [Side::Upstream as u32, Side::Downstream as u32]);
        let order = of(&all, Kind::Command)[0];
        assert_eq!((order.detail, order.value), (Order::Directory as u32, 1));
    }
}

#[test]
fn the_second_instance_is_the_second_attempt() {
    for ring in rings() {
        let busy = Worker::start(1, Manner::Overloaded);
        let (router, free) = (Router::start(ring), Worker::start(2, Manner::Accept));
        router.route_to(Policy::RoundRobin, Ack::OnAccept, &[&busy, &free]);
        let mut caller = Caller::dial(router.address);
        for _ in 0..2 {
            caller.send(&frame(LISTEN_PATH, b"x"));
            assert_eq!(caller.reply(), "");
        }
        let all = records(&router);
        let routed = of(&all, Kind::Routed);
        let attempts: Vec<_> = routed.iter().map(|one| (one.detail, one.value)).collect();
        assert!(
            attempts.windows(2).any(|two| two == [(0, 1), (1, 2)]),
            "{attempts:?}"
        );
        let said: Vec<u32> = of(&all, Kind::Answered)
            .iter()
            .map(|one| one.detail)
            .collect();
        assert!(said.contains(&(Answered::Overloaded as u32)), "{said:?}");
    }
}

#[test]
fn it_can_be_switched_off_and_forgets_what_is_old() {
    for ring in rings() {
        for (records_max, kept) in [(0, 0), (16, 16)] {
            let router = Router::with(ring, |config| config.flight_records = records_max);
            let worker = Worker::start(1, Manner::Accept);
            router.route_to(Policy::RoundRobin, Ack::OnAccept, &[&worker]);
            let mut caller = Caller::dial(router.address);
            for _ in 0..20 {
                caller.send(&frame(LISTEN_PATH, b"x"));
                assert_eq!(caller.reply(), "");
            }
            let all = records(&router);
            assert_eq!(all.len(), kept, "{all:?}");
            let written = router.handle.stats.flight.written();
            assert_eq!(all.last().map_or(0, |one| one.number), written);
        }
    }
}

/// Whoever shares a socket takes what another one was woken for, and must not wait in accept.
#[test]
fn shards_on_different_rings_share_a_socket() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    let listener = Arc::new(listener);
    let worker = Worker::start(1, Manner::Accept);
    let mut shared: Vec<RingKind> = rings();
    shared.push(RingKind::Epoll);
    let start = |ring: &RingKind| {
        let router = Router::with(*ring, |config| config.handed = Some(Arc::clone(&listener)));
        assert_eq!(router.address, address);
        router.route_to(Policy::RoundRobin, Ack::OnAccept, &[&worker]);
        router.handle.command(Command::Accept).unwrap();
        router
    };
    let routers: Vec<Router> = shared.iter().map(start).collect();
    let mut callers: Vec<Caller> = (0..60).map(|_| Caller::dial(address)).collect();
    for round in 0..2 {
        for caller in &mut callers {
            caller.send(&frame(LISTEN_PATH, b"x"));
        }
        assert!(
            callers.iter_mut().all(|caller| caller.reply().is_empty()),
            "{round}"
        );
    }
    let accepted = |router: &Router| router.handle.stats.shard.connections_accepted.get();
    assert_eq!(routers.iter().map(accepted).sum::<u64>(), 60);
}
