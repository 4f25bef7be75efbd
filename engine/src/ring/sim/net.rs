//! The simulated network: listeners, connections and a clock, with a test at the far ends.
//!
//! A connection is two ends; what one sends lies in the inbound queue of the other. An end belongs
//! to a ring (it has a stand-in descriptor) or to the test (it has a [`PeerId`]).

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::rc::Rc;

/// How often things go wrong, each in 1000, and how large the sockets' queues are.
#[derive(Clone, Copy, Debug)]
pub struct Faults {
    /// A receive takes fewer bytes than are there.
    pub short_receive: u16,
    /// A send takes fewer bytes than there is room for.
    pub short_send: u16,
    /// An operation that could complete does so later.
    pub delay: u16,
    /// The longest such delay, in ns.
    pub delay_max_ns: u64,
    /// A multishot receive or accept ends with a completion that was a success.
    pub ends: u16,
    /// A receive finds no buffer although there are some.
    pub no_buffers: u16,
    /// A connection is reset while one of its operations is looked at.
    pub reset: u16,
    /// An accept fails for want of descriptors.
    pub accept_failure: u16,
    /// A connect is refused although somebody listens.
    pub connect_failure: u16,
    /// No socket can be made for an outgoing connection.
    pub no_socket: u16,
    /// Bytes on their way in one direction of a connection, at most.
    pub window_bytes: usize,
}

impl Faults {
    /// Everything works, at once and whole.
    pub const NONE: Faults = Faults {
        short_receive: 0,
        short_send: 0,
        delay: 0,
        delay_max_ns: 0,
        ends: 0,
        no_buffers: 0,
        reset: 0,
        accept_failure: 0,
        connect_failure: 0,
        no_socket: 0,
        window_bytes: 64 * 1024,
    };

    /// Bytes arrive in crumbs, late and out of turn, but nothing is lost.
    pub const CRUMBS: Faults = Faults {
        short_receive: 600,
        short_send: 600,
        delay: 300,
        delay_max_ns: 2_000_000,
        ends: 50,
        no_buffers: 20,
        window_bytes: 2048,
        ..Faults::NONE
    };

    /// All that, and connections break.
    pub const STORM: Faults = Faults {
        reset: 5,
        accept_failure: 50,
        connect_failure: 100,
        no_socket: 20,
        ..Faults::CRUMBS
    };
}

/// The network, as tests use it. Clones are the same network.
#[derive(Clone)]
pub struct Net(pub(super) Rc<RefCell<World>>);

/// An end of a connection that belongs to the test.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId(usize);

/// A listener that belongs to the test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenerId(usize);

/// What a peer sees of its connection, once it has read all bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerState {
    /// More may come.
    Open,
    /// The other end has sent its end of stream.
    Ended,
    /// The connection was reset.
    Reset,
}

impl Net {
    /// A quiet network; all that is left to chance follows from `seed`.
    pub fn new(seed: u64, faults: Faults) -> Net {
        let world = World {
            chance: Chance(seed),
            faults,
            now_ns: 1_000_000_000,
            ends: Vec::new(),
            lines: Vec::new(),
            descriptors: BTreeMap::new(),
            black_holes: BTreeSet::new(),
        };
        Net(Rc::new(RefCell::new(world)))
    }

    /// Changes how often things go wrong from now on.
    pub fn set_faults(&self, faults: Faults) {
        self.0.borrow_mut().faults = faults;
    }

    /// The clock, in ns.
    pub fn now_ns(&self) -> u64 {
        self.0.borrow().now_ns
    }

    /// Lets time pass.
    pub fn advance(&self, by_ns: u64) {
        self.0.borrow_mut().now_ns += by_ns;
    }

    /// A listener for a ring: its descriptor is what [`Ring::accept`](crate::ring::Ring::accept)
    /// wants.
    ///
    /// # Errors
    /// The process is out of descriptors: the stand-ins are real ones, of /dev/null.
    pub fn listen(&self, address: SocketAddr) -> io::Result<OwnedFd> {
        let stand_in = stand_in()?;
        let mut world = self.0.borrow_mut();
        let line = world.listen(address);
        world.register(stand_in.as_raw_fd(), Place::Line(line));
        Ok(stand_in)
    }

    /// A listener for the test. The address is free again after [`Net::refuse`].
    pub fn peer_listen(&self, address: SocketAddr) -> ListenerId {
        ListenerId(self.0.borrow_mut().listen(address))
    }

    /// Nobody listens at `address` any more; who waits in its line is reset.
    pub fn refuse(&self, address: SocketAddr) {
        let mut world = self.0.borrow_mut();
        if let Some(line) = world.line_at(address) {
            world.close_line(line);
        }
    }

    /// Connects to `address` are neither accepted nor refused.
    pub fn black_hole(&self, address: SocketAddr) {
        self.0.borrow_mut().black_holes.insert(address);
    }

    /// Connects to a listener. None: nobody listens there.
    pub fn peer_connect(&self, address: SocketAddr) -> Option<PeerId> {
        let mut world = self.0.borrow_mut();
        let ours = world.new_end();
        let connected = world.connect(ours, address);
        connected.then_some(PeerId(ours))
    }

    /// The next connection in the test's own line.
    pub fn peer_accept(&self, listener: ListenerId) -> Option<PeerId> {
        let line = &mut self.0.borrow_mut().lines[listener.0];
        line.waiting.pop_front().map(PeerId)
    }

    /// Sends bytes; answers how many there was room for (none on a connection that is over).
    pub fn peer_write(&self, peer: PeerId, bytes: &[u8]) -> usize {
        let mut world = self.0.borrow_mut();
        if world.ends[peer.0].broken() {
            return 0;
        }
        let count = bytes.len().min(world.room(peer.0));
        world.deliver(peer.0, &bytes[..count]);
        count
    }

    /// Takes at most `bytes_max` of the bytes that have arrived.
    pub fn peer_read(&self, peer: PeerId, bytes_max: usize) -> Vec<u8> {
        let mut world = self.0.borrow_mut();
        let mut bytes = vec![0; world.ends[peer.0].inbound.len().min(bytes_max)];
        world.read(peer.0, &mut bytes);
        bytes
    }

    /// What comes after the bytes that can be read now.
    pub fn peer_state(&self, peer: PeerId) -> PeerState {
        let world = self.0.borrow();
        let end = &world.ends[peer.0];
        match end.broken() {
            true => PeerState::Reset,
            false if world.other_has_ended(peer.0) => PeerState::Ended,
            false => PeerState::Open,
        }
    }

    /// Sends the end of stream; the peer can still read.
    pub fn peer_shutdown(&self, peer: PeerId) {
        self.0.borrow_mut().ends[peer.0].ended = true;
    }

    /// Closes the peer's end, as close(2) does: with a reset if it has not read everything.
    pub fn peer_close(&self, peer: PeerId) {
        self.0.borrow_mut().close(peer.0);
    }

    /// Resets the connection.
    pub fn peer_reset(&self, peer: PeerId) {
        self.0.borrow_mut().reset(peer.0);
    }

    /// Descriptors that rings have and have not closed, listeners included.
    pub fn open_descriptors(&self) -> usize {
        self.0.borrow().descriptors.len()
    }
}

/// The state of the network.
pub(super) struct World {
    pub(super) chance: Chance,
    pub(super) faults: Faults,
    pub(super) now_ns: u64,
    /// Never shortened: an end is named by its place as long as the test runs.
    ends: Vec<End>,
    lines: Vec<Line>,
    descriptors: BTreeMap<RawFd, Place>,
    black_holes: BTreeSet<SocketAddr>,
}

/// What a stand-in descriptor stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Line(usize),
    End(usize),
}

struct Line {
    address: SocketAddr,
    waiting: VecDeque<usize>,
    open: bool,
}

#[derive(Default)]
struct End {
    other: Option<usize>,
    inbound: VecDeque<u8>,
    /// It has sent its end of stream.
    ended: bool,
    /// It was shut down or closed on its own side: it reads what is there, then the end.
    shut: bool,
    closed: bool,
    /// An error that has not been told yet, and whether there ever was one.
    error: Option<i32>,
    failed: bool,
}

impl End {
    fn broken(&self) -> bool {
        self.failed || self.closed
    }
}

impl World {
    /// Whether something happens that does so `often` in 1000 times.
    pub(super) fn happens(&mut self, often: u16) -> bool {
        often > 0 && self.chance.below(1000) < u64::from(often)
    }

    /// Takes a descriptor for a ring. A number that was given away before was closed behind our
    /// back, as dropping an accepted socket does.
    pub(super) fn register(&mut self, fd: RawFd, place: Place) {
        if let Some(lost) = self.descriptors.insert(fd, place) {
            self.close_place(lost);
        }
    }

    pub(super) fn place(&self, fd: RawFd) -> Option<Place> {
        self.descriptors.get(&fd).copied()
    }

    pub(super) fn close_descriptor(&mut self, fd: RawFd) {
        let place = self.descriptors.remove(&fd);
        let place = place.unwrap_or_else(|| panic!("closed {fd}, which is not open"));
        self.close_place(place);
    }

    fn close_place(&mut self, place: Place) {
        match place {
            Place::Line(line) => self.close_line(line),
            Place::End(end) => self.close(end),
        }
    }

    pub(super) fn new_end(&mut self) -> usize {
        self.ends.push(End::default());
        self.ends.len() - 1
    }

    fn listen(&mut self, address: SocketAddr) -> usize {
        assert!(self.line_at(address).is_none(), "{address} is taken");
        self.lines.push(Line {
            address,
            waiting: VecDeque::new(),
            open: true,
        });
        self.lines.len() - 1
    }

    fn line_at(&self, address: SocketAddr) -> Option<usize> {
        self.lines
            .iter()
            .position(|line| line.open && line.address == address)
    }

    fn close_line(&mut self, line: usize) {
        self.lines[line].open = false;
        for end in std::mem::take(&mut self.lines[line].waiting) {
            self.reset(end);
        }
    }

    /// Whether the line exists and has somebody in it; None: it was closed.
    pub(super) fn waiting(&self, line: usize) -> Option<bool> {
        let line = &self.lines[line];
        line.open.then_some(!line.waiting.is_empty())
    }

    pub(super) fn accept(&mut self, line: usize) -> Option<usize> {
        self.lines[line].waiting.pop_front()
    }

    pub(super) fn is_black_hole(&self, address: SocketAddr) -> bool {
        self.black_holes.contains(&address)
    }

    /// Connects an end to whoever listens at `address`.
    pub(super) fn connect(&mut self, ours: usize, address: SocketAddr) -> bool {
        let Some(line) = self.line_at(address) else {
            return false;
        };
        let theirs = self.new_end();
        self.ends[ours].other = Some(theirs);
        self.ends[theirs].other = Some(ours);
        self.lines[line].waiting.push_back(theirs);
        true
    }

    pub(super) fn is_shut(&self, end: usize) -> bool {
        self.ends[end].shut
    }

    /// Room for bytes that this end sends.
    fn room(&self, end: usize) -> usize {
        let other = self.ends[end].other.map(|other| &self.ends[other]);
        let used = other.map_or(0, |other| other.inbound.len());
        self.faults.window_bytes.saturating_sub(used)
    }

    fn deliver(&mut self, end: usize, bytes: &[u8]) {
        assert!(!self.ends[end].ended, "sent after its end of stream");
        match self.ends[end].other {
            Some(other) if !self.ends[other].closed => self.ends[other].inbound.extend(bytes),
            // The other end answers bytes that nobody will read with a reset.
            _ => self.fail(end),
        }
    }

    fn other_has_ended(&self, end: usize) -> bool {
        let other = self.ends[end].other;
        other.is_some_and(|other| self.ends[other].ended)
    }

    /// What a receive finds: so many bytes, an errno, or nothing yet (None). No bytes: the end.
    pub(super) fn readable(&self, end: usize) -> Option<Result<usize, i32>> {
        let this = &self.ends[end];
        if let Some(errno) = this.error {
            return Some(Err(errno));
        }
        if !this.inbound.is_empty() {
            return Some(Ok(this.inbound.len()));
        }
        if this.other.is_none() {
            return Some(Err(libc::ENOTCONN));
        }
        (this.failed || this.shut || self.other_has_ended(end)).then_some(Ok(0))
    }

    /// What a send finds: so much room, an errno, or nothing yet (None).
    pub(super) fn writable(&self, end: usize) -> Option<Result<usize, i32>> {
        let this = &self.ends[end];
        if let Some(errno) = this.error {
            return Some(Err(errno));
        }
        if this.failed || this.ended || this.other.is_none() {
            return Some(Err(libc::EPIPE));
        }
        let room = self.room(end);
        (room > 0).then_some(Ok(room))
    }

    /// The error has been told: it is told once.
    pub(super) fn take_error(&mut self, end: usize) {
        self.ends[end].error = None;
    }

    /// Moves inbound bytes into `into`, which is not longer than what `readable` answered.
    pub(super) fn read(&mut self, end: usize, into: &mut [u8]) {
        let inbound = &mut self.ends[end].inbound;
        let (front, back) = inbound.as_slices();
        let (first, rest) = into.split_at_mut(into.len().min(front.len()));
        first.copy_from_slice(&front[..first.len()]);
        rest.copy_from_slice(&back[..rest.len()]);
        inbound.drain(..into.len());
    }

    /// Sends bytes that there is room for.
    pub(super) fn write(&mut self, end: usize, bytes: &[u8]) {
        self.deliver(end, bytes);
    }

    /// Both directions are shut down from this side.
    pub(super) fn shut(&mut self, end: usize) {
        self.ends[end].shut = true;
        self.ends[end].ended = true;
    }

    fn close(&mut self, end: usize) {
        let unread = !self.ends[end].inbound.is_empty();
        self.ends[end].inbound = VecDeque::new();
        self.ends[end].closed = true;
        self.shut(end);
        if let Some(other) = self.ends[end].other.filter(|_| unread) {
            self.fail(other);
        }
    }

    /// Resets the connection of an end: both sides learn of it.
    pub(super) fn reset(&mut self, end: usize) {
        self.fail(end);
        if let Some(other) = self.ends[end].other {
            self.fail(other);
        }
    }

    fn fail(&mut self, end: usize) {
        let end = &mut self.ends[end];
        if !end.failed {
            end.failed = true;
            end.error = Some(libc::ECONNRESET);
            end.inbound = VecDeque::new();
        }
    }
}

/// A descriptor that stands for a simulated socket: a real one, so that its number is nobody
/// else's and it can be closed; of no use for anything else.
pub(super) fn stand_in() -> io::Result<OwnedFd> {
    Ok(File::open("/dev/null")?.into())
}

/// A small generator of numbers that look random (splitmix64).
pub(super) struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`, which is not 0. The bias of the remainder does not matter here.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub(super) fn shuffle<T>(&mut self, items: &mut [T]) {
        for place in (1..items.len()).rev() {
            items.swap(place, self.below(place as u64 + 1) as usize);
        }
    }
}
