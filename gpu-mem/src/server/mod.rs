//! The service: listening sockets, clients' sockets, and the pools behind them, on one thread.
//!
//! ```text
//!  epoll -> accept | read -> frame -> pool.message -+
//!       \-> time   -> pool.tick --------------------+-> actions -> queued frames -> write, close
//!       \-> hang-up -> pool.disconnect -------------+
//! ```
//!
//! One thread moves all pools, so what a message changes is changed at once for everybody.
//! Nothing in it waits but epoll itself. Answers come first; the log, memory to be given up and
//! gauges are *chores*, done one by one while nothing else is to be done. For a moment after an
//! event it does not sleep: a client that has its answer asks the next thing at once, and waking
//! up takes longer than answering.

mod arrive;
mod chores;
mod config;
mod connection;
mod eager;
mod held;
pub mod listener;
mod running;

pub use config::{DeviceConfig, PoolConfig, ServerConfig, ServerError};
pub use running::{PoolGauges, ServerHandle};

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fs;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::io::Errno;

use self::connection::{Connection, Limits};
use self::listener::Listener;
use crate::complaints::Complaints;
use crate::domain::{Action, Discarded, Domain, Fence, Turn};
use crate::history::Audit;
use crate::lock::ClientId;
use crate::protocol::frame::Cut;
use crate::stats::Counter;

/// The service, bound but not yet running.
pub struct Server {
    epoll: OwnedFd,
    wake: Arc<OwnedFd>,
    stop: Arc<AtomicBool>,
    finished: Arc<AtomicBool>,
    listeners: Vec<Listener>,
    domains: Vec<Domain>,
    /// What they have cleared and not yet given up.
    discarded: Discarded,
    gauges: Arc<[PoolGauges]>,
    /// Checkpoints, each with its pools.
    fences: Vec<(Fence, Vec<usize>)>,
    connections: HashMap<u64, Connection>,
    /// When each connection's time is over, soonest first.
    deadlines: BTreeSet<(u64, u64)>,
    deadline_of: HashMap<u64, u64>,
    next_id: u64,
    uids_allowed: Vec<u32>,
    connections_max: usize,
    limits: Limits,
    /// Bytes that connections made us hold, and how many may be.
    held_bytes: usize,
    held_bytes_max: usize,
    spin_ns: u64,
    /// Until when it looks for events without sleeping.
    awake_until_ns: u64,
    /// Who was answered last and may ask the next thing at once; none before it sleeps.
    last_answered: Option<u64>,
    /// There may be chores, which are begun by this time even if there is no pause.
    untidy: bool,
    tidy_by_ns: u64,
    audit: Audit,
    complaints: Complaints,
    start: Instant,
    scratch: Vec<u8>,
    actions: Vec<Action>,
    /// Connections that something was done to.
    ripe: VecDeque<u64>,
    /// Connections that are over, closed when everybody has his answer.
    leaving: Vec<u64>,
    /// Connections that are gone, whose sockets are closed when everybody has his answer.
    graves: Vec<Connection>,
    /// Given up for a moment to take in, and turn away, a client when descriptors run out.
    spare: Option<OwnedFd>,
}

impl Server {
    /// Binds all sockets.
    ///
    /// # Errors
    /// A path is taken or unusable; sockets that were bound already are removed again.
    pub fn bind(config: ServerConfig) -> Result<Server, ServerError> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(ServerError::os("epoll"))?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(ServerError::os("eventfd"))?;
        epoll::add(&epoll, &wake, EventData::new_u64(WAKE), EventFlags::IN)
            .map_err(ServerError::os("epoll"))?;
        let (uids_allowed, everybody) = who_may_connect(config.uids_allowed);
        let (audit, discarded) = (Audit::default(), Discarded::default());
        let (mut listeners, mut domains, mut gauges) = (Vec::new(), Vec::new(), Vec::new());
        let mut groups: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
        for (index, pool) in config.pools.into_iter().enumerate() {
            let listener = Listener::bind(&pool.path, everybody)?;
            let data = EventData::new_u64(LISTENERS + index as u64);
            epoll::add(&epoll, &listener.socket, data, EventFlags::IN)
                .map_err(ServerError::os("epoll"))?;
            let (path, tag) = (pool.path.display().to_string(), &pool.domain.tag);
            tracing::info!(path, tag, backend = pool.backend.name(), "pool is open");
            let seen = PoolGauges::new(&pool);
            let stats = Arc::clone(seen.stats());
            gauges.push(seen);
            if let Some(group) = pool.checkpoint_group {
                groups.entry(group).or_default().push(index);
            }
            listeners.push(listener);
            let (audit, discarded) = (audit.clone(), discarded.clone());
            let domain = Domain::new(pool.domain, pool.backend, stats, audit, discarded);
            domains.push(domain);
        }
        Ok(Server {
            epoll,
            wake: Arc::new(wake),
            stop: Arc::default(),
            finished: Arc::default(),
            listeners,
            domains,
            discarded,
            gauges: gauges.into(),
            fences: groups
                .into_values()
                .map(|pools| (Fence::default(), pools))
                .collect(),
            connections: HashMap::new(),
            deadlines: BTreeSet::new(),
            deadline_of: HashMap::new(),
            next_id: 0,
            uids_allowed,
            connections_max: config.connections_max,
            limits: Limits {
                first_frame_ns: ns(config.first_frame_timeout),
                frame_ns: ns(config.frame_timeout),
            },
            held_bytes: 0,
            held_bytes_max: config.held_bytes_max,
            spin_ns: ns(config.spin),
            awake_until_ns: 0,
            last_answered: None,
            untidy: true,
            tidy_by_ns: 0,
            audit,
            complaints: Complaints::default(),
            start: Instant::now(),
            scratch: vec![0; READ_BYTES],
            actions: Vec::new(),
            ripe: VecDeque::new(),
            leaving: Vec::new(),
            graves: Vec::new(),
            spare: spare(),
        })
    }

    /// Serves on this thread until it is told to stop.
    pub fn run(mut self) {
        let mut events = [const { std::mem::MaybeUninit::uninit() }; EVENTS];
        while !self.stop.load(Ordering::Acquire) {
            let asked = self.look_ahead();
            let timeout = match asked {
                true => Some(Timespec::default()),
                false => self.next_timeout(),
            };
            let ready = match epoll::wait(&self.epoll, &mut events, timeout.as_ref()) {
                Ok((ready, _)) => &*ready,
                Err(Errno::INTR) => &[],
                Err(errno) => {
                    tracing::error!(%errno, "waiting for events failed; the service stops");
                    break;
                }
            };
            let idle = ready.is_empty() && !asked;
            // Those who are in a session come before those who are not in yet.
            let is_known = |event: &&epoll::Event| event.data.u64() < LISTENERS;
            for event in ready.iter().filter(is_known) {
                self.ready(event.data.u64(), event.flags);
                self.settle();
            }
            for event in ready.iter().filter(|event| !is_known(event)) {
                match event.data.u64() {
                    WAKE => _ = rustix::io::read(&*self.wake, &mut [0; 8]),
                    listener => self.accept((listener - LISTENERS) as usize),
                }
                self.settle();
            }
            self.tick();
            self.rest(idle);
        }
        self.shut_down();
    }

    /// Counts one for a pool.
    fn count(&self, domain: usize, counter: Counter) {
        if let Some(gauges) = self.gauges.get(domain) {
            gauges.stats().count(counter);
        }
    }

    fn now_ns(&self) -> u64 {
        ns(self.start.elapsed())
    }

    /// Whether the log has room for what a client does wrong.
    fn may_complain(&mut self) -> bool {
        self.complaints.may(self.now_ns())
    }

    /// How long epoll may wait: until the next deadline of anything.
    fn next_timeout(&self) -> Option<Timespec> {
        let pools = self
            .domains
            .iter()
            .filter_map(Domain::next_deadline_ns)
            .min();
        let connections = self.deadlines.first().map(|(deadline, _)| *deadline);
        let now_ns = self.now_ns();
        let awake = self.untidy || self.last_answered.is_some() || now_ns < self.awake_until_ns;
        let awake = awake.then_some(now_ns);
        let next = [pools, connections, awake].into_iter().flatten().min()?;
        let wait = next.saturating_sub(now_ns);
        let seconds = i64::try_from(wait / 1_000_000_000).unwrap_or(i64::MAX);
        Some(Timespec {
            tv_sec: seconds,
            tv_nsec: (wait % 1_000_000_000) as i64,
        })
    }

    /// Something happened on a client's socket.
    fn ready(&mut self, id: u64, flags: EventFlags) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        let busy = self.domains[connection.domain].is_busy(ClientId(id));
        let reads = connection.wants(busy).contains(EventFlags::IN);
        if reads && flags.intersects(EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP) {
            self.receive(id);
        } else if flags.intersects(EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR) {
            // Nobody to answer: a waiter, a writer that waits for memory, or one that does not
            // read what we send.
            self.sever(id);
        } else if !reads && flags.contains(EventFlags::IN) {
            // It does not await its answer. Only now is it worth a call to look away until then.
            self.watch(id, true);
        } else {
            self.ripe.push_back(id);
        }
    }

    /// Works off everything that became possible.
    fn settle(&mut self) {
        loop {
            self.carry_out();
            if let Some(id) = self.ripe.pop_front() {
                self.pump(id);
            } else if let Some(id) = self.leaving.pop() {
                self.sever(id);
            } else {
                self.graves.clear();
                return;
            }
        }
    }

    /// Moves one connection as far as it goes: frames out, then frames in, one at a time.
    fn pump(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        let answered = connection.is_sending() && !connection.closing;
        match connection.flush() {
            Ok(()) if answered && self.spin_ns > 0 => self.last_answered = Some(id),
            Ok(()) => {}
            Err(Errno::TOOMANYREFS) => {
                let withheld = self.domains[connection.domain].withheld();
                connection.replace_front(withheld);
                return self.ripe.push_back(id);
            }
            Err(_) => return self.sever(id),
        }
        if connection.is_sending() {
            if connection.ended {
                return self.sever(id);
            }
            return self.watch(id, false);
        }
        if connection.closing {
            return self.leaving.push(id);
        }
        let domain = connection.domain;
        if self.domains[domain].is_busy(ClientId(id)) {
            if connection.ended {
                return self.sever(id);
            }
            return self.watch(id, false);
        }
        match connection.front() {
            Cut::Frame(payload) => {
                let payload_bytes = payload.len();
                self.deliver(id, domain);
                if let Some(connection) = self.connections.get_mut(&id) {
                    connection.consume(payload_bytes);
                }
                // Its answer is carried out before it is looked at again.
                self.ripe.push_back(id);
            }
            Cut::Need(_) if !connection.ended => self.watch(id, false),
            Cut::Need(_) => self.sever(id),
            Cut::Bad(bad) => {
                if self.may_complain() {
                    tracing::warn!(session = id, %bad, "session dropped");
                }
                self.count(domain, Counter::FramesBad);
                self.sever(id);
            }
        }
    }

    /// Hands the frame at the front of a connection to its pool.
    fn deliver(&mut self, id: u64, domain: usize) {
        let client = ClientId(id);
        let now_ns = self.now_ns();
        let Server {
            connections,
            domains,
            actions,
            fences,
            ..
        } = self;
        let Some(Cut::Frame(payload)) = connections.get(&id).map(Connection::front) else {
            return;
        };
        let pulse = &mut |client: ClientId| is_alive(connections, client);
        let mut turn = Turn {
            now_ns,
            unix_ms: unix_ms(),
            pulse,
            actions,
        };
        let Some(request) = domains[domain].message(client, payload, &mut turn) else {
            return;
        };
        if let Some((fence, pools)) = fences.iter_mut().find(|(_, pools)| pools.contains(&domain)) {
            let asked = pools
                .iter()
                .position(|pool| *pool == domain)
                .unwrap_or_default();
            let members = domains.iter_mut().enumerate();
            let mut members: Vec<_> = members
                .filter(|(index, _)| pools.contains(index))
                .map(|(_, pool)| pool)
                .collect();
            fence.control(&mut members, asked, client, request, &mut turn);
        } else {
            let mut alone = Fence::default();
            alone.control(&mut [&mut domains[domain]], 0, client, request, &mut turn);
        }
    }

    /// Forgets a client whose socket is of no more use.
    fn sever(&mut self, id: u64) {
        // The pool may still ask whether this client is alive, so it is dropped afterwards.
        let Some(domain) = self
            .connections
            .get(&id)
            .map(|connection| connection.domain)
        else {
            return;
        };
        let now_ns = self.now_ns();
        let Server {
            connections,
            domains,
            actions,
            ..
        } = self;
        let pulse = &mut |client: ClientId| is_alive(connections, client);
        let mut turn = Turn {
            now_ns,
            unix_ms: unix_ms(),
            pulse,
            actions,
        };
        domains[domain].disconnect(ClientId(id), &mut turn);
        if let Some(connection) = self.connections.remove(&id) {
            self.held_bytes -= connection.counted_bytes;
            self.graves.push(connection);
        }
        self.schedule(id, None);
    }

    /// Puts what pools decided into the connections' queues.
    fn carry_out(&mut self) {
        for action in self.actions.drain(..) {
            let (Action::Send { client, .. } | Action::Close { client }) = &action;
            let id = client.0;
            let Some(connection) = self.connections.get_mut(&id) else {
                continue;
            };
            match action {
                Action::Send {
                    frame, descriptor, ..
                } => connection.push(frame, descriptor),
                Action::Close { .. } => connection.closing = true,
            }
            self.ripe.push_back(id);
        }
    }

    /// Tells epoll what a connection waits for, and notes by when it must come. Bytes that cannot
    /// be dealt with yet are rare: `exactly` stops looking out for them, else that stays as it is.
    fn watch(&mut self, id: u64, exactly: bool) {
        let now_ns = self.now_ns();
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        let busy = self.domains[connection.domain].is_busy(ClientId(id));
        let mut wants = connection.wants(busy);
        if !exactly {
            wants |= connection.watched.unwrap_or(EventFlags::IN) & EventFlags::IN;
        }
        let before = connection.watched.replace(wants);
        if before != Some(wants) {
            let data = EventData::new_u64(id);
            let told = match before {
                Some(_) => epoll::modify(&self.epoll, &connection.socket, data, wants),
                None => epoll::add(&self.epoll, &connection.socket, data, wants),
            };
            if let Err(errno) = told {
                tracing::error!(%errno, session = id, "epoll lost a client; session dropped");
                return self.sever(id);
            }
        }
        let deadline_ns = connection.deadline_ns(busy, self.limits, now_ns);
        self.schedule(id, deadline_ns);
        self.weigh(id);
    }

    fn schedule(&mut self, id: u64, deadline_ns: Option<u64>) {
        let before = match deadline_ns {
            Some(deadline) => self.deadline_of.insert(id, deadline),
            None => self.deadline_of.remove(&id),
        };
        if before != deadline_ns {
            before.map(|deadline| self.deadlines.remove(&(deadline, id)));
            deadline_ns.map(|deadline| self.deadlines.insert((deadline, id)));
        }
    }

    /// Does what time demands.
    fn tick(&mut self) {
        let now_ns = self.now_ns();
        for index in 0..self.domains.len() {
            let Server {
                connections,
                domains,
                actions,
                ..
            } = self;
            if domains[index]
                .next_deadline_ns()
                .is_some_and(|deadline| deadline <= now_ns)
            {
                self.untidy = true;
                let pulse = &mut |client: ClientId| is_alive(connections, client);
                domains[index].tick(&mut Turn {
                    now_ns,
                    unix_ms: unix_ms(),
                    pulse,
                    actions,
                });
            }
        }
        while let Some(&(deadline, id)) = self.deadlines.first()
            && deadline <= now_ns
        {
            let late = self.connections.get(&id);
            let owes = late.and_then(Connection::debt);
            if let Some(domain) = late.map(|connection| connection.domain) {
                self.count(domain, Counter::DeadlinesPassed);
            }
            if self.may_complain() {
                tracing::warn!(session = id, ?owes, "too slow; session dropped");
            }
            self.untidy = true;
            self.schedule(id, None);
            self.sever(id);
        }
        self.settle();
    }

    /// Answers waiters, closes everybody, gives up memory and removes the sockets.
    fn shut_down(&mut self) {
        let now_ns = self.now_ns();
        let Server {
            connections,
            domains,
            actions,
            ..
        } = self;
        for domain in domains.iter_mut() {
            let pulse = &mut |client: ClientId| is_alive(connections, client);
            domain.stop(&mut Turn {
                now_ns,
                unix_ms: unix_ms(),
                pulse,
                actions,
            });
        }
        self.carry_out();
        for connection in self.connections.values_mut() {
            // One try: whoever does not read now is not waited for.
            let _ = connection.flush();
        }
        self.connections.clear();
        self.listeners.clear();
        self.tidy_up();
        self.finished.store(true, Ordering::Release);
        tracing::info!("the service has stopped");
    }
}

/// The users that may connect, and whether sockets are made for all so that others than ourselves
/// get as far as to be asked who they are; root gets everywhere.
fn who_may_connect(uids: Vec<u32>) -> (Vec<u32>, bool) {
    let own = rustix::process::geteuid().as_raw();
    if uids.is_empty() {
        return (vec![own], false);
    }
    let everybody = uids.iter().any(|uid| ![own, 0].contains(uid));
    (uids, everybody)
}

fn is_alive(connections: &HashMap<u64, Connection>, client: ClientId) -> bool {
    connections.get(&client.0).is_some_and(Connection::is_alive)
}

fn spare() -> Option<OwnedFd> {
    fs::File::open("/dev/null").ok().map(OwnedFd::from)
}

fn unix_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

// Connections have the numbers from zero up, one more for each; they never come near these.
const WAKE: u64 = u64::MAX;
const LISTENERS: u64 = 1 << 62;
const EVENTS: usize = 64;
const READ_BYTES: usize = 64 << 10;
