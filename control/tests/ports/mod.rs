//! Ports for servers that are told theirs: they bind it a while after it was chosen.

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::net::TcpListener;
use std::sync::Mutex;

/// Below those that the kernel gives to connections and to who asks for any port: until it is
/// bound nobody gets it by chance.
const FIRST: u16 = 15_000;
const COUNT: u64 = 17_000;

static GIVEN: Mutex<Option<HashSet<u16>>> = Mutex::new(None);

/// A port on loopback that nobody has now, and that no one else of this process gets.
pub(crate) fn free_port() -> u16 {
    let mut given = GIVEN.lock().unwrap();
    let given = given.get_or_insert_default();
    for turn in 0..10_000_u64 {
        let port = FIRST + (RandomState::new().hash_one(turn) % COUNT) as u16;
        if !given.contains(&port) && TcpListener::bind(("127.0.0.1", port)).is_ok() {
            given.insert(port);
            return port;
        }
    }
    panic!("no port from {FIRST} on is free");
}
