//! The examples of the repository: good as they are, and however they are broken an answer comes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use corelane::config::{Fallback, Inputs, Main, Origin, Section, keys, load};
use proptest::prelude::*;

use super::{ROUTE, env, inputs, lines, set};

/// The examples of the repository.
fn examples() -> BTreeMap<String, PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    let entries = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let tomls = entries.filter(|path| path.extension().is_some_and(|e| e == "toml"));
    tomls
        .map(|path| {
            (
                path.file_name().unwrap().to_string_lossy().into_owned(),
                path,
            )
        })
        .collect()
}

#[test]
fn the_examples_are_right() {
    let examples = examples();
    for needed in [
        "corelane.toml",
        "minimal.toml",
        "etcd.toml",
        "affinity.toml",
    ] {
        assert!(examples.contains_key(needed), "{needed}");
    }
    for (name, path) in examples {
        let checked = load(&Inputs {
            main: Main::File(path),
            ..inputs("")
        });
        assert!(
            checked.config.is_some() && checked.problems.is_empty(),
            "{name}: {:?}",
            lines(&checked)
        );
    }
}

/// `examples/corelane.toml` says it has every key with its default: it is held to that, keys in
/// comments included.
#[test]
fn the_full_example_has_every_key_with_its_default() {
    let text = std::fs::read_to_string(&examples()["corelane.toml"]).unwrap();
    let checked = load(&inputs(&text));
    for key in keys() {
        let mut section = "";
        let written = text.lines().any(|line| {
            let line = line.trim_start_matches("# ");
            if let Some(rest) = line.strip_prefix('[') {
                section = rest
                    .trim_start_matches('[')
                    .split(']')
                    .next()
                    .unwrap_or_default();
            }
            section == key.section.name() && line.starts_with(&format!("{} = ", key.name))
        });
        assert!(written, "{} is not in the example", key.path());
        let variables = key
            .aliases
            .iter()
            .filter(|alias| !text.contains(alias.name));
        assert_eq!(
            variables.count(),
            0,
            "a variable of {} is missing",
            key.path()
        );
        if let Fallback::Value(default) = key.fallback {
            for setting in checked
                .settings
                .iter()
                .filter(|setting| setting.key == *key)
            {
                assert_eq!(setting.value.as_deref(), Some(default), "{}", setting.path);
                let from_file = matches!(setting.origin, Origin::File { .. });
                assert!(from_file, "{} is in a comment only", setting.path);
            }
        }
    }
    assert!(
        Section::ALL
            .iter()
            .all(|section| text.contains(&section.header()))
    );
}

/// A line of an example, changed in one of the ways in which people and editors break files.
fn broken(line: &str, how: usize, with: &str) -> String {
    let (name, value) = line.split_once('=').unwrap_or((line, ""));
    match how {
        0 => String::new(),
        1 => name.to_owned(),
        2 => format!("{name}= {with}"),
        3 => format!("{with} = {value}"),
        4 => format!("{line}\n{line}"),
        5 => line.chars().rev().collect(),
        6 => line.replace('"', ""),
        7 => line.chars().take(line.chars().count() / 2).collect(),
        8 => format!("{name}= [{value}]"),
        _ => format!("[{with}]\n{line}"),
    }
}

proptest! {
    // As many as `PROPTEST_CASES` says, or 256; not optimised each takes 10 ms and more.

    /// However a good file is broken, an answer comes, and each of its lines has a place.
    #[test]
    fn broken_examples_get_an_answer(
        which in 0_usize..16,
        changes in prop::collection::vec((0_usize..200, 0_usize..10, ".{0,12}"), 1..4),
    ) {
        let examples: Vec<PathBuf> = examples().into_values().collect();
        let text = std::fs::read_to_string(&examples[which % examples.len()]).unwrap();
        let mut text: Vec<String> = text.lines().map(str::to_owned).collect();
        for (line, how, with) in changes {
            let line = line % text.len();
            text[line] = broken(&text[line], how, &with);
        }
        let checked = load(&inputs(&text.join("\n")));
        prop_assert_eq!(checked.config.is_none(), checked.errors().count() > 0);
        for problem in &checked.problems {
            let line = problem.to_string();
            prop_assert!(!line.contains('\n') && line.contains("; "), "{}", line);
            let placed = matches!(problem.at, Origin::File { line: 1.., column: 1.., .. });
            prop_assert!(placed || problem.at == Origin::Default, "{}", line);
        }
    }

    /// Any text at all.
    #[test]
    fn any_text_gets_an_answer(text in "(?s).{0,200}") {
        let checked = load(&inputs(&text));
        prop_assert_eq!(checked.config.is_none(), checked.errors().count() > 0);
    }

    /// Any value for any key, from flag or environment.
    #[test]
    fn any_value_gets_an_answer(which in 0_usize..1_000, text in ".{0,40}", flag: bool) {
        let key = keys()[which % keys().len()];
        let mut inputs = inputs(ROUTE);
        match (flag, key.env()) {
            (false, Some(name)) => inputs.env = env(&[(&name, &text)]),
            _ => inputs.overrides = vec![set(&key.path(), &text)],
        }
        let checked = load(&inputs);
        prop_assert_eq!(checked.config.is_none(), checked.errors().count() > 0);
    }
}
