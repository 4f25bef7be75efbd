//! Clients come in: turned away, or read from at once.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::SocketFlags;

use super::connection::Connection;
use super::listener::peer_of;
use super::{Server, spare};
use crate::lock::ClientId;
use crate::stats::Counter;

impl Server {
    /// Takes in a new client of one pool; epoll says it again if there are more.
    pub(super) fn accept(&mut self, domain: usize) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        match rustix::net::accept_with(&self.listeners[domain].socket, flags) {
            Ok(socket) => self.admit(socket, domain),
            // Cleared memory has descriptors too, and so has what was made ahead. Epoll says again
            // that somebody is there.
            Err(Errno::MFILE | Errno::NFILE) if self.discarded.free_all() || self.unprepare() => {}
            Err(Errno::MFILE | Errno::NFILE) => {
                // Without this the client would wait in the backlog and epoll would spin.
                self.spare = None;
                drop(rustix::net::accept_with(
                    &self.listeners[domain].socket,
                    flags,
                ));
                self.spare = spare();
                self.count(domain, Counter::ConnectionsOverLimit);
                if self.may_complain() {
                    tracing::error!("no descriptor is left; a client was turned away");
                }
            }
            // It is gone again, or another signal than ours.
            Err(_) => {}
        }
    }

    fn admit(&mut self, socket: OwnedFd, domain: usize) {
        if self.connections.len() >= self.connections_max {
            self.count(domain, Counter::ConnectionsOverLimit);
            if self.may_complain() {
                let max = self.connections_max;
                tracing::warn!(max, "too many clients; one was turned away");
            }
            return;
        }
        let Ok(peer) = peer_of(&socket) else { return };
        if !self.uids_allowed.contains(&peer.uid) {
            self.count(domain, Counter::ConnectionsRefused);
            if self.may_complain() {
                let (uid, pid) = (peer.uid, peer.pid);
                tracing::warn!(uid, pid, "a user outside the allow-list");
            }
            return;
        }
        let id = self.next_id;
        self.next_id += 1;
        self.count(domain, Counter::Connections);
        self.connections.insert(id, Connection::new(socket, domain));
        self.domains[domain].connect(ClientId(id), peer);
        // Its first words are mostly there already; epoll hears of it when it has to be awaited.
        self.receive(id);
    }
}
