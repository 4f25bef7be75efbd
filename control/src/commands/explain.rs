//! `corelane explain route`: which instance a request would get, why, and why not the others.

use std::fmt::Write;

use anyhow::{Context, Result, bail};

use crate::cli::{self, Exit};
use crate::overview::{Candidate, EXPLAIN, Explanation};
use crate::status_client;

/// What is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExplainArgs {
    /// The status server of the process: `HOST:PORT`.
    pub address: String,
    /// The path of the request.
    pub path: String,
    /// Its headers.
    pub headers: Vec<(String, String)>,
    /// The core that is asked.
    pub core: u32,
    /// Whether to print JSON.
    pub json: bool,
}

/// Prints it; answers [`Exit::Failed`] when no instance would get the request.
///
/// # Errors
/// Nobody answers, there is no such route or core, or standard output cannot be written.
pub fn explain(args: &ExplainArgs) -> Result<Exit> {
    let asked = status_client::get(&args.address, &query(args));
    let (status, body) = asked.with_context(|| {
        let address = &args.address;
        format!("cannot ask {address}; name its status server with --address HOST:PORT")
    })?;
    if status != 200 {
        let said = String::from_utf8_lossy(&body);
        bail!("{} answers {status}: {}", args.address, said.trim());
    }
    let said: Explanation = serde_json::from_slice(&body).with_context(|| {
        let address = &args.address;
        format!("{address} answers with something else; is it of another version?")
    })?;
    match args.json {
        true => cli::print(&format!("{}\n", String::from_utf8_lossy(&body)))?,
        false => cli::print(&text(&said))?,
    }
    Ok(match said.chosen {
        Some(_) => Exit::Done,
        None => Exit::Failed,
    })
}

fn query(args: &ExplainArgs) -> String {
    let front = format!("{EXPLAIN}?");
    let begin = front.len();
    let mut query = form_urlencoded::Serializer::for_suffix(front, begin);
    query.append_pair("path", &args.path);
    query.append_pair("core", &args.core.to_string());
    for (name, value) in &args.headers {
        query.append_pair("header", &format!("{name}={value}"));
    }
    query.finish()
}

fn text(said: &Explanation) -> String {
    let (listen, target, policy) = (&said.listen, &said.target, &said.policy);
    let mut out = format!(
        "{listen} -> {target}, policy {policy}, core {}\n",
        said.core
    );
    let _ = match &said.chosen {
        Some(id) => writeln!(out, "goes to {id}: {}", said.why),
        None => writeln!(out, "goes to nobody: {}", said.why),
    };
    if !said.candidates.is_empty() {
        out.push('\n');
        out.push_str(&table(said));
    }
    if said.left_out > 0 {
        let _ = writeln!(out, "  and {} more that are not listed", said.left_out);
    }
    let others = said
        .others
        .iter()
        .filter(|other| other.chosen != said.chosen);
    for other in others {
        let _ = match (&other.chosen, other.answers) {
            (Some(id), _) => writeln!(out, "core {} would choose {id}", other.core),
            (None, true) => writeln!(out, "core {} would choose nobody", other.core),
            (None, false) => writeln!(out, "core {} does not answer", other.core),
        };
    }
    out
}

/// Columns as wide as their longest cell; the last is the sentence.
fn table(said: &Explanation) -> String {
    let by_cache = said.policy == "kv";
    let row = |one: &Candidate| {
        let address = one.address.clone().unwrap_or_else(|| "lane".into());
        let mut cells = vec![one.id.clone(), address, format!("{:.2}", one.load)];
        if by_cache {
            cells.push(format!("{}/{}", one.overlap_blocks, said.prompt_blocks));
            cells.push(format!("{:.2}", one.cost));
        }
        cells.push((u64::from(one.unanswered) + u64::from(one.streams)).to_string());
        cells.push(one.failed.to_string());
        cells
    };
    let mut titles = vec!["INSTANCE", "ADDRESS", "LOAD"];
    if by_cache {
        titles.extend(["CACHED", "COST"]);
    }
    titles.extend(["BUSY", "ERRORS"]);
    let rows: Vec<Vec<String>> = said.candidates.iter().map(row).collect();
    let width = |column: usize| {
        let cells = rows.iter().map(|cells| cells[column].len());
        cells.max().unwrap_or(0).max(titles[column].len())
    };
    let widths: Vec<usize> = (0..titles.len()).map(width).collect();
    let line = |mark: &str, cells: &[&str], last: &str| {
        let mut line = mark.to_owned();
        for (cell, width) in cells.iter().zip(&widths) {
            let _ = write!(line, "{cell:<width$}  ");
        }
        line + last + "\n"
    };
    let mut out = line("  ", &titles, "WHY");
    for (one, cells) in said.candidates.iter().zip(&rows) {
        let cells: Vec<&str> = cells.iter().map(String::as_str).collect();
        out += &line(if one.chosen { "* " } else { "  " }, &cells, &one.why);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::overview::Choice;

    fn candidate(id: &str, chosen: bool, why: &str) -> Candidate {
        Candidate {
            id: id.into(),
            address: Some("10.0.0.1:7".into()),
            chosen,
            why: why.into(),
            load: 1.5,
            unanswered: 2,
            ..Candidate::default()
        }
    }

    #[test]
    fn an_explanation_is_a_table_with_reasons() {
        let mut said = Explanation {
            listen: "a/b/c".into(),
            target: "a/w/c".into(),
            policy: "least_loaded".into(),
            chosen: Some("1f".into()),
            why: "it has the least load: 1.5".into(),
            candidates: vec![
                candidate("1f", true, "it has the least load: 1.5"),
                candidate("20", false, "there is no connection to it"),
            ],
            others: vec![
                Choice {
                    core: 1,
                    answers: true,
                    chosen: Some("1f".into()),
                },
                Choice {
                    core: 2,
                    answers: true,
                    chosen: Some("20".into()),
                },
                Choice {
                    core: 3,
                    ..Choice::default()
                },
            ],
            ..Explanation::default()
        };
        let wanted = "\
a/b/c -> a/w/c, policy least_loaded, core 0
goes to 1f: it has the least load: 1.5

  INSTANCE  ADDRESS     LOAD  BUSY  ERRORS  WHY
* 1f        10.0.0.1:7  1.50  2     0       it has the least load: 1.5
  20        10.0.0.1:7  1.50  2     0       there is no connection to it
core 2 would choose 20
core 3 does not answer
";
        assert_eq!(text(&said), wanted);
        (said.policy, said.prompt_blocks, said.chosen) = ("kv".into(), 8, None);
        let said = text(&said);
        assert!(
            said.contains("goes to nobody: ") && said.contains("CACHED  COST"),
            "{said}"
        );
        assert!(said.contains("0/8     0.00"), "{said}");
    }

    #[test]
    fn questions_are_written_for_a_url() {
        let args = ExplainArgs {
            address: "x:1".into(),
            path: "1f/a/b/c".into(),
            headers: vec![("x-session".into(), "a b&c=ä".into())],
            core: 2,
            json: false,
        };
        let wanted = "/explain?path=1f%2Fa%2Fb%2Fc&core=2&header=x-session%3Da+b%26c%3D%C3%A4";
        assert_eq!(query(&args), wanted);
    }
}
