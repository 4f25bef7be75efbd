//! What others show when they are asked: etcd's clock, and workers that hold small answers back.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use corelane_codec::{Decoded, reply_frame, request_frame};
use jiff::fmt::rfc2822::DateTimeParser;
use rustix::net::sockopt::set_tcp_quickack;
use rustls::pki_types::ServerName;
use rustls::{ClientConnection, StreamOwned};

use super::{Finding, Outcome, Sight, Weight};
use crate::discovery::EtcdAuth;
use crate::tls::material::client_of_text;

/// Peers that are asked at most, of each kind.
const PEERS_MAX: usize = 16;
/// Skew that is told, and skew with which certificates and tokens are refused, in seconds.
const SKEW: f64 = 1.0;
const SKEW_LARGE: f64 = 30.0;
/// Longest head of an answer.
const HEAD_BYTES_MAX: usize = 16 << 10;

/// What an etcd server shows.
struct Clock {
    /// Its clock less ours lies between these, in seconds: its answer has whole seconds.
    skew: (f64, f64),
    round_trip: Duration,
}

/// Why there is no clock.
enum NoClock {
    /// It cannot be reached.
    Away(String),
    /// It answers, but not so.
    Mute(String),
}

/// Whether etcd is there, and its clock is ours.
pub(super) fn etcd(sight: &Sight) -> Outcome {
    let Some((endpoints, auth)) = &sight.wish.etcd else {
        return Outcome::Well("not used: discovery is elsewhere".into());
    };
    let patience = sight.wish.patience / 2;
    let endpoints = endpoints.iter().take(PEERS_MAX).cloned();
    let ask = |endpoint: String| {
        let clock = clock(&endpoint, auth, patience);
        (endpoint, clock)
    };
    let asked = side_by_side(endpoints.collect(), ask);
    let away = |clock: &Result<Clock, NoClock>| matches!(clock, Err(NoClock::Away(_)));
    let all_away = asked.iter().all(|(_, clock)| away(clock));
    let mut findings = Vec::new();
    let (mut well, mut mute) = (Vec::new(), Vec::new());
    for (endpoint, clock) in &asked {
        match clock {
            Ok(clock) => match skewed(endpoint, clock) {
                Some(finding) => findings.push(finding),
                None => well.push(format!(
                    "{endpoint} answers in {:.1} ms, its clock is within {:.0} s of ours",
                    clock.round_trip.as_secs_f64() * 1e3,
                    clock.skew.0.abs().max(clock.skew.1.abs()).ceil()
                )),
            },
            Err(NoClock::Away(why)) => findings.push(unreachable(endpoint, why, all_away)),
            Err(NoClock::Mute(why)) => mute.push(format!("{endpoint}: {why}")),
        }
    }
    match findings.is_empty() && well.is_empty() {
        true => Outcome::Unseen(mute.join("; ")),
        false => Outcome::of(findings, || well.join("; ")),
    }
}

/// Does all of them at once; in the same order.
fn side_by_side<A: Send, B: Send>(all: Vec<A>, one: impl Fn(A) -> B + Sync) -> Vec<B> {
    let one = &one;
    thread::scope(|scope| {
        let spawned: Vec<_> = all
            .into_iter()
            .map(|each| scope.spawn(move || one(each)))
            .collect();
        // Who has panicked has told why.
        let joined = spawned.into_iter().map(thread::ScopedJoinHandle::join);
        joined.filter_map(Result::ok).collect()
    })
}

fn skewed(endpoint: &str, clock: &Clock) -> Option<Finding> {
    let (low, high) = clock.skew;
    // What it is at least, whichever second of its answer it was.
    let (least, way) = match (low > 0.0, high < 0.0) {
        (true, _) => (low, "ahead of"),
        (_, true) => (-high, "behind"),
        _ => return None,
    };
    if least < SKEW {
        return None;
    }
    let weight = if least >= SKEW_LARGE {
        Weight::Fault
    } else {
        Weight::Cost
    };
    let what = format!("the clock of etcd at {endpoint} is {least:.0} s {way} ours, or more");
    Some(
        Finding::new(weight, what)
            .seen(
                format!(
                    "its clock less ours: {low:.1} to {high:.1} s, in a round trip of {:.1} ms",
                    clock.round_trip.as_secs_f64() * 1e3
                ),
                format!("Date of GET {endpoint}/version"),
            )
            .because(
                "One of the two does not follow its time server. Certificates and tokens are \
                 refused as expired or not yet valid, and logs, spans and request traces of the \
                 hosts do not fit together.",
            )
            .remedy(
                "On both hosts `timedatectl` (or `chronyc tracking`) shows which; then \
                 `systemctl enable --now chrony`, or `chronyc makestep` where it runs.",
            ),
    )
}

fn unreachable(endpoint: &str, why: &str, all: bool) -> Finding {
    let weight = if all { Weight::Fault } else { Weight::Cost };
    Finding::new(weight, format!("etcd at {endpoint} cannot be reached"))
        .seen(why, endpoint)
        .because(match all {
            true => {
                "Without etcd `corelane serve` does not start; one that runs keeps its last \
                     known directory."
            }
            false => "The others serve, and this one is missing when one of them ends.",
        })
        .remedy(
            "Look whether etcd runs there (`etcdctl endpoint health`), whether the name and the \
             port are right, and whether a firewall is between.",
        )
}

/// Asks etcd's HTTP side for its version; the answer has its time.
fn clock(endpoint: &str, auth: &EtcdAuth, patience: Duration) -> Result<Clock, NoClock> {
    let (host, address, secure) = split(endpoint);
    let away = |error: std::io::Error| NoClock::Away(error.to_string());
    let found = address.to_socket_addrs().map_err(away)?.next();
    let found = found.ok_or_else(|| NoClock::Away("the name has no address".into()))?;
    let mut stream = TcpStream::connect_timeout(&found, patience).map_err(away)?;
    let limits = stream.set_read_timeout(Some(patience));
    limits
        .and_then(|()| stream.set_write_timeout(Some(patience)))
        .map_err(away)?;
    match (secure, auth) {
        (false, _) => date(&mut stream, &host),
        (
            true,
            EtcdAuth::Tls {
                authority_pem,
                identity_pem,
            },
        ) => {
            let identity = identity_pem.as_ref().map(|(cert, key)| (&**cert, &**key));
            let config = client_of_text(authority_pem, identity)
                .map_err(|error| NoClock::Mute(error.to_string()))?;
            let name = ServerName::try_from(host.clone())
                .map_err(|_| NoClock::Mute(format!("{host} is no name to check")))?;
            let tls = ClientConnection::new(Arc::clone(&config), name)
                .map_err(|error| NoClock::Mute(error.to_string()))?;
            let mut stream = StreamOwned::new(tls, stream);
            // The handshake is no part of the round trip.
            while stream.conn.is_handshaking() {
                let done = stream.conn.complete_io(&mut stream.sock);
                done.map_err(|error| NoClock::Mute(format!("no TLS with it: {error}")))?;
            }
            date(&mut stream, &host)
        }
        (true, _) => Err(NoClock::Mute(
            "it speaks TLS, and [discovery] has no ca to check it with".into(),
        )),
    }
}

/// Host, `host:port`, and whether TLS is spoken.
fn split(endpoint: &str) -> (String, String, bool) {
    let secure = endpoint.starts_with("https://");
    let rest = endpoint
        .split_once("://")
        .map_or(endpoint, |(_, rest)| rest);
    let rest = rest.split('/').next().unwrap_or(rest);
    let port = rest
        .rsplit_once(':')
        .is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    let address = match port {
        true => rest.to_owned(),
        false => format!("{rest}:2379"),
    };
    let host = address.rsplit_once(':').map_or(rest, |(host, _)| host);
    let host = host.trim_matches(['[', ']']).to_owned();
    (host, address, secure)
}

fn date(stream: &mut (impl Read + Write), host: &str) -> Result<Clock, NoClock> {
    let mute = |error: std::io::Error| NoClock::Mute(format!("no answer to HTTP: {error}"));
    let request = format!("GET /version HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    let (began, sent) = (Instant::now(), seconds());
    stream.write_all(request.as_bytes()).map_err(mute)?;
    let mut head = Vec::new();
    let mut chunk = [0; 1024];
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        let read = stream.read(&mut chunk).map_err(mute)?;
        if read == 0 || head.len() > HEAD_BYTES_MAX {
            return Err(NoClock::Mute("no answer to HTTP on this port".into()));
        }
        head.extend_from_slice(&chunk[..read]);
    }
    let (received, round_trip) = (seconds(), began.elapsed());
    let head = String::from_utf8_lossy(&head);
    let value = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("date").then(|| value.trim())
    });
    let parser = DateTimeParser::new().relaxed_weekday(true);
    let stamp = value.and_then(|value| parser.parse_timestamp(value).ok());
    let stamp = stamp.ok_or_else(|| NoClock::Mute("its answer has no date".into()))?;
    let theirs = stamp.as_second() as f64;
    // It was written between the two, at some time of that second.
    let skew = (theirs - received, theirs + 1.0 - sent);
    Ok(Clock { skew, round_trip })
}

/// Our clock, since 1970.
fn seconds() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap_or_default().as_secs_f64()
}

/// Frames that are sent at once, and rounds of it.
const FRAMES: usize = 6;
const ROUNDS: usize = 7;
/// A pause between the first answer and the last that is no chance; delayed acknowledgements of
/// Linux take 40 ms.
const STALL: Duration = Duration::from_millis(20);

/// An endpoint that no worker has: it refuses, and does nothing else.
const PROBE: &[u8] = b"0/corelane/doctor/probe";

/// The middle pause between first and last answer: while our kernel delays its acknowledgements,
/// and while it does not.
struct Pauses {
    delayed: Duration,
    at_once: Duration,
}

/// Workers that leave Nagle's algorithm on: an answer waits for our kernel's acknowledgement of
/// the one before (`spec/request-plane.md` §14.1).
pub(super) fn nagle(sight: &Sight) -> Outcome {
    if sight.wish.peers.is_empty() {
        return Outcome::Unseen("no worker to ask: name one with --peer IP:PORT".into());
    }
    let patience = sight.wish.patience / 4;
    let peers: Vec<SocketAddr> = sight.wish.peers.iter().copied().take(PEERS_MAX).collect();
    let count = peers.len();
    let asked = side_by_side(peers, |peer| (peer, pauses(peer, patience)));
    let mut findings = Vec::new();
    let mut failed = Vec::new();
    for (peer, pauses) in asked {
        match pauses {
            Err(error) => failed.push(format!("{peer}: {error}")),
            Ok(pauses) if stalls(&pauses) => findings.push(stalling(peer, &pauses)),
            Ok(_) => {}
        }
    }
    if findings.is_empty() && failed.len() == count {
        return Outcome::Unseen(failed.join("; "));
    }
    Outcome::of(findings, || match failed.is_empty() {
        true => format!("{count} asked, none holds answers back"),
        false => format!(
            "none asked holds answers back; not seen: {}",
            failed.join("; ")
        ),
    })
}

fn stalls(pauses: &Pauses) -> bool {
    pauses.delayed >= STALL && pauses.at_once * 2 < pauses.delayed
}

fn stalling(peer: SocketAddr, pauses: &Pauses) -> Finding {
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let what = format!("the worker at {peer} holds answers back (Nagle's algorithm)");
    Finding::new(Weight::Cost, what)
        .seen(
            format!(
                "{FRAMES} requests at once: {:.1} ms from the first answer to the last, {:.1} ms \
                 while our kernel acknowledges at once",
                ms(pauses.delayed),
                ms(pauses.at_once)
            ),
            format!("measured at {peer}, middle of {ROUNDS}"),
        )
        .because(
            "It does not set TCP_NODELAY: a small answer waits until the one before is \
             acknowledged, and this kernel delays that by 40 ms. Stock Dynamo workers do so.",
        )
        .remedy(format!(
            "`ack = \"on_forward\"` in the route answers callers before the worker does; or have \
             this kernel acknowledge at once: `ip route change ROUTE quickack 1`, with ROUTE from \
             `ip route get {}`.",
            peer.ip()
        ))
}

/// Asks a worker some times for an endpoint that it does not have.
fn pauses(peer: SocketAddr, patience: Duration) -> std::io::Result<Pauses> {
    let mut stream = TcpStream::connect_timeout(&peer, patience)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))?;
    let delayed = median(&mut stream, false)?;
    let at_once = match delayed >= STALL {
        true => median(&mut stream, true)?,
        false => delayed,
    };
    Ok(Pauses { delayed, at_once })
}

fn median(stream: &mut TcpStream, at_once: bool) -> std::io::Result<Duration> {
    let mut pauses = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        pauses.push(round(stream, at_once)?);
    }
    pauses.sort_unstable();
    Ok(pauses[ROUNDS / 2])
}

/// Sends some frames at once, and answers the time from the first answer to the last.
fn round(stream: &mut TcpStream, at_once: bool) -> std::io::Result<Duration> {
    let mut frame = Vec::new();
    // Its parts are constants of ours, far below every limit.
    if request_frame::write_frame(PROBE, b"{}", b"", &mut frame).is_err() {
        return Err(std::io::ErrorKind::InvalidInput.into());
    }
    // The kernel takes this as a hint for the next acknowledgements only.
    set_tcp_quickack(&*stream, at_once)?;
    stream.write_all(&frame.repeat(FRAMES))?;
    let mut bytes = Vec::new();
    let (mut answers, mut first) = (0, None);
    while answers < FRAMES {
        let mut chunk = [0; 4096];
        let read = stream.read(&mut chunk)?;
        if read == 0 {
            return Err(std::io::Error::other(
                "it closed the connection: no worker, or one that speaks TLS",
            ));
        }
        first.get_or_insert_with(Instant::now);
        set_tcp_quickack(&*stream, at_once)?;
        bytes.extend_from_slice(&chunk[..read]);
        while let Some(end) = answer(&bytes)? {
            bytes.drain(..end);
            answers += 1;
        }
    }
    Ok(first.map_or(Duration::ZERO, |first: Instant| first.elapsed()))
}

/// Where the first answer ends, if it is there.
fn answer(bytes: &[u8]) -> std::io::Result<Option<usize>> {
    const TEXT_BYTES_MAX: u64 = 64 << 10;
    match reply_frame::decode(bytes, TEXT_BYTES_MAX) {
        Decoded::Frame(text) => Ok(Some(text.end)),
        Decoded::Need(_) => Ok(None),
        Decoded::Bad(_) => Err(std::io::Error::other("its answer is no worker's")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_split_as_they_are_written() {
        let parts = |endpoint| {
            let (host, address, secure) = split(endpoint);
            format!("{host} {address} {secure}")
        };
        assert_eq!(parts("http://a:1"), "a a:1 false");
        assert_eq!(parts("https://a.b/"), "a.b a.b:2379 true");
        assert_eq!(parts("a:7"), "a a:7 false");
        assert_eq!(parts("http://[::1]:9/x"), "::1 [::1]:9 false");
    }

    #[test]
    fn a_clock_is_judged_by_what_is_certain() {
        let clock = |low, high| Clock {
            skew: (low, high),
            round_trip: Duration::ZERO,
        };
        let found = |low, high| skewed("e", &clock(low, high)).map(|found| found.weight);
        assert_eq!(found(-0.4, 0.7), None);
        assert_eq!(found(0.6, 1.7), None);
        assert_eq!(found(1.5, 2.6), Some(Weight::Cost));
        assert_eq!(found(-2.6, -1.5), Some(Weight::Cost));
        assert_eq!(found(-90.0, -80.0), Some(Weight::Fault));
        let what = skewed("e", &clock(-90.0, -80.0)).unwrap().what;
        assert!(what.contains("80 s behind ours"), "{what}");
    }

    #[test]
    fn the_time_of_an_answer_is_read() {
        struct Canned(std::io::Cursor<Vec<u8>>);
        impl Read for Canned {
            fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
                self.0.read(into)
            }
        }
        impl Write for Canned {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                Ok(bytes.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let ask = |text: &str| {
            let text = text.replace('\n', "\r\n");
            date(&mut Canned(std::io::Cursor::new(text.into())), "x")
        };
        let old = ask("HTTP/1.1 200 OK\ndate: Sun, 06 Nov 1994 08:49:37 GMT\n\n{}");
        assert!(old.is_ok_and(|clock| clock.skew.1 < -1e8));
        for mute in [
            "",
            "HTTP/1.1 200 OK\n\n",
            "HTTP/1.1 200 OK\nDate: today\n\n",
        ] {
            assert!(matches!(ask(mute), Err(NoClock::Mute(_))), "{mute:?}");
        }
    }
}
