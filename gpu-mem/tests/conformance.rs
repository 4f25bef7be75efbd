//! The conformance list of the specification (`spec/gpu-memory.md`, appendix B), line by line,
//! against a real service on real sockets. Each test is named for its line.

mod common;

use std::net::Shutdown;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{PATIENCE, Raw, Service, until};
use corelane_gpu_mem::backend::Access;
use corelane_gpu_mem::backend::host::{GRANULARITY_BYTES, HostConfig, HostMapper};
use corelane_gpu_mem::client::{
    CheckpointControl, ClientError, Session, SessionV2, SharedMemory, Woken, checkpoint_control,
    event_history,
};
use corelane_gpu_mem::lock::{Grant, LockType, State};
use corelane_gpu_mem::protocol::fd_pass;
use corelane_gpu_mem::protocol::v1::{
    AllocateRequest, Bytes, ClearAllRequest, CommitLayoutRequest, CommitRequest, ErrorResponse,
    ExportAllocationRequest, ExportRequest, FreeAllocationRequest, FreeRequest,
    GetLockStateRequest, GetMemoryLayoutHashRequest, GetRuntimeStateRequest, HandshakeRequest,
    MetadataGetRequest, MetadataPutRequest, Reply, Request,
};
use corelane_gpu_mem::server::{Server, ServerConfig, ServerError};
use corelane_gpu_mem::stats::Counter;

const EMPTY_HASH: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

fn is_error(reply: &Reply, word: &str) -> bool {
    matches!(reply, Reply::Error(ErrorResponse { error, .. }) if error.contains(word))
}

fn kinds(service: &Service) -> Vec<String> {
    let events = event_history(&service.dial("weights.sock")).expect("the service answers");
    events.into_iter().map(|event| event.kind).collect()
}

/// Publishes one allocation; answers its id.
fn publish(service: &Service) -> String {
    let (mut writer, _) = service.holder(LockType::Rw);
    let made = writer.allocate(10);
    assert!(matches!(writer.ask(CommitRequest {}), Reply::Commit(_)));
    made.allocation_id
}

fn put(id: &str, offset_bytes: i128) -> MetadataPutRequest {
    let value = Bytes(vec![1]);
    MetadataPutRequest {
        key: "k".into(),
        allocation_id: id.into(),
        offset_bytes,
        value,
    }
}

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
fn b04_a_commit_answers_closes_and_publishes() {
    let service = Service::start();
    let (mut writer, _) = service.holder(LockType::Rw);
    let made = writer.allocate(10);
    assert_eq!(
        (made.aligned_size, made.layout_slot.0),
        (GRANULARITY_BYTES, Some(0))
    );
    assert!(matches!(
        writer.ask(put(&made.allocation_id, 0)),
        Reply::MetadataPut(_)
    ));
    assert!(matches!(writer.ask(CommitRequest {}), Reply::Commit(_)));
    assert!(writer.is_dropped());
    let state = service.state();
    assert_eq!((state.state, state.is_ready), (State::Committed, true));
    use sha2::Digest;
    let text = [&b"0:10:2097152:tk:0:0:"[..], &[1]].concat();
    let own: String = sha2::Sha256::digest(text)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    assert_eq!(state.memory_layout_hash, own);
}

#[test]
fn b05_nothing_can_be_published_too() {
    let service = Service::start();
    let (mut writer, _) = service.holder(LockType::Rw);
    writer.ask(CommitRequest {});
    let state = service.state();
    assert_eq!(
        (state.state, state.memory_layout_hash.as_str()),
        (State::Committed, EMPTY_HASH)
    );
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
fn b12_a_reader_may_not_write_and_goes_on() {
    let service = Service::start();
    publish(&service);
    let (mut reader, _) = service.holder(LockType::Ro);
    let requests: [Request; 3] = [
        AllocateRequest {
            size: 1,
            tag: "t".into(),
        }
        .into(),
        CommitRequest {}.into(),
        CommitLayoutRequest {}.into(),
    ];
    for request in requests {
        assert!(is_error(&reader.ask(request), "not allowed"));
    }
    assert!(matches!(reader.ask(GetLockStateRequest {}), Reply::LockState(s) if s.is_ready));
}

#[test]
fn b13_probes_and_handshakes_do_not_belong_into_a_session() {
    let service = Service::start();
    let (mut writer, _) = service.holder(LockType::Rw);
    assert!(is_error(
        &writer.ask(GetRuntimeStateRequest {}),
        "not allowed"
    ));
    let again = HandshakeRequest {
        lock_type: LockType::Rw,
        timeout_ms: None,
    };
    assert!(is_error(&writer.ask(again), "not allowed"));
    assert_eq!(service.state().state, State::Rw);
}

#[test]
fn b14_an_export_carries_exactly_one_descriptor() {
    let service = Service::start();
    let id = publish(&service);
    let (mut reader, _) = service.holder(LockType::Ro);
    for count in 1..=3 {
        let request = ExportAllocationRequest {
            allocation_id: id.clone(),
        };
        assert!(matches!(reader.ask(request), Reply::ExportAllocation(_)));
        assert_eq!(reader.descriptors.len(), count);
    }
    let unknown = ExportAllocationRequest {
        allocation_id: "nope".into(),
    };
    assert!(is_error(&reader.ask(unknown), "Unknown allocation"));
    assert_eq!(reader.descriptors.len(), 3);
}

#[test]
fn b15_a_free_takes_metadata_along_and_the_slot_is_not_used_again() {
    let service = Service::start();
    let (mut writer, _) = service.holder(LockType::Rw);
    let id = writer.allocate(10).allocation_id;
    writer.ask(put(&id, 0));
    let free = || FreeAllocationRequest {
        allocation_id: id.clone(),
    };
    assert!(matches!(writer.ask(free()), Reply::FreeAllocation(f) if f.success));
    assert!(matches!(writer.ask(free()), Reply::FreeAllocation(f) if !f.success));
    let got = writer.ask(MetadataGetRequest { key: "k".into() });
    assert!(matches!(got, Reply::MetadataGet(got) if !got.found && got.value.is_none()));
    assert_eq!(writer.allocate(10).layout_slot.0, Some(1));
}

#[test]
fn b16_offsets_outside_the_allocation_are_refused() {
    let service = Service::start();
    let (mut writer, _) = service.holder(LockType::Rw);
    let id = writer.allocate(10).allocation_id;
    assert!(is_error(
        &writer.ask(put(&id, GRANULARITY_BYTES.into())),
        "out of range"
    ));
    assert!(is_error(&writer.ask(put(&id, -1)), "out of range"));
    assert!(is_error(&writer.ask(put("nope", 0)), "Unknown allocation"));
    let got = writer.ask(MetadataGetRequest { key: "k".into() });
    assert!(matches!(got, Reply::MetadataGet(got) if !got.found));
    assert!(matches!(
        writer.ask(put(&id, GRANULARITY_BYTES as i128 - 1)),
        Reply::MetadataPut(_)
    ));
}

#[test]
fn b17_b19_a_frame_that_is_no_message_costs_the_session_and_nothing_else() {
    let service = Service::start();
    let mut put =
        b"\x85\xa4type\xb4metadata_put_request\xa3key\xa1k\xadallocation_id\xa1a".to_vec();
    put.extend_from_slice(b"\xacoffset_bytes\x00\xa5value\xa1x");
    let payloads: [&[u8]; 8] = [
        b"\xc1",
        b"",
        b"\x90",
        b"\x81\xa4type\xa4nope",
        b"\x81\xa4type\xb0allocate_request",
        b"\x82\xa4type\xb0allocate_request\xa4size\xa1x",
        b"\x82\xa4type\xb0allocate_request\xa4size\xcb\x40\x00\x00\x00\x00\x00\x00\x00",
        &put,
    ];
    for payload in payloads {
        let (mut writer, _) = service.holder(LockType::Rw);
        writer.say_payload(payload);
        assert!(writer.is_dropped(), "{payload:02x?}");
        service.until(|state| state.state == State::Empty);
    }
    let (mut writer, _) = service.holder(LockType::Rw);
    writer.say_bytes(&[0xff; 4]);
    assert!(
        writer.is_dropped(),
        "a frame of 4 GiB is refused from its length alone"
    );
    service.until(|state| state.state == State::Empty);
    assert_eq!(service.handle.count(Counter::FramesBad), 9);
}

#[test]
fn b18_shuffled_keys_strangers_and_wide_numbers_are_welcome() {
    let service = Service::start();
    let mut raw = service.raw();
    let mut payload = vec![0xde, 0, 4];
    payload.extend_from_slice(b"\xaatimeout_ms\xcf\x00\x00\x00\x00\x00\x00\x03\xe8");
    payload.extend_from_slice(b"\xa8stranger\x91\xc0\xa9lock_type\xa2rw\xa4type");
    payload.extend_from_slice(b"\xb1handshake_request");
    raw.say_payload(&payload);
    assert!(matches!(raw.hear(), Some(Reply::Handshake(answer)) if answer.success));
}

#[test]
fn b20_a_layout_is_made_durable_adopted_and_replaced() {
    let service = Service::start();
    let (mut writer, _) = service.holder(LockType::RwDataOrRw);
    let id = writer.allocate(10).allocation_id;
    let Reply::CommitLayout(sealed) = writer.ask(CommitLayoutRequest {}) else {
        panic!()
    };
    assert_eq!(sealed.granted_lock_type, Some(Grant::RwData));
    assert!(is_error(
        &writer.ask(AllocateRequest {
            size: 1,
            tag: "t".into()
        }),
        "not allowed"
    ));
    assert!(is_error(&writer.ask(CommitLayoutRequest {}), "not allowed"));
    assert!(is_error(&writer.ask(CommitRequest {}), "not allowed"));
    drop(writer);
    service.until(|state| state.state == State::LayoutCommitted);
    assert_eq!(service.state().layout_committed.0, Some(true));
    assert!(!service.raw().handshake(LockType::Ro, Some(20)).success);
    let (mut heir, grant) = service.holder(LockType::RwDataOrRw);
    assert_eq!(grant, Grant::RwData);
    let hash = heir.ask(GetMemoryLayoutHashRequest {});
    assert!(
        matches!(hash, Reply::LayoutHash(h) if h.memory_layout_hash == sealed.memory_layout_hash)
    );
    let export = ExportAllocationRequest { allocation_id: id };
    assert!(matches!(heir.ask(export), Reply::ExportAllocation(_)));
    drop(heir);
    let (_writer, grant) = service.holder(LockType::Rw);
    assert_eq!(grant, Grant::Rw);
    let state = service.state();
    assert_eq!(
        (state.allocation_count, state.memory_layout_hash.as_str()),
        (0, "")
    );
}

#[test]
fn b21_the_ring_keeps_the_last_256() {
    let service = Service::start();
    for _ in 0..100 {
        service.holder(LockType::Rw);
    }
    service.until(|state| state.state == State::Empty);
    let kinds = kinds(&service);
    assert_eq!(kinds.len(), 256);
    assert_eq!(
        kinds[253..],
        ["rw_connected", "rw_aborted", "allocations_cleared"]
    );
    let audit = service.handle.audit().records();
    let last = audit.last().expect("a record");
    assert_eq!((last.peer.pid, last.to), (std::process::id(), State::Empty));
}

/// Builds a layout of two allocations and publishes it; the first byte of each says whose it is.
fn build(service: &Service, mark: u8, sizes: [u64; 2]) -> SharedMemory<HostMapper> {
    let mapper = Arc::new(HostMapper::default());
    let dial = service.dial("weights.sock");
    let mut memory = SharedMemory::connect(dial, mapper, LockType::Rw, Some(PATIENCE))
        .expect("the lock is granted");
    for (offset, size) in sizes.into_iter().enumerate() {
        let rank = memory.allocate(size, "weights").expect("memory");
        let (_, region) = memory.get(rank).expect("just made");
        // SAFETY: the region is mapped for writing, and nobody else uses it yet.
        unsafe { (region.address() as *mut u8).write(mark + offset as u8) };
    }
    // SAFETY: nothing uses the memory meanwhile.
    unsafe { memory.publish(Some(PATIENCE)) }.expect("published");
    memory
}

fn first_bytes(memory: &SharedMemory<HostMapper>) -> Vec<u8> {
    let region = |rank| memory.get(rank).expect("there").1;
    // SAFETY: all regions are mapped for reading.
    (0..memory.len())
        .map(|rank| unsafe { (region(rank).address() as *const u8).read() })
        .collect()
}

fn addresses(memory: &SharedMemory<HostMapper>) -> Vec<u64> {
    (0..memory.len())
        .map(|rank| memory.get(rank).expect("there").1.address())
        .collect()
}

#[test]
fn b22_a_sleeper_wakes_at_the_same_addresses_or_learns_that_it_is_stale() {
    let service = Service::start();
    let writer = build(&service, 10, [100, 3 << 20]);
    let mapper = Arc::new(HostMapper::default());
    let dial = service.dial("weights.sock");
    let mut standby = SharedMemory::connect(dial, mapper, LockType::RwOrRo, Some(PATIENCE))
        .expect("the lock is granted");
    assert_eq!(standby.grant(), Some(Grant::Ro));
    assert_eq!(first_bytes(&standby), [10, 11]);
    assert_eq!(
        standby.get(0).and_then(|(_, region)| region.access()),
        Some(Access::Read)
    );
    let before = addresses(&standby);
    // SAFETY: nothing uses the memory while it sleeps.
    unsafe { standby.sleep() }.expect("it sleeps");
    assert_eq!(standby.grant(), None);
    let woken = standby
        .wake(LockType::Ro, Some(PATIENCE))
        .expect("it wakes");
    assert_eq!(
        (woken, addresses(&standby), first_bytes(&standby)),
        (Woken::Remapped, before.clone(), vec![10, 11])
    );
    // SAFETY: as above.
    unsafe { standby.sleep() }.expect("it sleeps");
    let old_id = writer.get(0).expect("there").0.allocation_id.clone();
    drop(writer);
    drop(build(&service, 20, [100, 3 << 20]));
    standby
        .wake(LockType::Ro, Some(PATIENCE))
        .expect("an identical rebuild is accepted");
    assert_eq!(
        (addresses(&standby), first_bytes(&standby)),
        (before, vec![20, 21])
    );
    assert_ne!(standby.get(0).expect("there").0.allocation_id, old_id);
    // SAFETY: as above.
    unsafe { standby.sleep() }.expect("it sleeps");
    drop(build(&service, 30, [100, 9 << 20]));
    let stale = standby.wake(LockType::Ro, Some(PATIENCE));
    assert!(matches!(stale, Err(ClientError::Stale(_))), "{stale:?}");
}

#[test]
fn a_kv_cache_sleeps_and_wakes_with_new_memory_at_the_same_addresses() {
    let service = Service::start();
    let mapper = Arc::new(HostMapper::default());
    let dial = service.dial("kv_cache.sock");
    let mut cache = SharedMemory::connect(dial, mapper, LockType::Rw, Some(PATIENCE))
        .expect("the lock is granted");
    cache.allocate(5 << 20, "kv").expect("memory");
    let before = addresses(&cache);
    // SAFETY: the region is mapped for writing; nothing uses it while it sleeps.
    unsafe {
        (before[0] as *mut u8).write(7);
        cache.sleep().expect("it sleeps");
    }
    let woken = cache.wake(LockType::Rw, Some(PATIENCE)).expect("it wakes");
    assert_eq!(
        (woken, addresses(&cache), first_bytes(&cache)),
        (Woken::Reallocated, before, vec![0])
    );
}

#[test]
fn a_durable_cache_is_adopted_with_its_contents() {
    let service = Service::start();
    let mapper = Arc::new(HostMapper::default());
    let connect = || {
        let dial = service.dial("kv_cache.sock");
        SharedMemory::connect(
            dial,
            Arc::clone(&mapper),
            LockType::RwDataOrRw,
            Some(PATIENCE),
        )
        .expect("the lock is granted")
    };
    let mut first = connect();
    first.allocate(1, "kv").expect("memory");
    first.commit_layout().expect("it is durable");
    // SAFETY: the region is still mapped for writing.
    unsafe { (addresses(&first)[0] as *mut u8).write(9) };
    drop(first);
    let heir = connect();
    assert_eq!(
        (heir.grant(), first_bytes(&heir)),
        (Some(Grant::RwData), vec![9])
    );
    // SAFETY: an adopter may write.
    unsafe { (addresses(&heir)[0] as *mut u8).write(10) };
}

#[test]
fn b23_memory_that_is_short_is_waited_for_times_out_and_dies_with_its_client() {
    let host = HostConfig {
        capacity_bytes: Some(GRANULARITY_BYTES),
        ..HostConfig::default()
    };
    let service = Service::with(host, |_| {});
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
    let died = Instant::now();
    drop(waiter);
    service.until(|state| state.waiting_writers == 0);
    assert!(
        died.elapsed() < Duration::from_millis(100),
        "{:?}",
        died.elapsed()
    );
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

#[test]
fn b27_a_first_frame_that_is_no_message_is_answered_by_a_close() {
    let service = Service::start();
    let mut raw = service.raw();
    raw.say_payload(b"\xc1");
    assert!(raw.is_dropped());
    let mut raw = service.raw();
    assert!(is_error(
        &raw.ask(CommitRequest {}),
        "Expected HandshakeRequest"
    ));
    assert!(raw.is_dropped());
}

#[test]
fn b28_the_seed_dialect_is_answered_on_the_same_socket() {
    let service = Service::start();
    let (mut writer, _) = service.holder(LockType::Rw);
    let id = writer.allocate(10).allocation_id;
    let cleared = writer.ask(ClearAllRequest {});
    assert!(matches!(cleared, Reply::ClearAll(cleared) if cleared.cleared_count == 1));
    let unknown = writer.ask(ExportRequest {
        allocation_id: id.clone(),
    });
    assert!(is_error(&unknown, "Unknown allocation"));
    let id = writer.allocate(10).allocation_id;
    let Reply::GetAllocation(exported) = writer.ask(ExportRequest {
        allocation_id: id.clone(),
    }) else {
        panic!()
    };
    assert_eq!(
        (exported.aligned_size, writer.descriptors.len()),
        (GRANULARITY_BYTES, 1)
    );
    let freed = writer.ask(FreeRequest { allocation_id: id });
    assert!(matches!(freed, Reply::Free(freed) if freed.success));
}

#[test]
fn frames_in_one_write_are_answered_in_order() {
    let service = Service::start();
    let mut raw = service.raw();
    let allocate = || {
        Request::from(AllocateRequest {
            size: 1,
            tag: "t".into(),
        })
        .encode()
    };
    let handshake = HandshakeRequest {
        lock_type: LockType::Rw,
        timeout_ms: None,
    };
    let frames = [
        Request::from(handshake).encode(),
        allocate(),
        allocate(),
        Request::from(CommitRequest {}).encode(),
        allocate(),
    ];
    raw.say_bytes(&frames.concat());
    assert!(matches!(raw.hear(), Some(Reply::Handshake(_))));
    for slot in 0..2 {
        let Some(Reply::Allocate(made)) = raw.hear() else {
            panic!()
        };
        assert_eq!(made.layout_slot.0, Some(slot));
    }
    assert!(matches!(raw.hear(), Some(Reply::Commit(_))));
    assert!(
        raw.hear().is_none(),
        "what follows a commit is not answered"
    );
    assert_eq!(service.state().allocation_count, 2);
}

#[test]
fn a_client_may_not_send_descriptors() {
    let service = Service::start();
    let (writer, _) = service.holder(LockType::Rw);
    let frame = Request::from(GetLockStateRequest {}).encode();
    let (gift, _keep) = std::os::unix::net::UnixStream::pair().expect("a pair");
    fd_pass::send(&writer.stream, &frame, Some(gift.as_fd())).expect("it is sent");
    service.until(|state| state.state == State::Empty);
}

#[test]
fn silence_and_half_frames_have_an_end() {
    let service = Service::with(HostConfig::default(), |config| {
        config.first_frame_timeout = Duration::from_millis(50);
        config.frame_timeout = Duration::from_millis(50);
    });
    assert!(service.raw().is_dropped(), "silence");
    let (mut writer, _) = service.holder(LockType::Rw);
    writer.say_bytes(&[0, 0, 0, 9, 1]);
    assert!(writer.is_dropped(), "half a frame");
    service.until(|state| state.state == State::Empty);
    assert_eq!(service.handle.count(Counter::DeadlinesPassed), 2);
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

#[test]
fn the_second_generation_commits_into_reading_and_checks_identities() {
    let service = Service::start();
    let dial = service.dial("weights-v2.sock");
    let open = |lock_type| SessionV2::open(&dial, lock_type, None, Some(PATIENCE));
    let mut writer = open(LockType::RwOrRo).expect("granted");
    assert_eq!(writer.grant(), Grant::Rw);
    assert_eq!(
        writer.identity(),
        &("nonce".to_owned(), common::GPU.to_owned())
    );
    assert!(
        matches!(writer.allocate("a", 100), Err(ClientError::Refused(_))),
        "misaligned"
    );
    writer.allocate("a", GRANULARITY_BYTES).expect("memory");
    assert!(matches!(
        writer.allocate("a", GRANULARITY_BYTES),
        Err(ClientError::Refused(_))
    ));
    writer.export("a").expect("a descriptor");
    writer.commit().expect("published");
    assert!(matches!(
        writer.allocate("b", GRANULARITY_BYTES),
        Err(ClientError::Refused(_))
    ));
    let mut reader = open(LockType::RwOrRo).expect("granted beside it");
    assert_eq!(reader.grant(), Grant::Ro);
    assert_eq!(reader.allocations().expect("a list").len(), 1);
    let other = Some(("other".to_owned(), common::GPU.to_owned()));
    let refused = SessionV2::open(&dial, LockType::Ro, other, Some(PATIENCE));
    assert!(matches!(refused, Err(ClientError::Refused(_))));
    let impatient = SessionV2::open(&dial, LockType::Rw, None, Some(Duration::from_millis(30)));
    assert!(matches!(impatient, Err(ClientError::NotGranted { .. })));
    drop((writer, reader));
    let writer = open(LockType::Rw).expect("granted");
    writer.abort().expect("given up");
    let mut raw = Raw::connect(&service.path("weights-v2.sock"));
    raw.say_payload(b"\x83\xa4type\xb1handshake_request\xa9lock_type\xa2rw\xaatimeout_ms\xc0");
    assert!(
        raw.is_dropped(),
        "the first generation's field is a stranger here"
    );
}

#[test]
fn a_checkpoint_keeps_both_pools_closed_until_it_is_resolved() {
    let service = Service::start();
    let (weights, cache) = (
        service.dial("weights-v2.sock"),
        service.dial("kv_cache-v2.sock"),
    );
    let refused = checkpoint_control(&weights, CheckpointControl::Prepare);
    assert!(
        matches!(refused, Err(ClientError::Refused(_))),
        "nothing is committed"
    );
    let mut writer =
        SessionV2::open(&weights, LockType::Rw, None, Some(PATIENCE)).expect("granted");
    writer.allocate("a", GRANULARITY_BYTES).expect("memory");
    writer.commit().expect("published");
    let refused = checkpoint_control(&cache, CheckpointControl::Prepare);
    assert!(
        matches!(refused, Err(ClientError::Refused(_))),
        "a session is open"
    );
    drop(writer);
    let ready = || checkpoint_control(&cache, CheckpointControl::Prepare).ok();
    until(|| ready().is_some(), || "the session never ended".into());
    let state = ready().expect("asking again is no error");
    let token = state.token.expect("a token");
    assert_eq!(state.state, "checkpoint_ready");
    for dial in [&weights, &cache] {
        let shut = SessionV2::open(dial, LockType::RwOrRo, None, Some(PATIENCE));
        assert!(matches!(shut, Err(ClientError::Refused(_))));
    }
    let resolve = |control| checkpoint_control(&weights, control).map(|state| state.state);
    assert!(resolve(CheckpointControl::Abort("wrong".into())).is_err());
    for _ in 0..2 {
        let done = resolve(CheckpointControl::Complete(token.clone())).expect("resolved");
        assert_eq!(done, "serving");
    }
    assert!(
        resolve(CheckpointControl::Abort(token)).is_err(),
        "it was completed"
    );
    assert_eq!(
        resolve(CheckpointControl::Query).expect("an answer"),
        "serving"
    );
    SessionV2::open(&weights, LockType::Ro, None, Some(PATIENCE)).expect("open again");
}
