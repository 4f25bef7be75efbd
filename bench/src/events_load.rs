//! Publishers and subscribers of `events`, as cheap as they can be: one thread each, sockets that
//! do not block, messages of one size that are copied from a template.
//!
//! ```text
//! ZMTP   front | 01 length32 | stamp 8 | rest
//! NATS   PUB subject size\r\n | stamp 8 | rest | \r\n      comes back as MSG subject 1 size\r\n
//! ```

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use corelane_codec::zmtp;
use hdrhistogram::Histogram;
use rustix::event::{PollFd, PollFlags, poll};

use crate::events_broker::Broker;
use crate::interrupt;
use crate::report::new_histogram;

/// What all publishers publish.
pub(crate) const SUBJECT: &str = "namespace.demo.component.backend.endpoint.generate.kv_metrics";
/// Events under way at most when the rate is not given, and bytes of them.
const WINDOW_EVENTS: u64 = 8192;
const WINDOW_BYTES: u64 = 4 << 20;
/// Events that one publisher writes at once.
const BATCH: u64 = 64;
const LIMIT: Duration = Duration::from_secs(30);
/// Events that have not come after so long without any other are lost: a broker may drop what it
/// has no room for.
const LOST_AFTER: Duration = Duration::from_secs(1);

/// What clients speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    /// ZeroMQ's.
    Zmtp,
    /// NATS's.
    Nats,
}

/// A message as it is sent, or as it comes.
struct Template {
    bytes: Vec<u8>,
    stamp_at: usize,
}

impl Protocol {
    fn outgoing(self, event_bytes: usize) -> Template {
        let mut bytes = Vec::new();
        match self {
            Self::Zmtp => {
                let frame = event_bytes + zmtp::EVENT_PREFIX_BYTES;
                zmtp::write_event_front(SUBJECT.as_bytes(), 7, 0, frame, &mut bytes);
                bytes.push(1);
                bytes.extend_from_slice(&(event_bytes as u32).to_be_bytes());
            }
            Self::Nats => bytes = format!("PUB {SUBJECT} {event_bytes}\r\n").into_bytes(),
        }
        self.filled(bytes, event_bytes)
    }

    fn incoming(self, event_bytes: usize) -> Template {
        match self {
            Self::Zmtp => self.outgoing(event_bytes),
            Self::Nats => self.filled(
                format!("MSG {SUBJECT} 1 {event_bytes}\r\n").into_bytes(),
                event_bytes,
            ),
        }
    }

    fn filled(self, mut bytes: Vec<u8>, event_bytes: usize) -> Template {
        let stamp_at = bytes.len();
        bytes.resize(stamp_at + event_bytes, b'x');
        if self == Self::Nats {
            bytes.extend_from_slice(b"\r\n");
        }
        Template { bytes, stamp_at }
    }
}

fn connect(protocol: Protocol, address: SocketAddr, subscribes: bool) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(LIMIT))?;
    match protocol {
        Protocol::Zmtp => {
            stream.write_all(&zmtp::greeting())?;
            stream.read_exact(&mut [0; zmtp::GREETING_BYTES])?;
            let mut bytes = Vec::new();
            zmtp::write_ready(if subscribes { "SUB" } else { "PUB" }, &mut bytes);
            stream.write_all(&bytes)?;
            // READY: a short command.
            let mut head = [0; 2];
            stream.read_exact(&mut head)?;
            stream.read_exact(&mut vec![0; usize::from(head[1])])?;
            if subscribes {
                bytes.clear();
                zmtp::write_subscription(1, true, SUBJECT.as_bytes(), &mut bytes);
                stream.write_all(&bytes)?;
            }
        }
        Protocol::Nats => {
            let mut hello = "CONNECT {\"verbose\":false,\"pedantic\":false}\r\n".to_owned();
            if subscribes {
                hello += &format!("SUB {SUBJECT} 1\r\n");
            }
            stream.write_all((hello + "PING\r\n").as_bytes())?;
            let mut said = Vec::new();
            while !said.ends_with(b"PONG\r\n") {
                let mut byte = [0];
                stream
                    .read_exact(&mut byte)
                    .context("nats-server does not answer")?;
                said.push(byte[0]);
            }
        }
    }
    stream.set_nonblocking(true)?;
    Ok(stream)
}

/// What the subscribers' thread and ours share.
struct Shared {
    received: Vec<AtomicU64>,
    recording: AtomicBool,
    stop: AtomicBool,
    latency_ns: Mutex<Histogram<u64>>,
    failure: Mutex<Option<String>>,
    began: Instant,
}

impl Shared {
    fn least(&self) -> u64 {
        let each = self
            .received
            .iter()
            .map(|count| count.load(Ordering::Relaxed));
        each.min().unwrap_or(0)
    }
}

/// Publishers and subscribers of one broker and one scene.
pub(crate) struct Load {
    shared: Arc<Shared>,
    subscribers: Option<JoinHandle<()>>,
    publishers: Vec<Publisher>,
    template: Template,
    protocol: Protocol,
    sent: u64,
    lost: u64,
    /// The least that a subscriber had got, and since when.
    progress: (u64, Instant),
    turn: usize,
}

struct Publisher {
    stream: TcpStream,
    pending: Vec<u8>,
    done: usize,
    sequence: u64,
}

/// What a measured time showed.
pub(crate) struct Found {
    /// Events that every subscriber has got.
    pub(crate) events: u64,
    /// How long it took.
    pub(crate) seconds: f64,
    /// CPU time of the broker.
    pub(crate) cpu_us: f64,
    /// From due to received, all subscribers together.
    pub(crate) latency_ns: Histogram<u64>,
    /// Events that some subscriber has not got, from the start on.
    pub(crate) lost: u64,
}

impl Load {
    /// Connects everybody and waits until events reach all subscribers.
    pub(crate) fn start(
        broker: &Broker,
        publishers: usize,
        subscribers: usize,
        event_bytes: usize,
    ) -> Result<Self> {
        let protocol = broker.kind.protocol();
        let streams = (0..subscribers).map(|_| connect(protocol, broker.subscribe, true));
        let streams: Vec<_> = streams.collect::<Result<_>>().context("a subscriber")?;
        let shared = Arc::new(Shared {
            received: (0..subscribers).map(|_| AtomicU64::new(0)).collect(),
            recording: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            latency_ns: Mutex::new(new_histogram()),
            failure: Mutex::new(None),
            began: Instant::now(),
        });
        let of_thread = Arc::clone(&shared);
        let incoming = protocol.incoming(event_bytes);
        let thread = std::thread::spawn(move || receive(streams, &of_thread, &incoming));
        let each = (0..publishers).map(|_| {
            let stream = connect(protocol, broker.publish, false).context("a publisher")?;
            let (pending, done, sequence) = (Vec::new(), 0, 0);
            Ok(Publisher {
                stream,
                pending,
                done,
                sequence,
            })
        });
        let mut load = Self {
            shared,
            subscribers: Some(thread),
            publishers: each.collect::<Result<_>>()?,
            template: protocol.outgoing(event_bytes),
            protocol,
            sent: 0,
            lost: 0,
            progress: (0, Instant::now()),
            turn: 0,
        };
        load.reach_all()?;
        Ok(load)
    }

    /// Until what is published reaches every subscriber; what came before is not counted.
    fn reach_all(&mut self) -> Result<()> {
        let deadline = Instant::now() + LIMIT;
        while self.shared.least() == 0 {
            self.publish(1);
            self.push()?;
            self.check(deadline)?;
            std::thread::sleep(Duration::from_millis(20));
        }
        // Until nothing comes any more.
        let mut before = u64::MAX;
        while before != self.total() {
            before = self.total();
            self.check(deadline)?;
            std::thread::sleep(Duration::from_millis(100));
        }
        for count in &self.shared.received {
            count.store(0, Ordering::Relaxed);
        }
        self.sent = 0;
        Ok(())
    }

    fn total(&self) -> u64 {
        self.shared
            .received
            .iter()
            .map(|count| count.load(Ordering::Relaxed))
            .sum()
    }

    fn check(&self, deadline: Instant) -> Result<()> {
        interrupt::check()?;
        if let Some(failure) = self
            .shared
            .failure
            .lock()
            .ok()
            .and_then(|found| found.clone())
        {
            bail!(failure);
        }
        if Instant::now() > deadline {
            bail!(
                "events do not arrive: {} of {}",
                self.shared.least(),
                self.sent
            );
        }
        Ok(())
    }

    fn now_ns(&self) -> u64 {
        self.shared.began.elapsed().as_nanos() as u64
    }

    /// Queues `events` at the next publisher, stamped with the present.
    fn publish(&mut self, events: u64) {
        let stamp = self.now_ns();
        self.publish_due(events, |_| stamp);
    }

    fn publish_due(&mut self, events: u64, stamp: impl Fn(u64) -> u64) {
        let turn = self.turn;
        self.turn = (turn + 1) % self.publishers.len();
        let publisher = &mut self.publishers[turn];
        for number in 0..events {
            let at = publisher.pending.len();
            publisher.pending.extend_from_slice(&self.template.bytes);
            let place = at + self.template.stamp_at;
            publisher.pending[place..place + 8].copy_from_slice(&stamp(number).to_be_bytes());
            if self.protocol == Protocol::Zmtp {
                // The third part: behind subject and publisher, each with a head of two bytes.
                let place = at + 2 + SUBJECT.len() + 10 + 2;
                let sequence = publisher.sequence.to_be_bytes();
                publisher.pending[place..place + 8].copy_from_slice(&sequence);
            }
            publisher.sequence += 1;
        }
        self.sent += events;
    }

    /// Writes what the sockets take. False: some have not taken all.
    fn push(&mut self) -> Result<bool> {
        let mut all = true;
        for publisher in &mut self.publishers {
            while publisher.done < publisher.pending.len() {
                match publisher.stream.write(&publisher.pending[publisher.done..]) {
                    Ok(bytes) => publisher.done += bytes,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {
                        all = false;
                        break;
                    }
                    Err(error) => return Err(error).context("a publisher was disconnected"),
                }
            }
            if publisher.done == publisher.pending.len() {
                publisher.pending.clear();
                publisher.done = 0;
            }
        }
        Ok(all)
    }

    /// What the broker says to publishers: subscriptions, PING. Only the latter wants an answer.
    fn listen(&mut self) {
        let mut bytes = [0; 4096];
        for publisher in &mut self.publishers {
            let read = publisher.stream.read(&mut bytes).unwrap_or(0);
            if self.protocol == Protocol::Nats && bytes[..read].windows(4).any(|w| w == b"PING") {
                publisher.pending.extend_from_slice(b"PONG\r\n");
            }
        }
    }

    /// As fast as all subscribers get them.
    pub(crate) fn at_most(&mut self, broker: &Broker, times: [Duration; 2]) -> Result<Found> {
        let bytes = self.template.bytes.len() as u64;
        let window = (WINDOW_BYTES / bytes).clamp(64, WINDOW_EVENTS);
        self.measure(broker, times, |load, _| {
            let room = (load.shared.least() + window).saturating_sub(load.sent);
            let each = (window / load.publishers.len() as u64 / 2).clamp(1, BATCH);
            if room < each {
                load.give_up_lost();
                std::thread::yield_now();
            } else {
                (0..room / each).for_each(|_| load.publish(each));
            }
        })
    }

    /// At this rate, evenly, whatever becomes of them.
    pub(crate) fn at_rate(
        &mut self,
        broker: &Broker,
        times: [Duration; 2],
        per_second: f64,
    ) -> Result<Found> {
        let (start_ns, sent) = (self.now_ns(), self.sent);
        self.measure(broker, times, |load, now_ns| {
            let due = sent + ((now_ns - start_ns) as f64 / 1e9 * per_second) as u64;
            let mut late = due.saturating_sub(load.sent);
            if late == 0 {
                std::thread::sleep(Duration::from_micros(50));
            }
            while late > 0 {
                let events = late.min(BATCH.min(1 + late / load.publishers.len() as u64));
                let first = load.sent - sent;
                let stamp =
                    |number: u64| start_ns + ((first + number) as f64 / per_second * 1e9) as u64;
                load.publish_due(events, stamp);
                late -= events;
            }
        })
    }

    fn measure(
        &mut self,
        broker: &Broker,
        [warmup, seconds]: [Duration; 2],
        mut step: impl FnMut(&mut Self, u64),
    ) -> Result<Found> {
        let begin = Instant::now();
        let mut start = None;
        let deadline = begin + warmup + seconds + LIMIT;
        loop {
            let now_ns = self.now_ns();
            step(self, now_ns);
            self.push()?;
            let passed = begin.elapsed();
            match start {
                None if passed >= warmup => {
                    self.shared.recording.store(true, Ordering::Relaxed);
                    start = Some((Instant::now(), self.shared.least(), broker.usage()));
                    self.listen();
                }
                Some((since, before, usage)) if since.elapsed() >= seconds => {
                    let events = self.shared.least() - before;
                    let used = broker.usage().since(usage);
                    let seconds = since.elapsed().as_secs_f64();
                    self.shared.recording.store(false, Ordering::Relaxed);
                    self.settle(deadline)?;
                    let mut latency = self.shared.latency_ns.lock().expect("no panic holds it");
                    let latency_ns = std::mem::replace(&mut *latency, new_histogram());
                    return Ok(Found {
                        events,
                        seconds,
                        cpu_us: used.cpu_us(),
                        latency_ns,
                        lost: self.lost,
                    });
                }
                _ => {}
            }
            self.check(deadline)?;
        }
    }

    /// Takes for lost what has not come while nothing else came either.
    fn give_up_lost(&mut self) {
        let least = self.shared.least();
        if least != self.progress.0 {
            self.progress = (least, Instant::now());
        } else if self.progress.1.elapsed() >= LOST_AFTER {
            self.lost += self.sent.saturating_sub(least);
            self.sent = least;
        }
    }

    /// Until all that was sent has arrived, or is lost.
    fn settle(&mut self, deadline: Instant) -> Result<()> {
        while self.shared.least() < self.sent {
            self.push()?;
            self.give_up_lost();
            self.check(deadline)?;
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.subscribers.take() {
            // A panic was printed by its thread already.
            let _ = thread.join();
        }
    }
}

/// One subscriber's socket.
struct Subscriber {
    stream: TcpStream,
    bytes: Vec<u8>,
    have: usize,
}

fn receive(streams: Vec<TcpStream>, shared: &Shared, incoming: &Template) {
    let room = (256 << 10) + 2 * incoming.bytes.len();
    let each = streams.into_iter().map(|stream| Subscriber {
        stream,
        bytes: vec![0; room],
        have: 0,
    });
    let mut subscribers: Vec<_> = each.collect();
    let mut latency = new_histogram();
    while !shared.stop.load(Ordering::Relaxed) {
        let fds = subscribers
            .iter()
            .map(|one| PollFd::new(&one.stream, PollFlags::IN));
        let mut fds: Vec<_> = fds.collect();
        let timeout = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 20_000_000,
        };
        let _ = poll(&mut fds, Some(&timeout));
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        for (place, subscriber) in subscribers.iter_mut().enumerate() {
            if !ready[place] {
                continue;
            }
            match subscriber.take(shared, incoming, &mut latency) {
                Ok(events) => {
                    shared.received[place].fetch_add(events, Ordering::Relaxed);
                }
                Err(error) => {
                    if let Ok(mut failure) = shared.failure.lock() {
                        *failure = Some(format!("a subscriber: {error:#}"));
                    }
                    return;
                }
            }
        }
        if !latency.is_empty()
            && let Ok(mut all) = shared.latency_ns.lock()
        {
            let _ = all.add(&latency);
            latency.reset();
        }
    }
}

impl Subscriber {
    fn take(
        &mut self,
        shared: &Shared,
        incoming: &Template,
        latency: &mut Histogram<u64>,
    ) -> Result<u64> {
        match self.stream.read(&mut self.bytes[self.have..]) {
            Ok(0) => bail!("the broker has closed the connection"),
            Ok(bytes) => self.have += bytes,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(0),
            Err(error) => return Err(error.into()),
        }
        let size = incoming.bytes.len();
        let recording = shared.recording.load(Ordering::Relaxed);
        let now_ns = shared.began.elapsed().as_nanos() as u64;
        let (mut at, mut events) = (0, 0);
        while self.have - at >= size {
            let message = &self.bytes[at..at + size];
            if message[..4] != incoming.bytes[..4] {
                if !message.starts_with(b"PING\r\n") {
                    bail!("something else than an event came");
                }
                self.stream.write_all(b"PONG\r\n")?;
                at += 6;
                continue;
            }
            if recording {
                let stamp = message[incoming.stamp_at..].first_chunk().copied();
                let due_ns = stamp.map_or(now_ns, u64::from_be_bytes);
                latency.saturating_record(now_ns.saturating_sub(due_ns));
            }
            at += size;
            events += 1;
        }
        self.bytes.copy_within(at..self.have, 0);
        self.have -= at;
        Ok(events)
    }
}
