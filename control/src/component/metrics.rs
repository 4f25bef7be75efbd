//! What `/metrics` shows of endpoints, beside what the shards count.
//!
//! ```text
//! corelane_endpoint_state{endpoint,state} 0|1      corelane_endpoint_state_changes_total{..}
//! corelane_endpoint_<counter>_total{endpoint}      corelane_endpoint_busy{endpoint}
//! ```

use std::fmt::Write;
use std::rc::Rc;

use corelane_engine::stats::{CellKind, HandlerStats};

use super::serving::Serving;
use crate::health::{Seen, State};

/// Ends a text of this format.
const END: &str = "# EOF\n";

/// `text`, a whole scrape, with the families of endpoints at its end.
pub(super) fn with_endpoints(text: String, seen: &[Seen], serving: &[Rc<Serving>]) -> String {
    let mut out = text;
    out.truncate(out.strip_suffix(END).map_or(out.len(), str::len));
    // Writing into a string does not fail.
    let _ = states(&mut out, seen);
    let _ = counters(&mut out, serving);
    out.push_str(END);
    out
}

fn states(out: &mut String, seen: &[Seen]) -> std::fmt::Result {
    family(
        out,
        "state",
        CellKind::Gauge,
        "1 for the state that it is in",
    )?;
    for seen in seen {
        for state in State::ALL {
            let is = u8::from(seen.state == state);
            let name = label(&seen.id.to_string());
            writeln!(
                out,
                "corelane_endpoint_state{{endpoint=\"{name}\",state=\"{state}\"}} {is}"
            )?;
        }
    }
    let help = "How often it has become each state";
    family(out, "state_changes", CellKind::Counter, help)?;
    for seen in seen {
        for (state, count) in State::ALL.into_iter().zip(seen.changes) {
            let name = label(&seen.id.to_string());
            writeln!(
                out,
                "corelane_endpoint_state_changes_total{{endpoint=\"{name}\",state=\"{state}\"}} \
                 {count}"
            )?;
        }
    }
    Ok(())
}

fn counters(out: &mut String, serving: &[Rc<Serving>]) -> std::fmt::Result {
    for (index, (name, kind, help, _)) in HandlerStats::default().each().into_iter().enumerate() {
        family(out, name, kind, help)?;
        let suffix = match kind {
            CellKind::Counter => "_total",
            CellKind::Gauge => "",
        };
        for serving in serving {
            let value = serving.sum(|stats| stats.each()[index].3);
            let endpoint = label(&serving.id.to_string());
            writeln!(
                out,
                "corelane_endpoint_{name}{suffix}{{endpoint=\"{endpoint}\"}} {value}"
            )?;
        }
    }
    Ok(())
}

fn family(out: &mut String, name: &str, kind: CellKind, help: &str) -> std::fmt::Result {
    let kind = match kind {
        CellKind::Counter => "counter",
        CellKind::Gauge => "gauge",
    };
    writeln!(out, "# HELP corelane_endpoint_{name} {help}.")?;
    writeln!(out, "# TYPE corelane_endpoint_{name} {kind}")
}

fn label(text: &str) -> String {
    let escaped = text.replace('\\', "\\\\").replace('"', "\\\"");
    escaped.replace('\n', "\\n")
}
