//! One scenario: a shard, its callers and workers, some disorder, then quiet; and what must hold.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use corelane_engine::buffers::Buffers;
use corelane_engine::config::{RingKind, ShardConfig};
use corelane_engine::directory::{Ack, Directory, Policy, RelayTimes, Route};
use corelane_engine::mesh::{self, Receiver, Sender};
use corelane_engine::ring::sim::{Faults, Net, Sim};
use corelane_engine::shard::{Command, Lanes, Report, Shard};
use corelane_engine::stats::Stats;

use crate::answer::Way;
use crate::book::{Acceptance, Book, Entry, Kind, MESSAGE_BYTES_MAX};
use crate::caller::{Caller, Exit, State};
use crate::dice::Dice;
use crate::heard::End;
use crate::home::Home;
use crate::worker::Worker;

/// A worker's callers are remembered for ten seconds (`ledger.rs`).
const REMEMBERED_NS: u64 = 9_000_000_000;
/// Everything has come to its end after so long.
const QUIET_WITHIN_NS: u64 = 240_000_000_000;

/// What kind of weather a scenario has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Weather {
    Calm,
    Crumbs,
    Storm,
}

impl Weather {
    fn faults(self) -> Faults {
        match self {
            Weather::Calm => Faults::NONE,
            Weather::Crumbs => Faults::CRUMBS,
            Weather::Storm => Faults::STORM,
        }
    }
}

/// A shard on a simulated network, and the ends of all that it is connected to.
pub struct World {
    pub net: Net,
    pub shard: Shard<Sim>,
    pub stats: Arc<Stats>,
    pub book: Book,
    pub callers: Vec<Caller>,
    pub workers: Vec<Worker>,
    pub home: Home,
    pub dice: Dice,
    pub directory: Directory,
    commands: Sender<Command>,
    _reports: Receiver<Report>,
    weather: Weather,
    /// One worker cannot be reached.
    black_hole: bool,
    /// Instances that left the directory, and when.
    unlisted: Vec<(u64, u64)>,
    longest: Duration,
}

pub fn router() -> SocketAddr {
    "10.0.0.1:1".parse().unwrap()
}

/// Where workers call the router home.
pub fn relay_home() -> SocketAddr {
    "10.0.0.1:2".parse().unwrap()
}

/// Long enough for whoever is merely slow, and short enough to be waited for.
const RELAY_TIMES: RelayTimes = RelayTimes {
    home_ns: 20_000_000_000,
    first_item_ns: 30_000_000_000,
    inactivity_ns: 40_000_000_000,
};

pub fn listen_path(route: usize) -> String {
    format!("0/sim/router/{route}")
}

impl World {
    pub fn new(seed: u64, weather: Weather, change: impl FnOnce(&mut ShardConfig)) -> World {
        World::with(seed, weather, false, change)
    }

    /// One whose responses pass through the router, if that is wanted.
    pub fn with(
        seed: u64,
        weather: Weather,
        relayed: bool,
        change: impl FnOnce(&mut ShardConfig),
    ) -> World {
        let mut config = ShardConfig::new(0, 0, RingKind::Epoll, None);
        config.connections_max = 256;
        config.in_flight_max = 512;
        config.message_bytes_max = MESSAGE_BYTES_MAX as u64;
        (config.buffers, config.buffer_bytes) = (1024, 4096);
        change(&mut config);
        let net = Net::new(seed, weather.faults());
        let buffers = Buffers::new(config.buffers, config.buffer_bytes as usize).unwrap();
        let ring = Sim::beside(&net, &buffers);
        let listener = TcpListener::from(net.listen(router()).unwrap());
        let (commands, command_receiver) = mesh::lane().unwrap();
        let (report_sender, reports) = mesh::lane().unwrap();
        let stats = Arc::new(Stats::default());
        let lanes = Lanes {
            commands: command_receiver,
            reports: report_sender,
            insecure: mesh::lane().unwrap().0,
            outbound: mesh::lane().unwrap().0,
        };
        let (listener, shown) = (Some(listener), Arc::clone(&stats));
        let mut shard = Shard::router(config, ring, buffers, listener, shown, lanes);
        if relayed {
            let listener = TcpListener::from(net.listen(relay_home()).unwrap());
            shard.relay_home(listener, relay_home());
        }
        shard.start();
        World {
            home: Home::open(&net),
            net,
            shard,
            stats,
            book: Book {
                relayed,
                ..Book::default()
            },
            callers: Vec::new(),
            workers: Vec::new(),
            dice: Dice::new(seed),
            directory: Directory::default(),
            commands,
            _reports: reports,
            weather,
            black_hole: false,
            unlisted: Vec::new(),
            longest: Duration::ZERO,
        }
    }

    /// A route to nobody yet.
    pub fn add_route(&mut self, policy: Policy, ack: Ack) -> &mut Route {
        let index = self.directory.routes.len();
        self.directory.routes.push(Route {
            listen: format!("sim/router/{index}"),
            target: format!("sim/worker/{index}"),
            paths: vec![listen_path(index).into_bytes()],
            policy,
            header: "x-test".into(),
            ack,
            ack_timeout_ns: 400_000_000,
            retries_max: 3,
            hold_bytes: 1 << 20,
            relay: self.book.relayed.then_some(RELAY_TIMES),
            ..Route::default()
        });
        self.directory.routes.last_mut().unwrap()
    }

    /// A worker, which is listed behind all routes.
    pub fn add_worker(&mut self) -> &mut Worker {
        let worker = Worker::start(&self.net, self.workers.len());
        for (route, instance) in self.directory.routes.iter_mut().zip(&worker.instances) {
            route.instances.push(instance.clone());
        }
        self.workers.push(worker);
        self.workers.last_mut().unwrap()
    }

    /// A caller with requests of such sizes for the first route.
    pub fn add_caller(&mut self, body_bytes: &[usize]) -> &mut Caller {
        let mut plan = Vec::new();
        for bytes in body_bytes {
            let path = listen_path(0);
            plan.push(self.book.write(&mut self.dice, &path, Kind::Routed, *bytes));
        }
        let caller = Caller::dial(&self.net, router(), &self.book, plan);
        self.callers.push(caller);
        self.callers.last_mut().unwrap()
    }

    pub fn publish(&mut self) {
        let directory = Arc::new(self.directory.clone());
        self.commands.send(Command::Directory(directory)).unwrap();
    }

    /// Everybody acts once, then the shard. Time passes faster while nothing moves.
    pub fn step(&mut self) {
        let mut moved = false;
        for caller in &mut self.callers {
            moved |= caller.step(&self.net, &mut self.book);
        }
        for worker in &mut self.workers {
            moved |= worker.step(&self.net, &mut self.book, &mut self.dice);
        }
        moved |= self.home.step(&self.net, &mut self.book, &mut self.dice);
        self.longest = match moved {
            true => Duration::from_micros(200),
            false => {
                (self.longest * 2).clamp(Duration::from_micros(200), Duration::from_millis(250))
            }
        };
        self.shard.tick(self.longest).unwrap();
    }

    /// Steps until `condition`; panics when it does not come true.
    pub fn until(&mut self, what: &str, mut condition: impl FnMut(&World) -> bool) {
        let deadline_ns = self.net.now_ns() + QUIET_WITHIN_NS;
        let mut steps = 0;
        while !condition(self) {
            self.step();
            steps += 1;
            let in_time = self.net.now_ns() < deadline_ns && steps < 300_000;
            assert!(in_time, "never happened: {what}\n{}", self.describe());
        }
    }

    fn describe(&self) -> String {
        let routes: Vec<_> = self
            .directory
            .routes
            .iter()
            .map(|route| {
                (
                    route.policy,
                    route.ack,
                    route.hold_bytes,
                    route.retries_max,
                    route.instances.len(),
                )
            })
            .collect();
        let cells: Vec<String> = self
            .stats
            .shard
            .each()
            .into_iter()
            .filter(|cell| cell.3 > 0)
            .map(|(name, _, _, value)| format!("{name} {value}"))
            .collect();
        let callers: Vec<String> = self
            .callers
            .iter()
            .map(|caller| {
                let (complete, replies) = (caller.complete(), caller.replies);
                let plan: Vec<_> = caller
                    .plan
                    .iter()
                    .map(|number| (number, self.book.entries[*number].frame.len()))
                    .collect();
                format!(
                    "{:?} {:?}: {complete} complete, {replies} replies, {plan:?}",
                    caller.state, caller.exit
                )
            })
            .collect();
        let workers: Vec<String> = self
            .workers
            .iter()
            .map(|worker| {
                format!(
                    "{:?} alive {} since {:?}",
                    worker.manner,
                    worker.is_alive(),
                    worker.deaths_ns
                )
            })
            .collect();
        let weather = self.weather;
        format!(
            "{weather:?} {routes:?} unlisted {:?}\n{}\n{}\n{}",
            self.unlisted,
            cells.join(", "),
            callers.join("\n"),
            workers.join("\n")
        )
    }

    /// Something unexpected happens.
    fn disturb(&mut self) {
        let dice = &mut self.dice;
        if self.workers.is_empty() {
            return;
        }
        let which = dice.of(0..self.workers.len());
        match dice.of(0..4) {
            0 => self.workers[which].change(dice),
            1 if dice.happens(500) => self.workers[which].die(&self.net, dice),
            2 => {
                for route in &mut self.directory.routes {
                    route.policy = dice.pick(&POLICIES);
                    route.ack = dice.pick(&[Ack::OnForward, Ack::OnAccept]);
                }
                self.publish();
            }
            3 => {
                let route = dice.of(0..self.directory.routes.len());
                let instance = self.workers[which].instances[route].clone();
                let instances = &mut self.directory.routes[route].instances;
                match instances.iter().position(|known| known.id == instance.id) {
                    Some(at) => {
                        instances.remove(at);
                        self.unlisted.push((instance.id, self.net.now_ns()));
                    }
                    None => {
                        instances.push(instance);
                        instances.sort_by_key(|instance| instance.id);
                    }
                }
                self.publish();
            }
            _ => {}
        }
    }

    /// Runs until nobody waits for anything, and judges what has become of every request.
    pub fn settle(&mut self) {
        for caller in &mut self.callers {
            caller.deaf = false;
        }
        self.until("all callers have their replies", |world| {
            world
                .callers
                .iter()
                .all(|caller| caller.is_quiet() || caller.garbage)
        });
        self.until("all requests have ended", |world| {
            let stats = &world.stats.shard;
            let left = stats.in_flight.get() + stats.tells.get() + stats.relays.get();
            left == 0 && world.home.is_quiet()
        });
        let revived_ns = self.net.now_ns() + 6_000_000_000;
        self.until("all dead workers are noticed", |world| {
            world.net.now_ns() > revived_ns
                && world.stats.shard.tells.get() == 0
                && world.home.is_quiet()
        });
        self.judge_callers();
        match self.book.relayed {
            true => self.judge_responses(),
            false => self.judge_requests(),
        }
        self.judge_instances();
    }

    /// Whoever is listed and lives is connected again when the weather allows it.
    fn judge_instances(&mut self) {
        self.net.set_faults(Weather::Calm.faults());
        self.until("all living instances are connected", |world| {
            let lives = |address| {
                let mut workers = world.workers.iter();
                workers.any(|worker| worker.address == address && worker.is_alive())
            };
            let routes = world.directory.routes.iter();
            let listed = routes.flat_map(|route| &route.instances);
            let living = listed.filter(|instance| lives(instance.address)).count();
            let hole = world.black_hole;
            hole || world.stats.shard.instances_ready.get() == living as u64
        });
    }

    fn judge_callers(&self) {
        let mut lost = 0;
        for caller in &self.callers {
            if caller.state != State::Lost || caller.garbage {
                continue;
            }
            let half = matches!(caller.exit, Some((_, Exit::Half)));
            if !half || caller.replies < caller.complete() {
                lost += 1;
            }
        }
        let closed = self.stats.shard.slow_frames_closed.get();
        assert!(
            self.weather == Weather::Storm || lost <= closed,
            "{lost} callers were cut off for nothing\n{}",
            self.describe()
        );
    }

    fn judge_requests(&self) {
        let mut silent = Vec::new();
        for (number, entry) in self.book.entries.iter().enumerate() {
            let acknowledged = entry.reply.as_deref() == Some("");
            if !acknowledged || !entry.can_be_told || entry.told > 0 {
                continue;
            }
            if !entry
                .accepted
                .iter()
                .any(|accepted| self.is_in_good_hands(accepted))
            {
                silent.push((number, summary(entry)));
            }
        }
        let stats = &self.stats.shard;
        let excused = match self.weather {
            Weather::Storm => {
                stats.callers_untold.get() + stats.callers_settled.get() + self.home.cut as u64
            }
            Weather::Calm | Weather::Crumbs => 0,
        };
        assert!(
            silent.len() as u64 <= excused,
            "callers wait for ever: {silent:#?}\n{}",
            self.describe()
        );
    }

    /// Every caller who was acknowledged has heard an end, and none that a worker did not give him.
    fn judge_responses(&self) {
        for (number, entry) in self.book.entries.iter().enumerate() {
            let heard = &entry.heard;
            let attempt = heard.attempt.map(|attempt| &self.book.attempts[attempt]);
            let told = || format!("{number}: {heard:?} of {attempt:?}\n{}", self.describe());
            let acknowledged = entry.reply.as_deref() == Some("");
            if entry.reply.is_some() && !acknowledged {
                assert!(attempt.is_none(), "refused {}", told());
            }
            let storm = self.weather == Weather::Storm;
            if acknowledged && entry.can_be_told && !storm {
                assert!(heard.end.is_some() && heard.calls == 1, "{}", told());
            }
            let Some(attempt) = attempt else {
                continue;
            };
            let whole = attempt.way == Way::Whole && attempt.items == heard.items;
            let died = self.workers[attempt.by.0].deaths_ns.len() > attempt.by.1;
            match heard.end {
                Some(End::Whole) => assert!(whole, "{}", told()),
                Some(End::Left) => {}
                _ => assert!(storm || died || attempt.way != Way::Whole, "{}", told()),
            }
        }
    }

    /// The worker lives, or its death is not the router's to tell.
    fn is_in_good_hands(&self, accepted: &Acceptance) -> bool {
        let deaths_ns = &self.workers[accepted.worker].deaths_ns;
        let Some(death_ns) = deaths_ns.get(accepted.incarnation) else {
            return true;
        };
        let forgotten = *death_ns > accepted.at_ns + REMEMBERED_NS;
        let unlisted = |(id, _): &(u64, u64)| *id == accepted.instance;
        forgotten || self.unlisted.iter().any(unlisted)
    }

    /// Everybody leaves, and nothing may be left behind.
    pub fn end(&mut self) {
        for caller in &mut self.callers {
            caller.leave(&self.net);
        }
        for route in &mut self.directory.routes {
            route.instances.clear();
        }
        self.publish();
        self.until("nothing is left behind", |world| {
            let stats = &world.stats.shard;
            let gauges = [
                &stats.connections,
                &stats.upstreams,
                &stats.in_flight,
                &stats.buffers_held,
                &stats.pieces,
                &stats.chunks,
                &stats.timers,
                &stats.tells,
                &stats.relays,
                &stats.relay_strangers,
                &stats.relay_heads,
            ];
            gauges.iter().all(|gauge| gauge.get() == 0)
        });
        let listeners = 1 + usize::from(self.book.relayed);
        assert_eq!(
            self.net.open_descriptors(),
            listeners,
            "only listeners are left"
        );
        assert_eq!(self.shard.ring().buffers_held(), 0);
    }
}

fn summary(entry: &Entry) -> String {
    format!("{} bytes, accepted {:?}", entry.frame.len(), entry.accepted)
}

const POLICIES: [Policy; 6] = [
    Policy::RoundRobin,
    Policy::Random,
    Policy::PowerOfTwoChoices,
    Policy::LeastLoaded,
    Policy::Direct,
    Policy::Hash,
];

/// The scenario of a seed. Answers what its shard has counted.
pub fn run(seed: u64) -> Arc<Stats> {
    run_one(seed, false)
}

/// The same of a router that relays.
pub fn run_relayed(seed: u64) -> Arc<Stats> {
    run_one(seed, true)
}

fn run_one(seed: u64, relayed: bool) -> Arc<Stats> {
    let mut dice = Dice::new(!seed);
    let weather = dice.pick(&[Weather::Calm, Weather::Crumbs, Weather::Storm]);
    let in_flight_max = dice.pick(&[8, 512, 512]);
    let buffers = dice.pick(&[64, 128, 1024, 1024]);
    let mut world = World::with(seed, weather, relayed, |config| {
        config.in_flight_max = in_flight_max;
        config.buffers = buffers;
    });
    if relayed {
        world.book.bad_answers = dice.pick(&[0, 200, 700]);
    }
    for _ in 0..dice.of(1..3) {
        let policy = dice.pick(&POLICIES);
        let ack = dice.pick(&[Ack::OnForward, Ack::OnAccept]);
        let route = world.add_route(policy, ack);
        route.hold_bytes = dice.pick(&[1 << 20, 1 << 20, 1000, 0]);
        route.retries_max = dice.of(0..4) as u8;
    }
    for _ in 0..dice.of(0..4) {
        let worker = world.add_worker();
        worker.change(&mut dice);
    }
    if dice.happens(50) {
        world.black_hole = true;
        world.net.black_hole(([10, 1, 0, 1], 1).into());
    }
    world.publish();
    world.step();
    for _ in 0..dice.of(1..5) {
        add_any_caller(&mut world, &mut dice);
    }
    for _ in 0..dice.of(5..150) {
        world.step();
        if dice.happens(40) {
            world.disturb();
        }
        if dice.happens(10) {
            add_any_caller(&mut world, &mut dice);
        }
        if dice.happens(1) {
            world.commands.send(Command::Drain).unwrap();
        }
    }
    world.settle();
    world.end();
    world.stats
}

fn add_any_caller(world: &mut World, dice: &mut Dice) {
    if dice.happens(80) {
        let caller = Caller::babbling(&world.net, router(), &world.book, dice);
        world.callers.push(caller);
        return;
    }
    let requests = match dice.happens(100) {
        true => dice.of(20..60),
        false => dice.of(0..8),
    };
    let mut plan = Vec::new();
    for _ in 0..requests {
        let route = dice.of(0..world.directory.routes.len());
        let kind = match dice.of(0..200) {
            0..8 => Kind::Unknown,
            8..12 => Kind::BadPath,
            12 => Kind::TooLarge,
            _ => Kind::Routed,
        };
        let body_bytes = match dice.of(0..100) {
            0 => dice.of(60_000..90_000),
            1..8 => dice.of(1000..12_000),
            _ => dice.of(0..300),
        };
        plan.push(
            world
                .book
                .write(dice, &listen_path(route), kind, body_bytes),
        );
    }
    let mut caller = Caller::dial(&world.net, router(), &world.book, plan);
    caller.take_manners(dice);
    world.callers.push(caller);
}
