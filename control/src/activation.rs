//! Listening sockets that a service manager has made for this process and hands over
//! (`sd_listen_fds(3)`): it keeps them across a restart, so that callers wait in the kernel's queue
//! instead of being refused.
//!
//! | name (`FileDescriptorName=`) | what it is |
//! |---|---|
//! | `requests`, or none | the request plane: one socket for all cores, or one for each |
//! | `status` | the status server |
//!
//! Their addresses take the place of the configuration's. One socket is shared by all cores, and
//! the kernel wakes one of them for each connection. With as many as there are cores, all of the
//! same address (`ReusePort=yes`), each core has a queue of its own. Another number is a mistake: a
//! socket that no core accepts from would swallow its share of connections.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;

use corelane_engine::config::RingKind;
use listenfd::ListenFd;
use rustix::net::sockopt::socket_acceptconn;

use crate::cli::Stop;
use crate::config::Config;
use crate::env::Env;
use crate::preflight::Plan;

/// The name of sockets of the request plane.
const REQUESTS: &str = "requests";
/// The name of the status server's socket.
const STATUS: &str = "status";

/// What was handed over.
#[derive(Debug, Default)]
pub struct Handed {
    requests: Vec<Arc<TcpListener>>,
    status: Option<Arc<TcpListener>>,
}

impl Handed {
    /// Takes over what the environment speaks of. To be called once, before there are threads.
    ///
    /// # Errors
    /// [`Stop::Usage`]: a socket has an unknown name, is none, or does not listen.
    pub fn take(env: &Env) -> Result<Self, Stop> {
        let names: Vec<&str> = env.get("LISTEN_FDNAMES").unwrap_or("").split(':').collect();
        let mut sockets = ListenFd::from_env();
        let mut handed = Self::default();
        for index in 0..sockets.len() {
            let name = names.get(index).copied().unwrap_or("");
            let taken = sockets.take_tcp_listener(index).ok().flatten();
            let listens = |socket: &TcpListener| socket_acceptconn(socket).unwrap_or(false);
            let Some(socket) = taken.filter(listens) else {
                return Err(Stop::Usage(format!(
                    "the service manager hands over descriptor {} ({name:?}), which is no \
                     listening TCP socket; write ListenStream=ADDRESS:PORT in the socket unit",
                    3 + index
                )));
            };
            handed.sort_in(name, Arc::new(socket))?;
        }
        Ok(handed)
    }

    fn sort_in(&mut self, name: &str, socket: Arc<TcpListener>) -> Result<(), Stop> {
        match name {
            STATUS if self.status.is_none() => self.status = Some(socket),
            // systemd's name for a socket without one is its unit's; without a unit, `unknown`.
            REQUESTS | "" | "unknown" => self.requests.push(socket),
            name if name.ends_with(".socket") => self.requests.push(socket),
            name => {
                return Err(Stop::Usage(format!(
                    "the service manager hands over a socket named {name:?}; write \
                     FileDescriptorName=requests, or status for one of them"
                )));
            }
        }
        Ok(())
    }

    /// Puts the addresses of the sockets in the place of the configured ones.
    ///
    /// # Errors
    /// [`Stop::Usage`]: sockets of the request plane have more than one address.
    pub fn configure(&self, config: &mut Config) -> Result<(), Stop> {
        let mut addresses = self.requests.iter().map(|socket| address(socket));
        if let Some(first) = addresses.next() {
            if let Some(other) = addresses.find(|other| *other != first) {
                return Err(Stop::Usage(format!(
                    "the service manager hands over sockets for requests at {first} and at \
                     {other}; write one address, once or as often as there are data cores"
                )));
            }
            tracing::info!(address = %first, sockets = self.requests.len(), "sockets: handed over");
            (config.server.host, config.server.port) = (first.ip(), first.port());
        }
        if let Some(status) = &self.status {
            let address = address(status);
            tracing::info!(%address, "socket of the status server: handed over");
            config.server.status_host = address.ip();
            config.server.status_port = Some(address.port());
        }
        Ok(())
    }

    /// Gives the cores and the status server their sockets.
    ///
    /// # Errors
    /// [`Stop::Usage`]: there are neither one nor as many as cores.
    pub fn distribute(&self, plan: &mut Plan) -> Result<(), Stop> {
        plan.status.clone_from(&self.status);
        let (sockets, cores) = (self.requests.len(), plan.shards.len());
        if sockets == 0 {
            return Ok(());
        }
        if sockets != 1 && sockets != cores {
            return Err(Stop::Usage(format!(
                "the service manager hands over {sockets} sockets for the requests of {cores} data \
                 cores; write the ListenStream= line once, or {cores} times with ReusePort=yes"
            )));
        }
        let on_epoll = |ring| ring == RingKind::Epoll;
        let any_epoll = plan.shards.iter().any(|core| on_epoll(core.config.ring));
        for (index, core) in plan.shards.iter_mut().enumerate() {
            let socket = &self.requests[index % sockets];
            // The mode belongs to the socket, whoever shares it: epoll must not wait in accept.
            let nonblocking = match sockets {
                1 => any_epoll,
                _ => on_epoll(core.config.ring),
            };
            let set = socket.set_nonblocking(nonblocking);
            set.map_err(|error| Stop::Usage(format!("a socket that was handed over: {error}")))?;
            core.config.handed = Some(Arc::clone(socket));
            if std::mem::take(&mut core.alone) {
                let core = core.config.shard;
                tracing::warn!(
                    core,
                    "listen of its own does nothing: sockets are handed over"
                );
            }
        }
        Ok(())
    }
}

/// Where a socket listens; a listening TCP socket always has an address.
fn address(socket: &TcpListener) -> SocketAddr {
    let none = SocketAddr::from(([0, 0, 0, 0], 0));
    socket.local_addr().unwrap_or(none)
}

#[cfg(test)]
mod tests {
    use corelane_engine::config::ShardConfig;

    use super::*;
    use crate::preflight::Planned;

    fn socket() -> Arc<TcpListener> {
        Arc::new(TcpListener::bind("127.0.0.1:0").unwrap())
    }

    #[test]
    fn sockets_are_known_by_their_names() {
        let mut handed = Handed::default();
        for name in ["requests", "", "unknown", "corelane.socket", "status"] {
            handed.sort_in(name, socket()).unwrap();
        }
        assert_eq!(handed.requests.len(), 4);
        assert!(handed.status.is_some());
        for wrong in ["metrics", "Requests"] {
            let told = handed.sort_in(wrong, socket()).unwrap_err().to_string();
            assert!(told.contains("FileDescriptorName=requests"), "{told}");
        }
        assert!(handed.sort_in("status", socket()).is_err(), "there is one");
    }

    #[test]
    fn nothing_is_taken_where_nothing_is_handed_over() {
        let handed = Handed::take(&Env::default()).unwrap();
        assert!(handed.requests.is_empty() && handed.status.is_none());
    }

    fn plan(cores: usize) -> Plan {
        let core = |shard| Planned {
            config: ShardConfig::new(shard, shard, RingKind::Epoll, None),
            cause: "configured",
            required: false,
            alone: false,
        };
        Plan {
            control_cpu: 0,
            shards: (0..cores).map(core).collect(),
            tls: Default::default(),
            responses: Default::default(),
            placing: Default::default(),
            status: None,
        }
    }

    #[test]
    fn cores_share_one_socket_or_have_one_each() {
        for (sockets, cores, works) in [
            (0, 2, true),
            (1, 1, true),
            (1, 3, true),
            (3, 3, true),
            (2, 3, false),
            (3, 1, false),
        ] {
            let mut handed = Handed::default();
            for _ in 0..sockets {
                handed.sort_in("requests", socket()).unwrap();
            }
            let mut plan = plan(cores);
            assert_eq!(
                handed.distribute(&mut plan).is_ok(),
                works,
                "{sockets} for {cores}"
            );
            if !works {
                continue;
            }
            assert_eq!(plan.is_handed(), sockets > 0);
            for (index, core) in plan.shards.iter().enumerate() {
                let got = core
                    .config
                    .handed
                    .as_ref()
                    .map(|socket| socket.local_addr().unwrap());
                let wanted = handed.requests.get(index % sockets.max(1));
                assert_eq!(got, wanted.map(|socket| socket.local_addr().unwrap()));
            }
        }
    }
}
