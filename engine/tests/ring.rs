//! One suite for the rings on real sockets: what a shard sees is the same on io_uring and epoll.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use corelane_engine::buffers::{BufferId, Buffers};
use corelane_engine::operation::{Kind, Operation};
use corelane_engine::ring::epoll::Epoll;
use corelane_engine::ring::uring::{Settings, Uring};
use corelane_engine::ring::{Completion, Event, Handle, Ring, SPANS_MAX, Span};

/// No test waits longer than this for anything.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long nothing must happen for a test to believe that nothing does.
const QUIET: Duration = Duration::from_millis(10);
const BUFFER_BYTES: usize = 4096;

/// A ring with its buffers, and what a shard would remember of its sockets.
struct Host<R> {
    ring: R,
    buffers: Buffers,
    handles: HashMap<u32, Handle>,
}

impl<R: Ring> Host<R> {
    fn listener(&mut self) -> TcpListener {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        self.ring.accept(accept(), listener.as_raw_fd());
        listener
    }

    fn attach(&mut self, fd: RawFd, slot: u32) -> Handle {
        let handle = Handle { fd, slot };
        self.ring.attach(handle);
        self.handles.insert(slot, handle);
        handle
    }

    /// A connected pair: the ring's end at `slot`, and the test's.
    fn pair(&mut self, slot: u32) -> (Handle, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        peer.set_read_timeout(Some(PATIENCE)).unwrap();
        let (socket, _) = listener.accept().unwrap();
        // Each ring wants its sockets as it makes them itself.
        let nonblocking = self.ring.name() == "epoll";
        socket.set_nonblocking(nonblocking).unwrap();
        (self.attach(socket.into_raw_fd(), slot), peer)
    }

    /// The next event, which must be one of `operation`.
    fn event_of(&mut self, operation: Operation) -> Event {
        let completion = self.next_within(PATIENCE).expect("something completes");
        assert_eq!(completion.operation, operation, "{completion:?}");
        completion.event
    }

    fn next_within(&mut self, patience: Duration) -> Option<Completion> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(completion) = self.ring.next_completion() {
                if let Event::Received { buffer, .. } = completion.event {
                    self.buffers.take(buffer);
                }
                return Some(completion);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            self.ring.wait(left).unwrap();
        }
    }

    fn assert_quiet(&mut self) {
        let completion = self.next_within(QUIET);
        assert!(completion.is_none(), "{completion:?}");
    }

    /// Takes received bytes out of their buffer and gives it back.
    fn take(&mut self, buffer: BufferId, bytes: u32) -> Vec<u8> {
        let taken = self.buffers.bytes(buffer, 0, bytes as usize).to_vec();
        if self.buffers.release(buffer) {
            self.ring.recycle(buffer);
        }
        taken
    }

    /// Receives until `wanted` bytes are there; asks again when the receive has ended.
    fn receive_bytes(&mut self, operation: Operation, wanted: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < wanted {
            let goes_on = match self.event_of(operation) {
                Event::Received {
                    buffer,
                    bytes,
                    more,
                } => {
                    all.extend(self.take(buffer, bytes));
                    more
                }
                Event::NoBuffers => false,
                other => panic!("{other:?} after {} bytes", all.len()),
            };
            if !goes_on {
                let handle = self.handles[&operation.slot];
                self.ring.receive(operation, handle);
            }
        }
        all
    }

    fn end(&mut self, handle: Handle) {
        self.ring.detach(handle);
        self.ring.close(handle);
        self.handles.remove(&handle.slot);
    }
}

fn accept() -> Operation {
    Operation::new(Kind::Accept, 0, 0)
}

fn receive(slot: u32, generation: u32) -> Operation {
    Operation::new(Kind::Receive, slot, generation)
}

fn send(slot: u32, generation: u32) -> Operation {
    Operation::new(Kind::Send, slot, generation)
}

fn on_epoll(buffers: u16) -> Option<Host<Epoll>> {
    let buffers = Buffers::new(buffers, BUFFER_BYTES).unwrap();
    let ring = Epoll::new(&buffers).unwrap();
    let handles = HashMap::new();
    Some(Host {
        ring,
        buffers,
        handles,
    })
}

fn on_uring(buffers: u16) -> Option<Host<Uring>> {
    let buffers = Buffers::new(buffers, BUFFER_BYTES).unwrap();
    let (entries, files) = (64, 64);
    match Uring::new(Settings { entries, files }, &buffers) {
        Ok(ring) => Some(Host {
            ring,
            buffers,
            handles: HashMap::new(),
        }),
        Err(error) => {
            eprintln!("not tested on io_uring, which this host refuses: {error}");
            None
        }
    }
}

/// Each case is a generic function; this runs it on both rings with so many buffers.
macro_rules! cases {
    ($($name:ident($buffers:expr);)*) => {
        mod epoll {
            $(#[test] fn $name() { super::$name(super::on_epoll($buffers).unwrap()) })*
        }
        mod uring {
            $(#[test] fn $name() {
                if let Some(host) = super::on_uring($buffers) {
                    super::$name(host)
                }
            })*
        }
    };
}

#[path = "ring/ktls.rs"]
mod ktls;

cases! {
    accepts_and_echoes(16);
    many_connections_take_turns(64);
    a_big_send_to_a_slow_reader_arrives_whole(16);
    many_spans_are_one_send(16);
    an_end_of_stream_comes_after_the_last_bytes(16);
    a_reset_ends_the_receive_and_fails_the_send(16);
    shutdown_completes_a_receive_and_a_waiting_send(16);
    a_cancelled_receive_says_so_and_can_be_asked_for_again(16);
    a_cancelled_accept_says_so(16);
    no_buffers_ends_the_receive_and_recycling_recovers_it(4);
    a_slot_used_again_never_answers_for_its_old_generation(16);
    connects_and_sends(16);
    a_refused_connect_says_so(16);
    a_connect_that_is_shut_down_completes(16);
    every_wake_is_reported(4);
    a_wait_ends_at_its_deadline(4);
    fixed_memory_or_not_the_bytes_arrive(4);
    a_send_of_fixed_memory_waits_for_room(4);
}

fn accepts_and_echoes<R: Ring>(mut host: Host<R>) {
    let listener = host.listener();
    let address = listener.local_addr().unwrap();
    for generation in 0..3 {
        let mut peer = TcpStream::connect(address).unwrap();
        let Event::Accepted { socket, more } = host.event_of(accept()) else {
            panic!("a connection is there");
        };
        assert!(more, "the accept goes on by itself");
        assert_closed_on_exec(&socket);
        let handle = host.attach(socket.into_raw_fd(), 5);
        host.ring.receive(receive(5, generation), handle);
        peer.write_all(b"hello").unwrap();
        let got = host.receive_bytes(receive(5, generation), 5);
        let send = send(5, generation);
        host.ring.send(send, handle, &[Span::of(&got)]);
        assert!(matches!(host.event_of(send), Event::Sent { bytes: 5 }));
        let mut back = [0; 5];
        peer.read_exact(&mut back).unwrap();
        assert_eq!(&back, b"hello");
        drop(peer);
        let event = host.event_of(receive(5, generation));
        assert!(matches!(event, Event::EndOfStream), "{event:?}");
        host.end(handle);
    }
    assert!(host.ring.system_calls() > 0);
}

fn assert_closed_on_exec(socket: &OwnedFd) {
    // SAFETY: no pointers.
    let flags = unsafe { libc::fcntl(socket.as_raw_fd(), libc::F_GETFD) };
    assert_ne!(flags & libc::FD_CLOEXEC, 0);
}

fn many_connections_take_turns<R: Ring>(mut host: Host<R>) {
    const CONNECTIONS: u32 = 40;
    const ROUNDS: usize = 5;
    let mut peers: Vec<_> = (0..CONNECTIONS).map(|slot| host.pair(slot)).collect();
    for (handle, _) in &peers {
        host.ring.receive(receive(handle.slot, 1), *handle);
    }
    let mut got: HashMap<u32, Vec<u8>> = HashMap::new();
    for round in 0..ROUNDS {
        for (handle, peer) in &mut peers {
            peer.write_all(&[handle.slot as u8, round as u8]).unwrap();
        }
        let wanted = (round + 1) * 2 * CONNECTIONS as usize;
        while got.values().map(Vec::len).sum::<usize>() < wanted {
            let completion = host.next_within(PATIENCE).expect("bytes are on their way");
            let slot = completion.operation.slot;
            let Event::Received {
                buffer,
                bytes,
                more: true,
            } = completion.event
            else {
                panic!("{completion:?}");
            };
            let bytes = host.take(buffer, bytes);
            got.entry(slot).or_default().extend(bytes);
        }
    }
    for (slot, bytes) in got {
        let pairs = (0..ROUNDS).flat_map(|round| [slot as u8, round as u8]);
        assert!(bytes.into_iter().eq(pairs), "slot {slot}");
    }
}

fn a_big_send_to_a_slow_reader_arrives_whole<R: Ring>(mut host: Host<R>) {
    let (handle, mut peer) = host.pair(3);
    let bytes: Vec<u8> = (0..8 << 20).map(|at: u32| (at % 251) as u8).collect();
    let (mut sent, mut read, mut waited) = (0, Vec::new(), false);
    let mut piece = vec![0; 64 << 10];
    while sent < bytes.len() {
        let rest = &bytes[sent..];
        host.ring.send(send(3, 9), handle, &[Span::of(rest)]);
        // Nothing is read before the socket is full, so a send has to wait.
        let completion = loop {
            if let Some(completion) = host.next_within(Duration::from_millis(5)) {
                break completion;
            }
            waited = true;
            let count = peer.read(&mut piece).unwrap();
            read.extend_from_slice(&piece[..count]);
        };
        assert_eq!(completion.operation, send(3, 9));
        let Event::Sent { bytes } = completion.event else {
            panic!("{completion:?}");
        };
        assert!(bytes > 0 && bytes as usize <= rest.len());
        sent += bytes as usize;
    }
    assert!(waited, "the socket was full at least once");
    while read.len() < bytes.len() {
        let count = peer.read(&mut piece).unwrap();
        assert_ne!(count, 0);
        read.extend_from_slice(&piece[..count]);
    }
    assert!(read == bytes);
}

fn many_spans_are_one_send<R: Ring>(mut host: Host<R>) {
    let (handle, mut peer) = host.pair(0);
    let pieces: Vec<[u8; 3]> = (0..SPANS_MAX).map(|at| [at as u8, 0, 7]).collect();
    let spans: Vec<Span> = pieces.iter().map(|piece| Span::of(piece)).collect();
    host.ring.send(send(0, 0), handle, &spans);
    // The list of spans is the caller's again at once; only what they point to must stay.
    drop(spans);
    let event = host.event_of(send(0, 0));
    assert!(matches!(event, Event::Sent { bytes } if bytes as usize == 3 * SPANS_MAX));
    let mut read = vec![0; 3 * SPANS_MAX];
    peer.read_exact(&mut read).unwrap();
    assert_eq!(read, pieces.concat());
}

fn an_end_of_stream_comes_after_the_last_bytes<R: Ring>(mut host: Host<R>) {
    let (handle, mut peer) = host.pair(1);
    let bytes = vec![5; 3 * BUFFER_BYTES + 100];
    peer.write_all(&bytes).unwrap();
    peer.shutdown(Shutdown::Write).unwrap();
    host.ring.receive(receive(1, 0), handle);
    assert_eq!(host.receive_bytes(receive(1, 0), bytes.len()), bytes);
    let event = host.event_of(receive(1, 0));
    assert!(matches!(event, Event::EndOfStream), "{event:?}");
    // Half-closed: we can still send.
    host.ring.send(send(1, 0), handle, &[Span::of(b"bye")]);
    let event = host.event_of(send(1, 0));
    assert!(matches!(event, Event::Sent { bytes: 3 }), "{event:?}");
    let mut read = [0; 3];
    peer.read_exact(&mut read).unwrap();
    host.end(handle);
    assert_eq!(peer.read(&mut read).unwrap(), 0);
}

fn a_reset_ends_the_receive_and_fails_the_send<R: Ring>(mut host: Host<R>) {
    let (handle, peer) = host.pair(1);
    host.ring.receive(receive(1, 0), handle);
    host.assert_quiet();
    reset(peer);
    let event = host.event_of(receive(1, 0));
    let Event::ReceiveFailed { errno } = event else {
        panic!("{event:?}");
    };
    assert_eq!(errno, libc::ECONNRESET);
    host.ring.send(send(1, 0), handle, &[Span::of(b"late")]);
    let event = host.event_of(send(1, 0));
    let Event::SendFailed { errno } = event else {
        panic!("{event:?}");
    };
    assert_eq!(errno, libc::EPIPE);
    host.end(handle);
}

/// Closes a socket so that its peer gets a reset.
fn reset(socket: TcpStream) {
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    // SAFETY: the option's value is a linger of that size.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_LINGER,
            (&raw const linger).cast(),
            size_of_val(&linger) as u32,
        )
    };
    assert_eq!(set, 0);
}

fn shutdown_completes_a_receive_and_a_waiting_send<R: Ring>(mut host: Host<R>) {
    let (handle, _peer) = host.pair(2);
    host.ring.receive(receive(2, 4), handle);
    let bytes = vec![1; 1 << 20];
    send_until_one_waits(&mut host, handle, send(2, 4), &bytes);
    host.ring.shutdown(handle);
    let mut ended = [0; 2];
    for _ in 0..2 {
        let completion = host.next_within(PATIENCE).expect("both complete");
        match completion.event {
            Event::EndOfStream | Event::ReceiveFailed { .. } => ended[0] += 1,
            Event::SendFailed { .. } | Event::Sent { .. } => ended[1] += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(ended, [1, 1], "one receive and one send");
    host.end(handle);
    host.assert_quiet();
}

/// Sends to a peer that does not read, until a send does not complete.
fn send_until_one_waits<R: Ring>(
    host: &mut Host<R>,
    handle: Handle,
    operation: Operation,
    bytes: &[u8],
) {
    let waits = (0..100_000).any(|_| {
        host.ring.send(operation, handle, &[Span::of(bytes)]);
        match host.next_within(2 * QUIET) {
            Some(completion) => {
                let event = completion.event;
                assert!(matches!(event, Event::Sent { .. }), "{event:?}");
                false
            }
            None => true,
        }
    });
    assert!(waits);
}

fn a_cancelled_receive_says_so_and_can_be_asked_for_again<R: Ring>(mut host: Host<R>) {
    let (handle, mut peer) = host.pair(2);
    let receive = receive(2, 4);
    host.ring.receive(receive, handle);
    host.assert_quiet();
    host.ring.cancel_receive(receive, handle);
    let event = host.event_of(receive);
    assert!(matches!(event, Event::ReceiveFailed { errno } if errno == libc::ECANCELED));
    // Nothing is under way any more: a second cancel finds nothing, and bytes are not taken.
    host.ring.cancel_receive(receive, handle);
    peer.write_all(b"later").unwrap();
    host.assert_quiet();
    host.ring.receive(receive, handle);
    assert_eq!(host.receive_bytes(receive, 5), b"later");
}

fn a_cancelled_accept_says_so<R: Ring>(mut host: Host<R>) {
    let listener = host.listener();
    host.assert_quiet();
    let fd = listener.as_raw_fd();
    host.ring.cancel_receive(accept(), Handle { fd, slot: 0 });
    let event = host.event_of(accept());
    assert!(matches!(event, Event::AcceptFailed { errno } if errno == libc::ECANCELED));
    let _peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    host.assert_quiet();
    // The connection waits in the listener's line until somebody accepts again.
    host.ring.accept(accept(), fd);
    assert!(matches!(host.event_of(accept()), Event::Accepted { .. }));
}

fn no_buffers_ends_the_receive_and_recycling_recovers_it<R: Ring>(mut host: Host<R>) {
    let (handle, mut peer) = host.pair(0);
    let receive = receive(0, 0);
    let bytes: Vec<u8> = (0..8 * BUFFER_BYTES).map(|at| (at / 7) as u8).collect();
    peer.write_all(&bytes).unwrap();
    host.ring.receive(receive, handle);
    let (mut held, mut got) = (Vec::new(), Vec::new());
    loop {
        match host.event_of(receive) {
            Event::Received {
                buffer,
                bytes,
                more,
            } => {
                held.push((buffer, bytes));
                // A receive may end with the last buffer, and meet the lack when asked again.
                if !more {
                    host.ring.receive(receive, handle);
                }
            }
            Event::NoBuffers => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(held.len(), 4, "all buffers were filled");
    host.assert_quiet();
    for (buffer, bytes) in held {
        got.extend(host.take(buffer, bytes));
    }
    host.ring.receive(receive, handle);
    got.extend(host.receive_bytes(receive, bytes.len() - got.len()));
    assert!(got == bytes, "nothing lost, nothing twice");
}

fn a_slot_used_again_never_answers_for_its_old_generation<R: Ring>(mut host: Host<R>) {
    let (old, mut old_peer) = host.pair(7);
    host.ring.receive(receive(7, 1), old);
    host.ring.shutdown(old);
    let event = host.event_of(receive(7, 1));
    assert!(matches!(event, Event::EndOfStream), "{event:?}");
    host.end(old);
    assert_eq!(old_peer.read(&mut [0]).unwrap(), 0);

    let (new, mut new_peer) = host.pair(7);
    host.ring.receive(receive(7, 2), new);
    let _ = old_peer.write_all(b"to nobody");
    // A cancel that names the old generation does nothing to the new one.
    host.ring.cancel_receive(receive(7, 1), new);
    host.assert_quiet();
    new_peer.write_all(b"new").unwrap();
    assert_eq!(host.receive_bytes(receive(7, 2), 3), b"new");
}

fn connects_and_sends<R: Ring>(mut host: Host<R>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (handle, connected) = connect(&mut host, 4, listener.local_addr().unwrap());
    assert_eq!(connected, 0);
    let (mut peer, _) = listener.accept().unwrap();
    host.ring.receive(receive(4, 3), handle);
    peer.write_all(b"ping").unwrap();
    assert_eq!(host.receive_bytes(receive(4, 3), 4), b"ping");
    host.ring.send(send(4, 3), handle, &[Span::of(b"pong")]);
    let event = host.event_of(send(4, 3));
    assert!(matches!(event, Event::Sent { bytes: 4 }), "{event:?}");
    let mut read = [0; 4];
    peer.read_exact(&mut read).unwrap();
    assert_eq!(&read, b"pong");
}

fn a_refused_connect_says_so<R: Ring>(mut host: Host<R>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let (handle, errno) = connect(&mut host, 4, address);
    assert_eq!(errno, libc::ECONNREFUSED);
    host.end(handle);
}

fn connect<R: Ring>(host: &mut Host<R>, slot: u32, address: SocketAddr) -> (Handle, i32) {
    let (handle, operation) = begin_connect(host, slot, address);
    match host.event_of(operation) {
        Event::Connected { errno } => (handle, errno),
        other => panic!("{other:?}"),
    }
}

fn begin_connect<R: Ring>(
    host: &mut Host<R>,
    slot: u32,
    address: SocketAddr,
) -> (Handle, Operation) {
    let fd = host.ring.connect_socket(&address).unwrap();
    let handle = host.attach(fd, slot);
    let operation = Operation::new(Kind::Connect, slot, 3);
    host.ring.connect(operation, handle, &address);
    (handle, operation)
}

fn a_connect_that_is_shut_down_completes<R: Ring>(mut host: Host<R>) {
    // A listener whose line is full: the kernel lets further connects wait.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    // SAFETY: no pointers; a second listen only changes the length of the line.
    assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 0) }, 0);
    let mut others = on_epoll(2).unwrap();
    let others: Vec<OwnedFd> = (0..4)
        .map(|slot| {
            let (handle, _) = begin_connect(&mut others, slot, address);
            // SAFETY: the descriptor is ours, and the ring is not used any more.
            unsafe { OwnedFd::from_raw_fd(handle.fd) }
        })
        .collect();

    let (handle, operation) = begin_connect(&mut host, 6, address);
    host.assert_quiet();
    host.ring.shutdown(handle);
    match host.event_of(operation) {
        Event::Connected { errno } => assert_ne!(errno, 0),
        other => panic!("{other:?}"),
    }
    host.end(handle);
    drop(others);
}

fn every_wake_is_reported<R: Ring>(mut host: Host<R>) {
    // SAFETY: a fresh descriptor, owned by `eventfd` from here on.
    let eventfd = unsafe {
        let fd = libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK);
        std::fs::File::from_raw_fd(fd)
    };
    let operation = Operation::new(Kind::Wake, 0, 0);
    host.ring.watch_wake(operation, eventfd.as_raw_fd());
    host.assert_quiet();
    for _ in 0..3 {
        let mut from_afar = eventfd.try_clone().unwrap();
        let writer = std::thread::spawn(move || from_afar.write_all(&1u64.to_ne_bytes()).unwrap());
        assert!(matches!(host.event_of(operation), Event::Woken { .. }));
        writer.join().unwrap();
        host.assert_quiet();
    }
}

fn a_wait_ends_at_its_deadline<R: Ring>(mut host: Host<R>) {
    for micros in [0, 300, 5_000] {
        let timeout = Duration::from_micros(micros);
        let before = Instant::now();
        host.ring.wait(timeout).unwrap();
        let waited = before.elapsed();
        assert!(waited >= timeout, "{waited:?} of {timeout:?}");
        assert!(waited < timeout + PATIENCE);
        assert!(host.ring.next_completion().is_none());
    }
}

fn fixed_memory_or_not_the_bytes_arrive<R: Ring>(mut host: Host<R>) {
    let memory: &'static [u8] = Vec::leak(vec![42; 4096]);
    let registered = host.ring.register_fixed(memory);
    assert!(host.ring.name() == "uring" || !registered);
    let (handle, mut peer) = host.pair(1);
    let spans = [Span::of(&memory[100..164])];
    host.ring.send(send(1, 0), handle, &spans);
    let event = host.event_of(send(1, 0));
    assert!(matches!(event, Event::Sent { bytes: 64 }), "{event:?}");
    let mut read = [0; 64];
    peer.read_exact(&mut read).unwrap();
    assert_eq!(read, [42; 64]);
}

fn a_send_of_fixed_memory_waits_for_room<R: Ring>(mut host: Host<R>) {
    let memory: &'static [u8] = Vec::leak(vec![42; 64 << 10]);
    host.ring.register_fixed(memory);
    let (handle, mut peer) = host.pair(1);
    send_until_one_waits(&mut host, handle, send(1, 0), memory);
    let mut piece = vec![0; 1 << 20];
    let completion = loop {
        if let Some(completion) = host.next_within(QUIET) {
            break completion;
        }
        assert_ne!(peer.read(&mut piece).unwrap(), 0);
    };
    let event = completion.event;
    assert!(
        matches!(event, Event::Sent { bytes } if bytes > 0),
        "{event:?}"
    );
}
