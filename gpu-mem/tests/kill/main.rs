//! Kills clients at every step of their lives and checks, after each, the service's state, memory
//! and descriptors; and what else needs processes of its own.
//!
//! The service is another process (this program again, with `--serve`). Clients are forks of this
//! one, which therefore has a single thread and no test harness. Each of them obeys one-letter
//! commands over a socket pair. `CORELANE_GPU_MEM_KILL_RUNS` says how many random runs there are. A
//! word as argument plays only the tests whose names have it.

mod actors;
#[path = "../common/mod.rs"]
mod common;
mod random;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::{Duration, Instant};

use actors::{Client, Memory, Service, fork, wait};
use common::{PATIENCE, Raw, until};
use corelane_gpu_mem::backend::Access;
use corelane_gpu_mem::backend::choice::{BackendChoice, open};
use corelane_gpu_mem::backend::host::{GRANULARITY_BYTES, HostConfig, HostMapper};
use corelane_gpu_mem::client::{Session, runtime_state};
use corelane_gpu_mem::failover_lock::{FailoverError, FailoverLock};
use corelane_gpu_mem::lock::{LockType, State};
use corelane_gpu_mem::protocol::v1::{ExportAllocationRequest, Reply, Request};
use corelane_gpu_mem::region::Region;
use corelane_gpu_mem::server::{Server, ServerConfig};

fn main() {
    let args: Vec<String> = std::env::args().collect();
    if args.get(1).map(String::as_str) == Some("--serve") {
        return serve(Path::new(&args[2]), args.get(3).map(String::as_str));
    }
    if args.iter().any(|arg| arg == "--list") {
        return;
    }
    let tests: &[(&str, fn())] = &[
        (
            "ten_thousand_exports_leave_no_descriptor",
            ten_thousand_exports_leave_no_descriptor,
        ),
        (
            "descriptors_that_are_not_taken_cost_an_export_and_no_session",
            descriptors_that_are_not_taken_cost_an_export_and_no_session,
        ),
        (
            "a_write_through_a_readers_mapping_faults",
            a_write_through_a_readers_mapping_faults,
        ),
        (
            "b10_a_writer_killed_at_each_step",
            b10_a_writer_killed_at_each_step,
        ),
        ("random_lives_and_deaths", random::random_lives_and_deaths),
        #[cfg(feature = "cuda")]
        (
            "random_lives_and_deaths_on_the_stand_in",
            random::random_lives_and_deaths_on_the_stand_in,
        ),
        (
            "the_failover_lock_falls_with_its_holder",
            the_failover_lock_falls_with_its_holder,
        ),
        (
            "the_failover_lock_is_not_inherited",
            the_failover_lock_is_not_inherited,
        ),
    ];
    let wanted = args.get(1).filter(|arg| !arg.starts_with('-'));
    for (name, test) in tests {
        if wanted.is_some_and(|word| !name.contains(word.as_str())) {
            continue;
        }
        let start = Instant::now();
        test();
        println!(
            "test {name} ... ok ({:.1} s)",
            start.elapsed().as_secs_f64()
        );
    }
}

fn serve(dir: &Path, how: Option<&str>) {
    if how == Some("confined") {
        confine();
    }
    // SAFETY: the service does not outlive the program that tests it.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    let host = HostConfig {
        granularity_bytes: 4096,
        ..HostConfig::default()
    };
    let choice = match how {
        Some("cuda") => BackendChoice::Cuda,
        _ => BackendChoice::Host,
    };
    let opened = open(choice, 0, host).expect("there is memory");
    let config = ServerConfig::new(common::pools_on(dir, &|| opened.backend()));
    Server::bind(config).expect("the service starts").run();
}

/// The kernel lets root have any number of descriptors under way, others as many as they may open.
fn confine() {
    let none = rustix::thread::CapabilitySet::empty();
    let sets = rustix::thread::CapabilitySets {
        effective: none,
        permitted: none,
        inheritable: none,
    };
    rustix::thread::set_capabilities(None, sets).expect("fewer rights");
    let few = rustix::process::Rlimit {
        current: Some(48),
        maximum: Some(48),
    };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, few).expect("a lower limit");
}

fn descriptors_that_are_not_taken_cost_an_export_and_no_session() {
    let service = Service::on(Memory::Confined);
    let mut writer = Session::open(&service.dial(), LockType::Rw, Some(PATIENCE)).expect("granted");
    let id = writer.allocate(1, "t").expect("memory").allocation_id;
    writer.commit().expect("published");
    let reader = Session::open(&service.dial(), LockType::Ro, Some(PATIENCE)).expect("granted");
    let reader = std::cell::RefCell::new(reader);
    let mut lazy = Raw::connect(&service.path());
    lazy.handshake(LockType::Ro, Some(PATIENCE.as_millis() as i128));
    let allocation_id = id.clone();
    let export = Request::from(ExportAllocationRequest { allocation_id }).encode();
    lazy.say_bytes(&export.repeat(100));
    // The service works it off while it answers this.
    until(
        || reader.borrow_mut().export(&id).is_err(),
        || "descriptors without end".into(),
    );
    let listed = reader.borrow_mut().allocations(None);
    assert!(listed.is_ok(), "its session goes on");
    let is_refused =
        |reply| matches!(reply, Some(Reply::Error(it)) if it.error.contains("under way"));
    let refused = (0..100).filter(|_| is_refused(lazy.hear())).count();
    assert_eq!(lazy.descriptors.len() + refused, 100);
    assert!(refused > 0, "it has all of them");
    until(
        || reader.borrow_mut().export(&id).is_ok(),
        || "no descriptor, though all were taken".into(),
    );
}

fn ten_thousand_exports_leave_no_descriptor() {
    let service = Service::start();
    let mut writer = Session::open(&service.dial(), LockType::Rw, Some(PATIENCE)).expect("granted");
    let id = writer.allocate(1, "t").expect("memory").allocation_id;
    for _ in 0..10_000 {
        writer.export(&id).expect("a descriptor");
    }
    service.until_descriptors(2);
    writer.commit().expect("published");
    for _ in 0..100 {
        let mut reader = Client::new(&service.path());
        reader.done(b'R');
        assert_eq!(reader.done(b'?'), b'r');
        reader.done(b'x');
        reader.kill();
    }
    service.until_descriptors(1);
}

fn a_write_through_a_readers_mapping_faults() {
    let service = Service::start();
    let mut writer = Session::open(&service.dial(), LockType::Rw, Some(PATIENCE)).expect("granted");
    let id = writer
        .allocate(GRANULARITY_BYTES, "t")
        .expect("memory")
        .allocation_id;
    writer.commit().expect("published");
    let mut reader = Session::open(&service.dial(), LockType::Ro, Some(PATIENCE)).expect("granted");
    let mapper = std::sync::Arc::new(HostMapper::default());
    let mut region = Region::reserve(mapper, GRANULARITY_BYTES).expect("addresses");
    region
        .map(reader.export(&id).expect("a descriptor"), Access::Read)
        .expect("it maps");
    let at = region.address() as *mut u8;
    // SAFETY: the region is mapped for reading.
    let reads = fork(|| assert_eq!(unsafe { at.read_volatile() }, 0));
    assert!(wait(reads).success());
    // SAFETY: the write is meant to fault; the process that does it has nothing to lose.
    let writes = fork(|| unsafe { at.write_volatile(1) });
    assert_eq!(wait(writes).signal(), Some(libc::SIGSEGV));
}

/// Each step of a writer's life, and what its death there must leave: state and allocations.
const STEPS: [(&str, &[u8], State, u64); 10] = [
    ("connected", b"", State::Empty, 0),
    ("half a handshake", b"H", State::Empty, 0),
    ("granted", b"W?", State::Empty, 0),
    ("allocated", b"W?aa", State::Empty, 0),
    ("allocation not read", b"W?A", State::Empty, 0),
    ("half a frame", b"W?amh", State::Empty, 0),
    ("before the commit", b"W?ams", State::Empty, 0),
    ("commit not read", b"W?aaC", State::Committed, 2),
    ("committed", b"W?aac", State::Committed, 2),
    ("layout durable", b"W?aal", State::LayoutCommitted, 2),
];

fn b10_a_writer_killed_at_each_step() {
    let kinds = [
        Memory::Host,
        #[cfg(feature = "cuda")]
        Memory::StandIn,
    ];
    for (memory, (step, orders, state, allocations)) in kinds
        .iter()
        .flat_map(|memory| STEPS.map(|step| (*memory, step)))
    {
        let service = Service::on(memory);
        let mut writer = Client::new(&service.path());
        for order in orders {
            writer.done(*order);
        }
        writer.kill();
        let now = || runtime_state(&service.dial()).expect("the service answers");
        until(
            || (now().state, now().allocation_count) == (state, allocations),
            || format!("{step} on {memory:?}: {:?}", now()),
        );
        service.until_descriptors(allocations as usize);
    }
}

fn the_failover_lock_falls_with_its_holder() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("failover.lock");
    let (mut here, mut there) = UnixStream::pair().expect("a pair");
    let holder = fork(|| {
        let mut lock = FailoverLock::new(&path);
        lock.acquire("0", None).expect("it is free");
        there.write_all(b".").expect("heard");
        let _ = there.read_exact(&mut [0]);
    });
    here.read_exact(&mut [0]).expect("it holds the lock");
    let mut lock = FailoverLock::new(&path);
    assert!(lock.acquire("1", Some(Duration::ZERO)).is_err());
    // SAFETY: the child is ours and was not waited for.
    unsafe { libc::kill(holder, libc::SIGKILL) };
    lock.acquire("1", Some(PATIENCE))
        .expect("the kernel released it");
    wait(holder);
    assert_eq!(lock.owner().expect("a file"), "engine-1");
}

fn the_failover_lock_is_not_inherited() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("failover.lock");
    let (mut here, mut there) = UnixStream::pair().expect("a pair");
    let (mut grandparent, mut orphans) = UnixStream::pair().expect("a pair");
    let holder = fork(|| {
        let mut lock = FailoverLock::new(&path);
        lock.acquire("0", None).expect("it is free");
        // This child outlives the holder; with upstream's lock it would keep it. Nor is it told
        // that it holds what its parent holds.
        fork(|| {
            let refused = FailoverLock::new(&path).acquire("2", Some(Duration::ZERO));
            let waited = matches!(refused, Err(FailoverError::TimedOut { .. }));
            let _ = orphans.write_all(if waited { b"w" } else { b"?" });
            let _ = orphans.read_exact(&mut [0]);
        });
        there.write_all(b".").expect("heard");
        let _ = there.read_exact(&mut [0]);
    });
    here.read_exact(&mut [0]).expect("it holds the lock");
    let mut waited = [0];
    grandparent.read_exact(&mut waited).expect("a word");
    assert_eq!(waited, *b"w", "its child waits for it like anybody else");
    // SAFETY: the child is ours and was not waited for.
    unsafe { libc::kill(holder, libc::SIGKILL) };
    wait(holder);
    let mut lock = FailoverLock::new(&path);
    // Some patience, for the orphan closes it when it first runs.
    lock.acquire("1", Some(PATIENCE))
        .expect("no child keeps it");
    grandparent.write_all(b".").expect("the orphan may end");
}
