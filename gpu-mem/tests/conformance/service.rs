//! The service as a whole: memory that is short, sockets, limits, the end (lines 23, 24).

use crate::common;
use crate::common::{PATIENCE, Service, until};
use crate::{is_error, kinds};
use corelane_gpu_mem::backend::host::{GRANULARITY_BYTES, HostConfig};
use corelane_gpu_mem::client::Session;
use corelane_gpu_mem::lock::{LockType, State};
use corelane_gpu_mem::protocol::v1::{
    AllocateRequest, CommitRequest, HandshakeRequest, MetadataListRequest, MetadataPutRequest,
    Reply,
};
use corelane_gpu_mem::server::{Server, ServerConfig, ServerError};
use corelane_gpu_mem::stats::Counter;
use std::path::Path;
use std::time::Duration;

/// With a longer time where the first is too short: on a busy machine memory may come back late.
#[test]
fn b23_memory_that_is_short_is_waited_for_times_out_and_dies_with_its_client() {
    let shorter = [400, 4_000].map(Duration::from_millis);
    let passes = |time| std::panic::catch_unwind(move || b23_within(time)).is_ok();
    if !shorter.into_iter().any(passes) {
        b23_within(Duration::from_secs(30));
    }
}

fn b23_within(retry_timeout: Duration) {
    let host = HostConfig {
        capacity_bytes: Some(GRANULARITY_BYTES),
        ..HostConfig::default()
    };
    let service = Service::with(host, |config| {
        for pool in &mut config.pools {
            pool.domain.retry_timeout = Some(retry_timeout);
        }
    });
    let hog = || {
        let dial = service.dial("kv_cache.sock");
        let mut hog = Session::open(&dial, LockType::Rw, Some(PATIENCE)).expect("granted");
        hog.allocate(1, "kv").expect("memory");
        hog
    };
    let (mut writer, _) = service.holder(LockType::Rw);
    let first = hog();
    writer.say(AllocateRequest {
        size: 1,
        tag: "t".into(),
    });
    until(
        || service.handle.count(Counter::AllocationOom) == 1,
        || "the allocation found memory".into(),
    );
    drop(first);
    assert!(
        matches!(writer.hear(), Some(Reply::Allocate(_))),
        "it comes back from elsewhere"
    );
    let late = writer.ask(AllocateRequest {
        size: 1,
        tag: "t".into(),
    });
    assert!(is_error(&late, "Timed out"));
    writer.say(AllocateRequest {
        size: 1,
        tag: "t".into(),
    });
    until(
        || service.handle.count(Counter::AllocationOom) == 3,
        || "no third shortage".into(),
    );
    drop(writer);
    service.until(|state| state.state == State::Empty);
    assert_eq!(
        kinds(&service)
            .iter()
            .filter(|kind| *kind == "allocation_oom")
            .count(),
        3
    );
    drop(hog());
}

#[test]
fn b24_a_stale_socket_is_replaced_and_a_living_one_is_not() {
    let service = Service::start();
    let again = |dir: &Path| {
        Server::bind(ServerConfig::new(common::pools(dir, HostConfig::default()))).map(|_| ())
    };
    assert!(matches!(
        again(service.dir.path()),
        Err(ServerError::AlreadyRunning { .. })
    ));
    assert_eq!(
        service.state().state,
        State::Empty,
        "the living one goes on"
    );
    let Service { dir, handle } = service;
    drop(handle);
    assert!(
        !dir.path().join("weights.sock").exists(),
        "a stop removes its sockets"
    );
    drop(std::os::unix::net::UnixListener::bind(
        dir.path().join("weights.sock"),
    ));
    again(dir.path()).expect("a stale socket is replaced");
}

#[test]
fn silence_and_half_frames_have_an_end() {
    let service = Service::with(HostConfig::default(), |config| {
        config.first_frame_timeout = Duration::from_millis(50);
    });
    assert!(service.raw().is_dropped(), "silence");
    assert_eq!(service.handle.count(Counter::DeadlinesPassed), 1);
    // Another service: there it would be a race to be the first to say something.
    let service = Service::with(HostConfig::default(), |config| {
        config.first_frame_timeout = PATIENCE;
        config.frame_timeout = Duration::from_millis(50);
    });
    let (mut writer, _) = service.holder(LockType::Rw);
    writer.say_bytes(&[0, 0, 0, 9, 1]);
    assert!(writer.is_dropped(), "half a frame");
    service.until(|state| state.state == State::Empty);
    assert_eq!(service.handle.count(Counter::DeadlinesPassed), 1);
}

/// Publishes metadata whose keys are so long together.
fn publish_keys(service: &Service, bytes: usize) {
    let (mut writer, _) = service.holder(LockType::Rw);
    let id = writer.allocate(1).allocation_id;
    for number in 0..4 {
        let key = format!("{number}{}", "k".repeat(bytes / 4));
        let put = MetadataPutRequest {
            key,
            ..crate::put(&id, 0)
        };
        assert!(matches!(writer.ask(put), Reply::MetadataPut(_)));
    }
    assert!(matches!(writer.ask(CommitRequest {}), Reply::Commit(_)));
}

#[test]
fn who_does_not_read_or_ends_no_frame_makes_room_for_those_who_do() {
    let service = Service::with(HostConfig::default(), |config| {
        (config.frame_timeout, config.held_bytes_max) = (PATIENCE, 2 << 20);
    });
    publish_keys(&service, 800 << 10);
    let list = || MetadataListRequest { prefix: "".into() };
    let (mut honest, _) = service.holder(LockType::Ro);
    let lazy: Vec<_> = (0..4)
        .map(|_| {
            let (mut lazy, _) = service.holder(LockType::Ro);
            lazy.say(list());
            lazy
        })
        .collect();
    let shed = || service.handle.count(Counter::ConnectionsShed);
    until(
        || shed() >= 2,
        || format!("{} of {} shed", shed(), lazy.len()),
    );
    let listed = honest.ask(list());
    assert!(matches!(listed, Reply::MetadataList(keys) if keys.keys.len() == 4));
    let shed_before = shed();
    let slow: Vec<_> = (0..4)
        .map(|_| {
            let (mut slow, _) = service.holder(LockType::Ro);
            let mut frame = (1_u32 << 20).to_be_bytes().to_vec();
            frame.resize(800 << 10, 0);
            slow.say_bytes(&frame);
            slow
        })
        .collect();
    until(
        || shed() >= shed_before + 3,
        || format!("{} of {} shed", shed() - shed_before, slow.len()),
    );
    let listed = honest.ask(list());
    assert!(matches!(listed, Reply::MetadataList(keys) if keys.keys.len() == 4));
    assert_eq!(service.handle.count(Counter::DeadlinesPassed), 0);
}

#[test]
fn other_users_and_too_many_clients_are_turned_away() {
    let service = Service::with(HostConfig::default(), |config| {
        config.uids_allowed = vec![u32::MAX - 1];
    });
    assert!(service.raw().is_dropped());
    assert_eq!(service.handle.count(Counter::ConnectionsRefused), 1);
    let service = Service::with(HostConfig::default(), |config| config.connections_max = 1);
    let (_writer, _) = service.holder(LockType::Rw);
    assert!(service.raw().is_dropped());
    assert_eq!(service.handle.count(Counter::ConnectionsOverLimit), 1);
}

#[test]
fn a_stop_tells_waiters_and_frees_everything() {
    let mut service = Service::start();
    let (_writer, _) = service.holder(LockType::Rw);
    let mut waiter = service.raw();
    waiter.say(HandshakeRequest {
        lock_type: LockType::Ro,
        timeout_ms: None,
    });
    service.until(|state| state.waiting_clients.0 == Some(1));
    service.handle.stop();
    assert!(matches!(waiter.hear(), Some(Reply::Handshake(answer)) if !answer.success));
    assert!(waiter.is_dropped() && service.handle.is_finished());
}
