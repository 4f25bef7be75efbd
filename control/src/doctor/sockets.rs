//! What the kernel's table of TCP sockets shows: ports that run out, and proxies that take our
//! connections.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::host::remedy;
use super::{Finding, Outcome, Sight, Weight};

const TABLES: [&str; 2] = ["/proc/net/tcp", "/proc/net/tcp6"];
/// Lines of a table that are read; a host with more has a problem that shows in the first ones.
const LINES_MAX: usize = 500_000;
/// Part of the ports towards one address that may be used, in percent: at this, and at that.
const PORTS_MANY: usize = 50;
const PORTS_OUT: usize = 85;

/// States of the table.
const TIME_WAIT: u8 = 0x06;
const LISTEN: u8 = 0x0A;

/// A socket of the table.
struct Socket {
    local: SocketAddr,
    remote: SocketAddr,
    state: u8,
}

/// The sockets of this network namespace. None: the table cannot be read.
fn sockets(sight: &Sight) -> Option<Vec<Socket>> {
    let mut sockets = Vec::new();
    let mut readable = false;
    for table in TABLES {
        let Ok(file) = File::open(sight.view.path(table)) else {
            continue;
        };
        readable = true;
        let lines = BufReader::new(file).lines().skip(1).take(LINES_MAX);
        let lines = lines.map_while(Result::ok);
        sockets.extend(lines.filter_map(|line| socket(&line)));
    }
    readable.then_some(sockets)
}

/// `0: 0100007F:1F90 00000000:0000 0A ...`: number, local, remote, state, all hexadecimal.
fn socket(line: &str) -> Option<Socket> {
    let mut words = line.split_whitespace().skip(1);
    Some(Socket {
        local: address(words.next()?)?,
        remote: address(words.next()?)?,
        state: u8::from_str_radix(words.next()?, 16).ok()?,
    })
}

/// An address as the kernel writes it: 32-bit words of the host's byte order.
fn address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |at: usize| -> Option<[u8; 4]> {
        let word = u32::from_str_radix(ip.get(at * 8..at * 8 + 8)?, 16).ok()?;
        Some(word.to_ne_bytes())
    };
    let ip = match ip.len() {
        8 => IpAddr::V4(Ipv4Addr::from(word(0)?)),
        32 => {
            let words = [word(0)?, word(1)?, word(2)?, word(3)?];
            let bytes: [u8; 16] = words.concat().try_into().ok()?;
            // IPv4 on a socket of both is the same port.
            IpAddr::V6(Ipv6Addr::from(bytes)).to_canonical()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

/// Ports towards one address that are used up.
pub(super) fn ports(sight: &Sight) -> Outcome {
    const RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";
    let range = sight.view.read(RANGE).unwrap_or_default();
    let ends: Vec<u16> = (range.split_whitespace())
        .filter_map(|word| word.parse().ok())
        .collect();
    let [first, last] = ends[..] else {
        return Outcome::Unseen(format!("{RANGE} cannot be read"));
    };
    let Some(sockets) = sockets(sight) else {
        return Outcome::Unseen("/proc/net/tcp cannot be read".into());
    };
    // Each pair of our address and theirs has all ports of the range.
    let mut towards: BTreeMap<(IpAddr, SocketAddr), (usize, usize)> = BTreeMap::new();
    let dialled =
        |socket: &&Socket| socket.state != LISTEN && (first..=last).contains(&socket.local.port());
    for socket in sockets.iter().filter(dialled) {
        let counts = towards.entry((socket.local.ip(), socket.remote));
        let (used, waiting) = counts.or_default();
        *used += 1;
        *waiting += usize::from(socket.state == TIME_WAIT);
    }
    let all = usize::from(last.saturating_sub(first)) + 1;
    let Some(((_, remote), (used, waiting))) =
        towards.into_iter().max_by_key(|(_, (used, _))| *used)
    else {
        return Outcome::Well(format!("none of {all} used"));
    };
    let percent = used * 100 / all;
    let weight = match percent {
        PORTS_OUT.. => Weight::Fault,
        PORTS_MANY.. => Weight::Cost,
        _ => return Outcome::Well(format!("at most {used} of {all} towards one address")),
    };
    let settings = ["net.ipv4.ip_local_port_range", "net.ipv4.tcp_tw_reuse"];
    let wrong: Vec<_> = settings
        .iter()
        .filter_map(|name| sight.wrong(name))
        .collect();
    let fix = match wrong.is_empty() {
        false => remedy(&wrong),
        true => "Spread the load over more addresses of that peer; between corelane processes \
                 responses share connections, and relayed routes keep one for each worker and \
                 core."
            .to_owned(),
    };
    Outcome::one(
        Finding::new(
            weight,
            format!("{percent} % of the ports towards {remote} are used"),
        )
        .seen(
            format!("{used} of {all} ports towards {remote}, {waiting} of them in TIME_WAIT"),
            TABLES[0],
        )
        .seen(format!("ip_local_port_range: {first} {last}"), RANGE)
        .because(
            "Each direct response is a connection of its own, whose port rests for a minute after \
             its end. When none is left connecting fails with EADDRNOTAVAIL.",
        )
        .remedy(fix),
    )
}

/// Proxies of service meshes, by the ports that they listen on: name, ports, how to stay out.
const SIDECARS: [(&str, [u16; 2], &str); 2] = [
    (
        "Istio's Envoy",
        [15_001, 15_006],
        "Annotate the pod with `sidecar.istio.io/inject: \"false\"`, or leave corelane's and the \
         workers' ports out with `traffic.sidecar.istio.io/excludeInboundPorts` and \
         `excludeOutboundPorts`.",
    ),
    (
        "Linkerd's proxy",
        [4_140, 4_143],
        "Annotate the pod with `linkerd.io/inject: disabled`, or leave corelane's and the workers' \
         ports out with `config.linkerd.io/skip-inbound-ports` and `skip-outbound-ports`.",
    ),
];

/// Transparent proxies beside us.
pub(super) fn sidecar(sight: &Sight) -> Outcome {
    let Some(sockets) = sockets(sight) else {
        return Outcome::Unseen("/proc/net/tcp cannot be read".into());
    };
    let listens = |port: u16| {
        let mut listening = sockets.iter().filter(|socket| socket.state == LISTEN);
        listening.any(|socket| socket.local.port() == port)
    };
    let found = SIDECARS
        .iter()
        .filter(|(_, ports, _)| ports.iter().all(|port| listens(*port)));
    let findings: Vec<Finding> = found
        .map(|(name, [out, into], fix)| {
            Finding::new(Weight::Cost, format!("{name} is in the way of connections"))
                .seen(
                    format!("ports {out} (outbound) and {into} (inbound) are listened on"),
                    TABLES[0],
                )
                .because(
                    "Rules of the network namespace send connections through a proxy, each request \
                 twice through user space, and it parses what is not HTTP.",
                )
                .remedy(*fix)
        })
        .collect();
    Outcome::of(findings, || {
        "no ports of Istio's or Linkerd's; other proxies are not known".into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_the_kernel_writes_them() {
        let here = u32::from_ne_bytes([127, 0, 0, 1]);
        let v4 = format!("{here:08X}:1F90");
        assert_eq!(address(&v4).unwrap().to_string(), "127.0.0.1:8080");
        let mapped = u32::from_ne_bytes([0, 0, 0xff, 0xff]);
        let v6 = format!("0000000000000000{mapped:08X}{here:08X}:0001");
        assert_eq!(address(&v6).unwrap().to_string(), "127.0.0.1:1");
        for wrong in ["", "0100007F", "0100007F:XX", "0100007:1", "0100007Z:1"] {
            assert!(address(wrong).is_none(), "{wrong}");
        }
    }
}
