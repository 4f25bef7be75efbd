//! Which process of this machine listens on an address, so that its CPU time can be read.

use std::fs;
use std::net::{IpAddr, SocketAddr, UdpSocket};

/// The listening state in `/proc/net/tcp`.
const LISTEN: &str = "0A";

/// The process that listens on `address`, if it is one of this machine and may be looked at. Where
/// several share a port, as the cores of a router do, they are one process.
pub(crate) fn process_at(address: SocketAddr) -> Option<u32> {
    if !is_own(address.ip()) {
        return None;
    }
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(|file| fs::read_to_string(file).ok());
    let inodes: Vec<String> = tables
        .iter()
        .flatten()
        .flat_map(|table| listeners(table, address.port()))
        .collect();
    let links: Vec<String> = inodes
        .iter()
        .map(|inode| format!("socket:[{inode}]"))
        .collect();
    if links.is_empty() {
        return None;
    }
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let mut holders = pids.filter(|pid| holds(*pid, &links));
    // The service manager keeps the sockets that it hands over; all processes descend from it.
    match holders.next() {
        Some(1) => holders.next().or(Some(1)),
        found => found,
    }
}

/// Whether an address is this machine's: then a socket can be bound to it.
fn is_own(ip: IpAddr) -> bool {
    UdpSocket::bind((ip, 0)).is_ok()
}

/// Inodes of the sockets that listen on a port.
fn listeners(table: &str, port: u16) -> Vec<String> {
    let wanted = format!(":{port:04X}");
    let lines = table.lines().skip(1);
    let found = lines.filter_map(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let is_it = fields.get(1)?.ends_with(&wanted) && *fields.get(3)? == LISTEN;
        let inode = fields.get(9)?;
        (is_it && *inode != "0").then(|| (*inode).to_owned())
    });
    found.collect()
}

fn holds(pid: u32, links: &[String]) -> bool {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else {
        return false;
    };
    let mut targets = entries
        .flatten()
        .filter_map(|entry| fs::read_link(entry.path()).ok());
    targets.any(|target| links.iter().any(|link| target.as_os_str() == link.as_str()))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn our_own_listener_is_found() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        assert_eq!(process_at(address), Some(std::process::id()));
        drop(listener);
        // A child that another test has just started keeps all our files until it runs its program.
        let end = Instant::now() + Duration::from_secs(10);
        while process_at(address).is_some() {
            assert!(Instant::now() < end, "somebody listens still");
            thread::sleep(Duration::from_millis(1));
        }
        // An address of the documentation is nobody's.
        assert_eq!(
            process_at(SocketAddr::from(([192, 0, 2, 1], address.port()))),
            None
        );
    }

    #[test]
    fn tables_of_the_kernel_are_read() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt\n\
             0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 4711 1\n\
             1: 0100007F:1F90 0100007F:9999 01 00000000:00000000 00:00000000 00000000 0 0 4712 1\n\
             2: 0100007F:1F91 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 4713 1\n";
        assert_eq!(listeners(table, 8080), ["4711"]);
        assert!(listeners(table, 80).is_empty());
    }
}
