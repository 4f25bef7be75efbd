//! Who is let in, who waits, and who is turned away (lines 1 to 3, 6 to 9, 11, 25,
//! 26).

use crate::common::{Raw, Service};
use crate::{kinds, publish};
use corelane_gpu_mem::lock::{Grant, LockType, State};
use corelane_gpu_mem::protocol::v1::{CommitRequest, HandshakeRequest, Reply};
use std::net::Shutdown;

#[test]
fn b01_a_fresh_service_is_empty() {
    let service = Service::start();
    let state = service.state();
    assert_eq!(
        (state.state, state.has_rw_session, state.committed),
        (State::Empty, false, false)
    );
    assert_eq!((state.ro_session_count, state.waiting_writers), (0, 0));
    assert_eq!(
        (state.allocation_count, state.memory_layout_hash.as_str()),
        (0, "")
    );
    assert!(!state.is_ready);
}

#[test]
fn b02_a_second_writer_waits_and_times_out() {
    let service = Service::start();
    let (_writer, grant) = service.holder(LockType::Rw);
    assert_eq!((grant, service.state().state), (Grant::Rw, State::Rw));
    let mut second = service.raw();
    second.say(HandshakeRequest {
        lock_type: LockType::Rw,
        timeout_ms: Some(100),
    });
    service.until(|state| state.waiting_writers == 1);
    let Some(Reply::Handshake(answer)) = second.hear() else {
        panic!()
    };
    assert_eq!((answer.success, answer.granted_lock_type), (false, None));
    assert!(second.is_dropped());
    service.until(|state| state.waiting_writers == 0);
}

#[test]
fn b03_a_reader_of_nothing_times_out() {
    let service = Service::start();
    let answer = service.raw().handshake(LockType::Ro, Some(1));
    assert_eq!((answer.success, answer.committed), (false, false));
}

#[test]
fn b06_readers_come_and_go() {
    let service = Service::start();
    publish(&service);
    let (first, _) = service.holder(LockType::Ro);
    let (second, _) = service.holder(LockType::Ro);
    service.until(|state| (state.state, state.ro_session_count) == (State::Ro, 2));
    drop(first);
    service.until(|state| (state.state, state.ro_session_count) == (State::Ro, 1));
    drop(second);
    service.until(|state| state.state == State::Committed);
}

#[test]
fn b07_a_waiting_writer_keeps_readers_out_and_then_replaces_everything() {
    let service = Service::start();
    publish(&service);
    let (reader, _) = service.holder(LockType::Ro);
    let mut writer = service.raw();
    writer.say(HandshakeRequest {
        lock_type: LockType::Rw,
        timeout_ms: None,
    });
    service.until(|state| state.waiting_writers == 1);
    for lock_type in [LockType::Ro, LockType::RwOrRo] {
        let answer = service.raw().handshake(lock_type, Some(20));
        assert_eq!(
            (answer.success, answer.committed),
            (false, true),
            "{lock_type}"
        );
    }
    drop(reader);
    let Some(Reply::Handshake(answer)) = writer.hear() else {
        panic!()
    };
    assert_eq!(
        (answer.granted_lock_type, answer.committed),
        (Some(Grant::Rw), false)
    );
    assert_eq!(service.state().allocation_count, 0);
}

#[test]
fn b08_readers_go_on_when_the_waiting_writer_gives_up() {
    let service = Service::start();
    publish(&service);
    let (_reader, _) = service.holder(LockType::Ro);
    let mut writer = service.raw();
    writer.say(HandshakeRequest {
        lock_type: LockType::Rw,
        timeout_ms: Some(200),
    });
    service.until(|state| state.waiting_writers == 1);
    let (_second, grant) = service.holder(LockType::Ro);
    assert_eq!(grant, Grant::Ro);
    let Some(Reply::Handshake(answer)) = writer.hear() else {
        panic!()
    };
    assert!(!answer.success);
}

#[test]
fn b09_rw_or_ro_becomes_what_fits() {
    let service = Service::start();
    let waiting = |writer: &mut Raw, commits: bool| {
        let mut waiter = service.raw();
        waiter.say(HandshakeRequest {
            lock_type: LockType::RwOrRo,
            timeout_ms: None,
        });
        service.until(|state| state.waiting_clients.0 == Some(1));
        match commits {
            true => _ = writer.ask(CommitRequest {}),
            false => writer.stream.shutdown(Shutdown::Both).expect("it was open"),
        }
        let Some(Reply::Handshake(answer)) = waiter.hear() else {
            panic!()
        };
        (waiter, answer.granted_lock_type)
    };
    let (mut first, grant) = service.holder(LockType::RwOrRo);
    assert_eq!(grant, Grant::Rw);
    let (mut heir, granted) = waiting(&mut first, false);
    assert_eq!(granted, Some(Grant::Rw));
    let (_reader, granted) = waiting(&mut heir, true);
    assert_eq!(granted, Some(Grant::Ro));
    assert_eq!(service.holder(LockType::RwOrRo).1, Grant::Ro);
}

#[test]
fn b11_half_a_close_is_an_abort() {
    let service = Service::start();
    let (mut writer, _) = service.holder(LockType::Rw);
    writer.allocate(10);
    writer
        .stream
        .shutdown(Shutdown::Write)
        .expect("it was open");
    service.until(|state| (state.state, state.allocation_count) == (State::Empty, 0));
    assert_eq!(
        kinds(&service),
        ["rw_connected", "rw_aborted", "allocations_cleared"]
    );
}

#[test]
fn b25_a_waiter_that_dies_is_noticed_at_once_and_costs_nothing() {
    let service = Service::start();
    publish(&service);
    let (reader, _) = service.holder(LockType::Ro);
    let mut waiter = service.raw();
    waiter.say(HandshakeRequest {
        lock_type: LockType::Rw,
        timeout_ms: None,
    });
    service.until(|state| state.waiting_writers == 1);
    drop(waiter);
    service.until(|state| state.waiting_writers == 0);
    drop(reader);
    service.until(|state| state.state == State::Committed);
    assert_eq!(service.state().allocation_count, 1);
}

#[test]
fn b26_no_time_is_a_try_lock() {
    let service = Service::start();
    for timeout in [0, -5] {
        let mut raw = service.raw();
        assert!(raw.handshake(LockType::Rw, Some(timeout)).success);
        assert!(!service.raw().handshake(LockType::Rw, Some(timeout)).success);
        drop(raw);
        service.until(|state| state.state == State::Empty);
    }
}
