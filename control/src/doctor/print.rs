//! A diagnosis for people: what is wrong, worst first, then what is well.

use std::fmt::Write;

use super::{Diagnosis, Weight};

/// The diagnosis as lines.
pub fn text(diagnosis: &Diagnosis) -> String {
    let mut out = String::new();
    for finding in &diagnosis.findings {
        let (weight, check) = (finding.weight.word(), finding.check);
        let _ = writeln!(out, "{weight:<7} {check}: {}", finding.what);
        for (index, evidence) in finding.evidence.iter().enumerate() {
            let label = if index == 0 { "seen:" } else { "" };
            let (value, at) = (&evidence.value, &evidence.at);
            let _ = writeln!(out, "        {label:<7} {value} ({at})");
        }
        let _ = writeln!(out, "        cause:  {}", finding.cause);
        let _ = writeln!(out, "        remedy: {}\n", finding.remedy);
    }
    for well in &diagnosis.well {
        let _ = writeln!(out, "well    {}: {}", well.check, well.what);
    }
    for unseen in &diagnosis.unseen {
        let _ = writeln!(out, "unseen  {}: {}", unseen.check, unseen.why);
    }
    out + &summary(diagnosis)
}

/// `1 fault, 2 costs; 18 checks well, 3 unseen; in 1.2 s`
fn summary(diagnosis: &Diagnosis) -> String {
    let counted = |weight: Weight| {
        let found = diagnosis.findings.iter().filter(|f| f.weight == weight);
        match found.count() {
            0 => None,
            1 => Some(format!("1 {}", weight.word())),
            n => Some(format!("{n} {}s", weight.word())),
        }
    };
    let found: Vec<String> = [Weight::Fault, Weight::Cost, Weight::Hint]
        .into_iter()
        .filter_map(counted)
        .collect();
    let found = match found.is_empty() {
        true => "nothing found".to_owned(),
        false => found.join(", "),
    };
    format!(
        "{found}; {} checks well, {} unseen; in {:.1} s\n",
        diagnosis.well.len(),
        diagnosis.unseen.len(),
        diagnosis.took_ms as f64 / 1e3
    )
}
