//! `[gpu]`: the GPU memory service, whose settings must fit together and into a socket's name.

use std::path::PathBuf;

use corelane_gpu_mem::paths;

use super::keys::{self, Section};
use super::layers::{Layers, Of};
use super::problem::Origin;
use super::value::Value;
use super::words::{DurableLayout, Generation, GpuBackend};
use super::{Gpu, Purpose};

/// The settings, if a GPU memory service is wanted at all.
pub(super) fn gpu(layers: &mut Layers, purpose: Purpose) -> Option<Gpu> {
    if !matches!(purpose, Purpose::Serve | Purpose::Gms) {
        return None;
    }
    let Some((Value::Numbers(devices), _)) = layers.get(&keys::GPU_DEVICES, Of::Once) else {
        without_devices(layers);
        return None;
    };
    let numbers = |found: Option<(Value, Origin)>| match found {
        Some((Value::Numbers(numbers), _)) => numbers,
        _ => Vec::new(),
    };
    let tags = match layers.get(&keys::GPU_TAGS, Of::Once) {
        Some((Value::List(tags), _)) => tags,
        _ => Vec::new(),
    };
    let (dir, dir_at) = match layers.text(&keys::GPU_SOCKET_DIR, Of::Once) {
        Some((dir, at)) => (PathBuf::from(dir), at),
        None => (std::env::temp_dir(), Origin::Default),
    };
    let generation = layers.word(&keys::GPU_GENERATION, Generation::parse, Generation::First);
    let backend = layers.word(&keys::GPU_BACKEND, GpuBackend::parse, GpuBackend::Auto);
    let gpu = Gpu {
        devices,
        tags,
        backend,
        generation,
        socket_dir: dir,
        uids: numbers(layers.get(&keys::GPU_UIDS, Of::Once)),
        capacity_bytes: capacity(layers, backend),
        populate_bytes_max: layers.int(&keys::GPU_POPULATE_BYTES_MAX, Of::Once),
        connections_max: layers.int(&keys::GPU_CONNECTIONS_MAX, Of::Once),
        allocations_max: layers.int(&keys::GPU_ALLOCATIONS_MAX, Of::Once),
        metadata_bytes_max: layers.int(&keys::GPU_METADATA_BYTES_MAX, Of::Once),
        alloc_retry_interval_ms: layers.int(&keys::GPU_ALLOC_RETRY_INTERVAL_MS, Of::Once),
        alloc_retry_timeout_ms: layers.int(&keys::GPU_ALLOC_RETRY_TIMEOUT_MS, Of::Once),
        durable_layout: layers.word(
            &keys::GPU_DURABLE_LAYOUT,
            DurableLayout::parse,
            DurableLayout::Replace,
        ),
        spin_us: layers.int(&keys::GPU_SPIN_US, Of::Once),
    };
    path_fits(layers, &gpu, &dir_at);
    Some(gpu)
}

/// A table that was written and switches nothing on is a mistake.
fn without_devices(layers: &mut Layers) {
    let Some(table) = layers.main.table(Section::Gpu, 0) else {
        return;
    };
    if !table.refused.contains(&keys::GPU_DEVICES.name) {
        let at = table.at.clone();
        let what = "[gpu] has no devices, so no GPU memory is served".to_owned();
        layers.error(&at, what, "write devices = \"0\", or remove the table");
    }
}

fn capacity(layers: &mut Layers, backend: GpuBackend) -> Option<u64> {
    let (value, at) = layers.get(&keys::GPU_CAPACITY_BYTES, Of::Once)?;
    let Value::Int(bytes) = value else {
        return None;
    };
    if backend == GpuBackend::Cuda {
        let what = "capacity_bytes bounds host memory only, and backend is \"cuda\"".to_owned();
        layers.warn(&at, what, "take it out");
    }
    u64::try_from(bytes).ok()
}

/// A socket's name has room for 107 bytes.
fn path_fits(layers: &mut Layers, gpu: &Gpu, dir_at: &Origin) {
    let longest = gpu.tags.iter().max_by_key(|tag| tag.len());
    let Some(tag) = longest else { return };
    let device = gpu.devices.last().copied().unwrap_or_default();
    let path = match gpu.generation {
        Generation::Second => paths::d2(&gpu.socket_dir, device, tag),
        Generation::First | Generation::Both => {
            paths::d1(&gpu.socket_dir, &paths::host_uuid(device), tag)
        }
    };
    let bytes = path.as_os_str().len();
    if bytes >= paths::PATH_BYTES_MAX {
        let what = format!(
            "the socket {} has {bytes} bytes, and 107 are allowed",
            path.display()
        );
        layers.error(dir_at, what, "write a shorter socket_dir");
    }
}
