//! How many connections came by the core that handles their packets.

use std::fmt;

use corelane_engine::stats::Stats;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::metrics::MetricType;

use super::Snapshot;

/// Connections of one core, or of all.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Locality {
    local: u64,
    all: u64,
}

impl Locality {
    /// Of one core.
    pub(super) fn of(stats: &Stats) -> Self {
        let local = stats.shard.connections_local.get();
        let remote = stats.shard.connections_remote.get();
        Self {
            local,
            all: local + remote,
        }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            local: self.local + other.local,
            all: self.all + other.all,
        }
    }

    /// None before the first connection.
    fn ratio(self) -> Option<f64> {
        (self.all > 0).then(|| self.local as f64 / self.all as f64)
    }
}

impl Snapshot {
    /// The ratio of each core that has accepted connections, and of all of them.
    pub(super) fn locality(&self, encoder: &mut DescriptorEncoder) -> fmt::Result {
        let gauge = MetricType::Gauge;
        let help = "Part of the connections accepted whose packets the core's own CPU handles.";
        let mut family = encoder.encode_descriptor("locality_ratio", help, None, gauge)?;
        for core in &self.cores {
            if let Some(ratio) = core.locality.ratio() {
                family.encode_family(&core.labels)?.encode_gauge(&ratio)?;
            }
        }
        let each = self.cores.iter().map(|core| core.locality);
        let all = each.fold(Locality::default(), Locality::plus);
        let Some(ratio) = all.ratio() else {
            return Ok(());
        };
        let help = "The same of all cores together.";
        let metric = encoder.encode_descriptor("locality_ratio_all", help, None, gauge)?;
        { metric }.encode_gauge(&ratio)
    }
}
