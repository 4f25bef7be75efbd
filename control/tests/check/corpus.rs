//! A corpus of broken configurations: of each every error, with its place and its words.
//!
//! `data/corpus/broken.txt` holds them as `=== what is wrong with it`, the text, and one line `=> `
//! for each error: its place and what is wrong, without what is to be written instead. Behind every
//! text stands a good route. `CORELANE_BLESS=1` writes what is found into the file, to be read
//! before it is kept.

use std::path::Path;

use corelane::config::{Origin, load};

use super::{ROUTE, inputs};

struct Case {
    name: String,
    text: String,
    expected: Vec<String>,
}

fn cases(corpus: &str) -> Vec<Case> {
    let cases = corpus.split("=== ").filter(|case| !case.is_empty());
    let case = |case: &str| {
        let (name, rest) = case.split_once('\n').unwrap();
        let (expected, text) = rest
            .lines()
            .partition::<Vec<_>, _>(|line| line.starts_with("=> "));
        Case {
            name: name.to_owned(),
            text: text.join("\n") + "\n",
            expected: expected.iter().map(|line| line[3..].to_owned()).collect(),
        }
    };
    cases.map(case).collect()
}

#[test]
fn each_of_a_corpus_of_broken_configurations_is_caught_at_its_line() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/corpus/broken.txt");
    let corpus = std::fs::read_to_string(&path).unwrap();
    let (mut blessed, mut wrong) = (String::new(), Vec::new());
    let cases = cases(&corpus);
    assert!(cases.len() >= 200, "{}", cases.len());
    for case in &cases {
        let checked = load(&inputs(&format!("{}{ROUTE}", case.text)));
        let errors: Vec<_> = checked.errors().collect();
        let found: Vec<String> = errors.iter().map(ToString::to_string).collect();
        blessed += &format!("=== {}\n{}", case.name, case.text);
        let what = |line: &String| line.split("; ").next().unwrap_or_default().to_owned();
        let found: Vec<String> = found.iter().map(what).collect();
        blessed.extend(found.iter().map(|line| format!("=> {line}\n")));
        if found.is_empty() || found != case.expected {
            let (name, expected) = (&case.name, &case.expected);
            wrong.push(format!("{name}\nexpected {expected:#?}\nfound {found:#?}"));
        }
        // The place is in the text of the case, not in what stands behind it.
        let last = case.text.lines().count() as u32;
        let is_there = |at: &Origin| matches!(at, Origin::File { line, .. } if *line <= last);
        if !errors.iter().any(|error| is_there(&error.at)) {
            wrong.push(format!("{}: no error lies in it: {found:#?}", case.name));
        }
    }
    if std::env::var_os("CORELANE_BLESS").is_some() {
        std::fs::write(&path, blessed).unwrap();
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}
