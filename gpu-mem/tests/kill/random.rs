//! Random lives and deaths of one to eight clients, beside a model of what the service must be.
//!
//! `CORELANE_GPU_MEM_KILL_RUNS` says how many runs there are. Each is drawn from its number, so a
//! failure is met again with the same count. From ten thousand on, every step of a life must have
//! been the last one in a crowd of every size.

use std::collections::{BTreeMap, VecDeque};

use corelane_gpu_mem::client::runtime_state;
use corelane_gpu_mem::lock::{Grant, LockType, State};

use crate::actors::{Client, Memory, Service, grant_letter};
use crate::common::until;

/// What a living client is to the lock.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Stand {
    Waits(LockType),
    Holds(Grant),
    /// Its lock is gone, by its own commit.
    Over,
}

/// Where a client's life ended.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Step {
    WriterGranted,
    WriterAllocated,
    WriterAllocationUnread,
    WriterHalfAFrame,
    WriterBeforeCommit,
    WriterCommitUnread,
    WriterCommitted,
    LayoutDurable,
    Reading,
    ReaderHalfAFrame,
    DescriptorsUnread,
    WaitsToWrite,
    WaitsToRead,
    WaitsForEither,
}

const STEPS: [Step; 14] = [
    Step::WriterGranted,
    Step::WriterAllocated,
    Step::WriterAllocationUnread,
    Step::WriterHalfAFrame,
    Step::WriterBeforeCommit,
    Step::WriterCommitUnread,
    Step::WriterCommitted,
    Step::LayoutDurable,
    Step::Reading,
    Step::ReaderHalfAFrame,
    Step::DescriptorsUnread,
    Step::WaitsToWrite,
    Step::WaitsToRead,
    Step::WaitsForEither,
];

const CLIENTS_MAX: usize = 8;

/// How often a life ended at a step, by how many clients there were.
type Deaths = BTreeMap<Step, [u64; CLIENTS_MAX]>;

struct Life {
    client: Client,
    stand: Stand,
    /// The last letter that a writer was told, if it changed anything.
    last: u8,
}

impl Life {
    fn step(&self) -> Step {
        match (self.stand, self.last) {
            (Stand::Waits(LockType::Ro), _) => Step::WaitsToRead,
            (Stand::Waits(LockType::RwOrRo), _) => Step::WaitsForEither,
            (Stand::Waits(_), _) => Step::WaitsToWrite,
            (Stand::Over, _) => Step::WriterCommitted,
            (Stand::Holds(Grant::RwData), _) => Step::LayoutDurable,
            (Stand::Holds(Grant::Ro), _) => Step::Reading,
            (Stand::Holds(Grant::Rw), b'a') => Step::WriterAllocated,
            (Stand::Holds(Grant::Rw), b'm') => Step::WriterBeforeCommit,
            (Stand::Holds(Grant::Rw), _) => Step::WriterGranted,
        }
    }
}

/// What stays from run to run.
#[derive(Default)]
struct Pool {
    published: bool,
    durable: bool,
    allocations: u64,
}

/// The clients in order of arrival, and what must be true of the service.
struct Run<'a> {
    service: &'a Service,
    pool: &'a mut Pool,
    deaths: &'a mut Deaths,
    lives: Vec<Life>,
    clients_max: usize,
    trace: VecDeque<String>,
}

impl Run<'_> {
    fn count(&self, wanted: impl Fn(&Stand) -> bool) -> usize {
        self.lives.iter().filter(|life| wanted(&life.stand)).count()
    }

    fn holders(&self, writer: bool) -> usize {
        self.count(|stand| matches!(stand, Stand::Holds(g) if g.is_writer() == writer))
    }

    fn waiting_writers(&self) -> usize {
        self.count(|stand| matches!(stand, Stand::Waits(t) if t.counts_as_writer()))
    }

    fn offer(&self, lock_type: LockType) -> Option<Grant> {
        let nobody = self.holders(true) + self.holders(false) == 0;
        let readable = self.pool.published && self.holders(true) == 0;
        let readable = readable && self.waiting_writers() == 0;
        match lock_type {
            LockType::Rw => nobody.then_some(Grant::Rw),
            LockType::RwDataOrRw if self.pool.durable => nobody.then_some(Grant::RwData),
            LockType::RwDataOrRw => nobody.then_some(Grant::Rw),
            LockType::Ro => readable.then_some(Grant::Ro),
            LockType::RwOrRo if nobody && !self.pool.published => Some(Grant::Rw),
            LockType::RwOrRo => readable.then_some(Grant::Ro),
        }
    }

    /// Grants what must now be granted, and hears it from the clients.
    fn wake(&mut self) {
        while let Some((index, grant)) = self.lives.iter().enumerate().find_map(|(i, life)| {
            let Stand::Waits(lock_type) = life.stand else {
                return None;
            };
            self.offer(lock_type).map(|grant| (i, grant))
        }) {
            if grant == Grant::Rw {
                *self.pool = Pool::default();
            }
            let life = &mut self.lives[index];
            life.stand = Stand::Holds(grant);
            life.client.order(b'?');
            let report = life.client.try_report();
            let heard = report.as_ref().ok().map(|letter| char::from(*letter));
            let wanted = char::from(grant_letter(grant));
            if heard != Some(wanted) {
                let pid = life.client.pid;
                let state = runtime_state(&self.service.dial());
                let trace = &self.trace;
                panic!("{pid} heard {report:?}, not {wanted}; {state:?} after {trace:#?}");
            }
        }
    }

    /// A life is over: what that means for the memory, and for the count of deaths.
    fn ended(&mut self, stand: Stand, step: Step, crowd: usize) {
        self.deaths.entry(step).or_default()[crowd - 1] += 1;
        if step == Step::WriterCommitUnread {
            self.pool.published = true;
        } else if matches!(stand, Stand::Holds(g) if g.is_writer()) && !self.pool.durable {
            self.pool.allocations = 0;
        }
    }

    /// State, queues, memory and descriptors of the service, as they must be now.
    fn check(&self) {
        let state = match (self.holders(true), self.holders(false)) {
            (1, _) => State::Rw,
            (_, 1..) => State::Ro,
            _ if self.pool.published => State::Committed,
            _ if self.pool.durable => State::LayoutCommitted,
            _ => State::Empty,
        };
        let waiters = self.count(|stand| matches!(stand, Stand::Waits(_)));
        let wanted = (
            (state, self.holders(false) as u64),
            (self.waiting_writers() as u64, Some(waiters as u64)),
            (
                self.pool.allocations,
                Some(self.pool.allocations * self.service.block_bytes),
            ),
        );
        let dial = self.service.dial();
        let found = || {
            let now = runtime_state(&dial).expect("the service answers");
            (
                (now.state, now.ro_session_count),
                (now.waiting_writers, now.waiting_clients.0),
                (now.allocation_count, now.total_bytes.0),
            )
        };
        until(
            || found() == wanted,
            || format!("{:?}, not {wanted:?}, after {:#?}", found(), self.trace),
        );
        // A socket for each client that is not over, a descriptor for each block.
        let sockets = self.count(|stand| *stand != Stand::Over);
        self.service
            .until_descriptors(sockets + self.pool.allocations as usize);
    }

    fn note(&mut self, what: String) {
        if self.trace.len() == 40 {
            self.trace.pop_front();
        }
        self.trace.push_back(what);
    }

    fn step(&mut self, random: &mut Random) {
        let roll = random.below(10);
        if self.lives.is_empty() || (roll < 6 && self.lives.len() < self.clients_max) {
            return self.arrive(random);
        }
        if roll < 9 {
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
        let stand = Stand::Waits(lock_type);
        self.lives.push(Life {
            client,
            stand,
            last: 0,
        });
        self.wake();
    }

    fn act(&mut self, random: &mut Random) {
        let index = random.below(self.lives.len());
        let life = &mut self.lives[index];
        let (Stand::Holds(grant), pid) = (life.stand, life.client.pid) else {
            return;
        };
        let letter = *random.pick(b"aamamammclxs");
        let report = life.client.done(letter);
        let writes = matches!(letter, b'a' | b'm' | b'c' | b'l') && report != b'-';
        if writes && report != b'e' {
            life.last = letter;
        }
        self.note(format!("{pid} ({grant}) does {}", char::from(letter)));
        assert_eq!(
            report == b'e',
            writes && grant != Grant::Rw,
            "{:#?}",
            self.trace
        );
        match (letter, grant) {
            (b'a', Grant::Rw) => self.pool.allocations += 1,
            (b'l', Grant::Rw) => {
                self.pool.durable = true;
                self.lives[index].stand = Stand::Holds(Grant::RwData);
            }
            (b'c', Grant::Rw) => {
                self.pool.published = true;
                self.lives[index].stand = Stand::Over;
                self.wake();
            }
            // Replies with descriptors are left unread; nothing more can be asked of it.
            (b'x', _) => {
                let crowd = self.lives.len();
                let life = self.lives.remove(index);
                life.client.kill();
                self.ended(life.stand, Step::DescriptorsUnread, crowd);
                self.wake();
            }
            _ => {}
        }
    }

    /// Kills one to three clients at a moment at which the service sees nothing, some of them in
    /// the middle of a frame, some with a request on its way.
    fn slaughter(&mut self, random: &mut Random) {
        let crowd = self.lives.len();
        self.service.stop();
        for _ in 0..=random.below(3) {
            if self.lives.is_empty() {
                break;
            }
            let mut life = self.lives.remove(random.below(self.lives.len()));
            let (order, step) = last_words(&life, random);
            if let Some(order) = order {
                life.client.done(order);
            }
            self.note(format!("{} is killed: {step:?}", life.client.pid));
            life.client.kill();
            self.ended(life.stand, step, crowd);
        }
        self.service.go_on();
        self.wake();
    }
}

/// What a client still sends before it dies, and what that makes of its death.
fn last_words(life: &Life, random: &mut Random) -> (Option<u8>, Step) {
    match (life.stand, random.below(4)) {
        (Stand::Holds(Grant::Rw), 0) => (Some(b'h'), Step::WriterHalfAFrame),
        (Stand::Holds(Grant::Rw), 1) => (Some(b'A'), Step::WriterAllocationUnread),
        (Stand::Holds(Grant::Rw), 2) => (Some(b'C'), Step::WriterCommitUnread),
        (Stand::Holds(Grant::Ro), 0 | 1) => (Some(b'h'), Step::ReaderHalfAFrame),
        // Half a frame where nothing is expected yet changes nothing.
        (Stand::Waits(_), 0) => (Some(b'h'), life.step()),
        _ => (None, life.step()),
    }
}

pub(crate) fn random_lives_and_deaths() {
    live_and_die(Memory::Host, runs());
}

/// A third as many, where the memory is the driver's.
#[cfg(feature = "cuda")]
pub(crate) fn random_lives_and_deaths_on_the_stand_in() {
    live_and_die(Memory::StandIn, runs() / 3);
}

fn runs() -> u64 {
    let runs = std::env::var("CORELANE_GPU_MEM_KILL_RUNS").ok();
    runs.and_then(|runs| runs.parse().ok()).unwrap_or(150)
}

fn live_and_die(memory: Memory, runs: u64) {
    let service = Service::on(memory);
    let (mut pool, mut deaths) = (Pool::default(), Deaths::new());
    for seed in 0..runs {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let clients_max = 1 + seed as usize % CLIENTS_MAX;
        let trace = VecDeque::from([format!("run {seed}, up to {clients_max} clients")]);
        let mut run = Run {
            service: &service,
            pool: &mut pool,
            deaths: &mut deaths,
            lives: Vec::new(),
            clients_max,
            trace,
        };
        // Every other time all of them are there before anything else happens.
        if seed / CLIENTS_MAX as u64 % 2 == 1 {
            for _ in 0..clients_max {
                run.arrive(&mut random);
                // The service has seen it: who asks first is first.
                run.check();
            }
        }
        for _ in 0..4 + random.below(3 * clients_max) {
            run.step(&mut random);
            run.check();
        }
        // Everybody who is left dies, writers and waiters alike, in order of arrival.
        while !run.lives.is_empty() {
            let crowd = run.lives.len();
            let life = run.lives.remove(0);
            let step = life.step();
            life.client.kill();
            run.ended(life.stand, step, crowd);
            run.wake();
        }
        run.check();
    }
    println!("{runs} random runs on {memory:?}");
    report(&deaths, runs);
}

/// Prints what was covered, and fails if it was not enough.
fn report(deaths: &Deaths, runs: u64) {
    println!("deaths by step, with 1 to {CLIENTS_MAX} clients:");
    for step in STEPS {
        let row = deaths.get(&step).copied().unwrap_or_default();
        let total: u64 = row.iter().sum();
        let words: Vec<String> = row.iter().map(|count| format!("{count:6}")).collect();
        println!("  {:<24}{}", format!("{step:?}"), words.concat());
        assert!(total > 0 || runs < 100, "nobody died at {step:?}");
        for (others, count) in row.iter().enumerate() {
            // Whoever waits to write, or for either, waits for somebody.
            let alone = others == 0 && matches!(step, Step::WaitsToWrite | Step::WaitsForEither);
            let clients = others + 1;
            assert!(
                *count > 0 || alone || runs < 10_000,
                "nobody died at {step:?} among {clients}"
            );
        }
    }
}

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
