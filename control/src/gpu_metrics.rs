//! What `/metrics` says of the GPU memory service.
//!
//! ```text
//! corelane_gpu_mem_up                                    1 while the service runs
//! corelane_gpu_mem_pool_info{gpu,tag,generation,backend,socket}
//! corelane_gpu_mem_state{gpu,tag,generation,state}       one of the five states is 1
//! corelane_gpu_mem_<gauge>{gpu,tag,generation}           holder, readers, waiters, memory
//! corelane_gpu_mem_<counter>_total{gpu,tag,generation}   every counter of `gpu-mem`
//! ```

use std::fmt;

use corelane_gpu_mem::lock::{Profile, State};
use corelane_gpu_mem::server::PoolGauges;
use corelane_gpu_mem::stats::Counter;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use crate::gpu_memory::GpuMemory;

type Gauge = (&'static str, &'static str, fn(&PoolGauges) -> u64);

/// Numbers that go up and down.
const GAUGES: [Gauge; 6] = [
    (
        "writer_pid",
        "Process that holds the lock for writing; 0 is none, or one of another namespace.",
        PoolGauges::writer_pid,
    ),
    (
        "readers",
        "Clients that hold the lock for reading.",
        PoolGauges::readers,
    ),
    (
        "waiters",
        "Clients that wait for the lock.",
        PoolGauges::waiters,
    ),
    (
        "waiting_writers",
        "Those among them that keep new readers out.",
        PoolGauges::waiting_writers,
    ),
    (
        "allocations_held",
        "Allocations that exist, not what the GPU has in use.",
        PoolGauges::allocations,
    ),
    ("bytes_held", "Their bytes.", PoolGauges::bytes),
];

/// Everything that a scrape shows of the service, copied pool by pool.
#[derive(Debug)]
struct Snapshot {
    up: bool,
    pools: Vec<Pool>,
}

#[derive(Debug)]
struct Pool {
    labels: [(&'static str, String); 3],
    backend: &'static str,
    socket: String,
    state: State,
    gauges: [u64; GAUGES.len()],
    counts: Vec<u64>,
}

/// Writes all families, without the mark of the end.
pub fn write(service: &GpuMemory, out: &mut String) {
    let snapshot = Snapshot {
        up: service.is_running(),
        pools: service.pools().iter().map(pool).collect(),
    };
    let mut registry = Registry::with_prefix("corelane_gpu_mem");
    registry.register_collector(Box::new(snapshot));
    // Writing into a string does not fail.
    let _ = text::encode_registry(out, &registry);
}

fn pool(pool: &PoolGauges) -> Pool {
    let generation = match pool.profile {
        Profile::V1 => "first",
        Profile::V2 => "second",
    };
    Pool {
        labels: [
            ("gpu", pool.gpu_uuid.clone()),
            ("tag", pool.tag.clone()),
            ("generation", generation.to_owned()),
        ],
        backend: pool.backend,
        socket: pool.path.display().to_string(),
        state: pool.state(),
        gauges: GAUGES.map(|(_, _, read)| read(pool)),
        counts: Counter::ALL.iter().map(|&c| pool.count(c)).collect(),
    }
}

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let help = "1 while the service runs.";
        let mut up = encoder.encode_descriptor("up", help, None, MetricType::Gauge)?;
        up.encode_gauge(&u64::from(self.up))?;
        self.states(&mut encoder)?;
        for (index, (name, help, _)) in GAUGES.into_iter().enumerate() {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for pool in &self.pools {
                let value = pool.gauges.get(index).copied().unwrap_or_default();
                family.encode_family(&pool.labels)?.encode_gauge(&value)?;
            }
        }
        for (index, counter) in Counter::ALL.iter().enumerate() {
            // The encoder adds the ending itself.
            let name = counter.name();
            let name = name.strip_suffix("_total").unwrap_or(name);
            let kind = MetricType::Counter;
            let mut family = encoder.encode_descriptor(name, counter.help(), None, kind)?;
            for pool in &self.pools {
                let value = pool.counts.get(index).copied().unwrap_or_default();
                let mut series = family.encode_family(&pool.labels)?;
                series.encode_counter::<NoLabelSet, _, f64>(&value, None)?;
            }
        }
        Ok(())
    }
}

impl Snapshot {
    fn states(&self, encoder: &mut DescriptorEncoder) -> fmt::Result {
        let help = "Each pool, its memory and its socket.";
        let mut info = encoder.encode_descriptor("pool", help, None, MetricType::Info)?;
        for pool in &self.pools {
            let [gpu, tag, generation] = &pool.labels;
            info.encode_info(&[
                (gpu.0, gpu.1.as_str()),
                (tag.0, &tag.1),
                (generation.0, &generation.1),
                ("backend", pool.backend),
                ("socket", &pool.socket),
            ])?;
        }
        let help = "1 for the state that a pool is in.";
        let mut family = encoder.encode_descriptor("state", help, None, MetricType::Gauge)?;
        for pool in &self.pools {
            let [gpu, tag, generation] = &pool.labels;
            for state in State::ALL {
                let labels = [
                    (gpu.0, gpu.1.as_str()),
                    (tag.0, &tag.1),
                    (generation.0, &generation.1),
                    ("state", state.as_str()),
                ];
                let is = u64::from(pool.state == state);
                family.encode_family(&labels)?.encode_gauge(&is)?;
            }
        }
        Ok(())
    }
}
