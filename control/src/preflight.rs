//! From the configuration and this host to the shards of this process: limits, and the ring and
//! the CPU of each. Opens nothing but the probe of io_uring.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;

use corelane_engine::config::{Idle, LiveSettings, RingKind, ShardConfig};
use corelane_engine::ends::HomeAddress;
use corelane_engine::placement::{self, Assignment, CpuQuota, Topology};
use corelane_engine::preflight as host;

use crate::cli::Stop;
use crate::config::{self, Config, Core};
use crate::env::Env;
use crate::steering::Placing;
use crate::tls;

/// Connections that a core is left with however few files this process may open.
const CONNECTIONS_MIN: u32 = 16;

/// A shard to start.
#[derive(Clone, Debug)]
pub struct Planned {
    /// What it is told.
    pub config: ShardConfig,
    /// Why it has this ring: one word for metrics ([`host::Cause::word`]).
    pub cause: &'static str,
    /// Whether epoll will not do in place of io_uring.
    pub required: bool,
    /// Whether it listens where no other does.
    pub alone: bool,
}

impl Planned {
    /// It listens at the address of all, unless it has one for itself, or listens nowhere.
    pub(crate) fn listen_at(&mut self, shared: SocketAddr) {
        if !self.alone {
            self.config.listen = self.config.listen.and(Some(shared));
        }
    }
}

/// Who runs where.
#[derive(Clone, Debug)]
pub struct Plan {
    /// CPU of the control core.
    pub control_cpu: usize,
    /// The shards, at least one, in the order of their CPUs.
    pub shards: Vec<Planned>,
    /// TLS of all of them.
    pub tls: config::Tls,
    /// How their responses travel.
    pub responses: config::Responses,
    /// Which core gets which connections.
    pub placing: Placing,
    /// A socket for the status server that listens already.
    pub status: Option<Arc<TcpListener>>,
}

impl Plan {
    /// The CPU of each shard, and whether it listens together with others, by index.
    pub fn members(&self) -> Vec<(usize, bool)> {
        let member = |shard: &Planned| (shard.config.cpu, !shard.alone);
        self.shards.iter().map(member).collect()
    }

    /// Whether the cores take connections from sockets that were handed over.
    pub fn is_handed(&self) -> bool {
        self.shards
            .iter()
            .any(|shard| shard.config.handed.is_some())
    }
}

/// Raises the limits of this process, looks at the host, and decides. What is not as it was asked
/// for is logged with its remedy. To be called once, before threads are made.
///
/// # Errors
/// [`Stop::HostCannot`] when io_uring is required and refused, or the kernel does not say which
/// CPUs this process may use.
pub fn plan(config: &Config) -> Result<Plan, Stop> {
    host::raise_limits();
    let report = host::probe();
    let mask = placement::affinity().map_err(|error| {
        Stop::HostCannot(format!(
            "cannot read which CPUs this process may use: {error}"
        ))
    })?;
    let wanted: Vec<usize> = config.cores.iter().map(|core| core.cpu).collect();
    let mut assigned = placement::assign(&wanted, config.control.placed(), &mask);
    let root = Path::new("/");
    let (quota, cpuset) = (CpuQuota::read(root), placement::cpuset(root));
    let topology = Topology::of_host();
    assigned.advise(&topology, quota, cpuset.as_deref());
    compare_nodes(config, &topology);
    for note in &assigned.notes {
        tracing::info!("placement: {note}");
    }
    tls::kernel::demanded(&config.server.tls).map_err(Stop::HostCannot)?;
    let shards = shards(config, &assigned, &report)?;
    log_rings(&shards, &report);
    let cpus: Vec<usize> = shards.iter().map(|shard| shard.config.cpu).collect();
    let placing = placing(config, &cpus);
    Ok(Plan {
        control_cpu: assigned.control,
        shards,
        tls: config.server.tls.clone(),
        responses: config.server.responses,
        placing,
        status: None,
    })
}

/// Says which cores take their memory from another node than that of their CPU.
fn compare_nodes(config: &Config, topology: &Topology) {
    for core in &config.cores {
        let own = topology.cpu(core.cpu).map(|cpu| cpu.node);
        if let (Some(node), Some(own)) = (core.numa_node, own)
            && own != node as usize
        {
            let cpu = core.cpu;
            tracing::warn!(cpu, node, own, "numa_node is another than that of the CPU");
        }
    }
}

fn shards(
    config: &Config,
    assigned: &Assignment,
    report: &host::Report,
) -> Result<Vec<Planned>, Stop> {
    let listen = SocketAddr::new(config.server.host, config.server.port);
    let mut shards = Vec::with_capacity(assigned.data.len());
    for (shard, cpu) in assigned.data.iter().copied().enumerate() {
        // A CPU that nobody named is configured like the first one that was.
        let named = config.cores.iter().find(|core| core.cpu == cpu);
        let Some(core) = named.or(config.cores.first()) else {
            continue;
        };
        let choice = host::choose(io(core.io), report)
            .map_err(|refused| Stop::HostCannot(refused.to_string()))?;
        let ring = choice.ring;
        let listen = core.listen.unwrap_or(listen);
        let mut told = shard_config(core, ShardConfig::new(shard, cpu, ring, Some(listen)));
        told.imbalance = config.server.imbalance;
        told.message_bytes_max = u64::from(config.server.message_bytes_max);
        told.relay_home = relay_home(config, shard);
        shards.push(Planned {
            config: told,
            cause: choice.cause.word(),
            required: core.io == config::Io::Uring,
            alone: core.listen.is_some(),
        });
    }
    fit_files(&mut shards, report);
    Ok(shards)
}

/// What steers connections to the shards on these CPUs, by their indices.
pub(crate) fn placing(config: &Config, cpus: &[usize]) -> Placing {
    let queue = |(index, cpu): (usize, &usize)| {
        let mut cores = config.cores.iter();
        let core = cores.find(|core| core.cpu == *cpu)?;
        Some((index, core.nic_queue.clone()?))
    };
    Placing {
        by: config.server.steering,
        queues: cpus.iter().enumerate().filter_map(queue).collect(),
    }
}

/// Where the workers of relayed routes call this shard home; each shard has a port of its own, as a
/// response belongs to the shard that has its request.
fn relay_home(config: &Config, shard: usize) -> Option<HomeAddress> {
    let relays = |route: &config::Route| route.response == config::Response::Relay;
    if !config.routes.iter().any(relays) {
        return None;
    }
    let port = match config.server.home_port {
        0 => 0,
        first => first.checked_add(u16::try_from(shard).ok()?).unwrap_or(0),
    };
    Some(HomeAddress {
        bind: SocketAddr::new(config.server.home_host, port),
        advertise: config.server.home_advertised(),
    })
}

fn io(io: config::Io) -> host::Io {
    match io {
        config::Io::Auto => host::Io::Auto,
        config::Io::Uring => host::Io::Uring,
        config::Io::Epoll => host::Io::Epoll,
    }
}

/// The engine's word for it.
pub(crate) fn idle(idle: config::Idle) -> Idle {
    match idle {
        config::Idle::Block => Idle::Block,
        config::Idle::Spin => Idle::Spin,
    }
}

fn shard_config(core: &Core, defaults: ShardConfig) -> ShardConfig {
    ShardConfig {
        idle: idle(core.idle),
        ring_depth: core.ring_depth,
        numa_node: core.numa_node,
        upstreams_max: core.upstreams_max,
        instances_max: core.instances_max,
        connections_max: core.connections_max,
        buffer_bytes: core.buffer_bytes,
        buffers: core.buffers,
        in_flight_max: core.in_flight_max,
        upstream_queue_bytes: core.upstream_queue_bytes,
        flight_records: core.flight_records,
        busy_poll_us: core.busy_poll_us,
        ..defaults
    }
}

/// What a core on this CPU may be told while it runs. One that nobody named is configured like the
/// first that was.
pub(crate) fn live(config: &Config, cpu: usize) -> Option<LiveSettings> {
    let named = config.cores.iter().find(|core| core.cpu == cpu);
    let core = named.or(config.cores.first())?;
    Some(LiveSettings {
        idle: idle(core.idle),
        connections_max: core.connections_max,
        in_flight_max: core.in_flight_max,
        upstream_queue_bytes: core.upstream_queue_bytes,
        message_bytes_max: config.server.message_bytes_max.into(),
        imbalance: config.server.imbalance,
        busy_poll_us: core.busy_poll_us,
    })
}

/// A table of connections that the limit of open files cannot fill would only hide that limit:
/// it is cut to what can be had, so that refusals are counted as such.
fn fit_files(shards: &mut [Planned], report: &host::Report) {
    let count = shards.len() as u64;
    let most = shards.iter().map(|shard| shard.config.connections_max);
    let most = u64::from(most.max().unwrap_or(0));
    let Some(finding) = report.too_few_files(most, count) else {
        return;
    };
    let can = report.files.soft.saturating_sub(host::FILES_RESERVED) / count.max(1);
    let can = u32::try_from(can).unwrap_or(u32::MAX).max(CONNECTIONS_MIN);
    for shard in shards {
        shard.config.connections_max = shard.config.connections_max.min(can);
    }
    tracing::warn!(
        connections_max = can,
        "{}. {}",
        finding.what,
        finding.remedy
    );
}

/// One line for each ring and cause, with the cores that it holds for.
fn log_rings(shards: &[Planned], report: &host::Report) {
    for (index, shard) in shards.iter().enumerate() {
        let same =
            |other: &&Planned| (other.config.ring, other.cause) == (shard.config.ring, shard.cause);
        if shards[..index].iter().any(|before| same(&before)) {
            continue;
        }
        let cpus: Vec<usize> = shards.iter().filter(same).map(|s| s.config.cpu).collect();
        let cpus = config::cpu_list(&cpus);
        let wish = match shard.config.ring {
            RingKind::Epoll if shard.cause == host::Cause::Configured.word() => host::Io::Epoll,
            _ => host::Io::Auto,
        };
        // The same question as before, so it cannot be refused now.
        let Ok(choice) = host::choose(wish, report) else {
            continue;
        };
        if choice.cause.remedy().is_empty() {
            tracing::info!(cpus, "ring {}", choice.explain);
        } else {
            tracing::warn!(cpus, "ring {}", choice.explain);
        }
    }
}

/// What `CORELANE_IO` wants, where no configuration says it.
///
/// # Errors
/// [`Stop::Usage`] for a word that it is not.
pub(crate) fn wanted_io(env: &Env) -> Result<host::Io, Stop> {
    match env.get("CORELANE_IO") {
        Some(text) => text
            .parse()
            .map_err(|error: host::UnknownIo| Stop::Usage(error.to_string())),
        None => Ok(host::Io::Auto),
    }
}

/// The ring that `CORELANE_IO` and this host allow.
///
/// # Errors
/// As [`wanted_io`]; [`Stop::HostCannot`] when io_uring is required and refused.
pub(crate) fn ring(env: &Env) -> Result<RingKind, Stop> {
    let choice = host::choose(wanted_io(env)?, &host::probe());
    let choice = choice.map_err(|refused| Stop::HostCannot(refused.to_string()))?;
    tracing::info!("ring {}", choice.explain);
    Ok(choice.ring)
}

/// The word of a ring in metrics and logs.
pub fn ring_word(ring: RingKind) -> &'static str {
    match ring {
        RingKind::Uring => "uring",
        RingKind::Epoll => "epoll",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(connections_max: u32) -> Planned {
        let mut config = ShardConfig::new(0, 0, RingKind::Epoll, None);
        config.connections_max = connections_max;
        Planned {
            config,
            cause: "configured",
            required: false,
            alone: false,
        }
    }

    fn report(files: u64) -> host::Report {
        let limit = |soft| host::Limit { soft, hard: soft };
        host::Report {
            io_uring: host::Cause::Usable,
            kernel: String::new(),
            files: limit(files),
            memlock_bytes: limit(u64::MAX),
        }
    }

    #[test]
    fn connections_are_cut_to_what_files_allow() {
        let mut shards = [planned(16_384), planned(100)];
        fit_files(&mut shards, &report(4_096));
        let of = |shard: &Planned| shard.config.connections_max;
        assert_eq!((of(&shards[0]), of(&shards[1])), ((4_096 - 256) / 2, 100));
        let mut plenty = [planned(16_384)];
        fit_files(&mut plenty, &report(1 << 20));
        assert_eq!(of(&plenty[0]), 16_384);
        let mut none = [planned(16_384)];
        fit_files(&mut none, &report(64));
        assert_eq!(of(&none[0]), CONNECTIONS_MIN);
    }
}
