//! The rings on sockets whose TLS the kernel does; left out, and said, where it has none.

use std::os::fd::{AsFd, BorrowedFd};
use std::thread;

use corelane_engine::ring::ktls::{
    Cipher, Direction, IV_BYTES, Keys, Version, farewell, install, prepare, send_record,
};

use super::*;

const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const LARGE_BYTES: usize = 1 << 20;

cases! {
    a_socket_without_keys_is_as_it_was(4);
    sealed_bytes_pass_both_ways(16);
    other_records_wait_to_be_taken(16);
    half_a_record_is_nothing_yet(16);
    what_is_under_way_can_be_ended(16);
    a_farewell_waits_for_what_was_sent_before(16);
}

/// Whether the kernel has TLS. In a machine made for these tests it must have.
fn kernel_has_tls() -> bool {
    let (one, _other) = tcp_pair();
    let prepared = prepare(one.as_fd());
    if let Err(error) = &prepared {
        let demanded = std::env::var_os("CORELANE_VM").is_some();
        assert!(!demanded, "{error}");
        eprintln!("not tested: the kernel has no TLS: {error}");
    }
    prepared.is_ok()
}

fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    one.set_read_timeout(Some(PATIENCE)).unwrap();
    (one, listener.accept().unwrap().0)
}

/// Gives a socket the keys of one direction; whether the kernel has the cipher.
fn give(socket: BorrowedFd<'_>, direction: Direction, cipher: Cipher, secret: u8) -> bool {
    let keys = Keys {
        version: Version::Tls13,
        cipher,
        key: &[secret; 32][..cipher.key_bytes()],
        iv: &[secret; IV_BYTES],
        sequence: 0,
    };
    let installed = install(socket, direction, &keys);
    if let Err(error) = &installed {
        assert_eq!(error.kind(), std::io::ErrorKind::NotFound, "{error}");
    }
    installed.is_ok()
}

/// A pair whose ends have changed keys.
fn sealed<R: Ring>(host: &mut Host<R>, slot: u32, cipher: Cipher) -> Option<(Handle, TcpStream)> {
    let (handle, peer) = host.pair(slot);
    // SAFETY: the host keeps the descriptor open until its end.
    let ours = unsafe { BorrowedFd::borrow_raw(handle.fd) };
    for (socket, out, into) in [(ours, 1, 2), (peer.as_fd(), 2, 1)] {
        prepare(socket).unwrap();
        let given = give(socket, Direction::Send, cipher, out)
            && give(socket, Direction::Receive, cipher, into);
        if !given {
            eprintln!("not tested: the kernel has no {cipher:?}");
            return None;
        }
    }
    host.ring.secured(handle);
    Some((handle, peer))
}

fn some_bytes(count: usize) -> Vec<u8> {
    (0..count).map(|at| (at * 7 + at / 251) as u8).collect()
}

fn a_socket_without_keys_is_as_it_was<R: Ring>(mut host: Host<R>) {
    let (handle, mut peer) = host.pair(1);
    // Whether the kernel has TLS or not.
    let _ = prepare(peer.as_fd());
    peer.write_all(b"plain").unwrap();
    host.ring.receive(receive(1, 0), handle);
    assert_eq!(host.receive_bytes(receive(1, 0), 5), b"plain");
}

fn sealed_bytes_pass_both_ways<R: Ring>(mut host: Host<R>) {
    if !kernel_has_tls() {
        return;
    }
    let bytes: &'static [u8] = some_bytes(LARGE_BYTES).leak();
    host.ring.register_fixed(bytes);
    let ciphers = [
        Cipher::Aes128Gcm,
        Cipher::Aes256Gcm,
        Cipher::Chacha20Poly1305,
    ];
    for (slot, cipher) in (1..).zip(ciphers) {
        let Some((handle, mut peer)) = sealed(&mut host, slot, cipher) else {
            continue;
        };
        let peer = thread::spawn(move || {
            peer.write_all(bytes).unwrap();
            let mut read = vec![0; LARGE_BYTES];
            peer.read_exact(&mut read).unwrap();
            assert!(read == bytes);
            peer
        });
        host.ring.receive(receive(slot, 0), handle);
        assert!(host.receive_bytes(receive(slot, 0), LARGE_BYTES) == bytes);
        let mut sent = 0;
        while sent < LARGE_BYTES {
            // One span, of registered memory at first, and several.
            let rest = &bytes[sent..];
            let (front, back) = rest.split_at(rest.len() / 3);
            let spans = match sent % 3 {
                0 => vec![Span::of(rest)],
                _ => vec![Span::of(front), Span::of(back)],
            };
            host.ring.send(send(slot, 0), handle, &spans);
            match host.event_of(send(slot, 0)) {
                Event::Sent { bytes } => sent += bytes as usize,
                other => panic!("{other:?}"),
            }
        }
        drop(peer.join().unwrap());
        let event = host.event_of(receive(slot, 0));
        assert!(matches!(event, Event::EndOfStream), "{event:?}");
    }
}

fn other_records_wait_to_be_taken<R: Ring>(mut host: Host<R>) {
    if !kernel_has_tls() {
        return;
    }
    let (handle, mut peer) = sealed(&mut host, 1, Cipher::Aes256Gcm).unwrap();
    let ticket = some_bytes(300);
    send_record(peer.as_fd(), HANDSHAKE, &ticket).unwrap();
    peer.write_all(b"between").unwrap();
    assert!(farewell(peer.as_fd()).unwrap());
    host.ring.receive(receive(1, 0), handle);
    let mut record = vec![0; 16 * 1024];
    let mut take = |host: &mut Host<R>| {
        let event = host.event_of(receive(1, 0));
        let failed = matches!(event, Event::ReceiveFailed { errno } if errno == libc::EIO);
        assert!(failed, "{event:?}");
        let (kind, bytes) = host.ring.take_record(handle, &mut record).unwrap();
        host.ring.receive(receive(1, 0), handle);
        (kind, record[..bytes].to_vec())
    };
    assert_eq!(take(&mut host), (HANDSHAKE, ticket));
    match host.event_of(receive(1, 0)) {
        Event::Received { buffer, bytes, .. } => {
            assert_eq!(host.take(buffer, bytes), b"between");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(take(&mut host), (ALERT, vec![1, 0]));
    drop(peer);
    let event = host.event_of(receive(1, 0));
    assert!(matches!(event, Event::EndOfStream), "{event:?}");
}

/// What a kernel makes of `bytes` with these keys.
fn seal(bytes: &[u8]) -> Vec<u8> {
    let (mut from, mut to) = tcp_pair();
    prepare(from.as_fd()).unwrap();
    assert!(give(from.as_fd(), Direction::Send, Cipher::Aes256Gcm, 2));
    from.write_all(bytes).unwrap();
    drop(from);
    let mut sealed = Vec::new();
    to.read_to_end(&mut sealed).unwrap();
    sealed
}

fn half_a_record_is_nothing_yet<R: Ring>(mut host: Host<R>) {
    if !kernel_has_tls() {
        return;
    }
    let bytes = some_bytes(10_000);
    let record = seal(&bytes);
    let (handle, mut peer) = host.pair(1);
    // SAFETY: the host keeps the descriptor open until its end.
    let ours = unsafe { BorrowedFd::borrow_raw(handle.fd) };
    prepare(ours).unwrap();
    assert!(give(ours, Direction::Receive, Cipher::Aes256Gcm, 2));
    host.ring.secured(handle);
    host.ring.receive(receive(1, 0), handle);
    let (first, rest) = record.split_at(record.len() / 2);
    peer.write_all(first).unwrap();
    let (cpu, wall) = (cpu_time(), Instant::now());
    let early = host.next_within(Duration::from_millis(300));
    let (cpu, wall) = (cpu_time() - cpu, wall.elapsed());
    assert!(early.is_none(), "{early:?}");
    eprintln!(
        "{}: {cpu:?} of CPU in {wall:?} with half a record",
        host.ring.name()
    );
    assert!(
        cpu < wall / 2,
        "the wait for the other half costs {cpu:?} in {wall:?}"
    );
    peer.write_all(rest).unwrap();
    assert!(host.receive_bytes(receive(1, 0), bytes.len()) == bytes);
}

/// What this thread has used up.
fn cpu_time() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// Sends `bytes` again and again until the socket takes no more, and ends the send that waits:
/// how many bytes it has taken.
fn fill<R: Ring>(host: &mut Host<R>, handle: Handle, bytes: &'static [u8]) -> usize {
    let (mut sent, mut cancelled) = (0, false);
    loop {
        let rest = &bytes[sent % bytes.len()..];
        host.ring.send(send(1, 0), handle, &[Span::of(rest)]);
        let completion = host.next_within(2 * QUIET);
        let event = match completion {
            Some(completion) => completion.event,
            None => {
                cancelled = true;
                host.ring.cancel_send(send(1, 0), handle);
                host.event_of(send(1, 0))
            }
        };
        match event {
            Event::Sent { bytes } => sent += bytes as usize,
            Event::SendFailed { errno } if cancelled => {
                assert_eq!(errno, libc::ECANCELED);
                return sent;
            }
            other => panic!("{other:?}"),
        }
    }
}

/// Reads what [`fill`] has sent.
fn read_filled(peer: &mut TcpStream, bytes: &[u8], mut left: usize) {
    let mut read = vec![0; bytes.len()];
    while left > 0 {
        let count = left.min(bytes.len());
        peer.read_exact(&mut read[..count]).unwrap();
        assert!(
            read[..count] == bytes[..count],
            "{left} bytes before the end"
        );
        left -= count;
    }
}

fn what_is_under_way_can_be_ended<R: Ring>(mut host: Host<R>) {
    if !kernel_has_tls() {
        return;
    }
    let (handle, mut peer) = sealed(&mut host, 1, Cipher::Aes128Gcm).unwrap();
    host.ring.receive(receive(1, 0), handle);
    host.assert_quiet();
    host.ring.cancel_receive(receive(1, 0), handle);
    let event = host.event_of(receive(1, 0));
    let ended = matches!(event, Event::ReceiveFailed { errno } if errno == libc::ECANCELED);
    assert!(ended, "{event:?}");
    let bytes: &'static [u8] = some_bytes(LARGE_BYTES).leak();
    let sent = fill(&mut host, handle, bytes);
    // The connection is whole.
    peer.write_all(b"still there").unwrap();
    host.ring.receive(receive(1, 0), handle);
    assert_eq!(host.receive_bytes(receive(1, 0), 11), b"still there");
    read_filled(&mut peer, bytes, sent);
}

fn a_farewell_waits_for_what_was_sent_before<R: Ring>(mut host: Host<R>) {
    if !kernel_has_tls() {
        return;
    }
    let (handle, mut peer) = sealed(&mut host, 1, Cipher::Aes128Gcm).unwrap();
    // SAFETY: the host keeps the descriptor open until its end.
    let ours = unsafe { BorrowedFd::borrow_raw(handle.fd) };
    let bytes: &'static [u8] = some_bytes(LARGE_BYTES).leak();
    let sent = fill(&mut host, handle, bytes);
    assert!(!farewell(ours).unwrap(), "the buffer is full");
    let reader = thread::spawn(move || {
        read_filled(&mut peer, bytes, sent);
        // The farewell, which is no data.
        let error = peer.read(&mut [0]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
    });
    let deadline = Instant::now() + PATIENCE;
    while !farewell(ours).unwrap() {
        assert!(Instant::now() < deadline, "never said");
        thread::sleep(Duration::from_millis(1));
    }
    host.ring.shutdown_write(handle);
    reader.join().unwrap();
}
