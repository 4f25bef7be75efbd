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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_are_added_up_and_not_averaged() {
        let core = |local, remote| {
            let stats = Stats::new(0);
            stats.shard.connections_local.set(local);
            stats.shard.connections_remote.set(remote);
            Locality::of(&stats)
        };
        assert_eq!(core(1, 3).ratio(), Some(0.25));
        assert_eq!(core(1, 3).plus(core(12, 0)).ratio(), Some(13.0 / 16.0));
        assert_eq!(core(0, 0).ratio(), None);
    }
}
