//! What `/metrics` says of the bridge of events.
//!
//! ```text
//! corelane_bridge_<counter>_total{side}            doors, nats, zmq
//! corelane_bridge_dropped_total{side,reason}
//! corelane_bridge_waiting{side}   corelane_bridge_others   corelane_bridge_nats_connected
//! ```

use std::fmt;

use async_nats::connection::State;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use super::{Bridge, Place};

type Read = fn(&Place) -> u64;

const COUNTERS: [(&str, &str, Read); 6] = [
    ("heard", "Events that came on a side", |place| {
        place.counts.heard.get()
    }),
    ("passed", "Events brought to a side", |place| {
        place.counts.passed.get()
    }),
    (
        "came_back",
        "Events that had been on the side before",
        |place| place.counts.came_back.get(),
    ),
    (
        "left",
        "Events of a side left to another bridge, once for each other side",
        |place| place.counts.left.get(),
    ),
    (
        "unreadable",
        "Messages of a side that are no events",
        |place| place.counts.unreadable.get(),
    ),
    (
        "lost",
        "Numbers of publishers that were passed over on a side",
        |place| place.numbers.borrow().losses.lost,
    ),
];

const REASONS: [(&str, Read); 4] = [
    ("full", |place| place.counts.dropped_full.get()),
    ("too_large", |place| place.counts.dropped_too_large.get()),
    ("subject", |place| place.counts.dropped_unfit.get()),
    ("too_far", |place| place.counts.dropped_too_far.get()),
];

/// Counters of each side, as [`COUNTERS`] and [`REASONS`] list them.
#[derive(Debug)]
struct Sides {
    side: &'static str,
    counters: Vec<u64>,
    dropped: Vec<u64>,
    waiting: u64,
}

#[derive(Debug)]
struct Snapshot {
    sides: Vec<Sides>,
    others: u64,
    connected: Option<bool>,
}

impl Bridge {
    /// Writes all families, without the mark of the end.
    pub fn write_metrics(&self, out: &mut String) {
        let sides = self.places.iter().map(|place| Sides {
            side: place.kind.word(),
            counters: COUNTERS.iter().map(|(.., read)| read(place)).collect(),
            dropped: REASONS.iter().map(|(_, read)| read(place)).collect(),
            waiting: place.outbox.len() as u64,
        });
        let snapshot = Snapshot {
            sides: sides.collect(),
            others: self.course.borrow().members.others() as u64,
            connected: self
                .nats
                .as_ref()
                .map(|nats| nats.client().connection_state() == State::Connected),
        };
        let mut registry = Registry::with_prefix("corelane_bridge");
        registry.register_collector(Box::new(snapshot));
        // Writing into a string does not fail.
        let _ = text::encode_registry(out, &registry);
    }
}

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        for (place, (name, help, _)) in COUNTERS.iter().enumerate() {
            let mut family = counters(&mut encoder, name, help)?;
            for side in &self.sides {
                family
                    .encode_family(&[("side", side.side)])?
                    .encode_counter::<NoLabelSet, _, u64>(&side.counters[place], None)?;
            }
        }
        let help = "Events that could not be brought to a side";
        let mut family = counters(&mut encoder, "dropped", help)?;
        for side in &self.sides {
            for (value, (reason, _)) in side.dropped.iter().zip(REASONS) {
                family
                    .encode_family(&[("side", side.side), ("reason", reason)])?
                    .encode_counter::<NoLabelSet, _, u64>(value, None)?;
            }
        }
        let help = "Events that wait to be brought to a side.";
        let mut family = encoder.encode_descriptor("waiting", help, None, MetricType::Gauge)?;
        for side in &self.sides {
            family
                .encode_family(&[("side", side.side)])?
                .encode_gauge(&side.waiting)?;
        }
        let help = "Other bridges that pass events on.";
        encoder
            .encode_descriptor("others", help, None, MetricType::Gauge)?
            .encode_gauge(&self.others)?;
        let Some(connected) = self.connected else {
            return Ok(());
        };
        let help = "Whether there is a connection to NATS.";
        encoder
            .encode_descriptor("nats_connected", help, None, MetricType::Gauge)?
            .encode_gauge(&u64::from(connected))
    }
}

fn counters<'a>(
    encoder: &'a mut DescriptorEncoder<'_>,
    name: &'a str,
    help: &str,
) -> Result<prometheus_client::encoding::MetricEncoder<'a>, fmt::Error> {
    let help = format!("{help}.");
    encoder.encode_descriptor(name, &help, None, MetricType::Counter)
}
