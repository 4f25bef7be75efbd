//! What `gms` tells: its table and its JSON.

use serde_json::{Value, json};

use crate::gms_scene::{Samples, Step};
use crate::ratio::{Ratio, ratio_text};
use crate::report::{Quantiles, Table, figure, host, now_utc};

/// One service.
pub(crate) struct Arm {
    /// Its name.
    pub(crate) name: String,
    /// What it calls itself.
    pub(crate) version: String,
    /// One for each number of waiting clients.
    pub(crate) records: Vec<Record>,
}

/// One number of waiting clients.
pub(crate) struct Record {
    waiting: usize,
    rounds: Vec<Samples>,
}

impl Record {
    /// Nothing measured yet.
    pub(crate) fn new(waiting: usize) -> Self {
        Self {
            waiting,
            rounds: Vec::new(),
        }
    }

    /// Adds a round.
    pub(crate) fn add(&mut self, round: Samples) {
        self.rounds.push(round);
    }

    /// Of all rounds together.
    fn all(&self, step: Step) -> Quantiles {
        let mut all = Samples::new();
        self.rounds.iter().for_each(|round| all.add(round));
        Quantiles::of_ns(all.of(step))
    }

    fn by_round(&self, step: Step, quantile: f64) -> Vec<f64> {
        let rounds = self.rounds.iter();
        rounds
            .map(|round| match round.of(step).is_empty() {
                true => f64::NAN,
                false => round.of(step).value_at_quantile(quantile) as f64,
            })
            .collect()
    }
}

/// How many times longer `other` takes than `own`, round by round.
fn times(own: &Record, other: &Record, step: Step, quantile: f64) -> Option<Ratio> {
    Ratio::of_rounds(
        &other.by_round(step, quantile),
        &own.by_round(step, quantile),
    )
}

/// The table.
pub(crate) fn table(arms: &[Arm], skipped: &[String]) -> String {
    let mut out = String::new();
    for arm in arms {
        out.push_str(&format!("{}: {}\n", arm.name, arm.version));
    }
    for text in skipped {
        out.push_str(&format!("left out: {text}\n"));
    }
    out.push('\n');
    let mut table = Table::new(&[
        "waiting, step",
        "corelane p50",
        "p99",
        "p99.9",
        "asyncio p50",
        "p99",
        "p99.9",
        "asyncio/corelane p50",
        "p99",
        "again/corelane p50 (noise)",
    ]);
    let Some(own) = arms.first() else { return out };
    for (index, record) in own.records.iter().enumerate() {
        for step in Step::ALL {
            let mut row = vec![format!("{} {}", record.waiting, step.name())];
            let quantiles = record.all(step);
            row.extend([quantiles.p50, quantiles.p99, quantiles.p999].map(figure));
            let record_of = |name: &str| {
                let arm = arms.iter().find(|arm| arm.name == name);
                arm.and_then(|arm| arm.records.get(index))
            };
            if let Some(other) = record_of("asyncio") {
                let quantiles = other.all(step);
                row.extend([quantiles.p50, quantiles.p99, quantiles.p999].map(figure));
                row.push(ratio_text(times(record, other, step, 0.5)));
                row.push(ratio_text(times(record, other, step, 0.99)));
            } else {
                row.extend(["-"; 5].map(str::to_owned));
            }
            let again = record_of("corelane-again");
            let noise = again.and_then(|again| times(record, again, step, 0.5));
            row.push(ratio_text(noise));
            table.row(row);
        }
    }
    out.push_str(&table.text());
    out
}

/// The JSON, `corelane-bench/gms/1`.
pub(crate) fn json(
    arms: &[Arm],
    skipped: &[String],
    settings: Value,
    hiccup_us: Quantiles,
) -> Value {
    let own = arms.first();
    let steps = |arm: &Arm, index: usize, record: &Record| -> Value {
        let base = own.filter(|own| own.name != arm.name);
        let base = base.and_then(|own| own.records.get(index));
        Step::ALL
            .iter()
            .map(|step| {
                let ratio = |quantile| base.and_then(|own| times(own, record, *step, quantile));
                let rounds = record.rounds.iter();
                let rounds: Vec<_> = rounds.map(|r| Quantiles::of_ns(r.of(*step))).collect();
                let told = json!({
                    "latency_us": record.all(*step),
                    "times_corelane": {"p50": ratio(0.5), "p99": ratio(0.99)},
                    "rounds": rounds,
                });
                (step.name().to_owned(), told)
            })
            .collect::<serde_json::Map<_, _>>()
            .into()
    };
    let told = arms.iter().map(|arm| {
        let loads = arm.records.iter().enumerate();
        let loads: Vec<_> = loads
            .map(|(index, record)| {
                json!({"waiting": record.waiting, "steps": steps(arm, index, record)})
            })
            .collect();
        json!({"arm": arm.name, "version": arm.version, "loads": loads})
    });
    json!({
        "schema": "corelane-bench/gms/1",
        "when": now_utc(),
        "host": host(),
        "settings": settings,
        "skipped": skipped,
        "hiccup_us": hiccup_us,
        "arms": told.collect::<Vec<_>>(),
    })
}
