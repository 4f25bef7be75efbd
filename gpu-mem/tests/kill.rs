//! Kills clients at every step of their lives and checks, after each, the service's state, memory
//! and descriptors; and what else needs processes of its own.
//!
//! The service is another process (this program again, with `--serve`). Clients are forks of this
//! one, which therefore has a single thread and no test harness. Each of them obeys one-letter
//! commands over a socket pair. `CORELANE_GPU_MEM_KILL_RUNS` says how many random runs there are.

mod common;

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use common::{PATIENCE, Raw, until};
use corelane_gpu_mem::backend::Access;
use corelane_gpu_mem::backend::host::{GRANULARITY_BYTES, HostConfig, HostMapper};
use corelane_gpu_mem::client::{Dial, Session, runtime_state};
use corelane_gpu_mem::failover_lock::FailoverLock;
use corelane_gpu_mem::lock::{Grant, LockType, State};
use corelane_gpu_mem::protocol::v1::{
    AllocateRequest, Bytes, CommitLayoutRequest, CommitRequest, ExportAllocationRequest,
    GetLockStateRequest, HandshakeRequest, ListAllocationsRequest, MetadataPutRequest, Reply,
    Request,
};
use corelane_gpu_mem::region::Region;
use corelane_gpu_mem::server::{Server, ServerConfig};

fn main() {
    let args: Vec<String> = std::env::args().collect();
    if args.get(1).map(String::as_str) == Some("--serve") {
        return serve(Path::new(&args[2]));
    }
    if args.iter().any(|arg| arg == "--list") {
        return;
    }
    let tests: [(&str, fn()); 6] = [
        (
            "ten_thousand_exports_leave_no_descriptor",
            ten_thousand_exports_leave_no_descriptor,
        ),
        (
            "a_write_through_a_readers_mapping_faults",
            a_write_through_a_readers_mapping_faults,
        ),
        (
            "b10_a_writer_killed_at_each_step",
            b10_a_writer_killed_at_each_step,
        ),
        ("random_lives_and_deaths", random_lives_and_deaths),
        (
            "the_failover_lock_falls_with_its_holder",
            the_failover_lock_falls_with_its_holder,
        ),
        (
            "the_failover_lock_is_not_inherited",
            the_failover_lock_is_not_inherited,
        ),
    ];
    for (name, test) in tests {
        let start = Instant::now();
        test();
        println!(
            "test {name} ... ok ({:.1} s)",
            start.elapsed().as_secs_f64()
        );
    }
}

fn serve(dir: &Path) {
    // SAFETY: the service does not outlive the program that tests it.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    let host = HostConfig {
        granularity_bytes: 4096,
        ..HostConfig::default()
    };
    let config = ServerConfig::new(common::pools(dir, host));
    Server::bind(config).expect("the service starts").run();
}

/// The service in another process, killed when this is dropped.
struct Service {
    dir: tempfile::TempDir,
    child: Child,
    /// Descriptors of a service with nobody and nothing in it.
    baseline: usize,
}

impl Service {
    fn start() -> Service {
        let dir = tempfile::tempdir().expect("a directory");
        let program = std::env::current_exe().expect("this program");
        let child = Command::new(program)
            .arg("--serve")
            .arg(dir.path())
            .stdin(Stdio::null())
            .spawn()
            .expect("it starts");
        let mut service = Service {
            dir,
            child,
            baseline: 0,
        };
        runtime_state(&service.dial()).expect("the service answers");
        until(
            || service.descriptors() == service.settled(),
            || "descriptors come and go".into(),
        );
        service.baseline = service.descriptors();
        service
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("weights.sock")
    }

    fn dial(&self) -> Dial {
        Dial::new(self.path())
    }

    fn descriptors(&self) -> usize {
        let dir = format!("/proc/{}/fd", self.child.id());
        std::fs::read_dir(dir).expect("the service lives").count()
    }

    /// The count once the probe's own connection is gone: seen twice, a moment apart.
    fn settled(&self) -> usize {
        let before = self.descriptors();
        std::thread::sleep(Duration::from_millis(2));
        before.max(self.descriptors())
    }

    fn signal(&self, signal: i32) {
        // SAFETY: the child is ours and was not waited for.
        unsafe { libc::kill(self.child.id() as i32, signal) };
    }

    /// Waits until nothing is open but these.
    fn until_descriptors(&self, more: usize) {
        let wanted = self.baseline + more;
        until(
            || self.descriptors() == wanted,
            || format!("{} descriptors, not {wanted}", self.descriptors()),
        );
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A forked client.
struct Client {
    pid: i32,
    orders: UnixStream,
}

/// Forks. The closure runs in the child, which never returns from here.
fn fork(child: impl FnOnce()) -> i32 {
    // SAFETY: this program has one thread, so the child may do anything.
    match unsafe { libc::fork() } {
        -1 => panic!("fork failed"),
        0 => {
            // SAFETY: whatever goes wrong, nobody stays behind for long.
            unsafe { libc::alarm(CHILD_SECONDS_MAX) };
            child();
            // SAFETY: ends the child without running anything of the parent's.
            unsafe { libc::_exit(0) }
        }
        pid => pid,
    }
}

fn wait(pid: i32) -> ExitStatus {
    let mut status = 0;
    // SAFETY: the child is ours; the pointer is to a live value.
    let answer = unsafe { libc::waitpid(pid, &raw mut status, 0) };
    assert_eq!(answer, pid);
    ExitStatus::from_raw(status)
}

impl Client {
    fn new(socket: &Path) -> Client {
        let (orders, theirs) = UnixStream::pair().expect("a pair");
        orders.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let parent = orders.as_raw_fd();
        let pid = fork(|| {
            // SAFETY: the child ends with its parent, and does not keep the parent's end open.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                libc::close(parent);
            }
            obey(theirs, socket);
        });
        Client { pid, orders }
    }

    fn order(&mut self, letter: u8) {
        self.orders.write_all(&[letter]).expect("it listens");
    }

    /// Gives an order and waits for its result.
    fn done(&mut self, letter: u8) -> u8 {
        self.order(letter);
        self.report()
    }

    fn report(&mut self) -> u8 {
        let mut byte = [0];
        self.orders.read_exact(&mut byte).expect("it reports");
        byte[0]
    }

    /// Kills it and waits until the kernel has closed all that it had.
    fn kill(self) {
        self.kill_only();
        wait(self.pid);
    }

    fn kill_only(&self) {
        // SAFETY: the child is ours and was not waited for.
        unsafe { libc::kill(self.pid, libc::SIGKILL) };
    }
}

/// A client's life: one letter, one act, one letter back.
fn obey(mut orders: UnixStream, socket: &Path) {
    let mut raw = Raw::connect(socket);
    let mut letter = [0];
    while orders.read_exact(&mut letter).is_ok() {
        let report = act(letter[0], &mut raw);
        if let Some(report) = report {
            let _ = orders.write_all(&[report]);
        }
    }
}

fn act(letter: u8, raw: &mut Raw) -> Option<u8> {
    let handshake = |lock_type| HandshakeRequest {
        lock_type,
        timeout_ms: None,
    };
    match letter {
        b'W' => raw.say(handshake(LockType::Rw)),
        b'R' => raw.say(handshake(LockType::Ro)),
        b'O' => raw.say(handshake(LockType::RwOrRo)),
        b'D' => raw.say(handshake(LockType::RwDataOrRw)),
        b'?' => match raw.hear() {
            Some(Reply::Handshake(answer)) => return Some(grant_letter(answer.granted_lock_type?)),
            other => panic!("{other:?}"),
        },
        b'a' => {
            return Some(kind(&raw.ask(AllocateRequest {
                size: 1,
                tag: "t".into(),
            })));
        }
        b'm' => {
            let Reply::ListAllocations(list) = raw.ask(ListAllocationsRequest { tag: None }) else {
                return Some(b'e');
            };
            let Some(first) = list.allocations.first() else {
                return Some(b'-');
            };
            return Some(kind(&raw.ask(put(&first.allocation_id))));
        }
        b'c' => return Some(kind(&raw.ask(CommitRequest {}))),
        b'l' => return Some(kind(&raw.ask(CommitLayoutRequest {}))),
        b'C' => raw.say(CommitRequest {}),
        b'A' => raw.say(AllocateRequest {
            size: 1,
            tag: "t".into(),
        }),
        b'h' => {
            let frame = Request::from(put("half")).encode();
            raw.say_bytes(&frame[..frame.len() / 2]);
        }
        b'H' => {
            let frame = Request::from(handshake(LockType::Rw)).encode();
            raw.say_bytes(&frame[..frame.len() / 2]);
        }
        b'x' => {
            let Reply::ListAllocations(list) = raw.ask(ListAllocationsRequest { tag: None }) else {
                return Some(b'e');
            };
            for found in list.allocations {
                raw.say(ExportAllocationRequest {
                    allocation_id: found.allocation_id,
                });
            }
        }
        b's' => return Some(kind(&raw.ask(GetLockStateRequest {}))),
        other => panic!("no such order: {other}"),
    }
    Some(b'.')
}

fn put(id: &str) -> MetadataPutRequest {
    let (key, allocation_id) = ("k".into(), id.into());
    MetadataPutRequest {
        key,
        allocation_id,
        offset_bytes: 0,
        value: Bytes(vec![0; 64]),
    }
}

fn kind(reply: &Reply) -> u8 {
    if matches!(reply, Reply::Error(_)) {
        b'e'
    } else {
        b'.'
    }
}

fn grant_letter(grant: Grant) -> u8 {
    match grant {
        Grant::Rw => b'w',
        Grant::RwData => b'd',
        Grant::Ro => b'r',
    }
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
    for (step, orders, state, allocations) in STEPS {
        let service = Service::start();
        let mut writer = Client::new(&service.path());
        for order in orders {
            writer.done(*order);
        }
        writer.kill();
        let now = || runtime_state(&service.dial()).expect("the service answers");
        until(
            || (now().state, now().allocation_count) == (state, allocations),
            || format!("{step}: {:?}", now()),
        );
        service.until_descriptors(allocations as usize);
    }
}

/// What a living client is to the lock.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Stand {
    Waits(LockType),
    Holds(Grant),
    /// Its lock is gone, by its own commit.
    Over,
}

/// The clients in order of arrival, and what must be true of the service.
struct Run<'a> {
    service: &'a Service,
    clients: Vec<(Client, Stand)>,
    published: bool,
    durable: bool,
    allocations: u64,
    trace: VecDeque<String>,
}

impl Run<'_> {
    fn holders(&self, writer: bool) -> usize {
        let holds = |stand: &Stand| matches!(stand, Stand::Holds(g) if g.is_writer() == writer);
        self.clients
            .iter()
            .filter(|(_, stand)| holds(stand))
            .count()
    }

    fn waiting_writers(&self) -> usize {
        let waits = |stand: &Stand| matches!(stand, Stand::Waits(t) if t.counts_as_writer());
        self.clients
            .iter()
            .filter(|(_, stand)| waits(stand))
            .count()
    }

    fn offer(&self, lock_type: LockType) -> Option<Grant> {
        let nobody = self.holders(true) + self.holders(false) == 0;
        let readable = self.published && self.holders(true) == 0 && self.waiting_writers() == 0;
        match lock_type {
            LockType::Rw => nobody.then_some(Grant::Rw),
            LockType::RwDataOrRw if self.durable => nobody.then_some(Grant::RwData),
            LockType::RwDataOrRw => nobody.then_some(Grant::Rw),
            LockType::Ro => readable.then_some(Grant::Ro),
            LockType::RwOrRo if nobody && !self.published => Some(Grant::Rw),
            LockType::RwOrRo => readable.then_some(Grant::Ro),
        }
    }

    /// Grants what must now be granted, and hears it from the clients.
    fn wake(&mut self) {
        while let Some((index, grant)) = self.clients.iter().enumerate().find_map(|(i, (_, s))| {
            let Stand::Waits(lock_type) = *s else {
                return None;
            };
            self.offer(lock_type).map(|grant| (i, grant))
        }) {
            if grant == Grant::Rw {
                (self.published, self.durable, self.allocations) = (false, false, 0);
            }
            let (client, stand) = &mut self.clients[index];
            *stand = Stand::Holds(grant);
            let report = client.done(b'?');
            assert_eq!(report, grant_letter(grant), "{:#?}", self.trace);
        }
    }

    /// What a stand's end means for the memory.
    fn ended(&mut self, stand: Stand) {
        if matches!(stand, Stand::Holds(grant) if grant.is_writer()) && !self.durable {
            self.allocations = 0;
        }
    }

    fn check(&self) {
        let state = match (self.holders(true), self.holders(false)) {
            (1, _) => State::Rw,
            (_, 1..) => State::Ro,
            _ if self.published => State::Committed,
            _ if self.durable => State::LayoutCommitted,
            _ => State::Empty,
        };
        let waiters = self
            .clients
            .iter()
            .filter(|(_, s)| matches!(s, Stand::Waits(_)))
            .count();
        let wanted = (
            state,
            self.holders(false) as u64,
            self.waiting_writers() as u64,
            Some(waiters as u64),
            self.allocations,
        );
        let dial = self.service.dial();
        let found = || {
            let now = runtime_state(&dial).expect("the service answers");
            let counts = (
                now.ro_session_count,
                now.waiting_writers,
                now.waiting_clients.0,
            );
            (
                now.state,
                counts.0,
                counts.1,
                counts.2,
                now.allocation_count,
            )
        };
        until(
            || found() == wanted,
            || format!("{:?}, not {wanted:?}, after {:#?}", found(), self.trace),
        );
    }

    fn note(&mut self, what: String) {
        if self.trace.len() == 40 {
            self.trace.pop_front();
        }
        self.trace.push_back(what);
    }

    fn step(&mut self, random: &mut Random) {
        let roll = random.below(10);
        if self.clients.is_empty() || (roll < 4 && self.clients.len() < 8) {
            return self.arrive(random);
        }
        if roll < 7 {
            return self.act(random);
        }
        self.slaughter(random);
    }

    fn arrive(&mut self, random: &mut Random) {
        let choices = [
            (b'W', LockType::Rw),
            (b'R', LockType::Ro),
            (b'O', LockType::RwOrRo),
            (b'D', LockType::RwDataOrRw),
        ];
        let (letter, lock_type) = choices[random.below(4)];
        let mut client = Client::new(&self.service.path());
        client.done(letter);
        self.note(format!("{} asks {lock_type}", client.pid));
        self.clients.push((client, Stand::Waits(lock_type)));
        self.wake();
    }

    fn act(&mut self, random: &mut Random) {
        let index = random.below(self.clients.len());
        let (client, stand) = &mut self.clients[index];
        let (Stand::Holds(grant), pid) = (*stand, client.pid) else {
            return;
        };
        let letter = *random.pick(b"aamclxs");
        let report = client.done(letter);
        self.note(format!("{pid} ({grant}) does {}", char::from(letter)));
        let writes = matches!(letter, b'a' | b'm' | b'c' | b'l') && report != b'-';
        assert_eq!(
            report == b'e',
            writes && grant != Grant::Rw,
            "{:#?}",
            self.trace
        );
        match (letter, grant) {
            (b'a', Grant::Rw) => self.allocations += 1,
            (b'l', Grant::Rw) => {
                self.durable = true;
                self.clients[index].1 = Stand::Holds(Grant::RwData);
            }
            (b'c', Grant::Rw) => {
                self.published = true;
                self.clients[index].1 = Stand::Over;
                self.wake();
            }
            // Replies with descriptors are left unread; nothing more can be asked of it.
            (b'x', _) => {
                let (client, stand) = self.clients.remove(index);
                client.kill();
                self.ended(stand);
                self.wake();
            }
            _ => {}
        }
    }

    /// Kills one to three clients at a moment at which the service sees nothing, some of them in
    /// the middle of a frame.
    fn slaughter(&mut self, random: &mut Random) {
        let mut victims = Vec::new();
        for _ in 0..=random.below(3) {
            if self.clients.is_empty() {
                break;
            }
            let (mut client, stand) = self.clients.remove(random.below(self.clients.len()));
            if matches!(stand, Stand::Holds(_)) && random.below(2) == 0 {
                client.done(b'h');
            }
            self.note(format!("{} ({stand:?}) is killed", client.pid));
            victims.push((client, stand));
        }
        self.service.signal(libc::SIGSTOP);
        for (client, stand) in victims {
            client.kill();
            self.ended(stand);
        }
        self.service.signal(libc::SIGCONT);
        self.wake();
    }
}

fn random_lives_and_deaths() {
    let runs = std::env::var("CORELANE_GPU_MEM_KILL_RUNS").ok();
    let runs: u64 = runs.and_then(|runs| runs.parse().ok()).unwrap_or(150);
    let service = Service::start();
    let (mut published, mut durable, mut allocations) = (false, false, 0);
    for seed in 0..runs {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let trace = VecDeque::from([format!("seed {seed}")]);
        let clients = Vec::new();
        let mut run = Run {
            service: &service,
            clients,
            published,
            durable,
            allocations,
            trace,
        };
        for _ in 0..4 + random.below(12) {
            run.step(&mut random);
            run.check();
        }
        // Everybody who is left dies, writers and waiters alike, in order of arrival.
        while !run.clients.is_empty() {
            let (client, stand) = run.clients.remove(0);
            client.kill();
            run.ended(stand);
            run.wake();
        }
        run.check();
        service.until_descriptors(run.allocations as usize);
        (published, durable, allocations) = (run.published, run.durable, run.allocations);
    }
    println!("{runs} random runs");
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
        // This child outlives the holder; with upstream's lock it would keep it.
        fork(|| {
            let _ = orphans.read_exact(&mut [0]);
        });
        there.write_all(b".").expect("heard");
        let _ = there.read_exact(&mut [0]);
    });
    here.read_exact(&mut [0]).expect("it holds the lock");
    // SAFETY: the child is ours and was not waited for.
    unsafe { libc::kill(holder, libc::SIGKILL) };
    wait(holder);
    let mut lock = FailoverLock::new(&path);
    // Some patience, for the orphan closes it when it first runs.
    lock.acquire("1", Some(PATIENCE))
        .expect("no child keeps it");
    grandparent.write_all(b".").expect("the orphan may end");
}

const CHILD_SECONDS_MAX: u32 = 600;

/// Numbers that look random and are the same each time (xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as usize % bound
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }
}
