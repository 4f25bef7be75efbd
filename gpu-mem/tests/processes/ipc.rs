//! Legacy memory, lent by CUDA IPC handle: who may open it, close before free, rebuilds, and the
//! death of its owner.

use std::os::unix::process::ExitStatusExt;
use std::sync::Arc;
use std::time::Duration;

use corelane_gpu_mem::backend::Mapper;
use corelane_gpu_mem::backend::cuda::CudaMapper;
use corelane_gpu_mem::client::{ClientError, Dial, Session};
use corelane_gpu_mem::ipc::{Imports, LegacyCuda, LegacyMemory};
use corelane_gpu_mem::lock::{Grant, LockType, State};

use crate::common::PATIENCE;
use crate::roles::{Stage, number, say, wait_for_word};
use crate::share::{Cuda, Memory};

const SIZE: u64 = 3 << 20;

/// Makes the GPU's context this thread's, for copies of the test's own.
fn enter() -> Arc<CudaMapper> {
    let mapper = CudaMapper::new(0).expect("there is a GPU");
    mapper.synchronize().expect("a context");
    Arc::new(mapper)
}

fn lent(dial: &Dial) -> LegacyMemory {
    let cuda = LegacyCuda::new(0).expect("there is a GPU");
    let mut memory = cuda.allocate(SIZE).expect("memory");
    assert_eq!(
        memory.bytes(),
        4 << 20,
        "whole blocks, so nobody else is exposed"
    );
    Cuda::poke(memory.address() + SIZE - 1, number("MARK") as u8).expect("ours");
    let mut session = Session::open(dial, LockType::Rw, Some(PATIENCE)).expect("granted");
    let id = memory
        .lend(dial, &mut session, "weights", b"words")
        .expect("it is lent");
    // Neither the service nor the driver lets it open what is its own.
    let own = session.handle_ipc(&id).expect_err("its own handle");
    assert!(matches!(&own, ClientError::Refused(text) if text.contains("not allowed")));
    let described = cuda
        .describe(memory.address() + 512, 100, "t")
        .expect("inside");
    assert_eq!(
        (described.offset_bytes, described.base_bytes),
        (512, memory.bytes())
    );
    let refused = cuda.open(&described).expect_err("its own handle");
    say(&format!("opening one's own handle: {refused}"));
    assert!(!memory.is_free().expect("the service answers"));
    session.commit().expect("published");
    memory
}

pub(crate) fn lend(dial: &Dial) {
    let _context = enter();
    let mut memory = lent(dial);
    say("lent");
    wait_for_word();
    assert!(
        !memory.is_free().expect("the service answers"),
        "a reader has it open"
    );
    let still = memory.wait_until_free(Duration::from_millis(60));
    assert!(matches!(still, Err(ClientError::Lent)));
    say("held");
    wait_for_word();
    memory
        .wait_until_free(PATIENCE)
        .expect("the layout is gone");
    drop(memory);
    say("freed");
    wait_for_word();
}

/// Frees under a reader, as no program of ours would: the stand-in must see it.
pub(crate) fn free_too_early(dial: &Dial) {
    let _context = enter();
    let memory = lent(dial);
    say("lent");
    wait_for_word();
    // SAFETY: this is the mistake; the stand-in ends the process over it.
    unsafe { cudarc::driver::sys::cuMemFree_v2(memory.address()) };
    say("nobody noticed");
}

pub(crate) fn borrow(dial: Dial) {
    let _context = enter();
    let cuda = LegacyCuda::new(0).expect("there is a GPU");
    let wait = Some(PATIENCE);
    let connected = Imports::connect(dial, cuda.clone(), LockType::RwOrRo, wait);
    if std::env::var_os("STAND_IN_IPC_OPEN_FAILS").is_some() {
        let refused = connected.err().expect("the driver maps nothing");
        return say(&format!("not borrowed: {refused}"));
    }
    let mut imports = connected.expect("the lock is granted");
    assert_eq!(imports.grant(), Some(Grant::Ro));
    let id = check(&imports);
    // Opening it once more is counted, not mapped anew; closing that leaves the first.
    let (_, offer) = imports
        .session()
        .expect("awake")
        .handle_ipc(&id)
        .expect("allowed");
    let again = cuda.open(&offer).expect("it is open already");
    assert_eq!(again.address(), imports.opened()[0].1.address());
    drop(again);
    check(&imports);
    say("borrowed");
    wait_for_word();
    if std::env::var_os("OWNER_DIES").is_some() {
        let session = imports.session().expect("awake");
        let lost = session.handle_ipc(&id).expect_err("its owner is dead");
        assert!(
            matches!(&lost, ClientError::Refused(text) if text.contains("lost")),
            "{lost}"
        );
        return say("lost");
    }
    // SAFETY: nothing uses the memory while it sleeps.
    unsafe { imports.sleep() }.expect("it sleeps");
    assert!(imports.opened().is_empty());
    assert!(matches!(imports.session(), Err(ClientError::Asleep)));
    say("closed");
    wait_for_word();
    imports.wake(LockType::Ro, wait).expect("the same layout");
    check(&imports);
    // SAFETY: as above.
    unsafe { imports.sleep() }.expect("it sleeps");
    say("closed again");
    wait_for_word();
    let stale = imports
        .wake(LockType::Ro, wait)
        .expect_err("another layout");
    assert!(matches!(stale, ClientError::Stale(_)), "{stale}");
    assert_eq!(imports.grant(), None);
    say("stale");
}

/// Everything that is lent is open here and has the owner's bytes.
fn check(imports: &Imports) -> String {
    let [(info, memory)] = imports.opened() else {
        panic!("{} pieces are open", imports.opened().len());
    };
    assert_eq!((info.tag.as_str(), info.slot), ("weights", 0));
    assert_eq!(memory.bytes(), 4 << 20);
    assert_eq!(
        u64::from(Cuda::peek(memory.address() + SIZE - 1)),
        number("MARK")
    );
    info.allocation_id.clone()
}

pub(crate) fn lent_memory_is_closed_before_it_is_freed(stage: &Stage) {
    let service = stage.serve();
    let mut owner = stage.start("lend", &[("MARK", "30")]);
    println!("{}", owner.hear("opening one's own handle").trim_end());
    owner.hear("lent");
    let mut reader = stage.start("borrow", &[("MARK", "30")]);
    reader.hear("borrowed");
    owner.ask("held");
    // No writer comes in while a reader has it open.
    let tried = Session::open(&stage.dial(), LockType::Rw, Some(Duration::ZERO));
    assert!(matches!(
        tried,
        Err(ClientError::NotGranted { committed: true })
    ));
    reader.ask("closed");
    stage.until(|state| state.state == State::Committed);
    reader.ask("closed again");
    // The next writer replaces the layout; only then is the memory freed.
    owner.tell();
    let writer = Session::open(&stage.dial(), LockType::Rw, Some(PATIENCE)).expect("granted");
    owner.hear("freed");
    drop(writer);
    owner.finish();
    // The same shape, lent anew, is another layout: handles of the first open nothing.
    let mut second = stage.start("lend", &[("MARK", "30")]);
    second.hear("lent");
    reader.ask("stale");
    reader.finish();
    second.kill();
    service.finish();
}

pub(crate) fn an_owners_death_is_seen(stage: &Stage) {
    let service = stage.serve();
    let mut owner = stage.start("lend", &[("MARK", "40")]);
    owner.hear("lent");
    let mut reader = stage.start("borrow", &[("MARK", "40"), ("OWNER_DIES", "1")]);
    reader.hear("borrowed");
    owner.kill();
    assert_eq!(stage.state().state, State::Ro, "a reader is still there");
    reader.ask("lost");
    reader.finish();
    // The last reader is gone, and the layout with it: the next one builds.
    stage.until(|state| state.state == State::Empty);
    assert_eq!(stage.events("contents_lost"), 1);
    let next = Session::open(&stage.dial(), LockType::RwOrRo, Some(PATIENCE)).expect("granted");
    assert_eq!(next.grant(), Grant::Rw);
    drop(next);
    // With nobody there it is seen as soon as somebody asks.
    let mut owner = stage.start("lend", &[("MARK", "41")]);
    owner.hear("lent");
    owner.kill();
    let next = Session::open(&stage.dial(), LockType::RwOrRo, Some(PATIENCE)).expect("granted");
    assert_eq!(next.grant(), Grant::Rw);
    assert_eq!(stage.events("contents_lost"), 2);
    drop(next);
    service.finish();
}

#[test]
fn lent_memory_is_closed_before_it_is_freed_on_the_stand_in() {
    lent_memory_is_closed_before_it_is_freed(&Stage::stand_in(&[]));
}

#[test]
fn an_owners_death_is_seen_on_the_stand_in() {
    an_owners_death_is_seen(&Stage::stand_in(&[]));
}

#[test]
fn memory_freed_under_a_reader_would_be_seen() {
    let stage = Stage::stand_in(&[]);
    let service = stage.serve();
    let mut owner = stage.start("free too early", &[("MARK", "30")]);
    owner.hear("lent");
    let mut reader = stage.start("borrow", &[("MARK", "30")]);
    reader.hear("borrowed");
    owner.tell();
    assert_eq!(owner.end().signal(), Some(libc::SIGABRT));
    reader.kill();
    service.finish();
}

#[test]
fn a_driver_that_maps_nothing_leaves_no_lock_behind() {
    let stage = Stage::stand_in(&[]);
    let service = stage.serve();
    let mut owner = stage.start("lend", &[("MARK", "30")]);
    owner.hear("lent");
    let faults = [("MARK", "30"), ("STAND_IN_IPC_OPEN_FAILS", "1")];
    let mut reader = stage.start("borrow", &faults);
    let line = reader.hear("not borrowed");
    assert!(line.contains("MAP_FAILED"), "{line}");
    reader.finish();
    stage.until(|state| state.state == State::Committed);
    owner.kill();
    service.finish();
}
