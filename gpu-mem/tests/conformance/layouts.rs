//! Layouts that are published, kept, slept over and adopted (lines 20 to 22).

use crate::common::{PATIENCE, Service};
use crate::{is_error, kinds};
use corelane_gpu_mem::backend::Access;
use corelane_gpu_mem::backend::host::HostMapper;
use corelane_gpu_mem::client::{ClientError, SharedMemory, Woken};
use corelane_gpu_mem::lock::{Grant, LockType, State};
use corelane_gpu_mem::protocol::v1::{
    AllocateRequest, CommitLayoutRequest, CommitRequest, ExportAllocationRequest,
    GetMemoryLayoutHashRequest, Reply,
};
use std::sync::Arc;

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
    // Asking again would wait for itself.
    let again = standby.wake(LockType::Rw, Some(PATIENCE));
    assert!(matches!(again, Err(ClientError::Awake)), "{again:?}");
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
