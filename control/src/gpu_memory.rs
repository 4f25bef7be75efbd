//! The GPU memory service in this process: its pools, its thread on the control core, its end.
//!
//! The service has an event loop of its own (`corelane_gpu_mem::server`) on a thread that begins
//! on the CPU of its starter, the control core's: a handover between engines does not wait for
//! etcd, a scrape, or a request.

use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use corelane_gpu_mem::backend::choice::{self, BackendChoice, Opened};
use corelane_gpu_mem::backend::host::HostConfig;
use corelane_gpu_mem::lock::Profile;
use corelane_gpu_mem::server::{
    DeviceConfig, PoolConfig, PoolGauges, Server, ServerConfig, ServerError, ServerHandle,
};
use tokio::sync::watch;
use tokio::time::timeout;

use crate::cli::Stop;
use crate::config::{DurableLayout, Generation, Gpu, GpuBackend};

/// Longest wait for the end of the service; only a call of the GPU's driver can take that long.
const STOP_MAX: Duration = Duration::from_secs(5);
/// The same when the process is ending at once.
const LEAVE_MAX: Duration = Duration::from_millis(500);

/// Names that take the place of the usual ones.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Names {
    /// Of the one socket that there is.
    pub socket_path: Option<PathBuf>,
    /// Of the one device that there is, as clients know it.
    pub gpu_uuid: Option<String>,
}

/// A running service. Dropping it ends the service.
pub struct GpuMemory {
    handle: ServerHandle,
    ended: watch::Receiver<bool>,
}

impl GpuMemory {
    /// Opens the devices, binds the sockets and serves on a thread of its own.
    ///
    /// # Errors
    /// [`Stop::HostCannot`] where the GPU's memory is demanded and cannot be had, [`Stop::Usage`]
    /// for names that do not fit, and whatever keeps a socket from being bound.
    pub fn start(gpu: &Gpu, names: &Names) -> Result<Self> {
        let server = Server::bind(server_config(gpu, names)?).map_err(refused)?;
        let handle = server.handle();
        let (ending, ended) = watch::channel(false);
        thread::Builder::new()
            .name("gpu-mem".into())
            .spawn(move || {
                server.run();
                ending.send_replace(true);
            })
            .context("cannot start the thread of the GPU memory service")?;
        Ok(Self { handle, ended })
    }

    /// How the pools stand, in the order of devices, generations and tags.
    pub fn pools(&self) -> &[PoolGauges] {
        self.handle.pools()
    }

    /// Whether it serves.
    pub fn is_running(&self) -> bool {
        !self.has_ended()
    }

    fn has_ended(&self) -> bool {
        // A thread that panicked has dropped its end without a word.
        *self.ended.borrow() || self.ended.has_changed().is_err()
    }

    /// Waits until it has ended, for whatever reason.
    pub async fn ended(&self) {
        let _ = self.ended.clone().wait_for(|ended| *ended).await;
    }

    /// Tells waiting clients, closes all sessions, gives up the memory and removes the sockets.
    pub async fn stop(&self) {
        self.tell();
        if timeout(STOP_MAX, self.ended()).await.is_err() {
            tracing::warn!("the GPU memory service has not stopped after {STOP_MAX:?}");
        }
    }

    fn tell(&self) {
        // The handle's own `stop` waits for a thread of its own, of which there is none here.
        self.handle.tell_to_stop();
    }
}

impl Drop for GpuMemory {
    fn drop(&mut self) {
        self.tell();
        let deadline = Instant::now() + LEAVE_MAX;
        while !self.has_ended() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

fn server_config(gpu: &Gpu, names: &Names) -> Result<ServerConfig> {
    let mut pools = Vec::new();
    for (device, opened) in open(gpu)? {
        pools.extend(device_pools(gpu, device, opened, names));
    }
    if let Some(path) = &names.socket_path {
        let [pool] = pools.as_mut_slice() else {
            let text = format!(
                "--socket-path names one socket, but there would be {}; choose one --device, \
                 --tag and --generation",
                pools.len()
            );
            return Err(Stop::Usage(text).into());
        };
        pool.path.clone_from(path);
    }
    Ok(ServerConfig {
        connections_max: gpu.connections_max as usize,
        uids_allowed: gpu.uids.clone(),
        spin: Duration::from_micros(gpu.spin_us.into()),
        ..ServerConfig::new(pools)
    })
}

/// Opens all devices: all on GPUs, or all on host memory.
fn open(gpu: &Gpu) -> Result<Vec<(u32, Opened)>, Stop> {
    let choice = match gpu.backend {
        GpuBackend::Auto => BackendChoice::Auto,
        GpuBackend::Host => BackendChoice::Host,
        GpuBackend::Cuda => BackendChoice::Cuda,
    };
    let host = HostConfig {
        capacity_bytes: gpu.capacity_bytes,
        populate_bytes_max: gpu.populate_bytes_max,
        ..HostConfig::default()
    };
    let mut opened = Vec::new();
    for &device in &gpu.devices {
        let one = choice::open(choice, device, host)
            .map_err(|error| Stop::HostCannot(format!("GPU memory of device {device}: {error}")))?;
        opened.push((device, one));
    }
    let fallback = opened
        .iter()
        .find_map(|(device, one)| Some((device, one.fallback.as_ref()?)));
    if let Some((device, why)) = fallback {
        if opened.iter().any(|(_, one)| one.fallback.is_none()) {
            let text = format!(
                "device {device} has no GPU memory ({why}) and others have; choose other devices, \
                 or backend host"
            );
            return Err(Stop::HostCannot(text));
        }
        tracing::warn!("serving host memory, not a GPU's: {why}");
    }
    Ok(opened)
}

fn device_pools(gpu: &Gpu, device: u32, mut opened: Opened, names: &Names) -> Vec<PoolConfig> {
    if let Some(uuid) = &names.gpu_uuid {
        opened.gpu_uuid.clone_from(uuid);
    }
    let timeout_ms = u64::from(gpu.alloc_retry_timeout_ms);
    let config = DeviceConfig {
        dir: gpu.socket_dir.clone(),
        tags: gpu.tags.clone(),
        profiles: match gpu.generation {
            Generation::First => vec![Profile::V1],
            Generation::Second => vec![Profile::V2],
            Generation::Both => vec![Profile::V1, Profile::V2],
        },
        retry_interval: Duration::from_millis(gpu.alloc_retry_interval_ms.into()),
        retry_timeout: (timeout_ms > 0).then(|| Duration::from_millis(timeout_ms)),
        ..DeviceConfig::new(device)
    };
    let mut pools = config.pools(&opened);
    for pool in &mut pools {
        pool.domain.limits.allocations_max = gpu.allocations_max as usize;
        pool.domain.limits.metadata_bytes_max =
            usize::try_from(gpu.metadata_bytes_max).unwrap_or(usize::MAX);
        pool.domain.policy.clients_max = gpu.connections_max as usize;
        pool.domain.policy.guard_layout = gpu.durable_layout == DurableLayout::Keep;
    }
    pools
}

fn refused(error: ServerError) -> anyhow::Error {
    match error {
        ServerError::PathTooLong { .. } => Stop::Usage(error.to_string()).into(),
        other => anyhow::Error::new(other).context("the GPU memory service does not start"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(dir: &std::path::Path) -> Gpu {
        Gpu {
            devices: vec![0, 3],
            tags: vec!["weights".into(), "kv_cache".into()],
            backend: GpuBackend::Host,
            generation: Generation::Both,
            socket_dir: dir.to_owned(),
            uids: Vec::new(),
            capacity_bytes: None,
            populate_bytes_max: 0,
            connections_max: 7,
            allocations_max: 9,
            metadata_bytes_max: 4_096,
            alloc_retry_interval_ms: 20,
            alloc_retry_timeout_ms: 0,
            durable_layout: DurableLayout::Keep,
            spin_us: 7,
        }
    }

    #[test]
    fn settings_reach_every_pool() {
        let config = server_config(&gpu("/run".as_ref()), &Names::default()).unwrap();
        assert_eq!((config.pools.len(), config.connections_max), (8, 7));
        assert_eq!(config.spin, Duration::from_micros(7));
        let paths: Vec<_> = config.pools.iter().map(|pool| pool.path.clone()).collect();
        assert!(
            paths.contains(&"/run/gms_3_kv_cache.sock".into()),
            "{paths:?}"
        );
        for pool in &config.pools {
            let domain = &pool.domain;
            assert_eq!(domain.limits.allocations_max, 9);
            assert_eq!(domain.limits.metadata_bytes_max, 4_096);
            assert!(domain.policy.guard_layout && domain.retry_timeout.is_none());
        }
    }

    #[test]
    fn one_name_is_for_one_socket() {
        let names = Names {
            socket_path: Some("/run/x.sock".into()),
            gpu_uuid: Some("GPU-x".into()),
        };
        let many = server_config(&gpu("/run".as_ref()), &names).err().unwrap();
        assert!(many.to_string().contains("there would be 8"), "{many}");
        let one = Gpu {
            devices: vec![1],
            tags: vec!["weights".into()],
            generation: Generation::First,
            ..gpu("/run".as_ref())
        };
        let pools = server_config(&one, &names).unwrap().pools;
        assert_eq!(pools[0].path, PathBuf::from("/run/x.sock"));
        assert_eq!(pools[0].domain.gpu_uuid, "GPU-x");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn it_starts_once_and_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let gpu = gpu(dir.path());
        let service = GpuMemory::start(&gpu, &Names::default()).unwrap();
        assert!(service.is_running() && service.pools().len() == 8);
        let second = GpuMemory::start(&gpu, &Names::default()).err().unwrap();
        assert!(
            format!("{second:#}").contains("already running"),
            "{second:#}"
        );
        service.stop().await;
        assert!(!service.is_running());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        drop(GpuMemory::start(&gpu, &Names::default()).unwrap());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
