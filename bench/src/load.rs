//! The load generator: one thread, one epoll. A closed loop sends when a reply has come; an open
//! loop sends when a request is due, and measures from that time (no coordinated omission).

use std::collections::VecDeque;
use std::fmt;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use hdrhistogram::Histogram;

use crate::arrivals::{Arrivals, Schedule};
use crate::frames::{ReplyReader, RequestFrame};
use crate::hiccup::set_timer_slack;
use crate::interrupt;
use crate::poll::{Interest, Poller, Ready};
use crate::report::new_histogram;

/// The shape of a load.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Shape {
    /// Each connection keeps `pipeline` requests in flight.
    Closed {
        /// Connections.
        connections: usize,
        /// Requests in flight on each.
        pipeline: usize,
    },
    /// `rate` requests a second are due, spread over the connections in turn.
    Open {
        /// Connections.
        connections: usize,
        /// Requests a second.
        rate: f64,
        /// Their pattern.
        arrivals: Arrivals,
    },
}

impl Shape {
    fn connections(self) -> usize {
        match self {
            Self::Closed { connections, .. } | Self::Open { connections, .. } => connections,
        }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = |n: usize| if n == 1 { "" } else { "s" };
        match self {
            Self::Closed {
                connections,
                pipeline,
            } => {
                write!(
                    f,
                    "closed loop, {connections} connection{}",
                    plural(*connections)
                )?;
                if *pipeline > 1 {
                    write!(f, " with {pipeline} in flight each")?;
                }
                Ok(())
            }
            Self::Open {
                connections,
                rate,
                arrivals,
            } => write!(
                f,
                "open loop, {rate} requests/s {arrivals}, {connections} connection{}",
                plural(*connections)
            ),
        }
    }
}

/// One slice: where to, what, how, for how long.
pub(crate) struct Slice<'a> {
    /// Who takes the connections.
    pub(crate) target: SocketAddr,
    /// The request.
    pub(crate) frame: &'a mut RequestFrame,
    /// Closed or open loop.
    pub(crate) shape: Shape,
    /// Load that is not counted, before.
    pub(crate) warmup: Duration,
    /// The measured window.
    pub(crate) window: Duration,
    /// Arrivals of different seeds differ.
    pub(crate) seed: u64,
}

/// The two ends of the measured window, at which the caller reads its counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Edge {
    /// The warm-up is over.
    Open,
    /// The window is over (open loop: and every request due in it has its reply).
    Close,
}

/// What a slice found.
pub(crate) struct Found {
    /// Closed loop: from send to reply. Open loop: from due to reply. In ns.
    pub(crate) latency_ns: Histogram<u64>,
    /// Open loop: how late the generator itself sent, in ns.
    pub(crate) lag_ns: Histogram<u64>,
    /// Replies between the two edges; what CPU counters of the window are divided by.
    pub(crate) replies: u64,
    /// Replies that refused, and open-loop requests that could not be sent for lack of room.
    pub(crate) errors: u64,
    /// The first refusal.
    pub(crate) refusal: Option<String>,
    /// From the first edge to the second.
    pub(crate) elapsed: Duration,
}

/// With nothing heard for so long, a slice has failed.
const STALL: Duration = Duration::from_secs(10);
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// Open loop: requests in flight beyond which due ones are dropped, and counted as errors.
const IN_FLIGHT_MAX: usize = 50_000;
/// The same for unsent bytes of one connection.
const OUT_BYTES_MAX: usize = 64 << 20;
const READ_BYTES: usize = 64 * 1024;

/// Runs a slice; `edge` is called at both ends of its window.
pub(crate) fn run(slice: Slice<'_>, edge: &mut dyn FnMut(Edge) -> Result<()>) -> Result<Found> {
    set_timer_slack();
    Driver::connect(slice)?.drive(edge)
}

/// One request and its reply on a connection of its own: the text of a refusal, or `None`.
pub(crate) fn probe(target: SocketAddr, frame: &mut RequestFrame) -> Result<Option<String>> {
    let mut stream = TcpStream::connect_timeout(&target, Duration::from_secs(1))?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    stream.write_all(frame.stamp())?;
    let mut reader = ReplyReader::default();
    let mut answer = None;
    let mut buffer = [0; 1024];
    while answer.is_none() {
        let bytes = stream.read(&mut buffer)?;
        if bytes == 0 {
            bail!("{target} closed the connection instead of a reply");
        }
        reader.feed(&buffer[..bytes], |refused| answer = Some(refused));
    }
    Ok(reader.refusal)
}

/// A connection and what is under way on it.
struct Link {
    stream: TcpStream,
    /// Bytes not yet taken by the kernel, from `out_at` on.
    out: Vec<u8>,
    out_at: usize,
    /// Start of each request without a reply, oldest first; replies come in this order.
    starts_ns: VecDeque<u64>,
    replies: ReplyReader,
    interest: Interest,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Warmup,
    Window,
    /// Open loop: waiting for the replies to what was due in the window.
    Drain,
}

struct Driver<'a> {
    slice: Slice<'a>,
    poller: Poller,
    links: Vec<Link>,
    buffer: Vec<u8>,
    clock: Instant,
    phase: Phase,
    phase_end_ns: u64,
    window_start_ns: u64,
    window_end_ns: u64,
    heard_ns: u64,
    schedule: Option<Schedule>,
    schedule_base_ns: u64,
    next_link: usize,
    in_flight: usize,
    /// Requests of the window that still want a reply.
    owed: usize,
    found: Found,
}

impl<'a> Driver<'a> {
    fn connect(slice: Slice<'a>) -> Result<Self> {
        let poller = Poller::new(256)?;
        let mut links = Vec::with_capacity(slice.shape.connections());
        for token in 0..slice.shape.connections() {
            let stream = TcpStream::connect_timeout(&slice.target, CONNECT_LIMIT)
                .with_context(|| format!("cannot connect to {}", slice.target))?;
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
            poller.add(&stream, token as u64, Interest::Read)?;
            links.push(Link {
                stream,
                out: Vec::new(),
                out_at: 0,
                starts_ns: VecDeque::new(),
                replies: ReplyReader::default(),
                interest: Interest::Read,
            });
        }
        let phase_end_ns = slice.warmup.as_nanos() as u64;
        let mut driver = Self {
            slice,
            poller,
            links,
            buffer: vec![0; READ_BYTES],
            clock: Instant::now(),
            phase: Phase::Warmup,
            phase_end_ns,
            window_start_ns: u64::MAX,
            window_end_ns: u64::MAX,
            heard_ns: 0,
            schedule: None,
            schedule_base_ns: 0,
            next_link: 0,
            in_flight: 0,
            owed: 0,
            found: Found {
                latency_ns: new_histogram(),
                lag_ns: new_histogram(),
                replies: 0,
                errors: 0,
                refusal: None,
                elapsed: Duration::ZERO,
            },
        };
        driver.restart_schedule();
        Ok(driver)
    }

    fn drive(mut self, edge: &mut dyn FnMut(Edge) -> Result<()>) -> Result<Found> {
        if let Shape::Closed {
            connections,
            pipeline,
        } = self.slice.shape
        {
            for link in 0..connections {
                self.send(link, pipeline)?;
            }
        }
        loop {
            interrupt::check()?;
            let now_ns = self.now_ns();
            if self.is_phase_over(now_ns) {
                // What was due before the end is sent even if we were kept from it until now: left
                // out, it would take its latency with it.
                self.send_due(now_ns)?;
                if self.next_phase(edge)? {
                    break;
                }
            }
            let now_ns = self.now_ns();
            self.send_due(now_ns)?;
            let idle_ns = now_ns.saturating_sub(self.heard_ns);
            if self.in_flight > 0 && idle_ns > STALL.as_nanos() as u64 {
                bail!(
                    "no reply for {} s, {} requests wait",
                    STALL.as_secs(),
                    self.in_flight
                );
            }
            let wait_ns = self.wake_ns().saturating_sub(self.now_ns());
            for index in 0..self.poller.wait(Some(wait_ns))? {
                self.serve(self.poller.ready(index))?;
            }
        }
        self.found.refusal = self
            .links
            .iter_mut()
            .find_map(|link| link.replies.refusal.take());
        Ok(self.found)
    }

    fn now_ns(&self) -> u64 {
        self.clock.elapsed().as_nanos() as u64
    }

    /// When to wake if nothing is heard.
    fn wake_ns(&self) -> u64 {
        let stall_ns = self.heard_ns + STALL.as_nanos() as u64 + 1_000_000;
        let due_ns = match (&self.schedule, self.phase) {
            (Some(schedule), Phase::Warmup | Phase::Window) => {
                self.schedule_base_ns + schedule.due_ns()
            }
            _ => u64::MAX,
        };
        let stall_ns = if self.in_flight > 0 {
            stall_ns
        } else {
            u64::MAX
        };
        self.phase_end_ns.min(due_ns).min(stall_ns)
    }

    fn is_phase_over(&self, now_ns: u64) -> bool {
        match self.phase {
            Phase::Warmup | Phase::Window => now_ns >= self.phase_end_ns,
            Phase::Drain => self.owed == 0,
        }
    }

    /// True at the end of the slice.
    fn next_phase(&mut self, edge: &mut dyn FnMut(Edge) -> Result<()>) -> Result<bool> {
        match self.phase {
            Phase::Warmup => {
                edge(Edge::Open)?;
                self.found.replies = 0;
                self.found.errors = 0;
                self.restart_schedule();
                self.window_start_ns = self.schedule_base_ns;
                self.heard_ns = self.window_start_ns;
                self.phase_end_ns = self.window_start_ns + self.slice.window.as_nanos() as u64;
                self.window_end_ns = self.phase_end_ns;
                self.phase = Phase::Window;
                return Ok(false);
            }
            Phase::Window if self.owed > 0 && self.schedule.is_some() => {
                self.phase = Phase::Drain;
                self.phase_end_ns = u64::MAX;
                return Ok(false);
            }
            Phase::Window | Phase::Drain => {}
        }
        self.found.elapsed = Duration::from_nanos(self.now_ns() - self.window_start_ns);
        edge(Edge::Close)?;
        Ok(true)
    }

    fn restart_schedule(&mut self) {
        self.schedule_base_ns = self.now_ns();
        if let Shape::Open { rate, arrivals, .. } = self.slice.shape {
            // The warm-up must not play the same arrivals as the window.
            let seed = self.slice.seed * 2 + u64::from(self.phase == Phase::Warmup);
            self.schedule = Some(Schedule::new(arrivals, rate, seed));
        }
    }

    /// Open loop: sends what is due by now, each connection's share in one write.
    fn send_due(&mut self, now_ns: u64) -> Result<()> {
        let Some(schedule) = self.schedule.as_mut() else {
            return Ok(());
        };
        if self.phase == Phase::Drain {
            return Ok(());
        }
        let before = self.next_link;
        let mut queued = 0;
        loop {
            let due_ns = self.schedule_base_ns + schedule.due_ns();
            if due_ns > now_ns || due_ns >= self.phase_end_ns {
                break;
            }
            schedule.advance();
            let in_window = self.phase == Phase::Window;
            if in_window {
                self.found
                    .lag_ns
                    .saturating_record((now_ns - due_ns).max(1));
            }
            let link = &mut self.links[self.next_link];
            if self.in_flight >= IN_FLIGHT_MAX || link.out.len() >= OUT_BYTES_MAX {
                self.found.errors += 1;
                continue;
            }
            self.next_link = (self.next_link + 1) % self.slice.shape.connections();
            link.out.extend_from_slice(self.slice.frame.stamp());
            link.starts_ns.push_back(due_ns);
            if self.in_flight == 0 {
                self.heard_ns = now_ns;
            }
            self.in_flight += 1;
            self.owed += usize::from(in_window);
            queued += 1;
        }
        let links = self.links.len();
        for step in 0..queued.min(links) {
            self.flush((before + step) % links)?;
        }
        Ok(())
    }

    /// Closed loop: sends `count` requests on a connection in one write.
    fn send(&mut self, link: usize, count: usize) -> Result<()> {
        let now_ns = self.now_ns();
        let connection = &mut self.links[link];
        for _ in 0..count {
            connection.starts_ns.push_back(now_ns);
        }
        self.in_flight += count;
        if count == 1 && connection.out.is_empty() {
            return self.send_unbuffered(link);
        }
        for _ in 0..count {
            connection.out.extend_from_slice(self.slice.frame.stamp());
        }
        self.flush(link)
    }

    /// Saves a copy of the frame where the kernel takes it at once.
    fn send_unbuffered(&mut self, link: usize) -> Result<()> {
        let connection = &mut self.links[link];
        let bytes = self.slice.frame.stamp();
        let taken = match connection.stream.write(bytes) {
            Ok(taken) => taken,
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => 0,
            Err(e) => return Err(e).context("cannot send"),
        };
        if taken == bytes.len() {
            return Ok(());
        }
        connection.out.extend_from_slice(&bytes[taken..]);
        self.flush(link)
    }

    fn flush(&mut self, link: usize) -> Result<()> {
        let connection = &mut self.links[link];
        while connection.out_at < connection.out.len() {
            match connection
                .stream
                .write(&connection.out[connection.out_at..])
            {
                Ok(taken) => connection.out_at += taken,
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e).context("cannot send"),
            }
        }
        let wanted = if connection.out_at == connection.out.len() {
            connection.out.clear();
            connection.out_at = 0;
            Interest::Read
        } else {
            if connection.out_at > OUT_BYTES_MAX / 2 {
                connection.out.drain(..connection.out_at);
                connection.out_at = 0;
            }
            Interest::ReadWrite
        };
        if wanted != connection.interest {
            connection.interest = wanted;
            self.poller
                .modify(&connection.stream, link as u64, wanted)?;
        }
        Ok(())
    }

    fn serve(&mut self, ready: Ready) -> Result<()> {
        let link = ready.token as usize;
        if ready.writable {
            self.flush(link)?;
        }
        if !ready.readable {
            return Ok(());
        }
        let bytes = match self.links[link].stream.read(&mut self.buffer) {
            Ok(0) => bail!("{} closed a connection under load", self.slice.target),
            Ok(bytes) => bytes,
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                return Ok(());
            }
            Err(e) => return Err(e).context("cannot receive"),
        };
        let replies = self.take_replies(link, bytes)?;
        if self.schedule.is_none() && replies > 0 {
            self.send(link, replies)?;
        }
        Ok(())
    }

    fn take_replies(&mut self, link: usize, bytes: usize) -> Result<usize> {
        let now_ns = self.now_ns();
        self.heard_ns = now_ns;
        let (window_start_ns, window_end_ns) = (self.window_start_ns, self.window_end_ns);
        let is_open_loop = self.schedule.is_some();
        let (found, owed) = (&mut self.found, &mut self.owed);
        let Link {
            starts_ns, replies, ..
        } = &mut self.links[link];
        let (mut count, mut unasked) = (0, false);
        replies.feed(&self.buffer[..bytes], |refused| {
            let Some(start_ns) = starts_ns.pop_front() else {
                unasked = true;
                return;
            };
            count += 1;
            found.replies += 1;
            found.errors += u64::from(refused);
            // A request from before the window waited for the counters to be read.
            let counts = start_ns >= window_start_ns && start_ns < window_end_ns;
            if counts && is_open_loop {
                *owed -= 1;
            }
            if counts && !refused {
                found
                    .latency_ns
                    .saturating_record((now_ns - start_ns).max(1));
            }
        });
        if unasked {
            bail!(
                "{} sent a reply that nobody had asked for",
                self.slice.target
            );
        }
        self.in_flight -= count;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use super::*;
    use crate::frames::FrameCounter;

    const STALL_AFTER: usize = 40;
    const STALLED: Duration = Duration::from_millis(300);

    /// A sink for one connection that sleeps once, after [`STALL_AFTER`] frames; `reply` is what
    /// it answers each frame with.
    fn stalling_sink(reply: &'static [u8]) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let (mut counter, mut total) = (FrameCounter::default(), 0);
            let mut buffer = vec![0; READ_BYTES];
            while let Ok(bytes @ 1..) = stream.read(&mut buffer) {
                let frames = counter.feed(&buffer[..bytes]);
                if total < STALL_AFTER && total + frames >= STALL_AFTER {
                    thread::sleep(STALLED);
                }
                total += frames;
                if stream.write_all(&reply.repeat(frames)).is_err() {
                    return;
                }
            }
        });
        address
    }

    fn measure(shape: Shape, reply: &'static [u8]) -> Result<(Found, Vec<Edge>)> {
        let mut frame = RequestFrame::new("1/a/b/c", 64).unwrap();
        let mut edges = Vec::new();
        let slice = Slice {
            target: stalling_sink(reply),
            frame: &mut frame,
            shape,
            warmup: Duration::ZERO,
            window: Duration::from_millis(800),
            seed: 1,
        };
        let found = run(slice, &mut |edge| {
            edges.push(edge);
            Ok(())
        })?;
        Ok((found, edges))
    }

    fn slow(found: &Found) -> u64 {
        found.latency_ns.count_between(50_000_000, u64::MAX / 2)
    }

    #[test]
    fn an_open_loop_sees_a_stall_in_every_request_that_it_delays() {
        let shape = Shape::Open {
            connections: 1,
            rate: 200.0,
            arrivals: Arrivals::Even,
        };
        let (found, edges) = measure(shape, &[0; 4]).unwrap();
        assert_eq!(edges, [Edge::Open, Edge::Close]);
        assert_eq!((found.latency_ns.len(), found.replies), (160, 160));
        // 300 ms at 5 ms a request, less the 50 ms that are not called slow: 50.
        assert!((45..=160).contains(&slow(&found)), "{} slow", slow(&found));
    }

    #[test]
    fn a_closed_loop_sees_it_once() {
        let shape = Shape::Closed {
            connections: 1,
            pipeline: 1,
        };
        let (found, edges) = measure(shape, &[0; 4]).unwrap();
        assert_eq!(edges, [Edge::Open, Edge::Close]);
        assert!(found.replies > 100, "{} replies", found.replies);
        assert!((1..10).contains(&slow(&found)), "{} slow", slow(&found));
    }

    #[test]
    fn refusals_are_counted_and_not_timed() {
        let shape = Shape::Closed {
            connections: 1,
            pipeline: 4,
        };
        let (found, _) = measure(shape, b"\0\0\0\x02no").unwrap();
        assert_eq!(found.latency_ns.len(), 0);
        assert_eq!(found.errors, found.replies);
        assert_eq!(found.refusal.as_deref(), Some("no"));
    }

    #[test]
    fn a_reply_that_nobody_asked_for_fails_the_slice() {
        let shape = Shape::Closed {
            connections: 1,
            pipeline: 1,
        };
        let error = measure(shape, &[0; 8]).err().unwrap();
        assert!(error.to_string().contains("nobody had asked"), "{error}");
    }
}
