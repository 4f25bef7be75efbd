//! What a service is made from, and why there is none.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use rustix::io::Errno;
use thiserror::Error;

use crate::backend::Backend;
use crate::backend::choice::Opened;
use crate::domain::DomainConfig;
use crate::lock::Profile;
use crate::paths;

/// One pool and its socket.
pub struct PoolConfig {
    /// Where it listens (`crate::paths` knows the usual names).
    pub path: PathBuf,
    /// The pool.
    pub domain: DomainConfig,
    /// Where its memory comes from.
    pub backend: Box<dyn Backend>,
    /// Pools with the same number are one GPU's and share a checkpoint (second generation).
    pub checkpoint_group: Option<u32>,
}

/// What a service is made from.
pub struct ServerConfig {
    /// The pools: any number of devices and tags.
    pub pools: Vec<PoolConfig>,
    /// Clients at a time, over all pools.
    pub connections_max: usize,
    /// Who may connect, by user; empty is the service's own user alone. Sockets have mode 0600, or
    /// 0666 where another user than root is named: the kernel says who connects.
    pub uids_allowed: Vec<u32>,
    /// How long a connection may be silent before its first frame.
    pub first_frame_timeout: Duration,
    /// How long a frame may take, in and out.
    pub frame_timeout: Duration,
    /// Bytes of unfinished frames and of answers that are not read, over all connections. Beyond
    /// that, who has owed longest is closed.
    pub held_bytes_max: usize,
    /// How long the service looks for events without sleeping after there was one; zero is not at
    /// all. It keeps its CPU busy meanwhile.
    pub spin: Duration,
}

impl ServerConfig {
    /// The defaults for these pools.
    pub fn new(pools: Vec<PoolConfig>) -> ServerConfig {
        ServerConfig {
            pools,
            connections_max: 4096,
            uids_allowed: Vec::new(),
            first_frame_timeout: Duration::from_secs(10),
            frame_timeout: Duration::from_secs(30),
            held_bytes_max: 256 << 20,
            spin: Duration::from_micros(50),
        }
    }
}

/// The usual pools of one device, under their usual names.
#[derive(Clone, Debug)]
pub struct DeviceConfig {
    /// The CUDA ordinal; names the second generation's sockets.
    pub ordinal: u32,
    /// Where the sockets lie.
    pub dir: PathBuf,
    /// The pools; upstream has `weights` and `kv_cache`.
    pub tags: Vec<String>,
    /// Which generations to speak, each on sockets and with memory of its own.
    pub profiles: Vec<Profile>,
    /// As [`DomainConfig::retry_interval`].
    pub retry_interval: Duration,
    /// As [`DomainConfig::retry_timeout`].
    pub retry_timeout: Option<Duration>,
}

impl DeviceConfig {
    /// Upstream's defaults for a device: both pools, the first generation.
    pub fn new(ordinal: u32) -> DeviceConfig {
        DeviceConfig {
            ordinal,
            dir: paths::socket_dir(),
            tags: vec!["weights".into(), "kv_cache".into()],
            profiles: vec![Profile::V1],
            retry_interval: Duration::from_millis(500),
            retry_timeout: Some(Duration::from_secs(60)),
        }
    }

    /// The pools, with memory from an opened backend.
    pub fn pools(&self, opened: &Opened) -> Vec<PoolConfig> {
        let server_nonce = uuid::Uuid::new_v4().to_string();
        let mut pools = Vec::new();
        for profile in &self.profiles {
            for tag in &self.tags {
                let domain = DomainConfig {
                    retry_interval: self.retry_interval,
                    retry_timeout: self.retry_timeout,
                    server_nonce: server_nonce.clone(),
                    ..DomainConfig::new(*profile, &opened.gpu_uuid, tag)
                };
                pools.push(PoolConfig {
                    path: match profile {
                        Profile::V1 => paths::d1(&self.dir, &opened.gpu_uuid, tag),
                        Profile::V2 => paths::d2(&self.dir, self.ordinal, tag),
                    },
                    domain,
                    backend: opened.backend(),
                    checkpoint_group: (*profile == Profile::V2).then_some(self.ordinal),
                });
            }
        }
        pools
    }
}

/// Why there is no service.
#[derive(Debug, Error)]
pub enum ServerError {
    /// Somebody answers on the socket.
    #[error("a service is already running on {}; stop it or choose another path", path.display())]
    AlreadyRunning {
        /// Where.
        path: PathBuf,
    },
    /// The path does not fit into a socket address.
    #[error(
        "{} has {bytes} bytes, but a socket's path may have 107; set {} to a shorter directory",
        path.display(),
        crate::paths::SOCKET_DIR_VARIABLE
    )]
    PathTooLong {
        /// Which.
        path: PathBuf,
        /// How long it is.
        bytes: usize,
    },
    /// The socket could not be bound.
    #[error("cannot listen on {}: {source}", path.display())]
    Bind {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel refused something else.
    #[error("{what} failed: {source}")]
    Os {
        /// What.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

impl ServerError {
    pub(super) fn os(what: &'static str) -> impl FnOnce(Errno) -> ServerError {
        move |errno| ServerError::Os {
            what,
            source: errno.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::choice::{BackendChoice, open};
    use crate::backend::host::HostConfig;

    #[test]
    fn a_device_has_upstreams_pools_and_names() {
        let opened = open(BackendChoice::Host, 1, HostConfig::default()).expect("memory");
        let profiles = vec![Profile::V1, Profile::V2];
        let config = DeviceConfig {
            dir: "/run".into(),
            profiles,
            ..DeviceConfig::new(1)
        };
        let pools = config.pools(&opened);
        let gpu = "GPU-00000000-0000-0000-0000-000000000001";
        let paths: Vec<_> = pools
            .iter()
            .map(|pool| pool.path.display().to_string())
            .collect();
        assert_eq!(
            paths,
            [
                format!("/run/gms_{gpu}_weights.sock"),
                format!("/run/gms_{gpu}_kv_cache.sock"),
                "/run/gms_1_weights.sock".into(),
                "/run/gms_1_kv_cache.sock".into(),
            ]
        );
        let groups: Vec<_> = pools.iter().map(|pool| pool.checkpoint_group).collect();
        assert_eq!(groups, [None, None, Some(1), Some(1)]);
        assert_eq!(pools[2].domain.server_nonce, pools[3].domain.server_nonce);
    }
}
